"""Every operator of every operator set from 7 to 28 has the numbers that it has there, or is refused by its name."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
if not onnx.__version__.startswith("1.23."):
    pytest.skip(f"the cases are of onnx 1.23, not {onnx.__version__}", allow_module_level=True)

from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.runner import Runner, _normalize_tensor
from onnx_sets import FORMS, NEWEST, OLDEST, SCHEMAS, Form, older, refused, versions, with_node
from report import LIST
from suite import expected_failures, node_tests
from wasat.frontend.onnx import OnnxError, from_onnx
from wasat.ir import WasatError, evaluate

from wasat.onnx_backend import WasatBackend

FAILING = expected_failures(LIST)
MEANT_OTHERWISE = {
    ("Softmax", 13): "it was over all axes from one on", ("LogSoftmax", 13): "the same", ("Hardmax", 13): "the same",
    ("GroupNormalization", 21): "its scale belonged to a group", ("Clip", 11): "it took floats only",
    ("Resize", 13): "roi and scales had to be there", ("Scan", 25): "its body would change too", ("Loop", 25): "the same",
    ("RoiAlign", 16): "regions were not shifted by half a pixel",
    ("Dropout", 10): "its mask was of the type of its input",
}  # fmt: skip
"""(operator, version) -> why cases of the newest form mean something else in a form before it."""
FEW = 5
"""Cases for each form."""
OPERATORS = sorted({name for domain, name in SCHEMAS if not domain})


@cache
def cases(op: str) -> list[Any]:
    """The suite's cases of one node that pass in the newest form, short ones first."""
    found = [t for t in _single() if t.model.graph.node[0].op_type == op and t.name not in FAILING]
    return sorted(found, key=lambda t: (t.model.ByteSize(), t.name))


@cache
def _single() -> list[Any]:
    return [t for t in node_tests() if len(t.model.graph.node) == 1 and not t.model.graph.node[0].domain]


@cache
def swept(op: str) -> list[tuple[Any, Any, Any]]:
    """(case, schema, model) of each form before the newest one."""
    found = []
    for schema in list(versions("", op))[:-1]:
        before = [v for name, v in MEANT_OTHERWISE if name == op]
        if before and schema.since_version < before[0]:
            continue
        few = 0
        for t in cases(op):
            values = dict(zip((i.name for i in t.model.graph.input), map(_normalize_tensor, t.data_sets[0][0])))
            node = older(t.model.graph.node[0], values, schema)
            if node is not None and few < FEW:
                few += 1
                found.append((t, schema, with_node(t.model, node, max(schema.since_version, OLDEST))))
    return found


@pytest.mark.parametrize("op", [op for op in OPERATORS if swept(op)])
@pytest.mark.filterwarnings("ignore")
def test_older_forms_have_the_numbers_of_the_newest(op: str) -> None:
    """Where only the spelling changed: attributes that became inputs, types that came later."""
    for t, schema, model in swept(op):
        inputs, wanted = t.data_sets[0]
        values = dict(zip((i.name for i in t.model.graph.input), map(_normalize_tensor, inputs)))
        try:
            got = WasatBackend.prepare(model).run([values[i.name] for i in model.graph.input])
            Runner.assert_similar_outputs([_normalize_tensor(x) for x in wanted], got, t.rtol, t.atol)
        except Exception as e:
            raise AssertionError(f"{t.name} as {op} of operator set {schema.since_version}") from e


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_older_forms_mean_what_they_meant(form: Form) -> None:
    program = from_onnx(form.model())
    got = evaluate(program["forward"], form.inputs, {name: p.load() for name, p in program.params.items()})
    for x, want in zip(got, form.want):
        assert np.asarray(x).shape == np.shape(want)
        np.testing.assert_allclose(np.asarray(x, float), np.asarray(want, float), rtol=1e-4, atol=1e-5)


RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli"}
ELSEWHERE = {
    "ConcatFromSequence", "Optional", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceLength",
    "GlobalLpPool", "Scan", "Loop", "Softmax", "LogSoftmax", "Hardmax", "Resize", "Scatter", "Upsample",
    "LabelEncoder", *RANDOM,
}  # fmt: skip
"""Operators with forms that no case of one node is about; other tests are."""


@pytest.mark.parametrize("domain", ["", "ai.onnx.ml"])
def test_every_form_is_read_or_refused(domain: str) -> None:
    """A form without a case must be one that is refused, by a message that names operator and node."""
    held = {(op, s.since_version) for op in OPERATORS for _, s, _ in swept(op)}
    held |= {(f.op, s.since_version) for f in FORMS for s in versions("", f.op) if s.since_version <= f.opset}
    held |= {(op, list(versions("", op))[-1].since_version) for op in OPERATORS if cases(op)}
    held |= {(t.model.graph.node[0].op_type, s.since_version) for t in node_tests() for s in SCHEMAS.get(
        (domain, t.model.graph.node[0].op_type), ()) if domain and t.name not in FAILING}  # fmt: skip
    unheld = []
    for name in sorted(n for d, n in SCHEMAS if d == domain):
        for schema in versions(domain, name):
            if name in ELSEWHERE or (name, schema.since_version) in held:
                continue
            try:
                from_onnx(refused(domain, name, schema.since_version))
            except OnnxError as e:
                if all(part in str(e) for part in (name, "the node", "not supported")):
                    continue
            unheld.append((name, schema.since_version))
    assert not unheld


