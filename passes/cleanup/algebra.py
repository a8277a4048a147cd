"""Clean-up in one sweep: algebra, canonical forms, constant folding, common subexpressions; then dead code.

Operands are in their final form when a node is visited, and rules look only at operands, so one sweep reaches the fixed
point in time linear in the graph. Every rule is exact: no result changes, NaN, infinities and signed zeros included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from wasat.ir import Builder, DimLike, Graph, Node, TensorType, Value, equal, less_equal, run_node
from wasat.ir.axes import product
from wasat.ir.ops.index import AxisAttrs
from wasat.ir.ops.reduce import CumSum
from wasat.ir.ops.shape import Concat, Pad, Reverse, Slice, Transpose
from wasat.ir.types import DType, QArray

from ..core import GraphPass, Remarks, attrs_key
from .clean_loops import clean_loops, taken

Rule = Callable[[Builder, Node], "Value | None"]


def _is(v: Value, number: float) -> bool:
    """Whether ``v`` is a constant with every element this number (0 and -0.0 told apart)."""
    array = v.const
    if array is None or array.size == 0:
        return False
    same = array == number
    if not np.all(same):
        return False
    return number != 0 or v.tensor.dtype.is_int or bool(np.all(np.signbit(array) == np.signbit(number)))


def _keep(node: Node, i: int) -> Value | None:
    """Operand ``i``, if it already has the type of the result (it was not broadcast)."""
    v = node.inputs[i]
    return v if v.type == node.output.type else None


def _algebra(b: Builder, node: Node) -> Value | None:
    """What the operation says of itself: f(f(x)), f(x, x) and f(x, neutral) -> x; constants second, so that rules and patterns
    meet one order.
    """
    op = node.op
    if op.involution:
        inner = node.inputs[0].made_by(op.name)
        return inner.inputs[0] if inner is not None else None
    if not op.elementwise or len(node.inputs) != 2:
        return None
    x, y = node.inputs
    if op.commutative and x.const is not None and y.const is None:
        return b.emit(op, y, x)
    if (number := op.neutral(x.tensor.dtype)) is not None:
        if _is(y, number):
            return _keep(node, 0)
        if op.commutative and _is(x, number):
            return _keep(node, 1)
    return _keep(node, 0) if op.idempotent and x is y else None


def _same_type(b: Builder, node: Node) -> Value | None:
    """A reshape, broadcast or cast that changes nothing."""
    return _keep(node, 0)


_WIDER = {
    DType.F16: {DType.F32, DType.F64}, DType.BF16: {DType.F32, DType.F64}, DType.F32: {DType.F64},
    DType.I8: {DType.I16, DType.I32, DType.I64}, DType.I16: {DType.I32, DType.I64}, DType.I32: {DType.I64},
    DType.U8: {DType.U16, DType.U32, DType.U64}, DType.U16: {DType.U32, DType.U64}, DType.U32: {DType.U64},
}  # fmt: skip
"""Types that hold every value of another exactly."""


def _cast(b: Builder, node: Node) -> Value | None:
    """cast(cast(x)) -> cast(x), or x, where the inner cast loses nothing."""
    inner = node.inputs[0].made_by("cast")
    if inner is None:
        return None
    x = inner.inputs[0]
    if inner.output.tensor.dtype not in _WIDER.get(x.tensor.dtype, ()):
        return None
    return x if x.type == node.output.type else b.cast(x, dtype=node.output.tensor.dtype)


def _reshape(b: Builder, node: Node) -> Value | None:
    """reshape(reshape(x)) -> reshape(x)."""
    inner = node.inputs[0].made_by("reshape")
    return b.reshape(inner.inputs[0], shape=node.output.shape) if inner is not None else None


def _transpose(b: Builder, node: Node) -> Value | None:
    """Transposes compose; one that moves only axes of size 1 is a reshape."""
    perm, x = Transpose.Attrs.of(node).perm, node.inputs[0]
    if perm == tuple(range(len(perm))):
        return x
    inner = x.made_by("transpose")
    if inner is not None:
        first = Transpose.Attrs.of(inner).perm
        return b.transpose(inner.inputs[0], perm=tuple(first[i] for i in perm))
    moved = [i for i in perm if x.shape[i] != 1]
    return b.reshape(x, shape=node.output.shape) if moved == sorted(moved) else None


def _matmul(b: Builder, node: Node) -> Value | None:
    """x @ transpose(w) -> linear(x, w) for a parameter w, and x @ w -> linear(x, transpose(w)): rows of weights are what
    kernels read and quantization rounds, and transposing a parameter is done when it is loaded."""
    x, w = node.inputs
    inner = w.made_by("transpose")
    if len(w.shape) != 2 or len(x.shape) < 2 or w.type.symbols or not x.tensor.dtype.is_float:
        return None
    if inner is not None and _from_param(inner.inputs[0]):
        return b.linear(x, inner.inputs[0])
    return b.linear(x, b.transpose(w, perm=(1, 0))) if _from_param(w) and x.param is None else None


def _gather(b: Builder, node: Node) -> Value | None:
    """Rows of a parameter that is a table of floats -> embedding."""
    w, ids = node.inputs
    table = _from_param(w) and len(w.shape) == 2 and not w.type.symbols and w.tensor.dtype.is_float
    return b.embedding(w, ids, dtype=w.tensor.dtype) if table and AxisAttrs.of(node).axis == 0 else None


def _rope(b: Builder, node: Node) -> Value | None:
    """Rotation at positions that were repeated for every row of the batch: at the positions."""
    x, at, freq = node.inputs
    repeat = at.made_by("broadcast_to")
    if repeat is None or any(d != 1 for d in repeat.inputs[0].shape[:-1]) or repeat.inputs[0].shape[-1:] != at.shape[-1:]:
        return None
    attrs: Any = node.attrs
    positions = b.reshape(repeat.inputs[0], shape=at.shape[-1:])
    return b.rope(x, positions, freq, factor=attrs.factor, interleaved=attrs.interleaved)


def _merged_rows(b: Builder, v: Value) -> Value | None:
    """``v`` [m, k] as [.., k], its m rows not yet merged; None if they are no merged axes."""
    inner = v.made_by("reshape")
    if inner is None or len(v.shape) != 2:
        return None
    x = inner.inputs[0]
    width: DimLike = 1
    for i in reversed(range(2, len(x.shape))):
        width = width * x.shape[i]
        if width != 0 and equal(width, v.shape[-1]) is True:
            return b.reshape(x, shape=(*x.shape[:i], width)) if i < len(x.shape) - 1 else x
    return None


def _rows_apart(b: Builder, node: Node) -> Value | None:
    """f(reshape(x), w) -> reshape(f(x, w)) for an f of rows: what runs along the batch or the sequence stays visible."""
    _, w, *rest = node.inputs
    x = _merged_rows(b, node.inputs[0]) if len(w.shape) == (1 if node.op.elementwise else 2) else None
    if x is None:
        return None
    return b.reshape(b.emit(node.op, x, w, *rest), shape=node.output.shape)


def _product_apart(b: Builder, node: Node) -> Value | None:
    """reshape(x) @ y, where the reshape merges the rows of a product under a batch -> reshape(x @ y): einsums as exported."""
    merge = node.inputs[0].made_by("reshape")
    if merge is None:
        return None
    x, y, new = merge.inputs[0], node.inputs[1], merge.output.shape
    lead, width = len(new) - 2, new[-1]
    if lead < 1 or x.shape[:lead] != new[:lead] or len(y.shape) not in (2, len(new)):
        return None
    ends = (i for i in range(lead + 2, len(x.shape) + 1) if equal(product(*x.shape[i:]), width) is True)
    end = next(ends, None)
    if end is None or all(isinstance(d, int) for d in x.shape[lead:end]):
        return None
    more = end - lead - 1
    x = b.reshape(x, shape=(*x.shape[:end], width))
    if len(y.shape) > 2:
        y = b.reshape(y, shape=(*y.shape[:-2], *(1,) * more, *y.shape[-2:]))
    return b.reshape(b.matmul(x, y), shape=node.output.shape)


def _broadcast(b: Builder, node: Node) -> Value | None:
    """f(x, broadcast_to(y)) -> f(x, y) where x alone has the shape of the result. A square stays one, for what looks for it."""
    if node.inputs[0] is node.inputs[1]:
        return None
    for i, v in enumerate(node.inputs):
        inner, other = v.made_by("broadcast_to"), node.inputs[1 - i]
        if inner is not None and not inner.checks and other.shape == node.output.shape:
            operands = (inner.inputs[0], other) if i == 0 else (other, inner.inputs[0])
            return b.emit(node.op, *operands)
    return None


def _units_of_repeated(b: Builder, node: Node) -> Value | None:
    """A reshape that puts axes of size 1 into what is repeated, or takes them out, before the repetition."""
    inner = node.inputs[0].made_by("broadcast_to")
    if inner is None or inner.checks or node.checks:
        return None
    old, new, x = inner.output.shape, node.output.shape, inner.inputs[0]
    if [d for d in old if d != 1] != [d for d in new if d != 1]:
        return None
    own = (1,) * (len(old) - len(x.shape)) + tuple(x.shape)
    sizes = iter([n for n, d in zip(own, old) if d != 1])
    return b.broadcast_to(b.reshape(x, shape=tuple(1 if d == 1 else next(sizes) for d in new)), shape=new)


def _pad(b: Builder, node: Node) -> Value | None:
    """Padding by nothing."""
    a = Pad.Attrs.of(node)
    amounts = (*a.low, *a.high)
    return _keep(node, 0) if all(isinstance(n, int) and n == 0 for n in amounts) else None


def _unit_steps(node: Node) -> bool:
    return all(s == 1 for s in Slice.Attrs.of(node).steps)


def _whole(b: Builder, node: Node) -> Value | None:
    """A slice of everything."""
    starts = Slice.Attrs.of(node).starts
    return _keep(node, 0) if _unit_steps(node) and all(isinstance(s, int) and s == 0 for s in starts) else None


def _from_param(v: Value) -> bool:
    while (widened := v.made_by("cast")) is not None:
        v = widened.inputs[0]
    return v.param is not None


def _slice(b: Builder, node: Node) -> Value | None:
    """slice(slice(x)) -> slice(x), for steps of 1."""
    inner = node.inputs[0].made_by("slice")
    if inner is None:
        return None
    a, c = Slice.Attrs.of(inner), Slice.Attrs.of(node)
    if not _unit_steps(inner) or not _unit_steps(node):
        return None
    starts = tuple(p + q for p, q in zip(a.starts, c.starts))
    stops = tuple(p + q for p, q in zip(a.starts, c.stops))
    return b.slice(inner.inputs[0], starts=starts, stops=stops)


def _slice_of_concat(b: Builder, node: Node) -> Value | None:
    """A slice that lies within one part of a concatenation: of that part."""
    inner = node.inputs[0].made_by("concat")
    if inner is None:
        return None
    a, axis = Slice.Attrs.of(node), Concat.Attrs.of(inner).axis
    at: DimLike = 0
    lo, hi = a.starts[axis], a.stops[axis]
    for part in inner.inputs:
        size = part.shape[axis]
        if less_equal(at, lo) is True and less_equal(hi, at + size) is True:
            starts, stops = list(a.starts), list(a.stops)
            starts[axis], stops[axis] = lo - at, hi - at
            return b.slice(part, starts=tuple(starts), stops=tuple(stops), steps=a.steps)
        at = at + size
    return None


def _concat(b: Builder, node: Node) -> Value | None:
    """A concatenation of one, of one repeated, of parts some of which are empty, or of the adjacent slices of a whole axis.

    That they are whole along the other axes follows from the type, which every rule must keep."""
    if len(node.inputs) == 1:
        return node.inputs[0]
    axis, source = Concat.Attrs.of(node).axis, None
    at: DimLike = 0
    if len(set(node.inputs)) == 1 and node.inputs[0].shape[axis] == 1:
        return b.broadcast_to(node.inputs[0], shape=node.output.shape)
    parts = [v for v in node.inputs if v.shape[axis] != 0]
    if len(parts) < len(node.inputs):
        return b.concat(*(parts or node.inputs[:1]), axis=axis)
    for v in node.inputs:
        part = v.made_by("slice")
        if part is None or (source is not None and part.inputs[0] is not source):
            return None
        source = part.inputs[0]
        if not _unit_steps(part) or equal(Slice.Attrs.of(part).starts[axis], at) is not True:
            return None
        at = Slice.Attrs.of(part).stops[axis]
    return source if source is not None and equal(at, source.shape[axis]) is True else None


def _select(b: Builder, node: Node) -> Value | None:
    """A choice between equals, or by a constant."""
    condition, x, y = node.inputs
    if x is y:
        return _keep(node, 1)
    if _is(condition, 1):
        return _keep(node, 1)
    array = condition.const
    return _keep(node, 2) if array is not None and array.size and not array.any() else None


def _select_not(b: Builder, node: Node) -> Value | None:
    """select(not c, x, y) -> select(c, y, x)."""
    inner = node.inputs[0].made_by("logical_not")
    return b.select(inner.inputs[0], node.inputs[2], node.inputs[1]) if inner is not None else None


def _turned_sum(b: Builder, node: Node) -> Value | None:
    """reverse(cumsum(reverse(x))) -> cumsum(x) from the other end."""
    inner, axes = node.inputs[0].made_by("cumsum"), Reverse.Attrs.of(node).axes
    if inner is None or axes != (axis := CumSum.Attrs.of(inner).axis,) or (x := inner.inputs[0].made_by("reverse")) is None:
        return None
    attrs = CumSum.Attrs.of(inner)
    if Reverse.Attrs.of(x).axes != axes:
        return None
    return b.cumsum(x.inputs[0], axis=axis, exclusive=attrs.exclusive, reverse=not attrs.reverse)


def _stop_gradient(b: Builder, node: Node) -> Value | None:
    """stop_gradient(stop_gradient(x)) -> stop_gradient(x)."""
    return node.inputs[0] if node.inputs[0].made_by("stop_gradient") is not None else None


RULES: dict[str, tuple[Rule, ...]] = {
    "add": (_broadcast, _rows_apart),
    "sub": (_broadcast,),
    "mul": (_broadcast,),
    "div": (_broadcast,),
    "cast": (_same_type, _cast),
    "reshape": (_same_type, _reshape, _units_of_repeated),
    "broadcast_to": (_same_type,),
    "pad": (_pad,),
    "slice": (_whole, _slice, _slice_of_concat),
    "transpose": (_transpose,),
    "concat": (_concat,),
    "gather": (_gather,),
    "reverse": (_turned_sum,),
    "rope": (_rope,),
    "matmul": (_matmul, _rows_apart, _product_apart),
    "linear": (_rows_apart,),
    "select": (_select, _select_not),
    "stop_gradient": (_stop_gradient,),
}
"""Operation to rules, tried in order after :func:`_algebra`; the first that answers wins, its result is visited in turn."""

_FOLD_LIMIT = 1024
"""Elements up to which a folded constant may be larger than what it was made of."""


def _fold(b: Builder, node: Node, positions: bool) -> list[Value] | None:
    """A node over constants becomes constants, by its reference; without ``positions``, unless integers become floats in it."""
    if not positions and node.is_a("cast") and _counts(node.inputs[0]) and node.outputs[0].tensor.dtype.is_float:
        return None
    if node.outputs[0].const is not None or any(v.const is None for v in node.inputs) or node.checks or node.attrs.symbols:
        return None
    types = [v.type for v in node.outputs if isinstance(v.type, TensorType) and not v.type.symbols]
    if len(types) != len(node.outputs):
        return None
    given = sum(v.const.size for v in node.inputs if v.const is not None)
    if sum(math.prod(t.concrete({})) for t in types) > max(_FOLD_LIMIT, given):
        return None
    arrays = run_node(node, [v.const for v in node.inputs if v.const is not None], {})
    if any(isinstance(a, QArray) for a in arrays):
        return None
    return [b.constant(np.asarray(a), name=v.name) for a, v in zip(arrays, node.outputs)]


def _counts(v: Value) -> bool:
    return v.tensor.dtype.is_int and v.tensor.size != 1


@dataclass(frozen=True)
class Cleanup(GraphPass):
    """Simplifies, folds, merges equal nodes and removes dead ones."""

    fold_positions: bool = True
    """Whether tensors of integers that are cast to floats are folded: what is computed of them (cosines of positions, say) is
    then a table of numbers, in which fusion recognizes nothing."""

    name = "cleanup"

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        counts = {"simplified": 0, "folded": 0, "merged": 0, "dead": 0}
        seen: dict[object, Node] = {}
        node = graph.first
        while node is not None:
            if node.erased:
                node = node.next
                continue
            before, b = node.prev, Builder(graph, before=node, loc=node.loc)
            new: list[Value] | None = None
            for rule in (_algebra, *RULES.get(node.op.name, ())):
                value = rule(b, node)
                if value is not None and value.type == node.output.type:
                    new, kind = [value], "simplified"
                    break
            else:
                new, kind = taken(b, node) or _fold(b, node, self.fold_positions), "folded"
            if new is None:
                key = (node.op, attrs_key(node.attrs), _operands(node))
                twin = seen.setdefault(key, node)
                if twin is not node:
                    new, kind = list(twin.outputs), "merged"
            if new is None:
                node = node.next
                continue
            counts[kind] += 1
            _substitute(graph, node, new, fresh=node.prev is not before)
            node = before.next if before is not None else graph.first
        for node in graph.nodes_reversed:
            if not any(v.uses or graph.is_output(v) for v in node.outputs):
                graph.erase(node)
                counts["dead"] += 1
        for kind, n in clean_loops(graph, lambda body: self.run_graph(body, Remarks())).items():
            counts[kind] += n
        dropped = graph.prune_params()
        changed = any(counts.values()) or bool(dropped)
        if changed:
            remarks.applied(", ".join(f"{n} {what}" for what, n in counts.items() if n) or "unused parameters dropped", graph)
        return changed


def _operands(node: Node) -> tuple[object, ...]:
    """What tells two nodes of one operation and attributes apart."""
    if node.op.commutative:
        return tuple(sorted(map(id, node.inputs)))
    return tuple(map(id, node.inputs))


def _substitute(graph: Graph, node: Node, new: list[Value], fresh: bool) -> None:
    """``new`` stands for the outputs of ``node`` from now on; a fresh node takes over its names."""
    # only the node itself: its operands may still be needed by rules, and dead code goes at the end
    graph.replace(node, new, rename=fresh and all(v.const is None and v.node is not None and v.node.next is node for v in new))
