"""Batches: packing loses nothing, mixtures keep their shares, order depends on the seed alone, states resume."""

from __future__ import annotations

import json
import tracemalloc
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
from wasat.training.data import Batch, DataError, Packed, Piece, Source, TextFiles

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
    assert files[0] == Piece([97, 98, *"\ufffd".encode()], True, True)
    p = Packed([Source(files)], batch=1, length=2, end=END)
    next(p)
    state = p.state()
    (tmp_path / "a").write_bytes(b"longer")
    with pytest.raises(DataError, match="source 0 has changed: document 0 of epoch 0 had 5 tokens"):
        p.restore(state)


def text_of(piece: Piece) -> str:
    return bytes(piece.tokens).decode()


def in_pieces(path: Path, text: str | bytes, size: int) -> list[Piece]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    files = TextFiles((path,), lambda text: list(text.encode()), size)
    pieces = [files[i] for i in range(len(files))]
    assert [p.begins for p in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [p.ends for p in pieces] == [False] * (len(pieces) - 1) + [True]
    return pieces


@pytest.mark.parametrize("size", [64, 100, 1024])
def test_a_file_is_cut_at_its_lines(tmp_path: Path, size: int) -> None:
    lines = [f"{i} " + "ž" * (i % 17) + "\n" for i in range(300)]
    texts = [text_of(p) for p in in_pieces(tmp_path / "a", "".join(lines), size)]
    assert "".join(texts) == "".join(lines)
    assert all(t.endswith("\n") and len(t.encode()) < 2 * size for t in texts)
    assert len(texts) == -(-len("".join(lines).encode()) // size)


@pytest.mark.parametrize("letter", "až字🐎")
@pytest.mark.parametrize("size", [4, 5, 6, 7, 64])
def test_a_long_line_is_cut_at_a_character(tmp_path: Path, letter: str, size: int) -> None:
    text = "ab\n" + letter * 200 + "\ncd"
    texts = [text_of(p) for p in in_pieces(tmp_path / "a", text, size)]
    assert "".join(texts) == text
    assert all(len(t.encode()) < 2 * size for t in texts)


def test_files_that_are_small_empty_or_no_text(tmp_path: Path) -> None:
    assert [text_of(p) for p in in_pieces(tmp_path / "a", "x\n" * 8, 16)] == ["x\n" * 8]
    assert [text_of(p) for p in in_pieces(tmp_path / "a", "", 16)] == [""]
    assert "".join(text_of(p) for p in in_pieces(tmp_path / "a", b"\x80" * 64, 16)) == "\ufffd" * 64
    assert [text_of(p) for p in in_pieces(tmp_path / "a", "x\r\ny", 16)] == ["x\ny"]
    with pytest.raises(DataError, match="pieces of 3 bytes"):
        TextFiles((), list, 3)  # type: ignore[arg-type]


def test_no_file_is_read_whole(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as f:
        f.truncate(2**30)
    tracemalloc.start()
    p = Packed([Source(TextFiles((tmp_path / "a",), lambda text: [1] * len(text)))], batch=4, length=16, end=END)
    next(p)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_pieces_are_shuffled_and_parted_without_an_end_to_learn(tmp_path: Path) -> None:
    numbers = [f"{i:4}\n" for i in range(1000)]
    (tmp_path / "a").write_text("".join(numbers))
    (tmp_path / "b").write_text("b" * 40)
    files = TextFiles((tmp_path / "a", tmp_path / "b"), lambda text: list(text.encode()), 100)
    p = Packed([Source(files)], batch=1, length=100, end=END)
    count = len(files)
    assert count == 51
    batches = list(islice(p, (5000 + 40 + count) // 100 + 1))
    tokens, labels = (np.concatenate([b[k][0] for b in batches]) for k in ("tokens", "labels"))
    epoch = [bytes(x.astype(np.uint8)[:-1]).decode() for x in np.split(tokens, np.flatnonzero(tokens == END) + 1)[:count]]
    firsts = [int(t[:4]) for t in epoch if "b" not in t]
    assert firsts != sorted(firsts)
    assert "".join(t for _, t in sorted(zip(firsts, (t for t in epoch if "b" not in t)))) == "".join(numbers)
    at = np.cumsum([len(t) + 1 for t in epoch]) - 2  # in front of each end
    for i, where in enumerate(at[:-1]):
        whole = epoch[i].startswith("b")
        assert tokens[where + 1] == END
        assert labels[where] == (END if whole or epoch[i].endswith(" 999\n") else -1)
        begins = epoch[i + 1].startswith(("b", "   0\n"))
        assert labels[where + 1] == (tokens[where + 2] if begins else -1)
    rest = np.setdiff1d(np.arange(at[-1]), np.concatenate([at, at + 1]))
    assert np.array_equal(labels[rest], tokens[rest + 1])


def no_two_alike(p: Packed, batches: int, apart: int = 1) -> None:
    """All rows differ; of documents whose tokens are all different, at every column."""
    for b in islice(p, batches):
        for a, c in combinations(b["tokens"], 2):
            assert not np.array_equal(a, c)
            both = (a != END) & (c != END)
            assert (np.abs(a - c)[both] >= apart).all()


def test_rows_of_one_document_are_far_apart() -> None:
    no_two_alike(Packed([Source([range(1, 8001)])], batch=8, length=16, end=END), 600, apart=999)


@pytest.mark.parametrize("sizes", [[30], [30, 30], [20, 20, 20], [1, 40], [0, 0, 64], [7] * 20, [13, 5, 29, 29]], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_differ_however_few_the_documents_are(sizes: list[int], seed: int) -> None:
    ends = np.cumsum(sizes)
    docs = [range(end - n + 1, end + 1) for n, end in zip(sizes, ends.tolist())]
    p, q = (Packed([Source(docs)], batch=12, length=16, end=END, seed=seed) for _ in range(2))
    no_two_alike(p, 60)
    q.restore(json.loads(json.dumps(p.state())))
    assert same(list(islice(p, 20)), list(islice(q, 20)))


def test_rows_of_one_file_differ_and_resume(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("".join(f"line {i}\n" for i in range(2000)))

    def made(seed: int = 3) -> Packed:
        files = TextFiles((tmp_path / "a",), lambda text: list(text.encode()), 4096)
        return Packed([Source(files)], batch=8, length=32, end=END, seed=seed)

    p, q = made(), made()
    for b in islice(p, 300):
        assert len({row.tobytes() for row in b["tokens"]}) == 8
    state = json.dumps(p.state())
    assert len(state) < 600
    q.restore(json.loads(state))
    assert same(list(islice(p, 30)), list(islice(q, 30)))
    assert not same(list(islice(made(), 3)), list(islice(made(4), 3)))


def test_fewer_tokens_than_rows_are_refused() -> None:
    three = [Source([[1, 2, 3]])]  # and an end
    no_two_alike(Packed(three, batch=4, length=8, end=END), 20)
    with pytest.raises(DataError, match=r"source 0 has too few tokens for 5 rows that differ; take more text, or fewer rows"):
        next(Packed(three, batch=5, length=8, end=END))


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
