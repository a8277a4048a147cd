"""One more axis in front: an operation applied to many operands at once, by its axis rule."""

from __future__ import annotations

from collections.abc import Sequence

from .axes import Axes, AxisRule, Factor
from .checks import collect_checks
from .dims import DimLike
from .errors import DimError, TypeMismatch
from .op import Attrs, Op
from .types import TensorType, Type


def lift(op: Op, attrs: Attrs, types: Sequence[Type], which: Sequence[bool], size: DimLike, own: bool = True) -> Attrs | None:
    """Attributes with which ``op`` takes the operands ``which`` with an axis of this size in front, each slice as before.

    ``own``: the results get that axis in front too; else it is the first of those that they have. None where it cannot.
    """
    given = [_in_front(t, size) if up else t for t, up in zip(types, which)]
    changed = attrs.in_front(size) if which[0] else attrs  # axes and shapes are those of the first operand
    try:
        with collect_checks() as checks:
            before, rule = _tuple(op.infer(attrs, *types)), op.axes(attrs, *types)
        with collect_checks() as more:
            after, lifted = _tuple(op.infer(changed, *given)), op.axes(changed, *given)
    except (TypeMismatch, DimError):
        return None
    if len(more) > len(checks):  # it stands where another axis is
        return None
    wanted = tuple(_in_front(t, size) if own else t for t in before)
    return changed if after == wanted and _same_but_in_front(rule, lifted, which, own) else None


def _in_front(t: Type, size: DimLike) -> Type:
    return t.with_shape(size, *t.shape) if isinstance(t, TensorType) else t


def _tuple(made: Type | Sequence[Type]) -> tuple[Type, ...]:
    return tuple(made) if isinstance(made, Sequence) else (made,)


def _same_but_in_front(before: AxisRule, after: AxisRule, which: Sequence[bool], own: bool) -> bool:
    """Whether the one rule is the other with one free factor in front, the same for all that have it."""
    fronts = [axes[0] for axes, up in zip(after.operands, which) if up]
    fronts += [axes[0] if axes else () for axes in after.results]
    if len(set(fronts)) != 1 or len(fronts[0]) != 1 or fronts[0][0].role != "free":
        return False
    rest = [axes[1:] if up else axes for axes, up in zip(after.operands, which)]
    rest += [axes[1:] if own else axes for axes in after.results]
    known: dict[Factor, Factor] = {}
    if not all(_match(a, b, known) for a, b in zip([*before.operands, *before.results], rest)):
        return False
    return not own or fronts[0][0] not in known.values()


def _match(before: Axes, after: Axes, known: dict[Factor, Factor]) -> bool:
    """Whether axes are the same but for what their factors are called; ``known`` says how those correspond."""
    if [len(axis) for axis in before] != [len(axis) for axis in after]:
        return False
    for f, g in ((f, g) for a, b in zip(before, after) for f, g in zip(a, b)):
        if known.setdefault(f, g) is not g or (f.role, f.how, f.window) != (g.role, g.how, g.window):
            return False
    return True
