"""y = x @ w^T (+ bias) over packed f32, f16, bf16 or dequantized int8/int4 weights, all arithmetic in f32.

One PrimFunc holds a matrix-vector path (one row: a panel is a stream from memory) and register-tiled paths for more
rows; the number of rows chooses at run time. Each output is one sum in the order of k on every path: a row gives the same bits
alone and among others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .blocks import Piece, format_of, in_blocks
from .emit import (
    Buffer,
    Expr,
    Kernel,
    cast,
    ceil_div,
    f16_to_f32,
    floor_div,
    floor_mod,
    int64,
    load,
    maximum,
    minimum,
    splat,
    splat_int,
    symbol,
    vector,
    widen,
)
from .emit import bits as reinterpret
from .isa import Isa
from .pack import BLOCK, float_shape, int_shape, padded, storage_dtype

Weights = str  # float32, float16, bfloat16, int8, int4, or a format of blocks
_CHUNK = 240  # rows of x that a panel is applied to before the next panel is fetched; a multiple of every tile


_STREAMS, _STEPS = 4, 8  # of the matrix-vector path: panels side by side, steps of k unrolled


@dataclass(frozen=True)
class Linear:
    """y[m, n] = x[m, k] @ w[n, k]^T (+ bias[n]); ``weights`` names the storage, see :mod:`pack`."""

    isa: Isa
    n: int
    k: int
    weights: Weights = "float32"
    bias: bool = False
    threads: int = 1

    @property
    def quantized(self) -> bool:
        return self.weights in ("int8", "int4") or in_blocks(self.weights)

    @property
    def name(self) -> str:
        return f"linear_{self.weights}_{self.n}x{self.k}{'_bias' if self.bias else ''}"


def packed_param(weights: Weights, n: int, k: int, isa: Isa) -> tuple[tuple[int, int, int], str]:
    """Shape and element type of w[n, k] once packed."""
    if in_blocks(weights):
        return format_of(weights, isa).shape(n, k), "uint8"
    if weights in ("int8", "int4"):
        return int_shape(n, k, int(weights[3:]), isa), "uint8"
    return float_shape(n, k, isa), storage_dtype(weights)


def linear(desc: Linear) -> tirx.PrimFunc:
    """PrimFunc(x f32[m, k], w packed, [bias f32[padded n]], y f32[m, n])."""
    isa, n, k, lanes = desc.isa, desc.n, desc.k, desc.isa.lanes
    kernel = Kernel(desc.name)
    m = symbol("m")
    x = kernel.param("x", (m, k), "float32")
    w = kernel.param("w", *packed_param(desc.weights, n, k, isa))
    bias = kernel.param("bias", (padded(n, isa.columns),), "float32") if desc.bias else None
    y = kernel.param("y", (m, n), "float32")

    def vector_path(first: Expr, last: Expr) -> None:
        vector_panels(kernel, desc, x, int64(0), w, bias, first, last, lambda acc, panel: store_panel(
            kernel, acc, [int64(0)], y, panel, n, lanes))

    def prepared(panel: Expr, panel_copy: Buffer | None) -> Tile:
        source = panel_source(kernel, desc, w, panel, panel_copy)

        def tile(rows: int, row: Expr) -> None:
            acc = register_tile(kernel, desc, x, bias, rows, row, panel, source)
            store_panel(kernel, acc, [row + i for i in range(rows)], y, panel, n, lanes)

        return tile

    return by_panels(kernel, desc, m, isa.tiles[1:], 32768, vector_path, lambda: panel_buffer(kernel, desc), prepared)


Tile = Callable[[int, Expr], None]
"""So many rows of x, from a row on, by a panel."""


def by_panels(
    kernel: Kernel, desc: Any, m: Expr, tiles: tuple[int, ...], small: int, vector_path: Callable[[Expr, Expr], None],
    memory: Callable[[], Any], prepared: Callable[[Expr, Any], Tile],
) -> tirx.PrimFunc:  # fmt: skip
    """Finishes a product of m rows: one row by ``vector_path``, from a panel to another, on one thread if the weight has fewer
    than ``small`` elements; more rows in chunks, each by each panel, which is ``prepared`` in a thread's ``memory``."""
    panels = padded(desc.n, desc.isa.columns) // desc.isa.columns

    def matrix_path(first: Expr, last: Expr) -> None:
        chunk = minimum(maximum(m, 1), _CHUNK)
        own = memory()
        with kernel.range(first, last) as unit:
            panel = kernel.let(floor_mod(unit, panels), "panel")
            low = kernel.let(floor_div(unit, panels) * chunk, "low")
            high = kernel.let(minimum(low + chunk, m), "high")
            for_tiles(kernel, tiles, low, high, prepared(panel, own))

    serial = desc.threads == 1 or desc.n * desc.k < small
    kernel.either(tirx.EQ(m, int64(1)),
                  lambda: kernel.share(1 if serial else desc.threads, panels, vector_path),
                  lambda: kernel.share(desc.threads, ceil_div(m, minimum(maximum(m, 1), _CHUNK)) * panels, matrix_path))
    return kernel.build()


