"""Fourier transforms and mel filters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from wasat.ir import DType
from wasat.ir.dims import floordiv

from ..emit import EVALUATE_LIMIT, Emitter, Operand
from ..registry import NodeView, op


@op("DFT", since=17)
def dft(c: Emitter, n: NodeView, x: Operand, length: Operand | None = None, axis: Operand | None = None) -> Any:
    rank = c.rank(x)
    at = n.get("axis", -2) if axis is None else int(c.const(axis, "the axis of DFT"))
    at %= rank
    inverse, onesided = bool(n["inverse"]), bool(n["onesided"])
    steps = c.shape(x)[at]
    count = c.dims(length, "the length of DFT")[0] if length is not None else (steps - 1) * 2 if inverse and onesided else steps
    perm = [i for i in range(rank) if i not in (at, rank - 1)] + [at, rank - 1]
    y = c.dft(c.permute(x, perm), length=count, inverse=inverse, onesided=onesided)
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
    return c.dft(frames, length=size, onesided=bool(n["onesided"]) and c.shape(x)[-1] == 1)


@op("MelWeightMatrix")
def mel_weights(
    c: Emitter, n: NodeView, bins: Operand, length: Operand, rate: Operand, low: Operand, high: Operand
) -> Any:
    """Triangles between neighbouring mel frequencies (HTK: 2595 log10(1 + f/700)), over the bins of a transform."""
    mels, size, hertz = (int(c.const(v, "a size of MelWeightMatrix")) for v in (bins, length, rate))
    if not 0 < mels * size < EVALUATE_LIMIT:
        raise n.fail(f"{mels} filters over {size} samples")
    first, last = (2595 * math.log10(1 + float(c.const(v, "an edge of MelWeightMatrix")) / 700) for v in (low, high))
    points = np.arange(mels + 2) * ((last - first) / (mels + 2)) + first
    places = ((size + 1) * (700 * (10 ** (points / 2595) - 1)) // hertz).astype(np.int64)
    k = np.arange(size // 2 + 1)[:, None]
    left, center, right = places[:-2], places[1:-1], places[2:]
    rising = np.where((k >= left) & (k <= center), (k - left) / np.maximum(center - left, 1), 0)
    rising = np.where((center == left) & (k == center), 1, rising)
    falling = np.where((k >= center) & (k < right), (right - k) / np.maximum(right - center, 1), rising)
    return falling.astype(n.dtype("output_datatype").np)
