"""Optimizer steps: each takes a rate, a step count, and groups of tensors, gradients and states."""

from __future__ import annotations

from typing import Any

from ..emit import Emitter, Operand
from ..registry import TRAINING, NodeView, op


def _groups(xs: tuple[Operand, ...], count: int) -> list[tuple[Operand, ...]]:
    """x1.. xn g1.. gn .. as (x1, g1, ..), (x2, g2, ..), .."""
    n = len(xs) // count
    return [tuple(xs[i + k * n] for k in range(count)) for i in range(n)]


def _flat(results: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(r[k] for k in range(len(results[0])) for r in results)


@op("Adagrad", domain=TRAINING)
def adagrad(c: Emitter, n: NodeView, rate: Operand, step: Operand, *xs: Operand) -> Any:
    rate = c.div(rate, c.add(c.mul(c.to(step, c.dtype(rate)), n["decay_factor"]), 1.0))
    out = []
    for x, gradient, h in _groups(xs, 3):
        g = c.add(c.mul(x, n["norm_coefficient"]), gradient)
        new = c.add(h, c.mul(g, g))
        out.append((c.sub(x, c.div(c.mul(rate, g), c.add(c.sqrt(new), n["epsilon"]))), new))
    return _flat(out)


@op("Momentum", domain=TRAINING)
def momentum(c: Emitter, n: NodeView, rate: Operand, step: Operand, *xs: Operand) -> Any:
    alpha = n["alpha"]
    out = []
    for x, gradient, v in _groups(xs, 3):
        g = c.add(c.mul(x, n["norm_coefficient"]), gradient)
        new = c.add(c.mul(v, alpha), c.mul(g, c.select(c.greater(step, 0), c.to(_number(c, n["beta"], x), c.dtype(x)), 1.0)))
        change = new if n["mode"] == "standard" else c.add(g, c.mul(new, alpha))
        out.append((c.sub(x, c.mul(rate, change)), new))
    return _flat(out)


def _number(c: Emitter, value: float, like: Operand) -> Any:
    return c.full((), value, c.dtype(like))


@op("Adam", domain=TRAINING)
def adam(c: Emitter, n: NodeView, rate: Operand, step: Operand, *xs: Operand) -> Any:
    alpha, beta = n["alpha"], n["beta"]
    t = c.to(step, c.dtype(rate))
    corrected = c.div(
        c.mul(rate, c.sqrt(c.sub(1.0, c.pow(_number(c, beta, rate), t)))), c.sub(1.0, c.pow(_number(c, alpha, rate), t))
    )
    rate = c.select(c.greater(step, 0), corrected, rate)
    out = []
    for x, gradient, v, h in _groups(xs, 4):
        g = c.add(c.mul(x, n["norm_coefficient"]), gradient)
        first = c.add(c.mul(v, alpha), c.mul(g, 1 - alpha))
        second = c.add(c.mul(h, beta), c.mul(c.mul(g, g), 1 - beta))
        new = c.sub(x, c.mul(rate, c.div(first, c.add(c.sqrt(second), n["epsilon"]))))
        out.append((c.mul(new, 1 - n["norm_coefficient_post"]), first, second))
    return _flat(out)
