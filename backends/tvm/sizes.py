"""Dimensions as expressions of TVM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from wasat.ir.dims import Dim, DimLike

_FUNCTIONS = {"floordiv": tirx.floordiv, "mod": tirx.floormod, "max": tirx.max, "min": tirx.min}


def expression(d: DimLike, symbol: Callable[[str], Any]) -> Any:
    """A dimension as a TIR expression (int64); ``symbol`` says what a name stands for."""
    if not isinstance(d, Dim):
        return tirx.IntImm("int64", int(d))
    total: Any = None
    for monomial, c in d.terms:
        term: Any = None
        for a in monomial:
            x = symbol(a) if isinstance(a, str) else _FUNCTIONS[a.name](expression(a.lhs, symbol), expression(a.rhs, symbol))
            term = x if term is None else term * x
        scaled = tirx.IntImm("int64", c) if term is None else term if c == 1 else term * tirx.IntImm("int64", c)
        total = scaled if total is None else total + scaled
    return total
