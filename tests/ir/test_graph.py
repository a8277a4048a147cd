"""Graphs: change while walking, names, copies, and a verifier that finds each kind of corruption."""

from __future__ import annotations

import re
from collections.abc import Callable

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wasat.ir import (
    ArrayParam,
    Builder,
    DerivedParam,
    DType,
    Graph,
    IRError,
    Loc,
    Program,
    TensorType,
    TypeMismatch,
    Value,
    VerifyError,
    build,
    copy_node,
    evaluate,
    parse,
    parse_type,
    symbol,
    verify,
)

from wasat.testing import feed, random_graph

F = TensorType(DType.F32, (2,))


def chain(n: int = 4) -> tuple[Graph, list[Value]]:
    """x, then n nodes neg of the one before."""
    g = Graph("chain")
    values = [g.add_input("x", F)]
    for _ in range(n):
        values.append(Builder(g).neg(values[-1]))
    g.set_outputs([values[-1]])
    return g, values


def test_erasing_while_walking() -> None:
    g, values = chain(6)
    seen = []
    for node in g.nodes:
        seen.append(node)
        g.replace_uses(node.output, node.inputs[0])
        g.erase(node)
        if len(seen) == 2:  # the next one too
            after = node.next
            assert after is not None
            g.replace_uses(after.output, after.inputs[0])
            g.erase(after)
    assert len(seen) == 5
    assert len(g) == 0
    assert g.first is None
    assert g.last is None
    assert g.outputs == [values[0]]
    verify(g)


def test_inserting_while_walking() -> None:
    g, _ = chain(3)
    visited = 0
    for node in g.nodes:
        visited += 1
        new = Builder(g, before=node).abs(node.inputs[0])
        g.set_inputs(node, [new])
    assert visited == 3
    assert [n.op.name for n in g.nodes] == ["abs", "neg"] * 3
    assert [n.op.name for n in g.nodes_reversed] == ["neg", "abs"] * 3
    verify(g)


def test_replacing_every_use() -> None:
    g = parse("""graph @g(%x: f32[2], %y: f32[2]) {
  %a: f32[2] = mul(%x, %x)
  %b: f32[2] = add(%a, %x)
  return %a, %x, %b, last=%a
}""")
    x, y = g.inputs
    a = next(g.nodes).output
    g.replace_uses(x, y)
    assert not x.uses
    assert [(n.op.name, i) for n, i in y.uses] == [("mul", 0), ("mul", 1), ("add", 1)]
    g.replace_uses(a, x)
    assert g.outputs[0] is g.outputs[3] is x
    assert g.output_names == ["a", "x", "b", "last"]
    assert g.is_output(x)
    assert not g.is_output(a)
    g.erase(next(g.nodes))
    verify(g)
    g.replace_uses(x, x)
    verify(g)


def test_what_is_used_cannot_be_erased() -> None:
    g, values = chain(2)
    for v in values[1:]:  # used by a node; returned
        assert v.node is not None
        with pytest.raises(IRError, match=f"%{v.name} is still used"):
            g.erase(v.node)
    verify(g)


def test_names_are_unique_and_free_again_once_erased() -> None:
    g = Graph("g")
    x = g.add_input("x", F)
    b = Builder(g)
    first, second = b.neg(x), b.neg(x)
    assert (first.name, second.name) == ("neg", "neg_1")
    named = b.emit("neg", x, name="x")
    assert named.name == "x_1"
    g.rename(second, "neg")
    assert second.name == "neg_2"
    assert first.node is not None
    g.erase(first.node)
    g.rename(second, "neg")
    assert second.name == "neg"
    with pytest.raises(IRError, match="already has a value %x"):
        g.add_input("x", F)
    g.set_outputs([second, named])
    verify(g)


def test_a_parameter_is_declared_once() -> None:
    g = Graph("g")
    w = g.add_param("layer.w", F)
    assert g.add_param("layer.w", F) is w
    assert w.param == "layer.w"
    with pytest.raises(TypeMismatch, match=r"layer\.w is f32\[2\] and f32\[3\]"):
        g.add_param("layer.w", TensorType(DType.F32, (3,)))
    g.set_outputs([])
    assert g.prune_params() == ["layer.w"]
    assert not g.params


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_copies_are_equal_and_independent(seed: int) -> None:
    g = random_graph(np.random.default_rng(seed))
    text = str(g)
    other = g.clone()
    assert str(other) == text
    verify(other)
    other.set_outputs([])
    for node in other.nodes_reversed:
        other.erase(node)
    assert str(g) == text
    verify(g)


