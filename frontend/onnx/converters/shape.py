"""Shapes and moving elements: Reshape, Slice, Pad, Expand, ... and the sizes they are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from wasat.ir import DimLike, DType, Value, equal, is_table, less_equal, maximum, minimum, substitute, symbol, symbols_of
from wasat.ir.dims import alone, floordiv

from ..emit import Emitter, Operand, is_constant, known, objects, size_of
from ..errors import FromData
from ..registry import NodeView, op
from ..turns import increment

LARGE = 1024
"""A Constant of so many elements is a weight: a parameter, as an initializer is."""
END = 2**31 - 1
"""From here on, a bound means the end of the axis (exporters write INT_MAX or INT64_MAX)."""


@op("Identity", "Optional")
def identity(c: Emitter, n: NodeView, x: Any = None) -> Any:
    return x


@op("Constant")
def constant(c: Emitter, n: NodeView) -> Any:
    for key in ("value_int", "value_ints", "value_float", "value_floats"):
        if key in n.attrs:
            return np.asarray(n[key], np.int64 if "int" in key else np.float32)
    if "value" not in n.attrs:
        raise n.fail(f"holds {', '.join(n.attrs) or 'nothing'}; only numeric tensors are supported")
    value = np.asarray(n["value"])
    return n.importer.stored(n.name, value) if value.size >= LARGE and c.sources is n.importer.params else value


@op("Shape")
def shape(c: Emitter, n: NodeView, x: Operand) -> Any:
    return known(objects(c.shape(x)[n.get("start", 0) : n.get("end")]), DType.I64)


@op("Size")
def size(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.dim_size(size=size_of(c.shape(x)))


@op("ConstantOfShape")
def constant_of_shape(c: Emitter, n: NodeView, shape: Operand) -> Any:
    value = np.asarray(n.get("value", np.zeros(1, np.float32)))
    return c.expand(value.reshape(()), *c.dims(shape, "the shape of ConstantOfShape"))


@op("Reshape", since=5)
def reshape(c: Emitter, n: NodeView, x: Operand, shape: Operand) -> Any:
    given = list(c.dims(shape, "the shape of Reshape"))
    if not n.get("allowzero", 0):
        given = [c.shape(x)[i] if d == 0 else d for i, d in enumerate(given)]
    if given.count(-1) > 1:
        raise n.fail(f"shape {given} has more than one -1")
    if -1 in given:
        total = size_of(c.shape(x))
        rest = size_of([d for d in given if d != -1])
        given[given.index(-1)] = 0 if rest == 0 else floordiv(total, rest)
    elif equal(total := size_of(c.shape(x)), size_of(given)) is None:
        asked = [_asked_for(c, d) for d in given]
        given = asked if equal(total, size_of(asked)) else given
    return c.view(x, *given)


def _asked_for(c: Emitter, d: DimLike) -> DimLike:
    """s of ``min(64, s)``, where s is no more than 64 already, as for a table's rows that met s elements."""
    bound = alone(d)
    if bound is None or bound.name != "min" or isinstance(bound.lhs, int) == isinstance(bound.rhs, int):
        return d
    most, size = sorted((bound.lhs, bound.rhs), key=lambda x: not isinstance(x, int))
    known = any((maximum(size, most), most) in node.checks for node in c.graph.nodes)
    return size if known else d


@op("Flatten")
def flatten(c: Emitter, n: NodeView, x: Operand) -> Any:
    axis = n["axis"] % max(c.rank(x), 1) if n["axis"] < 0 else n["axis"]
    return c.view(x, size_of(c.shape(x)[:axis]), size_of(c.shape(x)[axis:]))


def _axes(c: Emitter, n: NodeView, axes: Operand | None) -> list[int] | None:
    return n.get("axes") if axes is None else [int(a) for a in c.numbers(axes, f"the axes of {n.op}").ravel()]


@op("Squeeze")
def squeeze(c: Emitter, n: NodeView, x: Operand, axes: Operand | None = None) -> Any:
    chosen = _axes(c, n, axes)
    if chosen is None:
        chosen = [i for i, d in enumerate(c.shape(x)) if d == 1]
    return c.drop_axes(x, *chosen)


@op("Unsqueeze")
def unsqueeze(c: Emitter, n: NodeView, x: Operand, axes: Operand | None = None) -> Any:
    return c.add_axes(x, *(_axes(c, n, axes) or ()))


