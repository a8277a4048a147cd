"""The decoder that most families of language models are: a family is a set of options. Names are the checkpoints'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wasat.frontend import nn

from .encoders import put

PRE = ("input_layernorm", None, "post_attention_layernorm", None)
"""Norms before attention and before the feed-forward layer."""
POST = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
"""Norms of what they give."""
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Experts:
    """A mixture in place of the feed-forward layer."""

    count: int
    chosen: int
    hidden: int
    shares: nn.experts.Shares
    shared: int = 0
    """Width of a gated layer that every token goes through; 0: there is none."""
    names: tuple[str, ...] = ("mlp", "gate", "gate_proj", "up_proj", "down_proj")
    """Of the layer, of the router, and of an expert's three matrices."""


@dataclass(frozen=True)
class Options:
    """Sizes and switches of a decoder."""

    vocab: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    act: str
    tied: bool
    windows: Sequence[int | None]
    """One per layer; None sees everything before."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    norm: Literal["rms", "layer", "plain"] = "rms"
    """Root-mean-square; layer normalization; that without a scale."""
    norm_bias: bool = False
    norm_offset: float = 0.0
    """Added to the scales of norms."""
    norms: tuple[str | None, ...] = PRE
    """Before attention, of what it gives; before the feed-forward layer, of what that gives. None: there is none."""
    final: str = "norm"
    parallel: bool = False
    """Attention and the feed-forward layer read the same, and are added together."""
    qk_norm: Literal["", "head", "turned", "width"] = ""
    """Norms of queries and keys: of each head, of each head once it is turned, of all heads together."""
    qk_names: tuple[str, str] = ("q_norm", "k_norm")
    fused_qkv: bool = False
    """One matrix gives queries, keys and values: ``qkv_proj``."""
    clip: float | None = None
    """Queries, keys and values stay within."""
    out: str = "o_proj"
    mlp: tuple[str, ...] = GATED
    """A gate, what it gates and the way down; of two: both of the former in one matrix where ``fused_mlp``, else no gate."""
    fused_mlp: bool = False
    experts: Experts | None = None
    scale: float | None = None
    """Of scores; None: by the size of a head."""
    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    """Factors of embeddings, of what is added to a layer's input, of logits."""


def _norm(o: Options, dim: int = 0) -> Any:
    dim = dim or o.dim
    if o.norm == "rms":
        return nn.RMSNorm(dim, o.eps, o.norm_offset)
    if o.norm == "plain":
        return lambda x: nn.layer_norm(x, eps=o.eps)
    return OffsetNorm(dim, o.eps, o.norm_bias) if o.norm_offset else nn.LayerNorm(dim, o.eps, o.norm_bias)


class OffsetNorm(nn.LayerNorm):
    """Layer normalization whose scale is ``offset`` + weight."""

    offset = 1.0

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return nn.layer_norm(x, self.weight + self.offset if self.offset else self.weight, self.bias, self.eps)


class SelfAttention(nn.Module):
    """Grouped-query attention to what came before: ``x[b, s, dim]``, positions i64 ``[s]`` -> ``[b, s, dim]``."""

    def __init__(self, o: Options, window: int | None, rope: nn.RoPE | None) -> None:
        self.heads, self.kv_heads, self.window, self.rope, self.clip = o.heads, o.kv_heads, window, rope, o.clip
        self.scale = o.head_dim**-0.5 if o.scale is None else o.scale
        self.turned, self.width = o.qk_norm == "turned", o.qk_norm == "width"
        widths = [n * o.head_dim for n in (o.heads, o.kv_heads, o.kv_heads)]
        self.fused = widths if o.fused_qkv else []
        names = (("qkv_proj", sum(widths)),) if o.fused_qkv else zip(("q_proj", "k_proj", "v_proj"), widths)
        self.products = [put(self, name, nn.Linear(o.dim, n, o.qkv_bias)) for name, n in names]
        self.out = put(self, o.out, nn.Linear(o.heads * o.head_dim, o.dim, o.out_bias))
        sizes = [] if not o.qk_norm else widths if self.width else [o.head_dim] * 2
        self.norms = [put(self, name, _norm(o, n)) for name, n in zip(o.qk_names, sizes)]

    def __call__(self, x: nn.Tensor, positions: nn.Tensor) -> nn.Tensor:
        fused = self.products[0](x).split(self.fused) if self.fused else ()
        found = []
        for i, heads in enumerate((self.heads, self.kv_heads, self.kv_heads)):
            part = fused[i] if fused else self.products[i](x)
            part = self.norms[i](part) if self.width and i < 2 else part
            part = part if self.clip is None else nn.clip(part, -self.clip, self.clip)
            found.append(part.heads(heads))
        q, k, v = found
        of_heads = self.norms if not self.width else []
        if of_heads and not self.turned:
            q, k = of_heads[0](q), of_heads[1](k)
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        if of_heads and self.turned:
            q, k = of_heads[0](q), of_heads[1](k)
        keep = nn.causal(positions) & nn.within(positions, self.window)
        out: nn.Tensor = self.out(nn.attention(q, k, v, keep, scale=self.scale).merge())
        return out


