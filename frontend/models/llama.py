"""Llama, Mistral, Qwen2, Qwen3: one decoder in plain math; a family is a set of options. Names are the checkpoints'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wasat.frontend import nn

from .config import MOST_LAYERS, MOST_POSITIONS, Fields, attention_heads, layer_types, single_rope


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
    qk_norm: bool = False


class DecoderLayer(nn.Module):
    """Attention and gated feed-forward, each behind an RMS norm and added to its input."""

    def __init__(self, o: Options, window: int | None, rope: nn.RoPE) -> None:
        self.self_attn = nn.Attention(
            o.dim, o.heads, o.kv_heads, o.head_dim, window=window, qk_norm=o.eps if o.qk_norm else None,
            bias=o.qkv_bias, out_bias=o.out_bias, rope=rope,
        )  # fmt: skip
        self.mlp = nn.GLU(o.dim, o.hidden, o.act, o.mlp_bias)
        self.input_layernorm = nn.RMSNorm(o.dim, o.eps)
        self.post_attention_layernorm = nn.RMSNorm(o.dim, o.eps)

    def __call__(self, x: nn.Tensor, positions: nn.Tensor) -> nn.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions)
        out: nn.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Token ids i64[b, s] -> hidden states f32[b, s, dim]."""

    def __init__(self, o: Options, rope: nn.RoPE) -> None:
        self.dim = o.dim
        self.embed_tokens = nn.Embedding(o.vocab, o.dim)
        self.layers = nn.ModuleList([DecoderLayer(o, w, rope) for w in o.windows])
        self.norm = nn.RMSNorm(o.dim, o.eps)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        positions = nn.positions(tokens)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, positions)
        out: nn.Tensor = self.norm(x)
        return out


class Llama(nn.Module):
    """Token ids i64[b, s] -> logits f32[b, s, vocab]."""

    def __init__(self, o: Options, rope: nn.RoPE) -> None:
        self.model = Decoder(o, rope)
        self.lm_head = None if o.tied else nn.Linear(o.dim, o.vocab)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.model(tokens)
        if self.lm_head is None:
            return nn.linear(x, self.model.embed_tokens.weight, name="lm_head")
        logits: nn.Tensor = self.lm_head(x)
        return logits


def _build(fields: Fields, family: str) -> Llama:
    dim, layers = fields.size("hidden_size"), fields.size("num_hidden_layers", most=MOST_LAYERS)
    heads, kv_heads = attention_heads(fields, optional=family == "llama")
    head_dim = fields.size("head_dim", 128 if family == "qwen3" else None)
    if head_dim is None:
        if dim % heads:
            raise fields.fail(f"hidden_size {dim} does not split into {heads} heads; head_dim must say their size")
        head_dim = dim // heads
    context = fields.size("max_position_embeddings", most=MOST_POSITIONS)
    bias = fields.flag("attention_bias", False) if family in ("llama", "qwen3") else family == "qwen2"
    options = Options(
        vocab=fields.size("vocab_size"), dim=dim, hidden=fields.size("intermediate_size"), heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, eps=fields.number("rms_norm_eps", 1e-6), act=fields.activation("hidden_act", default="silu"),
        tied=fields.flag("tie_word_embeddings", False), windows=_windows(fields, family, layers), qkv_bias=bias,
        out_bias=bias and family != "qwen2", mlp_bias=fields.flag("mlp_bias", False) if family == "llama" else False,
        qk_norm=family == "qwen3",
    )  # fmt: skip
    if family == "llama":
        fields.refuse("pretraining_tp", 1, "tensor-parallel pretraining slices are not implemented; set it to 1")
    model = Llama(options, single_rope(fields, head_dim, context))
    fields.finish(family)
    return model


def _windows(fields: Fields, family: str, layers: int) -> list[int | None]:
    """The sliding window of each layer."""
    if family == "llama":
        return [None] * layers
    window = fields.window(4096)
    if family == "mistral":
        return [window] * layers
    if not fields.flag("use_sliding_window", False):
        window = None
    first = fields.take("max_window_layers", int, 28)
    default = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    types = layer_types(fields, layers, default)
    if window is None and "sliding_attention" in types:
        raise fields.fail("layer_types holds sliding_attention, but use_sliding_window is false or sliding_window is null")
    return [window if t == "sliding_attention" else None for t in types]


def llama(fields: Fields) -> Llama:
    """``model_type: llama``: optional biases, llama3 RoPE."""
    return _build(fields, "llama")


def mistral(fields: Fields) -> Llama:
    """``model_type: mistral``: a sliding window on all layers, if any."""
    return _build(fields, "mistral")


def qwen2(fields: Fields) -> Llama:
    """``model_type: qwen2``: biases on q, k and v; windows on the upper layers, if any."""
    return _build(fields, "qwen2")


def qwen3(fields: Fields) -> Llama:
    """``model_type: qwen3``: RMS norms on queries and keys."""
    return _build(fields, "qwen3")
