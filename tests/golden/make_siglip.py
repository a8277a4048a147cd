"""Makes ``siglip/tiny.npz``: a tiny random SigLIP vision encoder of transformers and its features of two pictures.

    pip install torch==2.13.0 transformers==5.23.0
    python make_siglip.py

``pixels`` f32[2, 16, 16, 3] in [-1, 1], ``features`` f32[2, 16, 32] (after the last norm), ``weight.<name>`` every parameter.
All are random and of noticeable size, norms and biases too.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import SiglipVisionConfig, SiglipVisionModel

HERE = Path(__file__).parent / "siglip"
CONFIG = SiglipVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
    vision_use_head=False, attn_implementation="eager",
)  # fmt: skip

noise = torch.Generator().manual_seed(0)
model = SiglipVisionModel(CONFIG).eval()
for name, p in model.named_parameters():
    if p.ndim > 1:
        std = 0.5 if "position" in name else 1.2 * p[0].numel() ** -0.5
        p.data = std * torch.randn(p.shape, generator=noise)
    else:
        p.data = float("norm" in name and name.endswith("weight")) + 0.3 * torch.randn(p.shape, generator=noise)
pixels = torch.rand((2, 3, 16, 16), generator=noise) * 2 - 1
with torch.no_grad():
    features = model(pixels).last_hidden_state
weights = {f"weight.{name}": p.detach().numpy() for name, p in model.named_parameters()}
HERE.mkdir(exist_ok=True)
np.savez_compressed(HERE / "tiny.npz", pixels=pixels.permute(0, 2, 3, 1).numpy(), features=features.numpy(), **weights)
versions = {"torch": torch.__version__, "transformers": transformers.__version__}
(HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
