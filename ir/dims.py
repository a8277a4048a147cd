"""Symbolic dimensions: integer polynomials over named symbols, in a sorted normal form.

A dimension is an ``int`` or a :class:`Dim`; arithmetic that ends in a constant gives back an ``int``, so ``n + 1 - n`` is the
plain ``1``. Every symbol stands for a non-negative integer (an axis may be empty: a KV cache starts with none).
Floor division, modulo, ``max`` and ``min`` that do not simplify are kept as atoms.

Comparison is three-valued: :func:`equal` and :func:`less_equal` answer ``True``, ``False`` or ``None`` for "it depends on the
binding". Whoever needs a yes calls :func:`wasat.ir.checks.require_equal`, which records the unknown as a runtime check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from math import gcd
from numbers import Integral
from typing import Any, TypeVar, Union, cast

from .errors import DimError

DimLike = Union[int, "Dim"]

_LARGEST = 1024
"""How many atoms a dimension may be made of, those inside others included: arithmetic on it is to end soon. Sizes of real
models have a dozen."""
_DEEPEST = 40
"""How deep atoms may be nested."""
_ATOMS = 4
"""Of how many atoms beside each other a proof of sign tries the sides."""


@dataclass(frozen=True)
class Func:
    """An atom that is not a symbol: ``floordiv``, ``mod``, ``max`` or ``min`` of two dimensions."""

    name: str
    lhs: DimLike
    rhs: DimLike

    def __str__(self) -> str:
        if self.name in ("max", "min"):
            return f"{self.name}({self.lhs}, {self.rhs})"
        sign = "//" if self.name == "floordiv" else "%"
        return f"({_tight(self.lhs)} {sign} {_tight(self.rhs)})"


Atom = Union[str, Func]
Monomial = tuple[Atom, ...]  # sorted, with repetition; () is the constant


def _tight(d: DimLike) -> str:
    text = str(d)
    return text if text.isidentifier() or text.isdigit() else f"({text})"


def _order(monomial: Monomial) -> tuple[int, tuple[str, ...]]:
    return (-len(monomial), tuple(str(a) for a in monomial))


_Operator = TypeVar("_Operator", bound=Callable[[Any, Any], Any])


def _of_dims(operation: _Operator) -> _Operator:
    """An operator of dimensions; with an operand that is none, such as a tensor, it is up to that."""

    @wraps(operation)
    def apply(self: Dim, other: object) -> Any:
        return operation(self, other) if isinstance(other, (Dim, Integral)) else NotImplemented

    return cast(_Operator, apply)


@dataclass(frozen=True, eq=True)
class Dim:
    """A polynomial with integer coefficients; never a constant (constants are ``int``)."""

    terms: tuple[tuple[Monomial, int], ...]

    @cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _extent(self) -> tuple[int, int]:
        """How many atoms and constants it is made of, and how deep they are nested."""
        parts = [_extent(side) for m, _ in self.terms for a in m if isinstance(a, Func) for side in (a.lhs, a.rhs)]
        size = sum(max(len(m), 1) for m, _ in self.terms) + sum(n for n, _ in parts)
        return size, 1 + max((depth for _, depth in parts), default=0)

    def __str__(self) -> str:
        out = ""
        for monomial, c in self.terms:
            body = "*".join(str(a) for a in monomial)
            mag = str(abs(c)) if not monomial else body if abs(c) == 1 else f"{abs(c)}*{body}"
            out += (("-" if c < 0 else "") if not out else (" - " if c < 0 else " + ")) + mag
        ((monomial, _), *rest) = self.terms
        alone = not rest and len(monomial) == 1 and out.startswith("(")
        return out[1:-1] if alone else out  # (n // 2) by itself needs no parentheses

    __repr__ = __str__

    @_of_dims
    def __add__(self, other: DimLike) -> DimLike:
        return _combine(_terms(self) + _terms(other))

    __radd__ = __add__

    def __neg__(self) -> DimLike:
        return _combine([(m, -c) for m, c in self.terms])

    @_of_dims
    def __sub__(self, other: DimLike) -> DimLike:
        return _combine(_terms(self) + [(m, -c) for m, c in _terms(other)])

    @_of_dims
    def __rsub__(self, other: DimLike) -> DimLike:
        return -self + other

    @_of_dims
    def __mul__(self, other: DimLike) -> DimLike:
        _refuse_beyond(_extent(self)[0] * _extent(other)[0])
        return _combine(
            [(tuple(sorted(m + n, key=str)), c * d) for m, c in self.terms for n, d in _terms(other)]
        )

    __rmul__ = __mul__

    @_of_dims
    def __floordiv__(self, other: DimLike) -> DimLike:
        return floordiv(self, other)

    @_of_dims
    def __rfloordiv__(self, other: int) -> DimLike:
        return floordiv(other, self)

    @_of_dims
    def __mod__(self, other: DimLike) -> DimLike:
        return mod(self, other)

    @_of_dims
    def __rmod__(self, other: int) -> DimLike:
        return mod(other, self)

    def __bool__(self) -> bool:
        raise DimError(f"the truth of dimension {self} depends on its binding: compare it with equal() or less_equal()")

    @_of_dims
    def __lt__(self, other: object) -> bool:
        raise DimError(f"{self} < {other} depends on the binding: use less_equal(), whose answer may be None")

    __le__ = __gt__ = __ge__ = __lt__

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the symbols in it, in order of appearance, without repetition."""
        return tuple(dict.fromkeys(_symbols(self)))


