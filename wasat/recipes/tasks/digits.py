"""Handwritten digits: the 1797 of 8 by 8 pixels that scikit-learn brings (UCI ML optical recognition test set)."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from wasat.recipes.tasks.base import Example, ImageData, Split, Task, TaskError, wording

FIRST, SECOND = ("Which digit", "What digit", "Which number"), ("is this?", "do you see?", "is shown?")


class Digits(Task):
    """One digit, turned, scaled and moved a little in training. Held out: each fifth digit, the same for all seeds."""

    name = "digits"
    held_out = 360

    def __init__(self, size: int = 32, seed: int = 0) -> None:
        super().__init__(seed)
        self.size = size

    @cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures f[1797, 8, 8] in [0, 1], digits, and their order: the first ``held_out`` are held out."""
        pictures, digits = load()
        return pictures, digits, np.random.default_rng(0).permutation(len(digits))

    def example(self, split: Split, index: int) -> Example:
        if split == "train":
            return super().example(split, index)
        return self._made(np.random.default_rng([self.seed, index]), split, self._data[2][index % self.held_out])

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        order = self._data[2]
        return self._made(rng, split, rng.choice(order[self.held_out :] if split == "train" else order[: self.held_out]))

    def _made(self, rng: np.random.Generator, split: Split, which: int) -> Example:
        turn, scale, move, gain = 0.0, 1.0, np.zeros(2), 1.0
        if split == "train":
            turn, scale = rng.uniform(-0.2, 0.2), rng.uniform(0.85, 1.15)
            move, gain = rng.uniform(-0.08, 0.08, 2), rng.uniform(0.7, 1.0)
        pictures, digits, _ = self._data
        grey = gain * enlarged(pictures[which], self.size, turn, 0.8 * scale, move)
        pixels = np.repeat(np.rint(255 * grey).astype(np.uint8)[..., None], 3, axis=2)
        return Example((ImageData(pixels), wording(rng, split, FIRST, SECOND)), f" {digits[which]}", "digit")

    def baselines(self) -> dict[str, float]:
        """The majority, and scikit-learn's logistic regression on the 64 pixels, on the same split."""
        from sklearn.linear_model import LogisticRegression

        pictures, digits, order = self._data
        test, train = order[: self.held_out], order[self.held_out :]
        flat = pictures.reshape(len(pictures), -1)
        found = LogisticRegression(max_iter=2000).fit(flat[train], digits[train])
        return {**super().baselines(), "logistic regression": float(found.score(flat[test], digits[test]))}


def load() -> tuple[np.ndarray, np.ndarray]:
    """f[1797, 8, 8] in [0, 1] and the digits i64[1797]. Raises TaskError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise TaskError("the digits come with scikit-learn: pip install 'wasat[train]'") from None
    found = load_digits()
    return found.images / 16, found.target


def enlarged(x: np.ndarray, size: int, turn: float, share: float, move: np.ndarray) -> np.ndarray:
    """f[size, size]: ``x`` f[h, w] over a ``share`` of the side, turned (radians) and moved (in sides), bilinear, 0 outside."""
    at = (np.arange(size) + 0.5) / size - 0.5
    right, down = at[None, :] - move[0], at[:, None] - move[1]
    c, s = np.cos(turn) / share, np.sin(turn) / share
    padded = np.pad(x, 1)
    rows = np.clip((c * down - s * right + 0.5) * x.shape[0] + 0.5, 0, x.shape[0] + 0.999)
    columns = np.clip((c * right + s * down + 0.5) * x.shape[1] + 0.5, 0, x.shape[1] + 0.999)
    i, j = rows.astype(int), columns.astype(int)
    u, v = rows - i, columns - j
    top = (1 - v) * padded[i, j] + v * padded[i, j + 1]
    return (1 - u) * top + u * ((1 - v) * padded[i + 1, j] + v * padded[i + 1, j + 1])
