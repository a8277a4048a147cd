"""nn.scan: what is traced, what is captured, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.frontend.nn import Module, Parameter
from wasat.ir import IRError, TypeMismatch, evaluate, parse, verify

from wasat.testing import feed


class RNN(Module):
    def __init__(self) -> None:
        self.w = Parameter((3, 4))
        self.u = Parameter((4, 4))

    def __call__(self, x: Any, h: Any) -> Any:
        bias = h * 0.5

        def turn(state: Any, row: Any) -> Any:
            state = nn.tanh(row @ self.w + state @ self.u + bias)
            return state, state * 2.0

        return nn.scan(turn, h, x)


def test_a_recurrence() -> None:
    p = nn.trace(RNN(), {"x": "f32[n, b, 3]", "h": "f32[b, 4]"})
    g = p["forward"]
    verify(g)
    assert [n.op.name for n in g.nodes] == ["constant", "mul", "scan"]
    assert list(g.params) == ["w", "u"]
    assert str(parse(str(g))) == str(g)
    inputs = feed(g, {"n": 5, "b": 2})
    params = {k: np.asarray(v.load()) for k, v in p.params.items()}
    h, bias, rows = inputs["h"], inputs["h"] * np.float32(0.5), []
    for x in inputs["x"]:
        h = np.tanh(x @ params["w"] + h @ params["u"] + bias)
        rows.append(h * 2)
    last, ys = evaluate(g, inputs, params)
    np.testing.assert_allclose(last, h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ys, rows, rtol=1e-5, atol=1e-6)


class Calls(Module):
    def __init__(self, call: Any) -> None:
        self.call = call
        self.w = Parameter((3,))

    def __call__(self, x: Any) -> Any:
        return self.call(self, x)


def traced(call: Any) -> Any:
    p = nn.trace(Calls(call), {"x": "f32[n, 3]"})
    p.verify()
    return p


def test_loops_in_loops_capture_through_both() -> None:
    def call(self: Any, x: Any) -> Any:
        def outer(a: Any, row: Any) -> Any:
            return nn.scan(lambda s: (s * self.w + row + x[0], None), a, length=2)

        return nn.scan(outer, nn.full((3,), 1.0), x, reverse=True)[0]

    p = traced(call)
    x, w = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32), np.asarray(p.params["w"].load())
    want = np.ones(3, np.float32)
    for row in x[::-1]:
        for _ in range(2):
            want = want * w + row + x[0]
    np.testing.assert_allclose(evaluate(p["forward"], {"x": x}, {"w": w})[0], want, rtol=1e-5)


def test_tuples_keep_their_form() -> None:
    def call(self: Any, x: Any) -> Any:
        (a, b), (y, z) = nn.scan(lambda c, r: ((c[1], c[0] + r[0]), (r[1], c[0])), (x[0], x[0] * 2.0), (x, x + 1.0))
        return a, b, y, z

    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    p = traced(call)
    a, b, y, z = evaluate(p["forward"], {"x": x}, {})
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(z, [x[0], x[0] * 2, x[0] + x[0]])
    np.testing.assert_array_equal(a, x[0] * 2 + x[1])
    np.testing.assert_array_equal(b, x[0] * 2 + x[2])


@pytest.mark.parametrize("call, message", [
    (lambda self, x: nn.scan(lambda c, r: c, x[0], x), r"the function returns \(carry, y\)"),
    (lambda self, x: nn.scan(lambda c, r: ((c, c), r), x[0], x), "1 tensors before a turn and 2 after it"),
    (lambda self, x: nn.scan(lambda c, r: (nn.concat((c, r), axis=0), r), x[0], x), r"is carried, is f32\[3\], not f32\[6\]"),
    (lambda self, x: nn.scan(lambda c, r: (c, 2.0), x[0], x), "y is a tensor or a tuple of them, not 2.0"),
    (lambda self, x: nn.scan(lambda c: (c, None), x[0]), "length= is given where no operand is sliced"),
    (lambda self, x: nn.scan(lambda c, r: (c, None), x[0], nn.constant(1.0)), "xs has a tensor without axes"),
])  # fmt: skip
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(TypeMismatch, match=message) as e:
        traced(call)
    assert "test_nn_scan.py" in str(e.value)


def test_a_tensor_of_a_body_does_not_live_outside() -> None:
    def call(self: Any, x: Any) -> Any:
        kept = []
        nn.scan(lambda c, r: (kept.append(r * 2.0) or c, None), x[0], x)  # type: ignore[func-returns-value]
        return kept[0] + x[0]

    with pytest.raises(IRError, match="belongs to another trace"):
        traced(call)


def test_dropouts_in_a_body_and_around_it_differ() -> None:
    def call(x: Any, key: Any) -> Any:
        around = nn.dropout(x, key, 0.5)

        def turn(a: Any) -> Any:
            return a, (nn.dropout(a, key, 0.5), nn.dropout(a, key, 0.5))

        one, two = nn.scan(turn, x, length=2)[1]
        return around, one, two, nn.dropout(x, key, 0.5)

    class Dropping(Module):
        def __call__(self, x: Any, key: Any) -> Any:
            return call(x, key)

    p = nn.trace(Dropping(), {"x": "f32[n]", "key": "u32[2]"}, training=True)
    p.verify()
    n = 8192
    key = np.array([3, 4], np.uint32)
    around, one, two, after = (np.atleast_2d(m) != 0 for m in evaluate(p["forward"], {"x": np.ones(n, np.float32), "key": key}))
    masks = [around[0], one[0], two[0], after[0]]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).mean() - 0.5) < 5 * 0.5 / n**0.5
    assert (one[0] == one[1]).all()  # of each turn the same
