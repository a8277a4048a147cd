"""Where rows stand, operation by operation, and what makes them meet."""

from __future__ import annotations

import pytest
from wasat.ir import IRError, parse
from wasat.passes.analyses.axis import analyze
from wasat.passes.analyses.rows import Place, places, repeats

HEADS = """%h: f32[b, s, 2, 4] = reshape(%x) {shape=(b, s, 2, 4)}
  %front: f32[2, b, s, 4] = transpose(%h) {perm=(2, 0, 1, 3)}
  %folded: f32[2*b, s, 4] = reshape(%front) {shape=(2*b, s, 4)}
  """
OUTER = """%column: f32[b, 1, s, 8] = reshape(%x) {shape=(b, 1, s, 8)}
  %row: f32[1, b, s, 8] = reshape(%x) {shape=(1, b, s, 8)}
  """
COUNT = """%i: i64[b] = iota() {size=b}
  %f: f32[b] = cast(%i) {dtype=f32}
  %n: f32[b, 1, 1] = reshape(%f) {shape=(b, 1, 1)}
  """
TURNS = """%none: f32[] = reduce_sum(%start) {axes=(0,)}
  %ones: f32[b] = broadcast_to(1.0:f32) {shape=(b,)}
  %last: f32[], %f: f32[b] = scan(%none, %ones) {body=graph @turn(%h: f32[], %o: f32[]) {
    %new: f32[] = add(%h, %o)
    %own: f32[] = neg(%new)
    return %new, %own
  }, carries=1, slices=1}
  %n: f32[b, 1, 1] = reshape(%f) {shape=(b, 1, 1)}
  """


def place(lines: str) -> Place | None:
    g = parse(f"graph @f(%x: f32[b, s, 8], %start: f32[8]) {{\n  {lines}\n  return %y\n}}")
    return places(g, g.inputs[0], analyze(g, "s", g.inputs[0].shape[0])).get(g.outputs[0])


@pytest.mark.parametrize("lines, want", [
    ("%y: f32[b, s, 8] = neg(%x)", Place(0)),
    ("%y: f32[s, b, 8] = transpose(%x) {perm=(1, 0, 2)}", Place(1)),
    (HEADS + "%y: f32[2, b, s, 4] = neg(%front)", Place(1)),
    (HEADS + "%y: f32[2*b, s, 4] = neg(%folded)", Place(0, 2)),
    (HEADS + "%y: f32[2, b, s, 4] = reshape(%folded) {shape=(2, b, s, 4)}", Place(1)),
    (HEADS + "%y: f32[2*b, s, 4] = add(%folded, %folded)", Place(0, 2)),
    ("%t: f32[s, b, 8] = transpose(%x) {perm=(1, 0, 2)}\n  %y: f32[s, 8*b] = reshape(%t) {shape=(s, 8*b)}", Place(1, 1, 8)),
    ("%y: f32[8] = neg(%start)", None),
    (OUTER + "%y: f32[1, b, s, 8] = neg(%row)", Place(1)),
])
def test_places(lines: str, want: Place | None) -> None:
    assert place(lines) == want


GIVEN = """graph @f(%x: f32[N, s, 8], %m: f32[SHAPE], %h: f32[8]) {
  %z: f32[N, s, 8] = neg(%x)
  %y: f32[SHAPE] = neg(%m)
  return %y, %z
}"""


def of_input(batch: str, shape: str) -> Place | None:
    g = parse(GIVEN.replace("N", batch).replace("SHAPE", shape))
    return places(g, g.inputs[0], analyze(g, "s", g.inputs[0].shape[0])).get(g.outputs[0])


@pytest.mark.parametrize("batch, shape, want", [
    ("b", "b, 8", Place(0)), ("b", "8, b", Place(1)), ("b", "8, 8", None), ("b", "1, 8", None), ("2", "8, 2", Place(1)),
    ("1", "1, 8", None), ("1", "1, 1", None),
])
def test_rows_of_an_input(batch: str, shape: str, want: Place | None) -> None:
    assert of_input(batch, shape) == want


@pytest.mark.parametrize("batch", ["b", "2"])
def test_an_input_whose_rows_could_be_on_two_axes(batch: str) -> None:
    with pytest.raises(IRError, match=f"of input %m: f32\\[{batch}, {batch}\\], several axes may be theirs"):
        of_input(batch, f"{batch}, {batch}")


def test_turns_over_rows_are_made_once_for_all() -> None:
    text = GIVEN.replace("N", "b").replace("SHAPE", "b, 8").replace("neg(%m)", """scan(%h, %m) {
    body=graph @turn(%h: f32[8], %o: f32[8]) {
      %new: f32[8] = add(%h, %o)
      %own: f32[8] = neg(%new)
      return %new, %own
    }, carries=1, slices=1}""").replace("%y: f32", "%last: f32[8], %y: f32")
    g = parse(text)
    assert g.outputs[0] not in places(g, g.inputs[0], analyze(g, "s", g.inputs[0].shape[0]))


MEETING = {
    "two axes": (OUTER + "%y: f32[b, b, s, 8] = add(%column, %row)", "its operands keep the rows on different axes"),
    "a mean": ("%y: f32[s, 8] = reduce_mean(%x) {axes=(0,)}", "rows meet here, or change their order"),
    "a softmax": ("%y: f32[b, s, 8] = softmax(%x) {axis=0}", "rows meet here, or change their order"),
    "a number of each row": (COUNT + "%y: f32[b, s, 8] = mul(%x, %n)", "it depends on which row it is of"),
    "counted turn by turn": (TURNS + "%y: f32[b, s, 8] = mul(%x, %n)", "it depends on which row it is of"),
}


@pytest.mark.parametrize("lines, words", MEETING.values(), ids=MEETING)
def test_rows_that_meet(lines: str, words: str) -> None:
    with pytest.raises(IRError, match=words):
        place(lines)


@pytest.mark.parametrize("lines, want", [
    ("%y: f32[3, 8] = broadcast_to(%x) {shape=(3, 8)}", (True, False)),
    ("%r: f32[3, 8] = broadcast_to(%x) {shape=(3, 8)}\n  %y: f32[3, 8] = neg(%r)", (True, False)),
    ("%r: f32[3, 8] = broadcast_to(%x) {shape=(3, 8)}\n  %y: f32[3, 8] = add(%r, %z)", (False, False)),
    ("%r: f32[3, 8] = broadcast_to(%x) {shape=(3, 8)}\n  %y: f32[3, 8] = add(%z, %r)", (False, False)),
    ("%r: f32[3, 8] = broadcast_to(%x) {shape=(3, 8)}\n  %y: f32[3, 8] = mul(%r, %r)", (True, False)),
    ("%r: f32[3, 8] = broadcast_to(%x) {shape=(3, 8)}\n  %y: f32[3, 8] = softmax(%r) {axis=0}", (False, False)),
    ("%r: f32[3, 8] = broadcast_to(%x) {shape=(3, 8)}\n  %y: f32[24] = reshape(%r) {shape=(24,)}", (None, False)),
    ("%y: f32[3, 8] = neg(%z)", (False, False)),
])
def test_what_is_the_same_along_an_axis(lines: str, want: tuple[bool | None, bool]) -> None:
    g = parse(f"graph @f(%x: f32[8], %z: f32[3, 8]) {{\n  {lines}\n  return %y\n}}")
    v = g.outputs[0]
    assert (None if len(v.shape) == 1 else repeats(v, -2), repeats(v, -1)) == want
    assert not repeats(v, -3)
    assert not repeats(g.inputs[0], -1)
