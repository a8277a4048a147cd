"""The command line: ``wasat compile``, ``run``, ``generate``, ``chat``, ``show``, and what else ``wasat --help`` lists."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from wasat import __version__
from wasat.cli import chat as cli_chat
from wasat.cli import compare as cli_compare
from wasat.cli import embed as cli_embed
from wasat.cli import export as cli_export
from wasat.cli import graphs as cli_graphs
from wasat.cli import quantize as cli_quantize
from wasat.cli import run as cli_run
from wasat.cli.console import (
    Activation,
    Bar,
    Constants,
    MinP,
    Override,
    Passes,
    Quantize,
    Refusal,
    RepetitionPenalty,
    Seed,
    Sizes,
    Source,
    Stop,
    Temperature,
    TopK,
    TopP,
    array_file,
    constant_of,
    count_missed,
    err,
    or_none,
    out,
    overrides_of,
    say,
    scheme_name,
    sizes_of,
    text_file,
    warn_of_weights,
)
from wasat.errors import WasatError

if TYPE_CHECKING:
    import numpy as np

    from wasat.runtime import Model
    from wasat.runtime.media import Media
    from wasat.runtime.prompts import Prompt

app = typer.Typer(
    name="wasat", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="""Compile multimodal transformers.

A first round, from a clone of the repository:

