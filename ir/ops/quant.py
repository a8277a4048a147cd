"""Weights in blocks of few bits, and the operations that read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import op as _op
from ..axes import AxisRule, Factor, along, free
from ..dims import DimLike
from ..errors import TypeMismatch
from ..op import Bounds, ErrorSample, Op, Sample, floating, quantized, register
from ..quantizers import in_format, searched
from ..schemes import SCHEMES, Scheme, scheme_named
from ..types import BlockArray, DType, QArray, QTensorType, TensorType
from .elementwise import grid, wide
from .index import _checked, indices
from .linalg import rows_by_weight, rows_type

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Node, Value


QUANTIZERS = ("int8", "int4", *(s.name for s in SCHEMES.values() if s.write is not None))
"""Schemes that weights can be brought into, beside the family of :func:`~wasat.ir.schemes.scheme_named`."""
_OWN = ("s4b64", "s5b96", "s6b160", "s7b96")
LEAST_TOP = 127 * 2.0**-126
"""The least that counts as the largest number of a block of activations: its step is the least normal number of f32, and
127 / it is finite. Blocks that are smaller are rounded to whole steps of that, as subnormal numbers are."""


def quantize_array(
    x: np.ndarray, type: QTensorType, search: bool = False, importance: np.ndarray | None = None
) -> QArray:  # fmt: skip
    """``x`` quantized in blocks along its last axis; see :class:`Quantize`. Works through x in slabs: memory matters here.

    ``importance`` [k] weights the errors of features where scales are searched.
    """
    if type.stored is not None:
        if type.stored.write is None:
            raise TypeMismatch(f"{type.scheme} is not one of {', '.join(QUANTIZERS)}, s4b256: its blocks come from files")
        return BlockArray(type, in_format(x, type.stored, importance))
    low, high = (-127, 127) if type.scheme == "int8" else (-8, 7)
    if search or type.zeros:
        return QArray(type, *searched(x, low, high, type.block, type.scale.np, type.zeros, importance))
    *lead, k = x.shape
    blocks = -(-k // type.block)
    rows = x.reshape(math.prod(lead), k)
    values = np.empty((len(rows), k), np.int8)
    scales = np.empty((len(rows), blocks), type.scale.np)
    step = max(1, (1 << 20) // max(k, 1))
    for i in range(0, len(rows), step):
        w = np.zeros((len(rows[i : i + step]), blocks * type.block), np.float32)
        w[:, :k] = rows[i : i + step]
        w = w.reshape(len(w), blocks, type.block)
        if type.scheme == "int8":
            d = np.abs(w).max(-1) / np.float32(127)
        else:  # the element of largest magnitude, sign included, goes to -8: one more level than +-7 (as llama.cpp's Q4_0)
            peak = np.take_along_axis(w, np.abs(w).argmax(-1)[..., None], -1)[..., 0]
            d = peak / np.float32(-8)
        s = d.astype(type.scale.np)
        with np.errstate(over="ignore"):
            inverse = np.divide(np.float32(1), s, where=s != 0, out=np.zeros(s.shape, np.float32), dtype=np.float32)
        w *= np.where(np.isfinite(inverse), inverse, 0)[..., None]  # a scale in bf16 or f32 may be too small to divide by
        np.rint(w, out=w)
        np.clip(w, low, high, out=w)
        values[i : i + step] = w.reshape(len(w), blocks * type.block)[:, :k]
        scales[i : i + step] = s
    return QArray(type, values.reshape(x.shape), scales.reshape(*lead, blocks))


def quantize_rows(x: np.ndarray, block: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Activations [m, k] to int8 per row and block: q [m, blocks, block] (zero-padded) and d f32 [m, blocks].

    With top = max(max|x|, LEAST_TOP): d = top / 127 and q = round_half_even(x * (127 / top)), both in f32. A block with a NaN
    or an infinity has d = NaN, so that all that is computed from its row is NaN.
    """
    m, k = x.shape
    blocks = -(-k // block)
    padded = np.zeros((m, blocks * block), np.float32)
    padded[:, :k] = x
    padded = padded.reshape(m, blocks, block)
    top = np.maximum(np.abs(padded).max(-1), np.float32(LEAST_TOP))
    finite = np.isfinite(top)
    inverse = np.float32(127) / np.where(finite, top, np.float32(1))
    padded[~finite] = 0
    return np.rint(padded * inverse[..., None]).astype(np.int8), np.where(finite, top, np.float32(np.nan)) / np.float32(127)


@register
class Quantize(Op):
    """Quantization in blocks of ``block`` along the last axis: value = clip(round_half_even(x / scale)).

    int8: scale = max|block| / 127, values -127..127. int4: scale = -(element of largest magnitude) / 8, values -8..7.
    Scales are rounded to ``scale`` before the values are computed. With ``search`` scales are those whose squared error is
    least, of some that are tried (:mod:`wasat.ir.quantizers`); with ``zeros``, too, and blocks have zero points. Formats of
    blocks (``q4_k``) have what they have; their numbers are searched.
    """

    name = "quantize"
    kind = "row"
    differentiable = False

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        scheme: str
        block: int = 32
        scale: DType = DType.F16
        zeros: bool = False
        search: bool = False

    def infer(self, attrs: Attrs, x: TensorType) -> QTensorType:
        if floating(x).rank < 1:
            raise TypeMismatch("a scalar cannot be quantized in blocks")
        stored = scheme_named(attrs.scheme)
        if attrs.scheme not in QUANTIZERS and (stored is None or stored.write is None):
            raise TypeMismatch(f"scheme={attrs.scheme!r} is not one of {', '.join(QUANTIZERS)}, s4b256")
        return QTensorType(attrs.scheme, x.shape, attrs.block, attrs.scale, attrs.zeros)

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        return along(x.shape, (x.rank - 1,), lambda d: Factor(d, "normalized"))

    def reference(self, attrs: Attrs, x: np.ndarray) -> QArray:
        return quantize_array(x, QTensorType(attrs.scheme, x.shape, attrs.block, attrs.scale, attrs.zeros), attrs.search)

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(3, 70)], {"scheme": "int8"})
        yield Sample([grid(3, 64)], {"scheme": "int4"})
        yield Sample([grid(2, 9)], {"scheme": "int4", "block": 4, "scale": "f32"})
        yield Sample([np.zeros((2, 32), np.float32)], {"scheme": "int8"})
        yield Sample([grid(3, 70)], {"scheme": "int4", "search": True})
        yield Sample([grid(3, 70)], {"scheme": "int4", "zeros": True})
        for name in (*QUANTIZERS[2:], *_OWN):
            yield Sample([grid(3, 2 * _scheme(name).block)], {"scheme": name})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[4]"], {"scheme": "int3"}, "is not one of int8, int4, q4_1")
        yield ErrorSample(["f32[256]"], {"scheme": "q2_k"}, "is not one of int8, int4, q4_1")
        yield ErrorSample(["f32[4, 40]"], {"scheme": "q4_1"}, "whole blocks of 32")
        yield ErrorSample(["f32[4, 256]"], {"scheme": "q4_k", "zeros": True}, "no zero points")
        yield ErrorSample(["i32[4]"], {"scheme": "int4"}, "must be float")
        yield ErrorSample(["f32[4]"], {"scheme": "int4", "block": 0}, "block >= 1")


