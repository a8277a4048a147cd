"""Scans that are linear attention, however they are spelt; and those that are nearly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wasat.frontend import nn
from wasat.ir import Program, parse
from wasat.ir.ops.linear_attention import LinearAttentionAttrs
from wasat.passes import Cleanup, FuseRecurrence, PassManager

import wasat as ws

Step = Callable[..., tuple[nn.Tensor, nn.Tensor | None]]
SIZES = {"h": 3, "d": 4, "e": 5}
QKV = {"q": "b s h d", "k": "b s h d", "v": "b s h e"}


def columns(x: nn.Tensor) -> nn.Tensor:
    """[.., d] as [.., d, 1]."""
    return x[..., None]


def rows(x: nn.Tensor) -> nn.Tensor:
    return x[..., None, :]


def plain(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    S = S + columns(k) * rows(v)
    return S, (S * columns(q)).sum(-2) * 0.5


def retnet(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """A constant for each head, outer products and reads as products of matrices."""
    S = S * nn.constant([[[0.9]], [[-0.5]], [[1.0]]]) + columns(k) @ rows(v)
    return S, (rows(q) @ S)[..., 0, :]


def by_head(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, g: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """The state transposed, the decay after the write's other operand, an output gate in the turn."""
    S = columns(v) * rows(k) + nn.exp(-nn.softplus(g))[..., None, None] * S
    return S, (S @ columns(q))[..., 0] * nn.silu(v)


