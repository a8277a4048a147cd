"""Targets as declarations: a TVM target, a table of lowerings, a pipeline, a link step. A new machine is a new entry here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import tvm
from tvm import relax

from wasat.ir import IRError, Program

from .lower import Context, Table
from .primitives import PRIMITIVES


def host_cpu() -> str:
    """LLVM's name of this machine's CPU (``"native"`` would silently compile generic code)."""
    return str(tvm.target.codegen.llvm_get_system_cpu())


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Target:
    """One machine to compile for."""

    name: str
    config: Mapping[str, Any]
    """What tvm.target.Target takes."""
    host: Mapping[str, Any] | None = None
    extra: Callable[[Target], Table] = field(default=lambda target: {})
    """Lowerings beyond the primitives."""
    threads: int = field(default_factory=cpu_count)
    needs_compiler: bool = True
    states: Callable[[Target, Program], Mapping[str, Callable[[Context], Any]]] = field(default=lambda target, program: {})
    """Physical types of states whose layout the kernels choose."""

    @cached_property
    def tvm(self) -> tvm.target.Target:
        t = tvm.target.Target(dict(self.config))
        return tvm.target.Target(t, host=tvm.target.Target(dict(self.host))) if self.host else t

    def table(self) -> Table:
        """Operation to lowering."""
        return {**PRIMITIVES, **self.extra(self)}

    def pipeline(self) -> Any:
        """The Relax pass pipeline: fusion of elementwise chains included, which tvm.compile's default lacks on CPUs."""
        return relax.get_default_pipeline(self.tvm)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        with tvm.transform.PassContext(opt_level=3), self.tvm:
            yield

    def state_types(self, program: Program) -> Mapping[str, Callable[[Context], Any]]:
        return self.states(self, program)

    def link_options(self) -> dict[str, Any]:
        return {}


def cpu(mcpu: str | None = None, threads: int | None = None) -> Target:
    """The CPU ``mcpu`` (an LLVM name; default: this machine's)."""
    n = threads or cpu_count()
    return Target("cpu", {"kind": "llvm", "mcpu": mcpu or host_cpu(), "num-cores": n}, threads=n)


def cuda(arch: str = "sm_80") -> Target:
    """NVIDIA GPUs of compute capability ``arch``, with TVM's default GPU schedules. Compiles without a GPU."""
    return Target("cuda", {"kind": "cuda", "arch": arch}, host={"kind": "llvm", "mcpu": "x86-64-v3"})


TARGETS: dict[str, Callable[..., Target]] = {"cpu": cpu, "cuda": cuda}


def target_named(name: str) -> Target:
    """``cpu``, ``cpu:znver3``, ``cuda``, ``cuda:sm_90``. Raises IRError for any other."""
    kind, _, detail = name.partition(":")
    if kind not in TARGETS:
        raise IRError(f"there is no target {name!r}; there are {', '.join(TARGETS)} (cpu:MCPU, cuda:ARCH choose a model)")
    return TARGETS[kind](detail) if detail else TARGETS[kind]()
