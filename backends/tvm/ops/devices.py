"""Lowerings for devices of launch plans, where the common ones ask for what these lack: recursion, the C library."""

from __future__ import annotations

import functools
from typing import Any

from tvm import relax
from tvm.script import tirx as T
from wasat.ir import Node

from ..layouts import tvm_dtype
from ..lower import Context, Lowering, Table, lowering_into
from .ordering import sorted_by, top_by
from .primitives import PRIMITIVES
from .scan import COUNTED

R = relax.op
_COMMON: dict[str, Lowering] = {**PRIMITIVES, "scan": COUNTED}
lowers = lowering_into(_COMMON)


@lowers("cumsum")
def _cumsum(ctx: Context, node: Node, x: Any) -> Any:
    """A row is a thread's: sums are made in the reference's order."""
    a: Any = node.attrs
    t = node.inputs[0].tensor
    dtype = tvm_dtype(node.output.tensor.dtype)
    shape = t.shape
    lead, tail = _size(shape[: a.axis]), _size(shape[a.axis + 1 :])
    flat = (lead, shape[a.axis], tail)
    x = ctx.view(ctx.emit(R.astype(x, dtype)) if tvm_dtype(t.dtype) != dtype else x, shape, flat)
    key = ("cumsum", dtype, a.reverse, a.exclusive)
    gv = ctx.kernel(key, lambda: _cumsum_kernel(dtype, a.reverse, a.exclusive), "cumsum")
    return ctx.view(ctx.call(gv, [x], relax.TensorType(ctx.dims(flat), dtype)), flat, shape)


def _size(dims: Any) -> Any:
    total: Any = 1
    for d in dims:
        total = total * d
    return total


@functools.cache
def _cumsum_kernel(dtype: str, reverse: bool, exclusive: bool) -> Any:
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype

    @T.prim_func(s_tir=True, private=True)
    def cumsum(x_ptr: T.handle, out_ptr: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        a, n, c = T.int64(), T.int64(), T.int64()
        x = T.match_buffer(x_ptr, (a, n, c), dtype)
        out = T.match_buffer(out_ptr, (a, n, c), dtype)
        for i in T.serial(a * c):
            with T.sblock("cumsum"):
                row = T.axis.spatial(a * c, i)
                vi = T.meta_var(T.floordiv(row, c))
                vk = T.meta_var(T.floormod(row, c))
                T.reads(x[vi, 0:n, vk])
                T.writes(out[vi, 0:n, vk])
                total = T.alloc_buffer((1,), wide, scope="local")
                total[0] = T.cast(0, wide)
                for j in T.serial(n):
                    at = T.meta_var(n - 1 - j if reverse else j)
                    if exclusive:
                        out[vi, at, vk] = T.cast(total[0], dtype)
                    total[0] = total[0] + T.cast(x[vi, at, vk], wide)
                    if not exclusive:
                        out[vi, at, vk] = T.cast(total[0], dtype)

    return cumsum


_COMMON["sort"] = Lowering(sorted_by(levels=30))
_COMMON["top_k"] = Lowering(top_by(levels=30))

DEVICES: Table = _COMMON
"""Operation to lowering."""
