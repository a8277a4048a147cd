"""What files in use hold: old operator sets, recurrences over any number of steps, loops that a condition ends, weights in
Constant nodes, sizes and inputs that the import fixes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from wasat.frontend.onnx import OnnxError, from_onnx

import wasat as ws


def model(nodes: list[Any], shapes: dict[str, list[Any]], constants: dict[str, Any] | None = None, opset: int = 18) -> Any:
    """A model of f32 inputs and the output ``y``."""
    inputs = [helper.make_tensor_value_info(k, TensorProto.FLOAT, s) for k, s in shapes.items()]
    stored = [numpy_helper.from_array(np.asarray(x), k) for k, x in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def result(m: Any, **inputs: np.ndarray) -> np.ndarray:
    return np.asarray(ws.run(from_onnx(m), **inputs)["y"])


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [None, 0, 2, -2])
def test_before_operator_set_13_over_all_axes_from_one_on(op: str, axis: int | None) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    at = 1 if axis is None else axis % 3
    flat = x.reshape(int(np.prod(x.shape[:at])), -1).astype(np.float64)
    shares = np.exp(flat) / np.exp(flat).sum(1, keepdims=True)
    want = {"Softmax": shares, "LogSoftmax": np.log(shares), "Hardmax": flat == flat.max(1, keepdims=True)}[op]
    node = helper.make_node(op, ["x"], ["y"], **({} if axis is None else {"axis": axis}))
    for opset in (9, 11, 12):
        got = result(model([node], {"x": ["a", 3, "c"]}, opset=opset), x=x)
        np.testing.assert_allclose(got, want.reshape(x.shape), rtol=1e-5, atol=1e-6)


def test_an_axis_that_is_none_is_refused() -> None:
    with pytest.raises(OnnxError, match="axis 3 is none"):
        from_onnx(model([helper.make_node("Softmax", ["x"], ["y"], axis=3)], {"x": [2, 3]}, opset=11))


@pytest.mark.parametrize("op, gates", [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("lengths", [False, True])
def test_a_recurrence_over_any_number_of_steps(op: str, gates: int, direction: str, lengths: bool) -> None:
    """As of the same file with its steps fixed, which are written out."""
    rng, d = np.random.default_rng(1), 1 + (direction == "bidirectional")
    x, w, r, b = (
        rng.standard_normal(s).astype(np.float32)
        for s in ((6, 2, 3), (d, gates * 2, 3), (d, gates * 2, 2), (d, gates * 4))
    )
    inputs = ["x", "w", "r", "b", *(["n"] if lengths else [])]
    constants = {"w": w, "r": r, "b": b, **({"n": np.array([4, 6], np.int32)} if lengths else {})}
    node = helper.make_node(op, inputs, ["y"], hidden_size=2, direction=direction)
    m = model([node], {"x": ["s", 2, 3]}, constants)
    program = from_onnx(m)
    assert program["forward"].count("scan") == d
    assert from_onnx(m, sizes={"s": 6})["forward"].count("scan") == 0
    want = np.asarray(ws.run(from_onnx(m, sizes={"s": 6}), x=x)["y"])
    np.testing.assert_allclose(result(m, x=x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op, gates", [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_states_whose_batch_has_a_name_of_its_own(op: str, gates: int) -> None:
    """Files name the batch of x, of the states and of the lengths apart: one size, which is checked when it runs."""
    rng = np.random.default_rng(3)
    w, r = (rng.standard_normal((1, gates * 2, k)).astype(np.float32) for k in (3, 2))
    states = ["h", "c"] if op == "LSTM" else ["h"]
    node = helper.make_node(op, ["x", "w", "r", "", "n", *states], ["y"], hidden_size=2)
    m = model([node], {"x": ["s", "b", 3], **{k: [1, f"b_{k}", 2] for k in states}}, {"w": w, "r": r})
    m.graph.input.append(helper.make_tensor_value_info("n", TensorProto.INT32, ["b_n"]))
    feeds = {"x": rng.standard_normal((4, 2, 3)), **{k: rng.standard_normal((1, 2, 2)) for k in states}}
    feeds = {k: x.astype(np.float32) for k, x in feeds.items()}
    program, got = from_onnx(m), []
    assert program["forward"].count("scan") == 1
    for rows in (slice(2), slice(1)):  # each row alone, over as many steps as it has, is what it is among others
        one = {"x": feeds["x"][:, rows], **{k: feeds[k][:, rows] for k in states}, "n": np.array([4, 2], np.int32)[rows]}
        got.append(np.asarray(ws.run(program, **one)["y"]))
        np.testing.assert_array_equal(np.asarray(ws.run(program, backend="cpu", **one)["y"]) != 0, got[-1] != 0)
        np.testing.assert_allclose(ws.run(program, backend="cpu", **one)["y"], got[-1], rtol=1e-5, atol=1e-6)
        (want,) = ReferenceEvaluator(m).run(None, {**one, "n": one["n"][:1] * 0 + 4})
        np.testing.assert_allclose(got[-1][:, :, 0], want[:, :, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[0][:, :, :1], got[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ws.WasatError, match="b_h"):
        ws.run(program, **{**feeds, "h": feeds["h"][:, :1], "n": np.array([4, 2], np.int32)})


def test_the_largest_of_none() -> None:
    """Hardmax of no elements has none; of other numbers in the same place, it is as it was."""
    for opset, shape in ((13, ["n"]), (13, [2, "n"]), (11, [2, "n"]), (13, ["n", 0]), (13, [0])):
        m = model([helper.make_node("Hardmax", ["x"], ["y"], axis=-1)], {"x": shape}, opset=opset)
        empty = np.zeros([0 if d == "n" else d for d in shape], np.float32)
        for backend in ("interpreter", "cpu"):
            assert np.asarray(ws.run(from_onnx(m), backend=backend, x=empty)["y"]).shape == empty.shape
    x = np.array([[-np.inf, -np.inf, -np.inf], [1, 3, 3], [np.nan, 1, 2]], np.float32)
    m = model([helper.make_node("Hardmax", ["x"], ["y"])], {"x": ["m", "n"]})
    for backend in ("interpreter", "cpu"):
        assert np.asarray(ws.run(from_onnx(m), backend=backend, x=x)["y"]).tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("space", [(3, 4), (1, 2), (2, 1, 3)])
def test_an_affine_grid(align: int, space: tuple[int, ...]) -> None:
    """Of one picture, too, whose axis the standard's own function squeezes away; sizes as the file has them and from x."""
    k, rng = len(space), np.random.default_rng(4)
    nodes = [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("AffineGrid", ["t", "s"], ["y"], align_corners=align)]
    m = model(nodes, {"x": ["b", "c", *"hwd"[:k]], "t": ["n", k, k + 1]}, opset=20)
    steps = [np.arange(d) for d in space]
    ends = [2 * i / (d - 1) - 1 if d > 1 else i + 1.0 for i, d in zip(steps, space)]  # of one, onnxruntime's
    axes = ends if align else [(2 * i + 1) / d - 1 for i, d in zip(steps, space)]
    places = np.stack([*np.meshgrid(*axes, indexing="ij")[::-1], np.ones(space)], -1)
    for n in (1, 2):
        theta = rng.standard_normal((n, k, k + 1)).astype(np.float32)
        want = np.einsum("...j,nij->n...i", places, theta.astype(np.float64))
        got = result(m, x=np.zeros((n, 1, *space), np.float32), t=theta)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_an_lstm_is_the_reference_evaluators() -> None:
    rng = np.random.default_rng(2)
    x, w, r = (rng.standard_normal(s).astype(np.float32) for s in ((20, 1, 3), (1, 8, 3), (1, 8, 2)))
    m = model([helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=2)], {"x": ["s", 1, 3]}, {"w": w, "r": r})
    (want,) = ReferenceEvaluator(m).run(None, {"x": x})
    np.testing.assert_allclose(result(m, x=x), want, rtol=1e-5, atol=1e-6)


