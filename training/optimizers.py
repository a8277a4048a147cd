"""Optimizers, schedules, clipping: what a step does to a parameter, as graphs. State is values in and values out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from wasat.ir import Builder, IRError, TensorType, Value

Slots = dict[str, Value]


class OutOfRange(IRError):
    """A number that an optimizer or a schedule cannot have; ``field`` names it."""

    def __init__(self, made: object, field: str, rule: str) -> None:
        super().__init__(f"{type(made).__name__}: {field} = {getattr(made, field)!r} must be {rule}")
        self.field = field


def _require(made: object, field: str, holds: bool, rule: str) -> None:
    if not holds:
        raise OutOfRange(made, field, rule)


def _require_share(made: object, *names: str) -> None:
    for field in names:
        _require(made, field, 0 <= getattr(made, field) < 1, "at least 0 and below 1")


def _require_size(made: object, *names: str) -> None:
    for field in names:
        _require(made, field, 0 <= getattr(made, field) < math.inf, "at least 0 and finite")


class Schedule(Protocol):
    """The learning rate over time."""

    def __call__(self, b: Builder, step: Value) -> Value:
        """f32[] of the updates done so far, f32[]."""
        ...


@dataclass(frozen=True)
class Constant:
    """``rate``, reached linearly in the first ``warmup`` updates (update t, from 0, takes (t + 1) / warmup of it).

    This and the other schedules raise OutOfRange for numbers that cannot be.
    """

    rate: float
    warmup: int = 0

    def __post_init__(self) -> None:
        _require_size(self, "rate", "warmup")

    def __call__(self, b: Builder, step: Value) -> Value:
        return b.mul(self._decay(b, step), self._ramp(b, step))

    def _ramp(self, b: Builder, step: Value) -> Value:
        return b.minimum(b.div(b.add(step, 1.0), float(max(self.warmup, 1))), 1.0)

    def _decay(self, b: Builder, step: Value) -> Value:
        return b.constant(self.rate)


@dataclass(frozen=True)
class _Decaying(Constant):
    """Base of what falls from ``rate`` after the warm-up to ``final`` at update ``steps``, and stays there."""

    _: KW_ONLY
    steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "steps", self.steps >= 1, "at least 1")
        _require(self, "warmup", self.warmup < self.steps, f"below steps = {self.steps}")
        _require(self, "final", 0 <= self.final <= self.rate, f"between 0 and rate = {self.rate}")

    def _progress(self, b: Builder, step: Value) -> Value:
        """0 at the end of the warm-up, 1 from update ``steps`` on."""
        done = b.div(b.sub(step, float(self.warmup)), float(self.steps - self.warmup))
        return b.minimum(b.maximum(done, 0.0), 1.0)


@dataclass(frozen=True)
class Linear(_Decaying):
    """Warm-up, then a straight line to ``final`` at update ``steps``."""

    def _decay(self, b: Builder, step: Value) -> Value:
        return b.add(b.mul(self._progress(b, step), self.final - self.rate), self.rate)


@dataclass(frozen=True)
class Cosine(_Decaying):
    """Warm-up, then half a cosine (arXiv:1608.03983) to ``final`` at update ``steps``."""

    def _decay(self, b: Builder, step: Value) -> Value:
        wave = b.cos(b.mul(self._progress(b, step), math.pi))
        return b.add(b.mul(b.add(wave, 1.0), 0.5 * (self.rate - self.final)), self.final)


class Optimizer(Protocol):
    """How one parameter changes."""

    def slots(self, p: Value) -> dict[str, TensorType]:
        """What is remembered of a parameter between updates; zero at first."""
        ...

    def update(self, b: Builder, p: Value, g: Value, slots: Slots, rate: Value, count: Value) -> tuple[Value, Slots]:
        """The new parameter and slots. p, g f32; rate, count f32[]: the learning rate, the number of this update from 1 on."""
        ...


def decays(type: TensorType) -> bool:
    """Whether weight decay is for a parameter: for matrices and higher, not for norms and biases, which are vectors."""
    return type.rank > 1


def _decayed(b: Builder, p: Value, rate: Value, decay: float) -> Value:
    """p * (1 - rate * decay): decoupled weight decay (arXiv:1711.05101)."""
    return b.mul(p, b.sub(1.0, b.mul(rate, decay))) if decay and decays(p.tensor) else p


def _lerp(b: Builder, x: Value, y: Value, share: float) -> Value:
    """x + share * (y - x)."""
    return b.add(x, b.mul(b.sub(y, x), share))


@dataclass(frozen=True)
class SGD:
    """p - rate * g, with momentum (Polyak's, or Nesterov's) as torch.optim.SGD has it; ``decay`` is added to the gradient.

    This and the other optimizers raise OutOfRange for numbers that cannot be.
    """

    momentum: float = 0.0
    nesterov: bool = False
    decay: float = 0.0

    def __post_init__(self) -> None:
        _require_share(self, "momentum")
        _require(self, "nesterov", not self.nesterov or self.momentum > 0, "false where there is no momentum")
        _require_size(self, "decay")

    def slots(self, p: Value) -> dict[str, TensorType]:
        return {"momentum": p.tensor} if self.momentum else {}

    def update(self, b: Builder, p: Value, g: Value, slots: Slots, rate: Value, count: Value) -> tuple[Value, Slots]:
        if self.decay and decays(p.tensor):
            g = b.add(g, b.mul(p, self.decay))
        if not self.momentum:
            return b.sub(p, b.mul(g, rate)), {}
        m = b.add(b.mul(slots["momentum"], self.momentum), g)
        move = b.add(b.mul(m, self.momentum), g) if self.nesterov else m
        return b.sub(p, b.mul(move, rate)), {"momentum": m}


def _gathered(b: Builder, beta: float, count: Value) -> Value:
    """1 - beta**count, f32[], without the cancellation where beta is near 1."""
    return b.neg(b.expm1(b.mul(count, math.log(beta)))) if beta else b.constant(1.0)


@dataclass(frozen=True)
class AdamW:
    """Adam (arXiv:1412.6980) with decoupled weight decay (arXiv:1711.05101), none on vectors."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.01

    def __post_init__(self) -> None:
        _require_share(self, "beta1", "beta2")
        _require(self, "eps", 2.0**-126 <= self.eps < math.inf, "above 0, in f32: of gradients that stay 0 it is the divisor")
        _require_size(self, "decay")

    def slots(self, p: Value) -> dict[str, TensorType]:
        return {"mean": p.tensor, "square": p.tensor}

    def update(self, b: Builder, p: Value, g: Value, slots: Slots, rate: Value, count: Value) -> tuple[Value, Slots]:
        mean = _lerp(b, slots["mean"], g, 1 - self.beta1)
        square = _lerp(b, slots["square"], b.mul(g, g), 1 - self.beta2)
        unbias1, unbias2 = (_gathered(b, beta, count) for beta in (self.beta1, self.beta2))
        size = b.add(b.sqrt(b.div(square, unbias2)), self.eps)
        p = b.sub(_decayed(b, p, rate, self.decay), b.mul(b.div(mean, size), b.div(rate, unbias1)))
        return p, {"mean": mean, "square": square}


