"""Tables in parameters: masks become arithmetic on positions, first rows are looked up; everything else stays."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import Array, ArrayParam, DType, Program, TensorType, WasatError, evaluate, parse, type_of
from wasat.passes import Cleanup, FuseAttention, PassManager, ReadTables

from wasat.testing import InterpreterCheck, check_pass, check_untouched, feed, random_program

BEFORE = """graph @f(%tokens: i64[b, s]) {
  param %position.weight: f32[1, 32, 8]
  %rows: f32[1, s, 8] = slice(%position.weight) {starts=(0, 0, 0), stops=(1, s, 8)}
  return %rows
}"""
AFTER = """graph @f(%tokens: i64[b, s]) {
  param %position.weight: f32[1, 32, 8]
  %reshape: f32[32, 8] = reshape(%position.weight) {shape=(32, 8)}
  %iota: i64[s] = iota() {size=s}
  %gather: f32[s, 8] = gather(%reshape, %iota)
  %rows: f32[1, s, 8] = reshape(%gather) {shape=(1, s, 8)}
  return %rows
}"""


def test_first_rows() -> None:
    check_pass(ReadTables(), BEFORE, AFTER, dims=[{"b": 1, "s": 1}, {"b": 2, "s": 32}])


def test_rows_behind_others() -> None:
    before = BEFORE.replace("starts=(0, 0, 0), stops=(1, s, 8)", "starts=(0, 2, 0), stops=(1, s + 2, 8)")
    after = AFTER.replace("%gather: f32[s, 8] = gather(%reshape, %iota)", "%add: i64[s] = add(%iota, 2:i64)\n"
                          "  %gather: f32[s, 8] = gather(%reshape, %add)")  # fmt: skip
    check_pass(ReadTables(), before, after, dims=[{"b": 1, "s": 1}, {"b": 2, "s": 30}])


def test_first_rows_and_columns() -> None:
    """A learned number for every head, query and key."""
    before = """graph @f(%tokens: i64[b, s]) {
  param %bias: f32[4, 32, 32]
  %own: f32[4, s, s] = slice(%bias) {starts=(0, 0, 0), stops=(4, s, s)}
  return %own
}"""
    after = """graph @f(%tokens: i64[b, s]) {
  param %bias: f32[4, 32, 32]
  %iota: i64[s] = iota() {size=s}
  %gather: f32[4, s, 32] = gather(%bias, %iota) {axis=1}
  %iota_1: i64[s] = iota() {size=s}
  %own: f32[4, s, s] = gather(%gather, %iota_1) {axis=2}
  return %own
}"""
    check_pass(ReadTables(), before, after, dims=[{"b": 1, "s": 1}, {"b": 2, "s": 32}])


@pytest.mark.parametrize(
    "old, new",
    [
        ("starts=(0, 0, 0), stops=(1, s, 8)", "starts=(0, 32 - s, 0), stops=(1, 32, 8)"),  # the last ones
        ("starts=(0, 0, 0), stops=(1, s, 8)", "starts=(0, 1, 0), stops=(1, 2*s + 1, 8), steps=(1, 2, 1)"),
        ("stops=(1, s, 8)}", "stops=(1, 4, 8)}"),  # always the first four
    ],
)
def test_other_parts_stay(old: str, new: str) -> None:
    text = BEFORE.replace(old, new)
    dtype, size = ("i32" if "i32" in new else "f32"), ("4" if "(1, 4, 8)" in new else "s")
    text = text.replace("%rows: f32[1, s, 8]", f"%rows: {dtype}[1, {size}, 8]")
    check_untouched(ReadTables(), text)


AT_MOST = """graph @f(%x: f32[b, s, 8]) {
  param %position.weight: f32[32, 8]
  %rows: f32[min(32, s), 8] = slice(%position.weight) {starts=(0, 0), stops=(min(32, s), 8)}
  %y: f32[b, s, 8] = add(%x, %rows)
  return %y
}"""


def test_as_many_rows_as_there_are_tokens() -> None:
    """A slice that stops at the table's end, where more tokens than rows are an error anyway."""
    program = random_program(AT_MOST)
    want = evaluate(program["f"], x := feed(program["f"], {"b": 2, "s": 5}), {k: p.load() for k, p in program.params.items()})
    PassManager([ReadTables()]).run(program)
    g = program["f"]
    assert ([n.op.name for n in g.nodes], [str(n.attrs.size) for n in g.nodes if n.op.name == "iota"]) == (  # type: ignore[attr-defined]
        ["iota", "gather", "reshape", "add"], ["s"],
    )  # fmt: skip
    params = {k: p.load() for k, p in program.params.items()}
    np.testing.assert_array_equal(evaluate(g, x, params)[0], want[0])
    with pytest.raises(WasatError, match="32"):
        evaluate(g, feed(g, {"b": 1, "s": 33}), params)


