"""Sizes as a plan has them: TVM's expressions over integers become dimensions, and these trees of JSON.

A tree is a whole number, the name of a symbol, or ``[operator, left, right]`` with one of ``+ - * // % min max``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm import tirx
from wasat.ir import Dim, DimLike, IRError
from wasat.ir.dims import Func, floordiv, maximum, minimum, mod

Tree = Any

_BINARY: dict[str, Callable[[DimLike, DimLike], DimLike]] = {
    "Add": lambda a, b: a + b, "Sub": lambda a, b: a - b, "Mul": lambda a, b: a * b, "FloorDiv": floordiv, "FloorMod": mod,
    "Div": floordiv, "Mod": mod,  # of sizes, which are not negative
    "Max": maximum, "Min": minimum,
}  # fmt: skip


def size_of(e: Any, symbols: Mapping[Any, DimLike]) -> DimLike:
    """The dimension that an integer expression is, with its variables as ``symbols`` say."""
    if isinstance(e, int):
        return e
    if isinstance(e, tirx.IntImm):
        return int(e.value)
    kind = type(e).__name__
    if kind == "Var":
        if e in symbols:
            return symbols[e]
        raise IRError(f"a launch plan cannot say what {e.name} is before the program runs: it depends on data")
    if kind == "Cast":
        return size_of(e.value, symbols)
    if kind in _BINARY:
        return _BINARY[kind](size_of(e.a, symbols), size_of(e.b, symbols))
    if kind in ("LShift", "RShift") and isinstance(by := size_of(e.b, symbols), int) and 0 <= by < 53:
        of = size_of(e.a, symbols)
        return of * 2**by if kind == "LShift" else floordiv(of, 2**by)
    raise IRError(f"a launch plan has no expression for {e}: sizes are made with + - * // % min max")


def tree(d: DimLike) -> Tree:
    """A dimension as JSON."""
    if not isinstance(d, Dim):
        return int(d)
    total: Tree = None
    for monomial, c in sorted(d.terms, key=lambda t: t[1] < 0):  # what is added first
        term: Tree = None
        for a in monomial:
            x = _atom(a) if isinstance(a, Func) else a
            term = x if term is None else ["*", term, x]
        scale = abs(c) if total is not None else c
        scaled = scale if term is None else term if scale == 1 else ["*", scale, term]
        total = scaled if total is None else ["-" if c < 0 else "+", total, scaled]
    return total


def _atom(f: Func) -> Tree:
    return [{"floordiv": "//", "mod": "%"}.get(f.name, f.name), tree(f.lhs), tree(f.rhs)]
