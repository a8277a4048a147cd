"""Resampling: Resize, GridSample, RoiAlign, DeformConv. All of it is gathers and weighted sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from wasat.ir import DimLike, DType
from wasat.ir.dims import floordiv

from ..emit import Emitter, Operand, size_of
from ..registry import MOST, NodeView, op

WORK = DType.F64
"""Coordinates are computed in f64: where sizes are fixed they become constants, and rounding must not decide a pixel."""

TIE = 1e-6
"""How near to the middle of two pixels is the middle, to onnxruntime: its coordinates are f32."""


# -- Resize ----------------------------------------------------------------------------------------------------------------
@op("Resize", since=11)
def resize(
    c: Emitter, n: NodeView, x: Operand, roi: Operand | None = None, scales: Operand | None = None,
    sizes: Operand | None = None,
) -> Any:  # fmt: skip
    rank = c.rank(x)
    axes = [c.axis(a, rank) for a in n.get("axes") or range(rank)]
    shape = c.shape(x)
    if scales is not None and c.shape(scales) == (0,):
        scales = None
    factors: list[Any]
    if scales is not None:
        factors = [float(s) for s in c.numbers(scales, "the scales of Resize")]
        out = [_scaled(shape[a], s) for a, s in zip(axes, factors)]
    elif sizes is not None:
        out = list(c.dims(sizes, "the sizes of Resize"))
        factors = [None] * len(out)
        policy = n.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            wanted = c.numbers(sizes, "the sizes of a Resize that keeps the aspect ratio")
            ratios = [int(w) / c.static(x, a, "Resize that keeps the aspect ratio") for a, w in zip(axes, wanted)]
            ratio = min(ratios) if policy == "not_larger" else max(ratios)
            factors = [ratio] * len(out)
            out = [math.floor(ratio * shape[a] + 0.5) for a in axes]
    else:
        raise n.fail("has neither scales nor sizes")
    if len(out) != len(axes) or len(factors) != len(axes):
        raise n.fail(f"has {len(factors)} scales or sizes for {len(axes)} axes")
    bounds = None
    if n["coordinate_transformation_mode"] == "tf_crop_and_resize":
        if roi is None:
            raise n.fail("tf_crop_and_resize needs a roi")
        bounds = c.numbers(roi, "the roi of Resize").astype(np.float64).reshape(2, -1)
        if bounds.shape[1] != len(axes):
            raise n.fail(f"has a roi of {bounds.size} numbers for {len(axes)} axes")
    own = c.dtype(x)
    work = own if own.is_float and own.bits >= 32 else DType.F32
    y, inside = c.to(x, work) if n["mode"] != "nearest" else x, None
    for i, a in enumerate(axes):
        if bounds is None and out[i] == shape[a] and factors[i] in (None, 1.0):
            continue
        y, ok = _resize_axis(c, n, y, a, out[i], factors[i], None if bounds is None else bounds[:, i])
        inside = ok if inside is None else c.logical_and(inside, ok)
    if inside is not None and bounds is not None:
        y = c.select(inside, y, np.asarray(n["extrapolation_value"], c.dtype(y).np))
    if not own.is_float and n["mode"] != "nearest":
        y = c.round(y)
    return c.to(y, own)


def _scaled(size: DimLike, scale: float) -> DimLike:
    if isinstance(size, int):
        return math.floor(size * scale)
    ratio = Fraction(scale).limit_denominator(4096)
    return floordiv(size * ratio.numerator, ratio.denominator)


def _resize_axis(
    c: Emitter, n: NodeView, x: Any, axis: int, count: DimLike, scale: float | None, bounds: np.ndarray | None
) -> tuple[Any, Any]:
    """x resampled along one axis, and where its coordinates lie inside x."""
    rank, size = c.rank(x), c.shape(x)[axis]
    # onnxruntime's places are f32: at a tie between two pixels their rounding decides, and a scale of 0.7 is none exactly
    work = DType.F32 if n["mode"] == "nearest" else WORK
    given, made = c.size_as(size, work), c.size_as(count, work)
    factor = c.div(made, given) if scale is None else work.np.type(scale)
    length = made if scale is None else c.mul(given, factor)  # which a scale need not make whole
    at = _coordinates(c, n, c.iota(size=count, dtype=work), count, given, made, length, factor, bounds)
    inside = c.along(c.logical_and(c.greater_equal(at, 0.0), c.less_equal(at, c.sub(given, 1.0))), axis, rank)
    last = c.size_as(size - 1, DType.I64)

    def pixel(place: Any) -> Any:
        return c.gather(x, c.minimum(c.maximum(c.cast(place, dtype=DType.I64), 0), last), axis=axis)

    if n["mode"] == "nearest":
        how = n["nearest_mode"]
        if how == "simple":
            how = "floor" if scale is None or scale >= 1 else "ceil"
        return pixel(_nearest(c, how, at)), inside
    shrink = 1.0
    if n.get("antialias", 0):
        known = c.const(np.asarray(factor) if isinstance(factor, float) else factor, "the scale of an antialiased Resize")
        shrink = min(float(known), 1.0)
    kernel, reach = (_triangle, 1) if n["mode"] == "linear" else (_cubic(n["cubic_coeff_a"]), 2)
    base = c.floor(at)
    if reach / shrink > MOST:
        raise n.fail(f"it shrinks by {shrink}, which takes too many pixels each")
    taps = range(math.floor(-reach / shrink) + 1, math.ceil(reach / shrink) + 1)
    weights, pixels = [], []
    for tap in taps:
        place = c.add(base, float(tap))
        weight = kernel(c, c.abs(c.mul(c.sub(place, at), shrink)))
        if n.get("exclude_outside", 0):
            ok = c.logical_and(c.greater_equal(place, 0.0), c.less_equal(place, c.sub(given, 1.0)))
            weight = c.select(ok, weight, 0.0)
        weights.append(weight)
        pixels.append(pixel(place))
    total = c.fold_left(c.add, weights)
    normalize = shrink != 1.0 or n.get("exclude_outside", 0)
    parts = []
    for weight, value in zip(weights, pixels):
        w = c.div(weight, total) if normalize else weight
        parts.append(c.mul(value, c.along(c.to(w, c.dtype(x)), axis, rank)))
    return c.fold_left(c.add, parts), inside


def _coordinates(
    c: Emitter, n: NodeView, i: Any, count: DimLike, given: Any, made: Any, length: Any, factor: Any,
    bounds: np.ndarray | None,
) -> Any:  # fmt: skip
    """Where in the input the output's elements lie."""
    mode = n["coordinate_transformation_mode"]
    half = c.sub(c.div(c.add(i, 0.5), factor), 0.5)
    steps = c.sub(made, 1.0)
    match mode:
        case "half_pixel":
            return half
        case "half_pixel_symmetric":  # the offset is f32, what is added to it is not
            offset = c.mul(c.div(given, 2.0), c.sub(1.0, c.div(made, c.mul(given, factor))))
            i, factor, offset = (c.to(v, DType.F64) for v in (i, factor, offset))
            return c.to(c.sub(c.add(offset, c.div(c.add(i, 0.5), factor)), 0.5), c.dtype(given))
        case "pytorch_half_pixel":
            return c.mul(half, 0.0) if count == 1 else half if isinstance(count, int) else c.mul(half, c.minimum(steps, 1.0))
        case "align_corners":
            # as onnxruntime does: by the size that is made, not by what the scale asks for
            return c.mul(i, 0.0) if count == 1 else c.div(c.mul(i, c.sub(given, 1.0)), c.maximum(steps, 1.0))
        case "asymmetric":
            return c.div(i, factor)
        case "tf_half_pixel_for_nn":
            return c.div(c.add(i, 0.5), factor)
        case "tf_crop_and_resize":
            assert bounds is not None
            start, stop = float(bounds[0]), float(bounds[1])
            span = c.sub(given, 1.0)
            if count == 1:
                return c.add(c.mul(i, 0.0), c.mul(span, 0.5 * (start + stop)))
            return c.add(c.mul(span, start), c.div(c.mul(c.mul(i, stop - start), span), c.sub(length, 1.0)))
    raise n.fail(f"coordinate_transformation_mode {mode} is not supported")


