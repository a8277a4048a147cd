"""Who computes parts of a graph: code compiled for a target, or onnxruntime on our export of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from wasat.ir import Array, Graph, Program, WasatError

Load = Callable[[str], Array]
Tell = Callable[[int, int], None]


class Engine(Protocol):
    """Runs graphs without states."""

    name: str

    def prepare(self, graphs: Sequence[Graph], load: Load, tell: Tell) -> None:
        """Makes ready what will be run; ``load`` gives parameters by name, ``tell`` is told how many are done, of how many."""

    def run(self, graph: Graph, inputs: Mapping[str, Array]) -> list[Array]:
        """Outputs of a graph that was prepared. Raises WasatError for one that the engine cannot run, with the reason."""


class Compiled:
    """Code for a target that runs here. Graphs that differ only in names share their code."""

    def __init__(self, target: str = "cpu", threads: int | None = None) -> None:
        self.name, self._threads = target, threads
        self._kinds: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._runners: dict[str, Any] = {}

    def prepare(self, graphs: Sequence[Graph], load: Load, tell: Tell) -> None:
        self._load = load
        fresh: dict[str, Program] = {}
        for g in graphs:
            plain, names = _renamed(g, f"g{len(self._kinds)}")
            text = str(plain).partition("(")[2]
            if text not in self._kinds:
                self._kinds[text] = plain.name
                pairs = zip(plain.params.items(), names)
                fresh[plain.name] = Program({plain.name: plain}, {k: _Loaded(v.type, load, old) for (k, v), old in pairs})
        for i, (name, program) in enumerate(fresh.items()):
            tell(i, len(fresh))
            try:  # one by one: what the target cannot lower is named, and the rest runs
                self._runners[name] = self._compiled(program)
            except WasatError as e:
                self._refused[name] = str(e)

    def _compiled(self, program: Program) -> Any:
        from wasat.backends.tvm.build import Runner
        from wasat.backends.tvm.targets import target_named
        from wasat.planned import PlanRunner

        machine = target_named(self.name, self._threads)
        return (Runner if machine.device is None else PlanRunner)(program, machine)

    def run(self, graph: Graph, inputs: Mapping[str, Array]) -> list[Array]:
        plain, names = _renamed(graph, "g")
        kind = self._kinds[str(plain).partition("(")[2]]
        if kind in self._refused:
            raise WasatError(self._refused[kind])
        runner = self._runners[kind]
        if names:
            real = dict(zip(runner.program[kind].params, names))
            runner.set_weights(kind, lambda name: self._load(real[name]))  # those of the first are of another layer
        found = runner(kind, {v.name: inputs[old.name] for v, old in zip(plain.inputs, graph.inputs)})
        return [found[n] for n in plain.output_names]


class _Loaded:
    """A parameter that another one of its type stands for."""

    def __init__(self, type: Any, load: Load, name: str) -> None:
        self.type, self._load, self._name = type, load, name

    def load(self) -> Array:
        return self._load(self._name)


def _renamed(graph: Graph, name: str) -> tuple[Graph, list[str]]:
    """The graph with names that say only what is what, and its parameters' names as they were."""
    g, old = graph.clone(name), list(graph.params)
    for i, v in enumerate(list(g.values())):
        g.rename(v, f"v{i}|")
    for i, v in enumerate(list(g.values())):
        g.rename(v, f"v{i}")
    g.params = {f"p{i}": v for i, v in enumerate(g.params.values())}
    for k, v in g.params.items():
        v.param = k
    g.output_names = [f"o{i}" for i in range(len(g.outputs))]
    return g, old


class OnnxRuntime:
    """onnxruntime, on our export of each graph."""

    name = "onnxruntime"

    def __init__(self) -> None:
        self._ort = imported("onnxruntime", "comparing with onnxruntime")
        imported("onnx", "exporting to onnxruntime")
        self._files: dict[str, Any] = {}

    def prepare(self, graphs: Sequence[Graph], load: Load, tell: Tell) -> None:
        from wasat.backends.onnx import to_onnx

        with tempfile.TemporaryDirectory() as folder:
            for i, g in enumerate(graphs):
                tell(i, len(graphs))
                try:
                    sources = {k: _Loaded(v.type, load, k) for k, v in g.params.items()}
                    path = to_onnx(Program({g.name: g}, dict(sources)), Path(folder) / "part.onnx")
                    self._files[g.name] = self.session(path)
                except (WasatError, self.failed) as e:
                    self._files[g.name] = WasatError(f"onnxruntime: {str(e).strip().splitlines()[0]}")

    @property
    def failed(self) -> type[Exception]:
        """What it raises."""
        return Exception  # its classes share no other base

    def session(self, path: Path | str | bytes) -> Any:
        """A file opened without rewriting its graph, on the processor."""
        options = self._ort.SessionOptions()
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        given = path if isinstance(path, bytes) else str(path)
        return self._ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])

    def run(self, graph: Graph, inputs: Mapping[str, Array]) -> list[Array]:
        session = self._files[graph.name]
        if isinstance(session, WasatError):
            raise session
        names = [i.name for i in session.get_inputs()]
        try:
            return [np.asarray(x) for x in session.run(None, {n: np.asarray(inputs[n]) for n in names})]
        except self.failed as e:
            raise WasatError(f"onnxruntime: {str(e).strip().splitlines()[0]}") from None


PACKAGES = {
    "onnxruntime": "pip install onnxruntime", "onnx": "pip install 'wasat[onnx]'", "torch": "pip install torch transformers",
    "transformers": "pip install torch transformers", "llama_cpp": "pip install llama-cpp-python",
}  # fmt: skip


def imported(module: str, what: str) -> Any:
    """A package that only this needs. Raises WasatError, with what to install, where it is missing."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != module:
            raise
        raise WasatError(f"{what} needs the package {module}, which is not installed: {PACKAGES[module]}") from None
