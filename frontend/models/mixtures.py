"""gpt-oss, DeepSeek 2 and 3, GLM 4.5, Granite with experts, Llama 4: experts, and what their attention has beside them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from wasat.frontend import nn

from .config import MOST_EXPERTS, MOST_POSITIONS, MOST_SIZE, Fields, single_rope
from .decoder import CausalLM, Experts, Latent, Names, Options
from .families import done, fits, granite_options, options, sliding

_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""Of a gpt-oss whose configuration says nothing."""


def gpt_oss(fields: Fields) -> CausalLM:
    """``model_type: gpt_oss``: a sink for each head, windows in every other layer, experts with a clamped gate."""
    bias = fields.flag("attention_bias", True)
    fields.ignore("initial_context_length", "experts_per_token")  # again what other fields say
    o, context = options(fields, default_eps=1e-5, head_dim=64, qkv_bias=bias, out_bias=bias, sinks=True)
    fields.refuse("hidden_act", "silu", "its experts' gate has no other activation")
    if not fields.given.get("rope_parameters") and not fields.given.get("rope_scaling"):
        fields.given["rope_scaling"] = _ROPE
    experts = Experts(
        fields.size("num_local_experts" if "num_local_experts" in fields.given else "num_experts", 128, most=MOST_EXPERTS),
        fields.size("num_experts_per_tok", 4), o.hidden, "chosen", names=("mlp", "router"),
        clamped=(fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0)),
    )  # fmt: skip
    o = sliding(fields, replace(o, experts=fits(fields, experts)), lambda i: i % 2 == 0, 128)
    return done(fields, "gpt_oss", o, context, default=150000.0)


def _deepseek(fields: Fields, family: str) -> tuple[Options, int, nn.RoPE]:
    """What both have: latent attention, experts that all tokens go through, the first layers without experts."""
    latest = family == "deepseek_v3"
    latent = Latent(
        fields.size("kv_lora_rank", 512), fields.size("q_lora_rank", None if "q_lora_rank" in fields.given else 1536),
        fields.size("qk_nope_head_dim", 128), fields.size("qk_rope_head_dim", 64), fields.size("v_head_dim", 128),
    )  # fmt: skip
    fields.ignore("qk_head_dim", "head_dim", "aux_loss_alpha", "seq_aux", "ep_size")
    fields.refuse("moe_layer_freq", 1, "layers with and without experts by turns are not implemented")
    fields.refuse("pretraining_tp", 1, "tensor-parallel pretraining slices are not implemented; set it to 1")
    scoring: Literal["sigmoid", "softmax"] = "sigmoid" if latest else "softmax"
    fields.refuse("scoring_func", scoring, f"the reference implementation of {family} knows {scoring} alone")
    fields.given["head_dim"] = latent.plain + latent.turned
    if fields.given.get("num_key_value_heads") is None:
        fields.given["num_key_value_heads"] = fields.given.get("num_attention_heads")
    bias = fields.flag("attention_bias", False)
    o, context = options(fields, qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False) if not latest else False)
    fields.refuse("num_key_value_heads", o.heads, "every head has keys of its own, made of the latent ones")
    for given in (fields.given.get("rope_parameters"), fields.given.get("rope_scaling")):
        if isinstance(given, dict) and given.get("rope_type", given.get("type")) not in (None, "default"):
            every, factor = given.get("mscale_all_dim"), given.get("factor")
            if isinstance(every, (int, float)) and isinstance(factor, (int, float)) and every and factor > 1:
                more = 0.1 * every * math.log(factor) + 1.0
                o = replace(o, scale=o.head_dim**-0.5 * more * more)
    turned = fields.flag("rope_interleave", True) if latest else True
    turn = single_rope(fields, latent.turned, context, interleaved=turned)
    count = fields.size("n_routed_experts", 256 if latest else 64, most=MOST_EXPERTS)
    shared = fields.size("n_shared_experts", 1 if latest else 2)
    width = fields.size("moe_intermediate_size", 2048 if latest else 1407)
    chosen = fields.size("num_experts_per_tok", *((8,) if latest else ()))
    groups, best = fields.size("n_group", 8 if latest else None) or 1, fields.size("topk_group", 4 if latest else None) or 1
    if not latest:
        way = fields.take("topk_method", str, "greedy")
        if way not in ("greedy", "group_limited_greedy"):
            raise fields.fail(f"topk_method {way!r} is not implemented: greedy and group_limited_greedy are")
        groups, best = (1, 1) if way == "greedy" else (groups, best)
    _grouped(fields, count, chosen, groups, best, 2 if latest else 1)
    experts = Experts(
        count, chosen, width, "all", shared * width, shared_name="shared_experts", shared_gate=False, scoring=scoring,
        since=fields.take("first_k_dense_replace", int, 3 if latest else 0, least=0), groups=groups, best=best,
        group_top=2 if latest else 1, correction=latest, factor=fields.number("routed_scaling_factor", 2.5 if latest else 1.0),
        normalized=fields.flag("norm_topk_prob", True) if latest else False,
    )  # fmt: skip
    return replace(o, latent=latent, experts=fits(fields, experts)), context, turn


