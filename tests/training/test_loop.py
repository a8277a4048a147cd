"""The loop: a run learns, is logged, drawn and evaluated; killed anywhere it resumes bit for bit; a NaN is explained."""

from __future__ import annotations

import errno
import json
import os
import re
import xml.etree.ElementTree
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from wasat.ir import ArrayParam, Builder, Graph, IRError, Program, TensorType, Value, parse, type_of
from wasat.passes import Rematerialize
from wasat.training.blame import Diverged, offender
from wasat.training.checkpoint import CheckpointError, Checkpoints
from wasat.training.compiled import Compiled
from wasat.training.curve import write_curve
from wasat.training.data import Batch, Packed, Source
from wasat.training.flops import step_flops
from wasat.training.loop import Trained, train
from wasat.training.losses import add_loss, cross_entropy
from wasat.training.optimizers import SGD, AdamW, Constant
from wasat.training.scaling import LossScale

import wasat as ws
from wasat import nn

DOCUMENTS = [[1, 2, 3, 4] * n for n in range(1, 9)]


class Model(nn.Module):
    """tokens i64[b, s] -> logits f32[b, s, 5]."""

    def __init__(self) -> None:
        self.embed, self.attention, self.head = nn.Embedding(5, 8), nn.Attention(8, 2), nn.Linear(8, 5)
        self.dropout = nn.Dropout(0.1)

    def __call__(self, tokens: nn.Tensor, key: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        return self.head(self.dropout(x + self.attention(x, nn.positions(tokens)), key))


def model() -> Program:
    p = nn.trace(Model(), {"tokens": "i64[b, s]", "key": "u32[2]"}, outputs=["logits"], training=True)
    add_loss(p, lambda b, v: cross_entropy(b, v["logits"], v["labels"]), {"labels": "i64[b, s]"})
    return p


def data(seed: int = 1) -> Packed:
    return Packed([Source(DOCUMENTS)], batch=2, length=6, end=0, seed=seed)


class Killed(BaseException):
    pass


def run(folder: Path, steps: int = 14, kill: int | None = None, **options: Any) -> Trained:
    def progress(step: int, steps: int, said: Mapping[str, float]) -> None:
        if step == kill:
            raise Killed

    made: dict[str, Any] = {"optimizer": AdamW(), "rate": Constant(0.03), "ema": 0.5, "progress": progress, **options}
    program, batches = made.pop("program", model)(), made.pop("batches", data)()
    return train(
        program, batches, folder, steps=steps, save_every=4, evaluate_every=3, keep=2,
        evaluation=lambda: islice(data(2), 2), **made,
    )  # fmt: skip


TIMED = ("tokens_per_second", "utilisation")


def untimed(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIMED} for line in log]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder)


def test_a_run(whole: tuple[Path, Trained]) -> None:
    folder, done = whole
    assert [line["step"] for line in done.log] == list(range(1, 15))
    assert done.log[-1]["loss"] < 0.8 * done.log[0]["loss"]
    assert [line["step"] for line in done.log if "eval.loss" in line] == [3, 6, 9, 12, 14]
    assert all(line[k] > 0 for line in done.log for k in TIMED)
    assert [json.loads(t) for t in (folder / "log.jsonl").read_text().splitlines()] == done.log
    assert Checkpoints(folder).steps() == [12, 14]
    assert Checkpoints(folder).best() == 14
    drawn = xml.etree.ElementTree.parse(folder / "curve.html").getroot()
    assert len([x for x in drawn.iter() if x.tag.endswith("polyline")]) == 2
    averaged = done.program.params["head.weight"].load()
    assert np.array_equal(averaged, done.states["ema.head.weight"])
    losses = [ws.run(done.program, "loss", **b)["loss"] for b in islice(data(2), 2)]  # neither drops nor takes a key
    assert done.log[-1]["eval.loss"] == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert [v.name for v in done.program["forward"].inputs] == ["tokens"]
    assert not any(g.count("dropout") for g in done.program.graphs.values())
    assert model()["loss"].count("dropout") == 1


def check_resumed(folder: Path, whole: Trained) -> None:
    again = run(folder)
    assert untimed(again.log) == untimed(whole.log)
    assert untimed([json.loads(t) for t in (folder / "log.jsonl").read_text().splitlines()]) == untimed(again.log)
    for k, x in whole.states.items():
        assert again.states[k].tobytes() == x.tobytes(), k


