"""Fourier transforms as products with tables of cosines and sines; mel filters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from wasat.ir import DimLike, DType
from wasat.ir.dims import floordiv

from ..emit import Emitter, Operand
from ..registry import NodeView, op


def _table(c: Emitter, rows: DimLike, columns: DimLike, length: DimLike, dtype: DType) -> tuple[Any, Any]:
    """cos and sin of 2*pi*i*j/length, [rows, columns]; i*j is reduced first, so that large arguments stay exact."""
    turn = c.mul(c.along(c.iota(size=rows), 0, 2), c.along(c.iota(size=columns), 1, 2))
    turn = c.to(c.mod(turn, c.size_as(length, DType.I64)), DType.F64)
    angle = c.div(c.mul(turn, 2 * math.pi), c.size_as(length, DType.F64))
    return c.to(c.cos(angle), dtype), c.to(c.sin(angle), dtype)


def _transform(c: Emitter, x: Any, length: DimLike, inverse: bool, onesided: bool) -> Any:
    """x [.., t, 1 or 2] -> [.., f, 1 or 2], of the first ``length`` elements, zeros beyond."""
    own, rank, dtype = c.dtype(x), c.rank(x), DType.F64  # in f32 what should cancel would not
    x = c.to(x, dtype)
    steps = c.shape(x)[-2]
    real = inverse and onesided
    needed = floordiv(length, 2) + 1 if real else length
    if isinstance(steps, int) and isinstance(needed, int) and steps > needed:
        x, steps = c.cut(x, rank - 2, 0, needed), needed
    re = c.drop_axes(c.cut(x, rank - 1, 0, 1), -1)
    im = c.drop_axes(c.cut(x, rank - 1, 1, 2), -1) if c.shape(x)[-1] == 2 else None
    count = floordiv(length, 2) + 1 if onesided and not inverse else length
    cos, sin = _table(c, steps, count, length, dtype)

    def by(v: Any, table: Any) -> Any:
        flat = c.add_axes(v, 0) if c.rank(v) == 1 else v
        y = c.matmul(flat, table)
        return c.drop_axes(y, 0) if c.rank(v) == 1 else y

    if real:  # the half that is not given mirrors the other
        at = c.iota(size=steps)
        edge = c.logical_or(c.equal(at, 0), c.equal(c.mul(at, 2), c.size_as(length, DType.I64)))
        weight = c.to(c.select(edge, 1, 2), dtype)
        total = by(c.mul(re, weight), cos)
        if im is not None:
            total = c.sub(total, by(c.mul(im, weight), sin))
        return c.to(c.add_axes(c.div(total, c.size_as(length, dtype)), -1), own)
    out_re, out_im = by(re, cos), by(re, sin)
    out_im = out_im if inverse else c.neg(out_im)
    if im is not None:
        out_re = (c.sub if inverse else c.add)(out_re, by(im, sin))
        out_im = c.add(out_im, by(im, cos))
    y = c.concat(c.add_axes(out_re, -1), c.add_axes(out_im, -1), axis=rank - 1)
    return c.to(c.div(y, c.size_as(length, dtype)) if inverse else y, own)


@op("DFT", since=17)
def dft(c: Emitter, n: NodeView, x: Operand, length: Operand | None = None, axis: Operand | None = None) -> Any:
    rank = c.rank(x)
    at = n.get("axis", -2) if axis is None else int(c.const(axis, "the axis of DFT"))
    at %= rank
    inverse, onesided = bool(n["inverse"]), bool(n["onesided"])
    steps = c.shape(x)[at]
    count = c.dims(length, "the length of DFT")[0] if length is not None else (steps - 1) * 2 if inverse and onesided else steps
    perm = [i for i in range(rank) if i not in (at, rank - 1)] + [at, rank - 1]
    y = _transform(c, c.permute(x, perm), count, inverse, onesided)
    return c.permute(y, [perm.index(i) for i in range(rank)])


@op("STFT")
def stft(
    c: Emitter, n: NodeView, x: Operand, step: Operand, window: Operand | None = None, length: Operand | None = None
) -> Any:
    if c.rank(x) == 2:
        x = c.add_axes(x, -1)
    if length is not None:
        (size,) = c.dims(length, "the frame length of STFT")
    elif window is not None:
        size = c.shape(window)[0]
    else:
        raise n.fail("has neither window nor frame_length")
    (hop,) = c.dims(step, "the step of STFT")
    count = floordiv(c.shape(x)[1] - size, hop) + 1
    at = c.add(c.mul(c.along(c.iota(size=count), 0, 2), c.size_as(hop, DType.I64)), c.along(c.iota(size=size), 1, 2))
    frames = c.gather(x, at, axis=1)
    if window is not None:
        frames = c.mul(frames, c.along(window, 2, 4))
    return _transform(c, frames, size, False, bool(n["onesided"]) and c.shape(x)[-1] == 1)


@op("MelWeightMatrix")
def mel_weights(
    c: Emitter, n: NodeView, bins: Operand, length: Operand, rate: Operand, low: Operand, high: Operand
) -> Any:
    """Triangles between neighbouring mel frequencies (HTK: 2595 log10(1 + f/700)), over the bins of a transform."""
    mels, size, hertz = (int(c.const(v, "a size of MelWeightMatrix")) for v in (bins, length, rate))
    first, last = (2595 * math.log10(1 + float(c.const(v, "an edge of MelWeightMatrix")) / 700) for v in (low, high))
    points = np.arange(mels + 2) * ((last - first) / (mels + 2)) + first
    places = ((size + 1) * (700 * (10 ** (points / 2595) - 1)) // hertz).astype(np.int64)
    k = np.arange(size // 2 + 1)[:, None]
    left, center, right = places[:-2], places[1:-1], places[2:]
    rising = np.where((k >= left) & (k <= center), (k - left) / np.maximum(center - left, 1), 0)
    rising = np.where((center == left) & (k == center), 1, rising)
    falling = np.where((k >= center) & (k < right), (right - k) / np.maximum(right - center, 1), rising)
    return falling.astype(n.dtype("output_datatype").np)
