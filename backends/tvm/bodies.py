"""Bodies of loops and branches as they are lowered: they own the parameters they are given, and kernels read them packed."""

from __future__ import annotations

from wasat.ir import Graph, Node


def adopt(node: Node) -> list[Graph]:
    """Copies of the bodies of ``node``, which take their place and may be changed. Operands that are parameters, and that
    bodies get as they are, become parameters of the bodies."""
    bodies = [body.graph for body in node.attrs.bodies]
    if not bodies:
        return []
    shift = len(node.inputs) - len(bodies[0].inputs)
    given = {
        i: v.param for i, v in enumerate(node.inputs)
        if v.param is not None and i >= node.attrs.shared and all(b.inputs[i - shift].type == v.type for b in bodies)
    }  # fmt: skip
    copies: list[Graph] = []

    def change(body: Graph) -> bool:
        for v, name in [(body.inputs[i - shift], name) for i, name in given.items()]:
            body.replace_uses(v, body.add_param(name, v.type))
            body.remove_input(v)
        copies.append(body)
        return True

    node.attrs = node.attrs.with_bodies(change)
    node.graph.set_inputs(node, [v for i, v in enumerate(node.inputs) if i not in given])
    return copies
