"""Parameters that are tables of positions: triangles and bands are computed instead of stored, first rows are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from wasat.ir import Array, Builder, DimLike, Graph, Node, Program, QArray, TensorType, Value
from wasat.ir.op import concrete
from wasat.ir.ops.shape import Slice

from ..analyses.affine import Affine, Piece, of_array
from ..core import Pass, Remarks
from ..pattern import erase_dead, replace

_LARGEST = 2**26
"""Elements of a table that is looked at."""


@dataclass(frozen=True)
class ReadTables(Pass):
    """A parameter [.., n, m] of few values, each on one region (a triangle, a band) -> comparisons of positions.
    The first s rows of a parameter (or constant), and columns -> a lookup at the positions 0 .. s-1; rows from k on, at k ..

    Modules keep masks as buffers and slice them. Positions say what they mean; the values themselves say it to nobody.
    For programs that are not trained: parameters count as constants.
    """

    name = "read-tables"

    def run(self, program: Program, remarks: Remarks) -> bool:
        changed = False
        for graph in program.graphs.values():
            for name, v in list(graph.params.items()):
                if _is_square(v) and _masks(v):
                    changed |= self._compute(graph, v, program.params[name].load(), remarks)
            for node in graph.nodes:
                changed |= node.is_a("slice") and self._look_up(graph, node, remarks)
        read = {name for graph in program.graphs.values() for name in graph.params}
        gone = {name for graph in program.graphs.values() for name in graph.prune_params()} if changed else set()
        for name in gone & read - {name for graph in program.graphs.values() for name in graph.params}:
            del program.params[name]
        return changed

    def _compute(self, graph: Graph, v: Value, table: Array | QArray, remarks: Remarks) -> bool:
        pieces = of_array(table) if not isinstance(table, QArray) else None
        if pieces is None or not v.uses:
            return False
        first = next(node for node in graph.nodes if v in node.inputs)
        b = Builder(graph, before=first, loc=first.loc)
        remarks.applied(f"parameter {v.param} is computed: {len(pieces)} regions of positions", first)
        graph.replace_uses(v, _emit(b, pieces, v.tensor))
        return True

    def _look_up(self, graph: Graph, node: Node, remarks: Remarks) -> bool:
        table, attrs = node.inputs[0], Slice.Attrs.of(node)
        cut = [a for a, (lo, hi, n) in enumerate(zip(attrs.starts, attrs.stops, table.shape)) if (lo, hi) != (0, n)]
        given = table.const is not None or (table.param is not None and table.tensor.dtype.is_float)
        if not given or not cut or set(attrs.steps) != {1}:
            return False
        sizes = {node.output.shape[a] for a in cut}
        first = {attrs.starts[a] for a in cut}
        if len(first) != 1 or not isinstance(lo := first.pop(), int) or len(sizes) != 1 or isinstance(size := sizes.pop(), int):
            return False
        whole = size if graph.is_output(node.output) else _asked_for(node.output, size)
        b = Builder(graph, before=node, loc=node.loc)
        lead = table.shape[: cut[0]]

        def places() -> Value:
            return b.add(b.iota(size=whole), lo) if lo else b.iota(size=whole)

        if len(cut) == 1 and all(d == 1 for d in lead):
            rows = b.gather(b.reshape(table, shape=table.shape[cut[0] :]), places(), axis=0)
            rows = b.reshape(rows, shape=(*lead, whole, *node.output.shape[cut[0] + 1 :]))
        else:
            rows = table
            for axis in cut:
                rows = b.gather(rows, places(), axis=axis)
        name = table.param or f"%{table.name}"
        which = f"{whole} rows of {name} behind row {lo}" if lo else f"the first {whole} rows of {name}"
        remarks.applied(f"{which} are looked up by position", node)
        if whole == size:
            replace(graph, node.output, rows)
            erase_dead(graph, node)
            return True
        for user in node.output.users:  # its check that all rows are there is the lookup's now
            operands = [rows if v is node.output else v for v in user.inputs]
            graph.replace(user, graph.add_node(user.op, operands, user.attrs, before=user, loc=user.loc).outputs)
        graph.erase(node)
        return True


def _asked_for(rows: Value, size: DimLike) -> DimLike:
    """s, where all that read ``min(n, s)`` rows of a table check that these are s; else ``size``."""
    checks = [[c for c in user.checks if size in c] for user in rows.users]
    asked = {d for found in checks for c in found for d in c if d != size}
    results = [v.type for user in rows.users for v in user.outputs]
    sure = len(asked) == 1 and all(checks) and not any(size in t.shape for t in results)
    return asked.pop() if sure else size


def _is_square(v: Value) -> bool:
    """Whether it could be a table of queries and keys."""
    shape = v.type.shape
    if not isinstance(v.type, TensorType) or len(shape) < 2 or not all(isinstance(d, int) for d in shape):
        return False
    return shape[-1] != 1 and shape[-2] != 1 and all(d == 1 for d in shape[:-2]) and prod(map(concrete, shape)) <= _LARGEST


def _masks(v: Value) -> bool:
    """Whether it goes into elementwise operations with other values alone: no weight of a product does, scaled or not."""
    return bool(v.users) and all(
        _masks(n.output) if n.op.carries or (n.op.elementwise and all(map(_fixed, n.inputs))) else n.op.elementwise
        for n in v.users
    )


def _fixed(v: Value) -> bool:
    """Whether it is made of parameters and constants."""
    node = v.node
    made = node is not None and node.op.elementwise and all(map(_fixed, node.inputs))
    return v.param is not None or v.const is not None or made


def _emit(b: Builder, pieces: Sequence[Piece], type: TensorType) -> Value:
    """The table, computed from the positions along its axes."""

    def position(axis: int) -> Value:
        at = b.iota(size=type.shape[axis])
        return b.reshape(at, shape=tuple(d if i == axis else 1 for i, d in enumerate(type.shape)))

    def function(x: Affine) -> Value:
        y: Value | None = None
        for axis, t in enumerate(x.terms):
            if t != 0:
                term = b.mul(position(axis), t)
                y = term if y is None else b.add(y, term)
        return b.add(y, x.const) if y is not None else b.constant(x.const, "i64")

    def value(p: Piece) -> Value:
        if isinstance(p.value, Affine) and p.value.number is None:
            return b.cast(function(p.value), dtype=type.dtype)
        return b.constant(p.number, type.dtype)

    *others, last = pieces
    result = value(last)
    for p in others:
        inside: Value | None = None
        for c in p.where:
            holds = b.greater_equal(function(c), 0)
            inside = holds if inside is None else b.logical_and(inside, holds)
        result = b.select(inside, value(p), result) if inside is not None else value(p)
    unit: tuple[DimLike, ...] = (1,) * (len(type.shape) - len(result.shape))
    return b.broadcast_to(b.reshape(result, shape=(*unit, *result.shape)), shape=type.shape)
