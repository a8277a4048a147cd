"""Rotations by angles of positions, by what they come to: which feature of the result takes which features of x, by the cosine
or the sine of which angle, however the features are laid out between and however the tables are stretched.

    y[.., f] = x[.., f] * cos(r * p) +- x[.., g] * sin(r * p)

Between x and y elements are only moved, negated, multiplied by tables and added; so each element is followed as a sum of such
terms, at two sizes. That costs time with the number of elements, and is tried where no pattern of a known spelling matched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from math import prod

import numpy as np
from wasat.ir import Builder, DimLike, DType, Graph, Node, TensorType, Value, WasatError, evaluate_dim
from wasat.ir.dims import symbols_of

from ..pattern import Mismatch
from .rope_lanes import Along, Angles, of_repeated

_MOVES = ("slice", "gather", "take_along", "concat", "reshape", "transpose", "broadcast_to", "reverse")
_MOST_ELEMENTS = 2**21
_MOST_TERMS = 4
_COS, _SIN = 1, 2


@dataclass(frozen=True)
class Terms:
    """What each element is a sum of: ``times * fn(rate * frequency * position) * source``. Each array: [terms, *shape]."""

    times: np.ndarray
    rate: np.ndarray
    fn: np.ndarray
    """0: rate, frequency and position are factors themselves, or there are none."""
    frequency: np.ndarray
    """Which element of which parameter: counted over all; -1: none."""
    position: np.ndarray
    source: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def each(self, f: Callable[[np.ndarray], np.ndarray]) -> Terms:
        """With ``f`` applied to each term of each array."""
        return Terms(*(np.stack([f(x) for x in a]) for a in self.arrays))

    @property
    def turns(self) -> bool:
        return bool((self.fn > 0).any())

    @property
    def moved(self) -> bool:
        """Whether there are elements of x in it."""
        return bool((self.source >= 0).any())


class _Unknown(Exception):
    """What stands at a value is followed no further: its elements are ones of x."""


class _Followed:
    """Terms of the values of a graph, at one set of sizes."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.leaves: list[tuple[int, Value, tuple[int, ...]]] = []
        """Where the numbers of its elements begin, and its shape."""
        self._count = 0
        self._known: dict[Value, Terms] = {}
        self._counting: dict[DimLike, Terms] = {}
        """Positions from 0 on, which exporters make anew for each table, by how many there are."""

    def shape(self, v: Value) -> tuple[int, ...]:
        return tuple(evaluate_dim(d, self.sizes) for d in v.shape)

    def of(self, v: Value) -> Terms:
        waiting = [v]
        while waiting:
            x = waiting[-1]
            if x in self._known:
                waiting.pop()
            elif missing := [u for u in _read(x) if u not in self._known]:
                waiting += missing
            else:
                if prod(self.shape(x)) > _MOST_ELEMENTS:
                    raise Mismatch(f"%{x.name} has too many elements to follow each")
                try:
                    self._known[x] = self._found(x)
                except _Unknown:
                    counts = x.made_by("iota") is not None and x.tensor.dtype.is_int
                    known = self._counting.get(x.shape[0]) if counts else None
                    self._known[x] = known or self._leaf(x)
                    if counts:
                        self._counting[x.shape[0]] = self._known[x]
        return self._known[v]

    def origin(self, numbers: np.ndarray) -> tuple[Value, tuple[np.ndarray, ...]]:
        """The value whose elements these are, all of them, and their places in it; raises Mismatch."""
        i = int(np.searchsorted([n for n, _, _ in self.leaves], numbers.flat[0], side="right")) - 1
        first, v, shape = self.leaves[i]
        if numbers.min() < first or numbers.max() >= first + prod(shape):
            raise Mismatch(f"a feature follows several positions, %{v.name} among them")
        return v, np.unravel_index(numbers - first, shape)

    def _leaf(self, v: Value) -> Terms:
        shape = self.shape(v)
        numbers = np.arange(self._count, self._count + prod(shape)).reshape(shape)
        self.leaves.append((self._count, v, shape))
        self._count += numbers.size
        if not v.tensor.dtype.is_float:
            return _terms(shape, position=numbers)
        return _terms(shape, frequency=numbers) if v.param is not None else _terms(shape, source=numbers)

    def _found(self, v: Value) -> Terms:
        node = v.node
        if v.const is not None and v.tensor.dtype.is_float:
            return _terms(v.const.shape, times=v.const.astype(np.float64))
        if node is None or v.const is not None:
            raise _Unknown
        if node.is_a(*_MOVES):
            return self._moved(node)
        if not v.tensor.dtype.is_float or not _read(v):
            raise _Unknown
        if node.is_a("cast"):
            return self._cast(node)
        operands = [self._spread(self._known[u], len(v.shape)) for u in node.inputs]
        if node.is_a("cos", "sin"):
            return _wave(operands[0], node)
        if node.is_a("neg"):
            return _scaled(operands[0], -1)
        if node.is_a("mul"):
            return _product(*operands)
        if node.is_a("add", "sub"):
            return _sum(operands[0], _scaled(operands[1], -1 if node.is_a("sub") else 1))
        raise _Unknown

    def _moved(self, node: Node) -> Terms:
        given = [self._known[u] for u in _read(node.output)]
        if not given:
            raise _Unknown
        n = max(len(x.times) for x in given)
        given = [_padded(x, n) for x in given]
        fixed: list[np.ndarray] = []
        if node.is_a("gather", "take_along"):
            index = node.inputs[1].const
            if index is None:
                raise _Unknown
            fixed = [index]

        def move(*parts: np.ndarray) -> np.ndarray:
            try:
                return np.asarray(node.op.run(node.attrs, self.sizes, *parts, *fixed))
            except (WasatError, ValueError, IndexError) as e:
                raise Mismatch(f"%{node.output.name} cannot be computed at {dict(self.sizes)}: {e}") from None

        columns = zip(*(x.arrays for x in given))
        return Terms(*(np.stack([move(*parts) for parts in zip(*column)]) for column in columns))

    def _cast(self, node: Node) -> Terms:
        x, old, new = self._known[node.inputs[0]], node.inputs[0].tensor.dtype, node.output.tensor.dtype
        if old.is_int and new.bits >= 32:
            return x
        if not old.is_float or (not x.turns and new is not old and new.bits <= old.bits):
            raise _Unknown
        return x

    def _spread(self, x: Terms, rank: int) -> Terms:
        """With axes of size 1 in front, as elementwise operations have them."""
        return Terms(*(a.reshape(len(a), *(1,) * (rank + 1 - a.ndim), *a.shape[1:]) for a in x.arrays))


