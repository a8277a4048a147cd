"""Two programs of one model, before and after passes: matched at the values that both have, by name, and fed the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from wasat.driver import Progress, quiet
from wasat.ir import Array, Node, QTensorType, TensorType, Value

from .bounds import UNITS, bounds_of, numbers, once, walk
from .found import Difference, Stage, difference
from .fragments import fragment, slice_to
from .nodes import CLOSEST, Run

MEANT = "weights in fewer bits"


class Across:
    """A run of the one program beside the graph of the other.

    Every value of ``b`` that ``a`` has too, by name and shape, is held against it, and then replaced by it: what follows is
    computed from what ``a`` had. A value whose name stayed but whose meaning changed (a factor moved past it) is told from one
    that is wrong: the values after it come out right where it stays as it is.
    """

    def __init__(self, a: Run, b: Run) -> None:
        self.a, self.b = a, b
        named = {v.name: v for v in a.values}
        self.both: dict[Value, Value] = {}
        for node in b.graph.nodes:
            for v in node.outputs:
                u = named.get(v.name)
                made = u is not None and u.node is not None and "source" not in (u.node.op.kind, node.op.kind)
                if u is not None and made and _alike(a.values[u], b.values[v]):
                    self.both[v] = u
        outputs = dict(zip(a.graph.output_names, a.graph.outputs))
        for name, v in zip(b.graph.output_names, b.graph.outputs):
            if name in outputs and v.node is not None and _alike(a.values[outputs[name]], b.values[v]):
                self.both[v] = outputs[name]

    def compare(self, tell: Progress = quiet) -> Stage:
        a, b = self.a, self.b
        stage = Stage(f"@{b.graph.name}, value by value: {len(self.both)} that both programs have")
        env: dict[Value, Array] = {v: a_value for v, a_value in b.values.items() if v.node is None}
        free, beyond = set[Value](), set[Value]()
        compared: list[Difference] = []
        total, done = len(b.graph), 0

        def visit(node: Node, operands: list[Array], results: tuple[Array, ...]) -> list[Array]:
            nonlocal done
            tell("comparing values", done := done + 1, total)
            kept = []
            for v, x in zip(node.outputs, results):
                u = self.both.get(v)
                if u is not None and beyond & self._read(v, free):
                    stage.skipped.append(f"%{v.name} = {node.op.name}: the type of an operand does not hold what a has")
                    x = _as(a.values[u], x)
                elif u is not None:
                    d = self._held(v, x, free)
                    if d.differs and not d.note and self._means_another(v, free):
                        free.add(v)
                    else:
                        compared.append(d)
                        x = _as(a.values[u], x)
                        if np.isfinite(numbers(a.values[u])).all() and not np.isfinite(numbers(x)).all():
                            beyond.add(v)
                kept.append(x)
            return kept

        walk(b.graph, env, b.sizes, visit)
        stage.values = len(compared)
        stage.meant = sorted((d for d in compared if d.note), key=lambda d: -d.error)
        stage.differences = [d for d in compared if d.differs and not d.note]
        stage.closest = sorted((d for d in compared if not d.differs and not d.note), key=lambda d: -d.ratio)[:CLOSEST]
        return stage

    def _held(self, v: Value, x: Array, free: set[Value]) -> Difference:
        """A value of ``b``, computed from what ``a`` had, beside ``a``'s."""
        u = self.both[v]
        before, after = self._nodes(v, free)
        want = numbers(self.a.values[u])
        unit = max(map(unit_of, (*before, *after)), default=0.0)
        d = difference(v, u.name, self.a.values[u], x, once(self.a.values[u], u, unit), tuple(after))
        if d.differs and fewer_bits(after) - fewer_bits(before):
            with np.errstate(all="ignore"):
                relative = float(np.sqrt(np.sum((numbers(x) - want) ** 2) / np.sum(want.astype(np.float64) ** 2)))
            return replace(d, note=MEANT, error=relative)
        return difference(v, u.name, self.a.values[u], x, self._bound(v, free), tuple(after)) if d.differs else d

    def _nodes(self, v: Value, free: set[Value]) -> tuple[list[Node], list[Node]]:
        """What computes a value in ``a`` and in ``b``, from values that both have."""
        cut = self.both.keys() - free
        return slice_to([self.both[v]], {self.both[w] for w in cut}), slice_to([v], cut)

    def _read(self, v: Value, free: set[Value]) -> set[Value]:
        return {w for n in self._nodes(v, free)[1] for w in n.inputs}

    def _bound(self, v: Value, free: set[Value]) -> NDArray[np.float64]:
        """What either way to compute a value may be off by. Halves beside f32: how errors spread, f32's draws say."""
        before, after = self._nodes(v, free)
        widest = max(map(unit_of, (*before, *after)), default=0.0)
        found = [np.zeros(self.b.values[v].shape)]
        for run, value, nodes in ((self.a, self.both[v], before), (self.b, v, after)):
            if nodes:
                part, read = fragment("part", nodes, [value], run.sizes)
                given = {w.name: run.values[w] if run is self.a else self._given(w) for w in read}
                [own] = bounds_of(part, given, run.params, run.sizes)
                found.append(own * (widest / max(map(unit_of, nodes))))
        return np.asarray(np.maximum.reduce(found))

    def _given(self, w: Value) -> Array:
        """What ``a`` had for a value of ``b``."""
        u = self.both.get(w)
        return self.b.values[w] if u is None else _as(self.a.values[u], self.b.values[w])

    def _means_another(self, v: Value, free: set[Value]) -> bool:
        """Whether all values computed of ``v`` next, that both programs have, come out right when it stays as ``b`` has it."""
        next_ones, between, front = dict[Value, None](), {v}, [v]
        while front:
            made = [w for x in front for user in x.users for w in user.outputs]
            next_ones.update((w, None) for w in made if w in self.both and w not in free)
            front = [w for w in dict.fromkeys(made) if w not in between and (w not in self.both or w in free)]
            between.update(front)
        if not next_ones or any(self.b.graph.is_output(w) for w in between):
            return False
        return all(self._right(w, free | {v}) for w in next_ones)

    def _right(self, w: Value, free: set[Value]) -> bool:
        """Whether ``w`` is ``a``'s, computed from what ``a`` had but for ``free``, which are computed as ``b`` does."""
        part, read = fragment("after", self._nodes(w, free)[1], [w], self.b.sizes)
        env: dict[Value, Array] = {p: self._given(r) for p, r in zip(part.inputs, read)}
        env |= {p: self.b.params[k] for k, p in part.params.items()}
        [y] = walk(part, env, self.b.sizes, lambda node, operands, results: results)
        u = self.both[w]
        return not difference(w, u.name, self.a.values[u], y, self._bound(w, free)).differs


