"""Operations that a launch plan puts into one kernel: sums, and what reads their results, all or a part of them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]
from plan_help import need
from wasat.backends.tvm.targets import target_named
from wasat.ir import Program, evaluate, parse

from wasat.planned import PlanRunner

pytestmark = pytest.mark.machines

SUMS = {  # of x [b, 6, 8], x itself in that shape
    "conv": "conv(%x, %w) {strides=(1,), low=(0,), high=(2,), dilation=(1,), input_dilation=(1,), groups=6}",
    "matmul": "matmul(%x, %m)",
    "softmax": "softmax(%x) {axis=2}",
    "cumsum": "cumsum(%x) {axis=2}",
    "norm": "layer_norm(%x)",
    "sum": "add(%t, %x)",
}
READERS = {
    "first": ("[b, 6, 1]", "slice(%a) {starts=(0, 0, 0), stops=(b, 6, 1)}"),
    "first few": ("[b, 6, 5]", "slice(%a) {starts=(0, 0, 0), stops=(b, 6, 5)}"),
    "first rows": ("[b, 1, 8]", "slice(%a) {starts=(0, 0, 0), stops=(b, 1, 8)}"),
    "last few": ("[b, 6, 3]", "slice(%a) {starts=(0, 0, 5), stops=(b, 6, 8)}"),
    "every second": ("[b, 6, 4]", "slice(%a) {starts=(0, 0, 0), stops=(b, 6, 8), steps=(1, 1, 2)}"),
    "turned": ("[b, 8, 6]", "transpose(%a) {perm=(0, 2, 1)}"),
    "several times": ("[3, b, 6, 8]", "broadcast_to(%a) {shape=(3, b, 6, 8)}"),
    "flat": ("[b, 48]", "reshape(%a) {shape=(b, 48)}"),
    "padded": ("[b, 6, 11]", "pad(%a) {low=(0, 0, 1), high=(0, 0, 2), value=0.5}"),
    "twice": ("[b, 12, 8]", "concat(%a, %a) {axis=1}"),
    "picked": ("[b, 2, 8]", "gather(%a, %i) {axis=1}"),
}


@pytest.mark.parametrize("target", ["webgpu", "opencl"])
@pytest.mark.parametrize("name", SUMS)
def test_what_reads_a_sum(target: str, name: str) -> None:
    need(target)
    rng = np.random.default_rng(0)
    given = {
        "x": ("[b, 6, 8]", (2, 6, 8)), "w": ("[6, 1, 3]", (6, 1, 3)), "m": ("[8, 8]", (8, 8)), "i": ("[2]", (2,)),
    }  # fmt: skip
    arrays = {k: rng.standard_normal(shape).astype(np.float32) for k, (_, shape) in given.items()}
    arrays["i"] = np.array([4, 1])
    graphs = {}
    for j, (shape, reader) in enumerate(READERS.values()):
        total = "%t: f32[b, 6, 1] = reduce_sum(%x) {axes=(2,), keepdims=true}" if name == "sum" else ""
        read = [k for k in given if k == "x" or f"%{k}" in SUMS[name] + reader]
        inputs = ", ".join(f"%{k}: {'i64' if k == 'i' else 'f32'}{given[k][0]}" for k in read)
        g = parse(f"""graph @g{j}({inputs}) {{
  {total}
  %s: f32[b, 6, 8] = {SUMS[name]}
  %a: f32[b, 6, 8] = tanh(%s)
  %y: f32{shape} = {reader}
  return %y
}}""")
        graphs[g.name] = g
    runner = PlanRunner(Program(graphs), target_named(target))
    for g, reader in zip(graphs.values(), READERS):
        feeds = {v.name: arrays[v.name] for v in g.inputs}
        (want,) = evaluate(g, feeds, {})
        np.testing.assert_allclose(runner(g.name, feeds)["y"], want, atol=1e-5, err_msg=reader)


ONE_TERM = {
    "linear": ("%x: f32[b, 1], %w: f32[3, 1]", "f32[b, 3]", "linear(%x, %w)", "[3]"),
    "matmul": ("%x: f32[b, 4, 1], %w: f32[b, 1, 5]", "f32[b, 4, 5]", "matmul(%x, %w)", "[5]"),
    "conv": (
        "%x: f32[b, 3, 6], %w: f32[3, 1, 1]", "f32[b, 3, 6]",
        "conv(%x, %w) {strides=(1,), low=(0,), high=(0,), dilation=(1,), input_dilation=(1,), groups=3}", "[3, 1]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", ["webgpu", "opencl"])
@pytest.mark.parametrize("name", ONE_TERM)
def test_what_follows_a_sum_of_one_term(target: str, name: str) -> None:
    """It is computed of the sum, not of the zero that the sum begins with, too: a bias is added once."""
    need(target)
    inputs, made, op, bias = ONE_TERM[name]
    g = parse(f"""graph @f({inputs}, %c: f32{bias}) {{
  %m: {made} = {op}
  %a: {made} = add(%m, %c)
  %y: {made} = sigmoid(%a)
  return %y
}}""")
    rng = np.random.default_rng(0)
    shapes = {v.name: [2 if str(d) == "b" else int(d) for d in v.shape] for v in g.inputs}
    feeds = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    (want,) = evaluate(g, feeds, {})
    runner = PlanRunner(Program({"f": g}), target_named(target))
    np.testing.assert_allclose(runner("f", feeds)["y"], want, atol=1e-6)
