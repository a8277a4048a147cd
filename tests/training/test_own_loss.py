"""Losses written with ``nn``, and batches of any iterable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.ir import IRError, Program, TypeMismatch, evaluate
from wasat.training.data import DataError, Iterated
from wasat.training.loop import train
from wasat.training.optimizers import SGD, Constant
from wasat.training.step import train_step

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((8, 3), np.float32), RNG.standard_normal((8, 2), np.float32)


def program() -> Program:
    return nn.trace(nn.Sequential(nn.Linear(3, 2)), {"x": "f32[n, 3]"}, outputs=["y"])


def mine(y: nn.Tensor, target: nn.Tensor, x: nn.Tensor, strength: float = 0.5) -> dict[str, nn.Tensor]:
    error = nn.huber(y, target)
    return {"loss": error + strength * (x * x).mean(), "error": error}


def test_a_loss_of_ones_own_sees_inputs_and_outputs_by_name() -> None:
    p = program()
    g = nn.add_loss(p, mine, {"target": "f32[n, 2]"})
    assert g.output_names == ["loss", "error"]
    w = p.load("0.weight")
    loss, error = evaluate(g, {"x": X, "target": Y}, {"0.weight": w})
    d = abs(X @ w.T - Y)
    want = np.where(d <= 1, d * d / 2, d - 0.5).mean()
    np.testing.assert_allclose([loss, error], [want + 0.5 * (X * X).mean(), want], rtol=1e-5)
    assert p["forward"].output_names == ["y"]


def test_a_mean_over_places_is_accumulated_as_one() -> None:
    """Steps over batches whose targets count differently often are one step over all."""
    p = nn.trace(nn.Sequential(nn.Linear(3, 4)), {"x": "f32[n, 3]"}, outputs=["y"])
    nn.add_loss(p, lambda y, labels: nn.cross_entropy(y, labels), {"labels": "i64[n]"})
    labels = np.array([0, -100, -100, -100, 1, 2, 3, 0])
    params: dict[str, Any] = {}

    def after(accumulate: int) -> np.ndarray:
        made = train_step(p, accumulate=accumulate)
        states = dict(made.states)
        for part in np.split(np.arange(8), accumulate):
            g = made.program["train_step"]
            values = evaluate(g, {"x": X[part], "labels": labels[part], **states}, params)
            out = dict(zip(g.output_names, values))
            states = {k: out[k] for k in states}
        return states["0.weight"]

    np.testing.assert_allclose(after(2), after(1), atol=1e-6)


def _mean_of_some(y: nn.Tensor, target: nn.Tensor, some: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """Errors of the rows that count, and how many these are."""
    return ((y - target) * (y - target)).sum(1) * some, some.sum()


MEANS = {  # as people write the mean over the rows of weight ``some``, not all of them 0 in any call
    "divided": lambda each, n, y: each.sum() / n,
    "divided before the sum": lambda each, n, y: (each / n).sum(),
    "times one over": lambda each, n, y: each.sum() * (1.0 / n),
    "kept from 0": lambda each, n, y: each.sum() / nn.maximum(n, 1e-6),
    "a little more": lambda each, n, y: 3.0 * (each.sum() / (n + 1e-8)),
    "a number first": lambda each, n, y: each.sum() / (1e-8 + n),
    "two over the same": lambda each, n, y: each.sum() / n - 0.5 * ((each * each).sum() / n),
    "divided, then weighed": lambda each, n, y: ((each * 1.5) / n * 2.0).sum(),
    "weights divided": lambda each, n, y: (each * (nn.stop_gradient(each * 0.0 + 1.5) / n)).sum(),
    "negative": lambda each, n, y: (-(each / n)).sum(),
    "summed twice": lambda each, n, y: (each.reshape(-1, 1) / n).sum(1).sum(),
    "beside what does not learn": lambda each, n, y: each.sum() / n + (nn.stop_gradient(y) * 2.0).mean(),
}


def stepped(p: Program, batch: dict[str, np.ndarray], accumulate: int, **options: Any) -> np.ndarray:
    """The weight after one update from so many calls."""
    made = train_step(p, accumulate=accumulate, optimizer=SGD(), rate=Constant(0.1), **options)
    g, states = made.program["train_step"], dict(made.states)
    for i in np.split(np.arange(len(batch["x"])), accumulate):
        out = dict(zip(g.output_names, evaluate(g, {**{k: v[i] for k, v in batch.items()}, **states})))
        states = {k: np.asarray(out[k]) for k in states}
    return states[next(k for k in states if k.endswith("weight"))]


ROWS = {"target": "f32[n, 2]", "some": "f32[n]"}
SOME = np.float32([1, 0, 0, 0, 1, 2, 0.5, 1])


@pytest.mark.parametrize("how", MEANS)
def test_means_as_people_write_them_are_accumulated_as_one(how: str) -> None:
    p = program()

    def loss(y: nn.Tensor, target: nn.Tensor, some: nn.Tensor) -> nn.Tensor:
        return MEANS[how](*_mean_of_some(y, target, some), y)

    nn.add_loss(p, loss, ROWS)
    batch = {"x": X, "target": Y, "some": SOME}
    np.testing.assert_allclose(stepped(p, batch, 2), stepped(p, batch, 1), atol=1e-6)
    assert abs(stepped(p, batch, 2, weigh="calls") - stepped(p, batch, 1)).max() > 1e-3


def test_weights_whose_sum_is_negative_divide_by_it() -> None:
    p = program()
    nn.add_loss(p, lambda y, target, some: MEANS["divided"](*_mean_of_some(y, target, some), y), ROWS)
    batch = {"x": X, "target": Y, "some": np.where(np.arange(8) == 4, 1, -SOME)}
    np.testing.assert_allclose(stepped(p, batch, 2), stepped(p, batch, 1), atol=1e-6)


FLOORS = {
    "held to one": lambda each, w: each.sum() / nn.maximum(w.sum(), 1.0),
    "and a little": lambda each, w: each.sum() / (w.sum() + 0.3),
    "of a weight that is none": lambda each, w: (each + 0.1).sum() / nn.where(w.sum() > 0.0, w.sum(), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("how", FLOORS)
def test_a_divisor_that_is_held_above_its_count(how: str) -> None:
    """Calls of little weight, or none, add what they have to the sum, which is divided once."""
    p = program()

    none = how == "of a weight that is none"

    def loss(y: nn.Tensor, target: nn.Tensor, some: nn.Tensor) -> nn.Tensor:
        each = (y * target).sum(axis=1) * (some + 0.2) if none else nn.huber(y, target, reduction="none").sum(axis=1) * some
        return FLOORS[how](each, some)

    nn.add_loss(p, loss, ROWS)
    batch = {"x": X, "target": Y, "some": np.float32([0.1, 0.2, 0.1, 0.3, *([0] * 4 if none else [0, 0.3, 0.1, 0.2])])}
    for parts in (2, 4):
        np.testing.assert_allclose(stepped(p, batch, parts), stepped(p, batch, 1), atol=1e-6)


def test_a_sum_times_another_is_no_mean() -> None:
    """Its calls count alike: what it is multiplied by is no divisor."""
    p = program()
    nn.add_loss(p, lambda y, target, some: (y - target).sum() * (0.1 * some.sum()), ROWS)
    batch = {"x": X, "target": Y, "some": SOME}
    np.testing.assert_array_equal(stepped(p, batch, 2), stepped(p, batch, 2, weigh="calls"))


def test_means_over_different_places_are_refused_or_count_alike() -> None:
    def both(y: nn.Tensor, target: nn.Tensor, some: nn.Tensor) -> nn.Tensor:
        each, n = _mean_of_some(y, target, some)
        return each.sum() / n + 0.1 * (y * y).mean()

    def two(y: nn.Tensor, target: nn.Tensor, some: nn.Tensor) -> nn.Tensor:
        each, n = _mean_of_some(y, target, some)
        return each.sum() / n + each.sum() / (some * some).sum()

    for loss in (both, two):
        p = program()
        nn.add_loss(p, loss, ROWS)
        train_step(p)
        with pytest.raises(IRError, match=r"adds means over different places, .*test_own_loss.*weigh=\"calls\""):
            train_step(p, accumulate=2)
        batch = {"x": X, "target": Y, "some": SOME}
        halves = [stepped(p, {k: v[at : at + 4] for k, v in batch.items()}, 1) for at in (0, 4)]
        np.testing.assert_allclose(stepped(p, batch, 2, weigh="calls"), np.mean(halves, 0), atol=1e-6)
    with pytest.raises(IRError, match="weigh='rows'"):
        train_step(p, weigh="rows")  # type: ignore[arg-type]


def _penalized() -> Program:
    """y = x @ w, and a penalty of w."""

    class Model(nn.Module):
        def __init__(self) -> None:
            self.w = nn.Linear(3, 2)

        def __call__(self, x: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
            return self.w(x), (self.w.weight * self.w.weight).sum()

    return nn.trace(nn.Sequential(Model()), {"x": "f32[n, 3]"}, outputs=["y", "penalty"])


def test_a_mean_beside_a_penalty_of_parameters() -> None:
    """Of the parameters alone there is one value, whatever the call counts."""
    p = _penalized()

    def loss(y: nn.Tensor, penalty: nn.Tensor, target: nn.Tensor, some: nn.Tensor) -> nn.Tensor:
        each, n = _mean_of_some(y, target, some)
        return each.sum() / n + 0.1 * penalty

    nn.add_loss(p, loss, ROWS)
    batch = {"x": X, "target": Y, "some": SOME}
    np.testing.assert_allclose(stepped(p, batch, 2), stepped(p, batch, 1), atol=1e-6)


_UNREAD, _SEVERAL = r"divides by %.*test_own_loss.*, which the data decide", r"by several numbers, %.*test_own_loss.*, %"
REFUSED = {  # divisors that are not read as a count, or differ by more than a factor
    "a case of its own": (lambda e, n: e.sum() / nn.where(n == 0.0, 1.0, n), _UNREAD),
    "one less": (lambda e, n: e.sum() / (n - 1.0), _UNREAD),
    "held from above": (lambda e, n: e.sum() / nn.minimum(n, 3.0), _UNREAD),
    "a root": (lambda e, n: e.sum() / nn.sqrt(n), _UNREAD),
    "of each": (lambda e, n: (-(e / nn.sqrt(n))).sum(), _UNREAD),
    "two held": (lambda e, n: e.sum() / nn.maximum(n, 0.01) + e.sum() / nn.maximum(n, 0.02), _SEVERAL),
    "one of two held": (lambda e, n: e.sum() / n + e.sum() / (n + 1.0), _SEVERAL),
    "one of two cut": (lambda e, n: e.sum() / n + e.sum() / n.cast("i32").cast("f32"), _SEVERAL),
}


@pytest.mark.parametrize("how", REFUSED)
def test_divisors_that_no_weight_of_a_call_fits_are_refused(how: str) -> None:
    made, says = REFUSED[how]
    p = program()
    nn.add_loss(p, lambda y, target, some: made(*_mean_of_some(y, target, some)), ROWS)
    with pytest.raises(IRError, match=says + r".*weigh=\"calls\""):
        train_step(p, accumulate=2)
    train_step(p, accumulate=2, weigh="calls")


def test_a_count_that_is_given_is_refused() -> None:
    """Of one call, or of all that one update takes: nothing tells."""
    p = program()
    nn.add_loss(p, lambda y, target, count: abs(y - target).sum() / count, {"target": "f32[n, 2]", "count": "f32[]"})
    with pytest.raises(IRError, match=r"divides by %count, which the data decide"):
        train_step(p, accumulate=2)
    train_step(p)


BESIDE = {  # whatever the mean divides by
    "a whole count": lambda e, n, k, p: (e * k).sum() / nn.maximum(k.sum(), 1.0) + 0.1 * p,
    "a little": lambda e, n, k, p: e.sum() / nn.maximum(n, 1e-6) + 0.1 * p,
    "where it is not 0": lambda e, n, k, p: e.sum() / nn.where(n > 0.0, n, 1.0) + 0.1 * p,
    "factors": lambda e, n, k, p: e.sum() / n + e.sum() / (2.0 * n) + 0.1 * p,
    "held": lambda e, n, k, p: 0.2 * p - 3.0 * (e.sum() / nn.maximum(n, 2.5)),
    "held in each call, not in all": lambda e, n, k, p: e.sum() / nn.maximum(n, 4.0) + 0.1 * p,
    "more": lambda e, n, k, p: 0.1 * p - e.sum() / (2.0 * (n + 0.3)) + 0.3 * p,
    "cut": lambda e, n, k, p: e.sum() / nn.maximum(n.cast("i32").cast("f32"), 1.0) + 0.1 * p,
}


WEIGHTS = {
    "none in one": [0, 0, 0, 0, 1, 2, 0.5, 1],
    "parts": [0.5, 0.2, 0.4, 0.6, 1, 0.7, 0.5, 1],
    "signed": [-2, 1, 0.2, 0.1, 1, 2, 0.5, 1],
}


@pytest.mark.parametrize("how", BESIDE)
@pytest.mark.parametrize("some", WEIGHTS.values(), ids=WEIGHTS)
def test_a_divisor_and_a_penalty_beside_it(how: str, some: list[float]) -> None:
    """However little a call counts: nothing, less than the divisor is held to, or less than nothing."""
    if how == "factors" and some[0] == 0:
        some = [0.1, *some[1:]]  # by 0 it divides
    p = _penalized()

    def loss(y: nn.Tensor, penalty: nn.Tensor, target: nn.Tensor, some: nn.Tensor) -> nn.Tensor:
        each, n = _mean_of_some(y, target, some)
        return BESIDE[how](each, n, (some > 0.6).cast("f32"), penalty)

    nn.add_loss(p, loss, ROWS)
    batch = {"x": X, "target": Y, "some": np.float32(some)}
    np.testing.assert_allclose(stepped(p, batch, 2), stepped(p, batch, 1), atol=1e-6)
    np.testing.assert_allclose(stepped(p, batch, 4), stepped(p, batch, 1), atol=1e-6)


def test_the_next_update_begins_anew() -> None:
    """Two updates of two calls each, one of which is not finite and adds nothing."""
    p = _penalized()

    def loss(y: nn.Tensor, penalty: nn.Tensor, target: nn.Tensor, some: nn.Tensor) -> nn.Tensor:
        each, n = _mean_of_some(y, target, some)
        return each.sum() / nn.maximum(n, 2.0) + 0.1 * penalty

    nn.add_loss(p, loss, ROWS)
    made = train_step(p, accumulate=2, optimizer=SGD(), rate=Constant(0.1))
    g, states = made.program["train_step"], dict(made.states)
    calls = [slice(0, 4), slice(4, 8), slice(2, 6), slice(0, 3)]
    for i, at in enumerate(calls):
        x = X[at] * (np.inf if i == 2 else 1)
        out = dict(zip(g.output_names, evaluate(g, {"x": x.astype(np.float32), "target": Y[at], "some": SOME[at], **states})))
        states = {k: np.asarray(out[k]) for k in states}
    once = train_step(p, optimizer=SGD(), rate=Constant(0.1))
    g, want = once.program["train_step"], dict(once.states)
    for at in (slice(0, 8), slice(0, 3)):
        out = dict(zip(g.output_names, evaluate(g, {"x": X[at], "target": Y[at], "some": SOME[at], **want})))
        want = {k: np.asarray(out[k]) for k in want}
    name = next(k for k in want if k.endswith("weight"))
    np.testing.assert_allclose(states[name], want[name], atol=1e-6)


def test_what_is_no_loss_is_refused() -> None:
    for f, inputs, says in [
        (lambda z: z, {}, "takes z; @forward and the inputs have x, y"),
        (lambda y: y, {}, r"take \.mean\(\)"),
        (lambda y: 3, {}, "a module returns a Tensor"),
        (lambda y: y.mean(), {"x": "f32[n]"}, "has an input or output x already"),
    ]:
        p = program()
        with pytest.raises(IRError, match=says):
            nn.add_loss(p, f, inputs)
        assert list(p.graphs) == ["forward"]
    with pytest.raises(TypeMismatch, match="one shape"):
        nn.add_loss(program(), lambda y, t: nn.mse(y, t), {"t": "f32[n]"})
    p = program()
    nn.add_loss(p, lambda y: y.mean(), {})
    with pytest.raises(IRError, match="has a graph @loss"):
        nn.add_loss(p, lambda y: y.mean(), {})


def batches(n: int = 3) -> list[dict[str, np.ndarray]]:
    return [{"x": X + i, "target": Y} for i in range(n)]


def test_iterables_begin_again_and_resume_where_they_were() -> None:
    b = Iterated(batches())
    firsts = [next(b)["x"][0, 0] - X[0, 0] for _ in range(5)]
    np.testing.assert_allclose(firsts, [0, 1, 2, 0, 1], atol=1e-5)
    assert b.state() == 5
    again = Iterated(batches())
    again.restore(b.state())
    np.testing.assert_array_equal(next(again)["x"], next(b)["x"])
    b.restore(1)
    np.testing.assert_array_equal(next(b)["x"], X + 1)


def test_an_iterator_goes_back_by_one_only() -> None:
    b = Iterated(iter(batches()))
    start = b.state()
    first = next(b)
    b.restore(start)
    assert next(b) is first
    b.restore(start)
    assert b.state() == 0
    b.restore(2)
    np.testing.assert_array_equal(next(b)["x"], X + 2)
    with pytest.raises(DataError, match="ended after 3 batches"):
        next(b)
    with pytest.raises(DataError, match="cannot go back from batch 3 to 0"):
        b.restore(0)


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(DataError, match="not int"):
        Iterated(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="is empty"):
        next(Iterated([]))
    with pytest.raises(DataError, match="batch 0 is a tuple"):
        next(Iterated([(X, Y)]))  # type: ignore[list-item]
    b = Iterated([{"x": X}, {"x": X[:3]}])
    next(b)
    with pytest.raises(DataError, match=r"batch 1 is .*drop a smaller one"):
        next(b)


def test_a_generator_trains_a_loss_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    p = program()
    nn.add_loss(p, mine, {"target": "f32[n, 2]"})

    def forever() -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield from batches(2)

    whole = train(p, batches(2), tmp_path / "a", steps=6, progress=lambda *_: None)
    train(p, forever(), tmp_path / "b", steps=3, progress=lambda *_: None)
    rest = train(p, forever(), tmp_path / "b", steps=6, progress=lambda *_: None)
    assert [line["loss"] for line in rest.log] == [line["loss"] for line in whole.log]
    assert whole.log[-1]["error"] < whole.log[0]["error"] + 1
