"""Processors and systems: what instruction sets are called, who links for them, and where TVM's runtime for them is."""

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
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tvm
from wasat.ir import WasatError


@dataclass(frozen=True)
class System:
    """An operating system, by the name that ``sys.platform`` has for it."""

    name: str
    triple: str
    """LLVM's name of it on a processor, which {} is here and below."""
    library: str
    """How it calls the file of a library."""
    wheels: tuple[str, ...]
    """Tags of the packages that hold TVM's runtime for it: one of them."""
    zig: str
    """What ziglang calls it."""
    compiler: str = ""
    """A cross compiler, and Debian's package of it."""
    package: str = ""
    options: tuple[str, ...] = ("-Wl,--strip-debug",)
    """Of the linker. TVM writes debug information that speaks of its own text: a third of the file."""
    imports: str = ""
    """How it calls what linkers read in place of a library; empty: what a library calls is found when that is loaded."""
    called: Mapping[str, str] = field(default_factory=dict)
    """What it calls processors that have another name under Linux."""


LINUX = System(
    "linux", "{}-linux-gnu", "lib{}.so", tuple(f"manylinux_2_{n}_{{}}" for n in (28, 27, 24, 17)), "{}-linux-gnu.2.28",
    "{}-linux-gnu-g++", "g++-{}-linux-gnu",
)  # fmt: skip
MACOS = System(
    "darwin", "{}-apple-macos11", "lib{}.dylib", ("macosx_11_0_{}", "macosx_12_0_{}"), "{}-macos.11.0",
    options=("-Wl,-S", "-Wl,-undefined,dynamic_lookup"), called={"aarch64": "arm64"},
)  # fmt: skip
WINDOWS = System(
    "win32", "{}-w64-windows-gnu", "{}.dll", ("win_{}",), "{}-windows-gnu", "{}-w64-mingw32-g++", "g++-mingw-w64-{}",
    ("-Wl,--strip-debug", "-static"), "{}.lib", {"x86_64": "amd64"},
)  # fmt: skip
SYSTEMS = {s.name: s for s in (LINUX, MACOS, WINDOWS)}
RUNTIME = {"apache-tvm": ("tvm", "tvm_runtime"), "apache-tvm-ffi": ("tvm_ffi", "tvm_ffi")}
"""The package that each library of the runtime is from; its folder there, and its name."""


_MORE = {"aarch64": ("apple-m1", "apple-m2", "apple-m3")}
"""Processors that LLVM knows and does not list: second names."""


class RuntimeMissing(WasatError):
    """TVM's runtime for another architecture could not be fetched."""


class LinkError(WasatError):
    """The linker refused what was compiled, or had no room for it."""


