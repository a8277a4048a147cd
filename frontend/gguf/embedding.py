"""GGUF files of models that embed texts, or score pairs of them."""

from __future__ import annotations

from dataclasses import dataclass

from wasat.frontend import nn
from wasat.frontend.weights.gguf import Gguf
from wasat.ir import CheckpointError

from ..models import Fields
from ..sentence import BACKBONES, Scores, Sentence, Step

_HEADS = {"cls": "classifier.dense", "cls.output": "classifier.out_proj"}


@dataclass(frozen=True)
class Model:
    """What is to be traced, and how its parameters are called."""

    family: str
    root: nn.Module
    entry: str
    inputs: dict[str, str]
    prefix: str
    """Of the names of parameters that make hidden states."""
    top: dict[str, str]
    """The names of others, by GGUF's."""


def embedding(g: Gguf, fields: Fields, pooling: str) -> Model:
    """The model of a file: hidden states, pooled and brought to length 1, as llama.cpp gives them, or scores of pairs."""
    kind = fields.take("model_type", str)
    backbone = BACKBONES[kind](fields)
    root: nn.Module
    inputs = {"tokens": "i64[b, s]", "lengths": "i64[b]"}
    if pooling == "rank":
        if kind != "bert" or "cls.weight" not in g.tensors or "cls.output.weight" not in g.tensors:
            raise CheckpointError(
                f"{g.path}: it scores pairs by a head that is not read: those of RoBERTa and its relatives are, which have the "
                "tensors cls.weight and cls.output.weight"
            )
        root = Scores(backbone, "roberta", g.tensors["cls.output.weight"].shape[0], "")
        prefix, top, name = "roberta.", dict(_HEADS), "score"
        if backbone.kinds > 1:
            inputs["types"] = "i64[b, s]"
    else:
        steps, top = [Step("Transformer", "", {}), Step("Pooling", "", {"pooling_mode": pooling})], {}
        for i, part in enumerate((p for p in ("dense_2", "dense_3") if f"{p}.weight" in g.tensors), 2):
            out, width = g.tensors[f"{part}.weight"].shape
            biased = f"{part}.bias" in g.tensors
            act = "torch.nn.modules.linear.Identity"
            more = {"in_features": width, "out_features": out, "bias": biased, "activation_function": act}
            steps.append(Step("Dense", f"{part}", more))
            top[part] = f"{i}.linear"
        root, prefix, name = Sentence(backbone, [*steps, Step("Normalize", "", {})], g.path), "0.", "embed"
    return Model(kind, root, name, inputs, prefix, top)
