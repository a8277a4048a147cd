"""Linear attention by blocks of tokens: products of matrices within a block, the state from block to block.

With P_ij the product of the decays from behind j up to i, and A_i that from the block's start up to i, a block of tokens is

    u_i = beta_i (v_i - A_i S^T k_i - sum over j < i of P_ij (k_i . k_j) u_j)      (u = v without the delta rule)
    y_i = A_i S^T q_i + sum over j <= i of P_ij (q_i . k_j) u_j
    S   = A_n S + sum over j of P_nj k_j u_j^T

(arXiv:2312.06635, 2406.06484). Decays are multiplied up, never divided: where one is 0, or very small, nothing overflows. Of
decays per feature, the keys themselves are decayed token by token, and so are their products with later queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tvm import tirx

from .emit import Buffer, Expr, Index, Kernel, ceil_div, exp, floor_div, floor_mod, int64, load, minimum, splat, symbol
from .isa import Isa
from .norm import for_vectors, sum_row
from .pack import padded

Store = Callable[[Expr, Expr, int, Expr], None]
"""Takes a part of a product: its row, where in that, how many elements, and these."""
BLOCK = 32
"""Tokens of a block: a multiple of every processor's vector."""


@dataclass(frozen=True)
class LinearAttention:
    """q f32[b, s, h, d], k f32[b, s, g, d], v f32[b, s, g, e] and a state f32[b, g, d, e]; see ``linear_attention`` of the IR.

    ``decay``: per head or per feature of the keys; ``log``: by its logarithm. ``single``: s is 1. ``begins``: the state of a
    row that holds nothing yet (``past`` is 0) is taken for zeros, whatever is in it. ``in_place``: the new state is written
    over the old one.
    """

    isa: Isa
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    decay: Literal["no", "head", "feature"] = "no"
    delta: bool = False
    scale: float = 1.0
    log: bool = True
    before: bool = False
    single: bool = False
    begins: bool = False
    in_place: bool = True
    threads: int = 1

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are not a multiple of {self.kv_heads} kv heads")

    @property
    def name(self) -> str:
        flags = "".join(c for c, on in zip("dlbsnp", (self.delta, self.log, self.before, self.single, self.begins,
                                                      self.in_place)) if on)
        return (f"linear_attention_{self.heads}x{self.kv_heads}x{self.key_dim}x{self.value_dim}_{self.decay}_{flags}"
                f"_s{self.scale:.6g}").replace(".", "p").replace("-", "m")


def linear_attention(desc: LinearAttention) -> tirx.PrimFunc:
    """PrimFunc(q, k, v, [decay f32[b, s, g] or [b, s, g, d]], [beta f32[b, s, g]], [past i64[b]], state, y f32[b, s, h, e]),
    and where it is not in place, the new state."""
    h, g, d, e = desc.heads, desc.kv_heads, desc.key_dim, desc.value_dim
    kernel = Kernel(desc.name)
    b, s = symbol("b"), int64(1) if desc.single else symbol("s")
    q = kernel.param("q", (b, s, h, d), "float32")
    k = kernel.param("k", (b, s, g, d), "float32")
    v = kernel.param("v", (b, s, g, e), "float32")
    more: dict[str, Buffer] = {}
    if desc.decay != "no":
        more["decay"] = kernel.param("decay", (b, s, g, d) if desc.decay == "feature" else (b, s, g), "float32")
    if desc.delta:
        more["beta"] = kernel.param("beta", (b, s, g), "float32")
    past = kernel.param("past", (b,), "int64") if desc.begins else None
    old = kernel.param("state", (b, g, d, e), "float32")
    y = kernel.param("y", (b, s, h, e), "float32")
    new = old if desc.in_place else kernel.param("after", (b, g, d, e), "float32")
    q, k, v, old, y = (kernel.flat(x) for x in (q, k, v, old, y))
    new = old if desc.in_place else kernel.flat(new)
    more = {name: kernel.flat(x) for name, x in more.items()}

    def thread(first: Expr, last: Expr) -> None:
        block = _Block(kernel, desc, q, k, v, more, new, y)
        with kernel.range(first, last) as unit:
            batch, head = kernel.let(floor_div(unit, g), "batch"), kernel.let(floor_mod(unit, g), "head")
            state = kernel.let(unit * (d * e), "state")

            def fill(value: Callable[[Expr, int], Expr]) -> None:
                for_vectors(kernel, d * e, desc.isa.lanes, lambda j, n: kernel.store(new, state + j, value(state + j, n)))

            def keep() -> None:
                if not desc.in_place:
                    fill(lambda at, n: load(old, at, n))

            if past is None:
                keep()
            else:
                kernel.either(tirx.EQ(load(past, batch), int64(0)), lambda: fill(lambda at, n: splat(0.0, n)), keep)
            if desc.single:
                block.run(batch, head, int64(1), state)
            else:
                with kernel.loop(ceil_div(s, BLOCK)) as i:
                    start = kernel.let(i * BLOCK, "start")
                    block.run(kernel.let(batch * s + start), head, kernel.let(minimum(s - start, BLOCK), "count"), state)

    kernel.share(desc.threads, b * g, thread)
    return kernel.build()


