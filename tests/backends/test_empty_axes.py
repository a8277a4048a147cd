"""Operands of which it is known that an axis has size 0: compiled code gives what the interpreter gives."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")

from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.ir import Program, evaluate, parse

FOUND = {
    "cumsum": "f32[2, 0] = cumsum(%x) {axis=1}|f32[2, 0]",
    "glu": "f32[2, 0, 4] = glu(%x)|f32[2, 0, 8]",
    "attention_without_batch": "f32[0, 3, 2, 5] = attention(%x, %x, %x) {scale=0.5}|f32[0, 3, 2, 5]",
    "attention_without_features": "f32[1, 3, 2, 0] = attention(%x, %x, %x) {scale=0.5}|f32[1, 3, 2, 0]",
    "sort": "f32[0, 5] = sort(%x) {axis=1}|f32[0, 5]",
    "norm_of_nothing": "f32[2, 0] = layer_norm(%x)|f32[2, 0]",
    "norms": "f32[2, 0, 5] = rms_norm(%x)|f32[2, 0, 5]",
    "rounded": 'f32[0, 70] = fake_quantize(%x) {scheme="int8"}|f32[0, 70]',
    "mean": "f32[3] = reduce_mean(%x) {axes=(0,)}|f32[0, 3]",
    "mean_of_all": "f32[] = reduce_mean(%x) {axes=(0, 1)}|f32[n, 0]",
    "scatter": "i64[n] = iota() {size=n}\n  %y: f32[n, 0] = scatter(%x, %i, %x) {axis=0}|f32[n, 0]",
    "rope": "i64[s] = iota() {size=s}\n  %f: f32[0] = broadcast_to(1.0:f32) {shape=(0,)}\n"
    "  %y: f32[n, s, 2, 0] = rope(%x, %i, %f)|f32[n, s, 2, 0]",
    "real_signal": "f32[2, 6, 1] = dft(%x) {length=6, inverse=true, onesided=true}|f32[2, n, 2]",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_what_has_no_elements() -> None:
    """No kernel takes it; TVM divides by sizes, and reads a size of 0 in a reshape as "keep"; NumPy reads memory beside a
    signal of no samples, and finds no size for -1."""
    texts = [(name, "i" if "%i" in text else "y", *text.split("|")) for name, text in FOUND.items()]
    graphs = {name: parse(f"graph @{name}(%x: {t}) {{\n  %{y}: {node}\n  return %y\n}}") for name, y, node, t in texts}
    run = Runner(Program(graphs), cpu())
    for name, g in graphs.items():
        x = np.zeros([d if isinstance(d, int) else 0 for d in g.inputs[0].shape], np.float32)
        (want,) = evaluate(g, {"x": x})
        assert isinstance(want, np.ndarray)
        if name == "real_signal":
            np.testing.assert_array_equal(want, np.zeros((2, 6, 1)))
        got = run(name, {"x": x})["y"]
        assert got.shape == want.shape
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("turns", ["n", "3", "0"])
def test_turns_of_a_loop_over_elements_of_nothing(turns: str) -> None:
    """TVM took the row of a turn for a view of all rows."""
    g = parse(f"""graph @loop(%h: f32[2, 4], %x: f32[{turns}, 2, 0], %e: f32[{turns}, 0]) {{
  %last: f32[2, 4], %p: f32[{turns}, 0, 4], %q: f32[{turns}, 4] = scan(%h, %x, %e) {{body=graph @turn(
    %h: f32[2, 4], %x: f32[2, 0], %e: f32[0]) {{
    %t: f32[0, 2] = transpose(%x) {{perm=(1, 0)}}
    %p: f32[0, 4] = matmul(%t, %h)
    %m: f32[2, 4] = matmul(%x, %p)
    %s: f32[] = reduce_sum(%e) {{axes=(0,)}}
    %a: f32[2, 4] = add(%m, %s)
    %next: f32[2, 4] = add(%a, %h)
    %q: f32[4] = reduce_max(%next) {{axes=(0,)}}
    return %next, %p, %q
  }}, carries=1, slices=2}}
  return %last, %p, %q
}}""")
    run = Runner(Program({"loop": g}), cpu())
    for n in (0, 1, 5) if turns == "n" else (int(turns),):
        x = {"h": np.arange(8, dtype=np.float32).reshape(2, 4), "x": np.zeros((n, 2, 0), np.float32),
             "e": np.zeros((n, 0), np.float32)}
        for y, want in zip(run("loop", x).values(), evaluate(g, x)):
            np.testing.assert_array_equal(y, want, strict=True)
