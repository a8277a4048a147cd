"""Decoders that take keys and values of the past, in onnxruntime's operators, as forward passes over all tokens.

From these caches are derived; the inputs of a past, the outputs that are the next one, and what told how long it is, go.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import onnx
from wasat.ir import Graph

PASTS = {"GroupQueryAttention": (3, 4), "MultiHeadAttention": (6, 7), "Attention": (4,)}
"""Which operands of an operator are its past."""


def pasts(graph: onnx.GraphProto, kept: Container[str]) -> tuple[set[str], set[str]]:
    """The inputs of the model that are nothing but a past of attention (unless ``kept``), and the outputs that go with them."""
    inputs = {i.name for i in graph.input if i.name not in kept} - {t.name for t in graph.initializer}
    only: dict[str, bool] = {}
    for node in graph.node:
        at = _at(node)
        for i, name in enumerate(node.input):
            if name in inputs:
                only[name] = only.get(name, True) and i in at
    found = {name for name, past in only.items() if past}
    reading = [n for n in graph.node if any(i < len(n.input) and n.input[i] in found for i in _at(n))]
    return found, {name for n in reading for name in n.output[1:]} & {o.name for o in graph.output}


def _at(node: onnx.NodeProto) -> tuple[int, ...]:
    return PASTS.get(node.op_type, ()) if node.domain == "com.microsoft" else ()


def same_length(graph: onnx.GraphProto) -> Mapping[str, str]:
    """The size that is the number of tokens where there is no past: that of the attention mask."""
    sizes = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in graph.input}
    tokens, mask = sizes.get("input_ids", []), sizes.get("attention_mask", [])
    apart = len(tokens) == len(mask) == 2 and tokens[1] and mask[1] and tokens[1] != mask[1]
    return {mask[1]: tokens[1]} if apart else {}


def leave_off(graph: Graph) -> None:
    """Erases what nobody reads, and the inputs that only this read."""
    read = [v for v in graph.inputs if v.uses]
    for node in reversed(list(graph.nodes)):
        if not any(v.uses or graph.is_output(v) for v in node.outputs):
            graph.erase(node)
    for v in read:
        if not v.uses and not graph.is_output(v):
            graph.remove_input(v)


__all__ = ["leave_off", "pasts", "same_length"]
