"""DeepSeek 2 and 3 in GGUF: metadata, and keys and values that newer files have apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from wasat.frontend.weights.gguf import Gguf, GgufTensor
from wasat.ir import DType, QArray, TensorType

if TYPE_CHECKING:
    from .keys import Keys

_GATES = {1: "softmax", 2: "sigmoid"}


def deepseek2(keys: Keys, config: dict[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """``deepseek2``: the second with softmax, the third (R1) with sigmoid shares. ``scaling``: ``rope_parameters`` without the
    base."""
    mla = keys.has("attention.key_length_mla")  # newer files: keys are the latent vector, of one head
    rank, turned = keys.count("attention.kv_lora_rank"), keys.count("rope.dimension_count")
    whole = keys.count("attention.key_length_mla" if mla else "attention.key_length")
    value = keys.count("attention.value_length_mla" if mla else "attention.value_length")
    if whole <= turned:
        raise keys.fail(f"heads have {whole} elements, and {turned} of them are rotated (rope.dimension_count)")
    if mla:
        keys.refuse("attention.key_length", rank + turned, "it is the latent vector's, and what is rotated")
        keys.refuse("attention.value_length", rank, "it is the latent vector's")
    keys.refuse("attention.head_count_kv", 1 if mla else config["num_attention_heads"], "every head has keys of its own")
    del config["head_dim"]
    gate = keys.count("expert_gating_func", 1)
    if gate not in _GATES:
        raise keys.fail(f"{keys.arch}.expert_gating_func is {gate}; there are 1 (softmax) and 2 (sigmoid)")
    latest = _GATES[gate] == "sigmoid"
    more = keys.number("rope.scaling.yarn_log_multiplier", None)
    turn: dict[str, Any] = {**scaling, "rope_theta": keys.number("rope.freq_base", 10000.0)}
    if turn["rope_type"] == "yarn" and more is not None:
        turn |= {"mscale": 10 * more, "mscale_all_dim": 10 * more}
    elif more is not None:
        raise keys.fail(f"{keys.arch}.rope.scaling.yarn_log_multiplier is {more}, and frequencies are not stretched by YaRN")
    count, groups = keys.count("expert_count"), keys.count("expert_group_count", 1)
    best = keys.count("expert_group_used_count", 1)
    found: dict[str, Any] = {
        "model_type": "deepseek_v3" if latest else "deepseek_v2", "kv_lora_rank": rank, "qk_rope_head_dim": turned,
        "qk_nope_head_dim": whole - turned, "v_head_dim": value, "rope_parameters": turn, "n_routed_experts": count,
        "q_lora_rank": keys.count("attention.q_lora_rank") if keys.has("attention.q_lora_rank") else None,
        "num_experts_per_tok": keys.count("expert_used_count"),
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "n_shared_experts": keys.count("expert_shared_count"), "n_group": groups, "topk_group": best,
        "first_k_dense_replace": int(keys.take("leading_dense_block_count", int, 0, least=0)),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
    }  # fmt: skip
    if latest:
        found["norm_topk_prob"] = keys.flag("expert_weights_norm", False)
    else:
        found["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
        keys.refuse("expert_weights_norm", False, "shares of softmax are taken as they are")
    return found


@dataclass(frozen=True)
class Joined:
    """What makes keys and values of the latent vector, f32[heads * (plain + value), rank], of a file that has them apart: keys
    [heads, rank, plain] and values [heads, value, rank]."""

    keys: GgufTensor
    values: GgufTensor
    is_data: ClassVar[bool] = True

    @property
    def type(self) -> TensorType:
        heads, rank, plain = self.keys.shape
        return TensorType(DType.F32, (heads * (plain + self.values.shape[1]), rank))

    def load(self) -> np.ndarray:
        loaded = (self.keys.load(), self.values.load())
        k, v = (np.asarray(x.dense() if isinstance(x, QArray) else x, np.float32) for x in loaded)
        return np.concatenate([k.swapaxes(1, 2), v], 1).reshape(-1, k.shape[1])


def joined(g: Gguf, wanted: Mapping[str, Any]) -> tuple[dict[str, Joined], set[str]]:
    """Parameters of a file that has keys and values apart, and the names of the tensors that they are made of; none where their
    shapes do not fit each other."""
    found, used = dict[str, Joined](), set[str]()
    for name, t in g.tensors.items():
        block, _, part = name.partition(".attn_k_b.")
        other = g.tensors.get(f"{block}.attn_v_b.weight")
        to = f"model.layers.{block.removeprefix('blk.')}.self_attn.kv_b_proj.weight"
        if part != "weight" or other is None or to not in wanted or len(t.shape) != 3 or len(other.shape) != 3:
            continue
        fit = (t.shape[0], t.shape[1]) == (other.shape[0], other.shape[2])
        if fit and (both := Joined(t, other)).type.shape == wanted[to].shape:
            found[to], used = both, used | {name, other.name}
    return found, used
