"""Types of values: dense tensors and block-quantized weights, both with symbolic shapes."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Union

import ml_dtypes
import numpy as np

from .dims import Dim, DimLike, evaluate_dim, substitute, symbols_of
from .errors import TypeMismatch
from .schemes import SCHEMES, Parts, Scheme, scheme_named

_NumpyType = np.dtype  # inside DType, np is a property


class DType(enum.Enum):
    """Element types. The value is the name in the text format."""

    F64, F32, F16, BF16 = "f64", "f32", "f16", "bf16"
    F8E4M3, F8E5M2 = "f8e4m3", "f8e5m2"
    F8E4M3FNUZ, F8E5M2FNUZ, F8E8M0, F4E2M1 = "f8e4m3fnuz", "f8e5m2fnuz", "f8e8m0", "f4e2m1"
    I64, I32, I16, I8, I4, I2 = "i64", "i32", "i16", "i8", "i4", "i2"
    U64, U32, U16, U8, U4, U2 = "u64", "u32", "u16", "u8", "u4", "u2"
    BOOL = "bool"

    def __str__(self) -> str:
        return self.value

    __repr__ = __str__

    @property
    def np(self) -> np.dtype:
        """The NumPy dtype (from ml_dtypes where NumPy has none) of its elements in the interpreter."""
        return _NP[self]

    @property
    def is_float(self) -> bool:
        return self.value.startswith(("f", "bf"))

    @property
    def is_int(self) -> bool:
        return self.value.startswith(("i", "u"))

    @property
    def bits(self) -> int:
        """Size of one element as stored in a packed tensor, in bits."""
        return _PACKED.get(self, _NP[self].itemsize * 8)

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest value of an integer type."""
        info = ml_dtypes.iinfo(self.np)
        return int(info.min), int(info.max)

    @staticmethod
    def of(x: DType | str | _NumpyType | type) -> DType:
        """The DType of a name (``"f32"``, ``"float32"``) or NumPy dtype. Raises TypeMismatch for any other."""
        if isinstance(x, DType):
            return x
        if isinstance(x, str) and x in _BY_NAME:
            return _BY_NAME[x]
        try:
            return _BY_NP[np.dtype(x)]
        except (KeyError, TypeError):
            raise TypeMismatch(f"{x!r} is no element type of the IR; there are {', '.join(_BY_NAME)}") from None


_NP: dict[DType, np.dtype] = {
    DType.F64: np.dtype(np.float64), DType.F32: np.dtype(np.float32), DType.F16: np.dtype(np.float16),
    DType.BF16: np.dtype(ml_dtypes.bfloat16), DType.F8E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    DType.F8E5M2: np.dtype(ml_dtypes.float8_e5m2), DType.I64: np.dtype(np.int64), DType.I32: np.dtype(np.int32),
    DType.I16: np.dtype(np.int16), DType.I8: np.dtype(np.int8), DType.I4: np.dtype(ml_dtypes.int4),
    DType.U64: np.dtype(np.uint64), DType.U32: np.dtype(np.uint32), DType.U16: np.dtype(np.uint16),
    DType.U8: np.dtype(np.uint8), DType.U4: np.dtype(ml_dtypes.uint4), DType.BOOL: np.dtype(np.bool_),
    DType.F8E4M3FNUZ: np.dtype(ml_dtypes.float8_e4m3fnuz), DType.F8E5M2FNUZ: np.dtype(ml_dtypes.float8_e5m2fnuz),
    DType.F8E8M0: np.dtype(ml_dtypes.float8_e8m0fnu), DType.F4E2M1: np.dtype(ml_dtypes.float4_e2m1fn),
    DType.I2: np.dtype(ml_dtypes.int2), DType.U2: np.dtype(ml_dtypes.uint2),
}  # fmt: skip
_PACKED = {DType.F4E2M1: 4, DType.I4: 4, DType.U4: 4, DType.I2: 2, DType.U2: 2}
"""Bits of the types that NumPy stores one to a byte."""
_BY_NP = {v: k for k, v in _NP.items()}
_BY_NAME = {d.value: d for d in DType}


def _shape(dims: Iterable[DimLike]) -> tuple[DimLike, ...]:
    out: list[DimLike] = []
    for d in dims:
        if isinstance(d, (int, np.integer)) and not isinstance(d, bool):
            if d < 0:
                raise TypeMismatch(f"a dimension cannot be {d}")
            if d >= 2**63:
                raise TypeMismatch(f"a dimension of {d} does not fit into 64 bits")
            out.append(int(d))
        elif isinstance(d, Dim):
            out.append(d)
        else:
            raise TypeMismatch(f"a dimension is an int or a Dim, not {d!r}")
    return tuple(out)


