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
