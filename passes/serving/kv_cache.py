"""KV-cache derivation: from a cache-less forward pass to ``prefill`` and ``decode`` (and ``encode``), by proof, not by pattern.

If everything that mixes tokens looks back, what a token computes depends on earlier ones only through keys and values, carries
and last inputs: keep those, and the program runs on the new tokens alone, its positions offset by how many there are already.
"""

from __future__ import annotations

from dataclasses import dataclass

from wasat.ir import (
    Graph,
    Interface,
    IRError,
    Program,
    Value,
    symbols_of,
)
from wasat.ir.graph import copy_node
from wasat.ir.ops.index import AxisAttrs

from ..analyses.affine import Affine, empty
from ..analyses.axis import analyze, refuse, uncut
from ..analyses.confirm import tables
from ..analyses.indexing import Indexing
from ..analyses.rows import places
from ..analyses.sequence import Label
from ..analyses.unrolled import said, unrolled
from ..cleanup.algebra import Cleanup
from ..cleanup.hoist_params import HoistParams
from ..cleanup.rows_apart import rows_apart
from ..core import Pass, PassError, Remark, Remarks
from ..pattern import erase_dead
from .absorb import absorb
from .derivation import Derivation, declare
from .folded import heads_apart
from .kept import (
    keep,
)
from .lead import Led, split
from .plan import Plan
from .registers import set_apart, sums_apart
from .rolled import shift_instead
from .skewed import distances_instead
from .token_inputs import token_inputs


@dataclass(frozen=True)
class DeriveKVCache(Pass):
    """Replaces ``graph`` by entry points over caches.

    ``prefill(tokens [b, s], past i64[b], last i64[b], ..caches)``: row r already holds past[r] positions; returns each
    output at index last[r] of the new ones, without the sequence axis. ``decode``: the same for one token, without ``last``.
    Caches are inputs and outputs of one name. Whatever needs no token becomes ``encode``, whose results the others take.

    Full caches hold [b, c, heads, features]; attention with a window gets a ring of window + chunk - 1 positions (at most
    ``chunk`` new tokens at a time), or a full cache where the context is no longer than that. Capacities are multiples of
    ``granule``, which the target's kernels decide.

    Raises IRError, with the node and the line, where the graph looks ahead; unless ``required``, that is a missed remark and
    the graph stays as it is. ``keep``: it stays beside the entries too, for callers who want every position at once.
    """

    name = "derive-kv-cache"
    graph: str = "forward"
    chunk: int = 512
    required: bool = True
    granule: int = Interface.granule
    keep: bool = False

    def requires(self, program: Program) -> None:
        if self.graph not in program.graphs:
            raise PassError(f"there is no graph @{self.graph}; there are {', '.join('@' + n for n in program.graphs)}")
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise PassError(f"chunk={self.chunk!r}: a chunk holds at least one token, a whole number of them")
        if self.granule < 1:
            raise PassError(f"granule={self.granule}: a capacity is a multiple of at least one position")

    def run(self, program: Program, remarks: Remarks) -> bool:
        try:
            with tables(program):
                self._derive(program, remarks)
        except IRError as e:
            if (loop := unrolled(program[self.graph])) is not None:
                e = IRError(f"{e.message}\n  {said(loop)}", e.loc)
            if self.required:
                raise e from None
            remarks.items.append(Remark("missed", f"@{self.graph} stays as it is: {e.message}", self.graph, e.loc))
            return False
        return True

    def _derive(self, program: Program, remarks: Remarks) -> None:
        forward, tokens, labels, led = _served(program[self.graph], remarks)
        seq = str(tokens.shape[1])
        if led is None and heads_apart(forward, tokens, labels):
            labels = analyze(forward, seq, tokens.shape[0])
        limits = [n for n in (program.interface.context, _positions_known(forward, labels)) if n is not None]
        context = min(limits, default=None)
        plan = Plan.make(forward, tokens, seq, labels, self.chunk, self.granule, context, led)
        plan.places = places(forward, tokens, labels)
        keep(plan)
        graphs = dict(program.graphs)
        if not self.keep:
            del graphs[self.graph]
        made = [Derivation(plan, name).run() for name in ("prefill", "decode")]
        if plan.memory:
            made.insert(0, _encode(plan))
        clash = [g.name for g in made if g.name in graphs]
        if clash:
            raise PassError(f"the program already has a graph @{clash[0]}")
        program.graphs = {**graphs, **{g.name: g for g in made}}
        donated = tokens.shape[0] == 1 or not isinstance(tokens.shape[0], int)
        donated = donated and not plan.cut  # a call that turns out to have cut what sees each other leaves all as it was
        states = [*(s for c in plan.of.values() for s in c.states()), *(k.state(donated) for k in plan.kept.values())]
        program.declare(
            states=tuple(states), chunk=self.chunk, context=context, granule=self.granule, tokens=tokens.name,
            cut=plan.cut,
        )  # fmt: skip
        if led is not None:
            Cleanup().run(program, remarks)
            HoistParams().run(program, remarks)
            remarks.applied(f"{led.lead} positions before the first token are computed apart", made[-1])
        for node, cache in plan.of.items():
            remarks.applied(f"%{node.output.name}: {cache.describe()}", node)
        for kept in plan.kept.values():
            remarks.applied(kept.describe(), kept.of.node or made[-1])
        if plan.memory:
            remarks.applied(f"@encode computes {len(plan.memory)} values once", made[0])


