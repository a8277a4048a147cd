"""Convolution, pooling, and their inverses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from wasat.ir import DimLike, DType, maximum, minimum
from wasat.ir.dims import floordiv

from ..emit import EVALUATE_LIMIT, Emitter, Operand, size_of
from ..registry import MOST, NodeView, op
from .shape import padded


def _windows(
    c: Emitter, n: NodeView, space: Sequence[DimLike], kernel: Sequence[DimLike]
) -> tuple[list[int], list[int], list[DimLike], list[DimLike]]:
    """Strides, dilations, and the padding before and after each spatial axis."""
    axes = range(len(space))
    strides = n.get("strides") or [1] * len(space)
    dilations = n.get("dilations") or [1] * len(space)
    mode = n.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        pads = (n.get("pads") if mode == "NOTSET" else None) or [0] * 2 * len(space)
        return strides, dilations, list(pads[: len(space)]), list(pads[len(space) :])
    low, high = [], []
    for i in axes:
        out = floordiv(space[i] + strides[i] - 1, strides[i])
        total = maximum((out - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - space[i], 0)
        small = floordiv(total, 2)
        low.append(small if mode == "SAME_UPPER" else total - small)
        high.append(total - small if mode == "SAME_UPPER" else small)
    return strides, dilations, low, high


@op("Conv")
def conv(c: Emitter, n: NodeView, x: Operand, w: Operand, bias: Operand | None = None) -> Any:
    y = _convolve(c, n, x, w)
    return y if bias is None else c.add(y, c.along(bias, 1, c.rank(y)))


def _convolve(c: Emitter, n: NodeView, x: Operand, w: Operand) -> Any:
    strides, dilations, low, high = _windows(c, n, c.shape(x)[2:], c.shape(w)[2:])
    return c.conv(x, w, strides=strides, low=low, high=high, dilation=dilations, groups=n["group"])


@op("ConvTranspose")
def conv_transpose(c: Emitter, n: NodeView, x: Operand, w: Operand, bias: Operand | None = None) -> Any:
    """A convolution of the spread input with the mirrored kernel."""
    channels, each, *kernel = c.shape(w)
    axes, groups = range(len(kernel)), n["group"]
    strides, dilations = n.get("strides") or [1] * len(kernel), n.get("dilations") or [1] * len(kernel)
    extra = n.get("output_padding") or [0] * len(kernel)
    reach = [dilations[i] * (kernel[i] - 1) for i in axes]
    space, mode, want = c.shape(x)[2:], n["auto_pad"], n.get("output_shape")
    if want is None and mode.startswith("SAME"):
        want = [d * s for d, s in zip(space, strides)]
    if want is not None:
        low, high = [], []
        for i in axes:
            total = strides[i] * (space[i] - 1) + extra[i] + reach[i] + 1 - want[i]
            small = floordiv(total, 2)
            low.append(small if mode == "SAME_UPPER" else total - small)
            high.append(total - small if mode == "SAME_UPPER" else small)
    else:
        pads = n.get("pads") or [0] * 2 * len(kernel)
        low, high = list(pads[: len(kernel)]), list(pads[len(kernel) :])
    tail = tuple(3 + i for i in axes)
    w = c.view(w, groups, floordiv(channels, groups), each, *kernel)
    w = c.view(c.reverse(c.permute(w, (0, 2, 1, *tail)), axes=tail), groups * each, floordiv(channels, groups), *kernel)
    y = c.conv(
        x, w, strides=(1,) * len(kernel), low=[reach[i] - low[i] for i in axes],
        high=[reach[i] - high[i] + extra[i] for i in axes], dilation=dilations, input_dilation=strides, groups=groups,
    )  # fmt: skip
    return y if bias is None else c.add(y, c.along(bias, 1, c.rank(y)))


def integer_conv(c: Emitter, n: NodeView, x: Operand, w: Operand) -> Any:
    """Convolution of integers, exact: in f32 where no sum can leave 24 bits, else in f64. The result is i32."""
    each, *kernel = c.shape(w)[1:]
    count = math.prod(kernel) * (each if isinstance(each, int) else 2**20)
    work = DType.F32 if count * 255 * 255 < 2**24 else DType.F64
    return c.cast(_convolve(c, n, c.cast(x, dtype=work), c.cast(w, dtype=work)), dtype=DType.I32)


# -- pooling ---------------------------------------------------------------------------------------------------------------
def _pooling(c: Emitter, n: NodeView, x: Operand) -> tuple[dict[str, Any], list[DimLike]]:
    """Attributes of ``pool``, its ``high`` enough for ceil_mode; and ``high`` as the model declares it."""
    kernel, space = n["kernel_shape"], c.shape(x)[2:]
    strides, dilations, low, high = _windows(c, n, space, kernel)
    declared = list(high)
    if n.get("ceil_mode", 0):
        for i, size in enumerate(space):
            reach = dilations[i] * (kernel[i] - 1)
            room = size + low[i] + high[i] - reach - 1
            # a window that would begin in the padding behind does not exist
            begin = floordiv(size + low[i] - 1, strides[i]) + 1
            count = minimum(floordiv(room + strides[i] - 1, strides[i]) + 1, begin)
            high[i] = maximum((count - 1) * strides[i] + reach + 1 - size - low[i], 0)
    return {"kernel": kernel, "strides": strides, "low": low, "high": high, "dilation": dilations}, declared


@op("MaxPool")
def max_pool(c: Emitter, n: NodeView, x: Operand) -> Any:
    how, _ = _pooling(c, n, x)
    if not n.wants(1):
        return c.pool(x, kind="max", **how)
    return _pool_with_places(c, n, x, how)


def _pool_with_places(c: Emitter, n: NodeView, x: Operand, how: dict[str, Any]) -> tuple[Any, Any]:
    """Maxima and where they stand in the flattened tensor: the windows' elements are laid out along a last axis."""
    b, depth = c.shape(x)[:2]
    space = [c.static(x, 2 + i, "MaxPool with indices") for i in range(c.rank(x) - 2)]
    axes = range(len(space))
    least = float("-inf") if c.dtype(x).is_float else float(np.iinfo(c.dtype(x).np).min)
    padded = c.pad(x, low=(0, 0, *how["low"]), high=(0, 0, *how["high"]), value=least)
    counts = [
        (space[i] + how["low"][i] + how["high"][i] - how["dilation"][i] * (how["kernel"][i] - 1) - 1) // how["strides"][i] + 1
        for i in axes
    ]
    if min(*counts, *how["kernel"]) < 1 or math.prod(how["kernel"]) > MOST or math.prod(counts) > EVALUATE_LIMIT:
        raise n.fail(f"windows of {how['kernel']} at {counts} places are none, or too many")
    order = list(axes) if not n["storage_order"] else list(axes)[::-1]
    parts, places = [], []
    for offset in itertools.product(*(range(k) for k in how["kernel"])):
        part, place = padded, np.zeros(counts, np.int64)
        for i in axes:
            first = offset[i] * how["dilation"][i]
            part = c.cut(part, 2 + i, first, first + (counts[i] - 1) * how["strides"][i] + 1, how["strides"][i])
            at = np.arange(counts[i]) * how["strides"][i] + first - how["low"][i]
            step = math.prod(space[j] for j in order[order.index(i) + 1 :])
            place = place + (at * step).reshape([-1 if j == i else 1 for j in axes])
        parts.append(c.add_axes(part, -1))
        places.append(place)
    window = c.concat(*parts, axis=len(space) + 2)
    best = c.arg_max(window, axis=-1, keepdims=True)
    y = c.drop_axes(c.take_along(window, best, axis=-1), -1)
    table = np.stack(places, -1)
    at_best = c.drop_axes(c.take_along(c.expand(table, b, depth, *table.shape), best, axis=-1), -1)
    first = c.view(c.iota(size=b * depth), b, depth, *(1,) * len(space))
    return y, c.add(at_best, c.mul(first, math.prod(space)))