def _symbols(d: DimLike) -> Iterator[str]:
    if isinstance(d, Dim):
        for monomial, _ in d.terms:
            for a in monomial:
                if isinstance(a, str):
                    yield a
                else:
                    yield from _symbols(a.lhs)
                    yield from _symbols(a.rhs)


def symbols_of(dims: Iterable[object]) -> tuple[str, ...]:
    """Symbols of all the dimensions in ``dims``, in order of appearance."""
    return tuple(dict.fromkeys(s for d in dims if isinstance(d, Dim) for s in d.symbols))


def _extent(d: DimLike) -> tuple[int, int]:
    return d._extent if isinstance(d, Dim) else (1, 0)


def _refuse_beyond(size: int, depth: int = 0) -> None:
    if size > _LARGEST:
        raise DimError(f"a size would have about {size} terms; at most {_LARGEST} are kept")
    if depth > _DEEPEST:
        raise DimError(f"a size would be nested {depth} deep; at most {_DEEPEST} is kept")


def _terms(d: DimLike) -> list[tuple[Monomial, int]]:
    if isinstance(d, Dim):
        return list(d.terms)
    return [((), int(d))]


def _combine(terms: Iterable[tuple[Monomial, int]]) -> DimLike:
    total: dict[Monomial, int] = {}
    terms = list(terms)
    _refuse_beyond(len(terms))
    for m, c in terms:
        total[m] = total.get(m, 0) + c
    left = sorted(((m, c) for m, c in total.items() if c), key=lambda t: _order(t[0]))
    if not left:
        return 0
    if len(left) == 1 and not left[0][0]:
        return left[0][1]
    return Dim(tuple(left))


TAKEN = re.compile(r"max|min|inf|nan|bool|[fiu](?:64|32|16)|[iu][842]|bf16|f8e(?:4m3|5m2)(?:fnuz)?|f8e8m0|f4e2m1")
"""Words that mean something else in a text of sizes and types."""


def names_dimension(name: str) -> bool:
    """Whether a text can be read as the name of a dimension: letters, digits and _ of ASCII, and no word that means more."""
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None and not TAKEN.fullmatch(name)


def symbol(name: str) -> Dim:
    """The dimension named ``name``; DimError for what :func:`names_dimension` does not take."""
    if not names_dimension(name):
        raise DimError(f"{name!r} cannot name a dimension: use a plain identifier other than max, min and element types")
    return Dim((((name,), 1),))


def _func(name: str, lhs: DimLike, rhs: DimLike) -> Dim:
    (m, i), (n, j) = _extent(lhs), _extent(rhs)
    _refuse_beyond(m + n, max(i, j) + 1)
    return Dim((((Func(name, lhs, rhs),), 1),))


