"""Recognizes RMS and layer normalization however they are written out."""

from __future__ import annotations

from typing import Any

from wasat.ir import Builder, DType, Node, Value, equal

from ..pattern import Match, Mismatch, Pattern, Rewrite, Rewrites, Tracer, Var, last_axis

_NEAR = 5
"""How many operations from a root a mean is looked for."""


def _mean(p: Tracer, x: Pattern) -> Pattern:
    return p.reduce_mean(x, axes=last_axis, keepdims=True)


def _square(p: Tracer, x: Pattern) -> Pattern:
    return p.either(p.mul(x, x), p.pow(x, 2.0))


def _variance(p: Tracer, x: Pattern, eps: Var) -> Pattern:
    return p.add(_mean(p, _square(p, x)), p.number(eps))


def _over_root(p: Tracer, x: Pattern, v: Pattern) -> Pattern:
    """x / sqrt(v)."""
    return p.either(p.mul(x, p.rsqrt(v)), p.div(x, p.sqrt(v)), p.mul(x, p.div(1.0, p.sqrt(v))), p.mul(x, p.pow(v, -0.5)))


def _per_feature(m: Match, name: str, x: Value) -> Value:
    """The capture ``name``, which must be one number of x's type per element of x's last axis."""
    w: Value = m[name]
    if len(w.shape) != 1 or w.shape[0] != x.shape[-1] or w.tensor.dtype is not x.tensor.dtype:
        raise Mismatch(f"{w!r} is not a weight {x.tensor.dtype}[{x.shape[-1]}]")
    return w


def _holds_mean(v: Value, near: int = _NEAR) -> bool:
    """Whether ``v`` is made by a few elementwise operations of a mean over an axis, or of a sum that is no length by itself."""
    node = v.node
    if node is None or v.const is not None or near == 0 or (near == _NEAR and node.is_a("maximum")):
        return False
    if node.is_a("reduce_mean", "reduce_sum"):
        return node.is_a("reduce_mean") or near < _NEAR
    return node.op.elementwise and any(_holds_mean(u, near - 1) for u in node.inputs)


class _Mean(Rewrite):
    """sum(x) / n, or sum(x) * (1/n) -> mean(x), where n is the number of elements of the last axis

    Quotients of integers, which are rounded towards 0, are of another type than a mean.
    """

    def pattern(self, p: Tracer, x: Var, n: Var, inverse: Var) -> Pattern:
        total = p.named("total", p.reduce_sum(x, axes=last_axis))
        return p.either(p.div(total, p.number(n)), p.mul(total, p.number(inverse)))

    def build(self, b: Builder, m: Match) -> Value:
        n = m["n"] if "n" in m else 1 / m["inverse"] if m["inverse"] else 0.0
        size = m["x"].shape[-1]
        if not isinstance(size, int) or abs(n - size) > 1e-6 * size:
            raise Mismatch(f"{n:g} is not the number of elements, {size}")
        attrs = m["total"].node.attrs
        return b.reduce_mean(m["x"], axes=attrs.axes, keepdims=attrs.keepdims)


class _Norm(Rewrite):
    """Normalization by a root. Of that of what holds no mean (lengths of vectors, deviations of gates) nothing is missed."""

    landmark = ("rsqrt", "sqrt")

    def is_landmark(self, node: Node) -> bool:
        return super().is_landmark(node) and _holds_mean(node.inputs[0])


