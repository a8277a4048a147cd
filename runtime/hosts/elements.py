"""Numbers as they lie in a device's memory, where some types are stored as others."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import InputError

_RAW = {"bfloat16": "uint16"}


def _raw(dtype: str, storage: Mapping[str, str]) -> str:
    """The type of the array that holds elements of ``dtype``: where floats are stored as integers, these are their bits."""
    if dtype == "float16" and storage.get(dtype, dtype) != dtype:
        return "uint16"
    return _RAW.get(dtype, dtype)


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return np.dtype(_RAW.get(dtype, dtype)).itemsize


def padded(nbytes: int) -> int:
    """Memory is taken in words of 4 bytes, at least one."""
    return max(-(-nbytes // 4) * 4, 4)


def stored(x: np.ndarray, dtype: str, storage: Mapping[str, str], what: str = "an array") -> np.ndarray:
    """The bytes of an array of ``dtype``. Raises InputError for integers that the stored type does not hold."""
    raw = _raw(dtype, storage)
    if x.dtype.name != raw and np.dtype(raw).kind == "u" and x.dtype.kind not in "iu":
        x = x.view(raw)
    to = storage.get(dtype, raw)
    if x.dtype.name != to:
        if x.dtype.kind in "iu" and x.dtype.itemsize > np.dtype(to).itemsize and x.size:
            low, high = np.iinfo(to).min, np.iinfo(to).max
            if int(x.min()) < low or int(x.max()) > high:
                worst = int(x.min()) if int(x.min()) < low else int(x.max())
                raise InputError(f"{what} holds {worst}; this device keeps {dtype} in {to}, {low} .. {high}")
        x = x.astype(to)
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    missing = padded(flat.size) - flat.size
    return np.concatenate([flat, np.zeros(missing, np.uint8)]) if missing else flat


def loaded(memory: np.ndarray, dtype: str, shape: Sequence[int], storage: Mapping[str, str]) -> np.ndarray:
    """The array whose bytes ``memory`` begins with."""
    raw = _raw(dtype, storage)
    kept = np.dtype(storage.get(dtype, raw))
    count = int(np.prod(shape, dtype=np.int64))
    x = memory[: count * kept.itemsize].view(kept)
    found = x if kept.name == raw else x != 0 if raw == "bool" else x.astype(raw)
    with contextlib.suppress(TypeError):  # a type that NumPy lacks: its bits
        found = found.view(dtype)
    return found.reshape(shape)
