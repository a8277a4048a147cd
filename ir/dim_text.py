"""Reads dimensions from text."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from .dims import DimLike, floordiv, maximum, minimum, mod, symbol
from .errors import DimError


def parse_dim(text: str) -> DimLike:
    """Reads what ``str`` of a dimension wrote: ``+ - * // %``, ``max(a, b)``, ``min(a, b)``, integers and names."""
    try:
        return _from_ast(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise DimError(f"{text[:200]!r} is not a dimension expression") from None


_SIGNS: dict[type[ast.operator], Callable[[Any, Any], DimLike]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: floordiv, ast.Mod: mod,
}  # fmt: skip


def _from_ast(node: ast.expr) -> DimLike:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_from_ast(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _SIGNS:
            return _SIGNS[type(op)](_from_ast(left), _from_ast(right))
        case ast.Call(func=ast.Name(id="max" | "min" as name), args=[x, y]):
            return {"max": maximum, "min": minimum}[name](_from_ast(x), _from_ast(y))
    raise ValueError(ast.dump(node))


__all__ = ["parse_dim"]
