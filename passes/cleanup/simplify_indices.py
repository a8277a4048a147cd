"""Looking up at positions that are the same for every row."""

from __future__ import annotations

from dataclasses import dataclass

from wasat.ir import Builder, DType, Graph, Node, equal
from wasat.ir.ops.index import AxisAttrs

from ..analyses.indexing import Indexing
from ..core import GraphPass, Remarks
from ..pattern import replace


@dataclass(frozen=True)
class SimplifyIndices(GraphPass):
    """``gather`` and ``embedding`` at indices that come to ``c``, or ``i + c`` along one axis -> at an iota, then repeated.

    Sums of ones, and what is picked of such or of a number -> an iota, times a number.

    ``gather`` of the last element of a symbolic axis -> slice; at flattened indices -> at the indices, then flattened.
    ``take_along`` of what is repeated, or at repeated indices -> of what is not, where the other operand has that size.
    Exporters repeat positions over the batch, wrap negative ones, look them up by other indices.
    """

    name = "simplify-indices"

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        changed = False
        for node in graph.nodes:
            if node.is_a("take_along"):
                changed |= _unrepeated(graph, node, remarks)
                continue
            axis = node.op.picks(node.attrs)
            if (node.is_a("cumsum") or axis is not None) and _counted(graph, node, remarks):
                changed = True
                continue
            if axis is not None and _unflattened(graph, node, remarks):
                changed = True
                continue
            if axis is not None and node.op.weight is None and _takes_last(node, axis):
                self._slice(graph, node, axis, remarks)
                changed = True
                continue
            if axis is None or len(node.inputs[1].shape) < 2:
                continue
            ids = node.inputs[1]
            index = Indexing(ids.shape).of(ids)
            runs = [i for i, t in enumerate(index.terms) if t != 0] if index is not None else []
            if index is None or len(runs) > 1 or any(index.terms[a] != 1 for a in runs):
                continue
            if not isinstance(index.const, int) or index.const < 0:
                continue  # an index below 0 counts from the end
            b = Builder(graph, before=node, loc=node.loc)
            row = b.iota(size=ids.shape[runs[0]] if runs else 1, dtype=ids.tensor.dtype)
            row = b.add(row, index.const) if index.const else row
            y = graph.add_node(node.op, [node.inputs[0], row], node.attrs, before=node, loc=node.loc).output
            units = [d if i in runs else 1 for i, d in enumerate(ids.shape)]
            shape = node.output.shape
            y = b.reshape(y, shape=(*shape[:axis], *units, *shape[axis + len(units) :]))
            remarks.applied(f"%{node.output.name} reads at positions that are the same along the other axes", node)
            replace(graph, node.output, b.broadcast_to(y, shape=shape))
            changed = True
        return changed

    def _slice(self, graph: Graph, node: Node, axis: int, remarks: Remarks) -> None:
        x = node.inputs[0]
        b = Builder(graph, before=node, loc=node.loc)
        y = b.slice(x, starts=tuple(d - 1 if i == axis else 0 for i, d in enumerate(x.shape)), stops=x.shape)
        remarks.applied(f"%{node.output.name} takes the last element of axis {axis}", node)
        replace(graph, node.output, b.reshape(y, shape=node.output.shape))


def _counted(graph: Graph, node: Node, remarks: Remarks) -> bool:
    """Sums of ones, and what is picked of them, are positions, or one number."""
    out = node.output
    found = Indexing(out.shape).of(out)
    runs = [i for i, t in enumerate(found.terms) if t != 0] if found is not None else []
    if found is None or len(runs) > 1 or not all(isinstance(n, int) for n in (found.const, *found.terms)):
        return False
    b = Builder(graph, before=node, loc=node.loc)
    if runs:
        y = b.add(b.mul(b.iota(size=out.shape[runs[0]]), found.terms[runs[0]]), found.const)
        y = y if out.tensor.dtype is DType.I64 else b.cast(y, dtype=out.tensor.dtype)
        y = b.reshape(y, shape=tuple(d if i in runs else 1 for i, d in enumerate(out.shape)))
    else:
        y = b.constant(found.const, out.tensor.dtype)
    remarks.applied(f"%{out.name} counts positions", node)
    replace(graph, out, b.broadcast_to(y, shape=out.shape))
    return True


def _unflattened(graph: Graph, node: Node, remarks: Remarks) -> bool:
    """Looks up at indices of several axes of sizes that are not known as they were before they were flattened."""
    (x, ids), flat = node.inputs, node.inputs[1].made_by("reshape")
    if flat is None or len(ids.shape) != 1 or sum(not isinstance(d, int) for d in flat.inputs[0].shape) < 2:
        return False
    y = graph.add_node(node.op, [x, flat.inputs[0]], node.attrs, before=node, loc=node.loc).output
    remarks.applied(f"%{node.output.name} reads at indices that are flattened only afterwards", node)
    replace(graph, node.output, Builder(graph, before=node, loc=node.loc).reshape(y, shape=node.output.shape))
    return True


def _unrepeated(graph: Graph, node: Node, remarks: Remarks) -> bool:
    """Takes along an axis from what is not repeated along others, and at such indices."""
    axis, b, given = AxisAttrs.of(node).axis, Builder(graph, before=node, loc=node.loc), list(node.inputs)
    for i in (0, 1):
        if (spread := given[i].made_by("broadcast_to")) is None:
            continue
        own = (*[1] * (len(node.output.shape) - len(spread.inputs[0].shape)), *spread.inputs[0].shape)
        wide, other = given[i].shape, given[1 - i].shape
        shape = tuple(d if a != axis and equal(f, e) is True else e for a, (d, e, f) in enumerate(zip(own, wide, other)))
        if shape != wide:
            x = b.reshape(spread.inputs[0], shape=own)
            given[i] = x if shape == own else b.broadcast_to(x, shape=shape)
    if given == list(node.inputs):
        return False
    y = b.take_along(*given, axis=axis)
    remarks.applied(f"%{node.output.name} takes from, or at, what is not repeated", node)
    replace(graph, node.output, y)
    return True


def _takes_last(node: Node, axis: int) -> bool:
    """Whether the one element that is picked is the last, on an axis whose size is not known."""
    x, ids = node.inputs
    size = x.shape[axis]
    if isinstance(size, int) or any(d != 1 for d in ids.shape):
        return False
    index = Indexing(()).of(ids)
    return index is not None and any(index.number is not None and equal(index.number, n) is True for n in (-1, size - 1))
