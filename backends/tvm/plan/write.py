"""A program's launch plan: made from its lowered module, and written as JSON beside the kernels' sources."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import TensorLoad
from tvm.s_tir import dlight as dl
from wasat.ir import DimLike, IRError, Node
from wasat.ir.dims import floordiv

from .device import Device
from .kernels import Functions, Kernel, all_sources
from .labels import Labels
from .layout import Layout
from .relaxed import Reader
from .sizes import tree
from .steps import Array, Branch, Check, Copy, Entry, Kind, Loop, Run, Step

FORMAT = 1


@dataclass(frozen=True)
class Signature:
    """What an entry takes, in order, and the names of what it returns, new values of states under the states' names."""

    given: Sequence[tuple[Kind, str]]
    returned: Sequence[str]


@dataclass(frozen=True)
class Plan:
    """``json``: the plan; ``source``: the kernels, one after the other."""

    json: dict[str, Any]
    source: str

    def text(self) -> str:
        """The plan as a file holds it."""
        return json.dumps(self.json, separators=(",", ":"))


def make_plan(
    module: tvm.IRModule, signatures: Mapping[str, Signature], target: tvm.target.Target, device: Device, nodes: Sequence[Node]
) -> Plan:
    """The plan of a lowered module; ``signatures``: of its entries, by name. ``nodes``: those that variables are called by.
    Raises IRError for what has no kernel there, or whose sizes depend on data."""
    labels = Labels(nodes)
    with target, tvm.transform.PassContext(opt_level=3):
        module = relax.transform.LegalizeOps()(module)
        module = relax.transform.FoldConstant()(_annotated(module))
        labels.before(module)
        module = _fused(module, min(device.fused, device.buffers))
        labels.after(module)
        module = relax.transform.FuseTIR()(module)
        if not _holds_nothing(module):
            module = relax.transform.RewriteDataflowReshape()(module)
        module = relax.transform.DeadCodeElimination()(module)
    module = _scheduled(module, device)
    reader = Reader(module, Functions(module, target, device), labels)
    entries: dict[str, Any] = {}
    used: dict[str, Kernel] = {}
    for name, signature in signatures.items():
        entry = reader.entry(re.sub(r"\W", "_", name), signature.given, signature.returned)
        written = _Writer(entry, device)
        entries[name] = written.json
        used |= written.kernels
    plan = _plan(entries, used, reader.constants.arrays, device)
    return dataclasses.replace(plan, source=all_sources(used.values(), target)) if device.language == "cuda" else plan


def _holds_nothing(module: tvm.IRModule) -> bool:
    """Whether an array has no elements whatever the sizes are: TVM takes a part of it, of another shape, for a view of it."""
    functions = [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]
    buffers = [p for f in functions for p in f.params if not isinstance(p.ty, tvm.ir.PrimType)]
    return any(isinstance(d, tirx.IntImm) and int(d) == 0 for x in buffers for d in x.shape)


def _scheduled(module: tvm.IRModule, device: Device) -> tvm.IRModule:
    """The module with every kernel's loops bound to threads, by TVM's rules: those that it has for opencl are for phones."""
    config = {"kind": "webgpu", "max_num_threads": device.threads, "max_shared_memory_per_block": device.shared}
    with tvm.target.Target(config, host={"kind": "llvm"}), tvm.transform.PassContext(opt_level=3):
        rules = (_Matmul(), dl.gpu.GEMV(), dl.gpu.Reduction(), dl.gpu.GeneralReduction(), dl.gpu.Fallback(), _Apart())
        return dl.ApplyDefaultSchedule(*map(_Tried, rules))(module)


class _Matmul(dl.gpu.Matmul):
    """TVM's rule for products, its loops kept: what drivers unroll by themselves they compile in a tenth of the time that 256
    turns in the text take."""

    def get_configs(self, target: Any) -> Any:
        return dataclasses.replace(super().get_configs(target), unroll=0)


class _Apart(dl.ScheduleRule):
    """Loops over sizes that are differences, ``s - 3``, bound by themselves: TVM cannot make one loop of them and others.

    The others go over workgroups in x and their threads, the first difference over those in y, and each thread
    turns in the rest.
    """

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        schedule = tvm.s_tir.Schedule(func)
        blocks = dl.normalize_prim_func(schedule)
        if blocks is None:
            return None
        reductions = []
        for info in dl.try_inline(schedule, blocks):
            loops = list(zip(schedule.get_loops(info.block_rv), info.dom_kind()))
            own = [loop for loop, kind in loops if kind == "S"]
            rest = [loop for loop, kind in loops if kind != "S"]
            simple = [x for x in own if isinstance(schedule.get(x).extent, (tirx.IntImm, tirx.Var))]
            apart = [x for x in own if x not in simple]
            if not simple:
                simple = [apart.pop() if apart else schedule.add_unit_loop(info.block_rv)]
            schedule.reorder(*apart[:1], *simple, *apart[1:], *rest)
            grid, threads = schedule.split(schedule.fuse(*simple), factors=[None, int(target.attrs["max_num_threads"])])
            for loop, tag in zip((grid, threads, *apart[:1]), ("blockIdx.x", "threadIdx.x", "blockIdx.y")):
                schedule.bind(loop, tag)
            if any(kind == "R" for _, kind in loops):
                reductions.append((info.block_rv, (*apart[1:], *rest)[0]))
        for block, loop in reductions:
            schedule.decompose_reduction(block, loop)
        return schedule


