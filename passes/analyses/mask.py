"""What a mask says: predicates over positions (causal, window) told apart from masks that are data.

However it is spelt, a mask of positions is a number (0 or 1, 0 or minus infinity) on each of a few regions of (query, key):
see indexing.py. What is implied wherever it keeps something is a predicate; the mask is no more than its predicates if, where
they hold, it hides nothing. Conjunctions with data are taken apart, negations pushed inwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wasat.ir import DimLike, DType, Node, Value

from ..pattern import number_of
from .affine import Affine, Piece, empty, implies, negated
from .confirm import agrees
from .indexing import Indexing

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
    meaning: dict[float, bool] = {0: not keep, 1: keep}
    found, whole = _read(at.pieces(v), meaning.get, shape, at)
    if not agrees(v, shape, lambda x: meaning.get(x), found.causal, found.window, whole):
        found, whole = Mask(), False
    if whole:
        return found
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
    found.operands.append((v, not keep))
    return found


def hidden_by(v: Value, shape: Sequence[DimLike], factor: float = 1.0) -> tuple[Mask, bool, float] | None:
    """What ``v``, times ``factor``, keeps of scores of ``shape``, added to them; whether it does no more; its weakest fill.

    None, where it is not known to hide anything.
    """
    at = Indexing(shape)
    pieces = at.pieces(v)
    numbers = [p.number * factor if isinstance(p.number, (int, float)) and p.number else p.number for p in pieces]
    fills = [x for x in numbers if isinstance(x, (int, float)) and x <= FINITE_FILL]
    if not fills:
        return None
    meaning = {x: False for x in fills} | {0: True}
    scaled = [Piece(p.where, float(x) if isinstance(x, (int, float)) else None) for p, x in zip(pieces, numbers)]
    found, whole = _read(scaled, meaning.get, shape, at)
    if not agrees(v, shape, lambda x: _keeps(x * factor), found.causal, found.window, whole):
        return None
    return found, whole, max(fills)


def _keeps(x: float) -> bool | None:
    """What a number that is added to scores means: True where it keeps them, False where it hides them."""
    return True if x == 0 else False if x <= FINITE_FILL else None


def _read(
    pieces: Sequence[Piece], kept: Callable[[Any], bool | None], shape: Sequence[DimLike], at: Indexing
) -> tuple[Mask, bool]:
    """The predicates that hold wherever a mask keeps, and whether they are all that it says."""
    sizes = [at.dim(d) for d in shape]
    keeps = [p for p in pieces if kept(p.number) is not False]
    hides = [p for p in pieces if kept(p.number) is False]
    known = len(hides) + sum(kept(p.number) is True for p in keeps) == len(pieces)
    if not hides or not keeps:
        return Mask(), known and not hides
    unit = Affine((0,) * (len(sizes) - 2) + (1, -1), 0)
    offset = Affine((), sizes[-1] - sizes[-2])  # query i stands at i + (t - s)
    causal = unit.plus(offset)
    found, said = Mask(), []
    if all(implies(p.where, causal, sizes) for p in keeps):
        found.causal, said = True, [causal]
    edges = dict.fromkeys(e for p in pieces for c in p.where for e in (c, negated(c)))
    for c in edges:
        bound = c.of_rank(len(sizes)).plus(unit).plus(offset)  # window - 1, of i + (t - s) - j < window
        if not isinstance(bound.number, int) or bound.number < 0 or bound.number + 1 >= (found.window or bound.number + 2):
            continue
        if all(implies(p.where, c, sizes) for p in keeps):
            found.window = bound.number + 1
    if found.window is not None:
        said.append(Affine((), found.window - 1).minus(causal))
    return found, known and all(empty([*said, *p.where], sizes) for p in hides)


def ends(v: Value) -> tuple[int, int] | None:
    """(sinks, window), where a boolean mask of positions keeps no more than the first ``sinks`` keys and each query's last
    ``window``. None where it keeps more, or where that is not known.
    """
    at, rank = Indexing(()), len(v.shape)
    if rank < 2 or v.tensor.dtype is not DType.BOOL:
        return None
    sizes = at.shape(v)
    query, key = (Affine(tuple(int(a == rank - n) for a in range(rank)), 0) for n in (2, 1))
    behind = query.minus(key)
    sinks, window = 0, 0
    for p in at.pieces(v):
        if p.number == 0:
            continue
        near = _least(p.where, behind, sizes)
        first = _least(p.where, key, sizes) if near is None else None
        if near is None and first is None:
            return None
        window, sinks = max(window, near or 0), max(sinks, first or 0)
    return (sinks, window) if sinks and window else None


def _least(where: Sequence[Affine], what: Affine, sizes: Sequence[DimLike]) -> int | None:
    """The least number, of those that stand in the region's own bounds, below which ``what`` is everywhere in it."""
    bounds = [c.of_rank(len(sizes)).plus(what).number for c in where]  # c >= 0 says that what <= bound
    known = sorted({n + 1 for n in bounds if isinstance(n, int) and n >= 0})
    return next((n for n in known if implies(where, Affine((), n - 1).minus(what), sizes)), None)


def _truth(node: Node) -> Value | None:
    """The boolean that was cast to numbers and is cast back."""
    inner = node.inputs[0].made_by("cast")
    if node.output.tensor.dtype is not DType.BOOL or inner is None:
        return None
    return inner.inputs[0] if inner.inputs[0].tensor.dtype is DType.BOOL else None


def _tail(v: Value) -> tuple[DimLike, ...] | None:
    """The last two axes of a value that has no other (larger than 1)."""
    padded = (1, 1, *v.shape)
    return tuple(padded[-2:]) if all(d == 1 for d in padded[:-2]) else None