class _LayerNorm(_Norm):
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) -> layer_norm(x)"""

    def pattern(self, p: Tracer, x: Var, eps: Var) -> Pattern:
        centered = p.sub(x, _mean(p, x))
        return _over_root(p, centered, _variance(p, centered, eps))

    def build(self, b: Builder, m: Match) -> Value:
        return b.layer_norm(m["x"], eps=m["eps"])


class _Weight(Rewrite):
    """norm(x) * w -> norm(x, w), of both norms"""

    def pattern(self, p: Tracer, x: Var, w: Var) -> Pattern:
        return p.mul(p.named("norm", p.either(p.layer_norm(x), p.rms_norm(x))), w)

    def build(self, b: Builder, m: Match) -> Value:
        node = m["norm"].node
        norm = b.layer_norm if node.is_a("layer_norm") else b.rms_norm
        return norm(m["x"], _per_feature(m, "w", m["x"]), eps=node.attrs.eps)


class _LayerNormBias(Rewrite):
    """layer_norm(x, w) + bias -> layer_norm(x, w, bias)"""

    def pattern(self, p: Tracer, x: Var, w: Var, bias: Var) -> Pattern:
        return p.add(p.named("norm", p.layer_norm(x, w)), bias)

    def build(self, b: Builder, m: Match) -> Value:
        return b.layer_norm(m["x"], m["w"], _per_feature(m, "bias", m["x"]), eps=m["norm"].node.attrs.eps)


class _RmsNorm(_Norm):
    """x / sqrt(mean(x^2) + eps) -> rms_norm(x), also where a weight went in before the last product"""

    def pattern(self, p: Tracer, x: Var, eps: Var, w: Var) -> Pattern:
        v = _variance(p, x, eps)
        return p.either(_over_root(p, x, v), p.mul(x, p.mul(p.rsqrt(v), w)), _over_root(p, p.mul(x, w), v))

    def build(self, b: Builder, m: Match) -> Value:
        weight = [_per_feature(m, "w", m["x"])] if "w" in m else []
        return b.rms_norm(m["x"], *weight, eps=m["eps"])


class _Narrow(Rewrite):
    """cast(norm(cast(x), cast(w), ..)) -> norm(x, w, ..) of the narrow type: the operation computes in f32 by itself"""

    def pattern(self, p: Tracer, x: Var, w: Var, bias: Var) -> Pattern:
        wide, weight = p.shared(p.cast(x)), p.shared(p.cast(w))
        norms = [p.rms_norm(wide), p.rms_norm(wide, weight), p.layer_norm(wide), p.layer_norm(wide, weight)]
        return p.cast(p.named("norm", p.either(*norms, p.layer_norm(wide, weight, p.shared(p.cast(bias))))))

    def build(self, b: Builder, m: Match) -> Value:
        x, node = m["x"], m["norm"].node
        if not x.tensor.dtype.is_float or x.tensor.dtype.bits > 16 or node.output.tensor.dtype is not DType.F32:
            raise Mismatch(f"{x!r} is not widened to f32")
        operands: list[Any] = [_per_feature(m, k, x) for k in ("w", "bias") if k in m]
        return b.emit(node.op, x, *operands, eps=node.attrs.eps)


class _Repeated(Rewrite):
    """norm(repeat(x)) -> repeat(norm(x)), as heads of keys are repeated for queries: attention sees what these share"""

    def pattern(self, p: Tracer, one: Var, w: Var, bias: Var) -> Pattern:
        spread = p.named("spread", p.shared(p.broadcast_to(one)))
        x = p.either(spread, p.named("rows", p.shared(p.reshape(spread))))
        norms = [p.rms_norm(x), p.rms_norm(x, w), p.layer_norm(x), p.layer_norm(x, w), p.layer_norm(x, w, bias)]
        return p.named("norm", p.either(*norms))

    def build(self, b: Builder, m: Match) -> Value:
        one, spread, node = m["one"], m["spread"].shape, m["norm"].node
        if not one.shape or any(equal(v.shape[-1], one.shape[-1]) is not True for v in (m["spread"], m["norm"])):
            raise Mismatch(f"%{m['spread'].name} repeats features")
        y = b.emit(node.op, one, *(m[k] for k in ("w", "bias") if k in m), eps=node.attrs.eps)
        y = b.broadcast_to(y, shape=spread)
        return b.reshape(y, shape=m["rows"].shape) if "rows" in m else y


class FuseNorm(Rewrites):
    """RMS and layer normalization of the last axis, in their many spellings -> ``rms_norm``, ``layer_norm``.

    A weight and a bias of one number per feature join them. Casts of f16 and bf16 around a norm in f32 go, as the operations
    compute in f32 inside; a weight that is multiplied in the narrow type is then rounded once instead of twice.
    What is repeated and then normalized is normalized once.
    """

    name = "fuse-norm"
    # a layer norm holds an RMS norm of the centered x, so it goes first; weights join before and after casts
    rules = (
        _Mean(), _LayerNorm(), _Weight(), _LayerNormBias(), _RmsNorm(), _Weight(), _Narrow(),
        _Weight(), _LayerNormBias(), _Repeated(),
    )  # fmt: skip
