"""Comparing sides of a model: faults that are planted are named at the node that makes them, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tvm import relax
from typer.testing import CliRunner
from wasat.backends.tvm.ops import primitives
from wasat.ir import ArrayParam, Builder, Graph, Program, WasatError
from wasat.ir.evaluate import bind_symbols
from wasat.passes.core import GraphPass, Remarks

from wasat.cli.app import app
from wasat.comparison import bounds, compare, engines
from wasat.comparison.nodes import compare_nodes, interpret
from wasat.testing import random_program

BLOCK = """
graph @forward(%x: f32[b, s, 8]) {
  param %layers.0.norm.weight: f32[8]
  param %layers.0.up.weight: f32[16, 8]
  param %layers.0.down.weight: f32[8, 16]
  param %layers.1.up.weight: f32[16, 8]
  %n: f32[b, s, 8] = rms_norm(%x, %layers.0.norm.weight) {eps=1e-06}
  %h: f32[b, s, 16] = linear(%n, %layers.0.up.weight)
  %a: f32[b, s, 16] = silu(%h)
  %y: f32[b, s, 8] = linear(%a, %layers.0.down.weight)
  %r: f32[b, s, 8] = add(%x, %y)
  %z: f32[b, s, 16] = linear(%r, %layers.1.up.weight)
  %p: f32[b, s, 16] = softmax(%z) {axis=2}
  return %p
}
"""


@dataclass(frozen=True)
class Broken(GraphPass):
    """Multiplies by a little more than one, in front of the value called ``where``."""

    name = "broken"
    where: str = "y"
    by: float = 1.0

    def run_graph(self, graph: Graph, remarks: Remarks) -> bool:
        node = next(v.node for v in graph.values() if v.name == self.where)
        b = Builder(graph, before=node.next, loc=node.loc)
        value = node.output
        users = list(value.uses)
        new = b.mul(value, self.by)
        for user, i in users:
            inputs = list(user.inputs)
            inputs[i] = new
            graph.set_inputs(user, inputs)
        graph.rename(value, "old")
        graph.rename(new, self.where)
        return True


class Wrong:
    """An engine: the interpreter, with one node's results off by a factor."""

    name = "wrong"

    def __init__(self, op: str, by: float, together: int = 0) -> None:
        self.op, self.by, self.together = op, by, together

    def prepare(self, graphs, load, tell):
        self.load = load

    def run(self, graph, inputs):
        def visit(node, operands, results):
            wrong = node.op.name == self.op and len(graph) >= self.together
            return tuple((x * np.float32(self.by)).astype(x.dtype) if wrong else x for x in results)

        env = {v: inputs[v.name] for v in graph.inputs} | {v: self.load(k) for k, v in graph.params.items()}
        return bounds.walk(graph, env, bind_symbols(graph, inputs), visit)


def run_of(program: Program):
    x = np.random.default_rng(0).standard_normal((1, 5, 8), np.float32)
    return interpret(program, "forward", {"x": x})


# -- an engine ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("op, value", [("silu", "a"), ("rms_norm", "n"), ("add", "r"), ("softmax", "p")])
def test_a_wrong_node_is_named_and_its_heirs_are_not(op, value):
    stage = compare_nodes(run_of(random_program(BLOCK)), Wrong(op, 1 + 1e-4))
    assert [d.value for d in stage.differences] == [value]
    assert stage.values == 7


def test_every_wrong_node_is_named():
    stage = compare_nodes(run_of(random_program(BLOCK)), Wrong("linear", 1 + 1e-4))
    named = [(d.value, d.layer) for d in stage.differences]
    assert named == [("h", "layers.0.up"), ("y", "layers.0.down"), ("z", "layers.1.up")]


def test_an_error_within_the_bound_is_not_named():
    stage = compare_nodes(run_of(random_program(BLOCK)), Wrong("silu", 1 + 2e-7))
    assert not stage.differences
    assert stage.closest[0].value == "a"
    assert 0.05 < stage.closest[0].ratio < 1


