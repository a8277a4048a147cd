"""A kernel's machine instructions as plain vector arithmetic, which LLVM compiles for any processor.

What a kernel does around them (shapes, tails, packing) is so tested on a machine that lacks them.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from wasat.backends.tvm.cpu.kernels.emit import bit_width, bits, splat_int, vector
from wasat.backends.tvm.cpu.kernels.instructions import Instructions

Expr = Any


def _words(value: Expr) -> Expr:
    """The bits as lanes of 32."""
    return bits(vector("int32", bit_width(value) // 32), value)


def _signed(words: Expr, low: int, size: int) -> Expr:
    """The bits low..low + size of each word, sign-extended."""
    lanes = bit_width(words) // 32
    return (words << splat_int(32 - size - low, lanes)) >> splat_int(32 - size, lanes)


def _unsigned(words: Expr, low: int) -> Expr:
    """The byte from bit ``low`` on of each word."""
    lanes = bit_width(words) // 32
    return (words >> splat_int(low, lanes)) & splat_int(255, lanes)


def vpdpbusd(total: Expr, a: Expr, b: Expr) -> Expr:
    """Four u8 x s8 products, added to each int32."""
    a, b = _words(a), _words(b)
    for low in range(0, 32, 8):
        total = total + _unsigned(a, low) * _signed(b, low, 8)
    return total


def pmaddubsw(a: Expr, b: Expr) -> Expr:
    """Two u8 x s8 products each, as int16 that saturates."""
    a, b = _words(a), _words(b)
    lanes = bit_width(a) // 32

    def pair(low: int) -> Expr:
        total = _unsigned(a, low) * _signed(b, low, 8) + _unsigned(a, low + 8) * _signed(b, low + 8, 8)
        return tirx.max(splat_int(-32768, lanes), tirx.min(splat_int(32767, lanes), total))

    halves = (pair(0) & splat_int(0xFFFF, lanes)) | (pair(16) << splat_int(16, lanes))
    return bits(vector("int16", 2 * lanes), halves)


def pmaddwd(a: Expr, b: Expr) -> Expr:
    """Two s16 x s16 products each, as int32."""
    a, b = _words(a), _words(b)
    return _signed(a, 0, 16) * _signed(b, 0, 16) + _signed(a, 16, 16) * _signed(b, 16, 16)


def psignb(a: Expr, b: Expr) -> Expr:
    """a, -a or 0, as b is positive, negative or 0."""
    zero = splat_int(0, bit_width(a) // 8, "int8")
    return tirx.Select(b < zero, zero - a, tirx.Select(b > zero, a, zero))


SOFT = Instructions(vpdpbusd, pmaddubsw, pmaddwd, psignb)
