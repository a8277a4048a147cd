"""The decoder that most families of language models are: a family is a set of options. Names are the checkpoints'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from wasat.frontend import nn

from .encoders import put, seen
from .layout import Laid
from .shortconv import Short, ShortConvolution

PRE = ("input_layernorm", None, "post_attention_layernorm", None)
"""Norms before attention and before the feed-forward layer."""
POST = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
"""Norms of what they give."""
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Names:
    """What a checkpoint calls the parts."""

    root: str = "model"
    embed: str = "embed_tokens"
    layers: str = "layers"
    attention: str = "self_attn"
    feed: str = "mlp"
    qkv: str = "qkv_proj"
    head: str = "lm_head"
    table: str = ""
    """Of learned positions."""
    embed_norm: str = ""
    """Of a norm of what the embedding gives."""
    buffers: tuple[str, ...] = ()
    """Ends of names of tensors that follow from the configuration, and are stored all the same."""

    def stands_for_nothing(self, name: str) -> bool:
        """Whether a checkpoint's tensor is one of these."""
        return name.endswith(self.buffers)


@dataclass(frozen=True)
class Experts:
    """A mixture in place of the feed-forward layer."""

    count: int
    chosen: int
    hidden: int
    shares: nn.experts.Shares
    shared: int = 0
    """Width of a gated layer that every token goes through; 0: there is none."""
    names: tuple[str, ...] = ("mlp", "gate", "gate_proj", "up_proj", "down_proj")
    """Of the layer, of the router, and of an expert's three matrices."""
    shared_name: str = "shared_expert"
    shared_gate: bool = True
    shared_beside: tuple[str, str] | None = None
    """That layer's gate and what it gates, in one matrix, and its way down, where these stand beside the experts."""
    since: int = 0
    """The first layer that has experts."""
    scoring: Literal["softmax", "sigmoid"] | None = None
    """How scores become shares where experts are chosen by groups; None: ``shares`` says it."""
    groups: int = 1
    best: int = 1
    """Groups that the experts are in, and of how many of these a token's may be."""
    group_top: int = 1
    """How many of a group's best experts make its score."""
    correction: bool = False
    """A number for each expert is added to its share where experts are chosen."""
    normalized: bool = False
    factor: float = 1.0
    """Shares are made to sum to 1; are multiplied by."""
    stacks: tuple[str, str, bool] | None = None
    """What a checkpoint calls gates and what they gate, of all experts in one tensor, one after the other, the ways down, and
    whether these are [in, out]; None: an expert has matrices of its own."""
    enters: bool = False
    """A token's one expert reads it times its share, a sigmoid, and its result is taken as it is (Llama 4)."""
    without: frozenset[int] = frozenset()
    """Layers that have none."""
    clamped: tuple[float, float] | None = None
    """gpt-oss's gate: x sigmoid(a x) * (up + 1), within a limit: a and the limit. Router and experts have biases, and a
    checkpoint has gates and what they gate in turns, in one tensor for all experts."""


@dataclass(frozen=True)
class Latent:
    """Keys and values made of few numbers a token (multi-head latent attention, arXiv:2405.04434)."""

    rank: int
    """Of keys and values."""
    query_rank: int | None
    """None: queries are made of the input as it is."""
    plain: int
    turned: int
    """Elements of a head's queries and keys that are not rotated, and that are: all heads' keys are the same in these."""
    value: int
    """Elements of a head's values."""
    eps: float = 1e-6


