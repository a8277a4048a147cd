"""Programs for devices of launch plans, run in the compiling process: for tests, and for looking at numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from wasat.backends.tvm.build import fitting, plan
from wasat.backends.tvm.ops.indices import given
from wasat.backends.tvm.ops.narrow import carried, uncarried
from wasat.backends.tvm.targets import Target
from wasat.ir import Graph, Program
from wasat.runtime.hosts.host import Host
from wasat.runtime.hosts.open import open_machine
from wasat.runtime.hosts.plan import Plan


class PlanRunner:
    """A program compiled to a launch plan and loaded in this process, weights included."""

    def __init__(self, program: Program, target: Target) -> None:
        self.program, self.states = program, program.interface.state_names
        self.layouts = target.state_layouts(program)
        made = plan(program, target)
        read = Plan(made.launches.json, made.code)
        self.host = Host(read, open_machine(str(target.config["kind"]), read.needs))
        packed: dict[str, Any] = {}
        for (name, layout), arrays in made.plan.layouts.items():
            for a, x in zip(arrays, layout.pack(program.load(name)), strict=True):
                packed[a.name] = self.host.memory.buffer_of(np.asarray(x), a.dtype, f"weight {a.name}")
        self.weights = {g: [packed[a.name] for a in made.plan.of(g)] for g in program.graphs}
        self._given_indices = {name: given(g) for name, g in program.graphs.items()}

    def __call__(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs of ``graph`` by name, states among them."""
        g: Graph = self.program[graph]
        arrays = fitting(g, inputs, self._given_indices[graph])
        ordered = [v.name for v in g.inputs if v.name not in self.states] + [s for s in self.states if s in arrays]
        buffers = {n: self._buffer(n, arrays[n]) for n in ordered}
        out = self.host.function(graph)(*buffers.values(), *self.weights[graph])
        names = [n for n in g.output_names if n not in self.states]
        types = dict(zip(g.output_names, g.outputs))
        found = {n: uncarried(x, types[n].tensor.dtype) for n, x in zip(names, out)}
        for n in g.output_names:
            if n in self.states:
                found[n] = self.layouts[n].unpack(uncarried(buffers[n].numpy(), types[n].tensor.dtype))
        return found

    def _buffer(self, name: str, x: np.ndarray) -> Any:
        laid_out = self.layouts[name].pack(x) if name in self.layouts else x
        array = carried(np.asarray(laid_out, order="C"))
        return self.host.memory.buffer_of(array, array.dtype.name, f"input {name}")
