"""What stands before the first token: a begin of text, a soft prompt, the features of a picture, joined to the tokens' own.

Of each value along the joined sequence, the part in front is the same whatever the tokens are: it is computed apart, once, and
the rest runs along the tokens alone. Only causal attention reads both: the keys and values in front come to stand first in its
cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wasat.ir import Builder, DimLike, Graph, IRError, Node, Value, equal, symbol
from wasat.ir.dims import symbols_of
from wasat.ir.ops.attention import AttentionAttrs
from wasat.ir.ops.constant import Iota
from wasat.ir.ops.shape import Concat, Slice

from ..analyses.axis import image
from ..analyses.sequence import LooksAhead


@dataclass
class Led:
    """A graph along its tokens alone. ``first``: of each attention that has some, the keys and values of the positions in
    front, at most ``lead``: [1 | b, positions, heads, features]. ``seen``: what a mask over tokens says of these, where it
    hides some: [.., queries, positions]."""

    graph: Graph
    lead: int
    first: dict[Node, tuple[Value, Value]]
    seen: dict[Value, Value] = field(default_factory=dict)

    def fixed(self) -> list[Value]:
        """What must not depend on tokens."""
        return [v for pair in self.first.values() for v in pair]


def split(graph: Graph, tokens: str) -> Led | None:
    """``graph`` without what stands before the tokens of the input ``tokens``; None where nothing does, or it does not fit.

    Raises IRError where the number of positions in front is not known.
    """
    own = next(v for v in graph.inputs if v.name == tokens)
    for one_row in (True, False):  # the same in front of all rows; else of each its own
        with contextlib.suppress(LooksAhead):
            return _Split(graph, own, one_row).run()
    return None


@dataclass(frozen=True)
class _Along:
    """Where a value runs along the sequence, and how many elements stand before those of tokens."""

    axis: int
    lead: DimLike


@dataclass
class _Split:
    old: Graph
    tokens: Value
    one_row: bool
    new: Graph = field(init=False)
    env: dict[Value, Value] = field(default_factory=dict)
    """The parts along the tokens; what does not run along them, as it is."""
    front: dict[Value, Value] = field(default_factory=dict)
    """The parts in front, and what they are made of: for one row, where all rows have the same in front."""
    along: dict[Value, _Along] = field(default_factory=dict)
    after: set[Value] = field(default_factory=set)
    """What is made of the last token."""
    first: dict[Node, tuple[Value, Value]] = field(default_factory=dict)
    joined: bool = False

    def run(self) -> Led | None:
        self.new = Graph(self.old.name)
        self.b = Builder(self.new)
        self.seq = str(self.tokens.shape[1])
        batch = self.tokens.shape[0]
        self.rows: dict[str, DimLike] = {str(batch): 1} if self.one_row and not isinstance(batch, int) else {}
        for v in self.old.inputs:
            self.env[v] = self.new.add_input(v.name, v.type)
            if (at := self._runs(v)) is not None:
                self.along[v] = at
            elif not self.one_row:
                self.front[v] = self.env[v]
        for name, v in self.old.params.items():
            self.env[v] = self.front[v] = self.new.add_param(name, v.type)
            self.new.rename(self.env[v], v.name)
        for node in self.old.nodes:
            self.b.loc = node.loc
            self._node(node)
        self.new.set_outputs([self.env[v] for v in self.old.outputs], self.old.output_names)
        leads = [k.shape[1] for k, _ in self.first.values()]
        if not self.joined:
            return None
        known = [n for n in leads if isinstance(n, int)]
        if len(known) < len(leads):
            n = next(n for n in leads if not isinstance(n, int))
            raise IRError(
                f"no KV cache can be derived: {n} positions stand before the first token, and a cache is as large as their "
                f"number; give that in the types of the inputs, in place of {', '.join(symbols_of([n]))}"
            )
        return Led(self.new, max(known, default=0), self.first)

    def _runs(self, v: Value) -> _Along | None:
        axes = [i for i, d in enumerate(v.shape) if self.seq in symbols_of([d])]
        if not axes:
            return None
        lead = v.shape[axes[0]] - symbol(self.seq)
        if len(axes) > 1 or self.seq in symbols_of([lead]):
            raise LooksAhead(f"%{v.name} does not run along the sequence on one axis")
        return _Along(axes[0], lead)

    # -- nodes -----------------------------------------------------------------------------------------------------------------
    def _node(self, node: Node) -> None:
        given = [self.along[v] for v in node.inputs if v in self.along]
        if any(v in self.after for v in node.inputs):
            if given or self.seq in node.attrs.symbols:
                raise LooksAhead("what stands at the last token meets the sequence")
            self._emit(node, self.env, {})
            self.after.update(node.outputs)
        elif not given:
            self._made(node)
        elif isinstance(node.attrs, Concat.Attrs) and any(
            self.along[v].axis == node.attrs.axis for v in node.inputs if v in self.along
        ):
            self._join(node, node.attrs)
        elif isinstance(node.attrs, Slice.Attrs) and self._cut(node, node.attrs, given[0]):
            pass
        elif isinstance(node.attrs, AttentionAttrs) and node.inputs[1] in self.along:
            self._attend(node)
        else:
            ends = {_Along(image(node, node.axes, i, self.along[v].axis), self.along[v].lead)
                    for i, v in enumerate(node.inputs) if v in self.along}  # fmt: skip
            if len(ends) != 1:
                raise LooksAhead("operands run along the sequence on several axes")
            self._both(node, ends.pop())

    def _emit(self, node: Node, env: dict[Value, Value], sizes: Mapping[str, DimLike]) -> None:
        names = [v.name for v in node.outputs] if env is self.env else None
        made = self.new.add_node(node.op, [env[v] for v in node.inputs], node.attrs.bind(sizes), loc=node.loc, names=names)
        env.update(zip(node.outputs, made.outputs))

    def _both(self, node: Node, at: _Along) -> None:
        """The same along the tokens, and in front."""
        self._emit(node, self.env, {self.seq: symbol(self.seq) - at.lead} if at.lead != 0 else {})
        for v in node.outputs:
            found = self._runs(v)
            if found != at:
                raise LooksAhead(f"%{v.name} does not run along the sequence as its operands do")
            self.along[v] = at
        if at.lead != 0:
            if any(v not in self.front for v in node.inputs):
                raise LooksAhead("what stands in front depends on inputs")
            self._emit(node, self.front, {self.seq: 0, **self.rows})

    def _made(self, node: Node) -> None:
        """What reads nothing along the sequence: it may count, or repeat something, along it."""
        if self.seq not in node.attrs.symbols:
            self._emit(node, self.env, {})
            if not self.one_row:
                self.front.update((v, self.env[v]) for v in node.outputs)
            elif all(v in self.front for v in node.inputs):
                self._emit(node, self.front, self.rows)
            return
        at = self._runs(node.outputs[0])
        if at is None:
            raise LooksAhead("it depends on the number of tokens")
        if not isinstance(node.attrs, Iota.Attrs):
            if not any(f.role == "repeated" for f in node.axes.result[at.axis]):
                raise LooksAhead("it depends on the number of tokens")
            self._both(node, at)
            return
        v, dtype = node.output, node.attrs.dtype
        self.along[v] = at
        count = self.b.iota(size=self.tokens.shape[1], dtype=dtype, name=v.name)
        self.env[v] = count
        if at.lead != 0:
            self.env[v] = self.b.add(count, self.b.dim_size(size=at.lead, dtype=dtype))
            self.front[v] = self.b.iota(size=at.lead, dtype=dtype)

    def _join(self, node: Node, attrs: Concat.Attrs) -> None:
        """Something put in front of the sequence."""
        *before, x = node.inputs
        v = node.output
        if x not in self.along or any(u in self.along or u not in self.front for u in before):
            raise LooksAhead("it joins parts of the sequence otherwise than in front")
        at = self._runs(v)
        if at is None or at.axis != attrs.axis:
            raise LooksAhead("it joins parts of the sequence otherwise than in front")
        self.along[v], self.env[v] = at, self.env[x]
        parts = [self.front[u] for u in before] + ([self.front[x]] if self.along[x].lead != 0 else [])
        self.front[v] = parts[0] if len(parts) == 1 else self.b.concat(*parts, axis=attrs.axis)
        self.joined = True

    def _cut(self, node: Node, attrs: Slice.Attrs, at: _Along) -> bool:
        """Whether a slice takes the tokens' part, with some of what is in front or not, or the last token."""
        x, v, axis = node.inputs[0], node.output, at.axis
        size, low, high = x.shape[axis], attrs.starts[axis], attrs.stops[axis]
        if (low, attrs.steps[axis]) == (0, 1) and equal(high, size) is True:
            return False  # of other axes
        if attrs.steps[axis] != 1 or equal(high, size) is not True:
            raise LooksAhead("it takes a part of the sequence")
        rest: Any = attrs.bind({self.seq: symbol(self.seq) - at.lead})
        if equal(low, size - 1) is True:
            self.env[v] = self.b.slice(self.env[x], starts=rest.starts, stops=rest.stops, steps=rest.steps, name=v.name)
            self.after.add(v)
            return True
        left = at.lead - low
        if (isinstance(left, int) and left < 0) or self.seq in symbols_of([low]) or (left != 0 and not isinstance(left, int)):
            raise LooksAhead("it takes a part of the sequence")
        starts = tuple(0 if i == axis else d for i, d in enumerate(rest.starts))
        stops = tuple(self.tokens.shape[1] if i == axis else d for i, d in enumerate(rest.stops))
        self.env[v] = self.b.slice(self.env[x], starts=starts, stops=stops, steps=rest.steps, name=v.name)
        self.along[v] = _Along(axis, left)
        if left != 0:
            own: Any = attrs.bind({self.seq: 0, **self.rows})
            self.front[v] = self.b.slice(self.front[x], starts=own.starts, stops=own.stops, steps=own.steps)
        return True

    def _attend(self, node: Node) -> None:
        q, k, v, *mask = node.inputs
        at = [self.along.get(x) for x in (q, k, v)]
        if at[0] is None or at[0] != at[1] or at[1] != at[2] or at[0].axis != 1 or any(m in self.along for m in mask):
            raise LooksAhead("its operands run along the sequence otherwise than in front")
        if at[0].lead != 0 and mask:
            raise LooksAhead("it has a mask")
        self._emit(node, self.env, {})
        self.along[node.output] = at[0]
        if at[0].lead != 0:
            made = self.env[node.output].node
            assert made is not None
            self.first[made] = self.front[k], self.front[v]
            self._emit(node, self.front, {})
