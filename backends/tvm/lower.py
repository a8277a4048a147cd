"""Graph to Relax: one table from operation to lowering, symbolic dimensions all the way.

A lowering is a function ``(ctx, node, *operands) -> Relax expression(s)``. Operations that a target's table lacks are
decomposed before anything is emitted, so a table needs the primitives and whatever it has better code for. A target with
hand-written kernels first *selects*: it replaces operations, alone or several at once, by nodes of :class:`KernelCall`. Weights
that a kernel reads in a layout of its own are packed when the artifact is written: the lowering names it, and gets the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import tvm
from tvm import relax, te, tirx
from wasat.ir import Attrs, Graph, IRError, Loc, Node, Op, Program, QTensorType, TensorType, Type, Value
from wasat.ir.dims import Dim, DimLike, symbols_of
from wasat.ir.errors import said

from . import nothing
from .layouts import Layout, Packed, Plain, tvm_dtype
from .ops.low_precision import NARROW
from .sizes import expression

Lowered = Callable[..., Any]


@dataclass(frozen=True)
class Lowering:
    """How one operation becomes Relax.

    ``lower(ctx, node, *operands)``; ``layouts(node)`` names, by operand index, the packed layout of operands that must be
    parameters (they arrive as lists of Relax variables); ``applies(node)`` refuses nodes it cannot do, which are then
    decomposed. ``narrow(node)``: whether operands and results may be of the types that are carried as bytes.
    ``functions(bb, node, table, kernels)`` adds the function that its code calls, ``ctx.functions[node]``, to the module.
    """

    lower: Lowered
    applies: Callable[[Node], bool] = lambda node: True
    layouts: Callable[[Node], Mapping[int, Layout]] = lambda node: {}
    narrow: Callable[[Node], bool] = lambda node: False
    functions: Callable[..., Any] | None = None

    def takes(self, node: Node) -> bool:
        """Whether this lowering can have the node: it applies, and packed operands are parameters."""
        return self.applies(node) and all(node.inputs[i].param for i in self.layouts(node))


Table = Mapping[str, Lowering]


def lowering_into(table: dict[str, Lowering]) -> Callable[..., Callable[[Lowered], Lowered]]:
    """A decorator ``lowers(*names, narrow=False)``: the function lowers the operations ``names``, with ``narrow`` for the types
    that are carried as bytes as well."""

    def lowers(*names: str, narrow: bool = False) -> Callable[[Lowered], Lowered]:
        def add(f: Lowered) -> Lowered:
            table.update((n, Lowering(f, narrow=lambda node: narrow)) for n in names)
            return f

        return add

    return lowers


@dataclass(frozen=True)
class Left:
    """What no kernel of a target does, and why, with its place; or how kernels do it: ``slow``ly, and why, or ``fast``."""

    graph: str
    why: str
    loc: Loc | None = None
    kind: Literal["left", "slow", "fast"] = "left"


Select = Callable[[Graph], Iterable[Left] | None]
"""Puts a target's kernels into a graph, or into the body of a node; says what it left, if it keeps count of that."""


@dataclass(frozen=True)
class Result:
    """One result of a kernel: its type in the graph; the shape the kernel writes, if that differs; the operand whose memory
    it is, if the kernel writes in place."""

    type: TensorType
    shape: tuple[DimLike, ...] | None = None
    alias: int | None = None


class KernelCall(Op):
    """The operation "call this hand-written kernel", made for one node.

    ``build(desc)`` makes the PrimFunc, whose parameters are the operands, the sizes ``desc.symbols`` if there are any, then the
    results that are not in place; equal descriptions share one function. Operand i is passed under ``shapes[i]`` if it is there
    (the same elements, row-major), or, a parameter, as the arrays of ``layouts[i]``.
    """

    kind = "control"

    def __init__(
        self, desc: Any, build: Callable[[Any], tirx.PrimFunc], results: Sequence[Result],
        shapes: Mapping[int, tuple[DimLike, ...]], layouts: Mapping[int, Layout],
    ) -> None:  # fmt: skip
        self.name = f"kernel.{desc.name}"  # type: ignore[misc]
        self.desc, self.build, self.results, self.shapes, self.layouts = desc, build, tuple(results), shapes, layouts
        self.lowering = Lowering(self.lower, layouts=lambda node: self.layouts)

    def infer(self, attrs: Attrs, *types: Type) -> list[Type]:
        return [r.type for r in self.results]

    def lower(self, ctx: Context, node: Node, *operands: Any) -> list[Any]:
        args: list[Any] = []
        places = []  # of each operand among the arguments
        for i, (x, v) in enumerate(zip(operands, node.inputs)):
            places.append(len(args))
            if i in self.layouts:
                args += x
            else:
                args.append(ctx.view(x, v.shape, self.shapes[i]) if i in self.shapes else x)
        args += [ctx.symbol(name) for name in getattr(self.desc, "symbols", ())]
        function = ctx.kernel(self.desc, lambda: self.build(self.desc), self.desc.name)
        types = [
            ctx.type(TensorType(r.type.dtype, r.shape or r.type.shape)) if r.alias is None else args[places[r.alias]].ty
            for r in self.results
        ]
        if any(r.alias is not None for r in self.results):
            made = ctx.call_inplace(function, args, [-1 if r.alias is None else places[r.alias] for r in self.results], types)
        else:
            made = ctx.call(function, args, types if len(types) > 1 else types[0])
        parts = [made] if len(types) == 1 else [ctx.emit(relax.TupleGetItem(made, i)) for i in range(len(types))]
        return [
            x if r.alias is not None or r.shape is None else ctx.view(x, r.shape, r.type.shape)
            for x, r in zip(parts, self.results)
        ]


