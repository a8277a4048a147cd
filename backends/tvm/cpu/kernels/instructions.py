"""The instructions of one processor family that kernels name: all else is arithmetic that LLVM compiles for any.

A table of them belongs to an :class:`~.isa.Isa`; another spelling of the same meaning is another table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .emit import Expr, bit_width, bits, intrinsic, splat_int, vector


def _none(*operands: Expr) -> Expr:
    raise NotImplementedError("no kernel for this instruction set asks for it")


@dataclass(frozen=True)
class Instructions:
    """Sums of products of bytes, over vectors of one width."""

    vpdpbusd: Callable[[Expr, Expr, Expr], Expr]
    """(int32 sums, u8 a, s8 b): four products added to each sum."""
    pmaddubsw: Callable[[Expr, Expr], Expr] = _none
    """(u8 a, s8 b): sums of two products as int16, which saturate."""
    pmaddwd: Callable[[Expr, Expr], Expr] = _none
    """(int16 a, int16 b): sums of two products as int32."""
    psignb: Callable[[Expr, Expr], Expr] = _none
    """(s8 a, s8 b): a with its sign changed where b is negative, 0 where b is 0."""


def _vpdpbusd(sums: Expr, a: Expr, b: Expr) -> Expr:
    width = bit_width(a)
    return intrinsic(vector("int32", width // 32), f"llvm.x86.avx512.vpdpbusd.{width}", sums, a, b)


def _avx2(dtype: str, name: str) -> Callable[..., Any]:
    return partial(intrinsic, dtype, f"llvm.x86.avx2.{name}")


X86 = Instructions(
    _vpdpbusd, _avx2("int16x16", "pmadd.ub.sw"), _avx2("int32x8", "pmadd.wd"), _avx2("int8x32", "psign.b"),
)  # fmt: skip


def _usdot(sums: Expr, a: Expr, b: Expr) -> Expr:
    return intrinsic("int32x4", "llvm.aarch64.neon.usdot", sums, a, b)


def _sdot(sums: Expr, a: Expr, b: Expr) -> Expr:
    """Bytes a are those of a - 128 with the highest bit turned, and 128 * b are taken as -128 * b from the sums: of the same
    row and group of numbers for both halves of a panel."""
    dot = partial(intrinsic, "int32x4", "llvm.aarch64.neon.sdot")
    signed = bits("int8x16", a ^ splat_int(128, 16, "uint8"))
    return dot(sums, signed, b) - dot(splat_int(0, 4), splat_int(-128, 16, "int8"), b)


ARM_DOTPROD = Instructions(_sdot)
ARM_I8MM = Instructions(_usdot)
