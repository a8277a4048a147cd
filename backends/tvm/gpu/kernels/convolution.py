"""Convolutions over any number of axes: as products of matrices by tiles, whose windows are read where they lie; and directly,
where a group has few outputs (depthwise ones above all).

Output channels are the rows of a product, places of the result its columns: w [o, c * taps] times the windows of x
[c * taps, places]. The windows are never written: each element of a tile of them is found in x by the numbers of its channel
and tap. Beside windows written first (im2col), that spares two passes over ``taps`` times the bytes of x. Sums are f32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx

from ...cpu.kernels.emit import Buffer, Expr, ceil_div, floor_div, floor_mod, int64, load, symbol
from ..limits import Limits
from .emit import Kernel, as_f32, clamped, zero

FEW = 8
"""Outputs of a group below which a thread has all of them at one place."""
_OWN = 4
_UNROLLED = 16


@dataclass(frozen=True)
class Conv:
    """x [b, groups * channels, *space] with w [groups * outputs, channels, *taps]; the rest as the operation ``conv`` has it.

    ``spread``: its ``input_dilation``. ``padded``: of each axis, whether a window may reach outside of x. ``stored``: the
    element type of w.
    """

    limits: Limits
    outputs: int
    channels: int
    taps: tuple[int, ...]
    strides: tuple[int, ...]
    low: tuple[int, ...]
    dilation: tuple[int, ...]
    spread: tuple[int, ...]
    padded: tuple[bool, ...]
    groups: int = 1
    bias: bool = False
    dtype: str = "float32"
    stored: str = "float32"

    @property
    def depth(self) -> int:
        """Elements of a window in the channels of a group."""
        return self.channels * math.prod(self.taps)

    @property
    def direct(self) -> bool:
        return self.outputs < FEW

    @property
    def name(self) -> str:
        taps = "x".join(map(str, self.taps))
        kind = "conv_direct" if self.direct else "conv_tiles"
        return f"{kind}_{self.groups}x{self.outputs}x{self.channels}_{taps}"


def convolution(d: Conv) -> tirx.PrimFunc:
    """PrimFunc(x [b, c, *space], w [o, c / groups, *taps], [bias [o]], y [b, o, *space'])."""
    kernel = Kernel(d.name, d.limits)
    _Convolution(kernel, d).launch()
    return kernel.build()


@dataclass(frozen=True)
class _Tile:
    """Threads over outputs and over places, each of which has four by four; ``step``: elements of a window at a time."""

    down: int
    across: int
    step: int


def _tile(d: Conv) -> _Tile:
    threads = 256 if d.limits.threads >= 256 else 64
    down = 4 if d.outputs < 24 else 8 if d.outputs < 48 or threads < 256 else 16
    return _Tile(down, threads // down, 8 if down == 4 else 16)


class _Convolution:
    def __init__(self, kernel: Kernel, d: Conv) -> None:
        self.kernel, self.d = kernel, d
        self.b = symbol("b")
        self.space = [symbol(f"n{i}") for i in range(len(d.taps))]
        self.out = [symbol(f"m{i}") for i in range(len(d.taps))]
        x = kernel.param("x", (self.b, d.groups * d.channels, *self.space), d.dtype)
        w = kernel.param("w", (d.groups * d.outputs, d.channels, *d.taps), d.stored)
        bias = kernel.param("bias", (d.groups * d.outputs,), d.dtype) if d.bias else None
        y = kernel.param("y", (self.b, d.groups * d.outputs, *self.out), d.dtype)
        self.x, self.w, self.y = kernel.flat(x), kernel.flat(w), kernel.flat(y)
        self.bias: Buffer | None = bias
        self.places = _product(self.out)

    def launch(self) -> None:
        self._directly() if self.d.direct else self._by_tiles()

    # -- windows ------------------------------------------------------------------------------------------------------------
    def _corners(self, place: Expr) -> list[Expr]:
        """Of each axis, where the window of a place (of those of a picture) begins in x; before its first element, below 0."""
        kernel, d = self.kernel, self.d
        found: list[Expr] = []
        for i in reversed(range(len(self.out))):
            own = place if i == 0 else kernel.let(floor_mod(place, self.out[i]))
            place = place if i == 0 else kernel.let(floor_div(place, self.out[i]))
            found.insert(0, kernel.copy(own * d.strides[i] - d.low[i]))
        return found

    def _within(self, corners: Sequence[Expr]) -> Expr | None:
        """Whether a window lies in x as a whole; None where that is not asked."""
        d, there = self.d, None
        for i, corner in enumerate(corners):
            if d.spread[i] > 1:
                return None
            if d.padded[i]:
                own = tirx.And(corner >= 0, corner + (d.taps[i] - 1) * d.dilation[i] < self.space[i])
                there = own if there is None else tirx.And(there, own)
        return there

    def _window(
        self, base: Expr, corners: Sequence[Expr], channel: Expr, tap: Sequence[Expr], also: Expr | None, within: bool = False
    ) -> Expr:
        """An element of a window, as f32: 0 outside of x, and where ``also`` does not hold. ``base``: where its picture's first
        channel begins. ``within``: the window is known to lie in x."""
        kernel, d, inside, at = self.kernel, self.d, [] if also is None else [also], channel
        for i, (corner, t) in enumerate(zip(corners, tap)):
            where = kernel.let(corner + t * d.dilation[i], "where")
            if d.padded[i] and not within:
                inside.append(where >= 0)
                inside.append(where < self.space[i] * d.spread[i])
            if d.spread[i] > 1:
                inside.append(tirx.EQ(floor_mod(where, d.spread[i]), int64(0)))
                where = floor_div(where, d.spread[i])
            at = at * self.space[i] + where
        at = base + at
        if not inside:
            return as_f32(load(self.x, at))
        there = inside[0]
        for more in inside[1:]:
            there = tirx.And(there, more)
        # read in any case, the first element of x if need be: see Kernel.kept
        return kernel.kept(there, as_f32(load(self.x, tirx.Select(there, at, int64(0)))))

    def _put(self, channel: Expr, picture: Expr, place: Expr, total: Expr) -> None:
        if self.bias is not None:
            total = total + as_f32(load(self.bias, channel))
        self.kernel.put(self.y, (picture * (self.d.groups * self.d.outputs) + channel) * self.places + place, total)

    def _picture(self, picture: Expr, group: Expr) -> Expr:
        """Where the channels of a group begin in x."""
        return self.kernel.copy((picture * self.d.groups + group) * self.d.channels * _product(self.space))

    # -- a thread for each place --------------------------------------------------------------------------------------------
    def _directly(self) -> None:
        kernel, d = self.kernel, self.d
        with kernel.each(self.b * d.groups * self.places) as at:
            place, unit = kernel.let(floor_mod(at, self.places), "place"), kernel.let(floor_div(at, self.places), "unit")
            group, picture = kernel.let(floor_mod(unit, d.groups), "group"), kernel.let(floor_div(unit, d.groups), "picture")
            corners, base = self._corners(place), self._picture(picture, group)
            sums = kernel.registers(d.outputs, "float32", 1)
            for i in range(d.outputs):
                kernel.store(sums, i, zero())

            def add(channel: Expr, tap: Sequence[Expr], within: bool) -> None:
                value = kernel.copy(self._window(base, corners, channel, tap, None, within))
                step = channel
                for n, t in zip(d.taps, tap):
                    step = step * n + t
                for i in range(d.outputs):
                    weight = as_f32(load(self.w, (group * d.outputs + i) * d.depth + step))
                    kernel.store(sums, i, load(sums, i) + weight * value)

            def sum_up(within: bool) -> None:
                with kernel.loop(d.channels) as channel:
                    self._taps(d.taps, [], lambda tap: add(channel, tap, within))

            there = self._within(corners)
            if there is None:
                sum_up(False)
            else:  # most windows are: they need not look at each element
                kernel.either(there, lambda: sum_up(True), lambda: sum_up(False))
            for i in range(d.outputs):
                self._put(group * d.outputs + i, picture, place, load(sums, i))

    def _taps(self, sizes: Sequence[int], outer: list[Expr], body: Callable[[list[Expr]], None]) -> None:
        """``body`` for each tap; those of a short last axis stand one after another."""
        if not sizes:
            body(outer)
        elif len(sizes) == 1 and sizes[0] <= _UNROLLED:
            for t in range(sizes[0]):
                body([*outer, int64(t)])
        else:
            with self.kernel.loop(sizes[0]) as t:
                self._taps(sizes[1:], [*outer, t], body)

    # -- tiles --------------------------------------------------------------------------------------------------------------
    def _by_tiles(self) -> None:
        kernel, d, tile = self.kernel, self.d, _tile(self.d)
        threads, high, wide, step = tile.down * tile.across, tile.down * _OWN, tile.across * _OWN, tile.step
        pitch, rows = high + 1, -(-d.outputs // high)
        columns = self.b * self.places
        # tiles of other outputs at the same places are neighbours: they read the same windows
        with kernel.launch(ceil_div(columns, wide) * (d.groups * rows), threads) as ([block], thread):
            unit, column = kernel.let(floor_mod(block, d.groups * rows)), kernel.let(floor_div(block, d.groups * rows))
            group, o0 = kernel.let(floor_div(unit, rows), "group"), kernel.let(floor_mod(unit, rows) * high, "o0")
            p0 = kernel.let(column * wide, "p0")
            xs, ws = kernel.shared(step * wide), kernel.shared(step * pitch)
            sums = kernel.registers(_OWN * _OWN, "float32", 1)
            tx, ty = kernel.let(floor_mod(thread, tile.across), "tx"), kernel.let(floor_div(thread, tile.across), "ty")
            for i in range(_OWN * _OWN):
                kernel.store(sums, i, zero())
            # a thread fetches elements of one place's window
            own = kernel.copy(clamped(p0 + floor_mod(thread, wide), columns))
            corners = self._corners(kernel.let(floor_mod(own, self.places)))
            base = self._picture(floor_div(own, self.places), group)
            at_once = threads // wide
            with kernel.loop(-(-d.depth // step)) as part:
                for i in range(step // at_once):
                    kk = kernel.let(floor_div(thread, wide) + i * at_once, "kk")
                    k = kernel.let(part * step + kk, "k")
                    also = k < d.depth if d.depth % step else None
                    channel, tap = self._numbers(k if also is None else clamped(k, d.depth))
                    value = self._window(base, corners, channel, tap, also)
                    kernel.store(xs, kk * wide + floor_mod(thread, wide), value)
                for at in kernel.strided(thread, threads, high * step):
                    kk, oo = kernel.let(floor_mod(at, step)), kernel.let(floor_div(at, step))
                    k = kernel.let(part * step + kk, "k")
                    also = k < d.depth if d.depth % step else None
                    row = group * d.outputs + clamped(o0 + oo, d.outputs)
                    weight = load(self.w, row * d.depth + (k if also is None else clamped(k, d.depth)))
                    kernel.store(ws, kk * pitch + oo, kernel.kept(also, as_f32(weight)))
                kernel.barrier()
                with kernel.loop(step) as kk:
                    a = [kernel.let(load(ws, kk * pitch + ty + i * tile.down)) for i in range(_OWN)]
                    b = [kernel.let(load(xs, kk * wide + tx + j * tile.across)) for j in range(_OWN)]
                    for i in range(_OWN):
                        for j in range(_OWN):
                            kernel.store(sums, i * _OWN + j, load(sums, i * _OWN + j) + a[i] * b[j])
                kernel.barrier()
            for j in range(_OWN):
                p = kernel.let(p0 + tx + j * tile.across, "p")
                place, picture = kernel.let(floor_mod(p, self.places)), kernel.let(floor_div(p, self.places))
                for i in range(_OWN):
                    o = kernel.let(o0 + ty + i * tile.down, "o")
                    with kernel.when(tirx.And(p < columns, o < d.outputs)):
                        self._put(group * d.outputs + o, picture, place, load(sums, i * _OWN + j))

    def _numbers(self, k: Expr) -> tuple[Expr, list[Expr]]:
        """Channel and tap of an element of a window."""
        tap: list[Expr] = []
        for n in reversed(self.d.taps):
            tap.insert(0, floor_mod(k, n) if n > 1 else int64(0))
            k = floor_div(k, n) if n > 1 else k
        return k, tap


def _product(sizes: Sequence[Expr]) -> Expr:
    total = sizes[0]
    for n in sizes[1:]:
        total = total * n
    return total
