"""GGUF files of many architectures, written as llama.cpp's converter writes them: the logits are those of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_files as families
import numpy as np
import pytest

gguf: Any = pytest.importorskip("gguf")

import gguf_files as files
from wasat.frontend import CheckpointError, ConfigError
from wasat.frontend.gguf import from_gguf
from wasat.frontend.gguf.fused import apart
from wasat.frontend.gguf.metadata import ARCHITECTURES
from wasat.frontend.weights.gguf import read_gguf
from wasat.ir import QArray, evaluate

LAYER, RMS = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"
WIDE = {"embedding_length": 48, "feed_forward_length": 192}
GROUPED = ("bloom", "falcon", "gptneox")
"""Of which the converter brings queries, keys and values of all heads together."""
MLA = {
    "attention.kv_lora_rank": 16, "rope.dimension_count": 4, "expert_count": 8, "expert_used_count": 3,
    "expert_shared_count": 2, "expert_feed_forward_length": 12, "leading_dense_block_count": 1,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("arcee", {}),
    "cohere": ("command-r", {LAYER: 1e-5, "logit_scale": 0.5, "rope.scaling.type": "none"}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {"attention.sliding_window": 6, "attention.sliding_window_pattern": [True, False, True]}),
    "bloom": ("bloom", {LAYER: 1e-5, "attention.head_count": 6, "attention.head_count_kv": 6, "rope.freq_base": None, **WIDE}),
    "falcon": ("falcon", {LAYER: 1e-5, "tensor_data_layout": "jploski"}),
    "falcon_7b": ("falcon", {LAYER: 1e-5, "attention.head_count_kv": 1, "feed_forward_length": 128}),
    "gpt2": ("gpt2", {LAYER: 1e-5, "context_length": 64, "rope.freq_base": None}),
    "gpt_neox": ("gptneox", {LAYER: 1e-5, "rope.dimension_count": 4}),
    "gpt_neox_serial": ("gptneox", {LAYER: 1e-5, "use_parallel_residual": False}),
    "gpt_oss": ("gpt-oss", {
        "attention.sliding_window": 6, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 40,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 0.5,
    }),
    "gemma": ("gemma", {RMS: 1e-6}),
    "glm": ("chatglm", {RMS: 1.5625e-7, "rope.dimension_count": 8}),
    "glm4": ("glm4", {RMS: 1.5625e-7, "rope.dimension_count": 8}),
    "granite": ("granite", {
        RMS: 1e-6, "attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.7, "logit_scale": 2.0,
    }),
    "glm4_moe": ("glm4moe", {
        "attention.head_count_kv": 2, "rope.dimension_count": 8, "expert_count": 8, "expert_used_count": 3,
        "expert_shared_count": 2, "expert_feed_forward_length": 12, "leading_dense_block_count": 1, "expert_group_count": 4,
        "expert_group_used_count": 2, "expert_gating_func": 2, "expert_weights_scale": 1.5, "expert_weights_norm": True,
        "nextn_predict_layers": 1, "block_count": 4,
    }),
    "gptj": ("gptj", {LAYER: 1e-5, "rope.dimension_count": 4, "rope.freq_base": None, "feed_forward_length": 128}),
    "gpt_bigcode": ("starcoder", {LAYER: 1e-5, "attention.head_count_kv": 1, "context_length": 64, "rope.freq_base": None}),
    "llama4_published": ("llama4", {
        "feed_forward_length": 44, "expert_feed_forward_length": 40, "expert_count": 4, "expert_used_count": 1,
        "interleave_moe_layer_step": 2,
    }),
    "exaone": ("exaone", {RMS: 1e-6}), "internlm2": ("internlm2", {RMS: 1e-6}), "mistral3": ("mistral3", {RMS: 1e-6}),
    "baichuan": ("baichuan", {RMS: 1e-6}), "pangu": ("pangu-embedded", {RMS: 1e-6}),
    "xverse": ("xverse", {RMS: 1e-6}),
    "minicpm": ("minicpm", {RMS: 1e-6, "embedding_scale": 3.0, "residual_scale": 0.7, "logit_scale": 2.0}),
    "mpt_published": ("mpt", {
        LAYER: 1e-5, "attention.max_alibi_bias": 8.0, "rope.freq_base": None, "feed_forward_length": 128,
    }),
    "cohere2": ("cohere2", {
        LAYER: 1e-5, "logit_scale": 0.5, "rope.scaling.type": "none", "attention.sliding_window": 6,
        "attention.sliding_window_pattern": 2,
    }),
    "granitemoe": ("granitemoe", {
        RMS: 1e-6, "attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.7, "logit_scale": 2.0, "expert_count": 4,
        "expert_used_count": 2,
    }),
    "granitemoeshared": ("granitemoe", {
        RMS: 1e-6, "attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.7, "logit_scale": 2.0, "expert_count": 4,
        "expert_used_count": 2, "expert_shared_feed_forward_length": 28,
    }),
    "lfm2": ("lfm2", {"attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3}),
    "lfm2_older": ("lfm2", {"attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 4, "feed_forward_length": 36}),
    "deepseek_v2": ("deepseek2", {
        **MLA, RMS: 1e-6, "expert_count": 4, "expert_weights_scale": 1.5, "attention.head_count_kv": 4,
        "attention.key_length": 10, "attention.value_length": 10,
    }),
    "deepseek_v2_groups": ("deepseek2", {
        **MLA, RMS: 1e-6, "attention.q_lora_rank": 20, "expert_group_count": 4, "expert_group_used_count": 2,
        "attention.head_count_kv": 4, "attention.key_length": 10, "attention.value_length": 10,
    }),
    "deepseek_v3_even": ("deepseek2", {
        **MLA, RMS: 1e-6, "attention.q_lora_rank": 20, "attention.head_count_kv": 1, "attention.key_length": 20,
        "attention.value_length": 16, "attention.key_length_mla": 10, "attention.value_length_mla": 10,
        "expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.5, "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32, "rope.scaling.yarn_log_multiplier": 0.08,
        "rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 0.5,
    }),
    "hunyuan_v1_dense": ("hunyuan-dense", {}),
    "mixtral": ("llama", {"expert_count": 4, "expert_used_count": 2}),
    "nemotron": ("nemotron", {LAYER: 1e-5, RMS: 1e-5, "rope.dimension_count": 8, "rope.scaling.type": "none"}),
    "olmo": ("olmo", {LAYER: 1e-5, "attention.clamp_kqv": 1.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo2", {
        "attention.sliding_window": 6, "attention.sliding_window_pattern": [True, False], "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32, "rope.freq_base_swa": 500.0,
    }),
    "olmoe": ("olmoe", {"expert_count": 4, "expert_used_count": 2}),
    "phi": ("phi2", {LAYER: 1e-5, "rope.dimension_count": 4, "feed_forward_length": 128}),
    "phi3": ("phi3", {"attention.sliding_window": 6, "rope.dimension_count": 8, "rope.scaling.original_context_length": 4096}),
    "qwen2_moe": ("qwen2moe", {
        RMS: 1e-6, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24,
        "expert_shared_feed_forward_length": 28,
    }),
    "qwen3_moe": ("qwen3moe", {RMS: 1e-6, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24}),
    "qwen2vl": ("qwen2vl", {RMS: 1e-6, "rope.dimension_sections": [1, 1, 2, 0]}),
    "qwen3vl": ("qwen3vl", {RMS: 1e-6, "rope.dimension_sections": [3, 3, 2, 0], "n_deepstack_layers": 3}),
    "qwen3vlmoe": ("qwen3vlmoe", {
        RMS: 1e-6, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 24,
        "rope.dimension_sections": [3, 3, 2, 0], "n_deepstack_layers": 3,
    }),
    "seed_oss": ("seed_oss", {RMS: 1e-6}),
    "smollm3": ("smollm3", {RMS: 1e-6}),
    "stablelm": ("stablelm", {LAYER: 1e-5, "rope.dimension_count": 4, "use_parallel_residual": False}),
    "stablelm_parallel": ("stablelm", {LAYER: 1e-5, "rope.dimension_count": 4, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {LAYER: 1e-5, "attention.sliding_window": 6}),
}  # fmt: skip
"""Case of tests/golden/families -> the architecture, and its keys beyond those of all."""
LONGROPE = ("phi3", {
    "rope.dimension_count": 8, "rope.scaling.original_context_length": 16,
    "rope.scaling.attn_factor": (1 + np.log(8) / np.log(16)) ** 0.5,
})  # fmt: skip
LIKE = {
    "minicpm": "granite_plain",
    **dict.fromkeys(("baichuan", "exaone", "internlm2", "mistral3", "pangu", "xverse"), "llama_plain"),
    "qwen2vl": "qwen2_plain", "qwen3vl": "qwen3_plain", "qwen3vlmoe": "qwen3_moe",
}  # fmt: skip
"""Cases whose logits are another one's."""
PERMUTED = (
    "arcee", "baichuan", "granite", "granitemoe", "internlm2", "llama", "minicpm", "mistral3", "olmo", "smollm3", "xverse",
)  # fmt: skip
"""Whose queries and keys the converter puts in the order of neighbouring pairs."""


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def tensors(name: str, arch: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors by the names of the gguf package, experts in stacks."""
    layers = config.get("num_hidden_layers") or config.get("n_layer") or config["n_layers"]
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), layers)
    whole: dict[str, np.ndarray] = {}
    around = 0.0 if name in ("gemma", "nemotron") else 1.0
    for key, shape in shapes.items():
        x = families.weight(key, shape, around)
        if around == 0 and "norm" in key and key.endswith("weight"):
            x = x + 1
        part = key.split(".")[-2]
        if arch in PERMUTED and part in ("q_proj", "k_proj"):
            x = permuted(x, config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"])
        whole[key] = x
        if arch in GROUPED and "query_key_value" in key:
            heads, groups = config.get("num_attention_heads", config.get("n_head")), config.get("num_kv_heads")
            groups = heads if arch != "falcon" else groups if config["new_decoder_architecture"] else 1
            parts = x.reshape(groups, heads // groups + 2, len(x) // (heads + 2 * groups), *x.shape[1:])
            split = parts[:, :-2], parts[:, -2], parts[:, -1]
            whole[key] = np.concatenate([p.reshape(-1, *x.shape[1:]) for p in split])
        if arch == "gpt2" and ".c_" in key and x.ndim > 1:
            whole[key] = x.T
        if key.endswith("conv.conv.weight"):
            whole[key] = x[:, 0]
        if arch == "llama4" and "experts." in key:
            y = np.ascontiguousarray(whole.pop(key).swapaxes(1, 2))
            if "gate_up" in key:
                for part, z in zip(("gate", "up"), np.split(y, 2, 1)):
                    whole[key.replace("gate_up", part) + ".weight"] = np.ascontiguousarray(z)
            else:
                whole[f"{key}.weight"] = y
        if ".shared_mlp.input_linear" in key:  # gate and up, which gguf calls after other models
            for part, y in zip(("gate", "up"), np.split(whole.pop(key), 2)):
                to = f"model.layers.{key.split('.')[2]}.mlp.shared_expert.{part}_proj.weight"
                whole[to] = np.ascontiguousarray(y)
        elif ".shared_mlp.output_linear" in key:
            whole[f"model.layers.{key.split('.')[2]}.mlp.shared_expert.down_proj.weight"] = whole.pop(key)
        elif arch == "granitemoe" and ".input_linear" in key:
            halves = zip(("experts.w1", "experts.w3"), np.split(whole.pop(key), 2, 1))
            whole |= {key.replace("input_linear", part): np.ascontiguousarray(y) for part, y in halves}
        elif arch == "granitemoe" and ".output_linear" in key:
            whole[key.replace("output_linear", "experts.w2")] = whole.pop(key)
        if name == "deepseek_v3_even" and "kv_b_proj" in key:  # as newer files have it: apart, keys the other way round
            k, v = np.split(whole.pop(key).reshape(4, 16, 16), [6], 1)
            whole[key.replace("kv_b", "k_b")] = np.ascontiguousarray(k.swapaxes(1, 2))
            whole[key.replace("kv_b", "v_b")] = np.ascontiguousarray(v)
        if key.endswith("correction_bias"):
            whole[key.replace("_bias", ".bias")] = whole.pop(key)
        if "sinks" in key:
            whole[f"{key}.weight"] = whole.pop(key)
        if arch == "gpt-oss" and "experts" in key:
            y = whole.pop(key) if key.endswith("bias") else whole.pop(key).swapaxes(1, 2)
            to, kind = key.removesuffix("_bias"), "bias" if key.endswith("bias") else "weight"
            each = {to: y} if "down" in key else {
                to.replace("gate_up", part): np.ascontiguousarray(y[:, i::2]) for i, part in enumerate(("gate", "up"))
            }  # fmt: skip
            whole |= {f"{name}.{kind}": z for name, z in each.items()}
    count = 1 + max((int(k.split(".experts.")[1].split(".")[0]) for k in whole if re.search(r"\.experts\.\d", k)), default=3)
    experts = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
    found = {}
    for key in whole:
        if (m := experts.match(key)) is None:
            known = key.removeprefix("transformer.") if arch == "bloom" else key
            found[names.get_name(known, try_suffixes=(".weight", ".bias"))] = whole[key]
        elif m[2] == "0":
            stack = np.stack([whole[f"{m[1]}.{i}.{m[3]}.weight"] for i in range(count)])
            found[names.get_name(f"{m[1]}.{m[3]}.weight", try_suffixes=(".weight",))] = stack
    assert None not in found
    return found


def written(
    name: str, path: Path, kinds: Callable[[str], str] = lambda name: "F32", beside: dict[str, np.ndarray] | None = None,
    only: dict[str, np.ndarray] | None = None, **more: Any,
) -> Path:  # fmt: skip
    arch, keys = CASES.get(name) or LONGROPE
    config, shapes, _, _ = golden(name)
    head = config.get("head_dim") or 8
    groups = config.get("num_key_value_heads", config.get("num_kv_heads", 4))
    given = {
        "block_count": config.get("num_hidden_layers", config.get("n_layer", 2)), "embedding_length": 32,
        "feed_forward_length": 40, "rope.freq_base": 500.0, "attention.head_count_kv": groups, "attention.key_length": head,
        "attention.value_length": head, RMS: 1e-5, **keys, **more,
    }  # fmt: skip
    given = {k: v for k, v in given.items() if v is not None}
    absent = (RMS,) if LAYER in keys and RMS not in keys else ()
    tokens = {
        "tokens": [*files.byte_vocabulary()[0][:46], '!"', "<|end|>"], "merges": ['! "'], "token_type": [1] * 47 + [3],
        "eos_token_id": 47,
    }  # fmt: skip
    found = (tensors(name, arch, config, shapes) if only is None else only) | (beside or {})
    files.write(path / "m.gguf", arch, keys=given, tokens=tokens, tensors=found, without=absent, kinds=kinds)
    return path / "m.gguf"


def golden(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], np.ndarray, np.ndarray]:
    return families.golden(LIKE.get(name, name))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    program = from_gguf(written(name, tmp_path))
    _, _, ids, logits = golden(name)
    params = {k: p.load() for k, p in program.params.items()}
    found = evaluate(program["forward"], {"tokens": ids}, params)[0]
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=2e-5)  # their spread is 0.6 to 3.7


@pytest.mark.parametrize("name, kind", [("glm", "F32"), ("qwen2vl", "Q8_0"), ("internlm2", "Q5_0"), ("arcee", "F16")])
def test_queries_keys_and_values_of_one_tensor(name: str, kind: str, tmp_path: Path) -> None:
    """Are rows of it, in its format: the program is that of the file that has them apart."""
    (tmp_path / "fused").mkdir()
    arch = CASES[name][0]
    config, shapes, _, _ = golden(name)
    given = tensors(name, arch, config, shapes)
    fused = {k: x for k, x in given.items() if ".attn_" not in k or "output" in k or "norm" in k}
    for i in range(config["num_hidden_layers"]):
        for part in ("weight", "bias") if f"blk.{i}.attn_q.bias" in given else ("weight",):
            fused[f"blk.{i}.attn_qkv.{part}"] = np.concatenate([given[f"blk.{i}.attn_{x}.{part}"] for x in "qkv"])
    kinds = (lambda key: kind if "attn_" in key and "output" not in key else "F32")
    whole = from_gguf(written(name, tmp_path, kinds))
    one = from_gguf(written(name, tmp_path / "fused", kinds, only=fused))
    assert str(one["forward"]) == str(whole["forward"])
    assert list(one.params) == list(whole.params)
    for key, p in whole.params.items():
        x, y = one.params[key].load(), p.load()
        assert x.type == y.type if isinstance(y, QArray) else x.dtype == y.dtype
        dense = [z.dense() if isinstance(z, QArray) else z for z in (x, y)]
        np.testing.assert_array_equal(*dense, strict=True)


def test_rows_that_are_no_queries_keys_and_values_are_refused(tmp_path: Path) -> None:
    given = tensors("glm", "chatglm", *golden("glm")[:2])
    fused = {k: x for k, x in given.items() if not k.startswith(("blk.0.attn_q.", "blk.0.attn_k.", "blk.0.attn_v."))}
    for rows in (64, 97, 40):
        odd = fused | {"blk.0.attn_qkv.weight": np.zeros((rows, 32), np.float32)}
        with pytest.raises(CheckpointError, match=rf"unexpected: blk\.0\.attn_qkv\.weight F32\[{rows}, 32\]"):
            from_gguf(written("glm", tmp_path, only=odd))


def test_vectors_in_blocks_are_not_cut(tmp_path: Path) -> None:
    """A block of 32 elements may be of queries and keys."""
    g = read_gguf(written("glm", tmp_path))
    out = g.tensors["blk.0.attn_output.weight"]
    for kind, left in ((0, False), (1, False), (8, True)):  # F32, F16, Q8_0
        t = replace(out, name="blk.0.attn_qkv.bias", kind=kind, shape=(out.shape[-1] + 64,))
        assert (t.name in apart(replace(g, tensors={out.name: out, t.name: t})).tensors) == left


def test_longrope_has_factors_of_long_texts_for_a_long_context(tmp_path: Path) -> None:
    """As llama.cpp has it: the context that is asked for chooses, for all texts."""
    config, _, ids, logits = families.golden("phi3_longrope_long")
    given = {k: np.array(config["rope_parameters"][f"{k}_factor"], np.float32) for k in ("short", "long")}
    two = {f"rope_factors_{k}.weight": x for k, x in given.items()}
    path = written("phi3_longrope_long", tmp_path, beside=two)
    program = from_gguf(path, context=32)
    assert program.interface.context == 32
    params = {k: p.load() for k, p in program.params.items()}
    found = evaluate(program["forward"], {"tokens": ids}, params)[0]
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=2e-5)
    short = from_gguf(path)
    assert short.interface.context == 16
    assert np.abs(evaluate(short["forward"], {"tokens": ids}, params)[0] - logits).max() > 0.1
    for context in (0, 999):
        with pytest.raises(ConfigError, match=f"context is {context}; the model takes 1 to "):
            from_gguf(path, context=context)
    (tmp_path / "one").mkdir()
    one = written("phi3_longrope_long", tmp_path / "one", beside={"rope_factors_long.weight": given["long"]})
    with pytest.raises(ConfigError, match=r"the tensor rope_factors_short\.weight is missing"):
        from_gguf(one)


def test_every_architecture_of_a_decoder_is_here() -> None:
    elsewhere = {"llama", "qwen2", "qwen3", "gemma2", "gemma3"}  # tests/frontend/test_gguf.py
    here = {arch for arch, _ in CASES.values()} | elsewhere
    assert here == {name for name, a in ARCHITECTURES.items() if not a.embeds}


@pytest.mark.parametrize("name, keys, message", [
    ("granite", {"expert_count": 4}, "expert_count is 4: mixtures of experts are not read of this architecture"),
    ("qwen3_moe", {"expert_weights_scale": 2.5}, "expert_weights_scale is 2.5"),
    ("qwen2_moe", {"expert_weights_norm": True}, "expert_weights_norm is True"),
    ("mixtral", {"expert_used_count": 9}, "num_experts_per_tok is 9, and there are 4 experts"),
    ("mixtral", {"attention.sliding_window": 6}, "a mixture with windows is not read"),
    ("olmo", {"attention.layer_norm_epsilon": 1e-6}, "OLMo's is fixed"),
    ("olmo2", {"rope.freq_base_swa": 5e3}, "no layer slides"),
    ("glm4", {"rope.dimension_count": 32}, "partial_rotary_factor"),
    ("smollm3", {"rope.dimension_count": 4}, "all of them are rotated"),
    ("phi3", {"attention.scale": 0.5}, "attention.scale"),
    ("gpt2", {"attention.head_count_kv": 2}, "attention.head_count_kv = 2 must be as many as there are heads"),
    ("bloom", {"feed_forward_length": 100}, "feed_forward_length = 100 must be four times the width"),
    ("bloom", {"attention.max_alibi_bias": 4.0}, "max_alibi_bias"),
    ("falcon", {"rope.dimension_count": 4}, "all of a head is rotated"),
    ("gpt_neox", {"attention.key_length": 16, "attention.value_length": 16}, "heads share the width"),
    ("deepseek_v2", {"attention.head_count_kv": 2}, "every head has keys of its own"),
    ("deepseek_v2", {"attention.key_length": 4}, "heads have 4 elements, and 4 of them are rotated"),
    ("deepseek_v2", {"expert_gating_func": 3}, "there are 1 (softmax) and 2 (sigmoid)"),
    ("deepseek_v2", {"rope.scaling.yarn_log_multiplier": 0.1}, "are not stretched by YaRN"),
    ("deepseek_v3_even", {"attention.key_length": 24}, "it is the latent vector's, and what is rotated"),
    ("deepseek_v3_even", {"nextn_predict_layers": 2}, "nextn_predict_layers = 2 must be at most 1"),
    ("glm4_moe", {"expert_gating_func": 1}, "expert_gating_func is 1"),
    ("glm4_moe", {"rope.dimension_sections": [1, 1, 2, 0]}, "rope.dimension_sections"),
    ("qwen2vl", {"rope.dimension_sections": [1, 1, 1, 1]}, "rope.dimension_sections"),
    ("qwen3vl", {"rope.dimension_sections": [4, 2, 1, 0]}, "rope.dimension_sections"),
    ("qwen3vl", {"rope.dimension_sections": 8}, "must be the 8 pairs of a head by time, height and width"),
    ("llama4_published", {"attention.sliding_window": 0}, "layers that all see everything"),
    ("mpt_published", {"attention.max_alibi_bias": 0.0}, "MPT without ALiBi is not read"),
    ("mpt_published", {"attention.max_alibi_bias": 4.0}, "attention.max_alibi_bias is 4.0"),
    ("gptj", {"rope.dimension_count": 5}, "rotary_dim is 5"),
    ("gptj", {"rope.freq_base": 500.0}, "rope.freq_base is 500.0"),
    ("gpt_bigcode", {"attention.head_count_kv": 2}, "1 or as many as there are heads"),
    ("minicpm", {"logit_scale": None}, "convert the model again"),
    ("baichuan", {"block_count": 40}, "block_count is 40, and the file has"),
    ("mistral3", {"attention.temperature_scale": 0.1}, "attention.temperature_scale"),
    ("cohere2", {"rope.freq_base_swa": 5e3}, "only layers that slide are rotated"),
    ("granitemoe", {"expert_shared_feed_forward_length": 8}, "0.block_sparse_moe.shared_expert.gate_proj.weight f32[8, 32]"),
    ("lfm2", {"attention.head_count_kv": [0, 2, 1]}, "one positive integer"),
    ("lfm2", {"shortconv.l_cache": 5}, "misshaped: blk.0.shortconv.conv.weight is [32, 3]"),
    ("gpt_oss", {"expert_used_count": 5}, "num_experts_per_tok is 5, and there are 4 experts"),
])  # fmt: skip
def test_refused_by_name(name: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, ConfigError)) as e:
        from_gguf(written(name, tmp_path, **keys))
    assert message in str(e.value)


@pytest.mark.parametrize("case, kind", [("mixtral", "Q5_0"), ("gpt_oss", "MXFP4")])
def test_experts_stay_as_they_are_stored(case: str, kind: str, tmp_path: Path) -> None:
    """Stacks of matrices in blocks are read as they are; the logits are those of the numbers that they stand for."""
    stacks = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
    program = from_gguf(written(case, tmp_path, kinds=lambda name: kind if name.endswith(stacks) else "F32"))
    ids = families.golden(case)[2]
    (tmp_path / "plain").mkdir()
    plain = from_gguf(written(case, tmp_path / "plain"))
    params = {k: p.load() for k, p in plain.params.items()}
    kept = {k: p.load() for k, p in program.params.items()}
    for name, x in kept.items():
        if name.endswith(("block_sparse_moe.gate_proj", "block_sparse_moe.up_proj", "mlp.gate_proj", "mlp.up_proj")):
            assert isinstance(x, QArray)
            assert str(x.type) == f"{kind.lower()}[4, 40, 32]"
            assert not np.array_equal(x.dense(), params[name])
            # MXFP4 has no number between 4 and 6 scales: half of that step is a sixth of the largest in a block
            np.testing.assert_allclose(x.dense(), params[name], atol=0.1 if case == "mixtral" else 0.3)
            params[name] = x.dense()
    want = evaluate(plain["forward"], {"tokens": ids}, params)[0]
    np.testing.assert_allclose(evaluate(program["forward"], {"tokens": ids}, kept)[0], want, rtol=1e-4, atol=1e-5)


def test_gpt_4o_cuts_between_cases_and_behind_three_digits() -> None:
    from tokenizers import Regex, pre_tokenizers
    from wasat.frontend.gguf.tokenizer import PRE_TOKENIZERS

    (pattern,) = PRE_TOKENIZERS["gpt-4o"].patterns
    cut = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str
    text = "HelloWorld isn't 12345, I'LL  see\n\n//x"
    pieces = ["Hello", "World", " isn't", " ", "123", "45", ",", " I'LL", " ", " see", "\n\n", "//", "x"]
    assert [p for p, _ in cut(text)] == pieces


def test_baichuan_13b_is_told_by_its_layers(tmp_path: Path) -> None:
    many = {f"blk.{i}.attn_norm.weight": np.ones(32, np.float32) for i in range(2, 40)}
    with pytest.raises(ConfigError, match="whose positions are ALiBi's; 7B is read"):
        from_gguf(written("baichuan", tmp_path, beside=many, block_count=40))
