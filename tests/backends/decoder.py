"""A decoder in the form in which the passes leave one: what kernel selection is tested and timed on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from wasat.ir import (
    ArrayParam,
    Builder,
    DimLike,
    DType,
    Graph,
    Interface,
    Program,
    QTensorType,
    State,
    TensorType,
    Type,
    Value,
    symbol,
)
from wasat.ir.ops.quant import quantize_array


@dataclass(frozen=True)
class Decoder:
    """Gemma 3's block structure with sizes to choose; ``windows``: one per layer, None keeps a full cache."""

    vocab: int = 70
    dim: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 24
    hidden: int = 72
    windows: tuple[int | None, ...] = (None, 5)
    ring: int = 16
    weights: str = "int8"
    activation: str | None = "int8"
    qk_norm: bool = True
    post_norm: bool = True
    bias: bool = False
    act: str = "gelu_tanh"
    eps: float = 1e-6

    def program(self, seed: int = 0, decode: bool = True) -> Program:
        """``prefill`` for any batch and number of positions, and ``decode`` for one position."""
        self_params: dict[str, ArrayParam] = {}
        states = tuple(
            State.full(name, name[-1]) if window is None else State.ring(name, self.ring, window, name[-1])
            for i, window in enumerate(self.windows)
            for name in (f"layers.{i}.k", f"layers.{i}.v")
        )
        rng = np.random.default_rng(seed)
        graphs = {"prefill": self._graph("prefill", symbol("s"), self_params, rng)}
        if decode:
            graphs["decode"] = self._graph("decode", 1, self_params, rng)
        return Program(graphs, self_params, Interface(states=states))  # type: ignore[arg-type]

    def _param(self, g: Graph, params: dict[str, ArrayParam], rng: np.random.Generator, name: str, *shape: int) -> Value:
        if name not in params:
            # a norm's weight lies around 1, a matrix keeps the size of what it multiplies
            x = (1 + 0.3 * rng.standard_normal(shape) if "norm" in name else rng.standard_normal(shape) * shape[-1] ** -0.5)
            x = x.astype(np.float32)
            kind: Type = TensorType(DType.F32, shape)
            value: Any = x
            if len(shape) == 2 and self.weights.startswith("int"):
                kind = QTensorType(self.weights, shape)
                value = quantize_array(x, kind)
            elif len(shape) == 2:
                kind = TensorType(DType.of(self.weights), shape)
                value = x.astype(kind.dtype.np)
            params[name] = ArrayParam(value, kind)
        return g.add_param(name, params[name].type)

    def _graph(self, name: str, s: DimLike, params: dict[str, ArrayParam], rng: np.random.Generator) -> Graph:
        g = Graph(name)
        b = Builder(g)
        n, c = symbol("b"), symbol("c")
        h, kv, d = self.heads, self.kv_heads, self.head_dim
        quantized = self.weights.startswith("int")

        def param(name: str, *shape: int) -> Value:
            return self._param(g, params, rng, name, *shape)

        def linear(x: Value, name: str, out: int) -> Value:
            w = param(f"{name}.weight", out, x.shape[-1])
            bias = [param(f"{name}.bias", out)] if self.bias else []
            if quantized:
                return b.quantized_linear(x, w, *bias, activation=self.activation)
            return b.linear(x, w, *bias)

        def norm(x: Value, name: str) -> Value:
            return b.rms_norm(x, param(f"{name}.norm", x.shape[-1]), eps=self.eps)

        tokens = g.add_input("tokens", TensorType(DType.I64, (n, s)))
        past = g.add_input("past", TensorType(DType.I64, (n,)))
        last = g.add_input("last", TensorType(DType.I64, (n,))) if s != 1 else None
        caches = [
            [g.add_input(f"layers.{i}.{role}", TensorType(DType.F32, (n, c if w is None else self.ring, kv, d)))
             for role in ("k", "v")]
            for i, w in enumerate(self.windows)
        ]  # fmt: skip
        positions = b.reshape(past, shape=(n, 1))
        positions = positions if s == 1 else b.add(positions, b.iota(size=s))
        table = param("embed", self.vocab, self.dim)
        embed = b.quantized_embedding if quantized else b.embedding
        x = b.mul(embed(table, tokens, dtype=DType.F32), self.dim**0.5)
        new = []
        for i, window in enumerate(self.windows):
            freq = ((10000.0 if window else 1e6) ** -(np.arange(d // 2) * 2 / d)).astype(np.float32)
            at = f"layers.{i}"
            qkv = linear(norm(x, f"{at}.pre_attention"), f"{at}.qkv", (h + 2 * kv) * d)
            cut = [0, h * d, (h + kv) * d, (h + 2 * kv) * d]
            q, k, v = (
                b.reshape(b.slice(qkv, starts=(0, 0, lo), stops=(n, s, hi)), shape=(n, s, (hi - lo) // d, d))
                for lo, hi in pairwise(cut)
            )
            if self.qk_norm:
                q, k = norm(q, f"{at}.q"), norm(k, f"{at}.k")
            inv_freq = b.constant(freq)
            q, k = b.rope(q, positions, inv_freq), b.rope(k, positions, inv_freq)
            y, *written = b.cached_attention(
                q, k, v, *caches[i], past, scale=d**-0.5, window=window, ring=window is not None
            )
            new += written
            y = linear(b.reshape(y, shape=(n, s, h * d)), f"{at}.out", self.dim)
            x = b.add(x, norm(y, f"{at}.post_attention") if self.post_norm else y)
            y = b.glu(linear(norm(x, f"{at}.pre_mlp"), f"{at}.gate_up", 2 * self.hidden), activation=self.act)
            y = linear(y, f"{at}.down", self.dim)
            x = b.add(x, norm(y, f"{at}.post_mlp") if self.post_norm else y)
        if last is not None:
            x = b.take_along(x, b.reshape(last, shape=(n, 1, 1)), axis=1)
        x = b.reshape(norm(x, "final"), shape=(n, self.dim))
        logits = b.quantized_linear(x, table, activation=self.activation) if quantized else b.linear(x, table)
        g.set_outputs([logits, *new], ["logits", *(f"layers.{i}.{r}" for i in range(len(self.windows)) for r in ("k", "v"))])
        return g
