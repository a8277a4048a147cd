"""Mixtures of experts in the spellings that people write: all become grouped products that mean the same; near misses stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_allclose
from wasat.frontend import nn
from wasat.ir import Program, evaluate, parse, parse_program, symbol, verify
from wasat.passes import FuseExperts, PassManager, default_pipeline
from wasat.passes.cleanup.rows_apart import rows_apart

import wasat as ws
from wasat.testing import InterpreterCheck, check_pass, feed

DIM, HIDDEN, E, K = 6, 10, 5, 2


class Experts(nn.Module):
    """Weights of experts; ``formula`` says what is made of them and x [b, s, dim]."""

    def __init__(self, formula: Callable[[Experts, nn.Tensor], nn.Tensor]) -> None:
        self.router = nn.Linear(DIM, E)
        self.gate, self.up = nn.Parameter((E, HIDDEN, DIM), std=0.5), nn.Parameter((E, HIDDEN, DIM), std=0.5)
        self.down = nn.Parameter((E, DIM, HIDDEN), std=0.5)
        self.gate_up, self.out = nn.Parameter((E, DIM, 2 * HIDDEN), std=0.5), nn.Parameter((E, HIDDEN, DIM), std=0.5)
        self.gate_up_bias, self.out_bias = nn.Parameter((E, 2 * HIDDEN), std=0.5), nn.Parameter((E, DIM), std=0.5)
        self.formula = formula

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return self.formula(self, x)

    def choice(self, x: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        best, which = nn.top_k(self.router(x), K)
        return nn.softmax(best), which

    def mask(self, x: nn.Tensor) -> nn.Tensor:
        return nn.one_hot(self.choice(x)[1], E).sum(-2)

    def share(self, x: nn.Tensor) -> nn.Tensor:
        share, which = self.choice(x)
        return (nn.one_hot(which, E) * share[..., None]).sum(-2)

    def hidden(self, x: nn.Tensor) -> nn.Tensor:
        """[b, s, e, h] of all experts."""
        gate, up = (nn.einsum("b s d, e h d -> b s e h", x, w) for w in (self.gate, self.up))
        return nn.silu(gate) * up


def with_share(make: Callable[[Experts, nn.Tensor], nn.Tensor]) -> Callable[[Experts, nn.Tensor], nn.Tensor]:
    """All experts, weighted by a share [b, s, e]."""
    return lambda m, x: nn.einsum("b s e h, e d h, b s e -> b s d", m.hidden(x), m.down, make(m, x))


def scattered(m: Experts, x: nn.Tensor) -> nn.Tensor:
    share, which = m.choice(x)
    return nn.emit("scatter_along", nn.zeros_like(m.router(x)), which, share, axis=-1)


def renormalized(m: Experts, x: nn.Tensor) -> nn.Tensor:
    share = nn.softmax(m.router(x)) * m.mask(x)
    return share / share.sum(-1, keepdims=True)


def masked_softmax(m: Experts, x: nn.Tensor) -> nn.Tensor:
    return nn.softmax(nn.where(m.mask(x) > 0.0, m.router(x), -np.inf))


def compared(m: Experts, x: nn.Tensor) -> nn.Tensor:
    share, which = m.choice(x)
    return (nn.where(which[..., None] == nn.arange(E), share[..., None], 0.0)).sum(-2)


def after_down(m: Experts, x: nn.Tensor) -> nn.Tensor:
    return (nn.einsum("b s e h, e d h -> b s e d", m.hidden(x), m.down) * m.share(x)[..., None]).sum(-2)


def before_down(m: Experts, x: nn.Tensor) -> nn.Tensor:
    return nn.einsum("b s e h, e d h -> b s d", m.hidden(x) * m.share(x)[..., None], m.down)


def dispatched(m: Experts, x: nn.Tensor) -> nn.Tensor:
    """Each expert gets its tokens, and zeros in the place of others."""
    own = nn.einsum("b s e, b s d -> e b s d", m.mask(x), x)
    gate, up = (nn.einsum("e b s d, e h d -> e b s h", own, w) for w in (m.gate, m.up))
    y = nn.einsum("e b s h, e d h -> e b s d", nn.silu(gate) * up, m.down)
    return nn.einsum("e b s d, b s e -> b s d", y, m.share(x))


def clamped(up_gate: nn.Tensor) -> nn.Tensor:
    """gpt-oss: of pairs, the gate clamped from above, the other from both sides."""
    gate, up = nn.minimum(up_gate[..., ::2], 7.0), nn.clip(up_gate[..., 1::2], -7.0, 7.0)
    return (up + 1.0) * gate * nn.sigmoid(gate * 1.702)


def repeated_tokens(m: Experts, x: nn.Tensor) -> nn.Tensor:
    """gpt-oss as it was written first: x repeated for each expert, batched products, biases."""
    b, s, _ = x.shape
    flat = x.reshape(1, b * s, DIM).broadcast_to(E, b * s, DIM)
    y = clamped(flat @ m.gate_up + m.gate_up_bias[:, None]) @ m.out + m.out_bias[:, None]
    share = scattered(m, x).reshape(b * s, E).transpose(1, 0)[..., None]
    return (y * share).sum(0).reshape(b, s, DIM)


def wide(m: Experts, x: nn.Tensor) -> nn.Tensor:
    """One product for all experts, with a bias."""
    y = nn.linear(x, m.gate_up.transpose(0, 2, 1).reshape(-1, DIM), m.gate_up_bias.reshape(-1))
    y = clamped(y.reshape(*x.shape[:-1], E, 2 * HIDDEN))
    return nn.einsum("b s e h, e h d, b s e -> b s d", y, m.out, m.share(x))


def gathered(m: Experts, x: nn.Tensor) -> nn.Tensor:
    share, which = m.choice(x)
    gate, up, down = (nn.gather(w, which) for w in (m.gate, m.up, m.down))
    h = nn.silu(nn.einsum("b s d, b s k h d -> b s k h", x, gate)) * nn.einsum("b s d, b s k h d -> b s k h", x, up)
    return nn.einsum("b s k h, b s k d h, b s k -> b s d", h, down, share)


def gathered_rows(m: Experts, x: nn.Tensor) -> nn.Tensor:
    """transformers' batched form: one row for each token and expert."""
    b, s, _ = x.shape
    share, which = m.choice(x)
    which = which.reshape(-1)
    rows = x.reshape(b * s, 1, DIM).broadcast_to(b * s, K, DIM).reshape(-1, 1, DIM)
    y = (rows @ nn.gather(m.gate_up, which)).reshape(-1, 2 * HIDDEN) + nn.gather(m.gate_up_bias, which)
    y = (clamped(y)[:, None] @ nn.gather(m.out, which)).reshape(-1, DIM) + nn.gather(m.out_bias, which)
    return (y * share.reshape(-1, 1)).reshape(b, s, K, DIM).sum(2)


