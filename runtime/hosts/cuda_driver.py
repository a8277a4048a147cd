"""The driver of NVIDIA's GPUs, libcuda, called without a package between: the few functions that launch plans need.

Names, types and numbers are those of CUDA 12's and 13's ``cuda.h``, whose functions keep their binary form.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from functools import lru_cache
from typing import Any

from ..errors import RuntimeErrorBase

LIBRARY = "libcuda.so.1"
OUT_OF_MEMORY, NO_BINARY, NOT_FOUND = 2, 209, 500
MAX_THREADS, MAX_SHARED, MAJOR, MINOR = 1, 8, 75, 76
"""Numbers of attributes of a device."""

_OUT = c_void_p
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,), "cuDriverGetVersion": (_OUT,), "cuDeviceGetCount": (_OUT,), "cuDeviceGet": (_OUT, c_int),
    "cuDeviceGetName": (_OUT, c_int, c_int), "cuDeviceGetAttribute": (_OUT, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, c_int), "cuCtxSetCurrent": (c_void_p,), "cuMemGetInfo_v2": (_OUT, _OUT),
    "cuStreamCreate": (_OUT, c_uint), "cuStreamSynchronize": (c_void_p,),
    "cuMemAlloc_v2": (_OUT, c_size_t), "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (_OUT, c_size_t, c_uint), "cuMemFreeHost": (c_void_p,),
    "cuMemsetD32Async": (c_uint64, c_uint, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuModuleLoadData": (_OUT, c_void_p), "cuModuleUnload": (c_void_p,), "cuModuleGetFunction": (_OUT, c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p),
    "cuStreamBeginCapture_v2": (c_void_p, c_int), "cuStreamEndCapture": (c_void_p, _OUT),
    "cuGraphInstantiateWithFlags": (_OUT, c_void_p, c_ulonglong), "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,), "cuGraphDestroy": (c_void_p,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)), "cuGetErrorString": (c_int, POINTER(c_char_p)),
}  # fmt: skip
_QUIET = ("cuMemFree_v2", "cuMemFreeHost", "cuModuleUnload", "cuGraphExecDestroy", "cuGraphDestroy")
"""What gives back: after an error on the device all of these report it again, which helps nobody."""


class CudaError(RuntimeErrorBase):
    """The driver refuses; ``code`` is its number."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Driver:
    """The library, opened."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._known: dict[str, Any] = {}

    def _function(self, name: str) -> Any:
        if name not in self._known:
            try:
                f = getattr(self._library, name)
            except AttributeError:
                raise CudaError(NOT_FOUND, f"{LIBRARY} has no {name}: install a driver for CUDA 12 or later") from None
            f.argtypes, f.restype = _FUNCTIONS[name], c_int
            self._known[name] = f
        return self._known[name]

    def call(self, name: str, *args: Any) -> None:
        """Calls a function. Raises CudaError for what it returns, unless it gives something back."""
        code = self._function(name)(*args)
        if code and name not in _QUIET:
            raise CudaError(code, self._said(name, code))

    def _said(self, name: str, code: int) -> str:
        texts = []
        for of in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            self._function(of)(code, byref(text))
            texts.append((text.value or b"unknown").decode())
        return f"{name} failed: {texts[1]} ({texts[0]}, {code})"

    def handle(self, name: str, *args: Any) -> c_void_p:
        """What a function writes where its first argument points."""
        found = c_void_p()
        self.call(name, byref(found), *args)
        return found

    def number(self, name: str, *args: Any) -> int:
        """The same, of numbers."""
        found = c_int()
        self.call(name, byref(found), *args)
        return found.value


@lru_cache(1)
def driver() -> Driver | str:
    """The driver, ready for calls; a text: why there is none."""
    try:
        found = Driver(ctypes.CDLL(LIBRARY))
    except OSError:
        return f"its driver ({LIBRARY}) is not installed here"
    try:
        found.call("cuInit", 0)
        return found if found.number("cuDeviceGetCount") else "the driver here finds none"
    except CudaError as e:
        return f"the driver here finds none ({e})"
