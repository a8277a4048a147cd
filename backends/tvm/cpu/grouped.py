"""Selection of the kernels of grouped products: weights in a stack, rows sorted once for all products of the same groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from wasat.ir import DimLike, DType, Node, QArray, TensorType, Type, Value

from ..layouts import Layout, Packed
from ..lower import Result
from ..selection import Refused, need_f32, need_sizes
from .kernels.blocks import in_blocks
from .kernels.grouped import Grouped, GroupRows, group_rows, grouped
from .kernels.linear_blocks import LinearBlocks
from .kernels.linear_float import Linear
from .kernels.linear_int import LinearInt

if TYPE_CHECKING:
    from .select import Selection


@dataclass(frozen=True)
class Stacked:
    """Weights with one more axis in front: the arrays of each in a layout of its own, one after the other."""

    each: Layout
    rows = 1

    def arrays(self, name: str, type: Type) -> list[Packed]:
        e, *shape = (d for d in type.shape if isinstance(d, int))
        one = self.each.arrays(name, replace(type, shape=tuple(shape)))
        return [replace(a, name=f"{a.name}/{e}", shape=(e * a.shape[0], *a.shape[1:])) for a in one]

    def pack(self, weight: Any) -> list[np.ndarray]:
        each = [weight.rows(e) if isinstance(weight, QArray) else weight[e] for e in range(weight.shape[0])]
        return [np.concatenate(parts) for parts in zip(*map(self.each.pack, each))]


def same_rows(v: Value) -> Iterator[Value]:
    """``v``, and its rows under other shapes."""
    yield v
    for user in v.users:
        if user.op.name == "reshape" and user.output.shape[-1:] == v.shape[-1:]:
            yield from same_rows(user.output)


def readers(v: Value) -> list[tuple[Node, int]]:
    """What reads the rows of ``v``."""
    every = list(same_rows(v))
    return [(node, i) for x in every for node, i in x.uses if node.outputs[0] not in every]


def rows_in(v: Value) -> Value:
    """The value whose rows those of ``v`` are, as it was before they were given another shape."""
    while v.node is not None and v.node.op.name == "reshape" and v.node.inputs[0].shape[-1:] == v.shape[-1:]:
        v = v.node.inputs[0]
    return v


def select_grouped(s: Selection, node: Node, integers: bool) -> None:
    """``node`` becomes a kernel call: of float rows, or of quantized ones. Raises Refused, where no kernel does it."""
    x, weight, groups = node.inputs[:3]
    bias = node.inputs[3] if len(node.inputs) > 3 else None
    need_f32(x, *([] if bias is None else [bias]))
    need_sizes(x.shape[-1])
    (w, panels), out = s.weight(weight), node.output
    e, n, k = (d for d in w.shape if isinstance(d, int))
    if e == 0:
        raise Refused("there are no groups")
    b, lead = s.builder(node), out.shape[:-1]
    if x.shape[:-1] == lead:
        per = 1
    elif x.shape[:-1] == (*lead[:-1], 1) and isinstance(lead[-1], int):
        per = lead[-1]
    else:
        x, per = b.broadcast_to(x, shape=(*lead, k)), 1
    order, starts = _sorted(s, node, groups, lead, e)
    m, _ = s.rows(out)
    rows = s.quantized_rows(node, rows_in(x)) if integers else x
    fused = bias is not None and bias.param is not None  # another one is added afterwards
    kind = (LinearBlocks if in_blocks(panels.weights) else LinearInt) if integers else Linear
    product: Linear | LinearInt | LinearBlocks = kind(s.isa, n, k, panels.weights, bias=fused, threads=s.threads)  # type: ignore[arg-type]
    operands, layouts = [rows, w, order, starts], {1: Stacked(panels)}
    if bias is not None and fused:
        operands.append(bias)
        layouts[4] = Stacked(s.bias_layout)
    shape = rows.shape if integers else s.rows(x)
    [y] = s.call(node, Grouped(product, e, per), grouped, operands, [Result(out.tensor, (m, n))], {0: shape}, layouts)
    if bias is not None and not fused:
        y = b.add(y, b.gather(bias, groups))
    s.graph.replace_uses(out, y)


def _sorted(s: Selection, node: Node, groups: Value, lead: tuple[DimLike, ...], size: int) -> tuple[Value, Value]:
    """The order of the rows by group, and where each group begins: made once for ``groups``."""
    key = groups, lead, size
    if key not in s.sorted:
        b = s.builder(node)
        spread = groups if groups.shape == lead else b.broadcast_to(groups, shape=lead)
        spread = spread if spread.tensor.dtype is DType.I64 else b.cast(spread, dtype=DType.I64)
        m = spread.tensor.size
        results = [Result(TensorType(DType.I64, (m,))), Result(TensorType(DType.I64, (size + 1,)))]
        order, starts = s.call(node, GroupRows(size), group_rows, [spread], results, {0: (m,)})
        s.sorted[key] = order, starts
    return s.sorted[key]
