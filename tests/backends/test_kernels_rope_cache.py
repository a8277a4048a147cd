from __future__ import annotations

import numpy as np
import pytest
from kernel_help import EPS, Terms, assert_near, build, each_isa, run, tensor, uneven
from numpy.typing import NDArray
from wasat.backends.tvm.cpu.kernels.attention import CachedAttention, cached_attention
from wasat.backends.tvm.cpu.kernels.cache import Cache, CacheWrite, cache_shape, cache_write
from wasat.backends.tvm.cpu.kernels.flash import Scores
from wasat.backends.tvm.cpu.kernels.isa import Isa
from wasat.backends.tvm.cpu.kernels.rope import QkvToCache, Rope, Rotary, qkv_to_cache, rope

Array = NDArray[np.float64]


def rotate(x: Array, positions: NDArray[np.int64], inv_freq: NDArray[np.float32], rotary: Rotary) -> Terms:
    """x[b, s, h, d] at positions[b, s]; the angle is an f32 product. Cosines and sines are within a rounding of 1."""
    angle = (positions.astype(np.float32)[..., None] * inv_freq).astype(np.float64)[:, :, None]
    c, s, r = np.cos(angle) * rotary.factor, np.sin(angle) * rotary.factor, rotary.dims
    out, size = x.copy(), np.abs(x)
    first, second = (slice(0, r, 2), slice(1, r, 2)) if rotary.interleaved else (slice(0, r // 2), slice(r // 2, r))
    out[..., first] = x[..., first] * c - x[..., second] * s
    out[..., second] = x[..., second] * c + x[..., first] * s
    size[..., first] = size[..., second] = (np.abs(x[..., first]) + np.abs(x[..., second])) * rotary.factor
    return Terms(out, size)


def rms(x: Array, weight: NDArray[np.float32], eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def unpack_keys(keys: NDArray[np.float32]) -> Array:
    b, g, c, d = keys.shape
    return keys.reshape(b, g, c // 16, d, 16).transpose(0, 1, 2, 4, 3).reshape(b, g, c, d).astype(np.float64)


def frequencies(dims: int) -> NDArray[np.float32]:
    return (10000.0 ** (-np.arange(dims // 2) / max(1, dims // 2))).astype(np.float32)


@each_isa()
@pytest.mark.parametrize("rotary, norm", [(Rotary(24, 24), False), (Rotary(64, 48, factor=1.25), True),
                                          (Rotary(32, 16, interleaved=True), False)], ids=str)
def test_rope(isa: Isa, rotary: Rotary, norm: bool) -> None:
    rng = np.random.default_rng(0)
    h, d = 3, rotary.head_dim
    compiled = build(rope(Rope(isa, h, rotary, norm=norm, eps=1e-5, threads=2)), isa)
    weight, inv_freq = rng.standard_normal(d).astype(np.float32), frequencies(rotary.dims)
    for b, s in ((1, 1), (2, 5), (2, 100)):
        x = uneven(rng, b, s, h, d)
        positions = rng.integers(0, 40000, (b, s))
        [y] = run(compiled, [x, positions, inv_freq, *([weight] if norm else [])], (x.shape, "float32"))
        source = x.astype(np.float64)
        assert_near(y, rotate(rms(source, weight, 1e-5) if norm else source, positions, inv_freq, rotary), 4)


@each_isa()
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("capacity", [None, 48])
def test_cache_write(isa: Isa, dtype: str, capacity: int | None) -> None:
    g, d, e = 2, 24, 40
    rng = np.random.default_rng(0)
    cache = Cache(g, d, e, capacity=capacity, dtype=dtype)  # type: ignore[arg-type]
    compiled = build(cache_write(CacheWrite(isa, cache, threads=2)), isa)
    c = capacity or 64
    for s, past in ((1, [0, 63]), (17, [40, 3])):  # the ring wraps; the full cache ignores what does not fit
        k, v = rng.standard_normal((2, s, g, d)).astype("f4"), rng.standard_normal((2, s, g, e)).astype("f4")
        keys = np.zeros(cache_shape("k", 2, g, c, d), dtype)
        values = np.zeros(cache_shape("v", 2, g, c, e), dtype)
        held = [tensor(keys), tensor(values)]
        compiled(tensor(k), tensor(v), tensor(np.array(past)), *held)
        want_k, want_v = np.zeros((2, g, c, d), dtype), np.zeros(values.shape, dtype)
        for b in range(2):
            for i in range(s):
                slot = past[b] + i if capacity is None else (past[b] + i) % c
                if slot < c:
                    want_k[b, :, slot], want_v[b, :, slot, :e] = k[b, i], v[b, i]
        np.testing.assert_array_equal(unpack_keys(held[0].numpy()), want_k)
        np.testing.assert_array_equal(held[1].numpy(), want_v)


@each_isa()
@pytest.mark.parametrize("norm, dims, capacity, dtype", [(True, 24, 48, "float32"), (False, 16, None, "float16"),
                                                         (False, 0, None, "float32")])
def test_qkv_to_cache(isa: Isa, norm: bool, dims: int, capacity: int | None, dtype: str) -> None:
    h, g, d = 4, 2, 24
    rng = np.random.default_rng(0)
    cache = Cache(g, d, d, capacity=capacity, dtype=dtype)  # type: ignore[arg-type]
    rotary = Rotary(d, dims)
    compiled = build(qkv_to_cache(QkvToCache(isa, h, cache, rotary, norm=norm, threads=2)), isa)
    c, inv_freq = capacity or 64, frequencies(dims)
    qw, kw = (rng.standard_normal(d).astype(np.float32) for _ in range(2))
    for s in (1, 33):
        past = np.array([30, 7])
        qkv = uneven(rng, 2, s, (h + 2 * g) * d)
        held = [tensor(np.zeros(cache_shape(kind, 2, g, c, d), dtype)) for kind in ("k", "v")]  # type: ignore[arg-type]
        inputs = [qkv, past, *([inv_freq] if dims else []), *([qw, kw] if norm else []), *held]
        [q] = run(compiled, inputs, ((2, s, h, d), "float32"))
        heads = qkv.astype(np.float64).reshape(2, s, h + 2 * g, d)
        positions = past[:, None] + np.arange(s)
        want_q, want_k, want_v = heads[:, :, :h], heads[:, :, h : h + g], heads[:, :, h + g :]
        if norm:
            want_q, want_k = rms(want_q, qw, 1e-6), rms(want_k, kw, 1e-6)
        wanted = [rotate(x, positions, inv_freq, rotary) for x in (want_q, want_k)]
        assert_near(q, wanted[0], 4)
        # values are only stored; so are keys, after what is done to them
        keys, values = unpack_keys(held[0].numpy()), held[1].numpy()[..., :d]
        slots = positions % c
        for b in range(2):
            want = Terms(*(x[b].swapaxes(0, 1) for x in wanted[1][:2]))
            assert_near(keys[b][:, slots[b]], want, 4 if dtype == "float32" else 4 + 2.0**-11 / EPS)
            np.testing.assert_array_equal(values[b][:, slots[b]], want_v[b].swapaxes(0, 1).astype(dtype))
            untouched = np.setdiff1d(np.arange(c), slots[b])
            assert not keys[b][:, untouched].any()


@each_isa()
@pytest.mark.parametrize("capacity", [None, 32], ids=["full", "ring"])
@pytest.mark.parametrize("s", [1, 3])
def test_a_past_outside_the_cache_touches_nothing_else(isa: Isa, capacity: int | None, s: int) -> None:
    """The runtime refuses it before; here whatever lies around the rows' own caches stays, and is not read."""
    cache = Cache(1, 16, 16, capacity)
    scores = Scores(0.2, window=None if capacity is None else 20)
    write = build(cache_write(CacheWrite(isa, cache, threads=2)), isa)
    attend = build(cached_attention(CachedAttention(isa, 2, cache, scores, s == 1, threads=2)), isa)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, s, n, 16)).astype(np.float32) for n in (2, 1, 1))
    for past in (-1, -5, -32, -(1 << 40), 31, 32, 33, 500, 1 << 40, (1 << 63) - 1, -(1 << 63)):
        at = np.array([0, past, 0])
        held = [tensor(np.zeros((3, 1, 32, 16), np.float32)) for _ in range(2)]
        run(write, [k, v, at, *held])
        for x in held:
            assert np.count_nonzero(x.numpy()[[0, 2]]) == 2 * s * 16
            inside = sum(0 <= past + i < ((capacity and 1 << 63) or 32) for i in range(s))
            assert np.count_nonzero(x.numpy()[1]) == 16 * inside
        nan = [np.full((3, 1, 32, 16), np.nan, np.float32) for _ in range(2)]
        for x in nan:
            x[1] = 0
        [y] = run(attend, [q, at, *nan], ((3, s, 2, 16), "float32"))
        assert not y[1].any()
