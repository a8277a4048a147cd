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
from wasat.ir import ArrayParam, CheckpointError, IRError, Program, parse, type_of
from wasat.passes import Rematerialize
from wasat.training.checkpoint import Checkpoints
from wasat.training.compiled import Compiled
from wasat.training.curve import write_curve
from wasat.training.data import Batch, Packed, Source
from wasat.training.loop import Trained, train
from wasat.training.losses import add_loss, cross_entropy
from wasat.training.optimizers import SGD, AdamW, Constant
from wasat.training.scaling import LossScale

import wasat as ws
from wasat import nn

pytestmark = pytest.mark.usefixtures("compiled_once")

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


@pytest.mark.parametrize("kill", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
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
  %gone: f32[] = reduce_mean(%w) {axes=(0,)}
  return %loss, %gone
}"""


def walked(folder: Path, kill: int | None = None, name: str = "x", **options: Any) -> Trained:
    """w goes from 0 to 10, and is evaluated by its distance from 4, which it has at step 5."""
    zero = np.zeros(2, np.float32)

    def progress(step: int, steps: int, said: Mapping[str, float]) -> None:
        if step == kill:
            raise Killed

    program = Program({"loss": parse(DISTANCE.replace("%x", f"%{name}"))}, {"w": ArrayParam(zero, type_of(zero))})
    options = {"steps": 13, "save_every": 100, "keep": 1, "evaluate_every": 2, **options}
    return train(
        program, Fixed({name: zero + 10}), folder, optimizer=SGD(), rate=Constant(0.1), clip=None,
        evaluation=lambda: [{name: zero + 4}], progress=progress, **options,
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


@pytest.mark.parametrize("kill", [4, pytest.param(5, marks=pytest.mark.slow), 12])
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
    "weigh": ({"accumulate": 2, "weigh": "calls"}, "accumulate was 1, and is 2, weigh was places, and is calls"),
    "scaling": (
        {"precision": "f16", "scaling": LossScale(8.0)},
        r"precision was f32, and is f16, scaling was None, and is LossScale\(initial=8.0.*",
    ),
    "two": ({"ema": None, "clip": None}, "clip was 1.0, and is None, ema was 0.5, and is None"),
}


@pytest.mark.parametrize("case", ANOTHER)
def test_another_run_is_refused_by_what_differs(whole: tuple[Path, Trained], case: str) -> None:
    options, message = ANOTHER[case]
    before = {p.name: p.read_bytes() for p in whole[0].iterdir()}
    with pytest.raises(CheckpointError, match=f"holds another run: {message}; choose another folder, or remove it"):
        run(whole[0], **options)
    assert {p.name: p.read_bytes() for p in whole[0].iterdir()} == before


def test_an_input_of_another_name_is_named_on_both_sides(tmp_path: Path) -> None:
    walked(tmp_path, steps=1)
    was, now = (f"batch input {name} was {a}, and is {b}" for name, a, b in (
        ("x", r"float32\[2\]", "None"), ("z", "None", r"float32\[2\]"),
    ))  # fmt: skip
    with pytest.raises(CheckpointError, match=f"{was}, {now}, the model or the loss is another; choose"):
        walked(tmp_path, name="z", steps=1)


def test_by_default_each_hundredth_step_is_evaluated_and_saved(tmp_path: Path) -> None:
    """And the last three of these stay, beside the best."""
    zero = np.zeros(2, np.float32)
    done = train(
        Program({"loss": parse(DISTANCE)}, {"w": ArrayParam(zero, type_of(zero))}), Fixed({"x": zero + 10}), tmp_path,
        steps=500, optimizer=SGD(), rate=Constant(0.01), evaluation=lambda: [{"x": zero}], progress=lambda *a: None,
    )  # fmt: skip
    assert [line["step"] for line in done.log if "eval.loss" in line] == [100, 200, 300, 400, 500]
    assert Checkpoints(tmp_path).steps() == [100, 300, 400, 500]


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


def test_a_curve_of_little(tmp_path: Path) -> None:
    for series in ({}, {"a<b": [(1, 2.0)]}, {"x": [(0, float("nan"))]}):
        write_curve(tmp_path / "c.html", "t & u", series, ["1 < 2"])
        assert "1 < 2" in [x.text for x in xml.etree.ElementTree.parse(tmp_path / "c.html").iter("p")]
