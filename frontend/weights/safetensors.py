"""Safetensors files, memory-mapped: parameters are read one at a time, when asked for."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from wasat.ir import CheckpointError, DType, TensorType

from ..fields import brief

TENSOR_TYPES = {
    "F64": DType.F64, "F32": DType.F32, "F16": DType.F16, "BF16": DType.BF16, "F8_E4M3": DType.F8E4M3,
    "F8_E5M2": DType.F8E5M2, "I64": DType.I64, "I32": DType.I32, "I16": DType.I16, "I8": DType.I8, "U64": DType.U64,
    "U32": DType.U32, "U16": DType.U16, "U8": DType.U8, "BOOL": DType.BOOL,
}  # fmt: skip
"""Element types by the format's name."""
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
_RANK_LIMIT, _SIZE_LIMIT = 64, 2**60  # NumPy's; a tensor of nothing may say anything of its other axes
STORED = (DType.F32, DType.F16, DType.BF16)
"""Element types that a float parameter may be stored in."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file."""

    file: Path
    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""

    @property
    def type(self) -> TensorType:
        """What :meth:`load` gives."""
        return TensorType(self.dtype, self.shape)

    def load(self, rows: slice | None = None) -> np.ndarray:
        """A read-only view of the file, or of some rows of it."""
        if 0 in self.shape:
            x = np.zeros(self.shape, self.dtype.np)
            return x if rows is None else x[rows]
        try:
            raw = np.memmap(self.file, self.dtype.np, "r", self.offset, self.shape)
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{self.file}: tensor {self.name} cannot be read: {e}") from None
        x = raw.view(np.ndarray)
        return x if rows is None else x[rows]  # a scalar has no rows


@dataclass(frozen=True)
class FileParam:
    """A parameter in a safetensors file, converted to ``type``'s element type each time it is loaded."""

    type: TensorType
    stored: Stored

    is_data: ClassVar[bool] = True

    @property
    def narrow(self) -> DType | None:
        """What it is stored in, where that is narrower than its type."""
        return self.stored.dtype if self.stored.dtype.bits < self.type.dtype.bits else None

    def load(self) -> np.ndarray:
        """The array; a view of the file where nothing has to be converted."""
        return self.stored.load().astype(self.type.dtype.np, copy=False)


@dataclass(frozen=True)
class StackedParam:
    """A parameter that is a stack of matrices in safetensors files, along a first axis, converted as :class:`FileParam`."""

    type: TensorType
    parts: tuple[Stored, ...]

    is_data: ClassVar[bool] = True

    @property
    def narrow(self) -> DType | None:
        """What they are stored in, where that is narrower than their type."""
        stored = {p.dtype for p in self.parts}
        return stored.pop() if len(stored) == 1 and self.parts[0].dtype.bits < self.type.dtype.bits else None

    def load(self) -> np.ndarray:
        """The array, which is written anew."""
        out = np.empty((len(self.parts), *self.parts[0].shape), self.type.dtype.np)
        for i, part in enumerate(self.parts):
            out[i] = part.load()
        return out


@dataclass(frozen=True)
class PartParam:
    """A parameter that is a part of a tensor in a safetensors file: every ``step``-th along ``axis`` from ``start`` on, once
    its last axes are ``swapped``, or the part ``start`` of ``step`` that stand ``whole``; made as :class:`FileParam`."""

    type: TensorType
    stored: Stored
    swapped: bool
    start: int
    step: int
    whole: bool = False
    axis: int = 1

    is_data: ClassVar[bool] = True

    @property
    def narrow(self) -> DType | None:
        """What it is stored in, where that is narrower than its type."""
        return self.stored.dtype if self.stored.dtype.bits < self.type.dtype.bits else None

    def load(self) -> np.ndarray:
        """The array, which is written anew."""
        x = self.stored.load()
        x = x.swapaxes(-1, -2) if self.swapped else x
        n = x.shape[self.axis] // self.step if self.step > 1 else 0
        rows = slice(self.start * n, (self.start + 1) * n) if self.whole else slice(self.start, None, self.step)
        part = x[(slice(None),) * self.axis + (rows,)] if self.step > 1 else x
        return np.ascontiguousarray(part, self.type.dtype.np)


_POINTER = b"version https://git-lfs."


