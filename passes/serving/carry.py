"""How what recurrences carry goes on: from the state, and only as far as each row has tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wasat.ir import Builder, Graph, IRError, Node, TensorType, Value, equal
from wasat.ir.graph import copy_node
from wasat.ir.op import Body
from wasat.ir.ops.reduce import CumSum
from wasat.ir.ops.scan import ScanAttrs

from ..analyses.rows import Place, repeats
from ..analyses.sequence import Label
from .kept import after_last, begun, in_place, rows_first

if TYPE_CHECKING:
    from .kv_cache import Derivation


def run_scan(d: Derivation, node: Node) -> None:
    """A scan from what is carried; rows that have fewer tokens keep what they had after their last."""
    attrs = ScanAttrs.of(node)
    c, s, b = attrs.carries, attrs.slices, d.b
    carried = []
    for v, start in zip(node.outputs, node.inputs[:c]):
        at = d.plan.places[v]
        begin = rows_first(d, d.env[start], at, None)
        carried.append(in_place(d, begun(d, d.states[d.plan.kept[v].name], begin), at, None, v.shape))
    others = [d.env[v] for v in node.inputs[c + s :]]
    sliced = [_for_each_row(d, node, v) for v in node.inputs[c : c + s]]
    body = attrs.body.substitute(d.sizes).graph
    if d.one:
        first = [b.reshape(x, shape=x.shape[1:]) for x in sliced]
        made = b.inline(body, [*carried, *first, *others])
        results = [*made[:c], *(b.reshape(x, shape=(1, *x.shape)) for x in made[c:])]
    else:
        assert d.last is not None
        n = sliced[0].shape[0]
        real = b.less_equal(b.reshape(b.iota(size=n), shape=(n, 1)), b.reshape(d.last, shape=(1, d.batch)))
        guarded = _guarded(body, c, s, [d.plan.places[v] for v in node.outputs[:c]], real.tensor.with_shape(d.batch))
        out = b.scan(*carried, real, *sliced, *others, body=Body(guarded), carries=c, slices=s + 1)
        results = list(out) if isinstance(out, tuple) else [out]
    for v, x in zip(node.outputs, results[:c]):
        d.states[d.plan.kept[v].name] = rows_first(d, x, d.plan.places[v], None)
    d.env.update(zip(node.outputs, results))


def _for_each_row(d: Derivation, node: Node, v: Value) -> Value:
    """An operand along the sequence; positions are each row's own, on the axis along which they were repeated for the rows."""
    if not d.labels[v].lifted:
        return d.env[v]
    rank, along = len(v.shape), d.labels[v].axis
    rows = [i for i, n in enumerate(v.shape) if i != along and equal(n, d.batch) is True and repeats(v, i - rank)]
    if not rows:
        raise IRError(f"{node!r} reads positions, %{v.name}: {v.type}; repeat them for the rows first (broadcast_to)", node.loc)
    return d.spread(v, d.env[v], rank, Place(rows[0]))


def run_carry(d: Derivation, node: Node) -> None:
    """What runs forward, from what is carried; rows that have fewer tokens keep what they had after their last."""
    b, attrs, operands = d.b, node.attrs.bind(d.sizes), [_for_each_row(d, node, v) for v in node.inputs]
    for i, start in node.op.recurrence.items():
        v, at = node.outputs[i], d.plan.places[node.outputs[i]]
        begin = rows_first(d, operands[start], at, None)
        operands[start] = in_place(d, begun(d, d.states[d.plan.kept[v].name], begin), at, None, v.shape)
    if not d.one:
        n, at = d.size(Label("token")), d.plan.places[node.outputs[next(iter(node.op.recurrence))]]
        if at.axis > 1:
            raise IRError(f"{node!r}: its rows are merged with features", node.loc)
        assert d.last is not None
        real = b.less_equal(b.iota(size=n), b.reshape(d.last, shape=(d.batch, 1)))
        rows = at.outer * d.batch * at.inner
        if not at.alone:
            real = b.broadcast_to(b.reshape(real, shape=(d.batch, 1, n)), shape=(at.outer, d.batch, at.inner, n))
            real = b.reshape(real, shape=(rows, n))
        real = real if at.axis == 0 else b.transpose(real, perm=(1, 0))
        real = b.reshape(real, shape=(rows, n, 1) if at.axis == 0 else (1, n, rows))
        operands = node.op.pause(b, attrs, operands, real)
    made = d.g.add_node(node.op, operands, attrs, loc=node.loc, names=[v.name for v in node.outputs]).outputs
    d.env.update(zip(node.outputs, made))
    for i in node.op.recurrence:
        v = node.outputs[i]
        d.states[d.plan.kept[v].name] = rows_first(d, d.env[v], d.plan.places[v], None)


def _guarded(body: Graph, c: int, s: int, places: Sequence[Place], real: TensorType) -> Graph:
    """A turn that leaves the carry of rows as it was, where ``real``, its first sliced operand, is false."""
    g = Graph(body.name)
    b = Builder(g)
    carried = [g.add_input(v.name, v.type) for v in body.inputs[:c]]
    keep = g.add_input("real", real, unique=True)
    env = dict(zip(body.inputs, [*carried, *(g.add_input(v.name, v.type, unique=True) for v in body.inputs[c:])]))
    for node in body.nodes:
        copy_node(g, node, env)
    results = [env[v] for v in body.outputs]
    for i, (old, at) in enumerate(zip(carried, places)):
        shape = old.shape
        rows = b.reshape(keep, shape=(1, real.shape[0], 1))
        rows = rows if at.alone else b.broadcast_to(rows, shape=(at.outer, real.shape[0], at.inner))
        rows = b.reshape(rows, shape=tuple(shape[at.axis] if i == at.axis else 1 for i in range(len(shape))))
        results[i] = b.select(rows, results[i], old)
    g.set_outputs(results, list(body.output_names))
    return g


def run_sum(d: Derivation, node: Node) -> None:
    """A running sum from what came before."""
    v, x, attrs, b = node.output, node.inputs[0], CumSum.Attrs.of(node), d.b
    at, name = d.plan.places[v], d.plan.kept[v].name
    state = d.states[name]
    before = begun(d, state, b.broadcast_to(b.constant(0, state.tensor.dtype), shape=state.shape))
    before = b.reshape(before, shape=(d.batch, 1, *state.shape[1:]))
    total = b.add(d.g.add_node(node.op, [d.env[x]], attrs, loc=node.loc).output, in_place(d, before, at, attrs.axis, v.shape))
    d.env[v] = total
    after = b.add(total, d.env[x]) if attrs.exclusive else total
    last = after_last(d, rows_first(d, after, at, attrs.axis), 0, 1)
    d.states[name] = b.reshape(last, shape=state.shape)
