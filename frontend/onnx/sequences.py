"""Sequences of tensors whose length a run decides. Those of a known length are lists of operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wasat.ir import DimLike, Value

from .emit import Emitter, size_of


@dataclass(frozen=True)
class Appended:
    """Within the body of a loop: a sequence to which this turn has added ``items``. What is in it otherwise is not known."""

    items: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Rows:
    """``before``, then the rows of ``made`` along its first axis."""

    before: tuple[Any, ...]
    made: Value

    def length(self) -> DimLike:
        return len(self.before) + self.made.shape[0]

    def stacked(self, c: Emitter, axis: int) -> Any:
        """All elements along a new axis."""
        parts = [*(c.add_axes(x, 0) for x in self.before), self.made]
        x = c.concat(*parts, axis=0) if len(parts) > 1 else self.made
        return first_to(c, x, axis)

    def joined(self, c: Emitter, axis: int) -> Any:
        """All elements one after the other along an axis that they have."""
        axis %= c.rank(self.made) - 1
        x = first_to(c, self.made, axis)
        shape = list(c.shape(x))
        x = c.view(x, *shape[:axis], size_of(shape[axis : axis + 2]), *shape[axis + 2 :])
        return c.concat(*self.before, x, axis=axis) if self.before else x


def first_to(c: Emitter, x: Any, axis: int) -> Any:
    """x with its first axis as ``axis``, the others in their order."""
    rest = list(range(1, c.rank(x)))
    rest.insert(c.axis(axis, c.rank(x)), 0)
    return c.permute(x, rest)


__all__ = ["Appended", "Rows", "first_to"]
