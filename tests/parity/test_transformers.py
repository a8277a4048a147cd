"""Random configurations of each family, saved by transformers on the spot: the interpreter's logits equal its own.

Runs where torch and transformers are installed: ``make parity``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rounding import assert_near, bound, spread
from wasat.frontend import FAMILIES, from_pretrained
from wasat.ir import evaluate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SLIDING, FULL = "sliding_attention", "full_attention"


def _rope(rng: np.random.Generator) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 16.0, "beta_slow": 2.0,
         "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.8},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.2},
    ]  # fmt: skip
    return {**kinds[rng.integers(len(kinds))], "rope_theta": float(rng.choice([100.0, 1e4, 1e6]))}


def random_config(family: str, rng: np.random.Generator) -> dict[str, Any]:
    """Keyword arguments of ``AutoConfig.for_model``."""

    def coin() -> bool:
        return bool(rng.integers(2))

    def one_of(*values: int) -> int:
        return int(rng.choice(values))

    layers, groups = one_of(2, 3, 7), one_of(1, 2, 3)
    config: dict[str, Any] = {
        "model_type": family, "vocab_size": one_of(50, 96), "hidden_size": 24 * one_of(1, 2),
        "intermediate_size": one_of(20, 72), "num_hidden_layers": layers, "num_attention_heads": groups * one_of(1, 2),
        "num_key_value_heads": groups, "max_position_embeddings": 128, "rms_norm_eps": 10.0 ** -one_of(2, 5, 6),
        "tie_word_embeddings": coin(), "head_dim": one_of(8, 12, 32), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if family == "gemma3_text":
        types = [SLIDING if coin() else FULL for _ in range(layers)] if coin() else None
        config |= {
            "query_pre_attn_scalar": one_of(4, 10, 24), "sliding_window": one_of(1, 5, 9), "layer_types": types,
            "rope_parameters": {SLIDING: _rope(rng), FULL: _rope(rng)}, "attention_bias": coin(),
            "final_logit_softcapping": 4.0 if coin() else None,
        }  # fmt: skip
        return config
    if family == "gemma2":
        config |= {
            "query_pre_attn_scalar": one_of(4, 10, 24), "sliding_window": one_of(1, 5, 9), "rope_parameters": _rope(rng),
            "attention_bias": coin(), "final_logit_softcapping": 4.0 if coin() else None,
            "attn_logit_softcapping": 2.0 if coin() else None,
        }  # fmt: skip
        return config
    if family in CLASSIC:
        return classic_config(config, rng)
    if family in ("deepseek_v2", "deepseek_v3"):
        config |= {
            "num_key_value_heads": config["num_attention_heads"], "q_lora_rank": 20, "kv_lora_rank": one_of(8, 16),
            "qk_nope_head_dim": one_of(6, 8), "qk_rope_head_dim": 4, "v_head_dim": one_of(6, 10), "n_routed_experts": 8,
            "n_shared_experts": one_of(1, 2), "num_experts_per_tok": one_of(2, 3), "moe_intermediate_size": 12,
            "first_k_dense_replace": one_of(0, 1), "n_group": 4, "topk_group": 2, "rope_parameters": _rope(rng),
        }  # fmt: skip
        if family == "deepseek_v2":
            config["topk_method"] = "group_limited_greedy" if coin() else "greedy"
            config["q_lora_rank"] = 20 if coin() else None
        del config["head_dim"]
        return config
    if family == "gpt_oss":
        types = [SLIDING if coin() else FULL for _ in range(layers)]
        return config | {
            "rope_parameters": _rope(rng), "sliding_window": one_of(1, 5, 9), "layer_types": types, "num_local_experts": 4,
            "num_experts_per_tok": one_of(1, 2), "attention_bias": True,
        }  # fmt: skip
    if family == "glm4_moe":
        return config | {
            "rope_parameters": _rope(rng) | {"partial_rotary_factor": 0.5}, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 12, "n_shared_experts": one_of(1, 2), "n_group": one_of(1, 4), "topk_group": 1,
            "first_k_dense_replace": one_of(0, 1), "use_qk_norm": coin(), "attention_bias": coin(),
            "head_dim": one_of(8, 16, 32),
        }  # fmt: skip
    if family == "llama4_text":
        return config | {
            "rope_parameters": _rope(rng), "num_local_experts": 4, "interleave_moe_layer_step": one_of(1, 2),
            "intermediate_size_mlp": 44, "attention_chunk_size": one_of(5, 16), "floor_scale": one_of(3, 100),
            "no_rope_layer_interval": one_of(2, 4), "use_qk_norm": coin(), "attn_temperature_tuning": coin(),
        }  # fmt: skip
    if family == "lfm2":
        del config["head_dim"]
        config["norm_eps"] = config.pop("rms_norm_eps")
        types = ["conv" if coin() else FULL for _ in range(layers)]
        return config | {
            "rope_parameters": _rope(rng), "layer_types": types, "conv_bias": coin(), "conv_L_cache": one_of(2, 3, 5),
            "block_auto_adjust_ff_dim": coin(), "block_multiple_of": one_of(8, 20),
        }  # fmt: skip
    default = transformers.AutoConfig.for_model(family).to_dict()
    eps = config.pop("rms_norm_eps")
    config |= {name: eps for name in ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon") if name in default}
    rope = _rope(rng)
    if family == "phi3":  # transformers takes longrope alone beside it
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    if default["rope_parameters"].get("partial_rotary_factor", 1.0) != 1.0:  # an even number of every head's elements
        rope["partial_rotary_factor"], config["hidden_size"] = 0.5, 48
    if "head_dim" not in default or family == "helium":  # a head is its part of the width
        config.pop("head_dim")
        if "head_dim" in default:
            config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if family == "phi":  # its head has a bias
        config["tie_word_embeddings"] = False
    if family == "olmo3":
        rope = {SLIDING: {"rope_type": "default", "rope_theta": rope["rope_theta"]}, FULL: rope}
    config |= {"rope_parameters": rope, "hidden_act": str(rng.choice(["silu", "gelu", "gelu_pytorch_tanh", "relu"]))}
    if family == "granitemoeshared":
        config["shared_intermediate_size"] = one_of(0, 20)
    if family in ("llama", "qwen3"):
        config["attention_bias"] = coin()
    if family == "llama":
        config["mlp_bias"] = coin()
    if family == "mistral":
        config["sliding_window"] = one_of(1, 5, 9) if coin() else None
    if family in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": coin(), "sliding_window": one_of(1, 5, 9), "max_window_layers": one_of(0, 1, 9)}
    return config


CLASSIC = ("bloom", "codegen", "falcon", "gpt_bigcode", "gpt2", "gpt_neox", "gptj", "mpt", "opt")


def classic_config(given: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Of families that have sizes under names of their own."""

    def coin() -> bool:
        return bool(rng.integers(2))

    family, layers = given["model_type"], given["num_hidden_layers"]
    heads, width, inner = int(rng.choice([1, 2, 3, 4, 6])), 48, given["intermediate_size"]
    config = {name: given[name] for name in ("model_type", "vocab_size", "bos_token_id", "eos_token_id")}
    usual = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 64}
    tied = {"tie_word_embeddings": given["tie_word_embeddings"]}
    if family == "bloom":
        return config | {"hidden_size": width, "n_layer": layers, "n_head": heads} | tied
    if family in ("gpt2", "gpt_bigcode"):
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 64, "n_inner": inner if coin() else None}
        return config | sizes | tied | ({"multi_query": coin()} if family == "gpt_bigcode" else {})
    if family in ("codegen", "gptj"):
        heads = 4 if family == "codegen" else heads
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 64, "n_inner": inner if coin() else None}
        return config | sizes | {"rotary_dim": int(rng.choice([2, 4, 8]))}
    if family == "mpt":
        attention = {"clip_qkv": 1.5 if coin() else None, "softmax_scale": 0.3 if coin() else None}
        return config | {"d_model": width, "n_layers": layers, "n_heads": heads, "max_seq_len": 64, "attn_config": attention}
    if family == "opt":
        sizes = {"ffn_dim": inner, "word_embed_proj_dim": width, "enable_bias": coin()}
        return config | usual | sizes | {"pad_token_id": 1} | tied
    rope = {"rope_parameters": _rope(rng)}
    if family == "gpt_neox":
        rope["rope_parameters"]["partial_rotary_factor"] = float(rng.choice([0.5, 1.0]))
        config |= {"intermediate_size": inner, "use_parallel_residual": coin(), "attention_bias": coin()}
        return config | usual | rope | tied
    forms: list[dict[str, Any]] = [
        {"new_decoder_architecture": True, "num_kv_heads": heads // 2 if heads % 2 == 0 else heads, "ffn_hidden_size": inner},
        {"multi_query": True, "parallel_attn": True},
        {"multi_query": False, "parallel_attn": False, "alibi": True},
        {"multi_query": coin(), "parallel_attn": coin()},
    ]  # fmt: skip
    return config | usual | rope | tied | forms[rng.integers(len(forms))] | {"bias": coin()}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(tmp_path: Path, family: str, seed: int) -> None:
    rng = np.random.default_rng([list(FAMILIES).index(family), seed])
    config = transformers.AutoConfig.for_model(**random_config(family, rng), dtype="float32")
    way = "sdpa" if getattr(config, "alibi", False) else "eager"  # in which transformers adds Falcon's ALiBi twice
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=way).eval()
    noise = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        size = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.3
        p.data = size * torch.randn(p.shape, generator=noise) + float(p.ndim == 1 and not family.startswith("gemma"))
    model.save_pretrained(tmp_path, max_shard_size=["1GB", "20KB"][seed % 2])
    ids = rng.integers(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        want = model(torch.from_numpy(ids)).logits.numpy()
    program = from_pretrained(tmp_path)
    params = {k: p.load() for k, p in program.params.items()}
    got = evaluate(program["forward"], {"tokens": ids}, params)[0]
    assert_near(got, want, bound(want, spread(program["forward"], {"tokens": ids}, params)[0]))
