"""What looks back without being attention keeps what it needs: scores summed in other ways, scans, sums, windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fuse_chunks import gated_delta, ssd
from wasat.frontend import nn
from wasat.ir import Program, evaluate

import wasat as ws

VOCAB, DIM, HEADS, WIDTH = 11, 8, 2, 4
INF = math.inf
Mix = Callable[[nn.Tensor, nn.Tensor], nn.Tensor]


class Model(nn.Module):
    """An embedding, ``mix`` of x [b, s, 8] and the positions beside a norm of it, a head."""

    def __init__(self, mix: Mix) -> None:
        self.embed, self.head, self.norm = nn.Embedding(VOCAB, DIM, std=1.0), nn.Linear(DIM, VOCAB), nn.RMSNorm(DIM)
        self.mix = mix

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.mix(self.norm(x), nn.positions(tokens))))


def scores(x: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """Scores [b, h, s, t] of x with itself, and values [b, h, s, d]."""
    q, v = nn.tanh(x * 1.3).heads(HEADS).swap(1, 2), nn.sin(x * 2.0).heads(HEADS).swap(1, 2)
    return q @ v.T * 0.7, v


def merged(x: nn.Tensor) -> nn.Tensor:
    return x.swap(1, 2).merge()


def hidden(x: nn.Tensor, at: nn.Tensor, fill: float = -INF) -> tuple[nn.Tensor, nn.Tensor]:
    s, v = scores(x)
    return nn.where(nn.causal(at), s, fill), v


def softmax1(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    s, v = hidden(x, at)
    top = nn.maximum(s.max(-1, keepdims=True), 0.0)
    e = nn.exp(s - top)
    return merged((e / (nn.exp(-top) + e.sum(-1, keepdims=True))) @ v)


def sigmoid(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    s, v = hidden(x, at)
    return merged(nn.sigmoid(s) @ v)


def squared(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """relu(s)^2 of scores to which a finite number was added, scaled after it."""
    s, v = scores(x)
    r = nn.relu((s + nn.where(nn.causal(at), 0.0, -1e9)) * 0.5)
    return merged((r * r) @ v)


def divided_after(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    s, v = scores(x)
    w = nn.exp(s) * nn.causal(at).cast("f32")
    return merged((w @ v) / w.sum(-1, keepdims=True))


def keys_first(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Scores [b, h, t, s], normalized over their first axis."""
    s, v = scores(x)
    w = nn.softmax(nn.where(at[:, None] <= at[None, :], s, -INF), axis=-2)
    return merged(w.swap(2, 3) @ v)


