"""How states lie in memory where the CPU's kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from wasat.ir import DType, State, TensorType

from ..layouts import StateLayout
from .kernels.cache import GROUP, CacheType, cache_shape, element, pack_cache, unpack_cache


@dataclass(frozen=True)
class CacheLayout(StateLayout):
    """A key or value cache as the kernels keep it; see :mod:`.kernels.cache`."""

    role: Literal["k", "v"]
    physical: TensorType
    stored: CacheType

    @property
    def type(self) -> TensorType:
        return self.physical

    def axis(self, logical: int) -> int:
        return (0, 2, 1, 3)[logical]

    def pack(self, x: np.ndarray) -> np.ndarray:
        return pack_cache(self.role, x, self.stored)

    def unpack(self, x: np.ndarray) -> np.ndarray:
        return unpack_cache(self.role, x, cast(int, self.logical.shape[3]), self.stored).astype(np.float32)


def state_layout(state: State, type: TensorType, cache: CacheType) -> StateLayout:
    """Keys and values of ``cached_attention`` (a ``role``, f32 [b, c, g, d]) are kept in the kernels' layout, as ``cache``.

    A state that says how it is ``stored`` is kept so, if its width allows it. A ring must have a known capacity, and any known
    capacity must be a multiple of 16; others keep their plain form.
    """
    if state.role not in ("k", "v") or type.dtype is not DType.F32 or type.rank != 4:
        return StateLayout(type)
    b, c = type.shape[:2]
    if not all(isinstance(d, int) for d in type.shape[2:]) or (c % GROUP if isinstance(c, int) else not state.grows):
        return StateLayout(type)
    g, d = cast(tuple[int, int], type.shape[2:])
    role, stored = cast(Literal["k", "v"], state.role), cast(CacheType, state.stored or cache)
    if stored == "int4" and role == "k" and d % 2:
        return StateLayout(type)
    return CacheLayout(type, role, TensorType(DType.of(element(stored)), cache_shape(role, b, g, c, d, stored)), stored)
