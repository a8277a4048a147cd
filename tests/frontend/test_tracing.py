"""Tracing: names and sharing of parameters, locations, and what is refused, with the user's own line in the message."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from wasat.frontend import nn
from wasat.ir import IRError, TypeMismatch, WasatError, evaluate, verify


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        self.up = nn.Linear(dim, 2 * dim, bias=True)
        self.down = nn.Linear(2 * dim, dim)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return x + self.down(nn.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        self.scale = nn.Parameter((4,), std=0.0, mean=2.0)
        self.layers = nn.ModuleList([Block(4), Block(4)])
        self.named = {"head": nn.Linear(4, 3)}
        self.again = self.layers[0]

    def __call__(self, x: nn.Tensor) -> dict[str, nn.Tensor]:
        for layer in [*self.layers, self.again]:
            x = layer(x * self.scale)
        return {"y": self.named["head"](x), "x": x}


def test_parameters_are_named_by_path_and_shared() -> None:
    model = Model()
    names = [
        "scale", "layers.0.up.weight", "layers.0.up.bias", "layers.0.down.weight", "layers.1.up.weight",
        "layers.1.up.bias", "layers.1.down.weight", "named.head.weight",
    ]  # fmt: skip
    assert list(model.parameters()) == names
    program = nn.trace(model, {"x": "f32[n, 4]"})
    graph = program["forward"]
    assert sorted(graph.params) == sorted(names) == sorted(program.params)
    assert graph.output_names == ["y", "x"]
    assert len(graph.params["layers.0.up.weight"].uses) == 2  # the first layer is called twice
    p, x = model.init(), np.ones((2, 4), np.float32)
    want = x
    for i in (0, 1, 0):
        h = 2 * want
        up = np.maximum(h @ p[f"layers.{i}.up.weight"].T + p[f"layers.{i}.up.bias"], 0)
        want = h + up @ p[f"layers.{i}.down.weight"].T
    got = evaluate(graph, {"x": x}, {k: s.load() for k, s in program.params.items()})
    assert_allclose(got[1], want, rtol=1e-5)


def test_random_parameters_follow_name_and_seed() -> None:
    a, b, c = Model().init(1), Model().init(1), Model().init(2)
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(a["layers.0.up.weight"], c["layers.0.up.weight"])
    assert not np.array_equal(a["layers.0.up.weight"], a["layers.1.up.weight"])
    assert_array_equal(a["scale"], 2.0)
    program = nn.trace(Model(), {"x": "f32[n, 4]"}, seed=1)
    assert_array_equal(program.params["layers.0.up.weight"].load(), a["layers.0.up.weight"])


def test_nodes_know_the_users_line_scope_and_callers() -> None:
    graph = nn.trace(Model(), {"x": "f32[n, 4]"})["forward"]
    verify(graph)
    relu = [n for n in graph.nodes if n.op.name == "relu"][1]
    assert relu.loc is not None
    assert relu.loc.file == __file__
    assert relu.loc.source == "return x + self.down(nn.relu(self.up(x)))"
    assert relu.loc.scope == "layers.1"
    assert relu.loc.function == "Block.__call__"
    assert relu.loc.caller is not None
    assert relu.loc.caller.source == "x = layer(x * self.scale)"
    outermost = relu.loc.caller.caller
    assert outermost is not None
    assert "nn.trace(Model()" in outermost.source
    assert outermost.caller is None
    up = next(n for n in graph.nodes if n.op.name == "linear")
    assert up.loc is not None
    assert up.loc.scope == "layers.0.up"  # the module; the line is the one that called it
    assert up.loc.source == relu.loc.source
    assert up.output.name == "up"


def test_a_shared_module_is_placed_where_it_is_called() -> None:
    rope = nn.RoPE(8)
    layers = [nn.Attention(8, 1, rope=rope), nn.Attention(8, 1, rope=rope)]

    class Stack(nn.Module):
        def __init__(self) -> None:
            self.layers = layers

        def __call__(self, x: nn.Tensor) -> nn.Tensor:
            for layer in self.layers:
                x = layer(x, nn.positions(x))
            return x

    graph = nn.trace(Stack(), {"x": "f32[b, s, 8]"})["forward"]
    scopes = [n.loc.scope for n in graph.nodes if n.op.name == "cos" and n.loc]
    assert scopes == ["layers.0.rope"] * 2 + ["layers.1.rope"] * 2


class Call(nn.Module):
    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f

    def __call__(self, x: nn.Tensor, y: nn.Tensor) -> Any:
        return self.f(x, y)


def iterate(x: nn.Tensor, y: nn.Tensor) -> nn.Tensor:
    a, _ = x
    return a


def branch(x: nn.Tensor, y: nn.Tensor) -> nn.Tensor:
    return x if x.sum() > 0 else y


F, T = "f32[b, s, 64]", "f32[b, s, 32]"


@pytest.mark.parametrize(
    "x, y, f, messages",
    [
        (F, T, lambda x, y: x + y, ["add(%x: f32[b, s, 64], %y: f32[b, s, 32])", "64 is not 32"]),
        (F, "f32[b, 32, 5]", lambda x, y: x @ y, ["matmul(%x: f32[b, s, 64], %y: f32[b, 32, 5])"]),
        (F, "bf16[b, s, 64]", lambda x, y: x * y, ["f32 and bf16", '.cast("f32") on the bf16 tensor']),
        ("f16[b]", "bf16[b]", lambda x, y: x * y, ["f16 and bf16", ".cast("]),
        (F, "i64[b, s]", lambda x, y: y * 1.5, ["the number 1.5 meets a tensor of i64"]),
        (F, "i64[b, s]", lambda x, y: y / 2, ["use // for integers"]),
        (F, T, lambda x, y: x.heads(5), ["the last axis, 64, does not split into 5 heads"]),
        (F, T, lambda x, y: x.reshape(x.shape[0], 7, -1), ["not a multiple of 7*b"]),
        (F, T, lambda x, y: x.reshape(*x.shape[:2], 4, 15), ["to (b, s, 4, 15): 64 elements do not make 60"]),
        (F, T, lambda x, y: x.reshape(*x.shape[:2], 4, 64 / 4), ["a size is an int or a dimension, not 16.0", "//"]),
        (F, T, lambda x, y: x.transpose(0, 2, 3), ["%x: f32[b, s, 64] has no axis 3"]),
        (F, T, lambda x, y: x.cast("float33"), ["cast of %x: f32[b, s, 64]: 'float33' is no element type"]),
        (F, T, lambda x, y: x.__setitem__(0, 1.0), ["cannot be assigned to", "nn.where"]),
        (F, T, lambda x, y: x + np.ones(64), ["an array of float64 meets %x: f32[b, s, 64]", ".astype(np.float32)"]),
        (F, T, lambda x, y: (x > 0) & y, ["%y: f32[b, s, 32]: only one is a bool mask", "compare"]),
        (F, T, lambda x, y: nn.concat(x), ["nn.concat takes a list of tensors: nn.concat([x, y]"]),
        (F, T, lambda x, y: nn.stack(x), ["nn.stack takes a list of tensors"]),
        (F, T, lambda x, y: nn.rope(x, nn.positions(x)), ["x is [b, s, heads, d], not %x: f32[b, s, 64]", "x.heads(n)"]),
        (F, T, lambda x, y: nn.rope(x.heads(4), y[:, :, 0]), ["positions are i64 [s] or [b, s], not", "nn.positions(x)"]),
        (F, T, lambda x, y: nn.RoPE(32)(x.heads(4), nn.positions(x)), ["32 elements of each head rotate", "has 16"]),
        (F, T, lambda x, y: nn.attention(x, x, x), ["q is [b, s, heads, d], not %x: f32[b, s, 64]"]),
        (F, T, lambda x, y: nn.attention(*[x.heads(4)] * 3, y), ["keep is a bool mask (true: attend), not %y"]),
        (F, T, lambda x, y: x[:, :, 64], ["index 64 is outside axis 2 of size 64"]),
        (F, T, lambda x, y: x[0, 0, 0, 0], ["4 indices for 3 axes"]),
        (F, T, lambda x, y: x[y], ["a tensor cannot be an index", "nn.gather"]),
        (F, T, lambda x, y: x.split(5), ["does not split into 5 equal parts"]),
        (F, T, lambda x, y: x.split([60, 5]), ["parts of 60, 5 do not make up axis 2 of size 64"]),
        (F, T, lambda x, y: x.sum(axis=3), ["%x: f32[b, s, 64] has no axis 3"]),
        (F, T, lambda x, y: nn.where(x, y, 0.0), ["the condition is a bool tensor"]),
        (F, T, branch, ["the truth of %greater: bool[] is not known while tracing", "nn.where"]),
        (F, T, lambda x, y: int(x), ["the value of %x", "x.shape"]),
        (F, T, lambda x, y: float(x), ["the value of %x"]),
        (F, T, lambda x, y: [1, 2][x], ["the value of %x", "nn.gather"]),
        (F, T, iterate, ["cannot be iterated or unpacked", "split"]),
        (F, T, lambda x, y: len(x), ["the length of %x: f32[b, s, 64] is symbolic"]),
        (F, T, lambda x, y: np.exp(x), ["np.exp cannot compute with %x: f32[b, s, 64]", "use nn.exp"]),
        (F, T, lambda x, y: x + "1", ["an operand is a Tensor, a number"]),
        (F, T, lambda x, y: x * nn.Parameter((64,)), ["cannot be reached from Call"]),
        (F, T, lambda x, y: nn.Linear(64, 3)(x), ["cannot be reached from Call", "attribute"]),
    ],
)  # fmt: skip
def test_mistakes_are_shown_at_the_users_line(x: str, y: str, f: Callable[..., Any], messages: list[str]) -> None:
    with pytest.raises((TypeMismatch, TypeError)) as e:
        nn.trace(Call(f), {"x": x, "y": y})
    text = str(e.value)
    for m in messages:
        assert m in text
    if e.type is TypeMismatch:
        line = inspect.getsourcelines(f)[1]
        assert f"{__file__}:" in text
        assert any(f"{__file__}:{n} " in text for n in range(line, line + 3)), text


@pytest.mark.parametrize(
    "f, message",
    [
        (lambda x, y: x.view(1), r"a Tensor has no 'view'; use x.reshape\(\*shape\)"),
        (lambda x, y: x.softmax(-1), r"a Tensor has no 'softmax'; use nn.softmax\(x\)"),
        (lambda x, y: x.wobble, "a Tensor has no 'wobble'$"),
    ],
)
def test_methods_of_other_libraries_are_answered_with_ours(f: Callable[..., Any], message: str) -> None:
    with pytest.raises(AttributeError, match=message):
        nn.trace(Call(f), {"x": F, "y": T})


class Forward(nn.Module):
    def forward(self, x: nn.Tensor) -> nn.Tensor:
        return x


@pytest.mark.parametrize(
    "module, inputs, message",
    [
        (Call(iterate), {"x": F}, "Call.__call__ takes x, y; given are x: missing a required argument: 'y'"),
        (Call(iterate), {"x": F, "y": F, "z": F}, "takes x, y; given are x, y, z: too many positional arguments"),
        (Call(iterate), {"x": (2, 3), "y": F}, r'input x: a type is written like "f32\[b, s, 64\]", not \(2, 3\)'),
        (Call(iterate), {"x": "float[b]", "y": F}, "input x: .*'float' is no element type"),
        (Forward(), {"x": F}, "Forward has no __call__"),
        (Forward, {"x": F}, "an object of a class derived from nn.Module, not <class"),
        (iterate, {"x": F}, "an object of a class derived from nn.Module, not <function"),
    ],
)
def test_what_cannot_be_traced(module: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(IRError, match=message):
        nn.trace(module, inputs)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Attention(64, 5), "Attention: dim 64 does not split into 5 heads; give head_dim"),
        (lambda: nn.CrossAttention(64, 5), "CrossAttention: dim 64 does not split into 5 heads"),
        (lambda: nn.CrossAttention(64, 4, kv_heads=3), "4 query heads are not a multiple of 3 key/value heads"),
        (lambda: nn.Linear("64", 3), "Linear: inputs is '64'; expected a positive int"),
        (lambda: nn.Embedding(10, 0), "Embedding: dim is 0; expected a positive int"),
        (lambda: nn.RMSNorm(8.0), "RMSNorm: dim is 8.0"),
        (lambda: nn.LayerNorm(True), "LayerNorm: dim is True"),
        (lambda: nn.Parameter(64), "the shape is a tuple of sizes, not 64"),
        (lambda: nn.MLP(8, 16, "gello"), "there is no activation 'gello'; there are gelu"),
        (lambda: nn.RoPE(7), "7 of 7 is not an even number"),
        (lambda: nn.Dropout(1.5), "Dropout: rate is 1.5"),
        (lambda: nn.Conv1d(4, 6, 3, groups=3), "4 inputs and 6 outputs do not split into 3 groups"),
        (lambda: nn.Conv1d(4, 6, 3, padding="cauzal"), "padding 'cauzal' is none of"),
        (lambda: nn.Conv2d(3, 4, (2, 2, 2)), r"\(2, 2, 2\) has 3 numbers; expected one, or 2"),
    ],
)
def test_layers_that_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(WasatError, match=message):
        make()


def test_a_tensor_of_another_trace_is_refused() -> None:
    kept: list[nn.Tensor] = []

    def f(x: nn.Tensor, y: nn.Tensor) -> nn.Tensor:
        kept.append(x)
        return kept[0] + y

    nn.trace(Call(f), {"x": F, "y": F})
    with pytest.raises(TypeMismatch, match="belongs to another trace"):
        nn.trace(Call(f), {"x": F, "y": F})
    with pytest.raises(IRError, match=r"only while nn\.trace runs"):
        kept[0] + 1.0
    with pytest.raises(IRError, match=r"returned Tensor.*another trace"):
        nn.trace(Call(lambda x, y: kept[0]), {"x": F, "y": F})


def test_a_module_is_not_called_outside_a_trace() -> None:
    with pytest.raises(IRError, match="Block is called outside a trace"):
        Block(4)(None)


def test_what_a_module_returns_must_be_tensors() -> None:
    with pytest.raises(IRError, match="Call returned 3"):
        nn.trace(Call(lambda x, y: 3), {"x": F, "y": F})
    with pytest.raises(IRError, match="returned 2 tensors; outputs= names 1"):
        nn.trace(Call(lambda x, y: (x, y)), {"x": F, "y": F}, outputs=["a"])


def test_several_entry_points_of_one_module() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            self.w = nn.Linear(4, 4)

        def __call__(self, x: nn.Tensor) -> nn.Tensor:
            return self.w(x)

        def twice(self, x: nn.Tensor) -> nn.Tensor:
            return self(self(x))

    program = nn.trace(Two(), {"x": "f32[b, 4]"}, "double", method="twice")
    assert program["double"].count("linear") == 2
    assert list(program.params) == ["w.weight"]
