"""Elementwise arithmetic, comparisons, bits, casts, activations."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from wasat.ir import DType

from ..emit import Emitter, Operand
from ..registry import NodeView, op

_UNARY = {
    "Abs": "abs", "Acos": "acos", "Acosh": "acosh", "Asin": "asin", "Asinh": "asinh", "Atan": "atan", "Atanh": "atanh",
    "BitwiseNot": "bit_not", "Ceil": "ceil", "Cos": "cos", "Cosh": "cosh", "Erf": "erf", "Exp": "exp", "Floor": "floor",
    "IsNaN": "isnan", "Log": "log", "Neg": "neg", "Not": "logical_not", "Round": "round", "Sigmoid": "sigmoid", "Sign": "sign",
    "Sin": "sin", "Sinh": "sinh", "Softplus": "softplus", "Sqrt": "sqrt", "Tan": "tan", "Tanh": "tanh",
}  # fmt: skip
_BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "And": "logical_and", "Or": "logical_or", "Xor": "logical_xor",
    "BitwiseAnd": "bit_and", "BitwiseOr": "bit_or", "BitwiseXor": "bit_xor", "Equal": "equal", "Less": "less",
    "LessOrEqual": "less_equal", "Greater": "greater", "GreaterOrEqual": "greater_equal",
}  # fmt: skip


@op(*_UNARY)
def unary(c: Emitter, n: NodeView, x: Operand) -> Any:
    return getattr(c, _UNARY[n.op])(x)


@op(*_BINARY, since=7)
def binary(c: Emitter, n: NodeView, x: Operand, y: Operand) -> Any:
    return getattr(c, _BINARY[n.op])(x, y)


@op("Reciprocal")
def reciprocal(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.div(1.0, x)


@op("Pow", since=7)
def power(c: Emitter, n: NodeView, x: Operand, y: Operand) -> Any:
    own, other = c.dtype(x), c.dtype(y)
    if own is other:
        return c.pow(x, y)
    work = other if other.is_float and not own.is_float else own
    return c.to(c.pow(c.to(x, work), c.to(y, work)), own)


@op("Mod", since=10)
def modulo(c: Emitter, n: NodeView, x: Operand, y: Operand) -> Any:
    if not n["fmod"]:
        return c.mod(x, y)
    if c.dtype(x).is_float:  # the sign of the dividend; exact, unlike x - y*trunc(x/y)
        size = c.mod(c.abs(x), c.abs(y))
        return c.select(c.less(x, 0.0), c.neg(size), size)
    return c.sub(x, c.mul(c.div(x, y), y))


_MANY = {"Max": "maximum", "Min": "minimum", "Sum": "add", "Mean": "add"}


@op(*_MANY, since=6)
def many(c: Emitter, n: NodeView, *xs: Operand) -> Any:
    total = c.fold_left(getattr(c, _MANY[n.op]), xs)
    return c.mul(total, 1 / len(xs)) if n.op == "Mean" else total


@op("Clip", since=11)
def clip(c: Emitter, n: NodeView, x: Operand, low: Operand | None = None, high: Operand | None = None) -> Any:
    x = x if low is None else c.maximum(x, low)
    return x if high is None else c.minimum(x, high)


@op("Clip", since=6)
def clip_to_attributes(c: Emitter, n: NodeView, x: Operand) -> Any:
    top = float(ml_dtypes.finfo(c.dtype(x).np).max)  # a bound that the type does not hold, as f16 the default, is none
    low, high = (np.asarray(n[k], c.dtype(x).np) if abs(n[k]) <= top else None for k in ("min", "max"))
    return clip(c, n, x, low, high)


@op("IsInf")
def isinf(c: Emitter, n: NodeView, x: Operand) -> Any:
    hit = c.isinf(x)
    if not n["detect_negative"]:
        hit = c.logical_and(hit, c.greater(x, 0.0))
    return hit if n["detect_positive"] else c.logical_and(hit, c.less(x, 0.0))


@op("BitShift")
def bit_shift(c: Emitter, n: NodeView, x: Operand, y: Operand) -> Any:
    dtype, left = c.dtype(x), n["direction"] == "LEFT"
    # the IR shifts by 0 to bits - 1; here everything may be shifted out, a negative amount read as a large one
    inside = c.less(c.to(y, DType("u" + dtype.value[1:])), dtype.bits)
    shifted = (c.shift_left if left else c.shift_right)(x, c.select(inside, y, 0 if left else dtype.bits - 1))
    return c.select(inside, shifted, 0) if left else shifted


@op("Where", since=9)
def where(c: Emitter, n: NodeView, cond: Operand, x: Operand, y: Operand) -> Any:
    return c.select(cond, x, y)


# -- element types ---------------------------------------------------------------------------------------------------------
@op("Cast")
def cast(c: Emitter, n: NodeView, x: Operand) -> Any:
    return convert(c, x, n.dtype("to"), bool(n.get("saturate", 1)), n.get("round_mode", "up"))


@op("CastLike")
def cast_like(c: Emitter, n: NodeView, x: Operand, like: Operand) -> Any:
    return convert(c, x, c.dtype(like), bool(n.get("saturate", 1)), n.get("round_mode", "up"))


def convert(c: Emitter, x: Operand, to: DType, saturate: bool = True, round_mode: str = "up") -> Any:
    """ONNX Cast: into 8-bit floats saturating (what is too large becomes the largest) unless told otherwise."""
    source = c.dtype(x)
    if source is to:
        return x
    if to is DType.F8E8M0 and source.is_float:
        return c.bitcast(_power_of_two(c, c.to(x, DType.F32), saturate, round_mode), dtype=DType.F8E8M0)
    if to.is_float and to.bits <= 8 and source.is_float and saturate:
        if source.bits <= 8:
            x = c.to(x, DType.F32)
        top = float(ml_dtypes.finfo(to.np).max)
        x = c.minimum(c.maximum(x, -top), top)
    if source.is_float and to.is_int and to.bits < 8:  # the bits that do not fit fall away
        x = c.cast(x, dtype=DType.I32)
    return c.to(x, to)


def _power_of_two(c: Emitter, x: Operand, saturate: bool, round_mode: str) -> Any:
    """The exponent byte of f32 numbers: 2**(byte - 127), 255 for NaN."""
    bits = c.bitcast(x, dtype=DType.U32)
    bits = c.bit_and(bits, np.uint32(0x7FFFFFFF))
    exponent, fraction = c.shift_right(bits, np.uint32(23)), c.bit_and(bits, np.uint32(0x7FFFFF))
    one, zero = np.uint32(1), np.uint32(0)
    if round_mode == "up":
        # a subnormal f32 above 2**-127 rounds to 2**-126; 2**-127 itself is half of the smallest normal
        over = c.select(c.equal(exponent, zero), c.greater(fraction, np.uint32(0x400000)), c.greater(fraction, zero))
    elif round_mode == "nearest":
        half = np.uint32(0x400000)
        over = c.select(c.equal(exponent, zero), c.greater(fraction, half), c.greater_equal(fraction, half))
    else:
        over = c.less(bits, zero)
    top = np.uint32(254)
    grown = c.add(exponent, c.select(over, one, zero))
    finite = c.less(exponent, np.uint32(255))
    limit = top if saturate else np.uint32(255)
    infinite = c.select(c.equal(fraction, zero), limit, np.uint32(255))
    return c.cast(c.select(finite, c.minimum(grown, limit), infinite), dtype=DType.U8)


@op("BitCast")
def bit_cast(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.bitcast(c.to(x, DType.U8) if c.dtype(x) is DType.BOOL else x, dtype=n.dtype("to"))


# -- activations -----------------------------------------------------------------------------------------------------------
@op("Relu")
def relu(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.relu(x) if c.dtype(x).is_float else c.maximum(x, 0)


@op("Gelu")
def gelu(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.gelu(x, approximate=n["approximate"])


@op("Swish")
def swish(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.silu(x) if n["alpha"] == 1 else c.mul(x, c.sigmoid(c.mul(x, n["alpha"])))


@op("Elu")
def elu(c: Emitter, n: NodeView, x: Operand) -> Any:
    return _elu(c, x, n["alpha"], 1.0)


@op("Selu")
def selu(c: Emitter, n: NodeView, x: Operand) -> Any:
    return _elu(c, x, n["alpha"] * n["gamma"], n["gamma"])


@op("Celu")
def celu(c: Emitter, n: NodeView, x: Operand) -> Any:
    negative = c.mul(c.expm1(c.div(c.minimum(x, 0.0), n["alpha"])), n["alpha"])
    return c.add(c.maximum(x, 0.0), negative)


def _elu(c: Emitter, x: Operand, alpha: float, gamma: float) -> Any:
    positive = c.maximum(x, 0.0)
    return c.add(positive if gamma == 1 else c.mul(positive, gamma), c.mul(c.expm1(c.minimum(x, 0.0)), alpha))


@op("LeakyRelu")
def leaky_relu(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.select(c.less(x, 0.0), c.mul(x, n["alpha"]), x)


@op("PRelu", since=7)
def prelu(c: Emitter, n: NodeView, x: Operand, slope: Operand) -> Any:
    return c.select(c.less(x, 0.0 if c.dtype(x).is_float else 0), c.mul(x, slope), x)


@op("HardSigmoid")
def hard_sigmoid(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.maximum(c.minimum(c.add(c.mul(x, n["alpha"]), n["beta"]), 1.0), 0.0)


@op("HardSwish")
def hard_swish(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.mul(x, c.maximum(c.minimum(c.add(c.mul(x, 1 / 6), 0.5), 1.0), 0.0))


@op("Mish")
def mish(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.mul(x, c.tanh(c.softplus(x)))


@op("Softsign")
def softsign(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.div(x, c.add(c.abs(x), 1.0))


@op("ThresholdedRelu")
def thresholded_relu(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.select(c.greater(x, n["alpha"]), x, 0.0)


@op("Shrink")
def shrink(c: Emitter, n: NodeView, x: Operand) -> Any:
    own = c.dtype(x)
    if not own.is_float:  # lambd and bias are none of its numbers: computed among floats, and cut to integers
        x = c.to(x, DType.F64)
    high, low = c.greater(x, n["lambd"]), c.less(x, -n["lambd"])
    return c.to(c.select(high, c.sub(x, n["bias"]), c.select(low, c.add(x, n["bias"]), c.mul(x, 0.0))), own)


# -- random numbers: a function of the seed --------------------------------------------------------------------------------
def key(n: NodeView) -> np.ndarray:
    """A key from the node's seed; without one, from its name, so that an import is reproducible."""
    seed = n.get("seed")
    word = np.float32(seed).view(np.uint32) if seed is not None else np.uint32(sum(map(ord, n.name)))
    return np.array([word, len(n.name)], np.uint32)


