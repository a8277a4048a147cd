"""Attention fusion: every spelling of the zoo fuses to what it says; every guard has a near miss, with the reason."""

from __future__ import annotations

import numpy as np
import pytest
from attention_zoo import BEFORE, CASES, DIMS, MORE, Case
from wasat.ir import evaluate
from wasat.passes import Cleanup, FuseAttention, FuseNorm, FuseRope, PassManager

from wasat.testing import InterpreterCheck, check_pass, feed, random_program


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda c: c.name)
def test_zoo(case: Case) -> None:
    """One attention with the expected attributes and heads, nothing left of the formula, the same numbers."""
    program = case.build()
    tolerance = {"f32": 1e-5, "f16": 5e-3}[case.dtype]
    dims = [{"b": 1, "s": 1}, {"b": 2, "s": 9}]
    check = None if "real" in case.inputs else InterpreterCheck(dims, rtol=tolerance, atol=tolerance)
    written = program["forward"].clone()
    passes = [Cleanup(), FuseNorm(), FuseRope(), FuseAttention(), Cleanup()]
    report = PassManager(passes, check=check).run(program)
    g = program["forward"]
    (node,) = (n for n in g.nodes if n.op.name == "attention")
    want = {**case.expected, "scale": pytest.approx(case.scale, rel=1e-3 if case.dtype == "f16" else 1e-6)}
    assert {k: getattr(node.attrs, k) for k in want} == want
    assert (node.inputs[0].shape[2], node.inputs[1].shape[2]) == (4, case.kv_heads)
    assert len(node.inputs) == 3 + case.mask + case.sink
    assert (g.count("rope"), g.count("rms_norm")) == (case.ropes, case.norms)
    assert g.count("softmax") == g.count("matmul") == g.count("transpose") == g.count("broadcast_to") == 0
    assert not report.remarks("missed")
    if check is None:  # where padding hides everything, the formula gives NaN and the operation 0
        feeds = feed(g, dims[1])
        feeds["real"] = np.arange(9)[None] < np.array([[9], [4]])
        params = {k: p.load() for k, p in program.params.items()}
        (want_y,), (got_y,) = evaluate(written, feeds, params), evaluate(g, feeds, params)
        np.testing.assert_allclose(got_y, want_y, rtol=tolerance, atol=tolerance)


AFTER = """graph @f(%q: f32[b, 4, s, 8], %k: f32[b, 4, t, 8], %v: f32[b, 4, t, 6], %m: bool[b, 1, 1, t]) {
  %reshape: f32[b, 4, s, 8] = reshape(%q) {shape=(b, 4, s, 8)}
  %transpose: f32[b, s, 4, 8] = transpose(%reshape) {perm=(0, 2, 1, 3)}
  %reshape_1: f32[b, s, 4, 8] = reshape(%transpose) {shape=(b, s, 4, 8)}
  %reshape_2: f32[b, 4, t, 8] = reshape(%k) {shape=(b, 4, t, 8)}
  %transpose_1: f32[b, t, 4, 8] = transpose(%reshape_2) {perm=(0, 2, 1, 3)}
  %reshape_3: f32[b, t, 4, 8] = reshape(%transpose_1) {shape=(b, t, 4, 8)}
  %reshape_4: f32[b, 4, t, 6] = reshape(%v) {shape=(b, 4, t, 6)}
  %transpose_2: f32[b, t, 4, 6] = transpose(%reshape_4) {perm=(0, 2, 1, 3)}
  %reshape_5: f32[b, t, 4, 6] = reshape(%transpose_2) {shape=(b, t, 4, 6)}
  %reshape_6: bool[b, 1, 1, t] = reshape(%m) {shape=(b, 1, 1, t)}
  %attention: f32[b, s, 4, 6] = attention(%reshape_1, %reshape_3, %reshape_5, %reshape_6) {scale=0.5}
  %reshape_7: f32[b, s, 4, 6] = reshape(%attention) {shape=(b, s, 4, 6)}
  %transpose_3: f32[b, 4, s, 6] = transpose(%reshape_7) {perm=(0, 2, 1, 3)}
  return out=%transpose_3
}
"""


def test_text() -> None:
    """Symbolic shapes, a mask that stays an operand, values of another width."""
    (remark,) = check_pass(FuseAttention(), BEFORE, AFTER, [{"b": 1, "s": 3, "t": 5}])  # no row is masked out: NaN before
    assert remark.message == "%attention = attention: 4 heads over 4, scale 0.5, a mask operand"