def test_small_elements_are_held_to_their_own_bounds():
    """A sum's smallest element is not allowed what its largest loses."""
    program = random_program(BLOCK)
    w = program.load("layers.0.up.weight").copy()
    w[3] *= 1e-4
    program.params["layers.0.up.weight"] = ArrayParam(w, program.params["layers.0.up.weight"].type)
    run = run_of(program)

    class Small(Wrong):
        def run(self, graph, inputs):
            [x] = super().run(graph, inputs)
            if graph.nodes.__next__().op.name == "linear" and x.shape[-1] == 16 and "layers.0.up.weight" in graph.params:
                x = x.copy()
                x[0, 2, 3] += 1e-7  # of about 1e-4; the largest element is above 1
            return [x]

    [d] = compare_nodes(run, Small("", 1)).differences
    assert (d.value, d.index) == ("h", (0, 2, 3))


def test_what_is_only_wrong_together_is_narrowed_down():
    """An engine that is wrong only where several nodes are computed as one, as a fused kernel is."""
    stage = compare_nodes(run_of(random_program(BLOCK)), Wrong("silu", 1.01, together=3))
    assert stage.differences
    assert "silu" in stage.differences[0].op.split()
    assert len(stage.differences[0].op.split()) <= 3


def test_a_wrong_kernel_of_the_target(monkeypatch):
    source = random_program("""
graph @forward(%x: f32[s, 8]) {
  %e: f32[s, 8] = exp(%x)
  %t: f32[s, 8] = tanh(%e)
  %m: f32[s, 8] = mul(%t, %e)
  return %m
}
""")
    right = primitives.PRIMITIVES["exp"]

    def lower(ctx, node, *operands):
        return relax.op.multiply(right.lower(ctx, node, *operands), relax.const(1.001, "float32"))

    monkeypatch.setitem(primitives.PRIMITIVES, "exp", dataclasses.replace(right, lower=lower))
    found = compare(source, "cpu")
    assert not found.ok
    assert [d.value for s in found.stages for d in s.differences] == ["e"]
    assert found.first is not None
    assert found.first.op == "exp"
    assert found.outputs[0].differs


def test_onnxruntime_computes_our_export():
    pytest.importorskip("onnxruntime")
    found = compare(random_program(BLOCK), "onnxruntime")
    assert found.ok, str(found)
    assert found.stages[0].values == 7
    assert not found.stages[0].skipped


# -- passes ------------------------------------------------------------------------------------------------------------------
def test_a_pass_that_changes_numbers_is_named_with_the_first_value():
    found = compare(random_program(BLOCK), "after:default", passes=["default", Broken("y", 1.001), "cleanup"])
    [stage] = found.stages
    assert not found.ok
    assert [d.value for d in stage.differences] == ["y"]
    assert stage.name.endswith("by the pass broken")
    assert "first %y = linear mul: [" in str(found), str(found)
    assert "they DIFFER" in str(found)


@pytest.mark.parametrize("passes", ["default", ["default", Broken("y", 1 + 1e-7)]])
def test_passes_that_keep_numbers(passes):
    found = compare(random_program(BLOCK), "after:default", passes=passes)
    assert found.ok, str(found)
    assert found.stages[0].values >= 5


SCALED = """
graph @forward(%x: f32[b, 8]) {{
  param %w: f32[8, 8]
  %l: f32[b, 8] = linear(%x, %w)
  %y: f32[b, 8] = mul(%l, {before}:f32)
  %m: f32[b, 8] = mul(%y, {after}:f32)
  %t: f32[b, 8] = tanh(%m)
  return %t
}}
"""


def test_a_name_that_means_something_else_is_no_error():
    """A factor that moved from one side of a name to the other."""
    a, b = (random_program(SCALED.format(before=x, after=y)) for x, y in (("2.0", "0.25"), ("0.5", "1.0")))
    found = compare(a, b)
    assert found.ok, str(found)
    wrong = compare(a, random_program(SCALED.format(before="0.5", after="1.001")))
    assert wrong.first is not None
    assert wrong.first.value in ("y", "m")
    assert {d.value for d in wrong.stages[0].differences} <= {"y", "m"}, "what follows is right"


HALF = """
graph @forward(%x: f32[b, 4]) {
  %h: f16[b, 4] = cast(%x) {dtype=f16}
  %big: f16[b, 4] = mul(%h, 300.0:f16)
  %sq: f16[b, 4] = mul(%big, %big)
  %root: f16[b, 4] = sqrt(%sq)
  %y: f32[b, 4] = cast(%root) {dtype=f32}
  return %y
}
"""
WIDE = HALF.replace("f16", "f32").replace("%h: f32[b, 4] = cast(%x) {dtype=f32}", "%h: f32[b, 4] = mul(%x, 1.0:f32)").replace(
    "%y: f32[b, 4] = cast(%root) {dtype=f32}", "%y: f32[b, 4] = mul(%root, 1.0:f32)"
)


