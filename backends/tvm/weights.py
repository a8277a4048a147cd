"""Packs parameters into the arrays a compiled program reads, one parameter at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from wasat.ir import Array, IRError, QArray

from .layouts import Layout, Packed
from .lower import WeightPlan

_SAFETENSORS: dict[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


_PIECE = 32 << 20
"""Bytes of a weight that are packed at a time."""


def itemsize(a: Packed) -> int:
    """Bytes of one element."""
    return {"bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}.get(a.dtype) or np.dtype(a.dtype).itemsize


def nbytes(a: Packed) -> int:
    """Size of a packed array in bytes."""
    return math.prod(a.shape) * itemsize(a)


def _pieces(weight: Array, rows: int | None) -> Iterator[Array]:
    """The weight in pieces of about _PIECE bytes, each (but the last) a multiple of ``rows`` rows."""
    if rows is None or len(weight.shape) < 2 or not math.prod(weight.shape):
        yield weight
        return
    width = math.prod(weight.shape[1:]) * (1 if isinstance(weight, QArray) else weight.itemsize)
    step = max(_PIECE // width // rows, 1) * rows
    for i in range(0, weight.shape[0], step):
        yield weight.rows(slice(i, i + step)) if isinstance(weight, QArray) else weight[i : i + step]


def write_weights(
    path: Path, plan: WeightPlan, load: Callable[[str], Array],
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:  # fmt: skip
    """Writes ``plan``'s arrays, of the parameters that ``load`` gives by name, as a safetensors file.

    The safetensors library's writer wants every array in memory at once; sizes are known from the plan, so the header is
    written first and each parameter is loaded, packed and dropped in turn. ``on_progress(bytes done, bytes in all)``.
    """
    header: dict[str, dict[str, Any]] = {}
    at = 0
    for a in plan.arrays:
        header[a.name] = {"dtype": _SAFETENSORS[a.dtype], "shape": list(a.shape), "data_offsets": [at, at + nbytes(a)]}
        at += nbytes(a)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # data starts aligned, so a mapped file can be read as it is
    total, done = at, 0
    start = 8 + len(text)
    jobs: dict[str, list[tuple[Layout, list[Packed]]]] = {}
    for (name, layout), arrays in plan.layouts.items():
        jobs.setdefault(name, []).append((layout, arrays))
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, uses in jobs.items():
            weight = load(name)
            for layout, arrays in uses:
                ends = [start + header[a.name]["data_offsets"][0] for a in arrays]
                for piece in _pieces(weight, layout.rows):
                    for i, (a, x) in enumerate(zip(arrays, layout.pack(piece), strict=True)):
                        if tuple(x.shape[1:]) != a.shape[1:] or x.dtype.itemsize != itemsize(a):
                            made = f"{x.dtype}{list(x.shape)}"
                            raise IRError(f"packing {name} made {made} for {a.name}: {a.dtype}{list(a.shape)}")
                        f.seek(ends[i])
                        f.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
                        ends[i] += x.nbytes
                        done += x.nbytes
                        on_progress(done, total)
                for a, end in zip(arrays, ends):
                    if end != start + header[a.name]["data_offsets"][1]:
                        raise IRError(f"packing {name} made too few or too many rows for {a.name}: {a.dtype}{list(a.shape)}")
            del weight
        f.truncate(start + total)
