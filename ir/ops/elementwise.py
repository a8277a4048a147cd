"""Elementwise arithmetic. Binary operations broadcast as NumPy does; element types must agree.

f16, bf16 and the 8-bit floats are computed in f32 and rounded once; integers wrap around.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .. import op as _op
from ..axes import AxisRule, free, whole
from ..errors import TypeMismatch
from ..op import Attrs, ErrorSample, Op, Sample, broadcast_shapes, register, same_dtype, tensor
from ..types import DType, TensorType

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Node, Value

Grads = Sequence["Value | None"]


def grid(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    """Evenly spread f32 values, for samples."""
    return np.linspace(low, high, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def wave(*shape: int, step: float = 0.37) -> np.ndarray:
    """f32 samples between -1 and 1, no two alike."""
    return np.sin(np.arange(int(np.prod(shape))) * step).astype(np.float32).reshape(shape)


def wide(x: np.ndarray) -> np.ndarray:
    """Floats narrower than f32 as f32; everything else as it is."""
    return x.astype(np.float32) if x.dtype.itemsize <= 2 and DType.of(x.dtype).is_float else x


_ERF = np.frompyfunc(math.erf, 1, 1)


def erf(x: np.ndarray) -> np.ndarray:
    """The error function (NumPy has none), correct to the last bits of f64."""
    return np.asarray(_ERF(x)).astype(x.dtype)


class Binary(Op):
    """Base of elementwise operations of two operands of one element type."""

    kind = "elementwise"

    def infer(self, attrs: Attrs, x: TensorType, y: TensorType) -> TensorType:
        dtype = same_dtype(x, y)
        self.accept(dtype)
        return TensorType(dtype, broadcast_shapes(tensor(x).shape, tensor(y).shape))

    def accept(self, dtype: DType) -> None:
        if dtype is DType.BOOL:
            raise TypeMismatch("the operands must be numbers; cast booleans first, or use a logical operation")

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]", "i32[2]"], {}, "element types differ")
        yield ErrorSample(["i32[2, 3]", "i32[2]"], {}, "axis 1")


def _grad_pair(b: Builder, node: Node, gx: Value | None, gy: Value | None) -> Grads:
    x, y = node.inputs
    return [b.sum_to(gx, x.shape) if gx is not None else None, b.sum_to(gy, y.shape) if gy is not None else None]


def _float_samples() -> Iterable[Sample]:
    yield Sample([grid(2, 3, low=0.5), grid(3, low=0.6, high=1.7)])
    yield Sample([grid(2, 1, 3, low=0.4, high=1.9), grid(4, 1, low=0.5, high=2.1)])
    yield Sample([grid(4, low=0.5).astype(np.float16), grid(4, low=0.6).astype(np.float16)])


def _int_samples() -> Iterable[Sample]:
    yield Sample([np.array([7, -7, 2**31 - 1, -9], np.int32), np.array([2, 2, 3, 4], np.int32)])


@register
class Add(Binary):
    """x + y."""

    name = "add"
    commutative = True

    def neutral(self, dtype: DType) -> float | None:
        return -0.0

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x + y

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        return _grad_pair(b, node, g, g)

    def samples(self) -> Iterable[Sample]:
        yield from [*_float_samples(), *_int_samples()]


@register
class Sub(Binary):
    """x - y."""

    name = "sub"

    def neutral(self, dtype: DType) -> float | None:
        return 0.0

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x - y

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        return _grad_pair(b, node, g, b.neg(g))

    def samples(self) -> Iterable[Sample]:
        yield from [*_float_samples(), *_int_samples()]


@register
class Mul(Binary):
    """x * y."""

    name = "mul"
    commutative = True
    absorbing = 0.0

    def neutral(self, dtype: DType) -> float | None:
        return 1.0

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x * y

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        x, y = node.inputs
        return _grad_pair(b, node, b.mul(g, y), b.mul(g, x))

    def samples(self) -> Iterable[Sample]:
        yield from [*_float_samples(), *_int_samples()]


@register
class Div(Binary):
    """x / y; of integers, truncated toward zero (as in C and ONNX). By 0 an integer is 0; the least one by -1 wraps."""

    name = "div"

    def neutral(self, dtype: DType) -> float | None:
        return 1.0

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if DType.of(x.dtype).is_float:
            return x / y
        q = x // y
        return (q + ((q < 0) & (q * y != x))).astype(x.dtype)

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        d = b.div(g, node.inputs[1])
        return _grad_pair(b, node, d, b.neg(b.mul(d, node.output)))

    def samples(self) -> Iterable[Sample]:
        yield from [*_float_samples(), *_int_samples()]


@register
class FloorDiv(Binary):
    """x / y rounded down. By 0 an integer is 0; the least one by -1 wraps."""

    name = "floor_div"
    differentiable = False

    def neutral(self, dtype: DType) -> float | None:
        return 1.0 if dtype.is_int else None

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.floor_divide(wide(x), wide(y)).astype(x.dtype)

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        return [None, None]

    def samples(self) -> Iterable[Sample]:
        yield from _int_samples()
        yield Sample([np.array([7.5, -7.5], np.float32), np.array([2.0, 2.0], np.float32)])


@register
class Mod(Binary):
    """x - y * floor(x / y): the remainder with the sign of the divisor. That of an integer by 0 is 0."""

    name = "mod"

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.mod(wide(x), wide(y)).astype(x.dtype)

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        return _grad_pair(b, node, g, b.neg(b.mul(g, b.floor(b.div(*node.inputs)))))

    def samples(self) -> Iterable[Sample]:
        yield from _int_samples()
        yield Sample([np.array([7.5, -7.5, 0.5], np.float32), np.array([2.0, 2.1, -2.0], np.float32)])


@register
class Pow(Binary):
    """x to the y. Powers of integers wrap; one to a negative power is 1 / x**-y truncated (torch.pow), 0 to one is 0."""

    name = "pow"
    precision = "wide"

    def neutral(self, dtype: DType) -> float | None:
        return 1.0

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if DType.of(x.dtype).is_float:
            return np.power(wide(x), wide(y)).astype(x.dtype)
        x, y = np.broadcast_arrays(wide(x), wide(y))
        power = np.power(x, np.maximum(y, 0))
        unit = np.where(x == 1, 1, np.where(x == -1, 1 - 2 * (y & 1), 0))
        return np.where(y < 0, unit, power).astype(x.dtype)

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        x, y = node.inputs
        slope = b.mul(y, b.pow(x, b.sub(y, 1.0)))
        if y.const is None or not y.const.all():  # at 0 to the power of 0, 0 times infinity is 0
            constant = b.logical_and(b.equal(x, 0.0), b.equal(y, 0.0))
            slope = b.select(constant, b.constant(0.0, x.tensor.dtype), slope)
        gx = b.mul(g, slope)
        safe = b.select(b.greater(x, 0.0), x, 1.0)
        return _grad_pair(b, node, gx, b.mul(g, b.mul(node.output, b.log(safe))))

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 3, low=0.5), grid(3)])
        yield Sample([np.array([2, 3], np.int64), np.array([5, 0], np.int64)])
        yield Sample([np.array([7, 2], np.uint8), np.array([255, 9], np.uint8)])


class _Extreme(Binary):
    commutative = True
    idempotent = True
    first: ClassVar[str]

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        x, y = node.inputs
        hit = b.emit(type(self).first, x, y)
        tie = b.equal(x, y)
        gx = b.select(tie, b.mul(g, 0.5), b.select(hit, g, b.mul(g, 0.0)))
        return _grad_pair(b, node, gx, b.sub(g, gx))

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 3), grid(3, low=-1.1, high=1.3)])
        yield from _int_samples()


@register
class Maximum(_Extreme):
    """The larger; NaN if either is. The gradient of equals is shared."""

    name = "maximum"
    first = "greater"

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.maximum(x, y)


@register
class Minimum(_Extreme):
    """The smaller; NaN if either is. The gradient of equals is shared."""

    name = "minimum"
    first = "less"

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.minimum(x, y)


@register
class Atan2(Binary):
    """Angle of the point (y, x) = (first operand, second operand)."""

    name = "atan2"

    def accept(self, dtype: DType) -> None:
        if not dtype.is_float:
            raise TypeMismatch("the operands must be float")

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.arctan2(wide(x), wide(y)).astype(x.dtype)

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        x, y = node.inputs
        d = b.div(g, b.add(b.mul(x, x), b.mul(y, y)))
        return _grad_pair(b, node, b.mul(d, y), b.neg(b.mul(d, x)))

    def samples(self) -> Iterable[Sample]:
        yield from _float_samples()

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["i32[2]", "i32[2]"], {}, "must be float")


# -- choice, type, gradient ---------------------------------------------------------------------------------------------------
@register
class Select(Op):
    """x where ``cond`` is true, y elsewhere; the three broadcast."""

    name = "select"
    kind = "elementwise"

    def infer(self, attrs: Attrs, cond: TensorType, x: TensorType, y: TensorType) -> TensorType:
        if tensor(cond).dtype is not DType.BOOL:
            raise TypeMismatch(f"the condition must be booleans, not {cond}")
        return TensorType(same_dtype(x, y), broadcast_shapes(cond.shape, tensor(x).shape, tensor(y).shape))

    def reference(self, attrs: Attrs, cond: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.where(cond, x, y)

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        cond, x, y = node.inputs
        zero = b.constant(0.0, g.tensor.dtype)
        return [None, b.sum_to(b.select(cond, g, zero), x.shape), b.sum_to(b.select(cond, zero, g), y.shape)]

    def samples(self) -> Iterable[Sample]:
        yield Sample([np.array([[True], [False]]), grid(2, 3), grid(3)])
        yield Sample([np.array([True, False]), np.array([1, 2]), np.array(9)])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]", "f32[2]", "f32[2]"], {}, "must be booleans")
        yield ErrorSample(["bool[2]", "f32[2]", "i32[2]"], {}, "element types differ")
        yield ErrorSample(["bool[2]", "f32[3]", "f32[3]"], {}, "axis 0")


@register
class Cast(Op):
    """x in another element type. Float to integer truncates toward zero and saturates; NaN becomes 0; to bool: x != 0.

    Float to a narrower float rounds to nearest even; what is too large becomes inf (NaN in f8e4m3, which has no inf). f64
    becomes bf16, and floats of 8 and 4 bits, by way of f32, as in torch. f8e8m0 is an exponent and no more: the nearest power
    of two, the greater of two equally near; NaN for 0 and less.
    Integer to integer wraps around.
    """

    name = "cast"
    kind = "elementwise"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        dtype: DType

    @property
    def carries(self) -> bool:
        return True

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        return tensor(x).with_dtype(attrs.dtype)

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        to, source = attrs.dtype, DType.of(x.dtype)
        if to is DType.BOOL:
            return np.asarray(wide(x) != 0) if source.is_float else np.asarray(x.astype(np.int64) != 0)
        if source.is_float and to.is_int:
            bits = to.bits
            low, high = (0, 2**bits - 1) if to.value.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            t = np.trunc(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
            big = t >= float(high)  # float(2**63 - 1) rounds up: compare before converting
            whole = np.where(big | (t <= low), 0, t).astype(np.uint64 if to is DType.U64 else np.int64)
            out = np.where(big, np.asarray(high, whole.dtype), np.where(t <= low, np.asarray(low, whole.dtype), whole))
            return out.astype(to.np)
        if bits_differ(source) and not to.is_float:
            return x.astype(np.int64).astype(to.np)
        # ml_dtypes rounds f64 once since 0.7, twice before, and knows one power of two below 2**-126 only since then
        if source is DType.F64 and to.is_float and (to is DType.BF16 or to.bits < 16):
            x = x.astype(np.float32)
        if source.is_float and to is DType.F8E8M0:
            fraction, exponent = np.frexp(wide(x))
            code = np.clip(exponent + 126 + (fraction >= 0.75), 0, 255)
            return np.where((fraction > 0) & np.isfinite(fraction), code, 255).astype(np.uint8).view(to.np)
        return x.astype(to.np)

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        source = node.inputs[0].tensor.dtype
        return [b.cast(g, dtype=source) if source.is_float and node.output.tensor.dtype.is_float else None]

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 3)], {"dtype": "f64"})
        yield Sample([np.array([1.9, -1.9, np.nan, 1e20, -np.inf], np.float32)], {"dtype": "i32"}, grad=())
        yield Sample([np.array([300.0, -5.0], np.float32)], {"dtype": "u8"}, grad=())
        yield Sample([np.array([0, 3, -1], np.int64)], {"dtype": "f32"})
        yield Sample([np.array([0.0, 0.5], np.float32)], {"dtype": "bool"}, grad=())
        yield Sample([np.array([True, False])], {"dtype": "i64"})
        yield Sample([np.array([1.5, 1e6], np.float32)], {"dtype": "bf16"}, grad=())
        yield Sample([np.array([300, -1], np.int32)], {"dtype": "i8"})


def bits_differ(dtype: DType) -> bool:
    """Whether NumPy stores the type in more bits than it has (integers of 4 and 2 bits)."""
    return dtype.is_int and dtype.bits < 8


@register
class StopGradient(Op):
    """x, through which no gradient flows."""

    name = "stop_gradient"
    alias = 0
    kind = "elementwise"
    differentiable = False

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        return tensor(x)

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return x

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        return [None]

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(3)])


@register
class Barrier(Op):
    """x, not before ``after`` is known: what is computed from it stays apart from, and later than, an equal computation on x.

    How a value is computed again instead of being kept (Rematerialize). ``after`` is any dense tensor. Behind the last
    pass that merges equal nodes it decomposes into x.
    """

    name = "barrier"
    kind = "view"
    alias = 0

    def infer(self, attrs: Attrs, x: TensorType, after: TensorType) -> TensorType:
        tensor(after, "after")
        return tensor(x)

    def axes(self, attrs: Attrs, x: TensorType, after: TensorType) -> AxisRule:
        own = free(x.shape)
        return AxisRule((own, whole(after.shape)), (own,))

    def reference(self, attrs: Attrs, x: np.ndarray, after: np.ndarray) -> np.ndarray:
        return x

    def decompose(self, b: Builder, attrs: Attrs, x: Value, after: Value) -> Value:
        return x

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(3), grid(2, 2)], grad=(0,))
        yield Sample([np.array([True, False]), np.array(1)])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["int8b32f16[4, 32]", "f32[]"], {}, "operand is quantized")
        yield ErrorSample(["f32[4]", "int8b32f16[4, 32]"], {}, "after is quantized")
