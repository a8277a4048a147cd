"""The machine that an artifact was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .cuda import open_cuda
from .machine import Machine
from .opencl import open_opencl
from .webgpu import open_webgpu

_OPEN: dict[str, Callable[[dict[str, Any]], Machine]] = {"webgpu": open_webgpu, "opencl": open_opencl, "cuda": open_cuda}
_OPENED: dict[tuple[Any, ...], Machine] = {}
"""One device serves all artifacts of a process that need the same of it."""


def open_machine(kind: str, needs: dict[str, Any]) -> Machine:
    """The device for artifacts of ``kind``. Raises ArtifactError, saying what is missing."""
    key = kind, *sorted(needs.items())
    if key not in _OPENED:
        _OPENED[key] = _OPEN[kind](needs)
    return _OPENED[key]
