"""What attention fusion makes of masks: predicates of positions become attributes, what they do not say stays an operand."""

from __future__ import annotations

import numpy as np
import pytest
from attention_zoo import BEFORE, DIMS
from wasat.ir import evaluate, parse
from wasat.passes import Cleanup, FuseAttention, PassManager

from wasat.testing import InterpreterCheck, check_untouched, feed, random_program

POSITIONS = """graph @f(%q: f32[b, s, 1, 8], %k: f32[b, s, 1, 8], %v: f32[b, s, 1, 8]) {
  %q1: f32[b, 1, s, 8] = transpose(%q) {perm=(0, 2, 1, 3)}
  %k1: f32[b, 1, 8, s] = transpose(%k) {perm=(0, 2, 3, 1)}
  %v1: f32[b, 1, s, 8] = transpose(%v) {perm=(0, 2, 1, 3)}
  %scores: f32[b, 1, s, s] = matmul(%q1, %k1)
  %at: i64[s] = iota() {size=s}
  %row: i64[s, 1] = reshape(%at) {shape=(s, 1)}
  %keep: bool[s, s] = MASK
  %masked: f32[b, 1, s, s] = select(%keep, %scores, FILL)
  %probs: f32[b, 1, s, s] = softmax(%masked) {axis=3}
  %out: f32[b, 1, s, 8] = matmul(%probs, %v1)
  return %out
}
"""
MASKS = {
    "key <= query": ("less_equal(%at, %row)", True, None, False),
    "query >= key": ("greater_equal(%row, %at)", True, None, False),
    "key < query + 1": ("less(%at, %next)\n  %next: i64[s, 1] = add(%row, 1:i64)", True, None, False),
    "key - query < 1": ("less(%d, 1:i64)\n  %d: i64[s, s] = sub(%at, %row)", True, None, False),
    "query - key < 3": ("less(%d, 3:i64)\n  %d: i64[s, s] = sub(%row, %at)", False, 3, False),
    "key > query - 3": ("greater(%at, %d)\n  %d: i64[s, 1] = sub(%row, 3:i64)", False, 3, False),
    "key < query": ("less(%at, %row)", True, None, True),
    "key <= query + 1": ("less_equal(%at, %d)\n  %d: i64[s, 1] = add(%row, 1:i64)", False, None, True),
    "key >= query": ("greater_equal(%at, %row)", False, 1, False),
    "key == query": ("equal(%at, %row)", True, 1, False),
    "2 * key <= query": ("less_equal(%d, %row)\n  %d: i64[s] = add(%at, %at)", True, None, True),
    "not later": ("logical_not(%l)\n  %l: bool[s, s] = greater(%at, %row)", True, None, False),
}


def positions(mask: str, fill: str = "-inf:f32") -> str:
    lines = mask.split("\n")
    text = POSITIONS.replace("  %keep", "\n".join([*lines[1:], "  %keep"])).replace("MASK", lines[0])
    return text.replace("FILL", fill)


@pytest.mark.parametrize("mask, causal, window, operand", MASKS.values(), ids=MASKS)
def test_masks_are_understood(mask: str, causal: bool, window: int | None, operand: bool) -> None:
    """Predicates over positions become attributes; a mask that says more than they do stays an operand."""
    program = random_program(positions(mask))
    dims = [{"b": 1, "s": 1}, {"b": 1, "s": 6}] if mask != "less(%at, %row)" else []  # there the first query sees nothing: NaN
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck(dims)).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    attrs = node.attrs
    assert (attrs.causal, attrs.window, len(node.inputs) == 4) == (causal, window, operand)  # type: ignore[attr-defined]


def test_finite_fill_is_minus_infinity_only_where_every_query_sees_something() -> None:
    report = PassManager([FuseAttention()]).run(program := random_program(positions(MASKS["key <= query"][0], "-1e30:f32")))
    assert program["f"].count("attention") == 1
    assert not report.remarks("missed")
    report = PassManager([FuseAttention()]).run(program := random_program(positions(MASKS["key < query"][0], "-1e30:f32")))
    assert program["f"].count("attention") == 0
    assert "some query may see nothing" in report.remarks("missed")[0].message


