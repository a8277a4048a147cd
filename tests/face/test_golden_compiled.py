"""Compiled models against transformers: every position, by prefill, by decode and by both, past windows and rings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import wasat as ws

CASES = sorted(p.parent for p in (Path(__file__).resolve().parents[1] / "golden" / "hf").glob("*/golden.npz"))
CHUNKS = (1, 5, 3, 8, 1, 1, 13, 2, 6)  # the model's own is 8


@pytest.mark.parametrize("folder", CASES, ids=lambda p: p.name)
def test_logits_equal_transformers(folder: Path, tmp_path: Path) -> None:
    golden = np.load(folder / "golden.npz")
    ids, want = golden["ids"], golden["logits"]
    batch, n = ids.shape
    ws.compile(ws.from_pretrained(folder), tmp_path / "out", chunk=8)
    model = ws.load(tmp_path / "out")

    rows = model.session(batch * n)  # one for every prefix
    prefixes = rows.step(np.repeat(ids, n, axis=0), np.tile(np.arange(1, n + 1), batch))
    np.testing.assert_allclose(prefixes.reshape(want.shape), want, rtol=0, atol=1e-4)

    session = model.session(batch)
    for at in range(n):
        np.testing.assert_allclose(session.step(ids[:, at : at + 1]), want[:, at], rtol=0, atol=1e-4)

    session.reset()
    ends = np.minimum(np.cumsum(CHUNKS), n)
    assert ends[-1] == n
    for start, end in zip([0, *ends], ends):
        if start < end:
            np.testing.assert_allclose(session.step(ids[:, start:end]), want[:, end - 1], rtol=0, atol=1e-4)
