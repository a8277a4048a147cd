"""Indices that come with the data: what is outside an axis is an error before anything is read or written there.

Of an entry's own inputs the caller sees to that, once and before the call (:func:`given`); of whatever else, a kernel that
reads the indices on their way. Code that runs on a device, which can raise nothing, clamps.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.script import tirx as T
from wasat.ir import Attrs, Builder, DimLike, DType, Graph, IRError, Node, Op, TensorType, Type, Value, less_equal

from ..layouts import tvm_dtype
from ..lower import Context, Lowering

OUTSIDE = "wasat.outside"
"""What compiled code calls, with the place in the graph, the index, the least one and one more than the largest."""
_VIEWS = ("reshape", "broadcast_to", "transpose", "cast", "slice", "stop_gradient")


@dataclass(frozen=True)
class Given:
    """An input whose elements must be in ``low .. high - 1``, and the node that reads it as indices."""

    input: str
    low: DimLike
    high: DimLike
    where: str


def given(graph: Graph) -> list[Given]:
    """What the caller of an entry has to check."""
    found: dict[tuple[Value, DimLike, DimLike], Given] = {}
    for node, i, low, high in _indices(graph):
        v = node.inputs[i]
        if v in graph.inputs:
            found.setdefault((v, low, high), Given(v.name, low, high, place(node)))
    return list(found.values())


def place(node: Node) -> str:
    """A node and the line that wrote it, in a message."""
    return f"{node!r}" + (f" at {node.loc}" if node.loc else "")


def outside(where: str, index: int, low: int, high: int) -> None:
    """Raises IndexError: the function that :data:`OUTSIDE` names."""
    raise IndexError(f"{where}: index {index} is outside {low} .. {high - 1}")


def guard(graph: Graph, checked: Collection[Given], on_host: bool) -> None:
    """Puts a check, or a clamp, before every operand that is an index: but for inputs that the caller has ``checked``, and
    where it is plain that all are inside."""
    made: dict[tuple[Value, DimLike, DimLike], Value] = {}
    known = {(c.input, c.low, c.high) for c in checked}
    for node, i, low, high in list(_indices(graph)):
        v = node.inputs[i]
        if (v in graph.inputs and (v.name, low, high) in known) or _inside(v, low, high):
            continue
        if (v, low, high) not in made:
            if on_host:
                op = CheckIndices(low, high, place(node))
                made[v, low, high] = graph.add_node(op, [v], Attrs(), before=node, loc=node.loc, names=[v.name]).output
            else:
                made[v, low, high] = _clamped(Builder(graph, before=node, loc=node.loc), v, low, high)
        inputs = list(node.inputs)
        inputs[i] = made[v, low, high]
        graph.set_inputs(node, inputs)


def _indices(graph: Graph) -> Iterator[tuple[Node, int, DimLike, DimLike]]:
    for node in graph.nodes:
        for i, (low, high) in node.op.bounds(node.attrs, *(v.type for v in node.inputs)).items():
            yield node, i, low, high


def _inside(v: Value, low: DimLike, high: DimLike) -> bool:
    """Whether all elements of ``v`` are plainly in ``low .. high - 1``."""
    node = v.node
    while node is not None and node.op.name in _VIEWS and v.tensor.dtype.is_int:
        x = node.inputs[0]
        if x.tensor.dtype.is_int and not _holds(v.tensor.dtype, x.tensor.dtype):
            return False  # it wraps: -1 as u8 is 255
        v, node = x, x.node
    if node is None or not v.tensor.dtype.is_int:
        return False
    if isinstance(node.op, CheckIndices):
        return less_equal(node.op.high, high) is True and less_equal(low, 0) is True
    attrs: Any = node.attrs
    ends: tuple[DimLike, DimLike] | None = None
    if v.const is not None and v.const.size:
        ends = int(v.const.min()), int(v.const.max()) + 1
    elif node.op.name == "iota" and (attrs.dtype.bits >= 32 or less_equal(attrs.size - 1, attrs.dtype.range[1]) is True):
        ends = 0, attrs.size
    elif node.op.name in ("top_k", "arg_max", "arg_min"):
        ends = 0, node.inputs[0].shape[attrs.axis]
    return ends is not None and less_equal(low, ends[0]) is True and less_equal(ends[1], high) is True


def _holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of one integer type is one of another."""
    (low, high), (least, largest) = wide.range, narrow.range
    return low <= least and largest <= high


def _clamped(b: Builder, v: Value, low: DimLike, high: DimLike) -> Value:
    ids = b.cast(v, dtype=DType.I64) if v.tensor.dtype is not DType.I64 else v
    if low != 0:
        ids = b.select(b.less(ids, 0), b.add(ids, b.dim_size(size=high)), ids)
    return b.maximum(b.minimum(ids, b.dim_size(size=high - 1)), 0)


class CheckIndices(Op):
    """Indices of any integer type -> the same counted from the front, i64. Outside is an error: see :func:`outside`."""

    name = "kernel.check_indices"
    kind = "elementwise"

    def __init__(self, low: DimLike, high: DimLike, where: str) -> None:
        self.low, self.high, self.where = low, high, where
        self.lowering = Lowering(self.lower)

    def infer(self, attrs: Attrs, ids: Type) -> Type:
        if not isinstance(ids, TensorType):
            raise IRError(f"indices are integers, not {ids}")
        return ids.with_dtype(DType.I64)

    def lower(self, ctx: Context, node: Node, ids: Any) -> Any:
        v = node.inputs[0].tensor
        flat = ctx.view(ids, v.shape, (v.size,))
        dtype = tvm_dtype(v.dtype)
        gv = ctx.kernel(("check_indices", dtype, self.where), lambda: _check_kernel(dtype, self.where), "check_indices")
        ends = [relax.prim_value(ctx.dim(d)) for d in (self.low, self.high)]
        out = ctx.call(gv, [flat, *ends], relax.TensorType(ctx.dims((v.size,)), "int64"))
        return ctx.view(out, (v.size,), v.shape)


def _check_kernel(dtype: str, where: str) -> tirx.PrimFunc:
    """PrimFunc(ids [n], low, high, out i64[n])."""
    check = _check_anywhere(dtype)
    return check.specialize({check.params[-1]: tvm.ir.StringImm(where)})


@functools.cache
def _check_anywhere(dtype: str) -> tirx.PrimFunc:
    """PrimFunc(ids [n], low, high, out i64[n], where): reading the script takes longer than the rest of making a kernel."""
    unsigned = dtype == "uint64"  # whose upper half i64 does not hold

    @T.prim_func(s_tir=True, private=True)
    def check(ids_ptr: T.handle, low: T.int64, high: T.int64, out_ptr: T.handle, where: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        ids = T.match_buffer(ids_ptr, (n,), dtype)
        out = T.match_buffer(out_ptr, (n,), "int64")
        for i in T.serial(n):
            with T.sblock("check"):
                at = T.axis.spatial(n, i)
                T.reads(ids[at])
                T.writes(out[at])
                index = T.meta_var(T.reinterpret("int64", ids[at]) if unsigned else T.cast(ids[at], "int64"))
                if unsigned and index < T.int64(0):
                    T.evaluate(T.call_packed(OUTSIDE, where, index, low, high))
                if index < low or index >= high:
                    T.evaluate(T.call_packed(OUTSIDE, where, index, low, high))
                out[at] = T.Select(index < T.int64(0), index + high, index)

    return check


__all__ = ["OUTSIDE", "CheckIndices", "Given", "given", "guard", "outside", "place"]
