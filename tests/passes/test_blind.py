"""Queries that see nothing under a mask of positions and data which hides by a number."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import evaluate, parse
from wasat.passes import Cleanup, FuseAttention, PassManager

from wasat.testing import InterpreterCheck, check_untouched, random_program

BLIND = """graph @f(%q: f32[b, s, 4, 8], %k: f32[b, s, 2, 8], %v: f32[b, s, 2, 5], %seen: bool[b, s], %sink: f32[4]) {
  %at: i64[s] = iota() {size=s}
  %row: i64[s, 1] = reshape(%at) {shape=(s, 1)}
  %far: i64[s, 1] = mul(%row, %row)
  %back: bool[s, s] = less_equal(%at, %row)
  %key: bool[b, 1, 1, s] = reshape(%seen) {shape=(b, 1, 1, s)}
  %keep: bool[b, 1, s, s] = logical_and(%back, %key)
  %mask: f32[b, 1, s, s] = select(%keep, 0.0:f32, -3.4028235e+38:f32)
  %out: f32[b, s, 4, 5] = attention(%q, %k, %v, %mask) {scale=0.5}
  return %out
}
"""
HIDDEN = BLIND.replace("select(%keep, 0.0:f32, -3.4028235e+38:f32)", "select(%none, -3.4028235e+38:f32, 0.0:f32)").replace(
    "  %mask", "  %none: bool[b, 1, s, s] = logical_not(%keep)\n  %mask"
)


def blind_arrays(b: int, s: int) -> dict[str, np.ndarray]:
    """Rows whose first tokens are padding, one of nothing else, one without."""
    rng = np.random.default_rng(7)
    draw = {n: rng.standard_normal((b, s, h, w), np.float32) for n, h, w in (("q", 4, 8), ("k", 2, 8), ("v", 2, 5))}
    return {**draw, "sink": np.zeros(4, np.float32), "seen": np.arange(s) >= np.array([0, 2, s, 1, s - 1])[:b, None]}


@pytest.mark.parametrize("text", [BLIND, HIDDEN], ids=["kept", "hidden"])
def test_what_sees_nothing_under_a_number_has_all_values(text: str) -> None:
    """As torch exports a mask of booleans: causal, padding as an operand; a query of padding alone weighs all keys alike."""
    program = random_program(text)
    PassManager([FuseAttention(whole=True), Cleanup()]).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, len(node.inputs), program["f"].count("reduce_mean")) == (True, 4, 1)  # type: ignore[attr-defined]
    for b, s in ((1, 1), (5, 6), (3, 2)):
        arrays = blind_arrays(b, s)
        [got], [want] = evaluate(program["f"], arrays), evaluate(parse(text), arrays)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "old, new",
    [
        ("-3.4028235e+38:f32", "-10000.0:f32"),  # where nothing is seen, scores still differ
        ("{scale=0.5}", "{scale=0.5, causal=true}"),  # what sees nothing weighs what came before
        ("{scale=0.5}", "{scale=0.5, window=3}"),
        ("less_equal(%at, %row)", "less_equal(%at, %far)"),  # no predicate of positions
        ("%mask) {scale=0.5}", "%mask, %sink) {scale=0.5, sink=true}"),  # all keys weigh nothing beside it
    ],
)
def test_what_sees_nothing_is_left(old: str, new: str) -> None:
    assert old in BLIND
    check_untouched(FuseAttention(whole=True), BLIND.replace(old, new))
    check_untouched(FuseAttention(), BLIND)


def test_what_sees_nothing_among_more_keys_is_left() -> None:
    """Where there are no keys, the mean of them is none."""
    text = BLIND.replace("%at: i64[s]", "%at: i64[t]").replace("reshape(%at)", "reshape(%rows)").replace("s, s]", "s, t]")
    text = text.replace("1, 1, s", "1, 1, t").replace(") {\n", ") {\n  %rows: i64[s] = iota() {size = s}\n", 1)
    for name in ("%k: f32[b, ", "%v: f32[b, ", "bool[b, ", "iota() {size="):
        text = text.replace(f"{name}s", f"{name}t")
    check_untouched(FuseAttention(whole=True), text)


def test_a_number_that_hides_what_is_later_is_as_good_as_infinity() -> None:
    """Of an attention as it is given, too: each query sees itself."""
    program = random_program(BLIND.replace("logical_and(%back, %key)", "broadcast_to(%back) {shape=(b, 1, s, s)}"))
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck([{"b": 2, "s": 1}, {"b": 1, "s": 6}])).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, len(node.inputs)) == (True, 3)  # type: ignore[attr-defined]
