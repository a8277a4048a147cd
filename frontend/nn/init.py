"""How parameters begin, as in ``torch.nn.init``: ``nn.init.xavier_uniform(self.head.weight)``. Each returns the parameter."""

from __future__ import annotations

from wasat.ir import WasatError

from .module import Parameter


def constant(p: Parameter, value: float) -> Parameter:
    """One number."""
    return _set(p, value, 0.0)


def zeros(p: Parameter) -> Parameter:
    """Zeros."""
    return _set(p, 0.0, 0.0)


def ones(p: Parameter) -> Parameter:
    """Ones."""
    return _set(p, 1.0, 0.0)


def normal(p: Parameter, mean: float = 0.0, std: float = 1.0) -> Parameter:
    """Normal numbers."""
    return _set(p, mean, std)


def uniform(p: Parameter, a: float = 0.0, b: float = 1.0) -> Parameter:
    """Between ``a`` and ``b``."""
    if b < a:
        raise WasatError(f"init.uniform: from {a} to {b} there is nothing")
    return _set(p, (a + b) / 2, (b - a) / 12**0.5, uniform=True)


def xavier_normal(p: Parameter, gain: float = 1.0) -> Parameter:
    """Normal, of variance ``2 gain² / (inputs + outputs)``."""
    return _set(p, 0.0, gain * (2 / sum(_fans(p))) ** 0.5)


def xavier_uniform(p: Parameter, gain: float = 1.0) -> Parameter:
    """Uniform around 0, of variance ``2 gain² / (inputs + outputs)``."""
    return _set(p, 0.0, gain * (2 / sum(_fans(p))) ** 0.5, uniform=True)


def kaiming_normal(p: Parameter, gain: float = 2**0.5) -> Parameter:
    """Normal, of variance ``gain² / inputs``; the gain is that of relu."""
    return _set(p, 0.0, gain * _fans(p)[0] ** -0.5)


def kaiming_uniform(p: Parameter, gain: float = 2**0.5) -> Parameter:
    """Uniform around 0, of variance ``gain² / inputs``; the gain is that of relu."""
    return _set(p, 0.0, gain * _fans(p)[0] ** -0.5, uniform=True)


def _set(p: Parameter, mean: float, std: float, uniform: bool = False) -> Parameter:
    if not isinstance(p, Parameter):
        raise WasatError(f"an initializer takes a parameter, such as layer.weight, not {p!r}")
    p.noise, p.uniform = (mean, std), uniform
    return p


def _fans(p: Parameter) -> tuple[int, int]:
    """Inputs and outputs of one element of the result: weights are ``[outputs, inputs, *kernel]``."""
    shape = p.type.concrete({})
    if len(shape) < 2:
        raise WasatError(f"{p!r} is no matrix: it has no inputs and outputs to count")
    kernel = 1
    for k in shape[2:]:
        kernel *= k
    return shape[1] * kernel, shape[0] * kernel


__all__ = [
    "constant", "kaiming_normal", "kaiming_uniform", "normal", "ones", "uniform", "xavier_normal", "xavier_uniform", "zeros",
]  # fmt: skip
