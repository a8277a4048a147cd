"""What passes make of loops and choices: clean-up within and around them, gradients that run forward once, caches refused."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import Graph, IRError, Node, Program, evaluate, parse, verify
from wasat.passes.analyses.axis import analyze
from wasat.passes.cleanup.algebra import Cleanup
from wasat.passes.core import Remarks
from wasat.passes.training.autodiff import Differentiate

from wasat.testing import feed

RNN = """graph @loss(%h: f32[b, 4], %x: f32[n, b, 3]) {
  param %w: f32[3, 4]
  %last: f32[b, 4], %ys: f32[n, b, 4] = scan(%h, %x, %w) {body=graph @cell(%h: f32[b, 4], %x: f32[b, 3], %w: f32[3, 4]) {
    %wx: f32[b, 4] = matmul(%x, %w)
    %same: f32[b, 4] = mul(%wx, 1.0:f32)
    %again: f32[b, 4] = matmul(%x, %w)
    %both: f32[b, 4] = add(%same, %again)
    %sum: f32[b, 4] = add(%both, %h)
    %next: f32[b, 4] = tanh(%sum)
    %y: f32[b, 4] = exp(%next)
    return %next, %y
  }, carries=1, slices=1}
  %a: f32[] = reduce_sum(%last) {axes=(0, 1)}
  %c: f32[] = reduce_sum(%ys) {axes=(0, 1, 2)}
  %loss: f32[] = add(%a, %c)
  return %loss
}
"""


def body(g: Graph) -> Graph:
    (scan,) = [n for n in g.nodes if n.op.name == "scan"]
    return scan.attrs.body.graph  # type: ignore[attr-defined, no-any-return]


def cleaned(g: Graph) -> Graph:
    g = g.clone()
    Cleanup().run_graph(g, Remarks())
    verify(g)
    before = str(g)
    assert not Cleanup().run_graph(g, Remarks())
    assert str(g) == before
    return g


def same(got: Graph, want: Graph) -> None:
    params = {"w": np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)}
    for sizes in ({"b": 1, "n": 0}, {"b": 2, "n": 4}):
        inputs = feed(want, sizes)
        for x, y in zip(evaluate(got, inputs, params), evaluate(want, inputs, params), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_bodies_are_simplified() -> None:
    g = parse(RNN)
    c = cleaned(g)
    assert body(c).count("matmul") == 1
    assert body(c).count("mul") == 0
    assert body(g).count("matmul") == 2  # bodies are shared by copies, and not changed in place
    same(c, g)


def test_stacked_results_that_nobody_reads_go() -> None:
    g = parse(RNN.replace("add(%a, %c)", "mul(%a, 2.0:f32)"))
    c = cleaned(g)
    assert [v.name for n in c.nodes if n.op.name == "scan" for v in n.outputs] == ["last"]
    assert not body(c).count("exp")
    same(c, g)


def test_a_gradient_runs_forward_once() -> None:
    program = Program({"loss": parse(RNN)})
    Differentiate(wrt=("w", "h", "x")).run(program, Remarks())
    g = program["gradients"]
    assert g.count("scan") == 3
    c = cleaned(g)
    assert c.count("scan") == 2
    same(c, g)


@pytest.mark.parametrize("edit", [
    ("tanh(%s)", "sin(%s)"), ("scan(%h, %x) {body=graph @two", "scan(%g, %x) {body=graph @two"),
    ("slices=1}\n  return", "slices=1, reverse=true}\n  return"),
], ids=["another body", "other operands", "the other way"])  # fmt: skip
def test_loops_that_differ_stay_two(edit: tuple[str, str]) -> None:
    text = """graph @f(%h: f32[4], %g: f32[4], %x: f32[n, 4]) {
  %a: f32[4], %p: f32[n, 4] = scan(%h, %x) {body=graph @one(%h: f32[4], %x: f32[4]) {
    %s: f32[4] = add(%h, %x)
    %again: f32[4] = tanh(%s)
    return %again, %s
  }, carries=1, slices=1}
  %b: f32[4], %q: f32[n, 4] = scan(%h, %x) {body=graph @two(%h: f32[4], %x: f32[4]) {
    %s: f32[4] = add(%h, %x)
    %again: f32[4] = tanh(%s)
    return %again, %h
  }, carries=1, slices=1}
  return %a, %b, %p, %q
}
"""
    both = cleaned(parse(text))
    assert both.count("scan") == 1
    same(both, parse(text))
    at = text.index("@two") - 60
    changed = text[:at] + text[at:].replace(*edit)
    assert changed != text
    two = cleaned(parse(changed))
    assert two.count("scan") == 2
    same(two, parse(changed))


@pytest.mark.parametrize("reverse, kinds", [(False, ["last", "token"]), (True, ["ahead", "ahead"])])
def test_a_loop_over_tokens_looks_back_or_ahead(reverse: bool, kinds: list[str]) -> None:
    """The last carry is of the last token alone; what the loop stacks is of each token."""
    g = parse(RNN.replace("slices=1}", "slices=1, reverse=true}") if reverse else RNN)
    labels = analyze(g, "n")
    scan = next(n for n in g.nodes if n.op.name == "scan")
    found = [labels[v] for v in scan.outputs]
    assert [x.kind for x in found] == kinds
    assert all(x.culprit is scan and "scan" in x.reason for x in found) == reverse
    fixed = analyze(parse(RNN), "tokens")
    assert {label.kind for label in fixed.values()} == {"fixed"}


def test_loops_that_stack_different_numbers_stay_two() -> None:
    one = """graph @one(%h: f32[4]) {
    %next: f32[4] = neg(%h)
    return %next, k=1.0:f32
  }"""
    g = parse(f"""graph @f(%h: f32[4]) {{
  %a: f32[4], %p: f32[3] = scan(%h) {{body={one}, carries=1, slices=0, length=3}}
  %b: f32[4], %q: f32[3] = scan(%h) {{body={one.replace("1.0", "2.0")}, carries=1, slices=0, length=3}}
  return %p, %q
}}""")
    c = cleaned(g)
    for x, want in zip(evaluate(c, {"h": np.ones(4, np.float32)}), (1, 2), strict=True):
        np.testing.assert_array_equal(x, [want] * 3)


CHOICE = """graph @f(%c: bool[], %x: f32[n, 4], %i: i64[k], %u: f32[3]) {
  %y: f32[n, 4], %z: f32[k, 4] = cond(%c, %x, %i, %u) {then=graph @yes(%x: f32[n, 4], %i: i64[k], %u: f32[3]) {
    %one: f32[n, 4] = mul(%x, 1.0:f32)
    %y: f32[n, 4] = exp(%one)
    %z: f32[k, 4] = gather(%x, %i) {axis=0}
    %dead: f32[3] = neg(%u)
    return %y, %z
  }, otherwise=graph @no(%x: f32[n, 4], %i: i64[k], %u: f32[3]) {
    %z: f32[k, 4] = broadcast_to(0.0:f32) {shape=(k, 4)}
    return %x, %z
  }}
  return %y, %z
}
"""


def choice(g: Graph) -> Node:
    (node,) = [n for n in g.nodes if n.op.name == "cond"]
    return node


def same_choice(got: Graph, want: Graph) -> None:
    rng = np.random.default_rng(0)
    for c in (True, False):
        given = {"c": np.array(c), "x": rng.standard_normal((2, 4), np.float32), "i": np.array([1]), "u": np.float32([1, 2, 3])}
        inputs = {v.name: given[v.name] for v in got.inputs}
        for x, y in zip(evaluate(got, inputs), evaluate(want, given), strict=True):
            np.testing.assert_array_equal(x, y)


def test_branches_are_simplified_and_lose_operands() -> None:
    g = parse(CHOICE)
    c = cleaned(g)
    node = choice(c)
    assert [v.name for v in node.inputs] == ["c", "x", "i"]
    assert [[n.op.name for n in body.graph.nodes if n.op.name != "constant"] for body in node.attrs.bodies] == [
        ["exp", "gather"], ["broadcast_to"]
    ]  # fmt: skip
    same_choice(c, g)


def test_results_of_branches_that_nobody_reads_go() -> None:
    g = parse(CHOICE.replace("return %y, %z\n}\n", "return %y\n}\n"))
    node = choice(c := cleaned(g))
    assert [v.name for v in node.inputs] == ["c", "x"]
    assert [v.name for v in node.outputs] == ["y"]
    same_choice(c, g)


@pytest.mark.parametrize("known", [True, False])
def test_a_choice_that_is_known_is_the_branch(known: bool) -> None:
    """Also in a branch; what the branch needs of indices is needed then."""
    g = parse(CHOICE.replace("cond(%c,", f"cond({known}:bool,".lower()))
    c = cleaned(g)
    assert not c.count("cond")
    assert c.count("gather") == known
    inputs = {"c": np.array(True), "x": np.ones((2, 4), np.float32), "i": np.array([7]), "u": np.ones(3, np.float32)}
    if known:
        with pytest.raises(IRError, match="index 7 is outside"):
            evaluate(c, inputs)
    else:
        np.testing.assert_array_equal(evaluate(c, inputs)[1], np.zeros((1, 4)))
