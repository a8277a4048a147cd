"""A row gives the same bits alone and in a batch, in one piece and in chunks, prefilled and decoded, on any threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from decoder import Decoder
from kernel_help import build, each_isa, run, tensor
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.cpu.kernels.attention import CachedAttention, MaskShape, cached_attention
from wasat.backends.tvm.cpu.kernels.cache import Cache, CacheType, pack_cache
from wasat.backends.tvm.cpu.kernels.flash import Scores
from wasat.backends.tvm.cpu.kernels.isa import Isa
from wasat.backends.tvm.cpu.kernels.linear_float import Linear, Weights, linear
from wasat.backends.tvm.cpu.kernels.pack import Storage, pack_float, pack_int
from wasat.backends.tvm.targets import cpu

CASES: dict[str, tuple[int, Cache, Scores, MaskShape]] = {
    "full": (4, Cache(1, 24, 24), Scores(0.2), "no"),
    "window and softcap": (2, Cache(2, 16, 24), Scores(0.3, window=50, softcap=5.0), "no"),
    "ring in f16": (3, Cache(1, 32, 32, capacity=448, dtype="float16"), Scores(0.2, window=140), "no"),
    "mask": (4, Cache(2, 16, 16), Scores(0.2), "bh"),
    "codes of four bits": (4, Cache(1, 24, 40, dtype="int4"), Scores(0.2), "no"),
}


@each_isa()
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in ("full", "ring in f16") else [pytest.mark.slow]) for c in CASES]
)
def test_attention(isa: Isa, case: str) -> None:
    h, cache, scores, mask = CASES[case]
    kernels = {
        (decode, threads): build(cached_attention(CachedAttention(isa, h, cache, scores, decode, mask, threads)), isa)
        for decode, threads in ((False, 2), (True, 1), (True, 2), (True, 3))
    }
    b, t, g, d, e = 9, 300, cache.kv_heads, cache.head_dim, cache.value_dim
    c = cache.capacity or 304
    rng = np.random.default_rng(0)
    q = rng.standard_normal((b, t, h, d)).astype(np.float32)
    dtype: CacheType = cache.dtype
    keys = pack_cache("k", rng.standard_normal((b, c, g, d)).astype(np.float32), dtype)
    values = pack_cache("v", rng.standard_normal((b, c, g, e)).astype(np.float32), dtype)
    addend = rng.standard_normal((b, h, t, c)).astype(np.float32)

    def piece(rows: slice, low: int, high: int, decode: bool = False, threads: int = 2) -> np.ndarray:
        past = np.full(len(q[rows]), low)
        args = [np.ascontiguousarray(x) for x in (q[rows, low:high], past, keys[rows], values[rows])]
        args += [np.ascontiguousarray(addend[rows, :, low:high])] if mask != "no" else []
        return run(kernels[decode, threads], args, ((len(past), high - low, h, e), "float32"))[0]

    whole = piece(slice(None), 0, t)
    for row in (0, b - 1):
        np.testing.assert_array_equal(piece(slice(row, row + 1), 0, t)[0], whole[row])
    for chunk in (7, 16, 130):
        for low in (0, chunk, t - chunk):
            np.testing.assert_array_equal(piece(slice(0, 2), low, low + chunk), whole[:2, low : low + chunk])
    for at in (0, 31, 127, 128, 200, t - 1):
        for rows, threads in ((slice(0, 1), 1), (slice(0, 1), 2), (slice(0, 1), 3), (slice(None), 1), (slice(None), 2)):
            np.testing.assert_array_equal(piece(rows, at, at + 1, True, threads), whole[rows, at : at + 1])


@each_isa()
@pytest.mark.parametrize("weights", ["float32", "float16", "int8", "int4"])
def test_linear(isa: Isa, weights: Weights) -> None:
    n, k = 7 * isa.columns + 3, 75
    rng = np.random.default_rng(0)
    if weights in ("int8", "int4"):
        scales = rng.random((n, -(-k // 32))).astype(np.float16)
        packed = pack_int(rng.integers(-8, 8, (n, k)).astype(np.int8), scales, int(weights[3:]), isa)
    else:
        storage: Storage = "float16" if weights == "float16" else "float32"
        packed = pack_float(rng.standard_normal((n, k)).astype(np.float32), isa, storage)
    w = tensor(packed)
    compiled = build(linear(Linear(isa, n, k, weights, threads=2)), isa)
    x = rng.standard_normal((14, k)).astype(np.float32)
    [whole] = run(compiled, [x, w], ((14, n), "float32"))
    for rows in (1, 2, 3, 5):
        for low in (0, 14 - rows):
            [y] = run(compiled, [x[low : low + rows], w], ((rows, n), "float32"))
            np.testing.assert_array_equal(y, whole[low : low + rows])


SIZES: dict[str, Any] = {
    "vocab": 70, "dim": 64, "heads": 4, "kv_heads": 1, "head_dim": 32, "hidden": 96, "windows": (40, None), "ring": 192
}  # fmt: skip


@pytest.mark.parametrize("weights, activation", [("int4", "int8"), ("f16", None)])
def test_decoder(weights: str, activation: str | None) -> None:
    program = Decoder(**SIZES, weights=weights, activation=activation).program()
    names = program.interface.state_names
    runner = Runner(program, cpu(threads=2))
    tokens = np.random.default_rng(0).integers(0, 70, (9, 140))

    def logits(rows: list[int], chunks: list[int]) -> np.ndarray:
        states: dict[str, Any] = {}
        past, got = np.zeros(len(rows), np.int64), {}
        for s in chunks:
            name = "decode" if s == 1 else "prefill"
            given = {"tokens": tokens[rows, past[0] : past[0] + s], "past": past, "last": np.full(len(rows), s - 1)}
            for v in program[name].inputs:
                if v.name in names:
                    shape = v.tensor.concrete({"b": len(rows), "c": 144})
                    given[v.name] = states.get(v.name, np.zeros(shape, np.float32))
            got = runner(name, given)
            states, past = {k: got[k] for k in names}, past + s
        return got["logits"]

    every = list(range(9))
    for chunks in ([138], [138, 1, 1]):
        whole = logits(every, chunks)
        for row in (0, 8):
            np.testing.assert_array_equal(logits([row], chunks), whole[[row]])
    for cut in ([70, 70], [*[7] * 20], [16] * 8 + [12], [100] + [1] * 40):
        np.testing.assert_array_equal(logits([0, 1], cut), whole[:2])
