"""How many held-out questions an artifact answers, beside what guessing answers, and with the medium taken away."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from wasat.recipes.tasks import AudioData, Example, ImageData, Task
from wasat.runtime import Audio, Image, Model, Video


@dataclass(frozen=True)
class Score:
    """Of one task, or of one kind of its questions: shares of right answers, in [0, 1]."""

    name: str
    count: int
    accuracy: float
    blind: float | None = None
    """With black pictures, silence, clips that stand still; None where there is no medium."""
    baselines: tuple[tuple[str, float], ...] = ()


def evaluate(
    model: Model, tasks: Sequence[Task], count: int | None = None, batch: int = 32,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> list[list[Score]]:  # fmt: skip
    """For each task its score, then those of its kinds of questions if there are several.

    Answers are the likeliest tokens up to the end; one is right that is the expected text to the letter, spaces around it
    aside. ``count``: most examples of a task, the first of its held-out split. Tasks without questions are left out.
    """
    return [_scores(model, t, min(count or t.held_out, t.held_out), batch, progress) for t in tasks if t.held_out]


def _scores(
    model: Model, task: Task, count: int, batch: int, progress: Callable[[str, int, int], None]
) -> list[Score]:  # fmt: skip
    examples = [task.example("held_out", i) for i in range(count)]
    media = any(not isinstance(p, str) for p in examples[0].parts)
    runs = [examples, [e.blind() for e in examples]] if media else [examples]
    right: list[list[bool]] = []
    for run in runs:
        right.append([])
        for e, answer in zip(run, _answers(model, run, batch)):
            right[-1].append(answer.strip() == e.answer.strip())
            progress(task.name, sum(map(len, right)), count * len(runs))
    kinds: dict[str, list[int]] = defaultdict(list)
    for i, e in enumerate(examples):
        kinds[e.kind].append(i)

    def score(name: str, chosen: Sequence[int], baselines: tuple[tuple[str, float], ...] = ()) -> Score:
        shares = [sum(r[i] for i in chosen) / len(chosen) for r in right]
        return Score(name, len(chosen), shares[0], shares[1] if media else None, baselines)

    found = [score(task.name, range(count), tuple(task.baselines().items()))]
    return found + [score(k, chosen) for k, chosen in sorted(kinds.items()) if len(kinds) > 1]


def _answers(model: Model, examples: Sequence[Example], batch: int) -> Iterator[str]:
    for start in range(0, len(examples), batch):
        prompts = [_prompt(e) for e in examples[start : start + batch]]
        for generation in model.generate(prompts, max_tokens=32):
            yield generation.text


def _prompt(example: Example) -> list[str | Image | Audio | Video]:
    made: list[str | Image | Audio | Video] = []
    for part in example.parts:
        if isinstance(part, str):
            made.append(part)
        elif isinstance(part, ImageData):
            made.append(Image(part.pixels))
        elif isinstance(part, AudioData):
            made.append(Audio(part.wave, part.rate))
        else:
            made.append(Video(part.frames, part.times.tolist()))
    return made


def table(scores: Sequence[Sequence[Score]], kinds: bool = True) -> list[list[str]]:
    """Rows of text, the header first; ``kinds``: also those of the kinds of questions."""
    rows = [["task", "questions", "right", "without the medium", "baseline"]]
    for first, *rest in scores:
        for s in (first, *(rest if kinds else ())):
            blind = "" if s.blind is None else f"{s.blind:.1%}"
            baselines = ", ".join(f"{name} {share:.1%}" for name, share in s.baselines)
            rows.append([s.name if s is first else f"· {s.name}", str(s.count), f"{s.accuracy:.1%}", blind, baselines])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of :func:`table`'s rows."""
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest]) + "\n"
