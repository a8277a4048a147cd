"""What the importer makes of a model: names, sizes, parameters; and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper
from onnx_models import add_initializers, model, run, tensor
from wasat.frontend.onnx import FromData, OnnxError, from_onnx
from wasat.frontend.onnx.undecided import FOLLOWS, NEEDED
from wasat.ir import parse_type

import wasat as ws

W = np.arange(96, dtype=np.float32).reshape(4, 24)


# -- names, sizes, parameters ------------------------------------------------------------------------------------------
def test_names_sizes_and_locations_survive() -> None:
    m = model("g (float[batch, 4] x) => (float[batch, 24] y) { y = MatMul(x, w) }")
    add_initializers(m, **{"layers.0.weight": W})
    m.graph.node[0].name, m.graph.node[0].input[1] = "/layers.0/MatMul", "layers.0.weight"
    p = from_onnx(m)
    (node,) = p["forward"].nodes
    assert repr(p["forward"].inputs[0]) == "%x: f32[batch, 4]"
    assert list(p.params) == ["layers.0.weight"]
    assert node.output.name == "y"
    assert node.loc is not None
    assert node.loc.scope == "/layers.0/MatMul"
    x = np.ones((3, 4), np.float32)
    np.testing.assert_allclose(run(p, x)[0], x @ W)


@pytest.mark.parametrize(
    "declared, shown",
    [
        (["batch size", 4], "f32[batch_size, 4]"), ([None, 4], "f32[x_0, 4]"), (["a-b", "a_b"], "f32[a_b, a_b_]"),
        (["s", "s + 1"], "f32[s, s + 1]"), (["s", "s+t"], "f32[s, s_t]"), (["max", 4], "f32[n_max, 4]"),
    ],
)  # fmt: skip
def test_symbolic_sizes(declared: Sequence[Any], shown: str) -> None:
    """Names become identifiers; an expression is one only over sizes that are declared themselves."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, declared)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    p = from_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    assert str(p["forward"].inputs[0].type) == shown


SHAPES = {
    "split heads": (
        "s = Shape(x) b = Gather(s, zero) n = Gather(s, one) b1 = Unsqueeze(b, z) n1 = Unsqueeze(n, z)"
        "t = Concat <axis: int = 0> (b1, n1, heads) y = Reshape(x, t)",
        "f32[b, s, 2, 4]",
    ),
    "minus one": (
        "s = Shape <start: int = 0, end: int = 1> (x) t = Concat <axis: int = 0> (s, minus) y = Reshape(x, t)", "f32[b, 8*s]",
    ),
    "zero copies": ("t = Concat <axis: int = 0> (z, minus) y = Reshape(x, t)", "f32[b, 8*s]"),
    "literal end": ("y = Slice(x, z, five, o)", "f32[b, min(5, s), 8]"),
    "all but the first": ("y = Slice(x, o, large, o)", "f32[b, max(0, s - 1), 8]"),
    "all but the last": ("y = Slice(x, z, minus, o)", "f32[b, max(0, s - 1), 8]"),
    "half": (
        "s = Shape <start: int = 1, end: int = 2> (x) h = Div(s, two) y = Slice(x, z, h, o)", "f32[b, s // 2, 8]",
    ),
    "last": ("y = Slice(x, minus, large, o)", "f32[b, 1, 8]"),
    "backwards": ("y = Slice(x, minus, small, o, minus)", "f32[b, s, 8]"),
    "expand": (
        "s = Shape(x) e = Equal(s, minus) w = Where(e, s, s) k = Constant <value = float {1}> () y = Expand(k, w)",
        "f32[b, s, 8]",
    ),
    "mask": (
        "s = Shape <start: int = 1, end: int = 2> (x) n = Squeeze(s, z) r = Range(zero, n, one) c = Unsqueeze(r, o)"
        "m = LessOrEqual(r, c) y = Cast <to: int = 1> (m)",
        "f32[s, s]",
    ),
    "product": ("k = Size(x) t = Unsqueeze(k, z) y = Reshape(x, t)", "f32[8*b*s]"),
}  # fmt: skip
CONSTANTS: dict[str, Any] = {
    "zero": np.int64(0), "one": np.int64(1), "z": np.int64([0]), "o": np.int64([1]), "two": np.int64([2]),
    "five": np.int64([5]), "minus": np.int64([-1]), "large": np.int64([2**63 - 1]), "small": np.int64([-(2**63)]), 
    "heads": np.int64([2, 4]),
}  # fmt: skip


