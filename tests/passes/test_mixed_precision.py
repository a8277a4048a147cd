"""Mixed precision: what becomes half, what stays f32, what is converted for it; models stay near their f32 numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from wasat.frontend import from_pretrained
from wasat.ir import ArrayParam, Graph, Program, evaluate, parse, type_of
from wasat.passes import Cleanup, FuseAttention, FuseNorm, FuseRope, MixedPrecision, PassError, PassManager
from wasat.training.losses import add_loss, cross_entropy

import wasat as ws
from wasat.testing import random_program

GOLDEN = Path(__file__).parent.parent / "golden"
TEXT = """graph @loss(%x: f32[n, 4]) {
  param %w: f32[6, 4]
  param %b: f32[6]
  param %v: f32[2, 6]
  param %c: f32[2]
  %y: f32[n, 6] = linear(%x, %w)
  %z: f32[n, 6] = add(%y, %b)
  %t: f32[n, 6] = tanh(%z)
  %h: f32[n, 6] = mul(%t, 0.5:f32)
  %u: f32[n, 2] = linear(%h, %v, %c)
  %p: f32[n, 2] = softmax(%u) {axis=1}
  %loss: f32[] = reduce_sum(%p) {axes=(0, 1)}
  return %loss, %u
}"""
AFTER = """graph @loss(%x: f32[n, 4]) {
  param %w: f32[6, 4]
  param %b: f32[6]
  param %v: f32[2, 6]
  param %c: f32[2]
  %cast: f16[n, 4] = cast(%x) {dtype=f16}
  %y: f16[n, 6] = linear(%cast, %w)
  %cast_1: f16[6] = cast(%b) {dtype=f16}
  %z: f16[n, 6] = add(%y, %cast_1)
  %t: f16[n, 6] = tanh(%z)
  %h: f16[n, 6] = mul(%t, 0.5:f16)
  %cast_3: f16[2, 6] = cast(%v) {dtype=f16}
  %cast_4: f16[2] = cast(%c) {dtype=f16}
  %u: f16[n, 2] = linear(%h, %cast_3, %cast_4)
  %cast_5: f32[n, 2] = cast(%u) {dtype=f32}
  %p: f32[n, 2] = softmax(%cast_5) {axis=1}
  %loss: f32[] = reduce_sum(%p) {axes=(0, 1)}
  return %loss, u=%cast_5
}"""


def mixed(text: str, dtype: str = "f16") -> tuple[Graph, list[str]]:
    program = random_program(text)
    report = PassManager([MixedPrecision(dtype=dtype)]).run(program)
    PassManager([Cleanup()]).run(program)
    return program["loss"], [str(r) for r in report.remarks()]


def test_text() -> None:
    g, remarks = mixed(TEXT)
    assert str(g) == str(parse(AFTER))
    assert remarks == ["applied: 2 products in f16 (@loss)"]
    bf16, _ = mixed(TEXT, "bf16")
    assert str(bf16) == str(parse(AFTER.replace("f16", "bf16")))


def test_bodies_of_loops_are_named() -> None:
    text = """graph @loss(%h: f32[b, 4], %x: f32[n, b, 4], %w: f32[4, 4]) {
      %last: f32[b, 4] = scan(%h, %x, %w) {body=graph @cell(%h: f32[b, 4], %x: f32[b, 4], %w: f32[4, 4]) {
        %y: f32[b, 4] = matmul(%x, %w)
        %next: f32[b, 4] = OPERATION(%h, %y)
        return %next
      }, carries=1, slices=1}
      return %last
    }"""
    _, remarks = mixed(text.replace("OPERATION", "add"))
    assert remarks[0].startswith("missed: %last = scan keeps f32 in its body (products there: 1)")
    _, remarks = mixed(text.replace("matmul(%x, %w)", "mul(%x, %h)").replace("OPERATION", "add"))
    assert len(remarks) == 1  # nothing is lost


def dtypes(body: str, dtype: str = "f16", inputs: str = "", params: str = "") -> dict[str, str]:
    """Types by name of what follows ``y``, a product in half precision."""
    declared = "".join(f"param {p}\n" for p in params.split("; ") if p)
    text = f"graph @loss(%x: f32[n, 4]{inputs}) {{\n param %w: f32[4, 4]\n{declared}%y: f32[n, 4] = linear(%x, %w)\n{body}\n}}"
    g, _ = mixed(text, dtype)
    return {v.name: str(v.type) for v in g.values()}


POSITIONS = """%i: i64[n] = iota() {size=n}
  %f: f32[n] = cast(%i) {dtype=f32}
  %c: f32[n, 1] = reshape(%f) {shape=(n, 1)}
  %k: f32[1, 4] = broadcast_to(0.1:f32) {shape=(1, 4)}
