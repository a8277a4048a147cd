"""Rewrites from patterns. A pattern is a traced Python function; this engine owns everything the rules should not repeat.

    class FuseSilu(Rewrite):
        \"\"\"x * sigmoid(x) -> silu(x)\"\"\"
        name, landmark = "fuse-silu", "sigmoid"

        def pattern(self, p, x):
            return p.mul(x, p.sigmoid(x))

        def build(self, b, m):
            return b.silu(m["x"])

The engine tries both orders of commutative operands, refuses matches whose inner values are used elsewhere or whose
replacement has another type, keeps the name and the line of what was replaced, and says for every ``landmark`` operation
that it leaves what stopped the attempt that got farthest.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from wasat.ir import Builder, DType, Graph, Node, TypeMismatch, Value, op_named
from wasat.ir.op import Op

from .core import GraphPass, PassError, Remarks


class Mismatch(Exception):
    """Raised by ``build`` where a match must not be rewritten; the reason becomes a remark."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """Matches values; equal objects must match equal values."""


@dataclass(frozen=True, eq=False)
class Var(Pattern):
    """Any value."""

    name: str


@dataclass(frozen=True, eq=False)
class Number(Pattern):
    """A constant whose elements are all one number; captured as a float."""

    name: str
    value: float | None = None


@dataclass(frozen=True, eq=False)
class Apply(Pattern):
    """An operation; an attribute is given as a value, or as a predicate ``(attribute, node) -> bool``."""

    op: Op
    args: tuple[Pattern, ...]
    attrs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Either(Pattern):
    """The first of the options that matches."""

    options: tuple[Pattern, ...]


@dataclass(frozen=True, eq=False)
class Shared(Pattern):
    """Like ``inner``, whose values may also be used elsewhere (a table of cosines that several layers read)."""

    inner: Pattern


@dataclass(frozen=True, eq=False)
class Named(Pattern):
    """``inner``, whose value is captured under a name: for rules that look at a node's attributes."""

    name: str
    inner: Pattern


