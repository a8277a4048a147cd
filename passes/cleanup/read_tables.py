"""Parameters that are tables of positions: triangles and bands are computed instead of stored, first rows are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from wasat.ir import Array, Builder, DimLike, DType, Graph, Node, Program, QArray, TensorType, Value, is_table
from wasat.ir.op import concrete
from wasat.ir.ops.shape import Slice

from ..analyses.affine import Affine, Piece, of_array
from ..core import Pass, Remarks
from ..pattern import erase_dead, replace
from .slopes import even, only_weighed
from .waves import sines, waves

_LARGEST = 2**26
"""Elements of a table that is looked at."""


@dataclass(frozen=True)
class ReadTables(Pass):
    """A parameter [.., n, .., m] of few values, each on one region (a triangle, a band) -> comparisons of positions.
    A parameter (or constant) of which rows are looked up, and multiplied, and whose columns are cosines and sines of the row's
    number times a frequency -> these, of the positions that were looked up: tables of rotary positions.
    The last s columns of one that grows evenly along them, added to scores under a softmax -> the first (ALiBi).
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
                elif _are_square(v) and _masks(v):
                    changed |= self._halve(graph, v, program.params[name].load(), remarks)
            for v in [n.output for n in graph.nodes if n.is_a("constant")]:
                if v.const is not None and (_is_square(v) or _are_square(v)) and _masks(v) and of_array(v.const) is None:
                    changed |= self._halve(graph, v, v.const, remarks)
            for node in graph.nodes:
                changed |= node.is_a("slice") and self._look_up(program, graph, node, remarks)
        changed |= self._wave(program, remarks)
        read = {name for graph in program.graphs.values() for name in graph.params}
        gone = {name for graph in program.graphs.values() for name in graph.prune_params()} if changed else set()
        for name in gone & read - {name for graph in program.graphs.values() for name in graph.params}:
            del program.params[name]
        return changed

    def _compute(self, graph: Graph, v: Value, table: Array | QArray, remarks: Remarks) -> bool:
        pieces = of_array(table) if not isinstance(table, QArray) else None
        if pieces is None:
            return self._halve(graph, v, table, remarks)
        if not v.uses:
            return False
        first = next(node for node in graph.nodes if v in node.inputs)
        b = Builder(graph, before=first, loc=first.loc)
        remarks.applied(f"parameter {v.param} is computed: {len(pieces)} regions of positions", first)
        graph.replace_uses(v, _emit(b, pieces, v.tensor))
        return True

    def _halve(self, graph: Graph, v: Value, table: Array | QArray, remarks: Remarks) -> bool:
        """Says by positions that one number stands on one side of the diagonal; what else the table has is looked up."""
        axes = [i for i, d in enumerate(v.shape) if d != 1][-2:]
        if isinstance(table, QArray) or len({v.shape[a] for a in axes}) != 1 or not v.uses:
            return False
        if all(n.is_a("select") and n.inputs[0] is not v for n in v.users):  # it was said before
            return False
        index: Sequence[np.ndarray] = np.indices(table.shape, sparse=True)
        i, j = index[axes[0]], index[axes[1]]
        for side, where in (("above", j > i), ("below", j < i)):
            numbers = table[np.broadcast_to(where, table.shape)]
            if numbers.size == 0 or not (numbers == numbers[0]).all():
                continue
            first, *others = [node for node in graph.nodes if v in node.inputs]
            b = Builder(graph, before=first, loc=first.loc)
            query, key = (_position(b, v.tensor, a) for a in axes)
            inside = b.greater_equal(query, key) if side == "above" else b.greater_equal(key, query)
            inside = b.broadcast_to(inside, shape=v.shape)
            own, known = table[np.broadcast_to(i == j, table.shape)], v
            if (own == own[0]).all():  # what a token sees of itself shows that it sees something
                here = b.broadcast_to(b.equal(query, key), shape=v.shape)
                known = b.select(here, b.constant(own[0].item(), v.tensor.dtype), v)
            whole = b.select(inside, known, b.constant(numbers[0].item(), v.tensor.dtype))
            name = f"parameter {v.param}" if v.param is not None else f"%{v.name}"
            remarks.applied(f"{name} is {numbers[0]} {side} its diagonal", first)
            for node in (first, *others):
                operands = [whole if u is v else u for u in node.inputs]
                graph.replace(node, graph.add_node(node.op, operands, node.attrs, before=node, loc=node.loc).outputs)
            return True
        return False

    def _wave(self, program: Program, remarks: Remarks) -> bool:
        found = []
        for graph in program.graphs.values():
            for node in graph.nodes:
                at = _lookup(node)
                if at is None or not _multiplied(graph, node.output):
                    continue
                numbers = at.table.const if at.table.const is not None else program.params[at.table.param or ""].load()
                if not isinstance(numbers, QArray):
                    found.append((graph, at, numbers.reshape(numbers.shape[-at.behind - 1], -1)))
        known = [f for _, _, numbers in found for f in sines(numbers).values()]
        changed, wrapped = False, dict[tuple[Value, int], Value]()
        for graph, at, numbers in found:
            columns = waves(numbers, known)
            if columns is None:
                continue
            b = Builder(graph, before=at.node, loc=at.node.loc)
            name = at.table.param or f"%{at.table.name}"
            remarks.applied(f"{name} is computed: cosines and sines of {len(numbers)} positions", at.node)
            replace(graph, at.node.output, _emit_waves(b, at, len(numbers), columns, wrapped))
            changed = True
        return changed

    def _is_even(self, program: Program, graph: Graph, node: Node) -> bool:
        """Whether it makes no difference from where on columns are taken: others differ by one number in each row."""
        table = node.inputs[0]
        if not isinstance(table.type, TensorType) or not table.type.dtype.is_float or not only_weighed(graph, node.output):
            return False
        if table.const is None and table.param is None:
            return False
        numbers = table.const if table.const is not None else program.params[table.param or ""].load()
        return not isinstance(numbers, QArray) and even(numbers)

    def _look_up(self, program: Program, graph: Graph, node: Node, remarks: Remarks) -> bool:
        table, attrs = node.inputs[0], Slice.Attrs.of(node)
        cut = [a for a, (lo, hi, n) in enumerate(zip(attrs.starts, attrs.stops, table.shape)) if (lo, hi) != (0, n)]
        if not cut or set(attrs.steps) != {1} or not is_table(table):
            return False
        sizes = {node.output.shape[a] for a in cut}
        first = {attrs.starts[a] for a in cut}
        if cut == [len(table.shape) - 1] and not isinstance(attrs.starts[-1], int) and self._is_even(program, graph, node):
            first = {0}
        if len(first) != 1 or not isinstance(lo := first.pop(), int) or len(sizes) != 1 or isinstance(size := sizes.pop(), int):
            return False
        whole = size if graph.is_output(node.output) else _asked_for(node.output, size)
        b = Builder(graph, before=node, loc=node.loc)
        lead = table.shape[: cut[0]]

        def places() -> Value:
            return b.add(b.iota(size=whole), lo) if lo else b.iota(size=whole)

        if len(cut) == 1 and all(d == 1 for d in lead):
            rows = b.gather(b.reshape(table, shape=table.shape[cut[0] :]) if lead else table, places(), axis=0)
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


