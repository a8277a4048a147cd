"""Attention under a mask of positions and data that hides by a number: what a query gives that sees nothing.

    attention(q, k, v, select(keep, 0, -3.4e38))

The number takes up whatever it is added to. So a query of which ``keep`` leaves nothing weighs all keys alike, later ones too,
and any other sees what is left alone, as under minus infinity: there the predicates of the mask may become attributes.
"""

from __future__ import annotations

import dataclasses

from wasat.ir import Builder, DType, Graph, Node, Value, equal
from wasat.ir.ops.attention import AttentionAttrs, mask_and_sink

from ..analyses.mask import analyze
from ..pattern import replace
from .heads import MaskPart, emit_mask

_TAKES_UP = -1e30
"""Added to an f32 of up to 1e22, it stays what it is."""


def apart(graph: Graph, node: Node, condition: Value, keep: bool, fill: float) -> Value | None:
    """Puts attention under a mask that hides altogether, and for queries that see nothing the mean of all values, in the place
    of ``node``, whose mask chooses between 0 (where ``condition`` is ``keep``) and ``fill``. Returns the attention; None where
    the mask says nothing of positions, or a query that sees nothing gives something else than the mean."""
    q, k, v, *more = node.inputs
    a = AttentionAttrs.of(node)
    mask, sink = mask_and_sink(a, more)
    if sink is not None or a.causal or a.window is not None or fill > _TAKES_UP or q.tensor.dtype is not DType.F32:
        return None
    if mask is None or len(condition.shape) > 4 or equal(q.shape[1], k.shape[1]) is not True:
        return None
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    found = analyze(condition, shape, keep)
    if not (found.causal or found.window is not None) or not found.operands:
        return None
    b = Builder(graph, before=node, loc=node.loc)
    kept = emit_mask(b, [MaskPart(m, shape, negate=n) for m, n in found.operands], DType.F32)
    attrs = dataclasses.replace(a, causal=found.causal, window=found.window)
    y = graph.add_node(node.op, [q, k, v, kept], attrs, before=node, loc=node.loc).output
    seen = condition if keep else b.logical_not(condition)
    seen = b.reshape(seen, shape=(1,) * (4 - len(seen.shape)) + tuple(seen.shape))
    some = b.reduce_max(b.cast(seen, dtype=DType.I32), axes=(3,), keepdims=True)
    sees = b.equal(b.transpose(some, perm=(0, 2, 1, 3)), b.constant(1, DType.I32))
    n, _, g, e = v.shape
    mean = b.reshape(b.reduce_mean(v, axes=(1,), keepdims=True), shape=(n, 1, g, 1, e))
    each = b.broadcast_to(mean, shape=(n, 1, g, q.shape[2] // g, e))
    replace(graph, node.output, b.select(sees, y, b.reshape(each, shape=(n, 1, q.shape[2], e))))
    return y
