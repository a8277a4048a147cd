"""The emission of scan and cond: ONNX's Scan and If."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper
from wasat.ir import DType, Graph, Node, Value
from wasat.ir.ops.cond import CondAttrs

from .emitter import Emitter, value_info
from .errors import Unsupported
from .registry import emission, emits


@emits("scan")
def _scan(e: Emitter, node: Node, *operands: str) -> list[str]:
    """The body reads what stays the same from outside; with nothing to slice, it counts its turns."""
    attrs: Any = node.attrs
    body, c, s = attrs.body.graph, attrs.carries, attrs.slices
    inputs = [(e.fresh(v.name), v.type) for v in body.inputs[: c + s]]
    for v, (name, t) in zip(body.inputs, inputs):
        e.names[v], e.dtype[name] = name, t.dtype
    for v, outer, name in list(zip(body.inputs, node.inputs, operands))[c + s :]:
        e.stand_for(v, outer, name)
    given = list(operands[: c + s])
    infos = [value_info(name, t) for name, t in inputs]
    if not s:
        turns = e.op("Range", e.const(0, DType.I64), e.scalar(attrs.length), e.const(1, DType.I64))
        given.append(turns)
        infos.append(helper.make_tensor_value_info(e.fresh("turn"), helper.TensorProto.INT64, []))
    rows = len(node.outputs) - c
    made = e.op(
        "Scan", *given, outputs=len(node.outputs), num_scan_inputs=len(given) - c, body=_graph(e, node, body, infos),
        scan_input_directions=[1] * (len(given) - c) if attrs.reverse else None,
        scan_output_directions=[1] * rows if attrs.reverse and rows else None,
    )  # fmt: skip
    return _made(e, node, made)


@emits("cond")
def _cond(e: Emitter, node: Node, condition: str, *operands: str) -> list[str]:
    """Branches read their operands from outside."""
    attrs = CondAttrs.of(node)
    graphs = []
    for body in (attrs.then.graph, attrs.otherwise.graph):
        for v, outer, name in zip(body.inputs, node.inputs[1:], operands):
            e.stand_for(v, outer, name)
        graphs.append(_graph(e, node, body, []))
    first, count = node.outputs[0].tensor.dtype, len(node.outputs)
    made = e.op("If", condition, outputs=count, dtype=first, then_branch=graphs[0], else_branch=graphs[1])
    return _made(e, node, made)


def _graph(e: Emitter, node: Node, body: Graph, inputs: list[onnx.ValueInfoProto]) -> onnx.GraphProto:
    """A body of ``node``, whose own inputs are declared."""
    outer, e.nodes = e.nodes, []
    try:
        for inner in body.nodes:
            _emit(e, inner)
        e.at(node)
        results = [_own(e, v) for v in body.outputs]
    finally:
        inside, e.nodes = e.nodes, outer
    returned = [value_info(name, v.type) for name, v in zip(results, body.outputs)]
    return helper.make_graph(inside, e.fresh(body.name), inputs, returned)


def _made(e: Emitter, node: Node, made: Any) -> list[str]:
    names = [made] if len(node.outputs) == 1 else list(made)
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
