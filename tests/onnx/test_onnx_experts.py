"""Mixtures of experts of transformers as torch exports them (tests/golden/make_experts.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from numpy.testing import assert_allclose
from wasat.frontend.onnx import from_onnx

import wasat as ws

HERE = Path(__file__).parents[1] / "golden" / "experts"
NAMES = ["mixtral", "qwen2_moe", "olmoe", "gpt_oss"]


def golden(name: str) -> tuple[ws.Program, dict[str, np.ndarray]]:
    return from_onnx(HERE / f"{name}.onnx"), dict(np.load(HERE / f"{name}.npz"))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_torchs(name: str) -> None:
    program, want = golden(name)
    fused, report = ws.optimize(program, kv_cache=False)
    (g,) = fused.graphs.values()
    assert g.count("grouped_linear") == 2
    assert not [r for r in report.remarks("missed") if "experts" in r.message]
    assert_allclose(ws.run(fused, ids=want["ids"])["logits"], want["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_all_weights_are_quantized(name: str) -> None:
    program, want = golden(name)
    fused, _ = ws.optimize(program, kv_cache=False, quantize="f16")
    (g,) = fused.graphs.values()
    assert not [f"{k}: {v.type}" for k, v in g.params.items() if str(v.type).startswith("f32[4, ")]
    assert_allclose(ws.run(fused, ids=want["ids"])["logits"], want["logits"], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe"])
def test_a_cache_is_derived(name: str) -> None:
    fused, _ = ws.optimize(golden(name)[0], kv_cache=True)
    assert fused["decode"].count("grouped_linear") == fused["prefill"].count("grouped_linear") == 2


def test_compiled() -> None:
    pytest.importorskip("tvm")
    program, want = golden("qwen2_moe")
    fused, _ = ws.optimize(program, kv_cache=False)
    assert_allclose(ws.run(fused, ids=want["ids"], backend="cpu")["logits"], want["logits"], rtol=1e-4, atol=1e-4)
