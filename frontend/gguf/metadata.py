"""GGUF metadata -> the configuration that our families read. What may change the computation and is not known is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from wasat.frontend.weights.gguf import Gguf
from wasat.ir import CheckpointError

from ..fields import brief
from . import mixtures, names, older
from .deepseek import deepseek2
from .keys import Keys, scaling, sections, slides, turned
from .names import Names

POOLINGS = {1: "mean", 2: "cls", 3: "lasttoken", 4: "rank"}
"""What makes one embedding of many tokens, by GGUF's number; 0 is none."""


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
    behind = keys.take("nextn_predict_layers", int, 0, least=0, most=layers - 1) if arch.foretells else 0
    layers -= behind
    without = _without_attention(keys, layers) if arch.hybrid else frozenset()
    config: dict[str, Any] = {
        "hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": heads if arch.latent else keys.count("attention.head_count_kv", heads),
        "intermediate_size": keys.count("feed_forward_length"), "max_position_embeddings": keys.count("context_length"),
        "vocab_size": g.tensors["token_embd.weight"].shape[0], "tie_word_embeddings": "output.weight" not in g.tensors,
    }  # fmt: skip
    if behind:
        config["num_nextn_predict_layers"] = behind
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


def _llama(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    theta = keys.number("rope.freq_base", 10000.0)
    more: dict[str, Any] = {"rope_parameters": {**scaling(keys), "rope_theta": theta}}
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


def _baichuan(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """Built like Llama; of 13B, whose layers tell it apart, scores grow with positions, which no file says."""
    if config["num_hidden_layers"] == 40:
        raise keys.fail("it is Baichuan 13B, whose positions are ALiBi's; 7B is read")
    return _llama(keys, config)


def _qwen(family: str) -> Callable[[Keys, dict[str, Any]], dict[str, Any]]:
    def read(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
        theta = keys.number("rope.freq_base", 10000.0)
        return {"rope_parameters": {**scaling(keys), "rope_theta": theta}, "model_type": family, "use_sliding_window": False}

    return read


def _qwen_that_sees(family: str) -> Callable[[Keys, dict[str, Any]], dict[str, Any]]:
    """Qwen's models of pictures: their text. Pictures' features are added to layers (``n_deepstack_layers``) where there are
    pictures alone."""

    def read(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
        sections(keys, config)
        keys.ignore("n_deepstack_layers")
        more = mixtures.mixture(keys, config) if family == "qwen3_moe" else {}
        return {**_qwen(family)(keys, config), **more}

    return read


def _gemma3(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    sliding = slides(keys, layers, 6)
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
            "full_attention": {**scaling(keys), "rope_theta": keys.number("rope.freq_base", 1e6)},
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
        "rope_parameters": {**scaling(keys), "rope_theta": keys.number("rope.freq_base", 10000.0)},
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


def _jina_bert2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """Jina 2: ALiBi both ways, a gate of GELU, in a matrix of its own in files of early 2024."""
    _encoder(keys, config)
    keys.refuse("attention.max_alibi_bias", 8.0, "the reference implementation knows no other")
    types = keys.tensors.get("token_types.weight")
    return {
        "model_type": "bert", "position_embedding_type": "alibi", "feed_forward_type": "geglu",
        "gate_apart": "blk.0.ffn_gate.weight" in keys.tensors, "type_vocab_size": 0 if types is None else types.shape[0],
    }


def _rotated_bert(family: str, act: str) -> Callable[[Keys, dict[str, Any]], dict[str, Any]]:
    """Encoders in BERT's order of norms whose positions turn queries and keys."""

    def read(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
        _encoder(keys, config)
        keys.refuse("moe_every_n_layers", 0, "experts are not read of this architecture")
        types = keys.tensors.get("token_types.weight")
        return {
            "model_type": family, "hidden_act": act, "type_vocab_size": 0 if types is None else types.shape[0],
            "rope_parameters": {**scaling(keys), "rope_theta": keys.number("rope.freq_base", 10000.0)},
        }

    return read


def _modern_bert(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    _encoder(keys, config)
    keys.refuse("rope.scaling.type", "none", "only rotation as trained is implemented for it")
    keys.refuse("rope.scaling.factor", 1.0, "only rotation as trained is implemented for it")
    sliding = slides(keys, config["num_hidden_layers"], 3, first=True)
    return {
        "model_type": "modernbert", "local_attention": keys.count("attention.sliding_window", 128),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "hidden_activation": keys.take("hidden_activation", str, "gelu"),
        "global_rope_theta": keys.number("rope.freq_base", 160000.0),
        "local_rope_theta": keys.number("rope.freq_base_swa", 10000.0),
    }


def _eurobert(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {**_decoder("eurobert")(keys, config), "tie_word_embeddings": True}


def _gemma_embedding(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {**_gemma3(keys, config), "use_bidirectional_attention": True}


def _decoder(
    family: str, *, biases: Mapping[str, str] = {}, partial: bool = False, window: bool = False,
    more: Callable[[Keys, dict[str, Any]], dict[str, Any]] | None = None,
) -> Callable[[Keys, dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Reads a family. ``biases``: fields that say whether there are some -> a tensor that then has one."""

    def read(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
        found = turned(keys, config)
        if not partial:
            del found["rope_parameters"]["partial_rotary_factor"]
        found |= {name: f"blk.0.{part}.bias" in keys.tensors for name, part in biases.items()}
        if window:
            found["sliding_window"] = keys.count("attention.sliding_window") if keys.has("attention.sliding_window") else None
        return {"model_type": family, **found, **(more(keys, config) if more else {})}

    return read


def _deepseek2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    return deepseek2(keys, config, scaling(keys))


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


def _cohere2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    keys.refuse("rope.freq_base_swa", keys.given.get("rope.freq_base", 10000.0), "only layers that slide are rotated")
    sliding = slides(keys, config["num_hidden_layers"], 4)
    return {
        "logit_scale": keys.number("logit_scale"), "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
    }


def _minicpm(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """Granite's factors, which files of 2024 do not have: MiniCPM 1B and 2B differ in them."""
    for key in ("embedding_scale", "residual_scale", "logit_scale"):
        if not keys.has(key):
            raise keys.fail(f"{keys.arch}.{key} is missing: convert the model again with a newer llama.cpp, which writes it")
    return mixtures.granite(keys, config)


def _phi2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    up = keys.tensors.get("blk.0.ffn_up.weight")  # the file says four times the width, whatever it is
    return {} if up is None else {"intermediate_size": up.shape[0]}


def _exaone4(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    if not keys.has("attention.sliding_window"):
        return {"sliding_window": None}
    sliding = slides(keys, config["num_hidden_layers"], 4)
    return {
        "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
    }


def _olmo2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """OLMo 2; OLMo 3 where there are windows."""
    if not keys.has("attention.sliding_window"):
        keys.refuse("rope.freq_base_swa", None, "and no layer slides")
        return _decoder("olmo2")(keys, config)
    sliding, theta = slides(keys, config["num_hidden_layers"], 4), keys.number("rope.freq_base", 500000.0)
    return {
        "model_type": "olmo3", "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "rope_parameters": {
            "full_attention": {**scaling(keys), "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", theta)},
        },
    }  # fmt: skip


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
    foretells: bool = False
    """Layers behind the last may foretell further tokens; they are not read."""
    hybrid: bool = False
    """Layers without heads of keys have something else than attention."""
    other: tuple[str, Names] | None = None
    """A tensor of the first layer, and the names where there is one."""

    def names_of(self, tensors: Iterable[str]) -> Names:
        """Names of a file that has these tensors."""
        return self.other[1] if self.other is not None and f"blk.0.{self.other[0]}.weight" in tensors else self.names


_ATTENTION = {"attention_bias": "attn_q"}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, names.experts("block_sparse_moe"), interleaved=True, experts=True),
    "qwen2": Architecture(_qwen("qwen2")), "qwen3": Architecture(_qwen("qwen3")),
    "gemma2": Architecture(_gemma2, names.GEMMA), "gemma3": Architecture(_gemma3, names.GEMMA),
    "gemma-embedding": Architecture(_gemma_embedding, names.GEMMA, embeds=True),
    "bert": Architecture(_bert, names.BERT, True, "layer_norm_eps"),
    "nomic-bert": Architecture(_rotated_bert("nomic_bert", "silu"), names.NOMIC_BERT, True, "layer_norm_eps"),
    "jina-bert-v3": Architecture(_rotated_bert("jina_embeddings_v3", "gelu"), names.JINA_BERT3, True, "layer_norm_eps"),
    "eurobert": Architecture(_eurobert, embeds=True), "llama-embed": Architecture(_eurobert, embeds=True, interleaved=True),
    "jina-bert-v2": Architecture(
        _jina_bert2, names.JINA_BERT2, True, "layer_norm_eps", other=("ffn_gate", names.JINA_BERT2_APART)
    ),
    "modern-bert": Architecture(_modern_bert, names.MODERN_BERT, True, "norm_eps"),
    "chatglm": Architecture(_decoder("glm", biases=_ATTENTION, partial=True), names.CHATGLM, partial=True),
    "arcee": Architecture(_decoder("arcee", biases=_ATTENTION), interleaved=True),
    "cohere2": Architecture(_decoder("cohere2", more=_cohere2), eps="layer_norm_eps"),
    "command-r": Architecture(_decoder("cohere", more=_command), eps="layer_norm_eps"),
    "ernie4_5": Architecture(_decoder("ernie4_5", biases={"use_bias": "attn_q"})),
    "exaone": Architecture(_llama),
    "exaone4": Architecture(_decoder("exaone4", more=_exaone4), names.OLMO2),
    "gemma": Architecture(_decoder("gemma")),
    "glm4": Architecture(_decoder("glm4", biases=_ATTENTION, partial=True), names.GLM4, partial=True),
    "granite": Architecture(_decoder("granite", biases=_ATTENTION, more=mixtures.granite), interleaved=True),
    **{name: Architecture(_llama, interleaved=True) for name in ("internlm2", "xverse", "mistral3")},
    "baichuan": Architecture(_baichuan, interleaved=True), "pangu-embedded": Architecture(_llama),
    "minicpm": Architecture(_decoder("granite", more=_minicpm), interleaved=True),
    "granitemoe": Architecture(
        _decoder("granitemoe", biases=_ATTENTION, more=mixtures.granite_experts), names.experts("block_sparse_moe"),
        interleaved=True, experts=True,
    ),
    "deepseek2": Architecture(_deepseek2, names.DEEPSEEK2, partial=True, experts=True, latent=True, foretells=True),
    "glm4moe": Architecture(mixtures.glm4_moe, names.GLM4_MOE, partial=True, experts=True, foretells=True),
    "llama4": Architecture(mixtures.llama4, names.experts("feed_forward", "feed_forward"), experts=True),
    "lfm2": Architecture(_decoder("lfm2", more=_lfm2), names.LFM2, hybrid=True),
    "hunyuan-dense": Architecture(_decoder("hunyuan_v1_dense", biases=_ATTENTION), names.HUNYUAN),
    "gpt-oss": Architecture(mixtures.gpt_oss, names.GPT_OSS, experts=True),
    "gpt2": Architecture(older.gpt2, names.GPT2, eps="layer_norm_epsilon", partial=True),
    "gptj": Architecture(older.gptj, names.GPTJ, eps="layer_norm_epsilon", partial=True),
    "mpt": Architecture(older.mpt, names.MPT, eps="layer_norm_epsilon", partial=True),
    "starcoder": Architecture(older.starcoder, names.GPT2, eps="layer_norm_epsilon", partial=True),
    "gptneox": Architecture(older.gpt_neox, names.GPT_NEOX, eps="layer_norm_eps", partial=True),
    "bloom": Architecture(older.bloom, names.BLOOM, eps="layer_norm_epsilon", partial=True),
    "falcon": Architecture(
        older.falcon, names.BLOOM, eps="layer_norm_epsilon", partial=True, other=("attn_norm_2", names.FALCON_40B)
    ),
    "nemotron": Architecture(_decoder("nemotron", biases=_ATTENTION, partial=True), eps="norm_eps", partial=True),
    "olmo": Architecture(_decoder("olmo", more=_olmo), interleaved=True, eps="eps"),
    "olmo2": Architecture(_olmo2, names.OLMO2),
    "olmoe": Architecture(_decoder("olmoe", more=mixtures.mixture), names.experts("mlp"), experts=True),
    "phi2": Architecture(_decoder("phi", partial=True, more=_phi2), names.PHI2, eps="layer_norm_eps", partial=True),
    "phi3": Architecture(_decoder("phi3", partial=True, window=True), names.PHI3, partial=True),
    "qwen2moe": Architecture(_decoder("qwen2_moe", more=mixtures.mixture), names.experts("mlp"), experts=True),
    "qwen3moe": Architecture(_decoder("qwen3_moe", more=mixtures.mixture), names.experts("mlp"), experts=True),
    "qwen2vl": Architecture(_qwen_that_sees("qwen2")), "qwen3vl": Architecture(_qwen_that_sees("qwen3")),
    "qwen3vlmoe": Architecture(_qwen_that_sees("qwen3_moe"), names.experts("mlp"), experts=True),
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
