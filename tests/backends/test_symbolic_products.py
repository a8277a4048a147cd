"""Products and convolutions of sizes known when they run: none, one, below, at and above what kernels take at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kernel_help import Terms, assert_near, build, each_isa, guarded, products, run, uneven
from numpy.lib.stride_tricks import as_strided
from test_cpu import calls, selected
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.cpu.kernels.gemm import Gemm, Matrix, Windows, gemm
from wasat.backends.tvm.cpu.kernels.isa import Isa
from wasat.backends.tvm.targets import cpu
from wasat.ir import Graph, evaluate, parse_program, symbol

CASES = {
    "rows by columns": "(%x: f32[n, k], %z: f32[k, m]) {\n %y: f32[n, m] = matmul(%x, %z)",
    "a size that stands nowhere by itself": "(%x: f32[2*n, k], %z: f32[k, 2*n + 1]) {\n %y: f32[2*n, 2*n + 1] = matmul(%x, %z)",
    "queries and keys by heads": (
        "(%q: f32[b, n, 4, 20], %k: f32[b, m, 4, 20]) {\n %a: f32[b, 4, n, 20] = transpose(%q) {perm=(0, 2, 1, 3)}\n"
        " %c: f32[b, 4, 20, m] = transpose(%k) {perm=(0, 2, 3, 1)}\n %y: f32[b, 4, n, m] = matmul(%a, %c)"),
    "values of a projection, heads merged": (
        "(%p: f32[b, 4, n, m], %v: f32[b, m, 80]) {\n %r: f32[b, m, 4, 20] = reshape(%v) {shape=(b, m, 4, 20)}\n"
        " %a: f32[b, 4, m, 20] = transpose(%r) {perm=(0, 2, 1, 3)}\n %z: f32[b, 4, n, 20] = matmul(%p, %a)\n"
        " %t: f32[b, n, 4, 20] = transpose(%z) {perm=(0, 2, 1, 3)}\n %y: f32[b, n, 80] = reshape(%t) {shape=(b, n, 80)}"),
    "shared keys, cut": (
        "(%q: f32[b, 3, n, k], %c: f32[b, 1, m + 2, k]) {\n"
        " %d: f32[b, 1, m, k] = slice(%c) {starts=(0, 0, 2, 0), stops=(b, 1, m + 2, k), steps=(1, 1, 1, 1)}\n"
        " %e: f32[b, 3, m, k] = broadcast_to(%d) {shape=(b, 3, m, k)}\n"
        " %f: f32[b, 3, k, m] = transpose(%e) {perm=(0, 1, 3, 2)}\n %y: f32[b, 3, n, m] = matmul(%q, %f)"),
    "a linear of a table that is given": (
        "(%x: f32[b, n, 30], %z: f32[m, 30], %v: f32[m]) {\n %y: f32[b, n, m] = linear(%x, %z, %v)"),
}  # fmt: skip
SIZES = [
    {"b": 2, "n": 5, "m": 7, "k": 3}, {"b": 1, "n": 1, "m": 1, "k": 1}, {"b": 3, "n": 13, "m": 33, "k": 255},
    {"b": 1, "n": 6, "m": 16, "k": 256}, {"b": 2, "n": 12, "m": 15, "k": 257}, {"b": 1, "n": 7, "m": 520, "k": 519},
    {"b": 2, "n": 131, "m": 64, "k": 40}, {"b": 0, "n": 5, "m": 7, "k": 3}, {"b": 1, "n": 0, "m": 7, "k": 3},
    {"b": 1, "n": 5, "m": 0, "k": 3}, {"b": 1, "n": 5, "m": 17, "k": 0},
]  # fmt: skip


@pytest.fixture(scope="module")
def taken() -> Runner:
    text = "\n".join(f"graph @case{i}{case}\n return %y\n}}" for i, case in enumerate(CASES.values()))
    return Runner(parse_program(text), cpu(threads=2))


def terms(g: Graph, inputs: dict[str, np.ndarray], count: int) -> Terms:
    """Of sums of ``count`` terms."""
    sums = [evaluate(g, {k: f(x) for k, x in inputs.items()})[0] for f in (np.asarray, np.abs)]
    return Terms(*(np.asarray(x, np.float64) for x in sums), count)


@pytest.mark.parametrize("name", CASES)
def test_products(name: str, taken: Runner) -> None:
    graph = taken.program[f"case{list(CASES).index(name)}"]
    assert "Gemm" in calls(selected(taken.program, graph.name, cpu()))
    rng = np.random.default_rng(0)
    for sizes in SIZES:
        inputs = {v.name: rng.standard_normal(v.tensor.concrete(sizes)).astype(np.float32) for v in graph.inputs}
        assert_near(taken(graph.name, inputs)["y"], terms(graph, inputs, max(sizes["k"], sizes["m"], 30) + 1))


CONVOLUTIONS = {
    "pictures in steps, padded, in groups": (
        "(%x: f32[b, 6, n, m], %w: f32[18, 3, 3, 2]) {\n"
        " %y: f32[b, 18, (n + 1) // 2, m - 1] = conv(%x, %w) {strides=(2, 1), low=(1, 0), high=(1, 0), groups=2}"),
    "patches": (
        "(%x: f32[b, 3, 4*n, 4*m], %w: f32[20, 3, 4, 4]) {\n"
        " %y: f32[b, 20, n, m] = conv(%x, %w) {strides=(4, 4), low=(0, 0), high=(0, 0)}"),
    "a sound's windows, apart": (
        "(%x: f32[b, 5, n + 4], %w: f32[9, 5, 3]) {\n"
        " %y: f32[b, 9, n] = conv(%x, %w) {strides=(1,), low=(0,), high=(0,), dilation=(2,)}"),
}  # fmt: skip


def test_convolutions() -> None:
    text = "\n".join(f"graph @case{i}{case}\n return %y\n}}" for i, case in enumerate(CONVOLUTIONS.values()))
    runner, rng = Runner(parse_program(text), cpu(threads=2)), np.random.default_rng(0)
    for g in runner.program.graphs.values():
        assert "Gemm" in calls(selected(runner.program, g.name, cpu()))
        for b, n, m in [(1, 1, 2), (2, 5, 7), (1, 33, 16), (3, 17, 21), (0, 4, 4), (1, 40, 41), (1, 130, 3)]:
            sizes = {"b": b, "n": n, "m": m}
            inputs = {v.name: rng.standard_normal(v.tensor.concrete(sizes)).astype(np.float32) for v in g.inputs}
            assert_near(runner(g.name, inputs)["y"], terms(g, inputs, math.prod(g.inputs[1].shape[1:])))


@each_isa()
@pytest.mark.parametrize("windows", [False, True])
def test_each_instruction_set(isa: Isa, windows: bool) -> None:
    """Every size open; the columns of b are rows of memory, or places of a picture in runs of any length."""
    rng, (m, n, k, w) = np.random.default_rng(1), map(symbol, "mnkw")
    b_at = Windows(n * w + k, ((k, 1),), ((n, w), (w, 1))) if windows else Matrix(n * k, 1, k)
    columns = n * w if windows else n
    desc = Gemm(isa, m, columns, k, Matrix(m * k, k, 1), b_at, Matrix(m * columns, columns, 1), threads=2)
    compiled = build(gemm(desc), isa)
    for rows, across, deep, wide in [
        (1, 1, 1, 1), (isa.rows, 2, 300, isa.columns), (isa.rows + 1, 3, 5, 11), (3, isa.columns + 3, 256, 5), (2, 9, 0, 3),
    ]:  # fmt: skip
        env, count = dict(zip("mnkw", (rows, across, deep, wide))), across * wide if windows else across
        a, whole = uneven(rng, rows, deep), uneven(rng, 1, count + deep)[0] if windows else uneven(rng, count, deep)
        b = as_strided(whole, (deep, count), (4, 4)) if windows else whole.T
        flat = whole[: count + deep].reshape(-1)
        source = flat if flat.nbytes % 64 or not deep else guarded(flat)  # columns behind the last are not read
        given = [a.reshape(-1), source, *(env[s] for s in desc.symbols)]
        [y] = run(compiled, given, ((rows * count,), "float32"))
        assert_near(y.reshape(rows, count), products(a, b))
