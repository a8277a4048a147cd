"""What a plan is made of while it is made: arrays, and steps over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wasat.ir import DimLike

from .kernels import Kernel

Kind = Literal["input", "state", "weight", "constant", "scratch"]


@dataclass(eq=False)
class Array:
    """Elements in a device's memory. ``of``: the array that this one is written over, if that may be."""

    dtype: str
    count: DimLike
    kind: Kind = "scratch"
    name: str = ""
    of: Array | None = None
    number: int = -1
    """A constant's place among those of the module."""

    def root(self) -> Array:
        """The first of the arrays that it may be written over."""
        return self if self.of is None else self.of.root()


@dataclass(frozen=True)
class Label:
    """The nodes of the graph that a step computes, and where they were written."""

    nodes: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


@dataclass
class Run:
    """A launch."""

    kernel: Kernel
    grid: tuple[DimLike, DimLike, DimLike]
    arrays: list[Array]
    scalars: list[DimLike]
    label: Label


@dataclass
class Copy:
    """All elements of an array, to another one."""

    source: Array
    to: Array


@dataclass
class Check:
    """Two sizes that must be equal."""

    left: DimLike
    right: DimLike
    needs: str
    where: str


@dataclass
class Loop:
    """``symbol`` is 0, 1, .. ``count - 1``; ``carried``: what a turn leaves to the next one."""

    symbol: str
    count: DimLike
    steps: list[Step]
    carried: list[Array]


@dataclass
class Branch:
    """Which steps are done is read from an array of one element."""

    condition: Array
    then: list[Step]
    otherwise: list[Step]


Step = Run | Copy | Check | Loop | Branch


@dataclass
class Entry:
    """The steps of one entry, and the arrays with their shapes that it is given and returns; states are left in their place."""

    given: list[tuple[Array, tuple[DimLike, ...]]]
    outputs: list[tuple[str, Array, tuple[DimLike, ...]]]
    states: list[Array]
    steps: list[Step]
    symbols: list[tuple[str, int, int]]
    """Of each symbol, the argument and the axis that say what it is."""
