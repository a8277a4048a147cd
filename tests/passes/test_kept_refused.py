"""What looks ahead keeps nothing: refused by what it does and the line that wrote it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_kept import DIM, INF, Convolution, Mix, Model, hidden, merged, scores, time_first
from wasat.frontend import nn
from wasat.ir import IRError

import wasat as ws


def looks_ahead_by(keep: Callable[[nn.Tensor], nn.Tensor], **how: Any) -> Mix:
    def mix(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        s, v = scores(x)
        return merged(nn.sigmoid(nn.where(keep(at), s, how.get("fill", -INF))) @ v)

    return mix


def softmax_of_zeros(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    s, v = scores(x)
    return merged(nn.softmax(nn.where(nn.causal(at), s, 0.0)) @ v)


def capped_after(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    s, v = hidden(x, at)
    return merged(nn.softmax(nn.tanh(s)) @ v)


def mean_of_keys(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    s, _ = hidden(x, at)
    return x * nn.sigmoid(s).mean(-1).sum(1)[..., None]


def queries_summed(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Each key's share of all queries: later ones read it too."""
    s, _ = hidden(x, at)
    return x * nn.softmax(s).sum(-2).sum(1)[..., None]


def diagonal(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Normalized over keys, summed over queries, and zero but where both are one: refused, for want of an order."""
    s, v = scores(x)
    w = nn.softmax(nn.where(at[:, None] == at[None, :], s, -INF))
    w = nn.where(at[:, None] == at[None, :], w, 0.0)
    return merged(w.swap(2, 3) @ v)


def twice(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    s, v = hidden(x, at)
    w = nn.sigmoid(s)
    return merged((w @ w) @ v)


def normalized_over_keys(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    s, v = hidden(x, at)
    return merged((nn.sigmoid(s) - nn.sigmoid(s).mean(-1, keepdims=True)) @ v)


def padded_keys(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Columns beside scores of which later ones are not hidden yet."""
    s, v = scores(x)
    return merged(nn.sigmoid(nn.pad(s, (0, 0, 0, 1), (0, 0, 0, 0)))[..., 1:] @ v)


def kept_column(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Cut where the first key stands, not where the column does."""
    s, v = hidden(x, at)
    return merged(nn.softmax(nn.pad(s, (0, 0, 0, 1), (0, 0, 0, 0)))[..., :-1] @ v)


def shifted_ahead(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return nn.concat([x[:, 1:], nn.full((x.shape[0], 1, DIM), 0.0)], axis=1)


def half_ahead(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    wide = nn.pad(x, (0, 1, 0), (0, 1, 0))
    return wide[:, 2:] - wide[:, : x.shape[1]]


def every_second(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return nn.pad(x, (0, 1, 0), (0, 0, 0))[:, ::2].sum(1, keepdims=True) + x


def from_the_end(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return nn.emit("cumsum", x, axis=1, reverse=True)


def scan_from_the_end(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return time_first(nn.scan(lambda h, n: (h + n, h), nn.full((x.shape[0], DIM), 0.0), time_first(x), reverse=True)[1])


def after_the_last(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return x + nn.scan(lambda h, n: (h * 0.5 + n, None), nn.full((x.shape[0], DIM), 0.0), time_first(x))[0][:, None]


def over_rows(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return time_first(nn.scan(lambda h, n: (h + n.mean(0, keepdims=True), h + n), nn.full((1, DIM), 0.0), time_first(x))[1])


def scan_of_positions(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    turn = (time_first(x), at.cast("f32"))
    return time_first(nn.scan(lambda h, n: (h + n[0] * n[1], h), nn.full((x.shape[0], DIM), 0.0), turn)[1])


def counting_scan(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A counter of turns, the same for all rows, which stand at different places."""
    start = (nn.full((x.shape[0], DIM), 0.0), nn.full((), 0.0))
    return time_first(nn.scan(lambda h, n: ((h[0] * h[1] + n, h[1] + 1.0), h[0]), start, time_first(x))[1])


LATER = "where a key is later"


def positions_alone(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    each = at.cast("f32")[:, None, None].broadcast_to(x.shape[1], x.shape[0], DIM)
    return x + time_first(nn.scan(lambda h, t: (h * 0.5 + t,) * 2, nn.full((x.shape[0], DIM), 0.5), each)[1])


def recurrence_of_positions(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    each = nn.sin(at.cast("f32"))[None, :, None, None].broadcast_to(x.shape[0], x.shape[1], 2, 4)
    return x + nn.linear_attention(each, each, each)[0].merge()


AHEAD: dict[str, tuple[Mix | Callable[[], nn.Module], str]] = {
    "one ahead": (looks_ahead_by(lambda at: at[None, :] <= at[:, None] + 1), LATER),
    "to the end of its block": (looks_ahead_by(lambda at: at[None, :] // 3 <= at[:, None] // 3), LATER),
    "no mask": (looks_ahead_by(lambda at: at[None, :] >= 0), LATER),
    "a fill that is not small": (looks_ahead_by(nn.causal, fill=-20.0), f"{LATER}, 2.06115e-09 stands in it, not 0"),
    "zeros before softmax": (softmax_of_zeros, f"{LATER}, 0 stands in it, not -inf"),
    "a cap after the mask": (capped_after, f"{LATER}, -1 stands in it, not -inf"),
    "a mean": (mean_of_keys, "reduces over the sequence"),
    "a sum over queries": (queries_summed, "takes queries together"),
    "no order": (diagonal, "takes queries together"),
    "scores of scores": (twice, "every position meets every other"),
    "a mean taken off": (normalized_over_keys, "reduces over the sequence"),
    "columns beside what is later": (padded_keys, "pads the sequence"),
    "the wrong column": (kept_column, "takes a part of the sequence"),
    "a shift ahead": (shifted_ahead, "takes a part of the sequence: element i of its result depends on token i + 1"),
    "half ahead": (half_ahead, "takes a part of the sequence: element i of its result depends on token i + 1"),
    "every second": (every_second, "takes a part of the sequence"),
    "a sum from the end": (from_the_end, "works across the sequence"),
    "a scan from the end": (scan_from_the_end, "a scan over the sequence from its end"),
    "the last carry": (after_the_last, "it gives every token what stands at the last one"),
    "rows that meet in a scan": (over_rows, "rows meet here"),
    "a scan of positions": (scan_of_positions, "repeat them for the rows first (broadcast_to)"),
    "a scan of nothing but positions": (positions_alone, "it is a scan over the sequence that reads positions alone"),
    "a recurrence of nothing but positions": (recurrence_of_positions, "it reads positions alone"),
    "a counter": (counting_scan, "the same for all rows"),
}


@pytest.mark.parametrize("name", AHEAD)
def test_what_looks_ahead_is_refused(name: str) -> None:
    mix, reason = AHEAD[name]
    program = nn.trace(Model(mix), {"tokens": "i64[b, s]"}, outputs=["logits"])  # type: ignore[arg-type]
    with pytest.raises(IRError) as e:
        ws.optimize(program, kv_cache=True, chunk=6)
    assert reason in str(e.value)
    assert "test_kept_refused.py" in str(e.value)


def test_a_convolution_to_both_sides_is_refused() -> None:
    program = nn.trace(Model(Convolution(padding="same")), {"tokens": "i64[b, s]"}, outputs=["logits"])
    with pytest.raises(IRError, match=r"a convolution over the sequence: element i of its result depends on token i \+ 1"):
        ws.optimize(program, kv_cache=True)


def by_row(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Positions, told apart by a constant for each of two rows."""
    each = nn.gather(nn.constant(np.cos(np.arange(64, dtype=np.float32)).reshape(2, 32)), at, axis=1)
    return nn.concat([x, each[..., None]], axis=-1)[..., 1:]


def test_positions_that_are_not_the_same_for_all_rows() -> None:
    program = nn.trace(Model(by_row), {"tokens": "i64[2, s]"}, outputs=["logits"])
    with pytest.raises(IRError, match="positions meet a value where they differ along the axis of its rows"):
        ws.optimize(program, kv_cache=True)