@pytest.mark.parametrize("body, shown", SHAPES.values(), ids=SHAPES)
def test_arithmetic_on_shapes_stays_symbolic(body: str, shown: str) -> None:
    m = add_initializers(model(f"g (float[b, s, 8] x) => (float y) {{ {body} }}"), **CONSTANTS)
    p = from_onnx(m)
    assert str(p["forward"].outputs[0].type) == shown
    assert not p.params
    x = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    from onnx.reference import ReferenceEvaluator

    (want,) = ReferenceEvaluator(m).run(None, {"x": x})
    np.testing.assert_array_equal(run(p, x)[0], want)


def test_sizes_as_numbers_reach_the_graph() -> None:
    m = model("g (float[b, s] x) => (float[s] y) { n = Shape <start: int = 1> (x) f = Cast <to: int = 1> (n) y = Div(x, f) }")
    x = np.ones((2, 5), np.float32)
    np.testing.assert_allclose(run(from_onnx(m), x)[0], x / 5)


def test_constants_fold_through_the_references() -> None:
    m = model(
        "g (float[2] x) => (float[2] y) { a = Constant <value = float[2] {1, 4}> () b = Sqrt(a) c = Add(b, b) y = Mul(x, c) }"
    )
    p = from_onnx(m)
    assert [n.op.name for n in p["forward"].nodes] == ["constant", "mul"]
    np.testing.assert_array_equal(run(p, np.float32([1, 1]))[0], [2, 4])


def test_large_constants_are_not_written_out() -> None:
    m = model("g (float[1] x) => (float y) { c = ConstantOfShape(shape) y = Add(c, x) }")
    add_initializers(m, shape=np.int64([2**20, 2**40]))
    (broadcast, _) = [n for n in from_onnx(m)["forward"].nodes if n.op.name != "constant"]
    assert broadcast.op.name == "broadcast_to"


def test_small_integers_are_constants_and_the_rest_parameters() -> None:
    m = add_initializers(
        model("g (float[24] x) => (float[4, 24] y) { a = Gather(w, ids) b = Mul(a, s) y = Add(b, x) }"), w=W,
        ids=np.int64([3, 2, 1, 0]), s=np.float32(2),
    )  # fmt: skip
    p = from_onnx(m)
    assert list(p.params) == ["w"]
    x = np.ones(24, np.float32)
    np.testing.assert_allclose(run(p, x)[0], W[::-1] * 2 + x)


# -- external data -----------------------------------------------------------------------------------------------------------
def external(folder: Path, location: str, offset: int = 0, length: int | None = None, shape: Sequence[int] = W.shape) -> Path:
    m = model("g (float[b, 4] x) => (float y) { y = MatMul(x, w) }")
    t = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    fields: dict[str, Any] = {"location": location, "offset": offset, "length": W.nbytes if length is None else length}
    for k, v in fields.items():
        t.external_data.add(key=k, value=str(v))
    m.graph.initializer.append(t)
    path = folder / "m.onnx"
    path.write_bytes(m.SerializeToString())
    (folder / "w.bin").write_bytes(b"\0" * 64 + W.tobytes())
    return path


