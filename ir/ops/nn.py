"""Activations, softmax, normalizations: composites with stable references."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import op as _op
from ..axes import AxisRule, Factor, along, free, reduced
from ..checks import require_equal
from ..dims import equal
from ..errors import TypeMismatch
from ..op import Attrs, AxisIndex, ErrorSample, Op, Sample, axis_of, floating, register
from ..types import DType, TensorType, Type
from .elementwise import erf, grid, wide
from .reduce import ReduceAttrs, reduced_shape

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Node, Value


class Activation(Op):
    """Base of elementwise float functions with a decomposition."""

    kind = "elementwise"

    def infer(self, attrs: Any, x: TensorType) -> TensorType:
        return floating(x)

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 4, low=-3, high=3)])
        yield Sample([np.array([-100.0, 0.1, 100.0], np.float32)], grad=())

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["i32[2]"], {}, "must be float")


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow, in f32 or wider."""
    w = wide(x)
    e = np.exp(-np.abs(w))
    return np.where(w >= 0, 1 / (1 + e), e / (1 + e)).astype(w.dtype)


@register
class Sigmoid(Activation):
    """1 / (1 + exp(-x))."""

    name = "sigmoid"

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return sigmoid(x).astype(x.dtype)

    def decompose(self, b: Builder, attrs: Attrs, x: Value) -> Value:
        return b.mul(b.add(b.tanh(b.mul(x, 0.5)), 1.0), 0.5)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        y = node.output
        return [b.mul(g, b.mul(y, b.sub(1.0, y)))]


@register
class Silu(Activation):
    """x * sigmoid(x) (SiLU, Swish; arXiv:1606.08415)."""

    name = "silu"

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return (wide(x) * sigmoid(x)).astype(x.dtype)

    def decompose(self, b: Builder, attrs: Attrs, x: Value) -> Value:
        return b.mul(x, b.sigmoid(x))


@register
class Relu(Activation):
    """max(x, 0). The gradient at 0 is 0."""

    name = "relu"

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.maximum(x, np.zeros((), x.dtype))

    def decompose(self, b: Builder, attrs: Attrs, x: Value) -> Value:
        return b.maximum(x, 0.0)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        return [b.select(b.greater(node.inputs[0], 0.0), g, b.constant(0.0, g.tensor.dtype))]


@register
class Softplus(Activation):
    """log(1 + exp(x))."""

    name = "softplus"
    precision = "wide"

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.logaddexp(wide(x), 0).astype(x.dtype)

    def decompose(self, b: Builder, attrs: Attrs, x: Value) -> Value:
        return b.add(b.maximum(x, 0.0), b.log1p(b.exp(b.neg(b.abs(x)))))

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        return [b.mul(g, b.sigmoid(node.inputs[0]))]


@register
class Gelu(Activation):
    """x * Phi(x), the Gaussian error linear unit (arXiv:1606.08415).

    ``approximate="none"``: Phi by erf; ``"tanh"``: 0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))).
    """

    name = "gelu"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        approximate: str = "none"

        def canonical(self, *types: Type) -> Gelu.Attrs:
            if self.approximate not in ("none", "tanh"):
                raise TypeMismatch(f"approximate={self.approximate!r} is not one of none, tanh")
            return self

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        w = wide(x)
        if attrs.approximate == "tanh":
            phi = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (w + 0.044715 * w**3)))
        else:
            phi = 0.5 * (1 + erf(w / np.asarray(math.sqrt(2), w.dtype)))
        return (w * phi).astype(x.dtype)

    def decompose(self, b: Builder, attrs: Attrs, x: Value) -> Value:
        if attrs.approximate == "tanh":
            inner = b.mul(b.add(x, b.mul(b.mul(b.mul(x, x), x), 0.044715)), math.sqrt(2 / math.pi))
            phi = b.add(b.tanh(inner), 1.0)
        else:
            phi = b.add(b.erf(b.mul(x, 1 / math.sqrt(2))), 1.0)
        return b.mul(b.mul(x, 0.5), phi)

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 4, low=-3, high=3)])
        yield Sample([grid(2, 4, low=-3, high=3)], {"approximate": "tanh"})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {"approximate": "sigmoid"}, "is not one of")
        yield ErrorSample(["i32[2]"], {}, "must be float")


