"""Caches of codes: what is written is what the reference rounds to, and attention reads what is written."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_help import assert_near, build, each_isa, run, tensor, uneven
from test_kernels_attention import reference, sinks
from wasat.backends.tvm.cpu.kernels.attention import CachedAttention, MaskShape, cached_attention
from wasat.backends.tvm.cpu.kernels.cache import (
    Cache,
    CacheType,
    CacheWrite,
    cache_shape,
    cache_write,
    pack_cache,
    unpack_cache,
)
from wasat.backends.tvm.cpu.kernels.flash import Scores
from wasat.backends.tvm.cpu.kernels.isa import Isa
from wasat.ir import DType, QTensorType
from wasat.ir.ops.rounding import fake_quantized, hadamard, hadamard_block


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """x [.., d] as a cache gives it back."""
    n = hadamard_block(x.shape[-1]) if dtype == "int4" else 1
    return hadamard(fake_quantized(hadamard(x, n), QTensorType(dtype, x.shape, x.shape[-1], DType.BF16)), n)


def rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Rows of very different size, some with one large feature, one of zeros, one of ties."""
    x = uneven(rng, *shape).astype(np.float32)
    x[..., 0] *= np.where(rng.random(shape[:-1]) < 0.3, 40, 1)
    flat = x.reshape(-1, shape[-1])
    flat[0], flat[-1] = 0, np.where(np.arange(shape[-1]) % 3, 3.0, -3.0)
    return x


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("d", [2, 24, 64, 40])
def test_what_is_packed_comes_back_as_rounded(dtype: CacheType, d: int) -> None:
    rng = np.random.default_rng(d)
    x = rows(rng, 2, 48, 3, d)
    want = stored(x, dtype)
    for kind in ("k", "v"):
        packed = pack_cache(kind, x, dtype)  # type: ignore[arg-type]
        assert packed.shape == cache_shape(kind, 2, 3, 48, d, dtype)
        assert packed.dtype == np.int8
        np.testing.assert_array_equal(unpack_cache(kind, packed, d, dtype), want)  # type: ignore[arg-type]
        if dtype == "int8":  # rounding twice is rounding once (turned rows are turned back in f32)
            np.testing.assert_array_equal(pack_cache(kind, want, dtype), packed)  # type: ignore[arg-type]


def test_memory_of_a_position() -> None:
    """64 features: 66 and 34 bytes instead of 256."""
    assert [cache_shape("k", 1, 1, 16, 64, t)[3] for t in ("int8", "int4")] == [66, 34]  # type: ignore[arg-type]
    assert [cache_shape("v", 1, 1, 16, 80, t)[3] for t in ("int8", "int4")] == [82, 50]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keys of 5 features do not come in pairs"):
        cache_shape("k", 1, 1, 16, 5, "int4")


@each_isa()
@pytest.mark.parametrize("dtype, capacity", [("int8", None), ("int4", 48), ("int4", None)])
def test_cache_write(isa: Isa, dtype: CacheType, capacity: int | None) -> None:
    """Bit for bit; NaN and infinities make their own row NaN."""
    g, d, e = 2, 24, 40
    rng = np.random.default_rng(0)
    cache = Cache(g, d, e, capacity=capacity, dtype=dtype)
    compiled = build(cache_write(CacheWrite(isa, cache, threads=2)), isa)
    c = capacity or 64
    for s, past in ((1, [0, 63]), (17, [40, 3])):  # the ring wraps; the full cache ignores what does not fit
        k, v = rows(rng, 2, s, g, d), rows(rng, 2, s, g, e)
        k[1, 0, 1, 3], v[1, 0, 0, 5] = np.nan, np.inf
        k[0, 0, 1] = np.float32(1e-41)  # too small to be scaled
        held = [tensor(pack_cache(kind, np.zeros((2, c, g, n), np.float32), dtype)) for kind, n in (("k", d), ("v", e))]  # type: ignore[arg-type]
        compiled(tensor(k), tensor(v), tensor(np.array(past)), *held)
        want_k, want_v = np.zeros((2, c, g, d), np.float32), np.zeros((2, c, g, e), np.float32)
        for b in range(2):
            for i in range(s):
                slot = past[b] + i if capacity is None else (past[b] + i) % c
                if slot < c:
                    want_k[b, slot], want_v[b, slot] = k[b, i], v[b, i]
        for kind, x, want in (("k", held[0], want_k), ("v", held[1], want_v)):
            np.testing.assert_array_equal(x.numpy(), pack_cache(kind, want, dtype))  # type: ignore[arg-type]
            np.testing.assert_array_equal(unpack_cache(kind, x.numpy(), want.shape[3], dtype), stored(want, dtype))  # type: ignore[arg-type]


CASES: dict[str, tuple[int, Cache, Scores, MaskShape]] = {
    "int8, mask and sink": (4, Cache(2, 24, 40, dtype="int8"), Scores(0.2), "bh"),
    "int4": (6, Cache(2, 18, 17, dtype="int4"), Scores(0.5, window=130), "no"),
    "int4, ring": (3, Cache(1, 64, 64, capacity=208, dtype="int4"), Scores(0.2, window=70, softcap=5.0), "no"),
    "int4, not causal, mask and sink": (4, Cache(2, 24, 40, dtype="int4"), Scores(0.2, causal=False), "1h"),
}


@each_isa()
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("case", CASES)
def test_cached_attention(isa: Isa, case: str, decode: bool) -> None:
    h, cache, scores, mask = CASES[case]
    if decode and not scores.causal:
        pytest.skip("one query sees what is causal")
    g, d, e = cache.kv_heads, cache.head_dim, cache.value_dim
    compiled = build(cached_attention(CachedAttention(isa, h, cache, scores, decode, mask, 2, case.endswith("sink"))), isa)
    rng = np.random.default_rng(0)
    c = cache.capacity or 432
    steps = [(1, [5, 300, 129])] if decode else [(2, [3, 127]), (37, [0, 250])]
    for s, past in steps:
        b, offset = len(past), np.array(past)
        t = int(offset.max()) + s
        q = rng.standard_normal((b, s, h, d)).astype(np.float32)
        k, v = rng.standard_normal((b, t, g, d)).astype(np.float32), rows(rng, b, t, g, e)
        by_slot = [np.full((b, c, g, n), np.nan, np.float32) for n in (d, e)]  # what is not written
        for row in range(b):
            for position in range(past[row] + s):
                for held, x in zip(by_slot, (k, v)):
                    held[row, position % c] = x[row, position]
        packed = [pack_cache(kind, x, cache.dtype) for kind, x in zip("kv", by_slot)]  # type: ignore[arg-type]
        add, known = [], None
        if mask != "no":
            addend = rng.standard_normal((b if "b" in mask else 1, h, s, c)).astype(np.float32)
            addend[rng.random(addend.shape) < 0.3] = -np.inf
            add, known = [addend], addend[..., np.arange(t) % c].astype(np.float64)
        sink = sinks(case, h)
        [y] = run(compiled, [q, offset, *packed, *add, *sink], ((b, s, h, e), "float32"))
        wide = [x.astype(np.float64) for x in (q, stored(k, cache.dtype), stored(v, cache.dtype))]
        want = reference(*wide, scores, offset, known, *sink)
        if cache.dtype == "int4":  # an element is a sum over the turned row, which may be much larger than it is
            want = want._replace(size=np.broadcast_to(want.size.max(-1, keepdims=True), want.size.shape) * np.sqrt(e))
        assert_near(y, want, 0)
