"""Graphs as text: an exact round trip, and errors that show the place."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wasat.ir import (
    Builder,
    DType,
    Graph,
    Literal,
    ParseError,
    TensorType,
    evaluate,
    graph_text,
    parse,
    parse_program,
    parse_type,
    verify,
)

from wasat.testing import random_graph

ATTENTION = """\
graph @step(%q: f32[b, 8, s, 64], %k: f32[b, 8, s, 64], %kc: f32[b, 8, p, 64], %mask: f32[b, 1, s, p + s]) {
  param %w: f32[64, 64] = "layers.0.w"
  %keys: f32[b, 8, p + s, 64] = concat(%kc, %k) {axis=2}
  %kt: f32[b, 8, 64, p + s] = transpose(%keys) {perm=(0, 1, 3, 2)}
  %scores: f32[b, 8, s, p + s] = matmul(%q, %kt)
  %scaled: f32[b, 8, s, p + s] = mul(%scores, 0.125:f32)
  %masked: f32[b, 8, s, p + s] = add(%scaled, %mask)
  %probs: f32[b, 8, s, p + s] = softmax(%masked) {axis=3}
  %out: f32[b, 8, s, 64] = matmul(%probs, %keys)
  %y: f32[b, 8, s, 64] = linear(%out, %w)
  return %y, cache=%keys
}
"""


def test_the_form() -> None:
    g = parse(ATTENTION)
    assert str(g) == ATTENTION
    assert g.params["layers.0.w"].name == "w"
    assert g.output_names == ["y", "cache"]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6))
def test_round_trip(seed: int) -> None:
    g = random_graph(np.random.default_rng(seed), nodes=25)
    text = str(g)
    again = parse(text)
    assert str(again) == text
    verify(again)
    assert [n.attrs for n in again.nodes if n.inputs] == [n.attrs for n in g.nodes if n.inputs]
    assert [v.type for v in again.outputs] == [v.type for v in g.outputs]


@given(st.sampled_from([d for d in DType if d.is_float]), st.data())
def test_numbers_keep_their_bits(dtype: DType, data: st.DataObject) -> None:
    raw = data.draw(st.integers(0, 2**dtype.bits - 1))
    bits = {4: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[dtype.bits]
    x = np.array([raw], bits).view(dtype.np)
    if math.isnan(float(x[0])):
        x = np.array([np.nan]).astype(dtype.np)
    _assert_constant_survives(x)
    _assert_constant_survives(x[0])


@pytest.mark.parametrize("x", [
    np.array([], np.float32), np.zeros((0, 3), np.int8), np.array(True), np.array([True, False]),
    np.array([-(2**63), 2**63 - 1]), np.array([0, 2**64 - 1], np.uint64), np.array(2**64 - 1, np.uint64),
    np.arange(65, dtype=np.int16), np.linspace(0, 1, 200).reshape(10, 20), np.array([[np.inf, -np.inf, np.nan, -0.0]]),
    np.array([7, -8], np.int64).astype(DType.I4.np), np.array(0.1, np.float16), np.array([1e-45, 3e38], np.float32),
], ids=repr)  # fmt: skip
def test_constants_keep_their_bits(x: np.ndarray) -> None:
    _assert_constant_survives(x)


def _assert_constant_survives(x: np.ndarray) -> None:
    g = Graph("g")
    g.set_outputs([Builder(g).constant(x)])
    again = parse(str(g))
    literal = again.outputs[0].node.attrs.value  # type: ignore[union-attr, attr-defined]
    assert literal == Literal.of(x)
    assert str(again) == str(g)


def test_odd_names_are_quoted() -> None:
    g = Graph("g")
    x = g.add_input('keep "mask" %1', TensorType(DType.F32, (2,)))
    w = g.add_param("weights/é", TensorType(DType.F32, (2,)))
    b = Builder(g)
    g.set_outputs([b.emit("add", x, w, name="1st"), b.constant(0.5)], ["a b", "c"])
    again = parse(str(g))
    assert str(again) == str(g)
    assert again.inputs[0].name == x.name
    assert list(again.params) == ["weights/é"]
    assert again.output_names == ["a b", "c"]


def test_names_of_outputs_come_back() -> None:
    names = ["x", "cache.0.k", "a-b", "inf", "nan", "return", "1st", "_"]
    g = parse("graph @f(%x: f32[n]) {\n  return %x\n}\n")
    g.set_outputs([g.inputs[0]] * len(names), names)
    assert parse(str(g)).output_names == names



def test_a_literal_does_not_take_a_name_that_comes_later() -> None:
    text = """graph @g(%x: f32[2]) {
  %a: f32[2] = mul(%x, 2.0:f32)
  %constant: f32[2] = add(%a, 1.0:f32)
  %constant_1: f32[2] = add(%constant, 3.0:f32)
  return %constant_1
}
"""
    g = parse(text)
    verify(g)
    assert str(g) == text
    np.testing.assert_array_equal(evaluate(g, {"x": [1.0, 2.0]})[0], [6, 8])


def test_comments_and_locations() -> None:
    g = parse("# a graph\n" + ATTENTION.replace("\n  %kt", "  # keys\n\n  %kt"), "step.txt")
    assert str(g) == ATTENTION
    kt = next(n for n in g.nodes if n.op.name == "transpose")
    assert kt.loc is not None
    assert (kt.loc.file, kt.loc.line) == ("step.txt", 6)
    assert "transpose(%keys) {perm=(0, 1, 3, 2)}  # step.txt:6" in graph_text(g, locs=True)
    assert str(parse(graph_text(g, locs=True))) == ATTENTION


def test_programs() -> None:
    other = "graph @other(%x: i64[n]) {\n  return %x\n}\n"
    program = parse_program(ATTENTION + "\n" + other)
    assert list(program.graphs) == ["step", "other"]
    assert str(program) == ATTENTION + "\n" + other
    with pytest.raises(ParseError, match="graph @other is defined twice"):
        parse_program(other + other)


@pytest.mark.parametrize("edit, message, under", [
    (("softmax(", "sofmax("), "there is no operation 'sofmax'; did you mean softmax", "sofmax"),
    (("%kt)\n", "%kx)\n"), "%kx is not defined before this use", "%kx"),
    (("%kt: f32[b, 8, 64, p + s]", "%kt: f32[b, 8, p + s, 64]"), "but %kt is declared f32[b, 8, p + s, 64]", "%kt:"),
    (("concat(%kc, %k)", "concat(%kc, %w)"), "ranks differ", "concat"),
    (("{axis=3}", "{axis=9}"), "axis 9 is outside a tensor of rank 4", "softmax"),
    (("{axis=3}", "{axes=3}"), "unexpected keyword argument 'axes'", "softmax"),
    (("%masked:", "%scaled:"), "%scaled is defined twice", "%scaled"),
    (("%masked: f32", "%masked: f31"), "'f31' is no element type", "f31"),
    (("return %y", "return %z"), "%z is not defined before this use", "%z"),
    (("concat(%kc, %k)", "concat(%kc %k)"), "expected ',', found '%k'", "%k)"),
    (("%out: f32[b, 8, s, 64] =", "%out: f32[b, 8, s, 64], %o2: f32[b] ="), "matmul has 1 outputs, 2 are named", "%out"),
    (("0.125:f32", "0.125"), "expected a value (%name), found '0.125'", "0.125"),
    (("p + s]) {", "p + ;]) {"), "unexpected character ';'", ";"),
    (("param %w: f32[64, 64]", "param %q: f32[64, 64]"), "%q is defined twice", "%q: f32[64"),
    (("p + s, 64] = concat", "f32, 64] = concat"), "f32 is an element type and cannot name a dimension", "f32, 64] ="),
    (("cache=%keys\n}", "cache=%keys\n"), "expected ','", None),
])  # fmt: skip
def test_errors_show_file_line_and_caret(edit: tuple[str, str], message: str, under: str | None) -> None:
    text = ATTENTION.replace(*edit, 1)
    assert text != ATTENTION
    with pytest.raises(ParseError) as e:
        parse(text, "step.txt")
    head, source, caret = str(e.value).rsplit("\n", 2)
    assert head.startswith("step.txt:")
    assert message in head
    if under is not None:
        line = int(head.split(":")[1])
        assert source == "    " + text.splitlines()[line - 1]
        assert source[caret.index("^") :].startswith(under)


def test_text_after_the_end_is_refused() -> None:
    with pytest.raises(ParseError, match="expected the end of the text, found 'graph'"):
        parse(ATTENTION + ATTENTION)
    with pytest.raises(ParseError, match="expected the end of the type, found 'x'"):
        parse_type("f32[2] x")
    with pytest.raises(ParseError, match=r"3 elements for f32\[2\]"):
        parse("graph @g() {\n  %c: f32[2] = constant() {value=dense<f32[2], 1.0 2.0 3.0>}\n  return %c\n}")
    with pytest.raises(ParseError, match="-1 is outside u64"):
        parse("graph @g() {\n  %c: u64[2] = constant() {value=dense<u64[2], 1 -1>}\n  return %c\n}")
