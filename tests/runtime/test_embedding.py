"""Batches of texts, of which little is padding; what is no text. The models are tests/face/test_embed.py's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasat.runtime import InputError, Model
from wasat.runtime.embedding import batches


@given(st.lists(st.integers(1, 512), max_size=120), st.integers(1, 40))
def test_a_batch_takes_at_most_a_tenth_more_than_its_texts_alone(lengths: list[int], most: int) -> None:
    """For any share of work that goes with the length, and with its square."""
    lengths.sort(reverse=True)
    found = batches(lengths, most)
    assert [i for r in found for i in r] == list(range(len(lengths)))
    for r in found:
        own = np.array([lengths[i] for i in r], float)
        assert 1 <= len(r) <= most
        for linear in (0.0, 0.5, 1.0):
            work = linear * own + (1 - linear) * own**2
            assert len(r) * work.max() <= 1.1 * work.sum() * (1 + 1e-12)


def test_equal_lengths_are_one_batch() -> None:
    assert batches([9] * 7, 32) == [range(7)]
    assert batches([9] * 7, 4) == [range(4), range(4, 7)]


def test_a_model_that_embeds_no_texts(model: Model) -> None:
    for call in (lambda: model.embed(["a"]), lambda: model.embed("a"), lambda: model.score([("a", "b")])):
        with pytest.raises(InputError, match="does not embed texts: it was made of another model"):
            call()
