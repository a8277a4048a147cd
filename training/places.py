"""What a loss is a mean over: how much each of the calls counts whose gradients one update takes together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from wasat.ir import Builder, Graph, IRError, Node, Value, copy_node


@dataclass(frozen=True)
class Places:
    """What a mean is over: ``count``, how many places or how much weight; and ``divisor``, the number that it divides by: the
    count and what keeps it from 0. ``alike``: all values that are the count, however often the graph computes it. ``beside``:
    scalars without data that the loss adds to the mean and that learn, and ``sums``, the nodes from these to the loss."""

    count: Value
    divisor: Value
    alike: frozenset[Value]
    beside: frozenset[Value]
    sums: frozenset[Node]

    def over(self, graph: Graph, source: Graph, total: Value, env: Mapping[Value, Value]) -> Value:
        """The divisor, were the count ``total``, a scalar of any kind: ``env`` has the values of ``source`` in ``graph``, which
        it is added to."""
        b = Builder(graph)
        alike = b.reshape(b.cast(total, dtype=self.count.tensor.dtype), shape=self.count.shape)
        changed, above, todo = dict.fromkeys(self.alike, alike), set(), [self.divisor]
        while todo:
            v = todo.pop()
            if v not in self.alike and v.node is not None and v.node not in above:
                above.add(v.node)
                todo += v.node.inputs
        _copy_changed(graph, [node for node in source.nodes if node in above], changed, env)
        return changed[self.divisor]

    def shared(self, graph: Graph, share: Value) -> Value:
        """The loss of a graph, its first output, in which what stands beside the mean has this share, a scalar; added to it."""
        b = Builder(graph)
        changed = {v: b.mul(v, b.cast(share, dtype=v.tensor.dtype)) for v in self.beside}
        _copy_changed(graph, [node for node in graph.nodes if node in self.sums], changed, {})
        return changed[graph.outputs[0]]


def _copy_changed(graph: Graph, nodes: Sequence[Node], changed: dict[Value, Value], env: Mapping[Value, Value]) -> None:
    """Appends the nodes that read what changed, and adds what they give to it; all else stands in ``env``, or is the same."""
    for node in nodes:
        if not changed.keys().isdisjoint(node.inputs):
            here = {v: changed.get(v, env.get(v, v)) for v in node.inputs}
            copy_node(graph, node, here)
            changed.update((v, here[v]) for v in node.outputs)


def places(graph: Graph, trained: Collection[str]) -> Places | None:
    """What the loss, the first output, is a mean over; None for a loss whose calls count alike.

    A mean over places is ``sum / count`` where the count is a sum over the data, whatever keeps it from 0; means over the same
    places add up to one. What no data or no trained parameter is in may stand beside it. Raises IRError for a sum of means over
    different places: no weight of a call is right for all of them; for means over the same places whose divisors differ by more
    than a factor; and for a divisor that the data decide in another way.
    """
    learning = _reached(graph, [v for name, v in graph.params.items() if name in trained], True)
    data = _reached(graph, graph.inputs, False)
    numbers = _numbered(graph)
    counts: dict[object, Value] = {}
    divisors: dict[object, Value] = {}
    beside: set[Value] = set()
    sums: set[Node] = set()
    kinds: dict[object, Value] = {}
    todo = [graph.outputs[0]]
    while todo:
        v = todo.pop()
        if v not in learning or v not in data or v.node is None:
            if v in learning:
                beside.add(v)
            continue
        name, inputs = v.node.op.name, v.node.inputs
        fixed = [x for x in inputs if x not in data and x not in learning]
        if name in ("add", "sub", "neg", "cast", "reshape") and all(x.tensor.size == 1 for x in inputs):
            sums.add(v.node)
            todo += inputs
        elif (name == "mul" and fixed) or (name == "div" and inputs[1] in fixed):
            sums.add(v.node)
            todo.append(inputs[0] if inputs[1] in fixed else inputs[1])
        else:
            divisor = _divisor_of(v, learning, data)
            count = None if divisor is None else _count(divisor, numbers)
            if divisor is not None and count is None:
                at = f" ({divisor.loc})" if divisor.loc else ""
                raise IRError(
                    f"the loss divides by %{divisor.name}{at}, which the data decide and which is not read as how many places "
                    "they have or what these weigh, so that calls that are accumulated cannot be weighed: divide by a sum over "
                    'the data, or let calls count alike (weigh="calls")'
                )
            kind = None if count is None else numbers[count]
            kinds.setdefault(kind, v)
            if count is not None and divisor is not None:
                counts.setdefault(kind, count)
                divisors.setdefault(numbers[divisor], divisor)
    if len(kinds) > 1:
        terms = ", ".join(f"%{v.name}" + (f" ({v.loc})" if v.loc else "") for v in kinds.values())
        raise IRError(
            f"the loss adds means over different places, {terms}, and calls that are accumulated can be weighed "
            'for one of them only: make them means over the same places, or let calls count alike (weigh="calls")'
        )
    if not counts:
        return None
    count = next(iter(counts.values()))
    alike = frozenset(v for v, number in numbers.items() if number == numbers[count])
    if len(divisors) > 1 and not all(map(_follows, divisors.values())):
        names = ", ".join(f"%{v.name}" + (f" ({v.loc})" if v.loc else "") for v in divisors.values())
        raise IRError(
            f"the loss adds means over %{count.name}, divided by several numbers, {names}; they differ by more than a factor, "
            "and no weight of a call that is accumulated is right then: divide by one of them, or let calls count alike "
            '(weigh="calls")'
        )
    return Places(count, next(iter(divisors.values())), alike, frozenset(beside), frozenset(sums))


def _reached(graph: Graph, sources: Collection[Value], smoothly: bool) -> set[Value]:
    """The values that depend on these; ``smoothly``: that have gradients by them."""
    found = set(sources)
    for node in graph.nodes:
        if not found.isdisjoint(node.inputs) and (node.op.differentiable or not smoothly):
            found.update(node.outputs)
    return found


def _numbered(graph: Graph) -> dict[Value, object]:
    """The same for values that are computed in the same way."""
    numbers: dict[Value, object] = {v: i for i, v in enumerate([*graph.inputs, *graph.params.values()])}
    seen: dict[object, Node] = {}
    for node in graph.nodes:
        first = seen.setdefault((node.op, node.attrs, tuple(numbers[v] for v in node.inputs)), node)
        numbers.update((v, (first, i)) for i, v in enumerate(node.outputs))
    return numbers


def _divisor_of(v: Value, learning: Collection[Value], data: Collection[Value]) -> Value | None:
    """The one number that the data decide by which what ``v`` is a sum of is divided."""
    while (node := v.node) is not None:
        if (divisor := _divisor(node, learning)) is not None and divisor in data:
            return divisor
        own = [x for x in node.inputs if x in learning]
        if len(own) != 1 or not node.is_a("reduce_sum", "mul", "neg", "div", "cast", "reshape", "broadcast_to"):
            return None
        if node.is_a("div") and own[0] is not node.inputs[0]:
            return None
        (v,) = own
    return None


def _divisor(node: Node, learning: Collection[Value]) -> Value | None:
    """The one number that no parameter is in by which the node divides."""
    if node.is_a("div"):
        divisor = node.inputs[1]
    elif node.is_a("mul"):
        made = next((v.node for v in node.inputs if v.node is not None and v not in learning), None)
        while made is not None and made.is_a("broadcast_to", "reshape"):
            made = made.inputs[0].node
        if made is None or not made.is_a("div") or (made.inputs[0].const is None and made.inputs[0].tensor.size == 1):
            return None  # a number over another is no weight of each place
        divisor = made.inputs[1]
    else:
        return None
    while (spread := divisor.made_by("broadcast_to", "reshape")) is not None:
        divisor = spread.inputs[0]
    return divisor if divisor not in learning and divisor.tensor.size == 1 else None


def _count(divisor: Value, numbers: Mapping[Value, object]) -> Value | None:
    """The sum that a divisor is, through casts, factors, and what keeps it from 0."""
    count = divisor
    while count.node is not None:
        name, inputs = count.node.op.name, count.node.inputs
        if name == "reduce_sum":
            return count
        if name in ("cast", "reshape"):
            count = inputs[0]
        elif name in ("mul", "maximum", "add") and any(v.const is not None for v in inputs):
            count = inputs[0] if inputs[1].const is not None else inputs[1]
        elif name == "select" and inputs[2].const is not None and _compares(inputs[0], inputs[1], numbers):
            count = inputs[1]
        else:
            return None
    return None


def _follows(divisor: Value) -> bool:
    """Whether a divisor is its count times a number."""
    v = divisor
    while (node := v.node) is not None and not node.is_a("reduce_sum"):
        if not node.is_a("mul", "reshape") and not (node.is_a("cast") and v.tensor.dtype.is_float):
            return False
        v = node.inputs[node.is_a("mul") and node.inputs[0].const is not None]
    return True


def _compares(condition: Value, count: Value, numbers: Mapping[Value, object]) -> bool:
    """Whether the condition is that the count is no 0."""
    node = condition.node
    if node is None or not node.is_a("greater", "not_equal") or numbers[node.inputs[0]] != numbers[count]:
        return False
    zero = node.inputs[1].const
    return zero is not None and not zero.any()


__all__ = ["Places", "places"]
