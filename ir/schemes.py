"""Schemes in which weights are stored in blocks of a row: GGUF's formats, and a family of our own; each is one declaration.

An element is ``scale * code + offset``, all in f32, in that order. Codes are small integers (table lookups already made).
Each ``group`` of consecutive elements has its scale and offset; formats of super-blocks have them as an integer factor for each
group times one float for the block.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Bytes = np.ndarray  # u8[.., bytes of a block]


@dataclass(frozen=True)
class Parts:
    """What blocks hold: scales are ``scale * factors``, offsets ``offset * offset_factors``; no factors are ones."""

    codes: np.ndarray
    """i8 [.., block]."""
    scale: np.ndarray
    """f16 or f32 [.., 1]."""
    factors: np.ndarray | None = None
    """i8 [.., groups]."""
    offset: np.ndarray | None = None
    """f16 [.., 1]."""
    offset_factors: np.ndarray | None = None
    """i8 [.., groups], not negative."""

    @property
    def scales(self) -> np.ndarray:
        """f32 [.., groups]."""
        return _times(self.scale, self.factors)

    @property
    def offsets(self) -> np.ndarray | None:
        """f32 [.., groups]."""
        return None if self.offset is None else _times(self.offset, self.offset_factors)


@dataclass(frozen=True)
class Scheme:
    """One block format: ``block`` elements in ``size`` bytes, codes ``low`` to ``high``, a scale for each ``group``."""

    name: str
    block: int
    size: int
    group: int
    low: int
    high: int
    floats: tuple[int, ...]
    """Where in the block its f16 numbers stand: the scale, then the offset."""
    read: Callable[[Bytes], Parts]
    write: Callable[[Parts], Bytes] | None = None
    """The inverse of ``read``; None: such blocks come from files alone."""
    factors: tuple[int, int] | None = None
    """Least and greatest integer factor, where scales (and offsets) are such times the block's floats."""

    @property
    def bits(self) -> float:
        """Of a weight as it is stored, scales included."""
        return 8 * self.size / self.block

    @property
    def offset(self) -> bool:
        """Whether elements have an offset."""
        return len(self.floats) > 1

    def random(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Blocks of arbitrary codes whose elements have a size of about 1: u8[.., blocks, size] for a tensor of ``shape``."""
        blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // self.block, self.size), np.uint8)
        largest = max(abs(self.low), self.high) * (32 if self.factors else 1)
        for at in self.floats:
            floats = (rng.standard_normal((*blocks.shape[:-1], 1)) / largest).astype(np.float16)
            blocks[..., at : at + 2] = floats.view(np.uint8)
        if not self.floats:  # the scale is an exponent
            blocks[..., 0] = rng.integers(122, 127, blocks.shape[:-1])
        return blocks


def _times(x: np.ndarray, factors: np.ndarray | None) -> np.ndarray:
    wide = x.astype(np.float32, copy=False)
    return wide if factors is None else wide * factors.astype(np.float32)


def _f16(blocks: Bytes, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)


def _planes(raw: Bytes, width: int, bits: int) -> np.ndarray:
    """Fields of ``bits`` of each run of ``width`` bytes: all lowest fields of a run, then the next ones."""
    *lead, size = raw.shape  # of no blocks, too
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = (raw.reshape(*lead, size // width, 1, width) >> shifts) & np.uint8((1 << bits) - 1)
    return fields.reshape(*lead, size * 8 // bits)


def _in_planes(codes: np.ndarray, width: int, bits: int) -> Bytes:
    """The inverse of :func:`_planes`."""
    *lead, size = codes.shape
    fields = codes.view(np.uint8).reshape(*lead, size * bits // (8 * width), 8 // bits, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(fields << shifts, axis=-2).reshape(*lead, size * bits // 8)


def _bytes(x: np.ndarray) -> Bytes:
    return np.ascontiguousarray(x).view(np.uint8)


def _fifth_bits(blocks: Bytes, at: int) -> np.ndarray:
    return np.unpackbits(blocks[..., at : at + 4], axis=-1, bitorder="little") << 4


def _signed(codes: np.ndarray, zero: int = 0) -> np.ndarray:
    return codes.astype(np.int8) - np.int8(zero)


def _q4_1(b: Bytes) -> Parts:
    return Parts(_signed(_planes(b[..., 4:], 16, 4)), _f16(b, 0), offset=_f16(b, 2))


def _write_q4_1(p: Parts) -> Bytes:
    assert p.offset is not None
    return np.concatenate([_bytes(p.scale), _bytes(p.offset), _in_planes(p.codes, 16, 4)], -1)


def _q5_0(b: Bytes) -> Parts:
    return Parts(_signed(_planes(b[..., 6:], 16, 4) | _fifth_bits(b, 2), 16), _f16(b, 0))


def _fives(codes: np.ndarray) -> tuple[Bytes, Bytes]:
    """The fifth bits and the lower four of codes from 0 on."""
    return np.packbits(codes.view(np.uint8) >> 4, axis=-1, bitorder="little"), _in_planes(codes & 15, 16, 4)


def _write_q5_0(p: Parts) -> Bytes:
    return np.concatenate([_bytes(p.scale), *_fives(p.codes + np.int8(16))], -1)


def _q5_1(b: Bytes) -> Parts:
    return Parts(_signed(_planes(b[..., 8:], 16, 4) | _fifth_bits(b, 4)), _f16(b, 0), offset=_f16(b, 2))


def _write_q5_1(p: Parts) -> Bytes:
    assert p.offset is not None
    return np.concatenate([_bytes(p.scale), _bytes(p.offset), *_fives(p.codes)], -1)


def _q2_k(b: Bytes) -> Parts:
    codes = _planes(b[..., 16:80], 32, 2)
    return Parts(_signed(codes), _f16(b, 80), _signed(b[..., :16] & 15), -_f16(b, 82), _signed(b[..., :16] >> 4))


def _q3_k(b: Bytes) -> Parts:
    codes = _planes(b[..., 32:96], 32, 2) | (_planes(b[..., :32], 32, 1) << 2)
    factors = _planes(b[..., 96:104], 8, 4) | (_planes(b[..., 104:108], 4, 2) << 4)
    return Parts(_signed(codes, 4), _f16(b, 108), _signed(factors, 32))


def _six_bits(b: Bytes) -> tuple[np.ndarray, np.ndarray]:
    """Eight factors of scales and eight of offsets, in 12 bytes."""
    d, m, both = b[..., 0:4], b[..., 4:8], b[..., 8:12]
    factors = np.concatenate([d & 63, (both & 15) | ((d >> 2) & 48)], -1)
    offset_factors = np.concatenate([m & 63, (both >> 4) | ((m >> 2) & 48)], -1)
    return _signed(factors), _signed(offset_factors)


def _in_six_bits(p: Parts) -> Bytes:
    """The inverse, for both floats and all factors: 16 bytes."""
    assert p.factors is not None
    assert p.offset is not None
    assert p.offset_factors is not None
    f, m = p.factors.view(np.uint8), p.offset_factors.view(np.uint8)
    low = [x[..., :4] | ((x[..., 4:] & 48) << 2) for x in (f, m)]
    both = (f[..., 4:] & 15) | (m[..., 4:] << 4)
    return np.concatenate([_bytes(p.scale), _bytes(-p.offset), *low, both], -1)


def _q4_k(b: Bytes) -> Parts:
    factors, offset_factors = _six_bits(b[..., 4:16])
    return Parts(_signed(_planes(b[..., 16:], 32, 4)), _f16(b, 0), factors, -_f16(b, 2), offset_factors)


def _write_q4_k(p: Parts) -> Bytes:
    return np.concatenate([_in_six_bits(p), _in_planes(p.codes, 32, 4)], -1)


def _q5_k(b: Bytes) -> Parts:
    factors, offset_factors = _six_bits(b[..., 4:16])
    codes = _planes(b[..., 48:], 32, 4) | (_planes(b[..., 16:48], 32, 1) << 4)
    return Parts(_signed(codes), _f16(b, 0), factors, -_f16(b, 2), offset_factors)


def _write_q5_k(p: Parts) -> Bytes:
    return np.concatenate([_in_six_bits(p), _in_planes(p.codes >> 4, 32, 1), _in_planes(p.codes & 15, 32, 4)], -1)


def _q6_k(b: Bytes) -> Parts:
    codes = _planes(b[..., :128], 64, 4) | (_planes(b[..., 128:192], 32, 2) << 4)
    return Parts(_signed(codes, 32), _f16(b, 208), np.ascontiguousarray(b[..., 192:208]).view(np.int8))


def _write_q6_k(p: Parts) -> Bytes:
    assert p.factors is not None
    codes = (p.codes + np.int8(32)).view(np.uint8)
    planes = [_in_planes(codes & 15, 64, 4), _in_planes(codes >> 4, 32, 2)]
    return np.concatenate([*planes, _bytes(p.factors), _bytes(p.scale)], -1)


_NON_LINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def _iq4_nl(b: Bytes) -> Parts:
    return Parts(_NON_LINEAR[_planes(b[..., 2:], 16, 4)], _f16(b, 0))


def _iq4_xs(b: Bytes) -> Parts:
    high = np.ascontiguousarray(b[..., 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    factors = _planes(b[..., 4:8], 1, 4) | ((high.astype(np.uint8) & 3) << 4)
    return Parts(_NON_LINEAR[_planes(b[..., 8:], 16, 4)], _f16(b, 0), _signed(factors, 32))


def _mxfp4(b: Bytes) -> Parts:
    e = b[..., :1].astype(np.uint32)  # half of 2^(e - 127), below the smallest normal number too
    bits = np.where(e < 2, np.uint32(0x00200000) << np.minimum(e, 1), (np.maximum(e, 1) - 1) << np.uint32(23))
    return Parts(_E2M1_DOUBLED[_planes(b[..., 1:], 16, 4)], bits.astype(np.uint32).view(np.float32))


# -- our own: codes of 4 to 7 bits, and for each 32 of them a factor of the block's scale, a byte -----------------------------
_OWN_PLANES = {4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""How many bits of each code stand together, the lowest first."""
_OWN = re.compile(r"s([4-7])b(\d+)\Z")


def _read_own(bits: int, block: int, b: Bytes) -> Parts:
    groups, low = block // 32, 1 << (bits - 1)
    at = 2 + groups
    codes, place = np.zeros((*b.shape[:-1], block), np.uint8), 0
    for plane in _OWN_PLANES[bits]:
        codes |= _planes(b[..., at : at + block * plane // 8], 4 * plane, plane) << place
        at, place = at + block * plane // 8, place + plane
    return Parts(_signed(codes, low), _f16(b, 0), np.ascontiguousarray(b[..., 2 : 2 + groups]).view(np.int8))


def _write_own(bits: int, p: Parts) -> Bytes:
    assert p.factors is not None
    codes, place = (p.codes + np.int8(1 << (bits - 1))).view(np.uint8), 0
    planes = []
    for plane in _OWN_PLANES[bits]:
        planes.append(_in_planes(codes >> place & np.uint8((1 << plane) - 1), 4 * plane, plane))
        place += plane
    return np.concatenate([_bytes(p.scale), _bytes(p.factors), *planes], -1)


@functools.lru_cache
def scheme_named(name: str) -> Scheme | None:
    """One of :data:`SCHEMES`, or of the family ``s4b256``: symmetric codes of 4 to 7 bits in blocks of any multiple of 32.

    A block is its scale, f16; a factor of it for each 32 elements, i8; the lowest four bits of codes, as of Q4_0, then the
    fifth, or the fifth and sixth, and the seventh. An element costs ``bits + 1/4 + 16 / block`` bits. None: there is none.
    """
    m = _OWN.match(name)
    if m is None:
        return SCHEMES.get(name)
    bits, block = int(m[1]), int(m[2])
    if block % 32 or not 32 <= block <= 1024 or m[2].startswith("0"):
        return None
    size, half = 2 + block // 32 + block * bits // 8, 1 << (bits - 1)
    read, write = functools.partial(_read_own, bits, block), functools.partial(_write_own, bits)
    return Scheme(name, block, size, 32, -half, half - 1, (0,), read, write, (-128, 127))


def own_scheme(bits: int, row: int) -> str | None:
    """The name of our own scheme for rows of ``row`` elements: of the largest blocks, up to 256, that they are whole of."""
    block = max((b for b in range(32, 257, 32) if row % b == 0), default=None)
    return None if block is None else f"s{bits}b{block}"


SCHEMES = {
    s.name: s
    for s in (
        Scheme("q4_1", 32, 20, 32, 0, 15, (0, 2), _q4_1, _write_q4_1),
        Scheme("q5_0", 32, 22, 32, -16, 15, (0,), _q5_0, _write_q5_0),
        Scheme("q5_1", 32, 24, 32, 0, 31, (0, 2), _q5_1, _write_q5_1),
        Scheme("q2_k", 256, 84, 16, 0, 3, (80, 82), _q2_k, factors=(0, 15)),
        Scheme("q3_k", 256, 110, 16, -4, 3, (108,), _q3_k, factors=(-32, 31)),
        Scheme("q4_k", 256, 144, 32, 0, 15, (0, 2), _q4_k, _write_q4_k, (0, 63)),
        Scheme("q5_k", 256, 176, 32, 0, 31, (0, 2), _q5_k, _write_q5_k, (0, 63)),
        Scheme("q6_k", 256, 210, 16, -32, 31, (208,), _q6_k, _write_q6_k, (-128, 127)),
        Scheme("iq4_nl", 32, 18, 32, -127, 113, (0,), _iq4_nl),
        Scheme("iq4_xs", 256, 136, 32, -127, 113, (0,), _iq4_xs, factors=(-32, 31)),
        Scheme("mxfp4", 32, 17, 32, -12, 12, (), _mxfp4),
    )
}
"""GGUF's, by name. Its Q8_0 and Q4_0 are ``int8`` and ``int4`` in blocks of 32 with f16 scales, see QTensorType."""


def read_q8_0(b: Bytes) -> tuple[np.ndarray, np.ndarray]:
    """Values i8 [.., 32] and scales f16 [.., 1] of blocks of 34 bytes."""
    return np.ascontiguousarray(b[..., 2:]).view(np.int8), _f16(b, 0)


def read_q4_0(b: Bytes) -> tuple[np.ndarray, np.ndarray]:
    """Values i8 [.., 32] and scales f16 [.., 1] of blocks of 18 bytes."""
    return _signed(_planes(b[..., 2:], 16, 4), 8), _f16(b, 0)
