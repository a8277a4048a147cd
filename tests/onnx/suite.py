"""Running the ONNX backend suite's node tests: shared by the tests and the report."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner, _normalize_tensor

from wasat.onnx_backend import WasatBackend


def node_tests() -> list[Any]:
    """The suite's node tests, in order of their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sorted(load_model_tests(kind="node"), key=lambda t: t.name)


def run_test(test: Any) -> None:
    """Raises whatever goes wrong: an error of the import, or numbers that differ (the suite's own comparison)."""
    rep = WasatBackend.prepare(test.model)
    for inputs, wanted in test.data_sets:
        got = rep.run([_normalize_tensor(x) for x in inputs])
        Runner.assert_similar_outputs([_normalize_tensor(x) for x in wanted], got, test.rtol, test.atol)


def expected_failures(path: Path) -> dict[str, str]:
    """Test name -> reason, from lines ``[reason]`` followed by the names it holds for."""
    out: dict[str, str] = {}
    reason = ""
    for line in path.read_text().splitlines():
        if line.startswith("["):
            reason = line.strip("[]")
        elif line and not line.startswith("#"):
            out[line] = reason
    return out


_GROUPS = {
    r"attention": "Attention", r"flex_?attention": "FlexAttention", r"linear_?attention": "LinearAttention",
    r"causal_?conv": "CausalConvWithState", r"rotary": "RotaryEmbedding", r"rms_normalization": "RMSNormalization",
    r"layer_normalization": "LayerNormalization", r"group_normalization": "GroupNormalization", r"swiglu": "SwiGLU",
    r"image_decoder": "ImageDecoder", r"sce": "SoftmaxCrossEntropyLoss", r"nllloss": "NegativeLogLikelihoodLoss",
}  # fmt: skip


def group_of(test: Any, known: set[str]) -> str:
    """The operator that a test is about: of its only node, or, where it was expanded into many, by its name."""
    nodes = test.model.graph.node
    if len(nodes) == 1:
        return str(nodes[0].op_type)
    plain = re.sub(r"[^a-z0-9]", "", test.name.removeprefix("test_"))
    near = [op for op in known if plain.startswith(op.lower())]
    if near:
        return max(near, key=len)
    for pattern, name in _GROUPS.items():
        if re.match(pattern, test.name.removeprefix("test_")):
            return name
    return str(nodes[0].op_type)