@pytest.mark.parametrize("kill", [2, 3, 4])
def test_resume_is_exact_wherever_the_run_was_stopped(tmp_path: Path, whole: tuple[Path, Trained], kill: int) -> None:
    with pytest.raises(Killed):
        run(tmp_path, kill=kill)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 99, "lo')  # half a line
    check_resumed(tmp_path, whole[1])


DISTANCE = """graph @loss(%x: f32[2]) {
  param %w: f32[2]
  %d: f32[2] = sub(%w, %x)
  %dd: f32[2] = mul(%d, %d)
  %loss: f32[] = reduce_mean(%dd) {axes=(0,)}
  return %loss
}"""


def walked(folder: Path, kill: int | None = None) -> Trained:
    """w goes from 0 to 10, and is evaluated by its distance from 4, which it has at step 5."""
    zero = np.zeros(2, np.float32)

    def progress(step: int, steps: int, said: Mapping[str, float]) -> None:
        if step == kill:
            raise Killed

    return train(
        Program({"loss": parse(DISTANCE)}, {"w": ArrayParam(zero, type_of(zero))}), Fixed({"x": zero + 10}), folder, steps=13,
        optimizer=SGD(), rate=Constant(0.1), clip=None, save_every=100, keep=1, evaluate_every=2,
        evaluation=lambda: [{"x": zero + 4}], progress=progress,
    )  # fmt: skip


def test_the_best_is_kept_wherever_it_was(tmp_path: Path) -> None:
    done = walked(tmp_path / "whole")
    scores = {line["step"]: line["eval.loss"] for line in done.log if "eval.loss" in line}
    best = min(scores, key=lambda step: scores[step])
    assert list(scores) == [2, 4, 6, 8, 10, 12, 13]
    assert best == 4
    kept = Checkpoints(tmp_path / "whole")
    assert (kept.steps(), kept.best()) == ([4, 13], 4)
    found = kept.load(done.states, 4)
    assert found is not None
    assert found.score == scores[4] == pytest.approx(((found.states["w"] - 4) ** 2).mean())


@pytest.mark.parametrize("kill", [4, 5, 12])
def test_resume_from_the_best_is_exact(tmp_path: Path, kill: int) -> None:
    whole = walked(tmp_path / "whole")
    with pytest.raises(Killed):
        walked(tmp_path / "again", kill)
    assert Checkpoints(tmp_path / "again").steps() == [4]
    again = walked(tmp_path / "again")
    assert untimed(again.log) == untimed(whole.log)
    assert again.states["w"].tobytes() == whole.states["w"].tobytes()
    assert Checkpoints(tmp_path / "again").steps() == [4, 13]


def test_a_longer_run_goes_on_and_another_is_refused(whole: tuple[Path, Trained]) -> None:
    folder, done = whole
    with pytest.raises(CheckpointError, match="at step 14, past the 10 asked for"):
        run(folder, steps=10)
    assert untimed(run(folder).log) == untimed(done.log)


def smoothed() -> Program:
    p = model()
    del p.graphs["loss"]
    add_loss(p, lambda b, v: cross_entropy(b, v["logits"], v["labels"], smoothing=0.1), {"labels": "i64[b, s]"})
    return p


ANOTHER: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "seed was 0, and is 1"),
    "clip": ({"clip": 0.5}, "clip was 1.0, and is 0.5"),
    "optimizer": ({"optimizer": AdamW(decay=0.0)}, r"optimizer was AdamW\(.*decay=0.01\), and is AdamW\(.*decay=0.0\)"),
    "rate": ({"rate": Constant(0.04)}, r"rate was Constant\(rate=0.03.*, and is Constant\(rate=0.04, warmup=0\)"),
    "loss": ({"program": smoothed}, "the model or the loss is another"),
    "rows": (
        {"batches": lambda: Packed([Source(DOCUMENTS)], batch=3, length=6, end=0, seed=1)},
        r"batch input tokens was int64\[2, 6\], and is int64\[3, 6\], batch input labels was .*",
    ),
    "accumulate": ({"accumulate": 2}, "accumulate was 1, and is 2"),
    "precision": ({"precision": "bf16"}, "precision was f32, and is bf16"),
    "remat": ({"remat": True}, "remat was False, and is True"),
    "train": ({"train": ("head.*",)}, r"train was \['\*'\], and is \['head.\*'\]"),
    "two": ({"ema": None, "clip": None}, "clip was 1.0, and is None, ema was 0.5, and is None"),
}


