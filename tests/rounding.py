"""How far rounding may move each element of a graph's results: for tests that compare two orders of the same arithmetic.

Monte Carlo arithmetic (D. S. Parker, 1997): the graph runs a few times more, every float that a node reads or makes moved by
some of its type's roundings, at random and anew for each reader. An element is given what that moves it by, and no part of the
largest of its tensor: one that is small because its terms are gets little, one whose terms cancel gets what they lose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from wasat.ir import Array, DType, Graph, Node, QArray
from wasat.ir.evaluate import as_array, bind_symbols, run_node

DRAWS = 5
STEPS = {DType.F64: 16, DType.F32: 16, DType.F16: 4, DType.BF16: 4}
"""Roundings that each operand is moved by, at most: sqrt(n) of a sum of n terms, and those within composite operations. Sums of
16-bit floats are f32 inside."""
LEAST = {DType.F64: 2.0**-1074, DType.F32: 2.0**-149, DType.F16: 2.0**-24, DType.BF16: 2.0**-133}
"""The smallest numbers."""
LEVEL = 1 / 127
"""Where activations are rounded to int8, a last bit moves one by a whole level of its block's largest."""
MOVES = {"view", "gather", "source", "ordered"}
"""Kinds of operations that compute no element anew."""
STEPWISE = {"floor", "ceil", "round", "sign", "isnan"}
"""Operations whose results jump: they stay as they are, as booleans and integers do."""


def _moved(x: Any, rng: np.random.Generator, share: float = 1, level: float = 0) -> Any:
    """x moved by up to so many steps times ``share``, and ``level`` times the largest of its row."""
    dtype = None if isinstance(x, QArray) else DType.of(np.asarray(x).dtype)
    if dtype not in STEPS:
        return x
    wide = np.asarray(x, np.float64)
    by = share * STEPS[dtype] * unit(dtype) * np.where(wide == np.round(wide), 0, np.abs(wide))  # whole numbers are exact
    if level and wide.ndim:
        by = by + level * np.abs(wide).max(axis=-1, keepdims=True, initial=0)
    with np.errstate(all="ignore"):
        return np.asarray(np.where(np.isfinite(wide), wide + by * rng.uniform(-1, 1, wide.shape), wide), np.asarray(x).dtype)


def unit(dtype: DType) -> float:
    """One rounding, relative to the value."""
    return {DType.F64: 2.0**-53, DType.F32: 2.0**-24, DType.F16: 2.0**-11, DType.BF16: 2.0**-8}[dtype]


def _run(
    node: Node, operands: list[Array], want: Sequence[Array], dims: Mapping[str, int], rng: np.random.Generator, level: float
) -> list[Array]:
    """A node's results on operands that were moved before, each moved again; what is no float stays ``want``."""
    if node.op.name in STEPWISE:
        return list(want)
    if node.op.kind not in MOVES:
        level = level if getattr(node.attrs, "activation", None) == "int8" else 0
        operands = [_moved(x, rng, level=level if i == 0 else 0) for i, x in enumerate(operands)]
    results = run_node(node, operands, dims)
    if node.op.name == "dft":  # terms of equal size in every result, of which a fast algorithm cancels some exactly
        [x], dtype = results, DType.of(np.asarray(want[0]).dtype)
        size = STEPS[dtype] * unit(dtype) * np.abs(np.asarray(operands[0], np.float64)).sum(axis=(-2, -1), keepdims=True)
        results = ((x + size * rng.uniform(-1, 1, np.shape(x))).astype(dtype.np),)
    if node.op.kind not in MOVES:
        results = tuple(_moved(x, rng, share=0.25) for x in results)
    floats = [not isinstance(w, QArray) and DType.of(np.asarray(w).dtype) in STEPS for w in want]
    return [x if f else w for x, w, f in zip(results, want, floats)]


