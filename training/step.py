"""A training step as one program: forward, loss, backward, clipping, update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from wasat.ir import Builder, DType, Graph, Interface, IRError, Program, State, TensorType, Value, copy_node
from wasat.passes import Cleanup, Differentiate, MixedPrecision, Pass, PassManager, Remark, Rematerialize

from .optimizers import AdamW, Constant, Optimizer, Schedule, clipped, global_norm
from .places import Places, places
from .scaling import GOOD, SCALE, SKIPPED, LossScale

COUNT = "optimizer.count"
PLACES = "optimizer.places"
DIVISOR = "optimizer.divisor"
_LEARNED = "optimizer.loss"
_KEPT = (COUNT, PLACES, DIVISOR, SCALE, GOOD, SKIPPED, _LEARNED)


@dataclass(frozen=True)
class TrainStep:
    """A program whose @train_step maps a batch and the states to the loss and the new states, and the states to begin with.

    States go in and come out under the same names, those of ``program.interface``. Those ``donated`` there a backend
    writes over the old ones. Nothing is lost with these: a call whose loss or gradients are not finite leaves every donated
    state as it was, to the bit, so that such a step can be run once more to see where it went wrong.
    They are the trained parameters under their own names, ``optimizer.<slot>.<parameter>``, ``optimizer.count`` (calls so far,
    i64[]), where asked for ``ema.<parameter>`` and ``optimizer.sum.<parameter>``, and in f16 those of :mod:`.scaling`. Where a
    parameter is called like such a state, that of another has its first word once more.
    ``remarks``: what the passes did, such as what rematerialization saved.
    """

    program: Program
    states: dict[str, np.ndarray]
    remarks: tuple[Remark, ...] = ()
    averages: Mapping[str, str] = field(default_factory=dict)
    """The state that is a parameter's average, by parameter, where averages are kept."""


