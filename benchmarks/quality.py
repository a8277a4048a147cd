"""What fewer bits cost: KL divergence, same top token and perplexity beside the model as its file has it.

    python benchmarks/quality.py MODEL [RECIPE ..] [--tokens 1024] [--window 256] [--activation f32] [--out FILE]

MODEL is what ``wasat compile`` takes, with a tokenizer; the text are topics of Python's own documentation
(``pydoc_data.topics``), in windows that do not see each other. A recipe is a scheme and overrides, ``int4,*embed*=int8``;
``stored`` is the weights as they are; a path is another file of the same model: a GGUF file, as llama.cpp makes it, or one that
``wasat quantize`` wrote. Rows are int8, or with ``--activation f32`` as they are. What stands after a number is its standard
error, over blocks of 32 positions. The base computes in f32 on the numbers of the file. Weights of a quantized file are
dequantized first: recipes then may find its grid again, and the table flatters those that resemble it (``shuffled.py``).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from wasat.ir import Program, TensorType

import wasat as ws
from wasat.quality import bits, dense, log_probabilities, quality, text_ids, windows_of

RECIPES = ["f32", "int8", "int4", "int4,*embed*=int8"]


def outputs(
    program: Program, windows: list[np.ndarray], recipe: str, activation: str | None
) -> tuple[float, Iterator[np.ndarray]]:  # fmt: skip
    """Bits of the parameters, and log-probabilities of each window."""
    scheme, *overrides = recipe.split(",")
    plain = scheme in ("base", "stored")
    if Path(scheme).is_file():
        program, plain = ws.load_program(scheme), True
    pairs = dict(o.rsplit("=", 1) for o in overrides)
    options = {} if plain else {"quantize": scheme, "overrides": pairs}
    small, _ = ws.optimize(program, activation=None if scheme == "base" else activation, kv_cache=False, **options)
    return bits(small), log_probabilities(small, windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--activation", choices=["int8", "f32"], default="int8")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    stored = ws.load_program(a.model)
    ids = text_ids(stored, "\n\n".join(topics[k] for k in sorted(topics)[:40]))[: a.tokens]
    windows = windows_of(ids, a.window)
    activation = None if a.activation == "f32" else a.activation
    base_program = dense(stored)
    count = sum(float(np.prod(p.type.concrete({}))) for p in base_program.params.values() if isinstance(p.type, TensorType))
    base = [x.astype(np.float32) for x in outputs(base_program, windows, "base", None)[1]]
    rows = []
    print(f"{'recipe':30} {'bits':>6} {'KL':>9} {'±':>8} {'same top':>9} {'perplexity':>11} {'rise':>7} {'±':>6}")
    for recipe in ["base", *a.recipes]:
        size, found = outputs(stored if recipe == "stored" else base_program, windows, recipe, activation)
        recipe = Path(recipe).name
        q = quality(base, found, windows)
        rows.append({"recipe": recipe, "bits": size / count, **asdict(q)})
        rise = 100 * (q.perplexity / q.base_perplexity - 1)
        errors = [math.nan if e is None else e for e in (q.kl_error, q.loss_error)]
        print(
            f"{recipe:30} {size / count:6.2f} {q.kl:9.5f} {errors[0]:8.5f} {q.same_top:9.3f} {q.perplexity:11.3f} {rise:6.2f}% "
            f"{100 * errors[1]:5.2f}%", flush=True,
        )  # fmt: skip
    if a.out:
        about = {
            "model": Path(a.model).name, "tokens": len(ids), "window": a.window, "activation": a.activation,
            "python": platform.python_version(),
        }  # fmt: skip
        a.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
