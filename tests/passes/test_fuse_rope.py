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

from wasat.testing import InterpreterCheck, check_pass, check_untouched

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


def test_part_of_each_head_where_the_rest_is_more_or_less() -> None:
    rest = REST.replace("0, 4), s", "0, 3), s").replace("3] = slice", "4] = slice").replace("7] = concat", "8] = concat")
    want = graph(PART, INV, "%y: f32[b, s, 3, 4] = rope(%part, %at, %constant)", rest, result="%z", x=WIDE)
    check_pass(FuseRope(), graph(TABLES, PARTIAL, rest, result="%z", x=WIDE), want, DIMS)


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


@pytest.mark.parametrize("dtype, tol", [("f32", 1e-5), ("f16", 2e-3)])
@pytest.mark.parametrize("attrs", [{}, {"factor": 1.5}, {"interleaved": True}, {"interleaved": True, "factor": 0.5}])
@pytest.mark.parametrize("width", [4, 6])
def test_decompositions_are_recognized(dtype: str, tol: float, attrs: dict[str, Any], width: int) -> None:
    inputs = [("x", parse_type(f"{dtype}[b, s, 3, {width}]")), ("at", parse_type("i64[s]"))]
    freq = np.array([1.0, 0.1], np.float32)
    g = build("f", inputs, lambda b, x, at: b.rope(x, at, freq, **attrs))
    decompose(g, keep=lambda node: False)
    PassManager([Cleanup(), FuseRope(), Cleanup()], check=InterpreterCheck(DIMS, rtol=tol, atol=tol)).run(Program({"f": g}))
    assert [n.op.name for n in g.nodes] == ["constant", "rope"]
    assert g.last is not None
    assert g.last.attrs == g.last.op.Attrs(**attrs)


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
        _edit(("concat(%a, %a)", "concat(%a, %a2)"), ("%aa: ", "%a2: f32[s, 2] = neg(%a)\n %aa: ")), "the same angles twice"
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


def test_a_table_along_both_axes() -> None:
    tables = TABLES
    for wide, table in (("%cw", "%c"), ("%nw", "%n")):
        tables += f"{wide}: f32[s, s, 4] = broadcast_to({table}) {{shape=(s, s, 4)}}\n"
    turn = TURN.replace("%x, %c", "%x, %cw").replace("%rot, %n", "%rot, %nw").replace("s, 3, ", "s, s, ")
    check_untouched(FuseRope(), graph(tables, turn, x="f32[b, s, s, 4]"), "%cw is broadcast_to of something")


def test_a_batch_of_positions_for_one_row() -> None:
    tables = TABLES.replace("[s, ", "[b, s, ").replace("(s, ", "(b, s, ").replace("{axis=1}", "{axis=2}")
    turn = TURN.replace("%hi: f32[b", "%hi: f32[1").replace("%neg: f32[b", "%neg: f32[1").replace("%lo: f32[b", "%lo: f32[1")
    turn = turn.replace("%rot: f32[b", "%rot: f32[1").replace("stops=(b", "stops=(1")
    text = graph(tables, turn, x="f32[1, s, 3, 4]", at="i64[b, s]")
    check_untouched(FuseRope(), text, "does not vary along one position axis")
