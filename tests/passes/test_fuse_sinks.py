"""Attention beside whose keys a logit of each head stands: joined and dropped again, or written into the denominator."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.ir import evaluate
from wasat.passes import Cleanup, FuseActivations, FuseAttention, PassManager

import wasat as ws
from wasat.testing import InterpreterCheck, feed, random_program

HEADS, INF = 4, math.inf
LOGITS = [0.5, -1.0, 3.0, -20.0]
Weigh = Callable[[nn.Tensor, nn.Tensor], nn.Tensor]


def column(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    return nn.softmax(nn.concat([s, sink.broadcast_to(*s.shape[:3], 1)], axis=-1))[..., :-1]


def in_front(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    return nn.softmax(nn.concat([sink.broadcast_to(*s.shape[:3], 1), s], axis=-1))[..., 1:]


def shifted(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    """As gpt-oss has it."""
    both = nn.concat([s, sink.broadcast_to(*s.shape[:3], 1)], axis=-1)
    return nn.softmax(both - both.max(-1, keepdims=True))[..., : s.shape[-1]]


def denominator(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    top = nn.maximum(s.max(-1, keepdims=True), sink)
    e = nn.exp(s - top)
    return e / (nn.exp(sink - top) + e.sum(-1, keepdims=True))


def keys_top(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    """Shifted by the largest score of the keys alone."""
    top = s.max(-1, keepdims=True)
    e = nn.exp(s - top)
    return e / (e.sum(-1, keepdims=True) + nn.exp(sink - top))


def unshifted(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    e = nn.exp(s)
    return e / (e.sum(-1)[..., None] + nn.exp(sink))


def softmax1(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    top = nn.maximum(s.max(-1, keepdims=True), 0.0)
    e = nn.exp(s - top)
    return e / (nn.exp(-top) + e.sum(-1, keepdims=True))


def plus_one(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    e = nn.exp(s)
    return e / (1.0 + e.sum(-1, keepdims=True))


def zero_column(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    return nn.softmax(nn.pad(s, (0, 0, 0, 0), (0, 0, 0, 1)))[..., :-1]


def two_columns(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    both = nn.concat([sink, sink * -0.5], axis=-1).broadcast_to(*s.shape[:3], 2)
    return nn.softmax(nn.pad(nn.concat([s, both], axis=-1), (0, 0, 0, 1), (0, 0, 0, 0)))[..., 1:-2]


def grouped(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    """Scores with the groups of heads apart, as the reference implementation of gpt-oss has them."""
    b, _, n, t = s.shape
    s = s.reshape(b, 2, 2, n, t)
    both = nn.concat([s, sink.reshape(1, 2, 2, 1, 1).broadcast_to(b, 2, 2, n, 1)], axis=-1)
    return nn.softmax(both)[..., :-1].reshape(b, HEADS, n, t)


def one_for_all(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    return column(s, sink.sum(0, keepdims=True))


def rows_with_heads(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
    """One for all, of scores whose rows and heads are one axis."""
    b, _, n, t = s.shape
    one = sink.sum(0).broadcast_to(b * HEADS, n, 1)
    return nn.softmax(nn.concat([s.reshape(b * HEADS, n, t), one], axis=-1))[..., :-1].reshape(b, HEADS, n, t)


ZERO = [0.0] * HEADS
SPELLINGS: dict[str, tuple[Weigh, list[float]]] = {
    "column": (column, LOGITS), "in front": (in_front, LOGITS), "shifted": (shifted, LOGITS),
    "denominator": (denominator, LOGITS), "shifted by the keys' largest": (keys_top, LOGITS), "unshifted": (unshifted, LOGITS),
    "softmax1": (softmax1, ZERO), "plus one": (plus_one, ZERO), "zero column": (zero_column, ZERO),
    "grouped": (grouped, LOGITS),
    "two columns": (two_columns, [math.log(1 + math.exp(x) + math.exp(-0.5 * x)) for x in LOGITS]),
    "one for all": (one_for_all, [sum(LOGITS)] * HEADS),
    "rows with heads": (rows_with_heads, [sum(LOGITS)] * HEADS),
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self, weigh: Weigh, of_tokens: bool = False) -> None:
        self.weigh, self.of_tokens = weigh, of_tokens

    def __call__(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
        scores = q.swap(1, 2) @ k.swap(1, 2).T * 0.5
        sink = q.sum(-1, keepdims=True).swap(1, 2) if self.of_tokens else sink[:, None, None]
        return self.weigh(nn.where(nn.causal(nn.positions(q)), scores, -INF), sink) @ v.swap(1, 2)


def program_of(weigh: Weigh, of_tokens: bool = False) -> ws.Program:
    shape = f"f32[b, s, {HEADS}, 8]"
    return nn.trace(Attention(weigh, of_tokens), {"q": shape, "k": shape, "v": shape, "sink": f"f32[{HEADS}]"})


PASSES = [Cleanup(), FuseActivations(), FuseAttention(), Cleanup()]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    weigh, sinks = SPELLINGS[name]
    program = program_of(weigh)
    PassManager(PASSES, check=InterpreterCheck([{"b": 1, "s": 1}, {"b": 2, "s": 7}])).run(program)
    g = program["forward"]
    [node] = [n for n in g.nodes if n.op.name == "attention"]
    assert (node.attrs.causal, node.attrs.sink, len(node.inputs)) == (True, True, 4)  # type: ignore[attr-defined]
    assert g.count("softmax") == g.count("matmul") == g.count("exp") == 0
    g.set_outputs([node.inputs[3]], ["sink"])
    [got] = evaluate(g, {**feed(g, {"b": 1, "s": 2}), "sink": np.array(LOGITS, np.float32)}, {})
    np.testing.assert_allclose(got, sinks, rtol=1e-6, atol=1e-6)


def test_a_column_that_stays_is_a_key() -> None:
    """Cut elsewhere, of a token's own, weighed with a value: not a sink of each head."""

    def other_cut(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
        return nn.softmax(nn.concat([s, sink.broadcast_to(*s.shape[:3], 1)], axis=-1))[..., 1:]

    def of_tokens(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
        return nn.softmax(nn.concat([s, sink], axis=-1))[..., :-1]

    def positions(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
        return column(s, sink + nn.arange(s.shape[2]).cast("f32")[:, None])

    def other_sum(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
        e = nn.exp(s)
        return e / (nn.exp(s * 0.5).sum(-1, keepdims=True) + nn.exp(sink))

    def of_keys(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
        e = nn.exp(s)
        return e / (e.sum(-1, keepdims=True) + nn.exp(sink * nn.arange(s.shape[3]).cast("f32")))  # each key has its own

    def halves(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
        b, _, n, t = s.shape
        both = nn.concat([s.reshape(b * 2, 2, n, t), sink[None, :2].broadcast_to(b * 2, 2, n, 1)], axis=-1)
        return nn.softmax(both)[..., :-1].reshape(b, HEADS, n, t)

    def squared_sink(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
        e = nn.exp(s)
        return e / (e.sum(-1, keepdims=True) + sink * sink)

    def other_shift(s: nn.Tensor, sink: nn.Tensor) -> nn.Tensor:
        top = s.max(-1, keepdims=True)
        e = nn.exp(s - top)
        return e / (e.sum(-1, keepdims=True) + nn.exp(sink - 1.0))  # not shifted as the keys are: no sink of a head

    reasons = {
        other_cut: "goes into slice", of_tokens: "is not the same for all rows", positions: "is not the same for all rows",
        other_sum: None, of_keys: None, squared_sink: None,
        halves: "is of 2 heads, of 4 that there are", other_shift: "also used outside",
    }  # fmt: skip
    for weigh, reason in reasons.items():
        program = program_of(weigh, weigh is of_tokens)
        report = PassManager(PASSES, check=InterpreterCheck([{"b": 2, "s": 5}])).run(program)
        assert program["forward"].count("attention") == 0, weigh.__name__
        if reason is not None:
            remark = "; ".join(r.message for r in report.remarks("missed") if "unfused" in r.message)
            assert reason in remark, (weigh.__name__, remark)


def test_sinks_stay_beside_masks_that_are_read_later() -> None:
    """A mask that becomes an attribute of attention leaves the sink where it is."""
    program = random_program("""graph @f(%q: f32[b, s, 2, 4], %sink: f32[2]) {
  %at: i64[s] = iota() {size=s}
  %row: i64[s, 1] = reshape(%at) {shape=(s, 1)}
  %keep: bool[s, s] = less_equal(%at, %row)
  %y: f32[b, s, 2, 4] = attention(%q, %q, %q, %keep, %sink) {scale=0.5, sink=true}
  return %y
}
""")
    PassManager([FuseAttention(), Cleanup()], check=InterpreterCheck([{"b": 2, "s": 5}])).run(program)
    [node] = [n for n in program["f"].nodes if n.op.name == "attention"]
    assert node.attrs.causal  # type: ignore[attr-defined]
    assert [v.name for v in node.inputs] == ["q", "q", "q", "sink"]
