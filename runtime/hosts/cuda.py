"""CUDA through the driver alone: memory, kernels as machine code, and, for what is run again, graphs of launches."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary, finalize

import numpy as np

from ..errors import AGAIN, ArtifactError, InputError, RuntimeErrorBase
from .cuda_driver import MAJOR, MAX_SHARED, MAX_THREADS, MINOR, NO_BINARY, NOT_FOUND, OUT_OF_MEMORY, CudaError, Driver, driver
from .machine import SMALLER, Choice, Command, Dispatch, Move, Piece
from .plan import KernelSpec

_MOST = (2**31 - 1, 65535, 65535)
"""Workgroups along each axis."""
_SMALL = 1 << 16
"""Bytes up to which what is written is kept until the device has it; for more, the host waits."""
_NON_BLOCKING = 1
_RELAXED = 2
"""While a graph is drawn, memory may be given back: nobody knows when Python does that."""
_BROKEN = range(700, 720)
"""Errors after which a context answers nothing else."""


def no_cuda(archs: str | None) -> str | None:
    """What this machine lacks to run code for ``archs``, and how to get it; None: nothing. The first GPU is the one that is
    used."""
    of = f" of the architecture {archs.replace(',', ' or ')}" if archs else ""
    found = driver()
    if isinstance(found, str):
        return f"an NVIDIA GPU{of}: {found}"
    major, minor = (found.number("cuDeviceGetAttribute", a, 0) for a in (MAJOR, MINOR))
    if archs and not any(runs_on(a, major, minor) for a in archs.split(",")):
        return f"an NVIDIA GPU{of}: the one here is sm_{major}{minor}"
    return None


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether machine code for ``arch`` runs on a GPU of this compute capability: on those of the same major number from its
    minor one on, and code of an ``sm_90a`` on no other."""
    number = arch.removeprefix("sm_")
    if number.endswith("a"):
        return number == f"{major}{minor}a"
    exact = number.rstrip("f")
    return exact.isdecimal() and int(exact) // 10 == major and int(exact) % 10 <= minor


def open_cuda(needs: dict[str, Any]) -> Cuda:
    """The system's first GPU. Raises ArtifactError for what is missing."""
    found = driver()
    if isinstance(found, str):
        raise ArtifactError(f"the artifact is compiled for cuda and needs an NVIDIA GPU: {found}")
    machine = Cuda(found)
    for need, attribute, what in (("threads", MAX_THREADS, "threads"), ("shared", MAX_SHARED, "bytes")):
        if (has := found.number("cuDeviceGetAttribute", attribute, machine.device)) < needs[need]:
            raise ArtifactError(f"{machine.name} has {has} {what} for a workgroup; the artifact needs {needs[need]}")
    return machine


class _Held:
    """Something of the driver's, given back when nothing refers to it."""

    def __init__(self, machine: Cuda, value: Any, give_back: str) -> None:
        self.value = value
        finalize(self, machine.give_back, give_back, value).atexit = False  # the driver frees what a process leaves


class _Function(_Held):
    """A kernel; ``module``: the code that it is in."""

    def __init__(self, value: Any, module: _Held) -> None:
        self.value, self.module = value, module


@dataclass
class _Launch:
    """A kernel's arguments, as the driver takes them."""

    function: Any
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    arguments: Any
    held: tuple[Any, ...]
    """What the addresses among them point to."""


@dataclass
class _Stretch:
    """Launches and copies without a choice between them: sent one by one the first time, as one graph after that."""

    commands: list[_Launch | Move] = field(default_factory=list)
    runs: int = 0
    graph: _Held | None = None


