"""If, Loop, Scan: folded where the condition is known; loops that turn often, or as often as a size says, become scan, the
others are unrolled."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from wasat.ir import Body, Builder, Dim, DimLike, DType, Graph, Node, TensorType, Value, copy_node, less_equal

from ..emit import Dims, Emitter, Operand
from ..errors import FromData, OnnxError
from ..files import element
from ..registry import MOST, NodeView, op
from ..sequences import Appended, Rows, first_to
from ..turns import Line, conditions, how_often, increment, line

FEW = 16
"""So many turns are written out: what they compute from their number folds."""
MOST_TURNS = 2**31
"""A loop that is to turn more often is a mistake, or means to be stopped."""


@op("If")
def if_(c: Emitter, n: NodeView, cond: Operand) -> Any:
    """The branch that is taken; where only a run can tell, ``cond``, or a choice between the results of both."""
    run = n.importer.subgraph
    try:
        return tuple(run(n["then_branch" if bool(c.const(cond, "the condition of If")) else "else_branch"], n.frame, []))
    except FromData as unknown:
        if isinstance(cond, np.ndarray):
            raise
        taken = c.value(c.view(cond))
        before = c.graph.last
        branches = [run(n[name], n.frame, []) for name in ("then_branch", "else_branch")]
        if any(not _same_type(c, a, b) for a, b in zip(*branches)):
            raise FromData(f"the branches of If differ in type, and {unknown}", unknown.inputs) from None
        yes, no = ([c.value(x) for x in results] for results in branches)
        inside = list(_after(c.graph, before))
        if all(map(_harmless, inside)):
            return tuple(c.select(taken, a, b) for a, b in zip(yes, no))
        return _chosen(c, taken, yes, no, inside)


def _after(graph: Graph, node: Node | None) -> Iterator[Node]:
    """What was emitted since ``node`` was the last."""
    node = graph.first if node is None else node.next
    while node is not None:
        yield node
        node = node.next


def _harmless(node: Node) -> bool:
    """Whether it costs little, and is right whatever sizes and numbers are: a branch of such nodes may run for nothing."""
    for i, (low, high) in node.op.bounds(node.attrs, *(v.type for v in node.inputs)).items():
        x = node.inputs[i].const
        if x is None or not all(less_equal(low, int(j)) is True and less_equal(int(j) + 1, high) is True for j in x.flat):
            return False
    return node.op.cheap and not node.checks and all(less_equal(0, d) is True for v in node.outputs for d in v.type.shape)


def _chosen(c: Emitter, taken: Value, yes: list[Value], no: list[Value], inside: Sequence[Node]) -> tuple[Value, ...]:
    """The nodes ``inside`` both branches as bodies of ``cond``. What they make of parameters alone stays outside, where it is
    computed once."""
    once: set[Node] = set()
    for node in inside:
        if node.inputs and _harmless(node) and all(v.param is not None or v.node in once for v in node.inputs):
            once.add(node)
    own = set(inside) - once
    both = [_needed(results, own) for results in (yes, no)]
    read = [v for nodes in both for node in nodes for v in node.inputs]
    operands = [v for v in dict.fromkeys([*read, *yes, *no]) if v.node not in own and v.const is None]
    bodies = []
    for name, results, nodes in (("then", yes, both[0]), ("otherwise", no, both[1])):
        body = Graph(name)
        env = {v: body.add_input(v.name, v.type, unique=True) for v in operands}
        for node in nodes:
            copy_node(body, node, env)
        body.set_outputs([env[v] for v in results], [f"{i}" for i in range(len(results))])
        bodies.append(Body(body))
    made = c.cond(taken, *operands, then=bodies[0], otherwise=bodies[1])
    for node in reversed(inside):  # but for constants, which what follows may read
        if node in own and node.outputs[0].const is None and not any(v.uses for v in node.outputs):
            c.graph.erase(node)
    return made if isinstance(made, tuple) else (made,)


def _needed(results: Sequence[Value], own: Container[Node]) -> list[Node]:
    """The nodes among ``own``, and constants, that make ``results``, in order."""
    found: set[Node] = set()
    todo = list(results)
    while todo:
        node = todo.pop().node
        if node is not None and node not in found and (node in own or node.outputs[0].const is not None):
            found.add(node)
            todo += node.inputs
    return [node for node in results[0].graph.nodes if node in found]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, (Value, np.ndarray, Dims))


def _same_type(c: Emitter, a: Any, b: Any) -> bool:
    return all(map(_is_tensor, (a, b))) and c.shape(a) == c.shape(b) and c.dtype(a) is c.dtype(b)


def _going(c: Emitter, cond: Operand) -> bool | None:
    """Whether a loop turns at all; None where sizes decide."""
    try:
        return bool(c.const(cond, "whether Loop turns"))
    except FromData as unknown:
        if unknown.inputs:
            raise
        return None


def _counted(
    c: Emitter, n: NodeView, limit: DimLike | None, first: list[Line] | None, state: list[Any]
) -> tuple[Any, ...] | str:
    """The Loop as scan, or why it is none. ``first``: what must be at least 0 for the first turn. A sequence that each turn
    appends to is made of rows of the scan."""
    if not all(_is_tensor(x) or isinstance(x, list) for x in state):
        return "what it carries is no tensor"
    carried = {i: c.value(x) for i, x in enumerate(state) if not isinstance(x, list)}
    given = [carried[i].tensor if i in carried else Appended() for i in range(len(state))]
    try:
        body, results, captured = n.importer.body(n["body"], n.frame, [TensorType(DType.I64, ()), np.asarray(True), *given])
    except OnnxError as e:
        return f"its body cannot be imported once for all turns: {e}"
    again, after, rows = results[0], results[1 : 1 + len(state)], results[1 + len(state) :]
    lines = {body.inputs[0]: Line(0, 1)}
    for v, around in zip(body.inputs[1 + len(carried) :], captured):
        if (known := line(around, {})) is not None:
            lines[v] = known
    for v, i in zip(body.inputs[1:], carried):
        begin, step = line(state[i], {}), increment(after[i], v)
        if begin is not None and step is not None:
            lines[v] = Line(begin.offset, step)
    more = conditions(again, lines)
    turns = None if first is None or more is None else how_often(limit, first, more)
    if turns is None:
        return "whether it turns again depends on what its body computes"
    if not _often(turns):
        return f"it turns {turns} times"
    lists = [i for i in range(len(state)) if i not in carried]
    if not all(isinstance(after[i], Appended) and len(after[i].items) == 1 for i in lists):
        return "it carries a sequence to which not every turn appends one tensor"
    body.inputs[: 1 + len(carried)] = [*body.inputs[1 : 1 + len(carried)], body.inputs[0]]  # carried values come first
    results = [*(after[i] for i in carried), *(after[i].items[0] for i in lists), *rows]
    made = _scanned(c, body, results, list(carried.values()), [c.iota(size=turns, dtype=DType.I64)], captured)
    if isinstance(made, str):
        return made
    kept = dict(zip([*carried, *lists], made))
    final = [kept[i] if i in carried else Rows(tuple(state[i]), kept[i]) for i in range(len(state))]
    return (*final, *made[len(state) :])


@op("Loop")
def loop(c: Emitter, n: NodeView, turns: Operand | None = None, cond: Operand | None = None, *carried: Any) -> Any:
    body = n["body"]
    state = list(carried)
    going = True if cond is None else _going(c, cond)
    limit: DimLike | None = None
    if turns is not None:
        known = line(turns, {})  # a size, or the length of a range of sizes
        limit = c.dims(turns, "how often Loop turns")[0] if known is None else known.offset
    most = f"more than {MOST}"
    if isinstance(limit, int) and limit > MOST_TURNS:
        if cond is None:
            raise n.fail(f"it turns {limit} times")
        most, limit = f"{limit}", None  # as exporters write "while": the condition ends it
    if going is None or (going and (limit is None or _often(limit))):
        made = _counted(c, n, limit, [] if going else conditions(cond, {}), state)
        if isinstance(made, tuple):
            return made
        if going is None and cond is not None:
            c.const(cond, "whether Loop turns")
        if isinstance(limit, Dim):
            raise n.fail(f"it turns {limit} times, and {made}")
    rows: list[list[Any]] = [[] for _ in range(len(body.output) - 1 - len(state))]
    turn = 0
    while going and (limit is None or turn < limit):
        if turn == MOST:
            raise n.fail(f"it turns {most} times and would be unrolled")
        after, *results = n.importer.subgraph(body, n.frame, [np.asarray(turn, np.int64), np.asarray(True), *state])
        going = bool(c.const(after, "whether Loop turns again"))
        state = results[: len(state)]
        for row, x in zip(rows, results[len(state) :]):
            row.append(x)
        turn += 1
    declared = body.output[1 + len(state) :]
    return (*state, *(_stacked(c, n, row, info, 0) for row, info in zip(rows, declared)))


def _stacked(c: Emitter, n: NodeView, rows: list[Any], info: Any, axis: int) -> Any:
    """Results of the turns along a new axis; of no turn, an empty tensor of the declared type."""
    if rows:
        parts = [c.add_axes(x, axis % (c.rank(x) + 1)) for x in rows]
        return parts[0] if len(parts) == 1 else c.concat(*parts, axis=axis % (c.rank(rows[0]) + 1))
    t = info.type.tensor_type
    shape = [0, *(d.dim_value for d in t.shape.dim)]
    return np.zeros(shape, element(t.elem_type, n.op).np)


def _often(turns: DimLike) -> bool:
    return isinstance(turns, Dim) or turns > FEW


def _as_scan(c: Emitter, n: NodeView, state: list[Any], xs: list[Any]) -> tuple[Any, ...] | str:
    """The Scan as scan, or why it is none. The body takes the state and an element of each of ``xs``."""
    if not all(map(_is_tensor, state)):
        return "what it carries is no tensor"
    carried, sliced = [c.value(x) for x in state], [c.value(x) for x in xs]
    parts = [TensorType(v.tensor.dtype, v.shape[1:]) for v in sliced]
    try:
        body, results, captured = n.importer.body(n["body"], n.frame, [*(v.tensor for v in carried), *parts])
    except OnnxError as e:
        return f"its body cannot be imported once for all turns: {e}"
    return _scanned(c, body, results, carried, sliced, captured)


def _scanned(
    c: Emitter, body: Graph, results: list[Any], carried: list[Value], sliced: list[Value], captured: list[Value]
) -> tuple[Any, ...] | str:
    """The loop over ``body``, which takes what is ``carried``, elements of what is ``sliced``, and what is ``captured``."""
    if not all(map(_is_tensor, results)):
        return "its body makes what is no tensor"
    b = Builder(body, loc=c.b.loc)
    outputs = [b.constant(x) if isinstance(x, np.ndarray) else x for x in results]
    for was, v in zip(carried, outputs):
        if was.type != v.type:
            return f"it carries %{was.name}, which is {was.type} before a turn and {v.type} after it"
    body.set_outputs(outputs, [f"{i}" for i in range(len(outputs))])
    made = c.scan(*carried, *sliced, *captured, body=Body(body), carries=len(carried), slices=len(sliced))
    return made if isinstance(made, tuple) else (made,)


def _placed(c: Emitter, x: Any, axis: int, backward: int) -> Any:
    """A stacked result with its turns along ``axis``, the last first if ``backward``."""
    return first_to(c, c.reverse(x, axes=(0,)) if backward else x, axis)


@op("Scan", since=9)
def scan(c: Emitter, n: NodeView, *inputs: Any) -> Any:
    count, body = n["num_scan_inputs"], n["body"]
    if not 1 <= count <= len(inputs):
        raise n.fail(f"num_scan_inputs is {count}, of {len(inputs)} inputs")
    state, given = list(inputs[: len(inputs) - count]), inputs[len(inputs) - count :]
    outputs = len(body.output) - len(state)
    axes = n.get("scan_input_axes") or [0] * count
    backward = n.get("scan_input_directions") or [0] * count
    out_axes = n.get("scan_output_axes") or [0] * outputs
    out_backward = n.get("scan_output_directions") or [0] * outputs
    axes = [c.axis(a, c.rank(x)) for a, x in zip(axes, given)]
    length = c.shape(given[0])[axes[0]]
    if _often(length):
        xs = [c.permute(x, (a, *(i for i in range(c.rank(x)) if i != a))) for x, a in zip(given, axes)]
        xs = [c.reverse(x, axes=(0,)) if back else x for x, back in zip(xs, backward)]
        made = _as_scan(c, n, state, xs)
        if isinstance(made, tuple):
            return (*made[: len(state)], *map(partial(_placed, c), made[len(state) :], out_axes, out_backward))
        if isinstance(length, Dim):
            raise n.fail(f"it turns {length} times, and {made}")
    turns = c.static(given[0], axes[0], "Scan")
    if turns > MOST:
        raise n.fail(f"it turns {turns} times and would be unrolled")
    rows: list[list[Any]] = [[] for _ in range(outputs)]
    for turn in range(turns):
        places = [turns - 1 - turn if back else turn for back in backward]
        parts = [c.drop_axes(c.cut(x, a, at, at + 1), a) for x, a, at in zip(given, axes, places)]
        results = n.importer.subgraph(body, n.frame, [*state, *parts])
        state = results[: len(state)]
        for row, x in zip(rows, results[len(state) :]):
            row.append(x)
    ordered = [row[::-1] if back else row for row, back in zip(rows, out_backward)]
    declared = body.output[len(state) :]
    return (*state, *(_stacked(c, n, row, info, a) for row, info, a in zip(ordered, declared, out_axes)))


@op("Scan", since=8)
def scan_batched(c: Emitter, n: NodeView, lengths: Operand | None, *inputs: Any) -> Any:
    """The old form: every operand has a batch axis first; each row of it is a scan of its own."""
    if lengths is not None:
        raise n.fail("sequence_lens is not supported")
    plain = NodeView(n.proto, {k: v for k, v in n.attrs.items() if k != "directions"}, n.frame, n.importer)
    plain.attrs["scan_input_directions"] = n.get("directions")
    batch = c.static(inputs[0], 0, "Scan")
    rows = [scan(c, plain, *(c.drop_axes(c.cut(x, 0, i, i + 1), 0) for x in inputs)) for i in range(batch)]
    return tuple(_stacked(c, n, list(parts), None, 0) for parts in zip(*rows))
