"""Rotary position embedding: every spelling, layout and part, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.ir import Program, build, parse_type
from wasat.ir.decompose import decompose
from wasat.passes import Cleanup, FuseRope, PassManager

from wasat import driver
from wasat.testing import InterpreterCheck, check_pass, check_untouched, random_program

DIMS = [{"b": 1, "s": 3}, {"b": 2, "s": 5}]

TABLES = """
  %p: i64[s, 1] = reshape(%at) {shape=(s, 1)}
  %f: f32[s, 1] = cast(%p) {dtype=f32}
  %inv: f32[2] = constant() {value=dense<f32[2], 1.0 0.1>}
  %a: f32[s, 2] = mul(%f, %inv)
  %aa: f32[s, 4] = concat(%a, %a) {axis=1}
  %t: f32[s, 1, 4] = reshape(%aa) {shape=(s, 1, 4)}
  %c: f32[s, 1, 4] = cos(%t)
  %n: f32[s, 1, 4] = sin(%t)
"""
TURN = """
  %hi: f32[b, s, 3, 2] = slice(%x) {starts=(0, 0, 0, 2), stops=(b, s, 3, 4)}
  %neg: f32[b, s, 3, 2] = neg(%hi)
  %lo: f32[b, s, 3, 2] = slice(%x) {starts=(0, 0, 0, 0), stops=(b, s, 3, 2)}
  %rot: f32[b, s, 3, 4] = concat(%neg, %lo) {axis=3}
  %m1: f32[b, s, 3, 4] = mul(%x, %c)
  %m2: f32[b, s, 3, 4] = mul(%rot, %n)
  %y: f32[b, s, 3, 4] = add(%m1, %m2)
"""


def graph(*parts: str, result: str = "%y", x: str = "f32[b, s, 3, 4]", at: str = "i64[s]") -> str:
    return f"graph @f(%x: {x}, %at: {at}) {{\n" + "\n".join(parts) + f"\nreturn {result}\n}}"


INV = "%constant: f32[2] = constant() {value=dense<f32[2], 1.0 0.1>}\n"
AFTER = graph(INV, "%y: f32[b, s, 3, 4] = rope(%x, %at, %constant)")


@pytest.mark.parametrize("swap", range(8))
def test_orders_of_operands(swap: int) -> None:
    turn = TURN
    for i, operands in enumerate(["%x, %c", "%rot, %n", "%m1, %m2"]):
        if swap >> i & 1:
            turn = turn.replace(operands, ", ".join(operands.split(", ")[::-1]))
    remarks = check_pass(FuseRope(), graph(TABLES, turn), AFTER, DIMS)
    assert [str(r).splitlines()[0] for r in remarks] == ["applied: %y = rope (@f)"]


def test_positions_of_each_row() -> None:
    tables = TABLES.replace("[s, ", "[b, s, ").replace("(s, ", "(b, s, ").replace("{axis=1}", "{axis=2}")
    want = AFTER.replace("%at: i64[s]", "%at: i64[b, s]")
    check_pass(FuseRope(), graph(tables, TURN, at="i64[b, s]"), want, DIMS)


def test_positions_made_of_others_keep_their_shape() -> None:
    row = "%q: i64[1, s] = reshape(%at) {shape=(1, s)}\n %k: i64[1, s] = add(%q, 7:i64)\n"
    tables = TABLES.replace("reshape(%at)", "reshape(%k)")
    inv = INV.replace("%constant:", "%constant_1:")
    flat = "%reshape: i64[s] = reshape(%k) {shape=(s,)}"
    want = graph(row, flat, inv, "%y: f32[b, s, 3, 4] = rope(%x, %reshape, %constant_1)")
    check_pass(FuseRope(), graph(row, tables, TURN), want, DIMS)


def test_factor_on_the_tables() -> None:
    scale = "\n%c2: f32[s, 1, 4] = mul(%c, 1.25:f32)\n %n2: f32[s, 1, 4] = mul(%n, 1.25:f32)"
    turn = TURN.replace("%x, %c", "%x, %c2").replace("%rot, %n", "%rot, %n2")
    want = AFTER.replace("%constant)", "%constant) {factor=1.25}").replace("%constant", "%constant_2")
    check_pass(FuseRope(), graph(TABLES, scale, turn), want, DIMS)


def test_heads_before_positions() -> None:
    tables = TABLES.replace("[s, 1, 4]", "[1, 1, s, 4]").replace("(s, 1, 4)", "(1, 1, s, 4)")
    turn = TURN.replace("[b, s, 3, ", "[b, 3, s, ").replace("(b, s, 3, ", "(b, 3, s, ")
    want = graph(
        INV,
        "%transpose: f32[b, s, 3, 4] = transpose(%x) {perm=(0, 2, 1, 3)}",
        "%rope: f32[b, s, 3, 4] = rope(%transpose, %at, %constant)",
        "%y: f32[b, 3, s, 4] = transpose(%rope) {perm=(0, 2, 1, 3)}",
        x="f32[b, 3, s, 4]",
    )
    check_pass(FuseRope(), graph(tables, turn, x="f32[b, 3, s, 4]"), want, DIMS)


PART = "%part: f32[b, s, 3, 4] = slice(%x) {starts=(0, 0, 0, 0), stops=(b, s, 3, 4)}\n"
REST = """
  %rest: f32[b, s, 3, 3] = slice(%x) {starts=(0, 0, 0, 4), stops=(b, s, 3, 7)}
  %z: f32[b, s, 3, 7] = concat(%y, %rest) {axis=3}
