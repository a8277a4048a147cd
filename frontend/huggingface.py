"""Hugging Face model folders: config.json, safetensors, tokenizer.json -> a program with lazy parameters."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from wasat.frontend import nn
from wasat.ir import CheckpointError, Generation, Origin, Program, TensorType

from .chat import chat_texts
from .models import FAMILIES, ConfigError, Fields
from .models.config import check_layers, refuse_own_code
from .models.decoder import CausalLM, Mixture, Names, Swapped
from .models.layout import Laid
from .models.seeing import text_config, text_tensors
from .sentence import BACKBONES, is_embedder
from .sentence import load as load_embedder
from .weights.quantized import method_of, older_config, read_as_stored, read_quantized
from .weights.safetensors import FileParam, PartParam, StackedParam, Stored, match, read_folder, read_json, tokenizer_of

_BUFFERS = re.compile(r"(.*\.)?rotary_emb\.inv_freq\Z")
"""Tensors that old checkpoints store although they follow from the configuration; transformers ignores them too."""
_IDS = {
    family: {k: i for k, i in zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids) if i is not None}
    for family, ids in {
        "gemma": (2, 1, 0), "gemma2": (2, 1, 0), "gemma3_text": (2, 1, 0), "llama": (1, 2), "mistral": (1, 2),
        "arcee": (128000, 128001), "cohere": (5, 255001, 0), "cohere2": (5, 255001, 0), "ernie4_5": (1, 2, 0),
        "bloom": (1, 2), "falcon": (11, 11), "gpt2": (50256, 50256), "gpt_neox": (0, 2), "gptj": (50256, 50256),
        "opt": (2, 2, 1),
        "deepseek_v2": (1, 2), "deepseek_v3": (0, 1), "exaone4": (0, 2),
        "glm": (None, 151329, 151329), "glm4": (None, None, 151329), "granite": (1, 2), "helium": (1, 2, 3),
        "hunyuan_v1_dense": (1, 2, 0), "ministral": (1, 2), "mixtral": (1, 2), "nemotron": (2, 3), "olmo": (None, 50279, 1),
        "olmo2": (None, 50279, 1), "olmo3": (None, 50279, 1), "olmoe": (None, 50279, 1), "phi": (1, 2),
        "phi3": (1, 32000, 32000), "seed_oss": (0, 2, 1), "smollm3": (128000, 128001, 128004), "stablelm": (0, 0),
        "codegen": (50256, 50256), "gpt_bigcode": (50256, 50256), "granitemoe": (1, 2), "granitemoeshared": (1, 2),
        "lfm2": (1, 2, 0), "llama4_text": (1, 2),
        "starcoder2": (50256, 50256),
    }.items()
}  # fmt: skip
"""Token ids of a family whose config.json leaves them out."""


def from_pretrained(folder: str | Path, context: int | None = None) -> Program:
    """The program of a model folder: graph ``forward(tokens i64[b, s]) -> logits f32[b, s, vocab]``; of a model that embeds
    texts or scores pairs of them, what :mod:`wasat.frontend.sentence` makes.

    Parameters are memory-mapped and converted to f32 one at a time, when loaded; their names are the checkpoint's. Of a
    quantized checkpoint (:mod:`.weights.methods`) weights stay in the integers, scales and zero points that it has.
    ``context``: positions that the program is made for, at most those of the model, which are the default. Where a model
    has other frequencies for long texts (longrope), the default is the context that it first was trained on; a larger one
    takes those of long texts, for all texts.

    ``interface``: name, context (positions), vocab, generation (bos, eos, pad); ``origin``: family, the tokenizer's path, chat
    templates.

    Raises ConfigError for a field that is not implemented, CheckpointError for files that are damaged or do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds config.json")
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds an adapter (LoRA), and no model: give the folder of the model that it was trained on; "
            "to have both in one, load them with peft, merge_and_unload(), and save_pretrained"
        )
    if is_embedder(folder):
        if context is not None:
            raise ConfigError(f"{folder}: context is {context}, and how long texts to be embedded may be, the folder says")
        return load_embedder(folder)
    whole = older_config(folder, read_json(folder / "config.json"))
    config = text_config(whole, str(folder / "config.json"))
    method = method_of(config, str(folder / "config.json"))
    check_layers(config, lambda: read_folder(folder), folder / "config.json")
    fields = Fields(config, str(folder / "config.json"))
    fields.serve(context)
    family, module = build(fields)
    found = dict(text_tensors(whole, read_folder(folder)))
    wanted = {name: p.type for name, p in module.parameters().items()}
    found = _named(module, found)
    if method is not None:
        quantized = read_quantized(method, wanted, found, folder, stored_names(module))
        found = {name: s for name, s in found.items() if name not in quantized.used}
        wanted = {name: t for name, t in wanted.items() if name not in quantized.sources}
    sources = _sources(module, wanted, found, folder)
    program = _traced(folder / "config.json", config, family, module, fields)
    if method is not None:
        read_as_stored(program, "forward", quantized)
        program.origin = replace(program.origin, dequantized=quantized.dense)
    program.params.update(sources)
    program.origin = replace(program.origin, tokenizer=tokenizer_of(folder), texts=chat_texts(folder))
    return program


