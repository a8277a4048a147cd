"""The compiled library and the TVM runtime that runs it: loaded without ``import tvm``, with threads set as we want them."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .artifact import LIBRARY, MANIFEST, runtime_library
from .errors import AGAIN, ArtifactError, InputError, RuntimeErrorBase
from .manifest import Manifest
from .values import integer

_CPU, _POOLED = 1, 2
_loaded: list[str] = []
"""Version of the TVM runtime that this module brought into the process: at most one."""
_drivers: dict[str, str] = {}
"""SHA-256 of the other libraries that artifacts brought, by name."""


def check_ffi(manifest: Manifest) -> None:
    """Raises ArtifactError unless the tvm_ffi package here is the one that the library was made with."""
    try:
        found = version("apache-tvm-ffi")
    except PackageNotFoundError:
        found = None
    if found != manifest.tvm_ffi:
        raise ArtifactError(
            f"the artifact needs apache-tvm-ffi {manifest.tvm_ffi}, "
            + (f"here is {found}" if found else "which is not installed")
            + f": pip install apache-tvm-ffi=={manifest.tvm_ffi}, or {AGAIN}"
        )


class Library:
    """The functions of an artifact, with the runtime and its threads set up.

    ``threads``: how many compute; default: ``TVM_NUM_THREADS`` where it is set, else the CPUs that this process may use.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        import tvm_ffi

        _set_threads(threads)
        _load_runtime(folder / runtime_library(manifest.target.os), manifest.tvm)
        _check_threads(threads)
        for name in manifest.target.libraries:
            _load_driver(folder / name, manifest.files[name].sha256, manifest.target.device)
        # the system takes a path it has loaded for the library it has: an artifact compiled anew needs a path of its own
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:  # Windows removes nothing that is loaded
            link = Path(place) / LIBRARY
            try:
                link.symlink_to((folder / LIBRARY).resolve())
            except OSError:  # nor does it let everybody make links
                shutil.copyfile(folder / LIBRARY, link)
            try:
                self._vm = tvm_ffi.load_module(str(link))["vm_load_executable"]()
            except (RuntimeError, AttributeError) as e:
                raise ArtifactError(f"{folder / LIBRARY} cannot be loaded ({e}); {AGAIN}") from None
        tvm_ffi.register_global_func("wasat.outside", _outside, override=True)
        tvm_ffi.register_global_func("wasat.equal", _equal, override=True)
        self._vm["vm_initialization"](_CPU, 0, _POOLED)
        self._lock = threading.Lock()

    def function(self, entry: str) -> Callable[..., Any]:
        """Calls ``entry`` with tensors; returns its outputs, and after them what it likes. One call at a time: its machine
        has one stack."""
        call, lock = self._vm["".join(c if c.isalnum() or c == "_" else "_" for c in entry)], self._lock

        def locked(*args: Any) -> Any:
            with lock:
                try:
                    return call(*args)
                except IndexError as e:
                    raise InputError(str(e)) from None
                except (RuntimeError, ValueError, TypeError) as e:  # what callers give was held against the manifest
                    if not any(mark in str(e) for mark in _SIGNATURE):
                        raise
                    raise ArtifactError(f"{LIBRARY} does not take what {MANIFEST} says of {entry}: {e}; {AGAIN}") from None

        return locked


_SIGNATURE = ("Invoking function", "ErrorContext(fn=")
"""How TVM says that arguments are not those of the function: their number, a rank, a size, an element type."""


def _outside(where: str, index: int, low: int, high: int) -> None:
    """What the library calls for an index that is outside its axis, before anything is read there."""
    raise IndexError(f"{where}: index {index} is outside {low} .. {high - 1}")


def _equal(where: str, needs: str, left: int, right: int) -> None:
    """What the library calls for sizes that a branch needs to be equal, where that is taken."""
    if left != right:
        raise IndexError(f"{where}: needs {needs}, and these are {left} and {right}")


def _set_threads(threads: int | None) -> None:
    threads = None if threads is None else integer("threads", threads, 1, 4096)
    if threads is not None or "TVM_NUM_THREADS" not in os.environ:
        os.environ["TVM_NUM_THREADS"] = str(threads or cpu_count())
    # else the first launch pins the calling thread to core 0, and everything that Python starts from it
    os.environ.setdefault("TVM_BIND_THREADS", "0")


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_threads(threads: int | None) -> None:
    """TVM's pool, once started, keeps its size."""
    import tvm_ffi

    running, wanted = int(tvm_ffi.get_global_func("runtime.NumThreads")()), os.environ["TVM_NUM_THREADS"]
    if str(running) == wanted:
        return
    message = (
        f"TVM already runs with {running} threads in this process and cannot change to {wanted}; "
        "set TVM_NUM_THREADS before its first use, or load the artifact in a process of its own"
    )
    if threads is not None:
        raise RuntimeErrorBase(message)
    warnings.warn(message, stacklevel=4)


def _load_runtime(path: Path, wanted: str) -> None:
    """The artifact's own copy of the TVM runtime, unless the process has one: two would fight over global names."""
    import tvm_ffi

    if tvm_ffi.get_global_func("runtime.NumThreads", allow_missing=True) is None:
        ctypes.CDLL(str(path.resolve()), ctypes.RTLD_GLOBAL)
        _loaded.append(wanted)
        return
    present = _loaded[0] if _loaded else getattr(sys.modules.get("tvm"), "__version__", wanted)
    if _release(present) != _release(wanted):
        raise ArtifactError(
            f"this process already runs TVM {present} and the artifact needs {wanted}: load it in a process of its own"
        )


def _load_driver(path: Path, sha256: str, device: str) -> None:
    """A library that the program calls. All see its functions, so that there can be one of a name in a process."""
    if _drivers.get(path.name, sha256) != sha256:
        raise ArtifactError(
            f"this process already runs another {path.name}, of another artifact: load this one in a process of its own"
        )
    if path.name not in _drivers:
        try:
            ctypes.CDLL(str(path.resolve()), ctypes.RTLD_GLOBAL)
        except OSError as e:
            raise ArtifactError(
                f"the artifact is compiled for the device {device}, and {path.name} of it cannot be loaded here: {e}"
            ) from None
        _drivers[path.name] = sha256


def _release(v: str) -> str:
    """``0.27.0.post1`` and the ``0.27.0`` that the library calls itself are one release."""
    return v.split(".post")[0]
