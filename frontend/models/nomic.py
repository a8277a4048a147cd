"""Nomic BERT, GTE, Jina 3: BERT's order of norms, with rotary positions, mostly a gate. One model; a family is a set of names
and options. Names are the checkpoints', which transformers 5 keeps."""

from __future__ import annotations

from dataclasses import dataclass

from wasat.frontend import nn

from .config import MOST_LAYERS, MOST_POSITIONS, MOST_SIZE, Fields, single_rope
from .encoders import put, seen


@dataclass(frozen=True)
class Names:
    """What a checkpoint calls the parts: the first norm, its layers, and within one each linear and norm."""

    first: str
    layers: str
    qkv: str
    out: str
    attention_norm: str
    ups: tuple[str, ...]
    """What is gated, and the gate; or both in one."""
    down: str
    norm: str
    gated: bool = True


NOMIC = Names("emb_ln", "encoder.layers", "attn.Wqkv", "attn.out_proj", "norm1", ("mlp.fc11", "mlp.fc12"), "mlp.fc2", "norm2")
GTE = Names(
    "embeddings.LayerNorm", "encoder.layer", "attention.qkv_proj", "attention.o_proj", "attn_ln", ("mlp.up_gate_proj",),
    "mlp.down_proj", "mlp_ln",
)  # fmt: skip
JINA = Names(
    "emb_ln", "encoder.layers", "mixer.Wqkv", "mixer.out_proj", "norm1", ("mlp.fc1",), "mlp.fc2", "norm2", gated=False
)


@dataclass(frozen=True)
class Options:
    """Sizes and switches."""

    vocab: int
    dim: int
    hidden: int
    heads: int
    layers: int
    eps: float
    act: str
    types: int
    """Kinds of tokens: of the first text, of the second; 0: it has none."""
    bias: bool
    """Of attention's products, and of the feed-forward layer's last; where there is no gate, of its first."""


class Layer(nn.Module):
    """Attention over the whole text and a gated feed-forward layer, each added to its input and normalized."""

    def __init__(self, o: Options, n: Names, rope: nn.RoPE) -> None:
        self.heads, self.rope, self.act = o.heads, rope, nn.layers.activation(o.act)
        width = 2 * o.hidden // len(n.ups) if n.gated else o.hidden
        self.gated = n.gated
        self.ups = [put(self, name, nn.Linear(o.dim, width, o.bias and not n.gated)) for name in n.ups]
        self.parts = (
            put(self, n.qkv, nn.Linear(o.dim, 3 * o.dim, o.bias)), put(self, n.out, nn.Linear(o.dim, o.dim, o.bias)),
            put(self, n.attention_norm, nn.LayerNorm(o.dim, o.eps)), put(self, n.down, nn.Linear(o.hidden, o.dim, o.bias)),
            put(self, n.norm, nn.LayerNorm(o.dim, o.eps)),
        )  # fmt: skip

    def __call__(self, x: nn.Tensor, positions: nn.Tensor, keep: nn.Tensor) -> nn.Tensor:
        qkv, out, attention_norm, down, norm = self.parts
        q, k, v = (part.heads(self.heads) for part in qkv(x).split(3))
        x = attention_norm(x + out(nn.attention(self.rope(q, positions), self.rope(k, positions), v, keep).merge()))
        if not self.gated:
            plain: nn.Tensor = norm(x + down(self.act(self.ups[0](x))))
            return plain
        wide, gate = (up(x) for up in self.ups) if len(self.ups) == 2 else self.ups[0](x).split(2)
        y: nn.Tensor = norm(x + down(self.act(gate) * wide))
        return y


class Encoder(nn.Module):
    """``tokens`` i64[b, s], padded on the right, the ``lengths`` i64[b] of the texts, perhaps ``types`` i64[b, s] -> hidden
    states f32[b, s, dim]."""

    def __init__(self, o: Options, n: Names, rope: nn.RoPE) -> None:
        self.dim, self.kinds = o.dim, o.types
        self.words = put(self, "embeddings.word_embeddings", nn.Embedding(o.vocab, o.dim))
        kinds = put(self, "embeddings.token_type_embeddings", nn.Embedding(o.types, o.dim)) if o.types else None
        self.first = kinds, put(self, n.first, nn.LayerNorm(o.dim, o.eps))
        self.stack = put(self, n.layers, nn.ModuleList([Layer(o, n, rope) for _ in range(o.layers)]))

    def __call__(self, tokens: nn.Tensor, lengths: nn.Tensor, types: nn.Tensor | None = None) -> nn.Tensor:
        positions, keep, x = nn.positions(tokens), seen(tokens, lengths), self.words(tokens)
        kinds, norm = self.first
        if kinds is not None:
            x = x + (kinds(types) if types is not None else kinds.weight[0])
        x = norm(x)
        for layer in self.stack:
            x = layer(x, positions, keep)
        return x


