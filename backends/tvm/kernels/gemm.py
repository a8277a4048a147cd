"""y = a @ b over row-major f32 matrices of known sizes, either of them perhaps transposed: the products of a training step.

Panels of b are copied to the order of packed weights as they are needed, then multiplied as :mod:`.linear_float` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvm import tirx

from .emit import Buffer, Expr, Kernel, ceil_div, floor_div, floor_mod, int64, load, minimum, splat
from .isa import Isa
from .linear_float import for_tiles, store_panel
from .pack import padded

_CHUNK = 960  # rows of a that a copied panel is applied to; a multiple of every tile


@dataclass(frozen=True)
class Gemm:
    """y[m, n] = a[m, k] @ b[k, n]; ``transposed`` names the operand that is stored the other way, a[k, m] or b[n, k]."""

    isa: Isa
    m: int
    n: int
    k: int
    transposed: Literal["", "a", "b"] = ""
    threads: int = 1

    @property
    def name(self) -> str:
        return f"gemm{self.transposed and '_t' + self.transposed}_{self.m}x{self.n}x{self.k}"


def gemm(desc: Gemm) -> tirx.PrimFunc:
    """PrimFunc(a f32, b f32, y f32[m, n]); m is at least 2."""
    isa, m, n, k, lanes = desc.isa, desc.m, desc.n, desc.k, desc.isa.lanes
    kernel = Kernel(desc.name)
    a = kernel.param("a", (k, m) if desc.transposed == "a" else (m, k), "float32")
    b = kernel.param("b", (n, k) if desc.transposed == "b" else (k, n), "float32")
    y = kernel.param("y", (m, n), "float32")
    panels, chunk = padded(n, isa.columns) // isa.columns, min(m, _CHUNK)

    def copy(panel: Expr, to: Buffer, columns: int) -> None:
        """The first ``columns`` of a panel of b as [k, isa.columns]; what is computed of the rest is dropped."""
        first = panel * isa.columns
        with kernel.loop(k) as kk:
            at = kk * isa.columns
            if desc.transposed == "b":
                for j in range(columns):
                    kernel.store(to, at + j, load(b, (first + j, kk)))
                return
            whole = columns // lanes
            for v in range(whole):
                kernel.store(to, at + v * lanes, load(b, (kk, first + v * lanes), lanes))
            for j in range(whole * lanes, columns):
                kernel.store(to, at + j, load(b, (kk, first + j)))

    def tile(rows: int, row: Expr, panel: Expr, source: Buffer) -> None:
        acc = kernel.registers(rows * 2, "float32", lanes)
        for i in range(rows * 2):
            kernel.store(acc, i * lanes, splat(0.0, lanes))
        with kernel.loop(k) as kk:
            columns = [kernel.let(load(source, kk * isa.columns + v * lanes, lanes)) for v in range(2)]
            for i in range(rows):
                value = splat(load(a, (kk, row + i) if desc.transposed == "a" else (row + i, kk)), lanes)
                for v in range(2):
                    at = (i * 2 + v) * lanes
                    kernel.store(acc, at, load(acc, at, lanes) + value * columns[v])
        store_panel(kernel, acc, rows, y, row, panel, n, lanes)

    def part(first: Expr, last: Expr) -> None:
        source = kernel.scratch(k * isa.columns, "float32")
        cut = n % isa.columns
        with kernel.range(first, last) as unit:
            panel = kernel.let(floor_mod(unit, int64(panels)), "panel")
            low = kernel.let(floor_div(unit, int64(panels)) * chunk, "low")
            high = kernel.let(minimum(low + chunk, int64(m)), "high")
            if cut:
                with kernel.loop(k * isa.columns // lanes) as i:
                    kernel.store(source, i * lanes, splat(0.0, lanes))
                whole = panel < n // isa.columns
                kernel.either(whole, lambda: copy(panel, source, isa.columns), lambda: copy(panel, source, cut))
            else:
                copy(panel, source, isa.columns)
            for_tiles(kernel, isa.tiles[1:], low, high, lambda rows, row: tile(rows, row, panel, source))

    kernel.share(1 if m * n * k < 32768 else desc.threads, ceil_div(int64(m), chunk) * panels, part)
    return kernel.build()
