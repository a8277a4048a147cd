"""onnxruntime's mixtures of experts, of floats and of quantized weights, as grouped products.

Source: the operators' own documentation in onnxruntime 1.32, and what its CPU kernels compute where that says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from wasat.ir import DType, Value
from wasat.ir.dims import floordiv
from wasat.ir.repacked import Load, Weight

from ..emit import Emitter, Operand, size_of
from ..registry import NodeView, op
from .quantized import MICROSOFT, initializer, key_of, unpacked

_ACTIVATIONS = ("relu", "gelu", "silu", "identity", "swiglu")
Product = Callable[[Value], Value]
"""Rows [m, k or 1, in] -> [m, k, out], each by the matrix of its expert."""


def _checked(n: NodeView) -> None:
    activation = n.get("activation_type", "relu")
    if n.get("use_sparse_mixer", 0) or activation not in _ACTIVATIONS:
        raise n.fail(f"activation {activation}, or a sparse mixer, is not supported")


def _rows(c: Emitter, x: Operand) -> Value:
    """x [.., n] as [m, n]."""
    shape = c.shape(x)
    return c.value(c.view(x, size_of(shape[:-1]), shape[-1]))


def _shares(c: Emitter, n: NodeView, best: Any) -> Any:
    return c.div(best, c.reduce_sum(best, axes=(1,), keepdims=True)) if n.get("normalize_routing_weights", 0) else best


def _mixed(c: Emitter, n: NodeView, x: Operand, share: Any, fc1: Product, fc2: Product, fc3: Product | None) -> Any:
    """The sum of what a token's experts make of it, each times its share [m, k]. Its gelu is the one by tanh."""
    rows = c.value(c.add_axes(_rows(c, x), 1))
    h: Any = fc1(rows)
    activation = n.get("activation_type", "relu")
    if activation == "swiglu":
        h = _swiglu(c, n, h, None if fc3 is None else fc3(rows))
    else:
        h = c.gelu(h, approximate="tanh") if activation == "gelu" else h
        h = getattr(c, activation)(h) if activation in ("relu", "silu") else h
        h = h if fc3 is None else c.mul(h, fc3(rows))
    y = c.mul(fc2(c.value(h)), c.add_axes(share, 2))
    return c.view(c.reduce_sum(y, axes=(1,)), *c.shape(x))


def _swiglu(c: Emitter, n: NodeView, h: Any, up: Any) -> Any:
    """h times a sigmoid of it, times ``up``, which stands within h where both were made at once."""
    fused, size = n.get("swiglu_fusion", 0), floordiv(c.shape(h)[2], 2)
    gate = h
    if fused == 1:
        gate, up = c.cut(h, 2, 0, 2 * size, 2), c.cut(h, 2, 1, 2 * size, 2)
    elif fused == 2:
        gate, up = c.cut(h, 2, 0, size), c.cut(h, 2, size, 2 * size)
    elif up is None:
        raise n.fail("swiglu without fc3 or swiglu_fusion")
    alpha, beta = n.get("activation_alpha", 1.0), n.get("activation_beta", 0.0)
    if (limit := n.get("swiglu_limit", math.inf)) != math.inf:
        gate, up = c.minimum(gate, limit), c.maximum(c.minimum(up, limit), -limit)
    up = up if beta == 0 else c.add(up, beta)
    return c.mul(c.mul(gate, c.sigmoid(c.mul(gate, alpha))), up)


@op(
    "MoE", domain=MICROSOFT,
    attributes="activation_alpha activation_beta activation_type k normalize_routing_weights swiglu_fusion swiglu_limit "
    "use_sparse_mixer",
)  # fmt: skip
def mixture(
    c: Emitter, n: NodeView, x: Operand, router: Operand, w1: Operand, b1: Operand | None, w2: Operand,
    b2: Operand | None = None, w3: Operand | None = None, b3: Operand | None = None,
) -> Any:  # fmt: skip
    """The k experts that the router likes best, weighed by its softmax over all; weights are [experts, out, in]."""
    _checked(n)
    best, which = c.top_k(c.softmax(_rows(c, router), axis=1), k=n.get("k", 1), axis=1)

    def product(w: Operand, bias: Operand | None) -> Product:
        return lambda rows: c.grouped_linear(rows, w, which, *(() if bias is None else (bias,)))

    third = None if w3 is None else product(w3, b3)
    return _mixed(c, n, x, _shares(c, n, best), product(w1, b1), product(w2, b2), third)


