"""The DSL against NumPy: what a traced graph computes, through the interpreter."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from wasat.frontend import nn
from wasat.ir import Program, TypeMismatch, evaluate, parse, verify

RNG = np.random.default_rng(0)


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, f: Callable[..., Any], **parts: Any) -> None:
        self.f = f
        self.__dict__.update(parts)

    def __call__(self, **inputs: nn.Tensor) -> Any:
        return self.f(**inputs)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def run(program: Program, **inputs: np.ndarray) -> list[Any]:
    """Evaluates the only graph, after checking it and its text round trip."""
    (graph,) = program.graphs.values()
    verify(graph)
    assert str(parse(str(graph))) == str(graph)
    return evaluate(graph, inputs, {k: p.load() for k, p in program.params.items()})


def call(f: Callable[..., Any], types: dict[str, str], **inputs: np.ndarray) -> Any:
    out = run(nn.trace(Fn(f), types), **inputs)
    return out[0] if len(out) == 1 else out


SYMBOLIC = {"x": "f32[b, s, 6]"}
X = f32(2, 5, 6)


@pytest.mark.parametrize(
    "f, want",
    [
        (lambda x: x + 1 - 2.5, lambda x: x + 1 - 2.5),
        (lambda x: 3 - x, lambda x: 3 - x),
        (lambda x: x * 2 / 4.0, lambda x: x / 2),
        (lambda x: 1 / (x * x + 1), lambda x: 1 / (x * x + 1)),
        (lambda x: (x * x) ** 0.5, abs),
        (lambda x: 2.0**x, lambda x: 2.0**x),
        (lambda x: -abs(x), lambda x: -abs(x)),
        (lambda x: x @ x.T, lambda x: x @ x.swapaxes(1, 2)),
        (lambda x: nn.where((x > 0) & ~(x >= 1) | (x < -1), x, 0.0),
         lambda x: np.where((x > 0) & ~(x >= 1) | (x < -1), x, 0)),
        (lambda x: nn.where(x <= 0, 1.0, 2.0), lambda x: np.where(x <= 0, 1, 2)),
        (lambda x: nn.where(x == x, x, 0.0), lambda x: x),
        (lambda x: nn.where(x != x, x, 0.0), np.zeros_like),
        (lambda x: x * x.shape[1], lambda x: x * 5),
        (lambda x: x * np.arange(6, dtype=np.float32), lambda x: x * np.arange(6)),
        (lambda x: np.float32(2.0) * x, lambda x: 2 * x),
        (lambda x: x[0], lambda x: x[0]),
        (lambda x: x[:, -1], lambda x: x[:, -1]),
        (lambda x: x[..., 2:4], lambda x: x[..., 2:4]),
        (lambda x: x[..., :-2], lambda x: x[..., :-2]),
        (lambda x: x[:, 1:], lambda x: x[:, 1:]),
        (lambda x: x[:, :3], lambda x: x[:, :3]),
        (lambda x: x[:, :99], lambda x: x[:, :99]),
        (lambda x: x[:, 7:9], lambda x: x[:, 7:9]),
        (lambda x: x[:, ::2], lambda x: x[:, ::2]),
        (lambda x: x[:, ::-1], lambda x: x[:, ::-1]),
        (lambda x: x[:, None, 1:, ..., None], lambda x: x[:, None, 1:, ..., None]),
        (lambda x: x[:, x.shape[1] - 2 :], lambda x: x[:, 3:]),
        (lambda x: x[:, -x.shape[0] :], lambda x: x[:, -2:]),
        (lambda x: x[:, : -x.shape[0]], lambda x: x[:, :-2]),
        (lambda x: x[:, -x.shape[0] - 4 : -1], lambda x: x[:, -6:-1]),
        (lambda x: x[..., -x.shape[0] * 2], lambda x: x[..., -4]),
        (lambda x: x.reshape(x.shape[0], -1), lambda x: x.reshape(2, 30)),
        (lambda x: x.reshape(-1, 2, 3), lambda x: x.reshape(-1, 2, 3)),
        (lambda x: x.heads(3), lambda x: x.reshape(2, 5, 3, 2)),
        (lambda x: x.heads(3).merge(), lambda x: x),
        (lambda x: nn.merge(nn.heads(x, 2)), lambda x: x),
        (lambda x: x.transpose(2, 0, 1), lambda x: x.transpose(2, 0, 1)),
        (lambda x: x.swap(0, -1), lambda x: x.swapaxes(0, -1)),
        (lambda x: x.split(3)[1], lambda x: x[..., 2:4]),
        (lambda x: x.split([1, 5])[1], lambda x: x[..., 1:]),
        (lambda x: nn.concat([x, x * 2], axis=1), lambda x: np.concatenate([x, x * 2], 1)),
        (lambda x: nn.stack([x, -x], axis=-1), lambda x: np.stack([x, -x], -1)),
        (lambda x: x.sum(), lambda x: x.sum()),
        (lambda x: x.mean(axis=-1, keepdims=True), lambda x: x.mean(-1, keepdims=True)),
        (lambda x: x.max(axis=1), lambda x: x.max(1)),
        (lambda x: x.min(axis=(0, 2)), lambda x: x.min((0, 2))),
        (lambda x: (x > 0).any(axis=1), lambda x: (x > 0).any(1)),
        (lambda x: (x > 0).all(axis=1), lambda x: (x > 0).all(1)),
        (lambda x: nn.softmax(x, axis=1), lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)),
        (lambda x: nn.silu(x), lambda x: x / (1 + np.exp(-x))),
        (lambda x: nn.gelu(x), lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5))),
        (lambda x: nn.rsqrt(x * x + 1), lambda x: 1 / np.sqrt(x * x + 1)),
        (lambda x: nn.exp(nn.log(x * x)), lambda x: x * x),
        (lambda x: nn.maximum(x, 0.0) + nn.minimum(x, 0.0), lambda x: x),
        (lambda x: x * nn.constant([1.0, 2.0]).reshape(1, 2, 1)[:, 1], lambda x: x * 2),
        (lambda x: x + nn.full((6,), 2.0), lambda x: x + 2),
        (lambda x: x + nn.arange(x.shape[1], 3).cast("f32")[:, None], lambda x: x + np.arange(3, 8)[:, None]),
        (lambda x: nn.gather(x, nn.constant([2, 0]), axis=1), lambda x: x[:, [2, 0]]),
        (lambda x: nn.cumsum(x, axis=1), lambda x: x.cumsum(1)),
        (lambda x: nn.top_k(x, 2)[0], lambda x: -np.sort(-x)[..., :2]),
        (lambda x: nn.pad(x, (0, 1, 0), (0, 0, 2)), lambda x: np.pad(x, [(0, 0), (1, 0), (0, 2)])),
    ],
)  # fmt: skip
def test_expressions_equal_numpy(f: Callable[..., Any], want: Callable[..., Any]) -> None:
    got = call(f, SYMBOLIC, x=X)
    assert got.shape == np.shape(want(X))
    assert_allclose(got, want(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operation", [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
])  # fmt: skip
def test_a_dimension_beside_a_tensor_is_its_value(operation: Callable[[Any, Any], Any]) -> None:
    class Both(nn.Module):
        def __call__(self, x: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
            n = x.shape[0]
            return operation(n, x), operation(x, n)

    g = nn.trace(Both(), {"x": "f32[n]"})["forward"]
    x = np.array([1, 3, 2.5], np.float32)
    left, right = evaluate(g, {"x": x})
    assert_array_equal(left, operation(np.float32(3), x))
    assert_array_equal(right, operation(x, np.float32(3)))



def test_integers() -> None:
    n = np.array([-7, 7, 8], np.int64)
    got = call(lambda n: (n // 3, n % 3, n & 5, n | 1, n ^ 2, ~n, 10 - n), {"n": "i64[k]"}, n=n)
    for a, b in zip(got, (n // 3, n % 3, n & 5, n | 1, n ^ 2, ~n, 10 - n)):
        assert_array_equal(a, b)


def test_masks_are_comparisons_of_positions() -> None:
    at = np.arange(6)
    keep = (at[None] <= at[:, None]) & (at[:, None] - at[None] < 3)
    got = call(lambda x: nn.causal(nn.positions(x)) & nn.within(nn.positions(x), 3), SYMBOLIC, x=f32(1, 6, 6))
    assert_array_equal(got, keep)
    causal = call(lambda x: nn.causal(nn.positions(x)) & nn.within(nn.positions(x), None), SYMBOLIC, x=f32(1, 6, 6))
    assert_array_equal(causal, at[None] <= at[:, None])
    offset = call(lambda x: nn.causal(nn.arange(2, 4), nn.arange(6)), SYMBOLIC, x=X)
    assert_array_equal(offset, at[None] <= np.array([4, 5])[:, None])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
def test_attention(groups: int, softcap: float | None, window: int | None) -> None:
    b, s, h, d = 2, 7, 4, 8
    q, k, v = f32(b, s, h, d), f32(b, s, groups, d), f32(b, s, groups, 5)
    at = np.arange(s)
    keep = (at[None] <= at[:, None]) & (at[:, None] - at[None] < (window or s))
    wide = [np.repeat(x, h // groups, axis=2) for x in (k, v)]
    scores = np.einsum("bshd,bthd->bhst", q, wide[0]) * 0.3
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    want = np.einsum("bhst,bthe->bshe", softmax(np.where(keep, scores, -np.inf)), wide[1])

    def f(q: nn.Tensor, k: nn.Tensor, v: nn.Tensor) -> nn.Tensor:
        pos = nn.positions(q)
        return nn.attention(q, k, v, nn.causal(pos) & nn.within(pos, window), scale=0.3, softcap=softcap)

    types = {"q": f"f32[b, s, {h}, {d}]", "k": f"f32[b, s, {groups}, {d}]", "v": f"f32[b, s, {groups}, 5]"}
    assert_allclose(call(f, types, q=q, k=k, v=v), want, rtol=1e-5, atol=1e-6)


def rotate(x: np.ndarray, at: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
    """Rotation of pairs as complex numbers: x[b, s, h, d], positions [b, s]."""
    half = len(inv_freq)
    z = x[..., :half] + 1j * x[..., half : 2 * half]
    z = z * np.exp(1j * at[:, :, None] * inv_freq)[:, :, None]
    return np.concatenate([z.real, z.imag, x[..., 2 * half :]], -1)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rope_is_a_rotation_of_pairs(fraction: float) -> None:
    x, at = f32(2, 5, 3, 8), np.array([[0, 1, 2, 3, 4], [9, 3, 7, 100, 0]])
    inv_freq = 100.0 ** (-np.arange(0, 8 * fraction, 2) / (8 * fraction))
    rope = nn.RoPE(8, 100.0, fraction=fraction)
    types = {"x": "f32[b, s, 3, 8]", "at": "i64[b, s]"}
    assert_allclose(call(lambda x, at: rope(x, at), types, x=x, at=at), rotate(x, at, inv_freq), rtol=1e-4, atol=1e-5)
    one = run(nn.trace(Fn(lambda x: rope(x, nn.positions(x))), {"x": "f32[b, s, 3, 8]"}), x=x)[0]
    assert_allclose(one, rotate(x, np.arange(5)[None].repeat(2, 0), inv_freq), rtol=1e-4, atol=1e-5)


def test_rope_scalings() -> None:
    plain = nn.frequencies(64, 10000.0)
    assert_allclose(plain, 10000.0 ** (-np.arange(0, 64, 2) / 64), rtol=1e-6)
    assert_allclose(nn.RoPE(64, scaling={"rope_type": "linear", "factor": 8.0}).inv_freq, plain / 8, rtol=1e-6)
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    scaled = nn.RoPE(64, scaling={"rope_type": "llama3", **numbers}).inv_freq
    wave = 2 * np.pi / plain
    assert_allclose(scaled[wave < 64], plain[wave < 64], rtol=1e-6)
    assert_allclose(scaled[wave > 256], plain[wave > 256] / 8, rtol=1e-6)
    between = (wave >= 64) & (wave <= 256)
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()
    yarn = nn.RoPE(64, scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256})
    assert yarn.factor == pytest.approx(0.1 * math.log(4) + 1)
    assert_allclose(yarn.inv_freq[0], plain[0])
    assert_allclose(yarn.inv_freq[-1], plain[-1] / 4, rtol=1e-6)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.MLP(8, 16)
        self.glu = nn.GLU(8, 12)
        self.last = nn.RMSNorm(8, offset=1.0)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return self.last(self.glu(self.mlp(self.norm(x))))


def test_layers_equal_numpy() -> None:
    program = nn.trace(TwoLayers(), {"x": "f32[b, s, 8]"})
    p = {k: s.load() for k, s in program.params.items()}
    x = f32(2, 3, 8)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["norm.weight"] + p["norm.bias"]
    y = y @ p["mlp.up_proj.weight"].T + p["mlp.up_proj.bias"]
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / 2**0.5))
    y = y @ p["mlp.down_proj.weight"].T + p["mlp.down_proj.bias"]
    gate = y @ p["glu.gate_proj.weight"].T
    y = (gate / (1 + np.exp(-gate)) * (y @ p["glu.up_proj.weight"].T)) @ p["glu.down_proj.weight"].T
    y = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6) * (1 + p["last.weight"])
    assert_allclose(run(program, x=x)[0], y, rtol=1e-4, atol=1e-5)


class Cross(nn.Module):
    def __init__(self) -> None:
        self.cross = nn.CrossAttention(8, 2, context_dim=6)

    def __call__(self, x: nn.Tensor, context: nn.Tensor, real: nn.Tensor) -> nn.Tensor:
        return self.cross(x, context, real[:, None, :])


def test_cross_attention_sees_what_the_mask_leaves() -> None:
    program = nn.trace(Cross(), {"x": "f32[b, s, 8]", "context": "f32[b, t, 6]", "real": "bool[b, t]"})
    x, context = f32(2, 3, 8), f32(2, 5, 6)
    real = np.arange(5)[None] < np.array([[5], [2]])
    got = run(program, x=x, context=context, real=real)[0]
    short = run(program, x=x[1:], context=context[1:, :2], real=real[1:, :2])[0]
    assert_allclose(got[1:], short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding, length", [(0, 6), (1, 8), ("same", 8), ("causal", 8)])
def test_conv1d(padding: int | str, length: int) -> None:
    program = nn.trace(nn.Conv1d(4, 6, 3, padding=padding, groups=2), {"x": "f32[b, 4, s]"}, outputs=["y"])
    p = {k: s.load() for k, s in program.params.items()}
    x = f32(2, 4, 8)
    low, high = {0: (0, 0), 1: (1, 1), "same": (1, 1), "causal": (2, 0)}[padding]
    wide = np.pad(x, [(0, 0), (0, 0), (low, high)])
    want = np.stack(
        [np.einsum("bck,ock->bo", wide[:, g * 2 : g * 2 + 2, i : i + 3], p["weight"][g * 3 : g * 3 + 3])
         for g in range(2) for i in range(length)], -1)  # fmt: skip
    want = want.reshape(2, 3, 2, length).swapaxes(1, 2).reshape(2, 6, length)
    assert_allclose(run(program, x=x)[0], want + p["bias"][:, None], rtol=1e-4, atol=1e-5)


def test_conv2d() -> None:
    program = nn.trace(nn.Conv2d(3, 4, 2, stride=2, bias=False), {"x": "f32[b, 3, 8, 6]"})
    w = program.params["weight"].load()
    x = f32(2, 3, 8, 6)
    want = np.einsum("bchiwj,ocij->bohw", x.reshape(2, 3, 4, 2, 3, 2), w)
    assert_allclose(run(program, x=x)[0], want, rtol=1e-4, atol=1e-5)


def test_dropout_acts_only_in_training() -> None:
    types = {"x": "f32[b, 1000]", "key": "u32[2]"}
    x, key = np.ones((2, 1000), np.float32), np.array([1, 2], np.uint32)
    drop = nn.Dropout(0.25)
    assert_array_equal(run(nn.trace(Fn(lambda x, key: drop(x, key)), types), x=x, key=key)[0], x)
    got = run(nn.trace(Fn(lambda x, key: drop(x, key)), types, training=True), x=x, key=key)[0]
    assert 0.2 < (got == 0).mean() < 0.3
    assert_allclose(got[got != 0], 1 / 0.75, rtol=1e-6)


DROPPED = {"x": "f32[n]", "key": "u32[2]"}


def test_dropouts_of_one_key_are_independent_of_each_other_and_of_other_steps() -> None:
    def several(x: nn.Tensor, key: nn.Tensor) -> list[nn.Tensor]:
        same = nn.Dropout(0.5)
        return [same(x, key), nn.dropout(x, key, 0.0), same(x, key), nn.dropout(x, key, 0.5), nn.dropout(x, key, 0.5)]

    program = nn.trace(Fn(several), DROPPED, training=True)
    n = 16384
    keys = [(seed, step) for seed in (0, 1) for step in (0, 1, 2, 3)]  # as the training loop makes them
    got = [run(program, x=np.ones(n, np.float32), key=np.array(key, np.uint32)) for key in keys]
    masks = np.stack([m != 0 for one in got for i, m in enumerate(one) if i != 1])
    shifted = np.concatenate([masks, np.roll(masks, 1, axis=1), np.roll(masks, 2, axis=1)])
    agree = (shifted @ (2.0 * shifted.T - 1) + (1.0 - shifted) @ (1 - 2.0 * shifted.T)) / n  # of each pair: same - different
    np.fill_diagonal(agree, 0)
    assert np.abs(agree).max() < 5 / math.sqrt(n)  # 5 standard deviations; the largest of 5000 is near 4


def test_the_first_dropout_has_the_key_itself_and_texts_are_the_same() -> None:
    def two(x: nn.Tensor, key: nn.Tensor) -> nn.Tensor:
        return nn.dropout(nn.dropout(x, key, 0.25), key, 0.5)

    once, again = (str(nn.trace(Fn(two), DROPPED, training=True)) for _ in range(2))
    assert once == again
    assert "dropout(%x, %key) {rate=0.25}" in once
    one = str(nn.trace(Fn(lambda x, key: nn.dropout(x, key, 0.25)), DROPPED, training=True))
    assert "random_bits" not in one


def test_dropouts_of_two_keys_are_each_the_first() -> None:
    def two(x: nn.Tensor, key: nn.Tensor, other: nn.Tensor) -> Any:
        return nn.dropout(x, key, 0.25), nn.dropout(x, other, 0.5)

    text = str(nn.trace(Fn(two), {**DROPPED, "other": "u32[2]"}, training=True))
    assert "dropout(%x, %key)" in text
    assert "dropout(%x, %other)" in text


def test_dropout_without_a_key_is_refused() -> None:
    with pytest.raises(TypeMismatch, match="needs a key"):
        nn.trace(Fn(lambda x: nn.dropout(x, None, 0.5)), {"x": "f32[n]"}, training=True)


def test_half_precision_norms_and_softmax_compute_wide() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            self.norm = nn.RMSNorm(8, dtype="f16")

        def __call__(self, x: nn.Tensor) -> nn.Tensor:
            return self.norm(x)

    x = (f32(2, 8) * 300).astype(np.float16)  # squares overflow f16
    got = run(nn.trace(Half(), {"x": "f16[b, 8]"}), x=x)[0]
    wide = x.astype(np.float32)
    assert got.dtype == np.float16
    assert_allclose(got, wide / np.sqrt((wide**2).mean(-1, keepdims=True)), rtol=2e-3)
