"""Attention with a sink for each head, compiled: prefill in chunks, decoding, a ring that wraps."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from wasat.frontend import nn

import wasat as ws

HEADS = 4


class Decoder(nn.Module):
    """Two key heads for four of queries; a learned logit joins the scores, as in gpt-oss."""

    def __init__(self, window: int | None) -> None:
        self.embed, self.head = nn.Embedding(13, 16, std=1.0), nn.Linear(16, 13)
        self.q, self.k, self.v, self.o = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(32, 16)
        self.sink, self.window = nn.Parameter((HEADS, 1, 1), std=2.0), window

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x, at = self.embed(tokens), nn.positions(tokens)
        k, v = (y(x).heads(2)[:, :, :, None].broadcast_to(*x.shape[:2], 2, 2, 8) for y in (self.k, self.v))
        k, v = (y.reshape(*x.shape[:2], HEADS, 8).swap(1, 2) for y in (k, v))
        keep = nn.causal(at) if self.window is None else nn.causal(at) & nn.within(at, self.window)
        s = nn.where(keep, self.q(x).heads(HEADS).swap(1, 2) @ k.T * 0.6, -math.inf)
        w = nn.softmax(nn.concat([s, self.sink.broadcast_to(*s.shape[:3], 1)], axis=-1))[..., :-1]
        return self.head(x + self.o((w @ v).swap(1, 2).merge()))


@pytest.mark.parametrize("window", [None, 4], ids=["full", "ring"])
def test_compiled(window: int | None, tmp_path: Path) -> None:
    program = nn.trace(Decoder(window), {"tokens": "i64[b, s]"}, outputs=["logits"])
    served, report = ws.optimize(program, kv_cache=True, chunk=5)
    assert not [r for r in report.remarks("missed") if "softmax" in r.message]
    assert served["decode"].count("cached_attention") == served["prefill"].count("cached_attention") == 1
    ws.compile(program, tmp_path / "out", chunk=5, check=True)
    session, rng = ws.load(tmp_path / "out").session(2, context=64), np.random.default_rng(0)
    rows = [np.zeros(0, np.int64)] * 2
    for lengths in ([5, 3], [1, 1], [4, 5], [1, 0], [5, 2], [1, 1], [1, 1]):
        tokens = rng.integers(0, 13, (2, max(lengths)))
        got = session.step(tokens, lengths)
        rows = [np.concatenate([r, t[:n]]) for r, t, n in zip(rows, tokens, lengths)]
        for row, y, n in zip(rows, got, lengths):
            if n:
                want = ws.run(program, tokens=row[None])["logits"][0, -1]
                np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
