"""The way through the house: a program, passes, a backend, an artifact."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from wasat.ir import (
    Array,
    Interface,
    IRError,
    Program,
    Type,
    WasatError,
    evaluate,
)
from wasat.passes import (
    DeriveKVCache,
    FoldDequantized,
    Pass,
    PassManager,
    Remark,
    Report,
    Step,
    TokenInputs,
    default_pipeline,
    pipeline,
)
from wasat.passes.analyses.unrolled import said, unrolled
from wasat.passes.core import Dump
from wasat.passes.serving.plan import capacity_name
from wasat.passes.serving.recipes import ALL, Formats
from wasat.passes.serving.token_inputs import is_exported, token_inputs

from .sample import sample_ids

if TYPE_CHECKING:
    from wasat.backends.tvm.lower import Left
    from wasat.backends.tvm.targets import Target


class Progress(Protocol):
    """What long work tells: a stage's name, and how far it is (``done`` of ``total``, in the stage's own unit)."""

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None: ...


Pipeline = str | Pass | Sequence[str | Pass]
"""Passes by name or as they are; see :func:`wasat.passes.pipeline`."""


def quiet(stage: str, done: int = 0, total: int = 0) -> None:
    """Progress that nobody wants to see."""


def optimize(
    program: Program, *, quantize: str | None = None, activation: str | None = "int8",
    overrides: Mapping[str, str] | None = None, kv_cache: bool | None = None, chunk: int = 512,
    granule: int = Interface.granule, passes: Pipeline = "default", verify: bool = True, check: bool = False,
    dump: Dump | None = None, progress: Progress | None = None, keep_forward: bool = False, formats: Formats = ALL,
    cache: str = "f32",
) -> tuple[Program, Report]:  # fmt: skip
    """Runs the passes over a copy of ``program``; returns it with the report of what each pass did and missed.

    A forward pass as exporters leave it (``input_ids`` beside a padding mask, positions, a cache) becomes one over tokens alone
    (see :class:`wasat.passes.TokenInputs`), if a cache can then be derived; else it keeps its inputs.

    ``quantize``: ``"int4"`` (a recipe: a scheme for each weight), ``"int8"``, ``"f16"``, ``"bf16"``, any other scheme of
    :class:`wasat.passes.Quantize`, or None (weights as f32). ``activation``: ``"int8"`` for
    integer dot products where weights are integers, None to compute in f32, ``"bf16"`` or ``"f16"`` for activations and caches
    of ``forward`` in half precision (:class:`wasat.passes.MixedPrecision`). ``overrides``: parameter glob to scheme.
    ``kv_cache``: derive ``prefill`` and ``decode`` from ``forward``; None: if it takes tokens, and for a model that came
    without generation metadata only if that can be proved (else a remark says why not). ``chunk``: most tokens per prefill
    call. ``granule``: capacities of caches are multiples of it; ``formats``: for which weights there are kernels, of
    which a recipe chooses (both those of the target). ``keep_forward``: ``forward`` stays
    beside what is derived, for all positions at once. ``cache``: ``"int8"`` or ``"int4"`` to round keys and values so
    (:class:`wasat.passes.QuantizeCaches`).
    ``passes``: text or a list of passes and text, in which ``"default"`` stands for those that all of the above describes:
    ``"my-pass, default"``, ``[MyPass(), "default"]`` (see :func:`wasat.passes.pipeline`). ``verify``: around every pass.
    ``check``: the interpreter compares results, at small sizes, around every pass that promises to keep them.
    ``dump(pass, "before" | "after", program)`` sees every stage.

    Raises WasatError where a pass cannot do what was asked for, naming the pass.
    """
    _check_program(program)
    progress = _told(progress)
    if dump is not None and not callable(dump):
        raise WasatError(f"dump is a function of a pass's name, of when, and of the program, not {type(dump).__name__}")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise WasatError(f"overrides are schemes by name, not {type(overrides).__name__}")
    exported = kv_cache is not False and _is_exported(program)
    caches: Literal["required", "tried"] | None
    if kv_cache is None:
        tried = program.origin.is_onnx or program.interface.generation is None
        caches = None if not (exported or _takes_tokens(program)) else "tried" if tried else "required"
    else:
        caches = "required" if kv_cache else None

    missed = [] if quantize or overrides else _widened(program)
    dense = program.origin.dequantized
    missed += [Remark("missed", f"parameter {name} stays dequantized: {why}", "forward") for name, why in dense.items()]
    if (loop := unrolled(program["forward"]) if "forward" in program.graphs else None) is not None:
        missed.append(Remark("missed", said(loop), "forward", loop[0].loc))

    text = functools.cache(lambda: sample_ids(program))  # once, and where weights are measured

    def attempt(exported: bool, caches: Literal["required", "tried"] | None) -> tuple[Program, Report]:
        copy = program.copy()
        default = default_pipeline(
            quantize=quantize, activation=activation, overrides=dict(overrides or {}), kv_cache=caches, chunk=chunk,
            granule=granule, keep_forward=keep_forward, formats=formats, cache=cache,
            rounded=program.origin.rounded, text=text,
        )  # fmt: skip
        if exported:
            default.insert(0, TokenInputs(required=caches == "required"))
        chosen = pipeline(passes, default)
        if (quantize or overrides) and not any(p is q for p in chosen for q in default):
            raise WasatError("quantize and overrides are options of the passes 'default', which `passes` does not name")
        checker = None
        if check:
            from wasat.testing import InterpreterCheck

            checker = InterpreterCheck(_small_sizes(program))
        done = iter(range(len(chosen)))

        def tell(name: str) -> None:
            progress(f"pass {name}", next(done), len(chosen))

        report = PassManager(chosen, verify=verify, check=checker, dump=dump, on_progress=tell).run(copy)
        if missed:
            size = sum(map(len, program.graphs.values()))
            report.steps.insert(0, Step("import", 0.0, size, size, False, missed))
        return copy, report

    served, report = attempt(exported, caches)
    if not exported or "decode" in served.graphs or not any(s.name == DeriveKVCache.name for s in report.steps):
        return served, report
    attempts = [s for s in report.steps if s.name in (TokenInputs.name, DeriveKVCache.name)]
    if any(s.modified for s in attempts):  # its inputs are gone, and there is no cache: from the beginning, with them
        served, report = attempt(False, None)
    report.steps = [*(s for s in report.steps if s not in attempts), *attempts]
    return served, report


def _widened(program: Program) -> list[Remark]:
    """Says which parameters become f32 that are stored in fewer bits."""
    found = Counter(str(d) for source in program.params.values() if (d := getattr(source, "narrow", None)) is not None)
    return [
        Remark("missed", f"{n} parameters are stored as {d} and become f32; quantize={d} keeps weights as they are", "forward")
        for d, n in found.items() if d in ("bf16", "f16")
    ]


def _check_program(program: object) -> None:
    if not isinstance(program, Program):
        raise WasatError(f"a program is what from_pretrained, load_program or .program() make, not {type(program).__name__}")


def _told(progress: Progress | None) -> Progress:
    """What progress is told to; None: nobody."""
    if progress is not None and not callable(progress):
        raise WasatError(f"progress is a function of a stage, what is done and of how much, not {type(progress).__name__}")
    return progress or quiet


def _path(x: object) -> Path:
    if not isinstance(x, (str, Path)):
        raise WasatError(f"a file or folder is named by text or a Path, not {type(x).__name__}")
    from wasat.runtime.exchange import no_name

    if (why := no_name(Path(x))) is not None:
        raise WasatError(f"there is no such file or folder: {why}")
    return Path(x)


def _is_exported(program: Program) -> bool:
    """Whether ``forward`` takes tokens under a name or of a type that no session feeds."""
    return "forward" in program.graphs and any(is_exported(v) for v in program["forward"].inputs)


def _takes_tokens(program: Program) -> bool:
    """Whether ``forward`` takes tokens: integers [batch, sequence], the sequence symbolic."""
    return "forward" in program.graphs and bool(token_inputs(program["forward"]))


def _no_cache(report: Report, kv_cache: bool | None) -> str:
    """Why a program has no caches, for those who want to generate with it."""
    if kv_cache is False:
        return "it was compiled without (kv_cache=False)"
    passes = (TokenInputs.name, DeriveKVCache.name)
    found = (r.message for s in report.steps if s.name in passes for r in s.remarks if r.kind == "missed")
    return next(found, "its forward takes no tokens, integers [batch, sequence] where the sequence is symbolic")


def _small_sizes(program: Program) -> list[dict[str, int]]:
    """Two bindings of the program's symbols, and of the capacity that caches bring. Random integers are below 4."""
    names = sorted({name for g in program.graphs.values() for name in g.symbols})
    capacity = {capacity_name(program["forward"]): 16} if "forward" in program.graphs else {}
    return [{**{name: first + i for i, name in enumerate(names)}, **capacity} for first in (4, 6)]


