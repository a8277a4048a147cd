"""What an incremental run keeps beside the keys and values of fused attention, and how it goes on from there.

Where tokens meet in sums of their own, the values that later tokens read are kept for all positions: of those from which the
rest follows by moving elements alone, the fewest bytes (a minimum cut). A scan and a running sum keep what they carry, a
convolution and a token shift their last inputs: each row's as they are after its last token, not after its padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import networkx as nx
from wasat.ir import DimLike, DType, IRError, Node, State, TensorType, Value, substitute
from wasat.ir.axes import Factor, product
from wasat.ir.ops.attention import AttentionAttrs, mask_and_sink
from wasat.ir.ops.conv import Conv
from wasat.ir.ops.pool import Pool
from wasat.ir.ops.reduce import CumSum
from wasat.ir.ops.scan import ScanAttrs
from wasat.ir.ops.shape import Concat, Pad, Slice

from ..analyses.axis import sees_ahead
from ..analyses.later import stands_for
from ..analyses.rows import FIRST, Place
from ..analyses.sequence import Label

if TYPE_CHECKING:
    from .derivation import Derivation
    from .plan import Cache, Plan


_WINDOWS = (Conv.Attrs, Pool.Attrs)


@dataclass(frozen=True)
class Kept:
    """One state. ``of``: the value whose positions (or last inputs) it holds, or the result that carries it on."""

    name: str
    kind: Literal["full", "carry", "tail"]
    of: Value
    type: TensorType
    """Rows first, then positions or the last inputs, if it has any."""

    @property
    def count(self) -> int:
        """Of a tail: how many inputs."""
        count = self.type.shape[1]
        assert isinstance(count, int)
        return count

    def state(self, donated: bool) -> State:
        """How a session keeps it; ``donated``: it runs for rows that have tokens, and for no others. What rows start from is in
        the entries: a row that holds nothing reads no state."""
        if self.kind == "full":
            return State.full(self.name)
        return State.tail(self.name, self.count) if self.kind == "tail" else State.carry(self.name, donated=donated)

    def describe(self) -> str:
        if self.kind == "tail":
            return f"the last {self.count} inputs of %{self.of.name} kept"
        what = "all positions" if self.kind == "full" else "the carry"
        return f"{what} of %{self.of.name} kept"


# -- the plan ----------------------------------------------------------------------------------------------------------------
def lands(node: Node, i: int, axis: int) -> int | None:
    """The axis of the result that an axis of operand i is, normalized or not; None for one that is summed over."""
    if isinstance(node.attrs, (Slice.Attrs, Concat.Attrs, Pad.Attrs)) or node.is_a("take_along"):
        return axis
    rule = node.axes
    factors, result = rule.operands[i][axis], rule.result
    return result.index(factors) if factors and factors in result else None


def meets(plan: Plan, node: Node) -> bool:
    """Whether a node sums scores over keys."""
    return plan.labels[node.outputs[0]].mixes and any(plan.labels[v].relates for v in node.inputs) and not (
        isinstance(node.attrs, AttentionAttrs)
    )  # fmt: skip


def _wanted(plan: Plan) -> Iterator[Value]:
    """Values along the sequence that are read at all positions."""
    waiting: list[tuple[Value, int]] = []
    for node in plan.forward.nodes:
        if meets(plan, node):
            for i, v in enumerate(node.inputs):
                waiting += [(v, axis) for axis in plan.labels[v].axes if lands(node, i, axis) is None]
        elif isinstance(node.attrs, AttentionAttrs) and plan.labels[node.output].mixes:
            read = (1, 2) if sees_ahead(node, plan.labels) else (1,)  # also what earlier queries see of the new keys
            mask, _ = mask_and_sink(node.attrs, node.inputs[3:])
            if mask is not None:
                waiting += [(mask, axis) for axis in plan.labels[mask].axes if len(mask.shape) - axis in read]
            if node not in plan.of:
                waiting += [(v, 1) for v in node.inputs[1:3]]
    seen = set(waiting)
    while waiting:
        v, axis = waiting.pop()
        if plan.labels[v].kind == "token":
            yield v
        elif v.node is not None:
            found = [(u, a) for i, u in enumerate(v.node.inputs) for a in plan.labels[u].axes if lands(v.node, i, a) == axis]
            waiting += [at for at in found if at not in seen]
            seen.update(found)


def _moves(plan: Plan, v: Value) -> bool:
    """Whether a value is no more than its operands' elements, moved, repeated or cast."""
    node = v.node
    if node is None or plan.labels[v].mixes or not node.op.carries:
        return False
    return any(plan.labels[u].kind == "token" for u in node.inputs) and all(
        plan.labels[u].kind in ("token", "fixed") and not plan.labels[u].extra for u in node.inputs
    )