def test_a_loop_that_its_condition_ends() -> None:
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Add", ["v", "step"], ["v2"]), helper.make_node("Add", ["turn", "one"], ["next"]),
            helper.make_node("Less", ["next", "three"], ["go2"]),
        ],
        "body",
        [info("turn", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("v", TensorProto.FLOAT, ["n"])],
        [info("go2", TensorProto.BOOL, []), info("v2", TensorProto.FLOAT, ["n"])],
    )  # fmt: skip
    constants = {"most": 2**63 - 1, "yes": True, "step": np.float32(1), "one": 1, "three": 3}
    m = model([helper.make_node("Loop", ["most", "yes", "x"], ["y"], body=body)], {"x": ["n"]}, constants)
    assert result(m, x=np.array([1, 2], np.float32)).tolist() == [4, 5]


def test_a_large_constant_is_a_parameter() -> None:
    ones = np.ones((64, 64), np.float32)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(ones)),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    program = from_onnx(model(nodes, {"x": ["n", 64]}))
    assert [v.type.shape for v in program["forward"].params.values()] == [(64, 64)]
    assert program["forward"].count("constant") == 0
    x = np.ones((2, 64), np.float32)
    assert (np.asarray(ws.run(program, x=x)["y"]) == 64).all()


def test_sizes_and_inputs_that_are_fixed() -> None:
    m = model([helper.make_node("Add", ["x", "z"], ["y"])], {"x": ["the batch", 2], "z": [2]})
    program = from_onnx(m, sizes={"the batch": 3}, constants={"z": np.array([1, 2], np.float32)})
    assert [(v.name, v.type.shape) for v in program["forward"].inputs] == [("x", (3, 2))]
    assert from_onnx(m, sizes={"the_batch": 3})["forward"].inputs[0].type.shape == (3, 2)
    with pytest.raises(OnnxError, match=r"no size 'b'.*the batch"):
        from_onnx(m, sizes={"b": 3})
    with pytest.raises(OnnxError, match=r"no input 'w'.*x, z"):
        from_onnx(m, constants={"w": np.float32(1)})


@pytest.mark.parametrize("name", [
    "größe", "批", "f32", "inf", "nan", "bool", "max", "a b", "a.b", "n-1", "1n", " n", "%n", "i64[b]", "def", "None", "y",
])  # fmt: skip
def test_a_size_of_any_name_is_one_size_and_its_text_is_read_again(name: str) -> None:
    m = model([helper.make_node("Neg", ["x"], ["y"])], {"x": [name, name, "other"]})
    graph = from_onnx(m)["forward"]
    shape = graph.inputs[0].type.shape
    assert shape[0] == shape[1] != shape[2]
    assert str(ws.parse(str(graph))) == str(graph)


def test_a_question_mark_is_no_name() -> None:
    m = model([helper.make_node("Neg", ["x"], ["y"])], {"x": ["?", "?", "-1", "n", "n"]})
    shape = from_onnx(m)["forward"].inputs[0].type.shape
    assert len(set(map(str, shape))) == 4
    assert shape[3] == shape[4]
