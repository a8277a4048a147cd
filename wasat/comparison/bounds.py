"""How far results may lie apart that come from the same numbers: element by element, from roundings alone.

A node is taken apart into primitives. Each of these may be off by some roundings of its type, sums and products of n terms by
sqrt(n) roundings of the sum of the terms' magnitudes more, in whatever order they are added (Higham and Mary, A New Approach to
Probabilistic Rounding Error Analysis, 2019). What that does to the results is seen by doing it: a few draws, in which every
primitive is off by random amounts of this size. A result may be off by a multiple of the draws' root mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wasat.ir import Array, DType, Graph, Node, QArray, TensorType, Value, evaluate_dim
from wasat.ir.decompose import decompose
from wasat.ir.evaluate import run_node

Visit = Callable[[Node, list[Array], tuple[Array, ...]], Sequence[Array]]
Env = Mapping[Value, Array]
Noise = NDArray[np.float64] | None

STEPS = 4
"""Roundings of its own that a primitive may be off by."""
BOUNDED = ("tanh", "erf", "sin", "cos")
"""Functions that end at 1: their usual approximations are right to a rounding of that, and near zero to fewer digits."""
DRAWS = 8
FACTOR = 4.0
"""Of the draws' root mean square."""

UNITS = {DType.F64: 2.0**-53, DType.F32: 2.0**-24, DType.F16: 2.0**-11, DType.BF16: 2.0**-8}
"""One rounding, relative to the number."""
TINY = {DType.F64: 2.3e-308, DType.F32: 1.2e-38, DType.F16: 6.0e-8, DType.BF16: 1.2e-38}
"""What results near zero may differ by: machines flush f32 below its smallest normal number, and round f16 to its smallest."""


def walk(graph: Graph, given: Env, sizes: Mapping[str, int], visit: Visit) -> list[Array]:
    """The graph's outputs, where each node's results are what ``visit(node, operands, results)`` makes of them. ``given`` has
    the arrays of inputs and parameters; values are dropped after their last use."""
    env = dict(given)
    left = {v: len(v.uses) + graph.is_output(v) for v in graph.values()}
    for node in graph.nodes:
        operands = [env[v] for v in node.inputs]
        for v, x in zip(node.outputs, visit(node, operands, run_node(node, list(operands), sizes))):
            env[v] = x
        for v in node.inputs:
            left[v] -= 1
            if not left[v] and v.node is not None:
                del env[v]
    return [env[v] for v in graph.outputs]


def numbers(x: Array) -> NDArray[Any]:
    """An array as NumPy computes with it: floats in f64, integers and booleans as they are."""
    dense = np.asarray(x.dense() if isinstance(x, QArray) else x)
    return dense if dense.dtype.kind in "biu" else dense.astype(np.float64)


def bounds_of(
    graph: Graph, given: Mapping[str, Array], params: Mapping[str, Array], sizes: Mapping[str, int]
) -> list[NDArray[np.float64]]:
    """What each element of each output of ``graph`` may be off by, on these inputs and parameters, by name. Of integers and
    booleans: infinite where draws differ, else 0."""
    apart = graph.clone()
    decompose(apart, keep=lambda n: False)
    env: dict[Value, Array] = {v: given[v.name] for v in apart.inputs}
    env |= {v: params[name] for name, v in apart.params.items()}
    _fold(apart, env, sizes)
    noises: list[list[Noise]] = []

    def watched(node: Node, operands: list[Array], results: tuple[Array, ...]) -> tuple[Array, ...]:
        noises.append(_noise(node, operands, results, sizes))
        return results

    exact = [numbers(x) for x in walk(apart, env, sizes, watched)]
    rounding = [STEPS * u * np.abs(np.nan_to_num(x)) + t for x, (u, t) in zip(exact, map(_unit, apart.outputs))]
    computing = [n for n in apart.nodes if n.op.kind not in _EXACT]
    if len(computing) == 1 and [*computing[0].outputs] == apart.outputs:  # what draws would show is known
        where = list(apart.nodes).index(computing[0])
        return [
            r if n is None else r + FACTOR / np.sqrt(3) * np.nan_to_num(n, posinf=0.0) for n, r in zip(noises[where], rounding)
        ]
    square = [np.zeros(x.shape) for x in exact]
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        drawn = walk(apart, env, sizes, lambda n, operands, results: _off(n, operands, results, sizes, rng))
        for s, x, y in zip(square, exact, map(numbers, drawn), strict=True):
            with np.errstate(all="ignore"):
                off = np.inf if x.dtype.kind in "biu" else (x.astype(np.float64) - y) ** 2
                s += np.where(same(x, y), 0.0, np.nan_to_num(off, nan=np.inf))
    return [FACTOR * np.sqrt(s / DRAWS) + r for s, r in zip(square, rounding)]


