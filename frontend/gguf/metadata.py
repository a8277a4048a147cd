"""GGUF metadata -> the configuration that our families read. What may change the computation and is not known is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from wasat.frontend.weights.gguf import Gguf

from ..fields import brief
from ..models.config import Fields

_WITHOUT_EFFECT = frozenset({
    "name", "vocab_size", "rope.dimension_count", "rope.dimension_count_swa", "tensor_data_layout",
    "attention.causal", "expert_count", "expert_used_count", "attention.value_length", "attention.value_length_swa",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "attention.sliding_window_pattern", "attention.shared_kv_layers",
})  # fmt: skip
"""Keys that are checked where they stand for more than they say, or say nothing about the numbers."""


class Keys(Fields):
    """The keys ``ARCH.*`` of a file, each taken once; what is left over at the end is refused."""

    unknown = "{fields}: what that changes in the computation is not known, so it is not ignored"
    harmless, neutral = _WITHOUT_EFFECT, {}

    def __init__(self, g: Gguf) -> None:
        super().__init__({}, str(g.path))
        self.tensors = g.tensors
        self.arch = self.path = self._arch(g.metadata)
        start = f"{self.arch}."
        self.given = {k.removeprefix(start): v for k, v in g.metadata.items() if k.startswith(start)}

    def _arch(self, metadata: Mapping[str, Any]) -> str:
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str):
            raise self.fail("general.architecture is missing: the file does not say what model it holds")
        kind = metadata.get("general.type", "model")
        if arch == "clip" or kind == "mmproj":
            raise self.fail("it holds a projector of pictures or sounds (mmproj), no language model; give the model's own file")
        if kind != "model":
            raise self.fail(f"general.type is {kind!r}; only whole models are read")
        return arch

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer, or an array of one for each layer that are all the same."""
        value = self.take(key, (object, bool), *(() if default is None else (default,)))
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size and (value == value[0]).all():
            value = int(value[0])
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, value, "one positive integer")
        return value

    def has(self, key: str) -> bool:
        return key in self.given


