"""Quantized folders whose numbers are not there, or are none: a sentence, and no other numbers in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_quantized_folders import FORMATS, quantized
from wasat.frontend import CheckpointError, from_pretrained
from wasat.ir import QArray

MODULE = "model.layers.0.mlp.up_proj"


def changed(path: Path, name: str, part: str, value: float | None, **more: Any) -> Path:
    """A folder of a format, a tensor of each module gone, or one of its numbers another."""
    config, pack = FORMATS[name]

    def packed(rng: np.random.Generator, n: int, k: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        parts, dense = pack(rng, n, k)
        x = parts.pop(part)
        if value is not None:
            x.reshape(-1)[1] = value
            parts[part] = x
        return parts, dense

    return quantized(path, {**config, **more}, packed)[0]


@pytest.mark.parametrize("name, part", [
    ("gptq", "scales"), ("awq", "scales"), ("w8a8", "weight_scale"), ("fp8", "weight_scale_inv"),
])  # fmt: skip
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_no_numbers_are_named(name: str, part: str, value: float, tmp_path: Path) -> None:
    program = from_pretrained(changed(tmp_path, name, part, value))
    with pytest.raises(CheckpointError, match=f"{MODULE}: {part} holds NaN or infinities"):
        program.load(f"{MODULE}.weight")


def test_awq_without_its_zero_points_is_no_symmetric_awq(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{MODULE}: qzeros is missing"):
        from_pretrained(changed(tmp_path / "a", "awq", "qzeros", None))
    small = from_pretrained(changed(tmp_path / "b", "awq", "qzeros", None, zero_point=False))
    x = small.load(f"{MODULE}.weight")
    assert isinstance(x, QArray)
    assert x.zeros is None
