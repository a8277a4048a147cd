# ruff: noqa: E501
"""Fused functions as loop nests: the same values at sizes that nothing divides, on one thread and several; what is left alone."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from tvm import tirx
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.cpu import fused_loops as loops
from wasat.backends.tvm.targets import cpu
from wasat.ir import evaluate, parse_program

CASES = {
    "softmax's gradient": (
        "(%p: f32[3, 5, 37], %g: f32[3, 5, 37]) {\n %a: f32[3, 5, 37] = mul(%p, %g)\n"
        " %s: f32[3, 5, 1] = reduce_sum(%a) {axes=(2,), keepdims=true}\n"
        " %d: f32[3, 5, 37] = sub(%g, %s)\n %y: f32[3, 5, 37] = mul(%d, %p)"),
    "a bias's gradient": "(%g: f32[9, 50, 70]) {\n %y: f32[70] = reduce_sum(%g) {axes=(0, 1)}",
    "a bias's gradient, many columns": "(%g: f32[40, 1500]) {\n %y: f32[1500] = reduce_sum(%g) {axes=(0,)}",
    "a bias's gradient by channel": "(%g: f32[3, 7, 5, 19]) {\n %y: f32[7] = reduce_sum(%g) {axes=(0, 2, 3)}",
    "a sum of squares": "(%g: f32[130, 129]) {\n %a: f32[130, 129] = mul(%g, %g)\n %y: f32[] = reduce_sum(%a) {axes=(0, 1)}",
    "the largest, of a middle axis": "(%x: f32[6, 33, 50]) {\n %y: f32[6, 50] = reduce_max(%x) {axes=(1,)}",
    "a product and a least": (
        "(%x: f32[4, 21]) {\n %a: f32[4] = reduce_prod(%x) {axes=(1,)}\n %c: f32[4] = reduce_min(%x) {axes=(1,)}\n %y: f32[4] = add(%a, %c)"),
    "one flat axis": "(%x: f32[30001], %z: f32[]) {\n %a: f32[30001] = exp(%x)\n %y: f32[30001] = add(%a, %z)",
    "under another shape": (
        "(%x: f32[20, 30, 8], %z: f32[8]) {\n %a: f32[20, 30, 8] = mul(%x, %z)\n %r: f32[600, 8] = reshape(%a) {shape=(600, 8)}\n"
        " %t: f32[8, 600] = transpose(%r) {perm=(1, 0)}\n %y: f32[4800] = reshape(%t) {shape=(4800,)}"),
    "halves turned": (
        "(%x: f32[40, 6, 32]) {\n %a: f32[40, 6, 16] = slice(%x) {starts=(0, 0, 0), stops=(40, 6, 16), steps=(1, 1, 1)}\n"
        " %c: f32[40, 6, 16] = slice(%x) {starts=(0, 0, 16), stops=(40, 6, 32), steps=(1, 1, 1)}\n %n: f32[40, 6, 16] = neg(%c)\n"
        " %h: f32[40, 6, 32] = concat(%n, %a) {axis=2}\n %e: f32[40, 6, 32] = pad(%a) {low=(0, 0, 16), high=(0, 0, 0), value=2.0}\n"
        " %y: f32[40, 6, 32] = add(%h, %e)"),
    "one value read many times": (
        "(%x: f32[50, 40]) {\n %v: f32[50, 40] = mul(%x, %x)\n %w: f32[50, 40] = tanh(%v)\n %a: f32[50, 40] = add(%v, %w)\n"
        " %c: f32[50, 40] = mul(%a, %a)\n %y: f32[50, 40] = sub(%c, %a)"),
    "integers and truth": (
        "(%i: i64[7, 90], %x: f32[7, 90]) {\n %k: bool[7, 90] = greater_equal(%i, 3:i64)\n %j: i64[7, 90] = add(%i, %i)\n"
        " %f: f32[7, 90] = cast(%j) {dtype=f32}\n %s: f32[7, 90] = select(%k, %f, %x)\n %y: f32[7] = reduce_sum(%s) {axes=(1,)}"),
    "half precision": "(%x: f16[9, 40], %z: f16[9, 40]) {\n %a: f16[9, 40] = mul(%x, %z)\n %c: f16[9, 40] = add(%a, %a)\n %y: f16[9, 40] = mul(%c, %a)",
    "activations of activations": (  # hours, where a pass puts what a variable stands for in its place
        "(%x: f32[7, 30]) {\n %a: f32[7, 30] = sigmoid(%x)\n %c: f32[7, 30] = mul(%a, %x)\n %d: f32[7, 30] = tanh(%c)\n"
        " %e: f32[7, 30] = exp(%d)\n %f: f32[7, 30] = mul(%e, %a)\n %g: f32[7, 30] = sigmoid(%f)\n %h: f32[7, 30] = mul(%g, %d)\n"
        " %y: f32[7, 30] = tanh(%h)"),
    "turned round, padded, of another shape": (
        "(%x: f32[2, 3]) {\n %r: f32[2, 3, 1] = reshape(%x) {shape=(2, 3, 1)}\n"
        " %p: f32[2, 4, 2] = pad(%r) {low=(0, 1, 0), high=(0, 0, 1)}\n %y: f32[2, 4, 2] = reverse(%p) {axes=(1,)}"),
    "a scalar": "(%x: f32[], %z: f32[]) {\n %a: f32[] = add(%x, %z)\n %y: f32[] = sqrt(%a)",
}  # fmt: skip


@pytest.fixture(scope="module")
def taken() -> Runner:
    text = "\n".join(f"graph @case{i}{case}\n return %y\n}}" for i, case in enumerate(CASES.values()))
    return Runner(parse_program(text), cpu(threads=2))


@pytest.mark.parametrize("name", CASES)
def test_equal(name: str, taken: Runner) -> None:
    graph = taken.program[f"case{list(CASES).index(name)}"]
    rng = np.random.default_rng(0)
    inputs = {
        v.name: (np.abs(rng.standard_normal(v.shape)) * 2).astype(v.tensor.dtype.np) if "scalar" in name
        else rng.integers(-9, 9, v.shape) if v.tensor.dtype.is_int
        else np.asarray(rng.standard_normal(v.shape), v.tensor.dtype.np)
        for v in graph.inputs
    }  # fmt: skip
    [want] = evaluate(graph, inputs)
    got = taken(graph.name, inputs)["y"]
    np.testing.assert_allclose(got, want, rtol=2e-3 if name == "half precision" else 2e-6, atol=2e-5 if want.size < 100 else 1e-6)


@pytest.mark.parametrize("op", ["exp", "tanh", "erf", "sigmoid"])
def test_elementary(op: str) -> None:
    """Everywhere, where the result is tiny, too large for f32, or NaN."""
    program = parse_program(f"graph @g(%x: f32[20000]) {{\n %y: f32[20000] = {op}(%x)\n return %y\n}}")
    special = [np.inf, -np.inf, np.nan, 0, 88.7, 88.8, -87, 1e-30, 5, -5]
    x = np.concatenate([np.linspace(-110, 110, 9990), np.linspace(-1e-3, 1e-3, 10000), special]).astype(np.float32)
    with np.errstate(all="ignore"):
        [want] = evaluate(program["g"], {"x": x})
    np.testing.assert_allclose(Runner(program, cpu())("g", {"x": x})["y"], want, rtol=2e-6, atol=1e-37)


def module_of(text: str) -> tvm.IRModule:
    """What the pass makes of a program's fused functions."""
    made = []
    run = tvm.transform.module_pass(lambda m, c: made.append(m) or m, opt_level=0, name="Look")
    target = cpu(threads=2)
    original = loops.schedule
    try:
        loops.schedule = lambda threads: tvm.transform.Sequential([original(threads), run])
        Runner(parse_program(text), target)
    finally:
        loops.schedule = original
    return made[0]


