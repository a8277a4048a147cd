"""Views: a value that holds elements of another one at other places, so that a kernel can read the other one instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wasat.ir import DimLike, Value, equal

from .kernels.gemm import Gemm, Matrix
from .kernels.isa import Isa


@dataclass(frozen=True)
class View:
    """Element [i, j, ..] of a value of ``shape`` is element ``offset`` + the sum of index * stride of row-major ``source``."""

    source: Value
    shape: tuple[DimLike, ...]
    strides: tuple[DimLike, ...]
    offset: DimLike = 0

    @property
    def size(self) -> DimLike:
        """Elements of the source."""
        return math.prod(self.source.shape)

    def permuted(self, perm: Sequence[int]) -> View:
        return View(self.source, tuple(self.shape[i] for i in perm), tuple(self.strides[i] for i in perm), self.offset)

    def broadcast(self, shape: Sequence[DimLike]) -> View:
        """At the larger ``shape``, by NumPy's rules."""
        lead = len(shape) - len(self.shape)
        own = [0 if n == 1 != m else s for n, m, s in zip(self.shape, shape[lead:], self.strides)]
        return View(self.source, tuple(shape), (0,) * lead + tuple(own), self.offset)

    def sliced(self, starts: Sequence[DimLike], steps: Sequence[int], shape: Sequence[DimLike]) -> View:
        offset = self.offset + sum(i * s for i, s in zip(starts, self.strides))
        return View(self.source, tuple(shape), tuple(s * k for s, k in zip(self.strides, steps)), offset)

    def reshaped(self, shape: Sequence[DimLike]) -> View | None:
        """Under a shape of as many elements; None if no strides say that."""
        strides: list[DimLike] = [0] * len(shape)
        old = [(n, s) for n, s in zip(self.shape, self.strides) if n != 1]
        new = [axis for axis, n in enumerate(shape) if n != 1]
        start, begin = 0, 0  # of the axes, old and new ones, that are as many elements as each other
        for end in range(1, len(new) + 1):
            total = math.prod(shape[i] for i in new[begin:end])
            stops = (i for i in range(start + 1, len(old) + 1) if equal(math.prod(n for n, _ in old[start:i]), total))
            stop = next(stops, None)
            if stop is None:
                continue
            if any(s != n * stride for (_, s), (n, stride) in zip(old[start:stop], old[start + 1 : stop])):
                return None
            stride = old[stop - 1][1]
            for i in reversed(new[begin:end]):
                strides[i] = stride
                stride *= shape[i]
            start, begin = stop, end
        return View(self.source, tuple(shape), tuple(strides), self.offset) if (start, begin) == (len(old), len(new)) else None


def row_major(v: Value, shape: Sequence[DimLike]) -> View:
    """``v`` under a shape of as many elements."""
    return View(v, tuple(shape), tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))))


def view_of(v: Value) -> View:
    """``v`` as a view of what it was before transposes, reshapes, slices and broadcasts."""
    plain = row_major(v, v.shape)
    node = v.node
    if node is None or 0 in v.shape or node.op.name not in ("transpose", "reshape", "slice", "broadcast_to"):
        return plain
    x = node.inputs[0]
    a: Any = node.attrs
    inner = view_of(x)
    if node.op.name == "transpose":
        return inner.permuted(a.perm)
    if node.op.name == "broadcast_to":
        return inner.broadcast(v.shape)
    if node.op.name == "slice":
        return inner.sliced(a.starts, a.steps, v.shape)
    return inner.reshaped(v.shape) or row_major(x, x.shape).reshaped(v.shape) or plain


def product(isa: Isa, a: View, b: View, y: View, threads: int) -> tuple[Gemm, list[Value]]:
    """The kernel call for y[.., m, n] = a[.., m, k] @ b[.., k, n], all of the same batch axes, and its operands.

    The columns or the rows of y are contiguous.
    """
    if y.strides[-1] != 1 and y.shape[-1] != 1:
        a, b, y = (x.permuted((*range(len(x.shape) - 2), -1, -2)) for x in (b, a, y))
    *batch, m, n = y.shape
    while batch and b.strides[len(batch) - 1] == 0:  # one b for many a: more rows of one product
        merged = [x.reshaped((*batch[:-1], batch[-1] * m, x.shape[-1])) for x in (a, y)]
        if merged[0] is None or merged[1] is None:
            break
        (a, y), m = merged, m * batch.pop()  # type: ignore[assignment]
        b = View(b.source, (*batch, *b.shape[-2:]), (*b.strides[: len(batch)], *b.strides[-2:]), b.offset)
    a_at, b_at, y_at = (Matrix(x.size, x.strides[-2], x.strides[-1], x.strides[:-2], x.offset) for x in (a, b, y))
    return Gemm(isa, m, n, a.shape[-1], a_at, b_at, y_at, tuple(batch), threads), [a.source, b.source]
