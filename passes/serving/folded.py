"""Attention over heads that were merged with the batch, [b*h, s, d] or [h*b, s, d]: over rows, with heads of its own."""

from __future__ import annotations

from collections.abc import Mapping

from wasat.ir import Builder, DimLike, Graph, Node, Value, equal
from wasat.ir.axes import product
from wasat.ir.ops.attention import AttentionAttrs, mask_and_sink

from ..analyses.rows import Place, places
from ..analyses.sequence import Label
from ..pattern import erase_dead


def heads_apart(graph: Graph, tokens: Value, labels: Mapping[Value, Label]) -> bool:
    """Attention of [o*b*i, s, h, d] -> of [b, s, o*i*h, d]: a cache has a row for each of the batch, so heads leave its axis.

    What grouped queries read stays: the heads of one merged row stand side by side, as do the keys' that they share. Attention
    with sinks, or under a mask that has neither the merged rows and every head nor 1 for both, is left. Raises IRError where
    rows meet.
    """
    merged: dict[Node, Place] = {}
    places(graph, tokens, labels, merged)
    changed = False
    for node, place in merged.items():
        attrs = AttentionAttrs.of(node)
        q, *more = node.inputs
        mask, sink = mask_and_sink(attrs, more[2:])
        if sink is not None or place.axis != 0 or not _fits(mask, q):
            continue
        b = Builder(graph, before=node, loc=node.loc)
        batch = tokens.shape[0]
        operands = [_apart(b, v, place, batch, 2) for v in (q, *more[:2])]
        if mask is not None:
            operands.append(_apart(b, mask, place, batch, 1) if len(mask.shape) == 4 and mask.shape[0] != 1 else mask)
        out = b.attention(*operands, **{k: getattr(attrs, k) for k in ("scale", "causal", "window", "softcap")})
        graph.replace_uses(node.output, _together(b, out, place, node.output))
        erase_dead(graph, node)
        changed = True
    return changed


def _fits(mask: Value | None, q: Value) -> bool:
    """Whether heads can leave the first axis of a mask as they leave that of the queries."""
    if mask is None or all(d == 1 for d in mask.shape[:-2]):
        return True
    return len(mask.shape) == 4 and all(equal(d, n) is True for d, n in zip(mask.shape, (q.shape[0], q.shape[2])))


def _apart(b: Builder, v: Value, place: Place, batch: DimLike, heads: int) -> Value:
    """``v`` [o*b*i, .., h, ..], whose axis ``heads`` has the heads: [b, .., o*i*h, ..]."""
    outer, inner, rest = place.outer, place.inner, v.shape[1:]
    v = b.reshape(v, shape=(outer, batch, inner, *rest))
    at = heads + 2
    between = range(3, at)
    v = b.transpose(v, perm=(1, *between, 0, 2, at, *range(at + 1, len(rest) + 3)))
    return b.reshape(v, shape=(batch, *rest[: heads - 1], product(outer, inner, rest[heads - 1]), *rest[heads:]))


def _together(b: Builder, v: Value, place: Place, like: Value) -> Value:
    """[b, s, o*i*h, e] as it was: [o*b*i, s, h, e]."""
    _, s, h, e = like.shape
    v = b.reshape(v, shape=(v.shape[0], s, place.outer, place.inner, h, e))
    return b.reshape(b.transpose(v, perm=(2, 0, 3, 1, 4, 5)), shape=like.shape)
