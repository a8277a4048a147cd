"""Scan as Relax functions: one for a turn, and one that runs a range of turns by running its two halves.

Relax has no loops but recursion, and its virtual machine no tail calls: halving keeps as many calls open as the number of turns
has binary digits, whatever that number is. Each turn writes its row of every stacked result in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from tvm import relax, te, tirx
from tvm.script import tirx as T
from wasat.ir import DimLike, Graph, Node, TensorType, Value, symbols_of

from ..layouts import tvm_dtype
from ..lower import Context, Lowering, Table, called_functions, emit_nodes, weights_of

R = relax.op
_LO, _HI = "(lo)", "(hi)"
"""The range of turns among a function's symbols: no dimension of a graph has such names."""


class _Scan:
    """The functions of one scan in the making. All take the range of turns, the symbols' values, and the operands: the carried
    ones, the stacked results so far (as matrices of one row per turn), the sliced ones, the others, the body's weights."""

    def __init__(self, bb: relax.BlockBuilder, node: Node, table: Table, kernels: dict[Any, Any]) -> None:
        self.bb, self.node, self.table, self.kernels = bb, node, table, kernels
        attrs: Any = node.attrs
        c = attrs.carries
        self.attrs = attrs
        self.body: Graph = attrs.body.graph
        self.length: DimLike = node.inputs[c].shape[0] if attrs.slices else attrs.length
        self.rows = node.outputs[c:]
        shapes = [d for v in (*node.inputs, *node.outputs) for d in v.shape]
        self.inner = called_functions(bb, self.body, table, kernels)
        self.weights = weights_of(node, table)
        self.symbols = tuple(dict.fromkeys([*symbols_of(shapes), *node.attrs.symbols]))

    def build(self) -> Any:
        """The function that runs all turns: of the same operands without results so far."""
        run = self.function("run", lambda ctx, operands: relax.Tuple(self.changing(operands)))  # for now
        turn = self.function("turn", self.turn)
        halves = self.function("halves", lambda ctx, operands: self.halves(ctx, operands, run))
        choice = self.function("choice", lambda ctx, operands: self.choice(ctx, operands, turn, halves), dataflow=False)
        self.bb.update_func(run, self.bb.get()[choice])
        some = self.function("some", lambda ctx, operands: self.some(ctx, operands, run), dataflow=False)
        return self.function("scan", lambda ctx, operands: self.start(ctx, operands, some), fresh=True)

    def changing(self, operands: Sequence[Any]) -> list[Any]:
        """Of the operands, those that turns change."""
        return list(operands[: len(self.node.outputs)])

    def function(
        self, name: str, build: Callable[[Context, list[Any]], Any], dataflow: bool = True, fresh: bool = False
    ) -> Any:
        """Adds a function whose result ``build(ctx, operands)`` emits; ``fresh``: one without results so far."""
        ctx = Context(self.bb, self.body, self.kernels)
        lo, hi = (ctx.symbols.setdefault(s, tirx.Var(s.strip("()"), "int64")) for s in (_LO, _HI))
        turns = relax.Var("turns", relax.ShapeType([lo, hi, *(ctx.symbol(s) for s in self.symbols)]))
        c = self.attrs.carries
        types = [ctx.type(v.type if shape is None else v.tensor.with_shape(*shape)) for v, shape in _operands(self.node)]
        if not fresh:
            types[c:c] = [self.matrix(ctx, v) for v in self.rows]
        operands = [*(relax.Var(f"x{i}", t) for i, t in enumerate(types)), *ctx.declare_weights(self.weights)]
        unique = self.bb.get_unique_name(f"loop.{name}")  # no graph's function has a dot in its name
        with self.bb.function(unique, [turns, *operands], {"relax.force_pure": True}, private=True):
            if dataflow:
                with self.bb.dataflow():
                    result = self.bb.emit_output(build(ctx, operands))
            else:
                result = build(ctx, operands)
            return self.bb.emit_func_output(result)

    def matrix(self, ctx: Context, v: Value) -> relax.TensorType:
        """The type of a stacked result while it is written."""
        return relax.TensorType(ctx.dims((self.length, math.prod(v.shape[1:]))), tvm_dtype(v.tensor.dtype))

    def range(self, ctx: Context, lo: Any, hi: Any) -> relax.ShapeExpr:
        return relax.ShapeExpr([lo, hi, *(ctx.symbol(s) for s in self.symbols)])

    def parts(self, ctx: Context, result: Any) -> list[Any]:
        return [ctx.emit(relax.TupleGetItem(result, i)) for i in range(len(self.node.outputs))]

    def start(self, ctx: Context, operands: list[Any], some: Any) -> Any:
        """Allocates the stacked results; here, where the number of turns is no constant, lest they be folded into constants."""
        rows = []
        for v in self.rows:
            t = self.matrix(ctx, v)
            shape = relax.ShapeExpr([ctx.symbols[_HI] - ctx.symbols[_LO], *t.shape.values[1:]])
            empty = ctx.emit(R.builtin.alloc_tensor(shape, tvm_dtype(v.tensor.dtype), 0))
            rows.append(self.bb.match_cast(empty, t))
        c = self.attrs.carries
        return relax.Call(some, [self.range(ctx, ctx.symbols[_LO], ctx.symbols[_HI]), *operands[:c], *rows, *operands[c:]])

    def some(self, ctx: Context, operands: list[Any], run: Any) -> Any:
        """Nothing, if there is no turn."""
        lo, hi = ctx.symbols[_LO], ctx.symbols[_HI]
        none = relax.Tuple(self.changing(operands))
        return ctx.emit(relax.If(relax.prim_value(hi <= lo), none, relax.Call(run, [self.range(ctx, lo, hi), *operands])))

    def choice(self, ctx: Context, operands: list[Any], turn: Any, halves: Any) -> Any:
        lo, hi = ctx.symbols[_LO], ctx.symbols[_HI]
        one, more = (relax.Call(f, [self.range(ctx, lo, hi), *operands]) for f in (turn, halves))
        return ctx.emit(relax.If(relax.prim_value(hi - lo <= 1), one, more))

    def halves(self, ctx: Context, operands: list[Any], run: Any) -> Any:
        lo, hi = ctx.symbols[_LO], ctx.symbols[_HI]
        middle = lo + tirx.floordiv(hi - lo, tirx.IntImm("int64", 2))
        halves = [self.range(ctx, lo, middle), self.range(ctx, middle, hi)]
        first, second = reversed(halves) if self.attrs.reverse else halves
        after = self.parts(ctx, ctx.emit(relax.Call(run, [first, *operands])))
        return relax.Call(run, [second, *after, *operands[len(after) :]])

    def turn(self, ctx: Context, operands: list[Any]) -> Any:
        """The body at turn lo."""
        c, s, lo = self.attrs.carries, self.attrs.slices, ctx.symbols[_LO]
        carried, rows, rest = operands[:c], operands[c : len(self.node.outputs)], operands[len(self.node.outputs) :]
        sliced = [ctx.te(lambda x: te.compute(x.shape[1:], lambda *i: x[(lo, *i)], "row"), x, name="row") for x in rest[:s]]
        ctx.functions = self.inner
        ctx.env.update(zip(self.body.inputs, [*carried, *sliced, *rest[s:]]))  # and then the weights
        emit_nodes(ctx, self.body, self.table)
        results = [ctx.env[v] for v in self.body.outputs]
        written = []
        for matrix, row, v in zip(rows, results[c:], self.rows):
            flat = ctx.view(row, v.shape[1:], (math.prod(v.shape[1:]),))
            put = ctx.kernel(("put", matrix.ty.dtype), lambda dtype=matrix.ty.dtype: _put(dtype), "put")  # type: ignore[misc]
            written.append(ctx.call_inplace(put, [matrix, flat, lo], [0], [matrix.ty]))
        return relax.Tuple([*results[:c], *written])