def _grouped(fields: Fields, count: int, chosen: int, groups: int, best: int, least: int) -> None:
    """Refuses groups of which not so many experts can be chosen; a group's score is of ``least`` experts."""
    per = count // groups
    if count % groups or best > groups or best * per < chosen or (groups > 1 and per < least):
        raise fields.fail(
            f"{count} experts in {groups} groups (n_group), of which a token's are in {best} (topk_group): no {chosen} of them "
            "(num_experts_per_tok) can be chosen so"
        )


def deepseek_v2(fields: Fields) -> CausalLM:
    """``model_type: deepseek_v2``."""
    fields.ignore("norm_topk_prob")  # which the reference implementation does not read
    o, context, turn = _deepseek(fields, "deepseek_v2")
    return done(fields, "deepseek_v2", o, context, [turn] * len(o.windows))


def deepseek_v3(fields: Fields) -> CausalLM:
    """``model_type: deepseek_v3`` (and R1): a layer behind the last, which foretells further tokens, is not read."""
    fields.refuse("topk_method", "noaux_tc", "the reference implementation knows no other")
    behind = fields.take("num_nextn_predict_layers", int, 0, least=0, most=64)
    o, context, turn = _deepseek(fields, "deepseek_v3")
    model = done(fields, "deepseek_v3", o, context, [turn] * len(o.windows))
    model.unread = _behind(o, behind)
    return model


def _behind(o: Options, count: int) -> tuple[str, ...]:
    """Beginnings of the names of layers behind the last, which foretell further tokens."""
    return tuple(f"model.layers.{len(o.windows) + i}." for i in range(count))


def glm4_moe(fields: Fields) -> CausalLM:
    """``model_type: glm4_moe`` (GLM 4.5, 4.6): DeepSeek's experts, half of each head is turned."""
    normed, behind = fields.flag("use_qk_norm", False), fields.take("num_nextn_predict_layers", int, 1, least=0, most=64)
    fields.refuse("scoring_func", "sigmoid", "the reference implementation knows no other")
    fields.refuse("topk_method", "noaux_tc", "the reference implementation knows no other")
    o, context = options(
        fields, default_eps=1e-5, qkv_bias=fields.flag("attention_bias", False), qk_norm="head" if normed else ""
    )
    count, shared = fields.size("n_routed_experts", 128, most=MOST_EXPERTS), fields.size("n_shared_experts", 1)
    width, chosen = fields.size("moe_intermediate_size", 1408), fields.size("num_experts_per_tok", 8)
    groups, best = fields.size("n_group", 1), fields.size("topk_group", 1)
    _grouped(fields, count, chosen, groups, best, 2)
    experts = Experts(
        count, chosen, width, "all", shared * width, shared_name="shared_experts", shared_gate=False, scoring="sigmoid",
        since=fields.take("first_k_dense_replace", int, 1, least=0), groups=groups, best=best, group_top=2, correction=True,
        factor=fields.number("routed_scaling_factor", 1.0), normalized=fields.flag("norm_topk_prob", True),
    )  # fmt: skip
    model = done(fields, "glm4_moe", replace(o, experts=fits(fields, experts)), context, fraction=0.5)
    model.unread = _behind(o, behind)
    return model