def test_external_data_are_mapped(tmp_path: Path) -> None:
    p = ws.from_onnx(external(tmp_path, "w.bin", 64))
    w = p.params["w"].load()
    assert isinstance(w.base, np.memmap)  # type: ignore[union-attr]
    np.testing.assert_array_equal(w, W)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"location": "../w.bin"}, "outside the model's folder"), ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "w.bin", "offset": 65}, "do not fit"), ({"location": "w.bin", "length": 10**12}, "do not fit"),
        ({"location": "w.bin", "offset": -4}, "do not fit"), ({"location": "none.bin"}, "No such file"),
        ({"location": "w.bin", "shape": (2**31, 2**31)}, "do not fit"), ({"location": ""}, "outside the model's folder"),
        ({"location": "."}, "which is no file"),
    ],
)  # fmt: skip
def test_external_data_that_are_not_there(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    with pytest.raises(OnnxError, match=message):
        from_onnx(external(folder, **given))


def test_external_data_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(W.tobytes())
    path = external(folder, "link")
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(OnnxError, match="outside the model's folder"):
        from_onnx(path)


def test_external_data_need_a_path(tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match="give the model's path"):
        from_onnx(external(tmp_path, "w.bin", 64).read_bytes())


# -- functions and control flow --------------------------------------------------------------------------------------------
FUNCTIONS = """<ir_version: 10, opset_import: ["": 23, "own": 1]>
g (float[n] x) => (float[n] y) { y = own.twice <factor: float = 3> (x) }
<domain: "own", opset_import: ["": 23, "own": 1]> twice <factor> (a) => (b) {
  f = Constant <value_float: float = @factor> () c = own.scale(a, f) b = Add(c, c) }
<domain: "own", opset_import: ["": 23]> scale (a, f) => (b) { b = Mul(a, f) }
"""


def test_functions_are_inlined() -> None:
    p = from_onnx(model(FUNCTIONS))
    np.testing.assert_array_equal(run(p, np.float32([1, 2]))[0], [6, 12])
    mul = next(n for n in p["forward"].nodes if n.op.name == "mul")
    assert mul.loc is not None
    assert mul.loc.scope == "y/c/b"


def test_a_function_that_calls_itself() -> None:
    text = FUNCTIONS.replace("b = Mul(a, f) }", "b = own.scale(a, f) }").replace('["": 23]> scale', '["": 23, "own": 1]> scale')
    with pytest.raises(OnnxError, match="function scale calls itself"):
        from_onnx(model(text))


@pytest.mark.parametrize("depth", [19, 40, 400])
def test_functions_that_grow_without_end(depth: int) -> None:
    layers = "".join(
        f'<domain: "own", opset_import: ["": 23, "own": 1]> f{i} (a) => (c) {{ b = own.f{i + 1}(a) c = own.f{i + 1}(b) }}\n'
        for i in range(depth)
    )
    text = f'<ir_version: 10, opset_import: ["": 23, "own": 1]> g (float[n] x) => (float[n] y) {{ y = own.f0(x) }}\n{layers}'
    with pytest.raises(OnnxError, match=rf"{2 * depth + 2} nodes are more than [\d,]+ once functions are inlined"):
        from_onnx(model(text + f'<domain: "own", opset_import: ["": 23]> f{depth} (a) => (b) {{ b = Neg(a) }}'))


def test_sequences_and_optionals_are_resolved() -> None:
    m = model(
        """g (float[2] x) => (seq(float[2]) y) {
             s = SequenceConstruct(x, x) n = Neg(x) i = Constant <value_int: int = 1> () y = SequenceInsert(s, n, i) }"""
    )
    p = from_onnx(m)
    assert p.origin.outputs == (("y", 3),)
    np.testing.assert_array_equal(run(p, np.float32([1, 2])), [[1, 2], [-1, -2], [1, 2]])


# -- refusals -----------------------------------------------------------------------------------------------------------------
def test_all_unsupported_operators_are_listed_at_once() -> None:
    m = model(
        """<ir_version: 10, opset_import: ["": 23, "com.other": 1]>
        g (float[n] x, bool c) => (float[n] y) {
          a = com.other.Thing(x)
          b = If (c) <then_branch = t () => (float[n] e) { e = com.other.Thing(a) },
                      else_branch = f () => (float[n] h) { h = Neg(a) }>
          u = Unique(b) y = com.other.Thing(u) }"""
    )
    m.graph.node[0].name = "first"
    with pytest.raises(OnnxError) as e:
        from_onnx(m)
    assert "com.other.Thing: 3 (first, e, y)\n  Unique: 1 (u)" in str(e.value)


def test_what_needs_numbers_of_a_run_is_listed_with_it() -> None:
    text = """<ir_version: 10, opset_import: ["": 23, "com.other": 1]>
        g (float[2] x, int64[1] s) => (float[k] y) {
          a = com.other.Thing(x) zero = Constant <value = float {0.0}> () m = ReduceMax <keepdims = 0> (x) go = Greater(m, zero)
          first = Loop (, go, x) <body = b (int64 i, bool c, float[2] v) => (bool d, float[2] e) { d = Identity(c) e = Neg(v) }>
          again = Loop (, , x) <body = b (int64 i, bool c, float[2] v) => (bool d, float[2] e) {
            e = Neg(v) t = ReduceMin <keepdims = 0> (v) d = Less(t, zero) }>
          both = If (go) <then_branch = t () => (int64[1, n] p) { p = Compress(x, go) },
                          else_branch = f () => (int64[1, n] q) { q = Compress(x, go) }>
          q2 = SequenceConstruct(x, x) one = Squeeze(s) item = SequenceAt(q2, one) y = Reshape(x, s) }"""
    lines = (
        "these must be known before a run:\n"
        "  the condition of Compress depends on the numbers in x: 2 (p, q)\n"
        "  the position of SequenceAt depends on the numbers in s: 1 (item)\n"
        "  the shape of Reshape depends on the numbers in s: 1 (y)\n"
        "  whether Loop turns again depends on the numbers in x: 1 (again)\n"
        "  whether Loop turns depends on the numbers in x: 1 (first)"
    )
    with pytest.raises(OnnxError) as e:
        from_onnx(model(text))
    assert str(e.value).endswith("not supported:\n  com.other.Thing: 1 (a)\n" + lines)
    assert not isinstance(e.value, FromData)
    with pytest.raises(FromData) as f:
        from_onnx(model(text.replace("a = com.other.Thing(x)", "")))
    assert str(f.value).endswith(lines)
    assert f.value.inputs == ("s", "x")


UNSURE = {
    "no turn": """g (float[2] x) => (float[2] y) { n = Constant <value = int64 {0}> () go = Constant <value = bool {1}> ()
      y = Loop (n, go, x) <body = b (int64 i, bool c, float[2] v) => (bool d, float[2] e) { e = Neg(v) d0 = Cast <to = 9> (v)
        d = ReduceMax <keepdims = 0> (d0) }> }""",
    "the other branch": """g (float[2] x) => (float[2] y) { c = Constant <value = bool {0}> ()
      y = If (c) <then_branch = t () => (int64[1, n] p) { k = Cast <to = 9> (x) p = Compress(x, k) },
                  else_branch = f () => (float[2] q) { q = Neg(x) }> }""",
    "a size": """g (float[2, 3] x) => (float[6] y) { a = Transpose(x) s = Shape(a) n = ReduceProd(s) y = Reshape(a, n) }""",
    "an input of that name": """g (float[2] x) => (float[2] y) { n = Constant <value = int64 {1}> ()
   y = Loop (n, , x) <body = b (int64 x, bool c, float[2] v) => (bool d, float[2] e) { d = Identity(c) e = CumSum(v, x) }> }""",
    "another value of that name": """g (float[2] x, bool c) => (float[2] y) {
      y = If (c) <then_branch = t () => (float[2] p) {
        x = Constant <value = int64[1] {2}> () z = Constant <value = float {1.0}> () p = Expand(z, x) },
                  else_branch = f () => (float[2] q) { q = Neg(x) }> }""",
}  # fmt: skip


@pytest.mark.parametrize("text", UNSURE.values(), ids=UNSURE)
def test_what_may_turn_out_to_be_known_is_imported(text: str) -> None:
    from_onnx(model(text)).verify()


def refused(m: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """What the list says of the model, and what its converters say without it."""
    with pytest.raises(OnnxError) as listed:
        from_onnx(m)
    with monkeypatch.context() as patch:
        patch.setattr("wasat.frontend.onnx.supported.undecided", lambda *_: ())
        with pytest.raises(OnnxError) as later:
            from_onnx(m)
    return str(listed.value), str(later.value)


ELSEWHERE = ("Loop", "SequenceAt")  # nodes that need a body, or a sequence


@pytest.mark.parametrize("op, at", [(op, i) for op, needed in NEEDED.items() for i in needed if op not in ELSEWHERE])
def test_a_needed_number_is_one_that_the_converter_refuses(op: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = ["x", *("k" for _ in range(4))] if op == "Slice" else ["x", "k", "", "k"] if op == "Pad" else ["x", "k", "k"]
    inputs = inputs[: max(at + 1, onnx.defs.get_schema(op, 26).min_input)]
    inputs[at] = "s"
    node = helper.make_node(op, inputs, ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.INT64 if op == "Range" else TensorProto.FLOAT, [2])
    s = helper.make_tensor_value_info("s", TensorProto.BOOL if op == "Compress" else TensorProto.INT64, [1])
    graph = helper.make_graph([node], "g", [x, s], [helper.make_empty_tensor_value_info("y")], [tensor("k", np.int64([1]))])
    listed, later = refused(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 26)]), monkeypatch)
    assert f"{NEEDED[op][at]} depends on the numbers in s: 1 (y)" in listed
    assert f"{op} node 'y'" in later