def gla(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, w: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    S = columns(nn.exp(w)) * S + columns(k) * rows(v)
    return S, nn.einsum("b h d, b h d e -> b h e", q, S)


def rwkv6(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, w: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """Read before the write, the current token by a bonus."""
    u = nn.constant(np.linspace(0.5, 1, 12, dtype=np.float32).reshape(3, 4))
    kv = columns(k) * rows(v)
    return columns(nn.exp(-nn.exp(w))) * S + kv, (rows(q) @ (S + columns(u) * kv))[..., 0, :]


def delta(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, beta: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """S (I - beta k k^T) + beta v k^T."""
    S = S - (S @ columns(k)) * rows(k) * beta[..., None, None] + columns(v) * rows(k * beta[..., None])
    return S, (S @ columns(q))[..., 0]


def normalized(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """A key that is itself a product, computed before the turns; the rate on all of the write."""
    return S - columns(k) * rows((S * columns(k)).sum(-2)) * 0.5 + columns(k) * rows(v) * 0.5, (S * columns(q)).sum(-2)


def gated_delta(
    S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, g: nn.Tensor, beta: nn.Tensor
) -> tuple[nn.Tensor, nn.Tensor]:  # fmt: skip
    """As Qwen3-Next's recurrence has it."""
    S = S * nn.exp(g)[..., None, None]
    held = (S * columns(k)).sum(-2)
    S = S + columns(k) * rows((v - held) * beta[..., None])
    return S, (S * columns(q)).sum(-2)


def mamba2(S: nn.Tensor, x: nn.Tensor, B: nn.Tensor, C: nn.Tensor, dt: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """Keys and queries shared between heads, a time step in decay and write, the input added to what is read."""
    S = S * nn.exp(dt * nn.constant([-0.5, -1.0, -0.1]))[..., None, None] + columns(dt[..., None] * x) * B[:, None, None]
    return S, (S * C[:, None, None]).sum(-1) + nn.constant([[0.5], [1.0], [0.1]]) * x


def plus(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """What is the same for each feature that is summed counts as often as it is summed: by broadcasts, and by numbers."""
    S = S + columns(k) * rows(v)
    return S, (S * columns(q) + rows(v) + 0.5).sum(-2)


def one_hot(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """An axis of size 1 that is padded is none that is broadcast."""
    S = S + columns(k) * rows(v)
    return S, (S * nn.pad(columns(q[..., :1]), (0, 0, 1, 0), (0, 0, 2, 0))).sum(-2)


def grouped(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, g: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """Two queries for each state; subtracted, divided, negated."""
    S = S * g[..., None, None] - (-(columns(k) * rows(v)) / 2.0)
    return S, q @ S


def numbers(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """Decay and rate are numbers."""
    S = S * 0.75
    S = S + columns(k) * rows((v * 3.0 - (S * columns(k)).sum(-2)) * 0.5)
    return S, (S * columns(q)).sum(-2)


def summed(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
    """Read without a query, which stands beside: all ones."""
    S = 0.8 * S + columns(k) * rows(v)
    return S, S.sum(-2) + q.sum(-1, keepdims=True)


ROWS: dict[str, tuple[Step, Mapping[str, str], str, dict[str, Any]]] = {
    "plain": (plain, QKV, "b h d e", {"rule": "linear", "scale": 0.5}),
    "retnet": (retnet, QKV, "b h d e", {"rule": "gated", "log": False}),
    "by head": (by_head, {**QKV, "g": "b s h"}, "b h e d", {"rule": "gated"}),
    "gla": (gla, {**QKV, "w": "b s h d"}, "b h d e", {"rule": "gated"}),
    "rwkv6": (rwkv6, {**QKV, "w": "b s h d"}, "b h d e", {"rule": "gated", "before": True}),
    "delta": (delta, {**QKV, "beta": "b s h"}, "b h e d", {"rule": "delta"}),
    "gated delta": (gated_delta, {**QKV, "g": "b s h", "beta": "b s h"}, "b h d e", {"rule": "gated_delta"}),
    "mamba2": (mamba2, {"x": "b s h e", "B": "b s d", "C": "b s d", "dt": "b s h"}, "b h e d", {"rule": "gated"}),
    "numbers": (numbers, QKV, "b h d e", {"rule": "gated_delta", "log": False}),
    "summed": (summed, QKV, "b h d e", {"rule": "gated", "log": False}),
    "plus": (plus, QKV, "b h d e", {"rule": "linear"}),
    "one hot": (one_hot, QKV, "b h d e", {"rule": "linear"}),
    "grouped": (grouped, {**QKV, "q": "b s h r d", "g": "b s h"}, "b h d e", {"rule": "gated", "log": False}),
}


def shape(axes: str, **sizes: Any) -> tuple[Any, ...]:
    return tuple({**SIZES, "r": 2, **sizes}.get(a, a) for a in axes.split())


class Recurrence(nn.Module):
    """Operands [b, s, ..] through ``step``, turn by turn, to what is read [b, s, ..] and the last state."""

    def __init__(self, step: Step, state: str) -> None:
        self.step, self.state = step, state

    def __call__(self, **given: nn.Tensor) -> Any:
        b = next(iter(given.values())).shape[0]
        turns = tuple(x.transpose(1, 0, *range(2, x.rank)) for x in given.values())
        last, y = nn.scan(lambda S, x: self.step(S, *x), nn.full(shape(self.state, b=b), 0.25), turns)
        return (y.transpose(1, 0, *range(2, y.rank)), last) if y is not None else last


def traced(step: Step, operands: Mapping[str, str], state: str) -> Program:
    types = {n: "f32[" + ", ".join(map(str, shape(axes))) + "]" for n, axes in operands.items()}
    return nn.trace(Recurrence(step, state), types)


def fed(operands: Mapping[str, str], b: int, s: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: 0.5 * rng.standard_normal(shape(axes, b=b, s=s)).astype(np.float32) for n, axes in operands.items()}


def same(program: Program, other: Program, operands: Mapping[str, str]) -> None:
    for b, s in ((2, 7), (1, 1), (3, 0)):
        feed = fed(operands, b, s)
        want, got = ws.run(program, **feed), ws.run(other, **feed)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_spellings(name: str) -> None:
    step, operands, state, attrs = ROWS[name]
    program = traced(step, operands, state)
    fused, _ = ws.optimize(program, kv_cache=False)
    nodes = list(fused["forward"].nodes)
    found = [n.attrs for n in nodes if isinstance(n.attrs, LinearAttentionAttrs)]
    assert found == [LinearAttentionAttrs(**attrs)]
    assert all(n.op.name != "scan" for n in nodes)
    same(program, fused, operands)


# -- text to text --------------------------------------------------------------------------------------------------------------
BEFORE = """graph @f(%state: f32[b, 4, 5], %q: f32[s, b, 4], %k: f32[s, b, 4], %v: f32[s, b, 5], %g: f32[s, b]) {
  %last: f32[b, 4, 5], %y: f32[s, b, 5] = scan(%state, %q, %k, %v, %g) {body=graph @turn(%s: f32[b, 4, 5], %q: f32[b, 4], %k: f32[b, 4], %v: f32[b, 5], %g: f32[b]) {
    %a: f32[b, 1, 1] = reshape(%g) {shape=(b, 1, 1)}
    %kept: f32[b, 4, 5] = mul(%s, %a)
    %row: f32[b, 1, 4] = reshape(%k) {shape=(b, 1, 4)}
    %read: f32[b, 1, 5] = matmul(%row, %kept)
    %value: f32[b, 1, 5] = reshape(%v) {shape=(b, 1, 5)}
    %new: f32[b, 1, 5] = sub(%value, %read)
    %column: f32[b, 4, 1] = reshape(%k) {shape=(b, 4, 1)}
    %write: f32[b, 4, 5] = mul(%column, %new)
    %next: f32[b, 4, 5] = add(%kept, %write)
    %query: f32[b, 1, 4] = reshape(%q) {shape=(b, 1, 4)}
    %y: f32[b, 1, 5] = matmul(%query, %next)
    %out: f32[b, 5] = reshape(%y) {shape=(b, 5)}
    return %next, %out
  }, carries=1, slices=4}
  return %y, %last
}
"""  # noqa: E501
AFTER = """graph @f(%state: f32[b, 4, 5], %q: f32[s, b, 4], %k: f32[s, b, 4], %v: f32[s, b, 5], %g: f32[s, b]) {
  %transpose: f32[b, s, 4] = transpose(%q) {perm=(1, 0, 2)}
  %reshape_2: f32[b, s, 1, 4] = reshape(%transpose) {shape=(b, s, 1, 4)}
  %transpose_1: f32[b, s, 4] = transpose(%k) {perm=(1, 0, 2)}
  %reshape_5: f32[b, s, 1, 4] = reshape(%transpose_1) {shape=(b, s, 1, 4)}
  %transpose_2: f32[b, s, 5] = transpose(%v) {perm=(1, 0, 2)}
  %reshape_8: f32[b, s, 1, 5] = reshape(%transpose_2) {shape=(b, s, 1, 5)}
  %transpose_3: f32[b, s] = transpose(%g) {perm=(1, 0)}
  %reshape_11: f32[b, s, 1] = reshape(%transpose_3) {shape=(b, s, 1)}
  %reshape_1: f32[1, 1, 1] = constant() {value=dense<f32[1, 1, 1], 1.0>}
  %reshape_12: f32[b, s, 1] = broadcast_to(%reshape_1) {shape=(b, s, 1)}
  %reshape_14: f32[b, 1, 4, 5] = reshape(%state) {shape=(b, 1, 4, 5)}
  %linear_attention: f32[b, s, 1, 5], %linear_attention_1: f32[b, 1, 4, 5] = linear_attention(%reshape_2, %reshape_5, %reshape_8, %reshape_14, %reshape_11, %reshape_12) {rule="gated_delta", log=false}
  %reshape_15: f32[b, 4, 5] = reshape(%linear_attention_1) {shape=(b, 4, 5)}
  %reshape_17: f32[b, s, 5] = reshape(%linear_attention) {shape=(b, s, 5)}
  %transpose_6: f32[s, b, 5] = transpose(%reshape_17) {perm=(1, 0, 2)}
  return y=%transpose_6, last=%reshape_15
}
"""  # noqa: E501


def run(text: str) -> tuple[Program, Program, list[str]]:
    program, other = Program({"forward": parse(text)}), Program({"forward": parse(text)})
    report = PassManager([FuseRecurrence(), Cleanup()]).run(other)
    return program, other, [r.message for r in report.remarks("missed")]


def test_text() -> None:
    program, other, remarks = run(BEFORE)
    assert str(other["forward"]).strip() == AFTER.strip()
    assert remarks == []
    rng = np.random.default_rng(0)
    for b, s in ((2, 5), (1, 0)):
        shapes = {"state": (b, 4, 5), "q": (s, b, 4), "k": (s, b, 4), "v": (s, b, 5), "g": (s, b)}
        feed = {n: rng.standard_normal(x).astype(np.float32) for n, x in shapes.items()}
        for name, want in ws.run(program, **feed).items():
            np.testing.assert_allclose(ws.run(other, **feed)[name], want, rtol=1e-5, atol=1e-5)


# -- near misses ---------------------------------------------------------------------------------------------------------------
def misses(text: str = "", step: Step | None = None, operands: Mapping[str, str] = QKV, **how: Any) -> list[str]:
    """The reasons why a scan stays as it is, which it has to."""
    program = traced(step, operands, how.get("state", "b h d e")) if step is not None else Program({"forward": parse(text)})
    before = str(program)
    report = PassManager([FuseRecurrence()]).run(program)
    assert str(program) == before
    return [r.message for r in report.remarks("missed")]


EDITS = {
    "erases before it decays": ([("matmul(%row, %kept)", "matmul(%row, %s)")], "it erases what is not decayed first"),
    "does not keep the state": ([("add(%kept, %write)", "add(%write, %write)")], "it keeps the state by 0 products"),
    "keeps the state twice": (
        [("%next: f32[b, 4, 5] = add(%kept, %write)", "%a2: f32[b, 4, 5] = add(%kept, %s)\n    "
          "%next: f32[b, 4, 5] = add(%a2, %write)")], "it keeps the state by 2 products, not one",
    ),
    "writes nothing": ([("%column, %new", "%column, %read")], "it writes to the state by 0 products"),
    "writes what it reads only": ([("sub(%value, %read)", "sub(%read, %read)")], "it writes to the state by 0 products"),
    "erases by another key": ([("reshape(%k) {shape=(b, 1, 4)}", "reshape(%q) {shape=(b, 1, 4)}")], "by another key"),
    "from the end": ([("slices=4}", "slices=4, reverse=true}")], "it runs from the end"),
    "reads all": ([("%query, %next", "%query, %next"), ("%out: f32[b, 5] = reshape(%y) {shape=(b, 5)}",
                   "%out: f32[b] = reduce_sum(%y) {axes=(1, 2)}"), ("%y: f32[s, b, 5] =", "%y: f32[s, b] =")],
                  "summed over 2 axes of the state"),
    "returns every state": ([("return %next, %out", "return %next, y=%next"), ("%y: f32[s, b, 5] =", "%y: f32[s, b, 4, 5] =")],
                            "summed over 0 axes of the state"),
    "reads both states": ([("matmul(%query, %next)", "matmul(%query, %both)"), ("%query: f32[b, 1, 4]",
                          "%both: f32[b, 4, 5] = add(%next, %s)\n    %query: f32[b, 1, 4]")], "reads the state by 2 products"),
    "reads along another axis": (
        [("%query: f32[b, 1, 4] = reshape(%q) {shape=(b, 1, 4)}", "%query: f32[b, 5, 1] = reshape(%v) {shape=(b, 5, 1)}"),
         ("%y: f32[b, 1, 5] = matmul(%query, %next)", "%y: f32[b, 4, 1] = matmul(%next, %query)"),
         ("%out: f32[b, 5] = reshape(%y) {shape=(b, 5)}", "%out: f32[b, 4] = reshape(%y) {shape=(b, 4)}"),
         ("%y: f32[s, b, 5] =", "%y: f32[s, b, 4] =")], "it erases along another axis of the state than it is read along",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edits, reason", EDITS.values(), ids=EDITS)
def test_near_miss_is_left_alone(edits: list[tuple[str, str]], reason: str) -> None:
    text = BEFORE
    for old, new in edits:
        assert text.count(old) == 1
        text = text.replace(old, new)
    [missed] = misses(text)
    assert reason in missed


def test_of_which_axes() -> None:
    def each(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        """Mamba's: every element decays by itself."""
        S = S * nn.exp(columns(q) * rows(v)) + columns(k) * rows(v)
        return S, (S * columns(q)).sum(-2)

    def values(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        S = S * nn.sigmoid(rows(v)) + columns(k) * rows(v)
        return S, (S * columns(q)).sum(-2)

    def matrix(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        S = S + nn.tanh(columns(k) * rows(v))
        return S, (S * columns(q)).sum(-2)

    for step in (each, values, matrix):
        [missed] = misses(step=step)
        assert "no axis of the state is one of values" in missed


def test_rates() -> None:
    def undamped(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, beta: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        S = S - columns(k) * rows((S * columns(k)).sum(-2)) * beta[..., None, None] + columns(k) * rows(v)
        return S, (S * columns(q)).sum(-2)

    [missed] = misses(step=undamped, operands={**QKV, "beta": "b s h"})
    assert "what it writes does not have the rate by which it erases" in missed

    def decayed_after(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        S = columns(q) * (S - columns(k) * rows((S * columns(k)).sum(-2))) + columns(k) * rows(v)
        return S, (S * columns(q)).sum(-2)

    def written_elsewhere(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        S = S - columns(k) * rows((S * columns(k)).sum(-2)) + columns(q) * rows(v)
        return S, (S * columns(q)).sum(-2)

    [missed] = misses(step=written_elsewhere)
    assert "it erases by another key than it writes" in missed

    def summed_up(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        S = S + columns(k) * rows(v)
        return S, (columns((S * columns(q)).sum(-2)) * rows(k)).sum(-1)

    [missed] = misses(step=summed_up)
    assert "what it reads is summed over something else, too" in missed
    [missed] = misses(step=decayed_after)
    assert "it erases what is not decayed first" in missed


def test_what_is_no_recurrence_of_this_kind_leaves_no_remark() -> None:
    def bounded(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        S = nn.tanh(S + columns(k) * rows(v))
        return S, (S * columns(q)).sum(-2)

    def squared(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        S = S * S + columns(k) * rows(v)
        return S, (S * columns(q)).sum(-2)

    assert [misses(step=bounded), misses(step=squared)] == [[], []]


def test_keys_that_are_normalized_before_the_turns() -> None:
    class Normalized(Recurrence):
        def __call__(self, **given: nn.Tensor) -> Any:
            return super().__call__(**{**given, "k": nn.normalize(given["k"], axis=-1)})

    types = {n: "f32[" + ", ".join(map(str, shape(axes))) + "]" for n, axes in QKV.items()}
    program = nn.trace(Normalized(normalized, "b h d e"), types)
    fused, _ = ws.optimize(program, kv_cache=False)
    found = [n.attrs for n in fused["forward"].nodes if isinstance(n.attrs, LinearAttentionAttrs)]
    assert found == [LinearAttentionAttrs("delta", before=True)]
    same(program, fused, QKV)


def test_integers_are_left_alone() -> None:
    assert misses(BEFORE.replace("f32", "i32")) == []


def test_what_is_the_same_for_an_unknown_number_of_features_is_not_counted() -> None:
    text = BEFORE.replace("[b, 4", "[b, d").replace("[s, b, 4", "[s, b, d").replace("1, 4]", "1, d]").replace("1, 4)", "1, d)")
    text = text.replace("(b, 4,", "(b, d,")
    old = "%y: f32[b, 1, 5] = matmul(%query, %next)"
    wide = """%column_1: f32[b, d, 1] = reshape(%q) {shape=(b, d, 1)}
    %each: f32[b, d, 5] = mul(%column_1, %next)
    %more: f32[b, d, 5] = add(%each, %value)
    %y: f32[b, 1, 5] = reduce_sum(%more) {axes=(1,), keepdims=true}"""
    assert text.count(old) == 1
    assert misses(text.replace(old, wide)) == []


def test_turns_that_cannot_be_taken_at_once() -> None:
    def nested(S: nn.Tensor, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        _, k = nn.scan(lambda c, x: (nn.tanh(c + x), c), nn.full((v.shape[0], 3), 0.0), k.transpose(2, 0, 1))
        S = S + columns(k.transpose(1, 2, 0)) * rows(v)
        return S, (S * columns(q)).sum(-2)

    [missed] = misses(step=nested)
    assert "cannot be computed for all turns at once" in missed


def test_two_states() -> None:
    def twice(q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> Any:
        def step(c: Any, x: Any) -> Any:
            S, z = c[0] + columns(x[1]) * rows(x[2]), c[1] + x[1]
            return (S, z), (S * columns(x[0])).sum(-2) / (z * x[0]).sum(-1, keepdims=True)

        b = q.shape[0]
        start = nn.full((b, 3, 4, 5), 0.0), nn.full((b, 3, 4), 1.0)
        return nn.scan(step, start, tuple(x.transpose(1, 0, 2, 3) for x in (q, k, v)))[1]

    class Twice(nn.Module):
        def __call__(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> Any:
            return twice(q, k, v)

    program = nn.trace(Twice(), {"q": "f32[b, s, 3, 4]", "k": "f32[b, s, 3, 4]", "v": "f32[b, s, 3, 5]"})
    [missed] = PassManager([FuseRecurrence()]).run(program).remarks("missed")
    assert "it carries 2 values" in missed.message


def test_a_vector_for_each_row_leaves_no_remark() -> None:
    class Average(nn.Module):
        def __call__(self, x: nn.Tensor) -> nn.Tensor:
            return nn.scan(lambda h, n: (h * 0.5 + n, h), nn.full((x.shape[0], 8), 0.0), x.transpose(1, 0, 2))[1]

    program = nn.trace(Average(), {"x": "f32[b, s, 8]"})
    before = str(program)
    assert PassManager([FuseRecurrence()]).run(program).remarks() == []
    assert str(program) == before


# -- random turns --------------------------------------------------------------------------------------------------------------
POOL = {**QKV, "k2": "b s h d", "v2": "b s h e", "g": "b s h", "w": "b s h d", "u": "b s h e", "beta": "b s h"}


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_random_turns(data: st.DataObject) -> None:
    """What is done to the state at random, in random spellings: if it is recognized, it means the same."""

    def pick(*choices: Any) -> Any:
        return data.draw(st.sampled_from(choices))

    decay, late = pick("", "g", "w", "u", "number"), pick(False, False, True)
    key, other, rate, wrong = pick("k", "k2"), pick("k", "k", "k2"), pick("", "beta", "g"), pick("beta", "", "g")
    erases, writes, by_matrix = pick(False, True, True), pick(1, 1, 2), pick(False, True)
    before, bonus, gate, scale = pick(False, True), pick(False, True), pick(False, True), pick(1.0, -0.5)

    def step(S: nn.Tensor, *given: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        x = dict(zip(POOL, given))
        column, row = {n: columns(x[n]) for n in ("q", "k", "k2", "w")}, {n: rows(x[n]) for n in ("v", "v2", "u")}

        def decayed(S: nn.Tensor) -> nn.Tensor:
            if decay == "g":
                return nn.exp(x["g"])[..., None, None] * S
            if decay == "number":
                return S * 0.75
            return S * column["w"] if decay == "w" else S * row["u"] if decay == "u" else S

        def rated(y: nn.Tensor, by: str) -> nn.Tensor:
            return y * x[by][..., None] if by else y

        old, value = S, x["v"]
        S = S if late else decayed(S)
        if erases:
            held = (columns(x[other]).swap(2, 3) @ S)[..., 0, :] if by_matrix else (S * column[other]).sum(-2)
            erased = column[key] * rows(rated(held, rate))
            S = S - erased
            value = rated(value, pick(rate, rate, wrong))
        S = decayed(S) if late else S
        for n in range(writes):
            S = S + (column[key] @ rows(value) if by_matrix else column[key] * rows(value) * (n + 1.0))
        y = ((old if before else S) * column["q"]).sum(-2) * scale
        y = y + (x["q"] * x["k2"]).sum(-1, keepdims=True) * x["v2"] if bonus else y
        return S, y * nn.silu(x["v2"]) if gate else y

    program = traced(step, POOL, "b h d e")
    fused = Program(dict(program.graphs))
    fused.graphs["forward"] = program["forward"].clone()
    report = PassManager([Cleanup(), FuseRecurrence()]).run(fused)
    if report.remarks("applied") and any(n.op.name == "linear_attention" for n in fused["forward"].nodes):
        feed = fed(POOL, 2, 5)
        for name, want in ws.run(program, **feed).items():
            np.testing.assert_allclose(ws.run(fused, **feed)[name], want, rtol=1e-4, atol=1e-5)
    else:
        assert any("turn by turn" in r.message for r in report.remarks("missed"))
