"""Scheduled TensorIR functions to kernels in a device's language, and what a host does to run each: launches, nothing else."""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from wasat.ir import DimLike, IRError, symbol

from . import ptx
from .device import Device
from .elements import as_stored, with_literals
from .opaque import hidden, shown
from .sizes import size_of
from .wgsl import helpers

_build = importlib.import_module("tvm.tirx.build")  # tvm.tirx.build is a function, too
_GRID = ("blockIdx.x", "blockIdx.y", "blockIdx.z")
_NAME = 40
_COMPILE = "tvm_callback_cuda_compile"
_OPENCL_F16 = """static inline float wasat_f16(uint bits) { ushort b = (ushort)bits; return vload_half(0, (const half*)&b); }
static inline uint wasat_f16_bits(float x) { ushort b; vstore_half_rte(x, 0, (half*)&b); return b; }
"""
_PLAIN = tvm.target.Target({"kind": "opencl"})
_BLOCK = ("threadIdx.x", "threadIdx.y", "threadIdx.z")


@dataclass(frozen=True)
class Kernel:
    """One kernel: its source, how many threads a workgroup has, which of its arrays it writes, the types of its numbers."""

    name: str
    source: str
    threads: tuple[int, int, int]
    writes: tuple[bool, ...]
    scalars: tuple[str, ...]
    code: Any = field(default=None, compare=False, repr=False)
    """What the source was made of, where the sources of all kernels are made at once."""


@dataclass(frozen=True)
class Launch:
    """``buffers``: numbers of arguments; behind them, of temporaries. Sizes are over the function's own symbols."""

    kernel: Kernel
    grid: tuple[DimLike, DimLike, DimLike]
    buffers: tuple[int, ...]
    scalars: tuple[DimLike, ...]


@dataclass
class Function:
    """What a host does for one TensorIR function, whose own symbols sizes are over."""

    parameters: list[str | tuple[str | None, ...]]
    """Of each argument: the symbol that a number is, or those that an array's axes are, where they say what one is."""
    temporaries: list[tuple[str, DimLike]] = field(default_factory=list)
    """Element types and numbers of elements of further arrays that it needs."""
    launches: list[Launch] = field(default_factory=list)


def _split(device: Device) -> Any:
    """TVM's passes from blocks to a function of the host and kernels; those for hardware that no plan is for are left out."""
    s, t = s_tir.transform, tirx.transform
    return tvm.transform.Sequential([
        s.CanonicalizeLoop(), s.LowerCrossThreadReduction(), s.LowerInitBlock(), s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(), s.LiftThreadBinding(), s.ManifestSharedMemoryLocalStage(), s.CompactBufferAllocation(),
        s.LowerAutoCopy(), s.UnifyThreadBinding(), s.LowerMatchBuffer(), hidden(), s.StmtSimplify(), s.LowerOpaqueBlock(),
        t.FlattenBuffer(), _without_bf16(t.BF16ComputeLegalize()), t.NarrowDataType(32), s.LoopPartition(),
        t.VectorizeLoop(device.vectors), s.InjectVirtualThread(), s.InjectDoubleBuffer(), t.StorageRewrite(),
        s.HoistIfThenElse(), t.UnrollLoop(),
        s.RenormalizeSplitPattern(), t.StmtSimplify(), t.RemoveNoOp(), s.RewriteUnsafeSelect(), t.CommonSubexprElim(),
        t.VerifyMemory(), t.AnnotateEntryFunc(), s.ThreadSync("shared"), s.ThreadSync("shared.dyn"),
        s.LowerThreadAllreduce(), s.MergeSharedMemoryAllocations(), t.SplitHostDevice(),
    ])  # fmt: skip


def _without_bf16(step: Any) -> Any:
    """The pass, as for devices without bf16: where CUDA has such numbers, TVM would leave them as they are, and they lie in
    memory as whole numbers of 16 bits here."""

    def through(module: tvm.IRModule, context: Any) -> tvm.IRModule:
        targets = {gv: f.attrs["target"] for gv, f in module.functions.items()}
        module = step(tvm.IRModule({gv: f.with_attr("target", _PLAIN) for gv, f in module.functions.items()}))
        return tvm.IRModule({gv: f.with_attr("target", targets[gv]) for gv, f in module.functions.items()})

    return tvm.transform.module_pass(through, opt_level=0)


