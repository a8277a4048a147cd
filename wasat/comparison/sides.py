"""The sides of a comparison: what a model says after passes, compiled, or elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wasat.driver import load_program, optimize
from wasat.ir import Array, Program, WasatError
from wasat.passes.serving.recipes import is_scheme
from wasat.quality import log_softmax, tokens_name

from .engines import Compiled, Engine, OnnxRuntime
from .nodes import interpret

PEERS = ("onnxruntime", "transformers", "llama.cpp")
WORDS = "interpreter, after:PASSES, before:PASS, a scheme (int4), a target (cpu, webgpu), " + ", ".join(PEERS)


@dataclass
class Side:
    """One side: a program and who runs it, or a peer with a model of its own."""

    name: str
    program: Program | None = None
    path: Path | None = None
    """The file or folder that the program is from."""
    engine: Engine | None = None
    """What runs the program; None: the interpreter."""
    peer: str = ""
    """Who runs the file at ``path`` by itself: ``transformers``, ``llama.cpp``, ``onnxruntime``, ``artifact``, ``logits``."""
    steps: list[tuple[str, Program]] = field(default_factory=list)
    """The programs after each pass that made this one, by the pass's name."""
    wider: float = 1.0
    """By how much its roundings are coarser than the program says: an artifact's caches may be in f16."""

    @cached_property
    def whole(self) -> Any:
        """The program as its engine runs it."""
        from wasat.driver import Executable

        assert self.program is not None
        forward = Program({"forward": self.program["forward"]}, dict(self.program.params), origin=self.program.origin)
        return Executable(forward, self.engine.name) if isinstance(self.engine, Compiled) else None

    def outputs(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of ``forward``, by name."""
        assert self.program is not None
        if self.peer == "artifact" and "decode" not in self.program.graphs:
            from wasat.runtime import load

            assert self.path is not None
            return dict(load(self.path).run("forward", **inputs))
        if self.engine is None:
            run = interpret(self.program, "forward", inputs)
            return {n: run.values[v] for n, v in zip(run.graph.output_names, run.graph.outputs)}
        if isinstance(self.engine, Compiled):
            return dict(self.whole("forward", **inputs))
        g = self.program["forward"]
        self.engine.prepare([g], self.program.load, lambda done, total: None)
        return dict(zip(g.output_names, self.engine.run(g, inputs)))

    def log_probabilities(self, windows: Sequence[NDArray[np.int64]]) -> Iterator[NDArray[np.float64]]:
        """Of the next token, for each window of a text: f64[positions, vocabulary]."""
        from . import peers

        if self.peer:
            yield from peers.log_probabilities(self.peer, self.path or Path(), windows)
            return
        assert self.program is not None
        name = tokens_name(self.program)
        for ids in windows:
            yield log_softmax(np.asarray(self.outputs({name: ids[None]})["logits"])[0])


def side(text: str | Path | Program | Side, of: Side | None = None, **options: Any) -> Side:
    """What a side's text says: ``MODEL``, ``MODEL@WORDS``, or words for the model ``of``, joined by ``+``:
    ``int4+cpu``. ``options`` are those of :func:`wasat.optimize` for the passes.

    Raises WasatError for what is neither a model nor words.
    """
    if isinstance(text, Side):
        return text
    if isinstance(text, Program):
        return Side("program", text)
    model, at, words = str(text).rpartition("@")
    if at and not Path(text).exists():
        return _with(_opened(Path(model)), words, options)
    if Path(text).exists():
        return _opened(Path(text))
    if of is None:
        raise WasatError(f"{text} is no model: give a folder, a GGUF or ONNX file, graph text, or an artifact")
    return _with(of, str(text), options)


def _opened(path: Path) -> Side:
    if path.suffix == ".npy" and path.is_file():
        return Side(path.name, path=path, peer="logits")
    if (path / "manifest.json").is_file():
        return Side(path.name, path=path, peer="artifact")
    return Side(path.name, _as_forward(load_program(path)), path)


def _as_forward(program: Program) -> Program:
    """The program; one whose only graph embeds texts or scores pairs, with that called ``forward``."""
    if "forward" in program.graphs or len(program.graphs) != 1:
        return program
    graph = next(iter(program.graphs.values())).clone()
    graph.name = "forward"
    return Program({"forward": graph}, dict(program.params), origin=program.origin)


def _with(base: Side, words: str, options: Mapping[str, Any]) -> Side:
    """A side with what ``words`` say done to it, in order."""
    for word in re.split(r"\+(?![^{]*\})", words):
        base = _step(base, word.strip(), options)
    return base


def _step(base: Side, word: str, options: Mapping[str, Any]) -> Side:
    name = f"{base.name}@{word}" if "@" not in base.name else f"{base.name}+{word}"
    if word in ("transformers", "llama.cpp"):
        if base.path is None:
            raise WasatError(f"{word} reads a model's own files; the side {base.name} is from none")
        return Side(name, path=base.path, peer=word)
    if base.program is None:
        raise WasatError(f"{base.name} is not ours to change: nothing can be done to it ({word})")
    kind, _, detail = word.partition(":")
    if kind in ("after", "before"):
        return _passed(base, name, kind, detail, options)
    if is_scheme(word.partition(",")[0]):
        scheme, *overrides = word.split(",")
        pairs = dict(o.rpartition("=")[::2] for o in overrides)
        return optimized(base, name, {**options, "quantize": scheme, "overrides": {**options.get("overrides", {}), **pairs}})
    if word == "interpreter":
        return replace(base, name=name, engine=None)
    if word == "onnxruntime":
        if base.path is not None and base.path.suffix == ".onnx" and not base.steps:
            return Side(name, base.program, base.path, OnnxRuntime(), peer="onnxruntime")
        return Side(name, base.program, base.path, OnnxRuntime(), steps=base.steps)
    return _compiled(base, name, word, options)


def _compiled(base: Side, name: str, target: str, options: Mapping[str, Any]) -> Side:
    """Through the passes that compiling runs, unless some ran, and then for the target."""
    from wasat.backends.tvm.targets import maker, target_named

    try:
        maker(target.partition(":")[0])
    except WasatError as e:
        raise WasatError(f"{target!r} says nothing about a side: {e}. Words are {WORDS}; models are paths") from None
    target_named(target)
    made = base if base.steps else optimized(base, name, options)
    return Side(name, made.program, base.path, Compiled(target), steps=made.steps)


def optimized(base: Side, name: str, options: Mapping[str, Any]) -> Side:
    """After the passes that compiling runs; without caches, unless ``options`` ask for them."""
    assert base.program is not None
    steps: list[tuple[str, Program]] = []

    def keep(step: str, when: str, program: Program) -> None:
        if when == "after":
            steps.append((step, program.copy()))

    made, _ = optimize(base.program, dump=keep, **{"kv_cache": False, **options})
    return Side(name, made, base.path, base.engine, steps=[("", base.program), *steps])


def _passed(base: Side, name: str, when: str, detail: str, options: Mapping[str, Any]) -> Side:
    """After a pipeline; or where a pass of the default pipeline begins or ends."""
    known = optimized(base, name, options)
    names = [n for n, _ in known.steps[1:]]
    if detail in names:
        at = names.index(detail) + (when == "after")
        return Side(name, known.steps[at][1], base.path, base.engine, steps=known.steps[: at + 1])
    if when == "before":
        raise WasatError(f"there is no pass {detail!r} in the pipeline; in order they are {', '.join(names)}")
    return known if detail == "default" else optimized(base, name, {**options, "passes": detail})
