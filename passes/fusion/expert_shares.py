"""Where the shares of experts are not known to be zero: at the places of a choice, as is proved from how they are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from wasat.ir import Node, Value
from wasat.ir.op import concrete
from wasat.ir.ops.index import ScatterAttrs, TopK
from wasat.ir.ops.reduce import ArgMax
from wasat.ir.ops.shape import Slice

from ..analyses.labels import Atom, Label, Labels, every, flat, is_view, operand_labels, peel
from ..pattern import Mismatch, number_of


@dataclass(frozen=True)
class Choice:
    """Places along an axis of experts: everything at others counts for nothing. The number of the first expert is ``first``;
    all places are from 0 to below ``most``."""

    places: Value
    labels: Labels
    experts: Atom
    most: int
    first: int = 0

    @property
    def partial(self) -> bool:
        """Whether some of the places may be no experts."""
        return self.first != 0 or self.most > concrete(self.experts.size)

    def per_token(self, of: Iterable[Atom]) -> list[Atom]:
        """The atoms of ``places`` that are not among those ``of`` a value: one for each of a token's experts."""
        return [a for a in every(self.labels) if a not in of]


def support(v: Value, labels: Labels) -> Choice | None:
    """Where ``v`` is not known to be zero, if that is at some places of an axis."""
    node = v.node
    if node is None:
        return None
    try:
        return _support(node, labels)
    except Mismatch:
        return None


def _support(node: Node, labels: Labels, zero: float = 0.0) -> Choice | None:
    name, inputs = node.op.name, node.inputs
    if name == "one_hot" and zero == 0:
        return choice_of(inputs[0], labels[:-1], labels[-1])
    if name == "scatter_along" and is_number(inputs[0], zero):
        axis = ScatterAttrs.of(node).axis
        places = inputs[1].shape
        spread = [i for i, (d, e) in enumerate(zip(places, node.output.shape)) if d != e and i != axis]
        chosen = (Atom(places[axis]),) if places[axis] != 1 else ()
        own = tuple(chosen if i == axis else x for i, x in enumerate(labels))
        return None if spread else choice_of(inputs[1], own, labels[axis])
    operands, rule = operand_labels(node, labels)

    def of(i: int, zero: float = 0.0) -> Choice | None:
        made = inputs[i].node
        return None if made is None else _support(made, operands[i], zero)

    if name == "select":
        if is_number(inputs[2], zero):
            return of(0) or (of(1, zero) if zero == 0 else None)
        return None
    if name == "add" and zero != 0:  # a mask that is added
        return of(0, zero) or of(1, zero)
    if name == "cast" or is_view(node):
        return of(0, zero)
    if (part := _part(node)) is not None:
        (cut, first), found = part, of(0, zero)
        if found is None or operands[0][cut] != (found.experts,):
            return None
        return replace(found, experts=labels[cut][0], first=found.first + first)
    if zero != 0:
        return None
    if name == "equal":
        for i in (0, 1):
            steps, step_labels = peel(inputs[i], operands[i])
            if (start := _counted_from(steps)) is not None:
                return choice_of(inputs[1 - i], operands[1 - i], step_labels[0], start)
        return None
    if name in ("mul", "logical_and"):
        return of(0) or of(1)
    if name in ("greater", "greater_equal", "not_equal"):  # of zero it is false
        c = number_of(inputs[1])
        never = c is not None and {"greater": c >= 0, "greater_equal": c > 0, "not_equal": c == 0}[name]
        return of(0) if never else None
    if name in ("neg", "relu") or (name == "div" and _experts_free(of(0), operands[1])):
        return of(0)
    if name == "softmax":
        return of(0, float("-inf"))
    if node.op.kind == "product":
        return of(0) or (of(1) if len(inputs) == 2 else None)
    if node.op.kind == "reduction" and all(
        f.how in ("sum", "max", "any") for axis in rule.operands[0] for f in axis if f.role == "reduced" and f.size != 1
    ):
        return of(0)
    return None


def choice_of(places: Value, labels: Labels, experts: Label, first: int = 0) -> Choice | None:
    """The choice whose places these are, if all of them are places of an axis, and differ."""
    base, base_labels = peel(places, labels)
    experts = tuple(flat(experts))
    chosen = chosen_by(base)
    if len(experts) != 1 or chosen is None:
        return None
    most = chosen.inputs[0].shape[axis_of(chosen)]
    if not isinstance(most, int) or not isinstance(experts[0].size, int):
        return None
    return Choice(base, base_labels, experts[0], most, first)


def _part(node: Node) -> tuple[int, int] | None:
    """The one axis of which a slice takes some elements, one after the other, and the first of them."""
    if not node.is_a("slice"):
        return None
    a, shape = Slice.Attrs.of(node), node.inputs[0].shape
    cut = [i for i, (lo, hi, step, d) in enumerate(zip(a.starts, a.stops, a.steps, shape)) if (lo, hi, step) != (0, d, 1)]
    if len(cut) != 1 or a.steps[cut[0]] != 1 or node.output.shape[cut[0]] == 1:
        return None
    first = a.starts[cut[0]]
    return (cut[0], first) if isinstance(first, int) else None


def is_number(v: Value, number: float) -> bool:
    """Whether all elements are zero, or, for -inf, as good as that."""
    while is_view(v.node) and v.const is None:
        assert v.node is not None
        v = v.node.inputs[0]
    if v.const is None or not v.const.size:
        return False
    if number == 0:
        return number_of(v) == 0 or not v.const.any()
    return bool(np.all(v.const.astype(np.float64) <= np.finfo(np.float32).min * 0.99)) if number < 0 else False


def _counted_from(v: Value) -> int | None:
    """The first of numbers that follow one another."""
    c = v.const
    if v.made_by("iota") is not None:
        return 0
    if c is None or c.ndim != 1 or not c.size or not np.array_equal(c, c[0] + np.arange(len(c))):
        return None
    return int(c[0])


def chosen_by(v: Value) -> Node | None:
    """What these are places of different elements by, for each token; or, views aside, of one."""
    while v.node is not None and (v.node.is_a("slice") or is_view(v.node)):
        v = v.node.inputs[0]
    node = v.node
    return node if node is not None and (node.is_a("arg_max", "arg_min") or (node.is_a("top_k") and v.index == 1)) else None


def axis_of(chosen: Node) -> int:
    """The axis of what a choice is from."""
    return TopK.Attrs.of(chosen).axis if chosen.is_a("top_k") else ArgMax.Attrs.of(chosen).axis


def _experts_free(choice: Choice | None, labels: Labels) -> bool:
    return choice is not None and choice.experts not in every(labels)
