"""Parameters computed at load: what moves out, under which names, shared between graphs, loaded one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from wasat.ir import Array, Builder, DerivedParam, Program, QArray, Type, parse_type
from wasat.passes import HoistParams, PassManager, Remarks
from wasat.passes.cleanup.hoist_params import _joined, param_only, size_in_bytes

from wasat.testing import InterpreterCheck, check_pass, check_untouched, random_program

DIMS = [{"n": 1}, {"n": 3}]


def test_what_depends_on_parameters_only_moves_out() -> None:
    before = """graph @f(%x: f32[n, 64]) {
  param %norm.weight: f32[64]
  param %a.q.weight: f32[4, 64]
  param %a.k.weight: f32[8, 64]
  %g: f32[64] = add(%norm.weight, 1.0:f32)
  %h: f32[n, 64] = rms_norm(%x, %g)
  %w: f32[12, 64] = concat(%a.q.weight, %a.k.weight) {axis=0}
  %s: int8b32f16[12, 64] = quantize(%w) {scheme="int8"}
  %y: f32[n, 12] = quantized_linear(%h, %s)
  return %y
}"""
    after = """graph @f(%x: f32[n, 64]) {
  param %"norm.weight|add": f32[64]
  param %"a.q+k.weight|int8": int8b32f16[12, 64]
  %h: f32[n, 64] = rms_norm(%x, %"norm.weight|add")
  %y: f32[n, 12] = quantized_linear(%h, %"a.q+k.weight|int8")
  return %y
}"""
    remarks = check_pass(HoistParams(), before, after, DIMS)
    assert [r.message for r in remarks] == [
        "parameter norm.weight|add is computed when it is loaded",
        "parameter a.q+k.weight|int8 is computed when it is loaded",
    ]
    program = random_program(before)
    HoistParams().run(program, Remarks())
    assert list(program.params) == ["norm.weight|add", "a.q+k.weight|int8"]
    derived = program.params["a.q+k.weight|int8"]
    assert isinstance(derived, DerivedParam)
    assert str(derived.graph) == """graph @a.q+k.weight|int8(%a.q.weight: f32[4, 64], %a.k.weight: f32[8, 64]) {
  %w: f32[12, 64] = concat(%a.q.weight, %a.k.weight) {axis=0}
  %s: int8b32f16[12, 64] = quantize(%w) {scheme="int8"}
  return %s
}
"""
    assert isinstance(derived.load(), QArray)
    assert derived.type == parse_type("int8b32f16[12, 64]")


def hoisted(*bodies: str, params: str = "param %a.w: f32[4, 4]\nparam %b.w: f32[4, 4]", **options: float) -> Program:
    """Graphs @f0, @f1, … with the parameters of ``bodies``, hoisted and checked against the interpreter."""
    graphs = [f"graph @f{i}(%x: f32[n, 4]) {{\n{params}\n{body}\nreturn %y\n}}\n" for i, body in enumerate(bodies)]
    program = random_program("\n".join(graphs))
    PassManager([HoistParams(**options)], check=InterpreterCheck(DIMS)).run(program)
    return program


@pytest.mark.parametrize(
    "body, name",
    [
        ("%t: f32[4, 4] = transpose(%a.w) {perm=(1, 0)}\n %y: f32[n, 4] = linear(%x, %t)", "a.w|transpose"),
        ("%t: f16[4, 4] = cast(%a.w) {dtype=f16}\n %y: f32[n, 4] = linear(%x, %t)", "a.w|f16"),
        ("%t: f32[4, 4] = mul(%a.w, %b.w)\n %y: f32[n, 4] = linear(%x, %t)", "a+b.w|mul"),
        ("%t: f32[8, 4] = concat(%a.w, %b.w) {axis=0}\n %y: f32[n, 8] = linear(%x, %t)", "a+b.w"),
        ("%t: f32[8, 4] = concat(%a.w, %a.w) {axis=0}\n %y: f32[n, 8] = linear(%x, %t)", "a.w_1"),
        ("%s: f32[4, 4] = neg(%a.w)\n %t: f16[4, 4] = cast(%s) {dtype=f16}\n %y: f32[n, 4] = linear(%x, %t)", "a.w|f16"),
    ],
)
def test_names(body: str, name: str) -> None:
    assert list(hoisted(body).params) == [name]


def test_graphs_share_equal_computations_and_nothing_else() -> None:
    add = "%t: f32[4, 4] = add(%a.w, {}:f32)\n %y: f32[n, 4] = linear(%x, %t)"
    program = hoisted(add.format("1.0"), add.format("2.0"), "%q: f32[n, 4] = neg(%x)\n" + add.format("1.0"))
    assert list(program.params) == ["a.w|add", "a.w|add_1"]
    assert [list(g.params) for g in program.graphs.values()] == [["a.w|add"], ["a.w|add_1"], ["a.w|add"]]


def test_the_order_of_operands_tells_computations_apart() -> None:
    sub = "%t: f32[4, 4] = sub({})\n %y: f32[n, 4] = linear(%x, %t)"
    program = hoisted(sub.format("%a.w, %b.w"), sub.format("%b.w, %a.w"), sub.format("%a.w, %a.w"))
    assert list(program.params) == ["a+b.w|sub", "b+a.w|sub", "a.w|sub"]


def test_names_that_are_taken_are_counted_on() -> None:
    add = "%t: f32[4, 4] = add(%a.w, {}:f32)\n %y: f32[n, 4] = linear(%x, %t)"
    assert list(hoisted(*map(add.format, (1.0, 2.0, 3.0))).params) == ["a.w|add", "a.w|add_1", "a.w|add_2"]


def test_a_result_inside_another_is_computed_from_the_parameters() -> None:
    inner = "%t: f32[4, 4] = add(%a.w, 1.0:f32)\n %u: f32[4, 4] = neg(%t)\n %y: f32[n, 4] = linear(%x, %u)"
    both = inner.replace("%y: f32[n, 4] = linear(%x, %u)", "%z: f32[n, 4] = linear(%x, %t)\n %y: f32[n, 4] = linear(%z, %u)")
    program = hoisted(both, inner)
    assert list(program.params) == ["a.w|add", "a.w|neg"]
    for p in program.params.values():
        assert isinstance(p, DerivedParam)
        assert list(p.sources) == ["a.w"]


def test_hoisting_again_composes() -> None:
    two = "%u: f32[4, 4] = mul(%a.w, %b.w)\n %z: f32[n, 4] = linear(%x, %u)\n"
    program = hoisted(two + "%t: f32[4, 4] = add(%a.w, %b.w)\n %y: f32[n, 4] = linear(%z, %t)")
    g = program["f0"]
    assert g.first is not None
    assert g.last is not None
    u, t = g.first.inputs[1], g.last.inputs[1]
    b = Builder(g, before=g.first)
    g.set_inputs(g.first, [g.inputs[0], b.constant(np.eye(4), "f32")])
    g.set_inputs(g.last, [g.last.inputs[0], b.mul(t, b.neg(u))])
    check = InterpreterCheck(DIMS)
    check.baseline(program)
    PassManager([HoistParams()], check=check).run(program)
    (p,) = program.params.values()
    assert isinstance(p, DerivedParam)
    assert list(p.sources) == ["a.w", "b.w"]
    assert not any(isinstance(s, DerivedParam) for s in p.sources.values())
    assert [n.op.name for n in p.graph.nodes] == ["mul", "add", "neg", "mul"]


def test_parameters_that_other_graphs_read_stay() -> None:
    one = "%t: f32[4, 4] = add(%a.w, %b.w)\n %y: f32[n, 4] = linear(%x, %t)"
    program = hoisted(one, "%y: f32[n, 4] = linear(%x, %a.w)")
    assert list(program.params) == ["a.w", "a+b.w|add"]


@pytest.mark.parametrize("growth, hoists", [(4.0, False), (6.3, False), (6.4, True), (8.0, True)])
def test_broadcasts_that_grow_stay(growth: float, hoists: bool) -> None:
    body = "%t: f32[8, 4] = broadcast_to(%b) {shape=(8, 4)}\n %u: f32[8, 4] = add(%t, 1.0:f32)\n %y: f32[n, 8] = linear(%x, %u)"
    program = hoisted(body, params="param %b: f32[4]", growth=growth)
    assert list(program.params) == (["b|add"] if hoists else ["b"])
    assert len(program["f0"]) == (1 if hoists else 4)


def test_what_shrinks_after_growing_moves_out() -> None:
    body = """%t: f32[64, 4] = broadcast_to(%b) {shape=(64, 4)}
  %u: f32[4] = reduce_sum(%t) {axes=(0,), keepdims=false}
  %y: f32[n, 4] = add(%x, %u)"""
    assert list(hoisted(body, params="param %b: f32[4]").params) == ["b|reduce_sum"]


def test_constants_count_as_what_a_result_is_made_of() -> None:
    numbers = " ".join(["1.0"] * 32)
    body = f"""%c: f32[8, 4] = constant() {{value=dense<f32[8, 4], {numbers}>}}
  %t: f32[8, 4] = add(%c, %b)
  %y: f32[n, 8] = linear(%x, %t)"""
    assert list(hoisted(body, params="param %b: f32[4]").params) == ["b|add"]


def test_operands_of_what_grows_move_out() -> None:
    body = """%e: f32[4] = exp(%b)
  %t: f32[64, 4] = broadcast_to(%e) {shape=(64, 4)}
  %y: f32[n, 64] = linear(%x, %t)"""
    program = hoisted(body, params="param %b: f32[4]")
    assert list(program.params) == ["b|exp"]
    assert [n.op.name for n in program["f0"].nodes] == ["broadcast_to", "linear"]


NEAR = {
    "an input": "%t: f32[n, 4] = mul(%x, %b)\n %y: f32[n, 4] = neg(%t)",
    "a symbol": "%t: f32[n, 4] = broadcast_to(%b) {shape=(n, 4)}\n %y: f32[n, 4] = add(%x, %t)",
    "constants alone": "%c: f32[2] = constant() {value=dense<f32[2], 1.0 2.0>}\n %t: f32[2] = neg(%c)\n"
    "%s: f32[n, 2] = slice(%x) {starts=(0, 0), stops=(n, 2)}\n %y: f32[n, 2] = add(%s, %t)",
    "several results": "%t: f32[2], %i: i64[2] = top_k(%b) {k=2}\n %s: f32[n, 2] = slice(%x) {starts=(0, 0), stops=(n, 2)}\n"
    "%y: f32[n, 2] = add(%s, %t)",
}  # fmt: skip


@pytest.mark.parametrize("near", NEAR)
def test_near_misses(near: str) -> None:
    check_untouched(HoistParams(), f"graph @f(%x: f32[n, 4]) {{\nparam %b: f32[4]\n{NEAR[near]}\nreturn %y\n}}")


def test_an_output_moves_out() -> None:
    program = random_program("graph @f() {\n param %b: f32[4]\n %y: f32[4] = neg(%b)\n return %y\n}")
    PassManager([HoistParams()], check=InterpreterCheck([{}])).run(program)
    assert len(program["f"]) == 0
    assert program["f"].outputs[0].param == "b|neg"


@dataclass
class Counted:
    """A parameter that says when it is read."""

    type: Type
    log: list[str] = field(default_factory=list)
    name: str = ""

    def load(self) -> Array:
        self.log.append(self.name)
        return np.ones((4, 4), np.float32)


def test_nothing_is_read_before_it_is_loaded_and_only_what_is_needed_then() -> None:
    text = """graph @f(%x: f32[n, 4]) {
  param %a: f32[4, 4]
  param %b: f32[4, 4]
  %t: f32[4, 4] = neg(%a)
  %u: f32[4, 4] = neg(%b)
  %v: f32[n, 4] = linear(%x, %t)
  %y: f32[n, 4] = linear(%v, %u)
  return %y
}"""
    program = random_program(text)
    log: list[str] = []
    program.params = {k: Counted(p.type, log, k) for k, p in program.params.items()}
    PassManager([HoistParams()]).run(program)
    assert log == []
    program.params["b|neg"].load()
    assert log == ["b"]


SIZES = [("f32[3, 5]", 60), ("f16[7]", 14), ("bool[4]", 4), ("int8b32f16[2, 40]", 88), ("int4b32f16[2, 64]", 72)]


@pytest.mark.parametrize("text, size", SIZES)
def test_size_in_bytes(text: str, size: int) -> None:
    assert size_in_bytes(parse_type(text)) == size


def test_param_only_leaves_parameters_with_symbols() -> None:
    program = random_program("graph @f(%x: f32[n]) {\n param %b: f32[4]\n %y: f32[4] = neg(%b)\n return %y\n}")
    assert [v.name for v in program["f"].values() if v in param_only(program["f"])] == ["b", "y"]


def test_words_that_all_names_share_are_written_once() -> None:
    names = [["layers", "a", "q", "w", "x"], ["layers", "a", "k", "w", "x"], ["layers", "a", "w", "x"]]
    assert [_joined(names[:n]) for n in (1, 2, 3)] == ["layers.a.q.w.x", "layers.a.q+k.w.x", "layers.a.q+k.w.x"]
