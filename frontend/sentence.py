"""Folders of models that embed texts or score pairs of them: encoders alone, sentence-transformers', rerankers.

The program has one entry: ``embed(tokens i64[b, s], lengths i64[b]) -> embedding f32[b, dim]``, or ``score`` with the scores
that a cross-encoder gives. Texts are padded on the right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from wasat.frontend import nn
from wasat.ir import CheckpointError, Embedder, Origin, Program

from .chat import chat_texts
from .models import FAMILIES, Fields, encoders, nomic
from .models.config import check_layers, refuse_own_code
from .models.gemma3 import gemma3_text
from .models.llama import eurobert
from .models.modernbert import Classifier, modernbert
from .weights.safetensors import Stored, match, read_folder, read_header, read_json, tokenizer_of

_MODULES, PROMPTS = "modules.json", "prompts.json"
_POOLING = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
"""How older files say what newer ones have in ``pooling_mode``; several are put side by side in this order."""
_ACTIVATIONS = {
    "Identity": "", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu", "Sigmoid": "sigmoid",
}  # fmt: skip
"""torch.nn's, by their last name."""


@dataclass(frozen=True)
class Backbone:
    """What makes hidden states of tokens: a module, and how it is called with (tokens, lengths, types)."""

    module: Any
    call: Callable[..., nn.Tensor]
    name: str
    """What it is in checkpoints of models with heads."""
    kinds: int = 0
    """How many kinds of tokens there are; more than one: a second text is told from the first."""
    lost: int = 0
    """Rows of its table of positions that no token has."""


def _encoder(build: Callable[[Fields], encoders.Encoder | nomic.Encoder], name: str) -> Callable[[Fields], Backbone]:
    def made(fields: Fields) -> Backbone:
        m = build(fields)
        pad = m.embeddings.pad if isinstance(m, encoders.Encoder) else None
        return Backbone(m, m, name, m.kinds, 0 if pad is None else pad + 1)

    return made


def _both_ways(build: Callable[[Fields], Any]) -> Callable[[Fields], Backbone]:
    """Every token sees the whole text."""

    def made(fields: Fields) -> Backbone:
        m = build(fields)
        return Backbone(m, lambda tokens, lengths, types: m(tokens, lengths), "model")

    return made


def _decoder(build: Callable[[Fields], Any]) -> Callable[[Fields], Backbone]:
    """A decoder looks back: what comes after a text, it does not see."""

    def made(fields: Fields) -> Backbone:
        m = build(fields).model
        return Backbone(m, lambda tokens, lengths, types: m(tokens), "model")

    return made


def _gemma3(fields: Fields) -> Backbone:
    if not fields.given.get("use_bidirectional_attention"):
        return _decoder(gemma3_text)(fields)
    return _both_ways(lambda given: gemma3_text(given, causal=False).model)(fields)


_OTHERWISE = (
    "bloom", "codegen", "deepseek_v2", "deepseek_v3", "falcon", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss",
    "gptj", "granitemoe", "granitemoeshared", "llama4_text", "mixtral", "mpt", "olmoe", "opt", "qwen2_moe", "qwen3_moe",
)  # fmt: skip
"""Decoders whose checkpoints have names of their own, or the matrices of experts otherwise than the model."""
BACKBONES: dict[str, Callable[[Fields], Backbone]] = {
    "bert": _encoder(encoders.bert, "bert"), "roberta": _encoder(encoders.roberta, "roberta"),
    "xlm-roberta": _encoder(encoders.roberta, "roberta"), "camembert": _encoder(encoders.roberta, "roberta"),
    "mpnet": _encoder(encoders.mpnet, "mpnet"), "distilbert": _encoder(encoders.distilbert, "distilbert"),
    "modernbert": _both_ways(modernbert), "nomic_bert": _encoder(nomic.nomic_bert, "nomic_bert"),
    "gte": _encoder(nomic.gte, "gte"), "new": _encoder(nomic.gte_of_its_authors, "gte"),
    "electra": _encoder(encoders.electra, "electra"), "eurobert": _both_ways(eurobert),
    "jina_embeddings_v3": _encoder(nomic.jina_embeddings_v3, "roberta"),
    **{kind: _decoder(build) for kind, (_, build) in FAMILIES.items() if kind not in _OTHERWISE}, "gemma3_text": _gemma3,
}  # fmt: skip
"""``model_type`` -> what makes hidden states."""
_OF_AUTHORS = {
    "bert": "JinaBert", "gte": "Gte", "jina_embeddings_v3": "XLMRoberta", "new": "New", "nomic_bert": "NomicBert",
}
"""Beginnings of the names of classes that the authors of a family brought with their folders, before transformers had it."""
_ENCODERS = (
    "bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert", "modernbert", "nomic_bert", "gte", "electra",
    "eurobert", "jina_embeddings_v3", "new",
)  # fmt: skip
"""Families that do nothing else."""
_UNUSED = re.compile(
    r"(.*\.)?(position_ids|token_type_ids|rotary_emb\.inv_freq)\Z|(pooler|cls|lm_head|vocab_\w+|decoder|head)\."
)
"""Tensors that stand for no number of the model, or belong to heads that are not asked for."""