@dataclass(frozen=True)
class Muon:
    """Momentum of matrices, orthogonalized (https://kellerjordan.github.io/posts/muon/); AdamW for all other parameters.

    As torch.optim.Muon has it with adjust_lr_fn="match_rms_adamw" (arXiv:2502.16982): updates are about as large as AdamW's, so
    that one rate serves both; but orthogonalized in f32. ``rounds`` of a Newton-Schulz iteration bring all singular values of
    the momentum near 1. ``adamw``: globs of the matrices that AdamW updates, too: tables that are read by rows, and what makes
    logits. ``beta1``, ``beta2`` and ``eps`` are AdamW's, ``decay`` is for both.
    """

    momentum: float = 0.95
    nesterov: bool = True
    rounds: int = 5
    decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    adamw: tuple[str, ...] = ("*embed*", "*head*")

    def __post_init__(self) -> None:
        _require_share(self, "momentum")
        _require(self, "rounds", 1 <= self.rounds < 100, "at least 1 and below 100")
        self._adamw()  # looks at its numbers

    def _adamw(self) -> AdamW:
        return AdamW(self.beta1, self.beta2, self.eps, self.decay)

    def _is_for(self, p: Value) -> bool:
        return p.tensor.rank == 2 and not any(fnmatchcase(p.name, glob) for glob in self.adamw)

    def slots(self, p: Value) -> dict[str, TensorType]:
        return {"momentum": p.tensor} if self._is_for(p) else self._adamw().slots(p)

    def update(self, b: Builder, p: Value, g: Value, slots: Slots, rate: Value, count: Value) -> tuple[Value, Slots]:
        if not self._is_for(p):
            return self._adamw().update(b, p, g, slots, rate, count)
        m = _lerp(b, slots["momentum"], g, 1 - self.momentum)
        move = _orthogonal(b, _lerp(b, g, m, self.momentum) if self.nesterov else m, self.rounds)
        size = 0.2 * math.sqrt(max(p.tensor.concrete({})))
        return b.sub(_decayed(b, p, rate, self.decay), b.mul(move, b.mul(rate, size))), {"momentum": m}


