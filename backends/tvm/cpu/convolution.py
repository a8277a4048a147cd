"""Convolutions as products of matrices: the kernel's weights times the windows of x, which are read where they lie."""

from __future__ import annotations

import math
from typing import Any

from wasat.ir import Builder, DimLike, Node, Value

from .kernels.gemm import Axes, Gemm, Matrix, Windows
from .kernels.isa import Isa
from .panels import known

_ROWS = 8  # of channels of a group, from which on it pays to find each place of a window with divisions


def convolution(b: Builder, node: Node, isa: Isa, threads: int) -> tuple[Gemm, list[Value], bool] | None:
    """The product that is a convolution by weights of known sizes, and its operands, made by ``b`` where x must be padded.

    Its result is y [n, o, *space], row-major, or, where the third is true, [o, n, *space]: few places of many pictures (the
    gradient of a weight: as many places as it has taps) fill panels only together. None where loops are as good: nothing to
    compute, one channel out of a group (a depthwise convolution), or few of sizes that are not known.
    """
    a: Any = node.attrs
    x, w = node.inputs
    (n, *_), (o, each, *kernel), (_, _, *out) = x.shape, w.shape, node.output.shape
    own, places = o // a.groups, math.prod(out)
    if own == 1 or (own < _ROWS and not known(n, places)) or 0 in (*x.shape, *w.shape, *node.output.shape):
        return None
    x = padded(b, x, a.low, a.high, a.input_dilation)
    strides = [math.prod(x.shape[i + 1 :]) for i in range(len(x.shape))]
    taps: Axes = tuple((k, d * s) for k, d, s in zip(kernel, a.dilation, strides[2:]))
    steps: Axes = tuple((k, d * s) for k, d, s in zip(out, a.strides, strides[2:]))
    depth = each * math.prod(kernel)

    def wasted(columns: int) -> float:
        return math.ceil(columns / isa.columns) * isa.columns / columns

    together = known(n, places) and n > 1 and wasted(places) > 1.25 * wasted(n * places)
    if together:
        steps = ((n, strides[0]), *steps)
    batch, along = (() if together else (n,)), (() if together else (0,))
    size = n * o * places
    desc = Gemm(
        isa, own, n * places if together else places, depth,
        Matrix(o * depth, depth, 1, (*along, own * depth)),
        Windows(math.prod(x.shape), _merged(((each, strides[1]), *taps)), _merged(steps),
                (*(() if together else (strides[0],)), each * strides[1])),
        Matrix(size, n * places, 1, (own * n * places,)) if together else Matrix(size, places, 1, (o * places, own * places)),
        (*batch, a.groups), threads,
    )  # fmt: skip
    return desc, [w, x], together


def padded(b: Builder, x: Value, low: Any, high: Any, spread: Any) -> Value:
    """x [b, c, *space] with ``spread - 1`` zeros between neighbours and ``low`` and ``high`` around; negative ones cut."""
    shape = tuple(x.shape)
    if any(s > 1 for s in spread):
        apart = [n for d, s in zip(shape[2:], spread) for n in (d, s)]
        x = b.reshape(x, shape=(*shape[:2], *(n for d in shape[2:] for n in (d, 1))))
        none = (0,) * (2 + 2 * len(spread))
        x = b.pad(x, low=none, high=(0, 0, *(n for s in spread for n in (0, s - 1))))
        x = b.reshape(x, shape=(*shape[:2], *(d * s for d, s in zip(apart[::2], apart[1::2]))))
        shape = (*shape[:2], *((d - 1) * s + 1 for d, s in zip(shape[2:], spread)))
        x = b.slice(x, starts=(0,) * len(shape), stops=shape)
    if any(p < 0 for p in (*low, *high)):
        starts = (0, 0, *(max(0, -p) for p in low))
        stops = (*shape[:2], *(d - max(0, -p) for d, p in zip(shape[2:], high)))
        x = b.slice(x, starts=starts, stops=stops)
    if any(p > 0 for p in (*low, *high)):
        x = b.pad(x, low=(0, 0, *(max(0, p) for p in low)), high=(0, 0, *(max(0, p) for p in high)))
    return x


def _merged(axes: Axes) -> Axes:
    """The same places from fewer axes: those of one element go, neighbours that continue each other become one."""
    made: list[tuple[DimLike, DimLike]] = []
    for extent, stride in axes:
        if extent == 1:
            continue
        if made and made[-1][1] == extent * stride:
            made[-1] = (made[-1][0] * extent, stride)
        else:
            made.append((extent, stride))
    return tuple(made) or ((1, 1),)
