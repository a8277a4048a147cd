"""Weights stored as integers, zero points and scales, as parameters of a quantized type that holds the same numbers.

Nothing is rounded anew. A weight is repacked each time it is loaded, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .graph import Graph, ParamSource, Value
from .types import DType, QArray, QTensorType

BLOCK = 32
"""The block that targets have kernels for, with scales in f16; longer blocks are several of these."""
_SLAB = 1 << 22
"""Elements repacked at a time: a weight's temporaries stay small beside it."""
_SCALES = (DType.F32, DType.F16, DType.BF16)
Load = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Weight:
    """(integers - zeros) * scales, a matrix [n, k] whose rows share a zero point and a scale in blocks along k.

    ``integers`` loads [n, k] of the range of ``dtype``; ``zeros`` and ``scales`` what broadcasts to [n, ceil(k / block)].
    ``stack``: the rows are those of so many matrices, one after the other: the parameter is [stack, n / stack, k].
    """

    dtype: DType
    shape: tuple[int, int]
    block: int
    integers: Load
    zeros: Load
    scales: Load
    stack: int | None = None

    @property
    def middle(self) -> int:
        """What is taken from integers that keep their zero points, to make them signed."""
        return 0 if self.dtype.value.startswith("i") else 1 << self.dtype.bits - 1

    def exact_type(self) -> QTensorType | str:
        """The quantized type that holds the same numbers, or why there is none."""
        signed, bits = self.dtype.value.startswith("i"), self.dtype.bits
        zeros, scales = self.zeros(), self.scales()
        own = DType.of(scales.dtype)
        if own not in _SCALES:
            return f"its scales are {own}"
        if not zeros.size or not scales.size:
            return "it is empty"
        if zeros.dtype.kind == "f" and not (np.isfinite(zeros) & (zeros == np.rint(zeros))).all():
            return "its zero points are no integers"
        low = (-(1 << bits - 1) if signed else 0) - int(zeros.max())
        high = (1 << (bits - 1 if signed else bits)) - 1 - int(zeros.min())
        scheme = "int4" if low >= -8 and high <= 7 else "int8"
        k = self.shape[1]
        block = min(self.block, k)
        whole = block % BLOCK == 0 and k % block == 0  # or no target has kernels for zero points
        with np.errstate(over="ignore"):
            half = bool((scales.astype(np.float16).astype(np.float32) == scales.astype(np.float32)).all())
        fit = int(zeros.min()) - self.middle >= -128 and int(zeros.max()) - self.middle <= 127
        if whole and fit and (low < -128 or high > 127 or (scheme == "int8" and bits <= 4)):
            return QTensorType("int4" if bits <= 4 else "int8", self.shape, block, DType.F16 if half else own, True)
        if low < -128 or high > 127:
            return f"its values less their zero points, {low} to {high}, need more than 8 bits"
        if half and (self.block % BLOCK == 0 or self.block >= k):
            return QTensorType(scheme, self.shape, BLOCK, DType.F16)
        return QTensorType(scheme, self.shape, block, own)


@dataclass(frozen=True)
class RepackedParam:
    """A weight as a parameter of a quantized type."""

    type: QTensorType
    weight: Weight

    def load(self) -> QArray:
        w, (n, k) = self.weight, self.weight.shape
        theirs = -(-k // w.block)
        zeros = np.broadcast_to(w.zeros().astype(np.int16), (n, theirs))
        integers, values = w.integers(), np.empty((n, k), np.int8)
        kept = (zeros - w.middle).astype(np.int8) if self.type.zeros else None
        if kept is not None:
            zeros = np.full_like(zeros, w.middle)
        uniform = zeros.min() == zeros.max()
        step = max(1, _SLAB // k)
        for i in range(0, n, step):
            rows = slice(i, i + step)
            shift = zeros[0, 0] if uniform else np.repeat(zeros[rows], w.block, axis=1)[:, :k]
            values[rows] = integers[rows].astype(np.int16) - shift
        scales = np.broadcast_to(w.scales().astype(self.type.scale.np), (n, theirs))
        starts = np.arange(-(-k // self.type.block)) * self.type.block
        scales = np.ascontiguousarray(scales[:, starts // w.block])
        lead = () if w.stack is None else (w.stack,)

        def stacked(x: np.ndarray) -> np.ndarray:
            return x.reshape(*lead, -1, x.shape[1])

        return QArray(self.type, stacked(values), stacked(scales), None if kept is None else stacked(kept))


@dataclass
class Repacked:
    """The quantized parameters that are made for the graphs of one program, whose parameters are ``params``."""

    params: MutableMapping[str, ParamSource]
    names: dict[Any, str] = field(default_factory=dict)
    """By what they are made of: a weight that several nodes read is one parameter."""

    def param(self, graph: Graph, key: Any, stem: str, w: Weight) -> Value | str:
        """``w`` as a parameter of ``graph`` called after the parameter ``stem``, or why it cannot be one."""
        type = w.exact_type()
        if isinstance(type, str):
            return type
        if w.stack is not None:
            type = type.with_shape(w.stack, w.shape[0] // w.stack, w.shape[1])
        if key not in self.names:
            name = base = f"{stem}|{type.scheme}"
            for i in range(1, len(self.params) + 1):
                if name not in self.params:
                    break
                name = f"{base}_{i}"
            self.names[key] = name
            self.params[name] = RepackedParam(type, w)
        return graph.add_param(self.names[key], type)
