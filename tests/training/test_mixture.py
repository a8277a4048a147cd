"""Mixtures: rows by weight, ids of media rows, labels on answers only; the seed decides, states resume; the tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from wasat.training.data import Batch, DataError

from wasat.recipes.mixture import END, Layout, Mixture, Share, portions, train_tokenizer
from wasat.recipes.tasks import AudioData, Clips, Code, Example, ImageData, Scenes, Split, Task, VideoData

LAYOUT = Layout(vocab=300, image=2, audio=3, video=4)


def encode(text: str) -> list[int]:
    return [1 + b for b in text.encode()]


class Made(Task):
    """Examples of given parts; the answer is the split's first letter and the index."""

    def __init__(self, name: str, *parts: object) -> None:
        super().__init__()
        self.name = name  # type: ignore[misc]
        self.parts = parts

    def example(self, split: Split, index: int) -> Example:
        return Example(self.parts, f"{split[0]}{index}")  # type: ignore[arg-type]

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        raise NotImplementedError


def image(x: int) -> ImageData:
    return ImageData(np.full((2, 2, 3), x, np.uint8))


AUDIO = AudioData(np.full(5, 0.5, np.float32), 8)
VIDEO = VideoData(np.full((3, 2, 2, 3), 9, np.uint8), np.arange(3, dtype=np.float32))


def mixture(*tasks: Task, rows: int, split: Split = "train", length: int = 16) -> Mixture:
    return Mixture([Share(t) for t in tasks], LAYOUT, encode, end=0, rows=rows, length=length, split=split)


def test_rows_labels_and_ids() -> None:
    m = mixture(Made("both", image(1), "a", AUDIO, image(2), "b"), Made("clip", VIDEO, "c"), rows=3)
    assert m.rows == [2, 1]
    b = next(m)
    i, a, v = 300, 300 + 4 * 2, 300 + 4 * 2 + 2 * 3
    A, B, C, T, zero = (encode(c)[0] for c in "abct0")
    first = [i, i + 1, A, a, a + 1, a + 2, i + 2, i + 3, B, T, zero]
    assert b["tokens"][0].tolist() == [*first, *[0] * 5]
    assert b["labels"][0].tolist() == [-1] * 8 + [T, zero, 0] + [-1] * 5
    assert b["tokens"][1, :9].tolist() == [i + 4, i + 5, A, a + 3, a + 4, a + 5, i + 6, i + 7, B]
    assert b["tokens"][2].tolist() == [v, v + 1, v + 2, v + 3, C, T, zero] + [0] * 9
    assert b["images"][:, 0, 0, 0].tolist() == [1, 2, 1, 2]
    assert {k: (str(x.dtype), x.shape) for k, x in b.items()} == {
        "tokens": ("int64", (3, 16)), "labels": ("int64", (3, 16)), "images": ("uint8", (4, 2, 2, 3)),
        "audio": ("float32", (2, 5)), "videos": ("uint8", (1, 3, 2, 2, 3)), "times": ("float32", (1, 3)),
    }  # fmt: skip
    assert next(iter(b)) == "tokens"


def test_rows_of_media_that_each_row_sees() -> None:
    tasks = [Share(Made("both", image(1), "a", AUDIO)), Share(Made("words", "d")), Share(Made("clip", VIDEO, "c"))]
    b = next(Mixture(tasks, LAYOUT, encode, end=0, rows=3, length=16, seen=True))
    assert b["seen"].tolist() == [[0, 1, 2, 3, 4], [-1] * 5, [5, 6, 7, 8, -1]]
    words = Mixture(tasks[1:2], LAYOUT, encode, end=0, rows=1, length=16, seen=True)
    assert set(next(words)) == {"tokens", "labels"}


def test_text_alone_is_cut_at_the_row() -> None:
    m = mixture(Made("text"), rows=1, length=2)
    b = next(m)
    assert b["tokens"].tolist() == [[0, encode("t")[0]]]
    assert b["labels"].tolist() == [encode("t0")]
    assert set(b) == {"tokens", "labels"}


