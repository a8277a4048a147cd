"""Batch, sequence and whatever was merged with them, kept apart: what is computed for each row is computed under both axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from wasat.ir import Attrs, Builder, DimError, DimLike, Graph, Node, TensorType, TypeMismatch, Value, equal
from wasat.ir.axes import product
from wasat.ir.checks import collect_checks
from wasat.ir.dims import symbols_of
from wasat.ir.lift import lift

from ..pattern import erase_dead


@dataclass(frozen=True)
class _Apart:
    """A value whose axis ``at`` merges rows, with ``count`` axes in the place of that one."""

    value: Value
    at: int
    count: int
    pad: int = 0
    """Axes of size 1 that are to stand in front."""

    @property
    def lead(self) -> tuple[DimLike, ...]:
        return self.value.shape[self.at : self.at + self.count]

    def one(self, size: DimLike) -> tuple[DimLike, ...]:
        """The shape with one axis of this size again."""
        shape = self.value.shape
        return (1,) * self.pad + (*shape[: self.at], size, *shape[self.at + self.count :])

    def in_front(self, b: Builder) -> Value:
        """All but the last of these axes in front."""
        v = b.reshape(self.value, shape=(1,) * self.pad + self.value.shape) if self.pad else self.value
        at = self.at + self.pad
        return _turned(b, v, [*range(at, at + self.count - 1), *range(at)]) if at else v

    def from_front(self, b: Builder) -> _Apart:
        """Of a value with all but the last of these axes in front: itself."""
        n = self.count - 1
        turned = _turned(b, self.value, [*range(n, n + self.at), *range(n)]) if self.at else self.value
        return replace(self, value=turned)


def _turned(b: Builder, v: Value, first: list[int]) -> Value:
    """With these axes first, of as many as there are before the others."""
    return b.transpose(v, perm=(*first, *range(len(first), len(v.shape))))


def rows_apart(graph: Graph) -> bool:
    """f(reshape(x)), where the reshape merges axes of unknown sizes -> reshape(f(x)), for every f of rows."""
    apart: dict[Value, _Apart] = {}
    changed = False
    for node in list(graph.nodes):
        b = Builder(graph, before=node, loc=node.loc)
        if node.is_a("reshape"):
            source = apart[node.inputs[0]].value if node.inputs[0] in apart else node.inputs[0]
            if source is not node.inputs[0]:
                graph.set_inputs(node, [source])
            shape = node.output.shape
            if (merged := _merged(source.shape, shape)) is not None:
                at, parts = merged
                whole = (*shape[:at], *parts, *shape[at + 1 :])
                apart[node.output] = _Apart(source if source.shape == whole else b.reshape(source, shape=whole), at, len(parts))
            continue
        made = _over(b, node, apart)
        if made is None:
            continue
        changed = True
        for old, new in zip(node.outputs, made):
            back = b.reshape(new.value, shape=old.shape)
            apart[back] = new
            graph.replace_uses(old, back)
        erase_dead(graph, node)
    for x in list(apart.values()):
        if x.value.node is not None and not x.value.node.erased:
            erase_dead(graph, x.value.node)
    return changed


def _merged(old: Sequence[DimLike], new: Sequence[DimLike]) -> tuple[int, tuple[DimLike, ...]] | None:
    """Which axis of the one several axes of the other are, and their sizes, if these are not known."""
    for at, whole in enumerate(new):
        for i in range(len(old)):
            if old[i] == 1 or equal(product(*old[:i]), product(*new[:at])) is not True:
                continue
            for parts in (old[i:end] for end in range(i + 2, len(old) + 1)):
                if parts[-1] != 1 and symbols_of(parts) and equal(product(*parts), whole) is True:
                    return at, tuple(parts)
    return None


def _over(b: Builder, node: Node, apart: dict[Value, _Apart]) -> list[_Apart] | None:
    """Results of ``node`` over operands whose rows are apart; None where it is no function of rows."""
    leads = {apart[v].lead for v in node.inputs if v in apart}
    if len(leads) != 1:
        return None
    (lead,) = leads
    for v in node.inputs:
        if v not in apart and (spread := _spread(b, v, lead)) is not None:
            apart[v] = spread
    which = [v in apart for v in node.inputs]
    rank = len(node.outputs[0].shape) if node.op.elementwise else 0  # what goes in front must not meet what is in front there
    parts = [replace(apart[v], pad=max(rank - len(v.shape), 0)) if v in apart else None for v in node.inputs]
    at = [None if x is None else x.at + x.pad for x in parts]
    types = [v.type if x is None else v.tensor.with_shape(*x.one(lead[-1])) for v, x in zip(node.inputs, parts)]
    attrs: Attrs | None = _of_part(node.attrs, product(*lead), lead[-1])
    assert attrs is not None
    try:
        with collect_checks() as checks:
            made = node.op.infer(attrs, *types)
            rule = node.op.axes(attrs, *types)
    except (TypeMismatch, DimError):
        return None
    results = list(made) if isinstance(made, Sequence) else [made]
    fronts = {axes[i] for axes, i in zip(rule.operands, at) if i is not None}
    rest = [f for axes, i in zip(rule.operands, at) for j, axis in enumerate(axes) if j != i for f in axis]
    if checks or len(fronts) != 1 or len(front := fronts.pop()) != 1 or front[0].role != "free" or front[0] in rest:
        return None
    to = [[j for j, axis in enumerate(axes) if front[0] in axis] for axes in rule.results]
    if any(len(places) != 1 or axes[places[0]] != front for places, axes in zip(to, rule.results)):
        return None
    if any(t.shape != (*v.shape[:j], lead[-1], *v.shape[j + 1 :]) for t, v, (j,) in zip(results, node.outputs, to)):
        return None
    for d in reversed(lead[:-1]):
        attrs = lift(node.op, attrs, types, which, d)
        if attrs is None:
            return None
        types = [t.with_shape(d, *t.shape) if isinstance(t, TensorType) and up else t for t, up in zip(types, which)]
    operands = [v if x is None else x.in_front(b) for v, x in zip(node.inputs, parts)]
    new = b.graph.add_node(node.op, operands, attrs, before=node, loc=node.loc, names=[v.name for v in node.outputs])
    return [_Apart(v, j, len(lead)).from_front(b) for v, (j,) in zip(new.outputs, to)]


def _spread(b: Builder, v: Value, lead: tuple[DimLike, ...]) -> _Apart | None:
    """``v``, if it repeats one thing for all rows, with these axes in place of theirs."""
    node = v.made_by("broadcast_to")
    if node is None:
        return None
    one = (1,) * (len(v.shape) - len(node.inputs[0].shape)) + tuple(node.inputs[0].shape)
    for at, (d, e) in enumerate(zip(v.shape, one)):
        if e == 1 and equal(d, product(*lead)) is True:
            source = b.reshape(node.inputs[0], shape=(*one[:at], *(1 for _ in lead), *one[at + 1 :]))
            return _Apart(b.broadcast_to(source, shape=(*v.shape[:at], *lead, *v.shape[at + 1 :])), at, len(lead))
    return None


def _of_part(attrs: Attrs, whole: DimLike, part: DimLike) -> Attrs:
    """Attributes for rows of another number."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(attrs):
        old = getattr(attrs, field.name)
        if field.name in ("shape", "stops") and old:
            changes[field.name] = tuple(part if equal(d, whole) is True else d for d in old)
    return replace(attrs, **changes) if changes else attrs
