"""What a host needs of a device: memory, kernels, and lists of launches that are handed over in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .plan import KernelSpec

SMALLER = "use fewer or shorter sessions, smaller weights, or end what else uses it"
"""What to do where memory ends."""


@dataclass(frozen=True)
class Piece:
    """Some bytes of a device's memory."""

    memory: Any
    at: int
    nbytes: int

    def part(self, at: int, nbytes: int) -> Piece:
        return Piece(self.memory, self.at + at, nbytes)


@dataclass(frozen=True)
class Dispatch:
    """A kernel, for so many workgroups."""

    kernel: Any
    spec: KernelSpec
    grid: tuple[int, int, int]
    pieces: tuple[Piece, ...]
    scalars: tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """``nbytes`` of one piece, to another."""

    source: Piece
    to: Piece
    nbytes: int


@dataclass(frozen=True)
class Choice:
    """Commands that depend on whether a number in memory is 0."""

    condition: Piece
    then: list[Command]
    otherwise: list[Command]


Command = Dispatch | Move | Choice


class Machine(Protocol):
    """One device, opened."""

    name: str
    alignment: int
    """Where pieces that kernels are given may begin."""

    def allocate(self, nbytes: int) -> Piece:
        """Zeroed memory. Raises MemoryError."""
        ...

    def write(self, to: Piece, data: np.ndarray) -> None:
        """Bytes u8[n], n a multiple of 4."""
        ...

    def read(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """What pieces hold, as u8."""
        ...

    def copy(self, source: Piece, to: Piece) -> None:
        """As many bytes as ``to`` has."""
        ...

    def kernel(self, spec: KernelSpec) -> Any:
        """A kernel, compiled."""
        ...

    def record(self, commands: list[Command]) -> Any:
        """Commands made ready to be run more than once."""
        ...

    def run(self, recorded: Any, results: Sequence[Piece]) -> list[np.ndarray]:
        """Runs what was recorded; returns what ``results`` hold afterwards."""
        ...
