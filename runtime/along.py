"""What a model takes for each token beside the token: its position, whether it is padding, its segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import InputError
from .interface import TensorSpec

COUNTED = ("positions", "position_ids", "cache_position")
"""Inputs of these names are filled with the plain count, 0, 1, .. in every row, unless they are given; of positions of several
kinds in front ([3, rows, tokens]: time, height and width), each kind is."""


class Along:
    """The inputs of a step that have an element for each new token, by name."""

    def __init__(self, specs: Sequence[TensorSpec], tokens: str) -> None:
        rows, new = next(spec.shape for spec in specs if spec.name == tokens)
        self._rows, self._new = rows, new
        self.specs = {spec.name: spec for spec in specs if spec.name != tokens and new in spec.shape}

    def fit(self, given: Mapping[str, Any], past: np.ndarray, new: int) -> dict[str, np.ndarray]:
        """The arrays for ``new`` tokens of rows that hold ``past``. Raises InputError for what is missing, unknown or does not
        fit."""
        unknown = [name for name in given if name not in self.specs]
        if unknown:
            takes = ", ".join(self.specs) or "nothing"
            raise InputError(f"input {', '.join(unknown)}: beside each token, the model takes {takes}")
        return {name: self._fit(spec, given.get(name), past, new) for name, spec in self.specs.items()}

    def _fit(self, spec: TensorSpec, x: Any, past: np.ndarray, new: int) -> np.ndarray:
        want = tuple(len(past) if d == self._rows else new if d == self._new else d for d in spec.shape)
        if x is None:
            return self._count(spec, past, new, want)
        try:
            array = np.asarray(x)
        except ValueError:
            raise InputError(f"input {spec.name}: its rows differ in length: pad them on the right") from None
        if array.shape != want:
            raise InputError(f"input {spec.name} has an element for each token: {list(want)}, not {list(array.shape)}")
        made = array.astype(spec.dtype)
        if array.dtype.kind not in "biuf" or (made.dtype != array.dtype and not np.array_equal(made, array, equal_nan=True)):
            raise InputError(f"input {spec.name} must be {spec.dtype}, not {array.dtype}")
        return made

    def _count(self, spec: TensorSpec, past: np.ndarray, new: int, want: Sequence[Any]) -> np.ndarray:
        known = not any(isinstance(d, str) for d in spec.shape[:-2])
        if spec.name not in COUNTED or np.dtype(spec.dtype).kind not in "iu" or not known:
            said = f"{spec.name} {spec.dtype}{list(spec.shape)}"
            raise InputError(f"the model takes {said} for each token: step() or generate(inputs=) is to give it")
        count = past[:, None] + np.arange(new)
        if len(want) == 1 or want[-2] == 1 != len(past):
            if (past != past[0]).any():
                raise InputError(
                    f"input {spec.name} {list(spec.shape)} is one for all rows, which hold {past.tolist()} tokens: rows of "
                    "different lengths need a session each"
                )
            count = count[:1]
        return np.broadcast_to(count.reshape(want[-2:]), want).astype(spec.dtype)

    def part(self, arrays: Mapping[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
        """Of the tokens ``start`` to ``stop``."""
        return {k: x[tuple(slice(start, stop) if d == self._new else slice(None) for d in self.specs[k].shape)]
                for k, x in arrays.items()}  # fmt: skip

    def row(self, arrays: Mapping[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
        """Of one row."""
        return {k: x[tuple(slice(row, row + 1) if d == self._rows else slice(None) for d in self.specs[k].shape)]
                for k, x in arrays.items()}  # fmt: skip

    def rows(self, arrays: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Of some rows, in their order."""
        axes = {k: spec.shape.index(self._rows) if self._rows in spec.shape else None for k, spec in self.specs.items()}
        return {k: x if (axis := axes[k]) is None else np.take(x, rows, axis) for k, x in arrays.items()}

    def after(self, arrays: Mapping[str, np.ndarray], lengths: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
        """For the token ``tokens`` (1, 2, ..) behind prompts of ``lengths``: counts go on, everything else is as at the end."""
        found = {}
        for name, x in arrays.items():
            shape = self.specs[name].shape
            axis, rows = shape.index(self._new), shape.index(self._rows) if self._rows in shape else None
            ends = [self.row({name: x}, r)[name].take([n - 1], axis) for r, n in enumerate(lengths)]
            last = ends[0] if rows is None else np.concatenate(ends, rows)
            found[name] = last + np.asarray(tokens, x.dtype) if name in COUNTED else last
        return found
