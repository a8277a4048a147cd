"""What a model will take, before anything is allocated: its weights, caches, activations and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wasat.driver import optimize
from wasat.ir import Graph, Program, WasatError, evaluate_dim, symbols_of
from wasat.passes.analyses.cost import operations_of, peak_bytes, unbound

from .manifest import state_symbols

if TYPE_CHECKING:
    from wasat.backends.tvm.targets import Target

SCHEMES = ("f32", "f16", "int8", "int4")


@dataclass(frozen=True)
class Entry:
    """One call of an entry point at known sizes."""

    name: str
    sizes: dict[str, int]
    """Of the entry's symbols."""
    activations: int
    """Bytes: the most that computed values take at once; weights, inputs and caches are not among them."""
    operations: int
    """2 for each multiply-add of products, attention (over all positions of the caches) and convolutions; 1 for each other
    element that is computed."""
    tokens: int | None
    """Of one row that it reads; None for an entry that reads none."""


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found. Sizes are in bytes."""

    name: str
    parameters: int
    """Numbers in them, those that entries share counted once."""
    weights: dict[str, int]
    """By scheme: the arrays of the artifact, as they are quantized and packed for the target."""
    batch: int
    context: int | None
    """Positions of each row; None for a model without caches."""
    caches: int
    """For so many rows of so many positions."""
    cache_per_token: int
    """That one more position of one row takes: rings of sliding windows, which do not grow, are not in it."""
    entries: tuple[Entry, ...]
    unknown: dict[str, tuple[str, ...]]
    """Entries that are not counted, and the symbols whose sizes they lack."""
    cores: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By entry, where the target has tensor cores: for each scheme, how many products and attentions run there, and why
    others do not."""

    def text(self) -> str:
        """Some lines for people."""
        lines = [f"{self.name}: {_count(self.parameters)} parameters"]
        lines.append("weights        " + ", ".join(f"{k} {_bytes(n)}" for k, n in self.weights.items()))
        if self.context is not None:
            at = f"{self.batch} row{'s' * (self.batch > 1)} of {self.context:,} positions"
            lines.append(f"caches         {_bytes(self.cache_per_token)} a token, {_bytes(self.caches)} for {at}")
        for e in self.entries:
            rows = "" if e.tokens is None else f", {_count(e.operations / e.tokens / self.batch)} a token"
            sizes = ", ".join(f"{k}={n:,}" for k, n in e.sizes.items())
            lines.append(
                f"{e.name:<14} activations {_bytes(e.activations)}, {_count(e.operations)} operations{rows}"
                + (f" ({sizes})" if sizes else "")
            )
        for name, lacking in self.unknown.items():
            lines.append(f"{name:<14} not counted: give {', '.join(f'--size {s}=N' for s in lacking)}")
        for name, said in self.cores.items():
            lines.append(f"{name:<14} {'; '.join(said)}")
        return "\n".join(lines)


def plan(
    program: Program, *, target: str = "cpu", schemes: Sequence[str] = SCHEMES, cache: str = "f32", batch: int = 1,
    context: int | None = None, chunk: int = 512, sizes: Mapping[str, int] | None = None, activation: str | None = "int8",
) -> Plan:  # fmt: skip
    """What ``program``, compiled for ``target``, will take. No parameter is loaded, no array is made.

    ``batch`` rows of ``context`` positions each (default: the model's limit); prompts are read ``chunk`` tokens at a time.
    ``cache`` and ``activation``: as :func:`wasat.compile` has them. ``sizes``: of other symbols, for all entries (``"h"``) or
    one (``"encode_image.h"``). Media of a model that states their sizes have these, and there is one of each kind. Activations
    and operations are those of weights in f32.

    Raises WasatError for a context that the model lacks, and as :func:`wasat.optimize` and :func:`wasat.compile` do.
    """
    from wasat.backends.tvm.targets import target_named

    machine = target_named(target, cache=cache)
    options: dict[str, Any] = {
        "chunk": chunk, "granule": machine.granule, "formats": machine.formats, "verify": False, "cache": cache,
        "activation": activation,
    }  # fmt: skip
    made = {s: optimize(program, quantize=None if s == "f32" else s, **options)[0] for s in ("f32", *schemes)}
    served = made["f32"]
    states = served.interface.state_names
    limit = served.interface.context
    if context is not None and limit is not None and not 1 <= context <= limit:
        raise WasatError(f"context is {context}; {program.interface.name or 'the model'} takes 1 to {limit} positions")
    context = context or limit
    if states and context is None:
        raise WasatError("the model states no limit of its context: say for how many positions (context)")
    known = _stream_sizes(served, batch, context or 1, chunk) if states else {}
    entries, unknown = [], {}
    for name, g in served.graphs.items():
        given = known | (_media_sizes(program, g, batch) if program.interface.media else {})
        given |= {s: n for s, n in (sizes or {}).items() if "." not in s}
        given |= {s.removeprefix(f"{name}."): n for s, n in (sizes or {}).items() if s.startswith(f"{name}.")}
        if lacking := unbound(g, given):
            unknown[name] = tuple(dict.fromkeys(lacking))
            continue
        tokens = next((evaluate_dim(v.tensor.shape[1], given) for v in g.inputs if v.name == served.interface.tokens), None)
        operations = sum(operations_of(node, given) for node in g.nodes)
        entries.append(
            Entry(name, {s: given[s] for s in g.symbols}, peak_bytes(g, given, states), operations, tokens)
        )
    granule = machine.granule
    params = {k: v for g in program.graphs.values() for k, v in g.params.items()}

    def caches(batch: int, context: int) -> int:
        return _caches(served, machine, batch, context) if states else 0

    return Plan(
        name=program.interface.name or "model",
        parameters=sum(math.prod(evaluate_dim(d, {}) for d in v.type.shape) for v in params.values()),
        weights={s: _weights(made[s], machine) for s in schemes},
        batch=batch, context=context if states else None,
        caches=caches(batch, context or 0), cache_per_token=(caches(1, 2 * granule) - caches(1, granule)) // granule,
        entries=tuple(entries), unknown=unknown, cores=_cores({s: made[s] for s in schemes}, machine),
    )  # fmt: skip


