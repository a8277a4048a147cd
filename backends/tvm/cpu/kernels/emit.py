"""A small builder of TensorIR: nested statements from plain Python, vectors explicit.

:class:`Kernel` collects statements; Python loops unroll, :meth:`Kernel.loop` makes loops that stay. All indices are
int64. Values are ``tvm`` expressions; a vector is an expression of dtype ``float32x16``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize
from tvm.script import tirx as T

Expr = Any  # tvm.ir.Expr; the package has no type stubs
Index = Any  # int or an int64 Expr
Buffer = Any

_OPAQUE = 8  # relax.OpPatternKind: never fused into something else


def int64(value: Index) -> Expr:
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def floor_div(a: Index, b: Index) -> Expr:
    """a // b for non-negative a: one division instruction."""
    return tirx.truncdiv(int64(a), int64(b))


def floor_mod(a: Index, b: Index) -> Expr:
    return tirx.truncmod(int64(a), int64(b))


def ceil_div(a: Index, b: Index) -> Expr:
    return floor_div(int64(a) + (int64(b) - 1), b)


def minimum(a: Index, b: Index) -> Expr:
    return tirx.min(int64(a), int64(b))


def maximum(a: Index, b: Index) -> Expr:
    return tirx.max(int64(a), int64(b))


def symbol(name: str) -> Expr:
    """A size known at run time."""
    return tirx.Var(name, "int64")


_MOST_COPIES = 20
"""How many values may stand in an expression, where each variable was used twice and its value stands for it."""