def multiply(
    kernel: Kernel, isa: Isa, size: int, tiles: Index, depth: Index, width: int, x: tuple[Buffer, Index, int],
    m: tuple[Buffer, Expr, int], store: Store, terms: Callable[[Expr], Expr] | None = None,
) -> None:  # fmt: skip
    """x @ m, of ``tiles`` tiles of ``size`` rows of x; operands are flat buffers, where they start, and from row to row.

    ``terms``: of how many terms a row is the sum, never fewer than the row before. What m holds further on is not looked at:
    a zero in x would not hide a NaN there.
    """

    def columns(at: Expr, vectors: int, lanes: int) -> None:
        with kernel.loop(tiles) as tile:
            acc = kernel.registers(size * vectors, "float32", lanes)
            for i in range(size * vectors):
                kernel.store(acc, i * lanes, splat(0.0, lanes))
            low = kernel.let(tile * size, "low")
            starts = [kernel.let(x[1] + (low + i) * x[2]) for i in range(size)]

            def step(t: Expr, own: Sequence[Expr] = ()) -> None:
                row = kernel.let(m[1] + t * m[2] + at, "row")
                values = [kernel.let(load(m[0], row + j * lanes, lanes)) for j in range(vectors)]
                for i in range(size):
                    factor = splat(load(x[0], starts[i] + t), lanes)
                    for j in range(vectors):
                        to = (i * vectors + j) * lanes
                        more = load(acc, to, lanes) + factor * values[j]
                        kernel.store(acc, to, tirx.Select(t < own[i], more, load(acc, to, lanes)) if own else more)

            if terms is None:
                with kernel.loop(depth) as t:
                    step(t)
            else:
                own = [kernel.let(minimum(terms(low + i), depth)) for i in range(size)]
                with kernel.loop(own[0]) as t:
                    step(t)
                with kernel.range(own[0], own[-1]) as t:
                    step(t, own)
            for i in range(size):
                for j in range(vectors):
                    store(low + i, at + j * lanes, lanes, load(acc, (i * vectors + j) * lanes, lanes))

    lanes = isa.lanes
    pairs, odd = divmod(width // lanes, 2)
    with kernel.loop(pairs) as pair:
        columns(kernel.let(pair * (2 * lanes)), 2, lanes)
    if odd:
        columns(int64(pairs * 2 * lanes), 1, lanes)
    if width % lanes:
        with kernel.loop(width % lanes) as j:
            columns(kernel.let(int64(width // lanes * lanes) + j), 1, 1)


class _Block:
    """What a thread keeps while it goes through the blocks of a head, and the code of one block."""

    def __init__(
        self, kernel: Kernel, desc: LinearAttention, q: Buffer, k: Buffer, v: Buffer, more: dict[str, Buffer], state: Buffer,
        y: Buffer,
    ) -> None:  # fmt: skip
        self.kernel, self.desc, self.isa = kernel, desc, desc.isa
        self.q, self.k, self.v, self.more, self.state, self.y = q, k, v, more, state, y
        self.group = desc.heads // desc.kv_heads
        self.tokens = 1 if desc.single else BLOCK
        self.rows = min(self.tokens * self.group, desc.isa.rows)
        self.key_rows = min(self.tokens, desc.isa.rows)
        d, e, n = desc.key_dim, desc.value_dim, self.tokens
        queries, keys = padded(n * self.group, self.rows), padded(n, self.key_rows) if desc.delta else 0
        self.keys_at = queries
        """The rows of x, of scores and of what is read of the state: the queries', then, for the delta rule, the keys'."""
        self.x = kernel.scratch((queries + keys) * d, "float32")
        self.scores = kernel.scratch((queries + keys) * n, "float32")
        self.read = kernel.scratch((queries + keys) * e, "float32")
        self.columns = kernel.scratch(d * n, "float32")
        """The keys, a token in each column; decayed to the block's end, in the end."""
        self.values = kernel.scratch(n * e, "float32") if desc.delta else v
        self.factor = kernel.scratch(d if desc.decay == "feature" else 1, "float32")
        self.run_ = kernel.scratch(d if desc.decay == "feature" else n + 1, "float32")
        """Products of decays from the block's start: of each feature, or up to each token."""
        self.path = kernel.scratch(n, "float32")
        """Products of decays from behind each token."""

    def run(self, row: Expr, head: Expr, count: Expr, state: Expr) -> None:
        """Tokens ``row`` to ``row + count`` (of all batches) of a kv head whose state begins at ``state``."""
        kernel, desc, group = self.kernel, self.desc, self.group
        d, e, g = desc.key_dim, desc.value_dim, desc.kv_heads
        self.row, self.head, self.count = row, head, count
        if desc.decay == "feature":
            self._by_features()
        else:
            self._by_heads()
        parts = [(int64(0), self.rows, kernel.let(count * group, "rows"))]
        if desc.delta:
            parts.append((int64(self.keys_at), self.key_rows, count))
        for first, size, rows in parts:
            multiply(
                kernel, self.isa, size, ceil_div(rows, size), d, e, (self.x, first * d, d), (self.state, state, e),
                self._into(self.read, first, e),
            )  # fmt: skip
        if desc.delta:
            self._solve()
        values = (self.values, int64(0), e) if desc.delta else (self.v, (row * g + head) * e, g * e)

        def put(i: Expr, j: Expr, lanes: int, value: Expr) -> None:
            with kernel.when(i < parts[0][2]):
                token = floor_div(i, group)
                own = load(self.read, i * e + j, lanes)
                if desc.decay == "head":
                    own = own * splat(load(self.run_, token if desc.before else token + 1), lanes)
                to = ((row + token) * desc.heads + head * group + floor_mod(i, group)) * e + j
                kernel.store(self.y, to, own + value)

        multiply(kernel, self.isa, self.rows, ceil_div(parts[0][2], self.rows), count, e,
                 (self.scores, int64(0), self.tokens), values, put,
                 lambda i: floor_div(i, group) if desc.before else floor_div(i, group) + 1)  # fmt: skip

        def update(first: int) -> Store:
            def add(i: Expr, j: Expr, lanes: int, value: Expr) -> None:
                at = state + (first + i) * e + j
                before = load(self.state, at, lanes)
                if desc.decay != "no":
                    before = before * splat(load(self.run_, first + i if desc.decay == "feature" else count), lanes)
                kernel.store(self.state, at, before + value)

            return add

        whole, rest = divmod(d, self.isa.rows)
        for first, size, tiles in ((0, self.isa.rows, whole), (whole * self.isa.rows, rest, 1)):
            if size and tiles:
                multiply(kernel, self.isa, size, tiles, count, e, (self.columns, int64(first * self.tokens), self.tokens),
                         values, update(first))  # fmt: skip

    def _into(self, buffer: Buffer, first: Expr, width: int) -> Store:
        return lambda i, j, lanes, value: self.kernel.store(buffer, (first + i) * width + j, value)

    # -- the block's own scores ----------------------------------------------------------------------------------------
    def _query(self, i: Expr, m: Index) -> Expr:
        """Where the query ``m`` of token i begins."""
        return ((self.row + i) * self.desc.heads + self.head * self.group + m) * self.desc.key_dim

    def _key(self, i: Expr) -> Expr:
        return ((self.row + i) * self.desc.kv_heads + self.head) * self.desc.key_dim

    def _decay(self, at: Expr, lanes: int) -> Expr:
        x = load(self.more["decay"], at, lanes)
        return exp(self.kernel, x) if self.desc.log else x

    def _by_heads(self) -> None:
        """Rows of queries and keys, their products with the block's keys, and what the decays make of these."""
        kernel, desc, lanes, n = self.kernel, self.desc, self.isa.lanes, self.tokens
        d, group, count = desc.key_dim, self.group, self.count
        if n > 1:
            for_vectors(kernel, d * n, lanes, lambda j, w: kernel.store(self.columns, j, splat(0.0, w)))
        kernel.store(self.run_, 0, splat(1.0, 1))
        with kernel.loop(count) as i:
            key = kernel.let(self._key(i))
            with kernel.loop(group) as m:
                query, to = kernel.let(self._query(i, m)), kernel.let((i * group + m) * d)
                for_vectors(kernel, d, lanes, lambda j, w: kernel.store(
                    self.x, to + j, load(self.q, query + j, w) * splat(desc.scale, w)))  # fmt: skip
            if desc.delta:
                for_vectors(kernel, d, lanes, lambda j, w: kernel.store(
                    self.x, (self.keys_at + i) * d + j, load(self.k, key + j, w)))  # fmt: skip
            with kernel.loop(d) as j:
                kernel.store(self.columns, j * n + i, load(self.k, key + j))
            if desc.decay == "head":
                at = (self.row + i) * desc.kv_heads + self.head
                kernel.store(self.run_, i + 1, load(self.run_, i) * self._decay(at, 1))
        self._clear_rest()
        if n == 1:
            with kernel.loop(group) as m:
                dot = sum_row(kernel, d, lanes, lambda j, w: load(self.x, m * d + j, w) * load(self.columns, j, w))
                kernel.store(self.scores, m, splat(0.0, 1) if desc.before else dot)
            if desc.delta:
                kernel.store(self.scores, self.keys_at, splat(0.0, 1))
            return
        parts = [(int64(0), self.rows, count * group)]
        if desc.delta:
            parts.append((int64(self.keys_at), self.key_rows, count))
        for first, size, rows in parts:
            multiply(kernel, self.isa, size, ceil_div(rows, size), d, n, (self.x, first * d, d), (self.columns, int64(0), n),
                     self._into(self.scores, first, n))  # fmt: skip
        for_vectors(kernel, n, lanes, lambda j, w: kernel.store(self.path, j, splat(0.0, w)))
        with kernel.loop(count) as i:
            if desc.before:
                self._seen(i, i)
            if desc.decay == "head":
                factor = kernel.let(self._decay((self.row + i) * desc.kv_heads + self.head, 1))
                for_vectors(kernel, n, lanes, lambda j, w: kernel.store(
                    self.path, j, load(self.path, j, w) * splat(factor, w)))  # fmt: skip
            if desc.delta:
                self._see(kernel.let(self.keys_at + i), i)
            kernel.store(self.path, i, splat(1.0, 1))
            if not desc.before:
                self._seen(i, i + 1)
        if desc.decay == "head":
            with kernel.loop(d) as j:
                for_vectors(kernel, n, lanes, lambda t, w: kernel.store(
                    self.columns, j * n + t, load(self.columns, j * n + t, w) * load(self.path, t, w)))  # fmt: skip

    def _clear_rest(self) -> None:
        """Rows up to the end of the last tile hold numbers."""
        kernel, d = self.kernel, self.desc.key_dim
        with kernel.range(self.count * self.group, ceil_div(self.count * self.group, self.rows) * self.rows) as i:
            for_vectors(kernel, d, self.isa.lanes, lambda j, w: kernel.store(self.x, i * d + j, splat(0.0, w)))
        if self.desc.delta:
            with kernel.range(self.count, ceil_div(self.count, self.key_rows) * self.key_rows) as i:
                for_vectors(kernel, d, self.isa.lanes, lambda j, w: kernel.store(
                    self.x, (self.keys_at + i) * d + j, splat(0.0, w)))  # fmt: skip

    def _seen(self, i: Expr, stop: Expr) -> None:
        """The scores of a token's queries: those of tokens before ``stop``, decayed, and zeros."""
        with self.kernel.loop(self.group) as m:
            self._see(self.kernel.let(i * self.group + m), stop)

    def _see(self, row: Expr, stop: Expr) -> None:
        kernel, n = self.kernel, self.tokens

        def decayed(j: Expr, lanes: int) -> None:
            at = row * n + j
            if lanes == 1:
                seen = j < stop
            else:
                seen = tirx.Ramp(tirx.Cast("int32", j), tirx.IntImm("int32", 1), lanes) < tirx.Broadcast(
                    tirx.Cast("int32", stop), lanes)
            value = load(self.scores, at, lanes) * load(self.path, j, lanes)
            kernel.store(self.scores, at, tirx.Select(seen, value, splat(0.0, lanes)))

        for_vectors(kernel, n, self.isa.lanes, decayed)

    def _by_features(self) -> None:
        """The same where every feature decays by itself: token by token."""
        kernel, desc, lanes, n = self.kernel, self.desc, self.isa.lanes, self.tokens
        d, group, count = desc.key_dim, self.group, self.count
        for_vectors(kernel, d * n, lanes, lambda j, w: kernel.store(self.columns, j, splat(0.0, w)))
        for_vectors(kernel, d, lanes, lambda j, w: kernel.store(self.run_, j, splat(1.0, w)))
        with kernel.loop(count) as i:
            key = kernel.let(self._key(i))
            for_vectors(kernel, d, lanes, lambda j, w: kernel.store(self.factor, j, self._decay(key + j, w)))
            if desc.before:
                self._decayed_queries(i)
            for_vectors(kernel, d, lanes, lambda j, w: kernel.store(
                self.run_, j, load(self.run_, j, w) * load(self.factor, j, w)))  # fmt: skip
            if desc.delta:
                for_vectors(kernel, d, lanes, lambda j, w: kernel.store(
                    self.x, (self.keys_at + i) * d + j, load(self.k, key + j, w) * load(self.run_, j, w)))  # fmt: skip
            if not desc.before:
                self._decayed_queries(i)
            self._products(i, key)
            with kernel.loop(d) as j:
                kernel.store(self.columns, j * n + i, load(self.k, key + j))
            if not desc.before:
                with kernel.loop(group) as m:
                    query = kernel.let(self._query(i, m))
                    dot = sum_row(kernel, d, lanes, lambda j, w: (
                        load(self.q, query + j, w) * load(self.k, key + j, w)))  # fmt: skip
                    kernel.store(self.scores, (i * group + m) * n + i, dot * splat(desc.scale, 1))
        self._clear_rest()

    def _decayed_queries(self, i: Expr) -> None:
        kernel, desc, d = self.kernel, self.desc, self.desc.key_dim
        with kernel.loop(self.group) as m:
            query, to = kernel.let(self._query(i, m)), kernel.let((i * self.group + m) * d)
            for_vectors(kernel, d, self.isa.lanes, lambda j, w: kernel.store(
                self.x, to + j, load(self.q, query + j, w) * splat(desc.scale, w) * load(self.run_, j, w)))  # fmt: skip

    def _products(self, i: Expr, key: Expr) -> None:
        """Decays the keys before token i, and multiplies them with its queries, and with its key for the delta rule."""
        kernel, desc, n, group = self.kernel, self.desc, self.tokens, self.group
        d, lanes = desc.key_dim, min(self.isa.lanes, n)
        queries = [kernel.let(self._query(i, m)) for m in range(group)]
        with kernel.loop(n // lanes) as part:
            first = kernel.let(part * lanes)
            acc = kernel.registers(group + 1, "float32", lanes)
            for m in range(group + 1):
                kernel.store(acc, m * lanes, splat(0.0, lanes))

            def add(m: int, factor: Expr, value: Expr) -> None:
                kernel.store(acc, m * lanes, load(acc, m * lanes, lanes) + splat(factor, lanes) * value)

            def ask(j: Expr, value: Expr) -> None:
                for m in range(group):
                    add(m, load(self.q, queries[m] + j), value)

            with kernel.loop(d) as j:
                at = kernel.let(j * n + first)
                value = kernel.let(load(self.columns, at, lanes))
                if desc.before:
                    ask(j, value)
                value = kernel.let(value * splat(load(self.factor, j), lanes))
                kernel.store(self.columns, at, value)
                if desc.delta:
                    add(group, load(self.k, key + j), value)
                if not desc.before:
                    ask(j, value)
            for m in range(group):
                kernel.store(self.scores, (i * group + m) * n + first, load(acc, m * lanes, lanes) * splat(desc.scale, lanes))
            if desc.delta:
                kernel.store(self.scores, (self.keys_at + i) * n + first, load(acc, group * lanes, lanes))

    # -- the delta rule ------------------------------------------------------------------------------------------------
    def _solve(self) -> None:
        """What each token writes, by forward substitution."""
        kernel, desc, n, row, head = self.kernel, self.desc, self.tokens, self.row, self.head
        e, g = desc.value_dim, desc.kv_heads
        with kernel.loop(self.count) as i:
            at = kernel.let((row + i) * g + head)
            beta = kernel.let(load(self.more["beta"], at))
            own = kernel.let(self.keys_at + i)

            def columns(j: Expr, lanes: int) -> None:
                acc = kernel.registers(1, "float32", lanes)
                known = load(self.read, own * e + j, lanes)
                if desc.decay == "head":
                    known = known * splat(load(self.run_, i + 1), lanes)
                kernel.store(acc, 0, load(self.v, at * e + j, lanes) - known)
                with kernel.loop(i) as t:
                    kernel.store(acc, 0, load(acc, 0, lanes) - splat(load(self.scores, own * n + t), lanes) * load(
                        self.values, t * e + j, lanes))  # fmt: skip
                kernel.store(self.values, i * e + j, load(acc, 0, lanes) * splat(beta, lanes))

            for_vectors(kernel, e, self.isa.lanes, columns)


__all__ = ["BLOCK", "LinearAttention", "linear_attention"]
