"""y = x @ w^T (+ bias): for a few rows by reading each weight once, for many by tiles in workgroup memory.

Weights of every format are dequantized in registers (:mod:`.formats`); sums are f32. Where ``experts`` is not 0, row i takes
the matrix ``groups[i]`` of so many.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from ...cpu.kernels.emit import Buffer, Expr, ceil_div, floor_div, floor_mod, int64, load, symbol
from ..limits import Limits
from .emit import Kernel, as_f32, clamped, narrow, power_of_two, zero
from .formats import OCTET, Floats, Format, Rows


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

    @property
    def name(self) -> str:
        kind = "gemm" if self.rows > MOST_ROWS else f"gemv{self.rows}"
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
    x = kernel.param("x", (symbol("mx") if d.per > 1 else m, d.k), d.dtype)
    shape, dtype = d.weights.param(d.n * many, d.k)
    bank = d.experts and isinstance(d.weights, Floats) and not d.weights.words  # lies as it is
    w = kernel.param("w", (d.experts, d.n, d.k) if bank else shape, dtype)
    groups = kernel.param("groups", (m,), d.groups) if d.experts else None
    bias = kernel.param("bias", (d.experts, d.n) if d.experts else (d.n,), d.dtype) if d.bias else None
    y = kernel.param("y", (m, d.n), d.dtype)
    return _Operands(m, kernel.flat(x), kernel.flat(w), groups, None if bias is None else kernel.flat(bias), kernel.flat(y))


def _rows(d: Linear) -> tirx.PrimFunc:
    """Each group of threads has one row of w, of which they read consecutive octets; their sums meet in workgroup memory."""
    kernel = Kernel(d.name, d.limits)
    o = _operands(kernel, d)
    octets = -(-d.k // OCTET)
    lanes = min(32, power_of_two(octets))
    threads = min(64, d.limits.threads)
    lanes = min(lanes, threads)
    each = threads // lanes
    with kernel.launch((-(-d.n // each), ceil_div(o.m, d.rows)), threads) as ([column, tile], thread):
        weights = Rows(kernel, d.weights, d.k, o.w)
        memories = [kernel.shared(threads) for _ in range(d.rows)]
        sums = kernel.registers(d.rows, "float32", 1)
        lane = kernel.let(floor_mod(thread, lanes), "lane")
        n = kernel.let(column * each + floor_div(thread, lanes), "n")
        first = kernel.let(tile * d.rows, "first")
        group: Expr = int64(0)
        if o.groups is not None:
            given = kernel.copy(load(o.groups, first))
            given = given if d.groups == "int64" else tirx.Cast("int64", given)
            group = kernel.copy(tirx.max(tirx.min(given, int64(d.experts - 1)), int64(0)))
        start = weights.start(group * d.n + clamped(n, d.n))
        for r in range(d.rows):
            kernel.store(sums, r, zero())
        with kernel.loop(-(-octets // lanes)) as i:
            at = kernel.let(i * lanes + lane, "octet")
            with kernel.when(at < octets):
                octet = weights.octet(start, at)
                for r in range(d.rows):
                    row = first + r if d.rows > 1 else first
                    source = kernel.let(floor_div(row, d.per) if d.per > 1 else row)
                    if d.rows == 1:
                        _add(kernel, d, o, sums, r, source, at, octet.dot)
                    else:
                        with kernel.when(row < o.m):
                            _add(kernel, d, o, sums, r, source, at, octet.dot)
        kernel.reduce(memories, thread, lane, lanes, [load(sums, r) for r in range(d.rows)], lambda a, b: a + b)
        for r in range(d.rows):
            with kernel.when(tirx.And(lane < 1, tirx.And(n < d.n, first + r < o.m))):
                total = load(memories[r], thread)
                if o.bias is not None:
                    total = total + as_f32(load(o.bias, group * d.n + n))
                kernel.store(o.y, (first + r) * d.n + n, narrow(total, d.dtype))
    return kernel.build()


def _add(kernel: Kernel, d: Linear, o: _Operands, sums: Buffer, r: int, row: Expr, at: Expr, dot: object) -> None:
    xs = []
    base = kernel.let(row * d.k + at * OCTET, "base")
    for t in range(OCTET):
        inside = None if d.k % OCTET == 0 or t < d.k % OCTET else at * OCTET + t < d.k
        x = load(o.x, base + t if inside is None else tirx.min(base + t, row * d.k + (d.k - 1)))
        xs.append(kernel.let(kernel.kept(inside, as_f32(x))))
    kernel.store(sums, r, load(sums, r) + dot(xs))  # type: ignore[operator]


def _tiles(d: Linear) -> tirx.PrimFunc:
    """A workgroup has a tile of y; tiles of x and w go through its memory, 16 steps of k at a time."""
    if d.experts:
        raise ValueError("grouped products have no tiles")
    kernel = Kernel(d.name, d.limits)
    o = _operands(kernel, d)
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
            for at in kernel.strided(thread, threads, tile * step):
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
                    kernel.store(o.y, mm * d.n + nn, narrow(total, d.dtype))
    return kernel.build()