@dataclass(frozen=True)
class DTypeAttrs(_op.Attrs):
    """Element type of the result."""

    dtype: DType = DType.F32


@register
class Dequantize(Op):
    """The dense tensor a quantized one stands for: (value - zero) * scale (+ offset), computed in f32."""

    name = "dequantize"
    kind = "row"
    Attrs = DTypeAttrs
    differentiable = False

    def infer(self, attrs: DTypeAttrs, q: QTensorType) -> TensorType:
        return TensorType(attrs.dtype, quantized(q).shape)

    def axes(self, attrs: DTypeAttrs, q: QTensorType) -> AxisRule:
        return along(q.shape, (q.rank - 1,), lambda d: Factor(d, "whole"))

    def reference(self, attrs: DTypeAttrs, q: QArray) -> np.ndarray:
        return q.dense(attrs.dtype)

    def samples(self) -> Iterable[Sample]:
        yield Sample([_q("int4", 3, 70)])
        yield Sample([_q("int8", 3, 64)], {"dtype": "f16"})
        yield Sample([_z("int4", 64, 3, 128)])
        for name in (*SCHEMES, *_OWN):
            yield Sample([_q(name, 3, 2 * _scheme(name).block)])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[4]"], {}, "must be quantized")


def random_zeros(type: QTensorType, seed: int = 0) -> QArray:
    """Arbitrary values, zero points and scales, the elements about 1 in size."""
    rng = np.random.default_rng(seed)
    shape, high = TensorType(DType.F32, type.shape).concrete({}), 8 if type.scheme == "int4" else 128
    blocks = (*shape[:-1], -(-shape[-1] // type.block))
    values, zeros = (rng.integers(-high, high, s, np.int8) for s in (shape, blocks))
    return QArray(type, values, (rng.standard_normal(blocks) / high).astype(type.scale.np), zeros if type.zeros else None)


def _scheme(name: str) -> Scheme:
    found = scheme_named(name)
    assert found is not None
    return found


def _z(scheme: str, block: int, *shape: int) -> QArray:
    return random_zeros(QTensorType(scheme, shape, block, DType.F16, True))


def _q(scheme: str, *shape: int) -> QArray:
    stored = scheme_named(scheme)
    if stored is not None:
        return BlockArray(QTensorType(scheme, shape), stored.random(np.random.default_rng(0), shape))
    x = np.sin(np.arange(int(np.prod(shape)))).astype(np.float32).reshape(shape)
    return quantize_array(x, QTensorType(scheme, shape))


def product_of_integers(activation: str | None, x: np.ndarray, w: QArray) -> np.ndarray:
    """x [.., k] @ w^T in x's type, as :class:`QuantizedLinear` says."""
    if activation is None:
        return x @ w.dense(DType.F32).T.astype(x.dtype)
    n, k = w.shape
    flat = x.reshape(math.prod(x.shape[:-1]), k).astype(np.float32)
    q, d = quantize_rows(flat, w.type.row_block)
    out = np.zeros((len(flat), n), np.float32)
    values, scales, zeros, offsets = w.values, w.scales, w.zeros, w.offsets
    q = q.reshape(len(flat), math.prod(q.shape[1:])).astype(np.float32)
    step = min(w.type.block, w.type.row_block)
    for at in range(0, k, step):
        part, i = q[:, at : min(at + step, k)], at // w.type.block
        of_row = d[:, at // w.type.row_block, None]
        dot = part @ values[:, at : at + step].T.astype(np.float32)  # of integers, exact in f32
        if zeros is not None:
            dot -= part.sum(-1, keepdims=True) * zeros[None, :, i].astype(np.float32)
        out += dot * (of_row * scales[None, :, i].astype(np.float32))
        if offsets is not None:
            out += part.sum(-1, keepdims=True) * (of_row * offsets[None, :, i])
    return out.reshape(*x.shape[:-1], n)


def rounded_rows(b: Builder, x: Value, w: Value) -> Value:
    """x as its rows are once quantized in the blocks of w, in f32: where dots of a block are exact."""
    q = w.type
    assert isinstance(q, QTensorType)
    k, block = x.shape[-1], q.row_block
    blocks = (k + (block - 1)) // block
    lead = (0,) * (len(x.shape) - 1)
    f = b.cast(x, dtype=DType.F32) if x.tensor.dtype is not DType.F32 else x
    f = b.pad(f, low=(*lead, 0), high=(*lead, blocks * block - k))
    f = b.reshape(f, shape=(*x.shape[:-1], blocks, block))
    top = b.maximum(b.reduce_max(b.abs(f), axes=(len(x.shape),), keepdims=True), LEAST_TOP)
    rounded = b.mul(b.round(b.mul(f, b.div(127.0, top))), b.div(top, 127.0))
    return b.slice(b.reshape(rounded, shape=(*x.shape[:-1], blocks * block)), starts=(*lead, 0), stops=x.shape)


@register
class QuantizedLinear(Op):
    """x [.., k] @ w^T (+ bias) with a quantized weight w [n, k] -> [.., n].

    ``activation=None``: linear(x, dequantize(w)). ``"int8"``: each row of x is quantized in blocks of 32 (of w's own length,
    if that is no multiple of 32; see quantize_rows), the blocks' integer dot products are exact, and y = sum over blocks of
    w_scale * d * dot, in f32; a zero point of w takes zero * (sum of x's integers) from the dot product, an offset adds
    offset * d * (that sum).
    """

    name = "quantized_linear"
    kind = "product"
    weight = 1

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        activation: str | None = None

    def infer(self, attrs: Attrs, x: TensorType, w: QTensorType, bias: TensorType | None = None) -> TensorType:
        if attrs.activation not in (None, "int8"):
            raise TypeMismatch(f"activation={attrs.activation!r} is not one of int8, none")
        if quantized(w, "the weight").rank != 2 or floating(x, "x").rank < 1:
            raise TypeMismatch(f"quantized_linear takes x [.., k] and a weight [n, k], not {x} and {w}")
        return rows_type(x, w, bias)

    def axes(self, attrs: Attrs, x: TensorType, w: QTensorType, *bias: TensorType) -> AxisRule:
        return rows_by_weight(x, w, "", bool(bias))

    def reference(self, attrs: Attrs, x: np.ndarray, w: QArray, bias: np.ndarray | None = None) -> np.ndarray:
        y = product_of_integers(attrs.activation, wide(x), w)
        return (y if bias is None else y + wide(bias)).astype(x.dtype)

    def multiply_adds(self, attrs: Attrs, x: TensorType, w: QTensorType, *bias: TensorType) -> DimLike:
        return x.size * w.shape[0]

    def decompose(self, b: Builder, attrs: Attrs, x: Value, w: Value, bias: Value | None = None) -> Value:
        dtype = x.tensor.dtype
        if attrs.activation is None:
            dense = b.dequantize(w, dtype=dtype)
            return b.linear(x, dense) if bias is None else b.linear(x, dense, bias)
        rounded = rounded_rows(b, x, w)
        dense = b.dequantize(w, dtype=DType.F32)
        y = b.linear(rounded, dense) if bias is None else b.linear(rounded, dense, b.cast(bias, dtype=DType.F32))
        return b.cast(y, dtype=dtype) if dtype is not DType.F32 else y

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        """Straight through the rounding of activations; the weight is a constant."""
        x, w = node.inputs[:2]
        rows = b.reshape(g, shape=(1, *g.shape)) if len(g.shape) == 1 else g
        gx = b.sum_to(b.matmul(rows, b.dequantize(w, dtype=x.tensor.dtype)), x.shape)
        gb = [b.sum_to(g, node.inputs[2].shape)] if len(node.inputs) > 2 else []
        return [gx, None, *gb]

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 3, 70), _q("int4", 5, 70)], grad=(0,))
        yield Sample([grid(3, 64), _q("int8", 5, 64), grid(5)], grad=(0, 2))
        yield Sample([grid(3, 65), _q("int8", 5, 65)], {"activation": "int8"}, grad=())
        yield Sample([grid(3, 96), _q("int4", 5, 96), grid(5)], {"activation": "int8"}, grad=())
        yield Sample([grid(2, 128), _z("int4", 64, 5, 128)], grad=(0,))
        yield Sample([grid(2, 128), _z("int4", 64, 5, 128), grid(5)], {"activation": "int8"}, grad=())
        yield Sample([grid(2, 96), _z("int8", 96, 5, 96)], {"activation": "int8"}, grad=())
        for name in (*SCHEMES, *_OWN):
            scheme = _scheme(name)
            yield Sample([grid(2, scheme.block), _q(name, 5, scheme.block)], grad=(0,))
            yield Sample([grid(2, scheme.block), _q(name, 5, scheme.block), grid(5)], {"activation": "int8"}, grad=())

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[b, 3]", "int4b32f16[4, 5]"], {}, "last axis of x")
        yield ErrorSample(["f32[b, 5]", "f32[4, 5]"], {}, "must be quantized")
        yield ErrorSample(["f32[b, 5]", "int4b32f16[4, 5]"], {"activation": "int4"}, "is not one of")


