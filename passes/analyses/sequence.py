"""What is said of a value along the sequence: on what its elements depend there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wasat.ir import DimLike, Node, Value, symbol
from wasat.ir.dims import symbols_of

Kind = Literal["fixed", "token", "position", "uniform", "pair", "scores", "last", "ahead"]


@dataclass(frozen=True)
class Label:
    """Where a value stands in the analysis."""

    kind: Kind
    """``token``: depends on tokens. ``position``: on positions alone, the same for every row of the batch. ``uniform``: repeats
    something fixed along the axis. ``pair``: depends on two positions alone, along ``axis`` and ``other``, as attention masks
    do. ``scores``: on tokens and two positions. ``last``: made of what stands at the last token, along no axis any more.
    ``ahead``: an element may depend on later tokens, or on how many there are."""
    axis: int = 0
    other: int = 0
    mixes: bool = False
    """The node needs more of earlier positions than its own."""
    culprit: Node | Value | None = None
    reason: str = ""
    above: float | None = None
    """Of pair and scores: the number that elements are where the index along ``other`` is larger than that along ``axis``."""
    below: float | None = None
    """The same where it is smaller."""
    extra: int = 0
    """Of token: how many elements more than tokens there are along the axis, in front and behind."""
    valid: int = 0
    """Of token: element i depends on tokens up to i alone for all but the last ``extra - valid``."""
    key: int = -1
    """Of pair and scores: the axis along which elements were already taken together; keys stand there, and queries do not."""
    wide: int = -1
    """Of scores: the axis on which ``front`` and ``back`` elements that are no positions stand beside those that are."""
    front: int = 0
    back: int = 0
    rows: bool = False
    """Depends on an input that differs between rows: of fixed, position, uniform and pair."""

    @property
    def served(self) -> bool:
        """Whether it changes from call to call, and can be had."""
        return self.kind not in ("fixed", "ahead")

    @property
    def along(self) -> bool:
        return self.kind not in ("fixed", "last", "ahead")

    @property
    def lifted(self) -> bool:
        """Whether it is the same for all rows in the graph, and not when each stands at positions of its own."""
        return self.kind == "position" and not self.rows

    @property
    def relates(self) -> bool:
        """Whether it runs along two axes."""
        return self.kind in ("pair", "scores")

    @property
    def widened(self) -> bool:
        """Whether elements that are no positions stand beside those that are, on the axis ``wide``."""
        return self.wide >= 0

    @property
    def one_each(self) -> bool:
        """Whether there is a part of it for each token, or one for all: what can be returned."""
        return self.kind not in ("ahead", "pair", "scores") and not self.extra

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes along the sequence."""
        return (self.axis, self.other) if self.relates else (self.axis,) if self.along else ()

    def later(self, axis: int) -> float | None:
        """The number of elements that are later along ``axis`` than along the other one, if it is known."""
        return self.above if axis == self.other else self.below


FIXED, LAST = Label("fixed"), Label("last")


class LooksAhead(Exception):
    """What the axis rule of a node does not allow; the analysis attaches the node."""


def beyond(d: DimLike, name: str) -> int | None:
    """How much larger than the symbol a size is; None for another function of it."""
    n = d if isinstance(d, int) else d - symbol(name)
    return n if isinstance(n, int) and not isinstance(d, int) else None


def axes_of(shape: Sequence[DimLike], symbol: str) -> list[int]:
    """Axes whose size is the symbol, or that and a number; -1 for an axis whose size is another function of it."""
    return [(i if beyond(d, symbol) is not None else -1) for i, d in enumerate(shape) if symbol in symbols_of([d])]
