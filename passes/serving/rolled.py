"""Sequences that were rolled: what comes round from the end stands in front, and where nobody reads it, the roll is a shift.

    select(i < 1, 0, roll(x, 1))      what token i - 1 was, and 0 for the first
"""

from __future__ import annotations

from wasat.ir import Builder, Graph, Node, Value, equal, symbol
from wasat.ir.ops.index import AxisAttrs
from wasat.ir.ops.shape import Concat, Slice

from ..analyses.affine import Affine, empty
from ..analyses.indexing import Indexing
from ..pattern import replace


def shift_instead(graph: Graph, seq: str) -> None:
    """Changes ``graph``: rolls along ``seq`` whose first elements nothing reads."""
    at, size = Indexing(()), symbol(seq)
    for node in graph.nodes:
        if len(node.outputs) != 1 or (found := _rolled(node, seq, at)) is None:
            continue
        x, axis, count = found
        if _unread(graph, node.output, axis, count, at):
            for user in node.output.users:
                if isinstance(cut := user.attrs, Slice.Attrs) and _hides(user, node.output, axis, count, at):
                    starts, stops = (
                        tuple(d - count if i == axis else d for i, d in enumerate(ends)) for ends in (cut.starts, cut.stops)
                    )  # of what was not rolled
                    b = Builder(graph, before=user, loc=user.loc)
                    replace(graph, user.output, b.slice(x, starts=starts, stops=stops, steps=cut.steps))
            if node.erased:
                continue
            b = Builder(graph, before=node, loc=node.loc)
            low, none = [[n if i == axis else 0 for i in range(len(x.shape))] for n in (count, 0)]
            stops = tuple(size - count if i == axis else d for i, d in enumerate(x.shape))
            earlier = b.slice(x, starts=tuple(none), stops=stops, steps=(1,) * len(none))
            replace(graph, node.output, b.pad(earlier, low=tuple(low), high=tuple(none)))


def _rolled(node: Node, seq: str, at: Indexing) -> tuple[Value, int, int] | None:
    """(x, axis, n) where element i of ``node`` is element i - n of x, and the first n are its last."""
    size = symbol(seq)
    if isinstance(node.attrs, Concat.Attrs) and len(node.inputs) == 2:
        axis, cuts = node.attrs.axis, [n for v in node.inputs if (n := v.made_by("slice")) is not None]
        if len(cuts) != 2 or cuts[0].inputs[0] is not cuts[1].inputs[0]:
            return None
        x, (last, first) = cuts[0].inputs[0], (Slice.Attrs.of(n) for n in cuts)
        count = node.inputs[0].shape[axis]
        whole = all(n.output.shape[i] == d for n in cuts for i, d in enumerate(x.shape) if i != axis)
        ends = equal(x.shape[axis], size) is True and equal(last.starts[axis], size - count) is True and first.starts[axis] == 0
        steps = {last.steps[axis], first.steps[axis]} == {1} and equal(first.stops[axis], size - count) is True
        return (x, axis, count) if isinstance(count, int) and whole and ends and steps else None
    axis = AxisAttrs.of(node).axis if node.is_a("gather") else -1
    if axis < 0 or equal(node.inputs[0].shape[axis], size) is not True or (turn := node.inputs[1].made_by("mod")) is None:
        return None
    index, round_ = at.of(turn.inputs[0]), at.of(turn.inputs[1])
    if index is None or round_ is None or index.terms != (1,) or equal(round_.const, size) is not True:
        return None
    return (node.inputs[0], axis, -index.const) if isinstance(index.const, int) and index.const < 0 else None


def _unread(graph: Graph, v: Value, axis: int, count: int, at: Indexing) -> bool:
    """Whether nothing reads the first ``count`` elements of ``v`` along ``axis``."""
    waiting = [(v, axis)]
    while waiting:
        x, axis = waiting.pop()
        if graph.is_output(x):
            return False
        for node in x.users:
            if _hides(node, x, axis, count, at):
                continue
            rule = node.axes
            for i, u in enumerate(node.inputs):
                if u is not x:
                    continue
                factors = rule.operands[i][axis]
                ends = [axes.index(factors) for axes in rule.results if factors in axes]
                if len(ends) != len(node.outputs) or [f.role for f in factors] != ["free"]:
                    return False
                waiting += list(zip(node.outputs, ends))
    return True


def _hides(node: Node, x: Value, axis: int, count: int, at: Indexing) -> bool:
    """Whether ``node`` takes none of the first elements of ``x``: chosen by position, multiplied by 0, or cut."""
    cut = node.attrs
    if isinstance(cut, Slice.Attrs):
        begins = cut.starts[axis]
        return isinstance(begins, int) and begins >= count and cut.steps[axis] > 0
    if len(node.outputs) != 1 or axis + len(node.output.shape) - len(x.shape) < 0:
        return False
    if node.is_a("select") and node.inputs[0] is not x and (node.inputs[1] is x) != (node.inputs[2] is x):
        other, taken = node.inputs[0], 1 if node.inputs[1] is x else 0
    elif node.is_a("mul") and node.inputs[0] is not node.inputs[1]:
        other, taken = node.inputs[1 if node.inputs[0] is x else 0], None
    else:
        return False
    own = axis + len(other.shape) - len(x.shape)
    if own < 0 or other.shape[own] == 1:
        return False
    first = Affine(tuple(-int(i == own) for i in range(len(other.shape))), count - 1)
    for p in at.pieces(other):
        if (p.number != 0 if taken is None else p.number != 1 - taken) and not empty([*p.where, first], at.shape(other)):
            return False
    return True
