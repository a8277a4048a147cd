"""Selection of the kernel for convolutions, with the bias that is added to one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from wasat.ir import Node, Value

from ..lower import Result
from ..selection import need_sizes
from .kernels.convolution import Conv, convolution

if TYPE_CHECKING:
    from .select import Selection


def select_conv(s: Selection, node: Node) -> None:
    """Of any spatial sizes; those of the weight, and the padding in front, are known."""
    (x, w), a = node.inputs, cast(Any, node.attrs)
    dtype = s.float_of(x, w)
    need_sizes(*w.shape, *a.low)
    rows, channels, *taps = cast(tuple[int, ...], w.shape)
    total, bias = _bias(s, node)
    wide = w.made_by("cast")
    if wide is not None and s.reads(wide.inputs[0].tensor.dtype):
        w = wide.inputs[0]
    padded = tuple(not isinstance(h, int) or h > 0 or n > 0 for n, h in zip(a.low, a.high))
    desc = Conv(
        s.limits, rows // a.groups, channels, tuple(taps), a.strides, a.low, a.dilation, a.input_dilation, padded, a.groups,
        bias is not None, dtype, s.float_of(w),
    )  # fmt: skip
    at, operands = (node, [x, w]) if total is None or bias is None else (total, [x, w, bias])
    [y] = s.call(at, desc, convolution, operands, [Result(node.output.tensor)], {2: (rows,)} if bias is not None else {})
    s.graph.replace_uses(at.output, y)


def _bias(s: Selection, node: Node) -> tuple[Node | None, Value | None]:
    """The sum that alone reads a convolution, and what it adds to each of its channels."""
    y = node.output
    if len(y.uses) != 1 or s.graph.is_output(y):
        return None, None
    [total] = y.users
    if total.op.name != "add" or total.output.type != y.type:
        return None, None
    bias = total.inputs[1] if total.inputs[0] is y else total.inputs[0]
    shape = (y.shape[1], *(1,) * (y.tensor.rank - 2))
    if bias is y or tuple(bias.shape) not in (shape, (1, *shape)) or bias.tensor.dtype is not y.tensor.dtype:
        return None, None
    return total, bias
