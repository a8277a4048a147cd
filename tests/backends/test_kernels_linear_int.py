from __future__ import annotations

import numpy as np
import pytest
from kernel_help import Terms, assert_near, build, each_isa, products, rounded, run, uneven
from numpy.typing import NDArray
from wasat.backends.tvm.cpu.kernels.embedding import Embedding, embedding
from wasat.backends.tvm.cpu.kernels.isa import Isa
from wasat.backends.tvm.cpu.kernels.linear_float import Linear, linear
from wasat.backends.tvm.cpu.kernels.linear_int import LinearInt, linear_int
from wasat.backends.tvm.cpu.kernels.pack import pack_bias, pack_float, pack_int
from wasat.backends.tvm.cpu.kernels.quantize import QuantizeRows, quantize_rows, quantize_rows_reference

ROWS = (1, 2, 3, 7, 29, 241)


def weights(rng: np.random.Generator, n: int, k: int, bits: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    values = rng.integers(low, high, (n, k)).astype(np.int8)
    values[0, :4] = low  # the extreme values, side by side: the sums that could saturate
    scales = (uneven(rng, n, -(-k // 32)) * 0.01).astype(np.float16)
    scales[1 % n] = 3e-6  # a subnormal half
    return values, scales


def dequantized(values: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.float64]:
    return values * np.repeat(scales.astype(np.float64), 32, axis=1)[:, : values.shape[1]]


def activations(rng: np.random.Generator, m: int, k: int) -> NDArray[np.float32]:
    x = uneven(rng, m, k)
    x[0, :32] = 0  # a block without a scale
    x[-1, : min(k, 32)] = np.resize([1.0, -1.0], min(k, 32))  # every value at the limit
    return x


@each_isa()
@pytest.mark.parametrize("k", [100, 64])
def test_quantize_rows(isa: Isa, k: int) -> None:
    rng = np.random.default_rng(1)
    compiled = build(quantize_rows(QuantizeRows(isa, k, threads=2)), isa)
    for m in (1, 3, 400):
        x = activations(rng, m, k)
        x[m // 2, 32:] *= np.float32(1e-37)
        want = quantize_rows_reference(x)
        [got] = run(compiled, [x], (want.shape, "int32"))
        np.testing.assert_array_equal(got, want)


@each_isa(integers=True)
@pytest.mark.parametrize("n, k, bias", [(100, 72, True), (64, 96, False)])
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_int(isa: Isa, n: int, k: int, bias: bool, bits: int) -> None:
    rng = np.random.default_rng(2)
    compiled = build(linear_int(LinearInt(isa, n, k, f"int{bits}", bias=bias, threads=2)), isa)  # type: ignore[arg-type]
    values, scales = weights(rng, n, k, bits)
    b = rng.standard_normal(n).astype(np.float32)
    packed = [pack_int(values, scales, bits, isa), *([pack_bias(b, isa)] if bias else [])]
    for m in ROWS:
        x = activations(rng, m, k)
        [y] = run(compiled, [quantize_rows_reference(x), *packed], ((m, n), "float32"))
        assert_near(y, products(rounded(x), dequantized(values, scales).T) + (b if bias else np.zeros(n)))


@each_isa(integers=True)
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_with_dequantized_weights(isa: Isa, bits: int) -> None:
    n, k = 72, 100
    rng = np.random.default_rng(3)
    compiled = build(linear(Linear(isa, n, k, f"int{bits}", threads=2)), isa)  # type: ignore[arg-type]
    values, scales = weights(rng, n, k, bits)
    for m in (1, 2, 29):
        x = activations(rng, m, k)
        [y] = run(compiled, [x, pack_int(values, scales, bits, isa)], ((m, n), "float32"))
        assert_near(y, products(x, dequantized(values, scales).T))


@each_isa(integers=True)
@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "int4"])
def test_embedding(isa: Isa, kind: str) -> None:
    n, k = 70, 72
    rng = np.random.default_rng(4)
    compiled = build(embedding(Embedding(isa, n, k, kind, scale=2.5, threads=2)), isa)  # type: ignore[arg-type]
    if kind.startswith("int"):
        values, scales = weights(rng, n, k, int(kind[3:]))
        packed, table = pack_int(values, scales, int(kind[3:]), isa), dequantized(values, scales)
    else:
        half = uneven(rng, n, k).astype(kind)
        packed, table = pack_float(half, isa, kind), half.astype(np.float64)  # type: ignore[arg-type]
    for m in (1, 300):
        ids = rng.integers(0, n, m)
        ids[0] = n - 1
        [y] = run(compiled, [ids, packed], ((m, k), "float32"))
        assert_near(y, Terms(table[ids] * 2.5, np.abs(table[ids] * 2.5)))