@pytest.mark.parametrize("also", ["return %y, %rows", "%z: f32[min(32, s), 8] = neg(%rows)\n  return %y, %z"])
def test_rows_that_something_else_reads_keep_their_number(also: str) -> None:
    program = random_program(AT_MOST.replace("return %y", also))
    PassManager([ReadTables()], check=InterpreterCheck([{"b": 1, "s": 5}])).run(program)
    assert "iota() {size=min(32, s)}" in str(program)


MASKED = """graph @f(%scores: f32[b, 2, s, s]) {
  param %mask: DTYPE[1, 1, 9, 9]
  %part: DTYPE[1, 1, s, s] = slice(%mask) {starts=(0, 0, 0, 0), stops=(1, 1, s, s)}
  %keep: bool[1, 1, s, s] = cast(%part) {dtype=bool}
  %y: f32[b, 2, s, s] = select(%keep, %scores, -inf:f32)
  return %y
}"""


def with_table(text: str, table: Array, name: str = "mask") -> Program:
    g = parse(text)
    return Program({"f": g}, {name: ArrayParam(table, type_of(table))})


@pytest.mark.parametrize("dtype", ["bool", "u8", "i64", "f32", "f16"])
@pytest.mark.parametrize("kind", ["triangle", "band", "prefix", "strict", "distances"])
def test_masks_are_computed(kind: str, dtype: str) -> None:
    i, j = np.indices((9, 9))
    table = {
        "triangle": i >= j, "band": (i >= j) & (i - j < 3), "prefix": (i >= j) | (j < 2), "strict": i > j, "distances": i + j,
    }[kind]  # fmt: skip
    if kind == "distances" and dtype == "bool":
        pytest.skip("a distance is no boolean")
    array = table[None, None].astype({"u8": "uint8", "i64": "int64", "f32": "float32", "f16": "float16"}.get(dtype, dtype))
    program = with_table(MASKED.replace("DTYPE", dtype), array)
    inputs = {s: feed(program["f"], {"b": 2, "s": s}) for s in (1, 4, 9)}
    want = [evaluate(program["f"], x, {"mask": array})[0] for x in inputs.values()]
    PassManager([ReadTables(), Cleanup()]).run(program)
    assert not program.params
    for x, y in zip(inputs.values(), want):
        np.testing.assert_array_equal(evaluate(program["f"], x)[0], y)


@pytest.mark.parametrize("where", ["a weight", "an output", "one row"])
def test_other_parameters_stay(where: str) -> None:
    table = np.tri(9, dtype=np.float32)
    text = MASKED.replace("DTYPE", "f32")
    if where == "a weight":
        text = """graph @f(%x: f32[b, 9]) {
  param %mask: f32[9, 9]
  %y: f32[b, 9] = linear(%x, %mask)
  return %y
}"""
    elif where == "an output":
        text = "graph @f(%x: f32[b]) {\n  param %mask: f32[9, 9]\n  return %mask\n}"
    elif where == "one row":
        text = """graph @f(%x: f32[b, 9]) {
  param %mask: f32[1, 9]
  %y: f32[b, 9] = mul(%x, %mask)
  return %y
}"""
        table = np.ones((1, 9), np.float32)
    shape = parse(text).params["mask"].shape
    program = with_table(text, table.reshape(tuple(int(d) for d in shape)))
    before = str(program)
    PassManager([ReadTables()]).run(program)
    assert str(program) == before


