"""Recognizes mixtures of experts however they are written out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from wasat.ir import Builder, Graph, Node, TypeMismatch, Value
from wasat.ir.axes import product
from wasat.ir.op import concrete
from wasat.ir.ops.index import AxisAttrs, ScatterAttrs
from wasat.ir.ops.shape import Concat

from ..analyses.labels import Atom, Labels, arrange, every, flat, fresh, is_view, operand_labels, peel
from ..cleanup.hoist_params import param_only
from ..cleanup.rows_apart import rows_apart
from ..core import GraphPass, Remarks
from ..pattern import Mismatch, erase_dead, replace
from .expert_shares import Choice, axis_of, choice_of, chosen_by, is_number, support
from .stack_experts import Alike, Stack, terms_of

_NOT_ZERO = "no share is known to be zero but at the places of top_k"


@dataclass(frozen=True)
class FuseExperts(GraphPass):
    """Products with weights that tokens choose -> ``grouped_linear``, which reads what was chosen and computes no more.

    Three forms, whatever views lie between:

    - weights gathered for each token, ``x @ w[which]``;
    - all experts computed and summed over with shares of which most are zero, as is proved from how they are made: scattered to
      the places of a ``top_k``, products with a ``one_hot`` of them (so is dispatch by one), or a softmax over -inf elsewhere.
      What is computed for each expert is then computed for those at these places;
    - experts that are modules of their own: added up one after the other, each times its element of such shares or where its
      number was chosen, or in one after they were computed; likewise what is taken at the places of a choice.

    What an expert that is not chosen computes is multiplied by zero; were it infinite or NaN, so would be the sum.
    """

    name = "fuse-experts"

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        found = _Run(graph, remarks).run()
        if any(node.is_a("grouped_linear", "quantized_grouped_linear") for node in graph.nodes):
            found |= rows_apart(graph)  # exporters merge batch and sequence before the router
        return found


class _Run:
    """One sweep over a graph."""

    def __init__(self, graph: Graph, remarks: Remarks) -> None:
        self.graph, self.remarks, self.only = graph, remarks, param_only(graph)
        chosen_from = (n.inputs[0].shape[axis_of(n)] for n in graph.nodes if n.is_a("top_k", "arg_max", "arg_min"))
        self.sizes = {d for d in chosen_from if isinstance(d, int)}
        """How many there are to choose from, where there is a choice."""
        self.alike = Alike(graph.values() if self.sizes else (), self.only, self.sizes)
        self.arranged: dict[tuple[Value, tuple[Any, ...], tuple[int, ...]], Value] = {}
        """Rows and places in the form in which products read them."""
        self.b = Builder(graph)
        self.made = 0

    def run(self) -> bool:
        found = 0
        for attempt in (self.gathered, self.gated, self.picked, self.looped):
            self.arranged.clear()  # what an earlier sweep made may stand behind
            for node in list(self.graph.nodes):
                if node.erased or len(node.outputs) != 1:
                    continue
                self.b = Builder(self.graph, before=node, loc=node.loc)
                last, known, self.made = node.prev, dict(self.arranged), 0
                try:
                    new = attempt(node)
                    if new is not None and new.type != node.output.type:
                        raise Mismatch(f"the replacement would be {new.type}")
                except (Mismatch, TypeMismatch) as e:
                    self.remarks.missed(f"%{node.output.name}: experts are not fused: {e}", node)
                    new = None
                if new is None or not self.made:
                    self._take_back(node, last)
                    self.arranged = known
                    continue
                self.remarks.applied(f"%{node.output.name}: {self.made} grouped product{'s' * (self.made > 1)}", node)
                replace(self.graph, node.output, new)
                found += self.made
        for node in list(self.graph.nodes_reversed) if found else ():
            erase_dead(self.graph, node)  # experts that were stacked, and chosen from since
        self._experts_left()
        return bool(found)

    def _take_back(self, node: Node, last: Node | None) -> None:
        while node.prev is not None and node.prev is not last:
            self.graph.erase(node.prev)

    def _experts_left(self) -> None:
        """Names products of all experts beside a choice of some."""
        for node in self.graph.nodes:
            for v, axes in zip(node.inputs, _rule(node).operands) if node.op.kind == "product" else ():
                if any(f.role == "indexed" for axis in axes for f in axis):
                    continue
                base = _base(v)
                if v in self.only and len(base.shape) > 2 and base.shape[0] in self.sizes and node.inputs[0] not in self.only:
                    which = f"all {base.shape[0]} experts of %{base.name}"
                    self.remarks.missed(f"%{node.output.name}: {which} are computed: {_NOT_ZERO}", node)

    # -- weights that were gathered --------------------------------------------------------------------------------------
    def gathered(self, node: Node) -> Value | None:
        """x @ w[which], with views between."""
        out = fresh(node.output.shape)
        try:
            parts = _factors(node, operand_labels(node, out)[0]) if node.op.kind in ("product", "reduction") else []
        except Mismatch:  # nothing says that there are experts
            return None
        for i, (v, labels) in enumerate(parts if len(parts) == 2 else []):
            w, w_labels = peel(v, labels) if v not in self.only else (v, labels)
            taken = w.made_by("gather")
            if taken is None or w in self.only or taken.inputs[0] not in self.only:
                continue
            (stack, places), _ = operand_labels(taken, w_labels)
            experts = stack[AxisAttrs.of(taken).axis]
            if len(experts) != 1 or not every(places):
                continue
            if set(every(stack)) - {experts[0]} <= set(every(out)):
                continue  # nothing is summed over: no product
            which = self.counted(taken.inputs[1], concrete(experts[0].size))
            choice = Choice(*peel(which, places), experts[0], concrete(experts[0].size))
            return self.grouped(*peel(*parts[1 - i]), taken.inputs[0], stack, choice, out)
        return None

    def counted(self, places: Value, size: int) -> Value:
        """Places of a gather, of which negative ones count from the end, counted from the front."""
        node = places.node
        turned = node is not None and node.is_a("add") and _is_turn(node.inputs[1].node, node.inputs[0])
        front = node.inputs[0] if node is not None and turned else places  # exporters write it
        if chosen_by(front) is not None:
            return front
        b, dtype = self.b, places.tensor.dtype
        turn = b.select(b.less(places, 0), b.constant(size, dtype), b.constant(0, dtype))
        return b.add(places, turn)

    def grouped(self, x: Value, x_labels: Labels, w: Value, w_labels: Labels, choice: Choice, out: Labels) -> Value:
        """The product of x with each row's matrix of w, as ``out``. Raises Mismatch."""
        b, wanted, own = self.b, every(out), every(w_labels)
        n = tuple(a for a in own if a in wanted)
        k = tuple(a for a in own if a not in wanted and a is not choice.experts)
        first = [a for a in every(choice.labels) if a in wanted]  # in one order for all products of the same tokens
        lead = tuple((a,) for a in [*first, *(a for a in wanted if a not in first)] if a not in n)
        if set(every(x_labels)) & set(n):
            raise Mismatch(f"%{w.name} has an axis that rows of %{x.name} have, too")
        if not k:
            raise Mismatch(f"nothing of %{w.name} is summed over")
        weight = arrange(b, w, w_labels, ((choice.experts,), n, k))
        y = b.grouped_linear(self.shaped(x, x_labels, (*lead, k)), weight, self.places(choice, lead))
        self.made += 1
        shape = (*(a.size for (a,) in lead), *y.shape[-1:])
        return arrange(b, y if y.shape == shape else b.broadcast_to(y, shape=shape), (*lead, n), out)

    def places(self, choice: Choice, to: Labels) -> Value:
        return self.shaped(choice.places, choice.labels, to)

    def shaped(self, v: Value, labels: Labels, to: Labels) -> Value:
        """``v`` as products read it: one value for all of them."""
        own = every(labels)
        order = tuple(own.index(a) if a in own else -1 for a in every(to))
        key = v, (*(a.size for a in own), *order), tuple(len(flat(x)) for x in to)
        known = self.arranged.get(key)
        if known is None or (known.node is not None and known.node.erased):
            known = self.arranged[key] = arrange(self.b, v, labels, to)
        return known

    # -- all experts, most of them for nothing ---------------------------------------------------------------------------
    def gated(self, node: Node) -> Value | None:
        """A sum over experts, of which one factor is zero but at a token's places."""
        if not any(f.role == "reduced" for axes in _rule(node).operands for axis in axes for f in axis):
            return None
        out = fresh(node.output.shape)
        try:
            operands, _ = operand_labels(node, out)
            found = (support(v, labels) for v, labels in _factors(node, operands))
            choice = next((c for c in found if c is not None and c.experts not in every(out)), None)
        except Mismatch:  # nothing says that there are experts
            return None
        return None if choice is None else _Substitution(self, choice, every(out)).root(node, operands, out)

    def looped(self, node: Node) -> Value | None:
        """A sum of experts that are modules of their own, each times its share, or the cases of a choice."""
        terms = self.alike.cases(self.b, node) or terms_of(node) if self.sizes else []
        kinds: dict[int, list[Value]] = {}
        for term in terms:
            kinds.setdefault(self.alike.kind(term), []).append(term)
        groups = {kind: self.alike.numbered(of) for kind, of in kinds.items() if len(of) > 1}
        whole = [experts for experts in groups.values() if len(experts) > 1 and max(experts) - min(experts) < len(experts)]
        if any(groups.values()) and not whole:
            numbers = [(i, v.name) for of in kinds.values() for i, v in self.alike.numbered(of).items()]
            if len(numbers) in self.sizes and len(dict(numbers)) == len(numbers):
                raise Mismatch(f"one is not computed as another expert is: %{', %'.join(name for _, name in numbers)}")
        sums = []
        for experts in whole:
            if (made := self.summed([experts[i] for i in sorted(experts)], node)) is not None:
                sums.append(made)
                for v in experts.values():
                    terms.remove(v)
        if not sums:
            return None
        y, *rest = sums[::-1] + terms[::-1]
        for v in rest:
            y = self.b.add(y, v)
        return y

    def summed(self, experts: list[Value], node: Node) -> Value | None:
        """The sum of what one expert after the other gives; None where each may count for something."""
        stacked, _ = Stack(self.b, len(experts), self.only).of(experts)
        made = self.gated(self.b.reduce_sum(stacked, axes=(0,), keepdims=False).node)
        if made is None and len(experts) in self.sizes:
            self.remarks.missed(f"%{node.output.name}: all {len(experts)} experts are computed: {_NOT_ZERO}", node)
        return made

    def picked(self, node: Node) -> Value | None:
        """Of what all experts give, that of the chosen ones."""
        if not node.is_a("take_along") or node.inputs[0] in self.only:
            return None
        out = fresh(node.output.shape)
        try:
            (x, places), _ = operand_labels(node, out)
            axis = AxisAttrs.of(node).axis
            choice = choice_of(node.inputs[1], places, x[axis])
        except Mismatch:
            return None
        if choice is None or choice.partial:
            return None
        return _Substitution(self, choice, [a for a in every(out) if a not in flat(out[axis])]).picked(node.inputs[0], x, out)