class Cuda:
    """An opened device. Its context is the one that other libraries of the process use, too; its stream is its own."""

    alignment = 16
    """As vectors of a kernel may be read; memory begins at multiples of 256."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self._call = driver, driver.call
        self.device = driver.number("cuDeviceGet", 0)
        text = ctypes.create_string_buffer(128)
        driver.call("cuDeviceGetName", text, len(text), self.device)
        self.name = text.value.decode()
        self._context = driver.handle("cuDevicePrimaryCtxRetain", self.device)
        self._current()
        self._stream = driver.handle("cuStreamCreate", _NON_BLOCKING)
        self._modules: WeakValueDictionary[bytes, _Held] = WeakValueDictionary()
        self._staging: _Held | None = None
        self._room = 0
        self._sent: list[np.ndarray] = []
        """What the device has perhaps not read yet."""
        self._lock = threading.RLock()
        """One stream serves all threads."""

    def _current(self) -> None:
        """Calls of a thread go to the context that it set last."""
        self._call("cuCtxSetCurrent", self._context)

    def give_back(self, function: str, value: Any) -> None:
        """Calls what frees something, on whatever thread that comes up."""
        with contextlib.suppress(CudaError):
            self._current()
            self._call(function, value)

    def _wait(self) -> None:
        self._call("cuStreamSynchronize", self._stream)
        self._sent.clear()

    # -- memory ----------------------------------------------------------------------------------------------------------
    def allocate(self, nbytes: int) -> Piece:
        self._current()
        memory = ctypes.c_uint64()
        try:
            self._call("cuMemAlloc_v2", ctypes.byref(memory), max(nbytes, 4))
        except CudaError as e:
            if e.code != OUT_OF_MEMORY:
                raise
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
            raise MemoryError(
                f"{self.name} has {free.value} of its {total.value} bytes free, and {nbytes} are asked for: "
                + SMALLER
            ) from None
        held = _Held(self, memory, "cuMemFree_v2")
        with self._lock:
            self._call("cuMemsetD32Async", memory, 0, max(nbytes, 4) // 4, self._stream)
        return Piece(held, 0, nbytes)

    def write(self, to: Piece, data: np.ndarray) -> None:
        self._current()
        data = np.ascontiguousarray(data) if data.nbytes > _SMALL else np.array(data, order="C")
        with self._lock:
            self._call("cuMemcpyHtoDAsync_v2", _address(to), data.ctypes.data, data.nbytes, self._stream)
            self._sent.append(data)
            if data.nbytes > _SMALL:
                self._wait()

    def read(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        return self.run([], pieces)

    def copy(self, source: Piece, to: Piece) -> None:
        self._current()
        with self._lock:
            self._send(Move(source, to, to.nbytes))

    # -- kernels ---------------------------------------------------------------------------------------------------------
    def kernel(self, spec: KernelSpec) -> _Function:
        self._current()
        code = spec.code
        module = self._modules.get(code)
        if module is None:
            try:
                module = _Held(self, self._driver.handle("cuModuleLoadData", code), "cuModuleUnload")
            except CudaError as e:
                why = "holds no machine code for it" if e.code == NO_BINARY else f"is refused: {e}"
                raise ArtifactError(f"{self.name} cannot run the artifact's kernels, whose file {why}; {AGAIN}") from None
            self._modules[code] = module
        try:
            return _Function(self._driver.handle("cuModuleGetFunction", module.value, spec.name.encode()), module)
        except CudaError as e:
            why = "it is not in the file of kernels" if e.code == NOT_FOUND else str(e)
            raise ArtifactError(f"{self.name} does not take the kernel {spec.name}: {why}; {AGAIN}") from None

    def record(self, commands: list[Command]) -> list[Any]:
        """Stretches of launches and copies, and choices between them."""
        found: list[Any] = []
        for c in commands:
            if isinstance(c, Choice):
                found.append((c.condition, self.record(c.then), self.record(c.otherwise)))
                continue
            if not found or not isinstance(found[-1], _Stretch):
                found.append(_Stretch())
            found[-1].commands.append(c if isinstance(c, Move) else _launch(c))
        return found

    def run(self, recorded: Any, results: Sequence[Piece]) -> list[np.ndarray]:
        self._current()
        with self._lock:
            try:
                for c in recorded:
                    self._go(c)
                return self._results(results)
            except CudaError as e:
                end = ", and this process cannot use it any more" if e.code in _BROKEN else ""
                raise RuntimeErrorBase(f"{self.name} failed{end}: {e}") from None

    def _go(self, c: Any) -> None:
        if isinstance(c, _Stretch):
            self._stretch(c)
            return
        condition, then, otherwise = c
        for inner in then if self._results([condition])[0].any() else otherwise:
            self._go(inner)

    def _stretch(self, s: _Stretch) -> None:
        s.runs += 1
        if s.runs == 2:
            s.graph = self._graph(s.commands)
        if s.graph is not None:
            self._call("cuGraphLaunch", s.graph.value, self._stream)
            return
        for c in s.commands:
            self._send(c)

    def _graph(self, commands: Sequence[_Launch | Move]) -> _Held:
        """What sending them to the stream would do, as one thing to launch."""
        drawn = ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, _RELAXED)
        try:
            for c in commands:
                self._send(c)
        finally:  # a stream left in this state would take no more work
            self._call("cuStreamEndCapture", self._stream, ctypes.byref(drawn))
        graph = _Held(self, drawn, "cuGraphDestroy")
        return _Held(self, self._driver.handle("cuGraphInstantiateWithFlags", graph.value, 0), "cuGraphExecDestroy")

    def _send(self, c: _Launch | Move) -> None:
        if isinstance(c, Move):
            self._call("cuMemcpyDtoDAsync_v2", _address(c.to), _address(c.source), c.nbytes, self._stream)
        else:
            self._call("cuLaunchKernel", c.function.value, *c.grid, *c.threads, 0, self._stream, c.arguments, None)

    def _results(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """What pieces hold, when all that was sent is done, through memory that the device writes by itself."""
        total = sum(p.nbytes for p in pieces)
        if total > self._room:
            room = max(total, _SMALL)
            self._staging = _Held(self, self._driver.handle("cuMemHostAlloc", room, 0), "cuMemFreeHost")
            self._room = room  # not before it is there: what was refused once would be written past the end of what is
        at = 0
        for p in pieces:
            if p.nbytes:
                assert self._staging is not None
                self._call("cuMemcpyDtoHAsync_v2", self._staging.value.value + at, _address(p), p.nbytes, self._stream)
            at += p.nbytes
        self._wait()
        if self._staging is None or not total:
            return [np.zeros(0, np.uint8) for _ in pieces]
        staged = np.empty(total, np.uint8)
        ctypes.memmove(staged.ctypes.data, self._staging.value.value, total)
        return np.split(staged, np.cumsum([p.nbytes for p in pieces])[:-1])


def _address(p: Piece) -> int:
    return int(p.memory.value.value) + p.at


_NUMBERS = {
    "int64": ctypes.c_int64, "uint64": ctypes.c_uint64, "int32": ctypes.c_int32, "uint32": ctypes.c_uint32,
    "int16": ctypes.c_int16, "uint16": ctypes.c_uint16, "int8": ctypes.c_int8, "uint8": ctypes.c_uint8,
}  # fmt: skip


def _launch(c: Dispatch) -> _Launch:
    for n, most in zip(c.grid, _MOST):
        if n > most:
            raise InputError(f"{c.spec.name} has {c.grid} workgroups, which this device cannot count: give it less at a time")
    values: list[Any] = [ctypes.c_uint64(_address(p)) for p in c.pieces]
    values += [_NUMBERS[t](n) for n, t in zip(c.scalars, c.spec.scalars, strict=True)]
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    return _Launch(c.kernel, c.grid, c.spec.threads, arguments, (values, *(p.memory for p in c.pieces)))