def _cores(made: Mapping[str, Program], machine: Target) -> dict[str, tuple[str, ...]]:
    """What the target's kernels say of tensor cores, by entry, of the program in each scheme."""
    from wasat.backends.tvm.build import left_by

    found: dict[str, tuple[str, ...]] = {}
    for scheme, program in made.items():
        for x in left_by(program, machine):
            if x.kind != "left":
                found[x.graph] = (*found.get(x.graph, ()), f"{scheme}: {x.why}")
    return found


def _weights(program: Program, machine: Target) -> int:
    """Bytes of the arrays that the compiled program reads."""
    from wasat.backends.tvm.lower import plan_weights, selected
    from wasat.backends.tvm.weights import nbytes

    table = machine.table()
    graphs = selected(program, table, machine.kernels(machine, program))
    return sum(nbytes(a) for a in plan_weights(graphs, table).arrays)


def _caches(program: Program, machine: Target, batch: int, context: int) -> int:
    """Bytes of all states, as they lie in memory."""
    sizes = _stream_sizes(program, batch, -(-context // machine.granule) * machine.granule, 1)
    return sum(math.prod(t.concrete(sizes)) * t.dtype.bits // 8 for t in machine.state_types(program).values())


def _stream_sizes(program: Program, batch: int, context: int, chunk: int) -> dict[str, int]:
    """Sizes of the symbols of caches and tokens."""
    sizes = {name: batch if str(d) == "b" else context for name, d in state_symbols(program).items()}
    tokens = next(v.tensor.shape for v in program["prefill"].inputs if v.name == program.interface.tokens)
    sizes |= dict.fromkeys(symbols_of(tokens[1:]), min(chunk, context))
    return sizes


def _media_sizes(program: Program, graph: Graph, batch: int) -> dict[str, int]:
    """Sizes of the symbols that media bring into ``graph``, as far as the program states them: one of each kind."""
    media = program.interface.media
    assert media is not None
    rows = sum(evaluate_dim(program[e.entry].outputs[0].tensor.shape[0], {}) for e in media.encoders)
    size, samples, frames = (
        next((n for e in media.encoders if (n := getattr(e, need)) is not None), None) for need in ("size", "samples", "frames")
    )
    stated: dict[str, tuple[int | None, ...]] = {
        "image": (size, size), "audio": (samples,), "frames": (frames, size, size), "times": (frames,),
        "media": (rows,), "seen": (batch, rows),
    }  # fmt: skip
    found = {}
    for v in (*program["forward"].inputs, *graph.inputs):  # what a pass moved into another graph keeps its symbols
        for d, n in zip(v.tensor.shape, stated.get(v.name, ())):
            if n is not None and str(d) in graph.symbols:
                found[str(d)] = n
    return found


def _bytes(n: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:,.4g} GB" if n < 10_000 else f"{n:,.0f} GB"


def _count(n: float) -> str:
    for unit in ("", " thousand", " million", " billion"):
        if n < 1000:
            return f"{n:.4g}{unit}"
        n /= 1000
    return f"{n:,.4g} trillion"
