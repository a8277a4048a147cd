"""Compiled scans: symbolic numbers of turns, what is carried untouched, gradients, loops in loops."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("tvm")

from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu, target_named
from wasat.ir import Builder, Graph, IRError, Program, evaluate, parse, verify
from wasat.ir.vjp import backward

from wasat.testing import feed

GRAPHS = {
    "recurrence": """graph @recurrence(%h: f32[b, 4], %x: f32[n, b, 3], %w: f32[3, 4]) {
  %last: f32[b, 4], %ys: f32[n, b, 4] = scan(%h, %x, %w) {body=graph @cell(%h: f32[b, 4], %x: f32[b, 3], %w: f32[3, 4]) {
    %wx: f32[b, 4] = matmul(%x, %w)
    %sum: f32[b, 4] = add(%wx, %h)
    %next: f32[b, 4] = tanh(%sum)
    return %next, %sum
  }, carries=1, slices=1}
  return %last, %ys
}""",
    "untouched": """graph @untouched(%x: f32[b, 64], %k: f32[n, b, 64]) {
  %a: f32[b, 64] = mul(%x, 2.0:f32)
  %c: f32[b, 64], %s: f32[b, 64] = scan(%a, %x, %k) {body=graph @keep(%a: f32[b, 64], %s: f32[b, 64], %k: f32[b, 64]) {
    %next: f32[b, 64] = add(%s, %k)
    return %a, %next
  }, carries=2, slices=1}
  %d: f32[b, 64] = exp(%s)
  %p: f32[64, b] = transpose(%d) {perm=(1, 0)}
  %e: f32[b, b] = matmul(%d, %p)
  %f: f32[b, 64] = matmul(%e, %d)
  %g: f32[b, 64] = reverse(%f) {axes=(1,)}
  %y: f32[b, 64] = add(%c, %g)
  return %y, %c
}""",
    "sizes": """graph @sizes(%x: f32[b, 64], %k: f32[n, b, 64]) {
  %m: f32[], %rows: f32[2*n, b, n] = scan(0.0:f32) {body=graph @turn(%m: f32[]) {
    %i: f32[n] = iota() {size=n, dtype=f32}
    %r: f32[b, n] = broadcast_to(%i) {shape=(b, n)}
    %y: f32[b, n] = mul(%r, %m)
    %next: f32[] = add(%m, 1.0:f32)
    return %next, %y
  }, carries=1, slices=0, length=2*n, reverse=true}
  return %m, %rows
}""",
    "types": """graph @types(%f: bool[n, 3], %i: i64[n], %u: u8[b], %none: bool[3]) {
  %any: bool[3], %rows: bool[n, 3], %h: f16[n, b] = scan(%none, %f, %i, %u) {body=graph @turn(
    %a: bool[3], %f: bool[3], %i: i64[], %u: u8[b]) {
    %or: bool[3] = logical_or(%a, %f)
    %w: i64[b] = cast(%u) {dtype=i64}
    %s: i64[b] = add(%w, %i)
    %h: f16[b] = cast(%s) {dtype=f16}
    return %or, old=%a, %h
  }, carries=1, slices=2}
  return %any, %rows, %h
}""",
}
GRAPHS["planned"] = re.sub(r"\bb\b", "4", GRAPHS["untouched"].replace("@untouched", "@planned"))
SIZES = [{"b": 1, "n": 1}, {"b": 2, "n": 6}, {"b": 3, "n": 0}, {"b": 5, "n": 33}]


@pytest.fixture(scope="module")
def runner() -> Runner:
    graphs = {name: parse(text) for name, text in GRAPHS.items()}
    graphs["gradient"] = gradient(graphs["recurrence"])
    return Runner(Program(graphs), cpu())


def gradient(source: Graph) -> Graph:
    g = source.clone("gradient")
    b = Builder(g)
    seeds = [b.constant(1.0), *g.outputs]
    grads = backward(b, g.outputs, seeds[1:], g.inputs)
    g.set_outputs([x for x in grads if x is not None], ["dh", "dx", "dw"])
    verify(g)
    return g


@pytest.mark.parametrize("name", [*GRAPHS, "gradient"])
def test_compiled_equals_interpreted(runner: Runner, name: str) -> None:
    g = runner.program[name]
    for sizes in [*SIZES, *SIZES]:  # twice: what is written in place is fresh in every run
        inputs = feed(g, sizes)
        got = runner(name, inputs)
        for key, want in zip(g.output_names, evaluate(g, inputs)):
            assert got[key].dtype == want.dtype
            np.testing.assert_allclose(got[key].astype(float), want.astype(float), rtol=1e-4, atol=1e-5, err_msg=key)


def test_many_turns_stay_shallow(runner: Runner) -> None:
    g = runner.program["recurrence"]
    inputs = feed(g, {"b": 1, "n": 20_000})
    inputs["x"] *= 0.01
    got = runner("recurrence", inputs)
    state, w = inputs["h"], inputs["w"]
    for x in inputs["x"]:
        state = np.tanh(x @ w + state)
    np.testing.assert_allclose(got["last"], state, rtol=1e-5, atol=1e-6)


def test_composites_in_a_body_are_decomposed() -> None:
    text = GRAPHS["recurrence"].replace("tanh(%sum)", "softmax(%sum) {axis=1}")
    g = parse(text)
    inputs = feed(g, {"b": 2, "n": 3})
    got = Runner(Program({"recurrence": g}), cpu())("recurrence", inputs)
    for key, want in zip(g.output_names, evaluate(g, inputs)):
        np.testing.assert_allclose(got[key], want, rtol=1e-5, atol=1e-6)


def test_what_a_target_lacks_in_a_body_is_named() -> None:
    text = """graph @f(%x: f32[n, 4]) {
  %y: f8e4m3[n, 4] = scan(%x) {body=graph @g(%x: f32[4]) {
    %z: f8e4m3[4] = cast(%x) {dtype=f8e4m3}
    %w: f8e4m3[4] = mul(%z, %z)
    return %w
  }, carries=0, slices=1}
  return %y
}"""
    with pytest.raises(IRError, match=r"(?s)compiled programs move f8e4m3.*<text>:4"):
        Runner(Program({"f": parse(text)}), target_named("cpu"))


def test_indices_in_a_loop_in_a_loop_are_checked() -> None:
    g = parse("""graph @f(%x: f32[3], %i: i64[n, 2, 2]) {
  %y: f32[n, 2, 2] = scan(%i, %x) {body=graph @rows(%i: i64[2, 2], %x: f32[3]) {
    %y: f32[2, 2] = scan(%i, %x) {body=graph @row(%i: i64[2], %x: f32[3]) {
      %y: f32[2] = gather(%x, %i) {axis=0}
      return %y
    }, carries=0, slices=1}
    return %y
  }, carries=0, slices=1}
  return %y
}""")
    run, x = Runner(Program({"f": g}), cpu()), np.float32([1, 2, 3])
    i = np.array([[[0, 1], [2, -1]], [[2, 1], [0, -3]]])
    np.testing.assert_array_equal(run("f", {"x": x, "i": i})["y"], x[i])
    i[1, 1, 0] = 3
    with pytest.raises(IRError, match=r"index 3 is outside -3 \.\. 2"):
        run("f", {"x": x, "i": i})
