"""Sequences (lists of operands while importing) and optionals (None where empty): resolved, nothing of them is left."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..emit import Emitter, Operand
from ..registry import MOST, NodeView, op


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


@op("SequenceInsert")
def sequence_insert(c: Emitter, n: NodeView, xs: list[Any], x: Any, position: Operand | None = None) -> Any:
    if position is None:
        return [*xs, x]
    at = int(c.const(position, "the position of SequenceInsert").item())
    if not -len(xs) <= at <= len(xs):
        raise n.fail(f"position {at} is outside a sequence of {len(xs)}")
    out = list(xs)
    out.insert(at, x)
    return out


@op("SequenceErase")
def sequence_erase(c: Emitter, n: NodeView, xs: list[Any], position: Operand | None = None) -> Any:
    at = len(xs) - 1 if position is None else _place(c, n, position, len(xs))
    return xs[:at] + xs[at + 1 :]


@op("SequenceAt")
def sequence_at(c: Emitter, n: NodeView, xs: list[Any], position: Operand) -> Any:
    return xs[_place(c, n, position, len(xs))]


@op("SequenceLength")
def sequence_length(c: Emitter, n: NodeView, xs: list[Any]) -> Any:
    return np.asarray(len(xs), np.int64)


@op("ConcatFromSequence")
def concat_from_sequence(c: Emitter, n: NodeView, xs: list[Any]) -> Any:
    axis = n["axis"]
    if not n["new_axis"]:
        return c.concat(*xs, axis=axis)
    return c.concat(*(c.add_axes(x, axis % (c.rank(x) + 1)) for x in xs), axis=axis % (c.rank(xs[0]) + 1))


@op("SplitToSequence")
def split_to_sequence(c: Emitter, n: NodeView, x: Operand, sizes: Operand | None = None) -> Any:
    axis = n["axis"] % c.rank(x)
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
