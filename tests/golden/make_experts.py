"""Makes ``experts/*``: tiny random mixtures of experts of transformers, as torch.export has them, with their logits.

    pip install torch==2.14.1 transformers==5.24.0 onnx==1.23.2 onnxscript==0.7.2
    python make_experts.py

Their experts are in the batched form (weights gathered for each token and expert): the loop over experts, which asks which
experts were chosen, is refused by torch.export. Notes of where in Python a node came from are dropped.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxscript
import torch
import transformers
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

HERE = Path(__file__).parent / "experts"
COMMON = dict(
    vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64, num_experts_per_tok=2, intermediate_size=12,
)
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig,
                  {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4}),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4}),
}


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def main():
    HERE.mkdir(exist_ok=True)
    for name, (kind, config, more) in MODELS.items():
        torch.manual_seed(0)
        model = kind(config(**COMMON, **more, attn_implementation="eager")).eval()
        for p in model.parameters():  # sizes at which a wrong expert shows
            torch.nn.init.normal_(p, std=0.2)
        model.set_experts_implementation("batched_mm")
        sizes = {0: torch.export.Dim("b", min=1, max=64), 1: torch.export.Dim("s", min=2, max=64)}
        file = HERE / f"{name}.onnx"
        torch.onnx.export(
            Logits(model), (torch.zeros(2, 5, dtype=torch.int64),), file, input_names=["ids"], output_names=["logits"],
            dynamic_shapes={"ids": sizes}, opset_version=18, dynamo=True, external_data=False,
        )
        proto = onnx.load(file)
        g = proto.graph
        for part in (*g.node, *g.initializer, *g.input, *g.output):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
        for field in ("metadata_props", "functions"):
            proto.ClearField(field)
        proto.graph.ClearField("value_info")
        proto.graph.ClearField("metadata_props")
        onnx.save(proto, file)
        ids = torch.randint(0, 24, (3, 7))
        with torch.no_grad():
            np.savez(HERE / f"{name}.npz", ids=ids.numpy(), logits=model(input_ids=ids, use_cache=False).logits.numpy())
    versions = {m.__name__: m.__version__ for m in (torch, transformers, onnx, onnxscript, np)}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


main()