def _read(v: Value) -> tuple[Value, ...]:
    """The values whose terms those of ``v`` follow from."""
    node = v.node
    if node is None or v.const is not None:
        return ()
    if node.is_a("gather", "take_along"):
        return node.inputs[:1] if node.inputs[1].const is not None else ()
    if node.is_a(*_MOVES, "cast"):
        return node.inputs
    return node.inputs if node.is_a("cos", "sin", "neg", "mul", "add", "sub") and v.tensor.dtype.is_float else ()


def _terms(shape: tuple[int, ...], **given: np.ndarray) -> Terms:
    none, one = np.full(shape, -1, np.int64), np.ones(shape)
    plain = {"times": one, "rate": one, "fn": np.zeros(shape, np.int64)}
    return Terms(*(given.get(f.name, plain.get(f.name, none))[None] for f in fields(Terms)))


def _padded(x: Terms, n: int) -> Terms:
    """With terms that are 0, so that there are ``n``."""
    if len(x.times) == n:
        return x
    more = _terms(x.times.shape[1:], times=np.zeros(x.times.shape[1:]))
    return Terms(*(np.concatenate([a, np.repeat(m, n - len(a), 0)]) for a, m in zip(x.arrays, more.arrays)))


def _scaled(x: Terms, by: float) -> Terms:
    return Terms(x.times * by, *x.arrays[1:])


def _wave(x: Terms, node: Node) -> Terms:
    if len(x.times) != 1 or x.moved or x.turns or (x.position < 0).any() or node.output.tensor.dtype.bits < 32:
        raise _Unknown
    fn = np.full(x.fn.shape, _COS if node.is_a("cos") else _SIN)
    return Terms(np.ones(x.times.shape), x.times, fn, *x.arrays[3:])