def is_embedder(folder: Path) -> bool:
    """Whether a folder is of a model that embeds or scores texts, rather than of one that writes them."""
    if (folder / _MODULES).exists():
        return True
    config = read_json(folder / "config.json")
    classes = config.get("architectures") or []
    scores = isinstance(classes, list) and any(str(c).endswith("ForSequenceClassification") for c in classes)
    bare = isinstance(classes, list) and len(classes) == 1 and classes[0] in _BARE
    return (
        config.get("model_type") in _ENCODERS or scores or bare or config.get("use_bidirectional_attention") is True
    )


_BARE = ("Gemma3TextModel", *(re.sub("ForCausalLM|LMHeadModel", "Model", name) for name, _ in FAMILIES.values()))
"""Decoders that were saved without the head that writes."""


def load(folder: Path) -> Program:
    """The program of such a folder: what the module says. An encoder without ``modules.json`` embeds by the mean of its
    tokens, as sentence-transformers has it.

    Raises ConfigError for a field that is not implemented, CheckpointError for files that are damaged or do not fit.
    """
    steps = _steps(folder)
    where = folder / steps[0].path if steps else folder
    config = read_json(where / "config.json")
    fields = Fields(config, str(where / "config.json"))
    kind = fields.take("model_type", str)
    if kind not in BACKBONES:
        raise fields.fail(f"model_type {kind!r} does not embed texts here; there are {', '.join(BACKBONES)}")
    refuse_own_code(fields, _OF_AUTHORS.get(kind, "no class"))
    fields.refuse("quantization_config", None, "the checkpoint is quantized; use the original, unquantized one")
    classes = fields.take("architectures", list, None) or []
    scoring = [c for c in classes if str(c).endswith("ForSequenceClassification")]
    if classes and not scoring and not steps and not any(str(c).endswith("Model") for c in classes):
        raise fields.fail(
            f"architectures is {classes}, whose head is not implemented; a model that embeds texts has a {_MODULES}, or is a "
            "bare …Model, one that scores them is …ForSequenceClassification"
        )
    check_layers(config, lambda: read_folder(where), fields.where)
    backbone = BACKBONES[kind](fields)
    tokenizer = where / "tokenizer.json"
    settings = _settings(where)
    if scoring and not any(s.kind == "Pooling" for s in steps):
        root: Any = Scores(backbone, kind, _labels(fields), _activation_of(fields))
        name, wanted = "score", _renamed(read_folder(where), backbone, "")
    else:
        root = Sentence(backbone, steps or [Step("Transformer", "", {}), Step("Pooling", "", {})], folder)
        name, wanted = "embed", _renamed(read_folder(where), backbone, "0.")
        for i, step in enumerate(steps):
            wanted |= {f"{i}.{k}": v for k, v in _tensors(folder / step.path).items()} if step.kind in _WITH_WEIGHTS else {}
    inputs = {"tokens": "i64[b, s]", "lengths": "i64[b]"}
    if name == "score" and backbone.kinds > 1 and _tells_texts_apart(where):
        inputs["types"] = "i64[b, s]"
    if isinstance(root, Sentence) and root.skips:
        inputs["skip"] = "i64[b]"
    program = nn.trace(root, inputs, name, outputs=["scores" if name == "score" else "embedding"])
    types = {k: p.type for k, p in root.parameters().items() if k in program.params}
    unused = [k for k in wanted if _UNUSED.match(k.removeprefix("0."))]
    program.params.update(match(types, wanted, unused, where))
    positions = int(fields.given["max_position_embeddings"]) - backbone.lost
    limit = min(n for n in (positions, settings.get("max_seq_length"), _model_max(where)) if n is not None)
    program.declare(
        name=folder.resolve().name, context=positions, vocab=config["vocab_size"],
        embedder=Embedder(name, name == "score", limit, _pad(config)),
    )  # fmt: skip
    texts = {**chat_texts(where), **_prompts(folder)}
    if tokenizer.exists() and settings.get("do_lower_case"):
        texts["tokenizer.json"] = _lowered(tokenizer)
    program.origin = Origin(kind, tokenizer_of(where), texts=texts)
    return program


