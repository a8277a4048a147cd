"""Updates of states as one pass over memory: which operations become kernels, over which memory, and what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from numpy.testing import assert_allclose, assert_array_equal
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.cpu.optimizer_steps import fuse_square_sums, fuse_updates
from wasat.backends.tvm.lower import KernelCall
from wasat.backends.tvm.targets import cpu
from wasat.ir import Graph, Interface, Program, State, evaluate, parse

ADAM = """graph @step(%x: f32[3, 50], %rate: f32[], %due: bool[], %p: f32[3, 50], %m: f32[3, 50], %v: f32[3, 50], %q: f32[7]) {
  %loss: f32[] = reduce_sum(%p) {axes=(0, 1)}
  %g: f32[3, 50] = mul(%x, %p)
  %norm: f32[] = reduce_sum(%g) {axes=(0, 1)}
  %old: f32[3, 50] = mul(%m, 0.9:f32)
  %new: f32[3, 50] = mul(%g, 0.1:f32)
  %mean: f32[3, 50] = add(%old, %new)
  %kept: f32[3, 50] = mul(%v, 0.5:f32)
  %gg: f32[3, 50] = mul(%g, %g)
  %square: f32[3, 50] = add(%kept, %gg)
  %root: f32[3, 50] = sqrt(%square)
  %safe: f32[3, 50] = add(%root, 1e-8:f32)
  %move: f32[3, 50] = div(%mean, %safe)
  %scaled: f32[3, 50] = mul(%move, %rate)
  %next: f32[3, 50] = sub(%p, %scaled)
  %p1: f32[3, 50] = select(%due, %next, %p)
  %m1: f32[3, 50] = select(%due, %mean, %m)
  %v1: f32[3, 50] = select(%due, %square, %v)
  %q1: f32[7] = mul(%q, %norm)
  return %loss, %norm, p=%p1, m=%m1, v=%v1, q=%q1
}"""
STATES = ["p", "m", "v", "q"]


def kernels(g: Graph) -> list[tuple[list[str], list[str | None]]]:
    """Names of what each kernel makes, and over what."""
    made = []
    for node in g.nodes:
        if isinstance(node.op, KernelCall):
            names = [g.output_names[g.outputs.index(v)] for v in node.outputs]
            made.append((names, [None if r.alias is None else node.inputs[r.alias].name for r in node.op.results]))
    return made


def feeds(**more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays = {k: rng.uniform(0.5, 1.5, (3, 50)).astype(np.float32) for k in ("x", "p", "m", "v")}
    return {**arrays, "q": np.arange(7, dtype=np.float32), "rate": np.float32(0.1), "due": np.bool_(True), **more}


def runner(text: str = ADAM, **options: Any) -> Runner:
    states = tuple(State.trained(k, donated=True) for k in STATES)
    return Runner(Program({"step": parse(text)}, {}, Interface(states=states)), cpu(threads=2), **options)


def test_an_update_is_one_kernel_over_the_old_states() -> None:
    g = parse(ADAM)
    fuse_updates(g, STATES, 1)
    assert kernels(g) == [(["p", "m", "v"], ["p", "m", "v"]), (["q"], ["q"])]
    assert [node.op.name for node in g.nodes if not isinstance(node.op, KernelCall)][:3] == ["reduce_sum", "mul", "reduce_sum"]
    last = list(g.nodes)[-2:]  # after all that reads the old states
    assert all(isinstance(node.op, KernelCall) for node in last)


def one(line: str, types: str = "%x: f32[2, 3], %p: f32[2, 3], %q: f32[2, 3]", returned: str = "p=%p1") -> str:
    return f"graph @step({types}) {{\n  {line}\n  return {returned}\n}}"


TWO = "%p1: f32[2, 3] = mul(%p, 2.0:f32)\n  "
PLACES: dict[str, tuple[str, list[tuple[list[str], list[str | None]]]]] = {
    "over the old": (one(TWO), [(["p"], ["p"])]),
    "the old one is returned": (one(TWO, returned="old=%p, p=%p1"), [(["p"], [None])]),
    "the old one is not read": (one("%p1: f32[2, 3] = mul(%x, 2.0:f32)"), [(["p"], [None])]),
    "the old one is read by another update": (
        one(TWO + "%q1: f32[2, 3] = add(%p, %q)", returned="p=%p1, q=%q1"), [(["p"], [None]), (["q"], ["q"])],
    ),
    "the new one is read": (one(TWO + "%s: f32[] = reduce_sum(%p1) {axes=(0, 1)}", returned="s=%s, p=%p1"), []),
    "the new one is returned twice": (one(TWO, returned="again=%p1, p=%p1"), []),
    "no state": (one(TWO, returned="y=%p1"), []),
    "a vector along an axis": (one("%p1: f32[2, 3] = mul(%p, %r)", "%r: f32[3], %p: f32[2, 3]"), []),
    "unknown sizes": (one("%p1: f32[n] = mul(%p, 2.0:f32)", "%p: f32[n]"), []),
    "a scalar": (one("%p1: f32[] = mul(%p, 2.0:f32)", "%p: f32[]"), []),
    "f64": (one("%p1: f64[2] = mul(%p, %p)", "%p: f64[2]"), []),
    "another operation": (one("%p1: f32[2, 3] = exp(%p)"), []),
    "a condition of each element": (one("%p1: f32[2] = select(%c, %p, 0.0:f32)", "%c: bool[2], %p: f32[2]"), []),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_where_new_states_are_written(case: str) -> None:
    text, want = PLACES[case]
    g = parse(text)
    fuse_updates(g, STATES, 1)
    assert kernels(g) == want


def test_what_is_computed() -> None:
    inputs = feeds()
    before = {k: x.copy() for k, x in inputs.items()}
    want = dict(zip(parse(ADAM).output_names, evaluate(parse(ADAM), inputs)))
    got = runner()("step", inputs)
    for k, x in want.items():
        assert_allclose(got[k], x, rtol=1e-5, err_msg=k)  # type: ignore[arg-type]
    for k, x in before.items():
        assert_array_equal(inputs[k], x)


def test_what_is_not_due_changes_nothing() -> None:
    inputs = feeds(due=np.bool_(False))
    inputs["x"][1, 3] = np.nan
    got = runner()("step", inputs)
    for k in ("p", "m", "v"):
        assert_array_equal(got[k], inputs[k])


def test_updates_of_one_kind_share_their_code() -> None:
    text = one(
        "%p1: f32[2, 3] = mul(%p, 2.0:f32)\n  %m1: f32[70, 9] = mul(%m, 2.0:f32)\n  %v1: f32[9] = mul(%v, 2.0:f32)",
        "%p: f32[2, 3], %m: f32[70, 9], %v: f32[9]", "p=%p1, m=%m1, v=%v1",
    )  # fmt: skip
    g = parse(text)
    fuse_updates(g, STATES, 2)
    descs = {node.op.desc for node in g.nodes if isinstance(node.op, KernelCall)}
    assert sorted(d.rank for d in descs) == [1, 2]


def test_donated_states_stay_where_they_are() -> None:
    run, inputs = runner(donate=True), feeds()
    before = {k: x.copy() for k, x in inputs.items()}
    first = run("step", inputs)
    for k, x in before.items():
        assert_array_equal(inputs[k], x)  # these were not given by the program
    places = {k: first[k].ctypes.data for k in STATES}
    copied = {k: x.copy() for k, x in first.items()}
    second = run("step", {**inputs, **{k: first[k] for k in STATES}})
    assert {k: second[k].ctypes.data for k in STATES} == places
    assert_array_equal(first["p"], second["p"])
    again = run("step", {**inputs, **{k: copied[k] for k in STATES}})
    for k in second:
        assert_array_equal(again[k], second[k])


SUM = one(
    "%xx: f32[300, 70] = mul(%x, %x)\n  %s: f32[] = reduce_sum(%xx) {axes=(0, 1)}\n  %t: f32[] = add(%q, %s)",
    "%x: f32[300, 70], %y: f32[300, 70], %q: f32[]", "%t",
)  # fmt: skip
NOT_SQUARES = {
    "one axis": SUM.replace("f32[] = reduce", "f32[70] = reduce").replace("%t: f32[]", "%t: f32[70]").replace("(0, 1)", "(0,)"),
    "another product": SUM.replace("mul(%x, %x)", "mul(%x, %y)"),
    "the squares are returned": SUM.replace("return %t", "return %t, %xx"),
    "the sum is returned": SUM.replace("return %t", "return %t, %s"),
    "unknown sizes": SUM.replace("300", "n"),
    "f64": SUM.replace("f32", "f64"),
}


@pytest.mark.parametrize("text", [SUM, SUM.replace("add(%q, %s)", "add(%s, %q)")])
def test_a_sum_of_squares_is_one_kernel(text: str) -> None:
    g = parse(text)
    fuse_square_sums(g, 8, 2)
    assert [node.op.name for node in g.nodes] == ["kernel.square_sum_2d"]


@pytest.mark.parametrize("case", NOT_SQUARES)
def test_what_is_no_sum_of_squares_stays(case: str) -> None:
    g = parse(NOT_SQUARES[case])
    before = str(g)
    fuse_square_sums(g, 8, 2)
    assert str(g) == before


@pytest.mark.parametrize("shape", [(1,), (7,), (300, 70), (3, 5, 1100), (0, 4)])
@pytest.mark.parametrize("threads", [1, 2])
def test_sums_of_squares(shape: tuple[int, ...], threads: int) -> None:
    text = SUM.replace("300, 70", ", ".join(map(str, shape))).replace("(0, 1)", str(tuple(range(len(shape)))))
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    got = Runner(Program({"step": parse(text)}), cpu(threads=threads))("step", {"x": x, "y": x, "q": np.float32(3)})
    assert_allclose(got["t"], 3 + np.square(x.astype(np.float64)).sum(), rtol=1e-6)
