"""Linear attention in its quadratic form: scores without a softmax, times decays by the distance, hidden where a key is later.

    (q @ k^T * decays) @ v, or its sum over the keys, which is the same with ones for values

as retention, Lightning attention, gated linear attention and Mamba2 are often written for many tokens at once. It is known by
what it comes to, as chunks are (:mod:`.chunked`): at a few tokens, and at as many as tell a mask that ends somewhere from one
that does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from wasat.ir import Builder, DimLike, Graph, Node, Op, Value
from wasat.ir.dims import equal, symbols_of
from wasat.ir.ops.reduce import ReduceAttrs

from ..pattern import Mismatch, taken_back
from .chunked import ANALYTIC, Operand, Region, Role, Search, emitted

_MOST = 1030
"""Tokens at which it is computed, of few heads."""
_SMOOTH = (*ANALYTIC, "div", "log", "pow", "sqrt")
"""Of fractions of positions; what else takes such may have a step far out."""
_MOST_SCORES = 1 << 22


def square_of(node: Node) -> Value | None:
    """The scores [.., s, s] that are multiplied by values or summed over the keys."""
    if node.is_a("matmul"):
        scores = node.inputs[0]
        if len(scores.shape) != 4 or len(node.inputs[1].shape) != 4:
            return None
    elif node.is_a("reduce_sum"):
        scores = node.inputs[0]
        if len(scores.shape) != 4 or ReduceAttrs.of(node).axes != (3,):
            return None
    else:
        return None
    s, t = scores.shape[2:]
    return scores if symbols_of([s]) == (str(s),) and equal(s, t) is True else None


def fused(graph: Graph, node: Node, scores: Value, known: dict[str, Role | str]) -> str | None:
    """Replaces ``node`` by linear attention; returns the rule. None where it is something else."""
    s = scores.shape[2]
    rows: list[tuple[Op, Value]] = []
    while (made := scores.made_by("mul", "div")) is not None:  # by what each query has: after the sum as well as before it
        x, y = made.inputs
        if _of_queries(y) and equal(x.shape[-1], s) is True:
            scores = x
            rows.append((made.op, y))
        elif made.is_a("mul") and _of_queries(x) and equal(y.shape[-1], s) is True:
            scores = y
            rows.append((made.op, x))
        else:
            break
    if not _analytic(scores):
        return None
    b = Builder(graph, before=node, loc=node.loc)
    try:
        with taken_back(graph, node):
            y, rule = _emitted(b, node, scores, known)
    except Mismatch:
        return None
    for op, row in reversed(rows):
        y = b.emit(op, y, row)
    if node.is_a("reduce_sum") and not ReduceAttrs.of(node).keepdims:
        y = b.reshape(y, shape=y.shape[:3])
    graph.replace(node, [y])
    return rule


def _emitted(b: Builder, node: Node, scores: Value, known: dict[str, Role | str]) -> tuple[Value, str]:
    s = scores.shape[2]
    if node.is_a("matmul"):
        values, given = node.inputs[1], []
    else:
        dtype = scores.tensor.dtype
        ones = b.broadcast_to(b.constant(1.0, dtype), shape=(scores.shape[0], s, scores.shape[1], 1))
        values, given = b.transpose(ones, perm=(0, 2, 1, 3)), [ones]
    y = b.matmul(scores, values)
    root = y.node
    assert root is not None
    region = _region(y, s, given)
    cone = region.cone(y)
    heads = scores.shape[1]
    if not isinstance(heads, int):
        raise Mismatch("heads are not known")
    most = min(_MOST, int((_MOST_SCORES / heads) ** 0.5))
    text = f"{cone} {[x.axes for x in region.operands]}"
    if text not in known:
        try:
            _bounded(cone, most)
            known[text] = Search(region, cone, y, 2, (5, 1, 2, 13, most)).role()
        except Mismatch as e:
            known[text] = str(e)
    role = known[text]
    if isinstance(role, str):
        raise Mismatch(role)
    return emitted(b, region.operands, role, y, 2), role.attrs.rule


def _of_queries(v: Value) -> bool:
    return len(v.shape) == 4 and equal(v.shape[3], 1) is True


def _analytic(v: Value) -> bool:
    """Not what a softmax or the like made: to be asked before anything is computed."""
    return v.node is not None and v.node.is_a(*ANALYTIC)


def _bounded(cone: Graph, tokens: int) -> None:
    """Raises Mismatch where a number among the positions may matter beyond so many tokens: the end of a window, a table."""
    steps = any(not n.is_a(*_SMOOTH) and any(v.tensor.dtype.is_float for v in n.inputs) for n in cone.nodes)
    for node in cone.nodes:
        x = node.outputs[0].const
        if x is None or x.dtype.kind == "b":
            continue
        size = np.abs(np.asarray(x, np.float64))
        seen = size[np.isfinite(size) & (size != 0)]
        far = (seen > tokens / 2) & (seen < 1e6)
        if x.size > tokens / 2 or far.any() or (steps and (seen < 2 / tokens).any()):
            raise Mismatch(f"%{node.outputs[0].name} may end what is seen")


def _along(v: Value, name: str) -> list[int]:
    return [i for i, d in enumerate(v.shape) if name in symbols_of([d])]


def _of_positions(v: Value, made: dict[Value, bool]) -> bool:
    """Whether no input and no parameter is among what it is made of."""
    waiting = [v]
    while waiting:
        x = waiting[-1]
        if x in made:
            waiting.pop()
            continue
        if x.node is None or x.node.op.kind in ("random", "collective"):
            made[x] = False
            continue
        left = [u for u in x.node.inputs if u not in made]
        if left and all(made.get(u, True) for u in x.node.inputs):
            waiting += left
        else:
            made[x] = all(made[u] for u in x.node.inputs if u in made)
    return made[v]


def _region(root: Value, s: DimLike, given: Sequence[Value]) -> Region:
    """From ``root`` back to what each token has: q, k, v, and the decays before they are summed up. ``given`` are such."""
    [name] = symbols_of([s])
    made: dict[Value, bool] = {}
    operands: dict[Value, Operand] = {}
    nodes: list[Node] = []
    seen: set[Value] = set()
    waiting = [(root, False)]
    while waiting:
        v, ready = waiting.pop()
        if ready:
            assert v.node is not None
            nodes.append(v.node)
            continue
        if v in seen:
            continue
        seen.add(v)
        given_here = v in given
        if v is root or (not given_here and _of_positions(v, made)):
            inner = True
        else:
            axes = _along(v, name)
            if not axes:
                raise Mismatch(f"%{v.name} is of all tokens")
            inner = not given_here and (len(axes) > 1 or equal(v.shape[axes[0]], s) is not True or _passed(v, axes[0], s, name))
        if not inner:
            [at] = _along(v, name)
            others = [i for i in range(len(v.shape)) if i != at]
            if len(others) not in (2, 3):
                raise Mismatch(f"%{v.name} is not [batch, sequence, head, ..]")
            operands[v] = Operand(v, (others[0], at, *others[1:]))
            continue
        if v.node is None or len(nodes) > 200:
            raise Mismatch(f"%{v.name} stands between")
        seen.update(v.node.outputs)
        waiting += [(v, True), *((u, False) for u in v.node.inputs)]
    if not 2 <= len(operands) <= 4:
        raise Mismatch(f"{len(operands)} values of tokens meet")
    return Region(list(operands.values()), nodes)


def _passed(v: Value, at: int, s: DimLike, name: str) -> bool:
    """Whether what each token has of it is found further back: a sum over tokens, or a view of an operand or of a sum."""
    if v.made_by("cumsum") is not None:
        return True
    made = v.made_by("transpose", "reshape", "broadcast_to")
    if made is None:
        return False
    x = made.inputs[0]
    axes = _along(x, name)
    if len(axes) != 1 or equal(x.shape[axes[0]], s) is not True or len(x.shape) < 3:
        return False
    kept = [d for d in x.shape if equal(d, 1) is not True]
    return not made.is_a("reshape") or (len(x.shape) <= 4 and kept == [d for d in v.shape if equal(d, 1) is not True])
