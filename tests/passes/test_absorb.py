"""Latent attention keeps the latent vectors; attention whose keys and values follow from less keeps that."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_kept import VOCAB, Rows
from wasat.frontend import nn
from wasat.frontend.nn.tensor import emit

import wasat as ws

DIM, HEADS, PLAIN, ROTATED, WIDTH = 16, 4, 6, 4, 5


class Latent(nn.Module):
    """Keys and values of all heads from ``latent`` numbers, and a rotated part of the keys that heads share."""

    def __init__(self, latent: int = 7, bias: bool = False, window: int | None = None, own: bool = False) -> None:
        self.embed, self.head = nn.Embedding(VOCAB, DIM, std=1.0), nn.Linear(HEADS * WIDTH, VOCAB)
        self.q, self.down = nn.Linear(DIM, HEADS * (PLAIN + ROTATED)), nn.Linear(DIM, latent + ROTATED)
        self.up, self.norm = nn.Linear(latent, HEADS * (PLAIN + WIDTH), bias=bias), nn.RMSNorm(latent)
        self.values = nn.Linear(DIM, HEADS * WIDTH) if own else None
        self.latent, self.window = latent, window

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x, at = self.embed(tokens), nn.positions(tokens)
        q, turned = self.q(x).heads(HEADS).split([PLAIN, ROTATED], axis=-1)
        latent, rotated = self.down(x).split([self.latent, ROTATED], axis=-1)
        k, v = self.up(self.norm(latent)).heads(HEADS).split([PLAIN, WIDTH], axis=-1)
        if self.values is not None:
            v = self.values(x).heads(HEADS)
        shared = nn.rope(rotated.heads(1), at).broadcast_to(*k.shape[:3], ROTATED)
        q, k = nn.concat([nn.rope(turned, at), q]), nn.concat([shared, k])
        keep = nn.causal(at) if self.window is None else nn.causal(at) & nn.within(at, self.window)
        scores = nn.einsum("b s h d, b t h d -> b h s t", q, k) * 0.3
        w = nn.softmax(nn.where(keep, scores, -math.inf))
        return self.head(nn.einsum("b h s t, b t h d -> b s h d", w, v).merge())


def test_the_latent_vectors_are_kept() -> None:
    """And keys that heads share, once; incremental equals full."""
    program = nn.trace(Latent(), {"tokens": "i64[b, s]"}, outputs=["logits"])
    served, report = ws.optimize(program, kv_cache=True, chunk=6, check=True)
    names = served.interface.state_names
    assert [str(v.type) for v in served["decode"].inputs if v.name in names] == ["f32[b, c, 1, 11]"]
    assert "attention over 11 numbers per token instead of those that they make" in report.explain()
    assert served["decode"].count("linear") == 2  # q and down in one, head, and no up
    rng = np.random.default_rng(0)
    tokens, rows = rng.integers(0, VOCAB, (2, 12)), Rows(served, 2)
    want = ws.run(program, tokens=tokens)["logits"]
    at = np.zeros(2, int)
    for lengths in ([5, 2], [1, 1], [3, 6], [1, 1]):
        new = np.stack([np.pad(t[a : a + n], (0, max(lengths) - n)) for t, a, n in zip(tokens, at, lengths)])
        got = rows.feed(new, np.array(lengths))
        at += lengths
        np.testing.assert_allclose(got, want[[0, 1], at - 1], rtol=1e-4, atol=1e-5)


class Turned(nn.Module):
    """Heads in front, the two up-projections apart, one as a product with a matrix [n, m], features of the keys in another
    order, the shared part spread over heads by itself (DeepSeek as people write it)."""

    def __init__(self) -> None:
        self.embed, self.head = nn.Embedding(VOCAB, DIM, std=1.0), nn.Linear(HEADS * WIDTH, VOCAB)
        self.q, self.down = nn.Linear(DIM, HEADS * (PLAIN + ROTATED)), nn.Linear(DIM, 3)
        self.shared, self.keys = nn.Linear(DIM, ROTATED), nn.Linear(3, HEADS * PLAIN)
        self.values = nn.Parameter((3, HEADS * WIDTH), std=0.5)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x, at = self.embed(tokens), nn.positions(tokens)
        b, s, _ = x.shape
        latent = nn.tanh(self.down(x))
        k, v = self.keys(latent).heads(HEADS).swap(1, 2), (latent @ self.values).heads(HEADS).swap(1, 2)
        turned = nn.rope(self.shared(x).heads(1), at).swap(1, 2).broadcast_to(b, HEADS, s, ROTATED)
        k = nn.concat([k[..., ::2], turned, k[..., 1::2]], axis=-1)
        scores = self.q(x).heads(HEADS).swap(1, 2) @ k.T * 0.3
        return self.head((nn.softmax(nn.where(nn.causal(at), scores, -math.inf)) @ v).swap(1, 2).merge())


@pytest.mark.parametrize("rows", ["b", "1"])
def test_however_keys_and_values_are_laid_out(rows: str) -> None:
    program = nn.trace(Turned(), {"tokens": f"i64[{rows}, s]"}, outputs=["logits"])
    served, _ = ws.optimize(program, kv_cache=True, chunk=6, check=True)
    names = served.interface.state_names
    assert [str(v.type) for v in served["decode"].inputs if v.name in names] == [f"f32[{rows}, c, 1, {3 + ROTATED}]"]


class Written(Turned):
    """Latent vectors with an axis of one head, keys written part by part over zeros (transformers' export)."""

    def __init__(self, reduce: str = "none", last: int = PLAIN) -> None:
        super().__init__()
        self.reduce, self.last = reduce, last

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x, at = self.embed(tokens), nn.positions(tokens)
        b, s, _ = x.shape
        latent = nn.tanh(self.down(x)).reshape(b, 1, s, 3)
        k = self.keys(latent).reshape(b, s, HEADS, PLAIN).swap(1, 2)
        v = (latent @ self.values).reshape(b, s, HEADS, WIDTH).swap(1, 2)
        turned = nn.rope(self.shared(x).heads(1), at).swap(1, 2).broadcast_to(b, HEADS, s, ROTATED)
        keys = nn.full((b, HEADS, s, PLAIN + ROTATED), 0.0)
        for part, first in ((k, 0), (turned, self.last)):
            places = nn.constant(np.arange(first, first + part.shape[3]))
            keys = emit("scatter", keys, places, part, axis=3, reduce=self.reduce)
        scores = self.q(x).heads(HEADS).swap(1, 2) @ keys.T * 0.3
        return self.head((nn.softmax(nn.where(nn.causal(at), scores, -math.inf)) @ v).swap(1, 2).merge())


def test_keys_that_are_written_part_by_part() -> None:
    program = nn.trace(Written(), {"tokens": "i64[b, s]"}, outputs=["logits"])
    served, _ = ws.optimize(program, kv_cache=True, chunk=6, check=True)
    names = served.interface.state_names
    assert [str(v.type) for v in served["decode"].inputs if v.name in names] == [f"f32[b, c, 1, {3 + ROTATED}]"]
    rng = np.random.default_rng(0)
    tokens, rows = rng.integers(0, VOCAB, (2, 9)), Rows(served, 2)
    want = ws.run(program, tokens=tokens)["logits"]
    for lo, hi in ((0, 5), (5, 6), (6, 9)):
        got = rows.feed(tokens[:, lo:hi], np.array([hi - lo] * 2))
        np.testing.assert_allclose(got, want[:, hi - 1], rtol=1e-4, atol=1e-5)


def test_what_is_added_to_keys_is_not_followed() -> None:
    program = nn.trace(Written("add", PLAIN - 1), {"tokens": "i64[b, s]"}, outputs=["logits"])
    served, _ = ws.optimize(program, kv_cache=True, chunk=6, check=True)
    assert f"f32[b, c, 1, {3 + ROTATED}]" not in [str(v.type) for v in served["decode"].inputs]


@pytest.mark.parametrize(
    "how", [{"bias": True}, {"window": 3}, {"own": True}, {"latent": 17}], ids=["bias", "window", "values of their own", "wide"]
)
def test_other_attention_keeps_keys_and_values(how: dict[str, int]) -> None:
    program = nn.trace(Latent(**how), {"tokens": "i64[b, s]"}, outputs=["logits"])  # type: ignore[arg-type]
    served, _ = ws.optimize(program, kv_cache=True, chunk=6, check=True)
    assert served.interface.state_names == ["cache.0.k", "cache.0.v"]


def test_compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    program = nn.trace(Latent(), {"tokens": "i64[b, s]"}, outputs=["logits"])
    out = tmp_path_factory.mktemp("latent") / "out"
    ws.compile(program, out, chunk=6)
    session, tokens = ws.load(out).session(2, context=32), np.random.default_rng(1).integers(0, VOCAB, (2, 9))
    want = ws.run(program, tokens=tokens)["logits"]
    np.testing.assert_allclose(session.step(tokens[:, :8]), want[:, 7], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(session.step(tokens[:, 8:]), want[:, 8], rtol=1e-4, atol=1e-5)
