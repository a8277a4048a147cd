"""Recipes: which weight is for what, read off the graph; which scheme it gets, and what that costs."""

from __future__ import annotations

import numpy as np
import pytest
from wasat.ir import QTensorType, parse_program, parse_type
from wasat.ir.graph import ArrayParam
from wasat.passes import FuseAttention, FuseGlu, HoistParams, MergeLinears, PassManager, Quantize
from wasat.passes.cleanup.hoist_params import param_only
from wasat.passes.serving.recipes import ATTENDED, INNER, OTHER, RECIPES, TABLE, is_scheme, role_of, storage

from wasat.testing import random_program

DECODER = """graph @f(%ids: i64[b, s], %mask: f32[b, 1, s, s]) {
  param %embed: f32[96, 64]
  param %q.w: f32[64, 64]
  param %k.w: f32[64, 64]
  param %v.w: f32[64, 64]
  param %o.w: f32[64, 64]
  param %norm: f32[64]
  param %gate.w: f32[128, 64]
  param %up.w: f32[128, 64]
  param %down.w: f32[64, 128]
  param %head: f32[96, 64]
  %x: f32[b, s, 64] = embedding(%embed, %ids)
  %n: f32[b, s, 64] = rms_norm(%x, %norm)
  %q: f32[b, s, 64] = linear(%n, %q.w)
  %k: f32[b, s, 64] = linear(%n, %k.w)
  %v: f32[b, s, 64] = linear(%n, %v.w)
  %qh: f32[b, s, 2, 32] = reshape(%q) {shape=(b, s, 2, 32)}
  %kh: f32[b, s, 2, 32] = reshape(%k) {shape=(b, s, 2, 32)}
  %vh: f32[b, s, 2, 32] = reshape(%v) {shape=(b, s, 2, 32)}
  %qt: f32[b, 2, s, 32] = transpose(%qh) {perm=(0, 2, 1, 3)}
  %kt: f32[b, 2, 32, s] = transpose(%kh) {perm=(0, 2, 3, 1)}
  %vt: f32[b, 2, s, 32] = transpose(%vh) {perm=(0, 2, 1, 3)}
  %scores: f32[b, 2, s, s] = matmul(%qt, %kt)
  %masked: f32[b, 2, s, s] = add(%scores, %mask)
  %probs: f32[b, 2, s, s] = softmax(%masked) {axis=3}
  %mixed: f32[b, 2, s, 32] = matmul(%probs, %vt)
  %back: f32[b, s, 2, 32] = transpose(%mixed) {perm=(0, 2, 1, 3)}
  %flat: f32[b, s, 64] = reshape(%back) {shape=(b, s, 64)}
  %o: f32[b, s, 64] = linear(%flat, %o.w)
  %y: f32[b, s, 64] = add(%x, %o)
  %m: f32[b, s, 64] = rms_norm(%y, %norm)
  %gate: f32[b, s, 128] = linear(%m, %gate.w)
  %up: f32[b, s, 128] = linear(%m, %up.w)
  %act: f32[b, s, 128] = silu(%gate)
  %wide: f32[b, s, 128] = mul(%act, %up)
  %down: f32[b, s, 64] = linear(%wide, %down.w)
  %z: f32[b, s, 64] = add(%y, %down)
  %last: f32[b, s, 64] = rms_norm(%z, %norm)
  %logits: f32[b, s, 96] = linear(%last, %head)
  return %logits
}
"""
ROLES = {
    "embed": TABLE, "q.w": ATTENDED, "k.w": ATTENDED, "v.w": ATTENDED, "o.w": OTHER, "gate.w": OTHER, "up.w": OTHER,
    "down.w": INNER, "head": TABLE,
}  # fmt: skip


def roles(text: str, *passes: FuseAttention) -> dict[str, str]:
    program = random_program(text)
    PassManager(passes).run(program)
    g = program["f"]
    only = param_only(g)
    return {name: role_of(v, only) for name, v in g.params.items() if len(v.shape) > 1}


@pytest.mark.parametrize("passes", [(), (FuseAttention(),)], ids=["as written", "attention fused"])
def test_roles_are_read_off_the_graph(passes):
    assert roles(DECODER, *passes) == ROLES


@pytest.mark.parametrize(("old", "new", "changed"), [
    # a router: what is sorted decides which experts run
    ("%act: ", "%best: f32[b, s, 2], %at: i64[b, s, 2] = top_k(%gate) {k=2}\n  %act: ", {"gate.w": TABLE}),
    # what is normed before it is read is no inner product any more
    ("linear(%wide, %down.w)", "linear(%normed, %down.w)", {"down.w": OTHER}),
    # nor one that follows without anything between
    ("linear(%wide, %down.w)", "linear(%gate, %down.w)", {"down.w": OTHER, "up.w": TABLE}),
    # an output that is multiplied further is no head
    ("return %logits", "return %logits, %up", {}),
    ("return %logits", "return %down, %z", {"head": OTHER}),
])  # fmt: skip
def test_near_misses(old, new, changed):
    text = DECODER.replace(old, new)
    assert text != DECODER
    if "%normed" in new:
        text = text.replace("  %down: ", "  %normed: f32[b, s, 128] = softmax(%wide) {axis=2}\n  %down: ")
    if "up.w" in changed:
        text = text.replace("return %logits", "return %logits, %wide")
    assert roles(text) == ROLES | changed


