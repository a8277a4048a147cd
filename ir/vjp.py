"""Reverse-mode differentiation: appends, to a graph, the nodes that compute gradients of some of its values.

Operations that carry a gradient use it; composites without one are differentiated through their decomposition, which is
emitted beside them: the forward pass keeps its fused operation, and the backward pass recomputes what it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .builder import Builder
from .errors import NotDifferentiable, TypeMismatch
from .graph import Graph, Node, Value
from .types import TensorType


def backward(
    target: Graph | Builder, outputs: Sequence[Value], grads: Sequence[Value], wrt: Sequence[Value]
) -> list[Value | None]:
    """Gradients of ``sum(outputs[i] * grads[i])`` with respect to the values ``wrt``; None where it is zero everywhere.

    New nodes go to the end of the graph (or where the builder stands), with the locations of the nodes they differentiate.
    Existing nodes stay as they are; nodes that turn out to be unneeded are left to dead-code elimination. No gradient flows
    through ``stop_gradient``, integers, booleans and quantized weights.

    Raises TypeMismatch if a gradient is not of its output's type, NotDifferentiable, naming the operation and its line, for an
    operation between ``wrt`` and ``outputs`` that has no gradient.
    """
    b = target if isinstance(target, Builder) else Builder(target)
    total: dict[Value, Value] = {}
    for v, g in zip(outputs, grads, strict=True):
        if v.type != g.type:
            raise TypeMismatch(f"the gradient of {v!r} must be {v.type}, not {g!r}", v.loc)
        _add(b, total, v, g)
    _reverse(b, list(b.graph.nodes), set(wrt), total)
    return [total.get(v) for v in wrt]


def _add(b: Builder, total: dict[Value, Value], v: Value, g: Value) -> None:
    total[v] = b.add(total[v], g) if v in total else g


def _reverse(b: Builder, nodes: Iterable[Node], active: set[Value], total: dict[Value, Value]) -> None:
    """Carries the gradients in ``total`` backwards over ``nodes``, to and through what depends on ``active`` values."""
    path = []
    for node in nodes:
        if not active.isdisjoint(node.inputs):
            path.append(node)
            active.update(v for v in node.outputs if isinstance(v.type, TensorType) and v.type.dtype.is_float)
    for node in reversed(path):
        grads = [total.get(v) if v in active else None for v in node.outputs]
        if all(g is None for g in grads):
            continue
        here = Builder(b.graph, before=b.before, loc=node.loc)
        if node.op.has_vjp:
            for v, g in zip(node.inputs, node.op.vjp(here, node, *grads)):
                if g is not None and v in active:
                    _add(here, total, v, g)
        elif node.op.is_composite and node.op.differentiable:
            last = _last(b)
            made = node.op.decompose(here, node.attrs, *node.inputs)
            inner = list(_after(b, last))
            results = made if isinstance(made, (tuple, list)) else [made]
            for v, g in zip(results, grads):
                if g is not None:
                    _add(here, total, v, g)
            _reverse(b, inner, active, total)
        else:
            raise NotDifferentiable(f"{node!r}: {node.op.name} has no gradient; stop_gradient would keep it out", node.loc)


def _last(b: Builder) -> Node | None:
    """The node after which ``b`` emits."""
    return b.before.prev if b.before is not None else b.graph.last


def _after(b: Builder, node: Node | None) -> Iterable[Node]:
    """What ``b`` has emitted since ``node`` was the last."""
    node = node.next if node is not None else b.graph.first
    while node is not None and node is not b.before:
        yield node
        node = node.next
