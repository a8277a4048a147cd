"""``nn.einsum`` with einops-like groups, lowered while tracing to reshape, transpose and matmul (or mul and sum).

nn.einsum("b s (g r) d, b t g d -> b (g r) s t", q, k)      # grouped-query scores
nn.einsum("b s d -> b s g d", x, g=4)                       # a new axis: repeats
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from wasat.ir import Dim, DimLike
from wasat.ir.dims import floordiv

from wasat import ir

from .tensor import Tensor, emit, fail

Axis = tuple[str, ...]  # one axis of a tensor: a name, or several that were merged, outermost first; () is the literal 1
_TOKEN = re.compile(r"\s*(?:([A-Za-z_]\w*)|(\()|(\))|(\.\.\.)|(1(?!\d)))")


@dataclass
class _Term:
    """A tensor with one name per axis."""

    x: Tensor
    names: list[str]


class _Einsum:
    def __init__(self, pattern: str, operands: Sequence[Tensor], sizes: dict[str, DimLike]) -> None:
        self.pattern = pattern
        self.sizes = dict(sizes)
        left, arrow, right = pattern.partition("->")
        if not arrow:
            self.fail("it has no '->'; write the axes of the result after one")
        texts = left.split(",")
        if len(texts) != len(operands):
            self.fail(f"it describes {len(texts)} operands, {len(operands)} are given")
        self.dots: list[str] | None = None
        self.inputs = [self.parse(t, x.rank) for t, x in zip(texts, operands)]
        self.output = self.parse(right, None)
        self.operands = operands

    def fail(self, message: str) -> NoReturn:
        fail(f"einsum {self.pattern!r}: {message}")

    def parse(self, text: str, rank: int | None) -> list[Axis]:
        """One side's axes; ``rank`` is the operand's (None for the result)."""
        axes: list[Axis] = []
        group: list[str] | None = None
        at, dots_at, seen = 0, -1, set[str]()
        while text[at:].strip():
            m = _TOKEN.match(text, at)
            if m is None:
                self.fail(f"cannot read {text[at:].strip()!r}; axes are names separated by spaces, groups stand in ( )")
            at = m.end()
            name, opening, closing, dots, one = m.groups()
            if name:
                if name in seen:
                    self.fail(f"axis {name} appears twice in {text.strip()!r}; take a diagonal with nn.where or nn.gather")
                seen.add(name)
                if group is None:
                    axes.append((name,))
                else:
                    group.append(name)
            elif opening and group is None:
                group = []
            elif closing and group is not None:
                axes.append(tuple(group))
                group = None
            elif dots and group is None and dots_at < 0:
                dots_at = len(axes)
            elif one and group is None:
                axes.append(())
            else:
                self.fail(f"misplaced {m.group().strip()!r} in {text.strip()!r}")
        if group is not None:
            self.fail(f"a ( is not closed in {text.strip()!r}")
        if dots_at >= 0:
            if rank is not None:
                found = [f"...{i}" for i in range(rank - len(axes))]
                if self.dots is not None and len(self.dots) != len(found):
                    self.fail(f"... stands for {len(self.dots)} axes in one operand and {len(found)} in another")
                self.dots = found
            axes[dots_at:dots_at] = [(n,) for n in self.dots or ()]
        if rank is not None and len(axes) != rank:
            word = text.strip()
            apart = f"; axes stand apart, {' '.join(word)!r}" if word.isalpha() and len(word) == rank else ""
            self.fail(f"{word!r} names {len(axes)} axes of an operand that has {rank}{apart}")
        return axes

    # -- sizes ---------------------------------------------------------------------------------------------------------
    def note(self, name: str, size: DimLike, where: str) -> None:
        known = self.sizes.setdefault(name, size)
        if ir.equal(known, size) is False:
            self.fail(f"axis {name} is {known} and, in {where}, {size}")

    def measure(self) -> None:
        """Finds every axis's size; a group with one unknown member gets it by division."""
        pending: list[tuple[Axis, DimLike, str]] = []
        for k, (axes, x) in enumerate(zip(self.inputs, self.operands)):
            where = f"operand {k + 1} {x.value!r}"
            for axis, size in zip(axes, x.shape):
                if len(axis) == 1:
                    self.note(axis[0], size, where)
                elif axis:
                    pending.append((axis, size, where))
                elif size != 1:
                    self.fail(f"an axis of {where} is written 1 and has size {size}")
        for axis, size, where in pending:
            unknown = [n for n in axis if n not in self.sizes]
            known: DimLike = 1
            for n in axis:
                known = known * self.sizes.get(n, 1)
            if len(unknown) > 1:
                self.fail(f"the sizes of {' and '.join(unknown)} in ({' '.join(axis)}) are unknown; give {unknown[0]}=...")
            if unknown:
                self.sizes[unknown[0]] = floordiv(size, known)
                known = known * self.sizes[unknown[0]]
            if ir.equal(known, size) is not True:
                factors = ", ".join(f"{n}={self.sizes[n]}" for n in axis)
                self.fail(f"({' '.join(axis)}) of {where} has size {size}, which {factors} does not make")
        for n in (n for axis in self.output for n in axis):
            if n not in self.sizes:
                self.fail(f"axis {n} of the result is in no operand; to repeat along it give its size: {n}=...")

    # -- lowering ------------------------------------------------------------------------------------------------------
    def shape(self, names: Sequence[str]) -> list[DimLike]:
        return [self.sizes[n] for n in names]

    def size(self, names: Sequence[str]) -> DimLike:
        total: DimLike = 1
        for n in names:
            total = total * self.sizes[n]
        return total

    def arrange(self, term: _Term, names: Sequence[str]) -> Tensor:
        """The term's tensor with axes in the order ``names``."""
        perm = [term.names.index(n) for n in names]
        return term.x if perm == sorted(perm) else term.x.transpose(*perm)

    def reduce(self, term: _Term, keep: set[str]) -> _Term:
        """Sums over the axes that are not kept."""
        gone = [i for i, n in enumerate(term.names) if n not in keep]
        return _Term(term.x.sum(axis=gone), [n for n in term.names if n in keep]) if gone else term

    def multiply(self, a: _Term, b: _Term, keep: set[str], order: list[str]) -> _Term:
        """The product of two terms summed over what they share and nobody needs later."""
        summed = [n for n in a.names if n in b.names and n not in keep]
        a, b = self.reduce(a, keep | {*summed}), self.reduce(b, keep | {*summed})
        free_a = [n for n in a.names if n not in b.names]
        free_b = [n for n in b.names if n not in a.names]
        result = sorted({*a.names, *b.names} - {*summed}, key=order.index)
        if not summed:
            return _Term(emit("mul", self.stretch(a, result), self.stretch(b, result)), result)
        # the last free axis of each side makes the matrix; the others are batch axes, of size 1 on the other side,
        # except a run of free axes of b that stays in place: that is one wide matrix
        columns = [n for n in result if n in free_b]
        if not (_run(columns, b.names) and _run(columns, result)):
            columns = columns[-1:]
        if _larger(self.size(summed), self.size(columns)):  # a is larger than the result: its axes stay in order
            result.sort(key=lambda n: a.names.index(n) if n in a.names else len(a.names))
        rows = [n for n in result if n in free_a][-1:]
        batch = [n for n in result if n not in rows and n not in columns]
        x = self.matrix(a, batch, rows, summed)
        y = self.matrix(b, batch, summed, columns)
        out = emit("matmul", x, y)
        names = [*batch, *rows, *columns]
        return _Term(out if len(rows) == len(columns) == 1 else out.reshape(*self.shape(names)), names)

    def matrix(self, term: _Term, batch: list[str], rows: list[str], columns: list[str]) -> Tensor:
        """``term`` as [batch axes (1 where it has none)..., rows, columns]; leading ones are left out."""
        own = [n for n in batch if n in term.names]
        x = self.arrange(term, [*own, *rows, *columns])
        lead: list[DimLike] = [self.sizes[n] if n in own else 1 for n in batch]
        while lead and batch[len(batch) - len(lead)] not in own:
            lead = lead[1:]
        if len(rows) == len(columns) == 1 and len(lead) == len(own):
            return x
        return x.reshape(*lead, self.size(rows), self.size(columns))

    def stretch(self, term: _Term, names: Sequence[str]) -> Tensor:
        """``term`` in the order ``names``, with axes of size 1 where it has none."""
        own = [n for n in names if n in term.names]
        x = self.arrange(term, own)
        at = names.index(own[0]) if own else len(names)
        shape = [self.sizes[n] if n in own else 1 for n in names[at:]]
        return x if len(shape) == len(own) else x.reshape(*shape)

    def run(self) -> Tensor:
        self.measure()
        order = list(dict.fromkeys([n for axis in self.output for n in axis] + list(self.sizes)))
        terms = []
        for axes, x in zip(self.inputs, self.operands):
            names = [n for axis in axes for n in axis]
            terms.append(_Term(x if all(len(a) == 1 for a in axes) else x.reshape(*self.shape(names)), names))
        wanted = [n for axis in self.output for n in axis]
        total = terms[0]
        for i, term in enumerate(terms[1:], 1):
            later = {n for t in terms[i + 1 :] for n in t.names}
            total = self.multiply(total, term, {*wanted, *later}, order)
        total = self.reduce(total, {*wanted})
        x = self.stretch(total, wanted)
        if any(n not in total.names for n in wanted):
            x = x.broadcast_to(*self.shape(wanted))
        if any(len(a) != 1 for a in self.output):
            x = x.reshape(*map(self.size, self.output))
        return x


