"""Discrete Fourier transforms. Complex numbers are a last axis of two: the real and the imaginary part."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import op as _op
from ..axes import AxisRule, free, whole
from ..checks import require_at_most
from ..dims import DimLike, less_equal
from ..errors import TypeMismatch
from ..op import ErrorSample, Op, Sample, concrete, floating, register
from ..types import DType, TensorType
from .elementwise import wave, wide

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Value


@register
class Dft(Op):
    """X[f] = sum over t < length of x[t] * exp(-2 pi i f t / length); x [.., t, 1 or 2] -> [.., f, 2], in f32 or wider.

    x is cut, or filled with zeros, to ``length``. ``onesided`` gives the first length//2 + 1 (of a real signal the others
    mirror them). ``inverse``: exp(+..), divided by length; with ``onesided`` x holds those first ones, the result is real
    [.., length, 1].
    """

    name = "dft"
    kind = "product"
    precision = "wide"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        length: DimLike
        inverse: bool = False
        onesided: bool = False

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        if floating(x).rank < 2 or x.shape[-1] not in (1, 2):
            raise TypeMismatch(f"dft takes x [.., t, 1 or 2], not {x}")
        require_at_most(1, attrs.length, f"a transform of length {attrs.length}")
        if attrs.onesided and attrs.inverse:
            return x.with_shape(*x.shape[:-2], attrs.length, 1)
        return x.with_shape(*x.shape[:-2], attrs.length // 2 + 1 if attrs.onesided else attrs.length, 2)

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        lead, real = free(x.shape[:-2]), attrs.onesided and attrs.inverse
        count = attrs.length // 2 + 1 if attrs.onesided and not real else attrs.length
        return AxisRule(((*lead, *whole(x.shape[-2:])),), ((*lead, *whole((count, 1 if real else 2))),))

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        w, n = wide(x), concrete(attrs.length)
        if not x.shape[-2]:  # NumPy reads memory beside an axis of nothing
            w = np.zeros((*x.shape[:-2], 1, x.shape[-1]), w.dtype)
        z = w[..., 0] if w.shape[-1] == 1 else w[..., 0] + np.asarray(1j, np.complex64) * w[..., 1]
        if attrs.inverse and attrs.onesided:
            return np.fft.irfft(z, n)[..., None].astype(x.dtype)
        y = np.fft.ifft(z, n) if attrs.inverse else np.fft.fft(z, n)
        y = y[..., : n // 2 + 1] if attrs.onesided else y
        return np.stack([y.real, y.imag], -1).astype(x.dtype)

    def multiply_adds(self, attrs: Attrs, x: TensorType) -> DimLike:
        """As products with tables: those of cosines and of sines, of each part."""
        n, steps = attrs.length, x.shape[-2]
        if attrs.inverse and attrs.onesided:
            return self._rows(x) * x.shape[-1] * (steps if less_equal(steps, n // 2 + 1) is True else n // 2 + 1) * n
        count = n // 2 + 1 if attrs.onesided else n
        return self._rows(x) * x.shape[-1] * 2 * (steps if less_equal(steps, n) is True else n) * count

    @staticmethod
    def _rows(x: TensorType) -> DimLike:
        return x.with_shape(*x.shape[:-2]).size

    def decompose(self, b: Builder, attrs: Attrs, x: Value) -> Value:
        """Products with tables of cosines and sines."""
        own, rank, n = x.tensor.dtype, len(x.shape), attrs.length
        work = DType.F32 if own.bits < 32 else own
        x = b.cast(x, dtype=work) if work is not own else x
        real = attrs.inverse and attrs.onesided
        needed = n // 2 + 1 if real else n
        steps = x.shape[-2]
        if less_equal(steps, needed) is not True:  # zeros behind, then a cut: right for either order of the sizes
            pads = [0] * (rank - 2) + [needed, 0]
            x = b.pad(x, low=(0,) * rank, high=pads)
            x = b.slice(x, starts=(0,) * rank, stops=(*x.shape[:-2], needed, x.shape[-1]))
            steps = needed
        parts = []
        for i in range(x.shape[-1]):
            starts, stops = (*(0,) * (rank - 1), i), (*x.shape[:-1], i + 1)
            part = b.reshape(b.slice(x, starts=starts, stops=stops), shape=x.shape[:-1])
            parts.append(b.reshape(part, shape=(1, *part.shape)) if rank == 2 else part)
        count = n // 2 + 1 if attrs.onesided and not attrs.inverse else n
        cos, sin = _table(b, steps, count, n, work)
        scale = b.dim_size(size=n, dtype=work)
        re, im = parts[0], parts[1] if len(parts) == 2 else None
        if real:  # the part that is not given mirrors the one that is
            at = b.iota(size=steps)
            edge = b.logical_or(b.equal(at, 0), b.equal(b.mul(at, 2), b.dim_size(size=n)))
            weight = b.select(edge, b.constant(1.0, work), b.constant(2.0, work))
            y = b.matmul(b.mul(re, weight), cos)
            y = y if im is None else b.sub(y, b.matmul(b.mul(im, weight), sin))
            y = b.reshape(b.div(y, scale), shape=(*x.shape[:-2], n, 1))
            return b.cast(y, dtype=own) if work is not own else y
        up, side = b.matmul(re, cos), b.matmul(re, sin)
        side = side if attrs.inverse else b.neg(side)
        if im is not None:
            turned = b.matmul(im, sin)
            up = b.sub(up, turned) if attrs.inverse else b.add(up, turned)
            side = b.add(side, b.matmul(im, cos))
        shape = (*x.shape[:-2], count, 1)
        y = b.concat(b.reshape(up, shape=shape), b.reshape(side, shape=shape), axis=rank - 1)
        y = b.div(y, scale) if attrs.inverse else y
        return b.cast(y, dtype=own) if work is not own else y

    def samples(self) -> Iterable[Sample]:
        yield Sample([wave(2, 6, 1, step=0.7)], {"length": 6}, atol=1e-5)
        yield Sample([wave(2, 6, 2, step=0.7)], {"length": 6, "inverse": True})
        yield Sample([wave(3, 7, 1, step=0.7)], {"length": 5, "onesided": True}, atol=1e-5)
        yield Sample([wave(5, 2, step=0.7)], {"length": 7}, atol=1e-5)
        yield Sample([wave(2, 4, 2, step=0.7)], {"length": 6, "inverse": True, "onesided": True})
        yield Sample([wave(2, 3, 2, step=0.7)], {"length": 5, "inverse": True, "onesided": True})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[b, 4, 3]"], {"length": 4}, "dft takes x")
        yield ErrorSample(["i32[b, 4, 1]"], {"length": 4}, "must be float")
        yield ErrorSample(["f32[b, 4, 1]"], {"length": 0}, "a transform of length 0")


def _table(b: Builder, rows: DimLike, columns: DimLike, length: DimLike, dtype: DType) -> tuple[Value, Value]:
    """cos and sin of 2 pi i j / length, [rows, columns]; i*j is reduced first, so that angles stay exact."""
    turn = b.mul(b.reshape(b.iota(size=rows), shape=(rows, 1)), b.reshape(b.iota(size=columns), shape=(1, columns)))
    turn = b.cast(b.mod(turn, b.dim_size(size=length)), dtype=DType.F64)
    angle = b.div(b.mul(turn, b.constant(2 * math.pi, DType.F64)), b.dim_size(size=length, dtype=DType.F64))
    return b.cast(b.cos(angle), dtype=dtype), b.cast(b.sin(angle), dtype=dtype)
