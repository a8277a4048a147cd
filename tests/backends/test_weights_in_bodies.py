"""Weights that loops and branches read: the kernels chosen in bodies are those outside, and weights are packed once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_help import assert_near_reference
from wasat.backends.tvm.build import Runner, build
from wasat.backends.tvm.lower import KernelCall, plan_weights, selected
from wasat.backends.tvm.targets import cpu
from wasat.ir import Graph, Interface, Program, State, evaluate, parse

from wasat.testing import feed, random_program

# how a weight is stored, its rows and columns, whether x is rounded to int8, and the kernel of it
KINDS: dict[str, tuple[int, int, bool, str]] = {
    "f32": (70, 37, False, "Linear"), "f16": (33, 40, False, "Linear"), "bf16": (7, 65, False, "Linear"),
    "int8b32f16": (70, 50, True, "LinearInt"), "int4b32f16": (35, 70, True, "LinearInt"),
    "s4b64": (33, 128, True, "LinearBlocks"), "s5b64": (70, 192, False, "Linear"), "s6b96": (9, 96, True, "LinearBlocks"),
}  # fmt: skip

GRAPH = """graph @NAME(%h: f32[b, K], %x: f32[t, b, K], %c: bool[]) {
  param %NAME.w: STORED[N, K]
  param %NAME.u: f32[N]
  param %NAME.o: f32[N]
  %before: f32[b, N] = LINEAR(%h, %NAME.w, %NAME.u)
  %last: f32[b, K], %r: f32[t, b, N], %s: f32[t, b, N] = scan(%h, %x, %c, %NAME.w, %NAME.u, %NAME.o) {body=graph @turn(
    %h: f32[b, K], %x: f32[b, K], %c: bool[], %w: STORED[N, K], %u: f32[N], %o: f32[N]
  ) {
    %p: f32[b, N] = LINEAR(%h, %w, %u)
    %q: f32[b, N] = cond(%c, %w, %h, %o) {then=graph @yes(%w: STORED[N, K], %h: f32[b, K], %u: f32[N]) {
      %q: f32[b, N] = LINEAR(%h, %w, %u)
      return %q
    }, otherwise=graph @no(%w: STORED[N, K], %h: f32[b, K], %u: f32[N]) {
      %n: f32[b, K] = neg(%h)
      %q: f32[b, N] = LINEAR(%n, %w)
      return %q
    }}
    %m: f32[b, K] = mul(%h, 0.5:f32)
    %a: f32[b, K] = add(%m, %x)
    return %a, %p, %q
  }, carries=1, slices=1}
  %y: f32[b, N] = cond(%c, %last, %NAME.w) {then=graph @other(%h: f32[b, K], %w: STORED[N, K]) {
    %q: f32[b, N] = LINEAR(%h, %w)
    return %q
  }, otherwise=graph @zeros(%h: f32[b, K], %w: STORED[N, K]) {
    %q: f32[b, N] = LINEAR(%h, %w)
    %z: f32[b, N] = mul(%q, 2.0:f32)
    return %z
  }}
  return %before, %last, %r, %s, %y
}"""


def text(kind: str) -> str:
    n, k, rounds, _ = KINDS[kind]
    edits = {"NAME": kind, "STORED[": f"{kind}[", "N]": f"{n}]", "[N,": f"[{n},", "K]": f"{k}]"}
    if kind in ("f32", "f16", "bf16"):
        edits["LINEAR"] = "linear"
    made = GRAPH
    for old, new in edits.items():
        made = made.replace(old, new)
    lines = made.split("\n")
    act = ' {activation="int8"}' if rounds else ""
    return "\n".join(x.replace("LINEAR", "quantized_linear") + act if "LINEAR" in x else x for x in lines)


def kernels(g: Graph) -> list[str]:
    """Those of products, in bodies too, in order."""
    found = []
    for node in g.nodes:
        if isinstance(node.op, KernelCall):
            found.append(type(node.op.desc).__name__)
        elif node.op.precision == "half":
            found.append(node.op.name)
        for body in node.attrs.bodies:
            found += kernels(body.graph)
    return [k for k in found if k != "QuantizeRows"]


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(random_program("\n".join(map(text, KINDS))), cpu())


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_in_bodies(kind: str, runner: Runner) -> None:
    """Outside, in a loop, in the branches within it, and in others, of which one weight is read by all and packed once."""
    program, target = runner.program, cpu()
    graphs = selected(program, target.table(), target.kernels(target, program))
    [g] = [g for g in graphs if g.name == kind]
    assert kernels(g) == 6 * [KINDS[kind][3]]
    arrays = [a.name for a in plan_weights(graphs, target.table()).arrays if a.name.startswith(f"{kind}.")]
    assert arrays == [f"{kind}.w/panels", f"{kind}.u/padded", f"{kind}.o/padded"]


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("b, t", [(1, 3), (5, 2), (3, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_equal(kind: str, b: int, t: int, taken: bool, runner: Runner) -> None:
    g = runner.program[kind]
    given: dict[str, Any] = feed(g, {"b": b, "t": t}, seed=b) | {"c": np.array(taken)}
    # where rounding noise crosses a half, one element of a row is one 127th of its block's largest off
    steps = 2**16 if KINDS[kind][2] else 32
    assert_near_reference(runner(kind, given), g, given, {k: runner.program.load(k) for k in g.params}, steps)


def test_what_turns_slice_is_said() -> None:
    """Weights of many turns, of which each has its own, are not packed."""
    stacked = """graph @g(%h: f32[b, 8]) {
  param %w: f32[3, 8, 8]
  %y: f32[b, 8] = scan(%h, %w) {body=graph @turn(%h: f32[b, 8], %w: f32[8, 8]) {
    %z: f32[b, 8] = linear(%h, %w)
    return %z
  }, carries=1, slices=1}
  return %y
}"""
    left = [x.why for x in build(random_program(stacked), cpu()).left]
    assert "%y = scan: products in its bodies read w turn by turn, without packing or kernels" in left


LIKE_STATES = """graph @step(%x: f32[3, 50], %z: f32[3, 50], %c: bool[], %m: f32[3, 50]) {
  %held: f32[3, 50] = mul(%z, 2.0:f32)
  %y: f32[3, 50] = cond(%c, %held, %x) {then=graph @yes(%m: f32[3, 50], %x: f32[3, 50]) {
    %old: f32[3, 50] = mul(%m, 0.9:f32)
    %new: f32[3, 50] = mul(%x, 0.1:f32)
    %mean: f32[3, 50] = add(%old, %new)
    return m=%mean
  }, otherwise=graph @no(%m: f32[3, 50], %x: f32[3, 50]) {
    %next: f32[3, 50] = sub(%m, %x)
    return m=%next
  }}
  %after: f32[3, 50] = add(%held, %y)
  %m1: f32[3, 50] = add(%m, %x)
  return y=%y, after=%after, m=%m1
}"""


@pytest.mark.parametrize("taken", [True, False])
def test_what_a_body_is_given_is_no_state_however_it_is_called(taken: bool) -> None:
    """The state %m may be written over; %m of the branches is another value, which is read after them."""
    g = parse(LIKE_STATES)
    program = Program({"step": g}, {}, Interface(states=(State.trained("m", donated=True),)))
    target = cpu()
    [made] = selected(program, target.table(), target.kernels(target, program))
    assert [n for n in made.nodes if isinstance(n.op, KernelCall) and any(r.alias is not None for r in n.op.results)]
    [cond] = [n for n in made.nodes if n.attrs.bodies]
    inside = [n.op for body in cond.attrs.bodies for n in body.graph.nodes if isinstance(n.op, KernelCall)]
    assert all(r.alias is None for op in inside for r in op.results)
    given: dict[str, Any] = feed(g, {}) | {"c": np.array(taken)}
    got = Runner(program, target)("step", given)
    for name, want in zip(g.output_names, evaluate(g, given)):
        np.testing.assert_allclose(got[name], want, rtol=1e-6)
