"""Lowerings of ordering and scattering, for every target: kernels that any of TVM's schedules can take.

Spatial loops may run in any order or at once; what has to happen in order (a merge, writes to one place) is a loop inside a
block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tvm import relax, te, tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I
from wasat.ir import DType, Node
from wasat.ir.ops.index import ScatterAttrs, Sort, TopK

from ..cpu.kernels.emit import ceil_div, int64, minimum, symbol
from ..layouts import tvm_dtype
from ..lower import Context, Lowering

R = relax.op


# -- order ------------------------------------------------------------------------------------------------------------------
_LEVELS = 62
"""Most merges of a row, each of rows twice as long as the one before."""


def _order(ctx: Context, node: Node, x: Any, axis: int, descending: bool, levels: int) -> Any:
    """Places of x's elements along the node's axis in sorted order, the axis last: i64 [rows, n]."""
    t = node.inputs[0].tensor
    n = t.shape[axis]
    rest = [d for i, d in enumerate(t.shape) if i != axis]
    flat = (math.prod(rest), n)
    rows = ctx.emit(R.reshape(R.permute_dims(x, _last(axis, t.rank)), ctx.shape(flat)))
    kind = tvm_dtype(t.dtype)
    if t.dtype is DType.BOOL or (t.dtype.is_float and t.dtype.bits < 32):
        kind = "int32" if t.dtype is DType.BOOL else "float32"
        rows = ctx.emit(R.astype(rows, kind))
    key = ("order", kind, descending)
    gv = ctx.kernel(key, lambda: _order_kernel(kind, t.dtype.is_float, descending, levels), "order")
    out = relax.TensorType(ctx.dims(flat), "int64")
    return ctx.emit(relax.TupleGetItem(ctx.call(gv, [rows], [out, out]), 0))


def _last(axis: int, rank: int) -> list[int]:
    return [i for i in range(rank) if i != axis] + [axis]


@functools.cache
def _order_kernel(dtype: str, is_float: bool, descending: bool, levels: int) -> Any:
    """Stable merge sort of each row by place; the second output is where it works."""

    def before(a: Any, b: Any) -> Any:
        """Whether b has to stand before a, which stands first."""
        less, greater = (a, b) if descending else (b, a)
        strictly = greater > less
        return tirx.any(strictly, tirx.all(tirx.isnan(greater), tirx.Not(tirx.isnan(less)))) if is_float else strictly

    @T.prim_func(s_tir=True, private=True)
    def order(x_ptr: T.handle, out_ptr: T.handle, work_ptr: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        rows, n = T.int64(), T.int64()
        x = T.match_buffer(x_ptr, (rows, n), dtype)
        out = T.match_buffer(out_ptr, (rows, n), "int64")
        work = T.match_buffer(work_ptr, (rows, n), "int64")
        for row in T.serial(rows):
            with T.sblock("order"):
                r = T.axis.spatial(rows, row)
                T.reads(x[r, 0:n])
                T.writes(out[r, 0:n], work[r, 0:n])
                at = T.alloc_buffer((2,), "int64", scope="local")
                for i in T.serial(n):
                    out[r, i] = i
                for level in T.serial(T.int64(levels)):
                    width = T.meta_var(T.shift_left(T.int64(1), level))
                    if width < n:
                        for pair in T.serial(T.ceildiv(n, 2 * width)):
                            start = T.meta_var(pair * 2 * width)
                            middle = T.meta_var(T.min(start + width, n))
                            end = T.meta_var(T.min(start + 2 * width, n))
                            at[0] = start
                            at[1] = middle
                            for i in T.serial(end - start):
                                left = T.meta_var(T.min(at[0], n - 1))
                                right = T.meta_var(T.min(at[1], n - 1))
                                later = T.meta_var(before(x[r, out[r, left]], x[r, out[r, right]]))
                                if at[1] < end and (at[0] >= middle or later):
                                    work[r, start + i] = out[r, right]
                                    at[1] = at[1] + 1
                                else:
                                    work[r, start + i] = out[r, left]
                                    at[0] = at[0] + 1
                        for i in T.serial(n):
                            out[r, i] = work[r, i]

    return order


def _picked(ctx: Context, node: Node, x: Any, order: Any, axis: int) -> tuple[Any, Any]:
    """The first of x's elements in ``order`` that the output has room for, and their places in the output's shape."""
    t = node.inputs[0].tensor
    shape, sizes = ctx.dims(node.outputs[0].shape), ctx.dims(t.shape)

    def place(o: Any, i: Sequence[Any]) -> Any:
        row: Any = tirx.IntImm("int64", 0)
        for j in range(t.rank):
            row = row if j == axis else row * sizes[j] + i[j]
        return o(row, i[axis])

    places = ctx.te(lambda o: te.compute(shape, lambda *i: place(o, i), name="places"), order, name="places")

    def pick(v: Any, p: Any) -> Any:
        return te.compute(shape, lambda *i: v(*i[:axis], p(*i), *i[axis + 1 :]), name="ordered")

    return ctx.te(pick, x, places, name="ordered"), places


def sorted_by(levels: int) -> Callable[..., Any]:
    """The lowering of sort, for rows of up to 2**levels elements."""

    def lower(ctx: Context, node: Node, x: Any) -> Any:
        a = Sort.Attrs.of(node)
        return _picked(ctx, node, x, _order(ctx, node, x, a.axis, a.descending, levels), a.axis)[0]

    return lower


def top_by(levels: int) -> Callable[..., Any]:
    """The same of top_k."""

    def lower(ctx: Context, node: Node, x: Any) -> tuple[Any, Any]:
        a = TopK.Attrs.of(node)
        return _picked(ctx, node, x, _order(ctx, node, x, a.axis, a.largest, levels), a.axis)

    return lower


# -- scatter ------------------------------------------------------------------------------------------------------------------
_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda old, new: new, "add": lambda old, new: old + new, "mul": lambda old, new: old * new,
    "max": tirx.max, "min": tirx.min,
}  # fmt: skip


_LINE = 16
"""Elements side by side that a block writes: a cache line of f32."""


def _scatter_kernel(node: Node) -> Any:
    """out = x, then each update in turn combined with its place.

    A block has a line of places in all rows of the axis to itself, and walks the updates that may fall there in order.
    """
    a = ScatterAttrs.of(node)
    axis, combine = a.axis, _COMBINE[a.reduce]
    types = [v.tensor for v in node.inputs]
    x_shape, ids_shape, updates_shape = ([int64(d) if isinstance(d, int) else symbol("n") for d in t.shape] for t in types)
    slices, last = node.op.name == "scatter", len(x_shape) - 1
    run = len(ids_shape) if slices else 1  # axes of the updates that stand for the axis of x
    line = axis != last
    free = [k for k in range(last + 1) if k != axis]
    blocks = [ceil_div(x_shape[k], _LINE) if line and k == last else x_shape[k] for k in free]
    with IRBuilder() as ib, I.prim_func(s_tir=True, private=True):
        I.func_name("scatter")
        I.func_attr({"tirx.noalias": True})
        handles = [I.arg(name, I.handle()) for name in ("x_ptr", "ids_ptr", "updates_ptr", "out_ptr")]
        dtypes = [tvm_dtype(t.dtype) for t in (*types, types[0])]
        shapes = (x_shape, ids_shape, updates_shape, x_shape)
        x, ids, updates, out = (I.match_buffer(h, s, d) for h, s, d in zip(handles, shapes, dtypes))
        total = math.prod(blocks, start=int64(1))
        with I.serial(total) as loop, I.sblock("scatter"):  # one axis: TVM's GPU rules trip over two or three here
            at, place = I.axis.spatial(total, loop), {}
            for k, n in zip(reversed(free), reversed(blocks)):
                at, place[k] = tirx.floordiv(at, n), tirx.floormod(at, n)
            I.reads(*map(_whole, (x, ids, updates)))
            I.writes(_whole(out))
            start = place[last] * _LINE if line else int64(0)

            def along(extents: Sequence[Any], shape: Sequence[Any]) -> Any:
                return _nest([*extents, minimum(_LINE, shape[-1] - start)] if line else extents)

            with along([x_shape[axis]], x_shape) as inner:
                to = [inner[0] if k == axis else start + inner[1] if k == last else place[k] for k in range(last + 1)]
                I.buffer_store(out, x[tuple(to)], to)
            inside = [place[k] < updates_shape[k] for k in free if not slices and not (line and k == last)]
            with _when(inside), along(updates_shape[axis : axis + run], updates_shape) as inner:
                if line:
                    place[last] = start + inner[-1]
                at = [*(place[k] for k in range(axis)), *inner[:run], *(place[k] for k in range(axis + 1, last + 1))]
                row = tirx.Cast("int64", ids[tuple(inner[:run] if slices else at)])
                to = [tirx.Select(row < 0, row + x_shape[axis], row) if k == axis else place[k] for k in range(last + 1)]
                I.buffer_store(out, combine(out[tuple(to)], updates[tuple(at)]), to)
    return ib.get()


def _whole(buffer: Any) -> Any:
    return buffer[tuple(slice(0, n) for n in buffer.shape)]


@contextmanager
def _when(conditions: Sequence[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        if conditions:
            stack.enter_context(I.If(tirx.all(*conditions)))
            stack.enter_context(I.Then())
        yield


@contextmanager
def _nest(extents: Sequence[Any]) -> Iterator[list[Any]]:
    """Nested loops; any number of them, none included."""
    with ExitStack() as stack:
        yield [stack.enter_context(I.serial(n)) for n in extents]


def _scatter(ctx: Context, node: Node, x: Any, ids: Any, updates: Any) -> Any:
    if 0 in node.output.shape:
        return x
    types = tuple((v.tensor.dtype, *(d if isinstance(d, int) else None for d in v.shape)) for v in node.inputs)
    gv = ctx.kernel((node.op.name, node.attrs, types), lambda: _scatter_kernel(node), node.op.name)
    return ctx.call(gv, [x, ids, updates], ctx.type(node.output.type))


def _replaces(node: Node) -> bool:
    return ScatterAttrs.of(node).reduce == "none"


INDEXING: dict[str, Lowering] = {
    "sort": Lowering(sorted_by(_LEVELS)), "top_k": Lowering(top_by(_LEVELS)), "scatter": Lowering(_scatter, narrow=_replaces),
    "scatter_along": Lowering(_scatter, narrow=_replaces),
}  # fmt: skip
"""Operation to lowering."""
