"""The operands of attention by meaning: rows, heads, positions and features, wherever they stand; and its masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from wasat.ir import Builder, DimLike, DType, Node, Value, equal

from ..analyses.factors import Atom, View, arrange, product, trivial, view_of

_LEAST = float(np.finfo(np.float32).min)
"""Added to an f32 below 1e31, it stays what it is."""


class Miss(Exception):
    """The guard of a fusion that failed."""


@dataclass
class Heads:
    """Keys or values: the view, and its atoms by meaning."""

    view: View
    batch: list[Atom]
    heads: list[Atom]
    rows: list[Atom]
    columns: list[Atom]
    lead: list[list[Atom]]
    """The atoms of each axis before rows and columns, in their order."""

    def order(self) -> list[tuple[bool, str]]:
        """Rows and heads as they alternate before rows and columns: which it is, and how many."""
        flat = [a for axis in self.lead for a in axis]
        groups = groupby(flat, lambda a: isinstance(a.size, int))
        return [(known, str(product(list(atoms)))) for known, atoms in groups]

    def arranged(self, b: Builder, transposed: bool) -> Value:
        """[batch, position, head, feature]."""
        positions, features = (self.columns, self.rows) if transposed else (self.rows, self.columns)
        return arrange(b, self.view, (self.batch, positions, self.heads, features))


def operand(v: Value, lead: Sequence[DimLike], what: str, scales: bool, apart: bool, repeated: bool = False) -> Heads:
    """An operand [*lead, rows, columns] of a batched matrix product: its heads, repetitions taken away unless ``repeated``.

    The batch is the first axis; where rows are taken ``apart`` from heads wherever both stand, what has no known size.
    """
    view = view_of(v, scales)
    if (repeated or what == "q") and any(a.broadcast for axis in view.axes for a in axis):
        view = trivial(v)
    extra = len(lead) - (len(v.shape) - 2)
    axes: list[list[Atom]] = []
    for i, d in enumerate(lead):
        own = view.axes[i - extra] if i >= extra else []
        missing = d != 1 and (i < extra or v.shape[i - extra] == 1)
        axes.append([Atom(d, broadcast=True)] if missing else own)
    batch, heads = (axes[0] if axes else []), [a for axis in axes[1:] for a in axis]
    if apart:
        every = [a for axis in axes for a in axis]
        batch, heads = ([a for a in every if isinstance(a.size, int) is known] for known in (False, True))
    rows, columns = view.axes[-2], view.axes[-1]
    if any(a.broadcast for a in batch):
        raise Miss(f"%{v.name} ({what}) broadcasts over the batch")
    if any(a.broadcast for a in (*rows, *columns)):
        raise Miss(f"%{v.name} ({what}) broadcasts over positions or features")
    data = [i for i, a in enumerate(heads) if not a.broadcast]
    if data and data != list(range(len(data))):
        groups = product([heads[i] for i in data])
        raise Miss(f"%{v.name} ({what}): query head i reads head i mod {groups}, where attention takes consecutive ones")
    if what == "q" and len(data) != len(heads):
        raise Miss(f"%{v.name} (q) broadcasts over heads")
    return Heads(view, batch, heads[: len(data)], rows, columns, axes)


def operands(qk: Node, last: Node, repeated: bool = False) -> tuple[Heads, Heads, Heads, bool]:
    """q, k and v of the products ``qk`` and ``last``, and whether their rows had to be taken apart from heads.

    ``repeated``: heads of k and v are taken as they come, repeated or not.
    """
    (q, k), lead, v, out = qk.inputs, qk.output.shape[:-2], last.inputs[1], last.output.shape[:-2]
    trouble: Miss | None = None
    for apart in (False, True):
        try:
            found = (
                operand(q, lead, "q", True, apart), operand(k, lead, "k", True, apart, repeated),
                operand(v, out, "v", False, apart, repeated),
            )  # fmt: skip
        except Miss as e:
            trouble = trouble or e
            continue
        known = [a for a in found[0].batch if isinstance(a.size, int)]
        if not apart and known and any(not isinstance(a.size, int) for axis in found[0].lead for a in axis):
            continue  # rows and heads are one axis, or heads stand first
        orders = [x.order() for x in found]
        if not apart and equal(lead[0], out[0]) is not True:
            trouble = trouble or Miss(f"the batch is {lead[0]} in the scores and {out[0]} in the result")
        elif apart and orders.count(orders[0]) != 3:
            trouble = trouble or Miss("rows and heads are not in one order in q, k and v")
        else:
            return *found, apart
    if trouble is not None:
        raise trouble
    return operand(q, lead, "q", True, False), operand(k, lead, "k", True, False), operand(v, out, "v", False, False), False


def dealt(atoms: Sequence[Atom], shape: Sequence[DimLike]) -> list[list[Atom]] | None:
    """Which of the atoms, in order, make up each axis of ``shape``."""
    todo, axes = list(atoms), []
    for d in shape:
        own: list[Atom] = []
        while todo and equal(product(own), d) is not True:
            own.append(todo.pop(0))
        if equal(product(own), d) is not True:
            return None
        axes.append(own)
    return axes if not todo else None


@dataclass
class MaskPart:
    """One mask that stays data: boolean (perhaps negated) or additive (times a number); ``shape``: of the scores."""

    value: Value
    shape: tuple[DimLike, ...]
    negate: bool = False
    factor: float = 1.0
    blind: bool = False
    """Whether a query that sees nothing under this, or under another such mask, weighs all keys alike."""
    regrouped: bool = False
    """Whether rows and heads are not apart there, or heads come first."""


def check_masks(masks: Sequence[MaskPart], scores: Value, q: Heads, apart: bool) -> None:
    """Checks the masks that stay data, of scores as they come out of their product; nothing is emitted yet."""
    dtype = scores.tensor.dtype
    for p in masks:
        shape = p.shape
        own = (1,) * (len(shape) - len(p.value.shape)) + tuple(p.value.shape)
        heads = own[1:-2]
        p.regrouped = apart or equal(shape[0], scores.shape[0]) is not True
        if p.regrouped:
            if dealt([a for axis in q.lead for a in axis], shape[:-2]) is None:
                raise Miss(f"the mask %{p.value.name} meets scores whose rows and heads are not told apart")
        elif any(d != 1 for d in heads) and any(equal(a, c) is not True for a, c in zip(heads, shape[1:-2])):
            raise Miss(f"the mask %{p.value.name} is broadcast over some of the axes that make up the heads")
        if p.value.tensor.dtype.is_float and p.value.tensor.dtype is not dtype:
            raise Miss(f"the mask %{p.value.name} is {p.value.tensor.dtype}, queries and keys are {dtype}")


def _rows_and_heads(b: Builder, p: MaskPart, q: Heads) -> Value:
    """A mask of scores whose rows share an axis with heads, or come behind them, as [batch | 1, heads | 1, .., ..]."""
    own = (1,) * (len(p.shape) - len(p.value.shape)) + tuple(p.value.shape)
    order = [a for axis in q.lead for a in axis]
    axes = dealt(order, p.shape[:-2])
    assert axes is not None
    there = {id(a) for axis, d in zip(axes, own) if d != 1 for a in axis}
    x = b.reshape(p.value, shape=(*(a.size if id(a) in there else 1 for a in order), *own[-2:]))
    place = {id(a): i for i, a in enumerate(order)}
    x = b.transpose(x, perm=(*(place[id(a)] for a in (*q.batch, *q.heads)), len(order), len(order) + 1))
    lead = []
    for atoms in (q.batch, q.heads):
        lead += [a.size if any(id(u) in there for u in atoms) else 1 for a in atoms]
    x = b.broadcast_to(x, shape=(*lead, *own[-2:]))
    sizes = lead[: len(q.batch)], lead[len(q.batch) :]
    return b.reshape(x, shape=(*(_times(d) for d in sizes), *own[-2:]))


def _times(sizes: Sequence[DimLike]) -> DimLike:
    n: DimLike = 1
    for d in sizes:
        n = n * d
    return n


def emit_mask(b: Builder, parts: list[MaskPart], dtype: DType, q: Heads | None = None) -> Value:
    """One operand, [batch | 1, heads | 1, queries | 1, keys | 1]."""
    kept: dict[bool, Value] = {}
    total: Value | None = None
    for p in parts:
        own = (1,) * (len(p.shape) - len(p.value.shape)) + tuple(p.value.shape)
        if p.regrouped and q is not None:
            m = _rows_and_heads(b, p, q)
        else:
            m = b.reshape(p.value, shape=(own[0], _times(own[1:-2]), *own[-2:]))
        if p.value.tensor.dtype.is_float:
            m = m if p.factor == 1.0 else b.mul(m, p.factor)
            total = m if total is None else b.add(total, m)
        else:
            m = b.logical_not(m) if p.negate else m
            kept[p.blind] = b.logical_and(kept[p.blind], m) if p.blind in kept else m
    if True in kept:  # the least number takes up any score
        total = b.select(kept[True], b.constant(0.0, dtype) if total is None else total, b.constant(_LEAST, dtype))
    if total is None:
        return kept[False]
    return b.select(kept[False], total, b.constant(float("-inf"), dtype)) if False in kept else total


__all__ = ["Heads", "MaskPart", "Miss", "check_masks", "emit_mask", "operands"]
