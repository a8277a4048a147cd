"""What is required of dimensions: decided, refused, or recorded as a check that is made at run time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from .dims import Dim, DimLike, alone, equal, less_equal, maximum
from .errors import DimError

Check = tuple[DimLike, DimLike]
_checks: ContextVar[list[Check] | None] = ContextVar("checks", default=None)


@contextlib.contextmanager
def collect_checks() -> Iterator[list[Check]]:
    """Collects what :func:`require_equal` could not decide, as pairs that must be equal at run time."""
    found: list[Check] = []
    token = _checks.set(found)
    try:
        yield found
    finally:
        _checks.reset(token)


def require_equal(lhs: DimLike, rhs: DimLike, what: str) -> DimLike:
    """Returns the common dimension; raises DimError if they differ; records an unknown as a runtime check.

    Of two sides that may be equal the simpler (a constant, then the shorter) is returned.
    """
    answer = equal(lhs, rhs)
    if answer is False:
        raise DimError(f"{what}: {lhs} is not {rhs}")
    if answer is None:
        found = _checks.get()
        if found is not None and (lhs, rhs) not in found:
            found.append((lhs, rhs))
    return min((lhs, rhs), key=lambda d: (isinstance(d, Dim), len(str(d))))


def require_at_most(lhs: DimLike, rhs: DimLike, what: str) -> None:
    """Raises DimError if ``lhs`` is larger than ``rhs``; records an unknown as the check ``max(lhs, rhs) == rhs``."""
    answer = less_equal(lhs, rhs)
    if answer is False:
        raise DimError(f"{what}: {lhs} is more than {rhs}")
    if answer is None:
        require_equal(maximum(lhs, rhs), rhs, what)


def check_text(check: Check) -> str:
    """A check in words: ``b == 4``, ``n <= 64``."""
    lhs, rhs = check
    a = alone(lhs)
    if a is not None and a.name == "max" and rhs in (a.lhs, a.rhs):
        return f"{a.rhs if a.lhs == rhs else a.lhs} <= {rhs}"
    return f"{lhs} == {rhs}"
