"""Tables that grow evenly along their last axis (ALiBi): added to scores, any part of one weighs keys as any other does."""

from __future__ import annotations

import numpy as np
from wasat.ir import Graph, Node, TensorType, Value, equal

from ..pattern import number_of

_HIDING = -1e9
"""What is no larger than this, in place of a score or added to it, leaves no weight."""


def even(table: np.ndarray) -> bool:
    """Whether all steps along the last axis are one number in each row, to what f32 rounds."""
    if table.shape[-1] < 3 or not np.isfinite(table).all():
        return False
    x = table.astype(np.float64)
    straight = x[..., :1] + (x[..., -1:] - x[..., :1]) * np.linspace(0, 1, x.shape[-1])
    return bool((np.abs(x - straight) <= 1e-6 * np.abs(x).max(-1, keepdims=True)).all())


def only_weighed(graph: Graph, v: Value) -> bool:
    """Whether ``v`` [.., keys] is only added to scores of which a softmax over the last axis is taken: a number added to all
    keys of a query changes nothing there.
    """
    return bool(v.users) and not graph.is_output(v) and all(_weighs(graph, node, v) for node in v.users)


def _weighs(graph: Graph, node: Node, v: Value) -> bool:
    if node.is_a("softmax"):
        return bool(node.attrs.axis == len(v.shape) - 1)  # type: ignore[attr-defined]
    if len(node.outputs) != 1 or not isinstance(node.output.type, TensorType) or not _last_stays(node, v):
        return False
    hides = [u for u in node.inputs[1:] if u is not v and (n := number_of(u)) is not None and n <= _HIDING]
    added = node.is_a("add") and node.inputs[0] is not node.inputs[1]
    scaled = node.is_a("mul") and number_of(node.inputs[1]) is not None
    chosen = node.is_a("select", "maximum") and len(hides) == 1
    widened = node.is_a("cast") and node.output.tensor.dtype.bits >= 32
    moved = node.is_a("reshape", "broadcast_to")
    return (added or scaled or chosen or widened or moved) and only_weighed(graph, node.output)


def _last_stays(node: Node, v: Value) -> bool:
    """Whether the last axis of the result is that of ``v``, whole: as long as it, or as what it is checked to be as long as."""
    old, new = v.shape[-1:], node.output.shape[-1:]
    return equal(old[0], new[0]) is True or (old[0], new[0]) in node.checks or (new[0], old[0]) in node.checks
