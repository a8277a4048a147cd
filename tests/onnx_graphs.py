"""What the tests of the ONNX export share: one operation as a program, the models of the golden files, a training step."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from wasat.frontend import from_pretrained
from wasat.ir import ArrayParam, Builder, Graph, Op, Program, QArray, Sample, type_of
from wasat.training.losses import add_loss, cross_entropy
from wasat.training.optimizers import AdamW, Cosine
from wasat.training.step import train_step

GOLDEN = Path(__file__).parent / "golden"
HF = sorted(p for p in (GOLDEN / "hf").iterdir() if p.is_dir())
"""Hugging Face folders of tiny decoders."""
ONNX = sorted((GOLDEN / "onnx").glob("*.onnx"))
"""Tiny transformers as torch exports them."""


def graph_of(op: Op, sample: Sample) -> tuple[Program, dict[str, Any]]:
    """A graph of one node; quantized operands are parameters, as in a real program."""
    g = Graph("one")
    values, feeds, params = [], {}, {}
    for i, x in enumerate(sample.inputs):
        array = x if isinstance(x, QArray) else np.asarray(x)
        if isinstance(array, QArray):
            values.append(g.add_param(f"w{i}", type_of(array)))
            params[f"w{i}"] = ArrayParam(array, type_of(array))
        else:
            values.append(g.add_input(f"x{i}", type_of(array)))
            feeds[f"x{i}"] = array
    out = Builder(g).emit(op, *values, **sample.attrs)
    g.set_outputs(list(out) if isinstance(out, tuple) else [out])
    return Program({"one": g}, dict(params)), feeds


@cache
def training_step() -> tuple[Program, dict[str, Any]]:
    """``train_step`` of a tiny Llama (tokens and labels i64[b, s]; loss, gradients, clipping, AdamW), and its states."""
    program = from_pretrained(GOLDEN / "hf" / "llama")
    add_loss(program, lambda b, v: cross_entropy(b, v["logits"], v["labels"]), {"labels": "i64[b, s]"})
    made = train_step(program, optimizer=AdamW(decay=0.1), rate=Cosine(3e-3, warmup=5, steps=20), clip=1.0)
    return made.program, dict(made.states)
