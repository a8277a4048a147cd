"""Models that were damaged at random, or ask for too much: a clear error, soon, and nothing large allocated."""

from __future__ import annotations

import contextlib
import itertools
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper
from suite import node_tests
from wasat.frontend.onnx import OnnxError, from_onnx

HUGE = [-1, 0, 1, 3, 1 << 20, 1 << 31, 1 << 62, -(1 << 63)]
MODELS = node_tests()[::7]


def damage_bytes(m: onnx.ModelProto, rng: random.Random) -> bytes:
    data = bytearray(m.SerializeToString())
    for _ in range(rng.choice([1, 1, 2, 4])):
        k = rng.randrange(len(data))
        data[k] = rng.choice([rng.randrange(256), 0, 255, 127, 128, data[k] ^ 1])
    return bytes(data)


def damage_fields(m: onnx.ModelProto, rng: random.Random) -> onnx.ModelProto:
    m = onnx.ModelProto.FromString(m.SerializeToString())
    for _ in range(rng.choice([1, 1, 2])):
        node = rng.choice(m.graph.node)
        if node.attribute and rng.random() < 0.6:
            a = rng.choice(node.attribute)
            if a.type == onnx.AttributeProto.INT:
                a.i = rng.choice(HUGE)
            elif a.type == onnx.AttributeProto.INTS and a.ints:
                a.ints[rng.randrange(len(a.ints))] = rng.choice(HUGE)
            elif a.type == onnx.AttributeProto.FLOAT:
                a.f = rng.choice([0.0, -1.0, float("nan"), 1e30])
            elif a.type == onnx.AttributeProto.TENSOR and a.t.dims:
                a.t.dims[rng.randrange(len(a.t.dims))] = rng.choice(HUGE)
        elif m.graph.input:
            shape = rng.choice(m.graph.input).type.tensor_type.shape
            if shape.dim:
                shape.dim[rng.randrange(len(shape.dim))].dim_value = rng.choice(HUGE)
    return m


def some_constants(test: Any, rng: random.Random) -> dict[str, np.ndarray]:
    """Integer inputs as constants, now and then with a number that nobody expects."""
    out = {}
    for info, x in zip(test.model.graph.input, test.data_sets[0][0]):
        if isinstance(x, np.ndarray) and x.dtype == np.int64 and rng.random() < 0.9:
            out[info.name] = x = x.copy()
            if x.size and x.ndim and rng.random() < 0.5:
                x.ravel()[rng.randrange(x.size)] = rng.choice(HUGE)
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", [damage_bytes, damage_fields])
def test_random_damage(damage: Any) -> None:
    rng = random.Random(0)
    for _ in range(2500):
        test = rng.choice(MODELS)
        given = some_constants(test, rng)
        with contextlib.suppress(OnnxError):  # and nothing else
            from_onnx(damage(test.model, rng), constants=given)


F, I = TensorProto.FLOAT, TensorProto.INT64
BIG = 2**40
ASKING: dict[str, tuple[list[str], dict[str, Any], dict[str, Any], str | None]] = {
    # operator: inputs, attributes, constants, the refusal (None: it is imported, its shape being only a shape)
    "Split": (["x"], {"num_outputs": BIG}, {}, None),
    "Col2Im": (["x", "a", "b"], {}, {"a": [BIG, 2], "b": [1, 1]}, "none, or too many"),
    "MaxPool": (["x"], {"kernel_shape": [2, 2], "pads": [BIG, 0, 0, 0]}, {}, "none, or too many"),
    "Det": (["x"], {}, {}, "would be unrolled"),
    "LSTM": (["t", "w", "r"], {"hidden_size": 2}, {}, None),
    "Scan": (["x"], {"num_scan_inputs": BIG}, {}, "num_scan_inputs"),
    "SplitToSequence": (["x"], {"axis": 2}, {}, "more than 10000 parts"),
    "MelWeightMatrix": (["a", "a", "a", "f", "f"], {}, {"a": BIG}, "filters over"),
    "RoiAlign": (["x", "q", "o"], {"output_height": 2**31, "sampling_ratio": 2}, {}, "none, or too many"),
    "DeformConv": (["x", "k", "d"], {}, {}, "is too large"),
    "TfIdfVectorizer": (
        ["j"], {
            "mode": "TF", "pool_int64s": [1], "ngram_counts": [0], "ngram_indexes": [BIG], "min_gram_length": 1,
            "max_gram_length": 1, "max_skip_count": 0,
        }, {}, "must lie below",
    ),
    "Resize": (["x", "", "s"], {"mode": "linear", "antialias": 1}, {"s": [1.0, 1.0, 1.0, 1e-9]}, "too many pixels"),
    "Range": (["z", "a", "u"], {}, {"z": 0, "a": 2**50, "u": 1}, None),
    "Tile": (["x", "a"], {}, {"a": [2**20] * 4}, None),
    "OneHot": (["j", "a", "v"], {}, {"a": 2**50, "v": [0.0, 1.0]}, None),
}  # fmt: skip
SIZES = {
    "x": (F, [1, 1, 20_000, 20_000]), "t": (F, [20_000, 1, 2]), "w": (F, [1, 8, 2]), "r": (F, [1, 8, 2]), "q": (F, [1, 4]),
    "o": (I, [1]), "k": (F, [1, 1, 500, 500]), "d": (F, [1, 500_000, 1, 1]), "j": (I, [5]), "f": (F, []),
}  # fmt: skip