def gathered_sums(m: Experts, x: nn.Tensor) -> nn.Tensor:
    """Products written as sums, and one expert for each token."""
    which = nn.argmax(m.router(x), -1)
    h = nn.relu((nn.gather(m.up, which) * x[..., None, :]).sum(-1))
    return (nn.gather(m.down, which) * h[..., None, :]).sum(-1)


SPELLINGS: dict[str, tuple[Callable[[Experts, nn.Tensor], nn.Tensor], int]] = {
    "shares from one-hots": (with_share(Experts.share), 3),
    "shares scattered": (with_share(scattered), 3),
    "shares renormalized": (with_share(renormalized), 3),
    "shares as a masked softmax": (with_share(masked_softmax), 3),
    "shares by comparison": (with_share(compared), 3),
    "shares of some tokens": (with_share(lambda m, x: nn.where(x[..., :1] > 0.0, m.share(x), 0.0)), 3),
    "shares times a mask": (with_share(lambda m, x: nn.sigmoid(m.router(x)) * (m.mask(x) * 2.0)), 3),
    "shares after the products": (after_down, 3),
    "shares before the last product": (before_down, 3),
    "dispatch": (dispatched, 3),
    "tokens repeated": (repeated_tokens, 2),
    "one wide product": (wide, 2),
    "weights gathered": (gathered, 3),
    "weights gathered for rows": (gathered_rows, 2),
    "weights gathered, sums": (gathered_sums, 2),
}