@dataclass(frozen=True)
class SoftmaxAttrs(_op.Attrs):
    """The axis that is normalized."""

    axis: AxisIndex = -1

    def canonical(self, *types: Type) -> SoftmaxAttrs:
        return SoftmaxAttrs(axis_of(self.axis, types[0].rank))


class _Normalized(Op):
    kind = "row"
    Attrs = SoftmaxAttrs

    def infer(self, attrs: SoftmaxAttrs, x: TensorType) -> TensorType:
        return floating(x)

    def axes(self, attrs: SoftmaxAttrs, x: TensorType) -> AxisRule:
        return along(x.shape, (attrs.axis,), lambda d: Factor(d, "normalized", neutral=-math.inf))

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 5)])
        yield Sample([grid(2, 3, 4)], {"axis": 1})
        yield Sample([np.array([[1000.0, 1000.0, -1e30]], np.float32)], grad=())

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["i32[2]"], {}, "must be float")
        yield ErrorSample(["f32[2]"], {"axis": 1}, "outside a tensor of rank 1")


@register
class Softmax(_Normalized):
    """exp(x - max) / sum(exp(x - max)) along ``axis``, in f32 or wider; a slice of only -inf gives NaN."""

    name = "softmax"
    precision = "wide"

    def reference(self, attrs: SoftmaxAttrs, x: np.ndarray) -> np.ndarray:
        w = wide(x)
        e = np.exp(w - w.max(attrs.axis, keepdims=True, initial=-np.inf))
        return (e / e.sum(attrs.axis, keepdims=True)).astype(x.dtype)

    def decompose(self, b: Builder, attrs: SoftmaxAttrs, x: Value) -> Value:
        dtype = x.tensor.dtype
        if dtype.bits < 32:
            x = b.cast(x, dtype=DType.F32)
        top = b.stop_gradient(b.reduce_max(x, axes=(attrs.axis,), keepdims=True))
        e = b.exp(b.sub(x, top))
        y = b.div(e, b.reduce_sum(e, axes=(attrs.axis,), keepdims=True))
        return b.cast(y, dtype=dtype) if dtype.bits < 32 else y

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        y = node.output
        axis = (SoftmaxAttrs.of(node).axis,)
        return [b.mul(y, b.sub(g, b.reduce_sum(b.mul(g, y), axes=axis, keepdims=True)))]


@register
class LogSoftmax(_Normalized):
    """x - log(sum(exp(x))) along ``axis``, in f32 or wider."""

    name = "log_softmax"
    precision = "wide"

    def reference(self, attrs: SoftmaxAttrs, x: np.ndarray) -> np.ndarray:
        w = wide(x)
        w = w - w.max(attrs.axis, keepdims=True, initial=-np.inf)
        return (w - np.log(np.exp(w).sum(attrs.axis, keepdims=True))).astype(x.dtype)

    def decompose(self, b: Builder, attrs: SoftmaxAttrs, x: Value) -> Value:
        x = b.sub(x, b.stop_gradient(b.reduce_max(x, axes=(attrs.axis,), keepdims=True)))
        return b.sub(x, b.log(b.reduce_sum(b.exp(x), axes=(attrs.axis,), keepdims=True)))

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        total = b.reduce_sum(g, axes=(SoftmaxAttrs.of(node).axis,), keepdims=True)
        return [b.sub(g, b.mul(b.exp(node.output), total))]


@register
class LogSumExp(Op):
    """log(sum(exp(x))) over ``axes``, shifted by the maximum; of only -inf, -inf."""

    name = "logsumexp"
    kind = "reduction"
    precision = "wide"
    Attrs = ReduceAttrs

    def infer(self, attrs: ReduceAttrs, x: TensorType) -> TensorType:
        return floating(x).with_shape(*reduced_shape(x, attrs.axes, attrs.keepdims))

    def axes(self, attrs: ReduceAttrs, x: TensorType) -> AxisRule:
        return reduced(x.shape, attrs.axes, attrs.keepdims, neutral=-math.inf)

    def reference(self, attrs: ReduceAttrs, x: np.ndarray) -> np.ndarray:
        w = wide(x)
        top = w.max(attrs.axes, keepdims=True, initial=-np.inf)
        top = np.where(np.isfinite(top), top, np.zeros((), w.dtype))
        y = np.log(np.exp(w - top).sum(attrs.axes, keepdims=True)) + top
        return (y if attrs.keepdims else y.reshape(np.sum(x, attrs.axes).shape)).astype(x.dtype)

    def decompose(self, b: Builder, attrs: ReduceAttrs, x: Value) -> Value:
        top = b.stop_gradient(b.reduce_max(x, axes=attrs.axes, keepdims=True))
        top = b.select(b.isinf(top), b.constant(0.0, x.tensor.dtype), top)
        y = b.add(b.log(b.reduce_sum(b.exp(b.sub(x, top)), axes=attrs.axes, keepdims=True)), top)
        if attrs.keepdims:
            return y
        return b.reshape(y, shape=tuple(d for i, d in enumerate(x.shape) if i not in attrs.axes))

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 5)], {"axes": (1,)})
        yield Sample([grid(2, 3, 4)], {"axes": (0, 2), "keepdims": True})
        yield Sample([np.array([[-np.inf, -np.inf], [1000.0, -np.inf]], np.float32)], {"axes": (1,)}, grad=())

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["i32[2]"], {"axes": (0,)}, "must be float")


