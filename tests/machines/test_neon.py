"""Every test of the kernels that is drawn over instruction sets, with NEON's code under qemu: those of integer products with
what multiplies bytes, too."""
from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
import test_instructions
import test_kernels_attention
import test_kernels_blocks
import test_kernels_gemm
import test_kernels_grouped
import test_kernels_linear_float
import test_kernels_linear_int
import test_kernels_norm_glu
import test_kernels_rope_cache
from wasat.backends.tvm.cpu.kernels.isa import NEON, NEON_DOTPROD, NEON_I8MM, Isa

pytestmark = pytest.mark.machines
MODULES = [test_kernels_attention, test_kernels_blocks, test_kernels_gemm, test_kernels_grouped, test_kernels_linear_float,
           test_kernels_linear_int, test_kernels_norm_glu, test_kernels_rope_cache]  # fmt: skip
OF_BYTES = ("test_linear_int", "test_products_of_integers", "test_embedding")
"""Tests of kernels in which sets differ that differ in products of bytes alone."""


def _rows(mark: Any) -> list[dict[str, Any]]:
    """The cases of a ``parametrize``."""
    names = [n.strip() for n in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
    values = [v.values if isinstance(v, type(pytest.param(0))) else v if len(names) > 1 else (v,) for v in mark.args[1]]
    return [dict(zip(names, row)) for row in values]


def _cases() -> list[Any]:
    """(set, module, test, its other arguments), one for each combination of the test's parameters."""
    cases = []
    for module in MODULES:
        for name, test in inspect.getmembers(module, inspect.isfunction):
            marks = [m for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
            if not name.startswith("test_") or not any(m.args[0] == "isa" for m in marks):
                continue
            combined: list[dict[str, Any]] = [{}]
            for mark in marks:
                if mark.args[0] != "isa":
                    combined = [{**c, **row} for c in combined for row in _rows(mark)]
            for isa in (NEON, NEON_DOTPROD, NEON_I8MM)[: 3 if name in OF_BYTES else 1]:
                cases += [pytest.param(isa, module, test, c, id=f"{isa.name}-{name}-{i}") for i, c in enumerate(combined)]
    return cases


@pytest.mark.parametrize("isa, module, test, arguments", _cases())
def test_kernel(
    isa: Isa, module: Any, test: Callable[..., None], arguments: dict[str, Any], emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "build", emulated)
    test(isa=isa, **arguments)


@pytest.mark.parametrize("isa", [NEON_DOTPROD, NEON_I8MM], ids=lambda isa: isa.name)
def test_products_of_bytes(isa: Isa, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_instructions, "build", emulated)
    monkeypatch.setattr(test_instructions, "lacks", lambda isa: [])
    test_instructions.test_meaning(isa, "vpdpbusd", soft=False)
