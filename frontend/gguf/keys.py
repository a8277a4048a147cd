"""The keys of a GGUF file's metadata, and what several architectures say alike: how positions turn, which layers slide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from wasat.frontend.weights.gguf import Gguf

from ..fields import brief
from ..models.config import Fields

_WITHOUT_EFFECT = frozenset({
    "name", "vocab_size", "rope.dimension_count", "rope.dimension_count_swa", "tensor_data_layout",
    "attention.causal", "expert_count", "expert_used_count", "attention.value_length", "attention.value_length_swa",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "attention.sliding_window_pattern", "attention.shared_kv_layers", "pooling_type", "dense_2_feat_in", "dense_2_feat_out",
    "dense_3_feat_in", "dense_3_feat_out", "classifier.output_labels", "classifier.pooling_type",
})  # fmt: skip
"""Keys that are checked where they stand for more than they say, or say nothing about the numbers."""
FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
"""Of texts within the context that a model first was trained on, and of longer ones."""


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


def scaling(keys: Keys) -> dict[str, Any]:
    """``rope_parameters`` without the base."""
    kind = keys.take("rope.scaling.type", str, "linear" if keys.has("rope.scale_linear") else "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    trained = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
    if FACTORS[0] in keys.tensors or FACTORS[1] in keys.tensors:
        return _two_ranges(keys, kind, factor, trained)
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


def _two_ranges(keys: Keys, kind: str, factor: float, trained: int) -> dict[str, Any]:
    """LongRoPE: a factor for each frequency, of texts within the first context and of longer ones."""
    if kind not in ("none", "longrope") or factor != 1:
        raise keys.fail(f"{keys.arch}.rope.scaling.type is {kind!r} beside {' and '.join(FACTORS)}, which are longrope's")
    found = {}
    for name, field in zip(FACTORS, ("short_factor", "long_factor")):
        if name not in keys.tensors:
            raise keys.fail(f"the tensor {name} is missing: only one of {' and '.join(FACTORS)} is there")
        x = keys.tensors[name].load()
        if not isinstance(x, np.ndarray) or x.ndim != 1 or not np.isfinite(x).all():
            raise keys.fail(f"{name} is {keys.tensors[name].type}: a list of finite numbers would have to be there")
        found[field] = x.astype(float).tolist()
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    return {"rope_type": "longrope", "original_max_position_embeddings": trained, "attention_factor": attention, **found}


def slides(keys: Keys, layers: int, period: int, first: bool = False) -> list[bool]:
    """Which layers slide: in each ``period`` all but the last, or but the ``first``."""
    pattern = keys.given.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, np.ndarray) and pattern.dtype == np.bool_ and len(pattern) == layers:
        found: list[bool] = pattern.tolist()
        return found
    if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 1:
        name = f"{keys.arch}.attention.sliding_window_pattern"
        raise keys.fail(f"{name} is {brief(pattern)}; a period, or one entry for each layer")
    return [(i + (not first)) % pattern != 0 for i in range(layers)]


def turned(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of a model that may rotate a part of each head."""
    part = keys.count("rope.dimension_count", config["head_dim"])
    theta = keys.number("rope.freq_base", 10000.0)
    return {"rope_parameters": {**scaling(keys), "rope_theta": theta, "partial_rotary_factor": part / config["head_dim"]}}


def sections(keys: Keys, config: Mapping[str, Any]) -> None:
    """``rope.dimension_sections`` of models that see: which pairs turn by time, height and width, which are all the position in
    a text; a fourth part, which would not turn in it, is refused."""
    name, pairs = "rope.dimension_sections", config["head_dim"] // 2
    given = keys.take(name, object, None)
    if given is None:
        return
    fits = isinstance(given, np.ndarray) and given.dtype.kind in "iu" and 3 <= len(given) <= 4 and (given >= 0).all()
    if not fits or given[:3].sum() != pairs or given[3:].any():
        raise keys.wrong(name, given, f"the {pairs} pairs of a head by time, height and width")
