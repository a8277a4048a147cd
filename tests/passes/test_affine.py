"""Index arithmetic in closed form: every rule, every near miss; gathers at indices that are simpler than they look."""

from __future__ import annotations

import pytest
from wasat.ir import parse, symbol
from wasat.passes import SimplifyIndices
from wasat.passes.analyses.indexing import Indexing

from wasat.testing import check_pass, check_untouched

I = "  %i: i64[s] = iota() {size=s}\n"
ROWS = I + "  %r: i64[b, s] = broadcast_to(%i) {shape=(b, s)}\n"
FLAT = (
    ROWS
    + """  %f: i64[b*s] = reshape(%r) {shape=(b*s,)}
  %n: i64[b] = iota() {size=b}
  %c: i64[b, 1] = reshape(%n) {shape=(b, 1)}
  %z: i64[] = dim_size() {size=s}
"""
)
TESTS = I + "  %t: bool[s] = less(%i, 0:i64)\n  %u: bool[s] = less(%i, 1:i64)\n"
# sizes are at least 1, written in symbols that start at 0: s is s + 1
CASES: dict[str, tuple[str, str, str | None]] = {
    "counting": (I, "s", "1"),
    "moved": (I + "  %y: i64[1, s, 1] = reshape(%i) {shape=(1, s, 1)}\n", "s", "0 1 0"),
    "size": ("  %y: i64[] = dim_size() {size=s}\n", "s", "+ s + 1"),
    "negated": (I + "  %y: i64[s] = neg(%i)\n", "s", "-1"),
    "scaled": (I + "  %y: i64[s] = mul(%i, 3:i64)\n", "s", "3"),
    "squared": (I + "  %y: i64[s] = mul(%i, %i)\n", "s", None),
    "greater than less": (I + "  %y: i64[s] = maximum(%i, -1:i64)\n", "s", "1"),
    "less than greater": (I + "  %y: i64[s] = minimum(%i, -1:i64)\n", "s", "0 + -1"),
    "never less": (I + "  %y: i64[s] = maximum(%i, 0:i64)\n", "s", "1"),
    "never greater": (I + "  %y: i64[s] = minimum(%i, 0:i64)\n", "s", "0 + 0"),
    "always less": (I + "  %n: i64[s] = neg(%i)\n  %y: i64[s] = maximum(%n, 0:i64)\n", "s", "0 + 0"),
    "always the lesser": (I + "  %n: i64[s] = neg(%i)\n  %y: i64[s] = minimum(%n, 0:i64)\n", "s", "-1"),
    "kinked from below": (I + "  %n: i64[s] = neg(%i)\n  %y: i64[s] = maximum(%n, -1:i64)\n", "s", None),
    "kinked": (I + "  %y: i64[s] = maximum(%i, 1:i64)\n", "s", None),
    "as a float": (I + "  %y: f32[s] = cast(%i) {dtype=f32}\n", "s", "1"),
    "as a narrow integer": (I + "  %y: i8[s] = cast(%i) {dtype=i8}\n", "s", None),
    "below 0 in an unsigned type": (
        "  %i: u32[4] = iota() {size=4, dtype=u32}\n  %y: u32[4] = sub(%i, 1:u32)\n", "s", None,
    ),
    "too far for 8 bits": ("  %i: i8[4] = iota() {size=4, dtype=i8}\n  %y: i8[4] = add(%i, 125:i8)\n", "s", None),
    "up to the end of 8 bits": ("  %i: i8[4] = iota() {size=4, dtype=i8}\n  %y: i8[4] = add(%i, 124:i8)\n", "s", "1 + 124"),
    "of 8 bits, however many": ("  %y: u8[s] = iota() {size=s, dtype=u8}\n", "s", None),
    "unsigned, however many": ("  %y: u32[s] = iota() {size=s, dtype=u32}\n", "s", "1"),
    "beyond 32 bits": ("  %i: i32[4] = iota() {size=4, dtype=i32}\n  %y: i32[4] = mul(%i, 2147483647:i32)\n", "s", None),
    "beyond the digits of f16": (
        "  %i: f16[4] = iota() {size=4, dtype=f16}\n  %y: f16[4] = add(%i, 2046.0:f16)\n", "s", None,
    ),
    "one, repeated by broadcasting": (
        "  %i: i64[1] = iota() {size=1}\n  %o: i64[s] = broadcast_to(0:i64) {shape=(s,)}\n  %y: i64[s] = add(%i, %o)\n",
        "s", "0 + 0",
    ),
    "never below 0": (I + "  %y: bool[s] = less(%i, 0:i64)\n", "s", "0 + 0"),
    "sometimes below 1": (I + "  %y: bool[s] = less(%i, 1:i64)\n", "s", None),
    "always equal": (I + "  %y: bool[s] = equal(%i, %i)\n", "s", "0 + 1"),
    "always different": (I + "  %y: bool[s] = not_equal(%i, -1:i64)\n", "s", "0 + 1"),
    "not": (I + "  %t: bool[s] = less(%i, 0:i64)\n  %y: bool[s] = logical_not(%t)\n", "s", "0 + 1"),
    "and something unknown": (TESTS + "  %y: bool[s] = logical_and(%u, %t)\n", "s", "0 + 0"),
    "or something unknown": (TESTS + "  %y: bool[s] = logical_or(%u, %t)\n", "s", None),
    "decided choice": (I + "  %t: bool[s] = less(%i, 0:i64)\n  %y: i64[s] = select(%t, 7:i64, %i)\n", "s", "1"),
    "open choice": (I + "  %t: bool[s] = less(%i, 1:i64)\n  %y: i64[s] = select(%t, 7:i64, %i)\n", "s", None),
    "part": (I + "  %y: i64[s - 2] = slice(%i) {starts=(2,), stops=(s,)}\n", "s", "1 + 2"),
    "part of multiples": (
        I + "  %m: i64[s] = mul(%i, 3:i64)\n  %y: i64[s - 2] = slice(%m) {starts=(2,), stops=(s,)}\n", "s", "3 + 6",
    ),
    "last of all": (I + "  %y: i64[1] = slice(%i) {starts=(s - 1,), stops=(s,)}\n", "s", "0 + s"),
    "every other": (
        "  %i: i64[8] = iota() {size=8}\n  %y: i64[4] = slice(%i) {starts=(1,), stops=(8,), steps=(2,)}\n", "s", "2 + 1",
    ),
    "parts that continue each other": (
        I + "  %p: i64[2] = constant() {value=dense<i64[2], -2 -1>}\n  %y: i64[s + 2] = concat(%p, %i) {axis=0}\n",
        "s", "1 + -2",
    ),
    "one before": (
        I + "  %p: i64[1] = constant() {value=dense<i64[1], -1>}\n  %y: i64[s + 1] = concat(%p, %i) {axis=0}\n", "s", "1 + -1",
    ),
    "parts with a jump": (
        I + "  %p: i64[1] = constant() {value=dense<i64[1], 5>}\n  %y: i64[s + 1] = concat(%p, %i) {axis=0}\n", "s", None,
    ),
    "a table of multiples": ("  %y: i64[2, 3] = constant() {value=dense<i64[2, 3], 1 3 5 2 4 6>}\n", "s", "1 2 + 1"),
    "a table of squares": ("  %y: i64[3] = constant() {value=dense<i64[3], 0 1 4>}\n", "s", None),
    "sum of nothing": (I + "  %o: i64[s] = sub(%i, %i)\n  %y: i64[s] = cumsum(%o) {axis=0}\n", "s", "0 + 0"),
    "sum of something": (I + "  %y: i64[s] = cumsum(%i) {axis=0}\n", "s", None),
    "rows merged": (ROWS + "  %y: i64[b*s] = reshape(%r) {shape=(b*s,)}\n", "bs", None),
    "rows of another length": (
        I + "  %c: i64[s, 1] = reshape(%i) {shape=(s, 1)}\n  %r: i64[s, b] = broadcast_to(%c) {shape=(s, b)}\n"
        "  %y: i64[b, s] = reshape(%r) {shape=(b, s)}\n", "bs", None,
    ),
    "nothing, in another shape": ("  %i: i64[0] = iota() {size=0}\n  %y: i64[0, 5] = reshape(%i) {shape=(0, 5)}\n", "s", None),
    "picked by position": (I + "  %y: i64[s] = gather(%i, %i) {axis=0}\n", "s", "1"),
    "picked from the end": (I + "  %j: i64[s] = sub(%i, 1:i64)\n  %y: i64[s] = gather(%i, %j) {axis=0}\n", "s", None),
    "picked from merged rows": (
        FLAT + "  %m: i64[b, 1] = mul(%c, %z)\n  %j: i64[b, s] = add(%m, %i)\n"
        "  %y: i64[b, s] = gather(%f, %j) {axis=0}\n", "bs", "0 1",
    ),
    "picked across merged rows": (
        FLAT + "  %m: i64[b, 1] = mul(%c, %z)\n  %k: i64[s] = mul(%i, 2:i64)\n  %j: i64[b, s] = add(%m, %k)\n"
        "  %y: i64[b, s] = gather(%f, %j) {axis=0}\n", "bs", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("body, nonempty, want", CASES.values(), ids=CASES)
def test_rules(body: str, nonempty: str, want: str | None) -> None:
    last = body.rstrip().splitlines()[-1].split(":")[0].strip()
    g = parse(f"graph @f(%x: i64[b, s]) {{\n{body}  return {last}\n}}")
    found = Indexing([symbol(n) for n in nonempty]).of(g.outputs[0])
    if want is None:
        assert found is None
        return
    terms, _, const = want.partition("+ ")
    assert found is not None
    assert (" ".join(map(str, found.terms)), str(found.const)) == (terms.strip(), const or "0")


def test_a_size_that_may_be_zero() -> None:
    """min(1, s) is 1 only where nothing is computed for s = 0."""
    g = parse("""graph @f(%x: f32[s]) {
  %n: i64[] = dim_size() {size=min(1, s)}
  %y: bool[] = equal(%n, 1:i64)
  return %y
}""")
    found = Indexing(g.inputs[0].shape).of(g.outputs[0])
    assert found is not None
    assert found.number == 1
    assert Indexing([]).of(g.outputs[0]) is None


BEFORE = """graph @f(%table: f32[4, 5], %tokens: i64[b, s]) {
  %i: i64[s] = iota() {size=s}
  %one: i64[s] = add(%i, 1:i64)
  %low: bool[s] = less(%one, 0:i64)
  %far: i64[s] = add(%one, 4:i64)
  %at: i64[s] = select(%low, %far, %one)
  %rows: i64[b, s] = broadcast_to(%at) {shape=(b, s)}
  %y: f32[b, s, 5] = gather(%table, %rows)
  return %y
}"""
AFTER = """graph @f(%table: f32[4, 5], %tokens: i64[b, s]) {
  %iota: i64[s] = iota() {size=s}
  %add: i64[s] = add(%iota, 1:i64)
  %gather: f32[s, 5] = gather(%table, %add)
  %reshape: f32[1, s, 5] = reshape(%gather) {shape=(1, s, 5)}
  %y: f32[b, s, 5] = broadcast_to(%reshape) {shape=(b, s, 5)}
  return %y
}"""


COUNTED = """graph @f(%tokens: i64[b, s]) {
  %one: i64[b, s] = broadcast_to(2:i64) {shape=(b, s)}
  %y: i64[b, s] = cumsum(%one) {axis=1}
  return %y
}"""
COUNTS = """graph @f(%tokens: i64[b, s]) {
  %iota: i64[s] = iota() {size=s}
  %mul: i64[s] = mul(%iota, 2:i64)
  %add: i64[s] = add(%mul, 2:i64)
  %reshape: i64[1, s] = reshape(%add) {shape=(1, s)}
  %y: i64[b, s] = broadcast_to(%reshape) {shape=(b, s)}
  return %y
}"""


def test_sums_of_ones_are_positions() -> None:
    check_pass(SimplifyIndices(), COUNTED, COUNTS, dims=[{"b": 2, "s": 3}, {"b": 1, "s": 1}])
    check_untouched(SimplifyIndices(), COUNTED.replace("cumsum(%one)", "cumsum(%tokens)"))
    ends = COUNTED.replace("{axis=1}", "{axis=1, reverse=true}")  # s tokens: their number is no position's
    check_untouched(SimplifyIndices(), ends)


def test_what_is_picked_of_ones_is_one() -> None:
    before = """graph @f(%tokens: i64[b, s]) {
  %one: bool[b, s] = broadcast_to(true:bool) {shape=(b, s)}
  %flat: bool[b*s] = reshape(%one) {shape=(b*s,)}
  %at: i64[s] = iota() {size=s}
  %row: i64[b] = iota() {size=b}
  %size: i64[] = dim_size() {size=s}
  %first: i64[b] = mul(%row, %size)
  %lines: i64[b, 1] = reshape(%first) {shape=(b, 1)}
  %index: i64[b, s] = add(%lines, %at)
  %y: bool[b, s] = gather(%flat, %index)
  return %y
}"""
    after = """graph @f(%tokens: i64[b, s]) {
  %y: bool[b, s] = broadcast_to(true:bool) {shape=(b, s)}
  return %y
}"""
    check_pass(SimplifyIndices(), before, after, dims=[{"b": 2, "s": 3}, {"b": 1, "s": 1}])


@pytest.mark.parametrize("op", ["gather", "embedding", "quantized_embedding"])
def test_repeated_positions(op: str) -> None:
    def text(graph: str) -> str:
        graph = graph.replace("gather", op)
        return graph.replace("f32[4, 5]", "int8b4f16[4, 5]") if op == "quantized_embedding" else graph

    check_pass(SimplifyIndices(), text(BEFORE), text(AFTER), dims=[{"b": 2, "s": 3}, {"b": 1, "s": 1}])


@pytest.mark.parametrize(
    "edits",
    [
        [("add(%i, 1:i64)", "sub(%i, 1:i64)"), ("broadcast_to(%at)", "broadcast_to(%one)")],  # the first counts from the end
        [("add(%i, 1:i64)", "mul(%i, 2:i64)")],
        [("broadcast_to(%at) {shape=(b, s)}", "add(%tokens, %at)")],
    ],
)
def test_other_indices_stay(edits: list[tuple[str, str]]) -> None:
    text = BEFORE
    for old, new in edits:
        text = text.replace(old, new)
    check_untouched(SimplifyIndices(), text)


LAST = """graph @f(%x: f32[b, s, 4]) {
  %n: i64[] = dim_size() {size=s}
  %i: i64[] = sub(%n, 1:i64)
  %a: f32[b, 4] = gather(%x, %i) {axis=1}
  %b: f32[b, 4] = gather(%x, -1:i64) {axis=1}
  return %a, %b
}"""
LAST_SLICED = """graph @f(%x: f32[b, s, 4]) {
  %slice: f32[b, 1, 4] = slice(%x) {starts=(0, s - 1, 0), stops=(b, s, 4)}
  %a: f32[b, 4] = reshape(%slice) {shape=(b, 4)}
  %slice_1: f32[b, 1, 4] = slice(%x) {starts=(0, s - 1, 0), stops=(b, s, 4)}
  %b: f32[b, 4] = reshape(%slice_1) {shape=(b, 4)}
  return %a, %b
}"""


def test_the_last_element() -> None:
    check_pass(SimplifyIndices(), LAST, LAST_SLICED, dims=[{"b": 2, "s": 3}, {"b": 1, "s": 1}])
    for near in (LAST.replace("%n, 1:i64", "%n, 2:i64").replace("-1:i64", "-2:i64"), LAST.replace("b, s, 4", "b, 7, 4")):
        check_untouched(SimplifyIndices(), near.replace("size=s}", "size=b}") if "7" in near else near)


REPEATED = """graph @f(%x: f32[h, 4], %d: i64[s, s], %t: f32[6, 4]) {
  %e: i64[s, s] = maximum(%d, 0:i64)
  %i: i64[s, s] = minimum(%e, 3:i64)
  %r: f32[h, 1, 4] = reshape(%x) {shape=(h, 1, 4)}
  %w: f32[h, s, 4] = broadcast_to(%r) {shape=(h, s, 4)}
  %j: i64[h, s, s] = broadcast_to(%i) {shape=(h, s, s)}
  %a: f32[h, s, s] = take_along(%w, %j) {axis=2}
  %f: i64[s*s] = reshape(%i) {shape=(s*s,)}
  %g: f32[s*s, 4] = gather(%t, %f)
  return %a, %g
}"""
UNREPEATED = """graph @f(%x: f32[h, 4], %d: i64[s, s], %t: f32[6, 4]) {
  %e: i64[s, s] = maximum(%d, 0:i64)
  %i: i64[s, s] = minimum(%e, 3:i64)
  %r: f32[h, 1, 4] = reshape(%x) {shape=(h, 1, 4)}
  %reshape: f32[h, 1, 4] = reshape(%r) {shape=(h, 1, 4)}
  %reshape_1: i64[1, s, s] = reshape(%i) {shape=(1, s, s)}
  %a: f32[h, s, s] = take_along(%reshape, %reshape_1) {axis=2}
  %gather: f32[s, s, 4] = gather(%t, %i)
  %g: f32[s*s, 4] = reshape(%gather) {shape=(s*s, 4)}
  return %a, %g
}"""


def test_what_is_repeated_and_flattened_for_a_lookup() -> None:
    check_pass(SimplifyIndices(), REPEATED, UNREPEATED, dims=[{"h": 2, "s": 3}, {"h": 1, "s": 1}])


NEAR_REPEATED = {
    "along the axis itself": """graph @f(%x: f32[h, 4], %d: i64[h, 1]) {
  %j: i64[h, 5] = broadcast_to(%d) {shape=(h, 5)}
  %a: f32[h, 5] = take_along(%x, %j) {axis=1}
  return %a
}""",
    "where the other has one": """graph @f(%x: f32[1, 4], %d: i64[1, s]) {
  %j: i64[h, s] = broadcast_to(%d) {shape=(h, s)}
  %a: f32[h, s] = take_along(%x, %j) {axis=1}
  return %a
}""",
    "sizes that are known": """graph @f(%t: f32[6, 4], %i: i64[s, 2]) {
  %f: i64[2*s] = reshape(%i) {shape=(2*s,)}
  %g: f32[2*s, 4] = gather(%t, %f)
  return %g
}""",
}


@pytest.mark.parametrize("text", NEAR_REPEATED.values(), ids=NEAR_REPEATED)
def test_lookups_that_stay(text: str) -> None:
    check_untouched(SimplifyIndices(), text)