KERNELS = "kernels of "
"""How the step of a report begins that says what a target's kernels left."""


def compile(
    program: Program, out: str | Path, *, target: str = "cpu", quantize: str | None = None, activation: str | None = "int8",
    overrides: Mapping[str, str] | None = None, kv_cache: bool | None = None, chunk: int = 512, cache: str = "f32",
    threads: int | None = None, passes: Pipeline = "default", check: bool = False, progress: Progress | None = None,
    keep_forward: bool = False,
) -> Report:  # fmt: skip
    """Compiles ``program`` into the artifact folder ``out``; see :func:`optimize` for the options.

    ``cache``: how keys and values are stored, ``"f32"`` or, in fewer bits and with their rounding, ``"f16"``, ``"int8"`` or
    ``"int4"`` (a quarter and an eighth of the memory, and a scale for each position of each head).
    The folder is complete or absent: it is written beside its place and renamed. An artifact that is there is replaced.
    Raises, before the long work: WasatError for an unknown target, a missing C++ compiler, a program without its numbers, a
    model whose cache cannot be derived; ArtifactError for a place that holds something else. Later: IRError for an operation
    that the target lacks.
    """
    from wasat.backends.tvm.build import Library, build, check_tools, plan
    from wasat.backends.tvm.targets import target_named
    from wasat.backends.tvm.weights import write_weights
    from wasat.runtime.artifact import check_destination, write_artifact

    from .manifest import manifest_of

    progress = _told(progress)
    machine = target_named(target, threads, cache)
    check_tools(machine)
    check_destination(_path(out))
    runtime = machine.runtime_files()
    for source in program.params.values():
        if isinstance(source, _NoData):
            source.load()
    optimized, report = optimize(
        program, quantize=quantize, activation=activation, overrides=overrides, kv_cache=kv_cache, chunk=chunk,
        granule=machine.granule, passes=passes, check=check, progress=progress, keep_forward=keep_forward,
        formats=machine.formats, cache=cache,
    )  # fmt: skip
    library = (build if machine.device is None else plan)(optimized, machine, on_progress=progress)
    _say_left(report, optimized, machine, library.left)
    manifest = manifest_of(optimized, library, {
        "quantize": quantize, "activation": activation, "overrides": dict(overrides or {}), "target": target,
        "threads": machine.threads, "cache": cache,
    })  # fmt: skip
    if "forward" in optimized.graphs and "prefill" not in optimized.graphs:
        manifest["no_cache"] = _no_cache(report, kv_cache)

    def link(path: Path) -> None:
        progress("linking")
        assert isinstance(library, Library)
        library.export(path)

    files: dict[str, Any] = {
        **({"model.so": link} if isinstance(library, Library) else library.files()),
        "weights.safetensors": lambda path: write_weights(
            path, library.plan, optimized.load, lambda done, total: progress("packing weights", done, total)
        ),
        **{p.name: p for p in runtime},
    }
    if program.origin.tokenizer:
        files["tokenizer.json"] = Path(program.origin.tokenizer)
    for name, text in program.origin.texts.items():
        files[name] = functools.partial(Path.write_text, data=text, encoding="utf-8")
    write_artifact(Path(out), manifest, files)
    return report


