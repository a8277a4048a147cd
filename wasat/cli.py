"""The command line: ``wasat compile | generate | show | explain | demo``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from wasat import __version__

app = typer.Typer(
    name="wasat", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="Compile multimodal transformers.\n\n"
    "`wasat compile FOLDER -o OUT --quantize int4` turns a Hugging Face folder into an artifact; "
    "`wasat generate OUT \"prompt\"` runs it, without the compiler. `wasat show` prints graphs as text, before or after any "
    "pass; `wasat explain` says what each pass did, and for every lost optimization why and where. `wasat demo` does it all "
    "on a small model that comes along.",
)  # fmt: skip
out, err = Console(), Console(stderr=True)

Quantize = Annotated[
    str | None,
    typer.Option(help="Weights as `int4` or `int8` (blocks of 32, f16 scales), `f16`, `bf16`; default: f32."),
]
Override = Annotated[
    list[str] | None,
    typer.Option("--override", help="`GLOB=SCHEME` for the parameters that match, e.g. `'*embed*=int8'`; repeatable."),
]
Source = Annotated[Path, typer.Argument(help="A Hugging Face folder, or a file of graph text.", show_default=False)]


class _Bars:
    """Progress bars on stderr, one per stage; silent where stderr is no terminal."""

    def __init__(self) -> None:
        self.bars = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), console=err, transient=True, disable=not err.is_terminal,
        )  # fmt: skip
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bars:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        group = "passes" if stage.startswith("pass ") else stage
        if group not in self.tasks:
            for other in self.tasks.values():
                task = self.bars.tasks[self.bars.task_ids.index(other)]
                self.bars.update(other, completed=task.total or 1, total=task.total or 1)
            self.tasks[group] = self.bars.add_task(group, total=total or None)
        self.bars.update(self.tasks[group], completed=done, total=total or None, description=stage)


def _overrides(items: list[str] | None) -> dict[str, str]:
    found = {}
    for item in items or []:
        glob, sign, scheme = item.rpartition("=")
        if not sign or not glob:
            raise typer.BadParameter(f"{item!r}: write GLOB=SCHEME, e.g. '*embed*=int8'")
        found[glob] = scheme
    return found


def _version(value: bool) -> None:
    if value:
        print(f"wasat {__version__}")
        raise typer.Exit


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


@app.command()
def compile(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The artifact folder to write.", show_default=False)],
    quantize: Quantize = None,
    override: Override = None,
    target: Annotated[str, typer.Option(help="`cpu` (this machine), `cpu:znver3`, `cuda:sm_80`, …")] = "cpu",
    activation: Annotated[
        str, typer.Option(help="`int8`: integer dot products; `f32`: activations stay float (slower, more exact).")
    ] = "int8",
    chunk: Annotated[int, typer.Option(help="Most prompt tokens per call; sliding-window caches hold window + chunk.")] = 512,
    threads: Annotated[int | None, typer.Option(help="Threads the code is laid out for; default: this machine's.")] = None,
) -> None:
    """Compile a model into an artifact: one folder with library, packed weights, tokenizer and runtime.

    Example: `wasat compile examples/pygemma -o pygemma.wasat --quantize int4`
    """
    from wasat import driver

    started = time.perf_counter()
    with _Bars() as bars:
        bars("reading the model")
        program = driver.load_program(source)
        report = driver.compile(
            program, output, target=target, quantize=quantize, overrides=_overrides(override), chunk=chunk, threads=threads,
            activation=None if activation in ("f32", "none") else activation, progress=bars,
        )  # fmt: skip
    size = sum(f.stat().st_size for f in output.iterdir())
    out.print(f"[bold]{escape(str(output))}[/]: {size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s")
    missed = [r for step in report.steps for r in step.remarks if r.kind == "missed"]
    if missed:
        out.print(f"{len(missed)} optimizations were missed: [bold]wasat explain {escape(str(source))}[/] names them")


@app.command()
def generate(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder made by `wasat compile`.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="The text to continue; `-` reads standard input.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 samples the model's distribution.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the fewest tokens that hold this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this fraction of the likeliest one's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: discourage tokens already there.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; repeatable.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the text.")] = False,
) -> None:
    """Continue a prompt, streaming. Needs the artifact and the runtime, not the compiler.

    Example: `wasat generate pygemma.wasat "def read_file(path):" --max-tokens 80`
    """
    from wasat import runtime

    text = sys.stdin.read() if prompt == "-" else prompt
    model = runtime.load(artifact)
    options = runtime.SamplingOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )

    def write(_row: int, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    (result,) = model.generate([text], max_tokens=max_tokens, options=options, stop=stop or [], stream=write)
    sys.stdout.write("\n")
    if not quiet:
        err.print(f"[dim]{result.summary()}[/]")


@app.command()
def show(
    source: Source,
    before: Annotated[str | None, typer.Option(help="Print the graphs as they enter this pass.")] = None,
    after: Annotated[str | None, typer.Option(help="Print the graphs as they leave this pass; `all`: after the last.")] = None,
    quantize: Quantize = None,
    override: Override = None,
    locs: Annotated[bool, typer.Option(help="Note at every line where it was written.")] = False,
) -> None:
    """Print a model's graphs as text: as declared, or before or after any pass.

    Example: `wasat show examples/pygemma --after fuse-attention`
    """
    from wasat import driver
    from wasat.ir import Program, graph_text

    program = driver.load_program(source)

    def render(p: Program) -> None:
        for g in p.graphs.values():
            print(graph_text(g, locs=locs), end="\n")

    if before is None and after is None:
        return render(program)
    found = []

    def dump(name: str, when: str, p: Program) -> None:
        if (when, name) in (("before", before), ("after", after)):
            found.append(name)
            render(p)

    result, report = driver.optimize(program, quantize=quantize, overrides=_overrides(override), dump=dump)
    if after == "all":
        return render(result)
    if not found:
        names = ", ".join(dict.fromkeys(s.name for s in report.steps))
        raise typer.BadParameter(f"no such pass; in order they are: {names}")


@app.command()
def explain(
    source: Source,
    quantize: Quantize = None,
    override: Override = None,
    missed: Annotated[bool, typer.Option(help="Only what was missed.")] = False,
) -> None:
    """Say what every pass did, and for each optimization that was lost, why and at which line of the model.

    Example: `wasat explain examples/pygemma --quantize int4`
    """
    from wasat import driver

    program = driver.load_program(source)
    _, report = driver.optimize(program, quantize=quantize, overrides=_overrides(override))
    print(report.explain(only="missed" if missed else None))


@app.command()
def demo(
    quantize: Annotated[str, typer.Option(help="`int4`, `int8`, `f16` or `f32`.")] = "int4",
    folder: Annotated[Path | None, typer.Option(help="A Hugging Face folder to use instead of the small one.")] = None,
) -> None:
    """Watch a small trained model become a graph, be fused, get its KV cache, be quantized, compiled and asked to write code."""
    from wasat import demo as _demo

    _demo.main(out, folder, None if quantize == "f32" else quantize)


def main() -> None:
    """Entry point: Wasat's own errors become one message and exit status 1."""
    try:
        app()
    except Exception as e:
        from wasat.ir.errors import WasatError

        kinds: tuple[type[Exception], ...] = (WasatError,)
        runtime_errors = sys.modules.get("wasat.runtime")
        if runtime_errors is not None:
            kinds += (runtime_errors.RuntimeErrorBase,)
        if isinstance(e, (*kinds, FileNotFoundError)):
            err.print(f"[bold red]error:[/] {escape(str(e))}")
            raise SystemExit(1) from None
        raise


__all__ = ["MofNCompleteColumn", "app", "main"]
