"""What stands beside each token: positions of several kinds, counted where they are not given."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.runtime.along import Along
from wasat.runtime.errors import InputError
from wasat.runtime.interface import TensorSpec

TOKENS = TensorSpec("tokens", "i64", ("b", "s"))


def along(*shape: int | str) -> Along:
    return Along([TOKENS, TensorSpec("position_ids", "int64", shape)], "tokens")


def test_each_kind_counts() -> None:
    got = along(3, "b", "s").fit({}, np.array([4, 0]), 2)["position_ids"]
    assert got.tolist() == [[[4, 5], [0, 1]]] * 3
    assert along("b", "s").fit({}, np.array([4, 0]), 2)["position_ids"].tolist() == [[4, 5], [0, 1]]
    assert along(3, 1, "s").fit({}, np.array([4, 4]), 2)["position_ids"].tolist() == [[[4, 5]]] * 3


def test_kinds_that_are_given_go_on_behind_the_prompt() -> None:
    at = np.array([[[0, 1, 1, 2], [0, 1, 2, 3]], [[0, 1, 2, 2], [0, 1, 2, 3]]])
    kinds = along(2, "b", "s")
    fitted = kinds.fit({"position_ids": at}, np.array([0, 0]), 4)
    assert kinds.after(fitted, np.array([4, 3]), 2)["position_ids"].tolist() == [[[4], [4]], [[4], [4]]]
    assert kinds.part(fitted, 1, 3)["position_ids"].tolist() == at[..., 1:3].tolist()
    assert kinds.row(fitted, 1)["position_ids"].tolist() == at[:, 1:].tolist()


@pytest.mark.parametrize(
    "shape, past, reason",
    [
        (("n", "b", "s"), [0, 0], "step\\(\\) or generate\\(inputs=\\) is to give it"),
        ((3, 1, "s"), [4, 0], "is one for all rows, which hold \\[4, 0\\] tokens"),
    ],
    ids=["how many kinds", "one for all rows"],
)
def test_what_cannot_be_counted(shape: tuple[int | str, ...], past: list[int], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        along(*shape).fit({}, np.array(past), 2)