def export_c(
    source: str | Path, out: str | Path, target: str = "cpu", quantize: str | None = None,
    overrides: Mapping[str, str] | None = None, progress: Progress | None = None,
) -> Report | None:  # fmt: skip
    """Writes at ``out`` a project in C that runs a model without Python: of what :func:`load_program` reads, compiled first,
    or of an artifact as it is (there is no report then).

    Raises WasatError for an artifact with options, InputError for a model or tokenizer that the host does not run,
    ArtifactError for a place that holds something else.
    """
    from wasat.runtime.artifact import MANIFEST
    from wasat.runtime.c import check_place, check_tokenizer, write_project

    source, out = _path(source), _path(out)
    if (source / MANIFEST).is_file():
        if quantize or overrides or target != "cpu":
            raise WasatError(f"{source} is compiled already: quantize, overrides and target are for a model")
        write_project(source, out)
        return None
    check_place(out)
    program = load_program(source)
    if program.origin.tokenizer:
        check_tokenizer(Path(program.origin.tokenizer))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        artifact = Path(folder) / "artifact"
        report = compile(program, artifact, target=target, quantize=quantize, overrides=overrides, progress=progress)
        write_project(artifact, out, move=True)
    return report


def run(
    program: Program, graph: str = "forward", *, backend: str = "interpreter",
    symbols: Mapping[str, int] | None = None, **inputs: Any,
) -> dict[str, Array]:  # fmt: skip
    """Runs one graph on NumPy arrays: on the interpreter (the reference), or compiled for a target (``"cpu"``, ``"webgpu"``).

    It compiles each time; :class:`Executable` compiles once.
    """
    _check_program(program)
    g = program[graph]
    if backend == "interpreter":
        params = {name: program.load(name) for name in g.params}
        return dict(zip(g.output_names, evaluate(g, inputs, params, symbols=symbols)))
    return Executable(program, backend)(graph, **inputs)


