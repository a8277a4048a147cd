"""Windows over spatial axes reduced to a number each: pooling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import op as _op
from ..axes import AxisRule, Factor, free
from ..checks import require_at_most
from ..dims import DimLike
from ..errors import TypeMismatch
from ..op import ErrorSample, Op, Sample, concrete, register, tensor
from ..types import DType, TensorType, Type
from .elementwise import wide
from .reduce import limits

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Value


def _x(*shape: int) -> np.ndarray:
    n = int(np.prod(shape))
    return ((np.arange(n) * 7 % max(n, 1)) / 4 - 1).astype(np.float32).reshape(shape)


@register
class Pool(Op):
    """Maximum or sum of each window: x [b, c, *space] -> [b, c, *space']; sums of f16 and bf16 accumulate in f32.

    ``out[b, c, p] = reduce over k < kernel of x'[b, c, p*stride + k*dilation - low]``; x' holds 0 (for max the least value of
    the type) outside. ``high`` is the padding behind.
    """

    name = "pool"
    kind = "window"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        kind: str
        kernel: tuple[int, ...]
        strides: tuple[int, ...]
        low: tuple[DimLike, ...]
        high: tuple[DimLike, ...]
        dilation: tuple[int, ...] = ()

        def canonical(self, *types: Type) -> Pool.Attrs:
            if self.kind not in ("max", "sum"):
                raise TypeMismatch(f"kind={self.kind!r} is not one of max, sum")
            ones = (1,) * len(self.kernel)
            return Pool.Attrs(self.kind, self.kernel, self.strides, self.low, self.high, self.dilation or ones)

        def outside(self, dtype: DType) -> float:
            """What stands in the padding."""
            return float(limits(dtype.np)[0]) if self.kind == "max" else 0.0

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        n = tensor(x).rank - 2
        if n < 1 or x.dtype is DType.BOOL:
            raise TypeMismatch(f"pool takes numbers [b, c, *space], not {x}")
        for name in ("kernel", "strides", "low", "high", "dilation"):
            if len(getattr(attrs, name)) != n:
                raise TypeMismatch(f"{name} {getattr(attrs, name)}: {x} needs {n}, one per spatial axis")
        for name in ("kernel", "strides", "dilation"):
            if min(getattr(attrs, name)) < 1:
                raise TypeMismatch(f"{name} {getattr(attrs, name)}: each must be at least 1")
        space = []
        for i in range(n):
            for d in (attrs.low[i], attrs.high[i]):
                require_at_most(0, d, f"padding {attrs.low[i]}, {attrs.high[i]} of axis {2 + i}: it cannot be negative")
            room = x.shape[2 + i] + attrs.low[i] + attrs.high[i] - attrs.dilation[i] * (attrs.kernel[i] - 1)
            require_at_most(1, room, f"a window of {attrs.kernel[i]} does not fit into the padded axis {2 + i} of {x}")
            space.append((room - 1) // attrs.strides[i] + 1)
        return x.with_shape(*x.shape[:2], *space)

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        space = {
            2 + i: Factor(
                x.shape[2 + i], "window", window=(attrs.low[i], attrs.dilation[i] * (k - 1) - attrs.low[i], attrs.strides[i])
            )
            for i, k in enumerate(attrs.kernel)
        }
        own = free(x.shape, space)
        return AxisRule((own,), (own,))

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        out, reduce = wide(x), np.max if attrs.kind == "max" else np.sum
        outside = attrs.outside(DType.of(x.dtype))
        for i, k in enumerate(attrs.kernel):  # windows are boxes: one axis after the other
            axis = 2 + i
            width = [(0, 0)] * x.ndim
            width[axis] = (concrete(attrs.low[i]), concrete(attrs.high[i]))
            padded = np.pad(out, width, constant_values=np.asarray(outside).astype(out.dtype))
            count = (padded.shape[axis] - 1 - attrs.dilation[i] * (k - 1)) // attrs.strides[i] + 1
            at = np.arange(count)[:, None] * attrs.strides[i] + np.arange(k) * attrs.dilation[i]
            out = reduce(np.take(padded, at, axis), axis + 1)
        return out.astype(x.dtype)

    def decompose(self, b: Builder, attrs: Attrs, x: Value) -> Value:
        own = x.tensor.dtype
        narrow = attrs.kind == "sum" and own.is_float and own.bits < 32
        y = b.cast(x, dtype=DType.F32) if narrow else x
        outside = attrs.outside(own)
        for i, k in enumerate(attrs.kernel):
            axis = 2 + i
            edge: list[list[DimLike]] = [[0] * len(x.shape), [0] * len(x.shape)]
            edge[0][axis], edge[1][axis] = attrs.low[i], attrs.high[i]
            if edge[0][axis] != 0 or edge[1][axis] != 0:
                y = b.pad(y, low=edge[0], high=edge[1], value=outside)
            size, total = y.shape[axis], None
            last = size - attrs.dilation[i] * (k - 1)
            for j in range(k):
                starts, stops, steps = [0] * len(y.shape), list(y.shape), [1] * len(y.shape)
                starts[axis], steps[axis] = j * attrs.dilation[i], attrs.strides[i]
                stops[axis] = last + j * attrs.dilation[i]
                part = b.slice(y, starts=starts, stops=stops, steps=steps)
                total = part if total is None else (b.maximum if attrs.kind == "max" else b.add)(total, part)
            assert total is not None
            y = total
        return b.cast(y, dtype=own) if narrow else y

    def samples(self) -> Iterable[Sample]:
        one = {"strides": (1,), "low": (0,), "high": (0,)}
        yield Sample([_x(2, 3, 7)], {"kind": "max", "kernel": (3,), **one})
        yield Sample([_x(2, 3, 7)], {"kind": "sum", "kernel": (3,), "strides": (2,), "low": (1,), "high": (2,)})
        yield Sample(
            [_x(1, 2, 6, 5)],
            {"kind": "max", "kernel": (2, 3), "strides": (2, 1), "low": (0, 1), "high": (1, 0), "dilation": (2, 1)},
        )
        yield Sample([_x(1, 2, 5).astype(np.float16)], {"kind": "sum", "kernel": (4,), **one}, grad=())
        yield Sample([_x(1, 2, 5).astype(np.int8)], {"kind": "max", "kernel": (2,), "strides": (1,), "low": (1,), "high": (0,)})

    def errors(self) -> Iterable[ErrorSample]:
        one = {"kind": "max", "kernel": (3,), "strides": (1,), "low": (0,), "high": (0,)}
        yield ErrorSample(["f32[b, 3, 2]"], one, "does not fit into the padded axis 2")
        yield ErrorSample(["f32[b, 3]"], one, "pool takes numbers")
        yield ErrorSample(["f32[b, 3, s]"], {**one, "kind": "mean"}, "is not one of max, sum")
        yield ErrorSample(["f32[b, 3, s, t]"], one, "needs 2, one per spatial axis")
        yield ErrorSample(["f32[b, 3, s]"], {**one, "strides": (0,)}, "at least 1")
        yield ErrorSample(["f32[b, 3, s]"], {**one, "low": (-1,)}, "cannot be negative")