def test_a_table_means_causal_attention() -> None:
    """nanoGPT's registered triangle, sliced: no parameter, no operand."""
    text = """graph @f(%q: f32[b, s, 2, 8], %k: f32[b, s, 2, 8], %v: f32[b, s, 2, 8]) {
  param %mask: f32[1, 1, 64, 64]
  %qt: f32[b, 2, s, 8] = transpose(%q) {perm=(0, 2, 1, 3)}
  %kt: f32[b, 2, 8, s] = transpose(%k) {perm=(0, 2, 3, 1)}
  %vt: f32[b, 2, s, 8] = transpose(%v) {perm=(0, 2, 1, 3)}
  %scores: f32[b, 2, s, s] = matmul(%qt, %kt)
  %part: f32[1, 1, s, s] = slice(%mask) {starts=(0, 0, 0, 0), stops=(1, 1, s, s)}
  %hide: bool[1, 1, s, s] = equal(%part, 0.0:f32)
  %masked: f32[b, 2, s, s] = select(%hide, -inf:f32, %scores)
  %probs: f32[b, 2, s, s] = softmax(%masked) {axis=3}
  %out: f32[b, 2, s, 8] = matmul(%probs, %vt)
  return %out
}"""
    program = with_table(text, np.tri(64, dtype=np.float32)[None, None])
    PassManager([ReadTables(), FuseAttention(), Cleanup()]).run(program)
    (node,) = (n for n in program["f"].nodes if n.op.name == "attention")
    assert (node.attrs.causal, len(node.inputs), program.params) == (True, 3, {})  # type: ignore[attr-defined]


def test_weights_are_not_looked_at() -> None:
    """A square weight that is scaled, cast or masked before its product is not even loaded."""

    class Weight:
        is_data = True
        type = type_of(np.zeros((16, 16), np.float32))

        def load(self) -> Array:
            raise AssertionError("it was loaded")

    text = """graph @f(%x: f32[b, 16]) {
  param %w: f32[16, 16]
  param %scale: f32[16, 1]
  %scaled: f32[16, 16] = mul(%w, %scale)
  %moved: f32[16, 16] = add(%scaled, 1.0:f32)
  %y: f32[b, 16] = linear(%x, %moved)
  return %y
}"""
    program = Program({"f": parse(text)}, {"w": Weight(), "scale": ArrayParam(s := np.ones((16, 1), np.float32), type_of(s))})
    assert not PassManager([ReadTables()]).run(program).steps[0].modified


@pytest.mark.parametrize("shape, axis, perm", [((16, 16), 0, (0, 1)), ((1, 1, 16, 16), 2, (0, 1, 2, 3)),
                                               ((16, 1, 1, 16), 0, (1, 2, 0, 3))])  # fmt: skip
def test_triangles_of_which_rows_are_picked(shape: tuple[int, ...], axis: int, perm: tuple[int, ...]) -> None:
    """A registered mask looked up at positions, whatever axes of size 1 it has."""
    picked = ", ".join("s" if i == axis else str(n) for i, n in enumerate(shape))
    moved = ", ".join(picked.split(", ")[p] for p in perm)
    text = f"""graph @f(%x: f32[b, s, 16]) {{
  param %table: bool[{", ".join(map(str, shape))}]
  %at: i64[s] = iota() {{size=s}}
  %rows: bool[{picked}] = gather(%table, %at) {{axis={axis}}}
  %seen: bool[{moved}] = transpose(%rows) {{perm={perm}}}
  %flat: bool[s, 16] = reshape(%seen) {{shape=(s, 16)}}
  %y: f32[b, s, 16] = select(%flat, %x, 0.0:f32)
  return %y
}}"""
    table = np.tril(np.ones((16, 16), bool)).reshape(shape)
    program, before = Program({"f": parse(text)}), parse(text)
    program.params["table"] = ArrayParam(table, type_of(table))
    report = PassManager([ReadTables()]).run(program)
    assert [r.message for r in report.remarks("applied")] == ["parameter table is computed: 2 regions of positions"]
    x = np.random.default_rng(0).normal(size=(2, 7, 16)).astype(np.float32)
    np.testing.assert_array_equal(evaluate(program["f"], {"x": x}, {})[0], evaluate(before, {"x": x}, {"table": table})[0])