def from_config(path: str | Path, context: int | None = None) -> Program:
    """The program of :func:`from_pretrained` from a ``config.json`` alone: its parameters are random.

    Raises ConfigError for a field that is not implemented, CheckpointError for a file that cannot be read.
    """
    config = text_config(read_json(Path(path)), str(path))
    if method_of(config, str(path)) is not None:
        raise ConfigError(f"{path}: quantization_config: how weights are stored, their tensors say; give the folder")
    fields = Fields(config, str(path))
    fields.serve(context)
    return _traced(Path(path), config, *build(fields), fields)


def served(fields: Fields, limit: int) -> int:
    """Positions of a program of which the model has ``limit``: as many, or those that were asked for."""
    if fields.served is not None and not 1 <= fields.served <= limit:
        raise fields.fail(f"context is {fields.served}; the model takes 1 to {limit} positions")
    return fields.served or limit


def _traced(path: Path, config: dict[str, Any], family: str, module: nn.Module, fields: Fields) -> Program:
    program = nn.trace(module, {"tokens": "i64[b, s]"}, outputs=["logits"])
    own = module.context if isinstance(module, CausalLM) else None
    context = served(fields, own or config["max_position_embeddings"])
    program.declare(
        name=path.parent.resolve().name, context=context, vocab=config["vocab_size"],
        generation=generation_ids(path.parent, config),
    )  # fmt: skip
    program.origin = Origin(family)
    return program


def build(fields: Fields) -> tuple[str, nn.Module]:
    """The family's name and the module that a configuration describes."""
    kind = fields.take("model_type", str)
    if kind not in FAMILIES:
        if kind in BACKBONES:
            raise fields.fail(f"model_type {kind!r} is an encoder: what is made of its output its folder says; give the folder")
        known = dict.fromkeys([*FAMILIES, *BACKBONES])
        near = difflib.get_close_matches(kind, known, 1)
        raise fields.fail(
            f"model_type {kind!r} is not supported; supported are {', '.join(known)}"
            + (f" (nearest: {near[0]})" if near else "")
        )
    fields.take("quantization_config", dict, None)
    architecture, builder = FAMILIES[kind]
    refuse_own_code(fields, architecture.removesuffix("ForCausalLM"))
    given = fields.take("architectures", list, None) or [architecture]
    if architecture not in given:
        raise fields.fail(f"architectures is {given}; of model_type {kind} only {architecture} is supported")
    return kind, builder(fields)


def stored_names(module: nn.Module) -> dict[str, list[str] | Laid]:
    """Parameters that a checkpoint has under another name, as several matrices that make a stack, or in another layout."""
    out: dict[str, list[str] | Laid] = {}
    for path, part in module.walk():
        if isinstance(part, Mixture):
            for name, to in part.stored.items():
                out[f"{path}.{name}"] = (
                    replace(to, name=_within(path, to.name)) if isinstance(to, Laid) else [_within(path, n) for n in to]
                )
        elif isinstance(part, Swapped):
            out[f"{path}.weight"] = Laid(f"{path}.weight", swapped=True)
    return out


