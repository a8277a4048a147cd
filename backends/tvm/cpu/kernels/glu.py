"""Gated linear units: act(gate) * up over a merged gate-and-up projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvm import tirx

from .emit import Expr, Kernel, at_least, erf, load, sigmoid, splat, symbol
from .emit import _lanes as lanes_of
from .isa import Isa
from .norm import for_vectors
from .quantize import quantize_row, quantized_param

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "sigmoid"]


@dataclass(frozen=True)
class Glu:
    """x f32[m, 2n] -> act(x[:, :n]) * x[:, n:], f32[m, n] or (``quantize``) int32[m, blocks, 10]."""

    isa: Isa
    n: int
    activation: Activation = "silu"
    quantize: bool = False
    threads: int = 1

    @property
    def name(self) -> str:
        return f"glu_{self.activation}_{self.n}{'_quantize' if self.quantize else ''}"


def glu(desc: Glu) -> tirx.PrimFunc:
    """PrimFunc(x f32[m, 2n], y f32[m, n] or int32[m, blocks, 10])."""
    kernel = Kernel(desc.name)
    m, n = symbol("m"), desc.n
    x = kernel.param("x", (m, 2 * n), "float32")
    y = quantized_param(kernel, "y", m, n) if desc.quantize else kernel.param("y", (m, n), "float32")

    def value(row: Expr, j: Expr, width: int) -> Expr:
        gate = kernel.let(load(x, (row, j), width))
        return activate(kernel, gate, desc.activation) * load(x, (row, n + j), width)

    def row(at: Expr) -> None:
        if desc.quantize:
            quantize_row(kernel, desc.isa, n, y, at, lambda j, width: value(at, j, width))
        else:
            for_vectors(kernel, n, desc.isa.lanes, lambda j, width: kernel.store(y, (at, j), value(at, j, width)))

    kernel.rows(desc.threads, m, n * 4, row)
    return kernel.build()


def activate(kernel: Kernel, x: Expr, kind: Activation) -> Expr:
    """The activation of an f32 vector."""
    lanes = lanes_of(x)
    if kind == "relu":
        return at_least(splat(0.0, lanes), x)
    if kind == "sigmoid":
        return sigmoid(kernel, x)
    if kind == "silu":
        return x * sigmoid(kernel, x)
    if kind == "gelu":
        return x * splat(0.5, lanes) * (splat(1.0, lanes) + erf(kernel, x * splat(0.7071067811865476, lanes)))
    if kind == "gelu_tanh":  # 0.5 * (1 + tanh(z)) is sigmoid(2 z)
        z = x * splat(1.5957691216057308, lanes) * (splat(1.0, lanes) + splat(0.044715, lanes) * (x * x))
        return x * sigmoid(kernel, z)
    raise ValueError(f"unknown activation {kind!r}")