@dataclass(frozen=True)
class Options:
    """Sizes and switches of a decoder."""

    vocab: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    act: str
    tied: bool
    windows: Sequence[int | None]
    """One per layer; None sees everything before."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    norm: Literal["rms", "layer", "plain"] = "rms"
    """Root-mean-square; layer normalization; that without a scale."""
    norm_bias: bool = False
    norm_offset: float = 0.0
    """Added to the scales of norms."""
    norms: tuple[str | None, ...] = PRE
    """Before attention, of what it gives; before the feed-forward layer, of what that gives. None: there is none."""
    final: str = "norm"
    parallel: bool = False
    """Attention and the feed-forward layer read the same, and are added together."""
    qk_norm: Literal["", "head", "turned", "width", "plain"] = ""
    """Norms of queries and keys: of each head, of each head once it is turned, of all heads together; of those that are turned,
    without a scale."""
    qk_names: tuple[str, str] = ("q_norm", "k_norm")
    fused_qkv: Literal["", "parts", "groups", "quarters"] = ""
    """One matrix gives queries, keys and values: one after the other, or those of each key head, or queries, values and keys of
    each quarter of the heads."""
    clip: float | None = None
    """Queries, keys and values stay within."""
    out: str = "o_proj"
    mlp: tuple[str, ...] = GATED
    """A gate, what it gates and the way down; of two: both of the former in one matrix where ``fused_mlp``, else no gate."""
    fused_mlp: bool = False
    experts: Experts | None = None
    scale: float | None = None
    """Of scores; None: by the size of a head."""
    sinks: bool = False
    """A logit for each head takes weight from the keys."""
    slopes: tuple[float, ...] = ()
    """ALiBi: scores grow by so much for each position of the key, a head each (arXiv:2108.12409)."""
    slopes_bf16: bool = False
    """That is rounded to bf16, and scaled like scores."""
    latent: Latent | None = None
    short: Short | None = None
    chunks: Sequence[int | None] = ()
    """Of layers whose tokens see those of their own piece of so many alone."""
    tempered: tuple[float, float] | None = None
    """Queries of layers that are not rotated grow: by how much, and each so many tokens (arXiv:2501.19399)."""
    table: int = 0
    shift: int = 0
    """Rows of a table of learned positions, added to embeddings, and the row of the first."""
    swapped: bool = False
    """A checkpoint has matrices of layers as [in, out]."""
    names: Names = Names()
    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    """Factors of embeddings, of what is added to a layer's input, of logits."""


def _norm(o: Options, dim: int = 0) -> Any:
    dim = dim or o.dim
    if o.norm == "rms":
        return nn.RMSNorm(dim, o.eps, o.norm_offset)
    if o.norm == "plain":
        return lambda x: nn.layer_norm(x, eps=o.eps)
    return OffsetNorm(dim, o.eps, o.norm_bias) if o.norm_offset else nn.LayerNorm(dim, o.eps, o.norm_bias)


class OffsetNorm(nn.LayerNorm):
    """Layer normalization whose scale is ``offset`` + weight."""

    offset = 1.0

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return nn.layer_norm(x, self.weight + self.offset if self.offset else self.weight, self.bias, self.eps)


class Swapped(nn.Linear):
    """A linear layer that a checkpoint has as [in, out]."""


def _linear(o: Options, *sizes: Any) -> nn.Linear:
    return (Swapped if o.swapped else nn.Linear)(*sizes)