@pytest.mark.parametrize("op", sorted(FOLLOWS))
def test_what_follows_from_an_input_is_not_known(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logical, axes = op in ("And", "Or", "Xor", "Not"), op in NEEDED or op == "Gather"
    count = max(onnx.defs.get_schema(op, 26).min_input, 2 if op in ("Max", "Min", "Sum", "Concat") else 1)
    inputs = ["x", *["x" if op == "Concat" else "k" if axes else "w"] * (count - 1)]
    if op == "Where":
        inputs = ["go", "x", "w"]
    attrs = {"Cast": {"to": TensorProto.INT64}, "Concat": {"axis": 0}}.get(op, {})
    k = np.int64([0, 0]) if op == "Gather" else np.int64([2, 1]) if op == "Expand" else np.int64([0 if axes else 1])
    k = np.int64([1, 2]) if op == "Reshape" else np.int64(0) if op == "CumSum" else k
    element = TensorProto.BOOL if logical else TensorProto.FLOAT
    w = tensor("w", np.zeros((2, 1), bool if logical else np.float32))
    nodes = [helper.make_node(op, inputs, ["r"], **attrs), helper.make_node("Compress", ["w", "r"], ["y"])]
    x = helper.make_tensor_value_info("x", element, [1, 2])
    initializers = [w, tensor("k", k), tensor("go", np.zeros((), bool))]
    graph = helper.make_graph(nodes, "g", [x], [helper.make_empty_tensor_value_info("y")], initializers)
    for text in refused(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 26)]), monkeypatch):
        assert "the condition of Compress depends on the numbers in x" in text


