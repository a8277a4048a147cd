"""A training step as one program: forward, loss, backward, clipping, update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from wasat.ir import Builder, DType, Graph, IRError, Program, TensorType, Value, copy_node
from wasat.passes import Cleanup, Differentiate, PassManager

from .optimizers import AdamW, Constant, Optimizer, Schedule, clipped, global_norm

COUNT = "optimizer.count"


@dataclass(frozen=True)
class TrainStep:
    """A program whose @train_step maps a batch and the states to the loss and the new states, and the states to begin with.

    States go in and come out under the same names, those of ``program.metadata["states"]``: a backend may update them in place.
    They are the trained parameters under their own names, ``optimizer.<slot>.<parameter>``, ``optimizer.count`` (calls so far,
    i64[]), and where asked for ``ema.<parameter>`` and ``optimizer.sum.<parameter>``.
    """

    program: Program
    states: dict[str, np.ndarray]


def train_step(
    program: Program, *, optimizer: Optimizer | None = None, rate: Schedule | None = None, clip: float | None = None,
    accumulate: int = 1, ema: float | None = None, train: tuple[str, ...] = ("*",), graph: str = "loss",
) -> TrainStep:  # fmt: skip
    """One step of training on @graph, whose first output is the loss.

    @train_step takes the inputs of @graph and the states; it returns the outputs of @graph, ``grad_norm`` (before clipping)
    and ``rate``, both f32[], then the states. ``train``: globs of the parameters to train, which must be f32; others stay
    parameters. ``clip``: largest global norm of the gradients. ``accumulate``: updates happen at every so many calls, with the
    mean of the gradients since the last one; in between, parameters stay. ``ema``: keeps an average of the parameters that
    moves by the share 1 - ema at each update. Defaults: AdamW, a constant rate of 1e-3. ``program`` stays as it is.

    Raises IRError for a parameter of another type and for options out of range; what Differentiate raises.
    """
    if accumulate < 1 or (clip is not None and clip <= 0) or (ema is not None and not 0 <= ema < 1):
        raise IRError(f"accumulate={accumulate}, clip={clip}, ema={ema}: needed are accumulate >= 1, clip > 0, 0 <= ema < 1")
    made = Program({graph: program[graph].clone()}, dict(program.params), dict(program.metadata))
    PassManager([Differentiate(graph, train, into="train_step")]).run(made)
    if inputs := [v.name for v in made[graph].inputs if v.name in train]:
        raise IRError(f"train= names inputs of @{graph}: {', '.join(inputs)}; only parameters are trained")
    step = _Step(made["train_step"], optimizer or AdamW(), rate or Constant(1e-3), clip, accumulate, ema)
    step.emit()
    trained = {k: np.asarray(program.params[k].load()) for k in step.trained}
    states = {k: step.initial(k, trained) for k in step.states}
    params = {k: v for k, v in program.params.items() if k in step.graph.params}
    metadata = {**program.metadata, "states": [{"name": k} for k in states]}
    result = Program({"train_step": step.graph}, params, metadata)
    PassManager([Cleanup()]).run(result)
    return TrainStep(result, states)


class _Step:
    """The graph of a step in the making, from that of the gradients."""

    def __init__(
        self, source: Graph, optimizer: Optimizer, rate: Schedule, clip: float | None, accumulate: int, ema: float | None
    ) -> None:
        self.source, self.optimizer, self.rate = source, optimizer, rate
        self.clip, self.accumulate, self.ema = clip, accumulate, ema
        names = dict(zip(source.output_names, source.outputs))
        self.trained = {n.removeprefix("grad."): v for n, v in names.items() if n.startswith("grad.")}
        """Gradients in the source by parameter."""
        self.graph = Graph("train_step")
        self.b = Builder(self.graph)
        self.states: dict[str, Value] = {}
        """Every state as it goes in."""

    def emit(self) -> None:
        source, g, b = self.source, self.graph, self.b
        env = {v: g.add_input(v.name, v.type) for v in source.inputs}
        for name, v in source.params.items():
            if name not in self.trained:
                env[v] = g.add_param(name, v.type)
            elif v.tensor.dtype is not DType.F32:
                raise IRError(f"parameter {name} is {v.type}: train_step updates f32 parameters (train= chooses them)")
            else:
                env[v] = self._state(name, v.tensor)
        slots = {name: self._slots(name, self.states[name].tensor) for name in self.trained}
        count = self._state(COUNT, TensorType(DType.I64, ()))
        for node in source.nodes:
            copy_node(g, node, env)
        grads = {name: env[v] for name, v in self.trained.items()}
        new: dict[str, Value] = {COUNT: b.add(count, 1)}
        due = None
        if self.accumulate > 1:
            due = b.equal(b.mod(new[COUNT], self.accumulate), 0)
            grads = {k: b.add(self.states[f"optimizer.sum.{k}"], b.div(v, float(self.accumulate))) for k, v in grads.items()}
            new |= {f"optimizer.sum.{k}": b.select(due, b.constant(0.0), v) for k, v in grads.items()}
        norm = global_norm(b, list(grads.values()))
        if self.clip is not None:
            grads = clipped(b, grads, norm, self.clip)
        updates = b.cast(b.floor_div(count, self.accumulate) if due is not None else count, dtype=DType.F32)
        rate, number = self.rate(b, updates), b.add(updates, 1.0)
        for name, grad in grads.items():
            p = self.states[name]
            changed, after = self.optimizer.update(b, p, grad, slots[name], rate, number)
            moved = {name: changed, **{f"optimizer.{k}.{name}": v for k, v in after.items()}}
            if self.ema is not None:
                average = self.states[f"ema.{name}"]
                moved[f"ema.{name}"] = b.add(average, b.mul(b.sub(changed, average), 1 - self.ema))
            new |= {k: v if due is None else b.select(due, v, self.states[k]) for k, v in moved.items()}
        outputs = {n: env[v] for n, v in zip(source.output_names, source.outputs) if not n.startswith("grad.")}
        more = {"grad_norm": norm, "rate": rate, **{k: new[k] for k in self.states}}
        if taken := sorted(outputs.keys() & more.keys()):
            raise IRError(f"@train_step has outputs of its own named {', '.join(taken)}; rename those of the loss graph")
        g.set_outputs([*outputs.values(), *more.values()], [*outputs, *more])

    def _state(self, name: str, type: TensorType) -> Value:
        self.states[name] = self.graph.add_input(name, type)
        return self.states[name]

    def _slots(self, name: str, type: TensorType) -> dict[str, Value]:
        """The states that belong to one parameter; returns the optimizer's."""
        if self.accumulate > 1:
            self._state(f"optimizer.sum.{name}", type)
        if self.ema is not None:
            self._state(f"ema.{name}", type)
        return {slot: self._state(f"optimizer.{slot}.{name}", t) for slot, t in self.optimizer.slots(type).items()}

    def initial(self, state: str, trained: Mapping[str, np.ndarray]) -> np.ndarray:
        """What a state begins with: parameters and their averages as they are, the rest zero."""
        parameter = state.removeprefix("ema.")
        if parameter in trained:
            return trained[parameter]
        t = self.states[state].tensor
        return np.zeros(t.concrete({}), t.dtype.np)