"""
REST_AT = "0, 4), stops=(b, s, 3, 7)"
WIDE = "f32[b, s, 3, 7]"
PARTIAL = PART + TURN.replace("mul(%x", "mul(%part")


@pytest.mark.parametrize("halves_of", ["%x", "%part"])
def test_part_of_each_head(halves_of: str) -> None:
    turn = PARTIAL.replace("= slice(%x) {starts=(0, 0, 0, 2)", f"= slice({halves_of}) {{starts=(0, 0, 0, 2)")
    turn = turn.replace("%lo: f32[b, s, 3, 2] = slice(%x)", f"%lo: f32[b, s, 3, 2] = slice({halves_of})")
    want = graph(INV, "%z: f32[b, s, 3, 7] = rope(%x, %at, %constant)", result="%z", x=WIDE)
    check_pass(FuseRope(), graph(TABLES, turn, REST, result="%z", x=WIDE), want, DIMS)


def test_part_of_each_head_with_heads_before_positions() -> None:
    tables = TABLES.replace("[s, 1, 4]", "[s, 4]").replace("(s, 1, 4)", "(s, 4)")
    body = (PARTIAL + REST).replace("[b, s, 3, ", "[b, 3, s, ").replace("(b, s, 3, ", "(b, 3, s, ")
    want = graph(
        INV,
        "%transpose: f32[b, s, 3, 7] = transpose(%x) {perm=(0, 2, 1, 3)}",
        "%rope: f32[b, s, 3, 7] = rope(%transpose, %at, %constant)",
        "%z: f32[b, 3, s, 7] = transpose(%rope) {perm=(0, 2, 1, 3)}",
        result="%z",
        x="f32[b, 3, s, 7]",
    )
    before = graph(tables, body, result="%z", x="f32[b, 3, s, 7]")
    check_pass(FuseRope(), before, want.replace("%transpose", "%transpose_2").replace("%rope", "%rope_1"), DIMS)


@pytest.mark.parametrize(
    "part, rest", [("0, 0), stops=(b, s, 3, 4)", "0, 3), stops=(b, s, 3, 6)"), ("0, 1), stops=(b, s, 3, 5)", REST_AT)]
)
def test_parts_that_do_not_make_up_a_head(part: str, rest: str) -> None:
    turn = PARTIAL.replace("= slice(%x) {starts=(0, 0, 0, ", "= slice(%part) {starts=(0, 0, 0, ")
    turn = turn.replace("slice(%part) {starts=(0, 0, 0, 0), stops=(b, s, 3, 4)}", f"slice(%x) {{starts=(0, 0, {part}}}", 1)
    made, after = turn.split("\n")[0], REST.replace(REST_AT, rest)
    want = graph(made, INV, "%y: f32[b, s, 3, 4] = rope(%part, %at, %constant)", after, result="%z", x=WIDE)
    check_pass(FuseRope(), graph(TABLES, turn, after, result="%z", x=WIDE), want, DIMS)


def test_part_of_a_head_turned_by_the_halves_of_another() -> None:
    turn = PARTIAL.replace("0, 0), stops=(b, s, 3, 2)", "0, 3), stops=(b, s, 3, 5)")
    turn = turn.replace("0, 2), stops=(b, s, 3, 4)", "0, 5), stops=(b, s, 3, 7)")
    check_untouched(FuseRope(), graph(TABLES, turn, x=WIDE), "%lo and %hi are not the halves of %part")


def test_tables_shared_by_q_and_k_go_when_both_are_done() -> None:
    class Two(nn.Module):
        def __call__(self, q: nn.Tensor, k: nn.Tensor) -> dict[str, nn.Tensor]:
            at = nn.positions(q)
            return {"q": nn.rope(q, at), "k": nn.rope(k, at)}

    g = nn.trace(Two(), {"q": "f32[b, s, 4, 8]", "k": "f32[b, s, 2, 8]"})["forward"]
    PassManager([Cleanup(), FuseRope(), Cleanup()], check=InterpreterCheck(DIMS)).run(Program({"forward": g}))
    assert [n.op.name for n in g.nodes] == ["iota", "constant", "rope", "rope"]


@pytest.mark.parametrize("dtype, tol", [("f32", 1e-5), ("f16", 4e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_layer_of_the_frontend(dtype: str, tol: float, fraction: float) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

    class One(nn.Module):
        def __init__(self) -> None:
            self.rope = nn.RoPE(8, scaling=yarn, fraction=fraction)

        def __call__(self, x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
            return self.rope(x, at)

    g = nn.trace(One(), {"x": f"{dtype}[b, s, 4, 8]", "at": "i64[b, s]"})["forward"]
    check = InterpreterCheck(DIMS, rtol=tol, atol=tol)
    PassManager([Cleanup(), FuseRope(), Cleanup()], check=check).run(Program({"forward": g}))
    assert [n.op.name for n in g.nodes] == ["constant", "rope"]
    assert g.last is not None
    assert g.last.attrs.factor == pytest.approx(0.1 * np.log(4) + 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype, tol", [("f32", 1e-5), ("f16", 2e-3), ("f64", 1e-9)])
@pytest.mark.parametrize("attrs", [{}, {"factor": 1.5}, {"interleaved": True}, {"interleaved": True, "factor": 0.5}])
@pytest.mark.parametrize("width", [4, 6])
def test_decompositions_are_recognized(dtype: str, tol: float, attrs: dict[str, Any], width: int) -> None:
    inputs = [("x", parse_type(f"{dtype}[b, s, 3, {width}]")), ("at", parse_type("i64[s]"))]
    freq = np.array([1.0, 0.1], np.float64 if dtype == "f64" else np.float32)
    g = build("f", inputs, lambda b, x, at: b.rope(x, at, freq, **attrs))
    decompose(g, keep=lambda node: False)
    PassManager([Cleanup(), FuseRope(), Cleanup()], check=InterpreterCheck(DIMS, rtol=tol, atol=tol)).run(Program({"f": g}))
    assert [n.op.name for n in g.nodes] == ["constant", "rope"]
    assert g.last is not None
    assert g.last.attrs == g.last.op.Attrs(**attrs)


ONE_HEAD = [(f"%{n}: f32[b, s, 3", f"%{n}: f32[b, s, 1") for n in ("rot", "m2")]


def _edit(*changes: tuple[str, str]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        return text

    return edit


NEAR: dict[str, tuple[Callable[[str], str], str]] = {
    "sine for cosine": (_edit(("%x, %c", "%x, %n")), "not cosine and sine in this order"),
    "the table of another function": (_edit(("= cos(%t)", "= tan(%t)")), "%c is tan of something"),
    "a table given from outside": (
        _edit(("= cos(%t)", "= cos(%u)"), ("%at: i64[s]", "%at: i64[s], %u: f32[s, 1, 4]")), "%u is no product"
    ),
    "cosines given from outside": (
        _edit(("%x, %c)", "%x, %u)"), ("%at: i64[s]", "%at: i64[s], %u: f32[s, 1, 4]")), "%u is no table of cosines or sines"
    ),
    "angles that differ": (
        _edit(("concat(%a, %a)", "concat(%a, %a2)"), ("%aa: ", "%a2: f32[s, 2] = neg(%a)\n %aa: ")), "does not repeat",
    ),
    "sums for products": (_edit(("%a: f32[s, 2] = mul(", "%a: f32[s, 2] = add(")), "%a is no product of positions"),
    "two sets of frequencies": (
        _edit(("= sin(%t)", "= sin(%t2)"), ("%c: ", """
  %inv2: f32[2] = constant() {value=dense<f32[2], 1.0 0.2>}
  %a2: f32[s, 2] = mul(%f, %inv2)
  %aa2: f32[s, 4] = concat(%a2, %a2) {axis=1}
  %t2: f32[s, 1, 4] = reshape(%aa2) {shape=(s, 1, 4)}
  %c: """)), "not of the same angles",
    ),
    "factor on one table": (
        _edit(("%x, %c)", "%x, %c2)"), ("%m1: ", "%c2: f32[s, 1, 4] = mul(%c, 2.0:f32)\n %m1: ")), "not of the same angles"
    ),
    "positions that are no integers": (
        _edit(("%at: i64[s]", "%at: f32[s]"), ("i64[s, 1]", "f32[s, 1]"), ("= cast(%p) {dtype=f32}", "= neg(%p)")),
        "no product of integer positions",
    ),
    "frequencies that are no constant": (
        _edit(("%inv: f32[2] = constant() {value=dense<f32[2], 1.0 0.1>}", ""), ("%at: i64[s]", "%at: i64[s], %inv: f32[2]")),
        "no product of integer positions",
    ),
    "the other half negated": (
        _edit(("starts=(0, 0, 0, 2), stops=(b, s, 3, 4)", "starts=(0, 0, 0, 9), stops=(b, s, 3, 9)"),
              ("starts=(0, 0, 0, 0), stops=(b, s, 3, 2)", "starts=(0, 0, 0, 2), stops=(b, s, 3, 4)"),
              ("starts=(0, 0, 0, 9), stops=(b, s, 3, 9)", "starts=(0, 0, 0, 0), stops=(b, s, 3, 2)")),
        "are not halves of one vector",
    ),
    "one half twice": (_edit(("0, 2), stops=(b, s, 3, 4)", "0, 0), stops=(b, s, 3, 2)")), "are not halves of one vector"),
    "the halves of the first head": (
        _edit(("3, 2] =", "1, 2] ="), ("stops=(b, s, 3", "stops=(b, s, 1"), *ONE_HEAD),
        "is not a part of the features",
    ),
    "the halves of the last head": (
        _edit(("3, 2] =", "1, 2] ="), ("starts=(0, 0, 0", "starts=(0, 0, 2"), *ONE_HEAD),
        "is not a part of the features",
    ),
    "positions that were rounded": (
        _edit(("%at: i64[s]", "%at: f16[s]"), ("i64[s, 1]", "f16[s, 1]")), "no product of integer positions"
    ),
    "tables that were rounded": (
        _edit(("%x, %c)", "%x, %c3)"), ("%m1: ", "%c2: i32[s, 1, 4] = cast(%c) {dtype=i32}\n"
              "%c3: f32[s, 1, 4] = cast(%c2) {dtype=f32}\n %m1: ")), "%c3 is cast of something, no table",
    ),
    "the halves of what x comes from": (
        _edit(("mul(%x, %c)", "mul(%w, %c)"), ("%m1: ", "%w: f32[b, s, 3, 4] = abs(%x)\n %m1: ")), "%w is not what"
    ),
    "a part of another value": (
        _edit(("mul(%x, %c)", "mul(%w, %c)"), ("%at: i64[s]", "%at: i64[s], %v: f32[b, s, 3, 7]"),
              ("%m1: ", "%w: f32[b, s, 3, 4] = slice(%v) {starts=(0, 0, 0, 0), stops=(b, s, 3, 4)}\n %m1: ")), "%w is not what",
    ),
    "two sets of positions": (
        _edit(("= sin(%t)", "= sin(%t2)"), ("%at: i64[s]", "%at: i64[s], %at2: i64[s]"), ("%c: ", """
  %p2: i64[s, 1] = reshape(%at2) {shape=(s, 1)}
  %f2: f32[s, 1] = cast(%p2) {dtype=f32}
  %a2: f32[s, 2] = mul(%f2, %inv)
  %aa2: f32[s, 4] = concat(%a2, %a2) {axis=1}
  %t2: f32[s, 1, 4] = reshape(%aa2) {shape=(s, 1, 4)}
  %c: """)), "not of the same angles",
    ),
    "every second element": (
        _edit(("{starts=(0, 0, 0, 2), stops=(b, s, 3, 4)}", "{starts=(0, 0, 0, 1), stops=(b, s, 3, 4), steps=(1, 1, 1, 2)}")),
        "is not a part of the features",
    ),
    "the halves of another value": (
        _edit(("mul(%x, %c)", "mul(%w, %c)"), ("%at: i64[s]", "%at: i64[s], %w: f32[b, s, 3, 4]")), "%w is not what"
    ),
    "the rotation used elsewhere": (_edit(("return %y", "return %y, %m2")), "%m2 is also an output"),
}  # fmt: skip


@pytest.mark.parametrize("near", NEAR)
def test_near_misses(near: str) -> None:
    edit, reason = NEAR[near]
    check_untouched(FuseRope(), edit(graph(TABLES, TURN)), reason)


def test_angles_in_half_precision() -> None:
    tables = TABLES.replace("f32", "f16")
    check_untouched(FuseRope(), graph(tables, TURN.replace("f32", "f16"), x="f16[b, s, 3, 4]"), "angles are f16")


def test_three_axes() -> None:
    turn = TURN.replace("b, s, 3, ", "s, 3, ").replace("(0, 0, 0, ", "(0, 0, ").replace("axis=3", "axis=2")
    check_untouched(FuseRope(), graph(TABLES, turn, x="f32[s, 3, 4]"), "has not the four axes")


def test_a_position_for_each_head() -> None:
    tables = TABLES.replace("[s, 1]", "[s, s, 1]").replace("(s, 1)", "(s, s, 1)").replace("[s, 2]", "[s, s, 2]")
    tables = tables.replace("%aa: f32[s, 4]", "%aa: f32[s, s, 4]").replace("axis=1", "axis=2")
    tables = tables.replace("f32[s, 1, 4]", "f32[s, s, 4]").replace("(s, 1, 4)", "(s, s, 4)")
    text = graph(tables, TURN.replace("s, 3, ", "s, s, "), x="f32[b, s, s, 4]", at="i64[s, s]")
    check_untouched(FuseRope(), text, "does not vary along one position axis")


def test_one_vector_turned_to_many_positions() -> None:
    turn = TURN.replace("[b, s, 3, ", "[b, 1, 3, ").replace("(b, s, 3, ", "(b, 1, 3, ")
    for name in ("m1", "m2", "y"):
        turn = turn.replace(f"%{name}: f32[b, 1", f"%{name}: f32[b, s")
    check_untouched(FuseRope(), graph(TABLES, turn, x="f32[b, 1, 3, 4]"), "does not vary along one position axis")


def test_one_vector_turned_to_many_positions_after_the_heads() -> None:
    turn = TURN.replace("[b, s, 3, ", "[b, 3, 1, ").replace("(b, s, 3, ", "(b, 3, 1, ")
    for name in ("m1", "m2", "y"):
        turn = turn.replace(f"%{name}: f32[b, 3, 1", f"%{name}: f32[b, 3, s")
    tables = TABLES.replace("[s, 1, 4]", "[s, 4]").replace("(s, 1, 4)", "(s, 4)")
    check_untouched(FuseRope(), graph(tables, turn, x="f32[b, 3, 1, 4]"), "does not vary along one position axis")


def test_cosines_along_one_axis_and_sines_along_another() -> None:
    tables = TABLES + "%n2: f32[1, s, 4] = reshape(%n) {shape=(1, s, 4)}\n"
    turn = TURN.replace("%rot, %n", "%rot, %n2").replace("s, 3, ", "s, s, ")
    check_untouched(FuseRope(), graph(tables, turn, x="f32[b, s, s, 4]"), "not of the same angles")


def test_a_position_for_each_frequency() -> None:
    tables = TABLES.replace("[s, 1, 4]", "[4]").replace("(s, 1, 4)", "(4,)").replace("axis=1", "axis=0")
    tables = tables.replace("[s, 1]", "[2]").replace("(s, 1)", "(2,)").replace("[s, 2]", "[2]").replace("[s, 4]", "[4]")
    turn = TURN.replace("b, s, 3", "b, 1, 3")
    text = graph(tables, turn, x="f32[b, 1, 3, 4]", at="i64[2]")
    check_untouched(FuseRope(), text, "no product of integer positions [.., 1]")


def test_angles_along_the_heads() -> None:
    tables = TABLES.replace("[s, ", "[1, ").replace("(s, ", "(1, ")
    tables = tables.replace("[1, 1, 4]", "[1, 4, 1]").replace("(1, 1, 4)", "(1, 4, 1)")
    turn = TURN.replace("[b, s, 3, ", "[b, 3, 4, ").replace("(b, s, 3, ", "(b, 3, 4, ")
    check_untouched(FuseRope(), graph(tables, turn, x="f32[b, 3, 4, 4]", at="i64[1]"), "is not 4 angles")


def test_tables_may_be_shaped_last() -> None:
    shaped = "".join(f"%{k}2: f32[1, s, 1, 4] = reshape(%{k}) {{shape=(1, s, 1, 4)}}\n" for k in "cn")
    turn = TURN.replace("%x, %c", "%x, %c2").replace("%rot, %n", "%rot, %n2")
    check_pass(FuseRope(), graph(TABLES, shaped, turn), AFTER, DIMS)


def product(n: str) -> str:
    """x1, x2 turned apart."""
    return """
  %p1: f32[b, s, 3, 2] = mul(%x1, %c)
  %p2: f32[b, s, 3, 2] = mul(%x2, %n)
  %y1: f32[b, s, 3, 2] = sub(%p1, %p2)
  %p3: f32[b, s, 3, 2] = mul(%x2, %c)
  %p4: f32[b, s, 3, 2] = mul(%x1, %n)
  %y2: f32[b, s, 3, 2] = add(%p3, %p4)