- `wasat compile examples/pygemma -o pygemma.wasat --quantize int4` makes an artifact of a Hugging Face folder, or an ONNX file
- `wasat generate pygemma.wasat "def read_file(path):"` runs it, without the compiler
- `wasat chat model.wasat` talks with a model that was trained on conversations
- `wasat embed model.wasat "a text" -o embeddings.npy` embeds texts, or scores them with a reranker
- `wasat run model.onnx --input x=x.npy -o y.npz` runs any other model: arrays, pictures and sounds in, arrays out
- `wasat show examples/pygemma --after fuse-attention` prints the graph as any pass leaves it
- `wasat plan examples/pygemma` says what it will take, in each scheme, before anything is allocated
- `wasat explain examples/pygemma` says what each pass did, and for every lost optimization why and where
- `wasat compare examples/pygemma cpu` says whether the compiled code is right, and if not, which node is wrong
- `wasat quantize examples/pygemma --data text.txt --bits 5 -o small` stores it in 5 bits a weight, chosen by what a text shows
- `wasat train examples/train_tiny.toml` trains a tiny language model in under a minute
- `wasat train examples/gemini.toml --artifact gemini.wasat`, in under an hour, one of text, pictures, sounds and clips
- `wasat evaluate gemini.wasat examples/gemini.toml` asks it what it has not been trained on
- `wasat export examples/pygemma --onnx pygemma.onnx` writes it as an ONNX file; `--c` a project in C, `--web` a web page
- `wasat targets` says which machines there are to compile for, and what is missing to do so or to run it
- `wasat demo` does it all on small models, and writes a page
""",
)  # fmt: skip
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
    quantize: Quantize = "f32",
    override: Override = None,
    activation: Activation = "int8",
    target: Annotated[str, typer.Option(help="`cpu` (this machine), `cpu:znver3`, `cuda:sm_80`, …")] = "cpu",
    chunk: Annotated[int, typer.Option(help="Most prompt tokens per call; sliding-window caches hold window + chunk.")] = 512,
    cache: Annotated[str, typer.Option(help="How keys and values are stored: `f32`, `f16`, `int8` or `int4`.")] = "f32",
    threads: Annotated[int | None, typer.Option(help="Threads the code is laid out for; default: this machine's.")] = None,
    passes: Passes = "default",
    context: Annotated[
        int | None,
        typer.Option(
            help="Positions that the model is made for; default: the model's limit. Of models with longrope (Phi 3.5, Phi 4 "
            "mini), more than the first context takes the factors of long texts.", min=1,
        ),
    ] = None,
    size: Sizes = None,
    constant: Constants = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare results, on the interpreter, before and after every pass (slow).")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what every pass did.")] = False,
) -> None:
    """Compile a model into an artifact: one folder with library, packed weights, tokenizer and runtime.

    Examples:

    - `wasat compile examples/pygemma -o pygemma.wasat --quantize int4`
    - `wasat compile examples/pygemma -o mixed.wasat --quantize int4 --override '*embed*=int8'`
    - `wasat compile examples/pygemma -o exact.wasat --check --verbose`
    - An ONNX file's sizes and inputs can be fixed: `--size sequence=512 --constant sr=16000`
    """
    from wasat import driver

    started = time.perf_counter()
    with Bar() as bar:
        bar("reading the model")
        fixed = dict(constant_of(item) for item in constant or ())
        program = driver.load_program(source, sizes=sizes_of(size), constants=fixed, context=context)
        report = driver.compile(
            program, output, target=target, quantize=or_none(quantize), overrides=overrides_of(override),
            activation=or_none(activation), chunk=chunk, cache=cache, threads=threads, passes=passes, check=check, progress=bar,
        )  # fmt: skip
    if verbose:
        print(report.explain())
    warn_of_weights(report, quantize)
    for r in report.remarks("applied"):
        if "weights in all: " in r.message:
            say(f"{r.message} (@{r.graph})")
    written = sum(f.stat().st_size for f in output.iterdir())
    say(f"{output}: {written / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s")
    if not verbose:
        count_missed(report, source, target, quantize)


@app.command()
def generate(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder made by `wasat compile`.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="The text to continue; `-` reads standard input.", show_default=False)],
    image: Annotated[list[Path] | None, typer.Option(help="A picture; repeatable.", show_default=False)] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A sound; repeatable.", show_default=False)] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video; repeatable.", show_default=False)] = None,
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--input", show_default=False,
            help="`NAME=FILE`: what else the model takes, such as its encoder's input; `.npy`, `.npz`, or `.txt` as tokens.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 200,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    stop_token: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Stop at this token id; repeatable.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the text.")] = False,
) -> None:
    """Continue a prompt, streaming. Needs the artifact and the runtime, not the compiler.

    Pictures, sounds and videos come before the text, in this order, or where the text says `{image}`, `{audio}`, `{video}`.

    Examples:

    - `wasat generate pygemma.wasat "def read_file(path):" --max-tokens 80`
    - `wasat generate pygemma.wasat "class Stack:" --temperature 0.8 --top-p 0.95 --seed 7`
    - `echo "import os" | wasat generate pygemma.wasat - --stop "def " --quiet`
    - `wasat generate gemini.wasat "What is this?" --image photo.jpg`
    - `wasat generate t5.wasat "" --input input_ids=letter.txt`
    - `wasat generate gemini.wasat "Does {audio} name what {image} shows?" --image photo.jpg --audio word.wav`
    """
    from wasat import runtime

    text = sys.stdin.read().removesuffix("\n").removesuffix("\r") if prompt == "-" else prompt  # the line's end is echo's
    model = runtime.load(artifact)
    options = runtime.SamplingOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )

    def write(_row: int, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    media: dict[str, Sequence[Media]] = {
        "image": [runtime.Image(p) for p in image or ()], "audio": [runtime.Audio(p) for p in audio or ()],
        "video": [runtime.Video(p) for p in video or ()],
    }  # fmt: skip
    (result,) = model.generate(
        [_parts(text, media)], max_tokens=max_tokens, options=options, stop=stop or [],
        stop_tokens=stop_token or [], stream=write,
        inputs=dict(_input(item, model) for item in given or ()),
    )  # fmt: skip
    sys.stdout.write("\n")
    if not quiet:
        err.print(result.summary(), style="dim", markup=False, highlight=False, soft_wrap=True)


def _input(item: str, model: Model) -> tuple[str, np.ndarray]:
    """Name and array of an ``--input``."""
    import numpy as np

    name, _, file = item.partition("=")
    path = Path(file)
    if not file or path.suffix not in (".npy", ".npz", ".txt"):
        raise Refusal(
            f"--input {item!r}: write NAME=FILE, an array (.npy, .npz) or a text as tokens (.txt); of sounds and pictures "
            "give what the model's own processor makes of them"
        )
    if path.suffix == ".txt":
        return name, np.array([model.tokenizer.encode(text_file(path))])
    return name, array_file(item, name, path)


def _parts(text: str, media: Mapping[str, Sequence[Media]]) -> Prompt:
    """The prompt: media at their places in the text, those without one before it. Without media, braces are only braces."""
    left = {kind: list(items) for kind, items in media.items() if items}
    if not left:
        return text
    parts: list[str | Path | Media] = []
    for piece in re.split(f"({'|'.join(f'{{{kind}}}' for kind in left)})", text):
        kind = piece[1:-1]
        if piece != f"{{{kind}}}" or kind not in left:
            parts += [piece] if piece else []
        elif left[kind]:
            parts.append(left[kind].pop(0))
        else:
            raise Refusal(f"the text names more than {len(media[kind])} {piece}: give --{kind} once for each")
    return [*(x for items in left.values() for x in items), *parts]


for command in (cli_graphs.show, cli_graphs.plan, cli_graphs.explain):
    app.command()(command)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file: model, data, optimizer.", show_default=False)],
    artifact: Annotated[
        Path | None, typer.Option(help="When done, compile the trained model into this artifact folder.")
    ] = None,
) -> None:
    """Train a model as one compiled program per step: on text files, or a multimodal one on tasks. Run again after a stop.

    The file's `output` folder receives checkpoints, `log.jsonl` (a line per step) and `curve.html`. A run that was stopped at
    any moment goes on from its last checkpoint and ends with the same bits. `examples/train_tiny.toml` and
    `examples/gemini.toml` explain every entry. Where stderr is no terminal, it receives plain lines in place of a bar.
    Utilisation is the operations that the model needs per second (2 per multiply-add of its products, attention and
    convolutions, and as many for each operand that needs a gradient), relative to NumPy's matrix product on this machine.

    Examples:

    - `wasat train examples/train_tiny.toml`
    - `wasat train examples/train_tiny.toml --artifact tiny.wasat`
    - `wasat generate tiny.wasat "def "`
    - `wasat train examples/gemini.toml --artifact gemini.wasat`
    """
    from wasat import driver
    from wasat.recipes.text import read_recipe
    from wasat.training.loop import CURVE

    recipe = read_recipe(config)
    done = recipe.run()
    last = done.log[-1]
    held_out = f", {last['eval.loss']:.4f} held out" if "eval.loss" in last else ""
    speed = f"{last['tokens_per_second']:.0f} tokens/s, {last['utilisation']:.1%} of NumPy's matrix product"
    say(f"step {last['step']:.0f}: loss {last['loss']:.4f}{held_out}; {speed}; {recipe.output / CURVE}")
    if recipe.options["precision"] != "f32" or recipe.options["remat"] or recipe.options["quantize"]:
        for remark in done.remarks:
            say(str(remark))
    if skipped := sum(line.get("skipped", 0) for line in done.log):
        say(f"{skipped:.0f} updates were skipped: their gradients overflowed in f16")
    if artifact is not None:
        with Bar() as bar:
            driver.compile(recipe.served(done), artifact, quantize=recipe.options["quantize"], progress=bar)
        say(f"{artifact}: wasat generate {artifact} \"…\"")


@app.command()
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder made by `wasat compile`.", show_default=False)],
    config: Annotated[Path, typer.Argument(help="The TOML file that it was trained by: its tasks.", show_default=False)],
    count: Annotated[int | None, typer.Option(help="Most questions of a task; default: all of its held-out split.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table into this Markdown file, too.")] = None,
    kinds: Annotated[bool, typer.Option(help="A line for each kind of question.")] = True,
) -> None:
    """Ask an artifact the held-out questions of the tasks it was trained on; beside it, what guessing achieves.

    The baseline is the commonest answer to the same kind of question. Without the medium (black pictures, silence, clips that
    stand still), a model that looks and listens falls back to about that.

    Examples:

    - `wasat evaluate gemini.wasat examples/gemini.toml`
    - `wasat evaluate gemini.wasat examples/gemini.toml --count 100 --no-kinds --markdown accuracy.md`
    """
    from wasat import runtime
    from wasat.recipes import evaluation
    from wasat.recipes.multimodal import Joint
    from wasat.recipes.text import read_recipe

    model = runtime.load(artifact)  # before the tasks, which take long to make
    recipe = read_recipe(config)
    if not isinstance(recipe, Joint):
        raise Refusal(f"{config} describes no tasks with questions: family = \"gemini\" does")
    with Bar() as bar:
        scores = evaluation.evaluate(model, recipe.tasks, count, progress=bar)
    rows = evaluation.table(scores, kinds)
    shown = Table(*rows[0], box=None)
    for row in rows[1:]:
        shown.add_row(*map(escape, row))
    out.print(shown)
    if markdown is not None:
        markdown.write_text(evaluation.markdown(rows), encoding="utf-8")


@app.command()
def demo(
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME", callback=scheme_name, show_default=False,
            help="Of all weights; default: `int8` where a model sees or hears, else `int4`.",
        ),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="A model folder to show instead of the examples'.")] = None,
    page: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("out/demo.html"),
) -> None:
    """Watch models become graphs, be fused, quantized and compiled, and answer from pictures, sounds, clips and code.

    Examples:

    - `wasat demo`
    - `wasat demo --quantize f32`
    - `wasat demo --folder gemini.run/model --page mine.html`
    """
    from wasat.demo import tour as _demo

    _demo.main(out, folder, quantize, page)


@app.command()
def targets(
    only: Annotated[list[str] | None, typer.Argument(help="`cpu`, `cuda:sm_90`, …; default: all.", show_default=False)] = None,
) -> None:
    """Say which machines there are to compile for, and what this one lacks to do so, or to run what is compiled.

    Examples:

    - `wasat targets`
    - `wasat targets cpu:x86-64-v3 cuda:sm_90`
    """
    from wasat.machines import machine, machines

    shown = Table("target", "what it is", "compiles here", "runs here", box=None)
    for m in map(machine, only) if only else machines():
        tools = "\n".join(f"needs {what}" for what in m.tools)
        row = (m.name, m.about, tools or "yes", f"needs {m.lacking}" if m.lacking else "yes")
        shown.add_row(*map(escape, row))
    out.print(shown)


app.command("export")(cli_export.export)
app.command("run")(cli_run.run)
app.command("chat")(cli_chat.chat)
app.command("embed")(cli_embed.embed)
app.command("compare")(cli_compare.compare)
app.command("quantize")(cli_quantize.quantize)


class _WithoutTorch(MetaPathFinder):
    """TVM imports torch where it is installed, to take its tensors; no command gives it any, and torch takes seconds.

    Those that compare with it import it themselves. (On Windows, the two are to be loaded in TVM's order.)
    """

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        specs = (getattr(sys.modules.get(name), "__spec__", None) for name in ("tvm", "tvm_ffi"))
        if fullname == "torch" and any(getattr(spec, "_initializing", False) for spec in specs):
            raise ModuleNotFoundError("TVM is loaded without torch", name=fullname)


def main() -> None:
    """Entry point: what Wasat or the system refuses becomes one message and exit status 1.

    Anything else is a bug, and said to be one, with status 70; where ``WASAT_TRACEBACK`` is set, its traceback comes instead.
    """
    if sys.platform != "win32" and not any(isinstance(finder, _WithoutTorch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WithoutTorch())
    try:
        app()
    except Exception as e:
        if isinstance(e, (Refusal, OSError, WasatError)):
            err.print(f"[bold red]error:[/] {escape(str(e))}", highlight=False, soft_wrap=True)
            raise SystemExit(1) from None
        if isinstance(e, MemoryError):
            err.print("[bold red]error:[/] there is not enough memory; wasat plan says how much a model takes", soft_wrap=True)
            raise SystemExit(1) from None
        if os.environ.get("WASAT_TRACEBACK"):
            raise
        what = " ".join(f"{type(e).__name__}: {e}".split())
        err.print(f"[bold red]error:[/] {escape(what)}", highlight=False, soft_wrap=True)
        err.print(
            "This is a bug in Wasat. To see where it happened, run the command again with WASAT_TRACEBACK=1 before it; please "
            "report both.", soft_wrap=True, highlight=False,
        )  # fmt: skip
        raise SystemExit(70) from None


__all__ = ["app", "main"]
