"""Convolution over any number of spatial axes, general enough that its gradients are convolutions too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import op as _op
from ..axes import Axis, AxisRule, Factor, whole
from ..checks import require_at_most, require_equal
from ..dims import DimLike
from ..errors import TypeMismatch
from ..op import ErrorSample, Op, Sample, concrete, floating, register, same_dtype
from ..types import TensorType, Type
from .elementwise import wave, wide

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Node, Value


@register
class Conv(Op):
    """Cross-correlation: x [b, c, *space], w [o, c/groups, *kernel] -> [b, o, *space']; f16 and bf16 accumulate in f32.

    ``out[b, o, p] = sum over c, k of x'[b, c, p*stride + k*dilation - low] * w[o, c, k]``, where x' is x with
    ``input_dilation - 1`` zeros between neighbours and zeros outside. ``high`` is the padding behind; a negative amount crops.
    Output channels fall into ``groups`` equal runs, each of which reads its own run of input channels. Missing dilations are 1.
    """

    name = "conv"
    kind = "product"
    precision = "half"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        strides: tuple[int, ...]
        low: tuple[DimLike, ...]
        high: tuple[DimLike, ...]
        dilation: tuple[int, ...] = ()
        input_dilation: tuple[int, ...] = ()
        groups: int = 1

        def canonical(self, *types: Type) -> Conv.Attrs:
            ones = (1,) * len(self.strides)
            return Conv.Attrs(
                self.strides, self.low, self.high, self.dilation or ones, self.input_dilation or ones, self.groups
            )

    def infer(self, attrs: Attrs, x: TensorType, w: TensorType) -> TensorType:
        n = floating(x, "x").rank - 2
        if n < 1 or floating(w, "the weight").rank != x.rank:
            raise TypeMismatch(f"conv takes x [b, c, *space] and a weight [o, c/groups, *kernel], not {x} and {w}")
        for name in ("strides", "low", "high", "dilation", "input_dilation"):
            if len(getattr(attrs, name)) != n:
                raise TypeMismatch(f"{name} {getattr(attrs, name)}: {x} needs {n}, one per spatial axis")
        for name in ("strides", "dilation", "input_dilation"):
            if min(getattr(attrs, name)) < 1:
                raise TypeMismatch(f"{name} {getattr(attrs, name)}: each must be at least 1")
        same_dtype(x, w)
        if attrs.groups < 1:
            raise TypeMismatch(f"groups {attrs.groups}: at least 1")
        require_equal(w.shape[0] % attrs.groups, 0, f"{w.shape[0]} output channels do not divide into {attrs.groups} groups")
        require_equal(x.shape[1], w.shape[1] * attrs.groups, "channels of x, and of the weight times groups")
        space = []
        for i in range(n):
            reach = attrs.dilation[i] * (w.shape[2 + i] - 1)
            room = _room(attrs, i, x.shape[2 + i]) - reach
            fits = f"a kernel that spans {reach + 1} does not fit into the padded axis {2 + i} of {x}"
            require_at_most(1 - attrs.strides[i], room, fits)
            space.append((room - 1) // attrs.strides[i] + 1)
        return x.with_shape(x.shape[0], w.shape[0], *space)

    def axes(self, attrs: Attrs, x: TensorType, w: TensorType) -> AxisRule:
        each = Factor(w.shape[1], "reduced", "sum", does="has channels along {}, and sums over them")
        group: Axis = (Factor(attrs.groups),) if attrs.groups > 1 else ()
        batch, out = (Factor(x.shape[0]),), (*group, Factor(w.shape[0] // attrs.groups))
        space: list[Axis] = []
        does = "is a convolution over {}: a cache of its last inputs is not derived"
        for i, d in enumerate(x.shape[2:]):
            alone = (w.shape[2 + i], attrs.low[i], attrs.high[i], attrs.strides[i], attrs.input_dilation[i]) == (1, 0, 0, 1, 1)
            if alone:  # each place by itself, as a linear layer would
                space.append((Factor(d),))
                continue
            after = attrs.dilation[i] * (w.shape[2 + i] - 1) - attrs.low[i]
            plain = attrs.input_dilation[i] == 1
            reach = (attrs.low[i], after, attrs.strides[i]) if plain else None
            space.append((Factor(d, "window" if plain else "whole", window=reach, does=does),))
        kernel = whole(w.shape[2:])
        return AxisRule(((batch, (*group, each), *space), (out, (each,), *kernel)), ((batch, out, *space),))

    def reference(self, attrs: Attrs, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        (b, c, *_), (o, _, *kernel) = x.shape, w.shape
        n, g = len(kernel), attrs.groups
        cols = wide(x)
        out: list[int] = []
        for i in reversed(range(n)):  # each spatial axis becomes two: the output's and the kernel's
            size = x.shape[2 + i]
            stride, dilation, spread = attrs.strides[i], attrs.dilation[i], attrs.input_dilation[i]
            count = (concrete(_room(attrs, i, size)) - 1 - dilation * (kernel[i] - 1)) // stride + 1
            at = np.arange(count)[:, None] * stride + np.arange(kernel[i]) * dilation - concrete(attrs.low[i])
            at = np.where((at % spread == 0) & (at >= 0) & (at < size * spread), at // spread, size)
            zero = [(0, int(j == 2 + i)) for j in range(cols.ndim)]  # place ``size`` holds a zero
            cols = np.take(np.pad(cols, zero), at, 2 + i)
            out.insert(0, count)
        cols = cols.reshape(b, g, c // g, *cols.shape[2:])
        cols = cols.transpose(0, 1, *range(3, 3 + 2 * n, 2), 2, *range(4, 4 + 2 * n, 2))
        rows = cols.reshape(b, g, int(np.prod(out)), c // g * int(np.prod(kernel)))
        y = rows @ wide(w).reshape(g, o // g, rows.shape[-1]).transpose(0, 2, 1)
        return y.transpose(0, 1, 3, 2).reshape(b, o, *out).astype(x.dtype)

    def multiply_adds(self, attrs: Attrs, x: TensorType, w: TensorType) -> DimLike:
        return self.infer(attrs, x, w).size * w.with_shape(*w.shape[1:]).size

    def vjp(self, b: Builder, node: Node, grad: Value) -> Sequence[Value | None]:
        (x, w), a = node.inputs, node.attrs
        assert isinstance(a, Conv.Attrs)
        g, (n, c, *space), (o, each, *kernel), out = a.groups, x.shape, w.shape, grad.shape[2:]
        axes = range(len(space))
        tail = tuple(3 + i for i in axes)
        reach = [a.dilation[i] * (kernel[i] - 1) for i in axes]
        spread = [(space[i] - 1) * a.input_dilation[i] for i in axes]
        stride = [(out[i] - 1) * a.strides[i] for i in axes]

        # of x: the gradient, spread by the strides, meets the kernel backwards
        back = b.reverse(b.reshape(w, shape=(g, o // g, each, *kernel)), axes=tail)
        back = b.reshape(b.transpose(back, perm=(0, 2, 1, *tail)), shape=(c, o // g, *kernel))
        low = [reach[i] - a.low[i] for i in axes]
        high = [spread[i] + a.low[i] - stride[i] for i in axes]
        gx = b.conv(
            grad, back, strides=a.input_dilation, low=low, high=high, dilation=a.dilation, input_dilation=a.strides, groups=g
        )
        # of w: x meets the gradient, channels and batch having changed places within each group
        xs = b.transpose(b.reshape(x, shape=(n, g, each, *space)), perm=(2, 1, 0, *tail))
        gs = b.transpose(b.reshape(grad, shape=(n, g, o // g, *out)), perm=(1, 2, 0, *tail))
        high = [reach[i] + stride[i] - spread[i] - a.low[i] for i in axes]
        gw = b.conv(
            b.reshape(xs, shape=(each, g * n, *space)), b.reshape(gs, shape=(o, n, *out)), strides=a.dilation, low=a.low,
            high=high, dilation=a.strides, input_dilation=a.input_dilation, groups=g,
        )  # fmt: skip
        return [gx, b.transpose(gw, perm=(1, 0, *(2 + i for i in axes)))]

    def samples(self) -> Iterable[Sample]:
        yield Sample([wave(2, 3, 7), wave(4, 3, 3)], {"strides": (1,), "low": (2,), "high": (0,)})
        yield Sample(
            [wave(2, 4, 9), wave(6, 2, 3)], {"strides": (2,), "low": (1,), "high": (2,), "dilation": (2,), "groups": 2}
        )
        yield Sample([wave(1, 3, 8, 6), wave(4, 3, 2, 3)], {"strides": (2, 3), "low": (0, 0), "high": (0, 1)})
        yield Sample(  # transposed
            [wave(2, 2, 3, 2), wave(3, 2, 3, 2)],
            {"strides": (1, 1), "low": (2, 1), "high": (1, 1), "input_dilation": (2, 3)},
        )
        yield Sample([wave(1, 3, 8), wave(3, 1, 3)], {"strides": (1,), "low": (-1,), "high": (-2,), "groups": 3})
        yield Sample([wave(1, 2, 2), wave(2, 2, 3)], {"strides": (1,), "low": (0,), "high": (0,)})  # no place fits
        yield Sample([wave(1, 2, 3, 4, 3), wave(2, 2, 2, 2, 3)], {"strides": (1,) * 3, "low": (0,) * 3, "high": (1, 0, 1)})
        yield Sample(
            [wave(2, 40, 5).astype(np.float16), wave(3, 40, 3).astype(np.float16)],
            {"strides": (1,), "low": (1,), "high": (1,)}, grad=(),
        )  # fmt: skip

    def errors(self) -> Iterable[ErrorSample]:
        one = {"strides": (1,), "low": (0,), "high": (0,)}
        yield ErrorSample(["f32[b, 3, s]", "f32[4, 2, 3]"], one, "channels of x")
        yield ErrorSample(["f32[b, 4, s]", "f32[5, 2, 3]"], {**one, "groups": 2}, "do not divide into 2 groups")
        yield ErrorSample(["f32[b, 3, 4]", "f32[4, 3, 6]"], one, "does not fit into the padded axis 2")
        yield ErrorSample(["f32[b, 3]", "f32[4, 3]"], one, "conv takes x")
        yield ErrorSample(["f32[b, 3, s, t]", "f32[4, 3, 3, 3]"], one, "needs 2, one per spatial axis")
        yield ErrorSample(["f32[b, 3, s]", "f32[4, 3, 3]"], {**one, "strides": (0,)}, "at least 1")
        yield ErrorSample(["f32[b, 3, s]", "f16[4, 3, 3]"], one, "element types differ")
        yield ErrorSample(["i32[b, 3, s]", "i32[4, 3, 3]"], one, "must be float")


def _room(attrs: Conv.Attrs, i: int, size: DimLike) -> DimLike:
    """Places along spatial axis i of x, dilated and padded."""
    return (size - 1) * attrs.input_dilation[i] + 1 + attrs.low[i] + attrs.high[i]


__all__ = ["Conv"]
