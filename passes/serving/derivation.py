"""One derived graph under construction: the forward graph's nodes on the new tokens, what is kept threaded through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from wasat.ir import (
    Builder,
    DimLike,
    DType,
    Graph,
    IRError,
    Node,
    TensorType,
    Value,
    substitute,
)
from wasat.ir.axes import product
from wasat.ir.graph import copy_node
from wasat.ir.lift import lift
from wasat.ir.ops.attention import AttentionAttrs, mask_and_sink
from wasat.ir.ops.constant import Iota
from wasat.ir.ops.index import AxisAttrs
from wasat.ir.ops.scan import ScanAttrs
from wasat.ir.ops.shape import Slice

from ..analyses.axis import sees_ahead
from ..analyses.rows import FIRST, Place, repeats
from ..analyses.sequence import Label
from .blocks import behind, note_cut, without_padding
from .carry import run_carry, run_scan, run_sum
from .kept import all_positions, attend, in_place, meet, meets, over_slots, rows_first, run_window
from .plan import Cache, Plan


def declare(g: Graph, plan: Plan, inputs: set[Value], sizes: dict[str, DimLike]) -> dict[Value, Value]:
    env: dict[Value, Value] = {}
    for v in plan.forward.inputs:
        if v in inputs:
            env[v] = g.add_input(v.name, v.type.substitute(sizes))
    for name, v in plan.forward.params.items():
        env[v] = g.add_param(name, v.type)
        g.rename(env[v], v.name)
    return env


class Derivation:
    """One derived graph under construction.

    ``env`` holds values over all new tokens; ``rows``, in prefill, values at each row's last token: once nothing mixes
    tokens any more, only that one goes on.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan, self.labels = plan, plan.labels
        self.one = name == "decode"
        self.g = Graph(name)
        self.b = Builder(self.g)
        self.sizes: dict[str, DimLike] = {plan.seq: 1} if self.one else {}
        self.env = declare(self.g, plan, {v for v in plan.forward.inputs if self._reads(v)}, self.sizes)
        self.rows: dict[Value, Value] = {}
        self.keyed: dict[tuple[Value, int, tuple[int, int] | None], Value] = {}
        self.later: Value | None = None
        self.seen: dict[Value, Value] = {}
        self.batch = plan.tokens.shape[0]
        per_row = TensorType(DType.I64, (self.batch,))
        self.past = self.g.add_input("past", per_row)
        self.last = None if self.one else self.g.add_input("last", per_row)
        for v, memory in plan.memory.items():
            self.env[v] = self.g.add_input(memory, v.type)
        self.states: dict[str, Value] = {}
        for cache in plan.of.values():
            for n, t in zip(cache.names(), cache.types(self.batch, plan.capacity)):
                self.states[n] = self.g.add_input(n, t)
            for n, t in cache.firsts():
                self.states[n] = self.g.add_input(n, t.with_shape(self.batch, cache.sinks, *t.shape[2:]))
        for kept in plan.kept.values():
            self.states[kept.name] = self.g.add_input(kept.name, kept.type)

    def run(self) -> Graph:
        plan = self.plan
        tail = plan.last_mixing is None
        for node in plan.forward.nodes:
            label = self.labels[node.outputs[-1]]  # a scan's carry comes first
            self.b.loc = node.loc
            if label.kind == "fixed":
                if not any(v in plan.memory for v in node.outputs) and all(v in self.env for v in node.inputs):
                    copy_node(self.g, node, self.env)
            elif label.kind in ("ahead", "pair", "scores"):
                continue  # no output needs it; what sums over keys emits its own
            elif label.mixes and (step := self._step(node)) is not None:
                step(node)
            elif label.kind == "last":
                self._after_last(node)
            elif tail and not self.one and label.kind == "token":
                self._apply(node, [self._row(v) for v in node.inputs], {plan.seq: 1}, self.rows)
            else:
                short = max(0, -label.valid)  # of a part of the sequence, there is all that is new
                sizes = {plan.seq: substitute(plan.tokens.shape[1], self.sizes) + short} if short else self.sizes
                self._apply(node, [self.env[v] for v in node.inputs], sizes, self.env)
            tail = tail or node is plan.last_mixing
        if (kept := plan.kept.get(plan.tokens)) is not None and self.states[kept.name].node is None:
            all_positions(self, plan.tokens)  # nothing reads it
        outputs = [self._output(v) for v in plan.forward.outputs]
        names = list(plan.forward.output_names)
        if self.seen:
            first, *others = self.seen.values()
            for x in others:
                first = self.b.logical_or(first, x)
            outputs.append(first)
            names.append(plan.cut)
        self.g.set_outputs([*outputs, *self.states.values()], [*names, *self.states])
        return self.g

    def _step(self, node: Node) -> Callable[[Node], None] | None:
        """How a node that needs more of earlier positions than its own goes on from what is kept."""
        if isinstance(node.attrs, AttentionAttrs):
            cache = self.plan.of.get(node)
            return self._attend if cache is not None and not cache.sinks else partial(attend, self)
        if meets(self.plan, node):
            return partial(meet, self)
        if isinstance(node.attrs, ScanAttrs):
            return partial(run_scan, self)
        if node.op.recurrence:
            return partial(run_carry, self)
        kept = self.plan.kept.get(node.output)
        if kept is None or kept.kind == "full":
            return None
        return partial(run_sum if kept.kind == "carry" else run_window, self)

    def size(self, label: Label) -> DimLike:
        """How many elements a value has along the sequence."""
        return substitute(self.plan.tokens.shape[1], self.sizes) + label.extra - min(label.valid, 0)

    def is_later(self) -> Value:
        """Whether a slot is that of a later position than a query's: [rows, queries, slots]."""
        if self.later is None:
            b, n = self.b, self.size(Label("token"))
            query = b.add(b.reshape(self.past, shape=(self.batch, 1, 1)), b.reshape(b.iota(size=n), shape=(n, 1)))
            self.later = b.less(query, b.iota(size=self.plan.capacity))
        return self.later

    def _reads(self, v: Value) -> bool:
        """Whether an input is needed beside what @encode makes of it."""
        return self.labels[v].along or any(self.labels[o].served for n in v.users for o in n.outputs)

    # -- nodes ---------------------------------------------------------------------------------------------------------
    def _apply(self, node: Node, inputs: list[Value], sizes: dict[str, DimLike], env: dict[Value, Value]) -> None:
        """The node over the new tokens. Positions differ between rows: values made of them gain a batch axis in front."""
        label = self.labels[node.outputs[0]]
        names = [v.name for v in node.outputs]
        if node.is_a("iota"):
            at = self.b.iota(size=substitute(Iota.Attrs.of(node).size, sizes))
            at = self.b.add(self.b.reshape(self.past, shape=(self.batch, 1)), at, name=names[0])
            dtype = Iota.Attrs.of(node).dtype
            env[node.output] = at if dtype is DType.I64 else self.b.cast(at, dtype=dtype)
            return
        lifted = [self.labels[v].lifted for v in node.inputs]
        if node.is_a("rope") and lifted[1] and (at := self.plan.places.get(node.inputs[0])) is not None and at.axis == 2:
            env[node.output] = self._turned(node, inputs, at)
            return
        env.update(zip(node.outputs, self.node(node, inputs, node.attrs.bind(sizes), lifted, label.lifted)))

    def _after_last(self, node: Node) -> None:
        """What is made of the last token: here, of each row's."""
        x = node.inputs[0]
        if not self.labels[x].along:
            copy_node(self.g, node, self.env)
            return
        row, cut, axis = self.env[x] if self.one else self._row(x), Slice.Attrs.of(node), self.labels[x].axis
        starts = tuple(0 if i == axis else d for i, d in enumerate(cut.starts))
        stops = tuple(1 if i == axis else d for i, d in enumerate(cut.stops))
        self.env[node.output] = self.b.slice(row, starts=starts, stops=stops, steps=cut.steps, name=node.output.name)

    def _turned(self, node: Node, inputs: list[Value], at: Place) -> Value:
        """A rotation of [heads, position, rows, feature]: at positions of the rows, which have to be in front."""
        if not at.alone:
            raise IRError(f"{node!r}: its rows are merged with heads", node.loc)
        x = self.b.transpose(inputs[0], perm=(2, 1, 0, 3))
        y = self.g.add_node(node.op, [x, *inputs[1:]], node.attrs, loc=node.loc, names=[node.output.name]).output
        return self.b.transpose(y, perm=(2, 1, 0, 3))

    def offset(self, node: Node, inputs: list[Value], attrs: Any, lifted: list[bool], own: bool) -> tuple[list[Value], Any]:
        """Operands and attributes for a node of whose operands some are lifted, as is (``own``) its result."""
        if not any(lifted):
            return inputs, attrs
        rank, at = len(node.output.shape), FIRST if own else self.plan.places.get(node.output, FIRST)
        masked = isinstance(node.attrs, AttentionAttrs) and not own and not any(lifted[:3])
        if node.op.elementwise or masked or node.is_a("take_along"):  # they broadcast
            return [self.spread(v, x, rank + own, at) if up else x for v, x, up in zip(node.inputs, inputs, lifted)], attrs
        if node.op.kind == "view" and len(inputs) > 1:  # each operand as the result is
            if own:
                inputs = [x if up else self.b.broadcast_to(self.b.reshape(x, shape=(1, *x.shape)), shape=(self.batch, *x.shape))
                          for x, up in zip(inputs, lifted)]  # fmt: skip
                lifted = [True] * len(inputs)
            else:
                return [self.spread(v, x, rank, at) if up else x for v, x, up in zip(node.inputs, inputs, lifted)], attrs
        found = self._lifted(node, inputs, attrs, lifted, own) if at == FIRST else None
        if found is None and own and node.op.kind == "view":  # perhaps it stretches its operand, aligned at the end
            inputs = [self.spread(v, x, rank + 1) if up else x for v, x, up in zip(node.inputs, inputs, lifted)]
            found = self._lifted(node, inputs, attrs, lifted, own)
        if found is None and not own and at == FIRST and node.is_a("matmul"):  # its leading axes broadcast
            return [self.spread(v, x, rank) if up else x for v, x, up in zip(node.inputs, inputs, lifted)], attrs
        if found is None:
            raise IRError(f"{node!r}: positions cannot be offset through {node.op.name}", node.loc)
        return inputs, found

    def node(self, node: Node, inputs: list[Value], attrs: Any, lifted: list[bool], own: bool) -> tuple[Value, ...]:
        """The node of operands of which some are lifted, as is (``own``) its result."""
        if node.is_a("gather") and lifted[1] and (lifted[0] or AxisAttrs.of(node).axis > 0):
            return (self._looked_up(node, inputs[0], inputs[1], lifted[0]),)
        if node.op.kind == "product" and any(lifted) and not own and self.plan.places.get(node.output, FIRST) != FIRST:
            return (self._rows_in_front(node, inputs, attrs, lifted),)
        if node.is_a("take_along") and own:
            inputs = [x if up else self.b.reshape(x, shape=(1, *x.shape)) for x, up in zip(inputs, lifted)]
            return (self.b.take_along(*inputs, axis=AxisAttrs.of(node).axis + 1, name=node.output.name),)
        operands, attrs = self.offset(node, inputs, attrs, lifted, own)
        return self.g.add_node(node.op, operands, attrs, loc=node.loc, names=[v.name for v in node.outputs]).outputs

    def _rows_in_front(self, node: Node, inputs: list[Value], attrs: Any, lifted: list[bool]) -> Value:
        """A product of what is lifted with values whose rows stand elsewhere: these in front of all, and back."""
        places = [None if up else self.plan.places.get(v) for v, up in zip(node.inputs, lifted)]
        given = [x if at is None else self._front(x, at) for x, at in zip(inputs, places)]
        if node.is_a("matmul"):  # its leading axes broadcast
            units = [len(node.output.shape) + 1 - len(x.shape) for x in given]
            given = [self.b.reshape(x, shape=(self.batch, *[1] * n, *x.shape[1:])) if up and n else x
                     for x, n, up in zip(given, units, lifted)]  # fmt: skip
        which = [up or at is not None for up, at in zip(lifted, places)]
        changed = self._lifted(node, given, attrs, which, True)
        if changed is None:
            raise IRError(f"{node!r}: positions cannot be offset through {node.op.name}", node.loc)
        y = self.g.add_node(node.op, given, changed, loc=node.loc, names=[node.output.name]).output
        at, size = self.plan.places[node.output], y.shape[1:]
        split = (*size[: at.axis], at.outer, at.inner, *size[at.axis + 1 :])
        y = self.b.reshape(y, shape=(self.batch, *split))
        y = self.b.transpose(y, perm=(*range(1, at.axis + 2), 0, *range(at.axis + 2, len(split) + 1)))
        return self.b.reshape(y, shape=(*size[: at.axis], product(at.outer, self.batch, at.inner), *size[at.axis + 1 :]))

    def _front(self, x: Value, at: Place) -> Value:
        """[.., rows and what is merged with them, ..] as [rows, .., what is merged with them, ..]."""
        split = (*x.shape[: at.axis], at.outer, self.batch, at.inner, *x.shape[at.axis + 1 :])
        x, rows = self.b.reshape(x, shape=split), at.axis + 1
        x = self.b.transpose(x, perm=(rows, *(i for i in range(len(split)) if i != rows)))
        return self.b.reshape(x, shape=(self.batch, *split[: at.axis], product(at.outer, at.inner), *split[at.axis + 3 :]))

    def _looked_up(self, node: Node, table: Value, index: Value, own: bool) -> Value:
        """What each row picks, at indices of its own, from a table that is its ``own``, or one for all."""
        axis, rank, inner, b = AxisAttrs.of(node).axis, len(node.inputs[0].shape), index.shape[1:], self.b
        if own:
            flat = b.reshape(index, shape=(self.batch, *[1] * axis, product(*inner), *[1] * (rank - axis - 1)))
            picked = b.take_along(table, flat, axis=axis + 1)
            return b.reshape(picked, shape=(*picked.shape[: axis + 1], *inner, *picked.shape[axis + 2 :]))
        lines = b.transpose(table, perm=(axis, *(i for i in range(rank) if i != axis)))
        picked, n = b.gather(lines, index, axis=0), 1 + len(inner)
        return b.transpose(picked, perm=(0, *range(n, n + axis), *range(1, n), *range(n + axis, len(picked.shape))))

    def _lifted(self, node: Node, inputs: list[Value], attrs: Any, lifted: list[bool], own: bool) -> Any:
        """Attributes for operands with the rows in front."""
        types = [x.tensor.with_shape(*x.shape[1:]) if up else x.type for x, up in zip(inputs, lifted)]
        return lift(node.op, attrs, types, lifted, self.batch, own)

    def spread(self, old: Value, x: Value, rank: int, at: Place = FIRST) -> Value:
        """A lifted value [b, *shape] in ``rank`` axes, aligned at the end, its rows at the place ``at`` among them."""
        own = list(x.shape[1:])
        while len(own) > rank and own[0] == 1:
            own.pop(0)
        own = [1] * (rank - len(own)) + own
        x = self.b.reshape(x, shape=(self.batch, *own))
        if len(own) == rank and own[at.axis] != 1 and at.alone and repeats(old, at.axis - rank):
            x = self.b.slice(x, starts=(0,) * (rank + 1), stops=(self.batch, *own[: at.axis], 1, *own[at.axis + 1 :]))
            own[at.axis] = 1
        if len(own) > rank or own[at.axis] != 1:
            raise IRError(f"%{old.name}: positions meet a value where they differ along the axis of its rows", old.loc)
        rest = own[: at.axis] + own[at.axis + 1 :]
        x = self.b.reshape(x, shape=(self.batch, *rest))
        if any(d != 1 for d in rest[: at.axis]):
            x = self.b.transpose(x, perm=(*range(1, at.axis + 1), 0, *range(at.axis + 1, rank)))
        elif at.axis:
            x = self.b.reshape(x, shape=(*rest[: at.axis], self.batch, *rest[at.axis :]))
        if at.alone:
            return x
        front, back = tuple(rest[: at.axis]), tuple(rest[at.axis :])
        x = self.b.reshape(x, shape=(*front, 1, self.batch, 1, *back))
        x = self.b.broadcast_to(x, shape=(*front, at.outer, self.batch, at.inner, *back))
        return self.b.reshape(x, shape=(*front, at.outer * self.batch * at.inner, *back))

    def _attend(self, node: Node) -> None:
        attrs, cache = AttentionAttrs.of(node), self.plan.of[node]
        k, v = cache.names()
        given, sink = mask_and_sink(attrs, node.inputs[3:])
        more = [] if given is None else [self.mask(given, cache)]
        ahead = sees_ahead(node, self.labels)
        if ahead and given is not None:
            note_cut(self, given, cache)
            more = [without_padding(self, more[0])]
        more += [] if sink is None else [self.env[sink]]
        keys, values, past = self.states[k], self.states[v], self.past
        if (led := self.plan.led) is not None and node in led.first:
            n = led.first[node][0].shape[1]
            keys, values = self.b.cache_start(*(self.env[x] for x in led.first[node]), keys, values, past)
            past = self.b.add(past, self.b.constant(n, DType.I64))
            if given is not None:
                more[0] = behind(self, given, more[0], n)
        out = self.b.cached_attention(
            *(self.env[x] for x in node.inputs[:3]), keys, values, past, *more, scale=attrs.scale, window=attrs.window,
            softcap=attrs.softcap, ring=cache.capacity is not None, causal=not ahead or self.one, sink=attrs.sink,
            name=[node.output.name, k, v],
        )  # fmt: skip
        self.env[node.output], self.states[k], self.states[v] = out

    # -- masks, whose keys are what the cache holds --------------------------------------------------------------------
    def mask(self, v: Value, cache: Cache | None = None) -> Value:
        """A mask [b, h, new tokens, slots of the cache] (or broadcastable to it)."""
        while (spread := v.made_by("broadcast_to")) is not None:  # as attention does by itself
            v = spread.inputs[0]
        keys = len(v.shape) - 1
        x = self.over_slots(v, keys, cache) if keys in self.labels[v].axes else self.env[v]
        return self.spread(v, x, 4) if len(x.shape) > len(v.shape) else x

    def over_slots(self, v: Value, axis: int, cache: Cache | None = None) -> Value:
        """``v`` with ``axis`` along the slots of a cache (None: a full one). Functions of positions are lifted, unless they
        repeat something fixed."""
        key = (v, axis, None if cache is None or cache.capacity is None else (cache.capacity, cache.sinks))
        if key not in self.keyed:
            kept = self.plan.kept.get(v)
            if kept is not None and kept.kind == "full":
                self.keyed[key] = all_positions(self, v)
            elif (counted := v.made_by("iota")) is not None:
                self.keyed[key] = self._key_positions(counted, cache)
            else:
                self.keyed[key] = over_slots(self, v, axis, cache)
        return self.keyed[key]

    def slots(self, cache: Cache | None) -> DimLike:
        """How many positions a cache holds."""
        return self.plan.capacity if cache is None or cache.capacity is None else cache.capacity + cache.sinks

    def _key_positions(self, node: Node, cache: Cache | None) -> Value:
        """The position in each slot, [b, c]; of slots not yet written, one of those that are: functions may not know others."""
        last = self.last_position()
        at = self.b.maximum(self.b.minimum(self.position_in_slot(cache), last), 0)
        dtype = Iota.Attrs.of(node).dtype
        return at if dtype is DType.I64 else self.b.cast(at, dtype=dtype)

    def last_position(self) -> Value:
        """That of the last new token, padding included: [b, 1]."""
        b, new = self.b, self.size(Label("token"))
        furthest = b.slice(b.iota(size=new), starts=(new - 1,), stops=(new,))
        return b.add(b.reshape(self.past, shape=(self.batch, 1)), furthest)

    def position_in_slot(self, cache: Cache | None) -> Value:
        """The position in each slot, also where none is written yet: [c], or [b, c]. What is kept of the first is in front."""
        b = self.b
        if cache is None or cache.capacity is None:
            return b.iota(size=self.plan.capacity)
        last, at = self.last_position(), b.iota(size=cache.capacity)
        at = b.sub(last, b.mod(b.sub(last, at), cache.capacity))
        if not cache.sinks:
            return at
        first = b.broadcast_to(b.reshape(b.iota(size=cache.sinks), shape=(1, cache.sinks)), shape=(self.batch, cache.sinks))
        return b.concat(first, at, axis=1)

    # -- the last position ---------------------------------------------------------------------------------------------
    def _row(self, v: Value) -> Value:
        """``v`` at each row's last token, its sequence axis of size 1."""
        label = self.labels[v]
        if not label.along:
            return self.env[v]
        if v not in self.rows:
            self.rows[v] = self._take(self.env[v], label, self.plan.places.get(v, FIRST))
        return self.rows[v]

    def _take(self, x: Value, label: Label, at: Place) -> Value:
        if label.kind == "uniform":
            stops = [1 if i == label.axis else d for i, d in enumerate(x.shape)]
            return self.b.slice(x, starts=(0,) * len(stops), stops=tuple(stops))
        axis = label.axis
        if label.lifted:  # rows are in front
            axis, at = axis + 1, FIRST
        y = self.b.take_row(rows_first(self, x, at, axis), self.last)
        return in_place(self, y, at, axis, x.shape)

    def _output(self, v: Value) -> Value:
        label = self.labels[v]
        if label.kind == "last" and self.plan.places.get(v) != FIRST:
            raise IRError(f"output %{v.name} is {v.type}: its rows must be its first axis", v.loc)
        if not label.along:
            return self.env[v]
        x = self.env[v] if self.one else self._row(v)
        axis = label.axis + label.lifted
        at = self.plan.places.get(v, FIRST)
        if label.kind == "token" and (at.axis - (at.axis > axis), at.alone) != (0, True):
            raise IRError(f"output %{v.name} is {v.type}: its rows must be the first axis beside the sequence", v.loc)
        return self.b.reshape(x, shape=tuple(d for i, d in enumerate(x.shape) if i != axis))