def _within(path: str, name: str) -> str:
    """The name of a part's tensor; ``../`` before it: it is beside the part."""
    return f"{path.rpartition('.')[0]}.{name[3:]}" if name.startswith("../") else f"{path}.{name}"


def _names(module: nn.Module) -> Names:
    return module.names if isinstance(module, CausalLM) else Names()


def _named(module: nn.Module, found: dict[str, Stored]) -> dict[str, Stored]:
    """Tensors by the names that they have in a whole model: some were saved without its head, and lack the first part."""
    names = _names(module)
    first, *_ = names.root.split(".")
    if (first == "model" and names.root == "model") or any(name.startswith(f"{first}.") for name in found):
        return found
    return {name if name.startswith(f"{names.head}.") else f"{first}.{name}": s for name, s in found.items()}


def _sources(
    module: nn.Module, wanted: dict[str, TensorType], found: dict[str, Stored], folder: Path
) -> dict[str, FileParam | StackedParam | PartParam]:
    """File parameters for ``wanted``; a tied head that is stored all the same must equal the embedding."""
    names, elsewhere = _names(module), stored_names(module)
    unread = module.unread if isinstance(module, CausalLM) else ()
    ignorable = [n for n in found if _BUFFERS.match(n) or names.stands_for_nothing(n) or n.startswith(unread)]
    embedding, head = f"{names.root}.{names.embed}.weight", f"{names.head}.weight"
    if head not in module.parameters() and head in found:
        if embedding not in found:
            found = {**found, embedding: found[head]}
        elif not _same(found[embedding], found[head]):
            raise CheckpointError(
                f"{folder}: config.json ties {head} to {embedding}, and the checkpoint holds different numbers; "
                "set tie_word_embeddings to false if the head is meant to be used"
            )
        ignorable.append(head)
    parts: dict[str, TensorType] = {}
    for name, t in wanted.items():
        to = elsewhere.get(name, [name])
        if isinstance(to, Laid):
            parts[to.name] = TensorType(t.dtype, to.stored(t.concrete({})))
            continue
        one = TensorType(t.dtype, t.shape[1:]) if name in elsewhere and t.rank == 3 else t
        parts |= dict.fromkeys(to, one)
    sources = match(parts, found, ignorable, folder)
    out: dict[str, FileParam | StackedParam | PartParam] = {}
    for name, t in wanted.items():
        to = elsewhere.get(name, [name])
        if isinstance(to, Laid):
            out[name] = PartParam(t, sources[to.name].stored, to.swapped, to.start, to.step, to.whole, to.axis)
        elif parts[to[0]] != t:
            out[name] = StackedParam(t, tuple(sources[n].stored for n in to))
        else:
            out[name] = sources[to[0]]
    return out


def _same(a: Stored, b: Stored) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    steps = (slice(i, i + 4096) for i in range(0, a.shape[0] if a.shape else 0, 4096))
    return all(np.array_equal(a.load(rows), b.load(rows)) for rows in steps)


def generation_ids(folder: Path, config: dict[str, Any]) -> Generation:
    """Token ids; generation_config.json goes before config.json, that before the family's own. A negative id is none."""
    config = {**_IDS.get(config.get("model_type", ""), {}), **config}
    path = folder / "generation_config.json"
    first = read_json(path) if path.exists() else {}
    ids: dict[str, Any] = {}
    for key in ("bos", "eos", "pad"):
        name = f"{key}_token_id"
        value = first.get(name) if first.get(name) is not None else config.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise ConfigError(f"{path if name in first else folder / 'config.json'}: {name} is {value!r}; expected token ids")
        there = tuple(v for v in values if v >= 0)
        ids[key] = there if key == "eos" else there[0] if there else None
    return Generation(**ids)
