"""Finds the numbers of weights in blocks: scales and offsets by search against squared error, codes by rounding.

Every group of a row is fitted by itself: scales around the one that spans the group are tried, each with the codes that it
gives and then the scale (and offset) that is best for those codes, in closed form. Formats of super-blocks round what was found
to integer factors of the block's floats, and round the codes last. An error may be weighted: ``importance`` holds how much each
feature of a row matters, as the mean square of what it is multiplied by.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .schemes import Parts, Scheme

_STEPS = np.linspace(0.72, 1.08, 13, dtype=np.float32)
"""Spans that are tried, as parts of the whole one: what lies outside is clipped."""
_NEAR = np.linspace(0.997, 1.06, 13, dtype=np.float32)
"""Those of codes of eight bits: clipping does not pay, but where elements come to lie between codes is chance, and of thirteen
tries the best has a fifth less of squared error."""
_SLAB = 1 << 16
"""Elements that are worked on at once: their temporaries stay in a cache."""
_TINY = np.float32(1e-30)
_LARGEST = np.float32(65504)
_INFINITE = np.float16(np.inf)


def searched(
    x: np.ndarray, low: int, high: int, block: int, scale: np.dtype, zeros: bool, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Values i8 of x's shape, scales and perhaps zero points i8, each [.., blocks], of ``(value - zero) * scale``.

    Values are ``low`` to ``high``. ``importance``: f32 of x's last axis. The last block may be short.
    """
    *lead, k = x.shape
    blocks = -(-k // block)
    rows = x.reshape(math.prod(lead), k)
    values = np.empty((len(rows), k), np.int8)
    scales = np.empty((len(rows), blocks), scale)
    points = np.empty((len(rows), blocks), np.int8) if zeros else None
    known = normalized(importance, k)
    weights = None if known is None else _padded(known[None], blocks, block)
    step = max(1, _SLAB // max(k, 1))
    for i in range(0, len(rows), step):
        w = _padded(rows[i : i + step], blocks, block)
        if points is not None:
            s, z = _with_zeros(w, weights, low, high)
            points[i : i + step] = z
        else:
            s, z = symmetric(w, weights, low, high), np.zeros(1, np.float32)
        stored = s.astype(scale)
        scales[i : i + step] = stored
        codes = np.rint(w * inverse(stored.astype(np.float32))[..., None])
        codes += z[..., None]
        np.clip(codes, low, high, out=codes)
        values[i : i + step] = codes.reshape(len(w), -1)[:, :k]
    of_blocks = (*lead, blocks)
    return values.reshape(x.shape), scales.reshape(of_blocks), None if points is None else points.reshape(of_blocks)


def in_format(x: np.ndarray, scheme: Scheme, importance: np.ndarray | None = None) -> np.ndarray:
    """The blocks of x in a format: u8 [.., blocks, bytes]. The last axis is of whole blocks."""
    assert scheme.write is not None, scheme.name
    *lead, k = x.shape
    rows = x.reshape(math.prod(lead), k)
    blocks, groups = k // scheme.block, scheme.block // scheme.group
    out = np.empty((len(rows), blocks, scheme.size), np.uint8)
    weights = normalized(importance, k)
    if weights is not None:
        weights = weights.reshape(1, blocks, groups, scheme.group)
    step = max(1, _SLAB // max(k, 1))
    for i in range(0, len(rows), step):
        w = rows[i : i + step].astype(np.float32).reshape(-1, blocks, groups, scheme.group)
        out[i : i + step] = scheme.write(_parts(w, weights, scheme))
    return out.reshape(*lead, blocks, scheme.size)


def _parts(w: np.ndarray, weights: np.ndarray | None, scheme: Scheme) -> Parts:
    """w [rows, blocks, groups, group] as the format holds it."""
    if scheme.offset:
        s, o = _with_offset(w, weights, scheme.high, negative=scheme.factors is not None)
    else:
        s, o = symmetric(w, weights, scheme.low, scheme.high), None
    scale, factors = factored(s, scheme.factors)
    offset, offset_factors = (None, None) if o is None else factored(o, scheme.factors)
    parts = Parts(np.empty(0, np.int8), scale, factors, offset, offset_factors)
    base = w if parts.offsets is None else w - parts.offsets[..., None]
    codes = np.rint(base * inverse(parts.scales)[..., None])
    np.clip(codes, scheme.low, scheme.high, out=codes)
    return replace(parts, codes=codes.astype(np.int8).reshape(*w.shape[:2], -1))


def symmetric(w: np.ndarray, weights: np.ndarray | None, low: int, high: int) -> np.ndarray:
    """Scales of ``code * scale`` for w [.., group]: f32 [..]. The largest element takes the side that has one level more."""
    peak = np.take_along_axis(w, np.abs(w).argmax(-1)[..., None], -1)[..., 0]
    best = _Best(w, weights)
    whole = peak / np.float32(low)
    for part in _NEAR if high >= 127 else _STEPS:
        codes = np.clip(np.rint(w * inverse(whole * part)[..., None]), low, high)
        best.offer(codes)
    return best.scale


def _with_zeros(w: np.ndarray, weights: np.ndarray | None, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and whole zero points of ``(code - zero) * scale``, both f32 [..]. Zero itself is among the numbers."""
    bottom, top = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    best = _Best(w, weights)
    zero = np.zeros_like(bottom)
    for part in _STEPS:
        back = inverse((top - bottom) * (part / np.float32(high - low)))
        z = np.clip(np.rint(np.float32((low + high) / 2) - (top + bottom) / 2 * back), low, high)
        codes = np.rint(w * back[..., None])
        np.clip(codes, (low - z)[..., None], (high - z)[..., None], out=codes)
        np.copyto(zero, z, where=best.offer(codes))
    return best.scale, zero


def _with_offset(
    w: np.ndarray, weights: np.ndarray | None, high: int, negative: bool
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Scales and offsets of ``code * scale + offset``, codes from 0 to ``high``; ``negative``: offsets are at most 0."""
    bottom, top = w.min(-1), w.max(-1)
    if negative:
        bottom = np.minimum(bottom, 0)
    weighted = w if weights is None else w * weights
    total = np.float32(w.shape[-1]) if weights is None else np.broadcast_to(weights, w.shape).sum(-1)
    sum_w = weighted.sum(-1)
    scale, offset = np.zeros_like(bottom), sum_w / np.maximum(total, _TINY)
    if negative:
        offset = np.minimum(offset, 0)
    gain = offset * sum_w
    for part in _STEPS:
        s = (top - bottom) * (part / np.float32(high))
        middle = (top + bottom) / 2 - s * np.float32(high / 2)
        if negative:
            middle = np.minimum(middle, 0)
        codes = np.clip(np.rint((w - middle[..., None]) * inverse(s)[..., None]), 0, high)
        of_codes = codes if weights is None else codes * weights
        sum_c, sum_cc, sum_cw = of_codes.sum(-1), _dot(of_codes, codes), _dot(weighted, codes)
        det = total * sum_cc - sum_c * sum_c
        found = det > 0
        det = np.where(found, det, 1)
        s = np.where(found, (total * sum_cw - sum_w * sum_c) / det, 0)
        o = np.where(found, (sum_cc * sum_w - sum_c * sum_cw) / det, 0)
        if negative:
            above = (o > 0) | ~found  # all codes are the same where all elements are: a scale alone is enough
            s = np.where(above, sum_cw / np.maximum(sum_cc, _TINY), s)
            o = np.where(above, 0, o)
            found = above | found
        g = s * sum_cw + o * sum_w  # how much less the squared error is than that of zeros
        better = found & (g > gain)
        for kept, new in ((scale, s), (offset, o), (gain, g)):
            np.copyto(kept, new, where=better)
    return scale, offset


class _Best:
    """The scale, of those that codes were offered for, whose squared error is least."""

    def __init__(self, w: np.ndarray, weights: np.ndarray | None) -> None:
        self.weighted, self.weights = w if weights is None else w * weights, weights
        self.scale = np.zeros(w.shape[:-1], np.float32)
        self._gain = np.zeros_like(self.scale)

    def offer(self, codes: np.ndarray) -> np.ndarray:
        """Where these codes [.., group] are better than all before, at their best scale."""
        sum_cw = _dot(self.weighted, codes)
        sum_cc = np.maximum(_dot(codes if self.weights is None else codes * self.weights, codes), _TINY)
        gain = sum_cw * sum_cw / sum_cc
        better = gain > self._gain
        np.copyto(self._gain, gain, where=better)
        np.copyto(self.scale, sum_cw / sum_cc, where=better)
        return better


def factored(x: np.ndarray, limits: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers of groups [.., groups] as one f16 [.., 1] and, if there are ``limits``, integer factors i8 [.., groups]."""
    if limits is None:
        return _f16(x), None
    low, high = limits
    limit = np.float32(high if low == 0 else low)
    peak = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)
    whole = _f16(peak / limit)
    short = np.abs(peak) > np.abs(whole.astype(np.float32) * limit) * np.float32(1 + 1 / 256)  # of small numbers f16 has few
    whole = np.where(short, np.nextafter(whole, np.copysign(_INFINITE, whole)), whole)
    return whole, np.clip(np.rint(x * inverse(whole.astype(np.float32))), low, high).astype(np.int8)


def _f16(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -_LARGEST, _LARGEST).astype(np.float16)


def inverse(x: np.ndarray) -> np.ndarray:
    """1 / x, and 0 where that is no number."""
    with np.errstate(over="ignore"):
        y = np.divide(np.float32(1), x, where=x != 0, out=np.zeros_like(x))
    return np.where(np.isfinite(y), y, np.float32(0))


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("...g,...g->...", a, b))


def normalized(importance: np.ndarray | None, k: int) -> np.ndarray | None:
    """f32 [k], about 1 on average; None where all are alike."""
    if importance is None:
        return None
    x = np.asarray(importance, np.float32)
    if x.shape != (k,) or not np.isfinite(x).all() or (x < 0).any():
        raise ValueError(f"importance must be {k} numbers that are not negative")
    mean = x.mean(dtype=np.float64)
    return None if mean == 0 else np.maximum(x / np.float32(mean), np.float32(1e-4))


def _padded(rows: np.ndarray, blocks: int, block: int) -> np.ndarray:
    """[n, k] -> f32 [n, blocks, block], filled with zeros."""
    if rows.shape[1] == blocks * block:
        return rows.astype(np.float32).reshape(len(rows), blocks, block)
    w = np.zeros((len(rows), blocks * block), np.float32)
    w[:, : rows.shape[1]] = rows
    return w.reshape(len(rows), blocks, block)
