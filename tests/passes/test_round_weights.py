"""Weights that training sees as they will be stored."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from test_quantize import LOOP
from wasat.ir import Program, evaluate, parse
from wasat.passes import Cleanup, Differentiate, HoistParams, PassError, PassManager, Quantize, RoundWeights

from wasat.testing import random_program

TEXT = """graph @loss(%i: i64[n]) {
  param %t: f32[9, 40]
  param %w: f32[6, 40]
  param %b: f32[6]
  param %v: f32[4, 6]
  %x: f32[n, 40] = embedding(%t, %i)
  %y: f32[n, 6] = linear(%x, %w, %b)
  %z: f32[n, 4] = linear(%y, %v)
  %s: f32[40] = reduce_sum(%w) {axes=(0,)}
  %loss: f32[] = reduce_sum(%z) {axes=(0, 1)}
  return %loss, %z, %s
}"""
AFTER = """graph @loss(%i: i64[n]) {
  param %t: f32[9, 40]
  param %w: f32[6, 40]
  param %b: f32[6]
  param %v: f32[4, 6]
  %fake_quantize: f32[9, 40] = fake_quantize(%t) {block=32, scale=f16, scheme="int4"}
  %x: f32[n, 40] = embedding(%fake_quantize, %i)
  %fake_quantize_1: f32[6, 40] = fake_quantize(%w) {block=32, scale=f16, scheme="int4"}
  %y: f32[n, 6] = linear(%x, %fake_quantize_1, %b)
  %z: f32[n, 4] = linear(%y, %v)
  %s: f32[40] = reduce_sum(%w) {axes=(0,)}
  %loss: f32[] = reduce_sum(%z) {axes=(0, 1)}
  return %loss, %z, %s
}"""
def numbers(program: Program, graph: str = "loss", **feed: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(x) for x in evaluate(program[graph], feed, {k: p.load() for k, p in program.params.items()})]


def rounded(program: Program, *args: object, **options: object) -> list[str]:
    return [str(r) for r in PassManager([RoundWeights(*args, **options)]).run(program).remarks()]  # type: ignore[arg-type]


def test_text() -> None:
    program = random_program(TEXT)
    remarks = rounded(program, "int4-plain")
    assert str(program["loss"]) == str(parse(AFTER))
    assert remarks[0].startswith("missed: %v stays f32[4, 6]: its rows are shorter than a block of 32")
    assert remarks[1:] == ["applied: 2 weights rounded to int4-plain (@loss)"]


@pytest.mark.parametrize("scheme", ["int8", "int4-plain", "f16", "bf16"])
def test_forward_is_that_of_what_is_stored(scheme: str) -> None:
    program, i = random_program(TEXT), np.array([3, 0, 8, 3])
    stored = program.copy()
    PassManager([Quantize(scheme, None), HoistParams()]).run(stored)
    wide = numbers(program, i=i)
    rounded(program, scheme)
    got = numbers(program, i=i)
    assert_array_equal(got[1], numbers(stored, i=i)[1])
    assert not np.array_equal(got[1], wide[1])
    assert_array_equal(got[2], wide[2])  # what reads a weight as anything else sees it as it is


def test_gradients_are_those_of_the_rounded_weights_and_go_to_the_wide_ones() -> None:
    program, i = random_program(TEXT), np.array([3, 0, 8, 3])
    dense = program.copy()
    rounded(program, "int4-plain")
    fixed = {k: p.load() for k, p in program.params.items()}
    for made in program["loss"].nodes:
        if made.is_a("fake_quantize"):
            name = made.inputs[0].param
            assert name is not None
            fixed[name] = made.op.reference(made.attrs, np.asarray(fixed[name]))
    found = []
    for p, params in ((program, None), (dense, fixed)):
        PassManager([Differentiate("loss", ("*",), into="step"), Cleanup()]).run(p)
        values = evaluate(p["step"], {"i": i}, params or {k: s.load() for k, s in p.params.items()})
        found.append(dict(zip(p["step"].output_names, values)))
    assert found[0].keys() == found[1].keys()
    for k in ("t", "w", "b", "v"):
        assert_array_equal(found[0][f"grad.{k}"], found[1][f"grad.{k}"])
        assert np.any(found[0][f"grad.{k}"])


def test_weights_in_loops() -> None:
    program, x = random_program(LOOP), np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    stored = program.copy()
    PassManager([Quantize("int8", None), HoistParams()]).run(stored)
    assert rounded(program, "int8", graph="f") == ["applied: 1 weight rounded to int8 (@f)"]
    assert_array_equal(numbers(program, "f", x=x)[0], numbers(stored, "f", x=x)[0])
    assert program["f"].count("fake_quantize") == 1  # before the loop, once


def test_overrides() -> None:
    program = random_program(TEXT)
    remarks = rounded(program, "f32", overrides=(("t", "int8"),))
    assert remarks == ["applied: 1 weight rounded to int8 (@loss)"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int4"}, "weights cannot be trained rounded to 'int4', but to int8, int4-plain, f16, bf16, f32"),
        ({"overrides": (("w", "s5"),)}, "weights cannot be trained rounded to 's5'"),
        ({"scheme": "int3"}, "there is no quantization scheme 'int3'"),
        ({"overrides": (("z*", "int8"),)}, r"override 'z\*' matches no parameter"),
    ],
)
def test_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PassError, match=message):
        rounded(random_program(TEXT), **options)


def test_a_graph_without_such_weights() -> None:
    text = "graph @loss(%x: f32[n]) {\n  %y: f32[] = reduce_sum(%x) {axes=(0,)}\n  return %y\n}"
    assert rounded(random_program(text)) == ["missed: it has no weight to round (@loss)"]
