"""How states lie in memory where the GPUs' kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from wasat.ir import DType, State, TensorType

from ..layouts import StateLayout


@dataclass(frozen=True)
class HalfCache(StateLayout):
    """Keys or values in f16, laid out as their type in the graph says: kernels round what they write."""

    @property
    def type(self) -> TensorType:
        return TensorType(DType.F16, self.logical.shape)

    def pack(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # to infinity, as the kernels round
            return x.astype(np.float16)

    def unpack(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32)


def state_layout(state: State, type: TensorType, cache: str) -> StateLayout:
    """Keys and values (a ``role``, f32 [b, c, g, d]) are stored as ``cache``, f32 or f16; other states, and those whose
    activations have 16 bits already, as their types say."""
    if cache != "float16" or state.role not in ("k", "v") or type.dtype is not DType.F32 or type.rank != 4:
        return StateLayout(type)
    return HalfCache(type)
