"""Attention kernels: over caches for prefill and for decoding, and over plain keys and values."""

from __future__ import annotations

from collections.abc import Callable
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
    floor_div,
    floor_mod,
    int64,
    load,
    maximum,
    minimum,
    reduce_max,
    splat,
    symbol,
)
from .flash import Flash, Scales, Scores, Source, blend, merge, minus_infinity, settle
from .isa import Isa
from .norm import for_vectors
from .pack import padded
from .rounding import load_scales

MaskShape = Literal["no", "11", "b1", "1h", "bh"]
"""Of an f32 addend [mb, mh, s, keys]: whether mb is the batch or 1, and mh the heads or 1."""

_BLOCK = 128  # keys per step of the running softmax
_GRAIN = 32  # keys before a window are skipped by so many: whole vectors of every processor
_TILES = 4  # tiles of rows that share a block of keys
_PLAIN_TILES = 16  # more where a block has to be rearranged first


@dataclass(frozen=True)
class CachedAttention:
    """q f32[b, s, h, d] at positions past[b] + i over caches that already hold all of them.

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
    sink: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.cache.kv_heads:
            raise ValueError(f"{self.heads} heads are not a multiple of {self.cache.kv_heads} kv heads")
        if self.decode and not self.scores.causal:
            raise ValueError("one query sees what is causal")
        window, ring = self.scores.window, self.cache.capacity
        if ring is not None and (window is None or ring < window):
            raise ValueError(f"a ring of {ring} positions cannot hold a window of {window}")

    @property
    def name(self) -> str:
        s, sink = self.scores, "_sink" if self.sink else ""
        return (f"{'decode' if self.decode else 'prefill' if s.causal else 'block'}_attention_{self.heads}h_{self.cache.name}"
                f"_{self.mask}_w{s.window}_c{s.softcap}_s{s.scale:.6g}{sink}").replace(".", "p").replace("-", "m")


def cached_attention(desc: CachedAttention) -> tirx.PrimFunc:
    """PrimFunc(q f32[b, s, h, d], past i64[b], keys, values, [mask f32[1 | b, 1 | h, s, c]], [sink f32[h]], y f32[b, s, h, e]);
    s is 1 in the decode kernel."""
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
    sink = kernel.param("sink", (h,), "float32") if desc.sink else None
    y = kernel.param("y", (b, s, h, e), "float32")
    view = flat_view(params)
    q, y = kernel.flat(q), kernel.flat(y)
    sink = kernel.flat(sink) if sink is not None else None
    addend = mask.flat() if mask is not None else None
    chunk = isa.rows * _TILES
    chunks = kernel.let(ceil_div(s * group, chunk), "chunks")
    units = kernel.let(b * g * chunks, "units")
    stage = cache.dtype != "float32"

    def thread(first: Expr, step: int) -> None:
        flash = Flash(kernel, isa, desc.scores, isa.rows, _TILES, _BLOCK, d, e, view.value_width)
        staged = _stage_buffers(kernel, d, view.value_width) if stage else None
        with kernel.loop(ceil_div(maximum(units - first, 0), step)) as i:
            unit = kernel.let(first + i * step, "unit")
            low = kernel.let(floor_mod(unit, chunks) * chunk, "low")
            head = kernel.let(floor_mod(floor_div(unit, chunks), g), "head")
            batch = kernel.let(floor_div(unit, chunks * g), "batch")
            rows = kernel.let(minimum(s * group - low, chunk), "rows")
            start = view.inside(load(past, batch), s)

            def place(row: Expr) -> Expr:
                at = low + row
                return (batch * s + floor_div(at, group)) * h + head * group + floor_mod(at, group)

            def logit(row: Expr) -> Expr:
                assert sink is not None
                return load(sink, head * group + floor_mod(low + row, group))

            def position(row: Expr) -> Expr:
                return start + floor_div(low + row, group)

            def add(row: Expr, key: Expr, lanes: int) -> Expr:
                at = low + minimum(row, rows - 1)
                assert addend is not None
                return addend.at(batch, head * group + floor_mod(at, group), floor_div(at, group), view.slot(key), lanes)

            flash.begin(rows, lambda row: (q, place(row) * d), position, view.turn_keys)
            begin = _begin(kernel, desc.scores, position(int64(0)))
            end = position(rows - 1) + 1 if desc.scores.causal else start + s
            end = kernel.let(end if cache.ring else minimum(end, view.capacity), "end")
            with kernel.range(floor_div(begin, _BLOCK), ceil_div(end, _BLOCK)) as at:
                block = kernel.let(at * _BLOCK, "block")
                source = _cached_source(view, batch, head, block)
                if staged is not None:
                    part = maximum(begin - block, 0), minimum(end - block, _BLOCK)
                    source = _stage(kernel, isa, source, staged, part, d, view.value_width)
                with kernel.loop(ceil_div(rows, isa.rows)) as tile:
                    # the last row of a tile bounds what the tile sees
                    last = kernel.let(position(minimum(tile * isa.rows + (isa.rows - 1), rows - 1)), "last")
                    seen = minimum(last + 1, end) if desc.scores.causal else end
                    count = kernel.let(minimum(seen - block, _BLOCK), "count")
                    first = _first(kernel, desc.scores, position(tile * isa.rows), block)
                    with kernel.when(count > first):
                        given = add if addend is not None else None
                        _advance(flash, tile, block, (first, count), source, given, not cache.ring)
            flash.finish(rows, lambda row: (y, place(row) * e), logit if sink is not None else None, view.turn_values)

    _cyclic(kernel, desc.threads, thread)
    return kernel.build()


def _begin(kernel: Kernel, scores: Scores, position: Expr) -> Expr:
    """A multiple of the grain before which a row at ``position``, and those behind it, see no key."""
    if scores.window is None:
        return int64(0)
    return kernel.let(floor_div(maximum(position - (scores.window - 1), 0), _GRAIN) * _GRAIN, "begin")


def _first(kernel: Kernel, scores: Scores, position: Expr, block: Expr) -> Expr:
    """The same, counted from a block's start."""
    if scores.window is None:
        return int64(0)
    return kernel.let(maximum(_begin(kernel, scores, position) - block, 0), "first")


