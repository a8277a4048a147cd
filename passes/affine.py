"""Integers and booleans as functions of their own indices: what index arithmetic (iotas moved, added, compared, gathered by
each other) comes to, where that is affine.

    iota(s) reshaped to [s, 1] minus iota(s)      element (i, j) is i - j
    gather(iota(s) of each row, flat, b * s + i)  element (b, i) is i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from wasat.ir import Builder, DimLike, DType, Graph, Node, Value, equal, less_equal, substitute, symbol
from wasat.ir.ops.constant import DimSize
from wasat.ir.ops.index import AxisAttrs
from wasat.ir.ops.shape import Concat, Slice, Transpose

from .core import GraphPass, Remarks
from .pattern import replace


@dataclass(frozen=True)
class Affine:
    """Element (i0, i1, ..) is const + the sum of terms[a] * ia. Booleans are 0 and 1."""

    terms: tuple[DimLike, ...]
    const: DimLike

    def scaled(self, c: DimLike) -> Affine:
        return Affine(tuple(t * c for t in self.terms), self.const * c)

    def plus(self, other: Affine) -> Affine:
        """The sum, axes aligned from the right."""
        rank = max(len(self.terms), len(other.terms))
        a, b = ((0,) * (rank - len(x.terms)) + x.terms for x in (self, other))
        return Affine(tuple(s + t for s, t in zip(a, b)), self.const + other.const)

    @property
    def number(self) -> DimLike | None:
        """The one value of all elements, if they have one."""
        return self.const if all(t == 0 for t in self.terms) else None


class Indexing:
    """The analysis, for values that only matter where a tensor of shape ``nonempty`` has elements: its sizes are at least 1."""

    def __init__(self, nonempty: Sequence[DimLike]) -> None:
        self._at_least_one = {str(d): symbol(str(d)) + 1 for d in nonempty if str(d).isidentifier()}
        self._known: dict[Value, Affine | None] = {}

    def dim(self, d: DimLike) -> DimLike:
        """A size, in symbols that count from 0 what goes beyond the least possible."""
        return substitute(d, self._at_least_one)

    def shape(self, v: Value) -> tuple[DimLike, ...]:
        return tuple(self.dim(d) for d in v.shape)

    def of(self, v: Value) -> Affine | None:
        """``v`` as a function of its indices, or None."""
        if v not in self._known:
            array, node = v.const, v.node
            rule = _RULES.get(node.op.name) if node is not None else None
            found = rule(self, node) if rule is not None and node is not None else None
            found = _of_array(array) if array is not None else found
            if found is not None:  # one term per axis; an axis of size 1 has no slope, and repeats where it is broadcast
                terms = (0,) * (len(v.shape) - len(found.terms)) + found.terms
                found = Affine(tuple(0 if d == 1 else t for d, t in zip(v.shape, terms)), found.const)
            self._known[v] = found if found is not None and self._holds(v, found) else None
        return self._known[v]

    def _holds(self, v: Value, x: Affine) -> bool:
        """Whether the type of ``v`` holds every element of ``x``: integers wrap, floats lose digits.

        Of i32, i64, f32 and f64 it does as long as no number that is written down comes near the limit: no size does.
        """
        dtype, bounds = v.tensor.dtype, self.range(x, self.shape(v))
        low, high = _limits(dtype)
        if dtype.bits >= 32 and (dtype.is_float or dtype.value.startswith("i")):
            written = [n for n in (*x.terms, x.const) if isinstance(n, int)]
            ends = [n for n in bounds or () if isinstance(n, int)]
            return all(abs(n) <= high // 2 for n in written) and all(low <= n <= high for n in ends)
        if bounds is None or less_equal(low, bounds[0]) is not True:
            return False
        return (dtype.bits >= 32 and not isinstance(bounds[1], int)) or less_equal(bounds[1], high) is True

    def range(self, x: Affine, shape: Sequence[DimLike]) -> tuple[DimLike, DimLike] | None:
        """The least and the greatest element, where the signs of the terms are known."""
        low = high = x.const
        for t, d in zip(x.terms, shape):
            last = t * (d - 1)
            if less_equal(0, last) is True:
                high = high + last
            elif less_equal(last, 0) is True:
                low = low + last
            else:
                return None
        return low, high


def _limits(dtype: DType) -> tuple[int, int]:
    """The least and the greatest integer up to which a type holds all of them."""
    if dtype is DType.BOOL:
        return 0, 1
    if dtype.is_float:
        high = 2 ** {DType.BF16: 8, DType.F16: 11, DType.F32: 24}.get(dtype, 53)
        return -high, high
    info = np.iinfo(dtype.np)
    return int(info.min), int(info.max)


def _of_array(array: np.ndarray) -> Affine | None:
    """A constant: the differences along each axis must be one number."""
    if array.size == 0:
        return None
    exact = array.astype(np.float64)
    if not ((np.abs(exact) <= 2**53).all() and (exact == np.trunc(exact)).all()):  # NaN is not
        return None
    x = exact.astype(np.int64)
    terms = [int(np.diff(x, axis=a).flat[0]) if n > 1 else 0 for a, n in enumerate(x.shape)]
    first = int(x.flat[0])
    want = first + sum(t * i for t, i in zip(terms, np.indices(x.shape)))
    return Affine(tuple(terms), first) if np.array_equal(x, np.broadcast_to(want, x.shape)) else None


Rule = Callable[[Indexing, Node], "Affine | None"]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, f))
        return f

    return register


@_rule("iota")
def _iota(at: Indexing, node: Node) -> Affine:
    return Affine((1,), 0)


@_rule("dim_size")
def _dim_size(at: Indexing, node: Node) -> Affine:
    return Affine((), at.dim(DimSize.Attrs.of(node).size))


@_rule("cast")
def _cast(at: Indexing, node: Node) -> Affine | None:
    return at.of(node.inputs[0])


@_rule("neg")
def _neg(at: Indexing, node: Node) -> Affine | None:
    x = at.of(node.inputs[0])
    return x.scaled(-1) if x is not None else None


@_rule("add", "sub", "mul", "maximum", "minimum")
def _arithmetic(at: Indexing, node: Node) -> Affine | None:
    x, y = (at.of(v) for v in node.inputs)
    if x is None or y is None:
        return None
    name, rank = node.op.name, len(node.output.shape)
    aligned = x.plus(Affine((0,) * rank, 0)), y.plus(Affine((0,) * rank, 0))
    if name == "mul":
        c = y.number if y.number is not None else x.number
        return None if c is None else aligned[y.number is None].scaled(c)
    difference = aligned[0].plus(aligned[1].scaled(-1))
    if name in ("add", "sub"):
        return aligned[0].plus(aligned[1]) if name == "add" else difference
    bounds = at.range(difference, at.shape(node.output))
    if bounds is None:
        return None
    if less_equal(0, bounds[0]) is True:
        return aligned[name == "minimum"]
    return aligned[name == "maximum"] if less_equal(bounds[1], 0) is True else None


@_rule("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")
def _comparison(at: Indexing, node: Node) -> Affine | None:
    """Where it has one answer for all elements."""
    x, y = (at.of(v) for v in node.inputs)
    if x is None or y is None:
        return None
    rank = len(node.output.shape)
    bounds = at.range(x.plus(y.scaled(-1)).plus(Affine((0,) * rank, 0)), at.shape(node.output))
    if bounds is None:
        return None
    low, high = bounds
    below, above = less_equal(high, -1) is True, less_equal(1, low) is True
    at_most, at_least = less_equal(high, 0) is True, less_equal(0, low) is True
    yes, no = {
        "less": (below, at_least), "less_equal": (at_most, above), "greater": (above, at_most),
        "greater_equal": (at_least, below), "equal": (at_most and at_least, below or above),
        "not_equal": (below or above, at_most and at_least),
    }[node.op.name]  # fmt: skip
    return Affine((0,) * rank, int(yes)) if yes or no else None


@_rule("logical_not")
def _not(at: Indexing, node: Node) -> Affine | None:
    x = at.of(node.inputs[0])
    return x.scaled(-1).plus(Affine((), 1)) if x is not None else None


@_rule("logical_and", "logical_or")
def _and_or(at: Indexing, node: Node) -> Affine | None:
    known = [x.number for x in map(at.of, node.inputs) if x is not None]
    decisive = int(node.op.name == "logical_or")
    rank = len(node.output.shape)
    if decisive in known:
        return Affine((0,) * rank, decisive)
    return Affine((0,) * rank, 1 - decisive) if known == [1 - decisive] * 2 else None


@_rule("select")
def _select(at: Indexing, node: Node) -> Affine | None:
    condition = at.of(node.inputs[0])
    if condition is None or condition.number is None:
        return None
    x = at.of(node.inputs[1 if condition.number == 1 else 2])
    return x.plus(Affine((0,) * len(node.output.shape), 0)) if x is not None else None


@_rule("cumsum")
def _cumsum(at: Indexing, node: Node) -> Affine | None:
    x = at.of(node.inputs[0])
    return x if x is not None and x.number == 0 else None


@_rule("transpose")
def _transpose(at: Indexing, node: Node) -> Affine | None:
    x = at.of(node.inputs[0])
    return Affine(tuple(x.terms[p] for p in Transpose.Attrs.of(node).perm), x.const) if x is not None else None


@_rule("broadcast_to")
def _broadcast_to(at: Indexing, node: Node) -> Affine | None:
    x, old, new = at.of(node.inputs[0]), node.inputs[0].shape, node.output.shape
    if x is None or node.checks:  # an axis that may be 1 when it runs
        return None
    extra = len(new) - len(old)
    terms = [0 if i < extra or old[i - extra] == 1 else x.terms[i - extra] for i in range(len(new))]
    return Affine(tuple(terms), x.const)


@_rule("reshape")
def _reshape(at: Indexing, node: Node) -> Affine | None:
    """Axes of size 1 put in or taken out; anything, where all elements are one number."""
    x, old, new = at.of(node.inputs[0]), node.inputs[0].shape, node.output.shape
    if x is None:
        return None
    if x.number is not None:
        return Affine((0,) * len(new), x.const)
    terms: list[DimLike] = []
    rest = [(d, t) for d, t in zip(old, x.terms) if d != 1]
    for d in new:
        if d == 1:
            terms.append(0)
        elif rest and equal(rest[0][0], d) is True:
            terms.append(rest.pop(0)[1])
        else:
            return None
    return Affine(tuple(terms), x.const) if not rest else None


@_rule("slice")
def _slice(at: Indexing, node: Node) -> Affine | None:
    x, a = at.of(node.inputs[0]), Slice.Attrs.of(node)
    if x is None:
        return None
    const = x.const
    for t, start in zip(x.terms, a.starts):
        const = const + t * at.dim(start)
    return Affine(tuple(t * s for t, s in zip(x.terms, a.steps)), const)


@_rule("concat")
def _concat(at: Indexing, node: Node) -> Affine | None:
    """Parts that continue each other."""
    axis = Concat.Attrs.of(node).axis
    parts = [at.of(v) for v in node.inputs]
    if any(p is None for p in parts):
        return None
    sizes = [at.shape(v)[axis] for v in node.inputs]
    long = [p for p, n in zip(parts, sizes) if n != 1]
    # along an axis of size 1 there is no slope to disagree with
    slope = long[0].terms[axis] if long and long[0] is not None else 0
    found: Affine | None = None
    offset: DimLike = 0
    for p, n in zip(parts, sizes):
        assert p is not None
        terms = tuple(slope if i == axis and n == 1 else t for i, t in enumerate(p.terms))
        whole = Affine(terms, p.const - slope * offset)
        if found is not None and whole != found:
            return None
        found, offset = whole, offset + n
    return found


@_rule("gather")
def _gather(at: Indexing, node: Node) -> Affine | None:
    """What is picked, at the index that picks it; of a flattened source, at the indices that the flat one stands for."""
    (source, ids), axis = node.inputs, AxisAttrs.of(node).axis
    x, index = at.of(source), at.of(ids)
    if x is not None and x.number is not None:
        return Affine((0,) * len(node.output.shape), x.const)
    if index is None:
        return None
    bounds = at.range(index, at.shape(ids))
    if bounds is None or less_equal(0, bounds[0]) is not True:
        return None  # an index below 0 counts from the end
    if x is not None:
        here = index.scaled(x.terms[axis])
        return Affine((*x.terms[:axis], *here.terms, *x.terms[axis + 1 :]), x.const + here.const)
    flat = source.node
    if flat is None or flat.op.name != "reshape" or len(source.shape) != 1:
        return None
    inner = at.of(flat.inputs[0])
    places = _places(at, index, at.shape(ids), at.shape(flat.inputs[0]))
    if inner is None or places is None:
        return None
    result = Affine((0,) * len(ids.shape), inner.const)
    for term, place in zip(inner.terms, places):
        result = result.plus(place.scaled(term))
    return result


@_rule("take_along")
def _take_along(at: Indexing, node: Node) -> Affine | None:
    """From elements that are all one number, that number."""
    x = at.of(node.inputs[0])
    return Affine((0,) * len(node.output.shape), x.const) if x is not None and x.number is not None else None


def _places(at: Indexing, index: Affine, shape: Sequence[DimLike], sizes: Sequence[DimLike]) -> list[Affine] | None:
    """A row-major index into an array of these sizes, itself of ``shape``, as one index per axis."""
    places: list[Affine] = []
    for i in range(len(sizes)):
        stride: DimLike = 1
        for d in sizes[i + 1 :]:
            stride = stride * d
        terms = tuple(t // stride if t == 0 or equal(t // stride * stride, t) is True else 0 for t in index.terms)
        place = Affine(terms, index.const if i == len(sizes) - 1 else 0)
        rest = index.plus(place.scaled(-1 * stride))
        bounds = at.range(rest, shape)
        if bounds is None or less_equal(0, bounds[0]) is not True or less_equal(bounds[1], stride - 1) is not True:
            return None
        places.append(place)
        index = rest
    return places


@dataclass(frozen=True)
class SimplifyIndices(GraphPass):
    """``gather`` and ``embedding`` at indices that come to ``c``, or ``i + c`` along one axis -> at an iota, then repeated.

    Exporters repeat positions over the batch, wrap negative ones, look them up by other indices.
    """

    name = "simplify-indices"

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        changed = False
        for node in graph.nodes:
            if node.op.name not in ("gather", "embedding") or len(node.inputs[1].shape) < 2:
                continue
            ids = node.inputs[1]
            index = Indexing(ids.shape).of(ids)
            runs = [i for i, t in enumerate(index.terms) if t != 0] if index is not None else []
            if index is None or len(runs) > 1 or any(index.terms[a] != 1 for a in runs):
                continue
            if not isinstance(index.const, int) or index.const < 0:
                continue  # an index below 0 counts from the end
            axis = getattr(node.attrs, "axis", 0)
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