""".replace("3, 2]", n)


HALF_TABLES = TABLES.replace("  %aa: f32[s, 4] = concat(%a, %a) {axis=1}\n", "").replace("%aa", "%a").replace("1, 4", "1, 2")


def test_angles_repeated_inside_a_half() -> None:
    halves = """
  %x1: f32[b, s, 3, 4] = slice(%x) {starts=(0, 0, 0, 0), stops=(b, s, 3, 4)}
  %x2: f32[b, s, 3, 4] = slice(%x) {starts=(0, 0, 0, 4), stops=(b, s, 3, 8)}
""" + product("3, 4]") + "%y: f32[b, s, 3, 8] = concat(%y1, %y2) {axis=3}"  # fmt: skip
    inv = INV.replace("f32[2]", "f32[4]").replace("1.0 0.1", "1.0 0.1 1.0 0.1")
    want = graph(inv, "%y: f32[b, s, 3, 8] = rope(%x, %at, %constant)", x="f32[b, s, 3, 8]")
    check_pass(FuseRope(), graph(TABLES, halves, x="f32[b, s, 3, 8]"), want, DIMS)


@pytest.mark.parametrize("at, rest", [(2, 0), (2, 4), (0, 3)])
def test_halves_and_rest_in_another_place(at: int, rest: int) -> None:
    body = f"""
  %x1: f32[b, s, 3, 2] = slice(%x) {{starts=(0, 0, 0, {at}), stops=(b, s, 3, {at + 2})}}
  %x2: f32[b, s, 3, 2] = slice(%x) {{starts=(0, 0, 0, {at + 2}), stops=(b, s, 3, {at + 4})}}
  %rest: f32[b, s, 3, 2] = slice(%x) {{starts=(0, 0, 0, {rest}), stops=(b, s, 3, {rest + 2})}}
{product("3, 2]")}
  %y: f32[b, s, 3, 6] = concat(%y1, %y2, %rest) {{axis=3}}"""
    text = graph(HALF_TABLES, body, x="f32[b, s, 3, 6]")
    if (at, rest) == (2, 0):  # all features are there, in another order
        program = random_program(text)
        PassManager([FuseRope()], check=InterpreterCheck(DIMS)).run(program)
        assert (program["f"].count("rope"), program["f"].count("gather")) == (1, 1)
    else:
        check_untouched(FuseRope(), text, "the parts do not make up the features of %x")


@pytest.mark.parametrize("x, wide", [("f16", "f64"), ("f64", "f32")])
def test_casts_that_do_something_stay(x: str, wide: str) -> None:
    body = f"""%inv: {wide}[2] = constant() {{value=dense<{wide}[2], 1.0 0.1>}}
  %w: {wide}[b, s, 3, 4] = cast(%x) {{dtype={wide}}}
  %r: {wide}[b, s, 3, 4] = rope(%w, %at, %inv)
  %y: {x}[b, s, 3, 4] = cast(%r) {{dtype={x}}}"""
    check_untouched(FuseRope(), graph(body, x=f"{x}[b, s, 3, 4]"))


def test_a_batch_of_positions_for_one_row() -> None:
    tables = TABLES.replace("[s, ", "[b, s, ").replace("(s, ", "(b, s, ").replace("{axis=1}", "{axis=2}")
    turn = TURN.replace("%hi: f32[b", "%hi: f32[1").replace("%neg: f32[b", "%neg: f32[1").replace("%lo: f32[b", "%lo: f32[1")
    turn = turn.replace("%rot: f32[b", "%rot: f32[1").replace("stops=(b", "stops=(1")
    text = graph(tables, turn, x="f32[1, s, 3, 4]", at="i64[b, s]")
    check_untouched(FuseRope(), text, "does not vary along one position axis")


PARAM_TABLES = TABLES.replace("  %inv: f32[2] = constant() {value=dense<f32[2], 1.0 0.1>}\n", "").replace("%inv", "%freq")


def with_params(text: str) -> str:
    return text.replace("{\n", "{\n  param %freq: f32[2]\n  param %other: f32[2]\n", 1)


def test_frequencies_that_are_a_parameter() -> None:
    """As they come with a checkpoint's buffers."""
    program = random_program(with_params(graph(PARAM_TABLES, TURN)))
    PassManager([FuseRope(), Cleanup()], check=InterpreterCheck(DIMS)).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "rope")
    assert node.inputs[2].param == "freq"


