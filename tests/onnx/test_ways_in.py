"""The ways in: the operation that is attention already, a file by its path, ONNX's own interface of backends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx
from onnx import helper, numpy_helper, parser
from wasat.frontend.onnx import from_onnx

import wasat as ws
from wasat.driver import load_program
from wasat.onnx_backend import run_model, run_node, supports_device


def test_attention_becomes_one_operation() -> None:
    m = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 23]>
           g (float[b, 8, s, 16] q, float[b, 2, s, 16] k, float[b, 2, s, 16] v) => (float[b, 8, s, 16] y) {
             y = Attention <is_causal: int = 1> (q, k, v) }"""
    )
    g = from_onnx(m)["forward"]
    assert g.count("attention") == 1
    assert {n.op.name for n in g.nodes} == {"attention", "transpose"}


def test_load_program_and_the_backend(tmp_path: Path) -> None:
    w = np.arange(96, dtype=np.float32).reshape(4, 24)
    m = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23]>\ng (float[b, 4] x) => (float[b, 24] y) { y = MatMul(x, w) }'
    )
    m.graph.initializer.append(numpy_helper.from_array(w, "w"))
    path = tmp_path / "m.onnx"
    onnx.save(m, path)
    x = np.ones((1, 4), np.float32)
    np.testing.assert_allclose(ws.run(load_program(path), x=x)["y"], x @ w)
    np.testing.assert_allclose(run_model(m, [x])[0], x @ w)
    node = helper.make_node("Reshape", ["x", "s"], ["y"])
    assert run_node(node, [x, np.int64([2, -1])])[0].shape == (2, 2)
    assert supports_device("CPU")
    assert not supports_device("CUDA")
