"""Processor architectures: what their instruction sets are called, who links for them, and where TVM's runtime for them is."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tvm
from wasat.ir import WasatError

RUNTIME = {"apache-tvm": "tvm/lib/libtvm_runtime.so", "apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so"}
"""The package that each library of the runtime is from, and its place there."""


class RuntimeMissing(WasatError):
    """TVM's runtime for another architecture could not be fetched."""


@dataclass(frozen=True)
class Arch:
    """A processor architecture under Linux, by the name that ``platform.machine()`` has for it."""

    name: str
    words: Mapping[str, str]
    """LLVM's names of the instruction sets that code generation uses, as /proc/cpuinfo spells them."""

    @property
    def here(self) -> bool:
        """Whether it is this machine's."""
        return self.name == platform.machine()

    @property
    def triple(self) -> str:
        return f"{self.name}-linux-gnu"

    @property
    def config(self) -> dict[str, str]:
        """What tvm.target.Target must be told, beside a processor's name."""
        return {"kind": "llvm"} if self.here else {"kind": "llvm", "mtriple": self.triple}

    def processors(self) -> list[str]:
        """LLVM's names of those that there are."""
        return [str(x) for x in tvm.target.codegen.llvm_get_cpu_archlist(tvm.target.Target(self.config))]

    def features(self, target: tvm.target.Target) -> list[str]:
        """Instruction sets that code for a processor may use, as /proc/cpuinfo names them."""
        found = {str(f) for f in tvm.target.codegen.llvm_get_cpu_features(target)}
        return sorted(v for k, v in self.words.items() if k in found)

    def hidden(self, target: tvm.target.Target) -> list[str]:
        """LLVM's names of the instruction sets that code for ``target`` may use and that this machine's system does not list:
        virtual machines hide some of what the processor's model has, and using them ends the process.
        """
        listed = listed_features()
        named = {str(f) for f in tvm.target.codegen.llvm_get_cpu_features(target)}
        return [] if listed is None else [k for k, v in self.words.items() if k in named and v not in listed]

    # -- linking ------------------------------------------------------------------------------------------------------------
    def linker(self) -> list[str] | None:
        """The command of a C++ compiler that links for it; None where there is none."""
        if self.here:
            return next(([c] for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
        if shutil.which(f"{self.triple}-g++"):
            return [f"{self.triple}-g++"]
        if importlib.util.find_spec("ziglang"):
            return [sys.executable, "-m", "ziglang", "c++", "-target", f"{self.triple}.2.28"]
        return None

    def missing_tools(self) -> list[str]:
        if self.linker():
            return []
        if self.here:
            return ["a C++ compiler: none of g++, clang++, c++ is on the PATH (Debian: apt-get install g++)"]
        package = f"g++-{self.triple.replace('_', '-')}"
        return [f"a C++ compiler for {self.name}: {self.triple}-g++ (Debian: apt-get install {package}) or pip install ziglang"]

    def link_options(self) -> dict[str, Any]:
        """Further arguments of export_library."""
        # TVM writes debug information that speaks of its own text: a third of the file
        options: dict[str, Any] = {"options": ["-Wl,--strip-debug"]}
        return options if self.here else {**options, "fcompile": _link(self.linker() or [])}

    # -- the runtime --------------------------------------------------------------------------------------------------------
    def runtime_files(self) -> list[Path]:
        """TVM's runtime for it: that of the packages installed here, or of the same versions of them for another machine,
        fetched once. Raises RuntimeMissing."""
        import tvm_ffi

        if self.here:
            roots = {"apache-tvm": Path(tvm.__file__), "apache-tvm-ffi": Path(tvm_ffi.__file__)}
            return [roots[package].parents[1] / place for package, place in RUNTIME.items()]
        folder = _cache() / self.name
        return [_fetched(package, place, self, folder) for package, place in RUNTIME.items()]


def _link(command: Sequence[str]) -> Callable[..., None]:
    def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None) -> None:
        done = subprocess.run(
            [*command, "-shared", "-fPIC", "-o", output, *objects, *(options or ())], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} cannot link {output}: {done.stderr.strip()}")

    return link


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wasat" / "runtime"


def _fetched(package: str, place: str, arch: Arch, folder: Path) -> Path:
    """A library out of the wheel of ``package`` for ``arch``, of the version that is installed here; kept in ``folder``."""
    wanted = f"{package}=={version(package)}"
    found = folder / wanted / Path(place).name
    if found.exists():
        return found
    with tempfile.TemporaryDirectory() as tmp:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", tmp]
        systems = [f"--platform=manylinux_2_{n}_{arch.name}" for n in (28, 27, 24, 17)]
        done = subprocess.run([*pip, *systems, wanted], capture_output=True, text=True)
        wheels = list(Path(tmp).glob("*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.strip().rpartition("\n")[2]
            raise RuntimeMissing(
                f"TVM's runtime for {arch.name} is in {wanted} for that machine, which pip could not fetch ({said}); "
                f"with a connection, or with {found} put there from the wheel, run again"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel, tempfile.TemporaryDirectory(dir=folder) as fresh:
            (Path(fresh) / found.name).write_bytes(wheel.read(place))
            found.parent.mkdir(exist_ok=True)
            os.replace(Path(fresh) / found.name, found)
    return found


ARCHES = {
    a.name: a
    for a in (
        Arch("x86_64", {
            "sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "avx": "avx", "avx2": "avx2", "fma": "fma",
            "f16c": "f16c", "bmi": "bmi1", "bmi2": "bmi2", "lzcnt": "abm", "popcnt": "popcnt", "movbe": "movbe",
            "avxvnni": "avx_vnni", "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq",
            "avx512vl": "avx512vl", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16",
            "avx512ifma": "avx512ifma", "avx512vbmi": "avx512vbmi", "avx512vbmi2": "avx512_vbmi2",
            "avx512bitalg": "avx512_bitalg", "avx512vpopcntdq": "avx512_vpopcntdq", "gfni": "gfni", "sse4a": "sse4a",
            "xop": "xop", "fma4": "fma4", "tbm": "tbm",
        }),
        Arch("aarch64", {
            "neon": "asimd", "fp-armv8": "fp", "crc": "crc32", "lse": "atomics", "rdm": "asimdrdm", "fullfp16": "asimdhp",
            "fp16fml": "asimdfhm", "dotprod": "asimddp", "i8mm": "i8mm", "bf16": "bf16", "jsconv": "jscvt", "complxnum": "fcma",
            "rcpc": "lrcpc", "rcpc-immo": "ilrcpc", "sve": "sve", "sve2": "sve2", "sve2p1": "sve2p1", "sme": "sme",
        }),
    )
}  # fmt: skip
"""Those that are compiled for."""


def listed_features() -> frozenset[str] | None:
    """This machine's instruction sets as /proc/cpuinfo lists them; None where there is no such file."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
            return frozenset(next(found, ()))
    except FileNotFoundError:
        return None


def arch_of(mcpu: str) -> Arch | None:
    """The architecture that has a processor of this name; of several, this machine's."""
    return next((a for a in sorted(ARCHES.values(), key=lambda a: not a.here) if mcpu in a.processors()), None)


def arch_here() -> Arch:
    """This machine's; one that nobody has described has no words for its instruction sets."""
    return ARCHES.get(platform.machine()) or Arch(platform.machine(), {})
