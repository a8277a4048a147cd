"""Decoders of the years before Llama: GPT-2, StarCoder, GPT-J, CodeGen, GPT-NeoX (Pythia), OPT, BLOOM, MPT, Falcon."""

from __future__ import annotations

import math
from typing import Any

from wasat.frontend import nn

from .alibi import slopes
from .config import MOST_LAYERS, MOST_POSITIONS, Fields, single_rope
from .decoder import CausalLM, Names, Options
from .families import done

_TRAINING = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "attention_dropout", "dropout", "emb_pdrop", "init_device",
    "classifier_dropout", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "n_ctx",
    "summary_first_dropout", "gradient_checkpointing", "layerdrop", "init_std", "masked_softmax_fusion", "offset_alibi",
    "bias_dropout_fusion", "skip_bias_add", "skip_bias_add_qkv", "attention_softmax_in_fp32", "activation_dropout",
    "embedding_fraction", "norm_type",
)  # fmt: skip
"""Fields that are for training or another head, or say again what others say."""
PARALLEL = ("ln_1", None, None, None)
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}


def _options(
    fields: Fields, dim: str, layers: str, heads: str, hidden: int | None, *, act: str | None, default_act: str, tied: bool,
    **more: Any,
) -> Options:  # fmt: skip
    """Sizes by the names that a configuration has for them; ``hidden``: the width inside, or else four times the dim."""
    width, count = fields.size(dim), fields.size(heads)
    if width % count:
        raise fields.fail(f"{dim} {width} does not split into {count} heads")
    fields.ignore(*_TRAINING)
    given = {"heads": count, "kv_heads": count, "norm": "layer", "norm_bias": True, "fused_qkv": "", **more}
    return Options(
        vocab=fields.size("vocab_size"), dim=width, hidden=hidden or 4 * width, head_dim=width // count,
        act=default_act if act is None else fields.activation(act, default_act),
        tied=fields.flag("tie_word_embeddings", tied), windows=[None] * fields.size(layers, most=MOST_LAYERS), **given,
    )  # fmt: skip


def _alike(fields: Fields, **names: str) -> None:
    """Fields that older files call otherwise: the old name's value, where the new one is absent."""
    for new, old in names.items():
        value = fields.given.pop(old, None)
        if value is not None and fields.given.setdefault(new, value) != value:
            raise fields.fail(f"{new} is {fields.given[new]!r}, and {old} {value!r}; keep the one that is meant")


def gpt2(fields: Fields) -> CausalLM:
    """``model_type: gpt2``: learned positions, matrices as [in, out]."""
    fields.refuse("scale_attn_by_inverse_layer_idx", False, "scores divided by the number of the layer are not implemented")
    fields.refuse("scale_attn_weights", True, "scores without a scale are not implemented")
    fields.ignore("reorder_and_upcast_attn")  # how a product is rounded in halves
    context = fields.size("n_positions", 1024, most=MOST_POSITIONS)
    names = Names(
        "transformer", "wte", "h", "attn", "mlp", "c_attn", table="wpe", buffers=(".attn.bias", ".attn.masked_bias"),
    )  # fmt: skip
    o = _options(
        fields, "n_embd", "n_layer", "n_head", fields.size("n_inner", None), act="activation_function", default_act="gelu_new",
        tied=True, eps=fields.number("layer_norm_epsilon", 1e-5), fused_qkv="parts", swapped=True, table=context, names=names,
        norms=("ln_1", None, "ln_2", None), final="ln_f", out="c_proj", mlp=("c_fc", "c_proj"), **BIASES,
    )  # fmt: skip
    return done(fields, "gpt2", o, context, [None] * len(o.windows))


def gpt_bigcode(fields: Fields) -> CausalLM:
    """``model_type: gpt_bigcode`` (StarCoder, SantaCoder): GPT-2 whose query heads mostly share one head of keys."""
    fields.refuse("scale_attn_weights", True, "scores without a scale are not implemented")
    fields.ignore("scale_attention_softmax_in_fp32", "inference_runner", "validate_runner_input", "pre_allocate_kv_cache",
                  "max_batch_size", "max_sequence_length")  # fmt: skip
    context, one = fields.size("n_positions", 1024, most=MOST_POSITIONS), fields.flag("multi_query", True)
    groups = 1 if one else fields.size("n_head")
    fields.refuse("num_key_value_heads", groups, "multi_query says how many heads keys have")
    o = _options(
        fields, "n_embd", "n_layer", "n_head", fields.size("n_inner", None), act="activation_function",
        default_act="gelu_pytorch_tanh", tied=True, eps=fields.number("layer_norm_epsilon", 1e-5), kv_heads=groups,
        fused_qkv="parts" if one else "groups", table=context, norms=("ln_1", None, "ln_2", None), final="ln_f", out="c_proj",
        mlp=("c_fc", "c_proj"), **BIASES,
        names=Names("transformer", "wte", "h", "attn", "mlp", "c_attn", table="wpe", buffers=(".attn.bias",)),
    )  # fmt: skip
    return done(fields, "gpt_bigcode", o, context, [None] * len(o.windows))


