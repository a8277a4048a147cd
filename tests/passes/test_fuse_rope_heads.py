"""Rotary positions of repeated heads: each head is turned once."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.passes import Cleanup, FuseAttention, FuseRope, PassManager

import wasat as ws
from wasat.testing import InterpreterCheck, check_pass, check_untouched, random_program

DIMS = [{"b": 1, "s": 3}, {"b": 2, "s": 5}, {"b": 2, "s": 2}]
HEAD = "graph @f(%x: f32[b, s, 2, 4], %at: i64[b, s], %inv: f32[2]) {\n"
BEFORE = HEAD + """
  %u: f32[b, s, 2, 1, 4] = reshape(%x) {shape=(b, s, 2, 1, 4)}
  %w: f32[b, s, 2, 3, 4] = broadcast_to(%u) {shape=(b, s, 2, 3, 4)}
  %h: f32[b, s, 6, 4] = reshape(%w) {shape=(b, s, 6, 4)}
  %y: f32[b, s, 6, 4] = rope(%h, %at, %inv) {factor=0.5}
  return %y
}"""
AFTER = HEAD + """
  %u: f32[b, s, 2, 1, 4] = reshape(%x) {shape=(b, s, 2, 1, 4)}
  %reshape: f32[b, s, 2, 4] = reshape(%u) {shape=(b, s, 2, 4)}
  %rope: f32[b, s, 2, 4] = rope(%reshape, %at, %inv) {factor=0.5}
  %reshape_1: f32[b, s, 2, 1, 4] = reshape(%rope) {shape=(b, s, 2, 1, 4)}
  %broadcast_to: f32[b, s, 2, 3, 4] = broadcast_to(%reshape_1) {shape=(b, s, 2, 3, 4)}
  %y: f32[b, s, 6, 4] = reshape(%broadcast_to) {shape=(b, s, 6, 4)}
  return %y
}"""


def test_repeated_heads() -> None:
    check_pass(FuseRope(), BEFORE, AFTER, DIMS)


def test_repeated_heads_before_positions() -> None:
    before = """graph @f(%x: f32[b, 2, s, 4], %at: i64[b, s], %inv: f32[2]) {
  %u: f32[b, 2, 1, s, 4] = reshape(%x) {shape=(b, 2, 1, s, 4)}
  %w: f32[b, 2, 3, s, 4] = broadcast_to(%u) {shape=(b, 2, 3, s, 4)}
  %k: f32[b, 6, s, 4] = reshape(%w) {shape=(b, 6, s, 4)}
  %h: f32[b, s, 6, 4] = transpose(%k) {perm=(0, 2, 1, 3)}
  %y: f32[b, s, 6, 4] = rope(%h, %at, %inv) {factor=0.5}
  return %y
}"""
    after = """graph @f(%x: f32[b, 2, s, 4], %at: i64[b, s], %inv: f32[2]) {
  %u: f32[b, 2, 1, s, 4] = reshape(%x) {shape=(b, 2, 1, s, 4)}
  %reshape: f32[b, 2, s, 4] = reshape(%u) {shape=(b, 2, s, 4)}
  %transpose: f32[b, s, 2, 4] = transpose(%reshape) {perm=(0, 2, 1, 3)}
  %rope: f32[b, s, 2, 4] = rope(%transpose, %at, %inv) {factor=0.5}
  %transpose_1: f32[b, 2, s, 4] = transpose(%rope) {perm=(0, 2, 1, 3)}
  %reshape_1: f32[b, 2, 1, s, 4] = reshape(%transpose_1) {shape=(b, 2, 1, s, 4)}
  %broadcast_to: f32[b, 2, 3, s, 4] = broadcast_to(%reshape_1) {shape=(b, 2, 3, s, 4)}
  %reshape_2: f32[b, 6, s, 4] = reshape(%broadcast_to) {shape=(b, 6, s, 4)}
  %y: f32[b, s, 6, 4] = transpose(%reshape_2) {perm=(0, 2, 1, 3)}
  return %y
}"""
    check_pass(FuseRope(), before, after, DIMS)


@pytest.mark.parametrize("one, many", [("1, 2, 4", "3, 2, 4"), ("2, 4, 1", "2, 4, 3"), ("2, 2, 1, 2", "2, 2, 3, 2")])
def test_what_repeats_otherwise(one: str, many: str) -> None:
    """The set of heads, features, parts of heads."""
    check_untouched(FuseRope(), BEFORE.replace("2, 1, 4", one).replace("2, 3, 4", many))


def test_attention_shares_heads_that_were_repeated_before_they_were_turned() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            self.q, self.k, self.v, self.rope = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16), nn.RoPE(8)

        def __call__(self, x: nn.Tensor) -> nn.Tensor:
            at = nn.positions(x)
            q = self.q(x).heads(4)
            k, v = (nn.repeat(f(x).heads(2), 2, 2) for f in (self.k, self.v))
            q, k = self.rope(q, at), self.rope(k, at)
            scores = nn.einsum("b s h d, b t h d -> b h s t", q, k) * 8**-0.5
            scores = nn.where(nn.causal(at), scores, float("-inf"))
            return nn.einsum("b h s t, b t h d -> b s h d", nn.softmax(scores), v).merge()

    program = nn.trace(Attention(), {"x": "f32[b, s, 32]"}, outputs=["y"])
    program = random_program(str(program["forward"]))
    optimized, _ = ws.optimize(program)
    (attention,) = [n for n in optimized["forward"].nodes if n.op.name == "attention"]
    assert [v.shape[2] for v in attention.inputs] == [4, 2, 2]
    x = np.random.default_rng(0).standard_normal((2, 7, 32)).astype(np.float32)
    np.testing.assert_allclose(ws.run(optimized, x=x)["y"], ws.run(program, x=x)["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normed", ["k", "v"])
def test_heads_that_one_operand_hides_are_as_many_in_the_other(normed: str) -> None:
    """Behind a norm it does not show that heads are repeated: attention takes both as they come."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            self.norm = nn.RMSNorm(4)

        def __call__(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> nn.Tensor:
            k, v = (nn.repeat(x, 3, 2) for x in (k, v))
            k, v = (self.norm(k), v) if normed == "k" else (k, self.norm(v))
            weights = nn.softmax(nn.einsum("b s h d, b t h d -> b h s t", q, k))
            return nn.einsum("b h s t, b t h d -> b s h d", weights, v)

    few = "f32[b, t, 2, 4]"
    program = nn.trace(Attention(), {"q": "f32[b, s, 6, 4]", "k": few, "v": few})
    check = InterpreterCheck([{"b": 2, "s": 3, "t": 5}])
    PassManager([Cleanup(), FuseAttention(), Cleanup()], check=check).run(program)
    (attention,) = [n for n in program["forward"].nodes if n.op.name == "attention"]
    assert [v.shape[2] for v in attention.inputs] == [6, 6, 6]
