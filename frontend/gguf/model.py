"""A GGUF file as a program: one of our families, its parameters the file's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from wasat.frontend import nn
from wasat.frontend.weights import store_as
from wasat.frontend.weights.gguf import Gguf, GgufParam, GgufTensor, read_gguf
from wasat.frontend.weights.safetensors import listed
from wasat.ir import CheckpointError, DType, Embedder, Origin, Program, TensorType

from ..chat import template_texts
from ..huggingface import build, served
from ..models import Fields
from ..models.decoder import CausalLM, OffsetNorm, SelfAttention
from ..models.decoder import Names as Checkpoint
from .deepseek import Joined, joined
from .embedding import Model, embedding
from .fused import apart
from .keys import FACTORS
from .metadata import ARCHITECTURES, config_of, pooling_of
from .names import Names
from .tokenizer import special_ids, special_tokens, tokenizer_json

_OF_LAYER = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+(?:\.\w+)?)\.(weight|bias)\Z")
_TEMPLATE = "tokenizer.chat_template"
_OF_TEMPLATE = re.compile(rf"{re.escape(_TEMPLATE)}(\..+)?\Z")
_FREQUENCIES = "rope_freqs.weight"
_RESULTS = {"forward": "logits", "embed": "embedding", "score": "scores"}
_OF_WRITERS = ("output.weight",)
"""Tensors that a model does not need to embed texts."""


def from_gguf(path: str | Path, context: int | None = None) -> Program:
    """The program of a GGUF file: graph ``forward(tokens i64[b, s]) -> logits f32[b, s, vocab]``; of a model that embeds texts
    or scores pairs of them, the entry that :func:`wasat.frontend.from_pretrained` gives such.

    Weights stay in the formats that the file has them in: the graph takes them apart where it reads them, and what is compiled
    computes on them as they are. Parameters are named as in a Hugging Face checkpoint. Of a model that is split into several
    files any may be named. ``interface`` is as of :func:`wasat.frontend.from_pretrained`; ``origin.texts`` has the tokenizer,
    rebuilt, and the chat template.

    ``context`` is as of :func:`wasat.frontend.from_pretrained`.

    Raises ConfigError for an architecture or a key that is not implemented, CheckpointError for files that are damaged or do
    not fit.
    """
    g = apart(read_gguf(path))
    config = config_of(g)
    fields = Fields(config, str(g.path))
    fields.serve(context)
    if (pooling := pooling_of(g)) is not None:
        m = embedding(g, fields, pooling)
    else:
        family, root = build(fields)
        called = root.names if isinstance(root, CausalLM) else Checkpoint()
        m = Model(family, root, "forward", {"tokens": "i64[b, s]"}, f"{called.root}.", {"output": called.head})
    _adjust(m.root, g)
    sources = _sources(g, config, m)
    program = nn.trace(m.root, m.inputs, m.entry, outputs=[_RESULTS[m.entry]])
    given, positions = g.metadata.get("general.name"), served(fields, _context(m, config))
    program.declare(
        name=given if isinstance(given, str) and given else g.path.stem, context=positions,
        vocab=config["vocab_size"],
    )  # fmt: skip
    ids = special_ids(g)
    if m.entry == "forward":
        program.declare(generation=ids)
    else:
        program.declare(embedder=Embedder(m.entry, m.entry == "score", positions, ids.pad or 0))
    program.params.update(sources)
    for name, source in program.params.items():
        store_as(program[m.entry], name, source.type)
    texts = {"tokenizer.json": tokenizer_json(g)}
    templates = {k.removeprefix(_TEMPLATE)[1:] or "default": v for k, v in g.metadata.items() if _OF_TEMPLATE.match(k)}
    texts |= template_texts(g.path, {k: v for k, v in templates.items() if isinstance(v, str)}, special_tokens(g))
    program.origin = Origin(m.family, texts=texts)
    return program


def _context(m: Model, config: Mapping[str, Any]) -> int:
    own = m.root.context if isinstance(m.root, CausalLM) else None
    return own or int(config["max_position_embeddings"])


def _adjust(module: nn.Module, g: Gguf) -> None:
    """What GGUF has otherwise than a checkpoint: norms of Gemma as 1 + w, frequencies of RoPE divided by a tensor, queries,
    keys and values of all heads one after the other."""
    factors = g.tensors.get(_FREQUENCIES)
    for _, part in module.walk():
        if isinstance(part, (nn.RMSNorm, OffsetNorm)):
            part.offset = 0.0
        if isinstance(part, SelfAttention):
            part.order = "parts"
        if isinstance(part, nn.RoPE) and factors is not None:
            if factors.type != (needed := TensorType(DType.F32, part.inv_freq.shape)):
                raise CheckpointError(f"{g.path}: {_FREQUENCIES} is {factors.type}, and would have to be {needed}")
            part.inv_freq = part.inv_freq / np.asarray(factors.load())


def _sources(g: Gguf, config: Mapping[str, Any], m: Model) -> dict[str, GgufParam | Joined]:
    """The tensor of each parameter. All that is missing, left over or misshaped is named at once."""
    arch = g.metadata["general.architecture"]
    wanted = {name: p.type for name, p in m.root.parameters().items()}
    names = ARCHITECTURES[arch].names_of(g.tensors)
    found: dict[str, GgufTensor] = {}
    problems = []
    first = config.get("num_hidden_layers", 0)
    unread = tuple(f"blk.{first + i}." for i in range(config.get("num_nextn_predict_layers", 0)))
    turned = config.get("rope_parameters") or {}
    aside = {
        _FREQUENCIES, *(FACTORS if turned.get("rope_type") == "longrope" else ()),
        *(_OF_WRITERS if m.entry != "forward" else ()),
    }  # fmt: skip
    made, used = joined(g, wanted) if ARCHITECTURES[arch].latent else ({}, set())
    for name, t in g.tensors.items():
        if name in used:
            continue
        to = _name(name, names, m)
        if to in wanted:
            found[to] = t
        elif name not in aside and not name.startswith(unread):
            problems.append(f"unexpected: {name} {t.kind_name}{list(t.shape)}")
    for name, needed in wanted.items():
        if name in made:
            continue
        if name not in found:
            problems.append(f"missing: {name} {needed}")
        elif found[name].shape != needed.shape and not _of_channels(found[name].shape, needed.shape):
            got = found[name]
            problems.append(f"misshaped: {got.name} is {list(got.shape)}, the metadata ask for {list(needed.shape)}")
    if problems:
        raise CheckpointError(f"{g.path}: the tensors do not fit the metadata:\n{listed(problems)}")
    interleaved = ARCHITECTURES[arch].interleaved
    return {
        name: made.get(name)
        or GgufParam(found[name], _halves(name, config) if interleaved else None, _of_channels(found[name].shape, t.shape))
        for name, t in wanted.items()
    }


def _of_channels(shape: tuple[int, ...], needed: tuple[Any, ...]) -> bool:
    """Whether these are the [channels, width] of a convolution that is [channels, 1, width]."""
    return len(needed) == 3 and needed[1] == 1 and shape == (needed[0], needed[2])


def _name(name: str, names: Names, m: Model) -> str:
    """The parameter's name of a tensor's; itself, which is none, where there is no such parameter."""
    of_layer = _OF_LAYER.match(name)
    whole_name = f"{of_layer[2]}.{of_layer[3]}" if of_layer else ""
    if of_layer and whole_name in names.layer:
        return f"{m.prefix}{names.layers}.{of_layer[1]}.{names.layer[whole_name]}"
    if of_layer and of_layer[2] in names.layer:
        part = names.layer[of_layer[2]]
        whole = f"{m.prefix}{names.layers}.{of_layer[1]}.{part}"
        return whole if of_layer[3] == "weight" and of_layer[2].endswith("_exps") else f"{whole}.{of_layer[3]}"
    part, _, kind = name.rpartition(".")
    if part in names.whole:
        return f"{m.prefix}{names.whole[part]}.{kind}"
    return f"{m.top[part]}.{kind}" if part in m.top else name


def _halves(name: str, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Heads and their width where a tensor's rows are queries or keys, which llama's files have for interleaved rotation."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    return None if heads is None else (config[heads], config["head_dim"])
