"""Angles of rotary positions that are outer products."""

from __future__ import annotations

import pytest
from test_fuse_rope import AFTER, DIMS, TABLES, TURN, graph
from wasat.passes import FuseRope, PassManager

from wasat.testing import check_pass, random_program

ROW = "%row: f32[1, 2] = reshape(%inv) {shape=(1, 2)}\n  %a: f32[s, 2] = matmul(%f, %row)"
COLUMN = """%col: f32[2, 1] = reshape(%inv) {shape=(2, 1)}
  %wide: f32[1, s] = reshape(%f) {shape=(1, s)}
  %o: f32[2, s] = matmul(%col, %wide)
  %a: f32[s, 2] = transpose(%o) {perm=(1, 0)}"""


@pytest.mark.parametrize("angles", [ROW, COLUMN])
def test_angles_by_outer_products(angles: str) -> None:
    """As torch.outer, einsum("i,j->ij"), or a matrix product are exported."""
    check_pass(FuseRope(), graph(TABLES.replace("%a: f32[s, 2] = mul(%f, %inv)", angles), TURN), AFTER, DIMS)


@pytest.mark.parametrize(
    "angles",
    [
        # summed over two; angles of another order
        "%ff: f32[s, 2] = concat(%f, %f) {axis=1}\n  %ww: f32[2, 2] = reshape(%x4) {shape=(2, 2)}\n"
        "  %a: f32[s, 2] = matmul(%ff, %ww)",
        COLUMN.replace("%o: f32[2, s] = matmul(%col, %wide)", "%g: f32[s, 2] = transpose(%col2) {perm=(1, 0)}\n"
                       "  %o: f32[2, s] = transpose(%g) {perm=(1, 0)}"),
    ],
)  # fmt: skip
def test_other_products_are_no_angles(angles: str) -> None:
    four = "%x4: f32[4] = constant() {value=dense<f32[4], 1.0 0.1 0.5 0.2>}"
    free = "%col2: f32[2, s] = reshape(%free) {shape=(2, s)}"
    text = graph(four, free, TABLES.replace("%a: f32[s, 2] = mul(%f, %inv)", angles), TURN).replace(
        "%at: i64[s])", "%at: i64[s], %free: f32[2*s])")
    program = random_program(text)
    report = PassManager([FuseRope()]).run(program)
    assert program["f"].count("rope") == 0
    assert "no product of positions" in report.remarks("missed")[0].message


def test_a_product_of_spectra_is_no_missed_rotation() -> None:
    """A convolution by Fourier transforms (Hyena) multiplies complex numbers."""
    text = """graph @f(%x: f32[b, 3, s, 1], %w: f32[3, s, 1]) {
  %a: f32[b, 3, s, 2] = dft(%x) {length=s}
  %c: f32[3, s, 2] = dft(%w) {length=s}
  %ar: f32[b, 3, s, 1] = slice(%a) {starts=(0, 0, 0, 0), stops=(b, 3, s, 1)}
  %ai: f32[b, 3, s, 1] = slice(%a) {starts=(0, 0, 0, 1), stops=(b, 3, s, 2)}
  %cr: f32[3, s, 1] = slice(%c) {starts=(0, 0, 0), stops=(3, s, 1)}
  %ci: f32[3, s, 1] = slice(%c) {starts=(0, 0, 1), stops=(3, s, 2)}
  %m1: f32[b, 3, s, 1] = mul(%ar, %cr)
  %m2: f32[b, 3, s, 1] = mul(%ai, %ci)
  %m3: f32[b, 3, s, 1] = mul(%ar, %ci)
  %m4: f32[b, 3, s, 1] = mul(%ai, %cr)
  %re: f32[b, 3, s, 1] = sub(%m1, %m2)
  %im: f32[b, 3, s, 1] = add(%m3, %m4)
  %y: f32[b, 3, s, 2] = concat(%re, %im) {axis=3}
  return %y
}"""
    assert PassManager([FuseRope()]).run(random_program(text)).remarks() == []
