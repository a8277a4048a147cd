"""Pictures and videos as tensors: resize, patches, frames, as graphs that take any size."""

from __future__ import annotations

from collections.abc import Sequence

from wasat.ir import Dim, DimLike, DType
from wasat.ir.dims import floordiv

from wasat import ir

from .functions import arange, gather, maximum, minimum, where
from .tensor import Operand, Tensor, fail

_REACH = {"bilinear": 1, "bicubic": 2}
"""How far a filter reaches, in pixels of the coarser of the two grids."""


def resize(x: Tensor, size: Sequence[DimLike], method: str = "bilinear", antialias: bool = True) -> Tensor:
    """``[..., h, w, c] -> [..., *size, c]``: resampled, height first; any size on either side may be symbolic.

    u8 becomes f32 of the same range; floats keep their type. ``method``: "bilinear" or "bicubic". ``antialias``: the filter
    widens with the reduction, as Pillow's and torchvision's do (cubic coefficient -0.5, weights renormalized at the borders);
    without it the 2 or 4 nearest pixels count, as in torch's ``interpolate(align_corners=False)`` (-0.75, borders repeated).
    Nothing is rounded or clipped: a bicubic result may leave the range of ``x``.

    Cost: each of the two passes reads ``2 * reach * max(1, in / out)`` pixels for one of its own (reach 1 or 2), so the first
    reads each byte of the picture ``2 * reach`` times; give u8 itself, and nothing of the picture's size is made in float.
    Raises TypeMismatch for other ranks or element types.
    """
    if method not in _REACH:
        fail(f"nn.resize: the method is {' or '.join(map(repr, _REACH))}, not {method!r}")
    if x.rank < 3 or not (x.dtype is DType.U8 or x.dtype.is_float):
        fail(f"nn.resize takes u8 or float [..., h, w, c], not {x.value!r}")
    if len(size) != 2:
        fail(f"nn.resize: the size is (height, width), not {size!r}")
    for axis, n in zip((x.rank - 3, x.rank - 2), size):
        x = _resample(x, axis, n, method, antialias)
    return x.cast("f32") if x.dtype is DType.U8 else x


def _resample(x: Tensor, axis: int, out: DimLike, method: str, antialias: bool) -> Tensor:
    """``axis`` with ``out`` elements: for each the weighted sum of its taps."""
    n = x.shape[axis]
    if ir.equal(n, out) is True:
        return x
    dtype = "f32" if x.dtype is DType.U8 else x.dtype
    index, weight = _taps(n, out, method, antialias)
    taken = gather(x, index, axis=axis).cast(dtype)
    weight = weight.cast(dtype).reshape(*weight.shape, *(1,) * (x.rank - axis - 1))
    return (taken * weight).sum(axis=axis + 1)


def _taps(n: DimLike, out: DimLike, method: str, antialias: bool) -> tuple[Tensor, Tensor]:
    """Which of ``n`` pixels make each of ``out``, and with which weights: i64[out, taps], f32[out, taps].

    Pixel i of the result has its centre at (2 i + 1) n / (2 out), pixel j of the source at j + 1/2. Distances are whole
    multiples of 1 / (2 out): everything up to the filter itself is exact, at any size.
    """
    reach = _REACH[method]
    coarse = ir.maximum(n, out) if antialias else out  # one unit of the filter is coarse / out pixels
    taps = floordiv(2 * reach * coarse + (out - 1), out)
    centre = (arange(out) * 2 + 1) * n
    first = (centre + (out - 2 * reach * coarse)) // (2 * out)
    at = first[:, None] + arange(taps)
    away = (at * 2 + 1) * out - centre[:, None]
    weight = _FILTERS[method](abs(away.cast("f32") / _number(2 * coarse)), -0.5 if antialias else -0.75)
    inside = minimum(maximum(at, 0), n - 1)
    if antialias:
        weight = where(inside == at, weight, 0.0)
        weight = weight / weight.sum(axis=1, keepdims=True)
    return inside, weight


def _triangle(d: Tensor, _: float) -> Tensor:
    return maximum(1.0 - d, 0.0)


def _cubic(d: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution (1981)."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1.0
    far = a * (((d - 5.0) * d + 8.0) * d - 4.0)
    return where(d < 1.0, near, where(d < 2.0, far, 0.0))


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic}


def _number(d: DimLike) -> Operand:
    return d if isinstance(d, Dim) else float(d)


def patches(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """``[..., h, w, c] -> [..., (h / p) (w / q), p q c]``: squares (or ``size`` = (p, q)) in reading order.

    The elements of a patch are in the order row, column, channel. Raises TypeMismatch where they do not tile the picture.
    """
    p, q = (size, size) if isinstance(size, int) else size
    if x.rank < 3:
        fail(f"nn.patches takes [..., h, w, c], not {x.value!r}")
    *lead, h, w, c = x.shape
    rows, columns = floordiv(h, p), floordiv(w, q)
    if ir.equal(rows * p, h) is not True or ir.equal(columns * q, w) is not True:
        fail(f"nn.patches: {x.value!r} does not split into patches of {p} x {q}; resize it first")
    k = len(lead)
    x = x.reshape(*lead, rows, p, columns, q, c)
    return x.transpose(*range(k), k, k + 2, k + 1, k + 3, k + 4).reshape(*lead, rows * columns, p * q * c)


def sample_frames(frames: Tensor, times: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``frames [n, ...]`` and ascending ``times f32[n]`` in seconds -> ``[count, ...]`` and f32[count]: evenly in time.

    The video lasts from the first frame to the last plus the mean distance of two, and is cut into ``count`` equal parts;
    taken is the frame that shows in the middle of each. A video of fewer frames repeats some.
    """
    if times.rank != 1 or ir.equal(times.shape[0], frames.shape[0]) is False:
        fail(f"nn.sample_frames: one time for each frame: {frames.value!r} and {times.value!r}")
    n = times.shape[0]
    first = times[0]
    each = (times[n - 1] - first) / _number(ir.maximum(n - 1, 1))
    # a middle that falls between two frames belongs to the later one, whichever way its product was rounded
    middle = first + each * ((arange(count, dtype="f32") + 0.5) * _number(n) / float(count) + 1e-3)
    shown = (times[None, :] <= middle[:, None]).cast("i64").sum(axis=1) - 1
    shown = minimum(maximum(shown, 0), n - 1)
    return gather(frames, shown), gather(times, shown)
