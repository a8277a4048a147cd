"""The bits of one element type read as another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .. import op as _op
from ..errors import TypeMismatch
from ..op import ErrorSample, Op, Sample, register, tensor
from ..types import DType, TensorType


@register
class Bitcast(Op):
    """The same bits as another element type of the same width."""

    name = "bitcast"
    kind = "elementwise"
    differentiable = False

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        dtype: DType

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        if tensor(x).dtype.bits != attrs.dtype.bits or (DType.BOOL in (x.dtype, attrs.dtype) and x.dtype is not attrs.dtype):
            raise TypeMismatch(f"the bits of {x} are not those of {attrs.dtype}")
        return x.with_dtype(attrs.dtype)

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        source, to = DType.of(x.dtype), attrs.dtype
        if source.bits < 8:  # NumPy stores these one to a byte
            bits = source.bits
            raw = (x.astype(np.int64) if source.is_int else x.view(np.uint8).astype(np.int64)) & (2**bits - 1)
            if not to.is_int:
                return raw.astype(np.uint8).view(to.np)
            signed = to.value.startswith("i") & (raw >= 2 ** (bits - 1))
            return np.asarray(raw - 2**bits * signed).astype(to.np)
        return np.ascontiguousarray(x).reshape(x.shape).view(attrs.dtype.np)

    def samples(self) -> Iterable[Sample]:
        yield Sample([np.array([1.0, -2.5, np.inf], np.float32)], {"dtype": "u32"})
        yield Sample([np.array([[1], [-1]], np.int16)], {"dtype": "f16"})
        yield Sample([np.array([1, 15, 8], ml_dtypes.uint4)], {"dtype": "i4"})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {"dtype": "i64"}, "are not those of i64")
        yield ErrorSample(["u8[2]"], {"dtype": "bool"}, "are not those of bool")