@pytest.mark.parametrize(
    "text, all_taken",
    [
        ("(%x: f32[40, 50]) {\n %a: f32[40, 50] = exp(%x)\n %y: f32[50] = reduce_sum(%a) {axes=(0,)}", True),
        ("(%x: f32[s, 50]) {\n %y: f32[s, 50] = exp(%x)", True),
        ("(%x: bf16[s, 50]) {\n %y: bf16[s, 50] = neg(%x)", False),  # see the module
        ("(%x: f32[40, 50]) {\n %y: f32[40, 50] = cumsum(%x) {axis=1}", False),  # a loop within a block
    ],
)
def test_taken(text: str, all_taken: bool) -> None:
    functions = [f for f in module_of(f"graph @g{text}\n return %y\n}}").functions.values() if isinstance(f, tirx.PrimFunc)]
    assert functions
    assert all("tirx.is_scheduled" in f.attrs for f in functions) == all_taken


UNKNOWN = {
    "of one shape, read however often": (
        "(%x: f32[n, m], %z: f32[m]) {\n %a: f32[n, m] = mul(%x, %z)\n %t: f32[n, m] = tanh(%a)\n %c: f32[n, m] = add(%a, %t)\n"
        " %k: bool[n, m] = greater(%c, %x)\n %y: f32[n, m] = select(%k, %c, %x)", 1),
    "turned": (
        "(%x: f32[n, m]) {\n %a: f32[n, m] = mul(%x, %x)\n %t: f32[m, n] = transpose(%a) {perm=(1, 0)}\n"
        " %y: f32[m, n] = sub(%t, 1.0:f32)", 1),
    "a sum, as cheap as to read it": (
        "(%x: f32[n, m], %v: f32[n, 1]) {\n %q: f32[n, 1] = add(%v, 1.0:f32)\n %y: f32[n, m] = mul(%x, %q)", 1),
    "a function, once for a row": (
        "(%x: f32[n, m], %v: f32[n, 1]) {\n %r: f32[n, 1] = exp(%v)\n %q: f32[n, 1] = add(%r, 1.0:f32)\n"
        " %w: f32[n, m] = mul(%x, %q)\n %y: f32[n, m] = neg(%w)", 2),
    "rounded in between": (
        "(%x: f16[n, m], %z: f16[n, m]) {\n %a: f16[n, m] = mul(%x, %z)\n %c: f16[n, m] = add(%a, %a)\n %y: f16[n, m] = mul(%c, %a)", 1),
}  # fmt: skip
"""Of sizes that are not known -> how many of their values are stored in memory."""


