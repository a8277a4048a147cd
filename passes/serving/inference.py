"""From what is trained to what is evaluated and served: dropout goes, and the keys that only it read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from wasat.ir import Body, DType, Graph, Node, TensorType, Value
from wasat.ir.ops.cond import CondAttrs
from wasat.ir.ops.scan import ScanAttrs

from ..cleanup.clean_loops import unread_operands, without_operands
from ..core import GraphPass, Remarks
from ..pattern import erase_dead

KEY = TensorType(DType.U32, (2,))


@dataclass(frozen=True)
class Inference(GraphPass):
    """dropout(x, key) -> x, in the bodies of loops and in branches too.

    What only made keys goes as well: nodes, operands of a loop that stay or are sliced, and an input u32[2] that nothing reads
    any more. All other inputs stay, and so does a key that a loop carries from turn to turn.
    """

    name = "inference"
    exact = False  # what was dropped is not any more

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        keys = self._drop(graph, remarks)
        sources = _sources(keys)
        for v in [v for v in graph.inputs if v in sources and v.type == KEY]:
            if not v.uses and not graph.is_output(v):
                graph.remove_input(v)
                remarks.applied(f"input %{v.name} was a key of dropout alone, and is gone", graph)
            else:
                reader = repr(v.users[0]) if v.users else "the output"
                remarks.missed(f"input %{v.name} stays: it is not a key of dropout alone, but read by {reader}", graph)
        return bool(keys)

    def _drop(self, graph: Graph, remarks: Remarks) -> list[Value]:
        """Takes the dropouts out; returns what were their keys, and those of loops."""
        keys: list[Value] = []
        for node in graph.nodes:
            if isinstance(node.attrs, ScanAttrs):
                keys += self._loop(graph, node, remarks)
            elif isinstance(node.attrs, CondAttrs):
                keys += self._choice(graph, node, remarks)
            elif (at := node.op.idle) is not None:
                x, key = node.inputs[at], node.inputs[1 - at]
                remarks.applied(f"%{node.output.name} is %{x.name}", node)
                graph.replace_uses(node.output, x)
                erase_dead(graph, node)
                keys.append(key)
        return keys

    def _loop(self, graph: Graph, node: Node, remarks: Remarks) -> list[Value]:
        """The same in the body of a scan; returns the operands that its keys were made of."""
        attrs: Any = node.attrs
        body = attrs.body.graph.clone()
        sources = _sources(self._drop(body, remarks))
        if not sources:
            return []
        kept, slices = list(range(attrs.carries)), 0
        keys = [x for x, v in zip(node.inputs, body.inputs) if v in sources]
        for i, v in list(enumerate(body.inputs))[attrs.carries :]:
            if v in sources and not v.uses and not body.is_output(v):
                body.remove_input(v)
            else:
                kept.append(i)
                slices += i < attrs.carries + attrs.slices
        length = node.inputs[attrs.carries].shape[0] if attrs.slices > slices == 0 else attrs.length
        made = replace(attrs, body=Body(body), slices=slices, length=length)
        new = graph.add_node(node.op, [node.inputs[i] for i in kept], made, before=node, loc=node.loc)
        graph.replace(node, new.outputs)
        for x in keys:
            if x.node is not None and not x.node.erased:
                erase_dead(graph, x.node)
        return keys

    def _choice(self, graph: Graph, node: Node, remarks: Remarks) -> list[Value]:
        """The same in the branches of a cond; returns the operands that its keys were made of."""
        found: set[int] = set()

        def change(body: Graph) -> bool:
            sources = _sources(self._drop(body, remarks))
            found.update(i for i, v in enumerate(body.inputs, 1) if v in sources)
            return bool(sources)

        node.attrs = node.attrs.with_bodies(change)
        keys = [node.inputs[i] for i in found]
        if unread := [i for i in unread_operands(node) if i in found]:
            without_operands(graph, node, unread)
        for x in keys:
            if x.node is not None and not x.node.erased:
                erase_dead(graph, x.node)
        return keys


def _sources(keys: Iterable[Value]) -> set[Value]:
    """The keys, and all that they were made of."""
    found: set[Value] = set()
    stack = list(keys)
    while stack:
        v = stack.pop()
        if v not in found:
            found.add(v)
            stack += v.node.inputs if v.node is not None else ()
    return found