Added = Callable[[Expr, Expr, int], Expr]
"""(row of all tiles, key, how many keys) -> addends."""


def _advance(
    flash: Flash, tile: Index, block: Expr, keys: tuple[Expr, Expr], source: Source, add: Added | None, skips: bool
) -> None:
    """Lets a tile see ``keys``, from which to which of a block; ``skips``: not where its mask hides them all from all its rows,
    which changes no bit of any."""
    kernel, lanes = flash.kernel, flash.isa.lanes
    first, count = keys
    if add is None or not skips:
        flash.advance(tile, block, first, count, source, add)
        return
    kept = kernel.registers(1, "float32", lanes)
    kernel.store(kept, 0, splat(0.0, lanes))

    def look(row: Expr, key: Expr, width: int) -> None:
        hidden = tirx.EQ(add(row, key, width), minus_infinity(width))
        found = tirx.Select(hidden, splat(0.0, width), splat(1.0, width))
        kernel.store(kept, 0, tirx.max(load(kept, 0, width), found))

    with kernel.loop(flash.rows) as i:
        row = kernel.let(int64(tile) * flash.rows + i)
        whole = kernel.let(floor_div(count - first, lanes))
        with kernel.loop(whole) as j:
            look(row, block + first + j * lanes, lanes)
        with kernel.range(first + whole * lanes, count) as key:
            look(row, block + key, 1)
    with kernel.when(reduce_max(kernel.let(load(kept, 0, lanes))) > 0.0):
        flash.advance(tile, block, first, count, source, add)


