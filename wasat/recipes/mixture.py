"""Batches of a mixture of tasks: text and media in one stream of tokens; and the tokenizer that is trained on the tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from wasat.recipes.tasks import AudioData, Example, ImageData, Split, Task, VideoData
from wasat.training.data import Batch, DataError

END = "<end>"
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Share:
    """A task, its share of the rows relative to the others', and how many of its examples follow each other in a row."""

    task: Task
    weight: float = 1.0
    examples: int = 1


@dataclass(frozen=True)
class Layout:
    """How a model numbers its tokens: text below ``vocab``, then the rows of media, so many for a picture, sound or clip."""

    vocab: int
    image: int = 0
    audio: int = 0
    video: int = 0


class Mixture(Iterator[Batch]):
    """Batches of examples, endless; the same in every batch are the order of tasks, the rows of each, the examples in a row.

    ``tokens``, ``labels`` i64[rows, length]: prompts, each followed by its answer and ``end``, and by further questions and
    answers as long as there is room; then padding. Labels are the tokens that follow, -1 where these are prompt or padding. Id
    ``vocab + r`` stands for row r of the media: those of all pictures, of all sounds, of all clips, in the order of their
    examples. ``images`` u8[i, h, w, 3], ``audio`` f32[a, n], ``videos`` u8[v, f, h, w, 3], ``times`` f32[v, f]: left out where
    no task has any. ``seen`` i64[rows, t], where asked for: the media rows of each row, then -1. An answer without a prompt
    (plain text) is cut at the row's end; other examples must fit.
    """

    def __init__(
        self, shares: Sequence[Share], layout: Layout, encode: Encode, *, end: int, rows: int, length: int,
        split: Split = "train", seen: bool = False,
    ) -> None:  # fmt: skip
        """Raises DataError for no tasks, weights or examples that are not above 0, and fewer rows than tasks."""
        if not shares or any(not s.weight > 0 or s.examples < 1 for s in shares) or rows < len(shares) or length < 1:
            raise DataError(
                f"{rows} rows of {length} for {len(shares)} tasks: needed are tasks of weights above 0, and a row each"
            )
        self.shares, self.layout, self.encode, self.end = tuple(shares), layout, encode, end
        self.length, self.split, self.seen = length, split, seen
        self.rows = portions([s.weight for s in shares], rows)
        self._done = 0

    def __next__(self) -> Batch:
        rows = []
        for share, count in zip(self.shares, self.rows):
            for row in range(self._done * count, (self._done + 1) * count):
                first = row * share.examples
                rows.append((share.task, [share.task.example(self.split, first + i) for i in range(share.examples)]))
        self._done += 1
        media = _Media([e for _, examples in rows for e in examples], self.layout)
        tokens, labels = (np.stack(x) for x in zip(*[self._row(task, examples, media) for task, examples in rows]))
        batch = {"tokens": tokens, "labels": labels, **media.arrays()}
        if self.seen and media.any:
            batch["seen"] = self._seen(tokens)
        return batch

    def state(self) -> dict[str, Any]:
        """Where the batches are, as JSON: ``restore`` of it goes on with the same batches as this object."""
        rows = [[s.task.name, s.task.seed, s.examples, n] for s, n in zip(self.shares, self.rows)]
        return {"done": self._done, "rows": rows}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where ``state`` was taken. Raises DataError if it was taken of other tasks, rows or seeds."""
        if state["rows"] != self.state()["rows"]:
            raise DataError(f"the state is of other batches: rows were {state['rows']}, and are {self.state()['rows']}")
        self._done = state["done"]

    def _seen(self, tokens: np.ndarray) -> np.ndarray:
        """i64[rows, t]: rows of media, -1 behind them; t is the same in every batch, as the media of a task's examples are."""
        rows = [row[row >= self.layout.vocab] - self.layout.vocab for row in tokens]
        made = np.full((len(rows), max(map(len, rows))), -1, np.int64)
        for here, row in zip(made, rows):
            here[: len(row)] = row
        return made

    def _row(self, task: Task, examples: Sequence[Example], media: _Media) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, i64[length]."""
        ids: list[int] = []
        answers: list[tuple[int, int]] = []
        """Where each begins and ends in ``ids``."""

        def add(prompt: Sequence[int], answer: str) -> None:
            begin = len(ids) + len(prompt)
            ids.extend((*prompt, *self.encode(answer), self.end))
            answers.append((begin, len(ids)))

        for e in examples:
            prompt = [i for p in e.parts for i in (self.encode(p) if isinstance(p, str) else media.ids(p))]
            add(prompt or [self.end], e.answer)  # the first token of plain text follows an end, too
        if all(e.parts for e in examples) and len(ids) > self.length + 1:
            raise DataError(
                f"task {task.name}: {len(ids) - 1} tokens in a row of {self.length}, the last of {examples[-1].parts[-1]!r}"
            )
        for question, answer in (q for e in examples[-1:] for q in e.more):
            size = len(self.encode(question)) + len(self.encode(answer)) + 1
            if len(ids) + size <= self.length + 1:
                add(self.encode(question), answer)
        del ids[self.length + 1 :]
        tokens, labels = np.zeros(self.length, np.int64), np.full(self.length, -1, np.int64)
        tokens[: len(ids) - 1] = ids[:-1]
        for begin, end in answers:
            labels[begin - 1 : end - 1] = ids[begin:end]
        return tokens, labels


class _Media:
    """The media of a batch, and the ids of their rows."""

    def __init__(self, examples: Sequence[Example], layout: Layout) -> None:
        parts = [p for e in examples for p in e.parts if not isinstance(p, str)]
        self.images = [p for p in parts if isinstance(p, ImageData)]
        self.audio = [p for p in parts if isinstance(p, AudioData)]
        self.videos = [p for p in parts if isinstance(p, VideoData)]
        first = layout.vocab
        self._next: dict[type, tuple[int, int]] = {}
        """Of each kind: the first id of the next part, and how many rows a part has."""
        for kind, count in ((ImageData, layout.image), (AudioData, layout.audio), (VideoData, layout.video)):
            there = sum(isinstance(p, kind) for p in parts)
            if there and not count:
                raise DataError(f"the layout has no rows for {kind.__name__}: the model lacks that modality")
            self._next[kind] = (first, count)
            first += count * there

    @property
    def any(self) -> bool:
        return bool(self.images or self.audio or self.videos)

    def ids(self, part: ImageData | AudioData | VideoData) -> list[int]:
        """Of the rows of ``part``; to be asked in the order of the examples."""
        first, count = self._next[type(part)]
        self._next[type(part)] = (first + count, count)
        return list(range(first, first + count))

    def arrays(self) -> Batch:
        made: Batch = {}
        if self.images:
            made["images"] = np.stack([p.pixels for p in self.images])
        if self.audio:
            made["audio"] = np.stack([p.wave for p in self.audio])
        if self.videos:
            made |= {"videos": np.stack([p.frames for p in self.videos]), "times": np.stack([p.times for p in self.videos])}
        return made


def portions(weights: Sequence[float], rows: int) -> list[int]:
    """``rows`` in whole numbers of at least 1, as near to the shares of ``weights`` as that allows."""
    free = rows - len(weights)
    exact = [max(w / sum(weights) * rows - 1, 0.0) for w in weights]
    exact = [e / (sum(exact) or 1.0) * free for e in exact]
    made = [math.floor(e) for e in exact]
    by_rest = sorted(range(len(made)), key=lambda i: (made[i] - exact[i], i))
    for i in by_rest[: free - sum(made)]:
        made[i] += 1
    return [1 + n for n in made]


def train_tokenizer(tasks: Sequence[Task], vocab: int, examples: int = 1000) -> Tokenizer:
    """A byte-level BPE of up to ``vocab`` tokens, trained on so many training examples of each task.

    Digits are tokens of their own. Token 0 is ``<end>``.
    """
    texts = (
        text
        for task in tasks
        for i in range(examples)
        for e in (task.example("train", i),)
        for text in (*(p for p in e.parts if isinstance(p, str)), e.answer)
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
