"""Rotary position embedding of interleaved pairs: every spelling, and features that are not pairs."""

from __future__ import annotations

import pytest
from test_fuse_rope import DIMS, HALF_TABLES, INV, TABLES, TURN, graph, product
from wasat.passes import FuseRope, PassManager

from wasat.testing import InterpreterCheck, check_pass, check_untouched, random_program

PAIRS = """
  %pairs: f32[b, s, 3, 2, 2] = reshape(%x) {shape=(b, s, 3, 2, 2)}
  %s1: f32[b, s, 3, 2, 1] = slice(%pairs) {starts=(0, 0, 0, 0, 0), stops=(b, s, 3, 2, 1)}
  %s2: f32[b, s, 3, 2, 1] = slice(%pairs) {starts=(0, 0, 0, 0, 1), stops=(b, s, 3, 2, 2)}
  %x1: f32[b, s, 3, 2] = reshape(%s1) {shape=(b, s, 3, 2)}
  %x2: f32[b, s, 3, 2] = reshape(%s2) {shape=(b, s, 3, 2)}
"""
JOINED = """
  %r1: f32[b, s, 3, 2, 1] = reshape(%y1) {shape=(b, s, 3, 2, 1)}
  %r2: f32[b, s, 3, 2, 1] = reshape(%y2) {shape=(b, s, 3, 2, 1)}
  %both: f32[b, s, 3, 2, 2] = concat(%r1, %r2) {axis=4}
  %y: f32[b, s, 3, 4] = reshape(%both) {shape=(b, s, 3, 4)}
"""


def turned_in_another_order(text: str) -> None:
    """One rotation of features that were put in another order before it."""
    program = random_program(text)
    PassManager([FuseRope()], check=InterpreterCheck(DIMS)).run(program)
    assert (program["f"].count("rope"), program["f"].count("gather")) == (1, 1)


def test_interleaved_pairs() -> None:
    want = graph(INV, "%y: f32[b, s, 3, 4] = rope(%x, %at, %constant) {interleaved=true}")
    check_pass(FuseRope(), graph(HALF_TABLES, PAIRS, product("3, 2]"), JOINED), want, DIMS)


EVERY_SECOND = """
  %x1: f32[b, s, 3, 2] = slice(%x) {starts=(0, 0, 0, 0), stops=(b, s, 3, 4), steps=(1, 1, 1, 2)}
  %x2: f32[b, s, 3, 2] = slice(%x) {starts=(0, 0, 0, 1), stops=(b, s, 3, 4), steps=(1, 1, 1, 2)}
"""


def test_every_second_feature() -> None:
    """x[..., ::2] and x[..., 1::2], stacked."""
    want = graph(INV, "%y: f32[b, s, 3, 4] = rope(%x, %at, %constant) {interleaved=true}")
    for even in (EVERY_SECOND, EVERY_SECOND.replace("(0, 0, 0, 0), stops=(b, s, 3, 4)", "(0, 0, 0, 0), stops=(b, s, 3, 3)")):
        check_pass(FuseRope(), graph(HALF_TABLES, even, product("3, 2]"), JOINED), want, DIMS)


@pytest.mark.parametrize("old, new", [
    ("%x1: f32[b, s, 3, 2] = slice(%x) {starts=(0, 0, 0, 0)", "%x1: f32[b, s, 3, 2] = slice(%x) {starts=(0, 0, 0, 1)"),
    ("starts=(0, 0, 0, 1)", "starts=(0, 0, 0, 0)"),
    ("(0, 0, 0, 0), stops=(b, s, 3, 4), steps=(1, 1, 1, 2)", "(0, 0, 0, 0), stops=(b, s, 3, 2)"),
    ("(0, 0, 0, 1), stops=(b, s, 3, 4), steps=(1, 1, 1, 2)", "(0, 0, 0, 1), stops=(b, s, 3, 3)"),
    ("(0, 0, 0, 0), stops=(b, s, 3, 4), steps=(1, 1, 1, 2)", "(0, 0, 0, 0), stops=(b, s, 3, 4), steps=(1, 1, 1, 3)"),
])  # fmt: skip
def test_other_features(old: str, new: str) -> None:
    pairs = EVERY_SECOND.replace(old, new, 1)
    assert pairs != EVERY_SECOND
    check_untouched(FuseRope(), graph(HALF_TABLES, pairs, product("3, 2]"), JOINED), "are not its even and its odd features")


