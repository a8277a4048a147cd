"""Functions over tensors, thin names for the operations of the IR, and the few formulas made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from wasat.ir import DimLike, DType

from .tensor import Operand, Tensor, current, emit, fail

__all__ = [
    "Mask", "abs", "acos", "acosh", "all", "any", "arange", "asin", "asinh", "atan", "atanh", "causal", "ceil", "concat",
    "constant", "cos", "cosh", "cumsum", "dropout", "erf", "exp", "expm1", "floor", "full", "gather", "gelu", "heads", "isinf",
    "isnan", "linear", "log", "log1p", "log_softmax", "matmul", "max", "maximum", "mean", "merge", "min", "minimum", "one_hot",
    "pad", "positions", "prod", "random_normal", "random_uniform", "relu", "round", "rsqrt", "sigmoid", "sign", "silu", "sin",
    "sinh", "softmax", "softplus", "split", "sqrt", "stack", "stop_gradient", "sum", "take_along", "tan", "tanh", "top_k",
    "where", "within",
]  # fmt: skip

Mask = Tensor | bool
"""A boolean tensor (true: attend), or plain True where everything is allowed."""


def constant(x: Any, dtype: DType | str | None = None) -> Tensor:
    """A tensor of known numbers. Python floats and lists of them are f32, ints i64; arrays keep their type."""
    t = current("nn.constant")
    t.builder.loc = t.here()
    if dtype is None and not isinstance(x, (np.ndarray, np.generic)) and np.asarray(x).dtype == np.float64:
        dtype = DType.F32
    return Tensor(t, t.builder.constant(x, dtype))


def full(shape: Sequence[DimLike], value: float, dtype: DType | str = "f32") -> Tensor:
    """A tensor of one repeated number."""
    return emit("broadcast_to", constant(value, dtype), shape=tuple(shape))


def arange(size: DimLike, start: DimLike = 0, dtype: DType | str = "i64") -> Tensor:
    """``start, start+1, …``: ``[size]``. ``nn.arange(s)`` are the positions of a sequence."""
    x: Tensor = emit("iota", size=size, dtype=dtype)
    return x if start == 0 else x + start


def positions(x: Tensor, axis: int = 1) -> Tensor:
    """0, 1, … along an axis of ``x``: i64 ``[x.shape[axis]]``."""
    return arange(x.shape[axis])


def _unary(op: str, doc: str) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        return emit(op, x)

    f.__name__ = f.__qualname__ = op
    f.__doc__ = doc
    return f


exp = _unary("exp", "e to the power of x.")
log = _unary("log", "Natural logarithm.")
sqrt = _unary("sqrt", "Square root.")
rsqrt = _unary("rsqrt", "1 / sqrt(x).")
expm1 = _unary("expm1", "exp(x) - 1, which keeps its digits near 0.")
log1p = _unary("log1p", "log(1 + x), which keeps its digits near 0.")
sin = _unary("sin", "Sine.")
cos = _unary("cos", "Cosine.")
tan = _unary("tan", "Tangent.")
asin = _unary("asin", "The angle of a sine; NaN beyond -1 and 1.")
acos = _unary("acos", "The angle of a cosine; NaN beyond -1 and 1.")
atan = _unary("atan", "The angle of a tangent.")
sinh = _unary("sinh", "Hyperbolic sine.")
cosh = _unary("cosh", "Hyperbolic cosine.")
tanh = _unary("tanh", "Hyperbolic tangent.")
asinh = _unary("asinh", "Inverse hyperbolic sine.")
acosh = _unary("acosh", "Inverse hyperbolic cosine; NaN below 1.")
atanh = _unary("atanh", "Inverse hyperbolic tangent; NaN beyond -1 and 1.")
erf = _unary("erf", "Error function.")
floor = _unary("floor", "Largest integer not above x.")
ceil = _unary("ceil", "Smallest integer not below x.")
round = _unary("round", "The nearest integer; of two, the even one.")  # built-in names are what everybody looks for
isnan = _unary("isnan", "Whether x is not a number.")
isinf = _unary("isinf", "Whether x is an infinity.")
sign = _unary("sign", "-1, 0 or 1.")
abs = _unary("abs", "The size of x, without its sign.")
sigmoid = _unary("sigmoid", "1 / (1 + exp(-x)).")
silu = _unary("silu", "x * sigmoid(x).")
relu = _unary("relu", "max(x, 0).")
softplus = _unary("softplus", "log(1 + exp(x)).")
stop_gradient = _unary("stop_gradient", "x, through which no gradient flows.")


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit; ``approximate`` is "none" (erf) or "tanh"."""
    return emit("gelu", x, approximate=approximate)


def maximum(x: Operand, y: Operand) -> Tensor:
    """The larger, element by element."""
    return emit("maximum", x, y)


def minimum(x: Operand, y: Operand) -> Tensor:
    """The smaller, element by element."""
    return emit("minimum", x, y)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along ``axis``."""
    return emit("softmax", x, axis=axis)


def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    """log(softmax(x)) along ``axis``."""
    return emit("log_softmax", x, axis=axis)


def where(condition: Mask, x: Operand, y: Operand) -> Tensor:
    """``x`` where ``condition``, else ``y``; all broadcast. A plain True or False picks one."""
    if isinstance(condition, bool):
        picked = x if condition else y
        return picked if isinstance(picked, Tensor) else constant(picked)
    if not isinstance(condition, Tensor) or condition.dtype is not DType.BOOL:
        fail(f"nn.where: the condition is a bool tensor, not {condition!r}; compare it with something first")
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype is not y.dtype:
        fail(f"nn.where: {x.value!r} and {y.value!r} differ in element type; cast one")
    if not isinstance(x, Tensor) and not isinstance(y, Tensor):
        x = constant(x)
    return emit("select", condition, x, y)


def _several(what: str, xs: Sequence[Tensor]) -> None:
    if isinstance(xs, Tensor) or not xs:
        fail(f"{what} takes a list of tensors: {what}([x, y], axis=…)")


def concat(xs: Sequence[Tensor], axis: int = -1) -> Tensor:
    """Joined along ``axis``."""
    _several("nn.concat", xs)
    return emit("concat", *xs, axis=axis)


def stack(xs: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Joined along a new axis."""
    _several("nn.stack", xs)
    at = axis if axis >= 0 else axis + xs[0].rank + 1
    return concat([x.reshape(*x.shape[:at], 1, *x.shape[at:]) for x in xs], axis=at)


