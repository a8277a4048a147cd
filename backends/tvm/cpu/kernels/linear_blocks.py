"""y = x @ w^T (+ bias) with weights in formats of blocks (see :mod:`.blocks`) and rows of x quantized to int8.

Of each group that shares a scale, or 32 steps of it, the dot product is of integers, and exact, less a zero point times the sum
of the row's integers; it is scaled by the weight's and the row's scale in f32, and an offset is added times that sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .blocks import Format, Piece, format_of
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
from .linear_float import Tile, by_panels, store_panel
from .pack import BLOCK, padded
from .quantize import CORRECTION, SCALE, quantized_param

Codes = Callable[[int, int], Expr]  # (group of four k, half of the panel) -> u8 codes
Numbers = list[list[Expr]]
Source = tuple[Codes, Numbers, "Numbers | None", "Numbers | None"]  # codes, scales, offsets, zero points
Sums = Callable[[int, int, int], Expr]  # (row, half, group that shares a scale) -> f32


@dataclass(frozen=True)
class LinearBlocks:
    """y[m, n] = dequantized(xq)[m, k] @ w[n, k]^T (+ bias[n]); ``weights`` names the scheme."""

    isa: Isa
    n: int
    k: int
    weights: str
    bias: bool = False
    threads: int = 1

    @property
    def name(self) -> str:
        return f"linear_{self.weights}x8_{self.n}x{self.k}{'_bias' if self.bias else ''}"


def linear_blocks(desc: LinearBlocks) -> tirx.PrimFunc:
    """PrimFunc(xq int32[m, pieces, 10], w u8[panels, blocks, bytes], [bias f32[padded n]], y f32[m, n])."""
    isa, n, lanes = desc.isa, desc.n, desc.isa.lanes
    panels = padded(n, isa.columns) // isa.columns
    kernel = Kernel(desc.name)
    m = symbol("m")
    x = quantized_param(kernel, "x", m, desc.k)
    w = kernel.param("w", format_of(desc.weights, isa).shape(n, desc.k), "uint8")
    bias = kernel.param("bias", (panels * isa.columns,), "float32") if desc.bias else None
    y = kernel.param("y", (m, n), "float32")

    def tile(rows: int, row: Expr, panel: Expr, source: Callable[[Expr], Source]) -> None:
        acc = register_tile(kernel, desc, x, bias, rows, row, panel, source)
        store_panel(kernel, acc, [row + i for i in range(rows)], y, panel, n, lanes)

    def vector_path(first: Expr, last: Expr) -> None:
        with kernel.range(first, last) as panel:
            tile(1, int64(0), panel, panel_source(kernel, desc, w, panel, None))

    def prepared(panel: Expr, memory: Any) -> Tile:
        source = panel_source(kernel, desc, w, panel, memory)
        return lambda rows, row: tile(rows, row, panel, source)

    return by_panels(kernel, desc, m, isa.int_tiles[1:], 65536, vector_path, lambda: panel_buffers(kernel, desc), prepared)


def register_tile(
    kernel: Kernel, desc: LinearBlocks, x: Buffer, bias: Buffer | None, rows: int, row: Expr, panel: Expr,
    source: Callable[[Expr], Source],
) -> Buffer:  # fmt: skip
    """``rows`` rows of x from ``row`` on by a panel: accumulators [rows, 2 vectors]."""
    isa, lanes = desc.isa, desc.isa.lanes
    f = format_of(desc.weights, isa)
    dot = {"vnni": _dot_vnni, "maddubs": _dot_maddubs, "float": _dot_float}[isa.dot]
    acc = kernel.registers(rows * 2, "float32", lanes)
    for v in range(2):
        first = splat(0.0, lanes) if bias is None else kernel.let(load(bias, panel * isa.columns + v * lanes, lanes))
        for i in range(rows):
            kernel.store(acc, (i * 2 + v) * lanes, first)
    with kernel.loop(desc.k // BLOCK) as at:
        codes, scales, offsets, zeros = source(at)
        dots, totals = dot(kernel, f, x, codes, rows, row, at)
        for i in range(rows):
            d = splat(bits("float32", load(x, (row + i, at, SCALE))), lanes)
            for v in range(2):
                place = (i * 2 + v) * lanes
                for h in range(f.scales):
                    sums = dots(i, v, h) if zeros is None else dots(i, v, h) - totals(i, v, h) * zeros[h][v]
                    kernel.store(acc, place, load(acc, place, lanes) + sums * (scales[h][v] * d))
                    if offsets is not None:
                        kernel.store(acc, place, load(acc, place, lanes) + totals(i, v, h) * (offsets[h][v] * d))
    return acc


def panel_buffers(kernel: Kernel, desc: LinearBlocks) -> tuple[Buffer, Buffer]:
    """Memory for an unpacked panel: its codes, a byte each [pieces, 8 groups, 2 halves, 4 * lanes], and its scales and offsets
    or zeros in f32."""
    pieces, columns = desc.k // BLOCK, desc.isa.columns
    codes = kernel.scratch(pieces * BLOCK * columns, "uint8")
    return codes, kernel.scratch(pieces * format_of(desc.weights, desc.isa).numbers * columns, "float32")


def panel_source(
    kernel: Kernel, desc: LinearBlocks, w: Buffer, panel: Expr, memory: tuple[Buffer, Buffer] | None
) -> Callable[[Expr], Source]:
    """What a panel has for 32 steps; unpacked into ``memory``, if there is any, else as it is read."""
    isa, lanes = desc.isa, desc.isa.lanes
    f = format_of(desc.weights, isa)
    if memory is None:

        def packed(at: Expr) -> Source:
            piece = Piece(kernel, f, w, panel, at)
            return piece.codes, piece.scales(), piece.offsets(), piece.zeros()

        return packed
    codes, floats = memory
    columns, numbers = isa.columns, f.numbers * isa.columns
    with kernel.loop(desc.k // BLOCK) as at:
        piece = Piece(kernel, f, w, panel, at)
        for group in range(8):
            for v in range(2):
                kernel.store(codes, (at * 16 + (group * 2 + v)) * (lanes * 4), piece.codes(group, v))
        for which, found in enumerate((piece.scales(), piece.zeros() if f.zeros else piece.offsets())):
            for h, halves in enumerate(found or ()):
                for v, x in enumerate(halves):
                    kernel.store(floats, at * numbers + (which * f.scales + h) * columns + v * lanes, x)

    def unpacked(at: Expr) -> Source:
        def number(which: int, h: int, v: int) -> Expr:
            return kernel.let(load(floats, at * numbers + (which * f.scales + h) * columns + v * lanes, lanes))

        def code(group: int, v: int) -> Expr:
            return load(codes, (at * 16 + (group * 2 + v)) * (lanes * 4), lanes * 4)

        scales, more = ([[number(which, h, v) for v in range(2)] for h in range(f.scales)] for which in range(2))
        return code, scales, more if f.offset else None, more if f.zeros else None

    return unpacked


def _groups(f: Format, h: int) -> range:
    """The groups of four k of a scale."""
    return range(h * 8 // f.scales, (h + 1) * 8 // f.scales)


def _row_sum(x: Buffer, row: Expr, at: Expr) -> Expr:
    """The sum of a row's 32 integers."""
    return splat_int(0, 1) - (load(x, (row, at, CORRECTION)) >> splat_int(3, 1))


