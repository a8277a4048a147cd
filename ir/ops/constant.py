"""Values that come from no operand: constants, sizes, ranges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .. import op as _op
from ..dims import DimLike
from ..op import ErrorSample, Literal, Op, Sample, concrete, register
from ..types import DType, TensorType


@register
class Constant(Op):
    """A tensor written in the graph."""

    name = "constant"
    kind = "source"
    differentiable = False

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        value: Literal

    def infer(self, attrs: Attrs) -> TensorType:
        return TensorType(attrs.value.dtype, attrs.value.shape)

    def reference(self, attrs: Attrs) -> np.ndarray:
        return attrs.value.array

    def samples(self) -> Iterable[Sample]:
        yield Sample([], {"value": Literal.of([[1.5, -2.0]], "f32")})
        yield Sample([], {"value": Literal.of(np.arange(100), "i32")})


@register
class DimSize(Op):
    """The value of a symbolic dimension, as a scalar."""

    name = "dim_size"
    kind = "source"
    differentiable = False

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        size: DimLike
        dtype: DType = DType.I64

    def infer(self, attrs: Attrs) -> TensorType:
        return TensorType(attrs.dtype, ())

    def reference(self, attrs: Attrs) -> np.ndarray:
        return np.asarray(concrete(attrs.size), attrs.dtype.np)

    def samples(self) -> Iterable[Sample]:
        yield Sample([], {"size": 7})
        yield Sample([], {"size": 7, "dtype": "f32"})


@register
class Iota(Op):
    """``iota()[i] = i`` for ``0 <= i < size``: the positions along an axis."""

    name = "iota"
    kind = "source"
    differentiable = False

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        size: DimLike
        dtype: DType = DType.I64

    def infer(self, attrs: Attrs) -> TensorType:
        return TensorType(attrs.dtype, (attrs.size,))

    def reference(self, attrs: Attrs) -> np.ndarray:
        return np.arange(concrete(attrs.size)).astype(attrs.dtype.np)

    def samples(self) -> Iterable[Sample]:
        yield Sample([], {"size": 5})
        yield Sample([], {"size": 0, "dtype": "f32"})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample([], {"size": -1}, "cannot be -1")