@dataclass(frozen=True)
class TensorType:
    """A dense tensor: element type and shape."""

    dtype: DType
    shape: tuple[DimLike, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", DType.of(self.dtype))
        object.__setattr__(self, "shape", _shape(self.shape))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(d) for d in self.shape)}]"

    __repr__ = __str__

    @cached_property
    def _hash(self) -> int:
        return hash((self.dtype, self.shape))

    def __hash__(self) -> int:
        return self._hash

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> DimLike:
        """Number of elements."""
        n: DimLike = 1
        for d in self.shape:
            n = n * d
        return n

    @property
    def symbols(self) -> tuple[str, ...]:
        return symbols_of(self.shape)

    def with_shape(self, *shape: DimLike) -> TensorType:
        return TensorType(self.dtype, shape)

    def with_dtype(self, dtype: DType | str) -> TensorType:
        return TensorType(DType.of(dtype), self.shape)

    def substitute(self, env: Mapping[str, DimLike]) -> TensorType:
        return TensorType(self.dtype, tuple(substitute(d, env) for d in self.shape))

    def concrete(self, env: Mapping[str, int]) -> tuple[int, ...]:
        """The shape under a complete binding of its symbols."""
        return tuple(evaluate_dim(d, env) for d in self.shape)


@dataclass(frozen=True)
class QTensorType:
    """A weight quantized in blocks along its last axis.

    ``scheme`` is ``int8`` (values -128..127) or ``int4`` (-8..7); each block of ``block`` consecutive elements shares one
    scale of type ``scale``; the last block of a row may be short, and one block as long as a row is a scale per channel. An
    element is ``value * scale``. With ``zeros`` each block has a zero point, an integer of eight bits, too, and an element is
    ``(value - zero) * scale``. Its text is e.g. ``int4b32f16[2048, 640]``, with zero points ``int4zb128f16[2048, 640]``.

    Or it is one of :func:`.schemes.scheme_named`, ``q4_k[2048, 512]``: a format of whole blocks, stored as it is. ``block`` is
    then how many elements share a scale, and an element is ``value * scale + offset``, with scales and offsets in f32.
    """

    scheme: str
    shape: tuple[DimLike, ...]
    block: int = 32
    scale: DType = DType.F16
    zeros: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _shape(self.shape))
        object.__setattr__(self, "scale", DType.of(self.scale))
        if self.scheme not in ("int8", "int4") and scheme_named(self.scheme) is None:
            raise TypeMismatch(f"quantization scheme {self.scheme!r} is not one of int8, int4, {', '.join(SCHEMES)}, s4b256")
        if self.block < 1 or not self.scale.is_float or not self.shape:
            raise TypeMismatch(f"{self}: a quantized tensor needs a block >= 1, a float scale and at least one axis")
        if self.stored is not None:
            object.__setattr__(self, "block", self.stored.group)
            object.__setattr__(self, "scale", DType.F32)
            if self.zeros:
                raise TypeMismatch(f"{self}: formats of blocks have no zero points")
            if isinstance(self.shape[-1], int) and self.shape[-1] % self.stored.block:
                raise TypeMismatch(f"{self}: rows of {self.scheme} are of whole blocks of {self.stored.block}")

    def __str__(self) -> str:
        return f"{self.how}[{', '.join(str(d) for d in self.shape)}]"

    __repr__ = __str__

    @property
    def how(self) -> str:
        """All but the shape, as text."""
        return self.scheme if self.stored is not None else f"{self.scheme}{'z' * self.zeros}b{self.block}{self.scale}"

    @property
    def stored(self) -> Scheme | None:
        """The format of blocks; None for int8 and int4, which have no one layout."""
        return scheme_named(self.scheme)

    @property
    def offset(self) -> bool:
        """Whether blocks have an offset beside their scale."""
        return self.stored is not None and self.stored.offset

    @property
    def row_bits(self) -> DimLike:
        """Of one row, scales included."""
        if self.stored is not None:
            return self.shape[-1] // self.stored.block * (8 * self.stored.size)
        return self.shape[-1] * (4 if self.scheme == "int4" else 8) + self.blocks * (self.scale.bits + 8 * self.zeros)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def kind(self) -> tuple[str, int, DType, bool]:
        """All but the shape."""
        return self.scheme, self.block, self.scale, self.zeros

    def with_shape(self, *shape: DimLike) -> QTensorType:
        return replace(self, shape=shape)

    @property
    def symbols(self) -> tuple[str, ...]:
        return symbols_of(self.shape)

    @property
    def blocks(self) -> DimLike:
        """Blocks per row: ceil(last axis / block)."""
        return (self.shape[-1] + (self.block - 1)) // self.block

    @property
    def row_block(self) -> int:
        """Elements of an activation that share a scale, where rows are quantized for a product with this weight."""
        return 32 if self.stored is not None or self.block % 32 == 0 else self.block

    def substitute(self, env: Mapping[str, DimLike]) -> QTensorType:
        return self.with_shape(*(substitute(d, env) for d in self.shape))


