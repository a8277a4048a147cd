"""Attention of many queries on NVIDIA's tensor cores: ``mma.sync.m16n8k16``, f16 or bf16, sums in f32 (arXiv:2307.08691).

Rows are those of :mod:`.attention`. A warp has sixteen of them, its queries in registers all along; keys and values go through
workgroup memory, copied (``cp.async``) a block at a time: values while queries meet the keys, the next keys while weights meet
the values. Scores never leave the registers: as the sums of one product they lie where the weights of the next one are wanted.
The weights, at most 1, are rounded to the type of the values; their sum is taken before that.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from ...cpu.kernels.emit import Buffer, Expr, ceil_div, floor_div, floor_mod, int64, load, maximum, minimum, splat, tanh
from .attention import Arrays, Attention, arrays, bounds, held_before, settled
from .emit import LOWEST, Kernel, as_f32, clamped, zero
from .formats import OCTET
from .tensor import PTX, at_place, call

WARPS = 4
ROWS = 16 * WARPS
"""Of a workgroup."""
_PAD = 8
"""Elements behind each row in workgroup memory: eight rows that a warp reads together lie in different banks."""


def tensor_attention(d: Attention) -> tirx.PrimFunc:
    """PrimFunc(q, [past [b]], keys, values, [mask], [sink [h]], y [b, s, h, e]), as :func:`.attention.attention`."""
    kernel = Kernel(d.name, d.limits)
    _Attention(kernel, d, arrays(kernel, d)).launch()
    return kernel.build()


def _block(d: Attention) -> int:
    """Keys at a time: what fits beside their values into 48 KiB, and their scores into registers."""
    return 64 if max(d.key, d.value) <= 128 else 32


@dataclass(frozen=True)
class _Row:
    """One of the two rows of a warp's sixteen that a lane has a part of."""

    inside: Expr
    query: Expr
    head: Expr
    place: Expr
    """Of the row among those of y."""


