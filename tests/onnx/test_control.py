"""If, Loop and Scan: folded, unrolled, a choice, cond or scan; and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

from onnx_models import add_initializers, model, run
from wasat.frontend.onnx import FromData, OnnxError, from_onnx
from wasat.runtime import RuntimeErrorBase

import wasat as ws

IF = """g (bool c, float[2] x) => (float[2] y) {
  y = If (c) <then_branch = yes () => (float[2] a) { a = Neg(x) }, else_branch = no () => (float[2] b) { b = Abs(x) }> }"""


def test_if_that_only_a_run_can_decide() -> None:
    p = from_onnx(model(IF))
    assert p["forward"].count("select") == 1
    for c in (True, False):
        np.testing.assert_array_equal(run(p, np.asarray(c), np.float32([1, -2]))[0], [-1, 2] if c else [1, 2])


@pytest.mark.parametrize("backend", ["interpreter", "cpu"])
def test_if_of_a_size(backend: str) -> None:
    """An element that only wide rows have."""
    text = """g (float[b, s] x) => (float[b] y) {
      four = Constant <value = int64[1] {4}> () five = Constant <value = int64 {4}> () s = Shape <start = 1, end = 2> (x)
      wide = Greater(s, four)
      y = If (wide) <then_branch = t () => (float[b] p) { p = Gather <axis = 1> (x, five) },
                     else_branch = f () => (float[b] q) { q = ReduceSum <keepdims = 0> (x, one) }> }"""
    p = from_onnx(add_initializers(model(text), one=np.array([1])))
    wide = np.arange(12, dtype=np.float32).reshape(2, 6)
    for x, want in ((wide, wide[:, 4]), (wide[:, :3], wide[:, :3].sum(1))):
        np.testing.assert_array_equal(ws.run(p, backend=backend, x=x)["y"], want)


BRANCHES = {  # of x [3] and i [2]: what is evaluated where i is inside, and where not
    "gather": ("a = Gather(x, i)", lambda x, i: x[i]),
    "gather along": ("a = GatherElements(x, i)", lambda x, i: x[i]),
    "gather n": ("k = Unsqueeze(i, one) a = GatherND(x, k)", lambda x, i: x[i]),
    "scatter": ("z = Slice(x, zero, two) k = ScatterElements(x, i, z) a = Slice(k, zero, two)", None),
    "a choice in a choice": (
        "a = If (inside) <then_branch = t2 () => (float[2] p) { p = Gather(x, i) }, "
        "else_branch = f2 () => (float[2] q) { j = Neg(i) q = Gather(x, j) }>", lambda x, i: x[i]),
    "in the other": ("a = Neg(two_of_x)", lambda x, i: -x[:2]),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["interpreter", "cpu"])
@pytest.mark.parametrize("name", BRANCHES)
def test_what_is_read_in_a_branch_that_is_not_taken(name: str, backend: str) -> None:
    """Is no error; in the one that is taken it is."""
    body, right = BRANCHES[name]
    other = "b = Gather(x, i)" if name == "in the other" else "b = Abs(two_of_x)"
    text = f"""g (float[3] x, int64[2] i, bool inside) => (float[2] y) {{
      two_of_x = Slice(x, zero, two)
      y = If (inside) <then_branch = yes () => (float[2] a) {{ {body} }},
                       else_branch = no () => (float[2] b) {{ {other} }}> }}"""
    p = from_onnx(add_initializers(model(text), zero=np.array([0]), two=np.array([2]), one=np.array([1])))
    x = np.float32([-1, 2, -3])
    flip = name == "in the other"

    def of(i: list[int], inside: bool) -> Any:
        return ws.run(p, backend=backend, x=x, i=np.array(i), inside=np.asarray(inside != flip))["y"]

    np.testing.assert_array_equal(of([2, 10**12], False), -x[:2] if flip else abs(x[:2]))
    np.testing.assert_array_equal(of([2, -(2**63)], False), -x[:2] if flip else abs(x[:2]))
    if right is not None:
        np.testing.assert_array_equal(of([2, 0], True), x[[2, 0]])
    with pytest.raises((ws.WasatError, RuntimeErrorBase), match="1000000000000"):
        of([2, 10**12], True)


LAZY = {  # of x [n] and z [k], what one branch needs, and its result; the other is -1
    "an element of no elements": ("e = Gather(x, first)", lambda x, z: x[0]),
    "sizes that are equal": ("d = Add(x, z) e = ReduceSum <keepdims = 0> (d)", lambda x, z: (x + z).sum()),
    "indices in a loop": (
        """m = Loop (n, yes, nought) <body = b (int64 i, bool c, float a) => (bool d, float h) {
          d = Identity(c) g = Gather(z, i) h = Add(a, g) }> e = Identity(m)""", lambda x, z: z[: len(x)].sum()),
    "a branch of a branch": (
        """big = Greater(n, one) e = If (big) <then_branch = t2 () => (float p) { p = Gather(x, one) },
          else_branch = f2 () => (float q) { d = Add(x, z) q = ReduceSum <keepdims = 0> (d) }>""", lambda x, z: x[1]),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["interpreter", "cpu"])
@pytest.mark.parametrize("name", LAZY)
def test_a_branch_that_is_not_taken_does_nothing(name: str, backend: str) -> None:
    body, right = LAZY[name]
    text = f"""g (float[n] x, float[k] z, bool go) => (float y) {{
      s = Shape (x) n = Squeeze(s)
      y = If (go) <then_branch = yes () => (float e) {{ {body} }}, else_branch = no () => (float f) {{ f = Neg(unit) }}> }}"""
    numbers = {"nought": np.float32(0), "unit": np.float32(1), "yes": np.array(True), "first": np.array(0), "one": np.array(1)}
    p = from_onnx(add_initializers(model(text), **numbers))
    assert p["forward"].count("cond") == 1

    def of(x: np.ndarray, z: np.ndarray, go: bool) -> Any:
        return ws.run(p, backend=backend, x=x, z=z, go=np.array(go))["y"]

    x, z = np.float32([1, 2, 3]), np.float32([4, 5, 6])
    np.testing.assert_array_equal(of(x, z, True), right(x, z))
    for n, k in ((0, 1), (3, 2), (1, 0)):
        np.testing.assert_array_equal(of(x[:n], z[:k], False), -1)
    n = 0 if name == "an element of no elements" else 1 if name == "a branch of a branch" else 3
    with pytest.raises((ws.WasatError, RuntimeErrorBase), match=r"outside|needs"):
        of(x[:n], z[:2], True)


def test_a_branch_that_costs_runs_only_where_it_is_taken() -> None:
    """What it makes of weights alone is made once, outside."""
    text = """g (float[n, 3] x, bool go) => (float[n, 3] y) <float[3, 3] w> {
      y = If (go) <then_branch = yes () => (float[n, 3] a) { t = Transpose(w) a = MatMul(x, t) },
                   else_branch = no () => (float[n, 3] b) { b = MatMul(x, w) }> }"""
    w = np.arange(9, dtype=np.float32).reshape(3, 3)
    p = from_onnx(add_initializers(model(text.replace("<float[3, 3] w>", "")), w=w))
    assert [n.op.name for n in p["forward"].nodes] == ["transpose", "cond"]
    x = np.float32([[1, 2, 3], [4, 5, 6]])
    for go in (True, False):
        np.testing.assert_array_equal(run(p, x, np.asarray(go))[0], x @ (w.T if go else w))
    fixed = from_onnx(add_initializers(model(text.replace("<float[3, 3] w>", "")), w=w), constants={"go": np.array(False)})
    assert [n.op.name for n in fixed["forward"].nodes] == ["matmul"]


def test_if_of_a_constant_takes_its_branch() -> None:
    p = from_onnx(model(IF), constants={"c": np.asarray(True)})
    assert [n.op.name for n in p["forward"].nodes] == ["neg"]


LOOP = """g (int64 n, float[2] x) => (float[2] y, float[k, 2] all) {
  go = Constant <value = bool {1}> ()
  y, all = Loop (n, go, x) <body = b (int64 i, bool c, float[2] a) => (bool d, float[2] e, float[2] f) {
    d = Identity(c) e = Add(a, x) f = Identity(e) }> }"""


def test_short_loops_are_unrolled() -> None:
    m = model(LOOP)
    with pytest.raises(FromData, match="depends on the numbers in n") as e:
        from_onnx(m)
    assert e.value.inputs == ("n",)
    y, every = run(from_onnx(m, constants={"n": np.asarray(3)}), np.float32([1, 2]))
    np.testing.assert_array_equal(y, [4, 8])
    np.testing.assert_array_equal(every, [[2, 4], [3, 6], [4, 8]])
    with pytest.raises(OnnxError, match=f"it turns {2**60} times"):
        from_onnx(m, constants={"n": np.asarray(2**60)})


def test_loops_that_turn_often_become_scan() -> None:
    p = from_onnx(model(LOOP), constants={"n": np.asarray(100)})
    assert p["forward"].count("scan") == 1
    y, every = run(p, np.float32([1, 2]))
    np.testing.assert_array_equal(y, [101, 202])
    np.testing.assert_array_equal(every, np.arange(2, 102)[:, None] * np.float32([1, 2]))


BY_SIZE = """g (float[t, 3] x, float[3] h) => (float[3] last, float[t, 3] all) <float[3, 3] w> {
  shape = Shape <end = 1> (x) n = Squeeze(shape) go = Constant <value = bool {1}> ()
  last, all = Loop (n, go, h) <body = b (int64 i, bool c, float[3] a) => (bool c, float[3] next, float[3] next2) {
    row = Gather(x, i) wa = MatMul(a, w) sum = Add(wa, row) next = Tanh(sum) next2 = Identity(next) }> }"""


def test_a_loop_over_a_symbolic_size_becomes_scan() -> None:
    w = np.eye(3, k=1, dtype=np.float32)
    p = from_onnx(add_initializers(model(BY_SIZE), w=w))
    assert [n.op.name for n in p["forward"].nodes] == ["iota", "scan"]
    for t in (0, 1, 5):
        x, h = np.random.default_rng(t).standard_normal((t, 3)).astype(np.float32), np.ones(3, np.float32)
        rows = []
        last, every = run(p, x, h)
        for row in x:
            h = np.tanh(h @ w + row)
            rows.append(h)
        np.testing.assert_allclose(last, h, rtol=1e-6)
        np.testing.assert_allclose(every, np.reshape(rows, (t, 3)), rtol=1e-6)


@pytest.mark.parametrize("edit, why", [
    (("next = Tanh(sum)", "next = Concat <axis = 0> (sum, sum)"), r"which is f32\[3\] before a turn and f32\[6\]"),
    (("=> (bool c,", "=> (bool more,"), "depends on what its body computes"),
])  # fmt: skip
def test_a_loop_over_a_symbolic_size_that_is_no_scan_is_refused(edit: tuple[str, str], why: str) -> None:
    text = BY_SIZE.replace(*edit).replace("row = G", "zero = Constant <value_float = 0.0> () s = ReduceMax <keepdims = 0> (a) "
                                          "more = Greater(s, zero) row = G")  # fmt: skip
    with pytest.raises(OnnxError, match=f"Loop node 'last'.*it turns t times, and .*{why}"):
        from_onnx(add_initializers(model(text), w=np.eye(3, dtype=np.float32)))


@pytest.mark.parametrize("axis, back, out_axis, out_back", [(0, 0, 0, 0), (1, 1, 0, 0), (0, 1, 1, 1), (1, 0, -1, 1)])
def test_a_scan_over_a_symbolic_size_becomes_scan(axis: int, back: int, out_axis: int, out_back: int) -> None:
    shape = "t, 2" if axis == 0 else "2, t"
    made = "t, 2" if out_axis == 0 else "2, t"
    m = model(f"""g (float[{shape}] x, float[2] h) => (float[2] last, float[{made}] all) {{
      last, all = Scan <num_scan_inputs = 1, scan_input_axes = [{axis}], scan_input_directions = [{back}],
        scan_output_axes = [{out_axis}], scan_output_directions = [{out_back}],
        body = b (float[2] a, float[2] row) => (float[2] next, float[2] y) {{
          next = Add(a, row) y = Mul(next, row) }}> (h, x) }}""")
    p = from_onnx(m)
    assert p["forward"].count("scan") == 1
    rows = np.arange(10, dtype=np.float32).reshape(5, 2)
    h, results = np.float32([1, -1]), []
    for row in rows[::-1] if back else rows:
        h = h + row
        results.append(h * row)
    want = np.stack(results[::-1] if out_back else results, out_axis)
    last, every = run(p, rows if axis == 0 else rows.T.copy(), np.float32([1, -1]))
    np.testing.assert_array_equal(last, h)
    np.testing.assert_array_equal(every, want)


def test_an_import_is_reproducible() -> None:
    first, second = (from_onnx(model(LOOP), constants={"n": np.asarray(3)}) for _ in range(2))
    assert str(first) == str(second)
