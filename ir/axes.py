"""How an operation acts along axes: each axis of each operand and result as a product of factors, each of which has a role.

    matmul           x (m, k)   y (k, n)   ->  (m, n)     m, n free; k reduced by sum
    reshape          (b*s, h*d) -> (b, s, h, d)     a merged axis is a product of factors, outer ones first
    causal attention q (b, s, ..)   k, v (b, s, ..)       s ordered: a result depends on nothing behind it

The nearest relative are Shardy's sharding rules. The registry test proves every rule on the samples of its operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .dims import DimLike, equal, floordiv

Role = Literal["free", "reduced", "normalized", "ordered", "window", "indexed", "repeated", "whole"]
"""What depends on what along a factor that an operand has:

``free``: element i of the result on element i alone; ``ordered``: on elements up to i (``forward``; ``backward``: from i on);
``window``: on neighbours of i; ``normalized``: on all; ``reduced``: the result lacks it; ``indexed``: it is read or written at
indices; ``whole``: nothing is said. ``repeated``: a factor of results alone, along which all elements are the same.
"""


@dataclass(frozen=True, eq=False)
class Factor:
    """A part of an axis, or all of it; where it stands in several operands and results, their elements correspond."""

    size: DimLike
    role: Role = "free"
    how: str = ""
    """Of reduced: sum, max, min, prod, any all: where partial results are put together so; of ordered: forward or backward."""
    window: tuple[DimLike, DimLike, int] | None = None
    """Element i of the result reads elements from i * stride - before to i * stride + after: before, after, stride."""
    neutral: float | None = None
    """Of reduced and normalized: elements that are this number do not matter to the others."""
    does: str = ""
    """What the operation does along it, as a phrase with {} for what the axis is, where the role does not tell."""


NEUTRAL = {"sum": 0.0, "max": -math.inf, "min": math.inf, "prod": 1.0, "any": 0.0, "all": 1.0}
"""What does not matter to a reduction, by how partial results are put together."""

Axis = tuple[Factor, ...]
"""Outer factors first; an axis of size 1 may have none."""
Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class AxisRule:
    """The axes of operands and results."""

    operands: tuple[Axes, ...]
    results: tuple[Axes, ...]

    @property
    def result(self) -> Axes:
        """The axes of the first result."""
        return self.results[0]

    def place(self, factor: Factor, result: int = 0) -> int | None:
        """The axis of a result that a factor is, alone or as a part; None where the result lacks it."""
        return next((i for i, axis in enumerate(self.results[result]) if factor in axis), None)


def whole(shape: Sequence[DimLike], does: str = "", role: Role = "whole") -> Axes:
    """Axes of which nothing is known."""
    return tuple((Factor(d, role, does=does),) for d in shape)


def free(shape: Sequence[DimLike], other: Mapping[int, Factor] | None = None) -> Axes:
    """Axes that are free, but for those of ``other``."""
    return tuple(((other or {}).get(i, Factor(d)),) for i, d in enumerate(shape))


def aligned(shape: Sequence[DimLike], axes: Axes) -> Axes:
    """The axes of an operand of this shape that broadcasts to ``axes``: aligned at the end, none where it is stretched."""
    own = axes[len(axes) - len(shape) :]
    return tuple(() if d == 1 and any(f.size != 1 for f in a) else a for d, a in zip(shape, own))


def broadcast(*shapes: Sequence[DimLike]) -> AxisRule:
    """Element i of the result of element i of every operand."""
    rank = max(map(len, shapes), default=0)
    out = [next((s[i - rank] for s in shapes if len(s) >= rank - i and s[i - rank] != 1), 1) for i in range(rank)]
    axes = free(out)
    return AxisRule(tuple(aligned(s, axes) for s in shapes), (axes,))


def along(shape: Sequence[DimLike], axes: Sequence[int], make: Callable[[DimLike], Factor], results: int = 1) -> AxisRule:
    """One operand, and results of its shape: along ``axes`` what ``make`` says, along the others free."""
    own = free(shape, {a: make(shape[a]) for a in axes})
    return AxisRule((own,), (own,) * results)


def reduced(
    shape: Sequence[DimLike], axes: Sequence[int], keepdims: bool, how: str = "", neutral: float | None = None
) -> AxisRule:
    """One operand, reduced over ``axes``."""
    own = free(shape, {a: Factor(shape[a], "reduced", how, neutral=NEUTRAL.get(how, neutral)) for a in axes})
    return AxisRule((own,), (tuple(() if i in axes else x for i, x in enumerate(own) if keepdims or i not in axes),))


def regrouped(old: Sequence[DimLike], new: Sequence[DimLike]) -> AxisRule:
    """The same elements in row-major order: sizes are taken apart into factors that both shapes have."""
    return _regrouped(tuple(old), tuple(new))


@lru_cache(maxsize=4096)  # layers reshape alike
def _regrouped(old: tuple[DimLike, ...], new: tuple[DimLike, ...]) -> AxisRule:
    x, y = ([i for i, d in enumerate(shape) if d != 1] for shape in (old, new))
    before: list[Axis] = [() for _ in old]
    after: list[Axis] = [() for _ in new]
    start, cuts = (0, 0), [(0, 0), *_cuts([old[i] for i in x], [new[i] for i in y])]
    for i, j in cuts:  # axes of size 1 between the same others
        ones = [
            range(own[n - 1] + 1 if n else 0, own[n] if n < len(own) else len(shape))
            for own, n, shape in ((x, i, old), (y, j, new))
        ]
        for a, b in zip(*ones):
            before[a] = after[b] = (Factor(1),)
    for stop in cuts[1:]:
        xs, ys = x[start[0] : stop[0]], y[start[1] : stop[1]]
        found = _refine([old[i] for i in xs], [new[i] for i in ys])
        if found is None:
            merged = whole([old[i] for i in xs], "merges {} with another axis")
            found = list(merged), list(whole([new[i] for i in ys]))
        for axes, places, factors in ((before, xs, found[0]), (after, ys, found[1])):
            for i, own in zip(places, factors):
                axes[i] = own
        start = stop
    return AxisRule((tuple(before),), (tuple(after),))


def _cuts(xs: Sequence[DimLike], ys: Sequence[DimLike]) -> list[tuple[int, int]]:
    """Where as many elements are in front of (or behind) an axis of the one as of the other; last, the ends."""
    heads = [[product(*sizes[:i]) for i in range(len(sizes))] for sizes in (xs, ys)]
    tails = [[product(*sizes[i:]) for i in range(len(sizes))] for sizes in (xs, ys)]
    cuts, at = [], 0
    for i in range(1, len(xs)):
        for j in range(at + 1, len(ys)):
            if any(equal(a[i], b[j]) is True and a[i] != 0 for a, b in (heads, tails)):
                cuts.append((i, j))
                at = j
                break
    return [*cuts, (len(xs), len(ys))]


def _refine(xs: Sequence[DimLike], ys: Sequence[DimLike]) -> tuple[list[Axis], list[Axis]] | None:
    """Factors of which both lists of sizes are products; None where they are not found."""
    before: list[Axis] = [() for _ in xs]
    after: list[Axis] = [() for _ in ys]
    i = j = 0
    a, b = (xs[0] if xs else 1), (ys[0] if ys else 1)
    while i < len(xs) and j < len(ys):
        size, rest = (a, quotient(b, a)) if quotient(b, a) is not None else (b, quotient(a, b))
        if rest is None:
            return None
        factor = Factor(size)
        before[i], after[j] = (*before[i], factor), (*after[j], factor)
        left = quotient(a, size), quotient(b, size)
        a, b = (1 if x is None else x for x in left)
        if a == 1:
            i += 1
            a = xs[i] if i < len(xs) else 1
        if b == 1:
            j += 1
            b = ys[j] if j < len(ys) else 1
    return (before, after) if i == len(xs) and j == len(ys) else None


def product(*sizes: DimLike) -> DimLike:
    """All sizes multiplied."""
    total: DimLike = 1
    for d in sizes:
        total = total * d
    return total


def quotient(a: DimLike, b: DimLike) -> DimLike | None:
    """a / b where b divides a for every binding."""
    if b == 0:
        return None
    q = floordiv(a, b)
    return q if equal(q * b, a) is True else None
