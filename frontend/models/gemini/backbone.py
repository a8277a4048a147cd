"""The decoder that all modalities share."""

from __future__ import annotations

from wasat.frontend import nn

from .config import Text


class Block(nn.Module):
    """Attention and gated feed-forward, each behind an RMS norm (``post_norm``: and before one) and added to its input."""

    def __init__(self, c: Text, window: int | None) -> None:
        scaling = {"rope_type": "linear", "factor": c.rope_factor} if c.rope_factor != 1.0 and window is None else None
        rope = nn.RoPE(c.head_dim, c.theta if window is None else c.local_theta, scaling)
        self.attention_norm = nn.RMSNorm(c.dim, c.eps)
        self.attention = nn.Attention(
            c.dim, c.heads, c.kv_heads, c.head_dim, window=window, softcap=c.attention_softcap, scale=c.scale,
            qk_norm=c.eps if c.qk_norm else None, rope=rope,
        )  # fmt: skip
        self.attention_post_norm = nn.RMSNorm(c.dim, c.eps) if c.post_norm else None
        self.mlp_norm = nn.RMSNorm(c.dim, c.eps)
        self.mlp = nn.GLU(c.dim, c.hidden, c.activation)
        self.mlp_post_norm = nn.RMSNorm(c.dim, c.eps) if c.post_norm else None
        for last in (self.attention.o_proj, self.mlp.down_proj):  # so that depth does not drown the tokens (GPT-2)
            mean, std = last.weight.noise
            last.weight.noise = (mean, std * (2 * c.layers) ** -0.5)

    def __call__(self, x: nn.Tensor, positions: nn.Tensor) -> nn.Tensor:
        y = self.attention(self.attention_norm(x), positions)
        x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
        y = self.mlp(self.mlp_norm(x))
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y))


class GatedCross(nn.Module):
    """Cross-attention and feed-forward behind gates tanh(g), g = 0 at first: the block is the identity until it has learned
    something (Flamingo, arXiv:2204.14198).
    """

    def __init__(self, c: Text) -> None:
        self.attention_norm = nn.RMSNorm(c.dim, c.eps)
        self.attention = nn.CrossAttention(c.dim, c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim)
        self.attention_gate = nn.Parameter((1,), std=0.0)
        self.mlp_norm = nn.RMSNorm(c.dim, c.eps)
        self.mlp = nn.GLU(c.dim, c.hidden, c.activation)
        self.mlp_gate = nn.Parameter((1,), std=0.0)

    def __call__(self, x: nn.Tensor, memory: nn.Tensor, known: nn.Tensor) -> nn.Tensor:
        """x f[b, s, dim] over memory f[b, t, dim], where known bool[b, t]; a row that knows nothing attends to nothing."""
        some = known.any(axis=1, keepdims=True)
        y = self.attention(self.attention_norm(x), memory, (known | ~some)[:, None])
        x = x + nn.tanh(self.attention_gate) * y * some[..., None].cast(x.dtype)
        return x + nn.tanh(self.mlp_gate) * self.mlp(self.mlp_norm(x))


class Backbone(nn.Module):
    """f[b, s, dim] -> f[b, s, dim]; causal."""

    def __init__(self, c: Text, cross_every: int | None) -> None:
        self.blocks = [Block(c, c.window if (i + 1) % c.period else None) for i in range(c.layers)]
        self.cross = {str(i): GatedCross(c) for i in range(c.layers) if cross_every and (i + 1) % cross_every == 0}
        self.norm = nn.RMSNorm(c.dim, c.eps)

    def __call__(self, x: nn.Tensor, memory: tuple[nn.Tensor, nn.Tensor] | None = None) -> nn.Tensor:
        """``memory``: what :class:`GatedCross` takes, where there are such blocks."""
        positions = nn.positions(x)
        for i, block in enumerate(self.blocks):
            if memory is not None and str(i) in self.cross:
                x = self.cross[str(i)](x, *memory)
            x = block(x, positions)
        return self.norm(x)
