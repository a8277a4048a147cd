"""``wasat targets``: what there is, what it takes to compile for it, and what to run it."""

from __future__ import annotations

import re
import shutil
import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

pytest.importorskip("tvm")

from wasat.backends.tvm import targets
from wasat.backends.tvm.targets import Target
from wasat.runtime import ArtifactError, module
from wasat.runtime import machine as here
from wasat.runtime.hosts import cuda_driver
from wasat.runtime.hosts.cuda import runs_on
from wasat.runtime.machine import missing
from wasat.runtime.manifest import Needs

from wasat.cli import console
from wasat.machines import machine, machines

Run = Callable[..., tuple[int, str, str]]


def abacus(beads: str = "100") -> Target:
    """A counting frame. It has beads."""
    return Target("abacus", {"kind": "llvm", "mcpu": beads}, needs_compiler=False, libraries=(Path("/no/libabacus.so"),))


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("counting_frames")
    module.abacus = abacus  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "counting_frames", module)
    points = [EntryPoint("abacus", "counting_frames:abacus", targets.ENTRY_POINTS), EntryPoint("lost", "nowhere:x", "g")]
    monkeypatch.setattr(targets, "entry_points", lambda group: points)


def test_every_target_is_there(packages: None) -> None:
    found = {m.name: m for m in machines()}
    assert list(found) == [*targets.TARGETS, "abacus", "lost"]
    assert all(m.about and "`" not in m.about for name, m in found.items() if name != "lost")
    assert (found["cpu"].tools, found["cpu"].lacking) == ((), None)
    assert found["abacus"].about == "A counting frame"
    assert found["abacus"].tools == ("the library libabacus.so: /no/libabacus.so does not exist",)
    assert re.match(r"repair: the target lost \(nowhere:x\) cannot be loaded: ModuleNotFoundError", found["lost"].tools[0])


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert machine("cpu:x86-64").tools == (
        "a C++ compiler: none of g++, clang++, c++ is on the PATH (Debian: apt-get install g++)",
    )


def test_on_the_command_line(run: Run, packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "width", 300)
    code, out, _ = run("targets")
    assert code == 0
    assert re.search(r"^ ?cpu +This machine's CPU, or .* +yes +yes *$", out, re.MULTILINE)
    assert re.search(r"^ ?abacus +A counting frame +needs the library libabacus.so: .* +yes *$", out, re.MULTILINE)
    code, out, _ = run("targets", "cpu:x86-64", "abacus:7")
    assert [line.split()[0] for line in out.splitlines()] == ["target", "cpu:x86-64", "abacus:7"]
    code, out, err = run("targets", "tpu")
    assert (code, out) == (1, "")
    assert re.match(r"error: there is no target 'tpu'; there are cpu, .*, abacus, lost ", err)


def test_one_driver_of_a_name_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """All see its functions: a second one's would never be called."""
    monkeypatch.setattr(module, "_drivers", {"libunit.so": "first"})
    module._load_driver(Path("libunit.so"), "first", "unit")
    with pytest.raises(ArtifactError, match=r"already runs another libunit\.so, of another artifact: load this one in"):
        module._load_driver(Path("libunit.so"), "second", "unit")
    with pytest.raises(ArtifactError, match=r"for the device unit, and libgone\.so of it cannot be loaded here"):
        module._load_driver(Path("/no/libgone.so"), "third", "unit")
    assert module._drivers == {"libunit.so": "first"}


# -- what a machine lacks ---------------------------------------------------------------------------------------------------
def needs(**fields: object) -> Needs:
    return Needs(**{"kind": "llvm", "arch": here.platform.machine(), "os": sys.platform, "features": (), **fields})  # type: ignore[arg-type]


class Driver:
    """libcuda.so.1 of a machine with GPUs of one capability; what it has are functions, to which ctypes gives types."""

    def __init__(self, devices: int, major: int = 0, minor: int = 0, initialized: int = 0) -> None:
        found = {75: major, 76: minor}

        def put(to: object, value: object) -> int:
            to._obj.value = value  # type: ignore[attr-defined]
            return 0

        self.cuInit = lambda flags: initialized
        self.cuDeviceGetCount = lambda count: put(count, devices)
        self.cuDeviceGetAttribute = lambda value, attribute, device: put(value, found[attribute])
        self.cuGetErrorName = lambda code, text: put(text, b"NO_DEVICE")
        self.cuGetErrorString = lambda code, text: put(text, b"no device")


@pytest.mark.parametrize(
    "driver, arch, message",
    [
        (None, "sm_90", r"an NVIDIA GPU of the architecture sm_90: its driver \(libcuda.so.1\) is not installed here"),
        (Driver(0), "sm_90", "sm_90: the driver here finds none"),
        (Driver(1, 9, 0, initialized=100), "sm_90", r"here finds none \(cuInit failed: no device \(NO_DEVICE, 100\)\)"),
        (Driver(1, 7, 5), "sm_80,sm_90a", "of the architecture sm_80 or sm_90a: the one here is sm_75"),
        (Driver(1, 9, 0), "sm_80,sm_90a", None),
        (Driver(2, 8, 6), "sm_80,sm_90a", None),
    ],
)
def test_gpus(driver: Driver | None, arch: str, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Driver:
        if driver is None:
            raise OSError
        return driver

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", load)
    cuda_driver.driver.cache_clear()
    found = missing(needs(kind="cuda", mcpu=arch))
    cuda_driver.driver.cache_clear()
    assert found is None if message is None else re.search(message, found or "")


@pytest.mark.parametrize(
    "arch, capability, runs",
    [
        ("sm_80", (8, 0), True), ("sm_80", (8, 9), True), ("sm_86", (8, 0), False), ("sm_80", (9, 0), False),
        ("sm_90", (8, 9), False), ("sm_90a", (9, 0), True), ("sm_90a", (9, 1), False), ("sm_120", (12, 1), True),
        ("sm_100", (10, 3), True), ("sm_100", (12, 0), False), ("compute_90", (9, 0), False),
    ],
)  # fmt: skip
def test_which_gpus_run_which_code(arch: str, capability: tuple[int, int], runs: bool) -> None:
    """As NVIDIA's guide to compatibility has it: within a major number, upwards; what ends in a, there alone."""
    assert runs_on(arch, *capability) is runs