def test_an_attribute_of_another_operator_set_is_refused() -> None:
    x, y = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]), helper.make_empty_tensor_value_info("y")
    node = helper.make_node("Reshape", ["x", "s"], ["y"], allowzero=1)
    shape = onnx.numpy_helper.from_array(np.array([0, 3]), "s")
    m = helper.make_model(helper.make_graph([node], "g", [x], [y], [shape]), opset_imports=[helper.make_opsetid("", 13)])
    with pytest.raises(OnnxError, match="Reshape node 'y' has an attribute allowzero, which Reshape of operator set 13 has"):
        from_onnx(m)


@pytest.mark.parametrize("version", [2, 4])
def test_labels_are_looked_up(version: int) -> None:
    x, y = helper.make_tensor_value_info("x", TensorProto.INT64, [4]), helper.make_empty_tensor_value_info("y")
    attrs = {"keys_int64s": [3, -1], "values_floats": [0.5, 2.0], "default_float": 9.0}
    node = helper.make_node("LabelEncoder", ["x"], ["y"], domain="ai.onnx.ml", **attrs)
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("ai.onnx.ml", version)]
    program = from_onnx(helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=opsets))
    got = evaluate(program["forward"], {"x": np.array([-1, 3, 4, 3])})[0]
    assert np.asarray(got).tolist() == [2, 0.5, 9, 0.5]


@pytest.mark.parametrize("coordinates", ["half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("by", ["scales", "sizes"])
def test_resize_of_set_11_without_what_does_not_matter(by: str, coordinates: str) -> None:
    """It asks for roi and scales, even where they say nothing; onnxruntime reads files that leave them out."""
    inputs = ["x", "", "by"] if by == "scales" else ["x", "", "", "by"]
    numbers = np.float32([1, 1, 2, 1.5]) if by == "scales" else np.int64([2, 3, 8, 9])
    node = helper.make_node("Resize", inputs, ["y"], mode="linear", coordinate_transformation_mode=coordinates)
    x = np.sin(np.arange(144, dtype=np.float32)).reshape(2, 3, 4, 6)
    found = []
    for version in (11, 13):
        graph = helper.make_graph(
            [node], "g", [helper.make_tensor_value_info("x", 1, ["n", 3, 4, 6])], [helper.make_tensor_value_info("y", 1, None)],
            [numpy_helper.from_array(numbers, "by")])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
        found.append(evaluate(from_onnx(model)["forward"], {"x": x})[0])
    np.testing.assert_array_equal(*found, strict=True)
    graph.node[0].input[2] = ""
    if by == "scales":
        with pytest.raises(OnnxError, match="Resize"):
            from_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)]))


def test_training_of_an_old_normalization_is_refused() -> None:
    """Its further outputs said that it trains."""
    x, y = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]), helper.make_empty_tensor_value_info("y")
    node = helper.make_node("BatchNormalization", ["x", *"sbmv"], ["y", "m2", "v2"])
    known = [onnx.numpy_helper.from_array(np.ones(3, np.float32), k) for k in "sbmv"]
    m = helper.make_model(helper.make_graph([node], "g", [x], [y], known), opset_imports=[helper.make_opsetid("", 9)])
    with pytest.raises(OnnxError, match="BatchNormalization node 'y': its output 'm2' is not supported"):
        from_onnx(m)


def test_what_is_refused_inside_a_loop_names_both_nodes() -> None:
    body = helper.make_graph(
        [helper.make_node("Clip", ["v"], ["w"], name="inner", min=0.0)], "b",
        [helper.make_tensor_value_info(n, t, []) for n, t in (("i", 7), ("c", 9), ("v", 1))],
        [helper.make_tensor_value_info(n, t, []) for n, t in (("c", 9), ("w", 1))],
    )  # fmt: skip
    node = helper.make_node("Loop", ["n", "", "x"], ["y"], name="outer", body=body)
    x, y = helper.make_tensor_value_info("x", TensorProto.FLOAT, []), helper.make_empty_tensor_value_info("y")
    turns = onnx.numpy_helper.from_array(np.array(2), "n")
    m = helper.make_model(helper.make_graph([node], "g", [x], [y], [turns]), opset_imports=[helper.make_opsetid("", 13)])
    with pytest.raises(OnnxError, match="Loop node 'outer': Clip node 'inner' has an attribute min"):
        from_onnx(m)


@pytest.mark.parametrize("opset", [0, NEWEST + 1])
def test_other_operator_sets_are_refused(opset: int) -> None:
    m = helper.make_model(helper.make_graph([], "g", [], []), opset_imports=[helper.make_opsetid("", opset)])
    with pytest.raises(WasatError, match=f"operator set {opset} is not supported; 7 to 28 are"):
        from_onnx(m)
