"""Lowerings of elementwise operations, for every target."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax, te, tirx
from tvm.script import tirx as T
from wasat.ir import DType, Node, Value
from wasat.ir.dims import DimLike
from wasat.ir.ops.bits import Bitcast
from wasat.ir.ops.constant import Constant
from wasat.ir.ops.elementwise import Cast

from ..layouts import tvm_dtype
from ..lower import Context, Lowering, lowering_into
from .low_precision import NARROW, float_code, in_bf16, integer, integer_code, numbers

R = relax.op
ELEMENTWISE: dict[str, Lowering] = {}
"""Operation to lowering."""
lowers = lowering_into(ELEMENTWISE)


_RELAX: dict[str, Callable[..., Any]] = {
    "abs": R.abs, "exp": R.exp, "log": R.log, "sqrt": R.sqrt, "rsqrt": R.rsqrt, "sin": R.sin, "cos": R.cos,
    "tan": R.tan, "tanh": R.tanh, "erf": R.erf, "floor": R.floor, "ceil": R.ceil,
    "logical_not": R.logical_not, "bit_not": R.bitwise_not, "sigmoid": R.sigmoid,
    "logical_and": R.logical_and, "logical_or": R.logical_or, "logical_xor": R.logical_xor,
    "bit_and": R.bitwise_and, "bit_or": R.bitwise_or, "bit_xor": R.bitwise_xor,
}  # fmt: skip


def _relax_op(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ctx, node, *xs: ctx.emit(f(*_aligned(ctx, node, xs)))


def _aligned(ctx: Context, node: Node, xs: Sequence[Any]) -> list[Any]:
    """Operands of one that broadcasts, under shapes of which TVM sees that they do.

    Axes of [10] and [n] are one size: the node has a run-time check that n is 10.
    """
    return [ctx.view(x, v.shape, stretched(v.shape, node.output.shape)) for x, v in zip(xs, node.inputs)]


def stretched(shape: Sequence[DimLike], to: Sequence[DimLike]) -> tuple[DimLike, ...]:
    """The sizes of ``shape``, which broadcasts to ``to``, as ``to`` writes them."""
    return tuple(d if d == 1 else t for d, t in zip(shape, to[len(to) - len(shape) :]))


def _broadcast(ctx: Context, node: Node, xs: Sequence[Any]) -> list[Any]:
    """Operands in the output's own shape."""
    shape = ctx.shape(node.output.shape)
    return [ctx.emit(R.broadcast_to(x, shape)) for x in _aligned(ctx, node, xs)]


for _name, _f in _RELAX.items():
    ELEMENTWISE[_name] = Lowering(_relax_op(_f))


_ARITHMETIC: dict[str, Callable[..., Any]] = {"add": R.add, "sub": R.subtract, "mul": R.multiply}


@lowers(*_ARITHMETIC)
def _arithmetic(ctx: Context, node: Node, x: Any, y: Any) -> Any:
    name, dtype = node.op.name, node.output.tensor.dtype
    if dtype.is_int and dtype.bits >= 32:
        return elementwise(ctx, node, lambda a, b: wrapping(name, a, b), *_broadcast(ctx, node, [x, y]))
    if name == "mul" and dtype.is_float:
        for i, v in enumerate(node.inputs):
            if (zero := _zero(v)) is not None:
                return _kept(ctx, node, zero, lambda zero, v: v * zero, _broadcast(ctx, node, [x, y])[1 - i])
    if name == "sub" and dtype.is_float and node.inputs[0] is node.inputs[1]:  # 0, says TVM
        return _kept(ctx, node, 0.0, lambda zero, v: tirx.abs(v) * zero, x)
    return ctx.emit(_ARITHMETIC[name](*_aligned(ctx, node, [x, y])))


def _zero(v: Value) -> float | None:
    """0.0 or -0.0 where it is that constant, however it is stretched. TVM says that 0 * x and 0 / x are 0, whatever x is."""
    while v.node is not None and v.node.op.kind == "view" and len(v.node.inputs) == 1:
        v = v.node.inputs[0]
    made = v.made_by("constant")
    array = Constant.Attrs.of(made).value.array if made is not None else None
    if array is None or array.size != 1 or array.any():
        return None
    return float(array.reshape(()))


