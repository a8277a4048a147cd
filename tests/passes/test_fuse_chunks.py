"""Linear attention by chunks of the sequence, in the spellings of transformers; and what is nearly that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from wasat.frontend import nn
from wasat.ir import Program
from wasat.ir.ops.linear_attention import LinearAttentionAttrs
from wasat.passes import Cleanup, FuseRecurrence, PassManager

import wasat as ws

SIZE, INF = 4, float("inf")
"""Of a chunk."""
SSD = {"x": "f32[b, s, 3, 5]", "dt": "f32[b, s, 3]", "B": "f32[b, s, 3, 2]", "C": "f32[b, s, 3, 2]"}
DELTA = {"q": "f32[b, 2, s, 3]", "k": "f32[b, 2, s, 3]", "v": "f32[b, 2, s, 5]", "g": "f32[b, 2, s]", "beta": "f32[b, 2, s]"}
Made = Callable[..., nn.Tensor]


def padded(x: nn.Tensor, axis: int = 1, value: float = 0.0) -> nn.Tensor:
    """To whole chunks along an axis."""
    s = x.shape[axis]
    amounts = [(SIZE - s % SIZE) % SIZE if i == axis else 0 for i in range(x.rank)]
    return nn.pad(x, (0,) * x.rank, tuple(amounts), value=value)


def chunks(x: nn.Tensor) -> nn.Tensor:
    """[b, s, ..] -> [b, chunks, tokens, ..]."""
    b, s, *rest = x.shape
    return x.reshape(b, s // SIZE, SIZE, *rest)


def later(n: Any, diagonal: int = 0) -> nn.Tensor:
    at = nn.arange(n)
    return at[None, :] > at[:, None] + diagonal


def segsum(a: nn.Tensor) -> nn.Tensor:
    """[.., n] -> [.., n, n]: the sum of what lies behind j up to i, -inf where j > i."""
    n = a.shape[-1]
    each = a[..., None].broadcast_to(*a.shape, n)
    return nn.where(later(n), -INF, nn.cumsum(nn.where(later(n, -1), 0.0, each), axis=-2))


def ssd(
    x: nn.Tensor, dt: nn.Tensor, B: nn.Tensor, C: nn.Tensor, *, pad: Made = padded, scores: Made = lambda s: s,
    between: Made = segsum, also: Made = lambda y, x: y + x * nn.constant([[0.5], [2.0], [1.0]]), first: int = 0,
    rates: Sequence[float] = (-0.5, -1.0, -0.1),
) -> nn.Tensor:  # fmt: skip
    """As Mamba2's torch_forward has it: within chunks, then a state from chunk to chunk."""
    s, skipped = x.shape[1], pad(x)
    whole = skipped.shape[1]
    x, a, k, q = (chunks(pad(t)) for t in (x * dt[..., None], dt * nn.constant(list(rates)), B, C))
    a = a.transpose(0, 3, 1, 2)
    sums = nn.cumsum(a, axis=-1)
    near = scores(nn.einsum("b n l h d, b n t h d -> b n h l t", q, k)) * nn.exp(segsum(a)).swap(1, 2)
    y = nn.einsum("b n h l t, b n t h e -> b n l h e", near, x)
    left = nn.exp(sums[..., -1:] - sums)
    states = nn.einsum("b n t h d, b h n t, b n t h e -> b n h d e", k, left, x)
    states = nn.concat([states[:, :1] * 0.0, states], axis=1)
    last = nn.pad(sums[..., -1], (0, 0, 1), (0, 0, 0))
    states = nn.einsum("b h m n, b n h d e -> b m h d e", nn.exp(between(last)), states)[:, :-1]
    y = y + nn.einsum("b n l h d, b n h d e, b h n l -> b n l h e", q, states, nn.exp(sums))
    return also(y.reshape(y.shape[0], whole, *y.shape[3:]), skipped)[:, first : s + first]