def test_the_recipe_gives_each_weight_its_scheme_and_says_what_it_costs():
    program = random_program(DECODER)
    report = PassManager([FuseAttention(), Quantize("int4"), MergeLinears(), FuseGlu()]).run(program)
    g = program["f"]
    made = [n for n in g.nodes if n.op.name == "quantize"]
    kinds = {n.inputs[0].name: n.output.type.how for n in made if isinstance(n.output.type, QTensorType)}
    assert kinds == {
        "embed": "s5b64", "concat": "s5b64", "o.w": "s4b64", "concat_1": "s4b64", "down.w": "s5b128", "head": "s5b64",
    }  # fmt: skip
    assert g.count("quantized_linear") == 5  # q, k and v are one, and gate and up
    said = [r.message for r in report.remarks("applied") if "weight" in r.message]
    narrow = 2 * 96 * 64 + 3 * 64 * 64  # rows of 64 are one block, those of 128 too
    elements = {"s5": narrow + 64 * 128, "s4": 64 * 64 + 2 * 128 * 64}
    bits = {"s5": 5.5 * narrow + 5.375 * 64 * 128, "s4": 4.5 * elements["s4"]}
    each = sum(bits.values()) / sum(elements.values())
    assert said[-1].startswith("9 weights in all: ")
    assert said[-1].endswith(f"{each:.2f} bits a weight (s5 5.47, s4 4.50)")
    assert [m.partition(":")[0] for m in said[:3]] == ["6 weights to s5", "3 weights to s4", "9 weights in all"]


def test_a_recipe_takes_what_the_target_has_and_what_suits_the_rows():
    assert storage("int4", TABLE, 640, 32).type.how == "s5b160"
    assert storage("int4", OTHER, 640, 32, (("*", "int?b32f16"),), ["linear"]).type.how == "int4b32f16"
    assert storage("int4", TABLE, 640, 32, (("*", "int?b32f16"),), ["linear"]).type.how == "int8b32f16"
    assert storage("int4", INNER, 70, 32).type.how == "int4b32f16"
    assert storage("int4", OTHER, 70, 32).type.how == "int4b32f16"
    cpu = (("linear", "*"), ("grouped_*", "int?b32f16"))
    assert storage("int4", OTHER, 640, 32, cpu, ["linear"]).type.how == "s4b160"
    assert storage("int4", OTHER, 640, 32, cpu, ["linear", "grouped_linear"]).type.how == "int4b32f16"
    assert storage("int4", OTHER, 70, 32, cpu, ["embedding"]) == "the target has no kernel of embedding for int4b32f16"
    assert storage("s4", OTHER, 640, 32, (("*", "int?b32f16"),), ["linear"]).type.how == "s4b160"  # asked for by name


def test_what_reads_a_weight_as_it_was_needs_no_kernel():
    """A product with the weight itself, or a loop, beside the linear that reads the small copy."""
    text = """graph @g(%x: f32[n, 64]) {
  param %w: f32[64, 64]
  %y: f32[n, 64] = linear(%x, %w)
  %z: f32[n, 64] = matmul(%y, %w)
  return %z
}"""
    program = parse_program(text)
    program.params["w"] = ArrayParam(np.ones((64, 64), np.float32), parse_type("f32[64, 64]"))
    report = PassManager([Quantize("int4", None, formats=(("linear", "*"),))]).run(program)
    assert program["g"].count("quantized_linear") == 1
    assert [m.message[:30] for m in report.remarks("missed")] == ["%w is also kept as f32[64, 64]"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_name_schemes_that_there_are_for_every_role(recipe):
    assert set(RECIPES[recipe]) == {TABLE, ATTENDED, INNER, OTHER}
    assert all(is_scheme(s) and s not in RECIPES for names in RECIPES[recipe].values() for s in names)


def test_quantizing_is_deterministic():
    made = []
    for _ in range(2):
        program = random_program(DECODER)
        PassManager([Quantize("int4"), HoistParams()]).run(program)
        made.append((str(program), {name: program.load(name) for name in program.params}))
    (text, params), (other, others) = made
    assert text == other
    for name, x in params.items():
        np.testing.assert_array_equal(getattr(x, "data", x), getattr(others[name], "data", others[name]))
