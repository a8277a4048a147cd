"""Recognizes linear attention among scans: by what a turn does to a matrix that is carried, however it is spelt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from wasat.ir import Builder, DimLike, Graph, Node, TensorType, Value
from wasat.ir.axes import product
from wasat.ir.lift import lift
from wasat.ir.ops.scan import ScanAttrs

from ..analyses.multilinear import TURN, Labels, NotLinear, Part, Term, Turn
from ..core import GraphPass, Remarks
from ..pattern import Mismatch, taken_back
from . import chunked, squares


@dataclass(frozen=True)
class FuseRecurrence(GraphPass):
    """A scan whose turn decays a matrix, writes an outer product to it and reads it -> ``linear_attention``; and what computes
    the same by chunks of the sequence (:mod:`.chunked`) or all at once (:mod:`.squares`).

    Found are decays for each head or each feature of the keys, the delta rule, states in either order of keys and values,
    reads before or after the write; what else a turn adds to what it reads, or multiplies it by, is done for all turns at once.
    """

    name = "fuse-recurrence"

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        changed = self._chunks(graph, remarks)
        for node in [n for n in graph.nodes if isinstance(n.attrs, ScanAttrs)]:
            attrs = ScanAttrs.of(node)
            axes = max((sum(d != 1 for d in v.shape) for v in node.inputs[: attrs.carries]), default=0)
            if axes < 2:
                continue
            try:
                rule = _fused(graph, node)
            except NotLinear:
                continue  # a recurrence of another kind
            except Mismatch as e:
                if axes > 2:  # else most often a vector of each row
                    remarks.missed(f"{node!r} runs turn by turn: {e}", node)
                continue
            remarks.applied(f"a scan is linear attention: {rule}", graph)
            changed = True
        return changed

    def _chunks(self, graph: Graph, remarks: Remarks) -> bool:
        changed = False
        known: dict[str, chunked.Role | str] = {}
        for node in list(graph.nodes):
            at = chunked.chunk_of(node)
            if at is None:
                continue
            axis, chunk = at
            try:
                rule = chunked.fused(graph, node, axis, chunk, known)
            except Mismatch as e:
                remedy = (
                    "attention of windows is attention of all tokens under a mask, of which a cache is derived, such as "
                    f"(query // {chunk} - key // {chunk} <= 1) & (key <= query)" if _weighs(node) else
                    "what is meant can be written with nn.linear_attention, ONNX LinearAttention or a scan over tokens"
                )  # fmt: skip
                remarks.missed(f"{node!r}, computed by chunks of {chunk} tokens, is not fused: {e}; {remedy}", node)
                continue
            if rule is not None:
                remarks.applied(f"chunks of {chunk} tokens are linear attention: {rule}", graph)
                changed = True
        for node in list(graph.nodes):
            scores = squares.square_of(node)
            rule = squares.fused(graph, node, scores, known) if scores is not None else None
            if rule is not None:
                remarks.applied(f"scores of all tokens by decays are linear attention: {rule}", graph)
                changed = True
        return changed


def _weighs(node: Node) -> bool:
    """Whether a softmax has a part in what ``node`` puts together, behind the layers that made its operands."""
    waiting, seen = [node], {node}
    while waiting:
        n = waiting.pop()
        if n.is_a("softmax"):
            return True
        if n.op.kind == "product" and any(map(_given, n.inputs)):
            continue
        makers = [v.node for v in n.inputs if v.node is not None and v.node not in seen]
        waiting += makers
        seen.update(makers)
    return False


def _given(v: Value) -> bool:
    """Whether it is a parameter, moved."""
    while v.node is not None and v.node.op.carries and len(v.node.inputs) == 1:
        v = v.node.inputs[0]
    return v.param is not None


def _fused(graph: Graph, node: Node) -> str:
    attrs = ScanAttrs.of(node)
    if not all(v.tensor.dtype.is_float for v in node.inputs[: attrs.carries]):
        raise NotLinear("integers are no states of linear attention")
    if attrs.carries != 1:
        raise Mismatch(f"it carries {attrs.carries} values")
    if attrs.reverse or not attrs.slices:
        raise Mismatch("it runs from the end" if attrs.reverse else "it takes nothing apart turn by turn")
    form = _form(node)
    b = Builder(graph, before=node, loc=node.loc)
    with taken_back(graph, node):
        results = _Emitter(b, node, form).run()
    names = [v.name for v in node.outputs]
    graph.replace(node, results)
    for v, name in zip(results, names):
        if v.node is not None and v.name != name and not graph.is_output(v):
            graph.rename(v, name)
    return form.rule


def _form(node: Node) -> _Form:
    """With as few products taken apart as it takes: a key that is normalized, too, is to be known again as a whole."""
    for fine in ("no", "turn"):
        try:
            return _Form(Turn(node, fine))
        except Mismatch:
            continue
    return _Form(Turn(node, "all"))


def _labels(parts: Iterable[Part]) -> set[int]:
    return {x for _, labels in parts for x in labels if x is not None}


def _having(parts: Sequence[Part], label: int) -> list[Part]:
    return [p for p in parts if label in p[1]]


def _renamed(parts: Iterable[Part], names: dict[int, int]) -> list[Part]:
    return [(v, tuple(None if x is None else names.get(x, x) for x in labels)) for v, labels in parts]


def _without(parts: Sequence[Part], others: Sequence[Part]) -> list[Part] | None:
    """``parts`` without each of ``others``; None where one is not there."""
    left = list(parts)
    for p in others:
        if p not in left:
            return None
        left.remove(p)
    return left


@dataclass
class _Form:
    """The operands of the operation that a turn comes to, as products, with numbers before them."""

    turn: Turn
    own: Labels = ()
    """The variables of the state's axes."""
    key: int = 0
    value: int = 0
    batch: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    """What stands beside the state's heads in what is read."""
    q: list[Part] = field(default_factory=list)
    k: list[Part] = field(default_factory=list)
    v: list[Part] = field(default_factory=list)
    decay: list[Part] = field(default_factory=list)
    beta: list[Part] | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    before: bool = False
    output: int = 0
    """Which of the scan's results is what was read."""
    labels: Labels = ()
    """Its variables."""
    after: list[Part] = field(default_factory=list)
    """What it is multiplied by then,"""
    more: list[Term] = field(default_factory=list)
    """and what is added."""

    def __post_init__(self) -> None:
        turn = self.turn
        self.own = tuple(turn.fresh(d) for d in turn.state.shape)
        keep, erase, write = self._changes(turn.of(turn.next, self.own))
        at = self._reads()
        found = self.own[at]
        assert found is not None
        self.key = found
        self.decay = [p for p in keep.parts if p[0] is not turn.state]
        self.numbers["decay"] = keep.number
        erased: list[Part] = []
        asked = 0
        if erase is not None:
            (moved,) = [labels for v, labels in erase.parts if v is turn.state]
            erased = [p for p in erase.parts if p[0] is not turn.state]
            new = next(x for x, y in zip(moved, self.own) if x != y)
            if moved[at] != new:
                raise Mismatch("it erases along another axis of the state than it is read along")
            assert new is not None
            asked = new
        fixed = _labels([*self.decay, *erased, *self.q])
        free = [x for x in self.own if x is not None and x != self.key and x not in fixed]
        free = [x for x in free if not any(self.key in labels for _, labels in _having(write.parts, x))]
        if not free:
            raise Mismatch("no axis of the state is one of values: its elements decay, or are written, each in its own way")
        self.value = free[-1]
        self.batch = [x for x in self.own if x not in (None, self.key, self.value)]
        self._write(write, erase, erased, asked)
        if not self.k or not _having(self.v, self.value):
            raise Mismatch("what it writes is no outer product of a key and a value")

    def _changes(self, terms: list[Term]) -> tuple[Term, Term | None, Term]:
        """The term that keeps the state, the one that erases, and the one that writes."""
        keep, erase, write = [], [], []
        for t in terms:
            states = [labels for v, labels in t.parts if v is self.turn.state]
            if not states:
                write.append(t)
            elif states[0] == self.own:
                keep.append(t)
            else:
                other = [(x, y) for x, y in zip(states[0], self.own) if x != y]
                if len(other) != 1 or other[0][0] in self.own:
                    raise Mismatch("it moves elements of the state")
                erase.append(t)
        keep, erase, write = ([t for t in found if t.number != 0] for found in (keep, erase, write))
        for found, what in ((keep, "keeps"), (write, "writes to"), (erase, "erases from")):
            if len(found) > 1 or (not found and found is not erase):
                raise Mismatch(f"it {what} the state by {len(found)} products, not one")
        return keep[0], erase[0] if erase else None, write[0]

    def _reads(self) -> int:
        """Finds the result that reads the state; returns the axis of the state over which it sums."""
        turn = self.turn
        reading = [i for i, v in enumerate(turn.body.outputs) if i and v in turn.depends]
        if len(reading) != 1:
            raise Mismatch(f"{len(reading)} of its results read the state, not one")
        self.output = reading[0]
        y = turn.body.outputs[self.output]
        self.labels = tuple(turn.fresh(d) for d in y.shape)
        terms = turn.of(y, self.labels, through=False)
        states = (turn.state, turn.next)
        reads = [t for t in terms if any(v in states for v, _ in t.parts)]
        if len(reads) != 1:
            raise Mismatch(f"it reads the state by {len(reads)} products, not one")
        [(state, labels)] = [p for p in reads[0].parts if p[0] in states]
        self.before = state is turn.state
        summed = [i for i, x in enumerate(labels) if x is not None and x not in self.labels]
        real = [x for x in labels if x is not None]
        if len(summed) != 1 or len(set(real)) != len(real):
            raise Mismatch(f"what it reads is summed over {len(summed)} axes of the state, not one")
        names = {x: y for x, y in zip(labels, self.own) if x is not None and y is not None}
        others = _renamed((p for p in reads[0].parts if p[0] not in states), names)
        self.group = [x for x in self.labels if x is not None and x not in names]
        self.labels = tuple(None if x is None else names.get(x, x) for x in self.labels)
        key = self.own[summed[0]]
        seen = {*self.own, *self.labels, TURN}
        if not _labels(others) <= seen:
            raise Mismatch("what it reads is summed over something else, too")
        assert key is not None
        self.q = _having(others, key)
        rest = [p for p in others if p not in self.q]
        heads = {x for x in _labels(self.q)} | set(self.group)
        self.after = [p for p in rest if not _labels([p]) <= heads | {TURN}]
        self.q += [p for p in rest if p not in self.after]
        self.numbers["scale"] = reads[0].number
        self.more = [Term(t.number, tuple(_renamed(t.parts, names))) for t in terms if t is not reads[0]]
        return summed[0]

    def _write(self, write: Term, erase: Term | None, erased: list[Part], asked: int) -> None:
        parts = list(write.parts)
        self.k, values = _having(parts, self.key), _having(parts, self.value)
        if any(p in values for p in self.k):
            raise Mismatch("what it writes is no outer product of a key and a value")
        rest = [p for p in parts if p not in self.k and p not in values]
        number = write.number
        if erase is not None:
            decays = _renamed(self.decay, {self.key: asked})
            left = _without(erased, decays)
            if left is None:
                raise Mismatch("it erases what is not decayed first")
            asks, keys = _having(left, asked), _having(left, self.key)
            if _without(_renamed(asks, {asked: self.key}), keys) != [] or _without(self.k, keys) != []:
                raise Mismatch("it erases by another key than it writes")
            self.beta = [p for p in left if p not in asks and p not in keys]
            more = _without(rest, self.beta)
            if more is None:
                raise Mismatch("what it writes does not have the rate by which it erases")
            rest, self.numbers["beta"] = more, -erase.number / self.numbers["decay"]
            number = number / self.numbers["beta"]
        self.v, self.numbers["v"] = [*values, *rest], number

    @property
    def rule(self) -> str:
        gated = bool(self.decay) or self.numbers["decay"] != 1
        return {(False, False): "linear", (True, False): "gated", (False, True): "delta", (True, True): "gated_delta"}[
            gated, self.beta is not None
        ]


