"""Weights of attention, and what stands beside the keys: logits of each head that take part in the softmax and are dropped.

softmax([scores, sink])[..., :-1], or exp(scores - m) / (sum(exp(scores - m)) + exp(sink - m)) for any m, the same written out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from wasat.ir import Builder, DimLike, DType, Node, Value, equal
from wasat.ir.ops.nn import SoftmaxAttrs
from wasat.ir.ops.reduce import ReduceAttrs
from wasat.ir.ops.shape import Concat, Pad, Slice

from ..analyses.factors import Atom, View, arrange, product, view_of
from ..pattern import number_of

Sink = Value | float
"""A number, or a value that aligns with scores [b, .., s, t]: of one element or more on the last axis."""


@dataclass
class Weights:
    """Scores that become weights."""

    node: Node
    """That makes the weights."""
    scores: Value
    axis: int
    sinks: list[Sink] = field(default_factory=list)
    front: int = 0
    """How many of the softmax's elements stand before the keys."""
    joined: bool = False
    """Whether the weights are those of sinks too, to be dropped behind ``node``."""
    own: frozenset[Node] = frozenset()
    """The nodes that may read the scores: they are behind nothing but the weights."""


def weights(node: Node) -> Weights | None:
    """The weights that a node makes of scores; None for another node."""
    if node.is_a("softmax"):
        return _joined(node)
    return _written_out(node) if node.is_a("div") else None


def _joined(softmax: Node) -> Weights:
    """Scores and what was joined to them along the axis of the softmax."""
    axis, x = SoftmaxAttrs.of(softmax).axis, softmax.inputs[0]
    w = Weights(softmax, x, axis, own=frozenset([softmax]))
    own = {softmax}
    while (n := x.node) is not None and len(x.uses) == 1:
        attrs = n.attrs
        if n.is_a("cast") and n.inputs[0].tensor.dtype.is_float:
            x = n.inputs[0]
        elif isinstance(attrs, Concat.Attrs) and attrs.axis == axis:
            at = [i for i, v in enumerate(n.inputs) if not isinstance(v.shape[axis], int)]
            if len(at) != 1:
                break
            w.front += sum(d for v in n.inputs[: at[0]] if isinstance(d := v.shape[axis], int))
            w.sinks += [v for i, v in enumerate(n.inputs) if i != at[0]]
            x = n.inputs[at[0]]
        elif isinstance(attrs, Pad.Attrs):
            low, high = attrs.low[axis], attrs.high[axis]
            others = [d for d in range(len(x.shape)) if d != axis]
            if any(attrs.low[d] != 0 or attrs.high[d] != 0 for d in others):
                break
            if not isinstance(low, int) or not isinstance(high, int) or min(low, high) < 0:
                break
            w.front += low
            w.sinks += [attrs.value] * (low + high)
            x = n.inputs[0]
        else:
            break
        own.add(n)
        if w.sinks:
            w.scores, w.joined, w.own = x, True, frozenset(own)
    return w


def _written_out(div: Node) -> Weights | None:
    """exp(u) / (sum(exp(u)) + z): z = exp(w) is a sink, of logit w; of u = scores - m and w = sink - m, m is neither here nor
    there."""
    top, below = div.inputs
    if (raised := top.made_by("exp")) is None or top.type != div.output.type:
        return None
    terms = list(_terms(below))
    total = next((t for t in terms if _is_sum(t, top)), None)
    others = [t for t in terms if t is not total]
    if total is None or not others:
        return None
    u, sinks = raised.inputs[0], [_logarithm(t) for t in others]
    shift = less.inputs[1] if (less := u.made_by("sub")) is not None else None
    whole = [s for s in sinks if s is not None]
    if len(whole) != len(sinks):
        return None
    if shift is not None and shift.shape[-1:] == (1,):
        back = [_unshifted(s, shift) for s in whole]
        if None not in back:
            assert u.node is not None
            return _made(div, u.node.inputs[0], [s for s in back if s is not None])
    return _made(div, u, whole)


def _made(div: Node, scores: Value, sinks: list[Sink]) -> Weights | None:
    if scores.shape != div.output.shape:
        return None
    own: set[Node] = set()
    stack = [div]
    while stack:
        n = stack.pop()
        own.add(n)
        above = [v.node for v in n.inputs if v is not scores and v.node is not None and _behind(v, scores)]
        stack += [u for u in above if u not in own]
    return Weights(div, scores, len(scores.shape) - 1, sinks, own=frozenset(own))


def _behind(v: Value, scores: Value) -> bool:
    """Whether ``v`` is made of the scores, within a few steps."""
    stack, seen = [(v, 8)], {v}
    while stack:
        x, depth = stack.pop()
        if x is scores:
            return True
        if x.node is not None and depth:
            stack += [(u, depth - 1) for u in x.node.inputs if u not in seen]
            seen.update(x.node.inputs)
    return False