def test_rows_of_words_are_not_looked_at() -> None:
    """Which would be to load the largest weight of a model, and for nothing."""
    text = """graph @f(%at: i64[b, s]) {
  param %words: f32[40, 16]
  %x: f32[b, s, 16] = embedding(%words, %at)
  %y: f32[b, s, 16] = mul(%x, %x)
  return %y
}"""
    class Unread(ArrayParam):
        def load(self) -> Array:
            raise AssertionError("the weight was loaded")

    program = Program({"f": parse(text)})
    program.params["words"] = Unread(np.zeros((40, 16), np.float32), TensorType(DType.F32, (40, 16)))
    assert not PassManager([ReadTables()]).run(program).remarks("applied")


# -- tables of cosines and sines ---------------------------------------------------------------------------------------------
WAVES = """graph @f(%x: f32[b, s, 6], %at: i64[b, s]) {
  param %table: f32[40, 6]
  %rows: f32[b, s, 6] = embedding(%table, %at)
  %y: f32[b, s, 6] = mul(%x, %rows)
  return %y
}"""
FREQUENCIES = np.array([1.0, 0.2, 0.01], np.float32)
OF_ROWS = np.arange(40, dtype=np.float32)[:, None] * FREQUENCIES
KNOWN = np.concatenate([np.sin(OF_ROWS), np.cos(OF_ROWS)], 1)


def computed(text: str, table: np.ndarray) -> tuple[Program, list[str], bool]:
    """Whether the table went, what was said, whether it computes the same: at positions from the end, too."""
    program, before = random_program(text), random_program(text)
    for p in (program, before):
        p.params["table"] = ArrayParam(np.ascontiguousarray(table), type_of(table))
    report = PassManager([ReadTables()]).run(program)
    rng = np.random.default_rng(0)
    x, at = rng.normal(size=(2, 5, 6)).astype(np.float32), rng.integers(-40, 40, (2, 5))
    got, want = (evaluate(p["f"], {"x": x, "at": at}, {k: v.load() for k, v in p.params.items()})[0] for p in (program, before))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    return program, [r.message for r in report.remarks("applied")], "table" in program.params


