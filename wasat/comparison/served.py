"""What a session calls, ``prefill`` and ``decode``: beside ``forward``, which has no caches, and node by node."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wasat.driver import Progress
from wasat.ir import Array, DType, Program, WasatError

from .bounds import UNITS, bounds_of
from .engines import Compiled
from .found import Comparison, difference
from .nodes import Run, compare_nodes, interpret
from .sides import Side, optimized
from .watch import watch

Outputs = Mapping[str, Sequence[NDArray[Any]]]
"""Of each step, by name."""


def of_artifact(a: Side, b: Side, options: Mapping[str, Any]) -> Side:
    """The artifact ``b`` with the program that its manifest's settings make of ``a``'s model."""
    from wasat.backends.tvm.targets import target_named
    from wasat.runtime.artifact import MANIFEST

    assert b.path is not None
    manifest = json.loads((b.path / MANIFEST).read_text(encoding="utf-8"))
    settings = manifest.get("settings", {})
    known = {k: settings[k] for k in ("quantize", "activation", "overrides", "cache") if k in settings}
    machine = target_named(settings.get("target", "cpu"), None, known.get("cache", "f32"))
    caches = {"kv_cache": True, "keep_forward": True} if "prefill" in manifest["entries"] else {}
    target = {"granule": machine.granule, "formats": machine.formats}
    made = optimized(a, b.name, {**known, **target, **options, **caches})
    wider = UNITS[DType.F16] / UNITS[DType.F32] if known.get("cache") == "f16" else 1.0
    return replace(b, program=made.program, engine=Compiled(machine.name), steps=made.steps, wider=wider)


def compare_served(found: Comparison, b: Side, given: Mapping[str, Array], progress: Progress) -> None:
    """Adds to ``found`` what the entries of ``b`` give after a first half of the tokens, and after each of the rest: by the
    engine, node by node; as a whole, by the interpreter and by the artifact (if it is one), beside ``forward``, which has all
    tokens at once.

    Raises WasatError for a program without these entries, and for one that takes more than one thing for each token.
    """
    program = b.program
    assert program is not None
    tokens = _tokens(program)
    text = np.asarray(given[tokens])
    first = max(1, min(text.shape[1] // 2, program.interface.chunk or text.shape[1]))
    progress("interpreting prefill and decode")
    runs = list(_served(program, given, tokens, first))
    names = [n for n in runs[0].graph.output_names if n not in (*program.interface.state_names, program.interface.cut)]
    for run in runs[:2]:
        alarms = watch(run, "interpreter")
        found.alarms += [x for x in alarms if x.what not in {y.what for y in found.alarms}]
        if b.engine is not None:
            found.stages.append(compare_nodes(run, b.engine, progress))
    results: dict[str, Outputs] = {"": {n: [np.asarray(_output(run, n)) for run in runs] for n in names}}
    if b.peer == "artifact" and b.path is not None:
        progress(f"running {b.name}")
        results["artifact "] = {_logits(names): list(_session(b.path, given, tokens, first))}
    progress("bounds of the whole")
    forward = program["forward"]
    whole = interpret(program, "forward", given)
    bounds = dict(zip(forward.output_names, bounds_of(forward, given, whole.params, whole.sizes)))
    for who, outputs in results.items():
        for entry, part in (("prefill", slice(0, 1)), ("decode", slice(1, None))):
            for name, arrays in outputs.items():
                if arrays[part]:
                    v = forward.outputs[forward.output_names.index(name)]
                    axis = v.shape.index(next(x for x in forward.inputs if x.name == tokens).shape[1])
                    at = np.arange(first - 1, text.shape[1])[part]
                    want, bound = (np.take(x, at, axis) for x in (np.asarray(whole.values[v]), bounds[name] * b.wider))
                    called = f"{who}{entry}: {name}"
                    found.outputs.append(difference(v, called, want, np.stack(arrays[part], axis), bound))


def _tokens(program: Program) -> str:
    """The input of ``forward`` that a session feeds."""
    if "decode" not in program.graphs or "forward" not in program.graphs:
        raise WasatError("there are no entries prefill and decode to compare: no cache was derived")
    forward, tokens = program["forward"], program.interface.tokens
    seq = next(str(v.shape[1]) for v in forward.inputs if v.name == tokens)
    along = [v.name for v in forward.inputs if v.name != tokens and seq in v.type.symbols]
    if along:
        raise WasatError(f"prefill and decode are compared where tokens are all that comes along; {along[0]} does, too")
    return tokens


def _served(program: Program, given: Mapping[str, Array], tokens: str, first: int) -> Iterator[Run]:
    """``prefill`` on the first tokens of all rows, then ``decode`` on each of the rest."""
    text = np.asarray(given[tokens])
    rows, length = text.shape
    known: dict[str, Array] = {k: x for k, x in given.items() if k != tokens}
    if "encode" in program.graphs:
        run = interpret(program, "encode", known)
        known |= {n: _output(run, n) for n in run.graph.output_names}
    known |= _empty(program, rows, length)
    past = 0
    while past < length:
        n = 1 if past else first
        fed = {tokens: text[:, past : past + n], "past": np.full(rows, past), "last": np.full(rows, n - 1)}
        run = interpret(program, "decode" if past else "prefill", {**known, **fed})
        yield run
        known |= {n: _output(run, n) for n in program.interface.state_names}
        past += n


def _empty(program: Program, rows: int, length: int) -> dict[str, Array]:
    """States before the first token, with room for ``length``."""
    granule, found = program.interface.granule, dict[str, Array]()
    inputs = {v.name: v for v in program["prefill"].inputs}
    batch = str(inputs[program.interface.tokens].shape[0])
    for s in program.interface.states:
        t = inputs[s.name].tensor
        sizes = {d: rows if d == batch else -(-length // granule) * granule for d in t.symbols}
        begin = program.load(s.empty) if isinstance(s.empty, str) else s.empty or 0
        found[s.name] = np.full(t.concrete(sizes), begin, t.dtype.np)
    return found


def _session(path: Path, given: Mapping[str, Array], tokens: str, first: int) -> Iterator[NDArray[Any]]:
    """What the artifact says after the first tokens, and after each of the rest."""
    from wasat.runtime import load

    model, text = load(path), np.asarray(given[tokens])
    limit = model.manifest.interface.context
    session = model.session(len(text), text.shape[1] if limit is None else min(text.shape[1], limit))
    if others := {k: np.asarray(x) for k, x in given.items() if k != tokens}:
        session.encode(**others)
    yield np.asarray(session.step(text[:, :first])).copy()
    for i in range(first, text.shape[1]):
        yield np.asarray(session.step(text[:, i : i + 1])).copy()


def _logits(names: Sequence[str]) -> str:
    return "logits" if "logits" in names else names[0]


def _output(run: Run, name: str) -> Array:
    return run.values[run.graph.outputs[run.graph.output_names.index(name)]]