def _split(d: DimLike, by: int) -> tuple[DimLike, DimLike]:
    """``(q, r)`` with ``d == by*q + r``, every coefficient of r in ``0 .. by-1``."""
    q = _combine([(m, c // by) for m, c in _terms(d)])
    r = _combine([(m, c % by) for m, c in _terms(d)])
    return q, r


def floordiv(lhs: DimLike, rhs: DimLike) -> DimLike:
    """``lhs // rhs``; exact where a factor cancels, an atom otherwise."""
    if isinstance(rhs, int):
        if rhs == 0:
            raise DimError(f"division of dimension {lhs} by zero")
        if rhs < 0:
            return floordiv(-lhs, -rhs)
        q, r = _split(lhs, rhs)
        if isinstance(r, int):
            return q  # 0 <= r < rhs
        for m, c in _terms(r):
            match m:
                case (Func("floordiv", x, int(k)),) if c == 1:  # ((n + 1)//2 + 1)//2 is (n + 3)//4
                    return q + floordiv(x + k * (r - _combine([(m, 1)])), k * rhs)
        by = gcd(rhs, *(c for _, c in _terms(r)))
        return q + _func("floordiv", _combine([(m, c // by) for m, c in _terms(r)]), rhs // by)
    exact = _divide(lhs, rhs)
    if exact is not None:
        return exact
    shared = _shared([*_terms(lhs), *rhs.terms])
    if not shared:
        return _func("floordiv", lhs, rhs)
    return floordiv(_without(lhs, shared), _without(rhs, shared))


def _without(d: DimLike, factors: Sequence[Atom]) -> DimLike:
    """The quotient by ``factors``, which every term has."""
    terms: list[tuple[Monomial, int]] = []
    for m, c in _terms(d):
        rest = list(m)
        for a in factors:
            rest.remove(a)
        terms.append((tuple(rest), c))
    return _combine(terms)


def _shared(terms: Sequence[tuple[Monomial, int]]) -> list[Atom]:
    """The names and atoms that are factors of all terms."""
    shared = list(terms[0][0])
    for monomial, _ in terms[1:]:
        left, both = list(monomial), []
        for a in shared:
            if a in left:
                left.remove(a)
                both.append(a)
        shared = both
    return shared


def _divide(lhs: DimLike, rhs: Dim) -> DimLike | None:
    """The exact quotient of two polynomials, or None (long division on leading terms)."""
    quotient: list[tuple[Monomial, int]] = []
    rest: DimLike = lhs
    lead, lc = rhs.terms[0]
    for _ in range(64):
        if rest == 0:
            return _combine(quotient)
        monomial, c = _terms(rest)[0]
        left = list(monomial)
        for a in lead:
            if a not in left:
                return None
            left.remove(a)
        if c % lc:
            return None
        step: list[tuple[Monomial, int]] = [(tuple(left), c // lc)]
        quotient += step
        rest = rest - rhs * _combine(step)
    return None


def mod(lhs: DimLike, rhs: DimLike) -> DimLike:
    """``lhs % rhs``; 0 where ``rhs`` divides ``lhs`` for every binding."""
    if isinstance(rhs, int):
        if rhs <= 0:
            raise DimError(f"{lhs} % {rhs}: the modulus must be positive")
        _, r = _split(lhs, rhs)
        return r % rhs if isinstance(r, int) else _func("mod", r, rhs)
    return 0 if _divide(lhs, rhs) is not None else _func("mod", lhs, rhs)


def maximum(lhs: DimLike, rhs: DimLike) -> DimLike:
    """The larger of two dimensions, simplified where their order is known."""
    if less_equal(lhs, rhs):
        return rhs
    return lhs if less_equal(rhs, lhs) else _bounded("max", lhs, rhs)


def minimum(lhs: DimLike, rhs: DimLike) -> DimLike:
    """The smaller of two dimensions, simplified where their order is known."""
    if less_equal(lhs, rhs):
        return lhs
    return rhs if less_equal(rhs, lhs) else _bounded("min", lhs, rhs)


def _bounded(name: str, lhs: DimLike, rhs: DimLike) -> DimLike:
    """``min`` or ``max`` of two whose order is unknown, without what is beyond the other inside: sizes that follow from each
    other, such as those of concat and slice by turns, do not grow with every step.

    ``min(c, k*min(d, a) + b)`` is ``min(c, k*a + b)`` where ``c <= k*d + b``, and so for ``max``, and for ``-max`` in ``min``;
    ``min(c, k*a + b)`` is ``min(c, c*a + b)`` where k > c > 0 and neither a nor b is negative.
    """
    outer, beyond = (minimum, less_equal) if name == "min" else (maximum, lambda c, d: less_equal(d, c))
    for c, inner in ((lhs, rhs), (rhs, lhs)):
        for m, k in _terms(inner):
            match m:
                case (Func(name="min" | "max") as a,) if (a.name == name) == (k > 0):
                    rest = inner - _combine([(m, k)])
                    for bound, other in ((a.lhs, a.rhs), (a.rhs, a.lhs)):
                        if beyond(c, k * bound + rest):
                            return outer(c, k * other + rest)
        if name == "min" and isinstance(c, int) and _non_negative(inner) and any(k > c for _, k in _terms(inner)):
            return minimum(c, _combine([(m, min(k, c)) for m, k in _terms(inner)]))
    return _func(name, *sorted((lhs, rhs), key=str))


def _non_negative(d: DimLike) -> bool:
    """Whether ``d >= 0`` follows from every symbol being >= 0 (sufficient, not necessary)."""
    return all(c >= 0 and all(_atom_non_negative(a) for a in m) for m, c in _terms(d))


def _atom_non_negative(a: Atom) -> bool:
    if isinstance(a, str):
        return True
    if a.name == "mod":  # of its divisor's sign
        return _non_negative(a.rhs)
    if a.name == "max":
        return _non_negative(a.lhs) or _non_negative(a.rhs)
    return _non_negative(a.lhs) and _non_negative(a.rhs)


def _multiplied(d: DimLike) -> DimLike:
    """``k * (n // k)`` as n, where k divides n whatever the binding: s padded to a multiple of k."""
    for m, c in _terms(d):
        for a in m:
            if not isinstance(a, Func) or a.name != "floordiv" or not isinstance(a.rhs, int):
                continue
            if c % a.rhs == 0 and _divides(a.rhs, a.lhs):
                rest = list(m)
                rest.remove(a)
                return _multiplied(d - _combine([(m, c)]) + _combine([(tuple(rest), c // a.rhs)]) * a.lhs)
    return d


def _divides(k: int, d: DimLike) -> bool:
    """Whether ``d % k == 0`` follows from ``x % k`` being x, but for multiples of k."""
    for m, c in _terms(d):
        for a in m:
            if isinstance(a, Func) and a.name == "mod" and a.rhs == k:
                rest = list(m)
                rest.remove(a)
                return _divides(k, d - _combine([(m, c)]) + _combine([(tuple(rest), c)]) * a.lhs)
    return all(c % k == 0 for _, c in _terms(d))


def less_equal(lhs: DimLike, rhs: DimLike) -> bool | None:
    """Whether ``lhs <= rhs``: yes, no, or None where it depends on the binding."""
    if _never_negative(rhs - lhs):
        return True
    return False if _never_negative(lhs - rhs - 1) else None


def _never_negative(d: DimLike, _deep: int = 3) -> bool:
    """Whether ``d >= 0`` is proved: as it stands, or with a side of ``min`` or ``max`` in its place, or with each of both, or
    with the least that a quotient comes to."""
    if _non_negative(d) or _non_negative(_multiplied(d)):
        return True
    atoms = [(m[0], c) for m, c in _terms(d) if len(m) == 1 and isinstance(m[0], Func)]
    if not _deep or len(atoms) > _ATOMS:
        return False
    for a, c in atoms:
        rest = d - _combine([((a,), c)])
        if a.name in ("min", "max"):
            both = (a.name == "min") == (c > 0)  # c*min(x, y) is one of c*x and c*y, the smaller; c*max the larger
            if (all if both else any)(_never_negative(rest + c * x, _deep - 1) for x in (a.lhs, a.rhs)):
                return True
        elif a.name == "floordiv" and isinstance(k := a.rhs, int):  # k*(x // k) is x - k + 1 to x, and d a whole number
            least = k * rest + c * (a.lhs - (k - 1 if c > 0 else 0))
            if _never_negative(least + k - 1, _deep - 1):
                return True
    return False


def alone(d: DimLike) -> Func | None:
    """The atom that the dimension is and no more, if it is no symbol."""
    match d:
        case Dim(terms=(((Func() as atom,), 1),)):
            return atom
    return None


def equal(lhs: DimLike, rhs: DimLike) -> bool | None:
    """Whether ``lhs == rhs``: yes, no, or None where it depends on the binding."""
    d = lhs - rhs
    if isinstance(d, int):
        return d == 0
    return False if _non_negative(d - 1) or _non_negative(-d - 1) else None


def span(lo: DimLike, hi: DimLike) -> DimLike:
    """``hi - lo``; of bounds clamped to each other the shorter form: ``n - max(0, n - 4)`` is ``min(4, n)``."""
    if lo == hi:
        return 0
    for d in (lo, hi):
        a = alone(d)
        if a is not None and a.name in ("min", "max"):
            parts = [span(x, hi) if d is lo else span(lo, x) for x in (a.lhs, a.rhs)]
            return (minimum if (a.name == "max") == (d is lo) else maximum)(*parts)
    return hi - lo


_FUNCS: dict[str, Callable[[DimLike, DimLike], DimLike]] = {
    "floordiv": floordiv, "mod": mod, "max": maximum, "min": minimum,
}  # fmt: skip


def substitute(d: DimLike, env: Mapping[str, DimLike]) -> DimLike:
    """``d`` with the symbols that ``env`` names replaced."""
    if not isinstance(d, Dim):
        return d
    total: DimLike = 0
    for monomial, c in d.terms:
        term: DimLike = c
        for a in monomial:
            if isinstance(a, str):
                term = term * env.get(a, symbol(a))
            else:
                term = term * _FUNCS[a.name](substitute(a.lhs, env), substitute(a.rhs, env))
        total = total + term
    return total


def evaluate_dim(d: DimLike, env: Mapping[str, int]) -> int:
    """``d`` as an integer under a complete binding."""
    value = substitute(d, env)
    if isinstance(value, Dim):
        missing = [s for s in value.symbols if s not in env]
        raise DimError(f"dimension {d} needs a binding of {', '.join(missing)}")
    return value
