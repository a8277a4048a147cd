"""What a mask lets queries see of later keys: nothing; a part that ends, a prefix or a picture; or as much as there is.

causal | key < 4                  within: the first four
causal | image(query) == image(key)   within, as long as a picture is given in one piece
key <= query + 1                  on and on
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from wasat.ir import DType, Value

from .affine import Affine, implies
from .indexing import Indexing
from .mask import FINITE_FILL

if TYPE_CHECKING:
    from .sequence import Label

Sight = Literal["back", "within", "data", "ahead"]
"""``data``: what inputs say."""


def sight(mask: Value, labels: Mapping[Value, Label], at: Indexing, keep: bool = True) -> Sight:
    """What of later keys ``mask`` [.., queries, keys] lets a query see, where it is ``keep``; of a mask that is added, where it
    is not minus infinity.

    A part that inputs mark is within bounds where something that looks back stands beside it: that part is what is seen ahead.
    """
    label, rank, node = labels[mask], len(mask.shape), mask.node
    last = label.relates and {label.axis, label.other} == {rank - 2, rank - 1}
    if last and _hides(mask, label.later(rank - 1), keep):
        return "back"
    if _ends(mask, at, keep):
        return "within"
    name = node.op.name if node is not None else ""
    if node is not None:
        if name == "logical_not":
            return sight(node.inputs[0], labels, at, not keep)
        if name in ("logical_and", "logical_or"):
            parts = [sight(v, labels, at, keep) for v in node.inputs]
            return _either(parts) if (name == "logical_or") is keep else _both(parts)
        if name == "broadcast_to" or (name == "reshape" and _in_place(mask, node.inputs[0], labels)):
            return sight(node.inputs[0], labels, at, keep)
        if name == "select" and keep and mask.tensor.dtype.is_float:
            condition, yes, no = node.inputs
            for fill, kept in ((no, True), (yes, False)):
                number = at.pieces(fill)[0].number if len(at.pieces(fill)) == 1 else None
                if isinstance(number, (int, float)) and number <= FINITE_FILL:
                    return sight(condition, labels, at, kept)
    return "data" if _given(mask) else "ahead"


def _hides(mask: Value, number: object, keep: bool) -> bool:
    """Whether what has this number in it is not seen."""
    if not isinstance(number, (int, float)):
        return False
    return number == float(not keep) if mask.tensor.dtype is DType.BOOL else keep and number <= FINITE_FILL


def _either(parts: list[Sight]) -> Sight:
    if "ahead" in parts:
        return "ahead"
    if set(parts) in ({"back"}, {"data"}):
        return parts[0]
    return "within"


def _both(parts: list[Sight]) -> Sight:
    order: tuple[Sight, ...] = ("back", "within", "data", "ahead")
    return next(x for x in order if x in parts)


def _in_place(new: Value, old: Value, labels: Mapping[Value, Label]) -> bool:
    """Whether a reshape leaves the axes along the sequence where they are, counted from the end."""
    own, before = labels[new], labels[old]
    return [len(new.shape) - i for i in own.axes] == [len(old.shape) - i for i in before.axes]


def _ends(mask: Value, at: Indexing, keep: bool) -> bool:
    """Whether later keys that are seen stand before a position that is known."""
    rank = max(2, len(mask.shape))
    shape = (1,) * (rank - len(mask.shape)) + at.shape(mask)
    later = Affine((0,) * (rank - 2) + (-1, 1), -1)
    for p in at.pieces(mask):
        if _hides(mask, p.number, keep):
            continue
        where = [c.of_rank(rank) for c in p.where]
        bounds = [c for c in where if isinstance(c.const, int) and c.terms == (0,) * (rank - 1) + (-1,)]
        ahead = (*where, later)
        if not any(implies(ahead, bound, shape) for bound in (later.scaled(-1).plus(Affine((), -1)), *bounds)):
            return False
    return True


def _given(v: Value) -> bool:
    """Whether ``v`` depends on an input."""
    seen, stack = {v}, [v]
    while stack:
        x = stack.pop()
        if x.node is None and x.param is None and x.const is None:
            return True
        for u in x.node.inputs if x.node is not None else ():
            if u not in seen:
                seen.add(u)
                stack.append(u)
    return False