def gated_delta(
    q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, g: nn.Tensor, beta: nn.Tensor, *, solved: Made = lambda a: a
) -> nn.Tensor:  # fmt: skip
    """As the gated delta rule by chunks: a triangular system, row by row, then a scan over the chunks; heads first."""
    s = q.shape[2]
    q, k, v, g, beta = (padded(t, 2) for t in (q * 0.5, k, v, g, beta))
    b, h, whole = q.shape[:3]
    n = whole // SIZE
    written, rated = v * beta[..., None], k * beta[..., None]
    q, k, written, rated = (t.reshape(b, h, n, SIZE, t.shape[-1]) for t in (q, k, written, rated))
    sums = nn.cumsum(g.reshape(b, h, n, SIZE), axis=-1)
    decay = nn.exp(nn.where(later(SIZE), -INF, sums[..., :, None] - sums[..., None, :]))
    a = nn.where(later(SIZE, -1), 0.0, -(rated @ k.T) * decay)
    rows = [a[..., :1, :]]
    for i in range(1, SIZE):
        row, above = a[..., i : i + 1, :], nn.concat(rows, axis=-2)
        rows.append(row + solved(row[..., :i]) @ above)
    a = nn.concat(rows, axis=-2) + nn.constant(np.eye(SIZE, dtype=np.float32))
    value, keys = a @ written, a @ (rated * nn.exp(sums)[..., None])
    near = nn.where(later(SIZE), 0.0, (q @ k.T) * decay)

    def step(S: nn.Tensor, x: tuple[nn.Tensor, ...]) -> tuple[nn.Tensor, nn.Tensor]:
        q, k, value, keys, near, sums = x
        new = value - keys @ S
        y = (q * nn.exp(sums)[..., None]) @ S + near @ new
        left = nn.exp(sums[..., -1:] - sums)
        return S * nn.exp(sums[..., -1])[..., None, None] + (k * left[..., None]).T @ new, y

    turns = tuple(t.transpose(2, 0, 1, *range(3, t.rank)) for t in (q, k, value, keys, near, sums))
    y = nn.scan(step, nn.full((b, h, k.shape[-1], v.shape[-1]), 0.0), turns)[1]
    return y.transpose(1, 2, 0, 3, 4).reshape(b, h, whole, v.shape[-1])[:, :, :s]


class Chunks(nn.Module):
    def __init__(self, made: Made, **how: Any) -> None:
        self.made, self.how = made, how

    def __call__(self, **given: nn.Tensor) -> nn.Tensor:
        return self.made(**given, **self.how)


