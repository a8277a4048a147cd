"""Compile a PrimFunc for a GPU's language and run it on NumPy arrays: WGSL through wgpu, OpenCL C through PoCL, CUDA C++
on a GPU in software."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from soft_cuda import soft_gpu
from wasat.backends.tvm.gpu.limits import Limits
from wasat.backends.tvm.plan.device import CUDA, OPENCL, WEBGPU, WEBGPU_F16, Device
from wasat.backends.tvm.plan.kernels import Kernel, all_sources, functions
from wasat.backends.tvm.targets import limits_of
from wasat.ir import evaluate_dim
from wasat.runtime.hosts.machine import Command, Dispatch
from wasat.runtime.hosts.open import open_machine
from wasat.runtime.hosts.plan import KernelSpec


@dataclass(frozen=True)
class Machine:
    """A language, and a device here that runs it."""

    name: str
    config: tuple[tuple[str, Any], ...]
    device: Device
    limits: Limits

    @property
    def target(self) -> tvm.target.Target:
        return tvm.target.Target(dict(self.config), host={"kind": "llvm"})


MACHINES = [
    Machine("webgpu", (("kind", "webgpu"), ("max_num_threads", 256)), WEBGPU, limits_of(WEBGPU)),
    Machine("opencl", (("kind", "opencl"),), OPENCL, limits_of(OPENCL)),
    Machine("cuda", (("kind", "cuda"), ("arch", "sm_90")), CUDA, limits_of(CUDA, tensor=True)),
]

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = Machine("webgpu-f16", (("kind", "webgpu"), ("max_num_threads", 256)), WEBGPU_F16, limits_of(WEBGPU_F16))


def each_machine() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("machine", [pytest.param(m, id=m.name) for m in MACHINES])


def on_halves(few: bool = True) -> pytest.MarkDecorator:
    """Machines, and the floats of 16 bits that their kernels compute of: f16 where arrays of it are read; bf16 on CUDA, or
    everywhere."""
    half = np.dtype(np.float16)
    pairs = [(F16, half), (MACHINES[-1], half), *((m, BF16) for m in (MACHINES[-1:] if few else MACHINES))]
    return pytest.mark.parametrize("machine, half", [pytest.param(m, t, id=f"{m.name}-{t.name}") for m, t in pairs])


@cache
def _webgpu() -> Any:
    wgpu = pytest.importorskip("wgpu")
    try:
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
        return adapter.request_device_sync(required_features=[f for f in adapter.features if f == "shader-f16"])
    except Exception as e:
        pytest.skip(f"no WebGPU adapter (Debian: mesa-vulkan-drivers): {e}")


@cache
def _opencl() -> Any:
    cl = pytest.importorskip("pyopencl")
    platforms = cl.get_platforms()
    if not platforms:
        pytest.skip("no OpenCL platform (pip: pocl-binary-distribution)")
    context = cl.Context([platforms[0].get_devices()[0]])
    return cl, context, cl.CommandQueue(context)


def as_bits(dtype: np.dtype[Any], memory: np.dtype[Any]) -> bool:
    """Whether floats of ``dtype`` lie in memory as integers."""
    return dtype == BF16 or (dtype == np.float16 and memory != dtype)


def stored(x: NDArray[Any], device: Device) -> NDArray[Any]:
    """The array as it lies in the device's memory; never empty, as buffers are not."""
    memory = np.dtype(device.stored(str(x.dtype)))
    x = (x.view(np.uint16) if as_bits(x.dtype, memory) else x).astype(memory)
    return np.ascontiguousarray(x) if x.size else np.zeros(1, x.dtype)


