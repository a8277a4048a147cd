"""Steps in half precision, with a scaled loss as torch's GradScaler has it; steps that compute again what is cheap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from wasat.frontend import from_pretrained
from wasat.ir import IRError, Program, evaluate
from wasat.passes import Cleanup, FuseAttention, FuseNorm, FuseRope, PassError, PassManager
from wasat.training.losses import add_loss, cross_entropy
from wasat.training.optimizers import SGD, AdamW, Constant, Cosine
from wasat.training.scaling import LossScale
from wasat.training.step import TrainStep, train_step

from wasat.testing import random_program

HERE = Path(__file__).parent.parent / "golden"
RUN = np.load(HERE / "training" / "run.npz")
SCALER = np.load(HERE / "training" / "scaler.npz")
# the gradient of w is g
TEXT = """graph @loss(%g: f32[3]) {
  param %w: f32[3]
  %p: f32[3] = mul(%w, %g)
  %z: f32[1, 3] = reshape(%p) {shape=(1, 3)}
  %one: f32[3, 1] = broadcast_to(1.0:f32) {shape=(3, 1)}
  %s: f32[1, 1] = matmul(%z, %one)
  %q: f32[1, 1] = stop_gradient(%s)
  %r: f32[] = reduce_sum(%q) {axes=(0, 1)}
  %l: f32[] = reduce_sum(%p) {axes=(0,)}
  %zero: f32[] = mul(%r, 0.0:f32)
  %loss: f32[] = add(%l, %zero)
  return %loss
}"""


def steps(made: TrainStep, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    g, states = made.program["train_step"], dict(made.states)
    params = {k: p.load() for k, p in made.program.params.items()}
    said = []
    for batch in batches:
        out = dict(zip(g.output_names, evaluate(g, {**batch, **states}, params)))
        states = {k: out[k] for k in states}
        said.append(out)
    return said


@pytest.mark.parametrize(("prefix", "accumulate"), [("", 1), ("summed.", 2)])
def test_the_scale_of_torch(prefix: str, accumulate: int) -> None:
    made = train_step(
        random_program(TEXT), optimizer=AdamW(decay=0.0), rate=Constant(0.05), precision="f16", accumulate=accumulate,
        scaling=LossScale(8.0, interval=3),
    )  # fmt: skip
    made.states["w"] = SCALER["start"]
    said = steps(made, [{"g": g} for g in SCALER["gradients"]])
    assert [float(x["optimizer.loss_scale"]) for x in said] == SCALER[f"{prefix}scale"].tolist()
    assert_allclose([x["w"] for x in said], SCALER[f"{prefix}parameter"], rtol=1e-5, atol=1e-6)
    used = [8.0, *SCALER[f"{prefix}scale"][:-1].tolist()]
    assert [float(x["loss_scale"]) for x in said] == used
    wanted = [2, 3, 10] if accumulate == 1 else [3, 11]
    assert [t for t, x in enumerate(said) if x["skipped"]] == wanted
    assert int(said[-1]["optimizer.skipped"]) == len(wanted)
    for t in wanted:  # as if the call had not been
        for k in ("w", "optimizer.mean.w", "optimizer.square.w"):
            assert said[t][k].tobytes() == said[t - 1][k].tobytes(), k


def test_schedules_count_updates_that_were_made() -> None:
    made = train_step(random_program(TEXT), optimizer=SGD(), rate=Cosine(1.0, steps=4), precision="f16")
    bad = np.array([np.inf, 0, 0], np.float32)
    good = np.ones(3, np.float32)
    rates = [float(x["rate"]) for x in steps(made, [{"g": g} for g in (good, bad, bad, good)])]
    assert rates[1] == rates[2] == rates[3] < rates[0]


def test_the_scale_stays_finite_and_its_numbers_are_checked() -> None:
    made = train_step(random_program(TEXT), optimizer=SGD(), precision="f16", scaling=LossScale(2.0**127, interval=1))
    (said,) = steps(made, [{"g": np.zeros(3, np.float32)}])
    assert float(said["optimizer.loss_scale"]) == 2.0**127
    for wrong in ({"initial": 0.0}, {"growth": 0.5}, {"backoff": 1.0}, {"interval": 0}):
        with pytest.raises(IRError, match="needed are initial > 0"):
            LossScale(**wrong)  # type: ignore[arg-type]
    for options in ({"precision": "f8"}, {"precision": "bf16", "scaling": LossScale()}):
        with pytest.raises(IRError, match="a precision is f32, bf16 or f16; only f16 has a scaling"):
            train_step(random_program(TEXT), **options)  # type: ignore[arg-type]


def llama(**options: Any) -> TrainStep:
    program: Program = from_pretrained(HERE / "hf" / "llama")
    PassManager([Cleanup(), FuseNorm(), FuseRope(), FuseAttention()]).run(program)
    add_loss(program, lambda b, v: cross_entropy(b, v["logits"], v["labels"]), {"labels": "i64[b, s]"})
    return train_step(program, optimizer=AdamW(decay=0.1), rate=Cosine(3e-3, warmup=5, steps=20), clip=1.0, **options)


BATCHES = [{"tokens": RUN["ids"][t % 4], "labels": RUN["labels"][t % 4]} for t in range(20)]


@pytest.mark.parametrize(("precision", "mean", "most"), [("bf16", 5e-3, 2.5e-2), ("f16", 5e-4, 2e-3)])
def test_trajectories_in_half_precision_stay_near(precision: str, mean: float, most: float) -> None:
    """On the whole; the order in which a processor's BLAS sums decides how single losses are rounded, and that grows."""
    made = llama(precision=precision)
    assert all(x.dtype == np.float32 for k, x in made.states.items() if x.ndim)
    assert f"applied: 17 products in {precision} (@loss)" in [str(r) for r in made.remarks]
    said = steps(made, BATCHES)
    losses = [float(x["loss"]) for x in said]
    off = np.abs(losses / RUN["losses"] - 1)
    assert off.mean() < mean
    assert off.max() < most
    assert losses != RUN["losses"].tolist()
    assert not any(x.get("skipped", 0) for x in said)


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_recomputation_keeps_every_bit_of_a_run(precision: str) -> None:
    plain, made = llama(precision=precision), llama(precision=precision, remat={"b": 2, "s": 64})
    assert any(str(r).startswith("applied: kept for the backward pass") for r in made.remarks)
    assert made.program["train_step"].count("barrier")
    for x, y in zip(steps(plain, BATCHES[:6]), steps(made, BATCHES[:6])):
        assert {k: v.tobytes() for k, v in x.items()} == {k: v.tobytes() for k, v in y.items()}
    with pytest.raises(PassError, match="symbols without a size to weigh memory with: s"):
        llama(remat={"b": 2})