def fed(types: Mapping[str, str], b: int, s: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(s)
    shapes = {n: [{"b": b, "s": s}.get(d) or int(d) for d in t[4:-1].split(", ")] for n, t in types.items()}
    return {n: (0.5 * rng.uniform(-1, 0 if n in ("dt", "g") else 1, x)).astype(np.float32) for n, x in shapes.items()}


def fused(made: Made, types: Mapping[str, str], **how: Any) -> tuple[Program, Program, Any]:
    program = nn.trace(Chunks(made, **how), types, outputs=["y"])
    other = Program({"forward": program["forward"].clone()})
    return program, other, PassManager([Cleanup(), FuseRecurrence(), Cleanup()]).run(other)


@pytest.mark.parametrize(
    "made, types, attrs",
    [(ssd, SSD, {"rule": "gated"}), (gated_delta, DELTA, {"rule": "gated_delta"})], ids=["Mamba2", "gated delta"],
)  # fmt: skip
def test_spellings(made: Made, types: Mapping[str, str], attrs: dict[str, Any]) -> None:
    program, other, report = fused(made, types)
    found = [n.attrs for n in other["forward"].nodes if isinstance(n.attrs, LinearAttentionAttrs)]
    assert found == [LinearAttentionAttrs(**attrs)]
    assert not {n.op.name for n in other["forward"].nodes} & {"scan", "cumsum", "exp", "pad", "matmul"}
    assert report.remarks("missed") == []
    for b, s in ((2, 7), (1, 1), (1, 4), (2, 17)):
        feed = fed(types, b, s)
        np.testing.assert_allclose(ws.run(other, **feed)["y"], ws.run(program, **feed)["y"], rtol=1e-5, atol=1e-6)


def test_scale_and_sizes_that_are_alike() -> None:
    """Heads, features of keys and of values are as many: which operand is which shows in the numbers. Scaled inside."""
    types = {n: t.replace(", 5]", ", 3]").replace(", 2]", ", 3]") for n, t in SSD.items()}
    program, other, _ = fused(ssd, types, scores=lambda s: s, also=lambda y, x: y * 0.25)
    [node] = [n for n in other["forward"].nodes if isinstance(n.attrs, LinearAttentionAttrs)]
    assert node.attrs.scale == pytest.approx(0.25, rel=1e-9)
    feed = fed(types, 2, 11)
    np.testing.assert_allclose(ws.run(other, **feed)["y"], ws.run(program, **feed)["y"], rtol=1e-5, atol=1e-6)


def neighbours(a: nn.Tensor) -> nn.Tensor:
    """The state of the chunk before alone: the same as all, of two chunks."""
    n = a.shape[-1]
    return nn.where(later(n) | ~later(n, -1), -INF, segsum(a))


MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "a condition on data": ({"scores": lambda s: nn.where(s > 0.0, s, 0.0)}, "stands between"),
    "not analytic": ({"scores": nn.tanh}, "stands between"),
    "a softmax": ({"scores": lambda s: nn.softmax(s)}, "(query // 4 - key // 4 <= 1) & (key <= query)"),
    "squared": ({"scores": lambda s: s * s}, "no form of linear attention that is known"),
    "nothing from chunk to chunk": ({"between": lambda a: segsum(a) - INF}, "no form of linear attention"),
    "from the chunk before alone": ({"between": neighbours}, f"of {3 * SIZE + 1} tokens its chunks come to something else"),
    "what is added looks back": ({"also": lambda y, x: y + nn.cumsum(x, axis=1)}, "no form of linear attention"),
}


@pytest.mark.parametrize("how, reason", MISSES.values(), ids=MISSES)
def test_near_miss_is_left_alone(how: dict[str, Any], reason: str) -> None:
    _, other, report = fused(ssd, SSD, **how)
    [missed] = report.remarks("missed")
    assert reason in missed.message
    assert "by chunks of 4 tokens" in missed.message
    assert other["forward"].count("linear_attention") == 0


@pytest.mark.parametrize(
    "how", [{"pad": lambda x: padded(x, value=1.0)}, {"first": 1}], ids=["padded by ones", "shifted by one"]
)  # fmt: skip
def test_what_is_no_chunk_of_the_sequence(how: dict[str, Any]) -> None:
    """Nothing to say about."""
    if "first" in how:
        how = {"first": 1, "pad": lambda x: nn.pad(padded(x), (0,) * x.rank, (0, SIZE, *[0] * (x.rank - 2)))}
    _, other, report = fused(ssd, SSD, **how)
    assert report.remarks("missed") == []
    assert other["forward"].count("linear_attention") == 0


def test_the_triangular_system_is_solved_as_it_must_be() -> None:
    _, _, report = fused(gated_delta, DELTA, solved=lambda a: a * 2.0)
    missed, *_ = report.remarks("missed")
    assert "no form of linear attention that is known" in missed.message


class Behind(nn.Module):
    """What is computed by chunks, of what a layer makes of a softmax."""

    def __init__(self) -> None:
        self.up = nn.Linear(5, 5)

    def __call__(self, x: nn.Tensor, dt: nn.Tensor, B: nn.Tensor, C: nn.Tensor) -> nn.Tensor:
        return ssd(self.up(nn.softmax(x)), dt, B, C, scores=nn.tanh)


def test_a_softmax_of_an_earlier_layer_is_none_of_windows() -> None:
    report = PassManager([Cleanup(), FuseRecurrence()]).run(nn.trace(Behind(), SSD, outputs=["y"]))
    [missed] = report.remarks("missed")
    assert "nn.linear_attention" in missed.message