def _start(kernel: Kernel, desc: Linear, acc: Buffer, bias: Buffer | None, rows: int, panel: Expr) -> None:
    lanes = desc.isa.lanes
    for v in range(2):
        at = panel * desc.isa.columns + v * lanes
        first = splat(0.0, lanes) if bias is None else kernel.let(load(bias, at, lanes))
        for i in range(rows):
            kernel.store(acc, (i * 2 + v) * lanes, first)


def register_tile(
    kernel: Kernel, desc: Linear, x: Buffer, bias: Buffer | None, rows: int, row: Expr, panel: Expr,
    source: Callable[[Expr, int], Expr],
) -> Buffer:  # fmt: skip
    """``rows`` rows of x [.., k] from ``row`` on by a panel: accumulators [rows, 2 vectors]."""
    lanes = desc.isa.lanes
    acc = kernel.registers(rows * 2, "float32", lanes)
    _start(kernel, desc, acc, bias, rows, panel)
    with kernel.loop(desc.k) as kk:
        columns = [kernel.let(source(kk, v)) for v in range(2)]
        for i in range(rows):
            value = splat(load(x, (row + i, kk)), lanes)
            for v in range(2):
                at = (i * 2 + v) * lanes
                kernel.store(acc, at, load(acc, at, lanes) + value * columns[v])
    return acc


