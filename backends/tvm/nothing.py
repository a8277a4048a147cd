"""Results of which it is known that they have no elements: nothing is computed for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm import te, tirx
from wasat.ir import Builder, Dim, DimLike, Graph, TensorType

if TYPE_CHECKING:
    from .lower import Context


def made(ctx: Context, x: Any, shape: Sequence[DimLike], dtype: str | None = None) -> Any:
    """A result of ``shape``, in which there is a 0, of the operand ``x``, whose type is the default: what has no operand is
    folded to a constant, which TVM writes but cannot read back, and a reshape to 0 keeps the size for Relax."""
    zero = tirx.const(0, dtype or x.ty.dtype)
    return ctx.te(lambda _: te.compute(ctx.dims(shape), lambda *i: zero, name="nothing"), x, name="nothing")


def unread(x: te.Tensor) -> te.Tensor:
    """x; without what it reads if it is known to have no elements: TVM would take a loop over nothing for a view of the
    operand, whatever that one's sizes are."""
    if not any(isinstance(d, tirx.IntImm) and d.value == 0 for d in x.shape):
        return x
    return te.compute(x.shape, lambda *_: tirx.const(0, x.dtype), name="nothing")


def spare(g: Graph) -> None:
    """Composite and ordering operations whose results have no elements become slices of an operand: what they are made of
    divides by sizes, and TVM refuses to divide by a constant 0."""
    for node in g.nodes:
        dense = [v for v in node.inputs if isinstance(v.type, TensorType) and v.shape]
        if not ((node.op.is_composite or node.op.kind == "ordered") and dense and all(0 in v.shape for v in node.outputs)):
            continue
        b, x = Builder(g, before=node, loc=node.loc), dense[0]
        for v in node.outputs:
            if any(isinstance(d, Dim) for d in v.shape):  # no constant, as it depends on sizes
                y = b.broadcast_to(b.constant(0, v.tensor.dtype), shape=v.shape)
            else:
                none = b.slice(x, starts=(0,) * len(x.shape), stops=(0,) * len(x.shape))
                y = none if v.tensor.dtype is x.tensor.dtype else b.cast(none, dtype=v.tensor.dtype)
                y = b.reshape(y, shape=v.shape)
            g.replace_uses(v, y)
        g.erase(node)
