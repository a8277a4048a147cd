"""More functions of networks and layers of them: activations, norms, chains of layers, recurrences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wasat.ir import DType

from wasat import ir

from . import functions as F
from .arrays import clip, flatten, floats, wide, zeros
from .layers import _sizes
from .loops import scan
from .module import Module, Parameter
from .tensor import Tensor, emit, fail


# -- activations -------------------------------------------
def leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    """x above 0, ``negative_slope * x`` below."""
    floats("leaky_relu", x)
    return F.where(x > 0.0, x, x * negative_slope)


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """x above 0, ``alpha * (exp(x) - 1)`` below."""
    floats("elu", x)
    t = F.tanh(F.minimum(x, 0.0) * 0.5)  # exp(x) - 1 = 2 t / (1 - t), which keeps its digits near 0
    return F.where(x > 0.0, x, (2.0 * alpha) * t / (1.0 - t))


def mish(x: Tensor) -> Tensor:
    """``x * tanh(softplus(x))``."""
    floats("mish", x)
    return x * F.tanh(F.softplus(x))


def relu6(x: Tensor) -> Tensor:
    """``min(max(x, 0), 6)``."""
    return hardtanh(x, 0.0, 6.0)


def hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """x, not below ``min_val`` and not above ``max_val``."""
    floats("hardtanh", x)
    return clip(x, min_val, max_val)


def hardsigmoid(x: Tensor) -> Tensor:
    """``relu6(x + 3) / 6``."""
    floats("hardsigmoid", x)
    return relu6(x + 3.0) / 6.0


def hardswish(x: Tensor) -> Tensor:
    """``x * relu6(x + 3) / 6`` (arXiv:1905.02244)."""
    floats("hardswish", x)
    return x * relu6(x + 3.0) / 6.0


def celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """x above 0, ``alpha * (exp(x / alpha) - 1)`` below (arXiv:1704.07483)."""
    floats("celu", x)
    return F.where(x > 0.0, x, alpha * F.expm1(F.minimum(x, 0.0) / alpha))


def selu(x: Tensor) -> Tensor:
    """:func:`elu` by the scale and alpha that keep mean 0 and variance 1 (arXiv:1706.02515)."""
    return 1.0507009873554804934193349852946 * elu(x, 1.6732632423543772848170429916717)


def softsign(x: Tensor) -> Tensor:
    """``x / (1 + |x|)``."""
    floats("softsign", x)
    return x / (1.0 + abs(x))


def logsigmoid(x: Tensor) -> Tensor:
    """log(sigmoid(x)), without overflow."""
    floats("logsigmoid", x)
    return -F.softplus(-x)


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """x above 0, ``weight * x`` below; the weight is one number, or one for each channel of ``[b, c, *space]``."""
    floats("prelu", x, weight)
    if ir.equal(weight.type.size, 1) is True:
        slope = emit("reshape", weight, shape=())
    elif x.rank > 1 and weight.rank == 1 and ir.equal(weight.shape[0], x.shape[1]) is True:
        slope = weight.reshape(-1, *[1] * (x.rank - 2))
    else:
        fail(f"nn.prelu: the weight is one number, or one for each channel of {x.value!r}, not {weight.value!r}")
    return F.where(x > 0.0, x, x * slope)


def glu(x: Tensor, axis: int = -1) -> Tensor:
    """The first half along ``axis`` times the sigmoid of the second (arXiv:1612.08083)."""
    floats("glu", x)
    value, gate = x.split(2, axis)
    return value * F.sigmoid(gate)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """``ids[...]``, ``weight[size, dim]`` -> ``[..., dim]``: rows of the weight."""
    return emit("embedding", weight, ids, dtype=weight.dtype)


# -- norms -------------------------------------------
def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Each of ``num_groups`` runs of channels of ``[b, c, *space]`` to mean 0, variance 1, then ``* weight[c] + bias[c]``."""
    floats("group_norm", x)
    if x.rank < 2:
        fail(f"nn.group_norm takes [b, channels, *space], not {x.value!r}")
    b, c, *space = x.shape
    if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 1 or (
        ir.equal(c % num_groups, 0) is not True
    ):  # fmt: skip
        fail(f"nn.group_norm: {c} channels do not divide into {num_groups!r} groups")
    y = _standard(wide(x).reshape(b, num_groups, c // num_groups, *space), eps).reshape(*x.shape)
    return _affine("group_norm", y, weight, bias).cast(x.dtype)


def instance_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Each channel of ``[b, c, *space]`` to mean 0 and variance 1 over its space, then ``* weight[c] + bias[c]``."""
    floats("instance_norm", x)
    if x.rank < 3:
        fail(f"nn.instance_norm takes [b, channels, *space], not {x.value!r}")
    return _affine("instance_norm", _standard(wide(x), eps), weight, bias).cast(x.dtype)


def _standard(x: Tensor, eps: float) -> Tensor:
    """To mean 0 and variance 1 over all axes but the first two."""
    axes = range(2, x.rank)
    x = x - x.mean(axes, keepdims=True)
    return x * F.rsqrt((x * x).mean(axes, keepdims=True) + eps)


def batch_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``(x - running_mean) / sqrt(running_var + eps) * weight + bias`` along axis 1: what torch computes for inference."""
    floats("batch_norm", x)
    if x.rank < 2:
        fail(f"nn.batch_norm takes [b, channels, *space], not {x.value!r}")
    mean, var = (_channels("batch_norm", x, v) for v in (running_mean, running_var))
    y = (wide(x) - mean) * F.rsqrt(var + eps)
    return _affine("batch_norm", y, weight, bias).cast(x.dtype)


def _channels(what: str, x: Tensor, v: Tensor) -> Tensor:
    """One number for each channel, beside ``x``."""
    if v.rank != 1 or ir.equal(v.shape[0], x.shape[1]) is not True:
        fail(f"nn.{what}: one number for each of {x.shape[1]} channels, not {v.value!r}")
    return v.cast(DType.F32 if x.dtype.bits < 32 else x.dtype).reshape(-1, *(1,) * (x.rank - 2))


def _affine(what: str, y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * _channels(what, y, weight)
    return y if bias is None else y + _channels(what, y, bias)


class GroupNorm(Module):
    """:func:`group_norm` with a weight and a bias for each channel."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        _sizes(self, num_groups=num_groups, num_channels=num_channels)
        if num_channels % num_groups:
            raise ir.WasatError(f"GroupNorm: {num_channels} channels do not divide into {num_groups} groups")
        self.weight = Parameter((num_channels,), mean=1.0, std=0.0) if affine else None
        self.bias = Parameter((num_channels,), std=0.0) if affine else None
        self.num_groups, self.eps = num_groups, eps

    def __call__(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class BatchNorm(Module):
    """:func:`batch_norm` with statistics that were made elsewhere: it is for inference, and refused in a trace for training."""

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        _sizes(self, num_features=num_features)
        self.weight = Parameter((num_features,), mean=1.0, std=0.0) if affine else None
        self.bias = Parameter((num_features,), std=0.0) if affine else None
        self.running_mean = Parameter((num_features,), std=0.0)
        self.running_var = Parameter((num_features,), mean=1.0, std=0.0)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        if x.trace.training:
            fail("BatchNorm uses statistics that are given and makes none; for training use GroupNorm or LayerNorm")
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)


# -- layers without parameters -------------------------------------------
class Identity(Module):
    """x as it is."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


class Sequential(Module):
    """One after another: modules, or functions of a tensor. Parameters are named as torch's, ``0.weight``."""

    def __init__(self, *layers: Callable[[Any], Any]) -> None:
        for i, layer in enumerate(layers):
            if not callable(layer):
                raise ir.WasatError(f"Sequential takes modules and functions, not {layer!r}; of a list: Sequential(*layers)")
            vars(self)[str(i)] = layer

    def __len__(self) -> int:
        return len(vars(self))

    def __getitem__(self, i: int) -> Any:
        return list(vars(self).values())[i]

    def __call__(self, x: Any) -> Any:
        for layer in list(vars(self).values()):
            x = layer(x)
        return x


class Flatten(Module):
    """All axes from ``start`` to ``stop`` as one; by default all but the first."""

    def __init__(self, start: int = 1, stop: int = -1) -> None:
        self.start, self.stop = start, stop

    def __call__(self, x: Tensor) -> Tensor:
        return flatten(x, self.start, self.stop)


class ReLU(Module):
    """:func:`.functions.relu` as a layer."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x)


class GELU(Module):
    """:func:`.functions.gelu` as a layer."""

    def __init__(self, approximate: str = "none") -> None:
        self.approximate = approximate

    def __call__(self, x: Tensor) -> Tensor:
        return F.gelu(x, self.approximate)


class SiLU(Module):
    """:func:`.functions.silu` as a layer."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Sigmoid(Module):
    """:func:`.functions.sigmoid` as a layer."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.sigmoid(x)


class Tanh(Module):
    """:func:`.functions.tanh` as a layer."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.tanh(x)


class Mish(Module):
    """:func:`mish` as a layer."""

    def __call__(self, x: Tensor) -> Tensor:
        return mish(x)


class LeakyReLU(Module):
    """:func:`leaky_relu` as a layer."""

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = negative_slope

    def __call__(self, x: Tensor) -> Tensor:
        return leaky_relu(x, self.negative_slope)


class ELU(Module):
    """:func:`elu` as a layer."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def __call__(self, x: Tensor) -> Tensor:
        return elu(x, self.alpha)


# -- recurrences -------------------------------------------
class _Recurrent(Module):
    """Layers of a recurrence over axis 1 of ``x[b, s, input_size]``; parameters are named, and laid out, as torch's."""

    gates = 1

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True) -> None:
        _sizes(self, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        rows, std = self.gates * hidden_size, (3 * hidden_size) ** -0.5
        for k in range(num_layers):
            vars(self)[f"weight_ih_l{k}"] = Parameter((rows, hidden_size if k else input_size), std=std)
            vars(self)[f"weight_hh_l{k}"] = Parameter((rows, hidden_size), std=std)
            if bias:
                vars(self)[f"bias_ih_l{k}"] = Parameter((rows,), std=std)
                vars(self)[f"bias_hh_l{k}"] = Parameter((rows,), std=std)

    def _check(self, x: Tensor, *states: Tensor) -> None:
        name = type(self).__name__
        if x.rank != 3 or ir.equal(x.shape[2], self.input_size) is not True:
            fail(f"{name} takes [b, s, {self.input_size}], not {x.value!r}")
        for h in states:
            if h.rank != 3 or h.shape[0] != self.num_layers or ir.equal(h.shape[2], self.hidden_size) is not True:
                fail(f"{name}: a state is [{self.num_layers}, b, {self.hidden_size}], not {h.value!r}")

    def _layer(self, k: int, x: Tensor) -> tuple[Tensor, Parameter, Parameter | None]:
        """What the gates take from the inputs, time first, and the weight and bias for the state."""
        mine = vars(self)
        given = F.linear(x, mine[f"weight_ih_l{k}"], mine.get(f"bias_ih_l{k}"))
        return given.transpose(1, 0, 2), mine[f"weight_hh_l{k}"], mine.get(f"bias_hh_l{k}")

    def _start(self, x: Tensor) -> Tensor:
        return zeros((self.num_layers, x.shape[0], self.hidden_size), x.dtype)


class GRU(_Recurrent):
    """``x[b, s, input_size]``, state ``[num_layers, b, hidden_size]`` (0 by default) -> all outputs, and the last state."""

    gates = 3

    def __call__(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = self._start(x) if h is None else h
        self._check(x, h)
        last = []
        for k in range(self.num_layers):
            given, weight, bias = self._layer(k, x)

            def turn(h: Tensor, g: Tensor, weight: Parameter = weight, bias: Parameter | None = bias) -> tuple[Tensor, Tensor]:
                (a, b, c), (p, q, r) = g.split(3), F.linear(h, weight, bias).split(3)
                reset, update = F.sigmoid(a + p), F.sigmoid(b + q)
                h = (1.0 - update) * F.tanh(c + reset * r) + update * h
                return h, h

            end, y = scan(turn, h[k], given)
            last.append(end)
            x = y.transpose(1, 0, 2)
        return x, F.stack(last)


class LSTM(_Recurrent):
    """``x[b, s, input_size]``, states (h, c) ``[num_layers, b, hidden_size]`` (else 0) -> all outputs, and the last (h, c)."""

    gates = 4

    def __call__(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = (self._start(x), self._start(x)) if state is None else state
        self._check(x, h, c)
        last: list[tuple[Tensor, Tensor]] = []
        for k in range(self.num_layers):
            given, weight, bias = self._layer(k, x)

            def turn(
                state: tuple[Tensor, Tensor], g: Tensor, weight: Parameter = weight, bias: Parameter | None = bias
            ) -> tuple[tuple[Tensor, Tensor], Tensor]:
                h, c = state
                i, f, n, o = (g + F.linear(h, weight, bias)).split(4)
                c = F.sigmoid(f) * c + F.sigmoid(i) * F.tanh(n)
                h = F.sigmoid(o) * F.tanh(c)
                return (h, c), h

            end, y = scan(turn, (h[k], c[k]), given)
            last.append(end)
            x = y.transpose(1, 0, 2)
        return x, (F.stack([h for h, _ in last]), F.stack([c for _, c in last]))
