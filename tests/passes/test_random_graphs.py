"""Every pass keeps the meaning of random graphs that contain what it looks for, and modifies them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import wasat.passes
from wasat.frontend.weights import store_as
from wasat.ir import (
    Array,
    ArrayParam,
    Builder,
    DerivedParam,
    DType,
    Graph,
    Program,
    QArray,
    QTensorType,
    TensorType,
    Value,
    evaluate,
    symbol,
    type_of,
)
from wasat.ir.op import Body
from wasat.ir.ops.quant import quantize_array
from wasat.passes import (
    Cleanup, DeriveKVCache, Differentiate, Equalize, FoldDequantized, FuseActivations, FuseAttention, FuseExperts, FuseGlu,
    FuseNorm, FuseRecurrence, FuseRope, GraphPass, HoistParams, Inference, KeepQuantized, MergeLinears, MixedPrecision,
    Pass, PassManager, Quantize, QuantizeCaches, ReadTables, Rematerialize, Rewrite, RoundWeights, SimplifyIndices,
    TokenInputs,
)  # fmt: skip

from wasat.testing import InterpreterCheck, feed, random_graph, random_program

B, S, D = symbol("b"), symbol("s"), 8
DIMS = [{"b": 1, "s": 3}, {"b": 2, "s": 4}]
SEEDS = range(6)


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


def exact(make: Pass, step: str, before: tuple[Pass, ...] = ()) -> Callable[[int], bool]:
    """Runs a pass on graphs with ``step``, every result compared."""

    def run(seed: int) -> bool:
        check = InterpreterCheck(DIMS, rtol=1e-4, atol=1e-4)
        return PassManager([*before, make], check=check).run(grown(seed, [step])).steps[-1].modified

    return run


def decoder(seed: int, exported: bool = False) -> Program:
    """Logits of tokens, each of which sees no later one."""
    rng = np.random.default_rng(seed)
    g = Graph("forward")
    growth, b = Growth(rng, g), Builder(g)
    tokens = g.add_input("input_ids" if exported else "tokens", tensor("i64", (B, S)))
    x = b.embedding(g.add_param("embedding", tensor("f32", (4, D))), tokens)
    if exported:
        mask = g.add_input("attention_mask", tensor("i64", (B, S)))
        at = g.add_input("position_ids", tensor("i64", (B, S)))
        x = b.add(x, b.sin(b.reshape(b.cast(at, dtype="f32"), shape=(B, S, 1))))
        x = b.mul(x, b.reshape(b.cast(mask, dtype="f32"), shape=(B, S, 1)))
    g.set_outputs([growth.linear(walk(growth, x, ["attended"]), 5)], ["logits"])
    return random_program(g, seed)


def results(program: Program, graph: str, inputs: Mapping[str, Array]) -> list[Array]:
    g = program[graph]
    return evaluate(g, {v.name: inputs[v.name] for v in g.inputs}, {k: program.params[k].load() for k in g.params})


def near(got: list[Array], want: list[Array], tolerance: float = 1e-4) -> None:
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)


def caches(seed: int) -> bool:
    check = InterpreterCheck([{**dims, "c": 16} for dims in DIMS], rtol=1e-4, atol=1e-4)
    passes = [Cleanup(), FuseRope(), FuseAttention(), Cleanup(), DeriveKVCache(chunk=4)]
    return PassManager(passes, check=check).run(decoder(seed)).steps[-1].modified


def rounded_caches(seed: int) -> bool:
    program = decoder(seed)
    PassManager([Cleanup(), FuseRope(), FuseAttention(), Cleanup(), DeriveKVCache(chunk=4)]).run(program)
    plain, modified = program.copy(), PassManager([QuantizeCaches("int8")]).run(program).steps[0].modified
    for name, g in program.graphs.items():
        near(*(results(p, name, feed(g, {**DIMS[1], "c": 16}, seed)) for p in (program, plain)), 0.05)  # eight bits
    return modified


def token_inputs(seed: int) -> bool:
    program = decoder(seed, exported=True)
    tokens = np.random.default_rng(seed).integers(0, 4, (2, 5))
    ones, places = np.ones((2, 5), np.int64), np.tile(np.arange(5), (2, 1))
    given = {"input_ids": tokens, "attention_mask": ones, "position_ids": places}
    want = results(program, "forward", given)
    modified = PassManager([TokenInputs()]).run(program).steps[0].modified
    near(results(program, "forward", {"tokens": tokens}), want, 0.0)
    return modified


def loss(seed: int, dtype: str) -> Program:
    """A smooth function of x and the parameters."""
    rng, g = np.random.default_rng(seed), Graph("loss")
    growth = Growth(rng, g, dtype)
    y = growth.linear(g.add_input("x", tensor(dtype, (B, S, D))))
    for step in rng.permutation(["norm", "siblings", "turned", "attended", "idle"]):
        y = getattr(growth, step)(y)
    g.set_outputs([growth.b.reduce_mean(growth.b.sin(y), axes=(0, 1, 2))], ["loss"])
    return random_program(g, seed)


def gradients(seed: int) -> bool:
    """Against the difference of the loss along a random direction."""
    program = loss(seed, "f64")
    x = feed(program["loss"], DIMS[1], seed)
    modified = PassManager([Differentiate(wrt=("x", "*"))]).run(program).steps[0].modified
    g, rng, h = program["gradients"], np.random.default_rng(seed), 1e-6
    got = dict(zip(g.output_names, results(program, "gradients", x)))
    values = {**x, **{k: program.params[k].load() for k in g.params}}
    along = {k: rng.standard_normal(np.shape(v)) for k, v in values.items()}
    ends = []
    for sign in (h, -h):
        moved = {k: np.asarray(v) + sign * along[k] for k, v in values.items()}
        ends += evaluate(program["loss"], {"x": moved["x"]}, {k: moved[k] for k in program["loss"].params})
    slope = sum(float(np.sum(np.asarray(got[f"grad.{k}"]) * d)) for k, d in along.items())
    np.testing.assert_allclose(slope, (np.asarray(ends[0]) - np.asarray(ends[1])) / (2 * h), rtol=1e-5, atol=1e-8)
    return modified


def rematerialized(seed: int) -> bool:
    program = loss(seed, "f32")
    PassManager([Differentiate(), Cleanup()]).run(program)
    make = Rematerialize(sizes=(("b", 4), ("s", 16)))
    return PassManager([make], check=InterpreterCheck(DIMS, rtol=0, atol=0)).run(program).steps[0].modified


def served(seed: int) -> bool:
    """Dropout goes: as if its rate were 0."""
    program = grown(seed, ["dropped"])
    g, x = program["loss"].clone(), feed(program["loss"], DIMS[1])
    for node in g.nodes:
        if node.op.name == "dropout":
            node.attrs = type(node.attrs)(rate=0.0)  # type: ignore[call-arg]
    want = results(Program({"loss": g}, program.params), "loss", x)
    modified = PassManager([Inference()]).run(program).steps[0].modified
    near(results(program, "loss", x), want)
    return modified


def tables(seed: int) -> bool:
    """Masks in parameters, cut to the tokens and applied, and the first rows of a table."""
    rng = np.random.default_rng(seed)
    i, j = np.indices((9, 9))
    mask = [i >= j, i > j - 2, (i >= j) & (i - j < 3), (i >= j) | (j < 2), i == j, i < j][int(rng.integers(6))]
    array = mask[None, None].astype(rng.choice(["bool", "uint8", "float32"]))
    g = Graph("f")
    b, x = Builder(g), g.add_input("x", tensor("f32", (B, S, D)))
    part = b.slice(g.add_param("mask", type_of(array)), starts=(0, 0, 0, 0), stops=(1, 1, S, S))
    x = b.add(x, b.slice(g.add_param("rows", tensor("f32", (9, D))), starts=(0, 0), stops=(S, D)))
    scores = b.reshape(b.matmul(x, b.transpose(x, perm=(0, 2, 1))), shape=(B, 1, S, S))
    g.set_outputs([b.select(b.cast(part, dtype="bool"), scores, float(rng.choice([0, -np.inf])))])
    arrays = {"mask": array, "rows": rng.normal(size=(9, D)).astype(np.float32)}
    params = {name: ArrayParam(x, type_of(x)) for name, x in arrays.items()}
    return PassManager([ReadTables()], check=InterpreterCheck(DIMS)).run(Program({"f": g}, dict(params))).steps[0].modified


def equalized(seed: int) -> bool:
    """Norms before a feed-forward network and before the head, which is sometimes the table."""
    rng, g = np.random.default_rng(seed), Graph("forward")
    growth, b = Growth(rng, g), Builder(g)
    table = g.add_param("embedding", tensor("f32", (5, D)))
    x = walk(growth, b.embedding(table, g.add_input("tokens", tensor("i64", (B, S)))), ["norm"])
    h = b.rms_norm(x, growth.param(D))
    h = growth.swapped("mul", b.silu(b.linear(h, growth.param(12, D))), b.linear(h, growth.param(12, D), growth.param(12)))
    x = b.layer_norm(b.add(x, b.linear(h, growth.param(D, 12))), growth.param(D), growth.param(D))
    g.set_outputs([b.linear(x, growth.pick(table, growth.param(3, D)))], ["logits"])
    check = InterpreterCheck(DIMS, rtol=1e-4, atol=1e-4)
    return PassManager([Equalize(tokens=8)], check=check).run(random_program(g, seed)).steps[-1].modified


def quantized(seed: int) -> bool:
    """As if the weights were what they are rounded to."""
    program = decoder(seed)
    x = feed(program["forward"], DIMS[1])
    old = Program({"forward": program["forward"].clone()}, dict(program.params))
    scheme = ["int8", "int4", "f16"][seed % 3]
    modified = PassManager([Quantize(scheme, None, block=8), HoistParams()]).run(program).steps[0].modified
    for p in program.params.values():
        if isinstance(p, DerivedParam):
            ((name, source),) = p.sources.items()
            stored = p.load()
            dense = np.asarray(stored.dense() if isinstance(stored, QArray) else stored).astype(np.float32)
            old.params[name] = ArrayParam(dense, source.type)
    near(results(program, "forward", x), results(old, "forward", x))
    return modified


def rounded(seed: int) -> bool:
    """What training sees is what is stored, and its gradients are those of the weights that stay."""
    program = decoder(seed)
    x, stored = feed(program["forward"], DIMS[1]), program.copy()
    scheme = ["int8", "int4-plain", "f16"][seed % 3]
    PassManager([Quantize(scheme, None, block=8)]).run(stored)
    modified = PassManager([RoundWeights(scheme, block=8, graph="forward")]).run(program).steps[0].modified
    near(results(program, "forward", x), results(stored, "forward", x), 0.0)
    return modified


def kept(seed: int) -> bool:
    """Weights that are stored quantized: what reads them does so as they are."""
    program = decoder(seed)
    x, stored = feed(program["forward"], DIMS[1]), dict(program.params)
    for name, source in program.params.items():
        dense = np.asarray(source.load())
        if dense.ndim == 2:
            q = quantize_array(dense, QTensorType(["int8", "int4"][seed % 2], dense.shape, 8))
            store_as(program["forward"], name, q.type)
            stored[name] = ArrayParam(q, q.type)
    program.params = stored
    want = results(program, "forward", x)
    modified = PassManager([KeepQuantized(None)]).run(program).steps[0].modified
    assert not program["forward"].count("dequantize")
    near(results(program, "forward", x), want)
    return modified


def dequantized(seed: int) -> bool:
    """Weights that are integers, less zero points and times scales: of rows, of all, of blocks."""
    program, rng = decoder(seed), np.random.default_rng(seed)
    g = program["forward"]
    for name, v in [(k, v) for k, v in g.params.items() if len(v.shape) == 2]:
        n, k = (int(str(d)) for d in v.shape)
        b, block = Builder(g, before=next(g.nodes)), int(rng.choice([0, 4]))
        of = int(rng.choice([1, n]))
        arrays = {
            f"{name}.q": rng.integers(-9, 9, (n, k)).astype(np.int8),
            f"{name}.scale": rng.uniform(0.01, 0.1, (n, k // 4) if block else (of, 1)).astype(np.float32),
        }
        program.params |= {key: ArrayParam(x, type_of(x)) for key, x in arrays.items()}
        q, scale = (g.add_param(key, type_of(x)) for key, x in arrays.items())
        if block:
            scale = b.broadcast_to(b.reshape(scale, shape=(n, k // 4, 1)), shape=(n, k // 4, 4))
            scale = b.reshape(scale, shape=(n, k))
        x = b.cast(q, dtype="f32")
        x = b.sub(x, float(rng.integers(-5, 5))) if rng.random() < 0.5 else x
        g.replace_uses(v, b.mul(*((x, scale) if rng.random() < 0.5 else (scale, x))))
        g.prune_params()
        del program.params[name]
    program.verify()
    return PassManager([FoldDequantized()], check=InterpreterCheck(DIMS)).run(program).steps[0].modified


def half(seed: int) -> bool:
    program = grown(seed, ["attended"], inside=False)
    x = feed(program["loss"], DIMS[1])
    want = results(program, "loss", x)
    modified = PassManager([MixedPrecision(dtype="f16")]).run(program).steps[0].modified
    near(results(program, "loss", x), want, 3e-2)  # attention in f16: one of 64 was off by 1.25e-2
    return modified


RUNS: dict[type[Pass], Callable[[int], bool]] = {
    Cleanup: exact(Cleanup(), "idle"),
    SimplifyIndices: exact(SimplifyIndices(), "repeated"),
    FuseNorm: exact(FuseNorm(), "norm"),
    FuseRope: exact(FuseRope(), "turned"),
    FuseActivations: exact(FuseActivations(), "activation"),
    FuseAttention: exact(FuseAttention(), "attended", (Cleanup(),)),
    FuseRecurrence: exact(FuseRecurrence(), "recurrent"),
    FuseExperts: exact(FuseExperts(), "experts", (Cleanup(),)),
    MergeLinears: exact(MergeLinears(), "siblings"),
    FuseGlu: exact(FuseGlu(), "gated"),
    HoistParams: exact(HoistParams(), "of_parameters"),
    DeriveKVCache: caches,
    QuantizeCaches: rounded_caches,
    TokenInputs: token_inputs,
    Differentiate: gradients,
    Rematerialize: rematerialized,
    Inference: served,
    Equalize: equalized,
    Quantize: quantized,
    RoundWeights: rounded,
    KeepQuantized: kept,
    FoldDequantized: dequantized,
    ReadTables: tables,
    MixedPrecision: half,
}
"""What runs a pass on a random graph, holds the results against what they must be, and says whether the graph was modified."""


def test_every_pass_is_here() -> None:
    passes = {x for x in vars(wasat.passes).values() if inspect.isclass(x) and issubclass(x, Pass)}
    missing = passes - RUNS.keys() - {Pass, GraphPass, Rewrite}
    assert not missing, f"no random graphs for {', '.join(sorted(p.__name__ for p in missing))}"


@pytest.mark.parametrize("make", RUNS, ids=lambda p: p.name)
def test_meaning_stays(make: type[Pass]) -> None:
    fired = [seed for seed in SEEDS if RUNS[make](seed)]
    assert len(fired) > len(SEEDS) // 2, f"{make.name} modifies the graphs of seeds {fired} alone"


@pytest.mark.parametrize("seed", range(12))
def test_meaning_stays_through_one_after_another(seed: int) -> None:
    passes = [FuseNorm(), FuseRope(), FuseActivations(), FuseAttention(), MergeLinears(), FuseGlu(), HoistParams(), Cleanup()]
    program = grown(seed, ["norm", "gated", "siblings"])
    PassManager(passes, check=InterpreterCheck(DIMS, rtol=1e-4, atol=1e-4)).run(program)
