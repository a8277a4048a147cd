"""Attention as the formula, softmax(q kᵀ · scale, masked) v, with masks written as comparisons of positions."""

from __future__ import annotations

import math

from wasat.ir import DType, TypeMismatch

from .einsum import einsum
from .functions import Mask, causal, concat, full, softmax, tanh, where, within
from .layers import Linear, RMSNorm
from .module import Module
from .rope import RoPE, RoPE2D
from .tensor import Tensor, emit, fail


def attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Mask = True, *, scale: float | None = None, softcap: float | None = None,
    bias: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``q[b, s, h, d]``, ``k[b, t, g, d]``, ``v[b, t, g, e]`` -> ``[b, s, h, e]``; query head i reads key head ``i //
    (h/g)``.

    ``keep`` (bool ``[s, t]``, ``[b, s, t]`` or ``[b, h, s, t]``; true: attend); ``scale`` defaults to ``d ** -0.5``;
    ``softcap`` bounds the scores: ``softcap * tanh(scores / softcap)``. ``bias`` (``[h, s, t]``, or what broadcasts to it) is
    added to the scores; ``sinks[h]`` are logits that take weight from the keys, one for each head. The softmax is computed in
    f32.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.rank != 4:
            fail(f"nn.attention: {name} is [b, s, heads, d], not {x.value!r}; x.heads(n) makes heads")
    if isinstance(keep, Tensor) and keep.dtype is not DType.BOOL:
        fail(f"nn.attention: keep is a bool mask (true: attend), not {keep.value!r}; compare it with something first")
    heads, groups = q.shape[2], k.shape[2]
    if scale is None:
        width = q.shape[3]
        scale = width**-0.5 if isinstance(width, int) else fail(f"nn.attention: give scale=, the head size {width} is symbolic")
    if heads == groups:
        scores = einsum("b s h d, b t h d -> b h s t", q, k) * scale
    else:
        scores = einsum("b s (g r) d, b t g d -> b (g r) s t", q, k) * scale
    if softcap is not None:
        scores = tanh(scores / softcap) * softcap
    if isinstance(keep, Tensor) and keep.rank == 3:
        keep = keep[:, None]
    scores = scores.cast(DType.F32)
    scores = where(keep, scores if bias is None else scores + bias, -math.inf)
    if sinks is None:
        probs = softmax(scores, axis=-1).cast(v.dtype)
    else:
        b, h, s, t = scores.shape
        rows = sinks.cast(DType.F32).reshape(1, h, 1, 1).broadcast_to(b, h, s, 1)
        probs = softmax(concat([scores, rows]), axis=-1)[..., :t].cast(v.dtype)
    if heads == groups:
        return einsum("b h s t, b t h e -> b s h e", probs, v)
    return einsum("b (g r) s t, b t g e -> b s (g r) e", probs, v)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor | None = None, beta: Tensor | None = None, state: Tensor | None = None,
    scale: float | None = None, log: bool = True, before: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``q[b, s, h, d]``, ``k[b, s, g, d]``, ``v[b, s, g, e]`` -> ``y[b, s, h, e]`` and the state ``[b, g, d, e]`` after the
    last token, which starts as ``state`` (f32; default: zeros). Query head i reads the state of head ``i // (h/g)``.

    Token after token ``S = exp(decay) * S + k vᵀ``, ``y = scale * Sᵀ q`` (GLA, Mamba2, RetNet); with ``beta``, the delta rule:
    ``S = exp(decay) * S``, then ``S + beta * k (v - Sᵀ k)ᵀ`` (DeltaNet, gated DeltaNet). ``decay`` is ``[b, s, g]``, or
    ``[b, s, g, d]`` for each feature of the keys; not ``log``: the factor itself. ``beta`` is ``[b, s, g]``. ``scale`` defaults
    to ``d ** -0.5``. ``before``: y is read before the token's own decay and write (RWKV-6). The state is computed in f32.

    Raises TypeMismatch at the user's line.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.rank != 4:
            fail(f"nn.linear_attention: {name} is [b, s, heads, d], not {x.value!r}; x.heads(n) makes heads")
    b, _, g, d = k.shape
    if scale is None:
        scale = d**-0.5 if isinstance(d, int) else fail(f"nn.linear_attention: give scale=, the key size {d} is symbolic")
    if state is None:
        state = full((b, g, d, v.shape[3]), 0.0, DType.F64 if q.dtype is DType.F64 else DType.F32)
    rule = {(False, False): "linear", (True, False): "gated", (False, True): "delta", (True, True): "gated_delta"}
    more = [x for x in (decay, beta) if x is not None]
    named = rule[decay is not None, beta is not None]
    y, last = emit("linear_attention", q, k, v, state, *more, rule=named, scale=scale, log=log, before=before)
    return y, last