def _kept(ctx: Context, node: Node, zero: float, f: Callable[[Any, Any], Any], x: Any) -> Any:
    """``f`` of a 0 that is none to TVM, and of an operand of the output's own shape; narrow floats are computed with in f32."""
    dtype = tvm_dtype(node.output.tensor.dtype)
    wide = "float64" if dtype == "float64" else "float32"

    def kept(v: Any) -> Any:
        v = tirx.Cast(wide, v)
        return tirx.Cast(dtype, f(tirx.Select(tirx.isnan(v), tirx.const(1.0, wide), tirx.const(zero, wide)), v))

    return elementwise(ctx, node, kept, x)


def wrapping(name: str, a: Any, b: Any) -> Any:
    """The sum, difference or product of two integers, wrapped at their width.

    Of 32 and 64 bits TVM takes for granted that none overflows, in its own simplification and in what it promises LLVM. So 32
    bits are computed in 64, and 64 in halves.
    """
    dtype = str(a.ty.dtype)
    f = {"add": lambda p, q: p + q, "sub": lambda p, q: p - q, "mul": lambda p, q: p * q}[name]
    if not dtype.endswith(("32", "64")):
        return f(a, b)
    if not dtype.endswith("64"):  # a product of two u32 does not fit into i64, and a difference may be negative
        wide = "uint64" if dtype == "uint32" and name == "mul" else "int64"
        return tirx.Cast(dtype, f(tirx.Cast(wide, a), tirx.Cast(wide, b)))
    half, low = tirx.const(32, "uint64"), tirx.const(2**32 - 1, "uint64")
    u, v = (tirx.reinterpret("uint64", x) if dtype == "int64" else x for x in (a, b))
    (u0, u1), (v0, v1) = (((x & low), tirx.shift_right(x, half)) for x in (u, v))
    if name == "mul":
        crossed = ((u0 * v1) & low) + ((u1 * v0) & low)
        lower, upper = u0 * v0, crossed
    elif name == "add":
        lower, upper = u0 + v0, u1 + v1
    else:  # with a bit borrowed beforehand, so that nothing is negative
        one = tirx.const(2**32, "uint64")
        lower, upper = u0 + one - v0, u1 + one - v1 - tirx.const(1, "uint64")
    total = tirx.shift_left(upper + tirx.shift_right(lower, half), half) | (lower & low)
    return tirx.reinterpret(dtype, total) if dtype == "int64" else total


ELEMENTWISE["select"] = Lowering(_relax_op(R.where), narrow=lambda node: True)


def elementwise(ctx: Context, node: Node, f: Callable[..., Any], *xs: Any, alone: bool = False) -> Any:
    """A tensor expression over operands of the output's own shape."""

    def build(*ts: Any) -> Any:
        return te.compute(ts[0].shape, lambda *i: f(*(t(*i) for t in ts)), name=node.op.name)

    return ctx.te(build, *xs, name=node.op.name, alone=alone)


_COMPARE: dict[str, Callable[..., Any]] = {
    "equal": R.equal, "not_equal": lambda x, y: R.logical_not(R.equal(x, y)),
    "less": R.less, "less_equal": R.less_equal, "greater": R.greater, "greater_equal": R.greater_equal,
}  # fmt: skip


@lowers(*_COMPARE)
def _compare(ctx: Context, node: Node, *xs: Any) -> Any:
    xs = tuple(_aligned(ctx, node, xs))
    if node.inputs[0].tensor.dtype is DType.BOOL:  # which TVM has no comparison of that LLVM takes
        xs = tuple(ctx.emit(R.astype(x, "uint8")) for x in xs)
    found = _COMPARE[node.op.name](*xs)
    if node.inputs[0].tensor.dtype.is_float and node.op.name in ("equal", "not_equal"):
        # where both sides come out as one expression, TVM knows the answer without looking whether it is NaN
        nan = R.isnan(_without_bf16(node, xs[0]))
        found = R.logical_or(nan, found) if node.op.name == "not_equal" else R.logical_and(R.logical_not(nan), found)
    return ctx.emit(found)


@lowers("maximum", "minimum")
def _extreme(ctx: Context, node: Node, x: Any, y: Any) -> Any:
    largest = node.op.name == "maximum"
    x, y = _aligned(ctx, node, [x, y])
    if not node.output.tensor.dtype.is_float:
        return ctx.emit((R.maximum if largest else R.minimum)(x, y))
    better = ctx.emit((R.greater if largest else R.less)(x, y))  # false with NaN: y, if it is y that is NaN
    return ctx.emit(R.where(R.logical_or(better, _is(ctx, node, x)), x, y))


