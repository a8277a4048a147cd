"""Experts that are modules of their own, summed one after the other: the same as one computation over their stacked weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from wasat.ir import Attrs, Builder, DimError, DimLike, Node, TypeMismatch, Value
from wasat.ir.lift import lift
from wasat.ir.ops.shape import Slice

from ..analyses.labels import is_view
from ..pattern import Mismatch
from .expert_shares import axis_of, chosen_by


def terms_of(node: Node) -> list[Value]:
    """What a chain of additions adds, if ``node`` is the last of it."""
    if not node.is_a("add") or (len(node.output.uses) == 1 and node.output.users[0].is_a("add")):
        return []
    found: list[Value] = []
    todo = [node.output]
    while todo:
        v = todo.pop()
        inner = v is node.output or (len(v.uses) == 1 and v.type == node.output.type)
        if inner and (more := v.made_by("add")) is not None:
            todo += more.inputs[::-1]
        else:
            found.append(v)
    return found


class Alike:
    """Which values are computed in the same way, but for the parameters, and for the one of ``sizes`` experts they are of."""

    def __init__(self, values: Iterable[Value], only: Collection[Value], sizes: Collection[int]) -> None:
        self.only, self.sizes = only, sizes
        self.kinds: dict[object, int] = {}
        self.known: dict[Value, int] = {}
        for v in values:  # in order: however deep a graph is
            self.kind(v)

    def kind(self, v: Value) -> int:
        """A number that values have in common."""
        if v not in self.known:
            what: tuple[object, ...] = (v,)
            if v in self.only or v.const is not None:
                what = (v.type,)
            elif v.node is not None:
                cut = self._cut(v.node)
                attrs = v.node.attrs if cut is None else (v.type, cut[0])
                what = (v.node.op, attrs, v.index, *map(self.kind, v.node.inputs))
            self.known[v] = self.kinds.setdefault(what, len(self.kinds))
        return self.known[v]

    def numbered(self, values: Sequence[Value]) -> dict[int, Value]:
        """Values of one kind by which expert they are of: the element that they read of an axis, or the number that a choice
        is compared with; of several for an expert the first. Empty where nothing tells."""
        seen, todo = set(), [tuple(values)]
        while todo:
            own = todo.pop()
            nodes = [v.node for v in own if v.node is not None and v not in self.only]
            if own in seen or len(nodes) < len(own) or (len(own) > 1 and len(set(own)) == 1):
                continue
            seen.add(own)
            found = [self._cut(node) or case_of(node) for node in nodes]
            numbers = [x[1] for x in found if x is not None]
            if len(numbers) == len(own) and (len(own) == 1 or len(set(numbers)) > 1):
                return dict(zip(numbers[::-1], values[::-1]))
            todo += list(zip(*(node.inputs for node in nodes)))[::-1]
        return {}

    def _cut(self, node: Node) -> tuple[int, int] | None:
        """Of one element of an axis of experts: the axis, and which."""
        if not node.is_a("slice"):
            return None
        a, shape = Slice.Attrs.of(node), node.inputs[0].shape
        cut = [i for i, (lo, hi, d) in enumerate(zip(a.starts, a.stops, shape)) if (lo, hi) != (0, d)]
        if len(cut) != 1 or node.output.shape[cut[0]] != 1 or shape[cut[0]] not in self.sizes:
            return None
        start = a.starts[cut[0]]
        return (cut[0], start) if isinstance(start, int) else None

    def cases(self, b: Builder, node: Node) -> list[Value]:
        """A chain of selects, each where one choice is another number, as terms of which one alone is not zero; what stands at
        its end is the case of the number that is left. Raises Mismatch where there are more numbers."""
        of = self._compared(node)
        chosen = chosen_by(of[0]) if of is not None else None
        user = node.output.users[0] if len(node.output.uses) == 1 else None
        if chosen is None or (user is not None and self._compared(user) == of and user.inputs[2] is node.output):
            return []
        found: dict[int, tuple[Value, Value]] = {}
        v: Value = node.output
        while (made := v.made_by("select")) is not None and self._compared(made) == of and v.type == node.output.type:
            case = case_of(made.inputs[0].node)
            assert case is not None
            found.setdefault(case[1], (made.inputs[0], made.inputs[1]))  # the outer one of equal ones
            v = made.inputs[2]
        kinds = {self.kind(expert) for _, expert in found.values()}
        count = chosen.inputs[0].shape[axis_of(chosen)]
        left = set(range(count)) - found.keys() if isinstance(count, int) else set()
        if len(left) == 1 and {self.kind(v)} == kinds:
            (number,) = left
            found[number] = _with_number(b, next(iter(found.values()))[0], number), v
        if len(kinds) > 1 or len(found) < 2:
            return []
        if len(found) != count or found.keys() != set(range(len(found))):
            raise Mismatch(f"cases {sorted(found)} are not all of the {count} that may be chosen")
        zero = b.constant(0.0, node.output.tensor.dtype)
        return [b.select(condition, expert, zero) for condition, expert in found.values()]

    def _compared(self, node: Node) -> tuple[Value, int] | None:
        """Of a select where a value is some number: the value, and a number for how it is compared."""
        case = case_of(node.inputs[0].node) if node.is_a("select") else None
        return (case[0], self.kind(node.inputs[0])) if case is not None else None


def _with_number(b: Builder, condition: Value, number: int) -> Value:
    """The same condition of another number."""
    node = condition.node
    assert node is not None
    if node.is_a("equal"):
        made = b.equal(*(v if v.const is None else b.constant(number, v.tensor.dtype) for v in node.inputs))
        return made if made.shape == condition.shape else b.reshape(made, shape=condition.shape)
    return b.graph.add_node(node.op, [_with_number(b, node.inputs[0], number)], node.attrs, before=b.before, loc=b.loc).output


def case_of(node: Node | None) -> tuple[Value, int] | None:
    """What is compared with a number for equality, whatever views follow, and the number."""
    while node is not None and is_view(node):
        node = node.inputs[0].node
    if node is None or not node.is_a("equal"):
        return None
    for v, x in (node.inputs, node.inputs[::-1]):
        if x.const is not None and x.const.size == 1 and x.const.dtype.kind in "iu":
            return v, int(x.const.reshape(()))
    return None


class Stack:
    """Values that are computed alike, as one value with an axis in front."""

    def __init__(self, b: Builder, size: int, only: set[Value]) -> None:
        self.b, self.size, self.only = b, size, only
        self.known: dict[tuple[Value, ...], tuple[Value, bool]] = {}

    def of(self, values: Sequence[Value]) -> tuple[Value, bool]:
        """One of them if they are all the same; else they in one, with an axis in front. Raises Mismatch."""
        key = tuple(values)
        if key not in self.known:
            self.known[key] = self._of(key)
        return self.known[key]

    def _of(self, values: tuple[Value, ...]) -> tuple[Value, bool]:
        first = values[0]
        if all(v is first for v in values):
            return first, False
        if any(v.type != first.type for v in values):
            raise Mismatch(f"%{first.name} and the same of another expert are of different types")
        constants = [v.const for v in values if v.const is not None]
        if len(constants) == len(values):
            if all(np.array_equal(c, constants[0]) for c in constants):
                return first, False
            return self.b.constant(np.stack(constants)), True
        elif all(v in self.only for v in values):
            return self._parameter(self.b.concat(*(self._in_front(v, 1) for v in values), axis=0)), True
        nodes = [v.node for v in values]
        head = nodes[0]
        if head is None or any(n is None or n.op is not head.op or len(n.inputs) != len(head.inputs) for n in nodes):
            raise Mismatch(f"%{first.name} is not computed as the same of another expert is")
        if head.is_a("slice") and all(n.inputs[0] is head.inputs[0] for n in nodes if n is not None):
            return self._slices([n for n in nodes if n is not None]), True
        if any(n.attrs != head.attrs or len(n.outputs) != 1 for n in nodes if n is not None):
            raise Mismatch(f"%{first.name} is not computed as the same of another expert is")
        operands = [self.of([n.inputs[i] for n in nodes if n is not None]) for i in range(len(head.inputs))]
        return (self._linear(operands) if head.is_a("linear") else self._lifted(head, operands)), True

    def _in_front(self, v: Value, size: DimLike) -> Value:
        return self._parameter(self.b.reshape(v, shape=(size, *v.shape)))

    def _parameter(self, v: Value) -> Value:
        self.only.add(v)
        return v

    def _slices(self, nodes: list[Node]) -> Value:
        """Elements of one axis, in order: that axis in front."""
        whole = nodes[0].inputs[0]
        found = [Slice.Attrs.of(n) for n in nodes]
        cuts = [i for i in range(len(whole.shape)) if len({a.starts[i] for a in found}) > 1]
        starts = [a.starts[cuts[0]] for a in found] if len(cuts) == 1 else []
        first = starts[0] if starts else None
        if not isinstance(first, int) or starts != list(range(first, first + self.size)):
            raise Mismatch(f"parts of %{whole.name} are not one for each expert")
        (axis,) = cuts
        every = list(zip(found[0].starts, found[0].stops, found[0].steps))
        others = [cut for i, cut in enumerate(every) if i != axis]
        if others != [(0, d, 1) for i, d in enumerate(whole.shape) if i != axis] or nodes[0].output.shape[axis] != 1:
            raise Mismatch(f"parts of %{whole.name} are not one for each expert")
        perm = (axis, *(i for i in range(len(whole.shape)) if i != axis))
        if whole.shape[axis] != self.size:
            stops = tuple(first + self.size if i == axis else d for i, d in enumerate(whole.shape))
            whole = self.b.slice(whole, starts=tuple(first if i == axis else 0 for i in range(len(stops))), stops=stops)
        turned = self.b.transpose(whole, perm=perm)
        return self.b.reshape(turned, shape=(self.size, *nodes[0].output.shape))

    def _aligned(self, v: Value, up: bool, rank: int) -> Value:
        """A stacked operand of an elementwise operation, its axes where those of the result are."""
        if not up or len(v.shape) == rank + 1:
            return v
        shape = (self.size, *(1,) * (rank + 1 - len(v.shape)), *v.shape[1:])
        made = self.b.reshape(v, shape=shape)
        return self._parameter(made) if v in self.only else made

    def _lifted(self, node: Node, operands: list[tuple[Value, bool]]) -> Value:
        which = [up for _, up in operands]
        if node.op.elementwise:
            rank = len(node.output.shape)
            return self._emit(node, [self._aligned(v, up, rank) for v, up in operands], node.attrs)
        attrs = lift(node.op, node.attrs, [v.type for v in node.inputs], which, self.size)
        if attrs is None:
            raise Mismatch(f"{node!r} cannot be computed for all experts at once")
        return self._emit(node, [v for v, _ in operands], attrs)

    def _emit(self, node: Node, operands: list[Value], attrs: Attrs) -> Value:
        try:
            made = self.b.graph.add_node(node.op, operands, attrs, before=self.b.before, loc=node.loc).output
        except (TypeMismatch, DimError) as e:
            raise Mismatch(str(e)) from None
        if made.shape != (self.size, *node.output.shape):
            raise Mismatch(f"{node!r} cannot be computed for all experts at once")
        return made

    def _linear(self, operands: list[tuple[Value, bool]]) -> Value:
        (x, up), (w, stacked), *bias = operands
        if not stacked or len(x.shape) - up < 2:
            raise Mismatch(f"%{w.name} is the same for all experts")
        e, n, k = w.shape
        rank = len(x.shape) - up
        turned = self._parameter(self.b.transpose(w, perm=(0, 2, 1)))
        turned = self._parameter(self.b.reshape(turned, shape=(e, *(1,) * (rank - 2), k, n)))
        y: Value = self.b.matmul(x, turned)
        for v, own in bias:
            y = self.b.add(y, self._aligned(v, own, rank))
        return y
