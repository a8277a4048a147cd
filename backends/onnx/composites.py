"""Emissions of norms, rotary positions, attention, caches and quantized weights; each states the semantics it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from wasat.ir import DType, Node, QTensorType, equal
from wasat.ir.axes import product

from .emitter import Emitter, Options
from .primitives import reduced
from .registry import emits


def _attrs(node: Node) -> Any:
    return node.attrs


# -- norms ------------------------------------------------------------------------------------------------------------------
def _known_row(node: Node, options: Options) -> bool:
    """The operators require a weight: ones, if the row's length is known."""
    return len(node.inputs) > 1 or isinstance(node.inputs[0].shape[-1], int)


def _ones(e: Emitter, node: Node, x: str) -> str:
    return e.const(np.ones(node.inputs[0].shape[-1]), e.dtype[x])


def _stash(e: Emitter, x: str) -> int | None:
    """The type that statistics are computed in: f32 or wider."""
    return 11 if e.dtype[x] is DType.F64 else None


@emits("rms_norm", since=23, when=_known_row)
def _rms_norm(e: Emitter, node: Node, x: str, weight: str = "") -> str:
    own = e.dtype[x]
    wide = e.cast(x, DType.F32) if own.bits < 32 else x  # the operator rounds before the weight, the IR after it
    weight = e.cast(weight, e.dtype[wide]) if weight else _ones(e, node, wide)
    return e.cast(e.op("RMSNormalization", wide, weight, epsilon=_attrs(node).eps, stash_type=_stash(e, wide)), own)


@emits("layer_norm", when=_known_row)
def _layer_norm(e: Emitter, node: Node, x: str, weight: str = "", bias: str = "") -> str:
    own = e.dtype[x]
    wide = e.cast(x, DType.F32) if own.bits < 32 else x
    weight = e.cast(weight, e.dtype[wide]) if weight else _ones(e, node, wide)
    bias = e.cast(bias, e.dtype[wide]) if bias else ""
    return e.cast(e.op("LayerNormalization", wide, weight, bias, epsilon=_attrs(node).eps, stash_type=_stash(e, wide)), own)


# -- positions --------------------------------------------------------------------------------------------------------------
def _rotary(node: Node, options: Options) -> bool:
    """The operator needs the number of heads, and works in f32 or less."""
    return isinstance(node.inputs[0].shape[2], int) and node.inputs[2].tensor.dtype is not DType.F64


@emits("rope", since=23, when=_rotary)
def _rope(e: Emitter, node: Node, x: str, positions: str, inv_freq: str) -> str:
    """Heads stay the third axis: [b, s, h*d] with num_heads. Angles are made here, so that any position is right."""
    a, v, at = _attrs(node), node.inputs[0], node.inputs[1]
    b, s, h, d = v.shape
    half = node.inputs[2].shape[0]
    own, work = e.dtype[x], e.dtype[inv_freq]
    angles = e.op("Mul", e.cast(e.reshape(positions, (*at.shape, 1)), work), inv_freq)
    tables = []
    for f in ("Cos", "Sin"):
        t = e.op(f, angles)
        t = t if a.factor == 1 else e.op("Mul", t, e.like(a.factor, t))
        # one table a row: the operator does not broadcast them
        tables.append(t if at.shape[:-1] == (b,) else e.op("Expand", t, e.shape((b, s, half))))
    wide = e.reshape(e.cast(x, work), (b, s, h * d))
    y = e.op(
        "RotaryEmbedding", wide, *tables, num_heads=h, interleaved=int(a.interleaved),
        rotary_embedding_dim=0 if d == 2 * half else 2 * half,
    )  # fmt: skip
    return e.reshape(e.cast(y, own), v.shape)


# -- attention --------------------------------------------------------------------------------------------------------------
def _direct(node: Node, options: Options) -> bool:
    """Whether the operator's own causal rule is the IR's (it aligns queries and keys at the start): see masks.py. Its scale is
    f32, and so is the root of it that its definition multiplies by: of f64 that would leave half of the digits."""
    a = _attrs(node)
    q, k = node.inputs[:2]
    if q.tensor.dtype is DType.F64:
        return False
    aligned = not a.causal or equal(q.shape[1], k.shape[1]) is True
    return a.window is None and not a.sink and aligned and isinstance(q.shape[2], int) and isinstance(k.shape[2], int)


