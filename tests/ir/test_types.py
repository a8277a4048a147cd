"""Element types, tensor types, quantized types."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from wasat.ir import DType, IRError, ParseError, QArray, QTensorType, TensorType, TypeMismatch, parse_type, symbol, type_of
from wasat.ir.op import Literal
from wasat.ir.ops.quant import quantize_array


@pytest.mark.parametrize("dtype", list(DType))
def test_every_element_type_has_a_name_and_an_array_type(dtype: DType) -> None:
    assert DType.of(str(dtype)) is dtype
    assert DType.of(dtype.np) is dtype
    assert type_of(np.zeros(2, dtype.np)) == TensorType(dtype, (2,))
    assert parse_type(f"{dtype}[n, 2]") == TensorType(dtype, (symbol("n"), 2))
    assert dtype.is_float + dtype.is_int + (dtype is DType.BOOL) == 1
    assert dtype.bits == {"bool": 8}.get(str(dtype), int("".join(c for c in str(dtype).split("e")[0] if c.isdigit()) or 0))


def test_unknown_element_types_are_refused() -> None:
    for x in ("complex64", "f128", np.dtype("complex128"), object()):
        with pytest.raises(TypeMismatch, match="is no element type of the IR"):
            DType.of(x)  # type: ignore[arg-type]


def test_tensor_types_are_values() -> None:
    n = symbol("n")
    t = TensorType("f32", (n + 1, np.int64(3)))  # type: ignore[arg-type]
    assert t == TensorType(DType.F32, (1 + n, 3))
    assert hash(t) == hash(TensorType(DType.F32, (1 + n, 3)))
    assert t != t.with_dtype("f16")
    assert (t.rank, t.size, t.symbols, str(t)) == (2, 3 * n + 3, ("n",), "f32[n + 1, 3]")
    assert t.substitute({"n": 4}) == TensorType(DType.F32, (5, 3))
    assert t.concrete({"n": 4}) == (5, 3)
    assert parse_type(str(t)) == t


@pytest.mark.parametrize("make, match", [
    (lambda: TensorType(DType.F32, (-1,)), "cannot be -1"),
    (lambda: TensorType(DType.F32, (1.5,)), "an int or a Dim"),  # type: ignore[arg-type]
    (lambda: TensorType(DType.F32, (True,)), "an int or a Dim"),
    (lambda: TensorType("f33", (1,)), "no element type"),  # type: ignore[arg-type]
    (lambda: QTensorType("int3", (4,)), "not one of int8, int4"),
    (lambda: QTensorType("int4", (4,), block=0), "a block >= 1"),
    (lambda: QTensorType("int4", (4,), scale=DType.I8), "a float scale"),
    (lambda: QTensorType("int4", ()), "at least one axis"),
])  # fmt: skip
def test_types_that_cannot_be(make: Callable[[], object], match: str) -> None:
    with pytest.raises(TypeMismatch, match=match):
        make()


def test_quantized_types() -> None:
    n = symbol("n")
    q = QTensorType("int4", (n, 70), 32)
    assert (str(q), q.blocks, q.symbols) == ("int4b32f16[n, 70]", 3, ("n",))
    assert parse_type(str(q)) == q
    for scale in filter(lambda d: d.is_float, DType):
        assert parse_type(str(QTensorType("int8", (n,), 4, scale))) == QTensorType("int8", (n,), 4, scale)
        with_zeros = QTensorType("int4", (n,), 64, scale, True)
        assert parse_type(str(with_zeros)) == with_zeros
        assert parse_type(str(with_zeros)) != QTensorType("int4", (n,), 64, scale)
    assert str(QTensorType("int4", (2, 64), 64, DType.F16, True)) == "int4zb64f16[2, 64]"
    with pytest.raises(TypeMismatch, match="formats of blocks have no zero points"):
        QTensorType("q4_1", (2, 64), zeros=True)
    for text in ("int8b4f33[2]", "int8b4i8[2]", "int3b4f16[2]", "int8b4[2]"):
        with pytest.raises(ParseError, match="is no element type"):
            parse_type(text)
    assert q.substitute({"n": 5}) == QTensorType("int4", (5, 70), 32)


@pytest.mark.parametrize("scheme, levels", [("int8", 254), ("int4", 16)])
def test_quantization_error_is_bounded_by_the_step(scheme: str, levels: int) -> None:
    x = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    q = quantize_array(x, QTensorType(scheme, x.shape, 32, DType.F32))
    assert type_of(q) == q.type
    assert isinstance(q, QArray)
    assert q.scales.shape == (5, 3)
    peak = np.abs(np.pad(x, [(0, 0), (0, 26)]).reshape(5, 3, 32)).max(-1)
    step = np.repeat(2 * peak / levels, 32, -1)[:, :70]
    # half a step, but for the one end of int4 that has no level: a whole one
    assert (np.abs(q.dense() - x) <= step * (1.0 if scheme == "int4" else 0.5) * 1.0001).all()


def test_values_of_four_bits() -> None:
    """The element of largest magnitude is -8, the other end is cut to 7, halves go to even; of 8 bits, +-127 are the ends."""
    x = np.zeros((2, 32), np.float32)
    x[0, :6] = 8, -8, 0.5, 1.5, 2.5, -3.5
    x[1, :4] = -8, 7, 7.6, -2.5
    q = quantize_array(x, QTensorType("int4", x.shape, 32, DType.F32))
    assert q.scales.ravel().tolist() == [-1, 1]
    assert q.values[0, :6].tolist() == [-8, 7, 0, -2, -2, 4]
    assert q.values[1, :4].tolist() == [-8, 7, 7, -2]
    x[0, :6] = 127, -127, 0.5, 1.5, 2.5, -3.5
    assert quantize_array(x, QTensorType("int8", x.shape, 32, DType.F32)).values[0, :6].tolist() == [127, -127, 0, 2, 2, -4]


@pytest.mark.parametrize("dtype", ["i64", "u8", "i4"])
def test_a_literal_that_its_type_does_not_hold(dtype: str) -> None:
    with pytest.raises(IRError, match=f"does not fit into {dtype}"):
        Literal.of(10**30, dtype)
