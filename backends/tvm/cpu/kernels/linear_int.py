"""y = x @ w^T (+ bias) with int8 or int4 weights and rows of x quantized to int8 (see :mod:`quantize`).

Each block of 32 steps of k is an exact integer dot product, scaled by the weight's and the row's scale in f32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tvm import tirx

from .emit import (
    Buffer,
    Expr,
    Kernel,
    bits,
    cast,
    int64,
    load,
    splat,
    splat_int,
    symbol,
    vector,
)
from .isa import Isa
from .linear_float import Tile, block_scales, by_panels, byte_of, store_panel
from .pack import BLOCK, int_shape, padded
from .quantize import CORRECTION, SCALE, quantized_param

Weights = Literal["int8", "int4"]
Source = Callable[[Expr, int, int], Expr]  # (block, group of four k, half of the panel) -> bytes


@dataclass(frozen=True)
class LinearInt:
    """y[m, n] = dequantized(xq)[m, k] @ w[n, k]^T (+ bias[n])."""

    isa: Isa
    n: int
    k: int
    weights: Weights = "int8"
    bias: bool = False
    threads: int = 1

    @property
    def bits(self) -> int:
        return 4 if self.weights == "int4" else 8

    @property
    def name(self) -> str:
        return f"linear_{self.weights}x8_{self.n}x{self.k}{'_bias' if self.bias else ''}"


def linear_int(desc: LinearInt) -> tirx.PrimFunc:
    """PrimFunc(xq int32[m, blocks, 10], w u8[panels, blocks, bytes], [bias f32[padded n]], y f32[m, n])."""
    isa, n = desc.isa, desc.n
    panels = padded(n, isa.columns) // isa.columns
    kernel = Kernel(desc.name)
    m = symbol("m")
    x = quantized_param(kernel, "x", m, desc.k)
    w = kernel.param("w", int_shape(n, desc.k, desc.bits, isa), "uint8")
    bias = kernel.param("bias", (panels * isa.columns,), "float32") if desc.bias else None
    y = kernel.param("y", (m, n), "float32")

    def tile(rows: int, row: Expr, panel: Expr, unpacked: Buffer | None) -> None:
        acc = register_tile(kernel, desc, x, w, bias, rows, row, panel, unpacked)
        store_panel(kernel, acc, [row + i for i in range(rows)], y, panel, n, isa.lanes)

    def vector_path(first: Expr, last: Expr) -> None:
        with kernel.range(first, last) as panel:
            tile(1, int64(0), panel, None)

    def prepared(panel: Expr, unpacked: Buffer | None) -> Tile:
        if unpacked is not None:
            unpack(kernel, desc, w, panel, unpacked)
        return lambda rows, row: tile(rows, row, panel, unpacked)

    return by_panels(kernel, desc, m, isa.int_tiles[1:], 65536, vector_path, lambda: panel_buffer(kernel, desc), prepared)


def register_tile(
    kernel: Kernel, desc: LinearInt, x: Buffer, w: Buffer, bias: Buffer | None, rows: int, row: Expr, panel: Expr,
    unpacked: Buffer | None,
) -> Buffer:  # fmt: skip
    """``rows`` rows of x from ``row`` on by a panel: accumulators [rows, 2 vectors]."""
    isa, lanes = desc.isa, desc.isa.lanes
    dot = {"vnni": _dot_vnni, "maddubs": _dot_maddubs, "float": _dot_float}[isa.dot]
    acc = kernel.registers(rows * 2, "float32", lanes)
    for v in range(2):
        first = splat(0.0, lanes) if bias is None else kernel.let(load(bias, panel * isa.columns + v * lanes, lanes))
        for i in range(rows):
            kernel.store(acc, (i * 2 + v) * lanes, first)
    with kernel.loop(padded(desc.k, BLOCK) // BLOCK) as block:
        sums = dot(kernel, desc, x, w, unpacked, rows, row, panel, block)
        scales = block_scales(kernel, isa, w, panel, block)
        for i in range(rows):
            d = splat(bits("float32", load(x, (row + i, block, SCALE))), lanes)
            for v in range(2):
                at = (i * 2 + v) * lanes
                kernel.store(acc, at, load(acc, at, lanes) + sums(i, v) * (scales[v] * d))
    return acc


def panel_buffer(kernel: Kernel, desc: LinearInt) -> Buffer | None:
    """Memory for a panel of nibbles as bytes; None where they are read as they are."""
    if desc.weights != "int4" or desc.isa.dot == "float":
        return None
    return kernel.scratch(padded(desc.k, BLOCK) * desc.isa.columns, "uint8")


def _nibbles(desc: LinearInt, w: Buffer, panel: Expr, block: Expr, group: Expr | int, v: int) -> tuple[Expr, Expr]:
    """Bytes of the k-groups ``group`` and ``group + 4``."""
    lanes = desc.isa.lanes * 4
    at = desc.isa.columns * 2 + (group * 2 + v) * lanes
    raw = load(w, (panel, block, at), lanes)
    mask = splat_int(15, lanes, "uint8")
    return raw & mask, (raw >> splat_int(4, lanes, "uint8"))


def unpack(kernel: Kernel, desc: LinearInt, w: Buffer, panel: Expr, out: Buffer) -> None:
    """A panel of nibbles as bytes [blocks, 8 groups, 2 halves, 4 * lanes]."""
    lanes = desc.isa.lanes * 4
    with kernel.loop(padded(desc.k, BLOCK) // BLOCK) as block:
        for group in range(4):
            for v in range(2):
                low, high = _nibbles(desc, w, panel, block, group, v)
                at = (block * 16 + group * 2 + v) * lanes
                kernel.store(out, at, low)
                kernel.store(out, at + 8 * lanes, high)


def _each_group(kernel: Kernel, desc: LinearInt, w: Buffer, unpacked: Buffer | None, panel: Expr, block: Expr,
                add: Callable[[Expr | int, list[Expr]], None]) -> None:
    """``add(group, [bytes of the left half, of the right half])`` for the eight groups of four k."""
    lanes = desc.isa.lanes * 4
    if desc.weights == "int4" and unpacked is None:
        for group in range(4):
            pairs = [_nibbles(desc, w, panel, block, group, v) for v in range(2)]
            for high in range(2):
                add(group + 4 * high, [kernel.let(pair[high]) for pair in pairs])
        return
    with kernel.loop(8) as group:
        if unpacked is not None:
            add(group, [kernel.let(load(unpacked, (block * 16 + group * 2 + v) * lanes, lanes)) for v in range(2)])
        else:
            base = desc.isa.columns * 2
            add(group, [kernel.let(load(w, (panel, block, base + (group * 2 + v) * lanes), lanes)) for v in range(2)])


def _dot_vnni(kernel: Kernel, desc: LinearInt, x: Buffer, w: Buffer, unpacked: Buffer | None, rows: int, row: Expr,
              panel: Expr, block: Expr) -> Callable[[int, int], Expr]:
    lanes = desc.isa.lanes
    sums = kernel.registers(rows * 2, "int32", lanes)
    for i in range(rows):
        correction = load(x, (row + i, block, CORRECTION))
        if desc.weights == "int8":
            correction = correction << splat_int(4, 1)  # the offset is 128, not 8
        start = kernel.let(splat(correction, lanes))
        for v in range(2):
            kernel.store(sums, (i * 2 + v) * lanes, start)
    byte = vector("int8", lanes * 4)

    def add(group: Expr | int, columns: list[Expr]) -> None:
        for i in range(rows):
            q = kernel.let(bits(byte, splat(load(x, (row + i, block, group)), lanes)))
            for v in range(2):
                at = (i * 2 + v) * lanes
                kernel.store(sums, at, desc.isa.instructions.vpdpbusd(load(sums, at, lanes), columns[v], q))

    _each_group(kernel, desc, w, unpacked, panel, block, add)
    return lambda i, v: cast("float32", load(sums, (i * 2 + v) * lanes, lanes))


def _dot_maddubs(kernel: Kernel, desc: LinearInt, x: Buffer, w: Buffer, unpacked: Buffer | None, rows: int, row: Expr,
                 panel: Expr, block: Expr) -> Callable[[int, int], Expr]:
    """AVX2: u8 x s8 pairs to int16. Eight products with 4-bit weights fit; 8-bit weights are widened every time."""
    lanes, x86 = desc.isa.lanes, desc.isa.instructions
    ones = splat_int(1, 16, "int16")
    four = desc.weights == "int4"
    sums = kernel.registers(rows * 2, "int16" if four else "int32", 16 if four else 8)
    step = 16 if four else 8
    for at in range(rows * 2):
        kernel.store(sums, at * step, splat_int(0, step, "int16" if four else "int32"))

    def add(group: Expr | int, columns: list[Expr]) -> None:
        for i in range(rows):
            q = kernel.let(bits("int8x32", splat(load(x, (row + i, block, group)), lanes)))
            for v in range(2):
                at = (i * 2 + v) * step
                if four:
                    products = x86.pmaddubsw(columns[v], q)
                else:  # |w| * (q with the sign of w): both fit
                    signed = bits("int8x32", columns[v])
                    pairs = x86.pmaddubsw(x86.psignb(signed, signed), x86.psignb(q, signed))
                    products = x86.pmaddwd(pairs, ones)
                kernel.store(sums, at, load(sums, at, step) + products)

    _each_group(kernel, desc, w, unpacked, panel, block, add)

    def result(i: int, v: int) -> Expr:
        at = (i * 2 + v) * step
        if not four:
            return cast("float32", load(sums, at, lanes))
        wide = x86.pmaddwd(load(sums, at, 16), ones)
        return cast("float32", wide + splat(load(x, (row + i, block, CORRECTION)), lanes))

    return result


def _dot_float(kernel: Kernel, desc: LinearInt, x: Buffer, w: Buffer, unpacked: Buffer | None, rows: int, row: Expr,
               panel: Expr, block: Expr) -> Callable[[int, int], Expr]:
    """Any processor: the block's sum is below 2**24, so f32 arithmetic is exact."""
    lanes, columns = desc.isa.lanes, desc.isa.columns
    sums = kernel.registers(rows * 2, "float32", lanes)
    for at in range(rows * 2):
        kernel.store(sums, at * lanes, splat(0.0, lanes))
    nibbles = desc.weights == "int4"
    with kernel.loop(4 if nibbles else 8) as group:
        raw = [kernel.let(bits(vector("int32", lanes),
                               load(w, (panel, block, columns * 2 + (group * 2 + v) * lanes * 4), lanes * 4)))
               for v in range(2)]
        for high in range(2 if nibbles else 1):
            words = [kernel.let(load(x, (row + i, block, group + 4 * high))) for i in range(rows)]
            for t in range(4):
                column = [kernel.let(cast("float32", byte_of(raw[v], t, high, desc.weights, desc.isa)))
                          for v in range(2)]
                for i in range(rows):
                    q = (words[i] << splat_int(24 - 8 * t, 1)) >> splat_int(24, 1)
                    value = kernel.let(splat(tirx.Cast("float32", q), lanes))
                    for v in range(2):
                        at = (i * 2 + v) * lanes
                        kernel.store(sums, at, load(sums, at, lanes) + value * column[v])
    return lambda i, v: load(sums, (i * 2 + v) * lanes, lanes)
