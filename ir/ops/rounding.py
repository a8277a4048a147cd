"""What storage in few bits makes of an array, as operations on arrays: of caches, and of weights in training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import op as _op
from ..axes import AxisRule, Factor, along
from ..checks import require_equal
from ..errors import TypeMismatch
from ..op import ErrorSample, Op, Sample, floating, register
from ..types import DType, QTensorType, TensorType
from .elementwise import grid, wave, wide
from .quant import quantize_array

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Node, Value


def hadamard_block(width: int) -> int:
    """The largest power of two that divides ``width``."""
    return width & -width


def hadamard(x: np.ndarray, block: int) -> np.ndarray:
    """:class:`Hadamard` of x [.., d], in its type; sums are made in the order of the kernels, stage by stage."""
    width = x.shape[-1]
    half, y = 1, np.array(x)
    while half < block:
        pairs = y.reshape(*x.shape[:-1], width // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([a + b, a - b], axis=-2).reshape(x.shape)
        half *= 2
    return y * x.dtype.type(block**-0.5) if block > 1 else y


@register
class Hadamard(Op):
    """x [.., d] turned by an orthogonal matrix of entries +-``block``^-1/2, along the last axis in blocks of ``block``, a power
    of two that divides d (Sylvester's construction). It is its own inverse. What is large in one feature is spread over all of
    its block, which rounding to few levels likes (QuaRot, arXiv:2404.00456). x is f32 or wider.
    """

    name = "hadamard"
    kind = "row"

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        block: int

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        if attrs.block < 1 or attrs.block & (attrs.block - 1):
            raise TypeMismatch(f"block={attrs.block} is no power of two")
        if floating(x).rank < 1 or x.dtype.bits < 32:
            raise TypeMismatch(f"x must be f32 or wider, of rank 1 or more, not {x}")
        require_equal(x.shape[-1] // attrs.block * attrs.block, x.shape[-1], f"whole blocks of {attrs.block} in the last axis")
        return x

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        return along(x.shape, (x.rank - 1,), lambda d: Factor(d, "whole"))

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return hadamard(x, attrs.block)

    def decompose(self, b: Builder, attrs: Attrs, x: Value) -> Value:
        *lead, width = x.shape
        half, y, rank = 1, x, len(lead)
        while half < attrs.block:
            pairs = b.reshape(y, shape=(*lead, width // (2 * half), 2, half))
            low, high = (0,) * (rank + 3), tuple(pairs.shape)
            first = b.slice(pairs, starts=low, stops=(*high[:-2], 1, half))
            second = b.slice(pairs, starts=(*low[:-2], 1, 0), stops=high)
            y = b.reshape(b.concat(b.add(first, second), b.sub(first, second), axis=rank + 1), shape=x.shape)
            half *= 2
        return b.mul(y, attrs.block**-0.5) if attrs.block > 1 else y

    def vjp(self, b: Builder, node: Node, g: Value) -> Sequence[Value | None]:
        return [b.hadamard(g, block=Hadamard.Attrs.of(node).block)]

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(2, 3, 8)], {"block": 8})
        yield Sample([wave(2, 12)], {"block": 4})
        yield Sample([wave(5)], {"block": 1})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f16[2, 8]"], {"block": 4}, "must be f32 or wider")
        yield ErrorSample(["f32[2, 6]"], {"block": 4}, "whole blocks of 4")
        yield ErrorSample(["f32[2, 6]"], {"block": 6}, "is no power of two")
        yield ErrorSample(["i32[8]"], {"block": 4}, "must be float")


@register
class FakeQuantize(Op):
    """What ``dequantize(quantize(x))`` is, to the bit, in x's type: x rounded to what blocks of few bits hold.

    Attributes and numbers are those of ``quantize`` in the schemes ``int8`` and ``int4``. A block with a NaN or an infinity is
    all NaN, and one whose scale is too small to be divided by is all 0. Gradients go straight through (arXiv:1308.3432).
    """

    name = "fake_quantize"
    kind = "row"
    straight_through = True

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        scheme: str
        block: int = 32
        scale: DType = DType.F16

        def type(self, x: TensorType) -> QTensorType:
            """Of what x is stored as."""
            return QTensorType(self.scheme, x.shape, self.block, self.scale)

    def infer(self, attrs: Attrs, x: TensorType) -> TensorType:
        if attrs.scheme not in ("int8", "int4"):
            raise TypeMismatch(f"scheme={attrs.scheme!r} is not one of int8, int4")
        if floating(x).rank < 1:
            raise TypeMismatch("a scalar cannot be quantized in blocks")
        attrs.type(x)
        return x

    def axes(self, attrs: Attrs, x: TensorType) -> AxisRule:
        return along(x.shape, (x.rank - 1,), lambda d: Factor(d, "whole"))

    def reference(self, attrs: Attrs, x: np.ndarray) -> np.ndarray:
        return fake_quantized(x, attrs.type(TensorType(DType.of(x.dtype), x.shape)))

    def decompose(self, b: Builder, attrs: Attrs, x: Value) -> Value:
        *lead, k = x.shape
        rank, block = len(lead), attrs.block
        blocks = (k + (block - 1)) // block
        f = b.cast(x, dtype=DType.F32) if x.tensor.dtype is not DType.F32 else x
        f = b.pad(f, low=(0,) * (rank + 1), high=(*[0] * rank, blocks * block - k))
        f = b.reshape(f, shape=(*lead, blocks, block))
        size, axis = b.abs(f), rank + 1
        if attrs.scheme == "int8":
            low, high, d = -127.0, 127.0, b.div(b.reduce_max(size, axes=(axis,), keepdims=True), 127.0)
        else:
            at = b.reshape(b.arg_max(size, axis=axis), shape=(*lead, blocks, 1))
            low, high, d = -8.0, 7.0, b.div(b.take_along(f, at, axis=axis), -8.0)
        total = b.reduce_sum(b.sub(f, f), axes=(axis,), keepdims=True)  # 0, but NaN beside what is not finite
        s = b.cast(b.cast(d, dtype=attrs.scale), dtype=DType.F32)
        # beyond 2^-128 a quotient by s is finite; s is read as seldom as can be, compilers compute it again wherever it is
        inverse = b.select(b.greater(b.abs(s), 2.0**-128), b.div(1.0, s), 0.0)
        codes = b.minimum(b.maximum(b.round(b.mul(f, inverse)), low), high)
        y = b.add(b.mul(codes, s), total)
        y = b.slice(b.reshape(y, shape=(*lead, blocks * block)), starts=(0,) * (rank + 1), stops=x.shape)
        return b.cast(y, dtype=x.tensor.dtype) if x.tensor.dtype is not DType.F32 else y

    def vjp(self, b: Builder, node: Node, g: Value) -> list[Value | None]:
        return [g]

    def samples(self) -> Iterable[Sample]:
        yield Sample([grid(3, 70)], {"scheme": "int8"})
        yield Sample([grid(2, 2, 64)], {"scheme": "int4"})
        yield Sample([wave(2, 9)], {"scheme": "int4", "block": 4, "scale": "bf16"})
        yield Sample([wave(2, 9).astype(np.float16)], {"scheme": "int8", "block": 9, "scale": "f32"})
        odd = np.array([[np.nan, 1, 2, 3], [1, 2, np.inf, 3], [0, 0, 0, 0], [1e-42, 0, 0, -1e-42], [3, -3, 3, 1]], np.float32)
        yield Sample([odd], {"scheme": "int4", "block": 4, "scale": "bf16"})
        yield Sample([odd], {"scheme": "int8", "block": 2, "scale": "bf16"})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[4]"], {"scheme": "s4"}, "is not one of int8, int4")
        yield ErrorSample(["i32[4]"], {"scheme": "int4"}, "must be float")
        yield ErrorSample(["f32[]"], {"scheme": "int4"}, "a scalar cannot be quantized")
        yield ErrorSample(["f32[4]"], {"scheme": "int4", "block": 0}, "block >= 1")


def fake_quantized(x: np.ndarray, type: QTensorType) -> np.ndarray:
    """x as it is once stored as ``type``; see :class:`FakeQuantize`."""
    *lead, k = x.shape
    whole = np.zeros((*lead, -(-k // type.block) * type.block), np.float32)
    whole[..., :k] = wide(x)
    blocks = whole.reshape(*lead, whole.shape[-1] // type.block, type.block)
    finite = np.asarray(np.isfinite(blocks).all(-1))
    blocks[~finite] = 0
    y = quantize_array(whole[..., :k], type).dense()
    lost = np.repeat(~finite, type.block, axis=-1)[..., :k]
    return np.where(lost, np.float32(np.nan), y).astype(x.dtype)


# -- rows of caches --------------------------------------------------------------------------------------------------------
ROW_SCHEMES = ("int8", "int4")
"""How rows of caches may be stored: codes, and one scale in bf16 for each row. Those of ``int4`` are turned before."""


def emit_stored_rows(b: Builder, x: Value, scheme: str) -> Value:
    """x [.., d] as a cache stored in ``scheme`` gives it back."""
    width = x.shape[-1]
    assert isinstance(width, int)
    n = hadamard_block(width) if scheme == "int4" else 1
    y = b.hadamard(x, block=n) if n > 1 else x
    y = b.fake_quantize(y, scheme=scheme, block=width, scale=DType.BF16)
    return b.hadamard(y, block=n) if n > 1 else y


def before_stored_rows(x: Value, scheme: str) -> Value | None:
    """What :func:`emit_stored_rows` made ``x`` of; None: something else made it."""
    width = x.shape[-1]
    assert isinstance(width, int)
    n = hadamard_block(width) if scheme == "int4" else 1

    def turned(v: Value) -> Value | None:
        node = v.made_by("hadamard")
        return v if n == 1 else node.inputs[0] if node is not None and Hadamard.Attrs.of(node).block == n else None

    inner = turned(x)
    node = inner.made_by("fake_quantize") if inner is not None else None
    if node is None or node.attrs != FakeQuantize.Attrs(scheme, width, DType.BF16):
        return None
    return turned(node.inputs[0])
