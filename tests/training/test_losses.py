"""Losses against torch: values and gradients; masks, and what a loss graph is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from wasat.ir import Builder, Graph, IRError, Program, TypeMismatch, Value, build, evaluate, parse, parse_type
from wasat.passes import Differentiate, PassManager
from wasat.training.losses import accuracy, add_loss, contrastive, cross_entropy

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "training" / "losses.npz")
Loss = Callable[[Builder, Value], Value]


def loss_and_gradient(loss: Loss, x: np.ndarray, type: str | None = None) -> tuple[Any, Any]:
    shape = type or f"f32[{', '.join(map(str, x.shape))}]"
    program = Program({"loss": build("loss", [("x", parse_type(shape))], loss, ["loss"])})
    PassManager([Differentiate(wrt=("x",))]).run(program)
    value, grad = evaluate(program["gradients"], {"x": x})
    return value, grad


def entropy(labels: str, **options: Any) -> Loss:
    def loss(b: Builder, x: Value) -> Value:
        weight = b.constant(GOLDEN["weight"]) if options.get("weight") else None
        return cross_entropy(b, x, b.constant(GOLDEN[labels]), **{**options, "weight": weight})

    return loss


CASES: dict[str, Loss] = {
    "plain": entropy("labels"),
    "smooth": entropy("padded", smoothing=0.2),
    "weighted": entropy("padded", weight=True),
    "weighted_smooth": entropy("padded", weight=True, smoothing=0.2),
    "z": entropy("padded", z_loss=0.1),
    "contrastive": lambda b, x: contrastive(b, x, b.constant(GOLDEN["other"]), b.constant(1.3)),
}


@pytest.mark.parametrize("case", CASES)
def test_of_torch(case: str) -> None:
    x = GOLDEN["points" if case == "contrastive" else "x"]
    value, grad = loss_and_gradient(CASES[case], x)
    assert_allclose(value, GOLDEN[f"{case}.loss"], rtol=2e-6)
    assert_allclose(grad, GOLDEN[f"{case}.grad"], rtol=1e-5, atol=1e-7)


def test_symbolic_shapes_and_huge_logits() -> None:
    x = GOLDEN["x"] * 1e4
    value, grad = loss_and_gradient(lambda b, v: cross_entropy(b, v, b.constant(GOLDEN["labels"])), x, "f32[3, s, 7]")
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def entropy_at(labels: np.ndarray, mask: np.ndarray | None = None, **options: Any) -> Loss:
    return lambda b, x: cross_entropy(b, x, b.constant(labels), mask=None if mask is None else b.constant(mask), **options)


def test_no_place_left_is_no_loss() -> None:
    for mask in (None, np.ones((3, 4), bool)):
        value, grad = loss_and_gradient(entropy_at(np.full((3, 4), -100), mask, smoothing=0.1, z_loss=0.1), GOLDEN["x"])
        assert value == 0
        assert not grad.any()


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.2, "z_loss": 0.1}])
def test_labels_below_0_and_places_masked_are_no_places(options: dict[str, Any]) -> None:
    x, labels = GOLDEN["x"], GOLDEN["labels"].copy()
    labels[0, :3], labels[2, 1] = -1, -7
    mask = np.ones((3, 4), bool)
    mask[1] = False
    for given, rows in ((None, [0, 1, 2]), (mask, [0, 2])):
        value, grad = loss_and_gradient(entropy_at(labels, given, **options), x)
        keep = [(r, c) for r in rows for c in range(4) if labels[r, c] >= 0]
        only = tuple(np.array(keep).T)
        want, part = loss_and_gradient(entropy_at(labels[only], **options), x[only])
        assert_allclose(value, want, rtol=1e-6)
        assert_allclose(grad[only], part, rtol=1e-5, atol=1e-7)
        grad[only] = 0
        assert not grad.any()
    labels[1] = 99  # masked: any number
    value, grad = loss_and_gradient(entropy_at(labels, mask, **options), x)
    assert_allclose(value, want, rtol=1e-6)


def test_half_precision_is_summed_in_f32() -> None:
    x = GOLDEN["x"].astype(np.float16)
    value, grad = loss_and_gradient(lambda b, v: cross_entropy(b, v, b.constant(GOLDEN["labels"])), x, "f16[3, 4, 7]")
    assert value.dtype == np.float32
    assert grad.dtype == np.float16
    assert_allclose(value, loss_and_gradient(CASES["plain"], x.astype(np.float32))[0], rtol=1e-6)


def test_accuracy() -> None:
    x = np.array([[0, 1, 2], [3, 1, 2], [0, 1, 0], [5, 5, 1]], np.float32)

    def share(mask: list[bool] | None, labels: tuple[int, ...] = (2, 1, 1, 0)) -> Any:
        def body(b: Builder, v: Value) -> Value:
            return accuracy(b, v, b.constant(np.array(labels)), mask=None if mask is None else b.constant(np.array(mask)))

        return evaluate(build("g", [("x", parse_type("f32[4, 3]"))], body), {"x": x})[0]

    assert share(None) == 0.75  # the first of equals counts
    assert share([False, True, True, False]) == 0.5
    assert share([False] * 4) == 0
    assert share(None, (2, -1, 1, -100)) == 1
    assert share([False, True, True, True], (2, -1, 1, 1)) == 0.5
    wide = np.zeros((2, 301), np.float32)
    wide[0, 300] = wide[1, 44] = 1  # the first is no 44
    g = build("g", [("x", parse_type("f32[2, 301]"))], lambda b, v: accuracy(b, v, b.constant(np.array([44, 44], np.uint8))))
    assert evaluate(g, {"x": wide})[0] == 0.5


FORWARD = "graph @forward(%x: f32[n, 3]) {\n %logits: f32[n, 3] = neg(%x)\n return %logits\n}"


def program() -> Program:
    g = parse(FORWARD)
    assert isinstance(g, Graph)
    return Program({"forward": g})


def test_a_loss_graph() -> None:
    p = program()
    g = add_loss(
        p,
        lambda b, v: {"nll": cross_entropy(b, v["logits"], v["labels"]), "accuracy": accuracy(b, v["logits"], v["labels"])},
        {"labels": "i64[n]"},
    )
    assert str(p["forward"]) == str(parse(FORWARD))
    assert p["loss"] is g
    assert [v.name for v in g.inputs] == ["x", "labels"]
    assert g.output_names == ["nll", "accuracy"]
    nll, right = evaluate(g, {"x": -np.eye(3, dtype=np.float32), "labels": np.arange(3)})
    assert_allclose(nll, np.log(np.e + 2) - 1, rtol=1e-6)  # type: ignore[arg-type]
    assert right == 1
    again = add_loss(p, lambda b, v: cross_entropy(b, v["logits"], v["l"]), {"l": "i32[n]"}, name="other")
    assert again.output_names == ["loss"]
    with pytest.raises(IRError, match="the program has a graph @loss"):
        add_loss(p, lambda b, v: b.reduce_sum(v["x"], axes=(0, 1)), {})


def test_what_does_not_fit_is_refused() -> None:
    p = program()
    with pytest.raises(TypeMismatch, match=r"take_along.*ranks differ"):
        add_loss(p, lambda b, v: cross_entropy(b, v["logits"], v["labels"]), {"labels": "i64[n, 1]"})
    assert list(p.graphs) == ["forward"]
