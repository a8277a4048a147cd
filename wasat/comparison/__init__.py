"""Two ways to compute one model, side by side: the first value that differs, both fed the same; what that does to a text.

    found = ws.compare("model.onnx", "onnxruntime")          # sides as words, see docs/compare.md
    found = ws.compare(before, after, inputs={"x": x})       # or programs
    print(found)                                             # found.ok, found.first, found.outputs, found.to_json()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wasat.driver import Progress, quiet
from wasat.ir import Array, DType, Graph, Program, TensorType, WasatError
from wasat.passes.serving.token_inputs import token_inputs
from wasat.quality import quality, text_ids, tokenizer_of, windows_of
from wasat.testing import feed

from .across import MEANT, compare_programs, fewer_bits, outputs_of, unit_of, unlike
from .bounds import bounds_of
from .engines import Engine
from .found import Alarm, Comparison, Difference, Stage
from .modules import compare_modules
from .nodes import Run, compare_nodes, interpret
from .onnx_file import compare_file
from .served import compare_served, of_artifact
from .sides import Side, optimized, side
from .watch import watch

__all__ = ["Alarm", "Comparison", "Difference", "Engine", "Side", "Stage", "compare", "side"]

def compare(
    a: str | Path | Program | Side, b: str | Path | Program | Side, *, inputs: Mapping[str, Any] | None = None,
    text: str | None = None, sizes: Mapping[str, int] | None = None, tokens: int = 16, window: int = 256,
    max_kl: float | None = None, seed: int = 0, served: bool = False, progress: Progress = quiet, **options: Any,
) -> Comparison:  # fmt: skip
    """Compares two sides of a model on the same inputs, value by value.

    ``a``, ``b``: a program, or a model's path, ``PATH@WORDS``, or (of ``b``) words for what is done to ``a``'s model, joined by
    ``+``: ``"int4+cpu"``. Words are a target (``"cpu"``: after the passes, compiled), ``"after:PASSES"``, ``"before:PASS"``, a
    scheme for weights (``"int4"``, ``"int4,*embed*=int8"``), ``"onnxruntime"`` (on the ONNX file, else on our export),
    ``"transformers"`` (of a folder), and, over a text, ``"llama.cpp"``. Over a text, paths of artifacts and of logits
    (``.npy``) are sides too.

    ``inputs``: arrays for ``forward`` by name; without, random ones (seed ``seed``; ``sizes`` gives symbols, ``tokens`` the
    length of token ids). ``text``: KL divergence, same top token and perplexity over it, in windows of ``window`` tokens;
    ``max_kl``: above it, the sides differ. ``options``: those of :func:`wasat.optimize` for the passes.

    ``served``: also ``prefill`` and ``decode``, which a session calls, beside ``forward`` and node by node; of an artifact, if
    there is no ``text``, always, and what the artifact itself says.

    Each element of a value is held to what its own roundings may make of it (:mod:`wasat.comparison.bounds`). Raises WasatError
    for sides that there are not, cannot be compared, or need a package that is not installed.
    """
    if served:
        options |= {"kv_cache": True, "keep_forward": True}
    left = side(a, **options)
    right = side(b, left, **options)
    if text is None and max_kl is not None:
        raise WasatError("max_kl limits what two sides say of a text: give a text")
    if window < 2:
        raise WasatError(f"a window of {window} tokens predicts nothing: give 2 or more")
    if right.peer == "artifact" and left.program is not None and (served or text is None):
        right = of_artifact(left, right, options)
        served = right.program is not None and "decode" in right.program.graphs
    elif served and right.program is None:
        raise WasatError(f"{right.name} has no prefill and decode of ours to compare")
    elif served and right.program is not None and "decode" not in right.program.graphs:
        right = optimized(right, right.name, options)
    found = Comparison(left.name, right.name, max_kl=max_kl)
    if left.program is not None and right.program is not None:
        given = _values(found, left, right, inputs, sizes or {}, tokens, seed, progress)
        if served:
            compare_served(found, right, given, progress)
    elif left.program is not None and right.peer == "transformers" and right.path is not None:
        if "logits" not in (given_names := left.program["forward"].output_names):
            raise WasatError(f"transformers is asked for logits, and {left.name} gives {', '.join(given_names)}")
        given = _inputs(left.program, inputs, sizes or {}, tokens, seed)
        run = interpret(left.program, "forward", given, sizes)
        found.alarms = watch(run, "interpreter")
        stage, logits = compare_modules(run, left.program, right.path, progress)
        found.stages.append(stage)
        bounds = bounds_of(run.graph, given, run.params, run.sizes)
        found.outputs = outputs_of(run, logits, bounds)
    elif text is None:
        without = next(s for s in (left, right) if s.program is None)
        raise WasatError(f"{without.name} has no graph of ours, and only what it says of a text can be compared: give a text")
    if text is not None:
        _text(found, left, right, text, window, progress)
    return found


def _values(
    found: Comparison, a: Side, b: Side, inputs: Mapping[str, Any] | None, sizes: Mapping[str, int], tokens: int, seed: int,
    progress: Progress,
) -> dict[str, Array]:  # fmt: skip
    """Adds what ``forward`` gives on both sides, and returns what it was given."""
    assert a.program is not None
    assert b.program is not None
    takes = [[v.name for v in program["forward"].inputs] for program in (a.program, b.program)]
    if set(takes[1]) - set(takes[0]):
        raise WasatError(f"the sides take other inputs: {a.name} {', '.join(takes[0])}; {b.name} {', '.join(takes[1])}")
    given = _inputs(a.program, inputs, sizes, tokens, seed)
    progress("interpreting")
    runs = [interpret(a.program, "forward", given, sizes)] * 2
    if b.program is a.program:
        found.alarms = watch(runs[0], "interpreter")
    else:
        runs[1] = interpret(b.program, "forward", given, sizes)
        found.alarms = [alarm for letter, run in zip("ab", runs) for alarm in watch(run, letter)]
        stage = compare_programs(runs[0], runs[1], progress)
        if stage.differences:
            stage.name += _culprit(b, given, sizes, progress)
        found.stages.append(stage)
    results: list[Mapping[str, Array]] = []
    for s, run in zip((a, b), runs):
        own = dict(zip(run.graph.output_names, (run.values[v] for v in run.graph.outputs)))
        if s.peer == "onnxruntime" and s.path is not None:
            stage, own = compare_file(run, s.path, progress)
            found.stages.append(stage)
        elif s.engine is not None:
            found.stages.append(compare_nodes(run, s.engine, progress))
            progress(f"running {s.name}")
            own = s.outputs(given)
        results.append(own)
    progress("bounds of the whole")
    found.outputs, found.unlike = _outputs(runs, results), unlike(results[0], results[1])
    return given


def _outputs(runs: list[Run], results: list[Mapping[str, Array]]) -> list[Difference]:
    """Outputs of the sides, held to what roundings of the whole make of them; where weights lose bits, to nothing."""
    a, b = runs
    bounds = bounds_of(a.graph, a.given(a.graph.inputs), a.params, a.sizes)
    unit = [max(map(unit_of, r.graph.nodes), default=1.0) for r in runs]
    wider = [x * max(1.0, unit[1] / unit[0]) for x in bounds]
    plain = dict(zip(a.graph.output_names, a.graph.outputs))
    first = Run(a.graph, a.params, a.sizes, {**a.values, **{v: results[0][n] for n, v in plain.items() if n in results[0]}})
    found = outputs_of(first, results[1], wider)
    if fewer_bits(list(b.graph.nodes)) - fewer_bits(list(a.graph.nodes)):
        return [replace(d, note=MEANT, bound=np.inf, ratio=0.0) for d in found]
    return found


def _culprit(b: Side, given: Mapping[str, Array], sizes: Mapping[str, int], progress: Progress) -> str:
    """Which of the passes that made a side changes numbers, where one does."""
    for (_, before), (name, after) in zip(b.steps, b.steps[1:]):
        progress(f"looking at pass {name}")
        one, two = (interpret(p, "forward", given, sizes) for p in (before, after))
        if compare_programs(one, two).differences:
            return f"; by the pass {name}"
    return ""


def _inputs(
    program: Program, inputs: Mapping[str, Any] | None, sizes: Mapping[str, int], tokens: int, seed: int
) -> dict[str, Array]:  # fmt: skip
    """Arrays for ``forward``: those given, else random ones; token ids over the whole vocabulary."""
    g = program["forward"]
    if inputs is not None and len(inputs) == len(g.inputs):
        if unknown := sorted(set(inputs) - {v.name for v in g.inputs}):
            raise WasatError(f"@forward has no input {unknown[0]}; it has {', '.join(v.name for v in g.inputs)}")
        return {v.name: np.asarray(inputs[v.name]) for v in g.inputs}
    if unknown := sorted(set(sizes) - set(g.symbols)):
        raise WasatError(f"@forward has no size {unknown[0]}; it has {', '.join(g.symbols) or 'none'}")
    sizes = {**_told(g, inputs or {}), **sizes}
    texts = token_inputs(g)
    long = {str(v.shape[1]) for v in g.inputs if v.name in texts}
    known = {s: sizes.get(s, tokens if s in long else 1 if i == 0 else 3 + i) for i, s in enumerate(g.symbols)}
    made: dict[str, Array] = dict(feed(g, known, seed))
    rng = np.random.default_rng(seed)
    for v in g.inputs:
        tables = [n.inputs[0] for n in v.users if n.op.kind == "gather" and n.inputs[0] is not v]
        rows = [t.type.shape[0] for t in tables if isinstance(t.type.shape[0], int)]
        if v.name in texts and rows and isinstance(v.type, TensorType):
            made[v.name] = rng.integers(0, min(rows), v.type.concrete(known)).astype(v.type.dtype.np)
        elif v.name == "lengths" and isinstance(v.type, TensorType) and texts:  # of the texts, which fill their rows
            made[v.name] = np.full(v.type.concrete(known), made[texts[0]].shape[1], v.type.dtype.np)
        elif "mask" in v.name and isinstance(v.type, TensorType) and v.type.dtype in (DType.I64, DType.I32):
            made[v.name] = np.ones(v.type.concrete(known), v.type.dtype.np)
    for name, x in (inputs or {}).items():
        if name not in made:
            raise WasatError(f"@forward has no input {name}; it has {', '.join(made)}")
        made[name] = np.asarray(x)
    return made


def _told(g: Graph, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Symbols whose numbers the axes of given arrays say."""
    axes = [(d, n) for v in g.inputs if v.name in inputs for d, n in zip(v.type.shape, np.shape(inputs[v.name]))]
    return {str(d): n for d, n in axes if str(d) in g.symbols}


def _text(found: Comparison, a: Side, b: Side, text: str, window: int, progress: Progress) -> None:
    program = a.program or b.program
    if program is None:
        raise WasatError("one of the sides must be a model with its tokenizer: it says what the text's tokens are")
    windows = windows_of(text_ids(program, text), window)
    if not windows:
        raise WasatError("the text has fewer than two tokens: nothing is predicted")
    if a.program is not None and b.program is not None and b.program is not a.program:
        _same_tokens(a, b, windows)
    progress("reading the text", 0, len(windows))
    found.text = quality(
        a.log_probabilities(windows), b.log_probabilities(windows), windows,
        lambda done: progress("reading the text", done, len(windows)),
    )  # fmt: skip


def _same_tokens(a: Side, b: Side, windows: Sequence[NDArray[np.int64]]) -> None:
    """Raises WasatError where the two models call one number of the text by different tokens."""
    one, two = (None if s.program is None else tokenizer_of(s.program) for s in (a, b))
    if one is None or two is None:
        return
    for i in sorted({int(i) for ids in windows for i in ids}):
        if (x := one.id_to_token(i)) != (y := two.id_to_token(i)):
            raise WasatError(f"{a.name} and {b.name} have different tokens: {i} is {x!r} in one, {y!r} in the other")