def traced(formula: Callable[[Experts, nn.Tensor], nn.Tensor]) -> Program:
    return nn.trace(Experts(formula), {"x": f"f32[b, s, {DIM}]"}, outputs=["y"])


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_becomes_grouped_products(name: str) -> None:
    formula, products = SPELLINGS[name]
    program = traced(formula)
    fused, report = ws.optimize(program, kv_cache=False)
    g = fused["forward"]
    assert not [r for r in report.remarks("missed") if "experts" in r.message], report.explain("missed")
    assert sum(n.op.name == "grouped_linear" for n in g.nodes) in (products, products - 1)  # gate and up may be one
    assert not [n for n in g.nodes if n.op.kind == "product" and str(E * HIDDEN) in str(n.output.type)]
    if name in ("shares from one-hots", "shares scattered", "shares before the last product"):  # they are known as they were
        assert not g.count("take_along") + g.count("one_hot") + g.count("scatter_along")
    for b, s in ((2, 3), (1, 1), (3, 17)):
        x = np.random.default_rng(b).normal(size=(b, s, DIM)).astype(np.float32)
        assert_allclose(ws.run(fused, x=x)["y"], ws.run(program, x=x)["y"], rtol=1e-4, atol=1e-5)


class Exported(nn.Module):
    """A decoder whose router and experts take batch and sequence as one axis, as transformers' do."""

    def __init__(self) -> None:
        self.embed, self.attention = nn.Embedding(20, DIM), nn.Attention(DIM, 1, rope=nn.RoPE(DIM))
        self.experts, self.head = Experts(self.rows), nn.Linear(DIM, 20)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x, nn.positions(x))
        return self.head(x + self.experts(x))

    @staticmethod
    def rows(m: Experts, x: nn.Tensor) -> nn.Tensor:
        flat = x.reshape(-1, DIM)
        share, which = nn.top_k(nn.softmax(m.router(flat)), K)
        share, which = share / share.sum(-1, keepdims=True), which.reshape(-1)
        rows = flat.reshape(-1, 1, DIM).broadcast_to(flat.shape[0], K, DIM).reshape(-1, 1, DIM)
        y = (rows @ nn.gather(m.gate_up, which)).reshape(-1, 2 * HIDDEN) + nn.gather(m.gate_up_bias, which)
        y = (clamped(y)[:, None] @ nn.gather(m.out, which)).reshape(-1, DIM) + nn.gather(m.out_bias, which)
        return (y * share.reshape(-1, 1)).reshape(-1, K, DIM).sum(1).reshape(*x.shape)


def test_merged_rows_get_a_cache() -> None:
    program = nn.trace(Exported(), {"tokens": "i64[b, s]"}, outputs=["logits"])
    check = InterpreterCheck([{"b": 1, "s": 3, "c": 16}, {"b": 2, "s": 5, "c": 16}], rtol=1e-4, atol=1e-5)
    PassManager(default_pipeline(chunk=8), check=check).run(program)
    assert program["decode"].count("grouped_linear") == program["prefill"].count("grouped_linear") == 2