def lowering_of(node: Node, table: Table) -> Lowering | None:
    """How ``node`` is lowered: as the operation says in ``lowering`` (a kernel call, one from outside), or by the table."""
    own: Lowering | None = getattr(node.op, "lowering", None)
    return own or table.get(node.op.name)


@dataclass
class WeightPlan:
    """Which packed arrays a program's entries take, in call order."""

    layouts: dict[tuple[str, Layout], list[Packed]] = field(default_factory=dict)
    reads: dict[str, dict[tuple[str, Layout], None]] = field(default_factory=dict)
    """Which of them each graph reads."""

    def add(self, graph: str, name: str, layout: Layout, arrays: list[Packed]) -> None:
        """``graph`` reads parameter ``name`` in that layout, as ``arrays``."""
        self.layouts.setdefault((name, layout), arrays)
        self.reads.setdefault(graph, {})[name, layout] = None

    @property
    def arrays(self) -> list[Packed]:
        return [a for arrays in self.layouts.values() for a in arrays]

    def of(self, graph: str) -> list[Packed]:
        """What ``graph`` takes after its inputs and states."""
        return [a for key in self.reads.get(graph, ()) for a in self.layouts[key]]


Read = tuple[str, Layout]
"""A parameter, and how it is read."""


def reads(graph: Graph, table: Table) -> dict[Read, list[Packed]]:
    """What the graph's operations read of parameters, and then what those in the bodies of its nodes do."""
    wanted: dict[Value, dict[Layout, None]] = {v: {} for v in graph.params.values()}
    inner: dict[Read, list[Packed]] = {}
    for node in graph.nodes:
        low = lowering_of(node, table)
        layouts_of = low.layouts(node) if low is not None else {}
        for i, v in enumerate(node.inputs):
            if v in wanted:
                wanted[v][layouts_of.get(i, Plain())] = None
        for body in node.attrs.bodies:
            inner |= reads(body.graph, table)
    for v, layouts in wanted.items():
        if graph.is_output(v):
            layouts[Plain()] = None
    own = ((v, layout) for v, layouts in wanted.items() for layout in layouts)
    return {(v.param or "", layout): layout.arrays(v.param or "", v.type) for v, layout in own} | inner


def plan_weights(graphs: Sequence[Graph], table: Table) -> WeightPlan:
    """The union of what the graphs' operations read."""
    plan = WeightPlan()
    for graph in graphs:
        for (name, layout), arrays in reads(graph, table).items():
            plan.add(graph.name, name, layout, arrays)
    return plan