def test_cosines_and_sines_of_two_parameters() -> None:
    tables = PARAM_TABLES.replace(
        "%n: f32[s, 1, 4] = sin(%t)",
        "%a2: f32[s, 2] = mul(%f, %other)\n  %aa2: f32[s, 4] = concat(%a2, %a2) {axis=1}\n"
        "  %t2: f32[s, 1, 4] = reshape(%aa2) {shape=(s, 1, 4)}\n  %n: f32[s, 1, 4] = sin(%t2)",
    )
    check_untouched(FuseRope(), with_params(graph(tables, TURN)), "are not of the same angles")


def test_frequencies_that_are_computed_from_inputs() -> None:
    text = graph(PARAM_TABLES, TURN).replace("%at: i64[s]", "%at: i64[s], %freq: f32[2]")
    check_untouched(FuseRope(), text, "no product of integer positions [.., 1]")


# -- positions that are numbers ----------------------------------------------------------------------------------------------
class Turned(nn.Module):
    """A grid of known size, whose positions clean-up could fold into a table of cosines."""

    def __init__(self) -> None:
        self.rope = nn.RoPE2D(8, width=3)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return self.rope(x, nn.positions(x))


def turned() -> Program:
    return nn.trace(Turned(), {"x": "f32[b, 6, 2, 8]"})