@register
class Embedding(Op):
    """Rows of a table: w [v, d], ids int [..] -> [.., d] of type ``dtype`` (the table may be stored in another float type)."""

    name = "embedding"
    kind = "gather"
    weight = 0
    quantized = "quantized_embedding"
    Attrs = DTypeAttrs

    def picks(self, attrs: DTypeAttrs) -> int:
        return 0

    def infer(self, attrs: DTypeAttrs, w: TensorType, ids: TensorType) -> TensorType:
        if floating(w, "the table").rank != 2 or not attrs.dtype.is_float:
            raise TypeMismatch(f"the table must be [v, d] of floats, not {w}")
        return TensorType(attrs.dtype, (*indices(ids, "ids").shape, w.shape[1]))

    def bounds(self, attrs: DTypeAttrs, w: TensorType, ids: TensorType) -> Mapping[int, Bounds]:
        return {1: (0 - w.shape[0], w.shape[0])}

    def axes(self, attrs: DTypeAttrs, w: TensorType, ids: TensorType) -> AxisRule:
        at, width = free(ids.shape), (Factor(w.shape[1]),)
        return AxisRule((((Factor(w.shape[0], "indexed"),), width), at), ((*at, width),))

    def reference(self, attrs: DTypeAttrs, w: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return w[_checked(ids, len(w))].astype(attrs.dtype.np)

    def decompose(self, b: Builder, attrs: DTypeAttrs, w: Value, ids: Value) -> Value:
        rows = b.gather(w, ids, axis=0)
        return rows if w.tensor.dtype is attrs.dtype else b.cast(rows, dtype=attrs.dtype)

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(5, 3), np.array([[0, 4], [4, 1]])])
        yield Sample([grid(5, 3).astype(np.float16), np.array([2])], grad=())

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[5]", "i64[2]"], {}, "the table must be")
        yield ErrorSample(["f32[5, 2]", "f32[2]"], {}, "must be integers")


