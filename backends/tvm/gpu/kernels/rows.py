"""Rows that a workgroup reads together: normalisations, softmax, and rounding to the integers of quantized products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tvm import tirx

from ...cpu.kernels.emit import Expr, bits, ceil_div, exp, floor_div, floor_mod, int64, load, minimum, splat, symbol
from ...cpu.kernels.quantize import LEAST
from ..limits import Limits
from .emit import LOWEST, Kernel, as_f32, power_of_two, zero


@dataclass(frozen=True)
class Norm:
    """RMS or layer norm of x[m, n]; ``residual``: of the sum with another x, which is a result as well."""

    limits: Limits
    n: int
    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    weight: bool = True
    bias: bool = False
    residual: bool = False
    dtype: str = "float32"

    @property
    def name(self) -> str:
        parts = [f"{self.kind}_norm_{self.n}"]
        return "_".join(parts + [p for p in ("weight", "bias", "residual") if getattr(self, p)])


class _Row:
    """One row of a workgroup of ``threads``: sums over what its elements give."""

    def __init__(self, kernel: Kernel, thread: Expr, threads: int, n: Expr | int) -> None:
        self.kernel, self.thread, self.threads, self.n = kernel, thread, threads, n
        self.memory = kernel.shared(threads)
        self.own = kernel.registers(1, "float32", 1)

    def each(self, body: Callable[[Expr], None]) -> None:
        k = self.kernel
        with k.loop(ceil_div(self.n, self.threads)) as i:
            j = k.let(i * self.threads + self.thread, "j")
            with k.when(j < int64(self.n)):
                body(j)

    def fold(self, begin: Expr, value: Callable[[Expr], Expr], join: Callable[[Expr, Expr], Expr]) -> Expr:
        """``value`` of every element, joined: the same in each thread."""
        k = self.kernel
        k.store(self.own, 0, begin)
        self.each(lambda j: k.store(self.own, 0, join(load(self.own, 0), value(j))))
        k.reduce([self.memory], self.thread, self.thread, self.threads, [load(self.own, 0)], join)
        k.store(self.own, 0, load(self.memory, 0))
        k.barrier()  # before the memory is written again
        return k.copy(load(self.own, 0))


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def norm(d: Norm) -> tirx.PrimFunc:
    """PrimFunc(x [m, n], [other [m, n]], [weight [n]], [bias [n]], [sum [m, n]], y [m, n])."""
    kernel = Kernel(d.name, d.limits)
    m, n = symbol("m"), d.n
    x = kernel.param("x", (m, n), d.dtype)
    other = kernel.param("other", (m, n), d.dtype) if d.residual else None
    weight = kernel.param("weight", (n,), d.dtype) if d.weight else None
    bias = kernel.param("bias", (n,), d.dtype) if d.bias else None
    total = kernel.param("sum", (m, n), d.dtype) if d.residual else None
    y = kernel.param("y", (m, n), d.dtype)
    x, y = kernel.flat(x), kernel.flat(y)
    other, total = (b if b is None else kernel.flat(b) for b in (other, total))
    threads = min(d.limits.threads, power_of_two(-(-n // 4)))
    with kernel.launch(m, threads) as ([at], thread):
        row = _Row(kernel, thread, threads, n)
        base = kernel.let(at * n, "base")

        def read(j: Expr) -> Expr:
            return as_f32(load(x if total is None else total, base + j))

        if total is not None and other is not None:  # a thread reads what it wrote itself
            row.each(lambda j: kernel.put(total, base + j, as_f32(load(x, base + j)) + as_f32(load(other, base + j))))
        count = splat(float(n), 1)
        if d.kind == "layer":
            mean = kernel.copy(row.fold(zero(), read, _add) / count)

            def deviation(j: Expr) -> Expr:
                return kernel.let(read(j) - mean)
        else:

            def deviation(j: Expr) -> Expr:
                return kernel.let(read(j))

        def square(j: Expr) -> Expr:
            v = deviation(j)
            return v * v

        scale = kernel.copy(splat(1.0, 1) / tirx.sqrt(row.fold(zero(), square, _add) / count + splat(d.eps, 1)))

        def write(j: Expr) -> None:
            value = deviation(j) * scale
            if weight is not None:
                value = value * as_f32(load(weight, j))
            if bias is not None:
                value = value + as_f32(load(bias, j))
            kernel.put(y, base + j, value)

        row.each(write)
    return kernel.build()


@dataclass(frozen=True)
class Softmax:
    """Of the rows of x[m, n]; ``n`` None: known at run time."""

    limits: Limits
    n: int | None
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"softmax_{self.n or 'n'}"


def softmax(d: Softmax) -> tirx.PrimFunc:
    """PrimFunc(x [m, n], y [m, n])."""
    kernel = Kernel(d.name, d.limits)
    m, n = symbol("m"), symbol("n") if d.n is None else int64(d.n)
    x = kernel.flat(kernel.param("x", (m, n), d.dtype))
    y = kernel.flat(kernel.param("y", (m, n), d.dtype))
    threads = d.limits.threads if d.n is None else min(d.limits.threads, power_of_two(d.n))
    with kernel.launch(m, threads) as ([at], thread):
        row = _Row(kernel, thread, threads, n)
        base = kernel.let(at * n, "base")
        top = row.fold(splat(LOWEST, 1), lambda j: kernel.let(as_f32(load(x, base + j))), tirx.max)

        def weight(j: Expr) -> Expr:
            return exp(kernel, kernel.let(as_f32(load(x, base + j)) - top))

        total = row.fold(zero(), weight, _add)
        row.each(lambda j: kernel.put(y, base + j, weight(j) / total))
    return kernel.build()


@dataclass(frozen=True)
class RoundRows:
    """Rows of x[m, k] as they are once quantized to int8 in blocks of ``block``, in f32."""

    limits: Limits
    k: int
    block: int = 32
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"round_rows_{self.k}_{self.block}"


def round_rows(d: RoundRows) -> tirx.PrimFunc:
    """PrimFunc(x [m, k], y f32[m, k]): a thread for each block. One that holds NaN or infinity becomes NaN."""
    kernel = Kernel(d.name, d.limits)
    m, blocks = symbol("m"), -(-d.k // d.block)
    x = kernel.flat(kernel.param("x", (m, d.k), d.dtype))
    y = kernel.flat(kernel.param("y", (m, d.k), "float32"))
    with kernel.each(m * blocks) as at:
        first = kernel.let(floor_mod(at, blocks) * d.block, "first")
        base = kernel.let(floor_div(at, blocks) * d.k + first, "base")
        count = minimum(d.k - first, d.block) if d.k % d.block else int64(d.block)
        top = kernel.registers(1, "int32", 1)  # magnitudes are ordered as their bits are, infinity and NaN last
        kernel.store(top, 0, tirx.IntImm("int32", LEAST))
        with kernel.loop(count) as j:
            value = kernel.let(as_f32(load(x, base + j)))
            kernel.store(top, 0, tirx.max(load(top, 0), bits("int32", value) & tirx.IntImm("int32", 0x7FFFFFFF)))
        largest = kernel.copy(bits("float32", kernel.copy(load(top, 0))))
        inverse = kernel.copy(splat(127.0, 1) / largest)
        scale = kernel.copy(largest / splat(127.0, 1))  # infinity times 0 is NaN
        with kernel.loop(count) as j:
            q = kernel.let(tirx.nearbyint(as_f32(load(x, base + j)) * inverse))
            kernel.store(y, base + j, q * scale)
    return kernel.build()
