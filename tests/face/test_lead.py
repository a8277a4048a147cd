"""What stands before the first token: computed apart, once, and a cache that begins with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.ir import IRError, evaluate

import wasat as ws

VOCAB, DIM, HEADS = 13, 16, 2


class Decoder(nn.Module):
    def __init__(self, window: int | None = None) -> None:
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.norms = nn.ModuleList([nn.RMSNorm(DIM), nn.RMSNorm(DIM)])
        self.mixers = nn.ModuleList([nn.Attention(DIM, HEADS, 1, 8, window=w, rope=nn.RoPE(8)) for w in (None, window)])

    def logits(self, x: nn.Tensor) -> nn.Tensor:
        at = nn.positions(x)
        for norm, mix in zip(self.norms, self.mixers):
            x = x + mix(norm(x), at)
        return self.head(x)


class BeginOfText(Decoder):
    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        return self.logits(self.embed(nn.concat([nn.full((tokens.shape[0], 1), 1, "i64"), tokens], axis=1)))


class SoftPrompt(Decoder):
    """Learned vectors, joined twice; the logits of the tokens alone, and of the last one."""

    def __init__(self) -> None:
        super().__init__(window=4)
        self.first, self.second = nn.Parameter((1, 2, DIM), std=1.0), nn.Parameter((3, DIM), std=1.0)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        b = tokens.shape[0]
        x = nn.concat([self.second.broadcast_to(b, 3, DIM), self.embed(tokens)], axis=1)
        return self.logits(nn.concat([self.first.broadcast_to(b, 2, DIM), x], axis=1))[:, 5:]


class LastOfPrompt(SoftPrompt):
    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = nn.concat([self.second.broadcast_to(tokens.shape[0], 3, DIM), self.embed(tokens)], axis=1)
        return self.logits(x)[:, -1]


class Picture(Decoder):
    """A picture's features before the text."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Linear(6, DIM)

    def __call__(self, tokens: nn.Tensor, picture: nn.Tensor) -> nn.Tensor:
        x = nn.concat([self.see(picture), self.embed(tokens)], axis=1)
        return self.logits(x)[:, picture.shape[1] :]


TOKENS = {"tokens": "i64[b, s]"}
CASES: dict[str, tuple[type[nn.Module], dict[str, str]]] = {
    "begin of text": (BeginOfText, TOKENS), "soft prompt": (SoftPrompt, TOKENS), "last of a prompt": (LastOfPrompt, TOKENS),
    "picture": (Picture, {**TOKENS, "picture": "f32[b, 5, 6]"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps(name: str, tmp_path: Path) -> None:
    """In chunks, one by one, in rows of different lengths, again after a reset: what the forward pass gives."""
    make, inputs = CASES[name]
    program = nn.trace(make(), inputs, outputs=["logits"])
    params = {k: p.load() for k, p in program.params.items()}
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {"picture": rng.standard_normal((2, 5, 6)).astype(np.float32)} if len(inputs) > 1 else {}
    ws.compile(program, tmp_path / "out", chunk=4)
    session = ws.load(tmp_path / "out").session(2, context=20)
    if given:
        session.encode(**given)
    for lengths in ([[1, 1], [3, 2], [1, 1], [6, 0], [2, 3]], [[7, 2], [1, 1]]):
        tokens = rng.integers(0, VOCAB, (2, 20))
        for n in map(np.array, lengths):
            past = session.past
            new = np.zeros((2, n.max()), np.int64)
            for r in range(2):
                new[r, : n[r]] = tokens[r, past[r] : past[r] + n[r]]
            got = session.step(new, n)
            for r in np.flatnonzero(n):
                feeds = {"tokens": tokens[r : r + 1, : session.past[r]], **{k: x[r : r + 1] for k, x in given.items()}}
                (want,) = evaluate(program["forward"], feeds, params)
                want = want[0] if want.ndim == 2 else want[0, -1]
                np.testing.assert_allclose(got[r], want, rtol=1e-4, atol=1e-5)
        session.reset()
    decode = ws.optimize(program)[0]["decode"]
    assert decode.count("cache_start") == decode.count("cached_attention") == 2
    assert decode.count("embedding") == 1  # of the new token: what stands first is not computed again
    assert decode.count("linear") == 2 * 2 + 1


class Behind(Decoder):
    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        return self.logits(nn.concat([self.embed(tokens), nn.full((tokens.shape[0], 1, DIM), 1.0)], axis=1))


class OwnFirst(Decoder):
    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        return self.logits(nn.concat([x[:, :1], x], axis=1))


class Summed(SoftPrompt):
    """What stands first is summed up, tokens too."""

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = nn.concat([self.second.broadcast_to(tokens.shape[0], 3, DIM), self.embed(tokens)], axis=1)
        return self.logits(x + x.mean(axis=1, keepdims=True))


class Bidirectional(SoftPrompt):
    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = nn.concat([self.second.broadcast_to(tokens.shape[0], 3, DIM), self.embed(tokens)], axis=1).heads(HEADS)
        return nn.attention(x, x, x).merge()


class Inside(SoftPrompt):
    """From the middle of what stands first and of the tokens."""

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = nn.concat([self.second.broadcast_to(tokens.shape[0], 3, DIM), self.embed(tokens)], axis=1)
        return self.logits(x)[:, 4:]


@pytest.mark.parametrize("make", [Behind, OwnFirst, Summed, Bidirectional, Inside])
def test_what_is_no_lead_is_refused(make: type[nn.Module]) -> None:
    program = nn.trace(make(), TOKENS, outputs=["logits"])
    with pytest.raises(IRError, match="no KV cache can be derived for output logits"):
        ws.optimize(program, kv_cache=True)
    assert "forward" in ws.optimize(program)[0].graphs


def test_a_number_that_is_not_known() -> None:
    program = nn.trace(Picture(), {**TOKENS, "picture": "f32[b, n, 6]"}, outputs=["logits"])
    with pytest.raises(IRError, match=r"n positions stand before the first token.*in place of n"):
        ws.optimize(program, kv_cache=True)