def test_every_second_feature_of_other_heads() -> None:
    pairs = EVERY_SECOND.replace("%x)", "%u)").replace("3, 4), steps=(1, 1, 1", "6, 4), steps=(1, 1, 2")
    wide = "\n  %u: f32[b, s, 6, 4] = concat(%x, %x) {axis=2}"
    check_untouched(FuseRope(), graph(HALF_TABLES, wide, pairs, product("3, 2]"), JOINED), None)


@pytest.mark.parametrize("way", ["halves in, pairs out", "pairs in, halves out", "second before first", "heads among pairs"])
def test_pairs_put_otherwise(way: str) -> None:
    pairs, joined, tables, n, reason = PAIRS, JOINED, HALF_TABLES, "3, 2]", "does not hold the pairs of features"
    match way:
        case "halves in, pairs out":
            pairs = pairs.replace("3, 2, 2]", "3, 1, 4]").replace("(b, s, 3, 2, 2)}\n  %s1", "(b, s, 3, 1, 4)}\n  %s1")
            pairs = pairs.replace("3, 2, 1] = slice", "3, 1, 2] = slice")
            pairs = pairs.replace("0, 1), stops=(b, s, 3, 2, 2)", "0, 2), stops=(b, s, 3, 1, 4)")
            pairs = pairs.replace("0, 0), stops=(b, s, 3, 2, 1)", "0, 0), stops=(b, s, 3, 1, 2)")
        case "pairs in, halves out":
            joined = joined.replace("3, 2, 1", "3, 1, 2").replace("3, 2, 2]", "3, 1, 4]")
        case "second before first":
            pairs = pairs.replace("(%s1)", "(%s0)").replace("(%s2)", "(%s1)").replace("(%s0)", "(%s2)")
        case _:
            n, tables = "2, 3]", tables.replace("s, 2]", "s, 3]").replace("1, 2", "1, 3").replace("f32[2]", "f32[3]")
            tables = tables.replace("0.1>", "0.1 0.01>")
            pairs = pairs.replace("3, 2] = reshape", "2, 3] = reshape").replace("(b, s, 3, 2)}", "(b, s, 2, 3)}")
    if way == "heads among pairs":
        check_untouched(FuseRope(), graph(tables, pairs, product(n), joined), reason)
    else:
        turned_in_another_order(graph(tables, pairs, product(n), joined))


# -- together: x * cos + stack(-odd, even) * sin ---------------------------------------------------------------------------
EACH_TWICE = """
  %a1: f32[s, 2, 1] = reshape(%a) {shape=(s, 2, 1)}
  %a2: f32[s, 2, 2] = broadcast_to(%a1) {shape=(s, 2, 2)}
  %aa: f32[s, 4] = reshape(%a2) {shape=(s, 4)}"""
