"""Makes ``hf/*``: tiny random models saved by transformers, with their logits as golden values.

    pip install torch==2.13.0 transformers==5.23.0
    python make_hf.py [CASE ...]

A folder holds config.json and safetensors as ``save_pretrained`` writes them (float32, one case sharded) and golden.npz:
``ids`` i64[b, s], longer than every window, and ``logits`` f32[b, s, vocab] of eager attention on the CPU. Every parameter is
random and of noticeable size, norms and biases too, so that a wrong convention (``w`` for ``1 + w``, a lost bias) shows.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent / "hf"
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 8.0}
SLIDING, FULL = "sliding_attention", "full_attention"
THETAS = {SLIDING: {"rope_type": "default", "rope_theta": 100.0}, FULL: {"rope_type": "default", "rope_theta": 5000.0}}

CASES: dict[str, dict] = {
    "llama": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama3_rope_tied": {
        "model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 16,
        "rope_parameters": {**LLAMA3, "rope_theta": 5000.0, "original_max_position_embeddings": 16},
    },
    "llama_bias_sharded": {
        "model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "hidden_act": "gelu",
        "rope_parameters": {**LINEAR, "rope_theta": 1000.0}, "rms_norm_eps": 1e-2,
    },
    "qwen2": {
        "model_type": "qwen2", "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "qwen2_yarn_tied": {
        "model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": {**YARN, "rope_theta": 1000.0},
    },
    "qwen3": {
        "model_type": "qwen3", "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "mistral": {
        "model_type": "mistral", "head_dim": 12, "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "gemma3": {
        "model_type": "gemma3_text", "num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 16,
        "query_pre_attn_scalar": 24, "sliding_window": 7,
        "rope_parameters": {SLIDING: THETAS[SLIDING], FULL: {**THETAS[FULL], **LINEAR}},
    },
    "gemma3_softcap_untied": {
        "model_type": "gemma3_text", "num_hidden_layers": 3, "head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 4,
        "layer_types": [FULL, SLIDING, SLIDING], "tie_word_embeddings": False, "final_logit_softcapping": 3.0,
        "attention_bias": True, "rope_parameters": THETAS,
    },
    "gemma2": {
        "model_type": "gemma2", "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 16,
        "query_pre_attn_scalar": 24, "sliding_window": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
}  # fmt: skip


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Every parameter random: matrices keep the size of what they multiply, norms and biases spread by 0.3."""
    noise = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            mean, std = 0.0, (0.5 if "embed_tokens" in name else 1.2 * p.shape[1] ** -0.5)
        else:
            mean, std = float("norm" in name and "gemma" not in model.config.model_type), 0.3
        p.data = mean + std * torch.randn(p.shape, generator=noise)


def make(name: str, case: dict, folder: Path) -> None:
    config = AutoConfig.for_model(**{**SIZES, **case}, attn_implementation="eager", dtype="float32")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    seed = list(CASES).index(name)
    randomize(model, seed)
    batch, length = (2, 24) if name in ("llama", "gemma3") else (1, 40)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (batch, length)))
    with torch.no_grad():
        logits = model(ids).logits
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size="30KB" if "sharded" in name else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "golden.npz", ids=ids.numpy(), logits=logits.numpy())
    print(f"{name}: logits within {logits.abs().max():.2f}, {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        make(name, CASES[name], HERE / name)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
