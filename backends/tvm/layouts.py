"""How weights and states lie in memory: as their types say, or as a target's kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from wasat.ir import DType, IRError, TensorType, Type

from .ops.low_precision import NARROW, carried

TVM_DTYPE: dict[DType, str] = {
    DType.F64: "float64", DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16", DType.I64: "int64",
    DType.I32: "int32", DType.I16: "int16", DType.I8: "int8", DType.U64: "uint64", DType.U32: "uint32", DType.U16: "uint16",
    DType.U8: "uint8", DType.BOOL: "bool", **dict.fromkeys(NARROW, "uint8"),
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """One array of a packed weight, as the compiled program reads it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Layout(Protocol):
    """How a kernel wants a weight. Equal layouts of one parameter share one packed copy."""

    @property
    def rows(self) -> int | None:
        """Pieces of so many rows can be packed one by one, and joined along the first axis; None: only the whole."""
        ...

    def arrays(self, name: str, type: Type) -> list[Packed]:
        """What :meth:`pack` will produce for parameter ``name`` of ``type``."""
        ...

    def pack(self, weight: Any) -> list[np.ndarray]:
        """The arrays for a loaded weight (an ndarray, or a QArray where the type is quantized)."""
        ...


@dataclass(frozen=True)
class Plain:
    """Row-major, as it is."""

    rows = 1

    def arrays(self, name: str, type: Type) -> list[Packed]:
        if not isinstance(type, TensorType):
            raise IRError(f"parameter {name} ({type}) has no plain form: some operation that this target lacks reads it")
        shape = type.concrete({})
        return [Packed(name, tvm_dtype(type.dtype), shape)]

    def pack(self, weight: Any) -> list[np.ndarray]:
        return [carried(np.asarray(weight, order="C"))]  # not ascontiguousarray, which gives a number an axis


@dataclass(frozen=True)
class StateLayout:
    """How a state lies in memory: here as its type in the graph says, elsewhere as a target's kernels want it."""

    logical: TensorType

    @property
    def type(self) -> TensorType:
        """The type of the tensor that holds the state."""
        return self.logical

    def axis(self, logical: int) -> int:
        """Where an axis of the logical type lies in memory."""
        return logical

    def pack(self, x: np.ndarray) -> np.ndarray:
        """A state of the logical type as it lies in memory."""
        return x

    def unpack(self, x: np.ndarray) -> np.ndarray:
        """What a tensor in memory holds, in the logical type."""
        return x


@dataclass(frozen=True)
class Begin:
    """One row of a state, as rows are before their first token: a parameter, kept as the state is."""

    state: str
    layout: StateLayout
    rows = None

    def arrays(self, name: str, type: Type) -> list[Packed]:
        t = self.layout.type
        shape = t.with_shape(1, *t.shape[1:]).concrete({})
        return [Packed(f"{self.state}/begin", tvm_dtype(t.dtype), shape)]

    def pack(self, weight: Any) -> list[np.ndarray]:
        return [carried(self.layout.pack(np.asarray(weight)[None]))]


def tvm_dtype(dtype: DType) -> str:
    """TVM's name of the element type as a compiled program holds it: narrow ones as bytes."""
    return TVM_DTYPE[dtype]
