"""The demonstration behind ``make demo``: models become graphs, are compiled, and answer from files; a page shows it all."""

from __future__ import annotations

import json
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
from wasat.demo.report import Card, Chapter, blind_score, write_page
from wasat.ir import Graph, Node, Program, WasatError, node_text
from wasat.passes import Report
from wasat.quality import log_softmax
from wasat.runtime import Audio, Image, Model, SamplingOptions, Video, load
from wasat.runtime.media import Media, open_media

MODELS = ("gemini", "pygemma")
"""Of examples/."""
PROMPTS = ("def read_file(path):\n    ", "class Stack:\n    def __init__(self")


def main(out: Console, folder: Path | None = None, quantize: str | None = None, page: Path = Path("out/demo.html")) -> None:
    """Runs the demonstration, writing to ``out`` and into the HTML file ``page``.

    ``folder``: a model folder to show instead of the examples'. ``quantize``: of all weights, ``f32`` for none; default: int8
    for models that see or hear, int4 for others.

    Raises WasatError for a folder that cannot be compiled, or that has no tokenizer to read and write text with.
    """
    sources = [folder] if folder else [examples() / name for name in MODELS]
    chapters = [_chapter(out, source, quantize) for source in sources]
    write_page(page, chapters, "make demo" if folder is None else f"wasat demo --folder {folder}")
    out.rule("The page")
    _print(out, f"{page}: open it in a browser; it needs no network")


def examples() -> Path:
    """The folder examples/ of the repository."""
    import wasat.ir

    for base in (Path(wasat.ir.__file__).resolve().parent.parent, Path.cwd()):
        if (base / "examples" / "media" / "questions.json").exists():
            return base / "examples"
    raise FileNotFoundError("examples/ is not here: run the demo in a clone of the repository")


def _chapter(out: Console, source: Path, quantize: str | None) -> Chapter:
    program = driver.load_program(source)
    if not program.origin.tokenizer:
        raise WasatError(f"{source} brings no tokenizer (tokenizer.json): there would be no text to show")
    scheme = quantize or ("int8" if program.interface.media else "int4")
    c = Chapter(program.interface.name, source, scheme)
    out.rule(f"{escape(c.name)}: a folder becomes graphs")
    _show_graphs(out, program, c)
    with tempfile.TemporaryDirectory() as tmp:
        artifact = Path(tmp) / "model.wasat"
        _compile(out, program, artifact, c)
        model = load(artifact)
        if model.manifest.interface.media is not None:
            _answer(out, model, c)
        else:
            _write(out, model, c)
            _race(out, model, c)
            _compare(out, program, model, c)
    optimized, report = driver.optimize(program, quantize=_or_none(scheme))
    _show_passes(out, optimized, report, c)
    return c


def _show_graphs(out: Console, program: Program, c: Chapter) -> None:
    params = {name: v for g in program.graphs.values() for name, v in g.params.items()}
    size = sum(int(np.prod(v.shape)) for v in params.values())
    c.facts["parameters"] = f"{size / 1e6:.1f} M"
    table = Table("graph", "takes", "gives", "nodes", box=None)
    for g in program.graphs.values():
        takes = ", ".join(f"{v.name}: {v.type}" for v in g.inputs)
        gives = ", ".join(f"{n}: {v.type}" for n, v in zip(g.output_names, g.outputs))
        c.graphs.append((g.name, takes, gives, len(g)))
        table.add_row(*map(escape, (g.name, takes, gives, str(len(g)))))
    _print(out, f"{c.folder}: {c.facts['parameters']} parameters")
    out.print(table)
    c.before = _panel(out, _around(program["forward"], "softmax", before=4, after=2), "attention as it is declared")