@dataclass(frozen=True)
class _Lookup:
    """Of a table [.., rows, columns ..] whole rows, at an index [.., 1 ..]."""

    node: Node
    table: Value
    index: Value
    behind: int
    """How many axes the columns have."""


def _lookup(node: Node) -> _Lookup | None:
    if not node.is_a("embedding", "gather", "take_along"):
        return None
    axis = 0 if node.is_a("embedding") else node.attrs.axis  # type: ignore[attr-defined]
    rows, index = _once(node.inputs[0], axis), node.inputs[1]
    behind = len(rows.shape) - axis - 1
    if node.is_a("take_along"):
        index = _once(index, axis + 1) if len(index.shape) == len(rows.shape) else index
        wide = index if all(d == 1 for d in index.shape[axis + 1 :]) else index.made_by("broadcast_to")
        index = wide.inputs[0] if isinstance(wide, Node) else index
        if any(d != 1 for d in index.shape[len(index.shape) - behind :]):
            return None
    table = _whole(rows)
    given = table.const is not None or table.param is not None
    if not given or table.type != TensorType(DType.F32, table.shape) or not all(isinstance(d, int) for d in table.shape):
        return None
    return _Lookup(node, table, index, behind) if behind and all(d == 1 for d in rows.shape[:axis]) else None


def _once(v: Value, axis: int) -> Value:
    """What ``v`` repeats along axes before ``axis``, if it is repeated there alone."""
    spread = v.made_by("broadcast_to")
    one = spread.inputs[0] if spread is not None else v
    return one if len(one.shape) == len(v.shape) and one.shape[axis:] == v.shape[axis:] else v


def _whole(v: Value) -> Value:
    """The parameter or constant that ``v`` is, seen without axes of size 1 in front."""
    node = v.made_by("reshape")
    table = node.inputs[0] if node is not None else v
    lead = len(table.shape) - len(v.shape)
    return table if lead >= 0 and table.shape == (*(1,) * lead, *v.shape) else v