def test_copy_node_maps_operands() -> None:
    _, values = chain(1)
    h = Graph("h")
    env = {values[0]: h.add_input("y", F)}
    node = values[1].node
    assert node is not None
    h.set_outputs([copy_node(h, node, env).output])
    assert env[values[1]] is h.outputs[0]
    assert str(h) == "graph @h(%y: f32[2]) {\n  %neg: f32[2] = neg(%y)\n  return %neg\n}\n"


def test_dataflow_as_networkx() -> None:
    g = parse("graph @g(%x: f32[2]) {\n  %a: f32[2] = mul(%x, %x)\n  %b: f32[2] = add(%a, %x)\n  return %b\n}")
    d = g.to_networkx()
    assert nx.is_directed_acyclic_graph(d)
    assert nx.shortest_path_length(d, g.inputs[0], g.outputs[0]) == 2
    labels = [d.nodes[n]["label"] for n in nx.dag_longest_path(d)]
    assert labels == ["x", "mul", "a", "add", "b"]


# -- verify ------------------------------------------------------------------------------------------------------------------
def _swap_order(g: Graph, v: list[Value]) -> None:
    a, b = g.first, g.first.next  # type: ignore[union-attr]
    assert a is not None
    assert b is not None
    a.op, b.op = b.op, a.op
    g.set_inputs(a, [v[2]])


def _foreign(g: Graph, v: list[Value]) -> None:
    g.set_inputs(v[1].node, [chain()[1][0]])  # type: ignore[arg-type]


def _forget_use(g: Graph, v: list[Value]) -> None:
    v[0].uses.clear()


def _invent_use(g: Graph, v: list[Value]) -> None:
    v[0].uses[v[3].node, 5] = None  # type: ignore[index]


def _wrong_type(g: Graph, v: list[Value]) -> None:
    v[2].type = TensorType(DType.F32, (3,))


def _wrong_attrs(g: Graph, v: list[Value]) -> None:
    node = Builder(g, before=v[2].node).transpose(v[1], perm=(0,)).node
    node.attrs = node.op.Attrs(perm=(1,))


def _same_name(g: Graph, v: list[Value]) -> None:
    v[3].name = v[1].name


def _input_name(g: Graph, v: list[Value]) -> None:
    g.inputs.append(Value(g, F, "x"))


def _foreign_input(g: Graph, v: list[Value]) -> None:
    g.inputs.append(chain()[1][0])


def _broken_list(g: Graph, v: list[Value]) -> None:
    v[3].node.prev = v[1].node  # type: ignore[union-attr]


def _miscounted(g: Graph, v: list[Value]) -> None:
    v[4].node.prev = None  # type: ignore[union-attr]
    v[3].node.next = None  # type: ignore[union-attr]
    g.outputs = [v[3]]
    v[3].uses.clear()


def _lost_producer(g: Graph, v: list[Value]) -> None:
    v[2].node = v[1].node


def _lost_output(g: Graph, v: list[Value]) -> None:
    g.outputs = [chain()[1][1]]


def _output_names(g: Graph, v: list[Value]) -> None:
    g.outputs = [v[4], v[4]]
    g.output_names = ["y", "y"]


@pytest.mark.parametrize("corrupt, match", [
    (_swap_order, "%neg_1 is used before it is defined"),
    (_foreign, "belongs to another graph"),
    (_forget_use, "%x does not know that it is used here"),
    (_invent_use, "%x lists 2 uses and has 1"),
    (_wrong_type, r"neg makes f32\[2\] here"),
    (_wrong_attrs, "does not name each of the 1 axes once"),
    (_same_name, "two values are named %neg"),
    (_input_name, "two values are named %x"),
    (_foreign_input, "input %x belongs elsewhere"),
    (_broken_list, "the node list is broken"),
    (_miscounted, "3 nodes are linked, 4 are counted"),
    (_lost_producer, "%neg_1 does not know its producer"),
    (_lost_output, "output %neg is not defined in it"),
    (_output_names, "do not name each output once"),
])  # fmt: skip
def test_verify_finds(corrupt: Callable[[Graph, list[Value]], None], match: str) -> None:
    g, values = chain()
    verify(g)
    corrupt(g, values)
    with pytest.raises(VerifyError, match=match):
        verify(g)


def test_verify_shows_the_node_its_neighbours_and_the_line() -> None:
    g, values = chain(3)
    node = values[2].node
    assert node is not None
    node.loc = Loc("model.py", 12, "forward", "layers.0")
    values[2].type = TensorType(DType.F32, (3,))
    with pytest.raises(VerifyError) as e:
        verify(g)
    lines = str(e.value).splitlines()
    assert [line.split(" = ")[0] for line in lines[1:4]] == ["    %neg: f32[2]", "  > %neg_1: f32[3]", "    %neg_2: f32[2]"]
    assert lines[4] == "  at model.py:12 in forward (layers.0)"