def pad(x: Tensor, low: Sequence[DimLike], high: Sequence[DimLike], value: float = 0.0) -> Tensor:
    """``low[i]`` elements before and ``high[i]`` after, along each axis."""
    return emit("pad", x, low=tuple(low), high=tuple(high), value=value)


def gather(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    """``np.take``: slices of ``x`` along ``axis`` at integer ``indices``."""
    return emit("gather", x, indices, axis=axis)


def take_along(x: Tensor, indices: Tensor, axis: int = -1) -> Tensor:
    """``np.take_along_axis``."""
    return emit("take_along", x, indices, axis=axis)


def one_hot(ids: Tensor, size: DimLike, dtype: DType | str = "f32") -> Tensor:
    """``[...] -> [..., size]``: 1 at the id, 0 elsewhere."""
    return emit("one_hot", ids, size=size, dtype=dtype)


def cumsum(x: Tensor, axis: int = -1) -> Tensor:
    """Running sum along ``axis``."""
    return emit("cumsum", x, axis=axis)


def top_k(x: Tensor, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """The ``k`` largest along ``axis`` and their indices (i64), largest first; NaN is the greatest."""
    return emit("top_k", x, k=k, axis=axis)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y``: ``[..., m, k]``, ``[..., k, n]`` -> ``[..., m, n]``."""
    return x @ y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, name: str | None = None) -> Tensor:
    """``x[..., k]``, ``weight[n, k]``, ``bias[n]`` -> ``[..., n]``: x @ weightᵀ + bias."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    return emit("linear", *operands, name=name)


def split(x: Tensor, parts: int | Sequence[DimLike], axis: int = -1) -> tuple[Tensor, ...]:
    """Cut along ``axis`` into ``parts`` equal pieces (torch: ``chunk``), or into pieces of the given sizes."""
    return x.split(parts, axis)


def heads(x: Tensor, n: DimLike) -> Tensor:
    """``[..., n*d] -> [..., n, d]``."""
    return x.heads(n)


def merge(x: Tensor) -> Tensor:
    """``[..., h, d] -> [..., h*d]``."""
    return x.merge()


def random_uniform(key: Tensor, shape: Sequence[DimLike], dtype: DType | str = "f32") -> Tensor:
    """Uniform in [0, 1), fixed by ``key`` (u32[2])."""
    return emit("random_uniform", key, shape=tuple(shape), dtype=dtype)


def random_normal(key: Tensor, shape: Sequence[DimLike], dtype: DType | str = "f32") -> Tensor:
    """Standard normal, fixed by ``key`` (u32[2])."""
    return emit("random_normal", key, shape=tuple(shape), dtype=dtype)


def dropout(x: Tensor, key: Tensor | None, rate: float) -> Tensor:
    """Zeroes elements with probability ``rate`` and scales the rest; does nothing unless the trace is for training.

    key u32[2]. The calls of a trace that are given the same key draw masks of their own: the first by the key, each later one
    by two words that the key's random bits hold for it.
    """
    t = current("nn.dropout")
    if not t.training or rate == 0.0:
        return x
    if not isinstance(key, Tensor):
        fail("nn.dropout in training needs a key (u32[2]); make it an input of the traced module and pass it down")
    turn = t.draws.get(key.value, 0)
    t.draws[key.value] = turn + 1
    own = key if turn == 0 else emit("random_bits", key, shape=(turn + 1, 2))[turn]
    return emit("dropout", x, own, rate=rate)


# -- reductions: of all axes by default -------------------------------------------
def sum(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """Sum over ``axis``, one or several."""
    return x.sum(axis, keepdims)


def mean(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """Mean over ``axis``, one or several."""
    return x.mean(axis, keepdims)


def max(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """The largest over ``axis``, one or several."""
    return x.max(axis, keepdims)


def min(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """The smallest over ``axis``, one or several."""
    return x.min(axis, keepdims)


def prod(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """Product over ``axis``, one or several."""
    return x.prod(axis, keepdims)


def any(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """Whether any element is true, over ``axis``, one or several."""
    return x.any(axis, keepdims)


def all(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """Whether all elements are true, over ``axis``, one or several."""
    return x.all(axis, keepdims)


# -- masks: comparisons of positions -------------------------------------------
def causal(queries: Tensor, keys: Tensor | None = None) -> Tensor:
    """A query sees itself and earlier keys: positions ``[..., s]``, ``[..., t]`` -> bool ``[..., s, t]``."""
    keys = queries if keys is None else keys
    return keys[..., None, :] <= queries[..., :, None]


def within(queries: Tensor, window: DimLike | None, keys: Tensor | None = None) -> Mask:
    """Keys less than ``window`` behind the query: bool ``[..., s, t]``; True for a window of None."""
    if window is None:
        return True
    keys = queries if keys is None else keys
    return queries[..., :, None] - keys[..., None, :] < window