class _Tried(dl.ScheduleRule):
    """A rule that leaves to the next ones what it begins and cannot end: sizes that are no sums of loops' variables, and what
    its threads share of a sum in a way that TVM does not lower afterwards."""

    _lowered = tvm.transform.Sequential(
        [tvm.s_tir.transform.CanonicalizeLoop(), tvm.s_tir.transform.LowerCrossThreadReduction()]
    )

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        try:
            made = self.rule.apply(func, target, tunable)
            for schedule in made if isinstance(made, list) else [made] * (made is not None):
                self._lowered(schedule.mod)
            return made
        except (tvm.s_tir.ScheduleError, tvm.error.InternalError, AssertionError, IndexError, ValueError):
            return None


def _annotated(module: tvm.IRModule) -> tvm.IRModule:
    """The module with the kind of each operation, by which they are grouped. TVM calls the first elements of an array (a slice)
    elementwise, and its rules would then compute sums at a part of their places as if at all.
    """
    module = relax.transform.AnnotateTIROpPattern()(module)
    for gv, f in module.functions.items():
        kind = int(f.attrs.get("op_pattern", _OPAQUE)) if isinstance(f, tirx.PrimFunc) else _OPAQUE
        if kind <= _BROADCAST and _reads_a_part(f):
            module.update_func(gv, f.with_attr("op_pattern", _INJECTIVE))
        elif kind == _PRODUCT and _sums_one_term(f):
            module.update_func(gv, f.with_attr("op_pattern", _REDUCTION))
    return module


_BROADCAST, _INJECTIVE, _REDUCTION, _PRODUCT, _OPAQUE = 1, 2, 3, 4, 8
"""TVM's OpPatternKind: a product is a sum that takes what follows it into its kernel."""


def _sums_one_term(f: tirx.PrimFunc) -> bool:
    """Whether sums are of one term each: TVM would write what follows into the zero that such a sum begins with and into the
    sum, ``f(f(0) + x)``."""
    extents = list[Any]()

    def block(s: Any) -> None:
        extents.extend(v.dom.extent for v in s.iter_vars if int(v.iter_type) == tirx.IterVar.CommReduce)

    tvm_ffi.structural_walk(f.body, [(tvm.s_tir.SBlock, block)])
    return bool(extents) and all(tvm.sym.Analyzer().can_prove_equal(d, 1) for d in extents)


def _reads_a_part(f: tirx.PrimFunc) -> bool:
    """Whether an elementwise function or one that broadcasts may leave elements of an array unread: an axis of another size
    than the loop over it, or one of which it takes one element."""
    given, loads, extents = set(f.params), list[Any](), dict[Any, Any]()

    def store(s: Any) -> None:
        extents.update(zip(s.indices, s.buffer.shape))

    tvm_ffi.structural_walk(f.body, [(TensorLoad, loads.append), (tirx.BufferStore, store)])
    equal = tvm.sym.Analyzer().can_prove_equal
    axes = [(i, d) for x in loads if x.source in given for i, d in zip(x.indices, x.source.shape)]
    return any(not (equal(d, 1) or (i in extents and equal(d, extents[i]))) for i, d in axes)


def _fused(module: tvm.IRModule, most: int) -> tvm.IRModule:
    """The module with its operations grouped; groups that take more than ``most`` arrays are made of fewer operations."""
    for depth in (128, 16, 8, 4, 2):
        with tvm.transform.PassContext(opt_level=3, config={"relax.FuseOps.max_depth": depth}):
            module = relax.transform.FuseOps()(module)
        large = {
            gv: f for gv, f in module.functions.items()
            if isinstance(f, relax.Function) and f.attrs and "Primitive" in f.attrs and _arrays(f) > most
        }  # fmt: skip
        for gv, f in large.items():
            module.update_func(gv, f.without_attr("Primitive"))
        if not large:
            break
    return module


def _arrays(f: relax.Function) -> int:
    """How many arrays a group takes and makes."""
    results = len(f.ret_ty.fields) if isinstance(f.ret_ty, relax.TupleType) else 1
    return sum(isinstance(p.ty, relax.TensorType) for p in f.params) + results