@pytest.mark.parametrize("case", ANOTHER)
def test_another_run_is_refused_by_what_differs(whole: tuple[Path, Trained], case: str) -> None:
    options, message = ANOTHER[case]
    before = {p.name: p.read_bytes() for p in whole[0].iterdir()}
    with pytest.raises(CheckpointError, match=f"holds another run: {message}; choose another folder, or remove it"):
        run(whole[0], **options)
    assert {p.name: p.read_bytes() for p in whole[0].iterdir()} == before


def test_a_rate_of_ones_own_goes_on(tmp_path: Path) -> None:
    def halved(from_: float) -> Any:
        return lambda b, step: b.div(from_, b.add(step, 1.0))

    run(tmp_path, steps=2, rate=halved(0.03))
    assert [line["step"] for line in run(tmp_path, steps=3, rate=halved(0.03)).log] == [1, 2, 3]
    with pytest.raises(CheckpointError, match="this version of Wasat, or an optimizer or rate of your own, makes another step"):
        run(tmp_path, steps=4, rate=halved(0.04))


def test_another_version_of_the_step_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, steps=1)
    monkeypatch.setattr("wasat.training.step.Cleanup", lambda: Rematerialize("train_step", (("b", 2), ("s", 6))))
    with pytest.raises(CheckpointError, match="or rate of your own, makes another step of the same model"):
        run(tmp_path, steps=2)


def test_a_folder_is_trained_in_by_one_process(tmp_path: Path) -> None:
    def second(step: int, steps: int, said: Mapping[str, float]) -> None:
        with pytest.raises(CheckpointError, match="another process trains in"):
            run(tmp_path)

    assert len(run(tmp_path, steps=2, progress=second).log) == 2


@pytest.mark.parametrize("name", ["log.jsonl", "curve.html", "step-00000006.safetensors"])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, whole: tuple[Path, Trained], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(number: int) -> None:
        path = os.readlink(f"/proc/self/fd/{number}")
        if Path(path).stem == Path(name).stem and (tmp_path / "step-00000004.safetensors").exists():
            os.ftruncate(number, os.fstat(number).st_size - 9)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path / name))} cannot be written: No space left"):
            run(tmp_path)
    assert not list(tmp_path.glob("*.unfinished"))
    assert Checkpoints(tmp_path).steps() == [3, 4]
    check_resumed(tmp_path, whole[1])


def test_a_run_that_was_killed_when_it_was_done_is_done(tmp_path: Path, whole: tuple[Path, Trained]) -> None:
    with pytest.raises(Killed):
        run(tmp_path, kill=14)
    curve = (tmp_path / "curve.html").read_bytes()
    assert curve == (whole[0] / "curve.html").read_bytes()
    check_resumed(tmp_path, whole[1])
    assert (tmp_path / "curve.html").read_bytes() == curve


class Fixed:
    """The same batch always."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __next__(self) -> Batch:
        return self.batch

    def state(self) -> None:
        pass

    def restore(self, state: None) -> None:
        pass


class Logarithm(nn.Module):
    def __init__(self) -> None:
        self.w = nn.Parameter([3])

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return nn.log(x * 1.0).sum() + self.w.sum()


def test_a_nan_stops_with_the_node(tmp_path: Path) -> None:
    p = nn.trace(Logarithm(), {"x": "f32[n]"}, name="loss", outputs=["loss"])
    with pytest.raises(Diverged, match=r"step 1: the loss is nan.*the first NaN was made by %\w+.* = log\(.*test_loop\.py:\d+"):
        train(p, Fixed({"x": np.array([1, -1, 1], np.float32)}), tmp_path, steps=3, progress=lambda *a: None)
    assert not Checkpoints(tmp_path).steps()
    with pytest.raises(Diverged, match="input %x held an infinity already"):
        train(p, Fixed({"x": np.array([1, np.inf, 1], np.float32)}), tmp_path, steps=3, progress=lambda *a: None)


class Rows(nn.Module):
    def __init__(self) -> None:
        self.w = nn.Parameter([3, 2])

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return nn.gather(self.w, x).sum()


class Signs:
    """Each number moves by the rate against its gradient's sign, which it finds in a bad way: of 0 it is NaN."""

    def slots(self, p: Value) -> dict[str, TensorType]:
        return {}

    def update(
        self, b: Builder, p: Value, g: Value, slots: dict[str, Value], rate: Value, count: Value
    ) -> tuple[Value, dict[str, Value]]:  # fmt: skip
        return b.sub(p, b.mul(b.div(g, b.abs(g)), rate)), {}


