"""Kernels are compiled in parts, side by side: all are there, in this process and in a library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wasat.backends.tvm import machine_code
from wasat.backends.tvm.build import Runner, build
from wasat.backends.tvm.targets import cpu
from wasat.frontend import nn
from wasat.ir import Program, evaluate

KERNELS = 7


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "_PART", 2)


class Sums(nn.Module):
    """Sums over as many lengths as there are kernels: none is another's."""

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return nn.concat([(x[:, : i + 2] * (i + 1)).sum(-1, keepdims=True) for i in range(KERNELS)], -1)


def program() -> Program:
    return nn.trace(Sums(), {"x": f"f32[n, {KERNELS + 2}]"})


@pytest.mark.parametrize("donate", [False, True], ids=["in this process", "a library"])
def test_every_part_is_called(donate: bool) -> None:
    p = program()
    x = np.random.default_rng(0).standard_normal((3, KERNELS + 2)).astype(np.float32)
    got = Runner(p, cpu(), donate=donate)("forward", {"x": x})
    wanted = evaluate(p["forward"], {"x": x})
    np.testing.assert_allclose(next(iter(got.values())), wanted[0], rtol=1e-5, atol=1e-5)


def test_parts_do_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One CPU or several: the same parts, and nothing of what TVM notes for debuggers."""
    found = []
    for cpus in (1, 3):
        monkeypatch.setattr(machine_code, "cpu_count", lambda cpus=cpus: cpus)
        library = build(program(), cpu(threads=2))
        assert len(library.code.parts) > 1
        found.append([sorted(re.findall(r"__tvm_ffi_\w+", part.inspect_source())) for part in library.code.parts])
    assert found[0] == found[1]
    assert all(len(names) > 1 for names in found[0])
    library.export(tmp_path / "model.so")
    code = (tmp_path / "model.so").read_bytes()
    assert b".text" in code
    assert b".debug" not in code


class Both(nn.Module):
    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return nn.concat([x.sum(-1, keepdims=True), nn.exp(x)], -1)


def test_only_sums_are_optimized_at_level_3(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: dict[str, int] = {}
    compile = machine_code.tvm.tirx.build

    def noted(part: Any, machine: Any, *rest: Any) -> Any:
        levels.update({name.name_hint: int(machine.attrs["opt-level"]) for name in part.functions})
        return compile(part, machine, *rest)

    monkeypatch.setattr(machine_code.tvm.tirx, "build", noted)
    build(nn.trace(Both(), {"x": "bf16[n, 9, m]"}), cpu())  # sums in f32 are in loops of ours
    assert {name for name, level in levels.items() if level == 3} == {name for name in levels if "sum" in name}
    assert set(levels.values()) == {2, 3}


class Sizes(nn.Module):
    """Tensors of many sizes, which one function computes."""

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        y = x
        for k in (3, 5, 7, 9, 11, 13):
            y = nn.relu(y @ nn.constant(np.ones((int(y.shape[-1]), k), np.float32)))
        return y


def test_a_program_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    """TVM writes the stores of functions of sizes in the order of pointers, which the first programs move."""
    p = nn.trace(Sizes(), {"x": "f32[n, m, 2]"})
    kept, found = [], set()
    for i in range(3):
        library = build(p, cpu(threads=1))
        library.export(tmp_path / f"{i}.so")
        found.add((tmp_path / f"{i}.so").read_bytes())
        kept.append(library)  # what comes next lies elsewhere
    assert len(found) == 1
