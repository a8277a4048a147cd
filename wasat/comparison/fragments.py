"""Parts of a graph as graphs of their own: what a value is computed of, from values that are given."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from wasat.ir import DimLike, Graph, Node, Value, symbols_of
from wasat.ir.graph import copy_node


def slice_to(targets: Iterable[Value], given: Collection[Value]) -> list[Node]:
    """The nodes that compute ``targets``, in order, down to the values ``given``, inputs and parameters."""
    targets = list(targets)
    wanted, found = {v.node for v in targets}, []
    for node in targets[0].graph.nodes_reversed if targets else ():
        if node in wanted:
            found.append(node)
            wanted |= {v.node for v in node.inputs if v not in given}
    return found[::-1]


def fragment(name: str, nodes: Sequence[Node], outputs: Sequence[Value], sizes: Mapping[str, int]) -> tuple[Graph, list[Value]]:
    """A graph of copies of ``nodes`` (in order), and the values that its inputs stand for, in their order.

    Parameters stay parameters, constants are copied. A symbol that no input's axis tells becomes its number of ``sizes``.
    """
    inside = set(nodes)
    read = dict.fromkeys(v for n in nodes for v in n.inputs if v.node not in inside)
    constants = [v.node for v in read if v.node is not None and v.const is not None]
    inputs = [v for v in read if v.param is None and v.node not in constants]
    types = [d for v in [*inputs, *(v for n in nodes for v in n.outputs), *read] for d in v.type.shape]
    told = {str(d) for v in inputs for d in v.shape}
    used = {*symbols_of(types), *(s for n in nodes for s in n.attrs.symbols)}
    dims: dict[str, DimLike] = {s: sizes[s] for s in used if s not in told}
    g = Graph(name)
    env: dict[Value, Value] = {v: g.add_input(v.name, v.type.substitute(dims)) for v in inputs}
    env |= {v: g.add_param(v.param, v.type.substitute(dims)) for v in read if v.param is not None}
    for node in [*(n for n in constants if n is not None), *nodes]:
        copy_node(g, node, env, dims=dims)
    g.set_outputs([env[v] for v in outputs], [v.name for v in outputs])
    return g, inputs


def layer_of(node: Node) -> str:
    """Which part of the model a node is in: the module that was traced; else the path of the nearest parameter that it reads or
    its operands depend on, without its last word; "" where there is none."""
    if node.loc is not None and node.loc.scope:
        return node.loc.scope
    seen, front = {node}, [node]
    while front:
        for n in front:
            for v in n.inputs:
                if v.param is not None and "." in v.param:
                    return v.param.split("|")[0].rpartition(".")[0]
        front = [v.node for n in front for v in n.inputs if v.node is not None and v.node not in seen]
        seen.update(front)
    return ""
