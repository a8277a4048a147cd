"""Numbers as they lie in a device's memory, where some types are stored as others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import InputError

_RAW = {"bfloat16": "uint16"}


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return np.dtype(_RAW.get(dtype, dtype)).itemsize


def padded(nbytes: int) -> int:
    """Memory is taken in words of 4 bytes, at least one."""
    return max(-(-nbytes // 4) * 4, 4)


def stored(x: np.ndarray, dtype: str, storage: Mapping[str, str], what: str = "an array") -> np.ndarray:
    """The bytes of an array of ``dtype``. Raises InputError for integers that the stored type does not hold."""
    if dtype in _RAW:
        x = x.view(_RAW[dtype])
    to = storage.get(dtype, _RAW.get(dtype, dtype))
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
    raw = _RAW.get(dtype, dtype)
    kept = np.dtype(storage.get(dtype, raw))
    count = int(np.prod(shape, dtype=np.int64))
    x = memory[: count * kept.itemsize].view(kept)
    return (x if kept.name == raw else x != 0 if raw == "bool" else x.astype(raw)).reshape(shape)
