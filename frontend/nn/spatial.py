"""Over space, ``[b, channels, *space]``: pools, transposed convolutions, other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wasat.ir import Dim, DimLike
from wasat.ir.dims import floordiv

from wasat import ir

from .arrays import floats
from .functions import arange, full, gather, minimum, where
from .image import resize
from .module import Module, Parameter
from .tensor import Tensor, emit, fail

Sizes = int | Sequence[int]


def _each(what: str, x: Sizes, n: int, least: int) -> tuple[int, ...]:
    out = (x,) * n if isinstance(x, int) else tuple(x)
    if len(out) != n or any(isinstance(k, bool) or not isinstance(k, int) or k < least for k in out):
        fail(f"{what} is {x!r}; expected an int of at least {least}, or {n} of them")
    return out


def _space(what: str, x: Tensor, n: int) -> None:
    floats(what, x)
    if x.rank != n + 2:
        axes = {1: "s", 2: "height, width"}.get(n, "*space")
        fail(f"nn.{what} takes [b, channels, {axes}], not {x.value!r}")


def _pool(
    what: str, kind: str, n: int, x: Tensor, kernel_size: Sizes, stride: Sizes | None, padding: Sizes, dilation: Sizes = 1
) -> tuple[Tensor, tuple[int, ...], dict[str, Any]]:
    _space(what, x, n)
    kernel = _each(f"nn.{what}: kernel_size", kernel_size, n, 1)
    strides = kernel if stride is None else _each(f"nn.{what}: stride", stride, n, 1)
    pads = _each(f"nn.{what}: padding", padding, n, 0)
    if any(2 * p > k for p, k in zip(pads, kernel)):
        fail(f"nn.{what}: padding {padding!r} is more than half of the kernel {kernel_size!r}: windows would hold nothing else")
    attrs: dict[str, Any] = {
        "kernel": kernel, "strides": strides, "low": pads, "high": pads,
        "dilation": _each(f"nn.{what}: dilation", dilation, n, 1),
    }  # fmt: skip
    return emit("pool", x, kind=kind, **attrs), kernel, attrs


def max_pool1d(x: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1) -> Tensor:
    """Largest of each window of ``[b, c, s]``; the stride is the kernel's size by default."""
    return _pool("max_pool1d", "max", 1, x, kernel_size, stride, padding, dilation)[0]


def max_pool2d(x: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1) -> Tensor:
    """Largest of each window of ``[b, c, height, width]``; the stride is the kernel's size by default."""
    return _pool("max_pool2d", "max", 2, x, kernel_size, stride, padding, dilation)[0]


def _avg_pool(n: int, x: Tensor, kernel: Sizes, stride: Sizes | None, padding: Sizes, count_include_pad: bool) -> Tensor:
    total, size, attrs = _pool(f"avg_pool{n}d", "sum", n, x, kernel, stride, padding)
    if count_include_pad or not any(attrs["low"]):
        count = 1
        for k in size:
            count *= k
        return total / float(count)
    return total / emit("pool", full((1, 1, *x.shape[2:]), 1.0, x.dtype), kind="sum", **attrs)


def avg_pool1d(
    x: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, count_include_pad: bool = True
) -> Tensor:
    """Mean of each window of ``[b, c, s]``; padding counts as zeros, or not at all."""
    return _avg_pool(1, x, kernel_size, stride, padding, count_include_pad)


def avg_pool2d(
    x: Tensor, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, count_include_pad: bool = True
) -> Tensor:
    """Mean of each window of ``[b, c, height, width]``; padding counts as zeros, or not at all."""
    return _avg_pool(2, x, kernel_size, stride, padding, count_include_pad)


def _adaptive(what: str, n: int, x: Tensor, size: DimLike | Sequence[DimLike], largest: bool) -> Tensor:
    """Window i of ``out`` is from ``i n / out``, rounded down, to ``(i + 1) n / out``, rounded up."""
    _space(what, x, n)
    sizes: list[DimLike] = [size] * n if isinstance(size, (int, Dim)) else list(size)
    if len(sizes) != n:
        fail(f"nn.{what}: the size is one number, or {n}, not {size!r}")
    for axis, out in enumerate(sizes, 2):
        d = x.shape[axis]
        if ir.equal(d, out) is True:
            continue
        if ir.equal(out, 1) is True:
            x = x.max(axis, keepdims=True) if largest else x.mean(axis, keepdims=True)
            continue
        first = arange(out) * d // out
        stop = ((arange(out) + 1) * d + (out - 1)) // out
        at = first[:, None] + arange(floordiv(d + (out - 1), out) + 1)
        taken = gather(x, minimum(at, d - 1), axis=axis)
        there = (at < stop[:, None]).reshape(*at.shape, *(1,) * (x.rank - axis - 1))
        if largest:
            x = where(there, taken, float("-inf")).max(axis + 1)
        else:
            count = (stop - first).cast(x.dtype).reshape(out, *(1,) * (x.rank - axis - 1))
            x = where(there, taken, 0.0).sum(axis + 1) / count
    return x