def _positions_known(graph: Graph, labels: dict[Value, Label]) -> int | None:
    """For how many positions there are rows in the tables that positions (or pairs of them) index; None: for any number."""
    at, most = Indexing(()), []
    for node in graph.nodes:
        axis = AxisAttrs.of(node).axis if node.is_a("take_along") else node.op.picks(node.attrs)
        if axis is None:
            continue
        table, index = node.inputs
        size = table.shape[axis]
        if labels[index].kind not in ("position", "pair") or not isinstance(size, int):
            continue
        for p in at.pieces(index):
            if not isinstance(p.value, Affine) or empty([*p.where, p.value.plus(Affine((), -size))], at.shape(index)):
                continue  # not known, or it does not get there however many positions there are
            first, step = p.value.const, [t for t in p.value.terms if not isinstance(t, int) or t > 0]
            if isinstance(first, int) and step and all(isinstance(t, int) for t in step):
                most.append((size - 1 - first) // sum(t for t in step if isinstance(t, int)) + 1)
    return min(most, default=None)


def _served(graph: Graph, remarks: Remarks) -> tuple[Graph, Value, dict[Value, Label], Led | None]:
    """A copy of ``graph`` with the outputs that can be served, its tokens, how its values lie along them, and what stands
    before them.

    Of inputs of several lengths that could be the tokens (a translator's two texts): the first along which it looks back.
    What it returns once for the whole batch, a loss, is left off, and so are the inputs that only this read.
    """
    failure: IRError | None = None
    for name in token_inputs(graph):
        seq = next(str(v.shape[1]) for v in graph.inputs if v.name == name)
        served = uncut(graph.clone(), seq)
        absorb(served, remarks)
        rows_apart(served)
        shift_instead(served, seq)
        distances_instead(served, seq)
        led = set_apart(served, seq)
        sums_apart(served, seq)
        for apart in (False, True):
            if apart and led is None and (led := split(served, name)) is not None:
                served = led.graph
            elif apart:
                break
            tokens = next(v for v in served.inputs if v.name == name)
            labels = analyze(served, seq, tokens.shape[0])
            ahead = {n: v for n, v in zip(served.output_names, served.outputs) if not labels[v].one_each}
            lost = {n: v for n, v in ahead.items() if len(ahead) < len(served.outputs) and _whole_batch(v, tokens)}
            refused = [refuse(labels[v], n, seq) for n, v in ahead.items() if n not in lost]
            if led is not None:
                refused += [_of_tokens(v) for v in led.fixed() if labels[v].kind != "fixed"]
                seen = (labels[v] for v in led.seen.values())
                refused += [refuse(label, served.output_names[0], seq) for label in seen if label.kind == "ahead"]
            if refused:
                failure = failure or refused[0]
                continue
            if lost:
                for n, v in lost.items():
                    remarks.missed(f"output {n} is not served: {labels[v].reason}", v)
                _leave_off(served, set(lost), tokens)
            return served, tokens, labels, led
    if failure is not None:
        raise failure
    raise IRError(
        f"graph @{graph.name} has 0 inputs that could be its tokens; it needs one of integers [batch, sequence], where the "
        "sequence is symbolic"
    )


def _of_tokens(v: Value) -> IRError:
    said = "it stands beside the keys of tokens, and depends on tokens itself"
    return IRError(f"no KV cache can be derived: {v.node!r}\n  {said}", v.loc)


def _whole_batch(v: Value, tokens: Value) -> bool:
    """Whether an output is one for all rows: a loss, a share of the load."""
    return set(v.type.symbols).isdisjoint(tokens.type.symbols) and (bool(symbols_of(tokens.shape[:1])) or not v.shape)


def _leave_off(graph: Graph, outputs: set[str], tokens: Value) -> None:
    kept = {n: v for n, v in zip(graph.output_names, graph.outputs) if n not in outputs}
    gone = [v.node for n, v in zip(graph.output_names, graph.outputs) if n in outputs]
    read = {v for v in graph.inputs if v.uses}
    graph.set_outputs(list(kept.values()), list(kept))
    for node in gone:
        if node is not None:
            erase_dead(graph, node)
    for v in read:
        if not v.uses and v is not tokens and not graph.is_output(v):
            graph.remove_input(v)


def _encode(plan: Plan) -> Graph:
    g = Graph("encode")
    env = declare(g, plan, {v for v in plan.forward.inputs if plan.labels[v].kind == "fixed"}, {})
    for node in plan.forward.nodes:
        if plan.labels[node.outputs[0]].kind == "fixed":
            copy_node(g, node, env)
    g.set_outputs([env[v] for v in plan.memory], list(plan.memory.values()))
    return g
