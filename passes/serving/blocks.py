"""Masks over a cache's slots: what stands in front of the tokens; tokens of one call that see each other, of a prefix, of a
picture. What sees each other is to come in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wasat.ir import DimLike, DType, Value

from ..analyses.mask import FINITE_FILL

if TYPE_CHECKING:
    from .derivation import Derivation
    from .plan import Cache


def without_padding(d: Derivation, mask: Value) -> Value:
    """A mask over the cache's slots, without those behind a row's last token: rows have different numbers of new ones."""
    if d.last is None:
        return mask
    b, last = d.b, d.b.add(d.past, d.last)
    real = b.less_equal(b.iota(size=mask.shape[-1]), b.reshape(last, shape=(d.batch, 1, 1, 1)))
    if mask.tensor.dtype is DType.BOOL:
        return b.logical_and(mask, real)
    return b.select(real, mask, b.constant(float("-inf"), mask.tensor.dtype))


def behind(d: Derivation, v: Value, mask: Value, lead: DimLike) -> Value:
    """``mask``, of ``v`` over the cache's slots, of which the first ``lead`` hold what no token made."""
    b, dtype, axis = d.b, mask.tensor.dtype, len(mask.shape) - 1
    own = d.plan.led.seen.get(v) if d.plan.led is not None else None
    if own is None:
        seen = b.constant(True if dtype is DType.BOOL else 0, dtype)
    else:
        seen = d.spread(own, d.env[own], 4) if d.labels[own].lifted else d.env[own]
    lines = [x if x != 1 else y for x, y in zip(mask.shape[:-1], [1] * (axis + 1 - len(seen.shape)) + list(seen.shape[:-1]))]
    rest = b.slice(mask, starts=(0,) * (axis + 1), stops=(*mask.shape[:-1], mask.shape[-1] - lead))
    parts = [b.broadcast_to(x, shape=(*lines, n)) for x, n in ((seen, lead), (rest, rest.shape[-1]))]
    return b.concat(*parts, axis=axis)


def note_cut(d: Derivation, mask: Value, cache: Cache) -> None:
    """Notes in which rows a token of the past sees a new one: then what was computed of it is not what it would be now."""
    while (spread := mask.made_by("broadcast_to")) is not None and len(spread.inputs[0].shape) > 1:
        mask = spread.inputs[0]
    if mask in d.seen:
        return
    b, queries = d.b, len(mask.shape) - 2
    x = d.over_slots(mask, queries, cache)
    x = d.spread(mask, x, 4) if len(x.shape) > len(mask.shape) else x
    x = b.reshape(x, shape=(*[1] * (4 - len(x.shape)), *x.shape))
    sees = x if x.tensor.dtype is DType.BOOL else b.greater(x, b.constant(FINITE_FILL, x.tensor.dtype))
    slots, new = x.shape[-2:]
    held = b.reshape(b.less(b.iota(size=slots), b.reshape(d.past, shape=(d.batch, 1))), shape=(d.batch, 1, slots, 1))
    if d.last is not None:
        real = b.less_equal(b.iota(size=new), b.reshape(d.last, shape=(d.batch, 1)))
        held = b.logical_and(held, b.reshape(real, shape=(d.batch, 1, 1, new)))
    d.seen[mask] = b.reduce_any(b.logical_and(sees, held), axes=(1, 2, 3))
