"""Node by node: an engine computes each node of a graph from the operands that the interpreter had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wasat.driver import Progress, quiet
from wasat.ir import Array, Graph, Node, Program, Value, WasatError
from wasat.ir.evaluate import bind_symbols

from .bounds import bounds_of, once, walk
from .engines import Engine
from .found import Difference, Stage, difference
from .fragments import fragment

CLOSEST = 5


@dataclass
class Run:
    """One run of a graph by the interpreter: every value, and the sizes of its symbols."""

    graph: Graph
    params: Mapping[str, Array]
    sizes: dict[str, int]
    values: dict[Value, Array]

    def given(self, values: Sequence[Value]) -> dict[str, Array]:
        return {v.name: self.values[v] for v in values}


def interpret(program: Program, name: str, inputs: Mapping[str, Array], symbols: Mapping[str, int] | None = None) -> Run:
    """Runs a graph and keeps every value. Raises IRError for inputs that do not fit."""
    g = program[name]
    params = {k: program.load(k) for k in g.params}
    arrays = {v.name: inputs[v.name] for v in g.inputs}
    sizes = bind_symbols(g, arrays, params, symbols)
    values: dict[Value, Array] = {v: arrays[v.name] for v in g.inputs} | {v: params[k] for k, v in g.params.items()}
    run = Run(g, params, sizes, dict(values))

    def keep(node: Node, operands: list[Array], results: tuple[Array, ...]) -> tuple[Array, ...]:
        run.values.update(zip(node.outputs, results))
        return results

    walk(g, values, sizes, keep)
    return run


def compare_nodes(run: Run, engine: Engine, tell: Progress = quiet) -> Stage:
    """What ``engine`` makes of each node of a run, from the run's own operands; where no node differs by itself, but the whole
    does, the shortest stretch of nodes that differs when it is computed as one."""
    g, stage = run.graph, Stage(f"@{run.graph.name}, node by node: interpreter, {engine.name}")
    nodes = [n for n in g.nodes if n.op.kind != "source" and n.outputs]
    parts = [(n, *fragment(f"n{i}", [n], n.outputs, run.sizes)) for i, n in enumerate(nodes)]
    load = run.params.__getitem__
    engine.prepare([part for _, part, _ in parts], load, lambda done, total: tell(f"compiling for {engine.name}", done, total))
    compared: list[Difference] = []
    for i, (node, part, read) in enumerate(parts):
        tell("comparing nodes", i, len(parts))
        try:
            compared += _held(run, part, read, (node,), engine)
        except WasatError as e:
            stage.skipped.append(f"%{node.outputs[0].name} = {node.op.name}: {str(e).splitlines()[0]}")
    stage.values = len(compared)
    stage.differences = [d for d in compared if d.differs]
    stage.closest = sorted((d for d in compared if not d.differs), key=lambda d: -d.ratio)[:CLOSEST]
    if not stage.differences and not stage.skipped:
        tell("comparing the whole", 0, 1)
        stage.differences = _stretch(run, nodes, engine)
    return stage


def _held(run: Run, part: Graph, read: Sequence[Value], nodes: tuple[Node, ...], engine: Engine) -> list[Difference]:
    """Each output of a part, by the engine, beside the run's."""
    given = run.given(read)
    made = engine.run(part, given)
    by_name = {v.name: v for n in nodes for v in n.outputs}
    values = [by_name[n] for n in part.output_names]
    made_by = nodes if len(nodes) > 1 else ()
    pairs = list(zip(values, made, strict=True))
    found = [difference(v, v.name, run.values[v], y, once(run.values[v], v), made_by) for v, y in pairs]
    if any(d.differs for d in found):
        bounds = bounds_of(part, given, run.params, run.sizes)
        found = [difference(v, v.name, run.values[v], y, b, made_by) for (v, y), b in zip(pairs, bounds, strict=True)]
    return found


def _stretch(run: Run, nodes: Sequence[Node], engine: Engine) -> list[Difference]:
    """The shortest stretch of nodes, computed as one, of which a result differs; empty if the whole does not."""

    def differing(first: int, last: int) -> list[Difference]:
        chosen = nodes[first:last]
        inside = set(chosen)
        kept = [v for n in chosen for v in n.outputs if run.graph.is_output(v) or any(u not in inside for u in v.users)]
        if not kept:
            return []
        part, read = fragment(f"s{first}_{last}", chosen, kept, run.sizes)
        engine.prepare([part], run.params.__getitem__, lambda done, total: None)
        return [d for d in _held(run, part, read, tuple(chosen), engine) if d.differs]

    if not (found := differing(0, len(nodes))):
        return []
    low, high = 0, len(nodes)  # the first `high` nodes differ, the first `low` do not
    while high - low > 1:
        middle = (low + high) // 2
        if d := differing(0, middle):
            high, found = middle, d
        else:
            low = middle
    end, first, last = high, 0, high
    while last - first > 1:  # the nodes from `first` on differ, those from `last` on do not
        middle = (first + last) // 2
        if d := differing(middle, end):
            first, found = middle, d
        else:
            last = middle
    return found
