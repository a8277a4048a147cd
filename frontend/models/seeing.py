"""Folders of models that see: the language model in them, which ``text_config`` describes. What sees is not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from wasat.frontend.fields import ConfigError

SEEING: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text", "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "llama4": {"model_type": "llama4_text"},
    "mistral3": {"model_type": "mistral"},
}  # fmt: skip
"""``model_type`` -> what ``text_config`` does not say where it is the family's default."""
_STARTS = {
    "language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model.",
}  # fmt: skip
"""What names of the language model's tensors begin with, in older and newer folders, and what they are in one of text alone."""
_OTHERS = ("vision_tower.", "vision_model.", "multi_modal_projector.")
_BESIDE = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
"""What the configuration of the whole says of the language model."""
_Tensor = TypeVar("_Tensor")


def text_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration of the language model in a model that sees; of any other model, its own."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in SEEING:
        return dict(config)
    given = config.get("text_config")
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: model_type is {kind!r}, and text_config, which describes its language model, is missing")
    return {**SEEING[kind], **given, **{k: config[k] for k in _BESIDE if config.get(k) is not None}}


def text_tensors(config: Mapping[str, Any], found: Mapping[str, _Tensor]) -> Mapping[str, _Tensor]:
    """The tensors of that language model, by the names that they have where it is alone."""
    if config.get("model_type") not in SEEING:
        return found
    out: dict[str, _Tensor] = {}
    for name, tensor in found.items():
        if not name.removeprefix("model.").startswith(_OTHERS):
            start = next((s for s in _STARTS if name.startswith(s)), "")
            out[f"{_STARTS.get(start, '')}{name.removeprefix(start)}"] = tensor
    return out
