"""The programs of a training run for one size of batch, compiled: the step, and the loss without dropout for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from wasat.backends.tvm.build import BuildError, Runner, check_tools, plan
from wasat.backends.tvm.targets import Target
from wasat.ir import Graph, Interface, IRError, Program, bind_symbols, copy_node
from wasat.passes import Inference, PassManager, default_pipeline

from .step import TrainStep

Arrays = Mapping[str, np.ndarray]


class Running(Protocol):
    """A compiled program, as :class:`wasat.backends.tvm.build.Runner`."""

    program: Program

    def __call__(self, graph: str, inputs: Arrays) -> dict[str, np.ndarray]: ...


class Devices(Protocol):
    """Who runs the programs of targets that are launch plans; training knows of no device itself."""

    def lacking(self, target: Target) -> str | None:
        """What this machine lacks to run code for ``target``, in words; None: nothing."""

    def runner(self, program: Program, target: Target) -> Running:
        """The program, compiled and on the device."""


class Compiled:
    """@train_step and @loss of a run; both take a batch and states as arrays.

    A step writes the new states over those that the last one returned (``made`` says which can be): nothing is allocated
    between steps, and of states there is one copy. It reads states from elsewhere, a checkpoint's, and leaves them alone.
    """

    def __init__(
        self, program: Program, made: TrainStep, batch: Arrays, target: Target, graph: str | None,
        devices: Devices | None = None,
    ) -> None:  # fmt: skip
        """``graph``: that of the loss in ``program``; None where nobody will ask for :meth:`loss`.

        Raises BuildError for a target whose programs are launch plans where ``devices`` (None: there are none) lack something,
        once the step is compiled for it.
        """
        step = made.program["train_step"]
        self.plain = Program({"train_step": specialized(step, {**batch, **made.states})}, made.program.params)
        """The step as it was declared, before any pass but the gradients: what the interpreter runs to explain a failure."""
        graphs = {"train_step": self.plain["train_step"].clone()}
        if graph is not None:
            loss = Program({"loss": specialized(_with_states(program[graph], made), {**batch, **made.states})})
            PassManager([Inference()], verify=False).run(loss)
            graphs |= loss.graphs
        compiled = Program(graphs, {**program.params, **made.program.params}, Interface(states=made.program.interface.states))
        for g in graphs.values():
            g.prune_params()
        passes = [p for p in default_pipeline(kv_cache=None) if p.name not in ("merge-linears", "hoist-params")]
        PassManager(passes, verify=False).run(compiled)
        self._states = list(made.states)
        self._averages = made.averages
        if target.device is None:
            self._runner: Running = Runner(compiled, target, donate=True)
            return
        check_tools(target)
        lacking = "a host for such devices" if devices is None else devices.lacking(target)
        if lacking is not None:
            step_plan = plan(Program({"train_step": compiled["train_step"]}, compiled.params, compiled.interface), target)
            count = len(step_plan.launches.json["kernels"])
            raise BuildError(
                f"@train_step compiles for {target.name} ({count} kernels, {len(step_plan.code):,} bytes), but nothing runs "
                f"it here: that needs {lacking}. Leave the target out, or write cpu"
            )
        assert devices is not None
        self._runner = devices.runner(compiled, target)

    def step(self, batch: Arrays, states: Arrays) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """One step: what it says of itself (loss, grad_norm, rate, …), and the new states.

        States that the last step returned are given up to this one; where its loss or gradients are not finite, they stay as
        they are. States of any other origin stay in any case.
        """
        out = self._runner("train_step", {**batch, **states})
        return {k: v for k, v in out.items() if k not in states}, {k: out[k] for k in self._states}

    def loss(self, batch: Arrays, states: Arrays) -> dict[str, np.ndarray]:
        """The outputs of the loss graph, which drops nothing, with the parameters in ``states`` (averages, where kept)."""
        averaged = {k: states[self._averages.get(k, k)] for k in states}
        given = {**batch, **averaged}
        return self._runner("loss", {v.name: given[v.name] for v in self._runner.program["loss"].inputs})


def specialized(graph: Graph, arrays: Arrays) -> Graph:
    """``graph`` for the sizes of these inputs alone: loops of known length are scheduled better.

    Raises IRError for an input that is missing or does not fit, and for a symbol that no input's shape determines.
    """
    missing = [v.name for v in graph.inputs if v.name not in arrays]
    if missing:
        raise IRError(f"@{graph.name} has inputs that the batches lack: {', '.join(missing)}")
    sizes = bind_symbols(graph, arrays)
    made = Graph(graph.name)
    env = {v: made.add_input(v.name, v.type.substitute(sizes)) for v in graph.inputs}
    env |= {v: made.add_param(name, v.type.substitute(sizes)) for name, v in graph.params.items()}
    for node in graph.nodes:
        operands, names = [env[v] for v in node.inputs], [v.name for v in node.outputs]
        new = made.add_node(node.op, operands, node.attrs.bind(sizes), loc=node.loc, names=names)
        env.update(zip(node.outputs, new.outputs))
    made.set_outputs([env[v] for v in graph.outputs], graph.output_names)
    return made


def _with_states(graph: Graph, made: TrainStep) -> Graph:
    """``graph`` with the trained parameters as inputs."""
    g = Graph("loss")
    env = {v: g.add_input(v.name, v.type) for v in graph.inputs}
    for name, v in graph.params.items():
        env[v] = g.add_input(name, v.type) if name in made.states else g.add_param(name, v.type)
    for node in graph.nodes:
        copy_node(g, node, env)
    g.set_outputs([env[v] for v in graph.outputs], graph.output_names)
    return g
