"""Functions of a tensor's indices, affine piece by piece, and what holds of the regions on which the pieces stand.

iota(s) reshaped to [s, 1] minus iota(s)      element (i, j) is i - j
select(i - j < 0, -inf, 0)                    -inf where j - i - 1 >= 0, and 0 where i - j >= 0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations

import ml_dtypes
import numpy as np
from wasat.ir import DimLike, DType, less_equal

MOST_PIECES = 24
"""A function of more pieces is not followed: everyday masks have two to six."""
_MOST_CONSTRAINTS = 64
"""What elimination may come to for one axis; beyond that a region counts as one that may have elements."""


@dataclass(frozen=True)
class Affine:
    """Element (i0, i1, ..) is const + the sum of terms[a] * ia. Booleans are 0 and 1."""

    terms: tuple[DimLike, ...]
    const: DimLike

    def scaled(self, c: DimLike) -> Affine:
        return Affine(tuple(t * c for t in self.terms), self.const * c)

    def plus(self, other: Affine) -> Affine:
        """The sum, axes aligned from the right."""
        rank = max(len(self.terms), len(other.terms))
        a, b = ((0,) * (rank - len(x.terms)) + x.terms for x in (self, other))
        return Affine(tuple(s + t for s, t in zip(a, b)), self.const + other.const)

    def minus(self, other: Affine) -> Affine:
        return self.plus(other.scaled(-1))

    def of_rank(self, rank: int) -> Affine:
        return self.plus(Affine((0,) * rank, 0))

    def at(self, places: Sequence[Affine]) -> Affine:
        """The function where the index of axis a is ``places[a]``, a function of other indices."""
        result = Affine((0,) * max((len(p.terms) for p in places), default=0), self.const)
        for t, p in zip(self.terms, places, strict=True):
            result = result.plus(p.scaled(t)) if t != 0 else result
        return result

    @property
    def number(self) -> DimLike | None:
        """The one value of all elements, if they have one."""
        return self.const if all(t == 0 for t in self.terms) else None


@dataclass(frozen=True)
class Piece:
    """The elements at which every function of ``where`` is at least 0."""

    where: tuple[Affine, ...]
    value: Affine | float | None
    """A float: the one value of all elements, where that is no integer (minus infinity, say). None: not known."""

    @property
    def number(self) -> DimLike | float | None:
        return self.value.number if isinstance(self.value, Affine) else self.value

    def at(self, places: Sequence[Affine]) -> Piece:
        value = self.value.at(places) if isinstance(self.value, Affine) else self.value
        return Piece(tuple(c.at(places) for c in self.where), value)


def negated(constraint: Affine) -> Affine:
    """At least 0 where ``constraint`` is below 0, and nowhere else: the indices are integers."""
    return constraint.scaled(-1).plus(Affine((), -1))


def bounds_of(shape: Sequence[DimLike]) -> list[Affine]:
    """What holds of the indices of a tensor of ``shape``."""
    found = []
    for a, d in enumerate(shape):
        unit = Affine(tuple(int(a == i) for i in range(len(shape))), 0)
        found += [unit, Affine((), d - 1).minus(unit)]
    return found


def empty(where: Sequence[Affine], shape: Sequence[DimLike]) -> bool:
    """Whether no element of a tensor of ``shape`` lies where all of ``where`` are at least 0; False where that is not known.

    Fourier-Motzkin elimination over the rationals: what has no rational point has no integer one.
    """
    return _empty(tuple(where), tuple(shape))


@lru_cache(maxsize=2**14)  # every layer asks of the same mask
def _empty(where: tuple[Affine, ...], shape: tuple[DimLike, ...]) -> bool:
    rank = len(shape)
    rows = [c.of_rank(rank) for c in where]
    used = {a for c in rows for a, t in enumerate(c.terms) if t != 0}
    rows += [c for i, c in enumerate(bounds_of(shape)) if i // 2 in used]
    for axis in sorted(used):
        sloped = [c for c in rows if c.terms[axis] != 0]
        above = [c for c in sloped if less_equal(0, c.terms[axis]) is True]
        below = [c for c in sloped if less_equal(c.terms[axis], 0) is True]
        rows = [c for c in rows if c.terms[axis] == 0]  # one whose sign is not known says nothing
        if len(above) * len(below) > _MOST_CONSTRAINTS:
            return False
        rows += [a.scaled(-1 * b.terms[axis]).plus(b.scaled(a.terms[axis])) for a in above for b in below]
        rows = list(dict.fromkeys(rows))
    return any(less_equal(c.const, -1) is True for c in rows)


def implies(where: Sequence[Affine], constraint: Affine, shape: Sequence[DimLike]) -> bool:
    return empty([*where, negated(constraint)], shape)


def of_array(array: np.ndarray) -> tuple[Piece, ...] | None:
    """A constant: affine, or a few values, each where some axes and differences of axes are within bounds."""
    if array.size <= 1:
        return (Piece((), number(array.item(), array.ndim, DType.of(array.dtype))),) if array.size else None
    found = _affine_of(array)
    if found is not None:
        return (Piece((), found),)
    values = np.unique(array.reshape(-1)[:4096])
    if len(values) > 4:
        return None
    values = np.unique(array)
    if len(values) > 4 or np.isnan(values.astype(np.float64)).any():
        return None
    inside: list[tuple[tuple[Affine, ...], np.generic]] = []
    rest: np.generic | None = None
    for value in values:
        hull = _hull(array == value)
        if hull is not None:
            inside.append((hull, value))
        elif rest is None:
            rest = value
        else:
            return None
    pieces = [Piece(hull, number(value.item(), array.ndim, DType.of(array.dtype))) for hull, value in inside]
    if rest is not None:
        outside: list[tuple[Affine, ...]] = [()]
        for hull, _ in inside:
            outside = [(*c, *part) for c in outside for part in without(hull) if not empty((*c, *part), array.shape)]
        pieces += [Piece(c, number(rest.item(), array.ndim, DType.of(array.dtype))) for c in outside]
    return tuple(pieces) if len(pieces) <= MOST_PIECES else None


def without(where: Sequence[Affine]) -> Iterator[tuple[Affine, ...]]:
    """The complement of a region, in disjoint regions."""
    for i, c in enumerate(where):
        yield (*where[:i], negated(c))


def _affine_of(array: np.ndarray) -> Affine | None:
    """A constant whose differences along each axis are one number."""
    corner = array[(slice(4),) * array.ndim]
    if corner.size < array.size and _affine_of(corner) is None:
        return None
    exact = array.astype(np.float64)
    if not ((np.abs(exact) < 2**53).all() and (exact == np.trunc(exact)).all()):  # NaN is not; 2**53 may have been rounded to
        return None
    x = exact.astype(np.int64)
    terms = [int(np.diff(x, axis=a).flat[0]) if n > 1 else 0 for a, n in enumerate(x.shape)]
    first = int(x.flat[0])
    grid: Sequence[np.ndarray] = np.indices(x.shape, sparse=True)
    want = first + sum(t * i for t, i in zip(terms, grid))
    return Affine(tuple(terms), first) if np.array_equal(x, np.broadcast_to(want, x.shape)) else None


def number(x: float, rank: int, dtype: DType) -> Affine | float | None:
    """One number of an element type for all elements of a tensor; None for NaN. Floats of the size where some integers are not
    held any more are floats."""
    if np.isnan(x):
        return None
    low, high = limits(dtype)
    return Affine((0,) * rank, int(x)) if low <= x <= high and x == int(x) else float(x)


@cache
def limits(dtype: DType) -> tuple[int, int]:
    """The least and the greatest integer up to which a type holds all of them."""
    if dtype is DType.BOOL:
        return 0, 1
    if not dtype.is_float:
        return dtype.range
    high = 2 ** (int(ml_dtypes.finfo(dtype.np).nmant) + 1)
    return 1 if dtype is DType.F8E8M0 else -high, high  # powers of two alone


def _hull(inside: np.ndarray) -> tuple[Affine, ...] | None:
    """Bounds of axes and of differences of axes that hold where ``inside`` does, and nowhere else."""
    at = np.nonzero(inside)
    axes = [a for a, n in enumerate(inside.shape) if n > 1]
    grid: Sequence[np.ndarray] = np.indices(inside.shape, sparse=True)
    units = [Affine(tuple(int(a == i) for i in range(inside.ndim)), 0) for a in range(inside.ndim)]
    forms = [(units[a], at[a], grid[a]) for a in axes]
    forms += [(units[a].minus(units[b]), at[a] - at[b], grid[a] - grid[b]) for a, b in combinations(axes, 2)]
    bounds: list[tuple[Affine, np.ndarray]] = []
    for form, here, everywhere in forms:
        low, high = int(here.min()), int(here.max())
        if low > everywhere.min():
            bounds.append((form.plus(Affine((), -low)), everywhere >= low))
        if high < everywhere.max():
            bounds.append((Affine((), high).minus(form), everywhere <= high))
    for bound in list(bounds):  # what the others imply goes
        rest = [b for b in bounds if b is not bound]
        if np.array_equal(_meet(rest, inside), inside):
            bounds = rest
    return tuple(c for c, _ in bounds) if np.array_equal(_meet(bounds, inside), inside) else None


def _meet(bounds: Sequence[tuple[Affine, np.ndarray]], like: np.ndarray) -> np.ndarray:
    filled = np.ones_like(like)
    for _, holds in bounds:
        filled &= holds
    return filled
