"""Programs from which no cache can be derived: refused by node, reason and line."""

from __future__ import annotations

import math

import pytest
from test_kv_cache import DIM, PASSES, VOCAB
from wasat.frontend import nn
from wasat.ir import IRError
from wasat.passes import DeriveKVCache, PassError, PassManager

from wasat.testing import random_program


class _Model(nn.Module):
    def __init__(self) -> None:
        self.embed = nn.Embedding(VOCAB, DIM)
        self.conv = nn.Conv1d(DIM, DIM, 3, padding="same")

    def heads(self, tokens: nn.Tensor) -> nn.Tensor:
        return self.embed(tokens).heads(2)


class Bidirectional(_Model):
    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.heads(tokens)
        return nn.attention(x, x, x).merge()  # here


class MaskNotUnderstood(_Model):
    """The squares of places in order, as the places are: no later one, but that is not seen."""

    joined = False

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x, at = self.heads(tokens).swap(1, 2), nn.positions(tokens)
        keep = at[None, :] * at[None, :] <= at[:, None] * at[:, None]
        keep = nn.causal(at) & keep if self.joined else keep
        return (nn.softmax(nn.where(keep, x @ x.T, -math.inf)) @ x).swap(1, 2).merge()  # here


class MeanOverSequence(_Model):
    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        return x - x.mean(axis=1, keepdims=True)  # here


class Convolution(_Model):
    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        return self.conv(self.embed(tokens).swap(1, 2)).swap(1, 2)


class LookAtNext(_Model):
    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        return nn.concat([x[:, 1:], x[:, :1]], axis=1)  # here


class LengthDependent(_Model):
    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        return nn.softmax(x, axis=1)  # here


class Unfused(_Model):
    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.heads(tokens).swap(1, 2)
        keep = nn.causal(nn.positions(tokens))
        return (nn.softmax(nn.relu(nn.where(keep, x @ x.T, -math.inf))) @ x).swap(1, 2).merge()  # here


REFUSED = [
    (Bidirectional, "it is bidirectional: a token attends to later ones"),
    (MaskNotUnderstood, "it is bidirectional: a token attends to later ones, as far as its mask is understood; if that looks"),
    (MeanOverSequence, "it reduces over the sequence"),
    (Convolution, "it is a convolution over the sequence"),
    (LookAtNext, "it takes a part of the sequence"),
    (LengthDependent, "it works across the sequence"),
    (Unfused, "a token meets later ones: where a key is later, 0 stands in it, not -inf; if this is attention, explain says"),
]


@pytest.mark.parametrize("model, reason", REFUSED, ids=lambda x: getattr(x, "__name__", None))
def test_what_looks_ahead_is_refused(model: type[nn.Module], reason: str) -> None:
    """By node, reason and the line of the model; the program stays as it was."""
    program = nn.trace(model(), {"tokens": "i64[b, s]"}, outputs=["y"])
    PassManager(PASSES).run(program)
    before = str(program)
    with pytest.raises(IRError, match="no KV cache can be derived for output y") as e:
        PassManager([DeriveKVCache()]).run(program)
    assert reason in str(e.value)
    assert f"in {model.__name__}.__call__" in str(e.value)
    assert str(program) == before


class MaskJoined(MaskNotUnderstood):
    joined = True


def test_a_mask_that_is_not_understood_joined_with_a_causal_one() -> None:
    """What the refusal says to do."""
    program = nn.trace(MaskJoined(), {"tokens": "i64[b, s]"}, outputs=["y"])
    PassManager([*PASSES, DeriveKVCache()]).run(program)
    assert set(program.graphs) == {"prefill", "decode"}


BASE = """graph @forward(%tokens: i64[b, s], %x: f32[b, s, 2, 8], %m: bool[b, 1, 1, n], %memory: f32[b, n, 2, 8]) {
  %y: f32[b, s, 2, 8] = attention(%x, %x, %x) {scale=1.0, causal=true}
  %z: f32[b, s, 2, 8] = attention(%y, %memory, %memory, %m) {scale=1.0}
  return %z
}
"""


