"""What a compiled program says of itself: its interface and signatures, as a runtime reads them (runtime/manifest.py)."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from wasat import __version__
from wasat.ir import DimLike, Graph, Program, check_text, symbol, symbols_of

if TYPE_CHECKING:
    from wasat.backends.tvm.build import Library, Planned
    from wasat.backends.tvm.targets import Target

FORMAT = 3


def manifest_of(program: Program, library: Library | Planned, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything a runtime must know, the files' hashes aside."""
    from wasat.backends.tvm.ops.indices import given

    states = program.interface.state_names
    entries = {}
    for g in program.graphs.values():
        entries[g.name] = {
            "inputs": [_tensor(v.name, v.type) for v in g.inputs if v.name not in states],
            "outputs": [_tensor(n, v.type) for n, v in zip(g.output_names, g.outputs) if n not in states],
            "states": [n for n in states if any(v.name == n for v in g.inputs)],
            "weights": [a.name for a in library.plan.of(g.name)],
            "checks": _checks(g),
            "indices": [
                {"input": i.input, "low": str(i.low), "high": str(i.high), "where": i.where} for i in given(g)
            ],
        }
    return {
        "format": FORMAT, "wasat": __version__, **library.target.versions(), "target": library.target.requirements(),
        "entries": entries, **interface_json(program, library.target),
        "weights": [{"name": a.name, "dtype": a.dtype, "shape": list(a.shape)} for a in library.plan.arrays],
        "settings": settings,
    }  # fmt: skip


def interface_json(program: Program, target: Target) -> dict[str, Any]:
    """The program's interface in three sections: ``limits``, ``states`` as they lie in memory, and what else it says."""
    interface = replace(program.interface, name=program.interface.name or "model")
    if interface.vocab is None:
        interface = replace(interface, vocab=_vocabulary(program))
    found, sizes = asdict(interface), state_symbols(program)
    for s, layout in zip(found["states"], target.state_layouts(program).values()):
        s |= _tensor(s["name"], layout.type.substitute(sizes))
        if isinstance(s["empty"], str):
            s["empty"] = f"{s['name']}/begin"  # of which that is the array
        s |= {k: None if s[k] is None else layout.axis(s[k]) for k in ("rows", "positions")}
    limits = {k: found.pop(k) for k in ("context", "chunk", "granule")}
    return {"limits": limits, "states": found.pop("states"), "interface": found}


def _tensor(name: str, type: Any) -> dict[str, Any]:
    from wasat.backends.tvm.layouts import tvm_dtype

    return {"name": name, "dtype": tvm_dtype(type.dtype), "shape": [d if isinstance(d, int) else str(d) for d in type.shape]}


def _checks(graph: Graph) -> list[dict[str, str]]:
    """What must be equal of sizes, and where: each equation once."""
    from wasat.backends.tvm.ops.indices import place

    found: dict[tuple[str, str], dict[str, str]] = {}
    for node in graph.nodes:
        for check in node.checks:
            a, b = map(str, check)
            found.setdefault((a, b), {"left": a, "right": b, "needs": check_text(check), "where": place(node)})
    return list(found.values())


def state_symbols(program: Program) -> dict[str, DimLike]:
    """The names that a manifest has for the sizes of states, ``b`` rows and ``c`` positions, by those of the program."""
    types = {v.name: v.type for g in program.graphs.values() for v in g.inputs}
    found: dict[str, DimLike] = {}
    for s in program.interface.states:
        shape = types[s.name].shape
        for axis, name in ((s.rows, "b"), (s.positions if s.grows else None, "c")):
            found |= {k: symbol(name) for k in (symbols_of([shape[axis]]) if axis is not None else ())}
    return found


def _vocabulary(program: Program) -> int | None:
    """How many tokens there are, from the tables that they index; None where they index none."""
    tables = [
        n.inputs[0].shape[0]
        for g in program.graphs.values() for v in g.inputs if v.name == program.interface.tokens
        for n in v.users if n.op.weight == 0 and n.op.picks(n.attrs) == 0 and n.inputs[1] is v
    ]  # fmt: skip
    return min(tables, default=None)
