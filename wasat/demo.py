"""The demonstration behind ``make demo``: one small trained model through every room of the house."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from wasat import driver
from wasat.ir import Graph, Program, node_text

PROMPTS = ("def read_file(path):\n    ", "class Stack:\n    def __init__(self", "import os\nimport sys\n\n")


def example_model() -> Path:
    """The folder of the small Gemma-3-architecture model that comes with the repository."""
    import wasat.ir

    for base in (Path(wasat.ir.__file__).resolve().parent.parent, Path.cwd()):
        if (base / "examples" / "pygemma" / "config.json").exists():
            return base / "examples" / "pygemma"
    raise FileNotFoundError("examples/pygemma is not here: run the demo from a clone of the repository, or name a folder")


def _excerpt(graph: Graph, around: str, width: int = 150) -> str:
    """The lines about the first ``around`` node: enough to see what the graph looks like."""
    nodes = [n for n in graph.nodes if n.op.name != "constant" or n.outputs[0].shape]
    first = next((i for i, n in enumerate(nodes) if n.op.name == around), 0)
    lines = [node_text(n) for n in nodes[max(0, first - 4) : first + 3]]
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in lines)


def main(out: Console, folder: Path | None = None, quantize: str | None = "int4") -> None:
    """Runs the demonstration, writing to ``out``."""
    source = folder or example_model()
    program = driver.load_program(source)
    forward = program["forward"]
    out.rule(f"1. {escape(str(source.name))}: a Hugging Face folder becomes a graph")
    size = sum(int(np.prod(v.shape)) for v in forward.params.values())
    out.print(f"{len(forward.params)} tensors, {size / 1e6:.1f} M parameters; {len(forward)} nodes, {forward.count('softmax')} softmax:")
    out.print(Panel(escape(_excerpt(forward, "softmax")), title="attention as it was written", border_style="dim"))

    out.rule("2. Passes")
    optimized, report = driver.optimize(program, quantize=quantize)
    table = Table("pass", "ms", "nodes", "what it did", box=None, header_style="bold")
    for step in report.steps:
        did = [r.message for r in step.remarks if r.kind == "applied"]
        missed = [r.message for r in step.remarks if r.kind == "missed"]
        text = f"{len(did)}: {did[0]}" if did else ""
        if missed:
            text += f"[red]  missed {len(missed)}: {escape(missed[0])}[/]"
        table.add_row(step.name, f"{step.seconds * 1e3:.0f}", f"{step.nodes_before} → {step.nodes_after}", escape(text[:110]))
    out.print(table)
    decode = optimized["decode"]
    out.print(Panel(escape(_excerpt(decode, "cached_attention")), title="the same attention in @decode", border_style="dim"))
    for s in optimized.metadata["states"][:2]:
        out.print(f"  {s['name']}: {s['kind']} cache" + (f" of {s['capacity']} positions, window {s['window']}" if s["capacity"] else ""))

    out.rule(f"3. Compiled with TVM, weights {quantize or 'f32'}")
    with tempfile.TemporaryDirectory() as tmp:
        artifact = Path(tmp) / "model.wasat"
        started = time.perf_counter()
        with out.status("compiling"):
            driver.compile(program, artifact, quantize=quantize)
        seconds = time.perf_counter() - started
        files = {f.name: f.stat().st_size for f in artifact.iterdir()}
        out.print(f"{seconds:.1f} s; " + ", ".join(f"{n} {s / 1e6:.2f} MB" for n, s in sorted(files.items(), key=lambda x: -x[1])))
        _talk(out, artifact, source)
        _compare(out, program, optimized, artifact, source)


def _talk(out: Console, artifact: Path, source: Path) -> None:
    from wasat import runtime

    out.rule("4. Loaded without the compiler, writing code")
    model = runtime.load(artifact)
    for prompt in PROMPTS:
        (result,) = model.generate([prompt], max_tokens=60)
        out.print(Panel(f"[bold]{escape(prompt)}[/]{escape(result.text)}", border_style="green", subtitle=result.summary()))


def _compare(out: Console, program: Program, optimized: Program, artifact: Path, source: Path) -> None:
    """Next-token log-probabilities of the artifact beside the f32 reference's, over one text."""
    from wasat import runtime

    out.rule("5. Against the f32 reference (the NumPy interpreter)")
    model = runtime.load(artifact)
    text = Path(driver.__file__).read_text()[:600]
    tokens = model.tokenizer.encode(text)[:128]
    reference = np.asarray(driver.run(program, "forward", tokens=np.array([tokens]))["logits"])[0]
    session = model.session()
    got = []
    for t in tokens:
        got.append(session.step(np.array([[t]]))[0])
    a, b = _log_softmax(reference), _log_softmax(np.array(got))
    nll = [float(-x[np.arange(len(tokens) - 1), tokens[1:]].mean()) for x in (a, b)]
    agree = float((a.argmax(-1) == b.argmax(-1)).mean())
    kl = float((np.exp(a) * (a - b)).sum(-1).mean())
    out.print(
        f"{len(tokens)} tokens: nats per token {nll[0]:.4f} → {nll[1]:.4f} ({(nll[1] / nll[0] - 1) * 100:+.2f} %), "
        f"same likeliest token {agree:.1%}, mean KL divergence {kl:.5f} nats"
    )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))
