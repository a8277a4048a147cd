"""Which node made the first NaN or infinity of a step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from wasat.ir import Array, Graph, Node, Value, WasatError, evaluate, node_text


class Diverged(WasatError):
    """A step whose loss or gradients are not finite."""


def offender(graph: Graph, inputs: Mapping[str, Array], params: Mapping[str, Array], output: str) -> str:
    """Runs ``graph`` on the interpreter and says why this output of it is not finite: what first was not on the way to it.

    That is an input or parameter, or the node, and its line, that makes NaN of operands without NaN, or an infinity of finite
    operands. Constants are not blamed (masks are built of infinities), nor what was masked before it reached the output.
    """
    spoilt: dict[Value, bool] = {}
    """Values that are not finite, and whether they hold NaN."""
    for v in graph.inputs:
        _note(spoilt, v, inputs[v.name])
    for name, v in graph.params.items():
        _note(spoilt, v, params[name])

    def observe(node: Node, results: tuple[Array, ...]) -> None:
        for v, x in zip(node.outputs, results):
            _note(spoilt, v, x)

    evaluate(graph, inputs, params, observe=observe)
    guilty = {graph.outputs[graph.output_names.index(output)]} & spoilt.keys()
    for node in reversed(list(graph.nodes)):
        if not guilty.isdisjoint(node.outputs):
            guilty.update(v for v in node.inputs if v in spoilt)
    for kind, given in (("input", graph.inputs), ("parameter", graph.params.values())):
        for v in given:
            if v in guilty:
                return f"{kind} %{v.name} held {'NaN' if spoilt[v] else 'an infinity'} already"
    for node in graph.nodes:
        before = [spoilt[v] for v in node.inputs if v in spoilt]
        for v in node.outputs:
            if v in guilty and node.inputs and (not before or (spoilt[v] and not any(before))):
                where = f" (at {node.loc})" if node.loc is not None else ""
                return f"the first {'NaN' if spoilt[v] else 'infinity'} was made by {node_text(node).strip()}{where}"
    return "the interpreter, which rounds differently, stays finite in this step: the numbers are at the edge of f32"


def _note(spoilt: dict[Value, bool], v: Value, x: Array) -> None:
    if isinstance(x, np.ndarray) and x.dtype.kind not in "iub" and not np.isfinite(x).all():
        spoilt[v] = bool(np.isnan(x).any())
