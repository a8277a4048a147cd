"""The table by which SentencePiece normalizes texts: whether one from a file can be followed without leaving it."""

from __future__ import annotations

import numpy as np


def check_charsmap(data: bytes) -> None:
    """Raises ValueError, which says why, unless every text can be looked up in ``data``.

    The layout is that of SentencePiece's ``precompiled_charsmap``: the size of a double array in bytes (u32), its units
    (u32 each), then strings that end in a zero byte. Bits 10 to 30 of a unit are the offset to its children (times 256
    where bit 9 is set), bit 8 says that one of them is a leaf, bits 0 to 7 are the byte that leads to it; a leaf has bit
    31, and holds the place of a string.
    """
    if len(data) < 4:
        raise ValueError(f"it has {len(data)} bytes, too few for its size")
    size = int.from_bytes(data[:4], "little")
    if size % 4 or not 0 < size <= len(data) - 4:
        raise ValueError(f"its array would take {size:,} of {len(data) - 4:,} bytes")
    units, strings = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64), data[4 + size :]
    try:
        strings.decode()
    except UnicodeDecodeError:
        raise ValueError("its strings are no UTF-8") from None
    if not strings.endswith(b"\0"):
        raise ValueError("its last string has no end")

    def children(nodes: np.ndarray) -> np.ndarray:
        return nodes ^ (units[nodes] >> 10 << ((units[nodes] & 512) >> 6))

    known = np.zeros(len(units), bool)
    at = np.array([0])
    letters = np.arange(1, 256)
    while at.size:
        known[at] = True
        below = children(at)
        if (below >= len(units)).any() or (below | 255).max() >= len(units):
            raise ValueError("a node's children lie outside its array")
        leaves = below[units[at] & 256 != 0]
        places = units[leaves] & 2**31 - 1
        if (places >= len(strings)).any():
            raise ValueError("a leaf's string lies outside it")
        if any(strings[p] & 0xC0 == 0x80 for p in places.tolist()):
            raise ValueError("a leaf's string begins inside a letter")
        found = (below[:, None] ^ letters).reshape(-1)
        found = found[units[found] & (2**31 | 255) == np.tile(letters, len(below))]
        at = np.unique(found[~known[found]])
