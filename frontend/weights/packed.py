"""What the formats of quantized checkpoints have in common: tensors of a module, packed integers, scales in blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from wasat.ir import CheckpointError, DType, QArray, QTensorType, TensorType

from .safetensors import Stored

FLOATS8 = (DType.F8E4M3, DType.F8E5M2)


class Tensors:
    """The tensors of one module, by the last part of their names; those that were asked for are noted."""

    def __init__(self, module: str, found: Mapping[str, Stored], shape: tuple[int, int]) -> None:
        self.module, self.found, self.shape = module, found, shape
        self.used: set[str] = set()

    def fail(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.module}: {why}")

    def has(self, part: str) -> bool:
        return part in self.found

    def take(self, part: str, dtypes: Sequence[DType], *shapes: tuple[int, ...]) -> Stored:
        """A tensor of one of these element types and shapes (none given: any)."""
        if part not in self.found:
            raise self.fail(f"{part} is missing")
        s = self.found[part]
        if s.dtype not in dtypes:
            raise self.fail(f"{part} is stored as {s.dtype}; expected {' or '.join(map(str, dtypes))}")
        if shapes and s.shape not in shapes:
            wanted = " or ".join(str(list(x)) for x in dict.fromkeys(shapes))
            raise self.fail(f"{part} is misshaped: {list(s.shape)}, expected {wanted}")
        self.used.add(part)
        return s

    def drop(self, *parts: str) -> None:
        """Notes tensors that mean nothing here."""
        self.used.update(p for p in parts if p in self.found)


@dataclass(frozen=True)
class Integers:
    """A weight of integers: ``read`` makes what ``type`` says from the file, each time it is loaded."""

    type: QTensorType
    read: Callable[[], QArray] = field(compare=False)

    is_data: ClassVar[bool] = True

    def load(self) -> QArray:
        return self.read()


@dataclass(frozen=True)
class Dense:
    """A weight that no type of ours holds as it is stored, in f32."""

    type: TensorType
    read: Callable[[], np.ndarray] = field(compare=False)

    is_data: ClassVar[bool] = True

    def load(self) -> np.ndarray:
        return self.read()


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Fields of ``bits`` in rows of 32-bit words, lowest first, across the words: i32 [.., words] -> u8 [.., count]."""
    raw = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields = (raw[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        return fields.reshape(*raw.shape[:-1], -1)[..., :count]
    ones = np.unpackbits(raw, axis=-1, bitorder="little")[..., : count * bits]
    packed = np.packbits(ones.reshape(*raw.shape[:-1], count, bits), axis=-1, bitorder="little")
    return packed[..., 0]


def unpack_padded(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The same where no field crosses a word: the highest bits of each stay unused."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return fields.astype(np.uint8).reshape(*words.shape[:-1], -1)[..., :count]


def signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes from 0 on as integers around 0."""
    return (codes.astype(np.int16) - (1 << bits - 1)).astype(np.int8)


def blocks(k: int, group: int) -> int:
    return -(-k // group)


def order_of(t: Tensors, part: str, groups: int, group: int) -> tuple[np.ndarray | None, bool]:
    """Of which group each step of k is: the order that brings groups together (None: they are), and whether they then all
    have ``group`` steps. It is read here: a number a step."""
    k = t.shape[1]
    g = t.take(part, (DType.I32, DType.I64), (k,)).load().astype(np.int64)
    straight = np.arange(k) // group
    if (g == straight).all() or (g == -1).all():
        return None, True
    if g.min() < 0 or g.max() >= groups:
        raise t.fail(f"{part} names groups {g.min()} to {g.max()}; there are {groups}")
    order = np.argsort(g, kind="stable")
    return order, bool((g[order] == straight).all())


def scaled_blocks(values: np.ndarray, scales: np.ndarray, rows: int, width: int) -> np.ndarray:
    """values [n, k] * scales, each of which is for ``rows`` by ``width`` of them, in f32."""
    x = values.astype(np.float32)
    n, k = x.shape
    for i in range(0, n, rows):
        with np.errstate(invalid="ignore", over="ignore"):
            x[i : i + rows] *= np.repeat(scales[i // rows].astype(np.float32), width)[:k]
    return x
