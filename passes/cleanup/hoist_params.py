"""Moves what is computed from parameters alone out of the graphs, into parameters computed once, when they are loaded."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from math import prod

from wasat.ir import DerivedParam, Graph, Node, ParamSource, Program, TensorType, Type, Value, copy_node
from wasat.ir.op import concrete

from ..core import Pass, Remarks, attrs_key
from ..pattern import erase_dead


def param_only(graph: Graph) -> set[Value]:
    """Parameters, and every value computed from parameters and constants alone whose shape holds no symbol."""
    found = {v for v in graph.params.values() if not v.type.symbols}
    constant: set[Value] = set()
    for node in graph.nodes:
        if len(node.outputs) != 1 or node.attrs.symbols:
            continue
        if node.output.const is not None:
            constant.add(node.output)
        elif any(v in found for v in node.inputs) and all(v in found or v in constant for v in node.inputs):
            found.add(node.output)
    return found


def size_in_bytes(type: Type) -> float:
    """Memory that a value takes whose shape holds no symbol."""
    shape = [concrete(d) for d in type.shape]
    if isinstance(type, TensorType):
        return prod(shape) * type.dtype.bits / 8
    return prod(shape[:-1]) * concrete(type.row_bits) / 8


@dataclass(frozen=True)
class HoistParams(Pass):
    """Nodes that depend on parameters and constants only -> derived parameters; parameters that no graph reads any more go.

    ``growth``: what is larger than this many times the parameters and constants it is made of (a broadcast) stays in the graph.
    Equal computations in several graphs share one derived parameter.
    """

    growth: float = 4.0
    name = "hoist-params"

    def run(self, program: Program, remarks: Remarks) -> bool:
        keys = _Keys()
        derived: dict[int, str] = {}
        for graph in program.graphs.values():
            self._hoist(graph, program, keys, derived, remarks)
        if derived:
            gone = {name for graph in program.graphs.values() for name in graph.prune_params()}
            for name in gone.difference(*(g.params for g in program.graphs.values())):
                del program.params[name]
        return bool(derived)

    def _hoist(self, graph: Graph, program: Program, keys: _Keys, derived: dict[int, str], remarks: Remarks) -> None:
        only = param_only(graph)
        roots = {v: keys.of(v) for v in _roots(graph, only, self._small(graph, only))}
        for v, key in roots.items():  # before any is replaced: all are computed from the parameters as they are
            if key not in derived:
                name = derived[key] = _unused(_name(v), program.params)
                program.params[name] = derive(name, v, program.params)
        for v, key in roots.items():
            assert v.node is not None
            remarks.applied(f"parameter {derived[key]} is computed when it is loaded", v)
            graph.replace_uses(v, graph.add_param(derived[key], v.type))
            erase_dead(graph, v.node)

    def _small(self, graph: Graph, only: set[Value]) -> set[Value]:
        """Values of ``only`` that are no larger than ``growth`` times what they are made of."""
        made_of = {v: size_in_bytes(v.type) for v in graph.params.values() if v in only}
        small = set(made_of)
        for node in graph.nodes:
            v = node.outputs[0]  # the only one, where it is in ``only``
            if v in only:
                made_of[v] = sum(made_of.get(x) or size_in_bytes(x.type) for x in dict.fromkeys(node.inputs))
                if size_in_bytes(v.type) <= self.growth * made_of[v]:
                    small.add(v)
        return small


def _roots(graph: Graph, only: set[Value], small: set[Value]) -> list[Value]:
    """The values to hoist: small ones that something reads which stays in the graph; in order."""
    needed: set[Value] = set(graph.outputs)
    roots = []
    for node in graph.nodes_reversed:
        v = node.outputs[0]
        if v in only:
            if v not in needed:
                continue
            if v in small:
                roots.append(v)
                continue
        needed.update(node.inputs)
    return roots[::-1]


@dataclass
class _Keys:
    """Numbers for values of any graph: equal exactly for the same computation on the same parameters."""

    known: dict[Value, int] = field(default_factory=dict)
    numbers: dict[Hashable, int] = field(default_factory=dict)

    def of(self, v: Value) -> int:
        for node in _nodes_of(v, stop=self.known):
            operands = tuple(self._leaf(x) if x.node is None else self.known[x] for x in node.inputs)
            self.known[node.output] = self._number((node.op.name, attrs_key(node.attrs), operands))
        return self.known[v]

    def _leaf(self, v: Value) -> int:
        return self._number(v.param)

    def _number(self, key: Hashable) -> int:
        return self.numbers.setdefault(key, len(self.numbers))


def _nodes_of(v: Value, stop: Mapping[Value, object]) -> list[Node]:
    """The nodes that ``v`` is computed by, operands first, without those that make a value of ``stop``."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Value, bool]] = [(v, False)]
    while stack:
        x, done = stack.pop()
        if x.node is None or x in stop:
            continue
        if done:
            order.append(x.node)
        elif x.node not in seen:
            seen.add(x.node)
            stack.append((x, True))
            stack += [(y, False) for y in reversed(x.node.inputs)]
    return order


