"""The operations of a step, counted: what training's utilisation is of."""

from __future__ import annotations

from wasat.ir import Graph, parse
from wasat.training.flops import step_flops


def test_operations_are_counted() -> None:
    g = parse("""graph @g(%x: f32[4, 8], %q: f32[1, 5, 2, 3], %i: f32[1, 2, 9, 9]) {
  param %w: f32[6, 8]
  param %k: f32[3, 2, 3, 3]
  %y: f32[4, 6] = linear(%x, %w)
  %t: f32[6, 4] = transpose(%y) {perm=(1, 0)}
  %z: f32[4, 4] = matmul(%y, %t)
  %a: f32[1, 5, 2, 3] = attention(%q, %q, %q) {scale=1.0}
  %c: f32[1, 3, 7, 7] = conv(%i, %k) {strides=(1, 1), low=(0, 0), high=(0, 0)}
  return %z, %a, %c
}""")
    linear, matmul, attention, conv = 2 * 4 * 6 * 8, 2 * 4 * 4 * 6, 2 * 2 * 5 * 5 * (3 + 3), 2 * 3 * 7 * 7 * 2 * 3 * 3
    assert isinstance(g, Graph)
    assert step_flops(g) == 2 * linear + 3 * matmul + attention + 2 * conv  # inputs need no gradient
    assert step_flops(g, {"k"}) == linear + matmul + attention + 2 * conv
    assert step_flops(g, {"w"}) == 2 * linear + 3 * matmul + attention + conv


def test_operations_of_loops_are_counted_at_every_turn() -> None:
    g = parse("""graph @g(%x: f32[5, 4, 8]) {
  param %w: f32[8, 8]
  param %v: f32[8, 8]
  %h: f32[4, 8] = broadcast_to(0.0:f32) {shape=(4, 8)}
  %last: f32[4, 8], %y: f32[5, 4, 8] = scan(%h, %x, %w, %v) {body=graph @turn(
      %h: f32[4, 8], %x: f32[4, 8], %w: f32[8, 8], %v: f32[8, 8]) {
    %a: f32[4, 8] = matmul(%h, %w)
    %b: f32[4, 8] = matmul(%x, %v)
    %n: f32[4, 8] = add(%a, %b)
    return %n, %b
  }, carries=1, slices=1}
  %z: f32[5, 4, 8] = matmul(%y, %v)
  %s: f32[4, 8] = stop_gradient(%last)
  %t: f32[4, 8] = matmul(%s, %w)
  return %z, %t
}""")
    assert isinstance(g, Graph)
    one = 2 * 4 * 8 * 8
    assert step_flops(g) == 5 * (3 + 2) * one + 5 * 3 * one + 2 * one
    assert step_flops(g, {"v"}) == 5 * (2 + 2) * one + 5 * 3 * one + one  # v comes to a turn with what is carried
    assert step_flops(g, {"w"}) == 5 * (3 + 1) * one + 5 * one + 2 * one
    assert step_flops(g, ()) == 5 * 2 * one + 5 * one + one


def test_operations_of_a_choice_are_those_of_the_longer_branch() -> None:
    g = parse("""graph @g(%c: bool[], %x: f32[4, 8]) {
  param %w: f32[8, 8]
  param %v: f32[8, 8]
  %y: f32[4, 8] = cond(%c, %x, %w, %v) {then=graph @yes(%x: f32[4, 8], %w: f32[8, 8], %v: f32[8, 8]) {
    %a: f32[4, 8] = matmul(%x, %w)
    %b: f32[4, 8] = matmul(%a, %v)
    return %b
  }, otherwise=graph @no(%x: f32[4, 8], %w: f32[8, 8], %v: f32[8, 8]) {
    %a: f32[4, 8] = matmul(%x, %v)
    return %a
  }}
  %t: f32[4, 8] = matmul(%y, %w)
  return %t
}""")
    assert isinstance(g, Graph)
    one = 2 * 4 * 8 * 8
    assert step_flops(g) == (2 + 3) * one + 3 * one  # the first product's x needs no gradient
    assert step_flops(g, {"v"}) == (1 + 2) * one + 2 * one
    assert step_flops(g, ()) == 2 * one + one
