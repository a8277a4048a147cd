"""Emissions of elementwise operations, shapes, indices, reductions and products."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from wasat.ir import Dim, DimLike, DType, Node, TensorType, less_equal
from wasat.ir.dims import maximum
from wasat.ir.ops.random import PARITY, ROTATIONS

from .emitter import CODE, Emitter
from .registry import emits

# -- one operator each ------------------------------------------------------------------------------------------------------
SAME = {
    "abs": "Abs", "neg": "Neg", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "round": "Round", "sqrt": "Sqrt",
    "exp": "Exp", "log": "Log", "sin": "Sin", "cos": "Cos", "tan": "Tan", "asin": "Asin", "acos": "Acos", "atan": "Atan",
    "sinh": "Sinh", "cosh": "Cosh", "tanh": "Tanh", "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh", "erf": "Erf",
    "isnan": "IsNaN", "isinf": "IsInf", "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow",
    "maximum": "Max", "minimum": "Min", "equal": "Equal", "less": "Less", "less_equal": "LessOrEqual", "greater": "Greater",
    "greater_equal": "GreaterOrEqual", "logical_and": "And", "logical_or": "Or", "logical_xor": "Xor", "logical_not": "Not",
    "bit_and": "BitwiseAnd", "bit_or": "BitwiseOr", "bit_xor": "BitwiseXor", "bit_not": "BitwiseNot", "select": "Where",
    "matmul": "MatMul", "relu": "Relu", "sigmoid": "Sigmoid", "softplus": "Softplus",
}  # fmt: skip
"""Operations that are an ONNX operator as they are."""


def _same(kind: str) -> Any:
    return lambda e, node, *inputs: e.op(kind, *inputs)


for _name, _kind in SAME.items():
    emits(_name)(_same(_kind))
emits("silu", since=24)(_same("Swish"))


@emits("gelu", since=20)
def _gelu(e: Emitter, node: Node, x: str) -> str:
    return e.op("Gelu", x, approximate=_attrs(node).approximate)


@emits("softmax")
def _softmax(e: Emitter, node: Node, x: str) -> str:
    return e.op("Softmax", x, axis=_attrs(node).axis)


@emits("log_softmax")
def _log_softmax(e: Emitter, node: Node, x: str) -> str:
    return e.op("LogSoftmax", x, axis=_attrs(node).axis)


def _attrs(node: Node) -> Any:
    return node.attrs


# -- arithmetic -------------------------------------------------------------------------------------------------------------
@emits("expm1")
def _expm1(e: Emitter, node: Node, x: str) -> str:
    """Near 0, exp(x) - 1 = 2 exp(x/2) sinh(x/2), which cancels nothing."""
    half = e.op("Mul", x, e.like(0.5, x))
    near = e.op("Mul", e.op("Mul", e.op("Exp", half), e.op("Sinh", half)), e.like(2, x))
    return e.op("Where", _below(e, x, 1), near, e.op("Sub", e.op("Exp", x), e.like(1, x)))


@emits("log1p")
def _log1p(e: Emitter, node: Node, x: str) -> str:
    """Near 0, log(1 + x) = 2 atanh(x / (2 + x))."""
    near = e.op("Mul", e.op("Atanh", e.op("Div", x, e.op("Add", x, e.like(2, x)))), e.like(2, x))
    return e.op("Where", _below(e, x, 0.5), near, e.op("Log", e.op("Add", x, e.like(1, x))))


def _below(e: Emitter, x: str, bound: float) -> str:
    return str(e.op("Less", e.op("Abs", x), e.like(bound, x)))


@emits("rsqrt")
def _rsqrt(e: Emitter, node: Node, x: str) -> str:
    return e.op("Reciprocal", e.op("Sqrt", x))


@emits("atan2")
def _atan2(e: Emitter, node: Node, y: str, x: str) -> str:
    zero, pi = e.like(0, x), e.like(math.pi, x)
    both = e.op("And", _infinite(e, y), _infinite(e, x))  # their quotient is no number; their signs say all
    y, x = e.op("Where", both, e.op("Sign", y), y), e.op("Where", both, e.op("Sign", x), x)
    turn = e.op("Where", e.op("Less", y, zero), e.op("Neg", pi), pi)  # to add on the left half plane
    slope = e.op("Atan", e.op("Div", y, x))
    side = e.op("Where", e.op("Less", x, zero), e.op("Add", slope, turn), slope)
    up = e.op("Mul", e.op("Sign", y), e.like(math.pi / 2, x))
    return e.op("Where", e.op("Equal", x, zero), up, side)


@emits("floor_div")
def _floor_div(e: Emitter, node: Node, x: str, y: str) -> str:
    zero = e.like(0, x)
    opposite = e.op("Xor", e.op("Less", x, zero), e.op("Less", y, zero))
    if not e.dtype[x].is_float:  # Div rounds to zero
        down = e.op("And", opposite, e.op("Not", e.op("Equal", e.op("Mod", x, y), zero)))
        toward = e.op("Div", x, y)
        return e.op("Where", down, e.op("Sub", toward, e.like(1, x)), toward)
    # as in NumPy: -1 where a quotient below 0 is rounded to 0; NaN for the infinite, unless they are divided by 0
    found = e.op("Floor", e.op("Div", x, y))
    down = e.op("And", e.op("And", opposite, e.op("Equal", found, zero)), e.op("Not", e.op("Equal", x, zero)))
    found = e.op("Where", down, e.like(-1, x), found)
    return e.op("Where", e.op("And", _infinite(e, x), e.op("Not", e.op("Equal", y, zero))), e.like(math.nan, x), found)


def _infinite(e: Emitter, x: str) -> str:
    return str(e.op("Equal", e.op("Abs", x), e.like(math.inf, x)))


@emits("mod")
def _mod(e: Emitter, node: Node, x: str, y: str) -> str:
    if not e.dtype[x].is_float:
        return e.op("Mod", x, y)
    rest, zero = e.op("Mod", x, y, fmod=1), e.like(0, x)  # of the sign of x
    other = e.op("Xor", e.op("Less", rest, zero), e.op("Less", y, zero))
    off = e.op("And", other, e.op("Not", e.op("Equal", rest, zero)))
    return e.op("Where", off, e.op("Add", rest, y), rest)


@emits("not_equal")
def _not_equal(e: Emitter, node: Node, x: str, y: str) -> str:
    return e.op("Not", e.op("Equal", x, y))


_UNSIGNED = {DType.I8: DType.U8, DType.I16: DType.U16, DType.I32: DType.U32, DType.I64: DType.U64}


@emits("shift_left")
def _shift_left(e: Emitter, node: Node, x: str, y: str) -> str:
    own = e.dtype[x]
    bits = _UNSIGNED.get(own, own)  # ONNX shifts unsigned integers
    return e.cast(_shifted(e, e.cast(x, bits), e.cast(y, bits), "LEFT"), own)


def _shifted(e: Emitter, x: str, by: str, direction: str) -> str:
    """Unsigned integers shifted; ONNX does not say what a shift by all bits or more gives: 0."""
    moved = e.op("BitShift", x, by, direction=direction)
    return str(e.op("Where", e.op("Less", by, e.like(e.dtype[x].bits, by)), moved, e.like(0, x)))


@emits("shift_right")
def _shift_right(e: Emitter, node: Node, x: str, y: str) -> str:
    own = e.dtype[x]
    if own not in _UNSIGNED:
        return _shifted(e, x, y, "RIGHT")
    bits, ones = _UNSIGNED[own], e.like(-1, x)  # a negative number is shifted as its complement
    negative = e.op("Less", x, e.like(0, x))
    magnitude = e.op("Where", negative, e.op("Sub", ones, x), x)
    moved = e.cast(_shifted(e, e.cast(magnitude, bits), e.cast(y, bits), "RIGHT"), own)
    return e.op("Where", negative, e.op("Sub", ones, moved), moved)


@emits("cast")
def _cast(e: Emitter, node: Node, x: str) -> str:
    """ONNX leaves open what a float outside the integers' range becomes; the IR saturates, and makes 0 of NaN."""
    own, to = e.dtype[x], _attrs(node).dtype
    if own.is_float and to.is_int:
        signed = to.value[0] == "i"
        bits = to.bits - signed
        low, high, end = -(2**bits) if signed else 0, 2**bits - 1, 2.0**bits
        x = e.cast(x, DType.F32) if own.bits < 32 else x
        x = e.op("Where", e.op("IsNaN", x), e.like(0, x), x)
        over, under = e.op("GreaterOrEqual", x, e.like(end, x)), e.op("Less", x, e.like(low, x))
        inside = e.op("Where", e.op("Or", over, under), e.like(0, x), x)
        y = e.op("Where", over, e.const(high, to), e.cast(inside, to))
        return e.op("Where", under, e.const(low, to), y)
    if to in (DType.F8E4M3, DType.F8E5M2, DType.F8E4M3FNUZ, DType.F8E5M2FNUZ):
        return e.cast(x, to, saturate=0)
    if to is DType.F8E8M0:
        return e.cast(x, to, saturate=0, round_mode="nearest")
    return e.cast(x, to)


