"""How often a Loop turns whose condition compares counters with sizes, as exporters write ``while i < n``.

A counter is ``offset + step * turn``. What the condition compares is read from the graph as such lines; each comparison that
fails some day ends the loop after a number of turns, and the first to fail ends it.
Casts are taken to be exact: floats hold the counters of loops that anyone runs (whole numbers to 2^24).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from wasat.ir import DimLike, DType, Value, equal, less_equal, maximum, minimum
from wasat.ir.dims import floordiv

from .emit import Dims


@dataclass(frozen=True)
class Line:
    """``offset + step * turn``."""

    offset: DimLike
    step: int = 0

    def plus(self, other: Line, times: int = 1) -> Line:
        return Line(self.offset + times * other.offset, self.step + times * other.step)


_SAME = {"cast", "reshape", "broadcast_to"}
_COUNTS = {DType.I64, DType.I32, DType.F64, DType.F32}
"""Element types that a counter may pass through: others are too narrow for it."""
_SUMS = {"add": 1, "sub": -1}
_ABOVE = {"less": (1, 0, 1), "less_equal": (1, 0, 0), "greater": (0, 1, 1), "greater_equal": (0, 1, 0)}
"""Comparison -> which operand is the larger, which the smaller, and by how much at least."""
_OPPOSITE = {"less": "greater_equal", "less_equal": "greater", "greater": "less_equal", "greater_equal": "less"}


def line(x: object, known: Mapping[Value, Line]) -> Line | None:
    """An operand of one element as a line; None where it is none. ``known``: inputs of the graph that are lines."""
    if isinstance(x, Dims):
        return Line(x.array.ravel()[0]) if x.array.size == 1 else None
    if isinstance(x, Value) and x.const is not None:
        x = x.const
    if isinstance(x, np.ndarray):
        return Line(int(x.ravel()[0])) if x.size == 1 and np.isfinite(x.ravel()[0]) and x.ravel()[0] % 1 == 0 else None
    assert isinstance(x, Value)
    if x in known or x.node is None or x.tensor.size != 1 or x.tensor.dtype not in _COUNTS:
        return known.get(x)
    node = x.node
    if node.op.name == "dim_size":
        return Line(node.attrs.size)  # type: ignore[attr-defined]
    if node.op.name in _SAME:
        return line(node.inputs[0], known)
    if node.op.name == "ceil" and (up := node.inputs[0].node) is not None and up.op.name == "div":
        return _quotient(*(line(v, known) for v in up.inputs))
    if node.op.name in _SUMS or node.op.name == "mul":
        a, b = (line(v, known) for v in node.inputs)
        if a is None or b is None:
            return None
        return a.plus(b, _SUMS[node.op.name]) if node.op.name != "mul" else _product(a, b) or _product(b, a)
    return None


def _product(a: Line, b: Line) -> Line | None:
    return Line(a.offset * b.offset, a.step * b.offset) if b.step == 0 and isinstance(b.offset, int) else None


def _quotient(a: Line | None, b: Line | None) -> Line | None:
    """Rounded up, as the length of ``range(start, stop, step)`` is."""
    if a is None or b is None or a.step or b.step or not isinstance(b.offset, int) or b.offset == 0:
        return None
    return Line(-floordiv(a.offset if b.offset < 0 else -a.offset, abs(b.offset)))


def conditions(x: object, known: Mapping[Value, Line]) -> list[Line] | None:
    """The lines that all are at least 0 exactly where the truth value ``x`` holds; None where it is more than comparisons."""
    if isinstance(x, Value) and x.const is not None:
        x = x.const
    if isinstance(x, np.ndarray):
        return [] if x.size == 1 and x.ravel()[0] else None
    if not isinstance(x, Value) or x.node is None or x.tensor.size != 1:
        return None
    node, name, flip = x.node, x.node.op.name, False
    if name in ("select", "cond"):  # an If that says whether to break
        branches = node.inputs[1:] if name == "select" else [b.graph.outputs[node.outputs.index(x)] for b in node.attrs.bodies]
        yes, no = (None if v.const is None else bool(v.const.ravel()[0]) for v in branches)
        if (yes, no) == (True, False):
            return conditions(node.inputs[0], known)
        flip = (yes, no) == (False, True)
        if not flip:
            return None
    if name in _SAME and node.inputs[0].tensor.dtype is x.tensor.dtype:
        return conditions(node.inputs[0], known)
    if name == "logical_and":
        parts = [conditions(v, known) for v in node.inputs]
        return None if any(p is None for p in parts) else [p for part in parts if part is not None for p in part]
    if name == "logical_not":
        flip = True
    if flip and (inner := node.inputs[0].node) is not None:
        node = inner
    if node.op.name not in _ABOVE:
        return None
    above, below, by = _ABOVE[_OPPOSITE[node.op.name] if flip else node.op.name]
    large, small = (line(node.inputs[i], known) for i in (above, below))
    return None if large is None or small is None else [large.plus(small, -1).plus(Line(by), -1)]


def increment(after: object, before: object) -> int | None:
    """How much is added to ``before`` to make ``after``; None where that is no whole number."""
    (a, more), (b, less) = _root(after), _root(before)
    return more - less if a is b and isinstance(a, Value) else None


def _root(x: object) -> tuple[object, int]:
    """What ``x`` is made of by adding whole numbers, and their sum."""
    total = 0
    while isinstance(x, Value) and x.node is not None and x.tensor.size == 1 and x.tensor.dtype in _COUNTS:
        node = x.node
        if node.op.name in _SAME:
            x = node.inputs[0]
            continue
        sums = [(node.inputs[0], node.inputs[1])] if node.op.name in _SUMS else []
        sums += [(node.inputs[1], node.inputs[0])] if node.op.name == "add" else []
        for rest, by in sums:
            number = line(by, {})
            if number is not None and isinstance(number.offset, int):
                x, total = rest, total + _SUMS[node.op.name] * number.offset
                break
        else:
            break
    return x, total


def how_often(limit: DimLike | None, first: Sequence[Line], again: Sequence[Line]) -> DimLike | None:
    """The number of turns; None where it cannot be told for all sizes.

    ``limit``: no more turns than that. The loop turns at all where ``first`` are at least 0 (lines without a step), and again
    after a turn where ``again`` are.
    """
    ends = [] if limit is None else [limit]
    before, always = list(first), []
    for p in again:
        if p.step >= 0:
            always.append(p)
            continue
        end = floordiv(p.offset, -p.step) + 2  # after turn end - 1 it fails
        same = [q for q in before if equal(floordiv(q.offset, -p.step) + 1, end)]  # q fails where end is below 1
        ends.append(end if same else maximum(end, 1))
        before = [q for q in before if q not in same]
    if not ends or not _implied(before, ends, 1) or not _implied(always, ends, 2):
        return None
    return maximum(functools.reduce(minimum, ends), 0)


def _implied(lines: Sequence[Line], ends: Sequence[DimLike], turns: int) -> bool:
    """Whether each is at least 0, if a loop that turns at least so often turns no more often than any of ``ends``."""
    return all(any(less_equal(d, p.offset) for d in (0, *(end - turns for end in ends))) for p in lines)


__all__ = ["Line", "conditions", "how_often", "increment", "line"]
