"""Labels of parts of the sequence, and of what stands beside it: slices, padding, what is joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from wasat.ir import Node
from wasat.ir.ops.shape import Concat, Pad, Slice

from .sequence import Label, LooksAhead, beyond


def part(node: Node, given: Sequence[Label], symbol: str) -> Label | None:
    """The label of what takes a part of the sequence, puts something beside it, or reads a window of it; None for the rest."""
    attrs: Any = node.attrs
    if isinstance(attrs, Concat.Attrs):
        return _joined(node, attrs.axis, given)
    x = given[0]
    if not x.along or any(y.along for y in given[1:]):
        return None
    for axis in x.axes:
        if isinstance(attrs, Slice.Attrs):
            size, lo, hi = node.inputs[0].shape[axis], attrs.starts[axis], attrs.stops[axis]
            if (lo, attrs.steps[axis]) == (0, 1) and str(hi) == str(size):
                continue
            end = beyond(hi, symbol)
            if attrs.steps[axis] != 1 or not isinstance(lo, int) or end is None:
                return None
            return _cut(node, x, axis, lo, end)
        if isinstance(attrs, Pad.Attrs):
            low, high = attrs.low[axis], attrs.high[axis]
            if (low, high) != (0, 0):
                if not isinstance(low, int) or not isinstance(high, int) or low < 0 or high < 0:
                    return None
                return _beside(node, x, axis, low, high)
        reach = _window(node, axis)
        if reach is not None and x.kind == "token":
            low, after, stride = reach
            extra = beyond(node.output.shape[axis], symbol)
            if stride != 1 or extra is None or not isinstance(low, int) or not isinstance(after, int) or low < 0:
                return None
            return _longer(node, x, axis, extra, x.valid - after)
    return None


_DOES = {"conv": "is a convolution over", "pool": "works on windows of", "slice": "takes a part of", "pad": "pads"}


def _window(node: Node, axis: int) -> tuple[Any, Any, Any] | None:
    """How far the windows of the first operand, along ``axis``, reach back and ahead, and by how much they move."""
    if node.op.kind in ("view", "elementwise"):
        return None
    factors = node.axes.operands[0][axis]
    return factors[0].window if len(factors) == 1 and factors[0].role == "window" else None


def _longer(node: Node, x: Label, axis: int, extra: int, valid: int) -> Label:
    valid = min(valid, extra)
    does = _DOES.get(node.op.name, "adds to")
    if x.kind != "token" or (x.valid < 0 and node.op.kind != "view"):
        raise LooksAhead(f"it {does} a part of the sequence")
    if valid < 0 and valid < extra:
        raise LooksAhead(f"it {does} the sequence: element i of its result depends on token i + {-valid}")
    reason = f"it {does} the sequence" if extra else ""
    return Label("token", axis, mixes=True, culprit=node, reason=reason, extra=extra, valid=valid)


def _cut(node: Node, x: Label, axis: int, lo: int, end: int) -> Label | None:
    """Elements ``lo`` to the number of tokens + ``end``."""
    if not x.relates:
        if x.kind != "token":
            return None
        if (behind := x.valid - lo) < min(0, x.valid):
            raise LooksAhead(f"it takes a part of the sequence: element i of its result depends on token i + {-behind}")
        return _longer(node, x, axis, end - lo, behind)
    front, back = x.front - lo, end - x.front
    if axis != x.wide or front < 0 or back < 0:
        return None
    return replace(x, front=front, back=back, wide=axis if front or back else -1, culprit=node)


def _beside(node: Node, x: Label, axis: int, low: int, high: int) -> Label | None:
    """``low`` elements in front, and ``high`` behind."""
    if not x.relates:
        return _longer(node, x, axis, x.extra + low + high, x.valid + low) if x.kind == "token" else None
    if x.wide not in (-1, axis) or x.later(axis) is None or x.kind != "scores":
        return None
    return replace(x, front=x.front + low, back=x.back + high, wide=axis, culprit=node)


def _joined(node: Node, axis: int, given: Sequence[Label]) -> Label | None:
    """Of values joined end to end along the sequence: one that runs along it, and others of known sizes."""
    at = [i for i, x in enumerate(given) if axis in x.axes]
    if len(at) != 1:
        return None
    sizes = [v.shape[axis] for i, v in enumerate(node.inputs) if i != at[0]]
    if not all(isinstance(d, int) for d in sizes):
        return None
    ints = [d for d in sizes if isinstance(d, int)]
    low, high = sum(ints[: at[0]]), sum(ints[at[0] :])
    x = given[at[0]]
    others = [y for i, y in enumerate(given) if i != at[0]]
    if not x.relates:
        return _beside(node, x, axis, low, high) if all(y.kind == "fixed" for y in others) else None
    query = x.axis + x.other - axis
    return _beside(node, x, axis, low, high) if all(y.axes in ((), (query,)) and not y.extra for y in others) else None