def _nearest(c: Emitter, mode: str, at: Any) -> Any:
    match mode:
        case "round_prefer_floor":
            return c.ceil(c.sub(c.to(at, DType.F64), 0.5 + TIE))
        case "round_prefer_ceil":
            return c.floor(c.add(c.to(at, DType.F64), 0.5 + TIE))
        case "floor":
            return c.floor(at)
    return c.ceil(at)


def _triangle(c: Emitter, distance: Any) -> Any:
    return c.maximum(c.sub(1.0, distance), 0.0)


def _cubic(a: float) -> Callable[[Emitter, Any], Any]:
    """Keys' kernel (Cubic convolution interpolation, 1981) of the distance."""

    def kernel(c: Emitter, d: Any) -> Any:
        near = c.add(c.mul(c.mul(d, d), c.sub(c.mul(d, a + 2), a + 3)), 1.0)
        far = c.sub(c.mul(c.add(c.mul(c.sub(d, 5.0), d), 8.0), c.mul(d, a)), 4 * a)
        return c.select(c.less_equal(d, 1.0), near, c.select(c.less(d, 2.0), far, 0.0))

    return kernel


@op("Upsample", since=9)
@op("Resize", since=10)
def resize_plainly(c: Emitter, n: NodeView, x: Operand, scales: Operand) -> Any:
    """As onnxruntime does what the first definition leaves open: the nearest is below, of an axis that shrinks above."""
    plain = NodeView(n.proto, dict(n.attrs), n.frame, n.importer)
    plain.attrs.update(coordinate_transformation_mode="asymmetric", nearest_mode="simple", cubic_coeff_a=-0.75)
    return resize(c, plain, x, None, scales)