# -- sentence-transformers -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """An entry of ``modules.json``."""

    kind: str
    path: str
    config: dict[str, Any]


_KINDS = ("Transformer", "Pooling", "Dense", "LayerNorm", "Dropout", "Normalize")
_WITH_WEIGHTS = ("Dense", "LayerNorm")


def _steps(folder: Path) -> list[Step]:
    path = folder / _MODULES
    if not path.exists():
        return []
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(x["type"]).rpartition(".")[2], str(x["path"])) for x in given]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise CheckpointError(f"{path} is no list of modules with type and path: {type(e).__name__}: {e}") from None
    steps = []
    for i, (kind, place) in enumerate(found):
        if kind not in _KINDS or (kind == "Transformer") != (i == 0):
            others = ", ".join(_KINDS[1:])
            raise CheckpointError(f"{path}: module {i} is {kind}; a Transformer comes first, then any of {others}")
        inside = (folder / place).resolve()
        if kind not in ("Normalize", "Dropout") and not (inside.is_relative_to(folder.resolve()) and inside.is_dir()):
            raise CheckpointError(f"{path}: module {i} lies in {place!r}, which is no folder inside")
        config = inside / "config.json"
        steps.append(Step(kind, place, read_json(config) if kind in ("Pooling", *_WITH_WEIGHTS) and config.exists() else {}))
    return steps


def _settings(where: Path) -> dict[str, Any]:
    """What sentence-transformers keeps beside a transformer."""
    path = next((p for p in sorted(where.glob("sentence_*_config.json"))), None)
    found = read_json(path) if path is not None else {}
    limit = found.get("max_seq_length")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise CheckpointError(f"{path}: max_seq_length is {limit!r}; expected a positive number")
    task = found.get("transformer_task", "feature-extraction")
    if task not in ("feature-extraction", "sequence-classification"):
        raise CheckpointError(f"{path}: transformer_task is {task!r}; there are feature-extraction and sequence-classification")
    return found


def _model_max(where: Path) -> int | None:
    path = where / "tokenizer_config.json"
    limit = read_json(path).get("model_max_length") if path.exists() else None
    return int(limit) if isinstance(limit, (int, float)) and 1 <= limit < 2**31 else None


def _tells_texts_apart(where: Path) -> bool:
    """Whether the tokenizer gives the model kinds of tokens; else all are of the first."""
    path = where / "tokenizer_config.json"
    names = read_json(path).get("model_input_names") if path.exists() else None
    return not isinstance(names, list) or "token_type_ids" in names


def _pad(config: Mapping[str, Any]) -> int:
    pad = config.get("pad_token_id")
    return pad if type(pad) is int and 0 <= pad < config["vocab_size"] else 0


def _prompts(folder: Path) -> dict[str, str]:
    """Texts that are put before others, by name, and the default's name."""
    path = folder / "config_sentence_transformers.json"
    config = read_json(path) if path.exists() else {}
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(t, str) for t in prompts.values()):
        raise CheckpointError(f"{path}: prompts are no texts by name")
    if default is not None and not (isinstance(default, str) and default in prompts):
        raise CheckpointError(f"{path}: default_prompt_name is {default!r}, and the prompts are {', '.join(prompts) or 'none'}")
    return {PROMPTS: json.dumps({"prompts": prompts, "default": default}, ensure_ascii=False)} if prompts else {}


