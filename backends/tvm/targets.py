"""Targets as declarations: a TVM target, a table of lowerings, a pipeline, a link step. A new machine is a new entry here."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.relax.backend import cpu_generic
from wasat.ir import IRError, Program, State, TensorType
from wasat.ir.errors import said
from wasat.ir.ops.rounding import ROW_SCHEMES

from . import cuda as toolkit
from .cpu import fused_loops as loops
from .cpu import select as cpu_kernels
from .cpu import states, tir_pipeline
from .cpu.arch import ARCHES, MACOS, WINDOWS, Arch, arch_here, arch_of
from .cpu.kernels.cache import GROUP, CacheType
from .gpu import select as gpu_kernels
from .gpu import states as gpu_states
from .gpu.limits import Limits
from .layouts import StateLayout
from .lower import Select, Table
from .ops.devices import DEVICES
from .ops.primitives import PRIMITIVES
from .plan.device import CUDA, OPENCL, WEBGPU, WEBGPU_F16, Device


def host_cpu() -> dict[str, Any]:
    """What tvm.target.Target takes for this machine's CPU: LLVM's name of it (``"native"`` would silently compile generic
    code), less the instruction sets that its system hides.
    """
    here = arch_here()
    named = {**here.config, "mcpu": str(tvm.target.codegen.llvm_get_system_cpu())}
    hidden = here.hidden(tvm.target.Target(named))
    return {**named, "mattr": [f"-{x}" for x in hidden]} if hidden else named


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


CHECKED = False
"""Whether kernels check the shapes and types of their operands: the tests of lowering that are slow do (pytest --checked)."""


@dataclass(frozen=True)
class Target:
    """One machine to compile for. What a field does not say, a subclass does."""

    name: str
    config: Mapping[str, Any]
    """What tvm.target.Target takes."""
    host: Mapping[str, Any] | None = None
    kernels: Callable[[Target, Program], Select] = field(default=lambda target, program: lambda graph: None)
    """Puts the target's hand-written kernels into a graph of the program, in place of operations; may say what it left."""
    arch: Arch = field(default_factory=arch_here)
    """The architecture of the processor that runs the code, or its host's part."""
    threads: int = field(default_factory=cpu_count)
    needs_compiler: bool = True
    tir_pipeline: str | None = None
    """Name of the TensorIR pass pipeline; None: TVM's own for the target."""
    state_layout: Callable[[State, TensorType], StateLayout] = field(default=lambda state, type: StateLayout(type))
    """How a state lies in memory, from its description and its type in the graph: kernels may choose."""
    formats: tuple[tuple[str, str], ...] = (("*", "*"),)
    """Pairs of globs: operations, and types of quantized weights that its kernels of them read; recipes choose of these."""
    granule: int = 1
    """Capacities of growing states and rings are multiples of it, as its kernels read positions."""
    features: Callable[[Target], list[str]] = field(default=lambda target: [])
    """What the machine that runs the code must have, in the words of /proc/cpuinfo."""
    libraries: tuple[Path, ...] = ()
    """What the code calls beside TVM's runtime: a driver, a device's runtime. They become files of the artifact, and are loaded
    in this order before its code is."""

    caches: tuple[str, ...] = ("f32", "f16")
    """How its kernels may store keys and values."""

    device: Device | None = None
    """What its kernels may use, of a device whose programs are launch plans; None: TVM's virtual machine runs them."""

    @property
    def on_host(self) -> bool:
        """Whether its kernels run where they can raise errors."""
        return bool(self.config["kind"] == "llvm")

    @cached_property
    def tvm(self) -> tvm.target.Target:
        # LLVM's level 3 unrolls. Our kernels are unrolled when they are written, and loops that only move or map elements wait
        # for memory: level 2 gives the same speed, in a third of the time for the latter
        t = tvm.target.Target({"opt-level": 2, **self.config} if self.on_host else dict(self.config))
        return tvm.target.Target(t, host=tvm.target.Target(dict(self.host))) if self.host else t

    def table(self) -> Table:
        """Operation to lowering, of what no kernel does."""
        return PRIMITIVES if self.device is None else DEVICES

    def pipeline(self, plan_memory: bool = True) -> Any:
        """The Relax pass pipeline: fusion of elementwise chains included, which tvm.compile's default lacks on CPUs.

        ``plan_memory``: whether buffers share memory by plan; else each is taken from the runtime's pool when it is needed.
        """
        if self.config["kind"] != "llvm":
            return relax.get_default_pipeline(self.tvm)
        stages = cpu_generic.pipeline
        steps = [stages.library_dispatch_passes, stages.legalize_passes, stages.dataflow_lower_passes]
        fused = [p for make in steps for p in make(self.tvm)]
        last = [p for p in stages.finalize_passes(self.tvm) if plan_memory or p.info.name != "StaticPlanBlockMemory"]
        fused.append(relax.transform.DeadCodeElimination())  # reshapes that turned out to be views leave functions behind
        return tvm.transform.Sequential([*fused, loops.schedule(self.threads), *last])

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """What TVM reads while it compiles.

        The program alone calls its kernels, whose operands have the shapes and types that it was lowered with; the virtual
        machine checks what an entry is given. So kernels check nothing again: that was two fifths of a
        small model's library, and a quarter of the time.
        """
        config = {"tirx.disable_assert": self.on_host and not CHECKED}
        with tvm.transform.PassContext(opt_level=3, config=config), self.tvm:
            yield

    def state_layouts(self, program: Program) -> dict[str, StateLayout]:
        """How the program's states lie in memory, by name, over the graphs' symbols."""
        graphs = program.graphs.values()
        types = {v.name: v.tensor for g in graphs for v in g.inputs}
        return {s.name: self.state_layout(s, types[s.name]) for s in program.interface.states}

    def state_types(self, program: Program) -> dict[str, TensorType]:
        """The types of the tensors that hold the program's states, by name."""
        return {name: layout.type for name, layout in self.state_layouts(program).items()}

    def link_options(self) -> dict[str, Any]:
        """Further arguments of export_library."""
        return self.arch.link_options()

    def requirements(self) -> dict[str, Any]:
        """The manifest's ``target`` section: what must hold where the artifact is loaded."""
        if self.device is not None:  # any system with such a device
            anywhere: dict[str, Any] = {"arch": "", "os": "", "mcpu": None, "features": [], "libraries": []}
            return {"kind": self.config["kind"], "device": self.name, **anywhere}
        return {
            "kind": self.config["kind"], "device": self.name, "arch": self.arch.name,
            "os": self.arch.system.name,
            "mcpu": self.config.get("mcpu") or self.config.get("arch"), "features": self.features(self),
            "libraries": [p.name for p in self.libraries],
        }  # fmt: skip

    def compiled(self, source: str) -> bytes:
        """What an artifact holds of the kernels of a launch plan: their text, for a driver to compile."""
        return source.encode("ascii")

    def missing_tools(self) -> list[str]:
        """What compiling for it lacks on this machine, each with the way to get it."""
        found = [f"the library {p.name}: {p} does not exist" for p in self.libraries if not p.exists()]
        return found + self.arch.missing_tools() if self.needs_compiler else found

    @staticmethod
    def versions() -> dict[str, str]:
        """Versions that the library was made with."""
        return {"tvm": version("apache-tvm"), "tvm_ffi": version("apache-tvm-ffi")}

    def runtime_files(self) -> list[Path]:
        """The libraries that run the code: all that a machine without the compiler needs."""
        if self.device is not None:
            return []
        return [*self.arch.runtime_files(), *self.libraries]


