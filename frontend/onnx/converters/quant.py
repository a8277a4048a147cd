"""Linear quantization: QuantizeLinear, DequantizeLinear, and integer products."""

from __future__ import annotations

from typing import Any

from wasat.ir import DType

from ..emit import Emitter, Operand
from ..registry import NodeView, op
from .conv import integer_conv
from .math import convert


def _spread(c: Emitter, n: NodeView, scale: Operand, x: Operand) -> Any:
    """A scale or zero point in the shape of x: one number, one per place of the axis, or one per block along it."""
    rank = c.rank(x)
    axis = n.get("axis", 1)
    block = n.get("block_size", 0)
    if c.rank(scale) == 0 or (c.rank(scale) == 1 and c.shape(scale)[0] == 1 and not block):
        return c.view(scale)
    if c.rank(scale) == 1 and not block:
        return c.along(scale, c.axis(axis, rank), rank)
    axis = c.axis(axis, rank)
    shape = c.shape(scale)
    wide = c.expand(c.add_axes(scale, axis + 1), *shape[: axis + 1], block, *shape[axis + 1 :])
    wide = c.view(wide, *shape[:axis], shape[axis] * block, *shape[axis + 1 :])
    return c.cut(wide, axis, 0, c.shape(x)[axis])


def _rounded(c: Emitter, y: Operand, zero: Operand | None, to: DType) -> Any:
    """Rounded to even, shifted and clipped into the range of an integer type."""
    y = c.round(y)
    if zero is not None:
        y = c.add(y, c.to(zero, c.dtype(y)))
    return c.cast(y, dtype=to)


@op("QuantizeLinear", since=10)
def quantize(c: Emitter, n: NodeView, x: Operand, scale: Operand, zero: Operand | None = None) -> Any:
    to = DType.U8
    if zero is not None:
        to = c.dtype(zero)
    elif n.get("output_dtype"):
        to = n.dtype("output_dtype")
    work = n.dtype("precision") if n.get("precision") else c.dtype(scale)
    if n.get("precision") and not work.is_float:
        raise n.fail(f"divides among {work}; its precision is a type of floats")
    if work is DType.F8E8M0:
        work = DType.F32
    if work.is_int:  # a scale of integers: the quotient is rounded, not cut
        work = DType.F64
    factor = c.to(_spread(c, n, scale, x), work)
    y = c.div(c.to(x, work), factor)
    if to.is_int:
        return _rounded(c, c.to(y, DType.F32), None if zero is None else _spread(c, n, zero, x), to)
    if zero is not None:
        y = c.add(y, c.to(_spread(c, n, zero, x), work))
    return convert(c, y, to, bool(n.get("saturate", 1)))


@op("DequantizeLinear", since=10)
def dequantize(c: Emitter, n: NodeView, x: Operand, scale: Operand, zero: Operand | None = None) -> Any:
    out = n.dtype("output_dtype") if n.get("output_dtype") else c.dtype(scale)
    if not out.is_float:
        raise n.fail(f"gives {out}; its output is a type of floats")
    factor = _spread(c, n, scale, x)
    work = DType.F32 if c.dtype(x).is_float or c.dtype(x).bits <= 16 else c.dtype(scale)
    wide = x
    if zero is not None and c.dtype(x).is_int:
        wide = c.sub(c.to(x, DType.I32), c.to(_spread(c, n, zero, x), DType.I32))
    return c.to(c.mul(c.to(wide, work), c.to(factor, work)), out)


@op("DynamicQuantizeLinear")
def dynamic_quantize(c: Emitter, n: NodeView, x: Operand) -> tuple[Any, Any, Any]:
    every = tuple(range(c.rank(x)))
    low = c.minimum(c.reduce_min(x, axes=every), 0.0)
    high = c.maximum(c.reduce_max(x, axes=every), 0.0)
    scale = c.div(c.sub(high, low), 255.0)
    scale = c.select(c.equal(scale, 0.0), 1.0, scale)  # of zeros alone
    zero = c.cast(c.round(c.minimum(c.maximum(c.div(c.neg(low), scale), 0.0), 255.0)), dtype=DType.U8)
    return _rounded(c, c.div(x, scale), zero, DType.U8), scale, zero


def _centered(c: Emitter, x: Operand, zero: Operand | None, axis: int) -> Any:
    """Integers less their zero point, as i32; a vector of zero points runs along ``axis``."""
    wide = c.cast(x, dtype=DType.I32)
    if zero is None:
        return wide
    z = c.cast(zero, dtype=DType.I32)
    if c.rank(z) == 1:
        z = c.view(z) if c.shape(z)[0] == 1 else c.along(z, c.axis(axis, c.rank(x)), c.rank(x))
    return c.sub(wide, z)


@op("MatMulInteger")
def matmul_integer(
    c: Emitter, n: NodeView, x: Operand, y: Operand, x_zero: Operand | None = None, y_zero: Operand | None = None
) -> Any:
    return c.matmul(_centered(c, x, x_zero, -2), _centered(c, y, y_zero, -1))


@op("ConvInteger")
def conv_integer(
    c: Emitter, n: NodeView, x: Operand, w: Operand, x_zero: Operand | None = None, w_zero: Operand | None = None
) -> Any:
    return integer_conv(c, n, _centered(c, x, x_zero, 1), _centered(c, w, w_zero, 0))


@op("QLinearMatMul", since=10)
def qlinear_matmul(
    c: Emitter, n: NodeView, x: Operand, x_scale: Operand, x_zero: Operand, y: Operand, y_scale: Operand, y_zero: Operand,
    scale: Operand, zero: Operand,
) -> Any:  # fmt: skip
    total = c.matmul(_centered(c, x, x_zero, -2), _centered(c, y, y_zero, -1))
    of_x, of_y = c.to(_scalar(c, x_scale, -2), DType.F32), c.to(_scalar(c, y_scale, -1), DType.F32)
    factor = c.div(c.mul(of_x, of_y), c.to(c.view(scale), DType.F32))
    return _rounded(c, c.mul(c.to(total, DType.F32), factor), c.view(zero), c.dtype(zero))


def _scalar(c: Emitter, scale: Operand, axis: int) -> Any:
    if c.rank(scale) == 1 and c.shape(scale)[0] == 1:
        return c.view(scale)
    return c.along(scale, 2 + axis, 2) if c.rank(scale) == 1 else scale


@op("QLinearConv", since=10)
def qlinear_conv(
    c: Emitter, n: NodeView, x: Operand, x_scale: Operand, x_zero: Operand, w: Operand, w_scale: Operand, w_zero: Operand,
    scale: Operand, zero: Operand, bias: Operand | None = None,
) -> Any:  # fmt: skip
    total = integer_conv(c, n, _centered(c, x, x_zero, 1), _centered(c, w, w_zero, 0))
    if bias is not None:
        total = c.add(total, c.along(bias, 1, c.rank(total)))
    of_w = c.view(w_scale) if c.rank(w_scale) == 0 or c.shape(w_scale)[0] == 1 else c.along(w_scale, 1, c.rank(total))
    factor = c.div(c.mul(c.view(x_scale), of_w), c.view(scale))
    return _rounded(c, c.mul(c.to(total, DType.F32), factor), c.view(zero), c.dtype(zero))


