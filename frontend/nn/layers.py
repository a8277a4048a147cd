"""Layers: small modules written in plain math, so that the passes see formulas and not names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wasat.ir import DimLike, DType, WasatError

from . import functions as F
from .module import Module, Parameter
from .tensor import Tensor, current, emit

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) * F.relu(x),
    "sigmoid": F.sigmoid,
    "silu": F.silu,
    "tanh": F.tanh,
}


def activation(name: str) -> Any:
    """The activation function called ``name``."""
    if name not in ACTIVATIONS:
        raise WasatError(f"there is no activation {name!r}; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _short(path: str) -> str | None:
    return path.rpartition(".")[2] or None


def _sizes(who: object, **sizes: int) -> None:
    for name, n in sizes.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise WasatError(f"{type(who).__name__}: {name} is {n!r}; expected a positive int")


class Linear(Module):
    """``x[..., inputs] -> [..., outputs]``: x @ weightᵀ + bias, weight ``[outputs, inputs]``."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False, dtype: DType | str = "f32") -> None:
        _sizes(self, inputs=inputs, outputs=outputs)
        self.weight = Parameter((outputs, inputs), dtype, std=inputs**-0.5)
        self.bias = Parameter((outputs,), dtype, std=0.0) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias, name=_short(current().path))


class Embedding(Module):
    """``ids[...] -> [..., dim]``: rows of weight ``[size, dim]``."""

    def __init__(self, size: int, dim: int, dtype: DType | str = "f32", std: float = 0.02) -> None:
        _sizes(self, size=size, dim=dim)
        self.weight = Parameter((size, dim), dtype, std=std)

    def __call__(self, ids: Tensor) -> Tensor:
        return emit("embedding", self.weight, ids, dtype=self.weight.dtype)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last axis, computed in f32."""
    y = x.cast(DType.F32)
    y = y * F.rsqrt((y * y).mean(axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * weight.cast(DType.F32)
    return y.cast(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last axis, computed in f32."""
    y = x.cast(DType.F32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * F.rsqrt((y * y).mean(axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * weight.cast(DType.F32)
    y = y if bias is None else y + bias.cast(DType.F32)
    return y.cast(x.dtype)


class RMSNorm(Module):
    """Root-mean-square normalization of the last axis; the scale is ``offset + weight`` (Gemma 2 and 3: offset 1)."""

    def __init__(self, dim: int, eps: float = 1e-6, offset: float = 0.0, dtype: DType | str = "f32") -> None:
        _sizes(self, dim=dim)
        self.weight = Parameter((dim,), dtype, mean=1.0 - offset, std=0.0)
        self.eps, self.offset = eps, offset

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight + self.offset if self.offset else self.weight, self.eps)


class LayerNorm(Module):
    """Normalization of the last axis to mean 0 and variance 1, then ``* weight + bias``."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True, dtype: DType | str = "f32") -> None:
        _sizes(self, dim=dim)
        self.weight = Parameter((dim,), dtype, mean=1.0, std=0.0)
        self.bias = Parameter((dim,), dtype, std=0.0) if bias else None
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class MLP(Module):
    """``down(act(up(x)))``."""

    def __init__(self, dim: int, hidden: int, act: str = "gelu", bias: bool = True) -> None:
        self.up_proj = Linear(dim, hidden, bias)
        self.down_proj = Linear(hidden, dim, bias)
        self.act = activation(act)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


class GLU(Module):
    """``down(act(gate(x)) * up(x))``: the gated feed-forward layer (SwiGLU with silu, GeGLU with gelu)."""

    def __init__(self, dim: int, hidden: int, act: str = "silu", bias: bool = False) -> None:
        self.gate_proj = Linear(dim, hidden, bias)
        self.up_proj = Linear(dim, hidden, bias)
        self.down_proj = Linear(hidden, dim, bias)
        self.act = activation(act)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Dropout(Module):
    """Zeroes elements with probability ``rate`` while training (``trace(..., training=True)``); needs a key there.

    All layers of a model can be given one key: each call draws a mask of its own (:func:`.functions.dropout`).
    """

    def __init__(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise WasatError(f"Dropout: rate is {rate!r}; expected a probability below 1")
        self.rate = rate

    def __call__(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        return F.dropout(x, key, self.rate)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, strides: Sequence[int], low: Sequence[DimLike],
    high: Sequence[DimLike], dilation: Sequence[int], groups: int = 1,
) -> Tensor:  # fmt: skip
    """``x[b, c, *space]``, ``weight[o, c/groups, *kernel]``, ``bias[o]`` -> ``[b, o, *space']``."""
    n = len(strides)
    y: Tensor = emit(
        "conv", x, weight, strides=tuple(strides), low=tuple(low), high=tuple(high), dilation=tuple(dilation),
        input_dilation=(1,) * n, groups=groups,
    )  # fmt: skip
    return y if bias is None else y + bias.reshape(-1, *(1,) * n)


class _Conv(Module):
    axes = 1

    def __init__(
        self, inputs: int, outputs: int, kernel: int | Sequence[int], stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0, dilation: int | Sequence[int] = 1, groups: int = 1, bias: bool = True,
    ) -> None:  # fmt: skip
        _sizes(self, inputs=inputs, outputs=outputs, groups=groups)
        if inputs % groups or outputs % groups:
            raise WasatError(f"{type(self).__name__}: {inputs} inputs and {outputs} outputs do not split into {groups} groups")
        size = self._each(kernel)
        self.stride, self.dilation, self.groups = self._each(stride), self._each(dilation), groups
        reach = [d * (k - 1) for d, k in zip(self.dilation, size)]
        if padding == "causal":
            self.low, self.high = reach, [0] * self.axes
        elif padding == "same":
            self.low, self.high = [r // 2 for r in reach], [r - r // 2 for r in reach]
        elif isinstance(padding, str):
            raise WasatError(f"padding {padding!r} is none of: a number, one number per axis, 'same', 'causal'")
        else:
            self.low = self.high = self._each(padding)
        fan_in = inputs // groups
        for k in size:
            fan_in *= k
        self.weight = Parameter((outputs, inputs // groups, *size), std=fan_in**-0.5)
        self.bias = Parameter((outputs,), std=0.0) if bias else None

    def _each(self, x: int | Sequence[int]) -> list[int]:
        each = [x] * self.axes if isinstance(x, int) else list(x)
        if len(each) != self.axes:
            raise WasatError(f"{type(self).__name__}: {x} has {len(each)} numbers; expected one, or {self.axes}")
        return each

    def __call__(self, x: Tensor) -> Tensor:
        return conv(
            x, self.weight, self.bias, strides=self.stride, low=self.low, high=self.high, dilation=self.dilation,
            groups=self.groups,
        )  # fmt: skip


class Conv1d(_Conv):
    """``x[b, inputs, s] -> [b, outputs, s']``; padding is a number, "same", or "causal" (all on the left)."""

    axes = 1


class Conv2d(_Conv):
    """``x[b, inputs, height, width] -> [b, outputs, height', width']``; padding: a number, one per axis, "same"."""

    axes = 2
