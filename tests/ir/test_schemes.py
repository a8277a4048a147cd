"""Formats of blocks: the numbers are those of the ``gguf`` package, bit for bit, on every block there can be."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import BlockArray, Builder, Graph, QArray, QTensorType, TypeMismatch, parse_type
from wasat.ir.ops.quant import quantize_array
from wasat.ir.schemes import SCHEMES, Scheme, own_scheme, read_q4_0, read_q8_0

gguf = pytest.importorskip("gguf")


def theirs(blocks: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        rows = blocks.reshape(*blocks.shape[:-2], -1)
        return np.asarray(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name.upper()]))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_the_numbers_are_those_of_gguf(scheme: Scheme) -> None:
    rng = np.random.default_rng(0)
    usual = scheme.random(rng, (40, 2 * scheme.block))
    anything = rng.integers(0, 256, usual.shape, np.uint8)  # scales that are infinite, no numbers, tiny
    assert (scheme.block, scheme.size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[scheme.name.upper()]]
    for blocks in (usual, anything):
        x = BlockArray(QTensorType(scheme.name, (40, 2 * scheme.block)), blocks)
        assert same_bits(x.dense(), theirs(blocks, scheme.name))
        assert same_bits(x.rows(slice(3, 5)).dense(), x.dense()[3:5])
        assert x.rows(slice(5, 5)).dense().shape == (0, 2 * scheme.block)
        assert same_bits(x.rows(np.array([[7, 2]])).dense(), x.dense()[[[7, 2]]])
    assert (x.values.min(), x.values.max()) == (scheme.low, scheme.high)
    assert 0.05 < BlockArray(x.type, usual).dense().std() < 3


@pytest.mark.parametrize("read, name, kind", [(read_q8_0, "q8_0", "int8"), (read_q4_0, "q4_0", "int4")])
def test_symmetric_blocks_of_32_are_int8_and_int4(read: object, name: str, kind: str) -> None:
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    blocks = np.random.default_rng(0).integers(0, 256, (50, 3, size), np.uint8)
    values, scales = read(blocks)  # type: ignore[operator]
    x = QArray(QTensorType(kind, (50, 96)), values.reshape(50, 96), scales.reshape(50, 3))
    assert same_bits(x.dense(), theirs(blocks, name))


def test_types_of_blocks() -> None:
    q = QTensorType("q4_k", (2048, 512))
    assert (str(q), q.blocks, q.row_bits, parse_type(str(q))) == ("q4_k[2048, 512]", 16, 2 * 144 * 8, q)
    assert QTensorType("q6_k", (4, 256), 7, "f16") == QTensorType("q6_k", (4, 256))  # the format says how
    assert [(s.name, s.bits) for s in SCHEMES.values()][:3] == [("q4_1", 5.0), ("q5_0", 5.5), ("q5_1", 6.0)]
    with pytest.raises(TypeMismatch, match="rows of q4_k are of whole blocks of 256"):
        QTensorType("q4_k", (2, 640))
    with pytest.raises(TypeMismatch, match=r"q4_1\[2, 64\] is u8\[2, 2, 20\], not u8\[2, 2, 18\]"):
        BlockArray(QTensorType("q4_1", (2, 64)), np.zeros((2, 2, 18), np.uint8))
    for name in ("q9", "s4b48", "s3b64", "s4b0", "s4b064", "s4b2048", "s4b64 "):
        with pytest.raises(TypeMismatch, match="is not one of int8, int4, q4_1"):
            QTensorType(name, (2, 64))


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_our_own_blocks(bits: int) -> None:
    """Byte by byte: a scale, a factor for each 32, codes from the lowest bits on."""
    q = QTensorType(f"s{bits}b64", (1, 64))
    codes = np.arange(64) * 7 % (1 << bits)
    block = np.zeros(q.stored.size if q.stored else 0, np.uint8)
    block[:2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    block[2:4] = 3, 256 - 5
    for i, c in enumerate(codes):
        group, at = divmod(i, 32)
        block[4 + group * 16 + at % 16] |= (c & 15) << (4 * (at // 16))
        if bits > 4:
            wide = bits - 4  # bytes of a group's high bits: 4 or 8, each lowest field of all of them first
            run = 4 * wide
            block[36 + group * run + at % run] |= (c >> 4) << (wide * (at // run))
    x = BlockArray(q, block.reshape(1, 1, -1))
    want = (codes - (1 << (bits - 1))) * np.repeat([1.5, -2.5], 32)
    np.testing.assert_array_equal(x.dense()[0], want)
    assert (q.row_bits, parse_type(str(q)), own_scheme(bits, 640)) == (64 * bits + 16 + 16, q, f"s{bits}b160")
    assert (own_scheme(4, 576), own_scheme(4, 2048), own_scheme(4, 40)) == ("s4b192", "s4b256", None)


def test_formats_that_come_from_files_alone() -> None:
    with pytest.raises(TypeMismatch, match=r"iq4_xs is not one of int8, int4, q4_1, .*: its blocks come from files"):
        quantize_array(np.zeros((2, 256), np.float32), QTensorType("iq4_xs", (2, 256)))


@pytest.mark.parametrize("types, axis", [
    (("q4_1[2, 32]", "q5_0[2, 32]"), 0), (("q4_1[2, 32]", "f32[2, 32]"), 0), (("q4_1[2, 32]", "q4_1[2, 32]"), 1),
])  # fmt: skip
def test_weights_that_cannot_be_joined(types: tuple[str, str], axis: int) -> None:
    g = Graph("f")
    values = [g.add_param(f"w{i}", parse_type(t)) for i, t in enumerate(types)]
    with pytest.raises(TypeMismatch, match="quantized weights of one scheme, along another axis than the last"):
        Builder(g).concat(*values, axis=axis)
