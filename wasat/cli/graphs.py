"""``wasat show``, ``plan`` and ``explain``: what a model's graphs are, what they will take, and what passes make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wasat.cli.console import (
    Activation,
    Override,
    Passes,
    Quantize,
    Refusal,
    Source,
    or_none,
    overrides_of,
    say,
    sizes_of,
    warn_of_weights,
)


def show(
    source: Source,
    before: Annotated[str | None, typer.Option(help="Print the graphs as they enter this pass.")] = None,
    after: Annotated[str | None, typer.Option(help="Print the graphs as they leave this pass; `all`: after the last.")] = None,
    graph: Annotated[str | None, typer.Option(help="Only this graph, e.g. `decode`.")] = None,
    quantize: Quantize = "f32",
    override: Override = None,
    activation: Activation = "int8",
    passes: Passes = "default",
    locs: Annotated[bool, typer.Option("--locs", help="Note at every line where it was written.")] = False,
) -> None:
    """Print a model's graphs as text: as declared, or before or after any pass. A pass that runs twice prints twice.

    Examples:

    - `wasat show examples/pygemma --locs`
    - `wasat show examples/pygemma --after fuse-attention`
    - `wasat show examples/pygemma --quantize int4 --after all --graph decode`
    """
    from wasat import driver
    from wasat.ir import Program, graph_text

    def render(p: Program) -> str:
        if graph is not None and graph not in p.graphs:
            raise Refusal(f"there is no graph {graph!r} here; there are {', '.join(p.graphs)}")
        return "\n".join(graph_text(g, locs=locs) for name, g in p.graphs.items() if graph in (None, name))

    program = driver.load_program(source)
    if before is None and after is None:
        return print(render(program), end="")
    seen: dict[str, None] = {}
    shown = []

    def dump(name: str, when: str, p: Program) -> None:
        seen[name] = None
        if (when, name) in (("before", before), ("after", after)):
            shown.append(render(p))

    result, _ = driver.optimize(
        program, quantize=or_none(quantize), overrides=overrides_of(override), activation=or_none(activation), passes=passes,
        dump=dump,
    )
    if after == "all":
        shown.append(render(result))
    unknown = [name for name in (before, after) if name not in (None, *seen) and (name, after) != ("all", "all")]
    if unknown:
        raise Refusal(f"there is no pass {unknown[0]!r}; in order they are: {', '.join(seen)}")
    print("\n".join(shown), end="")


def plan(
    source: Annotated[
        Path,
        typer.Argument(
            help="A model folder, an ONNX file, a `config.json` alone, or a preset: `gemini-4b`, …", show_default=False
        ),
    ],
    batch: Annotated[int, typer.Option(help="Rows that are continued at once.", min=1)] = 1,
    context: Annotated[int | None, typer.Option(help="Positions of each row; default: the model's limit.")] = None,
    chunk: Annotated[int, typer.Option(help="Most prompt tokens per call.", min=1)] = 512,
    size: Annotated[
        list[str] | None,
        typer.Option(help="`NAME=N` or `ENTRY.NAME=N`: what a symbol of the graphs is, e.g. `h=1080`; repeatable."),
    ] = None,
    target: Annotated[str, typer.Option(help="`cpu` (this machine), `cpu:znver3`, …")] = "cpu",
    cache: Annotated[str, typer.Option(help="How keys and values are stored: `f32`, `f16`, `int8` or `int4`.")] = "f32",
    activation: Activation = "int8",
) -> None:
    """Say what a model will take, without allocating it: parameters, weights in each scheme, caches, activations, operations.

    Activations and operations are those of weights in f32; a multiply-add is two operations. Media are of the sizes that the
    model brings them to, one of each kind. Where the target has tensor cores, it says which products of many rows and which
    attentions run there.

    Examples:

    - `wasat plan examples/pygemma --batch 8 --context 1024`
    - `wasat plan gemini-27b --context 8192`
    - `wasat plan examples/gemini --size encode_image.h=1080 --size encode_image.w=1920`
    """
    from wasat import driver
    from wasat.plan import plan as planned

    program, sizes = driver.described(source, context), sizes_of(size)
    options: dict[str, Any] = {"cache": cache, "activation": or_none(activation), "sizes": sizes}
    say(planned(program, target=target, batch=batch, context=context, chunk=chunk, **options).text())


def explain(
    source: Source,
    quantize: Quantize = "f32",
    override: Override = None,
    activation: Activation = "int8",
    passes: Passes = "default",
    target: Annotated[str, typer.Option(help="The target whose kernels are asked; see `wasat targets`.")] = "cpu",
    missed: Annotated[bool, typer.Option("--missed", help="Only what was missed.")] = False,
) -> None:
    """Say what every pass did, and for each optimization that was lost, why and at which line of the model; and which
    operations no kernel of the target takes.

    Examples:

    - `wasat explain examples/pygemma --quantize int4`
    - `wasat explain examples/pygemma --missed`
    """
    from wasat import driver

    program = driver.load_program(source)
    report = driver.explained(
        program, target, quantize=or_none(quantize), overrides=overrides_of(override), activation=or_none(activation),
        passes=passes,
    )  # fmt: skip
    warn_of_weights(report, quantize)
    print(report.explain(only="missed" if missed else None))