def test_examples_follow_each_other_and_splits_differ() -> None:
    def answers(b: Batch) -> list[str]:
        return ["".join(chr(t - 1) for t in row if t > 0) for row in b["labels"]]

    m = mixture(Made("x", "q"), Made("y", "q"), rows=4)
    assert [answers(next(m)) for _ in range(2)] == [["t0", "t1"] * 2, ["t2", "t3"] * 2]
    assert answers(next(mixture(Made("x", "q"), rows=2, split="held_out"))) == ["h0", "h1"]


def test_examples_and_further_questions_in_a_row() -> None:
    class Asking(Made):
        def example(self, split: Split, index: int) -> Example:
            return replace(super().example(split, index), more=(("cd", "e"), ("long question", "f"), ("g", "h")))

    share = Share(Asking("x", AUDIO, "ab"), examples=2)
    m = Mixture([share, Share(Made("y", "q"))], LAYOUT, encode, end=0, rows=3, length=25)
    b = next(m)
    assert m.rows == [2, 1]

    def shown(ids: np.ndarray) -> str:
        return "".join("." if t == 0 else "-" if t < 0 else "#" if t >= 300 else chr(t - 1) for t in ids)

    assert [shown(row) for row in b["tokens"]] == ["###abt0.###abt1.cde.gh...", "###abt2.###abt3.cde.gh...", "qt0" + 22 * "."]
    assert [shown(row) for row in b["labels"]] == ["----t0.-----t1.--e.-h.---", "----t2.-----t3.--e.-h.---", "t0." + 22 * "-"]
    assert [t for t in b["tokens"][0] if t >= 300] == [300, 301, 302, 303, 304, 305]
    assert shown(next(m)["labels"][0]).startswith("----t4.-----t5")


def test_portions() -> None:
    assert portions([1, 1, 2], 8) == [2, 2, 4]
    assert portions([1, 100], 4) == [1, 3]
    assert portions([1, 1, 1], 4) == [2, 1, 1]
    assert portions([0.1, 0.1], 2) == [1, 1]
    for rows in range(5, 40):
        assert sum(portions([3, 1, 0.01, 2, 2], rows)) == rows


@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_state_resumes(done: int) -> None:
    def made() -> Mixture:
        return mixture(Scenes(16), Clips(16, 4), Code(), rows=5, length=100)

    p, q = made(), made()
    list(islice(p, done))
    state = json.loads(json.dumps(p.state()))
    q.restore(state)
    for a, b in zip(islice(p, 3), islice(q, 3), strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[k], b[k]) for k in a)
    q.restore(state)  # a state is not used up
    assert q.state() == state


def test_what_cannot_be_is_refused() -> None:
    x = Made("x", "question")
    with pytest.raises(DataError, match=r"needed are tasks of weights above 0, and a row each"):
        mixture(x, x, rows=1)
    with pytest.raises(DataError, match=r"needed are tasks of weights above 0"):
        Mixture([Share(x, 0.0)], LAYOUT, encode, end=0, rows=1, length=4)
    with pytest.raises(DataError, match=r"task x: 10 tokens in a row of 9, the last of 'question'"):
        next(mixture(x, rows=1, length=9))
    next(mixture(x, rows=1, length=10))
    with pytest.raises(DataError, match="no rows for AudioData"):
        next(Mixture([Share(Made("a", AUDIO))], Layout(300, image=2), encode, end=0, rows=1, length=9))
    with pytest.raises(DataError, match=r"needed are tasks of weights above 0"):
        Mixture([Share(x, examples=0)], LAYOUT, encode, end=0, rows=1, length=4)
    p = mixture(x, rows=2)
    two = Mixture([Share(x, examples=2)], LAYOUT, encode, end=0, rows=2, length=16)
    for other in (mixture(x, rows=3), mixture(Made("y"), rows=2), mixture(x, x, rows=2), two):
        with pytest.raises(DataError, match="of other batches"):
            other.restore(p.state())


def test_the_tokenizer_knows_the_tasks_and_any_bytes() -> None:
    tasks = [Scenes(8), Code()]
    t, again = train_tokenizer(tasks, 400, 200), train_tokenizer(tasks, 400, 200)
    assert t.to_str() == again.to_str()
    assert t.token_to_id(END) == 0
    assert len(t.encode(" triangle").ids) == 1
    assert len(t.encode(" 123").ids) == 4
    for text in ("x = max(3, 8); x => 8", "žluťoučký\n\t🐎", "  two"):
        assert t.decode(t.encode(text).ids) == text
