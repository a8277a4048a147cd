"""Where arrays lie: which are written over others, and which share memory one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from wasat.ir import DimLike, less_equal

from .steps import Array, Branch, Copy, Entry, Loop, Run, Step


@dataclass
class Slot:
    """Memory that arrays share."""

    size: DimLike
    free: float
    """The step after whose place nothing needs what it holds."""


_Read = tuple[int, tuple[int, ...]]
"""A place, and the loops that it is in."""


@dataclass
class _Life:
    """When an array is needed. A place in the list is a number; ``loops``: those that its first write is in."""

    first: float = math.inf
    loops: tuple[int, ...] = ()
    writes: list[int] = field(default_factory=list)
    reads: list[_Read] = field(default_factory=list)


class Layout:
    """Decides for one entry. Afterwards :meth:`memory` says which memory an array has, and no copy is left that is none."""

    def __init__(self, entry: Entry, size: Callable[[Array], DimLike]) -> None:
        self.entry = entry
        self._over: dict[Array, Array] = {}
        self._lives: dict[Array, _Life] = {}
        self._ends: list[tuple[int, int]] = []
        self._turns: dict[Array, int] = {}
        self._idle: set[int] = set()
        copies = self._number()
        for place, loops, copy in copies:
            if copy.to.of is copy.source and self._may(copy.source, place, loops):
                self._over[copy.to] = self.place(copy.source)
        entry.steps = list(self._left(entry.steps))
        self.slots: list[Slot] = []
        self._slot = self._shared(size)

    def place(self, a: Array) -> Array:
        """The array whose memory ``a`` has."""
        while a in self._over:
            a = self._over[a]
        return a

    def memory(self, a: Array) -> Array | int:
        """An array that is given, or a constant, or the number of a slot."""
        place = self.place(a)
        return place if place.kind != "scratch" else self._slot[place]

    # -- when arrays are needed ------------------------------------------------------------------------------------------
    def _life(self, a: Array) -> _Life:
        return self._lives.setdefault(a, _Life())

    def _number(self) -> list[tuple[int, tuple[int, ...], Copy]]:
        """Goes through the steps in order."""
        count = 0
        copies: list[tuple[int, tuple[int, ...], Copy]] = []
        for a, _ in self.entry.given:
            self._life(a).first = -1

        def read(a: Array, loops: tuple[int, ...]) -> None:
            self._life(a).reads.append((count, loops))

        def write(a: Array, loops: tuple[int, ...]) -> None:
            life = self._life(a)
            if life.first == math.inf:
                life.first, life.loops = count, loops
            life.writes.append(count)

        def visit(steps: list[Step], loops: tuple[int, ...]) -> None:
            nonlocal count
            for s in steps:
                count += 1
                if isinstance(s, Run):
                    for a, writes in zip(s.arrays, s.kernel.writes):
                        (write if writes else read)(a, loops)
                elif isinstance(s, Copy):
                    if s.source.kind == "scratch" and self._life(s.source).first == math.inf:
                        self._idle.add(id(s))  # of memory that nothing wrote: a kernel will write all of ``to``
                    else:
                        copies.append((count, loops, s))
                        read(s.source, loops)
                    write(s.to, loops)
                elif isinstance(s, Loop):
                    number = len(self._ends)
                    self._ends.append((count, count))
                    for a in s.carried:
                        self._turns[a] = number
                    visit(s.steps, (*loops, number))
                    count += 1
                    self._ends[number] = self._ends[number][0], count
                elif isinstance(s, Branch):
                    read(s.condition, loops)
                    visit(s.then, loops)
                    visit(s.otherwise, loops)

        visit(self.entry.steps, ())
        count += 1
        for _, a, _ in self.entry.outputs:
            read(a, ())
        for a in self.entry.states:
            read(a, ())
        return copies

    def _last_read(self, a: Array, within: tuple[int, ...] = (), reads: Sequence[_Read] | None = None) -> float:
        """The last place where what ``a`` holds is read. A read in a loop counts as one at its end, but for loops ``within``
        and those that the array is made in: there, each turn reads its own."""
        life, last = self._life(a), -1.0
        for at, loops in life.reads if reads is None else reads:
            last = max(last, at, *(self._ends[n][1] for n in loops if n not in life.loops and n not in within))
        return last

    def _may(self, source: Array, place: int, loops: tuple[int, ...]) -> bool:
        """Whether the step at ``place`` may write another array over ``source``: nothing needs later what is there now."""
        root = self.place(source)
        if root.kind not in ("scratch", "state"):
            return False
        held = [a for a in self._lives if self.place(a) is root]
        for n in loops:  # else every turn would write over what the first one needs
            if not any(self._turns.get(a) == n or n in self._life(a).loops for a in held):
                return False
        return all(self._needed_until(a, loops) <= place for a in held)

    def _needed_until(self, a: Array, loops: tuple[int, ...]) -> float:
        """The last place where what ``a`` holds at a place in ``loops`` is read, unless it is written anew before."""
        life = self._life(a)
        if (n := self._turns.get(a)) in loops and n is not None:  # at the end of a turn it is what the turn made
            start, end = self._ends[n]
            if not any(start < at < end for at in life.writes):
                return math.inf
            upto = loops[: loops.index(n) + 1]
            return self._last_read(a, upto, [r for r in life.reads if n in r[1]])
        if a.kind == "state" and life.writes:  # the last read is of its new value
            return self._last_read(a, (), life.reads[:-1])
        return self._last_read(a)

    def _left(self, steps: list[Step]) -> Iterator[Step]:
        """The steps without copies onto themselves, and of what was never written."""
        for s in steps:
            if isinstance(s, Copy) and (id(s) in self._idle or self.place(s.source) is self.place(s.to)):
                continue
            if isinstance(s, Loop):
                s.steps = list(self._left(s.steps))
            elif isinstance(s, Branch):
                s.then, s.otherwise = list(self._left(s.then)), list(self._left(s.otherwise))
            yield s

    # -- sharing ---------------------------------------------------------------------------------------------------------
    def _shared(self, size: Callable[[Array], DimLike]) -> dict[Array, int]:
        spans: dict[Array, tuple[float, float]] = {}
        for a, life in self._lives.items():
            place = self.place(a)
            if place.kind != "scratch" or (life.first == math.inf and not life.reads):
                continue
            first, last = life.first, max(self._last_read(a), *life.writes, -1)
            if (n := self._turns.get(a)) is not None:  # from turn to turn
                first, last = min(first, self._ends[n][0]), max(last, self._ends[n][1])
            old = spans.get(place, (math.inf, -1))
            spans[place] = min(old[0], first), max(old[1], last)
        found: dict[Array, int] = {}
        for a, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
            found[a] = self._take(size(a), first, last)
        return found

    def _take(self, size: DimLike, first: float, last: float) -> int:
        """A slot that is free, and as large as is asked for, or can be made so; the nearest in size."""
        best: tuple[float, int, DimLike] | None = None
        for i, slot in enumerate(self.slots):
            if slot.free >= first:
                continue
            if slot.size == size:
                best = (-1, i, size)
                break
            larger = size if less_equal(slot.size, size) is True else slot.size if less_equal(size, slot.size) is True else None
            if larger is None:
                continue
            waste = abs(size - slot.size) if isinstance(size, int) and isinstance(slot.size, int) else 2**62
            if best is None or waste < best[0]:
                best = (waste, i, larger)
        if best is None:
            self.slots.append(Slot(size, last))
            return len(self.slots) - 1
        _, i, self.slots[i].size = best
        self.slots[i].free = last
        return i
