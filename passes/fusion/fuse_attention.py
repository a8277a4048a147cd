"""softmax(q kᵀ · scale, softcapped, masked) v -> attention(q, k, v[, mask]), however it was written."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from wasat.ir import Builder, DType, Graph, Node, Value, equal
from wasat.ir.ops.attention import AttentionAttrs, mask_and_sink

from ..analyses.factors import product, scaling
from ..analyses.mask import FINITE_FILL, Mask, analyze, hidden_by
from ..core import GraphPass, Remarks
from ..pattern import erase_dead, number_of, replace
from . import blind
from .heads import MaskPart, Miss, check_masks, emit_mask, operands
from .hiding import Hidden, choice_of, exact, is_given, reaches_product
from .sinks import Logits, Weights, drops, weights


@dataclass
class _Scores:
    """What stands between a softmax and the product of queries and keys."""

    weights: Weights
    product: Node
    scale: float
    softcap: float | None
    hidden: Hidden
    per_query: list[tuple[Value, bool]]
    """Numbers [1 | b, 1 | h, 1 | s, 1] that multiply the scores, or (True) divide them."""


@dataclass(frozen=True)
class FuseAttention(GraphPass):
    """Recognizes attention at every softmax; each one that stays is reported with the guard that failed.

    Takes multi-head, grouped (by repetition or broadcast of heads) and multi-query attention in any order of axes; a scale on
    scores, queries or keys, one for each head or query too; softcap; causal and window predicates over positions in any
    spelling, which become attributes; other masks, boolean or additive, which stay operands; a softmax in a wider type.

    ``whole``: no cache is derived afterwards, and a query that sees nothing may be given all values.
    """

    whole: bool = False
    name = "fuse-attention"
    in_bodies = True

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        changed = False
        for node in graph.nodes:
            if node.is_a("attention") and _read_mask(graph, node, remarks, self.whole):
                changed = True
            w = weights(node)
            if w is None:
                continue
            try:
                fused = _fuse(graph, w, self.whole)
            except Miss as e:
                if not _attends(w):
                    continue
                remarks.missed(f"%{node.output.name} = {_called(w)} stays unfused: {e}", node)
                continue
            changed = True
            remarks.applied(_describe(fused), fused)
        return changed


def _called(w: Weights) -> str:
    return "softmax" if w.node.is_a("softmax") else "a softmax with a sink"


def _describe(v: Value) -> str:
    assert v.node is not None
    a, (q, k) = AttentionAttrs.of(v.node), v.node.inputs[:2]
    what = [f"{q.shape[2]} heads over {k.shape[2]}", f"scale {a.scale:g}"]
    what += ["causal"] if a.causal else []
    what += [f"window {a.window}"] if a.window is not None else []
    what += [f"softcap {a.softcap:g}"] if a.softcap is not None else []
    what += ["sinks"] if a.sink else []
    what += ["a mask operand"] if mask_and_sink(a, v.node.inputs[3:])[0] is not None else []
    return f"%{v.name} = attention: {', '.join(what)}"


def _only_use(graph: Graph, v: Value) -> Node:
    """The one node that reads ``v``; Miss if others do, or the caller of the graph."""
    if graph.is_output(v):
        raise Miss(f"%{v.name} is also an output of the graph")
    users = v.users
    if len(users) != 1 or len(v.uses) != 1:
        raise Miss(f"%{v.name} is also used outside the match")
    return users[0]


def _passes(node: Node) -> bool:
    """Whether scores stay scores: a cast between floats, or a reshape that only regroups heads."""
    if node.is_a("cast"):
        return node.inputs[0].tensor.dtype.is_float and node.output.tensor.dtype.is_float
    if not node.is_a("reshape"):
        return False
    a, b = node.inputs[0].shape, node.output.shape
    return min(len(a), len(b)) >= 2 and all(equal(x, y) is True for x, y in zip(a[-2:], b[-2:]))


def _bounded(node: Node) -> Value | None:
    """Scores that are raised to a number that stands for minus infinity."""
    for x, y in (node.inputs, node.inputs[::-1]):
        number = number_of(y)
        if number is not None and -math.inf < number <= FINITE_FILL and x.shape == node.output.shape:
            return x
    return None


def _attends(w: Weights) -> bool:
    """Whether a softmax looks like attention's: of a product, or of what is given and into one; a router's is of a linear."""
    x = w.scores
    if reaches_product(x):
        return True
    while x.node is not None:
        if x.node.is_a("matmul") and not is_given(x.node.inputs[1]):
            return True
        if not x.node.op.elementwise and not x.node.is_a("cast", "reshape"):
            return False
        x = x.node.inputs[1 if x.node.is_a("select") else 0]
    return any(user.is_a("matmul") for user in w.node.output.users)


def _scores(graph: Graph, w: Weights, whole: bool) -> _Scores:
    """Walks up from the softmax to the product of queries and keys."""
    x = w.scores
    rank = len(x.shape)
    if rank < 2 or w.axis != rank - 1:
        raise Miss(f"softmax axis is {w.axis}, not the key axis {rank - 1}")
    if graph.is_output(x) or not w.own.issuperset(x.users):
        raise Miss(f"%{x.name} is also used outside the match")
    factor, softcap = 1.0, None
    hidden = Hidden(whole)
    per_query: list[tuple[Value, bool]] = []
    while True:
        node = x.node
        if node is None:
            raise Miss(f"%{x.name} is an input: there is no product of queries and keys above the softmax")
        if x is not w.scores:
            _only_use(graph, x)
        name, shape = node.op.name, x.shape
        if name == "matmul":
            hidden.settle(node.output)
            return _Scores(w, node, factor, softcap, hidden, per_query)
        if per_query and (name not in ("mul", "div", "tanh") or (name == "tanh" and softcap is None)):
            raise Miss(f"{node!r}: what it gives is multiplied by numbers of each head or query")
        if _passes(node):
            x = node.inputs[0]
        elif name == "select":
            x = hidden.selected(node, shape, factor, softcap)
        elif (step := scaling(node)) is not None:
            x, c = step
            inner = x.node
            if name == "mul" and inner is not None and inner.is_a("tanh") and softcap is None:
                if factor != 1.0 or c <= 0 or per_query:
                    raise Miss(f"{node!r}: a factor is applied after the softcap")
                _only_use(graph, x)
                softcap, factor, x = c, c, inner.inputs[0]
            else:
                factor *= c
        elif name == "maximum" and (kept := _bounded(node)) is not None:  # what is hidden by less is by this number
            x, hidden.mask.finite = kept, True
        elif name in ("add", "sub"):
            x = hidden.added(node, shape, factor, softcap)
        elif name == "mul" and (kept := hidden.zeroed(node, shape)) is not None:
            x = kept
        elif name in ("mul", "div") and (scaled := _per_query(node)) is not None:
            x, m = scaled
            per_query.append((m, name == "div"))
        else:
            raise Miss(f"%{x.name} is {name}; between softmax and q @ k stand only scale, softcap, mask and casts")


def _per_query(node: Node) -> tuple[Value, Value] | None:
    """Scores [b, h, s, t], and the numbers [1 | b, 1 | h, 1 | s, 1] that multiply or divide them."""
    shape = node.output.shape
    for scores, m in (node.inputs, node.inputs[::-1])[: 1 if node.is_a("div") else 2]:
        own = (1,) * (4 - len(m.shape)) + tuple(m.shape)
        if scores.type == node.output.type and len(shape) == 4 and own[3] == 1 and reaches_product(scores):
            return scores, m
    return None


def _guarded(graph: Graph, y: Value) -> Node | None:
    """The node of select(isnan(y), 0, y), where nothing else uses y: a query that sees nothing gives 0, as in the operation."""
    choice = next((n for n in y.users if n.is_a("select") and n.inputs[2] is y), None)
    if choice is None or graph.is_output(y) or len(y.uses) != 2 or number_of(choice.inputs[1]) != 0:
        return None
    test = choice.inputs[0].node
    is_test = test is not None and test.is_a("isnan") and test.inputs[0] is y
    return choice if is_test and len(choice.inputs[0].uses) == 1 and not graph.is_output(choice.inputs[0]) else None


def _values(graph: Graph, w: Weights) -> Node:
    """Walks down from the softmax to its product with the values."""
    y, joined = w.node.output, w.joined
    while True:
        guard = _guarded(graph, y)
        if guard is not None:
            y = guard.output
            continue
        node = _only_use(graph, y)
        if joined and drops(w, node):
            y, joined = node.output, False
            continue
        if node.is_a("matmul") and node.inputs[0] is y:
            if joined:
                raise Miss(f"%{y.name} weighs more than the keys")
            return node
        if _passes(node):
            y = node.output
            continue
        raise Miss(f"%{y.name} goes into {node.op.name}, not into a product with the values")


def _fuse(graph: Graph, w: Weights, whole: bool) -> Value:
    s = _scores(graph, w, whole)
    last = _values(graph, w)
    lead, out = s.product.output.shape[:-2], last.output
    if not lead or len(out.shape) < 3:
        raise Miss("scores without a batch axis")
    q, k, v, apart = operands(s.product, last)
    if equal(product(k.heads), product(v.heads)) is not True:  # of one, the repetition is behind what is not seen through
        q, k, v, apart = operands(s.product, last, repeated=True)
    if equal(product(k.heads), product(v.heads)) is not True:
        raise Miss(f"{product(k.heads)} key heads and {product(v.heads)} value heads")
    dtypes = {x.view.base.tensor.dtype for x in (q, k, v)}
    if len(dtypes) != 1:
        raise Miss(f"q, k and v are {', '.join(str(x.view.base.tensor.dtype) for x in (q, k, v))}")
    hidden = s.hidden
    masks = [MaskPart(v, hidden.met[v], negate=n) for v, n in hidden.mask.operands]
    masks += [MaskPart(v, hidden.met[v], factor=f) for v, f in hidden.additive]
    masks += [MaskPart(v, hidden.met[v], negate=n, blind=True) for v, n in hidden.filled]
    check_masks(masks, s.product.output, q, apart)
    sinks = Logits.of(w.sinks, w.scores.shape[:-2], product(q.heads))
    if apart and (s.per_query or any(isinstance(x, Value) for x in w.sinks)):
        raise Miss("what is one for each head meets heads that share an axis with rows")
    if isinstance(sinks, str):
        raise Miss(sinks)
    b = Builder(graph, before=last, loc=w.node.loc)
    given = [q.arranged(b, False), k.arranged(b, True), v.arranged(b, False)]
    for m, divides in s.per_query:
        at = b.transpose(b.reshape(m, shape=(1,) * (4 - len(m.shape)) + tuple(m.shape)), perm=(0, 2, 1, 3))
        given[0] = b.div(given[0], at) if divides else b.mul(given[0], at)
    if masks:
        given.append(emit_mask(b, masks, given[0].tensor.dtype, q))
    if sinks.parts:
        given.append(sinks.emit(b, given[0].shape[2], DType.F64 if DType.F64 in dtypes else DType.F32))
    y = b.attention(
        *given, scale=s.scale * q.view.scale * k.view.scale, causal=hidden.mask.causal, window=hidden.mask.window,
        softcap=s.softcap, sink=bool(sinks.parts), name="attention",
    )  # fmt: skip
    n, rows, heads, width = out.shape[0], out.shape[-2], out.shape[1:-2], out.shape[-1]
    if apart:
        order = [*q.batch, *q.heads]
        z = b.reshape(y, shape=(*(a.size for a in q.batch), rows, *(a.size for a in q.heads), width))
        place = {id(a): i + (i >= len(q.batch)) for i, a in enumerate(order)}
        lead_atoms = [place[id(a)] for axis in q.lead for a in axis]
        z = b.transpose(z, perm=(*lead_atoms, len(q.batch), len(order) + 1))
        z = b.reshape(z, shape=out.shape)
    else:
        r = len(heads)
        z = b.reshape(y, shape=(n, rows, *heads, width))
        z = b.transpose(z, perm=(0, *range(2, 2 + r), 1, 2 + r))
    graph.replace_uses(out, z)
    erase_dead(graph, last)
    return y


def _read_mask(graph: Graph, node: Node, remarks: Remarks, whole: bool) -> bool:
    """Predicates in the boolean mask of an attention, or in a choice between 0 and -inf, become attributes."""
    q, k, v, *more = node.inputs
    a = AttentionAttrs.of(node)
    mask, sink = mask_and_sink(a, more)
    if mask is None:
        return False
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    read = hidden_by(mask, shape) if mask.tensor.dtype.is_float else None
    if read is not None and (read[2] == float("-inf") or (read[1] and exact(read[0], read[2], shape))):
        found, all_of_it, _ = read
        rest = [] if all_of_it else [mask]
    else:
        condition, keep, fill = choice_of(mask) or (mask, True, float("-inf"))
        if condition.tensor.dtype is not DType.BOOL:
            return False
        if fill != float("-inf"):
            made = blind.apart(graph, node, condition, keep, fill) if whole else None
            if made is not None:
                remarks.applied(_describe(made), made)
            return made is not None
        found = analyze(condition, shape, keep)
        rest = [mask] if found.operands == [(condition, not keep)] else []
    causal, window = a.causal, a.window
    found.meet(Mask(causal, window))
    if rest and (found.causal, found.window) == (causal, window):
        return False
    b = Builder(graph, before=node, loc=node.loc)
    if found.operands and not rest:
        rest = [emit_mask(b, [MaskPart(m, shape, negate=n) for m, n in found.operands], q.tensor.dtype)]
    rest += [] if sink is None else [sink]
    y = graph.add_node(node.op, [q, k, v, *rest], dataclasses.replace(a, causal=found.causal, window=found.window), before=node,
                       loc=node.loc).output  # fmt: skip
    remarks.applied(_describe(y), y)
    replace(graph, node.output, y)
    return True
