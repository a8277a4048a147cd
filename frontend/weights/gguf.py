"""GGUF files: metadata and tensors, memory-mapped. Counts, lengths and offsets are held against the file before they are used.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from wasat.ir import Array, BlockArray, CheckpointError, DType, QArray, QTensorType, TensorType, Type
from wasat.ir.schemes import SCHEMES, read_q4_0, read_q8_0

from .safetensors import check_pointer, listed

_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_FLOATS = {0: DType.F32, 1: DType.F16, 28: DType.F64, 30: DType.BF16}
_BLOCKS: dict[int, tuple[str, int, int]] = {2: ("q4_0", 32, 18), 8: ("q8_0", 32, 34)} | {
    kind: (name, SCHEMES[name].block, SCHEMES[name].size)
    for kind, name in {
        3: "q4_1", 6: "q5_0", 7: "q5_1", 10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k", 20: "iq4_nl",
        23: "iq4_xs", 39: "mxfp4",
    }.items()
}  # fmt: skip
"""Of GGUF's type numbers: the name, elements and bytes of a block."""
_OTHER = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf\Z")
_LIMIT = 2**63


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file, its axes in the order of NumPy."""

    file: Path
    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""

    @property
    def type(self) -> Type:
        """What :meth:`load` gives. Raises CheckpointError for a format that is not known."""
        if self.kind in _FLOATS:
            return TensorType(_FLOATS[self.kind], self.shape)
        scheme = {"q4_0": "int4", "q8_0": "int8"}.get(_BLOCKS[self.kind][0], _BLOCKS[self.kind][0])
        return QTensorType(scheme, self.shape)

    @property
    def kind_name(self) -> str:
        """As GGUF calls the format."""
        return str(_FLOATS[self.kind]).upper() if self.kind in _FLOATS else _BLOCKS[self.kind][0].upper()

    def load(self, rows: slice = slice(None)) -> Array:
        """The tensor, or some of its rows; a view of the file where nothing has to be taken apart."""
        t = self.type
        if isinstance(t, TensorType):
            return self._map(t.dtype.np, self.shape)[rows]
        name, block, size = _BLOCKS[self.kind]
        data = self._map(np.dtype(np.uint8), (*self.shape[:-1], self.shape[-1] // block, size))[rows]
        shape = (*data.shape[:-2], self.shape[-1])
        t = QTensorType(t.scheme, shape)
        if t.stored is not None:
            return BlockArray(t, data)
        values, scales = (read_q8_0 if name == "q8_0" else read_q4_0)(data)
        return QArray(t, values.reshape(shape), scales[..., 0])

    @property
    def has_rows(self) -> bool:
        """Whether what lies along the first axis lies apart in the file; blocks of a vector hold several of its elements."""
        return len(self.shape) > 1 or self.kind in _FLOATS

    def rows(self, name: str, start: int, count: int) -> GgufTensor:
        """``count`` rows of a matrix, or elements of a vector, as a tensor of their own; they lie together in the file."""
        whole = self.shape[0]
        if not 0 <= start <= start + count <= whole:
            raise ValueError(f"rows {start} to {start + count} of {whole}")
        return replace(self, name=name, shape=(count, *self.shape[1:]), offset=self.offset + _bytes(self) // whole * start)

    def _map(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        try:
            return np.memmap(self.file, dtype, "r", self.offset, shape).view(np.ndarray)
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{self.file}: tensor {self.name} cannot be read: {e}") from None


@dataclass(frozen=True)
class GgufParam:
    """A parameter in a GGUF file, of the type that it is stored in; ``order``: its rows, if they come in another order."""

    stored: GgufTensor
    order: tuple[int, int] | None = None
    """Heads, and rows of a head, whose halves lie interleaved (the layout of GGUF's llama queries and keys)."""
    channels: bool = False
    """It is a convolution of each channel, and has an axis of one more: f32 [channels, 1, width]."""

    is_data: ClassVar[bool] = True

    @property
    def type(self) -> Type:
        rows, *rest = self.stored.shape
        return TensorType(DType.F32, (rows, 1, *rest)) if self.channels else self.stored.type

    def load(self) -> Array:
        x = self.stored.load()
        if self.channels:
            return np.asarray(x.dense() if isinstance(x, QArray) else x, np.float32)[:, None]
        if self.order is None:
            return x
        heads, width = self.order
        rows = np.arange(heads * width).reshape(heads, width // 2, 2).swapaxes(1, 2).reshape(-1)
        return x.rows(rows) if isinstance(x, QArray) else x[rows]


@dataclass(frozen=True)
class Gguf:
    """What a GGUF file (or all parts of a split one) holds: metadata by key, tensors by name."""

    path: Path
    metadata: dict[str, Any]
    """Numbers, strings, booleans; arrays of numbers are NumPy's, of strings lists."""
    tensors: dict[str, GgufTensor]


def read_gguf(path: str | Path) -> Gguf:
    """The file's metadata and where its tensors are; of a split model any part may be named, and all are read.

    Raises CheckpointError for a file that is damaged, cut short, of another byte order or version, or has tensors of a format
    that is not known.
    """
    path = Path(path)
    first = _read_one(path)
    count = first.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return first
    named = _SPLIT.match(path.name)
    if named is None or int(named[3]) != count:
        raise CheckpointError(f"{path} is one of {count} parts of a model; name them as they were, …-00001-of-{count:05}.gguf")
    parts = []
    for i in range(count):
        part = path.with_name(f"{named[1]}-{i + 1:05}-of-{count:05}.gguf")
        if not part.exists():
            raise CheckpointError(f"{part} is missing: {path.name} says that the model has {count} parts")
        parts.append(first if part == path else _read_one(part))
        if parts[-1].metadata.get("split.no") != i or parts[-1].metadata.get("split.count") != count:
            raise CheckpointError(f"{part} does not say that it is part {i + 1} of {count}")
    tensors: dict[str, GgufTensor] = {}
    for p in parts:
        if again := [name for name in p.tensors if name in tensors]:
            raise CheckpointError(f"{p.path}: tensors that an earlier part has too: {', '.join(again[:4])}")
        tensors |= p.tensors
    wanted = first.metadata.get("split.tensors.count")
    if isinstance(wanted, int) and wanted != len(tensors):
        raise CheckpointError(f"{path}: the parts have {len(tensors)} tensors, and say {wanted}")
    return Gguf(path, parts[0].metadata, tensors)


def _read_one(path: Path) -> Gguf:
    try:
        size = path.stat().st_size
        data: Any = np.memmap(path, np.uint8, "r") if size else b""
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from None
    return _Reader(path, memoryview(data)).run()


class _Reader:
    """The header of one file, byte by byte; every step checks that what it reads is there."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at = path, data, 0
        self.what = "the header"

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {why}; download it again")

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: {self.what} needs {count} bytes at {self.at}, the file has "
                f"{len(self.data)}; download it again"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def count(self, what: str, least: int) -> int:
        """A number of things of at least ``least`` bytes each, which the rest of the file can hold."""
        n = self.number("<Q")
        if n * least > len(self.data) - self.at:
            raise self.damaged(f"{what} would be {n:,}, more than the file holds")
        return n

    def string(self, what: str) -> str:
        self.what = what
        raw = bytes(self.take(self.count(f"the length of {what}", 1)))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is no UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        self.what = key
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            if dtype == np.bool_:
                return bool(self.take(1)[0])
            return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            raise self.damaged(f"{key} is of type {kind}, which GGUF does not have")
        inner = self.number("<I")
        if inner in _NUMBERS:
            dtype = np.dtype(_NUMBERS[inner])
            n = self.count(f"the length of {key}", dtype.itemsize)
            raw = np.frombuffer(self.take(n * dtype.itemsize), np.uint8 if dtype == np.bool_ else dtype)
            return raw != 0 if dtype == np.bool_ else raw.copy()
        if inner != _STRING:
            raise self.damaged(f"{key} is an array of type {inner}; there are arrays of numbers and of strings")
        return [self.string(f"{key}[{i}]") for i in range(self.count(f"the length of {key}", 8))]

    def run(self) -> Gguf:
        magic = bytes(self.data[:4])
        check_pointer(self.path, bytes(self.data[:32]))
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path} is no GGUF file: it begins with {magic!r}")
        self.at = 4
        version = self.number("<I")
        if version not in (2, 3):
            swapped = version & 0xFFFF == 0
            why = "its bytes are in the order of big-endian machines" if swapped else "versions 2 and 3 are known"
            raise CheckpointError(f"{self.path} is GGUF of version {version >> 24 if swapped else version}: {why}; convert it")
        tensors = self.count("the number of tensors", 8 + 4 + 4 + 8)
        entries = self.count("the number of metadata entries", 8 + 4 + 1)
        metadata: dict[str, Any] = {}
        for i in range(entries):
            key = self.string(f"the name of metadata entry {i}")
            if key in metadata:
                raise self.damaged(f"{key} is given twice")
            metadata[key] = self.value(self.number("<I"), key)
        infos = [self._tensor(i) for i in range(tensors)]
        return Gguf(self.path, metadata, self._placed(infos, metadata.get("general.alignment", 32)))

    def _tensor(self, i: int) -> GgufTensor:
        name = self.string(f"the name of tensor {i}")
        rank = self.number("<I")
        if not 1 <= rank <= 4:
            raise self.damaged(f"tensor {name} has {rank} axes; GGUF's have 1 to 4")
        shape = tuple(self.number("<Q") for _ in range(rank))[::-1]
        kind, offset = self.number("<I"), self.number("<Q")
        if min(shape) < 1 or math.prod(shape) >= _LIMIT:
            raise self.damaged(f"tensor {name} would be {list(shape)}")
        if kind in _OTHER:
            known = ["F32", "F16", "BF16", "F64", *(b[0].upper() for b in _BLOCKS.values())]
            raise CheckpointError(f"{self.path}: tensor {name} is {_OTHER[kind]}; what can be read is {', '.join(known)}")
        if kind not in _FLOATS and kind not in _BLOCKS:
            raise self.damaged(f"tensor {name} is of type {kind}, which GGUF does not have")
        if kind in _BLOCKS and shape[-1] % _BLOCKS[kind][1]:
            raise self.damaged(f"tensor {name} has rows of {shape[-1]}, no whole blocks of {_BLOCKS[kind][1]}")
        return GgufTensor(self.path, name, kind, shape, offset)

    def _placed(self, infos: list[GgufTensor], alignment: object) -> dict[str, GgufTensor]:
        """The tensors with their places in the file: inside it, aligned, apart from each other."""
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}; it is a power of two, at least 8")
        start = -(-self.at // alignment) * alignment
        problems, out = [], {}
        spans: list[tuple[int, int, str]] = []
        for t in infos:
            if t.name in out:
                raise self.damaged(f"tensor {t.name} is given twice")
            end = start + t.offset + _bytes(t)
            if t.offset % alignment:
                problems.append(f"tensor {t.name} begins at {t.offset}, no multiple of {alignment}")
            if end > len(self.data):
                problems.append(f"tensor {t.name} ends at {end}, the file at {len(self.data)}")
            spans.append((start + t.offset, end, t.name))
            out[t.name] = GgufTensor(t.file, t.name, t.kind, t.shape, start + t.offset)
        spans.sort()
        problems += [f"tensors {a} and {b} overlap" for (_, end, a), (at, _, b) in pairwise(spans) if at < end]
        if problems:
            raise CheckpointError(f"{self.path} is truncated or damaged; download it again:\n{listed(problems)}")
        return out


def _bytes(t: GgufTensor) -> int:
    n = math.prod(t.shape)
    if t.kind in _FLOATS:
        return n * _FLOATS[t.kind].np.itemsize
    _, block, size = _BLOCKS[t.kind]
    return n // block * size


