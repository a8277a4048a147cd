"""Latent attention (MLA): keys and values that one vector per token makes for all heads are not made for every key again.

q . (W l) = (W^T q) . l, and the sum of weights times W l is W times the sum: the up-projections go to the queries and to the
result, and attention runs over the latent vectors themselves, as one head of keys that are values too. So these are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from wasat.ir import Builder, DimLike, Graph, Node, TensorType, Value
from wasat.ir.ops.attention import AttentionAttrs
from wasat.ir.ops.shape import Concat, Slice

from ..core import Remarks
from ..pattern import erase_dead


@dataclass(frozen=True)
class _Part:
    """Features of every head: rows of ``weight`` times ``source`` [b, s, n]; or, without a weight, those of ``source``
    [b, s, 1, d], the same for all heads. Head h's begin at ``base`` + h * ``stride`` + ``first``."""

    source: Value
    weight: Value | None
    base: int
    stride: int
    first: int
    size: int


def absorb(graph: Graph, remarks: Remarks) -> None:
    """Rewrites attention whose keys and values come from at most a third as many numbers.

    Every head then attends over all of these instead of its own: what plain attention, whose keys and values come from half
    as many numbers (the layer's input), would save in memory it would lose in arithmetic, by the number of heads.
    """
    for node in graph.nodes:
        if not isinstance(node.attrs, AttentionAttrs) or node.attrs.window is not None:
            continue
        q, k, v = node.inputs[:3]
        keys, values = _parts(k), _parts(v)
        if keys is None or values is None or len(values) != 1 or values[0].weight is None:
            continue
        latent, heads = values[0].source, k.shape[2]
        if not isinstance(heads, int) or q.shape[2] != heads or q.tensor.dtype is not latent.tensor.dtype:
            continue
        made = [p for p in keys if p.weight is not None]
        if not made or any(p.source is not latent for p in made):
            continue
        width = latent.shape[-1]
        kept = sum(p.size for p in keys if p.weight is None) + (width if isinstance(width, int) else 0)
        if 3 * kept > heads * (sum(p.size for p in keys) + values[0].size):
            continue
        _rewrite(graph, node, keys, values[0], heads)
        remarks.applied(f"%{node.output.name}: attention over {kept} numbers per token instead of those that they make", node)


def _rewrite(graph: Graph, node: Node, keys: list[_Part], value: _Part, heads: int) -> None:
    b, (q, *_), latent = Builder(graph, before=node, loc=node.loc), node.inputs, value.source
    batch, seq, width = latent.shape
    one = b.reshape(latent, shape=(batch, seq, 1, width))
    asked: Value | None = None
    queries, rows, at = [], [one], 0
    for p in keys:
        own = _features(b, q, at, p.size)
        at += p.size
        if p.weight is None:
            queries.append(own)
            rows.append(_features(b, p.source, p.first, p.size))
        else:
            x = _per_head(b, own, _matrix(b, p, heads))
            asked = x if asked is None else b.add(asked, x)
    assert asked is not None
    q, k = b.concat(asked, *queries, axis=3), b.concat(*rows, axis=3)
    v = b.slice(k, starts=(0, 0, 0, 0), stops=one.shape)  # the keys' own: one tensor is kept
    y = graph.add_node(node.op, [q, k, v, *node.inputs[3:]], node.attrs, before=node, loc=node.loc).output
    out = _per_head(b, y, b.transpose(_matrix(b, value, heads), perm=(0, 2, 1)))
    graph.replace_uses(node.output, out)
    erase_dead(graph, node)


def _features(b: Builder, x: Value, first: int, size: int) -> Value:
    if (first, size) == (0, x.shape[3]):
        return x
    out: Value = b.slice(x, starts=(0, 0, 0, first), stops=(*x.shape[:3], first + size))
    return out


def _matrix(b: Builder, p: _Part, heads: int) -> Value:
    """The weight of a part, [heads, size, n]."""
    assert p.weight is not None
    w, n = p.weight, p.weight.shape[1]
    w = b.slice(w, starts=(p.base, 0), stops=(p.base + heads * p.stride, n))
    w = b.reshape(w, shape=(heads, p.stride, n))
    out: Value = b.slice(w, starts=(0, p.first, 0), stops=(heads, p.first + p.size, n))
    return out


def _per_head(b: Builder, x: Value, w: Value) -> Value:
    """[b, s, h, n] by matrices [h, n, m]."""
    y: Value = b.transpose(b.matmul(b.transpose(x, perm=(0, 2, 1, 3)), w), perm=(0, 2, 1, 3))
    return y


def _parts(v: Value) -> list[_Part] | None:
    """What the features of keys or values [b, s, h, d] are made of."""
    node, size = v.node, v.shape[3]
    if node is None or not isinstance(size, int):
        return None
    attrs = node.attrs
    if isinstance(attrs, Concat.Attrs) and attrs.axis == 3:
        found = [_parts(x) for x in node.inputs]
        return None if None in found else [p for parts in found if parts is not None for p in parts]
    if isinstance(attrs, Slice.Attrs) and _cuts_last(node):
        parts, lo, hi = _parts(node.inputs[0]), attrs.starts[3], attrs.stops[3]
        return None if parts is None or not isinstance(lo, int) or not isinstance(hi, int) else _within(parts, lo, hi)
    if node.is_a("broadcast_to") and tuple(node.inputs[0].shape) == (*v.shape[:2], 1, size):
        return [_Part(node.inputs[0], None, 0, 0, 0, size)]
    if node.is_a("reshape") and tuple(node.inputs[0].shape[:-1]) == tuple(v.shape[:2]):
        return _made(node.inputs[0], size)
    return None


def _made(x: Value, size: int) -> list[_Part] | None:
    """[b, s, h * size] as what a weight makes."""
    base: DimLike = 0
    if x.node is not None and isinstance(x.node.attrs, Slice.Attrs) and _cuts_last(x.node):
        base, x = x.node.attrs.starts[2], x.node.inputs[0]
    node = x.node
    if node is None or not node.is_a("linear") or len(node.inputs) != 2 or not isinstance(base, int):
        return None
    source, weight = node.inputs
    plain = isinstance(weight.type, TensorType) and weight.tensor.dtype is source.tensor.dtype
    return [_Part(source, weight, base, size, 0, size)] if plain and len(source.shape) == 3 else None


def _cuts_last(node: Node) -> bool:
    """Whether a slice takes a part of the last axis alone, without gaps."""
    a, shape = Slice.Attrs.of(node), node.inputs[0].shape
    whole = all(lo == 0 and str(hi) == str(d) for lo, hi, d in zip(a.starts[:-1], a.stops[:-1], shape))
    return whole and set(a.steps) == {1}


def _within(parts: list[_Part], lo: int, hi: int) -> list[_Part]:
    found, at = [], 0
    for p in parts:
        first, last = max(lo - at, 0), min(hi - at, p.size)
        if first < last:
            found.append(replace(p, first=p.first + first, size=last - first))
        at += p.size
    return found
