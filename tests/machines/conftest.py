"""The kernel tests again, as code for NEON under an emulator: `make test-machines`."""
from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from numpy.typing import NDArray

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "backends"))
import kernel_help
from wasat.backends.tvm.cpu import tir_pipeline

EMULATED = ("test_neon", "test_aarch64")
COMPILER = "aarch64-linux-gnu-gcc"
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}


def _missing() -> list[str]:
    """Debian's names of what is not installed."""
    packages = [] if shutil.which("qemu-aarch64") else ["qemu-user"]
    if not shutil.which(COMPILER) or not shutil.which("aarch64-linux-gnu-g++"):
        return [*packages, "g++-aarch64-linux-gnu", "libc6-dev-arm64-cross"]
    found = subprocess.run([COMPILER, "-print-file-name=libc.a"], capture_output=True, text=True).stdout.strip()
    return packages if Path(found).is_absolute() else [*packages, "libc6-dev-arm64-cross"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    emulated = [item for item in items if HERE in item.path.parents and item.path.stem in EMULATED]
    missing = _missing() if emulated else []
    for item in emulated:
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)} (packages of Debian)"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadgroup``: what a file makes once for its tests, a browser with its models among it, is made in one process.
    Files with such fixtures go first, each whole; the other tests are spread one by one. (By file, not by marks: xdist 3.8
    writes groups into node ids, where pytest 9.2 does not read them.)"""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if _shares(config.rootpath / nodeid.partition("::")[0]) else nodeid

    return ByFile(config, log)


@cache
def _shares(path: Path) -> bool:
    """Whether the tests of a file share what its fixtures make."""
    return 'scope="module"' in path.read_text(encoding="utf-8")


def _object(module: Any) -> Any:
    return module if module.kind == "llvm" else next(_object(m) for m in module.imports)


class Emulated:
    """A kernel as a program for another machine, called as compiled kernels are."""

    def __init__(self, func: tvm.tirx.PrimFunc, isa: Any, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        module = tvm.tirx.build(
            tvm.IRModule({"main": func}), target=kernel_help.target_of(isa), pipeline=tir_pipeline.register()
        )
        _object(module).write_to_file(str(folder / "kernel.o"), "o")
        root = Path(tvm_ffi.__file__).parent
        subprocess.run(
            [COMPILER, "-O1", "-static", f"-I{root}/include", f"-I{root}/3rdparty/dlpack/include",
             str(HERE / "runtime.c"), str(folder / "kernel.o"), "-lm", "-o", str(folder / "kernel")], check=True)  # fmt: skip

    def __call__(self, *tensors: Any) -> None:
        arrays: list[NDArray[Any]] = [np.from_dlpack(t) for t in tensors]
        files = [self.folder / str(i) for i in range(len(arrays))]
        for file, x in zip(files, arrays):
            head = struct.pack("3i", CODES[x.dtype.kind], x.itemsize * 8, x.ndim)
            file.write_bytes(head + np.array(x.shape, np.int64).tobytes() + x.tobytes())
        subprocess.run(["qemu-aarch64", str(self.folder / "kernel"), *map(str, files)], check=True, timeout=300)
        for file, x in zip(files, arrays):
            x[...] = np.frombuffer(file.read_bytes(), x.dtype).reshape(x.shape)


@pytest.fixture
def emulated(tmp_path: Path) -> Callable[..., Emulated]:
    """What the tests' own `build` is meanwhile: a program for the emulator."""
    made = iter(range(1000))

    def build(func: tvm.tirx.PrimFunc, isa: Any) -> Emulated:
        return Emulated(func, isa, tmp_path / f"kernel{next(made)}")

    return build
