"""The kernel of linear attention against the recurrence, token by token in f64."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from kernel_help import EPS, assert_within, build, each_isa, lacks, run, tensor, uneven
from numpy.typing import NDArray
from wasat.backends.tvm.cpu.kernels.isa import AVX2, Isa
from wasat.backends.tvm.cpu.kernels.linear_attention import LinearAttention, linear_attention

Array = NDArray[np.float64]
avx2 = pytest.mark.skipif(bool(lacks(AVX2)), reason="this CPU has no AVX2")


def reference(
    desc: LinearAttention, q: Array, k: Array, v: Array, state: Array, decay: Array | None, beta: Array | None, steps: float
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """y, the state, and what each element of them may lose: so many roundings of the size of what it is the sum of. What a
    token writes under the delta rule is as uncertain as what it reads before."""
    b, s, h, d = q.shape
    g, e, r = desc.kv_heads, desc.value_dim, desc.heads // desc.kv_heads
    x, lost = state, np.zeros_like(state)
    y, y_lost = np.empty((b, s, g, r, e)), np.empty((b, s, g, r, e))

    def read(t: int) -> None:
        query = q[:, t].reshape(b, g, r, d) * desc.scale
        y[:, t] = query @ x
        y_lost[:, t] = np.abs(query) @ (lost + steps * EPS * np.abs(x))

    for t in range(s):
        if desc.before:
            read(t)
        key, value, value_lost = k[:, t, :, :, None], v[:, t, :, None], np.zeros((b, g, 1, e))
        if decay is not None:
            a = decay[:, t].reshape(b, g, -1, 1)
            a = np.exp(a) if desc.log else a
            x, lost = x * a, lost * np.abs(a) + 4 * EPS * np.abs(x * a)
        if beta is not None:
            factor = beta[:, t, :, None, None]
            value_lost = np.abs(factor) * (
                np.abs(key).swapaxes(2, 3) @ (lost + steps * EPS * np.abs(x)) + steps * EPS * np.abs(value)
            )
            value = factor * (value - key.swapaxes(2, 3) @ x)
        lost = lost + np.abs(key) * (value_lost + 4 * EPS * np.abs(value)) + EPS * np.abs(x)
        x = x + key * value
        if not desc.before:
            read(t)
    return y.reshape(b, s, h, e), x, y_lost.reshape(b, s, h, e), lost


RULES: dict[str, tuple[Literal["no", "head", "feature"], bool, bool, bool]] = {
    "linear": ("no", False, True, False), "linear, read before": ("no", False, True, True),
    "gated": ("head", False, True, False), "gated by factors, read before": ("head", False, False, True),
    "gated by feature": ("feature", False, True, False), "gated by feature, read before": ("feature", False, False, True),
    "delta": ("no", True, True, False), "gated delta": ("head", True, True, False),
    "gated delta, read before": ("head", True, False, True), "gated delta by feature": ("feature", True, True, False),
}  # fmt: skip


def decays(rng: np.random.Generator, log: bool, *shape: int) -> NDArray[np.float32]:
    """From hardly any to all at once: near 1, near 0, 1 and 0 themselves."""
    x = -(10.0 ** rng.uniform(-7, 2.5, shape))
    x[rng.random(shape) < 0.05] = 0
    x[rng.random(shape) < 0.05] = -np.inf
    return (x if log else np.exp(x) * rng.choice([1, -1], shape)).astype(np.float32)


def check(desc: LinearAttention, compiled: Any, b: int, s: int) -> None:
    rng = np.random.default_rng(s)
    h, g, d, e = desc.heads, desc.kv_heads, desc.key_dim, desc.value_dim
    q, k = rng.standard_normal((b, s, h, d)).astype(np.float32), rng.standard_normal((b, s, g, d)).astype(np.float32)
    k /= np.sqrt((k * k).sum(-1, keepdims=True))
    v, state = uneven(rng, b, s, g, e), rng.standard_normal((b, g, d, e)).astype(np.float32)
    decay = None if desc.decay == "no" else decays(rng, desc.log, b, s, g, *([d] if desc.decay == "feature" else []))
    beta = rng.uniform(0, 1, (b, s, g)).astype(np.float32) if desc.delta else None
    past = np.arange(b)[::-1].copy()
    begins = np.where(past[:, None, None, None] == 0, 0, state) if desc.begins else state
    held = np.where(past[:, None, None, None] == 0, np.nan, state).astype(np.float32) if desc.begins else state
    wide = [None if x is None else x.astype(np.float64) for x in (q, k, v, begins, decay, beta)]
    want, after, y_lost, lost = reference(desc, *wide, 2 * np.sqrt(d))  # type: ignore[arg-type]
    kept = tensor(held)
    operands = [q, k, v, *(x for x in (decay, beta) if x is not None), *([past] if desc.begins else []), kept]
    results: list[tuple[tuple[int, ...], str]] = [((b, s, h, e), "float32")]
    made = run(compiled, operands, *results, *([] if desc.in_place else [((b, g, d, e), "float32")]))
    if s:
        assert_within(made[0], want, y_lost)
    assert_within(kept.numpy() if desc.in_place else made[1], after, lost)
    if not desc.in_place:
        np.testing.assert_array_equal(kept.numpy(), held)


SWEPT = ("gated delta", "gated by feature, read before")
"""Between them all that depends on the instruction set."""


def kernel(isa: Isa, case: str, h: int, g: int, d: int, e: int, **how: bool) -> tuple[LinearAttention, Any]:
    decay, delta, log, before = RULES[case]
    desc = LinearAttention(isa, h, g, d, e, decay, delta, 0.5, log, before, threads=2, **how)
    return desc, build(linear_attention(desc), isa)


@each_isa()
@pytest.mark.parametrize("case", SWEPT)
def test_any_number_of_tokens(isa: Isa, case: str) -> None:
    """Less than a block, one, and not a multiple; two query heads over each state, features that are no whole vectors."""
    desc, compiled = kernel(isa, case, 4, 2, 20, 37)
    for b, s in ((1, 0), (2, 1), (1, 31), (2, 32), (1, 33), (2, 100)):
        check(desc, compiled, b, s)


@avx2
@pytest.mark.parametrize("case", [case for case in RULES if case not in SWEPT])
def test_each_rule(case: str) -> None:
    desc, compiled = kernel(AVX2, case, 4, 2, 20, 37)
    check(desc, compiled, 2, 77)


@avx2
@pytest.mark.parametrize("case", ["linear, read before", "gated delta", "gated delta by feature"])
def test_one_token(case: str) -> None:
    """Rows that hold nothing begin with zeros, whatever their state holds."""
    check(*kernel(AVX2, case, 6, 2, 24, 40, single=True, begins=True), 3, 1)


@avx2
@pytest.mark.parametrize(
    "case, h, g, d, e", [("gated delta", 1, 1, 1, 1), ("gated delta by feature", 14, 1, 16, 8), ("delta", 2, 2, 7, 3)]
)
def test_heads_and_features(case: str, h: int, g: int, d: int, e: int) -> None:
    """The old state stays, where it is not to be written over."""
    check(*kernel(AVX2, case, h, g, d, e, in_place=False, begins=True), 2, 45)


@avx2
@pytest.mark.parametrize("which", ["v", "k"])
@pytest.mark.parametrize("case", ["linear, read before", "gated", "gated delta", "gated by feature", "gated delta by feature"])
def test_a_later_token_that_is_no_number_changes_no_earlier_one(case: str, which: str) -> None:
    """Within a block, and two of several query heads of it within a tile of the product."""
    desc, compiled = kernel(AVX2, case, 4, 2, 8, 12)
    rng = np.random.default_rng(0)
    s, shapes = 43, {"q": (4, 8), "k": (2, 8), "v": (2, 12), "decay": (2, 8) if desc.decay == "feature" else (2,), "beta": (2,)}
    drawn = {n: rng.uniform(-1, 0, (1, s, *x)).astype(np.float32) for n, x in shapes.items()}
    names = ["q", "k", "v", *["decay"] * (desc.decay != "no"), *["beta"] * desc.delta]

    def y() -> NDArray[np.float32]:
        operands = [*(drawn[n] for n in names), tensor(np.ones((1, 2, 8, 12), np.float32))]
        return run(compiled, operands, ((1, s, 4, 12), "float32"))[0]

    want = y()
    assert np.isfinite(want).all()
    for at, number in ((37, np.inf), (6, np.nan)):
        drawn[which][:, at] = number
        first = at + desc.before
        got = y()
        np.testing.assert_array_equal(got[:, :first], want[:, :first])
        assert not np.isfinite(got[:, first:]).any()


def test_a_query_head_has_a_state() -> None:
    with pytest.raises(ValueError, match="3 heads are not a multiple of 2 kv heads"):
        LinearAttention(AVX2, 3, 2, 8, 8)
