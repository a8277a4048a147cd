"""Linear attention by blocks of tokens: matrix products within a block, the state from block to block.

With P_ij the product of the decays from behind token j up to i, and A_i that from the block's start up to i:

    u_i = beta_i (v_i - A_i S^T k_i - sum over j < i of P_ij (k_i . k_j) u_j)      (u = v without the delta rule)
    y_i = A_i S^T q_i + sum over j <= i of P_ij (q_i . k_j) u_j
    S   = A_n S + sum over j of P_nj k_j u_j^T

(arXiv:2312.06635, 2406.06484.) Decays are never divided by, and no logarithm is taken of them: they may be 0, or negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..dims import DimLike, floordiv
from ..op import Body
from ..types import TensorType

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Graph, Value
    from .linear_attention import LinearAttentionAttrs

TOKENS = 32
"""Of a block."""


def by_blocks(
    b: Builder, attrs: LinearAttentionAttrs, start: Value, q: Value, k: Value, v: Value, decay: Value | None, beta: Value | None
) -> tuple[Value, Value]:  # fmt: skip
    """The state after the last token, and y [b, s, h, e]; operands as those of the operation, all of one element type, with at
    most one decay for each head."""
    n, s, h, _ = q.shape
    g, e = v.shape[2:]
    size = min(max(s, 1), TOKENS) if isinstance(s, int) else TOKENS
    turns = floordiv(s + size - 1, size)

    def blocks(x: Value, group: DimLike, fill: float = 0.0) -> Value:
        """[b, s, g * group, ..] as [turns, b, g, group * size, ..], filled up to whole blocks."""
        rest = x.shape[3:]
        high = (0, turns * size - s, *[0] * (len(x.shape) - 2))
        x = b.pad(x, low=(0,) * len(high), high=high, value=fill)
        x = b.reshape(x, shape=(n, turns, size, g, group, *rest))
        x = b.transpose(x, perm=(1, 0, 3, 4, 2, *range(5, 5 + len(rest))))
        return b.reshape(x, shape=(turns, n, g, group * size, *rest))

    given = [blocks(q, h // g), blocks(k, 1), blocks(v, 1)]
    given += [] if decay is None else [blocks(decay, 1, 0.0 if attrs.log else 1.0)]
    given += [] if beta is None else [blocks(beta, 1)]
    body = _block(attrs, start.tensor, [x.tensor.with_shape(*x.shape[1:]) for x in given], size, h // g)
    last, rows = b.scan(start, *given, body=Body(body), carries=1, slices=len(given))
    rows = b.reshape(rows, shape=(turns, n, g, h // g, size, e))
    y = b.reshape(b.transpose(rows, perm=(1, 0, 4, 2, 3, 5)), shape=(n, turns * size, h, e))
    return last, b.slice(y, starts=(0, 0, 0, 0), stops=(n, s, h, e))


def _block(
    attrs: LinearAttentionAttrs, state: TensorType, given: Sequence[TensorType], size: int, group: DimLike
) -> Graph:  # fmt: skip
    """What one block does: of the state [b, g, d, e], q [b, g, group * size, d], k, v [b, g, size, ..], decay and beta
    [b, g, size], to the state and y [b, g, group * size, e]."""
    from ..builder import Builder
    from ..graph import Graph

    graph = Graph("block")
    b = Builder(graph)
    held = graph.add_input("state", state)
    names = ["q", "k", "v", *["decay"] * attrs.gated, *["beta"] * attrs.delta]
    q, k, v, *more = (graph.add_input(name, t) for name, t in zip(names, given))
    n, g, *_ = state.shape
    path = _paths(b, more[0], attrs.log, size) if attrs.gated else None

    def part(row: int, rows: int, column: int, columns: int) -> Value:
        assert path is not None
        return b.slice(path, starts=(0, 0, row, column), stops=(n, g, row + rows, column + columns))

    def read(x: Value, rows: DimLike, first: int) -> Value:
        """What rows x [b, g, rows * size, d] read of the state, of which row i stands after ``first`` + i tokens."""
        y = b.matmul(x, held)
        if path is None:
            return y
        split = b.reshape(y, shape=(n, g, rows, size, y.shape[3]))
        return b.reshape(b.mul(split, b.reshape(part(first, size, 0, 1), shape=(n, g, 1, size, 1))), shape=y.shape)

    def scores(x: Value, rows: DimLike, first: int, strict: bool) -> Value:
        """Products of rows x with earlier keys, decayed in between: [b, g, rows * size, size]."""
        found = b.reshape(b.matmul(x, b.transpose(k, perm=(0, 1, 3, 2))), shape=(n, g, rows, size, size))
        if path is not None:
            found = b.mul(found, b.reshape(part(first, size, 1, size), shape=(n, g, 1, size, size)))
        seen = b.constant(np.tri(size, k=-1 if strict else 0, dtype=bool))
        found = b.select(seen, found, b.constant(0.0, found.tensor.dtype))
        return b.reshape(found, shape=(n, g, rows * size, size))

    u = v
    if attrs.delta:
        rate = b.reshape(more[-1], shape=(n, g, size, 1))
        u = b.mul(b.sub(v, read(k, 1, 1)), rate)
        u = b.matmul(_solved(b, b.mul(scores(k, 1, 1, True), rate), size), u)
    first = 0 if attrs.before else 1
    y = b.add(read(q, group, first), b.matmul(scores(q, group, first, attrs.before), u))
    y = y if attrs.scale == 1 else b.mul(y, attrs.scale)
    if path is not None:
        held = b.mul(held, part(size, 1, 0, 1))
        k = b.mul(k, b.reshape(part(size, 1, 1, size), shape=(n, g, size, 1)))
    held = b.add(held, b.matmul(b.transpose(k, perm=(0, 1, 3, 2)), u))
    graph.set_outputs([held, y], ["state", "y"])
    return graph


def _paths(b: Builder, decay: Value, log: bool, size: int) -> Value:
    """Products of decays [b, g, size]: at [.., i, j] that of tokens j to i - 1; [b, g, size + 1, size + 1]."""
    n, g, _ = decay.shape
    later = b.constant(np.arange(size)[:, None] >= np.arange(size + 1)[None, :])
    x = b.reshape(decay, shape=(n, g, size, 1))
    x = b.select(later, x, b.constant(0.0 if log else 1.0, x.tensor.dtype))
    if log:  # sums of logarithms, none of which is subtracted: they may be -inf
        return b.exp(b.pad(b.cumsum(x, axis=2), low=(0, 0, 1, 0), high=(0, 0, 0, 0)))
    step = 1
    while step < size:  # each row is multiplied by that ``step`` above it, which stands for as many
        above = b.slice(x, starts=(0, 0, 0, 0), stops=(n, g, size - step, size + 1))
        x = b.mul(x, b.pad(above, low=(0, 0, step, 0), high=(0, 0, 0, 0), value=1.0))
        step *= 2
    return b.pad(x, low=(0, 0, 1, 0), high=(0, 0, 0, 0), value=1.0)


def _solved(b: Builder, lower: Value, size: int) -> Value:
    """(I + lower)^-1 of a matrix that is strictly lower triangular, by blocks of 1, 2, 4 ..: of [[A, 0], [B, D]] the inverse is
    [[A', 0], [-D' B A', D']]. As stable as substitution row by row, which a sum of powers is not."""
    dtype = lower.tensor.dtype
    x = b.constant(np.eye(size, dtype=dtype.np), dtype)
    at, m = np.arange(size), 1
    while m < size:
        corner = (at[:, None] // m % 2 == 1) & (at[None, :] // m == at[:, None] // m - 1)
        part = b.select(b.constant(corner), lower, b.constant(0.0, dtype))
        x = b.sub(x, part if m == 1 else b.matmul(b.matmul(x, part), x))
        m *= 2
    return x if x.shape == lower.shape else b.broadcast_to(x, shape=lower.shape)


__all__ = ["TOKENS", "by_blocks"]
