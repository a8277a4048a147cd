"""Keys and values that no token made, joined to those of the sequence: registers, a learned bias of keys, a key of zeros.

Wherever they stand among the keys, they come to stand in front in the cache; the tokens' own are attended to as if there were
no others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from wasat.ir import Builder, DimLike, Graph, Node, Value, equal, symbol
from wasat.ir.ops.attention import AttentionAttrs, mask_and_sink

from ..analyses.indexing import Indexing
from ..analyses.mask import Mask, analyze, hidden_by
from ..analyses.portion import Portions, beside
from ..pattern import erase_dead
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
