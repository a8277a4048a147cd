"""Values as functions of their own indices: what index arithmetic (iotas moved, compared, chosen between, gathered by each
other) comes to, piece by piece.

    iota(s) reshaped to [s, 1] minus iota(s)      element (i, j) is i - j
    gather(iota(s) of each row, flat, b * s + i)  element (b, i) is i
    a triangle of ones                            1 where i - j >= 0, 0 where j - i - 1 >= 0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from wasat.ir import DimLike, DType, Node, Value, equal, less_equal, substitute, symbol
from wasat.ir.ops.constant import DimSize
from wasat.ir.ops.reduce import CumSum
from wasat.ir.ops.shape import Concat, Pad, Reverse, Slice, Transpose

from .affine import MOST_PIECES, Affine, Piece, empty, implies, limits, negated, number, of_array, without

Pieces = tuple[Piece, ...]
UNKNOWN: Pieces = (Piece((), None),)


class Indexing:
    """The analysis, for values that only matter where a tensor of shape ``nonempty`` has elements: its sizes are at least 1."""

    def __init__(self, nonempty: Sequence[DimLike]) -> None:
        self._at_least_one = {str(d): symbol(str(d)) + 1 for d in nonempty if str(d).isidentifier()}
        self._known: dict[Value, Pieces] = {}

    def dim(self, d: DimLike) -> DimLike:
        """A size, in symbols that count from 0 what goes beyond the least possible."""
        return substitute(d, self._at_least_one)

    def shape(self, v: Value) -> tuple[DimLike, ...]:
        return tuple(self.dim(d) for d in v.shape)

    def know(self, v: Value, pieces: Pieces) -> None:
        """Takes ``v`` for what has these pieces."""
        self._known[v] = pieces

    def of(self, v: Value) -> Affine | None:
        """``v`` as one affine function of its indices, or None."""
        first, *others = self.pieces(v)
        return first.value if not others and isinstance(first.value, Affine) else None

    def pieces(self, v: Value) -> Pieces:
        """``v`` on regions that together are all of it, and do not overlap but where quotients are compared: each element is
        what one of the pieces that it lies in says."""
        waiting = [v]  # no recursion: chains are as long as exporters make them
        while waiting:
            x = waiting[-1]
            if x in self._known:
                waiting.pop()
            elif missing := [u for u in self._read(x) if u not in self._known]:
                waiting += missing
            else:
                found = self._found(x)
                self._known[x] = self._settled(x, found) if found is not None else UNKNOWN
        return self._known[v]

    def _read(self, v: Value) -> Sequence[Value]:
        """What the pieces of ``v`` follow from."""
        node = v.node
        return node.inputs if node is not None and (node.op.elementwise or _RULES.get(node.op.name)) else ()

    def _found(self, v: Value) -> Sequence[Piece] | None:
        array, node = v.const, v.node
        if array is not None:
            return of_array(array)
        if node is not None and node.op.elementwise:
            return self._elementwise(node)
        rule = _RULES.get(node.op.name) if node is not None else None
        return rule(self, node) if rule is not None and node is not None else None

    def _settled(self, v: Value, pieces: Sequence[Piece]) -> Pieces:
        """Without what has no elements; one piece, where one function says all."""
        shape = self.shape(v)

        def flat(x: Affine) -> Affine:  # one term per axis; an axis of size 1 has no slope, and repeats where it is broadcast
            return Affine(tuple(0 if d == 1 else t for d, t in zip(shape, x.of_rank(len(shape)).terms)), x.const)

        kept = []
        for p in pieces:
            where = tuple(dict.fromkeys(c for c in map(flat, p.where) if not implies((), c, shape)))
            if where and empty(where, shape):
                continue
            value = flat(p.value) if isinstance(p.value, Affine) else p.value
            kept.append(Piece(where, value if not isinstance(value, Affine) or self._holds(v, value) else None))
        if len(kept) > MOST_PIECES:
            return UNKNOWN
        for value in dict.fromkeys(p.value for p in kept):
            if all(_same(p.value, value, p.where, shape) for p in kept):
                return (Piece((), value),)
        return tuple(kept) or UNKNOWN

    def _elementwise(self, node: Node) -> list[Piece] | None:
        rank, shape = len(node.output.shape), self.shape(node.output)
        found: list[Piece] = []
        operands = [self.pieces(v) for v in node.inputs]
        if np.prod([len(p) for p in operands]) > MOST_PIECES**2:
            return None
        for chosen in product(*operands):
            where = tuple(dict.fromkeys(c.of_rank(rank) for p in chosen for c in p.where))
            if len(chosen) > 1 and where and empty(where, shape):
                continue
            values = [p.value.of_rank(rank) if isinstance(p.value, Affine) else p.value for p in chosen]
            found += [Piece((*where, *p.where), p.value) for p in _applied(node, values)]
        return self._between(node) or found if _unsaid(found) and node.is_a(*_ORDERS) else found

    def _between(self, node: Node) -> list[Piece] | None:
        """A comparison of quotients: where it may hold and where it may fail, which overlap by what was rounded off."""
        ends = [self._ends(v) for v in node.inputs]
        if ends[0] is None or ends[1] is None:
            return None
        rank = len(node.output.shape)
        by, low, high = _less(ends[0], ends[1])
        yes, no = Affine((0,) * rank, 1), Affine((0,) * rank, 0)
        below = Affine((), -by).minus(low), high  # the difference is at most -1, at least 0
        above = high.plus(Affine((), -by)), low.scaled(-1)  # at least 1, at most 0
        if node.is_a("equal", "not_equal"):
            same, other = (yes, no) if node.is_a("equal") else (no, yes)
            return [Piece((low.scaled(-1), high), same), Piece((below[0],), other), Piece((above[0],), other)]
        first, second = below if node.is_a("less", "greater_equal") else above
        holds, fails = (yes, no) if node.is_a("less", "greater") else (no, yes)
        return [Piece((first,), holds), Piece((second,), fails)]

    def _ends(self, v: Value) -> Ends | None:
        """(k, low, high), of functions between which k times an element lies: rounded down, it is not known more closely."""
        if (whole := self.of(v)) is not None:
            rank = len(v.shape)
            return 1, whole.of_rank(rank), whole.of_rank(rank)
        node = v.node
        if node is None:
            return None
        if node.op.carries and len(node.inputs) == 1:
            if (ends := self._ends(node.inputs[0])) is None:
                return None
            low, high = (self._through(v, node.inputs[0], x) for x in ends[1:])
            return (ends[0], low, high) if low is not None and high is not None else None
        if not node.is_a("floor_div", "add", "sub", "mul") or v.tensor.dtype not in (DType.I32, DType.I64):
            return None
        given = [self._ends(u) for u in node.inputs]
        if given[0] is None or given[1] is None:
            return None
        x, y = given[0], given[1]
        if node.is_a("sub"):
            return _less(x, y)
        if node.is_a("add"):
            return _less(x, (y[0], y[2].scaled(-1), y[1].scaled(-1)))
        x, y = (y, x) if node.is_a("mul") and y[1].number is None else (x, y)
        n = y[1].number
        if y[0] != 1 or y[1] != y[2] or not isinstance(n, int) or n <= 0:
            return None
        rank = len(node.output.shape)
        k, low, high = x[0], x[1].of_rank(rank), x[2].of_rank(rank)
        if node.is_a("floor_div"):
            return k * n, low.plus(Affine((), -k * (n - 1))), high
        common = math.gcd(k, n)
        return k // common, low.scaled(n // common), high.scaled(n // common)

    def _holds(self, v: Value, x: Affine) -> bool:
        """Whether the type of ``v`` holds every element of ``x``: integers wrap, floats lose digits.

        Of i32, i64, f32 and f64 it does as long as no number that is written down comes near the limit: no size does.
        """
        dtype, bounds = v.tensor.dtype, self.range(x, self.shape(v))
        low, high = limits(dtype)
        if dtype.bits >= 32 and (dtype.is_float or dtype.value.startswith("i")):
            written = [n for n in (*x.terms, x.const) if isinstance(n, int)]
            ends = [n for n in bounds or () if isinstance(n, int)]
            return all(abs(n) <= high // 2 for n in written) and all(low <= n <= high for n in ends)
        if bounds is None or less_equal(low, bounds[0]) is not True:
            return False
        return (dtype.bits >= 32 and not isinstance(bounds[1], int)) or less_equal(bounds[1], high) is True

    def _through(self, v: Value, moved: Value, x: Affine) -> Affine | None:
        """``v``, which moves the elements of ``moved``, where these are ``x``."""
        inner = Indexing(())
        inner._at_least_one = self._at_least_one
        inner.know(moved, (Piece((), x),))
        return inner.of(v)

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


Ends = tuple[int, Affine, Affine]
_ORDERS = ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")


def _unsaid(pieces: Sequence[Piece]) -> bool:
    return all(p.value is None for p in pieces)


def _less(x: Ends, y: Ends) -> Ends:
    """Of differences."""
    k = math.lcm(x[0], y[0])
    (_, low, high), (_, least, most) = x, y
    return k, low.scaled(k // x[0]).minus(most.scaled(k // y[0])), high.scaled(k // x[0]).minus(least.scaled(k // y[0]))


def _same(a: Affine | float | None, b: Affine | float | None, where: Sequence[Affine], shape: Sequence[DimLike]) -> bool:
    """Whether two functions are one on a region."""
    if a == b:
        return True
    if not (isinstance(a, Affine) and isinstance(b, Affine)):
        return False
    d = a.minus(b)
    return implies(where, d, shape) and implies(where, d.scaled(-1), shape)


# -- elementwise: what becomes of one piece of each operand -----------------------------------------------------------------
Operand = Affine | float | None


def _applied(node: Node, xs: Sequence[Operand]) -> list[Piece]:
    """``node`` of operands that are one function each, on the region where they are: perhaps several pieces of it."""
    name, rank = node.op.name, len(node.output.shape)
    numbers = [x.number if isinstance(x, Affine) else x for x in xs]
    if all(isinstance(n, (int, float)) for n in numbers):
        return [Piece((), _evaluated(node, numbers))]
    if name == "select":
        same = numbers[1] is not None and numbers[1] == numbers[2]
        return [Piece((), xs[1] if numbers[0] == 1 or same else xs[2] if numbers[0] == 0 else None)]
    decisive = node.op.absorbing if not node.output.tensor.dtype.is_float else None
    if decisive is not None and decisive in numbers:
        return [Piece((), Affine((0,) * rank, int(decisive)))]
    if not all(isinstance(x, Affine) for x in xs):
        if None in xs or name not in _BESIDE_INFINITY or not all(isinstance(x, Affine) or np.isinf(x) for x in xs):  # type: ignore[arg-type]
            return [Piece((), None)]
        return [Piece((), _evaluated(node, [0 if isinstance(x, Affine) else x for x in xs]))]  # any finite number does
    rule = _ELEMENTWISE.get(name)
    found = rule(node, *xs) if rule is not None else None
    return found if isinstance(found, list) else [Piece((), found)]


_BESIDE_INFINITY = ("add", "sub", "less", "less_equal", "greater", "greater_equal", "equal", "not_equal", "isinf", "isnan")


def _evaluated(node: Node, numbers: Sequence[Any]) -> Operand:
    """The operation itself, on scalars."""
    operands = [np.asarray(n, v.tensor.dtype.np) for n, v in zip(numbers, node.inputs)]
    with np.errstate(all="ignore"):
        y = np.asarray(node.op.reference(node.attrs, *operands))
    return number(y.item(), len(node.output.shape), node.output.tensor.dtype)


def _compare(node: Node, x: Affine, y: Affine) -> list[Piece]:
    d, rank = x.minus(y), len(node.output.shape)
    yes, no = Affine((0,) * rank, 1), Affine((0,) * rank, 0)
    name = node.op.name
    if name in ("equal", "not_equal"):
        other, same = (no, yes) if name == "equal" else (yes, no)
        return [Piece((d, d.scaled(-1)), same), Piece((d.plus(Affine((), -1)),), other), Piece((negated(d),), other)]
    holds = {"less": negated(d), "less_equal": d.scaled(-1), "greater": negated(d.scaled(-1)), "greater_equal": d}[name]
    return [Piece((holds,), yes), Piece((negated(holds),), no)]


def _cases(node: Node, x: Affine, more: int, none: int, less: int) -> list[Piece]:
    """A number for each sign of ``x``."""
    above, at, below = (Affine((0,) * len(node.output.shape), n) for n in (more, none, less))
    return [Piece((x.plus(Affine((), -1)),), above), Piece((x, x.scaled(-1)), at), Piece((negated(x),), below)]


def _extreme(node: Node, x: Affine, y: Affine) -> list[Piece]:
    d = x.minus(y)
    more, less = (x, y) if node.is_a("maximum") else (y, x)
    return [Piece((d,), more), Piece((negated(d),), less)]


def _product(node: Node, x: Affine, y: Affine) -> Affine | None:
    x, y = (y, x) if y.number is None else (x, y)
    return x.scaled(y.number) if y.number is not None else None


def _cast(node: Node, x: Affine) -> Affine | list[Piece]:
    if node.output.tensor.dtype is not DType.BOOL:
        return x
    return _cases(node, x, 1, 0, 1)


def _quotient(node: Node, x: Affine, y: Affine) -> Affine | None:
    """Of multiples, and something beside."""
    k, c = y.number, x.const
    if not isinstance(k, int) or k <= 0 or not isinstance(c, int) or any(not isinstance(t, int) or t % k for t in x.terms):
        return None
    if node.is_a("mod"):
        return Affine((0,) * len(x.terms), c % k)
    return Affine(tuple(t // k for t in x.terms if isinstance(t, int)), c // k)


_ELEMENTWISE: dict[str, Callable[..., Affine | list[Piece] | None]] = {
    "add": lambda _, x, y: x.plus(y),
    "sub": lambda _, x, y: x.minus(y),
    "neg": lambda _, x: x.scaled(-1),
    "abs": lambda _, x: [Piece((x,), x), Piece((negated(x),), x.scaled(-1))],
    "relu": lambda _, x: [Piece((x,), x), Piece((negated(x),), Affine((0,) * len(x.terms), 0))],
    "sign": lambda node, x: _cases(node, x, 1, 0, -1),
    "logical_not": lambda _, x: x.scaled(-1).plus(Affine((), 1)),
    "stop_gradient": lambda _, x: x,
    "mul": _product, "cast": _cast, "floor_div": _quotient, "mod": _quotient, "maximum": _extreme, "minimum": _extreme,
    **dict.fromkeys(("less", "less_equal", "greater", "greater_equal", "equal", "not_equal"), _compare),
}  # fmt: skip


# -- everything else ---------------------------------------------------------------------------------------------------------
Rule = Callable[[Indexing, Node], "Sequence[Piece] | None"]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, f))
        return f

    return register


def _units(rank: int) -> list[Affine]:
    """The index of each axis."""
    return [Affine(tuple(int(i == a) for i in range(rank)), 0) for a in range(rank)]


@_rule("iota")
def _iota(at: Indexing, node: Node) -> Pieces:
    return (Piece((), Affine((1,), 0)),)


@_rule("dim_size")
def _dim_size(at: Indexing, node: Node) -> Pieces:
    return (Piece((), Affine((), at.dim(DimSize.Attrs.of(node).size))),)


@_rule("transpose", "broadcast_to", "slice", "reverse")
def _moved(at: Indexing, node: Node) -> Pieces | None:
    """The operand's elements, at other places: those of ``places``, one for each of its axes."""
    old, units = node.inputs[0].shape, _units(len(node.output.shape))
    places = units
    attrs = node.attrs
    if isinstance(attrs, Transpose.Attrs):
        places = [units[attrs.perm.index(a)] for a in range(len(old))]
    elif node.is_a("broadcast_to"):
        if node.checks:  # an axis that may be 1 when it runs
            return None
        places = units[len(units) - len(old) :]
    elif isinstance(attrs, Slice.Attrs):
        places = [u.scaled(step).plus(Affine((), at.dim(lo))) for u, lo, step in zip(units, attrs.starts, attrs.steps)]
    elif isinstance(attrs, Reverse.Attrs):
        sizes = at.shape(node.output)
        places = [Affine((), sizes[a] - 1).minus(u) if a in attrs.axes else u for a, u in enumerate(units)]
    return tuple(p.at(places) for p in at.pieces(node.inputs[0]))


