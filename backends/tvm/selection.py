"""What selecting kernels has in common, whatever machine they are for: nodes become kernel calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wasat.ir import Attrs, Builder, DimLike, DType, Graph, Node, TensorType, Value

from .layouts import Layout
from .lower import KernelCall, Result

Shape = tuple[DimLike, ...]


def is_f32(*values: Value | None) -> bool:
    """Whether those that there are have f32 elements."""
    return all(v is None or (isinstance(v.type, TensorType) and v.type.dtype is DType.F32) for v in values)


class Refused(Exception):
    """Why no kernel takes a node."""


def need_f32(*values: Value) -> None:
    """Raises Refused, where not all are in f32."""
    for v in values:
        if not is_f32(v):
            raise Refused(f"%{v.name} is {v.type}, and it computes with f32")


def need_sizes(*dims: DimLike) -> None:
    """Raises Refused, where not all are numbers."""
    if not all(isinstance(d, int) for d in dims):
        raise Refused(f"of the sizes {', '.join(map(str, dims))} not all are known")


def need_elements(node: Node) -> None:
    """Raises Refused, where an operand or a result is known to have none."""
    if none := next((v for v in (*node.inputs, *node.outputs) if 0 in v.shape), None):
        raise Refused(f"%{none.name} is {none.type}, of no elements")


class KernelSelection:
    """Replaces operations of one graph by kernel calls."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def erased(self, node: Node) -> bool:
        """Erases a node that nothing reads."""
        unused = not any(v.uses or self.graph.is_output(v) for v in node.outputs)
        if unused:
            self.graph.erase(node)
        return unused

    def call(
        self, at: Node, desc: Any, build: Callable[[Any], Any], operands: Sequence[Value], results: Sequence[Result],
        shapes: Mapping[int, Shape] | None = None, layouts: Mapping[int, Layout] | None = None,
    ) -> tuple[Value, ...]:  # fmt: skip
        """A kernel call before ``at``; returns its results."""
        op = KernelCall(desc, build, results, shapes or {}, layouts or {})
        names = [at.outputs[min(i, len(at.outputs) - 1)].name for i in range(len(results))]
        node = self.graph.add_node(op, operands, Attrs(), before=at, loc=at.loc, names=names)
        self.order[node] = self.order.get(at, -1)
        return node.outputs

    def rows(self, v: Value) -> tuple[DimLike, int]:
        """The shape [m, n] of ``v`` with all axes but the last as one."""
        m: DimLike = 1
        for d in v.shape[:-1]:
            m = m * d
        return m, v.shape[-1]

    def builder(self, at: Node) -> Builder:
        return Builder(self.graph, before=at, loc=at.loc)

    def can_sum_at(self, total: Node, node: Node) -> bool:
        """Whether the sum ``total`` may be computed where ``node`` stands: same types, and no reader before."""
        a, b = total.inputs
        return (
            a is not b and a.type == b.type
            and all(user is node or self.order.get(user, -1) > self.order[node] for user in total.output.users)
        )  # fmt: skip
