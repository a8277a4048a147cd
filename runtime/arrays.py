"""Arrays that a caller gives, against the signature that they must fit."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .dimensions import extent, extents, solved
from .errors import InputError
from .interface import TensorSpec
from .manifest import Check, Indices


def fit(
    what: str, specs: Sequence[TensorSpec], arrays: Mapping[str, Any], sizes: Mapping[str, int], checks: Sequence[Check] = (),
    indices: Sequence[Indices] = (),
) -> list[np.ndarray]:  # fmt: skip
    """``arrays`` in the order of ``specs``, with their element types (converted only if nothing can be lost).

    ``sizes`` are symbols whose values are known; the others are bound by the arrays' axes. Raises InputError, beginning with
    ``what``, for arrays that are missing, unknown or of another type or shape, for sizes that fail ``checks``, and
    for elements that are no ``indices``.
    """
    wanted = [s.name for s in specs]
    if sorted(wanted) != sorted(arrays):
        raise InputError(f"{what} takes {', '.join(wanted) or 'no inputs'}; given: {', '.join(arrays) or 'none'}")
    values = [_fit(spec, _array(spec, arrays[spec.name])) for spec in specs]
    symbols = bound(specs, values, sizes)
    for spec, x in zip(specs, values):
        try:
            want = extents(spec.shape, symbols)
        except (KeyError, ZeroDivisionError):  # a symbol that no input's axis is: the library checks those
            continue
        if x.shape != want:
            raise InputError(f"input {spec.name} has shape {list(x.shape)}; beside the others it must be {list(want)}")
    check_sizes(what, checks, symbols)
    by_name = {spec.name: x for spec, x in zip(specs, values)}
    for i in indices:
        check_indices(i, by_name[i.input], symbols)
    return values


def bound(specs: Sequence[TensorSpec], arrays: Sequence[np.ndarray], sizes: Mapping[str, int]) -> dict[str, int]:
    """``sizes``, and the symbols that the axes of ``arrays`` tell: where they are axes, and where they can be solved for."""
    symbols = dict(sizes)
    axes = [(d, n) for spec, x in zip(specs, arrays) for d, n in zip(spec.shape, x.shape) if isinstance(d, str)]
    for d, n in axes:
        if d.isidentifier():
            symbols.setdefault(d, n)
    for d, n in axes:
        if not d.isidentifier():
            with contextlib.suppress(ZeroDivisionError):
                symbols |= solved(d, n, symbols)
    return symbols


def known(spec: Indices, symbols: Mapping[str, int]) -> bool:
    """Whether ``symbols`` say what the bounds of the indices are."""
    with contextlib.suppress(KeyError):
        for end in (spec.low, spec.high):
            extent(end, symbols)
        return True
    return False


def check_indices(spec: Indices, x: np.ndarray, symbols: Mapping[str, int]) -> None:
    """Raises InputError for an element that is outside what it indexes."""
    try:
        low, high = extent(spec.low, symbols), extent(spec.high, symbols)
    except KeyError as e:
        raise InputError(f"input {spec.input} holds indices up to {spec.high}, and nothing says what {e.args[0]} is") from None
    if x.size and not (low <= int(x.min()) and int(x.max()) < high):
        first = next(i for i in map(int, x.ravel()) if not low <= i < high)
        raise InputError(f"input {spec.input} holds the index {first}, outside {low} .. {high - 1}: {spec.where}")


def check_sizes(what: str, checks: Sequence[Check], symbols: Mapping[str, int]) -> None:
    """Raises InputError for the first equation that the sizes do not satisfy, or leave open."""
    for check in checks:
        try:
            if extent(check.left, symbols) == extent(check.right, symbols):
                continue
        except (KeyError, ZeroDivisionError):
            pass
        given = ", ".join(f"{k}={v}" for k, v in symbols.items())
        raise InputError(f"{what} needs {check.needs}, which {given} does not satisfy: {check.where}")


def _array(spec: TensorSpec, x: Any) -> np.ndarray:
    try:
        return np.asarray(x)
    except (ValueError, TypeError, OverflowError) as e:
        raise InputError(f"input {spec.name} is no array ({e})") from None


def _fit(spec: TensorSpec, x: np.ndarray) -> np.ndarray:
    """``x`` with the element type and as many axes as ``spec`` has."""
    try:
        x = x.astype(spec.dtype, casting="safe")
    except TypeError:
        raise InputError(f"input {spec.name} must be {spec.dtype}, not {x.dtype}") from None
    if x.ndim != len(spec.shape):
        raise InputError(f"input {spec.name} must have the axes {list(spec.shape)}, not {x.ndim} of them")
    return x