@pytest.mark.parametrize("name", UNKNOWN)
def test_elements_of_sizes_known_when_they_run(name: str) -> None:
    text, stored = UNKNOWN[name]
    program = parse_program(f"graph @g{text}\n return %y\n}}")
    (made,) = [f for f in module_of(str(program)).functions.values() if isinstance(f, tirx.PrimFunc)]
    assert "tirx.is_scheduled" in made.attrs
    assert len(set(re.findall(r"^ +(?!local)(\w+)\[.*\] = ", made.script(), re.M))) == stored, made.script()
    rng, runner = np.random.default_rng(0), Runner(program, cpu(threads=2))
    for n, m in [(5, 7), (1, 1), (0, 3), (3, 0), (300, 257), (2, 40000), (70000, 1)]:
        sizes = {"n": n, "m": m}
        inputs = {v.name: rng.standard_normal(v.tensor.concrete(sizes)).astype(v.tensor.dtype.np) for v in program["g"].inputs}
        [want] = evaluate(program["g"], inputs)
        np.testing.assert_allclose(runner("g", inputs)["y"], want, rtol=1e-3 if want.dtype == np.float16 else 2e-6, atol=2e-6)


SUMS = {
    "a row, of what is computed there": (
        "(%x: f32[n, m]) {\n %a: f32[n, m] = mul(%x, %x)\n %b: f32[n, m] = neg(%a)\n %y: f32[n] = reduce_sum(%b) {axes=(1,)}"),
    "a column": "(%x: f32[n, m]) {\n %y: f32[m] = reduce_sum(%x) {axes=(0,)}",
    "around an axis": "(%x: f32[n, m, k]) {\n %y: f32[m] = reduce_sum(%x) {axes=(0, 2)}",
    "the largest of a middle axis": "(%x: f32[n, m, k]) {\n %y: f32[n, k] = reduce_max(%x) {axes=(1,)}",
    "the least under another shape": (
        "(%x: f32[n, m, 4]) {\n %r: f32[n, 4*m] = reshape(%x) {shape=(n, 4*m)}\n %y: f32[n] = reduce_min(%r) {axes=(1,)}"),
    "all, of a size that stands nowhere by itself": (
        "(%x: f32[2*n, m]) {\n %a: f32[2*n, m] = abs(%x)\n %y: f32[] = reduce_sum(%a) {axes=(0, 1)}"),
    "columns of a known number, of whole numbers": (
        "(%i: i64[n, 70], %z: i64[70]) {\n %a: i64[n, 70] = add(%i, %z)\n %y: i64[70] = reduce_sum(%a) {axes=(0,)}"),
    "what is read beside it": (
        "(%x: f32[n, m]) {\n %a: f32[n, m] = exp(%x)\n %s: f32[n, 1] = reduce_sum(%a) {axes=(1,), keepdims=true}\n"
        " %d: f32[n, m] = div(%a, %s)\n %y: f32[n, m] = mul(%d, %d)"),
    "of what is once for a row": (
        "(%x: f32[n, m], %v: f32[n, 1]) {\n %q: f32[n, 1] = exp(%v)\n %w: f32[n, m] = mul(%x, %q)\n %y: f32[n] = reduce_sum(%w) {axes=(1,)}"),
    "softmax": "(%x: f32[n, m]) {\n %y: f32[n, m] = softmax(%x) {axis=1}",
}  # fmt: skip
"""Of sizes that are not known."""


