"""onnxruntime's own operators of transformers, as language models are published with them.

Source: ContribOperators.md of onnxruntime 1.32, and what it computes where that says nothing. A past that the model takes as an
input is none here (see pasts.py): the forward pass of all tokens is what caches are derived from.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from wasat.ir import DimLike, DType, equal
from wasat.ir.dims import floordiv

from ..emit import Emitter, Operand
from ..registry import NodeView, op
from .quantized import MICROSOFT


# -- normalizations and activations ----------------------------------------------------------------------------------------
def _layer_norm(c: Emitter, x: Operand, weight: Operand, bias: Operand | None, eps: float) -> Any:
    return c.layer_norm(x, weight, *(() if bias is None else (bias,)), eps=eps)


@op("SimplifiedLayerNormalization", attributes="axis epsilon stash_type")
@op("SimplifiedLayerNormalization", domain=MICROSOFT, attributes="axis epsilon stash_type")
def simplified_layer_norm(c: Emitter, n: NodeView, x: Operand, weight: Operand) -> Any:
    if n.get("axis", -1) % c.rank(x) != c.rank(x) - 1 or n.wants(1):
        raise n.fail("a norm over other axes than the last one, or its statistics, are not supported")
    return c.rms_norm(x, c.to(weight, c.dtype(x)), eps=n.get("epsilon", 1e-5))


def _skipped(c: Emitter, n: NodeView, x: Operand, skip: Operand, bias: Operand | None) -> Any:
    """x + skip + bias, where a skip of fewer rows stands for all."""
    if n.wants(1) or n.wants(2):
        raise n.fail("its statistics are not supported")
    total = c.add(x, skip)
    return total if bias is None else c.add(total, bias)


@op("SkipSimplifiedLayerNormalization", domain=MICROSOFT, attributes="epsilon")
def skip_simplified_layer_norm(
    c: Emitter, n: NodeView, x: Operand, skip: Operand, weight: Operand, bias: Operand | None = None
) -> Any:
    total = _skipped(c, n, x, skip, bias)
    return c.rms_norm(total, weight, eps=n.get("epsilon", 1e-12)), None, None, total


@op("SkipLayerNormalization", domain=MICROSOFT, attributes="epsilon")
def skip_layer_norm(
    c: Emitter, n: NodeView, x: Operand, skip: Operand, weight: Operand, beta: Operand | None = None,
    bias: Operand | None = None,
) -> Any:  # fmt: skip
    total = _skipped(c, n, x, skip, bias)
    return _layer_norm(c, total, weight, beta, n.get("epsilon", 1e-12)), None, None, total


@op("EmbedLayerNormalization", domain=MICROSOFT, attributes="epsilon mask_index_type")
def embed_layer_norm(
    c: Emitter, n: NodeView, ids: Operand, segments: Operand | None, words: Operand, places: Operand,
    kinds: Operand | None, weight: Operand, beta: Operand, mask: Operand | None = None, positions: Operand | None = None,
) -> Any:  # fmt: skip
    """Its mask index is how many tokens of each row are real."""
    b, s = c.shape(ids)
    x = c.gather(words, ids, axis=0)
    x = c.add(x, c.gather(places, c.iota(size=s) if positions is None else positions, axis=0))
    if segments is not None and kinds is not None:
        x = c.add(x, c.gather(kinds, segments, axis=0))
    index = c.full((b,), 0, DType.I32) if mask is None else c.reduce_sum(c.to(mask, DType.I32), axes=(1,))
    return _layer_norm(c, x, weight, beta, n.get("epsilon", 1e-12)), index, x


@op("Gelu", domain=MICROSOFT, attributes="")
def gelu(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.gelu(x)


@op("BiasGelu", domain=MICROSOFT, attributes="")
def bias_gelu(c: Emitter, n: NodeView, x: Operand, bias: Operand) -> Any:
    return c.gelu(c.add(x, bias))


@op("FastGelu", domain=MICROSOFT, attributes="")
def fast_gelu(c: Emitter, n: NodeView, x: Operand, bias: Operand | None = None) -> Any:
    return c.gelu(x if bias is None else c.add(x, bias), approximate="tanh")


@op("QuickGelu", domain=MICROSOFT, attributes="alpha")
def quick_gelu(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.mul(x, c.sigmoid(c.mul(x, n.get("alpha", 1.702))))


@op("FusedMatMul", domain=MICROSOFT, attributes="alpha transA transB transBatchA transBatchB")
def fused_matmul(c: Emitter, n: NodeView, x: Operand, y: Operand) -> Any:
    def turned(v: Operand, last: str, batch: str) -> Any:
        rank = c.rank(v)
        if rank < 2:
            return v
        perm = [*range(1, rank - 1), 0, rank - 1] if n.get(batch, 0) else list(range(rank))
        return c.permute(v, [*perm[:-2], perm[-1], perm[-2]] if n.get(last, 0) else perm)

    if min(c.rank(x), c.rank(y)) < 2:
        raise n.fail("products of vectors are not supported")
    out = c.matmul(turned(x, "transA", "transBatchA"), turned(y, "transB", "transBatchB"))
    alpha = n.get("alpha", 1.0)
    return out if alpha == 1 else c.mul(out, alpha)


# -- positions -------------------------------------------------------------------------------------------------------------
def _turned(
    c: Emitter, x: Operand, positions: Operand, cos: Operand, sin: Operand, interleaved: bool
) -> Any:
    """x [b, s, h, d] by angles at positions [b, s] or [s]; features behind those of the tables stay."""
    half, depth = c.static(cos, 1, "a rotation"), c.static(x, 3, "a rotation")
    width = 2 * half
    cos, sin = (c.add_axes(c.gather(t, positions, axis=0), -2) for t in (cos, sin))
    own, rest = c.cut(x, 3, 0, width), c.cut(x, 3, width, depth)
    if interleaved:
        first, second = c.cut(own, 3, 0, width, 2), c.cut(own, 3, 1, width, 2)
    else:
        first, second = c.cut(own, 3, 0, half), c.cut(own, 3, half, width)
    real, imag = c.sub(c.mul(first, cos), c.mul(second, sin)), c.add(c.mul(first, sin), c.mul(second, cos))
    if interleaved:
        out = c.view(c.concat(c.add_axes(real, -1), c.add_axes(imag, -1), axis=4), *c.shape(own))
    else:
        out = c.concat(real, imag, axis=3)
    return out if width == depth else c.concat(out, rest, axis=3)


@op("RotaryEmbedding", domain=MICROSOFT, attributes="interleaved is_packed_batching num_heads rotary_embedding_dim scale")
def rotary(c: Emitter, n: NodeView, x: Operand, positions: Operand, cos: Operand, sin: Operand) -> Any:
    """x [b, s, h*d] or [b, h, s, d]; positions [b, s], or that of the first token [1]."""
    if n.get("is_packed_batching", 0) or n.get("scale", 1.0) != 1.0:
        raise n.fail("packed batches and a scale are not supported")
    shape, flat = c.shape(x), c.rank(x) == 3
    width, turned = n.get("rotary_embedding_dim", 0), 2 * c.static(cos, 1, "a rotation")
    if flat:
        heads: DimLike = n.get("num_heads", 0)
        if not heads:
            if width:
                raise n.fail("num_heads is needed where a part of each head is turned")
            heads = floordiv(shape[2], turned)
        x = c.view(x, shape[0], shape[1], heads, floordiv(shape[2], heads))
    else:
        x = c.permute(x, (0, 2, 1, 3))
    if turned != (width or c.static(x, 3, "a rotation")):
        raise n.fail(f"its tables turn {turned} features, and a head has {width or c.shape(x)[3]} to turn")
    if c.rank(positions) == 1:
        positions = c.add(positions, c.iota(size=c.shape(x)[1]))
    y = _turned(c, x, positions, cos, sin, bool(n.get("interleaved", 0)))
    return c.view(y, *shape) if flat else c.permute(y, (0, 2, 1, 3))


# -- attention -------------------------------------------------------------------------------------------------------------
def _heads(c: Emitter, x: Operand, heads: int) -> Any:
    b, s, width = c.shape(x)
    return c.view(x, b, s, heads, floordiv(width, heads))


def _present(c: Emitter, n: NodeView, *made: Operand) -> list[Any]:
    """Keys and values as [b, heads, s, d], where they are asked for."""
    return [c.permute(x, (0, 2, 1, 3)) if n.wants(i) else None for i, x in enumerate(made, 1)]


def _no_past(n: NodeView, *pasts: Operand | None) -> None:
    if any(p is not None for p in pasts):
        raise n.fail("a past that is not an input of the model alone is not supported")


def _padding(c: Emitter, n: NodeView, mask: Operand, keys: Operand) -> Any:
    """What is added to scores [b, h, s, t]: mask [b, t] or [b, s, t] of ones where a key is real, or how many are, [b]."""
    rank, t = c.rank(mask), c.shape(keys)[1]
    if rank == 1:
        if str(c.shape(mask)[0]) != str(c.shape(keys)[0]):
            raise n.fail(f"a mask of shape {list(c.shape(mask))} (where each row begins) is not supported")
        mask = c.less(c.iota(size=t), c.view(c.to(mask, DType.I64), c.shape(mask)[0], 1))
    elif rank > 3:
        raise n.fail(f"a mask of {rank} axes is not supported")
    keep = c.greater(mask, 0) if c.dtype(mask) is not DType.BOOL else mask
    keep = c.add_axes(keep, 1, 2) if c.rank(keep) == 2 else c.add_axes(keep, 1)
    return c.to(c.select(keep, 0.0, n.get("mask_filter_value", -10000.0)), c.dtype(keys))


def _both(c: Emitter, first: Operand | None, second: Operand | None) -> tuple[Any, ...]:
    if first is None or second is None:
        return () if first is second else (second if first is None else first,)
    return (c.add(first, second),)


def _attended(c: Emitter, n: NodeView, q: Any, k: Any, v: Any, more: tuple[Any, ...], **attrs: Any) -> Any:
    scale = n.get("scale", 0.0) or 1 / math.sqrt(c.static(q, 3, "attention without a scale"))
    y = c.attention(q, k, v, *more, scale=scale, **attrs)
    b, s, h, d = c.shape(y)
    return c.view(y, b, s, h * d)


@op(
    "GroupQueryAttention", domain=MICROSOFT,
    attributes="causal do_rotary k_quant_type kv_cache_bit_width kv_num_heads local_window_size num_heads qk_output "
    "rotary_interleaved scale smooth_softmax softcap v_quant_type",
)  # fmt: skip
def group_query_attention(
    c: Emitter, n: NodeView, q: Operand, k: Operand | None, v: Operand | None, past_k: Operand | None = None,
    past_v: Operand | None = None, lengths: Operand | None = None, total: Operand | None = None, cos: Operand | None = None,
    sin: Operand | None = None, positions: Operand | None = None, bias: Operand | None = None, sink: Operand | None = None,
    *scales: Operand | None,
) -> Any:  # fmt: skip
    """Causal over keys of fewer heads. ``lengths``, of rows padded at the end, changes nothing of what stands before that."""
    _no_past(n, past_k, past_v)
    if any(x is not None for x in scales) or n.get("qk_output", 0):
        raise n.fail("quantized caches, and scores as an output, are not supported")
    heads, groups = n["num_heads"], n["kv_num_heads"]
    if k is None or v is None:
        b, s, width = c.shape(q)
        x = c.view(q, b, s, heads + 2 * groups, floordiv(width, heads + 2 * groups))
        ends = (0, heads, heads + groups, heads + 2 * groups)
        q, k, v = (c.cut(x, 2, lo, hi) for lo, hi in pairwise(ends))
    else:
        q, k, v = _heads(c, q, heads), _heads(c, k, groups), _heads(c, v, groups)
    if n.get("do_rotary", 0):
        if cos is None or sin is None:
            raise n.fail("do_rotary without tables")
        at = c.iota(size=c.shape(q)[1]) if positions is None else positions
        q, k = (_turned(c, x, at, cos, sin, bool(n.get("rotary_interleaved", 0))) for x in (q, k))
    window, causal = n.get("local_window_size", -1), n.get("causal", 1) != 0
    if window == 0 or (window > 0 and not causal):
        raise n.fail("a window of no keys, or one of keys after a query too, is not supported")
    if sink is None and n.get("smooth_softmax", -1) == 1:
        sink = c.full((heads,), 0.0, c.dtype(q))
    more = (() if bias is None else (bias,)) + (() if sink is None else (c.view(sink, heads),))
    y = _attended(
        c, n, q, k, v, more, causal=causal, window=window if window > 0 else None, softcap=n.get("softcap", 0.0) or None,
        sink=sink is not None,
    )  # fmt: skip
    return (y, *_present(c, n, k, v))


@op("MultiHeadAttention", domain=MICROSOFT, attributes="mask_filter_value num_heads scale unidirectional")
def multi_head_attention(
    c: Emitter, n: NodeView, q: Operand, k: Operand | None = None, v: Operand | None = None, bias: Operand | None = None,
    mask: Operand | None = None, added: Operand | None = None, past_k: Operand | None = None, past_v: Operand | None = None,
    *others: Operand | None,
) -> Any:  # fmt: skip
    """Queries [b, s, h*d]; keys and values alike, made before ([b, h, t, d]), or packed [b, s, h, 3, d], [b, t, h, 2, d]."""
    _no_past(n, past_k, past_v, *others)
    heads, made = n["num_heads"], False
    if c.rank(q) == 5:
        q, k, v = (c.drop_axes(c.cut(q, 3, i, i + 1), 3) for i in range(3))
    else:
        q = _heads(c, q, heads)
        if k is None:
            raise n.fail("it has no keys")
        if c.rank(k) == 5:
            k, v = (c.drop_axes(c.cut(k, 3, i, i + 1), 3) for i in range(2))
        elif v is None:
            raise n.fail("it has no values")
        else:
            made = c.rank(k) == 4
            k, v = (c.permute(x, (0, 2, 1, 3)) if c.rank(x) == 4 else _heads(c, x, heads) for x in (k, v))
    causal = bool(n.get("unidirectional", 0))
    if causal and equal(c.shape(q)[1], c.shape(k)[1]) is not True:
        raise n.fail(f"unidirectional with {c.shape(q)[1]} queries and {c.shape(k)[1]} keys is not supported")
    if bias is not None:
        at: DimLike = 0
        parts: list[Any] = []
        for x in (q, k, v):
            width = c.shape(x)[2] * c.shape(x)[3]
            biased = c.add(x, c.view(c.cut(bias, 0, at, at + width), *c.shape(x)[2:]))
            parts.append(x if made and parts else biased)  # of keys and values made before, theirs is in them
            at = at + width
        q, k, v = parts
    more = _both(c, None if mask is None else _padding(c, n, mask, k), added)
    y = _attended(c, n, q, k, v, more, causal=causal)
    return (y, *_present(c, n, k, v))


@op(
    "Attention", domain=MICROSOFT,
    attributes="do_rotary mask_filter_value num_heads past_present_share_buffer qkv_hidden_sizes rotary_embedding_dim scale "
    "unidirectional",
)  # fmt: skip
def attention(
    c: Emitter, n: NodeView, x: Operand, weights: Operand, bias: Operand | None = None, mask: Operand | None = None,
    past: Operand | None = None, added: Operand | None = None, *others: Operand | None,
) -> Any:  # fmt: skip
    """One product makes queries, keys and values of x [b, s, n]."""
    _no_past(n, past, *others)
    if n.get("do_rotary", 0) or n.wants(1):
        raise n.fail("do_rotary, and its present without a past that is an input of the model, are not supported")
    heads, sizes = n["num_heads"], n.get("qkv_hidden_sizes")
    sizes = sizes or [floordiv(c.shape(weights)[1], 3)] * 3
    y = c.matmul(x, weights)
    y = y if bias is None else c.add(y, bias)
    ends = (0, sizes[0], sizes[0] + sizes[1], sizes[0] + sizes[1] + sizes[2])
    q, k, v = (_heads(c, c.cut(y, 2, lo, hi), heads) for lo, hi in pairwise(ends))
    more = _both(c, None if mask is None else _padding(c, n, mask, k), added)
    return _attended(c, n, q, k, v, more, causal=bool(n.get("unidirectional", 0))), None
