"""WebGPU through the package wgpu: Vulkan, Metal or Direct3D 12 below it, whichever the system has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import ArtifactError, InputError
from .machine import SMALLER, Choice, Command, Dispatch, Move, Piece
from .plan import KernelSpec

_SPREAD = 65535
"""Workgroups along one axis: more are spread over the third one, which the kernels know."""


@lru_cache(1)
def _adapter() -> Any:
    """The system's GPU, or what stands in for one; a text: why there is none."""
    try:
        import wgpu
    except (ImportError, OSError) as e:
        return f"the package wgpu ({e}): pip install 'wasat[webgpu]'"
    try:
        return wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    except RuntimeError as e:
        said = str(e).strip().splitlines()[0]
        return (
            f"a driver that WebGPU can use ({said}): install a GPU's for Vulkan, or, to compute on the processor, Debian's "
            "mesa-vulkan-drivers"
        )


def no_webgpu() -> str | None:
    """What this machine lacks to run kernels through WebGPU, and how to get it; None: nothing."""
    found = _adapter()
    return found if isinstance(found, str) else None


def open_webgpu(needs: dict[str, Any]) -> WebGPU:
    """The system's GPU. Raises ArtifactError for what is missing."""
    adapter = _adapter()
    if isinstance(adapter, str):
        raise ArtifactError(f"the artifact is compiled for webgpu and needs {adapter}")
    if needs["f16"] and "shader-f16" not in adapter.features:
        raise ArtifactError(
            f"{adapter.info['device']} lacks f16 (shader-f16), which the artifact uses: compile with the target webgpu"
        )
    limits = adapter.limits
    wanted = {
        "max-storage-buffers-per-shader-stage": ("buffers", "arrays of a kernel"),
        "max-compute-invocations-per-workgroup": ("threads", "threads of a workgroup"),
        "max-compute-workgroup-storage-size": ("shared", "bytes of a workgroup"),
    }
    for limit, (need, what) in wanted.items():
        if limits[limit] < needs[need]:
            raise ArtifactError(f"{adapter.info['device']} has {limits[limit]} {what}; the artifact needs {needs[need]}")
    names = [*wanted, "max-storage-buffer-binding-size", "max-buffer-size", "max-compute-workgroup-size-x"]
    device = adapter.request_device_sync(
        required_features=["shader-f16"] if needs["f16"] else [], required_limits={n: limits[n] for n in names}
    )
    return WebGPU(device, str(adapter.info["device"]))


@dataclass(frozen=True)
class _Pipeline:
    pipeline: Any
    layout: Any