def _far(xs: Sequence[Any]) -> NDArray[np.float64]:
    """How far the later of ``xs`` are from the first: the root mean square, or half of the most if that is more (of what a few
    rounded terms decide, as a sign)."""
    if isinstance(xs[0], QArray):
        return np.zeros(xs[0].shape)
    first, *rest = (np.asarray(x, np.float64) for x in xs)
    with np.errstate(invalid="ignore"):
        same = [(x == first) | (np.isnan(x) & np.isnan(first)) for x in rest]
        off = np.array([np.where(s, 0, np.abs(x - first)) for s, x in zip(same, rest)])
    return np.maximum(np.sqrt(np.mean(off**2, axis=0)), off.max(axis=0) / 2)


def spread_of(f: Callable[..., Any], *operands: Any, runs: int = DRAWS) -> NDArray[np.float64]:
    """How far the elements of ``f(*operands)`` move, all that are floats being moved before."""
    rngs = [np.random.default_rng(i) for i in range(runs)]
    return _far([f(*operands), *(f(*(_moved(x, rng) for x in operands)) for rng in rngs)])


def spread(
    graph: Graph, inputs: Mapping[str, Any], params: Mapping[str, Array] | None = None, runs: int = DRAWS, level: float = LEVEL
) -> list[NDArray[np.float64]]:
    """For each output, how far its elements move. inputs, params: arrays, as for ``evaluate``. ``runs``: how often the graph
    runs. ``level``: what an activation that is rounded to int8 moves by, of its row's largest."""
    arrays = {v.name: as_array(v.name, inputs[v.name], v.type) for v in graph.inputs}
    dims = bind_symbols(graph, arrays, params)
    rngs = [np.random.default_rng(i) for i in range(runs)]
    given = {v: arrays[v.name] for v in graph.inputs} | {v: (params or {})[k] for k, v in graph.params.items()}
    env: dict[Any, Any] = {v: [x] * (1 + runs) for v, x in given.items()}
    left = {v: len(v.uses) + graph.is_output(v) for v in graph.values()}
    for node in graph.nodes:
        want = run_node(node, [env[v][0] for v in node.inputs], dims)
        draws = [_run(node, [env[v][i] for v in node.inputs], want, dims, rng, level) for i, rng in enumerate(rngs, 1)]
        for n, v in enumerate(node.outputs):
            env[v] = [want[n], *(d[n] for d in draws)]
        for v in node.inputs:
            left[v] -= 1
            if not left[v]:
                del env[v]

    return [_far(env[v]) for v in graph.outputs]


def bound(want: Array, far: NDArray[np.float64]) -> NDArray[np.float64]:
    """What an element may differ by: four times its spread, and four roundings of its own, or of the least numbers; what is no
    float, by nothing."""
    if isinstance(want, QArray) or DType.of(np.asarray(want).dtype) not in STEPS:
        return np.zeros(want.shape)
    wide, dtype = np.asarray(want, np.float64), DType.of(np.asarray(want).dtype)
    own = 4 * unit(dtype) * np.where(np.isfinite(wide), np.abs(wide), 0)
    return 4 * np.nan_to_num(far, nan=0.0, posinf=0.0) + np.maximum(own, 4 * LEAST[dtype])


def assert_near(got: Array, want: Array, allowed: NDArray[np.float64], what: str = "") -> None:
    """|got - want| <= allowed, element by element; infinities and NaN are where they are wanted."""
    x, y = (np.asarray(a, np.float64) for a in (got, want))
    assert x.shape == y.shape, what
    with np.errstate(invalid="ignore"):
        error = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, np.abs(x - y))
    wrong = ~(error <= allowed)
    if not wrong.any():
        return
    worst = int(np.argmax(np.where(wrong, error / np.maximum(allowed, 1e-300), -1)))
    at = tuple(int(i) for i in np.unravel_index(worst, x.shape))
    off = f"{list(at)} is {x[at]!r}, and not within {allowed[at]:.1e} of {y[at]!r}"
    raise AssertionError(f"{what}: {int(wrong.sum())} of {x.size} elements; {off}")
