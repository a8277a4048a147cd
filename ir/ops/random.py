"""Random numbers as functions of a key: the same key and shape give the same numbers, on every target and in any order."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import op as _op
from ..dims import DimLike
from ..errors import TypeMismatch
from ..op import ErrorSample, Op, Sample, Shape, concrete, floating, register, tensor
from ..types import DType, TensorType, Type
from .elementwise import wide

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Value

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
"""Rotation distances of Threefry-2x32: four rounds take the first row, the next four the second."""
PARITY = 0x1BD11BDA
"""Skein's key schedule constant, for words of 32 bits."""


def threefry(key: np.ndarray, x0: np.ndarray, x1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 with 20 rounds of the counter (x0, x1), u32 of one shape (Salmon et al., SC 2011, section 4.2)."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(PARITY))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for r in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << np.uint32(r)) | (x1 >> np.uint32(32 - r))) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def _key(t: Type) -> None:
    if tensor(t, "the key") != TensorType(DType.U32, (2,)):
        raise TypeMismatch(f"the key must be u32[2], not {t}")


_KEY = np.array([0x13198A2E, 0x03707344], np.uint32)


@register
class RandomBits(Op):
    """Uniform integers (u32 or u64) of ``shape`` from key u32[2], by Threefry-2x32-20 (Salmon et al., SC 2011).

    Element i in row-major order is the block of counter (i div 2^32, i mod 2^32): as u64 its two words, the first on top; as
    u32 their exclusive or (the numbers of JAX's partitionable threefry). ``shape=(n, 2)`` derives n new keys.
    """

    name = "random_bits"
    kind = "random"
    differentiable = False

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        shape: Shape
        dtype: DType = DType.U32

    def infer(self, attrs: Attrs, key: TensorType) -> TensorType:
        _key(key)
        if attrs.dtype not in (DType.U32, DType.U64):
            raise TypeMismatch(f"random bits come as u32 or u64, not {attrs.dtype}; cast them")
        return TensorType(attrs.dtype, attrs.shape)

    def reference(self, attrs: Attrs, key: np.ndarray) -> np.ndarray:
        shape = tuple(concrete(d) for d in attrs.shape)
        i = np.arange(math.prod(shape), dtype=np.uint64)
        high, low = threefry(key, (i >> np.uint64(32)).astype(np.uint32), i.astype(np.uint32))
        if attrs.dtype is DType.U32:
            return (high ^ low).reshape(shape)
        return (high.astype(np.uint64) << np.uint64(32) | low).reshape(shape)

    def samples(self) -> Iterable[Sample]:
        yield Sample([_KEY], {"shape": (3, 5)})
        yield Sample([_KEY], {"shape": (7,), "dtype": "u64"})
        yield Sample([np.array([2**32 - 1, 0], np.uint32)], {"shape": ()})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["u32[3]"], {"shape": (2,)}, "the key must be u32[2]")
        yield ErrorSample(["i64[2]"], {"shape": (2,)}, "the key must be u32[2]")
        yield ErrorSample(["u32[2]"], {"shape": (2,), "dtype": "f32"}, "u32 or u64")
        yield ErrorSample(["u32[2]"], {"shape": (-2,)}, "cannot be -2")


_DIGITS = {DType.F64: 53, DType.F32: 24, DType.F16: 11, DType.BF16: 8}
"""Bits of the significand: multiples of 2**-digits below 1 are exact."""


@dataclass(frozen=True)
class RandomAttrs(_op.Attrs):
    """Shape and element type (f64, f32, f16 or bf16) of the result."""

    shape: Shape
    dtype: DType = DType.F32


class _Random(Op):
    """Base of random floats."""

    kind = "random"
    Attrs = RandomAttrs
    differentiable = False

    def infer(self, attrs: RandomAttrs, key: TensorType) -> TensorType:
        _key(key)
        if attrs.dtype not in _DIGITS:
            raise TypeMismatch(f"{self.name} makes {', '.join(map(str, _DIGITS))}, not {attrs.dtype}; cast it")
        return TensorType(attrs.dtype, attrs.shape)

    def samples(self) -> Iterable[Sample]:
        yield Sample([_KEY], {"shape": (3, 50)})
        for dtype in ("f64", "f16", "bf16"):
            yield Sample([_KEY], {"shape": (40,), "dtype": dtype})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["u32[3]"], {"shape": (2,)}, "the key must be u32[2]")
        yield ErrorSample(["u32[2]"], {"shape": (2,), "dtype": "i32"}, "not i32")


def _uniform(key: np.ndarray, shape: tuple[DimLike, ...], dtype: DType) -> np.ndarray:
    op = _op.OPS["random_uniform"]
    return op.reference(RandomAttrs(shape, dtype), key)  # type: ignore[return-value]