_DISTANCE = """  %i: i64[s] = iota() {size=s}
  %q: i64[s, 1] = reshape(%i) {shape=(s, 1)}
  %k: i64[1, s] = reshape(%i) {shape=(1, s)}
  %d: i64[s, s] = sub(%q, %k)
"""


TEXT_REFUSED = {
    "causal over a memory": ([("%m) {scale=1.0}", "%m) {scale=1.0, causal=true}")], "causal over keys that do not run"),
    "a window over a memory": ([("%m) {scale=1.0}", "%m) {scale=1.0, window=3}")], "causal over keys that do not run"),
    "a norm along the sequence": (
        [("  return %z", "  %t: f32[b, 2, 8, s] = transpose(%z) {perm=(0, 2, 3, 1)}\n"
          "  %w: f32[b, 2, 8, s] = rms_norm(%t)\n  return %w")], "works across the sequence",
    ),
    "positions on another axis": (
        [("= attention(%x, %x, %x) {scale=1.0, causal=true}", "= transpose(%t) {perm=(1, 0, 2, 3)}"),
         ("  %y", "  %t0: f32[s, b, 2, 8] = transpose(%x) {perm=(1, 0, 2, 3)}\n"
          "  %t: f32[s, b, 2, 8] = attention(%t0, %t0, %t0) {scale=1.0, causal=true}\n  %y")],
        "q are not axis 1",
    ),
    "two sizes of the sequence": ([("%m: bool[b, 1, 1, n]", "%m: bool[b, 1, s, s]"), ("%memory, %memory", "%x, %x")],
                                  "must be the size of just one axis"),
    "twice the sequence": ([("return %z", "%w: f32[2*b*s, 8] = reshape(%z) {shape=(2*b*s, 8)}\n  return %w")],
                           "it merges the sequence with another axis"),
    "the number of tokens": ([("return %z", "%w: i64[] = dim_size() {size=s}\n  return %w")], "depends on s, the number"),
    "a running sum": ([("return %z", "%w: f32[b, s, 2, 8] = cumsum(%z) {axis=1, reverse=true}\n  return %w")],
                      "works across the sequence"),
    "a relation of positions as a result": (
        [("  return %z", _DISTANCE + "  return %z, %d")], "it relates positions to each other",
    ),
    "tokens added to a relation of positions": (
        [("  %y", _DISTANCE + "  %ti: i64[b, s] = add(%tokens, 1:i64)\n  %t1: i64[b, s, 1] = reshape(%ti) {shape=(b, s, 1)}\n"
          "  %t2: i64[b, s, s] = add(%t1, %d)\n  %y"), ("return %z", "return %z, %t2")],
        "it relates tokens to each other",
    ),
    "a relation of three positions": (
        [("  %y", _DISTANCE + "  %i3: i64[s, 1, 1] = reshape(%i) {shape=(s, 1, 1)}\n  %d3: i64[s, s, s] = add(%d, %i3)\n  %y"),
         ("return %z", "return %z, %d3")], "it relates more than two positions",
    ),
    "a mask over heads and keys": (
        [("  %y", _DISTANCE + "  %f: f32[s, s] = cast(%d) {dtype=f32}\n"
          "  %bias: f32[s, 1, s] = reshape(%f) {shape=(s, 1, s)}\n  %y"),
         ("(%x, %x, %x)", "(%x, %x, %x, %bias)")],
        "on an axis that is neither that of queries nor that of keys",
    ),
    "a sum over keys": (
        [("  %z", _DISTANCE + "  %f: f32[s, s] = cast(%d) {dtype=f32}\n"
          "  %n: f32[s, 1] = reduce_sum(%f) {axes=(1,), keepdims=true}\n  %z"),
         ("%memory, %memory, %m)", "%memory, %memory, %n)")],
        "where a key is later, it is not known what stands in it, not 0",
    ),
    "picked by index": ([("return %z", "%i: i64[n] = iota() {size=n}\n"
                          "  %w: f32[b, n, 2, 8] = gather(%z, %i) {axis=1}\n  return %w")],
                        "it picks from the sequence by index"),
    "the last token given to all": (
        [("return %z", "%l: f32[b, 1, 2, 8] = slice(%z) {starts=(0, s - 1, 0, 0), stops=(b, s, 2, 8)}\n"
          "  %w: f32[b, s, 2, 8] = add(%z, %l)\n  return %w")], "it gives every token what stands at the last one",
    ),
    "the last token and how many there are": (
        [("return %z", "%l: f32[b, 1, 2, 8] = slice(%z) {starts=(0, s - 1, 0, 0), stops=(b, s, 2, 8)}\n"
          "  %w: f32[b, s, 2, 8] = broadcast_to(%l) {shape=(b, s, 2, 8)}\n  return %w")], "depends on s, the number of tokens",
    ),
    "the last but one": (
        [("return %z", "%w: f32[b, 1, 2, 8] = slice(%z) {starts=(0, s - 2, 0, 0), stops=(b, s - 1, 2, 8)}\n  return %w")],
        "it takes a part of the sequence",
    ),
    "the last two": (
        [("return %z", "%w: f32[b, 2, 2, 8] = slice(%z) {starts=(0, s - 2, 0, 0), stops=(b, s, 2, 8)}\n  return %w")],
        "it takes a part of the sequence",
    ),
    "the last token, rows on another axis": (
        [("return %z", "%l: f32[b, 1, 2, 8] = slice(%z) {starts=(0, s - 1, 0, 0), stops=(b, s, 2, 8)}\n"
          "  %w: f32[1, b, 2, 8] = transpose(%l) {perm=(1, 0, 2, 3)}\n  return %w")], "its rows must be its first axis",
    ),
    "a mean of each row beside": (
        [("return %z", "%w: f32[b, 2, 8] = reduce_mean(%z) {axes=(1,)}\n  return %z, %w")], "it reduces over the sequence",
    ),
    "a mean over all": (
        [("return %z", "%w: f32[] = reduce_mean(%z) {axes=(0, 1, 2, 3)}\n  return %w")], "it reduces over the sequence",
    ),
    "padding": ([("return %z", "%w: f32[b, s + 1, 2, 8] = pad(%z) {low=(0, 1, 0, 0), high=(0, 0, 0, 0)}\n  return %w")],
                "it pads the sequence"),
}  # fmt: skip


@pytest.mark.parametrize("edits, reason", TEXT_REFUSED.values(), ids=TEXT_REFUSED)
def test_text_refused(edits: list[tuple[str, str]], reason: str) -> None:
    text = BASE
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(IRError) as e:
        PassManager([DeriveKVCache()]).run(random_program(text))
    assert reason in str(e.value)


def test_base_of_the_refusals_is_accepted() -> None:
    PassManager([DeriveKVCache()]).run(random_program(BASE))


def test_wrong_programs() -> None:
    with pytest.raises(PassError, match="there is no graph @forward; there are @other"):
        PassManager([DeriveKVCache()]).run(random_program(BASE.replace("@forward", "@other")))
    with pytest.raises(PassError, match="a chunk holds at least one token"):
        PassManager([DeriveKVCache(chunk=0)]).run(random_program(BASE))
    with pytest.raises(IRError, match="0 inputs that could be its tokens"):
        PassManager([DeriveKVCache()]).run(random_program(BASE.replace("%tokens: i64[b, s], ", "")))
    with pytest.raises(PassError, match="already has a graph @decode"):
        PassManager([DeriveKVCache()]).run(random_program(BASE + BASE.replace("@forward", "@decode")))
