"""Counting the arithmetic of a model, and what this machine's best routine reaches."""

from __future__ import annotations

import math
import time

import numpy as np
from wasat.ir import Graph


def step_flops(graph: Graph) -> int:
    """Floating-point operations of a training step on the loss ``graph``, whose sizes are known.

    Counted are 2 for every multiply-add of matmul, linear, attention (without regard to masks) and conv, times 3: the backward
    pass has two products for each one of the forward pass. Element-wise work and recomputation are not counted.
    """
    total = 0
    for node in graph.nodes:
        shapes = [v.shape for v in node.inputs]
        if node.op.name == "matmul":
            total += 2 * math.prod(node.output.shape) * shapes[0][-1]
        elif node.op.name == "linear":
            total += 2 * math.prod(node.output.shape) * shapes[1][1]
        elif node.op.name == "attention":
            (b, s, h, d), (t, _, e) = shapes[0], shapes[2][1:]
            total += 2 * b * s * h * t * (d + e)
        elif node.op.name == "conv":
            total += 2 * math.prod(node.output.shape) * math.prod(shapes[1][1:])
    return 3 * total


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
