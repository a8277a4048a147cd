"""The emission of scan: ONNX's Scan."""

from __future__ import annotations

from typing import Any

from onnx import helper
from wasat.ir import DType, Node, Value

from .emitter import Emitter, value_info
from .errors import Unsupported
from .table import emission, emits


@emits("scan")
def _scan(e: Emitter, node: Node, *operands: str) -> list[str]:
    """The body reads what stays the same from outside; with nothing to slice, it counts its turns."""
    attrs: Any = node.attrs
    body, c, s = attrs.body.graph, attrs.carries, attrs.slices
    inputs = [(e.fresh(v.name), v.type) for v in body.inputs[: c + s]]
    for v, (name, t) in zip(body.inputs, inputs):
        e.names[v], e.dtype[name] = name, t.dtype
    e.names.update(zip(body.inputs[c + s :], operands[c + s :]))
    given = list(operands[: c + s])
    infos = [value_info(name, t) for name, t in inputs]
    if not s:
        turns = e.op("Range", e.const(0, DType.I64), e.scalar(attrs.length), e.const(1, DType.I64))
        given.append(turns)
        infos.append(helper.make_tensor_value_info(e.fresh("turn"), helper.TensorProto.INT64, []))
    outer, e.nodes = e.nodes, []
    try:
        for inner in body.nodes:
            _emit(e, inner)
        e.at(node)
        results = [_own(e, v) for v in body.outputs]
    finally:
        inside, e.nodes = e.nodes, outer
    returned = [value_info(name, v.type) for name, v in zip(results, body.outputs)]
    rows = len(results) - c
    made = e.op(
        "Scan", *given, outputs=len(results), num_scan_inputs=len(given) - c,
        body=helper.make_graph(inside, e.fresh(body.name), infos, returned),
        scan_input_directions=[1] * (len(given) - c) if attrs.reverse else None,
        scan_output_directions=[1] * rows if attrs.reverse and rows else None,
    )  # fmt: skip
    names = [made] if len(results) == 1 else list(made)
    e.dtype.update((name, v.tensor.dtype) for name, v in zip(names, node.outputs))
    return names


def _emit(e: Emitter, node: Node) -> None:
    form = emission(node, e.options)
    if form is None:
        raise Unsupported(f"operator set {e.opset} cannot express the {node.op.name} in its body")
    e.at(node)
    wanted, since = [e.fresh(v.name) for v in node.outputs], len(e.nodes)
    out = form.emit(e, node, *(e.operand(v) for v in node.inputs))
    e.bind(node, [out] if isinstance(out, str) else out, since, wanted)


def _own(e: Emitter, v: Value) -> str:
    """A result of the body under a name of its own: it may be an input, a constant, or returned twice."""
    return str(e.op("Identity", e.operand(v)))
