"""Compiled models against transformers: every position, by prefill, by decode and by both, past windows and rings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rounding import assert_near, bound, spread

import wasat as ws

CASES = sorted(p.parent for p in (Path(__file__).resolve().parents[1] / "golden" / "hf").glob("*/golden.npz"))
CHUNKS = (1, 5, 3, 8, 1, 1, 13, 2, 6)  # the model's own is 8


@pytest.mark.parametrize("folder", CASES, ids=lambda p: p.name)
def test_logits_equal_transformers(folder: Path, tmp_path: Path) -> None:
    golden = np.load(folder / "golden.npz")
    ids, want = golden["ids"], golden["logits"]
    batch, n = ids.shape
    program = ws.from_pretrained(folder)
    far = spread(program["forward"], {"tokens": ids}, {k: p.load() for k, p in program.params.items()})[0]
    allowed = bound(want, far / 2)  # element by element: about 2e-5, and less where a logit's terms are small
    ws.compile(program, tmp_path / "out", chunk=8)
    model = ws.load(tmp_path / "out")

    rows = model.session(batch * n)  # one for every prefix
    prefixes = rows.step(np.repeat(ids, n, axis=0), np.tile(np.arange(1, n + 1), batch))
    assert_near(prefixes.reshape(want.shape), want, allowed, "prefixes")

    session = model.session(batch)
    for at in range(n):
        assert_near(session.step(ids[:, at : at + 1]), want[:, at], allowed[:, at], f"token {at}")

    session.reset()
    ends = np.minimum(np.cumsum(CHUNKS), n)
    assert ends[-1] == n
    for start, end in zip([0, *ends], ends):
        if start < end:
            assert_near(session.step(ids[:, start:end]), want[:, end - 1], allowed[:, end - 1], f"tokens {start} to {end}")
