"""Symbols bound from the sizes that arrays have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .dims import DimLike, substitute, symbols_of
from .errors import DimError


def solve(equations: Iterable[tuple[DimLike, int, str]], env: Mapping[str, int] | None = None) -> dict[str, int]:
    """Binds symbols from ``(dimension, actual size, where)`` triples.

    Bare symbols bind directly; a polynomial that is linear in one remaining unknown is solved. Raises DimError where sizes
    contradict each other. Dimensions that stay undetermined are left out of the result.
    """
    found: dict[str, int] = dict(env or {})
    pending = list(equations)
    while True:
        rest = []
        for d, size, where in pending:
            left = substitute(d, found) - size
            if isinstance(left, int):
                if left:
                    given = ", ".join(f"{s}={found[s]}" for s in symbols_of([d]) if s in found)
                    raise DimError(f"{where}: size is {size}, expected {d}" + (f" with {given}" if given else ""))
                continue
            const = sum(c for m, c in left.terms if not m)
            match [(m, c) for m, c in left.terms if m]:
                case [((str() as unknown,), factor)]:
                    value, remainder = divmod(-const, factor)
                    if remainder or value < 0:
                        raise DimError(f"{where}: size is {size}, and no {unknown} makes {d} that")
                    found[unknown] = value
                case _:
                    rest.append((d, size, where))
        if len(rest) == len(pending):
            return found
        pending = rest
