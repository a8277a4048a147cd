"""y = a @ b over f32 matrices of known sizes, many at once, read and written at any strides: the products of a training step.

Panels of b are copied to the order of packed weights as they are needed, a block of k at a time, and multiplied by rows of a
where these lie. A transpose, a slice or a broadcast of an operand is a matter of strides, not a copy; nor are the overlapping
windows of a convolution, which is a product whose b has several axes behind each index.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tvm import tirx

from .emit import Buffer, Expr, Kernel, floor_div, floor_mod, int64, load, minimum, splat
from .isa import Isa

_BLOCK = 256  # steps of k: a panel of b stays in the first cache
_SERIAL = 32768  # multiply-adds below which a second thread costs more than it saves


Axes = tuple[tuple[int, int], ...]
"""(extent, stride) of several axes that one index counts through, the last one fastest."""


@dataclass(frozen=True)
class Matrix:
    """Where a matrix lies in a flat buffer of ``size`` elements: [.., i, j] is at ``offset`` + the sum of index * stride.

    ``batch`` has a stride for every batch axis: 0 where the matrix is the same all along it.
    """

    size: int
    row: int
    column: int
    batch: tuple[int, ...] = ()
    offset: int = 0

    @property
    def swapped(self) -> Matrix:
        """The transpose."""
        return Matrix(self.size, self.column, self.row, self.batch, self.offset)


@dataclass(frozen=True)
class Windows:
    """A matrix like :class:`Matrix`, whose rows and columns are axes; the places of its columns increase."""

    size: int
    row: Axes
    column: Axes
    batch: tuple[int, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Gemm:
    """y[.., m, n] = a[.., m, k] @ b[.., k, n] over the batch axes ``batch``; columns of y are contiguous (stride 1)."""

    isa: Isa
    m: int
    n: int
    k: int
    a: Matrix
    b: Matrix | Windows
    y: Matrix
    batch: tuple[int, ...] = ()
    threads: int = 1

    @property
    def name(self) -> str:
        return "gemm_" + "x".join(map(str, (*self.batch, self.m, self.n, self.k)))

    @property
    def rows(self) -> int:
        """Rows of a register tile: as many as fit, in tiles of about one size."""
        return math.ceil(self.m / math.ceil(self.m / self.isa.rows))

    @property
    def steps(self) -> int:
        """Steps of k per block."""
        return math.ceil(self.k / math.ceil(self.k / _BLOCK))

    @property
    def chunk(self) -> int:
        """Tiles that a copied panel is applied to: all, or fewer where that gives every thread its share."""
        tiles, panels = math.ceil(self.m / self.rows), math.prod(self.batch) * math.ceil(self.n / self.isa.columns)
        chunks = 1
        while panels * chunks % self.threads and panels * chunks < 8 * self.threads and tiles >= 4 * (chunks + 1):
            chunks += 1
        return math.ceil(tiles / chunks)


def gemm(desc: Gemm) -> tirx.PrimFunc:
    """PrimFunc(a f32[a.size], b f32[b.size], y f32[y.size])."""
    isa, m, n, k, lanes, rows = desc.isa, desc.m, desc.n, desc.k, desc.isa.lanes, desc.rows
    kernel = Kernel(desc.name)
    a, b, y = (kernel.param(name, (x.size,), "float32") for name, x in (("a", desc.a), ("b", desc.b), ("y", desc.y)))
    panels, tiles, blocks = math.ceil(n / isa.columns), math.ceil(m / rows), math.ceil(k / desc.steps)
    chunks = math.ceil(tiles / desc.chunk)
    cut, rest = n % isa.columns, m % rows

    def starts(unit: Expr) -> list[Expr]:
        """Of a, b and y: the place of the unit's matrix."""
        places = [int64(x.offset) for x in (desc.a, desc.b, desc.y)]
        for axis in reversed(range(len(desc.batch))):
            index = kernel.let(floor_mod(unit, desc.batch[axis]))
            unit = floor_div(unit, desc.batch[axis])
            places = [p + index * x.batch[axis] if x.batch[axis] else p for p, x in zip(places, (desc.a, desc.b, desc.y))]
        return [kernel.let(p, "start") for p in places]

    def copy(start: Expr, panel: Expr, first: Expr, steps: Expr, to: Buffer, columns: int) -> None:
        """Rows first .. first + steps of ``columns`` columns of the panel of b, whose matrix begins at ``start``; columns
        without a source become 0.
        """
        width, whole, low = math.ceil(columns / lanes) * lanes, columns - columns % lanes, panel * isa.columns
        if isinstance(desc.b, Windows):
            axes, places = desc.b.column, [kernel.let(_place(kernel, low + j, desc.b.column)) for j in range(columns)]
        else:
            axes, places = ((n, desc.b.column),), [int64(j * desc.b.column) for j in range(columns)]
            start = kernel.let(start + low * desc.b.column)

        def singly(source: Expr, at: Expr, begin: int, end: int) -> None:
            for j in range(begin, end):
                kernel.store(to, at + j, load(b, source + places[j]) if j < columns else splat(0.0, 1))

        def together(source: Expr, at: Expr, j: int) -> None:
            kernel.store(to, at + j, load(b, source + places[j], lanes))

        with kernel.loop(steps) as kk:
            source, at = kernel.let(start + _place(kernel, first + kk, desc.b.row)), kernel.let(kk * isa.columns)
            for j in range(0, whole, lanes):
                if axes[-1][1] != 1:
                    singly(source, at, j, j + lanes)
                elif len(axes) == 1:
                    together(source, at, j)
                else:  # these columns may lie in several runs
                    one = tirx.EQ(places[j + lanes - 1] - places[j], int64(lanes - 1))
                    kernel.either(one, partial(together, source, at, j), partial(singly, source, at, j, j + lanes))
            singly(source, at, whole, width)

    def tile(height: int, columns: int, place: Expr, to: Expr, block: Expr, steps: Expr, source: Buffer) -> None:
        """``height`` rows of a from ``place`` on times the copied columns, to y from ``to`` on."""
        vectors = math.ceil(columns / lanes)
        acc = kernel.registers(height * vectors, "float32", lanes)

        def step(kk: Expr, first: bool) -> None:
            values = [kernel.let(load(source, kk * isa.columns + v * lanes, lanes)) for v in range(vectors)]
            at = kernel.let(place + kk * desc.a.column)
            for i in range(height):
                value = splat(load(a, at + i * desc.a.row), lanes)
                for v in range(vectors):
                    here = (i * vectors + v) * lanes
                    product = value * values[v]
                    kernel.store(acc, here, product if first else load(acc, here, lanes) + product)

        step(int64(0), True)  # of zeros in its place LLVM makes a call of memset, and keeps them in memory
        with kernel.range(1, steps) as kk:
            step(kk, False)
        if columns % lanes:
            spill = kernel.scratch(height * vectors * lanes, "float32")
            for i in range(height * vectors):
                kernel.store(spill, i * lanes, load(acc, i * lanes, lanes))

        def write(add: bool) -> None:
            for i in range(height):
                row = to + i * desc.y.row
                for v in range(columns // lanes):
                    at, value = row + v * lanes, load(acc, (i * vectors + v) * lanes, lanes)
                    kernel.store(y, at, load(y, at, lanes) + value if add else value)
            if columns % lanes:
                with kernel.loop(columns % lanes) as j:
                    for i in range(height):
                        at = to + i * desc.y.row + columns // lanes * lanes + j
                        value = load(spill, (i * vectors + vectors - 1) * lanes + j)
                        kernel.store(y, at, load(y, at) + value if add else value)

        if blocks == 1:
            write(False)
        else:
            kernel.either(tirx.EQ(block, int64(0)), lambda: write(False), lambda: write(True))

    def panel(
        columns: int, index: Expr, a_start: Expr, b_start: Expr, y_start: Expr, low: Expr, high: Expr, source: Buffer
    ) -> None:  # fmt: skip
        """Tiles low .. high of ``columns`` columns."""
        with kernel.loop(blocks) as block:
            first = kernel.let(block * desc.steps)
            steps = int64(k) if blocks == 1 else kernel.let(minimum(int64(k) - first, desc.steps))
            copy(b_start, index, first, steps, source, columns)
            with kernel.range(low, high) as t:
                place = kernel.let(a_start + first * desc.a.column + t * (rows * desc.a.row))
                to = kernel.let(y_start + t * (rows * desc.y.row))
                if rest:
                    kernel.either(
                        t < m // rows,
                        lambda: tile(rows, columns, place, to, block, steps, source),
                        lambda: tile(rest, columns, place, to, block, steps, source),
                    )
                else:
                    tile(rows, columns, place, to, block, steps, source)

    def part(first: Expr, last: Expr) -> None:
        source = kernel.scratch(desc.steps * isa.columns, "float32")
        with kernel.range(first, last) as unit:
            at = kernel.let(floor_mod(unit, int64(panels)), "panel")
            low = kernel.let(floor_mod(floor_div(unit, int64(panels)), int64(chunks)) * desc.chunk, "low")
            high = minimum(low + desc.chunk, int64(tiles))
            a_start, b_start, y_start = starts(floor_div(unit, int64(panels * chunks)))
            y_start = kernel.let(y_start + at * isa.columns)

            def with_columns(columns: int) -> Callable[[], None]:
                return lambda: panel(columns, at, a_start, b_start, y_start, low, high, source)

            if cut and n > cut:
                kernel.either(at < panels - 1, with_columns(isa.columns), with_columns(cut))
            else:
                with_columns(cut or isa.columns)()

    batch = math.prod(desc.batch)
    kernel.share(1 if batch * m * n * k < _SERIAL else desc.threads, batch * chunks * panels, part)
    return kernel.build()


def _place(kernel: Kernel, index: Expr, stride: int | Axes) -> Expr:
    """Where ``index`` is: the sum over its axes."""
    if isinstance(stride, int):
        return index * stride
    place = int64(0)
    for extent, step in reversed(stride[1:]):
        index = kernel.let(index)
        place = place + floor_mod(index, extent) * step
        index = floor_div(index, extent)
    return place + index * stride[0][1]
