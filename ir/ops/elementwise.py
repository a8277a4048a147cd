"""Elementwise arithmetic and comparisons. Binary operations broadcast as NumPy does; element types must agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..op import Attrs, ErrorSample, Op, Sample, broadcast_shapes, floating, register, same_dtype, tensor
from ..types import TensorType

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Node, Value


def _grid(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    n = int(np.prod(shape))
    return np.linspace(low, high, n, dtype=np.float32).reshape(shape)


class Binary(Op):
    """Base of elementwise operations of two operands of one element type."""

    elementwise = True

    def infer(self, attrs: Attrs, x: TensorType, y: TensorType) -> TensorType:
        return TensorType(same_dtype(x, y), broadcast_shapes(tensor(x).shape, tensor(y).shape))

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]", "i32[2]"], {}, "element types differ")
        yield ErrorSample(["f32[2, 3]", "f32[2]"], {}, "axis 1")


@register
class Add(Binary):
    """x + y; integers wrap around."""

    name = "add"
    commutative = True

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x + y

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        return [b.sum_to(g, v.shape) for v in node.inputs]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_grid(2, 3), _grid(3)])
        yield Sample([np.array([2**31 - 1], np.int32), np.array([1], np.int32)])
        yield Sample([_grid(2, 1, 3), _grid(4, 1)])


@register
class Mul(Binary):
    """x * y; integers wrap around."""

    name = "mul"
    commutative = True

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x * y

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        x, y = node.inputs
        return [b.sum_to(b.mul(g, y), x.shape), b.sum_to(b.mul(g, x), y.shape)]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_grid(2, 3), _grid(3)])
        yield Sample([np.array([3], np.int64), np.array([-4], np.int64)])


@register
class Tanh(Op):
    """Hyperbolic tangent."""

    name = "tanh"
    elementwise = True

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        return floating(x)

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.tanh(x)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        y: Any = node.output
        return [b.mul(g, b.add(b.mul(b.mul(y, y), -1.0), 1.0))]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_grid(2, 3)])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["i32[2]"], {}, "must be float")