class Tracer:
    """What ``pattern`` functions get as ``p``: operations, numbers, alternatives."""

    def number(self, x: Var) -> Number:
        """A constant number, captured under the name of ``x``."""
        return Number(x.name)

    def either(self, *options: Pattern) -> Pattern:
        return Either(options)

    def maybe_cast(self, x: Pattern) -> Pattern:
        """``x``, or ``x`` cast to any type."""
        return Either((Apply(op_named("cast"), (x,), {}), x))

    def shared(self, x: Pattern) -> Pattern:
        """``x``, whose values may also be used elsewhere."""
        return Shared(x)

    def named(self, name: str, x: Pattern) -> Pattern:
        """``x``, captured as ``name``."""
        return Named(name, x)

    def __getattr__(self, name: str) -> Callable[..., Pattern]:
        if name.startswith("_"):
            raise AttributeError(name)
        op = op_named(name)

        def apply(*args: Pattern | float, **attrs: Any) -> Pattern:
            known = [f.name for f in dataclasses.fields(op.Attrs)]
            if unknown := [k for k in attrs if k not in known]:
                raise PassError(f"pattern: {name} has no attribute {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
            return Apply(op, tuple(map(_pattern, args)), attrs)

        return apply


def _pattern(x: Pattern | float) -> Pattern:
    return x if isinstance(x, Pattern) else Number("", float(x))


def last_axis(axes: Any, node: Node) -> bool:
    """Predicate for ``axes``/``axis`` attributes: only the last axis."""
    last = len(node.inputs[0].shape) - 1
    return bool(axes == (last,) or axes == last)


def number_of(v: Value) -> float | None:
    """The number that a constant consists of, or None. -0.0 and NaN are no numbers here.

    Of an f32 it is the shortest decimal that rounds to it: 1e-6 stays 1e-6.
    """
    array = v.const
    if array is None or array.size == 0 or (array.size > 1 and not (array == array.flat[0]).all()):
        return None
    first = array.flat[0]
    x = float(str(first)) if array.dtype == np.float32 else float(first)
    return None if math.isnan(x) or (x == 0 and math.copysign(1, x) < 0) else x


@dataclass(frozen=True)
class _State:
    bound: Mapping[Pattern, Value | float] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    open: frozenset[Value] = frozenset()
    """Values that may be used outside the match."""


class Match(dict[str, Any]):
    """Captures by name: values, and floats for numbers."""

    root: Value
    nodes: tuple[Node, ...]


class Rewrite(GraphPass):
    """One pattern and what replaces it. Rules hold no state of a match."""

    in_bodies = True

    landmark: ClassVar[str | tuple[str, ...]] = ""
    """The operation by which a reader would recognize the pattern: each one at which an attempt failed is reported."""

    def pattern(self, p: Tracer, *variables: Any) -> Pattern:
        raise NotImplementedError

    def build(self, b: Builder, m: Match) -> Value:
        """The replacement; raises Mismatch to refuse."""
        raise NotImplementedError

    def is_landmark(self, node: Node) -> bool:
        """Whether ``node`` is a ``landmark``; for operations that are common, say what makes one of them worth a remark."""
        return node.is_a(*(self.landmark if isinstance(self.landmark, tuple) else (self.landmark,)))

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        return run_rules((self,), graph, remarks)

    def rewrite(self, graph: Graph, attempt: Attempt) -> Iterator[Value]:
        """Rewrites every match in one sweep; yields what was put in."""
        names = [n for n in inspect.signature(self.pattern).parameters if n != "p"]
        root = self.pattern(Tracer(), *(Var(n) for n in names))
        starts = set(_starts(root))
        attempt.is_landmark = self.is_landmark
        for node in graph.nodes:
            if node.op in starts and len(node.outputs) == 1:
                yield from self._apply(graph, node, root, attempt)

    def _apply(self, graph: Graph, node: Node, root: Pattern, attempt: Attempt) -> Iterator[Value]:
        old = node.output
        for state in attempt.match(root, old, _State()):
            reason = _outside_use(graph, state, old)
            if reason is None:
                m = Match()
                m.root, m.nodes = old, state.nodes
                for p, v in state.bound.items():
                    if isinstance(p, (Var, Number, Named)) and p.name:
                        m[p.name] = v
                last = node.prev
                try:
                    new = self.build(Builder(graph, before=node, loc=node.loc), m)
                    if new.type != old.type:
                        raise Mismatch(f"the replacement would be {new.type}, not {old.type}")
                except (Mismatch, TypeMismatch) as e:  # an operation that does not take these types is no replacement
                    reason = str(e)
                    _erase_back(graph, node.prev, last)
            if reason is not None:
                attempt.note(state, reason)
                continue
            replace(graph, old, new, rename=new.node in between(last, node.prev))
            yield new
            return


class Rewrites(GraphPass):
    """Several rewrites as one pass: each sweeps once, in order."""

    in_bodies = True

    rules: ClassVar[tuple[Rewrite, ...]]

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        return run_rules(self.rules, graph, remarks)


def run_rules(rules: Iterable[Rewrite], graph: Graph, remarks: Remarks) -> bool:
    """Sweeps ``graph`` once with each rule; reports what stands in the end, and why landmarks were left."""
    attempt = Attempt()
    made = dict.fromkeys(v for rule in rules for v in rule.rewrite(graph, attempt))
    for v in made:
        if v.node is None or not v.node.erased:
            remarks.applied(f"%{v.name} = {v.node.op.name if v.node is not None else 'input'}", v)
    for landmark, (_, reason) in attempt.misses.items():
        if not landmark.erased:
            remarks.missed(f"{landmark!r}: {reason}", landmark)
    return bool(made)


def _starts(pattern: Pattern) -> Iterator[Op]:
    """The operations that the pattern's root may be."""
    if isinstance(pattern, Apply):
        yield pattern.op
    elif isinstance(pattern, Either):
        for option in pattern.options:
            yield from _starts(option)
    elif isinstance(pattern, (Shared, Named)):
        yield from _starts(pattern.inner)


def _erase_back(graph: Graph, node: Node | None, stop: Node | None) -> None:
    """Erases what a refused build left between ``stop`` and ``node``."""
    while node is not None and node is not stop:
        before = node.prev
        graph.erase(node)
        node = before


def replace(graph: Graph, old: Value, new: Value, rename: bool = True) -> None:
    """``new`` takes the uses and (``rename``) the name of ``old``; what nobody reads any more goes."""
    if new is old:
        return
    graph.replace_uses(old, new)
    name = old.name
    if old.node is not None:
        erase_dead(graph, old.node)
        if rename and old.node.erased and new.node is not None and new.const is None:
            graph.rename(new, name)


def between(first: Node | None, last: Node | None) -> set[Node]:
    """The nodes after ``first``, up to and including ``last``."""
    found = set()
    while last is not None and last is not first:
        found.add(last)
        last = last.prev
    return found


@contextmanager
def taken_back(graph: Graph, node: Node) -> Iterator[None]:
    """Where Mismatch is raised within, which goes on, what was emitted in front of ``node`` is erased again."""
    before = node.prev
    try:
        yield
    except Mismatch:
        while (made := node.prev) is not before:
            assert made is not None
            graph.erase(made)
        raise


def erase_dead(graph: Graph, node: Node, spare: Container[Value] = ()) -> None:
    """Erases ``node`` and, upwards, whatever only it needed, but for what makes one of ``spare``."""
    stack = [node]
    while stack:
        n = stack.pop()
        if n.erased or any(v.uses or graph.is_output(v) or v in spare for v in n.outputs):
            continue
        graph.erase(n)
        stack += [v.node for v in n.inputs if v.node is not None]


def _outside_use(graph: Graph, state: _State, root: Value) -> str | None:
    inside = set(state.nodes)
    for n in state.nodes:
        for v in n.outputs:
            if v is root or v in state.open:
                continue
            if graph.is_output(v):
                return f"%{v.name} is also an output of the graph"
            if any(user not in inside for user, _ in v.uses):
                return f"%{v.name} is also used outside the match"
    return None


class Attempt:
    """The matcher, and the farthest failure at every landmark."""

    def __init__(self) -> None:
        self.is_landmark: Callable[[Node], bool] = lambda node: False
        self.misses: dict[Node, tuple[int, str]] = {}

    def note(self, state: _State, reason: str, at: Value | None = None) -> None:
        """Remembers why a match ended, at the landmarks in it and at or just above the value it ended at."""
        near = () if at is None or at.node is None else (at.node, *(v.node for v in at.node.inputs))
        for n in (*state.nodes, *near):
            if n is not None and self.is_landmark(n) and len(state.bound) > self.misses.get(n, (0, ""))[0]:
                self.misses[n] = (len(state.bound), reason)

    def match(self, pattern: Pattern, value: Value, state: _State) -> Iterator[_State]:
        if isinstance(pattern, Either):
            for option in pattern.options:
                yield from self.match(option, value, state)
            return
        if isinstance(pattern, Shared):
            known = len(state.nodes)
            for s in self.match(pattern.inner, value, state):
                shared = frozenset(v for n in s.nodes[known:] for v in n.outputs)
                yield _State(s.bound, s.nodes, s.open | shared)
            return
        if isinstance(pattern, Named):
            for s in self.match(pattern.inner, value, state):
                yield _State({**s.bound, pattern: value}, s.nodes, s.open)
            return
        if isinstance(pattern, Number):
            yield from self._number(pattern, value, state)
            return
        if pattern in state.bound:
            if state.bound[pattern] is value:
                yield state
            else:
                self.note(state, f"%{value.name} and {_text(state.bound[pattern])} are not the same value")
            return
        bound = {**state.bound, pattern: value}
        if isinstance(pattern, Var):
            yield _State(bound, state.nodes, state.open)
            return
        assert isinstance(pattern, Apply)
        node = value.node
        if node is None or node.op is not pattern.op or len(node.outputs) != 1:
            self.note(state, f"%{value.name} is {node.op.name if node else 'an input'}, not {pattern.op.name}", value)
            return
        if len(node.inputs) != len(pattern.args):
            self.note(state, f"{node!r}: expected {len(pattern.args)} operands")
            return
        for key, want in pattern.attrs.items():
            got = getattr(node.attrs, key)
            if not (want(got, node) if callable(want) else got == want):
                self.note(state, f"{node!r}: {key} is {got}")
                return
        inner = _State(bound, (*state.nodes, node), state.open)
        for operands in _orders(node):
            yield from self._operands(pattern.args, operands, inner)

    def _operands(self, args: tuple[Pattern, ...], values: tuple[Value, ...], state: _State) -> Iterator[_State]:
        if not args:
            yield state
            return
        for s in self.match(args[0], values[0], state):
            yield from self._operands(args[1:], values[1:], s)

    def _number(self, pattern: Number, value: Value, state: _State) -> Iterator[_State]:
        x = number_of(value)
        if x is None:
            self.note(state, f"%{value.name} is no constant number", value)
        elif pattern.value is not None and not _is_near(x, pattern.value, value.tensor.dtype):
            self.note(state, f"%{value.name} is {x:g}, not {pattern.value:g}")
        elif state.bound.get(pattern, x) != x:
            self.note(state, f"%{value.name} is {x:g}, not {_text(state.bound[pattern])} as elsewhere")
        else:
            yield _State({**state.bound, pattern: x}, state.nodes, state.open)


def _is_near(x: float, want: float, dtype: DType) -> bool:
    """Whether ``x`` is the number as its type holds it (in half precision, 1.001 is not 1)."""
    rounded = float(np.asarray(want).astype(dtype.np)) if dtype.is_float else want
    return math.isclose(x, rounded, rel_tol=1e-6)


def _text(x: Value | float) -> str:
    return f"%{x.name}" if isinstance(x, Value) else f"{x:g}"


def _orders(node: Node) -> Iterator[tuple[Value, ...]]:
    yield node.inputs
    if node.op.commutative and len(node.inputs) == 2 and node.inputs[0] is not node.inputs[1]:
        yield node.inputs[::-1]
