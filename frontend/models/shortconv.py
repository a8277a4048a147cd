"""Short convolutions in place of attention (LFM2, arXiv:2511.23404)."""

from __future__ import annotations

from dataclasses import dataclass

from wasat.frontend import nn


@dataclass(frozen=True)
class Short:
    """Which layers of a decoder have one, how many tokens it sees, and whether it has biases."""

    layers: frozenset[int]
    width: int
    bias: bool


class ShortConvolution(nn.Module):
    """``out(after * convolution(before * value))`` of each feature and its last few tokens: ``x[b, s, dim]`` -> same."""

    def __init__(self, dim: int, o: Short) -> None:
        self.in_proj = nn.Linear(dim, 3 * dim, o.bias)
        self.conv = nn.Conv1d(dim, dim, o.width, padding="causal", groups=dim, bias=o.bias)
        self.out_proj = nn.Linear(dim, dim, o.bias)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        before, after, value = self.in_proj(x).split(3)
        mixed = self.conv((before * value).transpose(0, 2, 1)).transpose(0, 2, 1)
        return self.out_proj(after * mixed)
