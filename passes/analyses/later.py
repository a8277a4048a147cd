"""What values over (query, key) are where the key is later: unknown, or one number; what does not matter there.

    select(key <= query, scores, -inf)      -inf
    softmax of it over keys                 0
    its product with values, over keys      later keys add nothing
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from wasat.ir import Node, Value
from wasat.ir.ops.shape import Pad

from ..pattern import number_of
from .affine import Affine, empty
from .confirm import nothing_seen
from .indexing import Indexing
from .mask import FINITE_FILL

if TYPE_CHECKING:
    from .sequence import Label


def stands_for(number: float | None, neutral: float) -> bool:
    """Whether a number does not matter where ``neutral`` does not: numbers below all scores stand for minus infinity."""
    return number is not None and (number == neutral or (neutral == -math.inf and number <= FINITE_FILL))


def blind(v: Value, key: int, labels: Mapping[Value, Label]) -> Value | None:
    """The part of scores ``v`` that hides from some query every key up to its own, and later ones no more than those: by a
    number, under which a softmax then takes all alike. None where that is not known."""
    waiting = [(v, labels[v].axis + labels[v].other - key, key)]
    while waiting:
        x, query, key = waiting.pop()
        label, node = labels[x], x.node
        if label.kind == "pair" and not label.rows:
            number = label.later(key)
            if number is not None and -math.inf < number <= FINITE_FILL and nothing_seen(x, query, key, number):
                return x
            continue
        if node is None or not (node.op.elementwise or node.op.carries):
            continue
        rule = node.axes
        along = [rule.result[query], rule.result[key]]
        found = [(u, [axes.index(f) if f in axes else None for f in along]) for u, axes in zip(node.inputs, rule.operands)]
        both = [(u, a, b) for u, (a, b) in found if a is not None and b is not None and labels[u].relates]
        waiting += both
        for u, a, b in both[: node.is_a("select") and both[0][0] is node.inputs[0]]:  # by a choice of which one is a number
            hidden = labels[u].later(b)
            fill = number_of(node.inputs[1 if hidden else 2]) if hidden is not None and labels[u].kind == "pair" else None
            if fill is not None and -math.inf < fill <= FINITE_FILL and hidden is not None and nothing_seen(u, a, b, hidden):
                return u
    return None


def apart(at: Indexing, v: Value, axis: int, other: int) -> tuple[float | None, float | None]:
    """The numbers of ``v``, a function of positions, where the index along ``other`` is larger, and where it is smaller."""
    rank, sizes = len(v.shape), at.shape(v)
    difference = Affine(tuple(int(a == other) - int(a == axis) for a in range(rank)), -1)
    sides = difference, difference.plus(Affine((), 1)).scaled(-1).plus(Affine((), -1))
    found = []
    for side in sides:
        here = [p for p in at.pieces(v) if not empty([*p.where, side], sizes)]
        numbers = {p.number if isinstance(p.number, (int, float)) else None for p in here}
        found.append(float(n) if len(numbers) == 1 and (n := numbers.pop()) is not None else None)
    return found[0], found[1]


def beside(node: Node, numbers: Sequence[float | None]) -> float | None:
    """The number that ``node`` makes of operands that are these numbers (None: not known, but finite); None if it is not one.

    -1e9 added to a score stands for minus infinity, as it does wherever a softmax follows.
    """
    name = node.op.name
    if isinstance(node.attrs, Pad.Attrs):
        numbers = [*numbers, float(node.attrs.value)]
    if node.op.picks(node.attrs) is not None:
        return numbers[0]
    if node.op.kind == "view":
        return numbers[0] if len(set(numbers)) == 1 else None
    if not node.op.elementwise:
        return _together(node, numbers)
    if None not in numbers:
        return _evaluated(node, [x for x in numbers if x is not None])
    if name == "select":
        if numbers[0] is None:
            return numbers[1] if numbers[1] == numbers[2] else None
        return numbers[1] if numbers[0] else numbers[2]
    if (decisive := node.op.absorbing) is not None and decisive in numbers:
        return float(decisive)
    if name == "div" and numbers[0] == 0:
        return 0.0
    if name not in _BESIDE_INFINITY or all(x is None for x in numbers):
        return None
    if name in ("add", "sub"):
        fills = [x * (-1 if name == "sub" and i else 1) for i, x in enumerate(numbers) if x is not None]
        return -math.inf if fills[0] <= FINITE_FILL else math.inf if fills[0] == math.inf else None
    tried = {_evaluated(node, [probe if x is None else x for x in numbers]) for probe in (-1.0, 0.0, 1.0)}
    known = next(x for x in numbers if x is not None)
    return tried.pop() if math.isinf(known) and len(tried) == 1 else None


def _together(node: Node, numbers: Sequence[float | None]) -> float | None:
    """The same of what takes elements together along other axes than those of positions: all of them are the number given."""
    if node.op.kind == "product":
        reduced = [f.how for axes in node.axes.operands for axis in axes for f in axis if f.role == "reduced"]
        return 0.0 if 0 in numbers and reduced and set(reduced) == {"sum"} else None
    if node.op.kind != "reduction" or len(numbers) != 1 or numbers[0] is None:
        return None
    v, [axes] = node.inputs[0], node.axes.operands
    along = [any(f.role == "reduced" for f in axis) for axis in axes]
    found = set()
    for n in (1, 2, 3):  # of however many
        x = np.full([n if a else 1 for a in along], numbers[0]).astype(v.tensor.dtype.np)
        with np.errstate(all="ignore"):
            found.add(float(np.asarray(node.op.reference(node.attrs, x)).reshape(-1)[0]))
    return found.pop() if len(found) == 1 and not any(map(math.isnan, found)) else None


_BESIDE_INFINITY = ("add", "sub", "div", "maximum", "minimum", "less", "less_equal", "greater", "greater_equal")
"""Of an infinity and anything finite, these make one number (or what is finite, or two of either sign)."""


def _evaluated(node: Node, numbers: Sequence[float]) -> float | None:
    operands = [np.asarray(n).astype(v.tensor.dtype.np) for n, v in zip(numbers, node.inputs)]
    with np.errstate(all="ignore"):
        y = float(np.asarray(node.op.reference(node.attrs, *operands)))
    return None if math.isnan(y) else y


def neutralized(node: Node, axis: int, neutral: float) -> float | None:
    """What a node that normalizes ``axis`` makes of elements that do not matter to it, beside one that does."""
    v = node.inputs[0]
    x = np.zeros([2 if a == axis else 1 for a in range(len(v.shape))], v.tensor.dtype.np)
    x.reshape(-1)[1] = neutral
    with np.errstate(all="ignore"):
        y = float(np.asarray(node.op.reference(node.attrs, x)).reshape(-1)[1])
    return None if math.isnan(y) else y