def _plan(
    entries: dict[str, Any], kernels: Mapping[str, Kernel], constants: Sequence[tuple[str, np.ndarray]], device: Device
) -> Plan:
    text, table = "", {}
    for name, k in kernels.items():
        start = len(text)
        text += k.source.strip() + "\n"
        more = {"threads": list(k.threads), "writes": list(k.writes), "scalars": list(k.scalars)}
        # machine code says itself where a kernel is
        table[name] = more if device.language == "cuda" else {"at": [start, len(text)], **more}
    for d, x in constants:
        if device.stored(d) == "int32" and x.size and not -(2**31) <= int(x.min()) <= int(x.max()) < 2**31:
            held = f"{int(x.min())} .. {int(x.max())}"
            raise IRError(f"a constant {d}{list(x.shape)} holds {held}; this target keeps {d} in 32 bits")
    most = max((len(k.writes) for k in kernels.values()), default=0)
    return Plan({
        "format": FORMAT, "language": device.language, "storage": dict(device.storage),
        "needs": {"threads": device.threads, "shared": device.shared, "buffers": most, "f16": device.f16},
        "kernels": table,
        "constants": [{"dtype": d, "data": base64.b64encode(np.ascontiguousarray(x).tobytes()).decode()} for d, x in constants],
        "entries": entries,
    }, text)  # fmt: skip


class _Writer:
    """One entry as JSON."""

    def __init__(self, entry: Entry, device: Device) -> None:
        self.device, self.kernels = device, dict[str, Kernel]()
        self.layout = Layout(entry, self.bytes)
        self.places: dict[Any, int] = {}
        self.arrays: list[dict[str, Any]] = []
        for a, shape in entry.given:
            self.places[a] = len(self.arrays)
            self.arrays.append({"kind": a.kind, "name": a.name, **self.tensor(a, shape)})
        for i, slot in enumerate(self.layout.slots):
            self.places[i] = len(self.arrays)
            self.arrays.append({"kind": "scratch", "bytes": tree(slot.size)})
        steps = [self.step(s) for s in entry.steps]
        outputs = [{"name": n, "array": self.place(a), **self.tensor(a, shape)} for n, a, shape in entry.outputs]
        self.json = {
            "symbols": [{"name": n, "array": i, "axis": axis} for n, i, axis in entry.symbols],
            "arrays": self.arrays, "steps": steps, "outputs": outputs,
        }  # fmt: skip

    def tensor(self, a: Array, shape: Sequence[DimLike]) -> dict[str, Any]:
        return {"dtype": a.dtype, "shape": [tree(d) for d in shape], "bytes": tree(self.bytes(a))}

    def bytes(self, a: Array) -> DimLike:
        """Its size in memory: whole words of 4 bytes."""
        size = itemsize(self.device.stored(a.dtype))
        return a.count * size if size % 4 == 0 else floordiv(a.count * size + 3, 4) * 4

    def place(self, a: Array) -> int:
        memory = self.layout.memory(a)
        key: Any = memory
        if isinstance(memory, Array) and memory.kind == "constant":
            key = "constant", memory.number
            if key not in self.places:
                self.places[key] = len(self.arrays)
                self.arrays.append({
                    "kind": "constant", "number": memory.number, "dtype": memory.dtype, "bytes": tree(self.bytes(memory)),
                })  # fmt: skip
        return self.places[key]

    def step(self, s: Step) -> dict[str, Any]:
        match s:
            case Run():
                self.kernels[s.kernel.name] = s.kernel
                arrays = [self.place(a) for a in s.arrays]
                for i, writes in zip(arrays, s.kernel.writes):
                    if writes and arrays.count(i) > 1 and self.device.language != "opencl":
                        raise IRError(f"{s.kernel.name} would read and write one array under two names")
                return {
                    "op": "launch", "kernel": s.kernel.name, "grid": [tree(d) for d in s.grid], "arrays": arrays,
                    "scalars": [tree(d) for d in s.scalars], "nodes": list(s.label.nodes), "lines": list(s.label.lines),
                }  # fmt: skip
            case Copy():
                return {"op": "copy", "from": self.place(s.source), "to": self.place(s.to), "bytes": tree(self.bytes(s.to))}
            case Check():
                return {"op": "check", "left": tree(s.left), "right": tree(s.right), "needs": s.needs, "where": s.where}
            case Loop():
                return {"op": "loop", "symbol": s.symbol, "count": tree(s.count), "steps": [self.step(x) for x in s.steps]}
            case Branch():
                sides = {k: [self.step(x) for x in steps] for k, steps in (("then", s.then), ("otherwise", s.otherwise))}
                return {"op": "if", "condition": self.place(s.condition), **sides}


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return {"bfloat16": 2}.get(dtype) or np.dtype(dtype).itemsize
