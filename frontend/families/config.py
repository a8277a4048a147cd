"""Reads a Hugging Face ``config.json`` strictly: every field is used, known to be without effect, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wasat.frontend import nn
from wasat.ir import WasatError

_MISSING: Any = object()

WITHOUT_EFFECT = frozenset({
    # bookkeeping
    "_name_or_path", "_attn_implementation_autoset", "_from_model_config", "architectures", "auto_map", "dtype",
    "torch_dtype", "model_type", "name_or_path", "transformers_version", "task_specific_params", "finetuning_task",
    # training only
    "attention_dropout", "initializer_range", "problem_type", "id2label", "label2id", "num_labels",
    # what a call returns or keeps, not what it computes
    "cache_implementation", "output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_cache",
    "use_return_dict", "is_decoder", "is_encoder_decoder",
    # generation, read from generation_config.json or by the caller
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "tokenizer_class", "prefix",
})  # fmt: skip
"""Fields that do not change the logits of a forward pass at inference."""

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu": "relu", "sigmoid": "sigmoid", "tanh": "tanh",
}  # fmt: skip


class ConfigError(WasatError):
    """A configuration that is incomplete, contradictory, or asks for what is not implemented."""


class Fields:
    """The fields of one ``config.json``, each to be taken once; ``finish`` refuses what is left."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = dict(config)
        self.where = where
        self._taken: set[str] = set(WITHOUT_EFFECT)

    def fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.where}: {message}")

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = _MISSING) -> Any:
        """The field ``name``, of Python type ``kind``; ``default`` if absent (none given: an error); null is None."""
        self._taken.add(name)
        value = self.config.get(name, default)
        if value is _MISSING:
            raise self.fail(f"{name} is missing; the model cannot be built without it")
        if value is None and (default is None or default is not _MISSING):
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.fail(f"{name} is {value!r}; expected {' or '.join(k.__name__ for k in kinds)}")
        return value

    def size(self, name: str, default: Any = _MISSING) -> int:
        """A positive int."""
        value = self.take(name, int, default)
        if not isinstance(value, int) or value < 1:
            raise self.fail(f"{name} is {value!r}; expected a positive number")
        return value

    def window(self, default: int | None) -> int | None:
        """``sliding_window``: a positive int, or None."""
        value: int | None = self.take("sliding_window", int, default)
        if value is not None and value < 1:
            raise self.fail(f"sliding_window is {value}; expected a positive number or null")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A bool; null is False."""
        return bool(self.take(name, bool, default))

    def activation(self, name: str, default: str) -> str:
        """The name in ``nn.ACTIVATIONS`` of the activation that field ``name`` gives."""
        value = self.take(name, str, None) or default
        if value not in ACTIVATIONS:
            raise self.fail(f"{name} {value!r} is not implemented; there are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refuse(self, name: str, default: Any, why: str) -> None:
        """Refuses ``name`` unless it is absent, null, false or ``default``."""
        self._taken.add(name)
        value = self.config.get(name)
        if value is not None and value is not False and value != default:
            raise self.fail(f"{name} is {value!r}: {why}")

    def finish(self, family: str) -> None:
        """Refuses every field that nothing has taken, unless it is null or false."""
        left = {k: v for k, v in self.config.items() if k not in self._taken and v is not None and v is not False}
        if left:
            fields = "; ".join(f"{k} = {_brief(v)}" for k, v in left.items())
            raise self.fail(
                f"{family} has no meaning for: {fields}. A field that changes the computation must not be ignored; "
                "remove it from config.json if you know that it has no effect"
            )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
        "original_max_position_embeddings",
    ),
}  # fmt: skip


def rope(fields: Fields, where: str, given: Mapping[str, Any], head_dim: int, context: int, theta: float) -> nn.RoPE:
    """The rotary embedding of a ``rope_parameters`` (or ``rope_scaling``) dictionary; ``theta`` is the default base."""
    p = dict(given)
    kind = p.pop("rope_type", None) or p.pop("type", None) or "default"
    p.pop("type", None)
    if kind not in _ROPE_NUMBERS:
        raise fields.fail(f"{where}.rope_type {kind!r} is not implemented; there are {', '.join(_ROPE_NUMBERS)}")
    theta = float(p.pop("rope_theta", None) or theta)
    fraction = p.pop("partial_rotary_factor", None)
    if fraction not in (None, 1, 1.0):
        raise fields.fail(f"{where}.partial_rotary_factor is {fraction!r}: this family rotates whole heads")
    unknown = {k: v for k, v in p.items() if k not in _ROPE_NUMBERS[kind] and v is not None}
    if unknown:
        found = "; ".join(f"{k} = {_brief(v)}" for k, v in unknown.items())
        raise fields.fail(f"{where}: rope_type {kind!r} has no meaning for {found}")
    if kind in ("yarn", "llama3"):
        p.setdefault("original_max_position_embeddings", context)
    try:
        return nn.RoPE(head_dim, theta, {"rope_type": kind, **p})
    except WasatError as e:
        raise fields.fail(f"{where}: {e}") from None


def single_rope(fields: Fields, head_dim: int, context: int) -> nn.RoPE:
    """A model's one rotary embedding: ``rope_parameters``, or ``rope_theta`` and ``rope_scaling`` of older files."""
    theta = fields.take("rope_theta", float, None) or 10000.0
    scaling = fields.take("rope_scaling", dict, None)
    parameters = fields.take("rope_parameters", dict, None)
    fields.refuse("partial_rotary_factor", 1.0, "this family rotates whole heads")
    if parameters and scaling:
        raise fields.fail("both rope_parameters and rope_scaling are given; keep the one that is meant")
    if parameters:
        return rope(fields, "rope_parameters", parameters, head_dim, context, theta)
    return rope(fields, "rope_scaling", scaling or {}, head_dim, context, theta)


def layer_types(fields: Fields, layers: int, default: list[str]) -> list[str]:
    """``layer_types``, one of full_attention and sliding_attention per layer."""
    types = fields.take("layer_types", list, None)
    types = default if types is None else types
    if len(types) != layers:
        raise fields.fail(f"layer_types has {len(types)} entries for {layers} layers")
    for t in types:
        if t not in ("full_attention", "sliding_attention"):
            raise fields.fail(f"layer_types holds {t!r}; only full_attention and sliding_attention are implemented")
    return types
