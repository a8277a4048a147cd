"""A language model of one full and one sliding-window layer, and its meaning one token at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from wasat.ir import (
    ArrayParam,
    Builder,
    DType,
    Generation,
    Graph,
    Interface,
    Program,
    State,
    TensorType,
    evaluate,
    symbol,
    type_of,
)
from wasat.runtime.artifact import digest

HEADS, WIDTH = 2, 8
WINDOW, CHUNK, RING, CONTEXT = 4, 8, 16, 608
EOS, BOS, VOCAB = 256, 257, 259  # one token per byte; 258 is in no text
STATES = ("full.k", "full.v", "ring.k", "ring.v")


def _graph(name: str) -> Graph:
    """``prefill`` or ``decode``, as the KV-cache derivation writes them."""
    g = Graph(name)
    b = Builder(g)
    rows, new = symbol("b"), symbol("s") if name == "prefill" else 1
    tokens = g.add_input("tokens", TensorType(DType.I64, (rows, new)))
    past = g.add_input("past", TensorType(DType.I64, (rows,)))
    last = g.add_input("last", TensorType(DType.I64, (rows,))) if name == "prefill" else None
    capacity = {"full": symbol("c"), "ring": RING}
    caches = {s: g.add_input(s, TensorType(DType.F32, (rows, capacity[s[:4]], 1, WIDTH))) for s in STATES}

    def weight(path: str, *shape: int) -> Any:
        return g.add_param(path, TensorType(DType.F32, shape))

    x = b.embedding(weight("embed", VOCAB, HEADS * WIDTH), tokens, dtype="f32")
    for layer in ("full", "ring"):
        q, k, v = (
            b.reshape(b.linear(x, weight(f"{layer}.{part}", h * WIDTH, HEADS * WIDTH)), shape=(rows, new, h, WIDTH))
            for part, h in (("q", HEADS), ("k", 1), ("v", 1))
        )
        keys, values = f"{layer}.k", f"{layer}.v"
        out, caches[keys], caches[values] = b.cached_attention(
            q, k, v, caches[keys], caches[values], past, scale=0.7, window=WINDOW if layer == "ring" else None,
            ring=layer == "ring",
        )  # fmt: skip
        x = b.add(x, b.linear(b.reshape(out, shape=(rows, new, HEADS * WIDTH)), weight(f"{layer}.o", *(HEADS * WIDTH,) * 2)))
    if last is not None:
        x = b.take_row(x, last)
    logits = b.linear(b.reshape(x, shape=(rows, HEADS * WIDTH)), weight("head", VOCAB, HEADS * WIDTH))
    g.set_outputs([logits, *caches.values()], ["logits", *caches])
    return g


def _norm() -> Graph:
    """An entry without caches: two inputs, two outputs."""
    g = Graph("sum")
    b = Builder(g)
    x, y = (g.add_input(n, TensorType(DType.F32, (symbol("n"), 3))) for n in "xy")
    g.set_outputs([b.add(x, y), b.mul(x, 2.0)], ["total", "twice"])
    return g


def tiny_program() -> Program:
    """``prefill``, ``decode`` and ``sum`` with random weights."""
    graphs = {g.name: g for g in (_graph("prefill"), _graph("decode"), _norm())}
    rng = np.random.default_rng(5)
    arrays = {
        k: (rng.standard_normal(v.type.concrete({})) * 0.3).astype(np.float32) for k, v in graphs["prefill"].params.items()
    }
    states = tuple(State.full(s, s[-1]) if s.startswith("full") else State.ring(s, RING, WINDOW, s[-1]) for s in STATES)
    interface = Interface(
        "tiny", context=CONTEXT, chunk=CHUNK, vocab=VOCAB, generation=Generation(BOS, (EOS,)), states=states
    )
    return Program(graphs, {k: ArrayParam(x, type_of(x)) for k, x in arrays.items()}, interface)


def edit_manifest(folder: Path, path: str, value: Any) -> None:
    """Sets the field ``path`` (``limits.context``; % for a dot in a name); ``...`` as the value removes it. The digest is made
    anew."""
    data = json.loads((folder / "manifest.json").read_text())
    *outer, last = (key.replace("%", ".") for key in path.split("."))
    at = data
    for key in outer:
        at = at[int(key) if isinstance(at, list) else key]
    key: Any = int(last) if isinstance(at, list) else last
    if value is ...:
        del at[key]
    else:
        at[key] = value
    (folder / "manifest.json").write_text(json.dumps({**data, "digest": digest(data)}))


class Reference:
    """One row, token by token, on the interpreter."""

    def __init__(self, program: Program) -> None:
        self._decode = program["decode"]
        self._params = {k: p.load() for k, p in program.params.items()}
        self._states = {s: np.zeros((1, CONTEXT if s.startswith("full") else RING, 1, WIDTH), np.float32) for s in STATES}
        self.length = 0

    def feed(self, tokens: list[int]) -> Iterator[np.ndarray]:
        """The logits after each of ``tokens``."""
        for t in tokens:
            inputs = {"tokens": np.array([[t]]), "past": np.array([self.length]), **self._states}
            logits, *states = evaluate(self._decode, inputs, self._params)
            self._states = dict(zip(STATES, states))
            self.length += 1
            yield logits[0]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The ``count`` likeliest tokens after ``prompt``, whatever they are."""
        *_, logits = self.feed(prompt)
        out = [int(logits.argmax())]
        while len(out) < count:
            (logits,) = self.feed(out[-1:])
            out.append(int(logits.argmax()))
        return out
