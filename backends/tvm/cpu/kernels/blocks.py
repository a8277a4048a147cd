"""Weights in blocks, packed for the kernels: every number as the file has it. They are GGUF's formats (:mod:`wasat.ir.schemes`)
and int8 and int4 with blocks of any multiple of 32, scales of any float type and perhaps zero points.

Weights w[n, k] are cut into panels of ``isa.columns`` output rows (n padded with zeros), these into the format's blocks along
k: ``uint8[panels, blocks, bytes]``. The bytes of a block are the columns' scales and their offsets (f16) or zero points (i8);
then, for every 32 steps of k, the columns' integer factors of scales and of offsets, a byte each, and *planes*. A plane holds
``b`` bits of each code in ``b`` vectors of four bytes a column: vector j has the groups of four k
``j, j + b, ..`` in ascending bits. Codes of five bits are a plane of four and one of one bit. Codes are stored from 0 on.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from wasat.ir import BlockArray, DType, QArray, QTensorType
from wasat.ir.schemes import Parts, scheme_named

from .emit import Buffer, Expr, Kernel, bits, cast, floor_div, floor_mod, load, splat_int, vector, widen
from .isa import Isa
from .pack import BLOCK, padded

_STORED = {DType.F16: "float16", DType.BF16: "uint16", DType.F32: "float32"}
"""Scales as the kernels read them; of bf16 the bits."""
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


@dataclass(frozen=True)
class Format:
    """How weights in blocks are packed for an instruction set: ``block`` elements, codes ``low`` to ``high``, a scale for each
    ``group`` (integer ``factors`` of the block's own, if there are several)."""

    isa: Isa
    block: int
    group: int
    low: int
    high: int
    scale: DType
    offset: bool = False
    factors: bool = False
    zeros: bool = False

    @property
    def planes(self) -> tuple[int, ...]:
        return _PLANES[(self.high - self.low).bit_length()]

    @property
    def zero(self) -> int:
        """What is taken from a stored code."""
        return -self.low

    @property
    def pieces(self) -> int:
        """Times 32 steps of a block."""
        return self.block // BLOCK

    @property
    def scales(self) -> int:
        """Scales of 32 steps."""
        return max(1, BLOCK // self.group)

    @property
    def scale_size(self) -> int:
        """Bytes of a block's scale."""
        return self.scale.bits // 8

    @property
    def head(self) -> int:
        """Bytes before the first piece."""
        return self.isa.columns * (self.scale_size + 2 * self.offset + self.zeros)

    @property
    def numbers(self) -> int:
        """Of a column for 32 steps, once unpacked: scales, and offsets or zero points."""
        return self.scales * (1 + (self.offset or self.zeros))

    @property
    def factor_size(self) -> int:
        """Bytes of the factors of a piece."""
        return self.isa.columns * self.scales * (1 + self.offset) if self.factors else 0

    @property
    def piece(self) -> int:
        """Bytes of 32 steps."""
        return self.factor_size + self.isa.columns * 4 * sum(self.planes)

    def shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Of weights w[n, k] once packed."""
        return padded(n, self.isa.columns) // self.isa.columns, k // self.block, self.head + self.pieces * self.piece


_INTEGERS = re.compile(r"int([48])(z?)b(\d+)(b?f\d+)\Z")


def in_blocks(name: str) -> bool:
    """Whether a storage is one of this module."""
    return scheme_named(name) is not None or _INTEGERS.match(name) is not None


def fits_blocks(type: QTensorType) -> bool:
    """Whether weights of ``type``, whose sizes are known, can be packed."""
    k = type.shape[-1]
    return type.stored is not None or (type.block % BLOCK == 0 and k % type.block == 0 and type.scale is not DType.F64)


@functools.lru_cache
def format_of(name: str, isa: Isa) -> Format:
    """Of a storage as :attr:`.QTensorType.how` names it."""
    s = scheme_named(name)
    if s is not None:
        scale = DType.F16 if s.floats else DType.F32
        return Format(isa, s.block, s.group, s.low, s.high, scale, s.offset, s.factors is not None)
    m = _INTEGERS.match(name)
    assert m is not None, name
    high, block = (8 if m[1] == "4" else 128), int(m[3])
    return Format(isa, block, block, -high, high - 1, DType.of(m[4]), zeros=m[2] == "z")


def pack_blocks(weight: QArray, isa: Isa) -> NDArray[np.uint8]:
    """A weight [n, k] -> u8[panels, blocks, bytes]."""
    f, (n, k) = format_of(weight.type.how, isa), weight.shape
    panels, blocks, size = f.shape(n, k)
    columns = isa.columns
    out = np.empty((panels, blocks, size), np.uint8)
    step = max(1, (1 << 22) // (columns * k))
    for first in range(0, panels, step):  # by pieces: the temporaries of a large weight would exceed it
        last = min(panels, first + step)
        rows = weight.rows(slice(first * columns, min(n, last * columns)))
        in_panels = functools.partial(_in_panels, panels=last - first, columns=columns, blocks=blocks)
        if isinstance(rows, BlockArray):
            parts = rows.scheme.read(in_panels(rows.data))
        else:
            parts = Parts(in_panels(rows.values), in_panels(rows.scales))
        zeros = None if rows.zeros is None else in_panels(rows.zeros)
        out[first:last] = _pack(f, parts, zeros)
    return out


def _in_panels(x: np.ndarray, panels: int, columns: int, blocks: int) -> np.ndarray:
    """What rows hold [rows, ..], filled up with zeros -> [panels, blocks, columns, ..]."""
    whole = np.zeros((panels * columns, *x.shape[1:]), x.dtype)
    whole[: len(x)] = x
    return whole.reshape(panels, columns, blocks, -1).swapaxes(1, 2)


def _pack(f: Format, parts: Parts, zeros: np.ndarray | None) -> NDArray[np.uint8]:
    """What blocks hold, each [panels, blocks, columns, ..] -> [panels, blocks, bytes]."""

    def of_columns(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x[..., 0]).view(np.uint8)

    head = [of_columns(x) for x in (parts.scale, parts.offset, zeros) if x is not None]
    lead = parts.codes.shape[:-1]
    pieces: list[np.ndarray] = []
    for factors in (parts.factors, parts.offset_factors):
        if factors is not None:  # [.., columns, groups] -> [.., pieces, groups of a piece, columns]
            by_piece = factors.view(np.uint8).reshape(*factors.shape[:-1], f.pieces, f.scales)
            pieces.append(np.moveaxis(by_piece, -3, -1).reshape(*lead[:2], f.pieces, -1))
    codes = (parts.codes.astype(np.int16) + f.zero).astype(np.uint8)
    codes = codes.reshape(*lead, f.pieces, BLOCK // 4, 4)
    place = 0
    for b in f.planes:
        fields = (codes >> place) & ((1 << b) - 1)
        fields = fields.reshape(*fields.shape[:-2], 8 // b, b, 4)  # groups: which bits, which vector
        shifts = np.arange(0, 8, b, dtype=np.uint8)[:, None, None]
        plane = np.bitwise_or.reduce(fields << shifts, axis=-3)  # [panels, blocks, columns, pieces, b, 4]
        pieces.append(plane.transpose(0, 1, 3, 4, 2, 5).reshape(*lead[:2], f.pieces, -1))
        place += b
    tail = np.concatenate(pieces, -1).reshape(*lead[:2], -1)
    return np.concatenate([*head, tail], -1)


# -- in kernels ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Piece:
    """32 steps of a panel, in a kernel: ``at`` is counted in such pieces."""

    kernel: Kernel
    format: Format
    w: Buffer
    panel: Expr
    at: Expr

    def _load(self, offset: Expr | int, lanes: int) -> Expr:
        f = self.format
        if f.pieces == 1:
            return load(self.w, (self.panel, self.at, f.head + offset), lanes)
        inner = floor_mod(self.at, f.pieces) * f.piece + f.head
        return load(self.w, (self.panel, floor_div(self.at, f.pieces), inner + offset), lanes)

    def _head(self, offset: int, lanes: int) -> Expr:
        return load(self.w, (self.panel, self._block, offset), lanes)

    def _floats(self, offset: int, dtype: DType, v: int) -> Expr:
        isa, size = self.format.isa, dtype.bits // 8
        raw = self._head(offset + v * isa.lanes * size, isa.lanes * size)
        return widen(bits(vector(_STORED[dtype], isa.lanes), raw), isa.native_f16)

    def _factors(self, which: int, h: int, v: int) -> Expr:
        f, isa = self.format, self.format.isa
        raw = self._load((which * f.scales + h) * isa.columns + v * isa.lanes, isa.lanes)
        return cast("float32", bits(vector("int8", isa.lanes), raw))

    def _numbers(self, which: int) -> list[list[Expr]]:
        """Scales (0) or offsets (1), f32: for each group of the piece both halves of the panel."""
        f, dtype = self.format, self.format.scale if which == 0 else DType.F16
        base = 0 if which == 0 else f.isa.columns * f.scale_size
        floats = [self._floats(base, dtype, v) for v in range(2)]
        if not f.factors:
            return [[self.kernel.let(x) for x in floats]] * f.scales
        floats = [self.kernel.let(x) for x in floats]
        return [[self.kernel.let(floats[v] * self._factors(which, h, v)) for v in range(2)] for h in range(f.scales)]

    def scales(self) -> list[list[Expr]]:
        return self._numbers(0)

    def offsets(self) -> list[list[Expr]] | None:
        return self._numbers(1) if self.format.offset else None

    def zeros(self) -> list[list[Expr]] | None:
        """Zero points, f32, as :meth:`scales`."""
        f, lanes = self.format, self.format.isa.lanes
        if not f.zeros:
            return None
        raw = [self._head(f.isa.columns * f.scale_size + v * lanes, lanes) for v in range(2)]
        return [[self.kernel.let(cast("float32", bits(vector("int8", lanes), x))) for x in raw]]

    def codes(self, group: int, v: int) -> Expr:
        """The stored codes of four k of each column of a half: u8 x 4 lanes."""
        f, lanes = self.format, self.format.isa.lanes * 4
        offset, place, total = f.factor_size, 0, None
        for b in f.planes:
            raw = self._load(offset + (group % b * 2 + v) * lanes, lanes)
            shift = group // b * b
            field = raw if shift == 0 else raw >> splat_int(shift, lanes, "uint8")
            if b < 8 and shift + b < 8:
                field = field & splat_int((1 << b) - 1, lanes, "uint8")
            if place:
                field = field << splat_int(place, lanes, "uint8")
            total = field if total is None else total | field
            offset, place = offset + b * 2 * lanes, place + b
        return total

    def dequantized(self) -> list[tuple[int, int, Expr]]:
        """The 32 steps as f32 vectors, in their order: (step of k, half of the panel, values)."""
        f, lanes = self.format, self.format.isa.lanes
        scales, offsets, zeros = self.scales(), self.offsets(), self.zeros()
        out = []
        for group in range(8):
            h = group * f.scales // 8
            for v in range(2):
                words = self.kernel.let(bits(vector("int32", lanes), self.codes(group, v)))
                for t in range(4):
                    code = (words >> splat_int(8 * t, lanes)) & splat_int(255, lanes)
                    value = cast("float32", code - splat_int(f.zero, lanes))
                    value = (value if zeros is None else value - zeros[h][v]) * scales[h][v]
                    out.append((group * 4 + t, v, value if offsets is None else value + offsets[h][v]))
        return sorted(out, key=lambda part: part[0])

    def element(self, column: Expr, step: Expr) -> Expr:
        """One element, f32: of a column of the panel, at a step 0..31."""
        f, isa = self.format, self.format.isa
        lane = column
        group, t = floor_div(step, 4), floor_mod(step, 4)
        offset, place, code = f.factor_size, 0, splat_int(-f.zero, 1)
        for b in f.planes:
            raw = self._load((floor_mod(group, b) * isa.columns + lane) * 4 + t + offset, 1)
            shift = cast("int32", floor_div(group, b) * b)
            code = code + (((cast("int32", raw) >> shift) & splat_int((1 << b) - 1, 1)) << splat_int(place, 1))
            offset, place = offset + b * isa.columns * 4, place + b
        h = floor_div(step, f.group) if f.scales > 1 else 0
        if f.zeros:
            zero = load(self.w, (self.panel, self._block, lane + isa.columns * f.scale_size))
            code = code - cast("int32", bits("int8", zero))
        value = cast("float32", code) * self._one(0, lane, h)
        return value + self._one(1, lane, h) if f.offset else value

    @property
    def _block(self) -> Expr:
        return self.at if self.format.pieces == 1 else floor_div(self.at, self.format.pieces)

    def _one(self, which: int, lane: Expr, h: Expr | int) -> Expr:
        f, isa = self.format, self.format.isa
        dtype, base = (f.scale, 0) if which == 0 else (DType.F16, isa.columns * f.scale_size)
        size = dtype.bits // 8
        kind = "uint16" if size == 2 else "uint32"
        raw = None
        for i in range(size):
            byte = cast(kind, load(self.w, (self.panel, self._block, lane * size + base + i))) << splat_int(8 * i, 1, kind)
            raw = byte if raw is None else raw | byte
        x = widen(bits(_STORED[dtype], raw), isa.native_f16)
        if not f.factors:
            return x
        factor = self._load((h + which * f.scales) * isa.columns + lane, 1)
        return x * cast("float32", bits("int8", factor))


