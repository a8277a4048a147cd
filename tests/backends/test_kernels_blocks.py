"""Kernels on weights in formats of blocks: what they compute is what the format's numbers say."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_help import assert_near, build, each_isa, products, rounded, run, uneven
from numpy.typing import NDArray
from wasat.backends.tvm.cpu.kernels.blocks import format_of, pack_blocks
from wasat.backends.tvm.cpu.kernels.embedding import Embedding, embedding
from wasat.backends.tvm.cpu.kernels.isa import GENERIC, Isa
from wasat.backends.tvm.cpu.kernels.linear_blocks import LinearBlocks, linear_blocks
from wasat.backends.tvm.cpu.kernels.linear_float import Linear, linear
from wasat.backends.tvm.cpu.kernels.pack import pack_bias
from wasat.backends.tvm.cpu.kernels.quantize import quantize_rows_reference
from wasat.ir import BlockArray, DType, QArray, QTensorType
from wasat.ir.ops.quant import random_zeros
from wasat.ir.schemes import SCHEMES as OF_GGUF
from wasat.ir.schemes import scheme_named

INTEGERS = {
    t.how: t
    for t in (
        QTensorType("int4", (1, 1), 128, DType.F16, True), QTensorType("int4", (1, 1), 64, DType.BF16),
        QTensorType("int8", (1, 1), 192, DType.F32),
    )
}  # fmt: skip
SCHEMES = {s.name: s for name in (*OF_GGUF, "s4b160", "s5b64", "s6b96", "s7b96") if (s := scheme_named(name))}
NAMES = [*SCHEMES, *INTEGERS]


def block_of(name: str) -> int:
    return SCHEMES[name].block if name in SCHEMES else INTEGERS[name].block


def weight(name: str, n: int, k: int, seed: int = 0) -> QArray:
    if name in INTEGERS:
        x = random_zeros(INTEGERS[name].with_shape(n, k), seed)
        extreme = 7 if x.type.scheme == "int4" else 127
        x.values[1], x.values[2] = extreme, -extreme - 1  # the sums that could saturate
        if x.zeros is not None:
            x.zeros[1], x.zeros[2] = -extreme - 1, extreme
        x.scales[1:3] = 0.01
        return x
    scheme, rng = SCHEMES[name], np.random.default_rng(seed)
    x = BlockArray(QTensorType(name, (n, k)), scheme.random(rng, (n, k)))
    x.data[1] = 255  # the largest codes side by side: the sums that could saturate
    x.data[2] = 0
    for at in scheme.floats:
        x.data[1:3, :, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    if not scheme.floats:
        x.data[1:3, :, 0] = 120
    return x


def activations(m: int, k: int, seed: int = 1) -> NDArray[np.float32]:
    x = uneven(np.random.default_rng(seed), m, k)
    x[0, :32] = 0  # a block without a scale
    x[-1, :32] = 1.0  # every value at the limit
    return x


@pytest.mark.parametrize("name", NAMES)
def test_packing_takes_the_room_of_the_format(name: str) -> None:
    f = format_of(name, GENERIC)
    x = weight(name, 16, 2 * block_of(name))
    packed = pack_blocks(x, GENERIC)
    bits = 8 * SCHEMES[name].size / f.block if name in SCHEMES else int(x.type.row_bits) / x.shape[1]
    assert packed.shape == f.shape(*x.shape)
    # tables are spelt out in bytes, factors take whole ones
    spent = {"iq4_nl": 4, "iq4_xs": 4.0625, "mxfp4": 1.75, "q2_k": 0.5}.get(name, 0 if name[0] == "s" else 0.126)
    assert 0 <= packed.nbytes * 8 / np.prod(x.shape) - bits <= spent


@each_isa(integers=True)
@pytest.mark.parametrize("name", NAMES)
def test_products_of_integers(isa: Isa, name: str) -> None:
    n, k = 40, 2 * block_of(name)
    x = weight(name, n, k)
    b = np.random.default_rng(2).standard_normal(n).astype(np.float32)
    compiled = build(linear_blocks(LinearBlocks(isa, n, k, name, bias=True, threads=2)), isa)
    for m in (1, 3, 7):
        rows = activations(m, k)
        [y] = run(compiled, [quantize_rows_reference(rows), pack_blocks(x, isa), pack_bias(b, isa)], ((m, n), "float32"))
        assert_near(y, products(rounded(rows), x.dense().T) + b)


@each_isa()
@pytest.mark.parametrize("name", NAMES)
def test_products_of_floats(isa: Isa, name: str) -> None:
    n, k = 40, block_of(name)
    x = weight(name, n, k)
    compiled = build(linear(Linear(isa, n, k, name, threads=2)), isa)
    for m in (1, 3):
        rows = activations(m, k)
        [y] = run(compiled, [rows, pack_blocks(x, isa)], ((m, n), "float32"))
        assert_near(y, products(rows, x.dense().T))


@each_isa()
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_table(isa: Isa, name: str) -> None:
    n, k = 40, block_of(name)
    x = weight(name, n, k)
    compiled = build(embedding(Embedding(isa, n, k, name, scale=2.0, threads=2)), isa)
    ids = np.array([0, 39, 1, -1, 2, 17])
    [y] = run(compiled, [ids, pack_blocks(x, isa)], ((6, k), "float32"))
    np.testing.assert_allclose(y, x.dense()[ids] * 2, rtol=1e-6, atol=1e-7)


def test_one_row_alone_and_among_others_has_the_same_bits() -> None:
    from kernel_help import CPU, lacks
    from wasat.backends.tvm.cpu.kernels.isa import AVX2

    isa = GENERIC if lacks(AVX2) else AVX2
    assert isa in CPU
    x = weight("q5_k", 40, 512)
    compiled = build(linear_blocks(LinearBlocks(isa, 40, 512, "q5_k", threads=2)), isa)
    rows = quantize_rows_reference(activations(7, 512))
    [whole] = run(compiled, [rows, pack_blocks(x, isa)], ((7, 40), "float32"))
    for i in range(7):
        [one] = run(compiled, [rows[i : i + 1], pack_blocks(x, isa)], ((1, 40), "float32"))
        np.testing.assert_array_equal(one[0], whole[i])
