"""``nn.MoE`` against the formula, token by token; its cache, its quantized weights, its training."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from numpy.testing import assert_allclose
from wasat.frontend import nn
from wasat.frontend.nn.experts import Shares
from wasat.ir import TypeMismatch, WasatError

import wasat as ws

DIM, HIDDEN, EXPERTS = 32, 48, 5


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def one_token(p: dict[str, np.ndarray], x: np.ndarray, top_k: int, shares: str) -> np.ndarray:
    """What the layer makes of one token, in float64."""
    scores = p["router.weight"] @ x
    which = np.argsort(-scores, kind="stable")[:top_k]
    if shares == "all":
        share = (np.exp(scores) / np.exp(scores).sum())[which]
    else:
        raw = np.exp(scores[which]) if shares == "chosen" else 1 / (1 + np.exp(-scores[which]))
        share = raw / raw.sum()
    out = np.zeros(DIM)
    for e, s in zip(which, share):
        gate = p["gate_proj"][e] @ x + p.get("gate_bias", np.zeros((EXPERTS, HIDDEN)))[e]
        up = p["up_proj"][e] @ x + p.get("up_bias", np.zeros((EXPERTS, HIDDEN)))[e]
        out += s * (p["down_proj"][e] @ (silu(gate) * up) + p.get("down_bias", np.zeros((EXPERTS, DIM)))[e])
    return out


def weights(program: ws.Program) -> dict[str, np.ndarray]:
    return {k: np.asarray(s.load()) for k, s in program.params.items()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shares", get_args(Shares))
def test_the_layer_is_the_formula(shares: Shares, bias: bool) -> None:
    program = nn.trace(nn.MoE(DIM, HIDDEN, EXPERTS, 3, shares=shares, bias=bias), {"x": f"f32[b, s, {DIM}]"}, outputs=["y"])
    rng = np.random.default_rng(1)
    if bias:  # which begin as zeros
        given = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in weights(program).items() if k.endswith("bias")}
        program = ws.load_weights(program, {**weights(program), **given})
    x = rng.normal(size=(2, 7, DIM)).astype(np.float32)
    p = {k: v.astype(np.float64) for k, v in weights(program).items()}
    want = np.stack([[one_token(p, t, 3, shares) for t in row] for row in x.astype(np.float64)])
    assert_allclose(ws.run(program, x=x)["y"], want, rtol=1e-4, atol=1e-5)


def test_any_leading_axes() -> None:
    x = np.random.default_rng(1).normal(size=(2, 3, 4, DIM)).astype(np.float32)
    layer = nn.MoE(DIM, HIDDEN, EXPERTS)
    whole = ws.run(nn.trace(layer, {"x": f"f32[a, b, c, {DIM}]"}, outputs=["y"]), x=x)["y"]
    one = nn.trace(layer, {"x": f"f32[{DIM}]"}, outputs=["y"])
    assert_allclose(whole[1, 2, 3], ws.run(one, x=x[1, 2, 3])["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.MoE(8, 8, 4, 5), "cannot go to 5 of 4 experts"),
        (lambda: nn.MoE(8, 8, 0), "experts is 0"),
        (lambda: nn.MoE(8, 8, 4, shares="some"), "there are chosen, all, sigmoid"),  # type: ignore[arg-type]
        (lambda: nn.MoE(8, 8, 4, act="swish"), "there is no activation"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, says: str) -> None:
    with pytest.raises(WasatError, match=says):
        make()


def test_shapes_that_do_not_fit_are_refused_at_the_line() -> None:
    with pytest.raises(TypeMismatch, match="last axis of x"):
        nn.trace(nn.MoE(8, 8, 4), {"x": "f32[s, 9]"})


class Decoder(nn.Module):
    def __init__(self) -> None:
        self.embed = nn.Embedding(40, DIM)
        self.norm, self.attention = nn.RMSNorm(DIM), nn.Attention(DIM, 2, rope=nn.RoPE(DIM // 2))
        self.other, self.experts = nn.RMSNorm(DIM), nn.MoE(DIM, HIDDEN, EXPERTS, 2)
        self.head = nn.Linear(DIM, 40)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x), nn.positions(x))
        return self.head(x + self.experts(self.other(x)))


def decoder() -> ws.Program:
    return nn.trace(Decoder(), {"tokens": "i64[b, s]"}, outputs=["logits"])


def test_experts_work_token_by_token() -> None:
    """A cache is derived, the gate and the up projection become one product."""
    program, report = ws.optimize(decoder())
    for name in ("prefill", "decode"):
        assert program[name].count("grouped_linear") == 2
        assert program[name].count("glu") == 1
    assert not [r for r in report.remarks("missed") if "softmax" in r.message or "grouped" in r.message]


@pytest.mark.parametrize("scheme", ["int8", "int4", "f16", "bf16"])
def test_experts_are_quantized(scheme: str) -> None:
    program, _ = ws.optimize(decoder(), quantize=scheme, kv_cache=False)
    stored = {k: v.type for k, v in program["forward"].params.items()}
    assert not [k for k, t in stored.items() if "proj" in k and str(t).startswith("f32[5")]
    tokens = np.random.default_rng(2).integers(0, 40, (2, 9))
    want = ws.run(decoder(), tokens=tokens)["logits"]
    off = np.abs(ws.run(program, tokens=tokens)["logits"] - want).max(axis=-1)
    assert np.median(off) < {"int8": 0.05, "int4": 0.6}.get(scheme, 0.02)