def test_an_update_that_spoils_what_the_loss_does_not_see(tmp_path: Path) -> None:
    p = nn.trace(Rows(), {"x": "i64[n]"}, name="loss", outputs=["loss"])
    with pytest.raises(Diverged, match="step 2: w hold what is not finite, and loss and gradients do not"):
        train(
            p, Fixed({"x": np.array([0, 2])}), tmp_path, steps=3, optimizer=Signs(), rate=Constant(0.1), save_every=2,
            progress=lambda *a: None,
        )  # fmt: skip
    assert not Checkpoints(tmp_path).steps()


class Fragile(nn.Module):
    """log(x w) and masked logarithms of ``fixed``, whose NaN do not matter."""

    def __init__(self) -> None:
        self.w, self.fixed = nn.Parameter([4, 4]), nn.Parameter([4])

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        masked = nn.where(self.fixed > 0, nn.log(self.fixed * 1.0), 0.0)
        return nn.log(x @ self.w).sum() + (masked * x).sum() + self.fixed.sum()


class Spoilt:
    """Batches of ones, but for one number in the third."""

    def __init__(self, number: float) -> None:
        self.number, self.at = number, 0

    def __next__(self) -> Batch:
        self.at += 1
        return {"x": np.array([[1, 1, 1, self.number if self.at == 3 else 1]], np.float32)}

    def state(self) -> int:
        return self.at

    def restore(self, state: int) -> None:
        self.at = state


BY_NODE = r"the first NaN was made by %log\w*: .* = log\(.*test_loop\.py:\d+"
STOPPED: dict[str, tuple[float, dict[str, Any], str]] = {
    "f32": (-9.0, {}, rf"step 3: the loss is nan.*{BY_NODE}"),
    "remat": (-9.0, {"remat": True}, rf"step 3: the loss is nan.*{BY_NODE}"),
    "between updates": (-9.0, {"accumulate": 4}, rf"step 3: the loss is nan.*{BY_NODE}"),
    "bf16": (-9.0, {"precision": "bf16"}, rf"step 3: the loss is nan.*{BY_NODE}"),
    "f16": (-9.0, {"precision": "f16"}, rf"step 3: the loss is nan.*{BY_NODE}"),
    "f16 between updates": (-9.0, {"precision": "f16", "accumulate": 4}, rf"step 3: the loss is nan.*{BY_NODE}"),
    "data": (np.nan, {}, "step 3: the loss is nan.*; input %x held NaN already"),
    "data in f16": (np.inf, {"precision": "f16", "accumulate": 2}, "step 3: the loss is .*; input %x held an infinity already"),
    "a trained parameter": (1.0, {"w": np.nan}, "step 1: the loss is nan.*; input %w held NaN already"),
    "a parameter": (1.0, {"fixed": np.inf}, "step 1: the loss is inf.*; parameter %fixed held an infinity already"),
}


@pytest.mark.parametrize("case", STOPPED)
def test_what_is_not_finite_is_named_with_its_step(tmp_path: Path, case: str) -> None:
    number, options, message = STOPPED[case]
    p = nn.trace(Fragile(), {"x": "f32[n, 4]"}, name="loss", outputs=["loss"])
    values = {"w": np.full((4, 4), 0.25, np.float32), "fixed": np.array([1, 2, -1, 0], np.float32)}
    options = dict(options)
    for k, x in values.items():
        x.flat[0] = options.pop(k, x.flat[0])
        p.params[k] = ArrayParam(x, type_of(x))
    with pytest.raises(Diverged, match=message):
        train(
            p, Spoilt(number), tmp_path, steps=5, optimizer=SGD(), rate=Constant(1e-3), train=("w",),
            progress=lambda *a: None, **options,
        )  # fmt: skip
    steps = [json.loads(t)["step"] for t in (tmp_path / "log.jsonl").read_text().splitlines()] if number != 1 else []
    assert steps == list(range(1, 1 + 2 * (number != 1)))


class Steep(nn.Module):
    """A sum, through numbers ``slope`` squared times as steep."""

    def __init__(self, slope: float) -> None:
        self.w, self.slope = nn.Parameter([1, 4]), slope

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return ((x @ self.w.transpose(1, 0)) * self.slope * self.slope).sum()


