"""y = a @ b over f32 matrices, many at once, read and written at any strides: the products of a training step.

Panels of b are copied to the order of packed weights as they are needed, a block of k at a time, and multiplied by rows of a
where these lie. A transpose, a slice or a broadcast of an operand is a matter of strides, not a copy; nor are the overlapping
windows of a convolution, which is a product whose b has several axes behind each index.

Sizes and strides may be known at run time alone. Rows and columns that fill no tile are then done one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from tvm import tirx
from wasat.ir import DimLike
from wasat.ir.dims import symbols_of

from ...sizes import expression
from .emit import Buffer, Expr, Index, Kernel, ceil_div, floor_div, floor_mod, int64, load, maximum, minimum, splat, symbol
from .isa import Isa

_BLOCK = 256  # steps of k: a panel of b stays in the first cache
_SERIAL = 32768  # multiply-adds below which a second thread costs more than it saves


Axes = tuple[tuple[DimLike, DimLike], ...]
"""(extent, stride) of several axes that one index counts through, the last one fastest."""


@dataclass(frozen=True)
class Matrix:
    """Where a matrix lies in a flat buffer of ``size`` elements: [.., i, j] is at ``offset`` + the sum of index * stride.

    ``batch`` has a stride for every batch axis: 0 where the matrix is the same all along it.
    """

    size: DimLike
    row: DimLike
    column: DimLike
    batch: tuple[DimLike, ...] = ()
    offset: DimLike = 0

    @property
    def swapped(self) -> Matrix:
        """The transpose."""
        return Matrix(self.size, self.column, self.row, self.batch, self.offset)


@dataclass(frozen=True)
class Windows:
    """A matrix like :class:`Matrix`, whose rows and columns are axes; the places of its columns increase."""

    size: DimLike
    row: Axes
    column: Axes
    batch: tuple[DimLike, ...] = ()
    offset: DimLike = 0


@dataclass(frozen=True)
class Gemm:
    """y[.., m, n] = a[.., m, k] @ b[.., k, n] over the batch axes ``batch``; columns of y are contiguous (stride 1)."""

    isa: Isa
    m: DimLike
    n: DimLike
    k: DimLike
    a: Matrix
    b: Matrix | Windows
    y: Matrix
    batch: tuple[DimLike, ...] = ()
    threads: int = 1

    @property
    def name(self) -> str:
        return "gemm_" + "x".join(str(d) if isinstance(d, int) else "n" for d in (*self.batch, self.m, self.n, self.k))

    @property
    def symbols(self) -> tuple[str, ...]:
        """The sizes that are known at run time alone."""
        return symbols_of(_numbers([self.m, self.n, self.k, self.batch, *(vars(x) for x in (self.a, self.b, self.y))]))

    @property
    def rows(self) -> int:
        """Rows of a register tile: as many as fit, in tiles of about one size."""
        return math.ceil(self.m / math.ceil(self.m / self.isa.rows)) if isinstance(self.m, int) else self.isa.rows

    @property
    def steps(self) -> int:
        """Steps of k per block."""
        return math.ceil(self.k / math.ceil(self.k / _BLOCK)) if isinstance(self.k, int) else _BLOCK

    @property
    def chunk(self) -> int:
        """Tiles that a copied panel is applied to, of known sizes: all, or fewer where that gives every thread its share."""
        m, n, batch = cast(tuple[int, ...], (self.m, self.n, math.prod(self.batch)))
        tiles, panels = math.ceil(m / self.rows), batch * math.ceil(n / self.isa.columns)
        chunks = 1
        while panels * chunks % self.threads and panels * chunks < 8 * self.threads and tiles >= 4 * (chunks + 1):
            chunks += 1
        return math.ceil(tiles / chunks)


def gemm(desc: Gemm) -> tirx.PrimFunc:
    """PrimFunc(a f32[a.size], b f32[b.size], the sizes known at run time alone, y f32[y.size])."""
    isa, lanes, rows = desc.isa, desc.isa.lanes, desc.rows
    kernel = Kernel(desc.name)
    symbols = {name: symbol(name) for name in desc.symbols}

    def size(d: DimLike) -> Expr:
        return expression(d, symbols.__getitem__)

    def at_run_time(x: Any) -> Any:
        """A matrix, or axes, with sizes that code can compute with."""
        if isinstance(x, tuple):
            return tuple(map(at_run_time, x))
        if isinstance(x, Matrix | Windows):
            return replace(x, **{n: at_run_time(d) for n, d in vars(x).items()})
        return x if isinstance(x, int) else kernel.number(size(x))

    a, b = (kernel.param(name, (size(x.size),), "float32") for name, x in (("a", desc.a), ("b", desc.b)))
    kernel.sizes(symbols.values())
    y = kernel.param("y", (size(desc.y.size),), "float32")
    m, n, k, batches, at_a, at_b, at_y = map(at_run_time, (desc.m, desc.n, desc.k, desc.batch, desc.a, desc.b, desc.y))

    def ceil(value: Index, by: Index) -> Index:
        known = isinstance(value, int) and isinstance(by, int)
        return math.ceil(value / by) if known else kernel.number(ceil_div(value, by))

    panels, tiles, blocks = ceil(n, isa.columns), ceil(m, rows), ceil(k, desc.steps)
    batch = math.prod(batches)
    if isinstance(m, int) and isinstance(n, int) and isinstance(batch, int):
        chunk: Index = desc.chunk
    else:  # four units of work for a thread
        chunk = kernel.number(maximum(ceil_div(tiles * panels * batch, 4 * desc.threads), 4))
    chunks = ceil(tiles, chunk)
    cut, rest = (x % of if isinstance(x, int) else None for x, of in ((n, isa.columns), (m, rows)))

    def starts(unit: Expr) -> list[Expr]:
        """Of a, b and y: the place of the unit's matrix."""
        places = [int64(x.offset) for x in (at_a, at_b, at_y)]
        for axis in reversed(range(len(batches))):
            index = kernel.let(floor_mod(unit, batches[axis]))
            unit = floor_div(unit, batches[axis])
            places = [p + index * x.batch[axis] for p, x in zip(places, (at_a, at_b, at_y))]
        return [kernel.let(p, "start") for p in places]

    def gather(start: Expr, low: Expr, left: Expr, first: Expr, steps: Expr, to: Buffer) -> None:
        """Rows first .. first + steps of a panel of b with ``left`` columns from ``low`` on, then the last one again."""
        places = kernel.scratch(isa.columns, "int64")
        with kernel.loop(isa.columns) as j:
            kernel.store(places, j, _place(kernel, low + minimum(j, left - 1), at_b.column))
        apart = isinstance(desc.b, Matrix) and desc.b.column != 1
        with kernel.loop(steps) as kk:
            source, at = kernel.let(start + _place(kernel, first + kk, at_b.row)), kernel.let(kk * isa.columns)
            for v in range(0, isa.columns, lanes):

                def together(v: int = v) -> None:
                    kernel.store(to, at + v, load(b, source + load(places, v), lanes))

                def singly(v: int = v) -> None:
                    with kernel.loop(lanes) as j:
                        kernel.store(to, at + v + j, load(b, source + load(places, v + j)))

                if apart:
                    singly()
                else:
                    kernel.either(tirx.EQ(load(places, v + lanes - 1) - load(places, v), int64(lanes - 1)), together, singly)

    def copy(start: Expr, panel: Expr, first: Expr, steps: Expr, to: Buffer, columns: int) -> None:
        """Rows first .. first + steps of ``columns`` columns of the panel of b, whose matrix begins at ``start``; columns
        without a source become 0.
        """
        low = panel * isa.columns
        width, whole = math.ceil(columns / lanes) * lanes, columns - columns % lanes
        if isinstance(at_b, Windows):
            axes, places = at_b.column, [kernel.let(_place(kernel, low + j, at_b.column)) for j in range(columns)]
        else:
            axes, places = ((n, at_b.column),), [int64(j * at_b.column) for j in range(columns)]
            start = kernel.let(start + low * at_b.column)

        def singly(source: Expr, at: Expr, begin: int, end: int) -> None:
            for j in range(begin, end):
                kernel.store(to, at + j, load(b, source + places[j]) if j < columns else splat(0.0, 1))

        def together(source: Expr, at: Expr, j: int) -> None:
            kernel.store(to, at + j, load(b, source + places[j], lanes))

        with kernel.loop(steps) as kk:
            source, at = kernel.let(start + _place(kernel, first + kk, at_b.row)), kernel.let(kk * isa.columns)
            for j in range(0, whole, lanes):
                if desc.b.column != 1 if isinstance(desc.b, Matrix) else desc.b.column[-1][1] != 1:
                    singly(source, at, j, j + lanes)
                elif len(axes) == 1:
                    together(source, at, j)
                else:  # these columns may lie in several runs
                    one = tirx.EQ(places[j + lanes - 1] - places[j], int64(lanes - 1))
                    kernel.either(one, partial(together, source, at, j), partial(singly, source, at, j, j + lanes))
            singly(source, at, whole, width)

    def tile(
        height: int, columns: int, left: Expr | None, place: Expr, to: Expr, block: Expr, steps: Expr, source: Buffer
    ) -> None:  # fmt: skip
        """``height`` rows of a from ``place`` on times the copied columns, to y from ``to`` on; of these ``left``, if given."""
        vectors = math.ceil(columns / lanes)
        acc = kernel.registers(height * vectors, "float32", lanes)

        def step(kk: Expr, first: bool) -> None:
            values = [kernel.let(load(source, kk * isa.columns + v * lanes, lanes)) for v in range(vectors)]
            at = kernel.let(place + kk * at_a.column)
            for i in range(height):
                value = splat(load(a, at + i * at_a.row), lanes)
                for v in range(vectors):
                    here = (i * vectors + v) * lanes
                    product = value * values[v]
                    kernel.store(acc, here, product if first else load(acc, here, lanes) + product)

        step(int64(0), True)  # of zeros in its place LLVM makes a call of memset, and keeps them in memory
        with kernel.range(1, steps) as kk:
            step(kk, False)
        if columns % lanes or left is not None:
            spill = kernel.scratch(height * vectors * lanes, "float32")

        def write(add: bool) -> None:
            for i in range(height):
                row = to + i * at_y.row
                for v in range(vectors if left is not None else columns // lanes):
                    at, value = row + v * lanes, load(acc, (i * vectors + v) * lanes, lanes)
                    kernel.store(y, at, load(y, at, lanes) + value if add else value)
            if columns % lanes:
                with kernel.loop(columns % lanes) as j:
                    for i in range(height):
                        at = to + i * at_y.row + columns // lanes * lanes + j
                        value = load(spill, (i * vectors + vectors - 1) * lanes + j)
                        kernel.store(y, at, load(y, at) + value if add else value)

        def keep() -> None:
            for i in range(height * vectors):
                kernel.store(spill, i * lanes, load(acc, i * lanes, lanes))

        def some() -> None:
            keep()
            with kernel.loop(height) as i, kernel.loop(left) as j:
                at, value = to + i * at_y.row + j, load(spill, i * (vectors * lanes) + j)
                kernel.store(y, at, tirx.Select(tirx.EQ(block, int64(0)), value, load(y, at) + value))

        def whole() -> None:
            if isinstance(blocks, int) and blocks == 1:
                write(False)
            else:
                kernel.either(tirx.EQ(block, int64(0)), lambda: write(False), lambda: write(True))

        if left is not None:
            kernel.either(left >= isa.columns, whole, some)
        else:
            if columns % lanes:
                keep()
            whole()

    def panel(
        columns: int, left: Expr | None, index: Expr, a_start: Expr, b_start: Expr, y_start: Expr, low: Expr, high: Expr,
        source: Buffer,
    ) -> None:  # fmt: skip
        """Tiles low .. high of ``columns`` columns, or of ``left`` ones, if given."""
        with kernel.loop(blocks) as block:
            first = kernel.let(block * desc.steps)
            one = isinstance(blocks, int) and blocks == 1
            steps = int64(k) if one else kernel.let(minimum(int64(k) - first, desc.steps))
            if left is None:
                copy(b_start, index, first, steps, source, columns)
            else:
                gather(b_start, index * isa.columns, left, first, steps, source)
            with kernel.range(low, high) as t:
                place = kernel.let(a_start + first * at_a.column + t * (rows * at_a.row))
                to = kernel.let(y_start + t * (rows * at_y.row))

                def of(height: int, row: Index = 0) -> None:
                    tile(height, columns, left, place + row * at_a.row, to + row * at_y.row, block, steps, source)

                def singly() -> None:
                    with kernel.loop(m - t * rows) as row:
                        of(1, row)

                if rest == 0:
                    of(rows)
                else:
                    kernel.either(t < floor_div(m, rows), lambda: of(rows), singly if rest is None else lambda: of(rest))

    def part(first: Expr, last: Expr) -> None:
        source = kernel.scratch(desc.steps * isa.columns, "float32")
        with kernel.range(first, last) as unit:
            at = kernel.let(floor_mod(unit, panels), "panel")
            low = kernel.let(floor_mod(floor_div(unit, panels), chunks) * chunk, "low")
            high = minimum(low + chunk, tiles)
            a_start, b_start, y_start = starts(floor_div(unit, panels * chunks))
            y_start = kernel.let(y_start + at * isa.columns)

            def with_columns(columns: int, left: Expr | None = None) -> Callable[[], None]:
                return lambda: panel(columns, left, at, a_start, b_start, y_start, low, high, source)

            if cut is None:
                with_columns(isa.columns, kernel.let(minimum(n - at * isa.columns, isa.columns)))()
            elif cut and n > cut:
                kernel.either(at < panels - 1, with_columns(isa.columns), with_columns(cut))
            else:
                with_columns(cut or isa.columns)()

    total, work = batch * chunks * panels, batch * m * n * k

    def all_parts() -> None:
        small = isinstance(work, int) and work < _SERIAL
        kernel.share(1 if small else desc.threads, total, part)

    def zeros() -> None:
        with kernel.loop(at_y.size) as i:
            kernel.store(y, i, splat(0.0, 1))

    if isinstance(k, int):
        all_parts()
    else:
        kernel.either(int64(k) > 0, all_parts, zeros)
    return kernel.build()


def _numbers(x: Any) -> list[Any]:
    """All that is no collection."""
    parts = x.values() if isinstance(x, dict) else x
    return [d for part in parts for d in _numbers(part)] if isinstance(x, dict | list | tuple) else [x]


def _place(kernel: Kernel, index: Expr, stride: Any) -> Expr:
    """Where ``index`` is: the sum over its axes."""
    if not isinstance(stride, tuple):
        return index * stride
    place = int64(0)
    for extent, step in reversed(stride[1:]):
        index = kernel.let(index)
        place = place + floor_mod(index, extent) * step
        index = floor_div(index, extent)
    return place + index * stride[0][1]