class Executable:
    """A program compiled once, in this process, to be called again and again: ``Executable(program)(x=array)``.

    It keeps the parameters as they were. Sizes that are symbolic may differ from call to call. ``target``: any that this
    machine runs (``wasat targets``); what runs from a launch plan (``"webgpu"``, ``"opencl"``) is loaded on its device.
    """

    def __init__(self, program: Program, target: str = "cpu", *, threads: int | None = None) -> None:
        from wasat.backends.tvm.build import Runner
        from wasat.backends.tvm.targets import target_named

        from .planned import PlanRunner

        machine = target_named(target, threads)
        program = program.copy()
        # or its weights of integers are widened in each call; some of a program's graphs may run without its other entries
        PassManager([FoldDequantized()], verify=False).run(program)
        self._runner: Runner | PlanRunner = (Runner if machine.device is None else PlanRunner)(program, machine)

    def __call__(self, graph: str = "forward", /, **inputs: Any) -> dict[str, Array]:
        """Outputs of ``graph`` by name. Raises WasatError for inputs that do not fit."""
        g = self._runner.program[graph]
        names = [v.name for v in g.inputs]
        if set(names) != set(inputs):
            lacking, beyond = (sorted(set(a) - set(b)) for a, b in ((names, inputs), (inputs, names)))
            said = [f"lacking: {', '.join(lacking)}"] * bool(lacking) + [f"unknown: {', '.join(beyond)}"] * bool(beyond)
            raise IRError(f"@{graph} takes {', '.join(names) or 'no inputs'}; {'; '.join(said)}")
        return dict(self._runner(graph, inputs))


def explained(program: Program, target: str = "cpu", **options: Any) -> Report:
    """What :func:`compile` would report: of :func:`optimize`, whose ``options`` these are, and of the target's kernels."""
    from wasat.backends.tvm.build import left_by
    from wasat.backends.tvm.targets import target_named

    machine = target_named(target)
    optimized, report = optimize(program, granule=machine.granule, formats=machine.formats, **options)
    _say_left(report, optimized, machine, left_by(optimized, machine))
    return report


def _say_left(report: Report, program: Program, target: Target, left: Sequence[Left]) -> None:
    """Adds what the target's kernels left of ``program``, and why, to the report, and what they say of themselves."""
    size = sum(map(len, program.graphs.values()))
    for name, kinds in ((KERNELS, ("left",)), ("tensor cores of ", ("slow", "fast"))):
        said = [x for x in left if x.kind in kinds]
        remarks = [Remark("applied" if x.kind == "fast" else "missed", x.why, x.graph, x.loc) for x in said]
        if remarks:
            report.steps.append(Step(name + target.name, 0.0, size, size, False, remarks))


def explain(report: Report) -> str:
    """What every pass did, and what it nearly did and why not, with the user's source lines."""
    return report.explain()


@dataclass(frozen=True)
class _NoData:
    """A parameter of a program that came as text: its type is known, its numbers are not."""

    name: str
    type: Type

    def load(self) -> Array:
        raise IRError(f"parameter {self.name} has no data: the program was read from text, which names its parameters only")


def _beside(model: Path, program: Program) -> None:
    """What exporters leave in a model's folder: tokenizer, token ids that begin and end a text, the context's length."""
    from wasat.frontend.chat import chat_texts
    from wasat.frontend.huggingface import generation_ids
    from wasat.frontend.weights.safetensors import read_json

    tokenizer, path = model.with_name("tokenizer.json"), model.with_name("config.json")
    if tokenizer.exists():
        program.origin = replace(program.origin, tokenizer=str(tokenizer), texts=chat_texts(model.parent))
    config = read_json(path) if path.exists() else {}
    if "model_type" in config:
        lengths = [config[k] for k in ("max_position_embeddings", "n_positions") if isinstance(config.get(k), int)]
        program.declare(generation=generation_ids(model.parent, config), context=min(lengths, default=None))


