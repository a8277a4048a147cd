"""Views: what chains of reshape, transpose and broadcast do to a value, as an arrangement of its axes' factors.

    x[b, s, 256] -> reshape [b, s, 4, 64] -> transpose [b, 4, s, 64]      axes of the view: (b) (h) (s) (d), with h*d = 256

Fusion reads from it which axis of a matrix product holds heads, positions, features, and where a head was repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wasat.ir import Builder, Dim, DimLike, Node, Value, equal
from wasat.ir.ops.shape import Transpose

from ..pattern import number_of


@dataclass(eq=False)
class Atom:
    """A factor of an axis. ``broadcast``: repetition, not data."""

    size: DimLike
    broadcast: bool = False


@dataclass
class View:
    """``value`` as an arrangement of ``base``: its axes, outermost first, as products of atoms."""

    base: Value
    axes: list[list[Atom]]
    base_axes: list[list[Atom]]
    scale: float = 1.0
    """A number by which the elements were multiplied on the way."""
    nodes: list[Node] = field(default_factory=list)

    def split(self, atom: Atom, sizes: Sequence[DimLike]) -> list[Atom]:
        """Replaces an atom by factors of it, everywhere."""
        parts = [Atom(s, atom.broadcast) for s in sizes if s != 1]
        for axes in (self.axes, self.base_axes):
            for axis in axes:
                for i in [i for i, a in enumerate(axis) if a is atom]:
                    axis[i : i + 1] = parts
        return parts


def trivial(value: Value) -> View:
    """The value as a view of itself."""
    atoms = [[Atom(d)] if d != 1 else [] for d in value.shape]
    return View(value, [list(a) for a in atoms], atoms)


def view_of(value: Value, scales: bool = False) -> View:
    """The longest chain of views above ``value`` (of scalings by numbers too, if ``scales``)."""
    chain: list[Node] = []
    base, factor = value, 1.0
    while base.node is not None:
        node = base.node
        step = scaling(node) if scales else None
        if node.is_a("reshape", "transpose", "broadcast_to"):
            base = node.inputs[0]
        elif step is not None:
            base, factor = step[0], factor * step[1]
        else:
            break
        chain.append(node)
    while True:
        view = trivial(base)
        view.scale = factor
        for i in reversed(range(len(chain))):
            if not _apply(view, chain[i]):  # a reshape that cuts across factors: look no further up than its result
                base, chain = chain[i].output, chain[:i]
                factor = 1.0
                for n in chain:
                    s = scaling(n)
                    factor *= s[1] if s is not None else 1.0
                break
        else:
            view.nodes = chain
            return view


def scaling(node: Node) -> tuple[Value, float] | None:
    """``(x, c)`` if the node is x * c or x / c of the same shape for a number c."""
    if not node.is_a("mul", "div"):
        return None
    x, y = node.inputs
    c = number_of(y)
    if c is None and node.is_a("mul"):
        x, c = y, number_of(x)
    if c is None or x.type != node.output.type or (node.is_a("div") and c == 0):
        return None
    return x, (c if node.is_a("mul") else 1 / c)


def _apply(view: View, node: Node) -> bool:
    if isinstance(node.attrs, Transpose.Attrs):
        view.axes = [view.axes[i] for i in node.attrs.perm]
        return True
    if node.is_a("broadcast_to"):
        old, shape = node.inputs[0].shape, node.output.shape
        extra = len(shape) - len(old)
        axes: list[list[Atom]] = []
        for i, d in enumerate(shape):
            if i >= extra and (old[i - extra] != 1 or d == 1):
                axes.append(view.axes[i - extra])
            else:
                axes.append([Atom(d, broadcast=True)] if d != 1 else [])
        view.axes = axes
        return True
    return _reshape(view, node.output.shape) if node.is_a("reshape") else True


def _reshape(view: View, shape: Sequence[DimLike]) -> bool:
    """Deals the atoms out to the new axes in order, splitting where a new axis ends inside one."""
    axes: list[list[Atom]] = []
    todo = [a for axis in view.axes for a in axis]
    for d in shape:
        axis: list[Atom] = []
        while d != 1:
            if not todo:
                return False
            a = todo[0]
            if equal(a.size, d) is True:
                axis.append(todo.pop(0))
                d = 1
            elif (rest := _quotient(d, a.size)) is not None:  # the axis holds more than this atom
                axis.append(todo.pop(0))
                d = rest
            elif (rest := _quotient(a.size, d)) is not None:  # the atom holds more than this axis
                parts = view.split(a, (d, rest))
                todo[:1] = parts
            else:
                return False
        axes.append(axis)
    if todo:
        return False
    view.axes = axes
    return True


def _quotient(a: DimLike, b: DimLike) -> DimLike | None:
    """a / b where it is exact for every binding, and b is no trivial factor."""
    if b == 1:
        return None
    if isinstance(a, int) and isinstance(b, Dim):
        return None
    q = a // b
    return q if equal(q * b, a) is True else None


def product(atoms: Sequence[Atom]) -> DimLike:
    """Size of an axis made of these atoms."""
    n: DimLike = 1
    for a in atoms:
        n = n * a.size
    return n


def arrange(b: Builder, view: View, groups: Sequence[Sequence[Atom]]) -> Value:
    """Emits the base with its atoms in this order, each group one axis. All data atoms must be there once."""
    order = [a for axis in view.base_axes for a in axis]
    flat = [a for g in groups for a in g]
    assert sorted(map(id, order)) == sorted(map(id, flat)), "atoms were lost"
    x = b.reshape(view.base, shape=tuple(a.size for a in order))
    x = b.transpose(x, perm=tuple(next(i for i, o in enumerate(order) if o is a) for a in flat))
    return b.reshape(x, shape=tuple(product(g) for g in groups))