def cpu(mcpu: str | None = None, threads: int | None = None, cache: CacheType = "float32") -> Target:
    """This machine's CPU, or the one that LLVM calls ``mcpu``. Caches of keys and values are stored as ``cache``."""
    if mcpu is None:
        return _cpu("cpu", arch_here(), host_cpu(), threads, cache)
    arch = arch_of(mcpu)
    if arch is None:  # LLVM itself would go on with the slowest common code
        raise IRError(f"there is no CPU {mcpu!r}{_near(mcpu, *ARCHES.values())}")
    return _cpu("cpu", arch, {**arch.config, "mcpu": mcpu}, threads, cache)


def aarch64(mcpu: str = "generic", threads: int | None = None, cache: CacheType = "float32") -> Target:
    """64-bit ARM under Linux, or the processor that LLVM calls ``mcpu``. Elsewhere, its code is linked by a cross compiler."""
    return _cross("aarch64", ARCHES["aarch64"], mcpu, threads, cache)


def macos(mcpu: str = "apple-m1", threads: int | None = None, cache: CacheType = "float32") -> Target:
    """Apple's processors under macOS 11 or later: from the M1, or from the one that LLVM calls ``mcpu``."""
    return _cross("macos", replace(ARCHES["aarch64"], system=MACOS), mcpu, threads, cache)