def _size(plan: Plan, v: Value) -> int:
    """Bits per token and row (of sizes that are not known, as if they were 1)."""
    rest = _apart(v.shape, plan.places.get(v, FIRST), plan.tokens.shape[0], plan.labels[v].axis)
    return math.prod(d for d in rest if isinstance(d, int)) * v.tensor.dtype.bits


_APART = 2**40
"""What makes a bit weigh more than all places in a graph."""


def held(plan: Plan, wanted: Iterable[Value]) -> list[Value]:
    """The values to be kept for all positions: the minimum cut between what a token makes and what later ones read; of equals
    the one that is moved least."""
    g, order = nx.DiGraph(), {v: i for i, v in enumerate(plan.forward.values())}
    waiting = list(dict.fromkeys(wanted))
    for v in waiting:
        g.add_edge((v, True), "read")
    seen = set(waiting)
    while waiting:
        v = waiting.pop()
        g.add_edge((v, False), (v, True), capacity=_size(plan, v) * _APART + len(order) - order[v])
        if not _moves(plan, v) or v.node is None:
            g.add_edge("made", (v, False))
            continue
        for u in v.node.inputs:
            if plan.labels[u].kind == "token":
                g.add_edge((u, True), (v, False))
                waiting += [] if u in seen else [u]
                seen.add(u)
    if not seen:
        return []
    _, (made, _) = nx.minimum_cut(g, "made", "read")
    return sorted((v for v in seen if (v, False) in made and (v, True) not in made), key=order.__getitem__)


def keep(plan: Plan) -> None:
    """Settles what is kept: fills ``plan.kept``, by the value it is of."""
    batch = plan.tokens.shape[0]
    for node, cache in list(plan.of.items()):
        k, v = node.inputs[1:3]
        plain = cache.window is None and plan.led is None and k is not v and not sees_ahead(node, plan.labels)
        if plain and {plan.labels[k].kind, plan.labels[v].kind} == {"token"} and len(held(plan, [k, v])) == 1:
            del plan.of[node]  # one tensor is both
    found: list[tuple[Literal["full", "carry", "tail"], Value]] = [("full", v) for v in held(plan, _wanted(plan))]
    if not found and all(c.capacity is not None for c in plan.of.values()) and any(meets(plan, n) for n in plan.forward.nodes):
        found.append(("full", plan.tokens))  # sums over positions alone: how many there may be, a state has to say
    for node in plan.forward.nodes:
        label = plan.labels[node.outputs[-1]]
        if not label.mixes or isinstance(node.attrs, AttentionAttrs):
            continue
        if isinstance(node.attrs, ScanAttrs):
            found += [("carry", v) for v in node.outputs[: node.attrs.carries]]
        elif node.op.recurrence:
            found += [("carry", node.outputs[i]) for i in node.op.recurrence]
        elif isinstance(node.attrs, CumSum.Attrs) and not plan.labels[node.inputs[0]].relates:
            found.append(("carry", node.output))
        elif _in_front(node, label):
            found.append(("tail", node.output))
    names = {"full": "kept", "carry": "carry", "tail": "tail"}
    for kind, v in found:
        label = plan.labels[v]
        source = _source(plan, v) if kind == "tail" else v
        at = plan.places.get(source)
        if at is None:
            raise IRError(f"%{v.name}: what is kept of it is the same for all rows, which cannot be served apart", v.loc)
        axis = label.axis if label.along else None
        rest = _apart(source.shape, at, batch, axis)
        front: list[DimLike] = [plan.capacity] if kind == "full" else []
        if kind == "tail" and v.node is not None:
            front = [_in_front(v.node, label)]
        if kind == "full":  # caches of rank 4 are written in place
            rest = (product(*rest[:-1]), product(*rest[-1:]))
        name = f"{names[kind]}.{sum(k.kind == kind for k in plan.kept.values())}"
        plan.kept[v] = Kept(name, kind, v, TensorType(source.tensor.dtype, (batch, *front, *rest)))


def _in_front(node: Node, label: Label) -> int:
    """How many elements a node puts in front of the sequence: inputs from before it, when it runs step by step."""
    a: Any = node.attrs
    if isinstance(a, (Pad.Attrs, *_WINDOWS)):
        low = a.low[label.axis - (2 if isinstance(a, _WINDOWS) else 0)]
        return low if isinstance(low, int) else 0
    if isinstance(a, Concat.Attrs) and a.axis == label.axis:
        sizes = [v.shape[a.axis] for v in node.inputs]
        return sum(d for d in sizes[: next(i for i, d in enumerate(sizes) if not isinstance(d, int))] if isinstance(d, int))
    return 0


