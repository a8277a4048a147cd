"""scan: its text, its checks, symbols in bodies, gradients of gradients."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import Builder, IRError, ParseError, VerifyError, evaluate, graph_text, parse, verify
from wasat.ir.vjp import backward

SIZES = """\
graph @sizes(%h: f64[b], %x: f64[n, b]) {
  %last: f64[b], %rows: f64[n, b, b + n] = scan(%h, %x) {body=graph @turn(%h: f64[b], %x: f64[b]) {
    %next: f64[b] = mul(%h, %x)
    %i: f64[b + n] = iota() {size=b + n, dtype=f64}
    %wide: f64[b, b + n] = broadcast_to(%i) {shape=(b, b + n)}
    return %next, %wide
  }, carries=1, slices=1}
  return %last, %rows
}
"""


def test_the_text_of_a_body_is_nested() -> None:
    g = parse(SIZES, "loop.txt")
    assert str(g) == SIZES
    (node,) = g.nodes
    assert repr(node).endswith("scan(%h, %x) {body=@turn, carries=1, slices=1}")  # messages stay short
    inner = next(iter(node.attrs.bodies[0].graph.nodes))
    assert inner.loc is not None
    assert inner.loc.line == 3
    assert str(parse(graph_text(g, locs=True))) == SIZES
    assert "%next: f64[b] = mul(%h, %x)  # loop.txt:3" in graph_text(g, locs=True)


def test_literals_in_a_body_leave_names_around_it_alone() -> None:
    text = """graph @f(%x: f32[3, 2]) {
  %c: f32[2] = constant() {value=dense<f32[2], 1.0 2.0>}
  %d: f32[3, 2] = scan(%x, %c) {body=graph @g(%x: f32[2], %c: f32[2]) {
    %a: f32[2] = mul(%x, 2.0:f32)
    %constant: f32[2] = add(%a, %c)
    return %constant
  }, carries=0, slices=1}
  %constant: f32[3, 2] = mul(%d, 3.0:f32)
  return %constant
}
"""
    g = parse(text)
    verify(g)
    assert str(g) == text
    np.testing.assert_array_equal(evaluate(g, {"x": np.ones((3, 2), np.float32)})[0], [[9, 12]] * 3)


def test_bodies_compare_by_their_text() -> None:
    one, two = (next(parse(SIZES).nodes).attrs for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != one.with_bodies(lambda body: body.rename(body.inputs[0], "g") is None)
    assert one.with_bodies(lambda body: False) is one


def test_symbols_of_a_body_are_those_around_it() -> None:
    g = parse(SIZES)
    assert next(g.nodes).attrs.symbols == ("b", "n")
    bound = g.clone(dims={"b": 2})
    verify(bound)
    assert str(bound.outputs[1].type) == "f64[n, 2, n + 2]"
    x = np.arange(6.0).reshape(3, 2)
    for got, want in zip(evaluate(bound, {"h": np.ones(2), "x": x}), evaluate(g, {"h": np.ones(2), "x": x}), strict=True):
        np.testing.assert_array_equal(got, want)


def test_errors_in_a_body_show_its_line() -> None:
    with pytest.raises(ParseError, match=r"loop.txt:3: there is no operation 'mull'"):
        parse(SIZES.replace("= mul(", "= mull("), "loop.txt")
    g = parse(SIZES)
    inner = next(iter(next(g.nodes).attrs.bodies[0].graph.nodes))
    inner.outputs[0].type = g.inputs[1].type
    with pytest.raises(VerifyError, match="graph @turn: mul makes"):
        verify(g)


def test_what_a_body_could_not_decide_is_checked() -> None:
    text = SIZES.replace("%h: f64[b], %x: f64[b]) {", "%h: f64[b], %x: f64[c]) {").replace("%x: f64[n, b]", "%x: f64[n, c]")
    g = parse(text)
    assert [(str(a), str(b)) for a, b in next(g.nodes).checks] == [("b", "c")]
    with pytest.raises(IRError, match="needs b == c"):
        evaluate(g, {"h": np.ones(2), "x": np.ones((4, 3))})


def test_second_derivatives() -> None:
    g = parse("""graph @f(%h: f64[], %x: f64[n]) {
  %y: f64[] = scan(%h, %x) {body=graph @turn(%h: f64[], %x: f64[]) {
    %p: f64[] = mul(%h, %x)
    %next: f64[] = sin(%p)
    return %next
  }, carries=1, slices=1}
  return %y
}""")
    b = Builder(g)
    y = g.outputs[0]
    (dh,) = backward(b, [y], [b.constant(np.array(1.0))], [g.inputs[0]])
    assert dh is not None
    (ddh, ddx) = backward(b, [dh], [b.constant(np.array(1.0))], g.inputs)
    assert ddh is not None
    assert ddx is not None
    g.set_outputs([y, dh, ddh, ddx], ["y", "dh", "ddh", "ddx"])
    verify(g)
    assert str(parse(str(g))) == str(g)
    at, x, e = 0.7, np.array([0.9, 1.3, -0.4]), 1e-6
    _, _, ddh_, ddx_ = evaluate(g, {"h": np.array(at), "x": x})

    def first(h: float, x: np.ndarray) -> float:
        return float(evaluate(g, {"h": np.array(h), "x": x})[1])

    np.testing.assert_allclose(ddh_, (first(at + e, x) - first(at - e, x)) / (2 * e), rtol=1e-6)
    want = [(first(at, x + e * d) - first(at, x - e * d)) / (2 * e) for d in np.eye(3)]
    np.testing.assert_allclose(ddx_, want, rtol=1e-6)
