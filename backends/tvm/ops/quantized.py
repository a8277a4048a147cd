"""Quantized weights, for targets without kernels of their own: kept row by row, and multiplied out where they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx
from wasat.ir import DType, Node, QArray, QTensorType, TensorType, Type

from ..layouts import Packed, tvm_dtype
from ..lower import Context, Lowering
from .low_precision import NARROW


@dataclass(frozen=True)
class PlainQuantized:
    """Values row by row, two 4-bit ones a byte (low nibble first, offset 8); scales [.., blocks], narrow ones as f32; zeros.

    Of formats of blocks: codes in a byte each, scales and (where the format has them) offsets in f32.
    """

    rows = 1

    def arrays(self, name: str, type: Type) -> list[Packed]:
        assert isinstance(type, QTensorType)
        *lead, k = TensorType(DType.I8, type.shape).concrete({})
        blocks = -(-k // type.block)
        four = type.scheme == "int4"
        return [
            Packed(f"{name}/values", "uint8" if four else "int8", (*lead, (k + 1) // 2 if four else k)),
            Packed(f"{name}/scales", "float32" if type.scale in NARROW else tvm_dtype(type.scale), (*lead, blocks)),
            *([Packed(f"{name}/offsets", "float32", (*lead, blocks))] if type.offset else []),
            *([Packed(f"{name}/zeros", "int8", (*lead, blocks))] if type.zeros else []),
        ]

    def pack(self, weight: QArray) -> list[np.ndarray]:
        values = weight.values
        if weight.type.scheme == "int4":
            if values.shape[-1] % 2:
                values = np.concatenate([values, np.zeros_like(values[..., :1])], -1)
            nibbles = (values + 8).astype(np.uint8)
            values = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
        scales = weight.scales.astype(np.float32) if weight.type.scale in NARROW else weight.scales
        return [values, scales, *(x for x in (weight.offsets, weight.zeros) if x is not None)]


def _dequantized(q: QTensorType, dtype: str, values: Any, scales: Any, more: Any = None) -> Callable[..., Any]:
    """The element function of a quantized tensor of rank 2 or more; ``more`` are its zero points or offsets."""

    def at(*i: Any) -> Any:
        *lead, j = i
        if q.scheme == "int4":
            byte = tirx.Cast("int32", values(*lead, tirx.floordiv(j, 2)))
            v = tirx.bitwise_and(tirx.shift_right(byte, tirx.Cast("int32", tirx.floormod(j, 2) * 4)), 15) - 8
        else:
            v = tirx.Cast("int32", values(*lead, j))
        block = (*lead, tirx.floordiv(j, q.block))
        if q.zeros:
            v = v - tirx.Cast("int32", more(*block))
        x = tirx.Cast("float32", v) * tirx.Cast("float32", scales(*block))
        return tirx.Cast(dtype, x + more(*block) if q.offset else x)

    return at


def _dequantize(ctx: Context, node: Node, packed: list[Any]) -> Any:
    q, shape = node.inputs[0].type, ctx.dims(node.output.shape)
    assert isinstance(q, QTensorType)
    dtype = tvm_dtype(node.output.tensor.dtype)
    return ctx.te(lambda *a: te.compute(shape, _dequantized(q, dtype, *a), name="dequantize"), *packed, name="dequantize")


def _quantized_embedding(ctx: Context, node: Node, packed: list[Any], ids: Any) -> Any:
    q, shape = node.inputs[0].type, ctx.dims(node.output.shape)
    assert isinstance(q, QTensorType)
    dtype = tvm_dtype(node.output.tensor.dtype)

    def build(*operands: Any) -> Any:
        *arrays, rows = operands
        at = _dequantized(q, dtype, *arrays)

        def row(*i: Any) -> Any:
            given = tirx.Cast("int64", rows(*i))
            return tirx.Select(given < 0, given + q.shape[0], given)

        return te.compute(shape, lambda *i: at(row(*i[:-1]), i[-1]), name="embedding")

    return ctx.te(build, *packed, ids, name="embedding")


QUANTIZED = {
    "dequantize": Lowering(_dequantize, layouts=lambda node: {0: PlainQuantized()}),
    "quantized_embedding": Lowering(_quantized_embedding, layouts=lambda node: {0: PlainQuantized()}),
}
