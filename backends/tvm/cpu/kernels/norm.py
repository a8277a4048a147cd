"""RMS and layer normalisation over the last axis, with what surrounds them in a transformer.

A residual sum may be folded in before, a quantization of the result after: one pass over a row that stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tvm import tirx

from .emit import Buffer, Expr, Kernel, int64, load, reduce_sum, rounded, splat, symbol
from .isa import Isa
from .quantize import quantize_row, quantized_param


@dataclass(frozen=True)
class Norm:
    """Normalisation of x f32[m, n].

    ``residual``: add another x first and return the sum as well. ``pre_norm``: that other x is itself RMS-normalised
    with a weight of its own before it is added (Gemma's post-norms); needs ``residual``.
    ``quantize``: return the rows quantized for the integer linears instead of f32 ("both": as well).
    """

    isa: Isa
    n: int
    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    weight: bool = True
    bias: bool = False
    residual: bool = False
    pre_norm: bool = False
    quantize: Literal["no", "yes", "both"] = "no"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.bias and (self.kind == "rms" or not self.weight):
            raise ValueError("a bias needs a layer norm with a weight")
        if self.pre_norm and not self.residual:
            raise ValueError("pre_norm normalises the residual branch: set residual too")

    @property
    def name(self) -> str:
        parts = [f"{self.kind}_norm_{self.n}"]
        parts += [part for part, on in (("weight", self.weight), ("bias", self.bias), ("residual", self.residual),
                                        ("pre", self.pre_norm)) if on]
        return "_".join(parts + ([f"quantize_{self.quantize}"] if self.quantize != "no" else []))


def norm(desc: Norm) -> tirx.PrimFunc:
    """PrimFunc(x f32[m, n], [branch f32[m, n]], [branch_weight f32[n]], [weight f32[n]], [bias f32[n]],
    outputs: [sum f32[m, n]], [y f32[m, n]], [yq int32[m, blocks, 10]]).

    sum = x + branch, or x + rms_norm(branch) * branch_weight.
    """
    isa, n, lanes = desc.isa, desc.n, desc.isa.lanes
    kernel = Kernel(desc.name)
    m = symbol("m")
    x = kernel.param("x", (m, n), "float32")
    branch = kernel.param("branch", (m, n), "float32") if desc.residual else None
    branch_weight = kernel.param("branch_weight", (n,), "float32") if desc.pre_norm else None
    weight = kernel.param("weight", (n,), "float32") if desc.weight else None
    bias = kernel.param("bias", (n,), "float32") if desc.bias else None
    total = kernel.param("sum", (m, n), "float32") if branch is not None else None
    y = kernel.param("y", (m, n), "float32") if desc.quantize != "yes" else None
    yq = quantized_param(kernel, "yq", m, n) if desc.quantize != "no" else None

    def row(at: Expr) -> None:
        source = x
        if branch is not None and total is not None:
            source = total
            factor = inverse_rms(kernel, branch, (at,), n, lanes, desc.eps) if branch_weight is not None else None
            for_vectors(kernel, n, lanes, lambda j, width: kernel.store(
                total, (at, j), load(x, (at, j), width) + _branch(branch, branch_weight, factor, at, j, width)))
        mean = None
        if desc.kind == "rms":
            scale = inverse_rms(kernel, source, (at,), n, lanes, desc.eps)
        else:
            mean = kernel.let(sum_row(kernel, n, lanes, lambda j, w: load(source, (at, j), w)) / splat(float(n), 1))
            average = mean

            def deviation(j: Expr, width: int) -> Expr:
                d = kernel.let(load(source, (at, j), width) - splat(average, width))
                return d * d

            variance = sum_row(kernel, n, lanes, deviation) / splat(float(n), 1)
            scale = kernel.let(splat(1.0, 1) / tirx.sqrt(variance + splat(desc.eps, 1)))

        def value(j: Expr, width: int) -> Expr:
            v = load(source, (at, j), width)
            if mean is not None:
                v = v - splat(mean, width)
            v = v * splat(scale, width)
            if weight is not None:
                v = v * load(weight, j, width)
            return v if bias is None else v + load(bias, j, width)

        if y is not None:
            for_vectors(kernel, n, lanes, lambda j, width: kernel.store(y, (at, j), value(j, width)))
        if yq is not None:
            quantize_row(kernel, isa, n, yq, at, value)

    kernel.rows(desc.threads, m, n * 2, row)
    return kernel.build()


def _branch(branch: Buffer, weight: Buffer | None, factor: Expr | None, at: Expr, j: Expr, width: int) -> Expr:
    value = load(branch, (at, j), width)
    if weight is None:
        return value
    return rounded(value * splat(factor, width) * load(weight, j, width))  # as where the norm stands alone


def for_vectors(kernel: Kernel, n: int, lanes: int, body: Callable[[Expr, int], None]) -> None:
    """``body(j, width)`` over 0..n: whole vectors, then single elements."""
    with kernel.loop(n // lanes) as i:
        body(i * lanes, lanes)
    if n % lanes:
        with kernel.loop(n % lanes) as i:
            body(int64(n // lanes * lanes) + i, 1)


def sum_row(kernel: Kernel, n: int, lanes: int, value: Callable[[Expr, int], Expr]) -> Expr:
    """Sum of ``value(j, width)`` over 0..n, two vectors at a time."""
    acc = kernel.registers(2, "float32", lanes)
    for i in range(2):
        kernel.store(acc, i * lanes, splat(0.0, lanes))
    step = 2 * lanes
    with kernel.loop(n // step) as i:
        for half in range(2):
            at = half * lanes
            kernel.store(acc, at, load(acc, at, lanes) + value(i * step + at, lanes))
    total = kernel.registers(1, "float32", 1)
    kernel.store(total, 0, reduce_sum(kernel.let(load(acc, 0, lanes) + load(acc, lanes, lanes))))
    if n % step:
        with kernel.loop(n % step) as i:
            kernel.store(total, 0, load(total, 0) + value(int64(n // step * step) + i, 1))
    return kernel.let(load(total, 0))


def inverse_rms(kernel: Kernel, x: Buffer, at: tuple[Expr, ...], n: int, lanes: int, eps: float,
                offset: Expr | int = 0) -> Expr:
    """1 / sqrt(mean(x[at, offset..offset + n]^2) + eps)."""
    def square(j: Expr, width: int) -> Expr:
        v = kernel.let(load(x, (*at, offset + j), width))
        return v * v

    mean = sum_row(kernel, n, lanes, square) / splat(float(n), 1)
    return kernel.let(splat(1.0, 1) / tirx.sqrt(mean + splat(eps, 1)))