def once(x: Array, v: Value, unit: float | None = None) -> NDArray[np.float64]:
    """One rounding of each element (``unit``: of this size): results that are closer need no bounds."""
    wide = numbers(x)
    return np.zeros(wide.shape) if wide.dtype.kind in "biu" else (unit or _unit(v)[0]) * np.abs(np.nan_to_num(wide))


def same(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.bool_]:
    """Equal elements; NaN is NaN, and an infinity itself."""
    return np.asarray((x == y) | ((x != x) & (y != y)))


def _unit(v: Value) -> tuple[float, float]:
    dtype = v.type.dtype if isinstance(v.type, TensorType) else DType.F32
    return (UNITS.get(dtype, 2.0**-4), TINY.get(dtype, 2.0**-9)) if dtype.is_float else (0.0, 0.0)


def _fold(graph: Graph, env: dict[Value, Array], sizes: Mapping[str, int]) -> None:
    """What is computed of parameters alone (weights that are dequantized) is computed once, and becomes given."""
    folded: set[Value] = set()
    for node in list(graph.nodes):
        if node.inputs and all(v.param is not None or v in folded for v in node.inputs):
            if node.op.kind == "random" or any(graph.is_output(v) for v in node.outputs):
                continue
            for v, x in zip(node.outputs, run_node(node, [env[v] for v in node.inputs], sizes)):
                env[given := graph.add_input(v.name, v.type, unique=True)] = x
                folded.add(given)
                graph.replace_uses(v, given)
            graph.erase(node)


_EXACT = ("source", "view", "gather")
"""Kinds whose results are their operands' numbers, or nobody's."""


def _off(
    node: Node, operands: list[Array], results: tuple[Array, ...], sizes: Mapping[str, int], rng: np.random.Generator
) -> tuple[Array, ...]:
    """A primitive's results, off by what its roundings may be."""
    if node.op.kind == "control":  # what it repeats cannot be taken apart: its operands are off
        moved = [x if u is None else _moved(x, u, rng) for x, u in zip(operands, _own(node.inputs, operands, 4 * STEPS))]
        results = run_node(node, moved, sizes)
    return tuple(
        x if n is None or isinstance(x, QArray) else _moved(x, n, rng)
        for x, n in zip(results, _noise(node, operands, results, sizes))
    )


def _moved(x: Array, noise: NDArray[np.float64], rng: np.random.Generator) -> Array:
    assert isinstance(x, np.ndarray)
    with np.errstate(all="ignore"):
        return (x.astype(np.float64) + np.nan_to_num(noise, posinf=0.0) * rng.uniform(-1, 1, x.shape)).astype(x.dtype)


def _own(values: Sequence[Value], arrays: Sequence[Array], steps: float) -> list[Noise]:
    """Roundings of the numbers themselves; None of what is no float."""
    return [
        None if isinstance(x, QArray) or not _unit(v)[0] else steps * _unit(v)[0] * np.abs(x.astype(np.float64))
        for v, x in zip(values, arrays)
    ]


def _noise(node: Node, operands: list[Array], results: tuple[Array, ...], sizes: Mapping[str, int]) -> list[Noise]:
    """What each result of a primitive may be off by."""
    if node.op.kind in _EXACT or node.op.alias is not None:
        return [None] * len(results)
    terms, count = _terms(node, operands, sizes)
    if terms is None:
        own = _own(node.outputs, results, STEPS)
        return [n if n is None else n + _unit(node.output)[0] for n in own] if node.is_a(*BOUNDED) else own
    return [(STEPS + np.sqrt(count)) * _unit(node.output)[0] * terms]


def _terms(node: Node, operands: list[Array], sizes: Mapping[str, int]) -> tuple[NDArray[np.float64] | None, float]:
    """Of a sum or product: the sum of the magnitudes of each result's terms, and how many there are."""
    product = node.op.kind == "product"
    if not product and not (node.op.kind == "reduction" and _sums(node)):
        return None, 1.0
    if len(node.outputs) != 1 or any(isinstance(x, QArray) for x in operands) or not _unit(node.output)[0]:
        return None, 1.0
    floats = [np.abs(x) if isinstance(x, np.ndarray) and x.dtype.kind not in "biu" else x for x in operands]
    size = np.asarray(run_node(node, list(floats), sizes)[0], np.float64)
    of_each = evaluate_dim(node.multiply_adds, sizes) if product else np.asarray(operands[0]).size
    return size, max(1.0, of_each / max(1, size.size))


def _sums(node: Node) -> bool:
    factors = [f for axes in node.axes.operands for axis in axes for f in axis]
    return any(f.how == "sum" for f in factors if f.role == "reduced")
