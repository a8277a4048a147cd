"""Linears that read one value: which become one, in which order, and which do not."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.passes import FuseGlu, HoistParams, MergeLinears, PassManager, Quantize

from wasat.testing import InterpreterCheck, check_pass, check_untouched, random_program

DIMS = [{"b": 1, "s": 3}, {"b": 2, "s": 1}]
HEAD = """graph @f(%x: f32[b, s, 32]) {
  param %q.w: f32[8, 32]
  param %k.w: f32[4, 32]
  param %k.b: f32[4]
"""
PAIR = """
  %q: f32[b, s, 8] = linear(%x, %q.w)
  %k: f32[b, s, 4] = linear(%x, %k.w)
  return %q, %k
}"""
SLICES = """
  %q: f32[b, s, 8] = slice(%q_k) {starts=(0, 0, 0), stops=(b, s, 8), steps=(1, 1, 1)}
  %k: f32[b, s, 4] = slice(%q_k) {starts=(0, 0, 8), stops=(b, s, 12), steps=(1, 1, 1)}
  return %q, %k
}"""


def test_two_linears() -> None:
    after = HEAD + "%concat: f32[12, 32] = concat(%q.w, %k.w) {axis=0}\n %q_k: f32[b, s, 12] = linear(%x, %concat)\n" + SLICES
    remarks = check_pass(MergeLinears(), HEAD + PAIR, after, DIMS)
    assert [str(r) for r in remarks] == ["applied: %q_k = 2 linears of one value (@f)\n    at <text>:6"]


def test_a_missing_bias_is_zeros() -> None:
    after = HEAD + """
  %concat: f32[12, 32] = concat(%q.w, %k.w) {axis=0}
  %constant: f32[8] = constant() {value=dense<f32[8], 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0>}
  %concat_1: f32[12] = concat(%constant, %k.b) {axis=0}
  %q_k: f32[b, s, 12] = linear(%x, %concat, %concat_1)
""" + SLICES
    check_pass(MergeLinears(), HEAD + PAIR.replace("%k.w)", "%k.w, %k.b)"), after, DIMS)


@pytest.mark.parametrize("scheme, stored", [("int8", "int8b32f16"), ("f16", "f16")])
def test_weights_are_joined_before_they_are_stored(scheme: str, stored: str) -> None:
    store = f'quantize(%{{}}) {{{{scheme="{scheme}"}}}}' if scheme == "int8" else "cast(%{}) {{dtype=f16}}"
    linear = "quantized_linear" if scheme == "int8" else "linear"
    before = HEAD + f"""
  %qs: {stored}[8, 32] = {store.format("q.w")}
  %q: f32[b, s, 8] = {linear}(%x, %qs)
  %ks: {stored}[4, 32] = {store.format("k.w")}
  %k: f32[b, s, 4] = {linear}(%x, %ks)
  return %q, %k
}}"""
    name = "quantize" if scheme == "int8" else "cast"
    after = HEAD + f"""
  %concat: f32[12, 32] = concat(%q.w, %k.w) {{axis=0}}
  %{name}: {stored}[12, 32] = {store.format("concat")}
  %q_k: f32[b, s, 12] = {linear}(%x, %{name})