class Kernels(dict[Any, Any]):
    """The module's hand-written kernels by description, and its nodes by the labels that variables of the module carry."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []

    def label(self, node: Node) -> str:
        self.nodes.append(node)
        return f"node{len(self.nodes) - 1}_"


_OPAQUE = 8
"""The pattern of a function that TVM must not fuse with others."""


class Context:
    """What lowerings see while one graph is emitted."""

    def __init__(self, bb: relax.BlockBuilder, graph: Graph, kernels: dict[Any, Any]) -> None:
        self.bb = bb
        self.graph = graph
        self.symbols: dict[str, Any] = {}
        """Variables, and functions of variables, by the names of the graph's symbols."""
        self.found = False
        """Whether there are functions among them."""
        self.env: dict[Value, Any] = {}
        self.weights: dict[Read, list[relax.Var]] = {}
        self.kernels = kernels
        self.label = ""
        """How variables are called: by the node that is emitted, for who reads the module."""
        self.functions: dict[Node, Called] = {}
        """The Relax functions that nodes call."""
        self.views: dict[Any, tuple[Any, dict[tuple[DimLike, ...], Any]]] = {}
        """Of a variable: the one that it is a view of, and that one's views by their shape."""

    # -- dimensions and types ------------------------------------------------------------------------------------------
    def symbol(self, name: str) -> Any:
        return self.symbols.setdefault(name, tirx.Var(name, "int64"))

    def declare(self, values: Sequence[Value], types: Sequence[TensorType]) -> list[relax.Var]:
        """Parameters of the function, one for each of ``values``. A symbol that is no axis by itself is found from an axis that
        is linear in it: TVM binds only what stands alone."""
        known = {str(d) for t in types for d in t.shape if isinstance(d, Dim) and str(d).isidentifier()}
        sizes: dict[DimLike, Any] = {}
        while found := next((s for t in types for d in t.shape if (s := _linear(d, known)) is not None), None):
            name, d, slope, offset = found
            sizes[d] = tirx.Var(f"size_of_{name}", "int64")
            self.symbols[name] = tirx.floordiv(sizes[d] - offset, tirx.IntImm("int64", slope))
            known.add(name)
        declared = []
        for v, t in zip(values, types):
            open_ = [s for s in t.symbols if s not in known]
            if open_:
                raise IRError(f"input %{v.name} is {t}, and no size of an input says what {', '.join(open_)} is")
            shape = [sizes[d] if d in sizes else self.dim(d) for d in t.shape]
            declared.append(relax.Var(_identifier(v.name), relax.TensorType(shape, tvm_dtype(t.dtype))))
        self.found = bool(sizes)
        return declared

    def declare_weights(self, found: Mapping[Read, Sequence[Packed]]) -> list[relax.Var]:
        """Parameters of the function for what it, and what it calls, reads of weights."""
        for key, arrays in found.items():
            self.weights[key] = [relax.Var(_identifier(a.name), relax.TensorType(list(a.shape), a.dtype)) for a in arrays]
        for name, v in self.graph.params.items():
            if (name, Plain()) in self.weights:
                [self.env[v]] = self.weights[name, Plain()]
        return self.passed(found)

    def passed(self, keys: Iterable[Read]) -> list[relax.Var]:
        return [x for key in keys for x in self.weights[key]]

    def dim(self, d: DimLike) -> Any:
        """A dimension as a TIR expression (int64)."""
        return expression(d, self.symbol)

    def dims(self, shape: Sequence[DimLike]) -> list[Any]:
        return [self.dim(d) for d in shape]

    def shape(self, shape: Sequence[DimLike]) -> relax.ShapeExpr:
        return relax.ShapeExpr(self.dims(shape))

    def type(self, t: Type) -> relax.TensorType:
        if isinstance(t, QTensorType):
            raise IRError(f"a value of type {t} was left unpacked: quantized weights must be parameters here")
        return relax.TensorType(self.dims(t.shape), tvm_dtype(t.dtype))

    # -- emission ------------------------------------------------------------------------------------------------------
    def emit(self, expr: Any, hint: str = "") -> Any:
        return self.bb.emit(expr, hint or self.label)

    def view(self, x: Any, shape: Sequence[DimLike], to: Sequence[DimLike]) -> Any:
        """``x``, which has ``shape``, under another one of as many elements: no copy. A view of a view is one of its source."""
        source, forms = self.views.get(x, (x, {tuple(shape): x}))
        if tuple(to) not in forms:
            forms[tuple(to)] = nothing.made(self, x, to) if 0 in to else self.emit(relax.op.reshape(source, self.shape(to)))
        found = forms[tuple(to)]
        self.views[source] = self.views[found] = (source, forms)
        return found

    def te(self, build: Callable[..., Any], *args: Any, name: str, alone: bool = False) -> Any:
        """Emits a tensor expression; ``build`` gets TE tensors for Relax operands, and may use any dimension of the graph.
        ``alone``: nothing is computed in one loop with it.

        Not ``emit_te``, which renames the symbols in the operands' shapes and misses what ``build`` closes over.
        """
        inputs = [te.placeholder(x.ty.shape.values, x.ty.dtype, f"x{i}") for i, x in enumerate(args)]
        out = nothing.unread(build(*inputs)) if args else build()
        func = te.create_prim_func([*inputs, out], "int64")
        sizes = [d for t in inputs for d in t.shape]
        derived = [v for d in sizes if not isinstance(d, tirx.Var) for v in tirx.analysis.undefined_vars(d)]
        missing = {*tirx.analysis.undefined_vars(func.body), *derived} - set(sizes)  # a buffer's size has to be known, too
        free = [v for s in self.symbols.values() for v in tirx.analysis.undefined_vars(s) if v in missing]
        if free:
            # TVM's fusion knows the symbols that a tensor's shape carries, and no others
            func = te.create_prim_func([*inputs, *free, out], "int64").with_attr("op_pattern", _OPAQUE)
        if alone:
            func = func.with_attr("op_pattern", _OPAQUE)
        gv = self.bb.add_func(func.without_attr("global_symbol"), name)
        return self.call(gv, [*args, *free], relax.TensorType(list(out.shape), out.dtype))

    def kernel(self, key: Any, build: Callable[[], tirx.PrimFunc], name: str) -> Any:
        """The module's one copy of a hand-written kernel, by its description ``key``."""
        if key not in self.kernels:
            unique = f"kernel{len(self.kernels)}_{name}"
            func = build().with_attr("op_pattern", _OPAQUE).with_attr("global_symbol", unique)
            self.kernels[key] = self.bb.add_func(func, unique)
        return self.kernels[key]

    def run(self, node: Node, args: Sequence[Any]) -> list[Any]:
        """The results of the function that stands for ``node``, of ``args`` and the weights that it reads."""
        called = self.functions[node]
        result = self.emit(relax.Call(called.function, [*args, *self.passed(called.weights)]))
        return [self.emit(relax.TupleGetItem(result, i)) for i in range(len(node.outputs))]

    def call(self, gv: Any, args: Sequence[Any], out: Any) -> Any:
        """``call_tir``: ``out`` is one tensor type or a list of them."""
        return self.emit(relax.op.call_tir(gv, list(args), out))

    def call_inplace(self, gv: Any, args: Sequence[Any], indices: Sequence[int], out: Sequence[Any]) -> Any:
        """``call_tir_inplace``: output i aliases argument ``indices[i]`` (-1: a new tensor)."""
        return self.emit(relax.op.call_tir_inplace(gv, list(args), list(indices), list(out)))


