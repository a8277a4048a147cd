"""Kernels against this machine's limits and NumPy, in the sizes of a 270M-parameter decoder.

    python benchmarks/kernels.py [--threads N] [--only SUBSTRING]

Kernels that stream weights or caches are judged by GB/s against a plain read of memory, the others by GFLOP/s against fused
multiply-adds in f32 (integer products can do better than that). The best of many short runs counts; ``~`` marks a line whose
median is more than 1.3 times it: something else was running. The last column compares the share of the limit with that of
the run before under the same conditions (history.jsonl, which grows by a line a run).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
parser.add_argument("--only", default="", help="cases whose name contains this")
options = parser.parse_args()
os.environ |= {"TVM_NUM_THREADS": str(options.threads), "TVM_BIND_THREADS": "0"}  # read when TVM starts
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = str(options.threads)

import history  # noqa: E402
import tvm  # noqa: E402
from wasat.backends.tvm.cpu.kernels.attention import Attention, CachedAttention, attention, cached_attention  # noqa: E402
from wasat.backends.tvm.cpu.kernels.cache import Cache, cache_shape  # noqa: E402
from wasat.backends.tvm.cpu.kernels.emit import Kernel, int64, load, reduce_sum, splat  # noqa: E402
from wasat.backends.tvm.cpu.kernels.flash import Scores  # noqa: E402
from wasat.backends.tvm.cpu.kernels.glu import Glu, glu  # noqa: E402
from wasat.backends.tvm.cpu.kernels.isa import isa_of  # noqa: E402
from wasat.backends.tvm.cpu.kernels.linear_float import Linear, Weights, linear  # noqa: E402
from wasat.backends.tvm.cpu.kernels.linear_int import LinearInt, linear_int  # noqa: E402
from wasat.backends.tvm.cpu.kernels.norm import Norm, norm  # noqa: E402
from wasat.backends.tvm.cpu.kernels.pack import float_shape, int_shape, storage_dtype  # noqa: E402
from wasat.backends.tvm.cpu.kernels.quantize import QuantizeRows, quantize_rows, quantize_rows_reference  # noqa: E402
from wasat.backends.tvm.cpu.kernels.rope import Rope, Rotary, rope  # noqa: E402
from wasat.backends.tvm.targets import cpu  # noqa: E402
from wasat.runtime.device import tensor_of, zeros  # noqa: E402

TARGET = cpu(threads=options.threads).tvm
ISA, THREADS = isa_of(TARGET), options.threads
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Case:
    """``amount`` of a call is bytes where ``unit`` is GB/s, operations where it is GFLOP/s; ``numpy`` does the same in f32."""

    name: str
    unit: str
    amount: float
    run: Callable[[], Any]
    numpy: Callable[[], Any] | None = None


def timed(call: Callable[[], Any], budget: float = 0.5) -> tuple[float, float]:
    """Best and median seconds of a call, in runs of at least 100 microseconds."""
    call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    calls = max(1, int(1e-4 / once))
    runs = []
    for _ in range(min(300, max(5, int(budget / (calls * once))))):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        runs.append((time.perf_counter() - start) / calls)
    return min(runs), median(runs)


def compiled(func: Any) -> Any:
    return tvm.tirx.build(tvm.IRModule({"main": func}), target=TARGET)["main"]


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


def limits() -> Iterator[Case]:
    """What the machine can do: read memory, and multiply and add in registers."""
    lanes, count = ISA.lanes, 1 << 26
    k = Kernel("read")
    x, y = k.param("x", (count,), "float32"), k.param("y", (THREADS,), "float32")
    with k.loop(THREADS, parallel=True) as t:
        acc = k.registers(8, "float32", lanes)
        for i in range(8):
            k.store(acc, i * lanes, splat(0.0, lanes))
        part = count // THREADS // (8 * lanes)
        with k.loop(part) as j:
            for i in range(8):
                at = (t * part + j) * (8 * lanes) + i * lanes
                k.store(acc, i * lanes, load(acc, i * lanes, lanes) + load(x, at, lanes))
        total = load(acc, 0, lanes)
        for i in range(1, 8):
            total = total + load(acc, i * lanes, lanes)
        k.store(y, t, reduce_sum(k.let(total)))
    read_from = zeros("float32", (count,))
    read_from.array[...] = 1.0  # memory never written is one shared page of zeros, read from cache
    read, out = compiled(k.build()), zeros("float32", (THREADS,)).tensor
    yield Case("limit: read memory", "GB/s", 4.0 * count, lambda: read(read_from.tensor, out))

    chains, steps = 12, 200000
    k = Kernel("fma")
    x, y = k.param("x", (2 * lanes,), "float32"), k.param("y", (THREADS * lanes,), "float32")
    with k.loop(THREADS, parallel=True) as t:
        acc = k.registers(chains, "float32", lanes)
        a, b = (k.let(load(x, i * lanes, lanes)) for i in range(2))
        for i in range(chains):
            k.store(acc, i * lanes, a * splat(float(i), lanes))
        with k.loop(int64(steps)):
            for i in range(chains):
                k.store(acc, i * lanes, load(acc, i * lanes, lanes) * a + b)
        total = load(acc, 0, lanes)
        for i in range(1, chains):
            total = total + load(acc, i * lanes, lanes)
        k.store(y, t * lanes, total)
    fma, factors = compiled(k.build()), tensor_of(np.full(2 * lanes, 0.5, np.float32))
    sums = zeros("float32", (THREADS * lanes,)).tensor
    yield Case("limit: multiply and add", "GFLOP/s", 2.0 * THREADS * lanes * chains * steps, lambda: fma(factors, sums))


def matrices() -> Iterator[Case]:
    for weights in ("float32", "float16", "bfloat16", "int8", "int4"):
        yield from matrix(weights, 1, 262144, 640)  # larger than any cache
        yield from matrix(weights, 512, 4096, 640)


def matrix(weights: Weights, m: int, n: int, k: int) -> Iterator[Case]:
    x = f32(m, k)
    integers = weights.startswith("int")
    shape = int_shape(n, k, int(weights[3:]), ISA) if integers else float_shape(n, k, ISA)
    w = zeros("uint8" if integers else storage_dtype(weights), shape)
    w.array[...] = 1  # the time does not depend on the values, but untouched pages would all be the same zeros
    dense = f32(n, k) if weights == "float32" else None
    ways = [("", linear, Linear, x)] + ([(" x int8", linear_int, LinearInt, quantize_rows_reference(x))] if integers else [])
    for suffix, build, desc, rows in ways:
        call, given = compiled(build(desc(ISA, n, k, weights, threads=THREADS))), tensor_of(rows)
        y = zeros("float32", (m, n)).tensor
        unit, amount = ("GB/s", float(w.array.nbytes)) if m == 1 else ("GFLOP/s", 2.0 * m * n * k)
        yield Case(
            f"linear {weights}{suffix} {m}x{n}x{k}", unit, amount, lambda call=call, given=given, y=y: call(given, w.tensor, y),
            None if dense is None else lambda: x @ dense.T,
        )  # fmt: skip


def rows(m: int = 512) -> Iterator[Case]:
    """Kernels that pass over rows once: bytes read and written."""
    x, wide, branch, weight = f32(m, 640), f32(m, 4096), f32(m, 640), f32(640)
    tx, tw, tb, tg = (tensor_of(a) for a in (x, wide, branch, weight))

    def kernel(func: Any, *args: Any) -> Callable[[], Any]:
        call = compiled(func)
        return lambda: call(*args)

    def q(k: int) -> Any:
        return zeros("int32", (m, k // 32, 10)).tensor

    def out(*shape: int) -> Any:
        return zeros("float32", shape).tensor

    def rms(v: np.ndarray) -> np.ndarray:
        y: np.ndarray = v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-6) * weight
        return y

    run = kernel(quantize_rows(QuantizeRows(ISA, 640, THREADS)), tx, q(640))
    yield Case(f"quantize {m}x640", "GB/s", x.nbytes * 1.3125, run)
    plain = Norm(ISA, 640, threads=THREADS)
    yield Case(f"rms_norm {m}x640", "GB/s", 2.0 * x.nbytes, kernel(norm(plain), tx, tg, out(m, 640)), lambda: rms(x))
    fused = Norm(ISA, 640, residual=True, pre_norm=True, quantize="yes", threads=THREADS)
    run = kernel(norm(fused), tx, tb, tg, tg, out(m, 640), q(640))
    yield Case(f"norm, sum, norm, quantize {m}x640", "GB/s", 3.3125 * x.nbytes, run, lambda: rms(x + rms(branch)))
    run = kernel(glu(Glu(ISA, 2048, "gelu_tanh", threads=THREADS)), tw, out(m, 2048))

    def gelu() -> np.ndarray:
        g, u = wide[:, :2048], wide[:, 2048:]
        y: np.ndarray = 0.5 * g * (1 + np.tanh(0.7978845608 * (g + 0.044715 * g * g * g))) * u
        return y

    yield Case(f"glu gelu_tanh {m}x4096", "GB/s", 1.5 * wide.nbytes, run, gelu)
    heads = tensor_of(f32(1, m, 4, 256))
    positions, freq = tensor_of(np.arange(m)[None]), tensor_of((1e4 ** (-np.arange(128) / 128)).astype(np.float32))
    run = kernel(rope(Rope(ISA, 4, Rotary(256, 256), threads=THREADS)), heads, positions, freq, out(1, m, 4, 256))
    yield Case(f"rope {m}x4x256", "GB/s", 8.0 * m * 1024, run)


def attentions() -> Iterator[Case]:
    h, g, d = 4, 1, 256
    full = compiled(attention(Attention(ISA, h, g, d, d, Scores(1 / 16), threads=THREADS)))
    q, k, v = f32(1, 512, h, d), f32(1, 512, g, d), f32(1, 512, g, d)
    args = [*(tensor_of(x) for x in (q, k, v)), zeros("float32", q.shape).tensor]
    yield Case("attention 512 causal", "GFLOP/s", 2.0 * 512 * 513 * h * d, lambda: full(*args))
    masked = compiled(attention(Attention(ISA, h, g, d, d, Scores(1 / 16, causal=False), "11", THREADS)))
    i, j = np.arange(512)[:, None], np.arange(512)
    for prefix in (64, 512):
        seen = (j <= i) | ((i < prefix) & (j < prefix))
        mask = tensor_of(np.where(seen, np.float32(0), np.float32(-np.inf))[None, None])
        amount = 4.0 * seen.sum() * h * d
        given = [*args[:3], mask, args[3]]
        yield Case(f"attention 512, a prefix of {prefix}", "GFLOP/s", amount, lambda given=given: masked(*given))
    for dtype in ("float32", "float16"):
        cache = Cache(g, d, d, dtype=dtype)  # type: ignore[arg-type]
        shapes = [cache_shape(kind, 1, g, 4096, d) for kind in ("k", "v")]  # type: ignore[arg-type]
        held = [tensor_of((0.1 * f32(*shape)).astype(dtype)) for shape in shapes]
        for s, past in ((512, 0), (512, 3584), (1, 511), (1, 4095)):
            desc = CachedAttention(ISA, h, cache, Scores(1 / 16), decode=s == 1, threads=THREADS)
            call, queries = compiled(cached_attention(desc)), f32(1, s, h, d)
            given = [tensor_of(queries), tensor_of(np.array([past])), *held, zeros("float32", queries.shape).tensor]
            seen = s * past + s * (s + 1) / 2
            held_bytes = 2.0 * (past + 1) * d * np.dtype(dtype).itemsize
            unit, amount = ("GB/s", held_bytes) if s == 1 else ("GFLOP/s", 4.0 * seen * h * d)
            yield Case(f"cached attention {dtype} {s} after {past}", unit, amount, lambda call=call, given=given: call(*given))


def main() -> None:
    print(f"{ISA.name}, {THREADS} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'kernel':44}{'microseconds':>14}{'rate':>18}{'of limit':>10}{'NumPy':>10}{'before':>10}")
    peak: dict[str, float] = {}
    conditions = {"isa": ISA.name, "threads": THREADS}
    before, shares = history.last("kernels", conditions) or {}, dict[str, float]()
    for group in (limits, matrices, rows, attentions):
        for case in group():
            if group is not limits and options.only not in case.name:
                continue
            best, middle = timed(case.run, 2.0 if group is limits else 0.5)
            rate = case.amount / best / 1e9
            peak.setdefault(case.unit, rate)
            ratio = f"{timed(case.numpy)[0] / best:8.1f} x" if case.numpy is not None else ""
            noisy = " ~" if middle > 1.3 * best else ""
            share = shares[case.name] = rate / peak[case.unit]
            was = before.get("figures", {}).get(case.name)
            change = f"{share / was:8.2f} x" if was else ""
            line = f"{case.name:44}{best * 1e6:14.1f}{rate:10.1f} {case.unit:7}{share:10.0%}{ratio:>10}{change:>10}{noisy}"
            print(line, flush=True)
    if before:
        print(f"before: {before['commit']}, {before['at']}")
    history.append("kernels", conditions, shares)


if __name__ == "__main__":
    main()