def _compile(out: Console, program: Program, artifact: Path, c: Chapter) -> None:
    started = time.perf_counter()
    with out.status("compiling") as status:

        def tell(stage: str, done: int = 0, total: int = 0) -> None:
            status.update(stage)

        driver.compile(program, artifact, quantize=_or_none(c.quantize), progress=tell)
    c.facts["compiled in"] = f"{time.perf_counter() - started:.1f} s"
    c.files = sorted(((f.name, f.stat().st_size) for f in artifact.iterdir()), key=lambda f: -f[1])
    c.facts |= {"weights": c.quantize, "artifact": f"{sum(size for _, size in c.files) / 1e6:.1f} MB"}
    _print(out, f"compiled with TVM in {c.facts['compiled in']}, weights in {c.quantize}; the artifact:")
    for name, size in c.files:
        _print(out, f"  {size / 1e6:6.2f} MB  {name}")


def _answer(out: Console, model: Model, c: Chapter) -> None:
    """The questions of examples/media, whose files no training has seen; then the same without what there is to see or hear."""
    out.rule(f"{escape(c.name)}: it answers from files in examples/media")
    folder = examples() / "media"
    every = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    assert model.manifest.interface.media is not None
    takes = model.manifest.interface.media.kinds
    questions = [q for q in every if all(open_media(folder / name).kind in takes for name in q["media"])]
    if skipped := [q["title"] for q in every if q not in questions]:
        _print(out, f"the model takes text, {', '.join(takes)}: not asked are {', '.join(skipped)}")
    for _ in range(2):  # the first round brings memory and threads up
        c.cards = []
        for q in questions:
            media, ask = tuple(folder / name for name in q["media"]), q["question"]
            started = time.perf_counter()
            answer = _said(model, [*media, ask])
            seconds = time.perf_counter() - started
            blind = _said(model, [*(_emptied(open_media(p)) for p in media), ask]) if media else None
            c.cards.append(Card(q["title"], media, ask, q["answer"], answer, seconds, blind))
    table = Table("file", "question", "answer", "", "ms", "without the medium", box=None)
    for card in c.cards:
        verdict = "[green]right[/]" if card.right else f"[red]wrong[/], it is {escape(card.expected)}"
        told = (", ".join(p.name for p in card.media), card.question, card.answer)
        table.add_row(*map(escape, told), verdict, f"{card.seconds * 1e3:.0f}", escape(card.without or ""))
    out.print(table)
    c.facts["right"] = f"{sum(card.right for card in c.cards)} of {len(c.cards)}"
    _print(out, f"{c.facts['right']} are right; without the media (black, silent, still): {blind_score(c.cards)}")


def _said(model: Model, prompt: list[str | Path | Media]) -> str:
    (result,) = model.generate([prompt], max_tokens=32)
    return result.text.strip()


def _emptied(media: Media) -> Media:
    """A black picture, silence, a clip that stands still."""
    if isinstance(media, Image):
        return Image(np.zeros_like(media.pixels()))
    if isinstance(media, Audio):
        rate = 8000  # silence has no pitch
        return Audio(np.zeros_like(media.samples(rate)), rate)
    assert isinstance(media, Video)
    frames, times = media.frames()
    return Video(np.repeat(frames[:1], len(frames), axis=0), times.tolist())


def _write(out: Console, model: Model, c: Chapter) -> None:
    out.rule(f"{escape(c.name)}: loaded without the compiler, it writes code")

    def write(_row: int, piece: str) -> None:
        out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)

    options = SamplingOptions(temperature=0.6, top_p=0.9, repetition_penalty=1.1, seed=3)
    for prompt in PROMPTS:
        out.print(prompt, end="", style="bold", markup=False, highlight=False, soft_wrap=True)
        (result,) = model.generate(prompt, max_tokens=60, options=options, stream=write)
        out.print()
        out.print(result.summary(), style="dim", markup=False, highlight=False, soft_wrap=True)
        out.print()
        c.texts.append((prompt, result.text, result.summary()))


def _race(out: Console, model: Model, c: Chapter) -> None:
    """Speed at a length where it can be told; the first run brings memory and threads up."""
    tokens = _text(model, 512)
    for _ in range(2):
        (result,) = model.generate([tokens], max_tokens=65)
    c.facts["prefill"] = f"{len(tokens) / result.prefill_seconds:,.0f} tokens/s"
    _print(out, f"prefill {c.facts['prefill']} ({len(tokens)} at once)")
    if result.steps:
        c.facts["decode"] = f"{result.steps / result.decode_seconds:,.0f} tokens/s"
        _print(out, f"decode  {c.facts['decode']} ({result.steps}, one by one)")


