"""Python: expressions with their results, which Python itself finds, and the text of programs."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from wasat.recipes.tasks.base import Example, Split, Task, TaskError

FORMS = (
    "{}", "print({})", "x = {}; x", "({})", "[{}][0]", "y = {}; print(y)", "({}, 0)[0]", "[0, {}][1]", "print([{}][0])",
    "a = [{}]; a[0]",
)  # fmt: skip


def _digits(rng: np.random.Generator, count: int, most: int = 9) -> list[int]:
    return [int(d) for d in rng.integers(0, most + 1, count)]


def _word(rng: np.random.Generator, shortest: int, longest: int) -> str:
    return "".join(rng.choice(list("abcdefgh"), rng.integers(shortest, longest + 1)))


def _pair(template: str, most: int = 9) -> Callable[[np.random.Generator], str]:
    return lambda rng: template.format(*_digits(rng, 2, most))


def _text(template: str, shortest: int, longest: int) -> Callable[[np.random.Generator], str]:
    return lambda rng: template.format(repr(_word(rng, shortest, longest)))


def _index(rng: np.random.Generator) -> str:
    return f"{_digits(rng, 3)}[{rng.integers(3)}]"


OPERATIONS: dict[str, Callable[[np.random.Generator], str]] = {
    "add": _pair("{} + {}"), "sub": _pair("{} - {}"), "mul": _pair("{} * {}", 5), "max": _pair("max({}, {})"),
    "min": _pair("min({}, {})"), "greater": _pair("{} > {}"), "equal": _pair("{} == {}", 3), "sum": _pair("sum([{}, {}])", 6),
    "len": _text("len({})", 1, 5), "upper": _text("{}.upper()", 1, 3), "reverse": _text("{}[::-1]", 2, 3),
    "twice": _text("{} * 2", 1, 2), "first": _text("{}[0]", 2, 4), "index": _index,
}  # fmt: skip
"""What makes an expression of each kind."""


class Code(Task):
    """``x = max(3, 8); x =>`` and its result. Held out: one in ten of the combinations of form and operation."""

    name = "code"
    held_out = 400

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        kinds = list(OPERATIONS)
        while True:
            form, kind = int(rng.integers(len(FORMS))), int(rng.integers(len(kinds)))
            if ((form + kind) % len(FORMS) == 2) == (split == "held_out"):
                break
        source = FORMS[form].format(OPERATIONS[kinds[kind]](rng))
        return Example((f"{source} =>",), f" {result(source)}", kinds[kind])


def result(source: str) -> str:
    """What an interactive Python shows for one line of our own: what it prints, or its last expression's value."""
    *before, last = source.split("; ")
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for line in before:
            exec(line, names)
        value = eval(last, names)
    return printed.getvalue().strip() or repr(value)


class Sources(Task):
    """Lines of text files, to be continued from the first character on. Held out: one in ten of the files, by its name."""

    name = "sources"
    held_out = 0

    def __init__(self, files: Sequence[Path], length: int = 160, seed: int = 0) -> None:
        """``length``: characters of one example."""
        super().__init__(seed)
        self.length = length
        self.texts: dict[Split, list[str]] = {"train": [], "held_out": []}
        for path in files:
            split: Split = "held_out" if zlib.crc32(path.name.encode()) % 10 == 0 else "train"
            if text := path.read_text(encoding="utf-8"):
                self.texts[split].append(text)
        for split, texts in self.texts.items():
            if not texts:
                raise TaskError(f"of {len(files)} files with text, none fell to the split {split}: give more files")

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        texts = self.texts[split]
        sizes = np.array([len(t) for t in texts], float)
        text = texts[rng.choice(len(texts), p=sizes / sizes.sum())]
        start = int(rng.integers(max(1, len(text) - self.length)))
        start = text.rfind("\n", 0, start) + 1
        return Example((), text[start : start + self.length], "line")
