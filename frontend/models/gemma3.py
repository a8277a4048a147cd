"""Gemma 3, text: five sliding layers to one full, two RoPE bases, norms before and after, scaled tied embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wasat.frontend import nn

from .config import MOST_LAYERS, MOST_POSITIONS, Fields, attention_heads, layer_types, rope, rope_dictionaries
from .encoders import near, seen


@dataclass(frozen=True)
class Options:
    """Sizes and switches of a Gemma 2 or 3 decoder."""

    vocab: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    act: str
    tied: bool
    scale: float
    bias: bool
    logit_softcap: float | None
    window: int | None
    types: Sequence[str]
    causal: bool = True
    """Else every token sees the whole text, in sliding layers as far as the window reaches on both sides."""
    qk_norm: bool = True
    softcap: float | None = None
    """Of scores."""


class DecoderLayer(nn.Module):
    """Attention and gated feed-forward, each between two RMS norms whose scale is 1 + weight."""

    def __init__(self, o: Options, window: int | None, rope: nn.RoPE) -> None:
        self.self_attn = nn.Attention(
            o.dim, o.heads, o.kv_heads, o.head_dim, window=window, scale=o.scale, softcap=o.softcap,
            qk_norm=o.eps if o.qk_norm else None, norm_offset=1.0, bias=o.bias, out_bias=o.bias, rope=rope, causal=o.causal,
        )  # fmt: skip
        self.mlp = nn.GLU(o.dim, o.hidden, o.act)
        self.input_layernorm = nn.RMSNorm(o.dim, o.eps, offset=1.0)
        self.post_attention_layernorm = nn.RMSNorm(o.dim, o.eps, offset=1.0)
        self.pre_feedforward_layernorm = nn.RMSNorm(o.dim, o.eps, offset=1.0)
        self.post_feedforward_layernorm = nn.RMSNorm(o.dim, o.eps, offset=1.0)

    def __call__(self, x: nn.Tensor, positions: nn.Tensor, keep: nn.Mask = True) -> nn.Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), positions, keep))
        out: nn.Tensor = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return out


class Decoder(nn.Module):
    """Token ids i64[b, s] -> hidden states f32[b, s, dim]."""

    def __init__(self, o: Options, ropes: dict[str, nn.RoPE]) -> None:
        self.scale = o.dim**0.5
        self.embed_tokens = nn.Embedding(o.vocab, o.dim)
        self.layers = nn.ModuleList(
            [DecoderLayer(o, o.window if t == "sliding_attention" and o.causal else None, ropes[t]) for t in o.types]
        )
        self.dim = o.dim
        self.reach = [o.window if t == "sliding_attention" else None for t in o.types]
        """How far each layer sees to both sides, less one, where it sees what comes after."""
        self.norm = nn.RMSNorm(o.dim, o.eps, offset=1.0)

    def __call__(self, tokens: nn.Tensor, lengths: nn.Tensor | None = None) -> nn.Tensor:
        """``lengths`` i64[b] of the texts, of a model that sees what comes after."""
        positions = nn.positions(tokens)
        x = self.embed_tokens(tokens) * self.scale
        keep: dict[int | None, nn.Tensor] = {}
        if lengths is not None:
            keep = {w: seen(tokens, lengths) if w is None else near(tokens, lengths, w - 1) for w in dict.fromkeys(self.reach)}
        for layer, reach in zip(self.layers, self.reach):
            x = layer(x, positions, keep[reach] if keep else True)
        out: nn.Tensor = self.norm(x)
        return out


class Gemma3(nn.Module):
    """Token ids i64[b, s] -> logits f32[b, s, vocab]."""

    def __init__(self, o: Options, ropes: dict[str, nn.RoPE]) -> None:
        self.softcap = o.logit_softcap
        self.model = Decoder(o, ropes)
        self.lm_head = None if o.tied else nn.Linear(o.dim, o.vocab)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.model(tokens)
        if self.lm_head is None:
            logits = nn.linear(x, self.model.embed_tokens.weight, name="lm_head")
        else:
            logits = self.lm_head(x)
        return logits if self.softcap is None else nn.tanh(logits / self.softcap) * self.softcap


def gemma3_text(fields: Fields, causal: bool = True) -> Gemma3:
    """``model_type: gemma3_text``; if not ``causal``, as EmbeddingGemma is."""
    layers = fields.size("num_hidden_layers", most=MOST_LAYERS)
    context = fields.size("max_position_embeddings", most=MOST_POSITIONS)
    heads, kv_heads = attention_heads(fields)
    head_dim = fields.size("head_dim")
    if causal:
        fields.refuse("use_bidirectional_attention", False, "only causal Gemma 3 writes text; others embed it")
    fields.ignore("use_bidirectional_attention")
    why = "the reference implementation declares it for Gemma 3 and never applies it, so what is meant is unclear; use null"
    fields.refuse("attn_logit_softcapping", None, why)
    fields.take("_sliding_window_pattern", int, None)  # written by transformers, read by nothing
    period = fields.size("sliding_window_pattern", 6)
    default = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    window = fields.window(4096)
    options = Options(
        vocab=fields.size("vocab_size"), dim=fields.size("hidden_size"), hidden=fields.size("intermediate_size"),
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, eps=fields.number("rms_norm_eps", 1e-6),
        act=fields.activation("hidden_activation", default="gelu_pytorch_tanh"),
        tied=fields.flag("tie_word_embeddings", True), scale=fields.number("query_pre_attn_scalar") ** -0.5,
        bias=fields.flag("attention_bias", False), logit_softcap=fields.number("final_logit_softcapping", None),
        window=window if causal or window is None else window // 2 + 1, types=layer_types(fields, layers, default),
        causal=causal,
    )  # fmt: skip
    if options.window is None and "sliding_attention" in options.types:
        raise fields.fail("sliding_window is null, and layer_types holds sliding_attention")
    model = Gemma3(options, _ropes(fields, head_dim, context))
    fields.finish("gemma3_text")
    return model


def _ropes(fields: Fields, head_dim: int, context: int) -> dict[str, nn.RoPE]:
    """One rotary embedding per kind of layer; ``rope_scaling`` of older files scales only that of the full layers."""
    full, sliding = "full_attention", "sliding_attention"
    theta, local = fields.number("rope_theta", None), fields.number("rope_local_base_freq", None)
    parameters, scaling = rope_dictionaries(fields)
    unknown = [k for k in parameters if k not in (full, sliding)]
    if unknown:
        raise fields.fail(f"rope_parameters has {', '.join(unknown)}; expected {full} and {sliding}")
    if "type" in scaling:
        raise fields.fail("rope_scaling.type is not read by the reference implementation of Gemma 3; call it rope_type")

    def one(kind: str, given: object, theta: float | None, default: float) -> nn.RoPE:
        name = "rope_scaling" if given is scaling else f"rope_parameters.{kind}"
        return rope(fields, name, {} if given is None else given, head_dim, context, theta, default)

    return {
        full: one(full, scaling or parameters.get(full), theta, 1e6),
        sliding: one(sliding, parameters.get(sliding), local, 1e4),
    }
