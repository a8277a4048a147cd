"""Declares a small decoder in plain math, compiles it with random weights, and generates with the artifact.

python examples/own_model.py
"""

import math
import tempfile
from pathlib import Path

import wasat as ws
from wasat import nn

VOCAB, DIM, HEADS = 256, 64, 4


class Block(nn.Module):
    """x[b, s, dim] -> [b, s, dim]. Nothing in it knows of caches, quantization or devices."""

    def __init__(self) -> None:
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.attention_norm, self.mlp_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.mlp = nn.GLU(DIM, 2 * DIM)

    def __call__(self, x: nn.Tensor, positions: nn.Tensor) -> nn.Tensor:
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.mlp(self.mlp_norm(x))

    def attention(self, x: nn.Tensor, positions: nn.Tensor) -> nn.Tensor:
        q, k, v = self.q(x).heads(HEADS), self.k(x).heads(HEADS), self.v(x).heads(HEADS)
        q, k = nn.rope(q, positions), nn.rope(k, positions)
        scores = nn.einsum("b s h d, b t h d -> b h s t", q, k) * (DIM // HEADS) ** -0.5
        weights = nn.softmax(nn.where(nn.causal(positions), scores, -math.inf))
        return self.out(nn.einsum("b h s t, b t h d -> b s h d", weights, v).merge())


class Decoder(nn.Module):
    """tokens i64[b, s] -> logits f32[b, s, vocab]."""

    def __init__(self) -> None:
        self.embed, self.blocks = nn.Embedding(VOCAB, DIM), [Block(), Block()]
        self.norm, self.head = nn.RMSNorm(DIM), nn.Linear(DIM, VOCAB)

    def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, nn.positions(tokens))
        return self.head(self.norm(x))


program = nn.trace(Decoder(), {"tokens": "i64[b, s]"}, outputs=["logits"])
program.declare(context=1024)  # positions at most
with tempfile.TemporaryDirectory() as folder:
    report = ws.compile(program, Path(folder) / "own.wasat", quantize="int8")
    print(report.explain("applied"))
    [result] = ws.load(Path(folder) / "own.wasat").generate([list(b"Hello")], max_tokens=20)
    print(result.tokens, result.summary(), sep="\n")
