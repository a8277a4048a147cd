from __future__ import annotations

import numpy as np
import pytest
from kernel_help import Terms, assert_near, build, each_isa, run, tensor, uneven
from numpy.typing import NDArray
from wasat.backends.tvm.cpu.kernels.attention import Attention, CachedAttention, MaskShape, attention, cached_attention
from wasat.backends.tvm.cpu.kernels.cache import Cache, cache_shape
from wasat.backends.tvm.cpu.kernels.flash import Scores
from wasat.backends.tvm.cpu.kernels.isa import Isa

Array = NDArray[np.float64]


def reference(q: Array, k: Array, v: Array, scores: Scores, offset: NDArray[np.int64],
              mask: Array | None = None, sink: Array | None = None) -> Terms:
    """q[b, s, h, d], k[b, t, g, d], v[b, t, g, e]; query i of row b sits at offset[b] + i. What a score loses in f32, its
    exponential loses relative to itself."""
    b, s, h, d = q.shape
    t, g = k.shape[1], k.shape[2]
    keys = np.repeat(k, h // g, axis=2)
    x = np.einsum("bshd,bthd->bhst", q, keys) * scores.scale
    lost = np.sqrt(d) * np.einsum("bshd,bthd->bhst", np.abs(q), np.abs(keys)) * scores.scale
    if scores.softcap is not None:
        x = scores.softcap * np.tanh(x / scores.softcap)
    if mask is not None:
        x = x + mask
    i = (offset[:, None] + np.arange(s))[:, None, :, None]
    j = np.arange(t)
    seen = np.ones((b, 1, s, t), bool)
    seen &= j <= (i if scores.causal else i[:, :, -1:])
    if scores.window is not None:
        seen &= i - j < scores.window
    x = np.where(seen, x, -np.inf)
    column = np.full((1, h, 1, 1), -np.inf) if sink is None else sink[:, None, None]
    top = np.maximum(x.max(-1, keepdims=True), column)
    top = np.where(np.isfinite(top), top, 0)
    p = np.exp(x - top)
    total = p.sum(-1, keepdims=True) + np.exp(column - top)
    p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
    lost += np.abs(np.where(np.isfinite(x), x, top) - top)
    lost = p * (np.sqrt(t) + lost + (p * lost).sum(-1, keepdims=True))
    values = np.repeat(v, h // g, axis=2)
    return Terms(np.einsum("bhst,bthe->bshe", p, values), np.einsum("bhst,bthe->bshe", lost, np.abs(values)))


def sinks(case: str, h: int) -> list[NDArray[np.float32]]:
    """A logit of each head, some of which outweigh everything, and one nothing."""
    return [np.resize(np.array([0.5, -np.inf, 60.0, -80.0], np.float32), h)] if case.endswith("sink") else []


def filled(rng: np.random.Generator, cache: Cache, k: NDArray[np.float32], v: NDArray[np.float32], c: int,
           lengths: NDArray[np.int64]) -> list[object]:
    """Caches that hold the first lengths[b] positions of k and v[b, t, g, d]; everything else is NaN."""
    b, _, g, d = k.shape
    keys = np.full((b, g, c, d), np.nan, cache.dtype)
    values = np.full(cache_shape("v", b, g, c, v.shape[-1]), np.nan, cache.dtype)
    for row in range(b):
        for position in range(lengths[row]):
            slot = position % c
            keys[row, :, slot] = k[row, position]
            values[row, :, slot, : v.shape[-1]] = v[row, position]
    packed = keys.reshape(b, g, c // 16, 16, d).swapaxes(3, 4).reshape(b, g, c, d)
    return [tensor(packed), tensor(values)]


CACHED: dict[str, tuple[int, Cache, Scores, MaskShape]] = {
    "plain": (4, Cache(2, 24, 24), Scores(0.2), "no"),
    "window": (3, Cache(1, 32, 40), Scores(0.2, window=50, softcap=5.0), "no"),
    "ring": (4, Cache(1, 40, 40, capacity=208), Scores(1.0, window=70), "no"),
    "f16": (2, Cache(2, 32, 32, dtype="float16"), Scores(0.3, window=130), "no"),
    "many heads": (26, Cache(2, 16, 16), Scores(0.5), "no"),
    "mask": (4, Cache(2, 24, 24), Scores(0.2, softcap=5.0), "bh"),
    "not causal": (4, Cache(2, 24, 24), Scores(0.2, causal=False), "bh"),
    "ring, not causal": (4, Cache(1, 40, 40, capacity=208), Scores(1.0, window=70, causal=False), "no"),
    "ring with a mask": (4, Cache(1, 40, 40, capacity=208), Scores(1.0, window=70), "1h"),
    "sink": (4, Cache(2, 24, 24), Scores(0.2), "no"),
    "ring with a mask and a sink": (4, Cache(1, 40, 40, capacity=208), Scores(1.0, window=70), "1h"),
}


@each_isa()
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("case", CACHED)
def test_cached_attention(isa: Isa, case: str, decode: bool) -> None:
    h, cache, scores, mask = CACHED[case]
    if decode and not scores.causal:
        pytest.skip("one query sees what is causal")
    g, d, e = cache.kv_heads, cache.head_dim, cache.value_dim
    compiled = build(cached_attention(CachedAttention(isa, h, cache, scores, decode, mask, 2, case.endswith("sink"))), isa)
    rng = np.random.default_rng(0)
    c = cache.capacity or 432
    steps = [(1, [0]), (1, [5, 300, 129])] if decode else [(1, [0]), (2, [3, 127]), (37, [0, 250]), (137, [290, 31])]
    for s, past in steps:
        b = len(past)
        offset = np.array(past)
        t = int(offset.max()) + s
        q = rng.standard_normal((b, s, h, d)).astype(np.float32)
        k = rng.standard_normal((b, t, g, d)).astype(cache.dtype).astype(np.float32)
        v = uneven(rng, b, t, g, e).astype(cache.dtype).astype(np.float32)
        held = filled(rng, cache, k, v, c, offset + s)
        add, known = [], None
        if mask != "no":
            by_slot = rng.standard_normal((b if "b" in mask else 1, h, s, c)).astype(np.float32)
            by_slot[rng.random(by_slot.shape) < 0.3] = -np.inf
            by_slot[0, 0, -1] = -np.inf  # a row that sees nothing
            add, known = [by_slot], by_slot[..., np.arange(t) % c].astype(np.float64)
        sink = sinks(case, h)
        [y] = run(compiled, [q, offset, *held, *add, *sink], ((b, s, h, e), "float32"))
        want = reference(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), scores, offset, known, *sink)
        assert_near(y, want, 0)


PLAIN = {
    "encoder": (Attention, Scores(0.2, causal=False), "no"),
    "causal": (Attention, Scores(0.2), "no"),
    "window": (Attention, Scores(0.2, window=20, softcap=3.0), "no"),
    "mask": (Attention, Scores(0.2, causal=False), "b1"),
    "mask per head": (Attention, Scores(0.2, softcap=2.0), "1h"),
    "mask and sink": (Attention, Scores(0.2), "1h"),
}


@each_isa()
@pytest.mark.parametrize("case", PLAIN)
def test_attention(isa: Isa, case: str) -> None:
    _, scores, mask = PLAIN[case]
    h, g, d, e = 4, 2, 24, 40
    sink = sinks(case, h)
    desc = Attention(isa, h, g, d, e, scores, mask=mask, threads=2, sink=bool(sink))  # type: ignore[arg-type]
    compiled = build(attention(desc), isa)
    rng = np.random.default_rng(0)
    for b, s, t in ((1, 1, 7), (2, 33, 33), (2, 50, 170), (1, 9, 4)):
        q = rng.standard_normal((b, s, h, d)).astype(np.float32)
        k = rng.standard_normal((b, t, g, d)).astype(np.float32)
        v = uneven(rng, b, t, g, e)
        add = None
        if mask != "no":
            add = rng.standard_normal((b if "b" in mask else 1, h if "h" in mask else 1, s, t)).astype(np.float32)
            add[rng.random(add.shape) < 0.3] = -np.inf
            add[0, 0, -1] = -np.inf  # a row that sees nothing
        [y] = run(compiled, [q, k, v, *([] if add is None else [add]), *sink], ((b, s, h, e), "float32"))
        wide = [x.astype(np.float64) for x in (q, k, v)]
        want = reference(*wide, scores, np.full(b, t - s), None if add is None else add.astype(np.float64), *sink)
        assert_near(y, want, 0)


@each_isa()
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_what_a_mask_hides_is_not_read(isa: Isa, cached: bool) -> None:
    """A prefix whose tokens see each other, a picture whose tokens do, and what is causal elsewhere. Keys that are hidden may
    be NaN, and so may values in blocks that no row of a tile sees."""
    h, g, d, e, s, c = 4, 2, 24, 40, 300, 432
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, s, n, m)).astype(np.float32) for n, m in ((h, d), (g, d), (g, e)))
    i, j = np.arange(s)[:, None], np.arange(s)
    seen = (j <= i) | ((j < 70) & (i < 70)) | ((abs(j - 140) < 20) & (abs(i - 140) < 20))
    scores, full = Scores(0.2, causal=False), np.full((1, 1, s, c), -np.inf, np.float32)
    full[..., :s] = np.where(seen, np.float32(0), np.float32(-np.inf))
    cache = Cache(g, d, e)
    if cached:
        compiled = build(cached_attention(CachedAttention(isa, h, cache, scores, False, "11", 2)), isa)
    else:
        compiled = build(attention(Attention(isa, h, g, d, e, scores, "11", 2)), isa)

    def made(k: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
        held = filled(rng, cache, k, v, c, np.array([s]))
        given = [q, np.array([0]), *held, full] if cached else [q, k, v, np.ascontiguousarray(full[..., :s])]
        return run(compiled, given, ((1, s, h, e), "float32"))[0]

    y = made(k, v)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    assert_near(y, reference(*wide, scores, np.zeros(1, np.int64), full[..., :s].astype(np.float64)), 0)
    k[:, 200:] = np.nan
    np.testing.assert_array_equal(made(k, v)[:, :200], y[:, :200])
    v[:, 256:] = np.nan
    np.testing.assert_array_equal(made(k, v)[:, :200], y[:, :200])


@each_isa()
def test_blocks_of_the_cache_that_a_mask_hides_are_not_read(isa: Isa) -> None:
    h, g, d, e, t, c = 4, 2, 24, 40, 300, 432
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, m, w)).astype(np.float32) for n, m, w in ((1, h, d), (t, g, d), (t, g, e)))
    mask = np.where(np.arange(c) < 130, np.float32(-np.inf), np.float32(0))[None, None, None]
    compiled = build(cached_attention(CachedAttention(isa, h, Cache(g, d, e), Scores(0.2), True, "11", 2)), isa)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    want = reference(*wide, Scores(0.2), np.array([t - 1]), mask[..., :t].astype(np.float64))
    k[:, :130] = v[:, :128] = np.nan
    held = filled(rng, Cache(g, d, e), k, v, c, np.array([t]))
    [y] = run(compiled, [q, np.array([t - 1]), *held, mask], ((1, 1, h, e), "float32"))
    assert_near(y, want, 0)
