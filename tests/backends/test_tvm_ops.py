"""Every operation runs compiled, by a lowering or its decomposition, and agrees with its reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from wasat.backends.tvm.build import Runner, plan
from wasat.backends.tvm.targets import cpu, target_named
from wasat.ir import OPS, Builder, Graph, IRError, Op, Program, QArray, Sample, evaluate, parse, type_of

from wasat.testing import feed

# operations whose operands the backend does not carry as values
NOT_COMPILED = {
    "quantize": "weights are quantized when the artifact is written, not in the compiled program",
}


def _graph(name: str, op: Op, sample: Sample) -> tuple[Graph, dict[str, Any], dict[str, Any]]:
    """A graph of one node; quantized operands (and weights of linear) are parameters, as in a real program."""
    g = Graph(name)
    values, feeds, params = [], {}, {}
    for i, x in enumerate(sample.inputs):
        array = x if isinstance(x, QArray) else np.asarray(x)
        if isinstance(array, QArray) or (op.name in ("linear", "embedding") and i == (1 if op.name == "linear" else 0)):
            values.append(g.add_param(f"{name}.w{i}", type_of(array)))
            params[f"{name}.w{i}"] = array
        else:
            values.append(g.add_input(f"x{i}", type_of(array)))
            feeds[f"x{i}"] = array
    out = Builder(g).emit(op, *values, **sample.attrs)
    g.set_outputs(list(out) if isinstance(out, tuple) else [out])
    return g, feeds, params


@pytest.mark.parametrize("name", sorted(OPS))
def test_compiled_equals_reference(name: str) -> None:
    """All samples of one operation in one library."""
    if name in NOT_COMPILED:
        with pytest.raises(IRError):
            _run_samples(name)
        return
    _run_samples(name)


def _run_samples(name: str) -> None:
    op = OPS[name]
    cases = [_graph(f"{name}_{i}", op, s) for i, s in enumerate(op.samples())]
    from wasat.ir import ArrayParam

    params = {k: ArrayParam(x, type_of(x)) for _, _, ps in cases for k, x in ps.items()}
    runner = Runner(Program({g.name: g for g, _, _ in cases}, dict(params)), cpu())
    for g, feeds, ps in cases:
        want = evaluate(g, feeds, ps)
        got = runner(g.name, feeds)
        for n, w in zip(g.output_names, want):
            assert isinstance(w, np.ndarray)
            x = got[n]
            assert x.shape == w.shape
            if w.dtype.kind in "biu" or w.dtype.itemsize == 1:
                np.testing.assert_array_equal(x, w, err_msg=str(g))
            else:
                tol = {2: 1e-2, 4: 2e-5, 8: 1e-9}[w.dtype.itemsize]
                np.testing.assert_allclose(x.astype(np.float64), w.astype(np.float64), rtol=tol, atol=tol, err_msg=str(g))


SYMBOLIC = {
    "order": """graph @order(%x: f32[b, n, 3], %i: i32[n]) {
  %sorted: f32[b, n, 3] = sort(%x) {axis=1, descending=true}
  %ids: i32[n] = sort(%i) {axis=0}
  %top: f32[b, 2, 3], %at: i64[b, 2, 3] = top_k(%x) {k=2, axis=1}
  %least: f32[b, n, 3], %places: i64[b, n, 3] = top_k(%x) {k=n, axis=1, largest=false}
  return %sorted, %ids, %top, %at, %least, %places
}""",
    "scatter": """graph @scatter(%x: f32[b, 4, n], %ids: i64[b, n], %u: f32[b, b, n, n], %v: f32[b, 2, n]) {
  %sum: f32[b, 4, n] = scatter(%x, %ids, %u) {axis=1, reduce="add"}
  %last: f32[b, 4, n] = scatter(%x, %ids, %u) {axis=1}
  %at: i64[b, 2, n] = cast(%v) {dtype=i64}
  %along: f32[b, 4, n] = scatter_along(%x, %at, %v) {axis=1, reduce="max"}
  return %sum, %last, %along
}""",
    "conv": """graph @conv(%x: f32[b, 4, n, 5], %w: f32[6, 2, 2, 3], %y: f32[b, 4, m], %u: f32[4, 1, k]) {
  %image: f32[b, 6, n // 2 + 1, 3] = conv(%x, %w) {strides=(2, 2), low=(1, 1), high=(1, 1), groups=2}
  %causal: f32[b, 4, m] = conv(%y, %u) {strides=(1,), low=(k - 1,), high=(0,), groups=4}
  return %image, %causal
}""",
    "shape": """graph @shape(%x: f32[b, n], %y: f32[m, 2]) {
  %last: f32[b, 1] = slice(%x) {starts=(0, n - 1), stops=(b, n)}
  %half: f32[b, n // 2] = slice(%x) {starts=(0, n - n // 2), stops=(b, n)}
  %pad: f32[m + n, 2 + b] = pad(%y) {low=(n, b), high=(0, 0), value=1.0}
  %size: i64[] = dim_size() {size=n*m - 1}
  %iota: f32[n*b] = iota() {size=n*b, dtype=f32}
  return %last, %half, %pad, %size, %iota
}""",
    "random": """graph @random(%key: u32[2], %x: f32[b, n]) {
  %bits: u32[b, n, 3] = random_bits(%key) {shape=(b, n, 3)}
  %long: u64[n] = random_bits(%key) {shape=(n,), dtype=u64}
  %normal: f32[n, b] = random_normal(%key) {shape=(n, b)}
  %drop: f32[b, n] = dropout(%x, %key) {rate=0.5}
  return %bits, %long, %normal, %drop
}""",
}


def test_symbolic_sizes() -> None:
    """One compilation serves every binding."""
    graphs = {name: parse(text) for name, text in SYMBOLIC.items()}
    runner = Runner(Program(graphs), cpu())
    for dims in ({"b": 1, "n": 3, "m": 1, "k": 1}, {"b": 3, "n": 17, "m": 9, "k": 4}):
        for name, g in graphs.items():
            inputs = feed(g, dims)
            want, got = evaluate(g, inputs), runner(name, inputs)
            for n, w in zip(g.output_names, want):
                assert isinstance(w, np.ndarray)
                if w.dtype.kind in "biu":
                    np.testing.assert_array_equal(got[n], w, err_msg=n)
                else:
                    np.testing.assert_allclose(got[n], w, rtol=2e-5, atol=2e-5, err_msg=n)


def test_symbolic_sizes_compile_for_a_gpu() -> None:
    """Compiled, not run: kernels without a schedule of their own take TVM's."""
    plan(Program({name: parse(text) for name, text in SYMBOLIC.items()}), target_named("cuda"))


def test_sorting_a_long_row_is_stable() -> None:
    g = parse(SYMBOLIC["order"])
    rng = np.random.default_rng(0)
    x = rng.integers(0, 50, (2, 1000, 3)).astype(np.float32)  # many equals
    inputs = {"x": x, "i": rng.integers(-9, 9, 1000).astype(np.int32)}
    got = Runner(Program({"order": g}), cpu())("order", inputs)
    for n, w in zip(g.output_names, evaluate(g, inputs)):
        np.testing.assert_array_equal(got[n], w, err_msg=n)