@emits("attention", since=23, when=_direct)
def _attention(e: Emitter, node: Node, q: str, k: str, v: str, mask: str = "") -> str:
    """Heads stay the third axis: [b, s, h*d]. The mask gets its full [s, t]: a short last axis would be filled with -inf."""
    a, (qv, kv, vv) = _attrs(node), node.inputs[:3]
    _, s, h, _ = qv.shape
    t, g = kv.shape[1:3]
    flat = [e.reshape(x, (*y.shape[:2], y.shape[2] * y.shape[3])) for x, y in ((q, qv), (k, kv), (v, vv))]
    if mask:
        m = node.inputs[3]
        lead = (1,) * (4 - len(m.shape)) + tuple(m.shape[:-2])
        if m.shape[-2:] != (s, t):
            mask = e.op("Expand", mask, e.shape((*lead, s, t)[-4:]))
        elif len(m.shape) == 3:
            mask = e.reshape(mask, (1, *m.shape))
    own = e.dtype[q]
    y = e.op(
        "Attention", *flat, mask, q_num_heads=h, kv_num_heads=g, scale=a.scale, is_causal=int(a.causal),
        softcap=a.softcap, softmax_precision=1 if own.bits < 32 else None,
    )  # fmt: skip
    return e.reshape(y, node.output.shape)


def _recurrent(node: Node, options: Options) -> bool:
    """Whether the operator has the rule: decays by their logarithms, reads after the write, all of one type."""
    a = _attrs(node)
    q, k, _, state, *more = node.inputs
    known = isinstance(q.shape[2], int) and isinstance(k.shape[2], int)
    types = {x.tensor.dtype for x in (q, *more)}
    half = DType.F64 not in (*types, state.tensor.dtype)
    return known and half and len(types) == 1 and (a.log or not a.gated) and not a.before and a.scale != 0


@emits("linear_attention", since=27, when=_recurrent)
def _linear_attention(e: Emitter, node: Node, q: str, k: str, v: str, state: str, *more: str) -> Sequence[str]:
    """Heads stay the third axis: [b, s, h*d]."""
    a = _attrs(node)
    flat = [e.reshape(x, (*y.shape[:2], product(*y.shape[2:]))) for x, y in zip((q, k, v), node.inputs)]
    packed = [e.reshape(x, (*y.shape[:2], product(*y.shape[2:]))) for x, y in zip(more, node.inputs[4:])]
    decay, beta = packed[0] if a.gated else "", packed[-1] if a.delta else ""
    y, last = e.op(
        "LinearAttention", *flat, state, decay, beta, outputs=2, q_num_heads=node.inputs[0].shape[2],
        kv_num_heads=node.inputs[1].shape[2], scale=a.scale, update_rule=a.rule,
    )  # fmt: skip
    e.dtype[last] = node.inputs[3].tensor.dtype
    return [e.reshape(y, node.outputs[0].shape), last]


@emits("cache_update", since=24)
def _tensor_scatter(e: Emitter, node: Node, cache: str, new: str, past: str) -> str:
    mode = "circular" if _attrs(node).ring else "linear"
    return e.op("TensorScatter", cache, new, e.cast(past, DType.I64), axis=1, mode=mode)


@emits("cache_update")
def _scatter_rows(e: Emitter, node: Node, cache: str, new: str, past: str) -> str:
    """ScatterND at (row, slot)."""
    b, s = node.inputs[1].shape[:2]
    zero, one = e.const(0, DType.I64), e.const(1, DType.I64)
    at = e.op("Add", e.reshape(e.cast(past, DType.I64), (b, 1)), e.op("Range", zero, e.scalar(s), one))
    if _attrs(node).ring:
        at = e.op("Mod", at, e.dim(node.inputs[0].shape[1]))
    rows = e.op("Expand", e.reshape(e.op("Range", zero, e.scalar(b), one), (b, 1)), e.shape((b, s)))
    places = e.op("Concat", e.reshape(rows, (b, s, 1)), e.reshape(at, (b, s, 1)), axis=2)
    return e.op("ScatterND", cache, places, new)


# -- quantized weights ------------------------------------------------------------------------------------------------------
def _blocks(node: Node, at: int) -> QTensorType:
    t = node.inputs[at].type
    assert isinstance(t, QTensorType)
    return t


