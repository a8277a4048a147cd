"""Functions, losses and layers of ``nn`` against torch's numbers (tests/golden/make_nn.py), sizes known or not, compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from wasat.frontend import load_weights, nn
from wasat.ir import DType, Program, TypeMismatch, WasatError, evaluate, parse, verify

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "nn.npz"))

CASES: dict[str, Callable[..., Any]] = {
    "leaky_relu": lambda x: nn.leaky_relu(x, 0.2),
    "elu": lambda x: nn.elu(x, 1.5),
    "elu_small": nn.elu,
    "mish": nn.mish,
    "embedding": nn.embedding,
    "group_norm": lambda x, w, b: nn.group_norm(x, 2, w, b),
    "batch_norm": nn.batch_norm,
    "normalize": nn.normalize,
    "normalize_1": lambda x: nn.normalize(x, 1, -1),
    "normalize_inf": lambda x: nn.normalize(x, float("inf"), 0),
    "cosine_similarity": lambda x, y: nn.cosine_similarity(x, y, -1),
    "max_pool1d": lambda x: nn.max_pool1d(x, 3, 2, 1),
    "max_pool2d": lambda x: nn.max_pool2d(x, (3, 2), None, (1, 1), (2, 1)),
    "avg_pool1d": lambda x: nn.avg_pool1d(x, 3, 2, 1),
    "avg_pool2d": lambda x: nn.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive_avg_pool1d": lambda x: nn.adaptive_avg_pool1d(x, 4),
    "adaptive_avg_pool2d": lambda x: nn.adaptive_avg_pool2d(x, (3, 12)),
    "adaptive_max_pool2d": lambda x: nn.adaptive_max_pool2d(x, (1, 4)),
    "conv_transpose1d": lambda x, w, b: nn.conv_transpose1d(x, w, b, 2, 1, 1),
    "conv_transpose2d": lambda x, w: nn.conv_transpose2d(x, w, None, (2, 3), (1, 0), (1, 2), 2, (2, 1)),
    "nearest": lambda x: nn.interpolate(x, (5, 20)),
    "nearest_twice": lambda x: nn.interpolate(x, scale_factor=2),
    "linear": lambda x: nn.interpolate(x, 17, mode="linear"),
    "bilinear": lambda x: nn.interpolate(x, (14, 5), mode="bilinear"),
    "bicubic": lambda x: nn.interpolate(x, (5, 13), mode="bicubic"),
    "clip": lambda x: nn.clip(x, -0.5, 0.7),
    "argmax": lambda x: nn.argmax(x, 1),
    "argmin_all": nn.argmin,
    "sort": lambda x: nn.sort(x, 1, descending=True),
    "argsort": nn.argsort,
    "logsumexp": lambda x: nn.logsumexp(x, (0, 2)),
    "var": lambda x: nn.var(x, -1),
    "var_0": lambda x: nn.var(x, (0, 1), correction=0, keepdims=True),
    "std": nn.std,
    "tril": lambda x: nn.tril(x, 1),
    "triu": lambda x: nn.triu(x, -1),
    "repeat": lambda x: nn.repeat(x, 3, 1),
    "tile": lambda x: nn.tile(x, (2, 1, 3, 1)),
    "roll": lambda x: nn.roll(x, 7, 2),
    "roll_back": lambda x: nn.roll(x, -2, 1),
    "flip": lambda x: nn.flip(x, (0, 2)),
    "masked_fill": lambda x, m: nn.masked_fill(x, m, 9.0),
    "outer": nn.outer,
    "cumprod": lambda x: nn.cumprod(x, 1),
    "cummax": lambda x: nn.cummax(x, 1)[0],
    "cummax_places": lambda x: nn.cummax(x, 1)[1],
    "cummin": lambda x: nn.cummin(x, 0)[0],
    "cummin_places": lambda x: nn.cummin(x, 0)[1],
    "cummax_int": lambda x: nn.cummax(x)[1],
    "abs": nn.abs,
    "logaddexp": nn.logaddexp,
    "logcumsumexp": nn.logcumsumexp,
    "linspace": lambda x: x.sum() * 0 + nn.linspace(-1.3, 2.9, 7),
    "linspace_1": lambda x: x.sum() * 0 + nn.linspace(3, 5, 1),
    "eye": lambda x: x.sum() * 0 + nn.eye(3, 5),
    "cross_entropy": nn.cross_entropy,
    "cross_entropy_deep": lambda x, t, w: nn.cross_entropy(x, t, w, label_smoothing=0.1),
    "cross_entropy_none": lambda x, t: nn.cross_entropy(x, t, ignore_index=2, reduction="none"),
    "cross_entropy_sum": lambda x, t, w: nn.cross_entropy(x, t, w, reduction="sum", label_smoothing=0.2),
    "cross_entropy_last": lambda x, t: nn.cross_entropy(x, t, axis=-1),
    "cross_entropy_soft": lambda x, t, w: nn.cross_entropy(x, t, w, label_smoothing=0.1),
    "mse": nn.mse,
    "l1": lambda x, y: nn.l1(x, y, reduction="sum"),
    "huber": lambda x, y: nn.huber(x, y, delta=0.7),
    "bce_with_logits": lambda x, t, w: nn.bce_with_logits(x, t, pos_weight=w),
    "kl_div": lambda x, t: nn.kl_div(nn.log_softmax(x, 1), t, reduction="batchmean"),
    "kl_div_log": lambda x, t: nn.kl_div(x, t, log_target=True),
    **{k: getattr(nn, k) for k in (
        "asin", "acos", "atan", "sinh", "cosh", "tan", "asinh", "acosh", "atanh", "expm1", "log1p", "round", "isnan", "isinf",
        "relu6", "hardtanh", "hardsigmoid", "hardswish", "selu", "softsign", "logsigmoid", "prelu", "mean", "min", "all",
        "instance_norm",
    )},
    "sum": lambda x: nn.sum(x, (0, -1)),
    "max": lambda x: nn.max(x, 1, keepdims=True),
    "prod": lambda x: nn.prod(x, 2),
    "any": lambda x: nn.any(x, -1),
    "split": lambda x: nn.split(x, 2, 1)[1],
    "matmul": lambda x, y: nn.matmul(x, y.T),
    "celu": lambda x: nn.celu(x, 0.7),
    "prelu_one": nn.prelu,
    "glu": lambda x: nn.glu(x, 1),
    "pixel_shuffle": lambda x: nn.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: nn.pixel_unshuffle(x, 2),
    "smooth_l1": lambda x, y: nn.smooth_l1(x, y, beta=0.7),
}
STATIC = {
    "conv_transpose1d", "conv_transpose2d", "group_norm", "batch_norm", "instance_norm", "prelu", "prelu_one", "glu", "split",
    "matmul", "pixel_shuffle", "pixel_unshuffle",
}
"""Channels and kernels are known."""


def inputs(name: str) -> list[np.ndarray]:
    return [GOLDEN[f"{name}.in.{i}"] for i in range(9) if f"{name}.in.{i}" in GOLDEN]


def types(name: str, symbolic: bool, mark: str = "") -> dict[str, str]:
    """Of the inputs; symbolic: one name for each size."""
    out = {}
    for i, x in enumerate(inputs(name)):
        whole = name == "pixel_unshuffle" or (i and name in STATIC)  # of which nothing may be left open
        fixed = set(range(x.ndim)) if whole else {1} if name in STATIC else set()
        shape = [f"n{d}" if symbolic and k not in fixed else d for k, d in enumerate(x.shape)]
        out[f"x{mark}{i}"] = f"{DType.of(x.dtype)}[{', '.join(map(str, shape))}]"
    return out


class Fn(nn.Module):
    def __init__(self, f: Callable[..., Any], **parts: Any) -> None:
        self.f = f
        self.__dict__.update(parts)

    def __call__(self, **x: nn.Tensor) -> Any:
        return self.f(*x.values())


def run(program: Program, xs: list[np.ndarray]) -> list[Any]:
    (graph,) = program.graphs.values()
    verify(graph)
    assert str(parse(str(graph))) == str(graph)
    return evaluate(graph, dict(zip((v.name for v in graph.inputs), xs)), {k: program.load(k) for k in program.params})


def same(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert_allclose(got, want, rtol=3e-5, atol=3e-6)


def test_every_golden_case_is_tried() -> None:
    assert {k.rpartition(".")[0] for k in GOLDEN if k.endswith(".out")} == set(CASES)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_function_is_torchs(name: str, symbolic: bool) -> None:
    (got,) = run(nn.trace(Fn(CASES[name]), types(name, symbolic)), inputs(name))
    same(np.asarray(got), GOLDEN[f"{name}.out"])


@pytest.mark.parametrize("name", ["elu_small", "expm1", "log1p", "asinh", "logsigmoid"])
def test_digits_near_zero_are_kept(name: str) -> None:
    (got,) = run(nn.trace(Fn(CASES[name]), types(name, False)), inputs(name))
    assert_allclose(got, GOLDEN[f"{name}.out"], rtol=1e-6, atol=0)


def test_a_norm_of_f64_is_one() -> None:
    x = np.random.default_rng(0).standard_normal((2, 4, 5))
    (got,) = run(nn.trace(Fn(nn.instance_norm), {"x": "f64[2, 4, 5]"}), [x])
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    assert_allclose(got, want, rtol=1e-12, atol=1e-14)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "GRU": lambda: nn.GRU(5, 3, 2),
    "LSTM": lambda: nn.LSTM(5, 3, 2),
    "Sequential": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.Mish(), nn.BatchNorm(6), nn.ConvTranspose2d(6, 4, 2, 2), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(140, 3, bias=True), nn.ELU(),
    ),
}  # fmt: skip


def _flat(y: Any) -> list[nn.Tensor]:
    return [y] if isinstance(y, nn.Tensor) else [t for part in y for t in _flat(part)]


def layer(name: str, symbolic: bool) -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            self.it = LAYERS[name]()

        def __call__(self, x: nn.Tensor) -> Any:
            return tuple(_flat(self.it(x)))

    x = GOLDEN[f"{name}.in.0"]
    sizes = ["b", *("s" if name != "Sequential" and k == 1 else d for k, d in enumerate(x.shape[1:], 1))]
    program = nn.trace(Net(), {"x": f"f32[{', '.join(map(str, sizes if symbolic else x.shape))}]"})
    weights = {k.replace(f"{name}.weight.", "it.", 1): v for k, v in GOLDEN.items() if k.startswith(f"{name}.weight.")}
    return load_weights(program, weights)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_torchs_under_torchs_names(name: str, symbolic: bool) -> None:
    for i, got in enumerate(run(layer(name, symbolic), [GOLDEN[f"{name}.in.0"]])):
        same(got, GOLDEN[f"{name}.out.{i}"])


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([n for n in CASES if n.startswith(("cross", "mse", "bce", "group", "max_pool2d", "roll"))], id="some"),
        pytest.param(list(CASES), id="all", marks=pytest.mark.slow),
    ],
)
def test_many_are_compiled_in_one_library(names: list[str]) -> None:
    pytest.importorskip("tvm")
    import wasat as ws

    def all_of(*xs: nn.Tensor) -> dict[str, nn.Tensor]:
        out, at = {}, 0
        for i, name in enumerate(names):
            n = len(inputs(name))
            out[f"y{i}"] = CASES[name](*xs[at : at + n])
            at += n
        return out

    given = {k: t for i, name in enumerate(names) for k, t in types(name, False, f"{i}_").items()}
    feeds = {f"x{i}_{k}": x for i, name in enumerate(names) for k, x in enumerate(inputs(name))}
    made = ws.run(nn.trace(Fn(all_of), given), backend="cpu", **feeds)
    for i, name in enumerate(names):
        same(np.asarray(made[f"y{i}"]), GOLDEN[f"{name}.out"])


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_recurrences_are_compiled(name: str) -> None:
    pytest.importorskip("tvm")
    import wasat as ws

    made = ws.run(layer(name, True), backend="cpu", x=GOLDEN[f"{name}.in.0"])
    for i, got in enumerate(made.values()):
        same(got, GOLDEN[f"{name}.out.{i}"])


@pytest.mark.parametrize(
    "f, given, says",
    [
        (nn.mse, ["f32[3]", "f32[3, 1]"], "input and target have one shape"),
        (nn.mse, ["f32[n]", "f32[1]"], "input and target have one shape"),
        (nn.l1, ["f32[3]", "f16[3]"], "differ in element type"),
        (nn.huber, ["i64[3]", "i64[3]"], "takes a tensor of floats"),
        (lambda x, y: nn.mse(x, y, reduction="average"), ["f32[3]", "f32[3]"], "one of mean, sum, none"),
        (nn.cross_entropy, ["f32[b, s, 9]", "i64[b, s]"], "axis=-1"),
        (nn.cross_entropy, ["f32[3]", "i64[]"], "takes logits"),
        (nn.cross_entropy, ["f32[3, 4]", "bool[3]"], "class numbers or probabilities"),
        (nn.cross_entropy, ["f32[3, 4]", "i64[3]", "f32[3]"], "each of 4 classes"),
        (lambda x: nn.max_pool2d(x, 2), ["f32[2, 3, 4]"], r"takes \[b, channels, height, width\]"),
        (lambda x: nn.max_pool1d(x, 2, padding=2), ["f32[2, 3, 4]"], "more than half"),
        (lambda x: nn.avg_pool1d(x, 0), ["f32[2, 3, 4]"], "kernel_size is 0"),
        (lambda x: nn.avg_pool1d(x, 2), ["i64[2, 3, 4]"], "takes a tensor of floats"),
        (lambda x, w: nn.conv_transpose1d(x, w), ["f32[1, 3, 4]", "f32[4, 3, 2]"], "does not fit"),
        (lambda x, w: nn.conv_transpose1d(x, w, output_padding=1), ["f32[1, 3, 4]", "f32[3, 3, 2]"], "must be smaller"),
        (lambda x: nn.interpolate(x), ["f32[1, 3, 4]"], "either size= or scale_factor="),
        (lambda x: nn.interpolate(x, 8, mode="bilinear"), ["f32[1, 3, 4]"], "bilinear is for"),
        (lambda x: nn.interpolate(x, scale_factor=1.5), ["f32[1, 3, 4]"], "say the size instead"),
        (lambda x: nn.group_norm(x, 3), ["f32[2, 4, 5]"], "do not divide into 3 groups"),
        (lambda x, m: nn.batch_norm(x, m, m), ["f32[2, 4, 5]", "f32[5]"], "each of 4 channels"),
        (lambda x: nn.squeeze(x, 0), ["f32[b, 3]"], "not of size 1"),
        (nn.outer, ["f32[2, 2]", "f32[2]"], "two vectors"),
        (nn.clip, ["f32[2]"], "needs a bound"),
        (nn.tril, ["f32[2]"], "rows, columns"),
        (nn.logsumexp, ["i64[2]"], "takes a tensor of floats"),
        (lambda x: nn.var(x, (0, -2)), ["f32[2, 2]"], "name one twice"),
        (lambda x: nn.normalize(x, 3.0), ["f32[2, 2]"], "p is 1, 2 or inf"),
        (lambda x, m: nn.masked_fill(x, m, 0.0), ["f32[2, 3]", "bool[2, 2]"], "does not fit"),
        (lambda x, m: nn.masked_fill(x, m, 0.0), ["f32[2, 3]", "f32[2, 3]"], "bool tensor"),
        (lambda x: nn.repeat(x, 1.5, 0), ["f32[2]"], "number of times"),
        (lambda x: nn.tile(x, 2), ["f32[2]"], "one number for each axis"),
        (nn.cumprod, ["bool[2]"], "cast them first"),
        (nn.cummax, ["bool[2]"], "nn.cummax of booleans"),
        (nn.logcumsumexp, ["i64[2]"], "takes a tensor of floats"),
        (lambda x: nn.unsqueeze(x, 3), ["f32[2]"], "no place 3"),
        (nn.prelu, ["f32[2, 3, 4]", "f32[2]"], "one for each channel"),
        (nn.glu, ["f32[2, 3]"], "does not split into 2"),
        (nn.hardswish, ["i32[2]"], "takes a tensor of floats"),
        (nn.instance_norm, ["f32[2, 3]"], r"takes \[b, channels, \*space\]"),
        (lambda x: nn.pixel_shuffle(x, 2), ["f32[1, 6, 2, 2]"], "do not divide into 2 x 2"),
        (lambda x: nn.pixel_unshuffle(x, 2), ["f32[1, 1, 3, 2]"], "do not divide by 2"),
        (lambda x: nn.pixel_shuffle(x, 0), ["f32[1, 4, 2, 2]"], "at least 1"),
        (lambda x, y: nn.smooth_l1(x, y, beta=0.0), ["f32[2]", "f32[2]"], "beta is 0.0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(f: Callable[..., Any], given: list[str], says: str) -> None:
    with pytest.raises(TypeMismatch, match=says):
        nn.trace(Fn(f), {f"x{i}": t for i, t in enumerate(given)})


def test_layers_refuse_what_they_cannot_be() -> None:
    for make in (
        lambda: nn.GroupNorm(3, 4), lambda: nn.Sequential([nn.Identity()]), lambda: nn.GRU(0, 3),
        lambda: nn.ConvTranspose1d(3, 4, 2, groups=2),
    ):  # fmt: skip
        with pytest.raises(WasatError):
            make()
    with pytest.raises(TypeMismatch, match="makes none; for training"):
        nn.trace(nn.BatchNorm(4), {"x": "f32[b, 4]"}, training=True)
    with pytest.raises(TypeMismatch, match=r"takes \[b, s, 5\]"):
        nn.trace(Fn(lambda x: nn.GRU(5, 3)(x)[0]), {"x": "f32[b, s, 4]"})


def test_no_target_counts() -> None:
    x = np.ones((2, 3), np.float32)
    (got,) = run(nn.trace(Fn(nn.cross_entropy), {"x": "f32[n, 3]", "t": "i64[n]"}), [x, np.full(2, -100)])
    assert got == 0


def test_initializers() -> None:
    wide = lambda: nn.Parameter((300, 200, 2))
    for set_, std in (
        (nn.init.xavier_uniform, (2 / 1000) ** 0.5), (nn.init.xavier_normal, (2 / 1000) ** 0.5),
        (nn.init.kaiming_uniform, (2 / 400) ** 0.5), (nn.init.kaiming_normal, (2 / 400) ** 0.5), (nn.init.normal, 1.0),
    ):  # fmt: skip
        x = nn.Sequential(lambda _: 0)  # a module with one parameter
        x.w = set_(wide())
        w = x.init(0)["w"]
        assert_allclose([w.mean(), w.std()], [0, std], atol=0.02 * std)
        if "uniform" in set_.__name__:
            assert abs(w).max() <= std * 3**0.5
    x.w = nn.init.uniform(wide(), 2.0, 6.0)
    w = x.init(0)["w"]
    assert 2 <= w.min() < 2.01
    assert 5.99 < w.max() <= 6
    x.w = nn.init.constant(wide(), 3.0)
    assert (x.init(0)["w"] == 3).all()
    with pytest.raises(WasatError, match="no matrix"):
        nn.init.xavier_normal(nn.Parameter((3,)))