@emits("stop_gradient")
def _stop_gradient(e: Emitter, node: Node, x: str) -> str:
    return x


@emits("bitcast", since=26)
def _bitcast(e: Emitter, node: Node, x: str) -> str:
    to = _attrs(node).dtype
    return e.op("BitCast", x, to=CODE[to], dtype=to)


# -- made from nothing ------------------------------------------------------------------------------------------------------
@emits("constant")
def _constant(e: Emitter, node: Node) -> str:
    literal = _attrs(node).value
    return e.const(literal.array, literal.dtype)


@emits("iota")
def _iota(e: Emitter, node: Node) -> str:
    zero, one = e.const(0, DType.I64), e.const(1, DType.I64)
    return e.cast(e.op("Range", zero, e.scalar(_attrs(node).size), one), _attrs(node).dtype)


@emits("dim_size")
def _dim_size(e: Emitter, node: Node) -> str:
    return e.cast(e.scalar(_attrs(node).size), _attrs(node).dtype)


# -- shapes -----------------------------------------------------------------------------------------------------------------
@emits("reshape")
def _reshape(e: Emitter, node: Node, x: str) -> str:
    return e.reshape(x, _attrs(node).shape)


@emits("transpose")
def _transpose(e: Emitter, node: Node, x: str) -> str:
    perm = _attrs(node).perm
    return e.op("Transpose", x, perm=perm) if perm else x


