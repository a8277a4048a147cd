"""The little world of scenes and clips: coloured shapes, drawn smoothly at any size."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (230, 40, 40), "green": (40, 200, 60), "blue": (60, 90, 255), "yellow": (240, 220, 40), "white": (245, 245, 245),
    "purple": (190, 60, 220),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
QUARTERS = {"top left": (0.25, 0.25), "top right": (0.75, 0.25), "bottom left": (0.25, 0.75), "bottom right": (0.75, 0.75)}
"""Places, with their centres (x, y) in units of the picture's side."""


@dataclass(frozen=True)
class Thing:
    """A shape of a colour at (x, y), of ``radius``, all in units of the picture's side; y points down."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


def picture(things: Sequence[Thing], size: int, background: int = 0) -> np.ndarray:
    """u8[size, size, 3]: ``things`` over a ``background`` of that grey, edges smoothed over one pixel."""
    made = np.full((size, size, 3), float(background))
    at = (np.arange(size) + 0.5) / size
    for t in things:
        cover = np.clip(0.5 - size * _distance(t, at[None, :] - t.x, at[:, None] - t.y), 0, 1)[..., None]
        made += cover * (np.asarray(COLOURS[t.colour]) - made)
    return np.rint(made).astype(np.uint8)


def _distance(t: Thing, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """About how far (x, y) is outside of the shape, negative inside."""
    r, ax, ay = t.radius, np.abs(x), np.abs(y)
    if t.shape == "circle":
        return np.hypot(x, y) - r
    if t.shape == "square":
        return np.maximum(ax, ay) - 0.85 * r
    if t.shape == "triangle":
        return np.maximum(y - 0.8 * r, (2 * ax - y - r) / np.sqrt(5))
    return np.minimum(np.maximum(ax - r, ay - 0.3 * r), np.maximum(ax - 0.3 * r, ay - r))


def held_out(colour: str, shape: str) -> bool:
    """Whether things of this colour and shape are kept from training: one in four, one of each colour."""
    return SHAPES[(list(COLOURS).index(colour) + 1) % len(SHAPES)] == shape


def unseen(things: Sequence[Thing], places: Sequence[int]) -> bool:
    """Whether this arrangement, what is in which place, is kept from training: one in eight, by a hash.

    A hash leaves no rule by which what was never seen could be ruled out.
    """
    told = sorted(f"{p} {t.colour} {t.shape}" for t, p in zip(things, places))
    return zlib.crc32(", ".join(told).encode()) % 8 == 5
