"""Encoders of whole texts: BERT, RoBERTa and XLM-RoBERTa, MPNet, DistilBERT. One model; a family is a set of names and options.

An encoder is called with ``tokens`` i64[b, s], padded on the right, the ``lengths`` i64[b] of the texts and, where it tells a
second text from the first, ``types`` i64[b, s]; it returns hidden states f32[b, s, dim].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from wasat.frontend import nn

from .alibi import slopes
from .config import MOST_LAYERS, MOST_POSITIONS, MOST_SIZE, Fields

_TRAINING = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "gradient_checkpointing", "directionality",
    "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "output_past", "dropout", "qa_dropout", "seq_classif_dropout", "tie_weights_", "tie_word_embeddings",
    "sinusoidal_pos_embds", "sentence_transformers", "sbert_ce_default_activation_function", "embedding_size", "dense_bias",
)  # fmt: skip
"""Fields that are for training, for other heads, or read elsewhere."""


@dataclass(frozen=True)
class Options:
    """Sizes and switches of an encoder."""

    vocab: int
    dim: int
    hidden: int
    heads: int
    layers: int
    eps: float
    act: str
    positions: int
    types: int = 0
    """Kinds of tokens: of the first text, of the second; 0: it has none."""
    pad: int | None = None
    """Where positions count from the token of padding on, past its id, that token."""
    buckets: int = 0
    """Rows of a table of distances, MPNet's."""
    slopes: tuple[float, ...] = ()
    """Of scores by distance, a head each, in place of a table of positions."""
    gated: bool = False
    """The first layer of feed-forward, without a bias, gives a gate and what it gates."""
    embedding: int = 0
    """Width of what is looked up, where it is another one, ELECTRA's; 0: it is not."""


@dataclass(frozen=True)
class Names:
    """What a checkpoint calls the parts: its layers, and within one each linear and norm."""

    layers: str
    query: str
    key: str
    value: str
    out: str
    attention_norm: str
    up: str
    down: str
    norm: str
    gate: str = ""
    """Of what is activated, where that and what it is multiplied by (``up``) have a matrix each."""


