"""Optimizers, schedules, clipping and accumulation against torch.optim; averages against their definition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from wasat.ir import ArrayParam, Builder, Graph, IRError, Program, evaluate, parse_type, type_of
from wasat.training.optimizers import SGD, Adafactor, AdamW, Constant, Cosine, Linear, Muon, OutOfRange, Schedule
from wasat.training.step import TrainStep, train_step

FOLDER = Path(__file__).parent.parent / "golden" / "training"
GOLDEN, MUON = np.load(FOLDER / "optimizers.npz"), np.load(FOLDER / "muon.npz")
NAMES, MUON_NAMES = ["kernel", "matrix", "bias"], ["tall", "wide", "embedding", "kernel", "bias"]
STEPS = len(GOLDEN["grad.bias"])
ADAM = AdamW(0.8, 0.95, 1e-6, 0.1)


def given_gradients(golden: Mapping[str, np.ndarray] = GOLDEN, names: Sequence[str] = NAMES) -> Program:
    """sum(parameter * input): the input is the gradient."""
    g = Graph("loss")
    b = Builder(g)
    loss = b.constant(0.0)
    params = {}
    for name in names:
        start = golden[f"start.{name}"]
        params[name] = ArrayParam(start, type_of(start))
        p, x = g.add_param(name, type_of(start)), g.add_input(f"{name}.gradient", type_of(start))
        loss = b.add(loss, b.reduce_sum(b.mul(p, x), axes=tuple(range(start.ndim))))
    g.set_outputs([loss], ["loss"])
    return Program({"loss": g}, params)


def run(
    made: TrainStep, steps: int = STEPS, golden: Mapping[str, np.ndarray] = GOLDEN, names: Sequence[str] = NAMES
) -> list[dict[str, Any]]:
    states, trace = dict(made.states), []
    g = made.program["train_step"]
    for t in range(steps):
        batch = {f"{name}.gradient": golden[f"grad.{name}"][t] for name in names}
        out = dict(zip(g.output_names, evaluate(g, {**batch, **states})))
        states = {k: out[k] for k in states}  # type: ignore[misc]
        trace.append(out)
    return trace


CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": SGD(decay=0.1), "rate": Constant(0.05)},
    "momentum": {"optimizer": SGD(0.9, decay=0.1), "rate": Constant(0.05)},
    "nesterov": {"optimizer": SGD(0.8, nesterov=True), "rate": Constant(0.05)},
    "adamw": {"optimizer": ADAM, "rate": Constant(0.02)},
    "adafactor": {"optimizer": Adafactor(decay=0.1), "rate": Constant(0.03)},
    "clipped": {"optimizer": ADAM, "rate": Constant(0.02), "clip": 1.0},
    "accumulated": {"optimizer": ADAM, "rate": Constant(0.02), "clip": 1.0, "accumulate": 3},
    "linear": {"optimizer": ADAM, "rate": Linear(0.02, warmup=2, steps=6)},
    "cosine": {"optimizer": ADAM, "rate": Cosine(0.02, warmup=2, steps=6, final=0.002)},
}


@pytest.mark.parametrize("case", CASES)
def test_of_torch(case: str) -> None:
    trace = run(train_step(given_gradients(), **CASES[case]))
    for t, out in enumerate(trace):
        for name in NAMES:
            want = GOLDEN[f"{case}.{name}"][t]
            assert_allclose(out[name], want, rtol=2e-5, atol=2e-6, err_msg=f"{name} after step {t}")


def test_muon_of_torch() -> None:
    muon = Muon(0.9, beta1=0.8, beta2=0.95, eps=1e-6)
    made = train_step(given_gradients(MUON, MUON_NAMES), optimizer=muon, rate=Constant(0.02), clip=None)
    for t, out in enumerate(run(made, STEPS, MUON, MUON_NAMES)):
        for name in MUON_NAMES:
            assert_allclose(out[name], MUON[name][t], rtol=2e-5, atol=2e-6, err_msg=f"{name} after step {t}")


@pytest.mark.parametrize("name", ["tall", "wide"])
def test_muon_moves_along_the_singular_vectors(name: str) -> None:
    """A first update is U f(S) V of the gradient, without momentum; f brings what is above a thousandth of S[0] near 1."""
    program = given_gradients(MUON, [name])
    optimizer, batch = Muon(0.0, decay=0.0), {f"{name}.gradient": MUON[f"grad.{name}"][0]}
    made = train_step(program, optimizer=optimizer, rate=Constant(0.5), clip=None)
    g = made.program["train_step"]
    out = dict(zip(g.output_names, evaluate(g, {**batch, **made.states})))
    moved = (made.states[name] - out[name]) / (0.5 * 0.2 * math.sqrt(max(made.states[name].shape)))
    u, _, v = np.linalg.svd(batch[f"{name}.gradient"], full_matrices=False)
    turned = u.T @ moved @ v.T
    assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-5)
    assert (np.diag(turned) > 0.65).all()
    assert (np.diag(turned) < 1.25).all()


def test_muon_takes_no_step_of_nothing() -> None:
    zeros = {f"{k}.gradient": np.zeros_like(MUON[f"start.{k}"]) for k in MUON_NAMES}
    made = train_step(given_gradients(MUON, MUON_NAMES), optimizer=Muon(decay=0.0))
    g = made.program["train_step"]
    out = dict(zip(g.output_names, evaluate(g, {**zeros, **made.states})))
    assert all(np.array_equal(out[k], made.states[k]) for k in MUON_NAMES)  # type: ignore[arg-type]


def test_states_have_the_sizes_of_the_method() -> None:
    shapes = {k: v.shape for k, v in train_step(given_gradients(), optimizer=Adafactor()).states.items()}
    assert shapes == {
        "kernel": (2, 3, 4), "matrix": (4, 3), "bias": (3,), "optimizer.rows.kernel": (2, 3, 1),
        "optimizer.columns.kernel": (2, 1, 4), "optimizer.rows.matrix": (4, 1), "optimizer.columns.matrix": (1, 3),
        "optimizer.square.bias": (3,), "optimizer.count": (),
    }  # fmt: skip
    assert set(train_step(given_gradients(), optimizer=SGD()).states) == {*NAMES, "optimizer.count"}


@pytest.mark.parametrize(("muon", "orthogonal", "others"), [
    (Muon(), ["tall", "wide"], ["embedding", "kernel", "bias"]),
    (Muon(adamw=("t*",)), ["wide", "embedding"], ["tall", "kernel", "bias"]),
])  # fmt: skip
def test_what_muon_leaves_to_adamw(muon: Muon, orthogonal: list[str], others: list[str]) -> None:
    states = set(train_step(given_gradients(MUON, MUON_NAMES), optimizer=muon).states)
    slots = {f"momentum.{k}" for k in orthogonal} | {f"{slot}.{k}" for k in others for slot in ("mean", "square")}
    assert states == {*MUON_NAMES, "optimizer.count", *(f"optimizer.{x}" for x in slots)}


@pytest.mark.parametrize(("schedule", "at"), [
    (Constant(0.5), [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    (Constant(0.5, warmup=4), [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5]),
    (Linear(1.0, warmup=1, steps=5, final=0.2), [1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
    (Cosine(1.0, steps=4), [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0, 0.0, 0.0]),
    (Cosine(1.0, warmup=2, steps=4, final=0.5), [0.5, 1.0, 1.0, 0.75, 0.5, 0.5, 0.5]),
])  # fmt: skip
def test_schedules(schedule: Schedule, at: list[float]) -> None:
    g = Graph("rate")
    step = g.add_input("step", parse_type("f32[]"))
    g.set_outputs([schedule(Builder(g), step)])
    assert_allclose([evaluate(g, {"step": float(t)})[0] for t in range(len(at))], at, atol=1e-7)


@pytest.mark.parametrize("schedule", [Linear, Cosine])
def test_what_falls_says_until_when(schedule: Any) -> None:
    with pytest.raises(TypeError, match="steps"):
        schedule(1e-3)


OUT_OF_RANGE: list[tuple[Any, dict[str, Any], str]] = [
    (Constant, {"rate": -0.5}, "Constant: rate = -0.5 must be at least 0 and finite"),
    (Constant, {"rate": math.nan}, "rate = nan must be"),
    (Constant, {"rate": 0.1, "warmup": -1}, "warmup = -1 must be at least 0"),
    (Linear, {"rate": -0.5, "steps": 4}, "Linear: rate = -0.5 must be at least 0 and finite"),
    (Linear, {"rate": 0.5, "steps": 0}, "steps = 0 must be at least 1"),
    (Cosine, {"rate": 0.5, "steps": 40, "warmup": 40}, "Cosine: warmup = 40 must be below steps = 40"),
    (Cosine, {"rate": 0.5, "steps": 4, "final": -0.1}, "final = -0.1 must be between 0 and rate = 0.5"),
    (Cosine, {"rate": 0.5, "steps": 4, "final": 0.6}, "final = 0.6 must be between 0 and rate = 0.5"),
    (SGD, {"momentum": 1.0}, "SGD: momentum = 1.0 must be at least 0 and below 1"),
    (SGD, {"momentum": -0.1}, "momentum = -0.1"),
    (SGD, {"nesterov": True}, "nesterov = True must be false where there is no momentum"),
    (SGD, {"decay": -0.1}, "decay = -0.1 must be at least 0"),
    (AdamW, {"beta1": 1.5}, "AdamW: beta1 = 1.5 must be at least 0 and below 1"),
    (AdamW, {"beta2": 1.0}, "beta2 = 1.0 must be"),
    (AdamW, {"beta2": -0.1}, "beta2 = -0.1 must be"),
    (AdamW, {"eps": 0.0}, "eps = 0.0 must be above 0"),
    (AdamW, {"eps": 1e-50}, "eps = 1e-50 must be above 0, in f32"),
    (AdamW, {"decay": -0.1}, "decay = -0.1 must be at least 0"),
    (Muon, {"momentum": 1.0}, "Muon: momentum = 1.0 must be at least 0 and below 1"),
    (Muon, {"rounds": 0}, "Muon: rounds = 0 must be at least 1 and below 100"),
    (Muon, {"rounds": 100}, "rounds = 100 must be"),
    (Muon, {"beta2": 1.0}, "AdamW: beta2 = 1.0 must be"),
    (Muon, {"decay": -0.1}, "decay = -0.1 must be at least 0"),
    (Adafactor, {"beta2_decay": 0.8}, "Adafactor: beta2_decay = 0.8 must be at most 0"),
    (Adafactor, {"eps1": 1e-30}, r"eps1 = 1e-30 must be at least 2\*\*-63"),
    (Adafactor, {"eps2": -1e-3}, "eps2 = -0.001 must be at least 0"),
    (Adafactor, {"clip": 0.0}, "clip = 0.0 must be above 0"),
    (Adafactor, {"decay": math.inf}, "decay = inf must be"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "numbers", "message"), OUT_OF_RANGE)
def test_numbers_out_of_range(cls: Any, numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(IRError, match=message) as e:
        cls(**numbers)
    assert isinstance(e.value, OutOfRange)
    assert e.value.field in numbers


def test_the_ends_of_the_ranges_are_in_them() -> None:
    adam, factor = AdamW(0.0, 0.0, 2.0**-126, 0.0), Adafactor(0.0, 2.0**-63, 0.0)
    for optimizer in (SGD(0.0), SGD(0.5, nesterov=True), adam, factor, Muon(0.0, rounds=1)):
        for out in run(train_step(given_gradients(), optimizer=optimizer, rate=Cosine(0.0, warmup=0, steps=1, final=0.0))):
            assert all(np.isfinite(out[name]).all() for name in NAMES)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.99999, 1 - 2.0**-30])
def test_the_first_moments_are_unbiased(beta: float) -> None:
    """Of gradients that stay what they are, the moments, unbiased, are these and their squares: each step is the rate."""
    g = Graph("update")
    b = Builder(g)
    p, x, mean, square = (g.add_input(name, parse_type("f32[3]")) for name in ("p", "x", "mean", "square"))
    count = g.add_input("count", parse_type("f32[]"))
    slots = {"mean": mean, "square": square}
    moved, new = AdamW(beta, beta, 1e-12, 0.0).update(b, p, x, slots, b.constant(1.0), count)
    g.set_outputs([moved, new["mean"], new["square"]])
    zero, gradient = np.zeros(3, np.float32), np.array([0.5, -3, 20], np.float32)
    m = v = zero
    for t in range(1, 6):
        moved_by, m, v = evaluate(g, {"p": zero, "x": gradient, "mean": m, "square": v, "count": float(t)})  # type: ignore[assignment]
        assert_allclose(moved_by, -np.sign(gradient), rtol=1e-6)


def test_the_rate_and_the_norm_come_out() -> None:
    trace = run(train_step(given_gradients(), rate=Linear(1.0, steps=4), clip=0.5), 2)
    assert [float(out["rate"]) for out in trace] == [1.0, 0.75]
    norm = np.sqrt(sum((GOLDEN[f"grad.{k}"][0] ** 2).sum() for k in NAMES))
    assert_allclose(trace[0]["grad_norm"], norm, rtol=1e-6)  # before clipping


def test_averages_follow_the_updates() -> None:
    trace = run(train_step(given_gradients(), optimizer=SGD(), rate=Constant(0.1), ema=0.75, accumulate=2))
    average = GOLDEN["start.matrix"]
    for t, out in enumerate(trace):
        if t % 2:
            average = average + 0.25 * (out["matrix"] - average)
        assert_allclose(out["ema.matrix"], average, rtol=1e-6, atol=1e-7)


def test_an_infinite_gradient_does_not_stay_in_the_sum() -> None:
    made = train_step(given_gradients(), optimizer=SGD(), accumulate=2)
    g = made.program["train_step"]
    batch = {f"{name}.gradient": np.full_like(GOLDEN[f"start.{name}"], np.inf) for name in NAMES}
    out = dict(zip(g.output_names, evaluate(g, {**batch, **made.states, "optimizer.count": np.int64(1)})))
    assert not np.asarray(out["optimizer.sum.bias"]).any()


def test_decay_leaves_vectors_alone() -> None:
    for optimizer in (SGD(decay=0.5), AdamW(decay=0.5), Adafactor(decay=0.5), Muon(decay=0.5)):
        made = train_step(given_gradients(), optimizer=optimizer, rate=Constant(0.1))
        g = made.program["train_step"]
        batch = {f"{name}.gradient": np.zeros_like(GOLDEN[f"start.{name}"]) for name in NAMES}
        out = dict(zip(g.output_names, evaluate(g, {**batch, **made.states})))
        assert_allclose(out["bias"], made.states["bias"], rtol=0)  # type: ignore[arg-type]
        assert_allclose(out["matrix"], made.states["matrix"] * 0.95, rtol=1e-6)  # type: ignore[arg-type]


def test_adafactor_moves_by_the_size_of_the_parameter() -> None:
    program = given_gradients()
    program.params["bias"] = ArrayParam(np.zeros(3, np.float32), type_of(np.zeros(3, np.float32)))
    first, second = run(train_step(program, optimizer=Adafactor(), rate=Constant(2.0)), 2)  # a rate above 1 / sqrt(count)
    sizes = [float(np.sqrt((x**2).mean())) for x in (GOLDEN["start.matrix"], first["matrix"])]
    moved = [first["matrix"] - GOLDEN["start.matrix"], second["matrix"] - first["matrix"]]
    assert_allclose(np.sqrt((moved[0] ** 2).mean()), sizes[0], rtol=1e-5)  # 1 / sqrt(1) of it
    assert np.sqrt((moved[1] ** 2).mean()) <= sizes[1] / np.sqrt(2) * (1 + 1e-5)
    assert_allclose(np.abs(first["bias"]), 1e-3, rtol=1e-5)  # of nothing, eps2


def test_small_gradients_are_not_scaled_up() -> None:
    free, limited = (run(train_step(given_gradients(), optimizer=SGD(), clip=c), 1)[0] for c in (None, 1e6))
    assert np.array_equal(free["matrix"], limited["matrix"])


@pytest.mark.parametrize(("options", "message"), [
    ({"accumulate": 0}, "accumulate >= 1"), ({"clip": 0.0}, "clip > 0"), ({"ema": 1.0}, "ema < 1"), ({"ema": -0.1}, "0 <= ema"),
])  # fmt: skip
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(IRError, match=message):
        train_step(given_gradients(), **options)
