"""Experts that are modules of their own, in loops and lists as people write them; choices of which some are no experts."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_allclose
from wasat.frontend import nn
from wasat.ir import IRError, Program, evaluate, parse_program, verify
from wasat.passes import FuseExperts, PassManager, default_pipeline
from wasat.passes.cleanup.rows_apart import rows_apart
from wasat.passes.core import Report

import wasat as ws
from wasat.testing import InterpreterCheck, feed

DIM, HIDDEN, E, K = 6, 10, 5, 2


class Model(nn.Module):
    """A router over ``outputs``, and experts; ``formula`` says what is made of them and x [b, s, dim]."""

    def __init__(self, formula: Callable[[Model, nn.Tensor], nn.Tensor], outputs: int = E, odd: int | None = None) -> None:
        self.router = nn.Linear(DIM, outputs)
        modules: list[nn.Module] = [nn.GLU(DIM, HIDDEN, bias=True) for _ in range(E)]
        if odd is not None:
            modules[odd] = nn.MLP(DIM, HIDDEN)
        self.experts, self.shared = nn.ModuleList(modules), nn.GLU(DIM, HIDDEN)
        self.gates = nn.ModuleList([nn.Linear(DIM, E) for _ in range(E)])
        self.up, self.down = nn.Parameter((E, HIDDEN, DIM), std=0.5), nn.Parameter((E, DIM, HIDDEN), std=0.5)
        self.formula = formula

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return self.formula(self, x)

    def choice(self, x: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        best, which = nn.top_k(self.router(x), K)
        return nn.softmax(best), which

    def shares(self, x: nn.Tensor) -> nn.Tensor:
        share, which = self.choice(x)
        return nn.emit("scatter_along", nn.zeros_like(self.router(x)), which, share, axis=-1)

    def hidden(self, x: nn.Tensor) -> nn.Tensor:
        return nn.silu(nn.einsum("b s d, e h d -> b s e h", x, self.up))

    def all(self, x: nn.Tensor, axis: int) -> nn.Tensor:
        return nn.stack([expert(x) for expert in self.experts], axis)


def compared(m: Model, x: nn.Tensor, numbers: tuple[int, ...] = tuple(range(E))) -> nn.Tensor:
    """Each expert by what of the choice is its number."""
    share, which = m.choice(x)
    y = nn.zeros_like(x)
    for i, e in enumerate(numbers):
        y = y + m.experts[i % E](x) * nn.where(which == e, share, 0.0).sum(-1, keepdims=True)
    return y


def multiplied(m: Model, x: nn.Tensor) -> nn.Tensor:
    p = nn.softmax(m.router(x))
    _, which = nn.top_k(p, K)
    on = [(which == e).cast("f32").sum(-1, keepdims=True) for e in range(E)]
    return sum((on[e] * p[..., e : e + 1] * m.experts[e](x) for e in range(1, E)), on[0] * p[..., :1] * m.experts[0](x))


def beside_one(m: Model, x: nn.Tensor) -> nn.Tensor:
    (share, which), y = m.choice(x), x
    for e in range(E):
        y = y + m.gates[e](x)[..., :1] * m.experts[e](x) * nn.where(which == e, share, 0.0).sum(-1, keepdims=True)
    return y


def backwards(m: Model, x: nn.Tensor) -> nn.Tensor:
    shares, y = m.shares(x), x
    for e in reversed(range(E)):
        y = y + m.experts[e](x) * shares[..., e][..., None]
    return y


def cases(m: Model, x: nn.Tensor, which: nn.Tensor | None = None, numbers: tuple[int, ...] = tuple(range(E))) -> nn.Tensor:
    """One expert a token, each where it is chosen."""
    which, y = nn.argmax(m.router(x), -1) if which is None else which, x
    for i, e in enumerate(numbers):
        y = nn.where((which == e)[..., None], m.experts[i % 4](x), y)
    return y


def otherwise(m: Model, x: nn.Tensor) -> nn.Tensor:
    which, y = nn.argmax(m.router(x), -1), m.experts[0](x)
    for e in (4, 1, 2):
        y = nn.where((e == which)[..., None], m.experts[e](x), y)
    return nn.where((which == 0)[..., None], m.experts[3](x), y)


def one_or_the_other(m: Model, x: nn.Tensor) -> nn.Tensor:
    return nn.where(nn.argmax(m.router(x), -1, keepdims=True) == 1, m.experts[0](x), m.experts[1](x))


def cases_for_each(m: Model, x: nn.Tensor) -> nn.Tensor:
    share, which = m.choice(x)
    return cases(m, x, which[..., 0]) * share[..., :1] + cases(m, x, which[..., 1]) * share[..., 1:]


def added_where(m: Model, x: nn.Tensor) -> nn.Tensor:
    share, which = m.choice(x)
    y = nn.zeros_like(x)
    for j in range(K):
        for e in range(E):
            y = y + nn.where((which[..., j] == e)[..., None], share[..., j : j + 1] * m.experts[e](x), 0.0)
    return y


def taken(m: Model, x: nn.Tensor) -> nn.Tensor:
    """What all experts say, of which that of the chosen ones is taken."""
    share, which = m.choice(x)
    said = nn.emit("take_along", m.all(x, -2), which[..., None].broadcast_to(*x.shape[:2], K, DIM), axis=-2)
    return (said * share[..., None]).sum(-2)


def taken_of_products(m: Model, x: nn.Tensor) -> nn.Tensor:
    share, which = m.choice(x)
    y = nn.einsum("b s e h, e d h -> b s e d", m.hidden(x), m.down)
    return (nn.emit("take_along", y, which[..., None].broadcast_to(*which.shape, DIM), axis=2) * share[..., None]).sum(-2)


def no_experts(share: Callable[[Model, nn.Tensor], nn.Tensor]) -> Callable[[Model, nn.Tensor], nn.Tensor]:
    """The router has more outputs than there are experts: what chooses one of these goes on as it is."""
    return lambda m, x: nn.einsum("b s e h, e d h, b s e -> b s d", m.hidden(x), m.down, share(m, x))


def identities(m: Model, x: nn.Tensor) -> nn.Tensor:
    """LongCat-Flash: experts that compute nothing."""
    share, which = m.choice(x)
    return compared(m, x) + x * nn.where(which >= E, share, 0.0).sum(-1, keepdims=True)


def one_hot_or_none(m: Model, x: nn.Tensor) -> nn.Tensor:
    share, which = m.choice(x)
    return (nn.one_hot(which, E) * share[..., None]).sum(-2)


def one_or_none(m: Model, x: nn.Tensor) -> nn.Tensor:
    return nn.one_hot(nn.argmax(m.router(x), -1), E)


Formula = Callable[[Model, nn.Tensor], nn.Tensor]
SPELLINGS: dict[str, tuple[Formula, int, int]] = {  # outputs of the router, grouped products
    "compared": (compared, E, 2),
    "compared, in another order": (lambda m, x: compared(m, x, (4, 2, 0, 1, 3)), E, 2),
    "compared, one of them twice": (lambda m, x: compared(m, x, (0, 1, 2, 3, 4, 0)), E, 2),
    "compared, beside a shared one": (lambda m, x: compared(m, x) + m.shared(x), E, 2),
    "compared, rows in one axis": (lambda m, x: compared(m, x.reshape(1, -1, DIM)).reshape(*x.shape), E, 2),
    "compared, beside one number": (beside_one, E, 2),
    "in two layers": (lambda m, x: compared(m, x + compared(m, x)), E, 4),
    "multiplied": (multiplied, E, 2),
    "backwards": (backwards, E, 2),
    "cases": (cases, E, 2),
    "cases, one of them twice": (lambda m, x: cases(m, x, numbers=(0, 1, 2, 3, 4, 0)), E, 2),
    "cases, the last one otherwise": (otherwise, E, 2),
    "cases behind a mask": (lambda m, x: nn.where(x[..., :1] > 0.0, x, cases(m, x)), E, 2),
    "one case or the other": (one_or_the_other, 2, 2),
    "cases for each": (cases_for_each, E, 4),
    "added where": (added_where, E, 4),
    "stacked": (lambda m, x: (m.all(x, -2) * m.shares(x)[..., None]).sum(-2), E, 2),
    "stacked in front": (lambda m, x: nn.einsum("e b s d, b s e -> b s d", m.all(x, 0), m.shares(x)), E, 2),
    "stacked behind": (lambda m, x: (m.all(x, -1) * m.shares(x)[..., None, :]).sum(-1), E, 2),
    "taken": (taken, E, 2),
    "taken of products": (taken_of_products, E, 2),
    "some are left out": (lambda m, x: compared(m, x, tuple(range(E - 1))), E, 2),
    "some are no experts": (compared, E + 3, 2),
    "some say what they hear": (identities, E + 2, 2),
    "some shares are cut": (no_experts(lambda m, x: m.shares(x)[..., :E]), E + 2, 2),
    "some shares are cut in front": (no_experts(lambda m, x: m.shares(x)[..., 2 : E + 2]), E + 3, 2),
    "the first are no experts": (lambda m, x: compared(m, x, (2, 3, 4, 5, 6)), E + 2, 2),
    "numbered from one": (lambda m, x: compared(m, x, (1, 2, 3, 4, 5)), E, 2),
    "numbered from below zero": (lambda m, x: compared(m, x, (-1, 0, 1, 2, 3)), E, 2),
    "numbered and cut": (no_experts(lambda m, x: of_numbers(m, x, np.arange(1, E + 2))[..., 1:]), E + 2, 2),
    "some of the shares": (lambda m, x: sum((m.shares(x)[..., e : e + 1] * m.experts[e](x) for e in (1, 2, 3)), x), E, 2),
    "some places are outside": (no_experts(one_hot_or_none), E + 4, 2),
    "one place, or outside": (no_experts(one_or_none), E + 4, 2),
}


def optimized(model: Model) -> tuple[Program, Program, Report]:
    """The program before and after; that both say the same is seen to."""
    program = nn.trace(model, {"x": f"f32[b, s, {DIM}]"}, outputs=["y"])
    after, report = ws.optimize(program, kv_cache=False)
    for b, s in ((2, 3), (1, 1), (3, 17)):
        x = np.random.default_rng(b).normal(size=(b, s, DIM)).astype(np.float32)
        assert_allclose(ws.run(after, x=x)["y"], ws.run(program, x=x)["y"], rtol=1e-4, atol=1e-5)
    return program, after, report


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_becomes_grouped_products(name: str) -> None:
    formula, outputs, products = SPELLINGS[name]
    _, after, report = optimized(Model(formula, outputs))
    assert not [r for r in report.remarks("missed") if "experts are" in r.message], report.explain("missed")
    g = after["forward"]
    count = g.count("grouped_linear")
    assert products <= count <= 2 * products, g  # gate and up may be one
    assert count + g.count("linear") + g.count("matmul") <= 2 * products + 5


@pytest.mark.parametrize("odd", [0, E - 1])
def test_an_expert_that_differs_is_computed_beside_the_others(odd: int) -> None:
    _, after, _ = optimized(Model(compared, odd=odd))
    assert after["forward"].count("grouped_linear") == 2


def either(m: Model, x: nn.Tensor) -> nn.Tensor:
    """A choice that may be none of the numbers."""
    share, which = m.choice(x)
    which, y = nn.where(x[..., :1] > 0.0, which, -1), nn.zeros_like(x)
    for e in range(E):
        y = y + m.experts[e](x) * nn.where(which == e, share, 0.0).sum(-1, keepdims=True)
    return y


def of_two_choices(m: Model, x: nn.Tensor) -> nn.Tensor:
    which, y = (nn.argmax(m.router(x), -1), nn.argmin(m.router(x), -1)), x
    for e in range(E):
        y = nn.where((which[e // 3] == e)[..., None], m.experts[e](x), y)
    return y


def of_numbers(m: Model, x: nn.Tensor, numbers: np.ndarray) -> nn.Tensor:
    share, which = m.choice(x)
    return nn.where(which[..., None] == numbers, share[..., None], 0.0).sum(-2)


def over_tokens(m: Model, x: nn.Tensor) -> nn.Tensor:
    return nn.einsum("b s e h, e d h, b s e -> b d", m.hidden(x), m.down, m.shares(x))


def of_first_tokens(m: Model, x: nn.Tensor) -> nn.Tensor:
    return m.shares(nn.concat([x, x], 1))[:, : x.shape[1]]


def places_of_tokens(m: Model, x: nn.Tensor) -> nn.Tensor:
    """As many to choose from as there are tokens."""
    return nn.one_hot(nn.argmax(nn.einsum("b s d, b t d -> b s t", x, x), -1), E)


def crossed(m: Model, x: nn.Tensor) -> nn.Tensor:
    """Where an expert is chosen it has the share of another."""
    p = nn.softmax(m.router(x))
    _, which = nn.top_k(p, K)
    y = nn.zeros_like(x)
    for e in range(E):
        y = y + (which == e).cast("f32").sum(-1, keepdims=True) * p[..., E - 1 - e : E - e] * m.experts[e](x)
    return y


NEAR: dict[str, tuple[Model, str]] = {
    "another between": (Model(compared, odd=2), "one is not computed as another expert is"),
    "a share of all": (Model(lambda m, x: compared(m, x) + sum((e(x) * 0.1 for e in m.experts), x)), ""),
    "a choice that may be none": (Model(either), "all 5 experts are computed"),
    "shares crossed": (Model(crossed), "parts of %softmax are not one for each expert"),
    "cases that are not all": (Model(lambda m, x: cases(m, x, numbers=(0, 1, 2))), r"cases \[0, 1, 2\] are not all of the 5"),
    "cases that are no experts": (Model(cases, E + 1), r"cases \[0, 1, 2, 3, 4\] are not all of the 6"),
    "cases of two choices": (Model(of_two_choices), ""),
    "summed over tokens": (Model(over_tokens), "summed over tokens, too"),
    "of the first tokens": (Model(no_experts(of_first_tokens)), "no share is known"),
    "numbers in another order": (Model(no_experts(lambda m, x: of_numbers(m, x, np.array([4, 2, 3, 1, 0])))), "all 5 experts"),
    "every second": (Model(no_experts(lambda m, x: m.shares(x)[..., ::2]), 2 * E), ""),
    "places of tokens": (Model(no_experts(places_of_tokens)), ""),
}


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_stays_and_says_why(name: str) -> None:
    model, why = NEAR[name]
    _, after, report = optimized(model)
    if name != "a share of all":
        assert not after["forward"].count("grouped_linear")
    if why:
        assert [r for r in report.remarks("missed") if re.search(why, r.message)], report.explain("missed")


def test_elements_at_open_places_are_of_no_expert() -> None:
    """Of as many tokens as there are one is chosen, and the last is read; of experts, one that the width says."""

    def formula(m: Model, x: nn.Tensor) -> nn.Tensor:
        chosen = nn.argmax(x.sum(-1), -1, keepdims=True)[..., None]
        return compared(m, x) + x[:, -1][:, None] * 2.0 + x[:, 0][:, None] * (chosen == 0).cast("f32")

    _, after, _ = optimized(Model(formula))
    assert after["forward"].count("grouped_linear") == 2
    text = """graph @g(%x: f32[n], %r: f32[t, 5]) {
  %best: f32[t, 2], %which: i64[t, 2] = top_k(%r) {k=2, axis=1}
  %a: f32[t, 1] = slice(%r) {starts=(0, n), stops=(t, n + 1), steps=(1, 1)}
  %b: f32[t, 1] = slice(%r) {starts=(0, n + 1), stops=(t, n + 2), steps=(1, 1)}
  %p: f32[t, 1] = exp(%a)
  %q: f32[t, 1] = exp(%b)
  %y: f32[t, 1] = add(%p, %q)
  return %y, %which
}"""
    assert PassManager([FuseExperts()]).run(parse_program(text)).remarks() == []


ROWS = """
graph @g(%x: f32[b, s, 4], %w: f32[3, 1, 1], %v: f32[3, b*s, 4], %t: f32[s, b, 4], %u: f32[3, b, s], %k: f32[2, 3, 4]) {
  %flat: f32[1, b*s, 4] = reshape(%x) {shape=(1, b*s, 4)}
  %front: f32[3, b*s, 4] = mul(%w, %flat)
  <node>
  return %z
}"""


@pytest.mark.parametrize(
    ("node", "apart"),
    [
        ("%z: f32[3, b*s, 4] = softmax(%front) {axis=2}", True),
        ("%z: f32[3, b*s, 4] = softmax(%front) {axis=0}", True),
        ("%z: f32[b*s, 4] = reduce_sum(%front) {axes=(0,)}", True),
        ("%z: f32[4, b*s, 3] = transpose(%front) {perm=(2, 1, 0)}", True),
        ("%z: f32[3, b*s, 2] = slice(%front) {starts=(0, 0, 1), stops=(3, b*s, 3), steps=(1, 1, 1)}", True),
        ("%z: f32[3, b*s, 8] = concat(%front, %front) {axis=2}", True),
        ("%z: f32[6, b*s, 4] = concat(%front, %front) {axis=0}", True),
        ("%z: f32[3, b*s, 4] = sub(%flat, %front)", True),
        ("%z: f32[3, 2*b*s, 4] = concat(%front, %front) {axis=1}", False),
        ("%z: f32[3, b*s, 4] = softmax(%front) {axis=1}", False),
        ("%z: f32[3, b*s, 4] = cumsum(%front) {axis=1}", False),
        ("%z: f32[3, 4] = reduce_sum(%front) {axes=(1,)}", False),
        ("%z: f32[3, b*s, 4] = reverse(%front) {axes=(1,)}", False),
        ("%z: f32[3, b*s, 4] = add(%front, %v)", False),
        ("%o: f32[1, b*s, 4] = reshape(%t) {shape=(1, b*s, 4)}\n  %z: f32[3, b*s, 4] = add(%front, %o)", False),
        ("%o: f32[b*s, 3] = reshape(%u) {shape=(b*s, 3)}\n  %z: f32[b*s, 3] = softmax(%o) {axis=1}", False),
        ("%o: f32[6, 4] = reshape(%k) {shape=(6, 4)}\n  %z: f32[6, 4] = softmax(%o) {axis=1}", False),
        ("%r: f32[1, b*s, 4] = reduce_max(%v) {axes=(0,), keepdims=true}\n"
         "  %o: f32[3, b*s, 4] = broadcast_to(%r) {shape=(3, b*s, 4)}\n  %z: f32[3, b*s, 4] = add(%front, %o)", False),
        ("%r: f32[b, 1, 4] = reduce_max(%x) {axes=(1,), keepdims=true}\n"
         "  %o: f32[b, 4] = reshape(%r) {shape=(b, 4)}\n  %z: f32[b, 4] = softmax(%o) {axis=1}", False),
    ],
)
def test_rows_are_apart_wherever_their_axis_is(node: str, apart: bool) -> None:
    program = parse_program(ROWS.replace("<node>", node))
    g = program["g"]
    given = feed(g, {"b": 2, "s": 3})
    want = evaluate(g, given)
    assert rows_apart(g)
    verify(g)
    made = g.outputs[0].node
    assert made is not None
    assert made.is_a("reshape") is apart, g
    assert_allclose(np.asarray(evaluate(g, given)[0]), np.asarray(want[0]), rtol=1e-6)


class Decoder(nn.Module):
    """Experts of rows: batch and sequence in one axis."""

    def __init__(self, formula: Formula, outputs: int) -> None:
        self.embed, self.attention = nn.Embedding(20, DIM), nn.Attention(DIM, 1, rope=nn.RoPE(DIM))
        self.model, self.head = Model(formula, outputs), nn.Linear(DIM, 20)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x, nn.positions(x))
        return self.head(x + self.model(x.reshape(-1, DIM)).reshape(*x.shape))


MERGED: dict[str, tuple[Formula, int]] = {
    "compared": (compared, E),
    "multiplied": (multiplied, E),
    "cases": (cases, E),
    "added where": (added_where, E),
    "stacked": (lambda m, x: (m.all(x, 0) * m.shares(x).transpose(1, 0)[..., None]).sum(0), E),
    "some say what they hear": (identities, E + 2),
    "in an axis of three": (lambda m, x: compared(m, x.reshape(1, -1, DIM)).reshape(-1, DIM), E),
}


@pytest.mark.parametrize("name", MERGED)
def test_merged_rows_get_a_cache(name: str) -> None:
    program = nn.trace(Decoder(*MERGED[name]), {"tokens": "i64[b, s]"}, outputs=["logits"])
    check = InterpreterCheck([{"b": 1, "s": 3, "c": 16}, {"b": 2, "s": 5, "c": 16}], rtol=1e-4, atol=1e-5)
    PassManager(default_pipeline(chunk=8), check=check).run(program)
    assert program["decode"].count("grouped_linear") == program["prefill"].count("grouped_linear") >= 2


def test_cases_that_overlap_stay() -> None:
    """A condition that is turned about is met by another token."""

    def turned(m: Model, x: nn.Tensor) -> nn.Tensor:
        which, y = nn.argmax(m.router(x), -1), x
        for e in range(E):
            at = (which == e)[..., None]
            y = nn.where(at.transpose(1, 0, 2) if e > 2 else at, m.experts[e](x), y)
        return y

    program = nn.trace(Model(turned), {"x": f"f32[n, n, {DIM}]"}, outputs=["y"])
    after, _ = ws.optimize(program, kv_cache=False)
    assert not after["forward"].count("grouped_linear")
    x = np.random.default_rng(0).normal(size=(4, 4, DIM)).astype(np.float32)
    assert_allclose(ws.run(after, x=x)["y"], ws.run(program, x=x)["y"], rtol=1e-4, atol=1e-5)


def test_what_is_taken_at_places_that_may_be_no_experts_stays() -> None:
    """It is an error, and stays one."""
    program = nn.trace(Model(taken, E + 1), {"x": f"f32[b, s, {DIM}]"}, outputs=["y"])
    after, _ = ws.optimize(program, kv_cache=False)
    assert not after["forward"].count("grouped_linear")
    with pytest.raises(IRError, match="outside"):
        ws.run(after, x=np.random.default_rng(0).normal(size=(4, 40, DIM)).astype(np.float32))


def test_cases_of_what_is_computed_otherwise_are_no_experts() -> None:
    def formula(m: Model, x: nn.Tensor) -> nn.Tensor:
        which = nn.argmax(m.router(x), -1)[..., None]
        return nn.where(which == 0, x * 2.0, nn.where(which == 1, m.shared(x), x))

    _, _, report = optimized(Model(formula))
    assert not [r for r in report.remarks("missed") if "experts are" in r.message]


def test_rows_that_are_read_are_no_product() -> None:
    """PEER: an expert is one row in and one row out. Nothing more could be grouped, and nothing is said."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            self.router, self.up, self.down = nn.Linear(DIM, E), nn.Parameter((E, DIM)), nn.Parameter((E, DIM))

        def __call__(self, x: nn.Tensor) -> nn.Tensor:
            share, which = nn.top_k(self.router(x), K)
            h = nn.gelu((nn.gather(self.up, which) * x[..., None, :]).sum(-1)) * share
            return (h[..., None] * nn.gather(self.down * 2.0, which)).sum(-2)

    _, report = ws.optimize(nn.trace(Rows(), {"x": f"f32[b, s, {DIM}]"}, outputs=["y"]), kv_cache=False)
    assert not [r for r in report.remarks("missed") if "experts" in r.message]
