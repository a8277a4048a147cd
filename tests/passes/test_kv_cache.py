"""KV-cache derivation: incremental equals full in any chunking; what looks ahead is refused, by node and line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wasat.frontend import nn
from wasat.ir import DType, Program, evaluate
from wasat.passes import Cleanup, DeriveKVCache, FuseAttention, FuseNorm, FuseRope, PassManager

from wasat.testing import random_program

VOCAB, DIM = 11, 16


class Layer(nn.Module):
    def __init__(self, window: int | None, rope: nn.RoPE | None) -> None:
        self.norm = nn.RMSNorm(DIM)
        self.attention = nn.Attention(DIM, 4, 2, 4, window=window, rope=rope, qk_norm=1e-6, softcap=20.0)
        self.mlp = nn.GLU(DIM, 24)

    def __call__(self, x: nn.Tensor, positions: nn.Tensor) -> nn.Tensor:
        x = x + self.attention(self.norm(x), positions)
        return x + self.mlp(x)


class Decoder(nn.Module):
    """Windows 3, none, 3; rotary or learned positions."""

    def __init__(self, learned: bool = False) -> None:
        self.embed = nn.Embedding(VOCAB, DIM)
        self.places = nn.Embedding(64, DIM) if learned else None
        rope = None if learned else nn.RoPE(4)
        self.layers = nn.ModuleList([Layer(w, rope) for w in (3, None, 3)])
        self.head = nn.Linear(DIM, VOCAB, bias=True)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x, at = self.embed(tokens), nn.positions(tokens)
        if self.places is not None:
            x = x + self.places(at)
        for layer in self.layers:
            x = layer(x, at)
        return self.head(x)


class Biased(nn.Module):
    """Scores with a table's numbers by the distance and the head, by the key alone, or hidden where a predicate says."""

    def __init__(self) -> None:
        self.embed = nn.Embedding(VOCAB, DIM)
        self.distances = nn.Embedding(8, 2)
        self.head = nn.Linear(DIM, VOCAB)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        at = nn.positions(tokens)
        key, query = at[None, :], at[:, None]
        table = self.distances(nn.minimum(nn.maximum(query - key, 0), 7)).transpose(2, 0, 1)[None]
        joined = nn.concat([key.cast("f32") * 0.3, key.cast("f32") * -0.2], axis=0)[:, None]  # of each head: [2, 1, s]
        own = (None, table), (3, table), (3, key.cast("f32") * 0.3), (None, (query - key) % 3 < 2), (3, joined)
        for window, bias in own:
            h = x.heads(2).swap(1, 2)
            scores = h @ h.T * 0.4
            keep = nn.causal(at) if window is None else nn.causal(at) & nn.within(at, window)
            if bias.dtype is DType.BOOL:
                keep = keep & bias
            else:
                scores = scores + bias
            x = x + (nn.softmax(nn.where(keep, scores, -math.inf)) @ h).swap(1, 2).merge()
        return self.head(x)


