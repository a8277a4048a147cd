"""Packed weights: the one layout that decoding, prefill and the embedding lookup share (NumPy side).

Weights w[n, k] are cut into panels of ``isa.columns`` output rows (n padded with zeros).

- float: ``[panels, k, columns]`` of f32, f16, or bf16 (as the uint16 of its bits).
- int8 and int4: ``uint8[panels, blocks, bytes]``, a block being 32 steps of k (k padded with zero weights). The bytes
  of a block are the columns' f16 scales, then for every group of four k the columns' bytes, four k side by side.
  int4 keeps groups 0..3 in low nibbles and 4..7 in high ones, offset by 8. int8 is offset by 128 where the processor
  multiplies unsigned by signed bytes without saturation (VNNI), and signed elsewhere.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .isa import Isa

BLOCK = 32
Storage = Literal["float32", "float16", "bfloat16"]


def storage_dtype(storage: str) -> str:
    """Element type of the packed array."""
    return "uint16" if storage == "bfloat16" else storage


def padded(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple


def float_shape(n: int, k: int, isa: Isa) -> tuple[int, int, int]:
    """Shape of float weights w[n, k] once packed."""
    return padded(n, isa.columns) // isa.columns, k, isa.columns


def int_shape(n: int, k: int, bits: int, isa: Isa) -> tuple[int, int, int]:
    """Shape (of uint8) of int8 or int4 weights w[n, k] once packed."""
    return (padded(n, isa.columns) // isa.columns, padded(k, BLOCK) // BLOCK,
            isa.columns * 2 + isa.columns * BLOCK * bits // 8)


def pack_float(w: NDArray[Any], isa: Isa, dtype: Storage = "float32") -> NDArray[Any]:
    """w[n, k] -> dtype[panels, k, columns]; bfloat16 wants w in it already."""
    n, k = w.shape
    panels = padded(n, isa.columns) // isa.columns
    out = np.zeros((panels, k, isa.columns), storage_dtype(dtype))
    w = w.view(np.uint16) if dtype == "bfloat16" else w
    whole = n // isa.columns
    cut = whole * isa.columns
    out[:whole] = w[:cut].reshape(whole, isa.columns, k).transpose(0, 2, 1)
    if whole < panels:
        out[whole, :, : n - cut] = w[cut:].T
    return out


def pack_bias(bias: NDArray[np.floating], isa: Isa) -> NDArray[np.float32]:
    """bias[n] -> f32[n padded to whole panels]."""
    out = np.zeros(padded(len(bias), isa.columns), np.float32)
    out[: len(bias)] = bias
    return out


def pack_int(values: NDArray[np.int8], scales: NDArray[np.float16], bits: int, isa: Isa) -> NDArray[np.uint8]:
    """values i8[n, k] (int8: -128..127, int4: -8..7) and scales f16[n, ceil(k / 32)] -> u8[panels, blocks, bytes]."""
    n, k = values.shape
    low, high = (-8, 7) if bits == 4 else (-128, 127)
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    blocks = padded(k, BLOCK) // BLOCK
    if scales.shape != (n, blocks):
        raise ValueError(f"scales must have shape {(n, blocks)} for values {values.shape}, not {scales.shape}")
    if values.size and (values.min() < low or values.max() > high):
        raise ValueError(f"int{bits} weights must lie in {low}..{high}; found {values.min()}..{values.max()}")
    panels, columns = padded(n, isa.columns) // isa.columns, isa.columns
    out = np.empty(int_shape(n, k, bits, isa), np.uint8)
    step = max(1, (1 << 22) // max(1, columns * k))
    for first in range(0, panels, step):  # by pieces: the temporaries of a large embedding would exceed its weights
        last = min(panels, first + step)
        rows = slice(first * columns, min(n, last * columns))
        part = np.zeros(((last - first) * columns, blocks * BLOCK), np.int8)
        part[: rows.stop - rows.start, :k] = values[rows]
        scale = np.zeros(((last - first) * columns, blocks), np.float16)
        scale[: rows.stop - rows.start] = scales[rows]
        # [panel, column, block, group, 4] -> [panel, block, group, column, 4]
        grid = part.reshape(last - first, columns, blocks, 8, 4).transpose(0, 2, 3, 1, 4)
        if bits == 4:
            unsigned = (grid + 8).astype(np.uint8)
            data = unsigned[:, :, :4] | (unsigned[:, :, 4:] << 4)
        elif isa.dot == "vnni":
            data = (grid.astype(np.int16) + 128).astype(np.uint8)
        else:
            data = grid.view(np.uint8)
        head = scale.reshape(last - first, columns, blocks).transpose(0, 2, 1)
        out[first:last, :, : columns * 2] = np.ascontiguousarray(head).view(np.uint8)
        out[first:last, :, columns * 2 :] = data.reshape(last - first, blocks, -1)
    return out
