"""Scores of queries by distances, skewed so that they stand under keys: each row padded by one, all of them read as rows one
shorter.

    y = pad(z) [s, s + 1], read as [s + 1, s] without the first row, as [s, s]
    where j <= i                              y[i, s - (i - j)]: z of the distance i - j, which stands last first in z
    elsewhere                                 of the next query: what looks back hides it

(Music Transformer, Transformer-XL, XLNet)
"""

from __future__ import annotations

from wasat.ir import Builder, DimLike, Graph, Node, Value, equal, less_equal, symbol
from wasat.ir.ops.shape import Reverse, Slice

from ..analyses.affine import Affine
from ..analyses.indexing import Indexing
from ..analyses.portion import Portions
from ..pattern import replace


def distances_instead(graph: Graph, seq: str) -> bool:
    """Changes ``graph``: what is skewed along ``seq`` is taken along the distances between positions. Only keys that are no
    later than a query are right: the analysis takes no others."""
    size, changed = symbol(seq), False
    for node in graph.nodes:
        if len(node.outputs) != 1 or (found := _skewed(node, size)) is None:
            continue
        y, axis = found
        b = Builder(graph, before=node, loc=node.loc)
        near = _LastFirst(b).of(Portions(b).of(y, axis + 1, 1, size), axis + 1)
        if near is None:
            continue
        at = b.iota(size=size)
        behind = b.maximum(b.sub(b.reshape(at, shape=(size, 1)), at), 0)
        shape = tuple(size if i in (axis, axis + 1) else 1 for i in range(len(y.shape)))
        behind = b.broadcast_to(b.reshape(behind, shape=shape), shape=near.shape)
        replace(graph, node.output, b.take_along(near, behind, axis=axis + 1))
        changed = True
    return changed


def _skewed(node: Node, size: DimLike) -> tuple[Value, int] | None:
    """(y, a) where ``node`` is y [.., s, m, ..] skewed, its queries on axis a, and cut to as many keys."""
    if _wide(node.output, size) and (found := _shifted(node, size)) is not None:
        return found
    cut = node.attrs
    if isinstance(cut, Slice.Attrs):
        last = node.inputs[0].node
        whole = [(lo, hi) == (0, d) for lo, hi, d in zip(cut.starts, cut.stops, node.inputs[0].shape)]
        if last is None or whole.count(False) != 1 or set(cut.steps) != {1}:
            return None
        axis = whole.index(False)
        if cut.starts[axis] != 0 or equal(cut.stops[axis], size) is not True:
            return None
        found = _shifted(last, size)
        return found if found is not None and found[1] + 1 == axis else None
    return None


def _wide(v: Value, size: DimLike) -> bool:
    return sum(equal(d, size) is True for d in v.shape) == 2


def _shifted(node: Node, size: DimLike) -> tuple[Value, int] | None:
    """(y, a) where ``node`` is y [.., s, m, ..] without its first s elements, as [.., s, m - 1, ..]."""
    behind = node if node.is_a("slice") else node.inputs[0].made_by("slice") if node.is_a("reshape") else None
    if behind is None:  # a reshape to [s, s] is left out where it was that before
        return None
    if (rows := behind.inputs[0].made_by("reshape")) is None:
        return None
    y, cut = rows.inputs[0], Slice.Attrs.of(behind)
    for axis in range(len(y.shape) - 1):
        s, m = y.shape[axis : axis + 2]
        if equal(s, size) is not True or less_equal(size + 1, m) is not True:
            continue
        around = y.shape[:axis], y.shape[axis + 2 :]
        first = tuple(int(i == axis) for i in range(len(y.shape)))
        if (
            _same(rows.output.shape, (*around[0], m, s, *around[1]))
            and (cut.starts, set(cut.steps)) == (first, {1})
            and _same(cut.stops, rows.output.shape)
            and _same(node.output.shape, (*around[0], s, m - 1, *around[1]))
        ):
            return y, axis
    return None


def _same(a: tuple[DimLike, ...], b: tuple[DimLike, ...]) -> bool:
    return len(a) == len(b) and all(equal(x, y) is True for x, y in zip(a, b))


class _LastFirst:
    """Values whose elements along an axis stand the other way round, made of such: of positions, and of tables' last rows."""

    def __init__(self, b: Builder) -> None:
        self.b, self.at = b, Indexing(())
        self._made: dict[tuple[Value, int], Value | None] = {}

    def of(self, v: Value, axis: int) -> Value | None:
        """``v``, last element first along ``axis``; None where that is no function of how far from the last one it stands."""
        key = (v, axis)
        if key not in self._made:
            self._made[key] = self._of(v, axis)
        return self._made[key]

    def _of(self, v: Value, axis: int) -> Value | None:
        node, place = v.node, self.at.of(v)
        if place is not None and all(t == 0 for i, t in enumerate(place.terms) if i != axis):
            return self._counted(v, axis, place)
        if node is None or len(node.outputs) != 1:
            return None
        if isinstance(turned := node.attrs, Reverse.Attrs) and axis in turned.axes:
            rest = tuple(a for a in turned.axes if a != axis)
            return self.b.reverse(node.inputs[0], axes=rest) if rest else node.inputs[0]
        cut = node.attrs
        if isinstance(cut, Slice.Attrs) and (cut.starts[axis], cut.stops[axis]) != (0, node.inputs[0].shape[axis]):
            return self._last_rows(node, cut, axis)
        return self._moved(node, axis)

    def _counted(self, v: Value, axis: int, place: Affine) -> Value | None:
        step, n = place.terms[axis], v.shape[axis]
        first = place.const + step * (n - 1)
        if not isinstance(first, int) or not isinstance(step, int):
            return None
        count = self.b.add(self.b.mul(self.b.iota(size=n), -step), first)
        own = tuple(n if i == axis else 1 for i in range(len(v.shape)))
        return self.b.broadcast_to(self.b.reshape(self.b.cast(count, dtype=v.tensor.dtype), shape=own), shape=v.shape)

    def _last_rows(self, node: Node, cut: Slice.Attrs, axis: int) -> Value | None:
        table, whole = node.inputs[0], node.inputs[0].shape
        others = [(lo, hi) == (0, d) for i, (lo, hi, d) in enumerate(zip(cut.starts, cut.stops, whole)) if i != axis]
        if set(cut.steps) != {1} or not isinstance(whole[axis], int) or cut.stops[axis] != whole[axis] or not all(others):
            return None
        return self.b.gather(self.b.reverse(table, axes=(axis,)), self.b.iota(size=node.output.shape[axis]), axis=axis)

    def _moved(self, node: Node, axis: int) -> Value | None:
        """Of what makes each element along the axis of those of its operands that stand there."""
        rule = node.axes
        factors = rule.result[axis]
        if len(factors) != 1 or factors[0].role not in ("free", "repeated"):
            return None
        if factors[0].role == "repeated":
            return node.output
        inputs: list[Value] = []
        for v, axes in zip(node.inputs, rule.operands):
            at = [i for i, own in enumerate(axes) if factors[0] in own]
            x = self.of(v, at[0]) if at and axes[at[0]] == factors else None if at else v
            if x is None:
                return None
            inputs.append(x)
        return self.b.graph.add_node(node.op, inputs, node.attrs, before=self.b.before, loc=node.loc).output
