"""Weights in GGUF's formats of blocks (:mod:`wasat.ir.schemes`), packed for the kernels: every number as the file has it.

Weights w[n, k] are cut into panels of ``isa.columns`` output rows (n padded with zeros), these into the format's blocks along
k: ``uint8[panels, blocks, bytes]``. The bytes of a block are the columns' scales (f16, or f32 where a scale is an exponent) and
their offsets (f16); then, for every 32 steps of k, the columns' integer factors of scales and of offsets, a byte each, and
*planes*. A plane holds ``b`` bits of each code in ``b`` vectors of four bytes a column: vector j has the groups of four k
``j, j + b, ..`` in ascending bits. Codes of five bits are a plane of four and one of one bit. Codes are stored from 0 on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from wasat.ir import BlockArray
from wasat.ir.schemes import SCHEMES, Scheme

from .emit import Buffer, Expr, Kernel, bits, cast, f16_to_f32, floor_div, floor_mod, load, splat_int, vector
from .isa import Isa
from .pack import BLOCK, padded

_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


@dataclass(frozen=True)
class Format:
    """A scheme as it is packed for an instruction set."""

    scheme: Scheme
    isa: Isa

    @property
    def planes(self) -> tuple[int, ...]:
        return _PLANES[self.scheme.code_bits]

    @property
    def zero(self) -> int:
        """What is taken from a stored code."""
        return -self.scheme.low

    @property
    def pieces(self) -> int:
        """Times 32 steps of a block."""
        return self.scheme.block // BLOCK

    @property
    def scales(self) -> int:
        """Scales of 32 steps."""
        return BLOCK // self.scheme.group

    @property
    def scale_size(self) -> int:
        """Bytes of a block's scale."""
        return 2 if self.scheme.floats else 4

    @property
    def head(self) -> int:
        """Bytes before the first piece."""
        return self.isa.columns * (self.scale_size + 2 * self.scheme.offset)

    @property
    def factors(self) -> int:
        """Bytes of the factors of a piece."""
        return self.isa.columns * self.scales * (1 + self.scheme.offset) if self.scheme.factors else 0

    @property
    def piece(self) -> int:
        """Bytes of 32 steps."""
        return self.factors + self.isa.columns * 4 * sum(self.planes)

    def shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Of weights w[n, k] once packed."""
        return padded(n, self.isa.columns) // self.isa.columns, k // self.scheme.block, self.head + self.pieces * self.piece


def format_of(name: str, isa: Isa) -> Format:
    return Format(SCHEMES[name], isa)


def pack_blocks(weight: BlockArray, isa: Isa) -> NDArray[np.uint8]:
    """A weight [n, k] -> u8[panels, blocks, bytes]."""
    f, (n, k) = Format(weight.scheme, isa), weight.shape
    panels, blocks, size = f.shape(n, k)
    columns = isa.columns
    out = np.empty((panels, blocks, size), np.uint8)
    step = max(1, (1 << 22) // (columns * k))
    for first in range(0, panels, step):  # by pieces: the temporaries of a large weight would exceed it
        last = min(panels, first + step)
        rows = weight.rows(slice(first * columns, min(n, last * columns)))
        data = np.zeros(((last - first) * columns, blocks, f.scheme.size), np.uint8)
        data[: len(rows.data)] = rows.data
        out[first:last] = _pack(f, data.reshape(last - first, columns, blocks, -1).swapaxes(1, 2))
    return out


def _pack(f: Format, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Blocks as they are stored [panels, blocks, columns, size] -> [panels, blocks, bytes]."""
    parts = f.scheme.read(data)

    def of_columns(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x[..., 0]).view(np.uint8)

    head = [of_columns(parts.scale), *([] if parts.offset is None else [of_columns(parts.offset)])]
    pieces: list[np.ndarray] = []
    for factors in (parts.factors, parts.offset_factors):
        if factors is not None:  # [.., columns, groups] -> [.., pieces, groups of a piece, columns]
            by_piece = factors.view(np.uint8).reshape(*factors.shape[:-1], f.pieces, f.scales)
            pieces.append(np.moveaxis(by_piece, -3, -1).reshape(*data.shape[:2], f.pieces, -1))
    codes = (parts.codes.astype(np.int16) + f.zero).astype(np.uint8)
    codes = codes.reshape(*data.shape[:3], f.pieces, BLOCK // 4, 4)
    place = 0
    for b in f.planes:
        fields = (codes >> place) & ((1 << b) - 1)
        fields = fields.reshape(*fields.shape[:-2], 8 // b, b, 4)  # groups: which bits, which vector
        shifts = np.arange(0, 8, b, dtype=np.uint8)[:, None, None]
        plane = np.bitwise_or.reduce(fields << shifts, axis=-3)  # [panels, blocks, columns, pieces, b, 4]
        pieces.append(plane.transpose(0, 1, 3, 4, 2, 5).reshape(*data.shape[:2], f.pieces, -1))
        place += b
    tail = np.concatenate(pieces, -1).reshape(*data.shape[:2], -1)
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
        f = self.format
        return load(self.w, (self.panel, self.at if f.pieces == 1 else floor_div(self.at, f.pieces), offset), lanes)

    def _floats(self, offset: int, size: int, v: int) -> Expr:
        isa = self.format.isa
        raw = self._head(offset + v * isa.lanes * size, isa.lanes * size)
        if size == 4:
            return bits(vector("float32", isa.lanes), raw)
        return f16_to_f32(bits(vector("float16", isa.lanes), raw), isa.native_f16)

    def _factors(self, which: int, h: int, v: int) -> Expr:
        f, isa = self.format, self.format.isa
        raw = self._load((which * f.scales + h) * isa.columns + v * isa.lanes, isa.lanes)
        return cast("float32", bits(vector("int8", isa.lanes), raw))

    def _numbers(self, which: int) -> list[list[Expr]]:
        """Scales (0) or offsets (1), f32: for each group of the piece both halves of the panel."""
        f, size = self.format, self.format.scale_size if which == 0 else 2
        base = 0 if which == 0 else f.isa.columns * f.scale_size
        floats = [self._floats(base, size, v) for v in range(2)]
        if not f.scheme.factors:
            return [[self.kernel.let(x) for x in floats]] * f.scales
        floats = [self.kernel.let(x) for x in floats]
        return [[self.kernel.let(floats[v] * self._factors(which, h, v)) for v in range(2)] for h in range(f.scales)]

    def scales(self) -> list[list[Expr]]:
        return self._numbers(0)

    def offsets(self) -> list[list[Expr]] | None:
        return self._numbers(1) if self.format.scheme.offset else None

    def codes(self, group: int, v: int) -> Expr:
        """The stored codes of four k of each column of a half: u8 x 4 lanes."""
        f, lanes = self.format, self.format.isa.lanes * 4
        offset, place, total = f.factors, 0, None
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
        scales, offsets = self.scales(), self.offsets()
        out = []
        for group in range(8):
            h = group * f.scales // 8
            for v in range(2):
                words = self.kernel.let(bits(vector("int32", lanes), self.codes(group, v)))
                for t in range(4):
                    code = (words >> splat_int(8 * t, lanes)) & splat_int(255, lanes)
                    value = cast("float32", code - splat_int(f.zero, lanes)) * scales[h][v]
                    out.append((group * 4 + t, v, value if offsets is None else value + offsets[h][v]))
        return sorted(out, key=lambda part: part[0])

    def element(self, column: Expr, step: Expr) -> Expr:
        """One element, f32: of a column of the panel, at a step 0..31."""
        f, isa = self.format, self.format.isa
        lane = column
        group, t = floor_div(step, 4), floor_mod(step, 4)
        offset, place, code = f.factors, 0, splat_int(-f.zero, 1)
        for b in f.planes:
            raw = self._load((floor_mod(group, b) * isa.columns + lane) * 4 + t + offset, 1)
            shift = cast("int32", floor_div(group, b) * b)
            code = code + (((cast("int32", raw) >> shift) & splat_int((1 << b) - 1, 1)) << splat_int(place, 1))
            offset, place = offset + b * isa.columns * 4, place + b
        value = cast("float32", code) * self._one(0, lane, floor_div(step, f.scheme.group))
        return value + self._one(1, lane, floor_div(step, f.scheme.group)) if f.scheme.offset else value

    def _one(self, which: int, lane: Expr, h: Expr) -> Expr:
        f, isa = self.format, self.format.isa
        size, base = (f.scale_size, 0) if which == 0 else (2, isa.columns * f.scale_size)
        block = self.at if f.pieces == 1 else floor_div(self.at, f.pieces)
        kind = "uint16" if size == 2 else "uint32"
        raw = None
        for i in range(size):
            byte = cast(kind, load(self.w, (self.panel, block, lane * size + base + i))) << splat_int(8 * i, 1, kind)
            raw = byte if raw is None else raw | byte
        x = f16_to_f32(bits("float16", raw), isa.native_f16) if size == 2 else bits("float32", raw)
        if not f.scheme.factors:
            return x
        factor = self._load((h + which * f.scales) * isa.columns + lane, 1)
        return x * cast("float32", bits("int8", factor))


