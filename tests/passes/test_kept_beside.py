"""Keys that no token made stand first in a cache; the largest of what is seen is chosen; tables of distances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kept import DIM, HEADS, INF, WIDTH, Mix, Model, check_incremental, derived_of, hidden, merged, scores
from wasat.frontend import nn
from wasat.ir import IRError

import wasat as ws

RNG = np.random.default_rng(7)
MADE = RNG.normal(size=(1, 3, HEADS, WIDTH)).astype(np.float32)
TABLE = RNG.normal(size=(24, WIDTH)).astype(np.float32)
PLACES = RNG.normal(size=(64, DIM)).astype(np.float32)


def queries(x: nn.Tensor) -> nn.Tensor:
    return x.heads(HEADS).swap(1, 2)


def placed(mix: Mix) -> Mix:
    """``mix`` of what differs from position to position: no two scores are equal but for rounding."""

    def mixed(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        return mix(x + nn.gather(nn.constant(PLACES), at), at)

    mixed.__name__, mixed.__doc__ = mix.__name__, mix.__doc__
    return mixed


def joined(x: nn.Tensor, front: int = 3) -> tuple[nn.Tensor, nn.Tensor]:
    """Keys and values [b, h, s + 3, d]: of three that no token made, ``front`` are in front, and the others behind."""
    made, q = nn.constant(MADE).broadcast_to(x.shape[0], 3, HEADS, WIDTH), x.heads(HEADS)
    found = [nn.concat([a[:, :front], b, a[:, front:]], axis=1) for a, b in ((made, nn.sin(q)), (nn.cos(made), q))]
    return found[0].swap(1, 2), found[1].swap(1, 2)


def beside(x: nn.Tensor, at: nn.Tensor, keep: Callable[[nn.Tensor, nn.Tensor], nn.Tensor]) -> nn.Tensor:
    """What ``keep`` lets query i [s, 1] see of key j [s + 3], of which the first three are no token's."""
    k, v = joined(x)
    j = nn.arange(x.shape[1] + 3)
    return merged(nn.softmax(nn.where(keep(at[:, None], j[None, :]), queries(x) @ k.T, -INF)) @ v)


