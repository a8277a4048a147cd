"""Recognizes rotary position embedding: rotated halves, rotated pairs, part of a head, either layout of heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from wasat.ir import Builder, DimLike, DType, Graph, Node, TypeMismatch, Value
from wasat.ir.ops.shape import Slice

from ..core import Remarks
from ..pattern import Attempt, Match, Mismatch, Pattern, Rewrite, Rewrites, Tracer, Var, number_of, replace
from .rope_lanes import Along, factors, lanes
from .rotation import Products, products, rotation


# -- tables of cosines and sines ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Table:
    """``fn(positions * inv_freq) * factor``, of shape [.., width], width 1 or 2 times the frequencies."""

    fn: str
    positions: Value
    inv_freq: np.ndarray | Value
    """Numbers, or a parameter."""
    factor: float
    shape: tuple[DimLike, ...]
    pairs: bool
    """Whether each angle stands twice side by side, as interleaved pairs take them."""


_SHAPING = ("reshape", "broadcast_to")
_SWAP = (0, 2, 1, 3)


def _table(v: Value) -> _Table:
    """Reads where ``v`` came from; raises Mismatch where it is no such table."""
    table, factor, fn, pairs = v, 1.0, "", False
    while not fn:
        node = v.node
        if node is None:
            raise Mismatch(f"%{table.name} is no table of cosines or sines of positions")
        if (once := _each_twice(v)) is not None:
            pairs, v = True, once
            continue
        if node.is_a("cos", "sin"):
            fn = node.op.name
        elif node.is_a("mul") and (number := number_of(node.inputs[1])) is not None:  # clean-up puts constants second
            factor *= number
        elif not (_moves_units(v) or (node.is_a("cast") and v.tensor.dtype.is_float)):
            raise Mismatch(f"%{table.name} is {node.op.name} of something, no table of cosines or sines")
        v = node.inputs[0]
    repeats = 1
    v = _past_units(v)
    if (once := _each_twice(v)) is not None:
        pairs, v = True, _past_units(once)
    if (joined := v.made_by("concat")) is not None:  # along another axis than the last, the width would not fit
        if len(set(joined.inputs)) > 1:
            raise Mismatch(f"%{v.name} does not repeat the same angles")
        repeats = len(joined.inputs)
        v = _past_units(joined.inputs[0])
    pairings = factors(v)
    if not pairings:
        raise Mismatch(f"%{v.name} is no product of positions and frequencies")
    if v.tensor.dtype.bits < 32:
        raise Mismatch(f"the angles are {v.tensor.dtype}, too narrow for far positions")
    for position, frequency, place in pairings:
        source, at = _past_units(frequency), _positions(position)
        size = source.tensor.size
        if (source.const is None and source.param is None) or at is None or position.shape[place:][:1] != (1,):
            continue
        if isinstance(size, int) and frequency.shape[place:][:1] == (size,):
            inv_freq = source if source.const is None else source.const.reshape(-1)
            return _Table(fn, at, inv_freq, factor, _check_width(table, (1 + pairs) * repeats * size), pairs)
    raise Mismatch(f"%{v.name} is no product of integer positions [.., 1] and constant frequencies")


def _check_width(table: Value, width: int) -> tuple[DimLike, ...]:
    if table.shape[-1:] != (width,):
        raise Mismatch(f"the last axis of {table!r} is not {width} angles")
    return table.shape


def _moves_units(v: Value) -> bool:
    """Whether ``v`` is its operand with axes of size 1 put in or taken out."""
    shaped = v.made_by(*_SHAPING)
    return shaped is not None and _sizes(v) == _sizes(shaped.inputs[0])


def _each_twice(v: Value) -> Value | None:
    """What ``v`` [.., 2n] holds each element of twice, side by side, as [.., n, 1]."""
    shaped = v.made_by("reshape")
    repeat = shaped.inputs[0].made_by("broadcast_to", "concat") if shaped is not None else None
    if repeat is None or len(set(repeat.inputs)) > 1:
        return None
    both, once = repeat.output, repeat.inputs[0]
    n = both.shape[-2] if len(both.shape) > 1 else 0
    twice = both.shape[-1] == 2 and once.shape[-1:] == (1,) and _sizes(once) == [d for d in both.shape[:-1] if d != 1]
    same = v.shape[-1:] == (2 * n,) and [d for d in v.shape[:-1] if d != 1] == [d for d in both.shape[:-2] if d != 1]
    return once if twice and same else None


def _sizes(v: Value) -> list[DimLike]:
    return [d for d in v.shape if d != 1]


def _past_units(v: Value) -> Value:
    while _moves_units(v):
        assert v.node is not None
        v = v.node.inputs[0]
    return v


def _positions(v: Value) -> Value | None:
    """The integers that ``v`` is a cast of."""
    v = _past_units(v)
    if (cast := v.made_by("cast")) is None:
        return None
    x = cast.inputs[0]
    return _past_units(x) if x.tensor.dtype.is_int else None


# -- what replaces them --------------------------------------------------------------------------------------------------------
def _rope(
    b: Builder, x: Value, cos: Value, sin: Value, repeats: int, interleaved: bool = False, pairs: bool = False
) -> Value:  # fmt: skip
    """x rotated by the angles of two tables that broadcast to it, each ``repeats`` times, side by side if ``pairs``; raises
    Mismatch.
    """
    try:
        c, s = _table(cos), _table(sin)
    except Mismatch as e:
        try:
            return _lane_by_lane(b, x, cos, sin, repeats, interleaved, pairs)
        except Mismatch:
            raise e from None
    if (c.fn, s.fn) != ("cos", "sin"):
        raise Mismatch(f"%{cos.name} and %{sin.name} are not cosine and sine in this order")
    same = c.positions is s.positions and (c.factor, c.shape, c.pairs) == (s.factor, s.shape, s.pairs)
    if isinstance(c.inv_freq, np.ndarray) and isinstance(s.inv_freq, np.ndarray):
        same = same and np.array_equal(c.inv_freq, s.inv_freq)
    else:
        same = same and c.inv_freq is s.inv_freq
    if not same:
        raise Mismatch(f"%{cos.name} and %{sin.name} are not of the same angles")
    axis, rows = _laid_out(x, cos, c.shape)
    count = c.inv_freq.size if isinstance(c.inv_freq, np.ndarray) else c.inv_freq.tensor.size
    if c.pairs != pairs:
        raise Mismatch(f"%{cos.name} holds its angles in another order than %{x.name} its pairs of features")
    if c.shape[-1] != repeats * count:
        raise Mismatch(f"%{cos.name} holds {c.shape[-1]} angles per position for {count} frequencies")
    at: tuple[DimLike, ...] = (x.shape[axis],) if rows == 1 else (rows, x.shape[axis])
    positions = c.positions if c.positions.shape == at else b.reshape(c.positions, shape=at)
    if isinstance(c.inv_freq, np.ndarray):
        inv_freq = b.constant(c.inv_freq, _wide(x))
    else:
        inv_freq = b.reshape(c.inv_freq, shape=(count,))
        inv_freq = inv_freq if inv_freq.tensor.dtype is _wide(x) else b.cast(inv_freq, dtype=_wide(x))
    return _rotated_along(b, x, axis, [(positions, inv_freq)], c.factor, interleaved)


def _laid_out(x: Value, cos: Value, table: tuple[DimLike, ...]) -> tuple[int, DimLike]:
    """The axis of x along which its table varies, and of how many rows the table is; raises Mismatch."""
    if len(x.shape) != 4:
        raise Mismatch(f"{x!r} has not the four axes batch, position, head, feature")
    shape = (*(1,) * (4 - len(table)), *table)
    if shape[2] == 1 and shape[1] == x.shape[1]:
        axis = 1
    elif shape[1] == 1 and shape[2] == x.shape[2]:
        axis = 2
    else:
        axis = 0
    if axis == 0 or shape[0] not in (1, x.shape[0]):
        raise Mismatch(f"%{cos.name} does not vary along one position axis of {x!r}")
    return axis, shape[0]


def _wide(x: Value) -> DType:
    return DType.F64 if x.tensor.dtype is DType.F64 else DType.F32


def _rotated_along(
    b: Builder, x: Value, axis: int, turns: Sequence[tuple[Value, Value]], factor: float, interleaved: bool
) -> Value:  # fmt: skip
    """x turned by each of the (positions, frequencies), one after the other; its positions stand on ``axis``."""
    x = b.transpose(x, perm=_SWAP) if axis == 2 else x
    for positions, inv_freq in turns:
        x, factor = b.rope(x, positions, inv_freq, factor=factor, interleaved=interleaved), 1.0
    return b.transpose(x, perm=_SWAP) if axis == 2 else x


def _lane_by_lane(
    b: Builder, x: Value, cos: Value, sin: Value, repeats: int, interleaved: bool, pairs: bool
) -> Value:  # fmt: skip
    """The same, of tables whose features follow positions of several kinds: turned by each kind, where the others' frequencies
    are 0 and nothing moves; raises Mismatch.
    """
    c, s = lanes(cos), lanes(sin)
    if (c.fn, s.fn, c.factor, c.features) != ("cos", "sin", s.factor, s.features) or c.shape != s.shape:
        raise Mismatch(f"%{cos.name} and %{sin.name} are not cosine and sine of the same angles")
    width = len(c.features) // repeats
    own = c.features[::2] if pairs else c.features[:width]
    if c.features != (tuple(f for f in own for _ in range(2)) if pairs else own * repeats):
        raise Mismatch(f"%{cos.name} holds its angles in another order than %{x.name} its pairs of features")
    axis, rows = _laid_out(x, cos, c.shape)
    turns = []
    for kind in dict.fromkeys((angles, source) for angles, source, _ in own):
        angles, source = kind
        mine = np.array([(at, f) == kind for at, f, _ in own])
        which = np.array([i if m else 0 for (_, _, i), m in zip(own, mine)])
        if source.const is not None:
            inv_freq = b.constant(np.where(mine, source.const.reshape(-1)[which], 0), _wide(x))
        else:
            size = source.tensor.size
            inv_freq = b.reshape(source, shape=(size,))
            inv_freq = inv_freq if inv_freq.tensor.dtype is _wide(x) else b.cast(inv_freq, dtype=_wide(x))
            in_order = len(which) == size and all(i == n for n, i in enumerate(which) if mine[n])
            inv_freq = inv_freq if in_order else b.gather(inv_freq, b.constant(which))
            inv_freq = inv_freq if mine.all() else b.mul(inv_freq, b.constant(mine.astype(np.float32), _wide(x)))
        turns.append((angles.emit(b, axis - 4, rows, x.shape[axis]), inv_freq))
    return _rotated_along(b, x, axis, turns, c.factor, interleaved)


def _part(v: Value) -> tuple[DimLike, DimLike]:
    """Start and stop along the last axis of a slice that takes everything else."""
    assert v.node is not None
    attrs, x = Slice.Attrs.of(v.node), v.node.inputs[0]
    whole = all(lo == 0 and hi == d for lo, hi, d in zip(attrs.starts[:-1], attrs.stops[:-1], x.shape))
    if not whole or any(s != 1 for s in attrs.steps):
        raise Mismatch(f"%{v.name} is not a part of the features of %{x.name}")
    return attrs.starts[-1], attrs.stops[-1]


def _halves(low: Value, high: Value) -> tuple[DimLike, DimLike]:
    """Where two adjacent slices of one size begin, and that size; raises Mismatch."""
    (start, middle), (start2, stop) = _part(low), _part(high)
    size = middle - start
    if (start2, stop) != (middle, middle + size):
        raise Mismatch(f"%{low.name} and %{high.name} are not halves of one vector")
    return start, size


class _RotateHalf(Rewrite):
    """x * cos + concat(-x[half:], x[:half]) * sin -> rope(x)"""

    landmark: ClassVar[str] = "neg"

    def is_landmark(self, node: Node) -> bool:
        return super().is_landmark(node) and _of("slice", node)

    def pattern(self, p: Tracer, x: Var, source: Var, cos: Var, sin: Var) -> Pattern:
        low, high = (p.shared(p.named(k, p.slice(source))) for k in ("low", "high"))
        return p.add(p.mul(x, cos), p.mul(p.concat(p.neg(high), low, axis=lambda a, n: a == len(n.inputs[0].shape) - 1), sin))

    def build(self, b: Builder, m: Match) -> Value:
        x, source = m["x"], m["source"]
        start, half = _halves(m["low"], m["high"])
        if x is source:
            mine: tuple[DimLike, DimLike] = (0, x.shape[-1])
        elif x.made_by("slice") is not None and x.node.inputs[0] is source:
            mine = _part(x)
        else:
            raise Mismatch(f"%{x.name} is not what %{m['low'].name} and %{m['high'].name} are the halves of")
        if mine != (start, start + 2 * half):
            raise Mismatch(f"%{m['low'].name} and %{m['high'].name} are not the halves of %{x.name}")
        return _rope(b, x, m["cos"], m["sin"], repeats=2)


def _of_spectra(node: Node) -> bool:
    """Whether products of spectra are subtracted: complex numbers are multiplied, and no vector is turned (a convolution)."""
    for u in (u for v in node.inputs if v.node is not None for u in v.node.inputs):
        while u.made_by("slice", "reshape") is not None:
            assert u.node is not None
            u = u.node.inputs[0]
        if u.made_by("dft") is not None:
            return True
    return False


def _of(name: str, node: Node) -> bool:
    """Whether the operands of ``node`` are all results of the operation ``name``."""
    return all(v.made_by(name) is not None for v in node.inputs)


def _rotated(p: Tracer, x1: Pattern, x2: Pattern, cos: Var, sin: Var) -> tuple[Pattern, Pattern]:
    """x1 * cos - x2 * sin and x2 * cos + x1 * sin."""
    return p.sub(p.mul(x1, cos), p.mul(x2, sin)), p.add(p.mul(x2, cos), p.mul(x1, sin))


class _Halves(Rewrite):
    """concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin [, rest]) -> rope(x [, of which the rest passes])"""

    landmark: ClassVar[str] = "sub"

    def is_landmark(self, node: Node) -> bool:
        return super().is_landmark(node) and _of("mul", node) and not _of_spectra(node)

    def pattern(self, p: Tracer, x: Var, cos: Var, sin: Var) -> Pattern:
        x1, x2, rest = (p.shared(p.named(k, p.slice(x))) for k in ("x1", "x2", "rest"))
        y1, y2 = _rotated(p, x1, x2, cos, sin)
        return p.either(p.concat(y1, y2, axis=3), p.concat(y1, y2, rest, axis=3))

    def build(self, b: Builder, m: Match) -> Value:
        x = m["x"]
        start, half = _halves(m["x1"], m["x2"])
        end = _part(m["rest"]) if "rest" in m else (2 * half, 2 * half)
        if start != 0 or end != (2 * half, x.shape[-1]):
            raise Mismatch(f"the parts do not make up the features of %{x.name}")
        return _rope(b, x, m["cos"], m["sin"], repeats=1)


def _every_second(v: Value, first: int) -> bool:
    """Whether a slice takes the features first, first + 2, .. and everything else whole."""
    assert v.node is not None
    attrs, shape = Slice.Attrs.of(v.node), v.node.inputs[0].shape
    whole = all(lo == 0 and hi == d and s == 1 for lo, hi, s, d in zip(attrs.starts[:-1], attrs.stops[:-1], attrs.steps, shape))
    return whole and (attrs.starts[-1], attrs.steps[-1], v.shape[-1]) == (first, 2, shape[-1] // 2)


def _check_pairs(m: Match) -> None:
    """Raises Mismatch where the parts of x are not the first and the second features of its pairs."""
    if "x1" in m and "x2" in m:
        _halves(m["x1"], m["x2"])
    elif not ("even" in m and "odd" in m and _every_second(m["even"], 0) and _every_second(m["odd"], 1)):
        raise Mismatch(f"the parts of %{m['x'].name} are not its even and its odd features")


class _Pairs(Rewrite):
    """The same with pairs (2i, 2i + 1): x reshaped to [.., half, 2] and taken apart, or every second feature of x -> rope(x),
    interleaved
    """

    landmark: ClassVar[str] = "sub"

    def is_landmark(self, node: Node) -> bool:
        return super().is_landmark(node) and _of("mul", node) and not _of_spectra(node)

    def pattern(self, p: Tracer, x: Var, cos: Var, sin: Var) -> Pattern:
        pairs = p.shared(p.named("pairs", p.reshape(x)))
        x1, x2 = (
            p.shared(p.either(p.reshape(p.named(k, p.slice(pairs))), p.named(every, p.slice(x))))
            for k, every in (("x1", "even"), ("x2", "odd"))
        )
        y1, y2 = (p.named(k, y) for k, y in zip(("y1", "y2"), _rotated(p, x1, x2, cos, sin)))
        return p.reshape(p.named("both", p.concat(p.reshape(y1), p.reshape(y2), axis=4)))

    def build(self, b: Builder, m: Match) -> Value:
        x = m["x"]
        half = x.shape[-1] // 2
        pairs = m["pairs"] if "pairs" in m else m["both"]
        apart = pairs.shape == (*x.shape[:-1], half, 2) == m["both"].shape
        if not apart or m["y1"].shape != (*x.shape[:-1], half):
            raise Mismatch(f"%{pairs.name} does not hold the pairs of features of %{x.name}")
        _check_pairs(m)
        return _rope(b, x, m["cos"], m["sin"], repeats=1, interleaved=True)


class _RotatePairs(Rewrite):
    """x * cos + stack(-x[1::2], x[::2]) * sin, each angle twice side by side -> rope(x), interleaved"""

    landmark: ClassVar[str] = "neg"

    def is_landmark(self, node: Node) -> bool:
        if not super().is_landmark(node) or not node.output.tensor.dtype.is_float:
            return False  # distances are negated, too
        return _of("slice", node) or _of("reshape", node)

    def pattern(self, p: Tracer, x: Var, cos: Var, sin: Var) -> Pattern:
        pairs = p.shared(p.named("pairs", p.reshape(x)))
        s1, s2 = (p.shared(p.named(k, p.slice(pairs))) for k in ("x1", "x2"))
        even, odd = (p.shared(p.named(k, p.slice(x))) for k in ("even", "odd"))
        first = p.either(p.reshape(p.neg(p.either(odd, p.reshape(s2)))), p.neg(s2))
        second = p.either(p.reshape(p.either(even, p.reshape(s1))), s1)
        return p.add(p.mul(x, cos), p.mul(p.reshape(p.named("both", p.concat(first, second, axis=4))), sin))

    def build(self, b: Builder, m: Match) -> Value:
        x = m["x"]
        whole = (*x.shape[:-1], x.shape[-1] // 2, 2)
        if m["both"].shape != whole or ("pairs" in m and m["pairs"].shape != whole):
            raise Mismatch(f"%{m['both'].name} does not hold the pairs of features of %{x.name}")
        _check_pairs(m)
        return _rope(b, x, m["cos"], m["sin"], repeats=2, interleaved=True, pairs=True)


class _ByMeaning(Rewrite):
    """What comes to x rotated by angles of positions, in any spelling -> rope(x)"""

    def rewrite(self, graph: Graph, attempt: Attempt) -> Iterator[Value]:
        groups = products(graph)
        for last in groups.last:
            waiting, seen = [last], {last}
            for y in waiting:
                if y.node is None or y.node.erased or y.node.is_a("mul"):
                    continue
                try:
                    new = self._rotated(graph, groups, y)
                except (Mismatch, TypeMismatch):
                    more = [v for v in y.node.inputs if v in groups.values and v not in seen]
                    seen.update(more)
                    waiting += more
                    continue
                yield new

    def _rotated(self, graph: Graph, groups: Products, y: Value) -> Value:
        x, found = rotation(y)
        if (reason := groups.read_elsewhere(y, graph)) is not None:
            raise Mismatch(reason)
        assert y.node is not None
        b = Builder(graph, before=y.node, loc=y.node.loc)
        sizes = found.shape
        rows, count = sizes[0], sizes[found.axis]
        turns = []
        for turn in found.turns:
            along = any(a.axis == -4 for a in turn.angles.at if isinstance(a, Along))
            turns.append((turn.angles.emit(b, found.axis - 4, rows if along else 1, count), turn.emit(b, _wide(x))))
        x = x if x.shape == sizes else b.reshape(x, shape=sizes)
        x = x if found.order is None else b.gather(x, b.constant(np.array(found.order)), axis=3)
        new = _rotated_along(b, x, found.axis, turns, found.factor, found.interleaved)
        new = new if new.shape == y.shape else b.reshape(new, shape=y.shape)
        replace(graph, y, new)
        return new


class _Partial(Rewrite):
    """concat(rope(x[.. :r]), x[.. r:]) -> rope(x), which leaves the features that have no frequency"""

    def pattern(self, p: Tracer, x: Var, positions: Var, inv_freq: Var) -> Pattern:
        turned = p.shared(p.named("turned", p.slice(x)))
        plain = p.named("rope", p.rope(turned, positions, inv_freq))
        swapped = p.transpose(p.named("rope", p.rope(p.transpose(turned, perm=_SWAP), positions, inv_freq)), perm=_SWAP)
        return p.concat(p.either(plain, p.named("swapped", swapped)), p.shared(p.named("rest", p.slice(x))), axis=3)

    def build(self, b: Builder, m: Match) -> Value:
        x, width, old = m["x"], 2 * m["inv_freq"].shape[0], m["rope"].node.attrs
        if _part(m["turned"]) != (0, width) or _part(m["rest"]) != (width, x.shape[-1]):
            raise Mismatch(f"%{m['turned'].name} and %{m['rest'].name} do not make up the features of %{x.name}")
        x = b.transpose(x, perm=_SWAP) if "swapped" in m else x
        y = b.rope(x, m["positions"], m["inv_freq"], factor=old.factor, interleaved=old.interleaved)
        return b.transpose(y, perm=_SWAP) if "swapped" in m else y


class _RepeatedHeads(Rewrite):
    """rope(repeat(x)) -> repeat(rope(x)) where heads are repeated: each is turned once, and attention sees what it shares"""

    def pattern(self, p: Tracer, one: Var, positions: Var, inv_freq: Var) -> Pattern:
        repeated = p.named("heads", p.reshape(p.named("spread", p.broadcast_to(one))))
        swapped = p.named("swapped", p.transpose(repeated, perm=_SWAP))
        return p.either(
            p.named("rope", p.rope(repeated, positions, inv_freq)), p.named("rope", p.rope(swapped, positions, inv_freq))
        )

    def build(self, b: Builder, m: Match) -> Value:
        one, spread, old, axis = m["one"], m["spread"].shape, m["rope"].node.attrs, 1 if "swapped" in m else 2
        shape = (*spread[: axis + 1], *spread[axis + 2 :])  # of the heads there are
        if one.shape != (*spread[: axis + 1], 1, *spread[axis + 2 :]) or len(shape) != 4:
            raise Mismatch(f"%{m['spread'].name} does not repeat heads")
        if m["heads"].shape != (*shape[:axis], shape[axis] * spread[axis + 1], *shape[axis + 1 :]):
            raise Mismatch(f"%{m['heads'].name} does not put what repeats a head beside it")

        def turned(v: Value) -> Value:
            return b.transpose(v, perm=_SWAP) if axis == 1 else v

        x = turned(b.reshape(one, shape=shape))
        y = b.rope(x, m["positions"], m["inv_freq"], factor=old.factor, interleaved=old.interleaved)
        y = b.broadcast_to(b.reshape(turned(y), shape=one.shape), shape=spread)
        return turned(b.reshape(y, shape=m["heads"].shape))


class _Narrow(Rewrite):
    """cast(rope(cast(x))) -> rope(x) of the narrow type: the operation computes in f32 by itself"""

    def pattern(self, p: Tracer, x: Var, positions: Var, inv_freq: Var) -> Pattern:
        return p.cast(p.named("rope", p.rope(p.shared(p.cast(x)), positions, inv_freq)))

    def build(self, b: Builder, m: Match) -> Value:
        x, old = m["x"], m["rope"].node.attrs
        if x.tensor.dtype.bits >= 32 or m["rope"].tensor.dtype is not DType.F32:
            raise Mismatch(f"{x!r} is not widened to f32")
        return b.rope(x, m["positions"], m["inv_freq"], factor=old.factor, interleaved=old.interleaved)


class FuseRope(Rewrites):
    """Rotary position embedding written out -> ``rope(x, positions, inv_freq)``.

    Halves or interleaved pairs, rotated together or apart, a rotated part of each head, a factor on the tables; where positions
    follow heads in x, transposes are put around. Tables may be shared between layers; their angles must be products of integer
    positions and constant frequencies, in f32 or wider. Tables rounded to f16 are replaced by f32 ones. Features may follow
    positions of several kinds (M-RoPE; rows and columns): these turn one after the other.
    """

    name = "fuse-rope"
    rules = (_RotateHalf(), _Halves(), _Pairs(), _RotatePairs(), _ByMeaning(), _Partial(), _RepeatedHeads(), _Narrow())

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        try:
            return super().run_graph(graph, remarks)
        finally:
            lanes.cache_clear()