def adaptive_avg_pool1d(x: Tensor, size: DimLike) -> Tensor:
    """``[b, c, s] -> [b, c, size]``: means of windows that cover the axis."""
    return _adaptive("adaptive_avg_pool1d", 1, x, size, False)


def adaptive_avg_pool2d(x: Tensor, size: DimLike | Sequence[DimLike]) -> Tensor:
    """``[b, c, height, width] -> [b, c, *size]``: means of windows that cover both axes."""
    return _adaptive("adaptive_avg_pool2d", 2, x, size, False)


def adaptive_max_pool1d(x: Tensor, size: DimLike) -> Tensor:
    """``[b, c, s] -> [b, c, size]``: the largest of windows that cover the axis."""
    return _adaptive("adaptive_max_pool1d", 1, x, size, True)


def adaptive_max_pool2d(x: Tensor, size: DimLike | Sequence[DimLike]) -> Tensor:
    """``[b, c, height, width] -> [b, c, *size]``: the largest of windows that cover both axes."""
    return _adaptive("adaptive_max_pool2d", 2, x, size, True)


def _conv_transpose(
    n: int, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, output_padding: Sizes,
    groups: int, dilation: Sizes,
) -> Tensor:  # fmt: skip
    what = f"conv_transpose{n}d"
    _space(what, x, n)
    _space(what, weight, n)
    strides, rates = _each(f"nn.{what}: stride", stride, n, 1), _each(f"nn.{what}: dilation", dilation, n, 1)
    pads, more = _each(f"nn.{what}: padding", padding, n, 0), _each(f"nn.{what}: output_padding", output_padding, n, 0)
    if any(m >= max(s, d) for m, s, d in zip(more, strides, rates)):
        fail(f"nn.{what}: output_padding {output_padding!r} must be smaller than the stride or the dilation")
    inputs, outputs, *kernel = weight.shape
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or ir.equal(inputs % groups, 0) is not True:
        fail(f"nn.{what}: {inputs} input channels do not divide into {groups!r} groups")
    if ir.equal(x.shape[1], inputs) is not True:
        fail(f"nn.{what}: the weight is [inputs, outputs / groups, *kernel]; {weight.value!r} does not fit {x.value!r}")
    space = range(2, n + 2)
    w: Tensor = emit("reverse", weight, axes=tuple(space))
    w = w.reshape(groups, inputs // groups, outputs, *kernel).transpose(0, 2, 1, *(i + 1 for i in space))
    reach = [d * (k - 1) for d, k in zip(rates, kernel)]
    y: Tensor = emit(
        "conv", x, w.reshape(groups * outputs, inputs // groups, *kernel), strides=(1,) * n,
        low=tuple(r - p for r, p in zip(reach, pads)), high=tuple(r - p + m for r, p, m in zip(reach, pads, more)),
        dilation=rates, input_dilation=strides, groups=groups,
    )  # fmt: skip
    return y if bias is None else y + bias.reshape(-1, *(1,) * n)


def conv_transpose1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1, padding: Sizes = 0, output_padding: Sizes = 0,
    groups: int = 1, dilation: Sizes = 1,
) -> Tensor:  # fmt: skip
    """The gradient of a convolution as a function: ``x[b, c, s]``, ``weight[c, outputs / groups, k]``."""
    return _conv_transpose(1, x, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sizes = 1, padding: Sizes = 0, output_padding: Sizes = 0,
    groups: int = 1, dilation: Sizes = 1,
) -> Tensor:  # fmt: skip
    """The gradient of a convolution as a function: ``x[b, c, h, w]``, ``weight[c, outputs / groups, p, q]``."""
    return _conv_transpose(2, x, weight, bias, stride, padding, output_padding, groups, dilation)


MODES = {"nearest": (1, 2), "linear": (1,), "bilinear": (2,), "bicubic": (2,)}
"""Ways to interpolate, and for how many axes of space."""


def interpolate(
    x: Tensor, size: DimLike | Sequence[DimLike] | None = None, scale_factor: int | None = None, mode: str = "nearest"
) -> Tensor:
    """``[b, c, *space]`` in another ``size`` (or a whole ``scale_factor`` times as large), as torch with align_corners False.

    ``mode``: "nearest", "linear" (of ``[b, c, s]``), "bilinear" or "bicubic" (of ``[b, c, height, width]``).
    """
    n = x.rank - 2
    floats("interpolate", x)
    if mode not in MODES:
        fail(f"nn.interpolate: the mode is one of {', '.join(MODES)}, not {mode!r}")
    if n not in MODES[mode]:
        fail(f"nn.interpolate: {mode} is for [b, channels, {' or '.join(f'{k} axes' for k in MODES[mode])}], not {x.value!r}")
    if (size is None) is (scale_factor is None):
        fail("nn.interpolate takes either size= or scale_factor=")
    if scale_factor is not None:
        if isinstance(scale_factor, bool) or not isinstance(scale_factor, int) or scale_factor < 1:
            fail(f"nn.interpolate: scale_factor is a whole number, not {scale_factor!r}; say the size instead")
        sizes: list[DimLike] = [d * scale_factor for d in x.shape[2:]]
    else:
        sizes = [size] * n if isinstance(size, (int, Dim)) else list(size or ())
    if len(sizes) != n:
        fail(f"nn.interpolate: the size of {x.value!r} is {n} numbers, not {size!r}")
    if mode == "nearest":
        for axis, out in enumerate(sizes, 2):
            if ir.equal(x.shape[axis], out) is not True:
                x = gather(x, arange(out) * x.shape[axis] // out, axis=axis)
        return x
    if n == 1:
        return interpolate(x[:, :, None], [1, *sizes], mode="bilinear").reshape(*x.shape[:2], *sizes)
    return resize(x.transpose(0, 2, 3, 1), sizes, method=mode, antialias=False).transpose(0, 3, 1, 2)


def _factor(what: str, x: Tensor, factor: int) -> tuple[DimLike, DimLike, DimLike, DimLike]:
    _space(what, x, 2)
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        fail(f"nn.{what}: the factor is an int of at least 1, not {factor!r}")
    b, c, h, w = x.shape
    return b, c, h, w


def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """``[b, c * r * r, h, w] -> [b, c, h * r, w * r]``: channels become places (arXiv:1609.05158)."""
    r = upscale_factor
    b, c, h, w = _factor("pixel_shuffle", x, r)
    if ir.equal(c % (r * r), 0) is not True:
        fail(f"nn.pixel_shuffle: {c} channels do not divide into {r} x {r} places")
    y = x.reshape(b, floordiv(c, r * r), r, r, h, w).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(b, floordiv(c, r * r), h * r, w * r)


def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    """``[b, c, h * r, w * r] -> [b, c * r * r, h, w]``: the inverse of :func:`pixel_shuffle`."""
    r = downscale_factor
    b, c, h, w = _factor("pixel_unshuffle", x, r)
    if any(ir.equal(d % r, 0) is not True for d in (h, w)):
        fail(f"nn.pixel_unshuffle: {h} x {w} places do not divide by {r}")
    y = x.reshape(b, c, floordiv(h, r), r, floordiv(w, r), r).transpose(0, 1, 3, 5, 2, 4)
    return y.reshape(b, c * r * r, floordiv(h, r), floordiv(w, r))


# -- layers -------------------------------------------
class _Pool(Module):
    def __init__(self, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0) -> None:
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding


class MaxPool1d(_Pool):
    """:func:`max_pool1d` as a layer."""

    def __call__(self, x: Tensor) -> Tensor:
        return max_pool1d(x, self.kernel_size, self.stride, self.padding)


class MaxPool2d(_Pool):
    """:func:`max_pool2d` as a layer."""

    def __call__(self, x: Tensor) -> Tensor:
        return max_pool2d(x, self.kernel_size, self.stride, self.padding)


class AvgPool1d(_Pool):
    """:func:`avg_pool1d` as a layer."""

    def __call__(self, x: Tensor) -> Tensor:
        return avg_pool1d(x, self.kernel_size, self.stride, self.padding)


class AvgPool2d(_Pool):
    """:func:`avg_pool2d` as a layer."""

    def __call__(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, self.kernel_size, self.stride, self.padding)


class AdaptiveAvgPool2d(Module):
    """:func:`adaptive_avg_pool2d` as a layer."""

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = size

    def __call__(self, x: Tensor) -> Tensor:
        return adaptive_avg_pool2d(x, self.size)


class _ConvTranspose(Module):
    axes = 1

    def __init__(
        self, inputs: int, outputs: int, kernel: Sizes, stride: Sizes = 1, padding: Sizes = 0, output_padding: Sizes = 0,
        groups: int = 1, bias: bool = True, dilation: Sizes = 1,
    ) -> None:  # fmt: skip
        size = (kernel,) * self.axes if isinstance(kernel, int) else tuple(kernel)
        if len(size) != self.axes or inputs % groups or outputs % groups:
            raise ir.WasatError(
                f"{type(self).__name__}: kernel {kernel!r}, {inputs} and {outputs} channels, {groups} groups do not fit"
            )
        fan_in = outputs // groups
        for k in size:
            fan_in *= k
        self.weight = Parameter((inputs, outputs // groups, *size), std=fan_in**-0.5)
        self.bias = Parameter((outputs,), std=0.0) if bias else None
        self.options = (stride, padding, output_padding, groups, dilation)

    def __call__(self, x: Tensor) -> Tensor:
        return _conv_transpose(self.axes, x, self.weight, self.bias, *self.options)


class ConvTranspose1d(_ConvTranspose):
    """``x[b, inputs, s] -> [b, outputs, s']``, weight ``[inputs, outputs / groups, k]``."""


class ConvTranspose2d(_ConvTranspose):
    """``x[b, inputs, h, w] -> [b, outputs, h', w']``, weight ``[inputs, outputs / groups, p, q]``."""

    axes = 2
