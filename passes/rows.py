"""Where each value keeps the rows of a batch: the analysis that lets them advance each at a place of its own.

The batch axis is the one that came from the tokens' first axis, wherever it stands now, alone or merged with others; what its
size is called, or comes to, says nothing. Rows that meet, in a mean, a softmax or a sort over them, cannot be served apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wasat.ir import DimLike, Graph, IRError, Node, Value, equal
from wasat.ir.dims import floordiv

from .axis import Label, LooksAhead, image


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


def places(graph: Graph, tokens: Value, labels: Mapping[Value, Label]) -> dict[Value, Place]:
    """The place of the rows in each value that differs between them.

    Raises IRError, with the node and the line, where rows meet on the way of the tokens.
    """
    batch = tokens.shape[0]
    found: dict[Value, Place] = {}
    for v in graph.inputs:
        own = [i for i, d in enumerate(v.shape) if equal(d, batch) is True and i not in labels[v].axes]
        if v is tokens:
            found[v] = FIRST
        elif batch != 1 and len(own) > 1:
            raise IRError(f"rows of a batch cannot be served apart: of input %{v.name}: {v.type}, several axes may be theirs")
        elif batch != 1 and own:
            found[v] = Place(own[0])
    for node in graph.nodes:
        label = labels[node.outputs[0]]
        if label.kind in ("ahead", "pair") or not any(v in found for v in node.inputs):
            continue
        try:
            place = _place(node, [found.get(v) for v in node.inputs], batch)
        except LooksAhead as e:
            if label.kind == "fixed":
                continue  # computed once, for all rows together
            raise IRError(f"rows of a batch cannot be served apart: {node!r}\n  {e}", node.loc) from None
        found.update((v, place) for v in node.outputs)
    return found


def _place(node: Node, given: Sequence[Place | None], batch: DimLike) -> Place:
    if node.op.name == "reshape":
        assert given[0] is not None
        return _reshaped(node, given[0], batch)
    ends = {Place(_image(node, i, p.axis), p.outer, p.inner) for i, p in enumerate(given) if p is not None}
    if len(ends) != 1:
        raise LooksAhead("its operands keep the rows on different axes")
    return ends.pop()


def _image(node: Node, i: int, axis: int) -> int:
    """The axis of the result that holds what ``axis`` of operand i held."""
    name = node.op.name
    if name == "attention":
        if axis != 0 or (i > 2 and len(node.inputs[i].shape) < 4):
            raise LooksAhead("the rows are not its first axis")
        return 0
    if name == "rope" and axis in ((0, 2) if i == 0 else (0,)):  # heads are turned alike, as rows are
        return axis
    if name == "concat" and axis != node.attrs.axis:  # type: ignore[attr-defined]
        return axis
    try:
        return image(node, i, axis)
    except LooksAhead:
        raise LooksAhead("rows meet here, or change their order") from None
    except KeyError:
        raise LooksAhead(f"nothing is known of how {node.op.name} acts on rows") from None


def _reshaped(node: Node, place: Place, batch: DimLike) -> Place:
    """The same elements in the same order: as many rows after as many elements."""
    x, y = node.inputs[0].shape, node.output.shape
    before: DimLike = place.outer
    for d in x[: place.axis]:
        before = before * d
    done: DimLike = 1
    for j, d in enumerate(y):
        outer = _quotient(before, done)
        inner = None if outer is None else _quotient(d, outer * batch)
        if outer is not None and inner is not None:
            return Place(j, outer, inner)
        done = done * d
    raise LooksAhead("it takes rows apart")


def _quotient(a: DimLike, b: DimLike) -> DimLike | None:
    """a / b where b divides a for every binding."""
    if b == 0:
        return None
    q = floordiv(a, b)
    return q if equal(q * b, a) is True else None
