"""A program's interface: what it keeps between calls, its limits, the tokens that begin and end a text, media and heads.

It is printed and parsed with the program; the manifest of an artifact is its serialization.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Cut = Literal["anywhere", "window", "never"]


@dataclass(frozen=True)
class State:
    """What a program keeps between calls: an input and an output of one name, of every entry that has it.

    ``kind`` is a word for people. Whoever keeps states (a session, a target's layout, a planner) decides by the other fields:

    ``rows``: the axis along which rows of the batch lie, each its own sequence; None: there is one for all.
    ``positions``: the axis along which positions lie; None: it has none, such as a carry.
    ``capacity``: how many positions lie there; None: as many as there will be (a symbol, which grows with use).
    ``window``: how many of the last positions the next token reads, itself among them; None: all.
    ``cut``: how a row goes back to an earlier length n: ``anywhere`` (whatever lies beyond n is never read), ``window`` (as
    far as the ``window`` positions before n are not yet overwritten by those ``capacity`` later), or ``never`` (but to 0).
    ``empty``: what a row holds before its first token: a number for each element, the name of a parameter that is one row, or
    None where nothing is read that was not written.
    ``role``: ``k`` or ``v`` of an attention, from which a target chooses a layout; else empty.
    ``donated``: whether a backend may write the new value over the old one.

    A row is copied by taking it along ``rows``; if it holds n positions, those before n along ``positions`` suffice.
    """

    name: str
    kind: str
    rows: int | None = 0
    positions: int | None = None
    capacity: int | None = None
    window: int | None = None
    cut: Cut = "never"
    empty: float | str | None = None
    role: str = ""
    donated: bool = False

    @property
    def grows(self) -> bool:
        """Whether it needs more memory as rows get longer."""
        return self.positions is not None and self.capacity is None

    # the kinds there are; a new one is a new function here and nothing else
    @classmethod
    def full(cls, name: str, role: str = "", window: int | None = None) -> State:
        """All positions [b, c, ..]: position p lies in slot p."""
        return cls(name, "full", positions=1, window=window, cut="anywhere", role=role)

    @classmethod
    def ring(cls, name: str, capacity: int, window: int, role: str = "") -> State:
        """The last positions [b, capacity, ..]: position p lies in slot p modulo ``capacity``."""
        return cls(name, "ring", positions=1, capacity=capacity, window=window, cut="window", role=role)

    @classmethod
    def carry(cls, name: str, rows: int | None = 0, empty: float | str = 0.0) -> State:
        """What a recurrence hands from one position to the next."""
        return cls(name, "carry", rows, empty=empty)

    @classmethod
    def tail(cls, name: str, count: int, rows: int = 0, positions: int = 1, empty: float | str = 0.0) -> State:
        """The last ``count`` inputs of a causal convolution (its width less one) or a token shift (1), oldest first."""
        return cls(name, "tail", rows, positions, count, count + 1, empty=empty)

    @classmethod
    def memory(cls, name: str, rows: int | None = 0) -> State:
        """What an encoder made of a row's other inputs: steps read it and leave it as it is."""
        return cls(name, "memory", rows, cut="anywhere")

    @classmethod
    def trained(cls, name: str, donated: bool) -> State:
        """A parameter in training, or what its optimizer keeps."""
        return cls(name, "trained", rows=None, donated=donated)