def windows(mcpu: str = "x86-64-v3", threads: int | None = None, cache: CacheType = "float32") -> Target:
    """64-bit x86 with AVX2 under Windows 10 or later, or the processor that LLVM calls ``mcpu``."""
    return _cross("windows", replace(ARCHES["x86_64"], system=WINDOWS), mcpu, threads, cache)


def _cross(name: str, arch: Arch, mcpu: str, threads: int | None, cache: CacheType) -> Target:
    if mcpu not in arch.processors():
        raise IRError(f"there is no {arch.name} processor {mcpu!r}{_near(mcpu, arch)}")
    return _cpu(name, arch, {**arch.config, "mcpu": mcpu}, threads, cache)


def _near(mcpu: str, *arches: Arch) -> str:
    known = [x for a in arches for x in a.processors()]
    if near := difflib.get_close_matches(mcpu, known, 3):
        return f"; near it are {', '.join(near)}"
    return f"; names are LLVM's, such as {' and '.join(x for x in ('x86-64-v3', 'cortex-a76') if x in known)}"


def _cpu(name: str, arch: Arch, config: Mapping[str, Any], threads: int | None, cache: CacheType) -> Target:
    n = threads or cpu_count()
    if cache in ROW_SCHEMES:  # what can be stored so says it itself: the rest stays
        cache = "float32"
    return Target(
        name, {**config, "num-cores": n}, arch=arch, threads=n, features=cpu_features,
        kernels=lambda target, program: cpu_kernels.selection(target.tvm, n, cache, program.interface.states),
        state_layout=lambda state, type: states.state_layout(state, type, cache), tir_pipeline=tir_pipeline.register(),
        granule=GROUP, formats=(("linear", "*"), ("embedding", "*"), ("grouped_linear", "*")),
        caches=tuple(CACHES),
    )  # fmt: skip


def cpu_features(target: Target) -> list[str]:
    """Instruction sets that code for this CPU may use, as /proc/cpuinfo names them."""
    return target.arch.features(target.tvm)


@dataclass(frozen=True)
class Cuda(Target):
    """NVIDIA's compiler makes machine code of what TVM generates, for each of ``archs``, oldest first: TVM generates what that
    one has."""

    archs: tuple[str, ...] = ()

    def compiled(self, source: str) -> bytes:
        """Machine code of the kernels, and nothing that a driver would have to compile."""
        return toolkit.fat_binary(source, self.archs)

    def missing_tools(self) -> list[str]:
        return [*super().missing_tools(), *toolkit.missing_tools()]

    def requirements(self) -> dict[str, Any]:
        return {**super().requirements(), "mcpu": ",".join(self.archs)}


_ON_GPUS = tuple(("*", kind) for kind in ("s[4567]b*", "q*", "iq*", "mxfp4", "int?b*"))
"""All but zero points."""


def webgpu(feature: str = "", cache: CacheType = "float32") -> Target:
    """GPUs through WebGPU, in a browser or outside. ``feature``: ``f16``, for those that compute with it; without it, an f16
    takes as much memory as an f32, and caches are not kept so."""
    if feature not in ("", "f16"):
        raise IRError(f"webgpu has no feature {feature!r}; there is f16")
    return _planned("webgpu", WEBGPU_F16 if feature else WEBGPU, cache)


def opencl(*, cache: CacheType = "float32") -> Target:
    """GPUs and processors through OpenCL 1.2, which reads and writes f16 everywhere, and computes of it in f32."""
    return _planned("opencl", OPENCL, cache)


def cuda(arch: str = "sm_80", cache: CacheType = "float32") -> Target:
    """NVIDIA GPUs of one or more architectures (sm_80,sm_90a); compiling needs no GPU."""
    archs = tuple(toolkit.architectures(arch))
    tensor = int(archs[0][3:].rstrip("af")) >= 80
    return replace(_planned("cuda", CUDA, cache, Cuda, tensor=tensor, arch=archs[0]), archs=archs)


def limits_of(device: Device, tensor: bool = False) -> Limits:
    """What kernels are made for on the device, with tensor cores or not. WGSL as TVM writes it reads numbers one by one."""
    if device.language == "wgsl":
        return Limits(device.threads, device.shared, device.f16)
    return Limits(device.threads, device.shared, device.f16, vectors=True, lanes=32, columns=1, tensor=tensor)


