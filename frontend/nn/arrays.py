"""Functions that make tensors, put them in order and count them: the helpers of NumPy and torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from wasat.ir import Dim, DimLike, DType

from wasat import ir

from .functions import arange, exp, full, gather, maximum, minimum, rsqrt, sqrt, where
from .loops import scan
from .tensor import Operand, Tensor, emit, fail

Axes = int | Sequence[int] | None


def number(n: DimLike) -> Operand:
    """A size as an operand beside floats."""
    return n if isinstance(n, Dim) else float(n)


def wide(x: Tensor) -> Tensor:
    """f16 and bf16 as f32, in which sums are made."""
    return x.cast(DType.F32) if x.dtype.is_float and x.dtype.bits < 32 else x


def floats(what: str, *xs: Tensor) -> None:
    """Refuses what is no tensor of floats."""
    for x in xs:
        if not isinstance(x, Tensor) or not x.dtype.is_float:
            given = f'{x.value!r}; cast it: .cast("f32")' if isinstance(x, Tensor) else repr(x)
            fail(f"nn.{what} takes a tensor of floats, not {given}")


def several(x: Tensor, axis: Axes) -> tuple[int, ...]:
    """Axes as numbers from 0, each once."""
    axes = range(x.rank) if axis is None else [axis] if isinstance(axis, int) else axis
    out = tuple(x._axis(a) for a in axes)
    return out if len(set(out)) == len(out) else fail(f"{x.value!r}: axes {tuple(axes)} name one twice")


# -- made of nothing -------------------------------------------
def zeros(shape: Sequence[DimLike], dtype: DType | str = "f32") -> Tensor:
    """A tensor of zeros."""
    return full(shape, 0, dtype)


def ones(shape: Sequence[DimLike], dtype: DType | str = "f32") -> Tensor:
    """A tensor of ones."""
    return full(shape, 1, dtype)


def full_like(x: Tensor, value: float, dtype: DType | str | None = None) -> Tensor:
    """One number, repeated in the shape (and, by default, the type) of ``x``."""
    return full(x.shape, value, x.dtype if dtype is None else dtype)


def zeros_like(x: Tensor, dtype: DType | str | None = None) -> Tensor:
    """Zeros in the shape of ``x``."""
    return full_like(x, 0, dtype)


def ones_like(x: Tensor, dtype: DType | str | None = None) -> Tensor:
    """Ones in the shape of ``x``."""
    return full_like(x, 1, dtype)


def eye(n: DimLike, m: DimLike | None = None, dtype: DType | str = "f32") -> Tensor:
    """``[n, m]`` (``m`` is ``n`` by default): ones on the diagonal."""
    return (arange(n)[:, None] == arange(n if m is None else m)[None, :]).cast(dtype)


def linspace(start: float, stop: float, num: DimLike, dtype: DType | str = "f32") -> Tensor:
    """``num`` numbers at equal distances, from ``start`` to ``stop``, which belongs to them; of one, ``start``."""
    dtype = DType.of(dtype)
    if not dtype.is_float:
        fail(f"nn.linspace makes floats, not {dtype}")
    wider = DType.F32 if dtype.bits < 32 else dtype
    i = arange(num)
    step = full((), stop - start, wider) / number(ir.maximum(num - 1, 1))
    up, down = start + step * i.cast(wider), stop - step * ((num - 1) - i).cast(wider)  # both ends are exact
    return where(i * 2 <= num - 1, up, down).cast(dtype)


# -- parts and order -------------------------------------------
def _triangle(x: Tensor, keep: Tensor) -> Tensor:
    return x & keep if x.dtype is DType.BOOL else where(keep, x, 0)


def _matrix(what: str, x: Tensor) -> tuple[Tensor, Tensor]:
    if x.rank < 2:
        fail(f"nn.{what} takes [..., rows, columns], not {x.value!r}")
    return arange(x.shape[-2])[:, None], arange(x.shape[-1])[None, :]


def tril(x: Tensor, diagonal: int = 0) -> Tensor:
    """The lower triangle of ``[..., rows, columns]``, up to ``diagonal`` places right of the middle; zeros elsewhere."""
    rows, columns = _matrix("tril", x)
    return _triangle(x, columns <= rows + diagonal)


def triu(x: Tensor, diagonal: int = 0) -> Tensor:
    """The upper triangle of ``[..., rows, columns]``, from ``diagonal`` places right of the middle; zeros elsewhere."""
    rows, columns = _matrix("triu", x)
    return _triangle(x, columns >= rows + diagonal)


def repeat(x: Tensor, repeats: int, axis: int) -> Tensor:
    """Each element along ``axis`` ``repeats`` times in a row, as ``np.repeat`` (torch: ``repeat_interleave``)."""
    if isinstance(repeats, bool) or not isinstance(repeats, (int, Dim)) or (isinstance(repeats, int) and repeats < 0):
        fail(f"nn.repeat: repeats is a number of times, not {repeats!r}; nn.tile repeats the whole")
    at = x._axis(axis)
    before, d, after = x.shape[:at], x.shape[at], x.shape[at + 1 :]
    each = x.reshape(*before, d, 1, *after).broadcast_to(*before, d, repeats, *after)
    return each.reshape(*before, d * repeats, *after)


def tile(x: Tensor, repeats: Sequence[DimLike]) -> Tensor:
    """The whole, ``repeats[i]`` times along axis i, as ``np.tile`` (torch: ``x.repeat``); more repeats are new first axes."""
    if isinstance(repeats, (int, Dim)) or len(repeats) < x.rank:
        fail(f"nn.tile: one number for each axis of {x.value!r}, not {repeats!r}")
    shape = (*[1] * (len(repeats) - x.rank), *x.shape)
    ways = [d for pair in zip([1] * len(shape), shape) for d in pair]
    wide = [d for pair in zip(repeats, shape) for d in pair]
    return x.reshape(*ways).broadcast_to(*wide).reshape(*(n * d for n, d in zip(repeats, shape)))


def roll(x: Tensor, shift: int, axis: int) -> Tensor:
    """Moved by ``shift`` places along ``axis``; what leaves at the end comes in at the start."""
    if isinstance(shift, bool) or not isinstance(shift, (int, Dim)):
        fail(f"nn.roll: shift is a number of places, not {shift!r}")
    at = x._axis(axis)
    n = x.shape[at]
    return gather(x, (arange(n) + (n - shift if isinstance(shift, Dim) else -shift)) % n, axis=at)


def flip(x: Tensor, axis: Axes = None) -> Tensor:
    """Backwards along ``axis`` (default: all)."""
    return emit("reverse", x, axes=several(x, axis))


def squeeze(x: Tensor, axis: Axes = None) -> Tensor:
    """Without ``axis`` (default: all that are known to be 1), which must be of size 1."""
    if axis is None:
        gone = {i for i, d in enumerate(x.shape) if ir.equal(d, 1) is True}
    else:
        gone = set(several(x, axis))
        for i in sorted(gone):
            if ir.equal(x.shape[i], 1) is not True:
                fail(f"nn.squeeze: axis {i} of {x.value!r} is not of size 1; take an element of it: x[:, 0]")
    return x.reshape(*(d for i, d in enumerate(x.shape) if i not in gone))


def unsqueeze(x: Tensor, axis: int) -> Tensor:
    """With a new axis of size 1 at place ``axis`` of the result."""
    if not -x.rank - 1 <= axis <= x.rank:
        fail(f"nn.unsqueeze: {x.value!r} has no place {axis} for an axis")
    at = axis % (x.rank + 1)
    return x.reshape(*x.shape[:at], 1, *x.shape[at:])


def flatten(x: Tensor, start: int = 0, stop: int = -1) -> Tensor:
    """Axes ``start`` to ``stop``, both included, as one."""
    if x.rank == 0:
        return x.reshape(1)
    first, last = x._axis(start), x._axis(stop)
    if first > last:
        fail(f"nn.flatten: axis {start} of {x.value!r} is behind axis {stop}")
    size: DimLike = 1
    for d in x.shape[first : last + 1]:
        size = size * d
    return x.reshape(*x.shape[:first], size, *x.shape[last + 1 :])


def masked_fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    """``x`` with ``value`` where ``mask`` is true; the mask is broadcast to ``x``."""
    if not isinstance(mask, Tensor) or mask.dtype is not DType.BOOL:
        fail(f"nn.masked_fill: the mask is a bool tensor, not {mask!r}")
    if mask.rank > x.rank or any(
        ir.equal(m, 1) is not True and ir.equal(m, d) is False for m, d in zip(mask.shape[::-1], x.shape[::-1])
    ):
        fail(f"nn.masked_fill: a mask {mask.value!r} does not fit {x.value!r}")
    return where(mask, value, x)


def outer(x: Tensor, y: Tensor) -> Tensor:
    """``x[n]``, ``y[m]`` -> ``[n, m]``: all products."""
    for v in (x, y):
        if v.rank != 1:
            fail(f"nn.outer takes two vectors, not {v.value!r}")
    return x[:, None] * y[None, :]


# -- numbers -------------------------------------------
def clip(x: Tensor, min: Operand | None = None, max: Operand | None = None) -> Tensor:
    """Not below ``min``, not above ``max``; None is no bound. Where the bounds cross, ``max``."""
    if min is None and max is None:
        fail("nn.clip needs a bound: min=, max= or both")
    x = x if min is None else maximum(x, min)
    return x if max is None else minimum(x, max)


def argmax(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """Index (i64) of the largest along ``axis``, the first of equals; by default of all elements in reading order."""
    return _arg("arg_max", x, axis, keepdims)


def argmin(x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """Index (i64) of the smallest along ``axis``, the first of equals; by default of all elements in reading order."""
    return _arg("arg_min", x, axis, keepdims)


def _arg(op: str, x: Tensor, axis: int | None, keepdims: bool) -> Tensor:
    if axis is not None:
        return emit(op, x, axis=x._axis(axis), keepdims=keepdims)
    y: Tensor = emit(op, flatten(x), axis=0)
    return y.reshape(*[1] * x.rank) if keepdims else y


def sort(x: Tensor, axis: int = -1, descending: bool = False) -> Tensor:
    """In ascending (or ``descending``) order along ``axis``; NaN is the greatest. :func:`argsort` says from where."""
    return emit("sort", x, axis=x._axis(axis), descending=descending)


def argsort(x: Tensor, axis: int = -1, descending: bool = False) -> Tensor:
    """Indices (i64) that sort ``x`` along ``axis``; equals keep their order."""
    at = x._axis(axis)
    out: tuple[Tensor, Tensor] = emit("top_k", x, k=x.shape[at], axis=at, largest=descending)
    return out[1]


def _running(
    x: Tensor, axis: int, start: float, turn: Callable[[Any, Any], Any], places: bool = False
) -> tuple[Tensor, ...]:  # fmt: skip
    """What ``turn`` makes of the results so far (at first ``start``) and the next row, for all rows along ``axis``;
    ``places``: of the places of these, too, which are i64."""
    at = x._axis(axis)
    front = [at, *(i for i in range(x.rank) if i != at)]
    rows = wide(x).transpose(*front)
    carry: tuple[Tensor, ...] = (full(rows.shape[1:], start, rows.dtype),)
    each: tuple[Tensor, ...] = (rows,)
    if places:
        index = arange(rows.shape[0]).reshape(rows.shape[0], *[1] * (x.rank - 1)).broadcast_to(*rows.shape)
        carry, each = (*carry, zeros(rows.shape[1:], "i64")), (*each, index)

    def step(held: tuple[Tensor, ...], row: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        made = turn(held, row)
        return made, made

    _, found = scan(step, carry, each)
    back = [front.index(i) for i in range(x.rank)]
    return tuple(v.transpose(*back).cast(t) for v, t in zip(found, (x.dtype, DType.I64)))


def cumprod(x: Tensor, axis: int = -1) -> Tensor:
    """Running product along ``axis``."""
    if x.dtype is DType.BOOL:
        fail(f"nn.cumprod of booleans, {x.value!r}: cast them first")
    return _running(x, axis, 1.0, lambda held, row: (held[0] * row[0],))[0]


def cummax(x: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
    """The largest element so far along ``axis``, and its place (i64; the last of equals). NaN is larger than all."""
    return _so_far("cummax", x, axis, True)


def cummin(x: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
    """The least element so far along ``axis``, and its place (i64; the last of equals). NaN is less than all."""
    return _so_far("cummin", x, axis, False)


def _so_far(what: str, x: Tensor, axis: int, largest: bool) -> tuple[Tensor, Tensor]:
    if x.dtype is DType.BOOL:
        fail(f"nn.{what} of booleans, {x.value!r}: cast them first")
    dtype = wide(x).dtype
    start = (-math.inf if largest else math.inf) if dtype.is_float else dtype.range[not largest]

    def turn(held: Any, row: Any) -> Any:
        take = (row[0] >= held[0] if largest else row[0] <= held[0]) | (row[0] != row[0])
        return where(take, row[0], held[0]), where(take, row[1], held[1])

    values, places = _running(x, axis, start, turn, places=True)
    return values, places


def logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """log(exp(x) + exp(y)), without overflow."""
    floats("logaddexp", x, y)
    apart = where(x == y, 0.0, x - y)  # also where both are the same infinity
    return maximum(x, y) + emit("log1p", exp(-abs(apart)))


def logcumsumexp(x: Tensor, axis: int = -1) -> Tensor:
    """log(cumsum(exp(x))) along ``axis``, without overflow."""
    floats("logcumsumexp", x)
    return _running(x, axis, -math.inf, lambda held, row: (logaddexp(held[0], row[0]),))[0]


def logsumexp(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """log(sum(exp(x))) over ``axis`` (default: all), without overflow."""
    floats("logsumexp", x)
    return emit("logsumexp", x, axes=several(x, axis), keepdims=keepdims)


def var(x: Tensor, axis: Axes = None, keepdims: bool = False, correction: int = 1) -> Tensor:
    """Variance over ``axis`` (default: all), divided by the count less ``correction``: 1 as in torch; NumPy's default is 0."""
    return _var("var", x, axis, keepdims, correction).cast(x.dtype)


