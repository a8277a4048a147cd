"""What the analysis says of a value along the sequence, operation by operation."""

from __future__ import annotations

import dataclasses

import pytest
from wasat.ir import parse
from wasat.passes.analyses.axis import analyze
from wasat.passes.analyses.sequence import FIXED

PAIR = """%at: i64[s] = iota() {size=s}
  %query: i64[s, 1] = reshape(%at) {shape=(s, 1)}
  %keep: bool[s, s] = less_equal(%at, %query)
  """
SCORES = PAIR + """%xt: f32[2, 8, s] = transpose(%x) {perm=(0, 2, 1)}
  %product: f32[2, s, s] = matmul(%x, %xt)
  %scores: f32[2, s, s] = select(%keep, %product, -inf:f32)
  %sink: f32[2, s, s + 1] = pad(%scores) {low=(0, 0, 1), high=(0, 0, 0)}
  %behind: f32[2, s, s + 1] = pad(%scores) {low=(0, 0, 0), high=(0, 0, 1)}
  """
ATTENTION = PAIR + """%q: f32[2, s, 2, 4] = reshape(%x) {shape=(2, s, 2, 4)}
  %hidden: f32[s, s] = select(%keep, 0.0:f32, -inf:f32)
  %shown: f32[s, s] = select(%keep, -inf:f32, 0.0:f32)
  """
CAUSAL = "\n  %y: f32[2, s, 2, 4] = attention(%q, %q, %q, %m) {scale=0.5, causal=true}"
FIRST = """%h: f32[8] = broadcast_to(0.0:f32) {shape=(8,)}
  %one: f32[1, s, 8] = slice(%x) {starts=(0, 0, 0), stops=(1, s, 8)}
  %xs: f32[s, 8] = reshape(%one) {shape=(s, 8)}
  """
BODY = """body=graph @turn(%h: f32[8], %x: f32[8]) {
    %new: f32[8] = add(%h, %x)
    return %new
  }, carries=1, slices=1}"""
LONGER = """%longer: f32[2, s + 1, 8] = pad(%x) {low=(0, 1, 0), high=(0, 0, 0)}
  %column: f32[2, s + 1, 1] = slice(%longer) {starts=(0, 0, 0), stops=(2, s + 1, 1)}
  %one: f32[2, s, 1] = slice(%x) {starts=(0, 0, 0), stops=(2, s, 1)}
  %row: f32[2, 1, s] = transpose(%one) {perm=(0, 2, 1)}
  """


def said(lines: str) -> str:
    """What is said of %y: its kind and axes, and what else is not as it is by default."""
    g = parse(f"graph @f(%x: f32[2, s, 8]) {{\n  {lines}\n  return %y\n}}")
    label = analyze(g, "s")[g.outputs[0]]
    more = {f.name: getattr(label, f.name) for f in dataclasses.fields(label)}
    named = [f"{k}={x:g}" for k, x in more.items() if k not in ("kind", "axis", "other", "culprit", "reason", "mixes")
             and x != getattr(FIXED, k)]
    reason = [f"({label.reason})"] if label.kind == "ahead" else []
    return " ".join([label.kind, *map(str, label.axes), *["mixes"] * label.mixes, *named, *reason])


@pytest.mark.parametrize("lines, want", [
    ("%y: f32[s, s] = broadcast_to(2.0:f32) {shape=(s, s)}", "pair 0 1 above=2 below=2"),
    ("%y: f32[s, 5] = broadcast_to(2.0:f32) {shape=(s, 5)}", "uniform 0"),
    (PAIR + "%y: bool[s, s] = logical_not(%keep)", "pair 0 1 above=1 below=0"),
    (SCORES + "%y: f32[2, s, s] = neg(%scores)", "scores 1 2 above=inf"),
    (SCORES + "%y: f32[2, s, s] = softmax(%scores) {axis=2}", "scores 1 2 above=0 key=2"),
    (SCORES + "%y: f32[2, s, s] = softmax(%scores) {axis=1}",
     "ahead (a token meets later ones: where a key is later, it is not known what stands in it, not -inf; "
     "if this is attention, explain says why it was not fused)"),
    (SCORES + "%y: f32[2, s, s + 1] = add(%sink, %sink)", "scores 1 2 above=-inf wide=2 front=1"),
    (SCORES + "%y: f32[2, s, s + 1] = add(%sink, %behind)", "ahead (its operands have other elements beside the positions)"),
    (SCORES + "%y: f32[2, s + 1, s] = transpose(%sink) {perm=(0, 2, 1)}", "scores 1 2 below=-inf wide=1 front=1"),
    (SCORES + "%t: f32[2, s + 1, s] = transpose(%sink) {perm=(0, 2, 1)}\n"
     "  %y: f32[2, s + 1, s] = softmax(%t) {axis=1}", "scores 1 2 below=0 key=1 wide=1 front=1"),
    (SCORES + "%t: f32[s + 1, s, 2] = transpose(%sink) {perm=(2, 1, 0)}\n  %y: f32[s + 1, s, 2] = neg(%t)",
     "scores 0 1 below=inf wide=0 front=1"),
    (ATTENTION + "%m: f32[s, s] = softmax(%hidden) {axis=1}" + CAUSAL,
     "token 1 mixes"),
    (ATTENTION + "%m: f32[s, s] = softmax(%shown) {axis=0}" + CAUSAL,
     "ahead (its mask takes queries together: keys stand where its queries are)"),
    (ATTENTION + "%y: f32[2, s, 2, 4] = attention(%q, %q, %q, %keep) {scale=0.5}", "token 1 mixes"),
    (ATTENTION + "%not: bool[s, s] = logical_not(%keep)\n  %y: f32[2, s, 2, 4] = attention(%q, %q, %q, %not) {scale=0.5}",
     "ahead (it is bidirectional: a token attends to later ones)"),
    (FIRST + "%y: f32[8] = scan(%h, %xs) {" + BODY, "last mixes"),
    (FIRST + "%more: f32[s + 1, 8] = pad(%xs) {low=(1, 0), high=(0, 0)}\n  %y: f32[8] = scan(%h, %more) {" + BODY,
     "ahead (it pads the sequence)"),
    (LONGER + "%y: f32[2, s + 1, 8] = mul(%longer, %longer)", "token 1 mixes extra=1 valid=1"),
    (LONGER + "%y: f32[2, s + 1, s] = add(%column, %row)", "ahead (it pads the sequence)"),
])
def test_labels(lines: str, want: str) -> None:
    assert said(lines) == want
