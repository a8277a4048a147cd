"""Rematerialization: the backward pass computes again what is cheap, so that less is kept for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
from wasat.ir import Builder, Graph, Node, Program, Value

from ..analyses.cost import bytes_of, memory_of, operations_of, peak_bytes, unbound
from ..core import Pass, PassError, Remarks


@dataclass(frozen=True)
class Rematerialize(Pass):
    """In @graph, a joint forward and backward pass, the fewest bytes are kept for the backward pass; the rest is recomputed.

    The nodes up to those that make the outputs ``forward`` (by default all outputs but ``grad.*``) are the forward pass, the
    rest the backward pass. What to keep is a minimum cut between what must be computed once and what the backward pass reads,
    each value weighing its bytes (as PyTorch's AOTAutograd has it); of equal cuts the one that recomputes least. Inputs,
    parameters and constants weigh nothing. Products and convolutions are not computed again, nor what holds them (attention),
    unless ``again`` names the operation; random numbers are: they are functions of their key. Every result stays the same to
    the bit.

    ``sizes`` binds the symbols, as numbers to weigh with: the result holds for all sizes. Where the peak of live bytes
    (:func:`.memory.peak_bytes`; donated states are written in place) would not fall, nothing changes, and a remark says so.

    Raises PassError for a symbol without size and for an output that is not there.
    """

    graph: str = "gradients"
    sizes: tuple[tuple[str, int], ...] = ()
    forward: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    name = "rematerialize"

    def requires(self, program: Program) -> None:
        g = program[self.graph]
        if missing := unbound(g, dict(self.sizes)):
            raise PassError(f"@{g.name} has symbols without a size to weigh memory with: {', '.join(missing)} (sizes=)")
        if absent := [n for n in self.forward if n not in g.output_names]:
            raise PassError(f"@{g.name} has no output {', '.join(absent)}; there are {', '.join(g.output_names)}")

    def run(self, program: Program, remarks: Remarks) -> bool:
        old, sizes = program[self.graph], dict(self.sizes)
        g = old.clone()
        results = [v for n, v in zip(g.output_names, g.outputs) if self._is_forward(n) and v.node is not None]
        forward = _until(g, {v.node for v in results})
        values = [v for node in forward for v in node.outputs]
        read = [v for v in values if any(user not in forward for user in v.users)]
        if not read:
            remarks.missed("the backward pass reads nothing of the forward pass", old)
            return False
        kept = self._cut(g, forward, read)
        made = _Recomputation(g, forward, kept, values[-1])
        made.run()
        before, now = (sum(bytes_of(v, sizes) for v in {memory_of(v): None for v in vs}) for vs in (read, kept))
        donated = {s.name for s in program.interface.states if s.donated}
        peaks = [peak_bytes(x, sizes, donated) for x in (old, g)]
        done = sum(operations_of(n, sizes) for n in made.nodes)
        whole = sum(operations_of(n, sizes) for n in old.nodes)
        what = (
            f"kept for the backward pass: {_size(now)}, before {_size(before)}; "
            f"peak {_size(peaks[1])}, before {_size(peaks[0])}; "
            f"recomputed: {len(made.nodes)} nodes, {done:,} operations ({done / max(whole, 1):.1%} more)"
        )
        if peaks[1] >= peaks[0]:
            remarks.missed(f"it would not lower the peak. {what}", old)
            return False
        program.graphs[self.graph] = g
        remarks.applied(what, g)
        return True

    def _is_forward(self, output: str) -> bool:
        return output in self.forward if self.forward else not output.startswith("grad.")

    def _cut(self, g: Graph, forward: Mapping[Node, None], read: Iterable[Value]) -> set[Value]:
        """The values to keep."""
        net, sizes = nx.DiGraph(), dict(self.sizes)
        for v in read:
            net.add_edge((v, "out"), "backward")  # no capacity: never cut
        for v in g.values():
            if v.node is not None and v.node not in forward:
                continue
            net.add_edge((v, "in"), (v, "out"), capacity=0 if g.is_output(v) else bytes_of(v, sizes))
            if v.node is None or not self._cheap(v.node):
                net.add_edge("once", (v, "in"))
            else:
                net.add_edges_from(((x, "out"), (v, "in")) for x in v.node.inputs)
        if "once" not in net or "backward" not in net:
            return set()
        # networkx gives the side of those that can still reach the sink: of minimum cuts, the one nearest to it
        _, (_, behind) = nx.minimum_cut(net, "once", "backward")
        return {v for v, end in (x for x in behind if x != "backward") if end == "out" and (v, "in") not in behind}

    def _cheap(self, node: Node) -> bool:
        return node.is_a(*self.again) or (bool(node.inputs) and node.op.cheap)


class _Recomputation:
    """Rewrites the graph so that the backward pass reads of the forward pass only what is kept."""

    def __init__(self, g: Graph, forward: Mapping[Node, None], kept: set[Value], after: Value) -> None:
        self.g, self.forward, self.kept, self.after = g, forward, kept, after
        self.nodes: list[Node] = []
        """What was recomputed, as it was."""
        self._again: dict[Value, Value] = {}
        self._barriers: dict[Value, Value] = {}

    def run(self) -> None:
        for node in list(self.g.nodes):
            if node not in self.forward:
                self.g.set_inputs(node, [self._behind(v, node) for v in node.inputs])

    def _first(self, v: Value) -> bool:
        """Whether the backward pass reads ``v`` as it is."""
        return v in self.kept or v.node is None or v.node not in self.forward

    def _behind(self, v: Value, at: Node) -> Value:
        """``v`` for a reader in the backward pass, computed again just before ``at`` if it is not kept."""
        stack = [v]
        while stack:  # no recursion: chains are as long as the model is deep
            x = stack[-1]
            if self._first(x) or x in self._again:
                stack.pop()
                continue
            assert x.node is not None
            wanted = [i for i in x.node.inputs if not self._first(i) and i not in self._again]
            if wanted:
                stack += wanted
                continue
            self._compute(x.node, at)
        return v if self._first(v) else self._again[v]

    def _compute(self, node: Node, at: Node) -> None:
        constant = all(i.const is not None for i in node.inputs)
        operands = [self._again[i] if i in self._again else self._barrier(i, at, constant) for i in node.inputs]
        names = [v.name for v in node.outputs]
        new = self.g.add_node(node.op, operands, node.attrs, before=at, loc=node.loc, names=names)
        self._again.update(zip(node.outputs, new.outputs))
        self.nodes.append(node)

    def _barrier(self, v: Value, at: Node, constant: bool) -> Value:
        """``v`` for a recomputation, which must not be merged with the first computation; one such operand is enough."""
        if v.const is not None and not constant:
            return v
        if v not in self._barriers:
            self._barriers[v] = Builder(self.g, before=at, loc=at.loc).barrier(v, self.after)
        return self._barriers[v]


def _until(g: Graph, wanted: set[Node | None]) -> dict[Node, None]:
    """The nodes up to the last of those ``wanted``, in order."""
    found: dict[Node, None] = {}
    left = len(wanted)
    for node in g.nodes:
        if not left:
            break
        found[node] = None
        left -= node in wanted
    return found


def _size(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB" if n >= 2**20 else f"{n:,} bytes"
