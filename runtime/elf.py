"""What a shared library exports, read without loading it: loading runs its code, and a foreign one may end the process."""

from __future__ import annotations

import struct
from pathlib import Path

_DYNSYM = 11


def exports(path: Path, symbol: str) -> bool:
    """Whether the 64-bit little-endian ELF file at ``path`` defines ``symbol`` for others. A damaged or other file does not."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return False
    try:
        (table,) = struct.unpack_from("<Q", data, 40)
        size, count = struct.unpack_from("<HH", data, 58)
        sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
        for _, kind, _, _, at, length, link, _, _, each in sections:
            if kind != _DYNSYM or each < 24:
                continue
            names = data[sections[link][4] : sections[link][4] + sections[link][5]]
            for i in range(at, at + length, each):
                name, _, _, section = struct.unpack_from("<IBBH", data, i)
                if section and names[name : names.index(b"\0", name)] == symbol.encode():
                    return True
    except (struct.error, IndexError, ValueError, OverflowError):
        pass
    return False
