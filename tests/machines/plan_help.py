"""Targets of launch plans on this machine, those without a device skipped."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())  # a warning of Vulkan's loader

import pytest
from soft_cuda import soft_gpu
from wasat.backends.tvm.build import plan
from wasat.backends.tvm.targets import target_named
from wasat.backends.tvm.weights import write_weights
from wasat.ir import Program
from wasat.runtime import Model, load, write_artifact
from wasat.runtime.machine import missing
from wasat.runtime.manifest import Needs

from wasat.manifest import manifest_of

TARGETS = ("webgpu", "webgpu:f16", "opencl")


@contextmanager
def device(target: str) -> Iterator[None]:
    """Inside, code for ``target`` runs: for cuda, on a GPU in software."""
    if target.startswith("cuda"):
        with soft_gpu():
            yield
    else:
        need(target)
        yield


def need(target: str) -> None:
    """Skips the test unless this machine runs code for ``target``."""
    kind = target.partition(":")[0]
    if lacking := missing(Needs(kind, "", "", (), kind, "", ())):
        pytest.skip(f"needs {lacking}")


def loaded(program: Program, target: str, folder: Path, cache: str = "f32", **files: Any) -> Model:
    """The program compiled as it is, without passes, and loaded."""
    made = plan(program, target_named(target, cache=cache))
    weights = {"weights.safetensors": lambda path: write_weights(path, made.plan, program.load)}
    write_artifact(folder, manifest_of(program, made, {}), {**made.files(), **weights, **files})
    return load(folder)