@op("RandomUniform", "RandomUniformLike", "RandomNormal", "RandomNormalLike")
def random(c: Emitter, n: NodeView, like: Operand | None = None) -> Any:
    shape = n["shape"] if like is None else c.shape(like)
    dtype = n.dtype("dtype", c.dtype(like) if like is not None else DType.F32)
    if "Normal" in n.op:
        x = c.random_normal(key(n), shape=tuple(shape), dtype=dtype)
        return c.add(c.mul(x, n["scale"]), n["mean"])
    x = c.random_uniform(key(n), shape=tuple(shape), dtype=dtype)
    return c.add(c.mul(x, n["high"] - n["low"]), n["low"])


@op("Dropout", since=12)
def dropout(
    c: Emitter, n: NodeView, x: Operand, ratio: Operand | None = None, training: Operand | None = None
) -> tuple[Any, Any]:
    rate = 0.5 if ratio is None else float(c.const(ratio, "the ratio of a dropout"))
    if training is None or not bool(c.const(training, "whether a dropout is training")) or rate == 0:
        return x, c.full(c.shape(x), True, DType.BOOL)
    u = c.random_uniform(key(n), shape=c.shape(x), dtype=DType.F32)
    keep = c.greater_equal(u, rate)
    return c.select(keep, c.mul(x, 1 / (1 - rate)), 0.0), keep


@op("Dropout", since=10)
def dropout_inference(c: Emitter, n: NodeView, x: Operand) -> tuple[Any, Any]:
    return x, c.full(c.shape(x), True, DType.BOOL)


@op("Dropout", since=7)
def dropout_with_mask_of_its_type(c: Emitter, n: NodeView, x: Operand) -> tuple[Any, Any]:
    return x, c.full(c.shape(x), 1, c.dtype(x))