@register
class RandomUniform(_Random):
    """Uniform on the multiples of 2^-p in [0, 1), p the digits of the type (24 for f32): the top p of random_bits."""

    name = "random_uniform"

    def reference(self, attrs: RandomAttrs, key: np.ndarray) -> np.ndarray:
        bits, p = _bits(attrs.dtype), _DIGITS[attrs.dtype]
        x = _op.OPS["random_bits"].reference(RandomBits.Attrs(attrs.shape, bits), key)
        assert isinstance(x, np.ndarray)
        return ((x >> x.dtype.type(bits.bits - p)) * 2.0**-p).astype(attrs.dtype.np)

    def decompose(self, b: Builder, attrs: RandomAttrs, key: Value) -> Value:
        bits, p = _bits(attrs.dtype), _DIGITS[attrs.dtype]
        x = b.shift_right(b.random_bits(key, shape=attrs.shape, dtype=bits), bits.bits - p)
        return b.mul(b.cast(x, dtype=attrs.dtype), 2.0**-p)


def _bits(dtype: DType) -> DType:
    return DType.U64 if dtype is DType.F64 else DType.U32


@register
class RandomNormal(_Random):
    """Standard normal numbers: sqrt(-2 log(1 - u)) cos(2 pi v), u and v uniform (Box and Muller, 1958), in f32 or wider."""

    name = "random_normal"

    def reference(self, attrs: RandomAttrs, key: np.ndarray) -> np.ndarray:
        t = _wide(attrs.dtype)
        u, v = _uniform(key, (2, *attrs.shape), t)
        one, two, turn = (np.asarray(c, t.np) for c in (1, -2, 2 * math.pi))
        return (np.sqrt(two * np.log(one - u)) * np.cos(turn * v)).astype(attrs.dtype.np)

    def decompose(self, b: Builder, attrs: RandomAttrs, key: Value) -> Value:
        t, zeros = _wide(attrs.dtype), (0,) * len(attrs.shape)
        pair = b.random_uniform(key, shape=(2, *attrs.shape), dtype=t)
        u, v = (
            b.reshape(b.slice(pair, starts=(i, *zeros), stops=(i + 1, *attrs.shape)), shape=attrs.shape) for i in range(2)
        )
        y = b.mul(b.sqrt(b.mul(b.log(b.sub(1.0, u)), -2.0)), b.cos(b.mul(v, 2 * math.pi)))
        return y if t is attrs.dtype else b.cast(y, dtype=attrs.dtype)


def _wide(dtype: DType) -> DType:
    return dtype if dtype.bits >= 32 else DType.F32


@register
class Dropout(Op):
    """x with each element zeroed with probability ``rate``, the rest divided by 1 - rate (arXiv:1207.0580); key u32[2]."""

    name = "dropout"
    kind = "random"
    idle = 0

    @dataclass(frozen=True)
    class Attrs(_op.Attrs):
        rate: float

    def infer(self, attrs: Attrs, x: TensorType, key: TensorType) -> TensorType:
        _key(key)
        if not 0 <= attrs.rate < 1:
            raise TypeMismatch(f"rate={attrs.rate}: a rate is at least 0 and below 1")
        return floating(x)

    def reference(self, attrs: Attrs, x: np.ndarray, key: np.ndarray) -> np.ndarray:
        keep = _uniform(key, x.shape, DType.F32) >= np.float32(attrs.rate)
        w = wide(x)
        return np.where(keep, w / np.asarray(1 - attrs.rate, w.dtype), np.zeros((), w.dtype)).astype(x.dtype)

    def decompose(self, b: Builder, attrs: Attrs, x: Value, key: Value) -> Value:
        dtype = x.tensor.dtype
        keep = b.greater_equal(b.random_uniform(key, shape=x.shape), attrs.rate)
        w = b.cast(x, dtype=DType.F32) if dtype.bits < 32 else x
        y = b.select(keep, b.div(w, 1 - attrs.rate), b.constant(0.0, w.tensor.dtype))
        return b.cast(y, dtype=dtype) if dtype.bits < 32 else y

    def samples(self) -> Iterable[Sample]:
        x = np.linspace(-2, 2, 60, dtype=np.float32).reshape(3, 20)
        yield Sample([x, _KEY], {"rate": 0.25})
        yield Sample([x, _KEY], {"rate": 0.0})
        yield Sample([x.astype(np.float16), _KEY], {"rate": 0.9}, grad=())

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[2]", "u32[2]"], {"rate": 1.0}, "below 1")
        yield ErrorSample(["f32[2]", "u32[2]"], {"rate": -0.1}, "at least 0")
        yield ErrorSample(["i32[2]", "u32[2]"], {"rate": 0.1}, "must be float")
        yield ErrorSample(["f32[2]", "u64[2]"], {"rate": 0.1}, "the key must be u32[2]")
