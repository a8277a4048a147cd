"""Scenes of shapes, drawn or told, with questions about colours, shapes, numbers, places and relations."""

from __future__ import annotations

import numpy as np

from wasat.recipes.tasks.base import Example, ImageData, Split, Task, wording
from wasat.recipes.tasks.world import COLOURS, QUARTERS, SHAPES, Thing, picture, unseen

PLACES = tuple(QUARTERS)


class Scenes(Task):
    """One to four things, each in a quarter of its own, no two of one shape or colour.

    Held out: one in eight of the arrangements, that is which colour and shape is in which quarter.
    """

    name = "scenes"
    held_out = 600
    kinds: tuple[str, ...] = ("colour", "shape", "count", "place", "relation", "exists", "caption")
    most = 4

    def __init__(self, size: int = 32, seed: int = 0) -> None:
        super().__init__(seed)
        self.size = size

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        kind = self.kinds[rng.integers(len(self.kinds))]
        count = int(rng.integers(2 if kind == "relation" else 1, self.most + 1))
        while True:
            things, places = _scene(rng, count)
            if unseen(things, places) == (split == "held_out"):
                break
        question, answer = ask(rng, split, kind, things, places, int(rng.integers(len(things))))
        others = [k for k in self.kinds if k != "relation" or len(things) > 1]
        often = np.array([3.0 if k == "relation" else 1.0 for k in others])  # what takes longest to learn
        asked = rng.choice(others, 9, p=often / often.sum())
        more = [ask(rng, split, k, things, places, int(rng.integers(len(things)))) for k in asked]
        return Example((*self.shown(rng, things, places), question), answer, kind, tuple(more))

    def shown(self, rng: np.random.Generator, things: list[Thing], places: list[int]) -> tuple[ImageData | str, ...]:
        """The scene as parts of a prompt."""
        return (ImageData(picture(things, self.size, int(rng.integers(0, 60)))),)


class Stories(Scenes):
    """The same scenes in words: ``A red cross is top left.`` …, in any order."""

    name = "stories"
    held_out = 300
    kinds = ("colour", "shape", "count", "place", "relation", "exists")
    most = 3

    def shown(self, rng: np.random.Generator, things: list[Thing], places: list[int]) -> tuple[ImageData | str, ...]:
        told = [f"A {things[i].colour} {things[i].shape} is {PLACES[places[i]]}." for i in rng.permutation(len(things))]
        return (" ".join(told) + " ",)


def _scene(rng: np.random.Generator, count: int) -> tuple[list[Thing], list[int]]:
    colours, shapes = rng.permutation(list(COLOURS)), rng.permutation(SHAPES)
    places = [int(p) for p in rng.permutation(len(PLACES))[:count]]
    things = []
    for i, p in enumerate(places):
        x, y = QUARTERS[PLACES[p]] + rng.uniform(-0.07, 0.07, 2)
        things.append(Thing(str(colours[i]), str(shapes[i]), float(x), float(y), float(rng.uniform(0.12, 0.17))))
    return things, places


def ask(
    rng: np.random.Generator, split: Split, kind: str, things: list[Thing], places: list[int], subject: int
) -> tuple[str, str]:
    """A question of a kind about ``things[subject]``, and its answer."""
    t, place = things[subject], PLACES[places[subject]]

    def say(firsts: tuple[str, ...], seconds: tuple[str, ...]) -> str:
        return wording(rng, split, firsts, seconds)

    if kind == "colour":
        return say(("What colour", "Which colour"), (f"is the {t.shape}?", f"has the {t.shape}?")), f" {t.colour}"
    if kind == "shape":
        return say(("What shape", "Which shape"), (f"is {t.colour}?", f"is the {t.colour} one?")), f" {t.shape}"
    if kind == "count":
        return say(("How many", "What number of"), ("shapes are there?", "shapes do you see?")), f" {len(things)}"
    if kind == "place":
        (named,) = _named(rng, t)
        return say(("Where is", "In which corner is"), (f"{named}?", f"{named} to be found?")), f" {place}"
    if kind == "relation":
        return _relation(rng, split, things, places, subject)
    if kind == "exists":
        asked, truth = _asked(rng, things, subject)
        return say(("Is there", "Do you see"), (f"a {asked}?", f"any {asked}?")), f" {truth}"
    ordered = sorted(range(len(things)), key=lambda i: places[i])
    told = ", ".join(str(things[i]) for i in ordered)
    return say(("Describe", "Tell me about"), ("the picture.", "what you see.")), f" {told}"


def _relation(rng: np.random.Generator, split: Split, things: list[Thing], places: list[int], subject: int) -> tuple[str, str]:
    """Whether the subject, or another thing, is left of, right of, above or below the other; as often yes as no."""
    other = int(rng.choice([i for i in range(len(things)) if i != subject]))
    a, b = (subject, other) if rng.random() < 0.5 else (other, subject)
    (row_a, column_a), (row_b, column_b) = divmod(places[a], 2), divmod(places[b], 2)
    ways = []
    if column_a != column_b:
        ways += [("left of", column_a < column_b), ("right of", column_a > column_b)]
    if row_a != row_b:
        ways += [("above", row_a < row_b), ("below", row_a > row_b)]
    way, truth = ways[rng.integers(len(ways))]
    one, two = _named(rng, things[a], things[b])
    asked = wording(rng, split, ("Is", "Do you see"), (f"{one} {way} {two}?", f"{one} somewhere {way} {two}?"))
    return asked, " yes" if truth else " no"


def _named(rng: np.random.Generator, *things: Thing) -> list[str]:
    """What to call these, all by their shape or all by their colour."""
    by_shape = rng.random() < 0.5
    return [f"the {t.shape}" if by_shape else f"the {t.colour} one" for t in things]


def _asked(rng: np.random.Generator, things: list[Thing], subject: int) -> tuple[str, str]:
    """A thing that is there, or as often one that is not: the subject with another colour or another shape."""
    t = things[subject]
    if rng.random() < 0.5:
        return f"{t.colour} {t.shape}", "yes"
    if rng.random() < 0.5:
        colour = rng.choice([c for c in COLOURS if c != t.colour])
        return f"{colour} {t.shape}", "no"
    shape = rng.choice([s for s in SHAPES if s != t.shape])
    return f"{t.colour} {shape}", "no"
