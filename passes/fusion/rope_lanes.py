"""Tables of cosines and sines whose features follow positions of several kinds: time, height and width (M-RoPE), rows and
columns (2-D).

    concat(cos(t * f)[.. :2], cos(h * f)[.. 2:5], cos(w * f)[.. 5:])

There are many spellings of which angle stands at which feature (parts joined, picked, written over), and it is known by what it
comes to: between the angles and the table elements are only moved, so numbers take the place of angles and are looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from wasat.ir import Builder, DimLike, DType, Graph, Node, Value, WasatError, evaluate, evaluate_dim
from wasat.ir.dims import symbols_of
from wasat.ir.graph import copy_node
from wasat.ir.ops.shape import Slice, Transpose

from ..pattern import Mismatch, number_of

_MOVES = ("slice", "gather", "take_along", "concat", "reshape", "transpose", "broadcast_to", "scatter", "scatter_along")
_MOST_NODES = 400


@dataclass(frozen=True)
class Along:
    """Runs along an axis of the table, counted from its end."""

    axis: int


@dataclass(frozen=True)
class Angles:
    """Integer positions. ``at``: of each axis, what is read of it: one index, or what runs along the table."""

    positions: Value
    at: tuple[int | Along, ...]

    def emit(self, b: Builder, axis: int, rows: DimLike, count: DimLike) -> Value:
        """The positions [count] or [rows, count] along ``axis``, rows on the fourth axis from the end; raises Mismatch."""
        along = [a.axis for a in self.at if isinstance(a, Along)]
        if along not in ([axis], [-4, axis]):
            raise Mismatch(f"%{self.positions.name} does not run along rows and positions")
        x = self.positions
        starts = tuple(a if isinstance(a, int) else 0 for a in self.at)
        stops = tuple(a + 1 if isinstance(a, int) else d for a, d in zip(self.at, x.shape))
        x = b.slice(x, starts=starts, stops=stops) if any(starts) or stops != x.shape else x
        shape = (count,) if len(along) == 1 else (rows, count)
        return x if x.shape == shape else b.reshape(x, shape=shape)


@dataclass(frozen=True)
class Lanes:
    """A table ``fn(positions * frequency) * factor``. Of each feature: whose positions it follows, and how fast."""

    fn: str
    factor: float
    shape: tuple[DimLike, ...]
    features: tuple[tuple[Angles, Value, int], ...]
    """Positions, frequencies (a constant or a parameter), and which of these."""


@cache
def lanes(table: Value) -> Lanes:
    """Reads what stands at each feature of ``table`` [.., width]; raises Mismatch where that is no angle of positions.

    Layers share their tables, so each is read once: the pass clears what is remembered of a graph when it leaves it.
    """
    roots, order = _cone(table)
    fn, factor = _said(table, roots, order)
    features: list[tuple[Angles, Value, int]] | None = None
    for least in (2, 3):
        symbols = dict.fromkeys(s for v in (table, *roots) for s in symbols_of(v.shape))
        symbols |= dict.fromkeys(s for node in order for s in node.attrs.symbols)
        sizes = {s: least + 2 * i for i, s in enumerate(symbols)}  # no two alike
        try:
            found = _looked_for(table, roots, order, sizes)
        except WasatError as e:
            raise Mismatch(f"%{table.name} cannot be computed at {sizes}: {e}") from None
        if features is not None and found != features:
            raise Mismatch(f"what stands in %{table.name} depends on sizes")
        features = found
    assert features is not None
    return Lanes(fn, factor, table.shape, tuple(features))


def _cone(table: Value) -> tuple[dict[Value, tuple[Value, Value]], list[Node]]:
    """The angles of which ``table`` is made, as positions and frequencies, and the nodes between, in order."""
    roots: dict[Value, tuple[Value, Value]] = {}
    order: list[Node] = []
    seen: set[Value] = set()
    waiting = [(table, False)]
    while waiting:
        v, ready = waiting.pop()
        if ready:
            assert v.node is not None
            order.append(v.node)
        elif v not in seen:
            if (product := _product(v)) is not None:
                roots[v] = product
                seen.add(v)
                continue
            if v.node is None or v.node.op.kind == "random" or len(order) > _MOST_NODES:
                raise Mismatch(f"%{v.name} is no product of integer positions [.., 1] and constant frequencies")
            seen.update(v.node.outputs)
            waiting += [(v, True), *((u, False) for u in v.node.inputs)]
    if not roots:
        raise Mismatch(f"%{table.name} is made of no positions")
    return roots, order


def _product(v: Value) -> tuple[Value, Value] | None:
    """Integer positions [.., 1] and frequencies [n], of which ``v`` is the product."""
    angles = v.made_by("mul")
    if angles is None or v.tensor.dtype.bits < 32 or not v.tensor.dtype.is_float:
        return None
    for position, frequency in (angles.inputs, angles.inputs[::-1]):
        source = _past_units(frequency)
        size = source.tensor.size
        whole = isinstance(size, int) and frequency.shape[-1:] == (size,) == v.shape[-1:]
        if (source.const is None and source.param is None) or not whole or position.shape[-1:] != (1,):
            continue
        cast = _past_units(position).made_by("cast")
        if cast is not None and cast.inputs[0].tensor.dtype.is_int and len(position.shape) == len(v.shape):
            return position, frequency
    return None


def _past_units(v: Value) -> Value:
    while (shaped := v.made_by("reshape")) is not None and _sizes(v) == _sizes(shaped.inputs[0]):
        v = shaped.inputs[0]
    return v


def _sizes(v: Value) -> list[DimLike]:
    return [d for d in v.shape if d != 1]


def _said(table: Value, roots: Mapping[Value, object], order: list[Node]) -> tuple[str, float]:
    """The function of angles, and what it is multiplied by: the same on all ways to the table."""
    known: dict[Value, tuple[str, float]] = {v: ("", 1.0) for v in roots}
    for node in order:
        given = [i for i, v in enumerate(node.inputs) if v in known]
        if not given:
            continue
        y, said = node.outputs[0], {known[node.inputs[i]] for i in given}
        if len(said) > 1:
            raise Mismatch(f"%{y.name} joins tables of other functions")
        fn, factor = said.pop()
        if node.is_a("cos", "sin") and not fn:
            fn = "cos" if node.is_a("cos") else "sin"
        elif node.is_a("mul") and (number := number_of(node.inputs[1 - given[0]])) is not None and fn:
            factor *= number
        elif not (node.is_a("cast") and y.tensor.dtype.is_float) and not (
            node.is_a(*_MOVES) and all(v in known for v in _moved(node)) and len(given) == len(_moved(node))
            and getattr(node.attrs, "reduce", "none") == "none"
        ):  # fmt: skip
            raise Mismatch(f"%{y.name} is {node.op.name} of something, no table of cosines or sines")
        known[y] = fn, factor
    if not known[table][0]:
        raise Mismatch(f"%{table.name} is no table of cosines or sines of positions")
    return known[table]


def _moved(node: Node) -> list[Value]:
    """The operands whose elements a node moves."""
    if node.is_a("concat"):
        return list(node.inputs)
    return [v for i, v in enumerate(node.inputs) if i == 0 or (i == 2 and node.is_a("scatter", "scatter_along"))]


def _looked_for(
    table: Value, roots: Mapping[Value, tuple[Value, Value]], order: list[Node], sizes: Mapping[str, int]
) -> list[tuple[Angles, Value, int]]:  # fmt: skip
    """Of each feature, which angle stands there, at these sizes."""
    g, env, feeds = Graph("lanes"), dict[Value, Value](), {}
    first, ends, count = [0], [], 0
    for i, v in enumerate(roots):
        env[v] = g.add_input(f"x{i}", v.tensor.with_dtype(DType.F64))
        shape = tuple(evaluate_dim(d, sizes) for d in v.shape)
        feeds[f"x{i}"] = np.arange(count, count + int(np.prod(shape)), dtype=np.float64).reshape(shape)
        count += int(np.prod(shape))
        first.append(count)
        ends.append(shape)
    data = set(roots)
    for node in order:
        given = [v for v in node.inputs if v in data]
        data.update(node.outputs if given else ())
        if given and node.is_a("cos", "sin", "cast", "mul"):
            env[node.outputs[0]] = env[given[0]]
        else:
            copy_node(g, node, env)
    g.set_outputs([env[table]])
    found = np.asarray(evaluate(g, feeds, symbols=dict(sizes))[0])
    places, features = np.indices(found.shape[:-1]), []
    own = list(roots)
    for f in range(found.shape[-1]):
        numbers = found[..., f].astype(np.int64)
        i = int(np.searchsorted(first, numbers.flat[0], side="right")) - 1
        if numbers.min() < first[i] or numbers.max() >= first[i + 1]:
            raise Mismatch(f"feature {f} of %{table.name} follows several positions")
        *index, last = np.unravel_index(numbers - first[i], ends[i])
        if (last != last.flat[0]).any():
            raise Mismatch(f"feature {f} of %{table.name} turns by several frequencies")
        positions, frequency = roots[own[i]]
        at = tuple(_place(x, places, positions, table) for x in index)
        cast = _past_units(positions).made_by("cast")
        assert cast is not None
        angles = of_repeated(cast.inputs[0], positions.shape, (*at, 0))
        features.append((angles, _past_units(frequency), int(last.flat[0])))
    return features


def _place(x: np.ndarray, places: np.ndarray, positions: Value, table: Value) -> int | Along:
    if (x == x.flat[0]).all():
        return int(x.flat[0])
    for axis, place in enumerate(places):
        if (x == place).all():
            return Along(axis - len(table.shape))
    raise Mismatch(f"%{table.name} reads %{positions.name} in another order")


def of_repeated(x: Value, shape: tuple[DimLike, ...], at: tuple[int | Along, ...]) -> Angles:
    """Of positions ``x``, seen with ``shape``, that are repeated, picked from more or given axes of size 1, those that are."""
    while True:
        if x.shape != shape:
            long = iter([a for a, d in zip(at, shape) if d != 1])
            at, shape = tuple(0 if d == 1 else next(long) for d in x.shape), x.shape
        node = x.node
        if node is not None and node.is_a("broadcast_to") and not node.checks:
            x = node.inputs[0]
            at = tuple(0 if d == 1 else a for d, a in zip(x.shape, at[len(at) - len(x.shape) :]))
            shape = x.shape
        elif node is not None and isinstance(node.attrs, Slice.Attrs) and (inner := _picked(node, node.attrs, at)) is not None:
            x, at = node.inputs[0], inner
            shape = x.shape
        elif _past_units(x) is not x:
            x = _past_units(x)
        else:
            return Angles(x, at)


def _picked(node: Node, cut: Slice.Attrs, at: tuple[int | Along, ...]) -> tuple[int | Along, ...] | None:
    """What is read of the operand of a slice that cuts only axes of which one index is read."""
    found: list[int | Along] = []
    for a, lo, step, old, new in zip(at, cut.starts, cut.steps, node.inputs[0].shape, node.output.shape):
        if isinstance(a, Along):
            if (lo, step) != (0, 1) or old != new:
                return None
            found.append(a)
        elif isinstance(lo, int) and isinstance(step, int):
            found.append(lo + a * step)
        else:
            return None
    return tuple(found)


def factors(v: Value) -> list[tuple[Value, Value, int]]:
    """Positions and frequencies that ``v`` may be a product of, and the axis along which frequencies run: multiplied, or as an
    outer product by matmul, turned over or not."""
    if (product := v.made_by("mul")) is not None:
        return [(x, y, -1) for x, y in (product.inputs, product.inputs[::-1])]
    turn, rank = v.made_by("transpose"), len(v.shape)
    if turn is not None and Transpose.Attrs.of(turn).perm != (*range(rank - 2), rank - 1, rank - 2):
        return []
    outer = v.made_by("matmul") if turn is None else turn.inputs[0].made_by("matmul")
    if outer is None or outer.inputs[0].shape[-1] != 1:
        return []
    x, y = outer.inputs
    return [(x, y, -1)] if turn is None else [(y, x, -2)]
