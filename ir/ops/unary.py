"""Elementwise functions of one operand. Narrow floats are computed in f32 and rounded once; integers wrap around."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import TypeMismatch
from ..op import Attrs, ErrorSample, Op, Sample, floating, register, tensor
from ..types import DType, TensorType
from .elementwise import Grads, erf, grid, wide

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Node, Value


class Unary(Op):
    """Base of float functions of one operand; ``low``/``high`` bound the samples."""

    kind = "elementwise"
    f: ClassVar[Callable[[Any], Any]]
    low: ClassVar[float] = -2.0
    high: ClassVar[float] = 2.0

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        return floating(x)

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.asarray(type(self).f(wide(x))).astype(x.dtype)

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 4, low=self.low, high=self.high)])
        yield Sample([grid(5, low=self.low, high=self.high).astype(np.float16)])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["i32[2]"], {}, "must be float")


def _unary(
    op_name: str, f: Callable[[Any], Any], grad: Callable[[Builder, Value, Value], Any] | None, doc: str,
    low: float = -2.0, high: float = 2.0, wide: bool = False,
) -> None:  # fmt: skip
    """Registers a float function; ``grad(b, x, y)`` is dy/dx, None for a step function, whose gradient is zero."""

    def vjp(self: Op, b: Builder, node: Node, g: Value) -> Grads:
        return [b.mul(g, grad(b, node.inputs[0], node.output))] if grad else [None]

    body: dict[str, Any] = {
        "__doc__": doc, "name": op_name, "f": staticmethod(f), "low": low, "high": high, "differentiable": grad is not None,
        "vjp": vjp, "precision": "wide" if wide else "any",
    }  # fmt: skip
    register(type(op_name.capitalize(), (Unary,), body))


_unary("exp", np.exp, lambda b, x, y: y, "e to the x.", wide=True)
_unary("expm1", np.expm1, lambda b, x, y: b.add(y, 1.0), "exp(x) - 1, exact near 0.", wide=True)
_unary("log", np.log, lambda b, x, y: b.div(1.0, x), "Natural logarithm.", 0.2, 3.0, wide=True)
_unary("log1p", np.log1p, lambda b, x, y: b.div(1.0, b.add(x, 1.0)), "log(1 + x), exact near 0.", -0.5, 3.0, wide=True)
_unary("sqrt", np.sqrt, lambda b, x, y: b.div(0.5, y), "Square root.", 0.2, 3.0, wide=True)
_unary("rsqrt", lambda x: 1 / np.sqrt(x), lambda b, x, y: b.mul(-0.5, b.div(y, x)), "1 / sqrt(x).", 0.2, 3.0, wide=True)
_unary("sin", np.sin, lambda b, x, y: b.cos(x), "Sine.")
_unary("cos", np.cos, lambda b, x, y: b.neg(b.sin(x)), "Cosine.")
_unary("tan", np.tan, lambda b, x, y: b.add(b.mul(y, y), 1.0), "Tangent.", -1.2, 1.2, wide=True)
_unary("asin", np.arcsin, lambda b, x, y: b.rsqrt(b.sub(1.0, b.mul(x, x))), "Inverse sine.", -0.9, 0.9, wide=True)
_unary("acos", np.arccos, lambda b, x, y: b.neg(b.rsqrt(b.sub(1.0, b.mul(x, x)))), "Inverse cosine.", -0.9, 0.9, wide=True)
_unary("atan", np.arctan, lambda b, x, y: b.div(1.0, b.add(b.mul(x, x), 1.0)), "Inverse tangent.")
_unary("sinh", np.sinh, lambda b, x, y: b.cosh(x), "Hyperbolic sine.", wide=True)
_unary("cosh", np.cosh, lambda b, x, y: b.sinh(x), "Hyperbolic cosine.", wide=True)
_unary("tanh", np.tanh, lambda b, x, y: b.sub(1.0, b.mul(y, y)), "Hyperbolic tangent.")
_unary("asinh", np.arcsinh, lambda b, x, y: b.rsqrt(b.add(b.mul(x, x), 1.0)), "Inverse hyperbolic sine.")
_unary("acosh", np.arccosh, lambda b, x, y: b.rsqrt(b.sub(b.mul(x, x), 1.0)), "Inverse hyperbolic cosine.", 1.2, 3.0, wide=True)
_unary(
    "atanh", np.arctanh, lambda b, x, y: b.div(1.0, b.sub(1.0, b.mul(x, x))), "Inverse hyperbolic tangent.", -0.9, 0.9,
    wide=True,
)  # fmt: skip
_unary(
    "erf", erf, lambda b, x, y: b.mul(2 / math.sqrt(math.pi), b.exp(b.neg(b.mul(x, x)))),
    "2/sqrt(pi) * integral of exp(-t^2), 0..x.",
)  # fmt: skip
_unary("floor", np.floor, None, "Largest integer not above x.")
_unary("ceil", np.ceil, None, "Smallest integer not below x.")
_unary("round", np.rint, None, "Nearest integer, halves to even.")


@register
class Neg(Op):
    """-x; integers wrap around."""

    name = "neg"
    kind = "elementwise"
    involution = True

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        return _number(x)

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.negative(x)

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        return [b.neg(g)]

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 3)])
        yield Sample([np.array([-128, 5], np.int8)])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["bool[2]"], {}, "must be numbers")


def _number(x: TensorType) -> TensorType:
    if tensor(x).dtype is DType.BOOL:
        raise TypeMismatch(f"the operand must be numbers, not {x}; cast it first")
    return x


@register
class Abs(Neg):
    """Magnitude; the gradient at 0 is 0."""

    name = "abs"
    involution = False

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.abs(x)

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        return [b.mul(g, b.sign(node.inputs[0]))]

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 4)])
        yield Sample([np.array([-7, 5], np.int32)])


@register
class Sign(Neg):
    """-1, 0 or 1; NaN stays NaN."""

    name = "sign"
    involution = False
    differentiable = False

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.sign(x)

    def vjp(self, b: Builder, node: Node, g: Value) -> Grads:
        return [None]

    def samples(self) -> Iterable[Sample]:
        yield Sample([np.array([-2.5, 0.0, 3.0], np.float32)])
        yield Sample([np.array([-2, 0, 3], np.int64)])
