"""What the headers of files say of their sizes and rates."""

from __future__ import annotations

from typing import BinaryIO, Literal

_RIFF_UNKNOWN = 0x7FFFF000
"""From here on, the length in the header is what programs write that do not know it yet."""
_LARGE = (b"RF64", b"BW64")
"""WAV of more than 4 GiB."""
_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_MP3 = tuple(bytes((0xFF, n)) for n in (0xE2, 0xE3, 0xF2, 0xF3, 0xFA, 0xFB))
"""What a frame of MPEG's third layer begins with."""
_HEAD = 27 + 255
"""Bytes by which the size of a part is known; a page of Ogg has the most."""
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
"""What MP4 and MOV begin with."""


def animated(head: bytes) -> bool:
    """Whether a file that begins so is of a kind that holds one picture or several."""
    return head.startswith(b"GIF8") or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")


def stated_size(file: BinaryIO, size: int) -> int:
    """How many bytes a file of ``size`` says it has, by the sizes of its outermost parts; 0 where it does not say."""
    file.seek(0)
    head = file.read(_HEAD)
    if head.startswith((b"RIFF", b"FORM")):  # WAV, AVI, WebP; AIFF
        n = int.from_bytes(head[4:8], "little" if head.startswith(b"RIFF") else "big")
        known = size < n < _RIFF_UNKNOWN
        return n + 8 if known else _samples_end(file, head, size)  # there are programs that count the 8 in
    if head.startswith(_LARGE) and head[12:16] == b"ds64":
        n = int.from_bytes(head[20:28], "little")
        return 0 if n <= size or n >= 1 << 63 else n + 8
    if head.startswith(_W64):
        n = int.from_bytes(head[16:24], "little")
        return 0 if n <= size or n >= 1 << 62 else n
    if head.startswith((b"ID3", *_MP3)):
        at = 0
        while (tag := _tag(head)) and at < size:
            at += tag
            file.seek(at)
            head = file.read(_HEAD)
        n = _mpeg_bytes(head)
        return at + n if n else 0
    part = _box if head[4:8] in _BOXES else _page if head.startswith(b"OggS") else _element
    at = 0
    if head.startswith(b"caff"):
        part, at = _piece, 8
    for _ in range(100_000):
        if at + 8 > size:
            return at
        file.seek(at)
        n = part(file.read(_HEAD))
        if n <= 0:
            return 0 if n == 0 else at
        at += n
    return 0


def _samples_end(file: BinaryIO, head: bytes, size: int) -> int:
    """Where the samples of a WAV or AIFF end whose outer size says nothing, by the size of that part; 0: it does not say."""
    order: Literal["little", "big"] = "little" if head.startswith(b"RIFF") else "big"
    at = 12
    for _ in range(1000 if head[8:12] in (b"WAVE", b"AIFF", b"AIFC") else 0):
        file.seek(at)
        part = file.read(8)
        n = int.from_bytes(part[4:], order)
        if part[:4] in (b"data", b"SSND"):
            return at + 8 + n if size - at - 8 < n < _RIFF_UNKNOWN else 0
        if len(part) < 8:
            return 0
        at += 8 + n + n % 2
    return 0


def _tag(head: bytes) -> int:
    """The bytes of a tag of ID3 that begins so; 0: it is none."""
    sevens = [n & 127 for n in head[6:10]]
    return 10 + sum(n << 7 * (3 - i) for i, n in enumerate(sevens)) if head.startswith(b"ID3") else 0


def _mpeg_bytes(frame: bytes) -> int:
    """The bytes of an MP3 from its first frame on, if that is the one which tells them; 0: it is not."""
    at = max(frame.find(b"Xing", 0, 64), frame.find(b"Info", 0, 64))
    if not frame.startswith(_MP3) or at < 0 or not frame[at + 7] & 2:  # the second of its fields is there
        return 0
    at += 12 if frame[at + 7] & 1 else 8
    return int.from_bytes(frame[at : at + 4], "big")


def _page(head: bytes) -> int:
    """As :func:`_box`, of an Ogg file."""
    return 27 + head[26] + sum(head[27 : 27 + head[26]]) if len(head) > 26 and head.startswith(b"OggS") else -1


def _piece(head: bytes) -> int:
    """As :func:`_box`, of a CAF; samples that go on to the end have a size of -1."""
    n = int.from_bytes(head[4:12], "big", signed=True)
    return 0 if n == -1 else 12 + n if n >= 0 and head[:4].isalnum() else -1


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
    tag, channels, block, bits, valid = (int.from_bytes(head[at + i : at + i + 2], "little") for i in (8, 10, 20, 22, 26))
    if tag == 0xFFFE and valid and (valid + 7) // 8 != (bits + 7) // 8:
        return f"holds samples of {valid} bits in {bits}"
    room = block // channels if channels else 0  # whole numbers and floats; a block of other kinds is one of many samples
    if tag in (1, 3, 0xFFFE) and room > (bits + 7) // 8:
        return f"holds samples of {bits} bits in {8 * room}"
    return None
