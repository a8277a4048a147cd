"""The demonstration behind ``make demo``: one small trained model through every room of the house."""

from __future__ import annotations

import tempfile
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from wasat import driver
from wasat.ir import Graph, Node, Program, WasatError, node_text
from wasat.passes import Report
from wasat.runtime import Model, SamplingOptions, load

PROMPTS = ("def read_file(path):\n    ", "class Stack:\n    def __init__(self", "import os\nimport sys\n\n")


def main(out: Console, folder: Path | None = None, quantize: str | None = "int4") -> None:
    """Runs the demonstration on a Hugging Face folder (default: the example's), writing to ``out``.

    Raises WasatError for a folder that cannot be compiled, or that has no tokenizer to read and write text with.
    """
    source = folder or example_model()
    program = driver.load_program(source)
    if not program.metadata.get("tokenizer"):
        raise WasatError(f"{source} brings no tokenizer (tokenizer.json): there would be no text to show")
    _show_graph(out, program, source)
    optimized, report = driver.optimize(program, quantize=quantize)
    _show_passes(out, optimized, report)
    with tempfile.TemporaryDirectory() as tmp:
        artifact = Path(tmp) / "model.wasat"
        _compile(out, program, artifact, quantize)
        model = load(artifact)
        _talk(out, model)
        _race(out, model)
        _compare(out, program, model)


def example_model() -> Path:
    """The folder of the small Gemma-3-architecture model that comes with the repository."""
    import wasat.ir

    for base in (Path(wasat.ir.__file__).resolve().parent.parent, Path.cwd()):
        if (base / "examples" / "pygemma" / "config.json").exists():
            return base / "examples" / "pygemma"
    raise FileNotFoundError("examples/pygemma is not here: run the demo from a clone of the repository, or name a folder")


def _show_graph(out: Console, program: Program, source: Path) -> None:
    forward = program["forward"]
    out.rule(f"1. {escape(source.name)}: a Hugging Face folder becomes a graph")
    size = sum(int(np.prod(v.shape)) for v in forward.params.values())
    _print(out, f"{len(forward.params)} tensors of {size / 1e6:.1f} M parameters; a graph of {len(forward)} nodes")
    _panel(out, _around(forward, "softmax", before=4, after=2), "attention as it is written: no cache, no kernel")


def _show_passes(out: Console, optimized: Program, report: Report) -> None:
    out.rule("2. Passes")
    table = Table(box=None, header_style="bold")
    table.add_column("pass", min_width=max(len(step.name) for step in report.steps))
    table.add_column("ms", justify="right", min_width=3)
    table.add_column("nodes", min_width=9)
    table.add_column("what it did")
    for step in report.steps:
        did = [r.message for r in step.remarks if r.kind == "applied"]
        count = f"{len(did)} × " if len(did) > 1 else ""
        cells = step.name, f"{step.seconds * 1e3:.0f}", f"{step.nodes_before} → {step.nodes_after}", count + "".join(did[:1])
        table.add_row(*map(escape, cells))
    out.print(table)
    missed = report.remarks("missed")
    _print(out, "\n".join(f"missed: {r.message}" for r in missed) or "no optimization was missed")
    _panel(out, _around(optimized["decode"], "cached_attention", before=1, after=1), "the same attention in @decode")
    caches = [
        "a full cache" if s["capacity"] is None else f"a ring of {s['capacity']} positions for a window of {s['window']}"
        for s in optimized.metadata["states"]
        if s["role"] == "k"
    ]
    kinds = ", ".join(f"{caches.count(kind)} × {kind}" for kind in dict.fromkeys(caches))
    _print(out, f"caches of keys and values: {kinds}")


def _compile(out: Console, program: Program, artifact: Path, quantize: str | None) -> None:
    out.rule(f"3. Compiled with TVM, weights in {quantize or 'f32'}")
    started = time.perf_counter()
    with out.status("compiling") as status:

        def tell(stage: str, done: int = 0, total: int = 0) -> None:
            status.update(stage)

        driver.compile(program, artifact, quantize=quantize, progress=tell)
    seconds = time.perf_counter() - started
    sizes = {f.name: f.stat().st_size for f in artifact.iterdir()}
    _print(out, f"{seconds:.1f} s; the artifact, {sum(sizes.values()) / 1e6:.1f} MB:")
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        _print(out, f"  {sizes[name] / 1e6:6.2f} MB  {name}")


