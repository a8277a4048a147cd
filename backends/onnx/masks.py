"""Attention in the form that ONNX's operator takes: what is seen, as far as its attributes cannot say it, as a mask operand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wasat.ir import Builder, DimLike, DType, Graph, Node, Value, equal
from wasat.ir.ops.attention import mask_and_sink


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


def _seen(b: Builder, query: Value, key: Value, causal: bool, window: int | None) -> Value:
    keep = b.less_equal(key, query) if causal else None
    if window is not None:
        near = b.less(b.sub(query, key), window)
        keep = near if keep is None else b.logical_and(keep, near)
    assert keep is not None
    return keep


def _masked(b: Builder, node: Node) -> Value:
    a: Any = node.attrs
    q, k, v, *given = node.inputs
    s, t = q.shape[1], k.shape[1]
    query = b.reshape(b.iota(size=s), shape=(s, 1))
    if equal(s, t) is not True:
        query = b.add(query, b.sub(b.dim_size(size=t), b.dim_size(size=s)))
    return _under(b, node, (q, k, v), _seen(b, query, b.iota(size=t), a.causal, a.window), given)


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
    n, s = q.shape[:2]
    c: DimLike = keys.shape[1]
    dtype = past.tensor.dtype
    start = b.reshape(past, shape=(n, 1, 1, 1))
    query = b.add(start, b.reshape(b.iota(size=s, dtype=dtype), shape=(s, 1)))
    key = b.iota(size=c, dtype=dtype)
    last = b.add(start, b.sub(b.dim_size(size=s, dtype=dtype), 1))
    if a.ring:  # the newest position that each slot can hold; slots not yet written are before position 0
        key = b.sub(last, b.mod(b.sub(last, key), b.dim_size(size=c, dtype=dtype)))
    mask = _seen(b, query if a.causal else last, key, True, None)
    if a.window is not None:
        mask = b.logical_and(mask, _seen(b, query, key, False, a.window))
    if a.ring:
        mask = b.logical_and(mask, b.greater_equal(key, 0))
    return [_under(b, node, (q, keys, values), mask, given), keys, values]


__all__ = ["prepare"]