@pytest.mark.parametrize("keys, fused", [(8, True), (6, True), (5, False)])
def test_a_finite_fill_needs_a_key_for_each_query(keys: int, fused: bool) -> None:
    """Counted from the end, the first of six queries sees none of five keys: the mean of the values under a finite number."""
    text = f"""graph @f(%q: f32[b, 1, 6, 8], %k: f32[b, 1, 8, {keys}], %v: f32[b, 1, {keys}, 8]) {{
  %scores: f32[b, 1, 6, {keys}] = matmul(%q, %k)
  %at: i64[6] = iota() {{size=6}}
  %row: i64[6, 1] = reshape(%at) {{shape=(6, 1)}}
  %key: i64[{keys}] = iota() {{size={keys}}}
  %late: i64[6, 1] = add(%row, {keys - 6}:i64)
  %keep: bool[6, {keys}] = less_equal(%key, %late)
  %masked: f32[b, 1, 6, {keys}] = select(%keep, %scores, -1e30:f32)
  %probs: f32[b, 1, 6, {keys}] = softmax(%masked) {{axis=3}}
  %out: f32[b, 1, 6, 8] = matmul(%probs, %v)
  return %out
}}"""
    program = random_program(text)
    PassManager([FuseAttention()], check=InterpreterCheck([{"b": 2}])).run(program)
    assert program["f"].count("attention") == fused


def test_rectangular_causal_counts_from_the_end() -> None:
    """With more keys than queries, only the comparison shifted by t - s is causal."""
    text = (
        positions("less_equal(%at, %row)").replace("%k: f32[b, s,", "%k: f32[b, t,").replace("%v: f32[b, s,", "%v: f32[b, t,")
        .replace("f32[b, 1, 8, s]", "f32[b, 1, 8, t]").replace("%v1: f32[b, 1, s,", "%v1: f32[b, 1, t,")
        .replace("f32[b, 1, s, s]", "f32[b, 1, s, t]").replace("bool[s, s]", "bool[s, t]")
        .replace("  %keep", "  %key: i64[t] = iota() {size=t}\n  %keep").replace("less_equal(%at,", "less_equal(%key,")
    )  # fmt: skip
    program = random_program(text)
    dims = [{"b": 1, "s": 3, "t": 5}]
    PassManager([FuseAttention()], check=InterpreterCheck(dims)).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, len(node.inputs)) == (False, 4)  # type: ignore[attr-defined]
    shifted = text.replace("  %keep:", "  %t: i64[] = dim_size() {size=t - s}\n  %late: i64[s, 1] = add(%row, %t)\n  %keep:")
    program = random_program(shifted.replace("less_equal(%key, %row)", "less_equal(%key, %late)"))
    PassManager([FuseAttention()], check=InterpreterCheck(dims)).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, len(node.inputs)) == (True, 3)  # type: ignore[attr-defined]


def test_additive_mask_after_a_factor() -> None:
    """(scores + mask) * 2: the mask is scaled too."""
    text = BEFORE.replace("%m: bool", "%m: f32").replace("select(%m, %scaled, -inf:f32)", "add(%scaled, %m)")
    text = text.replace("softmax(%masked)", "softmax(%two)")
    text = text.replace("  %probs", "  %two: f32[b, 4, s, t] = mul(%masked, 2.0:f32)\n  %probs")
    program = random_program(text)
    PassManager([FuseAttention()], check=InterpreterCheck(DIMS)).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert node.attrs.scale == 1.0  # type: ignore[attr-defined]
    assert parse(str(program["f"]))


GUARDED = BEFORE.replace("matmul(%probs, %v)", "matmul(%seen, %v)").replace(
    "  %out",
    "  %nan: bool[b, 4, s, t] = isnan(%probs)\n  %seen: f32[b, 4, s, t] = select(%nan, 0.0:f32, %probs)\n  %out",
)


