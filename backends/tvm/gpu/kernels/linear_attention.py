"""Linear attention token after token, the state in registers from the first to the last.

Columns of a state do not depend on each other: what a token writes into one is its value's element, less what the key reads
there under the delta rule. A workgroup has some columns of a head; each of them lies in the registers of a group of threads,
by rows. What threads sum over the rows meets in workgroup memory. State and tokens are read once and written once, of one
token as of many: beside blocks of tokens as the CPU's kernel has them, as many multiplications, no scores, and barriers at
each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tvm import tirx

from ...cpu.kernels.emit import Buffer, Expr, exp, floor_div, floor_mod, int64, load, splat, symbol
from ..limits import Limits
from .emit import Kernel, as_f32, clamped, power_of_two, zero

LANES = 8
"""Threads that have a column."""
THREADS = 128


@dataclass(frozen=True)
class LinearAttention:
    """q [b, s, h, d], k [b, s, g, d], v [b, s, g, e] and a state [b, g, d, e]; see ``linear_attention`` of the IR.

    ``decay``: per head or per feature of the keys; ``log``: by its logarithm. ``begins``: the state of a row that holds nothing
    yet (``past`` is 0) is taken for zeros, whatever is in it. ``in_place``: the new state is written over the old one.
    """

    limits: Limits
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    decay: Literal["no", "head", "feature"] = "no"
    delta: bool = False
    scale: float = 1.0
    log: bool = True
    before: bool = False
    begins: bool = False
    in_place: bool = True
    dtype: str = "float32"
    decays: str = "float32"
    """Element type of the decays."""
    betas: str = "float32"
    """Element type of beta."""
    stored: str = "float32"
    """Element type of the state."""

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def name(self) -> str:
        rule = f"{'gated_' if self.decay != 'no' else ''}{'delta_' if self.delta else ''}"
        by = "by_feature_" if self.decay == "feature" else ""
        return f"linear_attention_{rule}{by}{self.heads}h_{self.kv_heads}x{self.key_dim}x{self.value_dim}"


def linear_attention(d: LinearAttention) -> tirx.PrimFunc:
    """PrimFunc(q, k, v, [decay [b, s, g] or [b, s, g, d]], [beta [b, s, g]], [past i64[b]], state, y [b, s, h, e]), and where
    it is not in place, the new state."""
    if d.heads % d.kv_heads:
        raise ValueError(f"{d.heads} heads are not a multiple of {d.kv_heads} kv heads")
    kernel = Kernel(d.name, d.limits)
    b, s, g = symbol("b"), symbol("s"), d.kv_heads
    q = kernel.param("q", (b, s, d.heads, d.key_dim), d.dtype)
    k = kernel.param("k", (b, s, g, d.key_dim), d.dtype)
    v = kernel.param("v", (b, s, g, d.value_dim), d.dtype)
    each = (b, s, g, d.key_dim) if d.decay == "feature" else (b, s, g)
    decay = kernel.flat(kernel.param("decay", each, d.decays)) if d.decay != "no" else None
    beta = kernel.flat(kernel.param("beta", (b, s, g), d.betas)) if d.delta else None
    past = kernel.param("past", (b,), "int64") if d.begins else None
    old = kernel.param("state", (b, g, d.key_dim, d.value_dim), d.stored)
    y = kernel.param("y", (b, s, d.heads, d.value_dim), d.dtype)
    after = None if d.in_place else kernel.flat(kernel.param("after", (b, g, d.key_dim, d.value_dim), d.stored))
    q, k, v, old, y = (kernel.flat(x) for x in (q, k, v, old, y))
    new = old if after is None else after
    lanes = min(LANES, power_of_two(d.key_dim))
    threads = min(THREADS, d.limits.threads)
    columns = min(threads // lanes, power_of_two(d.value_dim))
    tiles = -(-d.value_dim // columns)
    with kernel.launch((b * tiles, g), lanes * columns) as ([unit, head], thread):
        batch = kernel.let(floor_div(unit, tiles), "batch")
        column = kernel.let(floor_mod(unit, tiles) * columns + floor_mod(thread, columns), "column")
        run = _Run(kernel, d, lanes, columns, thread, head, clamped(column, int64(d.value_dim)))
        base = kernel.copy((batch * g + head) * (d.key_dim * d.value_dim) + run.column)
        run.begin(old, base, None if past is None else kernel.copy(load(past, batch)))
        with kernel.loop(s) as t:
            token = kernel.copy(batch * s + t)
            if d.before:
                run.read(q, y, token, t, column < d.value_dim)
            if decay is not None:
                run.fade(decay, token)
            run.write(k, v, beta, token, t)
            if not d.before:
                run.read(q, y, token, t, column < d.value_dim)
        with kernel.when(column < d.value_dim):
            run.end(new, base)
    return kernel.build()


class _Run:
    """What a thread keeps, and its part of one token."""

    def __init__(
        self, kernel: Kernel, d: LinearAttention, lanes: int, columns: int, thread: Expr, head: Expr, column: Expr
    ) -> None:  # fmt: skip
        self.kernel, self.d, self.lanes, self.columns, self.thread, self.head = kernel, d, lanes, columns, thread, head
        self.column = kernel.copy(column)
        self.lane = kernel.let(floor_div(thread, columns), "lane")
        self.rows = -(-d.key_dim // lanes)
        self.state = kernel.registers(self.rows, "float32", 1)
        # what one token's threads still read, the next one's do not write over
        self.sums = [kernel.shared(2 * lanes * columns) for _ in range(d.group)]
        self.known = kernel.shared(2 * lanes * columns) if d.delta else None

    def _row(self, i: int) -> tuple[Expr, Expr | None]:
        """The i-th row of a thread, and whether there is such; one that there is, if not."""
        row = self.lane + i * self.lanes
        if (i + 1) * self.lanes <= self.d.key_dim:
            return row, None
        return clamped(row, int64(self.d.key_dim)), row < self.d.key_dim

    def _of_row(self, buffer: Buffer, base: Expr, i: int, step: int = 1) -> Expr:
        row, inside = self._row(i)
        return self.kernel.kept(inside, as_f32(load(buffer, base + row * step)))

    def begin(self, old: Buffer, base: Expr, past: Expr | None) -> None:
        kernel = self.kernel
        for i in range(self.rows):
            value = kernel.copy(self._of_row(old, base, i, self.d.value_dim))
            nothing = None if past is None else tirx.EQ(past, int64(0))
            kernel.store(self.state, i, value if nothing is None else tirx.Select(nothing, zero(), value))

    def end(self, new: Buffer, base: Expr) -> None:
        for i in range(self.rows):
            row = self.lane + i * self.lanes
            with self.kernel.when(row < self.d.key_dim):
                self.kernel.put(new, base + row * self.d.value_dim, load(self.state, i))

    def fade(self, decay: Buffer, token: Expr) -> None:
        kernel, d = self.kernel, self.d
        own = kernel.copy(token * d.kv_heads + self.head)

        def factor(value: Expr) -> Expr:
            return kernel.copy(exp(kernel, kernel.copy(value)) if d.log else value)

        one = factor(as_f32(load(decay, own))) if d.decay == "head" else None
        for i in range(self.rows):
            by = factor(self._of_row(decay, own * d.key_dim, i)) if one is None else one
            kernel.store(self.state, i, load(self.state, i) * by)

    def write(self, k: Buffer, v: Buffer, beta: Buffer | None, token: Expr, t: Expr) -> None:
        kernel, d = self.kernel, self.d
        own = kernel.copy(token * d.kv_heads + self.head)
        keys = [kernel.copy(self._of_row(k, own * d.key_dim, i)) for i in range(self.rows)]
        value = kernel.copy(as_f32(load(v, own * d.value_dim + self.column)))
        if beta is not None and self.known is not None:
            [known] = self._over_rows([self.known], t, [keys])
            value = kernel.copy((value - known) * as_f32(load(beta, own)))
        for i, key in enumerate(keys):
            kernel.store(self.state, i, load(self.state, i) + key * value)

    def read(self, q: Buffer, y: Buffer, token: Expr, t: Expr, inside: Expr) -> None:
        kernel, d = self.kernel, self.d
        first = kernel.copy(token * d.heads + self.head * d.group)
        queries = [[self._of_row(q, (first + m) * d.key_dim, i) for i in range(self.rows)] for m in range(d.group)]
        for m, found in enumerate(self._over_rows(self.sums, t, queries)):
            with kernel.when(tirx.And(inside, tirx.EQ(self.lane, int64(m % self.lanes)))):
                kernel.put(y, (first + m) * d.value_dim + self.column, found * splat(d.scale, 1))

    def _over_rows(self, memories: Sequence[Buffer], t: Expr, factors: Sequence[Sequence[Expr]]) -> list[Expr]:
        """The sums over the rows of the state times each of the factors, in every thread of a column."""
        kernel, size = self.kernel, self.lanes * self.columns
        side = kernel.let(floor_mod(t, 2) * size, "side")
        for memory, own in zip(memories, factors):
            total = kernel.registers(1, "float32", 1)
            kernel.store(total, 0, zero())
            for i, factor in enumerate(own):
                kernel.store(total, 0, load(total, 0) + factor * load(self.state, i))
            kernel.store(memory, side + self.thread, load(total, 0))
        kernel.barrier()
        sums = []
        for memory in memories:
            found = load(memory, side + floor_mod(self.thread, self.columns))
            for lane in range(1, self.lanes):
                found = found + load(memory, side + lane * self.columns + floor_mod(self.thread, self.columns))
            sums.append(kernel.copy(found))
        return sums
