"""Integers beyond what a float holds, through every operator that only moves, compares or adds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tvm")

from onnx import helper, numpy_helper
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.frontend.onnx import from_onnx
from wasat.ir import Program, evaluate

SIGNED = np.array([[2**53 + 1, -(2**53) - 1, 2**63 - 1], [-(2**63), 3, -(2**62) - 1]], np.int64)
UNSIGNED = np.array([[2**53 + 1, 2**63 + 1, 2**64 - 1], [2**63 - 1, 3, 2**64 - 3]], np.uint64)
I = np.int64


def cases(x: np.ndarray) -> dict[str, tuple[dict[str, Any], dict[str, Any], Any]]:
    """operator -> (attributes, further operands that are constants, what is right), of the operand ``x``."""
    t, big, row = x.dtype.type, x[0, 1], x[1]
    return {
        "Pad": ({}, {"p": np.array([0, 1, 1, 0]), "v": big}, np.pad(x, [(0, 1), (1, 0)], constant_values=big)),
        "Clip": ({}, {"l": x[0, 0] - t(2), "h": x[0, 0]}, np.clip(x, x[0, 0] - t(2), x[0, 0])),
        "Max": ({}, {"b": row}, np.maximum(x, row)), "Min": ({}, {"b": row}, np.minimum(x, row)),
        "Equal": ({}, {"b": x - t(1)}, np.zeros(x.shape, bool)), "Less": ({}, {"b": x[::-1] - t(1)}, x < x[::-1] - t(1)),
        "GreaterOrEqual": ({}, {"b": x[::-1]}, x >= x[::-1]),
        "CumSum": ({}, {"a": I([1])}, np.cumsum(x, 1, dtype=t)),
        "Gather": ({"axis": 1}, {"i": np.array([2, 0])}, x[:, [2, 0]]),
        "GatherElements": ({"axis": 1}, {"i": np.array([[2], [1]])}, np.take_along_axis(x, np.array([[2], [1]]), 1)),
        "GatherND": ({}, {"i": np.array([[0, 2], [1, 0]])}, x[[0, 1], [2, 0]]),
        "ScatterElements": ({"axis": 1}, {"i": np.array([[2]]), "u": np.array([[big]])}, np.array([[x[0, 0], big, big], row])),
        "Concat": ({"axis": 0}, {"b": x[::-1]}, np.concatenate([x, x[::-1]])),
        "Slice": ({}, {"s": np.array([2]), "e": np.array([-4]), "a": np.array([1]), "k": np.array([-1])}, x[:, ::-1]),
        "Transpose": ({}, {}, x.T), "Tile": ({}, {"r": np.array([1, 2])}, np.tile(x, (1, 2))),
        "Expand": ({}, {"s": np.array([2, 2, 3])}, np.broadcast_to(x, (2, 2, 3))),
        "Compress": ({"axis": 1}, {"c": np.array([True, False, True])}, x[:, [0, 2]]),
        "TopK": ({}, {"k": np.array([2])}, np.sort(x, 1)[:, ::-1][:, :2]),
        "ReduceMax": ({"keepdims": 0}, {"a": np.array([1])}, x.max(1)),
        "ReduceMin": ({"keepdims": 0}, {"a": np.array([1])}, x.min(1)),
        "ReduceSum": ({"keepdims": 0}, {"a": np.array([1])}, x.sum(1, dtype=t)),
        "ArgMax": ({"axis": 1, "keepdims": 0}, {}, x.argmax(1)), "ArgMin": ({"axis": 1, "keepdims": 0}, {}, x.argmin(1)),
        "Trilu": ({"upper": 0}, {}, np.tril(x)),
        "ReverseSequence": ({"batch_axis": 0, "time_axis": 1}, {"n": np.array([3, 2])}, np.array([x[0, ::-1], row[[1, 0, 2]]])),
        "Sub": ({}, {"b": row}, x - row), "Mul": ({}, {"b": t(3)}, x * t(3)),
        "Mod": ({}, {"b": t(1000)}, x % t(1000)),
        "Div": ({}, {"b": t(3)}, np.array([[int(v) // 3 if v >= 0 else -(-int(v) // 3) for v in r] for r in x], t)),
        "Identity": ({}, {}, x), "Flatten": ({}, {}, x),
    }  # fmt: skip


def made() -> dict[str, tuple[Any, dict[str, Any], np.ndarray]]:
    """name -> (model, inputs, what is right)."""
    found = {}
    for x in (SIGNED, UNSIGNED):
        code = helper.np_dtype_to_tensor_dtype(x.dtype)
        for op, (attrs, constants, want) in cases(x).items():
            node = helper.make_node(op, ["x", *constants], ["y", "places"] if op == "TopK" else ["y"], **attrs)
            info, y = helper.make_tensor_value_info("x", code, ["n", 3]), helper.make_empty_tensor_value_info("y")
            stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
            found[f"{op}_{x.dtype}"] = node, [info], y, stored, {"x": x}, np.asarray(want)
        c = np.array([[True, False, True]] * 2)
        found[f"Where_{x.dtype}"] = (
            helper.make_node("Where", ["c", "x", "b"], ["y"]),
            [helper.make_tensor_value_info("c", 9, [2, 3]), helper.make_tensor_value_info("x", code, [2, 3])],
            helper.make_empty_tensor_value_info("y"), [numpy_helper.from_array(x[0, 1], "b")], {"c": c, "x": x},
            np.where(c, x, x[0, 1]),
        )  # fmt: skip
        found[f"ConstantOfShape_{x.dtype}"] = (
            helper.make_node("ConstantOfShape", ["s"], ["y"], value=numpy_helper.from_array(x[0, 1:2])), [],
            helper.make_empty_tensor_value_info("y"), [numpy_helper.from_array(np.array([5000]), "s")], {},
            np.full(5000, x[0, 1]),
        )  # fmt: skip
    for start, stop, step in ((2**53 + 1, 2**53 + 9, 2), (2**63 - 1, 2**63 - 8, -3), (-(2**63), 2**63 - 1, 2**62 + 1)):
        bounds = [numpy_helper.from_array(I(v), k) for k, v in zip("abc", (start, stop, step))]
        found[f"Range_{start}"] = (
            helper.make_node("Range", ["a", "b", "c"], ["y"]), [], helper.make_empty_tensor_value_info("y"), bounds, {},
            np.array(range(start, stop, step), I),
        )  # fmt: skip
    opset = [helper.make_opsetid("", 18)]
    return {
        name: (helper.make_model(helper.make_graph([node], "g", inputs, [y], stored), opset_imports=opset), feeds, want)
        for name, (node, inputs, y, stored, feeds, want) in found.items()
    }


MODELS = made()
PROGRAMS = {name: from_onnx(m) for name, (m, _, _) in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_interpreted(name: str) -> None:
    program, (_, feeds, want) = PROGRAMS[name], MODELS[name]
    got = np.asarray(evaluate(program["forward"], feeds, {n: p.load() for n, p in program.params.items()})[0])
    assert got.dtype == want.dtype
    assert got.tolist() == want.tolist()


@pytest.fixture(scope="module")
def compiled() -> Runner:
    """All of them in one library."""
    whole = Program({})
    for name, program in PROGRAMS.items():
        g = whole.graphs[name] = program["forward"].clone()
        g.name = name
        whole.params.update({f"{name}.{n}": program.params[n] for n in g.params})
        g.params = {f"{name}.{n}": v for n, v in g.params.items()}
    return Runner(whole, cpu())


@pytest.mark.parametrize("name", MODELS)
def test_compiled(name: str, compiled: Runner) -> None:
    _, feeds, want = MODELS[name]
    got = next(iter(compiled(name, feeds).values()))
    assert got.dtype == want.dtype
    assert got.tolist() == want.tolist()