def _cyclic(kernel: Kernel, threads: int, body: object) -> None:
    """``body(first, step)``: each thread takes every ``threads``-th unit, which balances causal work."""
    if threads == 1:
        body(int64(0), 1)  # type: ignore[operator]
    else:
        with kernel.loop(threads, parallel=True) as thread:
            body(thread, threads)  # type: ignore[operator]


def _cached_source(view: CacheView, batch: Expr, head: Expr, block: Expr) -> Source:
    first, dtype = view.kernel.let(floor_div(block, GROUP), "group"), view.desc.dtype

    def scales(buffer: Buffer, of_group: Callable[[Expr, Expr, Expr], Expr]) -> Scales:
        def read(at: Expr, lanes: int) -> Expr:
            group = first + tirx.truncdiv(at, int64(GROUP))
            return load_scales(buffer, of_group(batch, head, group) + tirx.truncmod(at, int64(GROUP)) * 2, lanes)

        return read

    return Source(view.keys, view.values, lambda group: view.key_group(batch, head, first + group),
                  lambda t: view.value_row(batch, head, block + t), dtype if dtype in ("int8", "int4") else "float",
                  (scales(view.keys, view.key_scales), scales(view.values, view.value_scales)) if view.desc.quantized else None)


def _stage_buffers(kernel: Kernel, d: int, width: int) -> tuple[Buffer, Buffer]:
    return kernel.scratch(_BLOCK * d, "float32"), kernel.scratch(_BLOCK * width, "float32")