def _source(plan: Plan, v: Value) -> Value:
    """The operand along the sequence of what puts elements in front of it."""
    assert v.node is not None
    return next(u for u in v.node.inputs if plan.labels[u].along)


def _apart(shape: Sequence[DimLike], at: Place, batch: DimLike, axis: int | None) -> tuple[DimLike, ...]:
    """What is left of a shape without its rows, and without the axis along the sequence."""
    split: list[DimLike] = []
    for i, d in enumerate(shape):
        if i == at.axis:
            split += [] if at.alone else [at.outer, at.inner]
        elif i != axis:
            split.append(d)
    return tuple(split)


# -- rows first --------------------------------------------------------------------------------------------------------------
def rows_first(d: Derivation, x: Value, at: Place, axis: int | None) -> Value:
    """``x`` as [rows, positions, ..], or as [rows, ..] if it has no axis along the sequence."""
    split, rows, along = _split(x.shape, at, d.batch, axis)
    x = d.b.reshape(x, shape=split) if not at.alone else x
    front = (rows,) if along is None else (rows, along)
    return d.b.transpose(x, perm=(*front, *(i for i in range(len(split)) if i not in front)))


def in_place(d: Derivation, y: Value, at: Place, axis: int | None, like: Sequence[DimLike]) -> Value:
    """The inverse; ``like``: the shape, its size along the sequence that of ``y``."""
    shape = [y.shape[1] if i == axis else n for i, n in enumerate(like)]
    split, rows, along = _split(shape, at, d.batch, axis)
    front = (rows,) if along is None else (rows, along)
    order = (*front, *(i for i in range(len(split)) if i not in front))
    y = d.b.transpose(y, perm=tuple(order.index(i) for i in range(len(split))))
    return d.b.reshape(y, shape=tuple(shape)) if not at.alone else y


def _split(
    shape: Sequence[DimLike], at: Place, batch: DimLike, axis: int | None
) -> tuple[tuple[DimLike, ...], int, int | None]:
    """The shape with the rows on an axis of their own; that axis, and the one along the sequence."""
    if at.alone:
        return tuple(shape), at.axis, axis
    split = (*shape[: at.axis], at.outer, batch, at.inner, *shape[at.axis + 1 :])
    return split, at.axis + 1, axis + 2 * (axis > at.axis) if axis is not None else None


# -- running -----------------------------------------------------------------------------------------------------------------
def begun(d: Derivation, state: Value, start: Value) -> Value:
    """The state, or what a row starts from, where it holds nothing yet; both with rows in front."""
    none = d.b.equal(d.b.reshape(d.past, shape=(d.batch, *[1] * (len(state.shape) - 1))), 0)
    return d.b.select(none, start, state)


def all_positions(d: Derivation, v: Value) -> Value:
    """A value that is kept, at all positions that a row holds and at the new ones: its axis along the cache's slots."""
    kept, label = d.plan.kept[v], d.labels[v]
    at = d.plan.places[v]
    new = rows_first(d, d.env[v], at, label.axis)
    flat = d.b.reshape(new, shape=(d.batch, new.shape[1], *kept.type.shape[2:]))
    written = d.b.cache_update(d.states[kept.name], flat, d.past, name=kept.name)
    d.states[kept.name] = written
    every = d.b.reshape(written, shape=(d.batch, kept.type.shape[1], *new.shape[2:]))
    return in_place(d, every, at, label.axis, v.shape)


def after_last(d: Derivation, x: Value, first: int, count: int) -> Value:
    """Of [rows, positions, ..], ``count`` positions of each row, from its last token's index + ``first`` on."""
    if d.last is None:
        stops = (d.batch, first + count, *x.shape[2:])
        return d.b.slice(x, starts=(0, first, *[0] * (len(stops) - 2)), stops=stops)
    index = d.b.add(d.b.reshape(d.last, shape=(d.batch, 1)), d.b.iota(size=count))
    index = d.b.add(index, first) if first else index
    return d.b.take_along(x, d.b.reshape(index, shape=(d.batch, count, *[1] * (len(x.shape) - 2))), axis=1)


