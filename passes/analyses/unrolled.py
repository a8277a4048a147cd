"""Loops over the sequence that were written out turn by turn, for the number of tokens of one example.

    x[:, 0], x[:, 1], .. x[:, 20]     h1 = f(h0, x[:, 0]), h2 = f(h1, x[:, 1]), ..      put side by side: [b, 21, d]

torch's TorchScript exporter does that to Python loops (RWKV, RecurrentGemma, Mamba without its kernels), and calls the size
symbolic all the same: of other lengths such a file computes something else, or nothing.
"""

from __future__ import annotations

from wasat.ir import DimLike, Graph, Node, Value, evaluate_dim
from wasat.ir.dims import symbols_of
from wasat.ir.ops.shape import Slice

_FEWEST = 3
"""Turns that make a loop."""


def unrolled(graph: Graph) -> tuple[Value, int] | None:
    """The value whose elements are taken one by one, and how many: along an axis of symbolic size, each by a turn that reads
    the turn before it, and what the turns make is put side by side. None where there is none.
    """
    picks: dict[tuple[Value, int], dict[int, list[Value]]] = {}
    for node in graph.nodes:
        if (found := _pick(node)) is not None:
            axis, index = found
            picks.setdefault((node.inputs[0], axis), {}).setdefault(index, []).append(node.outputs[0])
    for (source, _), taken in picks.items():
        if len(taken) >= _FEWEST and set(taken) == set(range(len(taken))) and _turn_by_turn(graph, taken):
            return source, len(taken)
    return None


def said(found: tuple[Value, int]) -> str:
    """For those who want another length: what was found, and what to do."""
    source, n = found
    return (
        f"a loop over the sequence is written out for {n} turns, as many as the example took that it was exported with "
        f"(%{source.name} is taken element by element): of other lengths it computes something else, or nothing; write the "
        "loop as nn.scan or ONNX Scan, or export it as a formula over all tokens"
    )


def _pick(node: Node) -> tuple[int, int] | None:
    """The axis of symbolic size from which a node takes one element by its number, and that."""
    if (axis := node.op.picks(node.attrs)) is not None:
        index, size = node.inputs[1].const, node.inputs[0].shape[axis]
        known = index is not None and index.size == 1 and not isinstance(size, int)
        return (axis, int(index.reshape(-1)[0])) if known and index is not None and index.reshape(-1)[0] >= 0 else None
    if not isinstance(node.attrs, Slice.Attrs):
        return None
    x, attrs = node.inputs[0], node.attrs
    cut = [i for i, (d, e) in enumerate(zip(x.shape, node.outputs[0].shape)) if d != e]
    if len(cut) != 1 or isinstance(x.shape[cut[0]], int):
        return None
    low, high = (_of_many(ends[cut[0]]) for ends in (attrs.starts, attrs.stops))
    return (cut[0], low) if low is not None and high == low + 1 else None


def _of_many(d: DimLike) -> int | None:
    """A size, of sequences that are longer than any number in the file: ``min(5, s)`` is 5. None where it grows with them."""
    found = {evaluate_dim(d, dict.fromkeys(symbols_of([d]), size)) for size in (1 << 30, 1 << 31)}
    return found.pop() if len(found) == 1 else None


def _turn_by_turn(graph: Graph, taken: dict[int, list[Value]]) -> bool:
    """Whether turn i, which reads element i, also reads turn i - 1 and none later; all of them are put side by side."""
    reads = {v: 1 << i for i, values in taken.items() for v in values}
    put: set[int] = set()
    for node in graph.nodes:
        together = 0
        for v in node.inputs:
            together |= reads.get(v, 0)
        if together:
            for v in node.outputs:
                reads[v] = reads.get(v, 0) | together
        if node.is_a("concat", "scatter", "scatter_along"):
            put.update(reads.get(v, 0) for v in (node.inputs if node.is_a("concat") else node.inputs[2:]))
    return all((2 << i) - 1 in put for i in range(len(taken)))