def _larger(a: DimLike, b: DimLike) -> bool:
    """Whether ``a`` is likely the larger; a symbol is taken to be larger than a number."""
    return a > b if isinstance(a, int) and isinstance(b, int) else isinstance(a, Dim) and isinstance(b, int)


def _run(names: Sequence[str], within: Sequence[str]) -> bool:
    """Whether ``names`` stand next to each other, in order, in ``within``."""
    at = within.index(names[0]) if names else 0
    return list(within[at : at + len(names)]) == list(names)


def einsum(pattern: str, *operands: Tensor, **sizes: DimLike) -> Tensor:
    """Sums of products by named axes, e.g. ``"b s (g r) d, b t g d -> b (g r) s t"``.

    A parenthesised group is one axis of the tensor made of several, the first outermost; a size that cannot be
    deduced is given by keyword. ``1`` is an axis of size 1, ``...`` any further axes. Axes missing in the result are
    summed; axes only in the result repeat. All operands have one element type.
    """
    for x in operands:
        if not isinstance(x, Tensor):
            fail(f"einsum {pattern!r}: an operand is a Tensor, not {type(x).__name__}")
    if len({x.dtype for x in operands}) > 1:
        fail(f"einsum {pattern!r}: element types differ, {', '.join(str(x.dtype) for x in operands)}; cast one")
    return _Einsum(pattern, operands, sizes).run()
