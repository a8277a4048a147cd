"""What a graph means: its nodes' references, in order. Every other way to run a graph is judged by this one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .checks import check_text
from .dims import DimError, evaluate_dim
from .errors import IRError, TypeMismatch, WasatError, said
from .graph import Graph, Node, Value
from .solve import solve
from .types import Array, DType, QArray, TensorType, Type, type_of


def bind_symbols(
    graph: Graph, arrays: Mapping[str, Array], params: Mapping[str, Array] | None = None,
    symbols: Mapping[str, int] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Values of the graph's symbols, from the shapes of concrete inputs (and parameters); ``symbols`` are known.

    Raises IRError, naming the input, for a wrong rank, element type or size.
    """
    equations = []
    given = [(v.name, v.type, arrays[v.name]) for v in graph.inputs]
    given += [(k, v.type, params[k]) for k, v in graph.params.items() if params is not None and v.type.symbols]
    for name, type, x in given:
        actual = type_of(x)
        if not _same_kind(type, actual):
            raise IRError(f"graph @{graph.name}: input {name} must be {type}, not {actual}")
        equations += [(d, int(n), f"input {name}, axis {i}") for i, (d, n) in enumerate(zip(type.shape, x.shape))]
    try:
        return solve(equations, symbols)
    except DimError as e:
        raise IRError(f"graph @{graph.name}: {e}") from None


def _same_kind(declared: Type, actual: Type) -> bool:
    if declared.rank != actual.rank:
        return False
    if isinstance(declared, TensorType) and isinstance(actual, TensorType):
        return declared.dtype is actual.dtype
    return (
        not isinstance(declared, TensorType) and not isinstance(actual, TensorType)
        and declared.kind == actual.kind
    )  # fmt: skip


def as_array(name: str, x: Any, declared: Type) -> Array:
    """Input ``name`` as an array: lists and Python numbers become one of the declared elements, arrays keep their own.

    Raises IRError for what is no array, and for numbers that its integers do not hold.
    """
    if isinstance(x, QArray):
        return x
    try:
        found = np.asarray(x)
        if isinstance(x, (np.ndarray, np.generic)) or not isinstance(declared, TensorType):
            return found
        if found.dtype.kind not in "biuf" and found.dtype != declared.dtype.np:
            raise ValueError(f"it holds {found.dtype}")
        with np.errstate(invalid="ignore"):
            made = found.astype(declared.dtype.np)
        if not declared.dtype.is_float and found.size and not np.array_equal(made.astype(found.dtype), found):
            raise ValueError(f"{declared.dtype.value} does not hold its numbers")
    except (ValueError, TypeError, OverflowError) as e:
        raise IRError(f"input {name} is no {declared}: {e}") from None
    return made


def evaluate(
    graph: Graph, inputs: Mapping[str, Any], params: Mapping[str, Array] | None = None, *,
    symbols: Mapping[str, int] | None = None, observe: Callable[[Node, tuple[Array, ...]], None] | None = None,
) -> list[Array]:  # fmt: skip
    """Runs ``graph`` on NumPy arrays; returns its outputs in order.

    ``symbols`` binds what no input's shape determines. ``observe`` sees every node with its results. Values are dropped after
    their last use. Raises IRError for missing, unknown or misshaped inputs, and where a runtime check fails.
    """
    wanted = [v.name for v in graph.inputs]
    missing, unknown = [n for n in wanted if n not in inputs], [n for n in inputs if n not in wanted]
    if missing or unknown:
        raise IRError(
            f"graph @{graph.name} takes inputs {', '.join(wanted) or '(none)'}"
            + (f"; missing {', '.join(missing)}" if missing else "")
            + (f"; unknown {', '.join(unknown)}" if unknown else "")
        )
    absent = [n for n in graph.params if n not in (params or {})]
    if absent:
        raise IRError(f"graph @{graph.name} needs parameters {', '.join(absent[:8])}{' …' if len(absent) > 8 else ''}")
    arrays = {v.name: as_array(v.name, inputs[v.name], v.type) for v in graph.inputs}
    dims = bind_symbols(graph, arrays, params, symbols)
    env: dict[Value, Array] = {v: arrays[v.name] for v in graph.inputs}
    load = (params or {}).__getitem__
    for node, _, results in run_nodes(graph.nodes, env, load, dims, graph.outputs):
        if observe is not None:
            observe(node, results)
    return [env[v] if v in env else load(v.param or v.name) for v in graph.outputs]


def run_nodes(
    nodes: Iterable[Node], env: dict[Value, Array], load: Callable[[str], Array], dims: Mapping[str, int],
    kept: Iterable[Value] = (),
) -> Iterator[tuple[Node, list[Array], tuple[Array, ...]]]:  # fmt: skip
    """Runs ``nodes``, in this order, and gives each with its operands and its results.

    ``env``: inputs, and then what is computed. A parameter is read by ``load(name)`` when the first node needs it. What is not
    among ``kept`` is dropped after its last use here. ``dims``: the symbols' values.
    """
    nodes = list(nodes)
    left = Counter(v for node in nodes for v in node.inputs)
    left.update(kept)
    for node in nodes:
        for v in node.inputs:
            if v not in env:
                env[v] = load(v.param or v.name)
        arrays = [env[v] for v in node.inputs]
        results = run_node(node, arrays, dims)
        env.update(zip(node.outputs, results))
        yield node, arrays, results
        for v in (*node.inputs, *(x for x in node.outputs if not left[x])):
            left[v] -= 1
            if left[v] <= 0:
                env.pop(v, None)


def hold_checks(node: Node, dims: Mapping[str, int]) -> None:
    """Raises IRError for the first of a node's recorded checks that the sizes ``dims`` do not satisfy."""
    for a, b in node.checks:
        if evaluate_dim(a, dims) != evaluate_dim(b, dims):
            given = ", ".join(f"{k}={v}" for k, v in dims.items())
            raise IRError(f"{node!r}: needs {check_text((a, b))}, which {given} does not satisfy", node.loc)


def run_node(node: Node, arrays: list[Array], dims: Mapping[str, int]) -> tuple[Array, ...]:
    """The reference of one node on concrete arrays, its runtime checks included."""
    try:
        hold_checks(node, dims)
        with np.errstate(all="ignore"):
            out = node.op.run(node.attrs, dims, *arrays)
    except TypeMismatch as e:
        raise IRError(f"{node!r}: {e.message}", node.loc) from None
    except WasatError:
        raise
    except Exception as e:
        raise IRError(f"{node!r}: {said(e)}", node.loc) from e
    results = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    fixed = []
    for v, x in zip(node.outputs, results):
        want = v.type
        if isinstance(want, TensorType) and not isinstance(x, QArray):
            x = np.asarray(x)
            if x.dtype != want.dtype.np or x.shape != want.concrete(dims):
                raise IRError(f"{node!r}: the reference made {DType.of(x.dtype)}{list(x.shape)}", node.loc)
        fixed.append(x)
    return tuple(fixed)
