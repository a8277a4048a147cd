"""Operations that move elements and change none: reshape, transpose, broadcast, slice, concat, pad, reverse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import op as _op
from ..axes import Axis, AxisRule, Factor, along, free, regrouped
from ..checks import require_at_most, require_equal
from ..dims import Dim, equal, span
from ..errors import TypeMismatch
from ..op import (
    Amounts,
    AxisIndex,
    AxisIndices,
    ErrorSample,
    Op,
    Permutation,
    Sample,
    Shape,
    Starts,
    Steps,
    Stops,
    axis_of,
    concrete,
    register,
    same_dtype,
    tensor,
)
from ..types import QArray, QTensorType, TensorType, Type, join

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Node, Value


def _x(*shape: int) -> np.ndarray:
    return np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)


@register
class Reshape(Op):
    """The same elements in row-major order under another shape of as many elements."""

    name = "reshape"
    kind = "view"
    alias = 0

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        shape: Shape

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        out = TensorType(tensor(x).dtype, attrs.shape)
        require_equal(x.size, out.size, f"number of elements of {x} and of shape {list(attrs.shape)}")
        return out

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        return regrouped(x.shape, attrs.shape)

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return x.reshape([concrete(d) for d in attrs.shape])

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        return [b.reshape(g, shape=node.inputs[0].shape)]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 6)], {"shape": (3, 4)})
        yield Sample([_x(1)], {"shape": ()})
        yield Sample([_x(0, 3)], {"shape": (3, 0)})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2, 3]"], {"shape": (4,)}, "number of elements")


@register
class Transpose(Op):
    """Axis i of the result is axis ``perm[i]`` of x."""

    name = "transpose"
    kind = "view"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        perm: Permutation

        def canonical(self, *types: Type) -> Transpose.Attrs:
            rank = types[0].rank
            return Transpose.Attrs(tuple(axis_of(p, rank) for p in self.perm))

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        if sorted(attrs.perm) != list(range(tensor(x).rank)):
            raise TypeMismatch(f"perm {attrs.perm} does not name each of the {x.rank} axes once")
        return x.with_shape(*(x.shape[p] for p in attrs.perm))

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        own = free(x.shape)
        return AxisRule((own,), (tuple(own[p] for p in attrs.perm),))

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return x.transpose(attrs.perm)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        perm = Transpose.Attrs.of(node).perm
        return [b.transpose(g, perm=tuple(perm.index(i) for i in range(len(perm))))]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 3, 4)], {"perm": (2, 0, 1)})
        yield Sample([_x(2, 3)], {"perm": (-1, 0)})
        yield Sample([_x()], {"perm": ()})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2, 3]"], {"perm": (0, 0)}, "each of the 2 axes once")


@register
class BroadcastTo(Op):
    """x stretched along axes of size 1 (and new leading axes) to ``shape``."""

    name = "broadcast_to"
    kind = "view"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        shape: Shape

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        out = TensorType(tensor(x).dtype, attrs.shape)
        if out.rank < x.rank:
            raise TypeMismatch(f"{x} has more axes than shape {list(attrs.shape)}")
        for i, d in enumerate(x.shape):
            to, what = out.shape[out.rank - x.rank + i], f"axis {i} of {x} in shape {list(attrs.shape)}"
            if isinstance(d, Dim) and equal(d, to) is None:
                require_equal((d - 1) * (d - to), 0, what)
            elif d != 1:
                require_equal(d, to, what)
        return out

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        own: list[Axis] = []
        out: list[Axis] = [(Factor(d, "repeated"),) for d in attrs.shape[: len(attrs.shape) - x.rank]]
        for d, to in zip(x.shape, attrs.shape[len(attrs.shape) - x.rank :]):
            if d == 1 or equal(d, to) is True:
                own.append(() if d == 1 else (Factor(d),))
                out.append(own[-1] or ((Factor(to, "repeated"),) if to != 1 else ()))
            else:  # of size 1, perhaps, when it runs
                own.append((Factor(d, "whole", does="may stretch {}, if its size is 1 when it runs"),))
                out.append((Factor(to, "whole"),))
        return AxisRule((tuple(own),), (tuple(out),))

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, [concrete(d) for d in attrs.shape])

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        return [b.sum_to(g, node.inputs[0].shape)]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(3, 1)], {"shape": (2, 3, 4)})
        yield Sample([_x()], {"shape": (2,)})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {"shape": (3,)}, "axis 0")
        yield ErrorSample(["f32[2, 1]"], {"shape": (2,)}, "more axes")


@register
class Slice(Op):
    """Along each axis, elements ``start, start + step, …`` before ``stop``. One entry per axis; dimensions allowed.

    ``0 <= start <= stop <= size`` and ``step >= 1``; a missing ``steps`` means 1 everywhere.
    """

    name = "slice"
    kind = "view"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        starts: Starts
        stops: Stops
        steps: Steps = ()

        def canonical(self, *types: Type) -> Slice.Attrs:
            return self if self.steps else Slice.Attrs(self.starts, self.stops, (1,) * len(self.starts))

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        if not len(attrs.starts) == len(attrs.stops) == len(attrs.steps) == tensor(x).rank:
            raise TypeMismatch(f"a slice of {x} needs {x.rank} starts, stops and steps")
        shape = []
        for i, (lo, hi, step, n) in enumerate(zip(attrs.starts, attrs.stops, attrs.steps, x.shape)):
            what = f"slice {lo}:{hi} is outside axis {i} of size {n}"
            require_at_most(0, lo, what)
            require_at_most(lo, hi, what)
            require_at_most(hi, n, what)
            if not isinstance(step, int) or step < 1:
                raise TypeMismatch(f"slice step {step} on axis {i}: a step is an integer >= 1")
            shape.append((span(lo, hi) + (step - 1)) // step)
        return x.with_shape(*shape)

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        bounds = zip(attrs.starts, attrs.stops, attrs.steps, x.shape)
        cut = [i for i, (lo, hi, step, d) in enumerate(bounds) if (lo, step) != (0, 1) or equal(hi, d) is not True]
        own, out = (free(x.shape, {i: Factor(x.shape[i], "whole", does="takes a part of {}") for i in cut}) for _ in range(2))
        return AxisRule((own,), (tuple(b if i in cut else a for i, (a, b) in enumerate(zip(own, out))),))

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        index = []
        for i, (lo, hi, step) in enumerate(zip(attrs.starts, attrs.stops, attrs.steps)):
            lo, hi = concrete(lo), concrete(hi)
            if not 0 <= lo <= hi <= x.shape[i]:
                raise TypeMismatch(f"slice {lo}:{hi} is outside axis {i} of size {x.shape[i]}")
            index.append(slice(lo, hi, step))
        return x[tuple(index)]

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        a, x = node.attrs, node.inputs[0]
        assert isinstance(a, Slice.Attrs)
        if any(s != 1 for s in a.steps):  # put back at stride: scatter along each strided axis
            for i, s in enumerate(a.steps):
                if s != 1:
                    n = g.shape[i]
                    at = b.add(b.mul(b.iota(size=n), s), b.dim_size(size=a.starts[i]))
                    shape = list(g.shape)
                    shape[i] = x.shape[i]
                    zeros = b.broadcast_to(b.constant(0.0, x.tensor.dtype), shape=tuple(shape))
                    g = b.scatter(zeros, at, g, axis=i, reduce="add")
            a = Slice.Attrs(
                tuple(0 if s != 1 else lo for lo, s in zip(a.starts, a.steps)),
                tuple(n if s != 1 else hi for hi, n, s in zip(a.stops, x.shape, a.steps)), (1,) * len(a.steps),
            )  # fmt: skip
        return [b.pad(g, low=a.starts, high=tuple(n - hi for n, hi in zip(x.shape, a.stops)))]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(4, 5)], {"starts": (1, 0), "stops": (3, 5)})
        yield Sample([_x(7, 5)], {"starts": (1, 0), "stops": (6, 5), "steps": (2, 3)})
        yield Sample([_x(3)], {"starts": (2,), "stops": (2,)})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[4]"], {"starts": (0,), "stops": (5,)}, "outside axis 0")
        yield ErrorSample(["f32[4]"], {"starts": (3,), "stops": (2,)}, "outside axis 0")
        yield ErrorSample(["f32[4, 2]"], {"starts": (3,), "stops": (2,)}, "needs 2 starts")
        yield ErrorSample(["f32[4]"], {"starts": (0,), "stops": (2,), "steps": (0,)}, "step")


@register
class Concat(Op):
    """Operands one after another along ``axis``; of quantized weights of one scheme, along any axis but the last."""

    name = "concat"
    kind = "view"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        axis: AxisIndex

        def canonical(self, *types: Type) -> Concat.Attrs:
            return Concat.Attrs(axis_of(self.axis, types[0].rank)) if types else self

    def infer(self, attrs: Attrs, *xs: Any) -> Any:
        if not xs:
            raise TypeMismatch("concat needs at least one operand")
        if any(isinstance(x, QTensorType) for x in xs):
            if len({x.kind if isinstance(x, QTensorType) else None for x in xs}) > 1 or attrs.axis == xs[0].rank - 1:
                raise TypeMismatch(f"concat takes quantized weights of one scheme, along another axis than the last, not {xs}")
        else:
            same_dtype(*xs)
        shape = list(xs[0].shape)
        for x in xs[1:]:
            if x.rank != xs[0].rank:
                raise TypeMismatch(f"ranks differ: {xs[0]} and {x}")
            for i, d in enumerate(x.shape):
                if i == attrs.axis:
                    shape[i] = shape[i] + d
                else:
                    shape[i] = require_equal(shape[i], d, f"axis {i} of the operands of concat along axis {attrs.axis}")
        return xs[0].with_shape(*shape)

    def axes(self, attrs: Attrs, *xs: TensorType) -> AxisRule:
        own = free(xs[0].shape)
        joined = [(Factor(x.shape[attrs.axis], "whole", does="joins {}s end to end"),) for x in (*xs, xs[0])]
        *parts, out = (tuple(j if i == attrs.axis else a for i, a in enumerate(own)) for j in joined)
        return AxisRule(tuple(parts), (out,))

    def reference(self, attrs: Attrs, *xs: Any) -> Any:
        return join(xs, attrs.axis) if isinstance(xs[0], QArray) else np.concatenate(xs, attrs.axis)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        axis, at, out = Concat.Attrs.of(node).axis, 0, []
        zeros = (0,) * len(g.shape)
        for v in node.inputs:
            starts, stops = list(zeros), list(g.shape)
            starts[axis], stops[axis] = at, at + v.shape[axis]
            out.append(b.slice(g, starts=starts, stops=stops))
            at = at + v.shape[axis]
        return out

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 3), _x(2, 1)], {"axis": -1})
        yield Sample([_x(2), _x(0), _x(3)], {"axis": 0})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2, 3]", "f32[3, 3]"], {"axis": 1}, "axis 0")
        yield ErrorSample(["f32[2]", "i32[2]"], {"axis": 0}, "element types differ")
        yield ErrorSample(["f32[2]", "f32[2, 1]"], {"axis": 0}, "ranks differ")
        yield ErrorSample([], {"axis": 0}, "at least one")


Number = float | int
"""Of an element type that the attributes do not say: integers beyond 2**53 are no floats."""


def _fill(value: Number, dtype: Any) -> np.ndarray:
    return np.asarray(value if isinstance(value, int) or dtype.kind not in "iu" else int(value)).astype(dtype)


@register
class Pad(Op):
    """``low[i]`` elements ``value`` before and ``high[i]`` after x along each axis i."""

    name = "pad"
    kind = "view"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        low: Amounts
        high: Amounts
        value: Number = 0.0

        def canonical(self, *types: Type) -> Pad.Attrs:
            """A float, unless it is an integer that no float is."""
            v = self.value
            exact = isinstance(v, bool | float) or abs(v) > 2**64 or float(v) != v
            return self if exact else replace(self, value=float(v))

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        if not len(attrs.low) == len(attrs.high) == tensor(x).rank:
            raise TypeMismatch(f"padding {x} needs {x.rank} low and high amounts")
        for d in (*attrs.low, *attrs.high):
            require_at_most(0, d, f"a padding amount cannot be {d}; slice instead")
        if x.dtype.is_int:
            low, high = x.dtype.range
            if not (math.isfinite(attrs.value) and attrs.value == int(attrs.value) and low <= attrs.value <= high):
                raise TypeMismatch(f"{x.dtype} has no element {attrs.value} to pad with")
        return x.with_shape(*(lo + d + hi for lo, d, hi in zip(attrs.low, x.shape, attrs.high)))

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        padded = [i for i in range(x.rank) if (attrs.low[i], attrs.high[i]) != (0, 0)]
        own, out = (free(x.shape, {i: Factor(x.shape[i], "whole", does="pads {}") for i in padded}) for _ in range(2))
        return AxisRule((own,), (tuple(b if i in padded else a for i, (a, b) in enumerate(zip(own, out))),))

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        width = [(concrete(lo), concrete(hi)) for lo, hi in zip(attrs.low, attrs.high)]
        return np.pad(x, width, constant_values=_fill(attrs.value, x.dtype)) if width else x

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        a, x = node.attrs, node.inputs[0]
        assert isinstance(a, Pad.Attrs)
        return [b.slice(g, starts=a.low, stops=tuple(lo + d for lo, d in zip(a.low, x.shape)))]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 3)], {"low": (1, 0), "high": (0, 2), "value": 7.0})
        yield Sample([np.arange(3)], {"low": (1,), "high": (1,), "value": 2**53 + 1})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {"low": (-1,), "high": (0,)}, "cannot be -1")
        yield ErrorSample(["f32[2]"], {"low": (1, 1), "high": (0,)}, "needs 1 low")
        yield ErrorSample(["u8[2]"], {"low": (1,), "high": (0,), "value": 300.0}, "u8 has no element 300.0")
        yield ErrorSample(["i32[2]"], {"low": (1,), "high": (0,), "value": 0.5}, "i32 has no element 0.5")


@register
class Reverse(Op):
    """x backwards along ``axes``."""

    name = "reverse"
    kind = "view"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        axes: AxisIndices

        def canonical(self, *types: Type) -> Reverse.Attrs:
            return Reverse.Attrs(tuple(sorted(axis_of(a, types[0].rank) for a in self.axes)))

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        if len(set(attrs.axes)) != len(attrs.axes):
            raise TypeMismatch(f"axes {attrs.axes} repeat one")
        return tensor(x)

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        return along(x.shape, attrs.axes, lambda d: Factor(d, "whole"))

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return np.flip(x, attrs.axes)

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        return [b.reverse(g, axes=Reverse.Attrs.of(node).axes)]

    def samples(self) -> Iterable[Sample]:
        yield Sample([_x(2, 3)], {"axes": (-1,)})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]"], {"axes": (1,)}, "outside a tensor of rank 1")
        yield ErrorSample(["f32[2]"], {"axes": (0, 0)}, "repeat")


__all__ = ["equal"]
