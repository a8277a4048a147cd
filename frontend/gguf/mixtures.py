"""Metadata of architectures with experts."""

from __future__ import annotations

from typing import Any

from .keys import Keys, scaling, slides, turned


def granite(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    factors = {
        "attention_multiplier": ("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": ("embedding_scale", 1.0), "residual_multiplier": ("residual_scale", 1.0),
        "logits_scaling": ("logit_scale", 1.0),
    }  # fmt: skip
    return {field: keys.number(key, default) for field, (key, default) in factors.items()}


def granite_experts(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    found = {"num_local_experts": keys.count("expert_count"), "num_experts_per_tok": keys.count("expert_used_count")}
    keys.refuse("expert_feed_forward_length", config["intermediate_size"], "it is the width of experts")
    shared = keys.take("expert_shared_feed_forward_length", int, 0, least=0)
    more = {"model_type": "granitemoeshared", "shared_intermediate_size": shared} if shared else {}
    return {**granite(keys, config), **found, **more}


def mixture(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    keys.refuse("expert_weights_scale", 1.0, "a factor of experts' shares is not implemented")
    count, hidden = keys.count("expert_count"), "expert_feed_forward_length"
    found: dict[str, Any] = {"num_experts": count, "num_experts_per_tok": keys.count("expert_used_count")}
    if keys.has(hidden):
        found["intermediate_size" if keys.arch == "olmoe" else "moe_intermediate_size"] = keys.count(hidden)
    elif keys.arch != "olmoe":
        raise keys.fail(f"{keys.arch}.{hidden} is missing")
    if keys.arch == "qwen2moe":
        found["shared_expert_intermediate_size"] = keys.count("expert_shared_feed_forward_length")
    shared = keys.arch in ("qwen3moe", "qwen3vlmoe")
    keys.refuse("expert_weights_norm", shared, "this architecture's shares are otherwise")
    return {**found, "norm_topk_prob": shared}


def gpt_oss(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    hidden, layers = keys.count("expert_feed_forward_length", config["intermediate_size"]), config["num_hidden_layers"]
    turned = {**scaling(keys), "rope_theta": keys.number("rope.freq_base", 150000.0)}
    if turned["rope_type"] == "yarn":
        turned["truncate"] = False  # which no file says
    return {
        "model_type": "gpt_oss", "intermediate_size": hidden, "num_local_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"), "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in slides(keys, layers, 2)],
        "attention_bias": "blk.0.attn_q.bias" in keys.tensors, "rope_parameters": turned,
    }


def glm4_moe(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """``glm4moe`` (GLM 4.5, 4.6)."""
    keys.refuse("expert_gating_func", 2, "the reference implementation knows sigmoid (2) alone")
    return {
        "model_type": "glm4_moe", **turned(keys, config), "attention_bias": "blk.0.attn_q.bias" in keys.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in keys.tensors, "n_routed_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"), "n_shared_experts": keys.count("expert_shared_count"),
        "moe_intermediate_size": keys.count("expert_feed_forward_length"), "n_group": keys.count("expert_group_count", 1),
        "first_k_dense_replace": keys.take("leading_dense_block_count", int, 0, least=0),
        "topk_group": keys.count("expert_group_used_count", 1),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
    }


def llama4(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """``llama4``, its text: three layers of four see pieces of it. Of 128 experts (Maverick) queries and keys have no norms,
    which no file says."""
    piece, layers = 8192, config["num_hidden_layers"]
    keys.refuse("attention.sliding_window", piece, "layers that all see everything, or other pieces, are not read of it")
    rotated, theta = slides(keys, layers, 4), keys.number("rope.freq_base", 500000.0)
    count = keys.count("expert_count")
    keys.refuse("expert_gating_func", 2, "the reference implementation knows sigmoid (2) alone")
    keys.refuse("expert_used_count", 1, "a token that several experts read is not implemented for it")
    return {
        "model_type": "llama4_text", "rope_parameters": {**scaling(keys), "rope_theta": theta},
        "intermediate_size": keys.count("expert_feed_forward_length"), "intermediate_size_mlp": config["intermediate_size"],
        "num_local_experts": count, "interleave_moe_layer_step": keys.count("interleave_moe_layer_step"),
        "use_qk_norm": count != 128, "attention_chunk_size": keys.count("attention.chunk_size", piece),
        "no_rope_layers": [int(r) for r in rotated],
        "layer_types": ["chunked_attention" if r else "full_attention" for r in rotated],
    }