def _product(x: Terms, y: Terms) -> Terms:
    a, b = ([p[:, None] for p in x.arrays], [p[None, :] for p in y.arrays])
    if len(x.times) * len(y.times) > _MOST_TERMS:
        raise _Unknown
    times, rate, fn = a[0] * b[0], a[1] * b[1], a[2] + b[2]
    both = [(p >= 0) & (q >= 0) for p, q in zip(a[3:], b[3:])]
    here = times != 0
    apart = ((a[2] > 0) & ((b[2] > 0) | (b[3] >= 0) | (b[4] >= 0))) | ((b[2] > 0) & ((a[3] >= 0) | (a[4] >= 0)))
    if any((clash & here).any() for clash in (*both, apart)):
        raise _Unknown
    made = [times, rate, fn, *(np.maximum(p, q) for p, q in zip(a[3:], b[3:]))]
    plain = (made[2] == 0) & ((made[3] >= 0) | (made[4] >= 0)) & (made[5] >= 0)
    if (plain & here).any():  # x times a weight or a position is a value of its own
        raise _Unknown
    shape = np.broadcast_shapes(*(p.shape for p in made))
    return Terms(*(np.broadcast_to(p, shape).reshape(-1, *shape[2:]) for p in made))


def _sum(x: Terms, y: Terms) -> Terms:
    if not (x.turns or y.turns) or len(x.times) + len(y.times) > _MOST_TERMS:
        raise _Unknown
    for t in (x, y):
        if ((t.times != 0) & (t.source < 0)).any():
            raise _Unknown
    shape = np.broadcast_shapes(x.times.shape[1:], y.times.shape[1:])
    return Terms(*(
        np.concatenate([np.broadcast_to(p, (len(p), *shape)) for p in pair]) for pair in zip(x.arrays, y.arrays)
    ))  # fmt: skip


# -- what is found -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Turn:
    """Positions, and of each pair of features the frequency: a number, times an element of a parameter if there is one."""

    angles: Angles
    numbers: tuple[float, ...]
    elements: tuple[tuple[Value, int] | None, ...]

    def emit(self, b: Builder, dtype: DType) -> Value:
        """The frequencies, as the operation takes them."""
        used = [e for e in self.elements if e is not None]
        if not used:
            return b.constant(np.array(self.numbers, dtype.np), dtype)
        source, which = used[0][0], [0 if e is None else e[1] for e in self.elements]
        if any(e[0] is not source for e in used):
            raise Mismatch(f"frequencies of %{source.name} and of another parameter turn one vector")
        size = source.tensor.size
        rates = b.reshape(source, shape=(size,))
        rates = rates if rates.tensor.dtype is dtype else b.cast(rates, dtype=dtype)
        rates = rates if (len(which), which) == (size, sorted(set(which))) else b.gather(rates, b.constant(np.array(which)))
        return rates if set(self.numbers) == {1.0} else b.mul(rates, b.constant(np.array(self.numbers, dtype.np), dtype))


@dataclass(frozen=True)
class Rotation:
    """x, seen as [.., .., .., features], turned; its positions stand on ``axis``."""

    shape: tuple[DimLike, ...]
    axis: int
    turns: tuple[Turn, ...]
    factor: float
    interleaved: bool
    order: tuple[int, ...] | None
    """Of which features of x those are that turn, where they are put in another order."""


def rotation(y: Value) -> tuple[Value, Rotation]:
    """What ``y`` is the rotation of, and how it is turned; raises Mismatch."""
    symbols = dict.fromkeys(s for v in _cone(y) for s in symbols_of(v.shape))
    followed = [_Followed({s: least + 2 * i for i, s in enumerate(symbols)}) for least in (2, 3)]  # no two sizes alike
    reason: Mismatch | None = None
    for x, moved in [(x, moved) for moved in (False, True) for x in _sources(y)]:
        try:
            one, other = (_read_off(y, x, f, moved) for f in followed)
        except Mismatch as e:
            reason = reason or e
            continue
        if one == other:
            return x, one
        reason = Mismatch(f"how %{y.name} turns %{x.name} depends on sizes")
    raise reason or Mismatch(f"%{y.name} is the rotation of nothing of its size")


def _cone(y: Value) -> Iterator[Value]:
    """``y``, and what it is followed through, nearest first."""
    seen, waiting = {y}, [y]
    for v in waiting:
        yield v
        for u in _read(v):
            if u not in seen:
                seen.add(u)
                waiting.append(u)


def _sources(y: Value) -> Iterator[Value]:
    """The values that ``y`` could be, turned."""
    size = reduce(lambda a, d: a * d, y.shape, 1)
    for v in _cone(y):
        if v is not y and v.const is None and v.param is None and v.tensor.dtype is y.tensor.dtype and v.tensor.size == size:
            yield v