@pytest.mark.parametrize("lookup, table", [
    ("f32[40, 6]", KNOWN), ("f32[40, 6]", KNOWN[:, ::-1]), ("f32[40, 6]", KNOWN[:, [0, 3, 1, 4, 2, 5]]),
    ("f32[1, 40, 6]", KNOWN[None]), ("f32[40, 3, 2]", np.stack([np.cos(OF_ROWS), np.sin(OF_ROWS)], -1)),
])  # fmt: skip
def test_waves_are_computed(lookup: str, table: np.ndarray) -> None:
    text = WAVES.replace("f32[40, 6]", lookup)
    rows = "%rows: f32[b, s, 6] = embedding(%table, %at)"
    if table.ndim == 3 and table.shape[0] == 1:
        new = "%i: i64[b, s, 1] = reshape(%at) {shape=(b, s, 1)}\n  %j: i64[b, s, 6] = broadcast_to(%i) {shape=(b, s, 6)}\n" \
            "  %k: f32[b, 40, 6] = broadcast_to(%table) {shape=(b, 40, 6)}\n" \
            "  %rows: f32[b, s, 6] = take_along(%k, %j) {axis=1}"  # fmt: skip
        text = text.replace(rows, new)
    elif table.ndim == 3:
        new = "%g: f32[b, s, 3, 2] = gather(%table, %at)\n  %rows: f32[b, s, 6] = reshape(%g) {shape=(b, s, 6)}"
        text = text.replace(rows, new)
    program, said, stays = computed(text, table.astype(np.float32))
    assert (said, stays) == (["table is computed: cosines and sines of 40 positions"], False)
    constants = [n.output.const for n in program["f"].nodes if n.is_a("constant")]
    frequencies = [x for x in constants if x is not None and x.dtype == np.float32]
    np.testing.assert_allclose([np.sort(f)[::-1] for f in frequencies], [FREQUENCIES] * 2, rtol=3e-7)


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
def test_waves_of_the_first_rows_are_computed(lead: tuple[int, ...]) -> None:
    """Tables sliced to the length, as buffers of rotary positions are, with axes of size 1 in front or without."""
    front, ones, zeros = ("".join(f"{n}, " for n in ns) for ns in (lead, lead, [0] * len(lead)))
    text = f"""graph @f(%x: f32[b, s, 6], %at: i64[b, s]) {{
  param %table: f32[{front}40, 6]
  %rows: f32[{front}s, 6] = slice(%table) {{starts=({zeros}0, 0), stops=({ones}s, 6)}}
  %seen: f32[1, s, 6] = reshape(%rows) {{shape=(1, s, 6)}}
  %y: f32[b, s, 6] = mul(%x, %seen)
  return %y
}}"""
    _, said, stays = computed(text, KNOWN.reshape(*lead, 40, 6))
    assert (said[-1], stays) == ("table is computed: cosines and sines of 40 positions", False)


def test_waves_that_are_negated_are_computed() -> None:
    """Turned the other way round: x * -sin."""
    new = "%n: f32[b, s, 6] = neg(%rows)\n  %y: f32[b, s, 6] = mul(%x, %n)"
    _, said, stays = computed(WAVES.replace("%y: f32[b, s, 6] = mul(%x, %rows)", new), KNOWN)
    assert (said, stays) == (["table is computed: cosines and sines of 40 positions"], False)


def other(column: int, row: int, by: float) -> np.ndarray:
    table = KNOWN.copy()
    table[row, column] += by
    return table


@pytest.mark.parametrize("table", [
    other(1, 30, 3e-6), other(4, 7, -3e-6), other(3, 0, 1e-5), 2 * KNOWN, np.roll(KNOWN, 1, 0), KNOWN**2, KNOWN * np.nan,
    np.random.default_rng(0).normal(size=(40, 6)),
])  # fmt: skip
def test_other_numbers_stay(table: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):
        _, said, stays = computed(WAVES, table.astype(np.float32))
    assert (said, stays) == ([], True)


@pytest.mark.parametrize("old, new", [
    ("mul(%x, %rows)", "add(%x, %rows)"),  # positions that are added to embeddings keep their table
    ("return %y", "return %y, %rows"),
    ("%y: f32[b, s, 6] = mul(%x, %rows)", "%u: f32[b, s, 6] = mul(%x, %rows)\n %y: f32[b, s, 6] = add(%u, %rows)"),
    ("%rows: f32[b, s, 6] = embedding(%table, %at)", "%i: i64[b, s, 6] = cast(%x) {dtype=i64}\n"
     " %j: i64[b, s, 6] = mul(%i, 0:i64)\n %k: f32[1, 40, 6] = reshape(%table) {shape=(1, 40, 6)}\n"
     " %rows: f32[b, s, 6] = take_along(%k, %j) {axis=1}"),
])  # fmt: skip
def test_tables_of_other_uses_stay(old: str, new: str) -> None:
    assert old in WAVES
    _, said, stays = computed(WAVES.replace(old, new), KNOWN)
    assert (said, stays) == ([], True)


