"""Operators as older operator sets have them: the backend suite's cases in older forms, and what each form means by NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OLDEST, NEWEST = 7, 28
SCHEMAS: dict[tuple[str, str], list[Any]] = {}
"""(domain, operator) -> its schemas, oldest first."""
for _schema in sorted(onnx.defs.get_all_schemas_with_history(), key=lambda s: s.since_version):
    SCHEMAS.setdefault((_schema.domain, _schema.name), []).append(_schema)

_RENAMED = {"constant_value": "value", "K": "k"}


def versions(domain: str, name: str) -> Iterator[Any]:
    """The schemas that a file of the operator sets that are read can mean."""
    schemas = SCHEMAS[domain, name]
    for s, following in zip(schemas, [*schemas[1:], None]):
        if domain or following is None or following.since_version > OLDEST:
            yield s


def older(node: onnx.NodeProto, values: dict[str, Any], old: Any) -> onnx.NodeProto | None:
    """The node of the newest operator set as an older schema spells it, or None: inputs that were attributes move there."""
    newest = SCHEMAS[node.domain, node.op_type][-1]
    formal = [i.name for i in newest.inputs]
    variadic = bool(old.inputs) and old.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    inputs, attrs = [], {a.name: a for a in node.attribute}
    for i, name in enumerate(node.input):
        parameter = formal[min(i, len(formal) - 1)]
        moved = next((k for k in (parameter, _RENAMED.get(parameter)) if k in old.attributes), None)
        if variadic or moved is None or parameter in {x.name for x in old.inputs}:
            inputs.append(name)
        elif name:
            kind, x = old.attributes[moved].type, np.asarray(values[name])
            number = [v.item() for v in x.ravel()] if kind.name.endswith("S") else x.item()
            attrs[moved] = helper.make_attribute(moved, number, attr_type=int(kind.value) if number == [] else None)
    while inputs and not inputs[-1]:
        inputs.pop()
    for name in [k for k in attrs if k not in old.attributes]:
        default = newest.attributes[name].default_value if name in newest.attributes else None
        if default is None or not default.name or _value(default) != _value(attrs[name]):
            return None
        del attrs[name]
    if any(a.required and k not in attrs for k, a in old.attributes.items()):
        return None
    if not old.min_input <= len(inputs) <= old.max_input or len(node.output) > old.max_output:
        return None
    made = onnx.NodeProto()
    made.CopyFrom(node)
    del made.input[:], made.attribute[:]
    made.input.extend(inputs)
    made.attribute.extend(attrs.values())
    return made


def _value(a: onnx.AttributeProto) -> Any:
    return helper.get_attribute_value(a)


def with_node(model: onnx.ModelProto, node: onnx.NodeProto, opset: int) -> onnx.ModelProto:
    """A model of one node with another node in its place, and another operator set."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    inner = [n for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for n in a.g.node]
    read = {name for n in (node, *inner) for name in n.input}
    inputs = [i for i in made.graph.input if i.name in read]
    del made.graph.node[:], made.graph.input[:]
    made.graph.node.append(node)
    made.graph.input.extend(inputs)
    for o in made.opset_import:
        if o.domain == node.domain:
            o.version = opset
    return made


