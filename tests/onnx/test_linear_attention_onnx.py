"""ONNX's LinearAttention: written where the operator has the rule, and read as the IR's operation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import parser
from wasat.backends.onnx import to_onnx
from wasat.frontend.onnx import OnnxError, from_onnx
from wasat.ir import Program, parse
from wasat.ir.ops.linear_attention import LinearAttentionAttrs

import wasat as ws

GRAPH = """graph @forward(%q: f32[b, s, 4, 8], %k: f32[b, s, 2, 8], %v: f32[b, s, 2, 6], %x: f32[b, 2, 8, 6], %g: f32[b, s, 2], %r: f32[b, s, 2]) {
  %y: f32[b, s, 4, 6], %last: f32[b, 2, 8, 6] = linear_attention(%q, %k, %v, %x, %g, %r) {rule="gated_delta", scale=0.5}
  return %y, %last
}
"""  # noqa: E501


def exported(text: str, path: Path, opset: int) -> Any:
    to_onnx(Program({"forward": parse(text)}), path / "m.onnx", opset=opset)
    return onnx.load(path / "m.onnx")


def test_there_and_back(tmp_path: Path) -> None:
    model = exported(GRAPH, tmp_path, 27)
    [node] = [n for n in model.graph.node if n.op_type == "LinearAttention"]
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == {
        "q_num_heads": 4, "kv_num_heads": 2, "scale": 0.5, "update_rule": b"gated_delta",
    }  # fmt: skip
    back = from_onnx(model)
    [again] = [n.attrs for n in back["forward"].nodes if n.op.name == "linear_attention"]
    assert again == LinearAttentionAttrs("gated_delta", scale=0.5)
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 5, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 6), "x": (2, 2, 8, 6), "g": (2, 5, 2), "r": (2, 5, 2)}
    feed = {n: 0.3 * rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    want = ws.run(Program({"forward": parse(GRAPH)}), **feed)
    for name, got in ws.run(back, **feed).items():
        np.testing.assert_allclose(got, want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "opset, edit", [(26, ""), (27, ", log=false"), (27, ", before=true")], ids=["older", "factors", "read before"]
)
def test_what_the_operator_cannot_say_is_a_loop(opset: int, edit: str, tmp_path: Path) -> None:
    """Over tokens, which is known again."""
    model = exported(GRAPH.replace("scale=0.5", f"scale=0.5{edit}"), tmp_path, opset)
    kinds = [n.op_type for n in model.graph.node]
    assert "LinearAttention" not in kinds
    assert "Scan" in kinds
    back, _ = ws.optimize(from_onnx(model), kv_cache=False)
    assert [n.attrs.rule for n in back["forward"].nodes if n.op.name == "linear_attention"] == ["gated_delta"]


MODEL = """<ir_version: 10, opset_import: ["" : 27]>
main (float[b, s, 32] q, float[b, s, 16] k, float[b, s, 12] v, float[b, s, 16] g, float[b, s, 1] r) => (float[b, s, 24] y) {
  y, last = LinearAttention <q_num_heads = 4, kv_num_heads = 2> (q, k, v, , g, r)
}
"""


def test_defaults_and_one_rate_for_all_heads() -> None:
    program = from_onnx(parser.parse_model(MODEL))
    [node] = [n for n in program["forward"].nodes if n.op.name == "linear_attention"]
    assert node.attrs == LinearAttentionAttrs("gated_delta", scale=1 / math.sqrt(8))
    assert [str(v.type) for v in node.inputs[3:]] == ["f32[b, 2, 8, 6]", "f32[b, s, 2, 8]", "f32[b, s, 2]"]


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(OnnxError, match="q_num_heads 4 is not a multiple of kv_num_heads 3"):
        from_onnx(parser.parse_model(MODEL.replace("kv_num_heads = 2", "kv_num_heads = 3")))