def _head_sizes(who: str, dim: int, heads: int, kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """Key/value heads (default: as many as query heads) and the size of a head (default: an equal part of ``dim``)."""
    kv_heads = heads if kv_heads is None else kv_heads
    if head_dim is None:
        if dim % heads:
            raise TypeMismatch(f"{who}: dim {dim} does not split into {heads} heads; give head_dim")
        head_dim = dim // heads
    if heads % kv_heads:
        raise TypeMismatch(f"{who}: {heads} query heads are not a multiple of {kv_heads} key/value heads")
    return kv_heads, head_dim


class Attention(Module):
    """Grouped-query self-attention: ``x[b, s, dim]``, positions i64 ``[s]`` or ``[b, s]`` -> ``[b, s, dim]``.

    ``window``: a query sees itself and ``window - 1`` positions before. ``qk_norm``: the eps of RMS norms on queries
    and keys (``norm_offset`` added to their weights). ``bias``: on q, k, v; ``out_bias``: on the output.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *,
        window: int | None = None, softcap: float | None = None, scale: float | None = None,
        qk_norm: float | None = None, norm_offset: float = 0.0,
        bias: bool = False, out_bias: bool = False, rope: RoPE | RoPE2D | None = None, causal: bool = True,
    ) -> None:  # fmt: skip
        kv_heads, head_dim = _head_sizes("Attention", dim, heads, kv_heads, head_dim)
        if window is not None and not causal:
            raise TypeMismatch("Attention: a window looks back from the query, so it needs causal=True")
        self.heads, self.kv_heads = heads, kv_heads
        self.window, self.softcap, self.causal = window, softcap, causal
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q_proj = Linear(dim, heads * head_dim, bias)
        self.k_proj = Linear(dim, kv_heads * head_dim, bias)
        self.v_proj = Linear(dim, kv_heads * head_dim, bias)
        self.o_proj = Linear(heads * head_dim, dim, out_bias)
        self.q_norm = None if qk_norm is None else RMSNorm(head_dim, qk_norm, norm_offset)
        self.k_norm = None if qk_norm is None else RMSNorm(head_dim, qk_norm, norm_offset)
        self.rope = rope

    def __call__(self, x: Tensor, positions: Tensor, keep: Mask = True) -> Tensor:
        q, k = self.q_proj(x).heads(self.heads), self.k_proj(x).heads(self.kv_heads)
        v = self.v_proj(x).heads(self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        if self.causal:
            keep = causal(positions) & within(positions, self.window) & keep
        out = attention(q, k, v, keep, scale=self.scale, softcap=self.softcap)
        return self.o_proj(out.merge())


class CrossAttention(Module):
    """Attention of ``x[b, s, dim]`` over ``context[b, t, context_dim]`` -> ``[b, s, dim]``; no positions, no causality.

    ``keep`` (bool ``[s, t]`` or ``[b, s, t]``) hides parts of the context, e.g. its padding.
    """

    def __init__(
        self, dim: int, heads: int, context_dim: int | None = None, kv_heads: int | None = None,
        head_dim: int | None = None, *, scale: float | None = None, bias: bool = False, out_bias: bool = False,
    ) -> None:  # fmt: skip
        context_dim = dim if context_dim is None else context_dim
        kv_heads, head_dim = _head_sizes("CrossAttention", dim, heads, kv_heads, head_dim)
        self.heads, self.kv_heads = heads, kv_heads
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q_proj = Linear(dim, heads * head_dim, bias)
        self.k_proj = Linear(context_dim, kv_heads * head_dim, bias)
        self.v_proj = Linear(context_dim, kv_heads * head_dim, bias)
        self.o_proj = Linear(heads * head_dim, dim, out_bias)

    def __call__(self, x: Tensor, context: Tensor, keep: Mask = True) -> Tensor:
        q = self.q_proj(x).heads(self.heads)
        k, v = self.k_proj(context).heads(self.kv_heads), self.v_proj(context).heads(self.kv_heads)
        return self.o_proj(attention(q, k, v, keep, scale=self.scale).merge())
