"""Rows of a session beside the interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from wasat.runtime import Session

import wasat as ws


def wanted(program: ws.Program, row: np.ndarray) -> np.ndarray:
    """The logits after a row of tokens, all read at once."""
    return np.asarray(ws.run(program, tokens=row[None])["logits"])[0, -1]


def check_rows(program: ws.Program, session: Session, turns: Sequence[Sequence[int]], vocab: int, tol: float) -> None:
    """Steps of so many random tokens in each row; where a row has some, its logits are those of all that it was given."""
    rng, rows = np.random.default_rng(0), [np.zeros(0, np.int64)] * len(turns[0])
    for lengths in turns:
        tokens = rng.integers(0, vocab, (len(rows), max(lengths)))
        got = session.step(tokens, lengths)
        rows = [np.concatenate([r, t[:n]]) for r, t, n in zip(rows, tokens, lengths)]
        for r, n in enumerate(lengths):
            if n:
                np.testing.assert_allclose(got[r], wanted(program, rows[r]), rtol=tol, atol=tol)
