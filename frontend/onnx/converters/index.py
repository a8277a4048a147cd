"""Gathering and scattering at computed places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from wasat.ir import DimLike, DType

from ..emit import Emitter, Operand, size_of
from ..registry import NodeView, op


@op("Gather")
def gather(c: Emitter, n: NodeView, x: Operand, ids: Operand) -> Any:
    return c.gather(x, ids, axis=n["axis"])


@op("GatherElements")
def gather_elements(c: Emitter, n: NodeView, x: Operand, ids: Operand) -> Any:
    axis = c.axis(n["axis"], c.rank(x))
    for i, d in enumerate(c.shape(ids)):  # the indices may cover less of the other axes
        if i != axis:
            x = c.cut(x, i, 0, d)
    return c.take_along(x, ids, axis=axis)


def _places(c: Emitter, ids: Operand, sizes: Sequence[DimLike]) -> Any:
    """Row-major places of index tuples [.., k] in an array of these sizes; negative indices count from the end. Each is looked
    up by itself: outside of its own axis, it would be inside of all of them together."""
    total: Any = None
    for j, size in enumerate(sizes):
        at = c.drop_axes(c.cut(ids, c.rank(ids) - 1, j, j + 1), -1)
        at = c.gather(c.iota(size=size, dtype=c.dtype(ids)), at, axis=0)
        total = at if total is None else c.add(c.mul(total, c.size_as(size, c.dtype(ids))), at)
    return total


@op("GatherND")
def gather_nd(c: Emitter, n: NodeView, x: Operand, ids: Operand) -> Any:
    batch, shape = n.get("batch_dims", 0), c.shape(x)
    k = c.static(ids, -1, "GatherND")
    at = _places(c, ids, shape[batch : batch + k])
    size = size_of(shape[batch : batch + k])
    count = size_of(shape[:batch])
    if batch:
        rows = c.view(c.iota(size=count, dtype=c.dtype(ids)), *shape[:batch], *(1,) * (c.rank(at) - batch))
        at = c.add(at, c.mul(rows, c.size_as(size, c.dtype(ids))))
    return c.gather(c.view(x, count * size, *shape[batch + k :]), at, axis=0)


@op("ScatterND")
def scatter_nd(c: Emitter, n: NodeView, x: Operand, ids: Operand, updates: Operand) -> Any:
    k, shape = c.static(ids, -1, "ScatterND"), c.shape(x)
    at = _places(c, ids, shape[:k])
    flat = c.view(x, size_of(shape[:k]), *shape[k:])
    return c.view(c.scatter(flat, at, updates, axis=0, reduce=n.get("reduction", "none")), *shape)


@op("ScatterElements", "Scatter")
def scatter_elements(c: Emitter, n: NodeView, x: Operand, ids: Operand, updates: Operand) -> Any:
    return c.scatter_along(x, ids, updates, axis=n["axis"], reduce=n.get("reduction", "none"))


@op("OneHot", since=9)
def one_hot(c: Emitter, n: NodeView, ids: Operand, depth: Operand, values: Operand) -> Any:
    size = c.const(depth, "the depth of OneHot").astype(np.int64).item()
    ids = c.to(ids, DType.I64)
    ids = c.add(ids, c.select(c.less(ids, 0), size, 0))
    rank = c.rank(ids) + 1
    axis = c.axis(n["axis"], rank)
    hit = c.equal(c.add_axes(ids, axis), c.along(c.iota(size=size), axis, rank))
    off, on = (c.view(c.cut(values, 0, i, i + 1)) for i in (0, 1))
    return c.select(hit, on, off)


@op("Compress")
def compress(c: Emitter, n: NodeView, x: Operand, condition: Operand) -> Any:
    at = np.flatnonzero(c.const(condition, "the condition of Compress"))
    if n.get("axis") is None:
        return c.gather(c.view(x, size_of(c.shape(x))), at, axis=0)
    return c.gather(x, at, axis=n["axis"])


@op("NonZero")
def non_zero(c: Emitter, n: NodeView, x: Operand) -> Any:
    return np.stack(np.nonzero(np.atleast_1d(c.const(x, "how many elements NonZero finds")))).astype(np.int64)


@op("ReverseSequence")
def reverse_sequence(c: Emitter, n: NodeView, x: Operand, lengths: Operand) -> Any:
    time, batch, rank = n["time_axis"], n["batch_axis"], c.rank(x)
    if time == batch:
        raise n.fail(f"time_axis and batch_axis are both {time}")
    t = c.along(c.iota(size=c.shape(x)[time]), time, rank)
    length = c.along(c.to(lengths, DType.I64), batch, rank)
    at = c.select(c.less(t, length), c.sub(c.sub(length, t), 1), t)
    return c.take_along(x, at, axis=time)


@op("TensorScatter")
def tensor_scatter(c: Emitter, n: NodeView, cache: Operand, update: Operand, start: Operand | None = None) -> Any:
    """The update's positions, counted from each row's start along the axis, take the place of the cache's."""
    rank = c.rank(cache)
    axis = c.axis(n["axis"], rank)
    size, batch = c.shape(cache)[axis], c.shape(cache)[0]
    begin = c.full((batch,), 0, DType.I64) if start is None else c.to(start, DType.I64)
    at = c.add(c.along(begin, 0, rank), c.along(c.iota(size=c.shape(update)[axis]), axis, rank))
    if n["mode"] == "circular":
        at = c.mod(at, c.size_as(size, DType.I64))
    else:  # nothing counts from the end here
        at = c.select(c.less(at, 0), c.size_as(size, DType.I64), at)
    return c.scatter_along(cache, c.expand(at, *c.shape(update)), update, axis=axis)
