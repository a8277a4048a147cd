"""What a turn of a scan makes of what it carries, as a sum of products of tensors over index variables.

    S * a[..., None, None] + k[..., None] * v[:, :, None]    ->    S[b,h,i,j] a[t,b,h]  +  k[t,b,h,i] v[t,b,h,j]

However it is spelt: sums of products, matrix products, transposes and axes of size 1 all come to the same. What does not
depend on the carry stands as it is, or (``fine``) as the product that it is: what the turn computes, or also what is computed
before.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from wasat.ir import DimLike, Graph, Node, TensorType, Value
from wasat.ir.axes import AxisRule, Factor
from wasat.ir.ops.scan import ScanAttrs

from ..pattern import number_of

TURN = 0
"""The index of the turn."""
Labels = tuple[int | None, ...]
"""An index variable for each axis; None for an axis of size 1."""
Part = tuple[Value, Labels]
Fine = Literal["no", "turn", "all"]
"""Which products are taken apart that do not depend on the carry."""
_MOST = 64  # terms


class NotLinear(Exception):
    """It is no sum of products that hold the carry once."""


@dataclass(frozen=True)
class Term:
    """``number`` times the product of ``parts``, summed over the variables that the result lacks."""

    number: float
    parts: tuple[Part, ...]


class Turn:
    """The terms of values in the body of a scan that carries one value. Operands stand for the inputs of the body."""

    def __init__(self, node: Node, fine: Fine) -> None:
        self.attrs, self.fine = ScanAttrs.of(node), fine
        self.body: Graph = self.attrs.body.graph
        self.state, self.next = self.body.inputs[0], self.body.outputs[0]
        self.operand = dict(zip(self.body.inputs, node.inputs))
        self.sliced = set(self.body.inputs[1 : 1 + self.attrs.slices])
        self.sizes: dict[int, DimLike] = {TURN: node.inputs[1].shape[0]}
        self._count = itertools.count(TURN + 1)
        self.depends = {self.state}
        for n in self.body.nodes:
            if any(v in self.depends for v in n.inputs):
                self.depends.update(n.outputs)

    def _divides(self, node: Node) -> bool:
        return self.fine == "all" or (self.fine == "turn" and node.outputs[0].graph is self.body)

    def fresh(self, size: DimLike) -> int | None:
        """An index over so many elements."""
        if size == 1:
            return None
        label = next(self._count)
        self.sizes[label] = size
        return label

    def of(self, v: Value, labels: Labels, through: bool = True) -> list[Term]:
        """The terms of ``v``; the next state is one itself, but where that is what is asked for (``through``)."""
        if v is self.state or (v is self.next and not through):
            return [Term(1.0, ((v, labels),))]
        number = number_of(v)
        if number is not None:
            return [Term(number, ())]
        if v in self.operand:
            return self.of(self.operand[v], (TURN, *labels) if v in self.sliced else labels, through)
        node, depends = v.node, v in self.depends
        if node is not None and (depends or self._divides(node) or node.op.kind == "view") and len(node.outputs) == 1:
            found = self._terms(node, labels, depends, through)
            if len(found) > _MOST:
                raise NotLinear(f"{node!r} is a sum of more than {_MOST} products")
            if found:
                return found
        if depends:
            raise NotLinear(f"{node!r} is not linear in what is carried")
        return [Term(1.0, ((v, labels),))]

    def _terms(self, node: Node, labels: Labels, depends: bool, through: bool) -> list[Term]:
        """Those of an operation that has some; else none."""
        kind = node.op.kind
        sums = node.is_a("add", "sub") and depends
        multiplies = node.is_a("mul", "neg") or (node.is_a("div") and number_of(node.inputs[1]) is not None)
        moves = kind == "view" and len(node.inputs) == 1
        contracts = (kind == "product" and node.op.factors == 2 and len(node.inputs) == 2) or kind == "reduction"
        if not (sums or multiplies or moves or contracts):
            return []
        if any(not isinstance(x.type, TensorType) or x.type.dtype is not self.state.tensor.dtype for x in node.inputs):
            return []
        given = self._operands(node, labels, depends)
        if given is None:
            return []
        terms = [self.of(x, own, through) for x, own in zip(node.inputs, given)]
        summed = {x for own in given for x in own if x is not None} - {x for x in labels if x is not None}
        if sums:
            return [*terms[0], *(terms[1] if node.is_a("add") else _times(terms[1], -1.0))]
        if node.is_a("neg"):
            return _times(terms[0], -1.0)
        if node.is_a("div"):
            return _times(terms[0], 1.0 / terms[1][0].number)
        if len(terms) == 1:
            return [self._counted(t, summed) for t in terms[0]]
        both = [Term(a.number * b.number, (*a.parts, *b.parts)) for a in terms[0] for b in terms[1]]
        if any(sum(v in (self.state, self.next) for v, _ in t.parts) > 1 for t in both):
            raise NotLinear(f"{node!r} multiplies what is carried by itself")
        return [self._counted(t, summed) for t in both]

    def _counted(self, term: Term, summed: set[int]) -> Term:
        """A term that is the same at each index of some of the variables over which it is summed is so many times itself."""
        for x in sorted(summed - {y for _, labels in term.parts for y in labels}):
            size = self.sizes[x]
            if not isinstance(size, int):
                raise NotLinear(f"what is the same {size} times is summed")
            term = Term(term.number * size, term.parts)
        return term

    def _operands(self, node: Node, labels: Labels, depends: bool) -> list[Labels] | None:
        """The variables of each operand, by the axis rule; None where that does not give one for each axis."""
        rule: AxisRule = node.axes
        known: dict[Factor, int | None] = {}
        for axis, label in zip(rule.result, labels):
            factors = [f for f in axis if f.size != 1]
            if len(factors) > 1 or any(f.role not in ("free", "repeated") for f in axis):  # padded, perhaps, from a size of 1
                return None
            known.update((f, label) for f in factors)
        found = []
        for axes in rule.operands:
            own: list[int | None] = []
            for axis in axes:
                factors = [f for f in axis if f.size != 1]
                if len(factors) > 1:
                    return None
                for f in factors:
                    if f not in known and (f.role != "reduced" or f.how != "sum" or not depends):
                        return None
                    if f not in known:
                        known[f] = self.fresh(f.size)
                own.append(known[factors[0]] if factors else None)
            found.append(tuple(own))
        return found


def _times(terms: list[Term], number: float) -> list[Term]:
    return [Term(t.number * number, t.parts) for t in terms]