BERT = Names(
    "encoder.layer", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
JINA2 = Names(
    "encoder.layer", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "mlp.gated_layers", "mlp.wo", "mlp.layernorm",
)  # fmt: skip
JINA2_APART = replace(JINA2, up="mlp.gated_layers_v", gate="mlp.gated_layers_w")
MPNET = Names(
    "encoder.layer", "attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o", "attention.LayerNorm",
    "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
DISTILBERT = Names(
    "transformer.layer", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm",
    "ffn.lin1", "ffn.lin2", "output_layer_norm",
)  # fmt: skip


class Part(nn.Module):
    """A node on the way to a parameter's name."""


def put(root: nn.Module, path: str, module: Any) -> Any:
    """Makes ``module`` the attribute of ``root`` at a path with dots; returns it."""
    *outer, last = path.split(".")
    for name in outer:
        root = vars(root).setdefault(name, Part())
    vars(root)[last] = module
    return module


def seen(tokens: nn.Tensor, lengths: nn.Tensor) -> nn.Tensor:
    """Which keys are of the text: bool ``[b, 1, s]``."""
    return nn.positions(tokens)[None, None, :] < lengths[:, None, None]


def near(tokens: nn.Tensor, lengths: nn.Tensor, reach: int) -> nn.Tensor:
    """Of these, the keys at most ``reach`` before or after a query, and of padding itself, so that it sees something: bool
    ``[b, s, s]``."""
    positions = nn.positions(tokens)
    behind = positions[:, None] - positions[None, :]
    return seen(tokens, lengths) & (behind <= reach) & (-behind <= reach) | (behind == 0)


class Embeddings(nn.Module):
    """Tokens, their positions and kinds, normalized."""

    def __init__(self, o: Options) -> None:
        self.pad = o.pad
        dim = o.embedding or o.dim
        self.word_embeddings = nn.Embedding(o.vocab, dim)
        self.position_embeddings = None if o.slopes else nn.Embedding(o.positions, dim)
        self.token_type_embeddings = nn.Embedding(o.types, dim) if o.types else None
        self.LayerNorm = nn.LayerNorm(dim, o.eps)

    def __call__(self, tokens: nn.Tensor, types: nn.Tensor | None) -> nn.Tensor:
        positions = nn.positions(tokens)
        if self.pad is not None:
            counted = (tokens != self.pad).cast("i64")
            positions = nn.cumsum(counted, axis=1) * counted + self.pad
        x = self.word_embeddings(tokens)
        if self.token_type_embeddings is not None:
            x = x + (self.token_type_embeddings(types) if types is not None else self.token_type_embeddings.weight[0])
        return self.LayerNorm(x if self.position_embeddings is None else x + self.position_embeddings(positions))


class Layer(nn.Module):
    """Attention over the whole text and feed-forward, each added to its input and normalized."""

    def __init__(self, o: Options, n: Names) -> None:
        self.heads, self.act, self.scale = o.heads, nn.layers.activation(o.act), (o.dim // o.heads) ** -0.5
        query, key, value, out = (
            put(self, path, nn.Linear(o.dim, o.dim, bias=True)) for path in (n.query, n.key, n.value, n.out)
        )
        attention_norm = put(self, n.attention_norm, nn.LayerNorm(o.dim, o.eps))
        self.gated = o.gated
        self.gate = put(self, n.gate, nn.Linear(o.dim, o.hidden)) if n.gate else None
        up = put(self, n.up, nn.Linear(o.dim, 2 * o.hidden if o.gated and not n.gate else o.hidden, bias=not o.gated))
        down = put(self, n.down, nn.Linear(o.hidden, o.dim, bias=True))
        self.parts = (query, key, value, out, attention_norm, up, down, put(self, n.norm, nn.LayerNorm(o.dim, o.eps)))

    def __call__(self, x: nn.Tensor, keep: nn.Tensor, bias: nn.Tensor | None) -> nn.Tensor:
        query, key, value, out, attention_norm, up, down, norm = self.parts
        q, k, v = (part(x).heads(self.heads) for part in (query, key, value))
        if bias is None:
            mixed = nn.attention(q, k, v, keep, scale=self.scale)
        else:
            scores = nn.einsum("b s h d, b t h d -> b h s t", q, k) * self.scale + bias
            probs = nn.softmax(nn.where(keep[:, None], scores, -math.inf))
            mixed = nn.einsum("b h s t, b t h e -> b s h e", probs, v)
        x = attention_norm(x + out(mixed.merge()))
        if self.gate is not None:
            first, *gated = self.gate(x), up(x)
        else:
            first, *gated = up(x).split(2) if self.gated else (up(x),)
        wide = self.act(first) * gated[0] if gated else self.act(first)
        y: nn.Tensor = norm(x + down(wide))
        return y


class Encoder(nn.Module):
    """``tokens`` -> hidden states f32[b, s, dim]."""

    def __init__(self, o: Options, names: Names) -> None:
        self.dim, self.kinds = o.dim, o.types
        self.embeddings = Embeddings(o)
        self.embeddings_project = nn.Linear(o.embedding, o.dim, bias=True) if o.embedding else None
        layers = put(self, names.layers, nn.ModuleList([Layer(o, names) for _ in range(o.layers)]))
        self.bias = put(self, "encoder.relative_attention_bias", nn.Embedding(o.buckets, o.heads)) if o.buckets else None
        self.stack, self.slopes = layers, np.array(o.slopes, np.float32)

    def __call__(self, tokens: nn.Tensor, lengths: nn.Tensor, types: nn.Tensor | None = None) -> nn.Tensor:
        keep, at = seen(tokens, lengths), nn.positions(tokens)
        bias = None if self.bias is None else self.bias(_buckets(at)).transpose(2, 0, 1)
        if self.slopes.size:
            behind = at[:, None] - at[None, :]
            bias = nn.constant(-self.slopes[:, None, None]) * nn.maximum(behind, -behind).cast("f32")
        x = self.embeddings(tokens, types)
        x = x if self.embeddings_project is None else self.embeddings_project(x)
        for layer in self.stack:
            x = layer(x, keep, bias)
        return x


def _buckets(positions: nn.Tensor, count: int = 32, furthest: int = 128) -> nn.Tensor:
    """The bucket of each distance, T5's: half of them for keys after the query; near distances have one each."""
    half, exact = count // 2, count // 4
    distances = np.arange(1, 4 * furthest)
    with np.errstate(divide="ignore"):
        far = exact + (
            np.log(distances.astype(np.float32) / exact) / math.log(furthest / exact) * (half - exact)
        ).astype(np.int64)
    bucket = np.where(distances < exact, distances, np.minimum(far, half - 1))
    steps = [int(distances[bucket >= k][0]) for k in range(1, half)]  # where the k-th begins
    after = positions[None, :] - positions[:, None]
    distance = nn.maximum(after, -after)
    found = (after > 0).cast("i64") * half
    for step in steps:
        found = found + (distance >= step).cast("i64")
    return found


# -- families ----------------------------------------------------------------------------------------------------------------
def _options(fields: Fields, **more: Any) -> Options:
    """What all but DistilBERT call alike."""
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if dim % heads:
        raise fields.fail(f"hidden_size {dim} does not split into {heads} heads")
    return Options(
        vocab=fields.size("vocab_size"), dim=dim, hidden=fields.size("intermediate_size"), heads=heads,
        layers=fields.size("num_hidden_layers", most=MOST_LAYERS), eps=fields.number("layer_norm_eps", 1e-12),
        act=fields.activation("hidden_act", "gelu"),
        positions=fields.size("max_position_embeddings", most=MOST_POSITIONS), **more,
    )  # fmt: skip


def _encoder(fields: Fields, options: Options, names: Names, family: str) -> Encoder:
    fields.ignore(*_TRAINING)
    if options.positions > 2**20:
        raise fields.fail(f"max_position_embeddings is {options.positions}: a table of so many rows is not supported")
    fields.finish(family)
    return Encoder(options, names)


def _absolute(fields: Fields) -> None:
    fields.refuse("position_embedding_type", "absolute", "only absolute positions are implemented")


def bert(fields: Fields) -> Encoder:
    """``model_type: bert``; Jina 2 has this name, too."""
    if fields.given.get("position_embedding_type") == "alibi":
        return _jina2(fields)
    _absolute(fields)
    types = fields.take("type_vocab_size", int, 2, least=0, most=MOST_SIZE)
    return _encoder(fields, _options(fields, types=types), BERT, "bert")


def _jina2(fields: Fields) -> Encoder:
    """Jina 2 (arXiv:2310.19923): ALiBi both ways, gated feed-forward layers."""
    fields.ignore("position_embedding_type", "emb_pooler", "model_max_length")
    kind = fields.take("feed_forward_type", str)
    if kind not in ("geglu", "reglu"):
        raise fields.fail(f"feed_forward_type {kind!r} is not implemented with ALiBi; there are geglu and reglu")
    types = fields.take("type_vocab_size", int, 2, least=0, most=MOST_SIZE)
    fields.ignore("hidden_act")  # which the gate does not read
    options = _options(fields, types=types, gated=True)
    options = replace(options, act={"geglu": "gelu", "reglu": "relu"}[kind], slopes=slopes(options.heads))
    apart = fields.flag("gate_apart", False)  # which GGUF files of early 2024 have, and no folder
    return _encoder(fields, options, JINA2_APART if apart else JINA2, "bert with ALiBi")


def roberta(fields: Fields) -> Encoder:
    """``model_type: roberta``, ``xlm-roberta``, ``camembert``: positions that begin after the token of padding."""
    _absolute(fields)
    pad = fields.take("pad_token_id", int, 1, least=0, most=MOST_SIZE)
    return _encoder(fields, _options(fields, types=fields.size("type_vocab_size", 2), pad=pad), BERT, "roberta")


def electra(fields: Fields) -> Encoder:
    """``model_type: electra``: BERT whose tables may be narrower."""
    _absolute(fields)
    fields.ignore("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout")  # of another head
    narrow = fields.size("embedding_size", 128)
    options = _options(fields, types=fields.size("type_vocab_size", 2))
    return _encoder(fields, replace(options, embedding=narrow if narrow != options.dim else 0), BERT, "electra")


def mpnet(fields: Fields) -> Encoder:
    """``model_type: mpnet``: a bias for each distance."""
    buckets = fields.size("relative_attention_num_buckets", 32)
    if buckets < 32:
        raise fields.fail(f"relative_attention_num_buckets is {buckets}: the reference implementation counts 32 of them")
    return _encoder(fields, _options(fields, pad=1, buckets=buckets), MPNET, "mpnet")


def distilbert(fields: Fields) -> Encoder:
    """``model_type: distilbert``."""
    dim, heads = fields.size("dim"), fields.size("n_heads")
    if dim % heads:
        raise fields.fail(f"dim {dim} does not split into {heads} heads")
    options = Options(
        vocab=fields.size("vocab_size"), dim=dim, hidden=fields.size("hidden_dim"), heads=heads,
        layers=fields.size("n_layers", most=MOST_LAYERS), eps=1e-12, act=fields.activation("activation", "gelu"),
        positions=fields.size("max_position_embeddings", most=MOST_POSITIONS),
    )  # fmt: skip
    return _encoder(fields, options, DISTILBERT, "distilbert")


# -- heads -------------------------------------------------------------------------------------------------------------------
class PooledHead(nn.Module):
    """BERT's classification: the first token through a tanh layer, then the labels."""

    def __init__(self, name: str, encoder: Any, labels: int) -> None:
        vars(self)[name] = encoder
        self.parts = encoder, put(encoder, "pooler.dense", nn.Linear(encoder.dim, encoder.dim, bias=True))
        self.classifier = nn.Linear(encoder.dim, labels, bias=True)

    def __call__(self, tokens: nn.Tensor, lengths: nn.Tensor, types: nn.Tensor | None = None) -> nn.Tensor:
        encoder, dense = self.parts
        return self.classifier(nn.tanh(dense(encoder(tokens, lengths, types)[:, 0])))


class FirstHead(nn.Module):
    """The first token through a layer, then the labels: RoBERTa's, MPNet's and DistilBERT's, by their names."""

    def __init__(self, name: str, encoder: Encoder, labels: int, dense: str, out: str, act: str) -> None:
        vars(self)[name] = encoder
        self.act = nn.layers.activation(act)
        first = put(self, dense, nn.Linear(encoder.dim, encoder.dim, bias=True))
        self.parts = (encoder, first, put(self, out, nn.Linear(encoder.dim, labels, bias=True)))

    def __call__(self, tokens: nn.Tensor, lengths: nn.Tensor, types: nn.Tensor | None = None) -> nn.Tensor:
        encoder, dense, out = self.parts
        return out(self.act(dense(encoder(tokens, lengths, types)[:, 0])))


class EuroHead(nn.Module):
    """EuroBERT's: the first token or the mean of all through a layer and to labels; or the mean of all tokens' labels."""

    def __init__(self, model: Any, labels: int) -> None:
        self.model, self.pooling = model, model.pooling
        self.dense = nn.Linear(model.dim, model.dim, bias=True)
        self.classifier = nn.Linear(model.dim, labels, bias=True)

    def __call__(self, tokens: nn.Tensor, lengths: nn.Tensor) -> nn.Tensor:
        x = self.model(tokens, lengths)
        x = x[:, :1] if self.pooling == "bos" else self._mean(x, lengths) if self.pooling == "mean" else x
        y = self.classifier(nn.gelu(self.dense(x)))
        return (self._mean(y, lengths) if self.pooling == "late" else y)[:, 0]

    def _mean(self, x: nn.Tensor, lengths: nn.Tensor) -> nn.Tensor:
        """Of a text's tokens: ``x[b, s, n] -> [b, 1, n]``."""
        mask = (nn.positions(x)[None, :] < lengths[:, None]).cast("f32")[..., None]
        return (x * mask).sum(1, keepdims=True) / mask.sum(1, keepdims=True)


def roberta_head(encoder: Encoder, labels: int) -> nn.Module:
    return FirstHead("roberta", encoder, labels, "classifier.dense", "classifier.out_proj", "tanh")


def electra_head(encoder: Encoder, labels: int) -> nn.Module:
    return FirstHead("electra", encoder, labels, "classifier.dense", "classifier.out_proj", "gelu")


def mpnet_head(encoder: Encoder, labels: int) -> nn.Module:
    return FirstHead("mpnet", encoder, labels, "classifier.dense", "classifier.out_proj", "tanh")


def distilbert_head(encoder: Encoder, labels: int) -> nn.Module:
    return FirstHead("distilbert", encoder, labels, "pre_classifier", "classifier", "relu")
