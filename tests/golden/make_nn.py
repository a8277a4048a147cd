"""Makes tests/golden/nn.npz: what torch computes of functions and layers that ``nn`` has too; the version is in the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

torch.manual_seed(0)
X, Y = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
IMAGE, SOUND = torch.randn(2, 4, 7, 9), torch.randn(2, 4, 11)
LOGITS, CLASSES = torch.randn(6, 5) * 3, torch.tensor([0, 4, -100, 2, 2, 1])
DEEP, PLACES = torch.randn(2, 5, 3), torch.tensor([[0, 4, -100], [2, 3, 1]])
PROBABLE = torch.softmax(torch.randn(6, 5), -1)
PER = torch.rand(5) + 0.5
C4 = [torch.randn(4) for _ in range(3)]
UP, UP2 = torch.randn(4, 3, 3), torch.randn(4, 2, 3, 2)
IDS, TABLE = torch.tensor([[1, 0, 3], [2, 2, 1]]), torch.randn(4, 6)
MASK = torch.rand(3, 4, 5) > 0.5
TIES = (X * 2).round()
TIES[1, 2, 3] = TIES[2, 0] = float("nan")
FAR = torch.tensor([-torch.inf, 1.0, torch.inf, 3.0, 90.0])
EDGES = torch.stack([X[0, 0] * 30, torch.full((5,), -torch.inf), FAR, X[0, 1]])
ODD = torch.tensor([-90.0, -2.5, -1.0, -0.4, -1e-6, 0.0, 1e-6, 0.5, 1.0, 1.5, 7.0, 90.0, torch.nan, torch.inf, -torch.inf])

CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), (X,)),
    "elu": (lambda x: F.elu(x, 1.5), (X * 4,)),
    "elu_small": (F.elu, (X * 1e-4,)),
    "mish": (F.mish, (X * 4,)),
    "embedding": (F.embedding, (IDS, TABLE)),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), (IMAGE, C4[0], C4[1])),
    "batch_norm": (lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b), (IMAGE, C4[0], C4[1].abs(), C4[2], C4[0])),
    "normalize": (F.normalize, (X,)),
    "normalize_1": (lambda x: F.normalize(x, 1, -1), (X,)),
    "normalize_inf": (lambda x: F.normalize(x, float("inf"), 0), (X,)),
    "cosine_similarity": (lambda x, y: F.cosine_similarity(x, y, -1), (X, Y)),
    "max_pool1d": (lambda x: F.max_pool1d(x, 3, 2, 1), (SOUND,)),
    "max_pool2d": (lambda x: F.max_pool2d(x, (3, 2), None, (1, 1), (2, 1)), (IMAGE,)),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 3, 2, 1), (SOUND,)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (IMAGE,)),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 4), (SOUND,)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 12)), (IMAGE,)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (1, 4)), (IMAGE,)),
    "conv_transpose1d": (lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1), (SOUND, UP, C4[0][:3])),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, None, (2, 3), (1, 0), (1, 2), 2, (2, 1)), (IMAGE, UP2)),
    "nearest": (lambda x: F.interpolate(x, (5, 20)), (IMAGE,)),
    "nearest_twice": (lambda x: F.interpolate(x, scale_factor=2), (SOUND,)),
    "linear": (lambda x: F.interpolate(x, 17, mode="linear"), (SOUND,)),
    "bilinear": (lambda x: F.interpolate(x, (14, 5), mode="bilinear"), (IMAGE,)),
    "bicubic": (lambda x: F.interpolate(x, (5, 13), mode="bicubic"), (IMAGE,)),
    "clip": (lambda x: torch.clip(x, -0.5, 0.7), (X,)),
    "argmax": (lambda x: torch.argmax(x, 1), (X,)),
    "argmin_all": (torch.argmin, (X,)),
    "sort": (lambda x: torch.sort(x, 1, descending=True)[0], (X,)),
    "argsort": (lambda x: torch.argsort(x, dim=-1, stable=True), (X,)),
    "logsumexp": (lambda x: torch.logsumexp(x, (0, 2)), (X * 50,)),
    "var": (lambda x: torch.var(x, -1), (X,)),
    "var_0": (lambda x: torch.var(x, (0, 1), correction=0, keepdim=True), (X,)),
    "std": (torch.std, (X,)),
    "tril": (lambda x: torch.tril(x, 1), (X,)),
    "triu": (lambda x: torch.triu(x, -1), (X,)),
    "repeat": (lambda x: torch.repeat_interleave(x, 3, 1), (X,)),
    "tile": (lambda x: x.repeat(2, 1, 3, 1), (X,)),
    "roll": (lambda x: torch.roll(x, 7, 2), (X,)),
    "roll_back": (lambda x: torch.roll(x, -2, 1), (X,)),
    "flip": (lambda x: torch.flip(x, (0, 2)), (X,)),
    "masked_fill": (lambda x, m: x.masked_fill(m, 9.0), (X, MASK)),
    "outer": (torch.outer, (C4[0], PER)),
    "cumprod": (lambda x: torch.cumprod(x, 1), (X,)),
    "cummax": (lambda x: torch.cummax(x, 1)[0], (TIES,)),
    "cummax_places": (lambda x: torch.cummax(x, 1)[1], (TIES,)),
    "cummin": (lambda x: torch.cummin(x, 0)[0], (TIES,)),
    "cummin_places": (lambda x: torch.cummin(x, 0)[1], (TIES,)),
    "cummax_int": (lambda x: torch.cummax(x, -1)[1], (IDS - 2,)),
    "abs": (torch.abs, (X,)),
    "logaddexp": (torch.logaddexp, (EDGES, EDGES.roll(1, 0))),
    "logcumsumexp": (lambda x: torch.logcumsumexp(x, -1), (EDGES,)),
    "linspace": (lambda x: x.sum() * 0 + torch.linspace(-1.3, 2.9, 7), (PER,)),
    "linspace_1": (lambda x: x.sum() * 0 + torch.linspace(3, 5, 1), (PER,)),
    "eye": (lambda x: x.sum() * 0 + torch.eye(3, 5), (PER,)),
    "cross_entropy": (F.cross_entropy, (LOGITS, CLASSES)),
    "cross_entropy_deep": (lambda x, t, w: F.cross_entropy(x, t, w, label_smoothing=0.1), (DEEP, PLACES, PER)),
    "cross_entropy_none": (lambda x, t: F.cross_entropy(x, t, ignore_index=2, reduction="none"), (LOGITS[3:], CLASSES[3:])),
    "cross_entropy_sum": (
        lambda x, t, w: F.cross_entropy(x, t, w, reduction="sum", label_smoothing=0.2), (LOGITS, CLASSES, PER),
    ),
    "cross_entropy_last": (lambda x, t: F.cross_entropy(x.transpose(1, 2), t), (DEEP.transpose(1, 2).contiguous(), PLACES)),
    "cross_entropy_soft": (lambda x, t, w: F.cross_entropy(x, t, w, label_smoothing=0.1), (LOGITS, PROBABLE, PER)),
    "mse": (F.mse_loss, (X, Y)),
    "l1": (lambda x, y: F.l1_loss(x, y, reduction="sum"), (X, Y)),
    "huber": (lambda x, y: F.huber_loss(x, y, delta=0.7), (X, Y)),
    "bce_with_logits": (
        lambda x, t, w: F.binary_cross_entropy_with_logits(x, t, pos_weight=w), (LOGITS * 20, PROBABLE, PER),
    ),
    "kl_div": (
        lambda x, t: F.kl_div(torch.log_softmax(x, 1), t, reduction="batchmean"), (LOGITS, PROBABLE.where(PROBABLE > 0.1, 0)),
    ),
    "kl_div_log": (lambda x, t: F.kl_div(x, t, log_target=True), (LOGITS, LOGITS.flip(0))),
    **{k: (getattr(torch, k), (ODD,)) for k in (
        "asin", "acos", "atan", "sinh", "cosh", "tan", "asinh", "acosh", "atanh", "expm1", "log1p", "round", "isnan", "isinf",
    )},
    **{k: (getattr(F, k), (ODD,)) for k in (
        "relu6", "hardtanh", "hardsigmoid", "hardswish", "selu", "softsign", "logsigmoid",
    )},
    "sum": (lambda x: torch.sum(x, (0, -1)), (X,)),
    "mean": (torch.mean, (X,)),
    "max": (lambda x: torch.amax(x, 1, keepdim=True), (X,)),
    "min": (torch.amin, (TIES[0],)),
    "prod": (lambda x: torch.prod(x, 2), (X,)),
    "any": (lambda x: torch.any(x, -1), (MASK,)),
    "all": (torch.all, (MASK,)),
    "split": (lambda x: torch.chunk(x, 2, 1)[1], (X,)),
    "matmul": (lambda x, y: torch.matmul(x, y.mT), (X, Y)),
    "celu": (lambda x: F.celu(x, 0.7), (ODD,)),
    "prelu": (F.prelu, (X, C4[0])),
    "prelu_one": (F.prelu, (X, PER[:1])),
    "glu": (lambda x: F.glu(x, 1), (X,)),
    "instance_norm": (lambda x, w, b: F.instance_norm(x, None, None, w, b), (X, C4[0], C4[1])),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (IMAGE[:, :, :2],)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (IMAGE[:, :2, :6, :4],)),
    "smooth_l1": (lambda x, y: F.smooth_l1_loss(x, y, beta=0.7), (X, Y)),
}  # fmt: skip


def main() -> None:
    out: dict[str, np.ndarray] = {"torch": np.array(torch.__version__)}
    for name, (f, inputs) in CASES.items():
        for i, x in enumerate(inputs):
            out[f"{name}.in.{i}"] = x.numpy()
        out[f"{name}.out"] = f(*inputs).numpy()
    layers = {
        "GRU": torch.nn.GRU(5, 3, 2, batch_first=True), "LSTM": torch.nn.LSTM(5, 3, 2, batch_first=True),
        "Sequential": torch.nn.Sequential(
            torch.nn.Conv2d(4, 6, 3), torch.nn.GroupNorm(3, 6), torch.nn.Mish(), torch.nn.BatchNorm2d(6),
            torch.nn.ConvTranspose2d(6, 4, 2, 2), torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(140, 3),
            torch.nn.ELU(),
        ).eval(),
    }  # fmt: skip
    for name, layer in layers.items():
        state = {k: v for k, v in layer.state_dict().items() if v.dtype.is_floating_point}
        for p in state.values():
            p.copy_(torch.rand_like(p) - 0.3 if p.ndim > 1 else torch.rand_like(p) + 0.2)
        out.update({f"{name}.weight.{k}": v.numpy() for k, v in state.items()})
        x = IMAGE if name == "Sequential" else X
        with torch.no_grad():
            y = layer(x)
        flat = [y] if isinstance(y, Tensor) else [y[0], *(y[1] if isinstance(y[1], tuple) else [y[1]])]
        out[f"{name}.in.0"] = x.numpy()
        out.update({f"{name}.out.{i}": v.numpy() for i, v in enumerate(flat)})
    np.savez_compressed(Path(__file__).with_name("nn.npz"), **out)


if __name__ == "__main__":
    main()
