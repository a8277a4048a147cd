"""What a kernel's operands were before the graph gave them another form: a run of a merged projection, positions, a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from wasat.ir import IRError, Node, State, Value, equal
from wasat.ir.ops.rounding import before_stored_rows

from ..selection import Shape, state_of
from .kernels.cache import Cache, CacheType
from .kernels.rope import Rotary
from .panels import known


def stored_as(node: Node, states: Mapping[str, State], default: CacheType) -> CacheType:
    """How both caches that ``node`` writes are stored: as their states say, or as ``default``."""
    first = 2 if node.is_a("cache_start") else 3
    k, v = (states[state_of(x).name] for x in node.inputs[first : first + 2])
    if k.stored != v.stored:
        raise IRError(f"{node!r}: %{k.name} is stored as {k.stored or 'it is'}, %{v.name} as {v.stored or 'it is'}", node.loc)
    return cast(CacheType, k.stored or default)


def unrounded(node: Node, x: Value, cache: Cache) -> Value:
    """``x`` before it was rounded to what ``cache`` holds: the kernel that writes it does that."""
    before = before_stored_rows(x, cache.dtype) if cache.quantized else x
    if before is None:
        raise IRError(f"{node!r}: %{x.name} was not rounded to {cache.dtype}, as its cache says (quantize-caches)", node.loc)
    return before


def rotary_of(node: Node, head_dim: int) -> Rotary:
    """The turn that a ``rope`` makes of heads so wide."""
    a: Any = node.attrs
    return Rotary(head_dim, 2 * node.inputs[2].shape[0], a.factor, a.interleaved)


def part_of(x: Value) -> tuple[Value, int] | None:
    """The value of which ``x`` [b, s, h, d] is a run of last-axis elements, in heads; and where the run begins."""
    heads = x.made_by("reshape")
    cut = heads.inputs[0].made_by("slice") if heads is not None else None
    if cut is None or heads is None:
        return None
    whole, a = cut.inputs[0], cast(Any, cut.attrs)
    lead = len(whole.shape) - 1
    whole_rows = all(equal(lo, 0) and equal(hi, n) for lo, hi, n in zip(a.starts[:lead], a.stops[:lead], whole.shape))
    if lead != 2 or not whole_rows or set(a.steps) != {1} or not known(a.starts[2]) or x.shape[:2] != whole.shape[:2]:
        return None
    return whole, a.starts[2]


def is_past_plus_iota(positions: Value, past: Value) -> bool:
    """Whether ``positions`` [b, s] is past[:, None] + iota, of which past[:, None] is left where s is 1."""

    def column(v: Value) -> bool:
        return reshaped(v, (past.shape[0], 1)) is past

    total = positions.made_by("add")
    if total is None:
        return column(positions)
    return any(
        column(start) and reshaped(steps, (1, positions.shape[1])).made_by("iota") is not None
        for start, steps in (total.inputs, total.inputs[::-1])
    )


def reshaped(v: Value, shape: Shape) -> Value:
    """What ``v`` was before it was given ``shape``; ``v`` itself if no reshape did that."""
    node = v.made_by("reshape")
    return node.inputs[0] if node is not None and v.shape == shape else v