@emits("broadcast_to")
def _broadcast_to(e: Emitter, node: Node, x: str) -> str:
    return e.op("Expand", x, e.shape(_attrs(node).shape))


def _could_be_short(a: Any, axis: int, size: DimLike) -> bool:
    """Whether a part of known size is taken of an axis that may be shorter: ONNX's Slice would clamp, Gather refuses."""
    fixed = isinstance(a.starts[axis], int) and isinstance(a.stops[axis], int)
    return fixed and less_equal(a.stops[axis], size) is not True


@emits("slice")
def _slice(e: Emitter, node: Node, x: str) -> str:
    a = _attrs(node)
    sizes = node.inputs[0].shape
    cut = [i for i in range(len(sizes)) if (a.starts[i], a.stops[i], a.steps[i]) != (0, sizes[i], 1)]
    for i in [i for i in cut if _could_be_short(a, i, sizes[i])]:
        x = e.op("Gather", x, e.const(np.arange(a.starts[i], a.stops[i], a.steps[i])), axis=i)
        cut.remove(i)
    if not cut:
        return x
    starts, stops = e.shape([a.starts[i] for i in cut]), e.shape([a.stops[i] for i in cut])
    return e.op("Slice", x, starts, stops, e.shape(cut), e.shape([a.steps[i] for i in cut]))


@emits("concat", when=lambda node, options: isinstance(node.output.type, TensorType))
def _concat(e: Emitter, node: Node, *xs: str) -> str:
    return e.op("Concat", *xs, axis=_attrs(node).axis)


@emits("pad")
def _pad(e: Emitter, node: Node, x: str) -> str:
    a = _attrs(node)
    return e.op("Pad", x, e.shape([*a.low, *a.high]), e.like(a.value, x)) if a.low else x


@emits("reverse")
def _reverse(e: Emitter, node: Node, x: str) -> str:
    axes = _attrs(node).axes
    last, first = e.shape([-1] * len(axes)), e.shape([-(2**62)] * len(axes))
    return e.op("Slice", x, last, first, e.shape(axes), last) if axes else x


# -- indices ----------------------------------------------------------------------------------------------------------------
@emits("gather")
def _gather(e: Emitter, node: Node, x: str, ids: str) -> str:
    return e.op("Gather", x, ids, axis=_attrs(node).axis)


@emits("take_along")
def _take_along(e: Emitter, node: Node, x: str, ids: str) -> str:
    axis, v, at, out = _attrs(node).axis, node.inputs[0], node.inputs[1], node.output
    full = tuple(d if i == axis else n for i, (d, n) in enumerate(zip(v.shape, out.shape)))
    x = x if full == v.shape else e.op("Expand", x, e.shape(full))
    ids = ids if at.shape == out.shape else e.op("Expand", ids, e.shape(out.shape))
    return e.op("GatherElements", x, ids, axis=axis)


