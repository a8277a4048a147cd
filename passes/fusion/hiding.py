"""What stands between scores and their softmax and hides some of them: choices of minus infinity, numbers that are added.

    select(causal, scores, -inf)        an attribute
    scores + select(padding, 0, -inf)   a mask that is data
    select(padding, scores, -1e9)       the same, but a query that sees nothing weighs all keys alike: the least number is added
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from wasat.ir import DimLike, DType, Node, Value, equal, less_equal
from wasat.ir.ops.shape import Pad

from ..analyses.affine import Affine, empty
from ..analyses.factors import scaling
from ..analyses.indexing import Indexing
from ..analyses.labels import Atom, flat, peel
from ..analyses.mask import FINITE_FILL, LEAST_FILL, Mask, analyze, hidden_by, is_fill
from ..pattern import number_of
from .heads import Miss


def reaches_product(v: Value, depth: int = 12) -> bool:
    """Whether a matrix product stands above ``v``, within the operations that scores pass through."""
    n = v.node
    if n is None or depth == 0:
        return False
    if n.is_a("matmul"):
        return not is_given(n.inputs[1])
    through = {
        "cast": (0,), "reshape": (0,), "tanh": (0,), "div": (0,), "mul": (0, 1), "add": (0, 1), "sub": (0,), "select": (1, 2),
        "maximum": (0, 1),
    }  # fmt: skip
    return any(reaches_product(n.inputs[i], depth - 1) for i in through.get(n.op.name, ()))


def is_given(v: Value) -> bool:
    """Whether it is a parameter or a constant, turned or not: what is multiplied by it is a linear layer."""
    while v.node is not None and v.node.op.carries and len(v.node.inputs) == 1:
        v = v.node.inputs[0]
    return v.param is not None or v.const is not None


@dataclass
class Fill:
    """select(condition, scores, number), or the other way round."""

    condition: Value
    keep: bool
    number: float
    found: Mask
    sure: bool
    """Whether every query sees something under it."""


@dataclass
class Hidden:
    """What is hidden of scores, noted on the way up from their softmax: what comes first there acts last.

    ``whole``: no cache is derived afterwards, and a query that sees nothing may be given all values.
    """

    whole: bool
    mask: Mask = field(default_factory=Mask)
    additive: list[tuple[Value, float]] = field(default_factory=list)
    """Float masks, each with the number that multiplies it."""
    fills: list[Fill] = field(default_factory=list)
    """Choices of a finite number. Where some query sees nothing under them, all of them stay data."""
    met: dict[Value, tuple[DimLike, ...]] = field(default_factory=dict)
    """Masks, each with the shape of the scores where it meets them: with heads as they are grouped there."""
    filled: list[tuple[Value, bool]] = field(default_factory=list)
    """Once settled: conditions, and whether to negate them, of what is hidden by the least number."""

    def selected(self, node: Node, shape: tuple[DimLike, ...], factor: float, softcap: float | None) -> Value:
        """select(keep, scores, -inf), or the other way round: notes the mask, returns the scores."""
        condition, yes, no = node.inputs
        keep = is_fill(no) is not None
        fill = is_fill(no) if keep else is_fill(yes)
        scores = yes if keep else no
        if fill is None:
            raise Miss(f"{node!r}: neither choice is minus infinity")
        if scores.shape != node.output.shape:
            raise Miss(f"{node!r}: the scores are broadcast by the mask")
        _before_softcap(node, softcap)
        if factor <= 0 or fill * factor > LEAST_FILL:
            raise Miss(f"{node!r}: the mask is multiplied by {factor:g}")
        found = analyze(condition, shape, keep)
        if fill == float("-inf"):
            self._above_blind(node)
            self.mask.meet(found)
        else:
            self._fill(node, Fill(condition, keep, fill * factor, found, exact(found, fill, shape)))
        self._meet(shape)
        return scores

    def added(self, node: Node, shape: tuple[DimLike, ...], factor: float, softcap: float | None) -> Value:
        """scores + mask, or less it: notes the mask, returns the scores."""
        a, b = node.inputs
        if reaches_product(a) == reaches_product(b):
            raise Miss(f"{node!r}: cannot tell the scores from the mask")
        scores, addend = (a, b) if reaches_product(a) else (b, a)
        if scores.shape != node.output.shape:
            raise Miss(f"{node!r}: the scores are broadcast by the mask")
        _before_softcap(node, softcap)
        if node.is_a("sub"):
            if scores is b:
                raise Miss(f"{node!r}: the scores are subtracted")
            factor = -factor
        if may_hide(addend):
            self._above_blind(node)
        self._add(addend, shape, factor)
        self._meet(shape)
        return scores

    def zeroed(self, node: Node, shape: Sequence[DimLike]) -> Value | None:
        """The scores of scores * m, where m is 1, or 0 at what is hidden anyway."""
        for scores, m in (node.inputs, node.inputs[::-1]):
            if scores.shape == node.output.shape and reaches_product(scores) and not reaches_product(m):
                found, mask = analyze(m, shape), Mask()
                for other in (self.mask, *(f.found for f in self.fills)):
                    mask.meet(other)
                hides_more = found.causal > mask.causal or (found.window is not None and found.window < (mask.window or 0))
                unlimited = found.window is not None and mask.window is None
                return None if found.operands or hides_more or unlimited else scores
        return None

    def settle(self, product: Value) -> None:
        """At the product: which fills are attributes and which stay data. Miss where the operation would not give the same."""
        shape = product.shape
        if not self._blind:
            for f in self.fills:
                f.found.finite = True
                self.mask.meet(f.found)
            sure = all(sees_itself(*m, shape) for m in self.mask.operands) and not any(may_hide(v) for v, _ in self.additive)
            if self.mask.finite and not sure:
                raise Miss("a mask fills with a finite number beside one that is data: some query may see nothing; use -inf")
            return
        if product.tensor.dtype is not DType.F32:  # the least f16, and a score, is minus infinity
            raise Miss(f"{_nothing(self.fills[0].number)}, in {product.tensor.dtype}; use -inf")
        by_query = any(len(f.condition.shape) > 1 and f.condition.shape[-2] != 1 for f in self.fills)
        if self.mask.finite or (by_query and not self.whole):
            raise Miss(f"{_nothing(self.fills[0].number)}; use -inf")
        self.filled = [(f.condition, not f.keep) for f in self.fills]

    @property
    def _blind(self) -> bool:
        return not all(f.sure for f in self.fills)

    def _fill(self, node: Node, fill: Fill) -> None:
        """A query that sees nothing is left with what the last of its fills made of all scores: of one number, the mean."""
        self.fills.append(fill)
        if self._blind and (self.additive or self.mask.finite or len({f.number for f in self.fills}) > 1):
            raise Miss(f"{node!r}: {_nothing(fill.number)}; use -inf")

    def _above_blind(self, node: Node) -> None:
        """What is hidden by ``node`` and by a number that comes after it counts as much as what that number hides alone."""
        if self._blind:
            raise Miss(f"{node!r}: below it, {_nothing(self.fills[-1].number)}; use -inf")

    def _meet(self, shape: tuple[DimLike, ...]) -> None:
        masks = [v for v, _ in (*self.mask.operands, *self.additive)]
        masks += [v for f in self.fills for v in {f.condition, *(v for v, _ in f.found.operands)}]
        for v in masks:
            if self.met.setdefault(v, shape) != shape and masks.count(v) > 1:
                raise Miss(f"the mask %{v.name} is applied to heads in two groupings")

    def _add(self, addend: Value, shape: Sequence[DimLike], factor: float) -> None:
        """Notes what ``addend``, times ``factor``, hides of the scores; what more it does stays an operand."""
        read = hidden_by(addend, shape, factor)
        if read is not None and read[2] <= LEAST_FILL and read[1]:
            found, _, fill = read
            if exact(found, fill, shape):
                found.finite = fill != float("-inf")
                self.mask.meet(found)
                return
        choice = choice_of(addend)
        if choice is not None and factor > 0 and choice[2] * factor <= LEAST_FILL:
            found = analyze(choice[0], shape, choice[1])
            if exact(found, choice[2], shape):
                found.finite = choice[2] != float("-inf")
                self.mask.meet(found)
                return
        node = addend.node
        if node is not None and node.is_a("add") and any(hidden_by(v, shape, factor) is not None for v in node.inputs):
            for v in node.inputs:
                self._add(v, shape, factor)
            return
        if read is not None and read[2] == float("-inf"):  # whatever else it is: a bias, padding
            self.mask.meet(read[0])
        self.additive.append((addend, factor))


def _nothing(fill: float) -> str:
    return f"it fills with {fill:g}, and some query may see nothing"


def _before_softcap(node: Node, softcap: float | None) -> None:
    if softcap is not None:
        raise Miss(f"{node!r}: the mask is inside the softcap")


def exact(found: Mask, fill: float, shape: Sequence[DimLike]) -> bool:
    """Whether attention under ``found`` is what masking with ``fill`` gives.

    A query that sees nothing gives the mean of the values under a finite number, and 0 in the fused operation: where that can
    happen (masks that are data; unless every query sees itself), only -inf will do.
    """
    if fill == float("-inf"):
        return True
    return less_equal(shape[-2], shape[-1]) is True and all(sees_itself(v, negate, shape) for v, negate in found.operands)


def sees_itself(mask: Value, negate: bool, shape: Sequence[DimLike]) -> bool:
    """Whether a mask of scores of ``shape`` is known to be true (false, if ``negate``) where query and key are one token:
    comparisons of what is said of each, of document by document, and of positions."""
    return equal(shape[-2], shape[-1]) is True and mask.tensor.dtype is DType.BOOL and _on_diagonal(mask, not negate)


def _on_diagonal(v: Value, truth: bool) -> bool:
    node = v.node
    if len(v.shape) < 2 or node is None:
        return False
    if node.is_a("logical_not"):
        return _on_diagonal(node.inputs[0], not truth)
    if node.is_a("logical_and", "logical_or"):
        known = [_on_diagonal(u, truth) for u in node.inputs]
        return all(known) if node.is_a("logical_and") is truth else any(known)
    if node.is_a("reshape", "broadcast_to") and tuple(node.inputs[0].shape[-2:]) == tuple(v.shape[-2:]):
        return _on_diagonal(node.inputs[0], truth)
    if node.is_a(*_SAME, *_OTHER) and _alike(len(v.shape), *node.inputs):
        return node.is_a(*_SAME) is truth
    at, rank = Indexing(v.shape), len(v.shape)
    behind = Affine((0,) * (rank - 2) + (1, -1), 0)
    here = [p for p in at.pieces(v) if not empty([*p.where, behind, behind.scaled(-1)], at.shape(v))]
    return bool(here) and all(p.number == float(truth) for p in here)


_SAME, _OTHER = ("equal", "less_equal", "greater_equal"), ("not_equal", "less", "greater")
"""Comparisons that hold, and that do not, of two numbers that are the same."""


def _alike(rank: int, x: Value, y: Value) -> bool:
    """Whether x [.., s, 1] and y [.., 1, s] (or the other way round) say of each position the same number."""
    if x.tensor.dtype is not y.tensor.dtype or x.tensor.dtype.is_float:  # NaN is not equal to itself
        return False
    if len(x.shape) != rank or len(y.shape) != rank or 1 not in x.shape[-2:] or 1 not in y.shape[-2:]:
        return False
    atoms = [Atom(d if d != 1 else e) for d, e in zip(x.shape, y.shape)]
    atoms[-1] = atoms[-2]  # the position of both
    found = []
    for v in (x, y):
        labels = tuple((a,) if d != 1 else () for a, d in zip(atoms, v.shape))
        base, at = peel(v, labels)
        found.append((base, [flat(label) for label in at]))
    return found[0] == found[1]


def may_hide(v: Value) -> bool:
    """Whether a number that stands for minus infinity, or undoes one, is among those that ``v`` is chosen, moved and computed
    from."""
    seen, stack = {v}, [v]
    while stack:
        x = stack.pop()
        if x.const is not None and x.tensor.dtype.is_float and (np.abs(x.const.astype(np.float64)) >= -FINITE_FILL).any():
            return True
        node = x.node
        if node is None or not (node.op.elementwise or node.op.kind in ("view", "gather")):
            continue
        if node.is_a("pad") and abs(Pad.Attrs.of(node).value) >= -FINITE_FILL:
            return True
        stack += [u for u in node.inputs if u not in seen]
        seen.update(node.inputs)
    return False


def choice_of(v: Value) -> tuple[Value, bool, float] | None:
    """``(condition, keep, fill)`` if ``v`` is 0 where kept and minus infinity elsewhere.

    It is a choice between the two, or a number times a mask of 0 and 1: there the condition may be a mask of numbers, and the
    fill is finite.
    """
    n = v.node
    while n is not None and _aligned(n) and n.inputs[0].shape[-2:] == v.shape[-2:]:
        n = n.inputs[0].node
    if n is None:
        return None
    if n.is_a("select"):
        condition, yes, no = n.inputs
        for zero, fill, keep in ((yes, no, True), (no, yes, False)):
            x = is_fill(fill)
            if number_of(zero) == 0 and x is not None:
                return condition, keep, x
    step = scaling(n)
    if step is None or not float("-inf") < step[1] <= FINITE_FILL:  # 0 * -inf is NaN
        return None
    return step[0], False, step[1]


def _aligned(node: Node) -> bool:
    """Whether the operand, its axes aligned from the right, stands for the result (a reshape may move a batch onto heads)."""
    if node.is_a("reshape"):
        return _core(node.inputs[0].shape) == _core(node.output.shape)
    return node.is_a("cast", "broadcast_to")


def _core(shape: Sequence[DimLike]) -> tuple[DimLike, ...]:
    """The shape from its first axis on that is not of size 1."""
    first = next((i for i, d in enumerate(shape) if d != 1), len(shape))
    return tuple(shape[first:])


