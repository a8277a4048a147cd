"""A Hugging Face folder of a published shape with random weights (normal, 0.02), for benchmarks: nothing is downloaded.

    python benchmarks/random_model.py gemma3-270m out/gemma3-270m
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from wasat.frontend import Fields
from wasat.frontend.huggingface import build

SHAPES: dict[str, dict[str, Any]] = {
    "gemma3-270m": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262144, "hidden_size": 640,
        "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "sliding_window": 512, "query_pre_attn_scalar": 256, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)],
        "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    },
    "qwen2-0.5b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    config = SHAPES[args.shape]
    _, module = build(Fields(config, args.shape))
    rng = np.random.default_rng(0)
    weights = {}
    for name, p in module.parameters().items():
        shape = p.type.concrete({})
        norm = len(shape) == 1
        weights[name] = np.zeros(shape, np.float32) if norm else np.float32(0.02) * rng.standard_normal(shape, np.float32)
        if norm and "norm" in name and config["model_type"] != "gemma3_text":  # Gemma multiplies by 1 + w
            weights[name] += 1
    args.folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.folder / "model.safetensors")
    (args.folder / "config.json").write_text(json.dumps(config, indent=1))
    print(f"{args.folder}: {sum(w.size for w in weights.values()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
