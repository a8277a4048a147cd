"""Weights from a safetensors file into memory that compiled code can read as it is, hashed on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import numpy as np

from .device import ALIGNMENT, Buffer, allocate, buffer_in, size_of
from .errors import AGAIN, ArtifactError
from .interface import TensorSpec

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_PIECE = 8 << 20
"""Bytes read at a time; while one piece is read, the one before is hashed."""


class Weights:
    """The arrays of one file, in memory.

    ``specs``: what must be in it, in the order that the program takes them. Raises ArtifactError where the file's header says
    anything else, or the file is cut short. ``sha256`` is that of the file, or None without ``hashed``.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], hashed: bool = True) -> None:
        self._path, self._specs = path, specs
        self._offsets: dict[str, int] = {}
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as f, ThreadPoolExecutor(1) as background:
            jobs = []

            def read(into: memoryview) -> memoryview:
                self._fill(f, into)
                if hashed:
                    jobs.append(background.submit(digest.update, into))
                return into

            count = int.from_bytes(read(memoryview(bytearray(8))), "little")
            rest = path.stat().st_size - 8 - count
            if rest < 0:
                raise self._damaged(f"its header would have {count} bytes")
            order = self._layout(bytes(read(memoryview(bytearray(count)))), rest)
            at = 0
            for name, size in order:
                self._offsets[name] = at
                at += -(-size // ALIGNMENT) * ALIGNMENT
            self._memory = allocate(at)
            memory = memoryview(self._memory)  # type: ignore[arg-type]  # mypy does not know that arrays are buffers
            for name, size in order:
                start, end = self._offsets[name], self._offsets[name] + size
                for i in range(start, end, _PIECE):
                    read(memory[i : min(i + _PIECE, end)])
            for job in jobs:
                job.result()
        self.sha256 = digest.hexdigest() if hashed else None

    def buffers(self) -> dict[str, Buffer]:
        """The arrays by name, in the specs' order. Needs the TVM runtime to be loaded."""
        return {
            s.name: buffer_in(self._memory[at : at + size_of(s.dtype, _shape(s))], s.dtype, _shape(s))
            for s, at in ((s, self._offsets[s.name]) for s in self._specs)
        }

    def arrays(self) -> dict[str, tuple[str, np.ndarray]]:
        """The element types, and the arrays as bytes where NumPy lacks these, by name."""
        raw = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
        found = {}
        for s in self._specs:
            at = self._offsets[s.name]
            memory = self._memory[at : at + size_of(s.dtype, _shape(s))]
            found[s.name] = s.dtype, memory.view(raw.get(s.dtype, s.dtype)).reshape(_shape(s))
        return found

    def _fill(self, f: FileIO, into: memoryview) -> None:
        """Reads ``into`` full from where the file is."""
        while into:
            got = f.readinto(into)
            if not got:
                raise self._damaged("it ends too early")
            into = into[got:]

    def _layout(self, header: bytes, data_size: int) -> list[tuple[str, int]]:
        """Names and sizes in file order, after checking that they are the arrays wanted and fill the file without gaps."""
        try:
            found = json.loads(header)
            found.pop("__metadata__", None)
            types = {name: (_DTYPES[x["dtype"]], [int(d) for d in x["shape"]]) for name, x in found.items()}
            parts = sorted((int(x["data_offsets"][0]), int(x["data_offsets"][1]), str(name)) for name, x in found.items())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise self._damaged(f"its header cannot be read ({type(e).__name__}: {e})") from None
        wanted = {s.name: (s.dtype, _shape(s)) for s in self._specs}
        for name in [*wanted, *types]:
            if name not in types or name not in wanted:
                raise self._damaged(f"it {'has' if name in types else 'lacks'} an array {name}, unlike manifest.json")
            if types[name] != wanted[name]:
                (has, had), (want, wants) = types[name], wanted[name]
                raise self._damaged(f"its array {name} is {has}{had}; manifest.json says {want}{wants}")
        at = 0
        for start, end, name in parts:
            if start != at or end - start != size_of(*wanted[name]):
                raise self._damaged(f"its array {name} lies at {start}..{end}, which does not fit")
            at = end
        if at != data_size:
            raise self._damaged(f"its arrays have {at} bytes, the file {data_size}")
        return [(name, end - start) for start, end, name in parts]

    def _damaged(self, why: str) -> ArtifactError:
        return ArtifactError(f"{self._path} is damaged: {why}; copy it again, or {AGAIN}")


def _shape(spec: TensorSpec) -> list[int]:
    return [int(d) for d in spec.shape]
