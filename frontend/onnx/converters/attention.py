"""The operators Attention (operator set 23) and LinearAttention (27) as the IR's."""

from __future__ import annotations

import math
from typing import Any

from wasat.ir import DType, equal
from wasat.ir.dims import floordiv

from ..emit import Emitter, Operand
from ..registry import Inline, NodeView, op


@op("Attention")
def attention(
    c: Emitter, n: NodeView, q: Operand, k: Operand, v: Operand, mask: Operand | None = None, past_k: Operand | None = None,
    past_v: Operand | None = None, valid: Operand | None = None,
) -> Any:  # fmt: skip
    """q, k, v [b, heads, s, d] or [b, s, heads*d]. What the IR's attention has no place for is left to the function body."""
    dtype = c.dtype(q)
    precision = n.dtype("softmax_precision") if n.get("softmax_precision") else DType.F32
    plain = valid is None and not n.wants(3) and precision is DType.F32 and c.dtype(v) is dtype is c.dtype(k)
    if not plain or dtype is DType.F64:
        raise Inline
    flat = c.rank(q) == 3
    b = c.shape(q)[0]

    def by_position(x: Operand, heads: int) -> Any:
        if not flat:
            return c.permute(x, (0, 2, 1, 3))
        return c.view(x, b, c.shape(x)[1], heads, floordiv(c.shape(x)[2], heads))

    q = by_position(q, n.get("q_num_heads", 0))
    k, v = (by_position(x, n.get("kv_num_heads", 0)) for x in (k, v))
    present: list[Any] = [None, None]
    if past_k is not None and past_v is not None:
        k, v = (c.concat(c.permute(old, (0, 2, 1, 3)), new, axis=1) for old, new in ((past_k, k), (past_v, v)))
    if n.wants(1) or n.wants(2):
        present = [c.permute(x, (0, 2, 1, 3)) for x in (k, v)]
    s, t = c.shape(q)[1], c.shape(k)[1]
    offset = 0 if past_k is None else c.shape(past_k)[2]
    if mask is not None and equal(c.shape(mask)[-1], t) is False:
        raise Inline  # a mask over fewer keys
    left, right = n.get("left_window_size", -1), n.get("right_window_size", -1)
    causal, window = bool(n["is_causal"]) or right == 0, left + 1 if left >= 0 else None
    if right > 0 or ((causal or window) and equal(s + offset, t) is not True):  # not the last positions: spelled as a mask
        behind = c.sub(c.add(c.along(c.iota(size=s), 0, 2), c.size_as(offset, DType.I64)), c.along(c.iota(size=t), 1, 2))
        tests = [c.greater_equal(behind, 0 if causal else -right)] if causal or right > 0 else []
        keep = c.fold_left(c.logical_and, [*tests, *([c.less(behind, window)] if window else [])])
        causal, window = False, None
        if mask is None or c.dtype(mask) is DType.BOOL:
            mask = keep if mask is None else c.logical_and(keep, mask)
        else:
            mask = c.select(keep, mask, float("-inf"))
    scale = n["scale"] if "scale" in n.attrs else 1 / math.sqrt(c.static(q, 3, "Attention without a scale"))
    more = () if mask is None else (mask,)
    y = c.attention(q, k, v, *more, scale=scale, causal=causal, window=window, softcap=n["softcap"] or None)
    y = c.view(y, b, s, c.shape(y)[2] * c.shape(y)[3]) if flat else c.permute(y, (0, 2, 1, 3))
    return (y, *present, None)


@op("LinearAttention")
def linear_attention(
    c: Emitter, n: NodeView, q: Operand, k: Operand, v: Operand, state: Operand | None = None, decay: Operand | None = None,
    beta: Operand | None = None,
) -> Any:  # fmt: skip
    """q, k, v [b, s, heads*d], decay [b, s, heads] or [b, s, heads*d], beta [b, s, heads | 1]; the state as the IR's."""
    dtype, heads, groups = c.dtype(q), n["q_num_heads"], n["kv_num_heads"]
    rule = n.get("update_rule", "gated_delta")
    if not isinstance(groups, int) or groups < 1 or heads < 1 or heads % groups:
        raise n.fail(f"q_num_heads {heads} is not a multiple of kv_num_heads {groups}")
    if any(c.rank(x) != 3 for x in (q, k, v, decay, beta) if x is not None):
        raise n.fail("query, key, value, decay and beta have three axes: [batch, position, heads * features]")
    b, s = c.shape(q)[:2]

    def by_head(x: Operand, count: int) -> Any:
        return c.view(x, b, s, count, floordiv(c.shape(x)[2], count))

    q, k, v = by_head(q, heads), by_head(k, groups), by_head(v, groups)
    d, e = c.shape(k)[3], c.shape(v)[3]
    own = dtype if state is None else c.dtype(state)
    if state is None:  # what is computed in f32 starts so
        state = c.full((b, groups, d, e), 0, DType.F64 if dtype is DType.F64 else DType.F32)
    if decay is not None and c.shape(decay)[2] != groups:
        decay = by_head(decay, groups)
    if beta is not None and c.shape(beta)[2] != groups:
        beta = c.broadcast_to(beta, shape=(b, s, groups))
    scale = n.get("scale", 0.0) or 1 / math.sqrt(c.static(k, 3, "LinearAttention without a scale"))
    more = [x for x in (decay, beta) if x is not None]
    y, last = c.linear_attention(q, k, v, state, *more, rule=rule, scale=scale)
    return c.view(y, b, s, heads * e), c.to(last, own)