@op("AveragePool", since=7)
def average_pool(c: Emitter, n: NodeView, x: Operand) -> Any:
    how, declared = _pooling(c, n, x)
    total = c.pool(x, kind="sum", **how)
    include = bool(n["count_include_pad"])
    if (include and how["high"] == declared) or all(d == 0 for d in (*how["low"], *how["high"])):
        return c.div(total, float(math.prod(how["kernel"])))
    ones = c.full((1, 1, *c.shape(x)[2:]), 1, c.dtype(x))
    if include:  # what ceil_mode adds behind the declared padding never counts
        counted = [minimum(h, d) for h, d in zip(how["high"], declared)]
        ones = c.pad(ones, low=(0, 0, *how["low"]), high=(0, 0, *counted), value=1.0)
        how = {**how, "low": [0] * len(counted), "high": [h - d for h, d in zip(how["high"], counted)]}
    return c.div(total, c.pool(ones, kind="sum", **how))


@op("LpPool", since=2)
def lp_pool(c: Emitter, n: NodeView, x: Operand) -> Any:
    how, _ = _pooling(c, n, x)
    total = c.pool(c.pow(c.abs(x), float(n["p"])), kind="sum", **how)
    return c.pow(total, 1 / n["p"])


@op("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", since=1)
def global_pool(c: Emitter, n: NodeView, x: Operand) -> Any:
    how: dict[str, Any] = {"axes": tuple(range(2, c.rank(x))), "keepdims": True}
    if n.op == "GlobalLpPool":
        return c.pow(c.reduce_sum(c.pow(c.abs(x), float(n["p"])), **how), 1 / n["p"])
    return (c.reduce_mean if n.op == "GlobalAveragePool" else c.reduce_max)(x, **how)


