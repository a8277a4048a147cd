"""Reductions of an axis of size 0 give the reference's neutral element, where memory would be left unwritten; results without
elements are results.
"""

from __future__ import annotations

import numpy as np
import pytest
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.ir import WasatError, evaluate, parse_program

CASES = [(op, t) for op in ("reduce_max", "reduce_min", "reduce_sum", "reduce_prod") for t in ("f64", "f32", "f16", "i32")]


@pytest.mark.parametrize("op, dtype", [*CASES, ("reduce_any", "bool"), ("reduce_all", "bool")])
def test_neutral_element(op: str, dtype: str) -> None:
    program = parse_program(
        f"graph @f(%x: {dtype}[2, 0, b]) {{\n  %y: {dtype}[2, 1, b] = {op}(%x) {{axes=(1,), keepdims=true}}\n  return %y\n}}\n"
    )
    x = np.zeros((2, 0, 3), program["f"].inputs[0].tensor.dtype.np)
    (want,) = evaluate(program["f"], {"x": x})
    np.testing.assert_array_equal(Runner(program, cpu())("f", {"x": x})["y"], want)


@pytest.mark.parametrize("op, dtype", [*CASES, ("reduce_any", "bool"), ("reduce_all", "bool")])
def test_empty_at_run_time(op: str, dtype: str) -> None:
    program = parse_program(
        f"graph @f(%x: {dtype}[m, n, 2, b]) {{\n  %y: {dtype}[m, b] = {op}(%x) {{axes=(1, 2)}}\n  return %y\n}}\n"
    )
    run = Runner(program, cpu())
    for n in (0, 3):
        x = np.resize(np.array([2, 0, 3]), (2, n, 2, 3)).astype(program["f"].inputs[0].tensor.dtype.np)
        (want,) = evaluate(program["f"], {"x": x})
        for _ in range(2):  # memory that was used before
            np.testing.assert_array_equal(run("f", {"x": x})["y"], want)


PRODUCTS = [f"{t}[m, 3] = matmul(%x, %y)|{t}[m, n]|{t}[n, 3]" for t in ("f64", "f32", "f16", "bf16", "i32", "i64", "bool")] + [
    "f32[m, 3] = linear(%x, %y)|f32[m, n]|f32[3, n]",
    "f32[b, m, 3] = matmul(%x, %y)|f32[b, m, n]|f32[b, n, 3]",
    "f32[m, 3] = matmul(%x, %y)|f32[m, 0]|f32[0, 3]",
    "f32[m, 4, b] = conv(%x, %y) {strides=(1,), low=(0,), high=(0,)}|f32[m, n, b]|f32[4, n, 1]",
    "f32[m, 4, b + 1] = conv(%x, %y) {strides=(1,), low=(0,), high=(n,)}|f32[m, 2, b]|f32[4, 2, n]",
]


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_sum_of_no_products(case: str) -> None:
    """0, and where there are some, what they come to."""
    node, x, y = case.split("|")
    program = parse_program(f"graph @f(%x: {x}, %y: {y}) {{\n  %z: {node}\n  return %z\n}}\n")
    run, g = Runner(program, cpu()), program["f"]
    for n in (0, 3):
        dims, full = {"m": 2, "n": n, "b": 2}, np.arange(64) % 5 + 1
        shapes = [[d if isinstance(d, int) else dims[str(d)] for d in v.shape] for v in g.inputs]
        given = {v.name: np.resize(full, s).astype(v.tensor.dtype.np) for v, s in zip(g.inputs, shapes)}
        (want,) = evaluate(g, given)
        for _ in range(3):  # memory that was used before
            np.testing.assert_array_equal(run("f", given)["z"], want)


GROUPED = [
    "f32[b, 3, 7] = grouped_linear(%x, %y, %i)|f32[b, 3, n]|f32[4, 7, n]|i64[b, 3]",
    "f32[4, 5, n] = grouped_outer(%x, %y, %i) {size=4}|f32[b, 5]|f32[b, n]|i64[b]",
]


@pytest.mark.parametrize("b, n", [(0, 3), (2, 0), (0, 0), (2, 3)])
@pytest.mark.parametrize("case", GROUPED)
def test_groups_of_no_rows_and_rows_of_no_features(case: str, b: int, n: int) -> None:
    node, *types = case.split("|")
    inputs = ", ".join(f"%{name}: {t}" for name, t in zip("xyi", types))
    program = parse_program(f"graph @f({inputs}) {{\n  %z: {node}\n  return %z\n}}\n")
    shapes = {v.name: [{"b": b, "n": n}.get(str(d), d) for d in v.shape] for v in program["f"].inputs}
    given = {k: np.resize(np.arange(7) % 3, [int(str(d)) for d in s]).astype(np.float32) for k, s in shapes.items()}
    given["i"] = given["i"].astype(np.int64)
    (want,) = evaluate(program["f"], given)
    np.testing.assert_array_equal(Runner(program, cpu())("f", given)["z"], want)


@pytest.mark.parametrize("op", ["arg_max", "arg_min"])
def test_of_nothing_there_is_no_largest(op: str) -> None:
    program = parse_program(f"graph @f(%x: f32[m, n]) {{\n  %y: i64[m] = {op}(%x) {{axis=1}}\n  return %y\n}}\n")
    run = Runner(program, cpu())
    for call in (run, lambda name, x: evaluate(program[name], x)):
        with pytest.raises(WasatError, match="1 <= n"):
            call("f", {"x": np.zeros((2, 0), np.float32)})
    assert run("f", {"x": np.zeros((0, 2), np.float32)})["y"].shape == (0,)


def test_a_size_that_is_known_to_be_positive() -> None:
    """Nothing of the axis is left to ask at run time."""
    program = parse_program(
        "graph @f(%x: f32[n, 1]) {\n  %w: f32[n, max(n, 4)] = broadcast_to(%x) {shape=(n, max(n, 4))}\n"
        "  %y: f32[1, 1] = reduce_sum(%w) {axes=(0, 1), keepdims=true}\n"
        "  %z: f32[n] = reduce_sum(%w) {axes=(1,)}\n  return %y, %z\n}\n"
    )
    x = np.arange(3, dtype=np.float32)[:, None]
    y, z = evaluate(program["f"], {"x": x})
    got = Runner(program, cpu())("f", {"x": x})
    np.testing.assert_array_equal(got["y"], y)
    np.testing.assert_array_equal(got["z"], z)


@pytest.mark.parametrize("dtype, node", [
    ("f32", "f32[4, 4, 0] = conv(%x, %x) {strides=(1,), low=(0,), high=(-1,)}"),
    ("f32", "f32[0, 5] = reshape(%none) {shape=(0, 5)}"),
    ("bool", "bool[0, 5] = reshape(%none) {shape=(0, 5)}"), ("f8e4m3", "f8e4m3[0, 5] = reshape(%none) {shape=(0, 5)}"),
])  # fmt: skip
def test_results_of_nothing(dtype: str, node: str) -> None:
    """TVM cannot read back a constant without elements."""
    program = parse_program(
        f"graph @f(%x: {dtype}[4, 4, 1]) {{\n  %none: {dtype}[0, 4, 1] = slice(%x) {{starts=(0, 0, 0), stops=(0, 4, 1)}}\n"
        f"  %y: {node}\n  return %y\n}}\n"
    )
    y = Runner(program, cpu())("f", {"x": np.zeros((4, 4, 1), program["f"].inputs[0].tensor.dtype.np)})["y"]
    assert y.shape == program["f"].outputs[0].shape
