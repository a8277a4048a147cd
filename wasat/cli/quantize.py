"""``wasat quantize``: a model's weights in fewer bits, calibrated on a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from wasat.cli.console import Bar, Refusal, Source, say, text_file


def quantize(
    source: Source,
    data: Annotated[
        list[Path], typer.Option(help="A text like those that the model will read; repeatable.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write, for `wasat compile`.", show_default=False)
    ],
    bits: Annotated[
        float | None,
        typer.Option(
            help="Of a weight on average: tables, heads, norms and scales counted. Default: 5.", show_default=False
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(help="`auto` chooses a scheme for each weight by what its errors do; or one for all: `s5`, `int4`, …"),
    ] = "auto",
    held_out: Annotated[
        Path | None,
        typer.Option(help="A text for the report; default: the last quarter of the data.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="The report as JSON; default: `OUTPUT.json`.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(help="At most so many of the data are read, and a quarter as many held out.")] = 4096,
    window: Annotated[int, typer.Option(help="Texts are read in windows of so many tokens.")] = 256,
    target: Annotated[str, typer.Option(help="Whose kernels must read the weights; see `wasat targets`.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Default: this machine's.", show_default=False)] = None,
) -> None:
    """Store a model's weights in fewer bits, calibrated on a text: scales by what each layer reads there, and bits where a
    measurement says that they are worth most.

    The result is one file with graph, weights and tokenizer, which `wasat compile` takes as it takes any model. The report says
    what it costs on text that it was not calibrated on: KL divergence from f32, same top token, perplexity, and for each layer
    its share. Beside reading the texts it takes a run of the model over 256 tokens for each layer.

    Examples:

    - `wasat quantize examples/pygemma --data examples/own_model.py --data examples/own_pass.py --bits 5 -o pygemma.5bits`
    - `wasat compile pygemma.5bits -o pygemma5.wasat`
    - `wasat quantize examples/pygemma --data examples/own_model.py --held-out examples/own_pass.py --recipe s5 -o pygemma.s5`
    """
    from wasat import driver
    from wasat.calibration import quantize as quantized
    from wasat.saved import save_program

    if not output.parent.is_dir():
        raise Refusal(f"{output.parent} is no folder: {output.name} cannot be written there")

    with Bar() as bar:
        bar("reading the model")
        text, judged = "\n\n".join(map(text_file, data)), None if held_out is None else text_file(held_out)
        small, found = quantized(
            driver.load_program(source), text, bits=bits, recipe=recipe, held_out=judged, tokens=tokens, window=window,
            target=target, threads=threads, progress=bar,
        )  # fmt: skip
        bar("writing")
        save_program(small, output)
    beside = report if report is not None else output.with_name(output.name + ".json")
    beside.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    for line in str(found).split("\n"):
        say(line)
    say(f"{output}: {output.stat().st_size / 1e6:.1f} MB; deploy it: wasat compile {output} -o {output.stem}.compiled")


__all__ = ["quantize"]