def run(machine: Machine, func: tvm.tirx.PrimFunc, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """All ``arrays`` after the function has run; what it only writes should hold something else before."""
    name = str(func.attrs["global_symbol"])
    [made] = functions(tvm.IRModule({name: func}), machine.target, machine.device).values()
    env: dict[str, int] = {}
    for names, x in zip(made.parameters, arrays):
        assert isinstance(names, tuple)
        env.update({n: d for n, d in zip(names, x.shape) if n is not None})
    memory = [stored(x, machine.device) for x in arrays]
    for dtype, count in made.temporaries:
        memory.append(np.full(max(1, evaluate_dim(count, env)), -7, np.dtype(machine.device.stored(dtype))))
    steps = []
    for launch in made.launches:
        grid = tuple(evaluate_dim(d, env) for d in launch.grid)
        if all(grid):
            steps.append((launch.kernel, grid, launch.buffers, [evaluate_dim(d, env) for d in launch.scalars]))
    if machine.device.language == "wgsl" and machine.device.f16 and "shader-f16" not in _webgpu().features:
        pytest.skip("the adapter has no shader-f16")
    if machine.device.language == "cuda":
        source = all_sources({kernel.name: kernel for kernel, *_ in steps}.values(), machine.target)
        with soft_gpu() as gpu:
            out = _on_cuda(memory, steps, gpu.compiled(source))
    else:
        out = (_on_webgpu if machine.device.language == "wgsl" else _on_opencl)(memory, steps)
    return [_given(x, y[: x.size].reshape(x.shape)) for x, y in zip(arrays, out)]


def _given(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """What lies in memory for ``x``, as an array of its type."""
    return y.astype(np.uint16).view(x.dtype) if as_bits(x.dtype, y.dtype) else y.astype(x.dtype, copy=False)


Steps = list[tuple[Kernel, tuple[int, ...], tuple[int, ...], list[int]]]


@cache
def _pipeline(source: str, name: str) -> Any:
    device = _webgpu()
    module = device.create_shader_module(code=source)
    return device.create_compute_pipeline(layout="auto", compute={"module": module, "entry_point": name})


def _on_webgpu(memory: list[NDArray[Any]], steps: Steps) -> list[NDArray[Any]]:
    import wgpu

    device, use = _webgpu(), wgpu.BufferUsage
    buffers = [
        device.create_buffer_with_data(
            data=np.pad(x.reshape(-1).view(np.uint8), (0, -x.nbytes % 4)), usage=use.STORAGE | use.COPY_SRC
        )
        for x in memory
    ]
    for kernel, grid, places, numbers in steps:
        pipeline = _pipeline(kernel.source, kernel.name)
        pods = np.array([*numbers, grid[0] - 1], np.int64).astype(np.int32)
        pods = np.pad(pods, (0, -len(pods) % 4))
        bound = [buffers[i] for i in places] + [device.create_buffer_with_data(data=pods, usage=use.UNIFORM)]
        entries = [{"binding": i, "resource": {"buffer": b, "offset": 0, "size": b.size}} for i, b in enumerate(bound)]
        group = device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
        encoder = device.create_command_encoder()
        step = encoder.begin_compute_pass()
        step.set_pipeline(pipeline)
        step.set_bind_group(0, group)
        assert max(grid) < 65536
        step.dispatch_workgroups(*grid)
        step.end()
        device.queue.submit([encoder.finish()])
    return [np.frombuffer(device.queue.read_buffer(b), x.dtype)[: x.size] for b, x in zip(buffers, memory)]


def _on_cuda(memory: list[NDArray[Any]], steps: Steps, code: bytes) -> list[NDArray[Any]]:
    machine: Any = open_machine("cuda", {"threads": 256, "shared": 49152})
    buffers = [machine.allocate(x.nbytes) for x in memory]
    for b, x in zip(buffers, memory):
        machine.write(b, x.reshape(-1).view(np.uint8))
    commands: list[Command] = []
    for k, grid, places, numbers in steps:
        spec = KernelSpec(k.name, code, k.threads, k.writes, k.scalars)
        x, y, z = grid
        commands.append(Dispatch(machine.kernel(spec), spec, (x, y, z), tuple(buffers[i] for i in places), tuple(numbers)))
    found = machine.run(machine.record(commands), buffers)
    return [y.view(x.dtype) for x, y in zip(memory, found)]


@cache
def _program(source: str, name: str) -> Any:
    cl, context, _ = _opencl()
    return cl.Kernel(cl.Program(context, source).build(), name)


def _on_opencl(memory: list[NDArray[Any]], steps: Steps) -> list[NDArray[Any]]:
    cl, context, queue = _opencl()
    flags = cl.mem_flags.COPY_HOST_PTR | cl.mem_flags.READ_WRITE
    buffers = [cl.Buffer(context, flags, hostbuf=x) for x in memory]
    for kernel, grid, places, numbers in steps:
        scalars = [np.dtype(t).type(n) for t, n in zip(kernel.scalars, numbers)]
        size = [g * t for g, t in zip(grid, kernel.threads)]
        _program(kernel.source, kernel.name)(queue, size, list(kernel.threads), *[buffers[i] for i in places], *scalars)
    out = []
    for b, x in zip(buffers, memory):
        y = np.empty_like(x)
        cl.enqueue_copy(queue, y, b)
        out.append(y.reshape(-1))
    queue.finish()
    return out