def _compare(out: Console, program: Program, model: Model, c: Chapter) -> None:
    """How likely the artifact finds a text, beside what the f32 reference (the NumPy interpreter) finds."""
    tokens = _text(model, 256)
    reference = np.asarray(driver.run(program, tokens=np.array([tokens]))["logits"])[0]
    session = model.session()
    logits = np.array([session.step([[t]])[0] for t in tokens])
    before, after = (float(-log_softmax(x)[np.arange(len(tokens) - 1), tokens[1:]].mean()) for x in (reference, logits))
    c.facts["loss beside f32"] = f"{after / before - 1:+.2%}"
    _print(out, f"nats per token over {len(tokens)} tokens of Python, f32 → {c.quantize}: {before:.4f} → {after:.4f}")


def _text(model: Model, most: int) -> list[int]:
    """Up to ``most`` tokens of Python that the model was not trained on: the driver's."""
    context = model.manifest.interface.context or most
    return model.tokenizer.encode(Path(driver.__file__).read_text())[: min(most, context // 2)]


def _show_passes(out: Console, optimized: Program, report: Report, c: Chapter) -> None:
    out.rule(f"{escape(c.name)}: what the passes did")
    table = Table("pass", "nodes", "what it did", box=None)
    for step in report.steps:
        did = [r.message for r in step.remarks if r.kind == "applied"]
        if did:
            total = next((m for m in did if "weights in all: " in m), None)
            count = f"{len(did)} × " if len(did) > 1 else ""
            row = step.name, f"{step.nodes_before} → {step.nodes_after}", total or count + did[0]
            c.passes.append(row)
            table.add_row(*map(escape, row))
    out.print(table)
    missed = report.remarks("missed")
    told = f"; what and why: wasat explain {c.folder} --missed" if missed else ""
    _print(out, f"{len(missed) or 'no'} optimization{'s were' * (len(missed) > 1) or ' was'} missed{told}")
    c.after = _panel(out, _around(optimized["decode"], "cached_attention", before=1, after=1), "the same attention in @decode")
    caches = [
        "full" if s.grows else f"ring of {s.capacity} positions for a window of {s.window}"
        for s in optimized.interface.states
        if s.role == "k"
    ]
    c.facts["caches"] = ", ".join(f"{caches.count(kind)} × {kind}" for kind in dict.fromkeys(caches))
    _print(out, f"caches of keys and values: {c.facts['caches']}")


def _or_none(scheme: str) -> str | None:
    """What the driver has for f32: nothing in fewer bits."""
    return None if scheme == "f32" else scheme


# -- excerpts of graphs ----------------------------------------------------------------------------------------------------
def _around(graph: Graph, op: str, before: int, after: int) -> list[Node]:
    """The first ``op`` with what feeds it and what it feeds, so many steps away; constants aside."""
    first = next((n for n in graph.nodes if n.is_a(op)), None)
    if first is None:
        return []
    near, fed, feeding = {first}, [first], [first]
    for _ in range(before):
        feeding = [v.node for n in feeding for v in n.inputs if v.node is not None]
        near.update(feeding)
    for _ in range(after):
        fed = [user for n in fed for v in n.outputs for user in v.users]
        near.update(fed)
    return [n for n in graph.nodes if n in near and n.outputs[0].const is None]


def _panel(out: Console, nodes: Iterable[Node], title: str) -> str:
    """Shows the nodes' text; returns it, a line each."""
    lines = [node_text(n) for n in nodes]
    folded = [textwrap.fill(line, out.width - 4, subsequent_indent="    ", break_on_hyphens=False) for line in lines]
    if lines:
        out.print(Panel(escape("\n".join(folded)), title=title, border_style="dim"), highlight=False)
    return "\n".join(lines)


def _print(out: Console, text: str) -> None:
    out.print(text, markup=False, highlight=False)
