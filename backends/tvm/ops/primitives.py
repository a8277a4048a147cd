"""Lowerings of the primitives, for every target: Relax operators where their meaning is ours, tensor expressions elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax, te, tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I
from wasat.ir import DType, IRError, Node, equal
from wasat.ir.dims import Dim, DimLike
from wasat.ir.ops.cache import CacheAttrs
from wasat.ir.ops.constant import Constant
from wasat.ir.ops.random import PARITY, ROTATIONS
from wasat.ir.ops.reduce import ReduceAttrs
from wasat.ir.ops.shape import Concat, Reverse, Transpose

from .. import nothing
from ..layouts import tvm_dtype
from ..lower import Context, Lowering, lowering_into
from .cond import COND
from .elementwise import ELEMENTWISE, elementwise, stretched
from .low_precision import NARROW, carried
from .ordering import INDEXING
from .quantized import QUANTIZED
from .scan import SCAN

R = relax.op
PRIMITIVES: dict[str, Lowering] = {**ELEMENTWISE, **INDEXING, **QUANTIZED, "scan": SCAN, "cond": COND}
lowers = lowering_into(PRIMITIVES)


# -- sources --------------------------------------------------------------------------------------------------------------
@lowers("constant", narrow=True)
def _constant(ctx: Context, node: Node) -> Any:
    literal = Constant.Attrs.of(node).value
    array, dtype = carried(np.array(literal.array)), tvm_dtype(literal.dtype)
    if array.ndim == 0 and literal.dtype.value.startswith("u"):
        # TVM folds a scalar into the arithmetic around it, where it takes 0 - x of unsigned ones for 0, and 2**64 - 1 for -1
        return ctx.view(relax.const(array.reshape(1), dtype), (1,), ())
    return relax.const(array, dtype)


@lowers("dim_size")
def _dim_size(ctx: Context, node: Node) -> Any:
    a: Any = node.attrs
    n = ctx.dim(a.size)
    return ctx.te(lambda: te.compute((), lambda: tirx.Cast(tvm_dtype(a.dtype), n), name="dim_size"), name="dim_size")


@lowers("iota")
def _iota(ctx: Context, node: Node) -> Any:
    a: Any = node.attrs
    n = ctx.dim(a.size)
    return ctx.te(lambda: te.compute((n,), lambda i: tirx.Cast(tvm_dtype(a.dtype), i), name="iota"), name="iota")


# -- shape ----------------------------------------------------------------------------------------------------------------
@lowers("reshape", narrow=True)
def _reshape(ctx: Context, node: Node, x: Any) -> Any:
    return ctx.view(x, node.inputs[0].shape, node.output.shape)


@lowers("transpose", narrow=True)
def _transpose(ctx: Context, node: Node, x: Any) -> Any:
    return ctx.emit(R.permute_dims(x, list(Transpose.Attrs.of(node).perm)))


@lowers("broadcast_to", narrow=True)
def _broadcast_to(ctx: Context, node: Node, x: Any) -> Any:
    if not node.checks:
        return ctx.emit(R.broadcast_to(x, ctx.shape(node.output.shape)))
    shape, own = ctx.dims(node.output.shape), node.inputs[0].shape
    lead = len(shape) - len(own)
    stretched = [d != 1 and equal(d, to) is None for d, to in zip(own, node.output.shape[lead:])]

    def build(t: Any) -> Any:  # an axis that may be 1 when it runs
        def at(*i: Any) -> Any:
            return t(*(
                tirx.IntImm("int64", 0) if d == 1 else tirx.Select(n == 1, tirx.IntImm("int64", 0), j) if unsure else j
                for j, d, n, unsure in zip(i[lead:], own, t.shape, stretched)
            ))  # fmt: skip

        return te.compute(shape, at, name="broadcast_to")

    return ctx.te(build, x, name="broadcast_to")


@lowers("slice", narrow=True)
def _slice(ctx: Context, node: Node, x: Any) -> Any:
    a: Any = node.attrs
    starts = ctx.dims(a.starts)
    steps = ctx.dims(a.steps)
    shape = ctx.dims(node.output.shape)

    def build(t: Any) -> Any:
        return te.compute(shape, lambda *i: t(*(s + j * k for s, j, k in zip(starts, i, steps))), name="slice")

    return ctx.te(build, x, name="slice")


@lowers("concat", narrow=True)
def _concat(ctx: Context, node: Node, *xs: Any) -> Any:
    axis, shape = Concat.Attrs.of(node).axis, node.output.shape
    like = [  # sizes that are one by a check, written in one way
        ctx.view(x, v.shape, (*shape[:axis], v.shape[axis], *shape[axis + 1 :])) for x, v in zip(xs, node.inputs)
    ]
    return ctx.emit(R.concat(like, axis=axis))


@lowers("pad", narrow=True)
def _pad(ctx: Context, node: Node, x: Any) -> Any:
    a: Any = node.attrs
    low, inner, shape = ctx.dims(a.low), ctx.dims(node.inputs[0].shape), ctx.dims(node.output.shape)
    dtype = node.output.tensor.dtype
    number = int(a.value) if dtype.is_int else a.value
    fill = tirx.const(carried(np.asarray(a.value, dtype.np)).item() if dtype in NARROW else number, tvm_dtype(dtype))

    def build(t: Any) -> Any:
        def at(*i: Any) -> Any:
            inside = [tirx.all(j >= lo, j < lo + n) for j, lo, n in zip(i, low, inner)]
            return tirx.if_then_else(tirx.all(*inside), t(*(j - lo for j, lo in zip(i, low))), fill)

        return te.compute(shape, at, name="pad")

    return ctx.te(build, x, name="pad") if shape else x


@lowers("reverse", narrow=True)
def _reverse(ctx: Context, node: Node, x: Any) -> Any:
    for axis in Reverse.Attrs.of(node).axes:
        x = ctx.emit(R.flip(x, axis))
    return x


# -- reductions -------------------------------------------------------------------------------------------------------------
_REDUCE = {"reduce_sum": R.sum, "reduce_max": R.max, "reduce_min": R.min, "reduce_prod": R.prod}


def _flipped(bits: Any) -> Any:
    """Of a float's bits as an integer, those below the sign inverted if it is set: integers in the order of the floats. Its own
    inverse."""
    width = 64 if str(bits.ty.dtype) == "int64" else 32
    sign = tirx.shift_right(bits, tirx.const(width - 1, bits.ty.dtype))
    return tirx.bitwise_xor(bits, tirx.bitwise_and(sign, tirx.const(2 ** (width - 1) - 1, bits.ty.dtype)))


def _ordered(ctx: Context, node: Node, x: Any, largest: bool) -> Any:
    """f32 or f64 numbers as integers in their order, NaN at the end that an extreme is looked for. TVM's own extremes of floats
    skip NaN, and start at the greatest finite number instead of infinity."""
    to = "int64" if str(x.ty.dtype) == "float64" else "int32"
    quiet = int(np.array(np.nan, str(x.ty.dtype)).view(to))
    nan = tirx.const(quiet if largest else ~quiet, to)
    return elementwise(ctx, node, lambda v: tirx.Select(tirx.isnan(v), nan, _flipped(tirx.reinterpret(to, v))), x)


def _neutral(node: Node) -> np.ndarray:
    """The reduction of nothing, by the reference itself; TVM leaves memory unwritten there."""
    a: Any = node.attrs
    dtype = node.output.tensor.dtype
    return np.asarray(node.op.reference(type(a)(axes=(0,), keepdims=False), np.zeros((0,), dtype.np)))


def _unless_empty(ctx: Context, node: Node, sizes: Sequence[DimLike], neutral: Any, reduced: Callable[[], Any]) -> Any:
    """``reduced()``, over axes of these ``sizes``, or ``neutral`` where one is empty, as known or found at run time."""
    dtype = node.output.tensor.dtype
    number = relax.const(np.asarray(neutral, dtype.np), tvm_dtype(dtype))  # the dtype in words: of f64 it would make f32
    if any(n == 0 for n in sizes):
        return ctx.emit(R.broadcast_to(number, ctx.shape(node.output.shape)))
    unknown = [ctx.dim(n) for n in sizes if isinstance(n, Dim)]
    if not unknown:
        return reduced()

    def build(y: Any, neutral: Any) -> Any:
        filled = tirx.all(*(n > 0 for n in unknown))
        return te.compute(y.shape, lambda *i: tirx.Select(filled, y(*i), neutral()), name="unless_empty")

    return ctx.te(build, reduced(), number, name="unless_empty")


@lowers("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
def _reduce(ctx: Context, node: Node, x: Any) -> Any:
    a: Any = node.attrs
    if not a.axes:
        return x
    sizes = [node.inputs[0].shape[i] for i in a.axes]
    return _unless_empty(ctx, node, sizes, _neutral(node), lambda: _reduced(ctx, node, x))


def _reduced(ctx: Context, node: Node, x: Any) -> Any:
    a, dtype = ReduceAttrs.of(node), node.output.tensor.dtype
    narrow = dtype in (DType.F16, DType.BF16)  # accumulate in f32, as the reference does
    wide = ctx.emit(R.astype(x, "float32")) if narrow else x
    extreme = dtype.is_float and node.op.name in ("reduce_max", "reduce_min")
    if extreme:
        wide = _ordered(ctx, node, wide, node.op.name == "reduce_max")
    out = ctx.emit(_REDUCE[node.op.name](wide, list(a.axes), a.keepdims))
    if extreme:
        to = "float64" if dtype is DType.F64 else "float32"
        out = elementwise(ctx, node, lambda v: tirx.reinterpret(to, _flipped(v)), out)
    return ctx.emit(R.astype(out, tvm_dtype(dtype))) if narrow else out


@lowers("reduce_any", "reduce_all")
def _reduce_bool(ctx: Context, node: Node, x: Any) -> Any:
    a: Any = node.attrs
    if not a.axes:
        return x
    f, sizes = R.max if node.op.name == "reduce_any" else R.min, [node.inputs[0].shape[i] for i in a.axes]

    def reduced() -> Any:
        return ctx.emit(R.astype(f(R.astype(x, "int8"), list(a.axes), a.keepdims), "bool"))

    return _unless_empty(ctx, node, sizes, _neutral(node), reduced)


@lowers("arg_max", "arg_min")
def _arg(ctx: Context, node: Node, x: Any) -> Any:
    a: Any = node.attrs
    largest, dtype = node.op.name == "arg_max", node.inputs[0].tensor.dtype
    if dtype.is_float:
        x = x if dtype.bits >= 32 else ctx.emit(R.astype(x, "float32"))
        x = elementwise(ctx, node, lambda v: tirx.Select(v == tirx.const(0.0, v.ty.dtype), tirx.const(0.0, v.ty.dtype), v), x)
        x = _ordered(ctx, node, x, largest)  # where -0 and 0 would differ
    elif dtype is DType.BOOL:
        x = ctx.emit(R.astype(x, "int8"))
    place = ctx.emit(R.astype((R.argmax if largest else R.argmin)(x, a.axis, a.keepdims), "int64"))
    return ctx.emit(R.maximum(place, relax.const(0, "int64")))  # TVM says -1 where all are the worst integer there is


@lowers("cumsum")
def _cumsum(ctx: Context, node: Node, x: Any) -> Any:
    a: Any = node.attrs
    if a.reverse:
        x = ctx.emit(R.flip(x, a.axis))
    out = ctx.emit(R.cumsum(x, a.axis, tvm_dtype(node.output.tensor.dtype), exclusive=a.exclusive))
    return ctx.emit(R.flip(out, a.axis)) if a.reverse else out


# -- linear algebra ---------------------------------------------------------------------------------------------------------
@lowers("matmul")
def _matmul(ctx: Context, node: Node, x: Any, y: Any) -> Any:
    t = node.output.tensor.dtype
    (a, b), shape = (v.shape for v in node.inputs), node.output.shape
    x = ctx.view(x, a, (*stretched(a[:-2], shape[:-2]), shape[-2], a[-1]))  # sizes that are one by a check, in one way
    y = ctx.view(y, b, (*stretched(b[:-2], shape[:-2]), a[-1], shape[-1]))
    return _unless_empty(ctx, node, a[-1:], 0, lambda: _multiplied(ctx, t, x, y))


def _multiplied(ctx: Context, t: DType, x: Any, y: Any) -> Any:
    """x @ y of their common sizes, with elements of ``t``."""
    if t in (DType.F16, DType.BF16):
        return ctx.emit(R.astype(R.matmul(x, y, out_dtype="float32"), tvm_dtype(t)))
    if t is DType.BOOL:  # whether there is a common one
        x, y = (ctx.emit(R.astype(v, "int32")) for v in (x, y))
        return ctx.emit(R.greater(R.matmul(x, y), relax.const(0, "int32")))
    return ctx.emit(R.matmul(x, y))


@lowers("conv")
def _conv(ctx: Context, node: Node, x: Any, w: Any) -> Any:
    """Two stages: x spread and padded, then a sum without branches."""
    a: Any = node.attrs
    dtype = node.output.tensor.dtype
    if 0 in node.output.shape:
        return nothing.made(ctx, x, node.output.shape)
    wide = tvm_dtype(DType.F32 if dtype.bits < 32 else dtype)
    shape, space = ctx.dims(node.output.shape), ctx.dims(node.inputs[0].shape[2:])
    low, kernel = ctx.dims(a.low), ctx.dims(node.inputs[1].shape[2:])
    each, outputs = ctx.dim(node.inputs[1].shape[1]), ctx.dim(node.output.shape[1] // a.groups)
    reach = [(m - 1) * s + (k - 1) * d + 1 for m, s, k, d in zip(shape[2:], a.strides, kernel, a.dilation)]

    def build(t: Any, u: Any) -> Any:
        def source(*i: Any) -> Any:
            at = [j - lo for j, lo in zip(i[2:], low)]
            inside = [
                tirx.all(j >= 0, j < n * s, tirx.floormod(j, tirx.IntImm("int64", s)) == 0)
                for j, n, s in zip(at, space, a.input_dilation)
            ]
            place = [tirx.floordiv(j, tirx.IntImm("int64", s)) for j, s in zip(at, a.input_dilation)]
            return tirx.if_then_else(tirx.all(*inside), tirx.Cast(wide, t(*i[:2], *place)), tirx.const(0.0, wide))

        padded = te.compute([*ctx.dims(node.inputs[0].shape[:2]), *reach], source, name="padded")
        c = te.reduce_axis((0, each), name="c")
        taps = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(kernel)]

        def at(b: Any, o: Any, *p: Any) -> Any:
            places = [j * s + k * d for j, s, k, d in zip(p, a.strides, taps, a.dilation)]
            value = padded(b, tirx.floordiv(o, outputs) * each + c, *places) * tirx.Cast(wide, u(o, c, *taps))
            return te.sum(value, axis=[c, *taps])

        return te.compute(shape, at, name="conv")

    def made() -> Any:
        y = ctx.te(build, x, w, name="conv")
        return y if wide == tvm_dtype(dtype) else ctx.emit(R.astype(y, tvm_dtype(dtype)))

    return _unless_empty(ctx, node, node.inputs[1].shape[1:], 0, made)


# -- random -----------------------------------------------------------------------------------------------------------------
@lowers("random_bits")
def _random_bits(ctx: Context, node: Node, key: Any) -> Any:
    dtype, size = tvm_dtype(node.output.tensor.dtype), ctx.dim(node.output.tensor.size)
    gv = ctx.kernel(("random_bits", dtype), lambda: _random_bits_kernel(dtype), "random_bits")
    flat = ctx.call(gv, [key], relax.TensorType([size], dtype))
    return _reshape(ctx, node, flat)


def _random_bits_kernel(dtype: str) -> Any:
    """Threefry-2x32-20, one block an element; see the operation. The state is stored each round: as a term it would double."""
    size = tirx.Var("n", "int64")
    with IRBuilder() as ib, I.prim_func(s_tir=True, private=True):
        I.func_name("random_bits")
        I.func_attr({"tirx.noalias": True})
        key = I.match_buffer(I.arg("key_ptr", I.handle()), (2,), "uint32")
        out = I.match_buffer(I.arg("out_ptr", I.handle()), (size,), dtype)
        with I.grid(size) as loop, I.sblock("random_bits"):
            i = I.axis.spatial(size, loop)
            keys, x = I.sblock_alloc_buffer((3,), "uint32", scope="local"), I.sblock_alloc_buffer((2,), "uint32", scope="local")
            I.reads(key[0:2])
            I.writes(out[i])
            for j in range(2):
                I.buffer_store(keys, key[j], [j])
            I.buffer_store(keys, keys[0] ^ keys[1] ^ tirx.IntImm("uint32", PARITY), [2])
            counter = (tirx.Cast("uint32", tirx.shift_right(i, tirx.IntImm("int64", 32))), tirx.Cast("uint32", i))
            for j in range(2):
                I.buffer_store(x, counter[j] + keys[j], [j])
            for group in range(5):
                for r in ROTATIONS[group % 2]:
                    left, right = tirx.IntImm("uint32", r), tirx.IntImm("uint32", 32 - r)
                    I.buffer_store(x, x[0] + x[1], [0])
                    I.buffer_store(x, ((x[1] << left) | (x[1] >> right)) ^ x[0], [1])
                I.buffer_store(x, x[0] + keys[(group + 1) % 3], [0])
                I.buffer_store(x, x[1] + keys[(group + 2) % 3] + tirx.IntImm("uint32", group + 1), [1])
            if dtype == "uint32":
                I.buffer_store(out, x[0] ^ x[1], [i])
            else:
                high = tirx.Cast("uint64", x[0]) << tirx.IntImm("uint64", 32)
                I.buffer_store(out, high | tirx.Cast("uint64", x[1]), [i])
    return ib.get()


# -- indexing ---------------------------------------------------------------------------------------------------------------
@lowers("gather", narrow=True)
def _gather(ctx: Context, node: Node, x: Any, indices: Any) -> Any:
    a: Any = node.attrs
    shape = ctx.dims(node.output.shape)
    rank = node.inputs[1].tensor.rank

    def build(t: Any, ids: Any) -> Any:
        def at(*i: Any) -> Any:
            row = tirx.Cast("int64", ids(*i[a.axis : a.axis + rank]))
            row = tirx.Select(row < 0, row + t.shape[a.axis], row)
            return t(*i[: a.axis], row, *i[a.axis + rank :])

        return te.compute(shape, at, name="gather")

    return ctx.te(build, x, indices, name="gather")


@lowers("take_along", narrow=True)
def _take_along(ctx: Context, node: Node, x: Any, indices: Any) -> Any:
    a: Any = node.attrs
    shape = ctx.dims(node.output.shape)
    ones = [d == 1 for d in node.inputs[0].shape]
    index_ones = [d == 1 for d in node.inputs[1].shape]

    def build(t: Any, ids: Any) -> Any:
        def at(*i: Any) -> Any:
            row = tirx.Cast("int64", ids(*(0 if one else j for j, one in zip(i, index_ones))))
            row = tirx.Select(row < 0, row + t.shape[a.axis], row)
            place = [0 if one and k != a.axis else j for k, (j, one) in enumerate(zip(i, ones))]
            place[a.axis] = row
            return t(*place)

        return te.compute(shape, at, name="take_along")

    return ctx.te(build, x, indices, name="take_along")


@lowers("cache_update", narrow=True)
def _cache_update(ctx: Context, node: Node, cache: Any, new: Any, past: Any) -> Any:
    """``cache[r, past[r] + i] = new[r, i]``; caches of rank 4 (all that states are) in place."""
    ring = bool(CacheAttrs.of(node).ring)
    tail = [int(d) for d in node.inputs[0].shape[2:] if isinstance(d, int)]
    if len(tail) + 2 != node.output.tensor.rank:
        raise IRError(f"{node!r}: axes after the second must be of known size")
    if len(tail) == 2:
        dtype = tvm_dtype(node.output.tensor.dtype)
        key = ("cache_update", dtype, tuple(tail), ring)
        gv = ctx.kernel(key, lambda: _cache_update_kernel(tail[0], tail[1], dtype, ring), "cache_update")
        return ctx.call_inplace(gv, [cache, new, past], [0], [ctx.type(node.output.type)])

    def build(old: Any, fresh: Any, start: Any) -> Any:
        c, s = old.shape[1], fresh.shape[1]

        def at(*i: Any) -> Any:
            offset = i[1] - start[i[0]]
            if ring:  # the last of the new positions that land in this slot
                offset = s - 1 - tirx.floormod(start[i[0]] + s - 1 - i[1], c)
            return tirx.if_then_else(tirx.all(offset >= 0, offset < s), fresh(i[0], offset, *i[2:]), old(*i))

        return te.compute(old.shape, at, name="cache_update")

    return ctx.te(build, cache, new, past, name="cache_update")


@functools.cache
def _cache_update_kernel(heads: int, width: int, dtype: str, ring: bool) -> Any:
    @T.prim_func(s_tir=True, private=True)
    def cache_update(cache_ptr: T.handle, new_ptr: T.handle, past_ptr: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        b, c, s = T.int64(), T.int64(), T.int64()
        cache = T.match_buffer(cache_ptr, (b, c, heads, width), dtype)
        new = T.match_buffer(new_ptr, (b, s, heads, width), dtype)
        past = T.match_buffer(past_ptr, (b,), "int64")
        for r, i, h, d in T.grid(b, s, T.int64(heads), T.int64(width)):
            with T.sblock("write"):
                vr, vi, vh, vd = T.axis.remap("SSSS", [r, i, h, d])
                slot = T.meta_var(T.floormod(past[vr] + vi, c) if ring else past[vr] + vi)
                cache[vr, slot, vh, vd] = new[vr, vi, vh, vd]

    return cache_update
