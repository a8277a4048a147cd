"""Checks that a graph is consistent: order, uses, names, and that every operation still infers the types it carries."""

from __future__ import annotations

from .errors import IRError, VerifyError
from .graph import Graph, Node, Value, infer
from .interface import State
from .program import Program


def _context(node: Node) -> str:
    """The node's line between its neighbours'."""
    lines = []
    for n in (node.prev, node, node.next):
        if n is not None:
            lines.append(("  > " if n is node else "    ") + repr(n))
    return "\n".join(lines)


def _fail(graph: Graph, node: Node, message: str) -> None:
    raise VerifyError(f"graph @{graph.name}: {message}\n{_context(node)}", node.loc)


def verify(graph: Graph) -> None:
    """Raises VerifyError, showing the node, its neighbours and the user's line, at the first inconsistency."""
    defined: set[Value] = set()
    names: set[str] = set()
    uses: dict[Value, int] = {}
    for v in [*graph.inputs, *graph.params.values()]:
        if v.node is not None or v.graph is not graph:
            raise VerifyError(f"graph @{graph.name}: input %{v.name} belongs elsewhere")
        if v.name in names:
            raise VerifyError(f"graph @{graph.name}: two values are named %{v.name}")
        names.add(v.name)
        defined.add(v)
    previous: Node | None = None
    count = 0
    for node in graph.nodes:
        count += 1
        if node.prev is not previous or node.graph is not graph:
            _fail(graph, node, "the node list is broken")
        previous = node
        for i, v in enumerate(node.inputs):
            if v not in defined:
                _fail(graph, node, f"%{v.name} is used before it is defined, or belongs to another graph")
            if (node, i) not in v.uses:
                _fail(graph, node, f"%{v.name} does not know that it is used here")
            uses[v] = uses.get(v, 0) + 1
        for body in node.attrs.bodies:
            verify(body.graph)
        try:
            types, checks = infer(node.op, node.attrs, node.inputs, node.loc)
        except IRError as e:
            _fail(graph, node, e.message)
        if types != [v.type for v in node.outputs]:
            _fail(graph, node, f"{node.op.name} makes {', '.join(map(str, types))} here")
        node.checks = checks
        for i, v in enumerate(node.outputs):
            if v.node is not node or v.index != i:
                _fail(graph, node, f"%{v.name} does not know its producer")
            if v.name in names:
                _fail(graph, node, f"two values are named %{v.name}")
            names.add(v.name)
            defined.add(v)
    if count != len(graph):
        raise VerifyError(f"graph @{graph.name}: {count} nodes are linked, {len(graph)} are counted")
    for v in defined:
        if len(v.uses) != uses.get(v, 0):
            raise VerifyError(f"graph @{graph.name}: %{v.name} lists {len(v.uses)} uses and has {uses.get(v, 0)}")
    for v in graph.outputs:
        if v not in defined:
            raise VerifyError(f"graph @{graph.name}: output %{v.name} is not defined in it")
    if len(graph.outputs) != len(graph.output_names) or len(set(graph.output_names)) != len(graph.output_names):
        raise VerifyError(f"graph @{graph.name}: output names {graph.output_names} do not name each output once")


def verify_interface(program: Program) -> None:
    """Raises VerifyError where the interface speaks of entries or states that the graphs do not have, or have otherwise."""
    interface = program.interface
    entries = [(f"head {h.name}", h.entry) for h in interface.heads]
    entries += [(f"the {e.kind} encoder", e.entry) for e in interface.media.encoders] if interface.media else []
    entries += [("the embedder", interface.embedder.entry)] if interface.embedder else []
    for what, entry in entries:
        if entry not in program.graphs:
            raise VerifyError(f"{what} is the entry @{entry}, which the program does not have")
    if len(set(interface.state_names)) < len(interface.states):
        raise VerifyError(f"the states {', '.join(interface.state_names)} do not have a name each")
    for s in interface.states:
        types = {v.tensor for g in program.graphs.values() for v in g.inputs if v.name == s.name}
        if len(types) != 1:
            found = ", ".join(map(str, types)) or "no entry's input"
            raise VerifyError(f"state {s.name} is {found}; it must be an input, of one type wherever it is one")
        [type] = types
        lacking = [a for a in (s.rows, s.positions) if a is not None and a >= len(type.shape)]
        size = None if lacking or s.positions is None else type.shape[s.positions]
        if lacking or (size is not None and (isinstance(size, int) if s.grows else size != s.capacity)):
            raise VerifyError(f"state {s.name} is {type}, which is no {s.kind} with {_axes_text(s)}")
        if isinstance(s.empty, str):
            begin = program.params.get(s.empty)
            row = type.with_shape(*(d for i, d in enumerate(type.shape) if i != s.rows))
            if begin is None or begin.type != row:
                what = "which the program does not have" if begin is None else f"which is {begin.type}"
                raise VerifyError(f"state {s.name} begins as the parameter {s.empty}, {what}; it must be {row}")


def _axes_text(s: State) -> str:
    size = "" if s.positions is None else f"positions along axis {s.positions} ({'any number' if s.grows else s.capacity})"
    rows = "" if s.rows is None else f"rows along axis {s.rows}"
    return " and ".join(filter(None, (rows, size))) or "no axes"
