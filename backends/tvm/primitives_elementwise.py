"""Lowerings of elementwise operations, for every target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax, te, tirx
from wasat.ir import DType, Node
from wasat.ir.dims import DimLike

from .lower import Context, Lowering, lowering_into, tvm_dtype
from .narrow import NARROW, float_code, integer, integer_code, numbers

R = relax.op
ELEMENTWISE: dict[str, Lowering] = {}
"""Operation to lowering."""
lowers = lowering_into(ELEMENTWISE)


_RELAX: dict[str, Callable[..., Any]] = {
    "neg": R.negative, "abs": R.abs, "exp": R.exp, "log": R.log, "sqrt": R.sqrt, "rsqrt": R.rsqrt, "sin": R.sin, "cos": R.cos,
    "tan": R.tan, "tanh": R.tanh, "erf": R.erf, "floor": R.floor, "ceil": R.ceil,
    "logical_not": R.logical_not, "isinf": R.isinf, "bit_not": R.bitwise_not, "sigmoid": R.sigmoid,
    "add": R.add, "sub": R.subtract, "mul": R.multiply,
    "equal": R.equal, "less": R.less, "less_equal": R.less_equal, "greater": R.greater,
    "greater_equal": R.greater_equal, "logical_and": R.logical_and, "logical_or": R.logical_or, "logical_xor": R.logical_xor,
    "bit_and": R.bitwise_and, "bit_or": R.bitwise_or, "bit_xor": R.bitwise_xor, "shift_left": R.left_shift,
    "shift_right": R.right_shift,
}  # fmt: skip


def _relax_op(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ctx, node, *xs: ctx.emit(f(*_aligned(ctx, node, xs)))


def _aligned(ctx: Context, node: Node, xs: Sequence[Any]) -> list[Any]:
    """Operands of one that broadcasts, under shapes of which TVM sees that they do.

    Axes of [10] and [n] are one size: the node has a run-time check that n is 10.
    """
    return [ctx.view(x, v.shape, _stretched(v.shape, node.output.shape)) for x, v in zip(xs, node.inputs)]


def _stretched(shape: Sequence[DimLike], to: Sequence[DimLike]) -> tuple[DimLike, ...]:
    return tuple(d if d == 1 else t for d, t in zip(shape, to[len(to) - len(shape) :]))


def _broadcast(ctx: Context, node: Node, xs: Sequence[Any]) -> list[Any]:
    """Operands in the output's own shape."""
    shape = ctx.shape(node.output.shape)
    return [ctx.emit(R.broadcast_to(x, shape)) for x in _aligned(ctx, node, xs)]


for _name, _f in _RELAX.items():
    ELEMENTWISE[_name] = Lowering(_relax_op(_f))
ELEMENTWISE["select"] = Lowering(_relax_op(R.where), narrow=lambda node: True)


def elementwise(ctx: Context, node: Node, f: Callable[..., Any], *xs: Any) -> Any:
    """A tensor expression over operands of the output's own shape."""

    def build(*ts: Any) -> Any:
        return te.compute(ts[0].shape, lambda *i: f(*(t(*i) for t in ts)), name=node.op.name)

    return ctx.te(build, *xs, name=node.op.name)


@lowers("not_equal")
def _not_equal(ctx: Context, node: Node, x: Any, y: Any) -> Any:
    return ctx.emit(R.logical_not(R.equal(*_aligned(ctx, node, [x, y]))))  # TVM's != is false with NaN


@lowers("maximum", "minimum")
def _extreme(ctx: Context, node: Node, x: Any, y: Any) -> Any:
    largest = node.op.name == "maximum"
    x, y = _aligned(ctx, node, [x, y])
    if not node.output.tensor.dtype.is_float:
        return ctx.emit((R.maximum if largest else R.minimum)(x, y))
    better = ctx.emit((R.greater if largest else R.less)(x, y))  # false with NaN: y, if it is y that is NaN
    return ctx.emit(R.where(R.logical_or(better, _isnan(ctx, node, x)), x, y))


@lowers("isnan")
def _isnan(ctx: Context, node: Node, x: Any) -> Any:
    bf16 = node.inputs[0].tensor.dtype is DType.BF16  # for which TVM has no isnan
    return ctx.emit(R.isnan(R.astype(x, "float32") if bf16 else x))


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
        return ctx.emit((R.floor_divide if quotient else R.floor_mod)(*_aligned(ctx, node, [x, y])))

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
        return ctx.emit(R.power(*_aligned(ctx, node, [x, y])))
    x, y = _broadcast(ctx, node, [x, y])

    def f(base: Any, exponent: Any) -> Any:  # by squaring: exact, and wraps as integers do
        one, result = tirx.const(1, tvm_dtype(dtype)), tirx.const(1, tvm_dtype(dtype))
        for bit in range(6):
            odd = tirx.floormod(tirx.shift_right(exponent, tirx.const(bit, tvm_dtype(dtype))), tirx.const(2, tvm_dtype(dtype)))
            result = result * tirx.Select(odd == one, base, one)
            base = base * base
        return result

    return elementwise(ctx, node, f, x, y)


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
        return ctx.emit(R.divide(*_aligned(ctx, node, [x, y])))
    return elementwise(ctx, node, tirx.truncdiv, *_broadcast(ctx, node, [x, y]))


# -- element types ---------------------------------------------------------------------------------------------------------
@lowers("cast", narrow=True)
def _cast(ctx: Context, node: Node, x: Any) -> Any:
    source, target = node.inputs[0].tensor.dtype, node.attrs.dtype  # type: ignore[attr-defined]
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
    source, target = node.inputs[0].tensor.dtype, node.attrs.dtype  # type: ignore[attr-defined]
    if source in NARROW and target in NARROW:
        return x
    return elementwise(ctx, node, lambda v: tirx.reinterpret(tvm_dtype(target), v), x)


@lowers("stop_gradient", narrow=True)
def _identity(ctx: Context, node: Node, x: Any) -> Any:
    return x