def train_step(
    program: Program, *, optimizer: Optimizer | None = None, rate: Schedule | None = None, clip: float | None = None,
    accumulate: int = 1, weigh: Literal["places", "calls"] = "places", ema: float | None = None,
    train: tuple[str, ...] = ("*",), graph: str = "loss",
    precision: str = "f32", scaling: LossScale | None = None, remat: Mapping[str, int] | None = None,
) -> TrainStep:  # fmt: skip
    """One step of training on @graph, whose first output is the loss.

    @train_step takes the inputs of @graph and the states; it returns the outputs of @graph, ``grad_norm`` (before clipping)
    and ``rate``, both f32[], then the states. ``train``: globs of the parameters to train, which must be f32; others stay
    parameters. ``clip``: largest global norm of the gradients. ``accumulate``: updates happen at every so many calls, with the
    mean of the gradients since the last one; in between, parameters stay. Of a loss that is a mean over places that data
    choose, as :func:`.losses.cross_entropy` is, that is the mean over the places of all these calls: k calls are one of the
    batches together (:func:`.places.places`). Of any other loss, and with ``weigh="calls"`` of any, each call counts the same.
    ``ema``: keeps an average of the parameters that
    moves by the share 1 - ema at each update. Defaults: AdamW, a constant rate of 1e-3. ``program`` stays as it is.

    ``precision``: ``"bf16"`` or ``"f16"`` for activations and products (:class:`wasat.passes.MixedPrecision`);
    parameters and states stay f32. In f16 the loss is scaled (``scaling``, by default LossScale()): an update whose gradients
    overflow is left out, as if it had not been; the step also returns ``skipped`` (1 for such a call, else 0) and
    ``loss_scale``, both f32[]. ``remat``: sizes of the symbols of @graph; the step computes again what is cheap, where that
    lowers the peak of memory at these sizes (:class:`wasat.passes.training.remat.Rematerialize`).

    Raises IRError for a parameter of another type, for options out of range, and for ``accumulate`` of a loss that adds means
    over different places, by different divisors, or by what is no count; what Differentiate and Rematerialize raise.
    """
    if accumulate < 1 or (clip is not None and clip <= 0) or (ema is not None and not 0 <= ema < 1):
        raise IRError(f"accumulate={accumulate}, clip={clip}, ema={ema}: needed are accumulate >= 1, clip > 0, 0 <= ema < 1")
    if weigh not in ("places", "calls"):
        raise IRError(f"weigh={weigh!r}: calls count by their places, or all alike (calls)")
    if precision not in ("f32", "bf16", "f16") or (scaling is not None and precision != "f16"):
        raise IRError(f"precision={precision!r}, scaling={scaling}: a precision is f32, bf16 or f16; only f16 has a scaling")
    made = Program({graph: program[graph].clone()}, dict(program.params), origin=program.origin)
    report = PassManager([MixedPrecision(graph, precision)] if precision != "f32" else []).run(made)
    inputs, outputs = [v.name for v in made[graph].inputs], tuple(made[graph].output_names)
    if own := [k for k in outputs if k.startswith("grad.")]:
        raise IRError(f"outputs of @{graph} named {', '.join(own)}: gradients are called so; rename them")
    if precision == "f16":
        scaling = scaling or LossScale()
    differentiate = Differentiate(graph, train, into="train_step")
    over = places(made[graph], differentiate.chosen(made[graph])) if accumulate > 1 and weigh == "places" else None
    if _learned(made[graph], over, scaling):
        differentiate = replace(differentiate, of=_LEARNED)
    PassManager([differentiate]).run(made)
    if chosen := [k for k in inputs if k in train]:
        raise IRError(f"train= names inputs of @{graph}: {', '.join(chosen)}; only parameters are trained")
    step = _Step(made["train_step"], optimizer or AdamW(), rate or Constant(1e-3), clip, accumulate, weigh, ema, scaling)
    said = ("grad_norm", "rate", *(("skipped", "loss_scale") if scaling else ()))
    if own := [k for k in step.source.params if k in _KEPT or (k in said and k in step.trained)]:
        raise IRError(f"parameters of @{graph} named {', '.join(own)}: what a step says or keeps is called so; rename them")
    step.emit()
    trained = {k: np.asarray(program.params[k].load()) for k in step.trained}
    states = {k: step.initial(k, trained) for k in step.states}
    params = {k: v for k, v in program.params.items() if k in step.graph.params}
    kept = tuple(State.trained(k, k in step.donated) for k in states)
    result = Program({"train_step": step.graph}, params, Interface(program.interface.name, states=kept), program.origin)
    passes: list[Pass] = [Cleanup()]
    if remat is not None:
        passes.append(Rematerialize("train_step", tuple(remat.items()), outputs))
    remarks = [*report.remarks(), *PassManager(passes).run(result).remarks()]
    return TrainStep(result, states, tuple(remarks), step.averages)


def _learned(g: Graph, over: Places | None, scaling: LossScale | None) -> bool:
    """Adds an output to learn from where that is not the loss: of calls that are accumulated what stands beside a mean has
    the share by which this call adds to the divisor of all, as its gradients are weighed by its own; and times the scale."""
    b, loss = Builder(g), g.outputs[0]
    if over is not None and over.beside:
        total = b.add(g.add_input(PLACES, TensorType(DType.F32, ())), _number(b, over.count))
        whole = over.over(g, g, total, {})
        more = b.sub(_number(b, whole), g.add_input(DIVISOR, TensorType(DType.F32, ())))
        loss = over.shared(g, b.div(more, _number(b, over.divisor)))
    if scaling is not None:
        loss = b.mul(loss, g.add_input(SCALE, TensorType(DType.F32, ())))
    if loss is g.outputs[0]:
        return False
    g.set_outputs([*g.outputs, loss], [*g.output_names, _LEARNED])
    return True


def _number(b: Builder, v: Value) -> Value:
    return b.reshape(b.cast(v, dtype=DType.F32), shape=())


