"""A thread for each element, or each eight: gated units, rotary embeddings, rows of a table, new positions of a cache."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from ...cpu.kernels.emit import Expr, cast, floor_div, floor_mod, int64, load, sin_cos, splat, symbol
from ...cpu.kernels.glu import Activation, activate
from ..limits import Limits
from .emit import Kernel, as_f32
from .formats import OCTET, Format, Rows


@dataclass(frozen=True)
class Glu:
    """act(x[:, :n]) * x[:, n:] of x[m, 2n]."""

    limits: Limits
    n: int
    activation: Activation = "silu"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"glu_{self.activation}_{self.n}"


def glu(d: Glu) -> tirx.PrimFunc:
    """PrimFunc(x [m, 2n], y [m, n])."""
    kernel = Kernel(d.name, d.limits)
    m = symbol("m")
    x = kernel.flat(kernel.param("x", (m, 2 * d.n), d.dtype))
    y = kernel.flat(kernel.param("y", (m, d.n), d.dtype))
    with kernel.each(m * d.n) as at:
        base = kernel.let(floor_div(at, d.n) * (2 * d.n) + floor_mod(at, d.n), "base")
        gate = kernel.copy(as_f32(load(x, base)))
        kernel.put(y, at, activate(kernel, gate, d.activation) * as_f32(load(x, base + d.n)))
    return kernel.build()


@dataclass(frozen=True)
class Rope:
    """x[b, s, heads, d], whose first ``dims`` features are rotated. ``rows``: positions are [b, s], else [s] of all rows."""

    limits: Limits
    heads: int
    head_dim: int
    dims: int
    factor: float = 1.0
    interleaved: bool = False
    rows: bool = True
    positions: str = "int64"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"rope_{self.heads}x{self.head_dim}_{self.dims}{'_pairs' if self.interleaved else ''}"


def rope(d: Rope) -> tirx.PrimFunc:
    """PrimFunc(x [b, s, h, d], positions [b | 1, s], inv_freq f32[dims / 2], y [b, s, h, d])."""
    kernel = Kernel(d.name, d.limits)
    b, s, half, width = symbol("b"), symbol("s"), d.dims // 2, d.head_dim
    x = kernel.flat(kernel.param("x", (b, s, d.heads, width), d.dtype))
    positions = kernel.flat(kernel.param("positions", (b if d.rows else 1, s), d.positions))
    inv_freq = kernel.param("inv_freq", (half,), "float32")
    y = kernel.flat(kernel.param("y", (b, s, d.heads, width), d.dtype))
    items = half + width - d.dims  # of a head: pairs, and features that pass
    with kernel.each(b * s * (d.heads * items)) as at:
        item = kernel.let(floor_mod(at, items), "item")
        head = kernel.let(floor_div(at, items), "head")
        place = kernel.let(floor_div(head, d.heads), "place")
        base = kernel.let(head * width, "base")
        position = load(positions, place if d.rows else floor_mod(place, s))

        def rotate() -> None:
            angle = kernel.copy(cast("float32", position) * load(inv_freq, item))
            sine, cosine = sin_cos(kernel, angle, fence=kernel.copy)
            factor = splat(d.factor, 1)
            first, second = (item * 2, item * 2 + 1) if d.interleaved else (item, item + half)
            u, v = kernel.copy(as_f32(load(x, base + first))), kernel.copy(as_f32(load(x, base + second)))
            c, w = kernel.copy(cosine * factor), kernel.copy(sine * factor)
            kernel.put(y, base + first, u * c - v * w)
            kernel.put(y, base + second, v * c + u * w)

        def keep() -> None:
            at = base + (item + half)
            kernel.store(y, at, load(x, at))

        if items == half:
            rotate()
        elif half == 0:
            keep()
        else:
            kernel.either(item < half, rotate, keep)
    return kernel.build()


@dataclass(frozen=True)
class Embedding:
    """Rows ``ids`` of a table [n, k], times ``scale``."""

    limits: Limits
    n: int
    k: int
    weights: Format
    scale: float = 1.0
    ids: str = "int64"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"embedding_{self.weights.name}_{self.n}x{self.k}"


def embedding(d: Embedding) -> tirx.PrimFunc:
    """PrimFunc(ids [m], w packed, y [m, k]). Negative ids count from the end; ids outside -n..n-1 are clamped."""
    kernel = Kernel(d.name, d.limits)
    m = symbol("m")
    ids = kernel.param("ids", (m,), d.ids)
    shape, dtype = d.weights.param(d.n, d.k)
    w = kernel.flat(kernel.param("w", shape, dtype))
    y = kernel.flat(kernel.param("y", (m, d.k), d.dtype))
    weights = Rows(kernel, d.weights, d.k, w)
    with kernel.each(m * weights.octets) as at:
        row, octet = kernel.let(floor_div(at, weights.octets), "row"), kernel.let(floor_mod(at, weights.octets), "octet")
        given = kernel.copy(tirx.Cast("int64", load(ids, row)) if d.ids != "int64" else load(ids, row))
        given = kernel.copy(tirx.Select(given < 0, given + d.n, given))
        token = kernel.copy(tirx.max(tirx.min(given, int64(d.n - 1)), int64(0)))
        values = weights.octet(weights.start(token), octet).dense()
        base = kernel.let(row * d.k + octet * OCTET, "base")

        def write(t: int, value: Expr) -> None:
            kernel.put(y, base + t, value if d.scale == 1.0 else value * splat(d.scale, 1))

        for t, value in enumerate(values):
            if d.k % OCTET and t >= d.k % OCTET:
                with kernel.when(octet * OCTET + t < d.k):
                    write(t, value)
            else:
                write(t, value)
    return kernel.build()


@dataclass(frozen=True)
class CacheWrite:
    """Writes k [b, s, g, d] and v [b, s, g, e] at positions past[b] + 0..s-1 of caches [b, c, g, ..], position p of a ring in
    slot p mod c. ``start``: only in rows where past[b] is 0; ``shared``: k and v are one row, for all."""

    limits: Limits
    heads: int
    key: int
    value: int
    ring: bool = False
    start: bool = False
    shared: bool = False
    past: str = "int64"
    dtype: str = "float32"
    stored: str = "float32"

    @property
    def name(self) -> str:
        how = f"cache_{'start' if self.start else 'write'}{'_shared' if self.shared else ''}{'_ring' if self.ring else ''}"
        return f"{how}_{self.heads}x{self.key}x{self.value}"


def cache_write(d: CacheWrite) -> tirx.PrimFunc:
    """PrimFunc(k, v, past [b], keys [b, c, g, d], values [b, c, g, e]): the caches are written in place. A position outside of
    them is the caller's mistake, and is not written."""
    kernel = Kernel(d.name, d.limits)
    b, s, c = symbol("b"), symbol("s"), symbol("c")
    rows = 1 if d.shared else b
    parts = []
    for name, width in (("k", d.key), ("v", d.value)):
        parts.append((kernel.param(name, (rows, s, d.heads, width), d.dtype), width))
    past = kernel.param("past", (b,), d.past)
    caches = [kernel.param(n, (b, c, d.heads, w), d.stored) for n, w in (("keys", d.key), ("values", d.value))]
    flat = [(kernel.flat(x), kernel.flat(cache), width) for (x, width), cache in zip(parts, caches)]
    most = max(d.key, d.value)
    with kernel.each(b * s * (d.heads * most)) as at:
        j, head = kernel.let(floor_mod(at, most), "j"), kernel.let(floor_mod(floor_div(at, most), d.heads), "head")
        place = kernel.let(floor_div(at, most * d.heads), "place")
        row, i = kernel.let(floor_div(place, s), "row"), kernel.let(floor_mod(place, s), "i")
        held = kernel.copy(tirx.Cast("int64", load(past, row)) if d.past != "int64" else load(past, row))
        position = kernel.copy(held + i)
        inside = position >= 0 if d.ring else tirx.And(position >= 0, position < c)
        with kernel.when(tirx.And(inside, held < 1) if d.start else inside):
            slot = kernel.copy(floor_mod(position, c) if d.ring else position)
            for x, cache, width in flat:
                source = ((i if d.shared else place) * d.heads + head) * width + j
                target = ((row * c + slot) * d.heads + head) * width + j
                value = load(x, source)
                value = value if d.dtype == d.stored else tirx.Cast(d.stored, value)
                if width == most:
                    kernel.store(cache, target, value)
                else:
                    with kernel.when(j < width):
                        kernel.store(cache, target, value)
    return kernel.build()
