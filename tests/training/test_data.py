"""Batches: packing loses nothing, mixtures keep their shares, order depends on the seed alone, states resume."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from wasat.training.data import Batch, DataError, Packed, Source, TextFiles

END = 0


def documents(first: int, sizes: list[int]) -> list[list[int]]:
    """Of document i, all tokens are first + i."""
    return [[first + i] * n for i, n in enumerate(sizes)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(np.array_equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in ("tokens", "labels"))


def two(seed: int = 5, batch: int = 3) -> Packed:
    a, b = documents(1, [7, 0, 3, 40, 5]), documents(100, [9, 2, 31])
    return Packed([Source(a), Source(b, 2.0)], batch=batch, length=8, end=END, seed=seed)


def test_a_row_is_its_documents_one_after_the_other() -> None:
    docs = documents(1, [7, 0, 3, 40, 5])
    p = Packed([Source(docs)], batch=1, length=6, end=END)
    batches = list(islice(p, 40))
    tokens = np.concatenate([b["tokens"][0] for b in batches])
    labels = np.concatenate([b["labels"][0] for b in batches])
    assert batches[0]["tokens"].dtype == np.int64
    assert np.array_equal(tokens[1:], labels[:-1])
    size = sum(len(d) + 1 for d in docs)
    epochs = [tokens[i * size : (i + 1) * size] for i in range(3)]
    for epoch in epochs:  # every document, whole, once
        assert sorted(np.split(epoch, np.flatnonzero(epoch == END) + 1)[:-1], key=len)[-1].tolist() == [4] * 40 + [END]
        assert sorted(epoch) == sorted([t for d in docs for t in [*d, END]])
    assert any(not np.array_equal(epochs[0], e) for e in epochs[1:])  # shuffled anew


def test_shares_of_a_mixture() -> None:
    a, b = documents(1, [20] * 50), documents(100, [5] * 30)
    p = Packed([Source(a, 1.0), Source(b, 3.0)], batch=4, length=50, end=END)
    tokens = np.concatenate([x["tokens"] for x in islice(p, 60)])
    assert np.mean(tokens[tokens != END] >= 100) == pytest.approx(3 * 5 / 6 / (3 * 5 / 6 + 20 / 21), abs=0.02)


def test_the_seed_alone_decides() -> None:
    assert same(list(islice(two(), 20)), list(islice(two(), 20)))
    assert not same(list(islice(two(), 20)), list(islice(two(seed=6), 20)))


@pytest.mark.parametrize("done", [0, 1, 7, 23])
def test_a_state_resumes(done: int) -> None:
    p, q = two(), two()
    list(islice(p, done))
    state = json.loads(json.dumps(p.state()))
    q.restore(state)
    assert same(list(islice(p, 30)), list(islice(q, 30)))
    q.restore(state)  # a state is not used up
    assert q.state() == state


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab\xff")
    files = TextFiles((tmp_path / "a",), lambda text: list(text.encode()))
    assert list(files[0]) == [97, 98, *"\ufffd".encode()]
    p = Packed([Source(files)], batch=1, length=2, end=END)
    next(p)
    state = p.state()
    (tmp_path / "a").write_bytes(b"longer")
    with pytest.raises(DataError, match="source 0 has changed: document 0 of epoch 0 had 5 tokens"):
        p.restore(state)


def test_what_cannot_be_is_refused() -> None:
    docs = Source(documents(1, [3]))
    with pytest.raises(DataError, match="at least 1"):
        Packed([docs], batch=0, length=4, end=END)
    for bad in ([], [Source([])], [docs, Source(docs.documents, 0.0)]):
        with pytest.raises(DataError, match="at least one document each, with weights above 0"):
            Packed(bad, batch=1, length=4, end=END)
    p = two()
    next(p)

    def other(**options: int) -> Packed:
        return Packed(p.sources, **{"batch": 3, "length": 8, "end": END, "seed": 5, **options})

    others = {
        "seed was 5, and is 6": other(seed=6), "rows was 3, and is 2": other(batch=2),
        "length was 8, and is 9": other(length=9), "end was 0, and is 1": other(end=1),
        r"documents was \[5, 3\], and is \[1\], weights was": Packed([docs], batch=3, length=8, end=END, seed=5),
        r"weights was \[1.0, 2.0\], and is \[1.0, 3.0\]": Packed(
            [p.sources[0], Source(p.sources[1].documents, 3.0)], batch=3, length=8, end=END, seed=5
        ),
    }  # fmt: skip
    for message, q in others.items():
        with pytest.raises(DataError, match=f"of other batches: {message}"):
            q.restore(p.state())
