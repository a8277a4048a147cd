"""The compiled step of a run: states are donated, and what a step promises of them holds all the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from numpy.testing import assert_allclose, assert_array_equal
from wasat.backends.tvm.build import BuildError
from wasat.backends.tvm.targets import Target, cpu, target_named
from wasat.ir import ArrayParam, Program, evaluate, parse, type_of
from wasat.training.compiled import Compiled, Running
from wasat.training.optimizers import SGD, Adafactor, AdamW, Constant, Muon
from wasat.training.scaling import LossScale
from wasat.training.step import TrainStep, train_step

from wasat import nn

pytestmark = pytest.mark.usefixtures("compiled_once")

LOSS = """graph @loss(%x: f32[n, 4]) {
  param %w: f32[4, 6]
  param %bias: f32[6]
  %y: f32[n, 6] = matmul(%x, %w)
  %z: f32[n, 6] = add(%y, %bias)
  %zz: f32[n, 6] = mul(%z, %z)
  %loss: f32[] = reduce_mean(%zz) {axes=(0, 1)}
  return %loss
}"""
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": AdamW(decay=0.1), "clip": 1.0, "ema": 0.5},
    "summed": {"optimizer": SGD(momentum=0.9), "accumulate": 2},
    "muon": {"optimizer": Muon(), "clip": 1.0},
    "adafactor": {"optimizer": Adafactor(decay=0.1)},
    "f16": {"optimizer": AdamW(), "precision": "f16", "scaling": LossScale(8.0), "accumulate": 2},
}
GOOD = {"x": np.random.default_rng(1).standard_normal((3, 4), np.float32)}
BAD = {"x": np.full((3, 4), np.nan, np.float32)}


def made_for(case: str) -> tuple[Program, TrainStep, Compiled]:
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((4, 6), np.float32), "bias": rng.standard_normal(6).astype(np.float32)}
    program = Program({"loss": parse(LOSS)}, {k: ArrayParam(x, type_of(x)) for k, x in params.items()})
    made = train_step(program, rate=Constant(0.05), **CASES[case])
    return program, made, Compiled(program, made, GOOD, cpu(threads=2), "loss")


def donated(made: TrainStep) -> list[str]:
    return [s.name for s in made.program.interface.states if s.donated]


@pytest.mark.parametrize("case", CASES)
def test_states_are_donated(case: str) -> None:
    program, made, compiled = made_for(case)
    start = {k: x.copy() for k, x in made.states.items()}
    step = compiled.plain["train_step"]
    places, states = {}, dict(made.states)
    for turn in range(4):
        before = {k: x.copy() for k, x in states.items()}
        _, states = compiled.step(GOOD, states)
        places = places or {k: states[k].ctypes.data for k in donated(made)}
        assert {k: states[k].ctypes.data for k in places} == places
        want = dict(zip(step.output_names, evaluate(step, {**GOOD, **before})))
        for k in states:
            assert_allclose(states[k], want[k], rtol=2e-3 if case == "f16" else 1e-5, atol=2e-6, err_msg=f"{k} in {turn}")
    assert {"w", "bias"} < places.keys()
    averaged = "ema.w" if "ema.w" in states else "w"
    values = {"w": states[averaged], "bias": states[averaged.replace("w", "bias")]}
    [loss] = evaluate(program["loss"], GOOD, values)
    assert_allclose(compiled.loss(GOOD, states)["loss"], loss, rtol=1e-5)  # type: ignore[arg-type]
    for k, x in start.items():  # neither the program's parameters nor the states to begin with were written to
        assert_array_equal(made.states[k], x)


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_changes_nothing_that_was_donated(case: str) -> None:
    _, made, compiled = made_for(case)
    _, states = compiled.step(GOOD, made.states)
    kept = {k: x.copy() for k, x in states.items()}
    said, _ = compiled.step(BAD, states)
    assert np.isnan(said["loss"])
    for k, x in kept.items():
        assert_array_equal(states[k], x, err_msg=k)  # as the loop has them, to run the step again and see


def test_the_same_states_from_elsewhere_give_the_same_bits() -> None:
    _, made, compiled = made_for("adamw")
    _, states = compiled.step(GOOD, made.states)
    saved = {k: x.copy() for k, x in states.items()}
    for _ in range(2):
        said, states = compiled.step(GOOD, states)
    again = saved
    for _ in range(2):
        once_more, again = compiled.step(GOOD, again)
    for k, x in states.items():
        assert_array_equal(again[k], x, err_msg=k)
    assert said == once_more


class Dropping(nn.Module):
    """x f32[n, 4] -> a loss, f32[]: two layers that drop half of the numbers by one key."""

    def __init__(self) -> None:
        self.up, self.down, self.drop = nn.Linear(4, 64), nn.Linear(64, 4), nn.Dropout(0.5)

    def __call__(self, x: nn.Tensor, key: nn.Tensor) -> nn.Tensor:
        y = self.down(self.drop(nn.tanh(self.drop(self.up(x), key)), key))
        return (y * y).mean()


def test_a_step_drops_and_the_evaluated_loss_does_not() -> None:
    types = {"x": "f32[n, 4]", "key": "u32[2]"}
    program, plain = (nn.trace(Dropping(), types, "loss", outputs=["loss"], training=t) for t in (True, False))
    made = train_step(program, optimizer=SGD(), rate=Constant(0.05))
    batch = {**GOOD, "key": np.array([0, 7], np.uint32)}
    compiled = Compiled(program, made, batch, cpu(threads=2), "loss")
    said, _ = compiled.step(batch, made.states)
    step = compiled.plain["train_step"]
    assert_allclose(said["loss"], evaluate(step, {**batch, **made.states})[0], rtol=1e-5)  # type: ignore[arg-type]
    [loss] = evaluate(plain["loss"], batch, made.states)
    assert_allclose(compiled.loss(GOOD, made.states)["loss"], loss, rtol=1e-5)  # type: ignore[arg-type]
    assert abs(said["loss"] / loss - 1) > 0.01


class NoDevice:
    """A machine that lacks what every target needs."""

    def lacking(self, target: Target) -> str:
        return "a GPU"

    def runner(self, program: Program, target: Target) -> Running:
        raise AssertionError(f"{target.name} does not run here")


def test_a_step_for_a_gpu_compiles_and_says_where_it_does_not_run() -> None:
    params = {"w": np.ones((4, 6), np.float32), "bias": np.zeros(6, np.float32)}
    program = Program({"loss": parse(LOSS)}, {k: ArrayParam(x, type_of(x)) for k, x in params.items()})
    made = train_step(program, rate=Constant(0.05), optimizer=SGD())
    said = r"@train_step compiles for opencl \(\d+ kernels, [\d,]+ bytes\), but nothing runs it here: that needs "
    with pytest.raises(BuildError, match=said + "a host for such devices. Leave the target out, or write cpu"):
        Compiled(program, made, GOOD, target_named("opencl"), "loss")
    with pytest.raises(BuildError, match=said + r"a GPU\. Leave"):
        Compiled(program, made, GOOD, target_named("opencl"), "loss", NoDevice())
