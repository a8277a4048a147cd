"""What selecting kernels has in common, whatever machine they are for: nodes become kernel calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wasat.ir import Attrs, Builder, DimLike, DType, Graph, Node, State, TensorType, Value, equal

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


def state_behind(state: Value) -> tuple[Value | None, Value]:
    """Of a state that rows without positions start as zeros: how many positions rows hold, and the state without that."""
    choice = state.made_by("select")
    if choice is None:
        return None, state
    none, start, held = choice.inputs
    zeros = start.made_by("broadcast_to")
    number = start.const if zeros is None else zeros.inputs[0].const
    test = none.made_by("equal")
    if number is None or number.any() or test is None or held.type != state.type:
        return None, state
    rows, zero = test.inputs
    column = rows.made_by("reshape")
    past = column.inputs[0] if column is not None else rows
    counts = past.type.rank == 1 and equal(past.shape[0], state.shape[0]) is True and past.tensor.dtype is DType.I64
    alone = rows.shape == (past.shape[0], *[1] * (state.type.rank - 1))
    if not counts or not alone or zero.const is None or zero.const.any():
        return None, state
    return past, held


def state_of(v: Value) -> Value:
    """The state that ``v`` is, before what stands first was put into it."""
    start = v.made_by("cache_start")
    return start.inputs[2 + start.outputs.index(v)] if start is not None else v


class KernelSelection:
    """Replaces operations of one graph by kernel calls."""

    def __init__(self, graph: Graph, states: Mapping[str, State]) -> None:
        self.graph, self.states = graph, states
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def given_up(self, held: Value, state: Value) -> bool:
        """Whether ``held``, read as ``state`` alone, is a state whose memory may take what comes after it."""
        own = self.states.get(held.name) if held.node is None and held.param is None else None
        read_once = len(held.uses) == len(state.uses) == 1 and not self.graph.is_output(held)
        return own is not None and own.donated and read_once

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

    def replace_recurrent(
        self, node: Node, desc: Any, build: Callable[[Any], Any], operands: Sequence[Value], in_place: bool
    ) -> None:  # fmt: skip
        """A kernel for ``node``, of results y and state; the last operand is the state before, written over if ``in_place``."""
        y, after = (Result(v.tensor) for v in node.outputs)
        results = [Result(after.type, alias=len(operands) - 1), y] if in_place else [y, after]
        made = self.call(node, desc, build, operands, results)
        for old, new in zip(node.outputs, made[::-1] if in_place else made):
            self.graph.replace_uses(old, new)

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
