"""Elementwise comparisons, logic and bits. Operands broadcast as NumPy does; element types must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np

from ..errors import TypeMismatch
from ..op import Attrs, ErrorSample, Op, Sample, floating, register, tensor
from ..types import DType, TensorType
from .elementwise import Binary, wide


# -- one operand ----------------------------------------------------------------------------------------------------------
class _Test(Op):
    """Base of tests of floats."""

    kind = "elementwise"
    differentiable = False

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        return floating(x).with_dtype(DType.BOOL)

    def samples(self) -> Iterable[Sample]:
        yield Sample([np.array([1.0, np.nan, np.inf, -np.inf], np.float32)])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["i32[2]"], {}, "must be float")


@register
class IsNan(_Test):
    """Whether x is NaN."""

    name = "isnan"

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.isnan(x)


@register
class IsInf(_Test):
    """Whether x is an infinity of either sign."""

    name = "isinf"

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.isinf(x)


@register
class LogicalNot(Op):
    """not x, of booleans."""

    name = "logical_not"
    kind = "elementwise"
    involution = True
    differentiable = False

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        return _booleans(x)

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.logical_not(x)

    def samples(self) -> Iterable[Sample]:
        yield Sample([np.array([True, False])])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {}, "must be booleans")


def _booleans(x: TensorType) -> TensorType:
    if tensor(x).dtype is not DType.BOOL:
        raise TypeMismatch(f"the operand must be booleans, not {x}; compare it with 0 first")
    return x


@register
class BitNot(Op):
    """All bits of an integer inverted."""

    name = "bit_not"
    kind = "elementwise"
    involution = True
    differentiable = False

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        return _integers(x)

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.invert(x)

    def samples(self) -> Iterable[Sample]:
        yield Sample([np.array([0, 5, 255], np.uint8)])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {}, "must be integers")


def _integers(x: TensorType) -> TensorType:
    if not tensor(x).dtype.is_int:
        raise TypeMismatch(f"the operand must be integers, not {x}")
    return x


# -- two operands -----------------------------------------------------------------------------------------------------------
class _Compare(Binary):
    """Base of comparisons; false with NaN, but for not_equal."""

    differentiable = False
    f: ClassVar[Callable[..., Any]]

    def accept(self, dtype: DType) -> None:
        pass

    def infer(self, attrs: Attrs, x: TensorType, y: TensorType) -> TensorType:
        return super().infer(attrs, x, y).with_dtype(DType.BOOL)

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray(type(self).f(wide(x), wide(y)))

    def samples(self) -> Iterable[Sample]:
        yield Sample([np.array([[1.0, np.nan, 2.0], [0.0, 1.0, -1.0]], np.float32), np.array([1.0, 1.0, 3.0], np.float32)])
        yield Sample([np.array([1, 2, 3]), np.array([3, 2, 1])])


def _binary(base: type[Binary], op_name: str, f: Callable[..., Any], doc: str, **more: Any) -> None:
    register(type(op_name.title().replace("_", ""), (base,), {"__doc__": doc, "name": op_name, "f": staticmethod(f), **more}))


_binary(_Compare, "equal", np.equal, "x == y.", commutative=True)
_binary(_Compare, "not_equal", np.not_equal, "x != y; true with NaN.", commutative=True)
_binary(_Compare, "less", np.less, "x < y.")
_binary(_Compare, "less_equal", np.less_equal, "x <= y.")
_binary(_Compare, "greater", np.greater, "x > y.")
_binary(_Compare, "greater_equal", np.greater_equal, "x >= y.")


class _Logic(Binary):
    differentiable = False
    commutative = True
    f: ClassVar[Callable[..., Any]]
    keeps: ClassVar[float]
    """The operand beside which the other is the result."""

    def neutral(self, dtype: DType) -> float | None:
        return self.keeps

    def accept(self, dtype: DType) -> None:
        if dtype is not DType.BOOL:
            raise TypeMismatch("the operands must be booleans; compare them with 0 first")

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray(type(self).f(x, y))

    def samples(self) -> Iterable[Sample]:
        yield Sample([np.array([[True], [False]]), np.array([True, False])])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]", "f32[2]"], {}, "must be booleans")


_binary(_Logic, "logical_and", np.logical_and, "x and y.", keeps=1, absorbing=0, idempotent=True)
_binary(_Logic, "logical_or", np.logical_or, "x or y.", keeps=0, absorbing=1, idempotent=True)
_binary(_Logic, "logical_xor", np.logical_xor, "Exactly one of x and y.", keeps=0)


class _Bits(Binary):
    differentiable = False
    f: ClassVar[Callable[..., Any]]

    def accept(self, dtype: DType) -> None:
        if not dtype.is_int:
            raise TypeMismatch("the operands must be integers")

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray(type(self).f(x, y)).astype(x.dtype)

    def samples(self) -> Iterable[Sample]:
        yield Sample([np.array([12, 200, 255], np.uint8), np.array([3, 2, 7], np.uint8)])
        yield Sample([np.array([-12, 200], np.int32), np.array([3, 2], np.int32)])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]", "f32[2]"], {}, "must be integers")


_binary(_Bits, "bit_and", np.bitwise_and, "Bits set in both.", commutative=True, idempotent=True)
_binary(_Bits, "bit_or", np.bitwise_or, "Bits set in either.", commutative=True, idempotent=True)
_binary(_Bits, "bit_xor", np.bitwise_xor, "Bits set in exactly one.", commutative=True)
_binary(_Bits, "shift_left", np.left_shift, "x * 2**y, wrapped: 0 unless 0 <= y < bits.")
_binary(_Bits, "shift_right", np.right_shift, "x / 2**y rounded down, the sign kept: 0 or -1 unless 0 <= y < bits.")
