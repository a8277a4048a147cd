"""Gemma 2: Gemma 3's layers without norms on queries and keys; every other one slides, and scores have a softcap."""

from __future__ import annotations

from .config import MOST_LAYERS, MOST_POSITIONS, Fields, attention_heads, layer_types, single_rope
from .gemma3 import Gemma3, Options


def gemma2(fields: Fields) -> Gemma3:
    """``model_type: gemma2``."""
    layers = fields.size("num_hidden_layers", most=MOST_LAYERS)
    heads, kv_heads = attention_heads(fields)
    head_dim, window = fields.size("head_dim"), fields.window(4096)
    default = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    fields.refuse("use_bidirectional_attention", False, "only causal Gemma 2 writes text")
    fields.take("cache_implementation", str, None)  # how transformers keeps its cache
    fields.take("hidden_act", str, None)  # written beside hidden_activation, which is what is read
    options = Options(
        vocab=fields.size("vocab_size"), dim=fields.size("hidden_size"), hidden=fields.size("intermediate_size"),
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, eps=fields.number("rms_norm_eps", 1e-6),
        act=fields.activation("hidden_activation", default="gelu_pytorch_tanh"),
        tied=fields.flag("tie_word_embeddings", True), scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        bias=fields.flag("attention_bias", False), logit_softcap=_cap(fields, "final_logit_softcapping", 30.0),
        window=window, types=layer_types(fields, layers, default), qk_norm=False,
        softcap=_cap(fields, "attn_logit_softcapping", 50.0),
    )  # fmt: skip
    if window is None and "sliding_attention" in options.types:
        raise fields.fail("sliding_window is null, and layer_types holds sliding_attention")
    rope = single_rope(fields, head_dim, fields.size("max_position_embeddings", most=MOST_POSITIONS))
    model = Gemma3(options, dict.fromkeys(options.types, rope))
    fields.finish("gemma2")
    return model


def _cap(fields: Fields, name: str, default: float) -> float | None:
    """A softcap, ``default`` if absent; null is none."""
    return default if name not in fields.given else fields.number(name, None)
