"""Caches: new rows written at each row's positions, and what stands first in them. Heads are the third axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import op as _op
from ..axes import Axes, AxisRule, Factor, free
from ..checks import require_at_most, require_equal
from ..errors import TypeMismatch
from ..op import Bounds, ErrorSample, Op, Sample, floating, register, same_dtype, tensor
from ..types import TensorType
from .elementwise import wave
from .index import indices

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Value


def rank4(t: TensorType, what: str) -> TensorType:
    """``t``, whose axes are batch, position, head and feature."""
    if floating(t, what).rank != 4:
        raise TypeMismatch(f"{what} must be [batch, position, head, feature], not {t}")
    return t


@dataclass(frozen=True)
class CacheAttrs(_op.Attrs):
    """``ring``: position p stands in slot p modulo the capacity; else in slot p."""

    ring: bool = False


def check_cache(cache: TensorType, new: TensorType, past: TensorType, what: str) -> None:
    """Refuses a cache [b, c, ..] that cannot take ``new`` [b, s, ..] at the positions ``past`` [b]."""
    if tensor(cache, what).rank < 2 or tensor(new, "new").rank != cache.rank:
        raise TypeMismatch(f"{what} must be [batch, capacity, ..] and new [batch, s, ..], not {cache} and {new}")
    same_dtype(cache, new)
    for i in range(cache.rank):
        if i != 1:
            require_equal(cache.shape[i], new.shape[i], f"axis {i} of {what} and the new values")
    if indices(past, "past").rank != 1:
        raise TypeMismatch(f"past must be [batch], not {past}")
    require_equal(past.shape[0], cache.shape[0], f"batch of past and {what}")


def write_cache(cache: np.ndarray, new: np.ndarray, past: np.ndarray, ring: bool) -> np.ndarray:
    at = past[:, None] + np.arange(new.shape[1])
    if past.size and past.min() < 0:
        raise TypeMismatch(f"a row cannot hold {past.min()} positions")
    if ring:
        at = at % cache.shape[1]
    elif at.size and at.max() >= cache.shape[1]:
        raise TypeMismatch(f"position {at.max()} is outside a cache of {cache.shape[1]}: compile or open it with more context")
    out = np.array(cache)
    for i in range(new.shape[1]):  # in order: in a ring a later position overwrites
        out[np.arange(len(cache)), at[:, i]] = new[:, i]
    return out


@register
class CacheUpdate(Op):
    """cache [b, c, ..] with new [b, s, ..] written at positions past[r] .. past[r]+s-1 of each row r.

    A ring keeps the last c positions; without ``ring``, a position at or past c is an error.
    """

    name = "cache_update"
    kind = "scatter"
    Attrs = CacheAttrs
    differentiable = False

    def infer(self, attrs: CacheAttrs, cache: TensorType, new: TensorType, past: TensorType) -> TensorType:
        check_cache(cache, new, past, "the cache")
        if attrs.ring:
            require_at_most(1, cache.shape[1], "the capacity of a ring")  # positions are counted modulo it
        return cache

    def bounds(self, attrs: CacheAttrs, cache: TensorType, new: TensorType, past: TensorType) -> Mapping[int, Bounds]:
        return {2: room(attrs.ring, cache, new)}

    def axes(self, attrs: CacheAttrs, cache: TensorType, new: TensorType, past: TensorType) -> AxisRule:
        own = free(cache.shape, {1: Factor(cache.shape[1], "indexed")})
        return AxisRule((own, (own[0], (Factor(new.shape[1], "whole"),), *own[2:]), own[:1]), (own,))

    def reference(self, attrs: CacheAttrs, cache: np.ndarray, new: np.ndarray, past: np.ndarray) -> np.ndarray:
        return write_cache(cache, new, past, attrs.ring)

    def samples(self) -> Iterable[Sample]:
        yield Sample([wave(2, 6, 3), wave(2, 2, 3, step=2.0), np.array([4, 1])])
        yield Sample([wave(2, 3, 1, 2), wave(2, 2, 1, 2, step=2.0), np.array([4, 2])], {"ring": True})

    def errors(self) -> Iterable[ErrorSample]:
        yield ErrorSample(["f32[b, 6, 3]", "f32[b, s, 4]", "i64[b]"], {}, "axis 2")
        yield ErrorSample(["f32[2, 6, 3]", "f32[2, s, 3]", "i64[3]"], {}, "batch of past")
        yield ErrorSample(["f32[b, 6, 3]", "f32[b, s]", "i64[b]"], {}, "must be [batch, capacity")
        yield ErrorSample(["f32[b, 0, 3]", "f32[b, s, 3]", "i64[b]"], {"ring": True}, "1 is more than 0")


def room(ring: bool, cache: TensorType, new: TensorType) -> Bounds:
    """How many positions a row may hold before the new ones come."""
    return 0, 2**62 if ring else cache.shape[1] - new.shape[1] + 1


@register
class CacheStart(Op):
    """What stands before a row's first token, put into its caches: k [1 | b, p, g, d] and v [1 | b, p, g, e] at positions 0
    to p - 1 of k_cache [b, c, g, d] and v_cache [b, c, g, e], in rows that hold nothing yet (past[r] is 0); other rows stay.
    """

    name = "cache_start"
    kind = "scatter"
    differentiable = False

    def infer(
        self, attrs: _op.Attrs, k: TensorType, v: TensorType, k_cache: TensorType, v_cache: TensorType, past: TensorType
    ) -> tuple[TensorType, TensorType]:
        for new, cache, what in ((k, k_cache, "k_cache"), (v, v_cache, "v_cache")):
            rank4(new, "what stands first")
            rows = new.with_shape(cache.shape[0], *new.shape[1:]) if new.shape[0] == 1 else new
            check_cache(rank4(cache, what), rows, past, what)
            require_at_most(new.shape[1], cache.shape[1], f"{new.shape[1]} positions do not fit in {what} of {cache.shape[1]}")
        require_equal(k.shape[1], v.shape[1], "positions of k and v")
        require_equal(k_cache.shape[1], v_cache.shape[1], "capacity of the caches")
        return k_cache, v_cache

    def axes(
        self, attrs: _op.Attrs, k: TensorType, v: TensorType, k_cache: TensorType, v_cache: TensorType, past: TensorType
    ) -> AxisRule:
        n, heads = (Factor(k_cache.shape[0]),), (Factor(k_cache.shape[2]),)
        c = (Factor(k_cache.shape[1], "whole"),)
        caches: list[Axes] = [(n, c, heads, (Factor(t.shape[3]),)) for t in (k_cache, v_cache)]
        rows = (Factor(1, "whole"),) if k.shape[0] == 1 != k_cache.shape[0] else n
        new: list[Axes] = [(rows, (Factor(t.shape[1], "whole"),), heads, own[3]) for t, own in zip((k, v), caches)]
        return AxisRule((*new, *caches, (n,)), tuple(caches))

    def reference(
        self, attrs: _op.Attrs, k: np.ndarray, v: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray, past: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        made = []
        for new, cache in ((k, k_cache), (v, v_cache)):
            out = np.array(cache)
            out[past == 0, : new.shape[1]] = np.broadcast_to(new, (len(cache), *new.shape[1:]))[past == 0]
            made.append(out)
        return made[0], made[1]

    def decompose(
        self, b: Builder, attrs: _op.Attrs, k: Value, v: Value, k_cache: Value, v_cache: Value, past: Value
    ) -> tuple[Value, Value]:
        n, c, p = k_cache.shape[0], k_cache.shape[1], k.shape[1]
        none = b.reshape(b.equal(past, b.constant(0, past.tensor.dtype)), shape=(n, 1, 1, 1))
        first = b.less(b.iota(size=c), b.dim_size(size=p))
        keep = b.logical_and(none, b.reshape(first, shape=(c, 1, 1)))
        full = [b.pad(x, low=(0, 0, 0, 0), high=(0, c - p, 0, 0)) for x in (k, v)]
        made = [b.select(keep, x, cache) for x, cache in zip(full, (k_cache, v_cache))]
        return made[0], made[1]

    def samples(self) -> Iterable[Sample]:
        kc, vc = wave(2, 5, 2, 3), wave(2, 5, 2, 4, step=1.3)
        yield Sample([wave(1, 2, 2, 3, step=0.7), wave(1, 2, 2, 4, step=0.9), kc, vc, np.array([0, 3])])
        yield Sample([wave(2, 5, 2, 3, step=0.7), wave(2, 5, 2, 4, step=0.9), kc, vc, np.array([1, 0])])

    def errors(self) -> Iterable[ErrorSample]:
        cache = ["f32[b, 5, 2, 3]", "f32[b, 5, 2, 4]", "i64[b]"]
        yield ErrorSample(["f32[1, 6, 2, 3]", "f32[1, 6, 2, 4]", *cache], {}, "6 positions do not fit in k_cache of 5")
        yield ErrorSample(["f32[1, 2, 2, 3]", "f32[1, 3, 2, 4]", *cache], {}, "positions of k and v")
        yield ErrorSample(["f32[1, 2, 1, 3]", "f32[1, 2, 2, 4]", *cache], {}, "axis 2 of k_cache")
        yield ErrorSample(["f32[2, 3]", "f32[1, 2, 2, 4]", *cache], {}, "must be [batch, position")
