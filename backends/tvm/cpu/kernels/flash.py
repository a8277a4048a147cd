"""Attention of a few query rows over blocks of keys with a running softmax: what every attention kernel is made of.

A block begins at a multiple of its size whoever sees it: what it gives a row (the largest score, the sum of weights, the
weighted values) is merged in the order of blocks. So a row's result is the same bits in any batch and any chunking, in prefill
and in decoding, where threads share the blocks of a row.
Rows of one kv head are numbered ``position * group + head in group``, so that grouped queries share each key read.
Memory depends on the tile, never on the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tvm import tirx

from .cache import GROUP
from .emit import (
    Buffer,
    Expr,
    Index,
    Kernel,
    bits,
    ceil_div,
    exp,
    floor_div,
    int64,
    intrinsic,
    load,
    minimum,
    reduce_max,
    reduce_sum,
    splat,
    splat_int,
    tanh,
    vector,
    widen,
)
from .isa import Isa
from .norm import for_vectors
from .pack import padded
from .rounding import load_codes, load_pairs

_MINUS_INFINITY = -(1 << 23)  # 0xff800000


def minus_infinity(lanes: int) -> Expr:
    return splat(bits("float32", tirx.IntImm("int32", _MINUS_INFINITY)), lanes)


def merge(kernel: Kernel, before: Expr, local: Expr) -> tuple[Expr, Expr, Expr]:
    """Of two largest scores: the larger one, and what the sums behind the first and behind the second are multiplied by."""
    largest = kernel.let(tirx.max(before, local))
    # a row that has seen nothing stays at minus infinity without producing inf - inf
    finite = tirx.Select(largest > minus_infinity(1), largest, splat(0.0, 1))
    less = kernel.let(exp(kernel, kernel.let(tirx.min(before, local) - finite)))
    rises, one = local > before, splat(1.0, 1)
    return largest, kernel.let(tirx.Select(rises, less, one)), kernel.let(tirx.Select(rises, one, less))


def settle(kernel: Kernel, largest: Expr, total: Expr, sink: Expr | None) -> Expr:
    """What weighted values are multiplied by in the end: 1 / the sum of weights, of which a ``sink``, a logit, has its part;
    0 for a row that saw nothing."""
    left = splat(1.0, 1)
    if sink is not None:
        _, left, share = merge(kernel, largest, sink)
        total = kernel.let(blend(total, left, splat(1.0, 1), share))
    return kernel.let(tirx.Select(largest > minus_infinity(1), left / total, splat(0.0, 1)))


def blend(before: Expr, decay: Expr, local: Expr, share: Expr) -> Expr:
    """before * decay + local * share, rounded alike wherever it stands."""
    dtype = str(local.ty.dtype)
    name = "llvm.fmuladd." + (dtype.replace("float32x", "v") + "f32" if "x" in dtype else "f32")
    return intrinsic(dtype, name, local, share, before * decay)


Scales = Callable[[Expr, int], Expr]
"""Scales of so many positions of a group, from one on."""
Turn = Callable[[Buffer, Expr], None]
"""Turns a row in place: a buffer, and where the row starts."""


@dataclass(frozen=True)
class Scores:
    """How a score is made: softcap * tanh(scale * q.k / softcap), seen if key <= row and row - key < window."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    causal: bool = True


