"""What a graph costs when its sizes are known: bytes of values, the peak of live bytes, operations of nodes."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from wasat.ir import DimLike, Graph, Node, TensorType, Value, evaluate_dim, symbols_of
from wasat.ir.decompose import decompose

from ..core import PassError

Sizes = Mapping[str, int]


def unbound(graph: Graph, sizes: Sizes) -> list[str]:
    """Symbols of the graph that ``sizes`` lacks."""
    return [s for s in symbols_of(d for v in graph.values() for d in v.type.shape) if s not in sizes]


def memory_of(v: Value) -> Value:
    """The value whose memory ``v`` is: itself, or what it is a view of."""
    while v.node is not None and v.node.op.alias is not None:
        v = v.node.inputs[v.node.op.alias]
    return v


def bytes_of(v: Value, sizes: Sizes) -> int:
    """Bytes of a value; of inputs, parameters, constants and quantized weights, which are there anyway, 0."""
    if v.node is None or v.const is not None or not isinstance(v.type, TensorType):
        return 0
    return -(-math.prod(v.type.concrete(sizes)) * v.type.dtype.bits // 8)


def peak_bytes(graph: Graph, sizes: Sizes, in_place: Container[str] = ()) -> int:
    """The most bytes of computed values alive at once: from the node that makes them to their last use, outputs to the end.

    Nodes run in order, and each needs operands and results together. Inputs, parameters and constants are not counted, nor are
    the outputs named ``in_place``, which are written into inputs.
    Raises PassError for a symbol that ``sizes`` lacks.
    """
    if missing := unbound(graph, sizes):
        raise PassError(f"memory of @{graph.name}: the sizes of {', '.join(missing)} are not given")
    last: dict[Value, Node | None] = {}
    for node in graph.nodes:
        last.update((memory_of(v), node) for v in [*node.outputs, *node.inputs])
    last.update((memory_of(v), None) for v in graph.outputs)
    given = {v for v, name in zip(graph.outputs, graph.output_names) if name in in_place}
    last = {v: at for v, at in last.items() if v not in given}
    dies: dict[Node, list[Value]] = {}
    for v, at in last.items():
        if at is not None:
            dies.setdefault(at, []).append(v)
    live = peak = 0
    for node in graph.nodes:
        live += sum(bytes_of(v, sizes) for v in node.outputs if v in last and memory_of(v) is v)
        peak = max(peak, live)
        live -= sum(bytes_of(v, sizes) for v in dies.get(node, ()))
    return peak


def operations_of(node: Node, sizes: Sizes) -> int:
    """Arithmetic of ``node``, composites as they decompose: 2 for each multiply-add of products, 1 for each element of results
    (of reductions: of operands), 0 for moving."""
    g = Graph("work")
    made = g.add_node(node.op, [g.add_input(f"x{i}", v.type) for i, v in enumerate(node.inputs)], node.attrs)
    g.set_outputs(made.outputs)
    decompose(g, keep=lambda n: False)
    return sum(_operations(n, sizes) for n in g.nodes)


def _operations(node: Node, sizes: Sizes) -> int:
    if node.op.kind in ("source", "view", "gather") or node.op.alias is not None:
        return 0
    if node.op.kind == "product":
        return 2 * evaluate_dim(node.multiply_adds, sizes)
    results = sum(_count(v.shape, sizes) for v in node.outputs)
    return max(results, max((_count(v.shape, sizes) for v in node.inputs), default=0))


def _count(shape: tuple[DimLike, ...], sizes: Sizes) -> int:
    return math.prod(evaluate_dim(d, sizes) for d in shape)