def from_pretrained(folder: str | Path, *, context: int | None = None) -> Program:
    """The program of a model folder: Hugging Face's (:func:`wasat.frontend.from_pretrained`, for ``context`` positions), or one
    that :func:`wasat.models.gemini.save` wrote.
    """
    from wasat import frontend
    from wasat.frontend.models import gemini
    from wasat.frontend.weights.safetensors import read_json

    config = _path(folder) / "config.json"
    if config.is_file() and read_json(config).get("model_type") == gemini.MODEL_TYPE:
        if context is not None:
            raise WasatError(f"{folder}: context is {context}, and config.json says how many positions the model has")
        return gemini.load(folder)
    return frontend.from_pretrained(folder, context)


def from_gguf(path: str | Path, *, context: int | None = None) -> Program:
    """The program of a GGUF file, for ``context`` positions; see :func:`wasat.frontend.gguf.from_gguf`."""
    from wasat.frontend.gguf import from_gguf

    return from_gguf(path, context)


def described(source: str | Path, context: int | None = None) -> Program:
    """A program whose numbers nobody needs, to be planned or looked at: of what :func:`load_program` reads, of a
    ``config.json`` alone (Hugging Face's or :func:`wasat.models.gemini.save`'s), or of a preset of
    :mod:`wasat.models.gemini`, ``gemini-27b``. Of a model that has other frequencies for long texts, for ``context`` positions.
    """
    from wasat.frontend.huggingface import from_config
    from wasat.frontend.models import gemini
    from wasat.frontend.weights.safetensors import read_json

    p = Path(source)
    if p.suffix == ".json" and p.is_file():
        config = read_json(p)
        if config.get("model_type") != gemini.MODEL_TYPE:
            made = from_config(p)
            return from_config(p, context) if context is not None and context > (made.interface.context or context) else made
        return gemini.Gemini(gemini.Config.from_json(config, str(p))).program()
    if not p.exists() and (name := str(source).removeprefix("gemini-")) in gemini.PRESETS:
        return gemini.Gemini(gemini.preset(name)).program()
    made = load_program(p)
    folder = p.is_dir() and made.origin.family is not None and made.origin.family != gemini.MODEL_TYPE
    more = context is not None and context > (made.interface.context or context)
    return load_program(p, context=context) if more and (folder or p.suffix == ".gguf") else made


def load_program(
    path: str | Path, *, constants: Mapping[str, Any] | None = None, sizes: Mapping[str, int] | None = None,
    context: int | None = None,
) -> Program:  # fmt: skip
    """A model folder, a GGUF file (``.gguf``), an ONNX file (``.onnx``), a program that :func:`wasat.save_program` wrote, or a
    file of graph text (any other text file).

    An ONNX file's ``tokenizer.json``, ``config.json`` and ``generation_config.json`` are read where they stand beside it;
    ``constants`` and ``sizes`` fix inputs and symbolic sizes of it (see :func:`wasat.from_onnx`). ``context``: of a
    folder or a GGUF file, the positions that it is made for (see :func:`wasat.frontend.from_pretrained`).
    """
    from wasat.ir import parse_program

    from .saved import is_saved, load_saved

    p = _path(path)
    if (constants or sizes) and p.suffix != ".onnx":
        raise WasatError(f"{p} is no ONNX file: only of these, inputs and sizes are fixed")
    if p.is_dir():
        return from_pretrained(p, context=context)
    if p.suffix == ".gguf":
        return from_gguf(p, context=context)
    if context is not None:
        raise WasatError(f"{p} is no model folder and no GGUF file: only of these, the context is chosen")
    if p.suffix == ".onnx" and p.is_file():
        try:
            from wasat.frontend.onnx import from_onnx
        except ModuleNotFoundError as e:
            raise WasatError(f"{p}: reading ONNX files needs the package {e.name}; pip install 'wasat[onnx]'") from None
        program = from_onnx(p, constants=constants, sizes=sizes)
        _beside(p, program)
        return program
    if p.is_file() and is_saved(p):
        return load_saved(p)
    if p.is_file():
        try:
            text = p.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            wanted = "a model folder, a GGUF or ONNX file, a saved program, or a file of graph text"
            raise WasatError(f"{p} is not text: give {wanted}") from None
        program = parse_program(text, str(p))
        if not program.graphs:
            raise WasatError(f"{p} holds no graph")
        for g in program.graphs.values():
            program.params.update({name: _NoData(name, v.type) for name, v in g.params.items()})
        return program
    raise WasatError(f"{p} is neither a Hugging Face folder nor a file of graph text nor a GGUF or ONNX file")
