"""Linear attention by blocks of tokens: against its definition, in f64, beyond a block; and its gradients, compiled."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.ir import Builder, DType, Graph, Program, TensorType, evaluate, parse_program, symbol
from wasat.ir.ops.linear_attention import LinearAttention, LinearAttentionAttrs
from wasat.ir.ops.linear_blocks import TOKENS
from wasat.ir.vjp import backward

RULES = {"linear": "", "gated": "a", "delta": "r", "gated_delta": "ar"}


def drawn(attrs: LinearAttentionAttrs, s: int, b: int = 2) -> dict[str, np.ndarray]:
    """Operands; the keys of the second half are one and the same, some decays are 0, factors are negative, too."""
    rng = np.random.default_rng(s)
    feed = {"q": rng.standard_normal((b, s, 4, 5)), "k": rng.standard_normal((b, s, 2, 5))}
    feed["k"] /= np.linalg.norm(feed["k"], axis=-1, keepdims=True)
    feed["k"][:, s // 2 :] = feed["k"][:, s // 2 : s // 2 + 1]
    feed |= {"v": rng.standard_normal((b, s, 2, 3)), "state": rng.standard_normal((b, 2, 5, 3))}
    if attrs.gated:
        feed["a"] = rng.uniform(-1, 0 if attrs.log else 1, (b, s, 2))
        feed["a"][rng.uniform(size=feed["a"].shape) < 0.1] = -np.inf if attrs.log else 0
    if attrs.delta:
        feed["r"] = rng.uniform(0, 2, (b, s, 2))
    return feed


def graph_of(feed: dict[str, np.ndarray], symbolic: bool, dtype: DType) -> tuple[Graph, Builder]:
    g = Graph("forward")
    for name, x in feed.items():
        shape = tuple(symbol("s") if symbolic and i == 1 and name != "state" else d for i, d in enumerate(x.shape))
        g.add_input(name, TensorType(dtype, shape))
    return g, Builder(g)


@pytest.mark.parametrize("rule, before, log", product(RULES, (False, True), (True, False)))
def test_equals_the_recurrence(rule: str, before: bool, log: bool) -> None:
    attrs, op = LinearAttentionAttrs(rule, 0.7, log, before), LinearAttention()
    for s, symbolic in ((2, False), (TOKENS - 1, True), (TOKENS, False), (2 * TOKENS + 6, True)):
        feed = drawn(attrs, s)
        g, b = graph_of(feed, symbolic, DType.F64)
        g.set_outputs(list(op.decompose(b, attrs, *g.inputs)))
        for got, want in zip(evaluate(g, feed), op.reference(attrs, *feed.values())):
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


def test_a_sequence_of_no_tokens() -> None:
    attrs = LinearAttentionAttrs("gated")
    feed = {name: x[:, :0] if name != "state" else x for name, x in drawn(attrs, 2).items()}
    g, b = graph_of(feed, True, DType.F64)
    g.set_outputs(list(LinearAttention().decompose(b, attrs, *g.inputs)))
    y, last = evaluate(g, feed)
    assert y.shape == (2, 0, 4, 3)
    np.testing.assert_array_equal(last, feed["state"])


def gradients(rule: str, blocks: bool, feed: dict[str, np.ndarray]) -> tuple[Graph, dict[str, np.ndarray]]:
    """A graph of the gradients of all operands, and what it is fed."""
    dtype = DType.F64 if feed["q"].dtype == np.float64 else DType.F32
    g, b = graph_of(feed, True, dtype)
    operands = list(g.inputs)
    grad = g.add_input("grad", TensorType(dtype, (2, symbol("s"), 4, 3)))
    attrs = LinearAttentionAttrs(rule, 0.7)
    y, _ = b.linear_attention(*operands, rule=rule, scale=0.7) if blocks else LinearAttention().turns(b, attrs, *operands)
    g.set_outputs([v for v in backward(b, [y], [grad], operands) if v is not None], list(feed))
    s = feed["q"].shape[1]
    return g, feed | {"grad": np.cos(np.arange(2 * s * 12)).reshape(2, s, 4, 3).astype(feed["q"].dtype)}


@pytest.mark.parametrize("rule", RULES)
def test_gradients(rule: str) -> None:
    feed = drawn(LinearAttentionAttrs(rule), TOKENS + 5)
    got, want = (evaluate(*gradients(rule, blocks, feed)) for blocks in (True, False))
    for name, x, y in zip(feed, got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
def test_gradients_compiled(rule: str) -> None:
    """Over blocks, of a length that is known when it runs, beside those over tokens in the interpreter."""
    feed = {name: x.astype(np.float32) for name, x in drawn(LinearAttentionAttrs(rule), TOKENS + 5).items()}
    g, given = gradients(rule, True, feed)
    got = Runner(Program({"forward": g}), cpu(threads=1))("forward", given)
    for (name, x), want in zip(got.items(), evaluate(*gradients(rule, False, feed)), strict=True):
        np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-5 * float(np.abs(want).max()), err_msg=name)


def test_a_loop_over_blocks_of_a_sequence_compiles() -> None:
    """Its length is a quotient of a size that nothing else in a turn names."""
    program = parse_program("""graph @forward(%x: f32[s, 3], %h: f32[4, 3]) {
      %p: f32[-(-s // 4) * 4, 3] = pad(%x) {low=(0, 0), high=(-(-s // 4) * 4 - s, 0)}
      %r: f32[-(-s // 4), 4, 3] = reshape(%p) {shape=(-(-s // 4), 4, 3)}
      %last: f32[4, 3], %y: f32[-(-s // 4), 4, 3] = scan(%h, %r) {body=graph @turn(%h: f32[4, 3], %x: f32[4, 3]) {
        %z: f32[4, 3] = mul(%h, %x)
        return %z, %h
      }, carries=1, slices=1}
      return %last, %y
    }""")
    feed = {"x": np.linspace(-1, 1, 21, dtype=np.float32).reshape(7, 3), "h": np.ones((4, 3), np.float32)}
    got = Runner(program, cpu(threads=1))("forward", feed)
    for x, want in zip(got.values(), evaluate(program["forward"], feed), strict=True):
        np.testing.assert_allclose(x, want, rtol=1e-6)
