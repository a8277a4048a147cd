"""CUDA without a GPU: NVIDIA's compiler as its packages install it, and machine code for the architectures asked for."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import tvm
import tvm_ffi
from wasat.ir import IRError, WasatError

_CALLBACK = "tvm_callback_cuda_compile"
_RUNTIME = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
_CUDART = "libcudart.so.13"
_STUB = """
#define NONE(name) int name(void) { return 100; }  /* CUDA_ERROR_NO_DEVICE */
NONE(cuInit) NONE(cuDeviceGetCount) NONE(cuDeviceGetAttribute) NONE(cuDeviceGetName) NONE(cuFuncSetAttribute)
NONE(cuLaunchKernelEx) NONE(cuModuleGetFunction) NONE(cuModuleLoadData) NONE(cuModuleUnload) NONE(cuTensorMapEncodeTiled)
int cuGetErrorName(int e, const char** text) { *text = "CUDA_ERROR_NO_DEVICE"; return 0; }
int cuGetErrorString(int e, const char** text) { *text = "there is no driver on this machine"; return 0; }
"""
"""What TVM's CUDA runtime calls of the driver. Without the runtime TVM would keep source code, to be compiled later."""


class CudaError(WasatError):
    """The CUDA compiler refuses."""


def architectures(detail: str) -> list[str]:
    """The architectures in ``sm_80,sm_90a``, oldest first. Raises IRError for what is none."""
    found = [a.strip() for a in detail.split(",")]
    for a in found:
        number = a.removeprefix("sm_").rstrip("af")
        if not a.startswith("sm_") or not number.isdecimal() or int(number) < 75 or len(a) - len(number) > 4:
            raise IRError(f"there is no GPU architecture {a!r} for CUDA 13: write sm_80, sm_90a or, for several, sm_80,sm_90a")
    return sorted(dict.fromkeys(found), key=lambda a: (int(a[3:].rstrip("af")), a))


def toolkit() -> Path | None:
    """The folder of CUDA's compiler: of NVIDIA's package, of ``CUDA_HOME``, or that of an nvcc on the PATH; None if it is not
    installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) / "cu13" for p in (spec.submodule_search_locations if spec else None) or ()]
    roots += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if nvcc := shutil.which("nvcc"):
        roots.append(Path(nvcc).resolve().parents[1])
    return next((r for r in roots if (r / "bin" / "nvcc").exists()), None)


def missing_tools() -> list[str]:
    if toolkit() is not None:
        return []
    return ["CUDA's compiler nvcc: pip install 'wasat[cuda]', or set CUDA_HOME to the folder of a CUDA 13"]


def libraries() -> tuple[Path, ...]:
    """CUDA's and TVM's runtime, in the order in which they are loaded."""
    root = toolkit()
    if root is None:
        return ()
    return next((root / lib / _CUDART for lib in ("lib", "lib64") if (root / lib / _CUDART).exists()), Path(_CUDART)), _RUNTIME


@contextlib.contextmanager
def machine_code(archs: Sequence[str]) -> Iterator[None]:
    """Inside, TVM compiles what it generates for CUDA into machine code for ``archs``; where there is no compiler, it keeps
    source code."""
    if toolkit() is None:
        yield
        return
    _load_runtime()
    before, refused = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True), list[CudaError]()

    def compiled(code: str) -> bytes:
        try:
            return fat_binary(code, archs)
        except CudaError as e:  # on its way through TVM it would lose its kind
            refused.append(e)
            raise

    tvm_ffi.register_global_func(_CALLBACK, compiled, override=True)
    try:
        yield
    except Exception:
        if refused:
            raise refused[0] from None
        raise
    finally:
        if before is not None:
            tvm_ffi.register_global_func(_CALLBACK, before, override=True)


def fat_binary(code: str, archs: Sequence[str]) -> bytes:
    """CUDA C++ as machine code for each of ``archs``, and nothing that a driver would have to compile."""
    root = toolkit()
    assert root is not None
    with tempfile.TemporaryDirectory() as tmp:
        source, out = Path(tmp) / "kernels.cu", Path(tmp) / "kernels.fatbin"
        source.write_text(code, encoding="utf-8")
        each = [x for a in archs for x in ("-gencode", f"arch=compute_{a[3:]},code={a}")]
        halves = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS", "BFLOAT162_OPERATORS",
                  "BFLOAT162_CONVERSIONS")  # fmt: skip
        options = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", *(f"-U__CUDA_NO_{name}__" for name in halves)]
        done = subprocess.run(
            [root / "bin" / "nvcc", "--fatbin", *options, *each, "-o", out, source], capture_output=True, text=True
        )
        if done.returncode:
            raise CudaError(f"{root / 'bin' / 'nvcc'} refuses the code for {', '.join(archs)}: {done.stderr.strip()[-2000:]}")
        return out.read_bytes()


@cache
def _load_runtime() -> None:
    """TVM's CUDA runtime, which is linked to the driver: where there is none, to something that has its functions."""
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError:
        with tempfile.TemporaryDirectory() as tmp:
            source, stub = Path(tmp) / "stub.c", Path(tmp) / "libcuda.so.1"
            source.write_text(_STUB)
            compiler = next((c for c in ("gcc", "clang", "cc", "g++") if shutil.which(c)), "cc")
            how = [compiler, "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{stub.name}", "-o", str(stub), str(source)]
            subprocess.run(how, check=True)
            ctypes.CDLL(str(stub), ctypes.RTLD_GLOBAL)
    for path in libraries():
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
