"""What the headers of files say of their sizes and rates."""

from __future__ import annotations

from typing import BinaryIO

_RIFF_UNKNOWN = 0x7FFFF000
"""From here on, the length in the header is what programs write that do not know it yet."""
_LARGE = (b"RF64", b"BW64")
"""WAV of more than 4 GiB."""
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
"""What MP4 and MOV begin with."""


def animated(head: bytes) -> bool:
    """Whether a file that begins so is of a kind that holds one picture or several."""
    return head.startswith(b"GIF8") or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")


def stated_size(file: BinaryIO, size: int) -> int:
    """How many bytes a file of ``size`` says it has, by the sizes of its outermost parts; 0 where it does not say."""
    file.seek(0)
    head = file.read(16)
    if head.startswith((b"RIFF", b"FORM")):  # WAV, AVI, WebP; AIFF
        n = int.from_bytes(head[4:8], "little" if head.startswith(b"RIFF") else "big")
        return 0 if n <= size or n >= _RIFF_UNKNOWN else n + 8  # there are programs that count the 8 in
    if head.startswith(_LARGE) and head[12:16] == b"ds64":
        file.seek(20)
        n = int.from_bytes(file.read(8), "little")
        return 0 if n <= size or n >= 1 << 63 else n + 8
    part = _box if head[4:8] in _BOXES else _element
    at = 0
    for _ in range(100_000):
        if at + 8 > size:
            return at
        file.seek(at)
        n = part(file.read(16))
        if n <= 0:
            return 0 if n == 0 else at
        at += n
    return 0


def _box(head: bytes) -> int:
    """The size of a part of an MP4 or MOV that begins so; 0: it goes on to the end; -1: this is no part."""
    n = int.from_bytes(head[:4], "big")
    n = int.from_bytes(head[8:16], "big") if n == 1 else n
    return n if head[4:8].isalnum() and (n == 0 or n >= 8) else -1


def _element(head: bytes) -> int:
    """As :func:`_box`, of a Matroska file (WebM)."""
    if not head.startswith((b"\x1aE\xdf\xa3", b"\x18S\x80g")) or not head[4]:  # the header and the segment
        return -1
    width = 9 - head[4].bit_length()
    unknown = (1 << 7 * width) - 1
    n = int.from_bytes(head[4 : 4 + width], "big") & unknown
    return 0 if n == unknown else 4 + width + n


def rate_of_wav(head: bytes) -> int | None:
    """Samples per second, by the header."""
    at = head.find(b"fmt ", 12)
    return int.from_bytes(head[at + 12 : at + 16], "little") if head[8:12] == b"WAVE" and at > 0 else None


def trouble_of_wav(head: bytes) -> str | None:
    """What FFmpeg would read as other samples than a WAV that begins so holds."""
    if head.startswith(b"RIFX"):
        return "holds its numbers from the highest byte on (RIFX)"
    at = head.find(b"fmt ", 12)
    if not head.startswith((b"RIFF", *_LARGE)) or head[8:12] != b"WAVE" or at < 0:
        return None
    tag, bits, valid = (int.from_bytes(head[at + i : at + i + 2], "little") for i in (8, 22, 26))
    if tag == 0xFFFE and valid and (valid + 7) // 8 != (bits + 7) // 8:
        return f"holds samples of {valid} bits in {bits}"
    return None
