"""Quantized weights as quantized parameters: dequantized initializers that products read, and onnxruntime's operators.

A weight is kept in its own integers and scales where :class:`~wasat.ir.QTensorType` holds exactly the same numbers; nothing is
rounded anew. It is repacked each time it is loaded, one weight at a time. Sources: the ONNX specification of DequantizeLinear;
onnxruntime's ContribOperators.md for MatMulNBits and GatherBlockQuantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from wasat.ir import Builder, DType, Node, QArray, QTensorType, TensorType, Value, run_node
from wasat.ir.ops.index import AxisAttrs
from wasat.ir.ops.shape import Transpose

from ..emit import Emitter, Operand
from ..registry import NodeView, op

if TYPE_CHECKING:
    from ..importer import Importer

MICROSOFT = "com.microsoft"
BLOCK = 32
"""The block that targets have kernels for, with scales in f16; longer blocks are several of these."""
_SLAB = 1 << 22
"""Elements repacked at a time: a weight's temporaries stay small beside it."""
_SCALES = (DType.F32, DType.F16, DType.BF16)
Load = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Weight:
    """(integers - zeros) * scales, a matrix [n, k] whose rows share a zero point and a scale in blocks along k.

    ``integers`` loads [n, k] of the range of ``dtype``; ``zeros`` and ``scales`` what broadcasts to [n, ceil(k / block)].
    """

    dtype: DType
    shape: tuple[int, int]
    block: int
    integers: Load
    zeros: Load
    scales: Load

    @property
    def middle(self) -> int:
        """What is taken from integers that keep their zero points, to make them signed."""
        return 0 if self.dtype.value.startswith("i") else 1 << self.dtype.bits - 1

    def exact_type(self) -> QTensorType | str:
        """The quantized type that holds the same numbers, or why there is none."""
        signed, bits = self.dtype.value.startswith("i"), self.dtype.bits
        zeros, scales = self.zeros(), self.scales()
        own = DType.of(scales.dtype)
        if own not in _SCALES:
            return f"its scales are {own}"
        if not zeros.size or not scales.size:
            return "it is empty"
        if zeros.dtype.kind == "f" and not (np.isfinite(zeros) & (zeros == np.rint(zeros))).all():
            return "its zero points are no integers"
        low = (-(1 << bits - 1) if signed else 0) - int(zeros.max())
        high = (1 << (bits - 1 if signed else bits)) - 1 - int(zeros.min())
        scheme = "int4" if low >= -8 and high <= 7 else "int8"
        k = self.shape[1]
        block = min(self.block, k)
        whole = block % BLOCK == 0 and k % block == 0  # or no target has kernels for zero points
        with np.errstate(over="ignore"):
            half = bool((scales.astype(np.float16).astype(np.float32) == scales.astype(np.float32)).all())
        fit = int(zeros.min()) - self.middle >= -128 and int(zeros.max()) - self.middle <= 127
        if whole and fit and (low < -128 or high > 127 or (scheme == "int8" and bits <= 4)):
            return QTensorType("int4" if bits <= 4 else "int8", self.shape, block, DType.F16 if half else own, True)
        if low < -128 or high > 127:
            return f"its values less their zero points, {low} to {high}, need more than 8 bits"
        if half and (self.block % BLOCK == 0 or self.block >= k):
            return QTensorType(scheme, self.shape, BLOCK, DType.F16)
        return QTensorType(scheme, self.shape, block, own)