@_rule("reshape")
def _reshape(at: Indexing, node: Node) -> Pieces | None:
    """Axes of size 1 put in or taken out; anything, where all elements are one number."""
    pieces, old, new = at.pieces(node.inputs[0]), node.inputs[0].shape, node.output.shape
    if len(pieces) == 1 and isinstance(pieces[0].value, Affine) and pieces[0].value.number is not None:
        return (Piece((), Affine((0,) * len(new), pieces[0].value.number)),)
    long = [u for u, d in zip(_units(len(new)), new) if d != 1]
    sizes = [d for d in new if d != 1]
    places = []
    for d in old:
        if d == 1:
            places.append(Affine((0,) * len(new), 0))
        elif sizes and equal(sizes.pop(0), d) is True:
            places.append(long.pop(0))
        else:
            return None
    return tuple(p.at(places) for p in pieces) if not sizes else None


@_rule("concat")
def _concat(at: Indexing, node: Node) -> list[Piece]:
    axis, units = Concat.Attrs.of(node).axis, _units(len(node.output.shape))
    here, found = units[axis], []
    offset: DimLike = 0
    for v in node.inputs:
        size = at.shape(v)[axis]
        within = here.plus(Affine((), -1 * offset))
        places = [within if a == axis else u for a, u in enumerate(units)]
        inside = within, Affine((), size - 1).minus(within)
        found += [Piece((*inside, *p.at(places).where), p.at(places).value) for p in at.pieces(v)]
        offset = offset + size
    return found


