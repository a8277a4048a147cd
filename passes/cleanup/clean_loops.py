"""Clean-up of loops and choices: bodies are simplified, results and operands that nobody reads go, loops over the same operands
become one, a choice that is known becomes the branch that is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wasat.ir import Body, Builder, Graph, Node, Value
from wasat.ir.ops.cond import CondAttrs
from wasat.ir.ops.scan import ScanAttrs


def clean_loops(graph: Graph, clean: Callable[[Graph], bool]) -> dict[str, int]:
    """What was done to the scans and conds of ``graph``, by kind; ``clean`` simplifies a graph and says whether it changed."""
    counts = {"simplified": 0, "merged": 0, "dead": 0}
    seen: dict[object, Node] = {}
    for node in [n for n in graph.nodes if n.attrs.bodies]:
        attrs: Any = node.attrs.with_bodies(clean)
        counts["simplified"] += attrs is not node.attrs
        node.attrs = attrs
        if not isinstance(attrs, ScanAttrs) or any(v.const is not None for v in attrs.body.graph.outputs):
            continue  # numbers stand in the text without their names
        key = _key(node)
        if key in seen:
            node = _merge(graph, seen[key], node)
            counts["merged"] += 1
        seen[key] = node
    for node in [n for n in graph.nodes if n.attrs.bodies]:
        carries = node.attrs.carries if isinstance(node.attrs, ScanAttrs) else 0
        kept = [i for i, v in enumerate(node.outputs) if i < carries or v.uses or graph.is_output(v)]
        if len(kept) < len(node.outputs) and kept:
            counts["dead"] += len(node.outputs) - len(kept)
            node = _keep(graph, node, kept)
        if isinstance(node.attrs, CondAttrs) and (unread := unread_operands(node)):
            counts["dead"] += len(unread)
            without_operands(graph, node, unread)
    return counts


def taken(b: Builder, node: Node) -> list[Value] | None:
    """The results of the branch that a cond takes, where that is known."""
    condition = node.inputs[0].const if isinstance(node.attrs, CondAttrs) else None
    if condition is None:
        return None
    attrs = CondAttrs.of(node)
    return b.inline((attrs.then if condition else attrs.otherwise).graph, node.inputs[1:])


def unread_operands(node: Node) -> list[int]:
    """Of a cond, the operands that neither branch reads."""
    bodies = [body.graph for body in node.attrs.bodies]
    inputs = zip(*(g.inputs for g in bodies))
    return [i for i, same in enumerate(inputs, 1) if not any(v.uses or v.graph.is_output(v) for v in same)]


def without_operands(graph: Graph, node: Node, unread: list[int]) -> None:
    """Takes those operands of a cond away, which neither branch reads."""

    def change(body: Graph) -> bool:
        for v in [body.inputs[i - 1] for i in unread]:
            body.remove_input(v)
        return True

    operands = [v for i, v in enumerate(node.inputs) if i not in unread]
    new = graph.add_node(node.op, operands, node.attrs.with_bodies(change), before=node, loc=node.loc)
    graph.replace(node, new.outputs)


def _keep(graph: Graph, node: Node, kept: list[int]) -> Node:
    """Leaves the node those of its results."""

    def change(body: Graph) -> bool:
        body.set_outputs([body.outputs[i] for i in kept], [body.output_names[i] for i in kept])
        for n in body.nodes_reversed:
            if not any(v.uses or body.is_output(v) for v in n.outputs):
                body.erase(n)
        return True

    new = graph.add_node(node.op, node.inputs, node.attrs.with_bodies(change), before=node, loc=node.loc)
    found = dict(zip(kept, new.outputs))
    graph.replace(node, [found.get(i) for i in range(len(node.outputs))])
    return new


def _key(node: Node) -> object:
    """Equal for scans that do the same in each turn, whatever they keep of it."""
    attrs: Any = node.attrs
    text, _, _ = attrs.body.text.rpartition("\n  return")
    carried = [v.name for v in attrs.body.graph.outputs[: attrs.carries]]
    return text.partition("(")[2], tuple(carried), node.inputs, attrs.slices, attrs.length, attrs.reverse


def _merge(graph: Graph, first: Node, second: Node) -> Node:
    """One scan in the place of the first, which stacks what either does."""
    a: Any = first.attrs
    b: Any = second.attrs
    c = a.carries
    body = a.body.graph.clone()
    own = {v.name: v for v in body.values()}
    places = []  # of the second's stacked results among those of the merged one
    outputs = list(body.outputs)
    for v in b.body.graph.outputs[c:]:
        x = own[v.name]
        if x not in outputs[c:]:
            outputs.append(x)
        places.append(outputs.index(x, c))
    body.set_outputs(outputs, [str(i) for i in range(len(outputs))])
    made = Builder(graph, before=first, loc=first.loc).scan(
        *first.inputs, body=Body(body), carries=c, slices=a.slices, length=a.length, reverse=a.reverse
    )
    results = made if isinstance(made, tuple) else (made,)
    graph.replace(second, [*results[:c], *(results[i] for i in places)])
    graph.replace(first, results)
    node = results[0].node
    assert node is not None
    return node