class Kernel:
    """A PrimFunc under construction; parameters appear in the order in which they are declared."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._params: list[Buffer] = []
        self._blocks: list[list[Any]] = [[]]
        self._names = 0
        self._copies: dict[str, int] = {}

    # ---- declarations
    def param(self, name: str, shape: Sequence[Index], dtype: str) -> Buffer:
        """A tensor argument, row-major and contiguous."""
        buffer = tirx.decl_buffer(tuple(int64(s) for s in shape), dtype, name)
        self._params.append(buffer)
        return buffer

    def sizes(self, variables: Iterable[Expr]) -> None:
        """Arguments that are numbers: sizes known at run time."""
        self._params += variables

    def _alloc(self, shape: Sequence[Index], dtype: str, scope: str) -> Buffer:
        extents = [s.value if isinstance(s, tirx.IntImm) else s for s in shape]
        if any(isinstance(s, int) and s < 1 for s in extents):
            raise ValueError(f"a {scope} buffer of {dtype} has the shape {tuple(shape)}: each extent must be at least 1")
        self._names += 1
        buffer = tirx.decl_buffer(tuple(int64(s) for s in shape), dtype, f"{scope}{self._names}", scope=scope)
        self._emit(tirx.AllocBuffer(buffer))
        return buffer

    def registers(self, count: int, dtype: str, lanes: int) -> Buffer:
        """``count`` vectors that LLVM keeps in registers as long as they are indexed by constants."""
        return self._alloc((count * lanes,), dtype, "local")

    def scratch(self, size: Index | Sequence[Index], dtype: str) -> Buffer:
        """Memory of this call (inside a parallel loop: of this thread), from TVM's pool."""
        return self._alloc(size if isinstance(size, Sequence) else (size,), dtype, "global")

    def flat(self, buffer: Buffer) -> Buffer:
        """The same memory under one index."""
        size = int64(1)
        for extent in buffer.shape:
            size = size * extent
        self._names += 1
        view = tirx.decl_buffer((size,), buffer.dtype, f"{buffer.name}_flat{self._names}",
                                data=tirx.buffer.buffer_data(buffer))
        self._emit(tirx.DeclBuffer(view, data=tirx.buffer.buffer_data(buffer)))
        return view

    # ---- statements
    def _emit(self, statement: Any) -> None:
        self._blocks[-1].append(statement)

    def _close(self) -> Any:
        block = self._blocks.pop()
        return block[0] if len(block) == 1 else tirx.SeqStmt(block) if block else tirx.Evaluate(0)

    def let(self, value: Expr, name: str = "v") -> Expr:
        """Evaluate once, here.

        TVM's simplifiers put the value of a variable in every use, and an arithmetic of many steps doubles with each of them.
        Where that would grow long, a float is stored: in registers, says LLVM, at some cost.
        """
        value = int64(value)
        dtype, copies = str(value.ty.dtype).partition("x")[0], 0
        if dtype != "int64":  # indices stay short
            copies = 1 + 2 * sum(self._copies.get(v.name, 0) for v in tirx.analysis.undefined_vars(value))
        if copies > _MOST_COPIES and dtype in ("float32", "float64"):
            kept = self.registers(1, dtype, _lanes(value))
            self.store(kept, 0, value)
            return load(kept, 0, _lanes(value))
        self._names += 1
        var = tirx.Var(f"{name}{self._names}", value.ty)
        self._copies[var.name] = copies
        self._emit(tirx.Bind(var, value))
        return var

    def number(self, value: Index) -> Index:
        """An int64 evaluated once, here. TVM's simplifiers do not look into it: what is computed of sizes that are not known
        would be computed, and simplified, in every index."""
        if isinstance(value, int | tirx.IntImm):
            return value
        kept = self.registers(1, "int64", 1)
        self.store(kept, 0, value)
        return load(kept, 0)

    def store(self, buffer: Buffer, index: Index | tuple[Index, ...], value: Expr) -> None:
        """Store a scalar or, from ``index`` of the last axis on, a vector."""
        indices = [int64(i) for i in (index if isinstance(index, tuple) else (index,))]
        lanes = _lanes(value)
        if lanes > 1:
            indices[-1] = tirx.Ramp(indices[-1], int64(1), lanes)
        self._emit(tirx.BufferStore(buffer, value, indices))

    @contextmanager
    def loop(self, extent: Index, *, parallel: bool = False) -> Iterator[Expr]:
        self._names += 1
        var = tirx.Var(f"i_{self._names}", "int64")  # WGSL has a type i32
        self._blocks.append([])
        yield var
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
        body = self._close()
        self._emit(tirx.For(var, int64(0), int64(extent), kind, body))

    @contextmanager
    def range(self, low: Index, high: Index) -> Iterator[Expr]:
        """A serial loop over low <= i < high."""
        low = self.let(low, "low")
        with self.loop(maximum(int64(high) - low, 0)) as i:
            yield self.let(low + i, "at")

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        self._blocks.append([])
        yield
        body = self._close()
        self._emit(tirx.IfThenElse(condition, body, None))

    def either(self, condition: Expr, yes: Callable[[], None], no: Callable[[], None]) -> None:
        self._blocks.append([])
        yes()
        then = self._close()
        self._blocks.append([])
        no()
        self._emit(tirx.IfThenElse(condition, then, self._close()))

    # ---- work for several threads
    def share(self, threads: int, total: Index, body: Callable[[Expr, Expr], None]) -> None:
        """``body(first, last)`` on each thread, an equal contiguous part of 0..total each."""
        total = int64(total)
        if threads == 1:
            body(int64(0), total)
            return
        with self.loop(threads, parallel=True) as thread:
            body(self.let(floor_div(thread * total, threads), "first"),
                 self.let(floor_div((thread + 1) * total, threads), "last"))

    def rows(self, threads: int, total: Index, work_per_row: Index, body: Callable[[Expr], None],
             cutoff: int = 16384) -> None:
        """``body(row)`` for every row: on this thread alone when the work is small, else on all."""

        def span(first: Expr, last: Expr) -> None:
            with self.range(first, last) as row:
                body(row)

        total = int64(total)
        if threads == 1:
            span(int64(0), total)
        else:
            self.either(total * work_per_row < cutoff, lambda: span(int64(0), total),
                        lambda: self.share(threads, total, span))

    def build(self) -> tirx.PrimFunc:
        # Relax looks for a root block in every function of one operand
        body = SBlockRealize([], True, SBlock([], [], [], "root", self._close()))
        attrs = tvm.ir.make_node("ir.DictAttrs", **{
            "global_symbol": self.name, "s_tir": True, "tirx.noalias": True, "tirx.is_scheduled": True,
            "op_pattern": _OPAQUE,
        })
        return tirx.PrimFunc(self._params, body, attrs=attrs)


# ---- expressions
def _lanes(value: Expr) -> int:
    text = str(value.ty.dtype) if hasattr(value.ty, "dtype") else str(value.dtype)
    return int(text.split("x")[1]) if "x" in text else 1


def bit_width(value: Expr) -> int:
    """Bits of a vector."""
    return int(value.ty.dtype.bits) * _lanes(value)


def vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def load(buffer: Buffer, index: Index | tuple[Index, ...], lanes: int = 1) -> Expr:
    """A scalar, or ``lanes`` consecutive elements from ``index`` of the last axis on."""
    indices = [int64(i) for i in (index if isinstance(index, tuple) else (index,))]
    if lanes > 1:
        indices[-1] = tirx.Ramp(indices[-1], int64(1), lanes)
    return tirx.BufferLoad(buffer, indices)