@op("MaxUnpool")
def max_unpool(c: Emitter, n: NodeView, x: Operand, places: Operand, shape: Operand | None = None) -> Any:
    kernel = n["kernel_shape"]
    axes = range(len(kernel))
    strides, pads = n.get("strides") or [1] * len(kernel), n.get("pads") or [0] * 2 * len(kernel)
    natural = [(c.shape(x)[2 + i] - 1) * strides[i] + kernel[i] - pads[i] - pads[len(kernel) + i] for i in axes]
    inner = (*c.shape(x)[:2], *natural)
    flat = c.full((size_of(inner),), 0, c.dtype(x))
    count = size_of(c.shape(x))
    y = c.view(c.scatter(flat, c.view(places, count), c.view(x, count), axis=0), *inner)
    if shape is None:
        return y
    want = c.dims(shape, "the output shape of MaxUnpool")
    return padded(c, y, [0] * len(want), [w - d for w, d in zip(want, inner)])


@op("Col2Im")
def col2im(c: Emitter, n: NodeView, x: Operand, image: Operand, block: Operand) -> Any:
    """Each block's elements are added where they came from in the padded image."""
    size = [int(d) for d in c.numbers(image, "the image shape of Col2Im")]
    kernel = [int(d) for d in c.numbers(block, "the block shape of Col2Im")]
    axes = range(len(size))
    strides, dilations = n.get("strides") or [1] * len(size), n.get("dilations") or [1] * len(size)
    pads = n.get("pads") or [0] * 2 * len(size)
    padded = [size[i] + pads[i] + pads[len(size) + i] for i in axes]
    counts = [(padded[i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in axes]
    if min(*counts, *kernel) < 1 or math.prod(kernel) * math.prod(counts) > EVALUATE_LIMIT:
        raise n.fail(f"blocks of {kernel} in an image of {size} are none, or too many")
    b, total = c.shape(x)[0], c.shape(x)[1]
    depth = floordiv(total, math.prod(kernel))
    place = np.zeros((1,) * 2 * len(size), np.int64)
    for i in axes:
        at = np.arange(kernel[i])[:, None] * dilations[i] + np.arange(counts[i]) * strides[i]
        shape = [1] * 2 * len(size)
        shape[i], shape[len(size) + i] = kernel[i], counts[i]
        place = place + (at * math.prod(padded[i + 1 :])).reshape(shape)
    flat = c.view(x, b * depth, math.prod(kernel) * math.prod(counts))
    zeros = c.full((b * depth, math.prod(padded)), 0, c.dtype(x))
    y = c.view(c.scatter(zeros, place.ravel(), flat, axis=1, reduce="add"), b, depth, *padded)
    for i in axes:
        y = c.cut(y, 2 + i, pads[i], pads[i] + size[i])
    return y