class _Duplicate(ValueError):
    """A key that occurs twice in one JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        (again, _), = Counter(k for k, _ in pairs).most_common(1)
        raise _Duplicate(f"{brief(again)} is given twice")
    return out


def check_pointer(path: Path, start: bytes) -> None:
    """Raises CheckpointError for a file that begins as the pointers do that Git LFS leaves in place of files."""
    if start.startswith(_POINTER):
        raise CheckpointError(f"{path} is only Git LFS's pointer to the file: run git lfs pull there, or download it itself")


def tokenizer_of(folder: Path) -> str | None:
    """The path of a folder's tokenizer, which is there, and no pointer."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        with path.open("rb") as f:
            check_pointer(path, f.read(len(_POINTER)))
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from None
    return str(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; errors name the file and place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        check_pointer(path, text[: len(_POINTER)].encode())
        value = json.loads(text, object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from None
    except json.JSONDecodeError as e:
        raise CheckpointError(f"{path}:{e.lineno}:{e.colno}: not JSON: {e.msg}") from None
    except _Duplicate as e:
        raise CheckpointError(f"{path}: {e}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply") from None
    except ValueError as e:  # a number of thousands of digits
        raise CheckpointError(f"{path}: {e}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as JSON, its length in the file, and the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            first = f.read(len(_POINTER))
            check_pointer(path, first)
            n = int.from_bytes(first[:8], "little")
            f.seek(8)
            if size < 8 or n > min(_HEADER_LIMIT, size - 8):
                raise CheckpointError(f"{path} is no safetensors file, or is truncated: it has {size} bytes, its header {n}")
            header = json.loads(f.read(n), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from None
    except _Duplicate as e:
        raise CheckpointError(f"{path}: in the safetensors header {e}; the file is damaged") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: the safetensors header is not JSON; the file is damaged") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not an object; the file is damaged")
    return header, n, size


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file."""
    found = _header(path)[0].get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
        raise CheckpointError(f"{path}: the metadata are no texts by name; the file is damaged")
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name, its header checked against the file's size."""
    header, n, size = _header(path)
    out: dict[str, Stored] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: the header's entry for {name} is malformed; the file is damaged") from None
        if not isinstance(kind, str) or any(type(d) is not int for d in (*shape, start, stop)):
            raise CheckpointError(f"{path}: the header's entry for {name} is malformed; the file is damaged")
        if kind not in TENSOR_TYPES:
            known = ", ".join(TENSOR_TYPES)
            raise CheckpointError(f"{path}: tensor {brief(name)} has element type {brief(kind)}; known are {known}")
        dtype = TENSOR_TYPES[kind]
        if len(shape) > _RANK_LIMIT:
            raise CheckpointError(f"{path}: tensor {brief(name)} has {len(shape):,} axes; at most {_RANK_LIMIT} can be read")
        if min(shape, default=0) < 0 or start < 0 or math.prod(max(d, 1) for d in shape) >= _SIZE_LIMIT:
            raise CheckpointError(f"{path}: tensor {brief(name)} would be {kind}{brief(list(shape))}; the file is damaged")
        if stop - start != math.prod(shape) * dtype.np.itemsize:
            raise CheckpointError(
                f"{path}: tensor {brief(name)} {kind}{list(shape)} does not fit its {brief(stop - start)} bytes; damaged"
            )
        if 8 + n + stop > size:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes, tensor {name} ends at {8 + n + stop}; download it again"
            )
        spans.append((start, stop, name))
        out[name] = Stored(path, name, dtype, shape, 8 + n + start)
    at, last = 0, "the header"
    for start, stop, name in sorted(spans):
        if start != at:
            raise CheckpointError(f"{path}: tensor {name} does not begin where {last} ends; the file is damaged")
        at, last = stop, name
    if 8 + n + at != size:
        raise CheckpointError(f"{path}: {size - 8 - n - at} bytes follow the last tensor; the file is damaged")
    return out


def read_folder(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder: ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        if parts := sorted(p.name for p in folder.glob("model-*-of-*.safetensors")):
            among = ", ".join(parts[:4])
            raise CheckpointError(f"{index} is missing: it says which tensor is in which of {among}; download it, too")
        others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.gguf", "*.safetensors") for p in folder.glob(pattern))
        raise CheckpointError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json"
            + (f"; it has {', '.join(others[:4])}, which cannot be read: save the model as safetensors" if others else "")
        )
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise CheckpointError(f"{index}: weight_map is not an object of tensor name -> file name")
    shards: dict[str, dict[str, Stored]] = {}
    for shard in dict.fromkeys(where.values()):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard {shard!r} is not the name of a safetensors file inside the folder")
        if not (folder / shard).exists():
            count = sum(v == shard for v in where.values())
            raise CheckpointError(f"{folder / shard} is missing: {index.name} places {count} tensors in it")
        shards[shard] = read_header(folder / shard)
    problems = [f"{name} is not in {shard}" for name, shard in where.items() if name not in shards[shard]]
    problems += [
        f"{name} is in {shard}, but the index places it {'in ' + where[name] if name in where else 'nowhere'}"
        for shard, found in shards.items() for name in found if where.get(name) != shard
    ]  # fmt: skip
    if problems:
        raise CheckpointError(f"{index.name} and its shards disagree:\n" + listed(problems))
    return {name: shards[shard][name] for name, shard in where.items()}


def listed(lines: Iterable[str]) -> str:
    """The first twenty, indented, and how many more there are."""
    lines = list(lines)
    more = [f"  … and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n".join([f"  {x}" for x in lines[:20]] + more)


def match(
    wanted: Mapping[str, TensorType], found: Mapping[str, Stored], ignorable: Iterable[str], where: Path
) -> dict[str, FileParam]:
    """A source for each wanted parameter. All that is missing, unexpected, misshaped or mistyped is named at once."""
    ignored = set(ignorable)
    problems = [f"missing: {name} {t}" for name, t in wanted.items() if name not in found]
    problems += [
        f"unexpected: {name} {s.dtype}{list(s.shape)}"
        for name, s in found.items()
        if name not in wanted and name not in ignored
    ]
    for name, t in wanted.items():
        s = found.get(name)
        if s is None:
            continue
        if s.shape != t.shape:
            problems.append(f"misshaped: {name} is {list(s.shape)}, the configuration asks for {list(t.shape)}")
        if s.dtype not in STORED:
            problems.append(f"wrong type: {name} is stored as {s.dtype}; a float parameter is {', '.join(map(str, STORED))}")
    if problems:
        raise CheckpointError(f"{where}: the checkpoint does not fit config.json:\n{listed(problems)}")
    return {name: FileParam(t, found[name]) for name, t in wanted.items()}
