"""Processor architectures: names of processors, what links for another one, and where its runtime is from."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tvm.target import codegen
from wasat.backends.tvm.build import BuildError, Runner, check_tools
from wasat.backends.tvm.cpu import arch
from wasat.backends.tvm.cpu.arch import ARCHES, Arch, LinkError, RuntimeMissing, arch_of
from wasat.backends.tvm.cpu.kernels.isa import AVX2, AVX512_VNNI, NEON, NEON_DOTPROD, NEON_I8MM, Isa, isa_of
from wasat.backends.tvm.targets import target_named
from wasat.ir import IRError, Program, parse

OTHER = next(a for a in ARCHES.values() if not a.here)
PROGRAM = Program({"f": parse("graph @f(%x: f32[2]) {\n %y: f32[2] = neg(%x)\n return %y\n}")})


@pytest.mark.parametrize(
    "name, isa, has, lacks",
    [
        ("aarch64", NEON, {"asimd"}, {"asimddp", "i8mm"}), ("aarch64:cortex-a53", NEON, {"asimd", "crc32"}, {"asimddp"}),
        ("cpu:cortex-a76", NEON_DOTPROD, {"asimd", "asimddp", "atomics"}, {"i8mm", "sve"}),
        ("aarch64:neoverse-v1", NEON_I8MM, {"asimddp", "i8mm", "bf16", "sve"}, {"sve2"}),
    ],
)  # fmt: skip
def test_processors_of_arm(name: str, isa: Isa, has: set[str], lacks: set[str]) -> None:
    """What is declared is what the kernels use, in the words of a manifest."""
    target = target_named(name)
    assert isa_of(target.tvm) is isa
    needs = target.requirements()
    assert (needs["arch"], needs["os"]) == ("aarch64", "linux")
    assert has <= set(needs["features"])
    assert not lacks & set(needs["features"])


def test_names_of_processors() -> None:
    assert arch_of("znver3") == ARCHES["x86_64"]
    assert arch_of("cortex-a76") == ARCHES["aarch64"]
    generic = arch_of("generic")
    assert generic is not None
    assert generic.here
    with pytest.raises(IRError, match=r"there is no CPU 'cortex-a67'; near it are .*cortex-a76"):
        target_named("cpu:cortex-a67")
    with pytest.raises(IRError, match=r"there is no aarch64 processor 'znver3'; names are LLVM's, such as cortex-a76$"):
        target_named("aarch64:znver3")
    assert target_named("aarch64", cache="f16").name == "aarch64"


def test_code_for_another_processor_is_no_code_to_call() -> None:
    with pytest.raises(BuildError, match=rf"\({OTHER.name}\) does not run here: compile it into an artifact"):
        Runner(PROGRAM, target_named(f"cpu:{OTHER.processors()[0]}"))


V3 = "pni ssse3 sse4_1 sse4_2 avx avx2 fma f16c bmi1 bmi2 abm popcnt movbe"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64")
def test_what_a_virtual_machine_hides_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM goes by the processor's model; the system's list says what may be used of it."""
    monkeypatch.setattr(codegen, "llvm_get_system_cpu", lambda: "znver4")
    monkeypatch.setattr(arch, "listed_features", lambda: frozenset(V3.split()))
    here = target_named("cpu")
    assert (here.config["mcpu"], isa_of(here.tvm)) == ("znver4", AVX2)
    assert here.requirements()["features"] == sorted(V3.split())
    with pytest.raises(BuildError, match=r"code for cpu \(znver4\) uses avx512f, .*, which this processor lacks"):
        Runner(PROGRAM, target_named("cpu:znver4"))
    for listed in (None, frozenset(ARCHES["x86_64"].words.values())):  # no such list, and everything in it
        monkeypatch.setattr(arch, "listed_features", lambda listed=listed: listed)
        assert "mattr" not in target_named("cpu").config
        assert isa_of(target_named("cpu").tvm) is AVX512_VNNI