def test_an_overflow_in_f16_is_skipped_and_says_so(tmp_path: Path) -> None:
    x = Fixed({"x": np.full((1, 4), 2.0**-10, np.float32)})

    def steep(slope: float) -> Program:
        return nn.trace(Steep(slope), {"x": "f32[n, 4]"}, name="loss", outputs=["loss"])

    def go(p: Program, folder: str, steps: int) -> Trained:
        return train(
            p, x, tmp_path / folder, steps=steps, optimizer=SGD(), rate=Constant(1e-3), precision="f16", remat=True,
            scaling=LossScale(4.0, interval=2), progress=lambda *a: None,
        )  # fmt: skip

    def no_json(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    first = go(steep(2.0**7), "steep", 2)
    done = go(steep(2.0**7), "steep", 6)
    assert untimed(done.log[:2]) == untimed(first.log)
    lines = (tmp_path / "steep" / "log.jsonl").read_text().splitlines()
    written = [json.loads(t, parse_constant=no_json)["grad_norm"] for t in lines]
    assert written[:2] == ["Infinity", done.log[1]["grad_norm"]]
    assert [float(x) for x in written] == [line["grad_norm"] for line in done.log]
    assert [line["skipped"] for line in done.log] == [1, 0, 0, 1, 0, 0]
    assert [line["loss_scale"] for line in done.log] == [4, 2, 2, 4, 2, 2]
    assert done.states["optimizer.skipped"] == 2
    assert any("backward pass" in str(r) for r in done.remarks)
    with pytest.raises(Diverged, match=r"step 3: .*the gradients' norm inf; the first infinity was made by %\w+"):
        go(steep(2.0**9), "steeper", 9)


def test_infinities_of_masks_are_not_blamed() -> None:
    g = parse("""graph @g(%x: f32[2], %m: bool[2]) {
  %low: f32[2] = select(%m, %x, -inf:f32)
  %e: f32[2] = exp(%low)
  %big: f32[2] = mul(%x, 1e38:f32)
  %y: f32[2] = mul(%big, %e)
  return %y
}""")
    x = {"x": np.array([9.0, 9.0], np.float32), "m": np.array([True, False])}
    assert re.search(r"the first infinity was made by %big", offender(g, x, {}, "y"))  # type: ignore[arg-type]
    assert "stays finite" in offender(g, {**x, "x": np.ones(2, np.float32)}, {}, "y")  # type: ignore[arg-type]


def test_of_what_is_all_masked_the_node_is_blamed_and_not_the_constant() -> None:
    g = parse("""graph @g(%x: f32[2], %m: bool[2]) {
  %low: f32[2] = select(%m, %x, -inf:f32)
  %y: f32[2] = softmax(%low) {axis=0}
  return %y
}""")
    x = {"x": np.ones(2, np.float32), "m": np.zeros(2, bool)}
    assert "the first NaN was made by %y: f32[2] = softmax(%low)" in offender(g, x, {}, "y")  # type: ignore[arg-type]


def test_batches_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(IRError, match="inputs that the batches lack: labels"):
        train(model(), Fixed({"tokens": np.zeros((2, 3), np.int64)}), tmp_path, steps=1, progress=lambda *a: None)
    with pytest.raises(IRError, match="at least 1"):
        run(tmp_path, steps=0)
    with pytest.raises(IRError, match=r"evaluation\(\) made no batch"):
        train(model(), data(), tmp_path, steps=1, evaluation=lambda: [], progress=lambda *a: None)


def test_the_time_of_a_step_is_all_but_evaluating_and_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def costs(seconds: float, call: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return call(*args, **options)

        return timed

    monkeypatch.setattr("wasat.training.loop.time", SimpleNamespace(perf_counter=lambda: now))
    timed: list[tuple[Any, str, float]] = [
        (Packed, "__next__", 2), (Compiled, "step", 1), (Compiled, "loss", 50), (Checkpoints, "save", 90)
    ]  # fmt: skip
    for cls, name, seconds in timed:
        monkeypatch.setattr(cls, name, costs(seconds, getattr(cls, name)))
    done = run(tmp_path, steps=7, progress=costs(4, lambda *a: None))
    assert [12 / line["tokens_per_second"] for line in done.log] == pytest.approx([3, 7, 7, 7, 7, 7, 7])
    first, second, *_ = (line["utilisation"] for line in done.log)
    assert first / second == pytest.approx(7 / 3)


def test_operations_are_counted() -> None:
    g = parse("""graph @g(%x: f32[4, 8], %q: f32[1, 5, 2, 3], %i: f32[1, 2, 9, 9]) {
  param %w: f32[6, 8]
  param %k: f32[3, 2, 3, 3]
  %y: f32[4, 6] = linear(%x, %w)
  %t: f32[6, 4] = transpose(%y) {perm=(1, 0)}
  %z: f32[4, 4] = matmul(%y, %t)
  %a: f32[1, 5, 2, 3] = attention(%q, %q, %q) {scale=1.0}
  %c: f32[1, 3, 7, 7] = conv(%i, %k) {strides=(1, 1), low=(0, 0), high=(0, 0)}
  return %z, %a, %c
}""")
    linear, matmul, attention, conv = 2 * 4 * 6 * 8, 2 * 4 * 4 * 6, 2 * 2 * 5 * 5 * (3 + 3), 2 * 3 * 7 * 7 * 2 * 3 * 3
    assert isinstance(g, Graph)
    assert step_flops(g) == 2 * linear + 3 * matmul + attention + 2 * conv  # inputs need no gradient
    assert step_flops(g, {"k"}) == linear + matmul + attention + 2 * conv
    assert step_flops(g, {"w"}) == 2 * linear + 3 * matmul + attention + conv


def test_operations_of_loops_are_counted_at_every_turn() -> None:
    g = parse("""graph @g(%x: f32[5, 4, 8]) {
  param %w: f32[8, 8]
  param %v: f32[8, 8]
  %h: f32[4, 8] = broadcast_to(0.0:f32) {shape=(4, 8)}
  %last: f32[4, 8], %y: f32[5, 4, 8] = scan(%h, %x, %w, %v) {body=graph @turn(
      %h: f32[4, 8], %x: f32[4, 8], %w: f32[8, 8], %v: f32[8, 8]) {
    %a: f32[4, 8] = matmul(%h, %w)
    %b: f32[4, 8] = matmul(%x, %v)
    %n: f32[4, 8] = add(%a, %b)
    return %n, %b
  }, carries=1, slices=1}
  %z: f32[5, 4, 8] = matmul(%y, %v)
  %s: f32[4, 8] = stop_gradient(%last)
  %t: f32[4, 8] = matmul(%s, %w)
  return %z, %t
}""")
    assert isinstance(g, Graph)
    one = 2 * 4 * 8 * 8
    assert step_flops(g) == 5 * (3 + 2) * one + 5 * 3 * one + 2 * one
    assert step_flops(g, {"v"}) == 5 * (2 + 2) * one + 5 * 3 * one + one  # v comes to a turn with what is carried
    assert step_flops(g, {"w"}) == 5 * (3 + 1) * one + 5 * one + 2 * one
    assert step_flops(g, ()) == 5 * 2 * one + 5 * one + one


def test_operations_of_a_choice_are_those_of_the_longer_branch() -> None:
    g = parse("""graph @g(%c: bool[], %x: f32[4, 8]) {
  param %w: f32[8, 8]
  param %v: f32[8, 8]
  %y: f32[4, 8] = cond(%c, %x, %w, %v) {then=graph @yes(%x: f32[4, 8], %w: f32[8, 8], %v: f32[8, 8]) {
    %a: f32[4, 8] = matmul(%x, %w)
    %b: f32[4, 8] = matmul(%a, %v)
    return %b
  }, otherwise=graph @no(%x: f32[4, 8], %w: f32[8, 8], %v: f32[8, 8]) {
    %a: f32[4, 8] = matmul(%x, %v)
    return %a
  }}
  %t: f32[4, 8] = matmul(%y, %w)
  return %t
}""")
    assert isinstance(g, Graph)
    one = 2 * 4 * 8 * 8
    assert step_flops(g) == (2 + 3) * one + 3 * one  # the first product's x needs no gradient
    assert step_flops(g, {"v"}) == (1 + 2) * one + 2 * one
    assert step_flops(g, ()) == 2 * one + one


def test_a_curve_of_little(tmp_path: Path) -> None:
    for series in ({}, {"a<b": [(1, 2.0)]}, {"x": [(0, float("nan"))]}):
        write_curve(tmp_path / "c.html", "t & u", series, ["1 < 2"])
        assert "1 < 2" in [x.text for x in xml.etree.ElementTree.parse(tmp_path / "c.html").iter("p")]
