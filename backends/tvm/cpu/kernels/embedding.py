"""Rows of a table packed for the linear kernels: tied embeddings are packed once."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from .blocks import Piece, format_of, in_blocks
from .emit import Expr, Kernel, bits, cast, f16_to_f32, floor_div, floor_mod, load, splat, splat_int, symbol, widen
from .isa import Isa
from .linear_float import Weights, packed_param
from .pack import BLOCK, padded


@dataclass(frozen=True)
class Embedding:
    """ids i64[m] -> table[ids] * scale, f32[m, k]; ``n`` rows, stored and packed like a linear's w[n, k]."""

    isa: Isa
    n: int
    k: int
    weights: Weights = "float32"
    scale: float = 1.0
    threads: int = 1

    @property
    def name(self) -> str:
        return f"embedding_{self.weights}_{self.n}x{self.k}"


def embedding(desc: Embedding) -> tirx.PrimFunc:
    """PrimFunc(ids i64[m], w packed, y f32[m, k]). Negative ids count from the end; ids outside -n..n-1 are clamped."""
    isa, k = desc.isa, desc.k
    kernel = Kernel(desc.name)
    m = symbol("m")
    ids = kernel.param("ids", (m,), "int64")
    quantized = desc.weights in ("int8", "int4")
    w = kernel.param("w", *packed_param(desc.weights, desc.n, k, isa))
    y = kernel.param("y", (m, k), "float32")
    scale = splat(desc.scale, 1)

    def row(at: Expr) -> None:
        given = kernel.let(load(ids, at))
        given = kernel.let(tirx.Select(given < 0, given + desc.n, given))
        token = kernel.let(tirx.max(tirx.min(given, tirx.IntImm("int64", desc.n - 1)), tirx.IntImm("int64", 0)))
        panel = kernel.let(floor_div(token, isa.columns))
        column = kernel.let(floor_mod(token, isa.columns))
        if in_blocks(desc.weights):
            with kernel.loop(k // BLOCK) as block:
                piece = Piece(kernel, format_of(desc.weights, isa), w, panel, block)
                with kernel.loop(BLOCK) as step:
                    kernel.store(y, (at, block * BLOCK + step), piece.element(column, step) * scale)
            return
        if not quantized:
            with kernel.loop(k) as j:
                kernel.store(y, (at, j), widen(load(w, (panel, j, column)), isa.native_f16) * scale)
            return
        with kernel.loop(padded(k, BLOCK) // BLOCK) as block:
            low = tirx.Cast("uint16", load(w, (panel, block, column * 2)))
            high = tirx.Cast("uint16", load(w, (panel, block, column * 2 + 1)))
            half = bits("float16", low | (high << tirx.IntImm("uint16", 8)))
            factor = kernel.let(f16_to_f32(half, isa.native_f16) * scale)
            steps = BLOCK if k % BLOCK == 0 else tirx.min(k - block * BLOCK, tirx.IntImm("int64", BLOCK))
            with kernel.loop(steps) as step:
                # group-major, four k side by side; int4 keeps the last sixteen k in the high nibbles
                if desc.weights == "int8":
                    index = isa.columns * 2 + (floor_div(step, 4) * isa.columns + column) * 4 + floor_mod(step, 4)
                    raw = cast("int32", load(w, (panel, block, index)))
                    value = (raw - splat_int(128, 1) if isa.dot == "vnni"
                             else (raw << splat_int(24, 1)) >> splat_int(24, 1))
                else:
                    inner = floor_mod(step, 16)
                    index = isa.columns * 2 + (floor_div(inner, 4) * isa.columns + column) * 4 + floor_mod(step, 4)
                    raw = cast("int32", load(w, (panel, block, index)))
                    shift = tirx.Cast("int32", floor_div(step, 16)) * splat_int(4, 1)
                    value = ((raw >> shift) & splat_int(15, 1)) - splat_int(8, 1)
                kernel.store(y, (at, block * BLOCK + step), cast("float32", value) * factor)

    kernel.rows(desc.threads, m, k * 4, row)
    return kernel.build()