@lowers("isnan", "isinf")
def _is(ctx: Context, node: Node, x: Any) -> Any:
    return ctx.emit((R.isinf if node.op.name == "isinf" else R.isnan)(_without_bf16(node, x)))


def _without_bf16(node: Node, x: Any) -> Any:
    """In f32 what is bf16, for which TVM lacks some functions."""
    return R.astype(x, "float32") if node.inputs[0].tensor.dtype is DType.BF16 else x


@lowers("asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "atan2", "expm1", "log1p")
def _libm(ctx: Context, node: Node, *xs: Any) -> Any:
    """Functions that TVM has no code for, or none that is right near 0: the C library's (CUDA has the same names)."""
    return _widened(ctx, node, lambda *v: _extern(node.op.name, *v), *xs)


def _extern(name: str, *v: Any) -> Any:
    """A function of the C library on f32 or f64."""
    dtype = v[0].ty.dtype
    return tirx.call_pure_extern(dtype, name if str(dtype) == "float64" else name + "f", *v)


def _widened(ctx: Context, node: Node, f: Callable[..., Any], *xs: Any) -> Any:
    """A tensor expression over operands that broadcast; narrow floats are computed with in f32."""
    dtype = node.output.tensor.dtype
    operands = _broadcast(ctx, node, xs) if len(xs) > 1 else list(xs)
    if dtype.bits < 32:
        operands = [ctx.emit(R.astype(x, "float32")) for x in operands]
    y = elementwise(ctx, node, f, *operands)
    return ctx.emit(R.astype(y, tvm_dtype(dtype))) if dtype.bits < 32 else y


@lowers("mod", "floor_div")
def _mod(ctx: Context, node: Node, x: Any, y: Any) -> Any:
    """Of floats as NumPy computes them: by the C library's remainder, which is exact, where x - y * floor(x / y) is not."""
    quotient = node.op.name == "floor_div"
    if not node.output.tensor.dtype.is_float:
        return _divided(ctx, node, tirx.floordiv if quotient else tirx.floormod, x, y)

    def f(a: Any, b: Any) -> Any:
        zero, one = (tirx.const(c, a.ty.dtype) for c in (0.0, 1.0))
        rest = _extern("fmod", a, b)
        below = tirx.Select(b < zero, rest > zero, rest < zero)  # the remainder has the other sign than the divisor
        if quotient:
            near = (a - rest) / b - tirx.Select(below, one, zero)  # whole, but for the rounding
            whole = tirx.floor(near) + tirx.Select(near - tirx.floor(near) > tirx.const(0.5, a.ty.dtype), one, zero)
            return tirx.Select(b == zero, a / b, whole)
        nothing = tirx.Select(b < zero, tirx.const(-0.0, a.ty.dtype), zero)
        return tirx.Select(rest == zero, nothing, tirx.Select(below, rest + b, rest))

    return _widened(ctx, node, f, x, y)


@lowers("pow")
def _pow(ctx: Context, node: Node, x: Any, y: Any) -> Any:
    dtype = node.output.tensor.dtype
    if dtype.is_float:
        y = R.power(*(_without_bf16(node, v) for v in _aligned(ctx, node, [x, y])))
        return ctx.emit(R.astype(y, tvm_dtype(dtype)) if dtype is DType.BF16 else y)
    shape, flat = node.output.shape, (node.output.tensor.size,)
    x, y = (ctx.view(v, shape, flat) for v in _broadcast(ctx, node, [x, y]))
    gv = ctx.kernel(("pow", dtype), lambda: _pow_kernel(tvm_dtype(dtype)), "pow")
    return ctx.view(ctx.call(gv, [x, y], relax.TensorType(ctx.dims(flat), tvm_dtype(dtype))), flat, shape)


@functools.cache
def _pow_kernel(dtype: str) -> Any:
    """Powers of integers by squaring: exact, and wrapped as integers are; see the operation for negative exponents."""
    signed = not dtype.startswith("u")

    @T.prim_func(s_tir=True, private=True)
    def power(x_ptr: T.handle, y_ptr: T.handle, out_ptr: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(x_ptr, (n,), dtype)
        y = T.match_buffer(y_ptr, (n,), dtype)
        out = T.match_buffer(out_ptr, (n,), dtype)
        for i in T.serial(n):
            with T.sblock("power"):
                at = T.axis.spatial(n, i)
                T.reads(x[at], y[at])
                T.writes(out[at])
                base = T.alloc_buffer((1,), dtype, scope="local")
                left = T.alloc_buffer((1,), dtype, scope="local")
                base[0] = x[at]
                left[0] = y[at]
                out[at] = T.cast(1, dtype)
                if signed and y[at] < T.cast(0, dtype):
                    odd = T.meta_var(T.bitwise_and(y[at], T.cast(1, dtype)) == T.cast(1, dtype))
                    unit = T.meta_var(x[at] == T.cast(1, dtype) or x[at] == T.cast(-1, dtype))
                    out[at] = T.Select(unit, T.Select(odd, x[at], T.cast(1, dtype)), T.cast(0, dtype))
                    left[0] = T.cast(0, dtype)
                while left[0] > T.cast(0, dtype):
                    if T.bitwise_and(left[0], T.cast(1, dtype)) == T.cast(1, dtype):
                        out[at] = out[at] * base[0]
                    base[0] = base[0] * base[0]
                    left[0] = T.shift_right(left[0], T.cast(1, dtype))

    return power


@lowers("neg")
def _neg(ctx: Context, node: Node, x: Any) -> Any:
    if not node.output.tensor.dtype.is_int:
        return ctx.emit(R.negative(x))
    return elementwise(ctx, node, lambda v: wrapping("add", tirx.bitwise_not(v), tirx.const(1, v.ty.dtype)), x)


@lowers("shift_left", "shift_right")
def _shift(ctx: Context, node: Node, x: Any, y: Any) -> Any:
    """An amount of as many bits as there are, or more, is undefined to processors."""
    dtype, left = node.output.tensor.dtype, node.op.name == "shift_left"
    none, last = tirx.const(0, tvm_dtype(dtype)), tirx.const(dtype.bits - 1, tvm_dtype(dtype))

    def f(a: Any, b: Any) -> Any:
        inside = tirx.all(b >= none, b <= last)
        if left:
            return tirx.Select(inside, tirx.shift_left(a, tirx.Select(inside, b, none)), none)
        if dtype.value.startswith("u"):
            return tirx.Select(inside, tirx.shift_right(a, tirx.Select(inside, b, none)), none)
        return tirx.shift_right(a, tirx.Select(inside, b, last))  # the sign is left

    return elementwise(ctx, node, f, *_broadcast(ctx, node, [x, y]))


@lowers("sign")
def _sign(ctx: Context, node: Node, x: Any) -> Any:
    def f(v: Any) -> Any:  # NaN stays NaN: no branch is taken
        one, zero = tirx.const(1, v.ty.dtype), tirx.const(0, v.ty.dtype)
        negative = tirx.const(-1, v.ty.dtype) if not str(v.ty.dtype).startswith("uint") else zero
        return tirx.Select(v > zero, one, tirx.Select(v < zero, negative, v))

    return elementwise(ctx, node, f, x)


@lowers("round")
def _round(ctx: Context, node: Node, x: Any) -> Any:
    return elementwise(ctx, node, lambda v: tirx.nearbyint(v), x)  # half to even


@lowers("div")
def _div(ctx: Context, node: Node, x: Any, y: Any) -> Any:
    if node.output.tensor.dtype.is_float:
        zero, by_zero = map(_zero, node.inputs)
        if by_zero is not None:  # which TVM refuses
            v = _broadcast(ctx, node, [x, y])[0]
            if zero is not None:
                return _kept(ctx, node, zero, lambda _, v: v * tirx.const(math.nan, v.ty.dtype), v)
            return _kept(ctx, node, by_zero, lambda zero, v: v / zero, v)
        if zero is not None:
            return _kept(ctx, node, zero, lambda zero, v: zero / v, _broadcast(ctx, node, [x, y])[1])
        return ctx.emit(R.divide(*_aligned(ctx, node, [x, y])))
    return _divided(ctx, node, tirx.truncdiv, x, y)


def _divided(ctx: Context, node: Node, f: Callable[..., Any], x: Any, y: Any) -> Any:
    """The quotient or remainder ``f`` of integers. By 0 it is 0, as NumPy's, and by -1 it wraps: processors stop at both."""
    dtype = tvm_dtype(node.output.tensor.dtype)
    zero, one, minus = tirx.const(0, dtype), tirx.const(1, dtype), None if dtype.startswith("uint") else tirx.const(-1, dtype)

    def guarded(a: Any, b: Any) -> Any:
        safe = b == zero if minus is None else tirx.any(b == zero, b == minus)
        y = f(a, tirx.Select(safe, one, b))
        if minus is not None:
            y = tirx.Select(b == minus, zero if f is tirx.floormod else wrapping("add", tirx.bitwise_not(a), one), y)
        return tirx.Select(b == zero, zero, y)

    return elementwise(ctx, node, guarded, *_broadcast(ctx, node, [x, y]))


# -- element types ---------------------------------------------------------------------------------------------------------
@lowers("cast", narrow=True)
def _cast(ctx: Context, node: Node, x: Any) -> Any:
    source, target = node.inputs[0].tensor.dtype, Cast.Attrs.of(node).dtype
    if source is target:
        return x
    if source in NARROW:
        source, x = _decoded(ctx, node, source, x)
    if target not in NARROW:
        return _converted(ctx, node, source, target, x)
    if target.is_float:
        return elementwise(ctx, node, float_code(target), _converted(ctx, node, source, DType.F32, x))
    whole = _truncated(ctx, node, source, target, x) if source.is_float else ctx.emit(R.astype(x, "int32"))
    return elementwise(ctx, node, lambda v: integer_code(target, v), whole)


def _decoded(ctx: Context, node: Node, source: DType, codes: Any) -> tuple[DType, Any]:
    """The numbers that codes of a narrow type are, and the type that they come in."""
    if source.is_int:
        return DType.I32, elementwise(ctx, node, lambda c: integer(source, c), codes)
    table = relax.const(numbers(source))
    last = tirx.const(2**source.bits - 1, "int32")  # above the bits of a code may be anything

    def build(c: Any, t: Any) -> Any:
        return te.compute(c.shape, lambda *i: t(tirx.bitwise_and(tirx.Cast("int32", c(*i)), last)), name="decode")

    return DType.F32, ctx.te(build, codes, table, name="decode")


def _converted(ctx: Context, node: Node, source: DType, target: DType, x: Any) -> Any:
    """The cast between two types that TVM computes with."""
    if source is target:
        return x
    if target is DType.BOOL:  # not_equal would lose NaN
        return ctx.emit(R.logical_not(R.equal(x, relax.const(0, tvm_dtype(source)))))
    if source.is_float and target.is_int:
        return _truncated(ctx, node, source, target, x)
    if source is DType.F32 and target is DType.BF16:  # or TVM leaves it out where f32 is read from it in the same loop
        # what only rounds is computed again wherever it is read, and TVM simplifies that for minutes
        alone = all(u.is_a("cast") and u.output.tensor.dtype is DType.F32 for u in node.output.users)
        x = elementwise(ctx, node, in_bf16, x, alone=alone)
    return ctx.emit(R.astype(x, tvm_dtype(target)))


def _truncated(ctx: Context, node: Node, source: DType, target: DType, x: Any) -> Any:
    """Float to integer (to i32 in the range of a narrow one): saturating, NaN to 0, where the conversion alone is undefined."""
    half = 2 ** (target.bits - 1)
    low, high = (0, 2 * half - 1) if target.value.startswith("u") else (-half, half - 1)
    x = x if source.bits >= 32 else ctx.emit(R.astype(x, "float32"))
    t, to = "float64" if source is DType.F64 else "float32", "int32" if target in NARROW else tvm_dtype(target)

    def f(v: Any) -> Any:
        inside = tirx.Select(tirx.all(v > tirx.const(float(low), t), v < tirx.const(float(high), t)), v, tirx.const(0.0, t))
        ends = tirx.Select(v >= tirx.const(float(high), t), tirx.const(high, to), tirx.Cast(to, tirx.trunc(inside)))
        return tirx.Select(v <= tirx.const(float(low), t), tirx.const(low, to), ends)

    return elementwise(ctx, node, f, x)


@lowers("bitcast", narrow=True)
def _bitcast(ctx: Context, node: Node, x: Any) -> Any:
    source, target = node.inputs[0].tensor.dtype, Bitcast.Attrs.of(node).dtype
    if source in NARROW and target in NARROW:
        return x
    return elementwise(ctx, node, lambda v: tirx.reinterpret(tvm_dtype(target), v), x)


@lowers("stop_gradient", narrow=True)
def _identity(ctx: Context, node: Node, x: Any) -> Any:
    return x