def vector_panels(
    kernel: Kernel, desc: Linear, x: Buffer, row: Expr, w: Buffer, bias: Buffer | None, first: Expr, last: Expr,
    store: Callable[[Buffer, Expr], None],
) -> None:  # fmt: skip
    """One row of x by the panels first .. last: ``store(accumulators, panel)`` of each."""
    isa, k, lanes = desc.isa, desc.k, desc.isa.lanes

    def stream(panels: list[Expr]) -> None:
        """Several panels side by side, or each addition would wait for the one before."""
        accs = [kernel.registers(2, "float32", lanes) for _ in panels]
        for acc, panel in zip(accs, panels):
            _start(kernel, desc, acc, bias, 1, panel)

        def step(kk: Expr) -> None:
            value = splat(load(x, (row, kk)), lanes)
            for acc, panel in zip(accs, panels):
                for v in range(2):
                    column = widen(load(w, (panel, kk, v * lanes), lanes), isa.native_f16)
                    kernel.store(acc, v * lanes, load(acc, v * lanes, lanes) + value * column)

        with kernel.loop(k // _STEPS) as block:
            for t in range(_STEPS):
                step(block * _STEPS + t)
        for t in range(k % _STEPS):
            step(int64(k - k % _STEPS + t))
        for acc, panel in zip(accs, panels):
            store(acc, panel)

    if not desc.quantized:
        whole = kernel.let(floor_div(last - first, _STREAMS))
        with kernel.loop(whole) as i:
            at = kernel.let(first + i * _STREAMS)
            stream([at + j for j in range(_STREAMS)])
        with kernel.range(first + whole * _STREAMS, last) as panel:
            stream([panel])
        return
    with kernel.range(first, last) as panel:
        acc = kernel.registers(2, "float32", lanes)
        _start(kernel, desc, acc, bias, 1, panel)

        def add(block: Expr, limit: int) -> None:
            for step, v, value in dequantized(kernel, desc, w, panel, block):
                if step < limit:
                    at = v * lanes
                    factor = splat(load(x, (row, block * BLOCK + step)), lanes)
                    kernel.store(acc, at, load(acc, at, lanes) + factor * value)

        with kernel.loop(k // BLOCK) as block:
            add(block, BLOCK)
        if k % BLOCK:
            add(int64(k // BLOCK), k % BLOCK)
        store(acc, panel)


def panel_buffer(kernel: Kernel, desc: Linear) -> Buffer | None:
    """Memory for a panel in f32; None where it is stored so."""
    return None if desc.weights == "float32" else kernel.scratch(padded(desc.k, BLOCK) * desc.isa.columns, "float32")


def panel_source(
    kernel: Kernel, desc: Linear, w: Buffer, panel: Expr, copy: Buffer | None
) -> Callable[[Expr, int], Expr]:
    """The vectors of a panel, (step of k, half of the panel) -> f32; unpacked into ``copy`` where that is needed."""
    columns, lanes = desc.isa.columns, desc.isa.lanes
    if copy is None:
        return lambda kk, v: load(w, (panel, kk, v * lanes), lanes)
    unpack(kernel, desc, w, panel, copy)
    return lambda kk, v: load(copy, kk * columns + v * lanes, lanes)


def for_tiles(kernel: Kernel, tiles: tuple[int, ...], low: Expr, high: Expr,
              tile: Callable[[int, Expr], None]) -> None:
    """Cover rows low..high (at least two) by tiles of the largest size that fits; the last one overlaps its
    predecessor rather than needing a code path for every remainder."""

    def with_size(at: int) -> None:
        rows = tiles[at]

        def cover() -> None:
            with kernel.loop(ceil_div(high - low, rows)) as i:
                tile(rows, kernel.let(minimum(low + i * rows, high - rows), "row"))

        if at == 0:
            # a chunk of one row after a full one is covered from the row before it
            with kernel.loop(ceil_div(high - low, rows)) as i:
                tile(rows, kernel.let(maximum(minimum(low + i * rows, high - rows), 0), "row"))
        else:
            kernel.either(high - low >= rows, cover, lambda: with_size(at - 1))

    with_size(len(tiles) - 1)


def store_panel(
    kernel: Kernel, acc: Buffer, rows: Sequence[Expr], y: Buffer, panel: Expr, n: int, lanes: int
) -> None:
    """Write accumulators [rows, 2 vectors] to rows of y, at a panel's place, the last panel possibly cut by n."""
    columns = 2 * lanes

    def whole() -> None:
        for i, row in enumerate(rows):
            for v in range(2):
                kernel.store(y, (row, panel * columns + v * lanes), load(acc, (i * 2 + v) * lanes, lanes))

    def cut() -> None:
        spill = kernel.scratch(len(rows) * columns, "float32")
        for i in range(len(rows) * 2):
            kernel.store(spill, i * lanes, load(acc, i * lanes, lanes))
        with kernel.loop(n % columns) as j:
            for i, row in enumerate(rows):
                kernel.store(y, (row, panel * columns + j), load(spill, i * columns + j))

    if n % columns:
        kernel.either(panel < n // columns, whole, cut)
    else:
        whole()


def block_scales(kernel: Kernel, isa: Isa, w: Buffer, panel: Expr, block: Expr) -> list[Expr]:
    """The f32 scales of a block: one vector for each half of the panel."""
    out = []
    for v in range(2):
        raw = load(w, (panel, block, v * isa.lanes * 2), isa.lanes * 2)
        half = reinterpret(vector("float16", isa.lanes), raw)
        out.append(kernel.let(f16_to_f32(half, isa.native_f16)))
    return out


def dequantized(kernel: Kernel, desc: Linear, w: Buffer, panel: Expr,
                block: Expr) -> list[tuple[int, int, Expr]]:
    """The 32 steps of a block as f32 vectors, in their order: (step of k, half of the panel, values)."""
    if in_blocks(desc.weights):
        return Piece(kernel, format_of(desc.weights, desc.isa), w, panel, block).dequantized()
    isa, lanes = desc.isa, desc.isa.lanes
    scales = block_scales(kernel, isa, w, panel, block)
    out = []
    four_bits = desc.weights == "int4"
    for group in range(4 if four_bits else 8):
        for v in range(2):
            at = isa.columns * 2 + (group * 2 + v) * lanes * 4
            raw = kernel.let(reinterpret(vector("int32", lanes), load(w, (panel, block, at), lanes * 4)))
            for t in range(4):
                for high in range(2 if four_bits else 1):
                    out.append((group * 4 + high * 16 + t, v,
                                cast("float32", byte_of(raw, t, high, desc.weights, isa)) * scales[v]))
    return sorted(out, key=lambda part: part[0])


def byte_of(raw: Expr, t: int, high: int, weights: str, isa: Isa) -> Expr:
    """Signed integer number ``t`` of each 32-bit lane of four bytes (or of their low or high nibbles)."""
    lanes = isa.lanes

    def c(x: int) -> Expr:
        return splat_int(x, lanes)

    if weights == "int4":
        return ((raw >> c(8 * t + 4 * high)) & c(15)) - c(8)
    if isa.dot == "vnni":
        return ((raw >> c(8 * t)) & c(255)) - c(128)
    return (raw << c(24 - 8 * t)) >> c(24)


def unpack(kernel: Kernel, desc: Linear, w: Buffer, panel: Expr, out: Buffer) -> None:
    """A panel of any storage to f32 [k, columns]."""
    isa, lanes = desc.isa, desc.isa.lanes
    if not desc.quantized:
        with kernel.loop(desc.k) as kk:
            for v in range(2):
                kernel.store(out, kk * isa.columns + v * lanes,
                             widen(load(w, (panel, kk, v * lanes), lanes), isa.native_f16))
        return
    with kernel.loop(padded(desc.k, BLOCK) // BLOCK) as block:
        for step, v, value in dequantized(kernel, desc, w, panel, block):
            kernel.store(out, (block * BLOCK + step) * isa.columns + v * lanes, value)
