"""Selection of the kernel for linear attention: over which state, and whether that is written in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from wasat.ir import Node
from wasat.ir.ops.linear_attention import LinearAttentionAttrs, decay_and_beta

from ..selection import Refused, need_sizes, state_behind
from .kernels.linear_attention import LinearAttention, linear_attention

if TYPE_CHECKING:
    from .select import Selection

MOST = 1024
"""Features of a key: more of a column than that is too much for the registers of its threads."""


def select_linear_attention(s: Selection, node: Node) -> None:
    """With heads and features of known sizes."""
    (q, k, v, state, *more), a = node.inputs, LinearAttentionAttrs.of(node)
    dtype, stored = s.float_of(q, k, v), s.float_of(state)
    need_sizes(q.shape[2], *state.shape[1:])
    heads, kv_heads, key_dim, value_dim = cast(tuple[int, ...], (q.shape[2], *state.shape[1:]))
    if key_dim > MOST or heads // kv_heads > 8:
        raise Refused(f"{heads // kv_heads} heads with a state of keys of {key_dim} features are too much for a workgroup")
    decay, beta = decay_and_beta(a, more)
    kind: Literal["no", "head", "feature"] = "no" if decay is None else "feature" if decay.tensor.rank == 4 else "head"
    past, held = state_behind(state)
    in_place = s.given_up(held, state)
    if not in_place:  # WebGPU has eight arrays for a kernel
        past, held = None, state
    desc = LinearAttention(
        s.limits, heads, kv_heads, key_dim, value_dim, kind, a.delta, a.scale, a.log, a.before, past is not None, in_place,
        dtype, "float32" if decay is None else s.float_of(decay), "float32" if beta is None else s.float_of(beta), stored,
    )  # fmt: skip
    operands = [q, k, v, *more, *([past] if past is not None else []), held]
    s.replace_recurrent(node, desc, linear_attention, operands, in_place)