@op("Transpose")
def transpose(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.permute(x, n.get("perm") or range(c.rank(x))[::-1])


@op("Concat", since=4)
def concat(c: Emitter, n: NodeView, *xs: Operand) -> Any:
    return xs[0] if len(xs) == 1 else c.concat(*xs, axis=n["axis"])


@op("Split", since=2)
def split(c: Emitter, n: NodeView, x: Operand, sizes: Operand | None = None) -> Any:
    axis = c.axis(n["axis"], c.rank(x))
    parts: Sequence[DimLike] = n.get("split", ()) if sizes is None else c.dims(sizes, "the sizes of Split")
    if not parts:
        count = len(n.proto.output)
        chunk = floordiv(c.shape(x)[axis] + count - 1, count)
        parts = [chunk] * (count - 1) + [c.shape(x)[axis] - chunk * (count - 1)]
    out: list[Any] = []
    at: DimLike = 0
    for part in parts:
        out.append(c.cut(x, axis, at, at + part))
        at = at + part
    return tuple(out)


@op("Slice", since=10)
def slice_(
    c: Emitter, n: NodeView, x: Operand, starts: Operand, ends: Operand, axes: Operand | None = None,
    steps: Operand | None = None,
) -> Any:  # fmt: skip
    try:
        first, last = c.dims(starts, "where a Slice starts"), c.dims(ends, "where a Slice ends")
    except FromData:
        size = increment(ends, starts)
        stride = 1 if steps is None else c.numbers(steps, "the steps of Slice").ravel().max()
        if size is None or size < 1 or stride != 1 or axes is None:
            raise
        return _window(c, x, starts, size, int(c.numbers(axes, "the axes of Slice").item()))
    chosen = range(len(first)) if axes is None else [int(a) for a in c.numbers(axes, "the axes of Slice")]
    strides = [1] * len(first) if steps is None else [int(s) for s in c.numbers(steps, "the steps of Slice")]
    for axis, lo, hi, step in zip(chosen, first, last, strides):
        axis %= c.rank(x)
        size = c.shape(x)[axis]
        if size == step == 1 and _of_one(lo, x) and isinstance(hi, int) and hi >= 1:
            continue
        if step < 0:  # the mirrored slice of the mirrored axis
            x = c.reverse(x, axes=(axis,))
            first_kept = 0 if isinstance(lo, int) and lo >= END else size - 1 - _place(lo, size)
            hi = size if isinstance(hi, int) and hi <= -END else size - 1 - _place(hi, size)
            lo, step = first_kept, -step
        else:
            lo, hi = _place(lo, size), _place(hi, size)
        open_end = isinstance(size, int) and not isinstance(hi, int) and less_equal(0, hi)
        if open_end and (not isinstance(x, Value) or is_table(x)):
            hi = maximum(hi, lo)  # part of a table: it has as many rows as are asked for, which the slice checks
            x = c.cut(x, axis, minimum(maximum(lo, 0), size), hi, step)
            continue
        x = c.cut(x, axis, *_inside(lo, hi, size), step)
    return x


def _window(c: Emitter, x: Operand, start: Operand, size: int, axis: int) -> Any:
    """So many elements from a place that a run computes. One that does not lie within ``x`` is an index out of range, where
    Slice would give fewer elements: a size that no graph has."""
    outside = c.size_as(c.shape(x)[axis], DType.I64)
    start = c.to(c.view(start), DType.I64)
    from_end = c.add(start, outside)
    within = c.logical_and(c.less(start, -size), c.greater_equal(from_end, 0))
    start = c.select(c.less(start, 0), c.select(within, from_end, outside), start)
    return c.gather(x, c.add(start, c.iota(size=size, dtype=DType.I64)), axis=c.axis(axis, c.rank(x)))


@op("Slice", since=1)
def slice_of_attributes(c: Emitter, n: NodeView, x: Operand) -> Any:
    starts, ends, axes = (None if n.get(k) is None else np.asarray(n[k], np.int64) for k in ("starts", "ends", "axes"))
    if starts is None or ends is None or len(starts) != len(ends):
        raise n.fail("starts and ends must be given, as many of the one as of the other")
    return slice_(c, n, x, starts, ends, axes)


def _of_one(lo: DimLike, x: Operand) -> bool:
    """Whether a slice of one element that starts at ``lo`` has it: so many from the end, also none (-0); of a table, as many as
    there are tokens, of which there is one."""
    if isinstance(lo, int):
        return False
    least = substitute(lo, {str(d): symbol(str(d)) + 1 for d in symbols_of([lo])})
    return less_equal(lo, 0) is True or (is_constant(x) and less_equal(least, 0) is True)


def _inside(lo: DimLike, hi: DimLike, size: DimLike) -> tuple[DimLike, DimLike]:
    """Bounds of a slice clamped to ``0 <= lo <= hi <= size``. There is a last element, where it is asked for by itself."""
    if equal(lo, size - 1) and equal(hi, size):
        return lo, hi
    lo = minimum(maximum(lo, 0), size)
    return lo, maximum(minimum(hi, size), lo)


def _place(at: DimLike, size: DimLike) -> DimLike:
    """A bound of a slice from the front; negative ones count from the end."""
    if isinstance(at, int):
        return size if at >= END else at + size if at < 0 else at
    if equal(at, size - 1):  # of an axis of size 0 it is -1, and the last of nothing again
        return at
    if equal(at + size, 0):  # the last s of s, where s may be 0
        return 0
    if less_equal(0, at) is None:  # the sign shows when it runs: the quotient is -1 or 0
        return at - size * (at // END)
    return at + size if less_equal(0, at) is False else at


@op("Expand")
def expand(c: Emitter, n: NodeView, x: Operand, shape: Operand) -> Any:
    want = list(c.dims(shape, "the shape of Expand"))
    own = list(c.shape(x))
    rank = max(len(want), len(own))
    own, want = ([*(1,) * (rank - len(ds)), *ds] for ds in (own, want))
    return c.expand(x, *(a if b == 1 or (isinstance(a, int) and a != 1) else _common(a, b) for a, b in zip(own, want)))


def _common(a: DimLike, b: DimLike) -> DimLike:
    """What sizes ``a`` and ``b`` are when each is stretched to the other: one is 1, or they are equal.

    Of sizes that are neither (3 and 2) it is one that ``a`` is not stretched to.
    """
    if a == 1 or isinstance(b, int) or equal(a, b) is True:
        return b
    larger, smaller = maximum(a, b), minimum(a, b)
    return maximum(larger + minimum(minimum(a, b) - 1, larger - smaller), 0)


@op("Tile", since=6)
def tile(c: Emitter, n: NodeView, x: Operand, repeats: Operand) -> Any:
    times, shape = c.dims(repeats, "the repeats of Tile"), c.shape(x)
    pairs = c.view(x, *(d for s in shape for d in (1, s)))
    pairs = c.expand(pairs, *(d for r, s in zip(times, shape) for d in (r, s)))
    return c.view(pairs, *(r * s for r, s in zip(times, shape)))


@op("Range")
def range_(c: Emitter, n: NodeView, start: Operand, limit: Operand, delta: Operand) -> Any:
    dtype = c.dtype(start)
    if all(isinstance(x, np.ndarray) for x in (start, limit, delta)) or dtype.is_float:
        wide = np.float64 if dtype.is_float else object  # of integers, which a float need not hold
        lo, hi, step = (c.const(x, "a bound of Range").reshape(()).astype(wide).item() for x in (start, limit, delta))
        if step == 0:
            raise n.fail("the step is 0")
        count: DimLike = max(int(np.ceil((hi - lo) / step)) if dtype.is_float else -((lo - hi) // step), 0)
    else:
        (first,), (end,), (by,) = (c.dims(x, "a bound of Range") for x in (start, limit, delta))
        if not isinstance(by, int) or by == 0:
            raise n.fail(f"the step {by} must be a fixed number")
        count = floordiv(end - first + by - 1, by) if by > 0 else floordiv(first - end - by - 1, -by)
    work = DType.F32 if dtype.is_float and dtype.bits < 32 else dtype
    at = c.iota(size=count, dtype=work)
    if not (isinstance(delta, np.ndarray) and delta == 1):
        at = c.mul(at, c.to(delta, work))
    return c.to(at if isinstance(start, np.ndarray) and start == 0 else c.add(at, c.to(start, work)), dtype)


@op("Pad", since=11)
def pad(c: Emitter, n: NodeView, x: Operand, pads: Operand, value: Operand | None = None, axes: Operand | None = None) -> Any:
    amounts, rank = c.dims(pads, "the amounts of Pad"), c.rank(x)
    chosen = range(rank) if axes is None else [c.axis(int(a), rank) for a in c.numbers(axes, "the axes of Pad")]
    low: list[DimLike] = [0] * rank
    high: list[DimLike] = [0] * rank
    for i, axis in enumerate(chosen):
        low[axis], high[axis] = amounts[i], amounts[len(chosen) + i]
    return padded(c, x, low, high, n["mode"], value)


@op("Pad", since=2)
def pad_of_attributes(c: Emitter, n: NodeView, x: Operand) -> Any:
    rank, pads = c.rank(x), n["pads"]
    if len(pads) != 2 * rank:
        raise n.fail(f"{len(pads)} amounts for a tensor of {rank} axes, which takes two for each")
    return padded(c, x, pads[:rank], pads[rank:], n["mode"], np.asarray(n["value"], c.dtype(x).np))


def padded(
    c: Emitter, x: Operand, low: Sequence[DimLike], high: Sequence[DimLike], mode: str = "constant",
    value: Operand | None = None,
) -> Any:  # fmt: skip
    """``x`` with elements put before and after each axis; negative amounts remove some."""
    shape = c.shape(x)
    for i, (lo, hi) in enumerate(zip(low, high)):
        first, last = (-d if isinstance(d, int) and d < 0 else 0 for d in (lo, hi))
        if first or last:
            x = c.cut(x, i, first, shape[i] - last)
    low, high = ([0 if isinstance(d, int) and d < 0 else d for d in ds] for ds in (low, high))
    if all(d == 0 for d in (*low, *high)):
        return x
    if mode == "constant":
        if value is not None and not isinstance(value, np.ndarray):  # a computed value: pad a mask beside
            inside = c.pad(c.full(c.shape(x), True, DType.BOOL), low=tuple(low), high=tuple(high))
            return c.select(inside, c.pad(x, low=tuple(low), high=tuple(high)), c.view(value))
        number = 0.0 if value is None else np.asarray(value).reshape(()).item()
        return c.pad(x, low=tuple(low), high=tuple(high), value=number)
    for i, (lo, hi) in enumerate(zip(low, high)):
        if lo != 0 or hi != 0:
            x = _reflected(c, x, i, lo, hi, mode)
    return x


def _reflected(c: Emitter, x: Operand, axis: int, low: DimLike, high: DimLike, mode: str) -> Any:
    size = c.shape(x)[axis]
    at = c.sub(c.iota(size=size + low + high), c.size_as(low, DType.I64))
    if mode == "edge":
        at = c.minimum(c.maximum(at, 0), c.size_as(size - 1, DType.I64))
    elif mode == "wrap":
        at = c.mod(at, c.size_as(size, DType.I64))
    else:
        period = c.size_as(maximum(2 * size - 2, 1), DType.I64)
        at = c.mod(at, period)
        at = c.minimum(at, c.sub(period, at)) if size != 1 else at
    return c.gather(x, at, axis=axis)


@op("DepthToSpace")
def depth_to_space(c: Emitter, n: NodeView, x: Operand) -> Any:
    (b, depth, h, w), k = c.shape(x), n["blocksize"]
    if n.get("mode", "DCR") == "DCR":
        x = c.permute(c.view(x, b, k, k, floordiv(depth, k * k), h, w), (0, 3, 4, 1, 5, 2))
    else:
        x = c.permute(c.view(x, b, floordiv(depth, k * k), k, k, h, w), (0, 1, 4, 2, 5, 3))
    return c.view(x, b, floordiv(depth, k * k), h * k, w * k)


@op("SpaceToDepth")
def space_to_depth(c: Emitter, n: NodeView, x: Operand) -> Any:
    (b, depth, h, w), k = c.shape(x), n["blocksize"]
    x = c.view(x, b, depth, floordiv(h, k), k, floordiv(w, k), k)
    if n.get("mode", "DCR") == "DCR":
        x = c.permute(x, (0, 3, 5, 1, 2, 4))
    else:
        x = c.permute(x, (0, 1, 3, 5, 2, 4))
    return c.view(x, b, depth * k * k, floordiv(h, k), floordiv(w, k))


@op("Trilu")
def trilu(c: Emitter, n: NodeView, x: Operand, k: Operand | None = None) -> Any:
    rows, columns = c.shape(x)[-2:]
    offset = c.sub(c.along(c.iota(size=columns), 1, 2), c.along(c.iota(size=rows), 0, 2))
    shift: Any = 0 if k is None else c.view(k)
    keep = c.greater_equal(offset, shift) if n["upper"] else c.less_equal(offset, shift)
    return c.select(keep, x, np.zeros((), c.dtype(x).np))


@op("EyeLike")
def eye_like(c: Emitter, n: NodeView, x: Operand) -> Any:
    rows, columns = c.shape(x)
    offset = c.sub(c.along(c.iota(size=columns), 1, 2), c.along(c.iota(size=rows), 0, 2))
    return c.to(c.equal(offset, n["k"]), n.dtype("dtype", c.dtype(x)))