@op("Upsample", since=7)
def upsample_of_attribute(c: Emitter, n: NodeView, x: Operand) -> Any:
    return resize_plainly(c, n, x, np.asarray(n["scales"], np.float32))


# -- sampling at computed places -------------------------------------------------------------------------------------------
def sample(c: Emitter, x: Any, places: Sequence[Any], valid: Any | None = None) -> Any:
    """x [b, c, *space] at integer places (one tensor [b, p] per spatial axis) -> [b, c, p]; 0 where not ``valid``."""
    b, depth, *space = c.shape(x)
    total = size_of(space)
    at: Any = None
    for place, d in zip(places, space):
        limit = c.size_as(d - 1, DType.I64)
        place = c.minimum(c.maximum(c.cast(place, dtype=DType.I64), 0), limit)
        at = place if at is None else c.add(c.mul(at, c.size_as(d, DType.I64)), place)
    y = c.take_along(c.view(x, b, depth, total), c.add_axes(at, 1), axis=2)
    return y if valid is None else c.select(c.add_axes(valid, 1), y, 0.0)


def _within(c: Emitter, at: Any, size: DimLike) -> Any:
    return c.logical_and(c.greater_equal(at, 0.0), c.less_equal(at, c.size_as(size - 1, c.dtype(at))))


@op("GridSample")
def grid_sample(c: Emitter, n: NodeView, x: Operand, grid: Operand) -> Any:
    space, (b, *out, k) = c.shape(x)[2:], c.shape(grid)
    count = size_of(out)
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(n["mode"], n["mode"])
    align, padding = bool(n["align_corners"]), n["padding_mode"]
    flat = c.view(grid, b, count, k)
    axes: list[list[tuple[Any, Any, Any]]] = []  # per spatial axis: (place, weight, valid) of each tap
    for i, size in enumerate(space):
        g = c.drop_axes(c.cut(flat, 2, len(space) - 1 - i, len(space) - i), 2)
        given = c.size_as(size, c.dtype(g))
        if align:
            at = c.mul(c.mul(c.add(g, 1.0), 0.5), c.sub(given, 1.0))
        else:
            at = c.mul(c.sub(c.mul(c.add(g, 1.0), given), 1.0), 0.5)
        at = c.round(at) if mode == "nearest" else at
        at = at if mode == "cubic" else _padded_place(c, at, given, padding, align)  # there, each of the taps is moved
        taps = {"nearest": (0,), "linear": (0, 1), "cubic": (-1, 0, 1, 2)}[mode]
        first = at if mode == "nearest" else c.floor(at)
        entry = []
        for tap in taps:
            place = c.add(first, float(tap)) if tap else first
            distance = c.abs(c.sub(place, at))
            weight = None if mode == "nearest" else _triangle(c, distance) if mode == "linear" else _cubic(-0.75)(c, distance)
            if padding == "zeros":
                entry.append((place, weight, _within(c, place, size)))
            else:
                entry.append((_padded_place(c, place, given, padding, align), weight, None))
        axes.append(entry)
    y = _weighted(c, x, axes)
    return c.view(y, b, c.shape(x)[1], *out)


