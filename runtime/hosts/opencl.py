"""OpenCL through the package pyopencl: GPUs by their makers' drivers, processors by PoCL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import ArtifactError
from .machine import SMALLER, Choice, Command, Move, Piece
from .plan import KernelSpec


@lru_cache(1)
def _devices() -> Any:
    """The system's devices; a text: why there is none."""
    try:
        import pyopencl as cl
    except (ImportError, OSError) as e:
        return f"the package pyopencl ({e}): pip install 'wasat[opencl]'"
    try:
        found = [d for p in cl.get_platforms() for d in p.get_devices()]
    except cl.Error:
        found = []
    return found or (
        "a driver for OpenCL: install a GPU's, or, to compute on the processor, PoCL (pip install pocl-binary-distribution)"
    )


def no_opencl() -> str | None:
    """What this machine lacks to run kernels through OpenCL, and how to get it; None: nothing."""
    found = _devices()
    return found if isinstance(found, str) else None


def open_opencl(needs: dict[str, Any]) -> OpenCL:
    """The system's first GPU, else its first device. Raises ArtifactError for what is missing."""
    devices = _devices()
    if isinstance(devices, str):
        raise ArtifactError(f"the artifact is compiled for opencl and needs {devices}")
    import pyopencl as cl

    device = next((d for d in devices if d.type & cl.device_type.GPU), devices[0])
    for need, has, what in (("threads", device.max_work_group_size, "threads"), ("shared", device.local_mem_size, "bytes")):
        if has < needs[need]:
            raise ArtifactError(f"{device.name} has {has} {what} for a workgroup; the artifact needs {needs[need]}")
    return OpenCL(cl, device)


class OpenCL:
    """An opened device."""

    def __init__(self, cl: Any, device: Any) -> None:
        self._cl, self.device, self.name = cl, device, str(device.name)
        self.alignment = max(int(device.mem_base_addr_align) // 8, 4)
        self._largest = int(device.max_mem_alloc_size)
        self._context = cl.Context([device])
        self._queue = cl.CommandQueue(self._context)

    # -- memory ----------------------------------------------------------------------------------------------------------
    def allocate(self, nbytes: int) -> Piece:
        if nbytes > self._largest:
            raise MemoryError(f"{self.name} has at most {self._largest} bytes in one array, and one of {nbytes} is asked for")
        try:
            memory = self._cl.Buffer(self._context, self._cl.mem_flags.READ_WRITE, nbytes)
            # drivers take memory when it is first used
            self._cl.enqueue_fill_buffer(self._queue, memory, np.zeros(1, np.uint32), 0, nbytes)
        except self._cl.MemoryError as e:
            raise MemoryError(f"{self.name} has no {nbytes} bytes free ({e}): {SMALLER}") from None
        return Piece(memory, 0, nbytes)

    def write(self, to: Piece, data: np.ndarray) -> None:
        self._cl.enqueue_copy(self._queue, to.memory, data, dst_offset=to.at, is_blocking=True)

    def read(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        return self.run([], pieces)

    def copy(self, source: Piece, to: Piece) -> None:
        self._move(Move(source, to, to.nbytes))

    def _move(self, m: Move) -> None:
        cl = self._cl
        cl.enqueue_copy(
            self._queue, m.to.memory, m.source.memory, src_offset=m.source.at, dst_offset=m.to.at, byte_count=m.nbytes
        )

    # -- kernels ---------------------------------------------------------------------------------------------------------
    def kernel(self, spec: KernelSpec) -> Any:
        try:
            return self._cl.Program(self._context, spec.source).build()
        except self._cl.Error as e:
            raise ArtifactError(f"{self.name} does not take the kernel {spec.name}: {e}") from None

    def record(self, commands: list[Command]) -> list[Any]:
        """Kernels with their arguments."""
        found: list[Any] = []
        for c in commands:
            if isinstance(c, Choice):
                found.append((c.condition, self.record(c.then), self.record(c.otherwise)))
            elif isinstance(c, Move):
                found.append(c)
            else:
                kernel = self._cl.Kernel(c.kernel, c.spec.name)
                numbers = [np.dtype(t).type(n) for n, t in zip(c.scalars, c.spec.scalars)]
                held = [self._part(p) for p in c.pieces]  # a kernel keeps no reference to what it is given
                kernel.set_args(*held, *numbers)
                found.append((kernel, [g * t for g, t in zip(c.grid, c.spec.threads)], list(c.spec.threads), held))
        return found

    def _part(self, p: Piece) -> Any:
        return p.memory if not p.at else p.memory.get_sub_region(p.at, p.nbytes)

    def run(self, recorded: Any, results: Sequence[Piece]) -> list[np.ndarray]:
        self._enqueue(recorded)
        found = [np.empty(p.nbytes, np.uint8) for p in results]
        for x, p in zip(found, results):
            if x.size:
                self._cl.enqueue_copy(self._queue, x, p.memory, src_offset=p.at, is_blocking=False)
        self._queue.finish()
        return found

    def _enqueue(self, recorded: Sequence[Any]) -> None:
        for c in recorded:
            if isinstance(c, Move):
                self._move(c)
            elif isinstance(c[0], Piece):
                self._enqueue(c[1] if self.read([c[0]])[0].any() else c[2])
            else:
                self._cl.enqueue_nd_range_kernel(self._queue, c[0], c[1], c[2])
