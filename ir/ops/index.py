"""Reading and writing at computed places. Indices are integers; negative ones count from the end; outside is an error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import op as _op
from ..axes import AxisRule, Factor, aligned, along, free, whole
from ..checks import require_at_most, require_equal
from ..dims import DimLike, equal
from ..errors import TypeMismatch
from ..op import AxisIndex, Bounds, ErrorSample, Op, Sample, axis_of, concrete, register, same_dtype, tensor
from ..types import DType, TensorType, Type

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Node, Value


def _x(*shape: int) -> np.ndarray:
    n = int(np.prod(shape))
    return ((np.arange(n) * 7 % max(n, 1)) / 4 - 1).astype(np.float32).reshape(shape)


def indices(t: Type, what: str = "indices") -> TensorType:
    """``t`` as a tensor of integers, or TypeMismatch."""
    if not tensor(t, what).dtype.is_int:
        raise TypeMismatch(f"{what} must be integers, not {t}")
    return tensor(t, what)


def _checked(ids: np.ndarray, size: int) -> np.ndarray:
    if ids.size and (ids.min() < -size or ids.max() >= size):
        bad = ids[(ids < -size) | (ids >= size)].ravel()[0]
        raise TypeMismatch(f"index {bad} is outside {-size} .. {size - 1}")
    return ids.astype(np.int64)


@dataclass(frozen=True)
class AxisAttrs(_op.Attrs):
    """One axis, counted from the front."""

    axis: AxisIndex = 0

    def canonical(self, *types: Type) -> AxisAttrs:
        return AxisAttrs(axis_of(self.axis, types[0].rank))


@register
class Gather(Op):
    """Slices of x along ``axis`` at ``indices``: the axis is replaced by the shape of the indices (numpy.take)."""

    name = "gather"
    kind = "gather"
    Attrs = AxisAttrs

    def picks(self, attrs: AxisAttrs) -> int:
        return attrs.axis

    def infer(self, attrs: AxisAttrs, x: TensorType, ids: TensorType) -> TensorType:
        shape = tensor(x).shape
        return x.with_shape(*shape[: attrs.axis], *indices(ids).shape, *shape[attrs.axis + 1 :])

    def bounds(self, attrs: AxisAttrs, x: TensorType, *others: TensorType) -> Mapping[int, Bounds]:
        return {1: (0 - x.shape[attrs.axis], x.shape[attrs.axis])}

    def axes(self, attrs: AxisAttrs, x: TensorType, ids: TensorType) -> AxisRule:
        own = free(x.shape, {attrs.axis: Factor(x.shape[attrs.axis], "indexed")})
        at = free(ids.shape)
        return AxisRule((own, at), ((*own[: attrs.axis], *at, *own[attrs.axis + 1 :]),))

    def reference(self, attrs: AxisAttrs, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return np.take(x, _checked(ids, x.shape[attrs.axis]), attrs.axis)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        x, ids = node.inputs
        zeros = b.broadcast_to(b.constant(0.0, x.tensor.dtype), shape=x.shape)
        return [b.scatter(zeros, ids, g, axis=AxisAttrs.of(node).axis, reduce="add"), None]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(4, 3), np.array([[0, 2], [2, -1]])])
        yield Sample([_x(2, 4), np.array(3, np.int32)], {"axis": -1})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]", "f32[2]"], {}, "must be integers")
        yield ErrorSample(["f32[2]", "i64[2]"], {"axis": 1}, "outside a tensor of rank 1")


@register
class TakeAlong(Op):
    """``out[.., i, ..] = x[.., indices[.., i, ..], ..]`` along ``axis``; other axes agree or broadcast (take_along_axis)."""

    name = "take_along"
    kind = "gather"
    Attrs = AxisAttrs

    def infer(self, attrs: AxisAttrs, x: TensorType, ids: TensorType) -> TensorType:
        if tensor(x).rank != indices(ids).rank:
            raise TypeMismatch(f"ranks differ: {x} and indices {ids}")
        shape: list[DimLike] = []
        for i, (d, e) in enumerate(zip(x.shape, ids.shape)):
            if i == attrs.axis:
                shape.append(e)
            else:
                shape.append(e if d == 1 else d if e == 1 else require_equal(d, e, f"axis {i} of x and indices"))
        return x.with_shape(*shape)

    def bounds(self, attrs: AxisAttrs, x: TensorType, *others: TensorType) -> Mapping[int, Bounds]:
        return {1: (0 - x.shape[attrs.axis], x.shape[attrs.axis])}

    def axes(self, attrs: AxisAttrs, x: TensorType, ids: TensorType) -> AxisRule:
        out = free([e if d == 1 or i == attrs.axis else d for i, (d, e) in enumerate(zip(x.shape, ids.shape))])
        picked = (Factor(x.shape[attrs.axis], "indexed"),)
        own = tuple(picked if i == attrs.axis else a for i, a in enumerate(aligned(x.shape, out)))
        at = tuple(a if i == attrs.axis else b for i, (a, b) in enumerate(zip(out, aligned(ids.shape, out))))
        return AxisRule((own, at), (out,))

    def reference(self, attrs: AxisAttrs, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return np.take_along_axis(x, _checked(ids, x.shape[attrs.axis]), attrs.axis)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        (x, ids), axis = node.inputs, AxisAttrs.of(node).axis
        stretched = tuple(d if i == axis else e for i, (d, e) in enumerate(zip(x.shape, g.shape)))
        zeros = b.broadcast_to(b.constant(0.0, x.tensor.dtype), shape=stretched)
        ids = b.broadcast_to(ids, shape=g.shape)
        return [b.sum_to(b.scatter_along(zeros, ids, g, axis=axis, reduce="add"), x.shape), None]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 4), np.array([[0, 2], [2, -1]])], {"axis": 1})
        yield Sample([_x(3, 2), np.array([[2, 1]])], {"axis": 0})
        yield Sample([_x(1, 4), np.array([[0, 2], [2, -1], [1, 1]])], {"axis": 1})
        yield Sample([_x(3, 1, 2), np.array([[[2], [0], [1]]])], {"axis": 0})
        yield Sample([_x(2, 1), np.array([[0, -1, 0]])], {"axis": 1})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2, 2]", "i64[2]"], {}, "ranks differ")
        yield ErrorSample(["f32[2, 3]", "i64[2, 4]"], {}, "axis 1")


_REDUCE = {"none": None, "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


@dataclass(frozen=True)
class ScatterAttrs(_op.Attrs):
    """``reduce``: none (the last write wins), add, mul, max or min with what is there."""

    axis: AxisIndex = 0
    reduce: str = "none"

    def canonical(self, *types: Type) -> ScatterAttrs:
        if self.reduce not in _REDUCE:
            raise TypeMismatch(f"reduce={self.reduce!r} is not one of {', '.join(_REDUCE)}")
        return ScatterAttrs(axis_of(self.axis, types[0].rank), self.reduce)


def _write(out: np.ndarray, at: Any, updates: np.ndarray, reduce: str) -> np.ndarray:
    f = _REDUCE[reduce]
    if f is None:
        out[at] = updates
    else:
        f.at(out, at, updates)
    return out


@register
class Scatter(Op):
    """x with slices along ``axis`` at ``indices`` written from ``updates``: the inverse of gather.

    x [.., n, ..], indices [*i], updates [.., *i, ..]. Gradients exist for none (indices without repetition) and add.
    """

    name = "scatter"
    kind = "scatter"
    Attrs = ScatterAttrs

    def infer(self, attrs: ScatterAttrs, x: TensorType, ids: TensorType, updates: TensorType) -> TensorType:
        same_dtype(x, updates)
        want = (*x.shape[: attrs.axis], *indices(ids).shape, *x.shape[attrs.axis + 1 :])
        if len(want) != updates.rank:
            raise TypeMismatch(f"updates must have shape {list(want)}, not {updates}")
        for i, (d, e) in enumerate(zip(want, updates.shape)):
            require_equal(d, e, f"axis {i} of updates")
        return x

    def bounds(self, attrs: ScatterAttrs, x: TensorType, *others: TensorType) -> Mapping[int, Bounds]:
        return {1: (0 - x.shape[attrs.axis], x.shape[attrs.axis])}

    def axes(self, attrs: ScatterAttrs, x: TensorType, ids: TensorType, updates: TensorType) -> AxisRule:
        own = free(x.shape, {attrs.axis: Factor(x.shape[attrs.axis], "indexed")})
        at = whole(ids.shape)
        return AxisRule((own, at, (*own[: attrs.axis], *at, *own[attrs.axis + 1 :])), (own,))

    def reference(self, attrs: ScatterAttrs, x: np.ndarray, ids: np.ndarray, updates: np.ndarray) -> np.ndarray:
        at = (slice(None),) * attrs.axis + (_checked(ids, x.shape[attrs.axis]),)
        return _write(np.array(x), at, updates, attrs.reduce)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        a, (_, ids, updates) = node.attrs, node.inputs
        assert isinstance(a, ScatterAttrs)
        if a.reduce not in ("none", "add"):
            return super().vjp(b, node, g)
        zeros = b.broadcast_to(b.constant(0.0, updates.tensor.dtype), shape=updates.shape)
        gx = g if a.reduce == "add" else b.scatter(g, ids, zeros, axis=a.axis)
        return [gx, None, b.gather(g, ids, axis=a.axis)]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(4, 3), np.array([2, 0]), _x(2, 3)])
        yield Sample([_x(2, 4), np.array([[3, 3]]), _x(2, 1, 2)], {"axis": 1, "reduce": "add"})
        yield Sample([_x(4), np.array([1, 1]), _x(2)], {"reduce": "max"}, grad=())
        yield Sample([_x(4), np.array([1, -1, 1]), _x(3)], grad=())  # the last write wins
        yield Sample([_x(2, 3), np.array(1, np.int32), _x(2)], {"axis": 1})
        yield Sample([np.array([5, 7, 9]), np.array([2, 0, 2]), np.array([2, 3, 4])], {"reduce": "mul"})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[4]", "i64[2]", "f32[3]"], {}, "axis 0 of updates")
        yield ErrorSample(["f32[4]", "i64[2]", "f32[2]"], {"reduce": "sub"}, "is not one of")


@register
class ScatterAlong(Op):
    """x with ``x[.., indices[.., i, ..], ..]`` written from ``updates[.., i, ..]`` (ONNX ScatterElements)."""

    name = "scatter_along"
    kind = "scatter"
    Attrs = ScatterAttrs

    def infer(self, attrs: ScatterAttrs, x: TensorType, ids: TensorType, updates: TensorType) -> TensorType:
        same_dtype(x, updates)
        if not tensor(x).rank == indices(ids).rank == updates.rank:
            raise TypeMismatch(f"ranks differ: {x}, {ids}, {updates}")
        for i, (d, e) in enumerate(zip(ids.shape, updates.shape)):
            require_equal(d, e, f"axis {i} of indices and updates")
            if i != attrs.axis:
                require_at_most(d, x.shape[i], f"axis {i} of the indices, {d}, is longer than that of {x}")
        return x

    def bounds(self, attrs: ScatterAttrs, x: TensorType, *others: TensorType) -> Mapping[int, Bounds]:
        return {1: (0 - x.shape[attrs.axis], x.shape[attrs.axis])}

    def axes(self, attrs: ScatterAttrs, x: TensorType, ids: TensorType, updates: TensorType) -> AxisRule:
        part = [i for i, (d, e) in enumerate(zip(x.shape, ids.shape)) if i == attrs.axis or equal(d, e) is not True]
        own = free(x.shape, {i: Factor(x.shape[i], "indexed" if i == attrs.axis else "whole") for i in part})
        at = tuple((Factor(ids.shape[i], "whole"),) if i in part else a for i, a in enumerate(own))
        return AxisRule((own, at, at), (own,))

    def reference(self, attrs: ScatterAttrs, x: np.ndarray, ids: np.ndarray, updates: np.ndarray) -> np.ndarray:
        at: list[np.ndarray] = list(np.indices(ids.shape, sparse=True))
        at[attrs.axis] = _checked(ids, x.shape[attrs.axis])
        return _write(np.array(x), tuple(at), updates, attrs.reduce)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        a, (x, ids, updates) = node.attrs, node.inputs
        assert isinstance(a, ScatterAttrs)
        if a.reduce not in ("none", "add"):
            return super().vjp(b, node, g)
        zeros = b.broadcast_to(b.constant(0.0, updates.tensor.dtype), shape=updates.shape)
        gx = g if a.reduce == "add" else b.scatter_along(g, ids, zeros, axis=a.axis)
        reached = tuple(d if i == a.axis else e for i, (d, e) in enumerate(zip(x.shape, ids.shape)))
        if reached != x.shape:
            g = b.slice(g, starts=(0,) * len(reached), stops=reached)
        return [gx, None, b.take_along(g, ids, axis=a.axis)]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(3, 2), np.array([[2, 0], [0, 1]]), _x(2, 2)])
        yield Sample([_x(2, 3), np.array([[2, 2], [0, 1]]), _x(2, 2)], {"axis": 1, "reduce": "add"})
        yield Sample([_x(3, 4, 2), np.array([[[1], [-1]]]), _x(1, 2, 1)], {"axis": 1})
        yield Sample([_x(2, 3), np.array([[2, 2]]), _x(1, 2)], {"axis": 1, "reduce": "min"}, grad=())

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[4]", "i64[2]", "f32[3]"], {}, "axis 0 of indices and updates")
        yield ErrorSample(["f32[4]", "i64[2, 1]", "f32[2]"], {}, "ranks differ")
        yield ErrorSample(["f32[4, 2]", "i64[2, 3]", "f32[2, 3]"], {}, "longer than that of")


@register
class OneHot(Op):
    """``out[.., j] = 1 if ids[..] == j else 0``, a new last axis of ``size``; an id outside gives zeros."""

    name = "one_hot"
    kind = "gather"
    differentiable = False

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        size: DimLike
        dtype: DType = DType.F32

    def infer(self, attrs: Attrs, ids: TensorType) -> TensorType:
        return TensorType(attrs.dtype, (*indices(ids, "ids").shape, attrs.size))

    def axes(self, attrs: Attrs, ids: TensorType) -> AxisRule:
        own = free(ids.shape)
        return AxisRule((own,), ((*own, *whole((attrs.size,))),))

    def reference(self, attrs: Attrs, ids: np.ndarray) -> np.ndarray:
        return (ids[..., None] == np.arange(concrete(attrs.size))).astype(attrs.dtype.np)

    def decompose(self, b: Builder, attrs: Attrs, ids: Value) -> Value:
        ids = b.countable(ids)
        hit = b.equal(b.reshape(ids, shape=(*ids.shape, 1)), b.iota(size=attrs.size, dtype=ids.tensor.dtype))
        return b.cast(hit, dtype=attrs.dtype)

    def samples(self) -> Iterable[Sample]:
        yield Sample([np.array([[0, 2], [5, -1]])], {"size": 3})
        yield Sample([np.array([1], np.int32)], {"size": 2, "dtype": "i64"})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {"size": 3}, "must be integers")


@register
class TakeRow(Op):
    """One position of each batch row: x [b, s, ..], index int[b] -> ``out[r, 0, ..] = x[r, index[r], ..]`` [b, 1, ..]."""

    name = "take_row"
    kind = "gather"

    def infer(self, attrs: _op.Attrs, x: TensorType, index: TensorType) -> TensorType:
        if tensor(x).rank < 2 or indices(index, "index").rank != 1:
            raise TypeMismatch("take_row needs x [b, s, ..] and index [b]")
        return x.with_shape(require_equal(x.shape[0], index.shape[0], "batch of x and index"), 1, *x.shape[2:])

    def bounds(self, attrs: _op.Attrs, x: TensorType, *others: TensorType) -> Mapping[int, Bounds]:
        return {1: (0 - x.shape[1], x.shape[1])}

    def axes(self, attrs: _op.Attrs, x: TensorType, index: TensorType) -> AxisRule:
        own = free(x.shape, {1: Factor(x.shape[1], "indexed")})
        return AxisRule((own, own[:1]), ((own[0], (), *own[2:]),))

    def reference(self, attrs: _op.Attrs, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        return x[np.arange(len(x)), _checked(index, x.shape[1])][:, None]

    def decompose(self, b: Builder, attrs: _op.Attrs, x: Value, index: Value) -> Value:
        return b.take_along(x, b.reshape(index, shape=(x.shape[0],) + (1,) * (len(x.shape) - 1)), axis=1)

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 3, 4), np.array([2, 0])])
        yield Sample([_x(2, 3), np.array([1, -1])])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2, 3]", "i64[3]"], {}, "batch of x and index")
        yield ErrorSample(["f32[2]", "i64[2]"], {}, "take_row needs")


_ODD = np.array([0.5, np.nan, 1.0, np.inf, -np.inf, np.nan, 1.0, -0.0, 0.0], np.float32)


@register
class Sort(Op):
    """Elements along ``axis`` in ascending (or ``descending``) order; stable; NaN is the greatest."""

    name = "sort"
    kind = "ordered"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        axis: AxisIndex = -1
        descending: bool = False

        def canonical(self, *types: Type) -> Sort.Attrs:
            return Sort.Attrs(axis_of(self.axis, types[0].rank), self.descending)

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        return tensor(x)

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        return along(x.shape, (attrs.axis,), lambda d: Factor(d, "normalized"))

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.take_along_axis(x, _order(x, attrs.axis, attrs.descending), attrs.axis)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        x, a = node.inputs[0], node.attrs
        assert isinstance(a, Sort.Attrs)
        _, at = b.top_k(x, k=x.shape[a.axis], axis=a.axis, largest=a.descending)
        zeros = b.broadcast_to(b.constant(0.0, x.tensor.dtype), shape=x.shape)
        return [b.scatter_along(zeros, at, g, axis=a.axis, reduce="add")]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 5)])
        yield Sample([_x(5, 2, 3)], {"axis": 0, "descending": True})
        yield Sample([np.array([[3, 1], [2, 2]])], {"axis": 0, "descending": True})
        yield Sample([_ODD], grad=())
        yield Sample([_ODD.astype(np.float16)], {"descending": True}, grad=())
        yield Sample([np.array([True, False, True])])
        yield Sample([np.array([200, 3, 255], np.uint8)], {"descending": True})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {"axis": 1}, "outside a tensor of rank 1")


def _order(x: np.ndarray, axis: int, descending: bool) -> np.ndarray:
    if not descending:
        return np.argsort(x, axis, kind="stable")
    back = np.flip(x, axis)  # stable for equal elements: sort the reversed, then reverse
    return x.shape[axis] - 1 - np.flip(np.argsort(back, axis, kind="stable"), axis)


@register
class TopK(Op):
    """The ``k`` largest (or smallest) elements along ``axis``, in order, and their places (i64); the first of equals first; NaN
    is the greatest."""

    name = "top_k"
    kind = "ordered"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        k: DimLike
        axis: AxisIndex = -1
        largest: bool = True

        def canonical(self, *types: Type) -> TopK.Attrs:
            return TopK.Attrs(self.k, axis_of(self.axis, types[0].rank), self.largest)

    def infer(self, attrs: Attrs, x: TensorType) -> tuple[TensorType, TensorType]:
        require_at_most(0, attrs.k, f"top {attrs.k}")
        require_at_most(attrs.k, tensor(x).shape[attrs.axis], f"top {attrs.k} of an axis of size {x.shape[attrs.axis]}")
        shape = tuple(attrs.k if i == attrs.axis else d for i, d in enumerate(x.shape))
        return x.with_shape(*shape), TensorType(DType.I64, shape)

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        last = -math.inf if attrs.largest else math.inf  # where it stands behind the others, of whose equals it comes after
        own = free(x.shape, {attrs.axis: Factor(x.shape[attrs.axis], "reduced", neutral=last)})
        out = tuple((Factor(attrs.k, "whole"),) if i == attrs.axis else a for i, a in enumerate(own))
        return AxisRule((own,), (out, out))

    def reference(self, attrs: Attrs, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.take(_order(x, attrs.axis, attrs.largest), range(concrete(attrs.k)), attrs.axis)
        return np.take_along_axis(x, order, attrs.axis), order

    def vjp(self, b: Builder, node: Node, g: Value, _: Value | None) -> Sequence[Value | None]:
        x = node.inputs[0]
        zeros = b.broadcast_to(b.constant(0.0, x.tensor.dtype), shape=x.shape)
        return [b.scatter_along(zeros, node.outputs[1], g, axis=TopK.Attrs.of(node).axis, reduce="add")]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 5)], {"k": 2})
        yield Sample([_ODD], {"k": 9}, grad=())
        yield Sample([_ODD], {"k": 5, "largest": False}, grad=())
        yield Sample([np.array([[3, 1], [2, 2], [3, 0]])], {"k": 2, "axis": 0, "largest": False})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {"k": 3}, "top 3 of an axis of size 2")
