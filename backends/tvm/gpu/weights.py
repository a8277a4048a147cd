"""Weights in rows that the kernels for GPUs read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from wasat.ir import IRError, Type

from ..layouts import Layout, Packed, Plain
from .kernels.formats import Floats, Format


@dataclass(frozen=True)
class Rows:
    """A weight [n, k], or a bank [e, n, k] of such, as :mod:`.kernels.formats` says."""

    format: Format
    rows = 1

    def arrays(self, name: str, type: Type) -> list[Packed]:
        *lead, k = (d for d in type.shape if isinstance(d, int))
        if len(lead) + 1 != type.rank:
            raise IRError(f"parameter {name} ({type}) is packed for a kernel, and not all of its sizes are known")
        shape, dtype = self.format.param(int(np.prod(lead)), k)
        return [Packed(f"{name}/rows", dtype, shape)]

    def pack(self, weight: Any) -> list[np.ndarray]:
        return [self.format.pack(weight)]


def layout_of(format: Format) -> Layout:
    """What a kernel names where it reads a weight in the format: rows of floats lie as they do everywhere."""
    return Plain() if isinstance(format, Floats) and not format.words else Rows(format)