class Modules(nn.Module):
    """Experts as modules in a list, in a loop."""

    def __init__(self, bias: bool, count: int = E) -> None:
        self.router = nn.Linear(DIM, count)
        self.experts = nn.ModuleList([nn.GLU(DIM, HIDDEN, bias=bias) for _ in range(count)])

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        count = len(self.experts)
        best, which = nn.top_k(self.router(x), count // 2)
        share = (nn.one_hot(which, count) * nn.sigmoid(best)[..., None]).sum(-2)
        y = x
        for e in range(count):
            y = y + share[..., e : e + 1] * self.experts[e](x)
        return y


class Unlike(Modules):
    """One expert is another formula."""

    def __init__(self) -> None:
        super().__init__(False)
        self.other = nn.MLP(DIM, HIDDEN, bias=False)
        self.experts = nn.ModuleList([self.other if e == 2 else nn.GLU(DIM, HIDDEN) for e in range(E)])


@pytest.mark.parametrize(("bias", "count"), [(False, E), (True, E), (False, 2)])
def test_experts_in_a_loop(bias: bool, count: int) -> None:
    program = nn.trace(Modules(bias, count), {"x": f"f32[b, s, {DIM}]"}, outputs=["y"])
    fused, report = ws.optimize(program, kv_cache=False)
    assert fused["forward"].count("grouped_linear") == 2, report.explain()
    assert fused["forward"].count("linear") == 1
    x = np.random.default_rng(1).normal(size=(2, 9, DIM)).astype(np.float32)
    assert_allclose(ws.run(fused, x=x)["y"], ws.run(program, x=x)["y"], rtol=1e-4, atol=1e-5)


class AllOf(Modules):
    """Shares of which none is zero."""

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        share = nn.softmax(self.router(x)) + nn.top_k(self.router(x), K)[0].sum(-1, keepdims=True)
        return sum((share[..., e : e + 1] * self.experts[e](x) for e in range(1, E)), share[..., :1] * self.experts[0](x))


def test_experts_in_a_loop_that_are_all_wanted_stay() -> None:
    program = nn.trace(AllOf(False), {"x": f"f32[b, s, {DIM}]"}, outputs=["y"])
    after, report = ws.optimize(program, kv_cache=False)
    assert not after["forward"].count("grouped_linear")
    assert [r for r in report.remarks("missed") if f"all {E} experts are computed" in r.message], report.explain("missed")


def test_experts_that_stay_f32_are_named() -> None:
    class Large(Experts):
        def __init__(self) -> None:
            super().__init__(with_share(thresholded))
            self.up = nn.Parameter((E, HIDDEN, DIM))
            self.wide = nn.Parameter((E, 40, 64))

        def __call__(self, x: nn.Tensor) -> nn.Tensor:
            every = nn.einsum("b s e, e n k -> b s e n", thresholded(self, x), self.wide)
            return super().__call__(x) + every.sum((2, 3))[..., None]

    program = nn.trace(Large(), {"x": f"f32[b, s, {DIM}]"}, outputs=["y"])
    _, report = ws.optimize(program, kv_cache=False, quantize="int8")
    assert [r for r in report.remarks("missed") if r.message.startswith("%wide stays f32")], report.explain("missed")


def test_experts_in_a_loop_that_differ_stay() -> None:
    program = nn.trace(Unlike(), {"x": f"f32[b, s, {DIM}]"}, outputs=["y"])
    after, report = ws.optimize(program, kv_cache=False)
    assert not after["forward"].count("grouped_linear")
    assert [r for r in report.remarks("missed") if "another expert" in r.message], report.explain("missed")


ROWS = """
graph @g(%x: f32[b, s, 4], %y: f32[b*s, 4]) {
  %flat: f32[b*s, 4] = reshape(%x) {shape=(b*s, 4)}
  <node>
  return %z
}"""


@pytest.mark.parametrize(
    ("node", "apart"),
    [
        ("%z: f32[b*s, 4] = softmax(%flat) {axis=1}", True),
        ("%z: f32[b*s] = reduce_sum(%flat) {axes=(1,)}", True),
        ("%z: f32[b*s, 2] = slice(%flat) {starts=(0, 1), stops=(b*s, 3)}", True),
        ("%z: f32[b*s, 4] = softmax(%flat) {axis=0}", False),
        ("%z: f32[b*s, 4] = cumsum(%flat) {axis=0}", False),
        ("%z: f32[4] = reduce_sum(%flat) {axes=(0,)}", False),
        ("%z: f32[b*s, 4] = reverse(%flat) {axes=(0,)}", False),
        ("%z: f32[b*s, 4] = add(%flat, %y)", False),
    ],
)
def test_rows_are_apart_where_they_are_rows(node: str, apart: bool) -> None:
    program = parse_program(ROWS.replace("<node>", node))
    dims = {"b": 2, "s": 3}
    given = feed(program["g"], dims)
    want = evaluate(program["g"], given)
    assert rows_apart(program["g"]) is apart
    verify(program["g"])
    assert any(v.shape[:1] == (symbol("b"),) and v.node.op.name != "reshape" for v in program["g"].values() if v.node) is apart
    for got, w in zip(evaluate(program["g"], given), want):
        assert_allclose(np.asarray(got), np.asarray(w), rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, E])
