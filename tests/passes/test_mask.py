"""What is read off the values of masks, function by function; fused as a whole in test_fuse_attention."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import Builder, Graph
from wasat.passes.mask import Mask, analyze

import wasat as ws


@pytest.mark.parametrize("a, b, want", [(5, 3, 3), (3, 5, 3), (None, 4, 4), (4, None, 4), (None, None, None)])
def test_two_windows_are_the_smaller(a: int | None, b: int | None, want: int | None) -> None:
    mask = Mask(window=a)
    mask.meet(Mask(window=b, finite=True))
    assert mask.window == want
    assert mask.finite


def test_finite_is_not_lost() -> None:
    mask = Mask(finite=True, causal=True)
    mask.meet(Mask())
    assert mask.finite
    assert mask.causal


@pytest.mark.parametrize("by_row", [False, True])
def test_a_band_that_moves_with_the_row_is_data(by_row: bool) -> None:
    g = ws.parse(f"""graph @forward(%x: f32[3, 5, 5]) {{
  %j: i64[5] = iota() {{size=5}}
  %r: i64[3] = iota() {{size=3}}
  %i: i64[5, 1] = reshape(%j) {{shape=(5, 1)}}
  %b: i64[3, 1, 1] = reshape(%r) {{shape=(3, 1, 1)}}
  %k: i64[3, 5, 1] = add(%i, %b)
  %y: bool = less_equal(%j, {"%k" if by_row else "%i"})
  return %y
}}""".replace("%y: bool", "%y: bool[3, 5, 5]" if by_row else "%y: bool[5, 5]"))
    found = analyze(g.outputs[0], (3, 5, 5), True)
    assert found is not None
    assert (found.causal, bool(found.operands)) == (not by_row, by_row)


@pytest.mark.parametrize("low, high, causal", [(0, 1, True), (0, 2, False), (-1, 1, False)])
def test_a_table_is_of_zeros_and_ones(low: int, high: int, causal: bool) -> None:
    table = np.where(np.tri(4, dtype=bool), 1, low)
    table[2, 1] = high
    found = analyze(Builder(Graph("f")).constant(table), (4, 4))
    assert (found.causal, bool(found.operands)) == (causal, not causal)