@_rule("pad")
def _pad(at: Indexing, node: Node) -> list[Piece]:
    attrs = Pad.Attrs.of(node)
    units, sizes = _units(len(node.output.shape)), at.shape(node.inputs[0])
    places = [u.plus(Affine((), -1 * at.dim(lo))) for u, lo in zip(units, attrs.low)]
    inside = [c for p, d in zip(places, sizes) for c in (p, Affine((), d - 1).minus(p))]
    found = [Piece((*inside, *p.at(places).where), p.at(places).value) for p in at.pieces(node.inputs[0])]
    return found + [Piece(c, number(attrs.value, len(units), node.output.tensor.dtype)) for c in without(inside)]


@_rule("cumsum")
def _cumsum(at: Indexing, node: Node) -> Pieces | None:
    """Of one number, as many times as there are terms."""
    (x, *others), attrs = at.pieces(node.inputs[0]), CumSum.Attrs.of(node)
    if others or not isinstance(x.value, Affine) or x.value.number is None:
        return None
    here = _units(len(node.output.shape))[attrs.axis]
    before = Affine((), at.shape(node.output)[attrs.axis] - 1).minus(here) if attrs.reverse else here
    return (Piece((), before.plus(Affine((), 0 if attrs.exclusive else 1)).scaled(x.value.number)),)


