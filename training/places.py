"""What a loss is a mean over: how much each of the calls counts whose gradients one update takes together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from wasat.ir import Graph, IRError, Node, Value, copy_node


@dataclass(frozen=True)
class Places:
    """What a mean is over: ``count``, how many places or how much weight; and ``divisor``, the number that it divides by: the
    count and what keeps it from 0. None: there are several, or what learns beside the mean has no part in its sum. ``alike``:
    all values that are the count, however often the graph computes it."""

    count: Value
    divisor: Value | None
    alike: frozenset[Value]

    def over(self, graph: Graph, source: Graph, total: Value, env: Mapping[Value, Value]) -> Value:
        """The divisor, were the count ``total``: ``env`` has the values of ``source`` in ``graph``, which it is added to."""
        assert self.divisor is not None
        here, above, todo = {**env, **dict.fromkeys(self.alike, total)}, set(), [self.divisor]
        while todo:
            v = todo.pop()
            if v not in self.alike and v.node is not None and v.node not in above:
                above.add(v.node)
                todo += v.node.inputs
        changed = set(self.alike)
        for node in source.nodes:
            if node in above and not changed.isdisjoint(node.inputs):
                copy_node(graph, node, here)
                changed.update(node.outputs)
        return here[self.divisor]


def places(graph: Graph, trained: Collection[str]) -> Places | None:
    """What the loss, the first output, is a mean over; None for a loss whose calls count alike.

    A mean over places is ``sum / count`` where the count is a sum over the data, whatever keeps it from 0; means over the same
    places add up to one. What no data or no trained parameter is in may stand beside it. Raises IRError for a sum of means over
    different places: no weight of a call is right for all of them; and for a divisor that is not as the count is, where what
    learns stands beside the mean, or there are several divisors.
    """
    learning = _reached(graph, [v for name, v in graph.params.items() if name in trained], True)
    data = _reached(graph, graph.inputs, False)
    numbers = _numbered(graph)
    counts: dict[object, Value] = {}
    divisors: dict[object, Value] = {}
    beside = False
    kinds: dict[object, Value] = {}
    todo = [graph.outputs[0]]
    while todo:
        v = todo.pop()
        if v not in learning or v not in data or v.node is None:
            beside = beside or v in learning
            continue
        name, inputs = v.node.op.name, v.node.inputs
        fixed = [x for x in inputs if x not in data and x not in learning]
        if name in ("add", "sub", "neg", "cast", "reshape") and all(x.tensor.size == 1 for x in inputs):
            todo += inputs
        elif name == "reduce_sum" and inputs[0].node is not None and _divisor(inputs[0].node, learning) is not None:
            todo.append(inputs[0])
        elif (name == "mul" and fixed) or (name == "div" and inputs[1] in fixed):
            todo.append(inputs[0] if inputs[1] in fixed else inputs[1])
        else:
            divisor = _divisor(v.node, learning)
            count = None if divisor is None else _count(divisor, numbers)
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
    if len(divisors) == 1 and not beside:
        return Places(count, next(iter(divisors.values())), alike)
    for divisor in divisors.values():
        if held := _held(divisor):
            why = "parameters that learn stand beside the mean" if beside else "the means divide by several numbers"
            raise IRError(
                f"the loss is a mean over %{count.name} that divides by %{divisor.name}, which {held}; as {why}, no weight of "
                'a call is right then: divide by the count itself, or let calls count alike (weigh="calls")', divisor.loc,
            )  # fmt: skip
    return Places(count, None, alike)


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


def _divisor(node: Node, learning: Collection[Value]) -> Value | None:
    """The one number that no parameter is in by which the node divides."""
    if node.is_a("div"):
        divisor = node.inputs[1]
    elif node.is_a("mul"):
        made = next((v.node for v in node.inputs if v.node is not None and v not in learning), None)
        if made is None or not made.is_a("div") or made.inputs[0].const is None:
            return None
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


_LITTLE = 1e-6
"""What keeps a count from 0 and does not change it."""


def _held(divisor: Value) -> str:
    """What makes a divisor other than its count times a number, for a count that is not 0; empty if nothing does."""
    v = divisor
    while v.node is not None and not v.node.is_a("reduce_sum"):
        name, inputs = v.node.op.name, v.node.inputs
        if name in ("cast", "reshape"):
            v = inputs[0]
        elif name == "select":  # from 0 alone
            v = inputs[1]
        else:
            const = next(x.const for x in inputs if x.const is not None)
            v = inputs[0] if inputs[1].const is not None else inputs[1]
            least = float(abs(const).max()) if const.size else 0.0
            if name == "maximum" and not (least <= _LITTLE or (least <= 1 and _whole(v))):
                return f"is held to at least {least:g}"
            if name == "add" and least > _LITTLE:
                return f"adds {least:g} to it"
    return ""


def _whole(count: Value) -> bool:
    """Whether a count is a whole number: a sum of what was cast from booleans or integers, or such a number."""
    todo = [count]
    while todo:
        v = todo.pop()
        if not v.tensor.dtype.is_float:
            continue
        if v.node is None or not v.node.is_a("reduce_sum", "cast", "reshape", "broadcast_to", "mul"):
            return False
        todo += v.node.inputs
    return True


def _compares(condition: Value, count: Value, numbers: Mapping[Value, object]) -> bool:
    """Whether the condition is that the count is no 0."""
    node = condition.node
    if node is None or not node.is_a("greater", "not_equal") or numbers[node.inputs[0]] != numbers[count]:
        return False
    zero = node.inputs[1].const
    return zero is not None and not zero.any()


__all__ = ["Places", "places"]
