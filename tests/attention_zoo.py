"""Attention as people write it: one bare block in many spellings, each with what the fused operation must say.

    for case in CASES: program = case.build(); ...; case.expected == {"scale": …, "causal": …, "window": …, "softcap":
    …}

Every block maps ``x[b, s, 32]`` to ``[b, s, 32]`` with 4 query heads of 8 elements: projections, the attention
itself, output projection; nothing else (no layer norm to anchor a pattern on). ``CASES`` are the nine classic
variants, ``MORE`` other spellings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from wasat.frontend import nn

from wasat import ir

DIM, HEADS, HEAD_DIM = 32, 4, 8


@dataclass(frozen=True)
class Case:
    """One spelling: ``build()`` traces it; the rest is what fusion must find in it."""

    name: str
    block: type[Block]
    build: Callable[[], ir.Program]
    scale: float = HEAD_DIM**-0.5
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    mask: bool = False
    """Whether a mask operand remains."""
    sink: bool = False
    """Whether a logit for each head stands beside the keys."""
    kv_heads: int = HEADS
    ropes: int = 0
    """How many ``rope`` operations the block holds (q and k: 2)."""
    norms: int = 0
    """How many ``rms_norm`` operations the block holds."""
    dtype: str = "f32"
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def expected(self) -> dict[str, Any]:
        """Attributes of the fused ``attention``."""
        return {"scale": self.scale, "causal": self.causal, "window": self.window, "softcap": self.softcap,
                "sink": self.sink}  # fmt: skip


class Block(nn.Module):
    """Projections around ``core``, which subclasses write: q[b, s, h, d], k and v[b, s, g, d] -> [b, s, h, d]."""

    kv_heads = HEADS

    def __init__(self, dtype: str = "f32") -> None:
        self.q = nn.Linear(DIM, HEADS * HEAD_DIM, dtype=dtype)
        self.k = nn.Linear(DIM, self.kv_heads * HEAD_DIM, dtype=dtype)
        self.v = nn.Linear(DIM, self.kv_heads * HEAD_DIM, dtype=dtype)
        self.o = nn.Linear(HEADS * HEAD_DIM, DIM, dtype=dtype)

    def __call__(self, x: nn.Tensor, **rest: nn.Tensor) -> nn.Tensor:
        q = self.q(x).heads(HEADS)
        k, v = self.k(x).heads(self.kv_heads), self.v(x).heads(self.kv_heads)
        out: nn.Tensor = self.o(self.core(q, k, v, nn.positions(x), **rest).merge())
        return out

    core: Callable[..., nn.Tensor]


def _rows(*xs: nn.Tensor) -> Iterator[nn.Tensor]:
    """[b, s, h, d] -> [b, h, s, d]."""
    return (x.swap(1, 2) for x in xs)


def _expand(x: nn.Tensor, times: int) -> nn.Tensor:
    """Each of the g heads of [b, s, g, d] repeated: -> [b, s, g*times, d]."""
    b, s, g, d = x.shape
    return x[:, :, :, None, :].broadcast_to(b, s, g, times, d).reshape(b, s, g * times, d)


class Plain(Block):
    """Multi-head, nothing hidden."""

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, k, v)
        return (nn.softmax((q @ k.T) * HEAD_DIM**-0.5) @ v).swap(1, 2)


class CausalAdditive(Block):
    """0 or -inf added to the scores."""

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, k, v)
        mask = nn.where(nn.causal(at), 0.0, -math.inf)
        return (nn.softmax((q @ k.T) * HEAD_DIM**-0.5 + mask) @ v).swap(1, 2)


class CausalSelect(Block):
    """-inf where a key is later than the query."""

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        scores = nn.einsum("b s h d, b t h d -> b h s t", q, k) * HEAD_DIM**-0.5
        probs = nn.softmax(nn.where(nn.causal(at), scores, -math.inf))
        return nn.einsum("b h s t, b t h d -> b s h d", probs, v)


class WideSoftmax(Block):
    """f16 tensors, softmax in f32."""

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, k, v)
        scores = nn.where(nn.causal(at), (q @ k.T) * HEAD_DIM**-0.5, -math.inf)
        return (nn.softmax(scores.cast("f32")).cast("f16") @ v).swap(1, 2)


class GroupedExpand(Block):
    """Two key/value heads, each repeated for two query heads."""

    kv_heads = 2

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, _expand(k, 2), _expand(v, 2))
        scores = nn.where(nn.causal(at), (q @ k.T) * HEAD_DIM**-0.5, -math.inf)
        return (nn.softmax(scores) @ v).swap(1, 2)


class NormRope(Block):
    """RMS norm, then rotary positions, on queries and keys."""

    def __init__(self, dtype: str = "f32") -> None:
        super().__init__(dtype)
        self.q_norm = nn.RMSNorm(HEAD_DIM, dtype=dtype)
        self.k_norm = nn.RMSNorm(HEAD_DIM, dtype=dtype)

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(nn.rope(self.q_norm(q), at), nn.rope(self.k_norm(k), at), v)
        scores = nn.where(nn.causal(at), (q @ k.T) * HEAD_DIM**-0.5, -math.inf)
        return (nn.softmax(scores) @ v).swap(1, 2)


class Sliding(Block):
    """Sees itself and three positions before."""

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, k, v)
        keep = nn.causal(at) & nn.within(at, 4)
        return (nn.softmax(nn.where(keep, (q @ k.T) * HEAD_DIM**-0.5, -math.inf)) @ v).swap(1, 2)


class ScaleOne(Block):
    """No scale at all."""

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, k, v)
        return (nn.softmax(nn.where(nn.causal(at), q @ k.T, -math.inf)) @ v).swap(1, 2)


class Softcap(Block):
    """Scores bounded by 5 * tanh(x / 5)."""

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, k, v)
        scores = nn.tanh((q @ k.T) * HEAD_DIM**-0.5 / 5.0) * 5.0
        return (nn.softmax(nn.where(nn.causal(at), scores, -math.inf)) @ v).swap(1, 2)


class Everything(NormRope):
    """Grouped, normed, rotated, scaled on q, capped, sliding, additive mask, f32 softmax inside f16."""

    kv_heads = 2

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k = nn.rope(self.q_norm(q), at), nn.rope(self.k_norm(k), at)
        q, k, v = _rows(q * 0.5, _expand(k, 2), _expand(v, 2))
        scores = nn.tanh(q @ k.T / 5.0) * 5.0
        mask = nn.where(nn.causal(at) & nn.within(at, 4), nn.constant(0.0, "f16"), -math.inf)
        return (nn.softmax((scores + mask).cast("f32")).cast("f16") @ v).swap(1, 2)


# -- other spellings ---------------------------------------------------------------------------------------------------
class ScaleOnK(Block):
    """The scale applied to the keys."""

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, k * HEAD_DIM**-0.5, v)
        return (nn.softmax(nn.where(nn.causal(at), q @ k.T, -math.inf)) @ v).swap(1, 2)


class ScaleBoth(Block):
    """The square root of the scale on queries and on keys."""

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q * 0.5, k * 0.5, v)
        return (nn.softmax(nn.where(nn.causal(at), q @ k.T, -math.inf)) @ v).swap(1, 2)


class ScaleByDivision(Block):
    """Scores divided by sqrt(d); the mask compares the other way round and is inverted."""

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, k, v)
        later = at[None, :] > at[:, None]
        return (nn.softmax(nn.where(later, -math.inf, (q @ k.T) / 4.0)) @ v).swap(1, 2)


class GroupedEinsum(Block):
    """Grouped queries by einsum; a finite number for minus infinity."""

    kv_heads = 2

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        scores = nn.einsum("b s (g r) d, b t g d -> b (g r) s t", q, k) * HEAD_DIM**-0.5
        probs = nn.softmax(nn.where(nn.causal(at), scores, -1e30))
        return nn.einsum("b (g r) s t, b t g d -> b s (g r) d", probs, v)


class MultiQuery(Block):
    """One key/value head, broadcast by the matrix product."""

    kv_heads = 1

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, k, v)
        scores = nn.where(nn.causal(at), (q @ k.T) * HEAD_DIM**-0.5, -math.inf)
        return (nn.softmax(scores) @ v).swap(1, 2)


class Library(Block):
    """``nn.attention``."""

    kv_heads = 2

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        keep = nn.causal(at) & nn.within(at, 4)
        return nn.attention(nn.rope(q, at), nn.rope(k, at), v, keep, softcap=5.0)


class Padded(Block):
    """Causal, and an input says which keys are real: bool [b, s]."""

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor, real: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, k, v)
        keep = nn.causal(at) & real[:, None, None, :]
        return (nn.softmax(nn.where(keep, (q @ k.T) * HEAD_DIM**-0.5, -math.inf)) @ v).swap(1, 2)


class Sink(Block):
    """A logit for each head joins the scores, and its weight is dropped (gpt-oss)."""

    def __init__(self, dtype: str = "f32") -> None:
        super().__init__(dtype)
        self.sink = nn.Parameter((HEADS,), std=1.0, dtype=dtype)

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, k, v)
        scores = nn.where(nn.causal(at), (q @ k.T) * HEAD_DIM**-0.5, -math.inf)
        column = self.sink[:, None, None].broadcast_to(*scores.shape[:3], 1)
        return (nn.softmax(nn.concat([scores, column], axis=-1))[..., :-1] @ v).swap(1, 2)


class Biased(Block):
    """An additive mask that is an input: f32 [s, s]."""

    def core(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, at: nn.Tensor, bias: nn.Tensor) -> nn.Tensor:
        q, k, v = _rows(q, k, v)
        return (nn.softmax((q @ k.T) * HEAD_DIM**-0.5 + bias) @ v).swap(1, 2)


def _case(name: str, block: type[Block], dtype: str = "f32", inputs: Mapping[str, str] | None = None, **expected: Any) -> Case:
    types = {"x": f"{dtype}[b, s, {DIM}]", **(inputs or {})}
    return Case(
        name,
        block,
        lambda: nn.trace(block(dtype), types, outputs=["y"]),
        dtype=dtype,
        inputs=types,
        kv_heads=block.kv_heads,
        **expected,
    )


CASES = [
    _case("plain", Plain),
    _case("causal_additive", CausalAdditive, causal=True),
    _case("wide_softmax", WideSoftmax, dtype="f16", causal=True),
    _case("grouped_expand", GroupedExpand, causal=True),
    _case("norm_rope", NormRope, causal=True, ropes=2, norms=2),
    _case("sliding", Sliding, causal=True, window=4),
    _case("scale_one", ScaleOne, scale=1.0, causal=True),
    _case("softcap", Softcap, causal=True, softcap=5.0),
    _case("everything", Everything, dtype="f16", scale=0.5, causal=True, window=4, softcap=5.0, ropes=2, norms=2),
]
MORE = [
    _case("causal_select", CausalSelect, causal=True),
    _case("scale_on_k", ScaleOnK, causal=True),
    _case("scale_both", ScaleBoth, scale=0.25, causal=True),
    _case("scale_by_division", ScaleByDivision, scale=0.25, causal=True),
    _case("grouped_einsum", GroupedEinsum, causal=True),
    _case("multi_query", MultiQuery, causal=True),
    _case("library", Library, causal=True, window=4, softcap=5.0, ropes=2),
    _case("padded", Padded, inputs={"real": "bool[b, s]"}, causal=True, mask=True),
    _case("sink", Sink, causal=True, sink=True),
    _case("biased", Biased, inputs={"bias": "f32[s, s]"}, mask=True),
]


BEFORE = """graph @f(%q: f32[b, 4, s, 8], %k: f32[b, 4, t, 8], %v: f32[b, 4, t, 6], %m: bool[b, 1, 1, t]) {
  %kt: f32[b, 4, 8, t] = transpose(%k) {perm=(0, 1, 3, 2)}
  %scores: f32[b, 4, s, t] = matmul(%q, %kt)
  %scaled: f32[b, 4, s, t] = mul(%scores, 0.5:f32)
  %masked: f32[b, 4, s, t] = select(%m, %scaled, -inf:f32)
  %probs: f32[b, 4, s, t] = softmax(%masked) {axis=3}
  %out: f32[b, 4, s, 6] = matmul(%probs, %v)
  return %out
}
"""
"""The plainest spelling: what a near miss changes one thing of."""
DIMS = [{"b": 2, "s": 3, "t": 5}, {"b": 1, "s": 1, "t": 1}]
