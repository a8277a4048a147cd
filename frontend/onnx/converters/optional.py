"""Sequences (lists of operands while importing, or rows of a tensor) and optionals (None where empty): nothing of them is
left."""

from __future__ import annotations

from typing import Any

import numpy as np
from wasat.ir import DType

from ..emit import Emitter, Operand, known
from ..registry import MOST, NodeView, op
from ..sequences import Appended, Rows


@op("OptionalHasElement")
def has_element(c: Emitter, n: NodeView, x: Any = None) -> Any:
    return np.asarray(x is not None)


@op("OptionalGetElement")
def get_element(c: Emitter, n: NodeView, x: Any = None) -> Any:
    if x is None:
        raise n.fail("the optional is empty")
    return x


@op("SequenceEmpty")
def sequence_empty(c: Emitter, n: NodeView) -> Any:
    return []


@op("SequenceConstruct")
def sequence_construct(c: Emitter, n: NodeView, *xs: Any) -> Any:
    return list(xs)


def _place(c: Emitter, n: NodeView, position: Operand, size: int) -> int:
    at = int(c.const(position, f"the position of {n.op}").item())
    if not -size <= at < size:
        raise n.fail(f"position {at} is outside a sequence of {size}")
    return at % size


def _items(n: NodeView, xs: Any) -> list[Any]:
    """The elements of a sequence whose length is known."""
    if isinstance(xs, (Appended, Rows)):
        raise n.fail("how long the sequence is depends on how often a Loop turns; append to it there, then join it")
    return list(xs)


@op("SequenceInsert")
def sequence_insert(c: Emitter, n: NodeView, xs: Any, x: Any, position: Operand | None = None) -> Any:
    if isinstance(xs, Appended) and position is None:
        return Appended((*xs.items, x))
    xs = _items(n, xs)
    if position is None:
        return [*xs, x]
    at = int(c.const(position, "the position of SequenceInsert").item())
    if not -len(xs) <= at <= len(xs):
        raise n.fail(f"position {at} is outside a sequence of {len(xs)}")
    out = list(xs)
    out.insert(at, x)
    return out


@op("SequenceErase")
def sequence_erase(c: Emitter, n: NodeView, xs: Any, position: Operand | None = None) -> Any:
    xs = _items(n, xs)
    at = len(xs) - 1 if position is None else _place(c, n, position, len(xs))
    return xs[:at] + xs[at + 1 :]


@op("SequenceAt")
def sequence_at(c: Emitter, n: NodeView, xs: Any, position: Operand) -> Any:
    xs = _items(n, xs)
    return xs[_place(c, n, position, len(xs))]


@op("SequenceLength")
def sequence_length(c: Emitter, n: NodeView, xs: Any) -> Any:
    if isinstance(xs, Rows):
        return known(np.array(xs.length(), object), DType.I64)
    return np.asarray(len(_items(n, xs)), np.int64)


@op("ConcatFromSequence")
def concat_from_sequence(c: Emitter, n: NodeView, xs: Any) -> Any:
    axis = n["axis"]
    if isinstance(xs, Rows):
        return xs.stacked(c, axis) if n["new_axis"] else xs.joined(c, axis)
    xs = _items(n, xs)
    if not n["new_axis"]:
        return c.concat(*xs, axis=axis)
    return c.concat(*(c.add_axes(x, axis % (c.rank(x) + 1)) for x in xs), axis=axis % (c.rank(xs[0]) + 1))


@op("SplitToSequence")
def split_to_sequence(c: Emitter, n: NodeView, x: Operand, sizes: Operand | None = None) -> Any:
    axis = c.axis(n["axis"], c.rank(x))
    total = c.static(x, axis, "SplitToSequence")
    if sizes is None:
        step = 1
    else:
        given = c.numbers(sizes, "the sizes of SplitToSequence")
        step = int(given) if given.ndim == 0 else 0
    if step > 0:
        if total > MOST * step:
            raise n.fail(f"more than {MOST} parts")
        parts = [min(step, total - at) for at in range(0, total, step)]
    else:
        parts = [int(d) for d in given.ravel()]
    out, at = [], 0
    for part in parts:
        piece = c.cut(x, axis, at, at + part)
        out.append(c.drop_axes(piece, axis) if sizes is None and not n["keepdims"] else piece)
        at += part
    return out
