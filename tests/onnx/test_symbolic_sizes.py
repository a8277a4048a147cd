"""Sizes that other sizes decide, at 0 and 1, below and above the constants: what ONNX says, interpreted and compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from wasat.frontend.onnx import from_onnx
from wasat.ir import IRError

import wasat as ws

END = 2**63 - 1
F = TensorProto.FLOAT


def model(nodes: list[Any], inputs: dict[str, list[Any]], opset: int = 22, **constants: Any) -> onnx.ModelProto:
    given = [helper.make_tensor_value_info(k, F, v) for k, v in inputs.items()]
    stored = [numpy_helper.from_array(np.asarray(x), k) for k, x in constants.items()]
    graph = helper.make_graph(nodes, "g", given, [onnx.ValueInfoProto(name="y")], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def count(*shape: int) -> np.ndarray:
    return np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def sliced(text: str) -> tuple[onnx.ModelProto, list[tuple[dict[str, np.ndarray], np.ndarray]]]:
    """x[:, text] of every width from 0 to 7."""
    at = slice(*(int(p) if p else None for p in text.split(":")))
    step = at.step or 1
    start = at.start if at.start is not None else 0 if step > 0 else END
    stop = at.stop if at.stop is not None else END if step > 0 else -END
    bounds = {k: np.array([v]) for k, v in (("start", start), ("stop", stop), ("axis", 1), ("step", step))}
    node = helper.make_node("Slice", ["x", "start", "stop", "axis", "step"], ["y"])
    widths = [w for w in range(8) if not (text == "-1:" and w == 0)]  # there is a last element
    runs = [({"x": count(2, w)}, count(2, w)[:, at]) for w in widths]
    return model([node], {"x": ["b", "s"]}, **bounds), runs


def _width(of: str, name: str) -> Any:
    return helper.make_node("Shape", [of], [name], start=1, end=2)


ONE, ZERO = np.array([1]), np.array([0])
CASES: dict[str, tuple[onnx.ModelProto, list[tuple[dict[str, np.ndarray], np.ndarray]]]] = {
    **{f"x[:, {t}]": sliced(t) for t in (
        "-4:", ":-4", "4:1:-1", "3:", ":3", "1:5:2", "-3:-1", "::-2", "-2::-1", "5::-3", "-1:", ":1:-1", "6:2",
    )},
    "the last of another width, of one": (  # from -0 on there is everything, as from -1 on
        model([_width("z", "w"), helper.make_node("Neg", ["w"], ["n"]),
               helper.make_node("Slice", ["x", "n", "end", "one"], ["y"])],
              {"x": ["b", 1], "z": ["b", "t"]}, end=np.array([END]), one=ONE),
        [({"x": count(2, 1), "z": count(2, t)}, count(2, 1)) for t in (0, 1, 3)],
    ),
    "the last of another width, of a table of one": (  # as torch.export cuts it for MPT: from max(1 - t, 0) on
        model([_width("z", "w"), helper.make_node("Sub", ["one", "w"], ["n"]),
               helper.make_node("Max", ["n", "zero"], ["first"]),
               helper.make_node("Slice", ["table", "first", "end", "one"], ["c"]), helper.make_node("Add", ["c", "z"], ["y"])],
              {"z": ["b", "t"]}, end=np.array([END]), one=ONE, zero=ZERO, table=np.array([[5.0]], np.float32)),
        [({"z": count(2, t)}, count(2, t) + 5) for t in (0, 1, 3)],
    ),
    "up to another width": (
        model([_width("z", "w"), helper.make_node("Slice", ["x", "zero", "w", "one"], ["y"])],
              {"x": ["b", "s"], "z": ["b", "t"]}, zero=ZERO, one=ONE),
        [({"x": count(2, 3), "z": count(2, t)}, count(2, 3)[:, :t]) for t in (0, 1, 3, 6)],
    ),
    "up to another width less four": (
        model([_width("z", "w"), helper.make_node("Sub", ["w", "four"], ["e"]),
               helper.make_node("Slice", ["x", "zero", "e", "one"], ["y"])],
              {"x": ["b", "s"], "z": ["b", "t"]}, zero=ZERO, one=ONE, four=np.array([4])),
        [({"x": count(2, 3), "z": count(2, t)}, count(2, 3)[:, : t - 4]) for t in (2, 3, 4, 5, 9)],
    ),
    "at most 10**9": (
        model([helper.make_node("Slice", ["x", "zero", "stop", "zero"], ["s"]), helper.make_node("Softmax", ["s"], ["y"])],
              {"x": ["n", 1, 4]}, zero=ZERO, stop=np.array([10**9])),
        [({"x": np.zeros((n, 1, 4), np.float32)}, np.full((n, 1, 4), 0.25, np.float32)) for n in (0, 1, 3)],
    ),
    "expand to constants": (
        model([helper.make_node("Expand", ["x", "shape"], ["y"])], {"x": ["b", "k"]}, shape=np.array([5, 1, 4])),
        [({"x": x}, np.broadcast_to(x, (5, len(x), 4)).copy()) for x in (count(1, 4), count(3, 1), count(3, 4))],
    ),
    "expand to another's shape": (
        model([helper.make_node("Shape", ["z"], ["shape"]), helper.make_node("Expand", ["x", "shape"], ["e"]),
               helper.make_node("Mul", ["e", "z"], ["y"])], {"x": ["b", "s"], "z": ["c", "t"]}),
        [({"x": x, "z": count(2, 3)}, x * count(2, 3)) for x in (count(1, 3), count(2, 1), count(2, 3), count(1, 1))],
    ),
    "expand both ways": (
        model([helper.make_node("Shape", ["z"], ["shape"]), helper.make_node("Expand", ["x", "shape"], ["y"])],
              {"x": ["b", "s"], "z": ["c", "t"]}),
        [({"x": count(*a), "z": count(*b)}, np.broadcast_to(count(*a), np.broadcast_shapes(a, b)).copy()) for a, b in (
            ((2, 1), (1, 1)), ((2, 1), (1, 3)), ((1, 3), (2, 1)), ((2, 3), (2, 3)), ((1, 1), (2, 3)), ((0, 3), (1, 1)),
            ((1, 1), (0, 3)), ((0, 1), (0, 1)),
        )],
    ),
    "max pool, ceil": (
        model([helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2], strides=[3], ceil_mode=1)], {"x": [1, 1, "n"]}),
        [({"x": count(1, 1, 6)}, np.array([[[2, 5]]], np.float32)),
         ({"x": count(1, 1, 7)}, np.array([[[2, 5, 7]]], np.float32)),
         ({"x": count(1, 1, 8)}, np.array([[[2, 5, 8]]], np.float32))],
    ),
    "average pool, ceil": (
        model([helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2], strides=[3], ceil_mode=1)], {"x": [1, 1, "n"]}),
        [({"x": count(1, 1, 6)}, np.array([[[1.5, 4.5]]], np.float32)),
         ({"x": count(1, 1, 7)}, np.array([[[1.5, 4.5, 7]]], np.float32))],
    ),
    "resize with aligned corners": (
        model([helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear",
                                coordinate_transformation_mode="align_corners")],
              {"x": [1, 1, 1, "n"]}, scales=np.array([1, 1, 1, 1.7], np.float32)),
        [({"x": np.arange(5, dtype=np.float32).reshape(1, 1, 1, 5)},
          np.linspace(0, 4, 8, dtype=np.float32).reshape(1, 1, 1, 8)),
         ({"x": np.zeros((1, 1, 1, 1), np.float32)}, np.zeros((1, 1, 1, 1), np.float32))],
    ),
    "resize between two pixels": (  # 4.5 in f32, and more than that where 0.7 is the f32's own value
        model([helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest")],
              {"x": [1, 1, 1, "n"]}, scales=np.array([1, 1, 1, 0.7], np.float32)),
        [({"x": count(1, 1, 1, 7)}, np.array([[[[1, 3, 4, 5]]]], np.float32)),
         ({"x": count(1, 1, 1, 2)}, np.array([[[[1]]]], np.float32))],
    ),
    **{f"resize about the middle, {near}": (  # 0.5000002 is between two pixels, as onnxruntime sees it
        model([helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest", nearest_mode=near,
                                coordinate_transformation_mode="half_pixel_symmetric")],
              {"x": [1, 1, 1, "n"]}, scales=np.array([1, 1, 1, 0.6], np.float32)),
        [({"x": count(1, 1, 1, len_)}, np.array([[[want]]], np.float32)) for len_, want in runs],
    ) for near, runs in {
        "round_prefer_floor": [(7, [1, 3, 5, 6]), (11, [2, 3, 5, 7, 8, 10])],
        "round_prefer_ceil": [(7, [2, 3, 5, 7]), (11, [2, 4, 5, 7, 9, 10])],
        "floor": [(5, [1, 2, 4]), (13, [1, 3, 5, 6, 8, 10, 12])],
    }.items()},
    "the scale of zeros": (
        model([helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "y", "z"])], {"x": ["n"]}),
        [({"x": x}, np.array(want, np.float32)) for x, want in ((0 * count(3), 1), (count(255), 1), (count(51), 0.2))],
    ),
}  # fmt: skip


def test_the_last_element_by_computed_bounds_has_size_1() -> None:
    file = model([_width("x", "w"), helper.make_node("Sub", ["w", "one"], ["last"]),
                  helper.make_node("Slice", ["x", "last", "w", "one"], ["y"])], {"x": ["b", "s"]}, one=ONE)  # fmt: skip
    assert str(from_onnx(file)["forward"].outputs[0].type) == "f32[b, 1]"


def test_a_table_cut_twice_has_what_is_asked_for() -> None:
    """Rows, then columns of what is made of them; sizes that torch computes from such a part are those of what it met."""
    nodes = [
        _width("x", "s"), helper.make_node("Slice", ["table", "zero", "s", "zero"], ["rows"]),
        helper.make_node("Neg", ["rows"], ["r"]), helper.make_node("Slice", ["r", "zero", "s", "one"], ["part"]),
        helper.make_node("Add", ["x", "part"], ["z"]),
        helper.make_node("Min", ["s", "nine"], ["least"]), helper.make_node("Concat", ["least", "least"], ["shape"], axis=0),
        helper.make_node("Reshape", ["z", "shape"], ["y"]),
    ]  # fmt: skip
    table = np.arange(81, dtype=np.float32).reshape(9, 9)
    m = model(nodes, {"x": ["s", "s"]}, table=table, zero=np.array([0]), one=ONE, nine=np.array([9]))
    g = from_onnx(m)["forward"]
    assert {str(n.output.type) for n in g.nodes if n.op.name in ("slice", "add", "reshape")} <= {"f32[s, 9]", "f32[s, s]"}


def test_sizes_that_only_a_reshape_bounds_stay_bounded() -> None:
    """No table says that there are no more than nine."""
    nodes = [
        _width("x", "s"), helper.make_node("Min", ["s", "nine"], ["least"]),
        helper.make_node("Concat", ["least", "least"], ["shape"], axis=0), helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]  # fmt: skip
    program = from_onnx(model(nodes, {"x": ["s", "s"]}, nine=np.array([9])))
    for s in (1, 9):
        x = np.ones((s, s), np.float32)
        np.testing.assert_array_equal(ws.run(program, x=x)["y"], x)
    with pytest.raises(IRError, match="min"):
        ws.run(program, x=np.ones((10, 10), np.float32))


def test_the_last_of_as_many_as_there_are() -> None:
    """``x[-s:]``, as masks of padding are cut by exports of Mamba2's kin: all, of none, too."""
    file = model([_width("x", "w"), helper.make_node("Neg", ["w"], ["from"]),
                  helper.make_node("Slice", ["x", "from", "end", "one"], ["y"])],
                 {"x": ["b", "s"]}, one=ONE, end=np.array([2**63 - 1]))  # fmt: skip
    program = from_onnx(file)
    assert str(program["forward"].outputs[0].type) == "f32[b, s]"
    for s in (3, 0):
        np.testing.assert_array_equal(ws.run(program, x=count(2, s))["y"], count(2, s))


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name: str) -> None:
    file, runs = CASES[name]
    program = from_onnx(file)
    for inputs, want in runs:
        got = np.asarray(ws.run(program, **inputs)["y"])
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("sizes", [((2, 3), (3, 3)), ((3, 3), (2, 3)), ((0, 1), (3, 1)), ((3, 1), (0, 1))])
def test_expand_to_sizes_that_are_neither_equal_nor_1_is_refused(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    program = from_onnx(CASES["expand both ways"][0])
    with pytest.raises(IRError, match="broadcast_to"):
        ws.run(program, x=count(*sizes[0]), z=count(*sizes[1]))


@pytest.fixture(scope="module")
def compiled() -> Any:
    """All files as graphs of one library."""
    from wasat.backends.tvm.build import Runner
    from wasat.backends.tvm.targets import cpu
    from wasat.ir import Program

    programs = [ws.optimize(from_onnx(file), kv_cache=False)[0] for file, _ in CASES.values()]
    graphs, params = {}, {}
    for i, p in enumerate(programs):
        graphs[f"case{i}"] = p["forward"].clone(f"case{i}")
        assert not p.params
        params |= p.params
    return Runner(Program(graphs, params), cpu())


@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str, compiled: Any) -> None:
    for inputs, want in CASES[name][1]:
        got = compiled(f"case{list(CASES).index(name)}", inputs)["y"]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-6)
