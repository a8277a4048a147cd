"""The loop: steps, evaluation, checkpoints, log and curve; a run that was killed goes on as if it never had been."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from wasat.backends.tvm.targets import target_named
from wasat.ir import ArrayParam, CheckpointError, IRError, Program, bind_symbols, type_of
from wasat.passes import Inference, PassManager, Remark, RoundWeights

from .bar import Bar
from .checkpoint import Checkpoint, Checkpoints, replacing
from .compiled import Compiled, Devices, specialized
from .curve import write_curve
from .data import Batch, Iterated
from .divergence import Diverged, offender
from .flops import machine_flops, step_flops
from .optimizers import Optimizer, Schedule
from .scaling import LossScale
from .step import TrainStep, train_step

LOG, CURVE = "log.jsonl", "curve.html"
Said = dict[str, float]


@runtime_checkable
class Batches(Protocol):
    """Batches by input name, all of one shape, without end; what ``state`` returns is JSON (:class:`.data.Packed` is one)."""

    def __next__(self) -> Batch: ...

    def state(self) -> Any: ...

    def restore(self, state: Any, /) -> None: ...


class Progress(Protocol):
    """Told after each step: how many are done, of how many, and what the log says of it.

    Whatever the outputs of the graph are named, the loss is ``loss``, that of an evaluation ``eval.loss``.
    """

    def __call__(self, step: int, steps: int, said: Mapping[str, float]) -> None: ...


@dataclass(frozen=True)
class Trained:
    """The end of a run: the program with its trained parameters (averages, where kept), all states, and the log by steps.

    ``remarks``: what the passes over the step did, such as what rematerialization saved.
    """

    program: Program
    states: dict[str, np.ndarray]
    log: list[Said]
    remarks: tuple[Remark, ...]


def train(
    program: Program, batches: Batches | Iterable[Mapping[str, Any]], folder: str | Path, *, steps: int,
    optimizer: Optimizer | None = None, rate: Schedule | None = None, clip: float | None = 1.0, accumulate: int = 1,
    weigh: Literal["places", "calls"] = "places", ema: float | None = None, train: tuple[str, ...] = ("*",),
    graph: str = "loss", precision: str = "f32", scaling: LossScale | None = None, remat: bool = False,
    quantize: str | None = None, seed: int = 0,
    evaluation: Callable[[], Iterable[Batch]] | None = None, evaluate_every: int = 100,
    save_every: int = 100, keep: int = 3, target: str = "cpu", threads: int | None = None, progress: Progress | None = None,
    devices: Devices | None = None,
) -> Trained:  # fmt: skip
    """Trains the parameters of ``program`` on @graph, whose first output is the loss, up to step ``steps``.

    ``batches``: :class:`Batches`, or any iterable of arrays by input name (:class:`.data.Iterated`).
    The options up to ``remat`` are :func:`.step.train_step`'s, ``remat`` at the sizes of the batches. ``quantize``: steps and
    evaluation see weights as they are once stored in this scheme (:class:`wasat.passes.RoundWeights`); what is kept is f32, to
    be compiled with the same ``quantize=``. ``folder`` receives
    checkpoints, every ``save_every`` steps and at evaluations that are the best so far (the last ``keep``, and the best),
    ``log.jsonl`` (one line a step) and ``curve.html``. If it has a checkpoint, the run goes on from there: with the same
    arguments every loss and parameter is, bit for bit, what a run never stopped would have had.
    An input of @graph named ``key`` that batches lack gets (seed, step): fresh dropout in each step. ``evaluation()`` makes the
    same batches every time; its mean of @graph's outputs, without dropout, is logged as ``eval.<output>`` (a ``key`` that more
    than dropout reads is (seed, 0) there).

    Logged per step: the step's outputs, ``tokens_per_second`` (elements of the batch's first input), ``utilisation``: the
    counted operations (:func:`.flops.step_flops`) per second, relative to NumPy's matrix product on this machine. The time is
    that from the end of the step before: making the batch and ``progress`` are in it, evaluating and writing are not. In
    ``log.jsonl``, which is JSON, numbers that are not finite are the texts "NaN", "Infinity" and "-Infinity".

    ``target``: cpu, or a device that ``devices`` runs (``wasat.train`` gives those that this machine has): its states pass
    through this machine's memory in each step, and its sums have another order, so that a run goes on with the same bits on the
    same device alone.

    Raises Diverged, with step and node, when the loss or the gradients' norm is not finite, in f16 the latter only where no
    scale of the loss helps (the log has ``skipped`` and ``loss_scale``), and before a checkpoint would hold a state that is
    not; CheckpointError where ``folder`` holds another run (it says what differs), where another process trains in it, and
    where it cannot be written; IRError for batches that do not fit @graph, and what train_step and the compiler raise.
    """
    if steps < 1 or evaluate_every < 1 or save_every < 1 or keep < 1:
        raise IRError("steps, evaluate_every, save_every and keep must be at least 1")
    run = _Run(Path(folder), program, graph, seed, Checkpoints(Path(folder), keep))
    rounding: list[Remark] = []
    if quantize is not None:
        program = program.copy()
        rounding = PassManager([RoundWeights(quantize, graph=graph)]).run(program).remarks()
    if not isinstance(batches, Batches):
        batches = Iterated(batches)
    start_of_data = batches.state()
    first = next(batches)
    batches.restore(start_of_data)
    sample = run.complete(first, 0)
    fixed = specialized(program[graph], {**sample})
    sizes = bind_symbols(program[graph], {**sample}) if remat else None
    made = train_step(
        program, optimizer=optimizer, rate=rate, clip=clip, accumulate=accumulate, weigh=weigh, ema=ema, train=train,
        graph=graph, precision=precision, scaling=scaling, remat=sizes,
    )  # fmt: skip
    remarks = (*rounding, *made.remarks)
    about: dict[str, Any] = {
        "seed": seed, "graph": str(made.program["train_step"]), "model": sha256(str(run.program[graph]).encode()).hexdigest(),
        "batch": {k: f"{x.dtype}{list(x.shape)}" for k, x in first.items()},
        "options": {
            "optimizer": _text(optimizer), "rate": _text(rate), "clip": clip, "accumulate": accumulate, "weigh": weigh,
            "ema": ema, "train": list(train), "precision": precision, "scaling": str(scaling), "remat": remat,
            "quantize": quantize,
        },
    }  # fmt: skip
    with run.alone():
        run.refuse_another(about)
        found = run.checkpoints.load(made.states)
        start, states = 0, made.states
        log: list[Said] = []
        if found is not None:
            start, states, log = run.resumed(found, steps)
            batches.restore(found.more["data"])
        elif (run.folder / LOG).exists():
            (run.folder / LOG).unlink()
        evaluated = graph if evaluation is not None else None
        compiled = Compiled(program, made, sample, target_named(target, threads), evaluated, devices)
        flops = step_flops(fixed, made.states)
        peak, tokens = machine_flops(), next(iter(first.values())).size
        bar = Bar() if progress is None else None
        tell = progress or bar
        assert tell is not None
        params = {k: v.load() for k, v in made.program.params.items()}
        loss = program[graph].output_names[0]
        scores = [line.get(f"eval.{loss}", math.inf) for line in log]
        best = min((x for x in scores if not math.isnan(x)), default=math.inf)
        try:
            began = time.perf_counter()
            for step in range(start + 1, steps + 1):
                batch = run.complete(next(batches), step)
                said, after = compiled.step(batch, states)
                took = time.perf_counter() - began
                began += took
                line: Said = {"step": step, **{k: float(v) for k, v in said.items() if v.ndim == 0}}
                line |= {"tokens_per_second": tokens / took, "utilisation": flops / took / peak}
                overflow = not math.isfinite(line["grad_norm"]) and line.get("loss_scale", 1.0) <= 1
                if overflow or not math.isfinite(line[loss]):
                    spoilt = "grad_norm" if math.isfinite(line[loss]) else loss
                    why = offender(compiled.plain["train_step"], {**batch, **states}, params, spoilt)
                    raise Diverged(f"step {step}: the loss is {line[loss]}, the gradients' norm {line['grad_norm']}; {why}")
                states = after
                last = step == steps
                paused = time.perf_counter()
                if evaluation is not None and (last or step % evaluate_every == 0):
                    line |= run.evaluated(compiled, evaluation(), states)
                log.append(line)
                score, saves = line.get(f"eval.{loss}"), last or step % save_every == 0
                if score is not None and score < best:
                    best, saves = score, True
                if saves:
                    _check_finite(states, step)
                run.note(line, durable=saves)
                if saves:  # log and curve reach as far as the checkpoint
                    run.draw(log, remarks)
                    run.checkpoints.save(step, states, score=score, more={**about, "data": batches.state()})
                began += time.perf_counter() - paused
                tell(step, steps, {**line, "loss": line[loss], **({} if score is None else {"eval.loss": score})})
        finally:
            if bar is not None:
                bar.close()
    trained = run.trained(made, states)
    trained.origin = replace(trained.origin, rounded=quantize)
    return Trained(trained, states, log, remarks)


@dataclass(frozen=True)
class _Run:
    folder: Path
    program: Program
    graph: str
    seed: int
    checkpoints: Checkpoints

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The folder is this process's, until it ends in whatever way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"another process trains in {self.folder}; wait for its end, or choose another folder"
                ) from None
            yield
        finally:
            os.close(held)

    def complete(self, batch: Batch, step: int) -> Batch:
        """The batch, and the key of the step where the graph wants one."""
        wants = any(v.name == "key" for v in self.program[self.graph].inputs)
        return {**batch, "key": np.array([self.seed, step], np.uint32)} if wants and "key" not in batch else batch

    def refuse_another(self, about: Mapping[str, Any]) -> None:
        """Raises CheckpointError, with what differs, if the folder holds a run of another kind."""
        there = {**about, **(self.checkpoints.more() or {})}
        if any(there[k] != x for k, x in about.items() if k != "options"):  # these only say what made another step
            other = _differences(there, about)
            raise CheckpointError(f"{self.folder} holds another run: {other}; choose another folder, or remove it")

    def resumed(self, found: Checkpoint, steps: int) -> tuple[int, dict[str, np.ndarray], list[Said]]:
        """Step, states and log of the checkpoint; what the log has beyond it is cut off."""
        if found.step > steps:
            raise CheckpointError(f"{self.folder} holds a run that is at step {found.step}, past the {steps} asked for")
        log = []
        path = self.folder / LOG
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                line = _from_json(text)
            except ValueError:  # the kill came while it was written
                break
            if line["step"] > found.step:
                break
            log.append(line)
        with replacing(path) as f:
            f.write("".join(_to_json(line) + "\n" for line in log).encode())
        return found.step, found.states, log

    def evaluated(self, compiled: Compiled, batches: Iterable[Batch], states: Mapping[str, np.ndarray]) -> Said:
        each = [compiled.loss(self.complete(b, 0), states) for b in batches]
        if not each:
            raise IRError("evaluation() made no batch")
        return {f"eval.{k}": float(np.mean([x[k] for x in each])) for k in each[0] if each[0][k].ndim == 0}

    def note(self, line: Said, durable: bool) -> None:
        """Adds a line to the log; ``durable``: it is on the disk when this returns."""
        path = self.folder / LOG
        try:
            with open(path, "a") as out:
                out.write(_to_json(line) + "\n")
                if durable:
                    out.flush()
                    os.fsync(out.fileno())
        except OSError as e:
            raise CheckpointError(f"{path} cannot be written: {e.strerror}") from e

    def draw(self, log: list[Said], remarks: Iterable[Remark]) -> None:
        loss = self.program[self.graph].output_names[0]
        series = {k: [(int(line["step"]), line[k]) for line in log if k in line] for k in (loss, f"eval.{loss}")}
        write_curve(self.folder / CURVE, self.program.interface.name or loss, series, [str(r) for r in remarks])

    def trained(self, step: TrainStep, states: Mapping[str, np.ndarray]) -> Program:
        """The program as it is served: with what was learnt, and without dropout and its key."""
        params = dict(self.program.params)
        for name in params.keys() & states.keys():
            x = states[step.averages.get(name, name)]
            params[name] = ArrayParam(x, type_of(x))
        made = replace(self.program.copy(), params=params)
        PassManager([Inference()]).run(made)
        return made


def _check_finite(states: Mapping[str, np.ndarray], step: int) -> None:
    """Raises Diverged for a state that an update spoilt, though loss and gradients, which every step looks at, are finite."""
    spoilt = [k for k, x in states.items() if x.dtype.kind == "f" and not np.isfinite(x).all()]
    if spoilt:
        names = ", ".join(spoilt[:3]) + ", …" * (len(spoilt) > 3)
        raise Diverged(
            f"step {step}: {names} hold what is not finite, and loss and gradients do not: an update since the last checkpoint "
            "made it; are rate and the optimizer's eps in range?"
        )


def _to_json(line: Said) -> str:
    """A line of the log; numbers that JSON lacks are texts that ``float`` reads."""
    texts = {math.inf: "Infinity", -math.inf: "-Infinity"}
    return json.dumps({k: x if math.isfinite(x) else texts.get(x, "NaN") for k, x in line.items()}, allow_nan=False)


def _from_json(text: str) -> Said:
    return {k: float(x) if isinstance(x, str) else x for k, x in json.loads(text).items()}


def _text(made: object) -> str:
    """An optimizer or a schedule in words, the same in every process: of a function no address."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(made))


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What another run was made of, and what this one is."""
    there, here = (
        {"seed": x["seed"], **x["options"], **{f"batch input {k}": v for k, v in x["batch"].items()}} for x in (was, now)
    )
    said = [f"{k} was {there.get(k)}, and is {here.get(k)}" for k in {**there, **here} if there.get(k) != here.get(k)]
    if was["model"] != now["model"]:
        said.append("the model or the loss is another")
    own = "this version of Wasat, or an optimizer or rate of your own, makes another step of the same model"
    return ", ".join(said) or own