def _dot_vnni(kernel: Kernel, f: Format, x: Buffer, codes: Codes, rows: int, row: Expr, at: Expr) -> tuple[Sums, Sums]:
    lanes, x86 = f.isa.lanes, f.isa.instructions
    byte = vector("int8", lanes * 4)
    dots = kernel.registers(rows * 2 * f.scales, "int32", lanes)
    totals = kernel.registers(rows * f.scales, "int32", lanes)
    ones = splat_int(1, lanes * 4, "uint8")

    def word(i: int, group: int) -> Expr:
        return kernel.let(bits(byte, splat(load(x, (row + i, at, group)), lanes)))

    for h in range(f.scales):
        for i in range(rows):
            total = splat(_row_sum(x, row + i, at), lanes) if f.scales == 1 else splat_int(0, lanes)
            for group in _groups(f, h) if f.scales > 1 else ():
                total = kernel.let(x86.vpdpbusd(total, ones, word(i, group)))
            kernel.store(totals, (i * f.scales + h) * lanes, total)
            for v in range(2):
                start = load(totals, (i * f.scales + h) * lanes, lanes) * splat_int(-f.zero, lanes)
                kernel.store(dots, ((i * 2 + v) * f.scales + h) * lanes, start)
        for group in _groups(f, h):
            columns = [kernel.let(codes(group, v)) for v in range(2)]
            for i in range(rows):
                q = word(i, group)
                for v in range(2):
                    place = ((i * 2 + v) * f.scales + h) * lanes
                    kernel.store(dots, place, x86.vpdpbusd(load(dots, place, lanes), columns[v], q))
    return (lambda i, v, h: cast("float32", load(dots, ((i * 2 + v) * f.scales + h) * lanes, lanes)),
            lambda i, v, h: cast("float32", load(totals, (i * f.scales + h) * lanes, lanes)))


