"""ModernBERT: an encoder with rotary positions, gated feed-forward, and windows in two layers of three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wasat.frontend import nn

from .config import MOST_LAYERS, MOST_POSITIONS, Fields, layer_types, rope, rope_dictionaries
from .encoders import near, seen


@dataclass(frozen=True)
class Options:
    """Sizes and switches."""

    vocab: int
    dim: int
    hidden: int
    heads: int
    eps: float
    act: str
    norm_bias: bool
    bias: bool
    mlp_bias: bool
    reach: int
    """How far layers with a window see to both sides."""
    types: Sequence[str]


class Embeddings(nn.Module):
    """Tokens, normalized."""

    def __init__(self, o: Options) -> None:
        self.tok_embeddings = nn.Embedding(o.vocab, o.dim)
        self.norm = nn.LayerNorm(o.dim, o.eps, o.norm_bias)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        return self.norm(self.tok_embeddings(tokens))


class Attention(nn.Module):
    """One product for queries, keys and values."""

    def __init__(self, o: Options, rope: nn.RoPE) -> None:
        self.heads, self.rope = o.heads, rope
        self.Wqkv = nn.Linear(o.dim, 3 * o.dim, o.bias)
        self.Wo = nn.Linear(o.dim, o.dim, o.bias)

    def __call__(self, x: nn.Tensor, positions: nn.Tensor, keep: nn.Tensor) -> nn.Tensor:
        q, k, v = (part.heads(self.heads) for part in self.Wqkv(x).split(3))
        return self.Wo(nn.attention(self.rope(q, positions), self.rope(k, positions), v, keep).merge())


class MLP(nn.Module):
    """One product for what is activated and its gate."""

    def __init__(self, o: Options) -> None:
        self.act = nn.layers.activation(o.act)
        self.Wi, self.Wo = nn.Linear(o.dim, 2 * o.hidden, o.mlp_bias), nn.Linear(o.hidden, o.dim, o.mlp_bias)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        x, gate = self.Wi(x).split(2)
        return self.Wo(self.act(x) * gate)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm (but the first attention) and added to its input."""

    def __init__(self, o: Options, rope: nn.RoPE, first: bool) -> None:
        self.attn_norm = nn.Identity() if first else nn.LayerNorm(o.dim, o.eps, o.norm_bias)
        self.attn = Attention(o, rope)
        self.mlp_norm = nn.LayerNorm(o.dim, o.eps, o.norm_bias)
        self.mlp = MLP(o)

    def __call__(self, x: nn.Tensor, positions: nn.Tensor, keep: nn.Tensor) -> nn.Tensor:
        x = x + self.attn(self.attn_norm(x), positions, keep)
        y: nn.Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class ModernBert(nn.Module):
    """``tokens`` i64[b, s], padded on the right, and the ``lengths`` of the texts -> hidden states f32[b, s, dim]."""

    kinds = 0
    head: tuple[str, str, bool] = ("cls", "gelu", False)
    """Of a classifier: what it pools, its activation, whether its layer has a bias."""

    def __init__(self, o: Options, ropes: dict[str, nn.RoPE]) -> None:
        self.dim, self.reach, self.sliding = o.dim, o.reach, [t == "sliding_attention" for t in o.types]
        self.options = o
        self.embeddings = Embeddings(o)
        self.layers = nn.ModuleList([Layer(o, ropes[t], i == 0) for i, t in enumerate(o.types)])
        self.final_norm = nn.LayerNorm(o.dim, o.eps, o.norm_bias)

    def __call__(self, tokens: nn.Tensor, lengths: nn.Tensor, types: nn.Tensor | None = None) -> nn.Tensor:
        positions, every, some = nn.positions(tokens), seen(tokens, lengths), near(tokens, lengths, self.reach)
        x = self.embeddings(tokens)
        for layer, sliding in zip(self.layers, self.sliding):
            x = layer(x, positions, some if sliding else every)
        y: nn.Tensor = self.final_norm(x)
        return y


class Prediction(nn.Module):
    """What stands before the labels."""

    def __init__(self, o: Options, act: str, bias: bool) -> None:
        self.dense, self.act = nn.Linear(o.dim, o.dim, bias), nn.layers.activation(act)
        self.norm = nn.LayerNorm(o.dim, o.eps, o.norm_bias)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return self.norm(self.act(self.dense(x)))


class Classifier(nn.Module):
    """The first token, or the mean of all, through a layer, then the labels."""

    def __init__(self, model: ModernBert, labels: int) -> None:
        pooling, act, bias = model.head
        self.model, self.mean = model, pooling == "mean"
        self.head = Prediction(model.options, act, bias)
        self.classifier = nn.Linear(model.dim, labels, bias=True)

    def __call__(self, tokens: nn.Tensor, lengths: nn.Tensor) -> nn.Tensor:
        x = self.model(tokens, lengths)
        if self.mean:
            mask = (nn.positions(tokens)[None, :] < lengths[:, None]).cast("f32")[..., None]
            x = (x * mask).sum(1) / mask.sum(1)
        else:
            x = x[:, 0]
        return self.classifier(self.head(x))


def modernbert(fields: Fields) -> ModernBert:
    """``model_type: modernbert``."""
    dim, layers = fields.size("hidden_size"), fields.size("num_hidden_layers", most=MOST_LAYERS)
    heads = fields.size("num_attention_heads")
    if dim % heads:
        raise fields.fail(f"hidden_size {dim} does not split into {heads} heads")
    context = fields.size("max_position_embeddings", most=MOST_POSITIONS)
    period = fields.size("global_attn_every_n_layers", 3)
    default = ["sliding_attention" if i % period else "full_attention" for i in range(layers)]
    options = Options(
        vocab=fields.size("vocab_size"), dim=dim, hidden=fields.size("intermediate_size"), heads=heads,
        eps=fields.number("norm_eps", 1e-5), act=fields.activation("hidden_activation", "gelu"),
        norm_bias=fields.flag("norm_bias", False), bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False), reach=fields.size("local_attention", 128, most=MOST_POSITIONS) // 2,
        types=layer_types(fields, layers, default),
    )  # fmt: skip
    parameters, scaling = rope_dictionaries(fields)
    ropes = {}
    for kind, name, theta in (("full_attention", "global", 160000.0), ("sliding_attention", "local", 10000.0)):
        given = parameters.get(kind) or scaling or {}
        ropes[kind] = rope(
            fields, f"rope_parameters.{kind}", given, dim // heads, context, fields.number(f"{name}_rope_theta", None), theta
        )
    fields.ignore(
        "embedding_dropout", "mlp_dropout", "classifier_dropout", "decoder_bias", "deterministic_flash_attn",
        "sparse_prediction", "sparse_pred_ignore_index", "initializer_cutoff_factor", "reference_compile",
        "repad_logits_with_grad", "layer_norm_eps", "tie_word_embeddings", "gradient_checkpointing",
        "position_embedding_type", "sentence_transformers",
    )  # fmt: skip
    pooling = fields.take("classifier_pooling", str, "cls")
    if pooling not in ("cls", "mean"):
        raise fields.fail(f"classifier_pooling is {pooling!r}; there are cls and mean")
    model = ModernBert(options, ropes)
    model.head = (pooling, fields.activation("classifier_activation", "gelu"), fields.flag("classifier_bias", False))
    fields.finish("modernbert")
    return model
