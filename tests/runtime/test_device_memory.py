"""Buffers of devices do what arrays do, and leave alone what lies beside: elements of 1 and 2 bytes in words of 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from wasat.runtime import InputError
from wasat.runtime.hosts.machine import Piece
from wasat.runtime.hosts.memory import DeviceBuffer, Memory


class Words:
    """A device's memory as it behaves: words of 4 bytes, and no copies within one piece."""

    name, alignment = "a device", 4

    def allocate(self, nbytes: int) -> Piece:
        assert nbytes % 4 == 0
        return Piece(np.zeros(nbytes, np.uint8), 0, nbytes)

    def _bytes(self, p: Piece, size: int) -> np.ndarray:
        assert p.at % 4 == size % 4 == 0
        assert p.at + size <= p.memory.size
        return p.memory[p.at : p.at + size]  # type: ignore[no-any-return]

    def write(self, to: Piece, data: np.ndarray) -> None:
        self._bytes(to, data.size)[:] = data

    def read(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        return [self._bytes(p, p.nbytes).copy() for p in pieces]

    def copy(self, source: Piece, to: Piece) -> None:
        assert source.memory is not to.memory
        self._bytes(to, to.nbytes)[:] = self._bytes(source, to.nbytes)


DTYPES = ("bool", "uint8", "int16", "float16", "float32", "int64")
INDICES: tuple[Any, ...] = (
    ..., 1, np.array([0, 2]), slice(1, 3), (slice(None), slice(1, 2)), (slice(None), slice(None), slice(1)),
)  # fmt: skip


def memory(**storage: str) -> Memory:
    return Memory(Words(), storage)  # type: ignore[arg-type]


def numbers(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> np.ndarray:
    return rng.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)


def held(m: Memory, x: np.ndarray) -> DeviceBuffer:
    return m.buffer_of(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 3, 5), (4, 2, 2), (3, 1, 1)])
@pytest.mark.parametrize("storage", [{}, {"bool": "int32", "int64": "int32"}], ids=["as they are", "in words"])
def test_as_arrays_do(dtype: str, shape: tuple[int, ...], storage: dict[str, str]) -> None:
    rng, m = np.random.default_rng(0), memory(**storage)
    for index in INDICES:
        x = numbers(rng, dtype, shape)
        buffer = held(m, x)
        buffer.fill(index, 1)
        x[index] = 1
        np.testing.assert_array_equal(buffer.numpy(), x)
        other = numbers(rng, dtype, x[index].shape)
        buffer.fill(index, held(m, other))
        x[index] = other
        np.testing.assert_array_equal(buffer.numpy(), x)
    row = numbers(rng, dtype, shape[1:])
    buffer.fill(..., held(m, row))  # repeated
    x[...] = row
    np.testing.assert_array_equal(buffer.numpy(), x)
    for a, b in ((0, 2), ((1, slice(1)), (2, slice(1)))):
        x[0] = numbers(rng, dtype, shape[1:])
        x[2] = numbers(rng, dtype, shape[1:])
        buffer.set(x)
        buffer.swap(a, b)
        x[a], x[b] = x[b].copy(), x[a].copy()
        np.testing.assert_array_equal(buffer.numpy(), x)
    new = numbers(rng, dtype, (2, *shape[1:]))
    buffer.put(1, new, np.array([False, True]))
    x[2] = new[1]
    np.testing.assert_array_equal(buffer.numpy(), x)


def test_rows_that_are_no_words_are_not_taken_apart() -> None:
    buffer = memory().zeros("float16", (4, 3))
    assert buffer.first(0, 4) is buffer
    with pytest.raises(InputError, match=r"a row of 6 bytes \(float16\[3\]\) cannot be worked on apart on a device"):
        buffer.first(0, 2)
    assert memory().zeros("float16", (4, 2)).first(1, 2).shape == (2, 2)
