"""y = x @ w^T (+ bias) of many rows on NVIDIA's tensor cores: ``mma.sync.m16n8k16``, f16 or bf16, sums in f32.

A workgroup has a tile of y, and each of its warps a part of that. Tiles of x and of w, 32 steps of k of each, lie twice in
workgroup memory: while warps multiply one, the next is on its way, copied (``cp.async``) where it lies in memory as it is
wanted; weights of other formats are dequantized in registers and rounded to the type of x. The instructions stand in
:mod:`...plan.ptx`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from ...cpu.kernels.emit import Buffer, Expr, ceil_div, floor_div, floor_mod, int64, load
from .emit import Kernel, as_f32, clamped, zero
from .formats import OCTET, Floats, Format, Rows

STEP = 32
"""Of k, of a tile."""
PITCH = STEP + 8
"""Elements from row to row in workgroup memory: eight rows that a warp reads together lie in different banks."""
PTX = {"float16": "f16", "bfloat16": "bf16"}


def call(kernel: Kernel, name: str, *args: Expr) -> None:
    """A function of :mod:`...plan.ptx`."""
    kernel._emit(tirx.Evaluate(tirx.call_extern("void", name, *args)))


def at_place(buffer: Buffer, index: Expr) -> Expr:
    """The address of an element."""
    return tirx.address_of(load(buffer, index))


@dataclass(frozen=True)
class Tile:
    """Rows of x and of w that a workgroup multiplies; how many warps share each of the two."""

    rows: int
    columns: int
    down: int
    across: int

    @property
    def threads(self) -> int:
        return 32 * self.down * self.across

    @property
    def high(self) -> int:
        """Fragments of 16 rows of x that a warp has."""
        return self.rows // self.down // 16

    @property
    def wide(self) -> int:
        """Fragments of 8 rows of w; even, since two are read at once."""
        return self.columns // self.across // 8


def tile_of(n: int) -> Tile:
    """Large ones read x and w less often; small ones are more of them, for products of few columns."""
    return Tile(128, 128, 2, 4) if n >= 1024 else Tile(64, 64, 2, 2)


def why_not(weights: Format, dtype: str, of_f32: bool, tensor: bool) -> str | None:
    """Why a product of many rows is none for tensor cores; None: it is."""
    if not tensor:
        return "the device has none that take f16 and bf16"
    if of_f32:
        return "its activations are rounded to int8"
    if dtype not in PTX:
        return "its activations are f32"
    if isinstance(weights, Floats) and weights.dtype != dtype:  # it would lose digits, or overflow
        return f"its weight is {PTX.get(weights.dtype, 'f32')}, its activations {PTX[dtype]}"
    return None


@dataclass(frozen=True)
class Operands:
    """Arrays under one index: x [m, k], w as its format has it, bias [n] or None, y [m, n]."""

    m: Expr
    x: Buffer
    w: Buffer
    bias: Buffer | None
    y: Buffer


def products(kernel: Kernel, n: int, k: int, weights: Format, dtype: str, o: Operands) -> None:
    """Writes y."""
    _Products(kernel, n, k, weights, dtype, o).launch()


class _Products:
    def __init__(self, kernel: Kernel, n: int, k: int, weights: Format, dtype: str, o: Operands) -> None:
        self.kernel, self.n, self.k, self.o, self.dtype = kernel, n, k, o, dtype
        self.tile, self.ptx = tile_of(n), PTX[dtype]
        self.weights = Rows(kernel, weights, k, o.w)
        self.whole = k % OCTET == 0
        """Whether rows of 16-bit elements begin at multiples of 16 bytes."""
        self.as_it_is = self.whole and isinstance(weights, Floats) and weights.dtype == dtype

    def launch(self) -> None:
        kernel, tile, o = self.kernel, self.tile, self.o
        parts = -(-self.k // STEP)
        with kernel.launch((-(-self.n // tile.columns), ceil_div(o.m, tile.rows)), tile.threads) as ([column, row], thread):
            self.thread = thread
            self.m0, self.n0 = kernel.let(row * tile.rows, "m0"), kernel.let(column * tile.columns, "n0")
            self.xs, self.ws = (kernel.shared(2 * r * PITCH, "uint16") for r in (tile.rows, tile.columns))
            self.sums = kernel.registers(tile.high * tile.wide * 4, "float32", 1)
            for i in range(tile.high * tile.wide * 4):
                kernel.store(self.sums, i, zero())
            warp, self.lane = kernel.let(floor_div(thread, 32), "warp"), kernel.let(floor_mod(thread, 32), "lane")
            self.top = kernel.let(floor_div(warp, tile.across) * (tile.rows // tile.down), "top")
            self.left = kernel.let(floor_mod(warp, tile.across) * (tile.columns // tile.across), "left")
            self._fill(int64(0))
            self._filled()
            with kernel.loop(parts) as part:
                if parts > 1:
                    with kernel.when(part + 1 < parts):
                        self._fill(kernel.let(part + 1, "next"))
                self._multiply(floor_mod(part, 2) if parts > 1 else int64(0))
                self._filled()
            self._write()

    def _call(self, name: str, *args: Expr) -> None:
        call(self.kernel, name, *args)

    # -- workgroup memory ---------------------------------------------------------------------------------------------------
    def _fill(self, part: Expr) -> None:
        """Part ``part`` of x and w begins its way into workgroup memory."""
        side = floor_mod(part, 2)
        o, tile = self.o, self.tile
        if self.whole:
            self._copy(part, side, self.xs, o.x, self.m0, o.m, tile.rows)
        else:
            self._one_by_one(part, side)
        if self.as_it_is:
            self._copy(part, side, self.ws, o.w, self.n0, int64(self.n), tile.columns)
        else:
            self._dequantized(part, side)

    def _filled(self) -> None:
        if self.whole:
            self._call("wasat_copied")
        self.kernel.barrier()

    def _copy(self, part: Expr, side: Expr, to: Buffer, source: Buffer, first: Expr, count: Expr, rows: int) -> None:
        kernel, octets = self.kernel, STEP // OCTET
        for at in kernel.strided(self.thread, self.tile.threads, rows * octets):
            row, octet = kernel.let(floor_div(at, octets), "row"), kernel.let(floor_mod(at, octets), "octet")
            step = kernel.let(part * STEP + octet * OCTET, "step")
            there = step < self.k if self.k % STEP else None
            begin = clamped(first + row, count) * self.k + (step if there is None else tirx.min(step, int64(self.k - OCTET)))
            place = side * (rows * PITCH) + row * PITCH + octet * OCTET
            flag = tirx.IntImm("int32", 1) if there is None else tirx.Cast("int32", there)
            self._call("wasat_copy", at_place(to, place), tirx.buffer.buffer_data(source), begin, flag)

    def _one_by_one(self, part: Expr, side: Expr) -> None:
        """Of x, whose rows begin anywhere."""
        kernel, rows = self.kernel, self.tile.rows
        with kernel.loop(-(-rows * STEP // self.tile.threads)) as i:
            at = kernel.let(i * self.tile.threads + self.thread, "at")
            row, step = kernel.let(floor_div(at, STEP), "row"), kernel.let(part * STEP + floor_mod(at, STEP), "step")
            source = clamped(self.m0 + row, self.o.m) * self.k + clamped(step, int64(self.k))
            raw = kernel.copy(tirx.reinterpret("uint16", load(self.o.x, source)))
            kept = tirx.Select(step < self.k, raw, tirx.IntImm("uint16", 0))
            kernel.store(self.xs, side * (rows * PITCH) + row * PITCH + floor_mod(at, STEP), kept)

    def _dequantized(self, part: Expr, side: Expr) -> None:
        kernel, octets, rows = self.kernel, STEP // OCTET, self.tile.columns
        with kernel.loop(-(-rows * octets // self.tile.threads)) as i:
            at = kernel.let(i * self.tile.threads + self.thread, "at")
            row, own = kernel.let(floor_div(at, octets), "row"), kernel.let(floor_mod(at, octets), "own")
            octet = kernel.let(part * octets + own, "octet")
            inside = octet < self.weights.octets if self.weights.octets % octets else None
            start = self.weights.start(clamped(self.n0 + row, int64(self.n)))
            found = self.weights.octet(start, octet if inside is None else clamped(octet, int64(self.weights.octets))).dense()
            # what stands behind the last element of a row meets zeros of x, and is finite
            values = [kernel.kept(inside, kernel.copy(v)) for v in found]
            words = [tirx.call_extern("uint32", f"wasat_pair_{self.ptx}", *values[j : j + 2]) for j in range(0, OCTET, 2)]
            place = side * (rows * PITCH) + row * PITCH + own * OCTET
            self._call("wasat_words", at_place(self.ws, place), *words)

    # -- products -----------------------------------------------------------------------------------------------------------
    def _multiply(self, side: Expr) -> None:
        kernel, tile, lane = self.kernel, self.tile, self.lane
        # matrices of 8 by 8 of x: rows 0 and 8 of steps 0, then of steps 8; of w: steps 0 and 8 of rows 0, then of rows 8
        a_at = side * (tile.rows * PITCH) + (self.top + floor_mod(lane, 16)) * PITCH + floor_div(lane, 16) * 8
        w_row = floor_div(lane, 16) * 8 + floor_mod(lane, 8)
        b_at = side * (tile.columns * PITCH) + (self.left + w_row) * PITCH + floor_mod(floor_div(lane, 8), 2) * 8
        a_at, b_at = kernel.copy(a_at), kernel.copy(b_at)
        for step in range(0, STEP, 16):
            a, b = kernel.registers(tile.high * 4, "uint32", 1), kernel.registers(tile.wide * 2, "uint32", 1)
            for i in range(tile.high):
                self._call("wasat_fragments", at_place(a, int64(i * 4)), at_place(self.xs, a_at + (i * 16 * PITCH + step)))
            for j in range(0, tile.wide, 2):
                self._call("wasat_fragments", at_place(b, int64(j * 2)), at_place(self.ws, b_at + (j * 8 * PITCH + step)))
            for i in range(tile.high):
                for j in range(tile.wide):
                    self._call(
                        f"wasat_mma_{self.ptx}", at_place(self.sums, int64((i * tile.wide + j) * 4)),
                        at_place(a, int64(i * 4)), at_place(b, int64(j * 2)),
                    )  # fmt: skip

    def _write(self) -> None:
        """A lane has of each fragment two neighbours of row lane / 4, and of the row eight below."""
        kernel, tile, o = self.kernel, self.tile, self.o
        row = kernel.let(self.m0 + self.top + floor_div(self.lane, 4), "row")
        column = kernel.let(self.n0 + self.left + floor_mod(self.lane, 4) * 2, "column")
        for i in range(tile.high):
            for j in range(tile.wide):
                for e in range(4):
                    m, n = kernel.let(row + (i * 16 + e // 2 * 8)), kernel.let(column + (j * 8 + e % 2))
                    with kernel.when(tirx.And(m < o.m, n < self.n)):
                        total = load(self.sums, (i * tile.wide + j) * 4 + e)
                        if o.bias is not None:
                            total = total + as_f32(load(o.bias, n))
                        kernel.put(o.y, m * self.n + n, total)
