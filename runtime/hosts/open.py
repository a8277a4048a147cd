"""The machine that an artifact was made for."""

from __future__ import annotations

from typing import Any

from .machine import Machine
from .opencl import open_opencl
from .webgpu import open_webgpu

_OPENED: dict[tuple[Any, ...], Machine] = {}
"""One device serves all artifacts of a process that need the same of it."""


def open_machine(kind: str, needs: dict[str, Any]) -> Machine:
    """The device for artifacts of ``kind``. Raises ArtifactError, saying what is missing."""
    key = kind, *sorted(needs.items())
    if key not in _OPENED:
        _OPENED[key] = open_webgpu(needs) if kind == "webgpu" else open_opencl(needs)
    return _OPENED[key]
