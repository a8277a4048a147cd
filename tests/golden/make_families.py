"""Makes ``families/*.npz``: what transformers makes of tiny random models of many families.

    pip install torch==2.13.0 transformers==5.23.0
    python make_families.py [CASE ...]

A file holds ``said`` (JSON: config, names and shapes of the checkpoint's tensors), ``ids`` i64[1, s], longer than every window,
and ``logits`` f32[1, s, vocab] of eager attention on the CPU. The weights follow from their names (tests/family_files.py).
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent / "families"
sys.path.insert(0, str(HERE.parent.parent))
import family_files

SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"


def rope(**more):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, **more}}


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
PLAIN_YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0, "beta_slow": 0.5,
    "truncate": False,
}  # fmt: skip
YARN = rope(**PLAIN_YARN, mscale=0.7, mscale_all_dim=0.9)
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
}  # fmt: skip
LONG = {  # of a text that is longer than the first context
    "model_type": "phi3", "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [1.5, 2.5, 4.0, 6.0], "original_max_position_embeddings": 16,
    },
}  # fmt: skip
CLASSIC = ("bloom", "codegen", "falcon", "gpt_bigcode", "gpt2", "gpt_neox", "gptj", "mpt", "opt")
OTHER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "max_position_embeddings", "pad_token_id")  # fmt: skip
"""Sizes that these families call otherwise, or do not have."""
HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
CASES: dict[str, dict] = {
    "arcee": rope(),
    "bloom": {"n_head": 6, "n_layer": 2, "hidden_size": 48},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "cohere": {**rope(), "logit_scale": 0.5},
    "cohere2": {**rope(), "sliding_window": 6, "layer_types": [SLIDING, FULL], "logit_scale": 0.5},
    "deepseek_v2": {  # as Lite is
        **MLA, **rope(), "q_lora_rank": None, "topk_method": "greedy", "n_routed_experts": 4, "routed_scaling_factor": 1.5,
    },
    "deepseek_v2_groups": {**MLA, **rope(), "model_type": "deepseek_v2", "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**MLA, **YARN, "first_k_dense_replace": 1},
    "deepseek_v3_even": {  # as published: one factor for rotation and scores
        **MLA, **rope(**{**PLAIN_YARN, "truncate": True}, mscale=0.8, mscale_all_dim=0.8), "model_type": "deepseek_v3",
        "n_group": 1, "topk_group": 1,
    },
    "ernie4_5": {**rope(), "head_dim": 16, "use_bias": True},
    "exaone4": {**rope(), "sliding_window": 6, "num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]},
    "falcon": {**HF, **rope(), "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 40},
    "falcon_7b": {**HF, **rope(), "model_type": "falcon", "multi_query": True, "parallel_attn": True},
    "falcon_rw": {
        **HF, "model_type": "falcon", "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True,
    },
    "gemma": {**rope(), "head_dim": 16},
    "glm": {**rope(partial_rotary_factor=0.5), "head_dim": 16, "attention_bias": True},
    "glm4": {**rope(partial_rotary_factor=0.5), "head_dim": 16, "attention_bias": True},
    "glm4_moe": {
        **rope(partial_rotary_factor=0.5), "head_dim": 16, "attention_bias": True, "use_qk_norm": True, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 1.5, "num_hidden_layers": 3,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40},
    "gpt_bigcode_many": {
        "model_type": "gpt_bigcode", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "multi_query": False,
    },
    "gpt_neox": {**HF, **rope(partial_rotary_factor=0.5), "intermediate_size": 40},
    "gpt_neox_serial": {
        **HF, **rope(partial_rotary_factor=1.0), "intermediate_size": 40, "model_type": "gpt_neox",
        "use_parallel_residual": False, "attention_bias": False,
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "gpt_oss": {
        **rope(**PLAIN_YARN), "head_dim": 16, "sliding_window": 6, "layer_types": [SLIDING, FULL], "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt_oss_clamped": {
        **YARN, "model_type": "gpt_oss", "head_dim": 16, "sliding_window": 6, "layer_types": [FULL, SLIDING],
        "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 1.5, "swiglu_alpha": 1.3,
    },
    "granite": {
        **rope(), "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2,
    },
    "granite_plain": {  # MiniCPM, which has the same factors but that of scores
        **rope(), "model_type": "granite", "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7,
        "attention_multiplier": 8**-0.5,
    },
    "granitemoe": {
        **rope(), "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2,
        "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "granitemoeshared": {
        **rope(), "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2,
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 28,
    },
    "helium": {**rope(), "head_dim": 8},
    "hunyuan_v1_dense": {**rope(), "head_dim": 16},
    "lfm2": {
        **rope(), "num_hidden_layers": 3, "layer_types": ["conv", FULL, "conv"], "block_auto_adjust_ff_dim": False,
    },
    "lfm2_older": {
        **rope(), "model_type": "lfm2", "num_hidden_layers": 3, "full_attn_idxs": [1], "conv_bias": True, "conv_L_cache": 4,
        "block_multiple_of": 12, "block_ffn_dim_multiplier": 1.3,
    },
    "llama4_text": {
        **rope(), "head_dim": 16, "num_hidden_layers": 4, "num_local_experts": 4, "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 44, "attention_chunk_size": 6, "floor_scale": 4, "no_rope_layer_interval": 2,
    },
    "llama4_published": {  # with the sizes that GGUF files do not say
        **rope(), "model_type": "llama4_text", "head_dim": 16, "num_hidden_layers": 4, "num_local_experts": 4,
        "interleave_moe_layer_step": 2, "intermediate_size_mlp": 44, "attention_chunk_size": 8192, "floor_scale": 8192,
    },
    "llama_plain": {**rope(), "model_type": "llama"},
    "ministral": {**rope(), "head_dim": 8, "sliding_window": 6, "layer_types": [SLIDING, FULL]},
    "mixtral": {**rope(), "num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {
        "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64, "attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.3},
    },
    "mpt_published": {"model_type": "mpt", "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "nemotron": {**rope(partial_rotary_factor=0.5), "head_dim": 16},
    "olmo": {**rope(), "clip_qkv": 1.5},
    "olmo2": rope(),
    "olmo3": {
        "sliding_window": 6, "layer_types": [SLIDING, FULL],
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 500.0},
            FULL: {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32},
        },
    },
    "olmoe": {**rope(), "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "opt": {**HF, "ffn_dim": 40, "word_embed_proj_dim": 32, "pad_token_id": 1, "bos_token_id": 2},
    "phi": {**rope(partial_rotary_factor=0.5), "num_key_value_heads": 4},
    "phi3": {**rope(partial_rotary_factor=1.0), "sliding_window": 6},
    "phi3_longrope": {
        "model_type": "phi3", "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 32,
        },
    },
    "phi3_longrope_long": LONG,
    "qwen2_plain": {**rope(), "model_type": "qwen2"}, "qwen3_plain": {**rope(), "model_type": "qwen3", "head_dim": 16},
    "qwen2_moe": {
        **rope(), **EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 28, "decoder_sparse_step": 1,
    },
    "qwen3_moe": {**rope(), **EXPERTS, "head_dim": 16},
    "seed_oss": {**rope(), "head_dim": 16, "attention_bias": True, "attention_out_bias": True},
    "smollm3": {**rope(), "num_hidden_layers": 4},
    "stablelm": {**rope(partial_rotary_factor=0.5), "use_qkv_bias": True},
    "stablelm_parallel": {**rope(partial_rotary_factor=0.5), "model_type": "stablelm", "use_parallel_residual": True},
    "starcoder2": {**rope(), "sliding_window": 6},
}  # fmt: skip


def make(name: str, case: dict) -> None:
    way = "sdpa" if name == "falcon_rw" else "eager"  # which adds ALiBi twice there
    sizes = {k: v for k, v in SIZES.items() if k not in OTHER or case.get("model_type", name) not in CLASSIC}
    config = AutoConfig.for_model(**{"model_type": name, **sizes, **case}, attn_implementation=way, dtype="float32")
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        AutoModelForCausalLM.from_config(config, attn_implementation=way).save_pretrained(folder)
        with safe_open(folder / "model.safetensors", "np") as f:
            shapes = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118
        said = json.loads((folder / "config.json").read_text())
        family_files.write(folder, said, shapes)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=way, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, SIZES["vocab_size"], (1, 20)))
    with torch.no_grad():
        logits = model(ids).logits
    text = json.dumps({"config": said, "shapes": shapes})
    np.savez_compressed(HERE / f"{name}.npz", ids=ids.numpy(), logits=logits.numpy(), said=np.array(text))
    print(f"{name}: logits within {logits.abs().max():.2f}, spread {logits.std():.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    HERE.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        make(name, CASES[name])
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
