"""Metadata of the decoders before Llama: their configurations have names of their own for sizes.

A converter brings queries, keys and values of all heads together, which the checkpoints of some have head by head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .keys import Keys

_QKV = "blk.0.attn_qkv.bias"
_GPT2 = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
}  # fmt: skip
"""GPT-2's names of sizes, and those of what came after it."""


def _renamed(keys: Keys, config: dict[str, Any], family: str, **names: str) -> dict[str, Any]:
    """Sizes by the names in ``names``; the others are dropped, being what they must be."""
    keys.refuse("attention.key_length", config["hidden_size"] // config["num_attention_heads"], "heads share the width")
    found = {"model_type": family, "vocab_size": config["vocab_size"], "tie_word_embeddings": config["tie_word_embeddings"]}
    found |= {new: config[old] for old, new in names.items()}
    kept = {k: config[k] for k in config if k.endswith(("eps", "epsilon"))}
    config.clear()
    return found | kept


def _heads(keys: Keys, config: Mapping[str, Any]) -> None:
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        raise keys.wrong("attention.head_count_kv", config["num_key_value_heads"], "as many as there are heads")


def _four_times(keys: Keys, config: Mapping[str, Any]) -> None:
    if config["intermediate_size"] != 4 * config["hidden_size"]:
        raise keys.wrong("feed_forward_length", config["intermediate_size"], "four times the width")


def gpt2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    _heads(keys, config)
    return _renamed(keys, config, "gpt2", **_GPT2)


def starcoder(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    groups = config["num_key_value_heads"]
    if groups not in (1, config["num_attention_heads"]):
        raise keys.wrong("attention.head_count_kv", groups, "1 or as many as there are heads")
    found = _renamed(keys, config, "gpt_bigcode", **_GPT2)
    return {**found, "multi_query": groups == 1}


def gptj(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    _heads(keys, config)
    keys.refuse("rope.freq_base", 10000.0, "the reference implementation knows no other")
    part = keys.count("rope.dimension_count", config["head_dim"])
    found = _renamed(keys, config, "gptj", **_GPT2)
    return {**found, "rotary_dim": part}


def mpt(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    _heads(keys, config)
    _four_times(keys, config)
    if not keys.says("attention.max_alibi_bias"):
        raise keys.fail("mpt.attention.max_alibi_bias is missing or 0: MPT without ALiBi is not read")
    keys.refuse("attention.max_alibi_bias", 8.0, "the reference implementation knows no other")
    clip = keys.number("attention.clamp_kqv") if keys.says("attention.clamp_kqv") else None
    keys.ignore("attention.clamp_kqv")
    found = _renamed(
        keys, config, "mpt", hidden_size="d_model", num_hidden_layers="n_layers", num_attention_heads="n_heads",
        max_position_embeddings="max_seq_len",
    )  # fmt: skip
    return {**found, "attn_config": {"clip_qkv": clip}}


def gpt_neox(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    _heads(keys, config)
    part = keys.count("rope.dimension_count", config["head_dim"]) / config["head_dim"]
    return {
        **_renamed(keys, config, "gpt_neox", **{k: k for k in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "intermediate_size",
        )}),
        "rope_parameters": {"rope_theta": keys.number("rope.freq_base", 10000.0), "partial_rotary_factor": part},
        "use_parallel_residual": keys.take("use_parallel_residual", bool, True), "attention_bias": _QKV in keys.tensors,
    }  # fmt: skip


def bloom(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    _heads(keys, config)
    _four_times(keys, config)
    return _renamed(
        keys, config, "bloom", hidden_size="hidden_size", num_hidden_layers="n_layer", num_attention_heads="n_head",
        max_position_embeddings="seq_length",
    )  # fmt: skip


def falcon(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    newer, groups = "blk.0.attn_norm_2.weight" in keys.tensors, config["num_key_value_heads"]
    keys.refuse("rope.dimension_count", config["head_dim"], "all of a head is rotated")
    return {
        **_renamed(
            keys, config, "falcon", hidden_size="hidden_size", num_hidden_layers="num_hidden_layers",
            num_attention_heads="num_attention_heads", max_position_embeddings="max_position_embeddings",
            intermediate_size="ffn_hidden_size", num_key_value_heads="num_kv_heads",
        ),
        "new_decoder_architecture": newer, "multi_query": groups == 1, "bias": _QKV in keys.tensors,
        "rope_theta": keys.number("rope.freq_base", 10000.0),
    }  # fmt: skip
