"""Reads a Hugging Face ``config.json`` strictly: every field is used, known to be without effect, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

from wasat.frontend import fields as strict
from wasat.frontend import nn
from wasat.ir import CheckpointError, WasatError

MOST_SIZE = 2**24
"""No width, vocabulary or number of heads is larger."""
MOST_LAYERS = MOST_EXPERTS = 4096
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
    "relu": "relu", "relu2": "relu2", "sigmoid": "sigmoid", "tanh": "tanh",
}  # fmt: skip


def check_layers(config: Mapping[str, Any], tensors: Callable[[], Sized], where: Path | str) -> None:
    """Raises CheckpointError for many layers, or hundreds of experts, that are more than the ``tensors``, unbuilt.
    A layer has tensors of its own; experts may be stacked in one, and some hundreds of them are soon built."""
    bounds = {"num_hidden_layers": 16, "n_layer": 16, "n_layers": 16, "num_local_experts": 256, "num_experts": 256}
    for name, some in {**bounds, "n_routed_experts": 256}.items():
        if isinstance(n := config.get(name), int) and n > some and n > (found := len(tensors())):
            raise CheckpointError(f"{where}: {name} is {strict.brief(n)}, and the checkpoint has {found:,} tensors")


class Fields(strict.Fields):
    """The fields of one object of a ``config.json``."""

    needed = "; the model cannot be built without it"
    unknown = (
        "{what} has no meaning for {fields}. A field that may change the computation is not ignored; "
        "remove it from config.json if you know that it has no effect"
    )
    harmless, neutral = WITHOUT_EFFECT, NEUTRAL
    served: int | None = None
    """Positions that the program is asked to be made for; None: as many as the model is for."""

    def serve(self, context: int | None) -> None:
        """Asks for a program of ``context`` positions."""
        if context is not None and type(context) is not int:
            raise self.fail(f"context is {context!r}; expected a number of positions")
        self.served = context

    def size(self, name: str, *default: Any, most: int = MOST_SIZE) -> Any:
        """An int from 1 to ``most``; None where ``default`` is None and the field absent or null."""
        return self.take(name, int, *default, least=1, most=most)

    def number(self, name: str, *default: Any) -> Any:
        """A positive finite f32; None where ``default`` is None and the field absent or null."""
        return self.take(name, float, *default, above=0)

    def window(self, default: int) -> int | None:
        """``sliding_window``: a positive int, None for null, ``default`` if absent."""
        absent = "sliding_window" not in self.given
        window: int | None = default if absent else self.size("sliding_window", None, most=MOST_POSITIONS)
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


def refuse_own_code(fields: Fields, stem: str) -> None:
    """Refuses code that a folder brings, but for a copy of classes that are the family's own by name: transformers runs its
    own instead of these, too, if nothing else is asked for."""
    given = fields.given.get("auto_map")
    models = [v for k, v in given.items() if k.startswith("AutoModel")] if isinstance(given, dict) else [given]
    known = all(isinstance(m, str) and m.rpartition(".")[2].startswith(stem) for m in models)
    why = "the folder brings Python code of its own, which is not run; what it computes is unknown"
    fields.refuse("auto_map", given if known else {}, why)


_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings",
    ),
    "longrope": ("factor", "attention_factor", "original_max_position_embeddings"),
}  # fmt: skip


def rope(
    fields: Fields, name: str, given: object, head_dim: int, context: int, theta: float | None, default: float,
    fraction: float | None = None, interleaved: bool = False,
) -> nn.RoPE:  # fmt: skip
    """The rotary embedding of a ``rope_parameters`` (or ``rope_scaling``) dictionary ``given``, found at ``name``.

    ``theta`` is the base that the configuration gives outside the dictionary, ``default`` the family's own.
    ``fraction``: how much of a head a family rotates that may rotate a part, where nothing else is said.
    """
    if not isinstance(given, dict):
        raise fields.wrong(name, given, "an object")
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
    if fraction is None:
        p.refuse("partial_rotary_factor", 1.0, "this family rotates whole heads")
    else:
        fraction = p.take("partial_rotary_factor", float, fraction, above=0, most=1)
    scaling = {k: p.number(k, None) for k in _ROPE_NUMBERS[kind]}
    if kind == "yarn":
        scaling["truncate"] = p.flag("truncate", True)
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            scaling[name] = [p.inside(name, {"at": x}).take("at", float, above=0) for x in p.take(name, list)]
        if scaling["original_max_position_embeddings"] is None:
            raise p.fail("original_max_position_embeddings is missing: where other factors begin is not known")
        scaling["factor"] = scaling["factor"] or context / scaling["original_max_position_embeddings"]
    if kind in ("yarn", "llama3") and "original_max_position_embeddings" not in given:
        scaling["original_max_position_embeddings"] = context
    p.finish(f"rope_type {kind!r}")
    try:
        return nn.RoPE(
            head_dim, own or theta or default, {"rope_type": kind, **scaling}, 1.0 if fraction is None else fraction,
            interleaved, fields.served,
        )  # fmt: skip
    except WasatError as e:
        raise p.fail(str(e)) from None


def rope_dictionaries(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """``rope_parameters``, and the ``rope_scaling`` of older files: one of them holds something, or both say the same."""
    parameters, scaling = (fields.take(name, dict, None) or {} for name in ("rope_parameters", "rope_scaling"))
    alike = {"rope_type" if k == "type" else k: v for k, v in scaling.items()}
    if all(parameters.get(k) == v for k, v in alike.items()):
        scaling = {}
    if parameters and scaling:
        raise fields.fail("both rope_parameters and rope_scaling are given; keep the one that is meant")
    return parameters, scaling


def single_rope(
    fields: Fields, head_dim: int, context: int, default: float = 10000.0, fraction: float | None = None,
    interleaved: bool = False,
) -> nn.RoPE:  # fmt: skip
    """A model's one rotary embedding: ``rope_parameters``, or ``rope_theta`` and ``rope_scaling`` of older files."""
    theta = fields.number("rope_theta", None)
    if fraction is None:
        fields.refuse("partial_rotary_factor", 1.0, "this family rotates whole heads")
    else:
        fraction = fields.take("partial_rotary_factor", float, fraction, above=0, most=1)
    parameters, scaling = rope_dictionaries(fields)
    name = "rope_parameters" if parameters else "rope_scaling"
    return rope(fields, name, parameters or scaling, head_dim, context, theta, default, fraction, interleaved)


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
    if not optional and "num_key_value_heads" not in fields.given:
        raise fields.fail("num_key_value_heads is missing; the model cannot be built without it")
    groups = fields.size("num_key_value_heads", None) or heads
    if heads % groups:
        raise fields.fail(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    return heads, groups