def talking(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Heads mixed before and after."""
    s, v = scores(x)
    mixing = nn.constant([[0.5, -1.0], [0.25, 1.5]])
    s = nn.where(nn.causal(at), nn.einsum("b h s t, h g -> b g s t", s, mixing), -INF)
    return merged(nn.einsum("b h s t, h g -> b g s t", nn.softmax(s), mixing) @ v)


def sink(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A column of logits joins, and is dropped again."""
    s, v = hidden(x, at)
    column = nn.constant([0.3, -0.6])[:, None, None].broadcast_to(*s.shape[:3], 1)
    return merged(nn.softmax(nn.concat([column, s], axis=-1))[..., 1:] @ v)


def token_sink(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A column that each token makes, behind; a column of zeros by padding, in front."""
    s, v = hidden(x, at)
    column = x.heads(HEADS).swap(1, 2).sum(-1, keepdims=True)
    w = nn.softmax(nn.pad(nn.concat([s, column], axis=-1), (0, 0, 0, 1), (0, 0, 0, 0)))
    return merged(w[..., 1 : w.shape[-1] - 1] @ v)


def decaying(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Factors by the distance, normalized over what is seen."""
    s, v = scores(x)
    pace = nn.constant([-0.2, -0.7])[:, None, None]
    d = nn.where(nn.causal(at), nn.exp(pace * (at[:, None] - at[None, :]).cast("f32")), 0.0)
    return merged((s * (d / d.sum(-1, keepdims=True))) @ v)


def averaged(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Weights by positions alone."""
    seen = nn.causal(at).cast("f32")
    return (seen / seen.sum(-1, keepdims=True)) @ x


def largest(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    s, _ = hidden(x, at)
    return x * s.max(-1).max(1)[..., None]


def stick_breaking(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A sum from each key up to the query, which runs against the order of the keys."""
    s, v = hidden(x, at)
    kept = nn.where(nn.causal(at), nn.log(1.0 - nn.sigmoid(s) * 0.9), 0.0)
    return merged((nn.sigmoid(s) * nn.exp(nn.emit("cumsum", kept, axis=3, reverse=True, exclusive=True))) @ v)


def repeated_heads(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Two heads of queries over one of keys, which are the values too."""
    b, s = x.shape[:2]
    k = nn.sin(x)[:, :, None, :4].broadcast_to(b, s, HEADS, 4).swap(1, 2)
    q = x.heads(HEADS).swap(1, 2)
    return merged(nn.sigmoid(nn.where(nn.causal(at), q @ k.T, -INF)) @ k)


def by_tokens(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """What is seen depends on tokens of both: alike in sign."""
    s, v = scores(x)
    sign = x[..., 0] > 0
    keep = nn.causal(at) & ((sign[:, :, None] == sign[:, None, :]) | (at[:, None] == at[None, :]))
    return merged(nn.softmax(nn.where(keep[:, None], s, -INF)) @ v)


def fused_by_tokens(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The same with a window, as an attention with a mask operand."""
    q = x.heads(HEADS)
    sign = x[..., 0] > 0
    keep = (nn.causal(at) & nn.within(at, 3))[None] & ((sign[:, None, :]) | (at[:, None] == at[None, :]))
    s = q.swap(1, 2) @ q.swap(1, 2).T
    return merged(nn.softmax(nn.where(keep[:, None], s, -INF)) @ q.swap(1, 2))


def fused_by_places(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A window, and a number of each key's position from a table, that of the first above all."""
    q = x.heads(HEADS).swap(1, 2)
    table = np.cos(np.arange(48, dtype=np.float32)) + np.where(np.arange(48) == 0, 3, 0).astype(np.float32)
    hidden = nn.where(nn.causal(at) & nn.within(at, 3), 0.0, -INF)
    return merged(nn.softmax(q @ q.T + hidden + nn.gather(nn.constant(table), at)) @ q)


def streaming(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The first two and the last three, as a softmax of hidden scores."""
    s, v = scores(x)
    keep = nn.causal(at) & (nn.within(at, 3) | (at[None, :] < 2))
    return merged(nn.softmax(nn.where(keep, s, -INF)) @ v)


def blocks(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """From the beginning of the block of three."""
    s, v = scores(x)
    keep = nn.causal(at) & (at[None, :] // 3 == at[:, None] // 3)
    return merged(nn.softmax(nn.where(keep, s, -INF)) @ v)


def earlier_blocks(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Itself and all of the blocks of three before its own: nothing says that it is causal."""
    s, v = scores(x)
    keep = (at[None, :] // 3 < at[:, None] // 3) | (at[None, :] == at[:, None])
    return merged(nn.softmax(nn.where(keep, s, -INF)) @ v)


def begun_blocks(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Up to where its block began, by a sigmoid."""
    s, v = scores(x)
    return merged(nn.sigmoid(nn.where(at[None, :] <= at[:, None] // 3 * 3, s, -INF)) @ v)


def heads_apart(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Less a share of the mean over heads; normalized by what logsumexp and log_softmax say."""
    s, v = hidden(x, at)
    w = nn.exp(s - nn.logsumexp(s, -1, keepdims=True)) + nn.exp(nn.log_softmax(s * 0.5, axis=-1))
    return merged((w - 0.3 * w.mean(1, keepdims=True)) @ v)


def state_space(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Mamba2 in its quadratic form: decays are differences of running sums."""
    run = nn.cumsum(nn.softplus(x[..., :HEADS]) * -0.5, axis=1).swap(1, 2)
    decay = nn.exp(nn.where(nn.causal(at), run[..., :, None] - run[..., None, :], -INF))
    s, v = scores(x)
    return merged((s * decay) @ v)


def largest_so_far(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return nn.where(nn.causal(at)[None, :, :, None], x[:, None], -INF).max(2)


def from_a_table(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A factor by the distance, looked up, under a triangle of numbers that is a constant."""
    n, d = at.shape[0], nn.maximum(at[:, None] - at[None, :], 0)
    near = nn.gather(nn.constant(np.cos(np.arange(48, dtype=np.float32))), d)
    s, v = scores(x)
    return merged((s * near * nn.constant(np.tri(48, dtype=np.float32))[:n, :n]) @ v)


def sequence_first(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Heads folded into the batch, positions in front: [s, b * h, d]."""
    s, b = x.shape[1], x.shape[0]
    q = x.swap(0, 1).reshape(s, b * HEADS, WIDTH).swap(0, 1)
    w = nn.sigmoid(nn.where(nn.causal(at), q @ q.T, -INF))
    return (w @ q).swap(0, 1).reshape(s, b, DIM).swap(0, 1)


def running_sums(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    q, k = nn.softplus(x).heads(HEADS), nn.softplus(x * -1.0).heads(HEADS)
    state = nn.cumsum(k[..., None] * nn.sin(k)[..., None, :], axis=1)
    before = nn.emit("cumsum", k.swap(1, 2), axis=2, exclusive=True).swap(1, 2)
    return (nn.einsum("b s h k, b s h k v -> b s h v", q, state) / (1.0 + q * before)).merge()


def time_first(x: nn.Tensor) -> nn.Tensor:
    return x.transpose(1, 0, *range(2, x.rank))


def recurrent(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Starts from ones; two carries, rows last in one of them."""

    def step(held: tuple[nn.Tensor, nn.Tensor], now: nn.Tensor) -> tuple[tuple[nn.Tensor, nn.Tensor], nn.Tensor]:
        h, t = held
        h = nn.tanh(h * 0.6 + now)
        t = t * 0.9 + h.swap(0, 1)
        return (h, t), h + t.swap(0, 1) * 0.1

    b = x.shape[0]
    return time_first(nn.scan(step, (nn.full((b, DIM), 1.0), nn.full((DIM, b), 0.5)), time_first(x))[1])


def folded_scan(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Heads folded into the batch."""
    b, s = x.shape[:2]

    def step(h: nn.Tensor, now: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        h = h * 0.8 + now[:, :, None] * now[:, None, :]
        return h, h.sum(-1)

    folded = x.heads(HEADS).swap(1, 2).reshape(b * HEADS, s, WIDTH)
    y = time_first(nn.scan(step, nn.full((b * HEADS, WIDTH, WIDTH), 0.0), time_first(folded))[1])
    return merged(y.reshape(b, HEADS, s, WIDTH))


def beside_values(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Ones and numbers by position stand beside the values; decays by position."""
    b, s = x.shape[:2]
    each = nn.sin(at.cast("f32"))[None, :, None].broadcast_to(b, s, HEADS)
    q, k, v = nn.exp(x).heads(HEADS), nn.sigmoid(x).heads(HEADS), nn.sin(x).heads(HEADS)
    v = nn.concat([v, nn.ones_like(v[..., :1]), each[..., None]], axis=-1)
    y = nn.linear_attention(q, k, v, decay=-nn.softplus(each))[0]
    return (y[..., :WIDTH] / y[..., WIDTH : WIDTH + 1] + y[..., WIDTH + 1 :]).merge()


def by_place(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A scan whose decays are functions of the position."""
    pace = nn.sigmoid(at.cast("f32"))[:, None, None].broadcast_to(x.shape[1], x.shape[0], 1)
    return time_first(nn.scan(lambda h, t: (h * t[0] + t[1],) * 2, nn.full((x.shape[0], DIM), 0.5), (pace, time_first(x)))[1])


def long_kernel(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A convolution as long as the sequence: by channel, [d, s, t] @ [d, t, b]; by head, rows merged with features."""
    d, (b, s) = at[:, None] - at[None, :], x.shape[:2]
    fade = nn.exp(nn.maximum(d, 0).cast("f32")[..., None] * nn.constant(np.linspace(-1, -0.1, DIM, dtype=np.float32)))
    by_channel = nn.einsum("s t d, b t d -> b s d", nn.where((d >= 0)[..., None], fade, 0.0), x)
    tall = x.heads(HEADS).transpose(2, 1, 0, 3).reshape(HEADS, s, b * WIDTH)
    by_head = (nn.where((d >= 0)[..., None], fade, 0.0)[..., :HEADS].transpose(2, 0, 1) @ tall).reshape(HEADS, s, b, WIDTH)
    return by_channel + by_head.transpose(2, 1, 0, 3).merge()


class Convolution(nn.Module):
    def __init__(self, **how: Any) -> None:
        self.conv = nn.Conv1d(DIM, DIM, 3, **how)

    def __call__(self, x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        return self.conv(x.swap(1, 2))[:, :, : x.shape[1]].swap(1, 2)


def linear(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Two query heads over one state, which does not start empty, and is read before it is written."""
    q, k, v = x.heads(2), nn.sin(x[..., :4]).heads(1), nn.tanh(x).heads(1)
    start = nn.constant(np.linspace(-1, 1, 32, dtype=np.float32).reshape(1, 1, 4, 8)).broadcast_to(x.shape[0], 1, 4, 8)
    each = -nn.softplus(x[..., 4:]).heads(1)
    return nn.linear_attention(q, k, v, decay=each, state=start, before=True)[0].merge()[..., :DIM]


def delta(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The delta rule with decays, of which one is 0 at times; twice, sequence first and heads in the batch."""
    q, k, v = x.heads(HEADS), nn.sin(x * 2.0).heads(HEADS), nn.tanh(x).heads(HEADS)
    decay, beta = nn.relu(x[..., :2]), nn.sigmoid(x[..., 2:4])
    y = nn.linear_attention(q, k * 0.5, v, decay=nn.minimum(decay, 1.0), beta=beta, log=False)[0]
    b, s = x.shape[:2]
    q, k, v = (t.swap(1, 2).reshape(b * HEADS, s, 1, WIDTH) for t in (y, k * 0.5, v))
    y = nn.linear_attention(q, k, v, beta=beta.swap(1, 2).reshape(b * HEADS, s, 1))[0]
    return y.reshape(b, HEADS, s, WIDTH).swap(1, 2).merge()


def state_space_by_chunks(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Mamba2 by chunks of the sequence, padded to whole ones, as transformers exports it."""
    k, q = nn.sin(x).heads(HEADS), nn.tanh(x).heads(HEADS)
    return ssd(x.heads(HEADS), nn.softplus(x[..., :2]), k, q, rates=(-0.5, -0.1), also=lambda y, x: y + x * 0.5).merge()


def delta_by_chunks(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """The gated delta rule by chunks: a triangular system in each, then a scan over them."""
    q, k, v = x.heads(HEADS).swap(1, 2), nn.sin(x * 2.0).heads(HEADS).swap(1, 2) * 0.5, nn.tanh(x).heads(HEADS).swap(1, 2)
    g, beta = -nn.softplus(x[..., :2]).swap(1, 2), nn.sigmoid(x[..., 2:4]).swap(1, 2)
    return merged(gated_delta(q, k, v, g, beta))


def shifted(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """By one, twice, in two spellings; a learned row stands in front."""
    before = nn.pad(x, (0, 1, 0), (0, 0, 0))[:, : x.shape[1]]
    start = nn.constant(np.linspace(-1, 1, DIM, dtype=np.float32))[None, None].broadcast_to(x.shape[0], 1, DIM)
    return nn.tanh(before) - nn.concat([start, nn.sin(before)[:, :-1]], axis=1)


def far_back(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Three and two back, at once; a window written as shifted copies; one back, and one feature on."""
    s = x.shape[1]
    beside = nn.pad(x, (0, 1, 1), (0, 0, 2), value=0.5)[:, :s, :DIM]
    wide = nn.pad(x, (0, 3, 0), (0, 0, 0), value=0.5)
    return wide[:, :s] * 0.5 + wide[:, 1 : s + 1] * wide[:, 3 : s + 3] + nn.tanh(beside)


def layers(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """One kind over another."""
    return sink(shifted(recurrent(x, at), at), at)


MIXES: dict[str, Mix | Callable[[], nn.Module]] = {
    f.__name__: f
    for f in (
        softmax1, sigmoid, squared, divided_after, keys_first, talking, sink, token_sink, decaying, averaged, largest,
        stick_breaking, repeated_heads, by_tokens, fused_by_tokens, fused_by_places, streaming, blocks, earlier_blocks,
        begun_blocks, heads_apart, state_space, largest_so_far, from_a_table, sequence_first, running_sums, recurrent,
        folded_scan, linear, delta, state_space_by_chunks, delta_by_chunks, beside_values, by_place, long_kernel, shifted,
        far_back, layers,
    )
}  # fmt: skip
CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "causal": lambda: Convolution(padding="causal", groups=DIM),
    "dilated": lambda: Convolution(padding="causal", dilation=2),
    "cut behind": lambda: Convolution(padding=2),
}


@cache
def derived_of(mix: Mix) -> tuple[Program, Program]:
    """The forward program, and the one that goes on from states."""
    program = nn.trace(Model(mix), {"tokens": "i64[b, s]"}, outputs=["logits"])
    return program, ws.optimize(program, kv_cache=True, chunk=6)[0]


@cache
def derived(name: str) -> tuple[Program, Program]:
    return derived_of(CONVOLUTIONS[name]() if name in CONVOLUTIONS else MIXES[name])  # type: ignore[arg-type]


class Rows:
    """Feeds the derived entries on the interpreter. States hold nonsense at first: nothing of them may be read."""

    def __init__(self, program: Program, batch: int, capacity: int = 32) -> None:
        self.program, self.past = program, np.zeros(batch, np.int64)
        self.params = {k: p.load() for k, p in program.params.items()}
        names = set(program.interface.state_names)
        types = {v.name: v.tensor.substitute({"b": batch, "c": capacity}) for v in program["decode"].inputs if v.name in names}
        self.states = {k: np.full(t.concrete({}), 100, t.dtype.np) for k, t in types.items()}

    def feed(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        g = self.program["decode" if tokens.shape[1] == 1 else "prefill"]
        feeds = {"tokens": tokens, "past": self.past, "last": lengths - 1, **self.states}
        names = [v.name for v in g.inputs]
        out = dict(zip(g.output_names, evaluate(g, {k: feeds[k] for k in names}, {k: self.params[k] for k in g.params})))
        self.states = {k: out[k] for k in self.states}
        self.past = self.past + lengths
        return out["logits"]


def check_incremental(
    forward: Program, program: Program, data: st.DataObject, turns: tuple[int, int] = (2, 4), least: int = 1
) -> None:
    """Any chunking, in as many ``turns``, rows of different lengths padded on the right with tokens like any other; rows are
    compared from ``least`` tokens on."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    batch = data.draw(st.integers(1, 3))
    rows, session = [np.zeros(0, np.int64)] * batch, Rows(program, batch)
    for _ in range(data.draw(st.integers(*turns))):
        lengths = np.array([data.draw(st.integers(1, 6)) for _ in range(batch)])
        tokens = rng.integers(0, VOCAB, (batch, lengths.max()))
        got = session.feed(tokens, lengths)
        rows = [np.concatenate([r, t[:n]]) for r, t, n in zip(rows, tokens, lengths)]
        for r, row in enumerate(rows):
            if len(row) >= least:
                want = ws.run(forward, tokens=row[None])["logits"][0, -1]
                np.testing.assert_allclose(got[r], want, rtol=1e-4, atol=1e-5, err_msg=f"row {r} after {len(row)}")


@pytest.mark.parametrize("name", [*MIXES, *CONVOLUTIONS])
@given(st.data())
@settings(max_examples=4, deadline=None)
def test_incremental_equals_full(name: str, data: st.DataObject) -> None:
    check_incremental(*derived(name), data, turns=(1, 5))


class Summary(Model):
    """The logits of what a scan holds after the last token."""

    def __init__(self) -> None:
        super().__init__(recurrent)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        def step(h: nn.Tensor, now: nn.Tensor) -> tuple[nn.Tensor, None]:
            return nn.tanh(h * 0.6 + now), None

        x = time_first(self.embed(tokens))
        return self.head(self.norm(nn.scan(step, nn.full((x.shape[1], DIM), 1.0), x)[0]))


def test_the_last_carry_alone() -> None:
    program = nn.trace(Summary(), {"tokens": "i64[b, s]"}, outputs=["logits"])
    served, _ = ws.optimize(program, kv_cache=True, chunk=6, check=True)
    session, tokens = Rows(served, 2), np.random.default_rng(0).integers(0, VOCAB, (2, 9))
    session.feed(tokens[:, :5], np.array([5, 3]))
    for at in ((5, 3), (6, 4)):
        got = session.feed(tokens[[0, 1], at][:, None], np.array([1, 1]))
        for r, n in enumerate(at):
            want = ws.run(program, tokens=tokens[r : r + 1, : n + 1])["logits"][0]
            np.testing.assert_allclose(got[r], want, rtol=1e-4, atol=1e-5)


class Started(Model):
    """Rows begin at positions of their own: padding in front is not seen."""

    def __call__(self, tokens: nn.Tensor, start: nn.Tensor) -> nn.Tensor:  # type: ignore[override]
        x, at = self.norm(self.embed(tokens)), nn.positions(tokens)
        seen = nn.causal(at) & (at[None, None, :] >= start[:, None, None])
        s, v = scores(x)
        x = x + merged(nn.sigmoid(nn.where(seen[:, None], s, -INF)) @ v)
        return self.head(self.norm(x + seen.cast("f32") @ x))


def test_masks_that_differ_between_rows() -> None:
    program = nn.trace(Started(recurrent), {"tokens": "i64[b, s]", "start": "i64[b]"}, outputs=["logits"])
    served, _ = ws.optimize(program, kv_cache=True, chunk=6, check=True)
    assert [s.kind for s in served.interface.states] == ["full", "full"]


# -- what is kept --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, kept",
    [
        ("sigmoid", ["f32[b, c, 2, 4]"]),  # keys are values
        ("repeated_heads", ["f32[b, c, 1, 4]"]),  # before heads are repeated
        ("averaged", ["f32[b, c, 1, 8]"]),
        ("sequence_first", ["f32[b, c, 2, 4]"]),
        ("by_tokens", ["f32[b, c, 2, 4]", "f32[b, c, 2, 4]", "bool[b, c, 1, 1]"]),
        ("streaming", [*["f32[b, 16, 2, 4]"] * 2, *["f32[b, 2, 2, 4]"] * 2]),  # the last three, and the first two
        ("blocks", ["f32[b, 16, 2, 4]"] * 2),
        ("running_sums", ["f32[b, 2, 4, 4]", "f32[b, 2, 4]"]),
        ("recurrent", ["f32[b, 8]", "f32[b, 8]"]),
        ("folded_scan", ["f32[b, 1, 2, 1, 4, 4]"]),
        ("shifted", ["f32[b, 1, 8]", "f32[b, 1, 8]"]),
        ("far_back", ["f32[b, 1, 8]", "f32[b, 3, 8]"]),
        ("causal", ["f32[b, 2, 8]"]),
        ("dilated", ["f32[b, 4, 8]"]),
    ],
)
def test_no_more_is_kept_than_must_be(name: str, kept: list[str]) -> None:
    _, program = derived(name)
    names = set(program.interface.state_names)
    assert [str(v.type) for v in program["decode"].inputs if v.name in names] == kept


@pytest.mark.parametrize("name, context", [("from_a_table", 48), ("decaying", None)])
def test_tables_of_distances_limit_the_context(name: str, context: int | None) -> None:
    assert derived(name)[1].interface.context == context
