"""y = x @ w^T (+ bias): for a few rows by reading each weight once, for many by tiles in workgroup memory.

Weights of every format are dequantized in registers (:mod:`.formats`); sums are f32. Where ``experts`` is not 0, row i takes
the matrix ``groups[i]`` of so many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm import tirx

from ...cpu.kernels.emit import Buffer, Expr, ceil_div, floor_div, floor_mod, int64, load, maximum, symbol
from ..limits import Limits
from . import tensor
from .emit import Kernel, as_f32, clamped, power_of_two, zero
from .formats import OCTET, Floats, Format, Octet, Rows


@dataclass(frozen=True)
class Linear:
    """x[m, k] with w[n, k]. ``rows``: how many a workgroup multiplies at once; more than 8 are multiplied by tiles.
    ``per``: of a grouped product, how many rows of y each row of x gives."""

    limits: Limits
    n: int
    k: int
    weights: Format
    rows: int = 1
    bias: bool = False
    dtype: str = "float32"
    experts: int = 0
    per: int = 1
    groups: str = "int64"
    of_f32: bool = False
    """x is f32, whatever y is."""

    @property
    def of(self) -> str:
        """Element type of x."""
        return "float32" if self.of_f32 else self.dtype

    @property
    def slow(self) -> str | None:
        """Why many rows are multiplied without tensor cores; None: they are with them."""
        return tensor.why_not(self.weights, self.dtype, self.of_f32, self.limits.tensor)

    @property
    def name(self) -> str:
        kind = "gemm" if self.rows > MOST_ROWS and self.slow else "mma" if self.rows > MOST_ROWS else f"gemv{self.rows}"
        return f"{'grouped_' if self.experts else ''}{kind}_{self.weights.name}_{self.n}x{self.k}"


MOST_ROWS = 8


def linear(desc: Linear) -> tirx.PrimFunc:
    """PrimFunc(x [m / per, k], w packed [(e,) n, ..], [groups i64[m]], [bias [(e,) n]], y [m, n])."""
    return _tiles(desc) if desc.rows > MOST_ROWS else _rows(desc)


@dataclass(frozen=True)
class _Operands:
    m: Expr
    x: Buffer
    w: Buffer
    groups: Buffer | None
    bias: Buffer | None
    y: Buffer


def _operands(kernel: Kernel, d: Linear) -> _Operands:
    m = symbol("m")
    many = max(1, d.experts)
    x = kernel.param("x", (symbol("mx") if d.per > 1 else m, d.k), d.of)
    shape, dtype = d.weights.param(d.n * many, d.k)
    bank = d.experts and isinstance(d.weights, Floats) and not d.weights.words  # lies as it is
    w = kernel.param("w", (d.experts, d.n, d.k) if bank else shape, dtype)
    groups = kernel.param("groups", (m,), d.groups) if d.experts else None
    bias = kernel.param("bias", (d.experts, d.n) if d.experts else (d.n,), d.dtype) if d.bias else None
    y = kernel.param("y", (m, d.n), d.dtype)
    return _Operands(m, kernel.flat(x), kernel.flat(w), groups, None if bias is None else kernel.flat(bias), kernel.flat(y))


def _rows(d: Linear) -> tirx.PrimFunc:
    """Each group of threads has rows of w, of which they read consecutive octets; their sums meet in workgroup memory. Where
    rows of x are multiplied together, a launch of its own has the one row that there mostly is: it would wait for the others,
    and some devices compute what a condition leaves out."""
    kernel = Kernel(d.name, d.limits)
    o = _operands(kernel, d)
    if d.rows > 1:
        _launch(kernel, replace(d, rows=1), o, maximum(tirx.min(o.m, 2 - o.m), 0))
        _launch(kernel, d, o, ceil_div(o.m, d.rows) * tirx.min(maximum(o.m - 1, 0), int64(1)))
    else:
        _launch(kernel, d, o, o.m)
    return kernel.build()


def _launch(kernel: Kernel, d: Linear, o: _Operands, tiles: Expr) -> None:
    """Rows of x by ``d.rows``, in so many tiles."""
    runs = Rows(kernel, d.weights, d.k, o.w).runs
    threads = min(64, d.limits.threads)
    lanes = min(d.limits.lanes, power_of_two(runs), threads)
    columns = 1 if d.rows > 1 else min(d.limits.columns, 4 if isinstance(d.weights, Floats) else 2)
    each = threads // lanes
    with kernel.launch((-(-d.n // (each * columns)), tiles), threads) as ([column, tile], thread):
        weights = Rows(kernel, d.weights, d.k, o.w)
        memories = [kernel.shared(threads) for _ in range(d.rows * columns)]
        sums = kernel.registers(d.rows * columns, "float32", 1)
        lane = kernel.let(floor_mod(thread, lanes), "lane")
        own = kernel.let(column * (each * columns) + floor_div(thread, lanes), "own")
        outputs = [own if c == 0 else kernel.let(own + c * each) for c in range(columns)]
        first = kernel.let(tile * d.rows, "first")
        group: Expr = int64(0)
        if o.groups is not None:
            given = kernel.copy(load(o.groups, first))
            given = given if d.groups == "int64" else tirx.Cast("int64", given)
            group = kernel.copy(tirx.max(tirx.min(given, int64(d.experts - 1)), int64(0)))
        starts = [weights.start(group * d.n + clamped(n, d.n)) for n in outputs]
        for i in range(d.rows * columns):
            kernel.store(sums, i, zero())
        with kernel.loop(-(-runs // lanes)) as i:
            run = kernel.let(i * lanes + lane, "run")
            with kernel.when(run < runs):
                if d.rows == 1:
                    xs = _xs(kernel, d, o, floor_div(first, d.per) if d.per > 1 else first, run, weights.run)
                    for c, start in enumerate(starts):
                        _add(kernel, sums, c, weights.octets_from(start, run), xs)
                else:
                    octets = weights.octets_from(starts[0], run)
                    for r in range(d.rows):
                        with kernel.when(first + r < o.m):
                            source = kernel.let(floor_div(first + r, d.per) if d.per > 1 else first + r)
                            _add(kernel, sums, r, octets, _xs(kernel, d, o, source, run, weights.run))
        kernel.reduce(memories, thread, lane, lanes, [load(sums, i) for i in range(d.rows * columns)], lambda a, b: a + b)
        for i in range(d.rows * columns):
            n, row = (outputs[i], first) if d.rows == 1 else (outputs[0], first + i)
            with kernel.when(tirx.And(lane < 1, tirx.And(n < d.n, row < o.m))):
                total = load(memories[i], thread)
                if o.bias is not None:
                    total = total + as_f32(load(o.bias, group * d.n + n))
                kernel.put(o.y, row * d.n + n, total)


def _xs(kernel: Kernel, d: Linear, o: _Operands, row: Expr, run: Expr, count: int) -> list[list[Expr]]:
    """What the octets of a run meet of a row of x."""
    out = []
    for i in range(count):
        at = run * count + i if count > 1 else run
        base = kernel.let(row * d.k + at * OCTET, "base")
        if d.k % OCTET == 0:
            out.append([kernel.let(as_f32(x)) for x in kernel.side_by_side(o.x, base, OCTET)])
            continue
        xs = []
        for t in range(OCTET):
            inside = None if t < d.k % OCTET else at * OCTET + t < d.k
            x = load(o.x, base + t if inside is None else tirx.min(base + t, row * d.k + (d.k - 1)))
            xs.append(kernel.let(kernel.kept(inside, as_f32(x))))
        out.append(xs)
    return out


def _add(kernel: Kernel, sums: Buffer, i: int, octets: Sequence[Octet], xs: Sequence[list[Expr]]) -> None:
    for octet, x in zip(octets, xs):
        kernel.store(sums, i, load(sums, i) + octet.dot(x))


def _tiles(d: Linear) -> tirx.PrimFunc:
    """A workgroup has a tile of y; tiles of x and w go through its memory, 16 steps of k at a time."""
    if d.experts:
        raise ValueError("grouped products have no tiles")
    kernel = Kernel(d.name, d.limits)
    o = _operands(kernel, d)
    if d.slow is None:
        tensor.products(kernel, d.n, d.k, d.weights, d.dtype, tensor.Operands(o.m, o.x, o.w, o.bias, o.y))
        return kernel.build()
    side = 16 if d.limits.threads >= 256 else 8  # of the square of threads
    threads, step, own = side * side, 16, 4
    tile, pitch = side * own, side * own + 1
    with kernel.launch((-(-d.n // tile), ceil_div(o.m, tile)), threads) as ([column, row], thread):
        weights = Rows(kernel, d.weights, d.k, o.w)
        xs, ws = kernel.shared(step * pitch), kernel.shared(step * pitch)
        sums = kernel.registers(own * own, "float32", 1)
        tx, ty = kernel.let(floor_mod(thread, side), "tx"), kernel.let(floor_div(thread, side), "ty")
        m0, n0 = kernel.let(row * tile, "m0"), kernel.let(column * tile, "n0")
        for i in range(own * own):
            kernel.store(sums, i, zero())
        with kernel.loop(-(-d.k // step)) as part:
            k0 = kernel.let(part * step, "k0")
            together = 4 if d.limits.vectors and d.of == "float32" and d.k % step == 0 else 1
            for at in kernel.strided(thread, threads, tile * step // together) if together > 1 else ():
                kk, mm = kernel.let(floor_mod(at, step // together) * together), kernel.let(floor_div(at, step // together))
                for t, x in enumerate(kernel.side_by_side(o.x, clamped(m0 + mm, o.m) * d.k + (k0 + kk), together)):
                    kernel.store(xs, (kk + t) * pitch + mm, x)
            for at in kernel.strided(thread, threads, tile * step) if together == 1 else ():
                kk, mm = kernel.let(floor_mod(at, step)), kernel.let(floor_div(at, step))
                inside = k0 + kk < d.k if d.k % step else None
                source = clamped(m0 + mm, o.m) * d.k + (clamped(k0 + kk, d.k) if inside is not None else k0 + kk)
                kernel.store(xs, kk * pitch + mm, kernel.kept(inside, as_f32(load(o.x, source))))
            for at in kernel.strided(thread, threads, tile * step // OCTET):
                oo, nn = kernel.let(floor_mod(at, step // OCTET)), kernel.let(floor_div(at, step // OCTET))
                octet = kernel.let(part * (step // OCTET) + oo)
                inside = octet < weights.octets if -(-d.k // OCTET) % (step // OCTET) else None
                start = weights.start(clamped(n0 + nn, d.n))
                values = weights.octet(start, octet if inside is None else clamped(octet, weights.octets)).dense()
                for t, value in enumerate(values):
                    kernel.store(ws, (oo * OCTET + t) * pitch + nn, kernel.kept(inside, value))
            kernel.barrier()
            with kernel.loop(step) as kk:
                a = [kernel.let(load(xs, kk * pitch + ty + i * side)) for i in range(own)]
                b = [kernel.let(load(ws, kk * pitch + tx + j * side)) for j in range(own)]
                for i in range(own):
                    for j in range(own):
                        kernel.store(sums, i * own + j, load(sums, i * own + j) + a[i] * b[j])
            kernel.barrier()
        for i in range(own):
            for j in range(own):
                mm, nn = m0 + ty + i * side, n0 + tx + j * side
                with kernel.when(tirx.And(mm < o.m, nn < d.n)):
                    total = load(sums, i * own + j)
                    if o.bias is not None:
                        total = total + as_f32(load(o.bias, nn))
                    kernel.put(o.y, mm * d.n + nn, total)
    return kernel.build()