def derive(name: str, v: Value, params: Mapping[str, ParamSource]) -> DerivedParam:
    """The computation of ``v`` as a parameter; sources that are derived themselves are computed along, not nested."""
    g = Graph(name)
    env: dict[Value, Value] = {}
    sources: dict[str, ParamSource] = {}

    def add(source: str, type: Type, given: ParamSource) -> Value:
        if isinstance(given, DerivedParam):
            inner = {x: add(x.name, x.type, given.sources[x.name]) for x in given.graph.inputs}
            for node in given.graph.nodes:
                copy_node(g, node, inner)
            return inner[given.graph.outputs[0]]
        known = next((x for x in g.inputs if x.name == source), None)
        sources[source] = given
        return known if known is not None else g.add_input(source, type)

    nodes = _nodes_of(v, stop={})
    for x in dict.fromkeys(x for node in nodes for x in node.inputs if x.node is None):
        assert x.param is not None
        env[x] = add(x.param, x.type, params[x.param])
    for node in nodes:
        copy_node(g, node, env)
    g.set_outputs([env[v]])
    return DerivedParam(g, sources)


# -- names ---------------------------------------------------------------------------------------------------------------------
def _name(v: Value) -> str:
    """A name that tells what ``v`` is: ``layers.0.q_proj+k_proj.weight|int4``."""
    assert v.node is not None
    nodes = _nodes_of(v, stop={})
    words = [name.split(".") for name in dict.fromkeys(x.param for n in nodes for x in n.inputs if x.param is not None)]
    op, attrs = v.node.op.name, v.node.attrs
    suffix = {"concat": "", "quantize": f"|{getattr(attrs, 'scheme', '')}", "cast": f"|{getattr(attrs, 'dtype', '')}"}
    return _joined(words) + suffix.get(op, f"|{op}")


def _joined(names: list[list[str]]) -> str:
    """``a.q.w``, ``a.k.w`` -> ``a.q+k.w``: the words at both ends that all share are written once."""
    head = _shared(names)
    rest = [w[len(head) :] for w in names]
    tail = _shared([w[::-1] for w in rest])[::-1]
    middle = "+".join(filter(None, (".".join(w[: len(w) - len(tail)]) for w in rest)))
    return ".".join([*head, *([middle] if middle else []), *tail])


def _shared(names: list[list[str]]) -> list[str]:
    """The words with which all begin."""
    return [column[0] for column in takewhile(lambda c: len(set(c)) == 1, zip(*names))]


def _unused(name: str, params: Mapping[str, ParamSource]) -> str:
    if name not in params:
        return name
    i = 1
    while f"{name}_{i}" in params:
        i += 1
    return f"{name}_{i}"
