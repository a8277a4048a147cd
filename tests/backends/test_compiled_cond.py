"""Compiled choices: only the branch that is taken runs, whatever the other would do with these sizes and indices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from wasat.backends.tvm.build import Runner, build
from wasat.backends.tvm.targets import cpu
from wasat.ir import Builder, Graph, IRError, Program, evaluate, parse, verify
from wasat.ir.vjp import backward

from wasat.testing import feed, random_program

GRAPHS = {
    "indices": """graph @indices(%c: bool[], %x: f32[n, 3], %i: i64[k]) {
  %t: f32[n, 3] = tanh(%x)
  %y: f32[k, 3] = cond(%c, %t, %i) {then=graph @yes(%x: f32[n, 3], %i: i64[k]) {
    %y: f32[k, 3] = gather(%x, %i) {axis=0}
    return %y
  }, otherwise=graph @no(%x: f32[n, 3], %i: i64[k]) {
    %y: f32[k, 3] = broadcast_to(2.0:f32) {shape=(k, 3)}
    return %y
  }}
  return %y
}""",
    "sizes": """graph @sizes(%c: bool[], %x: f32[n, 3], %z: f32[k, 3]) {
  %y: f32[n, 3] = cond(%c, %x, %z) {then=graph @yes(%x: f32[n, 3], %z: f32[k, 3]) {
    %y: f32[n, 3] = add(%x, %z)
    return %y
  }, otherwise=graph @no(%x: f32[n, 3], %z: f32[k, 3]) {
    %s: f32[3] = reduce_sum(%z) {axes=(0,)}
    %y: f32[n, 3] = add(%x, %s)
    return %y
  }}
  return %y
}""",
    "untouched": """graph @untouched(%c: bool[], %x: f32[4, 4]) {
  %a: f32[4, 4] = mul(%x, 2.0:f32)
  %p: f32[4, 4], %q: f32[4, 4] = cond(%c, %a, %x) {then=graph @yes(%a: f32[4, 4], %x: f32[4, 4]) {
    return %a, %x
  }, otherwise=graph @no(%a: f32[4, 4], %x: f32[4, 4]) {
    %z: f32[4, 4] = matmul(%a, %x)
    return %z, %a
  }}
  %d: f32[4, 4] = exp(%p)
  %e: f32[4, 4] = matmul(%d, %d)
  %f: f32[4, 4] = reverse(%e) {axes=(1,)}
  %y: f32[4, 4] = add(%p, %f)
  return %y, %q
}""",
    "in a loop": """graph @in_a_loop(%h: f32[3], %x: f32[n, 3], %i: i64[n]) {
  %last: f32[3], %all: f32[n] = scan(%h, %x, %i) {body=graph @turn(%h: f32[3], %x: f32[3], %i: i64[]) {
    %c: bool[] = less(%i, 3:i64)
    %next: f32[3], %e: f32[] = cond(%c, %h, %x, %i) {then=graph @yes(%h: f32[3], %x: f32[3], %i: i64[]) {
      %next: f32[3] = add(%h, %x)
      %e: f32[] = gather(%x, %i) {axis=0}
      return %next, %e
    }, otherwise=graph @no(%h: f32[3], %x: f32[3], %i: i64[]) {
      %none: bool[] = equal(%i, 7:i64)
      %e: f32[] = cond(%none, %x) {then=graph @one(%x: f32[3]) {
        %e: f32[] = reduce_sum(%x) {axes=(0,)}
        return %e
      }, otherwise=graph @two(%x: f32[3]) {
        %e: f32[] = reduce_max(%x) {axes=(0,)}
        return %e
      }}
      return %h, %e
    }}
    return %next, %e
  }, carries=1, slices=2}
  return %last, %all
}""",
}


@pytest.fixture(scope="module")
def runner() -> Runner:
    graphs = {name: parse(text) for name, text in GRAPHS.items()}
    graphs["gradient"] = gradient(graphs["sizes"])
    return Runner(Program(graphs), cpu())


def gradient(source: Graph) -> Graph:
    g = source.clone("gradient")
    b = Builder(g)
    (y,) = g.outputs
    g.set_outputs([v for v in backward(b, [y], [b.mul(y, y)], g.inputs[1:]) if v is not None], ["dx", "dz"])
    verify(g)
    return g


def same(runner: Runner, name: str, inputs: dict[str, Any]) -> None:
    g = runner.program[name]
    got = runner(name, inputs)
    for key, want in zip(g.output_names, evaluate(g, inputs)):
        assert isinstance(want, np.ndarray)
        assert got[key].dtype == want.dtype
        np.testing.assert_allclose(got[key], want, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("name", [*GRAPHS, "gradient"])
def test_compiled_equals_interpreted(runner: Runner, name: str, taken: bool) -> None:
    for n in (1, 4):
        inputs = feed(runner.program[name], {"n": n, "k": n})
        if "i" in inputs:
            inputs["i"] = np.array([0, -1, 7, 1] if name == "in a loop" else [0, -1, 0, 0])[:n]
        if "c" in inputs:
            inputs["c"] = np.array(taken)
        same(runner, name, inputs)


@pytest.mark.parametrize("index", [2, -3, 10**12, -(2**63)])
def test_an_index_in_a_branch(runner: Runner, index: int) -> None:
    """Nothing, where it is not taken; and the rows may be none."""
    for n in (0, 2):
        x, i = np.ones((n, 3), np.float32), np.array([0, index])
        given = {"c": np.array(False), "x": x, "i": i}
        np.testing.assert_array_equal(runner("indices", given)["y"], np.full((2, 3), 2))
        for run in (lambda g: runner("indices", g), lambda g: evaluate(runner.program["indices"], g)):
            with pytest.raises(IRError, match=rf"gather.*index {index if n else 0} is outside"):
                run({**given, "c": np.array(True)})


def test_sizes_in_a_branch(runner: Runner) -> None:
    x, z = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((4, 3), np.float32)
    for name in ("sizes", "gradient"):
        same(runner, name, {"c": np.array(False), "x": x, "z": z})
        for run in (lambda g: runner(name, g), lambda g: evaluate(runner.program[name], g)):  # noqa: B023
            with pytest.raises(IRError, match=r"add\(%x, %z\).*needs n == k"):
                run({"c": np.array(True), "x": x, "z": z})


@pytest.mark.parametrize("operation, said", [("linear(%x, %w)", False), ("exp(%o)", True), ("neg(%x)", False)])
def test_products_in_a_branch_that_no_kernel_does_are_said(operation: str, said: bool) -> None:
    text = f"""graph @g(%c: bool[], %x: f32[n, 4]) {{
  param %w: f32[4, 4]
  %y: f32[n, 4] = cond(%c, %x, %w) {{then=graph @yes(%x: f32[n, 4], %w: f32[4, 4]) {{
    %r: f32[1, n, 4] = reshape(%x) {{shape=(1, n, 4)}}
    %v: f32[n, n, 1] = broadcast_to(0.5:f32) {{shape=(n, n, 1)}}
    %c: f32[1, n, 4] = conv(%r, %v) {{strides=(1,), low=(0,), high=(0,)}}
    %o: f32[n, 4] = reshape(%c) {{shape=(n, 4)}}
    %z: f32[n, 4] = {operation}
    return %z
  }}, otherwise=graph @no(%x: f32[n, 4], %w: f32[4, 4]) {{
    %z: f32[n, 4] = neg(%x)
    return %z
  }}}}
  return %y
}}"""
    why = "conv has no kernel here: of the sizes n, n, 1 not all are known"
    assert [x.why for x in build(random_program(text), cpu()).left] == [why] * said
