"""Checkpoints of ``golden/families``: weights that follow from their names, so that only logits have to be kept."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FAMILIES = Path(__file__).parent / "golden" / "families"


def weight(name: str, shape: tuple[int, ...], around: float) -> np.ndarray:
    """f32 of noticeable size: matrices keep the size of what they multiply; norms spread around ``around``, biases around 0."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return x * np.float32(0.5 if "embed" in name else 1.2 * shape[-1] ** -0.5)
    return np.float32(0.3) * x + np.float32(around if "norm" in name and name.endswith("weight") else 0)


def write(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """The folder of a model whose tensors have these names and shapes."""
    folder.mkdir(exist_ok=True)
    around = 0.0 if str(config["model_type"]) in ("gemma", "nemotron") else 1.0  # which multiply by 1 + weight
    save_file({k: weight(k, tuple(s), around) for k, s in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def golden(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], np.ndarray, np.ndarray]:
    """Configuration, shapes, ``ids`` i64[b, s] and ``logits`` f32[b, s, vocab]."""
    f = np.load(FAMILIES / f"{name}.npz")
    said = json.loads(str(f["said"]))
    return said["config"], {k: tuple(s) for k, s in said["shapes"].items()}, f["ids"], f["logits"]