def test_who_links(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {f"{OTHER.triple}-g++"}
    monkeypatch.setattr(shutil, "which", lambda name: name if name in present else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert OTHER.linker() == [f"{OTHER.triple}-g++"]
    assert not OTHER.missing_tools()
    present.clear()
    aarch64 = Arch("aarch64", {})
    monkeypatch.setattr(Arch, "here", False)
    how = "aarch64-linux-gnu-g++ (Debian: apt-get install g++-aarch64-linux-gnu) or pip install ziglang"
    assert aarch64.missing_tools() == [f"a C++ compiler for aarch64: {how}"]
    with pytest.raises(BuildError, match="compiling for aarch64 needs a C\\+\\+ compiler for aarch64"):
        check_tools(target_named("aarch64"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "ziglang")
    assert aarch64.linker() == [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.28"]


# -- the runtime --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Commands of pip, which finds a wheel for every package."""
    calls: list[list[str]] = []

    def pip(command: list[str], **options: Any) -> Any:
        calls.append(command)
        folder, name = arch.RUNTIME[command[-1].partition("==")[0]]
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as wheel:
            for called in ("lib{}.so", "lib{}.dylib", "{}.dll", "{}.lib"):
                wheel.writestr(f"{folder}/lib/{called.format(name)}", f"library of {command[-1]}")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return calls


def test_the_runtime_of_another_architecture_is_fetched_once(fetches: list[list[str]]) -> None:
    files = OTHER.runtime_files()
    assert [p.name for p in files] == ["libtvm_runtime.so", "libtvm_ffi.so"]
    wanted = [f"{name}=={version(name)}" for name in ("apache-tvm", "apache-tvm-ffi")]
    assert [p.read_text() for p in files] == [f"library of {w}" for w in wanted]
    assert [c[-1] for c in fetches] == wanted
    assert all(f"--platform=manylinux_2_28_{OTHER.name}" in c and "--no-deps" in c for c in fetches)
    assert OTHER.runtime_files() == files
    assert len(fetches) == 2


def test_other_systems(fetches: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    macos, windows = target_named("macos"), target_named("windows:znver4")
    assert [(t.requirements()["os"], t.requirements()["arch"]) for t in (macos, windows)] == [
        ("darwin", "aarch64"), ("win32", "x86_64"),
    ]  # fmt: skip
    assert (isa_of(macos.tvm), isa_of(target_named("macos:apple-m2").tvm)) == (NEON_DOTPROD, NEON_I8MM)
    assert (isa_of(windows.tvm), isa_of(target_named("windows").tvm)) == (AVX512_VNNI, AVX2)
    assert [p.name for p in macos.runtime_files()] == ["libtvm_runtime.dylib", "libtvm_ffi.dylib"]
    assert "--platform=macosx_11_0_arm64" in fetches[0]
    assert [p.name for p in windows.runtime_files()] == ["tvm_runtime.dll", "tvm_ffi.dll"]
    assert "--platform=win_amd64" in fetches[2]
    assert len({p.parent.parent for t in (macos, windows) for p in t.runtime_files()}) == 2
    assert Path(windows.link_options()["options"][-1]).name == "tvm_ffi.lib"
    monkeypatch.setattr(shutil, "which", lambda name: name if "mingw" in name else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert windows.arch.linker() == ["x86_64-w64-mingw32-g++"]
    assert "-static" in windows.link_options()["options"]
    assert macos.missing_tools() == ["a C++ compiler for aarch64 under darwin: pip install ziglang"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "ziglang")
    assert "-static" not in windows.link_options()["options"]  # an archive is what it would write
    with pytest.raises(IRError, match=r"there is no x86_64 processor 'apple-m1'"):
        target_named("windows:apple-m1")
    with pytest.raises(BuildError, match=r"windows \(x86_64 under win32\) does not run here"):
        Runner(PROGRAM, target_named("windows"))


@pytest.mark.parametrize("name", ["apple-m1", "apple-m2", "apple-m3"])
def test_second_names_of_processors(name: str) -> None:
    """LLVM lists them not, and knows them: their instruction sets are more than those of any."""
    assert len(target_named(f"macos:{name}").requirements()["features"]) > len(
        target_named("macos:generic").requirements()["features"]
    )


def test_without_a_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    message = rf"runtime for {OTHER.name} is in apache-tvm==.* pip could not fetch \(ERROR: No matching .*{tmp_path}/.* put"
    with pytest.raises(RuntimeMissing, match=message):
        OTHER.runtime_files()
    assert not list(tmp_path.rglob("*.so"))


def test_this_machine_under_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of processors are those of Linux, files those of the system."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    here = arch.arch_here()
    assert (here, here.here, str(here)) == (arch_of("cortex-a76"), True, "aarch64 under darwin")
    assert [p.name for p in here.runtime_files()] == ["libtvm_runtime.dylib", "libtvm_ffi.dylib"]
    assert not ARCHES["aarch64"].here


def test_here_it_is_that_of_the_packages() -> None:
    files = arch.arch_here().runtime_files()
    assert [p.name for p in files] == ["libtvm_runtime.so", "libtvm_ffi.so"]
    assert all(p.exists() for p in files)


def test_what_the_linker_says_is_told(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match=r"false cannot link .*out.so"):
        arch._link(["false"])(str(tmp_path / "out.so"), [])
