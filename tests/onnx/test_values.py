"""Attributes that ONNX gives no meaning to are refused by name: what they would compute is a guess."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import helper, numpy_helper
from wasat.frontend.onnx import OnnxError, from_onnx
from wasat.frontend.onnx.values import FLAGS
from wasat.ir import evaluate

X = np.arange(6, dtype=np.float32).reshape(2, 3)
I = np.arange(-3, 3, dtype=np.int32).reshape(2, 3)


def model(operator: str, attrs: dict[str, Any], *inputs: Any, constants: tuple[np.ndarray, ...] = ()) -> Any:
    named = {f"x{i}": np.asarray(x) for i, x in enumerate(inputs)}
    infos = [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for k, x in named.items()]
    held = [numpy_helper.from_array(x, f"c{i}") for i, x in enumerate(constants)]
    names = [*named, *(t.name if t.dims != [0] else "" for t in held)]
    node = helper.make_node(operator, names, ["y"], name="the node", **attrs)
    graph = helper.make_graph([node], "g", infos, [helper.make_empty_tensor_value_info("y")], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])


NONE = np.zeros(0, np.float32)
REFUSED: dict[str, tuple[Any, str]] = {
    "fmod": (model("Mod", {"fmod": 2}, I, I), "fmod is 2; it is 0 or 1"),
    "keepdims": (model("ReduceSum", {"keepdims": -1}, X), "keepdims is -1; it is 0 or 1"),
    "periodic": (model("HannWindow", {"periodic": 3}, constants=(np.array(8),)), "periodic is 3; it is 0 or 1"),
    "norm": (model("LpNormalization", {"p": 3}, X), "p is 3; it is 1 or 2"),
    "time is the batch": (model("ReverseSequence", {"batch_axis": 0, "time_axis": 0}, X, np.array([1, 2])), "are both 0"),
    "time": (model("ReverseSequence", {"batch_axis": 0, "time_axis": 2}, X, np.array([1, 2])), "time_axis is 2; it is 0 or 1"),
    "two constants": (model("Constant", {"value_int": 1, "value_float": 2.0}), "2 attributes, value_float and value_int"),
    "axis of one-hot": (model("OneHot", {"axis": 2}, np.arange(3), constants=(np.array(3), np.float32([0, 1]))), "no axis 2"),
    "axis of a concatenation": (model("Concat", {"axis": 2}, X, X), "axis 2 is outside a tensor of rank 2"),
    "axis of a running product": (model("Hardmax", {"axis": -3}, X), "no axis -3|axis -3"),
    "axes of a resize": (model("Resize", {}, X, constants=(NONE, np.float32([2.0]))), "1 scales or sizes for 2 axes"),
    "sizes of a resize": (model("Resize", {"axes": [1]}, X, constants=(NONE, NONE, np.array([2, 6]))), "2 scales or sizes"),
    "roi": (model("Resize", {"coordinate_transformation_mode": "tf_crop_and_resize", "axes": [1], "mode": "linear"}, X,
                  constants=(np.float32([0, 0, 1, 1]), NONE, np.array([3]))), "a roi of 4 numbers for 1 axes"),
    "precision": (model("QuantizeLinear", {"precision": 2}, X, np.float32(0.5)), "divides among u8"),
    "output of a dequantization": (model("DequantizeLinear", {"output_dtype": 3}, I, np.float32(0.5)), "gives i8"),
    "a part of integers": (model("Gemm", {"alpha": 0.5}, I, I.T), "it computes among i32, and 0.5 is none"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    given, why = REFUSED[name]
    with pytest.raises(OnnxError, match=f"the node.*({why})"):
        from_onnx(given)


def test_flags_are_attributes_of_onnx() -> None:
    """And each is declared as an integer."""
    kinds = {a.name: a.type for s in onnx.defs.get_all_schemas_with_history() for a in s.attributes.values()}
    assert {name for name in FLAGS if kinds.get(name) != onnx.defs.OpSchema.AttrType.INT} == set()


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.float32])
def test_shrink_subtracts_a_fraction(dtype: Any) -> None:
    """Of integers, too: -2 + 1.5 is -0.5, and 0 once it is cut."""
    x = np.arange(-3, 4).astype(dtype)
    [y] = evaluate(from_onnx(model("Shrink", {"lambd": 1.5, "bias": 1.5}, x))["forward"], {"x0": x})
    want = np.where(x > 1.5, x - 1.5, np.where(x < -1.5, x + 1.5, 0)).astype(dtype)
    assert np.asarray(y).dtype == dtype
    assert np.asarray(y).tolist() == want.tolist()


def test_integers_beside_integers() -> None:
    [y] = evaluate(from_onnx(model("Gemm", {"alpha": 2.0}, I, I.T))["forward"], {"x0": I, "x1": I.T.copy()})
    assert (np.asarray(y) == 2 * I @ I.T).all()


def test_a_scale_of_integers_rounds() -> None:
    """15 / 4 is 4, and -20 / 3 is -7."""
    x, scale = np.int32([15, -20, 6, 7, -9]), np.array([4, 3, 4, 2, 2], np.int32)
    given = model("QuantizeLinear", {"axis": 0, "output_dtype": 3}, x, constants=(scale,))
    [y] = evaluate(from_onnx(given)["forward"], {"x0": x})
    assert np.asarray(y).tolist() == [4, -7, 2, 4, -4]
