"""Attention, and attention over a cache. Heads are the third axis: [batch, position, head, feature]."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .. import op as _op
from ..axes import Axes, AxisRule, Factor, aligned
from ..checks import require_at_most, require_equal
from ..dims import DimLike, equal
from ..errors import TypeMismatch
from ..op import Bounds, ErrorSample, Op, Sample, broadcast_shapes, register, same_dtype, tensor
from ..types import DType, TensorType
from .cache import check_cache, rank4, room, write_cache
from .elementwise import wave, wide

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Value


T = TypeVar("T")


def _check_qkv(q: TensorType, k: TensorType, v: TensorType) -> None:
    for t, what in ((q, "q"), (k, "k"), (v, "v")):
        rank4(t, what)
    same_dtype(q, k, v)
    for t, what in ((k, "k"), (v, "v")):
        require_equal(q.shape[0], t.shape[0], f"batch of q and {what}")
    require_equal(k.shape[1], v.shape[1], "positions of k and v")
    require_equal(k.shape[2], v.shape[2], "heads of k and v")
    require_equal(q.shape[3], k.shape[3], "features of q and k")
    if k.shape[2] == 0 or equal(q.shape[2] % k.shape[2], 0) is not True:
        raise TypeMismatch(f"{q.shape[2]} query heads do not divide among {k.shape[2]} key heads")


def _check_mask(mask: TensorType, q: TensorType, k: TensorType) -> None:
    if tensor(mask).dtype not in (DType.BOOL, q.dtype):
        raise TypeMismatch(f"the mask must be bool or {q.dtype}, not {mask}")
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask.rank > 4 or broadcast_shapes(full, mask.shape) != full:
        raise TypeMismatch(f"the mask {mask} does not broadcast to [b, h, s, t] = {list(full)}")


def _check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise TypeMismatch(f"window={window}: a window holds at least the position itself")


def _grouped(q: np.ndarray, k: np.ndarray, scale: float, softcap: float | None) -> np.ndarray:
    """Scores [b, g, h/g, s, t] in f32 or wider."""
    b, s, h, d = q.shape
    g = k.shape[2]
    qg = wide(q).reshape(b, s, g, h // g, d).transpose(0, 2, 3, 1, 4)
    x = (qg @ wide(k).transpose(0, 2, 3, 1)[:, :, None]) * np.asarray(scale, qg.dtype)
    if softcap is not None:
        x = np.tanh(x / np.asarray(softcap, x.dtype)) * np.asarray(softcap, x.dtype)
    return x


def _masked(x: np.ndarray, keep: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Scores [b, g, h/g, s, t] and what is kept of them, under a mask [b, h, s, t]."""
    if mask is None:
        return x, keep
    b, g, r, s, t = x.shape
    full = np.broadcast_to(mask, (b, g * r, s, t)).reshape(x.shape)
    return (x, keep & full) if mask.dtype == np.bool_ else (x + wide(full), keep)