def granitemoeshared(fields: Fields) -> CausalLM:
    """``model_type: granitemoeshared``: beside experts a layer for all tokens, if any."""
    return _granitemoe(fields, "granitemoeshared", fields.take("shared_intermediate_size", int, 0, least=0, most=MOST_SIZE))


def granitemoe(fields: Fields) -> CausalLM:
    """``model_type: granitemoe``: Granite's factors, experts in every layer."""
    return _granitemoe(fields, "granitemoe", 0)


def _granitemoe(fields: Fields, family: str, shared: int) -> CausalLM:
    bias = fields.flag("attention_bias", False)
    o, context = granite_options(fields, qkv_bias=bias, out_bias=bias)
    experts = Experts(
        fields.size("num_local_experts", 8, most=MOST_EXPERTS), fields.size("num_experts_per_tok", 2), o.hidden, "chosen",
        shared, ("block_sparse_moe", "router.layer"), shared_gate=False,
        shared_beside=("shared_mlp.input_linear", "shared_mlp.output_linear"),
        stacks=("input_linear.weight", "output_linear.weight", False),
    )  # fmt: skip
    return done(fields, family, replace(o, experts=fits(fields, experts)), context)


def llama4_text(fields: Fields) -> CausalLM:
    """``model_type: llama4_text``: of each four layers three are rotated and see pieces of the text; one expert for a token."""
    bias = fields.flag("attention_bias", False)
    normed, wide = fields.flag("use_qk_norm", True), fields.size("intermediate_size_mlp", 16384)
    grows = fields.number("attn_scale", 0.1), float(fields.size("floor_scale", 8192, most=MOST_POSITIONS))
    tempered = bool(fields.take("attn_temperature_tuning", (bool, int), True))  # 4 in the first folders
    fields.ignore("for_llm_compressor")  # how another program takes its experts apart
    o, context = options(
        fields, default_eps=1e-5, head_dim=128, qkv_bias=bias, out_bias=bias, qk_norm="plain" if normed else "",
        tempered=grows if tempered else None, names=Names(feed="feed_forward"),
    )  # fmt: skip
    layers, chunk = len(o.windows), fields.size("attention_chunk_size", 8192, most=MOST_POSITIONS)
    period = fields.size("no_rope_layer_interval", 4)
    turned = fields.take("no_rope_layers", list, None) or [int((i + 1) % period != 0) for i in range(layers)]
    if len(turned) != layers or any(t not in (0, 1) for t in turned):
        raise fields.fail(f"no_rope_layers is {turned}; expected 1 (rotated) or 0 for each of {layers} layers")
    kinds = fields.take("layer_types", list, None) or ["chunked_attention" if t else "full_attention" for t in turned]
    if len(kinds) != layers or any(k not in ("chunked_attention", "full_attention") for k in kinds):
        raise fields.fail(f"layer_types is {kinds}; expected chunked_attention or full_attention for each of {layers} layers")
    step = fields.size("interleave_moe_layer_step", 1)
    given = fields.take("moe_layers", list, None)
    there = range(step - 1, layers, step) if given is None else given
    if any(type(i) is not int or not 0 <= i < layers for i in there):
        raise fields.fail(f"moe_layers is {given}; expected numbers of layers, of which there are {layers}")
    fields.refuse("num_experts_per_tok", 1, "a token that several experts read is not implemented for it")
    experts = Experts(
        fields.size("num_local_experts", 16, most=MOST_EXPERTS), 1, o.hidden, "all", o.hidden, ("feed_forward", "router"),
        shared_gate=False, stacks=("experts.gate_up_proj", "experts.down_proj", True), enters=True,
        without=frozenset(range(layers)) - frozenset(there),
    )  # fmt: skip
    turn = single_rope(fields, o.head_dim, context, 500000.0, interleaved=True)
    chunks = [chunk if k == "chunked_attention" else None for k in kinds]
    o = replace(o, hidden=wide, experts=experts, chunks=chunks)
    return done(fields, "llama4_text", o, context, [turn if t else None for t in turned])
