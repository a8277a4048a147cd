"""Attention with a running softmax (arXiv:2205.14135) over plain keys and over caches; for one position, split over the keys.

Rows are the queries of one key head, ``position * group + head in group``: all of them read the same keys. A workgroup has a
tile of rows and goes over the keys that one of them sees, a block at a time; each row belongs to a group of threads, which
share the keys of the block and the features of the result. Memory depends on the tile, never on the context. Where there is
one position, workgroups share the keys of a row, and a second launch merges what they found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvm import tirx

from ...cpu.kernels.emit import (
    Buffer,
    Expr,
    Index,
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
    tanh,
)
from ..limits import Limits
from .emit import LOWEST, Kernel, as_f32, clamped, power_of_two, zero
from .tensor import PTX

CHUNK = 256
"""Keys of a workgroup where several share those of a row."""


@dataclass(frozen=True)
class Attention:
    """q [b, s, h, d] over keys [b, c, g, d] and values [b, c, g, e]: of the graph, or caches.

    ``cached``: query i stands at past[b] + i, and c is the capacity; else at i + (c - s). ``ring``: position p is in slot
    p mod c. ``decode``: s is 1, and the keys are shared. ``mask``: "" or a mask of [1 | b, 1 | h, s, c], as its letters say:
    ``f`` is added, ``b`` says what is seen; ``B`` and ``H`` follow, where it has those axes. ``most``: how many keys a query
    sees at most, where that is known.
    """

    limits: Limits
    heads: int
    kv_heads: int
    key: int
    value: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    causal: bool = True
    cached: bool = False
    ring: bool = False
    decode: bool = False
    mask: str = ""
    most: int | None = None
    past: str = "int64"
    dtype: str = "float32"
    stored: str = "float32"
    sink: str = ""
    """Element type of the sink, a logit of each head that takes part in the softmax; "": there is none."""

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def kind(self) -> Literal["split", "whole"]:
        """Whether keys are shared."""
        return "split" if self.decode and (self.most is None or self.most > CHUNK) else "whole"

    @property
    def slow(self) -> str | None:
        """Why many queries are not multiplied on tensor cores; None: they are, by :mod:`.tensor_attention`."""
        if not self.limits.tensor:
            return "the device has none that take f16 and bf16"
        if self.decode:
            return "it has one query"
        if self.dtype not in PTX or self.stored != self.dtype:
            return "its queries are f32" if self.dtype not in PTX else f"its keys are {self.stored}, its queries {self.dtype}"
        if self.key % 16 or self.value % 16 or max(self.key, self.value) > 256:
            return f"its heads have {self.key} and {self.value} features, no multiples of 16 up to 256"
        return None

    @property
    def name(self) -> str:
        over = ("ring" if self.ring else "full") if self.cached else "plain"
        how = f"{self.mask}_" if self.mask else ""
        how += "sink_" if self.sink else ""
        kind = "decode" if self.decode else "attention" if self.slow else "mma_attention"
        return f"{kind}_{self.kind}_{over}_{how}{self.heads}h_{self.kv_heads}x{self.key}x{self.value}"


@dataclass(frozen=True)
class Arrays:
    b: Expr
    s: Index
    c: Expr
    q: Buffer
    past: Buffer | None
    keys: Buffer
    values: Buffer
    mask: Buffer | None
    sink: Buffer | None
    y: Buffer


def arrays(kernel: Kernel, d: Attention) -> Arrays:
    b, c = symbol("b"), symbol("c")
    s: Index = 1 if d.decode else symbol("s")
    q = kernel.param("q", (b, s, d.heads, d.key), d.dtype)
    past = kernel.param("past", (b,), d.past) if d.cached else None
    keys = kernel.param("keys", (b, c, d.kv_heads, d.key), d.stored)
    values = kernel.param("values", (b, c, d.kv_heads, d.value), d.stored)
    shape = (b if "B" in d.mask else 1, d.heads if "H" in d.mask else 1, s, c)
    mask = kernel.param("mask", shape, "bool" if "b" in d.mask else d.dtype) if d.mask else None
    sink = kernel.param("sink", (d.heads,), d.sink) if d.sink else None
    y = kernel.param("y", (b, s, d.heads, d.value), d.dtype)
    flat = [None if x is None else kernel.flat(x) for x in (q, keys, values, mask, y)]
    return Arrays(b, s, c, flat[0], past, flat[1], flat[2], flat[3], sink, flat[4])


def held_before(kernel: Kernel, d: Attention, a: Arrays, batch: Expr) -> Expr:
    """The position of the first query. Where queries stand outside the cache, the caller's mistake, one inside."""
    if a.past is None:
        return kernel.let(a.c - a.s, "held")
    held = kernel.copy(tirx.Cast("int64", load(a.past, batch)) if d.past != "int64" else load(a.past, batch))
    most = int64(1 << 30) if d.ring else maximum(a.c - a.s, 0)
    return kernel.copy(maximum(minimum(held, most), 0))