class FeedForward(nn.Module):
    """``down(act(gate(x)) * up(x))``, or without a gate ``down(act(up(x)))``."""

    def __init__(self, o: Options, hidden: int = 0) -> None:
        hidden = hidden or o.hidden
        self.act, self.fused = nn.layers.activation(o.act), o.fused_mlp
        *ups, down = o.mlp
        width = 2 * hidden if o.fused_mlp else hidden
        self.ups = [put(self, name, nn.Linear(o.dim, width, o.mlp_bias)) for name in ups]
        self.down = put(self, down, nn.Linear(hidden, o.dim, o.mlp_bias))

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        first, *second = self.ups[0](x).split(2) if self.fused else (self.ups[0](x),)
        y = self.act(first)
        for gated in (*second, *(up(x) for up in self.ups[1:])):
            y = y * gated
        out: nn.Tensor = self.down(y)
        return out


class Mixture(nn.MoE):
    """Experts, perhaps beside a layer for all tokens with a gate of its own."""

    def __init__(self, o: Options, e: Experts) -> None:
        super().__init__(o.dim, e.hidden, e.count, e.chosen, o.act, e.shares)
        self.shared_expert = FeedForward(o, e.shared) if e.shared else None
        self.shared_expert_gate = nn.Linear(o.dim, 1) if e.shared else None
        router, *matrices = e.names[1:]
        self.stored = {"router.weight": [f"{router}.weight"]} | {
            part: [f"experts.{i}.{name}.weight" for i in range(e.count)]
            for part, name in zip(("gate_proj", "up_proj", "down_proj"), matrices)
        }
        """What a checkpoint calls a parameter, or the matrices that it is a stack of."""

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        y = super().__call__(x)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            y = y + nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input."""

    def __init__(self, o: Options, window: int | None, rope: nn.RoPE | None) -> None:
        self.parallel, self.factor = o.parallel, o.residual
        self.self_attn = SelfAttention(o, window, rope)
        mlp: nn.Module = FeedForward(o) if o.experts is None else Mixture(o, o.experts)
        self.feed = put(self, "mlp" if o.experts is None else o.experts.names[0], mlp)
        self.norms = [nn.Identity() if name is None else put(self, name, _norm(o)) for name in o.norms]

    def __call__(self, x: nn.Tensor, positions: nn.Tensor) -> nn.Tensor:
        before, after, before_feed, after_feed = self.norms
        read = before(x)
        mixed = after(self.self_attn(read, positions))
        if self.parallel:
            return x + mixed + self.feed(read)
        x = x + self._scaled(mixed)
        out: nn.Tensor = x + self._scaled(after_feed(self.feed(before_feed(x))))
        return out

    def _scaled(self, x: nn.Tensor) -> nn.Tensor:
        return x if self.factor == 1.0 else x * self.factor


class Decoder(nn.Module):
    """Token ids i64[b, s] -> hidden states f32[b, s, dim]."""

    def __init__(self, o: Options, ropes: Sequence[nn.RoPE | None]) -> None:
        self.dim, self.scale = o.dim, o.embedding
        self.embed_tokens = nn.Embedding(o.vocab, o.dim)
        self.layers = nn.ModuleList([DecoderLayer(o, w, rope) for w, rope in zip(o.windows, ropes)])
        self.last = put(self, o.final, _norm(o))

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        positions = nn.positions(tokens)
        x = self.embed_tokens(tokens)
        x = x if self.scale == 1.0 else x * self.scale
        for layer in self.layers:
            x = layer(x, positions)
        out: nn.Tensor = self.last(x)
        return out


class CausalLM(nn.Module):
    """Token ids i64[b, s] -> logits f32[b, s, vocab]."""

    def __init__(self, o: Options, ropes: Sequence[nn.RoPE | None]) -> None:
        self.scale = o.logits
        self.model = Decoder(o, ropes)
        self.lm_head = None if o.tied else nn.Linear(o.dim, o.vocab, o.head_bias)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.model(tokens)
        if self.lm_head is None:
            logits = nn.linear(x, self.model.embed_tokens.weight, name="lm_head")
        else:
            logits = self.lm_head(x)
        return logits if self.scale == 1.0 else logits * self.scale
