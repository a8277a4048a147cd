"""Every test of the kernels that is drawn over instruction sets, with NEON's code under qemu."""
from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
import test_kernels_attention
import test_kernels_gemm
import test_kernels_linear_float
import test_kernels_linear_int
import test_kernels_norm_glu
import test_kernels_rope_cache
from wasat.backends.tvm.cpu.kernels.isa import NEON

pytestmark = pytest.mark.machines
MODULES = [test_kernels_attention, test_kernels_gemm, test_kernels_linear_float, test_kernels_linear_int,
           test_kernels_norm_glu, test_kernels_rope_cache]  # fmt: skip


def _cases() -> list[Any]:
    """(module, test, its other arguments), one for each combination of the test's parameters."""
    cases = []
    for module in MODULES:
        for name, test in inspect.getmembers(module, inspect.isfunction):
            marks = [m for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
            if not name.startswith("test_") or not any(m.args[0] == "isa" for m in marks):
                continue
            combined: list[dict[str, Any]] = [{}]
            for mark in marks:
                if mark.args[0] == "isa":
                    continue
                names = [n.strip() for n in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
                rows = [getattr(v, "values", None) if isinstance(v, type(pytest.param(0))) else v if len(names) > 1 else (v,)
                        for v in mark.args[1]]
                combined = [{**c, **dict(zip(names, row))} for c in combined for row in rows]
            cases += [pytest.param(module, test, c, id=f"{name}-{i}") for i, c in enumerate(combined)]
    return cases


@pytest.mark.parametrize("module, test, arguments", _cases())
def test_kernel(module: Any, test: Callable[..., None], arguments: dict[str, Any], emulated: Any,
                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build", emulated)
    test(isa=NEON, **arguments)