def fewer_bits(nodes: Sequence[Node]) -> set[str]:
    """What of it rounds by design: quantized parameters, and activations that become integers."""
    reading = [n for n in nodes if any(isinstance(v.type, QTensorType) for v in n.inputs)]
    names = {v.param for n in reading for v in n.inputs if v.param is not None and isinstance(v.type, QTensorType)}
    return names | {f"activations in {a}" for n in reading if (a := getattr(n.attrs, "activation", None)) is not None}


def _alike(x: Array, y: Array) -> bool:
    """Arrays that can be held against each other: of one shape, both floats or both not."""
    if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray) or x.shape != y.shape:
        return False
    return (x.dtype.kind in "biu") == (y.dtype.kind in "biu")


def _as(x: Array, like: Array) -> Array:
    """The numbers of ``x`` in the type of ``like``."""
    assert isinstance(x, np.ndarray)
    assert isinstance(like, np.ndarray)
    with np.errstate(over="ignore"):
        return x if x.dtype == like.dtype else x.astype(like.dtype)


def unit_of(node: Node) -> float:
    """The coarsest rounding among the floats that a node reads and makes."""
    types = [v.type for v in (*node.inputs, *node.outputs) if isinstance(v.type, TensorType) and v.type.dtype.is_float]
    return max([UNITS.get(t.dtype, 2.0**-4) for t in types], default=2.0**-24)


def compare_programs(a: Run, b: Run, tell: Progress = quiet) -> Stage:
    """Of two runs of one model on the same inputs, what differs beyond rounding: see :class:`Across`."""
    return Across(a, b).compare(tell)


def outputs_of(a: Run, results: Mapping[str, Array], bounds: Sequence[NDArray[np.float64]]) -> list[Difference]:
    """The whole graph's outputs beside another side's, by name; each side computed on its own."""
    found = []
    for name, v, bound in zip(a.graph.output_names, a.graph.outputs, bounds, strict=True):
        if name in results and _alike(a.values[v], results[name]):
            found.append(difference(v, name, a.values[v], results[name], bound))
    return found


def unlike(a: Mapping[str, Array], b: Mapping[str, Array]) -> list[str]:
    """Outputs that cannot be held against each other, and why."""
    found = [f"{n}: {side} has none" for side, own, other in (("b", b, a), ("a", a, b)) for n in other if n not in own]
    pairs = {n: (a[n], b[n]) for n in a if n in b and not _alike(a[n], b[n])}
    return found + [f"{n}: a has {_type(x)}, b has {_type(y)}" for n, (x, y) in pairs.items()]


def _type(x: Array) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else f"{x}"