def run_window(d: Derivation, node: Node) -> None:
    """What puts elements in front of the sequence: here, the inputs that were there before, and those only at the start."""
    v, b = node.output, d.b
    label, kept, source = d.labels[v], d.plan.kept[v], _source(d.plan, v)
    at, x, axis, count = d.plan.places[source], d.env[source], label.axis, kept.count
    attrs: Any = node.attrs
    shape = [count if i == axis else n for i, n in enumerate(x.shape)]
    back: list[Value] = []
    if isinstance(attrs, Concat.Attrs):
        i = node.inputs.index(source)
        parts = [d.env[u] for u in node.inputs[:i]]
        start = parts[0] if len(parts) == 1 else b.concat(*parts, axis=axis)
        back = [d.env[u] for u in node.inputs[i + 1 :]]
    else:
        outside = attrs.outside(x.tensor.dtype) if isinstance(attrs, Pool.Attrs) else getattr(attrs, "value", 0.0)
        start = b.broadcast_to(b.constant(outside, x.tensor.dtype), shape=tuple(shape))
    head = begun(d, d.states[kept.name], rows_first(d, start, at, axis))
    full = b.concat(in_place(d, head, at, axis, shape), x, axis=axis)
    d.states[kept.name] = after_last(d, rows_first(d, full, at, axis), 1, count)
    if d.labels[source].valid < 0:  # all of the new tokens are there, and fewer are to be
        size = d.size(label)
        full = b.slice(full, starts=(0,) * len(shape), stops=tuple(size if i == axis else n for i, n in enumerate(full.shape)))
    if isinstance(attrs, _WINDOWS):
        low = tuple(0 if i == axis - 2 else n for i, n in enumerate(attrs.low))
        changed = replace(attrs, low=low)
        full = d.g.add_node(node.op, [full, *(d.env[u] for u in node.inputs[1:])], changed, loc=node.loc).output
    elif isinstance(attrs, Pad.Attrs) and any((*attrs.low, *attrs.high)):
        low = tuple(0 if i == axis else n for i, n in enumerate(attrs.low))
        full = d.g.add_node(node.op, [full], Pad.Attrs(low, attrs.high, attrs.value), loc=node.loc).output
    elif back:
        full = b.concat(full, *back, axis=axis)
    d.env[v] = full


# -- scores ------------------------------------------------------------------------------------------------------------------
def meet(d: Derivation, node: Node) -> None:
    """A sum over keys: over the slots of caches, of which later ones (not yet written, too) hold what does not matter."""
    operands, own = [], d.labels[node.outputs[0]].lifted
    for i, v in enumerate(node.inputs):
        keys = [a for a in d.labels[v].axes if lands(node, i, a) is None]
        x = d.over_slots(v, keys[0]) if keys else d.env[v]
        if keys and d.labels[v].relates:
            x = guard(d, v, x, keys[0], node.axes.operands[i][keys[0]][0], node)
        operands.append(x)
    lifted = [len(x.shape) > len(v.shape) for x, v in zip(operands, node.inputs)]
    d.env.update(zip(node.outputs, d.node(node, operands, node.attrs.bind(d.sizes), lifted, own)))


def attend(d: Derivation, node: Node) -> None:
    """Attention over keys and values that follow from what is kept, those of later slots hidden."""
    q, k, v, *more = node.inputs
    b, attrs, cache = d.b, AttentionAttrs.of(node), d.plan.of.get(node)
    own, sink = mask_and_sink(attrs, more)
    if cache is None:
        keys, values, seen = d.over_slots(k, 1), d.over_slots(v, 1), b.logical_not(d.is_later())
    else:
        keys, values = (first_and_last(d, cache, x, name) for x, name in zip((k, v), cache.names()))
        seen = _in_turn(d, cache)
    seen = b.reshape(seen, shape=(d.batch, 1, *seen.shape[1:]))
    if own is not None:
        mask = d.mask(own, cache)
        other = mask.tensor.dtype
        seen = b.logical_and(seen, mask) if other is DType.BOOL else b.select(seen, mask, b.constant(-math.inf, other))
    d.env[node.output] = b.attention(
        d.env[q], keys, values, seen, *([] if sink is None else [d.env[sink]]), scale=attrs.scale, softcap=attrs.softcap,
        sink=attrs.sink, name=node.output.name,
    )  # fmt: skip


