"""What is read off the values of masks, function by function; fused as a whole in test_fuse_attention."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import Builder, DType, Graph, TensorType, Value, symbol
from wasat.passes.analyses.mask import Mask, analyze, ends, hidden_by

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


@pytest.mark.parametrize("low, high, causal, data", [(0, 1, True, False), (0, 2, True, True), (-1, 1, False, True)])
def test_a_table_is_of_zeros_and_ones(low: int, high: int, causal: bool, data: bool) -> None:
    table = np.where(np.tri(4, dtype=bool), 1, low)
    table[2, 1] = high
    found = analyze(Builder(Graph("f")).constant(table), (4, 4))
    assert (found.causal, bool(found.operands)) == (causal, data)


def spelt(how: str) -> tuple[Graph, Value]:
    """A mask of positions, [s, s], as people write it."""
    g = Graph("f")
    b, s = Builder(g), symbol("s")
    g.add_input("x", TensorType(DType.F32, (s,)))
    at = b.iota(size=s)
    later = b.sub(at, b.reshape(at, shape=(s, 1)))  # key - query
    ones = b.broadcast_to(b.constant(1.0, "f32"), shape=(s, s))
    table = b.slice(b.constant(np.tri(32, dtype=bool)), starts=(0, 0), stops=(s, s))

    def tri(x: Value, k: int, upper: bool = False) -> Value:
        inside = b.greater_equal(later, k) if upper else b.less_equal(later, k)
        return b.select(inside, x, b.constant(0, x.tensor.dtype))

    none = b.broadcast_to(b.constant(False, "bool"), shape=(s, s))
    v = {
        "tril(ones) != 0": lambda: b.not_equal(tri(ones, 0), 0.0),
        "tril(bool)": lambda: tri(b.cast(ones, dtype="bool"), 0),
        "~triu(ones, 1).bool()": lambda: b.logical_not(b.cast(tri(ones, 1, upper=True), dtype="bool")),
        "a table, cut": lambda: table,
        "a table of numbers, cut": lambda: b.equal(b.cast(table, dtype="f32"), 1.0),
        "1 - triangle < 0.5": lambda: b.less(b.sub(1.0, b.cast(table, dtype="f32")), 0.5),
        "nothing ahead": lambda: b.equal(b.maximum(later, 0), 0),
        "all but later": lambda: b.logical_not(b.greater(later, 0)),
        "where": lambda: b.select(b.greater(later, 0), none, b.logical_not(none)),
        "counted": lambda: b.less_equal(
            b.cumsum(b.cast(ones, dtype="i64"), axis=1), b.cumsum(b.cast(ones, dtype="i64"), axis=0)
        ),
        "backwards": lambda: b.reverse(b.reverse(table, axes=(0,)), axes=(0,)),
        "band": lambda: b.not_equal(tri(tri(ones, 0), -3, upper=True), 0.0),
        "0 <= query - key < 4": lambda: b.logical_and(b.less_equal(0, b.neg(later)), b.less(b.neg(later), 4)),
        "strict": lambda: b.less(later, 0),
        "with the first": lambda: b.logical_and(b.less_equal(later, 0), b.logical_or(b.greater(later, -4), b.less(at, 1))),
        "prefix": lambda: b.logical_or(b.less_equal(later, 0), b.less(at, 3)),
        "one ahead": lambda: b.less_equal(later, 1),
        "a hole": lambda: b.logical_and(b.less_equal(later, 0), b.not_equal(later, -2)),
    }[how]()
    g.set_outputs([v])
    return g, v


@pytest.mark.parametrize(
    "how, causal, window, data",
    [
        ("tril(ones) != 0", True, None, False), ("tril(bool)", True, None, False), ("~triu(ones, 1).bool()", True, None, False),
        ("a table, cut", True, None, False), ("a table of numbers, cut", True, None, False),
        ("1 - triangle < 0.5", True, None, False), ("nothing ahead", True, None, False), ("all but later", True, None, False),
        ("where", True, None, False), ("counted", True, None, False), ("backwards", True, None, False),
        ("band", True, 4, False), ("0 <= query - key < 4", True, 4, False), ("strict", True, None, True),
        ("with the first", True, None, True), ("prefix", False, None, True), ("one ahead", False, None, True),
        ("a hole", True, None, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["keep", "hide", "added"])
def test_spellings(how: str, form: str, causal: bool, window: int | None, data: bool) -> None:
    """As what is kept, as what is hidden, and as what is added."""
    g, v = spelt(how)
    b, shape = Builder(g), (symbol("b"), 2, symbol("s"), symbol("s"))
    if form == "added":
        read = hidden_by(b.select(v, 0.0, b.constant(float("-inf"), "f32")), shape)
        assert read is not None
        found, whole, fill = read
        assert (found.causal, found.window, not whole, fill) == (causal, window, data, float("-inf"))
        return
    found = analyze(v if form == "keep" else b.logical_not(v), shape, form == "keep")
    assert (found.causal, found.window, bool(found.operands)) == (causal, window, data)


def test_the_weakest_fill_counts() -> None:
    """-inf beside -1e5, and a factor."""
    g = Graph("f")
    b = Builder(g)
    table = np.where(np.tri(4, dtype=bool), 0, -np.inf).astype(np.float32)
    table[0, 3] = -1e5
    read = hidden_by(b.constant(table), (4, 4), 0.5)
    assert read is not None
    assert (read[0].causal, read[1], read[2]) == (True, True, -5e4)
    assert hidden_by(b.constant(table), (4, 4), -1.0) is None
    assert hidden_by(b.constant(np.where(np.isinf(table), -9.0, table)), (4, 4), 0.01) is None


BLOCKS = {
    "blocks of four": ("floor_div(%q, 4:i64)", "floor_div(%k, 4:i64)", 4),
    "counted from elsewhere": ("floor_div(%q1, 4:i64)", "floor_div(%k1, 4:i64)", 4),
    "of two sizes": ("floor_div(%q, 4:i64)", "floor_div(%k, 5:i64)", None),
    "one ahead of the other": ("floor_div(%q1, 4:i64)", "floor_div(%k, 4:i64)", 3),
    "what is left over": ("mod(%q, 4:i64)", "mod(%k, 4:i64)", None),
}


@pytest.mark.parametrize("q, k, window", BLOCKS.values(), ids=BLOCKS)
def test_blocks_are_windows(q: str, k: str, window: int | None) -> None:
    """What is seen of a block is no longer than it; the comparison stays, for where the block begins."""
    g = ws.parse(f"""graph @forward(%x: f32[s]) {{
  %i: i64[s] = iota() {{size=s}}
  %q: i64[s, 1] = reshape(%i) {{shape=(s, 1)}}
  %k: i64[1, s] = reshape(%i) {{shape=(1, s)}}
  %q1: i64[s, 1] = add(%q, 1:i64)
  %k1: i64[1, s] = add(%k, 1:i64)
  %a: i64[s, 1] = {q}
  %b: i64[1, s] = {k}
  %y: bool[s, s] = equal(%a, %b)
  return %y
}}""")
    for keep in (True, False):
        found = analyze(g.outputs[0], g.outputs[0].shape, keep)
        assert found.window == (window if keep else None)
        assert [v for v, _ in found.operands] == g.outputs


ENDS = {
    "the first two and the last four": ("logical_or(%near, %first)", (2, 4)),
    "the last four": ("logical_and(%near, %near)", None),
    "the first two": ("logical_and(%first, %first)", None),
    "every key beside": ("logical_or(%first, %all)", None),
    "and the tenth": ("logical_or(%either, %tenth)", (2, 10)),
    "and the third": ("logical_or(%either, %third)", (3, 4)),
}


@pytest.mark.parametrize("mask, want", ENDS.values(), ids=ENDS)
def test_first_and_last(mask: str, want: tuple[int, int] | None) -> None:
    g = ws.parse(f"""graph @forward(%x: f32[s]) {{
  %i: i64[s] = iota() {{size=s}}
  %q: i64[s, 1] = reshape(%i) {{shape=(s, 1)}}
  %k: i64[1, s] = reshape(%i) {{shape=(1, s)}}
  %d: i64[s, s] = sub(%q, %k)
  %near: bool[s, s] = less(%d, 4:i64)
  %first: bool[1, s] = less(%k, 2:i64)
  %third: bool[1, s] = equal(%k, 2:i64)
  %tenth: bool[s, s] = equal(%d, 9:i64)
  %all: bool[1, s] = greater_equal(%k, 0:i64)
  %either: bool[s, s] = logical_or(%near, %first)
  %y: bool[SIZE, s] = {mask}
  return %y
}}""".replace("SIZE", "1" if mask in ("logical_and(%first, %first)", "logical_or(%first, %all)") else "s"))
    assert ends(g.outputs[0]) == want