""" + SLICES
    check_pass(MergeLinears(), before, after, DIMS)


def test_a_weight_computed_later_moves_up() -> None:
    made = "%t: f32[4, 32] = add(%k.w, 1.0:f32)\n %w: f32[4, 32] = mul(%t, %t)\n"
    before = HEAD + PAIR.replace("%k.w)", "%w)").replace("  %k:", made + "%k:")
    weight = made.replace("%t", "%t_1").replace("%w", "%w_1") + "%concat: f32[12, 32] = concat(%q.w, %w_1) {axis=0}\n"
    after = HEAD + weight + "%q_k: f32[b, s, 12] = linear(%x, %concat)\n" + SLICES
    check_pass(MergeLinears(), before, after, DIMS)


def test_linears_of_linears() -> None:
    text = """graph @f(%x: f32[n, 4]) {
  param %a.w: f32[4, 4]
  param %b.w: f32[4, 4]
  param %c.w: f32[4, 4]
  param %d.w: f32[4, 4]
  %a: f32[n, 4] = linear(%x, %a.w)
  %b: f32[n, 4] = linear(%x, %b.w)
  %c: f32[n, 4] = linear(%b, %c.w)
  %d: f32[n, 4] = linear(%b, %d.w)
  return %a, %c, %d
}"""
    program = random_program(text)
    PassManager([MergeLinears()], check=InterpreterCheck([{"n": 3}])).run(program)
    assert [n.output.name for n in program["f"].nodes if n.op.name == "linear"] == ["a_b", "c_d"]


GATED = """graph @f(%x: f32[b, s, 32]) {{
  param %g.w: f32[8, 32]
  param %u.w: f32[8, 32]
  param %k.w: f32[8, 32]
  {}
  %act: f32[b, s, 8] = silu(%g)
  %y: f32[b, s, 8] = mul({})
  return %y, %k
}}"""
LINES = {n: f"%{n}: f32[b, s, 8] = linear(%x, %{n}.w)" for n in "guk"}


ORDERS = [("guk", "g_u_k"), ("ugk", "g_u_k"), ("kug", "k_g_u"), ("gku", "g_u_k"), ("ukg", "k_g_u")]


@pytest.mark.parametrize("order, want", ORDERS)
@pytest.mark.parametrize("operands", ["%act, %u", "%u, %act"])
def test_up_follows_its_gate(order: str, want: str, operands: str) -> None:
    lines = [LINES[n] for n in order]
    program = random_program(GATED.format("\n".join(lines), operands))
    PassManager([MergeLinears(), FuseGlu()], check=InterpreterCheck(DIMS)).run(program)
    g = program["f"]
    (linear,) = [n for n in g.nodes if n.op.name == "linear"]
    assert linear.output.name == want
    assert g.count("glu") == 1


TRANSPOSED = "%t: f32[32, 8] = transpose(%q.w) {perm=(1, 0)}\n return %t, %q"


def test_order_stays_where_nothing_is_gated() -> None:
    gated = GATED.replace("(%x:", "(%other: f32[8], %x:")
    lines = "\n".join(LINES[n] for n in "ugk")
    texts = [gated.format(lines, product) for product in ("%other, %act", "%act, %act")]
    texts.append(gated.format(lines, "%act, %u").replace("silu(%g)", "neg(%g)"))
    texts.append(gated.format(lines, "%u, %k").replace("return %y", "return %act, %y"))
    for text in texts:
        program = random_program(text)
        PassManager([MergeLinears()], check=InterpreterCheck(DIMS)).run(program)
        assert [n.output.name for n in program["f"].nodes if n.op.name == "linear"] == ["u_g_k"]


@pytest.mark.parametrize("kind", ["q4_k", "q4_1", "int8b32f16", "int4b64f32"])
def test_weights_that_are_stored_quantized(kind: str) -> None:
    head = f"graph @f(%x: f32[b, s, 256]) {{\n param %q.w: {kind}[8, 256]\n param %k.w: {kind}[4, 256]\n"
    before = head + PAIR.replace("linear", "quantized_linear")
    after = head + f"%concat: {kind}[12, 256] = concat(%q.w, %k.w) {{axis=0}}\n"
    check_pass(MergeLinears(), before, after + "%q_k: f32[b, s, 12] = quantized_linear(%x, %concat)\n" + SLICES, DIMS)
    program = random_program(before)
    want = program.load("q.w").dense()  # type: ignore[union-attr]
    PassManager([MergeLinears(), HoistParams()], check=InterpreterCheck(DIMS)).run(program)
    [name] = program["f"].params
    assert (name, str(program.params[name].type)) == ("q+k.w", f"{kind}[12, 256]")
    np.testing.assert_array_equal(program.load(name).dense()[:8], want)  # type: ignore[union-attr]


SLICED = "%o: f32[4, 32] = slice(%r) {starts=(0, 0), stops=(4, 32)}\n %k:"
NEAR = {
    "tied": (PAIR.replace("return %q", TRANSPOSED), "%q.w is also used elsewhere"),
    "one weight": (PAIR.replace("8] = linear(%x, %q.w)", "4] = linear(%x, %k.w)"), "%k.w is also used elsewhere"),
    "returned": (PAIR.replace("return %q", "return %k.w, %q"), "%k.w is also used elsewhere"),
    "a weight of no parameter": (
        PAIR.replace("linear(%x, %k.w)", "linear(%x, %o)").replace("  %k:", SLICED),
        "its weight %o is not computed from parameters alone",
    ),
    "quantized parameters of two schemes": (
        "param %a: int8b32f16[8, 32]\n param %c: q5_0[4, 32]\n %q: f32[b, s, 8] = quantized_linear(%x, %a)\n"
        "%k: f32[b, s, 4] = quantized_linear(%x, %c)\n return %q, %k\n}",
        "linears that read %x are not of one kind: %q int8; %k q5_0",
    ),
    "a bias of no parameter": (PAIR.replace("%k.w)", "%k.w, %z)"), "its bias %z is not computed from parameters alone"),
    "stored in another type": (
        PAIR.replace("linear(%x, %k.w)", "linear(%x, %h)").replace("  %k:", "%h: f16[4, 32] = cast(%k.w) {dtype=f16}\n %k:"),
        "linears that read %x are not of one kind: %q f32; %k f16",
    ),
    "quantized in two ways": (
        "%a: int8b32f16[8, 32] = quantize(%q.w) {scheme=\"int8\"}\n %q: f32[b, s, 8] = quantized_linear(%x, %a)\n"
        "%c: int4b32f16[4, 32] = quantize(%k.w) {scheme=\"int4\"}\n %k: f32[b, s, 4] = quantized_linear(%x, %c)\n"
        "return %q, %k\n}",
        "%q int8; %k int4",
    ),
    "activations in two ways": (
        "%a: int8b32f16[8, 32] = quantize(%q.w) {scheme=\"int8\"}\n %q: f32[b, s, 8] = quantized_linear(%x, %a)\n"
        "%c: int8b32f16[4, 32] = quantize(%k.w) {scheme=\"int8\"}\n"
        "%k: f32[b, s, 4] = quantized_linear(%x, %c) {activation=\"int8\"}\n return %q, %k\n}",
        "not of one kind",
    ),
    "other inputs": (PAIR.replace("linear(%x, %k.w)", "linear(%y, %k.w)"), None),
    "products that are no linears": (
        PAIR.replace("linear(%x, %q.w)", "matmul(%x, %m)").replace("linear(%x, %k.w)", "matmul(%x, %n)").replace(
            "  %q:", "%m: f32[32, 8] = transpose(%q.w) {perm=(1, 0)}\n %n: f32[32, 4] = transpose(%k.w) {perm=(1, 0)}\n %q:"),
        None),
}  # fmt: skip


@pytest.mark.parametrize("near", NEAR)
def test_near_misses(near: str) -> None:
    body, reason = NEAR[near]
    head = HEAD.replace("(%x: f32[b, s, 32])", "(%x: f32[b, s, 32], %y: f32[b, s, 32], %r: f32[9, 32], %z: f32[4])")
    check_untouched(MergeLinears(), head + body, reason)


def test_of_one_linear_alone_nothing_is_said() -> None:
    text = """graph @f(%x: f32[b, 32], %w: f32[4, 32]) {
  %y: f32[b, 4] = linear(%x, %w)
  return %y
}"""
    assert not PassManager([MergeLinears()]).run(random_program(text)).remarks()


def test_two_gates_share_one_up() -> None:
    text = """graph @f(%x: f32[n, 4]) {
  param %a.w: f32[2, 4]
  param %b.w: f32[2, 4]
  param %u.w: f32[2, 4]
  %a: f32[n, 2] = linear(%x, %a.w)
  %b: f32[n, 2] = linear(%x, %b.w)
  %u: f32[n, 2] = linear(%x, %u.w)
  %s: f32[n, 2] = silu(%a)
  %r: f32[n, 2] = relu(%b)
  %p: f32[n, 2] = mul(%s, %u)
  %q: f32[n, 2] = mul(%u, %r)
  return %p, %q
}"""
    program = random_program(text)
    PassManager([MergeLinears()], check=InterpreterCheck([{"n": 3}])).run(program)
    assert [n.output.name for n in program["f"].nodes if n.op.name == "linear"] == ["a_u_b"]


def test_the_others_are_merged() -> None:
    text = """graph @f(%x: f32[n, 32]) {
  param %a.w: f32[4, 32]
  param %b.w: f32[4, 32]
  param %c.w: f32[4, 32]
  %a: f32[n, 4] = linear(%x, %a.w)
  %b: f32[n, 4] = linear(%x, %b.w)
  %c: f32[n, 4] = linear(%x, %c.w)
  %r: f32[n, 32] = relu(%x)
  return %a, %b, %c, %r
}"""
    program = random_program(text)
    passes = [Quantize("int8", overrides=(("b.w", "f32"),)), MergeLinears()]
    report = PassManager(passes, check=InterpreterCheck([{"n": 2}])).run(program)
    g = program["f"]
    assert [n.output.name for n in g.nodes if "linear" in n.op.name] == ["a_c", "b"]
    assert [r.message for r in report.remarks("missed")] == ["linears that read %x are not of one kind: %a, %c int8; %b f32"]
