"""A number and the squares of a tensor's elements, summed: a step of the length of all gradients."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from .emit import Buffer, Expr, Kernel, floor_div, load, reduce_sum, splat, symbol

_SUMS = 4  # vectors of partial sums, so that one addition need not wait for the last
_CUTOFF = 16384  # elements below which a second thread costs more than it saves


@dataclass(frozen=True)
class SquareSum:
    """``rank``: axes of the tensor. ``lanes``: f32 values per vector."""

    rank: int
    lanes: int
    threads: int = 1

    @property
    def name(self) -> str:
        return f"square_sum_{self.rank}d"


def square_sum(desc: SquareSum) -> tirx.PrimFunc:
    """PrimFunc(x f32[...], before f32[], after f32[]): after = before + sum(x * x); sizes are known when it runs."""
    kernel = Kernel(desc.name)
    shape = [symbol(f"n{i}") for i in range(desc.rank)]
    x, before, after = (kernel.param(name, s, "float32") for name, s in (("x", shape), ("before", ()), ("after", ())))
    flat = kernel.flat(x)
    total: Expr = 1
    for n in shape:
        total = total * n

    def across(threads: int) -> None:
        parts = kernel.scratch(threads, "float32")
        with kernel.loop(threads, parallel=threads > 1) as thread:
            first, last = (kernel.let(floor_div((thread + i) * total, threads)) for i in range(2))
            kernel.store(parts, thread, _part(kernel, flat, first, last, desc.lanes))
        result = load(before, ())
        for i in range(threads):
            result = result + load(parts, i)
        kernel.store(after, (), result)

    if desc.threads == 1:
        across(1)
    else:
        kernel.either(total < _CUTOFF, lambda: across(1), lambda: across(desc.threads))
    return kernel.build()


def _part(kernel: Kernel, x: Buffer, first: Expr, last: Expr, lanes: int) -> Expr:
    """The sum of x[i] ** 2 over first <= i < last."""
    step = _SUMS * lanes
    sums, rest = kernel.registers(_SUMS, "float32", lanes), kernel.registers(1, "float32", 1)
    for at in range(0, step, lanes):
        kernel.store(sums, at, splat(0.0, lanes))
    kernel.store(rest, 0, splat(0.0, 1))
    whole = kernel.let(floor_div(last - first, step))
    with kernel.loop(whole) as i:
        for at in range(0, step, lanes):
            v = kernel.let(load(x, first + i * step + at, lanes))
            kernel.store(sums, at, load(sums, at, lanes) + v * v)
    with kernel.range(first + whole * step, last) as i:
        v = kernel.let(load(x, i))
        kernel.store(rest, 0, load(rest, 0) + v * v)
    together = load(sums, 0, lanes)
    for at in range(lanes, step, lanes):
        together = together + load(sums, at, lanes)
    return reduce_sum(kernel.let(together)) + load(rest, 0)