class _Substitution:
    """What is computed for each expert, computed for the chosen ones."""

    def __init__(self, run: _Run, choice: Choice, out: list[Atom]) -> None:
        self.run, self.b, self.choice, self.e = run, run.b, choice, choice.experts
        self.original, self.inside = choice.places, None
        if choice.partial:  # the first expert stands for none, and counts for nothing
            b, dtype = run.b, choice.places.tensor.dtype
            places = b.sub(choice.places, b.constant(choice.first, dtype)) if choice.first else choice.places
            self.inside = b.less(places, b.constant(self.e.size, dtype))
            if choice.first:
                self.inside = b.logical_and(self.inside, b.greater_equal(places, b.constant(0, dtype)))
            self.choice = dataclasses.replace(choice, places=b.select(self.inside, places, b.constant(0, dtype)))
        self.each = choice.per_token(out)
        """Of the places: which of a token's experts."""
        places = self.original
        while (part := places.made_by("slice")) is not None:
            places = part.inputs[0]
        chosen = places.made_by("top_k")
        if self.each and self.each != (flat(choice.labels[axis_of(chosen)]) if chosen is not None else []):
            raise Mismatch("it is summed over tokens, too")
        self.known: dict[tuple[Value, Labels], Value] = {}

    @property
    def tokens(self) -> list[Atom]:
        """Of the places: which token. Atoms may have been taken apart since the last look."""
        return [a for a in every(self.choice.labels) if a not in flat(self.each)]

    def changed(self, labels: Labels) -> Labels:
        return tuple(tuple(b for a in flat(label) for b in (self.each if a is self.e else [a])) for label in labels)

    def root(self, node: Node, operands: list[Labels], out: Labels) -> Value:
        return self._whole(self._root(node, operands, out))

    def picked(self, v: Value, labels: Labels, out: Labels) -> Value:
        """``v`` at the places, an axis of which is that of experts."""
        return arrange(self.b, self._whole(self.value(v, labels)), self.changed(labels), out)

    def _whole(self, made: Value) -> Value:
        if self.e.parts:  # after something was taken to be the same for all experts
            raise Mismatch("the axis of experts is taken apart")
        return made

    def _root(self, node: Node, operands: list[Labels], out: Labels) -> Value:
        weights = [i for i, v in enumerate(node.inputs) if v in self.run.only and self.e in every(operands[i])]
        if weights and node.op.kind == "product":  # the sum over experts is that of a product with their weights
            (i,) = weights
            if len(node.inputs) > 2:
                raise Mismatch("a bias is added to the sum of experts")
            x = self.value(node.inputs[1 - i], operands[1 - i])
            whole = (tuple(self.each), *out)
            y = self.run.grouped(x, self.changed(operands[1 - i]), node.inputs[i], operands[i], self.choice, whole)
            return self.b.reduce_sum(self.within_experts(y, whole), axes=(0,), keepdims=False)
        new = [self.value(v, x) for v, x in zip(node.inputs, operands)]
        if self.inside is not None:
            i = next(i for i, x in enumerate(operands) if {self.e, *self.tokens} <= set(every(x)))  # the shares are in one
            new[i] = self.within_experts(new[i], self.changed(operands[i]))
        return self.run.graph.add_node(node.op, new, node.attrs, before=self.b.before, loc=node.loc).output

    def within_experts(self, v: Value, labels: Labels) -> Value:
        """``v``, and zero where the place is no expert."""
        if self.inside is None:
            return v
        inside = arrange(self.b, self.inside, self.choice.labels, labels)
        return self.b.select(inside, v, self.b.constant(0.0, v.tensor.dtype))

    def value(self, v: Value, labels: Labels, within: Labels | None = None) -> Value:
        """``v`` with the chosen experts in the place of all. ``within``: labels of the result of an elementwise operation."""
        labels = tuple(tuple(flat(x)) for x in labels)
        if self.e.parts:
            raise Mismatch("the axis of experts is taken apart")
        if self.e not in every(labels):
            return v
        if v in self.run.only:
            return self.taken(v, labels, labels if within is None else tuple(within))
        if (v, labels) not in self.known:
            if v.node is None or set(every(labels)) <= {self.e, *self.tokens}:
                self.known[v, labels] = self.taken(v, labels, labels)
            else:
                self.known[v, labels] = self.computed(v.node, labels)
        return self.known[v, labels]

    def taken(self, v: Value, labels: Labels, within: Labels) -> Value:
        """The parts of ``v`` at the places."""
        own, to = every(labels), self.changed(within)
        rest = tuple(a for a in own if a is not self.e and a not in self.tokens)
        lead = tuple((a,) for a in self.tokens if a in own)
        each = tuple(self.each)
        if not lead:  # of parameters: the same for all tokens
            places = self.run.places(self.choice, (*((a,) for a in self.tokens), each))
            x = self.b.gather(arrange(self.b, v, labels, ((self.e,), *((a,) for a in rest))), places, axis=0)
            return arrange(self.b, x, (*((a,) for a in self.tokens), each, *((a,) for a in rest)), to)
        if rest or len(lead) != len(self.tokens):
            raise Mismatch(f"%{v.name} is not known to be one number for each token and expert")
        if (known := self._shares(v, labels)) is not None:
            return arrange(self.b, *known, to)
        places = self.run.places(self.choice, (*lead, each))
        x = self.b.take_along(arrange(self.b, v, labels, (*lead, (self.e,))), places, axis=-1)
        return arrange(self.b, x, (*lead, each), to)

    def _shares(self, v: Value, labels: Labels) -> tuple[Value, Labels] | None:
        """What was put at the places, where ``v`` is that and zeros."""
        v, labels = peel(v, labels)
        if v.node is None or len(v.node.outputs) != 1:
            return None
        operands, _ = operand_labels(v.node, labels)
        if v.node.is_a("scatter_along") and ScatterAttrs.of(v.node).reduce in ("none", "add"):
            parts = [(v.node.inputs[1], operands[1]), (v.node.inputs[2], operands[2])]
        else:
            parts = [peel(*part) for part in _factors(v.node, operands)]
            for i, (hot, own) in enumerate(parts):
                made = hot.made_by("one_hot")
                if made is not None and own[-1] and flat(own[-1]) == [self.e]:
                    parts = [(made.inputs[0], own[:-1]), *parts[:i], *parts[i + 1 :]]
        if len(parts) != 2 or peel(*parts[0])[0] is not self.original:
            return None
        which = [a for a in every(parts[0][1]) if a not in every(labels)]
        x, own = parts[1]
        if len(which) != len(self.each) or not set(which) <= set(every(own)) or self.e in every(own):
            return None
        return x, tuple(tuple(dict(zip(which, self.each)).get(a, a) for a in flat(label)) for label in own)

    def computed(self, node: Node, labels: Labels) -> Value:
        if node.is_a("concat") and labels[axis := Concat.Attrs.of(node).axis] == (self.e,) and len(node.inputs) == self.e.size:
            stacked, _ = Stack(self.b, len(node.inputs), self.run.only).of(node.inputs)  # modules of their own
            rank = len(labels)
            turned = self.b.transpose(stacked, perm=(*range(1, axis + 1), 0, *range(axis + 1, rank + 1)))
            return self.value(self.b.reshape(turned, shape=node.output.shape), labels)
        operands, rule = operand_labels(node, labels)
        weights = [i for i, v in enumerate(node.inputs) if v in self.run.only and self.e in every(operands[i])]
        if node.op.kind == "product" and weights and weights[0] < 2:
            i = weights[0]
            x, own = node.inputs[1 - i], operands[1 - i]
            if self.e in every(own):
                x, own = self.value(x, own), self.changed(own)
            else:
                x, own = peel(x, own)
            y = self.run.grouped(x, own, node.inputs[i], operands[i], self.choice, self.changed(labels))
            if len(node.inputs) < 3:
                return y
            return self.b.add(y, self.value(node.inputs[2], operands[2], labels))
        roles = {f.role for axis, label in zip(rule.result, labels) if self.e in label for f in axis if f.size != 1}
        if not roles <= {"free", "repeated"}:
            raise Mismatch(f"{node!r} does not treat experts one by one")
        within = labels if node.op.elementwise else None
        new = [self.value(v, x, within) for v, x in zip(node.inputs, operands)]
        shape = tuple(product(*(a.size for a in x)) for x in self.changed(labels))
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(node.attrs):
            if field.name in ("shape", "stops"):
                old, full = getattr(node.attrs, field.name), node.output.shape
                changes[field.name] = tuple(s if d == f and s != f else d for d, f, s in zip(old, full, shape))
        attrs = dataclasses.replace(node.attrs, **changes) if changes else node.attrs
        made = self.run.graph.add_node(node.op, new, attrs, before=self.b.before, loc=node.loc).output
        if made.shape != shape:
            raise Mismatch(f"{node!r} does not treat experts one by one")
        return made


def _rule(node: Node) -> Any:
    return node.op.axes(node.attrs, *(v.type for v in node.inputs))


def _factors(node: Node, operands: list[Labels]) -> list[tuple[Value, Labels]]:
    """What a product, or a sum of products, multiplies."""
    if node.op.kind == "product" and node.op.factors == 2 and len(node.inputs) == 2:
        return list(zip(node.inputs, operands))
    if node.is_a("reduce_sum"):
        made = node.inputs[0].node
        if made is not None and made.is_a("mul"):
            return list(zip(made.inputs, operand_labels(made, operands[0])[0]))
        return [(node.inputs[0], operands[0])]
    return []


def _is_turn(node: Node | None, x: Value) -> bool:
    """Whether it is a number where x is below zero, and zero elsewhere."""
    if node is None or not node.is_a("select") or not is_number(node.inputs[2], 0.0):
        return False
    below = node.inputs[0].node
    return below is not None and below.is_a("less") and below.inputs[0] is x and is_number(below.inputs[1], 0.0)


def _base(v: Value) -> Value:
    while is_view(v.node):
        assert v.node is not None
        v = v.node.inputs[0]
    return v
