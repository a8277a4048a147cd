"""Reads a Hugging Face ``config.json`` strictly: every field is used, known to be without effect, or refused."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from wasat.frontend import nn
from wasat.ir import WasatError

_MISSING: Any = object()

MOST_SIZE = 2**24
"""No width, vocabulary or number of heads is larger."""
MOST_LAYERS = 4096
MOST_POSITIONS = 2**31 - 1
"""Of a context or a window."""

WITHOUT_EFFECT = frozenset({
    # bookkeeping
    "_name_or_path", "_attn_implementation_autoset", "_commit_hash", "_from_model_config", "architectures",
    "attn_implementation", "dtype", "is_llama_config", "model_type", "name_or_path", "torch_dtype", "transformers.js_config",
    "transformers_version", "task_specific_params",
    "_model_name_or_path", "_attn_implementation", "_attn_implementation_internal", "_experts_implementation",
    "finetuning_task", "unsloth_fixed", "unsloth_version",
    # training only
    "attention_dropout", "initializer_range", "problem_type", "id2label", "label2id", "num_labels",
    # what a call returns or keeps, or how it is cut into pieces, not what it computes
    "cache_implementation", "chunk_size_feed_forward", "is_decoder", "output_attentions", "output_hidden_states",
    "return_dict", "torchscript", "use_cache", "use_return_dict",
    # generation, read from generation_config.json or by the caller
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id",
    "decoder_start_token_id", "max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "tokenizer_class", "prefix",
})  # fmt: skip
"""Fields that do not change the logits of a forward pass at inference."""

NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False, "attention_bias": False, "is_causal": True, "is_encoder_decoder": False,
    "mlp_bias": False, "pruned_heads": {}, "rope_interleaved": False, "tie_encoder_decoder": False,
    "use_bfloat16": False, "use_mrope": False,
}  # fmt: skip
"""Fields that mean nothing at this one value (where a family does not take them) and are not implemented at any other."""

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu": "relu", "sigmoid": "sigmoid", "tanh": "tanh",
}  # fmt: skip


class ConfigError(WasatError):
    """A configuration that is incomplete, contradictory, or asks for what is not implemented."""


class Fields:
    """The fields of one object of a ``config.json``, each to be taken once; ``finish`` refuses what is left.

    ``prefix``: what all names begin with in the file, where it is left out here.
    """

    def __init__(
        self, config: Mapping[str, Any], where: str, harmless: frozenset[str] = WITHOUT_EFFECT, prefix: str = ""
    ) -> None:
        self.config, self.where, self.prefix = dict(config), where, prefix
        self._taken: set[str] = set(harmless)

    def fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.where}: {message}")

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = _MISSING) -> Any:
        """The field ``name``, of Python type ``kind``; ``default`` if absent (none given: an error). Null is allowed, and
        is None, where ``default`` is None."""
        self._taken.add(name)
        value = self.config.get(name, default)
        if value is _MISSING:
            raise self.fail(f"{self.prefix}{name} is missing; the model cannot be built without it")
        if value is None and default is None:
            return None
        if not is_of(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise self.fail(f"{self.prefix}{name} is {brief(value)}; expected {' or '.join(k.__name__ for k in kinds)}")
        return value

    def size(self, name: str, default: Any = _MISSING, most: int = MOST_SIZE) -> Any:
        """An int from 1 to ``most``; None where ``default`` is None and the field absent or null."""
        value = self.take(name, int, default)
        if value is not None and value < 1:
            raise self.fail(f"{name} is {brief(value)}; expected a positive number")
        if value is not None and value > most:
            raise self.fail(f"{name} is {brief(value)}; at most {most:,} is supported")
        return value

    def number(self, name: str, default: Any = _MISSING) -> Any:
        """A positive finite f32; None where ``default`` is None and the field absent or null."""
        value = self.take(name, (int, float), default)
        if value is not None and not (0 < value < 2**128):
            raise self.fail(f"{self.prefix}{name} is {brief(value)}; expected a positive number")
        return None if value is None else float(value)

    def window(self, default: int) -> int | None:
        """``sliding_window``: a positive int, None for null, ``default`` if absent."""
        absent = "sliding_window" not in self.config
        window: int | None = default if absent else self.size("sliding_window", None, MOST_POSITIONS)
        return window

    def flag(self, name: str, default: bool) -> bool:
        """A bool."""
        value: bool = self.take(name, bool, default)
        return value

    def activation(self, name: str, default: str) -> str:
        """The name in ``nn.ACTIVATIONS`` of the activation that field ``name`` gives."""
        value = self.take(name, str, default)
        if value not in ACTIVATIONS:
            raise self.fail(f"{name} {value!r} is not implemented; there are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refuse(self, name: str, neutral: Any, why: str) -> None:
        """Refuses ``name`` unless it is absent, null or ``neutral``."""
        self._taken.add(name)
        value = self.config.get(name)
        if value is not None and (isinstance(value, np.ndarray) or value != neutral):
            raise self.fail(f"{self.prefix}{name} is {brief(value)}: {why}")

    def ignore(self, *names: str) -> None:
        """Takes fields that have no effect here."""
        self._taken.update(names)

    def finish(self, what: str) -> None:
        """Refuses every field that ``what`` has not taken, unless it is null or at its neutral value."""
        left = {k: v for k, v in self.config.items() if k not in self._taken}
        left = {k: v for k, v in left.items() if (v != NEUTRAL[k] if k in NEUTRAL else v is not None)}
        if left:
            absent = self._taken - self.config.keys()
            fields = "; ".join(f"{k} = {brief(v)}{meant(k, absent, '', ' ({})', 0.85)}" for k, v in left.items())
            raise self.fail(
                f"{what} has no meaning for {fields}. A field that may change the computation is not ignored; "
                "remove it from config.json if you know that it has no effect"
            )


def is_of(value: object, kind: type | tuple[type, ...]) -> bool:
    """Whether a value that a file gives is of Python type ``kind``; a bool is no number."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def as_float(value: Any) -> Any:
    """A whole number where a float is meant as one, an infinity beyond f32; anything else as it is."""
    if not is_of(value, int):
        return value
    return float(value) if abs(value) < 2**128 else math.inf if value > 0 else -math.inf