"""
KEEPS = {  # in half precision or not, and why
    "a constant that overflows": ("%z: f32[n, 4] = maximum(%y, -3e38:f32)\n return %z", "f16", "f32"),
    "the same in bf16": ("%z: f32[n, 4] = maximum(%y, -3e38:f32)\n return %z", "bf16", "bf16"),
    "a constant that vanishes": ("%z: f32[n, 4] = add(%y, 1e-12:f32)\n return %z", "f16", "f32"),
    "an infinity": ("%z: f32[n, 4] = maximum(%y, -inf:f32)\n return %z", "f16", "f16"),
    "an activation in f32": ("%e: f32[n, 4] = exp(%y)\n %z: f32[n, 4] = mul(%y, %e)\n return %z", "f16", "f32"),
    "an input in f32": ("%z: f32[n, 4] = mul(%y, %x)\n return %z", "f16", "f32"),
    "made of parameters": ("%v: f32[4, 4] = add(%w, 1.0:f32)\n %r: f32[4] = reduce_max(%v) {axes=(0,)}\n"
                           "%z: f32[n, 4] = mul(%y, %r)\n return %z", "f16", "f16"),
    "made of constants": (
        POSITIONS + "%r: f32[n, 1] = mul(%c, 1e38:f32)\n %z: f32[n, 4] = maximum(%y, %r)\n return %z", "f16", "f32",
    ),
    "angles of positions": (POSITIONS + "%z: f32[n, 4] = matmul(%c, %k)\n return %z, %y", "bf16", "f32"),
    "bits": ("%i: i32[n, 4] = bitcast(%y) {dtype=i32}\n %z: f32[n, 4] = bitcast(%i) {dtype=f32}\n return %z", "f16", "f32"),
    "a normalization": ("%g: f32[4] = reshape(%s) {shape=(4,)}\n %z: f32[n, 4] = rms_norm(%y, %g)\n return %z", "f16", "f16"),
}  # fmt: skip


@pytest.mark.parametrize("case", KEEPS)
def test_what_follows_a_product(case: str) -> None:
    body, dtype, want = KEEPS[case]
    found = dtypes(body, dtype, params="%s: f32[2, 2]")
    assert found["z"] == f"{want}[n, 4]"
    assert found["y"] == f"{dtype}[n, 4]"


@pytest.mark.parametrize("body, types", [
    ("%z: f32[n, 4] = matmul(%x, %v)", "f16[n, 4]"),
    ("%z: f32[n, 4] = linear(%x, %v)", "f16[n, 4]"),
    ("%i: f32[1, 1, n, 4] = reshape(%x) {shape=(1, 1, n, 4)}\n %k: f32[1, 1, 4, 4] = reshape(%v) {shape=(1, 1, 4, 4)}\n"
     "%z: f32[1, 1, n, 1] = conv(%i, %k) {strides=(1, 1), low=(3, 0), high=(0, 0)}", "f16[1, 1, n, 1]"),
    ("%q: f32[1, n, 1, 4] = reshape(%x) {shape=(1, n, 1, 4)}\n"
     "%z: f32[1, n, 1, 4] = attention(%q, %q, %q) {scale=0.5}", "f16[1, n, 1, 4]"),
    ("%g: i64[n] = iota() {size=n}\n %h: i64[n] = mod(%g, 1:i64)\n %m: f32[1, 4, 4] = reshape(%v) {shape=(1, 4, 4)}\n"
     "%z: f32[n, 4] = grouped_linear(%x, %m, %h)", "f16[n, 4]"),
], ids=["matmul", "linear", "conv", "attention", "grouped_linear"])  # fmt: skip
def test_every_product_is_half(body: str, types: str) -> None:
    found = dtypes(body + "\n return %z", inputs=", %v: f32[4, 4]")
    assert found["z"] == types


@pytest.mark.parametrize("op", [
    "acos", "acosh", "asin", "atanh", "cosh", "exp", "expm1", "log", "log1p", "rsqrt", "sinh", "softplus", "sqrt", "tan", "pow",
    "cumsum", "log_softmax", "logsumexp", "reduce_mean", "reduce_prod", "reduce_sum", "softmax",
])  # fmt: skip
def test_what_leaves_the_range_or_adds_up_is_f32(op: str) -> None:
    shape = "[n]" if op.startswith(("reduce", "logsumexp")) else "[n, 4]"
    operands = "%y, %y" if op == "pow" else "%y"
    how = " {axis=1}" if op in ("cumsum", "softmax", "log_softmax") else " {axes=(1,)}" if shape == "[n]" else ""
    assert dtypes(f"%z: f32{shape} = {op}({operands}){how}\n return %z, %y")["z"] == f"f32{shape}"


def test_rows_of_a_table_are_half_and_other_types_stay() -> None:
    body = """%e: f32[n, 4] = embedding(%table, %ids)
  %a: f32[n, 4] = add(%e, %y)
  %d: f64[n, 4] = mul(%wide, 2.0:f64)
  return %a, %d"""
    found = dtypes(body, inputs=", %ids: i64[n], %wide: f64[n, 4]", params="%table: f32[9, 4]")
    assert (found["e"], found["a"], found["d"]) == ("f32[n, 4]", "f16[n, 4]", "f64[n, 4]")


def test_left_alone_and_refused() -> None:
    text = "graph @loss(%x: f32[n]) {\n %s: f32[] = reduce_sum(%x) {axes=(0,)}\n return %s\n}"
    g, remarks = mixed(text)
    assert str(g) == str(parse(text))
    assert remarks == ["missed: it has no product in f32 (@loss)"]
    with pytest.raises(PassError, match="half precision is bf16 or f16"):
        mixed(TEXT, "f32")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "dtype", "rtol"), [("llama", "bf16", 3e-3), ("llama", "f16", 3e-4), ("gemma3", "f16", 3e-4)])
def test_whole_models_stay_near(name: str, dtype: str, rtol: float, fused: bool) -> None:
    program: Program = from_pretrained(GOLDEN / "hf" / name)
    if fused:
        PassManager([Cleanup(), FuseNorm(), FuseRope(), FuseAttention()]).run(program)
    add_loss(program, lambda b, v: cross_entropy(b, v["logits"], v["labels"]), {"labels": "i64[b, s]"})
    PassManager([MixedPrecision(dtype=dtype), Cleanup()]).run(program)
    g = program["loss"]
    products = [n for n in g.nodes if n.op.name in ("linear", "matmul", "attention")]
    assert all(str(n.output.type).startswith(dtype) for n in products)
    golden = np.load(GOLDEN / "training" / f"gradients_{name}.npz")
    params = {k: program.params[k].load() for k in g.params}
    (loss,) = evaluate(g, {"tokens": golden["ids"], "labels": golden["labels"]}, params)
    assert loss != golden["loss"]
    assert_allclose(loss, golden["loss"], rtol=rtol)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype, want", [("f16", "f32[n, 5]"), ("bf16", "bf16[n, 5]")])
def test_an_attribute_that_half_precision_has_no_room_for(dtype: str, want: str) -> None:
    text = """graph @loss(%x: f32[n, 4]) {
  param %w: f32[4, 4]
  %y: f32[n, 4] = linear(%x, %w)
  %z: f32[n, 5] = pad(%y) {low=(0, 0), high=(0, 1), value=-1e5}
  return %z
}"""
    program = random_program(text)
    PassManager([MixedPrecision(dtype=dtype)]).run(program)
    assert [str(n.output.type) for n in program["loss"].nodes if n.op.name == "pad"] == [want]


@pytest.mark.parametrize("half", ["bf16", "f16"])
def test_served_in_half_precision(half: str) -> None:
    """``activation=`` of ``optimize``: caches and what is between them; a step over caches means what the whole pass does."""
    program = from_pretrained(GOLDEN.parent.parent / "examples" / "pygemma")
    served, report = ws.optimize(program, quantize=half, activation=half)
    states = served.interface.state_names
    assert {str(v.tensor.dtype) for g in served.graphs.values() for v in g.inputs if v.name in states} == {half}
    for g in served.graphs.values():
        fused = [n for n in g.nodes if n.op.name in ("linear", "glu", "rope", "cached_attention", "rms_norm")]
        assert len(fused) > 10
        assert {str(n.outputs[0].tensor.dtype) for n in fused} == {half}
        assert {str(v.tensor.dtype) for n, v in zip(g.output_names, g.outputs) if n not in states} == {"f32"}
    assert [s.name for s in report.steps].index("mixed-precision") < [s.name for s in report.steps].index("derive-kv-cache")
    exact, _ = ws.optimize(program, activation=None, kv_cache=False)
    whole, _ = ws.optimize(program, quantize=half, activation=half, kv_cache=False)
    tokens = np.arange(5, 17)[None]
    a, b = (ws.run(p, tokens=tokens)["logits"] for p in (exact, whole))
    assert b.dtype == np.float32
    assert 0 < np.abs(a - b).max() < {"bf16": 0.03, "f16": 0.004}[half] * np.abs(a).max()


@pytest.mark.parametrize("planted, named", [(1e6, True), (1e-7, True), (3.0, False)])
def test_a_parameter_that_f16_does_not_hold_stays_f32_and_is_named(planted: float, named: bool) -> None:
    """A weight as it is, one that is computed from another, and the rows of a table."""
    text = """graph @loss(%x: f32[n, 4], %i: i64[n]) {
      param %w: f32[6, 4]
      param %v: f32[4, 6]
      param %e: f32[3, 6]
      %y: f32[n, 6] = linear(%x, %w)
      %t: f32[6, 4] = transpose(%v) {perm=(1, 0)}
      %z: f32[n, 6] = linear(%x, %t)
      %r: f32[n, 6] = gather(%e, %i) {axis=0}
      return %y, %z, %r
    }"""
    program = random_program(text)
    given = {k: np.full_like(p.load(), planted) for k, p in program.params.items()}
    program.params.update({k: ArrayParam(x, type_of(x)) for k, x in given.items()})
    feeds = {"x": np.eye(2, 4, dtype=np.float32), "i": np.array([0, 2])}
    want = evaluate(program["loss"], feeds, given)
    report = PassManager([MixedPrecision(dtype="f16")]).run(program)
    for got, exact in zip(evaluate(program["loss"], feeds, given), want):
        assert_allclose(got, exact, rtol=1e-3)
    missed = [r.message for r in report.remarks("missed")]
    assert [any(f"{k} has a row outside f16" in m for m in missed) for k in "wve"] == [named] * 3
