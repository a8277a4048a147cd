"""GGUF metadata -> the configuration that our families read. What may change the computation and is not known is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from wasat.frontend.weights.gguf import Gguf
from wasat.ir import CheckpointError

from ..fields import brief
from ..models.config import Fields
from . import names, older
from .deepseek import deepseek2
from .names import Names

POOLINGS = {1: "mean", 2: "cls", 3: "lasttoken", 4: "rank"}
"""What makes one embedding of many tokens, by GGUF's number; 0 is none."""
_WITHOUT_EFFECT = frozenset({
    "name", "vocab_size", "rope.dimension_count", "rope.dimension_count_swa", "tensor_data_layout",
    "attention.causal", "expert_count", "expert_used_count", "attention.value_length", "attention.value_length_swa",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "attention.sliding_window_pattern", "attention.shared_kv_layers", "pooling_type", "dense_2_feat_in", "dense_2_feat_out",
    "dense_3_feat_in", "dense_3_feat_out", "classifier.output_labels", "classifier.pooling_type",
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
        if not isinstance(kind, str):
            raise self.fail(f"general.type is {brief(kind)}, and not a text")
        if arch == "clip" or kind == "mmproj":
            raise self.fail("it holds a projector of pictures or sounds (mmproj), no language model; give the model's own file")
        if kind != "model":
            raise self.fail(f"general.type is {brief(kind)}; only whole models are read")
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

    def says(self, key: str) -> bool:
        """Whether a key is there and not 0; an array, of which it is not known what it would say, is for others to refuse."""
        value = self.given.get(key)
        return isinstance(value, np.ndarray) or bool(value)


def config_of(g: Gguf) -> dict[str, Any]:
    """The ``config.json`` that the file's model would have."""
    keys = Keys(g)
    version = g.metadata.get("general.quantization_version", 2)
    if not isinstance(version, int) or version != 2:
        said = brief(version)
        raise keys.fail(f"general.quantization_version is {said}; formats of version 2 are known: convert the file again")
    if keys.arch not in ARCHITECTURES:
        raise keys.fail(f"the architecture is {brief(keys.arch)}; supported are {', '.join(ARCHITECTURES)}")
    if "token_embd.weight" not in g.tensors:
        raise keys.fail("the tensor token_embd.weight is missing")
    dim, heads, layers = keys.count("embedding_length"), keys.count("attention.head_count"), keys.count("block_count")
    if layers > len(g.tensors):
        raise keys.fail(f"{keys.arch}.block_count is {layers:,}, and the file has {len(g.tensors)} tensors")
    if dim % heads and not keys.has("attention.key_length"):
        raise keys.fail(f"{keys.arch}.embedding_length {dim} does not split into {heads} heads")
    arch = ARCHITECTURES[keys.arch]
    head_dim = dim // heads if arch.latent else keys.count("attention.key_length", dim // heads)
    for key in () if arch.latent else ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa",
                *(() if arch.partial else ("rope.dimension_count", "rope.dimension_count_swa"))):  # fmt: skip
        keys.refuse(key, head_dim, f"heads have {head_dim} elements, and all of them are rotated")
    if arch.embeds:
        keys.refuse("attention.causal", False, "this architecture sees the whole text")
    else:
        keys.refuse("attention.causal", True, "only models that look back are read")
    if not arch.experts:
        for key in ("expert_count", "expert_used_count"):
            keys.refuse(key, 0, "mixtures of experts are not read of this architecture")
    keys.refuse("attention.shared_kv_layers", 0, "shared layers are not read")
    without = _without_attention(keys, layers) if arch.hybrid else frozenset()
    config: dict[str, Any] = {
        "hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": heads if arch.latent else keys.count("attention.head_count_kv", heads),
        "intermediate_size": keys.count("feed_forward_length"), "max_position_embeddings": keys.count("context_length"),
        "vocab_size": g.tensors["token_embd.weight"].shape[0], "tie_word_embeddings": "output.weight" not in g.tensors,
    }  # fmt: skip
    if without:
        config["layer_types"] = ["conv" if i in without else "full_attention" for i in range(layers)]
    keys.refuse("vocab_size", config["vocab_size"], f"token_embd.weight has {config['vocab_size']} rows")
    rms, other = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
    used = other if arch.eps != "rms_norm_eps" and keys.has(other) else rms  # converters write either for layer norms
    config[arch.eps] = keys.number(used)
    keys.ignore(rms, other)
    config |= arch.read(keys, config)
    keys.finish()
    return config


def _without_attention(keys: Keys, layers: int) -> frozenset[int]:
    """Layers whose heads of keys are 0; the key is left with what the others have."""
    value = keys.given.get("attention.head_count_kv")
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != layers or not value.any():
        return frozenset()
    keys.given["attention.head_count_kv"] = value[value != 0]
    return frozenset(np.flatnonzero(value == 0).tolist())


def pooling_of(g: Gguf) -> str | None:
    """How the tokens of a text become one embedding; ``rank`` of pairs that are scored; None: the model writes texts."""
    name = g.metadata["general.architecture"]
    given = g.metadata.get(key := f"{name}.pooling_type", 0)
    if not isinstance(given, int) or isinstance(given, bool) or given not in (0, *POOLINGS):
        raise CheckpointError(f"{g.path}: {key} is {brief(given)}; there are 0 (none) and {', '.join(map(str, POOLINGS))}")
    return POOLINGS.get(given, "mean" if ARCHITECTURES[name].embeds else None)


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
    if keys.says("expert_count"):
        keys.refuse("attention.sliding_window", None, "a mixture with windows is not read")
        return {
            **more, "model_type": "mixtral", "num_local_experts": keys.count("expert_count"),
            "num_experts_per_tok": keys.count("expert_used_count"),
        }  # fmt: skip
    keys.refuse("expert_used_count", 0, "and there are no experts")
    if keys.has("attention.sliding_window"):
        return {**more, "model_type": "mistral", "sliding_window": keys.count("attention.sliding_window")}
    return {**more, "model_type": "llama"}


def _qwen(family: str) -> Callable[[Keys, dict[str, Any]], dict[str, Any]]:
    def read(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
        theta = keys.number("rope.freq_base", 10000.0)
        return {"rope_parameters": {**_scaling(keys), "rope_theta": theta}, "model_type": family, "use_sliding_window": False}

    return read


def _sliding(keys: Keys, layers: int, period: int, first: bool = False) -> list[bool]:
    """Which layers slide: in each ``period`` all but the last, or but the ``first``."""
    pattern = keys.given.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, np.ndarray) and pattern.dtype == np.bool_ and len(pattern) == layers:
        found: list[bool] = pattern.tolist()
        return found
    if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 1:
        name = f"{keys.arch}.attention.sliding_window_pattern"
        raise keys.fail(f"{name} is {brief(pattern)}; a period, or one entry for each layer")
    return [(i + (not first)) % pattern != 0 for i in range(layers)]


def _gemma3(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    sliding = _sliding(keys, layers, 6)
    window = keys.count("attention.sliding_window") if keys.has("attention.sliding_window") else None
    # the 27B model scales by its width over its heads; the file does not say so
    scale = config["hidden_size"] / config["num_attention_heads"] if layers == 62 else config["head_dim"]
    keys.refuse("attn_logit_softcapping", 0.0, "Gemma 3 has no softcap of scores")
    cap = None
    if keys.says(name := "final_logit_softcapping"):
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


def _encoder(keys: Keys, config: dict[str, Any], *drop: str) -> None:
    """What decoders have and encoders do not."""
    for name in ("head_dim", "num_key_value_heads", "tie_word_embeddings", *drop):
        del config[name]
    keys.refuse("attention.head_count_kv", config["num_attention_heads"], "every head has keys and values of its own")
    keys.refuse("attention.key_length", config["hidden_size"] // config["num_attention_heads"], "heads share the width")


def _bert(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    _encoder(keys, config)
    if (table := keys.tensors.get("position_embd.weight")) is None:
        raise keys.fail("the tensor position_embd.weight is missing")
    types = keys.tensors.get("token_types.weight")
    # of RoBERTa the rows before the first position are cut off, and the context is what is left
    return {
        "model_type": "bert", "max_position_embeddings": table.shape[0], "hidden_act": "gelu",
        "type_vocab_size": 0 if types is None else types.shape[0],
    }


def _modern_bert(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    _encoder(keys, config)
    keys.refuse("rope.scaling.type", "none", "only rotation as trained is implemented for it")
    keys.refuse("rope.scaling.factor", 1.0, "only rotation as trained is implemented for it")
    sliding = _sliding(keys, config["num_hidden_layers"], 3, first=True)
    return {
        "model_type": "modernbert", "local_attention": keys.count("attention.sliding_window", 128),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "hidden_activation": keys.take("hidden_activation", str, "gelu"),
        "global_rope_theta": keys.number("rope.freq_base", 160000.0),
        "local_rope_theta": keys.number("rope.freq_base_swa", 10000.0),
    }


def _gemma_embedding(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {**_gemma3(keys, config), "use_bidirectional_attention": True}


def _turned(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of a model that may rotate a part of each head."""
    part = keys.count("rope.dimension_count", config["head_dim"])
    theta = keys.number("rope.freq_base", 10000.0)
    return {"rope_parameters": {**_scaling(keys), "rope_theta": theta, "partial_rotary_factor": part / config["head_dim"]}}


def _decoder(
    family: str, *, biases: Mapping[str, str] = {}, partial: bool = False, window: bool = False,
    more: Callable[[Keys, dict[str, Any]], dict[str, Any]] | None = None,
) -> Callable[[Keys, dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Reads a family. ``biases``: fields that say whether there are some -> a tensor that then has one."""

    def read(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
        found = _turned(keys, config)
        if not partial:
            del found["rope_parameters"]["partial_rotary_factor"]
        found |= {name: f"blk.0.{part}.bias" in keys.tensors for name, part in biases.items()}
        if window:
            found["sliding_window"] = keys.count("attention.sliding_window") if keys.has("attention.sliding_window") else None
        return {"model_type": family, **found, **(more(keys, config) if more else {})}

    return read


def _granite(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    factors = {
        "attention_multiplier": ("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": ("embedding_scale", 1.0), "residual_multiplier": ("residual_scale", 1.0),
        "logits_scaling": ("logit_scale", 1.0),
    }  # fmt: skip
    return {field: keys.number(key, default) for field, (key, default) in factors.items()}


def _granite_experts(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    found = {"num_local_experts": keys.count("expert_count"), "num_experts_per_tok": keys.count("expert_used_count")}
    keys.refuse("expert_shared_feed_forward_length", 0, "experts that all tokens go through are not implemented for it")
    keys.refuse("expert_feed_forward_length", config["intermediate_size"], "it is the width of experts")
    return {**_granite(keys, config), **found}


def _deepseek2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    return deepseek2(keys, config, _scaling(keys))


def _lfm2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    config["norm_eps"] = config.pop("rms_norm_eps")
    del config["head_dim"]
    if "layer_types" not in config:
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    bias = any(name.endswith("shortconv.in_proj.bias") for name in keys.tensors)
    return {"conv_L_cache": keys.count("shortconv.l_cache"), "block_auto_adjust_ff_dim": False, "conv_bias": bias}


def _olmo(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    keys.refuse("attention.layer_norm_epsilon", float(np.float32(1e-5)), "OLMo's is fixed")
    del config["eps"]
    return {"clip_qkv": keys.number("attention.clamp_kqv") if keys.says("attention.clamp_kqv") else None}


def _smollm3(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {"no_rope_layer_interval": 4}  # which no file says


def _stablelm(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {"use_parallel_residual": keys.take("use_parallel_residual", bool, False)}


def _command(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {"logit_scale": keys.number("logit_scale")}


def _phi2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    up = keys.tensors.get("blk.0.ffn_up.weight")  # the file says four times the width, whatever it is
    return {} if up is None else {"intermediate_size": up.shape[0]}


def _exaone4(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    if not keys.has("attention.sliding_window"):
        return {"sliding_window": None}
    sliding = _sliding(keys, config["num_hidden_layers"], 4)
    return {
        "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
    }


def _olmo2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """OLMo 2; OLMo 3 where there are windows."""
    if not keys.has("attention.sliding_window"):
        keys.refuse("rope.freq_base_swa", None, "and no layer slides")
        return _decoder("olmo2")(keys, config)
    sliding, theta = _sliding(keys, config["num_hidden_layers"], 4), keys.number("rope.freq_base", 500000.0)
    return {
        "model_type": "olmo3", "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "rope_parameters": {
            "full_attention": {**_scaling(keys), "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", theta)},
        },
    }  # fmt: skip


def _mixture(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    keys.refuse("expert_weights_scale", 1.0, "a factor of experts' shares is not implemented")
    count, hidden = keys.count("expert_count"), "expert_feed_forward_length"
    found: dict[str, Any] = {"num_experts": count, "num_experts_per_tok": keys.count("expert_used_count")}
    if keys.has(hidden):
        found["intermediate_size" if keys.arch == "olmoe" else "moe_intermediate_size"] = keys.count(hidden)
    elif keys.arch != "olmoe":
        raise keys.fail(f"{keys.arch}.{hidden} is missing")
    if keys.arch == "qwen2moe":
        found["shared_expert_intermediate_size"] = keys.count("expert_shared_feed_forward_length")
    shared = keys.arch == "qwen3moe"
    keys.refuse("expert_weights_norm", shared, "this architecture's shares are otherwise")
    return {**found, "norm_topk_prob": shared}


def _gpt_oss(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    hidden, layers = keys.count("expert_feed_forward_length", config["intermediate_size"]), config["num_hidden_layers"]
    turned = {**_scaling(keys), "rope_theta": keys.number("rope.freq_base", 150000.0)}
    if turned["rope_type"] == "yarn":
        turned["truncate"] = False  # which no file says
    return {
        "model_type": "gpt_oss", "intermediate_size": hidden, "num_local_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"), "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in _sliding(keys, layers, 2)],
        "attention_bias": "blk.0.attn_q.bias" in keys.tensors, "rope_parameters": turned,
    }


@dataclass(frozen=True)
class Architecture:
    """How the metadata of an architecture are read, and what it calls its tensors."""

    read: Callable[[Keys, dict[str, Any]], dict[str, Any]]
    """What more the configuration says, ``model_type`` first of all."""
    names: Names = names.LLAMA
    embeds: bool = False
    """It sees whole texts, and does nothing else but embed them."""
    eps: str = "rms_norm_eps"
    interleaved: bool = False
    """Rows of queries and keys are in the order of neighbouring pairs, which the checkpoint's are not."""
    partial: bool = False
    """A part of each head may be rotated."""
    experts: bool = False
    latent: bool = False
    """Keys and values are made of a latent vector: their sizes are otherwise."""
    hybrid: bool = False
    """Layers without heads of keys have something else than attention."""
    two_norms: Names | None = None
    """Names where there is ``attn_norm_2``."""

    def names_of(self, tensors: Iterable[str]) -> Names:
        """Names of a file that has these tensors."""
        return self.two_norms if self.two_norms is not None and "blk.0.attn_norm_2.weight" in tensors else self.names


_ATTENTION = {"attention_bias": "attn_q"}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, names.experts("block_sparse_moe"), interleaved=True, experts=True),
    "qwen2": Architecture(_qwen("qwen2")), "qwen3": Architecture(_qwen("qwen3")),
    "gemma2": Architecture(_gemma2, names.GEMMA), "gemma3": Architecture(_gemma3, names.GEMMA),
    "gemma-embedding": Architecture(_gemma_embedding, names.GEMMA, embeds=True),
    "bert": Architecture(_bert, names.BERT, True, "layer_norm_eps"),
    "modern-bert": Architecture(_modern_bert, names.MODERN_BERT, True, "norm_eps"),
    "arcee": Architecture(_decoder("arcee", biases=_ATTENTION), interleaved=True),
    "command-r": Architecture(_decoder("cohere", more=_command), eps="layer_norm_eps"),
    "ernie4_5": Architecture(_decoder("ernie4_5", biases={"use_bias": "attn_q"})),
    "exaone4": Architecture(_decoder("exaone4", more=_exaone4), names.OLMO2),
    "gemma": Architecture(_decoder("gemma")),
    "glm4": Architecture(_decoder("glm4", biases=_ATTENTION, partial=True), names.GLM4, partial=True),
    "granite": Architecture(_decoder("granite", biases=_ATTENTION, more=_granite), interleaved=True),
    "granitemoe": Architecture(
        _decoder("granitemoe", biases=_ATTENTION, more=_granite_experts), names.experts("block_sparse_moe"), interleaved=True,
        experts=True,
    ),
    "deepseek2": Architecture(_deepseek2, names.DEEPSEEK2, partial=True, experts=True, latent=True),
    "lfm2": Architecture(_decoder("lfm2", more=_lfm2), names.LFM2, hybrid=True),
    "hunyuan-dense": Architecture(_decoder("hunyuan_v1_dense", biases=_ATTENTION), names.HUNYUAN),
    "gpt-oss": Architecture(_gpt_oss, names.GPT_OSS, experts=True),
    "gpt2": Architecture(older.gpt2, names.GPT2, eps="layer_norm_epsilon", partial=True),
    "gptneox": Architecture(older.gpt_neox, names.GPT_NEOX, eps="layer_norm_eps", partial=True),
    "bloom": Architecture(older.bloom, names.BLOOM, eps="layer_norm_epsilon", partial=True),
    "falcon": Architecture(older.falcon, names.BLOOM, eps="layer_norm_epsilon", partial=True, two_norms=names.FALCON_40B),
    "nemotron": Architecture(_decoder("nemotron", biases=_ATTENTION, partial=True), eps="norm_eps", partial=True),
    "olmo": Architecture(_decoder("olmo", more=_olmo), interleaved=True, eps="eps"),
    "olmo2": Architecture(_olmo2, names.OLMO2),
    "olmoe": Architecture(_decoder("olmoe", more=_mixture), names.experts("mlp"), experts=True),
    "phi2": Architecture(_decoder("phi", partial=True, more=_phi2), names.PHI2, eps="layer_norm_eps", partial=True),
    "phi3": Architecture(_decoder("phi3", partial=True, window=True), names.PHI3, partial=True),
    "qwen2moe": Architecture(_decoder("qwen2_moe", more=_mixture), names.experts("mlp"), experts=True),
    "qwen3moe": Architecture(_decoder("qwen3_moe", more=_mixture), names.experts("mlp"), experts=True),
    "seed_oss": Architecture(
        _decoder("seed_oss", biases={"attention_bias": "attn_q", "attention_out_bias": "attn_output"}), names.SEED_OSS
    ),
    "smollm3": Architecture(_decoder("smollm3", biases=_ATTENTION, more=_smollm3), interleaved=True),
    "stablelm": Architecture(
        _decoder("stablelm", biases={"use_qkv_bias": "attn_q"}, partial=True, more=_stablelm), eps="layer_norm_eps",
        partial=True,
    ),
    "starcoder2": Architecture(
        _decoder("starcoder2", biases={"use_bias": "attn_q"}, window=True), names.STARCODER2, eps="norm_epsilon"
    ),
}  # fmt: skip
"""By GGUF's ``general.architecture``."""
