"""Tokens that see each other: a prefix, a picture. Whole in one step they are served; what was cut is refused by the row."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.ir import IRError, evaluate
from wasat.runtime import InputError

import wasat as ws

VOCAB, DIM, HEADS = 13, 16, 2
Keep = Callable[..., nn.Tensor]


class Decoder(nn.Module):
    """Two layers, so that what a token saw stays in what later ones see of it."""

    def __init__(self, keep: Keep, added: bool = False) -> None:
        self.embed, self.head, self.keep, self.added = nn.Embedding(VOCAB, DIM, std=1.0), nn.Linear(DIM, VOCAB), keep, added
        self.q, self.k = (nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(2)]) for _ in range(2))

    def __call__(self, tokens: nn.Tensor, **rest: nn.Tensor) -> nn.Tensor:
        x, at = self.embed(tokens), nn.positions(tokens)
        for to_q, to_k in zip(self.q, self.k):
            q, k, v = nn.rope(to_q(x).heads(HEADS), at), nn.rope(to_k(x).heads(HEADS), at), x.heads(HEADS)
            scores = nn.einsum("b s h d, b t h d -> b h s t", q, k) * 0.3
            keep = self.keep(at, **rest)
            scores = scores + nn.where(keep, 0.0, -math.inf) if self.added else nn.where(keep, scores, -math.inf)
            x = x + nn.einsum("b h s t, b t h d -> b s h d", nn.softmax(scores), v).merge()
        return self.head(x)


def prefix(at: nn.Tensor) -> nn.Tensor:
    return nn.causal(at) | (at < 4)


def given_prefix(at: nn.Tensor, prompt: nn.Tensor) -> nn.Tensor:
    return nn.causal(at)[None, None] | (at[None, None, None, :] < prompt[:, None, None, None])


def images(at: nn.Tensor, image: nn.Tensor) -> nn.Tensor:
    same = (image[:, :, None] == image[:, None, :]) & (image[:, :, None] > 0)
    return ~(~nn.causal(at) & ~same)[:, None]


def marked(at: nn.Tensor, first: nn.Tensor) -> nn.Tensor:
    """Tokens that are marked are seen by all, and what is padding by none."""
    return (nn.causal(at) | first[:, None, :])[:, None]


TOKENS = {"tokens": "i64[b, s]"}
IMAGE = np.array([[0, 1, 1, 1, 0, 0, 2, 2, 0, 0], [1, 1, 1, 0, 0, 2, 2, 2, 0, 0]])
CASES: dict[str, tuple[Keep, bool, dict[str, str], dict[str, np.ndarray], dict[str, np.ndarray]]] = {
    "prefix": (prefix, False, {}, {}, {}),
    "prefix, added": (prefix, True, {}, {}, {}),
    "given prefix": (given_prefix, False, {"prompt": "i64[b]"}, {}, {"prompt": np.array([3, 4])}),
    "images": (images, False, {"image": "i64[b, s]"}, {"image": IMAGE}, {}),
    "images, added": (images, True, {"image": "i64[b, s]"}, {"image": IMAGE}, {}),
    "marked": (marked, False, {"first": "bool[b, s]"}, {"first": np.arange(10) < np.array([[4], [3]])}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_steps(name: str, tmp_path: Path) -> None:
    keep, added, inputs, along, fixed = CASES[name]
    program = nn.trace(Decoder(keep, added), {**TOKENS, **inputs}, outputs=["y"])
    params = {k: p.load() for k, p in program.params.items()}
    ws.compile(program, tmp_path / "out", chunk=8)
    session = ws.load(tmp_path / "out").session(2, context=20)
    if fixed:
        session.encode(**fixed)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 10))

    def feed(counts: list[int]) -> np.ndarray:
        n, past = np.array(counts), session.past
        new = {k: np.zeros((2, n.max()), x.dtype) for k, x in {"tokens": tokens, **along}.items()}
        for k, x in new.items():
            for r in range(2):
                x[r, : n[r]] = {"tokens": tokens, **along}[k][r, past[r] : past[r] + n[r]]
        return session.step(new.pop("tokens"), n, **new)

    for counts in ([4, 5], [1, 3], [3, 0], [1, 1], [1, 1]):
        got = feed(counts)
        for r in np.flatnonzero(counts):
            end = session.past[r]
            own = {k: x[r : r + 1, :end] for k, x in along.items()} | {k: x[r : r + 1] for k, x in fixed.items()}
            (want,) = evaluate(program["forward"], {"tokens": tokens[r : r + 1, :end], **own}, params)
            np.testing.assert_allclose(got[r], want[0, -1], rtol=1e-4, atol=1e-5)
    session.reset()
    feed([2, 2])
    with pytest.raises(InputError, match=r"row [01] holds 2 tokens, of which some see the new ones: what sees each other"):
        feed([1, 1])  # one by one
    with pytest.raises(InputError, match=r"row [01] holds 2 tokens, of which some see the new ones"):
        feed([3, 2])
    assert session.past.tolist() == [2, 2]
    session.truncate(0)
    feed([4, 5])
    feed([1, 1])
    session.truncate([4, 6])
    for length in ([3, 6], [4, 2]):  # where the first have seen what is to go
        with pytest.raises(InputError, match=r"row [01] cannot go back to [23] of [46] positions: 0 to [34] came in one step"):
            session.truncate(length)
    assert session.past.tolist() == [4, 6]
    session.truncate([0, 5])
    feed([2, 1])


class Near(Decoder):
    """With attention to the last three beside what sees ahead."""

    def __call__(self, tokens: nn.Tensor, **rest: nn.Tensor) -> nn.Tensor:
        at, h = nn.positions(tokens), self.embed(tokens).heads(HEADS)
        keep = nn.causal(at) & nn.within(at, 3)
        scores = nn.where(keep, nn.einsum("b s h d, b t h d -> b h s t", h, h), -math.inf)
        y = nn.einsum("b h s t, b t h d -> b s h d", nn.softmax(scores), h).merge()
        return super().__call__(tokens, **rest) + self.head(y)


class Summed(Near):
    """And with a running sum."""

    def __call__(self, tokens: nn.Tensor, **rest: nn.Tensor) -> nn.Tensor:
        return super().__call__(tokens, **rest) + self.head(nn.cumsum(self.embed(tokens), axis=1))


def test_a_step_that_is_refused_leaves_what_a_row_holds(tmp_path: Path) -> None:
    program = nn.trace(Summed(images), {**TOKENS, "image": "i64[b, s]"}, outputs=["y"])
    ws.compile(program, tmp_path / "out", chunk=4)
    session = ws.load(tmp_path / "out").session(1, context=20)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 12))
    image = np.array([[0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]])
    session.step(tokens[:, :4], image=image[:, :4])
    session.step(tokens[:, 4:6], image=image[:, 4:6])
    with pytest.raises(InputError, match="row 0 holds 6 tokens, of which some see the new ones"):
        session.step(tokens[:, 6:10], image=image[:, 6:10])
    got = session.step(tokens[:, 7:9], image=image[:, 7:9])
    kept = np.r_[0:6, 7:9]
    params = {k: p.load() for k, p in program.params.items()}
    (want,) = evaluate(program["forward"], {"tokens": tokens[:, kept], "image": image[:, kept]}, params)
    np.testing.assert_allclose(got, want[:, -1], rtol=1e-4, atol=1e-5)


def test_a_step_that_is_refused_wrote_to_rings(tmp_path: Path) -> None:
    """So a row does not go back to where what it wrote over would be read."""
    program = nn.trace(Near(images), {**TOKENS, "image": "i64[b, s]"}, outputs=["y"])
    ws.compile(program, tmp_path / "out", chunk=4)
    model = ws.load(tmp_path / "out")
    (ring,) = {s.capacity for s in model.manifest.interface.states} - {None}
    assert ring is not None
    session, n = model.session(1, context=ring + 20), ring + 8
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, n))
    for at in range(n):
        session.step(tokens[:, at : at + 1], image=np.full((1, 1), at == n - 1, np.int64))
    with pytest.raises(InputError, match="of which some see the new ones"):
        session.step(tokens[:, :4], image=np.ones((1, 4), np.int64))
    with pytest.raises(InputError, match="sliding-window caches hold the last"):
        session.truncate(n + 3 - ring + 2)  # two before it, the refused step's last token lies
    session.truncate(n + 4 - ring + 2)
    got = session.step(tokens[:, :1], image=np.zeros((1, 1), np.int64))
    kept = np.concatenate([tokens[:, : n + 6 - ring], tokens[:, :1]], axis=1)
    params = {k: p.load() for k, p in program.params.items()}
    (want,) = evaluate(program["forward"], {"tokens": kept, "image": np.zeros_like(kept)}, params)
    np.testing.assert_allclose(got, want[:, -1], rtol=1e-4, atol=1e-5)


def one_ahead_or_given(at: nn.Tensor, first: nn.Tensor) -> nn.Tensor:
    return ((at[None, :] <= at[:, None] + 1) | first[:, None, :])[:, None]


def given_alone(at: nn.Tensor, first: nn.Tensor) -> nn.Tensor:
    return nn.full((at.shape[0], 1), True, "bool") & first[:, None, :]


def segments_alone(at: nn.Tensor, first: nn.Tensor) -> nn.Tensor:
    return (first[:, :, None] == first[:, None, :])[:, None]


def given_twice(at: nn.Tensor, first: nn.Tensor) -> nn.Tensor:
    return ((first[:, :, None] == first[:, None, :]) | first[:, None, :])[:, None]


def far(at: nn.Tensor) -> nn.Tensor:
    """All but the first four are seen."""
    return nn.causal(at) | (at >= 4)


def products(at: nn.Tensor) -> nn.Tensor:
    """Not followed, and of positions alone."""
    return nn.causal(at) | (at[None, :] * at[:, None] % 3 == 0)


@pytest.mark.parametrize("keep", [one_ahead_or_given, given_alone, given_twice, segments_alone, far, products])
def test_what_looks_ahead_on_and_on_is_refused(keep: Keep) -> None:
    given = {"first": "bool[b, s]"} if "first" in keep.__annotations__ else {}
    program = nn.trace(Decoder(keep), {**TOKENS, **given}, outputs=["y"])
    with pytest.raises(IRError, match=r"no KV cache can be derived for output y(.|\n)*(bidirectional|later)"):
        ws.optimize(program, kv_cache=True)