def _dense(e: Emitter, t: QTensorType, values: str, scales: str, dtype: DType, zeros: str = "") -> str:
    """(values - zeros) * scales, rounded once: DequantizeLinear with blocks from operator set 21 on, else scales repeated, in
    f32; zero points are repeated, too (they may have more bits than the values)."""
    if e.opset >= 21 and not zeros:
        work = e.dtype[scales]
        return e.cast(e.op("DequantizeLinear", values, scales, dtype=work, axis=len(t.shape) - 1, block_size=t.block), dtype)
    k = t.shape[-1]
    assert isinstance(k, int)

    def spread(x: str) -> str:
        return str(e.op("Gather", e.cast(x, DType.F32), e.const(np.arange(k) // t.block), axis=len(t.shape) - 1))

    x = e.cast(values, DType.F32)
    return e.cast(e.op("Mul", e.op("Sub", x, spread(zeros)) if zeros else x, spread(scales)), dtype)


@emits("concat", when=lambda node, options: isinstance(node.output.type, QTensorType))
def _concat(e: Emitter, node: Node, *ws: str) -> str:
    """Of quantized weights: values, scales, offsets and zero points each for themselves. Of 4-bit integers ONNX has no Concat.
    """
    t, axis = node.output.type, _attrs(node).axis
    assert isinstance(t, QTensorType)
    e.scale_names[node.output] = e.op("Concat", *(e.scales(v, t.scale) for v in node.inputs), axis=axis)
    if t.offset:
        e.offset_names[node.output] = e.op("Concat", *(e.offsets(v) for v in node.inputs), axis=axis)
    if t.zeros:
        e.zero_names[node.output] = e.op("Concat", *(e.zeros(v) for v in node.inputs), axis=axis)
    return str(e.op("Concat", *(e.cast(w, DType.I8) for w in ws), axis=axis))


def _nearest(node: Node) -> bool:
    """Whether it divides and rounds, and searches nothing: that belongs to weights, before they are exported."""
    t = node.output.type
    return isinstance(t, QTensorType) and t.stored is None and not (t.zeros or _attrs(node).search)


@emits("quantize", when=lambda node, options: _nearest(node))
def _quantize(e: Emitter, node: Node, x: str) -> str:
    """As ir.ops.quant.quantize_array: a scale a block, rounded before the values are divided by it."""
    t = node.output.type
    assert isinstance(t, QTensorType)
    *lead, k = t.shape
    wide, last = e.cast(x, DType.F32), len(t.shape)
    pads = e.shape([*(0 for _ in range(2 * last - 1)), t.blocks * t.block - k])
    rows = e.reshape(e.op("Pad", wide, pads, e.like(0, wide)), (*lead, t.blocks, t.block))
    size, axis = e.op("Abs", rows), e.const([last], DType.I64)
    if t.scheme == "int8":
        top = reduced(e, "ReduceMax", size, (last,), True)
        step, low, high = e.op("Div", top, e.like(127, top)), -127, 127
    else:  # the element of largest magnitude, sign included, goes to -8
        peak = e.op("GatherElements", rows, e.op("ArgMax", size, axis=last), axis=last)
        step, low, high = e.op("Div", peak, e.like(-8, peak)), -8, 7
    scales = e.cast(step, t.scale)
    step = e.cast(scales, DType.F32)
    zero = e.like(0, step)
    inverse = e.op("Where", e.op("Equal", step, zero), zero, e.op("Reciprocal", step))
    level = e.op("Round", e.op("Mul", rows, inverse))
    level = e.reshape(e.op("Clip", level, e.like(low, level), e.like(high, level)), (*lead, t.blocks * t.block))
    level = e.op("Slice", level, e.shape([0]), e.shape([k]), e.shape([last - 1]))
    e.scale_names[node.output] = e.op("Squeeze", scales, axis)
    return e.cast(level, e.integer(t))


@emits("dequantize")
def _dequantize(e: Emitter, node: Node, w: str) -> str:
    t, dtype = _blocks(node, 0), _attrs(node).dtype
    if not t.offset:
        return _dense(e, t, w, e.scales(node.inputs[0], dtype), dtype, e.zeros(node.inputs[0]))
    k = t.shape[-1]
    assert isinstance(k, int)
    x = _dense(e, t, w, e.scales(node.inputs[0], DType.F32), DType.F32)
    spread = e.op("Gather", e.offsets(node.inputs[0]), e.const(np.arange(k) // t.block), axis=len(t.shape) - 1)
    return e.cast(e.op("Add", x, spread), dtype)


@emits("quantized_embedding", when=lambda node, options: _blocks(node, 0).scheme == "int8" and not _fits_rows(node, options))
def _quantized_embedding(e: Emitter, node: Node, w: str, ids: str) -> str:
    """Rows are picked first, so that only they become dense (of 4-bit integers ONNX has no Gather)."""
    t = _blocks(node, 0)
    rows = t.with_shape(*node.inputs[1].shape, t.shape[1])
    dtype = _attrs(node).dtype
    values, scales = (e.op("Gather", x, ids, axis=0) for x in (w, e.scales(node.inputs[0], dtype)))
    zeros = e.op("Gather", e.zeros(node.inputs[0]), ids, axis=0) if t.zeros else ""
    return _dense(e, rows, values, scales, dtype, zeros)


def _nbits(t: QTensorType) -> int:
    return 4 if t.scheme == "int4" else 8


def _fits_nbits(node: Node, at: int, dtype: DType, options: Options) -> bool:
    """onnxruntime's operators take a parameter in blocks of a power of two, at least 16, with scales in the type of floats."""
    t = _blocks(node, at)
    power = t.block >= 16 and t.block & (t.block - 1) == 0
    stored = node.inputs[at].param is not None and not t.symbols and not t.offset and not t.zeros
    exact = dtype is DType.F32 or dtype is t.scale is DType.F16
    return options.matmul_nbits and power and stored and exact


def _packed(e: Emitter, node: Node, at: int, width: int, shape: Sequence[int], dtype: DType) -> tuple[str, str]:
    """Initializers of values, u8 in ``shape``, and scales: values around 2^(bits-1), the low half of a byte first.

    Each row is filled up to ``width`` values.
    """
    t, name = _blocks(node, at), node.inputs[at].param
    bits = _nbits(t)
    assert name is not None

    def values() -> np.ndarray:
        dense = e.load(name).values
        padded = np.full((len(dense), width), 2 ** (bits - 1), np.uint8)
        padded[:, : dense.shape[1]] = dense.astype(np.int16) + 2 ** (bits - 1)
        stored = padded if bits == 8 else padded[:, 0::2] | (padded[:, 1::2] << 4)
        return stored.reshape(shape)

    kind = "rows" if len(shape) == 2 else "blocks"
    stored = e.weight(f"{name}.q{bits}.{kind}", DType.U8, shape, values)
    return stored, e.scales(node.inputs[at], dtype)


@emits("quantized_linear", when=lambda node, options: _fits_nbits(node, 1, node.inputs[0].tensor.dtype, options))
def _matmul_nbits(e: Emitter, node: Node, x: str, w: str, bias: str = "") -> str:
    t = _blocks(node, 1)
    (n, k), blocks, bits, own = t.shape, t.blocks, _nbits(t), e.dtype[x]
    assert isinstance(n, int)
    assert isinstance(blocks, int)
    values, scales = _packed(e, node, 1, blocks * t.block, (n, blocks, t.block * bits // 8), own)
    level = 4 if _attrs(node).activation == "int8" else 1  # products of int8, or in f32
    y = e.op(
        "MatMulNBits", x, values, scales, domain="com.microsoft", dtype=own, K=k, N=n, bits=bits, block_size=t.block,
        accuracy_level=level,
    )  # fmt: skip
    return str(e.op("Add", y, bias)) if bias else str(y)


def _fits_rows(node: Node, options: Options) -> bool:
    t, k = _blocks(node, 0), _blocks(node, 0).shape[-1]
    whole = isinstance(k, int) and k * _nbits(t) % 8 == 0
    return whole and _fits_nbits(node, 0, _attrs(node).dtype, options)


@emits("quantized_embedding", when=_fits_rows)
def _gather_block_quantized(e: Emitter, node: Node, w: str, ids: str) -> str:
    t, own = _blocks(node, 0), _attrs(node).dtype
    v, k = t.shape
    bits = _nbits(t)
    assert isinstance(v, int)
    assert isinstance(k, int)
    values, scales = _packed(e, node, 0, k, (v, k * bits // 8), own)
    return e.op(
        "GatherBlockQuantized", values, e.cast(ids, DType.I64), scales, domain="com.microsoft", dtype=own, gather_axis=0,
        quantize_axis=1, block_size=t.block, bits=bits,
    )  # fmt: skip


# -- signal -----------------------------------------------------------------------------------------------------------------
@emits("dft", since=20, when=lambda node, options: len(node.inputs[0].shape) > 2 and not (
    _attrs(node).inverse and _attrs(node).onesided))  # fmt: skip
def _dft(e: Emitter, node: Node, x: str) -> str:
    a = _attrs(node)
    return e.op("DFT", x, e.scalar(a.length), e.const(-2, DType.I64), inverse=int(a.inverse), onesided=int(a.onesided))