class _Emitter:
    """Computes the operands for all turns, the operation, and the scan's results from its own."""

    def __init__(self, b: Builder, node: Node, form: _Form) -> None:
        self.b, self.node, self.form, self.turn = b, node, form, form.turn
        self.dtype = form.turn.state.tensor.dtype
        self.made: dict[Value, tuple[Value, bool]] = {}

    def size(self, labels: Iterable[int]) -> DimLike:
        return product(*(self.turn.sizes[x] for x in labels))

    def run(self) -> list[Value]:
        form, b, sizes = self.form, self.b, self.turn.sizes
        first, heads = form.batch[:1], form.batch[1:]
        n, g, s = self.size(first), self.size(heads), sizes[TURN]
        d, e, r = sizes[form.key], sizes[form.value], self.size(form.group)
        front = [*first, TURN, *heads]
        q = self.arranged(form.q, 1.0, [*front, *form.group, form.key], (n, s, g * r, d))
        k = self.arranged(form.k, 1.0, [*front, form.key], (n, s, g, d))
        v = self.arranged(form.v, form.numbers["v"], [*front, form.value], (n, s, g, e))
        more, log = [], False
        if "gated" in form.rule:
            each, parts = form.key in _labels(form.decay), form.decay
            log = len(parts) == 1 and form.numbers["decay"] == 1 and self._exponent(parts[0]) is not None
            parts = [self._exponent(parts[0]) or parts[0]] if log else parts
            labels = [*front, form.key] if each else front
            more.append(self.arranged(parts, form.numbers["decay"], labels, (n, s, g, d) if each else (n, s, g)))
        if form.beta is not None:
            more.append(self.arranged(form.beta, form.numbers["beta"], front, (n, s, g)))
        order = [*first, *heads, form.key, form.value]
        start = self._moved(self.node.inputs[0], form.own, order, (n, g, d, e))
        y, last = b.linear_attention(
            q, k, v, start, *more, rule=form.rule, scale=form.numbers["scale"], log=log or not more or form.rule == "delta",
            before=form.before,
        )  # fmt: skip
        back = {x: i for i, x in enumerate(order)}
        last = b.reshape(last, shape=tuple(sizes[x] for x in order))
        last = b.transpose(last, perm=tuple(back[x] for x in form.own if x is not None))
        results = [b.reshape(last, shape=self.turn.state.shape)]
        for i, v in enumerate(self.turn.body.outputs[1:], 1):
            results.append(self._read(y, [*front, *form.group, form.value]) if i == form.output else self._stacked(v))
        return results

    def _read(self, y: Value, labels: list[int]) -> Value:
        """The scan's own result, of what the operation read."""
        form, b, sizes = self.form, self.b, self.turn.sizes
        shape = tuple(sizes[x] for x in labels)
        y = b.reshape(y, shape=shape)
        if form.after:
            y = b.mul(y, self.arranged(form.after, 1.0, labels, shape))
        for t in form.more:
            summed = sorted(_labels(t.parts) - set(labels))
            term = self.arranged(t.parts, t.number, [*labels, *summed], (*shape, *(sizes[x] for x in summed)))
            y = b.add(y, b.reduce_sum(term, axes=tuple(range(len(labels), len(labels) + len(summed)))) if summed else term)
        out = [TURN, *(x for x in form.labels if x is not None)]
        y = b.transpose(y, perm=tuple(labels.index(x) for x in out))
        return b.reshape(y, shape=self.node.outputs[form.output].shape)

    def _stacked(self, v: Value) -> Value:
        """What a turn makes without the state, for all turns."""
        x, every = self.outside(v)
        return x if every else self.b.broadcast_to(x, shape=(self.turn.sizes[TURN], *x.shape))

    def _moved(self, x: Value, labels: Labels, order: list[int], shape: tuple[DimLike, ...]) -> Value:
        x = self.b.reshape(x, shape=tuple(self.turn.sizes[y] for y in labels if y is not None))
        real = [y for y in labels if y is not None]
        return self.b.reshape(self.b.transpose(x, perm=tuple(real.index(y) for y in order)), shape=shape)

    def _exponent(self, part: Part) -> Part | None:
        """Of a decay that is an exponential: the exponent."""
        v, labels = part
        made = v.made_by("exp")
        return (made.inputs[0], labels) if made is not None else None

    def arranged(self, parts: Sequence[Part], number: float, labels: Sequence[int], shape: tuple[DimLike, ...]) -> Value:
        """The product of ``parts`` times the number, with axes ``labels``, under ``shape``."""
        total: Value | None = None
        full = tuple(self.turn.sizes[x] for x in labels)
        for v, own in sorted(parts, key=lambda p: len(_labels([p]))):
            x = v
            if v.graph is self.turn.body:
                x, every = self.outside(v)
                own = (TURN, *own) if every else own
            real = [y for y in own if y is not None]
            if not set(real) <= set(labels):
                raise Mismatch(f"%{v.name} is summed over an axis that neither the state nor what it is read by has")
            assert len(set(real)) == len(real)  # a term has each axis of the state once
            x = self.b.reshape(x, shape=tuple(self.turn.sizes[y] for y in real))
            x = self.b.transpose(x, perm=tuple(real.index(y) for y in labels if y in real))
            x = self.b.reshape(x, shape=tuple(d if y in real else 1 for y, d in zip(labels, full)))
            total = x if total is None else self.b.mul(total, x)
        if total is None:
            total = self.b.constant(number, self.dtype)
        elif number != 1:
            total = self.b.mul(total, number)
        if tuple(total.shape) != full:
            total = self.b.broadcast_to(total, shape=full)
        return self.b.reshape(total, shape=shape)

    def outside(self, v: Value) -> tuple[Value, bool]:
        """A value of the body that does not depend on the state, for all turns: these its first axis, or one for all."""
        if v not in self.made:
            if v in self.turn.operand:
                self.made[v] = self.turn.operand[v], v in self.turn.sliced
            else:
                assert v.node is not None
                self._lift(v.node)
        return self.made[v]

    def _lift(self, node: Node) -> None:
        given = [self.outside(v) for v in node.inputs]
        inputs, which, size = [x for x, _ in given], [up for _, up in given], self.turn.sizes[TURN]
        attrs = node.attrs
        if any(which) and node.op.elementwise:
            rank = len(node.outputs[0].shape)
            inputs = [
                self.b.reshape(x, shape=(size, *[1] * (rank + 1 - len(x.shape)), *x.shape[1:])) if up else x
                for x, up in zip(inputs, which)
            ]
        elif any(which):
            types = [v.type for v in node.inputs]
            lifted = lift(node.op, attrs, types, which, size) if all(isinstance(t, TensorType) for t in types) else None
            if lifted is None:
                raise Mismatch(f"{node!r} cannot be computed for all turns at once")
            attrs = lifted
        made = self.b.graph.add_node(node.op, inputs, attrs, before=self.b.before, loc=node.loc)
        self.made.update((v, (x, any(which))) for v, x in zip(node.outputs, made.outputs))
