"""A model as a folder of static files that a browser runs: kernels in WGSL, weights in pieces, a tokenizer, a page.

The page and its host are in ``runtime/web``, as they are served: ES modules, no build step.
"""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import wasat.runtime.web as web
from wasat import driver
from wasat.ir import Program
from wasat.passes import Report
from wasat.runtime.artifact import MANIFEST, TOKENIZER, WEIGHTS, write_artifact
from wasat.runtime.dimensions import Extent, parsed
from wasat.runtime.errors import ArtifactError
from wasat.runtime.hosts.elements import stored
from wasat.runtime.hosts.plan import PLAN, SOURCES
from wasat.runtime.manifest import parse_manifest
from wasat.runtime.weights import Weights

FORMAT = 1
SHARD = 32 << 20
"""Bytes of weights in a file: what browsers fetch, check and keep one by one."""


def export_web(
    program: Program, out: str | Path, *, quantize: str | None = None, overrides: Mapping[str, str] | None = None,
    target: str = "webgpu", activation: str | None = "int8", chunk: int = 512, cache: str = "f32", shard: int = SHARD,
    progress: driver.Progress = driver.quiet,
) -> Report:  # fmt: skip
    """Writes ``program`` as the folder ``out``, to be put on any web server; see :func:`wasat.compile` for the options.

    ``target``: ``webgpu``, or ``webgpu:f16`` where GPUs compute in f16; these can keep keys and values so, too (``cache``).
    ``activation``: ``"int8"`` or None; ``"f16"`` and ``"bf16"`` are refused, as no browser ran them.
    ``shard``: most bytes of weights in a file.
    The folder is complete or absent; one that was exported before is replaced. Raises what :func:`wasat.compile` does, and
    ArtifactError where the JavaScript package of tokenizers was not fetched (``python -m wasat.runtime.web.fetch``).
    """
    if target.partition(":")[0] != "webgpu":
        raise ArtifactError(f"browsers run what is compiled for webgpu, not {target}")
    if activation not in (None, "int8"):
        raise ArtifactError(f"pages compute activations in f32 or, beside integers, in int8, not in {activation}: leave it out")
    page = web.files(with_tokenizer=bool(program.origin.tokenizer))
    with tempfile.TemporaryDirectory() as tmp:
        artifact = Path(tmp) / "model.wasat"
        report = driver.compile(
            program, artifact, target=target, quantize=quantize, overrides=overrides, activation=activation, chunk=chunk,
            cache=cache, progress=progress,
        )  # fmt: skip
        raw = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
        manifest = parse_manifest(raw)  # this machine need not have what runs it
        storage = json.loads((artifact / PLAN).read_text(encoding="utf-8"))["storage"]
        shards = _Shards(shard)
        for name, (dtype, x) in Weights(artifact / WEIGHTS, manifest.weights).arrays().items():
            shards.add(name, dtype, x, storage)
        raw["web"] = {
            "format": FORMAT, "weights": shards.index, "shards": [name for name, _ in shards.files],
            "entries": {name: _entry(e) for name, e in raw["entries"].items()},
            "states": [{**s, "shape": [_tree(d) for d in s["shape"]]} for s in raw["states"]],
        }
        files: dict[str, Path | Callable[[Path], None]] = {n: artifact / n for n in (PLAN, SOURCES["webgpu"])}
        if TOKENIZER in manifest.files:
            files[TOKENIZER] = artifact / TOKENIZER
        files |= {name: lambda path, data=data: path.write_bytes(data) for name, data in shards.files}  # type: ignore[misc]
        progress("writing the folder")
        write_artifact(Path(out), raw, {**files, **page})
    return report


class _Shards:
    """Weights as the device stores them, in files of at most so many bytes (one weight alone may be larger)."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.index: list[dict[str, Any]] = []
        self._parts: list[list[np.ndarray]] = []
        self._size = 0

    def add(self, name: str, dtype: str, x: np.ndarray, storage: Mapping[str, str]) -> None:
        data = stored(x, dtype, storage, f"weight {name}")
        if not self._parts or self._size + data.nbytes > self.most:
            self._parts.append([])
            self._size = 0
        self.index.append({
            "name": name, "dtype": dtype, "shape": list(x.shape), "shard": len(self._parts) - 1, "at": self._size,
            "bytes": data.nbytes,
        })  # fmt: skip
        self._parts[-1].append(data)
        self._size += data.nbytes

    @property
    def files(self) -> Iterable[tuple[str, bytes]]:
        """Names and contents."""
        return [(f"weights-{i:04}.bin", b"".join(p.tobytes() for p in parts)) for i, parts in enumerate(self._parts)]


def _entry(e: Mapping[str, Any]) -> dict[str, Any]:
    """The signature of an entry, sizes as trees."""
    specs = {k: [{**x, "shape": [_tree(d) for d in x["shape"]]} for x in e[k]] for k in ("inputs", "outputs")}
    indices = [{**i, "low": _tree(i["low"]), "high": _tree(i["high"])} for i in e["indices"]]
    return {**specs, "indices": indices, "states": e["states"], "weights": e["weights"]}


_OPERATORS: dict[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%"}


def _tree(d: Extent) -> Any:
    """A size as launch plans have them: a number, a symbol, or [operator, size, size]."""
    return d if isinstance(d, int) else _of(parsed(d))


def _of(e: ast.expr) -> Any:
    match e:
        case ast.Constant(value=n):
            return n
        case ast.Name(id=name):
            return name
        case ast.BinOp(left=left, op=op, right=right):
            return [_OPERATORS[type(op)], _of(left), _of(right)]
        case ast.UnaryOp(operand=x):
            return ["-", 0, _of(x)]
        case ast.Call(func=ast.Name(id=name), args=[left, right]):
            return [name, _of(left), _of(right)]
    raise ArtifactError(f"{ast.unparse(e)!r} is no dimension")
