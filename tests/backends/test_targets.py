"""Targets by name: ours, and those that other packages announce."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest
from wasat.backends.tvm import targets
from wasat.backends.tvm.build import BuildError, check_tools
from wasat.backends.tvm.targets import Target, target_named
from wasat.ir import IRError


def plain(mcpu: str = "x86-64") -> Target:
    return Target("plain", {"kind": "llvm", "mcpu": mcpu})


def single(threads: int | None = None) -> Target:
    return Target("single", {"kind": "llvm"}, threads=threads or 7)


def keeps(width: str = "8", cache: str = "float32") -> Target:
    return Target("keeps", {"kind": "llvm", "mcpu": f"{width} {cache}"})


@pytest.fixture(autouse=True)
def other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint(name, value, targets.ENTRY_POINTS)
        for name, value in {
            **{f.__name__: f"{__name__}:{f.__name__}" for f in (plain, single, keeps)},
            "absent": "no_such_module:target", "cpu": f"{__name__}:plain",
        }.items()
    ]  # fmt: skip
    monkeypatch.setattr(targets, "entry_points", lambda group: points if group == targets.ENTRY_POINTS else [])


def test_another_package_announces_targets() -> None:
    assert target_named("plain").config["mcpu"] == "x86-64"
    assert target_named("plain:x86-64-v3").config["mcpu"] == "x86-64-v3"
    assert target_named("single").threads == 7
    assert target_named("single", threads=3).threads == 3
    assert target_named("keeps:4", cache="f16").config["mcpu"] == "4 float16"


def test_ours_come_first() -> None:
    assert target_named("cpu:x86-64").granule == 16


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("tpu", {}, r"no target 'tpu'; there are cpu, .*absent, keeps, plain, single"),
        ("absent:3", {}, r"target absent \(no_such_module:target\) cannot be loaded: ModuleNotFoundError"),
        ("single:3", {}, "single has no models to choose from: write single, not single:3"),
        ("plain", {"cache": "f16"}, "; caches of f16 are for cpu, "),
        ("keeps", {"cache": "int3"}, "there is no cache of 'int3'; there are f32, f16, int8, int4"),
        ("keeps", {"cache": "int8"}, "the target keeps stores keys and values as f32 or f16, not as int8"),
    ],
)
def test_what_there_is_none_of(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(IRError, match=message):
        target_named(name, **options)


def test_a_target_says_what_its_tools_lack() -> None:
    class Board(Target):
        def missing_tools(self) -> list[str]:
            return ["a board (from the shop)", "its cable"]

    with pytest.raises(BuildError, match=r"compiling for board needs a board \(from the shop\); and its cable; install it"):
        check_tools(Board("board", {"kind": "llvm"}))