def emit_graph(
    bb: relax.BlockBuilder, graph: Graph, table: Table, plan: WeightPlan, states: Sequence[str], kernels: dict[Any, Any],
    state_types: Mapping[str, TensorType],
) -> None:  # fmt: skip
    """Adds ``graph`` to the module as a Relax function: inputs, states, then the weights that it reads.

    Outputs that are states (same name as an input) are updated in place and not returned.
    """
    ctx = Context(bb, graph, kernels)
    ctx.functions = called_functions(bb, graph, table, kernels)
    by_name = {v.name: v for v in graph.inputs}
    ordered = [v for v in graph.inputs if v.name not in states] + [by_name[s] for s in states if s in by_name]
    types = [state_types.get(v.name, v.tensor) for v in ordered]
    params = ctx.declare(ordered, types)
    ctx.env.update(zip(ordered, params))
    inputs = len(params)
    params += ctx.declare_weights({key: plan.layouts[key] for key in plan.reads.get(graph.name, ())})
    with bb.function(_identifier(graph.name), params, attrs={"num_input": inputs, "relax.force_pure": True}):
        with bb.dataflow():
            for v, t, x in zip(ordered, types, params):
                if ctx.found and v.name not in states and t.symbols:
                    ctx.env[v] = ctx.emit(relax.op.reshape(x, ctx.shape(t.shape)))  # by the sizes that all others go by
            emit_nodes(ctx, graph, table)
            outputs = [ctx.env[v] for v, n in zip(graph.outputs, graph.output_names) if n not in states]
            kept = [ctx.env[v] for v, n in zip(graph.outputs, graph.output_names) if n in states]
            result = bb.emit_output(relax.Tuple([*outputs, *kept]))
        bb.emit_func_output(result)


def _linear(d: DimLike, known: Collection[str]) -> tuple[str, DimLike, int, Any] | None:
    """Of a dimension ``a * n + b`` with one symbol n that is not known: n, itself, a and b."""
    unknown = [s for s in symbols_of([d]) if s not in known]
    if len(unknown) != 1 or not isinstance(d, Dim):
        return None
    steps = [(m, c) for m, c in d.terms if m]
    if len(steps) != 1 or steps[0][0] != (unknown[0],) or steps[0][1] < 1:
        return None
    return unknown[0], d, steps[0][1], sum(c for m, c in d.terms if not m)


