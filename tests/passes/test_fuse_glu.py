"""Gated linear units: the activations, the place of the halves, and what is none."""

from __future__ import annotations

import pytest
from wasat.passes import FuseGlu, PassManager

from wasat.testing import check_pass, check_untouched, random_program

DIMS = [{"b": 1, "s": 3}, {"b": 2, "s": 1}]
ACTS = {
    "silu": "silu(%g)",
    "gelu": "gelu(%g)",
    "gelu_tanh": 'gelu(%g) {approximate="tanh"}',
    "relu": "relu(%g)",
    "sigmoid": "sigmoid(%g)",
}


def text(
    act: str = "silu", product: str = "%a, %u", gate: tuple[int, int] = (0, 4), up: tuple[int, int] = (4, 8), width: int = 8
) -> str:
    n, m = gate[1] - gate[0], up[1] - up[0]
    return f"""graph @f(%y: f32[b, s, {width}], %other: f32[b, s, {width}]) {{
  %g: f32[b, s, {n}] = slice(%y) {{starts=(0, 0, {gate[0]}), stops=(b, s, {gate[1]})}}
  %a: f32[b, s, {n}] = {ACTS[act]}
  %u: f32[b, s, {m}] = slice(%y) {{starts=(0, 0, {up[0]}), stops=(b, s, {up[1]})}}
  %z: f32[b, s, {n}] = mul({product})
  return %z
}}"""


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("product", ["%a, %u", "%u, %a"])
def test_activations(act: str, product: str) -> None:
    attrs = "" if act == "silu" else f' {{activation="{act}"}}'
    after = f"graph @f(%y: f32[b, s, 8], %other: f32[b, s, 8]) {{\n %z: f32[b, s, 4] = glu(%y){attrs}\n return %z\n}}"
    check_pass(FuseGlu(), text(act, product), after, DIMS)


def test_part_of_a_larger_product() -> None:
    after = """graph @f(%y: f32[b, s, 12], %other: f32[b, s, 12]) {
  %slice: f32[b, s, 8] = slice(%y) {starts=(0, 0, 3), stops=(b, s, 11)}
  %z: f32[b, s, 4] = glu(%slice)
  return %z
}"""
    check_pass(FuseGlu(), text(gate=(3, 7), up=(7, 11), width=12), after, DIMS)


NEAR = {
    "up before gate": (text(gate=(4, 8), up=(0, 4)), "up, 0:4, does not follow the gate, 4:8"),
    "a gap": (text(gate=(0, 3), up=(4, 7)), "up, 4:7, does not follow the gate, 0:3"),
    "overlapping": (text(gate=(0, 4), up=(3, 7)), "does not follow"),
    "up of one": (text(gate=(0, 4), up=(4, 5)), "does not follow"),
    "rows": (
        text().replace("starts=(0, 0, 0), stops=(b, s, 4)", "starts=(0, 0, 0), stops=(1, s, 4)").replace("g: f32[b", "g: f32[1")
        .replace("a: f32[b", "a: f32[1"),
        "not parts of the last axis",
    ),
    "steps": (text().replace("stops=(b, s, 4)", "stops=(b, s, 7), steps=(1, 1, 2)"), "not parts of the last axis"),
    "up of another value": (text().replace("%y) {starts=(0, 0, 4)", "%other) {starts=(0, 0, 4)"), "are not the same value"),
    "no slice": (text("silu", "%a, %other", (0, 4), (0, 4), 4), None),
    "another activation": (text().replace("silu(%g)", "tanh(%g)"), None),
    "used elsewhere": (text().replace("return %z", "return %z, %a"), "%a is also an output"),
}  # fmt: skip


@pytest.mark.parametrize("near", NEAR)
def test_near_misses(near: str) -> None:
    check_untouched(FuseGlu(), *NEAR[near])


@pytest.mark.parametrize("up", ["%other", "%n"])
def test_a_gate_on_what_is_not_projected_is_not_reported(up: str) -> None:
    """As of attention's result."""
    before = text("sigmoid", f"%a, {up}", (0, 4), (0, 4), 4).replace("  %a:", "  %n: f32[b, s, 4] = tanh(%other)\n  %a:")
    assert not PassManager([FuseGlu()]).run(random_program(before)).remarks("missed")


def test_a_number_that_weighs_a_token_is_no_missed_gate() -> None:
    """A shared expert's gate (Qwen2-MoE)."""
    program = random_program(text("sigmoid", gate=(0, 1), up=(4, 8)).replace("%z: f32[b, s, 1]", "%z: f32[b, s, 4]"))
    assert PassManager([FuseGlu()]).run(program).remarks() == []
