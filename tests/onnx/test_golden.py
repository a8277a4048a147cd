"""Tiny transformers as torch exports them: the same numbers as torch, at the sizes that the golden files have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from wasat.frontend.onnx import from_onnx
from wasat.ir import evaluate

MODELS = sorted((Path(__file__).parents[1] / "golden" / "onnx").glob("*.onnx"))


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_imports_with_the_same_numbers(path: Path) -> None:
    program = from_onnx(path)
    program.verify()
    g = program["forward"]
    with np.load(path.with_suffix(".npz")) as data:
        inputs, want = {v.name: data[f"in.{v.name}"] for v in g.inputs}, data["out"]
    got = evaluate(g, inputs, {name: p.load() for name, p in program.params.items()})[0]
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def test_there_are_models() -> None:
    assert len(MODELS) >= 10
