"""Training steps beside torch eager, torch.compile and jax.jit: one model, one batch, one optimizer, the contenders in turns.

    python benchmarks/train.py --torch PYTHON --jax PYTHON -o benchmarks/results/train.md

PYTHON: interpreters that have torch (2.13 or so) and jax (CPU), each of a virtual environment of its own; who has none does
not run. Every turn is a process: it compiles, takes 3 steps to warm up and 15 that are timed. Figures are medians over
the steps of all turns, peak memory is that of the largest process, compilation included. All losses must agree.

The models; AdamW, gradients clipped to norm 1:

- decoder: 32 rows of 64 tokens, width 192, 4 layers, 6 heads, RoPE, SwiGLU of 512, 512 tokens; it reads 8 images of 32 x 32 as
  16 tokens each through an encoder (width 128, 2 layers, 4 heads, GELU of 256).
- vit: 64 images of 32 x 32 in 64 patches through an encoder (width 128, 4 layers, 4 heads, GELU of 256), their mean to 10
  classes.
- convnet: 64 images of 32 x 32 through two stages (3x3 convolutions of stride 2 to 64 and 128 channels, 2 ConvNeXt blocks of
  5x5 each), their mean to 10 classes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROWS, LENGTH, DIM, LAYERS, HEADS, HIDDEN, VOCAB = 32, 64, 192, 4, 6, 512, 512
IMAGES, PATCHES, PIXELS, ENCODER, ENCODER_LAYERS, ENCODER_HEADS = 8, 16, 192, 128, 2, 4
PICTURES, SIDE, CLASSES, VIT_LAYERS, CHANNELS, BLOCKS, KERNEL = 64, 32, 10, 4, (64, 128), 2, 5
RATE, DECAY, WARM, STEPS, TURNS = 1e-3, 0.1, 3, 15, 2


def batch(model: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if model != "decoder":
        shape = (PICTURES, 3, SIDE, SIDE) if model == "convnet" else (PICTURES, 64, SIDE * SIDE * 3 // 64)
        return {"pixels": rng.standard_normal(shape, np.float32), "labels": rng.integers(0, CLASSES, PICTURES)}
    text = rng.integers(0, VOCAB, (ROWS, LENGTH + 1))
    tokens, labels = text[:, :-1].copy(), text[:, 1:].copy()
    tokens[:IMAGES, :PATCHES] = VOCAB + np.arange(IMAGES * PATCHES).reshape(IMAGES, PATCHES)
    labels[:IMAGES, :PATCHES] = -1
    patches = rng.standard_normal((IMAGES, PATCHES, PIXELS), np.float32)
    return {"tokens": tokens, "patches": patches, "labels": labels}


# -- ours -------------------------------------------------------------------------------------------------------------------
def our_program(model: str) -> Any:
    from wasat.frontend.models.gemini.config import ConvNet
    from wasat.frontend.models.gemini.encoders import Stage
    from wasat.training.losses import add_loss, cross_entropy

    from wasat import nn

    class Block(nn.Module):
        def __init__(self, dim: int, heads: int, hidden: int, causal: bool) -> None:
            self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
            self.attention = nn.Attention(dim, heads, rope=nn.RoPE(dim // heads) if causal else None, causal=causal)
            self.mlp = nn.GLU(dim, hidden) if causal else nn.MLP(dim, hidden, bias=False)

        def __call__(self, x: nn.Tensor, positions: nn.Tensor) -> nn.Tensor:
            x = x + self.attention(self.attention_norm(x), positions)
            return x + self.mlp(self.mlp_norm(x))

    class Encoder(nn.Module):
        def __init__(self, layers: int, pixels: int) -> None:
            self.patch = nn.Linear(pixels, ENCODER)
            self.blocks = [Block(ENCODER, ENCODER_HEADS, 2 * ENCODER, False) for _ in range(layers)]

        def __call__(self, patches: nn.Tensor) -> nn.Tensor:
            v = self.patch(patches)
            for block in self.blocks:
                v = block(v, nn.positions(v))
            return v

    class Decoder(nn.Module):
        def __init__(self) -> None:
            self.encoder, self.project = Encoder(ENCODER_LAYERS, PIXELS), nn.Linear(ENCODER, DIM)
            self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
            self.blocks = [Block(DIM, HEADS, HIDDEN, True) for _ in range(LAYERS)]
            self.norm = nn.RMSNorm(DIM)

        def __call__(self, tokens: nn.Tensor, patches: nn.Tensor) -> nn.Tensor:
            media = self.project(self.encoder(patches)).reshape(-1, DIM)
            row = nn.minimum(nn.maximum(tokens - VOCAB, 0), media.shape[0] - 1)
            x = nn.where((tokens >= VOCAB)[..., None], nn.gather(media, row), self.embed(nn.minimum(tokens, VOCAB - 1)))
            for block in self.blocks:
                x = block(x, nn.positions(x))
            return self.head(self.norm(x))

    class Convolutions(nn.Module):
        def __init__(self) -> None:
            c = ConvNet(SIDE, 1, CHANNELS, (BLOCKS,) * len(CHANNELS), KERNEL)
            self.stages = [Stage(i, o, n, c) for i, o, n in zip((3, *CHANNELS), CHANNELS, c.blocks)]

        def __call__(self, x: nn.Tensor) -> nn.Tensor:
            for stage in self.stages:
                x = stage(x)
            return x.transpose(0, 2, 3, 1)

    class Classifier(nn.Module):
        def __init__(self, encoder: nn.Module, features: int) -> None:
            self.encoder, self.head = encoder, nn.Linear(features, CLASSES)

        def __call__(self, pixels: nn.Tensor) -> nn.Tensor:
            x = self.encoder(pixels)
            return self.head(x.reshape(x.shape[0], -1, x.shape[-1]).mean(axis=1))

    if model == "decoder":
        inputs = {"tokens": "i64[b, s]", "patches": f"f32[i, {PATCHES}, {PIXELS}]"}
        program = nn.trace(Decoder(), inputs, outputs=["logits"])
        add_loss(program, lambda b, v: cross_entropy(b, v["logits"], v["labels"]), {"labels": "i64[b, s]"})
        return program
    if model == "vit":
        traced, pixels = Classifier(Encoder(VIT_LAYERS, 48), ENCODER), "f32[n, 64, 48]"
    else:
        traced, pixels = Classifier(Convolutions(), CHANNELS[-1]), f"f32[n, 3, {SIDE}, {SIDE}]"
    program = nn.trace(traced, {"pixels": pixels}, outputs=["logits"])
    add_loss(program, lambda b, v: cross_entropy(b, v["logits"], v["labels"]), {"labels": "i64[n]"})
    return program


def ours(model: str, weights: Path) -> Callable[[], float]:
    from wasat.backends.tvm.targets import target_named
    from wasat.training.compiled import Compiled
    from wasat.training.optimizers import AdamW, Constant
    from wasat.training.step import train_step

    program = our_program(model)
    made = train_step(program, optimizer=AdamW(decay=DECAY), rate=Constant(RATE), clip=1.0)
    np.savez(weights, **{k: v for k, v in made.states.items() if not k.startswith("optimizer.")})
    data, states = batch(model), made.states
    compiled = Compiled(program, made, data, target_named("cpu", 2), "loss")

    def step() -> float:
        nonlocal states
        said, states = compiled.step(data, states)
        return float(said["loss"])

    return step


# -- the others: the same formulas over torch or jax.numpy ---------------------------------------------------------------------
def loss_of(xp: Any, nn: Any, p: dict[str, Any], **data: Any) -> Any:
    """``nn``: softmax, log_softmax, silu and gelu of the framework; ``xp``: its array functions."""

    def norm(x: Any, w: Any) -> Any:
        return x / xp.sqrt((x * x).mean(-1)[..., None] + 1e-6) * w

    def block(x: Any, name: str, heads: int, causal: bool) -> Any:
        b, s, dim = x.shape
        y = norm(x, p[f"{name}.attention_norm.weight"])
        q, k, v = ((y @ p[f"{name}.attention.{c}_proj.weight"].T).reshape(b, s, heads, -1) for c in "qkv")
        if causal:
            half = dim // heads // 2
            angle = xp.arange(s)[:, None] * xp.exp(xp.arange(half) * (-math.log(10000.0) / half))
            cos, sin = xp.cos(angle)[:, None], xp.sin(angle)[:, None]

            def turn(z: Any) -> Any:
                return nn.cat([z[..., :half] * cos - z[..., half:] * sin, z[..., half:] * cos + z[..., :half] * sin])

            q, k = turn(q), turn(k)
        out = nn.attention(q, k, v, causal).reshape(b, s, dim)
        x = x + out @ p[f"{name}.attention.o_proj.weight"].T
        y = norm(x, p[f"{name}.mlp_norm.weight"])
        up = y @ p[f"{name}.mlp.up_proj.weight"].T
        up = nn.silu(y @ p[f"{name}.mlp.gate_proj.weight"].T) * up if causal else nn.gelu(up)
        return x + up @ p[f"{name}.mlp.down_proj.weight"].T

    def encoder(patches: Any, layers: int) -> Any:
        v = patches @ p["encoder.patch.weight"].T
        for i in range(layers):
            v = block(v, f"encoder.blocks.{i}", ENCODER_HEADS, False)
        return v

    def layer_norm(x: Any, name: str) -> Any:
        x = x - x.mean(-1)[..., None]
        return norm(x, p[f"{name}.weight"]) + p[f"{name}.bias"]

    def convolutions(x: Any) -> Any:
        for i in range(len(CHANNELS)):
            stage = f"encoder.stages.{i}"
            x = nn.conv(x, p[f"{stage}.down.weight"], p[f"{stage}.down.bias"], 2, 1, 1)
            x = nn.channels_first(nn.gelu(layer_norm(nn.channels_last(x), f"{stage}.norm")))
            for j in range(BLOCKS):
                at = f"{stage}.blocks.{j}"
                y = nn.conv(x, p[f"{at}.depthwise.weight"], p[f"{at}.depthwise.bias"], 1, KERNEL // 2, CHANNELS[i])
                y = layer_norm(nn.channels_last(y), f"{at}.norm")
                y = nn.gelu(y @ p[f"{at}.mlp.up_proj.weight"].T + p[f"{at}.mlp.up_proj.bias"])
                x = x + nn.channels_first(y @ p[f"{at}.mlp.down_proj.weight"].T + p[f"{at}.mlp.down_proj.bias"])
        return nn.channels_last(x)

    if "pixels" in data:
        x = data["pixels"]
        x = convolutions(x) if x.ndim == 4 else encoder(x, VIT_LAYERS)
        return nn.cross_entropy(x.reshape(x.shape[0], -1, x.shape[-1]).mean(1) @ p["head.weight"].T, data["labels"])
    tokens = data["tokens"]
    media = (encoder(data["patches"], ENCODER_LAYERS) @ p["project.weight"].T).reshape(-1, DIM)
    text = p["embed.weight"][xp.clip(tokens, 0, VOCAB - 1)]
    x = xp.where((tokens >= VOCAB)[..., None], media[xp.clip(tokens - VOCAB, 0, IMAGES * PATCHES - 1)], text)
    for i in range(LAYERS):
        x = block(x, f"blocks.{i}", HEADS, True)
    return nn.cross_entropy(norm(x, p["norm.weight"]) @ p["head.weight"].T, data["labels"])


def with_torch(model: str, weights: Path, compiled: bool) -> Callable[[], float]:
    import types

    import torch
    from torch.nn import functional as F

    torch.set_num_threads(2)
    p = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in np.load(weights).items()}
    nn = types.SimpleNamespace(
        silu=F.silu, gelu=F.gelu, cat=lambda xs: torch.cat(xs, -1),
        attention=lambda q, k, v, causal: F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal).transpose(1, 2),
        cross_entropy=lambda x, labels: F.cross_entropy(x.flatten(0, -2), labels.reshape(-1), ignore_index=-1),
        conv=lambda x, w, bias, stride, padding, groups: F.conv2d(x, w, bias, stride, padding, groups=groups),
        channels_last=lambda x: x.permute(0, 2, 3, 1), channels_first=lambda x: x.permute(0, 3, 1, 2),
    )  # fmt: skip
    groups = [{"params": [v for v in p.values() if v.ndim > 1], "weight_decay": DECAY},
              {"params": [v for v in p.values() if v.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    data = {k: torch.tensor(v) for k, v in batch(model).items()}
    loss = torch.compile(loss_of) if compiled else loss_of

    def step() -> float:
        optimizer.zero_grad()
        value = loss(torch, nn, p, **data)
        value.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        return float(value)

    return step


def with_jax(model: str, weights: Path) -> Callable[[], float]:
    import types

    import jax
    import jax.numpy as jnp

    p = {k: jnp.asarray(v) for k, v in np.load(weights).items()}

    def attention(q: Any, k: Any, v: Any, causal: bool) -> Any:
        scores = jnp.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
        if causal:
            scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
        return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores), v)

    def cross_entropy(x: Any, labels: Any) -> Any:
        each = jnp.take_along_axis(jax.nn.log_softmax(x), jnp.maximum(labels, 0)[..., None], -1)[..., 0]
        return -jnp.where(labels >= 0, each, 0).sum() / (labels >= 0).sum()

    def conv(x: Any, w: Any, bias: Any, stride: int, padding: int, groups: int) -> Any:
        y = jax.lax.conv_general_dilated(x, w, (stride,) * 2, ((padding,) * 2,) * 2, feature_group_count=groups)
        return y + bias[:, None, None]

    nn = types.SimpleNamespace(
        silu=jax.nn.silu, gelu=lambda x: jax.nn.gelu(x, approximate=False), cat=lambda xs: jnp.concatenate(xs, -1),
        attention=attention, cross_entropy=cross_entropy, conv=conv,
        channels_last=lambda x: x.transpose(0, 2, 3, 1), channels_first=lambda x: x.transpose(0, 3, 1, 2),
    )  # fmt: skip
    data = {k: jnp.asarray(v) for k, v in batch(model).items()}

    def update(state: Any, data: Any) -> Any:
        p, m, v, t = state
        loss, g = jax.value_and_grad(lambda p: loss_of(jnp, nn, p, **data))(p)
        scale = jnp.minimum(1.0, 1.0 / (jnp.sqrt(sum((x * x).sum() for x in g.values())) + 1e-6))
        g = {k: x * scale for k, x in g.items()}
        t = t + 1
        m = {k: 0.9 * m[k] + 0.1 * g[k] for k in p}
        v = {k: 0.999 * v[k] + 0.001 * g[k] ** 2 for k in p}
        moved = {k: m[k] / (1 - 0.9**t) / (jnp.sqrt(v[k] / (1 - 0.999**t)) + 1e-8) for k in p}
        p = {k: x - RATE * (moved[k] + (DECAY * x if x.ndim > 1 else 0)) for k, x in p.items()}
        return (p, m, v, t), loss

    jitted = jax.jit(update, donate_argnums=0)
    zeros = {k: jnp.zeros_like(x) for k, x in p.items()}
    state = (p, zeros, {k: jnp.zeros_like(x) for k, x in p.items()}, jnp.float32(0))

    def step() -> float:
        nonlocal state
        state, loss = jitted(state, data)
        return float(loss)

    return step


# -- the turns --------------------------------------------------------------------------------------------------------------
CONTENDERS: dict[str, Callable[[str, Path], Callable[[], float]]] = {
    "wasat": ours, "torch eager": lambda m, w: with_torch(m, w, False), "torch.compile": lambda m, w: with_torch(m, w, True),
    "jax.jit": with_jax,
}  # fmt: skip
MODELS = {"decoder": ("tokens", ROWS * LENGTH), "vit": ("images", PICTURES), "convnet": ("images", PICTURES)}
"""What is counted, and how many of it a batch has."""


def turn(name: str, model: str, weights: Path) -> None:
    began = time.perf_counter()
    step = CONTENDERS[name](model, weights)
    losses = [step()]
    compile_seconds = time.perf_counter() - began
    losses += [step() for _ in range(WARM - 1)]
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "start": compile_seconds, "peak": peak, "losses": losses}))


def measured(model: str, pythons: dict[str, str]) -> str:
    """A Markdown table of all contenders on one model."""
    runs: dict[str, list[dict[str, Any]]] = {k: [] for k in pythons}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(TURNS):
            for name, found in runs.items():
                command = [pythons[name], __file__, "--turn", name, model, f"{folder}/weights.npz"]
                done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr[-2000:]}")
                found.append(json.loads(done.stdout.splitlines()[-1]))
                time.sleep(0.5)
    for name, found in runs.items():
        np.testing.assert_allclose(found[0]["losses"], runs["wasat"][0]["losses"], rtol=2e-3, err_msg=name)
    unit, count = MODELS[model]
    lines = [f"| {model} | {unit}/s | step, ms | first step, s | peak, MB |", "|---|---|---|---|---|"]
    for name, found in runs.items():
        median = statistics.median(s for r in found for s in r["seconds"])
        first, peak = min(r["start"] for r in found), max(r["peak"] for r in found)
        lines.append(f"| {name} | {count / median:,.0f} | {1000 * median:.0f} | {first:.0f} | {peak:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="a Python with torch")
    parser.add_argument("--jax", help="a Python with jax")
    parser.add_argument("--model", choices=MODELS, help="one alone")
    parser.add_argument("-o", "--output", type=Path, help="a Markdown file to write")
    parser.add_argument("--turn", nargs=3, metavar=("NAME", "MODEL", "WEIGHTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        turn(args.turn[0], args.turn[1], Path(args.turn[2]))
        return
    every = {"wasat": sys.executable, "torch eager": args.torch, "torch.compile": args.torch, "jax.jit": args.jax}
    pythons = {k: v for k, v in every.items() if v}
    tables = []
    for model in [args.model] if args.model else MODELS:
        tables.append(measured(model, pythons))
        print(tables[-1])
    if args.output:
        command = "python benchmarks/train.py --torch PYTHON --jax PYTHON -o benchmarks/results/train.md"
        about = f"# Training steps\n\n`{command}`: 2 threads; see there for the models.\n\n"
        args.output.write_text(about + "\n".join(tables))


if __name__ == "__main__":
    main()
