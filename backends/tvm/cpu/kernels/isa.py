"""Instruction sets that the kernels are generated for.

A kernel never asks which processor it is for: it asks its :class:`Isa` how wide a vector is, how many rows fit the
registers, and how bytes are multiplied. A new processor is a new value here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import tvm
from tvm.target import codegen

from .instructions import ARM_DOTPROD, ARM_I8MM, X86, Instructions

Dot = Literal["vnni", "maddubs", "float"]


@dataclass(frozen=True)
class Isa:
    """What a kernel must know of a processor.

    ``lanes``: f32 values per vector. ``rows``: rows of a float register tile (two vectors wide).
    ``int_rows``: rows of an integer register tile. ``dot``: how u8 x s8 products are summed: ``vnni`` (four at once),
    ``maddubs`` (AVX2) or ``float`` (exact in f32, any processor). ``native_f16``: f16 <-> f32 conversion is one
    instruction (otherwise it is spelt out in integer arithmetic and needs no runtime library). ``instructions``: what
    ``vnni`` and ``maddubs`` are made of.
    """

    name: str
    lanes: int
    rows: int
    int_rows: int
    dot: Dot
    native_f16: bool = True
    instructions: Instructions = X86

    @property
    def columns(self) -> int:
        """Outputs per panel of packed weights: two vectors."""
        return 2 * self.lanes

    @property
    def tiles(self) -> tuple[int, ...]:
        """Row counts of the float register tiles, small to large."""
        return (1, 2, 4, self.rows) if self.rows > 6 else (1, 2, self.rows)

    @property
    def int_tiles(self) -> tuple[int, ...]:
        """Row counts of the integer register tiles, small to large."""
        return (1, 2, self.int_rows)


AVX512_VNNI = Isa("avx512vnni", lanes=16, rows=12, int_rows=6, dot="vnni")
AVX_VNNI = Isa("avxvnni", lanes=8, rows=6, int_rows=4, dot="vnni")
AVX2 = Isa("avx2", lanes=8, rows=6, int_rows=4, dot="maddubs")
GENERIC = Isa("generic", lanes=4, rows=4, int_rows=4, dot="float", native_f16=False)
NEON = Isa("neon", lanes=4, rows=8, int_rows=4, dot="float")
NEON_DOTPROD = replace(NEON, name="neon-dotprod", int_rows=8, dot="vnni", instructions=ARM_DOTPROD)
NEON_I8MM = replace(NEON_DOTPROD, name="neon-i8mm", instructions=ARM_I8MM)

ISAS = {isa.name: isa for isa in (AVX512_VNNI, AVX_VNNI, AVX2, GENERIC, NEON, NEON_DOTPROD, NEON_I8MM)}


def isa_of(target: tvm.target.Target) -> Isa:
    """The best description of ``target`` (an ``llvm`` target with its real ``mcpu``/``mtriple``/``mattr``).

    AVX-512 without VNNI (Skylake-X) is treated as AVX2: its byte products need 256-bit ``vpsignb``.
    """

    def has(*features: str) -> bool:
        return bool(codegen.target_has_features(list(features), target))

    if target.kind.name != "llvm":
        raise ValueError(f"the CPU kernels need an llvm target, not {target.kind.name!r}")
    if has("avx512vnni", "avx512bw", "avx512vl"):
        return AVX512_VNNI
    if has("avx2", "fma", "f16c"):
        return AVX_VNNI if has("avxvnni") else AVX2
    if has("neon", "dotprod"):
        return NEON_I8MM if has("i8mm") else NEON_DOTPROD
    return NEON if has("neon") else GENERIC
