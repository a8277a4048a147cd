"""Clips of moving shapes: every question needs more than one frame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from wasat.recipes.tasks.base import Example, Split, Task, VideoData, majority, wording
from wasat.recipes.tasks.world import COLOURS, QUARTERS, SHAPES, Thing, held_out, picture

WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
GROWTH = {"grows": 1.5, "shrinks": 1 / 1.5, "stays": 1.0}
MOVER = (("What colour is", "Which colour is"), ("the shape that moves?", "moving?"))
MOVERS = (("How many", "What number of"), ("shapes move?", "shapes are moving?"))


class Clips(Task):
    """Which way a shape moves, which of two moves, how many of three, whether one grows.

    Where things begin says nothing of where they go. Held out: one in four of the pairs of colour and shape; the clips of each
    split are of its own alone.
    """

    name = "clips"
    held_out = 400
    kinds = ("way", "mover", "movers", "growth")

    def __init__(self, size: int = 32, frames: int = 8, seed: int = 0) -> None:
        super().__init__(seed)
        self.size, self.frames = size, frames

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        kind = self.kinds[rng.integers(len(self.kinds))]
        ways = list(WAYS)
        if kind == "growth":
            (thing,), (way,) = self._things(rng, split, 1, (0, 1, 2), centre=True)
            end = replace(thing, radius=thing.radius * list(GROWTH.values())[way])
            asked = wording(rng, split, ("Does the shape", "Does it"), ("grow or shrink?", "change its size?"))
            return self._made(rng, split, [thing], [end], [list(GROWTH)[way]], asked, f" {list(GROWTH)[way]}", kind)
        if kind == "way":
            (thing,), (way,) = self._things(rng, split, 1, (0, 1, 2, 3), centre=True)
            asked = wording(rng, split, ("Which way", "In which direction"), ("does it move?", "does the shape go?"))
            end = _moved(thing, ways[way], 0.26)
            return self._made(rng, split, [thing], [end], [f"moves {ways[way]}"], asked, f" {ways[way]}", kind)
        things, found = self._things(rng, split, 2 if kind == "mover" else 3, (0, 1, 2, 3))
        count = 1 if kind == "mover" else int(rng.integers(4))
        ends = [_moved(t, ways[way], 0.16) if i < count else t for i, (t, way) in enumerate(zip(things, found))]
        if kind == "mover":
            asked = wording(rng, split, *MOVER)
            answer = f" {things[0].colour}"
        else:
            asked = wording(rng, split, *MOVERS)
            answer = f" {count}"
        does = [f"moves {ways[way]}" if i < count else "stays" for i, way in enumerate(found)]
        order = rng.permutation(len(things))  # what moves is drawn first or last
        begin, after, does = ([x[i] for i in order] for x in (things, ends, does))
        return self._made(rng, split, begin, after, does, asked, answer, kind)

    def baselines(self) -> dict[str, float]:
        """Also of who sees one frame: which colours there are, and that one of two moves."""
        return {**super().baselines(), "from one frame": majority(self, shares={"mover": 0.5})}

    def _things(
        self, rng: np.random.Generator, split: Split, count: int, ways: tuple[int, ...], centre: bool = False
    ) -> tuple[list[Thing], list[int]]:
        """``count`` things of one split, in quarters of their own or about the centre, and a way for each."""
        places = rng.permutation(list(QUARTERS.values()))
        colours, made, found = list(rng.permutation(list(COLOURS))), list[Thing](), list[int]()
        for i in range(count):
            while True:
                colour, shape = str(rng.choice(colours)), str(rng.choice(SHAPES))
                if held_out(colour, shape) == (split == "held_out"):
                    break
            colours.remove(colour)
            x, y = (np.full(2, 0.5) if centre else places[i]) + rng.uniform(-0.05, 0.05, 2)
            made.append(Thing(colour, shape, float(x), float(y), float(rng.uniform(0.12, 0.18 if centre else 0.14))))
            found.append(int(rng.choice(ways)))
        return made, found

    def _made(
        self, rng: np.random.Generator, split: Split, begin: list[Thing], end: list[Thing], does: list[str], asked: str,
        answer: str, kind: str,
    ) -> Example:  # fmt: skip
        grey, step = int(rng.integers(0, 60)), rng.uniform(0.08, 0.16)
        frames = [
            picture([_between(a, b, i / max(self.frames - 1, 1)) for a, b in zip(begin, end)], self.size, grey)
            for i in range(self.frames)
        ]
        times = (step * np.arange(self.frames)).astype(np.float32)
        return Example((VideoData(np.stack(frames), times), asked), answer, kind, _further(rng, split, begin, does))


def _further(rng: np.random.Generator, split: Split, things: list[Thing], does: list[str]) -> tuple[tuple[str, str], ...]:
    """What each thing does, told of all of them or asked of one, and of several how many move and which, in any order."""
    moving = [t.colour for t, what in zip(things, does) if what.startswith("moves")]
    told = ", ".join(f"{t} {what}" for t, what in sorted(zip(things, does), key=lambda x: x[0].colour))
    made = [(wording(rng, split, ("Describe", "Tell me about"), ("the clip.", "the shapes.")), f" {told}")]
    for t, what in zip(things, does):
        asked = wording(rng, split, ("What does", "What did"), (f"the {t.colour} one do?", f"the {t.colour} shape do?"))
        made.append((asked, f" {what}"))
    if len(things) > 1:
        made.append((wording(rng, split, *MOVERS), f" {len(moving)}"))
        if len(moving) == 1:
            made.append((wording(rng, split, *MOVER), f" {moving[0]}"))
    return tuple(made[i] for i in rng.permutation(len(made)))


def _moved(t: Thing, way: str, by: float) -> Thing:
    x, y = WAYS[way]
    return replace(t, x=t.x + by * x, y=t.y + by * y)


def _between(a: Thing, b: Thing, share: float) -> Thing:
    return replace(a, x=a.x + share * (b.x - a.x), y=a.y + share * (b.y - a.y), radius=a.radius + share * (b.radius - a.radius))
