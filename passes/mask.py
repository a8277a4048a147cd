"""What a mask says: predicates over positions (causal, window) told apart from masks that are data.

Positions are affine in the query's and the key's index (see affine.py). A comparison of two of them is ``key <= query + c`` or
``query - key < w``, and so is what a slice of a constant triangle says; conjunctions are taken apart, negations pushed inwards,
what is always true is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from wasat.ir import DimLike, DType, Node, Value, equal

from .affine import Affine, Indexing
from .pattern import number_of

FINITE_FILL = -1e4
"""A finite number at or below this stands for minus infinity (the least f16 is -65504; models of its time wrote -1e4)."""
LEAST_FILL = -1e3
"""What of it must be left where a factor comes after it (1 / sqrt(64), say): it still hides."""


@dataclass
class Mask:
    """A conjunction: what is kept."""

    causal: bool = False
    window: int | None = None
    operands: list[tuple[Value, bool]] = field(default_factory=list)
    """Masks that are data, and whether each is to be negated."""
    finite: bool = False
    """Whether something is hidden by a finite number: another mask may hide what this one leaves, and undo it."""

    def meet(self, other: Mask) -> None:
        self.causal |= other.causal
        if other.window is not None:
            self.window = other.window if self.window is None else min(self.window, other.window)
        self.operands += other.operands
        self.finite |= other.finite


def is_fill(v: Value) -> float | None:
    """The number, if ``v`` is a constant that stands for minus infinity."""
    x = number_of(v)
    return x if x is not None and x <= FINITE_FILL else None


def analyze(v: Value, shape: Sequence[DimLike], keep: bool = True, at: Indexing | None = None) -> Mask:
    """What a boolean mask, right-aligned to scores of ``shape``, keeps where it is true (false, if not ``keep``).

    Of a mask of numbers that are 0 or 1, 1 is true; what is not understood of it is an operand, a mask of numbers still.
    """
    at = at or Indexing(shape)
    known = at.of(v)
    if known is not None and known.number == int(keep):
        return Mask()
    node = v.node
    name = node.op.name if node is not None else ""
    if node is not None:
        if name == "logical_not":
            return analyze(node.inputs[0], shape, not keep, at)
        if name == ("logical_and" if keep else "logical_or"):
            mask = analyze(node.inputs[0], shape, keep, at)
            mask.meet(analyze(node.inputs[1], shape, keep, at))
            return mask
        if name == "broadcast_to" or (name == "reshape" and _tail(v) is not None and _tail(v) == _tail(node.inputs[0])):
            return analyze(node.inputs[0], shape, keep, at)
        if name == "cast" and (inner := _truth(node)) is not None:
            return analyze(inner, shape, keep, at)
        found = _comparison(node, shape, keep, at) if name in _COMPARISONS else None
        if found is not None:
            return found
    return _triangle(v, shape, keep, at) or Mask(operands=[(v, not keep)])


def _truth(node: Node) -> Value | None:
    """The boolean that was cast to numbers and is cast back."""
    inner = node.inputs[0].node
    if node.output.tensor.dtype is not DType.BOOL or inner is None or inner.op.name != "cast":
        return None
    return inner.inputs[0] if inner.inputs[0].tensor.dtype is DType.BOOL else None


def _tail(v: Value) -> tuple[DimLike, ...] | None:
    """The last two axes of a value that has no other (larger than 1)."""
    padded = (1, 1, *v.shape)
    return tuple(padded[-2:]) if all(d == 1 for d in padded[:-2]) else None


_COMPARISONS = {"less": (1, -1), "less_equal": (1, 0), "greater": (-1, -1), "greater_equal": (-1, 0)}
"""a OP b as sign * (a - b) <= bound."""


def _comparison(node: Node, shape: Sequence[DimLike], keep: bool, at: Indexing) -> Mask | None:
    a, b = (at.of(x) for x in node.inputs)
    if a is None or b is None:
        return None
    sign, bound = _COMPARISONS[node.op.name]
    d = a.plus(b.scaled(-1)).plus(Affine((0, 0), 0)).scaled(sign)
    if not keep:  # not (d <= bound): -d <= -bound - 1
        d, bound = d.scaled(-1), -bound - 1
    if any(t != 0 for t in d.terms[:-2]):
        return None
    if d.terms[-2:] not in ((-1, 1), (1, -1)):
        return None
    return _band(d.terms[-1] == 1, bound - d.const, shape, at)


def _band(ahead: bool, limit: DimLike, shape: Sequence[DimLike], at: Indexing) -> Mask | None:
    """``j - i <= limit`` (``i - j``, if not ``ahead``) for the key's index j and the query's i."""
    offset = at.dim(shape[-1]) - at.dim(shape[-2])  # query i stands at i + (t - s)
    if ahead:
        return Mask(causal=True) if equal(limit, offset) is True else None
    window = limit + offset + 1
    return Mask(window=window) if isinstance(window, int) and window >= 1 else None


def _triangle(v: Value, shape: Sequence[DimLike], keep: bool, at: Indexing) -> Mask | None:
    """A slice of a constant table [1, .., n, m] that is 1 (or 0) at and below a diagonal, and 0 (or 1) above."""
    size = _tail(v)
    if size is None or any(equal(at.dim(a), at.dim(b)) is not True for a, b in zip(size, shape[-2:])):
        return None
    row: DimLike = 0
    column: DimLike = 0
    while v.node is not None and v.const is None:
        node, v = v.node, v.node.inputs[0] if v.node.inputs else v
        attrs: Any = node.attrs
        if node.op.name == "slice" and len(attrs.starts) >= 2 and attrs.steps[-2:] == (1, 1):
            row, column = row + at.dim(attrs.starts[-2]), column + at.dim(attrs.starts[-1])
        elif node.op.name != "cast" and not (node.op.name == "reshape" and _tail(v) == _tail(node.output)):
            return None
    size = _tail(v)
    if v.const is None or size is None or v.const.size == 0:
        return None
    table = v.const.reshape(v.const.shape[-2:]) if v.const.ndim >= 2 else v.const[None]
    one = table == 1
    if not (one | (table == 0)).all():
        return None
    if not one[0, 0]:
        one, keep = ~one, not keep
    diagonal = int(one[0].sum()) - 1
    if not np.array_equal(one, np.tri(one.shape[0], one.shape[1], diagonal, dtype=bool)):
        return None
    limit = diagonal + row - column
    return _band(True, limit, shape, at) if keep else _band(False, -1 * limit - 1, shape, at)
