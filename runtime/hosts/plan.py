"""A launch plan, read: sizes are trees over symbols, whose values the given arrays tell."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import AGAIN, ArtifactError

FORMAT = 1
PLAN = "plan.json"
SOURCES = {"webgpu": "kernels.wgsl", "opencl": "kernels.cl", "cuda": "kernels.fatbin"}
"""The file of the kernels, by the target's kind."""

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "//": lambda a, b: a // b,
    "%": lambda a, b: a % b, "min": min, "max": max,
}  # fmt: skip


def value(tree: Any, symbols: Mapping[str, int]) -> int:
    """What a size is."""
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return symbols[tree]
    return _OPERATORS[tree[0]](value(tree[1], symbols), value(tree[2], symbols))


@dataclass(frozen=True)
class KernelSpec:
    """One kernel of a plan."""

    name: str
    code: bytes
    """Its source; for cuda, the machine code of all kernels of the plan."""
    threads: tuple[int, int, int]
    writes: tuple[bool, ...]
    scalars: tuple[str, ...]

    @property
    def source(self) -> str:
        return self.code.decode("ascii")


class Plan:
    """What a plan's JSON and its file of kernels say."""

    def __init__(self, data: dict[str, Any], code: bytes) -> None:
        self.kernels = {name: _kernel(name, k, code) for name, k in data["kernels"].items()}
        self.entries: dict[str, dict[str, Any]] = {**data["entries"]}
        self.storage: dict[str, str] = {**data["storage"]}
        self.needs: dict[str, Any] = {k: data["needs"][k] for k in ("threads", "shared", "buffers", "f16")}
        for dtype in self.storage.values():
            np.iinfo(dtype)
        for need in self.needs.values():
            operator.index(need)
        self.constants: list[dict[str, str]] = data["constants"]


def _kernel(name: str, k: Mapping[str, Any], code: bytes) -> KernelSpec:
    x, y, z = map(operator.index, k["threads"])
    scalars = tuple(np.iinfo(s).dtype.name for s in k["scalars"])
    return KernelSpec(name, code[slice(*k["at"])] if "at" in k else code, (x, y, z), (*map(bool, k["writes"]),), scalars)


def read_plan(folder: Path, kind: str) -> Plan:
    """The plan of an artifact. Raises ArtifactError for another format, and for what is damaged."""
    path = folder / PLAN
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ArtifactError(f"{path} has format {data['format']}, this runtime reads {FORMAT}: {AGAIN}")
        return Plan(data, (folder / SOURCES[kind]).read_bytes())
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise ArtifactError(f"{path} is damaged ({type(e).__name__}: {e}); copy it again, or {AGAIN}") from None
