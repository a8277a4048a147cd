"""Buffers in a device's memory, for sessions: filled, moved and read without passing through the host where that can be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .elements import itemsize, loaded, padded, stored
from .machine import Machine, Piece


class Memory:
    """A device's memory, as :mod:`wasat.runtime.device` is the host's."""

    def __init__(self, machine: Machine, storage: Mapping[str, str]) -> None:
        self.machine, self.storage = machine, storage

    def itemsize(self, dtype: str) -> int:
        """Bytes of an element, as it is stored."""
        return itemsize(self.storage.get(dtype, dtype))

    def zeros(self, dtype: str, shape: Sequence[int]) -> DeviceBuffer:
        """A buffer of zeros."""
        nbytes = self.itemsize(dtype) * int(np.prod(shape, dtype=np.int64))
        return DeviceBuffer(self, self.machine.allocate(padded(nbytes)), dtype, tuple(shape))

    def buffer_of(self, array: np.ndarray, dtype: str | None = None, what: str = "an array") -> DeviceBuffer:
        """A buffer with a copy of ``array``, whose elements are of ``dtype`` where NumPy has no such type."""
        dtype = dtype or array.dtype.name
        data = stored(array, dtype, self.storage, what)
        piece = self.machine.allocate(data.size)
        self.machine.write(piece, data)
        return DeviceBuffer(self, piece, dtype, array.shape)

    def tensor_of(self, array: np.ndarray) -> DeviceBuffer:
        """The same: what kernels are given is the buffer itself."""
        return self.buffer_of(array)

    def array_of(self, result: Any) -> np.ndarray:
        """What an entry returned, which was read when it ran."""
        return np.asarray(result)


@dataclass(frozen=True, eq=False)
class DeviceBuffer:
    """A tensor in a device's memory."""

    home: Memory
    piece: Piece
    dtype: str
    shape: tuple[int, ...]

    @property
    def tensor(self) -> DeviceBuffer:
        return self

    @property
    def nbytes(self) -> int:
        return self.piece.nbytes

    def numpy(self) -> np.ndarray:
        """Its elements, read back."""
        return loaded(self.home.machine.read([self.piece])[0], self.dtype, self.shape, self.home.storage)

    def set(self, array: np.ndarray) -> None:
        """Sets all elements."""
        data = stored(np.asarray(array).astype(self.dtype, copy=False), self.dtype, self.home.storage)
        self.home.machine.write(self.piece, data)

    def first(self, start: int, count: int) -> DeviceBuffer:
        """So many entries of the first axis, from ``start`` on."""
        if (start, count) == (0, self.shape[0]):
            return self
        each = self._bytes(self.shape[1:])
        if each % 4:  # what a device copies are words: the last would be of a neighbour
            raise InputError(
                f"a row of {each} bytes ({self.dtype}{list(self.shape[1:])}) cannot be worked on apart on "
                f"{self.home.machine.name}, which moves words of 4 bytes: give all rows tokens, or open a session for each"
            )
        part = self.piece.part(start * each, count * each)
        return DeviceBuffer(self.home, part, self.dtype, (count, *self.shape[1:]))

    def may_start(self, entry: int) -> bool:
        """Whether kernels may be given the part from an entry of the first axis on."""
        each = self._bytes(self.shape[1:])
        return entry * each % self.home.machine.alignment == 0 and each % 4 == 0

    def fill(self, index: Any, value: float | DeviceBuffer) -> None:
        """Sets a part, as NumPy indexes it, to a number or to what another buffer holds: all of the part, or one entry of its
        first axis each."""
        runs = list(self._runs(index))
        if not isinstance(value, DeviceBuffer):
            for at, count in runs:
                self._write(at, np.full(count, value, np.float64))
            return
        other = value._bytes(value.shape) // self._size  # what it holds is repeated
        at = 0
        for start, count in runs:
            stop = start + count
            while start < stop:
                n = min(other - at % other, stop - start)
                self._copy(value, at % other, start, n)
                start, at = start + n, at + n

    def swap(self, a: Any, b: Any) -> None:
        """Exchanges two parts."""
        for (x, count), (y, _) in zip(self._runs(a), self._runs(b), strict=True):
            kept = [self.home.zeros(self.dtype, [count]) for _ in range(2)]  # no device copies within one piece of memory
            for buffer, at in zip(kept, (x, y)):
                buffer._copy(self, at, 0, count)
            for buffer, at in zip(kept, (y, x)):
                self._copy(buffer, 0, at, count)

    def put(self, first: int, x: np.ndarray, live: np.ndarray | None = None) -> None:
        """Sets entries of the first axis, of those from ``first`` on that are ``live``."""
        rows = range(len(x)) if live is None else np.flatnonzero(live).tolist()
        each = int(np.prod(self.shape[1:], dtype=np.int64))
        for r in rows:
            self._write((first + r) * each, np.ravel(x[r]))

    @property
    def _size(self) -> int:
        return self.home.itemsize(self.dtype)

    def _bytes(self, shape: Sequence[int]) -> int:
        return self._size * int(np.prod(shape, dtype=np.int64))

    def _part(self, at: int, count: int) -> Piece:
        return self.piece.part(at * self._size, count * self._size)

    def _write(self, at: int, x: np.ndarray) -> None:
        if self.dtype == "bfloat16":
            data: np.ndarray = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            data = x.astype(self.dtype)
        self._set_bytes(at * self._size, stored(data, self.dtype, self.home.storage)[: x.size * self._size])

    def _copy(self, source: DeviceBuffer, first: int, at: int, count: int) -> None:
        """Copies ``count`` elements of ``source``, from ``first`` on, to ``at``: on the device, where they are whole words."""
        given = source._part(first, count)
        if any(n * self._size % 4 for n in (first, at, count)):
            low = given.at // 4 * 4
            words = Piece(given.memory, low, padded(given.at - low + given.nbytes))
            data = self.home.machine.read([words])[0][given.at - low :][: given.nbytes]
            self._set_bytes(at * self._size, data)
        else:
            self.home.machine.copy(given, self._part(at, count))

    def _set_bytes(self, at: int, data: np.ndarray) -> None:
        """Sets bytes; devices take words, so what lies beside them in theirs is written as it is."""
        low, high = at // 4 * 4, -(-(at + data.size) // 4) * 4
        words = self.piece.part(low, high - low)
        if words.nbytes != data.size:
            whole = self.home.machine.read([words])[0].copy()
            whole[at - low :][: data.size] = data
            data = whole
        if data.size:
            self.home.machine.write(words, data)

    def _runs(self, index: Any) -> Iterator[tuple[int, int]]:
        """The elements that an index takes, as pieces that lie side by side: where they begin, and how many they are."""
        parts = [] if index is ... else list(index) if isinstance(index, tuple) else [index]
        axes: list[Sequence[int]] = []
        for n, part in itertools.zip_longest(self.shape, parts, fillvalue=slice(None)):
            whole = range(n)  # type: ignore[arg-type]
            if isinstance(part, slice):
                axes.append(whole[part])
            else:
                axes.append([int(i) for i in np.atleast_1d(np.asarray(part))])
        last = next((i for i in range(len(axes) - 1, -1, -1) if len(axes[i]) != self.shape[i]), None)
        if last is None:
            yield 0, int(np.prod(self.shape, dtype=np.int64))
            return
        inner = int(np.prod(self.shape[last + 1 :], dtype=np.int64))
        strides = [int(np.prod(self.shape[i + 1 :], dtype=np.int64)) for i in range(last)]
        side_by_side = isinstance(axes[last], range)
        for outer in itertools.product(*axes[:last]):
            base = sum(i * s for i, s in zip(outer, strides))
            if side_by_side:
                if len(axes[last]):
                    yield base + axes[last][0] * inner, len(axes[last]) * inner
            else:
                for i in axes[last]:
                    yield base + i * inner, inner