@dataclass(frozen=True)
class Arch:
    """A processor architecture, by the name that ``platform.machine()`` has for it under Linux, and a system."""

    name: str
    words: Mapping[str, str]
    """LLVM's names of the instruction sets that code generation uses, as /proc/cpuinfo spells them."""
    system: System = LINUX

    def __str__(self) -> str:
        return self.name if self.system is LINUX else f"{self.name} under {self.system.name}"

    @property
    def here(self) -> bool:
        """Whether it is this machine's."""
        return self.name == machine() and self.system.name == sys.platform

    @property
    def triple(self) -> str:
        return self.system.triple.format(self.name)

    @property
    def config(self) -> dict[str, str]:
        """What tvm.target.Target must be told, beside a processor's name."""
        return {"kind": "llvm"} if self.here else {"kind": "llvm", "mtriple": self.triple}

    def processors(self) -> list[str]:
        """LLVM's names of those that there are."""
        listed = [str(x) for x in tvm.target.codegen.llvm_get_cpu_archlist(tvm.target.Target(self.config))]
        return [*listed, *(x for x in _MORE.get(self.name, ()) if x not in listed)]

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
        """The command of a compiler that links for it; None where there is none."""
        if self.here:
            return next(([c] for c in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if shutil.which(c)), None)
        compiler = self.system.compiler.format(self.name)
        if compiler and shutil.which(compiler):
            return [compiler]
        if importlib.util.find_spec("ziglang"):
            # as for C: nothing of C++ is in what is linked, and ziglang would first compile that library, for minutes
            return [sys.executable, "-m", "ziglang", "cc", "-target", self.system.zig.format(self.name)]
        return None

    def missing_tools(self) -> list[str]:
        if self.linker():
            return []
        if self.here:
            return ["a C++ compiler: none of g++, clang++, c++ is on the PATH (Debian: apt-get install g++)"]
        compiler, package = self.system.compiler.format(self.name), self.system.package.format(self.name.replace("_", "-"))
        by_apt = f"{compiler} (Debian: apt-get install {package}) or " if compiler else ""
        return [f"a C++ compiler for {self}: {by_apt}pip install ziglang"]

    def link_options(self) -> dict[str, Any]:
        """Further arguments of export_library."""
        command = self.linker() or []
        options = [o for o in self.system.options if o != "-static" or "ziglang" not in command]  # it makes an archive of that
        if self.system.imports:
            options.append(str(self._runtime_file("apache-tvm-ffi", self.system.imports)))
        return {"options": options, "fcompile": _link(command)}

    # -- the runtime --------------------------------------------------------------------------------------------------------
    def runtime_files(self) -> list[Path]:
        """TVM's runtime for it: that of the packages installed here, or of the same versions of them for another machine,
        fetched once. Raises RuntimeMissing."""
        return [self._runtime_file(package, self.system.library) for package in RUNTIME]

    def _runtime_file(self, package: str, called: str) -> Path:
        """A file of the package that holds a library of the runtime, beside that; it is ``called`` so, {} being its name."""
        import tvm_ffi

        folder, name = RUNTIME[package]
        place = f"{folder}/lib/{called.format(name)}"
        if self.here:
            root = {"apache-tvm": tvm, "apache-tvm-ffi": tvm_ffi}[package].__file__
            return Path(root).parents[1] / place
        system = "" if self.system is LINUX else f"{self.system.name}-"
        return _fetched(package, place, self, _cache() / f"{system}{self.name}")


def _link(command: Sequence[str]) -> Callable[..., None]:
    def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None) -> None:
        with tempfile.TemporaryDirectory() as place:  # some write more than the library
            made = Path(place) / Path(output).name
            done = subprocess.run(
                [*command, "-shared", "-fPIC", "-o", str(made), *objects, *(options or ())], capture_output=True, text=True
            )
            if done.returncode:
                raise LinkError(f"{' '.join(command)} cannot link {output}: {done.stderr.strip()}")
            shutil.move(made, output)

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
        called = arch.system.called.get(arch.name, arch.name)
        systems = [f"--platform={tag.format(called)}" for tag in arch.system.wheels]
        done = subprocess.run([*pip, *systems, wanted], capture_output=True, text=True)
        wheels = list(Path(tmp).glob("*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.strip().rpartition("\n")[2]
            raise RuntimeMissing(
                f"TVM's runtime for {arch} is in {wanted} for that machine, which pip could not fetch ({said}); "
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


def machine() -> str:
    """This machine's architecture, as Linux calls it."""
    name = platform.machine()
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(name, name)


def arch_of(mcpu: str) -> Arch | None:
    """The architecture that has a processor of this name, under this machine's system; of several, this machine's."""
    found = (a for a in sorted(ARCHES.values(), key=lambda a: a.name != machine()) if mcpu in a.processors())
    return next((_under_this_system(a) for a in found), None)


def arch_here() -> Arch:
    """This machine's; one that nobody has described has no words for its instruction sets."""
    return _under_this_system(ARCHES.get(machine()) or Arch(machine(), {}))


def _under_this_system(arch: Arch) -> Arch:
    return replace(arch, system=SYSTEMS.get(sys.platform, LINUX))
