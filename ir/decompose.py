"""Replaces composites by what they are made of."""

from __future__ import annotations

from collections.abc import Callable

from .builder import Builder
from .graph import Graph, Node, Value


def decompose(graph: Graph, keep: Callable[[Node], bool], bodies: bool = True) -> int:
    """Replaces every composite that ``keep`` does not want by its decomposition, and those in it and (``bodies``) in bodies
    likewise.

    Names of results and locations stay. Returns how many nodes were replaced.
    """
    count = 0
    node = graph.first
    while node is not None:
        if bodies and node.attrs.bodies:
            attrs = node.attrs.with_bodies(lambda body: decompose(body, keep))
            count += attrs is not node.attrs
            node.attrs = attrs
        if node.erased or not node.op.is_composite or keep(node):
            node = node.next
            continue
        before, kept = node.prev, set(node.inputs)
        out = node.op.decompose(Builder(graph, before=node, loc=node.loc), node.attrs, *node.inputs)
        results: list[Value] = [out] if isinstance(out, Value) else list(out)
        names = [v.name for v in node.outputs]
        for old, new in zip(node.outputs, results):
            graph.replace_uses(old, new)
        graph.erase(node)
        for new, name in zip(results, names):
            if new.node is not None and new.node.op.name != "constant" and new not in kept:
                graph.rename(new, name)
        count += 1
        node = before.next if before is not None else graph.first  # what was put in may be composite too
    return count
