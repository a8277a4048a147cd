"""Products of rows with the matrix of their group: mixtures of experts, and other banks of weights that rows choose from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import op as _op
from ..axes import AxisRule, Factor, aligned, broadcast
from ..checks import require_equal
from ..dims import DimLike
from ..errors import TypeMismatch
from ..op import Bounds, ErrorSample, Op, Sample, broadcast_shapes, concrete, floating, quantized, register, same_dtype, tensor
from ..types import DType, QArray, QTensorType, TensorType, Type
from .elementwise import grid, wide
from .index import indices
from .quant import _q, product_of_integers, rounded_rows

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Node, Value


def _grouped(x: TensorType, w: Type, groups: TensorType, bias: TensorType | None) -> TensorType:
    """Type of the product, or TypeMismatch."""
    if w.rank != 3 or floating(x, "x").rank < 1:
        raise TypeMismatch(f"a grouped product takes x [.., k] and weights [e, n, k], not {x} and {w}")
    require_equal(x.shape[-1], w.shape[2], "last axis of x and of the weights")
    if bias is not None:
        if tensor(bias).rank != 2 or same_dtype(x, bias) is None:
            raise TypeMismatch(f"the bias must be [{w.shape[0]}, {w.shape[1]}], not {bias}")
        for i in range(2):
            require_equal(bias.shape[i], w.shape[i], f"axis {i} of the bias and of the weights")
    return x.with_shape(*broadcast_shapes(x.shape[:-1], indices(groups, "groups").shape), w.shape[1])


def _rule(x: TensorType, w: Type, groups: TensorType, bias: tuple[TensorType, ...], how: str) -> AxisRule:
    (left, at), (lead,) = (rule := broadcast(x.shape[:-1], groups.shape)).operands, rule.results
    e, n, k = (Factor(w.shape[0], "indexed"),), (Factor(w.shape[1]),), (Factor(x.shape[-1], "reduced", how),)
    return AxisRule(((*left, k), (e, n, k), at, *(((e, n),) if bias else ())), ((*lead, n),))


def _each_group(lead: tuple[int, ...], groups: np.ndarray, size: int) -> Iterable[tuple[int, np.ndarray]]:
    """Of each group that has any of the rows ``lead``: its number, and which they are."""
    if groups.size and (groups.min() < 0 or groups.max() >= size):
        raise TypeMismatch(f"group {groups[(groups < 0) | (groups >= size)].flat[0]} is outside 0 .. {size - 1}")
    flat = np.broadcast_to(groups, lead).reshape(-1)
    for e in np.unique(flat):
        yield int(e), np.flatnonzero(flat == e)


def _rows(x: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(x, (*lead, x.shape[-1])).reshape(int(np.prod(lead)), x.shape[-1])


class _Grouped(Op):
    """What both products have in common."""

    kind = "product"
    weight = 1

    def bounds(self, attrs: _op.Attrs, x: TensorType, w: Type, groups: TensorType, *bias: TensorType) -> Mapping[int, Bounds]:
        return {2: (0, w.shape[0])}

    def multiply_adds(self, attrs: _op.Attrs, x: TensorType, w: Type, groups: TensorType, *bias: TensorType) -> DimLike:
        return _grouped(x, w, groups, None).size * x.shape[-1]


@register
class GroupedLinear(_Grouped):
    """Each row by the matrix of its group: ``y[..] = w[groups[..]] @ x[..] (+ bias[groups[..]])``.

    x [.., k], w [e, n, k], groups int [..], bias [e, n] -> [.., n]; the leading axes of x and groups broadcast: x [s, 1, k] and
    groups [s, j] are j products of each row. The weight may be stored in another float type than x, as that of ``linear``.
    """

    name = "grouped_linear"
    precision = "half"
    quantized = "quantized_grouped_linear"

    def infer(
        self, attrs: _op.Attrs, x: TensorType, w: TensorType, groups: TensorType, bias: TensorType | None = None
    ) -> TensorType:
        return _grouped(x, floating(w, "the weights"), groups, bias)

    def axes(self, attrs: _op.Attrs, x: TensorType, w: TensorType, groups: TensorType, *bias: TensorType) -> AxisRule:
        return _rule(x, w, groups, bias, "" if bias else "sum")

    def reference(
        self, attrs: _op.Attrs, x: np.ndarray, w: np.ndarray, groups: np.ndarray, bias: np.ndarray | None = None
    ) -> np.ndarray:
        lead = np.broadcast_shapes(x.shape[:-1], groups.shape)
        out, rows = np.zeros((int(np.prod(lead)), w.shape[1]), wide(x).dtype), _rows(wide(x), lead)
        for e, at in _each_group(lead, groups, len(w)):
            y = (rows[at, None] @ wide(w[e].astype(x.dtype)).T)[:, 0]  # row by row: the same bits in whatever company
            out[at] = y if bias is None else y + wide(bias[e])
        return out.reshape(*lead, out.shape[-1]).astype(x.dtype)

    def decompose(
        self, b: Builder, attrs: _op.Attrs, x: Value, w: Value, groups: Value, bias: Value | None = None
    ) -> Value:
        """All groups' products, of which each row's is picked: no weight is copied for each row."""
        e, n, k = w.shape
        lead = broadcast_shapes(x.shape[:-1], groups.shape)
        own, at = (((1,) * (len(lead) - len(s)) + tuple(s)) for s in (x.shape[:-1], groups.shape))
        every = b.linear(b.reshape(x, shape=(*own, k)), b.reshape(w, shape=(e * n, k)))
        every = b.reshape(every, shape=(*own, e, n))
        if bias is not None:
            every = b.add(every, bias)
        y = b.take_along(every, b.reshape(groups, shape=(*at, 1, 1)), axis=len(lead))
        return b.reshape(y, shape=(*lead, n))

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        x, w, groups = node.inputs[:3]
        back = b.transpose(w, perm=(0, 2, 1))
        dx = b.sum_to(b.grouped_linear(g, back, groups), x.shape)
        dw = b.cast(b.grouped_outer(g, x, groups, size=w.shape[0]), dtype=w.tensor.dtype)
        return [dx, dw, None, *([_bias_gradient(b, g, groups, node.inputs[3])] if len(node.inputs) > 3 else [])]

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 3, 5), grid(4, 7, 5), np.array([[3, 0, 0], [2, 3, 1]])])
        yield Sample([grid(3, 1, 5), grid(4, 7, 5), np.array([[3, 0], [2, 3], [1, 1]], np.int32), grid(4, 7)])
        yield Sample([grid(5), grid(4, 7, 5), np.array(2)])
        yield Sample([grid(5), grid(4, 7, 5), np.array([2, 0, 2]), grid(4, 7)])
        yield Sample([grid(2, 3, 5), grid(4, 7, 5).astype(np.float16), np.array([1, 0, 1])], grad=(0,))

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[b, 3]", "f32[e, 4, 5]", "i64[b]"], {}, "last axis of x")
        yield ErrorSample(["f32[b, 5]", "f32[4, 5]", "i64[b]"], {}, "weights [e, n, k]")
        yield ErrorSample(["f32[b, 5]", "f32[e, 4, 5]", "f32[b]"], {}, "must be integers")
        yield ErrorSample(["f32[2, 5]", "f32[e, 4, 5]", "i64[3]"], {}, "broadcast shape")
        yield ErrorSample(["f32[b, 5]", "f32[3, 4, 5]", "i64[b]", "f32[4]"], {}, "the bias must be [3, 4]")
        yield ErrorSample(["f32[b, 5]", "f32[3, 4, 5]", "i64[b]", "f32[3, 5]"], {}, "axis 1 of the bias")


def _bias_gradient(b: Builder, g: Value, groups: Value, bias: Value) -> Value:
    zeros = b.broadcast_to(b.constant(0.0, bias.tensor.dtype), shape=bias.shape)
    return b.scatter(zeros, b.broadcast_to(groups, shape=g.shape[:-1]), g, axis=0, reduce="add")


@register
class GroupedOuter(Op):
    """Sums of outer products by group: ``out[e] = sum of y[..] x[..]^T over the rows with groups[..] == e``.

    y [.., n], x [.., k], groups int [..] -> [size, n, k]; leading axes broadcast. So are the gradients of grouped weights.
    """

    name = "grouped_outer"
    kind = "product"
    precision = "half"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        size: DimLike

    def infer(self, attrs: Attrs, y: TensorType, x: TensorType, groups: TensorType) -> TensorType:
        if floating(y, "y").rank < 1 or floating(x, "x").rank < 1:
            raise TypeMismatch(f"grouped_outer takes y [.., n] and x [.., k], not {y} and {x}")
        broadcast_shapes(y.shape[:-1], x.shape[:-1], indices(groups, "groups").shape)
        return TensorType(same_dtype(y, x), (attrs.size, y.shape[-1], x.shape[-1]))

    def bounds(self, attrs: Attrs, *types: TensorType) -> Mapping[int, Bounds]:
        return {2: (0, attrs.size)}

    def axes(self, attrs: Attrs, y: TensorType, x: TensorType, groups: TensorType) -> AxisRule:
        leads = [t.shape[: t.rank - i] for t, i in ((y, 1), (x, 1), (groups, 0))]
        summed = tuple((Factor(d, "reduced", "sum"),) for d in broadcast_shapes(*leads))
        own = [aligned(s, summed) for s in leads]
        n, k = (Factor(y.shape[-1]),), (Factor(x.shape[-1]),)
        return AxisRule(((*own[0], n), (*own[1], k), own[2]), (((Factor(attrs.size, "whole"),), n, k),))

    def multiply_adds(self, attrs: Attrs, y: TensorType, x: TensorType, groups: TensorType) -> DimLike:
        lead = broadcast_shapes(y.shape[:-1], x.shape[:-1], groups.shape)
        return TensorType(y.dtype, (*lead, y.shape[-1], x.shape[-1])).size

    def reference(self, attrs: Attrs, y: np.ndarray, x: np.ndarray, groups: np.ndarray) -> np.ndarray:
        lead = np.broadcast_shapes(y.shape[:-1], x.shape[:-1], groups.shape)
        size = concrete(attrs.size)
        out = np.zeros((size, y.shape[-1], x.shape[-1]), wide(y).dtype)
        for e, at in _each_group(lead, groups, size):
            out[e] = _rows(wide(y), lead)[at].T @ _rows(wide(x), lead)[at]
        return out.astype(y.dtype)

    def decompose(self, b: Builder, attrs: Attrs, y: Value, x: Value, groups: Value) -> Value:
        """One product of all rows for each group, with those of other groups as zeros."""
        lead = broadcast_shapes(y.shape[:-1], x.shape[:-1], groups.shape)
        m = TensorType(DType.F32, lead).size
        (n, k), e = (y.shape[-1], x.shape[-1]), attrs.size
        y = b.transpose(b.reshape(b.broadcast_to(y, shape=(*lead, n)), shape=(m, n)), perm=(1, 0))
        x = b.reshape(b.broadcast_to(x, shape=(*lead, k)), shape=(m, k))
        groups = b.countable(groups)
        own = b.reshape(b.broadcast_to(groups, shape=lead), shape=(1, 1, m))
        each = b.reshape(b.iota(size=e, dtype=groups.tensor.dtype), shape=(e, 1, 1))
        return b.matmul(b.select(b.equal(own, each), y, 0.0), x)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        y, x, groups = node.inputs
        dy = b.grouped_linear(x, g, groups)
        dx = b.grouped_linear(y, b.transpose(g, perm=(0, 2, 1)), groups)
        return [b.sum_to(dy, y.shape), b.sum_to(dx, x.shape), None]

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 3, 5), grid(2, 3, 4), np.array([[3, 0, 0], [2, 3, 1]])], {"size": 4})
        yield Sample([grid(3, 2, 5), grid(3, 1, 4), np.array([[2, 0], [1, 2], [0, 0]], np.int32)], {"size": 5})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[b, 5]", "f32[b, 4]", "f32[b]"], {"size": 3}, "must be integers")
        yield ErrorSample(["f32[2, 5]", "f32[3, 4]", "i64[3]"], {"size": 3}, "broadcast shape")
        yield ErrorSample(["f32[5]", "f16[5]", "i64[]"], {"size": 3}, "element types differ")
        yield ErrorSample(["f32[]", "f32[5]", "i64[]"], {"size": 3}, "grouped_outer takes")


@register
class QuantizedGroupedLinear(_Grouped):
    """``grouped_linear`` with quantized weights [e, n, k]; ``activation`` as in ``quantized_linear``."""

    name = "quantized_grouped_linear"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        activation: str | None = None

    def infer(
        self, attrs: Attrs, x: TensorType, w: QTensorType, groups: TensorType, bias: TensorType | None = None
    ) -> TensorType:
        if attrs.activation not in (None, "int8"):
            raise TypeMismatch(f"activation={attrs.activation!r} is not one of int8, none")
        return _grouped(x, quantized(w, "the weights"), groups, bias)

    def axes(self, attrs: Attrs, x: TensorType, w: QTensorType, groups: TensorType, *bias: TensorType) -> AxisRule:
        return _rule(x, w, groups, bias, "")

    def reference(
        self, attrs: Attrs, x: np.ndarray, w: QArray, groups: np.ndarray, bias: np.ndarray | None = None
    ) -> np.ndarray:
        lead = np.broadcast_shapes(x.shape[:-1], groups.shape)
        out, rows = np.zeros((int(np.prod(lead)), w.shape[1]), wide(x).dtype), _rows(wide(x), lead)
        for e, at in _each_group(lead, groups, w.shape[0]):
            y = product_of_integers(attrs.activation, rows[at, None], w.rows(e))[:, 0]
            out[at] = y if bias is None else y + wide(bias[e])
        return out.reshape(*lead, out.shape[-1]).astype(x.dtype)

    def decompose(self, b: Builder, attrs: Attrs, x: Value, w: Value, groups: Value, bias: Value | None = None) -> Value:
        dtype = x.tensor.dtype
        if attrs.activation is not None:
            x = rounded_rows(b, x, w)
        dense = b.dequantize(w, dtype=x.tensor.dtype)
        operands = [dense, groups] if bias is None else [dense, groups, b.cast(bias, dtype=x.tensor.dtype)]
        y = b.grouped_linear(x, *operands)
        return y if y.tensor.dtype is dtype else b.cast(y, dtype=dtype)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        """Straight through the rounding of activations; the weights are constants."""
        x, w, groups = node.inputs[:3]
        back = b.transpose(b.dequantize(w, dtype=x.tensor.dtype), perm=(0, 2, 1))
        dx = b.sum_to(b.grouped_linear(g, back, groups), x.shape)
        return [dx, None, None, *([_bias_gradient(b, g, groups, node.inputs[3])] if len(node.inputs) > 3 else [])]

    def samples(self) -> Iterable[Sample]:
        some, several = np.array([[3, 0, 0], [2, 3, 1]]), np.array([[3, 0], [2, 3], [1, 1]], np.int32)
        yield Sample([grid(2, 3, 70), _q("int4", 4, 5, 70), some], grad=(0,))
        yield Sample([grid(3, 1, 64), _q("int8", 4, 5, 64), several, grid(4, 5)], grad=(0, 3))
        yield Sample([grid(3, 1, 70), _q("int8", 4, 5, 70), several], {"activation": "int8"}, grad=())
        yield Sample([grid(2, 3, 96), _q("int4", 4, 5, 96), some, grid(4, 5)], {"activation": "int8"}, grad=())
        yield Sample([grid(2, 3, 256), _q("q4_k", 4, 2, 256), some], grad=(0,))

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[b, 3]", "int4b32f16[e, 4, 5]", "i64[b]"], {}, "last axis of x")
        yield ErrorSample(["f32[b, 5]", "f32[e, 4, 5]", "i64[b]"], {}, "must be quantized")
        yield ErrorSample(["f32[b, 5]", "int4b32f16[e, 4, 5]", "f32[b]"], {}, "must be integers")
        yield ErrorSample(["f32[b, 5]", "int4b32f16[e, 4, 5]", "i64[b]"], {"activation": "int4"}, "is not one of")