def _multiplied(graph: Graph, v: Value) -> bool:
    """Whether it is moved and multiplied with values that are neither numbers nor parameters, and nothing else."""

    def read(node: Node) -> bool:
        numbers = all(u is v or (u.const is not None and (node.is_a("gather") or u.const.size == 1)) for u in node.inputs)
        if node.op.carries or node.is_a("cast", "neg") or (node.is_a("gather", "mul") and numbers):
            return _multiplied(graph, node.output)
        return node.is_a("mul") and not any(_fixed(u) for u in node.inputs)

    return bool(v.users) and not graph.is_output(v) and all(read(node) for node in v.users)


def _counted(v: Value) -> bool:
    """Whether it is positions from 0 on, moved."""
    while v.node is not None and (v.node.op.carries or v.node.is_a("cast")) and len(v.node.inputs) == 1:
        v = v.node.inputs[0]
    return v.made_by("iota") is not None


def _emit_waves(
    b: Builder, found: _Lookup, rows: int, columns: Sequence[tuple[str, np.float32]], wrapped: dict[tuple[Value, int], Value]
) -> Value:  # fmt: skip
    """What is looked up, computed: positions times frequencies, their cosines and sines, in the order of the columns.

    ``wrapped``: of positions that may be counted from the end, for so many rows, those from the beginning.
    """
    shape, index = found.node.output.shape, found.index
    lead = index.shape[: len(index.shape) - found.behind] if found.node.is_a("take_along") else index.shape
    if not _counted(index):  # rows are counted from the end, too
        key = index, rows
        if key not in wrapped:
            wrapped[key] = b.select(b.less(index, 0), b.add(index, rows), index)
        index = wrapped[key]
    at = b.cast(b.reshape(index, shape=(*lead, 1)), dtype=DType.F32)
    order, parts = list[int](), list[Value]()
    for fn in dict.fromkeys(fn for fn, _ in columns):
        mine = [c for c, (f, _) in enumerate(columns) if f == fn]
        angles = b.mul(at, b.constant(np.array([columns[c][1] for c in mine]), DType.F32))
        parts.append(b.cos(angles) if fn == "cos" else b.sin(angles))
        order += mine
    y = parts[0] if len(parts) == 1 else b.concat(*parts, axis=len(lead))
    if order != list(range(len(columns))):
        y = b.gather(y, b.constant(np.argsort(order)), axis=len(lead))
    y = b.reshape(y, shape=(*lead, *shape[len(shape) - found.behind :]))
    y = b.reshape(y, shape=(*(1,) * (len(shape) - len(y.shape)), *y.shape))
    return b.broadcast_to(y, shape=shape)


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
    if not isinstance(v.type, TensorType) or not all(isinstance(d, int) for d in shape):
        return False
    return sum(d != 1 for d in shape) == 2 and prod(map(concrete, shape)) <= _LARGEST


def _masks(v: Value) -> bool:
    """Whether it, or what is picked of it, goes into elementwise operations with other values alone: no weight of a product
    does, scaled or not. Rows of a table that is not as high as wide are those of words."""
    sizes = [d for d in v.shape if d != 1]

    def moves(n: Node) -> bool:
        picks = n.op.picks(n.attrs) is not None and n.inputs[0] is v and n.inputs[1] is not v and len(set(sizes)) == 1
        return n.op.carries or picks or (n.op.elementwise and all(map(_fixed, n.inputs)))

    return bool(v.users) and all(_masks(n.output) if moves(n) else n.op.elementwise for n in v.users)


def _fixed(v: Value) -> bool:
    """Whether it is made of parameters and constants."""
    node = v.node
    made = node is not None and node.op.elementwise and all(map(_fixed, node.inputs))
    return v.param is not None or v.const is not None or made


def _are_square(v: Value) -> bool:
    """Whether it could be tables of queries and keys: in front stand heads."""
    shape = v.type.shape
    if not isinstance(v.type, TensorType) or not all(isinstance(d, int) for d in shape):
        return False
    sizes = [d for d in shape if d != 1]
    return len(sizes) > 2 and sizes[-1] == sizes[-2] and prod(map(concrete, shape)) <= _LARGEST


def _position(b: Builder, type: TensorType, axis: int) -> Value:
    at = b.iota(size=type.shape[axis])
    return b.reshape(at, shape=tuple(d if i == axis else 1 for i, d in enumerate(type.shape)))


def _emit(b: Builder, pieces: Sequence[Piece], type: TensorType) -> Value:
    """The table, computed from the positions along its axes."""

    def function(x: Affine) -> Value:
        y: Value | None = None
        for axis, t in enumerate(x.terms):
            if t != 0:
                term = b.mul(_position(b, type, axis), t)
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
