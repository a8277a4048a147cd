"""Single values that a caller gives: taken for what they are, or refused by name, before anything is done with them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np

from .errors import InputError


def integer(name: str, x: Any, least: int = 0, most: int | None = None) -> int:
    """``x`` as an int from ``least`` to ``most``. Raises InputError: numbers with a fraction, texts and truth values are
    none."""
    try:
        n = None if isinstance(x, (bool, np.bool_)) else operator.index(x)
    except TypeError:
        n = None
    if n is None or n < least or (most is not None and n > most):
        limit = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} is {_shown(x)}; it must be a whole number, {limit}")
    return n


def number(name: str, x: Any, want: str = "a finite number") -> float:
    """``x`` as a finite float. Raises InputError."""
    try:
        value = float(x) if isinstance(x, Real) and not isinstance(x, (bool, np.bool_)) else math.nan
    except OverflowError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name} is {_shown(x)}; it must be {want}")
    return value


def texts(name: str, values: Iterable[Any]) -> list[str]:
    """Texts, none with half a surrogate pair, which no file and no tokenizer holds. Raises InputError."""
    found = []
    for x in values:
        if not isinstance(x, str):
            raise InputError(f"{name} must be text, not {type(x).__name__}")
        try:
            x.encode()
        except UnicodeEncodeError as e:
            raise InputError(f"{name} holds {x[e.start]!r}, which is half a character: text must be Unicode") from None
        found.append(str(x))
    return found


def listed(name: str, values: Any) -> list[Any]:
    """The items of a list, an array or a generator, which is read once. Raises InputError for what has none: a text's
    characters, a mapping's keys and a file's bytes are no items."""
    if isinstance(values, (str, bytes, bytearray, dict)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) < 1:
        raise InputError(f"{name} must be a list, not {type(values).__name__}")
    return list(values)


def _shown(x: Any) -> str:
    """A value in a message, if it is long, its beginning."""
    text = repr(x)
    return text if len(text) <= 80 else f"{text[:60]}…"