def std(x: Tensor, axis: Axes = None, keepdims: bool = False, correction: int = 1) -> Tensor:
    """Standard deviation: the square root of :func:`var`."""
    return sqrt(_var("std", x, axis, keepdims, correction)).cast(x.dtype)


def _var(what: str, x: Tensor, axis: Axes, keepdims: bool, correction: int) -> Tensor:
    floats(what, x)
    axes = several(x, axis)
    count: DimLike = 1
    for a in axes:
        count = count * x.shape[a]
    y = wide(x)
    y = y - y.mean(axes, keepdims=True)
    # a count of `correction` has no variance: 0 / 0
    return (y * y).sum(axes, keepdims) / number(ir.maximum(count - correction, 0))


def normalize(x: Tensor, p: float = 2.0, axis: int = 1, eps: float = 1e-12) -> Tensor:
    """``x / max(norm, eps)`` along ``axis``, which is 1 as in torch; p is 1, 2 or inf."""
    floats("normalize", x)
    y, at = wide(x), x._axis(axis)
    if p == 2:  # the root of the larger: it has a gradient at 0
        return (y * rsqrt(maximum((y * y).sum(at, keepdims=True), eps * eps))).cast(x.dtype)
    if p == 1:
        return (y / maximum(abs(y).sum(at, keepdims=True), eps)).cast(x.dtype)
    if p == float("inf"):
        return (y / maximum(abs(y).max(at, keepdims=True), eps)).cast(x.dtype)
    fail(f"nn.normalize: p is 1, 2 or inf, not {p!r}")


def cosine_similarity(x: Tensor, y: Tensor, axis: int = 1, eps: float = 1e-8) -> Tensor:
    """Cosine of the angle between ``x`` and ``y`` along ``axis``, which is 1 as in torch."""
    floats("cosine_similarity", x, y)
    if x.dtype is not y.dtype:
        fail(f"nn.cosine_similarity: {x.value!r} and {y.value!r} differ in element type; cast one")
    a, b = (normalize(wide(v), 2.0, axis, eps) for v in (x, y))
    return (a * b).sum(axis).cast(x.dtype)
