"""Mixtures of experts: each token goes through a few of many feed-forward layers, chosen by a router."""

from __future__ import annotations

from typing import Literal, get_args

from wasat.ir import DType, WasatError

from . import functions as F
from .layers import Linear, _sizes, activation
from .module import Module, Parameter
from .tensor import Tensor, emit

Shares = Literal["chosen", "all", "sigmoid"]


def grouped_linear(
    x: Tensor, weight: Tensor, groups: Tensor, bias: Tensor | None = None, name: str | None = None
) -> Tensor:
    """Each row by its group's matrix: ``x[..., k]``, ``weight[e, n, k]``, int ``groups[...]``, ``bias[e, n]`` -> ``[..., n]``.

    Leading axes of x and groups broadcast: ``x[s, 1, k]`` with ``groups[s, j]`` are j products of each row. Only the matrices
    that rows ask for are read.
    """
    operands = (x, weight, groups) if bias is None else (x, weight, groups, bias)
    return emit("grouped_linear", *operands, name=name)


class MoE(Module):
    """Mixture of experts: of gated layers, ``down(act(gate(x)) * up(x))``, ``top_k`` for each token, summed by their shares.

    The router scores each expert. ``shares``: ``"chosen"``, softmax over the scores of those chosen (Mixtral, gpt-oss);
    ``"all"``, softmax over all, of which the chosen ones' are taken as they are (OLMoE, Qwen2-MoE); ``"sigmoid"``, sigmoids of
    the chosen ones, made to sum to 1 (DeepSeek-V3). Weights are stacked: ``gate_proj`` and ``up_proj`` [experts, hidden, dim],
    ``down_proj`` [experts, dim, hidden]. ``x[..., dim] -> [..., dim]``.
    """

    def __init__(
        self, dim: int, hidden: int, experts: int, top_k: int = 2, act: str = "silu", shares: Shares = "chosen",
        bias: bool = False, dtype: DType | str = "f32",
    ) -> None:  # fmt: skip
        _sizes(self, dim=dim, hidden=hidden, experts=experts, top_k=top_k)
        if top_k > experts:
            raise WasatError(f"MoE: a token cannot go to {top_k} of {experts} experts")
        if shares not in get_args(Shares):
            raise WasatError(f"MoE: shares is {shares!r}; there are {', '.join(get_args(Shares))}")
        self.router = Linear(dim, experts, dtype=dtype)
        self.gate_proj = Parameter((experts, hidden, dim), dtype, std=dim**-0.5)
        self.up_proj = Parameter((experts, hidden, dim), dtype, std=dim**-0.5)
        self.down_proj = Parameter((experts, dim, hidden), dtype, std=hidden**-0.5)
        self.gate_bias = Parameter((experts, hidden), dtype, std=0.0) if bias else None
        self.up_bias = Parameter((experts, hidden), dtype, std=0.0) if bias else None
        self.down_bias = Parameter((experts, dim), dtype, std=0.0) if bias else None
        self.top_k, self.shares, self.act = top_k, shares, activation(act)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The share of each chosen expert ``[..., top_k]``, and which they are."""
        scores = self.router(x)
        if self.shares == "all":
            return F.top_k(F.softmax(scores), self.top_k)
        best, which = F.top_k(scores, self.top_k)
        if self.shares == "chosen":
            return F.softmax(best), which
        share = F.sigmoid(best)
        return share / share.sum(-1, keepdims=True), which

    def __call__(self, x: Tensor) -> Tensor:
        return self.mixed(x, *self.route(x))

    def mixed(self, x: Tensor, share: Tensor, which: Tensor) -> Tensor:
        """What the experts ``which[..., top_k]`` make of x, summed by their shares."""
        rows = x.reshape(*x.shape[:-1], 1, x.shape[-1])
        gate = grouped_linear(rows, self.gate_proj, which, self.gate_bias, "gate_proj")
        up = grouped_linear(rows, self.up_proj, which, self.up_bias, "up_proj")
        y = grouped_linear(self.gated(gate, up), self.down_proj, which, self.down_bias, "down_proj")
        return (y * share.reshape(*share.shape, 1)).sum(-2)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """What goes into the way down."""
        return self.act(gate) * up
