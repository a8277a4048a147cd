"""Random numbers: the published vectors of the generator, and the distributions made of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from wasat.ir import build, evaluate, parse_type
from wasat.ir.decompose import decompose
from wasat.ir.ops.random import threefry

KEY = np.array([17, 42], np.uint32)


def draw(op: str, key: np.ndarray = KEY, **attrs: Any) -> np.ndarray:
    g = build("g", [("key", parse_type("u32[2]"))], lambda b, key: b.emit(op, key, **attrs))
    (out,) = evaluate(g, {"key": key})
    assert isinstance(out, np.ndarray)
    return out


@pytest.mark.parametrize(
    "counter, key, want",
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers(counter: tuple[int, int], key: tuple[int, int], want: tuple[int, int]) -> None:
    """threefry2x32 of 20 rounds in the file kat_vectors of Random123."""
    x0, x1 = (np.array([c], np.uint32) for c in counter)
    got = threefry(np.array(key, np.uint32), x0, x1)
    assert [int(v[0]) for v in got] == list(want)


def test_bits_are_blocks_of_the_counter() -> None:
    i = np.arange(12, dtype=np.uint32)
    high, low = threefry(KEY, np.zeros(12, np.uint32), i)
    assert_array_equal(draw("random_bits", shape=(3, 4)), (high ^ low).reshape(3, 4))
    words = draw("random_bits", shape=(12,), dtype="u64")
    assert_array_equal((words >> np.uint64(32)).astype(np.uint32), high)
    assert_array_equal(words.astype(np.uint32), low)
    assert_array_equal(draw("random_bits", shape=(5,)), draw("random_bits", shape=(12,))[:5])  # longer is a continuation
    assert len(np.unique(draw("random_bits", KEY + np.uint32(1), shape=(12,)) ^ (high ^ low))) == 12


@pytest.mark.parametrize("dtype, digits", [("f64", 53), ("f32", 24), ("f16", 11), ("bf16", 8)])
def test_uniform_has_every_digit_and_no_one(dtype: str, digits: int) -> None:
    x = draw("random_uniform", shape=(20000,), dtype=dtype).astype(np.float64)
    assert x.min() >= 0
    assert x.max() < 1
    scaled = x * 2.0**digits
    assert_array_equal(scaled, np.floor(scaled))
    assert (scaled.astype(np.uint64) % np.uint64(2)).any()  # the last digit is used
    counts = np.bincount((x * 64).astype(int), minlength=64)
    assert ((counts - 20000 / 64) ** 2 / (20000 / 64)).sum() < 115  # chi-square, 63 degrees: p = 6e-5


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16"])
def test_normal_follows_its_distribution(dtype: str) -> None:
    n = 20000
    x = np.sort(draw("random_normal", shape=(n,), dtype=dtype).astype(np.float64))
    cdf = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    gap = np.abs(cdf - (np.arange(n) + 0.5) / n).max()
    assert gap < 2.3 / math.sqrt(n)  # Kolmogorov-Smirnov: p = 5e-5
    assert np.isfinite(x).all()


def test_dropout_keeps_an_element_at_its_rate() -> None:
    """rate is the probability of u < rate, u a multiple of 2**-24: at u == rate the element stays."""
    u = draw("random_uniform", shape=(8,))
    x = np.ones(8, np.float32)
    types = [("x", parse_type("f32[8]")), ("key", parse_type("u32[2]"))]
    g = build("g", types, lambda b, x, key: b.dropout(x, key, rate=float(u[3])))
    h = g.clone()
    decompose(h, lambda node: False)
    for f in (g, h):
        assert_array_equal(np.asarray(evaluate(f, {"x": x, "key": KEY})[0]) > 0, u >= u[3])


def test_dropout_keeps_the_mean() -> None:
    types = [("x", parse_type("f32[100, 200]")), ("key", parse_type("u32[2]"))]
    g = build("g", types, lambda b, x, key: b.dropout(x, key, rate=0.3))
    (y,) = evaluate(g, {"x": np.ones((100, 200), np.float32), "key": KEY})
    assert isinstance(y, np.ndarray)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(0.7)}
    dropped = (y == 0).mean()
    assert abs(dropped - 0.3) < 4 * math.sqrt(0.3 * 0.7 / y.size)
    by_row = (y == 0).sum(1)
    assert abs(by_row.var() / (200 * 0.3 * 0.7) - 1) < 0.6  # rows are independent
