"""Rotary position embedding, written out, and the published ways of stretching its frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from wasat.ir import DType, WasatError, less_equal

from .functions import concat, cos, sin, stack
from .module import Module
from .tensor import Tensor, fail


def frequencies(dim: int, theta: float = 10000.0) -> np.ndarray:
    """``theta ** -(2i / dim)`` for ``i < dim/2``: f32 ``[dim/2]``, radians per position."""
    exponents = np.arange(0, dim, 2, dtype=np.int64).astype(np.float32) / np.float32(dim)
    return (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)


def _linear(inv_freq: np.ndarray, p: Mapping[str, Any], dim: int, theta: float) -> tuple[np.ndarray, float]:
    """Position interpolation: all frequencies divided by ``factor``."""
    return inv_freq / np.float32(p["factor"]), 1.0


def _llama3(inv_freq: np.ndarray, p: Mapping[str, Any], dim: int, theta: float) -> tuple[np.ndarray, float]:
    """Llama 3.1: long waves divided by ``factor``, short ones kept, a smooth passage between."""
    factor, low, high = float(p["factor"]), float(p["low_freq_factor"]), float(p["high_freq_factor"])
    context = float(p["original_max_position_embeddings"])
    wave = 2 * np.float32(math.pi) / inv_freq
    with np.errstate(divide="ignore", invalid="ignore"):  # no passage, where low is high
        smooth = (context / wave - low) / np.float64(high - low)
        between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    out = np.where(wave > context / low, inv_freq / factor, inv_freq)
    medium = (wave >= context / high) & (wave <= context / low)
    return np.where(medium, between, out).astype(np.float32), 1.0


def _yarn(inv_freq: np.ndarray, p: Mapping[str, Any], dim: int, theta: float) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): interpolation by parts, and a factor on cos and sin."""
    factor, context = float(p["factor"]), float(p["original_max_position_embeddings"])
    fast, slow = float(p.get("beta_fast") or 32.0), float(p.get("beta_slow") or 1.0)

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = p.get("attention_factor")
    if attention is None:
        both = p.get("mscale") and p.get("mscale_all_dim")
        attention = scale(p["mscale"]) / scale(p["mscale_all_dim"]) if both else scale(1.0)

    def turns(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turns(fast), turns(slow)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32((high - low) or 0.001)
    keep = 1 - np.clip(ramp, 0, 1)
    return (inv_freq / np.float32(factor) * (1 - keep) + inv_freq * keep).astype(np.float32), float(attention)


def _longrope(inv_freq: np.ndarray, p: Mapping[str, Any], dim: int, theta: float) -> tuple[np.ndarray, float]:
    """LongRoPE (arXiv 2402.13753): a factor for each frequency, and one on cos and sin."""
    name, context = "long_factor" if p["long"] else "short_factor", float(p["original_max_position_embeddings"])
    each = np.asarray(p[name], np.float32)
    if each.shape != inv_freq.shape:
        raise WasatError(f"{name} has {each.size} numbers, of {len(inv_freq)} frequencies")
    attention, factor = p.get("attention_factor"), float(p["factor"])
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    return (np.float32(1) / (each / inv_freq)).astype(np.float32), float(attention)


_SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor"),
}  # fmt: skip
SCALINGS = ("default", *_SCALINGS)
"""Values of ``rope_type`` that :class:`RoPE` knows."""


class RoPE(Module):
    """Rotates the first ``fraction`` of each head by position: ``x[b, s, h, d]``, positions i64 ``[s]`` or ``[b, s]``.

    ``scaling`` is a Hugging Face ``rope_parameters`` dictionary: ``rope_type`` default, linear, llama3, yarn or longrope, with
    its numbers. Of longrope the short factors are used, which hold up to the original context, or for a ``context`` beyond it
    the long ones. ``interleaved``: pairs are neighbours, ``(2i, 2i + 1)``.
    """

    def __init__(
        self, head_dim: int, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None, fraction: float = 1.0,
        interleaved: bool = False, context: int | None = None,
    ) -> None:  # fmt: skip
        self.interleaved = interleaved
        dim = int(head_dim * fraction)
        if dim < 2 or dim % 2:
            raise WasatError(f"RoPE rotates pairs of elements: {dim} of {head_dim} is not an even number of them")
        self.inv_freq, self.factor = frequencies(dim, theta), 1.0
        kind = (scaling or {}).get("rope_type", "default")
        self.holds: int | None = None
        """Positions for which the frequencies are meant; None: any."""
        if scaling is not None and kind != "default":
            if kind not in _SCALINGS:
                raise WasatError(f"rope_type {kind!r} is not implemented; there are {', '.join(SCALINGS)}")
            missing = [k for k in _NEEDED[kind] if scaling.get(k) is None]
            if missing:
                raise WasatError(f"rope_type {kind!r} needs {', '.join(missing)}")
            if kind == "longrope":
                first = int(scaling["original_max_position_embeddings"])
                long = context is not None and context > first
                if long and scaling.get("long_factor") is None:
                    raise WasatError(f"rope_type {kind!r} needs long_factor for a context of more than {first}")
                scaling, self.holds = {**scaling, "long": long}, None if long else first
            self.inv_freq, self.factor = _SCALINGS[kind](self.inv_freq, scaling, dim, theta)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        return rope(x, positions, self.inv_freq, self.factor, self.interleaved)