def codegen(fields: Fields) -> CausalLM:
    """``model_type: codegen``: GPT-J with one matrix for queries, values and keys of each quarter of the heads."""
    if fields.given.get("n_head", 16) % 4:
        raise fields.fail(f"n_head is {fields.given['n_head']}: the reference implementation has four parts of them")
    names = Names("transformer", "wte", "h", "attn", buffers=(".attn.causal_mask", ".attn.bias", ".attn.masked_bias"))
    return _neighbours(fields, "codegen", names, "quarters")


def gptj(fields: Fields) -> CausalLM:
    """``model_type: gptj``: attention and feed-forward side by side, neighbours rotated, a head with a bias."""
    names = Names("transformer", "wte", "h", "attn", buffers=(".attn.bias", ".attn.masked_bias"))
    return _neighbours(fields, "gptj", names, "")


def _neighbours(fields: Fields, family: str, names: Names, fused: str) -> CausalLM:
    context = fields.size("n_positions", 2048, most=MOST_POSITIONS)
    o = _options(
        fields, "n_embd", "n_layer", "n_head", fields.size("n_inner", None), act="activation_function", default_act="gelu_new",
        tied=False, eps=fields.number("layer_norm_epsilon", 1e-5), norms=PARALLEL, parallel=True, final="ln_f", out="out_proj",
        mlp=("fc_in", "fc_out"), mlp_bias=True, head_bias=True, names=names, fused_qkv=fused,
    )  # fmt: skip
    if o.tied:
        raise fields.fail("tie_word_embeddings is true: a head with a bias of its own is not implemented with it")
    fields.refuse("rotary", True, "it rotates")
    fields.refuse("scale_attn_weights", True, "scores without a scale are not implemented")
    part = fields.size("rotary_dim", 64)
    if part > o.head_dim or part % 2:
        raise fields.fail(f"rotary_dim is {part}; it is even, and heads have {o.head_dim} elements")
    turn = nn.RoPE(o.head_dim, 10000.0, fraction=part / o.head_dim, interleaved=True)
    return done(fields, family, o, context, [turn] * len(o.windows))


