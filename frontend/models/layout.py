"""Where a checkpoint has a parameter, if not under its name and in its shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Laid:
    """A parameter as a part of a checkpoint's tensor: of the latter, whose last two axes are ``swapped``, every ``step``-th
    along axis 1 from ``start`` on; or, where it stands ``whole``, the part ``start`` of ``step`` that follow each other."""

    name: str
    swapped: bool = False
    start: int = 0
    step: int = 1
    whole: bool = False

    def stored(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape, of a parameter's."""
        found = list(shape)
        found[1:2] = [n * self.step for n in found[1:2]]
        if self.swapped:
            found[-1], found[-2] = found[-2], found[-1]
        return tuple(found)
