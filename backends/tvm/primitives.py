"""Lowerings of the primitives, for every target: Relax operators where their meaning is ours, tensor expressions elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from wasat.ir import DType, IRError, Node, TensorType

from .lower import Context, Lowering, tvm_dtype

R = relax.op
PRIMITIVES: dict[str, Lowering] = {}


def lowers(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function lowers the operations ``names``."""

    def add(f: Callable[..., Any]) -> Callable[..., Any]:
        for n in names:
            PRIMITIVES[n] = Lowering(f)
        return f

    return add


# -- elementwise --------------------------------------------------------------------------------------------------------
_RELAX: dict[str, Callable[..., Any]] = {
    "neg": R.negative, "abs": R.abs, "exp": R.exp, "log": R.log, "sqrt": R.sqrt, "rsqrt": R.rsqrt, "sin": R.sin, "cos": R.cos,
    "tan": R.tan, "asin": R.asin, "acos": R.acos, "atan": R.atan, "sinh": R.sinh, "cosh": R.cosh, "tanh": R.tanh,
    "asinh": R.asinh, "acosh": R.acosh, "atanh": R.atanh, "erf": R.erf, "floor": R.floor, "ceil": R.ceil,
    "logical_not": R.logical_not, "isnan": R.isnan, "isinf": R.isinf, "bit_not": R.bitwise_not, "sigmoid": R.sigmoid,
    "add": R.add, "sub": R.subtract, "mul": R.multiply, "pow": R.power, "maximum": R.maximum, "minimum": R.minimum,
    "equal": R.equal, "not_equal": R.not_equal, "less": R.less, "less_equal": R.less_equal, "greater": R.greater,
    "greater_equal": R.greater_equal, "logical_and": R.logical_and, "logical_or": R.logical_or, "logical_xor": R.logical_xor,
    "bit_and": R.bitwise_and, "bit_or": R.bitwise_or, "bit_xor": R.bitwise_xor, "shift_left": R.left_shift,
    "shift_right": R.right_shift, "select": R.where, "floor_div": R.floor_divide, "mod": R.floor_mod, "atan2": R.atan2,
}  # fmt: skip


