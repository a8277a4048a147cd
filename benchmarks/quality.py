"""What fewer bits cost: KL divergence, same top token and perplexity beside the model as its file has it.

    python benchmarks/quality.py MODEL [RECIPE ..] [--tokens 1024] [--window 256] [--out FILE]

MODEL is what ``wasat compile`` takes, with a tokenizer; the text are topics of Python's own documentation
(``pydoc_data.topics``), in windows that do not see each other. A recipe is a scheme and overrides, ``int4,*embed*=int8``;
``stored`` is the weights as they are with rows of int8. The base computes in f32 on the numbers of the file. Weights of a
quantized file are dequantized first: recipes then may find its grid again, and the table flatters those that resemble it.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import ClassVar

import numpy as np
import tokenizers
from wasat.ir import ParamSource, Program, QArray, QTensorType, TensorType

import wasat as ws

RECIPES = ["f32", "int8", "int4", "int4,*embed*=int8"]


@dataclass(frozen=True)
class Dense:
    """A quantized parameter in f32."""

    type: TensorType
    stored: ParamSource

    is_data: ClassVar[bool] = True

    def load(self) -> np.ndarray:
        x = self.stored.load()
        assert isinstance(x, QArray)
        return x.dense()


def dense(program: Program) -> Program:
    """The program with its quantized parameters in f32."""
    out = program.copy()
    graph = out["forward"]
    for node in list(graph.nodes):
        w = node.inputs[0] if node.op.name == "dequantize" else None
        if w is not None and w.param is not None:
            name, t = f"{w.param}|dense", TensorType("f32", w.type.shape)
            out.params[name] = Dense(t, out.params[w.param])
            graph.replace_uses(node.output, graph.add_param(name, t))
            graph.erase(node)
            del graph.params[w.param], out.params[w.param]
    return out


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def bits(program: Program) -> float:
    """Of all parameters that the graph reads."""
    total = 0.0
    for name in program["forward"].params:
        t = program.params[name].type
        rows = float(np.prod([int(d) for d in t.shape[:-1]]))
        total += rows * int(t.row_bits) if isinstance(t, QTensorType) else float(np.prod(t.concrete({}))) * t.dtype.bits
    return total


def outputs(program: Program, windows: list[np.ndarray], recipe: str) -> tuple[float, Iterator[np.ndarray]]:
    """Bits of the parameters, and log-probabilities of each window."""
    scheme, *overrides = recipe.split(",")
    plain = scheme in ("base", "stored")
    pairs = dict(o.rsplit("=", 1) for o in overrides)
    options = {} if plain else {"quantize": scheme, "overrides": pairs}
    small, _ = ws.optimize(program, activation=None if scheme == "base" else "int8", kv_cache=False, **options)
    run = ws.Executable(small)
    return bits(small), (log_softmax(run(tokens=w[None])["logits"][0]) for w in windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    stored = ws.load_program(a.model)
    text = stored.origin.texts.get("tokenizer.json") or Path(stored.origin.tokenizer or "").read_text(encoding="utf-8")
    ids = tokenizers.Tokenizer.from_str(text).encode("\n\n".join(topics[k] for k in sorted(topics)[:40])).ids[: a.tokens]
    windows = [np.array(ids[i : i + a.window]) for i in range(0, len(ids) - 1, a.window)]
    base_program = dense(stored)
    count = sum(float(np.prod(p.type.concrete({}))) for p in base_program.params.values() if isinstance(p.type, TensorType))
    base = [x.astype(np.float32) for x in outputs(base_program, windows, "base")[1]]
    rows = []
    print(f"{'recipe':24} {'bits':>6} {'KL':>9} {'same top':>9} {'perplexity':>11}")
    for recipe in ["base", *a.recipes]:
        size, found = outputs(stored if recipe == "stored" else base_program, windows, recipe)
        kl, same, loss = [], [], []
        for w, b, x in zip(windows, base, found):
            kl.append((np.exp(b, dtype=np.float64) * (b - x)).sum(-1))
            same.append(b.argmax(-1) == x.argmax(-1))
            loss.append(-x[np.arange(len(w) - 1), w[1:]])
        row = {
            "recipe": recipe, "bits": size / count, "kl": float(np.concatenate(kl).mean()),
            "same_top": float(np.concatenate(same).mean()), "perplexity": float(np.exp(np.concatenate(loss).mean())),
        }  # fmt: skip
        rows.append(row)
        print(f"{recipe:24} {row['bits']:6.2f} {row['kl']:9.5f} {row['same_top']:9.3f} {row['perplexity']:11.3f}", flush=True)
    if a.out:
        about = {"model": Path(a.model).name, "tokens": len(ids), "window": a.window, "python": platform.python_version()}
        a.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