class Outputs(nn.Module):
    """The last logits alone, hidden states of all tokens, a loss over a further input along the sequence."""

    def __init__(self) -> None:
        self.embed, self.layer, self.head = nn.Embedding(VOCAB, DIM), Layer(None, nn.RoPE(4)), nn.Linear(DIM, VOCAB)

    def __call__(self, ids: nn.Tensor, positions: nn.Tensor, targets: nn.Tensor) -> dict[str, nn.Tensor]:
        x = self.layer(self.embed(ids) + nn.sinusoid(positions.cast("f32"), DIM), nn.positions(ids))
        every = self.head(x)
        return {
            "logits": self.head(x[:, -1:, ::2].merge() @ nn.full((DIM // 2, DIM), 0.3)),
            "hidden": x,
            "loss": (every - targets[..., None].cast("f32")).mean(),
        }


class Translator(nn.Module):
    """A decoder that attends to an encoded sequence of features."""

    def __init__(self) -> None:
        self.encoder = nn.Linear(6, DIM)
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layer = Layer(None, nn.RoPE(4))
        self.cross = nn.CrossAttention(DIM, 4)
        self.head = nn.Linear(DIM, VOCAB)

    def __call__(self, tokens: nn.Tensor, features: nn.Tensor) -> nn.Tensor:
        memory = nn.gelu(self.encoder(features))
        x = self.layer(self.embed(tokens), nn.positions(tokens))
        return self.head(x + self.cross(x, memory))


class Offset(nn.Module):
    """Positions that begin where an input says, row by row: picked by, rotated by, added to scores and returned."""

    def __init__(self) -> None:
        self.embed, self.places, self.head = nn.Embedding(VOCAB, DIM), nn.Embedding(256, DIM), nn.Linear(DIM, VOCAB)

    def __call__(self, tokens: nn.Tensor, offset: nn.Tensor) -> nn.Tensor:
        at = nn.positions(tokens)
        own = at[None, :] * 2 + offset[:, None]
        x = self.embed(tokens) + self.places(own)
        h = nn.rope(x.heads(2), own).swap(1, 2)
        scores = h @ h.T * 0.4 + (own.cast("f32") * 0.1)[:, None, None, :]
        keep = nn.causal(at)[None] & ((at[None, None, :] >= offset[:, None, None]) | (at < 1))
        x = x + (nn.softmax(nn.where(keep[:, None], scores, -math.inf)) @ h).swap(1, 2).merge()
        return self.head(x) * (own + 1).cast("f32")[..., None]


PASSES = [Cleanup(), FuseNorm(), FuseRope(), FuseAttention(), Cleanup()]
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "rotary": (Decoder, {"tokens": "i64[b, s]"}),
    "learned positions": (lambda: Decoder(learned=True), {"tokens": "i64[b, s]"}),
    "biased": (Biased, {"tokens": "i64[b, s]"}),
    "offset": (Offset, {"tokens": "i64[b, s]", "offset": "i64[b]"}),
    "encoder": (Translator, {"tokens": "i64[b, s]", "features": "f32[b, n, 6]"}),
}


def derived(name: str, chunk: int) -> tuple[Program, Program]:
    """The forward program, and the one with caches."""
    make, inputs = MODELS[name]
    program = nn.trace(make(), inputs, outputs=["logits"])
    program.params = {k: _Cached(p.load()) for k, p in program.params.items()}  # type: ignore[misc]
    forward = Program({"forward": program["forward"].clone()}, program.params)
    PassManager([*PASSES, DeriveKVCache(chunk=chunk), Cleanup()]).run(program)
    return forward, program


class _Cached:
    def __init__(self, x: np.ndarray) -> None:
        from wasat.ir import type_of

        self.x, self.type = x, type_of(x)

    def load(self) -> np.ndarray:
        return self.x


class Session:
    """Feeds tokens to prefill and decode on the interpreter."""

    def __init__(self, program: Program, batch: int, capacity: int, extra: dict[str, np.ndarray]) -> None:
        self.program, self.past = program, np.zeros(batch, np.int64)
        self.params = {k: p.load() for k, p in program.params.items()}
        self.states = {}
        for v in program["decode"].inputs:
            if v.name in set(program.interface.state_names):
                shape = v.tensor.substitute({"b": batch, "c": capacity}).concrete({})
                self.states[v.name] = np.full(shape, 1000, v.tensor.dtype.np)  # what was never written must not matter
        self.memory: dict[str, Any] = dict(extra)
        if "encode" in program.graphs:
            g = program["encode"]
            self.memory = dict(zip(g.output_names, evaluate(g, extra, {k: self.params[k] for k in g.params})))

    def feed(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        g = self.program["decode" if tokens.shape[1] == 1 else "prefill"]
        feeds = {"tokens": tokens, "past": self.past, **self.memory, **self.states}
        if g.name == "prefill":
            feeds["last"] = lengths - 1
        out = dict(zip(g.output_names, evaluate(g, feeds, {k: self.params[k] for k in g.params})))
        self.states = {k: out[k] for k in self.states}
        self.past = self.past + lengths
        return out["logits"]


PROGRAMS = {(name, chunk): derived(name, chunk) for name in MODELS for chunk in (1, 5)}


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_incremental_equals_full(data: st.DataObject) -> None:
    """Any chunking, rows of different lengths padded on the right, rings that wrapped several times."""
    name, chunk = data.draw(st.sampled_from(sorted(PROGRAMS)))
    forward, program = PROGRAMS[name, chunk]
    batch = data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    extra = {"features": rng.standard_normal((batch, 3, 6)).astype(np.float32)} if name == "encoder" else {}
    extra |= {"offset": rng.integers(0, 3, batch)} if name == "offset" else {}
    rows: list[list[int]] = [[] for _ in range(batch)]
    session = Session(program, batch, 64, extra)
    params = {k: p.load() for k, p in forward.params.items()}
    for _ in range(data.draw(st.integers(1, 8))):
        lengths = np.array([data.draw(st.integers(1, chunk)) for _ in range(batch)])
        tokens = rng.integers(0, VOCAB, (batch, lengths.max()))
        got = session.feed(tokens, lengths)
        for r in range(batch):
            rows[r] += tokens[r, : lengths[r]].tolist()
            one = {k: v[r : r + 1] for k, v in extra.items()}
            want = evaluate(forward["forward"], {"tokens": np.array([rows[r]]), **one}, params)[0][0, -1]
            np.testing.assert_allclose(got[r], want, rtol=1e-4, atol=1e-5)


def test_inputs_and_outputs() -> None:
    """Tokens of any name; what stands at the last token; further inputs along the sequence, but not those of a loss."""
    inputs = {"ids": "i32[b, s]", "positions": "i64[b, s]", "targets": "i64[b, s]"}
    program = nn.trace(Outputs(), inputs)
    params = {k: p.load() for k, p in program.params.items()}
    forward = program["forward"].clone()
    report = PassManager([*PASSES, DeriveKVCache(chunk=8), Cleanup()]).run(program)
    assert program.interface.tokens == "ids"
    assert [v.name for v in program["decode"].inputs] == ["ids", "positions", "past", "cache.0.k", "cache.0.v"]
    assert program["decode"].output_names == ["logits", "hidden", "cache.0.k", "cache.0.v"]
    assert report.remarks("missed")[0].message.startswith("output loss is not served: it reduces over the sequence")
    rng = np.random.default_rng(0)
    ids, at = rng.integers(0, VOCAB, (2, 6)).astype(np.int32), rng.integers(0, 50, (2, 6))
    states = [np.zeros((2, 16, 2, 4), np.float32)] * 2
    past, counts = np.zeros(2, np.int64), np.array([[3, 2], [1, 1], [2, 3]])
    for n in counts:
        new = np.zeros((2, n.max()), np.int64), np.zeros((2, n.max()), np.int64)
        for r in range(2):
            part = slice(past[r], past[r] + n[r])
            new[0][r, : n[r]], new[1][r, : n[r]] = ids[r, part], at[r, part]
        g = program["prefill" if n.max() > 1 else "decode"]
        feeds = {"ids": new[0].astype(np.int32), "positions": new[1], "past": past, "last": n - 1}
        feeds |= {"cache.0.k": states[0], "cache.0.v": states[1]}
        got = evaluate(g, {v.name: feeds[v.name] for v in g.inputs}, {k: params[k] for k in g.params})
        states, past = got[2:], past + n
        for r in range(2):
            so_far = [x[r : r + 1, : past[r]] for x in (ids, at)]
            want = evaluate(forward, {"ids": so_far[0], "positions": so_far[1], "targets": so_far[1]}, params)
            np.testing.assert_allclose(got[0][r], want[0][0], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(got[1][r], want[1][0, -1], rtol=1e-4, atol=1e-5)


def test_states_and_entry_points() -> None:
    _, program = PROGRAMS["rotary", 5]
    assert list(program.graphs) == ["prefill", "decode"]
    assert program.interface.chunk == 5
    states = program.interface.states
    assert [s.name for s in states] == [f"cache.{i}.{r}" for i in range(3) for r in "kv"]
    assert [(s.kind, s.capacity) for s in states[::2]] == [("ring", 16), ("full", None), ("ring", 16)]
    types = {v.name: str(v.type) for v in program["prefill"].inputs}
    assert types["cache.0.k"] == "f32[b, 16, 2, 4]"
    assert types["cache.1.v"] == "f32[b, c, 2, 4]"
    assert (types["past"], types["last"]) == ("i64[b]", "i64[b]")
    assert str(program["prefill"].outputs[0].type) == str(program["decode"].outputs[0].type) == f"f32[b, {VOCAB}]"
    _, program = PROGRAMS["encoder", 5]
    assert list(program.graphs) == ["encode", "prefill", "decode"]
    assert [v.name for v in program["encode"].inputs] == ["features"]
    assert {v.name for v in program["decode"].inputs} >= {"memory.0", "memory.1"}
    assert "features" not in {v.name for v in program["decode"].inputs}


def test_masks_of_positions_go_along() -> None:
    """By the slots of a full cache and of a ring; the causal predicate and the window are no part of them."""
    for name in ("prefill", "decode"):
        found = [n for n in PROGRAMS["biased", 5][1][name].nodes if n.op.name == "cached_attention"]
        shapes = [str(n.inputs[6].type) for n in found]
        s = "s" if name == "prefill" else "1"
        own = [f"f32[b, 2, {s}, c]", f"f32[b, 2, {s}, 16]", "f32[b, 1, 1, 16]", f"bool[b, 1, {s}, c]", "f32[b, 2, 1, 16]"]
        assert shapes == own


def test_only_the_last_position_reaches_the_head() -> None:
    _, program = PROGRAMS["rotary", 5]
    head = next(n for n in program["prefill"].nodes if n.op.name == "linear" and n.output.shape[-1] == VOCAB)
    assert head.output.shape[1] == 1


def test_rings_hold_the_cache_of_a_5_to_1_model_down() -> None:
    """At 8192 positions only the full layer's cache grows with the context."""
    layers = "".join(_layer(i, 512 if i % 6 < 5 else None) for i in range(12))
    text = f"graph @forward(%tokens: i64[b, s], %x0: f32[b, s, 2, 8]) {{\n{layers}  return %x12\n}}\n"
    program = random_program(text)
    PassManager([DeriveKVCache(chunk=512), Cleanup()]).run(program)
    assert [s.capacity for s in program.interface.states[::2]] == [*[1024] * 5, None] * 2


def _layer(i: int, window: int | None) -> str:
    w = "" if window is None else f", window={window}"
    x = f"%x{i}"
    return f"  %x{i + 1}: f32[b, s, 2, 8] = attention({x}, {x}, {x}) {{scale=1.0, causal=true{w}}}\n"


def test_short_contexts_need_no_ring() -> None:
    text = f"graph @forward(%tokens: i64[b, s], %x0: f32[b, s, 2, 8]) {{\n{_layer(0, 8)}  return %x1\n}}\n"
    for context, capacity in ((32, None), (33, 32)):
        program = random_program(text)
        program.declare(context=context)
        PassManager([DeriveKVCache(chunk=10)]).run(program)
        assert program.interface.states[0].capacity == capacity


@pytest.mark.parametrize(
    "known, stride, first, context",
    [(None, 1, 0, 64), (20, 1, 0, 20), (99, 2, 0, 32), (None, 3, 5, 20), (None, 1, 63, 1)],
)
def test_the_context_is_the_least_that_is_known(known: int | None, stride: int, first: int, context: int) -> None:
    """What metadata says, and the positions that have a row in a table of 64: at 0, 2, .. or at 5, 8, .. 62."""
    program = random_program(f"""graph @forward(%tokens: i64[b, s], %x: f32[b, s, 2, 8]) {{
  param %table: f32[64, 8]
  %i: i64[s] = iota() {{size=s}}
  %j: i64[s] = mul(%i, {stride}:i64)
  %at: i64[s] = add(%j, {first}:i64)
  %e: f32[s, 8] = embedding(%table, %at)
  %r: f32[s, 1, 8] = reshape(%e) {{shape=(s, 1, 8)}}
  %h: f32[b, s, 2, 8] = add(%x, %r)
  %y: f32[b, s, 2, 8] = attention(%h, %h, %h) {{scale=1.0, causal=true}}
  return %y
}}""")
    text = str(program).replace("table: f32[64, 8]", "table: int8b8f16[64, 8]").replace("embed", "quantized_embed")
    small = random_program(text)
    for p in (program, small):  # however the table is stored
        if known is not None:
            p.declare(context=known)
        PassManager([DeriveKVCache()]).run(p)
        assert p.interface.context == context


def test_layers_that_share_keys_and_values_keep_a_cache_each() -> None:
    """In place, a cache is written by one; of two windows, each ring remembers its own."""
    text = """graph @forward(%tokens: i64[b, s], %x: f32[b, s, 2, 8]) {
  %y: f32[b, s, 2, 8] = attention(%x, %x, %x) {scale=1.0, causal=true}
  %z: f32[b, s, 2, 8] = attention(%y, %x, %x) {scale=1.0, causal=true}
  return %z
}
"""
    program = random_program(text)
    PassManager([DeriveKVCache()]).run(program)
    assert program.interface.state_names == ["cache.0.k", "cache.0.v", "cache.1.k", "cache.1.v"]


class Repeated(nn.Module):
    """One head of keys and values, which are copied for four of queries."""

    def __init__(self) -> None:
        self.embed, self.qkv, self.out = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, 48), nn.Linear(32, VOCAB)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        b, s = tokens.shape
        x = self.qkv(self.embed(tokens))
        q = x[..., :32].reshape(b, s, 4, 8).transpose(0, 2, 1, 3)
        k, v = (nn.concat([x[..., i : i + 8].reshape(b, 1, s, 8)] * 4, axis=1) for i in (32, 40))
        at = nn.arange(s)
        scores = nn.where(at[None, :] <= at[:, None], q @ k.transpose(0, 1, 3, 2) * 8**-0.5, -math.inf)
        return self.out((nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(b, s, 32))


def test_keys_that_are_copied_for_each_head_are_kept_once() -> None:
    program = nn.trace(Repeated(), {"tokens": "i64[b, s]"}, outputs=["logits"])
    PassManager([Cleanup(), FuseAttention(), Cleanup(), DeriveKVCache()]).run(program)
    kept = [str(v.type) for v in program["decode"].inputs if v.name in program.interface.state_names]
    assert kept == ["f32[b, c, 1, 8]"] * 2
