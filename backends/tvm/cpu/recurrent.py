"""Selection of the kernel for linear attention: over which state, and whether that is written in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from wasat.ir import DType, Node, Value, equal
from wasat.ir.ops.linear_attention import LinearAttentionAttrs, decay_and_beta

from ..lower import Result
from ..selection import need_f32, need_sizes
from .kernels.linear_attention import LinearAttention, linear_attention
from .panels import ints

if TYPE_CHECKING:
    from .select import Selection


def select_linear_attention(selection: Selection, node: Node) -> None:
    """In f32, with heads and features of known sizes."""
    (q, k, v, state, *more), a = node.inputs, LinearAttentionAttrs.of(node)
    need_f32(*node.inputs)
    need_sizes(q.shape[2], *state.shape[1:])
    heads, kv_heads, key_dim, value_dim = ints((q.shape[2], *state.shape[1:]))
    decay, _ = decay_and_beta(a, more)
    kind: Literal["no", "head", "feature"] = "no" if decay is None else "feature" if len(decay.shape) == 4 else "head"
    past, held = _begins(state)
    own = selection.states.get(held.name) if held.node is None and held.param is None else None
    kept = own is not None and own.donated and len(held.uses) == 1 and len(state.uses) == 1
    in_place = kept and not selection.graph.is_output(held)
    desc = LinearAttention(
        selection.isa, heads, kv_heads, key_dim, value_dim, kind, a.delta, a.scale, a.log, a.before,
        equal(q.shape[1], 1) is True, past is not None, in_place, selection.threads,
    )  # fmt: skip
    operands = [q, k, v, *more, *([past] if past is not None else []), held]
    y, after = node.outputs
    results = [Result(after.tensor, alias=len(operands) - 1), Result(y.tensor)]
    if not in_place:
        results = [Result(y.tensor), Result(after.tensor)]
    made = selection.call(node, desc, linear_attention, operands, results)
    for old, new in zip(node.outputs, made[::-1] if in_place else made):
        selection.graph.replace_uses(old, new)


def _begins(state: Value) -> tuple[Value | None, Value]:
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
