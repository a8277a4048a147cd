"""What a training step does to each parameter, as one pass over memory: its share of the gradients' length, its update."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import networkx as nx
from wasat.ir import Attrs, DType, Graph, Node, TensorType, Value

from ..lower import KernelCall, Result
from .kernels.pointwise import POINTWISE, Pointwise, pointwise
from .kernels.square_sum import SquareSum, square_sum

_F32, _BOOL = TensorType(DType.F32, ()), TensorType(DType.BOOL, ())


def fuse_updates(graph: Graph, states: Collection[str], threads: int) -> None:
    """The pointwise operations (f32, of known sizes) that end in outputs named as ``states``, as kernels at the graph's end.

    Operations that feed one another become one kernel, which writes each new state over the old one: at the end of the graph
    every other reader of that has run. An old state that is an output, or read by two kernels, stays as it is.
    """
    inputs = {v.name: v for v in graph.inputs if v.name in states}
    new = {v: inputs[n] for n, v in zip(graph.output_names, graph.outputs) if n in inputs and graph.outputs.count(v) == 1}
    taken: dict[Node, None] = {}
    for node in graph.nodes_reversed:
        if _is_pointwise(node):
            v = node.output
            ends = v in new if graph.is_output(v) else bool(v.uses)
            if ends and all(user in taken for user in v.users):
                taken[node] = None
    net = nx.Graph()
    net.add_nodes_from(taken)
    net.add_edges_from((node, user) for node in taken for user in node.output.users)
    order = {node: i for i, node in enumerate(graph.nodes)}
    groups = [sorted(group, key=order.__getitem__) for group in nx.connected_components(net)]
    for nodes in sorted(groups, key=lambda nodes: order[nodes[0]]):
        results: dict[Value, Value | None] = {}
        for v in (node.output for node in nodes if node.output in new):
            readers = set(new[v].users) & taken.keys()
            free = readers and readers <= set(nodes) and not graph.is_output(new[v])
            results[v] = new[v] if free else None
        _fuse(graph, nodes, results, threads)


def _is_pointwise(node: Node) -> bool:
    """Whether a kernel can have the node: operands are tensors of its result's type, or scalars."""
    t = node.outputs[0].type
    if node.op.name not in POINTWISE or not isinstance(t, TensorType) or t.dtype is not DType.F32 or not t.rank:
        return False
    condition = node.inputs[0] if node.op.name == "select" else None
    fits = (v.type == (_BOOL if v is condition else _F32) or (v.type == t and v is not condition) for v in node.inputs)
    return all(isinstance(d, int) for d in t.shape) and all(fits)


def _fuse(graph: Graph, nodes: Sequence[Node], results: dict[Value, Value | None], threads: int) -> None:
    """Replaces ``nodes`` by a kernel that makes ``results``, each over an operand or not."""
    inner = {node.output for node in nodes}
    operands = list(dict.fromkeys(v for node in nodes for v in node.inputs if v not in inner and _literal(v) is None))
    numbers: dict[Value, int] = {v: i for i, v in enumerate([*operands, *(node.output for node in nodes)])}
    steps = []
    for node in nodes:
        literals = [_literal(v) for v in node.inputs]
        steps.append((node.op.name, tuple(numbers[v] if x is None else x for v, x in zip(node.inputs, literals))))
    desc = Pointwise(
        next(iter(inner)).tensor.rank, tuple(v.shape == () for v in operands),
        frozenset(i for i, v in enumerate(operands) if v.tensor.dtype is DType.BOOL), tuple(steps),
        tuple((numbers[v], None if old is None else numbers[old]) for v, old in results.items()), threads,
    )  # fmt: skip
    made = [Result(v.tensor, alias=None if old is None else numbers[old]) for v, old in results.items()]
    op: Any = KernelCall(desc, pointwise, made, {}, {})
    call = graph.add_node(op, operands, Attrs(), loc=nodes[-1].loc, names=[v.name for v in results])
    for v, y in zip(results, call.outputs):
        graph.replace_uses(v, y)
    for node in reversed(nodes):
        graph.erase(node)


def fuse_square_sums(graph: Graph, lanes: int, threads: int) -> None:
    """``total + reduce_sum(x * x)`` over all of an x of known sizes (f32) becomes one kernel, the same for all sizes."""
    for node in list(graph.nodes):
        if node.op.name != "add" or node.output.type != _F32:
            continue
        for total, v in (node.inputs, node.inputs[::-1]):
            chain = _square_sum(v)
            if chain:
                x = chain[-1].inputs[0]
                op: Any = KernelCall(SquareSum(x.tensor.rank, lanes, threads), square_sum, [Result(_F32)], {}, {})
                call = graph.add_node(op, [x, total], Attrs(), before=node, loc=node.loc, names=[node.output.name])
                graph.replace_uses(node.output, call.outputs[0])
                for old in (node, *chain):
                    graph.erase(old)
                break


def _square_sum(v: Value) -> list[Node]:
    """The sum and the product that make ``v`` out of a tensor, if they do, and are for nothing else."""
    chain: list[Node] = []
    for name in ("reduce_sum", "mul"):
        if v.node is None or v.node.op.name != name or len(v.uses) != 1 or v.graph.is_output(v):
            return []
        chain.append(v.node)
        v = v.node.inputs[0]
    known = v.type == chain[-1].output.type and v.tensor.rank > 0 and all(isinstance(d, int) for d in v.shape)
    return chain if known and v is chain[-1].inputs[1] else []


def _literal(v: Value) -> float | None:
    """The number that a scalar constant is."""
    return float(v.const) if v.const is not None and v.type == _F32 else None