@register
class QuantizedEmbedding(Op):
    """Rows of a quantized table, dequantized: w [v, d], ids int [..] -> [.., d]."""

    name = "quantized_embedding"
    kind = "gather"
    weight = 0
    Attrs = DTypeAttrs
    differentiable = False

    def picks(self, attrs: DTypeAttrs) -> int:
        return 0

    def infer(self, attrs: DTypeAttrs, w: QTensorType, ids: TensorType) -> TensorType:
        if quantized(w, "the table").rank != 2:
            raise TypeMismatch(f"the table must be [v, d], not {w}")
        return TensorType(attrs.dtype, (*indices(ids, "ids").shape, w.shape[1]))

    def bounds(self, attrs: DTypeAttrs, w: QTensorType, ids: TensorType) -> Mapping[int, Bounds]:
        return {1: (0 - w.shape[0], w.shape[0])}

    def axes(self, attrs: DTypeAttrs, w: QTensorType, ids: TensorType) -> AxisRule:
        at, width = free(ids.shape), (Factor(w.shape[1], "whole"),)
        return AxisRule((((Factor(w.shape[0], "indexed"),), width), at), ((*at, width),))

    def reference(self, attrs: DTypeAttrs, w: QArray, ids: np.ndarray) -> np.ndarray:
        at = _checked(ids, w.shape[0])
        return w.rows(at).dense(attrs.dtype)

    def decompose(self, b: Builder, attrs: DTypeAttrs, w: Value, ids: Value) -> Value:
        return b.gather(b.dequantize(w, dtype=attrs.dtype), ids, axis=0)

    def samples(self) -> Iterable[Sample]:
        yield Sample([_q("int4", 5, 40), np.array([[0, 4], [4, 1]])])
        yield Sample([_q("int8", 5, 64), np.array([2], np.int32)], {"dtype": "f16"})
        yield Sample([_q("q4_k", 5, 512), np.array([[0, 4], [4, 1]])])
        yield Sample([_z("int4", 32, 5, 64), np.array([[0, 4], [4, 1]])])

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[5, 2]", "i64[2]"], {}, "must be quantized")
        yield ErrorSample(["int4b32f16[5, 2]", "f32[2]"], {}, "must be integers")
