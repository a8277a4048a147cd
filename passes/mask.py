"""What a mask says: predicates over positions (causal, window) told apart from masks that are data.

Positions are affine in the query's and the key's index: iotas, reshaped, added, subtracted. A comparison of two of them is
``key <= query + c`` or ``query - key < w``; conjunctions are taken apart, negations pushed inwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wasat.ir import DimLike, Node, Value, equal

from .pattern import number_of

FINITE_FILL = -3e4
"""A finite number at or below this stands for minus infinity (the least f16 is -65504)."""


@dataclass
class Mask:
    """A conjunction: what is kept."""

    causal: bool = False
    window: int | None = None
    operands: list[tuple[Value, bool]] = field(default_factory=list)
    """Masks that are data, and whether each is to be negated."""

    def meet(self, other: Mask) -> None:
        self.causal |= other.causal
        if other.window is not None:
            self.window = other.window if self.window is None else min(self.window, other.window)
        self.operands += other.operands


@dataclass(frozen=True)
class Affine:
    """query * i + key * j + const, i and j being the indices along the last two axes of the scores."""

    query: int
    key: int
    const: DimLike

    def scaled(self, c: int) -> Affine:
        return Affine(self.query * c, self.key * c, self.const * c)

    def plus(self, other: Affine) -> Affine:
        return Affine(self.query + other.query, self.key + other.key, self.const + other.const)


def is_fill(v: Value) -> float | None:
    """The number, if ``v`` is a constant that stands for minus infinity."""
    x = number_of(v)
    return x if x is not None and x <= FINITE_FILL else None


def analyze(v: Value, shape: Sequence[DimLike], keep: bool = True) -> Mask:
    """What a boolean mask, right-aligned to scores of ``shape``, keeps where it is true (false, if not ``keep``)."""
    node = v.node
    name = node.op.name if node is not None else ""
    if node is not None:
        if name == "logical_not":
            return analyze(node.inputs[0], shape, not keep)
        if name == ("logical_and" if keep else "logical_or"):
            mask = analyze(node.inputs[0], shape, keep)
            mask.meet(analyze(node.inputs[1], shape, keep))
            return mask
        if name in ("reshape", "broadcast_to") and _tail(v) == _tail(node.inputs[0]):
            return analyze(node.inputs[0], shape, keep)
        found = _comparison(node, shape, keep) if name in _COMPARISONS else None
        if found is not None:
            return found
    array = v.const
    if array is not None and array.size and bool(array.all() if keep else not array.any()):
        return Mask()
    return Mask(operands=[(v, not keep)])


def _tail(v: Value) -> tuple[DimLike, ...] | None:
    """The last two axes of a value that has no other (larger than 1)."""
    padded = (1, 1, *v.shape)
    return tuple(padded[-2:]) if all(d == 1 for d in padded[:-2]) else None


_COMPARISONS = {"less": (1, -1), "less_equal": (1, 0), "greater": (-1, -1), "greater_equal": (-1, 0)}
"""a OP b as sign * (a - b) <= bound."""


def _comparison(node: Node, shape: Sequence[DimLike], keep: bool) -> Mask | None:
    a, b = (affine(x) for x in node.inputs)
    if a is None or b is None:
        return None
    sign, bound = _COMPARISONS[node.op.name]
    d = a.plus(b.scaled(-1)).scaled(sign)
    if not keep:  # not (d <= bound): -d <= -bound - 1
        d, bound = d.scaled(-1), -bound - 1
    limit = bound - d.const
    ahead = shape[-1] - shape[-2]  # query i stands at i + (t - s)
    if (d.query, d.key) == (-1, 1):
        return Mask(causal=True) if equal(limit, ahead) is True else None
    if (d.query, d.key) == (1, -1):
        window = limit + ahead + 1
        return Mask(window=window) if isinstance(window, int) and window >= 1 else None
    return None


def affine(v: Value) -> Affine | None:
    """``v`` in terms of the query's and the key's index (its last two axes), or None."""
    node = v.node
    if node is None:
        return None
    name = node.op.name
    if name == "constant":
        x = number_of(v)
        return Affine(0, 0, int(x)) if x is not None and x == int(x) else None
    if name == "dim_size":
        return Affine(0, 0, node.attrs.size)  # type: ignore[attr-defined]
    if name == "iota":
        return Affine(0, 1, 0)
    if name == "cast":
        wide = v.tensor.dtype
        return affine(node.inputs[0]) if (wide.is_int and wide.bits >= 32) or (wide.is_float and wide.bits >= 32) else None
    if name == "neg":
        inner = affine(node.inputs[0])
        return inner.scaled(-1) if inner is not None else None
    if name in ("add", "sub"):
        a, b = (affine(x) for x in node.inputs)
        return a.plus(b.scaled(1 if name == "add" else -1)) if a is not None and b is not None else None
    if name in ("reshape", "broadcast_to", "transpose"):
        return _moved(node)
    return None


def _moved(node: Node) -> Affine | None:
    """An affine value whose axes were moved: by a reshape that adds or drops axes of size 1, a broadcast, a transpose."""
    x, y = node.inputs[0], node.output
    inner = affine(x)
    if inner is None:
        return None
    at = {0: inner.key, 1: inner.query}  # coefficient by axis, counted from the end
    if node.op.name == "transpose":
        n = len(y.shape)
        at = {n - 1 - i: at.get(n - 1 - p, 0) for i, p in enumerate(node.attrs.perm)}  # type: ignore[attr-defined]
    elif node.op.name == "reshape":
        old = [i for i, d in enumerate(reversed(x.shape)) if d != 1]
        new = [i for i, d in enumerate(reversed(y.shape)) if d != 1]
        if len(old) != len(new) or any(equal(x.shape[-1 - i], y.shape[-1 - j]) is not True for i, j in zip(old, new)):
            return None
        at = {j: at.get(i, 0) for i, j in zip(old, new)}
    if any(c for i, c in at.items() if i > 1):
        return None
    return Affine(at.get(1, 0), at.get(0, 0), inner.const)