def test_guard_against_rows_that_see_nothing() -> None:
    """select(isnan(probs), 0, probs), as scaled_dot_product_attention is decomposed: 0 is what the operation gives there."""
    program = random_program(GUARDED)
    feeds = feed(program["f"], DIMS[0])
    feeds["m"] = np.arange(5) < np.array([0, 3]).reshape(2, 1, 1, 1)
    (want,) = evaluate(program["f"], feeds)
    report = PassManager([FuseAttention(), Cleanup()]).run(program)
    assert program["f"].count("attention") == 1
    assert not report.remarks("missed")
    np.testing.assert_allclose(evaluate(program["f"], feeds)[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "old, new",
    [
        ("select(%nan, 0.0:f32, %probs)", "select(%nan, 1.0:f32, %probs)"),
        ("select(%nan, 0.0:f32, %probs)", "select(%nan, %probs, 0.0:f32)"),
        ("%nan: bool[b, 4, s, t] = isnan(%probs)", "%nan: bool[b, 4, s, t] = less(%probs, 0.5:f32)"),
        ("isnan(%probs)", "isnan(%scaled)"),
        ("return %out", "return %out, %nan"),
        ("return %out", "return %out, %probs"),
    ],
)
def test_other_guards_stay(old: str, new: str) -> None:
    check_untouched(FuseAttention(), GUARDED.replace(old, new))


ADDED = BEFORE.replace(
    "%masked: f32[b, 4, s, t] = select(%m, %scaled, -inf:f32)",
    "%bias: f32[b, 1, 1, t] = select(%m, 0.0:f32, -3.4e38:f32)\n  %masked: f32[b, 4, s, t] = add(%scaled, %bias)",
)


def test_finite_number_added_under_a_mask_that_is_data_stays_as_it_is() -> None:
    """Where nothing is seen, the mean of the values: the addend is the operand, and the numbers agree."""
    program = random_program(ADDED)
    feeds = feed(program["f"], DIMS[0])
    feeds["m"] = np.arange(5) < np.array([0, 3]).reshape(2, 1, 1, 1)
    (want,) = evaluate(program["f"], feeds)
    PassManager([FuseAttention(), Cleanup()]).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert node.inputs[3].tensor.dtype.is_float
    np.testing.assert_allclose(evaluate(program["f"], feeds)[0], want, rtol=1e-5, atol=1e-6)


DECLARED = """graph @f(%q: f32[b, s, 4, 8], %k: f32[b, s, 2, 8], %v: f32[b, s, 2, 8], %m: bool[b, 1, 1, s]) {
  %i: i64[s] = iota() {size=s}
  %row: i64[s, 1] = reshape(%i) {shape=(s, 1)}
  %past: bool[s, s] = less_equal(%i, %row)
  %both: bool[b, 1, s, s] = logical_and(%m, %past)
  %out: f32[b, s, 4, 8] = attention(%q, %k, %v, %both) {scale=0.5}
  return %out
}"""
FAR = """  %far: i64[s, s] = sub(%row, %i)
  %near: bool[s, s] = less(%far, 3:i64)
  %past: bool[s, s] = logical_and(%near, %edge)
"""


@pytest.mark.parametrize(
    "old, new, causal, window, operand",
    [
        ("", "", True, None, True),
        ("logical_and(%m, %past)", "broadcast_to(%past) {shape=(b, 1, s, s)}", True, None, False),
        ("  %past: bool[s, s] =", "  %edge: bool[s, s] =", True, 3, True),
        ("{scale=0.5}", "{scale=0.5, window=2}", True, 2, True),
    ],
)
def test_mask_of_an_attention(old: str, new: str, causal: bool, window: int | None, operand: bool) -> None:
    """Predicates in the mask of a declared attention become attributes, beside those it has."""
    text = DECLARED.replace(old, new) if old else DECLARED
    text = text.replace("  %both", FAR + "  %both") if "%edge" in text else text
    program = random_program(text)
    dims = [{"b": 1, "s": 1}, {"b": 2, "s": 6}]
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck(dims)).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    a = node.attrs
    assert (a.causal, a.window, len(node.inputs) == 4) == (causal, window, operand)  # type: ignore[attr-defined]


def test_a_number_that_undoes_a_fill() -> None:
    """What a finite number hides, another one that is added raises again: later keys are all that is seen."""
    text = tabled(TRI, CHOSEN.replace("FILL", "-1e9").replace("%masked:", "%filled:") + """
  %raised: f32[1, 1, s, p + s] = select(%m, 0.0:f32, 2e9:f32)
  %masked: f32[b, 2, s, p + s] = add(%filled, %raised)""")
    check_untouched(FuseAttention(), text)
    fused = random_program(text.replace("2e9", "2.0"))
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck(TABLE_DIMS)).run(fused)
    assert fused["f"].count("attention") == 1