def _weighted(c: Emitter, x: Any, axes: Sequence[Sequence[tuple[Any, Any, Any]]]) -> Any:
    """The sum over all combinations of taps of x there, times the weights."""
    total: Any = None
    for combination in itertools.product(*axes):
        places, weights, valids = zip(*combination)
        valid = None if valids[0] is None else c.fold_left(c.logical_and, valids)
        y = sample(c, x, places, valid)
        if weights[0] is not None:
            y = c.mul(y, c.to(c.add_axes(c.fold_left(c.mul, weights), 1), c.dtype(x)))
        total = y if total is None else c.add(total, y)
    return total


def _padded_place(c: Emitter, at: Any, size: Any, padding: str, align: bool) -> Any:
    """A coordinate moved inside by clamping or reflecting; as it is for zeros."""
    if padding == "zeros":
        return at
    if padding == "border":
        return c.minimum(c.maximum(at, 0.0), c.sub(size, 1.0))
    low, high = (0.0, c.sub(size, 1.0)) if align else (-0.5, c.sub(size, 0.5))
    span = c.sub(high, low)
    turn = c.mod(c.sub(at, low), c.mul(span, 2.0))
    back = c.add(c.select(c.greater(turn, span), c.sub(c.mul(span, 2.0), turn), turn), low)
    inside = c.logical_and(c.greater_equal(at, low), c.less_equal(at, high))
    return c.select(inside, at, back)


@op("AffineGrid", since=20)
def affine_grid(c: Emitter, n: NodeView, theta: Operand, size: Operand) -> Any:
    """Places in [-1, 1] of a picture of ``size`` (b, c, *space), moved by theta [b, k, k + 1]: [b, *space, k], the last axis of
    space first. Not as the function of the standard: that squeezes the axis of a batch of 1 away."""
    batch, _, *space = c.dims(size, "the size of AffineGrid")
    k = len(space)
    if k not in (2, 3):
        raise n.fail(f"a size of {k + 2} numbers; it has 4 or 5")
    theta = c.view(theta, batch, k, k + 1)

    def column(i: int) -> Any:
        return c.view(c.cut(theta, 2, i, i + 1), batch, *[1] * k, k)

    total = column(k)
    for i, d in enumerate(reversed(space)):
        at, count = c.iota(size=d, dtype=WORK), c.size_as(d, WORK)
        if n["align_corners"]:  # of one place, the end, as onnxruntime has it
            place = c.sub(c.mul(c.select(c.greater(count, 1.0), c.div(at, c.maximum(c.sub(count, 1.0), 1.0)), 1.0), 2.0), 1.0)
        else:
            place = c.sub(c.div(c.add(c.mul(at, 2.0), 1.0), count), 1.0)
        total = c.add(total, c.mul(column(i), c.along(c.to(place, c.dtype(theta)), k - i, k + 2)))
    return total


