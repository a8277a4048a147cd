"""Launches, workgroups and their memory, on top of the CPU's small builder of TensorIR.

A function holds one or more launches, each over a grid of workgroups. Threads of a workgroup share memory and wait for each
other at barriers, which must stand where all of them come by: outside of conditions and loops that depend on the thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tvm import ir, tirx

from ...cpu.kernels.emit import Buffer, Expr, Index, bits, ceil_div, floor_div, int64, load, maximum, splat
from ...cpu.kernels.emit import Kernel as Emitter
from ..limits import Limits

_JOINED = 8
"""Numbers that a thread joins between two barriers, which cost more than it does."""
LOWEST = -3.4028234663852886e38
"""The lowest f32: what is smaller than all numbers, in languages without infinity."""


class Kernel(Emitter):
    """A PrimFunc of launches under construction."""

    def __init__(self, name: str, limits: Limits) -> None:
        super().__init__(name)
        self.limits = limits

    @contextmanager
    def launch(self, grid: Index | Sequence[Index], threads: int) -> Iterator[tuple[list[Expr], Expr]]:
        """The numbers of the workgroup, and the thread's own. The grid's first axis may have any size, the second one below
        2^16; WebGPU has no third one left."""
        if threads > self.limits.threads:
            raise ValueError(f"{self.name}: a workgroup of {threads} threads, where {self.limits.threads} are the most")
        extents = [int64(e) for e in (grid if isinstance(grid, Sequence) else (grid,))]
        axes = [(tirx.Var(f"block_{a}", "int64"), f"blockIdx.{a}", e) for a, e in zip("xyz", extents)]
        axes.append((tirx.Var("thread", "int64"), "threadIdx.x", int64(threads)))
        self._blocks.append([])
        yield [v for v, _, _ in axes[:-1]], axes[-1][0]
        body = self._close()
        for v, tag, extent in reversed(axes):
            axis = tirx.IterVar(ir.Range(int64(0), extent), v, tirx.IterVar.ThreadIndex, tag)
            body = tirx.AttrStmt(axis, "thread_extent", extent, body)
        self._emit(body)

    @contextmanager
    def each(self, total: Index, threads: int | None = None) -> Iterator[Expr]:
        """A launch of one thread for each of 0..total."""
        n = threads or min(64, self.limits.threads)
        with self.launch(ceil_div(total, n), n) as ([block], thread):
            at = self.let(block * n + thread, "at")
            with self.when(at < int64(total)):
                yield at

    def copy(self, value: Expr) -> Expr:
        """The value in a register, as it is now: what stands behind a ``let``, TVM repeats wherever that is used."""
        dtype = str(value.ty.dtype)
        kept = self.registers(1, dtype, 1)
        self.store(kept, 0, value)
        return load(kept, 0)

    def side_by_side(self, buffer: Buffer, index: Index, count: int) -> list[Expr]:
        """``count`` elements from ``index`` on, a multiple of ``count`` or of 16 bytes: read 16 bytes at once where the device
        does, but for elements of 16 bits, of which TVM has no such vectors in every place."""
        width = 4
        if not self.limits.vectors or count % width or int(buffer.dtype.bits) != 32:
            return [load(buffer, int64(index) + t) for t in range(count)]
        memory = self.registers(count, str(buffer.dtype), 1)
        for t in range(0, count, width):
            # TVM reads 16 bytes only where it sees that they begin at a multiple of 16
            self.store(memory, t, load(buffer, floor_div(int64(index) + t, width) * width, width))
        return [load(memory, t) for t in range(count)]

    def kept(self, inside: Expr | None, value: Expr) -> Expr:
        """The value where ``inside`` (None: everywhere), else 0. It is read in any case: a choice of loads would be a branch,
        which PoCL 3.0 gets wrong before a barrier."""
        return value if inside is None else self.copy(tirx.Select(inside, self.copy(value), zero()))

    def put(self, buffer: Buffer, index: Index, value: Expr) -> None:
        """Stores an f32 as the buffer has it, rounded to nearest even."""
        dtype = str(buffer.dtype)
        if dtype == "bfloat16":
            raw = self.copy(bits("uint32", self.copy(value)))
            up = tirx.IntImm("uint32", 0x7FFF) + ((raw >> tirx.IntImm("uint32", 16)) & tirx.IntImm("uint32", 1))
            nan = (raw & tirx.IntImm("uint32", 0x7FFFFFFF)) > tirx.IntImm("uint32", 0x7F800000)
            # a GPU's NaN is all ones, which rounding would carry into the sign
            rounded = tirx.Select(nan, raw | tirx.IntImm("uint32", 0x400000), raw + up) >> tirx.IntImm("uint32", 16)
            value = tirx.reinterpret("bfloat16", tirx.Cast("uint16", rounded))
        elif dtype != "float32":
            value = tirx.Cast(dtype, value)
        self.store(buffer, index, value)

    def shared(self, size: int, dtype: str = "float32") -> Buffer:
        """Memory of the workgroup."""
        return self._alloc((size,), dtype, "shared")

    def barrier(self) -> None:
        """All threads of the workgroup have come here, and see what the others stored before."""
        self._emit(tirx.Evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared")))

    def strided(self, thread: Expr, threads: int, total: int) -> Iterator[Expr]:
        """The numbers below ``total`` that are the thread's, unrolled; the last ones under a condition."""
        for i in range(-(-total // threads)):
            at = self.let(thread + i * threads, "at")
            if (i + 1) * threads <= total:
                yield at
            else:
                with self.when(at < total):
                    yield at

    def reduce(
        self, memories: Sequence[Buffer], thread: Expr, lane: Expr, lanes: int, values: Sequence[Expr],
        join: Callable[[Expr, Expr], Expr],
    ) -> None:  # fmt: skip
        """Joins each of ``values`` over the ``lanes`` threads (a power of two) of a group, of which ``lane`` is one's number.
        A memory of each holds a number per thread; results are where the groups' first threads put theirs."""
        for memory, value in zip(memories, values):
            self.store(memory, thread, value)
        while lanes > 1:
            before, lanes = lanes, -(-lanes // _JOINED)
            self.barrier()
            with self.when(lane < lanes):
                for memory in memories[: len(values)]:
                    joined = load(memory, thread)
                    for i in range(lanes, before, lanes):
                        joined = join(joined, load(memory, thread + i))
                    self.store(memory, thread, joined)
        self.barrier()


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def as_f32(value: Expr) -> Expr:
    """A float widened. bf16 by its bits: TVM leaves casts of it as they are where they stand behind a ``let``, and computes
    with the bits as with a whole number."""
    dtype = str(value.ty.dtype)
    if dtype == "bfloat16":
        return bits("float32", tirx.Cast("uint32", tirx.reinterpret("uint16", value)) << tirx.IntImm("uint32", 16))
    return value if dtype == "float32" else tirx.Cast("float32", value)


def zero() -> Expr:
    return splat(0.0, 1)


def clamped(index: Expr, size: Index) -> Expr:
    """The index, if it is below ``size``, else the last one below it."""
    return tirx.min(index, maximum(int64(size) - 1, 0))