class _Step:
    """The graph of a step in the making, from that of the gradients."""

    def __init__(
        self, source: Graph, optimizer: Optimizer, rate: Schedule, clip: float | None, accumulate: int, weigh: str,
        ema: float | None, scaling: LossScale | None,
    ) -> None:  # fmt: skip
        self.source, self.optimizer, self.rate = source, optimizer, rate
        self.clip, self.accumulate, self.ema, self.scaling = clip, accumulate, ema, scaling
        names = dict(zip(source.output_names, source.outputs))
        self.trained = {n.removeprefix("grad."): v for n, v in names.items() if n.startswith("grad.")}
        """Gradients in the source by parameter."""
        self.places = places(source, self.trained) if accumulate > 1 and weigh == "places" else None
        """What the loss is a mean over, if it is one."""
        self.graph = Graph("train_step")
        self.b = Builder(self.graph)
        self.states: dict[str, Value] = {}
        """Every state as it goes in."""
        self.averages: dict[str, str] = {}
        """The state that is a parameter's average, by parameter."""
        self.sums: dict[str, str] = {}
        """The state in which a parameter's gradients add up."""
        self.donated: set[str] = set()

    def emit(self) -> None:
        source, g, b = self.source, self.graph, self.b
        env = {v: self._state(v.name, v.tensor) if v.name in _KEPT else g.add_input(v.name, v.type) for v in source.inputs}
        for name, v in source.params.items():
            if name not in self.trained:
                env[v] = g.add_param(name, v.type)
            elif v.tensor.dtype is not DType.F32:
                raise IRError(f"parameter {name} is {v.type}: train_step updates f32 parameters (train= chooses them)")
            else:
                env[v] = self._state(name, v.tensor)
        slots = {name: self._slots(self.states[name]) for name in self.trained}
        calls = self._state(COUNT, TensorType(DType.I64, ()))
        if self.places is not None and PLACES not in self.states:
            self._state(PLACES, TensorType(DType.F32, ()))
        if self.scaling is not None:
            for name in (GOOD, SKIPPED):
                self._state(name, TensorType(DType.I64, ()))
        for node in source.nodes:
            copy_node(g, node, env)
        grads = {name: env[v] for name, v in self.trained.items()}
        if self.scaling is not None:
            grads = {k: b.div(v, self.states[SCALE]) for k, v in grads.items()}
        new: dict[str, Value] = {COUNT: b.add(calls, 1)}
        due = None
        sums = grads
        totals: dict[str, Value] = {}
        if self.accumulate > 1:
            due = b.equal(b.mod(new[COUNT], self.accumulate), 0)
        if self.places is not None:  # the sum itself adds up, as a call may count nothing, or less than its divisor is held to
            total = b.add(self.states[PLACES], _number(b, env[self.places.count]))
            whole, own = _number(b, self.places.over(g, source, total, env)), _number(b, env[self.places.divisor])
            totals = {PLACES: total} | ({DIVISOR: whole} if DIVISOR in self.states else {})
            sums = {k: b.add(self.states[self.sums[k]], b.mul(v, own)) for k, v in grads.items()}
            grads = {k: b.div(v, b.select(b.not_equal(whole, 0.0), whole, b.constant(1.0))) for k, v in sums.items()}
        elif due is not None:
            share = float(self.accumulate)
            sums = grads = {k: b.add(self.states[self.sums[k]], b.div(v, share)) for k, v in grads.items()}
        norm = global_norm(b, list(grads.values()))
        size = b.abs(env[source.outputs[0]])
        sound = b.logical_and(b.less(norm, float("inf")), b.less(size, float("inf")))  # no NaN is
        if due is not None:
            for name, v in ({self.sums[k]: v for k, v in sums.items()} | totals).items():
                new[name] = b.select(due, b.constant(0.0), v)
                if self.scaling is None:  # else a sum takes up an overflow, so that its update is left out
                    new[name] = b.select(sound, new[name], self.states[name])
                    self.donated.add(name)
        if self.clip is not None:
            grads = clipped(b, grads, norm, self.clip)
        updates = b.floor_div(calls, self.accumulate) if due is not None else calls
        said: dict[str, Value] = {}
        if self.scaling is not None:
            updates, due, said = self._scaled(norm, updates, due, new)
        due = sound if due is None else b.logical_and(due, sound)
        updates = b.cast(updates, dtype=DType.F32)
        rate, number = self.rate(b, updates), b.add(updates, 1.0)
        for name, grad in grads.items():
            p = self.states[name]
            changed, remembered = self.optimizer.update(b, p, grad, slots[name], rate, number)
            moved = {name: changed, **{slots[name][k].name: v for k, v in remembered.items()}}
            if self.ema is not None:
                average = self.states[self.averages[name]]
                moved[average.name] = b.add(average, b.mul(b.sub(changed, average), 1 - self.ema))
            new |= {k: b.select(due, v, self.states[k]) for k, v in moved.items()}
            self.donated |= moved.keys()
        named = zip(source.output_names, source.outputs)
        outputs = {n: env[v] for n, v in named if not n.startswith("grad.") and n != _LEARNED}
        more = {"grad_norm": norm, "rate": rate, **said, **{k: new[k] for k in self.states}}
        if taken := sorted(outputs.keys() & more.keys()):
            raise IRError(f"@train_step has outputs of its own named {', '.join(taken)}; rename those of the loss graph")
        g.set_outputs([*outputs.values(), *more.values()], [*outputs, *more])

    def _scaled(
        self, norm: Value, updates: Value, due: Value | None, new: dict[str, Value]
    ) -> tuple[Value, Value, dict[str, Value]]:
        """With a loss scale: the updates made so far, whether this call makes one, what to say. New states go to ``new``."""
        assert self.scaling is not None
        b, scale, good, skipped = self.b, *(self.states[k] for k in (SCALE, GOOD, SKIPPED))
        finite = b.less(norm, float("inf"))  # no NaN is
        overflow = b.logical_not(finite) if due is None else b.logical_and(due, b.logical_not(finite))
        after = dict(zip((SCALE, GOOD), self.scaling.update(b, scale, good, finite)))
        new |= after if due is None else {k: b.select(due, v, self.states[k]) for k, v in after.items()}
        new[SKIPPED] = b.add(skipped, b.cast(overflow, dtype=DType.I64))
        said = {"skipped": b.cast(overflow, dtype=DType.F32), "loss_scale": scale}
        return b.sub(updates, skipped), finite if due is None else b.logical_and(due, finite), said

    def _state(self, name: str, type: TensorType) -> Value:
        self.states[name] = self.graph.add_input(name, type)
        return self.states[name]

    def _own(self, kind: str, p: Value, type: TensorType | None = None) -> Value:
        """A state that belongs to a parameter; a module may have an attribute of any name."""
        name = f"{kind}.{p.name}"
        while name in self.source.params or name in self.states or name in _KEPT:
            name = f"{kind}.{name}"
        return self._state(name, type or p.tensor)

    def _slots(self, p: Value) -> dict[str, Value]:
        """The states that belong to one parameter; returns the optimizer's."""
        if self.accumulate > 1:
            self.sums[p.name] = self._own("optimizer.sum", p).name
        if self.ema is not None:
            self.averages[p.name] = self._own("ema", p).name
        return {slot: self._own(f"optimizer.{slot}", p, t) for slot, t in self.optimizer.slots(p).items()}

    def initial(self, state: str, trained: Mapping[str, np.ndarray]) -> np.ndarray:
        """What a state begins with: parameters and their averages as they are, the scale of the loss, the rest zero."""
        if self.scaling is not None and state == SCALE:
            return np.array(self.scaling.initial, np.float32)
        parameters = {k: k for k in self.trained} | {v: k for k, v in self.averages.items()}
        if state in parameters:
            return trained[parameters[state]]
        t = self.states[state].tensor
        return np.zeros(t.concrete({}), t.dtype.np)
