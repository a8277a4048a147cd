"""Weights as the kernels of linears and tables read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from wasat.ir import DimLike, QArray, Type

from ..layouts import Packed
from .kernels.blocks import in_blocks, pack_blocks
from .kernels.isa import Isa
from .kernels.linear_float import Weights, packed_param
from .kernels.pack import Storage, pack_bias, pack_float, pack_int, padded


def known(*dims: DimLike) -> bool:
    """Whether none of them is symbolic."""
    return all(isinstance(d, int) for d in dims)


def ints(dims: Sequence[DimLike]) -> tuple[int, ...]:
    """Dimensions that are known."""
    assert known(*dims)
    return cast(tuple[int, ...], tuple(dims))


@dataclass(frozen=True)
class Panels:
    """A matrix in panels, as the linear and embedding kernels read it: see :mod:`.kernels.pack`."""

    isa: Isa
    weights: Weights

    @property
    def rows(self) -> int:
        return self.isa.columns

    def arrays(self, name: str, type: Type) -> list[Packed]:
        n, k = ints(type.shape)
        shape, dtype = packed_param(self.weights, n, k, self.isa)
        return [Packed(f"{name}/panels", dtype, shape)]

    def pack(self, weight: Any) -> list[np.ndarray]:
        if in_blocks(self.weights):
            return [pack_blocks(weight, self.isa)]
        if isinstance(weight, QArray):
            return [pack_int(weight.values, weight.scales, int(self.weights[3:]), self.isa)]
        return [pack_float(weight, self.isa, cast(Storage, self.weights))]


@dataclass(frozen=True)
class PaddedBias:
    """A bias in f32, padded to whole panels."""

    isa: Isa
    rows = None

    def arrays(self, name: str, type: Type) -> list[Packed]:
        return [Packed(f"{name}/padded", "float32", (padded(ints(type.shape)[0], self.isa.columns),))]

    def pack(self, weight: np.ndarray) -> list[np.ndarray]:
        return [pack_bias(weight, self.isa)]
