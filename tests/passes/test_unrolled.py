"""Loops over the sequence that were written out for the length of an example: said where they are, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.ir import IRError, Program
from wasat.passes.analyses.unrolled import unrolled

import wasat as ws

TURNS = 5
Made = Callable[[nn.Tensor], nn.Tensor]


def taken(x: nn.Tensor, i: int) -> nn.Tensor:
    return nn.gather(x, nn.constant(np.array(i)), axis=1)


def sliced(x: nn.Tensor, i: int) -> nn.Tensor:
    return x[:, i : i + 1].reshape(x.shape[0], x.shape[2])


def turns(x: nn.Tensor, take: Callable[[nn.Tensor, int], nn.Tensor] = taken, count: int = TURNS) -> list[nn.Tensor]:
    made = [take(x, 0)]
    for i in range(1, count):
        made.append(nn.tanh(made[-1] * 0.5 + take(x, i)))
    return made


def joined(x: nn.Tensor) -> nn.Tensor:
    """Side by side (Mamba)."""
    return nn.stack(turns(x), axis=1)


def by_slices(x: nn.Tensor) -> nn.Tensor:
    return nn.stack(turns(x, sliced), axis=1)


def written(x: nn.Tensor) -> nn.Tensor:
    """Into zeros as long as the sequence, one after the other (RWKV)."""
    y = x * 0.0
    for i, h in enumerate(turns(x)):
        y = nn.emit("scatter", y, nn.constant(np.array([i])), h[:, None], axis=1)
    return y


class Tokens(nn.Module):
    """``made`` of an embedding [b, s, 8]."""

    def __init__(self, made: Made) -> None:
        self.embed, self.made = nn.Embedding(11, 8, std=1.0), made

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        return self.made(self.embed(tokens))


def traced(made: Made, tokens: str = "i64[b, s]") -> Program:
    return nn.trace(Tokens(made), {"tokens": tokens}, outputs=["y"])


@pytest.mark.parametrize("made", [joined, by_slices, written], ids=lambda f: f.__name__)
def test_found(made: Made) -> None:
    found = unrolled(traced(made)["forward"])
    assert found is not None
    assert (str(found[0].type), found[1]) == ("f32[b, s, 8]", TURNS)


NONE: dict[str, tuple[Made, str]] = {
    "a fixed length": (joined, "i64[b, 5]"),
    "two turns": (lambda x: nn.stack(turns(x, count=2), axis=1), "i64[b, s]"),
    "registers": (lambda x: taken(x, 0) + taken(x, 1) + taken(x, 2) + taken(x, 3), "i64[b, s]"),
    "elements side by side": (lambda x: nn.stack([nn.tanh(taken(x, i)) for i in range(TURNS)], axis=1), "i64[b, s]"),
    "every second": (lambda x: nn.stack(turns(x, lambda x, i: taken(x, 2 * i)), axis=1), "i64[b, s]"),
    "along features": (lambda x: nn.stack(turns(x.swap(1, 2)), axis=1), "i64[b, s]"),
    "from the end": (lambda x: nn.stack(turns(x, lambda x, i: taken(x, TURNS - 1 - i)), axis=1), "i64[b, s]"),
    "the last alone": (lambda x: turns(x)[-1], "i64[b, s]"),
}


@pytest.mark.parametrize("name", NONE)
def test_near_miss(name: str) -> None:
    made, tokens = NONE[name]
    assert unrolled(traced(made, tokens)["forward"]) is None


def test_said_when_optimized_and_with_the_refusal() -> None:
    program = traced(written)
    says = f"a loop over the sequence is written out for {TURNS} turns"
    _, report = ws.optimize(program, kv_cache=False)
    assert [s.name for s in report.steps if any(says in r.message for r in s.remarks)] == ["import"]
    with pytest.raises(IRError, match=says):
        ws.optimize(program, kv_cache=True)
