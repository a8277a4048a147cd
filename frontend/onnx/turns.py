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


_SAME = ("cast", "reshape", "broadcast_to")
_SUMS = {"add": 1, "sub": -1}
_COUNTS = {DType.I64, DType.I32, DType.F64, DType.F32}
"""Element types that a counter may pass through: others are too narrow for it."""
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
    if x in known or x.tensor.size != 1 or x.tensor.dtype not in _COUNTS:
        return known.get(x)
    if node := x.made_by("dim_size"):
        return Line(node.attrs.size)  # type: ignore[attr-defined]
    if node := x.made_by(*_SAME):
        return line(node.inputs[0], known)
    if (node := x.made_by("ceil")) and (up := node.inputs[0].made_by("div")):
        return _quotient(*(line(v, known) for v in up.inputs))
    if not (node := x.made_by("mul", *_SUMS)):
        return None
    a, b = (line(v, known) for v in node.inputs)
    if a is None or b is None:
        return None
    return (_product(a, b) or _product(b, a)) if node.is_a("mul") else a.plus(b, _SUMS[node.op.name])


def _product(a: Line, b: Line) -> Line | None:
    return Line(a.offset * b.offset, a.step * b.offset) if b.step == 0 and isinstance(b.offset, int) else None


def _quotient(a: Line | None, b: Line | None) -> Line | None:
    """Rounded up, as the length of ``range(start, stop, step)`` is."""
    if a is None or b is None or a.step or b.step or not isinstance(b.offset, int) or b.offset == 0:
        return None
    return Line(-floordiv(a.offset if b.offset < 0 else -a.offset, abs(b.offset)))


def conditions(x: object, known: Mapping[Value, Line], holds: bool = True) -> list[Line] | None:
    """The lines that all are at least 0 exactly where the truth value ``x`` is ``holds``; None where more decides it."""
    if isinstance(x, Value) and x.const is not None:
        x = x.const
    if isinstance(x, np.ndarray):
        return [] if x.size == 1 and bool(x.ravel()[0]) is holds else None
    if not isinstance(x, Value) or x.tensor.size != 1:
        return None
    if node := x.made_by("select", "cond"):  # an If that says whether to break
        at = node.outputs.index(x)
        branches = node.inputs[1:] if node.is_a("select") else [b.graph.outputs[at] for b in node.attrs.bodies]
        yes, no = (None if v.const is None else bool(v.const.ravel()[0]) for v in branches)
        return conditions(node.inputs[0], known, yes is holds) if None not in (yes, no) and yes is not no else None
    if (node := x.made_by(*_SAME)) and node.inputs[0].tensor.dtype is x.tensor.dtype:
        return conditions(node.inputs[0], known, holds)
    if node := x.made_by("logical_not"):
        return conditions(node.inputs[0], known, not holds)
    if (node := x.made_by("logical_and")) and holds:
        parts = [conditions(v, known) for v in node.inputs]
        return None if any(p is None for p in parts) else [p for part in parts if part is not None for p in part]
    if not (node := x.made_by(*_ABOVE)):
        return None
    above, below, by = _ABOVE[node.op.name if holds else _OPPOSITE[node.op.name]]
    large, small = (line(node.inputs[i], known) for i in (above, below))
    return None if large is None or small is None else [large.plus(small, -1).plus(Line(by), -1)]


def increment(after: object, before: object) -> int | None:
    """How much is added to ``before`` to make ``after``; None where that is no whole number."""
    (a, more), (b, less) = _root(after), _root(before)
    return more - less if a is b and isinstance(a, Value) else None


def _root(x: object) -> tuple[object, int]:
    """What ``x`` is made of by adding whole numbers, and their sum."""
    total = 0
    while isinstance(x, Value) and x.tensor.size == 1 and x.tensor.dtype in _COUNTS:
        if node := x.made_by(*_SAME):
            x = node.inputs[0]
            continue
        if not (node := x.made_by(*_SUMS)):
            break
        ways = [(node.inputs[0], node.inputs[1])] + [(node.inputs[1], node.inputs[0])] * node.is_a("add")
        found = [(v, by.offset) for v, w in ways if (by := line(w, {})) is not None and isinstance(by.offset, int)]
        if not found:
            break
        x, more = found[0]
        total += more if node.is_a("add") else -more
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