@dataclass
class Source:
    """Where the keys and values of a block are: flat buffers, f32 or f16, or bytes that are ``codes``.

    ``key(group)``: start of 16 transposed positions, ``value(t)``: start of a row; both counted from the block's start.
    ``scales(at, lanes)``: of keys, and of values, the scales of ``lanes`` positions of a group, from ``at``; None: they are 1.
    Sums are made of codes, in f32, and multiplied by scales last: so the same bits come from codes that were widened before.
    """

    keys: Buffer
    values: Buffer
    key: Callable[[Expr], Expr]
    value: Callable[[Expr], Expr]
    codes: Literal["float", "int8", "int4"] = "float"
    scales: tuple[Scales, Scales] | None = None

    def key_vectors(self, kernel: Kernel, isa: Isa, start: Expr, e: Expr) -> list[Expr]:
        """Vectors of the positions from ``start`` on: of feature ``e``; of codes in pairs, of features 2e and 2e + 1."""
        return self._vectors(kernel, isa, self.keys, start + e * GROUP)

    def _vectors(self, kernel: Kernel, isa: Isa, buffer: Buffer, at: Expr) -> list[Expr]:
        if self.codes == "int4":
            return [kernel.let(x) for x in load_pairs(kernel, buffer, at, isa.lanes)]
        return [kernel.let(load_codes(buffer, at, isa.lanes) if self.codes == "int8" else
                           widen(load(buffer, at, isa.lanes), isa.native_f16))]

    def value_vectors(self, kernel: Kernel, isa: Isa, t: Expr, columns: Sequence[Expr]) -> list[Expr]:
        """Vectors of the value of position ``t`` from each of ``columns`` on; of codes in pairs two, half a row apart."""
        row = kernel.let(self.value(t), "row")
        return [x for at in columns[: 1 if self.codes == "int4" else None]
                for x in self._vectors(kernel, isa, self.values, row + at)]