def config_of(g: Gguf) -> dict[str, Any]:
    """The ``config.json`` that the file's model would have."""
    keys = Keys(g)
    if (version := g.metadata.get("general.quantization_version", 2)) != 2:
        raise keys.fail(f"general.quantization_version is {version!r}; formats of version 2 are known: convert the file again")
    if keys.arch not in ARCHITECTURES:
        raise keys.fail(f"the architecture is {keys.arch!r}; supported are {', '.join(ARCHITECTURES)}")
    if "token_embd.weight" not in g.tensors:
        raise keys.fail("the tensor token_embd.weight is missing")
    dim, heads, layers = keys.count("embedding_length"), keys.count("attention.head_count"), keys.count("block_count")
    if dim % heads and not keys.has("attention.key_length"):
        raise keys.fail(f"{keys.arch}.embedding_length {dim} does not split into {heads} heads")
    head_dim = keys.count("attention.key_length", dim // heads)
    for key in ("attention.value_length", "rope.dimension_count", "attention.key_length_swa", "attention.value_length_swa",
                "rope.dimension_count_swa"):  # fmt: skip
        keys.refuse(key, head_dim, f"heads have {head_dim} elements, and all of them are rotated")
    keys.refuse("attention.causal", True, "only models that look back are read")
    for key in ("expert_count", "expert_used_count", "attention.shared_kv_layers"):
        keys.refuse(key, 0, "mixtures of experts and shared layers are not read")
    config: dict[str, Any] = {
        "hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "intermediate_size": keys.count("feed_forward_length"), "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": g.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in g.tensors,
    }  # fmt: skip
    keys.refuse("vocab_size", config["vocab_size"], f"token_embd.weight has {config['vocab_size']} rows")
    config |= ARCHITECTURES[keys.arch](keys, config)
    keys.finish()
    return config


def _scaling(keys: Keys) -> dict[str, Any]:
    """``rope_parameters`` without the base."""
    kind = keys.take("rope.scaling.type", str, "linear" if keys.has("rope.scale_linear") else "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    trained = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
    keys.refuse("rope.scaling.attn_factor", 1.0, "cos and sin with a factor of their own are not implemented")
    if kind == "yarn":
        for key in ("ext", "attn"):
            keys.refuse(f"rope.scaling.yarn_{key}_factor", 1.0, "only YaRN as published is implemented")
        given = (k for k in ("beta_fast", "beta_slow") if keys.has(f"rope.scaling.yarn_{k}"))
        betas = {k: keys.number(f"rope.scaling.yarn_{k}") for k in given}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained, **betas}
    if kind not in ("none", "linear"):
        raise keys.fail(f"{keys.arch}.rope.scaling.type is {kind!r}; there are none, linear and yarn")
    return {"rope_type": "default"} if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": factor}


def _llama(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    theta = keys.number("rope.freq_base", 10000.0)
    more: dict[str, Any] = {"rope_parameters": {**_scaling(keys), "rope_theta": theta}}
    for name, part in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_gate")):
        if f"blk.0.{part}.bias" in keys.tensors:
            more[name] = True
    if keys.has("attention.sliding_window"):
        return {**more, "model_type": "mistral", "sliding_window": keys.count("attention.sliding_window")}
    return {**more, "model_type": "llama"}


def _qwen(family: str) -> Callable[[Keys, dict[str, Any]], dict[str, Any]]:
    def read(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
        theta = keys.number("rope.freq_base", 10000.0)
        return {"rope_parameters": {**_scaling(keys), "rope_theta": theta}, "model_type": family, "use_sliding_window": False}

    return read


def _gemma3(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    layers, period = config["num_hidden_layers"], 6
    pattern = keys.given.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, np.ndarray) and pattern.dtype == np.bool_ and len(pattern) == layers:
        sliding = pattern.tolist()
    elif isinstance(pattern, int) and pattern > 0:
        sliding = [(i + 1) % pattern != 0 for i in range(layers)]
    else:
        raise keys.fail(f"gemma3.attention.sliding_window_pattern is {brief(pattern)}; a period, or one entry for each layer")
    window = keys.count("attention.sliding_window") if keys.has("attention.sliding_window") else None
    # the 27B model scales by its width over its heads; the file does not say so
    scale = config["hidden_size"] / config["num_attention_heads"] if layers == 62 else config["head_dim"]
    keys.refuse("attn_logit_softcapping", 0.0, "Gemma 3 has no softcap of scores")
    cap = None
    if keys.given.get(name := "final_logit_softcapping"):
        cap = keys.number(name)
    else:
        keys.refuse(name, 0.0, "expected a number")
    return {
        "model_type": "gemma3_text", "query_pre_attn_scalar": scale, "sliding_window": window,
        "layer_types": ["sliding_attention" if s and window else "full_attention" for s in sliding],
        "final_logit_softcapping": cap,
        "rope_parameters": {
            "full_attention": {**_scaling(keys), "rope_theta": keys.number("rope.freq_base", 1e6)},
            "sliding_attention": {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 1e4)},
        },
    }  # fmt: skip


def _gemma2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    keys.refuse("attention.sliding_window_pattern", 2, "of Gemma 2, every other layer slides")
    # the 27B model scales by its width over its heads; the file does not say so
    scale = config["hidden_size"] / config["num_attention_heads"] if layers == 46 else config["head_dim"]
    return {
        "model_type": "gemma2", "query_pre_attn_scalar": scale,
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "rope_parameters": {**_scaling(keys), "rope_theta": keys.number("rope.freq_base", 10000.0)},
    }  # fmt: skip


ARCHITECTURES: dict[str, Callable[[Keys, dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama, "qwen2": _qwen("qwen2"), "qwen3": _qwen("qwen3"), "gemma2": _gemma2,
    "gemma3": _gemma3,
}  # fmt: skip
"""GGUF's ``general.architecture`` -> what more the configuration says, ``model_type`` first of all."""
