"""The reverse pass itself; each operation's own gradient is checked in test_registry.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from wasat.ir import (
    Builder,
    Graph,
    Loc,
    NotDifferentiable,
    TypeMismatch,
    Value,
    build,
    evaluate,
    parse,
    parse_type,
    type_of,
    verify,
)
from wasat.ir.vjp import backward


def graph(**inputs: str) -> tuple[Graph, Builder, list[Value]]:
    g = Graph("g")
    values = [g.add_input(k, parse_type(t)) for k, t in inputs.items()]
    return g, Builder(g), values


def run(g: Graph, outputs: list[Value], **feed: Any) -> list[Any]:
    g.set_outputs(outputs, [f"o{i}" for i in range(len(outputs))])
    verify(g)
    assert str(parse(str(g))) == str(g)
    return evaluate(g, {k: np.asarray(v) for k, v in feed.items()})


def only(grads: list[Value | None]) -> list[Value]:
    assert all(v is not None for v in grads)
    return [v for v in grads if v is not None]


def test_uses_add_up() -> None:
    g, b, (x,) = graph(x="f64[3]")
    y = b.add(b.mul(x, x), b.sin(x))
    (dx,) = only(backward(g, [y, x], [b.constant(np.ones(3)), b.constant(np.full(3, 10.0))], [x]))
    at = np.array([0.5, -1.0, 2.0])
    assert_allclose(run(g, [dx], x=at)[0], 2 * at + np.cos(at) + 10)


def test_existing_nodes_stay_and_composites_keep_their_operation() -> None:
    g, b, (x, w) = graph(x="f64[b, 4]", w="f64[4]")
    y = b.rms_norm(x, w, eps=1e-12)  # its gradient is its decomposition's
    before = [repr(n) for n in g.nodes]
    grads = only(backward(g, [y], [b.mul(y, 0.5)], [x, w]))
    assert [repr(n) for n in g.nodes][: len(before)] == before
    assert g.count("rms_norm") == 1
    feed = {"x": np.random.default_rng(0).standard_normal((2, 4)), "w": np.arange(1.0, 5)}
    dx, dw = run(g, grads, **feed)
    n = feed["x"] / np.sqrt((feed["x"] ** 2).mean(-1, keepdims=True))
    up = 0.5 * n * feed["w"]
    assert_allclose(dw, (up * n).sum(0), rtol=1e-6)
    assert_allclose((dx * feed["x"]).sum(-1), 0, atol=1e-5)  # the norm does not depend on the length of x


def test_one_value_as_several_operands_of_a_composite() -> None:
    g, b, (x,) = graph(x="f64[1, 3, 2, 4]")
    y = b.attention(x, x, x, scale=0.5, causal=True)
    (dx,) = only(backward(g, [y], [b.constant(np.ones((1, 3, 2, 4)))], [x]))
    at = np.random.default_rng(0).standard_normal((1, 3, 2, 4))
    (got,) = run(g, [dx], x=at)
    want, h = np.zeros_like(at), 1e-5
    f = build("f", [("x", x.type)], lambda b, x: b.attention(x, x, x, scale=0.5, causal=True))
    for i in np.ndindex(at.shape):
        e = np.zeros_like(at)
        e[i] = h
        want[i] = (evaluate(f, {"x": at + e})[0].sum() - evaluate(f, {"x": at - e})[0].sum()) / (2 * h)  # type: ignore[union-attr]
    assert_allclose(got, want, rtol=1e-5, atol=1e-8)


def test_a_decomposition_may_be_its_operand() -> None:
    g, b, (x,) = graph(x="f64[3]")
    y = b.reduce_mean(x, axes=())
    (dx,) = only(backward(g, [y], [b.constant(np.arange(3.0))], [x]))
    assert_allclose(run(g, [dx], x=np.ones(3))[0], np.arange(3.0))


def test_nothing_flows_through_stop_gradient_integers_and_steps() -> None:
    g, b, (x, y) = graph(x="f64[3]", y="f64[3]")
    stopped = b.mul(b.stop_gradient(x), y)
    steps = b.add(b.floor(x), b.cast(b.cast(x, dtype="i64"), dtype="f64"))
    chosen = b.select(b.greater(x, 0.0), y, steps)
    out = b.add(stopped, chosen)
    dx, dy = backward(g, [out], [b.constant(np.ones(3))], [x, y])
    assert dx is None
    assert dy is not None
    at = np.array([0.5, -1.5, 2.5])
    assert_allclose(run(g, [dy], x=at, y=at)[0], at + (at > 0))


def test_quantized_weights_have_no_gradient() -> None:
    g, b, (x, w) = graph(x="f64[2, 4]", w="f64[3, 4]")
    y = b.quantized_linear(x, b.quantize(w, scheme="int8", block=4))
    dx, dw = backward(g, [y], [b.constant(np.ones((2, 3)))], [x, w])
    assert dw is None
    assert dx is not None
    at = np.array([[127.0, 0, 1, 2], [127.0, 1, 1, 1], [127.0, 2, 0, 3]])
    assert_allclose(run(g, [dx], x=np.ones((2, 4)), w=at)[0], np.tile(at.sum(0), (2, 1)))


def test_unrelated_values_have_no_gradient() -> None:
    g, b, (x, y) = graph(x="f64[3]", y="f64[3]")
    out = b.exp(x)
    seed = b.constant(np.ones(3))
    nodes = len(g)
    assert backward(g, [out], [seed], [y]) == [None]
    assert len(g) == nodes  # and nothing is computed for them
    twice = b.mul(b.mul(x, y), y)
    adds = g.count("add")
    backward(g, [twice], [seed], [x])
    assert g.count("add") == adds  # nor added up for y


def test_with_respect_to_a_value_in_the_middle() -> None:
    g, b, (x,) = graph(x="f64[3]")
    h = b.exp(x)
    out = b.mul(h, h)
    dh, dx = only(backward(g, [out], [b.constant(np.ones(3))], [h, x]))
    at = np.array([0.0, 1.0, -1.0])
    got = run(g, [dh, dx], x=at)
    assert_allclose(got[0], 2 * np.exp(at))
    assert_allclose(got[1], 2 * np.exp(2 * at))


def test_emits_where_the_builder_stands() -> None:
    g, b, (x,) = graph(x="f64[3]")
    y = b.silu(x)
    seed = b.constant(np.ones(3))
    last = b.neg(y)
    (dx,) = only(backward(Builder(g, before=last.node), [y], [seed], [x]))
    assert g.last is last.node
    run(g, [dx, last], x=np.ones(3))


def test_symbolic_shapes() -> None:
    g, b, (x, w) = graph(x="f64[b, s, 4]", w="f64[4, 1]")
    y = b.reduce_mean(b.matmul(x, w), axes=(1,))
    seed = b.broadcast_to(b.constant(np.ones(())), shape=y.shape)
    grads = only(backward(g, [y], [seed], [x, w]))
    assert [v.type for v in grads] == [x.type, w.type]
    for shape in ((2, 3, 4), (1, 5, 4)):
        at = np.random.default_rng(0).standard_normal(shape)
        dx, dw = run(g, grads, x=at, w=np.arange(4.0)[:, None])
        assert_allclose(dx, np.broadcast_to(np.arange(4.0) / shape[1], shape))
        assert_allclose(dw[:, 0], at.mean(1).sum(0))


ROWS = [[1.0, 3, 3, 2], [5, 5, 5, 0]]
AT_TIES: dict[str, tuple[Callable[..., Value], list[Any], list[Any]]] = {
    "reduce_max": (
        lambda b, x: b.reduce_max(x, axes=(1,)), [ROWS], [[[0, 1 / 2, 1 / 2, 0], [2 / 3, 2 / 3, 2 / 3, 0]]],
    ),
    "reduce_min": (lambda b, x: b.reduce_min(x, axes=(0,)), [[[1.0, 2, 3], [1, 3, 2]]], [[[0.5, 2, 0], [0.5, 0, 3]]]),
    "maximum": (lambda b, x, y: b.maximum(x, y), [[0.0, 1, -1], [0.0, 0, 0]], [[0.5, 2, 0], [0.5, 0, 3]]),
    "minimum": (lambda b, x, y: b.minimum(x, y), [[0.0, 1, -1], [0.0, 0, 0]], [[0.5, 0, 3], [0.5, 2, 0]]),
    "relu": (lambda b, x: b.relu(x), [[0.0, 1, -1]], [[0, 2, 0]]),
    "abs": (lambda b, x: b.abs(x), [[0.0, 1, -1]], [[0, 2, -3]]),
    "top_k": (lambda b, x: b.top_k(x, k=2)[0], [ROWS], [[[0, 1, 2, 0], [3, 4, 0, 0]]]),
    "sort": (lambda b, x: b.sort(x, axis=1), [[[2.0, 1, 2, 1]]], [[[3, 1, 4, 2]]]),
    "reduce_prod": (
        lambda b, x: b.reduce_prod(x, axes=(1,)), [[[0.0, 2, 3], [0, 0, 3], [1, 2, 3]]], [[[6, 0, 0], [0, 0, 0], [18, 9, 6]]],
    ),
    "pow": (lambda b, x, y: b.pow(x, y), [[0.0, 0, 2, -2], [0.0, 1, 0, 2]], [[0, 2, 0, -16], [0, 0, 3 * np.log(2), 0]]),
    "pow of 2": (lambda b, x: b.pow(x, 2.0), [[0.0, -2]], [[0, -8]]),
    "gather": (lambda b, x: b.gather(x, b.constant(np.array([0, 0, 1])), axis=0), [[5.0, 6, 7]], [[3, 3, 0]]),
    "take_along": (lambda b, x: b.take_along(x, b.constant(np.array([2, 0, 2])), axis=0), [[5.0, 6, 7]], [[2, 0, 4]]),
    "scatter": (
        lambda b, x, u: b.scatter(x, b.constant(np.array([1, 1])), u, axis=0, reduce="add"),
        [[1.0, 2, 3], [4.0, 5]], [[1, 2, 3], [2, 2]],
    ),
    "logsumexp": (lambda b, x: b.logsumexp(x, axes=(0,)), [[-np.inf, 1.0, 1.0]], [[0, 0.5, 0.5]]),
    "softmax": (lambda b, x: b.softmax(x, axis=0), [[-np.inf, 1.0, 1.0]], [[0, -0.25, 0.25]]),
}  # fmt: skip
"""What is differentiated, at which operands, and the gradients of 1 y0 + 2 y1 + …: torch's, but for the derivative of powers of
negative numbers by the exponent (0, not NaN); of equals, top_k takes the first."""


@pytest.mark.parametrize("case", AT_TIES)
def test_gradients_at_ties_kinks_and_duplicates(case: str) -> None:
    function, operands, want = AT_TIES[case]
    arrays = [np.array(x) for x in operands]
    g, b, values = graph(**{f"x{i}": str(type_of(x)) for i, x in enumerate(arrays)})
    y = function(b, *values)
    shape = y.tensor.concrete({})
    seed = b.constant(np.arange(1.0, 1 + np.prod(shape)).reshape(shape))
    got = run(g, only(backward(g, [y], [seed], values)), **{v.name: x for v, x in zip(values, arrays)})
    for x, w in zip(got, want, strict=True):
        assert_allclose(x, w, rtol=1e-12)


def test_locations_are_those_of_the_forward_pass() -> None:
    g, b, (x,) = graph(x="f64[3]")
    b.loc = Loc("model.py", 7)
    y = b.gelu(x)
    b.loc = None
    seed = b.constant(np.ones(3))
    backward(g, [y], [seed], [x])
    assert seed.node is not None
    after, seen = False, 0
    for node in g.nodes:
        if after:
            assert node.loc == Loc("model.py", 7)
            seen += 1
        after = after or node is seed.node
    assert seen


def test_an_operation_without_gradient_is_named_with_its_line() -> None:
    g, b, (x, new, past) = graph(x="f64[1, 4, 2]", new="f64[1, 2, 2]", past="i64[1]")
    b.loc = Loc("model.py", 42)
    y = b.cache_update(x, new, past)
    b.loc = None
    seed = b.constant(np.ones((1, 4, 2)))
    with pytest.raises(NotDifferentiable, match=r"%cache_update.*has no gradient(.|\n)*model\.py:42"):
        backward(g, [y], [seed], [x])
    x4, new4 = (b.reshape(v, shape=(1, v.shape[1], 1, 2)) for v in (x, new))
    out, *_ = b.cached_attention(new4, new4, new4, x4, x4, past, scale=1.0)
    with pytest.raises(NotDifferentiable, match="cached_attention has no gradient"):  # and not something inside it
        backward(g, [out], [out], [x])
    z = b.scatter(x, b.constant(np.array([0, 1])), new, axis=1, reduce="max")
    with pytest.raises(NotDifferentiable, match=r"scatter has no gradient"):
        backward(g, [z], [seed], [x])


def test_gradients_of_the_wrong_type_are_refused() -> None:
    g, b, (x,) = graph(x="f64[3]")
    y = b.exp(x)
    with pytest.raises(TypeMismatch, match=r"the gradient of %exp: f64\[3\] must be f64\[3\], not %constant: f32\[3\]"):
        backward(g, [y], [b.constant(np.ones(3, np.float32))], [x])
    with pytest.raises(ValueError, match="zip"):
        backward(g, [y], [], [x])