def test_an_overflow_in_half_precision():
    found = compare(random_program(WIDE), random_program(HALF), inputs={"x": np.array([[0.5, 1.0, 0.25, 0.125]], np.float32)})
    assert [(x.what, x.value, x.side) for x in found.alarms] == [("f16", "sq", "a"), ("inf", "sq", "b")]
    assert not found.ok
    assert found.first is not None
    assert (found.first.value, found.first.index, found.first.b) == ("sq", (0, 1), np.inf)
    assert [d.value for d in found.stages[0].differences] == ["sq"], "its root is right"
    small = compare(random_program(WIDE), random_program(HALF), inputs={"x": np.array([[0.5, 0.7, 0.25, 0.125]], np.float32)})
    assert small.ok, str(small)


def test_infinities_of_masks_and_those_of_both_sides_are_no_difference():
    text = """
graph @forward(%x: f32[b, 4]) {
  %mask: f32[b, 4] = add(%x, -inf:f32)
  %l: f32[b, 4] = log(%x)
  %p: f32[b, 4] = softmax(%l) {axis=1}
  return %p, %mask
}
"""
    x = np.array([[0.0, 1.0, 2.0, 3.0]], np.float32)
    found = compare(random_program(text), random_program(text), inputs={"x": x})
    assert [(x.what, x.value, x.side) for x in found.alarms] == [("inf", "l", "a"), ("inf", "l", "b")]
    assert found.ok, str(found)


@pytest.mark.parametrize("scheme", ["int4", "s4", "int4zb32f16"])
def test_weights_in_fewer_bits_differ_by_design(scheme):
    wide = BLOCK.replace(", 8]", ", 32]").replace("f32[8]", "f32[32]").replace("f32[8, 16]", "f32[32, 16]")
    found = compare(random_program(wide), scheme)
    [stage] = found.stages
    assert found.ok, str(found)
    assert {"h", "z"} <= {d.value for d in stage.meant}
    assert all(0.01 < d.error < 0.3 for d in stage.meant)
    assert {"n", "a"} & {d.value for d in stage.closest}
    assert "differ by design" in str(found)


# -- sides that are no two ways to compute one model ---------------------------------------------------------------------------
ROWS = """
graph @forward(%x: f32[b, 4], %z: f32[b, 4]) {
  %y: f32[b, 4] = add(%x, %z)
  %t: f32[b, 4] = tanh(%y)
  return %y, %t
}
"""
TANH = "%t: f32[b, 4] = tanh(%y)"


@pytest.mark.parametrize(
    "edit, said", [
        (("return %y, %t", "return %y"), ["t: b has none"]),
        (("return %y, %t", "return %y, %t, %z"), ["z: a has none"]),
        ((TANH, "%t: f32[4, b] = transpose(%y) {perm=(1, 0)}"), ["t: a has float32[3, 4], b has float32[4, 3]"]),
        ((TANH, "%t: i32[b, 4] = cast(%y) {dtype=i32}"), ["t: a has float32[3, 4], b has int32[3, 4]"]),
    ],
)  # fmt: skip
def test_outputs_that_one_side_lacks_are_a_difference(edit, said):
    found = compare(random_program(ROWS), random_program(ROWS.replace(*edit)), sizes={"b": 3})
    assert (found.unlike, found.ok) == (said, False)
    assert f"output {said[0]}" in str(found)
    assert str(found).endswith("they DIFFER")
    assert found.to_json()["unlike"] == said


@pytest.mark.parametrize(
    "options, message", [
        ({"sizes": {"rows": 3}}, "@forward has no size rows; it has b"),
        ({"max_kl": 0.1}, "max_kl limits what two sides say of a text: give a text"),
        ({"window": 1}, "a window of 1 tokens predicts nothing: give 2 or more"),
    ],
)  # fmt: skip
def test_options_that_say_nothing(options, message):
    with pytest.raises(WasatError, match=message):
        compare(random_program(ROWS), "after:default", **options)


def test_sides_of_other_inputs():
    other = random_program(ROWS.replace("%z", "%w"))
    with pytest.raises(WasatError, match="the sides take other inputs: program x, z; program x, w"):
        compare(random_program(ROWS), other)


