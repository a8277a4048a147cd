"""The interpreter: inputs that fit, symbols, runtime checks, values dropped when nobody needs them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from wasat.ir import Array, IRError, Node, bind_symbols, evaluate, parse, run_node, type_of
from wasat.ir.ops.quant import quantize_array

G = parse("""graph @g(%x: f32[b, n + 1], %y: f32[n, 2]) {
  param %w: f32[2] = "layer.w"
  %z: f32[n, 2] = add(%y, %w)
  %size: i64[] = dim_size() {size=b*n}
  return %z, %size
}""")
X, Y, W = np.zeros((3, 5), np.float32), np.ones((4, 2), np.float32), np.array([1, 2], np.float32)


@pytest.mark.parametrize("type, given, message", [
    ("i64", [1.5], "i64 does not hold its numbers"), ("u8", [300], "u8 does not hold"), ("u8", [-1], "u8 does not hold"),
    ("i32", [2**31], "i32 does not hold"), ("i64", [float("nan")], "i64 does not hold"), ("i4", [8], "i4 does not hold"),
    ("bool", [2], "bool does not hold"), ("f32", ["1"], "it holds <U1"), ("f32", [None], "it holds object"),
    ("f32", "a", "it holds <U1"), ("f32", [[1], [1, 2]], "inhomogeneous"), ("i64", [2**70], "it holds object"),
])  # fmt: skip
def test_lists_become_arrays_of_the_same_numbers_or_none(type: str, given: Any, message: str) -> None:
    g = parse(f"graph @g(%x: {type}[n]) {{\n  return %x\n}}")
    with pytest.raises(IRError, match=rf"input x is no {type}\[n\]: .*{message}"):
        evaluate(g, {"x": given})
    for good in ([0, 1], [], [True, False], [1.0, 0.0]):
        (x,) = evaluate(g, {"x": good})
        assert isinstance(x, np.ndarray)
        assert x.tolist() == np.array(good).astype(x.dtype).tolist()
        assert str(type_of(x)) == f"{type}[{len(good)}]"


def test_results_in_order() -> None:
    z, size = evaluate(G, {"y": Y, "x": X}, {"layer.w": W, "unused": W})
    assert_array_equal(z, Y + W)
    assert size == 12
    assert bind_symbols(G, {"x": X, "y": Y}) == {"n": 4, "b": 3}


@pytest.mark.parametrize("inputs, params, message", [
    ({"x": X}, {"layer.w": W}, "graph @g takes inputs x, y; missing y"),
    ({"x": X, "y": Y, "z": Y}, {"layer.w": W}, "takes inputs x, y; unknown z"),
    ({"x": X, "z": Y}, {"layer.w": W}, "; missing y; unknown z"),
    ({"x": X, "y": Y}, None, "graph @g needs parameters layer.w"),
    ({"x": X[0], "y": Y}, {"layer.w": W}, "input x must be f32[b, n + 1], not f32[5]"),
    ({"x": X, "y": Y.astype(np.float64)}, {"layer.w": W}, "input y must be f32[n, 2], not f64[4, 2]"),
    ({"x": X, "y": Y[:3]}, {"layer.w": W}, "input y, axis 0: size is 3, expected n"),
    ({"x": X, "y": Y[:, :1]}, {"layer.w": W}, "input y, axis 1: size is 1, expected 2"),
    ({"x": X[:, :0], "y": Y}, {"layer.w": W}, "input x, axis 1: size is 0"),
])  # fmt: skip
def test_misfits_are_named(inputs: dict[str, Any], params: Any, message: str) -> None:
    with pytest.raises(IRError, match=re.escape(message)):
        evaluate(G, inputs, params)


def test_lists_and_numbers_are_inputs_too() -> None:
    g = parse("graph @g(%x: i32[2], %s: f32[]) {\n  return %x, %s\n}")
    x, s = evaluate(g, {"x": [1, 2], "s": 3})
    assert isinstance(x, np.ndarray)
    assert isinstance(s, np.ndarray)
    assert (x.dtype, s.dtype) == (np.int32, np.float32)


def test_quantized_inputs() -> None:
    g = parse("graph @g(%w: int4b32f16[n, 64]) {\n  %d: f32[n, 64] = dequantize(%w)\n  return %d\n}")
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    q = quantize_array(x, g.inputs[0].type.substitute({"n": 3}))  # type: ignore[arg-type]
    assert_array_equal(evaluate(g, {"w": q})[0], q.dense())
    with pytest.raises(IRError, match="input w must be int4b32f16"):
        evaluate(g, {"w": x})
    wrong = quantize_array(x, parse("graph @h(%w: int8b32f16[3, 64]) {\n  return\n}").inputs[0].type)  # type: ignore[arg-type]
    with pytest.raises(IRError, match="input w must be int4b32f16"):
        evaluate(g, {"w": wrong})


def test_symbols_that_no_shape_determines() -> None:
    g = parse("graph @g() {\n  %i: i64[n] = iota() {size=n}\n  return %i\n}")
    assert_array_equal(evaluate(g, {}, symbols={"n": 3})[0], [0, 1, 2])
    with pytest.raises(Exception, match="needs a binding of n"):
        evaluate(g, {})


def test_unknown_equalities_are_checked_at_run_time() -> None:
    g = parse("graph @g(%x: f32[n], %y: f32[m]) {\n  %z: f32[n] = add(%x, %y)\n  return %z\n}", "g.txt")
    assert_array_equal(evaluate(g, {"x": [1, 2], "y": [3, 4]})[0], [4, 6])
    with pytest.raises(IRError, match=r"= add\(%x, %y\): needs n == m, which n=1, m=2 does not satisfy\n  at g\.txt:2"):
        evaluate(g, {"x": [1], "y": [3, 4]})


def test_errors_inside_a_reference_name_the_node_and_line() -> None:
    g = parse("graph @g(%x: f32[n], %i: i64[]) {\n  %y: f32[] = gather(%x, %i)\n  return %y\n}", "g.txt")
    with pytest.raises(IRError, match=r"index 5 is outside -2 .. 1"):
        evaluate(g, {"x": [1, 2], "i": 5})
    node = next(g.nodes)
    with pytest.raises(IRError, match=r"%y: f32\[\] = gather\(%x, %i\): (.|\n)*at g\.txt:2"):
        run_node(node, [np.zeros(2, np.float32), None], {"n": 2})  # type: ignore[list-item]


def test_a_reference_that_breaks_its_type_is_caught() -> None:
    node = next(parse("graph @g(%x: f32[2]) {\n  %y: f32[2] = neg(%x)\n  return %y\n}").nodes)
    with pytest.raises(IRError, match=r"the reference made f64\[3\]"):
        run_node(node, [np.zeros(3)], {})


def test_observe_sees_every_node() -> None:
    seen: list[tuple[str, tuple[Array, ...]]] = []

    def observe(node: Node, results: tuple[Array, ...]) -> None:
        seen.append((node.op.name, results))

    evaluate(G, {"y": Y, "x": X}, {"layer.w": W}, observe=observe)
    assert [name for name, _ in seen] == ["add", "dim_size"]
    assert_array_equal(seen[0][1][0], Y + W)


def test_values_are_dropped_after_their_last_use() -> None:
    import weakref

    g = parse("""graph @g(%x: f32[4]) {
  %a: f32[4] = exp(%x)
  %b: f32[4] = exp(%a)
  %c: f32[4] = exp(%b)
  return %c
}""")
    alive: list[weakref.ref[Any]] = []
    counts = []

    def observe(node: Node, results: tuple[Array, ...]) -> None:
        alive.append(weakref.ref(results[0]))
        counts.append(sum(r() is not None for r in alive))

    evaluate(g, {"x": np.zeros(4, np.float32)}, observe=observe)
    assert max(counts) <= 2