@pytest.mark.parametrize("fill, causal", [("-inf:f32", True), ("-3.4e38:f32", False)])
def test_additive_mask_of_an_attention(fill: str, causal: bool) -> None:
    """0 and -inf are a predicate; a finite number is none, as another mask may hide what it leaves."""
    text = DECLARED.replace("%k, %v, %both)", "%k, %v, %bias)").replace(
        "  %out", f"  %bias: f32[b, 1, s, s] = select(%both, 0.0:f32, {fill})\n  %out"
    )
    program = random_program(text)
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck([{"b": 2, "s": 4}])).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert node.attrs.causal == causal  # type: ignore[attr-defined]


def test_mask_of_an_attention_that_is_data_stays() -> None:
    check_untouched(FuseAttention(), DECLARED.replace("%k, %v, %both)", "%k, %v, %m)"))


def test_mask_cast_to_numbers_and_back() -> None:
    """And a positive constant in it is dropped: an attention mask of ones."""
    text = DECLARED.replace("logical_and(%m, %past)", "logical_and(%flag, %one)").replace(
        "  %both",
        "  %wide: i64[s, s] = cast(%past) {dtype=i64}\n  %flag: bool[s, s] = cast(%wide) {dtype=bool}\n"
        "  %ones: i64[b, 1, 1, s] = broadcast_to(1:i64) {shape=(b, 1, 1, s)}\n"
        "  %one: bool[b, 1, 1, s] = cast(%ones) {dtype=bool}\n  %both",
    )
    program = random_program(text)
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck([{"b": 2, "s": 4}])).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, len(node.inputs)) == (True, 3)  # type: ignore[attr-defined]


def tabled(table: np.ndarray, mask: str, starts: str = "(0, 0, p, 0)", stops: str = "(1, 1, p + s, p + s)") -> str:
    """s queries after p earlier positions; %m: the slice of the table, as bool; %masked: as ``mask`` says."""
    values = " ".join(str(x).lower() if table.dtype == bool else str(x) for x in table.ravel())
    dtype = {"bool": "bool", "uint8": "u8", "int64": "i64"}[table.dtype.name]
    kind = f"{dtype}[1, 1, 8, 8]"
    return f"""graph @f(%q: f32[b, 2, s, 8], %k: f32[b, 2, p + s, 8], %v: f32[b, 2, p + s, 8]) {{
  %kt: f32[b, 2, 8, p + s] = transpose(%k) {{perm=(0, 1, 3, 2)}}
  %scores: f32[b, 2, s, p + s] = matmul(%q, %kt)
  %table: {kind} = constant() {{value=dense<{kind}, {values}>}}
  %part: {dtype}[1, 1, s, p + s] = slice(%table) {{starts={starts}, stops={stops}}}
  %m: bool[1, 1, s, p + s] = cast(%part) {{dtype=bool}}
{mask}
  %probs: f32[b, 2, s, p + s] = softmax(%masked) {{axis=3}}
  %out: f32[b, 2, s, 8] = matmul(%probs, %v)
  return %out
}}"""


TRI = np.tri(8, dtype=bool)
CHOSEN = "  %masked: f32[b, 2, s, p + s] = select(%m, %scores, FILL:f32)"
SUMMED = """  %f: f32[1, 1, s, p + s] = cast(%m) {dtype=f32}
  %hidden: f32[1, 1, s, p + s] = sub(1.0:f32, %f)
  %bias: f32[1, 1, s, p + s] = mul(%hidden, FILL:f32)
  %masked: f32[b, 2, s, p + s] = add(%scores, %bias)"""
