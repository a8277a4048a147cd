"""Our parts against the implementations they follow: SigLIP's encoder and Gemma 3's decoder, of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from wasat.frontend import nn
from wasat.frontend.models.gemini.encoders import ViTEncoder
from wasat.frontend.weights.safetensors import read_folder
from wasat.ir import ArrayParam, Program, TensorType

from wasat.driver import run
from wasat.models import gemini

GOLDEN = Path(__file__).parents[1] / "golden"
SIGLIP = {
    "blocks": "encoder.layers", "attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "attention": "self_attn",
    "o_proj": "out_proj", "up_proj": "fc1", "down_proj": "fc2", "norm": "post_layernorm",
    "patch_embedding": "embeddings.patch_embedding", "position_embedding": "embeddings.position_embedding.weight",
}  # fmt: skip
GEMMA = {
    "backbone": "model", "blocks": "layers", "embedding": "model.embed_tokens", "attention_norm": "input_layernorm",
    "attention": "self_attn", "attention_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}  # fmt: skip
"""Our names -> theirs."""


def theirs(name: str, names: dict[str, str]) -> str:
    return ".".join(names.get(part, part) for part in name.split("."))


def filled(program: Program, name: str, x: np.ndarray) -> None:
    t = program.params[name].type
    assert isinstance(t, TensorType)
    assert t.concrete({}) == x.shape
    program.params[name] = ArrayParam(np.ascontiguousarray(x, np.float32), t)


def test_the_vit_is_siglip() -> None:
    golden = np.load(GOLDEN / "siglip" / "tiny.npz")
    encoder = ViTEncoder(gemini.ViT(size=16, tokens=16, patch=4, dim=32, layers=2, heads=4, hidden=48))
    program = nn.trace(encoder, {"pixels": "f32[n, 16, 16, 3]"}, outputs=["features"])
    for name in program.params:
        x = golden["weight." + theirs(name, SIGLIP)]
        filled(program, name, x.transpose(0, 2, 3, 1).reshape(32, -1) if x.ndim == 4 else x)
    got = run(program, pixels=golden["pixels"])["features"]
    np.testing.assert_allclose(got.reshape(2, 16, 32), golden["features"], rtol=1e-4, atol=1e-5)


def test_the_backbone_is_gemma_3() -> None:
    folder = GOLDEN / "hf" / "gemma3"
    golden, stored = np.load(folder / "golden.npz"), read_folder(folder)
    config = gemini.Config(gemini.Text(
        vocab=96, dim=32, layers=6, heads=4, kv_heads=1, head_dim=16, hidden=48, context=128, theta=5000.0, rope_factor=8.0,
        window=7, period=6, local_theta=100.0, scale=24**-0.5, post_norm=True,
    ))  # fmt: skip
    program = gemini.Gemini(config).program()
    for name in program.params:
        x = stored[theirs(name, GEMMA)].load()
        filled(program, name, 1 + x if "norm" in name else x)  # Gemma's norms scale by 1 + weight
    np.testing.assert_allclose(run(program, tokens=golden["ids"])["logits"], golden["logits"], rtol=1e-4, atol=1e-4)