@dataclass(frozen=True)
class _Tile:
    """How a workgroup is divided: ``rows`` of ``lanes`` threads each; ``block`` keys and ``part`` features at a time."""

    rows: int
    lanes: int
    block: int
    part: int

    @property
    def threads(self) -> int:
        return self.rows * self.lanes


def _tile(d: Attention) -> _Tile:
    rows = power_of_two(min(d.group, 16)) if d.decode else 16
    threads = min(128, d.limits.threads)
    rows = min(rows, threads)
    lanes = threads // rows
    block = max(32, lanes)
    return _Tile(rows, lanes, block, max(8, min(32, 1024 // block)))


def attention(d: Attention) -> tirx.PrimFunc:
    """PrimFunc(q, [past [b]], keys, values, [mask], [sink [h]], y [b, s, h, e])."""
    if d.heads % d.kv_heads:
        raise ValueError(f"{d.heads} heads are not a multiple of {d.kv_heads} key heads")
    kernel = Kernel(d.name, d.limits)
    a = arrays(kernel, d)
    if d.kind == "whole":
        _keys(kernel, d, a, int64(1), None)
        return kernel.build()
    splits = kernel.let(ceil_div(a.c if d.most is None else minimum(a.c, d.most), CHUNK), "splits")
    rows = a.b * d.heads * splits
    largest, sums, out = (kernel.scratch(rows * n, "float32") for n in (1, 1, d.value))
    found = _Found(largest, sums, out, splits)
    _keys(kernel, d, a, splits, found)
    _merge(kernel, d, a, found)
    return kernel.build()


@dataclass(frozen=True)
class _Found:
    """What the parts of a row's keys gave: the largest score, the sum of weights, the weighted values; per row and part."""

    largest: Buffer
    sums: Buffer
    out: Buffer
    splits: Expr

    def at(self, row: Expr, part: Expr) -> Expr:
        return row * self.splits + part


def bounds(kernel: Kernel, d: Attention, held: Expr, first: Index, last: Index, s: Index) -> tuple[Expr, Expr]:
    """The keys, from and to, that queries ``first`` to ``last`` see."""
    end = kernel.copy(held + (last + 1 if d.causal else s))
    return kernel.copy(maximum(held + first - (d.window - 1), 0)) if d.window is not None else int64(0), end


def _keys(kernel: Kernel, d: Attention, a: Arrays, splits: Expr, found: _Found | None) -> None:
    tile, group = _tile(d), d.group
    rows = a.s * group
    tiles = ceil_div(rows, tile.rows)
    with kernel.launch((tiles * a.b * splits, d.kv_heads), tile.threads) as ([unit, head], thread):
        share = kernel.let(floor_mod(unit, splits), "share") if found is not None else int64(0)
        place = kernel.let(floor_div(unit, splits) if found is not None else unit)
        batch, low = kernel.let(floor_div(place, tiles), "batch"), kernel.let(floor_mod(place, tiles) * tile.rows, "low")
        r, c = kernel.let(floor_div(thread, tile.lanes), "r"), kernel.let(floor_mod(thread, tile.lanes), "c")
        held = held_before(kernel, d, a, batch)
        last = minimum(low + (tile.rows - 1), rows - 1)
        begin, end = bounds(kernel, d, held, floor_div(low, group), floor_div(last, group), a.s)
        if found is not None:
            begin = kernel.copy(begin + share * CHUNK)
            end = kernel.copy(minimum(end, begin + CHUNK))

        def query(at: Expr) -> Expr:
            return floor_div(clamped(low + at, rows), group)

        def own_head(at: Expr) -> Expr:
            return head * group + floor_mod(clamped(low + at, rows), group)

        def row_of(at: Expr) -> Expr:
            return (batch * a.s + query(at)) * d.heads + own_head(at)

        def slot(position: Expr) -> Expr:
            return floor_mod(position, a.c) if d.ring else position

        qs, ks = kernel.shared(tile.rows * tile.part), kernel.shared(tile.block * (tile.part + 1))
        ps, memory = kernel.shared(tile.rows * tile.block), kernel.shared(tile.threads)
        each, columns = tile.block // tile.lanes, -(-d.value // tile.lanes)
        scores, out = kernel.registers(each, "float32", 1), kernel.registers(columns, "float32", 1)
        top, total = kernel.registers(1, "float32", 1), kernel.registers(1, "float32", 1)
        kernel.store(top, 0, splat(LOWEST, 1))
        kernel.store(total, 0, zero())
        for j in range(columns):
            kernel.store(out, j, zero())
        position = kernel.let(held + query(r), "position")

        def seen(key: Expr) -> Expr:
            inside = key < end
            if d.causal:
                inside = tirx.And(inside, key <= position)
            if d.window is not None:
                inside = tirx.And(inside, position - key < d.window)
            if a.mask is not None and "b" in d.mask:
                inside = tirx.And(inside, load(a.mask, _mask_at(clamped(key, end))))
            return inside

        def _mask_at(key: Expr) -> Expr:
            lead = batch if "B" in d.mask else int64(0)
            if "H" in d.mask:
                lead = lead * d.heads + own_head(r)
            return (lead * a.s + query(r)) * a.c + slot(key)

        with kernel.loop(ceil_div(maximum(end - begin, 0), tile.block)) as i:
            block = kernel.let(begin + i * tile.block, "block")
            for j in range(each):
                kernel.store(scores, j, zero())
            with kernel.loop(-(-d.key // tile.part)) as part:
                first = kernel.let(part * tile.part, "first")
                kernel.barrier()
                _stage(kernel, tile, thread, tile.rows, d.key, first, qs, tile.part, a.q, lambda at: row_of(at) * d.key)
                _stage(
                    kernel, tile, thread, tile.block, d.key, first, ks, tile.part + 1, a.keys,
                    lambda at: ((batch * a.c + slot(clamped(block + at, end))) * d.kv_heads + head) * d.key,
                )  # fmt: skip
                kernel.barrier()
                with kernel.loop(tile.part) as f:
                    x = kernel.copy(load(qs, r * tile.part + f))
                    for j in range(each):
                        y = load(ks, (c + j * tile.lanes) * (tile.part + 1) + f)
                        kernel.store(scores, j, load(scores, j) + x * y)
            highest = kernel.registers(1, "float32", 1)
            kernel.store(highest, 0, splat(LOWEST, 1))
            for j in range(each):
                key = kernel.let(block + c + j * tile.lanes, "key")
                x = kernel.copy(load(scores, j) * splat(d.scale, 1))
                if d.softcap is not None:
                    x = kernel.copy(tanh(kernel, kernel.copy(x / splat(d.softcap, 1))) * splat(d.softcap, 1))
                if a.mask is not None and "f" in d.mask:
                    x = kernel.copy(x + as_f32(load(a.mask, _mask_at(clamped(key, end)))))
                kernel.store(scores, j, tirx.Select(seen(key), x, splat(LOWEST, 1)))
                kernel.store(highest, 0, tirx.max(load(highest, 0), load(scores, j)))
            kernel.reduce([memory], thread, c, tile.lanes, [load(highest, 0)], tirx.max)
            before = kernel.copy(load(top, 0))
            kernel.store(top, 0, tirx.max(before, load(memory, r * tile.lanes)))
            decay = kernel.copy(exp(kernel, kernel.copy(before - load(top, 0))))
            kernel.store(total, 0, load(total, 0) * decay)
            for j in range(each):
                key = kernel.let(block + c + j * tile.lanes, "key")
                weight = exp(kernel, kernel.copy(load(scores, j) - load(top, 0)))
                weight = kernel.copy(tirx.Select(seen(key), weight, zero()))
                kernel.store(total, 0, load(total, 0) + weight)
                kernel.store(ps, r * tile.block + c + j * tile.lanes, weight)
            kernel.barrier()
            for j in range(columns):
                kernel.store(out, j, load(out, j) * decay)
            with kernel.loop(minimum(end - block, tile.block)) as t:
                weight = kernel.copy(load(ps, r * tile.block + t))
                base = kernel.copy(((batch * a.c + slot(block + t)) * d.kv_heads + head) * d.value)
                for j in range(columns):
                    e = c + j * tile.lanes
                    at = base + (e if (j + 1) * tile.lanes <= d.value else clamped(e, d.value))
                    kernel.store(out, j, load(out, j) + weight * as_f32(load(a.values, at)))
        kernel.barrier()
        kernel.reduce([memory], thread, c, tile.lanes, [load(total, 0)], lambda a, b: a + b)
        sums = kernel.copy(load(memory, r * tile.lanes))
        factor = settled(kernel, a, own_head(r), load(top, 0), sums) if found is None else None
        with kernel.when(low + r < rows):
            row = kernel.let(row_of(r), "row")
            if found is not None:
                with kernel.when(c < 1):
                    kernel.store(found.largest, found.at(row, share), load(top, 0))
                    kernel.store(found.sums, found.at(row, share), sums)
            for j in range(columns):
                e = c + j * tile.lanes
                with kernel.when(e < d.value):
                    if found is not None:
                        kernel.store(found.out, found.at(row, share) * d.value + e, load(out, j))
                    else:
                        kernel.put(a.y, row * d.value + e, load(out, j) * factor)


def settled(kernel: Kernel, a: Arrays, head: Expr, top: Expr, total: Expr) -> Expr:
    """What weighted values are multiplied by: 1 / the sum of weights, a sink's among them. Seeing nothing gives 0."""
    share = splat(1.0, 1)
    if a.sink is not None:
        sink = kernel.copy(as_f32(load(a.sink, head)))
        highest = kernel.copy(tirx.max(top, sink))
        share = kernel.copy(exp(kernel, kernel.copy(top - highest)))
        total = kernel.copy(total * share + exp(kernel, kernel.copy(sink - highest)))
    return kernel.copy(share / tirx.Select(tirx.EQ(total, zero()), splat(1.0, 1), total))


def _stage(
    kernel: Kernel, tile: _Tile, thread: Expr, rows: int, width: int, first: Expr, memory: Buffer, pitch: int, source: Buffer,
    start: object,
) -> None:  # fmt: skip
    """Features ``first`` and on of ``rows`` rows into workgroup memory, zeros behind the last one."""
    for at in kernel.strided(thread, tile.threads, rows * tile.part):
        row, f = kernel.let(floor_div(at, tile.part)), kernel.let(floor_mod(at, tile.part))
        inside = None if width % tile.part == 0 else first + f < width
        place = start(row) + (first + f if inside is None else clamped(first + f, width))  # type: ignore[operator]
        kernel.store(memory, row * pitch + f, kernel.kept(inside, as_f32(load(source, place))))


def _merge(kernel: Kernel, d: Attention, a: Arrays, found: _Found) -> None:
    """The parts of each row as one."""
    with kernel.each(a.b * (d.heads * d.value)) as at:
        row, e = kernel.let(floor_div(at, d.value), "row"), kernel.let(floor_mod(at, d.value), "e")
        held = held_before(kernel, d, a, floor_div(row, d.heads))
        begin, end = bounds(kernel, d, held, 0, 0, a.s)
        parts = kernel.copy(minimum(ceil_div(maximum(end - begin, 0), CHUNK), found.splits))
        top, total, out = (kernel.registers(1, "float32", 1) for _ in range(3))
        kernel.store(top, 0, splat(LOWEST, 1))
        kernel.store(total, 0, zero())
        kernel.store(out, 0, zero())
        with kernel.loop(parts) as part:
            kernel.store(top, 0, tirx.max(load(top, 0), load(found.largest, found.at(row, part))))
        with kernel.loop(parts) as part:
            place = kernel.let(found.at(row, part), "place")
            share = kernel.copy(exp(kernel, kernel.copy(load(found.largest, place) - load(top, 0))))
            kernel.store(total, 0, load(total, 0) + load(found.sums, place) * share)
            kernel.store(out, 0, load(out, 0) + load(found.out, place * d.value + e) * share)
        factor = settled(kernel, a, floor_mod(row, d.heads), load(top, 0), load(total, 0))
        kernel.put(a.y, at, load(out, 0) * factor)
