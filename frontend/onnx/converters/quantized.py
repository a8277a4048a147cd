"""onnxruntime's operators over quantized weights, which become quantized parameters. Source: its ContribOperators.md.

A weight is kept in its own integers and scales where :class:`~wasat.ir.QTensorType` holds exactly the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from wasat.ir import DType, Value
from wasat.ir.repacked import Load, Weight

from ..emit import Emitter, Operand
from ..registry import NodeView, op

MICROSOFT = "com.microsoft"


def _loader(c: Emitter, x: Operand | None) -> Load | None:
    """Reads an initializer; None for anything else."""
    if isinstance(x, np.ndarray):
        return lambda: x
    if isinstance(x, Value) and x.param is not None:
        source = c.sources[x.param]
        return lambda: np.asarray(source.load())
    return None


def unpacked(load: Load, rows: int, columns: int, bits: int) -> Load:
    """Unsigned integers packed row by row into bytes, the lowest bits first, as [rows, columns]."""

    def unpack() -> np.ndarray:
        packed = load().reshape(rows, -1)
        if bits == 8:
            return packed[:, :columns]
        pairs = np.empty((rows, packed.shape[1], 2), np.uint8)
        np.bitwise_and(packed, 15, out=pairs[..., 0])
        np.right_shift(packed, 4, out=pairs[..., 1])
        return pairs.reshape(rows, -1)[:, :columns]

    return unpack


def initializer(c: Emitter, n: NodeView, x: Operand | None, what: str, size: int) -> Load:
    """Reads operand ``what``, which must be an initializer of ``size`` elements."""
    load = _loader(c, x)
    if load is None or x is None:
        raise n.fail(f"{what} must be an initializer")
    if int(np.prod(c.shape(x))) != size:
        raise n.fail(f"{what} has shape {list(c.shape(x))} and should have {size} elements")
    return load


def key_of(*operands: Operand | None) -> tuple[Any, ...]:
    """What tells weights apart: the names of parameters, the bytes of constants."""
    return tuple(x.param if isinstance(x, Value) else x.tobytes() if isinstance(x, np.ndarray) else None for x in operands)


@op("MatMulNBits", domain=MICROSOFT, attributes="K N accuracy_level bits block_size")
def matmul_nbits(
    c: Emitter, n: NodeView, x: Operand, w: Operand, scale: Operand, zero: Operand | None = None,
    group: Operand | None = None, bias: Operand | None = None,
) -> Any:  # fmt: skip
    """x [.., K] @ W^T with W u8[N, blocks, block_size * bits / 8]; ``accuracy_level`` 4 allows products of int8."""
    k, rows, bits, block = n["K"], n["N"], n.get("bits", 4), n["block_size"]
    if bits not in (4, 8):
        raise n.fail(f"weights of {bits} bits are not supported; of 4 and 8 bits are")
    if group is not None:
        raise n.fail("g_idx (rows of a block that do not lie side by side) is not supported; export without act-order")
    if k < 1 or rows < 1 or block < 16 or block & (block - 1):
        raise n.fail(f"K={k}, N={rows}, block_size={block}: blocks are powers of two, at least 16")
    blocks = -(-k // block)
    load = initializer(c, n, w, "B", rows * blocks * block * bits // 8)
    scales = initializer(c, n, scale, "scales", rows * blocks)
    zeros: Load = lambda: np.full((1, 1), 1 << (bits - 1), np.uint8)
    if zero is not None and c.dtype(zero).is_float:
        given = initializer(c, n, zero, "zero_points", rows * blocks)
        zeros = lambda: given().reshape(rows, blocks)
    elif zero is not None:
        width = -(-blocks * bits // 8)
        zeros = unpacked(initializer(c, n, zero, "zero_points", rows * width), rows, blocks, bits)
    weight = Weight(
        DType.U4 if bits == 4 else DType.U8, (rows, k), block, unpacked(load, rows, k, bits), zeros,
        lambda: scales().reshape(rows, blocks),
    )  # fmt: skip
    stem = w.param if isinstance(w, Value) and w.param else n.name
    found = n.importer.repacked.param(n.importer.graph, key_of(w, scale, zero), stem, weight)
    extra = () if bias is None else (bias,)
    if isinstance(found, Value):
        operands = c.value(x), found, *map(c.value, extra)
        return c.b.quantized_linear(*operands, activation="int8" if n.get("accuracy_level", 0) == 4 else None)
    if bits == 4:
        raise n.fail(f"B cannot be read: {found}")
    n.importer.dense[stem] = found
    wide = c.to(c.view(w, rows, blocks, block), DType.F32)
    if zero is not None:
        wide = c.sub(wide, c.to(c.view(zero, rows, blocks, 1), DType.F32))
    else:
        wide = c.sub(wide, 128.0)
    dense = c.mul(wide, c.to(c.view(scale, rows, blocks, 1), DType.F32))
    dense = c.cut(c.view(dense, rows, blocks * block), 1, 0, k)
    return c.linear(x, c.to(dense, c.dtype(x)), *extra)


@op("GatherBlockQuantized", domain=MICROSOFT, attributes="bits block_size gather_axis quantize_axis")
def gather_block_quantized(
    c: Emitter, n: NodeView, w: Operand, ids: Operand, scale: Operand, zero: Operand | None = None
) -> Any:
    """Rows of a quantized table [v, d] (u8: two 4-bit integers a byte where ``bits`` is 4; i4, u4), quantized along d."""
    bits, block, dtype = n.get("bits", 4), n.get("block_size", 128), c.dtype(w)
    if c.rank(w) != 2 or n.get("gather_axis", 0) != 0 or n.get("quantize_axis", 1) % 2 != 1 or bits not in (4, 8) or block < 16:
        raise n.fail("only rows of a matrix quantized along its last axis, in blocks of 16 or more, are supported")
    rows, stored = (int(d) for d in c.shape(w))
    packed = dtype is DType.U8
    d = stored * (8 // bits) if packed else stored
    blocks = -(-d // block)
    load = initializer(c, n, w, "data", rows * stored)
    scales = initializer(c, n, scale, "scales", rows * blocks)
    zeros: Load = lambda: np.full((1, 1), 1 << (bits - 1) if packed else 0, np.uint8)
    if zero is not None:
        width = -(-blocks * bits // 8) if packed else blocks
        given = initializer(c, n, zero, "zero_points", rows * width)
        zeros = unpacked(given, rows, blocks, bits) if packed else lambda: given().astype(np.int8).reshape(rows, blocks)
    integers = unpacked(load, rows, d, bits) if packed else load
    if packed and bits == 4:
        dtype = DType.U4
    weight = Weight(dtype, (rows, d), block, integers, zeros, lambda: scales().reshape(rows, blocks))
    stem = w.param if isinstance(w, Value) and w.param else n.name
    found = n.importer.repacked.param(n.importer.graph, key_of(w, scale, zero), stem, weight)
    if isinstance(found, str):
        raise n.fail(f"data cannot be read: {found}")
    return c.b.quantized_embedding(found, c.value(ids), dtype=c.dtype(scale))