@pytest.fixture(scope="module")
def sums() -> Runner:
    text = "\n".join(f"graph @case{i}{case}\n return %y\n}}" for i, case in enumerate(SUMS.values()))
    return Runner(parse_program(text), cpu(threads=2))


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_sizes_known_when_they_run(name: str, sums: Runner) -> None:
    """Nothing, one, fewer and more than are summed side by side or together, on one thread and several."""
    graph = sums.program[f"case{list(SUMS).index(name)}"]
    rng = np.random.default_rng(0)
    for n, m, k in [
        (5, 7, 3), (1, 1, 1), (64, 33, 70), (0, 7, 3), (5, 0, 3), (3, 5, 0), (17, 520, 16), (300, 257, 2), (2, 16, 15), (1, 40000, 1),
    ]:  # fmt: skip
        sizes = {"n": n, "m": m, "k": k}
        inputs = {
            v.name: rng.integers(-9, 9, v.tensor.concrete(sizes)) if v.tensor.dtype.is_int
            else rng.standard_normal(v.tensor.concrete(sizes), np.float32) for v in graph.inputs
        }  # fmt: skip
        with np.errstate(all="ignore"):
            [want] = evaluate(graph, inputs)
        got = sums(graph.name, inputs)["y"]
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6 * np.sqrt(n * m * k) * 2, err_msg=str(sizes))


def test_sums_of_any_size_are_taken() -> None:
    for text in SUMS.values():
        functions = [f for f in module_of(f"graph @g{text}\n return %y\n}}").functions.values() if isinstance(f, tirx.PrimFunc)]
        assert any("tirx.is_scheduled" in f.attrs for f in functions), text
