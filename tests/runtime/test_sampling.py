"""Filters against their definitions; draws against the distribution they define."""

from __future__ import annotations

import math

import numpy as np
import pytest
from wasat.runtime import InputError, ModelError, SamplingOptions
from wasat.runtime.sampling import Sampler, candidates, likeliest, logprob, nucleus, penalize


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return np.asarray(e / e.sum())


def _by_definition(logits: np.ndarray, o: SamplingOptions) -> np.ndarray:
    """Probabilities of all tokens, filter by filter, as transformers' logits processors define them."""
    x = logits.astype(np.float64) / o.temperature
    if o.top_k:
        x[x < np.sort(x)[::-1][min(o.top_k, x.size) - 1]] = -np.inf
    if o.top_p < 1:
        order = np.argsort(-x, kind="stable")
        before = np.cumsum(_softmax(x)[order]) - _softmax(x)[order]
        x[order[before >= o.top_p]] = -np.inf
    if o.min_p:
        p = _softmax(x)
        x[p < o.min_p * p.max()] = -np.inf
    return _softmax(x)


LOGITS = np.random.default_rng(3).normal(0, 2, 40).astype(np.float32)
OPTIONS = [
    SamplingOptions(**{"temperature": 1.0, **kind})
    for kind in (
        {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 5}, {"top_k": 1}, {"top_k": 99}, {"top_p": 0.7},
        {"top_p": 1e-9}, {"min_p": 0.1}, {"min_p": 1.0}, {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
    )
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_candidates_are_those_of_the_definition(options: SamplingOptions) -> None:
    ids, p = candidates(LOGITS, options)
    got = np.zeros(LOGITS.size)
    got[ids] = p
    want = _by_definition(LOGITS, options)
    assert set(ids) == set(np.flatnonzero(want))
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_distribution(options: SamplingOptions) -> None:
    """Chi-square at a level of 1e-4 (normal approximation of Wilson and Hilferty); nothing outside the kept set."""
    n = 20_000
    sampler = Sampler(options)
    counts = np.bincount([sampler.sample(LOGITS) for _ in range(n)], minlength=LOGITS.size)
    want = _by_definition(LOGITS, options) * n
    assert not counts[want == 0].any()
    rare = (want > 0) & (want < 5)  # the approximation wants at least 5 in a cell
    observed = np.append(counts[want >= 5], counts[rare].sum())
    expected = np.append(want[want >= 5], want[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) == 1:
        return
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 3.719, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


def test_top_k_keeps_ties() -> None:
    ids, _ = candidates(np.array([1, 3, 2, 2, 2, 0], np.float32), SamplingOptions(temperature=1.0, top_k=2))
    assert ids.tolist() == [1, 2, 3, 4]


def test_nucleus_is_the_smallest_set_that_reaches_the_mass() -> None:
    p = np.array([0.125, 0.5, 0.25, 0.125])
    assert nucleus(p, 0.5).tolist() == [1]
    assert nucleus(p, 0.500001).tolist() == [1, 2]
    assert nucleus(p, 0.75).tolist() == [1, 2]
    assert nucleus(p, 0.8).tolist() == [0, 1, 2]  # of equal ones the lower id
    assert nucleus(p, 0.999).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_nucleus_of_a_large_vocabulary(mass: float, spread: float) -> None:
    """With many equal probabilities (rounded), against the definition."""
    p = _softmax(np.random.default_rng(1).normal(0, spread, 30_000).round(2))
    order = np.argsort(-p, kind="stable")
    count = int((np.cumsum(p[order]) < mass).sum()) + 1
    assert nucleus(p, mass).tolist() == sorted(order[:count].tolist())


def test_likeliest_of_all() -> None:
    assert likeliest(np.array([2.0, 1.0, 3.0]), 3).tolist() == [0, 1, 2]
    assert likeliest(np.array([2.0, 1.0, 3.0]), 1).tolist() == [2]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    x = np.array([2.0, -2.0, 4.0, -4.0], np.float32)
    assert penalize(x, np.array([0, 1]), 2.0).tolist() == [1.0, -4.0, 4.0, -4.0]
    assert x.tolist() == [2.0, -2.0, 4.0, -4.0]


def test_repetition_penalty_counts_prompt_and_chosen_tokens_once() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), prompt=[0, 0, 0])
    x = np.array([4.0, 3.0, 2.5], np.float32)
    assert [sampler.sample(x) for _ in range(4)] == [1, 2, 0, 0]  # 2 3 2.5; 2 1.5 2.5; 2 1.5 1.25
    assert Sampler(SamplingOptions(), prompt=[0]).sample(x) == 0


def test_penalty_comes_before_temperature_and_filters() -> None:
    sampler = Sampler(SamplingOptions(temperature=1.0, top_k=1, repetition_penalty=10.0), prompt=[0])
    assert sampler.sample(np.array([4.0, 3.0], np.float32)) == 1


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(SamplingOptions()).sample(np.array([1.0, 5.0, 5.0], np.float32)) == 1


def test_seeds_and_rows_have_streams_of_their_own() -> None:
    def draw(seed: int, row: int) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed), row)
        return [sampler.sample(LOGITS) for _ in range(30)]

    assert draw(0, 0) == draw(0, 0)
    assert len({tuple(draw(*x)) for x in [(0, 0), (1, 0), (0, 1), (1, 1)]}) == 4