def _read_off(y: Value, x: Value, followed: _Followed, moved: bool) -> Rotation:
    made, given = followed.of(y), followed.of(x)
    if len(y.shape) not in (4, 5):
        raise Mismatch(f"{y!r} has not the four axes batch, position, head, feature")
    shape = (*y.shape[:3], reduce(lambda a, d: a * d, y.shape[3:], 1))
    sizes = tuple(evaluate_dim(d, followed.sizes) for d in shape)
    if given.turns or len(given.times) != 1 or (given.times != 1).any() or (given.source < 0).any():
        raise Mismatch(f"%{x.name} is not what %{y.name} turns")
    own = given.source.reshape(sizes)
    terms = Terms(*(a.reshape(-1, *sizes) for a in made.arrays))
    here = terms.times != 0
    if (((terms.fn == 0) | (terms.position < 0) | (terms.source < 0)) & here & ((terms.fn > 0) | (terms.times != 1))).any():
        raise Mismatch(f"%{y.name} is not %{x.name} turned by cosines and sines")
    order = _order(terms, here, own) if moved else None
    own = own if order is None else own[..., list(order)]
    lanes = [_feature(terms, here, own, f, x) for f in range(sizes[3])]
    return _arranged(y, x, followed, shape, sizes, lanes, order)


def _order(terms: Terms, here: np.ndarray, own: np.ndarray) -> tuple[int, ...]:
    """Which feature of x each one is that passes or is multiplied by a cosine, at the first place; raises Mismatch."""
    first = (terms.source * (here & (terms.fn != _SIN))).sum(0)[0, 0, 0]
    found = [np.flatnonzero(own[0, 0, 0] == n) for n in first]
    if any(len(f) != 1 for f in found):
        raise Mismatch("features are no others that are moved")
    return tuple(int(f[0]) for f in found)


@dataclass(frozen=True)
class _Lane:
    """A feature that is turned: by which other one, how, and by which position at each place."""

    other: int
    factor: float
    rate: float
    sign: int
    frequency: int
    position: np.ndarray


def _feature(terms: Terms, here: np.ndarray, own: np.ndarray, f: int, x: Value) -> _Lane | None:
    """What feature ``f`` is; None: it passes. Raises Mismatch."""

    def of(fn: int) -> list[np.ndarray] | None:
        mine = (here & (terms.fn == fn))[..., f]
        if not mine.any():
            return None
        if (mine.sum(0) != 1).any():
            raise Mismatch(f"feature {f} of %{x.name} is turned in some places")
        return [(a[..., f] * mine).sum(0) for a in terms.arrays]

    cos, sin, plain = of(_COS), of(_SIN), of(0)
    if plain is not None and cos is None and sin is None:
        if (plain[5] != own[..., f]).any():
            raise Mismatch(f"feature {f} of %{x.name} is moved")
        return None
    if cos is None or sin is None or plain is not None:
        raise Mismatch(f"feature {f} of %{x.name} has no cosine beside a sine")
    other = np.flatnonzero(own[0, 0, 0] == sin[5].flat[0])
    if (cos[5] != own[..., f]).any() or len(other) != 1 or (sin[5] != own[..., other[0]]).any():
        raise Mismatch(f"feature {f} of %{x.name} is turned with features that are moved")
    factor, rate, ways = cos[0].flat[0], abs(cos[1].flat[0]), np.sign(sin[0] * sin[1] * cos[0])
    same = (
        (cos[0], factor), (np.abs(sin[0]), abs(factor)), (np.abs(cos[1]), rate), (np.abs(sin[1]), rate), (ways, ways.flat[0]),
        (cos[3], sin[3].flat[0]), (sin[3], sin[3].flat[0]),
    )  # fmt: skip
    if any((found != one).any() for found, one in same):
        raise Mismatch(f"cosine and sine of feature {f} of %{x.name} are not of the same angle")
    if (cos[4] != sin[4]).any():
        raise Mismatch(f"cosine and sine of feature {f} of %{x.name} are not of the same position")
    return _Lane(int(other[0]), float(factor), float(rate), int(ways.flat[0]), int(cos[3].flat[0]), cos[4])