def _planned(
    kind: str, device: Device, cache: CacheType, make: Callable[..., Target] = Target, tensor: bool = False, **config: Any
) -> Any:
    config |= {"kind": kind, "max_num_threads": device.threads, "max_shared_memory_per_block": device.shared}
    limits = limits_of(device, tensor)
    return make(
        kind, config, host={"kind": "llvm"}, device=device, needs_compiler=False,
        kernels=lambda target, program: gpu_kernels.selection(limits, program.interface.states, cache), formats=_ON_GPUS,
        state_layout=lambda state, type: gpu_states.state_layout(state, type, cache),
        caches=("f32", "f16") if device.halves else ("f32",),
    )  # fmt: skip


TARGETS: dict[str, Callable[..., Target]] = {
    "cpu": cpu, "cuda": cuda, "aarch64": aarch64, "macos": macos, "windows": windows, "webgpu": webgpu, "opencl": opencl,
}  # fmt: skip
"""Functions that make a target. The first parameter is what stands behind the colon of ``name:detail``; ``threads`` and
``cache`` are given to those that have such a parameter."""

ENTRY_POINTS = "wasat.targets"
"""The group of entry points under which other packages announce more of them."""

CACHES: dict[str, CacheType] = {"f32": "float32", "f16": "float16", "int8": "int8", "int4": "int4"}
"""How keys and values may be stored."""


def announced() -> dict[str, EntryPoint]:
    """Targets of installed packages, by name."""
    return {e.name: e for e in entry_points(group=ENTRY_POINTS) if e.name not in TARGETS}


def maker(name: str) -> Callable[..., Target]:
    """The function that makes the target called ``name``, without a detail. Raises IRError where there is none."""
    if name in TARGETS:
        return TARGETS[name]
    others = announced()
    if name not in others:
        names = ", ".join([*TARGETS, *sorted(others)])
        details = "cpu:MCPU, cuda:ARCH choose a model, webgpu:f16 a feature"
        raise IRError(f"there is no target {name!r}; there are {names} ({details})")
    try:
        made: Callable[..., Target] = others[name].load()
    except Exception as e:  # whatever a foreign module does when it is imported
        raise IRError(f"the target {name} ({others[name].value}) cannot be loaded: {said(e)}") from e
    return made


def target_named(name: str, threads: int | None = None, cache: str = "f32") -> Target:
    """``cpu``, ``cpu:znver3``, ``cuda``, ``cuda:sm_90``, or one that an installed package announces, keys and values stored as
    ``cache``. Raises IRError for a target, a detail or a cache that there is none of, and for no thread."""
    if threads is not None and (not isinstance(threads, int) or not 1 <= threads <= 4096):
        raise IRError(f"threads is a whole number from 1 to 4096, not {threads!r}; without it, there are as many as processors")
    if not isinstance(name, str):
        raise IRError(f"a target is a name such as cpu, not {type(name).__name__}")
    kind, _, detail = name.partition(":")
    make = maker(kind)
    if not isinstance(cache, str) or cache not in CACHES:
        raise IRError(f"there is no cache of {cache!r}; there are {', '.join(CACHES)}")
    takes = inspect.signature(make).parameters
    if cache != "f32" and "cache" not in takes:
        raise IRError(f"the target {name} stores keys and values as they are computed; {_able(cache)}")
    if detail and not set(takes) - {"threads", "cache"}:
        raise IRError(f"the target {kind} has no models to choose from: write {kind}, not {name}")
    options = {"threads": threads, "cache": CACHES[cache]}
    target = make(*[detail] if detail else [], **{k: v for k, v in options.items() if k in takes})
    if cache not in target.caches:
        kept = " or ".join(target.caches)
        raise IRError(f"the target {name} stores keys and values as {kept}, not as {cache}; {_able(cache)}")
    return target


def _able(cache: str) -> str:
    """Which of our targets store keys and values as ``cache``."""
    makers = {n: f for n, f in TARGETS.items() if "cache" in inspect.signature(f).parameters}
    able = {n: cache in f(cache=CACHES[cache]).caches for n, f in makers.items()}
    if not able["webgpu"]:
        able["webgpu:f16"] = cache in webgpu("f16").caches
    return f"caches of {cache} are for {', '.join(n for n, can in able.items() if can)}"
