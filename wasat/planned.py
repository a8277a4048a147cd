"""Programs for devices of launch plans, run in the compiling process: for tests, and for looking at numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from wasat.backends.tvm.build import fitting, plan
from wasat.backends.tvm.layouts import Layout
from wasat.backends.tvm.ops.indices import given
from wasat.backends.tvm.ops.low_precision import carried, uncarried
from wasat.backends.tvm.targets import Target
from wasat.ir import Array, Graph, Program
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
        self._plan = made.plan
        packed = {key: self._packed(key, program.load) for key in made.plan.layouts}
        self.weights = {g: [x for key in made.plan.reads.get(g, ()) for x in packed[key]] for g in program.graphs}
        self._given_indices = {name: given(g) for name, g in program.graphs.items()}

    def _packed(self, key: tuple[str, Layout], load: Callable[[str], Array]) -> list[Any]:
        """The buffers that a parameter becomes in one layout."""
        pairs = zip(self._plan.layouts[key], key[1].pack(load(key[0])), strict=True)
        return [self.host.memory.buffer_of(np.asarray(x), a.dtype, f"weight {a.name}") for a, x in pairs]

    def set_weights(self, graph: str, load: Callable[[str], Array]) -> None:
        """Other numbers, of the same types, for all parameters that ``graph`` reads: ``load`` gives them by name."""
        self.weights[graph] = [x for key in self._plan.reads.get(graph, ()) for x in self._packed(key, load)]

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
                found[n] = self.layouts[n].unpack(uncarried(buffers[n].numpy(), self.layouts[n].type.dtype))
        return found

    def _buffer(self, name: str, x: np.ndarray) -> Any:
        laid_out = self.layouts[name].pack(x) if name in self.layouts else x
        array = carried(np.asarray(laid_out, order="C"))
        return self.host.memory.buffer_of(array, array.dtype.name, f"input {name}")
