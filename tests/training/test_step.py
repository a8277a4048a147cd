"""One program per step: its trajectory is torch's, interpreted and compiled; names, states, refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from wasat.frontend import from_pretrained
from wasat.ir import ArrayParam, Graph, IRError, Program, evaluate, parse, parse_program
from wasat.passes import Cleanup, FuseAttention, FuseNorm, FuseRope, PassError, PassManager
from wasat.training.losses import add_loss, cross_entropy
from wasat.training.optimizers import SGD, AdamW, Constant, Cosine
from wasat.training.step import TrainStep, train_step

from wasat.testing import random_program

HERE = Path(__file__).parent.parent / "golden"
GOLDEN = np.load(HERE / "training" / "run.npz")
WATCHED = "model.layers.1.mlp.down_proj.weight"
Step = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@cache
def llama(fused: bool) -> TrainStep:
    program = from_pretrained(HERE / "hf" / "llama")
    if fused:
        PassManager([Cleanup(), FuseNorm(), FuseRope(), FuseAttention()]).run(program)
    add_loss(program, lambda b, v: cross_entropy(b, v["logits"], v["labels"]), {"labels": "i64[b, s]"})
    return train_step(program, optimizer=AdamW(decay=0.1), rate=Cosine(3e-3, warmup=5, steps=20), clip=1.0)


def check_trajectory(made: TrainStep, step: Step) -> None:
    states: dict[str, Any] = dict(made.states)
    losses, norms = [], []
    for t in range(20):
        batch = {"tokens": GOLDEN["ids"][t % 4], "labels": GOLDEN["labels"][t % 4]}
        out = step({**batch, **states})
        states = {k: out[k] for k in states}
        losses.append(float(out["loss"]))
        norms.append(float(out["grad_norm"]))
    assert_allclose(losses, GOLDEN["losses"], rtol=1e-5)
    assert_allclose(norms, GOLDEN["norms"], rtol=1e-5)
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])
    assert int(states["optimizer.count"]) == 20
    assert_allclose(states[WATCHED], GOLDEN[WATCHED], atol=2e-6)
    assert np.abs(states[WATCHED] - made.states[WATCHED]).max() > 0.02


def interpreted(g: Graph) -> Step:
    return lambda feed: dict(zip(g.output_names, evaluate(g, feed)))


@pytest.mark.parametrize("fused", [False, True])
def test_the_trajectory_of_torch(fused: bool) -> None:
    made = llama(fused)
    check_trajectory(made, interpreted(made.program["train_step"]))


def test_the_trajectory_compiled() -> None:
    pytest.importorskip("tvm")
    from wasat.backends.tvm.build import Runner
    from wasat.backends.tvm.targets import target_named

    made = llama(True)
    runner = Runner(made.program, target_named("cpu"))
    check_trajectory(made, lambda feed: runner("train_step", feed))


def test_states_go_in_and_come_out_under_the_same_names() -> None:
    made = llama(True)
    g = made.program["train_step"]
    states = made.program.interface.state_names
    assert list(made.states) == states
    assert [v.name for v in g.inputs] == ["tokens", "labels", *states]
    assert g.output_names == ["loss", "grad_norm", "rate", *states]
    for v, out in zip(g.inputs[2:], g.outputs[3:]):
        assert v.type == out.type
        assert made.states[v.name].shape == v.shape
    assert not g.params
    assert not made.program.params
    assert str(parse(str(g))) == str(g)


TEXT = """graph @loss(%x: f32[n, 2]) {
  param %w: f32[2, 3]
  param %frozen: f32[3]
  param %half: f16[3]
  %y: f32[n, 3] = matmul(%x, %w)
  %z: f32[n, 3] = mul(%y, %frozen)
  %h: f32[3] = cast(%half) {dtype=f32}
  %d: f32[n, 3] = add(%z, %h)
  %loss: f32[] = reduce_sum(%d) {axes=(0, 1)}
  return %loss, %y
}"""
STEP = """graph @train_step(%x: f32[n, 2], %w: f32[2, 3], %optimizer.count: i64[]) {
  param %frozen: f32[3]
  param %half: f16[3]
"""


def test_chosen_parameters_are_trained_and_the_program_stays() -> None:
    program = random_program(TEXT)
    made = train_step(program, optimizer=SGD(), rate=Constant(0.5), train=("w",))
    assert str(program) == str(parse_program(TEXT))
    g = made.program["train_step"]
    assert str(g).startswith(STEP)
    assert g.output_names == ["loss", "y", "grad_norm", "rate", "w", "optimizer.count"]
    assert list(made.program.params) == ["frozen", "half"]
    params = {k: p.load() for k, p in made.program.params.items()}
    x = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    out = dict(zip(g.output_names, evaluate(g, {"x": x, **made.states}, params)))
    gradient = x.sum(0)[:, None] * params["frozen"]
    assert_allclose(out["w"], made.states["w"] - 0.5 * gradient, rtol=1e-6)  # type: ignore[arg-type]
    assert_allclose(out["grad_norm"], np.sqrt((gradient**2).sum()), rtol=1e-6)  # type: ignore[arg-type]


REFUSED: dict[str, tuple[str, tuple[str, ...], type[Exception], str]] = {
    "half": (TEXT, ("w", "half"), IRError, r"parameter half is f16\[3\]: train_step updates f32 parameters"),
    "an input": (TEXT, ("w", "x"), IRError, "train= names inputs of @loss: x"),
    "nothing": (TEXT, ("v*",), PassError, r"v\* chooses no float parameter"),
    "an output's name": (TEXT.replace("return %loss, %y", "return %loss, rate=%y"), ("w",), IRError, "of its own named rate"),
    "a parameter's name": (TEXT.replace("return %loss, %y", "return %loss, w=%y"), ("w",), IRError, "of its own named w"),
    "a gradient's name": (
        TEXT.replace("return %loss, %y", 'return %loss, "grad.penalty"=%y'), ("w",), IRError,
        r"grad\.penalty: gradients are called so",
    ),
    "a parameter of a state's name": (
        TEXT.replace("%half", "%optimizer.count"), ("w",), IRError, "named optimizer.count: what a step says or keeps"),
    "a parameter of what is said": (TEXT.replace("%w", "%rate"), ("rate",), IRError, "named rate: what a step says or keeps"),
    "a state's name": (TEXT.replace("%x", "%optimizer.count"), ("w",), IRError, "already has a value %optimizer.count"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    text, train, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        train_step(random_program(text), train=train)


def test_dropout_takes_its_key_with_the_batch() -> None:
    text = """graph @loss(%x: f32[8], %key: u32[2]) {
  param %w: f32[8]
  %y: f32[8] = mul(%x, %w)
  %d: f32[8] = dropout(%y, %key) {rate=0.5}
  %loss: f32[] = reduce_sum(%d) {axes=(0,)}
  return %loss
}"""
    program: Program = random_program(text)
    made = train_step(program, optimizer=SGD(), rate=Constant(1.0))
    run = interpreted(made.program["train_step"])
    moved = []
    for seed in (1, 1, 2):
        out = run({"x": np.ones(8, np.float32), "key": np.array([seed, 0], np.uint32), **made.states})
        moved.append(made.states["w"] - out["w"])
    assert_allclose(moved[0], moved[1], rtol=0)
    assert (moved[0] != moved[2]).any()
    assert set(np.round(moved[0], 3)) == {0.0, 2.0}


CLASSES = """graph @forward(%x: f32[n, 4]) {
  param %ema.w: f32[4, 5]
  param %w: f32[4, 4]
  %h: f32[n, 4] = matmul(%x, %w)
  %logits: f32[n, 5] = matmul(%h, %ema.w)
  return %logits
}"""


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_with_ignored_labels_are_one_batch(weighted: bool, clip: float | None) -> None:
    rng = np.random.default_rng(0)
    program = random_program(CLASSES)
    weight = np.arange(1, 6, dtype=np.float32)
    add_loss(
        program,
        lambda b, v: cross_entropy(
            b, v["logits"], v["labels"], weight=b.constant(weight) if weighted else None, z_loss=0.0 if weighted else 0.01
        ),
        {"labels": "i64[n]"},
    )
    x, labels = rng.standard_normal((12, 4), np.float32), rng.integers(0, 5, 12)
    labels[[0, 4, 5, 6]] = -100
    labels[8:] = -1  # a call without a label
    ends = []
    for parts in (1, 3):
        made = train_step(program, optimizer=SGD(), rate=Constant(0.1), accumulate=parts, ema=0.5, clip=clip)
        run, states = interpreted(made.program["train_step"]), dict(made.states)
        for a, b in zip(np.split(x, parts), np.split(labels, parts)):
            out = run({"x": a, "labels": b, **states})
            states = {k: np.asarray(out[k]) for k in states}
        ends.append({"norm": np.asarray(out["grad_norm"]), **{made.averages.get(k, k): states[k] for k in ("w", "ema.w")}})
        assert all(not np.array_equal(states[k], made.states[k]) for k in ("w", "ema.w"))
    for k in ends[0]:
        assert_allclose(ends[1][k], ends[0][k], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("names", [
    ("w", "optimizer.sum.w"), ("optimizer.sum.w", "w"), ("w", "optimizer.mean.w"), ("optimizer.square.v", "v"),
    ("sum", "optimizer.sum.optimizer.sum.sum"), ("m", "ema.m"), ("step", "loss.step"),
])  # fmt: skip
def test_states_of_parameters_with_any_names(names: tuple[str, str]) -> None:
    """Their own trajectories, those of the same parameters with plain names."""
    ends = []
    for first, second in (("a", "b"), names):
        program = random_program(CLASSES.replace("ema.w", "2").replace("%w", f"%{first}").replace("%2", f"%{second}"))
        program.params = {first: program.params[first], second: program.params[second]}
        add_loss(program, lambda b, v: cross_entropy(b, v["logits"], v["labels"]), {"labels": "i64[n]"})
        made = train_step(program, optimizer=AdamW(), rate=Constant(0.1), accumulate=2, ema=0.5)
        assert len(made.states) == 2 * 5 + 2
        run, states = interpreted(made.program["train_step"]), dict(made.states)
        rng = np.random.default_rng(1)
        for _ in range(4):
            out = run({"x": rng.standard_normal((3, 4), np.float32), "labels": rng.integers(0, 5, 3), **states})
            states = {k: np.asarray(out[k]) for k in states}
        ends.append([states[k] for k in (first, second, made.averages[first], made.averages[second])])
    for got, want in zip(*ends):
        np.testing.assert_array_equal(got, want)


def test_an_average_has_a_name_that_no_parameter_has() -> None:
    program = random_program(CLASSES)
    add_loss(program, lambda b, v: cross_entropy(b, v["logits"], v["labels"]), {"labels": "i64[n]"})
    made = train_step(program, ema=0.5)
    assert sorted(made.averages.values()) == ["ema.ema.ema.w", "ema.ema.w"]  # one parameter is itself called ema.w
    for name, average in made.averages.items():
        assert np.array_equal(made.states[average], program.params[name].load())
        assert np.array_equal(made.states[name], program.params[name].load())
    assert train_step(program).averages == {}


def test_micro_batches_of_another_loss_count_alike() -> None:
    """A loss that is no mean over places: the step follows the mean of the gradients, here 2 w x of each call, at w = 3."""
    program = random_program("""graph @loss(%x: f32[n]) {
  param %w: f32[]
  %p: f32[] = mul(%w, %w)
  %q: f32[n] = mul(%x, %p)
  %loss: f32[] = reduce_sum(%q) {axes=(0,)}
  return loss=%loss
}""")
    program.params["w"] = ArrayParam(np.array(3.0, np.float32), program.params["w"].type)
    made = train_step(program, optimizer=SGD(), rate=Constant(0.125), accumulate=2)
    run, states = interpreted(made.program["train_step"]), dict(made.states)
    seen = []
    for x in ([1.0], [2.0, 3.0]):
        out = run({"x": np.array(x, np.float32), **states})
        states = {k: np.asarray(out[k]) for k in states}
        seen.append(float(states["w"]))
    assert seen == [3.0, 3.0 - 0.125 * (6 * 1 + 6 * 5) / 2]
