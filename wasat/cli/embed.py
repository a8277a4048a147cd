"""``wasat embed``: embeddings of texts, or a reranker's scores, into a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wasat.cli.console import Refusal, say, text_file

if TYPE_CHECKING:
    import numpy as np

_SUFFIXES = (".npy", ".jsonl")


def embed(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder made by `wasat compile`.", show_default=False)],
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; of a reranker a query, then documents; `-`: lines of standard input.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A file of texts: a text a line, or `.jsonl`, a JSON string a line.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", show_default=False,
            help="`.npy`: an array, a row for each text; `.jsonl`: a line for each. Default: lines of JSON to standard output.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What comes before each text: a prompt's name, or itself.", show_default=False)
    ] = None,
    rerank: Annotated[
        bool, typer.Option("--rerank", help="Score documents by a language model that answers yes or no (Qwen3-Reranker).")
    ] = False,
    instruct: Annotated[
        str | None, typer.Option(help="With `--rerank`: what is looked for.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Most texts of one call.", min=1)] = 32,
) -> None:
    """Embed texts, or score documents for a query, with a model that was made for that.

    A line of JSON is `{"text": …, "embedding": [ … ]}`, or `{"text": …, "score": … }`, in the order of the texts.

    Examples:

    - `wasat embed minilm.wasat "a text" "another" -o embeddings.npy`
    - `wasat embed qwen3-embedding.wasat --file questions.txt --prompt query -o questions.jsonl`
    - `wasat embed reranker.wasat "where do cats sleep?" --file passages.txt -o scores.jsonl`
    - `wasat embed qwen3-reranker.wasat --rerank "where do cats sleep?" --file passages.txt`
    """
    from wasat import runtime

    if output is not None and output.suffix not in _SUFFIXES:
        raise Refusal(f"--output {output}: write {' or '.join(_SUFFIXES)}")
    given = [x for t in texts or () for x in (_split(sys.stdin.read()) if t == "-" else [t])]
    given += _texts(file) if file is not None else []
    model = runtime.load(artifact)
    spec = model.manifest.interface.embedder
    pairs = rerank or (spec is not None and spec.pairs)
    if instruct is not None and not rerank:
        raise Refusal("--instruct goes with --rerank")
    if pairs:
        if prompt is not None:
            raise Refusal("--prompt: a reranker has none")
        query, given = given[:1], given[1:]
        found, what = model.rerank(query[0] if query else "", given, instruct=instruct, batch=batch), "score"
    else:
        found, what = model.embed(given, prompt=prompt, batch=batch), "embedding"
    if not given:
        raise Refusal(f"give texts, or --file{': a query, and documents' if pairs else ''}")
    if output is None:
        for line in _lines(given, found, what):
            print(line)
        return
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        _write(part, output.suffix, given, found, what)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    say(f"{output}: {len(given)} texts, {'×'.join(map(str, found.shape))}")


def _split(text: str) -> list[str]:
    """Lines as files have them: str.splitlines cuts a text at other characters, too."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _texts(file: Path) -> list[str]:
    lines = _split(text_file(file))
    if file.suffix != ".jsonl":
        return lines
    found = []
    for i, line in enumerate(lines, 1):
        try:
            text = json.loads(line)
        except (ValueError, RecursionError):
            text = None
        text = text.get("text") if isinstance(text, dict) else text
        if not isinstance(text, str):
            raise Refusal(f"{file}:{i}: a line is a JSON string, or an object with a text")
        found.append(text)
    return found


def _lines(texts: Sequence[str], found: np.ndarray, what: str) -> Iterator[str]:
    for text, row in zip(texts, found.tolist()):
        yield json.dumps({"text": text, what: row}, ensure_ascii=False)


def _write(path: Path, suffix: str, texts: Sequence[str], found: np.ndarray, what: str) -> None:
    import numpy as np

    if suffix == ".npy":
        with open(path, "xb") as f:
            np.save(f, found)
    else:
        path.write_text("".join(f"{line}\n" for line in _lines(texts, found, what)), encoding="utf-8")


__all__ = ["embed"]
