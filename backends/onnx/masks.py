"""Attention in the form that ONNX's operator takes: what is seen, as far as its attributes cannot say it, as a mask operand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wasat.ir import Builder, DType, Graph, Node, Value, equal
from wasat.ir.ops.attention import emit_seen, emit_seen_cached, mask_and_sink


def prepare(graph: Graph) -> None:
    """Rewrites, in place, cached_attention into cache updates and attention, and windows and offsets into masks.

    The operator's causal rule aligns query 0 with key 0; the IR's aligns the last query with the last key, so that only
    equally many of both mean the same.
    """
    for node in list(graph.nodes):
        if node.op.name == "cached_attention":
            results = _cached(Builder(graph, before=node, loc=node.loc), node)
        elif node.op.name == "attention" and _needs_mask(node):
            results = [_masked(Builder(graph, before=node, loc=node.loc), node)]
        else:
            continue
        graph.replace(node, results)


def _needs_mask(node: Node) -> bool:
    a: Any = node.attrs
    q, k = node.inputs[:2]
    return a.window is not None or (a.causal and equal(q.shape[1], k.shape[1]) is not True)


def _masked(b: Builder, node: Node) -> Value:
    a: Any = node.attrs
    q, k, v, *given = node.inputs
    seen = emit_seen(b, a, q.shape[1], k.shape[1])
    assert seen is not None
    return _under(b, node, (q, k, v), seen, given)


def _under(b: Builder, node: Node, qkv: tuple[Value, Value, Value], seen: Value, given: Sequence[Value]) -> Value:
    """Attention to what is seen, as far as its own mask lets it be."""
    a: Any = node.attrs
    mask, sink = mask_and_sink(a, given)
    if mask is not None and mask.tensor.dtype is DType.BOOL:
        seen = b.logical_and(seen, mask)
    elif mask is not None:
        seen = b.select(seen, mask, b.constant(float("-inf"), mask.tensor.dtype))
    return b.attention(*qkv, seen, *([] if sink is None else [sink]), scale=a.scale, softcap=a.softcap, sink=a.sink)


def _cached(b: Builder, node: Node) -> list[Value]:
    a: Any = node.attrs
    q, k, v, k_cache, v_cache, past, *given = node.inputs
    keys, values = b.cache_update(k_cache, k, past, ring=a.ring), b.cache_update(v_cache, v, past, ring=a.ring)
    mask = emit_seen_cached(b, a, past, q.shape[1], keys.shape[1], 1)
    return [_under(b, node, (q, keys, values), mask, given), keys, values]


__all__ = ["prepare"]