SMALL = """graph @loss(%x: f32[n, 8], %labels: i64[n, 1]) {
  param %norm: f32[8]
  param %up: f32[16, 8]
  param %head: f32[4, 16]
  %m: f32[n, 8] = rms_norm(%x, %norm)
  %y: f32[n, 16] = linear(%m, %up)
  %h: f32[n, 16] = silu(%y)
  %z: f32[n, 4] = linear(%h, %head)
  %p: f32[n, 4] = log_softmax(%z) {axis=1}
  %l: f32[n, 1] = take_along(%p, %labels) {axis=1}
  %t: f32[] = reduce_mean(%l) {axes=(0, 1)}
  %loss: f32[] = neg(%t)
  return %loss
}"""


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_compiled(precision: str) -> None:
    pytest.importorskip("tvm")
    from wasat.backends.tvm.build import Runner
    from wasat.backends.tvm.targets import target_named

    made = train_step(random_program(SMALL), optimizer=SGD(), rate=Constant(0.1), precision=precision, remat={"n": 64})
    assert made.program["train_step"].count("barrier")
    runner = Runner(made.program, target_named("cpu"))
    rng = np.random.default_rng(0)
    states: dict[str, Any] = dict(made.states)
    batch = {"x": rng.standard_normal((12, 8)).astype(np.float32), "labels": rng.integers(0, 4, (12, 1))}
    said = steps(made, [batch] * 4)
    for want in said:
        out = runner("train_step", {**batch, **states})
        states = {k: out[k] for k in states}
        assert_allclose(out["loss"], want["loss"], rtol=1e-2 if precision == "bf16" else 2e-3)
    assert said[-1]["loss"] < said[0]["loss"]