def test_verify_renews_the_runtime_checks() -> None:
    g = parse("graph @g(%x: f32[n], %y: f32[m], %z: f32[n]) {\n  %a: f32[n] = add(%x, %y)\n  return %a\n}")
    node = next(g.nodes)
    assert node.checks == ((symbol("n"), symbol("m")),)
    g.set_inputs(node, [g.inputs[0], g.inputs[2]])
    verify(g)
    assert node.checks == ()


# -- programs -----------------------------------------------------------------------------------------------------------------
def _program() -> Program:
    g = Graph("f")
    g.set_outputs([Builder(g).neg(g.add_param("w", F))])
    return Program({"f": g}, {"w": ArrayParam(np.ones(2, np.float32), F)})


def test_program_checks_its_parameters() -> None:
    program = _program()
    program.verify()
    with pytest.raises(IRError, match="no graph @h in this program; there are @f"):
        program["h"]
    program.params["w"] = ArrayParam(np.ones(3, np.float32), TensorType(DType.F32, (3,)))
    with pytest.raises(VerifyError, match=re.escape("parameter w is f32[3]; graph @f reads f32[2]")):
        program.verify()
    del program.params["w"]
    with pytest.raises(VerifyError, match="reads parameter w, which the program does not have"):
        program.verify()


def test_a_derived_parameter_is_computed_when_asked() -> None:
    source = _program().params["w"]
    g = build("double", [("w", F)], lambda b, w: b.mul(w, 2.0))
    derived = DerivedParam(g, {"w": source})
    assert derived.type == F
    np.testing.assert_array_equal(derived.load(), [2, 2])


# -- the generator of the property tests -------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([{"b": 1, "s": 1}, {"b": 2, "s": 5}]))
def test_random_graphs_are_valid_and_finite(seed: int, dims: dict[str, int]) -> None:
    g = random_graph(np.random.default_rng(seed))
    verify(g)
    params = {k: np.ones(v.tensor.concrete({}), v.tensor.dtype.np) for k, v in g.params.items()}
    for v, x in zip(g.outputs, evaluate(g, feed(g, dims), params)):
        assert isinstance(x, np.ndarray)
        assert x.shape == v.tensor.concrete(dims)
        assert np.isfinite(x).all()
    assert str(random_graph(np.random.default_rng(seed))) == str(g)


def test_feed_makes_what_the_types_say() -> None:
    g = Graph("g")
    for i, t in enumerate(["f16[n]", "bool[n, 2]", "i64[n]", "u32[2]", "int4b32f16[n, 40]", "f32[]"]):
        g.add_input(f"x{i}", parse_type(t))
    inputs = feed(g, {"n": 50}, seed=3)
    for v in g.inputs:
        x = inputs[v.name]
        assert x.shape == tuple(50 if d != 2 and d != 40 else d for d in v.shape)
    again, other = feed(g, {"n": 50}, seed=3), feed(g, {"n": 50}, seed=4)
    np.testing.assert_array_equal(inputs["x0"], again["x0"])
    assert (np.asarray(inputs["x0"]) != np.asarray(other["x0"])).any()
    assert set(np.asarray(inputs["x2"]).tolist()) == {0, 1, 2, 3}
    with pytest.raises(Exception, match="needs a binding of n"):
        feed(g, {})


def test_an_input_is_removed_unless_it_is_used() -> None:
    g = parse("graph @g(%x: f32[2], %y: f32[2], %z: f32[2]) {\n  %a: f32[2] = neg(%x)\n  return %a, %y\n}")
    x, y, z = g.inputs
    for used in (x, y):
        with pytest.raises(IRError, match=f"input %{used.name} of @g is still used"):
            g.remove_input(used)
    g.remove_input(z)
    assert [v.name for v in g.inputs] == ["x", "y"]
    assert g.add_input("z", z.type).name == "z"
    verify(g)


@pytest.mark.parametrize("array, message", [
    (np.ones((1, 3), np.float32), r"f32\[1, 3\]"), (np.ones((2, 3)), r"f64\[2, 3\]"),
    (np.ones((2, 3), np.int32), r"i32\[2, 3\]"),
])  # fmt: skip
def test_a_parameter_that_is_not_of_its_type_is_refused_by_name(array: np.ndarray, message: str) -> None:
    g = parse('graph @f(%x: f32[n, 3]) {\n  param %w: f32[2, 3] = "layer.w"\n  %y: f32[n, 2] = linear(%x, %w)\n  return %y\n}')
    given = TensorType(DType.F32, (2, 3)), TensorType(DType.of(array.dtype), array.shape)
    for declared in given:  # by its source, or by the graph
        with pytest.raises(IRError, match=f"parameter layer.w.*{message}"):
            Program({"f": g}, {"layer.w": ArrayParam(array, declared)}).load("layer.w")
