"""Latent attention (MLA): keys and values that one vector per token makes for all heads are not made for every key again.

q . (W l) = (W^T q) . l, and the sum of weights times W l is W times the sum: the up-projections go to the queries and to the
result, and attention runs over the latent vectors themselves, as one head of keys that are values too. So these are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
from wasat.ir import Builder, Graph, Node, TensorType, Value, WasatError, evaluate_dim
from wasat.ir.ops.attention import AttentionAttrs
from wasat.ir.ops.index import ScatterAttrs

from ..core import Remarks
from ..pattern import erase_dead

_MOVES = ("slice", "concat", "reshape", "transpose", "broadcast_to", "reverse")
_MOST_ELEMENTS = 2**23


@dataclass(frozen=True)
class _Part:
    """Neighbouring features of every head: element [b, s, rows[head][i]] of ``made``, a product of the latent vector with a
    weight; or, the same for all heads, the features ``rows[0]`` of ``made``, seen as [b, s, features] with its axes in
    another ``order``."""

    made: Value
    rows: tuple[tuple[int, ...], ...]
    order: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        return len(self.rows[0])

    @property
    def latent(self) -> Value | None:
        """Of what a weight makes it."""
        return self.made.node.inputs[0] if self.order is None and self.made.node is not None else None


def absorb(graph: Graph, remarks: Remarks) -> None:
    """Rewrites attention whose keys and values come from at most a third as many numbers.

    Every head then attends over all of these instead of its own: what plain attention, whose keys and values come from half
    as many numbers (the layer's input), would save in memory it would lose in arithmetic, by the number of heads.
    """
    for node in graph.nodes:
        if not isinstance(node.attrs, AttentionAttrs) or node.attrs.window is not None:
            continue
        q, k, v = node.inputs[:3]
        heads = k.shape[2]
        if not isinstance(heads, int) or q.shape[2] != heads or v.shape[2] != heads:
            continue
        keys, values = _parts(k), _parts(v)
        if keys is None or values is None or len(values) != 1 or (latent := values[0].latent) is None:
            continue
        made = [p.latent for p in keys if p.latent is not None]
        if q.tensor.dtype is not latent.tensor.dtype or not made or any(x is not latent for x in made):
            continue
        width = latent.shape[-1]
        kept = sum(p.size for p in keys if p.latent is None) + (width if isinstance(width, int) else 0)
        if 3 * kept > heads * (sum(p.size for p in keys) + values[0].size):
            continue
        _rewrite(graph, node, keys, values[0], latent)
        remarks.applied(f"%{node.output.name}: attention over {kept} numbers per token instead of those that they make", node)


def _rewrite(graph: Graph, node: Node, keys: list[_Part], value: _Part, latent: Value) -> None:
    b, (q, *_) = Builder(graph, before=node, loc=node.loc), node.inputs
    batch, seq, width = *q.shape[:2], latent.shape[-1]
    one = b.reshape(latent, shape=(batch, seq, 1, width))
    asked: Value | None = None
    queries, rows, at = [], [one], 0
    for p in keys:
        own = _features(b, q, range(at, at + p.size))
        at += p.size
        if p.order is not None:
            queries.append(own)
            x = b.transpose(p.made, perm=p.order) if p.order != tuple(range(len(p.order))) else p.made
            x = b.reshape(x, shape=(batch, seq, 1, _others(p)))
            rows.append(_features(b, x, p.rows[0]))
        else:
            x = _per_head(b, own, _matrix(b, p))
            asked = x if asked is None else b.add(asked, x)
    assert asked is not None
    q, k = b.concat(asked, *queries, axis=3), b.concat(*rows, axis=3)
    v = b.slice(k, starts=(0, 0, 0, 0), stops=one.shape)  # the keys' own: one tensor is kept
    y = graph.add_node(node.op, [q, k, v, *node.inputs[3:]], node.attrs, before=node, loc=node.loc).output
    out = _per_head(b, y, b.transpose(_matrix(b, value), perm=(0, 2, 1)))
    graph.replace_uses(node.output, out)
    erase_dead(graph, node)


def _others(part: _Part) -> int:
    """How many features the value has, which heads share."""
    assert part.order is not None
    return prod(d for d in (part.made.shape[a] for a in part.order[2:]) if isinstance(d, int))


def _features(b: Builder, x: Value, which: Sequence[int]) -> Value:
    """Those of [b, s, h, d]."""
    first, last = which[0], which[-1] + 1
    if tuple(which) == tuple(range(first, last)):
        whole = (first, last) == (0, x.shape[3])
        return x if whole else b.slice(x, starts=(0, 0, 0, first), stops=(*x.shape[:3], last))
    return b.gather(x, b.constant(np.array(which)), axis=3)


def _matrix(b: Builder, p: _Part) -> Value:
    """What the latent vector is multiplied with, [heads, size, n]."""
    node = p.made.node
    assert node is not None
    w = node.inputs[1] if node.is_a("linear") else b.transpose(node.inputs[1], perm=(1, 0))
    rows = b.gather(w, b.constant(np.array(p.rows).reshape(-1)), axis=0)
    return b.reshape(rows, shape=(len(p.rows), p.size, w.shape[1]))


def _per_head(b: Builder, x: Value, w: Value) -> Value:
    """[b, s, h, n] by matrices [h, n, m]."""
    y: Value = b.transpose(b.matmul(b.transpose(x, perm=(0, 2, 1, 3)), w), perm=(0, 2, 1, 3))
    return y


def _parts(v: Value) -> list[_Part] | None:
    """What the features of keys or values [b, s, h, d] are made of, however they are cut, joined, and turned between: found by
    following each element, at two sizes."""
    if not all(isinstance(d, int) for d in v.shape[2:]):
        return None
    rows, seq = v.shape[:2]
    found = []
    for sizes in ((2, 3), (3, 5)):
        given = {str(d): n for d, n in zip((rows, seq), sizes) if str(d).isidentifier()}
        if not isinstance(seq, int) and str(seq) in given:
            found.append(_read_off(v, given))
    return found[0] if found and None not in found and found[0] == found[1] else None


class _Leaves:
    """Values that elements come from, numbered one after the other."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes, self.known = sizes, dict[Value, tuple[int, tuple[int, ...]]]()
        self._count = 0

    def follow(self, v: Value) -> np.ndarray:
        node = v.node
        if node is not None and v.const is None and node.is_a(*_MOVES):
            return np.asarray(node.op.run(node.attrs, self.sizes, *(self.follow(u) for u in node.inputs)))
        if node is not None and (places := _written(node)) is not None:
            x, _, updates = node.inputs
            return np.asarray(node.op.run(node.attrs, self.sizes, self.follow(x), places, self.follow(updates)))
        if v not in self.known:
            shape = tuple(evaluate_dim(d, self.sizes) for d in v.shape)
            self.known[v] = self._count, shape
            self._count += prod(shape)
        first, shape = self.known[v]
        return np.arange(first, first + prod(shape)).reshape(shape)


def _written(node: Node) -> np.ndarray | None:
    """Where a node writes a part over another, place by place known beforehand (exporters' assignments to slices)."""
    if not isinstance(node.attrs, ScatterAttrs) or node.attrs.reduce != "none" or not node.is_a("scatter"):
        return None
    return node.inputs[1].const


def _read_off(v: Value, sizes: Mapping[str, int]) -> list[_Part] | None:
    leaves = _Leaves(sizes)
    try:
        if prod(evaluate_dim(d, sizes) for d in v.shape) > _MOST_ELEMENTS:
            return None
        numbers = leaves.follow(v)
    except (WasatError, ValueError, KeyError):  # other sizes, or checks that do not hold at these
        return None
    parts = []
    bounds = sorted((first, leaf) for leaf, (first, _) in leaves.known.items())
    of = np.searchsorted([first for first, _ in bounds], numbers, side="right") - 1
    if (of != of[:1, :1, :1]).any():
        return None
    turns = [0, *(np.flatnonzero(np.diff(of[0, 0, 0])) + 1), numbers.shape[3]]
    for lo, hi in pairwise(turns):
        first, leaf = bounds[of[0, 0, 0, lo]]
        _, shape = leaves.known[leaf]
        part = _part(leaf, np.unravel_index(numbers[..., lo:hi] - first, shape))
        if part is None:
            return None
        parts.append(part)
    return parts


def _part(leaf: Value, places: Sequence[np.ndarray]) -> _Part | None:
    """Features of ``leaf`` that stand at ``places``, one array [b, s, h, d] for each of its axes."""
    grids = np.indices(places[0].shape)
    if _is_product(leaf):
        at = [x for x, d in zip(places, leaf.shape[:-1]) if d != 1 or len(places) == 3]
        if len(at) == 2 and (at[0] == grids[0]).all() and (at[1] == grids[1]).all():
            return _Part(leaf, rows) if (rows := _alike(places[-1])) is not None else None
    order, others = [], list(range(len(places)))
    for grid in grids[:2]:
        along = [a for a in others if (places[a] == grid).all() and (grid.max() > 0 or leaf.shape[a] == 1)]
        if not along:
            return None
        order.append(along[0])
        others.remove(along[0])
    if not all(isinstance(leaf.shape[a], int) for a in others):
        return None
    shape = [int(str(leaf.shape[a])) for a in others]
    rows = _alike(np.ravel_multi_index([places[a] for a in others], shape) if others else np.zeros_like(places[0]))
    same = rows is not None and set(rows) == {rows[0]}
    return _Part(leaf, rows[:1], (*order, *others)) if rows is not None and same else None


def _alike(places: np.ndarray) -> tuple[tuple[int, ...], ...] | None:
    """The places [heads, features], if they are the same for all tokens."""
    return tuple(tuple(map(int, row)) for row in places[0, 0]) if (places == places[:1, :1]).all() else None


def _is_product(v: Value) -> bool:
    """Whether it is a vector per token [b, s, n], axes of size 1 between, times a weight, and nothing added."""
    node = v.node
    if node is None or not node.is_a("linear", "matmul") or len(node.inputs) != 2:
        return False
    x, w = node.inputs
    plain = isinstance(w.type, TensorType) and len(w.shape) == 2 and all(isinstance(d, int) for d in w.shape)
    vectors = len(x.shape) == 3 or sum(d != 1 for d in x.shape[:-1]) == 2
    return plain and vectors and w.tensor.dtype is x.tensor.dtype