def _arranged(
    y: Value, x: Value, followed: _Followed, shape: tuple[DimLike, ...], sizes: tuple[int, ...],
    lanes: Sequence[_Lane | None], order: tuple[int, ...] | None,
) -> Rotation:  # fmt: skip
    turned = [f for f, lane in enumerate(lanes) if lane is not None]
    if not turned:
        raise Mismatch(f"%{y.name} turns nothing")
    first = lanes[turned[0]]
    assert first is not None
    apart = first.other - turned[0]
    if apart == 1 and not (turned[0] == 0 and turned[-1] == 1):
        interleaved, half = True, turned[-1] // 2 + 1
        pairs = [(2 * i, 2 * i + 1) for i in range(half)]
    else:
        interleaved, half = False, apart
        pairs = [(i, i + half) for i in range(max(half, 0))]
    if 2 * half > sizes[3] or half < 1 or set(turned) - {f for pair in pairs for f in pair}:
        raise Mismatch(f"the features of %{x.name} that turn are no pairs of neighbours, and no two halves")
    found: dict[Angles, list[tuple[float, tuple[Value, int] | None]]] = {}
    axes = set[int]()
    for i, (f, g) in enumerate(pairs):
        one, two = lanes[f], lanes[g]
        if one is None and two is None:
            if first.factor != 1:
                raise Mismatch(f"features {f} and {g} of %{x.name} do not turn between others that have a factor")
            continue
        if one is None or two is None or (one.other, two.other, two.sign) != (g, f, -one.sign):
            raise Mismatch(f"features {f} and {g} of %{x.name} do not turn with each other")
        same = (one.factor, one.rate, one.frequency) == (two.factor, two.rate, two.frequency) and one.factor == first.factor
        if not same or (one.position != two.position).any():
            raise Mismatch(f"features {f} and {g} of %{x.name} turn by different angles")
        angles = _angles(followed, one.position, y)
        axes |= {a.axis + 4 for a in angles.at if isinstance(a, Along)} - {0}
        at = None
        if one.frequency >= 0:
            source, place = followed.origin(np.array(one.frequency))
            at = source, int(np.ravel_multi_index([int(p) for p in place], followed.shape(source)))
        mine = found.setdefault(angles, [(0.0, None)] * half)
        mine[i] = (-one.sign * one.rate, at)
    if axes not in ({1}, {2}):
        raise Mismatch(f"what turns %{x.name} does not vary along one position axis")
    turns = tuple(Turn(a, tuple(n for n, _ in mine), tuple(e for _, e in mine)) for a, mine in found.items())
    return Rotation(shape, axes.pop(), turns, first.factor, interleaved, order)


def _angles(followed: _Followed, numbers: np.ndarray, y: Value) -> Angles:
    """The positions that turn a feature, [batch, .., ..] of numbers."""
    v, index = followed.origin(numbers)
    places = np.indices(numbers.shape)

    def place(x: np.ndarray) -> int | Along:
        if (x == x.flat[0]).all():
            return int(x.flat[0])
        for axis, p in enumerate(places):
            if (x == p).all():
                return Along(axis - 4)
        raise Mismatch(f"%{y.name} reads %{v.name} in another order")

    return of_repeated(v, v.shape, tuple(place(i) for i in index))


# -- where to look -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Products:
    """Products with cosines or sines, and what they are moved and added to."""

    values: frozenset[Value]
    last: tuple[Value, ...]
    """Those that nothing else is made of."""

    def within(self, y: Value) -> list[Value]:
        """Of which of them ``y`` is made, itself first."""
        return [v for v in _cone(y) if v in self.values]

    def read_elsewhere(self, y: Value, graph: Graph) -> str | None:
        """What of ``y`` is needed beside it, too."""
        own = self.within(y)
        nodes = {v.node for v in own}
        for v in own[1:]:
            if graph.is_output(v) or any(user not in nodes for user in v.users):
                return f"%{v.name} is also {'an output of the graph' if graph.is_output(v) else 'used outside the match'}"
        return None


def products(graph: Graph) -> Products:
    angles, tables, fixed, found, last = set[Value](), set[Value](), set[Value](), set[Value](), dict[Value, None]()
    for node in graph.nodes:
        y = node.outputs[0]
        if len(node.outputs) != 1 or not isinstance(y.type, TensorType) or not y.type.dtype.is_float:
            continue
        given = [v for v in node.inputs if v.const is None and v.param is None and v not in fixed]
        if node.is_a("cos", "sin"):
            tables.update([y] if given and given[0] in angles else [])
        elif node.is_a("cast") and isinstance(t := node.inputs[0].type, TensorType) and t.dtype.is_int:
            angles.add(y)
        elif not node.is_a(*_MOVES, "cast", "neg", "mul", "add", "sub"):
            continue
        elif not given:
            fixed.add(y)
        elif all(v in angles for v in given):
            angles.add(y)
        elif not node.is_a("mul") and any(v in found for v in given):
            found.add(y)
            last[y] = None
            for v in given:
                last.pop(v, None)
        elif all(v in tables for v in given):
            tables.add(y)
        elif node.is_a("mul") and any(v in tables for v in given):
            found.add(y)
            last[y] = None
    return Products(frozenset(found), tuple(last))
