"""Random graphs that grow, step by step, around what passes look for."""

from __future__ import annotations

from typing import Any

import numpy as np
from wasat.ir import (
    Builder,
    DType,
    Graph,
    Program,
    TensorType,
    Value,
    symbol,
)
from wasat.ir.op import Body

from wasat.testing import random_graph, random_program

B, S, D = symbol("b"), symbol("s"), 8


def tensor(dtype: str, shape: tuple[Any, ...]) -> TensorType:
    return TensorType(DType.of(dtype), shape)


class Growth:
    """A graph in the making: each step takes a value [b, s, 8] to another, spelt out in one of several ways."""

    def __init__(self, rng: np.random.Generator, g: Graph, dtype: str = "f32") -> None:
        self.rng, self.g, self.b, self.dtype = rng, g, Builder(g), dtype

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def param(self, *shape: int) -> Value:
        return self.g.add_param(f"layers.{len(self.g.params)}.weight", tensor(self.dtype, shape))

    def number(self, x: float) -> Value:
        return self.b.constant(x, self.dtype)

    def swapped(self, op: str, x: Value, y: Any) -> Value:
        return self.b.emit(op, *self.pick((x, y), (y, x)))

    def linear(self, x: Value, width: int = D) -> Value:
        return self.b.linear(self.b.tanh(x), self.param(width, D))

    # -- steps -------------------------------------------------------------------------------------------------------------
    def activation(self, x: Value) -> Value:
        b, one = self.b, self.number(1.0)
        match self.pick(0, 1, 2):
            case 0:
                return self.swapped("mul", x, b.sigmoid(x))
            case 1:
                return b.div(x, self.swapped("add", b.exp(b.neg(x)), one))
        half = b.mul(x, self.number(0.5))
        return self.swapped("mul", half, self.swapped("add", b.erf(b.div(x, self.number(2**0.5))), one))

    def norm(self, x: Value) -> Value:
        b = self.b
        square = self.pick(lambda: b.mul(x, x), lambda: b.pow(x, self.number(2.0)))()
        v = b.add(b.reduce_mean(square, axes=(2,), keepdims=True), self.number(1e-2))
        y = self.pick(lambda: self.swapped("mul", x, b.rsqrt(v)), lambda: b.div(x, b.sqrt(v)))()
        return self.swapped("mul", y, self.param(D)) if self.pick(0, 1) else y

    def siblings(self, x: Value) -> Value:
        x = self.b.tanh(x)
        p, q = (self.b.linear(x, self.param(D, D)) for _ in range(2))
        return self.swapped("add", self.b.tanh(p), self.b.sin(q))

    def gated(self, x: Value) -> Value:
        b = self.b
        y = self.linear(x, 2 * D)
        gate, up = (b.slice(y, starts=(0, 0, i), stops=(B, S, i + D)) for i in (0, D))
        return self.swapped("mul", b.emit(self.pick("silu", "relu", "sigmoid"), gate), up)

    def positions(self) -> Value:
        return self.b.iota(size=S)

    def turned(self, x: Value) -> Value:
        """Two heads, rotated by their positions, half by half."""
        b = self.b
        heads = b.reshape(x, shape=(B, S, 2, 4))
        at = b.cast(b.reshape(self.positions(), shape=(S, 1)), dtype=self.dtype)
        angles = b.mul(at, b.constant(np.array([1.0, 0.1]), self.dtype))
        angles = b.reshape(b.concat(angles, angles, axis=1), shape=(S, 1, 4))
        lo, hi = (b.slice(heads, starts=(0, 0, 0, i), stops=(B, S, 2, i + 2)) for i in (0, 2))
        turned = b.concat(b.neg(hi), lo, axis=3)
        y = self.swapped("add", self.swapped("mul", heads, b.cos(angles)), self.swapped("mul", turned, b.sin(angles)))
        return b.reshape(y, shape=(B, S, D))

    def attended(self, x: Value) -> Value:
        """Attention of two heads, causal, perhaps within a window."""
        b = self.b
        q, k, v = (b.transpose(b.reshape(self.linear(x), shape=(B, S, 2, 4)), perm=(0, 2, 1, 3)) for _ in range(3))
        scores = b.matmul(q, b.transpose(k, perm=(0, 1, 3, 2)))
        scores = self.pick(lambda: b.mul(scores, self.number(0.5)), lambda: b.div(scores, self.number(2.0)))()
        row, column = b.reshape(self.positions(), shape=(S, 1)), self.positions()
        keep = b.less_equal(column, row)
        if self.pick(0, 1):
            keep = self.swapped("logical_and", keep, b.less(b.sub(row, column), 2))
        probs = b.softmax(b.select(keep, scores, self.number(float("-inf"))), axis=3)
        return b.reshape(b.transpose(b.matmul(probs, v), perm=(0, 2, 1, 3)), shape=(B, S, D))

    def recurrent(self, x: Value) -> Value:
        """A matrix that every token decays, perhaps, and writes to, and reads."""
        b, body = self.b, Graph("turn")
        q, k, v = (b.transpose(self.linear(x, n), perm=(1, 0, 2)) for n in (4, 4, D))
        t = Builder(body)
        state = body.add_input("state", tensor(self.dtype, (B, 4, D)))
        query, key, value = (body.add_input(c, tensor(self.dtype, (B, n))) for c, n in (("q", 4), ("k", 4), ("v", D)))
        kept = t.mul(state, t.constant(0.9, self.dtype)) if self.pick(0, 1) else state
        write = t.mul(t.reshape(key, shape=(B, 4, 1)), t.reshape(value, shape=(B, 1, D)))
        new = t.add(*self.pick((kept, write), (write, kept)))
        if self.pick(0, 1):
            y = t.reduce_sum(t.mul(new, t.reshape(query, shape=(B, 4, 1))), axes=(1,))
        else:
            y = t.reshape(t.matmul(t.reshape(query, shape=(B, 1, 4)), new), shape=(B, D))
        body.set_outputs([new, y], ["state", "y"])
        start = b.broadcast_to(self.number(0.0), shape=(B, 4, D))
        read = b.scan(start, q, k, v, body=Body(body), carries=1, slices=3)[1]
        return b.transpose(read, perm=(1, 0, 2))

    def repeated(self, x: Value) -> Value:
        """Rows at positions that are the same for the whole batch."""
        b = self.b
        rows = b.broadcast_to(b.maximum(self.positions(), 0), shape=(B, S))
        table = b.reshape(b.slice(x, starts=(0, 0, 0), stops=(1, S, D)), shape=(S, D))
        return self.swapped("add", x, b.gather(table, rows, axis=0))

    def of_parameters(self, x: Value) -> Value:
        w = self.swapped("mul", self.param(D, D), self.b.sin(self.param(D, D)))
        return self.b.linear(self.b.tanh(x), w)

    def experts(self, x: Value) -> Value:
        """The two best of three experts, each a layer and its transpose."""
        b, e, h, k = self.b, 3, 5, 2
        scores = self.linear(x, e)
        best, which = b.top_k(scores, k=k, axis=2)
        w, v = self.param(e, D, h), self.param(e, h, D)
        rows = b.tanh(x)
        if self.pick(0, 1):  # weights gathered
            rows = self.pick(lambda: b.reshape(rows, shape=(B, S, 1, 1, D)), lambda: b.broadcast_to(
                b.reshape(rows, shape=(B, S, 1, 1, D)), shape=(B, S, k, 1, D)))()  # fmt: skip
            y = b.matmul(b.emit(self.pick("relu", "tanh", "silu"), b.matmul(rows, b.gather(w, which))), b.gather(v, which))
            share = b.reshape(b.softmax(best, axis=2), shape=(B, S, k, 1, 1))
            return b.reshape(b.reduce_sum(self.swapped("mul", y, share), axes=(2,)), shape=(B, S, D))
        hot = b.one_hot(which, size=e, dtype=self.dtype)
        match self.pick(0, 1, 2, 3):
            case 0:
                share = b.reduce_sum(self.swapped("mul", hot, b.reshape(b.sigmoid(best), shape=(B, S, k, 1))), axes=(2,))
            case 1:
                zeros = b.broadcast_to(self.number(0.0), shape=(B, S, e))
                share = b.scatter_along(zeros, which, b.softmax(best, axis=2), axis=2)
            case 2:
                chosen = b.greater(b.reduce_max(hot, axes=(2,)), self.number(0.5 if self.pick(0, 1) else 0.0))
                share = b.softmax(b.select(chosen, scores, self.number(float("-inf"))), axis=2)
            case _:
                share = self.swapped("mul", b.reduce_sum(hot, axes=(2,)), b.softmax(scores, axis=2))
        wide = b.reshape(b.transpose(w, perm=(1, 0, 2)), shape=(D, e * h))
        hidden = b.emit(self.pick("relu", "tanh", "silu"), b.reshape(b.matmul(rows, wide), shape=(B, S, e, h)))
        if self.pick(0, 1):  # shares before the sum
            hidden = self.swapped("mul", hidden, b.reshape(share, shape=(B, S, e, 1)))
            return b.matmul(b.reshape(hidden, shape=(B, S, e * h)), b.reshape(v, shape=(e * h, D)))
        y = b.matmul(b.transpose(hidden, perm=(0, 2, 1, 3)), v)
        share = b.reshape(b.transpose(share, perm=(0, 2, 1)), shape=(B, e, S, 1))
        return b.reduce_sum(self.swapped("mul", y, share), axes=(1,))

    def idle(self, x: Value) -> Value:
        """What clean-up takes away."""
        b = self.b
        there = b.transpose(b.reshape(x, shape=(B, S, 2, 4)), perm=(0, 1, 3, 2))
        back = b.reshape(b.transpose(there, perm=(0, 1, 3, 2)), shape=(B, S, D))
        return self.swapped("mul", back, self.number(1.0))

    def dropped(self, x: Value) -> Value:
        key = self.g.add_input(f"key{len(self.g.inputs)}", tensor("u32", (2,)))
        return self.b.dropout(x, key, rate=0.25)


def grown(seed: int, steps: list[str], inside: bool = True) -> Program:
    """``steps``, in random order with others between them, on a value of a random graph."""
    rng = np.random.default_rng(seed)
    g = random_graph(rng, 30, "loss") if inside else Graph("loss")
    b = Builder(g)
    x = b.concat(g.inputs[0], b.tanh(g.inputs[0]), axis=2) if inside else g.add_input("x", tensor("f32", (B, S, D)))
    made = walk(Growth(rng, g), x, steps)
    g.set_outputs([made, *g.outputs], ["made", *g.output_names])
    return random_program(g, seed)


def walk(growth: Growth, x: Value, steps: list[str]) -> Value:
    others = ["activation", "norm", "siblings", "gated", "turned", "attended", "idle"]
    for step in growth.rng.permutation([*steps, growth.pick(*others), growth.pick(*others)]):
        x = getattr(growth, step)(x)
    return x
