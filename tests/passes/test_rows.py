"""Rows of a batch stand anywhere in a decoder and advance each at a place of its own; rows that meet are refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.ir import IRError, Program, evaluate
from wasat.passes import Cleanup, DeriveKVCache, FuseAttention, FuseNorm, FuseRope, PassManager

VOCAB, DIM, HEADS = 11, 16, 2
Mix = Callable[[nn.Tensor, nn.Tensor], nn.Tensor]


class Decoder(nn.Module):
    """One causal attention, and ``mix`` of what it gives [b, s, 16] and the positions [s]."""

    def __init__(self, mix: Mix) -> None:
        self.mix, self.embed, self.head = mix, nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x, at = self.embed(tokens), nn.positions(tokens)
        h = x.heads(HEADS)
        scores = nn.einsum("b s h d, b t h d -> b h s t", h, h) * 0.4
        weights = nn.softmax(nn.where(nn.causal(at), scores, -math.inf))
        x = x + nn.einsum("b h s t, b t h d -> b s h d", weights, h).merge()
        return self.head(x + self.mix(x, at))


def wave(at: nn.Tensor) -> nn.Tensor:
    """A function of the position that no other position shares: [s, 1]."""
    return nn.cos(at.cast("f32") * 0.7)[:, None]


def heads_first(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return (x.heads(HEADS).transpose(2, 0, 1, 3) * wave(at)).transpose(1, 2, 0, 3).merge()


def stacked(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return (nn.stack([x, x * 2.0]) * wave(at)).sum(axis=0)


def sequence_first(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return (x.transpose(1, 0, 2) * wave(at)[:, None]).transpose(1, 0, 2)


def features_first(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return (x.transpose(2, 0, 1) * wave(at)[:, 0]).transpose(1, 2, 0)


def folded(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    b, s, _ = x.shape
    y = x.heads(HEADS).transpose(0, 2, 1, 3).reshape(b * HEADS, s, DIM // HEADS) * wave(at)
    return y.reshape(b, HEADS, s, DIM // HEADS).transpose(0, 2, 1, 3).merge()


def folded_behind(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    b, s, _ = x.shape
    y = x.heads(HEADS).transpose(2, 0, 1, 3).reshape(HEADS * b, s, DIM // HEADS) * wave(at)
    return y.reshape(HEADS, b, s, DIM // HEADS).transpose(1, 2, 0, 3).merge()


def folded_between(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    b, s, _ = x.shape
    y = x.reshape(b, s, 2, 2, 4).transpose(2, 0, 3, 1, 4).reshape(2 * b * 2, s, 4) * wave(at) + wave(at)
    return y.reshape(2, b, 2, s, 4).transpose(1, 3, 0, 2, 4).reshape(b, s, DIM)


def attending(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Attention of [b * h, s, d], as fairseq writes it."""
    b, s, _ = x.shape
    y = x.heads(HEADS).transpose(0, 2, 1, 3).reshape(b * HEADS, s, DIM // HEADS) * wave(at)
    return (_seen(y, at) @ y).reshape(b, HEADS, s, DIM // HEADS).transpose(0, 2, 1, 3).merge()


def attending_behind(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Attention of [h * b, s, d], within a window."""
    b, s, _ = x.shape
    y = x.heads(HEADS).transpose(2, 0, 1, 3).reshape(HEADS * b, s, DIM // HEADS) * wave(at)
    return (_seen(y, at, 3) @ y).reshape(HEADS, b, s, DIM // HEADS).transpose(1, 2, 0, 3).merge()


def attending_between(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Attention of [2 * b * 2, s, d]."""
    b, s, _ = x.shape
    y = x.reshape(b, s, 2, 2, 4).transpose(2, 0, 3, 1, 4).reshape(2 * b * 2, s, 4) * wave(at)
    return (_seen(y, at) @ y).reshape(2, b, 2, s, 4).transpose(1, 3, 0, 2, 4).reshape(b, s, DIM)


def attending_grouped(x: nn.Tensor, at: nn.Tensor, *sink: nn.Tensor) -> nn.Tensor:
    """Attention of [b * 2, s, 2, 4], two queries to a key."""
    b, s, _ = x.shape
    y = x.reshape(b, s, 2, 2, 4).transpose(0, 2, 1, 3, 4).reshape(2 * b, s, 2, 4) + nn.sin(wave(at))[:, None]
    y = nn.emit("attention", y, y[:, :, 1:], y[:, :, :1], *sink, scale=0.7, causal=True, sink=bool(sink))
    return y.reshape(b, 2, s, 2, 4).transpose(0, 2, 1, 3, 4).reshape(b, s, DIM)


def attending_masked(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Attention of [2 * b, s, 2, 4] under a mask that each row has for itself."""
    b, s, _ = x.shape
    y = x.reshape(b, s, 2, 2, 4).transpose(2, 0, 1, 3, 4).reshape(2 * b, s, 2, 4) + nn.sin(wave(at))[:, None]
    near = y.transpose(0, 2, 1, 3)[..., :1]
    mask = (near - near.transpose(0, 1, 3, 2)) * 2.0
    y = nn.emit("attention", y, y, y, mask, scale=0.7, causal=True)
    return y.reshape(2, b, s, 2, 4).transpose(1, 2, 0, 3, 4).reshape(b, s, DIM)


def _seen(y: nn.Tensor, at: nn.Tensor, window: int = 1000) -> nn.Tensor:
    far = at[:, None] - at[None, :]
    scores = y @ (y + 0.5 * nn.sin(3.0 * y)).transpose(0, 2, 1)
    return nn.softmax(nn.where((far >= 0) & (far < window), scores, float("-inf")), axis=-1)


def picked(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    return nn.gather(x * wave(at), nn.constant(np.arange(DIM)[::-1].copy()), axis=2)


def joined(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    y = x.transpose(1, 0, 2)
    return (nn.concat([y, y * 3.0]) * wave(at)[:, None])[..., DIM // 2 : DIM // 2 + DIM].transpose(1, 0, 2)


def of_positions(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Times what a layer makes of the positions, as in learned encodings."""
    w = nn.constant(np.linspace(-1, 1, DIM * 2).reshape(1, 2 * DIM).astype(np.float32))
    return x * nn.softmax(nn.cumsum(nn.tanh(wave(at) @ w).reshape(at.shape[0], 2, DIM), axis=1).max(axis=1))


def repeated(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Numbers that every row has, written once for each: alone, with positions, and merged with heads."""
    b, s, _ = x.shape
    y = x.heads(HEADS).swap(1, 2).reshape(b * HEADS, s, DIM // HEADS) * nn.full((b, HEADS, 1, 1), 0.7).reshape(b * HEADS, 1, 1)
    return y.reshape(b, HEADS, s, DIM // HEADS).swap(1, 2).merge() * nn.full((b, 1, 1), 1.3) * wave(at)


def written_over(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """Rows and positions merged; the largest feature of each is written over with one number (Phi-MoE's router)."""
    b, s, _ = x.shape
    y = (x * wave(at)).reshape(b * s, DIM)
    best = nn.argmax(y, axis=1, keepdims=True)
    y = nn.emit("scatter_along", y, best, nn.full((b * s, 1), -0.5), axis=1)
    return (y * nn.full((b * s, 1), 1.3)).reshape(b, s, DIM)


def in_turns(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    """A recurrence whose carry is heads and rows merged, over elements with the rows in the middle."""
    b, s, _ = x.shape

    def turn(held: nn.Tensor, now: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        held = held * 0.7 + now.reshape(HEADS * b, DIM // HEADS)
        return held, nn.tanh(held)

    heads = x.heads(HEADS).transpose(1, 2, 0, 3)
    y = nn.scan(turn, nn.full((HEADS * b, DIM // HEADS), 0.0), heads)[1]
    return y.reshape(s, HEADS, b, DIM // HEADS).transpose(2, 0, 1, 3).merge()


APART = {f.__name__: f for f in (
    heads_first, stacked, sequence_first, features_first, folded, folded_behind, folded_between, picked, joined, of_positions,
    repeated, written_over, in_turns, attending, attending_behind, attending_between,
    attending_grouped, attending_masked,
)}  # fmt: skip


def _emitted(name: str, **attrs: Any) -> Mix:
    return lambda x, at: nn.emit(name, x * wave(at), **attrs)


MEETING: dict[str, Mix] = {
    "mean": lambda x, at: x - x.mean(axis=0, keepdims=True), "largest": lambda x, at: x.max(axis=0, keepdims=True) + x,
    "softmax": lambda x, at: nn.softmax(x, axis=0), "running sum": lambda x, at: nn.cumsum(x, axis=0),
    "sorted": _emitted("sort", axis=0), "reversed": _emitted("reverse", axes=(0,)),
    "first row": lambda x, at: x + x[:1],
    "first row of others": lambda x, at: x + x.transpose(1, 0, 2)[:, :1].transpose(1, 0, 2),
    "picked": lambda x, at: x + nn.gather(x, nn.constant(np.zeros(1, np.int64)), axis=0),
    "mean of folded": lambda x, at: x + x.heads(HEADS).transpose(0, 2, 1, 3).reshape(
        x.shape[0] * HEADS, x.shape[1], DIM // HEADS).mean(axis=0, keepdims=True)[..., :1],
}  # fmt: skip


def _each_row(x: nn.Tensor) -> nn.Tensor:
    return (nn.arange(x.shape[0]) + 1).cast("f32")[:, None, None]


def _once_each(x: nn.Tensor) -> nn.Tensor:
    return nn.full((x.shape[0], 1), 1.0)


def _turns(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
    def turn(held: nn.Tensor, now: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        held = held + now * _each_row(x)[..., 0]
        return held, held

    return nn.scan(turn, nn.full((x.shape[0], DIM), 0.0), x.transpose(1, 0, 2))[1].transpose(1, 0, 2)


COUNTING: dict[str, Mix] = {
    "number of a row": lambda x, at: x * _each_row(x),
    "number of a row, and positions": lambda x, at: x + wave(at) * nn.cos(_each_row(x) + at.cast("f32")[:, None]),
    "how many": lambda x, at: x / _once_each(x).sum(),
    "their number": lambda x, at: x / nn.emit("dim_size", size=x.shape[0]).cast("f32"),
    "a share": lambda x, at: x * nn.softmax(_once_each(x), axis=0)[:, None],
    "counted": lambda x, at: x * nn.cumsum(_once_each(x), axis=0)[:, None],
    "drawn": lambda x, at: x * nn.random_uniform(nn.constant(np.array([1, 2], np.uint32)), (x.shape[0], 1, DIM)),
    "in turns": _turns,
}  # fmt: skip
"""What a row gets depends on where it stands among the others: a session moves rows, and calls for some of them."""


def forward_of(mix: Mix) -> Program:
    return nn.trace(Decoder(mix), {"tokens": "i64[b, s]"}, outputs=["logits"])


def derive(program: Program, chunk: int = 8) -> Program:
    copy = Program({"forward": program["forward"].clone()}, dict(program.params))
    passes = [Cleanup(), FuseNorm(), FuseRope(), FuseAttention(), Cleanup(), DeriveKVCache(chunk=chunk), Cleanup()]
    PassManager(passes).run(copy)
    return copy


def fed(program: Program, tokens: np.ndarray, counts: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """After each step: how many tokens each row has, and its logits. A step gives row r so many of its tokens."""
    rows, params = len(tokens), {k: p.load() for k, p in program.params.items()}
    past = np.zeros(rows, np.int64)
    states = {
        v.name: np.zeros(v.tensor.concrete({"b": rows, "c": 32, "s": 1}), np.float32)
        for v in program["decode"].inputs if v.name not in ("tokens", "past", "last")
    }  # fmt: skip
    seen = []
    for step in counts:
        n, width = np.array(step), max(step)
        new = np.zeros((rows, width), np.int64)
        for r in range(rows):
            new[r, : n[r]] = tokens[r, past[r] : past[r] + n[r]]
        g = program["decode" if width == 1 and n.min() == 1 else "prefill"]
        inputs = {"tokens": new, "past": past, "last": np.maximum(n - 1, 0), **states}
        results = evaluate(g, {v.name: inputs[v.name] for v in g.inputs}, {k: params[k] for k in g.params})
        out = dict(zip(g.output_names, results))
        logits = out.pop("logits")
        states = {k: np.asarray(v) for k, v in out.items()}
        past = past + n
        seen.append((past.copy(), np.asarray(logits)))
    return seen


STEPS = [[5, 2, 3], [1, 4, 2], [1, 1, 1], [1, 1, 1], [2, 3, 1], [1, 1, 1]]


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("mix", APART.values(), ids=APART)
def test_rows_of_different_lengths(mix: Mix, rows: int) -> None:
    program = forward_of(mix)
    params = {k: p.load() for k, p in program.params.items()}
    tokens = np.random.default_rng(rows).integers(0, VOCAB, (rows, 16))
    [want] = evaluate(program["forward"], {"tokens": tokens}, params)
    assert isinstance(want, np.ndarray)
    for past, logits in fed(derive(program), tokens, [step[:rows] for step in STEPS]):
        np.testing.assert_allclose(logits, want[np.arange(rows), past - 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mix", MEETING.values(), ids=MEETING)
def test_rows_that_meet_are_refused(mix: Mix) -> None:
    with pytest.raises(IRError, match=r"rows of a batch cannot be served apart: %.*\n  (rows meet here|its operands keep)"):
        derive(forward_of(mix))


@pytest.mark.parametrize("mix", COUNTING.values(), ids=COUNTING)
def test_what_counts_rows_is_refused(mix: Mix) -> None:
    with pytest.raises(IRError, match=r"rows of a batch cannot be served apart: %.*\n  it depends on which row it is of"):
        derive(forward_of(mix))


@pytest.mark.parametrize("turning", [(1,), (0,), (0, 1), ()], ids=str)
def test_a_carry_keeps_its_rows_where_they_were(turning: tuple[int, ...]) -> None:
    """Heads and rows that are merged, rows in front; after a turn heads are in front: of the one carry, the other, or both."""

    class Told(nn.Module):
        def __init__(self) -> None:
            self.decoder = Decoder(lambda x, at: x)

        def __call__(self, tokens: nn.Tensor, told: nn.Tensor) -> nn.Tensor:
            b = tokens.shape[0]

            def turn(held: tuple[nn.Tensor, nn.Tensor], now: nn.Tensor) -> tuple[tuple[nn.Tensor, nn.Tensor], nn.Tensor]:
                new = [h * 0.5 for h in held]
                for i in turning:
                    new[i] = new[i].reshape(b, HEADS, DIM // HEADS).transpose(1, 0, 2).reshape(HEADS * b, DIM // HEADS)
                return (new[0], new[1]), now * 2.0

            start = told.reshape(b * HEADS, DIM // HEADS)
            ends, y = nn.scan(turn, (start, start + 0.1), self.decoder.embed(tokens).transpose(1, 0, 2))
            del ends
            return self.decoder(tokens) + y.transpose(1, 0, 2).sum(axis=-1, keepdims=True)

    program = nn.trace(Told(), {"tokens": "i64[b, s]", "told": "f32[b, 16]"}, outputs=["logits"])
    if turning:
        with pytest.raises(IRError, match="its carry keeps the rows on another axis after a turn"):
            derive(program)
    else:
        assert "prefill" in derive(program).graphs


def test_what_counts_rows_of_inputs_is_computed_once() -> None:
    """By ``encode``, for all rows of a session together."""

    class Told(nn.Module):
        def __init__(self) -> None:
            self.decoder = Decoder(lambda x, at: x)

        def __call__(self, tokens: nn.Tensor, told: nn.Tensor) -> nn.Tensor:
            return self.decoder(tokens) * (told * _each_row(told)[..., 0])[:, None]

    program = nn.trace(Told(), {"tokens": "i64[b, s]", "told": "f32[b, 1]"}, outputs=["logits"])
    assert derive(program)["encode"].count("iota") == 1


def test_the_last_element_is_one() -> None:
    class Last(nn.Module):
        def __call__(self, x: nn.Tensor) -> nn.Tensor:
            return x[:, -1:]

    program = nn.trace(Last(), {"x": "f32[b, s, 4]"}, outputs=["y"])
    assert str(program["forward"].outputs[0].type) == "f32[b, 1, 4]"


def test_a_sink_of_merged_heads_is_refused() -> None:
    """A sink belongs to a head: it would have to be repeated for those that leave the axis of the rows."""

    def mix(x: nn.Tensor, at: nn.Tensor) -> nn.Tensor:
        return attending_grouped(x, at, nn.full((2,), 0.3))

    with pytest.raises(IRError, match="the rows are not its first axis"):
        derive(forward_of(mix))


def test_the_check_of_passes_sees_a_wrong_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the rows always taken for the first axis, the interpreter would find it."""
    from wasat.passes import PassError
    from wasat.passes.analyses.rows import FIRST
    from wasat.passes.serving import kv_cache

    import wasat as ws

    for mix in (heads_first, folded, sequence_first):
        ws.optimize(forward_of(mix), kv_cache=True, chunk=4, check=True)
    right = kv_cache.places

    def first(*given: Any) -> dict[Any, Any]:
        return {v: p if p.axis == 0 else FIRST for v, p in right(*given).items()}

    monkeypatch.setattr(kv_cache, "places", first)
    with pytest.raises(IRError, match="needs 2 == b"):
        ws.optimize(forward_of(heads_first), kv_cache=True, chunk=4, check=True)
    monkeypatch.setattr(kv_cache, "places", right)
    spread = kv_cache.Derivation.spread

    def standing(self: Any, old: Any, x: Any, *more: Any) -> Any:  # positions that do not go on
        return spread(self, old, self.b.mul(x, 0.0) if x.tensor.dtype.is_float else x, *more)

    monkeypatch.setattr(kv_cache.Derivation, "spread", standing)
    with pytest.raises(PassError, match=r"entries that give another logits than @forward after \[4, 2, 3\]"):
        ws.optimize(forward_of(heads_first), kv_cache=True, chunk=4, check=True)