def splat(value: Expr | float, lanes: int) -> Expr:
    if isinstance(value, int | float):
        value = tirx.FloatImm("float32", float(value))
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def splat_int(value: Expr | int, lanes: int, dtype: str = "int32") -> Expr:
    if isinstance(value, int):
        value = tirx.IntImm(dtype, value)
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def cast(dtype: str, value: Expr) -> Expr:
    return tirx.Cast(vector(dtype, _lanes(value)), value)


def bits(dtype: str, value: Expr) -> Expr:
    """The same bits as another type of the same total width."""
    return T.reinterpret(dtype, value)


def intrinsic(dtype: str, name: str, *operands: Expr) -> Expr:
    return T.call_llvm_pure_intrin(dtype, name, *operands)


def at_least(low: Expr, value: Expr) -> Expr:
    """The larger of two; NaN where ``value`` is (``max`` gives ``low``)."""
    return tirx.Select(value < low, low, value)


def at_most(high: Expr, value: Expr) -> Expr:
    """The smaller of two; NaN where ``value`` is."""
    return tirx.Select(value > high, high, value)


def reduce_max(value: Expr) -> Expr:
    """The largest lane of an f32 vector that is no NaN."""
    return intrinsic("float32", "llvm.vector.reduce.fmax", value)


def reduce_max_int(value: Expr) -> Expr:
    return intrinsic("int32", "llvm.vector.reduce.smax", value)


def reduce_sum(value: Expr) -> Expr:
    """The sum over the lanes of an f32 vector, as a tree."""
    lanes = _lanes(value)
    parts = [tirx.Shuffle([value], [tirx.IntImm("int32", i)]) for i in range(lanes)]
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [parts[i] + parts[i + half] for i in range(half)]
    return parts[0]


def reduce_sum_int(value: Expr) -> Expr:
    return intrinsic("int32", "llvm.vector.reduce.add", value)


def absolute(value: Expr) -> Expr:
    lanes = _lanes(value)
    masked = bits(vector("int32", lanes), value) & splat_int(0x7FFFFFFF, lanes)
    return bits(vector("float32", lanes), masked)


def rounded(value: Expr) -> Expr:
    """An f32 product as it would be stored: not fused into the sum that reads it."""
    return intrinsic(vector("float32", _lanes(value)), "llvm.arithmetic.fence", value)


def round_even(value: Expr) -> Expr:
    return tirx.nearbyint(value)