def _built(fields: Fields, names: Names, family: str, act: str, theta: float, types: int, bias: bool) -> Encoder:
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if dim % heads:
        raise fields.fail(f"hidden_size {dim} does not split into {heads} heads")
    size = fields.size("head_dim", None)
    if size not in (None, dim // heads):
        raise fields.fail(f"head_dim is {size}; {dim} features are {heads} heads of {dim // heads}")
    options = Options(
        vocab=fields.size("vocab_size"), dim=dim, hidden=fields.size("intermediate_size"), heads=heads,
        layers=fields.size("num_hidden_layers", most=MOST_LAYERS), eps=fields.number("layer_norm_eps", 1e-12),
        act=fields.activation("hidden_act", act), types=fields.take("type_vocab_size", int, types, least=0, most=MOST_SIZE),
        bias=bias,
    )  # fmt: skip
    turn = single_rope(fields, dim // heads, fields.size("max_position_embeddings", most=MOST_POSITIONS), theta)
    fields.ignore(
        "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "tie_word_embeddings",
        "sentence_transformers",
    )  # fmt: skip
    fields.finish(family)
    return Encoder(options, names, turn)


def _published(fields: Fields) -> None:
    """Nomic's configuration as its authors wrote it, with GPT-2's names, as transformers has it."""
    names = {
        "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers", "layer_norm_epsilon": "layer_norm_eps", "rotary_emb_base": "rope_theta",
    }  # fmt: skip
    for old, new in names.items():
        fields.given[new] = fields.given.pop(old, fields.given.get(new))
    given, trained = fields.size("n_positions", most=MOST_POSITIONS), fields.size("max_trained_positions", 2048)
    # longer texts would be rotated otherwise, each by its length
    stretched = fields.number("rotary_scaling_factor", None) is not None
    fields.given["max_position_embeddings"] = min(given, trained) if stretched else given
    fields.given["hidden_act"] = "silu"
    for name, only in (
        ("activation_function", "swiglu"), ("rotary_emb_fraction", 1.0), ("rotary_emb_interleaved", False), ("prenorm", False),
        ("rotary_emb_scale_base", None), ("parallel_block", False), ("parallel_block_tied_norm", False),
        ("qkv_proj_bias", False), ("mlp_fc1_bias", False),
        ("mlp_fc2_bias", False), ("use_rms_norm", False), ("causal", False), ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False), ("last_layer_subset", False), ("num_experts", 0),
    ):
        fields.refuse(name, only, "Nomic's text encoders as published have no other")
    fields.ignore(
        "attn_pdrop", "embd_pdrop", "resid_pdrop", "dense_seq_output", "fused_bias_fc", "fused_dropout_add_ln",
        "pad_vocab_size_multiple", "use_flash_attn", "use_xentropy", "reorder_and_upcast_attn", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    )  # fmt: skip


def nomic_bert(fields: Fields) -> Encoder:
    """``model_type: nomic_bert``."""
    if "n_embd" in fields.given:
        _published(fields)
    return _built(fields, NOMIC, "nomic_bert", "silu", 1000.0, 2, False)


def gte(fields: Fields) -> Encoder:
    """``model_type: gte``."""
    return _built(fields, GTE, "gte", "gelu", 160000.0, 1, True)


def gte_of_its_authors(fields: Fields) -> Encoder:
    """``model_type: new``, GTE's first name: rotation may be stretched by a larger base (https://kexue.fm/archives/9706)."""
    for name, only in (
        ("position_embedding_type", "rope"), ("logn_attention_scale", False), ("logn_attention_clip1", False),
        ("pack_qkv", True), ("layer_norm_type", "layer_norm"),
    ):
        fields.refuse(name, only, "GTE's encoders as published have no other")
    fields.ignore("unpad_inputs", "use_memory_efficient_attention")  # how it is computed
    given = fields.given.pop("rope_scaling", None)
    if given is not None:
        p = Fields(given, f"{fields.where}: rope_scaling", frozenset()) if isinstance(given, dict) else None
        if p is None or p.take("type", str) != "ntk":
            raise fields.fail(f"rope_scaling is {given!r}; only type ntk is implemented for it")
        p.refuse("mixed_b", None, "only one base for all frequencies is implemented")
        factor, theta = p.number("factor"), fields.number("rope_theta", 10000.0)
        p.finish("rope_scaling")
        pairs = fields.size("hidden_size") / fields.size("num_attention_heads") / 2
        fields.given["rope_theta"] = theta * factor
        fields.given["rope_scaling"] = {"rope_type": "linear", "factor": factor ** (1 / pairs)}
    return _built(fields, GTE, "new", "gelu", 10000.0, 1, True)


def jina_embeddings_v3(fields: Fields) -> Encoder:
    """``model_type: jina_embeddings_v3``, as transformers 5 has it: without the adapters of single tasks."""
    fields.given.setdefault("layer_norm_eps", 1e-5)
    return _built(fields, JINA, "jina_embeddings_v3", "gelu", 20000.0, 1, True)