TWICE = TABLES.replace("\n  %aa: f32[s, 4] = concat(%a, %a) {axis=1}", EACH_TWICE)
"""Each angle twice, side by side."""
TURNED = """
  %neg: f32[b, s, 3, 2] = neg(%x2)
  %r1: f32[b, s, 3, 2, 1] = reshape(%neg) {shape=(b, s, 3, 2, 1)}
  %r2: f32[b, s, 3, 2, 1] = reshape(%x1) {shape=(b, s, 3, 2, 1)}
  %both: f32[b, s, 3, 2, 2] = concat(%r1, %r2) {axis=4}
  %rot: f32[b, s, 3, 4] = reshape(%both) {shape=(b, s, 3, 4)}
  %m1: f32[b, s, 3, 4] = mul(%x, %c)
  %m2: f32[b, s, 3, 4] = mul(%rot, %n)
  %y: f32[b, s, 3, 4] = add(%m1, %m2)
"""
AFTER_CUT = TURNED.replace("neg: f32[b, s, 3, 2]", "r1: f32[b, s, 3, 2, 1]").replace("neg(%x2)", "neg(%s2)")
AFTER_CUT = "\n".join(x for x in AFTER_CUT.splitlines() if "reshape(%neg)" not in x and "%r2:" not in x).replace("%r2)", "%s1)")
CUT = "\n".join(PAIRS.splitlines()[:4])


@pytest.mark.parametrize("parts, turned", [(EVERY_SECOND, TURNED), (PAIRS, TURNED), (CUT, AFTER_CUT)])
def test_pairs_turned_together(parts: str, turned: str) -> None:
    want = graph(INV, "%y: f32[b, s, 3, 4] = rope(%x, %at, %constant) {interleaved=true}")
    late = TWICE.replace("%c: f32[s, 1, 4] = cos(%t)", "").replace("%n: f32[s, 1, 4] = sin(%t)", "").split("%a1")[0] + "".join(
        f"""
  %{k}a: f32[s, 2] = {f}(%a)
  %{k}b: f32[s, 2, 1] = reshape(%{k}a) {{shape=(s, 2, 1)}}
  %{k}d: f32[s, 2, 2] = concat(%{k}b, %{k}b) {{axis=2}}
  %{k}: f32[s, 1, 4] = reshape(%{k}d) {{shape=(s, 1, 4)}}""" for k, f in (("c", "cos"), ("n", "sin"))
    )  # fmt: skip
    for tables in (TWICE, late):  # angles repeated, and cosines
        check_pass(FuseRope(), graph(tables, parts, turned), want, DIMS)


@pytest.mark.parametrize("tables, parts, turned, reason", [
    (TABLES, EVERY_SECOND, TURNED, "%c holds its angles in another order"),
    (TWICE, EVERY_SECOND, TURNED.replace("neg(%x2)", "neg(%x1)").replace("reshape(%x1)", "reshape(%x2)"), "even and its odd"),
    (TWICE, PAIRS, TURNED.replace("neg(%x2)", "neg(%x1)").replace("reshape(%x1)", "reshape(%x2)"), "not halves of one vector"),
    (TWICE, EVERY_SECOND, TURNED.replace("concat(%r1, %r2)", "concat(%r2, %r1)"), None),
    (TWICE.replace("(s, 2, 1)", "(s, 1, 2)").replace("[s, 2, 1]", "[s, 1, 2]"), EVERY_SECOND, TURNED, None),
    (TWICE.replace("2, 2]", "1, 4]").replace("2, 2)", "1, 4)").replace("2, 1]", "1, 2]").replace("2, 1)", "1, 2)").replace(
        "broadcast_to(%a1) {shape=(s, 1, 4)}", "concat(%a1, %a1) {axis=2}"), EVERY_SECOND, TURNED, "another order"),
])  # fmt: skip
def test_pairs_turned_otherwise(tables: str, parts: str, turned: str, reason: str | None) -> None:
    check_untouched(FuseRope(), graph(tables, parts, turned), reason)


def test_halves_by_angles_in_pairs() -> None:
    check_untouched(FuseRope(), graph(TWICE, TURN), "%c holds its angles in another order")


def test_negated_distances_are_no_rotation_that_was_missed() -> None:
    """The bias of ALiBi: whole numbers, whatever they were reshaped from."""
    text = """graph @f(%d: i64[s, s]) {
  %u: i64[1, s, s] = reshape(%d) {shape=(1, s, s)}
  %n: i64[1, s, s] = neg(%u)
  return %n
}"""
    assert not PassManager([FuseRope()]).run(random_program(text)).remarks("missed")