@cache
def _put(dtype: str) -> tirx.PrimFunc:
    """PrimFunc(rows [n, size], row [size], turn): row number ``turn`` is written in place."""

    @T.prim_func(s_tir=True, private=True)
    def put(rows_ptr: T.handle, row_ptr: T.handle, turn: T.int64) -> None:
        T.func_attr({"tirx.noalias": True})
        n, size = T.int64(), T.int64()
        rows = T.match_buffer(rows_ptr, (n, size), dtype)
        row = T.match_buffer(row_ptr, (size,), dtype)
        for i in T.grid(size):
            with T.sblock("put"):
                at = T.axis.spatial(size, i)
                T.reads(row[at])
                T.writes(rows[turn, at])
                rows[turn, at] = row[at]

    return put


def _operands(node: Node) -> list[tuple[Value, tuple[DimLike, ...] | None]]:
    """The operands, each with the shape that the body wants it in (of packed weights None). What a check must find equal to
    it when the program runs may be spelt otherwise outside."""
    attrs: Any = node.attrs
    c, s = attrs.carries, attrs.slices
    made: list[tuple[Value, tuple[DimLike, ...] | None]] = []
    for i, (x, v) in enumerate(zip(node.inputs, attrs.body.graph.inputs)):
        turns = (x.shape[0],) if c <= i < c + s else ()
        made.append((x, (*turns, *v.shape) if isinstance(x.type, TensorType) else None))
    return made


