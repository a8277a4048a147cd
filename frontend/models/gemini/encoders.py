"""What turns pixels and sound into features: a vision transformer, a convolutional network, an audio transformer."""

from __future__ import annotations

import math

from wasat.frontend import nn

from .config import Audio, ConvNet, Video, ViT


class EncoderBlock(nn.Module):
    """Bidirectional attention and an MLP, each behind a layer norm and added to its input; biases everywhere."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float, rope: nn.RoPE2D | None = None) -> None:
        self.attention_norm = nn.LayerNorm(dim, eps)
        self.attention = nn.Attention(dim, heads, bias=True, out_bias=True, causal=False, rope=rope)
        self.mlp_norm = nn.LayerNorm(dim, eps)
        self.mlp = nn.MLP(dim, hidden, "gelu_tanh")

    def __call__(self, x: nn.Tensor, positions: nn.Tensor) -> nn.Tensor:
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.mlp(self.mlp_norm(x))


class ViTEncoder(nn.Module):
    """Pixels f32[n, size, size, 3], normalized -> features f32[n, grid, grid, dim]."""

    def __init__(self, c: ViT) -> None:
        self.config = c
        learned = c.positions == "learned"
        self.patch_embedding = nn.Linear(c.patch * c.patch * 3, c.dim, bias=True)
        self.position_embedding = nn.Parameter((c.grid * c.grid, c.dim)) if learned else None
        rope = None if learned else nn.RoPE2D(c.dim // c.heads, c.grid)
        self.blocks = [EncoderBlock(c.dim, c.heads, c.hidden, c.eps, rope) for _ in range(c.layers)]
        self.norm = nn.LayerNorm(c.dim, c.eps)

    def __call__(self, pixels: nn.Tensor) -> nn.Tensor:
        x = self.patch_embedding(nn.patches(pixels, self.config.patch))
        if self.position_embedding is not None:
            x = x + self.position_embedding
        for block in self.blocks:
            x = block(x, nn.positions(x))
        return self.norm(x).reshape(x.shape[0], self.config.grid, self.config.grid, x.shape[2])


class ConvBlock(nn.Module):
    """x + MLP(norm(depthwise convolution(x))), over f32[n, channels, h, w] (ConvNeXt)."""

    def __init__(self, channels: int, c: ConvNet) -> None:
        self.depthwise = nn.Conv2d(channels, channels, c.kernel, padding="same", groups=channels)
        self.norm = nn.LayerNorm(channels, c.eps)
        self.mlp = nn.MLP(channels, c.expansion * channels)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        y = self.mlp(self.norm(self.depthwise(x).transpose(0, 2, 3, 1)))
        return x + y.transpose(0, 3, 1, 2)


class Stage(nn.Module):
    """Halves f32[n, inputs, h, w], then refines it."""

    def __init__(self, inputs: int, channels: int, blocks: int, c: ConvNet) -> None:
        self.down = nn.Conv2d(inputs, channels, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(channels, c.eps)
        self.blocks = [ConvBlock(channels, c) for _ in range(blocks)]

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        x = nn.gelu(self.norm(self.down(x).transpose(0, 2, 3, 1))).transpose(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x)
        return x


class ConvEncoder(nn.Module):
    """Pixels f32[n, size, size, 3], normalized -> features f32[n, grid, grid, dim]."""

    def __init__(self, c: ConvNet) -> None:
        self.config = c
        inputs = (3, *c.channels)
        self.stages = [Stage(i, o, b, c) for i, o, b in zip(inputs, c.channels, c.blocks)]
        self.norm = nn.LayerNorm(c.dim, c.eps)

    def __call__(self, pixels: nn.Tensor) -> nn.Tensor:
        x = pixels.transpose(0, 3, 1, 2)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x.transpose(0, 2, 3, 1))


class TimeEncoder(nn.Module):
    """Features f32[n, frames, tokens, dim] at times f32[n, frames] in seconds from the first -> features of that shape.

    Times are added as sines and cosines; each place then attends to itself in the other frames.
    """

    def __init__(self, c: Video, dim: int, eps: float) -> None:
        self.dim = dim
        self.blocks = [EncoderBlock(dim, c.heads or 1, c.hidden or dim, eps) for _ in range(c.layers or 0)]

    def __call__(self, x: nn.Tensor, times: nn.Tensor) -> nn.Tensor:
        n, frames, tokens, dim = x.shape
        x = x + nn.sinusoid(times, self.dim)[:, :, None]
        if not self.blocks:
            return x
        x = x.transpose(0, 2, 1, 3).reshape(n * tokens, frames, dim)
        for block in self.blocks:
            x = block(x, nn.positions(x))
        return x.reshape(n, tokens, frames, dim).transpose(0, 2, 1, 3)


class AudioEncoder(nn.Module):
    """Waves f32[n, samples] in [-1, 1] -> features f32[n, tokens, dim]."""

    def __init__(self, c: Audio) -> None:
        self.config = c
        self.conv1 = nn.Conv1d(c.mels, c.dim, 3, c.strides[0], padding=1)
        self.conv2 = nn.Conv1d(c.dim, c.dim, 3, c.strides[1], padding=1)
        self.position_embedding = nn.Parameter((c.features, c.dim))
        self.blocks = [EncoderBlock(c.dim, c.heads, c.hidden, c.eps) for _ in range(c.layers)]
        self.norm = nn.LayerNorm(c.dim, c.eps)

    def __call__(self, wave: nn.Tensor) -> nn.Tensor:
        c = self.config
        x = nn.log_mel(wave, c.rate, mels=c.mels, size=c.window, hop=c.hop).transpose(0, 2, 1)
        x = nn.gelu(self.conv2(nn.gelu(self.conv1(x)))).transpose(0, 2, 1) + self.position_embedding
        for block in self.blocks:
            x = block(x, nn.positions(x))
        return self.norm(x).reshape(x.shape[0], c.tokens, c.pool, c.dim).mean(axis=2)


def pooled(features: nn.Tensor, tokens: int) -> nn.Tensor:
    """f32[n, grid, grid, dim] -> f32[n, tokens, dim]: means of equal squares, row by row."""
    n, grid, _, dim = features.shape
    side = math.isqrt(tokens)
    each = grid // side
    return features.reshape(n, side, each, side, each, dim).mean(axis=(2, 4)).reshape(n, tokens, dim)