def rope(
    x: Tensor, positions: Tensor, inv_freq: np.ndarray | float = 10000.0, factor: float = 1.0, interleaved: bool = False
) -> Tensor:
    """``x * cos + rotate_half(x) * sin`` with angles ``positions * inv_freq``; ``x[b, s, h, d]``, positions ``[s]``
    or ``[b, s]``.

    ``inv_freq`` (radians per position, one per pair ``(i, i + r/2)``) rotates the first ``r = 2 * len(inv_freq)``
    elements; a number is the base theta over the whole head. ``factor`` multiplies cos and sin. ``interleaved``: pairs are
    ``(2i, 2i + 1)``.
    """
    if x.rank != 4:
        fail(f"nn.rope: x is [b, s, heads, d], not {x.value!r}; x.heads(n) makes heads")
    if positions.dtype not in (DType.I64, DType.I32) or positions.rank not in (1, 2):
        fail(f"nn.rope: positions are i64 [s] or [b, s], not {positions.value!r}; nn.positions(x) counts from 0")
    if not isinstance(inv_freq, np.ndarray):
        width = x.shape[-1]
        if not isinstance(width, int):
            fail(f"nn.rope: the head size of {x.value!r} must be a number, or give inv_freq")
        inv_freq = frequencies(width, float(inv_freq))
    half = len(inv_freq)
    if less_equal(2 * half, x.shape[-1]) is False:
        fail(f"nn.rope: {2 * half} elements of each head rotate, {x.value!r} has {x.shape[-1]}")
    angles = positions[..., None].cast(DType.F32) * inv_freq.astype(np.float32)
    if interleaved:
        angles = stack([angles, angles], -1).reshape(*positions.shape, 2 * half)
    else:
        angles = concat([angles, angles])
    angles = angles[..., None, :]
    c, s = cos(angles), sin(angles)
    if factor != 1.0:
        c, s = c * factor, s * factor
    c, s = c.cast(x.dtype), s.cast(x.dtype)
    turned = x[..., : 2 * half]
    if interleaved:
        rotated = stack([-turned[..., 1::2], turned[..., ::2]], -1).reshape(*turned.shape)
    else:
        rotated = concat([-turned[..., half:], turned[..., :half]])
    out = turned * c + rotated * s
    return out if x.shape[-1] == 2 * half else concat([out, x[..., 2 * half :]])


class RoPE2D(Module):
    """Rotary positions of a grid that is read row by row, ``width`` to a row: ``x[b, s, h, d]``, positions i64 ``[s]``.

    Half of each head turns with the row and half with the column (axial RoPE, arXiv:2403.13298).
    """

    def __init__(self, head_dim: int, width: int, theta: float = 100.0) -> None:
        if head_dim % 4 or width < 1:
            raise WasatError(f"RoPE2D: heads of a multiple of 4 and a width of at least 1, not {head_dim} and {width}")
        self.width, self.inv_freq = width, frequencies(head_dim // 2, theta)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        upper, lower = x.split(2)
        return concat([rope(upper, positions // self.width, self.inv_freq), rope(lower, positions % self.width, self.inv_freq)])


def sinusoid(times: Tensor, dim: int, shortest: float = 0.25, longest: float = 1024.0) -> Tensor:
    """Sines and cosines of times: f32 ``[...]`` in seconds -> ``[..., dim]`` (arXiv:1706.03762, over real time).

    Feature i and i + dim/2 are sine and cosine of a wave whose period, in seconds, goes in equal ratios from ``shortest`` to
    ``longest``.
    """
    if dim < 4 or dim % 2:
        fail(f"nn.sinusoid: dim is {dim}; sines and cosines of two periods or more need an even number from 4 on")
    periods = np.geomspace(shortest, longest, dim // 2)
    angles = times[..., None] * (2 * math.pi / periods).astype(np.float32)
    return concat([sin(angles), cos(angles)])
