"""Weights of integers that a graph dequantizes: text before and after, types, and a near miss for each guard."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import ArrayParam, evaluate, type_of
from wasat.passes import FoldDequantized, PassManager

from wasat.testing import check_pass, check_untouched, random_program

LINEAR = """graph @f(%x: f32[s, 64], %ids: i64[s]) {
  param %w: i8[8, 64]
  param %scale: f32[8, 1]
  %wide: f32[8, 64] = cast(%w) {dtype=f32}
  %dense: f32[8, 64] = mul(%wide, %scale)
  %y: f32[s, 8] = linear(%x, %dense)
  return %y
}"""
FOLDED = """graph @f(%x: f32[s, 64], %ids: i64[s]) {
  param %"w|int8": int8b64f32[8, 64]
  %y: f32[s, 8] = quantized_linear(%x, %"w|int8")
  return %y
}"""
MATMUL = LINEAR.replace("linear(%x, %dense)", "matmul(%x, %turned)").replace(
    "  %y:", "  %turned: f32[64, 8] = transpose(%dense) {perm=(1, 0)}\n  %y:"
)
ROWS = LINEAR.replace("%y: f32[s, 8] = linear(%x, %dense)", "%y: f32[s, 64] = gather(%dense, %ids) {axis=0}")
BLOCKS = LINEAR.replace("%scale: f32[8, 1]", "%few: f32[8, 4]").replace("  %wide", """\
  %apart: f32[8, 4, 1] = reshape(%few) {shape=(8, 4, 1)}
  %spread: f32[8, 4, 16] = broadcast_to(%apart) {shape=(8, 4, 16)}
  %scale: f32[8, 64] = reshape(%spread) {shape=(8, 64)}
  %wide""")  # fmt: skip
ZERO = LINEAR.replace(
    "%dense: f32[8, 64] = mul(%wide", "%less: f32[8, 64] = sub(%wide, 3:f32)\n  %dense: f32[8, 64] = mul(%less"
)
BEHIND = LINEAR.replace("mul(%wide, %scale)", "stop_gradient(%wide)").replace("linear(%x, %dense)", "linear(%x, %wide)")
BEHIND = BEHIND.replace("  %dense: f32[8, 64] = stop_gradient(%wide)\n", "").replace("  param %scale: f32[8, 1]\n", "")


@pytest.mark.parametrize(
    "before, after",
    [
        (LINEAR, FOLDED), (LINEAR.replace("(%wide, %scale)", "(%scale, %wide)"), FOLDED), (MATMUL, FOLDED),
        (BLOCKS, FOLDED.replace("b64", "b16")), (ZERO, FOLDED.replace("int8b64f32", "int8zb64f32")),
        (BEHIND, FOLDED.replace("b64f32", "b32f16")),
        (ROWS, FOLDED.replace("8] = quantized_linear(%x, %\"w|int8\")", "64] = quantized_embedding(%\"w|int8\", %ids)")),
    ],
    ids=["linear", "scale first", "matmul", "blocks", "zero points", "scales behind", "rows"],
)  # fmt: skip
def test_what_reads_it_reads_integers(before: str, after: str) -> None:
    remarks = check_pass(FoldDequantized(), before, after, [{"s": 1}, {"s": 3}])
    assert [str(r) for r in remarks] == ["applied: 1 operation on weights that stay integers (@f)"]


def test_all_that_read_it_share_one_parameter() -> None:
    """In every graph; what the integers were is forgotten when nothing reads them."""
    text = ROWS + "\n" + LINEAR.replace("@f", "@g")
    program = random_program(text)
    PassManager([FoldDequantized()]).run(program)
    assert list(program.params) == ["w|int8"]
    assert [n.op.name for g in program.graphs.values() for n in g.nodes] == ["quantized_embedding", "quantized_linear"]


@pytest.mark.parametrize(
    "edits, reason",
    [
        ([("linear(%x, %dense)", "linear(%x, %other)"), ("  %y", "  %other: f32[8, 64] = neg(%dense)\n  %y")], "is no product"),
        ([("%scale: f32[8, 1]", "%scale: f32[1, 64]")], "its scales differ along axis 1, and products sum over axis 1"),
        ([("%scale: f32[8, 1]", "%scale: f32[8, 64]")], "its scales or zero points differ along both axes"),
        ([("mul(%wide", "mul(%less"), ("  %dense", "  %less: f32[8, 64] = sub(%wide, 0.5:f32)\n  %dense")], "are no integers"),
        ([("mul(%wide", "mul(%less"), ("  %dense", "  %less: f32[8, 64] = sub(%wide, 300:f32)\n  %dense")], "more than 8 bits"),
        ([("i8[8, 64]", "i16[8, 64]")], None),
        ([("%wide: f32[8, 64] = cast(%w)", "%wide: f32[8, 64] = cast(%n)"), ("  %wide", "  %n: i8[8, 64] = neg(%w)\n  %wide")],
         None),
        ([(") {\n  param %w: i8[8, 64]", ", %w: i8[8, 64]) {")], None),
        ([(") {", ", %scale: f32[8, 1]) {"), ("  param %scale: f32[8, 1]\n", "")], None),
    ],
)  # fmt: skip
def test_near_misses(edits: list[tuple[str, str]], reason: str | None) -> None:
    text = LINEAR
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    check_untouched(FoldDequantized(), text, reason)


HALF = LINEAR.replace("linear(%x, %dense)", "linear(%h, %d)").replace("  %y: f32", """\
  %d: f16[8, 64] = cast(%dense) {dtype=f16}
  %h: f16[s, 64] = cast(%x) {dtype=f16}
  %y: f16""")  # fmt: skip


@pytest.mark.parametrize("scale, reason", [(0.125, ""), (0.1, "its scales are f32 and it is dequantized to f16")])
def test_what_is_rounded_to_f16_has_scales_of_f16(scale: float, reason: str) -> None:
    program = random_program(HALF)
    program.params["scale"] = ArrayParam(np.full((8, 1), scale, np.float32), program.params["scale"].type)
    report = PassManager([FoldDequantized()]).run(program)
    assert [str(v.type) for v in program["f"].params.values() if v.name != "scale"] == [
        "i8[8, 64]" if reason else "int8b32f16[8, 64]"
    ]
    assert [reason in r.message for r in report.remarks("missed")] == [True] * bool(reason)


ZEROS = BLOCKS.replace("mul(%wide", "mul(%less").replace("  %dense", """  %z: f32[8, 64] = cast(%zero) {dtype=f32}
  %less: f32[8, 64] = sub(%wide, %z)
  %dense""").replace("  param %w:", "  param %zero: i8[8, 64]\n  param %w:").replace("%w: i8", "%w: i4")  # fmt: skip


@pytest.mark.parametrize("differ", [False, True])
@pytest.mark.parametrize("width", [64, 56])
def test_zero_points_that_are_written_out(differ: bool, width: int) -> None:
    """For each element, they must be those of the blocks of the scales; the last block may be a part of one."""
    text = ZEROS
    if width < 64:
        text = text.replace("= reshape(%spread)", "= slice(%long) {starts=(0, 0), stops=(8, 56)}").replace(
            " {shape=(8, 64)}", ""
        )
        text = text.replace("64]", "56]").replace(
            "  %scale", "  %long: f32[8, 64] = reshape(%spread) {shape=(8, 64)}\n  %scale"
        )
    program = random_program(text)
    zero = np.repeat(np.arange(32, dtype=np.int8).reshape(8, 4) % 5, 16, 1)[:, :width].copy()
    zero[3, 20] += differ
    program.params["zero"] = ArrayParam(zero, type_of(zero))
    params = {name: p.load() for name, p in program.params.items()}
    x = {"x": np.random.default_rng(0).standard_normal((2, width)).astype(np.float32), "ids": np.zeros(2, np.int64)}
    want = evaluate(program["f"], x, params)[0]
    report = PassManager([FoldDequantized()]).run(program)
    (got,) = evaluate(program["f"], x, {name: p.load() for name, p in program.params.items()})
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    assert report.steps[0].modified is not differ
    assert [r.message for r in report.remarks("missed")] == [
        "parameter w stays dequantized: its scales or zero points differ along both axes"
    ] * differ


def test_blocks_that_are_no_blocks() -> None:
    """Scales in another order than the blocks'; zero points in blocks of another length than the scales'."""
    check_untouched(FoldDequantized(), BLOCKS.replace("%few: f32[8, 4]", "%few: f32[4, 8]"))
    longer = """  %zf: f32[8, 2] = cast(%zero) {dtype=f32}
  %z1: f32[8, 2, 1] = reshape(%zf) {shape=(8, 2, 1)}
  %z2: f32[8, 2, 32] = broadcast_to(%z1) {shape=(8, 2, 32)}
  %z: f32[8, 64] = reshape(%z2) {shape=(8, 64)}"""
    text = ZEROS.replace("i8[8, 64]", "i8[8, 2]").replace("  %z: f32[8, 64] = cast(%zero) {dtype=f32}", longer)
    check_untouched(FoldDequantized(), text, "its scales or zero points differ along both axes")