def _weighted(x: np.ndarray, v: np.ndarray, sink: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Softmax of scores over keys and the sink (0 for a row of only -inf), times v: [b, s, h, e]."""
    top = x.max(-1, keepdims=True, initial=-np.inf)
    if sink is not None:
        sink = sink.astype(x.dtype).reshape(*x.shape[1:3], 1, 1)
        top = np.maximum(top, sink)
    top = np.where(np.isfinite(top), top, np.zeros((), x.dtype))
    e = np.exp(x - top)
    total = e.sum(-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink - top)
    out = (e / np.where(total > 0, total, np.ones((), x.dtype))) @ wide(v).transpose(0, 2, 1, 3)[:, :, None]
    b, g, r, s, d = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(b, s, g * r, d).astype(dtype)


def _keep(query: np.ndarray, key: np.ndarray, causal: bool, window: int | None) -> np.ndarray:
    keep = np.ones(np.broadcast_shapes(query.shape, key.shape), bool)
    if causal:
        keep &= key <= query
    if window is not None:
        keep &= query - key < window
    return keep


@dataclass(frozen=True)
class AttentionAttrs(_op.Attrs):
    """``scale`` multiplies q·k; ``softcap`` c then maps x to c*tanh(x/c); ``causal`` and ``window`` choose what is seen.

    ``sink``: the last operand is a logit of each head that takes part in the softmax, and whose weight is dropped.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    sink: bool = False


def mask_and_sink(attrs: AttentionAttrs | CachedAttrs, more: Sequence[T]) -> tuple[T | None, T | None]:
    """The operands that not every attention has."""
    if len(more) < attrs.sink or len(more) > 1 + attrs.sink:
        raise TypeMismatch(f"{len(more)} operands where a mask{' may, and a sink has to,' if attrs.sink else ' may'} stand")
    mask = more[0] if len(more) > attrs.sink else None
    return mask, more[-1] if attrs.sink else None


def _check_more(attrs: AttentionAttrs | CachedAttrs, more: Sequence[TensorType], q: TensorType, k: TensorType) -> None:
    mask, sink = mask_and_sink(attrs, more)
    if mask is not None:
        _check_mask(mask, q, k)
    if sink is not None:
        if tensor(sink, "sink").rank != 1:
            raise TypeMismatch(f"the sink must be [heads], not {sink}")
        if sink.dtype not in (q.dtype, DType.F32):
            raise TypeMismatch(f"the sink must be {q.dtype} or f32, not {sink}")
        require_equal(q.shape[2], sink.shape[0], "heads of q and the sink")


def _more_axes(attrs: AttentionAttrs | CachedAttrs, more: Sequence[TensorType], scores: Axes) -> list[Axes]:
    mask, sink = mask_and_sink(attrs, more)
    return [*([aligned(mask.shape, scores)] if mask is not None else []), *([(scores[1],)] if sink is not None else [])]


def _emit_softmax_v(
    b: Builder, scores: Value, keep: Value | None, v: Value, sink: Value | None, out: tuple[DimLike, ...]
) -> Value:
    """Masked softmax over keys of scores [b, g, r, s, t] and a sink, times v [b, t, g, e] -> [b, s, h, e] = ``out``."""
    e_: Value
    if keep is not None:
        scores = b.select(keep, scores, b.constant(float("-inf"), scores.tensor.dtype))
    top = b.stop_gradient(b.reduce_max(scores, axes=(4,), keepdims=True))
    if sink is not None:
        sink = b.reshape(b.cast(sink, dtype=scores.tensor.dtype), shape=(*scores.shape[1:3], 1, 1))
        top = b.maximum(top, b.stop_gradient(sink))
    top = b.select(b.isinf(top), b.constant(0.0, top.tensor.dtype), top)
    e_ = b.exp(b.sub(scores, top))
    total = b.reduce_sum(e_, axes=(4,), keepdims=True)
    if sink is not None:
        total = b.add(total, b.exp(b.sub(sink, top)))
    probs = b.div(e_, b.select(b.greater(total, 0.0), total, b.constant(1.0, total.tensor.dtype)))
    n, t, g, e = v.shape
    values = b.reshape(b.transpose(v, perm=(0, 2, 1, 3)), shape=(n, g, 1, t, e))
    return b.reshape(b.transpose(b.matmul(probs, values), perm=(0, 3, 1, 2, 4)), shape=out)


def _emit_scores(b: Builder, attrs: AttentionAttrs | CachedAttrs, q: Value, k: Value) -> Value:
    n, s, h, d = q.shape
    t, g = k.shape[1], k.shape[2]
    qg = b.transpose(b.reshape(q, shape=(n, s, g, h // g, d)), perm=(0, 2, 3, 1, 4))
    kt = b.reshape(b.transpose(k, perm=(0, 2, 3, 1)), shape=(n, g, 1, d, t))
    x = b.mul(b.matmul(qg, kt), attrs.scale)
    if attrs.softcap is not None:
        x = b.mul(b.tanh(b.div(x, attrs.softcap)), attrs.softcap)
    return x


def _emit_keep(b: Builder, query: Value, key: Value, causal: bool, window: int | None) -> Value | None:
    keep = b.less_equal(key, query) if causal else None
    if window is not None:
        near = b.less(b.sub(query, key), window)
        keep = near if keep is None else b.logical_and(keep, near)
    return keep


def emit_seen(b: Builder, attrs: AttentionAttrs, s: DimLike, t: DimLike) -> Value | None:
    """Which of t keys the s queries see by causality and window: bool[s, t]; None: all of them."""
    query = b.reshape(b.iota(size=s), shape=(s, 1))
    if equal(s, t) is not True:
        query = b.add(query, b.sub(b.dim_size(size=t), b.dim_size(size=s)))
    return _emit_keep(b, query, b.iota(size=t), attrs.causal, attrs.window)


def emit_seen_cached(b: Builder, attrs: CachedAttrs, past: Value, s: DimLike, c: DimLike, heads: int) -> Value:
    """Which of c slots of a cache s queries behind ``past`` positions see: bool[b, 1 (as many as ``heads``), s, c]."""
    dtype = past.tensor.dtype
    start = b.reshape(past, shape=(past.shape[0], *(1,) * heads, 1, 1))
    query = b.add(start, b.reshape(b.iota(size=s, dtype=dtype), shape=(s, 1)))
    key = b.iota(size=c, dtype=dtype)
    last = b.add(start, b.sub(b.dim_size(size=s, dtype=dtype), 1))
    if attrs.ring:  # the newest position that each slot can hold; slots not yet written are before position 0
        key = b.sub(last, b.mod(b.sub(last, key), b.dim_size(size=c, dtype=dtype)))
    keep = b.less_equal(key, query if attrs.causal else last)
    if attrs.window is not None:
        keep = b.logical_and(keep, b.less(b.sub(query, key), attrs.window))
    return b.logical_and(keep, b.greater_equal(key, 0)) if attrs.ring else keep


def _emit_mask(b: Builder, x: Value, keep: Value | None, mask: Value | None) -> tuple[Value, Value | None]:
    """As ``_masked``."""
    if mask is None:
        return x, keep
    shape = (1,) * (4 - len(mask.shape)) + tuple(mask.shape)
    heads = (1, 1) if shape[1] == 1 else x.shape[1:3]
    full = b.reshape(mask, shape=(shape[0], *heads, *shape[2:]))
    if mask.tensor.dtype is DType.BOOL:
        return x, full if keep is None else b.logical_and(keep, full)
    return b.add(x, b.cast(full, dtype=x.tensor.dtype)), keep


def _products(q: TensorType, k: TensorType, v: TensorType) -> DimLike:
    """Multiply-adds of q with every key, and of the weights with every value."""
    n, s, h, d = q.shape
    return n * s * h * k.shape[1] * (d + v.shape[3])


@register
class Attention(Op):
    """Scaled dot-product attention with grouped queries (arXiv:1706.03762, arXiv:2305.13245).

    q [b, s, h, d], k [b, t, g, d], v [b, t, g, e], mask? -> [b, s, h, e]; query head i reads key head i // (h/g).
    scores = scale * q·k; softcap; then the mask, broadcastable to [b, h, s, t]: booleans keep where true, floats are added.
    ``causal``: query i stands at i + (t - s) and sees no later key. ``window`` w: only keys less than w behind it.
    Softmax in f32 or wider. A query that sees nothing gives 0. With ``sink``, a last operand [h] stands among the scores of
    every query, as one of a key whose value is 0 (gpt-oss, arXiv:2309.17453).
    """

    name = "attention"
    kind = "product"
    precision = "half"
    factors = 3
    Attrs = AttentionAttrs

    def infer(
        self, attrs: AttentionAttrs, q: TensorType, k: TensorType, v: TensorType, *more: TensorType
    ) -> TensorType:
        _check_qkv(q, k, v)
        _check_window(attrs.window)
        _check_more(attrs, more, q, k)
        return q.with_shape(*q.shape[:3], v.shape[3])

    def axes(self, attrs: AttentionAttrs, q: TensorType, k: TensorType, v: TensorType, *more: TensorType) -> AxisRule:
        n, heads, group = (Factor(q.shape[0]),), Factor(k.shape[2]), Factor(q.shape[2] // k.shape[2])
        past = attrs.causal and equal(q.shape[1], k.shape[1]) is True
        counted = attrs.causal or attrs.window is not None  # where a query stands depends on how many there are
        s = (Factor(q.shape[1], "ordered", "forward") if past else Factor(q.shape[1], "whole" if counted else "free"),)
        t, d, e = (s if past else (Factor(k.shape[1], "reduced"),)), (Factor(q.shape[3], "reduced"),), (Factor(v.shape[3]),)
        scores: Axes = (n, (heads, group), s, (Factor(k.shape[1], "whole"),))
        out: Axes = (n, s, (heads, group), e)
        given: tuple[Axes, ...] = ((n, s, (heads, group), d), (n, t, (heads,), d), (n, t, (heads,), e))
        return AxisRule((*given, *_more_axes(attrs, more, scores)), (out,))

    def reference(
        self, attrs: AttentionAttrs, q: np.ndarray, k: np.ndarray, v: np.ndarray, *more: np.ndarray
    ) -> np.ndarray:
        mask, sink = mask_and_sink(attrs, more)
        x = _grouped(q, k, attrs.scale, attrs.softcap)
        s, t = x.shape[-2:]
        keep = _keep(np.arange(s)[:, None] + (t - s), np.arange(t), attrs.causal, attrs.window)
        x, keep = _masked(x, keep, mask)
        return _weighted(np.where(keep, x, np.asarray(-np.inf, x.dtype)), v, sink, q.dtype)

    def multiply_adds(self, attrs: AttentionAttrs, q: TensorType, k: TensorType, v: TensorType, *more: TensorType) -> DimLike:
        return _products(q, k, v)

    def decompose(self, b: Builder, attrs: AttentionAttrs, q: Value, k: Value, v: Value, *more: Value) -> Value:
        dtype, (mask, sink) = q.tensor.dtype, mask_and_sink(attrs, more)
        if dtype.bits < 32:
            q, k, v = (b.cast(x, dtype=DType.F32) for x in (q, k, v))
        n, s, h, _ = q.shape
        t = k.shape[1]
        x = _emit_scores(b, attrs, q, k)
        keep = emit_seen(b, attrs, s, t)
        x, keep = _emit_mask(b, x, keep, mask)
        out = _emit_softmax_v(b, x, keep, v, sink, (n, s, h, v.shape[3]))
        return b.cast(out, dtype=dtype) if dtype.bits < 32 else out

    def samples(self) -> Iterable[Sample]:
        q, k, v = wave(2, 3, 4, 5), wave(2, 3, 2, 5, step=0.7), wave(2, 3, 2, 6, step=0.9)
        yield Sample([q, k, v], {"scale": 0.5})
        yield Sample([q, k, v], {"scale": 0.5, "causal": True, "window": 2, "softcap": 3.0})
        yield Sample([q[:, :2], k, v], {"scale": 1.0, "causal": True})
        yield Sample([q, k, v, np.array([[True, False, True], [False, False, False], [True, True, True]])], {"scale": 0.5})
        yield Sample([q, k, v, wave(2, 4, 3, 3)], {"scale": 0.5, "causal": True})
        yield Sample([q[:1, :, :1], k[:1, :, :1], v[:1, :, :1], wave(1, 1, 1, 3)], {"scale": 0.5})
        sink = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
        yield Sample([q, k, v, sink], {"scale": 0.5, "causal": True, "sink": True})
        nothing = np.array([[True, False, True], [False, False, False], [True, True, True]])
        yield Sample([q, k, v, nothing, sink], {"scale": 0.5, "softcap": 3.0, "window": 2, "sink": True})

    def errors(self) -> Iterable[ErrorSample]:
        ok = ["f32[b, s, 4, 8]", "f32[b, t, 2, 8]", "f32[b, t, 2, 8]"]
        yield ErrorSample([ok[0], "f32[b, t, 3, 8]", "f32[b, t, 3, 8]"], {"scale": 1.0}, "do not divide among")
        yield ErrorSample(["f32[b, t, 0, 8]"] * 3, {"scale": 1.0}, "do not divide among")
        yield ErrorSample([ok[0], "f32[b, t, 2, 6]", ok[2]], {"scale": 1.0}, "features of q and k")
        yield ErrorSample([ok[0], "f32[b, 3, 2, 8]", "f32[b, 4, 2, 8]"], {"scale": 1.0}, "positions of k and v")
        yield ErrorSample([*ok, "f32[5, 5]"], {"scale": 1.0, "window": 0}, "at least the position itself")
        yield ErrorSample([*ok, "i64[s, t]"], {"scale": 1.0}, "the mask must be")
        yield ErrorSample([*ok, "f32[7, b, 4, s, t]"], {"scale": 1.0}, "does not broadcast")
        yield ErrorSample(["f32[s, 4, 8]", *ok[1:]], {"scale": 1.0}, "must be [batch, position")
        yield ErrorSample(ok, {"scale": 1.0, "sink": True}, "0 operands where a mask may, and a sink has to, stand")
        yield ErrorSample([*ok, "f32[4]", "f32[4]"], {"scale": 1.0}, "2 operands where a mask may stand")
        yield ErrorSample([*ok, "f32[2]"], {"scale": 1.0, "sink": True}, "heads of q and the sink")
        yield ErrorSample([*ok, "f32[4, 1]"], {"scale": 1.0, "sink": True}, "the sink must be [heads]")


@dataclass(frozen=True)
class CachedAttrs(_op.Attrs):
    """As attention's; ``ring`` as cache_update's. Not ``causal``: a query sees all the new positions, as the mask lets it."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    ring: bool = False
    causal: bool = True
    sink: bool = False


@register
class CachedAttention(Op):
    """Attention of new positions over a cache, which takes them up first.

    q [b, s, h, d], k [b, s, g, d], v [b, s, g, e], k_cache [b, c, g, d], v_cache [b, c, g, e], past i64[b], mask?
    -> out [b, s, h, e], k_cache', v_cache'. Row r's new positions are past[r] + i; query i sees every position up to its own,
    if not ``causal`` up to the last new one (less than ``window`` behind). A ring needs c >= window + s - 1: what a query still
    sees must not be overwritten.
    The mask is attention's, broadcastable to [b, h, s, c]: its last axis is that of the cache's slots.
    """

    name = "cached_attention"
    kind = "product"
    Attrs = CachedAttrs
    differentiable = False

    def infer(
        self, attrs: CachedAttrs, q: TensorType, k: TensorType, v: TensorType, k_cache: TensorType, v_cache: TensorType,
        past: TensorType, *more: TensorType,
    ) -> tuple[TensorType, TensorType, TensorType]:  # fmt: skip
        _check_qkv(q, k, v)
        require_equal(q.shape[1], k.shape[1], "positions of q and k")
        check_cache(k_cache, k, past, "k_cache")
        check_cache(v_cache, v, past, "v_cache")
        require_equal(k_cache.shape[1], v_cache.shape[1], "capacity of the caches")
        _check_window(attrs.window)
        if attrs.ring:
            if attrs.window is None:
                raise TypeMismatch("a ring cache forgets: it needs a window")
            c, s = k_cache.shape[1], k.shape[1]
            require_at_most(attrs.window + s - 1, c, f"a ring of {c} cannot take {s} new positions under window {attrs.window}")
        _check_more(attrs, more, q, k_cache)
        return q.with_shape(*q.shape[:3], v.shape[3]), k_cache, v_cache

    def bounds(
        self, attrs: CachedAttrs, q: TensorType, k: TensorType, v: TensorType, keys: TensorType, *others: TensorType
    ) -> Mapping[int, Bounds]:
        return {5: room(attrs.ring, keys, k)}

    def axes(
        self, attrs: CachedAttrs, q: TensorType, k: TensorType, v: TensorType, k_cache: TensorType, v_cache: TensorType,
        past: TensorType, *more: TensorType,
    ) -> AxisRule:  # fmt: skip
        n, heads, group = (Factor(q.shape[0]),), Factor(k.shape[2]), Factor(q.shape[2] // k.shape[2])
        s, c = (Factor(q.shape[1], "whole"),), (Factor(k_cache.shape[1], "whole"),)
        d, e = (Factor(q.shape[3], "whole"),), (Factor(v.shape[3]),)
        caches: tuple[Axes, ...] = (n, c, (heads,), d), (n, c, (heads,), e)
        seen = _more_axes(attrs, more, (n, (heads, group), s, c))
        new: tuple[Axes, ...] = (n, s, (heads, group), d), (n, s, (heads,), d), (n, s, (heads,), e)
        return AxisRule((*new, *caches, (n,), *seen), ((n, s, (heads, group), e), *caches))

    def reference(
        self, attrs: CachedAttrs, q: np.ndarray, k: np.ndarray, v: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray,
        past: np.ndarray, *more: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        mask, sink = mask_and_sink(attrs, more)
        s, c = q.shape[1], k_cache.shape[1]
        k_cache, v_cache = write_cache(k_cache, k, past, attrs.ring), write_cache(v_cache, v, past, attrs.ring)
        query = past[:, None, None] + np.arange(s)[:, None]  # [b, s, 1]
        slot = np.arange(c)
        last = past[:, None, None] + (s - 1)
        key = last - (last - slot) % c if attrs.ring else np.broadcast_to(slot, (len(past), 1, c))  # the position in each slot
        keep = _keep(query, key, attrs.causal, attrs.window) & (key >= 0) & (key <= last)
        x, keep = _masked(_grouped(q, k_cache, attrs.scale, attrs.softcap), keep[:, None, None], mask)
        x = np.where(keep, x, -np.inf)
        return _weighted(x.astype(wide(q).dtype), v_cache, sink, q.dtype), k_cache, v_cache

    def multiply_adds(self, attrs: CachedAttrs, q: TensorType, *others: TensorType) -> DimLike:
        return _products(q, others[2], others[3])

    def decompose(
        self, b: Builder, attrs: CachedAttrs, q: Value, k: Value, v: Value, k_cache: Value, v_cache: Value, past: Value,
        *more: Value,
    ) -> tuple[Value, Value, Value]:  # fmt: skip
        dtype, (mask, sink) = q.tensor.dtype, mask_and_sink(attrs, more)
        kc, vc = b.cache_update(k_cache, k, past, ring=attrs.ring), b.cache_update(v_cache, v, past, ring=attrs.ring)
        keys, values = kc, vc
        if dtype.bits < 32:
            q, keys, values = (b.cast(x, dtype=DType.F32) for x in (q, kc, vc))
        n, s, h, _ = q.shape
        seen = emit_seen_cached(b, attrs, past, s, kc.shape[1], 2)
        x, keep = _emit_mask(b, _emit_scores(b, attrs, q, keys), seen, mask)
        out = _emit_softmax_v(b, x, keep, values, sink, (n, s, h, v.shape[3]))
        return (b.cast(out, dtype=dtype) if dtype.bits < 32 else out), kc, vc

    def samples(self) -> Iterable[Sample]:
        q, k, v = wave(2, 2, 4, 5), wave(2, 2, 2, 5, step=0.7), wave(2, 2, 2, 6, step=0.9)
        kc, vc = wave(2, 7, 2, 5, step=1.1), wave(2, 7, 2, 6, step=1.3)
        yield Sample([q, k, v, kc, vc, np.array([5, 0])], {"scale": 0.5})
        yield Sample([q, k, v, kc, vc, np.array([3, 5])], {"scale": 0.5, "window": 2, "softcap": 2.0})
        yield Sample([q, k, v, kc, vc, np.array([30, 2])], {"scale": 0.5, "window": 6, "ring": True})
        yield Sample([q[:, :1], k[:, :1], v[:, :1], kc, vc, np.array([6, 1])], {"scale": 0.5, "window": 7, "ring": True})
        yield Sample([q, k, v, kc, vc, np.array([5, 0]), wave(2, 4, 2, 7)], {"scale": 0.5, "softcap": 2.0})
        seen = np.array([[[True, False, True, False, True, True, True]], [[False] * 7]])[:, None]
        yield Sample([q, k, v, kc, vc, np.array([30, 2]), seen], {"scale": 0.5, "window": 6, "ring": True})
        yield Sample([q, k, v, kc, vc, np.array([3, 5])], {"scale": 0.5, "causal": False})
        sink = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
        yield Sample([q, k, v, kc, vc, np.array([3, 5]), sink], {"scale": 0.5, "sink": True})
        yield Sample([q, k, v, kc, vc, np.array([30, 2]), seen, sink], {"scale": 0.5, "window": 6, "ring": True, "sink": True})
        yield Sample([q, k, v, kc, vc, np.array([30, 2]), seen], {"scale": 0.5, "window": 6, "ring": True, "causal": False})

    def errors(self) -> Iterable[ErrorSample]:
        qkv = ["f32[b, s, 4, 8]", "f32[b, s, 2, 8]", "f32[b, s, 2, 8]"]
        cache = ["f32[b, c, 2, 8]", "f32[b, c, 2, 8]", "i64[b]"]
        yield ErrorSample([*qkv, *cache], {"scale": 1.0, "ring": True}, "needs a window")
        yield ErrorSample([*qkv, "f32[b, c, 3, 8]", *cache[1:]], {"scale": 1.0}, "axis 2 of k_cache")
        yield ErrorSample([*qkv, *cache[:2], "i64[b, 1]"], {"scale": 1.0}, "past must be")
        yield ErrorSample([*qkv, *cache, "f32[7, b, 4, s, c]"], {"scale": 1.0}, "does not broadcast")
        yield ErrorSample([*qkv, *cache, "f32[2]"], {"scale": 1.0, "sink": True}, "heads of q and the sink")


__all__ = ["Attention", "CachedAttention", "mask_and_sink"]
