"""Arrays that a caller gives, against the signature that they must fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import InputError
from .manifest import TensorSpec, extents


def fit(what: str, specs: Sequence[TensorSpec], arrays: Mapping[str, Any], sizes: Mapping[str, int]) -> list[np.ndarray]:
    """``arrays`` in the order of ``specs``, with their element types (converted only if nothing can be lost).

    ``sizes`` are symbols whose values are known; the others are bound by the arrays' axes. Raises InputError, beginning with
    ``what``, for arrays that are missing, unknown or of another type or shape.
    """
    wanted = [s.name for s in specs]
    if sorted(wanted) != sorted(arrays):
        raise InputError(f"{what} takes {', '.join(wanted) or 'no inputs'}; given: {', '.join(arrays) or 'none'}")
    symbols = dict(sizes)
    values = [_fit(spec, np.asarray(arrays[spec.name]), symbols) for spec in specs]
    for spec, x in zip(specs, values):
        try:
            want = extents(spec.shape, symbols)
        except KeyError:  # a symbol that no input's axis is: the library checks those
            continue
        if x.shape != want:
            raise InputError(f"input {spec.name} has shape {list(x.shape)}; beside the others it must be {list(want)}")
    return values


def _fit(spec: TensorSpec, x: np.ndarray, symbols: dict[str, int]) -> np.ndarray:
    """``x`` with the element type of ``spec``; binds the symbols that are axes."""
    try:
        x = x.astype(spec.dtype, casting="safe")
    except TypeError:
        raise InputError(f"input {spec.name} must be {spec.dtype}, not {x.dtype}") from None
    if x.ndim != len(spec.shape):
        raise InputError(f"input {spec.name} must have the axes {list(spec.shape)}, not {x.ndim} of them")
    for d, n in zip(spec.shape, x.shape):
        if isinstance(d, str) and d.isidentifier():
            symbols.setdefault(d, n)
    return x