@pytest.mark.parametrize("name", ["shares from one-hots", "shares scattered", "dispatch", "shares before the last product"])
def test_one_and_all_of_them(name: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "K", k)
    program = traced(SPELLINGS[name][0])
    fused, _ = ws.optimize(program, kv_cache=False)
    assert fused["forward"].count("grouped_linear") >= 2
    x = np.random.default_rng(1).normal(size=(2, 9, DIM)).astype(np.float32)
    assert_allclose(ws.run(fused, x=x)["y"], ws.run(program, x=x)["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["mul", "max", "min"])
def test_shares_that_met_zeros(how: str) -> None:
    """A scatter that multiplies or compares with what is there."""

    def share(m: Experts, x: nn.Tensor) -> nn.Tensor:
        scores = m.router(x)
        best, which = nn.top_k(scores, K)
        return nn.emit("scatter_along", nn.zeros_like(scores), which, best, axis=-1, reduce=how)

    program = traced(with_share(share))
    fused, _ = ws.optimize(program, kv_cache=False)
    x = np.random.default_rng(1).normal(size=(2, 9, DIM)).astype(np.float32)
    assert_allclose(ws.run(fused, x=x)["y"], ws.run(program, x=x)["y"], rtol=1e-4, atol=1e-5)


def test_experts_in_groups_are_all_computed() -> None:
    """The hidden values in two groups of experts: the axis is not one any more. All are chosen, so that sizes fit."""

    class Groups(nn.Module):
        def __init__(self) -> None:
            self.router, self.w = nn.Linear(DIM, 4), nn.Parameter((4, 3, DIM), std=0.5)

        def __call__(self, x: nn.Tensor) -> nn.Tensor:
            best, which = nn.top_k(self.router(x), 4)
            share = (nn.one_hot(which, 4) * nn.sigmoid(best)[..., None]).sum(-2)
            y = nn.einsum("t d, e n d -> t e n", x, self.w).reshape(-1, 2, 2, 3)
            y = (y * nn.sigmoid(y)).reshape(-1, 4, 3)
            return (y * share[..., None]).sum(-2)

    program = nn.trace(Groups(), {"x": f"f32[t, {DIM}]"}, outputs=["y"])
    after, _ = ws.optimize(program, kv_cache=False)
    x = np.random.default_rng(1).normal(size=(9, DIM)).astype(np.float32)
    assert_allclose(ws.run(after, x=x)["y"], ws.run(program, x=x)["y"], rtol=1e-4, atol=1e-5)


def test_text_in_text_out() -> None:
    before = """
graph @g(%x: f32[t, 6], %r: f32[t, 5]) {
  param %w: f32[5, 4, 6]
  %best: f32[t, 2], %which: i64[t, 2] = top_k(%r) {k=2, axis=1}
  %own: f32[t, 2, 4, 6] = gather(%w, %which)
  %rows: f32[t, 1, 6, 1] = reshape(%x) {shape=(t, 1, 6, 1)}
  %made: f32[t, 2, 4, 1] = matmul(%own, %rows)
  return %made
}"""
    after = """
graph @g(%x: f32[t, 6], %r: f32[t, 5]) {
  param %w: f32[5, 4, 6]
  %best: f32[t, 2], %which: i64[t, 2] = top_k(%r) {k=2, axis=1}
  %reshape: f32[t, 1, 6] = reshape(%x) {shape=(t, 1, 6)}
  %grouped_linear: f32[t, 2, 4] = grouped_linear(%reshape, %w, %which)
  %made: f32[t, 2, 4, 1] = reshape(%grouped_linear) {shape=(t, 2, 4, 1)}
  return %made
}"""
    check_pass(FuseExperts(), before, after, [{"t": 1}, {"t": 7}])


def test_negative_places_count_from_the_end() -> None:
    """As a gather's do; a grouped product takes none."""

    class Picked(nn.Module):
        def __init__(self) -> None:
            self.w = nn.Parameter((E, 3, DIM))

        def __call__(self, x: nn.Tensor, which: nn.Tensor) -> nn.Tensor:
            return (nn.gather(self.w, which) @ x[..., None])[..., 0]

    program = nn.trace(Picked(), {"x": f"f32[t, {DIM}]", "which": "i64[t]"}, outputs=["y"])
    fused, _ = ws.optimize(program, kv_cache=False)
    assert fused["forward"].count("grouped_linear") == 1
    given = {"x": np.ones((3, DIM), np.float32), "which": np.array([-1, 0, -E])}
    assert_allclose(ws.run(fused, **given)["y"], ws.run(program, **given)["y"], rtol=1e-6)


def thresholded(m: Experts, x: nn.Tensor) -> nn.Tensor:
    scores = m.router(x)
    least = nn.top_k(scores, K)[0][..., -1:]
    return nn.where(scores >= least, nn.softmax(scores), 0.0)


def over_tokens(m: Experts, x: nn.Tensor) -> nn.Tensor:
    """The shares of all tokens together."""
    return nn.one_hot(m.choice(x)[1], E).sum((1, 2), keepdims=True)[:, :, 0] + 0.0 * m.router(x)


def across(m: Experts, x: nn.Tensor) -> nn.Tensor:
    """Hidden values compared between experts."""
    h = nn.softmax(m.hidden(x), axis=-2)
    return nn.einsum("b s e h, e d h, b s e -> b s d", h, m.down, m.share(x))


NEAR: dict[str, tuple[Callable[[Experts, nn.Tensor], nn.Tensor], str]] = {
    "all experts": (with_share(lambda m, x: nn.softmax(m.router(x)) + 0.0 * m.mask(x)), "no share is known to be zero"),
    "equals of a threshold": (with_share(thresholded), "no share is known to be zero"),
    "filled with something": (with_share(lambda m, x: nn.where(m.mask(x) > 0.0, m.router(x), 0.25)), "no share is known"),
    "a finite fill": (with_share(lambda m, x: nn.softmax(nn.where(m.mask(x) > 0.0, m.router(x), -3.0))), "no share is known"),
    "not above zero": (with_share(lambda m, x: nn.where(m.mask(x) > -1.0, m.router(x), 0.0)), "no share is known to be zero"),
    "divided by a share": (with_share(lambda m, x: m.share(x) / m.share(x)), "no share is known to be zero"),
    "tokens together": (with_share(over_tokens), "no share is known to be zero"),
    "experts compared": (across, "does not treat experts one by one"),
}


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_stays_and_says_why(name: str) -> None:
    formula, why = NEAR[name]
    program = traced(formula)
    (after, report) = ws.optimize(program, kv_cache=False)
    assert not after["forward"].count("grouped_linear")
    assert [r for r in report.remarks("missed") if why in r.message], report.explain("missed")


def test_places_that_may_be_twice_the_same_stay() -> None:
    """Their shares would add up once for each."""
    program = nn.trace(_Given(), {"x": f"f32[t, {DIM}]", "which": "i64[t, 2]"}, outputs=["y"])
    after, _ = ws.optimize(program, kv_cache=False)
    assert not after["forward"].count("grouped_linear")


def test_the_largest_numbers_are_no_places() -> None:
    """Of several equal ones, each is one of them: top_k's values, where they are integers."""

    class Values(_Given):
        def __call__(self, x: nn.Tensor, which: nn.Tensor) -> nn.Tensor:
            return super().__call__(x, nn.top_k(which, 2)[0])

    program = nn.trace(Values(), {"x": f"f32[t, {DIM}]", "which": "i64[t, 3]"}, outputs=["y"])
    after, _ = ws.optimize(program, kv_cache=False)
    assert not after["forward"].count("grouped_linear")


class _Given(nn.Module):
    def __init__(self) -> None:
        self.w = nn.Parameter((E, 3, DIM))

    def __call__(self, x: nn.Tensor, which: nn.Tensor) -> nn.Tensor:
        every = nn.einsum("t d, e n d -> t e n", x, self.w)
        return (every * nn.one_hot(which, E).sum(-2)[..., None]).sum(-2)


def test_a_matrix_for_each_head_is_no_experts() -> None:
    """Weights of three axes beside a top_k of something else: nothing is said."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            self.w = nn.Parameter((3, 4, DIM))

        def __call__(self, x: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
            return nn.einsum("b s d, h n d -> b s h n", x, self.w), nn.top_k(x, 2)[0]

    program = nn.trace(Heads(), {"x": f"f32[b, s, {DIM}]"})
    report = PassManager([FuseExperts()]).run(program)
    assert not report.remarks()


def test_sizes_that_meet_at_run_time_are_no_experts() -> None:
    """Chunks counted in two ways (RetNet): that a product's axes are not told apart says nothing of experts."""
    text = """graph @f(%x: f32[b, (16*(3*s % 4)*b + 16*b*s) // (64*b), 4, 2], %w: f32[b, ((3*s % 4) + s) // 4, 2, 3]) {
  %y: f32[b, ((3*s % 4) + s) // 4, 4, 3] = matmul(%x, %w)
  return %y
}"""
    program = Program({"f": parse(text)})
    assert PassManager([FuseExperts()]).run(program).remarks() == []
