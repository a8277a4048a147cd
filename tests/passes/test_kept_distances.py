"""Scores by distance that a skew made, and what is taken along distances: of keys that are no later than the query."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kept import DIM, HEADS, INF, WIDTH, Mix, Model, check_incremental, derived_of, merged, scores
from wasat.frontend import nn
from wasat.ir import IRError

import wasat as ws

RNG = np.random.default_rng(11)
TABLE = RNG.normal(size=(HEADS, 32, WIDTH)).astype(np.float32)
MIXED = RNG.normal(size=(4, DIM)).astype(np.float32)
PACES = np.array([1, 0.3], np.float32)


def queries(x: nn.Tensor) -> nn.Tensor:
    return x.heads(HEADS).swap(1, 2)


def skewed(z: nn.Tensor) -> nn.Tensor:
    """z [b, h, s, t] padded by one in front, and read as rows one shorter."""
    b, h, n, t = z.shape
    return nn.pad(z, (0, 0, 0, 1), (0, 0, 0, 0)).reshape(b, h, t + 1, n)[:, :, 1:].reshape(b, h, n, t)


def by_waves(at: nn.Tensor) -> nn.Tensor:
    """[n, 4] of positions."""
    p = at.cast("f32")[:, None] * nn.constant(PACES)
    return nn.concat([nn.sin(p), nn.cos(p)], axis=-1)


def weighed(x: nn.Tensor, at: nn.Tensor, rel: nn.Tensor) -> nn.Tensor:
    s, v = scores(x)
    return merged(nn.softmax(nn.where(nn.causal(at), s + rel, -INF)) @ v)


def skewed_table(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The last rows of each head's table, skewed (Music Transformer)"""
    n = x.shape[1]
    return weighed(x, at, skewed(queries(x) @ nn.constant(TABLE)[:, 32 - n :].T))


