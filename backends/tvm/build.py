"""Relax module to library: TVM's pipeline for the target, and a runner for use in the compiling process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax
from wasat.ir import Graph, IRError, Program, WasatError, evaluate_dim
from wasat.ir.evaluate import bind_symbols

from .lower import WeightPlan, lower_program
from .narrow import carried, uncarried
from .targets import Target


class BuildError(WasatError):
    """The target's tools refuse: no C compiler, an unknown CPU, a failed link."""


@dataclass
class Library:
    """A compiled program before it is written: the executable and the weights it wants."""

    executable: Any
    plan: WeightPlan
    target: Target

    def export(self, path: Path) -> None:
        """Links the shared library at ``path`` (absolute)."""
        with self.target.scope():
            self.executable.export_library(str(path.absolute()), **self.target.link_options())


def check_tools(target: Target) -> None:
    """Says, before the long work, what the link step will miss."""
    if target.needs_compiler and not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
        raise BuildError(
            "linking the compiled library needs a C++ compiler and none of g++, clang++, c++ is on the PATH; "
            "install one (Debian: apt-get install g++) and run again"
        )


def build(
    program: Program, target: Target, states: Sequence[str] = (), on_progress: Callable[[str], None] = lambda what: None
) -> Library:
    """Compiles every graph of ``program`` for ``target``.

    Raises IRError for an operation the target can neither run nor decompose, BuildError for missing tools.
    """
    check_tools(target)
    on_progress("lowering")
    module, plan = lower_program(
        program, target.table(), states, target.state_types(program), target.kernels(target, program)
    )
    on_progress("generating code")
    with target.scope():
        executable = tvm.compile(
            module, target=target.tvm, relax_pipeline=target.pipeline(), tir_pipeline=target.tir_pipeline
        )
    return Library(executable, plan, target)


def run(program: Program, target: Target, graph: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Compiles ``program`` and runs one graph in this process: for tests, and for looking at numbers."""
    return Runner(program, target)(graph, inputs)


_SHARED = {"float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"}
"""Element types that NumPy and TVM can share in memory."""


class Runner:
    """A program compiled and loaded in this process, weights included."""

    def __init__(self, program: Program, target: Target, states: Sequence[str] = (), *, in_place: bool = True) -> None:
        """``in_place``: the program may write into its states, so that they are copied; if not they are read where they are."""
        # TVM reads both when it first starts its threads: by itself it takes half of the CPUs, and pins the caller to one
        os.environ.setdefault("TVM_NUM_THREADS", str(target.threads))
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        self.program, self.states, self.in_place = program, tuple(states), in_place
        self.layouts = target.state_layouts(program)
        library = build(program, target, states)
        self.vm = relax.VirtualMachine(library.executable, tvm.cpu())
        self.weights = [
            tvm.runtime.tensor(array)
            for (name, layout), _ in library.plan.layouts.items()
            for array in layout.pack(program.params[name].load())
        ]

    def __call__(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs of ``graph`` by name. States are copied in and come back among the outputs."""
        g: Graph = self.program[graph]
        arrays = {v.name: np.asarray(inputs[v.name]) for v in g.inputs}
        dims = bind_symbols(g, arrays)
        for node in g.nodes:
            for a, b in node.checks:
                if evaluate_dim(a, dims) != evaluate_dim(b, dims):
                    raise IRError(f"{node!r}: needs {a} == {b}", node.loc)
        laid_out = {n: self.layouts[n].pack(x) if n in self.layouts else x for n, x in arrays.items()}
        ordered = [v.name for v in g.inputs if v.name not in self.states] + [s for s in self.states if s in arrays]
        out = self.vm["".join(c if c.isalnum() or c == "_" else "_" for c in graph)](
            *(tvm.runtime.tensor(carried(np.array(laid_out[n], order="C"))) for n in ordered), *self.weights
        )
        types = dict(zip(g.output_names, g.outputs))
        names = [n for n in g.output_names if n not in self.states] + [n for n in g.output_names if n in self.states]
        results = {n: uncarried(x.numpy(), types[n].tensor.dtype) for n, x in zip(names, out)}
        return {n: self.layouts[n].unpack(x) if n in self.layouts else x for n, x in results.items()}

    def _tensor(self, x: np.ndarray) -> Any:
        """What a compiled function takes: the array's own memory where that may stay and is aligned as the code assumes."""
        fits = x.dtype.name in _SHARED and x.size and x.flags.c_contiguous and x.flags.writeable and x.ctypes.data % 64 == 0
        return tvm.runtime.from_dlpack(x) if fits and not self.in_place else tvm.runtime.tensor(np.array(x, order="C"))
