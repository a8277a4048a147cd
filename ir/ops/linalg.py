"""Matrix products. f16 and bf16 operands accumulate in f32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..axes import AxisRule, Factor, broadcast, free
from ..checks import require_equal
from ..dims import DimLike
from ..errors import TypeMismatch
from ..op import Attrs, ErrorSample, Op, Sample, broadcast_shapes, floating, register, same_dtype, tensor
from ..types import TensorType, Type
from .elementwise import grid, wide

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Node, Value


@register
class MatMul(Op):
    """x [.., m, k] @ y [.., k, n] -> [.., m, n]; leading axes broadcast."""

    name = "matmul"
    kind = "product"
    precision = "half"

    def infer(self, attrs: Attrs, x: TensorType, y: TensorType) -> TensorType:
        if tensor(x).rank < 2 or tensor(y).rank < 2:
            raise TypeMismatch(f"both operands need at least two axes: {x}, {y}")
        dtype = same_dtype(x, y)
        require_equal(x.shape[-1], y.shape[-2], "inner dimensions")
        return TensorType(dtype, (*broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1]))

    def axes(self, attrs: Attrs, x: TensorType, y: TensorType) -> AxisRule:
        (left, right), (lead,) = (rule := broadcast(x.shape[:-2], y.shape[:-2])).operands, rule.results
        m, k, n = (Factor(x.shape[-2]),), (Factor(x.shape[-1], "reduced", "sum"),), (Factor(y.shape[-1]),)
        return AxisRule(((*left, m, k), (*right, k, n)), ((*lead, m, n),))

    def reference(self, attrs: Attrs, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.matmul(wide(x), wide(y)).astype(x.dtype)

    def multiply_adds(self, attrs: Attrs, x: TensorType, y: TensorType) -> DimLike:
        return self.infer(attrs, x, y).size * x.shape[-1]

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        x, y = node.inputs

        def t(v: Value) -> Value:
            r = len(v.shape)
            return b.transpose(v, perm=(*range(r - 2), r - 1, r - 2))

        return [b.sum_to(b.matmul(g, t(y)), x.shape), b.sum_to(b.matmul(t(x), g), y.shape)]

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 3), grid(3, 4)])
        yield Sample([grid(2, 1, 3, 5), grid(4, 5, 2)])
        yield Sample([grid(2, 8).astype(np.float16), grid(8, 3).astype(np.float16)])
        yield Sample([np.arange(6).reshape(2, 3), np.arange(6).reshape(3, 2)])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2, 3]", "f32[4, 2]"], {}, "inner dimensions")
        yield ErrorSample(["f32[3]", "f32[3, 2]"], {}, "two axes")
        yield ErrorSample(["f32[2, 3]", "f16[3, 2]"], {}, "element types differ")


def rows_type(x: TensorType, w: Type, bias: TensorType | None) -> TensorType:
    """The type of rows x [.., k] multiplied by a weight [n, k] (and a bias [n] added): [.., n]."""
    require_equal(x.shape[-1], w.shape[1], "last axis of x and of the weight")
    if bias is not None:
        if tensor(bias).rank != 1 or same_dtype(x, bias) is None:
            raise TypeMismatch(f"the bias must be [{w.shape[0]}], not {bias}")
        require_equal(bias.shape[0], w.shape[0], "bias and first axis of the weight")
    return x.with_shape(*x.shape[:-1], w.shape[0])


def rows_by_weight(x: Type, w: Type, how: str, bias: bool) -> AxisRule:
    """x [.., k], w [n, k], bias [n] -> [.., n]."""
    lead, n, k = free(x.shape[:-1]), (Factor(w.shape[0]),), (Factor(x.shape[-1], "reduced", how),)
    return AxisRule(((*lead, k), (n, k), *(((n,),) if bias else ())), ((*lead, n),))


@register
class Linear(Op):
    """y = x @ w^T (+ bias): x [.., k], w [n, k], bias [n] -> [.., n].

    The weight may be stored in another float type than x; it is converted to x's before the product.
    """

    name = "linear"
    kind = "product"
    precision = "half"
    weight = 1
    quantized = "quantized_linear"

    def infer(self, attrs: Attrs, x: TensorType, w: TensorType, bias: TensorType | None = None) -> TensorType:
        floating(x, "x")
        if floating(w, "the weight").rank != 2 or x.rank < 1:
            raise TypeMismatch(f"linear takes x [.., k] and a weight [n, k], not {x} and {w}")
        return rows_type(x, w, bias)

    def axes(self, attrs: Attrs, x: TensorType, w: TensorType, *bias: TensorType) -> AxisRule:
        return rows_by_weight(x, w, "" if bias else "sum", bool(bias))

    def reference(self, attrs: Attrs, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        y = wide(x) @ wide(w.astype(x.dtype)).T
        return (y if bias is None else y + wide(bias)).astype(x.dtype)

    def multiply_adds(self, attrs: Attrs, x: TensorType, w: TensorType, *bias: TensorType) -> DimLike:
        return x.size * w.shape[0]

    def decompose(self, b: Builder, attrs: Attrs, x: Value, w: Value, bias: Value | None = None) -> Value:
        if w.tensor.dtype is not x.tensor.dtype:
            w = b.cast(w, dtype=x.tensor.dtype)
        flat = b.reshape(x, shape=(1, *x.shape)) if len(x.shape) == 1 else x
        y = b.matmul(flat, b.transpose(w, perm=(1, 0)))
        if len(x.shape) == 1:
            y = b.reshape(y, shape=(w.shape[0],))
        return y if bias is None else b.add(y, bias)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        """Leading axes are rows of one product: the decomposition's would sum a weight gradient for each of them."""
        x, w = node.inputs[:2]
        n, k = w.shape
        rows: DimLike = 1
        for d in x.shape[:-1]:
            rows = rows * d
        x_rows, g_rows = b.reshape(x, shape=(rows, k)), b.reshape(g, shape=(rows, n))
        dx = b.reshape(b.matmul(g_rows, b.cast(w, dtype=x.tensor.dtype)), shape=x.shape)
        dw = b.cast(b.matmul(b.transpose(g_rows, perm=(1, 0)), x_rows), dtype=w.tensor.dtype)
        return [dx, dw, *([b.reduce_sum(g_rows, axes=(0,))] if len(node.inputs) > 2 else [])]

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 3, 5), grid(4, 5)])
        yield Sample([grid(3, 5), grid(4, 5), grid(4)])
        yield Sample([grid(5), grid(4, 5)])
        yield Sample([grid(3, 40), grid(70, 40).astype(np.float16)], grad=(0,))

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[b, 3]", "f32[4, 5]"], {}, "last axis of x")
        yield ErrorSample(["f32[b, 5]", "f32[4, 5]", "f32[5]"], {}, "bias and first axis")
        yield ErrorSample(["f32[b, 5]", "f32[5]"], {}, "a weight [n, k]")
        yield ErrorSample(["i32[b, 5]", "f32[4, 5]"], {}, "must be float")