def test_sizes_are_those_of_the_inputs_that_are_given():
    found = compare(random_program(ROWS), "after:default", inputs={"x": np.zeros((3, 4), np.float32)})
    assert found.ok, str(found)


# -- sides -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, message", [
        ("cpux", "'cpux' says nothing about a side: there is no target 'cpux'.*Words are interpreter, after:PASSES"),
        ("before:nothing", "there is no pass 'nothing' in the pipeline; in order they are fold-dequantized, cleanup, "),
        ("transformers", "transformers reads a model's own files; the side program is from none"),
    ],
)  # fmt: skip
def test_words_that_say_nothing(words, message):
    with pytest.raises(WasatError, match=message):
        compare(random_program(BLOCK), words)


def test_a_path_that_is_not_there():
    with pytest.raises(WasatError, match="no/model is no model: give a folder"):
        compare("no/model", "cpu")


@pytest.mark.parametrize("module", ["onnxruntime", "torch", "llama_cpp"])
def test_missing_peers_are_named_with_what_to_install(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(WasatError, match=f"needs the package {module}, which is not installed: pip install "):
        engines.imported(module, "comparing")


def test_the_command(tmp_path):
    for name, factor in (("a", "0.5"), ("b", "0.5001")):
        text = f"graph @forward(%x: f32[b, 4]) {{\n  %y: f32[b, 4] = mul(%x, {factor}:f32)\n  return %y\n}}\n"
        (tmp_path / f"{name}.txt").write_text(text)
    a, b = (str(tmp_path / f"{n}.txt") for n in "ab")
    run = CliRunner().invoke
    good = run(app, ["compare", a, "after:default"])
    assert good.exit_code == 0, good.output
    assert "no difference beyond rounding" in good.output
    bad = run(app, ["compare", a, b, "--json", "--size", "b=3"])
    assert bad.exit_code == 1
    found = json.loads(bad.stdout)
    assert (found["ok"], found["first"]["value"]) == (False, "y")
    np.save(tmp_path / "x.npy", np.zeros((2, 4), np.float32))
    assert run(app, ["compare", a, b, "--input", f"x={tmp_path}/x.npy"]).exit_code == 0, "zeros are the same"


def test_layers_share_code_and_not_weights():
    found = compare(random_program(BLOCK), "cpu")
    assert found.ok, str(found)
    assert found.stages[1].values == 7
    assert not found.stages[1].skipped


def test_an_infinity_on_one_side_is_a_difference_though_results_are_equal():
    a = "graph @forward(%x: f32[b]) {\n  %y: f32[b] = minimum(%x, 1.0:f32)\n  return %y\n}"
    far = "  %far: f32[b] = mul(%x, 3e38:f32)\n  %y: f32[b] = minimum(%far, 1.0:f32)\n"
    b = f"graph @forward(%x: f32[b]) {{\n{far}  return %y\n}}"
    found = compare(random_program(a), random_program(b), inputs={"x": np.array([2.0], np.float32)})
    assert (found.first, found.outputs[0].differs) == (None, False)
    assert [(x.what, x.value, x.side) for x in found.alarms] == [("inf", "far", "b")]
    assert not found.ok


def test_functions_that_end_at_one_are_approximated_near_zero():
    """TVM's tanh is off by 3e-6 of itself at 0.003, and by less than a rounding of 1."""
    program = random_program("graph @forward(%x: f32[b]) {\n  %y: f32[b] = tanh(%x)\n  return %y\n}")
    x = np.concatenate([np.linspace(-0.01, 0.01, 301), np.linspace(-3, 3, 301)]).astype(np.float32)
    assert compare(program, "cpu", inputs={"x": x}).ok
    [d] = compare_nodes(interpret(program, "forward", {"x": x}), Wrong("tanh", 1 + 3e-6)).differences
    assert abs(d.a) > 0.5


def test_models_that_embed_texts_are_compared_too() -> None:
    folder = str(Path(__file__).parent.parent / "golden" / "sentence" / "bert_mean")
    found = compare(folder, "after:default", tokens=5)
    assert (found.ok, [o.value for o in found.outputs]) == (True, ["embedding"])
    assert found.stages[0].values > 20
    with pytest.raises(WasatError, match="asked for logits, and bert_mean gives embedding"):
        compare(folder, "transformers")