@emits("scatter_along")
def _scatter_along(e: Emitter, node: Node, x: str, ids: str, updates: str) -> str:
    a = _attrs(node)
    return e.op("ScatterElements", x, ids, updates, axis=a.axis, reduction=a.reduce)


@emits("scatter")
def _scatter(e: Emitter, node: Node, x: str, ids: str, updates: str) -> str:
    """ScatterND writes along leading axes: the axis goes there, and back."""
    a, (v, at, u) = _attrs(node), node.inputs
    rank, n, axis = len(v.shape), len(at.shape), a.axis
    if axis:
        x = e.op("Transpose", x, perm=[axis, *(i for i in range(rank) if i != axis)])
        moved = range(axis, axis + n)
        updates = e.op("Transpose", updates, perm=[*moved, *(i for i in range(len(u.shape)) if i not in moved)])
    places = e.reshape(e.cast(ids, DType.I64), (*at.shape, 1))
    y = e.op("ScatterND", x, places, updates, reduction=a.reduce)
    return e.op("Transpose", y, perm=[*range(1, axis + 1), 0, *range(axis + 1, rank)]) if axis else y


@emits("sort")
def _sort(e: Emitter, node: Node, x: str) -> str:
    a = _attrs(node)
    size = e.dim(node.inputs[0].shape[a.axis])
    return e.op("TopK", x, size, outputs=2, axis=a.axis, largest=int(a.descending))[0]


@emits("top_k")
def _top_k(e: Emitter, node: Node, x: str) -> tuple[str, ...]:
    a = _attrs(node)
    return tuple(e.op("TopK", x, e.dim(a.k), outputs=2, axis=a.axis, largest=int(a.largest)))


# -- reductions -------------------------------------------------------------------------------------------------------------
def reduced(e: Emitter, kind: str, x: str, axes: tuple[int, ...], keepdims: bool) -> str:
    """Axes are an input from operator set 18 on, for sums from 13; no axes means all of them to ONNX, none to the IR."""
    if not axes:
        return x
    if e.opset < 18 and kind != "ReduceSum":
        return str(e.op(kind, x, axes=axes, keepdims=int(keepdims)))
    return str(e.op(kind, x, e.shape(axes), keepdims=int(keepdims)))


def _reduction(kind: str) -> Any:
    return lambda e, node, x: reduced(e, kind, x, node.attrs.axes, node.attrs.keepdims)


for _name in ("sum", "prod", "max", "min", "mean"):
    emits(f"reduce_{_name}")(_reduction(f"Reduce{_name.capitalize()}"))


@emits("reduce_any")
def _any(e: Emitter, node: Node, x: str) -> str:
    a = _attrs(node)
    return e.cast(reduced(e, "ReduceSum", e.cast(x, DType.I64), a.axes, a.keepdims), DType.BOOL)


@emits("reduce_all")
def _all(e: Emitter, node: Node, x: str) -> str:
    a = _attrs(node)
    wrong = reduced(e, "ReduceSum", e.cast(e.op("Not", x), DType.I64), a.axes, a.keepdims)
    return e.op("Not", e.cast(wrong, DType.BOOL))


@emits("arg_max")
def _arg_max(e: Emitter, node: Node, x: str) -> str:
    return e.op("ArgMax", x, axis=_attrs(node).axis, keepdims=int(_attrs(node).keepdims))


@emits("arg_min")
def _arg_min(e: Emitter, node: Node, x: str) -> str:
    return e.op("ArgMin", x, axis=_attrs(node).axis, keepdims=int(_attrs(node).keepdims))


@emits("cumsum")
def _cumsum(e: Emitter, node: Node, x: str) -> str:
    a = _attrs(node)
    return e.op("CumSum", x, e.const(a.axis, DType.I64), exclusive=int(a.exclusive), reverse=int(a.reverse))


# -- products ---------------------------------------------------------------------------------------------------------------
@emits("linear")
def _linear(e: Emitter, node: Node, x: str, w: str, bias: str = "") -> str:
    y = e.op("MatMul", x, e.op("Transpose", e.cast(w, e.dtype[x]), perm=[1, 0]))
    return e.op("Add", y, bias) if bias else y