def first_and_last(d: Derivation, cache: Cache, x: Value, name: str) -> Value:
    """Keys (or values) of the first positions, and of those that a ring has, the new ones among them."""
    b, new, first, n = d.b, d.env[x], f"{name}.first", cache.sinks
    d.states[name] = b.cache_update(d.states[name], new, d.past, ring=True, name=name)
    size = b.dim_size(size=new.shape[1])
    at = b.sub(b.reshape(b.iota(size=n), shape=(1, n)), b.reshape(d.past, shape=(d.batch, 1)))
    now = b.reshape(b.logical_and(b.greater_equal(at, 0), b.less(at, size)), shape=(d.batch, n, 1, 1))
    at = b.reshape(b.maximum(b.minimum(at, b.sub(size, 1)), 0), shape=(d.batch, n, 1, 1))
    d.states[first] = b.select(now, b.take_along(new, at, axis=1), d.states[first], name=first)
    return b.concat(d.states[first], d.states[name], axis=1)


def _in_turn(d: Derivation, cache: Cache) -> Value:
    """Whether a query comes behind a slot's position, of which those that stand in front are not taken twice: [b, s, c]."""
    b, n = d.b, d.size(Label("token"))
    query = b.add(b.reshape(d.past, shape=(d.batch, 1, 1)), b.reshape(b.iota(size=n), shape=(n, 1)))
    slots = d.slots(cache)
    at = b.reshape(d.position_in_slot(cache), shape=(d.batch, 1, slots))
    once = b.logical_or(b.less(b.iota(size=slots), cache.sinks), b.greater_equal(at, cache.sinks))
    return b.logical_and(once, b.less_equal(at, query))


def guard(d: Derivation, v: Value, x: Value, key: int, f: Factor | None, node: Node) -> Value:
    """``x``, scores over slots along ``key``, with the number in later ones that does not matter to ``node``."""
    label = d.labels[v]
    number = label.later(key)
    if label.widened or number is None:  # other elements joined it, which was guarded before; or any number will do
        return x
    if f is not None and f.neutral is not None and stands_for(number, f.neutral):
        number = f.neutral
    query = label.axis + label.other - key
    is_later = d.is_later()
    lifted = len(x.shape) > len(v.shape)
    shape: list[DimLike] = [1] * len(v.shape)
    shape[query], shape[key] = is_later.shape[1:]
    if key < query:
        is_later = d.b.transpose(is_later, perm=(0, 2, 1))
    is_later = d.b.reshape(is_later, shape=(d.batch, *shape))
    if not lifted and (label.kind == "scores" or label.rows):
        is_later = d.spread(v, is_later, len(v.shape), d.plan.places.get(v, FIRST))
    constant = d.b.constant(int(number) if v.tensor.dtype.is_int else number, v.tensor.dtype)
    return d.b.select(is_later, constant, x)


def over_slots(d: Derivation, v: Value, axis: int, cache: Cache | None) -> Value:
    """The node behind ``v``, a function of positions or scores, with ``axis`` along the slots of a cache."""
    node = v.node
    if node is None:
        raise IRError(f"%{v.name} cannot be kept for all positions", v.loc)
    inputs = []
    for i, u in enumerate(node.inputs):
        at = next((a for a in d.labels[u].axes if lands(node, i, a) == axis), None)
        x = d.env[u] if at is None else d.over_slots(u, at, cache)
        if at is not None and d.labels[u].relates:
            f = next(iter(node.axes.operands[i][at]), None)
            beside = isinstance(node.attrs, (Concat.Attrs, Pad.Attrs)) and d.labels[v].wide == axis
            if beside or (f is not None and (f.role == "normalized" or (f.role, f.how) == ("ordered", "backward"))):
                x = guard(d, u, x, at, f, node)
        inputs.append(x)
    shape = [substitute(n, d.sizes) for n in v.shape]
    label = d.labels[v]
    shape[axis] = d.slots(cache) + (label.front + label.back if label.wide == axis else 0)
    attrs: Any = node.attrs
    if isinstance(attrs, Slice.Attrs):
        bound = attrs.bind(d.sizes)
        cut = [(attrs.starts[i], attrs.starts[i] + n) if i in label.axes else (bound.starts[i], bound.stops[i])
               for i, n in enumerate(shape)]  # fmt: skip
        attrs = Slice.Attrs(tuple(lo for lo, _ in cut), tuple(hi for _, hi in cut), attrs.steps)
    elif node.is_a("reshape", "broadcast_to"):
        attrs = type(attrs)(tuple(shape))
    elif d.plan.seq in attrs.symbols:
        raise IRError(f"{node!r}: it cannot go over the slots of a cache", node.loc)
    lifted = [len(x.shape) > len(old.shape) for x, old in zip(inputs, node.inputs)]
    own = any(lifted) and label.kind not in ("scores", "token") and not label.rows
    return d.node(node, inputs, attrs, lifted, own)[0]