def gpt_neox(fields: Fields) -> CausalLM:
    """``model_type: gpt_neox`` (GPT-NeoX, Pythia, Dolly): attention and feed-forward side by side, each with its norm."""
    _alike(fields, rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct")
    parallel, bias = fields.flag("use_parallel_residual", True), fields.flag("attention_bias", True)
    context = fields.size("max_position_embeddings", 2048, most=MOST_POSITIONS)
    names = Names(
        "gpt_neox", "embed_in", attention="attention", qkv="query_key_value", head="embed_out",
        buffers=(".attention.bias", ".attention.masked_bias"),
    )  # fmt: skip
    o = _options(
        fields, "hidden_size", "num_hidden_layers", "num_attention_heads", fields.size("intermediate_size"), act="hidden_act",
        default_act="gelu", tied=False, eps=fields.number("layer_norm_eps", 1e-5), fused_qkv="groups", parallel=parallel,
        final="final_layer_norm", out="dense", mlp=("dense_h_to_4h", "dense_4h_to_h"), qkv_bias=bias, out_bias=bias,
        mlp_bias=True, names=names,
    )  # fmt: skip
    return done(fields, "gpt_neox", o, context, fraction=0.25)


def opt(fields: Fields) -> CausalLM:
    """``model_type: opt``: learned positions, of which the first is the third; ReLU."""
    fields.refuse("do_layer_norm_before", True, "norms behind layers (OPT 350M) are not implemented for it")
    fields.refuse("_remove_final_layer_norm", False, "a model without its last norm is not implemented")
    fields.refuse("layer_norm_elementwise_affine", True, "norms without scales are not implemented for it")
    fields.refuse("word_embed_proj_dim", fields.given.get("hidden_size"), "embeddings of another width are not implemented")
    bias = fields.flag("enable_bias", True)
    context = fields.size("max_position_embeddings", 2048, most=MOST_POSITIONS)
    names = Names("model.decoder", feed="", table="embed_positions")
    o = _options(
        fields, "hidden_size", "num_hidden_layers", "num_attention_heads", fields.size("ffn_dim"), act="activation_function",
        default_act="relu", tied=True, eps=1e-5, table=context + 2, shift=2, final="final_layer_norm", out="out_proj",
        norms=("self_attn_layer_norm", None, "final_layer_norm", None), mlp=("fc1", "fc2"), qkv_bias=bias, out_bias=bias,
        mlp_bias=bias, names=names,
    )  # fmt: skip
    return done(fields, "opt", o, context, [None] * len(o.windows))


def bloom(fields: Fields) -> CausalLM:
    """``model_type: bloom``: ALiBi, a norm behind the embedding."""
    _alike(fields, hidden_size="n_embed", n_layer="num_hidden_layers", n_head="num_attention_heads")
    fields.refuse("apply_residual_connection_post_layernorm", False, "residuals behind norms are not implemented")
    fields.ignore("pretraining_tp", "slow_but_exact")  # how a product is cut into pieces
    context = fields.size("seq_length", 2048, most=MOST_POSITIONS)
    names = Names(
        "transformer", "word_embeddings", "h", "self_attention", qkv="query_key_value", embed_norm="word_embeddings_layernorm",
    )  # fmt: skip
    o = _options(
        fields, "hidden_size", "n_layer", "n_head", None, act=None, default_act="gelu_tanh", tied=True,
        eps=fields.number("layer_norm_epsilon", 1e-5), fused_qkv="groups", final="ln_f", out="dense",
        slopes=slopes(fields.size("n_head")), mlp=("dense_h_to_4h", "dense_4h_to_h"), names=names, **BIASES,
    )  # fmt: skip
    return done(fields, "bloom", o, context, [None] * len(o.windows))


def mpt(fields: Fields) -> CausalLM:
    """``model_type: mpt``: ALiBi, no biases."""
    a = Fields(fields.take("attn_config", dict, None) or {}, f"{fields.where}: attn_config")
    a.ignore("model_type", "attn_pdrop", "attn_impl", "attn_uses_sequence_id", "softmax_scale_in_fp32")
    for name, neutral in (("attn_type", "multihead_attention"), ("prefix_lm", False), ("qk_ln", False), ("alibi", True)):
        a.refuse(name, neutral, "of MPT only causal attention of many heads with ALiBi is implemented")
    fields.refuse("no_bias", True, "biases are not implemented for it")
    fields.refuse("expansion_ratio", 4, "the reference implementation widens four times")
    fields.refuse("logit_scale", None, "the reference implementation does not scale logits")
    fields.ignore("learned_pos_emb")  # which the reference implementation does not read
    context, heads = fields.size("max_seq_len", 2048, most=MOST_POSITIONS), fields.size("n_heads")
    a.refuse("alibi_bias_max", 8, "the reference implementation knows no other")
    rounded = 2 ** math.ceil(math.log2(heads))
    steps = [2.0 ** (-8 * (i + 1) / rounded) for i in range(rounded)]
    steps = steps if rounded == heads else [*steps[1::2], *steps[::2]][:heads]
    o = _options(
        fields, "d_model", "n_layers", "n_heads", None, act=None, default_act="gelu", tied=True,
        eps=fields.number("layer_norm_epsilon", 1e-5), norm_bias=False, fused_qkv="parts", clip=a.number("clip_qkv", None),
        scale=a.number("softmax_scale", None), slopes=tuple(steps), norms=("norm_1", None, "norm_2", None), final="norm_f",
        out="out_proj", mlp=("up_proj", "down_proj"), names=Names("transformer", "wte", "blocks", "attn", "ffn", "Wqkv"),
    )  # fmt: skip
    a.finish("mpt's attn_config")
    return done(fields, "mpt", o, context, [None] * len(o.windows))


def falcon(fields: Fields) -> CausalLM:
    """``model_type: falcon``: one key head or a few, attention and feed-forward side by side; rotated, or ALiBi."""
    _alike(fields, hidden_size="n_embed", num_hidden_layers="n_layer", num_attention_heads="n_head", num_kv_heads="n_head_kv")
    fields.refuse("apply_residual_connection_post_layernorm", False, "residuals behind norms are not implemented")
    newer, alibi, bias = fields.flag("new_decoder_architecture", False), fields.flag("alibi", False), fields.flag("bias", False)
    several, parallel = fields.flag("multi_query", True), fields.flag("parallel_attn", True)
    heads = fields.size("num_attention_heads")
    groups = fields.size("num_kv_heads", None) or heads
    groups = groups if newer else 1 if several else heads
    if heads % groups:
        raise fields.fail(f"num_attention_heads {heads} is not a multiple of num_kv_heads {groups}")
    norms = fields.take("num_ln_in_parallel_attn", int, None, least=1, most=2) or (2 if newer else 1)
    if newer and not parallel:
        raise fields.fail("parallel_attn is false: the newer architecture has attention and feed-forward side by side")
    if norms == 2 and not newer:
        raise fields.fail("num_ln_in_parallel_attn is 2: only the newer architecture has two norms side by side")
    one = ("input_layernorm", None, None if parallel else "post_attention_layernorm", None)
    context = fields.size("max_position_embeddings", 2048, most=MOST_POSITIONS)
    more: dict[str, Any] = {"slopes": slopes(heads), "slopes_bf16": True} if alibi else {}
    o = _options(
        fields, "hidden_size", "num_hidden_layers", "num_attention_heads", fields.size("ffn_hidden_size", None),
        act="activation", default_act="gelu", tied=True, eps=fields.number("layer_norm_epsilon", 1e-5), kv_heads=groups,
        fused_qkv="parts" if several and not newer else "groups", parallel=parallel,
        norms=("ln_attn", None, "ln_mlp", None) if norms == 2 else one, final="ln_f", out="dense",
        mlp=("dense_h_to_4h", "dense_4h_to_h"), qkv_bias=bias, out_bias=bias, mlp_bias=bias,
        names=Names("transformer", "word_embeddings", "h", "self_attention", qkv="query_key_value"), **more,
    )  # fmt: skip
    turn = single_rope(fields, o.head_dim, context)
    return done(fields, "falcon", o, context, [None if alibi else turn] * len(o.windows))
