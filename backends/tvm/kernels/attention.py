"""Attention kernels: over caches for prefill and for decoding, and over plain keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tvm import tirx

from .cache import GROUP, Cache, CacheView, cache_params, flat_view
from .emit import (
    Buffer,
    Expr,
    Index,
    Kernel,
    ceil_div,
    exp,
    floor_div,
    floor_mod,
    int64,
    load,
    maximum,
    minimum,
    splat,
    symbol,
    widen,
)
from .flash import Flash, Scores, Source, minus_infinity
from .isa import Isa
from .norm import for_vectors
from .pack import padded

MaskShape = Literal["no", "11", "b1", "1h", "bh"]
"""Of an f32 addend [mb, mh, s, keys]: whether mb is the batch or 1, and mh the heads or 1."""

_BLOCK = 128  # keys per step of the running softmax
_TILES = 4  # tiles of rows that share a block of keys
_PLAIN_TILES = 16  # more where a block has to be rearranged first


@dataclass(frozen=True)
class CachedAttention:
    """q f32[b, s, h, d] at positions past[b] + i over caches that already hold positions up to its own.

    ``decode``: s is 1; the keys are split among the threads. Otherwise the rows are. ``mask``: an addend whose keys are the
    cache's slots.
    """

    isa: Isa
    heads: int
    cache: Cache
    scores: Scores
    decode: bool = False
    mask: MaskShape = "no"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.heads % self.cache.kv_heads:
            raise ValueError(f"{self.heads} heads are not a multiple of {self.cache.kv_heads} kv heads")
        if not self.scores.causal:
            raise ValueError("attention over a cache is causal")
        window, ring = self.scores.window, self.cache.capacity
        if ring is not None and (window is None or ring < window):
            raise ValueError(f"a ring of {ring} positions cannot hold a window of {window}")

    @property
    def name(self) -> str:
        s = self.scores
        return (f"{'decode' if self.decode else 'prefill'}_attention_{self.heads}h_{self.cache.name}"
                f"_{self.mask}_w{s.window}_c{s.softcap}_s{s.scale:.6g}").replace(".", "p").replace("-", "m")


def cached_attention(desc: CachedAttention) -> tirx.PrimFunc:
    """PrimFunc(q f32[b, s, h, d], past i64[b], keys, values, [mask f32[1 | b, 1 | h, s, c]], y f32[b, s, h, e]); s is 1 in the
    decode kernel."""
    return _decode(desc) if desc.decode else _prefill(desc)


@dataclass(frozen=True)
class _Mask:
    """An addend [1 | b, 1 | h, s, keys] of a kernel, declared as its next parameter."""

    kernel: Kernel
    shape: MaskShape
    heads: int
    queries: Index
    keys: Expr
    buffer: Buffer

    @staticmethod
    def param(kernel: Kernel, shape: MaskShape, b: Expr, heads: int, queries: Index, keys: Expr) -> _Mask | None:
        if shape == "no":
            return None
        sizes = (b if "b" in shape else 1, heads if "h" in shape else 1, queries, keys)
        return _Mask(kernel, shape, heads, queries, keys, kernel.param("mask", sizes, "float32"))

    def flat(self) -> _Mask:
        """The same with a flat buffer; to be called after the last parameter is declared."""
        return replace(self, buffer=self.kernel.flat(self.buffer))

    def at(self, batch: Expr, head: Expr, query: Expr, key: Expr, lanes: int) -> Expr:
        one = int64(0)
        outer = (batch if "b" in self.shape else one) * (self.heads if "h" in self.shape else 1) + (
            head if "h" in self.shape else one)
        return load(self.buffer, (outer * self.queries + query) * self.keys + key, lanes)


def _prefill(desc: CachedAttention) -> tirx.PrimFunc:
    isa, cache, h, g = desc.isa, desc.cache, desc.heads, desc.cache.kv_heads
    d, e, group = cache.head_dim, cache.value_dim, desc.heads // desc.cache.kv_heads
    kernel = Kernel(desc.name)
    b, s = symbol("b"), symbol("s")
    q = kernel.param("q", (b, s, h, d), "float32")
    past = kernel.param("past", (b,), "int64")
    params = cache_params(kernel, isa, cache, b)
    mask = _Mask.param(kernel, desc.mask, b, h, s, params.capacity)
    y = kernel.param("y", (b, s, h, e), "float32")
    view = flat_view(params)
    q, y = kernel.flat(q), kernel.flat(y)
    addend = mask.flat() if mask is not None else None
    chunk = isa.rows * _TILES
    chunks = kernel.let(ceil_div(s * group, chunk), "chunks")
    units = kernel.let(b * g * chunks, "units")
    stage = cache.dtype != "float32"

    def thread(first: Expr, step: int) -> None:
        flash = Flash(kernel, isa, desc.scores, isa.rows, _TILES, _BLOCK, d, e)
        staged = _stage_buffers(kernel, d, view.value_width) if stage else None
        with kernel.loop(ceil_div(maximum(units - first, 0), step)) as i:
            unit = kernel.let(first + i * step, "unit")
            low = kernel.let(floor_mod(unit, chunks) * chunk, "low")
            head = kernel.let(floor_mod(floor_div(unit, chunks), g), "head")
            batch = kernel.let(floor_div(unit, chunks * g), "batch")
            rows = kernel.let(minimum(s * group - low, chunk), "rows")
            start = kernel.let(load(past, batch), "past")

            def place(row: Expr) -> Expr:
                at = low + row
                return (batch * s + floor_div(at, group)) * h + head * group + floor_mod(at, group)

            def position(row: Expr) -> Expr:
                return start + floor_div(low + row, group)

            def add(row: Expr, key: Expr, lanes: int) -> Expr:
                at = low + minimum(row, rows - 1)
                assert addend is not None
                return addend.at(batch, head * group + floor_mod(at, group), floor_div(at, group), view.slot(key), lanes)

            flash.begin(rows, lambda row: (q, place(row) * d), position)
            begin = int64(0)
            if desc.scores.window is not None:
                begin = floor_div(maximum(position(int64(0)) - (desc.scores.window - 1), 0), GROUP) * GROUP
            begin = kernel.let(begin, "begin")
            end = kernel.let(position(rows - 1) + 1, "end")
            with kernel.loop(ceil_div(end - begin, _BLOCK)) as at:
                block = kernel.let(begin + at * _BLOCK, "block")
                source = _cached_source(view, batch, head, block)
                if staged is not None:
                    source = _stage(kernel, isa, source, staged, minimum(end - block, _BLOCK), d, view.value_width)
                with kernel.loop(ceil_div(rows, isa.rows)) as tile:
                    # the last row of a tile bounds what the tile sees
                    last = kernel.let(position(minimum(tile * isa.rows + (isa.rows - 1), rows - 1)), "last")
                    count = kernel.let(minimum(last + 1 - block, _BLOCK), "count")
                    visible = count > 0
                    if desc.scores.window is not None:
                        visible = tirx.And(visible, block + _BLOCK > position(tile * isa.rows) - (desc.scores.window - 1))
                    with kernel.when(visible):
                        flash.advance(tile, block, count, source, add if addend is not None else None)
            flash.finish(rows, lambda row: (y, place(row) * e))

    _cyclic(kernel, desc.threads, thread)
    return kernel.build()


def _cyclic(kernel: Kernel, threads: int, body: object) -> None:
    """``body(first, step)``: each thread takes every ``threads``-th unit, which balances causal work."""
    if threads == 1:
        body(int64(0), 1)  # type: ignore[operator]
    else:
        with kernel.loop(threads, parallel=True) as thread:
            body(thread, threads)  # type: ignore[operator]


def _cached_source(view: CacheView, batch: Expr, head: Expr, block: Expr) -> Source:
    first = view.kernel.let(floor_div(block, GROUP), "group")
    return Source(view.keys, view.values, lambda group: view.key_group(batch, head, first + group),
                  lambda t: view.value_row(batch, head, block + t))


def _stage_buffers(kernel: Kernel, d: int, width: int) -> tuple[Buffer, Buffer]:
    return kernel.scratch(_BLOCK * d, "float32"), kernel.scratch(_BLOCK * width, "float32")


def _stage(kernel: Kernel, isa: Isa, source: Source, staged: tuple[Buffer, Buffer], count: Expr, d: int,
           width: int) -> Source:
    """Widen a block to f32 once for all the tiles that read it."""
    keys, values = staged
    lanes = isa.lanes
    with kernel.loop(ceil_div(count, GROUP)) as group:
        start = kernel.let(source.key(group))
        with kernel.loop(GROUP * d // lanes) as j:
            kernel.store(keys, group * (GROUP * d) + j * lanes,
                         widen(load(source.keys, start + j * lanes, lanes), isa.native_f16))
    with kernel.loop(count) as t:
        start = kernel.let(source.value(t))
        with kernel.loop(width // lanes) as j:
            kernel.store(values, t * width + j * lanes,
                         widen(load(source.values, start + j * lanes, lanes), isa.native_f16))
    return Source(keys, values, lambda group: group * (GROUP * d), lambda t: t * width)


def _decode(desc: CachedAttention) -> tirx.PrimFunc:
    isa, cache, h, g = desc.isa, desc.cache, desc.heads, desc.cache.kv_heads
    d, e, group = cache.head_dim, cache.value_dim, desc.heads // desc.cache.kv_heads
    tiles = -(-group // isa.rows)
    rows = -(-group // tiles)
    kernel = Kernel(desc.name)
    b = symbol("b")
    q = kernel.param("q", (b, 1, h, d), "float32")
    past = kernel.param("past", (b,), "int64")
    params = cache_params(kernel, isa, cache, b)
    mask = _Mask.param(kernel, desc.mask, b, h, 1, params.capacity)
    y = kernel.param("y", (b, 1, h, e), "float32")
    view = flat_view(params)
    q, y = kernel.flat(q), kernel.flat(y)
    addend = mask.flat() if mask is not None else None
    width = view.value_width
    # few sequences: each splits its keys among all threads; many: there is enough to share without
    splits = kernel.let(tirx.Select(b * g < 4 * desc.threads, int64(desc.threads), int64(1)), "splits")
    parts = kernel.scratch(b * splits * (h * width), "float32")
    largest = kernel.scratch(b * splits * h, "float32")
    sums = kernel.scratch(b * splits * h, "float32")

    def thread(first: Expr, last: Expr) -> None:
        flash = Flash(kernel, isa, desc.scores, rows, tiles, _BLOCK, d, e)
        with kernel.range(first, last) as unit:
            split = kernel.let(floor_mod(unit, splits), "split")
            head = kernel.let(floor_mod(floor_div(unit, splits), g), "head")
            batch = kernel.let(floor_div(unit, splits * g), "batch")
            position = kernel.let(load(past, batch), "position")

            def add(row: Expr, key: Expr, lanes: int) -> Expr:
                assert addend is not None
                return addend.at(batch, head * group + minimum(row, group - 1), int64(0), view.slot(key), lanes)

            flash.begin(group, lambda row: (q, (batch * h + head * group + row) * d), lambda row: position)
            start = int64(0)
            if desc.scores.window is not None:
                start = floor_div(maximum(position - (desc.scores.window - 1), 0), GROUP)
            start = kernel.let(start, "start")
            groups = kernel.let(floor_div(position, GROUP) + 1 - start, "groups")
            low = kernel.let((start + floor_div(split * groups, splits)) * GROUP, "low")
            high = kernel.let(minimum((start + floor_div((split + 1) * groups, splits)) * GROUP, position + 1), "high")
            with kernel.loop(ceil_div(maximum(high - low, 0), _BLOCK)) as at:
                block = kernel.let(low + at * _BLOCK, "block")
                source = _cached_source(view, batch, head, block)
                for tile in range(tiles):
                    flash.advance(tile, block, kernel.let(minimum(high - block, _BLOCK), "count"), source,
                                  add if addend is not None else None)
            with kernel.loop(group) as row:
                at = kernel.let((batch * h + head * group + row) * splits + split)
                kernel.store(largest, at, load(flash.largest, row))
                kernel.store(sums, at, load(flash.sums, row))
                with kernel.loop(width // isa.lanes) as j:
                    kernel.store(parts, at * width + j * isa.lanes,
                                 load(flash.out, row * width + j * isa.lanes, isa.lanes))

    kernel.share(desc.threads, b * g * splits, thread)

    def combine(row: Expr) -> None:
        best = kernel.registers(1, "float32", 1)
        kernel.store(best, 0, minus_infinity(1))
        with kernel.loop(splits) as i:
            kernel.store(best, 0, tirx.max(load(best, 0), load(largest, row * splits + i)))
        if addend is not None:  # which may hide all keys; without it, a query sees itself
            kernel.store(best, 0, tirx.Select(load(best, 0) > minus_infinity(1), load(best, 0), splat(0.0, 1)))
        total = kernel.registers(1, "float32", 1)
        kernel.store(total, 0, splat(0.0, 1))
        with kernel.loop(splits) as i:
            at = kernel.let(row * splits + i)
            weight = exp(kernel, load(largest, at) - load(best, 0))
            kernel.store(largest, at, weight)  # from here on: the part's share
            kernel.store(total, 0, load(total, 0) + weight * load(sums, at))
        inverse = kernel.let(tirx.Select(load(total, 0) > splat(0.0, 1), splat(1.0, 1) / load(total, 0), splat(0.0, 1)))

        def columns(j: Expr, lanes: int) -> None:
            acc = kernel.registers(1, "float32", lanes)
            kernel.store(acc, 0, splat(0.0, lanes))
            with kernel.loop(splits) as i:
                at = kernel.let(row * splits + i)
                kernel.store(acc, 0, load(acc, 0, lanes)
                             + splat(load(largest, at), lanes) * load(parts, at * width + j, lanes))
            kernel.store(y, row * e + j, load(acc, 0, lanes) * splat(inverse, lanes))

        for_vectors(kernel, e, isa.lanes, columns)

    kernel.rows(desc.threads, b * h, splits * e, combine)
    return kernel.build()


@dataclass(frozen=True)
class Attention:
    """q f32[b, s, h, d] over k f32[b, t, g, d] and v f32[b, t, g, e].

    Causal: query i sits at position i + t - s. ``mask``: "no", or an f32 addend [mb, mh, s, t] with mb 1 or b and mh
    1 or h, as the flags say.
    """

    isa: Isa
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scores: Scores
    mask: MaskShape = "no"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are not a multiple of {self.kv_heads} kv heads")

    @property
    def name(self) -> str:
        s = self.scores
        return (f"attention_{self.heads}h_{self.kv_heads}x{self.head_dim}x{self.value_dim}_{self.mask}_w{s.window}"
                f"_c{s.softcap}_s{s.scale:.6g}{'_causal' if s.causal else ''}").replace(".", "p").replace("-", "m")


def attention(desc: Attention) -> tirx.PrimFunc:
    """PrimFunc(q f32[b, s, h, d], k f32[b, t, g, d], v f32[b, t, g, e], [mask f32[1 | b, 1 | h, s, t]],
    y f32[b, s, h, e])."""
    isa, h, g, d, e = desc.isa, desc.heads, desc.kv_heads, desc.head_dim, desc.value_dim
    group, width = desc.heads // desc.kv_heads, padded(e, GROUP)
    kernel = Kernel(desc.name)
    b, s, t = symbol("b"), symbol("s"), symbol("t")
    q = kernel.param("q", (b, s, h, d), "float32")
    k = kernel.param("k", (b, t, g, d), "float32")
    v = kernel.param("v", (b, t, g, e), "float32")
    mask = _Mask.param(kernel, desc.mask, b, h, s, t)
    y = kernel.param("y", (b, s, h, e), "float32")
    q, k, v, y = (kernel.flat(x) for x in (q, k, v, y))
    addend = mask.flat() if mask is not None else None
    chunk = isa.rows * _PLAIN_TILES
    chunks = kernel.let(ceil_div(s * group, chunk), "chunks")
    units = kernel.let(b * g * chunks, "units")

    def thread(first: Expr, step: int) -> None:
        flash = Flash(kernel, isa, desc.scores, isa.rows, _PLAIN_TILES, _BLOCK, d, e)
        keys, values = _stage_buffers(kernel, d, width)
        with kernel.loop(_BLOCK * width // isa.lanes) as j:  # the padding of values stays zero
            kernel.store(values, j * isa.lanes, splat(0.0, isa.lanes))
        with kernel.loop(ceil_div(maximum(units - first, 0), step)) as i:
            unit = kernel.let(first + i * step, "unit")
            low = kernel.let(floor_mod(unit, chunks) * chunk, "low")
            head = kernel.let(floor_mod(floor_div(unit, chunks), g), "head")
            batch = kernel.let(floor_div(unit, chunks * g), "batch")
            rows = kernel.let(minimum(s * group - low, chunk), "rows")

            def query(row: Expr) -> Expr:
                return floor_div(low + row, group)

            def head_of(row: Expr) -> Expr:
                return head * group + floor_mod(low + row, group)

            def place(row: Expr) -> Expr:
                return (batch * s + query(row)) * h + head_of(row)

            def position(row: Expr) -> Expr:
                return query(row) + (t - s)

            flash.begin(rows, lambda row: (q, place(row) * d), position)
            begin, end = int64(0), t
            if desc.scores.window is not None:
                begin = maximum(position(int64(0)) - (desc.scores.window - 1), 0)
            if desc.scores.causal:
                end = minimum(position(rows - 1) + 1, t)
            begin, end = kernel.let(begin, "begin"), kernel.let(end, "end")

            def add(row: Expr, key: Expr, lanes: int) -> Expr:
                row = minimum(row, rows - 1)
                assert addend is not None
                return addend.at(batch, head_of(row), query(row), key, lanes)

            with kernel.loop(ceil_div(maximum(end - begin, 0), _BLOCK)) as at:
                block = kernel.let(begin + at * _BLOCK, "block")
                size = kernel.let(minimum(end - block, _BLOCK), "size")
                with kernel.loop(size) as key:
                    start = kernel.let((batch * t + block + key) * g + head)
                    base = kernel.let(floor_div(key, GROUP) * (GROUP * d) + floor_mod(key, GROUP))
                    with kernel.loop(d) as j:
                        kernel.store(keys, base + j * GROUP, load(k, start * d + j))
                    for_vectors(kernel, e, isa.lanes, lambda j, lanes: kernel.store(
                        values, key * width + j, load(v, start * e + j, lanes)))
                source = Source(keys, values, lambda part: part * (GROUP * d), lambda row: row * width)
                with kernel.loop(ceil_div(rows, isa.rows)) as tile:
                    if desc.scores.causal:
                        last = position(minimum(tile * isa.rows + (isa.rows - 1), rows - 1))
                        count = kernel.let(minimum(last + 1 - block, size), "count")
                        with kernel.when(count > 0):
                            flash.advance(tile, block, count, source, add if addend is not None else None)
                    else:
                        flash.advance(tile, block, size, source, add if addend is not None else None)
            flash.finish(rows, lambda row: (y, place(row) * e))

    _cyclic(kernel, desc.threads, thread)
    return kernel.build()