class Functions:
    """The TensorIR functions of a module by name, made into kernels when they are asked for."""

    def __init__(self, module: tvm.IRModule, target: tvm.target.Target, device: Device) -> None:
        self.target, self.device = target, device
        self._sources = {gv.name_hint: f for gv, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
        self._made: dict[str, Function] = {}

    def __getitem__(self, name: str) -> Function:
        """Raises IRError for what the device cannot do, naming the function."""
        if name not in self._made:
            # the name of a group of operations is as long as the group: some compilers make files of names
            short = f"k{len(self._made)}_{name[:_NAME]}"
            source = self._sources[name].with_attr("global_symbol", short)
            try:
                self._made[name] = _function(short, source, self.target, self.device)
            except IRError as e:
                raise IRError(f"{name}: {e}") from None
        return self._made[name]


def functions(module: tvm.IRModule, target: tvm.target.Target, device: Device) -> dict[str, Function]:
    """All TensorIR functions of ``module`` by name."""
    made = Functions(module, target, device)
    return {gv.name_hint: made[gv.name_hint] for gv, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}


def _function(name: str, f: tirx.PrimFunc, target: tvm.target.Target, device: Device) -> Function:
    # TVM's own schedules leave the promise out where arguments are one array; a launch is given different ones
    whole = tvm.IRModule({name: f.with_attr("tirx.noalias", True)})
    try:
        with target:
            split = _split(device)(tirx.transform.BindTarget(target)(whole))
    except (tvm.error.InternalError, RuntimeError, ValueError) as e:
        raise IRError(f"TVM makes no kernels of it: {str(e).strip().splitlines()[-1]}") from None
    kernels = {
        gv.name_hint: _kernel(gv.name_hint, g, target, device)
        for gv, g in split.functions.items() if "tirx.kernel_launch_params" in g.attrs
    }
    host = next(g for gv, g in split.functions.items() if gv.name_hint == name)
    return _Host(kernels).run(host)


class _Host:
    """Reads what the host has to do for a function: straight-line code that sizes alone decide on."""

    def __init__(self, kernels: Mapping[str, Kernel]) -> None:
        self.kernels = kernels
        self.sizes: dict[Any, DimLike] = {}
        self.arrays: dict[Any, int] = {}
        self.made = Function([])

    def run(self, f: tirx.PrimFunc) -> Function:
        for i, p in enumerate(f.params):
            if isinstance(p.ty, tvm.ir.PrimType):
                self.sizes[p] = symbol(f"n{i}")
                self.made.parameters.append(f"n{i}")
                continue
            self.arrays[p] = i
            names = []
            for axis, d in enumerate(p.shape):
                new = type(d).__name__ == "Var" and d not in self.sizes
                names.append(f"n{i}_{axis}" if new else None)
                if new:
                    self.sizes[d] = symbol(f"n{i}_{axis}")
            self.made.parameters.append(tuple(names))
        self.stmt(f.body)
        return self.made

    def stmt(self, s: Any) -> None:
        kind = type(s).__name__
        if kind == "SeqStmt":
            for x in s.seq:
                self.stmt(x)
        elif kind == "Bind":
            self.sizes[s.var] = size_of(s.value, self.sizes)
        elif kind == "DeclBuffer":
            self.arrays[s.buffer] = self.array(s.data)
        elif kind == "AllocBuffer":
            self.arrays[s.buffer] = len(self.made.parameters) + len(self.made.temporaries)
            count: DimLike = 1
            for d in s.buffer.shape:
                count = count * size_of(d, self.sizes)
            self.made.temporaries.append((str(s.buffer.dtype), count))
        elif kind == "AttrStmt":
            self.stmt(s.body)
        elif kind == "Evaluate" and getattr(getattr(s.value, "op", None), "name", "") == "tirx.call_ffi_kernel":
            self.launch(s.value)
        elif kind != "Evaluate" or not isinstance(s.value, tirx.IntImm):
            raise IRError(f"its launches depend on a {kind}, which a launch plan has no form for")

    def array(self, data: Any) -> int:
        while type(data).__name__ == "Call":  # of a buffer, its memory
            data = data.args[0]
        if data not in self.arrays:
            raise IRError(f"a kernel takes an array {data} that the host does not know")
        return self.arrays[data]

    def launch(self, call: Any) -> None:
        kernel = self.kernels[call.args[0].value]
        tags = [str(t) for t in call.attrs.launch_params]
        args = list(call.args[1:])
        count = len(args) - len(tags)
        extents = {t: size_of(x, self.sizes) for t, x in zip(tags, args[count:]) if t in _GRID}
        buffers = len(kernel.writes)
        self.made.launches.append(Launch(
            kernel, (extents.get(_GRID[0], 1), extents.get(_GRID[1], 1), extents.get(_GRID[2], 1)),
            tuple(map(self.array, args[:buffers])), tuple(size_of(x, self.sizes) for x in args[buffers:count]),
        ))  # fmt: skip


def _writes(f: tirx.PrimFunc, count: int) -> list[bool]:
    """Which of a kernel's arrays, its first ``count`` parameters, it stores to."""
    stored, places = set[Any](), dict[Any, Any]()

    def declared(s: Any) -> None:
        places[s.buffer] = s.data

    def store(s: Any) -> None:
        stored.add(s.buffer)

    tvm_ffi.structural_walk(f.body, [(tirx.DeclBuffer, declared), (tirx.BufferStore, store)])
    written = {places.get(b) for b in stored}
    return [p in written for p in f.params[:count]]


def _kernel(name: str, f: tirx.PrimFunc, target: tvm.target.Target, device: Device) -> Kernel:
    """The source of one kernel, and what a host must know of it."""
    pointers = [isinstance(p.ty, tvm.ir.PointerType) for p in f.params]
    if pointers != sorted(pointers, reverse=True):
        raise IRError("a kernel takes numbers before arrays")
    if sum(pointers) > device.buffers:
        raise IRError(f"a kernel takes {sum(pointers)} arrays; this target's kernels may take {device.buffers}")
    threads = {t: 1 for t in _BLOCK}
    own = as_stored(_without_bf16(tirx.transform.BF16StorageLegalize())(tvm.IRModule({name: f}))[name], device)

    def visit(s: Any) -> None:
        if s.attr_key == "thread_extent" and s.node.thread_tag in threads:
            threads[s.node.thread_tag] = int(s.value)

    tvm_ffi.structural_walk(own.body, (tirx.AttrStmt, visit))
    if math.prod(threads.values()) > device.threads:
        raise IRError(f"a kernel has {math.prod(threads.values())} threads; this target has {device.threads}")
    module = shown()(tirx.compilation_pipeline.finalize_device_passes()(tvm.IRModule({name: own})))
    source = _source(module, target)
    writes = _writes(own, sum(pointers))
    if device.language == "opencl" and "wasat_f16" in source:
        source = _OPENCL_F16 + source
    if device.language == "wgsl":
        source = source.replace("-2147483648i", "(-2147483647i - 1i)")  # the sign is no part of a literal
        source += helpers(source)
        # which of them a kernel writes, a host must know
        access = dict(re.findall(r"@binding\((\d+)\) var<storage, (read|read_write)>", source))
        writes = [access[str(i)] == "read_write" for i in range(sum(pointers))]
    scalars = tuple(str(p.ty) for p, pointer in zip(own.params, pointers) if not pointer)
    workgroup = threads[_BLOCK[0]], threads[_BLOCK[1]], threads[_BLOCK[2]]
    return Kernel(name, source, workgroup, tuple(writes), scalars, module[name])


def all_sources(kernels: Iterable[Kernel], target: tvm.target.Target) -> str:
    """The kernels in one text, with one preamble."""
    module = tvm.IRModule({k.name: k.code for k in kernels})
    return _source(module, target) if module.functions else ""


def _source(module: tvm.IRModule, target: tvm.target.Target) -> str:
    try:
        with target, _no_compiler():
            source = with_literals(str(_build.codegen_build(module, target).inspect_source("")))
    except (tvm.error.InternalError, RuntimeError, ValueError) as e:
        raise IRError(f"TVM makes no code of it for this target: {str(e).strip().splitlines()[-1]}") from None
    return ptx.functions(source) + source if target.kind.name == "cuda" else source


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """Inside, TVM leaves CUDA's sources as they are, which it compiles where it finds a driver and a compiler."""
    before = tvm_ffi.get_global_func(_COMPILE, allow_missing=True)
    tvm_ffi.register_global_func(_COMPILE, lambda code: code.encode(), override=True)
    try:
        yield
    finally:
        if before is not None:
            tvm_ffi.register_global_func(_COMPILE, before, override=True)
