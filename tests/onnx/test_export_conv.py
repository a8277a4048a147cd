"""A convolution whose padding is symbolic or negative, as ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from wasat.backends.onnx.export import to_onnx
from wasat.ir import build, parse_type

EDGES = {"behind": (-1, 2), "before": (2, -2), "cropped": (-1, -2), "symbolic": (0, "n"), "both": ("n", "n")}


@pytest.mark.parametrize("edges", EDGES)
def test_padding_that_is_symbolic_or_negative(edges: str, tmp_path: Path) -> None:
    symbolic = parse_type("f32[1, 1, n]").shape[2] - 5  # 2 here
    low, high = (symbolic if d == "n" else d for d in EDGES[edges])
    g = build(
        "conv", [("x", parse_type("f32[1, 1, n]")), ("w", parse_type("f32[1, 1, 3]"))],
        lambda b, x, w: b.conv(x, w, low=(low,), high=(high,), strides=(2,), dilation=(1,), input_dilation=(1,), groups=1),
    )  # fmt: skip
    x, w = np.arange(1, 8, dtype=np.float32), np.array([1, 10, 100], np.float32)
    model = onnx.load(to_onnx(g, tmp_path / "m.onnx"))
    (y,) = ReferenceEvaluator(model).run(None, {"x": x.reshape(1, 1, 7), "w": w.reshape(1, 1, 3)})
    lo, hi = (2 if d == "n" else d for d in EDGES[edges])
    padded = np.pad(x, (max(lo, 0), max(hi, 0)))[max(-lo, 0) :]
    padded = padded[: len(padded) + min(hi, 0)]
    right = [padded[i : i + 3] @ w for i in range(0, len(padded) - 2, 2)]
    np.testing.assert_array_equal(y.ravel(), right)
