"""Selection of the kernel for linear attention: over which state, and whether that is written in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from wasat.ir import Node, equal
from wasat.ir.ops.linear_attention import LinearAttentionAttrs, decay_and_beta

from ..selection import need_f32, need_sizes, state_behind
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
    past, held = state_behind(state)
    in_place = selection.given_up(held, state)
    desc = LinearAttention(
        selection.isa, heads, kv_heads, key_dim, value_dim, kind, a.delta, a.scale, a.log, a.before,
        equal(q.shape[1], 1) is True, past is not None, in_place, selection.threads,
    )  # fmt: skip
    operands = [q, k, v, *more, *([past] if past is not None else []), held]
    selection.replace_recurrent(node, desc, linear_attention, operands, in_place)