LEAST = "-3.4028235e38"
DIRECT = SUMMED.replace("sub(1.0:f32, %f)", "cast(%part) {dtype=f32}")
TABLE_DIMS = [{"b": 1, "s": 1, "p": 0}, {"b": 2, "s": 3, "p": 4}, {"b": 1, "s": 8, "p": 0}]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64"])
@pytest.mark.parametrize("mask, fill", [(CHOSEN, "-inf"), (CHOSEN, "-10000.0"), (SUMMED, LEAST), (SUMMED, "-10000.0")])
def test_triangle_in_a_table(dtype: str, mask: str, fill: str) -> None:
    """A slice of a lower triangle, chosen by or times a number that stands for minus infinity, is the causal predicate."""
    program = random_program(tabled(TRI.astype(dtype), mask.replace("FILL", fill)))
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck(TABLE_DIMS)).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, node.attrs.window, len(node.inputs)) == (True, None, 3)  # type: ignore[attr-defined]


def test_upper_triangle_that_hides() -> None:
    program = random_program(tabled(~np.tri(8, dtype=bool), DIRECT.replace("FILL", LEAST)))
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck(TABLE_DIMS)).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, len(node.inputs)) == (True, 3)  # type: ignore[attr-defined]


HOLE, TWO = np.tri(8, dtype=np.int64), np.tri(8, dtype=np.int64)
HOLE[5, 2], TWO[5, 2] = 0, 2
OTHER_TABLES = {
    "not triangular": tabled(HOLE, CHOSEN),
    "another diagonal": tabled(np.tri(8, k=1, dtype=bool), CHOSEN),
    "slice beside the diagonal": tabled(TRI, CHOSEN, "(0, 0, 0, 0)", "(1, 1, s, p + s)"),
    "every other row": tabled(TRI, CHOSEN, "(0, 0, p, 0)", "(1, 1, p + 2*s, p + s), steps=(1, 1, 2, 1)"),
}


def test_what_is_not_0_is_true() -> None:
    program = random_program(tabled(TWO, CHOSEN.replace("FILL", "-10000.0")))
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck(TABLE_DIMS)).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, len(node.inputs)) == (True, 3)  # type: ignore[attr-defined]


def test_0_times_minus_infinity_stays_nan() -> None:
    program = random_program(text := tabled(TRI, SUMMED.replace("FILL", "-inf")))
    PassManager([FuseAttention()]).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, len(node.inputs)) == (True, 4)  # type: ignore[attr-defined]
    inputs = feed(program["f"], {"b": 1, "s": 3, "p": 2})
    for g in (parse(text), program["f"]):
        with np.errstate(invalid="ignore"):
            assert np.isnan(np.asarray(evaluate(g, inputs)[0])).all()


@pytest.mark.parametrize("text", OTHER_TABLES.values(), ids=OTHER_TABLES)
def test_other_tables_stay_data(text: str) -> None:
    check_untouched(FuseAttention(), text.replace("FILL", "-10000.0"), "some query may see nothing")


@pytest.mark.parametrize(
    "text, fill",
    [
        (tabled(TRI, SUMMED), "-1.0"),
        (tabled(TRI, SUMMED), "-9999.0"),
        (tabled(TRI, SUMMED), "10000.0"),
        (tabled(TRI, SUMMED.replace("sub(1.0:f32", "sub(2.0:f32")), LEAST),
        (tabled(TRI, DIRECT), LEAST),  # hides the past
        (tabled(HOLE, SUMMED), LEAST),
        (tabled(TWO, DIRECT), LEAST),
    ],
)
def test_other_products_stay_addends(text: str, fill: str) -> None:
    program = random_program(text.replace("FILL", fill))
    PassManager([FuseAttention()]).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, node.attrs.window) == (False, None)  # type: ignore[attr-defined]
    assert node.inputs[3].tensor.dtype.is_float


@pytest.mark.parametrize("mask", [CHOSEN, SUMMED])
def test_finite_numbers_of_two_masks_add_up(mask: str) -> None:
    """A query whose past is all padding sees the padding and the future alike: another function than causal attention."""
    text = tabled(TRI, mask.replace("FILL", "-10000.0")).replace("p + s, 8])", "p + s, 8], %pad: bool[b, 1, 1, p + s])")
    padding = """  %g: f32[b, 1, 1, p + s] = cast(%pad) {dtype=f32}
  %unseen: f32[b, 1, 1, p + s] = sub(1.0:f32, %g)
  %addend: f32[b, 1, 1, p + s] = mul(%unseen, -10000.0:f32)
  %both: f32[b, 2, s, p + s] = add(%masked, %addend)
"""
    text = text.replace("  %probs:", padding + "  %probs:").replace("softmax(%masked)", "softmax(%both)")
    check_untouched(FuseAttention(), text, "beside one that is data")


