"""What is read off a mask is held against the mask, computed at a few sizes."""

from __future__ import annotations

import pytest
from wasat.ir import Builder, DimLike, DType, Graph, TensorType, Value, symbol
from wasat.passes.analyses import mask
from wasat.passes.analyses.confirm import agrees
from wasat.passes.analyses.mask import Mask, analyze, hidden_by

S = symbol("s")


def band(window: int, size: DimLike = S, ahead: int = 0) -> Value:
    """bool[s, s]: queries see the last ``window`` keys, and so many after them."""
    b = Builder(Graph("f"))
    at = b.iota(size=size)
    behind = b.sub(b.reshape(at, shape=(size, 1)), at)
    return b.logical_and(b.greater_equal(behind, -ahead), b.less(behind, window))


def kept(x: float) -> bool:
    return x == 1


@pytest.mark.parametrize("size", [S, 64])
@pytest.mark.parametrize("window", [1, 5, 40])
def test_a_window_is_neither_larger_nor_smaller(window: int, size: DimLike) -> None:
    def read_as(n: int | None, causal: bool = True, whole: bool = True) -> bool:
        return agrees(band(window, size), (2, 4, size, size), kept, causal, n, whole)

    assert read_as(window)
    assert not read_as(window + 1)
    assert not read_as(window - 1)
    assert not read_as(None)
    assert not read_as(window, causal=False)
    # what is no more than implied may say less, and not more
    assert read_as(window + 1, whole=False)
    assert read_as(None, whole=False)
    assert not read_as(window - 1, whole=False)


def test_a_look_ahead_is_seen() -> None:
    assert not agrees(band(4, ahead=1), (S, S), kept, True, 4, False)


def test_queries_end_where_keys_end() -> None:
    """Scores of s queries over p + s keys: query i stands at p + i."""
    b, p = Builder(Graph("f")), symbol("p")
    behind = b.sub(b.reshape(b.iota(size=S), shape=(S, 1)), b.iota(size=p + S))
    causal = b.greater_equal(b.add(behind, b.dim_size(size=p)), 0)
    assert agrees(causal, (1, 1, S, p + S), kept, True, None, True)
    assert not agrees(b.greater_equal(behind, 0), (1, 1, S, p + S), kept, True, None, True)


def test_what_takes_data_is_not_computed() -> None:
    g = Graph("f")
    x = g.add_input("x", TensorType(DType.BOOL, (S, S)))
    assert agrees(x, (S, S), kept, True, 3, True)


def test_what_disagrees_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a rule of the reading were wrong by one."""
    v = band(4)
    assert v.node is not None
    fill = Builder(v.node.graph).select(v, 0.0, float("-inf"))
    right = hidden_by(fill, (S, S))
    assert right is not None
    assert (right[0].window, analyze(v, (S, S)).window) == (4, 4)

    read = mask._read
    monkeypatch.setattr(mask, "_read", lambda *args: (Mask(window=(read(*args)[0].window or 0) + 1), True))
    assert hidden_by(fill, (S, S)) is None
    found = analyze(v, (S, S))
    assert (found.causal, found.window) == (False, None)
    assert [x for x, _ in found.operands] == list(v.node.inputs)


def test_scores_of_another_size_than_the_mask() -> None:
    """As in files that were exported for one length."""
    for shape, right in (((S, S), True), ((21, 21), False)):
        assert agrees(band(4), shape, kept, True, 4, True) is right