# -- what older forms mean -------------------------------------------------------------------------------------------------
@dataclass
class Form:
    """One node of an operator set, its inputs (``constants`` are initializers), and the outputs by NumPy."""

    op: str
    opset: int
    inputs: dict[str, np.ndarray]
    want: Sequence[Any]
    attrs: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ",".join(f"{k}={v}" for k, v in self.attrs.items())
        return f"{self.op}-{self.opset}({shown})".replace(" ", "")

    def model(self) -> onnx.ModelProto:
        outputs = [f"y{i}" for i in range(len(self.want))]
        infos = [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for k, x in self.inputs.items()
        ]
        graph = helper.make_graph(
            [helper.make_node(self.op, [*self.inputs, *self.constants], outputs, **self.attrs)], "g", infos,
            [helper.make_empty_tensor_value_info(o) for o in outputs],
            [numpy_helper.from_array(np.asarray(x), k) for k, x in self.constants.items()],
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


_RNG = np.random.default_rng(0)


def _f(*shape: int) -> np.ndarray:
    return _RNG.standard_normal(shape).astype(np.float32)


def _nearest(x: np.ndarray, scales: Sequence[float], shrinking_up: bool) -> np.ndarray:
    for axis, s in enumerate(scales):
        at = np.arange(int(np.floor(x.shape[axis] * np.float32(s)))) / np.float32(s)
        at = (np.ceil(at) if s < 1 and shrinking_up else np.floor(at)).astype(int)
        x = np.take(x, np.clip(at, 0, x.shape[axis] - 1), axis)
    return x


def _linear(x: np.ndarray, scales: Sequence[float]) -> np.ndarray:
    for axis, s in enumerate(scales):
        size = x.shape[axis]
        at = np.minimum(np.arange(int(np.floor(size * np.float32(s)))) / np.float32(s), size - 1)
        low = np.floor(at).astype(int)
        part = (at - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        x = np.take(x, low, axis) * (1 - part) + np.take(x, np.minimum(low + 1, size - 1), axis) * part
    return x


def _resized() -> Iterator[Form]:
    x = _f(1, 2, 3, 4)
    for scales in ([1, 1, 2, 2], [1, 1, 1.5, 2.5], [1, 1, 1, 3], [1, 1, 0.6, 0.5]):
        known = {"s": np.array(scales, np.float32)}
        for mode, want in (("nearest", _nearest(x, scales, True)), ("linear", _linear(x, scales))):
            yield Form("Resize", 10, {"x": x}, [want], {"mode": mode}, known)
            if min(scales) >= 1:
                yield Form("Upsample", 9, {"x": x}, [want], {"mode": mode}, known)
                yield Form("Upsample", 7, {"x": x}, [want], {"mode": mode, "scales": [float(s) for s in scales]})


def _sliced() -> Iterator[Form]:
    x = _f(4, 5)
    for starts, ends, axes, want in (
        ([0], [2], [0], x[:2]), ([-3], [-1], [1], x[:, -3:-1]), ([1, 0], [100, -1], None, x[1:100, :-1]),
        ([0, 1], [-1, 1000], [1, 0], x[1:, :-1]), ([-100], [2], [1], x[:, :2]),
    ):  # fmt: skip
        attrs = {"starts": starts, "ends": ends, **({} if axes is None else {"axes": axes})}
        yield from (Form("Slice", opset, {"x": x}, [want], attrs) for opset in (7, 9))


def _padded() -> Iterator[Form]:
    x = _f(3, 4)
    for pads in ([0, 1, 2, 0], [1, 1, 1, 1], [0, 0, 0, 0]):
        width = [(pads[0], pads[2]), (pads[1], pads[3])]
        yield Form("Pad", 10, {"x": x}, [np.pad(x, width, constant_values=1.5)], {"pads": pads, "value": 1.5})
        yield from (Form("Pad", 7, {"x": x}, [np.pad(x, width, m)], {"pads": pads, "mode": m}) for m in ("reflect", "edge"))
    yield Form("Pad", 7, {"x": x}, [np.pad(x[1:], [(0, 0), (0, 2)])], {"pads": [-1, 0, 0, 2]})


def _normalized() -> Iterator[Form]:
    x = _f(2, 3, 4)
    for spatial, shape in ((1, (3,)), (0, (3, 4))):
        scale, bias, mean, var = (np.abs(_f(*shape)) for _ in range(4))
        s, b, m, v = (p.reshape(*shape, *(1,) * (2 - p.ndim)) for p in (scale, bias, mean, var))
        known = {"s": scale, "b": bias, "m": mean, "v": var}
        yield Form("BatchNormalization", 8, {"x": x}, [(x - m) / np.sqrt(v + 1e-5) * s + b], {"spatial": spatial}, known)
    x, scale, bias = _f(2, 4, 3), _f(2), _f(2)
    groups = x.reshape(2, 2, 6)
    groups = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-5)
    want = (groups * scale[:, None] + bias[:, None]).reshape(x.shape)
    yield Form("GroupNormalization", 18, {"x": x}, [want], {"num_groups": 2}, {"s": scale, "b": bias})


def _elementwise() -> Iterator[Form]:
    x = np.array([-np.inf, -3e38, -1, 0.2, 3e38, np.inf], np.float32)
    top = np.finfo(np.float32).max
    yield Form("Clip", 7, {"x": x}, [np.clip(x, -top, top)])
    yield Form("Clip", 10, {"x": x}, [np.clip(x, -0.5, 0.5)], {"min": -0.5, "max": 0.5})
    half = np.array([-np.inf, -1, 0.2, np.inf], np.float16)
    yield Form("Clip", 7, {"x": half}, [np.maximum(half, np.float16(-0.5))], {"min": -0.5})
    a, b = _f(2, 3), _f(2, 3)
    for op, want in (("Max", np.maximum(a, b)), ("Min", np.minimum(a, b)), ("Sum", a + b), ("Mean", (a + b) / 2)):
        yield Form(op, 7, {"a": a, "b": b}, [want])
        yield Form(op, 7, {"a": a}, [a])
    slope = _f(3)
    yield Form("PRelu", 7, {"a": a, "s": slope}, [np.where(a < 0, a * slope, a)])
    yield Form("Dropout", 7, {"a": a}, [a], {"ratio": 0.3})
    order = np.sort(a, axis=1)[:, ::-1]
    yield Form("TopK", 7, {"a": a}, [order[:, :2], np.argsort(-a, axis=1)[:, :2]], {"k": 2, "axis": 1})
    wide, sizes = np.float16(0.1).astype(np.float32), {"a": np.float16(1), "b": np.float16(300), "c": np.float16(0.1)}
    count = int(np.ceil(299 / wide))
    yield Form("Range", 27, {}, [(1 + np.arange(count, dtype=np.float32) * wide).astype(np.float16)], {}, sizes)


def _cubic(x: np.ndarray, at: tuple[float, float], place: Any) -> np.ndarray:
    """x [c, h, w] between pixels by Keys' kernel; ``place`` moves a tap that lies outside."""

    def weight(d: float) -> float:
        a, d = -0.75, abs(d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0

    total = np.zeros(x.shape[0])
    for i in range(int(np.floor(at[0])) - 1, int(np.floor(at[0])) + 3):
        for j in range(int(np.floor(at[1])) - 1, int(np.floor(at[1])) + 3):
            value = x[:, place(i, x.shape[1]), place(j, x.shape[2])]
            total += value * weight(i - at[0]) * weight(j - at[1])
    return total


def _reflect(i: int, size: int) -> int:
    """Mirrored at the centers of the first and the last pixel."""
    i = abs(i) % (2 * size - 2)
    return min(i, 2 * size - 2 - i)


def _sampled() -> Iterator[Form]:
    x, grid = _f(1, 2, 4, 5), np.clip(_f(1, 3, 3, 2), -1.6, 1.6)
    for padding, place in (("border", lambda i, n: min(max(i, 0), n - 1)), ("reflection", _reflect)):
        want = np.stack([
            _cubic(x[0].astype(np.float64), ((gy + 1) / 2 * 3, (gx + 1) / 2 * 4), place) for gx, gy in grid[0].reshape(-1, 2)
        ], 1).reshape(1, 2, 3, 3)  # fmt: skip
        attrs = {"padding_mode": padding, "align_corners": 1}
        yield Form("GridSample", 16, {"x": x, "g": grid}, [want], {"mode": "bicubic", **attrs})
        yield Form("GridSample", 20, {"x": x, "g": grid}, [want], {"mode": "cubic", **attrs})
    ramp, region = np.tile(np.arange(6, dtype=np.float32), (1, 1, 6, 1)), np.array([[1, 1, 4, 3]], np.float32)
    attrs = {"output_width": 3, "output_height": 1, "sampling_ratio": 2}
    known = {"r": region, "b": np.zeros(1, np.int64)}
    yield Form("RoiAlign", 10, {"x": ramp}, [np.array([[[[1.5, 2.5, 3.5]]]])], attrs, known)
    yield Form("RoiAlign", 16, {"x": ramp}, [np.array([[[[1, 2, 3]]]])], attrs, known)


FORMS = [
    f for forms in (_resized, _sliced, _padded, _normalized, _elementwise, _sampled) for f in forms()
]  # fmt: skip


def refused(domain: str, name: str, version: int) -> onnx.ModelProto:
    """A model of one such node, which is called ``the node``; its inputs and attributes are made up."""
    schema = next(s for s in versions(domain, name) if s.since_version == version)
    inputs = [f"x{i}" for i in range(max(schema.min_input, 1))]
    node = helper.make_node(name, inputs, ["y"], name="the node", domain=domain)
    infos = [helper.make_tensor_value_info(k, TensorProto.FLOAT, [1]) for k in inputs]
    graph = helper.make_graph([node], "g", infos, [helper.make_empty_tensor_value_info("y")])
    opset = max(version, OLDEST) if not domain else version
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, opset)])