@emits("conv")
def _conv(e: Emitter, node: Node, x: str, w: str) -> str:
    a, v = _attrs(node), node.inputs[0]
    sizes: list[DimLike] = list(v.shape)
    for i, step in enumerate(a.input_dilation):
        if step > 1:  # zeros between neighbours: each element becomes a row of `step`, the last row ends after its first
            axis = 2 + i
            spread = e.reshape(x, (*sizes[: axis + 1], 1, *sizes[axis + 1 :]))
            pads = [0] * (2 * len(sizes) + 2)
            pads[len(sizes) + 1 + axis + 1] = step - 1
            spread = e.op("Pad", spread, e.shape(pads), e.like(0, x))
            sizes[axis] = sizes[axis] * step
            x = e.reshape(spread, sizes)
            sizes[axis] = sizes[axis] - (step - 1)
            x = e.op("Slice", x, e.shape([0]), e.shape([sizes[axis]]), e.shape([axis]))
    edges = [*a.low, *a.high]
    if any(isinstance(d, Dim) or d < 0 for d in edges):  # what is negative crops, and the operator only pads
        axes = range(2, len(sizes))
        low, high = ([maximum(d, 0) for d in side] for side in (a.low, a.high))
        x = e.op("Pad", x, e.shape([0, 0, *low, 0, 0, *high]), e.like(0, x))
        starts = [maximum(0 - lo, 0) for lo in a.low]
        stops = [sizes[i] + lo + hi for i, lo, hi in zip(axes, low, a.high)]
        x = e.op("Slice", x, e.shape(starts), e.shape(stops), e.shape(list(axes)))
        edges = [0] * len(edges)
    return e.op("Conv", x, w, strides=a.strides, pads=edges, dilations=a.dilation, group=a.groups)


def _plain_pool(node: Node, options: Any) -> bool:
    a = _attrs(node)
    edges = [*a.low, *a.high]
    return (
        node.inputs[0].tensor.dtype in (DType.F32, DType.F64) and all(isinstance(d, int) for d in edges)
        and all(lo < k and hi < k for lo, hi, k in zip(a.low, a.high, a.kernel))
        and (a.kind == "max" or options.opset >= 19 or set(a.dilation) <= {1})
    )  # fmt: skip


@emits("pool", when=_plain_pool)
def _pool(e: Emitter, node: Node, x: str) -> str:
    a = _attrs(node)
    common: dict[str, Any] = {"kernel_shape": a.kernel, "strides": a.strides, "pads": [*a.low, *a.high]}
    if set(a.dilation) != {1}:
        common["dilations"] = a.dilation
    if a.kind == "max":
        return e.op("MaxPool", x, **common)
    mean = e.op("AveragePool", x, count_include_pad=1, **common)
    return e.op("Mul", mean, e.like(math.prod(a.kernel), x))


# -- random -----------------------------------------------------------------------------------------------------------------
@emits("random_bits", since=18)
def _random_bits(e: Emitter, node: Node, key: str) -> str:
    """Threefry-2x32-20 written out, as ir.ops.random.threefry: u32 sums wrap around."""
    a = _attrs(node)
    count: DimLike = math.prod(a.shape)
    at, word = e.op("Range", e.const(0, DType.I64), e.scalar(count), e.const(1, DType.I64)), e.const(2**32, DType.I64)
    k0, k1 = (e.op("Gather", key, e.const(i, DType.I64)) for i in (0, 1))
    keys = (k0, k1, e.op("BitwiseXor", e.op("BitwiseXor", k0, k1), e.const(PARITY, DType.U32)))
    high, low = (e.cast(e.op(kind, at, word), DType.U32) for kind in ("Div", "Mod"))
    x0, x1 = e.op("Add", high, keys[0]), e.op("Add", low, keys[1])
    for group in range(5):
        for r in ROTATIONS[group % 2]:
            x0 = e.op("Add", x0, x1)
            left = e.op("BitShift", x1, e.const(r, DType.U32), direction="LEFT")
            right = e.op("BitShift", x1, e.const(32 - r, DType.U32), direction="RIGHT")
            x1 = e.op("BitwiseXor", e.op("BitwiseOr", left, right), x0)
        x0 = e.op("Add", x0, keys[(group + 1) % 3])
        x1 = e.op("Add", e.op("Add", x1, keys[(group + 2) % 3]), e.const(group + 1, DType.U32))
    if a.dtype is DType.U32:
        return e.reshape(e.op("BitwiseXor", x0, x1), a.shape)
    top = e.op("BitShift", e.cast(x0, DType.U64), e.const(32, DType.U64), direction="LEFT")
    return e.reshape(e.op("BitwiseOr", top, e.cast(x1, DType.U64)), a.shape)


__all__ = ["SAME", "reduced"]