class SelfAttention(nn.Module):
    """Grouped-query attention to what came before, or to a whole ``text`` (bool ``[b, 1, s]``, which keys are of it): ``x[b, s,
    dim]``, positions i64 ``[s]`` -> ``[b, s, dim]``."""

    def __init__(self, o: Options, window: int | None, rope: nn.RoPE | None, chunk: int | None = None) -> None:
        self.heads, self.kv_heads, self.window, self.rope, self.clip = o.heads, o.kv_heads, window, rope, o.clip
        self.scale = o.head_dim**-0.5 if o.scale is None else o.scale
        self.turned, self.width = o.qk_norm == "turned", o.qk_norm == "width"
        self.plain = o.eps if o.qk_norm == "plain" and rope is not None else None
        self.chunk, self.tempered = chunk, o.tempered if rope is None else None
        widths = [n * o.head_dim for n in (o.heads, o.kv_heads, o.kv_heads)]
        self.fused, self.order = widths if o.fused_qkv else [], o.fused_qkv
        names = ((o.names.qkv, sum(widths)),) if o.fused_qkv else zip(("q_proj", "k_proj", "v_proj"), widths)
        self.products = [put(self, name, _linear(o, o.dim, n, o.qkv_bias)) for name, n in names]
        self.out = put(self, o.out, _linear(o, o.heads * o.head_dim, o.dim, o.out_bias))
        self.sinks = nn.Parameter((o.heads,), std=1.0) if o.sinks else None
        self.slopes, self.bf16 = np.array(o.slopes, np.float32), o.slopes_bf16
        sizes = [] if o.qk_norm in ("", "plain") else widths if self.width else [o.head_dim] * 2
        self.norms = [put(self, name, _norm(o, n)) for name, n in zip(o.qk_names, sizes)]

    def __call__(self, x: nn.Tensor, positions: nn.Tensor, text: nn.Tensor | None = None) -> nn.Tensor:
        fused = self._parts(self.products[0](x)) if self.fused else ()
        found = []
        for i, heads in enumerate((self.heads, self.kv_heads, self.kv_heads)):
            part = fused[i] if fused else self.products[i](x)
            part = self.norms[i](part) if self.width and i < 2 else part
            part = part if self.clip is None else nn.clip(part, -self.clip, self.clip)
            found.append(part.heads(heads))
        q, k, v = found
        of_heads = self.norms if not self.width else []
        if of_heads and not self.turned:
            q, k = of_heads[0](q), of_heads[1](k)
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        if of_heads and self.turned:
            q, k = of_heads[0](q), of_heads[1](k)
        if self.plain is not None:
            q, k = (nn.rms_norm(part, eps=self.plain) for part in (q, k))
        if self.tempered is not None:
            grows, each = self.tempered
            steps = nn.floor((positions + 1).cast("f32") / each)
            q = q * (nn.log(steps + 1.0) * grows + 1.0)[:, None, None]
        keep = text if text is not None else nn.causal(positions) & nn.within(positions, self.window)
        if self.chunk is not None:
            piece = positions // self.chunk
            keep = keep & (piece[:, None] == piece[None, :])
        y = nn.attention(q, k, v, keep, scale=self.scale, bias=self._bias(positions), sinks=self.sinks)
        out: nn.Tensor = self.out(y.merge())
        return out

    def _parts(self, x: nn.Tensor) -> tuple[nn.Tensor, ...]:
        """Queries, keys and values ``[b, s, width]`` of what one matrix gives."""
        if self.order == "parts":
            return x.split(self.fused)
        b, s, _ = x.shape
        if self.order == "quarters":
            q, v, k = x.reshape(b, s, 4, sum(self.fused) // 4).split(3)
            return tuple(p.reshape(b, s, n) for p, n in zip((q, k, v), self.fused))
        per = self.heads // self.kv_heads
        head = sum(self.fused) // self.kv_heads // (per + 2)
        parts = x.reshape(b, s, self.kv_heads, (per + 2) * head).split((per * head, head, head))
        return tuple(p.reshape(b, s, n) for p, n in zip(parts, self.fused))

    def _bias(self, positions: nn.Tensor) -> nn.Tensor | None:
        """What ALiBi adds to scores, ``[h, 1, s]`` or ``[h, s, s]``."""
        if not self.slopes.size:
            return None
        slopes = nn.constant(self.slopes[:, None, None])
        if not self.bf16:
            return slopes * (positions[None, :] - positions[:, None]).cast(slopes.dtype)
        grown = slopes.cast("bf16") * positions[None, None, :].cast("bf16")
        return grown.cast("f32") * self.scale


class FeedForward(nn.Module):
    """``down(act(gate(x)) * up(x))``, or without a gate ``down(act(up(x)))``."""

    def __init__(self, o: Options, hidden: int = 0) -> None:
        hidden = hidden or o.hidden
        self.act, self.fused = nn.layers.activation(o.act), o.fused_mlp
        *ups, down = o.mlp
        width = 2 * hidden if o.fused_mlp else hidden
        self.ups = [put(self, name, _linear(o, o.dim, width, o.mlp_bias)) for name in ups]
        self.down = put(self, down, _linear(o, hidden, o.dim, o.mlp_bias))

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        first, *second = self.ups[0](x).split(2) if self.fused else (self.ups[0](x),)
        y = self.act(first)
        for gated in (*second, *(up(x) for up in self.ups[1:])):
            y = y * gated
        out: nn.Tensor = self.down(y)
        return out


class Mixture(nn.MoE):
    """Experts, perhaps beside a layer for all tokens with a gate of its own."""

    def __init__(self, o: Options, e: Experts) -> None:
        super().__init__(o.dim, e.hidden, e.count, e.chosen, o.act, e.shares, bias=e.clamped is not None)
        self.experts = e
        self.router = nn.Linear(o.dim, e.count, e.clamped is not None)
        self.correction = nn.Parameter((e.count,), std=0.1) if e.correction else None
        self.shared = put(self, e.shared_name, FeedForward(o, e.shared)) if e.shared else None
        self.shared_expert_gate = nn.Linear(o.dim, 1) if e.shared and e.shared_gate else None
        router, *matrices = e.names[1:]
        stacks = ("gate_proj", "up_proj", "down_proj")
        self.stored: dict[str, list[str] | Laid] = {
            "router.weight": [f"{router}.weight"], "router.bias": [f"{router}.bias"],
            "correction": [f"{router}.e_score_correction_bias"],
        }  # fmt: skip
        """What a checkpoint calls a parameter, or what it is a stack of, or how it has it; ``../``: beside this layer."""
        if e.shared and e.shared_beside is not None:
            both, down = (f"../{name}.weight" for name in e.shared_beside)
            self.stored |= {
                f"{e.shared_name}.gate_proj.weight": Laid(both, False, 0, 2, True, 0),
                f"{e.shared_name}.up_proj.weight": Laid(both, False, 1, 2, True, 0),
                f"{e.shared_name}.down_proj.weight": [down],
            }  # fmt: skip
        if e.stacks is not None:
            both, down, swapped = e.stacks
            self.stored |= {
                "gate_proj": Laid(both, swapped, 0, 2, True), "up_proj": Laid(both, swapped, 1, 2, True),
                "down_proj": Laid(down, swapped),
            }  # fmt: skip
        elif e.clamped is None:
            self.stored |= {part: [f"experts.{i}.{n}.weight" for i in range(e.count)] for part, n in zip(stacks, matrices)}
        else:
            for part, name, start, step in zip(stacks, ("gate_up_proj", "gate_up_proj", "down_proj"), (0, 1, 0), (2, 2, 1)):
                self.stored[part] = Laid(f"experts.{name}", True, start, step)
                self.stored[part.replace("proj", "bias")] = Laid(f"experts.{name}_bias", False, start, step)

    def route(self, x: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        """The share of each chosen expert ``[..., top_k]``, and which they are."""
        e = self.experts
        if e.enters:
            best, which = nn.top_k(self.router(x), 1)
            return nn.sigmoid(best), which
        if e.scoring is None:
            return super().route(x)
        scores = self.router(x)
        shares = nn.softmax(scores) if e.scoring == "softmax" else nn.sigmoid(scores)
        ranked = shares if self.correction is None else shares + self.correction
        if e.groups > 1:
            apart = ranked.reshape(*ranked.shape[:-1], e.groups, e.count // e.groups)
            of_groups = nn.top_k(apart, e.group_top)[0].sum(-1)
            kept = nn.one_hot(nn.top_k(of_groups, e.best)[1], e.groups).sum(-2)[..., None] > 0
            ranked = nn.where(kept, apart, -math.inf).reshape(*ranked.shape)
        which = nn.top_k(ranked, e.chosen)[1]
        share = nn.take_along(shares, which)
        share = share / (share.sum(-1, keepdims=True) + 1e-20) if e.normalized else share
        return share if e.factor == 1.0 else share * e.factor, which

    def gated(self, gate: nn.Tensor, up: nn.Tensor) -> nn.Tensor:
        """What goes into the way down."""
        if self.experts.clamped is None:
            return super().gated(gate, up)
        alpha, limit = self.experts.clamped
        gate, up = nn.clip(gate, None, limit), nn.clip(up, -limit, limit)
        return (up + 1.0) * (gate * nn.sigmoid(gate * alpha))

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        if self.experts.enters:
            share, which = self.route(x)
            y = self.mixed(x * share, share * 0.0 + 1.0, which)
        else:
            y = super().__call__(x)
        if self.shared is not None:
            all_go: nn.Tensor = self.shared(x)
            y = y + (all_go if self.shared_expert_gate is None else nn.sigmoid(self.shared_expert_gate(x)) * all_go)
        return y


class LatentAttention(nn.Module):
    """Attention whose keys and values are made of ``rank`` numbers a token: ``x[b, s, dim]``, positions -> ``[b, s, dim]``."""

    def __init__(self, o: Options, m: Latent, rope: nn.RoPE | None) -> None:
        self.heads, self.sizes, self.rope = o.heads, m, rope
        self.scale = (m.plain + m.turned) ** -0.5 if o.scale is None else o.scale
        width = o.heads * (m.plain + m.turned)
        if m.query_rank is None:
            self.q_proj: nn.Linear | None = nn.Linear(o.dim, width)
        else:
            self.q_proj = None
            self.q_a_proj = nn.Linear(o.dim, m.query_rank, o.qkv_bias)
            self.q_a_layernorm = nn.RMSNorm(m.query_rank, m.eps)
            self.q_b_proj = nn.Linear(m.query_rank, width)
        self.kv_a_proj_with_mqa = nn.Linear(o.dim, m.rank + m.turned, o.qkv_bias)
        self.kv_a_layernorm = nn.RMSNorm(m.rank, m.eps)
        self.kv_b_proj = nn.Linear(m.rank, o.heads * (m.plain + m.value))
        self.o_proj = nn.Linear(o.heads * m.value, o.dim, o.out_bias)

    def __call__(self, x: nn.Tensor, positions: nn.Tensor) -> nn.Tensor:
        m = self.sizes
        wide = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.q_proj is None else self.q_proj(x)
        q, q_turned = wide.heads(self.heads).split((m.plain, m.turned))
        latent, k_turned = self.kv_a_proj_with_mqa(x).split((m.rank, m.turned))
        k_turned = k_turned.heads(1)
        if self.rope is not None:
            q_turned, k_turned = self.rope(q_turned, positions), self.rope(k_turned, positions)
        k, v = self.kv_b_proj(self.kv_a_layernorm(latent)).heads(self.heads).split((m.plain, m.value))
        k = nn.concat([k, k_turned.broadcast_to(*k.shape[:-1], m.turned)])
        y = nn.attention(nn.concat([q, q_turned]), k, v, nn.causal(positions), scale=self.scale)
        out: nn.Tensor = self.o_proj(y.merge())
        return out


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input."""

    def __init__(self, o: Options, window: int | None, rope: nn.RoPE | None, number: int = 0) -> None:
        self.parallel, self.factor = o.parallel, o.residual
        self.short = o.short if o.short is not None and number in o.short.layers else None
        if self.short is not None:
            self.self_attn = put(self, "conv", ShortConvolution(o.dim, self.short))
        elif o.latent is not None:
            self.self_attn = put(self, o.names.attention, LatentAttention(o, o.latent, rope))
        else:
            chunk = o.chunks[number] if o.chunks else None
            self.self_attn = put(self, o.names.attention, SelfAttention(o, window, rope, chunk))
        e = o.experts
        e = None if e is None or number < e.since or number in e.without else e
        feed = FeedForward(o) if e is None else Mixture(o, e)
        if isinstance(feed, FeedForward) and not o.names.feed:  # its parts are the layer's own
            for name, part in zip(o.mlp, (*feed.ups, feed.down)):
                put(self, name, part)
            self.feed: nn.Module = feed
        else:
            self.feed = put(self, o.names.feed if e is None else e.names[0], feed)
        self.norms = [nn.Identity() if name is None else put(self, name, _norm(o)) for name in o.norms]
        self.apart = o.norms[2] is not None

    def __call__(self, x: nn.Tensor, positions: nn.Tensor, text: nn.Tensor | None = None) -> nn.Tensor:
        before, after, before_feed, after_feed = self.norms
        read = before(x)
        if self.short is not None:
            mixed = after(self.self_attn(read))
        else:
            mixed = after(self.self_attn(read, positions) if text is None else self.self_attn(read, positions, text))
        if self.parallel:
            return x + mixed + self.feed(before_feed(x) if self.apart else read)
        x = x + self._scaled(mixed)
        out: nn.Tensor = x + self._scaled(after_feed(self.feed(before_feed(x))))
        return out

    def _scaled(self, x: nn.Tensor) -> nn.Tensor:
        return x if self.factor == 1.0 else x * self.factor


class Decoder(nn.Module):
    """Token ids i64[b, s] -> hidden states f32[b, s, dim]."""

    pooling = ""
    """What a classifier makes of a text's tokens, where a configuration says it."""

    def __init__(self, o: Options, ropes: Sequence[nn.RoPE | None]) -> None:
        self.dim, self.scale, self.shift = o.dim, o.embedding, o.shift
        self.embed_tokens = put(self, o.names.embed, nn.Embedding(o.vocab, o.dim))
        self.table = put(self, o.names.table, nn.Embedding(o.table, o.dim)) if o.table else None
        self.embed_norm = put(self, o.names.embed_norm, _norm(o)) if o.names.embed_norm else None
        layers = [DecoderLayer(o, w, rope, i) for i, (w, rope) in enumerate(zip(o.windows, ropes))]
        self.layers = put(self, o.names.layers, nn.ModuleList(layers))
        self.last = put(self, o.final, _norm(o))

    def __call__(self, tokens: nn.Tensor, lengths: nn.Tensor | None = None) -> nn.Tensor:
        """With the ``lengths`` i64[b] of texts that are padded on the right, each token sees its whole text."""
        positions = nn.positions(tokens)
        text = None if lengths is None else seen(tokens, lengths)
        x = self.embed_tokens(tokens)
        x = x if self.scale == 1.0 else x * self.scale
        x = x if self.table is None else x + self.table(positions + self.shift)
        x = x if self.embed_norm is None else self.embed_norm(x)
        for layer in self.layers:
            x = layer(x, positions, text)
        out: nn.Tensor = self.last(x)
        return out


class CausalLM(nn.Module):
    """Token ids i64[b, s] -> logits f32[b, s, vocab]."""

    def __init__(self, o: Options, ropes: Sequence[nn.RoPE | None]) -> None:
        self.scale, self.names = o.logits, o.names
        self.context: int | None = min((rope.holds for rope in ropes if rope is not None and rope.holds), default=None)
        """Positions, where they are fewer than ``max_position_embeddings``, or called otherwise."""
        self.unread: tuple[str, ...] = ()
        """Beginnings of names of tensors that are for something else."""
        self.hidden = (put(self, o.names.root, Decoder(o, ropes)),)
        self.lm_head = None if o.tied else put(self, o.names.head, nn.Linear(o.dim, o.vocab, o.head_bias))

    @property
    def model(self) -> Decoder:
        """What makes hidden states, whatever a checkpoint calls it."""
        return self.hidden[0]

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.model(tokens)
        if self.lm_head is None:
            logits = nn.linear(x, self.model.embed_tokens.weight, name="lm_head")
        else:
            logits = self.lm_head(x)
        return logits if self.scale == 1.0 else logits * self.scale
