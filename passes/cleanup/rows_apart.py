"""Batch, sequence and whatever was merged with them, kept apart: what is computed for each row is computed under both axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from wasat.ir import Attrs, Builder, DimError, DimLike, Graph, Node, TensorType, TypeMismatch, Value, equal
from wasat.ir.axes import product
from wasat.ir.checks import collect_checks
from wasat.ir.dims import symbols_of
from wasat.ir.lift import lift

from ..pattern import erase_dead


def rows_apart(graph: Graph) -> bool:
    """f(reshape(x)), where the reshape merges leading axes of unknown sizes -> reshape(f(x)), for every f of rows."""
    apart: dict[Value, tuple[Value, int]] = {}
    """Of a value: the same with its first axis as so many."""
    changed = False
    for node in list(graph.nodes):
        b = Builder(graph, before=node, loc=node.loc)
        if node.is_a("reshape"):
            source, _ = apart.get(node.inputs[0], (node.inputs[0], 0))
            if source is not node.inputs[0]:
                graph.set_inputs(node, [source])
            shape = node.output.shape
            if (m := _merged(source.shape, shape)) is not None:
                whole = (*source.shape[:m], *shape[1:])
                apart[node.output] = source if source.shape == whole else b.reshape(source, shape=whole), m
            continue
        made = _over(b, node, apart)
        if made is None:
            continue
        changed = True
        for old, (new, m) in zip(node.outputs, made):
            back = b.reshape(new, shape=old.shape)
            apart[back] = new, m
            graph.replace_uses(old, back)
        erase_dead(graph, node)
    for v, _ in list(apart.values()):
        if v.node is not None and not v.node.erased:
            erase_dead(graph, v.node)
    return changed


def _merged(old: Sequence[DimLike], new: Sequence[DimLike]) -> int | None:
    """How many leading axes of the one are the first axis of the other, if several are and their sizes are not known."""
    for m in range(2, len(old) + 1) if new else ():
        if sum(d != 1 for d in old[:m]) > 1 and symbols_of(old[:m]) and equal(product(*old[:m]), new[0]) is True:
            return m
    return None


def _over(b: Builder, node: Node, apart: dict[Value, tuple[Value, int]]) -> list[tuple[Value, int]] | None:
    """Results of ``node`` over operands whose rows are apart; None where it is no function of rows."""
    leads = {apart[v][0].shape[: apart[v][1]] for v in node.inputs if v in apart}
    if len(leads) != 1:
        return None
    (lead,) = leads
    for v in node.inputs:
        if v not in apart and (spread := _spread(b, v, lead)) is not None:
            apart[v] = spread, len(lead)
    which = [v in apart for v in node.inputs]
    types = [v.tensor.with_shape(lead[-1], *v.shape[1:]) if up else v.type for v, up in zip(node.inputs, which)]
    attrs: Attrs | None = _of_part(node.attrs, product(*lead), lead[-1])
    assert attrs is not None
    try:
        with collect_checks() as checks:
            made = node.op.infer(attrs, *types)
            rule = node.op.axes(attrs, *types)
    except (TypeMismatch, DimError):
        return None
    results = list(made) if isinstance(made, Sequence) else [made]
    fronts = {axes[0] for axes, up in zip(rule.operands, which) if up} | {axes[0] if axes else () for axes in rule.results}
    rest = [f for axes, up in zip(rule.operands, which) for axis in (axes[1:] if up else axes) for f in axis]
    if checks or len(fronts) != 1 or len(front := fronts.pop()) != 1 or front[0].role != "free" or front[0] in rest:
        return None
    if any(t.shape != (lead[-1], *v.shape[1:]) for t, v in zip(results, node.outputs)):
        return None
    for d in reversed(lead[:-1]):
        attrs = lift(node.op, attrs, types, which, d)
        if attrs is None:
            return None
        types = [t.with_shape(d, *t.shape) if isinstance(t, TensorType) and up else t for t, up in zip(types, which)]
    operands = [apart[v][0] if up else v for v, up in zip(node.inputs, which)]
    new = b.graph.add_node(node.op, operands, attrs, before=node, loc=node.loc, names=[v.name for v in node.outputs])
    return [(v, len(lead)) for v in new.outputs]


def _spread(b: Builder, v: Value, lead: tuple[DimLike, ...]) -> Value | None:
    """``v``, if it repeats one thing for all rows, with these axes in place of its first."""
    node = v.made_by("broadcast_to")
    if node is None or not v.shape or equal(v.shape[0], product(*lead)) is not True:
        return None
    one, shape = node.inputs[0], (*lead, *v.shape[1:])
    if len(one.shape) == len(v.shape):
        if one.shape[0] != 1:
            return None
        one = b.reshape(one, shape=one.shape[1:])
    return b.broadcast_to(one, shape=shape)


def _of_part(attrs: Attrs, whole: DimLike, part: DimLike) -> Attrs:
    """Attributes for rows of another number."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(attrs):
        old = getattr(attrs, field.name)
        if field.name in ("shape", "stops") and old and equal(old[0], whole) is True:
            changes[field.name] = (part, *old[1:])
    return dataclasses.replace(attrs, **changes) if changes else attrs
