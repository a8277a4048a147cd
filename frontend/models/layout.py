"""Where a checkpoint has a parameter, if not under its name and in its shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Laid:
    """A parameter as a part of a checkpoint's tensor: of the latter, whose last two axes are ``swapped``, every ``step``-th
    along ``axis`` from ``start`` on; or, where it stands ``whole``, the part ``start`` of ``step`` that follow each other."""

    name: str
    swapped: bool = False
    start: int = 0
    step: int = 1
    whole: bool = False
    axis: int = 1

    def stored(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape, of a parameter's."""
        found = list(shape)
        at = slice(self.axis, self.axis + 1)
        found[at] = [n * self.step for n in found[at]]
        if self.swapped:
            found[-1], found[-2] = found[-2], found[-1]
        return tuple(found)