def _functions(bb: relax.BlockBuilder, node: Node, table: Table, kernels: dict[Any, Any]) -> Any:
    return _Scan(bb, node, table, kernels).build()


def _lower(ctx: Context, node: Node, *operands: Any, counted: bool = False) -> list[Any]:
    """The carries, and the rows of every turn; ``counted``: which are written into memory that is passed."""
    attrs: Any = node.attrs
    c = attrs.carries
    length = node.inputs[c].shape[0] if attrs.slices else attrs.length
    shapes = [d for v in (*node.inputs, *node.outputs) for d in v.shape]
    symbols = dict.fromkeys([*symbols_of(shapes), *attrs.symbols])
    flat = [(v.shape[0], math.prod(v.shape[1:])) for v in node.outputs[c:]]
    rows = [
        ctx.emit(R.builtin.alloc_tensor(ctx.shape(f), tvm_dtype(v.tensor.dtype), 0))
        for v, f in zip(node.outputs[c:], flat if counted else ())
    ]
    turns = relax.ShapeExpr([tirx.IntImm("int64", 0), ctx.dim(length), *(ctx.symbol(s) for s in symbols)])
    fitted = [x if d is None else ctx.view(x, v.shape, d) for x, (v, d) in zip(operands, _operands(node))]
    parts = ctx.run(node, [turns, *fitted[:c], *rows, *fitted[c:]])
    return [*parts[:c], *(ctx.view(x, f, v.shape) for x, f, v in zip(parts[c:], flat, node.outputs[c:]))]


SCAN = Lowering(_lower, functions=_functions)

LOOP = "wasat.loop"
"""The attribute of a function that is called for a range of turns, one at a time, from the last one if its value is 1: for
who runs loops without recursion."""


def _turn(bb: relax.BlockBuilder, node: Node, table: Table, kernels: dict[Any, Any]) -> Any:
    scan = _Scan(bb, node, table, kernels)
    turn = scan.function("turn", scan.turn)
    made = bb.get()[turn].with_attr(LOOP, int(bool(scan.attrs.reverse)))
    bb.update_func(turn, made.with_attr("global_symbol", turn.name_hint))  # of private ones, TVM changes the parameters
    return turn


COUNTED = Lowering(partial(_lower, counted=True), functions=_turn)
"""Scan as one call of the function of a turn."""