@op("RoiAlign", since=10)
def roi_align(c: Emitter, n: NodeView, x: Operand, rois: Operand, batch: Operand) -> Any:
    """Mean (or maximum, of the weighted pixels) of bilinear samples in each bin of each region."""
    ratio = n["sampling_ratio"]
    if ratio <= 0:
        raise n.fail("sampling_ratio 0 lets the regions' numbers decide how many samples are taken; give it")
    half = n.get("coordinate_transformation_mode", "output_half_pixel") == "half_pixel"
    count, (_, depth, *space) = c.shape(rois)[0], c.shape(x)
    bins = (n["output_height"], n["output_width"])
    if min(bins) < 1 or max(bins) * ratio > MOST:
        raise n.fail(f"{bins} bins of {ratio} samples are none, or too many")
    axes = []
    for i, size in enumerate(space):
        start, stop = (c.sub(c.mul(c.cut(rois, 1, j, j + 1), n["spatial_scale"]), 0.5 if half else 0.0) for j in (1 - i, 3 - i))
        length = c.sub(stop, start)
        length = length if half else c.maximum(length, 1.0)
        steps = np.arange(bins[i] * ratio)
        offset = (steps // ratio + (steps % ratio + 0.5) / ratio).astype(c.dtype(rois).np)
        at = c.add(start, c.mul(c.div(length, float(bins[i])), offset[None]))
        given = c.size_as(size, c.dtype(at))
        ok = c.logical_and(c.greater_equal(at, -1.0), c.less_equal(at, given))
        at = c.minimum(c.maximum(at, 0.0), c.sub(given, 1.0))
        low = c.floor(at)
        part = c.sub(at, low)
        axes.append([(low, c.select(ok, c.sub(1.0, part), 0.0)), (c.add(low, 1.0), c.select(ok, part, 0.0))])
    own = c.gather(x, batch, axis=0)
    rows, columns = bins[0] * ratio, bins[1] * ratio
    values = []
    for (y, wy), (z, wz) in itertools.product(*axes):
        shape = (count, rows * columns)
        places = [c.view(c.expand(v, count, rows, columns), *shape) for v in (c.add_axes(y, 2), c.add_axes(z, 1))]
        weight = c.view(c.mul(c.add_axes(wy, 2), c.add_axes(wz, 1)), count, 1, rows * columns)
        values.append(c.mul(sample(c, own, places), c.to(weight, c.dtype(x))))
    average = n["mode"] == "avg"
    y = c.fold_left(c.add if average else c.maximum, values)
    y = c.view(y, count, depth, bins[0], ratio, bins[1], ratio)
    return c.reduce_mean(y, axes=(3, 5)) if average else c.reduce_max(y, axes=(3, 5))


@op("DeformConv")
def deform_conv(
    c: Emitter, n: NodeView, x: Operand, w: Operand, offset: Operand, bias: Operand | None = None,
    mask: Operand | None = None,
) -> Any:  # fmt: skip
    """Each kernel element reads x at its own shifted place, bilinearly; then it is a product (arXiv:1703.06211)."""
    b, depth, *space = c.shape(x)
    filters, each, *_ = c.shape(w)
    kernel = [c.static(w, 2 + i, "DeformConv") for i in range(len(space))]
    out = c.shape(offset)[2:]
    axes, k, groups, parts = range(len(space)), math.prod(kernel), n["group"], n["offset_group"]
    strides, dilations = n.get("strides") or [1] * len(space), n.get("dilations") or [1] * len(space)
    pads = n.get("pads") or [0] * 2 * len(space)
    count = size_of(out)
    own = floordiv(depth, parts)
    rows = b * parts
    if k > MOST:
        raise n.fail(f"a kernel of {kernel} is too large")
    image = c.view(x, rows, own, *space)
    shifts = c.view(offset, rows, k, len(space), count)
    columns = []
    for j, place in enumerate(itertools.product(*(range(d) for d in kernel))):
        taps = []
        for i in axes:
            base = c.mul(c.iota(size=out[i], dtype=c.dtype(x)), float(strides[i]))
            base = c.add(base, float(place[i] * dilations[i] - pads[i]))
            base = c.view(c.expand(c.along(base, i, len(out)), *out), 1, count)
            at = c.add(base, c.view(c.cut(c.cut(shifts, 1, j, j + 1), 2, i, i + 1), rows, count))
            low = c.floor(at)
            part = c.sub(at, low)
            high = c.add(low, 1.0)
            taps.append([(low, c.sub(1.0, part), _within(c, low, space[i])), (high, part, _within(c, high, space[i]))])
        value = _weighted(c, image, taps)
        if mask is not None:
            gate = c.cut(c.view(mask, rows, k, count), 1, j, j + 1)
            value = c.mul(value, gate)
        columns.append(c.add_axes(c.view(value, b, depth, count), 2))
    stacked = c.concat(*columns, axis=2) if k > 1 else columns[0]
    stacked = c.view(stacked, b, groups, floordiv(depth, groups) * k, count)
    y = c.matmul(c.view(w, groups, floordiv(filters, groups), each * k), stacked)
    y = c.view(y, b, filters, *out)
    return y if bias is None else c.add(y, c.along(bias, 1, c.rank(y)))
