"""Scores that are one finite number where they are hidden: a query that sees nothing weighs all keys alike."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import evaluate, parse
from wasat.passes import Cleanup, FuseAttention, PassManager

import wasat as ws
from wasat.testing import check_untouched, random_program

PADDED = """graph @f(%q: f32[b, 2, s, 4], %k: f32[b, 2, t, 4], %v: f32[b, 2, t, 3], %pad: bool[b, 1, 1, t], %also: bool[b, 1, 1, t], %bias: f32[t]) {
  %kt: f32[b, 2, 4, t] = transpose(%k) {perm=(0, 1, 3, 2)}
  %scores: f32[b, 2, s, t] = matmul(%q, %kt)
  %inner: f32[b, 2, s, t] = INNER
  %masked: f32[b, 2, s, t] = select(%pad, FILL:f32, %inner)
  %outer: f32[b, 2, s, t] = OUTER
  %probs: f32[b, 2, s, t] = softmax(%outer) {axis=3}
  %y: f32[b, 2, s, 3] = matmul(%probs, %v)
  return %y
}"""  # noqa: E501


def padded(inner: str = "neg(%scores)", outer: str = "mul(%masked, 0.5:f32)", fill: str = "-1e9") -> str:
    return PADDED.replace("INNER", inner).replace("OUTER", outer).replace("FILL", fill)


def arrays(b: int, s: int, t: int) -> dict[str, np.ndarray]:
    """Rows of padding alone, of none, with some in front or behind."""
    rng = np.random.default_rng(b + s)
    at = np.arange(t)
    pad = np.stack([at >= 0, at < 0, at < t // 2, at >= 1, at < 1][:b])[:, None, None]
    wide = {n: rng.standard_normal((b, 2, m, w), np.float32) for n, m, w in (("q", s, 4), ("k", t, 4), ("v", t, 3))}
    return {**wide, "pad": pad, "also": np.roll(pad, 1, 0), "bias": rng.standard_normal(t, np.float32)}


FUSED = {
    "one": padded("mul(%scores, 0.5:f32)"),
    "least": padded("mul(%scores, 0.5:f32)", fill="-3.4028235e+38"),
    "scaled after": padded("mul(%scores, 3.0:f32)", "mul(%masked, 0.5:f32)"),
    "two": padded("select(%also, -1e9:f32, %scores)"),
    "bias below": padded("add(%scores, %bias)"),
    "hidden altogether after it": padded("mul(%scores, 0.5:f32)", "select(%also, -inf:f32, %masked)"),
}


@pytest.mark.parametrize("text", FUSED.values(), ids=FUSED)
def test_padding_by_a_number_is_data(text: str) -> None:
    program = random_program(text)
    PassManager([FuseAttention(), Cleanup()]).run(program)
    assert (program["f"].count("attention"), program["f"].count("softmax")) == (1, 0)
    for sizes in ((1, 1, 1), (5, 3, 6), (5, 6, 6), (2, 7, 2)):
        x = arrays(*sizes)
        [got], [want] = evaluate(program["f"], x), evaluate(parse(text), x)
        seen = ~np.isnan(want)  # of what is hidden altogether the formula makes NaN
        np.testing.assert_allclose(got[seen], want[seen], rtol=1e-5, atol=1e-6)


def test_compiled_a_query_of_padding_alone_has_the_mean() -> None:
    program, x = random_program(FUSED["one"]), arrays(5, 6, 9)
    [want] = evaluate(program["f"], x)
    np.testing.assert_allclose(ws.run(program, "f", backend="cpu", **x)["y"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(want[0], np.broadcast_to(x["v"][0].mean(1, keepdims=True), want[0].shape), rtol=1e-5, atol=1e-6)


NEAR_MISSES = {
    "another number below": padded("select(%also, -2e9:f32, %scores)"),
    "another number, scaled": padded("select(%also, -1e9:f32, %scores)", "mul(%masked, 1.0:f32)").replace(
        "  %masked:", "  %half: f32[b, 2, s, t] = mul(%inner, 0.5:f32)\n  %masked:").replace("f32, %inner)", "f32, %half)"),
    "hidden altogether below": padded("select(%also, -inf:f32, %scores)"),
    "added below": padded("add(%scores, %far)").replace(
        "  %inner:", "  %far: f32[b, 1, 1, t] = select(%also, -1e9:f32, 0.0:f32)\n  %inner:"),
    "bias after it": padded("mul(%scores, 0.5:f32)", "add(%masked, %bias)"),
    "raised after it": padded("mul(%scores, 0.5:f32)", "maximum(%masked, -1e8:f32)"),
}  # fmt: skip


@pytest.mark.parametrize("text", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_what_gives_a_query_without_keys_more_than_the_mean_stays(text: str) -> None:
    check_untouched(FuseAttention(), text, "some query may see nothing")


def test_the_least_f16_and_a_score_is_minus_infinity() -> None:
    text = padded("mul(%scores, 0.5:f16)", "mul(%masked, 0.5:f16)", "-65504.0").replace("f32", "f16")
    check_untouched(FuseAttention(), text, "some query may see nothing, in f16")


SELF = """graph @f(%q: f32[b, 2, s, 4], %k: f32[b, 2, KEYS, 4], %v: f32[b, 2, KEYS, 3], %id: i64[b, s], %own: i64[b, KEYS]) {
  %kt: f32[b, 2, 4, KEYS] = transpose(%k) {perm=(0, 1, 3, 2)}
  %scores: f32[b, 2, s, KEYS] = matmul(%q, %kt)
  %row: i64[b, 1, s, 1] = reshape(%id) {shape=(b, 1, s, 1)}
  %col: i64[b, 1, 1, KEYS] = reshape(IDS) {shape=(b, 1, 1, KEYS)}
  %same: bool[b, 1, s, KEYS] = SAME
  %at: i64[s] = iota() {size=s}
  %place: i64[s, 1] = reshape(%at) {shape=(s, 1)}
  %key: i64[KEYS] = iota() {size=KEYS}
  %back: bool[s, KEYS] = less_equal(%key, %place)
  %keep: bool[b, 1, s, KEYS] = KEEP
  %masked: f32[b, 2, s, KEYS] = select(%keep, %scores, -1e9:f32)
  %probs: f32[b, 2, s, KEYS] = softmax(%masked) {axis=3}
  %y: f32[b, 2, s, 3] = matmul(%probs, %v)
  return %y
}"""


def itself(same: str = "equal(%row, %col)", keep: str = "logical_and(%same, %back)", ids: str = "%id", keys: str = "s") -> str:
    return SELF.replace("SAME", same).replace("KEEP", keep).replace("IDS", ids).replace("KEYS", keys)


@pytest.mark.parametrize(
    "text",
    [
        itself(),
        itself("less_equal(%row, %col)"),
        itself(keep="logical_not(%hide)").replace(
            "  %keep", "  %other: bool[b, 1, s, s] = not_equal(%row, %col)\n  %ahead: bool[s, s] = less(%place, %key)\n"
            "  %hide: bool[b, 1, s, s] = logical_or(%other, %ahead)\n  %keep"),
        itself(keep="logical_or(%same, %back)"),
        itself("less(%row, %col)", "logical_or(%same, %back)"),
    ],
)  # fmt: skip
def test_documents_told_apart_by_numbers_see_themselves(text: str) -> None:
    program = random_program(text)
    PassManager([FuseAttention(), Cleanup()]).run(program)
    assert program["f"].count("attention") == 1
    x = {k: v for k, v in arrays(5, 6, 6).items() if k in "qkv"} | {"own": np.zeros((5, 6), np.int64)}
    x["id"] = np.random.default_rng(0).integers(0, 3, (5, 6))
    [got], [want] = evaluate(program["f"], x), evaluate(parse(text), x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        itself("less(%row, %col)"),
        itself("not_equal(%row, %col)"),
        itself(ids="%own"),  # numbers of two kinds
        itself(ids="%own", keys="t"),
        itself().replace("i64[b", "f32[b"),  # NaN differs from itself
        itself("logical_not(%equal)").replace("  %same", "  %equal: bool[b, 1, s, s] = equal(%row, %col)\n  %same"),
        itself(keep="logical_and(%same, %before)").replace("  %keep", "  %before: bool[s, s] = less(%key, %place)\n  %keep"),
        itself("less(%row, %col)", keep="logical_or(%same, %before)").replace(
            "  %keep", "  %before: bool[s, s] = less(%key, %place)\n  %keep"),
    ],
)  # fmt: skip
def test_what_may_hide_a_token_from_itself_stays(text: str) -> None:
    check_untouched(FuseAttention(), text, "some query may see nothing")


@pytest.mark.parametrize("whole", [True, False])
def test_causal_and_padding_by_one_number(whole: bool) -> None:
    """A query of padding alone sees later keys, too: causal where no cache is derived, and left where one may be."""
    text = padded("select(%back, %scores, -1e9:f32)").replace("[t]) {", "[t]) {\n  %at: i64[t] = iota() {size=t}").replace(
        "  %inner", "  %place: i64[t, 1] = reshape(%at) {shape=(t, 1)}\n  %back: bool[t, t] = less_equal(%at, %place)\n  %inner"
    ).replace("s, t]", "t, t]").replace("2, s,", "2, t,")  # fmt: skip
    if not whole:
        return check_untouched(FuseAttention(), text, "some query may see nothing")
    program = random_program(text)
    PassManager([FuseAttention(whole=True), Cleanup()]).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, len(node.inputs)) == (True, 4)  # type: ignore[attr-defined]
    x = arrays(5, 6, 6)
    [got], [want] = evaluate(program["f"], x), evaluate(parse(text), x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
