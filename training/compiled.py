"""The programs of a training run for one size of batch, compiled: the step, and the loss alone for evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import Target
from wasat.ir import Graph, IRError, Program, bind_symbols, copy_node
from wasat.passes import PassManager, default_pipeline

from .step import TrainStep

Arrays = Mapping[str, np.ndarray]


class Compiled:
    """@train_step and @loss of a run; both take a batch and states as arrays."""

    def __init__(self, program: Program, made: TrainStep, batch: Arrays, target: Target, graph: str) -> None:
        step = made.program["train_step"]
        self.plain = Program({"train_step": specialized(step, {**batch, **made.states})}, made.program.params)
        """The step as it was declared, before any pass but the gradients: what the interpreter runs to explain a failure."""
        loss = _with_states(program[graph], made)
        both = {"train_step": self.plain["train_step"].clone(), "loss": specialized(loss, {**batch, **made.states})}
        compiled = Program(both, {**program.params, **made.program.params}, {"states": made.program.metadata["states"]})
        for g in both.values():
            g.prune_params()
        passes = [p for p in default_pipeline(kv_cache=None) if p.name not in ("merge-linears", "hoist-params")]
        PassManager(passes, verify=False).run(compiled)
        self._runner = Runner(compiled, target, list(made.states), donate=True)
        self._states = list(made.states)
        self._read = [v.name for v in both["loss"].inputs]

    def step(self, batch: Arrays, states: Arrays) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """One step: what it says of itself (loss, grad_norm, rate, …), and the new states; the old ones stay as they are."""
        out = self._runner("train_step", {**batch, **states})
        return {k: v for k, v in out.items() if k not in states}, {k: out[k] for k in self._states}

    def loss(self, batch: Arrays, states: Arrays) -> dict[str, np.ndarray]:
        """The outputs of the loss graph with the parameters in ``states`` (their averages, where the run keeps averages)."""
        averaged = {k: states.get(f"ema.{k}", v) for k, v in states.items()}
        given = {**batch, **averaged}
        return self._runner("loss", {k: given[k] for k in self._read})


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