def _lowered(tokenizer: Path) -> str:
    """A tokenizer that brings texts to lower case first, if it does not yet."""
    found = read_json(tokenizer)
    old = found.get("normalizer")
    parts = old.get("normalizers", []) if isinstance(old, dict) and old.get("type") == "Sequence" else [old] if old else []
    if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
        raise CheckpointError(f"{tokenizer}: its normalizer is none that can be read")
    if not any(p.get("type") == "Lowercase" or p.get("lowercase") for p in parts):
        found["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *parts]}
    return json.dumps(found, ensure_ascii=False)


def _tensors(folder: Path) -> dict[str, Stored]:
    path = folder / "model.safetensors"
    if not path.exists():
        there = ", ".join(sorted(p.name for p in folder.glob("*"))) or "nothing"
        raise CheckpointError(f"{path} is missing; there is {there}: save the model as safetensors")
    return read_header(path)


def _renamed(found: Mapping[str, Stored], backbone: Backbone, to: str) -> dict[str, Stored]:
    """Tensors by the names of our parameters: ``to`` before those of the encoder, which may stand within a model."""
    prefix = f"{backbone.name}."
    if backbone.name == "gte":  # whose authors call it new
        found = {f"{prefix}{name.removeprefix('new.')}" if name.startswith("new.") else name: t for name, t in found.items()}
    if not to:
        return dict(found)
    inner = any(name.startswith(prefix) for name in found)
    return {f"{to}{name.removeprefix(prefix)}" if not inner or name.startswith(prefix) else f"0.head.{name}": t
            for name, t in found.items()}  # fmt: skip


class Sentence(nn.Module):
    """Hidden states, pooled, and what ``modules.json`` does with them. Parameters are named as in sentence-transformers."""

    def __init__(self, backbone: Backbone, steps: list[Step], folder: Path) -> None:
        vars(self)["0"] = backbone.module
        self.call, self.skips = backbone.call, False
        width = backbone.module.dim
        made: list[Callable[..., nn.Tensor]] = []  # each called with what the last one gave, the lengths and what to skip
        for i, step in enumerate(steps[1:], 1):
            what = f"{folder / step.path}/config.json"
            if step.kind == "Pooling":
                modes = _modes(step.config, what)
                self.skips = step.config.get("include_prompt", True) is False
                made.append(partial(_pooled, modes=modes))
                width *= len(modes)
            elif step.kind == "Dense":
                dense = Dense(Fields(step.config, what, frozenset()), width)
                vars(self)[str(i)], width = dense, dense.width
                made.append(dense)
            elif step.kind == "LayerNorm":
                vars(self)[str(i)] = norm = Norm(width)
                made.append(norm)
            elif step.kind == "Normalize":
                made.append(lambda x, lengths, skip: nn.normalize(x, axis=-1))
        if not any(s.kind == "Pooling" for s in steps):
            raise CheckpointError(f"{folder / _MODULES} has no Pooling: what makes one embedding of many tokens is not known")
        self.steps = made

    def __call__(self, tokens: nn.Tensor, lengths: nn.Tensor, skip: nn.Tensor | None = None) -> nn.Tensor:
        x = self.call(tokens, lengths, None)
        for step in self.steps:
            x = step(x, lengths, skip)
        return x


class Norm(nn.Module):
    """A module LayerNorm."""

    def __init__(self, width: int) -> None:
        self.norm = nn.LayerNorm(width)

    def __call__(self, x: nn.Tensor, lengths: nn.Tensor, skip: nn.Tensor | None) -> nn.Tensor:
        return self.norm(x)


class Dense(nn.Module):
    """A module Dense: a linear layer and an activation, perhaps added to what goes in."""

    def __init__(self, fields: Fields, width: int) -> None:
        given, self.width = fields.size("in_features"), fields.size("out_features")
        if given != width:
            raise fields.fail(f"in_features is {given}; what comes in has {width}")
        self.act = _activation(fields, fields.take("activation_function", str, "torch.nn.modules.activation.Tanh"))
        self.linear = nn.Linear(width, self.width, fields.flag("bias", True))
        self.adds = fields.flag("use_residual", False)
        self.residual = nn.Linear(width, self.width) if self.adds and width != self.width else None
        for name in ("module_input_name", "module_output_name"):
            fields.refuse(name, "sentence_embedding", "only what was pooled goes through it")
        fields.finish("Dense")

    def __call__(self, x: nn.Tensor, lengths: nn.Tensor, skip: nn.Tensor | None) -> nn.Tensor:
        y = self.linear(x)
        y = nn.layers.activation(self.act)(y) if self.act else y
        return y if not self.adds else y + (x if self.residual is None else self.residual(x))


def _activation(fields: Fields, name: str) -> str:
    """Of ours, by the name of torch's class; empty: none."""
    short = name.rpartition(".")[2]
    if short not in _ACTIVATIONS or not name.startswith("torch.nn."):
        raise fields.fail(f"the activation {name!r} is not implemented; there are {', '.join(_ACTIVATIONS)} of torch.nn")
    return _ACTIVATIONS[short]


def _modes(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """What is pooled, side by side."""
    given = config.get("pooling_mode")
    if given is None:
        given = [mode for key, mode in _POOLING.items() if config.get(key)]
    if not isinstance(given, (str, list)):
        raise CheckpointError(f"{where}: pooling_mode is {given!r}; expected a name, or a list of names")
    modes = (given,) if isinstance(given, str) else tuple(given) or ("mean",)
    if wrong := [m for m in modes if m not in _POOLING.values()]:
        raise CheckpointError(f"{where}: pooling_mode is {wrong[0]!r}; there are {', '.join(_POOLING.values())}")
    known = {*_POOLING, "pooling_mode", "include_prompt", "word_embedding_dimension", "embedding_dimension"}
    if left := sorted(config.keys() - known):
        raise CheckpointError(f"{where}: Pooling has no meaning for {', '.join(left)}")
    return modes


def _pooled(x: nn.Tensor, lengths: nn.Tensor, skip: nn.Tensor | None, modes: tuple[str, ...]) -> nn.Tensor:
    """``x[b, s, dim]`` -> ``[b, dim * len(modes)]``; of the first ``skip`` tokens nothing."""
    at = nn.positions(x)
    of_text = at[None, :] < lengths[:, None]
    if skip is not None:
        of_text = of_text & (at[None, :] >= skip[:, None])
    mask = of_text.cast("f32")[..., None]
    out = []
    for mode in modes:
        match mode:
            case "cls":
                first = x[:, 0] if skip is None else _row(x, nn.where(skip < lengths, skip, 0))
                out.append(first)
            case "lasttoken":
                out.append(_row(x, lengths - 1))
            case "max":
                out.append(nn.where(of_text[..., None], x, -float("inf")).max(1))
            case "mean" | "mean_sqrt_len_tokens":
                count = nn.maximum(mask.sum(1), 1e-9)
                out.append((x * mask).sum(1) / (count if mode == "mean" else nn.sqrt(count)))
            case "weightedmean":
                weights = mask * (at + 1).cast("f32")[None, :, None]
                out.append((x * weights).sum(1) / nn.maximum(weights.sum(1), 1e-9))
    return out[0] if len(out) == 1 else nn.concat(out)


def _row(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """``x[b, s, dim]`` at a position of each row."""
    y: nn.Tensor = nn.emit("take_row", x, at)
    return y[:, 0]


# -- rerankers -----------------------------------------------------------------------------------------------------------------
class Scores(nn.Module):
    """A model with its head: scores f32[b] of one label, f32[b, n] of n. Parameters are named as in its checkpoint."""

    def __init__(self, backbone: Backbone, kind: str, labels: int, act: str) -> None:
        m = backbone.module
        self.act, self.labels = act or ("sigmoid" if labels == 1 else "none"), labels
        heads: dict[str, Callable[[Any, int], Any]] = {
            **{n: partial(encoders.PooledHead, n) for n in ("bert", "nomic_bert", "gte")},
            "new": partial(encoders.PooledHead, "gte"),
            "mpnet": encoders.mpnet_head, "distilbert": encoders.distilbert_head, "electra": encoders.electra_head,
            "eurobert": encoders.EuroHead, "modernbert": Classifier,
            **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "jina_embeddings_v3"), encoders.roberta_head),
        }  # fmt: skip
        head: Any = heads[kind](m, labels) if kind in heads else LastHead(backbone, labels)
        vars(self).update({k: v for k, v in vars(head).items() if isinstance(v, (nn.Module, nn.Parameter))})
        self.run: Callable[..., nn.Tensor] = head

    def __call__(self, tokens: nn.Tensor, lengths: nn.Tensor, types: nn.Tensor | None = None) -> nn.Tensor:
        scores = self.run(tokens, lengths) if types is None else self.run(tokens, lengths, types)
        scores = nn.sigmoid(scores) if self.act == "sigmoid" else scores
        return scores[:, 0] if self.labels == 1 else scores


class LastHead(nn.Module):
    """A decoder's: the labels of the last token."""

    def __init__(self, backbone: Backbone, labels: int) -> None:
        self.model, self.call = backbone.module, backbone.call
        self.score = nn.Linear(backbone.module.dim, labels)

    def __call__(self, tokens: nn.Tensor, lengths: nn.Tensor) -> nn.Tensor:
        return self.score(_row(self.call(tokens, lengths, None), lengths - 1))


def _labels(fields: Fields) -> int:
    names = fields.take("id2label", dict, None)
    count = len(names) if names else fields.size("num_labels", 2)
    return int(count)


def _activation_of(fields: Fields) -> str:
    """What a cross-encoder does with the logits; empty: by the number of labels, as sentence-transformers."""
    given = fields.given.get("sentence_transformers")
    name = given.get("activation_fn") if isinstance(given, dict) else fields.given.get("sbert_ce_default_activation_function")
    if name is None:
        return ""
    found = _activation(fields, str(name))
    if found not in ("", "sigmoid"):
        raise fields.fail(f"the activation {name!r} of scores is not implemented; there are Identity and Sigmoid")
    return found or "none"
