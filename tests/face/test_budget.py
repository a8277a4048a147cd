"""Bits given to weights under a budget: no other choice of as many bits would cost less."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from wasat.ir import QTensorType, WasatError
from wasat.passes.serving.recipes import Storage

from wasat.calibration import budget
from wasat.calibration.budget import Choice


def choices(rng: np.random.Generator) -> dict[str, list[Choice]]:
    def some(name: str) -> list[Choice]:
        bits, costs = np.sort(rng.integers(1, 100, 4)), np.sort(rng.random(4))[::-1]
        t = QTensorType("s4b32", (1, 32))
        return [Choice(Storage(f"{name}{i}", t), int(b), float(c)) for i, (b, c) in enumerate(zip(bits, costs))]

    return {name: some(name) for name in "wxyz"}


@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_of_as_many_bits_costs_less(seed: int) -> None:
    options = choices(np.random.default_rng(seed))
    every = [(sum(c.bits for c in pick), sum(c.cost for c in pick)) for pick in itertools.product(*options.values())]
    seen = set()
    for limit in range(min(b for b, _ in every), 400, 3):
        taken = budget.chosen(options, limit)
        bits, cost = sum(c.bits for c in taken.values()), sum(c.cost for c in taken.values())
        assert bits <= limit
        seen.add(cost)
        # the next step on the hulls did not fit: what it would have saved bounds what the optimum may be better by
        best = min(c for b, c in every if b <= limit)
        larger = min((c for b, c in every if b <= limit + 99), default=best)
        assert larger <= best <= cost
        if best < cost:
            assert any(b > bits for b, c in every if c < cost)
    assert len(seen) > 4
    assert min(seen) == pytest.approx(min(c for _, c in every))


def test_at_a_price_of_bits_the_choice_is_the_cheapest() -> None:
    """For each price: the choice that is cheapest at it is what its own number of bits buys."""
    options = choices(np.random.default_rng(9))
    for price in np.geomspace(1e-4, 1, 40):
        best = {n: min(found, key=lambda c: c.cost + price * c.bits) for n, found in options.items()}
        taken = budget.chosen(options, sum(c.bits for c in best.values()))
        assert sum(c.cost for c in taken.values()) == pytest.approx(sum(c.cost for c in best.values()))


def test_weights_that_belong_together_get_one_scheme() -> None:
    rng = np.random.default_rng(3)
    storages = [Storage(f"{i}", QTensorType("s4b32", (1, 32))) for i in range(4)]
    options = {
        name: [Choice(s, i + 1, float(c)) for i, (s, c) in enumerate(zip(storages, np.sort(rng.random(4))[::-1]))]
        for name in "wxyz"
    }
    every = [
        (2 * a + b + c + 4, sum(options[n][i].cost for n, i in zip("wxyz", (a, b, a, c))))
        for a, b, c in itertools.product(range(4), repeat=3)
    ]
    for price in np.geomspace(1e-2, 1, 20):
        bits, cost = min(every, key=lambda e: e[1] + price * e[0])
        taken = budget.chosen(options, bits, [["w", "y"]])
        assert taken["w"].storage == taken["y"].storage
        assert sum(c.cost for c in taken.values()) == pytest.approx(cost)
        assert {n: c in options[n] for n, c in taken.items()} == dict.fromkeys("wxyz", True)


def test_a_table_that_does_not_fit_by_a_hair_is_given_room_by_others() -> None:
    """Half the model in one weight: it comes last, being worth least for a bit, and all the same more than any other."""

    def options(bits: list[int], costs: list[float]) -> list[Choice]:
        return [Choice(Storage(f"{b}", QTensorType("s4b32", (1, 32))), b, c) for b, c in zip(bits, costs)]

    every = {"table": options([600, 850], [0.5, 0.1]), **{n: options([60, 85], [0.1, 0.01]) for n in "abcd"}}
    full = sum(c[-1].bits for c in every.values())

    def bits(limit: int) -> list[int]:
        return [c.bits for c in budget.chosen(every, limit).values()]

    assert bits(full) == [850, 85, 85, 85, 85]
    assert sorted(bits(full - 1)) == [60, 85, 85, 85, 850]
    assert sorted(bits(full - 100)) == [60, 60, 60, 60, 850]
    assert bits(full - 101) == [600, 85, 85, 85, 85], "without the room nothing is given up"


def test_too_few_bits_for_the_smallest_choices() -> None:
    options = choices(np.random.default_rng(0))
    least = sum(found[0].bits for found in options.values())
    assert sum(c.bits for c in budget.chosen(options, least).values()) == least
    with pytest.raises(WasatError, match=f"the least is {least}"):
        budget.chosen(options, least - 1)