def _stage(kernel: Kernel, isa: Isa, source: Source, staged: tuple[Buffer, Buffer], part: tuple[Expr, Expr], d: int,
           width: int) -> Source:
    """Widen a part of a block, numbers or codes, to f32 once for all the tiles that read it."""
    keys, values = staged
    lanes, features = isa.lanes, 2 if source.codes == "int4" else 1
    with kernel.range(floor_div(part[0], GROUP), ceil_div(part[1], GROUP)) as group:
        start = kernel.let(source.key(group))
        with kernel.loop(d // features) as e:
            for at in range(0, GROUP, lanes):
                for f, x in enumerate(source.key_vectors(kernel, isa, start + at, e)):
                    kernel.store(keys, group * (GROUP * d) + (e * features + f) * GROUP + at, x)
    with kernel.range(*part) as t, kernel.loop(width // features // lanes) as j:
        for f, x in enumerate(source.value_vectors(kernel, isa, t, [j * lanes])):
            kernel.store(values, t * width + f * (width // 2) + j * lanes, x)
    return Source(keys, values, lambda group: group * (GROUP * d), lambda t: t * width, scales=source.scales)


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
    sink = kernel.param("sink", (h,), "float32") if desc.sink else None
    y = kernel.param("y", (b, 1, h, e), "float32")
    view = flat_view(params)
    q, y = kernel.flat(q), kernel.flat(y)
    sink = kernel.flat(sink) if sink is not None else None
    addend = mask.flat() if mask is not None else None
    width = view.value_width
    # few sequences: threads share the blocks of each, whose parts are merged afterwards; many: there is enough without
    splits = kernel.let(tirx.Select(b * g < 4 * desc.threads, int64(desc.threads), int64(1)), "splits")
    split = splits > 1 if desc.threads > 1 else tirx.const(False, "bool")
    window = desc.scores.window
    bound = ceil_div(view.capacity, _BLOCK) if window is None else int64((window - 1) // _BLOCK + 2)
    most = kernel.let(tirx.Select(split, bound, int64(1)), "most")
    parts = kernel.scratch(b * most * (h * width), "float32")
    largest = kernel.scratch(b * most * h, "float32")
    sums = kernel.scratch(b * most * h, "float32")

    def blocks(position: Expr) -> tuple[Expr, Expr]:
        """The first block that is seen, and how many are."""
        first = kernel.let(floor_div(_begin(kernel, desc.scores, position), _BLOCK), "first")
        return first, kernel.let(minimum(floor_div(position, _BLOCK) + 1 - first, bound), "blocks")

    def thread(first: Expr, last: Expr) -> None:
        flash = Flash(kernel, isa, desc.scores, rows, tiles, _BLOCK, d, e, width)
        with kernel.range(first, last) as unit:
            share = kernel.let(floor_mod(unit, splits), "share")
            head = kernel.let(floor_mod(floor_div(unit, splits), g), "head")
            batch = kernel.let(floor_div(unit, splits * g), "batch")
            position = view.inside(load(past, batch), 1)

            def add(row: Expr, key: Expr, lanes: int) -> Expr:
                assert addend is not None
                return addend.at(batch, head * group + minimum(row, group - 1), int64(0), view.slot(key), lanes)

            def keep(part: Expr) -> None:
                with kernel.loop(group) as row:
                    at = kernel.let((batch * h + head * group + row) * most + part)
                    kernel.store(largest, at, load(flash.largest, row))
                    kernel.store(sums, at, load(flash.sums, row))
                    with kernel.loop(width // isa.lanes) as j:
                        kernel.store(parts, at * width + j * isa.lanes,
                                     load(flash.out, row * width + j * isa.lanes, isa.lanes))

            flash.begin(group, lambda row: (q, (batch * h + head * group + row) * d), lambda row: position, view.turn_keys)
            begin, count = blocks(position)
            with kernel.range(floor_div(share * count, splits), floor_div((share + 1) * count, splits)) as at:
                block = kernel.let((begin + at) * _BLOCK, "block")
                first = _first(kernel, desc.scores, position, block)
                source = _cached_source(view, batch, head, block)
                for tile in range(tiles):
                    part = first, kernel.let(minimum(position + 1 - block, _BLOCK), "count")
                    _advance(flash, tile, block, part, source, add if addend is not None else None, not cache.ring)
                with kernel.when(split):
                    keep(at)
                    flash.clear(group)
            with kernel.when(tirx.Not(split)):
                keep(int64(0))

    kernel.share(desc.threads, b * g * splits, thread)

    def combine(row: Expr) -> None:
        _, count = blocks(view.inside(load(past, floor_div(row, h)), 1))
        count = kernel.let(tirx.Select(split, count, int64(1)), "count")
        best, total = (kernel.registers(1, "float32", 1) for _ in range(2))
        kernel.store(best, 0, minus_infinity(1))
        kernel.store(total, 0, splat(0.0, 1))
        with kernel.loop(count) as i:
            at = kernel.let(row * most + i)
            highest, decay, share = merge(kernel, kernel.let(load(best, 0)), kernel.let(load(largest, at)))
            kernel.store(best, 0, highest)
            kernel.store(total, 0, blend(load(total, 0), decay, load(sums, at), share))
            kernel.store(largest, at, decay)  # from here on: what came before, and this part, are multiplied by
            kernel.store(sums, at, share)
        logit = kernel.let(load(sink, floor_mod(row, h))) if sink is not None else None
        inverse = settle(kernel, kernel.let(load(best, 0)), kernel.let(load(total, 0)), logit)

        def columns(j: Expr, lanes: int) -> None:
            acc = kernel.registers(1, "float32", lanes)
            kernel.store(acc, 0, splat(0.0, lanes))
            with kernel.loop(count) as i:
                at = kernel.let(row * most + i)
                kernel.store(acc, 0, blend(load(acc, 0, lanes), splat(load(largest, at), lanes),
                                           load(parts, at * width + j, lanes), splat(load(sums, at), lanes)))
            kernel.store(y, row * e + j, load(acc, 0, lanes) * splat(inverse, lanes))

        for_vectors(kernel, e, isa.lanes, columns)
        view.turn_values(y, row * e)

    kernel.rows(desc.threads, b * h, most * e, combine)
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
    sink: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are not a multiple of {self.kv_heads} kv heads")

    @property
    def name(self) -> str:
        s, end = self.scores, ("_causal" if self.scores.causal else "") + ("_sink" if self.sink else "")
        return (f"attention_{self.heads}h_{self.kv_heads}x{self.head_dim}x{self.value_dim}_{self.mask}_w{s.window}"
                f"_c{s.softcap}_s{s.scale:.6g}{end}").replace(".", "p").replace("-", "m")


def attention(desc: Attention) -> tirx.PrimFunc:
    """PrimFunc(q f32[b, s, h, d], k f32[b, t, g, d], v f32[b, t, g, e], [mask f32[1 | b, 1 | h, s, t]],
    [sink f32[h]], y f32[b, s, h, e])."""
    isa, h, g, d, e = desc.isa, desc.heads, desc.kv_heads, desc.head_dim, desc.value_dim
    group, width = desc.heads // desc.kv_heads, padded(e, GROUP)
    kernel = Kernel(desc.name)
    b, s, t = symbol("b"), symbol("s"), symbol("t")
    q = kernel.param("q", (b, s, h, d), "float32")
    k = kernel.param("k", (b, t, g, d), "float32")
    v = kernel.param("v", (b, t, g, e), "float32")
    mask = _Mask.param(kernel, desc.mask, b, h, s, t)
    sink = kernel.param("sink", (h,), "float32") if desc.sink else None
    y = kernel.param("y", (b, s, h, e), "float32")
    q, k, v, y = (kernel.flat(x) for x in (q, k, v, y))
    sink = kernel.flat(sink) if sink is not None else None
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

            def logit(row: Expr) -> Expr:
                assert sink is not None
                return load(sink, head_of(row))

            def place(row: Expr) -> Expr:
                return (batch * s + query(row)) * h + head_of(row)

            def position(row: Expr) -> Expr:
                return query(row) + (t - s)

            flash.begin(rows, lambda row: (q, place(row) * d), position)
            begin, end = _begin(kernel, desc.scores, position(int64(0))), t
            if desc.scores.causal:
                end = minimum(position(rows - 1) + 1, t)
            end = kernel.let(end, "end")

            def add(row: Expr, key: Expr, lanes: int) -> Expr:
                row = minimum(row, rows - 1)
                assert addend is not None
                return addend.at(batch, head_of(row), query(row), key, lanes)

            with kernel.range(floor_div(begin, _BLOCK), ceil_div(maximum(end, 0), _BLOCK)) as at:
                block = kernel.let(at * _BLOCK, "block")
                size = kernel.let(minimum(end - block, _BLOCK), "size")
                with kernel.range(maximum(begin - block, 0), size) as key:
                    start = kernel.let((batch * t + block + key) * g + head)
                    base = kernel.let(floor_div(key, GROUP) * (GROUP * d) + floor_mod(key, GROUP))
                    with kernel.loop(d) as j:
                        kernel.store(keys, base + j * GROUP, load(k, start * d + j))
                    for_vectors(kernel, e, isa.lanes, lambda j, lanes: kernel.store(
                        values, key * width + j, load(v, start * e + j, lanes)))
                source = Source(keys, values, lambda part: part * (GROUP * d), lambda row: row * width)
                with kernel.loop(ceil_div(rows, isa.rows)) as tile:
                    first, count = _first(kernel, desc.scores, position(tile * isa.rows), block), size
                    if desc.scores.causal:
                        last = position(minimum(tile * isa.rows + (isa.rows - 1), rows - 1))
                        count = kernel.let(minimum(last + 1 - block, size), "count")
                    with kernel.when(count > first):
                        _advance(flash, tile, block, (first, count), source, add if addend is not None else None, True)
            flash.finish(rows, lambda row: (y, place(row) * e), logit if sink is not None else None)

    _cyclic(kernel, desc.threads, thread)
    return kernel.build()
