"""Weights brought into blocks: what is written is read again, search beats rounding, and importance moves the error."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import BlockArray, DType, QArray, QTensorType
from wasat.ir.ops.quant import QUANTIZERS, quantize_array
from wasat.ir.schemes import scheme_named

WRITTEN = [s for name in (*QUANTIZERS[2:], "s4b128", "s5b64", "s6b256", "s7b64") if (s := scheme_named(name))]
SEARCHED = [QTensorType(s.name, (1, 512)) for s in WRITTEN] + [
    QTensorType("int4", (1, 512), block, DType.F16, zeros) for block in (32, 64) for zeros in (False, True)
]  # fmt: skip
SEARCHED.append(QTensorType("int8", (1, 512)))


def weights(seed: int, n: int = 24, k: int = 512) -> np.ndarray:
    """Rows of different sizes, some with a few large elements and some that lean to one side."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, k)) * np.exp(rng.standard_normal((n, 1)))
    x[::3] *= 1 + 4 * (rng.random((n, k))[::3] < 0.02)
    x[1::3] += 0.5
    return (x * 0.02).astype(np.float32)


def off(x: np.ndarray, q: QArray, importance: float | np.ndarray = 1.0) -> float:
    return float((importance * np.square(q.dense() - x, dtype=np.float64)).sum())


@pytest.mark.parametrize("scheme", WRITTEN, ids=lambda s: s.name)
def test_what_is_written_is_what_was_read(scheme):
    blocks = np.random.default_rng(0).integers(0, 256, (50, 3, scheme.size), np.uint8)  # any bytes are blocks
    assert scheme.write is not None
    np.testing.assert_array_equal(scheme.write(scheme.read(blocks)), blocks)


@pytest.mark.parametrize("type", SEARCHED, ids=lambda t: t.how)
def test_search_is_better_than_dividing_by_the_largest(type):
    x = weights(1)
    t = type.with_shape(*x.shape)
    found = quantize_array(x, t, search=True)
    assert found.type == t
    assert isinstance(found, BlockArray) is (t.stored is not None)
    steps = t.stored.high - t.stored.low if t.stored else {"int4": 15, "int8": 254}[t.scheme]
    groups = x.reshape(len(x), -1, t.block)
    span = groups.max(-1) - groups.min(-1) if t.zeros or t.offset else 2 * np.abs(groups).max(-1)
    even = float(((span / steps) ** 2).sum()) * t.block / 12  # the error of rounding to a grid over the whole span
    assert off(x, found) < (1.0 if t.scheme == "int8" else 0.95) * even
    np.testing.assert_array_equal(found.dense(), quantize_array(x, t, search=True).dense())
    np.testing.assert_array_equal(found.dense()[3:5], quantize_array(x[3:5], t.with_shape(2, 512), search=True).dense())


def test_of_eight_bits_the_best_of_some_tries_has_a_fifth_less():
    x, t = weights(1), QTensorType("int8", (1,))
    plain, found = (quantize_array(x, t.with_shape(*x.shape), search) for search in (False, True))
    assert off(x, found) < 0.87 * off(x, plain)


@pytest.mark.parametrize("type", SEARCHED, ids=lambda t: t.how)
def test_importance_moves_the_error_to_where_it_matters_less(type):
    x = weights(2)
    t = type.with_shape(*x.shape)
    importance = np.where(np.arange(512) % 4 == 0, 20.0, 0.2)
    plain, weighted = (quantize_array(x, t, True, i) for i in (None, importance))
    assert off(x, weighted, importance) < off(x, plain, importance) * (0.999 if t.scheme == "int8" else 0.98)
    assert off(x, weighted) > off(x, plain)
    np.testing.assert_array_equal(quantize_array(x, t, True, np.full(512, 3.0)).dense(), plain.dense())


@pytest.mark.parametrize("importance", [np.ones(511), np.full(512, np.nan), np.full(512, -1.0)])
def test_importance_that_is_none(importance):
    with pytest.raises(ValueError, match="importance must be 512 numbers that are not negative"):
        quantize_array(np.ones((2, 512), np.float32), QTensorType("q4_1", (2, 512)), importance=importance)


@pytest.mark.parametrize("type", SEARCHED, ids=lambda t: t.how)
def test_rows_that_need_no_search(type):
    """Zeros stay zeros, one element alone is kept, and what the grid holds comes back; so do rows of one number."""
    x = np.zeros((5, 512), np.float32)
    x[1, 7] = 1.0
    x[2] = np.tile(np.arange(32) % 4 * 0.5, 16)
    x[3:] = [[0.37], [-2.5]]
    dense = quantize_array(x, type.with_shape(5, 512), search=True).dense()
    assert (dense[0] == 0).all()
    np.testing.assert_allclose(dense[1], x[1], atol=0.02 if type.stored and type.stored.factors else 1e-3)
    assert np.abs(dense[2] - x[2]).max() < 0.1
    np.testing.assert_allclose(dense[3:], x[3:], rtol=0.01)
    assert not quantize_array(x[:0], type.with_shape(0, 512), search=True).dense().size


def test_weights_on_the_grid_of_q4_0_come_back():
    """As those of Gemma's folders qat-q4_0-unquantized are: codes -8 to 7 times a scale for each 32, -8 among them."""
    rng = np.random.default_rng(3)
    codes = rng.integers(-8, 8, (16, 8, 32))
    codes[..., 5] = -8
    scales = (rng.standard_normal((16, 8, 1)) * 0.02).astype(np.float16).astype(np.float32)
    x = (codes * scales).astype(np.float32).reshape(16, 256)
    q = quantize_array(x, QTensorType("int4", x.shape))
    np.testing.assert_array_equal(q.dense(), x)
    in_bf16 = x.view(np.uint32) & 0xFFFF0000  # as the folders store them
    near = quantize_array(in_bf16.view(np.float32).reshape(x.shape), QTensorType("int4", x.shape))
    np.testing.assert_array_equal(near.values, q.values)
