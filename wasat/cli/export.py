"""``wasat export``: a model for other runtimes: an ONNX file, a project in C, a page for browsers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from wasat.cli.console import Bar, Override, Quantize, Refusal, Source, or_none, overrides_of, say, warn_of_weights


def export(
    source: Source,
    onnx: Annotated[Path | None, typer.Option("--onnx", help="The `.onnx` file to write.", show_default=False)] = None,
    c: Annotated[
        Path | None, typer.Option("--c", help="The folder to write: the model, compiled, and a host in C.", show_default=False)
    ] = None,
    web: Annotated[
        Path | None, typer.Option("--web", help="The folder to write: a page that runs it in a browser.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Of `--c`, default `cpu`, and `--web`, default `webgpu`; see `wasat targets`.", show_default=False),
    ] = None,
    graph: Annotated[str | None, typer.Option(help="Which graph, e.g. `decode`; default: `forward`, or the only one.")] = None,
    opset: Annotated[int, typer.Option(help="Operator set, 17 or newer; fused operations have operators from 23 on.")] = 24,
    optimized: Annotated[
        bool, typer.Option("--optimized", help="After all passes: fused; `prefill` and `decode` with KV caches.")
    ] = False,
    quantize: Quantize = "f32",
    override: Override = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Of `--web`: how keys and values are stored, `f32` or, with `--target webgpu:f16`, `f16`.",
                     show_default="f32"),
    ] = None,
    activation: Annotated[
        Literal["int8", "f32"] | None,
        typer.Option(help="Of `--web`: where weights are integers, integer dot products, or in f32.", show_default="int8"),
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Of `--web`: most prompt tokens per call.", min=1, show_default="512")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Of `--web`: positions that it is made for; default: the model's limit.", min=1)
    ] = None,
    external_data: Annotated[
        bool | None, typer.Option(help="Parameters in a file beside the model; default: above 1 GiB.", show_default=False)
    ] = None,
    matmul_nbits: Annotated[
        bool, typer.Option("--matmul-nbits", help="Quantized weights as onnxruntime's MatMulNBits, not DequantizeLinear.")
    ] = False,
) -> None:
    """Write a model as an ONNX file, as declared or as the passes leave it (`--quantize` implies `--optimized`); as a project
    in C that runs it without Python, of a model or an artifact; or as a folder of static files that runs it in browsers.

    Examples:

    - `wasat export examples/pygemma --onnx pygemma.onnx`
    - `wasat export examples/pygemma --onnx decode.onnx --graph decode --optimized --quantize int4`
    - `wasat export examples/pygemma --onnx old.onnx --opset 17`
    - `wasat export examples/pygemma --c pygemma.c --quantize int4`
    - `wasat export examples/gemini --web site`, then `python -m http.server --directory site`
    """
    from wasat import driver

    if sum(x is not None for x in (onnx, c, web)) != 1:
        raise Refusal("say what to write: --onnx FILE, --c FOLDER or --web FOLDER")
    if onnx is None and (graph is not None or optimized or external_data is not None or matmul_nbits):
        raise Refusal("--graph, --optimized, --external-data and --matmul-nbits are for ONNX files")
    if onnx is not None and target is not None:
        raise Refusal("--target is for --c and --web: an ONNX file is for any machine")
    if web is None and cache is not None:
        raise Refusal("--cache is for --web; for C, compile an artifact (wasat compile --cache) and export that")
    given = [f"--{n}" for n, x in (("activation", activation), ("chunk", chunk), ("context", context)) if x is not None]
    if web is None and given:
        raise Refusal(f"{given[0]} is for --web; for C, compile an artifact (wasat compile {given[0]}) and export that")
    if web is not None:
        from wasat.web import export_web

        with Bar() as bar:
            made = export_web(
                driver.load_program(source, context=context), web, target=target or "webgpu", quantize=or_none(quantize),
                overrides=overrides_of(override), activation=or_none(activation or "int8"),
                chunk=512 if chunk is None else chunk, cache=cache or "f32", progress=bar,
            )  # fmt: skip
        warn_of_weights(made, quantize)
        size = sum(f.stat().st_size for f in web.iterdir())
        return say(f"{web}: {size / 1e6:.1f} MB; see it: python -m http.server --directory {web}")
    if c is not None:
        with Bar() as bar:
            report = driver.export_c(source, c, target or "cpu", or_none(quantize), overrides_of(override), bar)
        if report is not None:
            warn_of_weights(report, quantize)
        size = sum(f.stat().st_size for f in (c / "artifact").iterdir())
        return say(f"{c}: an artifact of {size / 1e6:.1f} MB and a host in C; how to build it: {c / 'README.md'}")
    assert onnx is not None
    try:
        from wasat.backends.onnx import FORMATS, to_onnx
    except ModuleNotFoundError as e:
        raise Refusal(f"writing ONNX files needs the package {e.name}; pip install 'wasat[onnx]'") from None

    program = driver.load_program(source)
    if optimized or or_none(quantize) is not None:
        caches = None if graph is not None and graph not in program.graphs else False  # a graph that is there stays
        program, report = driver.optimize(
            program, quantize=or_none(quantize), overrides=overrides_of(override), activation=None, kv_cache=caches,
            formats=FORMATS,
        )  # fmt: skip
        warn_of_weights(report, quantize)
    elif override:
        raise Refusal("--override chooses among quantized weights: give --quantize too")
    to_onnx(program, onnx, graph=graph, opset=opset, external_data=external_data, matmul_nbits=matmul_nbits)
    beside = onnx.with_name(onnx.name + ".data")
    size = onnx.stat().st_size + (beside.stat().st_size if beside.exists() else 0)
    say(f"{onnx}: {size / 1e6:.1f} MB, operator set {opset}")
