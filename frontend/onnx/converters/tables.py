"""The numeric part of ai.onnx.ml, and TfIdfVectorizer over integers: lookups and counts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from wasat.ir import DType

from ..emit import Emitter, Operand, size_of
from ..registry import ML, MOST, NodeView, op


@op("ArrayFeatureExtractor", domain=ML)
def array_feature_extractor(c: Emitter, n: NodeView, x: Operand, ids: Operand) -> Any:
    y = c.gather(x, c.view(ids, size_of(c.shape(ids))), axis=c.rank(x) - 1)
    return c.add_axes(y, 0) if c.rank(x) == 1 else y


@op("Binarizer", domain=ML)
def binarizer(c: Emitter, n: NodeView, x: Operand) -> Any:
    return c.to(c.greater(x, n["threshold"]), c.dtype(x))


@op("LabelEncoder", domain=ML)
def label_encoder(c: Emitter, n: NodeView, x: Operand) -> Any:
    """The value beside the key that equals x, or the default."""

    def listed(what: str) -> Any:
        for kind, dtype in (("int64s", np.int64), ("floats", np.float32)):
            if n.get(f"{what}_{kind}"):
                return np.asarray(n[f"{what}_{kind}"], dtype)
        return n.get(f"{what}_tensor")

    keys, values = listed("keys"), listed("values")
    if keys is None or values is None:
        raise n.fail("only numbers are supported, not strings")
    default = n.get("default_tensor")
    if default is None:
        default = n["default_int64"] if values.dtype == np.int64 else n["default_float"]
    hit = c.equal(c.add_axes(x, -1), keys)
    if keys.dtype.kind == "f" and np.isnan(keys).any():
        hit = c.logical_or(hit, c.logical_and(c.isnan(c.add_axes(x, -1)), np.isnan(keys)))
    at = c.arg_max(c.to(hit, DType.I32), axis=-1)
    found = c.reduce_any(hit, axes=(c.rank(x),))
    return c.select(found, c.gather(values, at, axis=0), np.asarray(default, values.dtype).reshape(()))


@op("TfIdfVectorizer", since=9)
def tf_idf(c: Emitter, n: NodeView, x: Operand) -> Any:
    """How often each n-gram of the pool occurs, with up to ``max_skip_count`` elements left out between neighbours."""
    pool = n.get("pool_int64s")
    if not pool:
        raise n.fail("only integers are supported, not strings")
    flat = c.rank(x) == 1
    x = c.to(c.add_axes(x, 0) if flat else x, DType.I64)
    steps, starts, places = c.static(x, 1, "TfIdfVectorizer"), [*n["ngram_counts"], len(pool)], n["ngram_indexes"]
    if min(places, default=-1) < 0 or max(places) >= MOST:
        raise n.fail(f"ngram_indexes must lie below {MOST}")
    counts, first = [], 0
    for size, (lo, hi) in enumerate(itertools.pairwise(starts), 1):
        grams = np.asarray(pool[lo:hi], np.int64).reshape(-1, size)
        if n["min_gram_length"] <= size <= n["max_gram_length"] and len(grams):
            counts.append((_count(c, x, steps, grams, n["max_skip_count"] if size > 1 else 0), first, len(grams)))
        first += len(grams)
    weights = np.asarray(n.get("weights") or np.ones(first), np.float32)
    table = np.zeros((first, max(places) + 1), np.float32)
    table[np.arange(first), places[:first]] = 1
    total = c.full((c.shape(x)[0], max(places) + 1), 0, DType.F32)
    for count, begin, many in counts:
        if n["mode"] == "IDF":
            count = c.to(c.greater(count, 0.0), DType.F32)
        if n["mode"] != "TF":
            count = c.mul(count, weights[begin : begin + many])
        total = c.add(total, c.matmul(count, table[begin : begin + many]))
    return c.drop_axes(total, 0) if flat else total


def _count(c: Emitter, x: Any, steps: int, grams: np.ndarray, skips: int) -> Any:
    """Occurrences [b, g] of the n-grams [g, m] in rows x [b, t]."""
    total = c.full((c.shape(x)[0], len(grams)), 0, DType.F32)
    size = grams.shape[1]
    for stride in range(1, skips + 2):
        count = steps - (size - 1) * stride
        if count < 1:
            break
        hits = [
            c.equal(c.add_axes(c.cut(x, 1, j * stride, j * stride + count), -1), grams[None, None, :, j]) for j in range(size)
        ]
        total = c.add(total, c.reduce_sum(c.to(c.fold_left(c.logical_and, hits), DType.F32), axes=(1,)))
    return total
