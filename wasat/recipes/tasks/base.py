"""What a task is: examples of parts and an answer, in two splits."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from wasat.ir import WasatError

Split = Literal["train", "held_out"]


class TaskError(WasatError):
    """A task whose data are missing or unfit."""


@dataclass(frozen=True)
class ImageData:
    """A picture, u8[h, w, 3]."""

    pixels: np.ndarray

    def blank(self) -> ImageData:
        """Black, of the same size."""
        return ImageData(np.zeros_like(self.pixels))


@dataclass(frozen=True)
class AudioData:
    """A mono waveform, f32[n] in [-1, 1], of ``rate`` samples a second."""

    wave: np.ndarray
    rate: int

    def blank(self) -> AudioData:
        """Silence, of the same length."""
        return AudioData(np.zeros_like(self.wave), self.rate)


@dataclass(frozen=True)
class VideoData:
    """Pictures u8[n, h, w, 3] and their times f32[n], in seconds."""

    frames: np.ndarray
    times: np.ndarray

    def blank(self) -> VideoData:
        """The first picture all the time: what one picture tells is still there."""
        return VideoData(np.repeat(self.frames[:1], len(self.frames), axis=0), self.times)


Part = str | ImageData | AudioData | VideoData


@dataclass(frozen=True)
class Example:
    """A prompt in parts, and what is to follow."""

    parts: tuple[Part, ...]
    answer: str
    kind: str = ""
    """Of the question, e.g. ``colour``; baselines are counted by it."""
    more: tuple[tuple[str, str], ...] = ()
    """Further questions about the same media, with their answers: training asks as many as a row has room for."""

    def blind(self) -> Example:
        """The same with every picture black, every sound silent, every clip standing still."""
        return replace(self, parts=tuple(p if isinstance(p, str) else p.blank() for p in self.parts))


class Task(ABC):
    """Makes examples."""

    name: ClassVar[str]
    held_out: int = 300
    """How many of the held-out split are questions for a measurement."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def example(self, split: Split, index: int) -> Example:
        """Example ``index`` >= 0 of a split."""
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), split == "train", index])
        return self.draw(rng, split)

    @abstractmethod
    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        """An example of a split by chance."""

    def baselines(self) -> dict[str, float]:
        """Accuracies on the held-out split of what sees no medium, or is much simpler, by name."""
        return {"majority": majority(self)}


def majority(task: Task, count: int = 2000, shares: Mapping[str, float] | None = None) -> float:
    """Held-out accuracy of the answer that is commonest for the same kind of question in ``count`` training examples.

    ``shares``: for some kinds, what share is right instead.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for i in range(count):
        e = task.example("train", i)
        answers[e.kind][e.answer] += 1
    commonest = {kind: found.most_common(1)[0][0] for kind, found in answers.items()}
    tested = [task.example("held_out", i) for i in range(task.held_out)]
    return float(np.mean([(shares or {}).get(e.kind, float(commonest.get(e.kind) == e.answer)) for e in tested]))


def wording(rng: np.random.Generator, split: Split, firsts: Sequence[str], seconds: Sequence[str]) -> str:
    """One of ``firsts``, a space, one of ``seconds``. Held out are the pairs of equal number, the first pair aside."""
    pairs = [
        (i, j) for i in range(len(firsts)) for j in range(len(seconds)) if (0 < i == j) == (split == "held_out")
    ]  # fmt: skip
    i, j = pairs[rng.integers(len(pairs))]
    return f"{firsts[i]} {seconds[j]}"