class _Attention:
    def __init__(self, kernel: Kernel, d: Attention, a: Arrays) -> None:
        self.kernel, self.d, self.a, self.block, self.ptx = kernel, d, a, _block(d), PTX[d.dtype]
        self.keys_pitch, self.values_pitch = d.key + _PAD, d.value + _PAD

    def launch(self) -> None:
        kernel, d, a, block = self.kernel, self.d, self.a, self.block
        rows = a.s * d.group
        tiles = ceil_div(rows, ROWS)
        with kernel.launch((tiles * a.b, d.kv_heads), 32 * WARPS) as ([unit, head], thread):
            self.thread, self.kv_head, self.rows = thread, head, rows
            self.batch, self.low = kernel.let(floor_div(unit, tiles), "batch"), kernel.let(floor_mod(unit, tiles) * ROWS, "low")
            self.lane, warp = kernel.let(floor_mod(thread, 32), "lane"), kernel.let(floor_div(thread, 32), "warp")
            held = held_before(kernel, d, a, self.batch)
            last = minimum(self.low + (ROWS - 1), rows - 1)
            begin, end = bounds(kernel, d, held, floor_div(self.low, d.group), floor_div(last, d.group), a.s)
            self.end = end
            size = max(ROWS * self.keys_pitch, block * (self.keys_pitch + self.values_pitch))
            self.memory = kernel.shared(size, "uint16")  # the queries', then keys and behind them values
            queries = self._queries(warp)
            first = kernel.let(self.low + warp * 16 + floor_div(self.lane, 4), "first")
            self.own = [self._row(first), self._row(kernel.let(first + 8))]
            self.positions = [kernel.let(held + r.query, "position") for r in self.own]
            out = self._zeros(d.value // 8 * 4)
            top, total = kernel.registers(2, "float32", 1), self._zeros(2)
            for i in range(2):
                kernel.store(top, i, splat(LOWEST, 1))
            blocks = kernel.copy(ceil_div(maximum(end - begin, 0), block))
            with kernel.when(blocks > 0):
                self._fetch(a.keys, d.key, begin, int64(0), self.keys_pitch)
            with kernel.loop(blocks) as i:
                key = kernel.let(begin + i * block, "key")
                self._arrived()
                self._fetch(a.values, d.value, key, int64(block * self.keys_pitch), self.values_pitch)
                scores = self._scores(queries)
                decays = self._weights(scores, key, top, total)
                self._arrived()
                with kernel.when(i + 1 < blocks):
                    self._fetch(a.keys, d.key, key + block, int64(0), self.keys_pitch)
                self._add_values(scores, out, decays)
            self._write(out, top, total)

    def _zeros(self, count: int) -> Buffer:
        made = self.kernel.registers(count, "float32", 1)
        for i in range(count):
            self.kernel.store(made, i, zero())
        return made

    def _row(self, at: Expr) -> _Row:
        kernel, d, a = self.kernel, self.d, self.a
        row = clamped(at, self.rows)
        query, head = kernel.copy(floor_div(row, d.group)), kernel.copy(self.kv_head * d.group + floor_mod(row, d.group))
        return _Row(at < self.rows, query, head, kernel.copy((self.batch * a.s + query) * d.heads + head))

    # -- workgroup memory ---------------------------------------------------------------------------------------------------
    def _queries(self, warp: Expr) -> Buffer:
        """The fragments of a warp's queries."""
        kernel, d, pitch = self.kernel, self.d, self.keys_pitch
        octets = d.key // OCTET
        with kernel.loop(ROWS * octets // (32 * WARPS)) as i:
            at = kernel.let(i * (32 * WARPS) + self.thread, "at")
            r, octet = kernel.let(floor_div(at, octets), "r"), kernel.let(floor_mod(at, octets), "octet")
            self._copy(r * pitch + octet * OCTET, self.a.q, self._row(self.low + r).place * d.key + octet * OCTET)
        self._arrived()
        made = kernel.registers(d.key // 4, "uint32", 1)
        place = kernel.copy((warp * 16 + floor_mod(self.lane, 16)) * pitch + floor_div(self.lane, 16) * 8)
        for step in range(d.key // 16):
            call(kernel, "wasat_fragments", at_place(made, int64(step * 4)), at_place(self.memory, place + step * 16))
        kernel.barrier()
        return made

    def _fetch(self, source: Buffer, width: int, first: Expr, to: Expr, pitch: int) -> None:
        """A block of keys or values, from key ``first`` on; what stands behind the last key is that again."""
        kernel, d, a = self.kernel, self.d, self.a
        octets = width // OCTET
        with kernel.loop(self.block * octets // (32 * WARPS)) as i:
            at = kernel.let(i * (32 * WARPS) + self.thread, "at")
            r, octet = kernel.let(floor_div(at, octets), "r"), kernel.let(floor_mod(at, octets), "octet")
            place = self.batch * a.c + self._slot(clamped(first + r, self.end))
            self._copy(to + r * pitch + octet * OCTET, source, (place * d.kv_heads + self.kv_head) * width + octet * OCTET)

    def _copy(self, to: Expr, source: Buffer, begin: Expr) -> None:
        data, always = tirx.buffer.buffer_data(source), tirx.IntImm("int32", 1)
        call(self.kernel, "wasat_copy", at_place(self.memory, to), data, begin, always)

    def _arrived(self) -> None:
        call(self.kernel, "wasat_copied")
        self.kernel.barrier()

    def _slot(self, position: Expr) -> Expr:
        return floor_mod(position, self.a.c) if self.d.ring else position

    # -- products -----------------------------------------------------------------------------------------------------------
    def _mma(self, sums: Buffer, at: int, a: Buffer, a_at: int, b: Buffer, b_at: int) -> None:
        places = [at_place(x, int64(i)) for x, i in ((sums, at), (a, a_at), (b, b_at))]
        call(self.kernel, f"wasat_mma_{self.ptx}", *places)

    def _scores(self, queries: Buffer) -> Buffer:
        """Of each eight keys four numbers: two neighbours of row lane / 4, and of the row eight below."""
        kernel, lane, pitch = self.kernel, self.lane, self.keys_pitch
        scores = self._zeros(self.block // 2)
        key = floor_div(lane, 16) * 8 + floor_mod(lane, 8)
        place = kernel.copy(key * pitch + floor_mod(floor_div(lane, 8), 2) * 8)
        for step in range(self.d.key // 16):
            for j in range(0, self.block, 16):
                keys = kernel.registers(4, "uint32", 1)
                source = at_place(self.memory, place + (j * pitch + step * 16))
                call(kernel, "wasat_fragments", at_place(keys, int64(0)), source)
                for half in range(2):
                    self._mma(scores, (j // 8 + half) * 4, queries, step * 4, keys, half * 2)
        return scores

    def _weights(self, scores: Buffer, key: Expr, top: Buffer, total: Buffer) -> list[Expr]:
        """Scores become weights; returns by what the sums of the two rows shrink."""
        kernel, d, a, decays = self.kernel, self.d, self.a, []
        column = kernel.copy(key + floor_mod(self.lane, 4) * 2)
        highest = kernel.registers(2, "float32", 1)
        for row in range(2):
            kernel.store(highest, row, load(top, row))
        for i in range(self.block // 2):
            row = i % 4 // 2
            own, at = self.own[row], kernel.let(column + (i // 4 * 8 + i % 2))
            x = kernel.copy(load(scores, i) * splat(d.scale, 1))
            if d.softcap is not None:
                x = kernel.copy(tanh(kernel, kernel.copy(x / splat(d.softcap, 1))) * splat(d.softcap, 1))
            seen = at < self.end
            if d.causal:
                seen = tirx.And(seen, at <= self.positions[row])
            if d.window is not None:
                seen = tirx.And(seen, self.positions[row] - at < d.window)
            if a.mask is not None:
                lead = self.batch if "B" in d.mask else int64(0)
                lead = lead * d.heads + own.head if "H" in d.mask else lead
                known = load(a.mask, (lead * a.s + own.query) * a.c + self._slot(clamped(at, self.end)))
                if "b" in d.mask:
                    seen = tirx.And(seen, known)
                else:
                    x = kernel.copy(x + as_f32(known))
            # not the lowest number: a mask may add that to what is seen
            kernel.store(scores, i, tirx.Select(seen, x, splat(-float("inf"), 1)))
            kernel.store(highest, row, tirx.max(load(highest, row), load(scores, i)))
        for row in range(2):
            now = kernel.copy(tirx.call_extern("float32", "wasat_quad_max", load(highest, row)))
            decays.append(kernel.copy(self._exp(load(top, row) - now)))
            kernel.store(top, row, now)
            kernel.store(total, row, load(total, row) * decays[row])
        for i in range(self.block // 2):
            row = i % 4 // 2
            kernel.store(scores, i, self._exp(load(scores, i) - load(top, row)))
            kernel.store(total, row, load(total, row) + load(scores, i))
        return decays

    def _exp(self, x: Expr) -> Expr:
        return tirx.call_extern("float32", "wasat_exp2", x * splat(1.4426950408889634, 1))

    def _add_values(self, weights: Buffer, out: Buffer, decays: list[Expr]) -> None:
        kernel, d, lane, pitch = self.kernel, self.d, self.lane, self.values_pitch
        for i in range(d.value // 8 * 4):
            kernel.store(out, i, load(out, i) * decays[i % 4 // 2])
        key = floor_mod(floor_div(lane, 8), 2) * 8 + floor_mod(lane, 8)
        place = kernel.copy(key * pitch + floor_div(lane, 16) * 8 + self.block * self.keys_pitch)
        for j in range(0, self.block, 16):
            rounded = kernel.registers(4, "uint32", 1)
            for i in range(4):
                pair = [load(weights, j // 2 + i * 2 + e) for e in range(2)]
                kernel.store(rounded, i, tirx.call_extern("uint32", f"wasat_pair_{self.ptx}", *pair))
            for e in range(0, d.value, 16):
                values = kernel.registers(4, "uint32", 1)
                source = at_place(self.memory, place + (j * pitch + e))
                call(kernel, "wasat_fragments_across", at_place(values, int64(0)), source)
                for half in range(2):
                    self._mma(out, (e // 8 + half) * 4, rounded, 0, values, half * 2)

    def _write(self, out: Buffer, top: Buffer, total: Buffer) -> None:
        kernel, d = self.kernel, self.d
        column = kernel.let(floor_mod(self.lane, 4) * 2, "column")
        for row, own in enumerate(self.own):
            sums = kernel.copy(tirx.call_extern("float32", "wasat_quad_sum", load(total, row)))
            factor = settled(kernel, self.a, own.head, load(top, row), sums)
            with kernel.when(own.inside):
                for e in range(d.value // 8):
                    for i in range(2):
                        place = own.place * d.value + (column + (e * 8 + i))
                        kernel.put(self.a.y, place, load(out, e * 4 + row * 2 + i) * factor)