NEAR_MISSES = {
    "softmax over queries": ([("axis=3", "axis=2")], "softmax axis is 2, not the key axis 3"),
    "probs returned": ([("return %out", "return %out, %probs")], "%probs is also an output of the graph"),
    "scores returned": ([("return %out", "return %out, %scaled")], "%scaled is also an output of the graph"),
    "probs used twice": (
        [("  return %out", "  %again: f32[b, 4, s, t] = neg(%probs)\n  return %out, %again")],
        "%probs is also used outside the match",
    ),
    "v broadcasts over the batch": ([("%v: f32[b,", "%v: f32[1,")], "%v (v) broadcasts over the batch"),
    "k broadcasts over the batch": (
        [("%k: f32[b,", "%k: f32[1,"), ("%kt: f32[b,", "%kt: f32[1,")], "%kt (k) broadcasts over the batch",
    ),
    "q broadcasts over heads": ([("%q: f32[b, 4,", "%q: f32[b, 1,")], "%q (q) broadcasts over heads"),
    "v has other heads": ([("%v: f32[b, 4,", "%v: f32[b, 1,")], "4 key heads and 1 value heads"),
    "no minus infinity": ([("-inf:f32", "-100.0:f32")], "neither choice is minus infinity"),
    "activation on scores": ([("= mul(%scores, 0.5:f32)", "= relu(%scores)")], "%scaled is relu"),
    "scores are an input": (
        [("%m: bool", "%x: f32[b, 4, s, t], %m: bool"), ("softmax(%masked)", "softmax(%x)")], "%x is an input",
    ),
    "probs go elsewhere": (
        [("%out: f32[b, 4, s, 6] = matmul(%probs, %v)", "%out: f32[b, 4, s, t] = relu(%probs)")], "goes into relu",
    ),
    "dropout on probs": (
        [("  %out: f32[b, 4, s, 6] = matmul(%probs,", "  %half: f32[b, 4, s, t] = mul(%probs, 0.5:f32)\n"
          "  %out: f32[b, 4, s, 6] = matmul(%half,")], "%probs goes into mul",
    ),
    "mask inside the softcap": (
        [("softmax(%masked)", "softmax(%capped)"),
         ("  %probs", "  %t: f32[b, 4, s, t] = tanh(%masked)\n  %capped: f32[b, 4, s, t] = mul(%t, 3.0:f32)\n  %probs")],
        "the mask is inside the softcap",
    ),
    "factor after the softcap": (
        [("= mul(%scores, 0.5:f32)", "= mul(%capped, 0.5:f32)"),
         ("  %scaled", "  %t: f32[b, 4, s, t] = tanh(%scores)\n  %capped: f32[b, 4, s, t] = mul(%t, 3.0:f32)\n  %scaled")],
        "a factor is applied after the softcap",
    ),
    "negative factor after the mask": (
        [("softmax(%masked)", "softmax(%flipped)"),
         ("  %probs", "  %flipped: f32[b, 4, s, t] = mul(%masked, -1.0:f32)\n  %probs")],
        "the mask is multiplied by -1",
    ),
    "a factor of 0 after the mask": (
        [("softmax(%masked)", "softmax(%gone)"), ("  %probs", "  %gone: f32[b, 4, s, t] = mul(%masked, 0.0:f32)\n  %probs")],
        "the mask is multiplied by 0",
    ),
    "scores rounded to integers": (
        [("select(%m, %scaled,", "select(%m, %whole,"),
         ("  %masked", "  %i: i32[b, 4, s, t] = cast(%scaled) {dtype=i32}\n"
          "  %whole: f32[b, 4, s, t] = cast(%i) {dtype=f32}\n  %masked")],
        "%whole is cast",
    ),
    "probs rounded to integers": (
        [("matmul(%probs, %v)", "matmul(%whole, %v)"),
         ("  %out", "  %i: i32[b, 4, s, t] = cast(%probs) {dtype=i32}\n"
          "  %whole: f32[b, 4, s, t] = cast(%i) {dtype=f32}\n  %out")],
        "%probs goes into cast",
    ),
    "values of another type": (
        [("%v: f32[b,", "%v: f16[b,"),
         ("%out: f32[b, 4, s, 6] = matmul(%probs, %v)", "%out: f16[b, 4, s, 6] = matmul(%half, %v)"),
         ("  %out", "  %half: f16[b, 4, s, t] = cast(%probs) {dtype=f16}\n  %out")],
        "q, k and v are f32, f32, f16",
    ),
    "scores broadcast by the mask": (
        [("%m: bool[b, 1, 1, t]", "%m: bool[b, 4, s, t]"), ("%q: f32[b, 4, s, 8]", "%q: f32[b, 4, 1, 8]"),
         ("%scores: f32[b, 4, s, t]", "%scores: f32[b, 4, 1, t]"), ("%scaled: f32[b, 4, s, t]", "%scaled: f32[b, 4, 1, t]")],
        "the scores are broadcast by the mask",
    ),
    "the factor after the mask leaves nothing of its fill": (
        [("-inf:f32", "-1e4:f32"), ("softmax(%masked)", "softmax(%small)"),
         ("  %probs", "  %small: f32[b, 4, s, t] = mul(%masked, 0.01:f32)\n  %probs")],
        "the mask is multiplied by 0.01",
    ),
    "scores regrouped over positions": (
        [("%m: bool[b, 1, 1, t]", "%m: bool[b, 1, 1, s]"), ("select(%m, %scaled,", "select(%m, %turned,"),
         ("  %masked: f32[b, 4, s, t]",
          "  %turned: f32[b, 4, t, s] = reshape(%scaled) {shape=(b, 4, t, s)}\n  %masked: f32[b, 4, t, s]"),
         ("%probs: f32[b, 4, s, t]", "%probs: f32[b, 4, t, s]"), ("%v: f32[b, 4, t, 6]", "%v: f32[b, 4, s, 6]"),
         ("%out: f32[b, 4, s, 6]", "%out: f32[b, 4, t, 6]")],
        "%turned is reshape",
    ),
    "probs of one row for values of many": (
        [("%q: f32[b,", "%q: f32[1,"), ("%k: f32[b,", "%k: f32[1,"), ("%kt: f32[b,", "%kt: f32[1,"),
         ("%scores: f32[b,", "%scores: f32[1,"), ("%scaled: f32[b,", "%scaled: f32[1,"), ("%m: bool[b,", "%m: bool[1,"),
         ("%masked: f32[b,", "%masked: f32[1,"), ("%probs: f32[b,", "%probs: f32[1,")],
        "the batch is 1 in the scores and b in the result",
    ),
    "mask broadcasts over some heads": (
        [("%m: bool[b, 1, 1, t]", "%m: bool[b, 2, 1, s, t]"), ("softmax(%masked)", "softmax(%flat)"),
         ("%masked: f32[b, 4, s, t] = select(%m, %scaled, -inf:f32)",
          "%five: f32[b, 2, 2, s, t] = reshape(%scaled) {shape=(b, 2, 2, s, t)}\n"
          "  %masked: f32[b, 2, 2, s, t] = select(%m, %five, -inf:f32)\n"
          "  %flat: f32[b, 4, s, t] = reshape(%masked) {shape=(b, 4, s, t)}")],
        "is broadcast over some of the axes that make up the heads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edits, reason", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_miss_is_left_alone(edits: list[tuple[str, str]], reason: str) -> None:
    text = BEFORE
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    program = random_program(text)
    before = str(program)
    report = PassManager([FuseAttention()]).run(program)
    assert str(program) == before
    (remark,) = report.remarks()
    assert remark.kind == "missed"
    assert reason in remark.message


def interleaved(perm: str) -> str:
    """Query head i over key head i mod 2 (repetition outside) or i // 2 (inside)."""
    outer = perm == "outer"
    five = "[b, 2, 2, t, 8]"
    first = "(b, 1, 2, t, 8)" if outer else "(b, 2, 1, t, 8)"
    return f"""graph @f(%q: f32[b, 4, s, 8], %k: f32[b, 2, t, 8], %v: f32[b, 2, t, 8]) {{
  %k1: f32{first.replace("(", "[").replace(")", "]")} = reshape(%k) {{shape={first}}}
  %k2: f32{five} = broadcast_to(%k1) {{shape=(b, 2, 2, t, 8)}}
  %k3: f32[b, 4, t, 8] = reshape(%k2) {{shape=(b, 4, t, 8)}}
  %v1: f32{first.replace("(", "[").replace(")", "]")} = reshape(%v) {{shape={first}}}
  %v2: f32{five} = broadcast_to(%v1) {{shape=(b, 2, 2, t, 8)}}
  %v3: f32[b, 4, t, 8] = reshape(%v2) {{shape=(b, 4, t, 8)}}
  %kt: f32[b, 4, 8, t] = transpose(%k3) {{perm=(0, 1, 3, 2)}}
  %scores: f32[b, 4, s, t] = matmul(%q, %kt)
  %probs: f32[b, 4, s, t] = softmax(%scores) {{axis=3}}
  %out: f32[b, 4, s, 8] = matmul(%probs, %v3)
  return %out
}}
"""


def test_head_order_is_read_from_the_repetition() -> None:
    """Consecutive query heads share a key head; interleaved ones are another function, and stay."""
    program = random_program(interleaved("inner"))
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck(DIMS)).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert node.inputs[1].shape[2] == 2
    report = PassManager([FuseAttention()]).run(other := random_program(interleaved("outer")))
    assert other["f"].count("attention") == 0
    assert "query head i reads head i mod 2" in report.remarks("missed")[0].message


PER_HEAD = BEFORE.replace("%m: bool[b, 1, 1, t])", "%m: bool[b, 1, 1, t], %p: f32[4, 1, 1])").replace(
    "mul(%scores, 0.5:f32)", "mul(%p, %scores)"
)
CAPPED = "  %n: f32[b, 4, s, t] = div(%scores, 3.0:f32)\n"
CAPPED += "  %u: f32[b, 4, s, t] = tanh(%n)\n  %c: f32[b, 4, s, t] = mul(%u, 3.0:f32)\n"


@pytest.mark.parametrize(
    "text",
    [
        PER_HEAD,
        PER_HEAD.replace("%p: f32[4, 1, 1]", "%p: f32[b, 1, 1, 1]"),
        PER_HEAD.replace("%p: f32[4, 1, 1]", "%p: f32[b, 4, s, 1]"),
        PER_HEAD.replace("%p: f32[4, 1, 1]", "%p: f32[s, 1]").replace("mul(%p, %scores)", "div(%scores, %p)"),
        PER_HEAD.replace("%scores: f32", "%first: f32").replace(
            "  %scaled", "  %scores: f32[b, 4, s, t] = mul(%first, 0.5:f32)\n  %scaled"
        ),
    ],
)
def test_a_scale_of_each_head_or_query(text: str) -> None:
    program = random_program(text)
    check = InterpreterCheck([{"b": 1, "s": 1, "t": 3}, {"b": 2, "s": 3, "t": 5}])
    PassManager([FuseAttention()], check=check).run(program)
    assert (program["f"].count("attention"), program["f"].count("softmax")) == (1, 0)


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ("softmax(%masked)", "softmax(%twice)", "multiplied by numbers of each head"),
        ("%p: f32[4, 1, 1]", "%p: f32[4, s, t]", "%scaled is mul"),
        ("%scaled: f32[b, 4, s, t] = mul(%p, %scores)", "%scaled: f32[b, 4, s, t] = div(%p, %scores)", "%scaled is div"),
        ("%p: f32[4, 1, 1]", "%p: f32[t]", "%scaled is mul"),
        ("mul(%p, %scores)", "mul(%p, %c)", "a factor is applied after the softcap"),
    ],
)
def test_other_scales_stay(old: str, new: str, reason: str) -> None:
    text = PER_HEAD.replace(old, new)
    text = text.replace("  %probs", "  %twice: f32[b, 4, s, t] = mul(%masked, %p)\n  %probs") if "twice" in new else text
    text = text.replace("  %scaled", CAPPED + "  %scaled") if "%c" in new else text
    program = random_program(text)
    report = PassManager([FuseAttention()]).run(program)
    assert program["f"].count("attention") == 0
    assert reason in report.remarks("missed")[0].message


