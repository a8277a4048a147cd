"""Index tuples: each counts within its own axis, from the end too; outside of it they are refused, wherever they would land."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import model
from wasat.frontend.onnx import OnnxError, from_onnx

import wasat as ws

GATHER = "agraph (float[2, n, m] x, int64[k, 2] i) => (float[k, m] y) { y = GatherND(x, i) }"
SCATTER = """agraph (float[2, n, m] x, int64[k, 2] i, float[k, m] u) => (float[2, n, m] y) {
  y = ScatterND<reduction = "add">(x, i, u) }"""
INSIDE = [[1, -1], [-2, 2], [0, -3]]
OUTSIDE = [(1, -4), (0, 3), (-2, 5), (2, -1), (-3, 3)]
"""Of 2 and 3: alone each is outside; as places in all six, four of them are inside."""


def programs() -> list[tuple[ws.Program, np.ndarray]]:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    return [(from_onnx(model(GATHER)), x), (from_onnx(model(SCATTER)), x)]


@pytest.mark.parametrize("backend", ["interpreter", "cpu"])
def test_index_tuples(backend: str) -> None:
    (gather, x), (scatter, _) = programs()
    ids, u = np.array(INSIDE), np.ones((3, 4), np.float32)
    gathered, scattered = (partial(ws.run, p) if backend == "interpreter" else ws.Executable(p) for p in (gather, scatter))
    rows = tuple(ids.T)
    np.testing.assert_array_equal(gathered(x=x, i=ids)["y"], x[rows])
    want = x.copy()
    np.add.at(want, rows, u)
    np.testing.assert_array_equal(scattered(x=x, i=ids, u=u)["y"], want)
    for place in OUTSIDE:
        bad = np.array([[0, 0], place])
        low, high = next((-n, n - 1) for n, at in zip((2, 3), place) if not -n <= at < n)
        runs: list[tuple[Any, dict[str, Any]]] = [(gathered, {}), (scattered, {"u": u[:2]})]
        for run, more in runs:
            with pytest.raises(ws.WasatError, match=rf"index -?\d is outside {low} .. {high}"):
                run(x=x, i=bad, **more)


@pytest.mark.parametrize("name", ["GatherND", "ScatterND"])
def test_written_in_the_file(name: str) -> None:
    node = helper.make_node(name, ["x", "i", *(["u"] if name == "ScatterND" else [])], ["y"])
    inputs = [helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, s) for k, s in (("x", [2, 3, 4]), ("u", [1, 4]))]
    given = inputs[: len(node.input) - 1]
    i = onnx.numpy_helper.from_array(np.array([[1, -4]]), "i")
    graph = helper.make_graph([node], "g", given, [onnx.ValueInfoProto(name="y")], [i])
    with pytest.raises(OnnxError, match=f"{name} node 'y': index -4 is outside -3 .. 2"):
        from_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def test_a_cache_is_written_from_its_beginning() -> None:
    text = """agraph (float[b, 4, 2] x, float[b, t, 2] u, int64[b] s) => (float[b, 4, 2] y) {
      y = TensorScatter<mode = "linear", axis = 1>(x, u, s) }"""
    program = from_onnx(model('<ir_version: 10, opset_import: ["": 24]>\n' + text))
    x, u = np.zeros((1, 4, 2), np.float32), np.ones((1, 2, 2), np.float32)
    assert np.asarray(ws.run(program, x=x, u=u, s=np.array([2]))["y"])[0, :, 0].tolist() == [0, 0, 1, 1]
    for start in (-1, -4, 3):
        with pytest.raises(ws.WasatError, match="outside"):
            ws.run(program, x=x, u=u, s=np.array([start]))
