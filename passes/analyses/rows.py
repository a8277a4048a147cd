"""Where each value keeps the rows of a batch: the analysis that lets them advance each at a place of its own.

The batch axis is the one that came from the tokens' first axis, wherever it stands now, alone or merged with others; what its
size is called, or comes to, says nothing. Rows that meet, in a mean, a softmax or a sort over them, cannot be served apart, and
neither can what depends on which row it is of, or on how many there are: a session calls for some of its rows, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from wasat.ir import DimLike, Graph, IRError, Node, Value, equal, symbols_of
from wasat.ir.axes import AxisRule, product, quotient
from wasat.ir.ops.attention import AttentionAttrs
from wasat.ir.ops.scan import ScanAttrs

from .sequence import Label, LooksAhead


@dataclass(frozen=True)
class Place:
    """The rows of the batch within ``axis``, whose size is ``outer`` * batch * ``inner``."""

    axis: int
    outer: DimLike = 1
    inner: DimLike = 1

    @property
    def alone(self) -> bool:
        """Whether the axis is the batch and no more."""
        return self.outer == 1 and self.inner == 1


FIRST = Place(0)


def places(
    graph: Graph, tokens: Value, labels: Mapping[Value, Label], merged: dict[Node, Place] | None = None
) -> dict[Value, Place]:
    """The place of the rows in each value that differs between them. ``merged`` receives attention whose queries, keys and
    values have more than rows on the axis of the rows, which is an error without it.

    Raises IRError, with the node and the line, where rows meet on the way of the tokens.
    """
    batch = tokens.shape[0]
    found: dict[Value, Place] = {}
    counted: set[Value] = set()
    for v in graph.inputs:
        own = [i for i, d in enumerate(v.shape) if equal(d, batch) is True and i not in labels[v].axes]
        if v is tokens:
            found[v] = FIRST
        elif batch != 1 and len(own) > 1:
            raise IRError(f"rows of a batch cannot be served apart: of input %{v.name}: {v.type}, several axes may be theirs")
        elif batch != 1 and own:
            found[v] = Place(own[0])
    for node in graph.nodes:
        label = labels[node.outputs[-1]]  # a scan's carry comes first
        if label.kind == "ahead":
            continue
        if any(v in counted for v in node.inputs) or _counts(node, found, batch):
            if label.kind == "fixed" and not any(labels[v].rows for v in node.inputs):
                counted.update(node.outputs)
            elif label.kind != "fixed":
                raise IRError(f"rows of a batch cannot be served apart: {node!r}\n  {_COUNTS}", node.loc)
        if (label.kind == "pair" and not label.rows) or not any(v in found for v in node.inputs):
            continue
        try:
            for v, place in zip(node.outputs, _outputs(node, [found.get(v) for v in node.inputs], batch)):
                if place is not None:
                    found[v] = place
            if isinstance(node.attrs, AttentionAttrs) and label.mixes and found[node.output] != FIRST:
                if merged is not None and all(v in found for v in node.inputs[:3]):
                    merged[node] = found[node.output]
                    continue
                raise LooksAhead("the rows are not its first axis")
        except LooksAhead as e:
            if label.kind == "fixed":
                continue  # computed once, for all rows together
            raise IRError(f"rows of a batch cannot be served apart: {node!r}\n  {e}", node.loc) from None
    return found


_COUNTS = "it depends on which row it is of, or on how many rows there are"


def repeats(v: Value, axis: int) -> bool:
    """Whether a value is the same at each index of an axis (counted from the end), because it was repeated along it."""
    node, axis = v.node, axis + len(v.shape)
    if node is None or len(node.outputs) != 1 or axis < 0:
        return False
    rule = node.axes
    own = rule.result[axis]
    if all(f.role == "repeated" for f in own):
        return True
    factor, *others = own
    if others or factor.role != "free":
        return False
    found = [(u, i, a) for u, axes in zip(node.inputs, rule.operands) for i, a in enumerate(axes) if factor in a]
    return bool(found) and all(a == own and repeats(u, i - len(u.shape)) for u, i, a in found)


def _counts(node: Node, found: Mapping[Value, Place], batch: DimLike) -> bool:
    """Whether a node makes something that tells rows apart, or their number, of what is the same for all of them."""
    rows = set(symbols_of([batch]))
    if rows.isdisjoint(symbols_of([d for v in (*node.inputs, *node.outputs) for d in v.shape])):
        return not rows.isdisjoint(node.attrs.symbols)
    if isinstance(node.attrs, ScanAttrs) and any(v in found for v in node.inputs):
        return False  # its body tells
    rule = node.axes
    own = [f for axes in rule.operands for axis in axes for f in axis]
    alike = [axes for v, axes in zip(node.inputs, rule.operands) if v not in found]
    same = [f for axes in alike for axis in axes for f in axis if f.role != "free"]
    made = [f for axes in rule.results for axis in axes for f in axis if f.role != "repeated" and f not in own]
    if any(v in found for v in node.inputs):
        made = []  # where the rows go is settled by the rule
    return any(not rows.isdisjoint(symbols_of([f.size])) for f in [*same, *made])


def _outputs(node: Node, given: Sequence[Place | None], batch: DimLike) -> list[Place | None]:
    if isinstance(node.attrs, ScanAttrs):
        return _scan(node.attrs, given, batch)
    return [_place(node, given, batch, i) for i in range(len(node.outputs))]


def _scan(attrs: ScanAttrs, given: Sequence[Place | None], batch: DimLike) -> list[Place | None]:
    """Of each result of a scan; of what it carries, as the turns leave it."""
    body, c, s = attrs.body.graph, attrs.carries, attrs.slices
    start: dict[Value, Place] = {}
    for i, (v, place) in enumerate(zip(body.inputs, given)):
        if place is not None and c <= i < c + s:
            if place.axis == 0:
                raise LooksAhead("rows meet here, turn by turn")
            place = replace(place, axis=place.axis - 1)
        if place is not None:
            start[v] = place
    while True:  # until a turn adds no carry
        found = dict(start)
        for node in body.nodes:
            if _counts(node, found, batch):
                raise LooksAhead(_COUNTS)
            if any(v in found for v in node.inputs):
                made = _outputs(node, [found.get(v) for v in node.inputs], batch)
                found.update((v, place) for v, place in zip(node.outputs, made) if place is not None)
        after = {v: found[out] for v, out in zip(body.inputs[:c], body.outputs) if out in found}
        if any(start.get(v, place) != place for v, place in after.items()):
            raise LooksAhead("its carry keeps the rows on another axis after a turn")
        if start.keys() >= after.keys():
            break
        start |= after
    rows = [found.get(v) for v in body.outputs[c:]]
    return [*(start.get(v) for v in body.inputs[:c]), *(None if p is None else replace(p, axis=p.axis + 1) for p in rows)]


def _place(node: Node, given: Sequence[Place | None], batch: DimLike, result: int) -> Place:
    rule = node.axes
    ends = {_image(rule, i, p, batch, result) for i, p in enumerate(given) if p is not None}
    if len(ends) != 1:
        raise LooksAhead("its operands keep the rows on different axes")
    return ends.pop()


def _image(rule: AxisRule, i: int, place: Place, batch: DimLike, result: int) -> Place:
    """Where a result has what operand i holds at ``place``: the factor of the rows goes on, with what it is merged with."""
    before: DimLike = 1
    for f in rule.operands[i][place.axis]:
        outer = quotient(place.outer, before)
        inner = None if outer is None else quotient(f.size, outer * batch)
        if outer is None or inner is None:
            before = before * f.size
            continue
        if f.role != "free" or (j := rule.place(f, result)) is None:
            break
        axis = rule.results[result][j]
        at = axis.index(f)
        return Place(j, product(*(g.size for g in axis[:at]), outer), product(inner, *(g.size for g in axis[at + 1 :])))
    raise LooksAhead("rows meet here, or change their order")