def _relax_op(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ctx, node, *xs: ctx.emit(f(*xs))


for _name, _f in _RELAX.items():
    PRIMITIVES[_name] = Lowering(_relax_op(_f))


def _elementwise(ctx: Context, node: Node, f: Callable[..., Any], *xs: Any) -> Any:
    """A tensor expression over operands of the output's own shape."""
    return ctx.te(lambda *ts: te.compute(ts[0].shape, lambda *i: f(*(t(*i) for t in ts)), name=node.op.name), *xs, name=node.op.name)


@lowers("sign")
def _sign(ctx: Context, node: Node, x: Any) -> Any:
    def f(v: Any) -> Any:  # NaN stays NaN: no branch is taken
        one, zero = tirx.const(1, v.ty.dtype), tirx.const(0, v.ty.dtype)
        negative = tirx.const(-1, v.ty.dtype) if not str(v.ty.dtype).startswith("uint") else zero
        return tirx.Select(v > zero, one, tirx.Select(v < zero, negative, v))

    return _elementwise(ctx, node, f, x)


@lowers("expm1")
def _expm1(ctx: Context, node: Node, x: Any) -> Any:
    # exp(x) - 1 loses everything near 0; tanh(x/2) * (exp(x) + 1) does not
    one = relax.const(np.asarray(1, node.output.tensor.dtype.np))
    half = relax.const(np.asarray(0.5, node.output.tensor.dtype.np))
    e = ctx.emit(R.exp(x))
    small = ctx.emit(R.multiply(R.tanh(R.multiply(x, half)), R.add(e, one)))
    return ctx.emit(R.where(R.less(R.abs(x), one), small, R.subtract(e, one)))


@lowers("log1p")
def _log1p(ctx: Context, node: Node, x: Any) -> Any:
    # log(1 + x) = 2 atanh(x / (2 + x)), which is exact near 0
    t = node.output.tensor.dtype.np
    one, two, half = (relax.const(np.asarray(c, t)) for c in (1, 2, 0.5))
    small = ctx.emit(R.multiply(two, R.atanh(R.divide(x, R.add(two, x)))))
    return ctx.emit(R.where(R.less(R.abs(x), half), small, R.log(R.add(one, x))))


@lowers("round")
def _round(ctx: Context, node: Node, x: Any) -> Any:
    return _elementwise(ctx, node, lambda v: tirx.nearbyint(v), x)  # half to even


@lowers("div")
def _div(ctx: Context, node: Node, x: Any, y: Any) -> Any:
    if node.output.tensor.dtype.is_float:
        return ctx.emit(R.divide(x, y))
    shape = ctx.shape(node.output.shape)
    x, y = ctx.emit(R.broadcast_to(x, shape)), ctx.emit(R.broadcast_to(y, shape))
    return _elementwise(ctx, node, tirx.truncdiv, x, y)


@lowers("cast")
def _cast(ctx: Context, node: Node, x: Any) -> Any:
    source, target = node.inputs[0].tensor.dtype, node.attrs.dtype  # type: ignore[attr-defined]
    if target is DType.BOOL:
        return ctx.emit(R.not_equal(x, relax.const(np.zeros((), source.np))))
    return x if source is target else ctx.emit(R.astype(x, tvm_dtype(target)))


@lowers("stop_gradient")
def _identity(ctx: Context, node: Node, x: Any) -> Any:
    return x


# -- sources --------------------------------------------------------------------------------------------------------------
@lowers("constant")
def _constant(ctx: Context, node: Node) -> Any:
    literal = node.attrs.value  # type: ignore[attr-defined]
    return relax.const(np.array(literal.array), tvm_dtype(literal.dtype))


@lowers("dim_size")
def _dim_size(ctx: Context, node: Node) -> Any:
    a: Any = node.attrs
    n = ctx.dim(a.size)
    return ctx.te(lambda v: te.compute((), lambda: tirx.Cast(tvm_dtype(a.dtype), v), name="dim_size"), n, name="dim_size")


@lowers("iota")
def _iota(ctx: Context, node: Node) -> Any:
    a: Any = node.attrs
    n = ctx.dim(a.size)
    return ctx.te(lambda m: te.compute((m,), lambda i: tirx.Cast(tvm_dtype(a.dtype), i), name="iota"), n, name="iota")


# -- shape ----------------------------------------------------------------------------------------------------------------
@lowers("reshape")
def _reshape(ctx: Context, node: Node, x: Any) -> Any:
    return ctx.emit(R.reshape(x, ctx.shape(node.output.shape)))


@lowers("transpose")
def _transpose(ctx: Context, node: Node, x: Any) -> Any:
    return ctx.emit(R.permute_dims(x, list(node.attrs.perm)))  # type: ignore[attr-defined]


@lowers("broadcast_to")
def _broadcast_to(ctx: Context, node: Node, x: Any) -> Any:
    return ctx.emit(R.broadcast_to(x, ctx.shape(node.output.shape)))


@lowers("slice")
def _slice(ctx: Context, node: Node, x: Any) -> Any:
    a: Any = node.attrs
    starts = ctx.dims(a.starts)
    steps = ctx.dims(a.steps)
    shape = ctx.dims(node.output.shape)

    def build(t: Any) -> Any:
        return te.compute(shape, lambda *i: t(*(s + j * k for s, j, k in zip(starts, i, steps))), name="slice")

    return ctx.te(build, x, name="slice")


@lowers("concat")
def _concat(ctx: Context, node: Node, *xs: Any) -> Any:
    return ctx.emit(R.concat(list(xs), axis=node.attrs.axis))  # type: ignore[attr-defined]


@lowers("pad")
def _pad(ctx: Context, node: Node, x: Any) -> Any:
    a: Any = node.attrs
    low, inner, shape = ctx.dims(a.low), ctx.dims(node.inputs[0].shape), ctx.dims(node.output.shape)
    fill = tirx.const(a.value, tvm_dtype(node.output.tensor.dtype))

    def build(t: Any) -> Any:
        def at(*i: Any) -> Any:
            inside = [tirx.all(j >= lo, j < lo + n) for j, lo, n in zip(i, low, inner)]
            return tirx.if_then_else(tirx.all(*inside), t(*(j - lo for j, lo in zip(i, low))), fill)

        return te.compute(shape, at, name="pad")

    return ctx.te(build, x, name="pad") if shape else x


@lowers("reverse")
def _reverse(ctx: Context, node: Node, x: Any) -> Any:
    for axis in node.attrs.axes:  # type: ignore[attr-defined]
        x = ctx.emit(R.flip(x, axis))
    return x


# -- reductions -------------------------------------------------------------------------------------------------------------
_REDUCE = {"reduce_sum": R.sum, "reduce_max": R.max, "reduce_min": R.min, "reduce_prod": R.prod}


@lowers("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
def _reduce(ctx: Context, node: Node, x: Any) -> Any:
    a: Any = node.attrs
    if not a.axes:
        return x
    narrow = node.output.tensor.dtype in (DType.F16, DType.BF16)  # accumulate in f32, as the reference does
    wide = ctx.emit(R.astype(x, "float32")) if narrow else x
    out = ctx.emit(_REDUCE[node.op.name](wide, list(a.axes), a.keepdims))
    return ctx.emit(R.astype(out, tvm_dtype(node.output.tensor.dtype))) if narrow else out


@lowers("reduce_any", "reduce_all")
def _reduce_bool(ctx: Context, node: Node, x: Any) -> Any:
    a: Any = node.attrs
    if not a.axes:
        return x
    f = R.max if node.op.name == "reduce_any" else R.min
    return ctx.emit(R.astype(f(R.astype(x, "int8"), list(a.axes), a.keepdims), "bool"))


@lowers("arg_max", "arg_min")
def _arg(ctx: Context, node: Node, x: Any) -> Any:
    a: Any = node.attrs
    f = R.argmax if node.op.name == "arg_max" else R.argmin
    return ctx.emit(R.astype(f(x, a.axis, a.keepdims), "int64"))


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
    if t in (DType.F16, DType.BF16):
        return ctx.emit(R.astype(R.matmul(x, y, out_dtype="float32"), tvm_dtype(t)))
    return ctx.emit(R.matmul(x, y))


# -- indexing ---------------------------------------------------------------------------------------------------------------
@lowers("gather")
def _gather(ctx: Context, node: Node, x: Any, indices: Any) -> Any:
    a: Any = node.attrs
    shape = ctx.dims(node.output.shape)
    rank = node.inputs[1].tensor.rank
    extent = ctx.dim(node.inputs[0].shape[a.axis])

    def build(t: Any, ids: Any) -> Any:
        def at(*i: Any) -> Any:
            row = tirx.Cast("int64", ids(*i[a.axis : a.axis + rank]))
            row = tirx.Select(row < 0, row + extent, row)
            return t(*i[: a.axis], row, *i[a.axis + rank :])

        return te.compute(shape, at, name="gather")

    return ctx.te(build, x, indices, name="gather")


@lowers("take_along")
def _take_along(ctx: Context, node: Node, x: Any, indices: Any) -> Any:
    a: Any = node.attrs
    shape = ctx.dims(node.output.shape)
    extent = ctx.dim(node.inputs[0].shape[a.axis])
    ones = [d == 1 for d in node.inputs[0].shape]
    index_ones = [d == 1 for d in node.inputs[1].shape]

    def build(t: Any, ids: Any) -> Any:
        def at(*i: Any) -> Any:
            row = tirx.Cast("int64", ids(*(0 if one else j for j, one in zip(i, index_ones))))
            row = tirx.Select(row < 0, row + extent, row)
            place = [0 if one and k != a.axis else j for k, (j, one) in enumerate(zip(i, ones))]
            place[a.axis] = row
            return t(*place)

        return te.compute(shape, at, name="take_along")

    return ctx.te(build, x, indices, name="take_along")


@lowers("cache_update")
def _cache_update(ctx: Context, node: Node, cache: Any, new: Any, past: Any) -> Any:
    a: Any = node.attrs
    kind = (node.inputs[0].type, node.inputs[1].type, a.ring)
    gv = ctx.kernel(("cache_update", str(kind)), lambda: _cache_update_kernel(node), "cache_update")
    return ctx.call_inplace(gv, [cache, new, past], [0], [ctx.type(node.output.type)])


def _cache_update_kernel(node: Node) -> tirx.PrimFunc:
    """``cache[r, (past[r] + i) % c, ...] = new[r, i, ...]``, in place."""
    local = Context(relax.BlockBuilder(), node.graph, {})
    cache = tirx.decl_buffer(local.dims(node.inputs[0].shape), tvm_dtype(node.output.tensor.dtype), name="cache")
    new = tirx.decl_buffer(local.dims(node.inputs[1].shape), tvm_dtype(node.output.tensor.dtype), name="new")
    past = tirx.decl_buffer(local.dims(node.inputs[2].shape), "int64", name="past")
    capacity = local.dim(node.inputs[0].shape[1])
    loops = [tirx.Var(f"i{k}", "int64") for k in range(len(new.shape))]
    slot = past[loops[0]] + loops[1]
    if node.attrs.ring:  # type: ignore[attr-defined]
        slot = tirx.floormod(slot, capacity)
    body: Any = tirx.BufferStore(cache, new[tuple(loops)], [loops[0], slot, *loops[2:]])
    for var, extent in reversed(list(zip(loops, new.shape))):
        body = tirx.For(var, tirx.IntImm("int64", 0), extent, tirx.ForKind.SERIAL, body)
    handles = [tirx.Var(n, "handle") for n in ("cache_ptr", "new_ptr", "past_ptr")]
    func = tirx.PrimFunc(handles, body, buffer_map=dict(zip(handles, (cache, new, past))))
    return func.with_attr({"tirx.noalias": True, "s_tir": True})


__all__ = ["PRIMITIVES", "IRError", "TensorType", "lowers", "tvm"]