class WebGPU:
    """An opened device."""

    def __init__(self, device: Any, name: str) -> None:
        import wgpu

        self._usage = wgpu.BufferUsage
        self._stage = wgpu.ShaderStage.COMPUTE
        self.device, self.name = device, name
        self.alignment = int(device.limits["min-storage-buffer-offset-alignment"])
        self._uniform = int(device.limits["min-uniform-buffer-offset-alignment"])
        self._largest = min(int(device.limits["max-storage-buffer-binding-size"]), int(device.limits["max-buffer-size"]))
        self._staging: Any = None

    # -- memory ----------------------------------------------------------------------------------------------------------
    def allocate(self, nbytes: int) -> Piece:
        if nbytes > self._largest:
            raise MemoryError(f"{self.name} has at most {self._largest} bytes in one array, and one of {nbytes} is asked for")
        import wgpu

        u = self._usage
        try:
            return Piece(self.device.create_buffer(size=nbytes, usage=u.STORAGE | u.COPY_SRC | u.COPY_DST), 0, nbytes)
        except wgpu.GPUOutOfMemoryError as e:
            raise MemoryError(f"{self.name} has no {nbytes} bytes free ({e}): {SMALLER}") from None

    def write(self, to: Piece, data: np.ndarray) -> None:
        self.device.queue.write_buffer(to.memory, to.at, data)

    def read(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        return self.run([], pieces)

    def copy(self, source: Piece, to: Piece) -> None:
        encoder = self.device.create_command_encoder()
        encoder.copy_buffer_to_buffer(source.memory, source.at, to.memory, to.at, to.nbytes)
        self.device.queue.submit([encoder.finish()])

    # -- kernels ---------------------------------------------------------------------------------------------------------
    def kernel(self, spec: KernelSpec) -> _Pipeline:
        kinds = [{"type": "storage" if w else "read-only-storage"} for w in spec.writes]
        entries = [{"binding": i, "visibility": self._stage, "buffer": b} for i, b in enumerate([*kinds, {"type": "uniform"}])]
        layout = self.device.create_bind_group_layout(entries=entries)
        try:
            pipeline = self.device.create_compute_pipeline(
                layout=self.device.create_pipeline_layout(bind_group_layouts=[layout]),
                compute={"module": self.device.create_shader_module(code=spec.source), "entry_point": spec.name},
            )
        except Exception as e:
            raise ArtifactError(f"{self.name} does not take the kernel {spec.name}: {e}") from None
        return _Pipeline(pipeline, layout)

    def record(self, commands: list[Command]) -> list[Any]:
        """Bind groups, and the numbers of all launches in one array."""
        found: list[Any] = []
        numbers: list[np.ndarray] = []
        launches: list[tuple[int, Dispatch, tuple[int, int, int]]] = []
        for c in commands:
            if isinstance(c, Choice):
                found.append((c.condition, self.record(c.then), self.record(c.otherwise)))
            elif isinstance(c, Move):
                found.append(c)
            else:
                x, y, z = _spread(c)
                own = np.zeros(-(-(len(c.scalars) + 1) // 4) * 4, np.uint32)
                own[: len(c.scalars)] = np.asarray(c.scalars, np.int64) & 0xFFFFFFFF
                own[len(c.scalars)] = c.grid[0] - 1
                numbers.append(np.pad(own, (0, -own.size % (self._uniform // 4))))
                launches.append((len(found), c, (x, y, z)))
                found.append(None)
        if launches:
            data = np.concatenate(numbers)
            memory = self.device.create_buffer_with_data(data=data, usage=self._usage.UNIFORM)
            at = 0
            for (i, c, grid), own in zip(launches, numbers):
                size = -(-(len(c.scalars) + 1) // 4) * 16
                parts = [(p.memory, p.at, p.nbytes) for p in c.pieces] + [(memory, at, size)]
                at += own.nbytes
                group = self.device.create_bind_group(layout=c.kernel.layout, entries=[
                    {"binding": j, "resource": {"buffer": m, "offset": o, "size": n}} for j, (m, o, n) in enumerate(parts)
                ])  # fmt: skip
                found[i] = (c.kernel.pipeline, group, grid)
        return found

    def run(self, recorded: Any, results: Sequence[Piece]) -> list[np.ndarray]:
        encoder = self._encoded(self.device.create_command_encoder(), recorded)
        total = sum(p.nbytes for p in results)
        if total and (self._staging is None or self._staging.size < total):
            self._staging = self.device.create_buffer(size=total, usage=self._usage.MAP_READ | self._usage.COPY_DST)
        at = 0
        for p in results:
            encoder.copy_buffer_to_buffer(p.memory, p.at, self._staging, at, p.nbytes)
            at += p.nbytes
        self.device.queue.submit([encoder.finish()])
        if not total:
            return [np.zeros(0, np.uint8) for _ in results]
        self._staging.map_sync("READ", 0, total)
        try:
            data = np.frombuffer(self._staging.read_mapped(0, total), np.uint8).copy()
        finally:
            self._staging.unmap()
        return np.split(data, np.cumsum([p.nbytes for p in results])[:-1])

    def _encoded(self, encoder: Any, recorded: Sequence[Any]) -> Any:
        """What was recorded, as commands of ``encoder``, or of a further one, where a choice has been waited for."""
        running: Any = None
        for c in recorded:
            if isinstance(c, Move):
                if running is not None:
                    running.end()
                    running = None
                encoder.copy_buffer_to_buffer(c.source.memory, c.source.at, c.to.memory, c.to.at, c.nbytes)
            elif isinstance(c[0], Piece):
                if running is not None:
                    running.end()
                    running = None
                self.device.queue.submit([encoder.finish()])
                taken = bool(self.read([c[0]])[0].any())
                encoder = self._encoded(self.device.create_command_encoder(), c[1] if taken else c[2])
            else:
                pipeline, group, grid = c
                if running is None:
                    running = encoder.begin_compute_pass()
                running.set_pipeline(pipeline)
                running.set_bind_group(0, group)
                running.dispatch_workgroups(*grid)
        if running is not None:
            running.end()
        return encoder


def _spread(c: Dispatch) -> tuple[int, int, int]:
    x, y, z = c.grid
    if x > _SPREAD:
        if z != 1:
            raise InputError(f"{c.spec.name} has {c.grid} workgroups, which this device cannot count: give it less at a time")
        z = -(-x // _SPREAD)
        x = -(-x // z)
    if max(x, y, z) > _SPREAD:
        raise InputError(f"{c.spec.name} has {c.grid} workgroups, which this device cannot count: give it less at a time")
    return x, y, z
