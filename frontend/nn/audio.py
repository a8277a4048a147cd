"""Sound as tensors: frames, spectra, mel filters, log-mel features, as graphs that take any length."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from wasat.ir import DimLike

from wasat import ir

from .functions import arange, concat, constant, gather, log, maximum, minimum
from .tensor import Tensor, fail

Scale = Literal["slaney", "htk"]


def frame(x: Tensor, size: int, hop: int) -> Tensor:
    """``[..., n] -> [..., 1 + (n - size) // hop, size]``: pieces of ``size``, each ``hop`` after the one before."""
    count = (x.shape[-1] - size) // hop + 1
    if ir.less_equal(count, 0) is True:
        fail(f"nn.frame: {x.value!r} is shorter than a frame of {size}")
    return gather(x, arange(count)[:, None] * hop + arange(size), axis=-1)


def reflect(x: Tensor, pad: int) -> Tensor:
    """``[..., n] -> [..., n + 2 pad]``: mirrored at both ends, the end itself not repeated (``np.pad``'s "reflect")."""
    n = x.shape[-1]
    period = ir.maximum((n - 1) * 2, 1)
    at = arange(n + 2 * pad, -pad) % period
    return gather(x, minimum(at, -at + period), axis=-1)


def power_spectrum(x: Tensor, size: int, hop: int, *, center: bool = True) -> Tensor:
    """``[..., n] -> [..., frames, size // 2 + 1]``: squared magnitudes of the windowed transform, as ``librosa.stft`` has it.

    The window is the periodic Hann window. ``center``: frame i is centred at sample ``i * hop`` of ``x``, which is mirrored at
    both ends (1 + n // hop frames); else it begins there.
    """
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    pieces = frame(reflect(x, size // 2) if center else x, size, hop) * constant(window.astype(np.float32)).cast(x.dtype)
    bins = size // 2 + 1
    turn = arange(size)[:, None] * arange(bins) % size  # exact: the table has one entry for each angle there is
    angle = 2 * np.pi * np.arange(size) / size
    tables = [gather(constant(f(angle).astype(np.float32)).cast(x.dtype), turn) for f in (np.cos, np.sin)]
    spectrum = pieces @ concat(tables, axis=1)
    squares = spectrum * spectrum
    return squares[..., :bins] + squares[..., bins:]


def mel_filters(
    rate: int, size: int, mels: int, low: float = 0.0, high: float | None = None, scale: Scale = "slaney"
) -> Tensor:
    """Triangles over the bins of a transform of ``size`` samples at ``rate`` Hz: f32[size // 2 + 1, mels].

    Evenly spaced in mel, they reach from ``low`` to ``high`` Hz (default: rate / 2). ``scale``: "slaney" (linear below 1 kHz,
    logarithmic above; each triangle has area 1 over frequency) or "htk" (2595 log10(1 + f / 700); each has height 1):
    librosa's ``filters.mel`` with ``htk=False, norm="slaney"``, and with ``htk=True, norm=None``.
    """
    top = rate / 2 if high is None else high
    if not 0 <= low < top <= rate / 2:
        fail(f"nn.mel_filters: {low:g} to {top:g} Hz does not lie within 0 to {rate / 2:g} Hz")
    if scale not in _MELS:
        fail(f"nn.mel_filters: the scale is {' or '.join(map(repr, _MELS))}, not {scale!r}")
    to_mel, to_hertz = _MELS[scale]
    first, last = to_mel(np.array([low, top]))
    edges = to_hertz(np.linspace(first, last, mels + 2))
    bins = np.arange(size // 2 + 1)[:, None] * (rate / size)
    width = np.diff(edges)
    rising = (bins - edges[:-2]) / width[:-1]
    falling = (edges[2:] - bins) / width[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    if scale == "slaney":
        triangles *= 2 / (edges[2:] - edges[:-2])
    return constant(triangles.astype(np.float32))


def _slaney_mel(f: np.ndarray) -> np.ndarray:
    return np.where(f < 1000, f * 3 / 200, 15 + 27 * np.log(np.maximum(f, 1000) / 1000) / math.log(6.4))


def _slaney_hertz(m: np.ndarray) -> np.ndarray:
    return np.where(m < 15, m * 200 / 3, 1000 * np.exp(math.log(6.4) * (m - 15) / 27))


def _htk_mel(f: np.ndarray) -> np.ndarray:
    return 2595 * np.log10(1 + f / 700)


def _htk_hertz(m: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (m / 2595) - 1)


_MELS = {"slaney": (_slaney_mel, _slaney_hertz), "htk": (_htk_mel, _htk_hertz)}


def log_mel(
    wave: Tensor, rate: int, *, mels: int = 80, size: int = 400, hop: int = 160, low: float = 0.0, high: float | None = None,
    scale: Scale = "slaney", method: Literal["whisper", "plain"] = "whisper",
) -> Tensor:  # fmt: skip
    """Mono ``[..., n]`` at ``rate`` Hz -> ``[..., frames, mels]``: the logarithm of the power in each mel filter.

    ``size`` and ``hop``, in samples, are of the transform; the rest is of :func:`mel_filters`. "plain": log10, at least
    1e-10, 1 + n // hop frames. "whisper": n // hop frames, nothing more than 8 below the largest, then (x + 4) / 4 (Radford
    et al. 2022); with the defaults at 16 kHz, and a wave filled with zeros to 30 s, what Whisper's encoder takes.
    """
    if method not in ("whisper", "plain"):
        fail(f'nn.log_mel: the method is "whisper" or "plain", not {method!r}')
    power = power_spectrum(wave, size, hop)
    if method == "whisper":
        frames: DimLike = wave.shape[-1] // hop
        power = power[..., :frames, :]
    found = log(maximum(power @ mel_filters(rate, size, mels, low, high, scale), 1e-10)) * (1 / math.log(10))
    if method == "plain":
        return found
    return (maximum(found, found.max(axis=(-2, -1), keepdims=True) - 8.0) + 4.0) * 0.25
