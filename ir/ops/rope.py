"""Rotary positions. Heads are the third axis: [batch, position, head, feature]."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import op as _op
from ..axes import AxisRule, Factor, aligned, free, whole
from ..checks import require_at_most, require_equal
from ..dims import DimLike, equal
from ..errors import TypeMismatch
from ..op import ErrorSample, Op, Sample, floating, register
from ..types import DType, TensorType
from .cache import rank4
from .elementwise import wave, wide
from .index import indices

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Value


@register
class Rope(Op):
    """Rotary position embedding (arXiv:2104.09864).

    x [b, s, h, d], positions int [s] or [b, s], inv_freq f32 [r/2]. The first r features are rotated by angles
    position * inv_freq, in pairs (i, i + r/2), or (2i, 2i + 1) if ``interleaved``; the others pass. Angles, sine and cosine
    are f32 (f64 for f64 x); both are multiplied by ``factor`` (YaRN's attention factor).
    """

    name = "rope"
    kind = "row"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        factor: float = 1.0
        interleaved: bool = False

    def infer(self, attrs: Attrs, x: TensorType, positions: TensorType, inv_freq: TensorType) -> TensorType:
        rank4(x, "x")
        if indices(positions, "positions").rank not in (1, 2):
            raise TypeMismatch(f"positions must be [s] or [b, s], not {positions}")
        require_equal(positions.shape[-1], x.shape[1], "positions and axis 1 of x")
        if positions.rank == 2 and positions.shape[0] != 1:
            require_equal(positions.shape[0], x.shape[0], "batch of positions and x")
        if floating(inv_freq, "inv_freq").rank != 1 or not isinstance(inv_freq.shape[0], int):
            raise TypeMismatch(f"inv_freq must be a vector of known length, not {inv_freq}")
        if inv_freq.dtype is not (DType.F64 if x.dtype is DType.F64 else DType.F32):
            raise TypeMismatch(f"inv_freq must be f32, not {inv_freq}")
        if isinstance(x.shape[3], int) and 2 * inv_freq.shape[0] > x.shape[3]:
            raise TypeMismatch(f"{inv_freq.shape[0]} frequencies rotate {2 * inv_freq.shape[0]} features; {x} has {x.shape[3]}")
        require_at_most(2 * inv_freq.shape[0], x.shape[3], "rotated features")
        return x

    def axes(self, attrs: Attrs, x: TensorType, positions: TensorType, inv_freq: TensorType) -> AxisRule:
        own = free(x.shape, {3: Factor(x.shape[3], "normalized")})
        return AxisRule((own, aligned(positions.shape, own[:2]), whole(inv_freq.shape)), (own,))

    def reference(self, attrs: Attrs, x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
        w = wide(x)
        angles = (positions[..., None].astype(inv_freq.dtype) * inv_freq)[..., None, :]  # [(b,) s, 1, r/2]
        factor = np.asarray(attrs.factor, angles.dtype)
        cos, sin = (np.cos(angles) * factor).astype(w.dtype), (np.sin(angles) * factor).astype(w.dtype)
        half = len(inv_freq)
        out = np.array(w)
        a, b = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if attrs.interleaved else (slice(0, half), slice(half, 2 * half))
        out[..., a] = w[..., a] * cos - w[..., b] * sin
        out[..., b] = w[..., b] * cos + w[..., a] * sin
        return out.astype(x.dtype)

    def decompose(self, b: Builder, attrs: Attrs, x: Value, positions: Value, inv_freq: Value) -> Value:
        dtype = x.tensor.dtype
        x = b.cast(x, dtype=DType.F32) if dtype.bits < 32 else x
        half = inv_freq.shape[0]
        shape = (*positions.shape, 1, 1)
        angles = b.mul(b.cast(b.reshape(positions, shape=shape), dtype=inv_freq.tensor.dtype), inv_freq)
        cos, sin = (b.mul(f(angles), attrs.factor) for f in (b.cos, b.sin))
        lead = x.shape[:3]

        def part(lo: DimLike, hi: DimLike) -> Value:
            return b.slice(x, starts=(0, 0, 0, lo), stops=(*lead, hi))

        if attrs.interleaved:
            pairs = b.reshape(part(0, 2 * half), shape=(*lead, half, 2))
            x1, x2 = (
                b.reshape(b.slice(pairs, starts=(0, 0, 0, 0, i), stops=(*lead, half, i + 1)), shape=(*lead, half))
                for i in (0, 1)
            )
        else:
            x1, x2 = part(0, half), part(half, 2 * half)
        y1 = b.sub(b.mul(x1, cos), b.mul(x2, sin))
        y2 = b.add(b.mul(x2, cos), b.mul(x1, sin))
        if attrs.interleaved:
            y = b.concat(b.reshape(y1, shape=(*lead, half, 1)), b.reshape(y2, shape=(*lead, half, 1)), axis=4)
            parts = [b.reshape(y, shape=(*lead, 2 * half))]
        else:
            parts = [y1, y2]
        if equal(x.shape[3], 2 * half) is not True:
            parts.append(part(2 * half, x.shape[3]))
        out = parts[0] if len(parts) == 1 else b.concat(*parts, axis=3)
        return b.cast(out, dtype=dtype) if dtype.bits < 32 else out

    def samples(self) -> Iterable[Sample]:
        freq = np.array([1.0, 0.3], np.float32)
        yield Sample([wave(2, 3, 2, 4), np.arange(3), freq])
        yield Sample([wave(2, 3, 1, 7), np.array([[5, 6, 7], [0, 1, 2]]), freq], {"factor": 1.3})
        yield Sample([wave(1, 3, 2, 4), np.arange(3), freq], {"interleaved": True})
        yield Sample([wave(1, 2, 2, 6), np.array([[3, 9]]), freq], {"interleaved": True})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[b, s, 2, 3]", "i64[s]", "f32[2]"], {}, "rotate 4 features")
        yield ErrorSample(["f32[b, s, 2, 4]", "i64[b, 3, 2]", "f32[2]"], {}, "positions must be")
        yield ErrorSample(["f32[b, 4, 2, 4]", "i64[3]", "f32[2]"], {}, "positions and axis 1")
        yield ErrorSample(["f32[b, s, 4]", "i64[s]", "f32[2]"], {}, "must be [batch, position")
        yield ErrorSample(["f32[b, s, 2, 4]", "f32[s]", "f32[2]"], {}, "must be integers")


__all__ = ["Rope"]
