"""Llama, Mistral, Qwen2, Qwen3: the plain decoder, with some biases, norms and windows."""

from __future__ import annotations

from .config import MOST_LAYERS, MOST_POSITIONS, Fields, attention_heads, layer_types, single_rope
from .decoder import CausalLM, Decoder, Options


def _build(fields: Fields, family: str) -> CausalLM:
    dim, layers = fields.size("hidden_size"), fields.size("num_hidden_layers", most=MOST_LAYERS)
    heads, kv_heads = attention_heads(fields, optional=family in ("llama", "eurobert"))
    head_dim = fields.size("head_dim", 128 if family == "qwen3" else None)
    if head_dim is None:
        if dim % heads:
            raise fields.fail(f"hidden_size {dim} does not split into {heads} heads; head_dim must say their size")
        head_dim = dim // heads
    context = fields.size("max_position_embeddings", most=MOST_POSITIONS)
    plain = family in ("llama", "eurobert")
    bias = fields.flag("attention_bias", False) if plain or family == "qwen3" else family == "qwen2"
    options = Options(
        vocab=fields.size("vocab_size"), dim=dim, hidden=fields.size("intermediate_size"), heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, eps=fields.number("rms_norm_eps", 1e-5 if family == "eurobert" else 1e-6),
        act=fields.activation("hidden_act", default="silu"),
        tied=fields.flag("tie_word_embeddings", False), windows=_windows(fields, family, layers), qkv_bias=bias,
        out_bias=bias and family != "qwen2", mlp_bias=fields.flag("mlp_bias", False) if plain else False,
        qk_norm="head" if family == "qwen3" else "",
    )  # fmt: skip
    if plain:
        fields.refuse("pretraining_tp", 1, "tensor-parallel pretraining slices are not implemented; set it to 1")
    model = CausalLM(options, [single_rope(fields, head_dim, context)] * layers)
    fields.finish(family)
    return model


def _windows(fields: Fields, family: str, layers: int) -> list[int | None]:
    """The sliding window of each layer."""
    if family in ("llama", "eurobert"):
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


def llama(fields: Fields) -> CausalLM:
    """``model_type: llama``: optional biases, llama3 RoPE."""
    return _build(fields, "llama")


def mistral(fields: Fields) -> CausalLM:
    """``model_type: mistral``: a sliding window on all layers, if any."""
    return _build(fields, "mistral")


def qwen2(fields: Fields) -> CausalLM:
    """``model_type: qwen2``: biases on q, k and v; windows on the upper layers, if any."""
    return _build(fields, "qwen2")


def qwen3(fields: Fields) -> CausalLM:
    """``model_type: qwen3``: RMS norms on queries and keys."""
    return _build(fields, "qwen3")


def eurobert(fields: Fields) -> Decoder:
    """``model_type: eurobert``: Llama that sees the whole text; its ``pooling`` is that of a classifier."""
    pooling = fields.take("classifier_pooling", str, "late")
    if pooling not in ("bos", "mean", "late"):
        raise fields.fail(f"classifier_pooling is {pooling!r}; there are bos, mean and late")
    fields.ignore("tie_word_embeddings")
    model = _build(fields, "eurobert").model
    model.pooling = pooling
    return model