# -- tables that grow evenly -------------------------------------------------------------------------------------------------
SLOPES = """graph @f(%x: f32[b, 2, s, s]) {
  param %table: f32[2, 1, 16]
  %last: f32[2, 1, s] = slice(%table) {starts=(0, 0, 16 - s), stops=(2, 1, 16)}
  %t: f32[2, 1, s] = mul(%last, 2.0:f32)
  %a: f32[b, 2, s, s] = add(%x, %t)
  %m: f32[b, 2, s, s] = maximum(%a, -3e+38:f32)
  %y: f32[b, 2, s, s] = softmax(%m) {axis=3}
  return %y
}"""
EVEN = np.array([[[0.5]], [[0.1]]], np.float32) * np.arange(-15, 1, dtype=np.float32)


def shifted(text: str, table: np.ndarray) -> bool:
    """Whether other columns are read; that what is computed stays the same."""
    program, before = random_program(text), random_program(text)
    for p in (program, before):
        p.params["table"] = ArrayParam(table, type_of(table))
    PassManager([ReadTables()]).run(program)
    for s in (1, 5, 16):
        x = np.random.default_rng(s).normal(size=(2, 2, s, s)).astype(np.float32)
        got, want = (evaluate(p["f"], {"x": x}, {"table": table}) for p in (program, before))
        for one, other_one in zip(got, want):
            np.testing.assert_allclose(one, other_one, rtol=1e-5, atol=1e-6)
    return program["f"].count("gather") > 0


def test_last_columns_of_what_grows_evenly() -> None:
    assert shifted(SLOPES, EVEN)
    assert shifted(SLOPES.replace("maximum(%a, -3e+38:f32)", "select(true:bool, %a, -inf:f32)"), EVEN)


@pytest.mark.parametrize("old, new", [
    ("{axis=3}", "{axis=2}"), ("return %y", "return %y, %last"), ("return %y", "return %y, %a"), ("-3e+38", "-3.0"),
    ("softmax(%m) {axis=3}", "sigmoid(%m)"), ("maximum(%a, -3e+38:f32)", "select(true:bool, %a, 0.0:f32)"),
    ("maximum(%a, -3e+38:f32)", "minimum(%a, -3e+38:f32)"), ("mul(%last, 2.0:f32)", "mul(%last, %last)"),
    ("%a: f32[b, 2, s, s] = add(%x, %t)",
     "%u: f32[2, s, 1] = transpose(%t) {perm=(0, 2, 1)}\n  %a: f32[b, 2, s, s] = add(%x, %u)"),
])  # fmt: skip
def test_last_columns_of_other_uses_stay(old: str, new: str) -> None:
    assert old in SLOPES
    assert not shifted(SLOPES.replace(old, new), EVEN)


@pytest.mark.parametrize("table", [EVEN**2, np.where(np.arange(16) == 9, EVEN + 1e-3, EVEN), np.full_like(EVEN, np.inf)])
def test_last_columns_of_other_tables_stay(table: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):  # inf - inf in the softmax
        assert not shifted(SLOPES, table.astype(np.float32))


@pytest.mark.parametrize("dtype", ["bool", "i64", "f32"])
@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("own", ["1", "0", "any"])
def test_one_side_of_a_table_is_said_by_positions(dtype: str, above: bool, own: str) -> None:
    """Whatever stands on the other; once, not again."""
    i, j = np.indices((9, 9))
    table = (np.random.default_rng(0).random((1, 1, 9, 9)) < 0.5) & ((j <= i) if above else (j >= i))
    table = np.where(i == j, own == "1", table) if own != "any" else table
    array = table.astype({"bool": "bool", "i64": "int64", "f32": "float32"}[dtype])
    program = with_table(MASKED.replace("DTYPE", dtype), array)
    inputs = {s: feed(program["f"], {"b": 2, "s": s}) for s in (1, 4, 9)}
    want = [evaluate(program["f"], x, {"mask": array})[0] for x in inputs.values()]
    PassManager([ReadTables()]).run(program)
    assert program["f"].count("select") == (3 if own != "any" else 2)
    before = str(program)
    PassManager([ReadTables()]).run(program)
    assert str(program) == before
    for x, y in zip(inputs.values(), want):
        np.testing.assert_array_equal(evaluate(program["f"], x, {"mask": array})[0], y)