DAMAGED = {
    "cycle": ("a = Add(x, b) b = Neg(a) y = Neg(b)", "nothing before it makes: the nodes are not in order, or form a cycle"),
    "unknown name": ("y = Neg(nowhere)", "reads 'nowhere'"),
    "twice": ("y = Neg(x) y = Abs(x)", "'y' is made twice"),
    "no output": ("a = Neg(x)", "the graph's outputs reads 'y'"),
    "too few inputs": ("y = Add(x)", "has 1 inputs and 1 outputs"),
    "missing input": ("y = Add(x, )", "inputs"),
    "axis": ("y = Softmax <axis: int = 7> (x)", "outside a tensor of rank 1"),
    "type": ("i = Cast <to: int = 7> (x) y = Add(x, i)", "element types differ"),
    "attribute": ('y = Softmax <axis: string = "no"> (x)', "Softmax node 'y'"),
    "element type": ("y = Cast <to: int = 14> (x)", "COMPLEX64, which is not supported"),
    "element code": ("y = Cast <to: int = 99> (x)", "element type 99"),
    "from data": ("i = Cast <to: int = 7> (x) y = Reshape(x, i)", "the shape of Reshape depends on the numbers in x"),
    "strings": ('y = Constant <value_string: string = "a"> ()', "only numeric tensors"),
}


@pytest.mark.parametrize("body, message", DAMAGED.values(), ids=DAMAGED)
def test_damaged_models(body: str, message: str) -> None:
    with pytest.raises(OnnxError, match=message):
        from_onnx(model(f"g (float[n] x) => (float[n] y) {{ {body} }}"))


def test_truncated_files(tmp_path: Path) -> None:
    m = add_initializers(model("g (float[b, 4] x) => (float[b, 24] y) { y = MatMul(x, w) }"), w=W)
    data = m.SerializeToString()
    path = tmp_path / "m.onnx"
    for n in range(0, len(data) - 1, 7):
        path.write_bytes(data[:n])
        with pytest.raises(OnnxError):
            from_onnx(path)
    with pytest.raises(OnnxError, match="cannot be read"):
        from_onnx(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("raw", [True, False])
def test_declared_sizes_are_checked_before_anything_is_allocated(raw: bool) -> None:
    m = model("g (float[b, 4] x) => (float y) { y = MatMul(x, w) }")
    t = tensor("w", W) if raw else helper.make_tensor("w", TensorProto.FLOAT, W.shape, W.ravel())
    t.dims[0] = 2**50
    m.graph.initializer.append(t)
    with pytest.raises(OnnxError, match=r"tensor w .* needs .* and has"):
        from_onnx(m)


def test_a_negative_size() -> None:
    m = model("g (float[b, 4] x) => (float y) { y = MatMul(x, w) }")
    t = tensor("w", W)
    t.dims[0] = -4
    m.graph.initializer.append(t)
    with pytest.raises(OnnxError, match="cannot be negative"):
        from_onnx(m)


@pytest.mark.parametrize("version", [0, 29, 2**40])
def test_operator_sets_that_are_not_known(version: int) -> None:
    m = model("g (float[n] x) => (float[n] y) { y = Neg(x) }")
    m.opset_import[0].version = version
    with pytest.raises(OnnxError, match=f"operator set {version} is not supported"):
        from_onnx(m)


def test_inputs_of_unknown_rank() -> None:
    m = model("g (float[n] x) => (float[n] y) { y = Neg(x) }")
    m.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(OnnxError, match="input 'x' has no shape"):
        from_onnx(m)
    assert str(from_onnx(m, types={"x": parse_type("f32[a, b]")})["forward"].outputs[0].type) == "f32[a, b]"