def _orthogonal(b: Builder, x: Value, rounds: int) -> Value:
    """The matrix x with singular values near 1 (0.7 to 1.2 after 5 rounds, but for those that were below a thousandth of the
    largest) and the same singular vectors: a polynomial of odd degree 5, again and again.
    """
    rows, columns = x.tensor.concrete({})
    tall = rows > columns
    if tall:  # the smaller one of its two products with itself
        x = b.transpose(x, perm=(1, 0))
    length = b.sqrt(b.reduce_sum(b.mul(x, x), axes=(0, 1)))
    x = b.div(x, b.maximum(length, 1e-7))
    for _ in range(rounds):
        square = b.matmul(x, b.transpose(x, perm=(1, 0)))
        change = b.add(b.mul(square, -4.7750), b.mul(b.matmul(square, square), 2.0315))
        x = b.add(b.mul(x, 3.4445), b.matmul(change, x))
    return b.transpose(x, perm=(1, 0)) if tall else x


@dataclass(frozen=True)
class Adafactor:
    """Second moments of matrices as row times column, updates relative to the parameter's size (arXiv:1804.04235).

    As torch.optim.Adafactor has it: no first moment, the rate at most 1/sqrt(count), decay decoupled.
    """

    beta2_decay: float = -0.8
    eps1: float = 2.0**-23
    eps2: float = 1e-3
    clip: float = 1.0
    decay: float = 0.0

    def __post_init__(self) -> None:
        _require(self, "beta2_decay", -math.inf < self.beta2_decay <= 0, "at most 0 and finite")
        _require(self, "eps1", 2.0**-63 <= self.eps1 < 2.0**63, "at least 2**-63 and below 2**63: its square is used, in f32")
        _require(self, "clip", 0 < self.clip < math.inf, "above 0 and finite")
        _require_size(self, "eps2", "decay")

    def slots(self, p: Value) -> dict[str, TensorType]:
        type = p.tensor
        if type.rank < 2:
            return {"square": type}
        rows, columns = type.shape[:-1], type.shape[:-2]
        return {"rows": type.with_shape(*rows, 1), "columns": type.with_shape(*columns, 1, type.shape[-1])}

    def update(self, b: Builder, p: Value, g: Value, slots: Slots, rate: Value, count: Value) -> tuple[Value, Slots]:
        last = p.tensor.rank - 1
        share = b.exp(b.mul(b.log(count), self.beta2_decay))
        square = b.mul(g, g)
        new: Slots = {}

        def follow(slot: str, x: Value) -> Value:
            new[slot] = b.add(slots[slot], b.mul(b.sub(x, slots[slot]), share))
            return new[slot]

        if last < 1:
            estimate = follow("square", square)
        else:
            rows = follow("rows", b.reduce_mean(square, axes=(last,), keepdims=True))
            columns = follow("columns", b.reduce_mean(square, axes=(last - 1,), keepdims=True))
            total = b.maximum(b.reduce_mean(rows, axes=(last - 1,), keepdims=True), self.eps1)
            estimate = b.div(b.mul(rows, columns), total)
        move = b.mul(g, b.rsqrt(b.maximum(estimate, self.eps1**2)))
        rate_here = b.minimum(rate, b.rsqrt(count))
        relative = b.mul(b.maximum(_root_mean_square(b, p), self.eps2), rate_here)
        limit = b.maximum(b.div(_root_mean_square(b, move), self.clip), 1.0)
        return b.sub(_decayed(b, p, rate, self.decay), b.mul(move, b.div(relative, limit))), new


def _root_mean_square(b: Builder, x: Value) -> Value:
    return b.sqrt(b.reduce_mean(b.mul(x, x), axes=tuple(range(len(x.shape)))))


def global_norm(b: Builder, grads: Sequence[Value]) -> Value:
    """Length of all gradients (f32) as one vector, f32[]."""
    total = b.constant(0.0)
    for g in grads:
        total = b.add(total, b.reduce_sum(b.mul(g, g), axes=tuple(range(len(g.shape)))))
    return b.sqrt(total)


def clipped(b: Builder, grads: Mapping[str, Value], norm: Value, limit: float) -> dict[str, Value]:
    """Gradients scaled down together so that their global ``norm`` becomes at most ``limit`` (torch's clip_grad_norm_)."""
    scale = b.minimum(b.div(limit, b.add(norm, 1e-6)), 1.0)
    return {k: b.mul(g, scale) for k, g in grads.items()}
