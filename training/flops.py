"""Counting the arithmetic of a model, and what this machine's best routine reaches."""

from __future__ import annotations

import math
import time
from collections.abc import Container
from typing import Any

import numpy as np
from wasat.ir import Graph, Node, TensorType, Value, evaluate_dim
from wasat.ir.ops.scan import ScanAttrs


def step_flops(graph: Graph, train: Container[str] | None = None) -> int:
    """Floating-point operations of a training step on the loss ``graph``, whose sizes are known.

    Counted are 2 for every multiply-add (``Op.multiply_adds``; in attention without regard to masks), in a loop at every turn:
    once for the forward pass, and for the backward pass once more for each operand that a parameter reaches which learns (those
    in ``train``; None: all). Of attention, twice more where one is reached. Neither element-wise work nor recomputation counts.
    """
    return _flops(graph, {v for name, v in graph.params.items() if train is None or name in train})


def _flops(graph: Graph, learning: set[Value]) -> int:
    """Those of one run; the values that depend on the ``learning`` ones are added to them."""
    total = 0
    for node in graph.nodes:
        reached = [v in learning for v in node.inputs]
        if node.attrs.bodies:
            count = _loop_flops if isinstance(node.attrs, ScanAttrs) else _choice_flops
            total += count(node, reached, learning)
            continue
        factors = reached[: node.op.factors]
        back = sum(factors) if len(factors) <= 2 else 2 * any(factors)
        total += 2 * evaluate_dim(node.multiply_adds, {}) * (1 + back)
        if any(reached) and node.op.differentiable:
            learning.update(v for v in node.outputs if isinstance(v.type, TensorType) and v.type.dtype.is_float)
    return total


def _loop_flops(node: Node, reached: list[bool], learning: set[Value]) -> int:
    """Those of a scan; ``reached``: which of its operands are ``learning``, to which its results are added."""
    attrs: Any = node.attrs
    body, c = attrs.body.graph, attrs.carries
    while True:  # what one turn makes of the carried values, the next begins with
        inner = {v for v, is_reached in zip(body.inputs, reached) if is_reached}
        each = _flops(body, inner)
        after = [*(x or v in inner for x, v in zip(reached, body.outputs[:c])), *reached[c:]]
        if after == reached:
            learning.update(v for v, made in zip(node.outputs, body.outputs) if made in inner)
            return each * (attrs.length if attrs.length is not None else node.inputs[c].shape[0])
        reached = after


def _choice_flops(node: Node, reached: list[bool], learning: set[Value]) -> int:
    """Those of the branch that takes more; ``reached``: which of the operands are ``learning``, to which results are added."""
    most = 0
    for body in (b.graph for b in node.attrs.bodies):
        inner = {v for v, is_reached in zip(body.inputs, reached[1:]) if is_reached}
        most = max(most, _flops(body, inner))
        learning.update(v for v, made in zip(node.outputs, body.outputs) if made in inner)
    return most


def machine_flops(size: int = 1024) -> float:
    """Operations per second of NumPy's f32 matrix product on this machine, the best of three."""
    x = np.ones((size, size), np.float32)
    x @ x
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
