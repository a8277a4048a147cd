"""Recognizes activation functions and softmax however they are written out."""

from __future__ import annotations

import math
from typing import Any

from wasat.ir import Builder, Node, Value

from ..pattern import Match, Mismatch, Pattern, Rewrite, Rewrites, Tracer, Var


def _half(p: Tracer, x: Pattern) -> Pattern:
    return p.either(p.mul(x, 0.5), p.div(x, 2.0))


def _times_half(p: Tracer, x: Pattern, y: Pattern) -> Pattern:
    """x * y / 2, halved anywhere."""
    return p.either(p.mul(x, _half(p, y)), p.mul(_half(p, x), y), _half(p, p.mul(x, y)))


def _read_by(node: Node, op: str) -> bool:
    return any(user.is_a(op) for v in node.outputs for user, _ in v.uses)


class _Sigmoid(Rewrite):
    """1 / (1 + exp(-x)), or (1 + tanh(x/2)) / 2 -> sigmoid(x)"""

    def pattern(self, p: Tracer, x: Var) -> Pattern:
        return p.either(p.div(1.0, p.add(p.exp(p.neg(x)), 1.0)), _half(p, p.add(p.tanh(_half(p, x)), 1.0)))

    def build(self, b: Builder, m: Match) -> Value:
        return b.sigmoid(m["x"])


class _Silu(Rewrite):
    """x * sigmoid(x), or x / (1 + exp(-x)) -> silu(x)"""

    def pattern(self, p: Tracer, x: Var) -> Pattern:
        return p.either(p.mul(x, p.sigmoid(x)), p.div(x, p.add(p.exp(p.neg(x)), 1.0)))

    def build(self, b: Builder, m: Match) -> Value:
        return b.silu(m["x"])


class _GeluErf(Rewrite):
    """x/2 * (1 + erf(x / sqrt(2))) -> gelu(x)"""

    landmark = "erf"

    def pattern(self, p: Tracer, x: Var) -> Pattern:
        scaled = p.either(p.mul(x, math.sqrt(0.5)), p.div(x, math.sqrt(2)))
        return _times_half(p, p.add(p.erf(scaled), 1.0), x)

    def build(self, b: Builder, m: Match) -> Value:
        return b.gelu(m["x"])


class _GeluTanh(Rewrite):
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) -> gelu(x), approximated by tanh"""

    landmark = "tanh"

    def is_landmark(self, node: Node) -> bool:
        return super().is_landmark(node) and _read_by(node, "add")  # others are caps, gates, activations themselves

    def pattern(self, p: Tracer, x: Var) -> Pattern:
        c, k = math.sqrt(2 / math.pi), 0.044715
        square = p.either(p.mul(x, x), p.pow(x, 2.0))
        cubed = p.either(p.pow(x, 3.0), p.mul(square, x))
        part = p.either(p.mul(square, k), p.mul(p.mul(x, k), x))
        scaled = p.either(
            p.mul(p.add(x, p.either(p.mul(cubed, k), p.mul(part, x), p.mul(p.mul(x, k), square))), c),
            p.mul(p.mul(x, c), p.add(part, 1.0)),
            p.mul(p.mul(x, p.add(part, 1.0)), c),
            p.mul(x, p.add(p.mul(square, k * c), c)),
        )
        return _times_half(p, p.add(p.tanh(scaled), 1.0), x)

    def build(self, b: Builder, m: Match) -> Value:
        return b.gelu(m["x"], approximate="tanh")


class _StableSoftplus(Rewrite):
    """max(x, 0) + log(1 + exp(-|x|)) -> softplus(x)"""

    def pattern(self, p: Tracer, x: Var) -> Pattern:
        return p.add(p.maximum(x, 0.0), p.log1p(p.exp(p.neg(p.abs(x)))))

    def build(self, b: Builder, m: Match) -> Value:
        return b.softplus(m["x"])


class _Softplus(_StableSoftplus):
    """log(1 + exp(x)) -> softplus(x), which does not overflow"""

    def pattern(self, p: Tracer, x: Var) -> Pattern:
        return p.either(p.log1p(p.exp(x)), p.log(p.add(p.exp(x), 1.0)))


def _one_axis(axes: Any, node: Node) -> bool:
    return len(axes) == 1


class _Softmax(Rewrite):
    """exp(x) / sum(exp(x)) -> softmax(x)"""

    landmark = "exp"

    def is_landmark(self, node: Node) -> bool:
        return super().is_landmark(node) and (_read_by(node, "reduce_sum") or _read_by(node, "div"))

    def pattern(self, p: Tracer, x: Var) -> Pattern:
        e = p.exp(x)
        return p.div(e, p.named("sum", p.reduce_sum(e, axes=_one_axis, keepdims=True)))

    def build(self, b: Builder, m: Match) -> Value:
        return b.softmax(m["x"], axis=m["sum"].node.attrs.axes[0])


class _Unshift(Rewrite):
    """softmax(x - max(x)) -> softmax(x): the operation subtracts the maximum by itself"""

    def pattern(self, p: Tracer, x: Var) -> Pattern:
        top = p.named("max", p.reduce_max(x, axes=_one_axis, keepdims=True))
        return p.named("softmax", p.softmax(p.sub(x, p.either(top, p.stop_gradient(top)))))

    def build(self, b: Builder, m: Match) -> Value:
        axis = m["softmax"].node.attrs.axis
        if m["max"].node.attrs.axes != (axis,):
            raise Mismatch("the maximum is over another axis than the softmax")
        return b.softmax(m["x"], axis=axis)


class FuseActivations(Rewrites):
    """Sigmoid, SiLU, GELU (by erf or tanh), softplus and softmax written out -> the operations of those names.

    The operations are the same functions, computed so that no intermediate result overflows.
    """

    name = "fuse-activations"
    rules = (_Sigmoid(), _Silu(), _GeluErf(), _GeluTanh(), _StableSoftplus(), _Softplus(), _Softmax(), _Unshift())
