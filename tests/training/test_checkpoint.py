"""Checkpoints: exact resume, which are kept, kills at the worst moments, what is refused."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from wasat.ir import CheckpointError, evaluate
from wasat.training.checkpoint import Checkpoints
from wasat.training.optimizers import AdamW, Cosine
from wasat.training.step import TrainStep, train_step

from wasat.testing import random_program

LOSS = """graph @loss(%x: f32[n, 4], %key: u32[2]) {
  param %w: f32[4, 3]
  param %b: f32[3]
  %d: f32[n, 4] = dropout(%x, %key) {rate=0.25}
  %y: f32[n, 3] = matmul(%d, %w)
  %z: f32[n, 3] = add(%y, %b)
  %t: f32[n, 3] = tanh(%z)
  %loss: f32[] = reduce_sum(%t) {axes=(0, 1)}
  return %loss
}"""
STATES = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.array(5)}


def step() -> TrainStep:
    return train_step(
        random_program(LOSS), optimizer=AdamW(decay=0.1), rate=Cosine(0.1, warmup=2, steps=8), clip=1.0, accumulate=2, ema=0.5
    )


def run(made: TrainStep, states: dict[str, Any], steps: range) -> tuple[list[float], dict[str, Any]]:
    g, losses = made.program["train_step"], []
    for t in steps:
        batch = np.random.default_rng(t).standard_normal((5, 4), np.float32)
        out = dict(zip(g.output_names, evaluate(g, {"x": batch, "key": np.array([t, 1], np.uint32), **states})))
        states = {k: out[k] for k in states}
        losses.append(float(out["loss"]))  # type: ignore[arg-type]
    return losses, states


def test_resume_is_exact(tmp_path: Path) -> None:
    made = step()
    losses, states = run(made, made.states, range(9))
    first, half = run(made, made.states, range(5))  # between two updates
    Checkpoints(tmp_path).save(5, half, more={"seed": 1})
    again = step()
    found = Checkpoints(tmp_path).load(again.states)
    assert found is not None
    assert (found.step, found.more, found.score) == (5, {"seed": 1}, None)
    assert list(found.states) == list(again.states)
    rest, resumed = run(again, found.states, range(found.step, 9))
    assert first + rest == losses
    for k, x in states.items():
        assert resumed[k].tobytes() == x.tobytes(), k


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    c = Checkpoints(tmp_path / "run", keep=2)
    assert c.steps() == []
    assert c.best() is None
    assert c.load(STATES) is None
    with pytest.raises(CheckpointError, match="has no checkpoint of step 1; there are none"):
        c.load(STATES, 1)
    assert c.more() is None
    for t, score in [(0, float("nan")), (1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.0)]:
        c.save(t, {**STATES, "count": np.array(t)}, score=score)
    assert c.steps() == [2, 4, 5]
    assert c.best() == 2
    best, last = c.load(STATES, c.best()), c.load(STATES)
    assert best is not None
    assert (best.step, int(best.states["count"]), best.score) == (2, 2, 1.0)
    assert last is not None
    assert (last.step, int(last.states["count"])) == (5, 5)


def test_a_step_is_written_again(tmp_path: Path) -> None:
    c = Checkpoints(tmp_path)
    c.save(1, STATES)
    c.save(1, {**STATES, "count": np.array(7)})
    found = c.load(STATES)
    assert found is not None
    assert int(found.states["count"]) == 7


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    c = Checkpoints(tmp_path)
    c.save(1, STATES)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(os, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            c.save(2, STATES)
    assert c.steps() == [1]
    assert c.load(STATES) is not None
    c.save(3, STATES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001.safetensors", "step-00000003.safetensors"]


def test_strided_arrays_and_read_only_ones(tmp_path: Path) -> None:
    c, x = Checkpoints(tmp_path), np.arange(6.0).reshape(2, 3).T
    c.save(1, {"x": x, "y": np.broadcast_to(np.float32(2), (2, 2))})
    found = c.load({"x": x, "y": np.zeros((2, 2), np.float32)})
    assert found is not None
    assert np.array_equal(found.states["x"], x)
    assert np.array_equal(found.states["y"], np.full((2, 2), 2, np.float32))


OTHERS = {
    "a shape": ({**STATES, "w": np.zeros((3, 2), np.float32)}, r"state w is float32\[2, 3\] in it, and float32\[3, 2\] here"),
    "a type": ({**STATES, "w": np.zeros((2, 3))}, r"state w is float32\[2, 3\] in it, and float64\[2, 3\] here"),
    "one more here": ({**STATES, "v": np.zeros(1)}, r"state v is absent in it, and float64\[1\] here"),
    "one more there": ({"w": STATES["w"]}, r"state count is int64\[\] in it, and absent here"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_run_is_refused(tmp_path: Path, case: str) -> None:
    like, message = OTHERS[case]
    Checkpoints(tmp_path).save(1, STATES)
    with pytest.raises(CheckpointError, match=f"is of another run: {message}"):
        Checkpoints(tmp_path).load(like)


def test_damaged_absent_and_foreign_files_are_refused(tmp_path: Path) -> None:
    c = Checkpoints(tmp_path)
    path = c.save(1, STATES)
    with pytest.raises(CheckpointError, match="no checkpoint of step 2; there are 1"):
        c.load(STATES, 2)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"step-00000001\.safetensors is damaged"):
        c.load(STATES)
    save_file({"w": STATES["w"]}, path)
    with pytest.raises(CheckpointError, match="no checkpoint of a training run"):
        c.load(STATES)


def _with_metadata(data: bytes, change: Callable[[dict[str, str]], dict[str, str]]) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = change(header["__metadata__"])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "one bit of a number": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "metadata cut short": lambda data: _with_metadata(data, lambda m: {**m, "wasat": m["wasat"][:-1]}),
    "metadata without the score": lambda data: _with_metadata(data, lambda m: {**m, "wasat": '{"step": 1, "more": null}'}),
    "no digest": lambda data: _with_metadata(data, lambda m: {"wasat": m["wasat"]}),
    "another shape": lambda data: data.replace(b"[2, 3]", b"[3, 2]"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_was_changed_is_refused(tmp_path: Path, what: str) -> None:
    c = Checkpoints(tmp_path)
    path = c.save(1, STATES)
    path.write_bytes(DAMAGE[what](path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"step-00000001\.safetensors is damaged: .*; remove it to go on"):
        c.load(STATES)


def test_saving_holds_no_second_copy(tmp_path: Path) -> None:
    states = {f"w{i}": np.ones((1024, 256), np.float32) for i in range(8)}
    tracemalloc.start()
    try:
        path = Checkpoints(tmp_path).save(1, states)
        assert tracemalloc.get_traced_memory()[1] < states["w0"].nbytes
    finally:
        tracemalloc.stop()
    assert {k: x.tobytes() for k, x in load_file(path).items()} == {k: x.tobytes() for k, x in states.items()}


@pytest.mark.parametrize("step, states, more, message", [
    (-1, STATES, None, "step is -1; it must be"), (1.5, STATES, None, "step is 1.5"), (True, STATES, None, "step is True"),
    (1, {"o": np.array([None])}, None, "state o is object, which the format lacks"),
    (1, {"a\ud800": np.zeros(1)}, None, "cannot be written: .*surrogates"), (1, STATES, {1j}, "not JSON serializable"),
])  # fmt: skip
def test_what_cannot_be_a_checkpoint(tmp_path: Path, step: Any, states: Any, more: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path / "run").save(step, states, more=more)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000007.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"step-00000007\.safetensors cannot be read"):
        Checkpoints(tmp_path).load(STATES)


def test_no_byte_may_change(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(5, STATES, more={"seed": 1})
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x81]) + data[i + 1 :])
        with pytest.raises(CheckpointError):
            Checkpoints(tmp_path).load(STATES)


W = STATES["w"]
OTHERWISE = {"big-endian": W.astype(">f4"), "reversed": W[::-1, ::-1], "int": 3, "float": 1.5, "list": [1, 2]}


@pytest.mark.parametrize("given", OTHERWISE.values(), ids=OTHERWISE)
def test_what_is_an_array_in_another_form(tmp_path: Path, given: Any) -> None:
    """It is read as it was; in another order of bytes it was written, and then called damaged."""
    Checkpoints(tmp_path).save(5, {"w": given})
    found = Checkpoints(tmp_path).load({"w": given})
    assert found is not None
    assert found.states["w"].tolist() == np.asarray(given).tolist()


def test_names_that_the_format_has_not(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no state named __metadata__"):
        Checkpoints(tmp_path).save(5, {"__metadata__": STATES["w"]})
    with pytest.raises(CheckpointError, match="has the key 1, which is no text"):
        Checkpoints(tmp_path).save(5, STATES, more=[{"a": {1: 2}}])
    assert not list(tmp_path.iterdir())


def test_what_can_be_no_folder_of_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", str(tmp_path / "file" / "in"), tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(CheckpointError, match="can be no folder of checkpoints"):
            Checkpoints(folder).save(5, STATES)  # type: ignore[arg-type]
    assert Checkpoints(str(tmp_path / "new")).save(5, STATES).exists()  # type: ignore[arg-type]
