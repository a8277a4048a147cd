"""Families that are the decoder of :mod:`.decoder` with other options: what each reads from its ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from wasat.frontend import nn

from .config import (
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_POSITIONS,
    Fields,
    attention_heads,
    layer_types,
    rope,
    rope_dictionaries,
    single_rope,
)
from .decoder import POST, PRE, CausalLM, Experts, Names, Options
from .shortconv import Short

_TRAINING = (
    "resid_pdrop", "embd_pdrop", "residual_dropout", "embedding_dropout", "hidden_dropout", "router_aux_loss_coef",
    "output_router_logits", "router_jitter_noise", "sliding_window_pattern", "eod_token_id",
)  # fmt: skip
"""Fields that are for training, or say again what others say."""


def options(
    fields: Fields, *, eps: str | None = "rms_norm_eps", default_eps: float = 1e-6, act: str = "silu", tied: bool = False,
    head_dim: int | None = None, **more: Any,
) -> tuple[Options, int]:  # fmt: skip
    """The options that all have, and the context."""
    dim, layers = fields.size("hidden_size"), fields.size("num_hidden_layers", most=MOST_LAYERS)
    heads, kv_heads = attention_heads(fields)
    size = fields.size("head_dim", head_dim)
    if size is None:
        if dim % heads:
            raise fields.fail(f"hidden_size {dim} does not split into {heads} heads; head_dim must say their size")
        size = dim // heads
    fields.ignore(*_TRAINING)
    return Options(
        vocab=fields.size("vocab_size"), dim=dim, hidden=fields.size("intermediate_size"), heads=heads, kv_heads=kv_heads,
        head_dim=size, eps=default_eps if eps is None else fields.number(eps, default_eps),
        act=fields.activation("hidden_act", act),
        tied=fields.flag("tie_word_embeddings", tied), windows=[None] * layers, **more,
    ), fields.size("max_position_embeddings", most=MOST_POSITIONS)  # fmt: skip


def biases(fields: Fields, default: bool = False) -> dict[str, Any]:
    """``attention_bias`` of all four products, ``mlp_bias``."""
    attention = fields.flag("attention_bias", default)
    return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": fields.flag("mlp_bias", False)}


def done(
    fields: Fields, family: str, o: Options, context: int, ropes: Sequence[nn.RoPE | None] | None = None, **rope: Any
) -> CausalLM:
    """The model, once all fields are taken; ``ropes`` of the layers, or what :func:`.config.single_rope` takes."""
    ropes = [single_rope(fields, o.head_dim, context, **rope)] * len(o.windows) if ropes is None else ropes
    fields.finish(family)
    model = CausalLM(o, ropes)
    model.context = min(context, model.context or context)
    return model


def sliding(fields: Fields, o: Options, default: Callable[[int], bool], window: int | None) -> Options:
    """The options with the windows of layers that slide: those of ``layer_types``, ``default`` by their number if absent."""
    layers = len(o.windows)
    given = fields.window(window) if window is not None else fields.size("sliding_window", None, most=MOST_POSITIONS)
    kinds = layer_types(fields, layers, ["sliding_attention" if default(i) else "full_attention" for i in range(layers)])
    if given is None and "sliding_attention" in kinds:
        raise fields.fail("layer_types holds sliding_attention, but sliding_window is null")
    return replace(o, windows=[given if k == "sliding_attention" else None for k in kinds])


def arcee(fields: Fields) -> CausalLM:
    """``model_type: arcee``: no gate, squared ReLU."""
    o, context = options(fields, default_eps=1e-5, act="relu2", mlp=("up_proj", "down_proj"), **biases(fields))
    return done(fields, "arcee", o, context)


def _cohere(fields: Fields) -> tuple[Options, int]:
    fields.refuse("use_qk_norm", False, "norms of queries and keys are not implemented for it")
    all_biases = biases(fields)
    return options(
        fields, eps="layer_norm_eps", default_eps=1e-5, tied=True, norm="layer", norms=(PRE[0], None, None, None),
        parallel=True, logits=fields.number("logit_scale", 0.0625), **all_biases,
    )  # fmt: skip


def cohere(fields: Fields) -> CausalLM:
    """``model_type: cohere`` (Command R): attention and feed-forward side by side."""
    o, context = _cohere(fields)
    return done(fields, "cohere", o, context, default=500000.0, interleaved=True)


def cohere2(fields: Fields) -> CausalLM:
    """``model_type: cohere2`` (Command R7B, A): layers that see everything are not rotated."""
    o, context = _cohere(fields)
    o = sliding(fields, o, lambda i: (i + 1) % 4 != 0, 4096)
    turn = single_rope(fields, o.head_dim, context, interleaved=True)
    return done(fields, "cohere2", o, context, [None if w is None else turn for w in o.windows])


def ernie4_5(fields: Fields) -> CausalLM:
    """``model_type: ernie4_5``."""
    bias = fields.flag("use_bias", False)
    o, context = options(
        fields, default_eps=1e-5, tied=True, head_dim=128, qkv_bias=bias, out_bias=bias, mlp_bias=bias
    )
    return done(fields, "ernie4_5", o, context, default=500000.0, interleaved=True)


def exaone4(fields: Fields) -> CausalLM:
    """``model_type: exaone4``: norms behind; where some layers slide, those that see everything are not rotated."""
    o, context = options(fields, default_eps=1e-5, norms=POST, qk_norm="head")
    period = fields.take("sliding_window_pattern", (int, str), 4)
    window = fields.window(4096)
    slides = window is not None and isinstance(period, int) and period > 0
    if window is not None and not slides and fields.given.get("layer_types") is None:
        raise fields.fail(f"sliding_window_pattern is {period!r}: only a period is read; layer_types says the same")
    o = sliding(fields, o, lambda i: slides and (i + 1) % int(period) != 0, 4096)
    turn = single_rope(fields, o.head_dim, context)
    return done(fields, "exaone4", o, context, [turn if window is None or w is not None else None for w in o.windows])


def gemma(fields: Fields) -> CausalLM:
    """``model_type: gemma``, the first."""
    fields.refuse("hidden_activation", "gelu_pytorch_tanh", "the reference implementation reads hidden_act")
    if fields.given.get("hidden_act") == "gelu":  # which older files say, and never was meant
        fields.given["hidden_act"] = "gelu_pytorch_tanh"
    fields.refuse("use_bidirectional_attention", False, "only causal Gemma writes text")
    bias = fields.flag("attention_bias", False)
    o, context = options(
        fields, act="gelu_pytorch_tanh", tied=True, head_dim=256, norm_offset=1.0, qkv_bias=bias, out_bias=bias
    )
    return done(fields, "gemma", replace(o, embedding=o.dim**0.5), context)


def _glm(fields: Fields, family: str, **more: Any) -> CausalLM:
    o, context = options(
        fields, default_eps=1.5625e-07, head_dim=128, qkv_bias=fields.flag("attention_bias", True),
        mlp=("gate_up_proj", "down_proj"), fused_mlp=True, **more,
    )  # fmt: skip
    return done(fields, family, o, context, fraction=0.5, interleaved=True)


def glm(fields: Fields) -> CausalLM:
    """``model_type: glm``: half of each head is turned."""
    return _glm(fields, "glm")


def glm4(fields: Fields) -> CausalLM:
    """``model_type: glm4``: norms before and behind."""
    return _glm(
        fields, "glm4", norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    )


def granite_options(fields: Fields, **more: Any) -> tuple[Options, int]:
    """The options of Granite's models, and the context: factors here and there."""
    return options(
        fields, embedding=fields.number("embedding_multiplier", 1.0), residual=fields.number("residual_multiplier", 1.0),
        scale=fields.number("attention_multiplier", 1.0), logits=1.0 / fields.number("logits_scaling", 1.0), **more,
    )  # fmt: skip


