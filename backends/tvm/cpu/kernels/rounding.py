"""Rounding rows to few bits, and turning them before: the arithmetic of :mod:`wasat.ir.ops.rounding`, to the bit."""

from __future__ import annotations

from tvm import tirx

from .emit import (
    Buffer,
    Expr,
    Kernel,
    absolute,
    bits,
    cast,
    floor_div,
    floor_mod,
    load,
    round_even,
    rounded,
    splat,
    splat_int,
)
from .isa import Isa
from .norm import for_vectors
from .pack import padded

_NAN = 0x7FC0
_INFINITY = 0x7F800000


def turn(kernel: Kernel, lanes: int, buffer: Buffer, start: Expr, width: int, block: int) -> None:
    """buffer[start .. start + width], f32, turned in place in blocks of ``block``; 1 leaves it."""
    if block == 1:
        return
    start, half = kernel.let(start), 1
    while half < block:
        step = lanes if half % lanes == 0 else 1
        with kernel.loop(width // 2 // step) as i:
            at = i * step
            first = kernel.let(start + floor_div(at, half) * (2 * half) + floor_mod(at, half))
            a, b = (kernel.let(load(buffer, x, step)) for x in (first, first + half))
            kernel.store(buffer, first, a + b)
            kernel.store(buffer, first + half, a - b)
        half *= 2
    for_vectors(kernel, width, lanes, lambda j, n: kernel.store(
        buffer, start + j, load(buffer, start + j, n) * splat(block**-0.5, n)))


def quantized_row(kernel: Kernel, isa: Isa, scheme: str, row: tuple[Buffer, Expr], size: int,
                  width: int, block: int) -> tuple[Buffer, Expr]:
    """The codes of a row of ``size`` elements, turned in blocks of ``block`` first, as i32[at least width], the rest of them 0;
    and its scale, the bits of a bf16 in a u16."""
    lanes, whole = isa.lanes, padded(max(size, width), 16)
    x, codes = kernel.scratch(whole, "float32"), kernel.scratch(whole, "int32")
    with kernel.loop(whole // lanes) as j:
        kernel.store(x, j * lanes, splat(0.0, lanes))
    for_vectors(kernel, size, lanes, lambda j, n: kernel.store(x, j, load(row[0], row[1] + j, n)))
    turn(kernel, lanes, x, tirx.IntImm("int64", 0), size, block)
    peak, lost = (kernel.registers(1, "float32", 1) for _ in range(2))
    for register in (peak, lost):
        kernel.store(register, 0, splat(0.0, 1))
    with kernel.loop(size) as j:  # the first of the largest, with its sign
        value = kernel.let(load(x, j))
        best = load(peak, 0)
        kernel.store(peak, 0, tirx.Select(absolute(value) > absolute(best), value, best))
        kernel.store(lost, 0, load(lost, 0) + (rounded(value) - value))  # NaN beside what is not finite
    low, high = (-127.0, 127.0) if scheme == "int8" else (-8.0, 7.0)
    top = absolute(load(peak, 0)) / rounded(splat(127.0, 1)) if scheme == "int8" else load(peak, 0) / splat(-8.0, 1)
    raw = kernel.let(bits("int32", kernel.let(top)))
    up = (raw + splat_int(0x7FFF, 1) + ((raw >> splat_int(16, 1)) & splat_int(1, 1))) >> splat_int(16, 1)
    finite = kernel.let(tirx.EQ(load(lost, 0), splat(0.0, 1)))
    scale = kernel.let(tirx.Select(finite, up & splat_int(0xFFFF, 1), splat_int(_NAN, 1)))
    wide = kernel.let(bits("float32", scale << splat_int(16, 1)))
    inverse = kernel.let(splat(1.0, 1) / wide)
    # 0 has none, nor what is too small to be divided by, nor NaN
    usable = absolute(inverse) < bits("float32", splat_int(_INFINITY, 1))
    inverse = kernel.let(tirx.Select(usable, inverse, splat(0.0, 1)))
    kept = kernel.let(tirx.Select(finite, splat_int(-1, 1), splat_int(0, 1)))
    with kernel.loop(whole // lanes) as j:
        code = kernel.let(round_even(rounded(load(x, j * lanes, lanes) * splat(inverse, lanes))))
        code = tirx.Select(code > splat(low, lanes), code, splat(low, lanes))  # in this order, NaN is a number afterwards
        code = kernel.let(tirx.Select(code < splat(high, lanes), code, splat(high, lanes)))
        kernel.store(codes, j * lanes, cast("int32", code) & splat_int(kept, lanes))
    return codes, tirx.Cast("uint16", scale)


def store_scale(kernel: Kernel, buffer: Buffer, at: Expr, scale: Expr) -> None:
    """The two bytes of a scale, in a buffer of i8."""
    kernel.store(buffer, at, bits("int8x2", scale))


def load_scales(buffer: Buffer, at: Expr, lanes: int) -> Expr:
    """``lanes`` scales, f32, from the byte ``at`` on."""
    raw = bits(f"uint16x{lanes}", load(buffer, at, 2 * lanes))
    return bits(f"float32x{lanes}", cast("int32", raw) << splat_int(16, lanes))


def load_codes(buffer: Buffer, at: Expr, lanes: int) -> Expr:
    """``lanes`` codes of eight bits, f32."""
    return cast("float32", cast("int32", load(buffer, at, lanes)))


def load_pairs(kernel: Kernel, buffer: Buffer, at: Expr, lanes: int) -> tuple[Expr, Expr]:
    """The low and the high codes of ``lanes`` bytes, f32."""
    raw = kernel.let(cast("int32", load(buffer, at, lanes)))
    low = (raw << splat_int(28, lanes)) >> splat_int(28, lanes)
    return cast("float32", low), cast("float32", raw >> splat_int(4, lanes))
