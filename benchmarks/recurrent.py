"""Recurrent layers: a prefill of 512 tokens beside 512 steps, as `linear_attention` and as the loop that was written.

    python benchmarks/recurrent.py            # deltanet, mamba2 and retnet, 4 layers of width 512

One thread, seconds of the processor (what else runs here costs cache, not time on a clock); weights are random.
"""

from __future__ import annotations

import os

os.environ["TVM_NUM_THREADS"] = "1"

import tempfile
import time
from pathlib import Path

import numpy as np
from wasat.frontend import nn
from wasat.passes import FuseRecurrence, default_pipeline

import wasat as ws

VOCAB, DIM, HEADS, LAYERS, TOKENS = 512, 512, 8, 4, 512
KINDS = ("deltanet", "mamba2", "retnet")


class Layer(nn.Module):
    """A recurrence with a matrix of 64 x 64 for each of 8 heads, and an MLP. x[b, s, 512] -> [b, s, 512]."""

    def __init__(self, kind: str) -> None:
        self.kind, self.norm, self.norm2 = kind, nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.rates = nn.Linear(DIM, 2 * HEADS)
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        h = self.norm(x)
        q, k, v = self.q(h).heads(HEADS), nn.normalize(self.k(h).heads(HEADS), axis=-1), self.v(h).heads(HEADS)
        rates = self.rates(h)
        g, beta = nn.exp(-nn.softplus(rates[..., :HEADS])), nn.sigmoid(rates[..., HEADS:])
        if self.kind == "retnet":
            g = nn.constant(1 - 2.0 ** -np.arange(5, 5 + HEADS, dtype=np.float32)).broadcast_to(*g.shape)

        def turn(state: nn.Tensor, at: tuple[nn.Tensor, ...]) -> tuple[nn.Tensor, nn.Tensor]:
            q, k, v, g, beta = at
            state = state * g[..., None, None]
            if self.kind == "deltanet":
                v = (v - (state * k[..., None]).sum(-2)) * beta[..., None]
            state = state + k[..., None] * v[..., None, :]
            return state, (state * q[..., None]).sum(-2)

        turns = tuple(t.transpose(1, 0, *range(2, t.rank)) for t in (q, k, v, g, beta))
        _, y = nn.scan(turn, nn.full((x.shape[0], HEADS, 64, 64), 0.0), turns)
        x = x + self.out(y.transpose(1, 0, 2, 3).merge())
        return x + self.down(nn.silu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        self.embed, self.head, self.norm = nn.Embedding(VOCAB, DIM, std=1.0), nn.Linear(DIM, VOCAB), nn.RMSNorm(DIM)
        self.layers = nn.ModuleList(Layer(kind) for _ in range(LAYERS))

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def measured(program: ws.Program, fused: bool) -> tuple[float, float]:
    """Milliseconds of a prefill, and of a step: the best of three."""
    passes = [p for p in default_pipeline(chunk=TOKENS) if fused or not isinstance(p, FuseRecurrence)]
    with tempfile.TemporaryDirectory() as folder:
        ws.compile(program, Path(folder) / "out", passes=passes)
        session = ws.load(Path(folder) / "out").session(1, context=2 * TOKENS)
        tokens = np.random.default_rng(0).integers(0, VOCAB, (1, TOKENS))
        prefill, step = [], []
        for _ in range(3):
            session.reset()
            start = time.process_time()
            session.step(tokens)
            prefill.append(time.process_time() - start)
            start = time.process_time()
            for t in range(128):
                session.step(tokens[:, t : t + 1])
            step.append((time.process_time() - start) / 128)
    return min(prefill) * 1e3, min(step) * 1e3


def main() -> None:
    print("| layers | as | prefill of 512, ms | a step, ms | 512 steps / prefill |\n|---|---|---|---|---|")
    for kind in KINDS:
        program = nn.trace(Model(kind), {"tokens": "i64[b, s]"}, outputs=["logits"])
        for fused in (True, False):
            prefill, step = measured(program, fused)
            said = "`linear_attention`" if fused else "a loop"
            print(f"| {kind} | {said} | {prefill:.0f} | {step:.2f} | {TOKENS * step / prefill:.1f} |", flush=True)


if __name__ == "__main__":
    main()
