"""Reductions along axes. Sums, means and products of f16 and bf16 accumulate in f32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import op as _op
from ..axes import AxisRule, Factor, along, reduced
from ..checks import require_at_most
from ..dims import DimLike
from ..errors import TypeMismatch
from ..op import AxisIndex, AxisIndices, ErrorSample, Op, Sample, axis_of, floating, register, tensor
from ..types import DType, TensorType, Type

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Node, Value


def _x(*shape: int) -> np.ndarray:
    """Distinct values in no order, so that a maximum has one place."""
    n = int(np.prod(shape))
    return ((np.arange(n) * 7 % max(n, 1)) / 4 - 1).astype(np.float32).reshape(shape)


@dataclass(frozen=True)
class ReduceAttrs(_op.Attrs):
    """``axes`` to reduce; ``keepdims`` leaves them with size 1."""

    axes: AxisIndices
    keepdims: bool = False

    def canonical(self, *types: Type) -> ReduceAttrs:
        return type(self)(tuple(sorted(axis_of(a, types[0].rank) for a in self.axes)), self.keepdims)


def reduced_shape(x: TensorType, axes: Sequence[int], keepdims: bool) -> tuple[DimLike, ...]:
    """Shape of x with ``axes`` reduced. Raises TypeMismatch for a repeated axis."""
    if len(set(axes)) != len(axes):
        raise TypeMismatch(f"axes {tuple(axes)} repeat one")
    return tuple(1 if i in axes else d for i, d in enumerate(x.shape) if keepdims or i not in axes)


def _keep(b: Builder, node: Node, v: Value) -> Value:
    """A reduced value with the reduced axes back as size 1."""
    a: Any = node.attrs
    if a.keepdims:
        return v
    shape = tuple(1 if i in a.axes else d for i, d in enumerate(node.inputs[0].shape))
    return b.reshape(v, shape=shape)


def wide(x: np.ndarray) -> np.ndarray:
    """Narrow floats as f32, everything else as it is."""
    return x.astype(np.float32) if x.dtype.itemsize <= 2 and DType.of(x.dtype).is_float else x


class Reduce(Op):
    """Base of numeric reductions."""

    kind = "reduction"
    how: ClassVar[str] = ""
    Attrs = ReduceAttrs

    def infer(self, attrs: ReduceAttrs, x: TensorType) -> TensorType:
        if tensor(x).dtype is DType.BOOL:
            raise TypeMismatch(f"{self.name} of booleans: cast them, or use reduce_any or reduce_all")
        return x.with_shape(*reduced_shape(x, attrs.axes, attrs.keepdims))

    def axes(self, attrs: ReduceAttrs, x: TensorType) -> AxisRule:
        return reduced(x.shape, attrs.axes, attrs.keepdims, self.how)

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 3)], {"axes": (1,)})
        yield Sample([_x(2, 3, 4)], {"axes": (0, -1), "keepdims": True})
        yield Sample([_x(3, 2)], {"axes": ()})
        yield Sample([_x(3, 2).astype(np.float16)], {"axes": (0,)})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {"axes": (1,)}, "outside a tensor of rank 1")
        yield ErrorSample(["f32[2]"], {"axes": (0, 0)}, "repeat")
        yield ErrorSample(["bool[2]"], {"axes": (0,)}, "boolean")


@register
class ReduceSum(Reduce):
    """Sum over ``axes``; of no elements, 0."""

    name = "reduce_sum"
    how = "sum"
    precision = "wide"

    def reference(self, attrs: ReduceAttrs, x: np.ndarray) -> np.ndarray:
        w = wide(x)
        return w.sum(attrs.axes, keepdims=attrs.keepdims, dtype=w.dtype).astype(x.dtype)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        return [b.broadcast_to(_keep(b, node, g), shape=node.inputs[0].shape)]


@register
class ReduceProd(Reduce):
    """Product over ``axes``; of no elements, 1. The second derivative assumes that no element is 0."""

    name = "reduce_prod"
    how = "prod"
    precision = "wide"

    def reference(self, attrs: ReduceAttrs, x: np.ndarray) -> np.ndarray:
        w = wide(x)
        return w.prod(attrs.axes, keepdims=attrs.keepdims, dtype=w.dtype).astype(x.dtype)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        """Times the product of the other elements, which is 0 if any of them is."""
        x, axes = node.inputs[0], ReduceAttrs.of(node).axes
        zero = b.equal(x, 0.0)
        rest = b.select(zero, b.constant(1.0, x.tensor.dtype), x)
        zeros = b.cast(zero, dtype=x.tensor.dtype)
        others = b.sub(b.reduce_sum(zeros, axes=axes, keepdims=True), zeros)
        product = b.div(b.reduce_prod(rest, axes=axes, keepdims=True), rest)
        return [b.mul(_keep(b, node, g), b.select(b.equal(others, 0.0), product, b.constant(0.0, x.tensor.dtype)))]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 3) + 2.1], {"axes": (1,)})
        yield Sample([_x(2, 3, 2) + 2.1], {"axes": (0, -1), "keepdims": True})


class _Extreme(Reduce):
    """Base of max and min: the gradient goes to the extreme element, shared equally among ties."""

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        x = node.inputs[0]
        hit = b.cast(b.equal(x, _keep(b, node, node.output)), dtype=x.tensor.dtype)
        ties = b.reduce_sum(hit, axes=ReduceAttrs.of(node).axes, keepdims=True)
        return [b.mul(hit, b.div(_keep(b, node, g), ties))]


@register
class ReduceMax(_Extreme):
    """Largest element over ``axes``; NaN if any is; of no elements, the least value of the type."""

    name = "reduce_max"
    how = "max"

    def reference(self, attrs: ReduceAttrs, x: np.ndarray) -> np.ndarray:
        return np.max(x, attrs.axes, keepdims=attrs.keepdims, initial=limits(x.dtype)[0]) if attrs.axes else x


@register
class ReduceMin(_Extreme):
    """Smallest element over ``axes``; NaN if any is; of no elements, the greatest value of the type."""

    name = "reduce_min"
    how = "min"

    def reference(self, attrs: ReduceAttrs, x: np.ndarray) -> np.ndarray:
        return np.min(x, attrs.axes, keepdims=attrs.keepdims, initial=limits(x.dtype)[1]) if attrs.axes else x


def limits(dtype: np.dtype) -> tuple[Any, Any]:
    """Least and greatest value of an element type (infinities for floats)."""
    if DType.of(dtype).is_float:
        return np.asarray(-np.inf, dtype), np.asarray(np.inf, dtype)
    info = np.iinfo(dtype)
    return info.min, info.max


@register
class ReduceMean(Reduce):
    """Arithmetic mean over ``axes``."""

    name = "reduce_mean"
    precision = "wide"

    def infer(self, attrs: ReduceAttrs, x: TensorType) -> TensorType:
        return floating(x).with_shape(*reduced_shape(x, attrs.axes, attrs.keepdims))

    def reference(self, attrs: ReduceAttrs, x: np.ndarray) -> np.ndarray:
        w = wide(x)
        return w.mean(attrs.axes, keepdims=attrs.keepdims, dtype=w.dtype).astype(x.dtype) if attrs.axes else x

    def decompose(self, b: Builder, attrs: ReduceAttrs, x: Value) -> Value:
        if not attrs.axes:
            return x
        count: DimLike = 1
        for a in attrs.axes:
            count = count * x.shape[a]
        narrow = x.tensor.dtype if x.tensor.dtype.bits <= 16 else None
        if narrow:
            x = b.cast(x, dtype=DType.F32)
        total = b.reduce_sum(x, axes=attrs.axes, keepdims=attrs.keepdims)
        n = float(count) if isinstance(count, int) else b.dim_size(size=count, dtype=x.tensor.dtype)
        mean = b.div(total, n)
        return b.cast(mean, dtype=narrow) if narrow else mean

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["i32[2]"], {"axes": (0,)}, "must be float")


class _Logical(Op):
    """Base of reductions of booleans."""

    kind = "reduction"
    how: ClassVar[str]
    Attrs = ReduceAttrs
    differentiable = False

    def infer(self, attrs: ReduceAttrs, x: TensorType) -> TensorType:
        if tensor(x).dtype is not DType.BOOL:
            raise TypeMismatch(f"{self.name} takes booleans, not {x}")
        return x.with_shape(*reduced_shape(x, attrs.axes, attrs.keepdims))

    def axes(self, attrs: ReduceAttrs, x: TensorType) -> AxisRule:
        return reduced(x.shape, attrs.axes, attrs.keepdims, self.how)

    def samples(self) -> Iterable[Sample]:
        yield Sample([np.array([[True, False], [True, True], [False, False]])], {"axes": (1,)})
        yield Sample([np.array([[True, False]])], {"axes": (0, 1), "keepdims": True})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {"axes": (0,)}, "takes booleans")


@register
class ReduceAny(_Logical):
    """Whether any element over ``axes`` is true; of none, false."""

    name = "reduce_any"
    how = "any"

    def reference(self, attrs: ReduceAttrs, x: np.ndarray) -> np.ndarray:
        return np.any(x, attrs.axes, keepdims=attrs.keepdims) if attrs.axes else x


@register
class ReduceAll(_Logical):
    """Whether every element over ``axes`` is true; of none, true."""

    name = "reduce_all"
    how = "all"

    def reference(self, attrs: ReduceAttrs, x: np.ndarray) -> np.ndarray:
        return np.all(x, attrs.axes, keepdims=attrs.keepdims) if attrs.axes else x


class _Arg(Op):
    """Base of arg_max and arg_min: the first place of the extreme, i64."""

    kind = "reduction"
    differentiable = False
    last: ClassVar[float]
    """What does not matter, behind the other elements."""

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        axis: AxisIndex
        keepdims: bool = False

        def canonical(self, *types: Type) -> _Arg.Attrs:
            return _Arg.Attrs(axis_of(self.axis, types[0].rank), self.keepdims)

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        require_at_most(1, tensor(x).shape[attrs.axis], f"axis {attrs.axis} of {x} has no elements")
        return TensorType(DType.I64, reduced_shape(x, (attrs.axis,), attrs.keepdims))

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        return reduced(x.shape, (attrs.axis,), attrs.keepdims, neutral=self.last)

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 3)], {"axis": 1})
        yield Sample([np.array([[3, 1, 3], [1, 1, 2]], np.int32)], {"axis": -1, "keepdims": True})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {"axis": 1}, "outside a tensor of rank 1")
        yield ErrorSample(["f32[2, 0]"], {"axis": 1}, "axis 1 of f32[2, 0] has no elements")


@register
class ArgMax(_Arg):
    """Index of the largest element along ``axis``, the first of equals."""

    name = "arg_max"
    last = -math.inf

    def reference(self, attrs: _Arg.Attrs, x: np.ndarray) -> np.ndarray:
        return np.argmax(x, attrs.axis, keepdims=attrs.keepdims)


@register
class ArgMin(_Arg):
    """Index of the smallest element along ``axis``, the first of equals."""

    name = "arg_min"
    last = math.inf

    def reference(self, attrs: _Arg.Attrs, x: np.ndarray) -> np.ndarray:
        return np.argmin(x, attrs.axis, keepdims=attrs.keepdims)


@register
class CumSum(Op):
    """Running sum along ``axis``; ``exclusive`` leaves out the element itself, ``reverse`` runs from the end."""

    name = "cumsum"
    kind = "ordered"
    precision = "wide"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        axis: AxisIndex
        exclusive: bool = False
        reverse: bool = False

        def canonical(self, *types: Type) -> CumSum.Attrs:
            return CumSum.Attrs(axis_of(self.axis, types[0].rank), self.exclusive, self.reverse)

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        if tensor(x).dtype is DType.BOOL:
            raise TypeMismatch("cumsum of booleans: cast them first")
        return x

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        return along(x.shape, (attrs.axis,), lambda d: Factor(d, "ordered", "backward" if attrs.reverse else "forward"))

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        w = np.flip(x, attrs.axis) if attrs.reverse else x
        total = np.cumsum(wide(w), attrs.axis, dtype=wide(w).dtype)
        if attrs.exclusive:
            first = np.zeros_like(np.take(total, [0], attrs.axis)) if total.shape[attrs.axis] else total
            total = np.concatenate([first, np.take(total, range(max(total.shape[attrs.axis] - 1, 0)), attrs.axis)], attrs.axis)
        return (np.flip(total, attrs.axis) if attrs.reverse else total).astype(x.dtype)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        a = node.attrs
        assert isinstance(a, CumSum.Attrs)
        return [b.cumsum(g, axis=a.axis, exclusive=a.exclusive, reverse=not a.reverse)]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 3)], {"axis": 1})
        yield Sample([_x(2, 3)], {"axis": 0, "exclusive": True, "reverse": True})
        yield Sample([np.array([1, 2, 3], np.int64)], {"axis": 0})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["bool[2]"], {"axis": 0}, "boolean")
