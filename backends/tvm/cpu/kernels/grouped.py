"""Each row by the matrix of its group, over the packed weights of all of them: the products of a mixture of experts.

Rows are sorted by their group first (:func:`group_rows`), for every product of the same groups alike. Every thread takes its
panels of all matrices that have rows: however many rows a group has, the threads' shares are equal, and the weights of a group
without rows are not read. A group of one row is a matrix-vector product; the rows of a larger one are gathered, and go through
the register tiles of :mod:`.linear_float`, :mod:`.linear_int` or :mod:`.linear_blocks`: a row gives the same bits as there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx

from . import linear_blocks as blocks
from .emit import Buffer, Expr, Kernel, ceil_div, floor_div, int64, load, symbol
from .linear_blocks import LinearBlocks
from .linear_float import (
    Linear,
    for_tiles,
    packed_param,
    panel_buffer,
    panel_source,
    register_tile,
    store_panel,
    vector_panels,
)
from .linear_int import LinearInt
from .linear_int import panel_buffer as int_buffer
from .linear_int import register_tile as int_tile
from .linear_int import unpack as unpack_int
from .norm import for_vectors
from .pack import BLOCK, padded
from .quantize import WORDS, quantized_param

_CHUNK = 240  # rows that are gathered at once, and that a panel is applied to
_SERIAL = 16384  # weights of a matrix below which a second thread costs more than it saves


@dataclass(frozen=True)
class GroupRows:
    """Rows sorted by group, as they stand within one: the order, and where each of ``size`` groups begins and ends."""

    size: int

    @property
    def name(self) -> str:
        return f"group_rows_{self.size}"


def group_rows(desc: GroupRows) -> tirx.PrimFunc:
    """PrimFunc(groups i64[m], order i64[m], starts i64[size + 1])."""
    kernel = Kernel(desc.name)
    m = symbol("m")
    groups = kernel.param("groups", (m,), "int64")
    order = kernel.param("order", (m,), "int64")
    starts = kernel.param("starts", (desc.size + 1,), "int64")
    ends = kernel.scratch(desc.size, "int64")
    with kernel.loop(desc.size) as e:
        kernel.store(ends, e, int64(0))
    with kernel.loop(m) as i:
        e = kernel.let(load(groups, i))
        kernel.store(ends, e, load(ends, e) + 1)
    kernel.store(starts, 0, int64(0))
    with kernel.loop(desc.size) as e:
        first = kernel.registers(1, "int64", 1)
        kernel.store(first, 0, load(starts, e))
        kernel.store(starts, e + 1, load(first, 0) + load(ends, e))
        kernel.store(ends, e, load(first, 0))
    with kernel.loop(m) as i:
        e = kernel.let(load(groups, i))
        at = kernel.registers(1, "int64", 1)
        kernel.store(at, 0, load(ends, e))
        kernel.store(order, load(at, 0), i)
        kernel.store(ends, e, load(at, 0) + 1)
    return kernel.build()


@dataclass(frozen=True)
class Grouped:
    """y[i] = x[i // per] @ w[group of i]^T (+ bias[group of i]); ``product`` is that of one of ``groups`` matrices."""

    product: Linear | LinearInt | LinearBlocks
    groups: int
    per: int = 1

    @property
    def name(self) -> str:
        return f"grouped_{self.groups}_{self.product.name}_{self.per}"


Memory = Buffer | tuple[Buffer, Buffer] | None


def _memory(kernel: Kernel, p: Linear | LinearInt | LinearBlocks) -> Memory:
    """What a panel is unpacked into."""
    if isinstance(p, LinearBlocks):
        return blocks.panel_buffers(kernel, p)
    return panel_buffer(kernel, p) if isinstance(p, Linear) else int_buffer(kernel, p)


def _unpacked(
    kernel: Kernel, p: Linear | LinearInt | LinearBlocks, x: Buffer, w: Buffer, bias: Buffer | None, panel: Expr, copy: Memory
) -> Callable[[int, Expr], Buffer]:
    """Unpacks a panel; (how many rows of x, from which on) -> their accumulators."""
    if isinstance(p, LinearBlocks):
        assert isinstance(copy, tuple)
        parts = blocks.panel_source(kernel, p, w, panel, copy)
        return lambda count, row: blocks.register_tile(kernel, p, x, bias, count, row, panel, parts)
    assert not isinstance(copy, tuple)
    if isinstance(p, Linear):
        source = panel_source(kernel, p, w, panel, copy)
        return lambda count, row: register_tile(kernel, p, x, bias, count, row, panel, source)
    if copy is not None:
        unpack_int(kernel, p, w, panel, copy)
    return lambda count, row: int_tile(kernel, p, x, w, bias, count, row, panel, copy)


def grouped_shape(desc: Grouped) -> tuple[int, int, int]:
    """Shape of the packed weights: the panels of one matrix after the other."""
    p = desc.product
    (panels, *rest), _ = packed_param(p.weights, p.n, p.k, p.isa)
    return (desc.groups * panels, rest[0], rest[1])


def grouped(desc: Grouped) -> tirx.PrimFunc:
    """PrimFunc(x f32[r, k] or quantized rows, w packed, order i64[m], starts i64[groups + 1], [bias], y f32[m, n])."""
    p, isa = desc.product, desc.product.isa
    n, k, lanes = p.n, p.k, isa.lanes
    kernel = Kernel(desc.name)
    m, r = symbol("m"), symbol("r")
    integers = not isinstance(p, Linear)
    x = quantized_param(kernel, "x", r, k) if integers else kernel.param("x", (r, k), "float32")
    w = kernel.param("w", grouped_shape(desc), packed_param(p.weights, n, k, isa)[1])
    order = kernel.param("order", (m,), "int64")
    starts = kernel.param("starts", (desc.groups + 1,), "int64")
    panels = padded(n, isa.columns) // isa.columns
    bias = kernel.param("bias", (desc.groups * panels * isa.columns,), "float32") if p.bias else None
    y = kernel.param("y", (m, n), "float32")
    words = padded(k, BLOCK) // BLOCK * WORDS if integers else k

    def gather(first: Expr, count: Expr, to: Buffer) -> None:
        """The rows that are sorted to ``first`` and behind, side by side."""
        source, target = kernel.flat(x), kernel.flat(to)
        with kernel.loop(count) as i:
            at = kernel.let(floor_div(load(order, first + i), desc.per) * words)
            for_vectors(kernel, words, lanes, lambda j, width: kernel.store(target, i * words + j, load(source, at + j, width)))

    def one(row: Expr, base: Expr, first: Expr, last: Expr) -> None:
        source = kernel.let(floor_div(row, desc.per))

        def store(acc: Buffer, panel: Expr) -> None:
            store_panel(kernel, acc, [row], y, panel - base, n, lanes)

        if isinstance(p, Linear):
            vector_panels(kernel, p, x, source, w, bias, base + first, base + last, store)
            return
        with kernel.range(base + first, base + last) as panel:
            if isinstance(p, LinearInt):
                acc = int_tile(kernel, p, x, w, bias, 1, source, panel, None)
            else:
                acc = blocks.register_tile(kernel, p, x, bias, 1, source, panel, blocks.panel_source(kernel, p, w, panel, None))
            store(acc, panel)

    def several(low: Expr, count: Expr, base: Expr, first: Expr, last: Expr, rows: Buffer, copy: Memory) -> None:
        chunks = kernel.let(ceil_div(count, _CHUNK))
        with kernel.loop(chunks) as c:  # of about one size: each has two rows at least
            start = kernel.let(low + floor_div(c * count, chunks), "start")
            size = kernel.let(low + floor_div((c + 1) * count, chunks) - start, "size")
            gather(start, size, rows)
            with kernel.range(first, last) as panel:
                tiles(start, size, base, panel, rows, copy)

    def tiles(start: Expr, size: Expr, base: Expr, panel: Expr, rows: Buffer, copy: Memory) -> None:
        at = kernel.let(base + panel)
        make = _unpacked(kernel, p, rows, w, bias, at, copy)

        def tile(count: int, row: Expr) -> None:
            acc = make(count, row)
            places = [kernel.let(load(order, start + row + i)) for i in range(count)]
            store_panel(kernel, acc, places, y, panel, n, lanes)

        for_tiles(kernel, (isa.int_tiles if integers else isa.tiles)[1:], int64(0), size, tile)

    def part(first: Expr, last: Expr) -> None:
        shape = (_CHUNK, words // WORDS, WORDS) if integers else (_CHUNK, k)
        rows = kernel.scratch(shape, "int32" if integers else "float32")
        copy = _memory(kernel, p)
        with kernel.loop(desc.groups) as e:
            low = kernel.let(load(starts, e), "low")
            count = kernel.let(load(starts, e + 1) - low, "count")
            base = kernel.let(e * panels, "base")
            with kernel.when(tirx.EQ(count, int64(1))):
                one(kernel.let(load(order, low)), base, first, last)
            with kernel.when(count > 1):
                several(low, count, base, first, last, rows, copy)

    kernel.share(1 if n * k < _SERIAL else p.threads, panels, part)
    return kernel.build()