def test_numbers_added_after_a_softcap() -> None:
    """A bias, and a mask that is data: both stand where the operation has its mask."""
    text = BEFORE.replace("%m: bool[b, 1, 1, t])", "%m: bool[b, 1, 1, t], %bias: f32[4, s, t])").replace(
        "  %scaled: f32[b, 4, s, t] = mul(%scores, 0.5:f32)", CAPPED + "  %scaled: f32[b, 4, s, t] = add(%c, %bias)"
    )
    program = random_program(text)
    PassManager([FuseAttention()], check=InterpreterCheck([{"b": 1, "s": 1, "t": 3}, {"b": 2, "s": 3, "t": 5}])).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.softcap, node.attrs.scale, len(node.inputs)) == (3.0, 1.0, 4)


@pytest.mark.parametrize("weight, said", [
    ("param %w: f32[8, 4]", 0), ("param %u: f32[4, 8]\n  %w: f32[8, 4] = transpose(%u) {perm=(1, 0)}", 0),
    ("%k: f32[b, 4, 8] = reshape(%z) {shape=(b, 4, 8)}\n  %w: f32[b, 8, 4] = transpose(%k) {perm=(0, 2, 1)}", 1),
])  # fmt: skip
def test_shares_of_a_router_are_no_attention(weight: str, said: int) -> None:
    """Scores by a matrix that is given choose among experts; by one that was computed, among keys: that has a remark."""
    program = random_program(f"""graph @f(%x: f32[b, s, 8], %z: f32[b, 32]) {{
  {weight}
  %scores: f32[b, s, 4] = matmul(%x, %w)
  %masked: f32[b, s, 4] = mul(%scores, 0.5:f32)
  %shares: f32[b, s, 4] = softmax(%masked) {{axis=2}}
  %y: f32[b, s, 1] = slice(%shares) {{starts=(0, 0, 0), stops=(b, s, 1)}}
  return %y, %shares
}}""")
    report = PassManager([FuseAttention()]).run(program)
    assert len(report.remarks("missed")) == said
