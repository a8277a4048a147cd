"""``x[...]`` on symbolic tensors, lowered to slice, reverse and reshape."""

from __future__ import annotations

from wasat.ir import Dim, DimLike
from wasat.ir.dims import span

from wasat import ir

from .tensor import Index, Tensor, emit, fail


def take(x: Tensor, index: tuple[Index, ...]) -> Tensor:
    """NumPy's basic indexing with the same clamping of slices; sizes and bounds may be symbolic.

    A symbolic bound that cannot be above 0 counts from the end: ``x[-s:]`` are the last s (of s = 0, none) and ``x[:-s]`` what
    stands before them. One that may be both, ``s - t``, counts from the beginning.
    """
    items = _expand(x, index)
    starts: list[DimLike] = []
    stops: list[DimLike] = []
    steps: list[int] = []
    flips: list[int] = []
    shape: list[DimLike] = []
    axis = 0
    for item in items:
        if item is None:
            shape.append(1)
            continue
        size = x.shape[axis]
        if isinstance(item, slice):
            step = 1 if item.step is None else item.step
            if not isinstance(step, int) or step == 0:
                fail(f"{x.value!r}: the step of a slice is a non-zero int, not {item.step!r}")
            if step < 0:
                if item.start is not None or item.stop is not None:
                    fail(f"{x.value!r}: with a negative step only the whole axis can be taken, x[::-1]")
                flips.append(axis)
                step = -step
            last = item.start == -1 and item.stop is None and step == 1  # there is one
            start = size - 1 if last and not isinstance(size, int) else _bound(x, axis, item.start, 0)
            stop = _bound(x, axis, item.stop, size)
            stop = ir.maximum(start, stop)
            starts.append(start)
            stops.append(stop)
            steps.append(step)
            shape.append((span(start, stop) + (step - 1)) // step)
        else:
            at = item + size if _from_end(item) else item
            if ir.less_equal(size, at) is True or (isinstance(at, int) and at < 0):
                fail(f"{x.value!r}: index {item} is outside axis {axis} of size {size}")
            starts.append(at)
            stops.append(at + 1)
            steps.append(1)
        axis += 1
    out = emit("reverse", x, axes=tuple(flips)) if flips else x
    if starts != [0] * x.rank or stops != list(x.shape) or steps != [1] * x.rank:
        out = emit("slice", out, starts=tuple(starts), stops=tuple(stops), steps=tuple(steps))
    return out if out.shape == tuple(shape) else out.reshape(*shape)


def _expand(x: Tensor, index: tuple[Index, ...]) -> list[int | Dim | slice | None]:
    """One entry per axis, the Ellipsis and missing trailing axes written out."""
    for item in index:
        if isinstance(item, Tensor):
            fail(f"{x.value!r}: a tensor cannot be an index; use nn.gather(x, indices, axis=…) or nn.where(mask, x, y)")
        if isinstance(item, bool) or not (item is None or item is ... or isinstance(item, (int, Dim, slice))):
            fail(f"{x.value!r}: an index is an int, a dimension, a slice, None or ..., not {item!r}")
    dots = [i for i, item in enumerate(index) if item is ...]
    if len(dots) > 1:
        fail(f"{x.value!r}: an index has at most one ...")
    given = sum(item is not None and item is not ... for item in index)
    if given > x.rank:
        fail(f"{x.value!r}: {given} indices for {x.rank} axes")
    rest = [slice(None)] * (x.rank - given)
    at = dots[0] if dots else len(index)
    return [item for item in (*index[:at], *rest, *index[at + 1 :]) if item is not ...]


def _bound(x: Tensor, axis: int, bound: object, default: DimLike) -> DimLike:
    size = x.shape[axis]
    if bound is None:
        return default
    if isinstance(bound, bool) or not isinstance(bound, (int, Dim)):
        fail(f"{x.value!r}: the bounds of a slice are ints or dimensions, not {bound!r}")
    if _from_end(bound):
        return ir.maximum(0, size + bound)
    return ir.minimum(bound, size)


def _from_end(bound: DimLike) -> bool:
    """Whether a bound counts from the end: it is below 0 whatever the sizes are, as ``-s`` is (``x[-s:]``: the last s)."""
    return bound < 0 if isinstance(bound, int) else ir.less_equal(bound, 0) is True
