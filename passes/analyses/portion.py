"""A portion of a value along one axis, made of the same portions of what the value is made of.

    portion(transpose(concat(x, y)), of y's elements)      transpose(y)
    portion(iota(s + 3), from 3 on)                        iota(s) + 3
"""

from __future__ import annotations

from typing import Any

from wasat.ir import Builder, DimLike, Node, Value, equal, less_equal
from wasat.ir.ops.constant import Iota
from wasat.ir.ops.shape import BroadcastTo, Concat, Pad, Reshape, Slice


class Portions:
    """Emits portions through ``b``; each one once."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self._made: dict[tuple[Value, int, DimLike, DimLike], Value] = {}

    def of(self, v: Value, axis: int, first: DimLike, size: DimLike) -> Value:
        """``size`` elements of ``v`` along ``axis``, from ``first`` on."""
        key = (v, axis, first, size)
        if key not in self._made:
            self._made[key] = self._of(v, axis, first, size)
        return self._made[key]

    def _of(self, v: Value, axis: int, first: DimLike, size: DimLike) -> Value:
        if equal(first, 0) is True and equal(size, v.shape[axis]) is True:
            return v
        node = v.node
        found = self._through(node, axis, first, size) if node is not None and len(node.outputs) == 1 else None
        if found is not None:
            return found
        starts = tuple(first if i == axis else 0 for i in range(len(v.shape)))
        stops = tuple(first + size if i == axis else d for i, d in enumerate(v.shape))
        return self.b.slice(v, starts=starts, stops=stops, steps=(1,) * len(starts))

    def _through(self, node: Node, axis: int, first: DimLike, size: DimLike) -> Value | None:
        """The portion of the one result of ``node``; None where it has to be cut from that."""
        attrs: Any = node.attrs
        if isinstance(attrs, Iota.Attrs):
            count = self.b.iota(size=size, dtype=attrs.dtype)
            return count if first == 0 else self.b.add(count, self.b.dim_size(size=first, dtype=attrs.dtype))
        if isinstance(attrs, Concat.Attrs) and attrs.axis == axis:
            return self._joined(node, axis, first, size)
        if isinstance(attrs, Pad.Attrs) and (attrs.low[axis], attrs.high[axis]) != (0, 0):
            return self._padded(node, attrs, axis, first, size)
        if isinstance(attrs, Slice.Attrs):
            if attrs.steps[axis] != 1:
                return None
            x, low = node.inputs[0], attrs.starts[axis]
            starts = tuple(0 if i == axis else d for i, d in enumerate(attrs.starts))
            stops = tuple(size if i == axis else d for i, d in enumerate(attrs.stops))
            return self.b.slice(self.of(x, axis, low + first, size), starts=starts, stops=stops, steps=attrs.steps)
        return self._moved(node, axis, first, size)

    def _joined(self, node: Node, axis: int, first: DimLike, size: DimLike) -> Value | None:
        """Of what is joined, those that lie within, whole or in part."""
        parts: list[Value] = []
        offset: DimLike = 0
        for v in node.inputs:
            own, begins, ends = v.shape[axis], first - offset, first + size - offset
            if less_equal(own, begins) is True or less_equal(ends, 0) is True:
                offset = offset + own
                continue
            low = 0 if less_equal(begins, 0) is True else begins if less_equal(0, begins) is True else None
            high = own if less_equal(own, ends) is True else ends if less_equal(ends, own) is True else None
            if low is None or high is None:
                return None
            parts.append(self.of(v, axis, low, high - low))
            offset = offset + own
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else self.b.concat(*parts, axis=axis)

    def _padded(self, node: Node, attrs: Pad.Attrs, axis: int, first: DimLike, size: DimLike) -> Value | None:
        """Of what is padded, or of the padding."""
        x, low = node.inputs[0], attrs.low[axis]
        shape = tuple(size if i == axis else d for i, d in enumerate(node.output.shape))
        if less_equal(first + size, low) is True or less_equal(low + x.shape[axis], first) is True:
            return self.b.broadcast_to(self.b.constant(attrs.value, x.tensor.dtype), shape=shape)
        if less_equal(low, first) is not True or less_equal(first + size, low + x.shape[axis]) is not True:
            return None
        inner = self.of(x, axis, first - low, size)
        lows, highs = (tuple(0 if i == axis else d for i, d in enumerate(side)) for side in (attrs.low, attrs.high))
        return self.b.pad(inner, low=lows, high=highs, value=attrs.value) if any((*lows, *highs)) else inner

    def _moved(self, node: Node, axis: int, first: DimLike, size: DimLike) -> Value | None:
        """Of what makes each element along the axis of those of its operands that stand there."""
        rule, attrs = node.axes, node.attrs
        factors = rule.result[axis]
        if len(factors) != 1 or factors[0].role not in ("free", "repeated"):
            return None
        inputs = []
        for v, axes in zip(node.inputs, rule.operands):
            at = [i for i, own in enumerate(axes) if factors[0] in own]
            if at and axes[at[0]] != factors:
                return None
            inputs.append(self.of(v, at[0], first, size) if at else v)
        if isinstance(attrs, (Reshape.Attrs, BroadcastTo.Attrs)):
            attrs = type(attrs)(tuple(size if i == axis else d for i, d in enumerate(attrs.shape)))
        elif inputs == list(node.inputs) or factors[0].role != "free":
            return None
        made = self.b.graph.add_node(node.op, inputs, attrs, before=self.b.before, loc=node.loc).output
        return made if equal(made.shape[axis], size) is True else None


def beside(v: Value, axis: int, size: DimLike) -> tuple[DimLike, DimLike] | None:
    """How many elements were put in front of, and behind, ``size`` others along an axis of ``v``."""
    if equal(v.shape[axis], size) is True:
        return 0, 0
    node = v.node
    if node is None or len(node.outputs) != 1:
        return None
    attrs: Any = node.attrs
    if isinstance(attrs, Concat.Attrs) and attrs.axis == axis:
        own = [v.shape[axis] for v in node.inputs]
        longest = [i for i, d in enumerate(own) if not isinstance(d, int)]
        if len(longest) != 1:
            return None
        [i] = longest
        inner, front, back = beside(node.inputs[i], axis, size), sum(own[:i]), sum(own[i + 1 :])
    elif isinstance(attrs, Pad.Attrs) and (attrs.low[axis], attrs.high[axis]) != (0, 0):
        inner, front, back = beside(node.inputs[0], axis, size), attrs.low[axis], attrs.high[axis]
    elif isinstance(attrs, Slice.Attrs):
        return None
    else:
        rule = node.axes
        factors = rule.result[axis]
        found = [(v, axes.index(factors)) for v, axes in zip(node.inputs, rule.operands) if factors and factors in axes]
        return beside(*found[0], size) if found else None
    return (inner[0] + front, inner[1] + back) if inner is not None else None