def _scale_by(x: TensorType, w: TensorType | None, what: str) -> None:
    if w is None:
        return
    if floating(w, what).rank != 1 or equal(w.shape[0], x.shape[-1]) is False or w.dtype is not x.dtype:
        raise TypeMismatch(f"{what} must be {x.dtype}[{x.shape[-1]}], not {w}")
    require_equal(w.shape[0], x.shape[-1], f"{what} and last axis of x")


@dataclass(frozen=True)
class NormAttrs(_op.Attrs):
    """``eps`` is added to the mean square (or variance) before the root."""

    eps: float = 1e-6


@register
class RmsNorm(Op):
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis (arXiv:1910.07467), in f32 or wider; weight [n] optional."""

    name = "rms_norm"
    kind = "row"
    Attrs = NormAttrs

    def infer(self, attrs: NormAttrs, x: TensorType, weight: TensorType | None = None) -> TensorType:
        if floating(x).rank < 1:
            raise TypeMismatch("rms_norm needs at least one axis")
        _scale_by(x, weight, "the weight")
        return x

    def axes(self, attrs: NormAttrs, x: TensorType, *scales: TensorType) -> AxisRule:
        own = free(x.shape, {x.rank - 1: Factor(x.shape[-1], "normalized")})
        return AxisRule((own, *((own[-1:],) * len(scales))), (own,))

    def reference(self, attrs: NormAttrs, x: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
        w = wide(x)
        y = w / np.sqrt(np.mean(w * w, -1, keepdims=True) + np.asarray(attrs.eps, w.dtype))
        return (y if weight is None else y * wide(weight)).astype(x.dtype)

    def decompose(self, b: Builder, attrs: NormAttrs, x: Value, weight: Value | None = None) -> Value:
        dtype = x.tensor.dtype
        if dtype.bits < 32:
            x = b.cast(x, dtype=DType.F32)
            weight = b.cast(weight, dtype=DType.F32) if weight is not None else None
        mean = b.reduce_mean(b.mul(x, x), axes=(len(x.shape) - 1,), keepdims=True)
        y = b.mul(x, b.rsqrt(b.add(mean, attrs.eps)))
        y = y if weight is None else b.mul(y, weight)
        return b.cast(y, dtype=dtype) if dtype.bits < 32 else y

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 3, 5), grid(5, low=0.5)])
        yield Sample([grid(3, 8)], {"eps": 1e-2})
        yield Sample([np.zeros((1, 4), np.float32)], grad=())

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[b, 4]", "f32[5]"], {}, "the weight must be f32[4]")
        yield ErrorSample(["i32[b, 4]"], {}, "must be float")


@register
class LayerNorm(Op):
    """(x - mean) * rsqrt(var + eps) * weight + bias over the last axis (arXiv:1607.06450), in f32 or wider."""

    name = "layer_norm"
    kind = "row"

    @dataclass(frozen=True)
    class Attrs(NormAttrs):
        eps: float = 1e-5

    def infer(
        self, attrs: NormAttrs, x: TensorType, weight: TensorType | None = None, bias: TensorType | None = None
    ) -> TensorType:
        if floating(x).rank < 1:
            raise TypeMismatch("layer_norm needs at least one axis")
        _scale_by(x, weight, "the weight")
        _scale_by(x, bias, "the bias")
        return x

    def axes(self, attrs: NormAttrs, x: TensorType, *scales: TensorType) -> AxisRule:
        own = free(x.shape, {x.rank - 1: Factor(x.shape[-1], "normalized")})
        return AxisRule((own, *((own[-1:],) * len(scales))), (own,))

    def reference(
        self, attrs: NormAttrs, x: np.ndarray, weight: np.ndarray | None = None, bias: np.ndarray | None = None
    ) -> np.ndarray:
        w = wide(x)
        w = w - w.mean(-1, keepdims=True)
        y = w / np.sqrt(np.mean(w * w, -1, keepdims=True) + np.asarray(attrs.eps, w.dtype))
        y = y if weight is None else y * wide(weight)
        return (y if bias is None else y + wide(bias)).astype(x.dtype)

    def decompose(
        self, b: Builder, attrs: NormAttrs, x: Value, weight: Value | None = None, bias: Value | None = None
    ) -> Value:
        dtype, last = x.tensor.dtype, (len(x.shape) - 1,)
        narrow = dtype.bits < 32
        if narrow:
            x = b.cast(x, dtype=DType.F32)
            weight, bias = (b.cast(v, dtype=DType.F32) if v is not None else None for v in (weight, bias))
        x = b.sub(x, b.reduce_mean(x, axes=last, keepdims=True))
        var = b.reduce_mean(b.mul(x, x), axes=last, keepdims=True)
        y = b.mul(x, b.rsqrt(b.add(var, attrs.eps)))
        y = y if weight is None else b.mul(y, weight)
        y = y if bias is None else b.add(y, bias)
        return b.cast(y, dtype=dtype) if narrow else y

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 3, 5) ** 2, grid(5, low=0.5), grid(5)])
        yield Sample([grid(3, 8) ** 2, grid(8)], {"eps": 1e-2})
        yield Sample([grid(3, 8) ** 2])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[b, 4]", "f32[5]"], {}, "the weight must be f32[4]")
        yield ErrorSample(["f32[b, 4]", "f32[4]", "f32[3]"], {}, "the bias must be f32[4]")


ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "silu": ("silu", {}), "gelu": ("gelu", {}), "gelu_tanh": ("gelu", {"approximate": "tanh"}), "relu": ("relu", {}),
    "sigmoid": ("sigmoid", {}),
}  # fmt: skip
"""Activation names of ``glu``, as operation and attributes."""


@register
class Glu(Op):
    """Gated linear unit (arXiv:2002.05202): act(x[.., :n]) * x[.., n:], x [.., 2n] -> [.., n]."""

    name = "glu"
    kind = "row"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        activation: str = "silu"

        def canonical(self, *types: Type) -> Glu.Attrs:
            if self.activation not in ACTIVATIONS:
                raise TypeMismatch(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
            return self

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        if floating(x).rank < 1 or equal(x.shape[-1] % 2, 0) is False:
            raise TypeMismatch(f"the last axis of {x} is not even")
        require_equal(x.shape[-1] % 2, 0, "last axis modulo 2")
        return x.with_shape(*x.shape[:-1], x.shape[-1] // 2)

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        lead, each = free(x.shape[:-1]), Factor(x.shape[-1] // 2)
        return AxisRule(((*lead, (Factor(2, "whole"), each)),), ((*lead, (each,)),))

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        gate, up = np.split(x, 2, -1)
        name, more = ACTIVATIONS[attrs.activation]
        op = _op.OPS[name]
        return (wide(op.reference(op.Attrs(**more), wide(gate))) * wide(up)).astype(x.dtype)  # type: ignore[arg-type]

    def decompose(self, b: Builder, attrs: Attrs, x: Value) -> Value:
        n, zeros = x.shape[-1] // 2, (0,) * (len(x.shape) - 1)
        gate = b.slice(x, starts=(*zeros, 0), stops=(*x.shape[:-1], n))
        up = b.slice(x, starts=(*zeros, n), stops=x.shape)
        name, more = ACTIVATIONS[attrs.activation]
        return b.mul(b.emit(name, gate, **more), up)

    def samples(self) -> Iterable[Sample]:
        for name in ACTIVATIONS:
            yield Sample([grid(2, 3, 8, low=-3, high=3.1)], {"activation": name})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[b, 5]"], {}, "not even")
        yield ErrorSample(["f32[b, 4]"], {"activation": "swish"}, "is not one of")


