"""The graph: values, nodes in order, entry points of a program.

A value has one producer (a node, or the graph itself for inputs and parameters) and an ordered set of uses. Nodes form a
linked list in execution order, so that inserting, removing and iterating while changing are O(1) a step. There are no side
effects: whatever changes (a cache, optimizer state) goes in as a value and comes out as one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from .checks import Check, collect_checks
from .dims import DimError, DimLike, symbols_of
from .errors import IRError, Loc, TypeMismatch, WasatError, message_of, said
from .types import Array, QTensorType, TensorType, Type, type_of

if TYPE_CHECKING:
    import networkx

    from .axes import AxisRule
    from .op import Attrs, Op


class Value:
    """One tensor in a graph. Equality is identity."""

    __slots__ = ("graph", "index", "name", "node", "param", "type", "uses")

    def __init__(
        self, graph: Graph, type: Type, name: str, node: Node | None = None, index: int = 0, param: str | None = None
    ) -> None:
        self.graph = graph
        self.type = type
        self.name = name
        self.node = node
        """The node that makes it; None for an input or a parameter."""
        self.index = index
        """Which output of the node it is."""
        self.param = param
        """The parameter's name, if it stands for one; None for every other value."""
        self.uses: dict[tuple[Node, int], None] = {}
        """``(node, operand index)`` of every use, in order. Graph outputs are not in it: see Graph.is_output."""

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"

    @property
    def tensor(self) -> TensorType:
        """Its type, which must be a dense tensor's."""
        if not isinstance(self.type, TensorType):
            raise TypeMismatch(f"{self!r} is quantized; a dense tensor is needed here", self.loc)
        return self.type

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.type.shape

    @property
    def const(self) -> np.ndarray | None:
        """The array, if a ``constant`` node makes it."""
        if self.node is not None and self.node.op.name == "constant":
            attrs: Any = self.node.attrs
            return np.asarray(attrs.value.array)
        return None

    def made_by(self, *ops: str) -> Node | None:
        """The node that makes it, if that is one of these operations."""
        return self.node if self.node is not None and self.node.is_a(*ops) else None

    @property
    def loc(self) -> Loc | None:
        return self.node.loc if self.node is not None else None

    @property
    def users(self) -> list[Node]:
        """The nodes that read it, each once, in order."""
        return list(dict.fromkeys(n for n, _ in self.uses))


class Node:
    """An operation applied to values. Inputs change only through the graph (replace_uses, set_inputs)."""

    __slots__ = ("attrs", "checks", "erased", "graph", "inputs", "loc", "next", "op", "outputs", "prev")

    def __init__(self, graph: Graph, op: Op, inputs: tuple[Value, ...], attrs: Attrs, loc: Loc | None) -> None:
        self.graph = graph
        self.op = op
        self.inputs = inputs
        self.attrs = attrs
        self.outputs: tuple[Value, ...] = ()
        self.loc = loc
        self.checks: tuple[Check, ...] = ()
        """Pairs of dimensions that ``infer`` needed equal and could not decide: checked at run time."""
        self.prev: Node | None = None
        self.next: Node | None = None
        self.erased = False

    @property
    def output(self) -> Value:
        """The only output."""
        (out,) = self.outputs
        return out

    def is_a(self, *ops: str) -> bool:
        """Whether its operation is one of these: for patterns, which look for some. What is true of operations they say."""
        return self.op.name in ops

    @property
    def axes(self) -> AxisRule:
        """What depends on what along its axes."""
        return self.op.axes(self.attrs, *(v.type for v in self.inputs))

    @property
    def multiply_adds(self) -> DimLike:
        """Those of the products in it."""
        return self.op.multiply_adds(self.attrs, *(v.type for v in self.inputs))

    def __repr__(self) -> str:
        from .printer import brief, node_text

        return node_text(self, brief)