def test_both_axes_of_a_grid() -> None:
    program, want = turned(), turned()
    report = PassManager([Cleanup(fold_positions=False), FuseRope(), Cleanup()], check=InterpreterCheck(DIMS)).run(program)
    nodes = list(program["forward"].nodes)
    ropes = [n for n in nodes if n.op.name == "rope"]
    assert [n.inputs[1].const.tolist() for n in ropes if n.inputs[1].const is not None] == [[0, 0, 0, 1, 1, 1], [0, 1, 2] * 2]
    assert {n.op.name for n in nodes} == {"constant", "slice", "rope", "concat"}
    assert not report.remarks("missed")
    x = np.random.default_rng(0).standard_normal((2, 6, 2, 8)).astype(np.float32)
    got, expected = (*driver.run(program, x=x).values(), *driver.run(want, x=x).values())
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_a_folded_table_is_no_table() -> None:
    program = turned()
    report = PassManager([Cleanup(), FuseRope()]).run(program)
    assert "is constant of something, no table of cosines" in str(report.remarks("missed")[0])
    assert all(n.op.name != "rope" for n in program["forward"].nodes)


@pytest.mark.parametrize("lines", [
    "%u: f32[b, s, 3, 4] = sub(%x, 0.5:f32)\n %d: f32[b, s, 3, 4] = div(%u, 0.5:f32)\n"
    "%y: f32[b, s, 12] = reshape(%d) {shape=(b, s, 12)}",
    "%n: i64[s] = neg(%at)\n %m: i64[s] = mod(%n, 7:i64)\n %y: i64[s] = add(%m, %at)",
])  # fmt: skip
def test_what_only_subtracts_or_negates_is_not_reported(lines: str) -> None:
    program = random_program(graph(lines))
    assert not PassManager([FuseRope()]).run(program).remarks("missed")
