"""Keys and values that no token made, joined to those of the sequence: registers, a learned bias of keys, a key of zeros.

Wherever they stand among the keys, they come to stand in front in the cache; the tokens' own are attended to as if there were
no others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import reduce

from wasat.ir import Builder, DimLike, Graph, Node, Value, equal, symbol
from wasat.ir.ops.attention import AttentionAttrs, mask_and_sink
from wasat.ir.ops.shape import Slice

from ..analyses.indexing import Indexing
from ..analyses.mask import Mask, analyze, hidden_by
from ..analyses.portion import Portions, beside
from ..pattern import erase_dead, replace
from .lead import Led


def set_apart(graph: Graph, seq: str) -> Led | None:
    """Changes ``graph``: attention over keys beside those of the sequence ``seq`` reads the latter alone, and what is to stand
    first in its cache is noted. None where there is no such attention."""
    led = Led(graph, 0, {})
    for node in graph.nodes:
        if isinstance(node.attrs, AttentionAttrs):
            _apart(led, node, symbol(seq))
    led.lead = max((n for k, _ in led.first.values() if isinstance(n := k.shape[1], int)), default=0)
    return led if led.first else None


def _apart(led: Led, node: Node, size: DimLike) -> None:
    """Puts attention over ``size`` tokens' own keys in the place of ``node``, if that reads others too."""
    graph, attrs, (q, k, v, *more) = led.graph, AttentionAttrs.of(node), node.inputs
    if equal(q.shape[1], size) is not True or (sides := beside(k, 1, size)) in (None, (0, 0)) or sides != beside(v, 1, size):
        return
    assert sides is not None
    front, back = sides
    mask, sink = mask_and_sink(attrs, more)
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask is not None and (said := _said(mask, shape)).causal >= attrs.causal and said.window == attrs.window:
        attrs = dataclasses.replace(attrs, causal=False, window=None)  # what the mask says itself
    if back != 0 and (mask is None or attrs.causal or attrs.window is not None):
        return  # predicates count from the end: each query but the last sees a key less of what stands there
    if mask is not None and equal(mask.shape[-1], k.shape[1]) is not True:
        return
    b = Builder(graph, before=node, loc=node.loc)
    portions = Portions(b)

    def others(x: Value, axis: int) -> Value:
        parts = [portions.of(x, axis, at, n) for at, n in ((0, front), (front + size, back)) if n != 0]
        return parts[0] if len(parts) == 1 else b.concat(*parts, axis=axis)

    given = [q, *(portions.of(x, 1, front, size) for x in (k, v))]
    first = [others(x, 1) for x in (k, v)]
    if mask is not None:
        axis = len(mask.shape) - 1
        own: Value | None = portions.of(mask, axis, front, size)
        seen = others(mask, axis)
        assert own is not None
        causal = attrs.causal or _said(own, (*shape[:3], size), whole=True) == Mask(causal=True)
        if not _shows(seen):
            led.seen[own] = seen
        elif causal and not (attrs.causal and not _shows(own)):
            own = None
        attrs = dataclasses.replace(attrs, causal=causal)
        given += [] if own is None else [own]
    given += [] if sink is None else [sink]
    made = graph.add_node(node.op, given, attrs, before=node, loc=node.loc)
    led.first[made] = first[0], first[1]
    graph.replace_uses(node.output, made.output)
    erase_dead(graph, node, {*first, *led.seen.values()})


def sums_apart(graph: Graph, seq: str) -> None:
    """Changes ``graph``: a sum over the ``seq`` tokens' own values and others becomes a sum for each; so do those of a softmax.
    That is how scores are understood that no attention sums."""
    size = symbol(seq)
    sides: dict[str, tuple[DimLike, DimLike]] = {}
    for node in graph.nodes:
        if node.op.kind != "product" or len(node.outputs) != 1 or len(node.inputs) != 2:
            continue
        rule = node.axes
        for f in {f for axes in rule.operands for axis in axes for f in axis if f.role == "reduced"}:
            at = [next((i for i, axis in enumerate(axes) if axis == (f,)), -1) for axes in rule.operands]
            if -1 in at or isinstance(f.size, int) or equal(f.size, size) is True:
                continue
            found = [x for v, axis in zip(node.inputs, at) if (x := beside(v, axis, size)) is not None]
            if not found or not all(isinstance(n, int) for n in found[0]):
                continue
            sides[str(f.size)] = found[0]
            b = Builder(graph, before=node, loc=node.loc)
            portions, total = Portions(b), None
            for first, count in _thirds(*found[0], size):
                given = [portions.of(v, axis, first, count) for v, axis in zip(node.inputs, at)]
                y = graph.add_node(node.op, given, node.attrs, before=node, loc=node.loc).output
                total = y if total is None else b.add(total, y)
            assert total is not None
            replace(graph, node.output, total)
            break
    for node in graph.nodes if sides else ():
        if node.is_a("softmax"):
            axis = next(i for i, axis in enumerate(node.axes.operands[0]) if any(f.role == "normalized" for f in axis))
            if (two := sides.get(str(node.output.shape[axis]))) is not None:
                _normalize_apart(graph, node, axis, _thirds(*two, size))


def _normalize_apart(graph: Graph, node: Node, axis: int, thirds: list[tuple[DimLike, DimLike]]) -> None:
    """Puts shares of the parts' common sum in the place of what is cut from a softmax; where more reads it, leaves it."""
    cuts = [user.attrs for user in node.output.users]
    places = [(c.starts[axis], c.stops[axis] - c.starts[axis]) for c in cuts if isinstance(c, Slice.Attrs)]
    if graph.is_output(node.output) or len(places) < len(cuts) or not all(place in thirds for place in places):
        return
    b = Builder(graph, before=node, loc=node.loc)
    portions = Portions(b)
    scores = [portions.of(node.inputs[0], axis, first, count) for first, count in thirds]
    top = [b.reduce_max(x, axes=(axis,), keepdims=True) for x in scores]
    most = reduce(b.maximum, top)
    raised = [b.exp(b.sub(x, most)) for x in scores]
    total = reduce(b.add, [b.reduce_sum(x, axes=(axis,), keepdims=True) for x in raised])
    shares = dict(zip(thirds, [b.div(x, total) for x in raised]))
    for user in node.output.users:
        cut = Slice.Attrs.of(user)
        place = cut.starts[axis], cut.stops[axis] - cut.starts[axis]
        starts, stops = (tuple(n if i == axis else d for i, d in enumerate(ends))
                         for ends, n in ((cut.starts, 0), (cut.stops, place[1])))  # fmt: skip
        replace(graph, user.output, b.slice(shares[place], starts=starts, stops=stops, steps=cut.steps))
    if not node.erased:
        erase_dead(graph, node)


def _thirds(front: DimLike, back: DimLike, size: DimLike) -> list[tuple[DimLike, DimLike]]:
    """Where what stands in front, between and behind begins, and how much it is."""
    return [(at, n) for at, n in ((0, front), (front, size), (front + size, back)) if n != 0]


def _said(mask: Value, shape: Sequence[DimLike], whole: bool = False) -> Mask:
    """The predicates in a mask; if they are to be the ``whole`` of it, none where they are not."""
    if not mask.tensor.dtype.is_float:
        return analyze(mask, shape)
    read = hidden_by(mask, shape)
    return read[0] if read is not None and (read[1] or not whole) else Mask()


def _shows(mask: Value) -> bool:
    """Whether a mask hides nothing, wherever a query stands."""
    keep = 0 if mask.tensor.dtype.is_float else 1
    return all(p.number == keep for p in Indexing(()).pieces(mask))