class Graph:
    """A function from inputs (and named parameters) to outputs, as an ordered list of nodes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[Value] = []
        self.params: dict[str, Value] = {}
        """Parameters that this graph reads, by name (a path such as ``layers.0.q.weight``), in order of declaration."""
        self.outputs: list[Value] = []
        self.output_names: list[str] = []
        self.first: Node | None = None
        self.last: Node | None = None
        self._count = 0
        self._names: dict[str, int] = {}
        self._out: dict[Value, int] = {}

    # -- construction ------------------------------------------------------------------------------------------------
    def fresh(self, hint: str) -> str:
        """A name no value of this graph has: ``hint``, or ``hint_1``, ``hint_2``, …"""
        n = self._names.get(hint)
        if n is None:
            self._names[hint] = 0
            return hint
        while True:
            n += 1
            name = f"{hint}_{n}"
            if name not in self._names:
                self._names[hint] = n
                self._names[name] = 0
                return name

    def rename(self, value: Value, hint: str) -> None:
        """Gives ``value`` the name ``hint`` (made unique)."""
        if value.name != hint:
            self._names.pop(value.name, None)
            value.name = self.fresh(hint)

    def add_input(self, name: str, type: Type, *, unique: bool = False) -> Value:
        """Declares the next input; its name must be free, or is made so if ``unique``."""
        if name in self._names and not unique:
            raise IRError(f"graph @{self.name} already has a value %{name}")
        value = Value(self, type, self.fresh(name))
        self.inputs.append(value)
        return value

    def add_param(self, name: str, type: Type) -> Value:
        """Declares parameter ``name``, or returns the value that already stands for it."""
        if name in self.params:
            if self.params[name].type != type:
                raise TypeMismatch(f"parameter {name} is {self.params[name].type} and {type}")
            return self.params[name]
        value = self.params[name] = Value(self, type, self.fresh(name), param=name)
        return value

    def add_node(
        self, op: Op, inputs: Sequence[Value], attrs: Attrs, *, before: Node | None = None, loc: Loc | None = None,
        names: Sequence[str] | None = None,
    ) -> Node:  # fmt: skip
        """Appends a node (or puts it before another), inferring the types of its outputs.

        Raises TypeMismatch, naming the operation, its operands and ``loc``, if the operation refuses them.
        """
        node = Node(self, op, tuple(inputs), attrs, loc)
        types, node.checks = infer(op, node.attrs, inputs, loc)
        hints = list(names) if names else [op.name] * len(types)
        node.outputs = tuple(Value(self, t, self.fresh(h), node, i) for i, (t, h) in enumerate(zip(types, hints)))
        for i, v in enumerate(node.inputs):
            v.uses[node, i] = None
        self._link(node, before)
        return node

    def _link(self, node: Node, before: Node | None) -> None:
        node.next = before
        node.prev = before.prev if before is not None else self.last
        if node.prev is not None:
            node.prev.next = node
        else:
            self.first = node
        if before is not None:
            before.prev = node
        else:
            self.last = node
        self._count += 1

    def set_outputs(self, outputs: Sequence[Value], names: Sequence[str] | None = None) -> None:
        """Declares what the graph returns; ``names`` default to the values' own names."""
        self.outputs = list(outputs)
        self.output_names = list(names) if names is not None else [v.name for v in outputs]
        if len(self.outputs) != len(self.output_names):
            raise IRError(f"graph @{self.name}: {len(self.outputs)} outputs, {len(self.output_names)} output names")
        self._out = {}
        for v in self.outputs:
            self._out[v] = self._out.get(v, 0) + 1

    # -- change ------------------------------------------------------------------------------------------------------
    def set_inputs(self, node: Node, inputs: Sequence[Value]) -> None:
        """Changes the operands of ``node``; output types must stay as they are (verify() checks)."""
        for i, v in enumerate(node.inputs):
            v.uses.pop((node, i), None)
        node.inputs = tuple(inputs)
        for i, v in enumerate(node.inputs):
            v.uses[node, i] = None

    def replace_uses(self, old: Value, new: Value) -> None:
        """Every use of ``old``, graph outputs included, becomes a use of ``new``."""
        if old is new:
            return
        for node, i in list(old.uses):
            inputs = list(node.inputs)
            inputs[i] = new
            node.inputs = tuple(inputs)
            new.uses[node, i] = None
        old.uses.clear()
        if old in self._out:
            self.outputs = [new if v is old else v for v in self.outputs]
            self._out[new] = self._out.get(new, 0) + self._out.pop(old)

    def replace(self, node: Node, values: Sequence[Value | None], rename: bool = True) -> None:
        """``values`` stand for the results of ``node`` from now on, and (``rename``) take their names; the node goes.

        None for a result that nobody uses. A value that stands for several has the name of the first.
        """
        pairs = [(old, new) for old, new in zip(node.outputs, values) if new is not None]
        names = {new: old.name for old, new in reversed(pairs) if new.node is not None} if rename else {}
        for old, new in pairs:
            self.replace_uses(old, new)
        self.erase(node)
        for new, name in names.items():
            self.rename(new, name)

    def erase(self, node: Node) -> None:
        """Removes a node whose outputs nobody uses."""
        for v in node.outputs:
            if v.uses or v in self._out:
                raise IRError(f"%{v.name} is still used and cannot be erased", node.loc)
            self._names.pop(v.name, None)
        for i, v in enumerate(node.inputs):
            v.uses.pop((node, i), None)
        if node.prev is not None:
            node.prev.next = node.next
        else:
            self.first = node.next
        if node.next is not None:
            node.next.prev = node.prev
        else:
            self.last = node.prev
        node.erased = True
        self._count -= 1

    def remove_input(self, value: Value) -> None:
        """Removes an input that nobody uses."""
        if value.uses or value in self._out:
            raise IRError(f"input %{value.name} of @{self.name} is still used and cannot be removed")
        self.inputs.remove(value)
        self._names.pop(value.name, None)

    # -- reading -----------------------------------------------------------------------------------------------------
    @property
    def nodes(self) -> Iterator[Node]:
        """Nodes in order. Erasing any node, or inserting before the one at hand, is safe while iterating."""
        node = self.first
        while node is not None:
            if not node.erased:
                yield node
            node = node.next  # an erased node still points onwards

    @property
    def nodes_reversed(self) -> Iterator[Node]:
        node = self.last
        while node is not None:
            before = node.prev
            yield node
            node = before

    def __len__(self) -> int:
        return self._count

    def is_output(self, value: Value) -> bool:
        return value in self._out

    def values(self) -> Iterator[Value]:
        """Inputs, parameters, and every node output, in order."""
        yield from self.inputs
        yield from self.params.values()
        for node in self.nodes:
            yield from node.outputs

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbols of the input and parameter types, in order of appearance."""
        return symbols_of(d for v in [*self.inputs, *self.params.values()] for d in v.type.shape)

    def count(self, op: str) -> int:
        """How many nodes apply the operation named ``op``."""
        return sum(n.op.name == op for n in self.nodes)

    def prune_params(self) -> list[str]:
        """Forgets parameters that nothing reads; returns their names."""
        gone = [k for k, v in self.params.items() if not v.uses and v not in self._out]
        for k in gone:
            self._names.pop(self.params.pop(k).name, None)
        return gone

    def __str__(self) -> str:
        from .printer import graph_text

        return graph_text(self)

    def _repr_html_(self) -> str:
        from .html import graph_html

        return graph_html(self)

    def to_networkx(self) -> networkx.DiGraph:
        """Dataflow as a networkx graph: nodes are Values and Nodes, edges run value -> node -> value."""
        import networkx as nx

        g = nx.DiGraph(name=self.name)
        for v in [*self.inputs, *self.params.values()]:
            g.add_node(v, kind="input" if v in self.inputs else "param", label=v.name)
        for node in self.nodes:
            g.add_node(node, kind="node", label=node.op.name)
            g.add_edges_from((v, node) for v in node.inputs)
            for v in node.outputs:
                g.add_node(v, kind="value", label=v.name)
                g.add_edge(node, v)
        return g

    def clone(self, name: str | None = None, dims: Mapping[str, DimLike] | None = None) -> Graph:
        """A copy with the same text, the symbols that ``dims`` names replaced."""
        other = Graph(name or self.name)
        env: dict[Value, Value] = {}
        dims = dims or {}
        for v in self.inputs:
            env[v] = other.add_input(v.name, v.type.substitute(dims))
        for k, v in self.params.items():
            p = env[v] = other.add_param(k, v.type.substitute(dims))
            other.rename(p, v.name)
        for node in self.nodes:
            copy_node(other, node, env, dims=dims)
        other.set_outputs([env[v] for v in self.outputs], self.output_names)
        return other


def copy_node(
    graph: Graph, node: Node, env: dict[Value, Value], *, before: Node | None = None, dims: Mapping[str, DimLike] | None = None
) -> Node:
    """Appends a copy of ``node`` to ``graph``, operands mapped through ``env``, which receives its outputs, and symbols
    through ``dims``."""
    attrs = node.attrs.bind(dims) if dims else node.attrs
    new = graph.add_node(
        node.op, [env[v] for v in node.inputs], attrs, before=before, loc=node.loc, names=[v.name for v in node.outputs]
    )
    env.update(zip(node.outputs, new.outputs))
    return new


def is_table(v: Value) -> bool:
    """Whether it is made of parameters, constants and positions alone, by moving, picking and element by element."""
    waiting, seen = [v], {v}
    while waiting:
        v = waiting.pop()
        node = v.node
        if node is None:
            if v.param is None:
                return False
            continue
        if not (node.op.kind == "source" or node.op.carries or node.op.elementwise or node.op.picks(node.attrs) is not None):
            return False
        waiting += [u for u in node.inputs if u not in seen]
        seen.update(node.inputs)
    return True


def infer(op: Op, attrs: Attrs, inputs: Sequence[Value], loc: Loc | None) -> tuple[list[Type], tuple[Check, ...]]:
    """Output types of an operation and the checks they rest on; errors name the operation, operands and ``loc``."""
    try:
        with collect_checks() as checks:
            types = op.infer(attrs, *(v.type for v in inputs))
    except (TypeMismatch, DimError) as e:
        message = e.message if isinstance(e, IRError) else str(e)
        operands = ", ".join(repr(v) for v in inputs)
        raise TypeMismatch(f"{op.name}({operands}){_attrs_note(attrs)}: {message}", loc) from None
    except WasatError:
        raise
    except Exception as e:
        if not _takes(op, attrs, inputs):
            raise TypeMismatch(f"{op.name} does not take {len(inputs)} operands: {message_of(e)}", loc) from None
        operands = ", ".join(repr(v) for v in inputs)
        raise IRError(f"{op.name}({operands}): infer fails: {said(e)}", loc) from e
    return ([types] if isinstance(types, (TensorType, QTensorType)) else list(types)), tuple(checks)


def _takes(op: Op, attrs: Attrs, inputs: Sequence[Value]) -> bool:
    """Whether ``infer`` of the operation has that many operands."""
    try:
        inspect.signature(op.infer).bind(attrs, *inputs)
    except TypeError:
        return False
    return True


def _attrs_note(attrs: Attrs) -> str:
    from .printer import attrs_text, brief

    text = attrs_text(attrs, brief)
    return f" {text}" if text else ""


class ParamSource(Protocol):
    """Where a parameter's data come from; nothing is read before ``load``.

    One with ``is_data = True`` holds numbers of a model, which passes may look at; others make theirs up when they are asked.
    """

    @property
    def type(self) -> Type: ...

    def load(self) -> Array: ...


@dataclass(frozen=True)
class ArrayParam:
    """A parameter that is already in memory."""

    is_data: ClassVar[bool] = True
    array: Array
    type: Type

    def load(self) -> Array:
        found = type_of(self.array)
        if found != self.type:
            raise TypeMismatch(f"an array {found} was given for a parameter that is {self.type}")
        return self.array


@dataclass
class DerivedParam:
    """A parameter computed from others by a one-output graph when (and each time) it is asked for."""

    graph: Graph
    sources: Mapping[str, ParamSource]

    @property
    def type(self) -> Type:
        return self.graph.outputs[0].type

    def load(self) -> Array:
        from .evaluate import evaluate

        return evaluate(self.graph, {v.name: self.sources[v.name].load() for v in self.graph.inputs})[0]