def _terms(v: Value) -> Iterator[Value]:
    if (total := v.made_by("add")) is not None:
        for x in total.inputs:
            yield from _terms(x)
    else:
        yield v


def _is_sum(v: Value, of: Value) -> bool:
    node, last = v.node, len(of.shape) - 1
    if node is not None and node.is_a("reshape") and tuple(v.shape) == (*node.inputs[0].shape, 1):
        node = node.inputs[0].node
    elif v.shape[-1:] != (1,):
        return False
    return node is not None and node.is_a("reduce_sum") and node.inputs[0] is of and (
        ReduceAttrs.of(node).axes == (last,)
    )  # fmt: skip


def _logarithm(v: Value) -> Sink | None:
    x = number_of(v)
    if x is not None:
        return math.log(x) if x > 0 else None
    raised = v.made_by("exp")
    if raised is None or v.shape[-1:] not in ((), (1,)):  # another one for each key
        return None
    return raised.inputs[0]


def _unshifted(sink: Sink, shift: Value) -> Sink | None:
    """``sink`` + ``shift``, where the sink was made by taking it away."""
    n = sink.node if isinstance(sink, Value) else None
    if n is not None and n.is_a("neg") and n.inputs[0] is shift:
        return 0.0
    if n is not None and n.is_a("sub") and n.inputs[1] is shift:
        x = number_of(n.inputs[0])
        return n.inputs[0] if x is None else x
    return None


def drops(w: Weights, node: Node) -> bool:
    """Whether a node takes the weights of the keys, of those of keys and sinks."""
    if not isinstance(node.attrs, Slice.Attrs):
        return False
    a, shape = node.attrs, node.inputs[0].shape
    lo, hi = [0] * len(shape), list(shape)
    lo[-1], hi[-1] = w.front, w.front + w.scores.shape[-1]
    same = all(equal(x, y) is True for x, y in zip((*a.starts, *a.stops), (*lo, *hi)))
    return same and set(a.steps) <= {1}


@dataclass
class Logits:
    """Sinks of each head."""

    parts: list[tuple[View, list[Atom], list[Atom]] | float]
    """Numbers, and views with the atoms of heads and of columns."""

    @staticmethod
    def of(sinks: Sequence[Sink], lead: Sequence[DimLike], count: DimLike) -> Logits | str:
        """Those of ``count`` heads, of scores with the axes ``lead`` (rows, and heads) before the queries'; or what does not
        allow it."""
        parts: list[tuple[View, list[Atom], list[Atom]] | float] = []
        for s in sinks:
            if not isinstance(s, Value):
                parts.append(s)
                continue
            view = view_of(s)
            axes: list[list[Atom]] = [[] for _ in range(len(lead) + 2 - len(view.axes))] + view.axes
            if any(not a.broadcast for a in (*axes[0], *axes[-2])):
                return f"the sink %{s.name} is not the same for all rows and queries"
            heads = [a for d, axis in zip(lead[1:], axes[1:-2]) for a in (axis or [Atom(d, broadcast=True)]) if a.size != 1]
            if all(a.broadcast for a in heads):
                heads = [Atom(count, broadcast=True)]
            elif equal(product(heads), count) is not True:
                return f"the sink %{s.name} is of {product(heads)} heads, of {count} that there are"
            parts.append((view, heads, axes[-1]))
        return Logits(parts)

    def emit(self, b: Builder, heads: DimLike, dtype: DType) -> Value:
        """[heads], of several sinks the one that is as heavy."""
        made = [self._columns(b, p, heads, dtype) for p in self.parts]
        x = made[0] if len(made) == 1 else b.concat(*made, axis=1)
        return b.reshape(x, shape=(heads,)) if x.shape[1] == 1 else b.logsumexp(x, axes=(1,))

    @staticmethod
    def _columns(b: Builder, part: tuple[View, list[Atom], list[Atom]] | float, heads: DimLike, dtype: DType) -> Value:
        """[heads, columns]"""
        if isinstance(part, float):
            return b.broadcast_to(b.constant(part, dtype), shape=(heads, 1))
        view, own, columns = part
        atoms = [*own, *columns]
        x = arrange(b, view, [[a] for a in atoms if not a.broadcast])
        x = b.reshape(b.cast(x, dtype=dtype), shape=tuple(1 if a.broadcast else a.size for a in atoms))
        x = b.broadcast_to(x, shape=tuple(a.size for a in atoms))
        return b.reshape(x, shape=(heads, product(columns)))


__all__ = ["Logits", "Sink", "Weights", "drops", "weights"]