# -- quantized ---------------------------------------------------------------------------------------------------------------
@op(
    "QMoE", domain=MICROSOFT,
    attributes="accuracy_level activation_alpha activation_beta activation_type block_size expert_weight_bits "
    "fc1_expert_weight_bits fc2_expert_weight_bits fc3_expert_weight_bits k normalize_routing_weights quant_type swiglu_fusion "
    "swiglu_limit swiglu_limit_after_activation use_sparse_mixer weights_prepacked",
)  # fmt: skip
def quantized_mixture(
    c: Emitter, n: NodeView, x: Operand, router: Operand, w1: Operand, s1: Operand | None, b1: Operand | None, w2: Operand,
    s2: Operand | None = None, b2: Operand | None = None, w3: Operand | None = None, s3: Operand | None = None,
    b3: Operand | None = None, z1: Operand | None = None, z2: Operand | None = None, z3: Operand | None = None,
    weights: Operand | None = None, *others: Operand | None,
) -> Any:  # fmt: skip
    """Weights u8[experts, out, in * bits / 8]. Shares are a softmax over the scores of those chosen, or theirs of ``weights``.

    ``accuracy_level`` 4 allows products of int8. Weights that were packed for CUDA are not told from others where
    ``weights_prepacked`` is left out.
    """
    _checked(n)
    if (kind := n.get("quant_type", "int")) != "int" or any(v is not None for v in others):
        raise n.fail(f"quant_type {kind!r}, and scales of all of an expert or of activations, are not supported; 'int' is")
    if n.get("weights_prepacked", -1) == 1 or n.get("swiglu_limit_after_activation", 0):
        raise n.fail("weights_prepacked=1 (an order of one kind of device) and swiglu_limit_after_activation are not supported")
    best, which = c.top_k(_rows(c, router), k=n.get("k", 1), axis=1)
    share = c.softmax(best, axis=1) if weights is None else _shares(c, n, c.take_along(_rows(c, weights), which, axis=1))

    def product(i: int, w: Operand, scale: Operand | None, zero: Operand | None, bias: Operand | None) -> Product:
        found = _stack(c, n, i, w, scale, zero)
        operands = [] if bias is None else [c.value(bias)]
        activation = "int8" if n.get("accuracy_level", 0) == 4 else None
        return lambda rows: c.b.quantized_grouped_linear(rows, found, c.value(which), *operands, activation=activation)

    third = None if w3 is None else product(3, w3, s3, z3, b3)
    return _mixed(c, n, x, share, product(1, w1, s1, z1, b1), product(2, w2, s2, z2, b2), third)


def _stack(c: Emitter, n: NodeView, i: int, w: Operand, scale: Operand | None, zero: Operand | None) -> Value:
    """The weights of all experts as a quantized parameter [experts, out, in]."""
    what, bits, block = f"fc{i}", n.get(f"fc{i}_expert_weight_bits", n.get("expert_weight_bits", 4)), n.get("block_size", 0)
    if bits not in (4, 8):
        raise n.fail(f"weights of {bits} bits are not supported; of 4 and 8 bits are")
    if c.rank(w) != 3:
        raise n.fail(f"{what}_experts_weights has shape {list(c.shape(w))} and should be [experts, out, packed]")
    experts, out, packed = (c.static(w, axis, "QMoE") for axis in range(3))
    rows, k = experts * out, packed * 8 // bits
    if block > 0 and (block < 16 or block & (block - 1) or k % block):
        raise n.fail(f"block_size={block}: blocks are powers of two, at least 16, that divide {k}")
    blocks = k // block if block > 0 else 1
    load = initializer(c, n, w, f"{what}_experts_weights", rows * packed)
    scales = initializer(c, n, scale, f"{what}_scales", rows * blocks)
    zeros: Load = lambda: np.full((1, 1), 1 << (bits - 1), np.uint8)
    if zero is not None:  # packed along blocks, or along the rows of an expert
        by = (rows, blocks) if c.rank(zero) == 3 else (experts, out)
        if c.rank(zero) != 3 and blocks > 1:
            raise n.fail(f"{what}_zero_points has shape {list(c.shape(zero))} and should be [experts, out, packed]")
        given = initializer(c, n, zero, f"{what}_zero_points", by[0] * -(-by[1] * bits // 8))
        codes = unpacked(given, *by, bits)
        zeros = lambda: codes().reshape(rows, blocks)
    weight = Weight(
        DType.U4 if bits == 4 else DType.U8, (rows, k), block if block > 0 else k, unpacked(load, rows, k, bits), zeros,
        lambda: scales().reshape(rows, blocks), experts,
    )  # fmt: skip
    stem = w.param if isinstance(w, Value) and w.param else f"{n.name}.{what}"
    found = n.importer.repacked.param(n.importer.graph, key_of(w, scale, zero), stem, weight)
    if isinstance(found, str):
        raise n.fail(f"{what}_experts_weights cannot be read: {found}")
    return found