Type = Union[TensorType, QTensorType]


@dataclass(frozen=True, eq=False)
class QArray:
    """A quantized weight in memory: ``values`` int8 of the type's shape, ``scales`` and perhaps ``zeros`` (int8) or
    ``offsets`` [..., blocks]."""

    type: QTensorType
    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None

    @property
    def offsets(self) -> np.ndarray | None:
        """What is added to the elements of a block, f32 [..., blocks]; None: nothing."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def rows(self, at: Any) -> QArray:
        """The rows that ``at`` picks along the first axes: a slice, or an array of indices."""
        values = self.values[at]
        zeros = None if self.zeros is None else self.zeros[at]
        return QArray(self.type.with_shape(*values.shape), values, self.scales[at], zeros)

    def dense(self, dtype: DType = DType.F32) -> np.ndarray:
        """The weight it stands for: (value - zero) * scale (+ offset), computed in f32."""

        def spread(x: np.ndarray) -> np.ndarray:
            return np.repeat(x.astype(np.float32), self.type.block, axis=-1)[..., : self.shape[-1]]

        with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite
            x = self.values.astype(np.float32)
            if self.zeros is not None:
                x -= spread(self.zeros)
            x *= spread(self.scales)
            if self.offsets is not None:
                x += spread(self.offsets)
            return x.astype(dtype.np, copy=False)


class BlockArray(QArray):
    """A quantized weight as its file has it: ``data`` u8 [..., blocks, bytes of a block], taken apart when asked for."""

    def __init__(self, type: QTensorType, data: np.ndarray) -> None:
        scheme = type.stored
        assert scheme is not None
        wanted = (*type.shape[:-1], type.shape[-1] // scheme.block, scheme.size)
        if data.dtype != np.uint8 or data.shape != wanted:
            raise TypeMismatch(f"{type} is {DType.U8}{list(wanted)}, not {DType.of(data.dtype)}{list(data.shape)}")
        object.__setattr__(self, "type", type)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "scheme", scheme)

    data: np.ndarray
    scheme: Scheme

    @property
    def parts(self) -> Parts:
        """What the blocks hold."""
        return self.scheme.read(self.data)

    @property
    def values(self) -> np.ndarray:
        return self.parts.codes.reshape(self.shape)

    @property
    def scales(self) -> np.ndarray:
        return self._of_groups(self.parts.scales)

    @property
    def offsets(self) -> np.ndarray | None:
        offsets = self.parts.offsets
        return None if offsets is None else self._of_groups(offsets)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:-2], self.data.shape[-2] * self.scheme.block)

    def rows(self, at: Any) -> BlockArray:
        data = self.data[at]
        return BlockArray(self.type.with_shape(*data.shape[:-2], self.shape[-1]), data)

    def _of_groups(self, x: np.ndarray) -> np.ndarray:
        groups = self.scheme.block // self.scheme.group
        return np.broadcast_to(x, (*x.shape[:-1], groups)).reshape(*self.shape[:-1], self.data.shape[-2] * groups)


def join(xs: Sequence[QArray], axis: int) -> QArray:
    """Weights of one kind one after another, along another axis than the last."""
    first = xs[0]
    if isinstance(first, BlockArray):
        data = np.concatenate([x.data for x in xs if isinstance(x, BlockArray)], axis)
        return BlockArray(first.type.with_shape(*data.shape[:-2], first.shape[-1]), data)
    values = np.concatenate([x.values for x in xs], axis)
    zeros = np.concatenate([x.zeros for x in xs if x.zeros is not None], axis) if first.type.zeros else None
    return QArray(first.type.with_shape(*values.shape), values, np.concatenate([x.scales for x in xs], axis), zeros)


Array = Union[np.ndarray, QArray]


def type_of(x: Array) -> Type:
    """The type of a concrete array."""
    if isinstance(x, QArray):
        return x.type
    return TensorType(DType.of(x.dtype), x.shape)
