"""Linear attention in its quadratic form, as retention, Lightning attention and gates spell it; and what is nearly that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.ir import Program
from wasat.ir.ops.linear_attention import LinearAttentionAttrs
from wasat.passes import Cleanup, FuseRecurrence, PassManager

import wasat as ws

INF = float("inf")
QKV = {"q": "f32[b, 2, s, 3]", "k": "f32[b, 2, s, 3]", "v": "f32[b, 2, s, 5]"}
GATED = QKV | {"g": "f32[b, 2, s]"}
ROWS = {n: t.replace("[b, 2, s,", "[b, s, 2,") for n, t in QKV.items()}
PACES = (-0.3, -0.02)
Made = Callable[..., nn.Tensor]


def distances(x: nn.Tensor, axis: int = 2) -> nn.Tensor:
    at = nn.arange(x.shape[axis])
    return at[:, None] - at[None, :]


def lightning(
    q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, *, seen: Made = lambda d: d >= 0, scores: Made = lambda s: s
) -> nn.Tensor:  # fmt: skip
    """Decays by the distance, a pace for each head."""
    d = distances(q)
    decays = nn.where(seen(d), nn.exp(nn.constant(PACES)[:, None, None] * d.cast("f32")), 0.0)
    return scores(q @ k.T * decays) @ v


def hidden_first(q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> nn.Tensor:
    """Logarithms of the decays, -inf where a key is later; scaled."""
    d = distances(q)
    logs = nn.where(d < 0, -INF, nn.constant(PACES)[:, None, None] * d.cast("f32"))
    return (q @ k.T * 0.25 * nn.exp(logs)) @ v


def triangle(q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> nn.Tensor:
    """No decays; divided by what all weights come to."""
    q, k = nn.exp(q), nn.exp(k)
    a = nn.where(distances(q) >= 0, q @ k.T, 0.0)
    return (a / (a.sum(-1, keepdims=True) + 1e-6)) @ v


def retention(q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> nn.Tensor:
    """Positions in front of heads; one head of keys for both; divided before, by no less than 1."""
    q, k, v = (x.swap(1, 2) for x in (q, k[:, :, :1], v))
    d = distances(q)
    a = q @ k.T * nn.where(d >= 0, nn.exp(nn.constant(PACES)[:, None, None] * d.cast("f32")), 0.0)
    return ((a / nn.maximum(nn.abs(a.sum(-1, keepdims=True)), 1.0)) @ v).swap(1, 2)


def gated(q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, g: nn.Tensor) -> nn.Tensor:
    sums = nn.cumsum(g, axis=-1)
    d = nn.where(distances(q) < 0, -INF, sums[..., :, None] - sums[..., None, :])
    return (q @ k.T * nn.exp(d)) @ v


def alike(q: nn.Tensor, k: nn.Tensor) -> nn.Tensor:
    """Keys that are the values, too."""
    return lightning(q, k, k)


class Scores(nn.Module):
    def __init__(self, made: Made, **how: Any) -> None:
        self.made, self.how = made, how

    def __call__(self, **given: nn.Tensor) -> nn.Tensor:
        return self.made(**given, **self.how)


def fed(types: Mapping[str, str], b: int, s: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(s)
    shapes = {n: [{"b": b, "s": s}.get(d) or int(d) for d in t[4:-1].split(", ")] for n, t in types.items()}
    return {n: rng.uniform(-1, 0 if n == "g" else 1, x).astype(np.float32) for n, x in shapes.items()}


def fused(made: Made, types: Mapping[str, str], **how: Any) -> tuple[Program, Program, list[LinearAttentionAttrs]]:
    program = nn.trace(Scores(made, **how), types, outputs=["y"])
    other = Program({"forward": program["forward"].clone()})
    PassManager([Cleanup(), FuseRecurrence(), Cleanup()]).run(other)
    return program, other, [n.attrs for n in other["forward"].nodes if isinstance(n.attrs, LinearAttentionAttrs)]


@pytest.mark.parametrize(
    "made, types, rules",
    [(lightning, QKV, ["gated"]), (hidden_first, QKV, ["gated"]), (triangle, QKV, ["linear"] * 2),
     (retention, ROWS, ["gated"] * 2), (gated, GATED, ["gated"]),
     (alike, {n: QKV[n] for n in "qk"}, ["gated"])],
    ids=["Lightning", "hidden first", "triangle", "retention", "gated", "keys are values"],
)  # fmt: skip
def test_spellings(made: Made, types: Mapping[str, str], rules: list[str]) -> None:
    program, other, found = fused(made, types)
    assert [a.rule for a in found] == rules
    assert not {n.op.name for n in other["forward"].nodes} & {"matmul", "reduce_sum", "cumsum", "select"}
    for b, s in ((2, 7), (1, 1), (1, 2), (2, 61)):
        feed = fed(types, b, s)
        np.testing.assert_allclose(ws.run(other, **feed)["y"], ws.run(program, **feed)["y"], rtol=1e-5, atol=2e-6)


MISSES: dict[str, dict[str, Any]] = {
    "a window": {"seen": lambda d: (d >= 0) & (d < 400)},
    "a window beyond what is tried": {"seen": lambda d: (d >= 0) & (d < 5000)},
    "a window in other units": {"seen": lambda d: (d >= 0) & (d.cast("f32") * 1e-4 < 1.0)},
    "the first token apart": {"seen": lambda d: (d >= 0) & (nn.arange(d.shape[0])[None, :] > 0)},
    "later keys": {"seen": lambda d: d >= -1},
    "far ones alone": {"seen": lambda d: d >= 2},
    "squared": {"scores": lambda s: s * s},
    "no less than 0": {"scores": nn.relu},
    "a number added": {"scores": lambda s: s + 1e-4},
}


@pytest.mark.parametrize("how", MISSES.values(), ids=MISSES)
def test_near_miss_is_left_alone(how: dict[str, Any]) -> None:
    program, other, found = fused(lightning, QKV, **how)
    assert found == []
    feed = fed(QKV, 1, 9)
    np.testing.assert_array_equal(ws.run(other, **feed)["y"], ws.run(program, **feed)["y"])


def test_a_state_is_carried_instead_of_keys() -> None:
    """From scores of all tokens to a carry of one matrix for each head."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            self.embed, self.head = nn.Embedding(11, 6, std=1.0), nn.Linear(6, 11)

        def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
            x = self.embed(tokens)
            y = x.heads(2).swap(1, 2)
            return self.head(x + lightning(nn.sin(y), nn.tanh(y), y).swap(1, 2).merge())

    program, _ = ws.optimize(nn.trace(Decoder(), {"tokens": "i64[b, s]"}, outputs=["logits"]), chunk=8)
    kept = {v.name: str(v.type) for v in program["decode"].inputs if v.name in program["decode"].output_names}
    assert kept == {"carry.0": "f32[b, 2, 3, 3]"}