class Flash:
    """The state of ``tiles`` tiles of ``rows`` query rows, and the code that advances it by a block of keys."""

    def __init__(self, kernel: Kernel, isa: Isa, scores: Scores, rows: int, tiles: int, block: int, head_dim: int,
                 value_dim: int, value_width: int | None = None) -> None:
        if block % (2 * GROUP):
            raise ValueError(f"a block must be a multiple of {2 * GROUP}, not {block}")
        self.kernel, self.isa, self.desc = kernel, isa, scores
        self.rows, self.tiles, self.block = rows, tiles, block
        self.head_dim, self.value_dim, self.value_width = head_dim, value_dim, value_width or padded(value_dim, GROUP)
        total = rows * tiles
        self.queries = kernel.scratch(total * head_dim, "float32")
        self.out = kernel.scratch(total * self.value_width, "float32")
        self.largest = kernel.scratch(total, "float32")
        self.sums = kernel.scratch(total, "float32")
        self.positions = kernel.scratch(total, "int32")
        self.strip = kernel.scratch(rows * block, "float32")
        self.decay, self.share = (kernel.scratch(rows, "float32") for _ in range(2))

    def begin(self, rows: Index, query: Callable[[Expr], tuple[Buffer, Expr]],
              position: Callable[[Expr], Expr], turn: Turn | None = None) -> None:
        """Load the scaled queries of ``rows`` rows (at most rows * tiles) and clear the state; ``query(row)`` is a
        flat buffer and where to start in it. Rows up to the end of the last tile repeat the last row. ``turn``: each query."""
        kernel, d, lanes = self.kernel, self.head_dim, self.isa.lanes
        with kernel.loop(ceil_div(rows, self.rows) * self.rows) as i:
            row = kernel.let(minimum(i, int64(rows) - 1))
            buffer, start = query(row)
            start = kernel.let(start)
            scale = self.desc.scale

            def copy(j: Expr, width: int, i: Expr = i, buffer: Buffer = buffer, start: Expr = start) -> None:
                kernel.store(self.queries, i * d + j, load(buffer, start + j, width) * splat(scale, width))

            for_vectors(kernel, d, lanes, copy)
            if turn is not None:
                turn(self.queries, i * d)
            kernel.store(self.positions, i, tirx.Cast("int32", position(row)))
        self.clear(rows)

    def clear(self, rows: Index) -> None:
        """Forget the keys seen so far."""
        kernel, lanes = self.kernel, self.isa.lanes
        with kernel.loop(ceil_div(rows, self.rows) * self.rows) as i:
            with kernel.loop(self.value_width // lanes) as j:
                kernel.store(self.out, i * self.value_width + j * lanes, splat(0.0, lanes))
            kernel.store(self.largest, i, minus_infinity(1))
            kernel.store(self.sums, i, splat(0.0, 1))

    def advance(self, tile: Index, start: Expr, first: Expr, count: Expr, source: Source,
                mask: Callable[[Expr, Expr, int], Expr] | None = None) -> None:
        """Let a tile see the keys start + first..start + count (count <= block).

        ``start``: a multiple of the block's size. ``first``: a multiple of 32 below the count, before which no row sees a key.
        ``mask(row of all tiles, key, width)`` gives addends for keys below the count; minus infinity hides whatever the score.
        """
        kernel = self.kernel
        steps = floor_div(first, 2 * self.isa.lanes), kernel.let(ceil_div(count, 2 * self.isa.lanes), "steps")
        self._scores(tile, steps, source)
        with kernel.loop(self.rows) as i:
            self._softmax(kernel.let(int64(tile) * self.rows + i), i, start, (first, count), steps, source, mask)
        self._weigh(tile, first, count, source)

    def _scores(self, tile: Index, steps: tuple[Expr, Expr], source: Source) -> None:
        kernel, lanes, d = self.kernel, self.isa.lanes, self.head_dim
        with kernel.range(*steps) as step:
            starts = []
            for v in range(2):
                at = step * (2 * lanes) + v * lanes
                group = tirx.truncdiv(at, int64(GROUP))
                starts.append(kernel.let(source.key(group) + tirx.truncmod(at, int64(GROUP)), "start"))
            acc = kernel.registers(self.rows * 2, "float32", lanes)
            for j in range(self.rows * 2):
                kernel.store(acc, j * lanes, splat(0.0, lanes))
            base = kernel.let(int64(tile) * (self.rows * d), "base")
            features = 2 if source.codes == "int4" else 1
            with kernel.loop(d // features) as e:
                keys = [source.key_vectors(kernel, self.isa, start, e) for start in starts]
                for f in range(features):
                    for i in range(self.rows):
                        q = splat(load(self.queries, base + (i * d + f) + e * features), lanes)
                        for v in range(2):
                            at = (i * 2 + v) * lanes
                            kernel.store(acc, at, load(acc, at, lanes) + q * keys[v][f])
            scales = None
            if source.scales is not None:
                scales = [kernel.let(source.scales[0](step * (2 * lanes) + v * lanes, lanes)) for v in range(2)]
            for i in range(self.rows):
                for v in range(2):
                    score = load(acc, (i * 2 + v) * lanes, lanes)
                    kernel.store(self.strip, step * (2 * lanes) + (i * self.block + v * lanes),
                                 score if scales is None else score * scales[v])

    def _softmax(self, row: Expr, i: Expr, start: Expr, keys: tuple[Expr, Expr], steps: tuple[Expr, Expr],
                 source: Source, mask: Callable[[Expr, Expr, int], Expr] | None) -> None:
        kernel, lanes, desc = self.kernel, self.isa.lanes, self.desc
        strip = kernel.let(i * self.block)
        if mask is not None:
            with kernel.range(*keys) as j:
                added = kernel.let(mask(row, start + j, 1))
                score = self._capped(load(self.strip, strip + j)) + added  # what is hidden may be NaN
                kernel.store(self.strip, strip + j, tirx.Select(added > minus_infinity(1), score, added))
        position = load(self.positions, row)
        # keys seen, counted from the block's start: first..last
        last = tirx.Cast("int32", keys[1]) - splat_int(1, 1)
        if desc.causal:
            last = tirx.min(last, position - tirx.Cast("int32", start))
        last = splat(kernel.let(last), lanes)
        first = None
        if desc.window is not None:
            first = splat(kernel.let(position - tirx.Cast("int32", start) - splat_int(desc.window - 1, 1)), lanes)
        best = kernel.registers(1, "float32", lanes)
        kernel.store(best, 0, minus_infinity(lanes))
        ends = [kernel.let(2 * end) for end in steps]
        with kernel.range(*ends) as step:
            at = kernel.let(strip + step * lanes)
            score = load(self.strip, at, lanes)
            score = kernel.let(score if mask is not None else self._capped(score))
            key = tirx.Ramp(tirx.Cast("int32", step * lanes), splat_int(1, 1), lanes)
            seen = key <= last
            if first is not None:
                seen = tirx.And(seen, key >= first) if lanes == 1 else (seen & (key >= first))
            score = kernel.let(tirx.Select(seen, score, minus_infinity(lanes)))
            kernel.store(self.strip, at, score)
            kernel.store(best, 0, tirx.max(load(best, 0, lanes), score))
        local = kernel.let(reduce_max(kernel.let(load(best, 0, lanes))))
        finite = kernel.let(tirx.Select(local > minus_infinity(1), local, splat(0.0, 1)))
        total = kernel.registers(1, "float32", lanes)
        kernel.store(total, 0, splat(0.0, lanes))
        with kernel.range(*ends) as step:
            at = kernel.let(strip + step * lanes)
            p = exp(kernel, load(self.strip, at, lanes) - splat(finite, lanes))
            kernel.store(total, 0, load(total, 0, lanes) + p)
            kernel.store(self.strip, at, p if source.scales is None else p * source.scales[1](step * lanes, lanes))
        added = kernel.let(reduce_sum(kernel.let(load(total, 0, lanes))))
        largest, decay, share = merge(kernel, kernel.let(load(self.largest, row)), local)
        kernel.store(self.sums, row, blend(load(self.sums, row), decay, added, share))
        kernel.store(self.largest, row, largest)
        kernel.store(self.decay, i, decay)
        kernel.store(self.share, i, share)

    def _capped(self, score: Expr) -> Expr:
        cap = self.desc.softcap
        if cap is None:
            return score
        lanes = int(str(score.ty.dtype).split("x")[1]) if "x" in str(score.ty.dtype) else 1
        return tanh(self.kernel, self.kernel.let(score * splat(1.0 / cap, lanes))) * splat(cap, lanes)

    def _weigh(self, tile: Index, first: Expr, count: Expr, source: Source) -> None:
        kernel, lanes, width = self.kernel, self.isa.lanes, self.value_width
        base = kernel.let(int64(tile) * (self.rows * width), "base")

        def columns(starts: Sequence[Expr]) -> None:
            vectors = len(starts)
            acc = kernel.registers(self.rows * vectors, "float32", lanes)
            for i in range(self.rows * vectors):
                kernel.store(acc, i * lanes, splat(0.0, lanes))
            with kernel.range(first, count) as t:
                values = source.value_vectors(kernel, self.isa, t, starts)
                for i in range(self.rows):
                    p = splat(load(self.strip, t + i * self.block), lanes)
                    for v in range(vectors):
                        j = (i * vectors + v) * lanes
                        kernel.store(acc, j, load(acc, j, lanes) + p * values[v])
            for i in range(self.rows):
                decay, share = splat(load(self.decay, i), lanes), splat(load(self.share, i), lanes)
                for v, at in enumerate(starts):
                    to = base + at + i * width
                    local = load(acc, (i * vectors + v) * lanes, lanes)
                    kernel.store(self.out, to, blend(load(self.out, to, lanes), decay, local, share))

        if source.codes == "int4":
            with kernel.loop(width // 2 // lanes) as j:
                columns([j * lanes, j * lanes + width // 2])
            return
        pairs, odd = divmod(width // lanes, 2)
        with kernel.loop(pairs) as pair:
            columns([pair * (2 * lanes), pair * (2 * lanes) + lanes])
        if odd:
            columns([int64(pairs * 2 * lanes)])

    def finish(self, rows: Index, target: Callable[[Expr], tuple[Buffer, Expr]],
               sink: Callable[[Expr], Expr] | None = None, turn: Turn | None = None) -> None:
        """Write softmax-weighted values of each row; a row that saw nothing gives 0. ``sink(row)``: see ``settle``.
        ``turn``: each row that was written."""
        kernel = self.kernel
        with kernel.loop(rows) as i:
            buffer, start = target(i)
            start = kernel.let(start)
            logit = kernel.let(sink(i)) if sink is not None else None
            inverse = settle(kernel, kernel.let(load(self.largest, i)), kernel.let(load(self.sums, i)), logit)

            def copy(j: Expr, width: int, i: Expr = i, buffer: Buffer = buffer, start: Expr = start,
                     inverse: Expr = inverse) -> None:
                kernel.store(buffer, start + j, load(self.out, i * self.value_width + j, width) * splat(inverse, width))

            for_vectors(kernel, self.value_dim, self.isa.lanes, copy)
            if turn is not None:
                turn(buffer, start)


__all__ = ["Flash", "Scores", "Source", "blend", "merge", "minus_infinity", "settle", "vector"]