def test_a_temperature_near_zero_is_greedy() -> None:
    assert Sampler(SamplingOptions(temperature=1e-300)).sample(LOGITS) == LOGITS.argmax()


def test_masked_logits_are_never_drawn() -> None:
    x = np.array([-np.inf, 0.0, -np.inf, 1.0], np.float32)
    sampler = Sampler(SamplingOptions(temperature=100.0))
    assert {sampler.sample(x) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize("bad", [[1.0, np.nan, 2.0], [1.0, np.inf], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(bad: list[float], temperature: float) -> None:
    with pytest.raises(ModelError, match="among its logits"):
        Sampler(SamplingOptions(temperature=temperature)).sample(np.array(bad, np.float32))


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    got = logprob(LOGITS, 7, 3)
    want = np.log(_softmax(LOGITS))
    best = np.argsort(-want)[:3]
    assert got.token == 7
    assert got.logprob == pytest.approx(want[7], rel=1e-12)
    assert [t for t, _ in got.top] == best.tolist()
    np.testing.assert_allclose([x for _, x in got.top], want[best], rtol=1e-12)
    assert logprob(LOGITS, 7, 0).top == ()
    assert len(logprob(LOGITS, 7, 1000).top) == LOGITS.size


@pytest.mark.parametrize("wrong", [
    {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0.0},
    {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"repetition_penalty": math.nan},
    {"seed": -1}, {"seed": 0.5},
], ids=str)  # fmt: skip
def test_options_out_of_range_are_named(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=f"^{name} is .*; it must be "):
        SamplingOptions(**wrong)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"])
@pytest.mark.parametrize("wrong", [None, "1", b"1", True, [1], 1j, math.nan, math.inf, np.array([1, 2]), -(10**400)], ids=str)
def test_options_of_another_kind_are_named(name: str, wrong: object) -> None:
    with pytest.raises(InputError, match=f"^{name} is "):
        SamplingOptions(**{name: wrong})  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    given = SamplingOptions(np.float32(0.5), np.int64(3), np.float64(0.5), np.float16(0.5), np.float32(2), np.uint8(7))
    assert given == SamplingOptions(0.5, 3, 0.5, 0.5, 2.0, 7)


@pytest.mark.parametrize("penalty", [1e-250, 1e-30, 1e30, 1e250])
def test_extreme_penalties_keep_the_order(penalty: float) -> None:
    """Exact: of the seen ones, the largest is likeliest if it is positive and the penalty small."""
    x = np.array([2, 3, 1, -1, -2], np.float32)
    want = np.array([2 / penalty, 3 / penalty, 1, -penalty, -2 * penalty])
    np.testing.assert_allclose(penalize(x, np.array([0, 1, 3, 4]), penalty), want, rtol=1e-12)
    got = Sampler(SamplingOptions(repetition_penalty=penalty), prompt=[0, 1, 3, 4]).sample(x)
    assert got == want.argmax()


@pytest.mark.parametrize("wrong", [1e-300, 1e300])
def test_penalties_beyond_what_can_be_computed(wrong: float) -> None:
    with pytest.raises(InputError, match=r"repetition_penalty is .* from 1e-250 to 1e\+250"):
        SamplingOptions(repetition_penalty=wrong)


@pytest.mark.parametrize("logits", [np.zeros(7), np.full(7, 0.1), LOGITS, np.array([-3e38, 3e38, 0])], ids=str)
@pytest.mark.parametrize("extreme", [
    {"top_p": 5e-324}, {"top_p": 1e-17}, {"top_p": 1 - 2**-53}, {"min_p": 5e-324}, {"temperature": 5e-324},
    {"temperature": 1e-30}, {"temperature": 1e308}, {"top_k": 10**30}, {"seed": 10**60},
], ids=str)  # fmt: skip
def test_extreme_options_choose_a_token(logits: np.ndarray, extreme: dict) -> None:
    """The smallest nucleus is the likeliest token; near 0 degrees too. No warning, no error."""
    options = SamplingOptions(**{"temperature": 1.0, **extreme})
    x = logits.astype(np.float32)
    ids, p = candidates(x, options)
    assert np.isfinite(p).all()
    assert p.sum() == pytest.approx(1)
    if "top_p" in extreme and extreme["top_p"] < 0.5:
        assert ids.tolist() == [x.argmax()]
    assert 0 <= Sampler(options).sample(x) < x.size
