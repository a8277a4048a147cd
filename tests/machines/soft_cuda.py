"""A GPU in software: libcuda over host memory (soft_cuda.cc), and kernels' CUDA C++ compiled for the processor."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest
from wasat.backends.tvm import cuda
from wasat.runtime.hosts import cuda_driver
from wasat.runtime.hosts import open as opened

HERE = Path(__file__).parent
FATBIN = 0xBA55ED50
_KERNEL = r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\) \{'
AS_NEW = {
    "devices": 1, "major": 9, "minor": 0, "memory": 1 << 40, "threads": 1024, "shared": 49152, "backwards": 0, "status": 0,
    "refused": 0,
}  # fmt: skip
_HEADERS = ("cuda.h", "cuda_fp16.h", "cuda_bf16.h", "math_constants.h")


def need() -> None:
    """Skips the test where there is no compiler for the processor."""
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("the software GPU needs g++ on x86-64")


class SoftGPU:
    """The driver in this process. Settings: ``devices``, ``major``, ``minor``, ``memory`` (bytes), ``backwards`` (the order of
    a workgroup's threads), ``status`` (what cuInit returns), ``refused`` (graphs), a workgroup's ``threads`` and ``shared``."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        path = self.folder / "libcuda.so.1"
        how = ["g++", "-O2", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", path, HERE / "soft_cuda.cc", "-ldl"]
        subprocess.run(how, check=True)
        self.library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # found by its name from now on
        self.library.soft_get.restype = ctypes.c_long
        self.library.soft_complaint.restype = ctypes.c_char_p
        for name in _HEADERS:
            (self.folder / name).write_text("")
        self._known: set[bytes] = set()
        self.settings = {**AS_NEW, "devices": 0}

    def set(self, **settings: int) -> None:
        self.settings |= settings
        for name, value in settings.items():
            self.library.soft_set(name.encode(), ctypes.c_long(value))

    def count(self, name: str) -> int:
        return int(self.library.soft_get(name.encode()))

    def compiled(self, source: str) -> bytes:
        """Code that runs here."""
        code = no_machine_code(source, ["sm_90"])
        self.register(source, code)
        return code

    def register(self, source: str, code: bytes) -> None:
        """Code, and the source that it was made of: modules of it run."""
        if code in self._known:
            return
        self._known.add(code)
        library = self.folder / f"kernels{len(self._known)}.so"
        text = self.folder / f"kernels{len(self._known)}.cc"
        text.write_text(f'#include "{HERE / "soft_kernels.h"}"\n{_without_ptx(source)}\n{_calls(source)}')
        how = ["g++", "-O1", "-w", "-std=c++17", "-mf16c", "-fno-strict-aliasing", "-shared", "-fPIC", f"-I{self.folder}"]
        subprocess.run([*how, "-o", library, text], check=True)
        self.library.soft_register(code, str(library).encode())


def _without_ptx(source: str) -> str:
    """Instructions as calls: ``asm("a.b %1, {%0};" : "=r"(x) : "r"(y))`` is ``soft_a_b(y, x)``."""

    def call(found: re.Match[str]) -> str:
        values = re.findall(r'"[=+]?\w"\(((?:[^()]|\([^()]*\))*)\)', found[3])
        operands = re.sub(r"[{}\[\]]", "", found[2])
        return f"soft_{found[1].replace('.', '_')}({re.sub(r'%([0-9]+)', lambda m: values[int(m[1])], operands)});"

    source = re.sub(r'"\s*\n\s*"', "", source)  # the compiler joins them
    return re.sub(r'asm(?: volatile)?\("([\w.]+) ?([^;"]*);"(.*?)\);', call, source, flags=re.S)


def _calls(source: str) -> str:
    """For each kernel, a function that takes its arguments as the driver does, and its barriers, arrays and sizes."""
    found = []
    for name, given, body in re.findall(_KERNEL + r"(.*?)\n\}", source, re.S):
        types = [p.strip().rpartition(" ")[0].replace("__restrict__", "").strip() for p in given.split(",")]
        passed = ", ".join(f"*({t}*)p[{i}]" for i, t in enumerate(types))
        meets, arrays = int("__syncthreads" in body or "__shfl" in body), sum("*" in t for t in types)
        sizes = ", ".join(f"(int)sizeof({t})" for t in types)
        found.append(f'extern "C" void {name}__run(void** p) {{ {name}({passed}); }}\n')
        found.append(f'extern "C" const int {name}__about[] = {{{meets}, {arrays}, {len(types)}, {sizes}}};\n')
    return "".join(found)


@cache
def _soft() -> SoftGPU:
    return SoftGPU()


def no_machine_code(source: str, archs: Sequence[str]) -> bytes:
    """A fat binary with the kernels' names in it, and no code."""
    names = b"".join(f".text.{name}\0".encode() for name, _ in re.findall(_KERNEL, source))
    names += sha256(source.encode()).digest()
    entries = b"".join(struct.pack("<HHIQQII", 2, 0, 32, len(names), 0, 0, int(a[3:5])) + names for a in archs)
    return struct.pack("<IHHQ", FATBIN, 1, 16, len(entries)) + entries


@contextmanager
def soft_gpu(nvcc: bool = False, **settings: int) -> Iterator[SoftGPU]:
    """The software GPU as this machine's; what is compiled for cuda meanwhile runs on it. ``nvcc``: compiled by that, too."""
    need()
    gpu = _soft()
    before = dict(gpu.settings)
    gpu.set(**{**AS_NEW, **settings})
    _forget()
    fat_binary = cuda.fat_binary if nvcc else no_machine_code

    def registered(source: str, archs: Sequence[str]) -> bytes:
        code = fat_binary(source, archs)
        gpu.register(source, code)
        return code

    patch = pytest.MonkeyPatch()
    patch.setattr(cuda, "fat_binary", registered)
    if not nvcc:
        patch.setattr(cuda, "missing_tools", list)
    try:
        yield gpu
    finally:
        patch.undo()
        gpu.set(**before)
        gpu.library.soft_repair()
        _forget()


def _forget() -> None:
    """The driver and the device that the process has found."""
    cuda_driver.driver.cache_clear()
    for key in [k for k in opened._OPENED if k[0] == "cuda"]:
        del opened._OPENED[key]
