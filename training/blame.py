"""Which node made the first NaN or infinity of a step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from wasat.ir import Array, Graph, Node, Value, WasatError, evaluate, node_text


class Diverged(WasatError):
    """A step whose loss or gradients are not finite."""


class _Found(Exception):
    pass


def offender(graph: Graph, inputs: Mapping[str, Array], params: Mapping[str, Array]) -> str:
    """Runs ``graph`` on the interpreter and says what first was not finite: an input, or the node and its line.

    A node is blamed that makes NaN of operands without NaN, or an infinity of finite operands; constants are not blamed (masks
    are built of infinities).
    """
    spoilt: dict[Value, bool] = {}
    """Values that are not finite, and whether they hold NaN."""
    for v in graph.inputs:
        _note(spoilt, v, inputs[v.name])
        if v in spoilt:
            return f"input %{v.name} held {'NaN' if spoilt[v] else 'an infinity'} already"

    blamed = ""

    def observe(node: Node, results: tuple[Array, ...]) -> None:
        nonlocal blamed
        for v, x in zip(node.outputs, results):
            _note(spoilt, v, x)
            before = [spoilt.get(i) for i in node.inputs]
            if v in spoilt and node.inputs and (all(b is None for b in before) or (spoilt[v] and not any(before))):
                where = f" (at {node.loc})" if node.loc is not None else ""
                blamed = f"the first {'NaN' if spoilt[v] else 'infinity'} was made by {node_text(node).strip()}{where}"
                raise _Found

    try:
        evaluate(graph, inputs, params, observe=observe)
    except _Found:
        return blamed
    return "the interpreter, which rounds differently, stays finite in this step: the numbers are at the edge of f32"


def _note(spoilt: dict[Value, bool], v: Value, x: Array) -> None:
    if isinstance(x, np.ndarray) and x.dtype.kind not in "iub" and not np.isfinite(x).all():
        spoilt[v] = bool(np.isnan(x).any())
