"""From Relax to a library: machine code of a module's functions, in parts that LLVM compiles side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax import vm_build
from tvm.s_tir import SBlock
from tvm.tirx import BufferStore, PrimFunc, SeqStmt

from .targets import Target, cpu_count

_PART = 16
"""Functions of a part: what a part costs by itself, about 50 ms, is then little beside them. As the number of parts depends
on the program alone, a library does not depend on the machine that compiles it."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class MachineCode:
    """Code of TVM's virtual machine, and the kernels that it calls."""

    executable: Any
    """The virtual machine's, with the first part of the kernels."""
    target: Target
    parts: list[Any] = field(default_factory=list)
    """Modules with the other kernels."""

    def link(self, path: Path) -> None:
        """Writes the shared library ``path`` (absolute)."""
        with tempfile.TemporaryDirectory() as folder, self.target.scope():
            objects = [f"{folder}/part{i}.o" for i in range(len(self.parts))]

            def write(i: int) -> None:
                self.parts[i].write_to_file(objects[i])

            _side_by_side(self.target, write, range(len(objects)))
            self.executable.export_library(str(path), addons=objects, **self.target.link_options())

    def in_process(self) -> Any:
        """The executable with all kernels."""
        for part in self.parts:
            self.executable.mod.import_module(part)
        self.parts = []
        return self.executable


def compile_module(module: tvm.IRModule, target: Target, plan_memory: bool) -> MachineCode:
    """Compiles a Relax module as tvm.compile does, which compiles all kernels one after the other."""
    with target.scope():
        module = _in_order(target.pipeline(plan_memory)(module))
        builder = relax.ExecBuilder()
        kernels = vm_build._filter_tir(vm_build._vmcodegen(builder, module))
    parts = [
        (tvm.IRModule(dict(functions), attrs=kernels.attrs), machine)
        for machine, kind in _by_effort(kernels, target).items()
        for functions in _pieces(kind)
    ]
    made = _side_by_side(target, lambda part: tvm.tirx.build(*part, target.tir_pipeline or "default"), parts)
    linked = vm_build._ffi_api.VMLink(builder, target.tvm, made[0] if made else None, [], {})
    return MachineCode(relax.VMExecutable(linked), target, made[1:])


def _in_order(module: tvm.IRModule) -> tvm.IRModule:
    """The functions that compute sizes, each with its stores in the order of their places: TVM writes them in the order of
    pointers, which differs from process to process. A store reads sizes that the function was given, and never another's."""
    for name, function in module.functions_items():
        if not isinstance(function, PrimFunc) or not function.attrs.get("tirx.is_host_func"):
            continue
        stores = list(function.body) if isinstance(function.body, SeqStmt) else []
        if stores and all(isinstance(s, BufferStore) for s in stores):
            stores.sort(key=lambda s: int(s.indices[0]))
            module.update_func(name, function.with_body(SeqStmt(stores)))
    return module


def _by_effort(kernels: tvm.IRModule | None, target: Target) -> dict[Any, list[Any]]:
    """Functions by the TVM target, which says how hard LLVM optimizes: sums and convolutions in TVM's loops gain by level 3."""
    by: dict[Any, list[Any]] = {}
    more = tvm.target.Target({**target.config, "opt-level": 3}) if target.on_host else target.tvm
    for item in kernels.functions.items() if kernels is not None else ():
        by.setdefault(more if _sums(item[1]) else target.tvm, []).append(item)
    return by


def _sums(function: Any) -> bool:
    """Whether the function has a reduction in TVM's loops."""
    found = False

    def block(b: Any) -> None:
        nonlocal found
        found = found or b.init is not None

    tvm_ffi.structural_walk(function.body, [(SBlock, block)])
    return found


def _pieces(functions: list[Any]) -> list[list[Any]]:
    n = max(len(functions) // _PART, 1)
    return [functions[i::n] for i in range(n)]  # every n-th: kernels of one kind, which take as long, stand side by side


def _side_by_side(target: Target, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``work`` of each item, on as many threads as there are CPUs: TVM lets go of Python's lock meanwhile."""

    def scoped(item: T) -> R:
        with target.scope():  # a thread has its own
            return work(item)

    items = list(items)
    if len(items) < 2:
        return [scoped(x) for x in items]
    with ThreadPoolExecutor(min(cpu_count(), len(items))) as pool:
        return list(pool.map(scoped, items))
