"""The states of a program, for so many rows: each row is in a slot of its own. A state says what is done with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .device import HostMemory
from .dimensions import extents
from .interface import State


class Slots:
    """``states`` for ``count`` rows, in ``memory``. ``capacity``: positions of those that grow; a multiple of ``granule``.

    ``weights``: by name, among them what states begin as.
    """

    def __init__(
        self, states: Sequence[State], count: int, granule: int, weights: Mapping[str, Any], memory: Any = HostMemory
    ) -> None:
        self.states, self.count, self.granule = states, count, granule
        self._memory = memory
        self.capacity = 0
        self._empty: dict[str, Any] = {
            s.name: weights[s.empty] if isinstance(s.empty, str) else s.empty for s in states
        }
        self._buffers: dict[str, Any] = {}

    def rounded(self, positions: int) -> int:
        """The least capacity for so many positions."""
        return -(-positions // self.granule) * self.granule

    def reserve(self, capacity: int) -> None:
        """Room for ``capacity`` positions, if there is not; what growing states hold is copied to larger ones."""
        if capacity <= self.capacity and self._buffers:
            return
        for s in self.states:
            old = self._buffers.get(s.name)
            if old is None or s.grows:
                made = self._memory.zeros(s.dtype, extents(s.shape, {"b": self.count, "c": capacity}))
                if (value := self._empty[s.name]) is not None and value != 0:
                    made.fill(..., value)
                if old is not None:
                    made.fill(self._part(s, slice(None), self.capacity), old)
                self._buffers[s.name] = made
        self.capacity = capacity

    def tensors(self, first: int, count: int) -> dict[str, Any]:
        """The states of so many slots from ``first`` on, by name, as entries take and change them."""
        return {
            s.name: (self._buffers[s.name] if s.rows is None else self._buffers[s.name].first(first, count)).tensor
            for s in self.states
        }

    def put(self, name: str, first: int, x: np.ndarray, live: np.ndarray | None = None) -> None:
        """Sets the slots from ``first`` on (of these, those that are ``live``) to what an entry returned that did not write
        them in place."""
        s = next(s for s in self.states if s.name == name)
        if s.rows is None:
            self._buffers[name].set(x)
        else:
            self._buffers[name].put(first, x, live)

    def may_start(self, first: int) -> bool:
        """Whether :meth:`tensors` can begin at this slot."""
        return all(s.rows is None or self._buffers[s.name].may_start(first) for s in self.states)

    def clear(self, slots: np.ndarray) -> None:
        """Makes slots what they are before a row's first token."""
        for s in self.states:
            if (value := self._empty[s.name]) is not None and s.rows is not None:
                self._buffers[s.name].fill(slots, value)

    def swap(self, a: int, b: int, positions: int) -> None:
        """Exchanges two slots, of which neither holds more than ``positions``."""
        for s in self.states:
            if s.rows is not None:
                length = self.rounded(positions) if s.grows else None
                self._buffers[s.name].swap(self._part(s, a, length), self._part(s, b, length))

    @property
    def nbytes(self) -> int:
        """Bytes of them all."""
        return sum(b.nbytes for b in self._buffers.values())

    @staticmethod
    def _part(s: State, slots: Any, positions: int | None) -> tuple[Any, ...]:
        """Index of the first positions of slots; None: all of them."""
        if s.positions is None or positions is None:
            return (slots,)
        return (slots, *[slice(None)] * (s.positions - 1), slice(positions))