def skewed_and_window(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The same table for all heads, under a sigmoid and a window of four"""
    s, v = scores(x)
    rel = skewed(queries(x) @ nn.constant(TABLE[0])[32 - x.shape[1] :].T)
    return merged(nn.sigmoid(nn.where(nn.causal(at) & nn.within(at, 4), s + rel, -INF)) @ v)


def skewed_waves(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Waves of distances through a linear layer, last first, zeros joined in front (Transformer-XL)"""
    b, n = x.shape[:2]
    y, r = x.heads(HEADS), (by_waves(nn.flip(at, 0)) @ nn.constant(MIXED)).reshape(n, HEADS, WIDTH)
    rel = nn.einsum("b i h d, j h d -> b h i j", y - 0.1, r)
    rel = nn.concat([nn.zeros((b, HEADS, n, 1)), rel], axis=-1).reshape(b, HEADS, n + 1, n)[:, :, 1:].reshape(b, HEADS, n, n)
    return weighed(x, at, rel)


def skewed_in_front(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The same with positions in front, rows and heads behind: [i, j, b, h]"""
    b, n = x.shape[:2]
    y, r = x.heads(HEADS).transpose(1, 0, 2, 3), (by_waves(n - 1 - at) @ nn.constant(MIXED)).reshape(n, HEADS, WIDTH)
    s = nn.einsum("i b h d, j b h d -> i j b h", y + 0.1, nn.sin(y))
    rel = nn.einsum("i b h d, j h d -> i j b h", y, r)
    rel = nn.concat([nn.zeros((n, 1, b, HEADS)), rel], axis=1).reshape(n + 1, n, b, HEADS)[1:].reshape(n, n, b, HEADS)
    w = nn.softmax(nn.where(nn.causal(at)[:, :, None, None], s + rel, -INF), axis=1)
    return nn.einsum("i j b h, j b h d -> b i h d", w, y).merge()


def skewed_one_more(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Distances from s down to 0, no padding (XLNet)"""
    b, n = x.shape[:2]
    z = queries(x) @ by_waves(n - nn.arange(n + 1)).T
    return weighed(x, at, z.reshape(b, HEADS, n + 1, n)[:, :, 1:].reshape(b, HEADS, n, n))


def skewed_tokens(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The token that stands as far from the first one as the key from the query"""
    return weighed(x, at, skewed(queries(x) @ nn.flip(nn.sin(queries(x)), 2).T))


def contextual(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Positions counted by gates from each key to the query, turned around for it (CoPE)"""
    s, v = scores(x)
    gates = nn.where(nn.causal(at), nn.sigmoid(s), 0.0)
    place = nn.minimum(nn.flip(nn.cumsum(nn.flip(gates, -1), axis=-1), -1), 7.0)
    low = nn.floor(place).cast("i64")
    worth, share = queries(x) @ nn.constant(TABLE[0, :8]).T, place - nn.floor(place)
    s = s + nn.take_along(worth, low, axis=-1) * (1.0 - share)
    s = s + nn.take_along(worth, nn.minimum(low + 1, 7), axis=-1) * share
    return merged(nn.softmax(nn.where(nn.causal(at), s, -INF)) @ v)


def later_rows(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Rows and columns of tables from the third on; a triangle of signs"""
    s, v = scores(x)
    n, table = x.shape[1], nn.constant(TABLE[0] @ TABLE[1].T)
    hidden = nn.sign((at[None, :] - at[:, None]).cast("f32")) > 0.5
    y = merged(nn.softmax(nn.where(hidden, -INF, s + table[3 : n + 3, 3 : n + 3])) @ v)
    return y + nn.constant(np.concatenate([TABLE[0], TABLE[1]], 1))[2 : n + 2]


def last_columns(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """ALiBi as the last columns of a table (MPT), of which one more is hidden, under the least number"""
    s, v = scores(x)
    slopes = nn.constant(np.array([[[0.5]], [[0.25]]], np.float32) * np.arange(-31, 1, dtype=np.float32))
    return merged(nn.softmax(nn.where(nn.causal(at), s + slopes[:, :, 32 - x.shape[1] :], -3e38)) @ v)


def retained(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Decays by the distance, weights divided by their sum where that is more than 1 (RetNet, Lightning attention)"""
    s, v = scores(x)
    d = at[:, None] - at[None, :]
    pace = nn.constant(np.array([[[-0.3]], [[-0.02]]], np.float32))
    w = s * nn.where(d >= 0, nn.exp(d.cast("f32") * pace), 0.0)
    return merged((w / nn.maximum(nn.abs(w.sum(-1, keepdims=True)), 1.0)) @ v)


DISTANCES: dict[str, Mix] = {
    f.__name__: f
    for f in (
        skewed_table, skewed_and_window, skewed_waves, skewed_in_front, skewed_one_more, skewed_tokens, contextual, later_rows,
        last_columns, retained,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", DISTANCES)
@given(st.data())
@settings(max_examples=2, deadline=None)
def test_incremental_equals_full(name: str, data: st.DataObject) -> None:
    check_incremental(*derived_of(DISTANCES[name]), data)


@pytest.mark.parametrize(
    "name, kept, context",
    [
        ("skewed_table", ["f32[b, c, 2, 4]"] * 2, 32),
        ("skewed_waves", ["f32[b, c, 2, 4]"] * 2, None),
        ("skewed_tokens", ["f32[b, c, 2, 4]"] * 3, None),
        ("later_rows", ["f32[b, c, 2, 4]"] * 2, 29),
        ("retained", ["f32[b, 2, 4, 1]", "f32[b, 2, 4, 4]"], None),
    ],
)
def test_what_is_kept(name: str, kept: list[str], context: int | None) -> None:
    _, program = derived_of(DISTANCES[name])
    names = set(program.interface.state_names)
    assert [str(v.type) for v in program["decode"].inputs if v.name in names] == kept
    assert program.interface.context == context


# -- near misses ---------------------------------------------------------------------------------------------------------------
def by_table(x: nn.Tensor) -> nn.Tensor:
    return skewed(queries(x) @ nn.constant(TABLE[0])[32 - x.shape[1] :].T)


def nothing_hidden(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    s, v = scores(x)
    return merged(nn.softmax(s + by_table(x)) @ v)


def read_by_columns(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """What the skew leaves where keys are later: of other queries."""
    return weighed(x, at, by_table(x).swap(2, 3))


def summed_over_queries(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    _, v = scores(x)
    w = nn.softmax(nn.where(at[:, None] <= at[None, :], by_table(x), -INF), axis=2)
    return merged(w.swap(2, 3) @ v)


def first_rows(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The row for no distance depends on how many tokens there are."""
    return weighed(x, at, skewed(queries(x) @ nn.constant(TABLE[0])[: x.shape[1]].T))


def tokens_from_the_end(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return weighed(x, at, skewed(scores(x)[0]))


def cut_by_two(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    b, n = x.shape[:2]
    z = queries(x) @ nn.constant(TABLE[0])[32 - n :].T
    z = nn.pad(z, (0, 0, 0, 2), (0, 0, 0, 0)).reshape(b, HEADS, n + 2, n)[:, :, 2:].reshape(b, HEADS, n, n)
    return weighed(x, at, z)


def taken(at: nn.Tensor, place: nn.Tensor, x: nn.Tensor) -> nn.Tensor:
    s, _ = scores(x)
    return weighed(x, at, nn.take_along(s, place[None, None].broadcast_to(*s.shape), axis=-1))


AHEAD: dict[str, tuple[Mix, str]] = {
    "nothing hidden": (nothing_hidden, "a token attends to later ones"),
    "read by columns": (read_by_columns, "its mask takes queries together"),
    "summed over queries": (summed_over_queries, "it takes queries together"),
    "first rows": (first_rows, "it counts to min(32, s)"),
    "tokens from the end": (tokens_from_the_end, "it pads the sequence"),
    "cut by two": (cut_by_two, "it depends on s, the number of tokens"),
    "taken one ahead": (
        lambda x, at: taken(at, nn.where(at[:, None] > at[None, :], at[:, None] + 1 - at[None, :] * 0, 0), x),
        "it picks from the sequence by index",
    ),
    "taken from the end": (
        lambda x, at: taken(at, nn.minimum(at[None, :] - at[:, None], 0), x), "it picks from the sequence by index"
    ),
    "rows that tokens choose": (
        lambda x, at: x + nn.gather(nn.flip(x, 1), at, axis=1), "it works across the sequence, later tokens included"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AHEAD)
def test_what_looks_ahead_is_refused(name: str) -> None:
    mix, reason = AHEAD[name]
    with pytest.raises(IRError) as e:
        ws.optimize(nn.trace(Model(mix), {"tokens": "i64[b, s]"}, outputs=["logits"]), kv_cache=True, chunk=6)
    assert reason in str(e.value)
