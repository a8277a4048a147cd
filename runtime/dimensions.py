"""Sizes as a manifest has them: numbers, or expressions over symbols, read without running them."""

from __future__ import annotations

import ast
import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from .errors import AGAIN, ArtifactError

Extent = int | str
"""A dimension: a number, or an expression over symbols (``b`` rows, ``s`` new tokens, ``c`` capacity of growing states)."""

_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[[int, int], int]] = {"max": max, "min": min}


_LONGEST = 10_000
"""Characters of a dimension: what Python's own parser and a walk over its tree have room for."""


@lru_cache(4096)
def parsed(text: str) -> ast.expr:
    try:
        tree = ast.parse(text, mode="eval").body if len(text) <= _LONGEST else None
        if tree is not None and not any(_by_zero(e) for e in ast.walk(tree)):
            _known(tree)
            return tree
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise ArtifactError(f"manifest.json: {text[:80]!r} is no dimension; {AGAIN}")


def _by_zero(e: ast.AST) -> bool:
    return (
        isinstance(e, ast.BinOp) and isinstance(e.op, (ast.FloorDiv, ast.Mod))
        and isinstance(e.right, ast.Constant) and e.right.value == 0
    )  # fmt: skip


def _known(e: ast.expr) -> None:
    """Evaluates ``e`` with all symbols 1: what cannot be evaluated is no dimension."""
    names = {x.id: 1 for x in ast.walk(e) if isinstance(x, ast.Name)}
    with contextlib.suppress(ZeroDivisionError):  # by a size, which is for the arrays to say
        _evaluate(e, names)


def extent(d: Extent, symbols: Mapping[str, int]) -> int:
    """The value of a dimension. Raises KeyError for a symbol that is not bound."""
    return d if isinstance(d, int) else _evaluate(parsed(d), symbols)


def _evaluate(e: ast.expr, symbols: Mapping[str, int]) -> int:
    match e:
        case ast.Constant(value=int(n)) if not isinstance(n, bool):
            return n
        case ast.Name(id=name):
            return symbols[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(left, symbols), _evaluate(right, symbols))
        case ast.UnaryOp(op=ast.USub(), operand=x):
            return -_evaluate(x, symbols)
        case ast.Call(func=ast.Name(id=name), args=[left, right]) if name in FUNCTIONS:
            return FUNCTIONS[name](_evaluate(left, symbols), _evaluate(right, symbols))
    raise ArtifactError(f"manifest.json: {ast.unparse(e)!r} is no dimension; {AGAIN}")


def solved(d: Extent, size: int, symbols: Mapping[str, int]) -> dict[str, int]:
    """The one unknown symbol of a dimension, from its value, where the dimension is linear in it; else nothing."""
    names = {e.id for e in ast.walk(parsed(d)) if isinstance(e, ast.Name)} if isinstance(d, str) else set()
    unknown = names - symbols.keys() - FUNCTIONS.keys()
    if len(unknown) != 1:
        return {}
    [name] = unknown
    first, second = (extent(d, {**symbols, name: n}) for n in (0, 1))
    n, rest = divmod(size - first, second - first) if second != first else (0, 1)
    return {} if rest or n < 0 or extent(d, {**symbols, name: n}) != size else {name: n}


def extents(shape: Sequence[Extent], symbols: Mapping[str, int]) -> tuple[int, ...]:
    """The values of all dimensions of a shape."""
    return tuple(extent(d, symbols) for d in shape)
