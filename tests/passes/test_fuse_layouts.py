"""Attention whose heads share an axis with rows, or come first: fused with rows in front, so that it can be served."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.passes import Cleanup, FuseAttention, PassManager

import wasat as ws
from wasat.testing import InterpreterCheck

HEADS, WIDTH, INF = 4, 4, math.inf
Layout = tuple[Callable[[nn.Tensor], nn.Tensor], Callable[[nn.Tensor, nn.Tensor], nn.Tensor]]


def batch_first(x: nn.Tensor) -> nn.Tensor:
    b, s, h, d = x.shape
    return x.swap(1, 2).reshape(b * h, s, d)


def heads_first(x: nn.Tensor) -> nn.Tensor:
    b, s, h, d = x.shape
    return x.transpose(2, 0, 1, 3).reshape(b * h, s, d)


def back_from_batch_first(y: nn.Tensor, x: nn.Tensor) -> nn.Tensor:
    b, s, h, d = x.shape
    return y.reshape(b, h, s, d).swap(1, 2).merge()


def back_from_heads_first(y: nn.Tensor, x: nn.Tensor) -> nn.Tensor:
    b, s, h, d = x.shape
    return y.reshape(h, b, s, d).transpose(1, 2, 0, 3).merge()


LAYOUTS: dict[str, Layout] = {
    "folded behind rows": (batch_first, back_from_batch_first),
    "folded before rows": (heads_first, back_from_heads_first),
    "before rows": (lambda x: x.transpose(2, 0, 1, 3), lambda y, x: y.transpose(1, 2, 0, 3).merge()),
}


class Model(nn.Module):
    def __init__(self, layout: Layout, masked: str = "") -> None:
        self.embed, self.head = nn.Embedding(11, 16, std=1.0), nn.Linear(16, 11)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.layout, self.masked = layout, masked

    def __call__(self, tokens: nn.Tensor, bias: nn.Tensor) -> nn.Tensor:
        x, at, (to, back) = self.embed(tokens), nn.positions(tokens), self.layout
        q, k, v = (y(x).heads(HEADS) for y in (self.q, self.k, self.v))
        s = to(q) @ to(k).T * 0.7
        b, n, h, _ = q.shape
        if self.masked == "a bias for each head, heads behind":  # as Bloom adds its slopes
            s = (s.reshape(b, h, n, n) + bias[:, None, None] * at.cast("f32")).reshape(*s.shape)
        elif self.masked == "a bias for each head, heads first":
            s = (s.reshape(h, b, n, n) + bias[:, None, None, None] * at.cast("f32")).reshape(*s.shape)
        elif self.masked == "of rows and heads":
            slopes = (bias[None, :] * x[:, 0].sum(-1)[:, None]).reshape(b * h, 1, 1)
            s = s + slopes * at.cast("f32")
        w = nn.softmax(nn.where(nn.causal(at), s, -INF))
        return self.head(x + self.o(back(w @ to(v), q)))


class Unbiased(Model):
    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:  # type: ignore[override]
        return super().__call__(tokens, tokens)


def traced(layout: str, masked: str = "") -> ws.Program:
    inputs = {"tokens": "i64[b, s]", "bias": f"f32[{HEADS}]"}
    return nn.trace(Model(LAYOUTS[layout], masked), inputs, outputs=["logits"])


@pytest.mark.parametrize(
    "layout, masked",
    [*((name, "") for name in LAYOUTS), ("folded behind rows", "a bias for each head, heads behind"),
     ("folded before rows", "a bias for each head, heads first"), ("before rows", "a bias for each head, heads first"),
     ("folded behind rows", "of rows and heads")],
)  # fmt: skip
def test_layouts(layout: str, masked: str) -> None:
    """One attention of rows with heads, the same numbers."""
    program = traced(layout, masked)
    check = InterpreterCheck([{"b": 1, "s": 1}, {"b": 3, "s": 5}])
    PassManager([Cleanup(), FuseAttention(), Cleanup()], check=check).run(program)
    [node] = [n for n in program["forward"].nodes if n.op.name == "attention"]
    assert [str(d) for d in node.output.shape] == ["b", "s", "4", "4"]
    assert node.attrs.causal  # type: ignore[attr-defined]
    assert len(node.inputs) == 3 + bool(masked)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_served(layout: str) -> None:
    """Each with a cache; rows of different lengths."""
    from test_kept import Rows

    program = nn.trace(Unbiased(LAYOUTS[layout]), {"tokens": "i64[b, s]"}, outputs=["logits"])
    served, _ = ws.optimize(program, kv_cache=True, chunk=6)
    assert served["decode"].count("cached_attention") == 1
    rng, session, rows = np.random.default_rng(0), Rows(served, 2), [np.zeros(0, np.int64)] * 2
    for lengths in (np.array(n) for n in ([5, 3], [1, 1], [2, 6], [1, 1])):
        tokens = rng.integers(0, 11, (2, lengths.max()))
        got = session.feed(tokens, lengths)
        rows = [np.concatenate([r, t[:n]]) for r, t, n in zip(rows, tokens, lengths)]
        for r, y in zip(rows, got):
            want = ws.run(program, tokens=r[None])["logits"][0, -1]
            np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


class Mixed(nn.Module):
    """Queries folded behind rows, keys before them: query row i meets another's keys."""

    def __call__(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> nn.Tensor:
        return nn.softmax(batch_first(q) @ heads_first(k).T) @ batch_first(v)


class Turned(Mixed):
    """Weights of rows and heads taken for those of heads and rows."""

    def __call__(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> nn.Tensor:
        b, s, h, _ = q.shape
        w = nn.softmax(batch_first(q) @ batch_first(k).T)
        return w.reshape(h, b, s, s) @ v.transpose(2, 0, 1, 3)


@pytest.mark.parametrize("module", [Mixed, Turned])
def test_other_orders_stay_as_they_are(module: type[Mixed]) -> None:
    """Numbers stay; where it is fused all the same, heads are not taken out of rows."""
    shape = f"f32[b, s, {HEADS}, {WIDTH}]"
    program = nn.trace(module(), {"q": shape, "k": shape, "v": shape})
    PassManager([Cleanup(), FuseAttention(), Cleanup()], check=InterpreterCheck([{"b": 3, "s": 5}])).run(program)
    assert all(n.output.shape[2] == 1 for n in program["forward"].nodes if n.op.name == "attention")


class Regrouped(Mixed):
    """A bias of rows and heads that meets scores whose rows and heads share an axis for a moment."""

    def __call__(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> nn.Tensor:
        b, s, h, _ = q.shape
        slopes = q.sum((1, 3)).reshape(b * h, 1, 1)
        scores = (q.swap(1, 2) @ k.swap(1, 2).T).reshape(b * h, s, s) + slopes * nn.positions(q).cast("f32")
        return nn.softmax(scores.reshape(b, h, s, s)) @ v.swap(1, 2)


class OneSink(Mixed):
    """A column that is the same for all, beside scores whose rows and heads share an axis."""

    def __call__(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> nn.Tensor:
        scores = batch_first(q) @ batch_first(k).T
        column = nn.constant([[[0.5]]]).broadcast_to(*scores.shape[:2], 1)
        return nn.softmax(nn.concat([scores, column], axis=-1))[..., :-1] @ batch_first(v)


class WeighedSink(Mixed):
    """A column whose weight is not dropped: a row of values goes with it."""

    def __call__(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> nn.Tensor:
        scores, v = q.swap(1, 2) @ k.swap(1, 2).T, v.swap(1, 2)
        return nn.softmax(nn.pad(scores, (0, 0, 0, 0), (0, 0, 0, 1))) @ nn.pad(v, (0, 0, 0, 0), (0, 0, 1, 0), 2.0)


class ScoresToo(Mixed):
    """Scores that the caller wants as well."""

    def __call__(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:  # type: ignore[override]
        scores = q.swap(1, 2) @ k.swap(1, 2).T
        return nn.softmax(scores) @ v.swap(1, 2), scores


@pytest.mark.parametrize("module, fused", [(Regrouped, 1), (OneSink, 0), (WeighedSink, 0), (ScoresToo, 0)])
def test_beside_them(module: type[Mixed], fused: int) -> None:
    shape = f"f32[b, s, {HEADS}, {WIDTH}]"
    program = nn.trace(module(), {"q": shape, "k": shape, "v": shape})
    PassManager([Cleanup(), FuseAttention(), Cleanup()], check=InterpreterCheck([{"b": 3, "s": 5}])).run(program)
    assert program["forward"].count("attention") == fused