@pytest.mark.parametrize("lead", ["2, 1, ", "1, 2, ", "2, 2, "])
def test_a_mask_that_a_reshape_brings(lead: str) -> None:
    """Per row of the batch or per head, of which there are two each."""
    given = lead.replace("1, ", "")
    text = f"""graph @f(%q: f32[2, 2, 3, 4], %k: f32[2, 2, 3, 4], %v: f32[2, 2, 3, 4], %m: bool[{given}3, 3]) {{
  %t: f32[2, 2, 4, 3] = transpose(%k) {{perm=(0, 1, 3, 2)}}
  %scores: f32[2, 2, 3, 3] = matmul(%q, %t)
  %added: f32[{given}3, 3] = select(%m, 0.0:f32, -1e4:f32)
  %mask: f32[{lead}3, 3] = reshape(%added) {{shape=({lead}3, 3)}}
  %masked: f32[2, 2, 3, 3] = add(%scores, %mask)
  %probs: f32[2, 2, 3, 3] = softmax(%masked) {{axis=3}}
  %y: f32[2, 2, 3, 4] = matmul(%probs, %v)
  return %y
}}"""
    program = random_program(text)  # -1e4 leaves three digits of a score where all are hidden
    PassManager([FuseAttention()], check=InterpreterCheck([{}], rtol=2e-3, atol=2e-3)).run(program)
    assert program["f"].count("attention") == 1


def test_heads_are_grouped_where_the_mask_meets_them() -> None:
    """[2, 1, s, t] is two heads of [b, 2, 3, s, t] there, and would be two rows of [b, 6, s, t]."""
    text = """graph @f(%q: f32[2, 6, 3, 4], %k: f32[2, 6, 3, 4], %v: f32[2, 6, 3, 4], %m: f32[2, 1, 3, 3]) {
  %t: f32[2, 6, 4, 3] = transpose(%k) {perm=(0, 1, 3, 2)}
  %scores: f32[2, 6, 3, 3] = matmul(%q, %t)
  %five: f32[2, 2, 3, 3, 3] = reshape(%scores) {shape=(2, 2, 3, 3, 3)}
  %masked: f32[2, 2, 3, 3, 3] = add(%five, %m)
  %flat: f32[2, 6, 3, 3] = reshape(%masked) {shape=(2, 6, 3, 3)}
  %probs: f32[2, 6, 3, 3] = softmax(%flat) {axis=3}
  %y: f32[2, 6, 3, 4] = matmul(%probs, %v)
  return %y
}"""
    check_untouched(FuseAttention(), text, "is broadcast over some of the axes that make up the heads")


def test_a_router_is_no_missed_attention() -> None:
    text = """graph @f(%x: f32[n, 4]) {
  param %w: f32[3, 4]
  %scores: f32[n, 3] = linear(%x, %w)
  %y: f32[n, 3] = softmax(%scores) {axis=1}
  return %y
}"""
    program = random_program(text)
    assert PassManager([FuseAttention()]).run(program).remarks() == []


@pytest.mark.parametrize(
    "data",
    [
        "%m: f32[b, 1, 1, s] = select(%pad, 0.0:f32, -inf:f32)",
        "%c: f32[b, 1, 1, s] = select(%pad, 0.0:f32, -65504.0:f32)\n  %m: f32[b, 1, 1, s] = add(%c, %bias)",
        "%c: f32[s] = select(%first, 0.0:f32, -inf:f32)\n  %m: f32[b, 1, 1, s] = select(%pad, %c, -65504.0:f32)",
        "%c: f32[b, 1, 1, s] = select(%pad, 0.0:f32, -inf:f32)\n  %m: f32[b, 1, 1, s] = maximum(%bias, %c)",
    ],
)
def test_a_finite_fill_beside_data_that_hides_stays(data: str) -> None:
    """Where data hides all that the finite fill leaves, the formula attends to what it filled: however the data hides."""
    given = "%pad: bool[b, 1, 1, s], %bias: f32[b, 1, 1, s], %q: f32"
    text = positions("less_equal(%at, %row)", "-10000.0:f32").replace("%q: f32", given)
    text = text.replace("  %row: i64", f"  %first: bool[s] = less(%at, 3:i64)\n  {data}\n  %row: i64")
    text = text.replace("select(%keep, %scores,", "select(%keep, %seen,").replace(
        "  %masked:", "  %seen: f32[b, 1, s, s] = add(%scores, %m)\n  %masked:"
    )
    check_untouched(FuseAttention(), text, "some query may see nothing")