class Called(NamedTuple):
    """A Relax function that stands for a node, and what it takes of weights after its operands."""

    function: Any
    weights: tuple[Read, ...]


def called_functions(bb: relax.BlockBuilder, graph: Graph, table: Table, kernels: dict[Any, Any]) -> dict[Node, Called]:
    """Adds the functions that nodes of ``graph`` call."""
    made = {}
    for node in graph.nodes:
        low = lowering_of(node, table)
        if low is not None and low.functions is not None:
            found = weights_of(node, table)
            made[node] = Called(low.functions(bb, node, table, kernels), tuple(found))
    return made


def weights_of(node: Node, table: Table) -> dict[Read, list[Packed]]:
    """What the bodies of ``node`` read of parameters."""
    return {key: arrays for body in node.attrs.bodies for key, arrays in reads(body.graph, table).items()}


def emit_nodes(ctx: Context, graph: Graph, table: Table) -> None:
    """Emits the nodes of ``graph``, whose inputs are in ``ctx.env``."""
    for node in graph.nodes:
        _emit_node(ctx, node, table)


def _emit_node(ctx: Context, node: Node, table: Table) -> None:
    low = lowering_of(node, table)
    if low is None:
        raise IRError(f"{node!r}: this target has no code for {node.op.name}", node.loc)
    for v in (*node.inputs, *node.outputs):
        if isinstance(v.type, TensorType) and v.type.dtype in NARROW and not low.narrow(node):
            dtype = v.type.dtype
            wide = "f32" if dtype.is_float else "i32"
            raise IRError(f"{node!r}: compiled programs move {dtype}, and do not compute with it: cast it to {wide}", node.loc)
    if isinstance(ctx.kernels, Kernels):
        ctx.label = ctx.kernels.label(node)
    layouts = low.layouts(node)
    operands = [ctx.weights[v.param or "", layouts[i]] if i in layouts else ctx.env[v] for i, v in enumerate(node.inputs)]
    try:
        out = low.lower(ctx, node, *operands)
    except IRError:
        raise
    except Exception as e:
        raise IRError(f"{node!r}: lowering failed: {said(e)}", node.loc) from e
    for v, x in zip(node.outputs, out if isinstance(out, (list, tuple)) else [out]):
        ctx.env[v] = x


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)


def selected(
    program: Program, table: Table, select: Select, on_host: bool = True, in_body: Select | None = None
) -> list[Graph]:  # fmt: skip
    """Copies of the graphs as they are lowered: ``select`` puts a target's kernels in, what has none is decomposed, indices
    are checked (or clamped, where code does not run ``on_host``). The bodies of nodes likewise, by ``in_body`` if there is
    one: what they are given of parameters is then theirs, and no operand; and no input of theirs is called as a state is."""
    from wasat.ir.decompose import decompose

    from .bodies import adopt
    from .ops.indices import given, guard

    states = program.interface.state_names

    def settle(g: Graph, inner: bool) -> None:
        put = in_body if inner and in_body is not None else select
        checked = () if inner else given(g)
        guard(g, checked, on_host)
        for v in g.inputs if inner else ():
            if v.name in states:
                g.rename(v, f"{v.name}|inner")
        put(g)
        nothing.spare(g)
        decompose(g, lambda node: (low := lowering_of(node, table)) is not None and low.takes(node), bodies=False)
        guard(g, checked, on_host)  # indices of what composites are made of
        for node in g.nodes:
            for body in adopt(node):
                settle(body, True)
        g.prune_params()

    graphs = [g.clone() for g in program.graphs.values()]
    for g in graphs:
        settle(g, False)
    return graphs


def lower_program(
    program: Program, table: Table, state_types: Mapping[str, TensorType] | None = None,
    select: Select = lambda graph: None, on_host: bool = True, kernels: Kernels | None = None, in_body: Select | None = None,
) -> tuple[tvm.IRModule, WeightPlan]:  # fmt: skip
    """A Relax module with one function per graph, and the weights that each of them takes after its inputs and states.

    ``select``, ``on_host`` and ``in_body`` are those of :func:`selected`; ``kernels`` receives what is made, and the labels
    of nodes.
    """
    graphs = selected(program, table, select, on_host, in_body)
    plan = plan_weights(graphs, table)
    bb = relax.BlockBuilder()
    kernels = Kernels() if kernels is None else kernels
    for g in graphs:
        emit_graph(bb, g, table, plan, program.interface.state_names, kernels, state_types or {})
    return relax.transform.DeadCodeElimination()(bb.finalize()), plan  # views that turned out to have no reader
