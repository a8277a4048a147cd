"""Rows of activations as int8 in blocks of 32, ready for the integer kernels.

The result is one tensor ``int32[m, blocks, 10]``: eight words of four int8 values, the scale ``d`` (the bits of an
f32), and ``-8 * sum(q)``, which undoes the offset of the weights' unsigned form.
With ``amax = max(max|x|, LEAST_TOP)`` over a block: ``d = amax / 127``, ``q = round_half_even(x * (127 / amax))``.
Where a block holds a NaN or an infinity, ``d`` is NaN, and so is all that is computed from its row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from wasat.ir.ops.quant import LEAST_TOP

from .emit import (
    Buffer,
    Expr,
    Index,
    Kernel,
    absolute,
    bits,
    cast,
    int64,
    load,
    reduce_max_int,
    reduce_sum_int,
    round_even,
    splat,
    splat_int,
    symbol,
    vector,
)
from .isa import Isa
from .pack import BLOCK, padded

WORDS = 10
SCALE, CORRECTION = 8, 9
LEAST = int(np.float32(LEAST_TOP).view(np.int32))
"""The bits of LEAST_TOP."""
_INFINITY, _NAN = 0x7F800000, 0x7FC00000


@dataclass(frozen=True)
class QuantizeRows:
    """x f32[m, k] -> int32[m, ceil(k / 32), 10]."""

    isa: Isa
    k: int
    threads: int = 1

    @property
    def name(self) -> str:
        return f"quantize_rows_{self.k}"


def quantize_rows(desc: QuantizeRows) -> tirx.PrimFunc:
    """PrimFunc(x f32[m, k], out int32[m, blocks, 10])."""
    kernel = Kernel(desc.name)
    m = symbol("m")
    x = kernel.param("x", (m, desc.k), "float32")
    out = quantized_param(kernel, "out", m, desc.k)
    kernel.rows(desc.threads, m, desc.k * 2, lambda row: quantize_row(
        kernel, desc.isa, desc.k, out, row, lambda at, lanes: load(x, (row, at), lanes)))
    return kernel.build()


def quantized_param(kernel: Kernel, name: str, m: Index, k: int) -> Buffer:
    return kernel.param(name, (m, padded(k, BLOCK) // BLOCK, WORDS), "int32")


def quantize_row(kernel: Kernel, isa: Isa, k: int, out: Buffer, row: Expr,
                 read: Callable[[Expr, int], Expr]) -> None:
    """Quantize one row of which ``read(at, lanes)`` gives f32 elements."""
    lanes = isa.lanes
    count = BLOCK // lanes
    with kernel.loop(k // BLOCK) as block:
        _block(kernel, isa, out, row, block,
               [kernel.let(read(block * BLOCK + i * lanes, lanes)) for i in range(count)])
    if k % BLOCK:
        tail = kernel.scratch(BLOCK, "float32")
        for i in range(count):
            kernel.store(tail, i * lanes, splat(0.0, lanes))
        with kernel.loop(k % BLOCK) as j:
            kernel.store(tail, j, read(int64(k // BLOCK * BLOCK) + j, 1))
        _block(kernel, isa, out, row, int64(k // BLOCK),
               [kernel.let(load(tail, i * lanes, lanes)) for i in range(count)])


def _block(kernel: Kernel, isa: Isa, out: Buffer, row: Expr, block: Expr, values: list[Expr]) -> None:
    lanes = isa.lanes
    # magnitudes are ordered as their bits are, with infinity and then NaN as the largest: no NaN gets lost
    magnitudes = [bits(vector("int32", lanes), absolute(value)) for value in values]
    top = kernel.let(tirx.max(reduce_max_int(kernel.let(functools.reduce(tirx.max, magnitudes))), splat_int(LEAST, 1)))
    amax = kernel.let(bits("float32", top))
    inverse = kernel.let(splat(127.0, 1) / amax)
    total = splat_int(0, lanes)
    for i, value in enumerate(values):
        q = kernel.let(cast("int32", round_even(value * splat(inverse, lanes))))
        total = total + q
        words = bits(vector("int32", lanes // 4), cast("int8", q))
        kernel.store(out, (row, block, i * lanes // 4), words)
    scale = bits("int32", amax / splat(127.0, 1))
    kernel.store(out, (row, block, SCALE), tirx.Select(top >= splat_int(_INFINITY, 1), splat_int(_NAN, 1), scale))
    kernel.store(out, (row, block, CORRECTION), reduce_sum_int(kernel.let(total)) * splat_int(-8, 1))


def quantize_rows_reference(x: NDArray[np.float32]) -> NDArray[np.int32]:
    """The same in NumPy: f32[m, k] -> int32[m, blocks, 10]."""
    m, k = x.shape
    blocks = padded(k, BLOCK) // BLOCK
    rows = np.zeros((m, blocks * BLOCK), np.float32)
    rows[:, :k] = x
    grid = rows.reshape(m, blocks, BLOCK)
    amax = np.maximum(np.abs(grid).max(-1), np.float32(LEAST_TOP))
    with np.errstate(invalid="ignore"):
        inverse = np.float32(127) / amax
        q = np.nan_to_num(np.rint(grid * inverse[..., None]), nan=0).astype(np.int8)
        amax = np.where(np.isfinite(amax), amax, np.float32(np.nan))
    out = np.empty((m, blocks, WORDS), np.int32)
    out[..., :8] = q.view(np.int32)
    out[..., SCALE] = (amax / np.float32(127)).astype(np.float32).view(np.int32)
    out[..., CORRECTION] = -8 * q.astype(np.int32).sum(-1)
    return out