def granite(fields: Fields) -> CausalLM:
    """``model_type: granite``."""
    o, context = granite_options(fields, **biases(fields))
    return done(fields, "granite", o, context)


def helium(fields: Fields) -> CausalLM:
    """``model_type: helium``."""
    bias = fields.flag("attention_bias", False)
    o, context = options(fields, default_eps=1e-8, head_dim=128, qkv_bias=bias, mlp_bias=fields.flag("mlp_bias", False))
    return done(fields, "helium", o, context, default=100000.0, interleaved=True)


def hunyuan_v1_dense(fields: Fields) -> CausalLM:
    """``model_type: hunyuan_v1_dense``: queries and keys are normalized once they are turned."""
    bias = fields.flag("attention_bias", False)
    fields.refuse("pretraining_tp", 1, "tensor-parallel pretraining slices are not implemented; set it to 1")
    o, context = options(
        fields, default_eps=1e-5, qkv_bias=bias, out_bias=bias, qk_norm="turned", qk_names=("query_layernorm", "key_layernorm")
    )
    return done(fields, "hunyuan_v1_dense", o, context)


def lfm2(fields: Fields) -> CausalLM:
    """``model_type: lfm2``: short convolutions in most layers, attention in some."""
    layers = fields.size("num_hidden_layers", most=MOST_LAYERS)
    if (older := fields.take("block_ff_dim", int, None)) is not None:
        fields.given["intermediate_size"] = older
    if (older := fields.take("tie_embedding", bool, None)) is not None:
        fields.given["tie_word_embeddings"] = older
    fields.given.setdefault("tie_word_embeddings", True)
    seeing = fields.take("full_attn_idxs", list, None)
    kinds = fields.take("layer_types", list, None)
    if kinds is None:
        kinds = ["full_attention" if seeing is None or i in seeing else "conv" for i in range(layers)]
    if len(kinds) != layers or any(k not in ("full_attention", "conv") for k in kinds):
        raise fields.fail(f"layer_types is {kinds}; expected full_attention or conv for each of {layers} layers")
    short = Short(
        frozenset(i for i, k in enumerate(kinds) if k == "conv"), fields.size("conv_L_cache", 3),
        fields.flag("conv_bias", False),
    )  # fmt: skip
    adjusted, each = fields.flag("block_auto_adjust_ff_dim", True), fields.size("block_multiple_of", 256)
    times = fields.number("block_ffn_dim_multiplier", 1.0)
    fields.ignore(
        "block_dim", "block_mlp_init_scale", "block_out_init_scale", "block_norm_eps", "block_use_swiglu",
        "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "use_pos_enc", "num_heads",
    )  # fmt: skip
    o, context = options(
        fields, eps="norm_eps", default_eps=1e-5, qk_norm="head", qk_names=("q_layernorm", "k_layernorm"), out="out_proj",
        mlp=("w1", "w3", "w2"), norms=("operator_norm", None, "ffn_norm", None), final="embedding_norm", short=short,
        names=Names(feed="feed_forward"),
    )  # fmt: skip
    if adjusted:
        hidden = int(times * int(2 * o.hidden / 3))
        o = replace(o, hidden=-(-hidden // each) * each)
    return done(fields, "lfm2", o, context, default=1e6)


def ministral(fields: Fields) -> CausalLM:
    """``model_type: ministral``: windows in some layers."""
    o, context = options(fields)
    slides = fields.given.get("sliding_window", True) is not None
    return done(fields, "ministral", sliding(fields, o, lambda i: slides, 4096), context)


def mixtral(fields: Fields) -> CausalLM:
    """``model_type: mixtral``: experts in every layer."""
    o, context = options(fields, default_eps=1e-5)
    window = fields.size("sliding_window", None, most=MOST_POSITIONS)
    experts = Experts(
        fields.size("num_local_experts", 8, most=MOST_EXPERTS), fields.size("num_experts_per_tok", 2), o.hidden, "chosen", 0,
        ("block_sparse_moe", "gate", "w1", "w3", "w2"),
    )  # fmt: skip
    o = replace(o, windows=[window] * len(o.windows), experts=fits(fields, experts))
    return done(fields, "mixtral", o, context, default=1e6)


def nemotron(fields: Fields) -> CausalLM:
    """``model_type: nemotron``: layer norms by 1 + weight, no gate, squared ReLU."""
    all_biases = biases(fields)
    o, context = options(
        fields, eps="norm_eps", default_eps=1e-5, act="relu2", norm="layer", norm_bias=True, norm_offset=1.0,
        mlp=("up_proj", "down_proj"), **all_biases,
    )  # fmt: skip
    return done(fields, "nemotron", o, context, fraction=0.5)


def olmo(fields: Fields) -> CausalLM:
    """``model_type: olmo``: norms without scales."""
    bias = fields.flag("attention_bias", False)
    o, context = options(
        fields, eps=None, default_eps=1e-5, norm="plain", clip=fields.number("clip_qkv", None), qkv_bias=bias, out_bias=bias
    )
    return done(fields, "olmo", o, context)


def olmo2(fields: Fields) -> CausalLM:
    """``model_type: olmo2``: norms behind, and of all queries together."""
    bias = fields.flag("attention_bias", False)
    o, context = options(fields, default_eps=1e-5, norms=POST, qk_norm="width", qkv_bias=bias, out_bias=bias)
    return done(fields, "olmo2", o, context)


def olmo3(fields: Fields) -> CausalLM:
    """``model_type: olmo3``: OLMo 2 with windows in three layers of four, whose rotation is not stretched."""
    bias = fields.flag("attention_bias", False)
    o, context = options(fields, default_eps=1e-5, norms=POST, qk_norm="width", qkv_bias=bias, out_bias=bias)
    o = sliding(fields, o, lambda i: (i + 1) % 4 != 0, 4096)
    theta = fields.number("rope_theta", None)
    parameters, scaling = rope_dictionaries(fields)
    if unknown := parameters.keys() - {"full_attention", "sliding_attention"}:
        raise fields.fail(f"rope_parameters has {', '.join(sorted(unknown))}; expected full_attention and sliding_attention")
    ropes = {
        kind: rope(fields, f"rope_parameters.{kind}", given or {}, o.head_dim, context, base, 500000.0)
        for kind, given, base in (
            ("full_attention", scaling or parameters.get("full_attention"), theta),
            ("sliding_attention", parameters.get("sliding_attention"), None),  # the reference gives it no other
        )
    }
    turns = [ropes["full_attention" if w is None else "sliding_attention"] for w in o.windows]
    return done(fields, "olmo3", o, context, turns)


def olmoe(fields: Fields) -> CausalLM:
    """``model_type: olmoe``."""
    bias = fields.flag("attention_bias", False)
    o, context = options(
        fields, default_eps=1e-5, qk_norm="width", clip=fields.number("clip_qkv", None), qkv_bias=bias, out_bias=bias
    )
    experts = Experts(
        fields.size("num_experts", 64, most=MOST_EXPERTS), fields.size("num_experts_per_tok", 8), o.hidden,
        "chosen" if fields.flag("norm_topk_prob", False) else "all",
    )  # fmt: skip
    return done(fields, "olmoe", replace(o, experts=fits(fields, experts)), context)


def phi(fields: Fields) -> CausalLM:
    """``model_type: phi`` (1, 1.5, 2): biases everywhere, attention and feed-forward side by side."""
    fields.refuse("qk_layernorm", False, "norms of queries and keys are not implemented for it")
    o, context = options(
        fields, eps="layer_norm_eps", default_eps=1e-5, act="gelu_new", norm="layer", norm_bias=True,
        norms=(PRE[0], None, None, None), final="final_layernorm", parallel=True, qkv_bias=True, out_bias=True, mlp_bias=True,
        head_bias=True, out="dense", mlp=("fc1", "fc2"),
    )  # fmt: skip
    if o.tied:
        raise fields.fail("tie_word_embeddings is true: a head with a bias of its own is not implemented with it")
    return done(fields, "phi", o, context, fraction=0.5)


def phi3(fields: Fields) -> CausalLM:
    """``model_type: phi3`` (Phi 3, 3.5, 4): one matrix for queries, keys and values, one for a gate and what it gates."""
    o, context = options(
        fields, default_eps=1e-5, fused_qkv="parts", mlp=("gate_up_proj", "down_proj"), fused_mlp=True
    )
    original = fields.size("original_max_position_embeddings", None, most=MOST_POSITIONS)
    for name in ("rope_parameters", "rope_scaling"):
        given = fields.given.get(name)
        if not isinstance(given, dict) or given.get("rope_type", given.get("type")) not in ("longrope", "su", "yarn"):
            continue
        # older files say su or yarn, and mean it
        within = {k: v for k, v in given.items() if k != "type"} | {"rope_type": "longrope"}
        fields.given[name] = {**({"original_max_position_embeddings": original} if original else {}), **within}
    window = fields.size("sliding_window", None, most=MOST_POSITIONS)
    return done(fields, "phi3", replace(o, windows=[window] * len(o.windows)), context, fraction=1.0)


def _qwen_moe(fields: Fields, family: str) -> CausalLM:
    fields.refuse("decoder_sparse_step", 1, "layers with and without experts by turns are not implemented")
    fields.refuse("mlp_only_layers", [], "layers with and without experts are not implemented")
    fields.refuse("use_sliding_window", False, "windows are not implemented for it")
    fields.ignore("sliding_window", "max_window_layers")
    if family == "qwen2_moe":
        bias = fields.flag("qkv_bias", True)
        more: dict[str, Any] = {"qkv_bias": bias}
        fields.ignore("layer_types")
    else:
        bias = fields.flag("attention_bias", False)
        more = {"qkv_bias": bias, "out_bias": bias}
    o, context = options(fields, qk_norm="" if family == "qwen2_moe" else "head", **more)
    experts = Experts(
        fields.size("num_experts" if "num_experts" in fields.given else "num_local_experts", most=MOST_EXPERTS),
        fields.size("num_experts_per_tok"), fields.size("moe_intermediate_size"),
        "chosen" if fields.flag("norm_topk_prob", False) else "all",
        fields.size("shared_expert_intermediate_size") if family == "qwen2_moe" else 0,
    )  # fmt: skip
    return done(fields, family, replace(o, experts=fits(fields, experts)), context)


def qwen2_moe(fields: Fields) -> CausalLM:
    """``model_type: qwen2_moe``: experts, and one that all tokens go through."""
    return _qwen_moe(fields, "qwen2_moe")


def qwen3_moe(fields: Fields) -> CausalLM:
    """``model_type: qwen3_moe``: experts in every layer."""
    return _qwen_moe(fields, "qwen3_moe")


def fits(fields: Fields, e: Experts) -> Experts:
    if e.chosen > e.count:
        raise fields.fail(f"num_experts_per_tok is {e.chosen}, and there are {e.count} experts")
    return e


def seed_oss(fields: Fields) -> CausalLM:
    """``model_type: seed_oss``."""
    fields.refuse("pretraining_tp", 1, "tensor-parallel pretraining slices are not implemented; set it to 1")
    o, context = options(
        fields, head_dim=128, qkv_bias=fields.flag("attention_bias", True), out_bias=fields.flag("attention_out_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
    )  # fmt: skip
    return done(fields, "seed_oss", o, context)


def smollm3(fields: Fields) -> CausalLM:
    """``model_type: smollm3``: every fourth layer is not rotated."""
    o, context = options(fields, tied=True, **biases(fields))
    fields.refuse("use_sliding_window", False, "windows are not implemented for it")
    fields.refuse("sliding_window", None, "windows are not implemented for it")
    fields.ignore("layer_types")
    period, layers = fields.size("no_rope_layer_interval", 4), len(o.windows)
    given = fields.take("no_rope_layers", list, None)
    turned = [(i + 1) % period != 0 for i in range(layers)] if given is None else given
    if len(turned) != layers or any(t not in (0, 1) for t in turned):
        raise fields.fail(f"no_rope_layers is {turned}; expected 1 (rotated) or 0 for each of {layers} layers")
    turn = single_rope(fields, o.head_dim, context, 2000000.0)
    return done(fields, "smollm3", o, context, [turn if t else None for t in turned])


def stablelm(fields: Fields) -> CausalLM:
    """``model_type: stablelm``: layer norms, part of each head is turned."""
    fields.refuse("qk_layernorm", False, "norms of queries and keys are not implemented for it")
    parallel = fields.flag("use_parallel_residual", False)
    o, context = options(
        fields, eps="layer_norm_eps", default_eps=1e-5, norm="layer", norm_bias=True, parallel=parallel,
        norms=(PRE[0], None, None, None) if parallel else PRE, qkv_bias=fields.flag("use_qkv_bias", False),
    )  # fmt: skip
    return done(fields, "stablelm", o, context, fraction=0.25)


def starcoder2(fields: Fields) -> CausalLM:
    """``model_type: starcoder2``: layer norms and biases, no gate."""
    bias = fields.flag("use_bias", True)
    o, context = options(
        fields, eps="norm_epsilon", default_eps=1e-5, act="gelu_pytorch_tanh", tied=True, norm="layer", norm_bias=True,
        qkv_bias=bias, out_bias=bias, mlp_bias=bias, mlp=("c_fc", "c_proj"),
    )  # fmt: skip
    window = fields.size("sliding_window", None, most=MOST_POSITIONS)
    return done(fields, "starcoder2", replace(o, windows=[window] * len(o.windows)), context)
