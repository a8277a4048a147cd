"""``wasat compare``: two sides of one model, value by value and over a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from wasat.cli.console import Bar, Override, Passes, Refusal, array_file, out, overrides_of, say, sizes_of, text_file


def compare(
    a: Annotated[str, typer.Argument(help="A model, or `MODEL@WORDS`.", show_default=False)],
    b: Annotated[str, typer.Argument(help="Another one, or words for what is done to the first.", show_default=False)],
    text: Annotated[
        Path | None, typer.Option(help="A text to read: KL divergence, same top token, perplexity.", show_default=False)
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Over the text, a larger divergence (in nats) is a difference.", show_default=False)
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--input", help="`NAME=FILE`, `.npy` or `.npz`: an input; default: random numbers.", show_default=False),
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option("--size", help="`NAME=N`: a symbolic size of random inputs; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many random tokens a language model is given.", min=1)] = 16,
    window: Annotated[int, typer.Option(help="The text is read in windows of so many tokens.", min=2)] = 256,
    served: Annotated[
        bool, typer.Option("--served", help="Also prefill and decode, which a session calls; of an artifact always.")
    ] = False,
    override: Override = None,
    passes: Passes = "default",
    seed: Annotated[int, typer.Option(help="Of random inputs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Everything found, as JSON.")] = False,
) -> None:
    """Say where two ways to compute one model part: the first value that differs though both were fed the same.

    A side is a model (a folder, a GGUF or ONNX file, graph text) as the interpreter runs it, or `MODEL@WORDS`; of the second,
    words alone are for the first one's model. Words, joined by `+`, are

    - a target: `cpu`, `webgpu`, …: after the passes, compiled
    - `after:PASS`, `before:PASS`, `after:PIPELINE`: as passes leave it
    - a scheme: `int8`, `int4,*embed*=int8`: weights in fewer bits
    - `onnxruntime`: on the ONNX file itself, or on our export
    - `transformers` (a Hugging Face folder), `llama.cpp` (a GGUF file)

    An artifact's folder is a side beside the model that it was compiled of: its prefill and decode, and over a text. Logits in
    a `.npy` file are one over a text.

    Each node is computed on both sides from the same operands, so an error is named where it is made, and not in what
    follows. Each element is held to what the roundings of its own sums allow, not to a tolerance. NaN, infinities and
    numbers beyond f16 are named where they first appear. The exit status is 1 where the sides differ.

    Examples:

    - `wasat compare examples/pygemma cpu` — is the compiled code right?
    - `wasat compare examples/pygemma after:fuse-attention` — are the passes, up to this one?
    - `wasat compare examples/pygemma int4 --text examples/own_model.py --max-kl 0.05` — what do four bits cost?
    - `wasat compare pygemma.onnx onnxruntime` — the file that `wasat export` wrote, beside its peer
    - `wasat compare examples/pygemma cpu --served` — and with caches?
    - `wasat compare examples/pygemma pygemma.wasat` — does the artifact say what the model says?
    - `wasat compare examples/pygemma exact.wasat --text examples/own_model.py` — an artifact beside what it is of
    """
    from wasat.comparison import compare as compared

    arrays = {}
    for item in given or ():
        name, _, file = item.partition("=")
        if not name or Path(file).suffix not in (".npy", ".npz"):
            raise Refusal(f"--input {item!r}: write NAME=FILE, an array (.npy, .npz)")
        arrays[name] = array_file(item, name, Path(file))
    options = {"overrides": pairs} if (pairs := overrides_of(override)) else {}
    with Bar() as bar:
        bar("reading the model")
        found = compared(
            a, b, inputs=arrays or None, text=None if text is None else text_file(text), sizes=sizes_of(size),
            tokens=tokens, window=window, max_kl=max_kl, seed=seed, served=served, progress=bar, passes=passes,
            **options,
        )  # fmt: skip
    if as_json:
        out.print_json(json.dumps(found.to_json()))
    else:
        for line in str(found).split("\n"):
            say(line)
    if not found.ok:
        raise typer.Exit(1)


__all__ = ["compare"]