def _talk(out: Console, model: Model) -> None:
    out.rule("4. Loaded without the compiler, it writes code")

    def write(_row: int, piece: str) -> None:
        out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)

    options = SamplingOptions(temperature=0.6, top_p=0.9, repetition_penalty=1.1, seed=3)
    for prompt in PROMPTS:
        out.print(prompt, end="", style="bold", markup=False, highlight=False, soft_wrap=True)
        (result,) = model.generate(prompt, max_tokens=60, options=options, stream=write)
        out.print()
        out.print(result.summary(), style="dim", markup=False, highlight=False, soft_wrap=True)
        out.print()


def _race(out: Console, model: Model) -> None:
    """Speed at a length where it can be told; the first run brings memory and threads up."""
    out.rule("5. Speed")
    tokens = _text(model, 512)
    for _ in range(2):
        (result,) = model.generate([tokens], max_tokens=65)
    prefill = len(tokens) / result.prefill_seconds
    _print(out, f"prefill {prefill:,.0f} tokens/s ({len(tokens)} at once)")
    if result.steps:
        _print(out, f"decode  {result.steps / result.decode_seconds:,.0f} tokens/s ({result.steps}, one by one)")


def _compare(out: Console, program: Program, model: Model) -> None:
    """Next-token log-probabilities of the artifact beside the f32 reference's, over one text."""
    out.rule("6. Beside the f32 reference (the NumPy interpreter)")
    tokens = _text(model, 256)
    reference = np.asarray(driver.run(program, tokens=np.array([tokens]))["logits"])[0]
    session = model.session()
    logits = np.array([session.step([[t]])[0] for t in tokens])
    a, b = _log_softmax(reference), _log_softmax(logits)
    before, after = (float(-x[np.arange(len(tokens) - 1), tokens[1:]].mean()) for x in (a, b))
    agree = float((a.argmax(-1) == b.argmax(-1)).mean())
    kl = float((np.exp(a) * (a - b)).sum(-1).mean())
    _print(out, f"nats per token over {len(tokens)} tokens of Python   {before:.4f} → {after:.4f} ({after / before - 1:+.2%})")
    _print(out, f"positions with the same likeliest token   {agree:.1%}")
    _print(out, f"mean Kullback-Leibler divergence          {kl:.5f} nats")


def _text(model: Model, most: int) -> list[int]:
    """Up to ``most`` tokens of Python that the model was not trained on: the driver's."""
    context = model.manifest.context or most
    return model.tokenizer.encode(Path(driver.__file__).read_text())[: min(most, context // 2)]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


# -- excerpts of graphs ----------------------------------------------------------------------------------------------------
def _around(graph: Graph, op: str, before: int, after: int) -> list[Node]:
    """The first ``op`` with what feeds it and what it feeds, so many steps away; constants aside."""
    first = next((n for n in graph.nodes if n.op.name == op), None)
    if first is None:
        return []
    near, fed, feeding = {first}, [first], [first]
    for _ in range(before):
        feeding = [v.node for n in feeding for v in n.inputs if v.node is not None]
        near.update(feeding)
    for _ in range(after):
        fed = [user for n in fed for v in n.outputs for user in v.users]
        near.update(fed)
    return [n for n in graph.nodes if n in near and n.op.name != "constant"]


def _panel(out: Console, nodes: Iterable[Node], title: str) -> None:
    width = out.width - 4
    lines = [textwrap.fill(node_text(n), width, subsequent_indent="    ", break_on_hyphens=False) for n in nodes]
    if lines:
        out.print(Panel(escape("\n".join(lines)), title=title, border_style="dim"), highlight=False)


def _print(out: Console, text: str) -> None:
    out.print(text, markup=False, highlight=False)