def _dot_maddubs(kernel: Kernel, f: Format, x: Buffer, codes: Codes, rows: int, row: Expr, at: Expr) -> tuple[Sums, Sums]:
    """AVX2: u8 x s8 pairs to int16, as many as fit before they are widened. Codes of 8 bits are made signed."""
    lanes, x86 = f.isa.lanes, f.isa.instructions
    ones = splat_int(1, 16, "int16")
    most = f.high - f.low
    together = min(32767 // (2 * 127 * most), 8)  # groups whose products int16 holds
    dots = kernel.registers(rows * 2 * f.scales, "int32", lanes)
    totals = kernel.registers(rows * f.scales, "int32", lanes)
    short = kernel.registers(rows * 2, "int16", 16)

    def word(i: int, group: int) -> Expr:
        return kernel.let(bits("int8x32", splat(load(x, (row + i, at, group)), lanes)))

    for h in range(f.scales):
        for i in range(rows):
            if f.scales == 1:
                total = splat(_row_sum(x, row + i, at), lanes)
            else:
                pairs = None
                for group in _groups(f, h):
                    p = x86.pmaddubsw(splat_int(1, 32, "uint8"), word(i, group))
                    pairs = p if pairs is None else kernel.let(pairs + p)
                total = x86.pmaddwd(pairs, ones)
            kernel.store(totals, (i * f.scales + h) * lanes, total)
            for v in range(2):
                start = load(totals, (i * f.scales + h) * lanes, lanes) * splat_int(-f.zero if together else 0, lanes)
                kernel.store(dots, ((i * 2 + v) * f.scales + h) * lanes, start)
        groups = list(_groups(f, h))
        for first in range(0, len(groups), together or 1):
            for nth, group in enumerate(groups[first : first + (together or 1)]):
                columns = [kernel.let(codes(group, v)) for v in range(2)]
                for i in range(rows):
                    q = word(i, group)
                    for v in range(2):
                        place = (i * 2 + v) * 16
                        if together:
                            products = x86.pmaddubsw(columns[v], q)
                        else:  # |w| * (q with the sign of w): both fit
                            signed = kernel.let(bits("int8x32", columns[v] - splat_int(f.zero, 32, "uint8")))
                            products = x86.pmaddubsw(bits("uint8x32", x86.psignb(signed, signed)), x86.psignb(q, signed))
                        kernel.store(short, place, products if nth == 0 else load(short, place, 16) + products)
            for i in range(rows):
                for v in range(2):
                    place = ((i * 2 + v) * f.scales + h) * lanes
                    wide = x86.pmaddwd(load(short, (i * 2 + v) * 16, 16), ones)
                    kernel.store(dots, place, load(dots, place, lanes) + wide)
    return (lambda i, v, h: cast("float32", load(dots, ((i * 2 + v) * f.scales + h) * lanes, lanes)),
            lambda i, v, h: cast("float32", load(totals, (i * f.scales + h) * lanes, lanes)))


def _dot_float(kernel: Kernel, f: Format, x: Buffer, codes: Codes, rows: int, row: Expr, at: Expr) -> tuple[Sums, Sums]:
    """Any processor: the sums are below 2**24, so f32 arithmetic is exact."""
    lanes = f.isa.lanes
    dots = kernel.registers(rows * 2 * f.scales, "float32", lanes)
    totals = kernel.registers(rows * f.scales, "float32", lanes)
    for h in range(f.scales):
        for i in range(rows):
            kernel.store(totals, (i * f.scales + h) * lanes, splat(0.0, lanes))
            for v in range(2):
                kernel.store(dots, ((i * 2 + v) * f.scales + h) * lanes, splat(0.0, lanes))
        for group in _groups(f, h):
            raw = [kernel.let(bits(vector("int32", lanes), codes(group, v))) for v in range(2)]
            for t in range(4):
                stored = [(r >> splat_int(8 * t, lanes)) & splat_int(255, lanes) for r in raw]
                columns = [kernel.let(cast("float32", code - splat_int(f.zero, lanes))) for code in stored]
                for i in range(rows):
                    q = (load(x, (row + i, at, group)) << splat_int(24 - 8 * t, 1)) >> splat_int(24, 1)
                    value = kernel.let(splat(cast("float32", q), lanes))
                    place = (i * f.scales + h) * lanes
                    kernel.store(totals, place, load(totals, place, lanes) + value)
                    for v in range(2):
                        place = ((i * 2 + v) * f.scales + h) * lanes
                        kernel.store(dots, place, load(dots, place, lanes) + value * columns[v])
    return (lambda i, v, h: load(dots, ((i * 2 + v) * f.scales + h) * lanes, lanes),
            lambda i, v, h: load(totals, (i * f.scales + h) * lanes, lanes))