@dataclass(frozen=True)
class RepackedParam:
    """A weight as a parameter of a quantized type."""

    type: QTensorType
    weight: Weight

    def load(self) -> QArray:
        w, (n, k) = self.weight, self.weight.shape
        theirs = -(-k // w.block)
        zeros = np.broadcast_to(w.zeros().astype(np.int16), (n, theirs))
        integers, values = w.integers(), np.empty((n, k), np.int8)
        kept = (zeros - w.middle).astype(np.int8) if self.type.zeros else None
        if kept is not None:
            zeros = np.full_like(zeros, w.middle)
        uniform = zeros.min() == zeros.max()
        step = max(1, _SLAB // k)
        for i in range(0, n, step):
            rows = slice(i, i + step)
            shift = zeros[0, 0] if uniform else np.repeat(zeros[rows], w.block, axis=1)[:, :k]
            values[rows] = integers[rows].astype(np.int16) - shift
        scales = np.broadcast_to(w.scales().astype(self.type.scale.np), (n, theirs))
        starts = np.arange(-(-k // self.type.block)) * self.type.block
        return QArray(self.type, values, np.ascontiguousarray(scales[:, starts // w.block]), kept)


def _loader(c: Emitter, x: Operand | None) -> Load | None:
    """Reads an initializer; None for anything else."""
    if isinstance(x, np.ndarray):
        return lambda: x
    if isinstance(x, Value) and x.param is not None:
        source = c.sources[x.param]
        return lambda: np.asarray(source.load())
    return None


class Weights:
    """The quantized weights of one import."""

    def __init__(self) -> None:
        self.records: list[_Dequantized] = []
        self.names: dict[Any, str] = {}
        """Parameters made, by what they are made of: a weight that several nodes read is one parameter."""
        self.dense: dict[str, str] = {}
        """Integer parameters that stay dequantized in the graph, and why."""

    def param(self, importer: Importer, key: Any, stem: str, w: Weight) -> Value | str:
        """``w`` as a quantized parameter called after the initializer ``stem``, or why it cannot be one."""
        type = w.exact_type()
        if isinstance(type, str):
            return type
        if key not in self.names:
            name = base = f"{stem}|{type.scheme}"
            for i in range(1, len(importer.params) + 1):
                if name not in importer.params:
                    break
                name = f"{base}_{i}"
            self.names[key] = name
            importer.params[name] = RepackedParam(type, w)
        return importer.graph.add_param(self.names[key], type)

    def fold(self, importer: Importer) -> None:
        """Products and lookups of dequantized initializers read quantized parameters instead."""
        self._fold(importer, self.records)
        self._fold(importer, [r for node in importer.graph.nodes if (r := _scaled(importer, node)) is not None])
        for node in importer.graph.nodes:
            for x in node.inputs if node.is_a("mul") and all(_numbers(importer, v) for v in node.inputs) else ():
                while x.node is not None and x.node.inputs:
                    x = x.node.inputs[0]
                if x.param is not None and _narrow(x) and len(x.shape) > 1:
                    self.dense.setdefault(x.param, _NO_PRODUCT)

    def _fold(self, importer: Importer, records: Sequence[_Dequantized]) -> None:
        for r in records:
            for node, index, contracted in list(r.readers()):
                w = r.along(contracted)
                found = w if isinstance(w, str) else self.param(importer, (r.key, contracted), r.param, w)
                if isinstance(found, str):
                    self.dense[r.param] = found
                    continue
                b = Builder(importer.graph, before=node, loc=node.loc)
                out = node.output
                if index == 0:
                    new = b.quantized_embedding(found, node.inputs[1], dtype=out.tensor.dtype)
                else:
                    new = b.quantized_linear(node.inputs[0], found, *node.inputs[2:])
                importer.graph.replace_uses(out, new)
                name = out.name
                importer.graph.erase(node)
                importer.graph.rename(new, name)
            _erase_unused(r.value)
            if not r.gone and r.noted:
                self.dense.setdefault(r.param, _NO_PRODUCT)


@dataclass(frozen=True)
class _Dequantized:
    """The value that a DequantizeLinear of an initializer makes, or operators that spell one."""

    value: Value
    x: Value
    dtype: DType
    integers: Load
    zeros: Load | None
    scales: Load
    scale_shape: tuple[int, ...]
    axis: int
    block: int
    key: Any
    noted: bool = True
    """Whether a DequantizeLinear makes it."""

    @property
    def param(self) -> str:
        assert self.x.param is not None
        return self.x.param

    @property
    def gone(self) -> bool:
        return self.value.node is None or self.value.node.erased

    def readers(self) -> Iterator[tuple[Node, int, int]]:
        """(node, which operand, axis of the weight that is contracted, or of a row) of what a quantized weight can serve."""
        for node, i in list(self.value.uses):
            if node.is_a("transpose") and Transpose.Attrs.of(node).perm == (1, 0):
                for user, j in list(node.output.uses):
                    if j == 1 and (axis := _contracted(user, j)) is not None:
                        yield user, j, 1 - axis
            elif (axis := _contracted(node, i)) is not None:
                yield node, i, axis

    def along(self, contracted: int) -> Weight | str:
        """The matrix with axis ``contracted`` last, or why its blocks do not run along it."""
        n, k = self.value.shape if contracted == 1 else self.value.shape[::-1]

        def turned(load: Load) -> Load:
            return load if contracted == 1 else lambda: load().T

        single = not self.block and int(np.prod(self.scale_shape)) == 1
        if self.axis < 0:
            return "its scales or zero points differ along both axes"
        if not single and (self.block > 0) != (self.axis == contracted):
            return f"its scales differ along axis {self.axis}, and products sum over axis {contracted}"
        zeros = self.zeros or (lambda: np.zeros(1, np.int8))
        if self.block and self.zeros is not None:
            zeros = turned(self.zeros)
        elif self.zeros is not None:
            zeros = _column(self.zeros)
        scales = turned(self.scales) if self.block else _column(self.scales)
        return Weight(self.dtype, (n, k), self.block or k, turned(self.integers), zeros, scales)


def _column(load: Load) -> Load:
    return lambda: load().reshape(-1, 1)


def _contracted(node: Node, i: int) -> int | None:
    """The axis of operand i, a matrix, that ``node`` sums over (or that holds the rows it looks up); None: some other use."""
    name = node.op.name
    if name == "matmul" and i == 1:
        return 0
    if (name == "linear" and i == 1) or (name == "gather" and i == 0 and AxisAttrs.of(node).axis == 0):
        return 1
    return None


def _erase_unused(v: Value) -> None:
    """Removes what makes and moves ``v`` where nothing reads it any more."""
    for user in v.users:
        if user.is_a("transpose") and not user.output.uses and not v.graph.is_output(user.output):
            v.graph.erase(user)
    todo = [v.node] if v.node is not None else []
    while todo:
        node = todo.pop()
        if not node.erased and not any(x.uses or v.graph.is_output(x) for x in node.outputs):
            v.graph.erase(node)
            todo += [x.node for x in node.inputs if x.node is not None]


def note(c: Emitter, n: NodeView, x: Operand, scale: Operand, zero: Operand | None, result: Any) -> None:
    """Remembers a dequantized initializer, for :meth:`Weights.fold`."""
    integers, scales, zeros = _loader(c, x), _loader(c, scale), _loader(c, zero)
    if not isinstance(result, Value) or not isinstance(x, Value) or x.param is None or integers is None or scales is None:
        return
    if c.rank(x) != 2 or not c.dtype(x).is_int or c.dtype(x).bits > 8 or (zero is not None and zeros is None):
        return
    weights = n.importer.weights
    if c.dtype(result) is not c.dtype(scale):  # rounded twice
        weights.dense[x.param] = f"its scales are {c.dtype(scale)} and it is dequantized to {c.dtype(result)}"
        return
    axis, block = n.get("axis", 1) % 2, n.get("block_size", 0)
    key = (_key(x, scale, zero), axis, block)
    weights.records.append(_Dequantized(
        result, x, c.dtype(x), integers, zeros, scales, c.shape(scale), axis, block, key
    ))  # fmt: skip


# -- dequantization spelled out ----------------------------------------------------------------------------------------------
_NO_PRODUCT = "what reads it is no product with a matrix and no lookup of rows"
_READ = ("transpose", "reshape", "cast")
_EXACT = (DType.F16, DType.F32, DType.F64, DType.I16, DType.I32, DType.I64)
"""Types in which integers of 8 bits less their zero points are exact."""


def _narrow(x: Value) -> bool:
    return isinstance(x.type, TensorType) and x.tensor.dtype.is_int and x.tensor.dtype.bits <= 8


def _numbers(importer: Importer, v: Value) -> tuple[Load, Any] | None:
    """Reads a parameter or constant, also cast or moved, and its key; None for anything else."""
    if v.const is not None:
        array = v.const
        return lambda: array, (array.tobytes(), array.shape)
    if v.param is not None and isinstance(v.type, TensorType):
        source = importer.params[v.param]
        return lambda: np.asarray(source.load()), v.param
    node = v.made_by(*_READ)
    inner = _numbers(importer, node.inputs[0]) if node is not None and not v.type.symbols else None
    if node is None or inner is None:
        return None
    load = inner[0]
    return lambda: np.asarray(run_node(node, [load()], {})[0]), (inner[1], node.op.name, node.attrs)


def _scaled(importer: Importer, node: Node) -> _Dequantized | None:
    """``(cast(q) - zero) * scale`` of integers of at most 8 bits, in any order of operands, turned or not.

    Without a scale, too, where that comes behind the product.
    """
    if len(node.outputs) != 1 or not isinstance(node.output.type, TensorType) or len(node.output.shape) != 2:
        return None
    value, scale = node.output, None
    if not value.tensor.dtype.is_float or not node.is_a("mul", "sub", "cast"):
        return None
    if node.is_a("mul"):
        for v, other in (node.inputs, node.inputs[::-1]):
            if v.shape == value.shape and _chain(v) is not None and (scale := _numbers(importer, other)) is not None:
                chain, scaled_by = _chain(v), other.shape
                break
        else:
            return None
    else:
        chain, scaled_by = _chain(value), ()
    if chain is None:
        return None
    x, zero, turned = chain
    found = _numbers(importer, zero) if zero is not None else None
    integers = _numbers(importer, x)
    if integers is None or (zero is not None and found is None):
        return None
    load, rank = integers[0], 2
    zero_shape = zero.shape if zero is not None else ()
    one = value.tensor.dtype.np
    scales = scale[0] if scale is not None else (lambda: np.ones(1, one))
    zeros = found[0] if found is not None else None
    spread = [
        {i for i, d in enumerate((1,) * (rank - len(shape)) + tuple(shape)) if d != 1} for shape in (scaled_by, zero_shape)
    ]
    if zero is not None and turned > 0:  # the zero point was subtracted before the axes were exchanged
        spread[1] = {1 - i for i in spread[1]}
    axes = spread[0] | spread[1]
    axis = -1 if len(axes) > 1 else next(iter(axes), 0)
    shape = () if not axes else tuple(value.shape[i] if i == axis else 1 for i in range(rank))
    key = ((x.param, None if found is None else found[1], None if scale is None else scale[1]), turned, axis, str(one))
    return _Dequantized(
        value, x, x.tensor.dtype, (lambda: load().T) if turned else load, zeros, scales, shape, axis, 0, key, noted=False
    )


def _chain(v: Value) -> tuple[Value, Value | None, int] | None:
    """``v`` as (parameter of integers, zero point that is subtracted or None, 1 if the axes are exchanged after it, else 0)."""
    zero: Value | None = None
    turned = 0
    while v.node is not None:
        name = v.node.op.name
        if name == "transpose" and Transpose.Attrs.of(v.node).perm == (1, 0) and zero is None:
            turned = 1 - turned
        elif name == "sub" and zero is None and v.node.inputs[0].shape == v.shape and v.tensor.dtype in _EXACT:
            zero = v.node.inputs[1]
        elif name != "cast" or v.tensor.dtype not in _EXACT:
            return None
        v = v.node.inputs[0]
    return (v, zero, turned) if v.param is not None and _narrow(v) and len(v.shape) == 2 else None


# -- onnxruntime's operators -------------------------------------------------------------------------------------------------
def _unpacked(load: Load, rows: int, columns: int, bits: int) -> Load:
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


def _initializer(c: Emitter, n: NodeView, x: Operand | None, what: str, size: int) -> Load:
    """Reads operand ``what``, which must be an initializer of ``size`` elements."""
    load = _loader(c, x)
    if load is None or x is None:
        raise n.fail(f"{what} must be an initializer")
    if int(np.prod(c.shape(x))) != size:
        raise n.fail(f"{what} has shape {list(c.shape(x))} and should have {size} elements")
    return load


def _key(*operands: Operand | None) -> tuple[Any, ...]:
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
    load = _initializer(c, n, w, "B", rows * blocks * block * bits // 8)
    scales = _initializer(c, n, scale, "scales", rows * blocks)
    zeros: Load = lambda: np.full((1, 1), 1 << (bits - 1), np.uint8)
    if zero is not None and c.dtype(zero).is_float:
        given = _initializer(c, n, zero, "zero_points", rows * blocks)
        zeros = lambda: given().reshape(rows, blocks)
    elif zero is not None:
        width = -(-blocks * bits // 8)
        zeros = _unpacked(_initializer(c, n, zero, "zero_points", rows * width), rows, blocks, bits)
    weight = Weight(
        DType.U4 if bits == 4 else DType.U8, (rows, k), block, _unpacked(load, rows, k, bits), zeros,
        lambda: scales().reshape(rows, blocks),
    )  # fmt: skip
    stem = w.param if isinstance(w, Value) and w.param else n.name
    found = n.importer.weights.param(n.importer, _key(w, scale, zero), stem, weight)
    extra = () if bias is None else (bias,)
    if isinstance(found, Value):
        operands = c.value(x), found, *map(c.value, extra)
        return c.b.quantized_linear(*operands, activation="int8" if n.get("accuracy_level", 0) == 4 else None)
    if bits == 4:
        raise n.fail(f"B cannot be read: {found}")
    n.importer.weights.dense[stem] = found
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
    load = _initializer(c, n, w, "data", rows * stored)
    scales = _initializer(c, n, scale, "scales", rows * blocks)
    zeros: Load = lambda: np.full((1, 1), 1 << (bits - 1) if packed else 0, np.uint8)
    if zero is not None:
        width = -(-blocks * bits // 8) if packed else blocks
        given = _initializer(c, n, zero, "zero_points", rows * width)
        zeros = _unpacked(given, rows, blocks, bits) if packed else lambda: given().astype(np.int8).reshape(rows, blocks)
    integers = _unpacked(load, rows, d, bits) if packed else load
    if packed and bits == 4:
        dtype = DType.U4
    weight = Weight(dtype, (rows, d), block, integers, zeros, lambda: scales().reshape(rows, blocks))
    stem = w.param if isinstance(w, Value) and w.param else n.name
    found = n.importer.weights.param(n.importer, _key(w, scale, zero), stem, weight)
    if isinstance(found, str):
        raise n.fail(f"data cannot be read: {found}")
    return c.b.quantized_embedding(found, c.value(ids), dtype=c.dtype(scale))
