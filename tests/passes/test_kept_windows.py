"""Windows of the sequence that other operations than convolutions read, and convolutions over what is no sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kept import DIM, INF, VOCAB, Mix, Model, Rows, check_incremental, derived, derived_of, merged, scores
from wasat.frontend import nn
from wasat.frontend.nn.tensor import emit
from wasat.ir import ArrayParam, IRError, type_of

import wasat as ws

MIXING = np.array([[0.5, -1.0], [0.25, 1.5]], np.float32)


def pooled(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Means of the last four tokens; the largest of the last two, every other one back, beside the least number."""
    y = nn.avg_pool1d(nn.pad(x, (0, 3, 0), (0, 0, 0)).swap(1, 2), 4, 1).swap(1, 2)
    return y + window(x, "max", 2, dilation=2, low=2)


def summed_windows(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Sums over three tokens, and over one."""
    return window(x, "sum", 3, low=2) * 0.5 + window(x, "sum", 1)


def window(x: nn.Tensor, kind: str, taps: int, dilation: int = 1, low: int = 0, high: int = 0, stride: int = 1) -> nn.Tensor:
    attrs = {"kernel": (taps,), "strides": (stride,), "low": (low,), "high": (high,), "dilation": (dilation,)}
    return emit("pool", x.swap(1, 2), kind=kind, **attrs).swap(1, 2)


def conv(x: nn.Tensor, weight: nn.Tensor, groups: int = 1, strides: int = 1, low: int = 0, high: int = 0) -> nn.Tensor:
    n = len(x.shape) - 2
    own = {"strides": (strides,) * n, "low": (low,) * n, "high": (high,) * n, "dilation": (1,) * n, "input_dilation": (1,) * n}
    return emit("conv", x, weight, groups=groups, **own)


def heads_by_convolution(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Heads mixed before and after, by convolutions over one place each."""
    s, v = scores(x)
    mixing = nn.constant(MIXING)[:, :, None, None]
    s = nn.where(nn.causal(at), conv(s, mixing), -INF)
    return merged(conv(nn.softmax(s), mixing) @ v)


def each_place(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A convolution over one place, of two groups, is a layer of each token."""
    weight = nn.constant(np.linspace(-1, 1, DIM * DIM // 2, dtype=np.float32).reshape(DIM, DIM // 2, 1))
    return conv(x.swap(1, 2), weight, groups=2).swap(1, 2)


def layout(blind: bool = False) -> np.ndarray:
    """Which of 48 see which: the first block of four, their own, some by chance; ``blind``: one sees nothing."""
    i, j = np.indices((48, 48))
    seen = (j < 4) | (i // 4 == j // 4) | (np.random.default_rng(0).random((48, 48)) < 0.2)
    return seen & (j <= i) & ~((i == 5) & blind)


def block_table(x: nn.Tensor, at: nn.Tensor, table: np.ndarray | None = None) -> nn.Tensor:
    """A table of what sees what, its first rows and columns; a finite number hides."""
    (s, v), n = scores(x), at.shape[0]
    return merged(nn.softmax(nn.where(nn.constant(layout() if table is None else table)[:n, :n], s, -1e9)) @ v)


def head_tables(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A table of numbers for each head, added: slopes, and minus infinity at later keys."""
    (s, v), n, (i, j) = scores(x), at.shape[0], np.indices((48, 48))
    slopes = np.stack([np.where(j <= i, (j - i) * m, -INF) for m in (0.5, 0.1)]).astype(np.float32)
    return merged(nn.softmax(s + nn.constant(slopes)[:, :n, :n]) @ v)


def picked_table(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Rows of a table at the positions, of these the first columns."""
    (s, v), n = scores(x), at.shape[0]
    return merged(nn.softmax(nn.where(nn.gather(nn.constant(layout()), at)[:, :n], s, -INF)) @ v)


WINDOWS: dict[str, Mix] = {f.__name__: f for f in (pooled, summed_windows, heads_by_convolution, each_place)}
WINDOWS |= {f.__name__: f for f in (block_table, head_tables, picked_table)}


@pytest.mark.parametrize("name", WINDOWS)
@given(st.data())
@settings(max_examples=2, deadline=None)
def test_incremental_equals_full(name: str, data: st.DataObject) -> None:
    check_incremental(*derived_of(WINDOWS[name]), data)


@pytest.mark.parametrize(
    "name, kept",
    [
        ("pooled", ["f32[b, 2, 8]", "f32[b, 3, 8]"]),
        ("summed_windows", ["f32[b, 2, 8]"]),
        ("heads_by_convolution", ["f32[b, c, 2, 4]"]),
        ("each_place", []),
        ("block_table", ["f32[b, c, 2, 4]", "f32[b, c, 2, 4]"]),
        ("head_tables", ["f32[b, c, 2, 4]", "f32[b, c, 2, 4]"]),
        ("picked_table", ["f32[b, c, 2, 4]", "f32[b, c, 2, 4]"]),
    ],
)
def test_what_is_kept(name: str, kept: list[str]) -> None:
    _, program = derived_of(WINDOWS[name])
    names = set(program.interface.state_names)
    assert sorted(str(v.type) for v in program["decode"].inputs if v.name in names) == kept


AHEAD: dict[str, tuple[Mix, str]] = {
    "a token sees nothing": (lambda x, at: block_table(x, at, layout(blind=True)), "some token sees nothing"),
    "the first sees nothing": (lambda x, at: block_table(x, at, layout() & ~np.eye(48, dtype=bool)), "token sees nothing"),
    "one ahead": (lambda x, at: window(x, "max", 3, low=1, high=1), "element i of its result depends on token i + 1"),
    "shorter": (lambda x, at: nn.pad(window(x, "sum", 3), (0, 2, 0), (0, 0, 0)), "depends on token i + 2"),
    "every other": (lambda x, at: x + window(x, "sum", 1, stride=2).sum(1, keepdims=True), "windows of the sequence"),
    "over scores": (
        lambda x, at: merged(nn.softmax(emit("pool", scores(x)[0], kind="max", kernel=(1, 2), strides=(1, 1), low=(0, 1),
                                             high=(0, 0), dilation=(1, 1))) @ scores(x)[1]), "windows of the sequence",
    ),
    "one place, every other": (
        lambda x, at: x + conv(x.swap(1, 2), nn.constant(np.ones((DIM, DIM, 1), np.float32)), strides=2).sum(2)[:, None],
        "convolution over the sequence",
    ),
    "one place, one ahead": (
        lambda x, at: conv(x.swap(1, 2), nn.constant(np.ones((DIM, DIM, 1), np.float32)), high=1).swap(1, 2)[:, 1:],
        "depends on token i + 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AHEAD)
def test_what_looks_ahead_is_refused(name: str) -> None:
    mix, reason = AHEAD[name]
    with pytest.raises(IRError) as e:
        ws.optimize(nn.trace(Model(mix), {"tokens": "i64[b, s]"}, outputs=["logits"]), kv_cache=True, chunk=6)
    assert reason in str(e.value)


class BlocksSeen(nn.Module):
    """Which block of four sees which, as a parameter that positions pick from; a finite number hides."""

    def __init__(self) -> None:
        self.table = nn.Parameter((12, 12))

    def __call__(self, x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        (s, v), block = scores(x), at // 4
        seen = (nn.gather(nn.gather(self.table, block), block, axis=1) > 0) & nn.causal(at)
        return merged(nn.softmax(nn.where(seen, s, -1e9)) @ v)


@pytest.mark.parametrize("blind", [False, True])
def test_tables_are_looked_at_for_tokens_that_see_nothing(blind: bool) -> None:
    """Under a number, such a token weighs all keys alike, later ones too."""
    program = nn.trace(Model(BlocksSeen()), {"tokens": "i64[b, s]"}, outputs=["logits"])
    [name] = [n for n in program.params if "table" in n]
    table = (np.eye(12) + (np.arange(12) == 0)).astype(np.float32)
    table[7] *= not blind
    program.params[name] = ArrayParam(table, type_of(table))
    if not blind:
        assert "decode" in ws.optimize(program, kv_cache=True, chunk=6)[0].graphs
        return
    with pytest.raises(IRError, match="some token sees nothing"):
        ws.optimize(program, kv_cache=True, chunk=6)


def test_a_ring_behind_the_first_positions_turns_round() -> None:
    """Of 16 slots, at the 17th position."""
    forward, served = derived("streaming")
    session, tokens = Rows(served, 1), np.random.default_rng(0).integers(0, VOCAB, (1, 19))
    for n in range(0, 18, 6):
        session.feed(tokens[:, n : n + 6], np.array([6]))
    got = session.feed(tokens[:, 18:], np.array([1]))
    np.testing.assert_allclose(got[0], ws.run(forward, tokens=tokens)["logits"][0, -1], rtol=1e-4, atol=1e-5)