def meant(name: str, known: Iterable[str], otherwise: str, form: str = "{}", alike: float = 0.6) -> str:
    """For an error about a name that nobody knows: the known one nearest to it, if it is ``alike``."""
    near = difflib.get_close_matches(name, sorted(known), 1, alike)
    return form.format(f"did you mean {near[0]}?") if near else otherwise


def brief(value: Any) -> str:
    """A value in a message: not all of a long one."""
    try:
        text = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings",
    ),
}  # fmt: skip


def rope(fields: Fields, name: str, given: object, head_dim: int, context: int, theta: float | None, default: float) -> nn.RoPE:
    """The rotary embedding of a ``rope_parameters`` (or ``rope_scaling``) dictionary ``given``, found at ``name``.

    ``theta`` is the base that the configuration gives outside the dictionary, ``default`` the family's own.
    """
    if not isinstance(given, dict):
        raise fields.fail(f"{name} is {brief(given)}; expected an object")
    p = Fields(given, f"{fields.where}: {name}", frozenset())
    kind, old = p.take("rope_type", str, None), p.take("type", str, None)
    if kind is not None and old is not None and kind != old:
        raise p.fail(f"rope_type is {kind!r} and type is {old!r}; keep the one that is meant")
    kind = kind or old or "default"
    if kind not in _ROPE_NUMBERS:
        raise p.fail(f"rope_type {kind!r} is not implemented; there are {', '.join(_ROPE_NUMBERS)}")
    own = p.number("rope_theta", None)
    if own is not None and theta is not None and own != theta:
        raise p.fail(f"rope_theta is {own}, and {theta} outside; keep the one that is meant")
    p.refuse("partial_rotary_factor", 1.0, "this family rotates whole heads")
    scaling = {k: p.number(k, None) for k in _ROPE_NUMBERS[kind]}
    if kind == "yarn":
        scaling["truncate"] = p.flag("truncate", True)
    if kind in ("yarn", "llama3") and "original_max_position_embeddings" not in given:
        scaling["original_max_position_embeddings"] = context
    p.finish(f"rope_type {kind!r}")
    try:
        return nn.RoPE(head_dim, own or theta or default, {"rope_type": kind, **scaling})
    except WasatError as e:
        raise p.fail(str(e)) from None


def rope_dictionaries(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """``rope_parameters``, and the ``rope_scaling`` of older files; at most one of them holds anything."""
    parameters, scaling = (fields.take(name, dict, None) or {} for name in ("rope_parameters", "rope_scaling"))
    if parameters and scaling:
        raise fields.fail("both rope_parameters and rope_scaling are given; keep the one that is meant")
    return parameters, scaling


def single_rope(fields: Fields, head_dim: int, context: int) -> nn.RoPE:
    """A model's one rotary embedding: ``rope_parameters``, or ``rope_theta`` and ``rope_scaling`` of older files."""
    theta = fields.number("rope_theta", None)
    fields.refuse("partial_rotary_factor", 1.0, "this family rotates whole heads")
    parameters, scaling = rope_dictionaries(fields)
    name = "rope_parameters" if parameters else "rope_scaling"
    return rope(fields, name, parameters or scaling, head_dim, context, theta, 10000.0)


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


def attention_heads(fields: Fields, optional: bool = False) -> tuple[int, int]:
    """``(num_attention_heads, num_key_value_heads)``; null, or where ``optional`` absent, means as many as queries have."""
    heads = fields.size("num_attention_heads")
    if not optional and "num_key_value_heads" not in fields.config:
        raise fields.fail("num_key_value_heads is missing; the model cannot be built without it")
    groups = fields.size("num_key_value_heads", None) or heads
    if heads % groups:
        raise fields.fail(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    return heads, groups
