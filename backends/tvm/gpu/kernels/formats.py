"""Weights as the kernels for GPUs read them: rows of words that threads read side by side, dequantized in registers.

Weights w[n, k] of few bits are ``u32[n, words]``. A row is cut into *octets* of eight elements. It begins with its codes, from
0 on, in *planes*: of five bits, say, a plane of the lower four and one of the highest; in a plane, elements follow each other
from the lowest bits of the first word on. Then come scales, offsets, integer factors of scales and of offsets, as the format
has them; numbers of 16 and 8 bits share words. f16 (where arrays of it cannot be read) and bf16 are two to a word; f32 is as
it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tvm import tirx
from wasat.ir import BlockArray, DType, QArray, QTensorType
from wasat.ir.schemes import Scheme, scheme_named

from ...cpu.kernels.emit import Buffer, Expr, bits, cast, floor_div, floor_mod, int64, load, splat
from .emit import Kernel, as_f32

OCTET = 8
RUN = 4
"""Octets that a thread takes at once, where rows are of whole runs: their codes lie side by side, and a scale is read once."""
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


@dataclass(frozen=True)
class Floats:
    """Rows of f32, f16 or bf16. ``words``: two to a word of 32 bits."""

    dtype: str
    words: bool = False

    @property
    def name(self) -> str:
        return self.dtype

    def param(self, n: int, k: int) -> tuple[tuple[int, int], str]:
        """Shape and element type of weights w[n, k]."""
        return ((n, -(-k // 2)), "uint32") if self.words else ((n, k), self.dtype)

    def pack(self, w: Any) -> np.ndarray:
        if not self.words:
            return np.ascontiguousarray(w)
        return _words(np.ascontiguousarray(w).view(np.uint16).reshape(-1, w.shape[-1]), 2)


@dataclass(frozen=True)
class Codes:
    """Rows of small integers with scales (and offsets) of ``group`` elements each."""

    name: str
    low: int
    high: int
    group: int
    scale: str
    """Element type of scales."""
    offset: bool = False
    factors: int = 0
    """Groups to a block, where scales and offsets are integer factors of a block's; 0: each group has its own."""

    @property
    def planes(self) -> tuple[int, ...]:
        return _PLANES[(self.high - self.low).bit_length()]

    def padded(self, k: int) -> int:
        """Elements of a row, with those that fill the last words."""
        return -(-k // 32) * 32

    def sections(self, k: int) -> dict[str, int]:
        """Where in a row its parts begin, in words, and where it ends."""
        wide = self.padded(k)
        groups = -(-wide // self.group)
        blocks = -(-groups // self.factors) if self.factors else groups
        at, out = 0, {}
        for i, b in enumerate(self.planes):
            out[f"plane{i}"] = at
            at += wide * b // 32
        half = {"float32": 1}.get(self.scale, 2)
        for part, count, per in (
            ("scale", blocks, half), ("offset", blocks * self.offset, 2),
            ("factor", groups * bool(self.factors), 4), ("offset_factor", groups * (bool(self.factors) and self.offset), 4),
        ):  # fmt: skip
            out[part] = at
            at += -(-count // per)
        out["end"] = -(-at // 4) * 4  # rows begin where four words can be loaded at once
        return out

    def param(self, n: int, k: int) -> tuple[tuple[int, int], str]:
        return (n, self.sections(k)["end"]), "uint32"

    def pack(self, w: QArray) -> np.ndarray:
        """A weight [n, k], or of more axes."""
        k = w.shape[-1]
        n = int(np.prod(w.shape[:-1]))
        out = np.empty((n, self.sections(k)["end"]), np.uint32)
        step = max(1, (1 << 22) // max(1, k))
        flat = w if len(w.shape) == 2 else None
        for i in range(0, n, step):  # by pieces: the temporaries of a large weight would exceed it
            rows: Any = np.unravel_index(np.arange(i, min(n, i + step)), w.shape[:-1]) if flat is None else slice(i, i + step)
            self._pack(w.rows(rows), out[i : i + step])
        return out

    def _pack(self, w: QArray, out: np.ndarray) -> None:
        n, k = w.shape
        wide, at = self.padded(k), self.sections(k)
        out[:] = 0
        codes = np.zeros((n, wide), np.uint8)
        codes[:, :k] = (w.values.astype(np.int16) - self.low).astype(np.uint8)
        place = 0
        for i, b in enumerate(self.planes):
            fields = ((codes >> place) & ((1 << b) - 1)).reshape(n, -1, 8 // b)
            plane = np.bitwise_or.reduce(fields << np.arange(0, 8, b, dtype=np.uint8), axis=-1)
            out[:, at[f"plane{i}"] : at[f"plane{i}"] + wide * b // 32] = _words(plane.astype(np.uint8), 4)
            place += b
        if isinstance(w, BlockArray):
            parts = w.parts
            numbers = {
                "scale": parts.scale, "offset": parts.offset, "factor": parts.factors, "offset_factor": parts.offset_factors,
            }  # fmt: skip
        else:
            numbers = {"scale": w.scales}
        for part, x in numbers.items():
            if x is not None:
                raw = np.ascontiguousarray(x.reshape(n, -1))
                packed = _words(raw.view(f"u{raw.itemsize}"), 4 // raw.itemsize)
                out[:, at[part] : at[part] + packed.shape[1]] = packed


Format = Floats | Codes


def _words(x: np.ndarray, per: int) -> np.ndarray:
    """Rows of ``per`` numbers to a word, the first lowest; the last word filled with zeros."""
    n, count = x.shape
    full = np.zeros((n, -(-count // per) * per), x.dtype)
    full[:, :count] = x
    return full.view("<u4")


def format_of(type: Any, f16: bool) -> Format | str:
    """How weights of the type are packed; or why there is no such way."""
    if not isinstance(type, QTensorType):
        names = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16"}
        name = names.get(type.dtype)
        if name is None:
            return f"weights of {type.dtype} have no kernel"
        return Floats(name, words=name == "bfloat16" or (name == "float16" and not f16))
    scheme: Scheme | None = scheme_named(type.scheme)
    if scheme is not None:
        groups = scheme.block // scheme.group if scheme.factors else 0
        scale = "float16" if scheme.floats else "float32"
        return Codes(scheme.name, scheme.low, scheme.high, scheme.group, scale, scheme.offset, groups)
    if type.zeros:
        return "zero points have no kernel"
    if type.block % OCTET:
        return f"blocks of {type.block} are not of whole octets"
    scales = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16"}
    if type.scale not in scales:
        return f"scales of {type.scale} have no kernel"
    low, high = (-8, 7) if type.scheme == "int4" else (-128, 127)
    return Codes(f"{type.scheme}b{type.block}{type.scale}", low, high, type.block, scales[type.scale])


# -- in kernels ---------------------------------------------------------------------------------------------------------------
def half_to_f32(half: Expr, dtype: str) -> Expr:
    """f32 of the 16 bits in a u32: integers alone, since devices may take subnormal numbers for zero."""
    if dtype == "bfloat16":
        return bits("float32", half << _u(16))
    sign = (half & _u(0x8000)) << _u(16)
    exponent, mantissa = half & _u(0x7C00), half & _u(0x3FF)
    small = bits("uint32", cast("float32", bits("int32", mantissa)) * splat(2.0**-24, 1))
    normal = ((half & _u(0x7FFF)) << _u(13)) + _u(112 << 23)
    huge = (mantissa << _u(13)) | _u(0x7F800000)
    magnitude = tirx.Select(tirx.EQ(exponent, _u(0)), small, tirx.Select(tirx.EQ(exponent, _u(0x7C00)), huge, normal))
    return bits("float32", magnitude | sign)


def _u(x: int) -> Expr:
    return tirx.IntImm("uint32", x)


@dataclass(frozen=True)
class Octet:
    """Eight elements of a row: ``values[i] * scale + offset``, where there are such."""

    values: list[Expr]
    scale: Expr | None = None
    offset: Expr | None = None

    def dense(self) -> list[Expr]:
        """f32, as the reference computes them."""
        out = self.values if self.scale is None else [v * self.scale for v in self.values]
        return out if self.offset is None else [v + self.offset for v in out]

    def dot(self, xs: list[Expr]) -> Expr:
        """The sum of products with ``xs``."""
        total = _sum([x * v for x, v in zip(xs, self.values)])
        if self.scale is not None:
            total = total * self.scale
        return total if self.offset is None else total + _sum(xs) * self.offset


def _sum(xs: list[Expr]) -> Expr:
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return total


@dataclass(frozen=True)
class Rows:
    """The rows of a packed weight in a kernel, ``w`` under one index."""

    kernel: Kernel
    format: Format
    k: int
    w: Buffer

    @cached_property
    def at(self) -> dict[str, int]:
        assert isinstance(self.format, Codes)
        return self.format.sections(self.k)

    @property
    def octets(self) -> int:
        """Of a row."""
        return -(-self.k // OCTET)

    def start(self, row: Expr) -> Expr:
        """Where a row begins."""
        return self.kernel.let(row * self.format.param(1, self.k)[0][1], "start")

    def _word(self, start: Expr, at: Expr) -> Expr:
        return self.kernel.let(load(self.w, start + at), "word")

    def octet(self, start: Expr, at: Expr) -> Octet:
        """Octet ``at`` of the row that begins at ``start``. What stands behind its last element is finite."""
        f, let = self.format, self.kernel.let
        if isinstance(f, Floats):
            return Octet(self._words(start, at) if f.words else self._floats(start, at))
        codes: list[Expr] = [_u(0)] * OCTET
        place = 0
        for i, b in enumerate(f.planes):
            base = self.at[f"plane{i}"]
            if b == 8:
                words = [self._word(start, at * 2 + (base + j)) for j in range(2)]
                fields = [words[t // 4] >> _u(8 * (t % 4)) for t in range(OCTET)]
            else:
                per = 4 // b
                word = self._word(start, (floor_div(at, per) if per > 1 else at) + base)
                if per > 1:
                    word = let(word >> tirx.Cast("uint32", floor_mod(at, per) * (b * OCTET)))
                fields = [word >> _u(b * t) if t else word for t in range(OCTET)]
            fields = [x & _u((1 << b) - 1) for x in fields]
            codes = fields if not place else [c | (x << _u(place)) for c, x in zip(codes, fields)]
            place += b
        values = [let(cast("float32", cast("int32", c) + tirx.IntImm("int32", f.low)), "code") for c in codes]
        group = let(floor_div(at, f.group // OCTET), "group")
        return Octet(values, self._number(start, group, "scale"), self._number(start, group, "offset") if f.offset else None)

    @property
    def run(self) -> int:
        """How many octets :meth:`octets_from` gives."""
        return RUN if isinstance(self.format, Codes) and self.k % (RUN * OCTET) == 0 else 1

    @property
    def runs(self) -> int:
        """Of a row."""
        return self.octets // self.run

    def octets_from(self, start: Expr, at: Expr) -> list[Octet]:
        """The octets of run ``at`` of the row that begins at ``start``."""
        f, let = self.format, self.kernel.let
        if self.run == 1:
            return [self.octet(start, at)]
        assert isinstance(f, Codes)
        codes: list[Expr] = []
        place = 0
        for i, b in enumerate(f.planes):
            # a run is b words of a plane of b bits; rows, and planes of four bits and more, begin at multiples of four words
            words = [let(x, "word") for x in self.kernel.side_by_side(self.w, start + (at * b + self.at[f"plane{i}"]), b)]
            fields = []
            for e in range(RUN * OCTET):
                word, shift = words[e * b // 32], e * b % 32
                fields.append((word >> _u(shift) if shift else word) & _u((1 << b) - 1))
            codes = fields if not place else [c | (x << _u(place)) for c, x in zip(codes, fields)]
            place += b
        out = []
        numbers: tuple[Expr | None, Expr | None] = None, None
        for o in range(RUN):
            if o == 0 or f.group % (RUN * OCTET):
                group = let(floor_div(at * RUN + o, f.group // OCTET), "group")
                numbers = self._number(start, group, "scale"), self._number(start, group, "offset") if f.offset else None
            own = (cast("int32", c) + tirx.IntImm("int32", f.low) for c in codes[o * OCTET : (o + 1) * OCTET])
            out.append(Octet([let(cast("float32", c), "code") for c in own], *numbers))
        return out

    def _number(self, start: Expr, group: Expr, part: str) -> Expr:
        """The scale or the offset of a group."""
        f, let = self.format, self.kernel.let
        assert isinstance(f, Codes)
        block = let(floor_div(group, f.factors)) if f.factors > 1 else group
        dtype = f.scale if part == "scale" else "float16"
        if dtype == "float32":
            x = bits("float32", self._word(start, block + self.at[part]))
        else:
            word = self._word(start, floor_div(block, 2) + self.at[part])
            half = let((word >> tirx.Cast("uint32", floor_mod(block, 2) * 16)) & _u(0xFFFF))
            x = half_to_f32(half, dtype)
        if not f.factors:
            return let(x, part)
        name = "factor" if part == "scale" else "offset_factor"
        word = self._word(start, floor_div(group, 4) + self.at[name])
        byte = bits("int32", word << tirx.Cast("uint32", 24 - floor_mod(group, 4) * 8)) >> tirx.IntImm("int32", 24)
        return let(x * cast("float32", byte), part)

    def _floats(self, start: Expr, at: Expr) -> list[Expr]:
        """Of an array of floats: elements past the end of a row are given as zeros."""
        if self.k % OCTET == 0:
            return [self.kernel.let(as_f32(x)) for x in self.kernel.side_by_side(self.w, start + at * OCTET, OCTET)]
        out = []
        for t in range(OCTET):
            index = at * OCTET + t
            inside = None if self.k % OCTET == 0 or t < self.k % OCTET else index < self.k
            value = as_f32(load(self.w, start + (index if inside is None else tirx.min(index, int64(self.k - 1)))))
            out.append(self.kernel.let(self.kernel.kept(inside, value)))
        return out

    def _words(self, start: Expr, at: Expr) -> list[Expr]:
        """Of pairs: the row's last word may be half filled, and what stands behind is given as zeros."""
        let, words = self.kernel.let, -(-self.k // 2)
        out: list[Expr] = []
        together = self.kernel.side_by_side(self.w, start + at * (OCTET // 2), OCTET // 2) if self.k % OCTET == 0 else []
        for j in range(OCTET // 2):
            index = at * (OCTET // 2) + j
            whole = self.k % OCTET == 0 or 2 * j < self.k % OCTET
            word = let(together[j]) if together else self._word(start, index if whole else tirx.min(index, int64(words - 1)))
            if not whole:
                word = let(tirx.Select(index < words, word, _u(0)))
            if self.format.name == "bfloat16":
                out += [let(bits("float32", word << _u(16))), let(bits("float32", word & _u(0xFFFF0000)))]
            else:
                out += [let(half_to_f32(let(word & _u(0xFFFF)), "float16")), let(half_to_f32(let(word >> _u(16)), "float16"))]
        return out
