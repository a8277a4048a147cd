"""Reductions, arg-reductions, running sums, norms over axes."""

from __future__ import annotations

from typing import Any

import numpy as np
from wasat.ir import DType, less_equal

from ..emit import Emitter, Operand, size_of
from ..registry import NodeView, op

_SIMPLE = {"ReduceSum": "reduce_sum", "ReduceProd": "reduce_prod", "ReduceMax": "reduce_max", "ReduceMin": "reduce_min"}


@op(
    *_SIMPLE, "ReduceMean", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare",
)  # fmt: skip
def reduce(c: Emitter, n: NodeView, x: Operand, axes: Operand | None = None) -> Any:
    chosen = n.get("axes") if axes is None else [int(a) for a in c.numbers(axes, "the axes of a reduction")]
    if not chosen:
        if n.get("noop_with_empty_axes"):
            return _whole(c, n.op, x)
        chosen = range(c.rank(x))
    how: dict[str, Any] = {"axes": tuple(chosen), "keepdims": bool(n["keepdims"])}
    dtype = c.dtype(x)
    match n.op:
        case "ReduceMax" | "ReduceMin" if dtype is DType.BOOL:
            return c.reduce_any(x, **how) if n.op == "ReduceMax" else c.reduce_all(x, **how)
        case "ReduceMean" if dtype.is_float:
            return c.reduce_mean(x, **how)
        case "ReduceMean":
            count = size_of(c.shape(x)[a] for a in chosen)
            return c.div(c.reduce_sum(x, **how), c.size_as(count, dtype))
        case "ReduceLogSumExp":
            return c.logsumexp(x, **how)
        case "ReduceLogSum":
            return c.log(c.reduce_sum(x, **how))
        case "ReduceL2" if not dtype.is_float:
            total = c.reduce_sum(c.mul(x, x), **how)
            return c.to(c.sqrt(c.to(total, DType.F64)), dtype)
        case "ReduceL2":
            return c.sqrt(c.reduce_sum(c.mul(x, x), **how))
        case "ReduceL1":
            return c.reduce_sum(c.abs(x), **how)
        case "ReduceSumSquare":
            return c.reduce_sum(c.mul(x, x), **how)
    return getattr(c, _SIMPLE[n.op])(x, **how)


def _whole(c: Emitter, name: str, x: Operand) -> Any:
    """A reduction over no axes: what it does to each element."""
    match name:
        case "ReduceL1" | "ReduceL2":
            return c.abs(x)
        case "ReduceSumSquare":
            return c.mul(x, x)
        case "ReduceLogSum":
            return c.log(x)
    return x


@op("ArgMax", "ArgMin")
def arg_extreme(c: Emitter, n: NodeView, x: Operand) -> Any:
    axis, emit = n["axis"], c.arg_max if n.op == "ArgMax" else c.arg_min
    if not n.get("select_last_index"):
        return emit(x, axis=axis, keepdims=bool(n["keepdims"]))
    at = emit(c.reverse(x, axes=(axis,)), axis=axis, keepdims=bool(n["keepdims"]))
    return c.sub(c.size_as(c.shape(x)[axis] - 1, DType.I64), at)


@op("CumSum")
def cumsum(c: Emitter, n: NodeView, x: Operand, axis: Operand) -> Any:
    at = int(c.const(axis, "the axis of a running sum").reshape(()))
    return c.cumsum(x, axis=at, exclusive=bool(n["exclusive"]), reverse=bool(n["reverse"]))


@op("CumProd")
def cumprod(c: Emitter, n: NodeView, x: Operand, axis: Operand) -> Any:
    """Row i of a [n, n] table holds the factors of element i, 1 elsewhere."""
    rank = c.rank(x)
    at = c.axis(int(c.const(axis, "the axis of a running product").reshape(())), rank)
    size = c.shape(x)[at]
    row, column = c.along(c.iota(size=size), 0, 2), c.along(c.iota(size=size), 1, 2)
    if n["reverse"]:
        row, column = column, row
    keep = c.less(column, row) if n["exclusive"] else c.less_equal(column, row)
    keep = c.view(keep, *(1,) * at, size, size, *(1,) * (rank - at - 1))
    one = 1.0 if c.dtype(x).is_float else 1
    return c.reduce_prod(c.select(keep, c.add_axes(x, at), one), axes=(at + 1,))


@op("LpNormalization")
def lp_normalization(c: Emitter, n: NodeView, x: Operand) -> Any:
    how: dict[str, Any] = {"axes": (n["axis"],), "keepdims": True}
    norm = c.reduce_sum(c.abs(x), **how) if n["p"] == 1 else c.sqrt(c.reduce_sum(c.mul(x, x), **how))
    return c.div(x, c.select(c.equal(norm, 0.0), 1.0, norm))


@op("Hardmax", since=13)
def hardmax(c: Emitter, n: NodeView, x: Operand) -> Any:
    rank = c.rank(x)
    axis = c.axis(n["axis"], rank)
    if 0 in c.shape(x):
        return x
    if not isinstance(c.shape(x)[axis], int):  # of none there is no largest: one more, the least, that only they would find
        sides = [(0, int(a == axis)) for a in range(rank)]
        low, high = zip(*sides)
        at = c.arg_max(c.pad(x, low=low, high=high, value=float("-inf")), axis=axis, keepdims=True)
    else:
        at = c.arg_max(x, axis=axis, keepdims=True)
    return c.to(c.equal(at, c.along(c.iota(size=c.shape(x)[axis]), axis, rank)), c.dtype(x))


@op("Softmax", "LogSoftmax", since=13)
def softmax(c: Emitter, n: NodeView, x: Operand) -> Any:
    return (c.softmax if n.op == "Softmax" else c.log_softmax)(x, axis=n["axis"])


@op("Softmax", "LogSoftmax", "Hardmax", since=1)
def over_the_rest(c: Emitter, n: NodeView, x: Operand) -> Any:
    """Before operator set 13: over all axes from ``axis`` on at once."""
    shape, rank = c.shape(x), c.rank(x)
    axis = n["axis"]
    if not -rank <= axis <= rank:
        raise n.fail(f"axis {axis} is none of a tensor with {rank}")
    axis %= max(rank, 1) if axis < 0 else rank + 1
    flat = c.view(x, size_of(shape[:axis]), size_of(shape[axis:]))
    last = NodeView(n.proto, {**n.attrs, "axis": 1}, n.frame, n.importer)
    return c.view((hardmax if n.op == "Hardmax" else softmax)(c, last, flat), *shape)


@op("TopK", since=10)
def top_k(c: Emitter, n: NodeView, x: Operand, k: Operand) -> Any:
    (count,) = c.dims(k, "how many elements TopK takes")
    if less_equal(count, c.shape(x)[n["axis"]]) is False:
        raise n.fail(f"takes {count} of {c.shape(x)[n['axis']]} elements")
    return c.top_k(x, k=count, axis=n["axis"], largest=bool(n.get("largest", 1)))


@op("TopK", since=1)
def top_k_of_attribute(c: Emitter, n: NodeView, x: Operand) -> Any:
    return top_k(c, n, x, np.asarray([n["k"]], np.int64))