def test_a_finite_fill_beside_a_bias_is_fused() -> None:
    text = positions("less_equal(%at, %row)", "-10000.0:f32").replace("%q: f32", "%bias: f32[b, 1, 1, s], %q: f32")
    text = text.replace("select(%keep, %scores,", "select(%keep, %seen,").replace(
        "  %masked:", "  %seen: f32[b, 1, s, s] = add(%scores, %bias)\n  %masked:"
    )
    program = random_program(text)
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck([{"b": 2, "s": 5}])).run(program)
    assert program["f"].count("attention") == 1


def raised(number: str, mask: str = "%keep") -> str:
    """Scores under a sum of minus infinity, raised to ``number`` (XGLM)."""
    text = positions("less_equal(%at, %row)").replace("select(%keep, %scores, -inf:f32)", f"maximum(%sum, {number})")
    return text.replace(
        "  %masked:", f"  %fill: f32[s, s] = select({mask}, 0.0:f32, -inf:f32)\n"
        "  %sum: f32[b, 1, s, s] = add(%scores, %fill)\n  %masked:"
    )  # fmt: skip


@pytest.mark.parametrize("number", ["-3.4e+38", "-10000.0"])
def test_scores_that_are_raised_to_the_least_number_are_fused(number: str) -> None:
    program = random_program(raised(f"{number}:f32"))
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck([{"b": 2, "s": 5}, {"b": 1, "s": 1}])).run(program)
    assert program["f"].count("attention") == 1
    assert "causal=true" in str(program["f"])


@pytest.mark.parametrize("number", ["-100.0", "-9999.0", "-inf"])
def test_scores_that_are_raised_to_more_or_to_nothing_stay(number: str) -> None:
    check_untouched(FuseAttention(), raised(f"{number}:f32"), "%masked is maximum")


def test_what_is_raised_beside_data_that_hides_stays() -> None:
    """A query that sees nothing gives the mean of all values under a number."""
    text = raised("-3.4e+38:f32", "%own").replace("%q: f32", "%pad: bool[1, s], %q: f32")
    text = text.replace("  %fill:", "  %own: bool[s, s] = logical_and(%keep, %pad)\n  %fill:")
    check_untouched(FuseAttention(), text, "some query may see nothing")


@pytest.mark.parametrize("fill, causal, operand", [("-10000.0", True, False), ("-9999.0", False, True), ("-inf", True, True)])
def test_a_mask_of_ones_times_a_fill(fill: str, causal: bool, operand: bool) -> None:
    """From -10000 on it is minus infinity. Minus infinity itself is no factor: times zero it is NaN, which stays an operand."""
    text = positions("greater(%at, %row)").replace("select(%keep, %scores, -inf:f32)", "add(%scores, %added)")
    product = f"  %unseen: f32[s, s] = cast(%keep) {{dtype=f32}}\n  %added: f32[s, s] = mul(%unseen, {fill}:f32)\n"
    program = random_program(text.replace("  %masked", product + "  %masked"))
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck([{"b": 1, "s": 1}, {"b": 2, "s": 6}])).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, len(node.inputs) == 4) == (causal, operand)  # type: ignore[attr-defined]


def test_scores_without_a_batch_stay_under_a_reshape() -> None:
    check_untouched(FuseAttention(), """graph @f(%q: f32[s, 8], %k: f32[8, t], %v: f32[t, 8]) {
  %scores: f32[s, t] = matmul(%q, %k)
  %one: f32[1, s, t] = reshape(%scores) {shape=(1, s, t)}
  %p: f32[1, s, t] = softmax(%one) {axis=2}
  %out: f32[1, s, 8] = matmul(%p, %v)
  return %out
}""", "scores without a batch axis")  # fmt: skip
