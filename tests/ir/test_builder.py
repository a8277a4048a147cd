"""The builder and decomposition: constants, locations in errors, names that stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from wasat.ir import Builder, DType, Graph, IRError, Loc, TypeMismatch, Value, build, evaluate, parse, parse_type, verify
from wasat.ir.decompose import decompose

from wasat.testing import feed, random_graph

HERE = Loc("model.py", 31, "forward", "layers.2.mlp", caller=Loc("main.py", 5))


def start(**inputs: str) -> tuple[Builder, list[Value]]:
    g = Graph("g")
    values = [g.add_input(k, parse_type(t)) for k, t in inputs.items()]
    return Builder(g, loc=HERE), values


@pytest.mark.parametrize("use, match", [
    (lambda b, x, i: b.matmul(x, x), r"matmul\(%x: f32\[n, 3\], %x: f32\[n, 3\]\): inner dimensions: 3 is not"),
    (lambda b, x, i: b.add(x, i), "element types differ: f32, i64; cast one of them"),
    (lambda b, x, i: b.softmax(x, axis=2), r"softmax\(%x: f32\[n, 3\]\): axis 2 is outside a tensor of rank 2"),
    (lambda b, x, i: b.add(i, 0.5), "the number 0.5 meets a tensor of i64; cast the tensor to a float first"),
    (lambda b, x, i: b.add(x), "add does not take 1 operands"),
    (lambda b, x, i: b.softmax(x, axes=1), "softmax: .*unexpected keyword argument 'axes'"),
    (lambda b, x, i: b.neg("x"), "an operand is a Value, a number or an array, not str"),
])  # fmt: skip
def test_errors_carry_the_location(use: Callable[..., object], match: str) -> None:
    b, (x, i) = start(x="f32[n, 3]", i="i64[n, 3]")
    if "inner" in match:
        x = b.graph.add_input("y", parse_type("f32[2, 3]"))
        match = match.replace("%x", "%y").replace("n, 3", "2, 3")
    with pytest.raises(IRError, match=match) as e:
        use(b, x, i)
    assert e.value.loc == HERE
    assert "  at model.py:31 in forward (layers.2.mlp)\n  at main.py:5" in str(e.value)


def test_an_unknown_operation_is_answered_with_near_ones() -> None:
    b, _ = start()
    with pytest.raises(IRError, match="there is no operation 'sofmax'; did you mean softmax"):
        b.sofmax()


def test_numbers_take_the_type_of_the_tensors_beside_them() -> None:
    b, (x, i, m) = start(x="f16[2]", i="i32[2]", m="bool[2]")
    assert b.mul(x, 2).type == x.type
    assert b.sub(1.0, x).type == x.type
    assert b.add(i, 2).type == i.type
    assert b.select(m, 1.0, x).type == x.type
    assert b.logical_and(m, True).type == m.type
    assert b.constant(1.5).tensor.dtype is DType.F32
    assert b.constant(np.float64(1.5)).tensor.dtype is DType.F64
    assert b.constant(1).tensor.dtype is DType.I64
    assert b.constant(1.5, "bf16").tensor.dtype is DType.BF16
    assert b.add(i, np.array([1, 2], np.int32)).type == i.type
    assert all(n.loc == HERE for n in b.graph.nodes)


def test_build_names_outputs() -> None:
    g = build("f", [("x", parse_type("f32[n]"))], lambda b, x: (b.neg(x), b.top_k(x, k=2)[1]), ["y", "at"])
    assert g.output_names == ["y", "at"]
    assert str(parse(str(g))) == str(g)


def test_sum_to_undoes_broadcasting() -> None:
    for small in ("f64[]", "f64[3]", "f64[1, 3]", "f64[n, 1]", "f64[4, n, 3]"):
        b, (x, y) = start(x="f64[4, n, 3]", y=small)
        back = b.sum_to(x, y.shape)
        assert back.type == y.type
        wide = b.broadcast_to(y, shape=x.shape)
        every = tuple(range(len(y.shape)))
        left, right = b.reduce_sum(b.mul(wide, x), axes=(0, 1, 2)), b.reduce_sum(b.mul(back, y), axes=every)
        b.graph.set_outputs([b.sub(left, right)])  # <broadcast(y), x> == <y, sum_to(x)>
        assert_allclose(evaluate(b.graph, feed(b.graph, {"n": 2}))[0], 0, atol=1e-12)


def test_inline_copies_a_graph_with_its_parameters() -> None:
    inner = parse('graph @f(%x: f32[n]) {\n  param %w: f32[] = "w"\n  %y: f32[n] = mul(%x, %w)\n  return %y, %x\n}')
    b, (x,) = start(x="f32[n]")
    once = b.inline(inner, [x])
    twice = b.inline(inner, once[:1])
    b.graph.set_outputs(twice)
    verify(b.graph)
    assert once[1] is x
    assert list(b.graph.params) == ["w"]
    assert_allclose(evaluate(b.graph, {"x": [1, 2]}, {"w": np.float32(3)})[0], [9, 18])


# -- decomposition -----------------------------------------------------------------------------------------------------------
def test_decompose_keeps_names_locations_and_what_it_is_told_to() -> None:
    g = parse("""graph @g(%x: f32[b, 4], %w: f32[4]) {
  %y: f32[b, 4] = rms_norm(%x, %w)
  %z: f32[b, 4] = silu(%y)
  return %z
}""", "g.txt")
    kept = g.clone()
    assert decompose(kept, lambda node: node.op.name == "silu") == 2  # rms_norm, and the mean in it
    assert [kept.count(n) for n in ("rms_norm", "reduce_mean", "silu")] == [0, 0, 1]
    assert decompose(g, lambda node: False) == 4  # and silu, and the sigmoid in it
    verify(g)
    assert g.outputs[0].name == "z"
    assert "%y: f32[b, 4] = mul(" in str(g)
    y = next(n for n in g.nodes if n.outputs[0].name == "y")
    assert {n.loc for n in g.nodes} == {Loc("g.txt", 2), Loc("g.txt", 3)}
    assert y.loc == Loc("g.txt", 2)
    assert decompose(g, lambda node: False) == 0


def test_a_decomposition_that_is_its_operand_leaves_its_name_alone() -> None:
    g = parse("graph @g(%x: f32[2]) {\n  %e: f32[2] = exp(%x)\n  %m: f32[2] = reduce_mean(%e) {axes=()}\n  return %m\n}")
    decompose(g, lambda node: False)
    assert str(g) == "graph @g(%x: f32[2]) {\n  %e: f32[2] = exp(%x)\n  return m=%e\n}\n"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_decomposition_preserves_meaning(seed: int) -> None:
    g = random_graph(np.random.default_rng(seed))
    rng = np.random.default_rng(1)
    params = {k: rng.standard_normal(v.tensor.concrete({})).astype(np.float32) for k, v in g.params.items()}
    h = g.clone()
    decompose(h, lambda node: False)
    verify(h)
    assert not any(n.op.is_composite for n in h.nodes)
    for dims in ({"b": 1, "s": 1}, {"b": 2, "s": 3}):
        inputs = feed(g, dims)
        for got, want in zip(evaluate(h, inputs, params), evaluate(g, inputs, params)):
            assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-4, atol=1e-4)


def test_type_errors_are_type_mismatches() -> None:
    b, (x,) = start(x="f32[2]")
    with pytest.raises(TypeMismatch):
        b.transpose(x, perm=(1,))