def exp(k: Kernel, value: Expr) -> Expr:
    """exp of an f32 vector, relative error about 2e-7; 0 below -87.7, infinity above 88.4, NaN of NaN."""
    lanes = _lanes(value)

    def c(x: float) -> Expr:
        return splat(x, lanes)

    # beyond these the exponent is that of 0 and of infinity
    x = k.let(at_most(c(88.5), at_least(c(-88.0), value)))
    # adding 1.5 * 2**23 rounds to an integer that can be read off the bits
    count = k.let(bits(vector("int32", lanes), x * c(1.44269504088896) + c(12582912.0)) - splat_int(0x4B400000, lanes))
    n = k.let(cast("float32", count))
    r = k.let((x - n * c(0.693359375)) - n * c(-2.12194440e-4))
    p = c(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + c(term)
    p = p * (r * r) + r + c(1.0)
    return k.let(p * bits(vector("float32", lanes), (count + splat_int(127, lanes)) << splat_int(23, lanes)))


def sigmoid(k: Kernel, value: Expr) -> Expr:
    one = splat(1.0, _lanes(value))
    return k.let(one / (one + exp(k, splat(0.0, _lanes(value)) - value)))


def tanh(k: Kernel, value: Expr) -> Expr:
    """tanh of an f32 vector, absolute error about 1e-7."""
    lanes = _lanes(value)
    return k.let(splat(1.0, lanes) - splat(2.0, lanes) / (splat(1.0, lanes) + exp(k, value * splat(2.0, lanes))))


def erf(k: Kernel, value: Expr) -> Expr:
    """erf of an f32 vector, absolute error about 5e-7 (Abramowitz and Stegun 7.1.26)."""
    lanes = _lanes(value)

    def c(x: float) -> Expr:
        return splat(x, lanes)

    a = k.let(absolute(value))
    t = k.let(c(1.0) / (c(1.0) + c(0.3275911) * a))
    p = c(1.061405429)
    for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = p * t + c(term)
    y = k.let(c(1.0) - p * t * exp(k, c(0.0) - a * a))
    return k.let(tirx.Select(value < c(0.0), c(0.0) - y, y))


def sin_cos(k: Kernel, angle: Expr, fence: Callable[[Expr], Expr] = rounded) -> tuple[Expr, Expr]:
    """sin and cos of an f32 vector, absolute error about 1e-7 for |angle| < 1e5 (positions times frequencies). ``fence`` keeps
    the angle a number of its own."""
    lanes = _lanes(angle)

    def c(x: float) -> Expr:
        return splat(x, lanes)

    def i(x: int) -> Expr:
        return splat_int(x, lanes)

    angle = k.let(fence(angle))  # fused into the reduction it would be another one
    count = k.let(bits(vector("int32", lanes), angle * c(0.6366197723675814) + c(12582912.0)) - i(0x4B400000))
    n = k.let(cast("float32", count))
    r = angle
    for part in _HALF_PI:  # each part has few bits, so that n * part is exact with or without fused multiply-add
        r = k.let(r - n * c(part))
    z = k.let(r * r)
    s = k.let(((c(-1.9515295891e-4) * z + c(8.3321608736e-3)) * z + c(-1.6666654611e-1)) * z * r + r)
    q = k.let(((c(2.443315711809948e-5) * z + c(-1.388731625493765e-3)) * z + c(4.166664568298827e-2)) * (z * z)
              - c(0.5) * z + c(1.0))
    odd = tirx.EQ(count & i(1), i(1))
    sine = k.let(bits(vector("int32", lanes), tirx.Select(odd, q, s)))
    cosine = k.let(bits(vector("int32", lanes), tirx.Select(odd, s, q)))
    sine_sign = (count & i(2)) << i(30)
    cosine_sign = ((count + i(1)) & i(2)) << i(30)
    real = vector("float32", lanes)
    return k.let(bits(real, sine ^ sine_sign)), k.let(bits(real, cosine ^ cosine_sign))


def _split_half_pi() -> tuple[float, ...]:
    parts, rest = [], math.pi / 2
    for _ in range(4):
        mantissa, exponent = math.frexp(rest)
        part = math.ldexp(math.floor(mantissa * 256) / 256, exponent)
        parts.append(part)
        rest -= part
    return (*parts, rest)


_HALF_PI = _split_half_pi()


def f16_to_f32(value: Expr, native: bool) -> Expr:
    """Widen f16; without hardware support by shifting the bits (finite values only)."""
    if native:
        return cast("float32", value)
    lanes = _lanes(value)
    raw = tirx.Cast(vector("int32", lanes), bits(vector("uint16", lanes), value))
    magnitude = bits(vector("float32", lanes), (raw & splat_int(0x7FFF, lanes)) << splat_int(13, lanes))
    sign = (raw & splat_int(0x8000, lanes)) << splat_int(16, lanes)
    scaled = magnitude * splat(2.0**112, lanes)
    return bits(vector("float32", lanes), bits(vector("int32", lanes), scaled) | sign)


def f32_to_f16(value: Expr, native: bool) -> Expr:
    """Narrow to f16, round to nearest even; without hardware support in integers (finite, saturating to infinity)."""
    if native:
        return cast("float16", value)
    lanes = _lanes(value)

    def i(x: int) -> Expr:
        return splat_int(x, lanes)

    raw = bits(vector("int32", lanes), value)
    magnitude = raw & i(0x7FFFFFFF)
    # subnormal halves: adding 0.5 aligns the mantissa so that the f32 adder rounds for us
    small = bits(vector("int32", lanes), bits(vector("float32", lanes), magnitude) + splat(0.5, lanes)) - i(0x3F000000)
    normal = (magnitude + i(0xFFF - (112 << 23)) + ((magnitude >> i(13)) & i(1))) >> i(13)
    half = tirx.Select(magnitude < i(113 << 23), small, tirx.min(normal, i(0x7C00)))
    half = half | ((raw >> i(16)) & i(0x8000))
    return bits(vector("float16", lanes), tirx.Cast(vector("uint16", lanes), half))


def widen(value: Expr, native: bool) -> Expr:
    """f32, f16 or (in uint16) bf16 storage to f32."""
    kind, lanes = str(value.ty.dtype).split("x")[0], _lanes(value)
    if kind == "float32":
        return value
    if kind == "float16":
        return f16_to_f32(value, native)
    if kind == "uint16":
        return bits(vector("float32", lanes), cast("int32", value) << splat_int(16, lanes))
    raise ValueError(f"no storage type {kind!r}")