@pytest.mark.parametrize("op", ASKING)
def test_asking_for_too_much(op: str) -> None:
    names, attrs, constants, message = ASKING[op]
    if op == "Scan":
        body = helper.make_graph(
            [helper.make_node("Neg", ["e"], ["g"])], "b", [helper.make_tensor_value_info("e", F, None)],
            [helper.make_tensor_value_info("g", F, None)],
        )  # fmt: skip
        attrs = {**attrs, "body": body}
    arrays = {k: np.asarray(v, np.float32 if op == "Resize" or k == "v" else np.int64) for k, v in constants.items()}
    if op == "MelWeightMatrix":
        arrays["f"] = np.float32(1)
    outputs = ["y", "places"] if op == "MaxPool" else ["y"]
    inputs = [helper.make_tensor_value_info(n, *SIZES[n]) for n in dict.fromkeys(names) if n in SIZES and n not in arrays]
    initializers = [onnx.numpy_helper.from_array(v, k) for k, v in arrays.items()]
    node, y = helper.make_node(op, names, outputs, **attrs), helper.make_tensor_value_info("y", F, None)
    graph = helper.make_graph([node], "g", inputs, [y], initializers)
    m = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    tracemalloc.start()
    try:
        if message is None:
            from_onnx(m)  # its shape is only a shape
        else:
            with pytest.raises(OnnxError, match=message):
                from_onnx(m)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def small(nodes: list[Any], inputs: dict[str, list[Any]], stored: dict[str, Any], functions: Any = ()) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(k, F, s) for k, s in inputs.items()]
    known = [onnx.numpy_helper.from_array(np.asarray(v, np.int64), k) for k, v in stored.items()]
    graph = helper.make_graph(nodes, "g", infos, [helper.make_empty_tensor_value_info("y")], known)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("c", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions))


def doubling(first: str, count: int) -> list[Any]:
    """Joined with itself again and again."""
    names = [first, *(f"v{i}" for i in range(count)), "y"]
    return [helper.make_node("Concat", [a, a], [b], axis=0) for a, b in itertools.pairwise(names)]


SHAPE = helper.make_node("Shape", ["x"], ["q"])
GROWING: dict[str, Any] = {
    "sizes tiled": ([SHAPE, helper.make_node("Tile", ["q", "t"], ["y"])], {"x": ["n", 3]}, {"t": [10**7]}),
    "sizes expanded": ([SHAPE, helper.make_node("Expand", ["q", "t"], ["y"])], {"x": ["n", 3]}, {"t": [BIG, 2]}),
    "sizes padded": ([SHAPE, helper.make_node("Pad", ["q", "t"], ["y"])], {"x": ["n", 3]}, {"t": [0, BIG]}),
    "sizes doubled": ([SHAPE, *doubling("q", 40)], {"x": ["n", 3]}, {}),
    "constants doubled": (doubling("t", 60), {}, {"t": [1, 2]}),
}


@pytest.mark.parametrize("name", GROWING)
def test_a_few_bytes_stay_few(name: str) -> None:
    """Whether they are imported (their shape being only a shape) or refused: soon, and with little memory."""
    model = small(*GROWING[name])
    tracemalloc.start()
    try:
        with contextlib.suppress(OnnxError):
            from_onnx(model)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_a_shape_has_no_millions_of_sizes() -> None:
    one = onnx.numpy_helper.from_array(np.array([1]), "")
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["k"], value=one), helper.make_node("Reshape", ["x", "k"], ["y"])]
    with pytest.raises(OnnxError, match="Reshape node 'y': the shape of Reshape has 20000000 numbers, more than 4096"):
        from_onnx(small(nodes, {"x": [1]}, {"s": [20_000_000]}))


def test_functions_that_call_the_one_before_twice() -> None:
    opsets, functions = [helper.make_opsetid("", 18), helper.make_opsetid("c", 1)], []
    for i in range(30):
        name, domain = (f"f{i - 1}", "c") if i else ("Neg", "")
        twice = [helper.make_node(name, [a], [b], domain=domain) for a, b in (("a", "m"), ("m", "z"))]
        functions.append(helper.make_function("c", f"f{i}", ["a"], ["z"], twice, opsets))
    with pytest.raises(OnnxError, match=r"more than [0-9,]+ once functions are inlined"):
        from_onnx(small([helper.make_node("f29", ["x"], ["y"], domain="c")], {"x": [2]}, {}, functions))


def test_numbers_that_take_too_long_to_compute() -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["k"]), helper.make_node("MatMul", ["k", "k"], ["m"]),
        helper.make_node("NonZero", ["m"], ["y"]),
    ]  # fmt: skip
    with pytest.raises(OnnxError, match=r"NonZero node 'y': .* depends on more than can be computed while importing"):
        from_onnx(small(nodes, {}, {"s": [8000, 8000]}))


def test_a_long_loop_over_constants_is_not_run_for_a_number() -> None:
    body = helper.make_graph(
        [helper.make_node("Neg", ["v"], ["w"])], "b",
        [helper.make_tensor_value_info("i", I, []), helper.make_tensor_value_info("c", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", I, None)],
        [helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("w", I, None)],
    )  # fmt: skip
    nodes = [helper.make_node("Loop", ["n", "", "t"], ["k"], body=body), helper.make_node("Reshape", ["x", "k"], ["y"])]
    with pytest.raises(OnnxError, match=r"Reshape node 'y': the shape of Reshape depends on .* while importing"):
        from_onnx(small(nodes, {"x": [2]}, {"n": 10**9, "t": [2]}))
