"""Linear attention computed by chunks of the sequence, as exports of Mamba2 and its kin have it.

    pad the sequence to a multiple of c -> reshape into chunks -> products under a masked decay within a chunk,
    a state from chunk to chunk -> reshape back -> the first s tokens

There are many spellings of what happens between, and it is known by what it comes to: between the paddings and the slice stand
sums, products, exponentials and running sums alone, places chosen by position. Such a function is analytic in its operands,
and so is linear attention; two of them that are equal at one point drawn at random are equal. Both are computed in f64, at
numbers of tokens of less than a chunk, of one, and of several: a loop that was unrolled for so many chunks has none of these
other numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from wasat.ir import Builder, DimLike, DType, Graph, IRError, Node, TensorType, Value, WasatError, evaluate, evaluate_dim
from wasat.ir.dims import equal, symbols_of
from wasat.ir.op import Body
from wasat.ir.ops.elementwise import Cast
from wasat.ir.ops.linear_attention import LinearAttention, LinearAttentionAttrs
from wasat.ir.ops.scan import ScanAttrs
from wasat.ir.ops.shape import Pad, Slice

from ..pattern import Mismatch, erase_dead

ANALYTIC = (
    "add", "sub", "mul", "neg", "exp", "matmul", "cumsum", "reduce_sum", "select", "gather", "slice", "pad", "concat",
    "reshape", "transpose", "broadcast_to", "cast", "scan",
)  # fmt: skip
"""What may stand between, of values that depend on the operands. Conditions and indices may not depend on them."""
_MOST_NODES = 4000
_MOST_ELEMENTS = 1 << 25
"""Of a value, at the sizes at which it is computed."""


@dataclass(frozen=True)
class Operand:
    """A value along the sequence, and where its axes are: batch, sequence, heads and, of some, features."""

    value: Value
    axes: tuple[int, ...]

    def sizes(self) -> tuple[DimLike, ...]:
        return tuple(self.value.shape[i] for i in self.axes[2:])


@dataclass(frozen=True)
class Role:
    """Which operand is what, and the attributes of the operation that it comes to."""

    operands: tuple[int, ...]
    """Indices of q, k, v, then decay and beta, where there are these."""
    attrs: LinearAttentionAttrs
    decays: tuple[float, ...] = ()
    """Of each head of the keys, where they are numbers and no operand."""


def chunk_of(node: Node) -> tuple[int, int] | None:
    """Of a slice that drops what padded its operand to a multiple of a chunk: the axis, and the chunk."""
    if not node.is_a("slice"):
        return None
    x, y = node.inputs[0].shape, node.outputs[0].shape
    cut = [i for i, (m, n) in enumerate(zip(x, y)) if equal(m, n) is not True]
    attrs = Slice.Attrs.of(node)
    if len(cut) != 1 or any(equal(d, 0) is not True for d in attrs.starts) or any(t != 1 for t in attrs.steps):
        return None
    n, padded = y[cut[0]], x[cut[0]]
    names = symbols_of([n])
    if len(names) != 1 or not set(symbols_of([padded])) <= {*names} or equal(n, 1) is not None:
        return None
    try:
        chunk = evaluate_dim(padded, {names[0]: 1})
        if evaluate_dim(n, {names[0]: 1}) != 1 or chunk < 2 or chunk > 4096:
            return None
        for size in (2, chunk - 1, chunk, chunk + 1, 3 * chunk, 3 * chunk + 2):
            if evaluate_dim(n, {names[0]: size}) != size or evaluate_dim(padded, {names[0]: size}) != -(-size // chunk) * chunk:
                return None
    except WasatError:
        return None
    return cut[0], chunk


def fused(graph: Graph, node: Node, axis: int, chunk: int, known: dict[str, Role | str]) -> str | None:
    """Replaces the slice ``node`` by linear attention; returns the rule. None where it does not go back to paddings; raises
    Mismatch where it is nothing that is known. ``known``: what was found of the same graph before."""
    length = node.outputs[0].shape[axis]
    root, local = _peeled(node.inputs[0], length)
    region = Region.of(root, length)
    if region is None:
        return None
    cone = region.cone(root)
    text = f"{cone} {axis} {[x.axes for x in region.operands]}"
    if text not in known:
        try:
            known[text] = Search(region, cone, node.outputs[0], axis, (chunk + 1, 1, chunk - 1, chunk, 3 * chunk + 1)).role()
        except Mismatch as e:
            known[text] = str(e)
    role = known[text]
    if isinstance(role, str):
        raise Mismatch(role)
    b = Builder(graph, before=node, loc=node.loc)
    y = emitted(b, region.operands, role, node.outputs[0], axis)
    for other in reversed(local):
        y = b.add(y, _unpadded(b, other, length, {}))
    chunks = node.inputs[0].node
    graph.replace(node, [y])
    if chunks is not None:
        erase_dead(graph, chunks)
    return role.attrs.rule


def _is_padding(v: Value, length: DimLike) -> Node | None:
    """The node that pads ``v`` behind, along an axis of ``length``, with zeros."""
    made = v.made_by("pad")
    if made is None:
        return None
    attrs = Pad.Attrs.of(made)
    if attrs.value != 0 or any(equal(d, 0) is not True for d in attrs.low):
        return None
    grown = [i for i, d in enumerate(attrs.high) if equal(d, 0) is not True]
    return made if len(grown) == 1 and equal(made.inputs[0].shape[grown[0]], length) is True else None


def _peeled(v: Value, length: DimLike) -> tuple[Value, list[Value]]:
    """``v`` without what is added to it token by token (an input of its own, times a number for each head)."""
    local: list[Value] = []
    while (made := v.made_by("add")) is not None:
        x, y = made.inputs
        if _as_large(x, v) and _is_local(y, length):
            v, other = x, y
        elif _as_large(y, v) and _is_local(x, length):
            v, other = y, x
        else:
            break
        local.append(other)
    return v, local


def _as_large(x: Value, total: Value) -> bool:
    """Whether ``x`` is not broadcast where it is added."""
    return len(x.shape) == len(total.shape) and all(equal(m, n) is not False for m, n in zip(x.shape, total.shape))


def _is_local(v: Value, length: DimLike, depth: int = 8) -> bool:
    """Whether it is made of padded values element by element, and of what does not run along the sequence."""
    if _is_padding(v, length) is not None or not set(symbols_of(v.shape)) & set(symbols_of([length])):
        return True
    return depth > 0 and v.node is not None and v.node.op.elementwise and all(
        _is_local(x, length, depth - 1) for x in v.node.inputs)  # fmt: skip


def _unpadded(b: Builder, v: Value, length: DimLike, made: dict[Value, Value]) -> Value:
    """What ``_is_local``, of the values before they are padded."""
    padding = _is_padding(v, length)
    if padding is not None:
        return padding.inputs[0]
    if v.node is None or not set(symbols_of(v.shape)) & set(symbols_of([length])):
        return v
    if v not in made:
        inputs = [_unpadded(b, x, length, made) for x in v.node.inputs]
        made[v] = b.graph.add_node(v.node.op, inputs, v.node.attrs, before=b.before, loc=v.node.loc).outputs[0]
    return made[v]


@dataclass
class Region:
    """What stands between the paddings and the slice."""

    operands: list[Operand]
    nodes: list[Node]

    @classmethod
    def of(cls, root: Value, length: DimLike) -> Region | None:
        """None where something is reached that is neither padded nor computed of positions alone."""
        operands: dict[Value, Operand] = {}
        nodes: list[Node] = []
        seen: set[Value] = set()
        waiting = [(root, False)]
        while waiting:
            v, ready = waiting.pop()
            if ready:
                assert v.node is not None
                nodes.append(v.node)
                continue
            if v in seen:
                continue
            padding = _is_padding(v, length)
            if padding is not None:
                x = padding.inputs[0]
                at = [i for i, d in enumerate(x.shape) if equal(d, length) is True]
                others = [i for i in range(len(x.shape)) if i not in at]
                if len(at) != 1 or len(others) not in (2, 3):
                    return None
                operands.setdefault(x, Operand(x, (others[0], at[0], *others[1:])))
                seen |= {v, x}
                nodes.append(padding)
                continue
            if v.node is None or v.node.op.kind in ("random", "collective") or len(nodes) > _MOST_NODES:
                return None
            seen.update(v.node.outputs)
            waiting += [(v, True), *((u, False) for u in v.node.inputs)]
        return cls(list(operands.values()), nodes) if 3 <= len(operands) <= 5 else None

    def cone(self, root: Value) -> Graph:
        """A graph in f64 of the operands alone; raises Mismatch where it is not analytic in these."""
        made, env = Graph("chunks"), dict[Value, Value]()
        for i, x in enumerate(self.operands):
            if not x.value.tensor.dtype.is_float:
                raise Mismatch(f"%{x.value.name} is {x.value.type}")
            env[x.value] = made.add_input(f"x{i}", x.value.tensor.with_dtype(DType.F64))
        _widen(made, self.nodes, env, {x.value for x in self.operands})
        made.set_outputs([env[root]])
        return made


def _widen(made: Graph, nodes: Iterable[Node], env: dict[Value, Value], depends: set[Value]) -> None:
    """Copies ``nodes`` to ``made``, in f64; raises Mismatch where one is not analytic in what it ``depends`` on."""
    b = Builder(made)
    for node in nodes:
        of_data, inputs = [v in depends for v in node.inputs], [env[v] for v in node.inputs]
        if any(of_data):
            at_places = node.inputs[:1] if node.is_a("select") else node.inputs[1:] if node.is_a("gather") else ()
            narrow = node.is_a("cast") and not Cast.Attrs.of(node).dtype.is_float
            if not node.is_a(*ANALYTIC) or narrow or any(v in depends for v in at_places):
                raise Mismatch(f"{node!r} stands between")
            depends.update(node.outputs)
        value = node.outputs[0].const
        if value is not None and value.dtype.kind == "f":
            env[node.outputs[0]] = b.constant(value.astype(np.float64), DType.F64)
        elif node.is_a("cast") and Cast.Attrs.of(node).dtype.is_float:
            [x] = inputs
            env[node.outputs[0]] = x if x.tensor.dtype is DType.F64 else b.cast(x, dtype=DType.F64)
        elif isinstance(node.attrs, ScanAttrs):
            body = node.attrs.body.graph
            turn, own = Graph(body.name), dict[Value, Value]()
            for v in body.inputs:
                own[v] = turn.add_input(v.name, v.tensor.with_dtype(DType.F64) if v.tensor.dtype.is_float else v.type)
            _widen(turn, body.nodes, own, set(body.inputs) if any(of_data) else set())
            turn.set_outputs([own[v] for v in body.outputs], body.output_names)
            copied = made.add_node(node.op, inputs, replace(node.attrs, body=Body(turn)))
            env.update(zip(node.outputs, copied.outputs))
        else:
            env.update(zip(node.outputs, made.add_node(node.op, inputs, node.attrs).outputs))


class Search:
    """Finds which operand is what, by trying. ``tokens``: so many, first to find it and then to confirm it."""

    def __init__(self, region: Region, cone: Graph, result: Value, axis: int, tokens: Sequence[int]) -> None:
        self.operands, self.cone, self.axis, self.tokens = region.operands, cone, axis, tokens
        others = [i for i in range(len(result.shape)) if i != axis]
        if len(others) != 3:
            raise Mismatch(f"%{result.name} is not [batch, sequence, head, feature]")
        self.order = (others[0], axis, *others[1:])
        self.heads, self.width = result.shape[others[1]], result.shape[others[2]]
        self.length, self.batch = result.shape[axis], result.shape[others[0]]
        for x in self.operands:
            if equal(x.value.shape[x.axes[0]], self.batch) is not True or not all(isinstance(d, int) for d in x.sizes()):
                raise Mismatch(f"%{x.value.name}: {x.value.type} is not [batch, sequence, head, ..]")

    def role(self) -> Role:
        first = self._drawn(self.tokens[0], 2)
        want = self._chunks(first)
        role = next((role for r in self._candidates(first) if (role := self._fits(r, first, want)) is not None), None)
        if role is None:
            raise Mismatch("what its chunks come to is no form of linear attention that is known")
        for tokens in self.tokens[1:]:
            drawn = self._drawn(tokens, 2 if tokens == 1 else 1)
            want = self._chunks(drawn)
            if not _equal(want, self._linear(role, drawn), bool(role.decays)):
                raise Mismatch(f"of {tokens} tokens its chunks come to something else")
        return role

    def _drawn(self, tokens: int, batch: int) -> list[np.ndarray]:
        """A point for each operand, [b, s, h, ..]: small, so that what is long ago is still seen."""
        rng = np.random.default_rng(tokens)
        env = {name: batch for name in symbols_of([self.batch])} | {name: tokens for name in symbols_of([self.length])}
        b, s = evaluate_dim(self.batch, env), evaluate_dim(self.length, env)
        sizes = [tuple(evaluate_dim(d, {}) for d in x.sizes()) for x in self.operands]
        return [rng.uniform(-0.1, 0.1, (b, s, *n)) * (1 if len(n) == 1 else (10 / n[-1]) ** 0.5) for n in sizes]

    def _chunks(self, drawn: Sequence[np.ndarray]) -> np.ndarray:
        feeds = {f"x{i}": np.transpose(x, np.argsort(o.axes)) for i, (x, o) in enumerate(zip(drawn, self.operands))}
        tokens, batch = drawn[0].shape[1], drawn[0].shape[0]
        env = {name: batch for name in symbols_of([self.batch])} | {name: tokens for name in symbols_of([self.length])}
        try:
            if any(np.prod([float(evaluate_dim(d, env)) for d in v.shape]) > _MOST_ELEMENTS for v in self.cone.values()):
                raise Mismatch(f"it is too large to be computed for {tokens} tokens")
            y = evaluate(self.cone, feeds)[0]
        except IRError as e:
            raise Mismatch(f"of {tokens} tokens its chunks cannot be computed: {str(e).splitlines()[0]}") from None
        return np.transpose(np.asarray(y), self.order)[:, :tokens]

    def _candidates(self, drawn: Sequence[np.ndarray]) -> Iterator[Role]:
        count = len(self.operands)
        sizes = [x.sizes() for x in self.operands]
        for order in _orders(count):
            rules = {3: ("linear",), 4: ("gated", "delta"), 5: ("gated_delta",)}[len(order)]
            q, k, v, *more = (sizes[i] for i in order)
            if not len(q) == len(k) == len(v) == 2 or q[0] != self.heads or q[1] != k[1] or v[1] != self.width:
                continue
            heads = max(k[0], v[0])
            if q[0] % heads or heads % min(k[0], v[0]) or any(x[0] != heads or (len(x) == 2 and x[1] != k[1]) for x in more):
                continue
            for rule, before in itertools.product(rules, (False, True)):
                attrs = LinearAttentionAttrs(rule, before=before)
                if not attrs.delta or len(more[-1]) == 1:
                    yield Role(order, attrs)
                if rule == "linear" and (decays := self._decays(order, before, drawn)):
                    yield Role(order, LinearAttentionAttrs("gated", log=min(decays) > 0, before=before), decays)

    def _decays(self, order: Sequence[int], before: bool, drawn: Sequence[np.ndarray]) -> tuple[float, ...]:
        """By how much the first token counts less, to the second that reads it: a number for each head of the keys, or of the
        queries where they differ among those of one. None where there is none."""
        q, k, v = (drawn[i] for i in order)
        if q.shape[1] < 3 or order[0] == order[1]:
            return ()
        alone = [x.copy() for x in drawn]
        alone[order[1]][:, 1:] = 0.0
        read = np.einsum("thd,hd->th", q[0], spread(k, q.shape[2])[0, 0])
        seen = self._chunks(alone)[0, :, :, 0]
        with np.errstate(all="ignore"):
            seen = seen / (read * spread(v, q.shape[2])[0, 0, :, 0])
            ratio = seen[int(before) + 1] / seen[int(before)]
            last = seen[-1] / seen[int(before)]  # numbers rounded to f32 may stand between
            finer = np.sign(ratio) * np.abs(last) ** (1 / (len(seen) - 1 - before))
            ratio = np.where(np.abs(finer - ratio) < 1e-6 * np.abs(ratio), finer, ratio)
        if not np.isfinite(ratio).all() or not ratio.all():
            return ()
        grouped = ratio.reshape(max(k.shape[2], v.shape[2]), -1)
        alike = np.abs(grouped - grouped[:, :1]).max() < 1e-12
        return tuple(float(x) for x in (grouped[:, 0] if alike else ratio))

    def _linear(self, role: Role, drawn: Sequence[np.ndarray]) -> np.ndarray:
        q, k, v, *more = (drawn[i] for i in role.operands)
        heads = len(role.decays) or max(k.shape[2], v.shape[2])
        k, v = spread(k, heads), spread(v, heads)
        state = np.zeros((q.shape[0], heads, k.shape[3], v.shape[3]))
        if role.decays:
            more = [np.broadcast_to(_as_given(role), k.shape[:3])]
        return LinearAttention().reference(role.attrs, q, k, v, state, *more)[0]

    def _fits(self, role: Role, drawn: Sequence[np.ndarray], want: np.ndarray) -> Role | None:
        """The role with the scale that makes it equal."""
        got = self._linear(role, drawn)
        scale = float((got * want).sum() / (got * got).sum())
        scale = 1.0 if abs(scale - 1) < 1e-9 else scale
        return replace(role, attrs=replace(role.attrs, scale=scale)) if _equal(
            want, got * scale, bool(role.decays)) else None  # fmt: skip


def spread(x: np.ndarray, heads: int) -> np.ndarray:
    """[b, s, g, d] -> [b, s, heads, d], each head for as many."""
    return np.repeat(x, heads // x.shape[2], axis=2)


def _as_given(role: Role) -> np.ndarray:
    """Decays as the operation takes them, in f64."""
    decays = np.asarray(role.decays)
    return np.log(decays) if role.attrs.log else decays


def _equal(x: np.ndarray, y: np.ndarray, numbers: bool) -> bool:
    """But for roundings of f64; of elements that are sums of a few hundred terms. ``numbers``: decays are numbers of the graph,
    powers of which it has rounded to f32, each by itself."""
    within = (1e-6 if numbers else 1e-10) * np.abs(y).max((0, 1, 3), initial=0, keepdims=True)
    return bool(np.isfinite(x).all() and (np.abs(x - y) <= within).all() and within.any())


def _orders(count: int) -> Iterator[tuple[int, ...]]:
    """Operands by role: each once, then some in more than one (keys that are the values, too)."""
    if count >= 3:
        yield from itertools.permutations(range(count))
    for n in range(max(3, count + 1), 6):
        yield from (o for o in itertools.product(range(count), repeat=n) if len({*o}) == count)


def _repeated(b: Builder, x: Value, heads: int, count: int) -> Value:
    """[n, s, heads, d] -> [n, s, count, d], each head for as many."""
    n, s, _, d = x.shape
    wide = b.broadcast_to(b.reshape(x, shape=(n, s, heads, 1, d)), shape=(n, s, heads, count // heads, d))
    return b.reshape(wide, shape=(n, s, count, d))


def emitted(b: Builder, operands: Sequence[Operand], role: Role, result: Value, axis: int) -> Value:
    """The operation, in the order of axes and the type of ``result``."""
    attrs = role.attrs
    q, k, v, *more = (b.transpose(operands[i].value, perm=operands[i].axes) for i in role.operands)
    counts = [evaluate_dim(x.shape[2], {}) for x in (k, v)]
    g = len(role.decays) or max(counts)
    k, v = (x if m == g else _repeated(b, x, m, g) for x, m in zip((k, v), counts))
    n, s, _, d = k.shape
    if role.decays:
        more = [b.broadcast_to(b.constant(_as_given(role).astype(np.float32)), shape=(n, s, g))]
    dtype = DType.F32 if q.tensor.dtype.bits < 32 else q.tensor.dtype
    state = b.broadcast_to(b.constant(0.0, dtype), shape=(n, g, d, v.shape[3]))
    more = [x if x.tensor.dtype in (q.tensor.dtype, DType.F32) else b.cast(x, dtype=DType.F32) for x in more]
    y, _ = b.linear_attention(
        q, k, v, state, *more, rule=attrs.rule, scale=attrs.scale, log=attrs.log, before=attrs.before)  # fmt: skip
    others = [i for i in range(4) if i != axis]
    order = (others[0], axis, *others[1:])
    y = b.transpose(y, perm=tuple(order.index(i) for i in range(4)))
    assert isinstance(result.type, TensorType)
    return y if y.tensor.dtype is result.type.dtype else b.cast(y, dtype=result.type.dtype)


__all__ = ["ANALYTIC", "Operand", "Region", "Role", "Search", "chunk_of", "emitted", "fused"]