@_rule("gather", "embedding")
def _gather(at: Indexing, node: Node) -> list[Piece] | None:
    """What is picked, at the index that picks it; of a flattened source, at the indices that the flat one stands for."""
    (source, ids), axis = node.inputs, node.op.picks(node.attrs)
    assert axis is not None
    rank, inner = len(node.output.shape), len(ids.shape)
    if (x := at.of(source)) is not None and x.number is not None:
        return [Piece((), Affine((0,) * rank, x.number))]
    units = _units(rank)
    found: list[Piece] = []
    for index in at.pieces(ids):
        if not isinstance(index.value, Affine) or not implies(index.where, index.value, at.shape(ids)):
            found.append(Piece((), None))  # an index below 0 counts from the end
            continue
        pieces = at.pieces(source)
        if pieces == UNKNOWN and axis == 0 and len(source.shape) == 1:
            pieces, places = _unflattened(at, source, index.value, at.shape(ids))
        else:
            here = units[axis : axis + inner]
            places = [*units[:axis], index.value.at(here), *units[axis + inner :]]
            index = index.at(here)
        found += [Piece((*index.where, *p.at(places).where), p.at(places).value) for p in pieces]
    return found


def _unflattened(at: Indexing, source: Value, index: Affine, shape: Sequence[DimLike]) -> tuple[Pieces, list[Affine]]:
    """The pieces of what a reshape to one axis flattened, and a row-major index into it as one index per axis."""
    flat = source.made_by("reshape")
    if flat is None:
        return UNKNOWN, [index]
    places = _places(at, index, shape, at.shape(flat.inputs[0]))
    return (at.pieces(flat.inputs[0]), places) if places is not None else (UNKNOWN, [index])


@_rule("take_along")
def _take_along(at: Indexing, node: Node) -> Pieces | None:
    """From elements that are all one number, that number."""
    x = at.of(node.inputs[0])
    return (Piece((), Affine((0,) * len(node.output.shape), x.number)),) if x is not None and x.number is not None else None


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