def registers(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Three keys that no token made stand in front, seen by all"""
    return beside(x, at, lambda i, j: j <= i + 3)


def registers_and_window(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The same beside a window of four tokens"""
    return beside(x, at, lambda i, j: (j < 3) | ((j <= i + 3) & (j > i - 1)))


def registers_by_position(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """One of them hidden from all, one from the first four positions"""
    return beside(x, at, lambda i, j: (j <= i + 3) & (j != 0) & ((j != 1) | (i >= 4)))


def registers_and_tokens(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A number for each token's key beside them"""
    worth = nn.pad(x[..., 0], (0, 3), (0, 0))[:, None, None, :]
    k, v = joined(x)
    s = nn.where(nn.arange(x.shape[1] + 3)[None, :] <= at[:, None] + 3, queries(x) @ k.T + worth, -INF)
    return merged(nn.softmax(s) @ v)


def biased_keys(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """One in front and two behind, a mask with columns for them (bias_k, bias_v)"""
    k, v = joined(x, 1)
    mask = nn.pad(nn.where(nn.causal(at), 0.0, -INF), (0, 1), (0, 2))
    return merged(nn.softmax(queries(x) @ k.T + mask) @ v)


def zero_key(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A key and a value of zeros behind (add_zero_attn), a window before it"""
    q = queries(x)
    k, v = (nn.pad(y, (0, 0, 0, 0), (0, 0, 1, 0)) for y in (nn.sin(q), q))
    mask = nn.pad(nn.where(nn.causal(at) & nn.within(at, 3), 0.0, -INF), (0, 0), (0, 1))
    return merged(nn.softmax(q @ k.T + mask) @ v)


def registers_and_sigmoid(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Three in front under a sigmoid, two of them hidden from the first four positions"""
    (k, v), j = joined(x), nn.arange(x.shape[1] + 3)
    keep = (j[None, :] <= at[:, None] + 3) & ((at[:, None] >= 4) | (j[None, :] != 1) & (j[None, :] != 2))
    return merged(nn.sigmoid(nn.where(keep, queries(x) @ k.T, -INF)) @ v)


def registers_and_difference(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Two softmaxes, one less a share of the other, heads mixed, one in front and two behind"""
    k, v = joined(x, 1)
    mask = nn.pad(nn.where(nn.causal(at), 0.0, -INF), (0, 1), (0, 2))
    w = nn.softmax(queries(x) @ k.T + mask) - 0.4 * nn.softmax(nn.sin(queries(x)) @ k.T + mask)
    return merged(nn.einsum("b h s t, h g -> b g s t", w, nn.constant([[0.5, -1.0], [0.25, 1.5]])) @ v)


def largest_few(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Scores below the third largest are hidden"""
    s, v = hidden(x, at)
    return merged(nn.softmax(nn.where(s < nn.top_k(s, 3)[0][..., -1:], -INF, s)) @ v)


def chosen(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The second largest and its place, the place of the least"""
    s, v = scores(x)
    top, place = nn.top_k(nn.where(nn.causal(at), s, -INF), 2)
    least = nn.argmin(nn.where(nn.causal(at), s, INF), axis=-1, keepdims=True)
    w = ((place[..., 1:] == at) | (least == at)) & nn.causal(at)
    return merged(w.cast("f32") @ v) + nn.where(top[..., 1:] > -INF, top[..., 1:], 0.0).sum(1)


def looked_up_along(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Queries by a table of distances, and keys by it, at repeated indices"""
    s, v = scores(x)
    behind = nn.maximum(at[:, None] - at[None, :], 0)[None, None].broadcast_to(*s.shape)
    near = nn.clip(at[None, :] - at[:, None], 0, 5)[None, None].broadcast_to(*s.shape)
    table = nn.constant(TABLE)
    s = s + nn.take_along(queries(x) @ table.T, behind, axis=-1)
    s = s + nn.take_along(nn.cos(queries(x)) @ table.T, near, axis=-1).swap(2, 3)
    return merged(nn.softmax(nn.where(nn.causal(at), s, -INF)) @ v)


def flattened_indices(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A table looked up at flattened distances; one of each head's, repeated for all queries"""
    s, v = scores(x)
    n, behind = x.shape[1], nn.maximum(at[:, None] - at[None, :], 0)
    flat = nn.gather(nn.constant(TABLE[:, :HEADS]), behind.reshape(n * n)).reshape(n, n, HEADS).transpose(2, 0, 1)
    rows = nn.constant(TABLE[:, 2:].T.copy())[:, None].broadcast_to(HEADS, n, 24)
    s = s + flat + nn.take_along(rows, behind[None].broadcast_to(HEADS, n, n), axis=-1)
    return merged(nn.softmax(nn.where(nn.causal(at), s, -INF)) @ v)


def heads_in_rows(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Queries [s, b * h, d] by vectors for each distance [s, d, t], as an einsum is exported"""
    s, v = scores(x)
    b, n = x.shape[:2]
    vectors = nn.gather(nn.constant(TABLE), nn.clip(at[:, None] - at[None, :], 0, 5))
    folded = queries(x).transpose(2, 0, 1, 3).reshape(n, b * HEADS, WIDTH)
    s = s + (folded @ vectors.T).reshape(n, b, HEADS, n).transpose(1, 2, 0, 3)
    return merged(nn.softmax(nn.where(nn.causal(at), s, -INF)) @ v)


def only_earlier(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Earlier tokens alone, beside a column of zeros: the first sees that, under a number that hides the rest"""
    s, v = scores(x)
    s = nn.pad(nn.where(at[None, :] < at[:, None], s, -1e9), (0, 0, 0, 0), (0, 0, 0, 1))
    return merged(nn.softmax(s)[..., :-1] @ v)


def rolled(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Rolled by one and by two: what comes round is chosen away, multiplied by 0, cut off, also after more"""
    one, two, n = nn.roll(x, 1, axis=1), nn.roll(x, 2, axis=1), x.shape[1]
    joined = nn.concat([x[:, n - 1 :], x[:, : n - 1]], axis=1)
    y = nn.where((at < 1)[None, :, None], x * 0.5, nn.tanh(one)) + two * (at >= 2).cast("f32")[:, None]
    y = y + nn.where((at > 0)[None, :, None], joined, 0.0)
    y = y + nn.where((at > 0)[None, :, None], nn.roll(x, 1, axis=1)[..., :1], 0.0)
    return y + nn.concat([nn.full((x.shape[0], 1, DIM), 0.5), nn.roll(x * 0.3, 1, axis=1)[:, 1:]], axis=1)


def counted(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A running mean whose divisor is a sum over a mask, and nothing else that meets"""
    return nn.cumsum(x, axis=1) / nn.causal(at).cast("f32").sum(-1)[:, None]


def merged_rows(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Rows and positions merged around an activation between two layers, and a sum (OPT)"""
    b, s = x.shape[:2]
    y = nn.attention(*[x.heads(HEADS)] * 3, nn.causal(at)).merge().reshape(b * s, DIM)
    return (y + nn.relu(y @ nn.constant(PLACES[:8])) @ nn.constant(PLACES[8:16])).reshape(b, s, DIM)


def summed_ones(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Slopes by positions that are sums of ones, counted for each row (Bloom)"""
    s, v = scores(x)
    place = nn.cumsum(nn.full((x.shape[0], x.shape[1]), 1).cast("i64"), axis=1) - 1
    slopes = place.cast("f32")[:, None, None, :] * nn.constant([[[0.5]], [[0.25]]])
    return merged(nn.softmax(nn.where(nn.causal(at), s + slopes, -INF)) @ v)


def picked(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Softmaxes of both heads, by numbers for what is no number, picked by an index: one less a share of the other"""
    s, v = scores(x)
    s = nn.where(nn.emit("isnan", s), 0.0, s) + nn.where(nn.causal(at), 0.0, -INF)
    one, two = (nn.gather(nn.softmax(s), nn.constant(i), axis=1)[:, None] for i in (0, 1))
    return merged((one - 0.3 * two) @ v)


def own_scales(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A scale of each query and head, which the token makes, and one by position."""
    s, v = scores(x)
    s = s * nn.softplus(x[..., :HEADS]).swap(1, 2)[..., None] / nn.sqrt(at.cast("f32") + 1.0)[:, None]
    return merged(nn.softmax(nn.where(nn.causal(at), s, -INF)) @ v)


def documents(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Documents, counted by what begins one; a finite number hides the others."""
    s, v = scores(x)
    number = nn.cumsum((x[..., 0] > 0.5).cast("i64"), axis=1)
    keep = nn.causal(at) & (number[:, :, None] == number[:, None, :])
    return merged(nn.softmax(nn.where(keep[:, None], s, -1e9)) @ v)


BESIDE: dict[str, Mix] = {
    f.__name__: placed(f) if f in (largest_few, chosen) else f
    for f in (
        registers, registers_and_window, registers_by_position, registers_and_tokens, biased_keys, zero_key, largest_few,
        chosen, looked_up_along, flattened_indices, heads_in_rows, only_earlier, rolled,
        counted, merged_rows, summed_ones, registers_and_sigmoid, registers_and_difference, picked, own_scales, documents,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
@given(st.data())
@settings(max_examples=2, deadline=None)
def test_incremental_equals_full(name: str, data: st.DataObject) -> None:
    check_incremental(*derived_of(BESIDE[name]), data, least=3)  # of fewer, there are no three largest


@pytest.mark.parametrize(
    "name, kept, context",
    [
        ("registers", ["f32[b, c + 16, 2, 4]"] * 2, None),
        ("registers_and_tokens", ["f32[b, c + 16, 2, 4]", "f32[b, c + 16, 2, 4]", "f32[b, c + 16, 1, 1]"], None),
        ("largest_few", ["f32[b, c, 2, 4]"], 64),
        ("looked_up_along", ["f32[b, c, 2, 4]", "f32[b, c, 2, 4]", "f32[b, c, 2, 24]"], 24),
        ("counted", ["i64[b, c, 1, 1]", "f32[b, 8]"], None),
    ],
)
def test_what_is_kept(name: str, kept: list[str], context: int | None) -> None:
    _, program = derived_of(BESIDE[name])
    names = set(program.interface.state_names)
    assert [str(v.type) for v in program["decode"].inputs if v.name in names] == kept
    assert program.interface.context == context


# -- near misses ---------------------------------------------------------------------------------------------------------------
def counted_from_the_end(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Causal by the last key, and the last three are no token's: query i sees token i + 3."""
    k, v = joined(x, 0)
    j = nn.arange(x.shape[1] + 3)
    return merged(nn.softmax(nn.where(j[None, :] <= at[:, None] + 3, queries(x) @ k.T, -INF)) @ v)


def values_elsewhere(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Keys with three in front, values with three behind."""
    (k, _), (_, v) = joined(x), joined(x, 0)
    j = nn.arange(x.shape[1] + 3)
    return merged(nn.softmax(nn.where(j[None, :] <= at[:, None] + 3, queries(x) @ k.T, -INF)) @ v)


def made_of_tokens(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """What stands in front is made of the last token."""
    first, q = x[:, -1:], x.heads(HEADS)
    k = nn.concat([first.heads(HEADS), q], axis=1).swap(1, 2)
    j = nn.arange(x.shape[1] + 1)
    return merged(nn.softmax(nn.where(j[None, :] <= at[:, None] + 1, queries(x) @ k.T, -INF)) @ k)


def weights_read_whole(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Weights of what is in front and of tokens are summed over, and their largest is read too."""
    (k, v), j = joined(x), nn.arange(x.shape[1] + 3)
    w = nn.softmax(nn.where(j[None, :] <= at[:, None] + 3, queries(x) @ k.T, -INF))
    return merged((nn.sin(w) @ v) * w.max(-1, keepdims=True))


def sigmoid_ahead(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    (k, v), j = joined(x), nn.arange(x.shape[1] + 3)
    return merged(nn.sigmoid(nn.where(j[None, :] <= at[:, None] + 4, queries(x) @ k.T, -INF)) @ v)


def seen_ahead(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return beside(x, at, lambda i, j: j <= i + 4)


def largest_of_all(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The third largest of all scores, of later keys too."""
    s, v = scores(x)
    return merged(nn.softmax(nn.where(nn.causal(at) & (s >= nn.top_k(s, 3)[0][..., -1:]), s, -INF)) @ v)


def smallest(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    s, v = hidden(x, at)
    return merged(nn.softmax(nn.where(s > nn.emit("top_k", s, k=3, axis=3, largest=False)[0][..., -1:], s, -INF)) @ v)


def least_of_hidden(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    s, _ = hidden(x, at)
    return x * nn.argmin(s, axis=-1).sum(1).cast("f32")[..., None]


def strictly_earlier(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The first token sees nothing: under a number, the mean of all."""
    s, v = scores(x)
    return merged(nn.softmax(nn.where(at[None, :] < at[:, None], s, -1e9)) @ v)


def two_earlier(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The same of two tokens, by a number that is added, in an attention."""
    q = x.heads(HEADS)
    mask = nn.where(at[None, :] <= at[:, None] - 2, 0.0, -1e9)
    return merged(nn.softmax(q.swap(1, 2) @ nn.sin(q).swap(1, 2).T + mask) @ q.swap(1, 2))


def rolled_by(shift: int, hide: Callable[[nn.Tensor, nn.Tensor], nn.Tensor]) -> Mix:
    def mix(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        return hide(nn.roll(x, shift, axis=1), at[:, None])

    return mix


def largest_tokens(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return nn.where(x >= nn.top_k(x, 3, axis=1)[0][:, -1:], x, 0.0)


AHEAD: dict[str, tuple[Mix, str]] = {
    "counted from the end": (counted_from_the_end, "it adds to the sequence"),
    "values elsewhere": (values_elsewhere, "it adds to the sequence"),
    "made of tokens": (made_of_tokens, "it stands beside the keys of tokens, and depends on tokens itself"),
    "weights read whole": (weights_read_whole, "it counts to s + 3"),
    "seen ahead by a sigmoid": (sigmoid_ahead, "a token meets later ones: where a key is later, it is not known what"),
    "seen ahead": (seen_ahead, "a token attends to later ones"),
    "the largest of all": (largest_of_all, "where a key is later, it is not known what stands in it, not -inf"),
    "the smallest": (smallest, "where a key is later, -inf stands in it, not inf"),
    "the least of what is hidden": (least_of_hidden, "where a key is later, -inf stands in it, not inf"),
    "nothing seen": (strictly_earlier, "some token sees nothing, and a number hides all keys from it alike"),
    "nothing seen by two": (two_earlier, "some token sees nothing, and a number hides all keys from it alike"),
    "rolled": (rolled_by(1, lambda r, i: r), "it depends on s, the number of tokens"),
    "rolled back": (rolled_by(-1, lambda r, i: nn.where(i < 1, 0.0, r)), "it depends on s, the number of tokens"),
    "one of two hidden": (rolled_by(2, lambda r, i: nn.where(i < 1, 0.0, r)), "it depends on s, the number of tokens"),
    "the others hidden": (rolled_by(1, lambda r, i: nn.where(i < 1, r, 0.0)), "it depends on s, the number of tokens"),
    "multiplied by more": (rolled_by(1, lambda r, i: r * i.cast("f32") + r), "it depends on s, the number of tokens"),
    "the second kept": (rolled_by(2, lambda r, i: r * (i > 0).cast("f32")), "it depends on s, the number of tokens"),
    "normalized with it": (rolled_by(1, lambda r, i: nn.where(i < 1, 0.0, r / r.max(1, keepdims=True))), "depends on s"),
    "the largest tokens": (largest_tokens, "it reduces over the sequence, later tokens included"),
}


@pytest.mark.parametrize("name", AHEAD)
def test_what_looks_ahead_is_refused(name: str) -> None:
    mix, reason = AHEAD[name]
    with pytest.raises(IRError) as e:
        ws.optimize(nn.trace(Model(mix), {"tokens": "i64[b, s]"}, outputs=["logits"]), kv_cache=True, chunk=6)
    assert reason in str(e.value)
