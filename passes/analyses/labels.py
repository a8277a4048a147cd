"""Labels of axes, from a result up to what it is made of: which part of an operand's axis is which part of the result's.

    matmul -> [b*s, j*h]        the label of an axis is a product of atoms: (b, s) and (j, h)

An operation's axis rule hands the atoms of its result on to its operands; where a reshape takes an axis apart, so is its atom.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wasat.ir import Builder, DimLike, Node, Value, equal
from wasat.ir.axes import Axis, AxisRule, Factor, product, quotient

from ..pattern import Mismatch


class Atom:
    """A part of an axis; it may have been taken apart itself."""

    def __init__(self, size: DimLike) -> None:
        self.size = size
        self.parts: tuple[Atom, ...] = ()


Label = tuple[Atom, ...]
"""Of an axis: its atoms, outer ones first; none of an axis of size 1."""
Labels = tuple[Label, ...]


def flat(atoms: Iterable[Atom]) -> list[Atom]:
    """The atoms that are not taken apart."""
    return [a for atom in atoms for a in (flat(atom.parts) if atom.parts else [atom])]


def every(labels: Labels) -> list[Atom]:
    """All atoms of a value."""
    return [a for label in labels for a in flat(label)]


def fresh(shape: Sequence[DimLike]) -> Labels:
    """Labels of their own."""
    return tuple((Atom(d),) if d != 1 else () for d in shape)


def operand_labels(node: Node, labels: Labels, result: int = 0) -> tuple[list[Labels], AxisRule]:
    """Labels of the operands of ``node``, given those of a result; what the result lacks, or has only parts of, is new.

    Raises Mismatch where the sizes do not divide into each other.
    """
    rule = node.op.axes(node.attrs, *(v.type for v in node.inputs))
    known: dict[Factor, Label] = {}
    for axis, label in zip(rule.results[result], labels):
        if all(f.role in _SAME for f in axis):
            known.update(_matched(axis, label))
    found = []
    for v, axes in zip(node.inputs, rule.operands):
        own = []
        for d, axis in zip(v.shape, axes):
            factors = [f for f in axis if f.size != 1] if len(axis) > 1 or d != 1 else []
            for f in factors:
                known.setdefault(f, (Atom(f.size if len(axis) > 1 else d),))
            own.append(tuple(a for f in factors for a in known[f]))
        found.append(tuple(own))
    return found, rule


_SAME = ("free", "normalized", "repeated", "reduced")
"""Roles of factors that are as long in operands as in results, element by element."""


def _matched(axis: Axis, label: Label) -> dict[Factor, Label]:
    """The atoms of each factor; atoms are taken apart where factors are smaller."""
    todo, found = flat(label), {}
    for f in axis:
        own, size = [], f.size
        while size != 1:
            if not todo:
                raise Mismatch(f"an axis of {product(*(f.size for f in axis))} does not divide as those below it")
            atom = todo.pop(0)
            if equal(atom.size, size) is True:
                own.append(atom)
                size = 1
            elif (rest := quotient(atom.size, size)) is not None:
                atom.parts = (Atom(size), Atom(rest))
                own.append(atom.parts[0])
                todo.insert(0, atom.parts[1])
                size = 1
            elif (rest := quotient(size, atom.size)) is not None:
                own.append(atom)
                size = rest
            else:
                raise Mismatch(f"an axis of {atom.size} does not divide into parts of {size}")
        found[f] = tuple(own)
    if todo:
        raise Mismatch("an axis does not divide as those below it")
    return found


def is_view(node: Node | None) -> bool:
    """Whether it only moves elements, or repeats them."""
    if node is None or node.op.kind != "view" or len(node.inputs) != 1:
        return False
    rule = node.op.axes(node.attrs, *(v.type for v in node.inputs))
    return all(f.role == "free" for axis in rule.operands[0] for f in axis)


def peel(v: Value, labels: Labels) -> tuple[Value, Labels]:
    """What ``v`` is a view of, and its labels."""
    while is_view(v.node):
        assert v.node is not None
        try:
            (labels,), _ = operand_labels(v.node, labels)
        except Mismatch:
            break
        v = v.node.inputs[0]
    return v, labels


def arrange(b: Builder, v: Value, labels: Labels, to: Labels) -> Value:
    """``v`` with axes ``to``; atoms that it lacks are of size 1 there. Raises Mismatch if it has others."""
    own, wanted = every(labels), every(to)
    if len(set(own)) != len(own) or not set(own) <= set(wanted):
        raise Mismatch(f"%{v.name} has axes that its product lacks")
    order = [a for a in wanted if a in own]
    sizes = tuple(a.size for a in own)
    if order != own:
        v = v if v.shape == sizes else b.reshape(v, shape=sizes)
        v = b.transpose(v, perm=tuple(own.index(a) for a in order))
    shape = tuple(product(*(a.size for a in flat(label) if a in own)) for label in to)
    return v if v.shape == shape else b.reshape(v, shape=shape)
