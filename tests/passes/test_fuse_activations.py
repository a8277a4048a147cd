"""Activations and softmax: every spelling, and what is none."""

from __future__ import annotations

import pytest
from wasat.ir import Program, build, op_named, parse, parse_type
from wasat.ir.decompose import decompose
from wasat.passes import Cleanup, FuseActivations, PassManager

from wasat.testing import InterpreterCheck, check_pass, check_untouched

DIMS = [{"n": 1}, {"n": 5}]


def graph(body: str, result: str = "%y") -> str:
    """Steps such as ``y = mul(%x, 2.0:f32)``, all of type f32[n, 4] unless they say otherwise."""
    lines = []
    for line in body.strip().split("\n"):
        name, _, rest = line.strip().partition(" = ")
        name, _, kind = name.partition(": ")
        lines.append(f"%{name}: {kind or 'f32[n, 4]'} = {rest}")
    return "graph @f(%x: f32[n, 4], %z: f32[n, 4]) {\n" + "\n".join(lines) + f"\nreturn {result}\n}}"


INNER = "t = erf(%s)\n p = add(%t, 1.0:f32)\n"
TANH = "t = tanh(%s)\n p = add(%t, 1.0:f32)\n"
MAX = "m: f32[n, 1] = reduce_max(%x) {axes=(1,), keepdims=true}\n "
SUM = "t: f32[n, 1] = reduce_sum(%e) {axes=(1,), keepdims=true}\n "
HALF = "h = mul(%x, 0.5:f32)\n y = mul(%h, %p)"
HALVED = "h = mul(%x, %p)\n y = mul(%h, 0.5:f32)"
CUBE = "q = mul(%x, %x)\n c = mul(%q, %x)\n k = mul(%c, 0.044715:f32)\n i = add(%x, %k)\n s = mul(%i, 0.7978845608:f32)\n"
SPELLINGS = {
    "sigmoid": [
        "a = neg(%x)\n e = exp(%a)\n d = add(%e, 1.0:f32)\n y = div(1.0:f32, %d)",
        "a = neg(%x)\n e = exp(%a)\n d = add(1.0:f32, %e)\n y = div(1.0:f32, %d)",
        "h = mul(%x, 0.5:f32)\n t = tanh(%h)\n d = add(%t, 1.0:f32)\n y = mul(%d, 0.5:f32)",
    ],
    "silu": [
        "s = sigmoid(%x)\n y = mul(%s, %x)",
        "a = neg(%x)\n e = exp(%a)\n d = add(%e, 1.0:f32)\n y = div(%x, %d)",
        "a = neg(%x)\n e = exp(%a)\n d = add(%e, 1.0:f32)\n s = div(1.0:f32, %d)\n y = mul(%x, %s)",
    ],
    "gelu": [
        "s = mul(%x, 0.70710678:f32)\n" + INNER + "h = mul(%x, 0.5:f32)\n y = mul(%h, %p)",
        "s = div(%x, 1.4142135:f32)\n" + INNER + "h = mul(%x, %p)\n y = mul(%h, 0.5:f32)",
        "s = div(%x, 1.4142135:f32)\n" + INNER + "h = mul(0.5:f32, %p)\n y = mul(%x, %h)",
        "s = div(%x, 1.4142135:f32)\n" + INNER + "h = mul(%p, %x)\n y = div(%h, 2.0:f32)",
    ],
    "gelu {approximate=\"tanh\"}": [
        CUBE + TANH + HALF,
        CUBE.replace("q = mul(%x, %x)\n c = mul(%q, %x)", "c = pow(%x, 3.0:f32)") + TANH + HALF.replace("%h, %p", "%p, %h"),
        "q = mul(%x, %x)\n c = mul(%q, 0.044715:f32)\n k = mul(%x, %c)\n i = add(%x, %k)\n s = mul(%i, 0.7978845608:f32)\n"
        + TANH + HALVED,
        "k = mul(%x, 0.044715:f32)\n q = mul(%x, %x)\n c = mul(%k, %q)\n i = add(%x, %c)\n s = mul(%i, 0.7978845608:f32)\n"
        + TANH + HALVED,
        "a = mul(%x, 0.7978845608:f32)\n q = pow(%x, 2.0:f32)\n k = mul(%q, 0.044715:f32)\n i = add(%k, 1.0:f32)\n"
        "s = mul(%a, %i)\n" + TANH + HALF,
        "a = mul(%x, 0.79788456:f32)\n k = mul(%x, 0.044715:f32)\n q = mul(%k, %x)\n i = add(1.0:f32, %q)\n"
        "s = mul(%a, %i)\n" + TANH + HALF,  # Bloom's
        "k = mul(%x, 0.044715:f32)\n q = mul(%k, %x)\n i = add(%q, 1.0:f32)\n a = mul(%x, %i)\n"
        "s = mul(%a, 0.79788456:f32)\n" + TANH + HALF,
        "q = mul(%x, %x)\n k = mul(%q, 0.035677408:f32)\n i = add(%k, 0.7978845608:f32)\n s = mul(%x, %i)\n" + TANH + HALF,
    ],
    "softplus": [
        "e = exp(%x)\n y = log1p(%e)",
        "e = exp(%x)\n d = add(%e, 1.0:f32)\n y = log(%d)",
        "m = maximum(%x, 0.0:f32)\n a = abs(%x)\n b = neg(%a)\n e = exp(%b)\n l = log1p(%e)\n y = add(%m, %l)",
    ],
    "softmax {axis=1}": [
        "e = exp(%x)\n" + SUM + "y = div(%e, %t)",
        MAX + "d = sub(%x, %m)\n e = exp(%d)\n" + SUM + "y = div(%e, %t)",
        MAX + "o: f32[n, 1] = stop_gradient(%m)\n d = sub(%x, %o)\n e = exp(%d)\n" + SUM + "y = div(%e, %t)",
    ],
    "softmax {axis=0}": [
        "e = exp(%x)\n t: f32[1, 4] = reduce_sum(%e) {axes=(0,), keepdims=true}\n y = div(%e, %t)",
    ],
}  # fmt: skip


@pytest.mark.parametrize("want, body", [(k, v) for k, all in SPELLINGS.items() for v in all])
def test_spellings(want: str, body: str) -> None:
    op, _, attrs = want.partition(" ")
    check_pass(FuseActivations(), graph(body), graph(f"y = {op}(%x) {attrs}"), DIMS)


NEAR = {
    "sigmoid of x + 2": (SPELLINGS["sigmoid"][0].replace("1.0:f32)\n y", "2.0:f32)\n y"), None),
    "sigmoid of +x": (SPELLINGS["sigmoid"][0].replace("neg(%x)", "abs(%x)"), None),
    "a gate": ("s = sigmoid(%z)\n y = mul(%s, %x)", None),
    "another root": (SPELLINGS["gelu"][0].replace("0.70710678", "0.8"), "is 0.8, not 0.707107"),
    "erf of another": (SPELLINGS["gelu"][0].replace("mul(%x, 0.7", "mul(%z, 0.7"), "are not the same value"),
    "no half": (SPELLINGS["gelu"][0].replace("mul(%x, 0.5:f32)", "mul(%x, 0.6:f32)"), "is 0.6, not 0.5"),
    "another cubic": (SPELLINGS['gelu {approximate="tanh"}'][0].replace("0.044715", "0.05"), "is 0.05, not 0.044715"),
    "soft capping": ("s = mul(%x, 0.05:f32)\n t = tanh(%s)\n y = mul(%t, 20.0:f32)", None),
    "log(2 + exp x)": (SPELLINGS["softplus"][1].replace("1.0", "2.0"), None),
    "another sum": (
        "e = exp(%x)\n g = exp(%z)\n t: f32[n, 1] = reduce_sum(%g) {axes=(1,), keepdims=true}\n y = div(%e, %t)",
        "%g and %e are not the same value",
    ),
    "sum of both axes": (
        "e = exp(%x)\n t: f32[1, 1] = reduce_sum(%e) {axes=(0, 1), keepdims=true}\n y = div(%e, %t)", "axes is (0, 1)"
    ),
    "a sum and one": (
        "e = exp(%x)\n" + SUM + "o: f32[n, 1] = add(%t, 1.0:f32)\n y = div(%e, %o)",
        "%o is add, not reduce_sum",
    ),
    "a maximum along another axis": (
        "m: f32[1, 4] = reduce_max(%x) {axes=(0,), keepdims=true}\n d = sub(%x, %m)\n y = softmax(%d) {axis=1}", None
    ),
}  # fmt: skip


@pytest.mark.parametrize("near", NEAR)
def test_near_misses(near: str) -> None:
    body, reason = NEAR[near]
    check_untouched(FuseActivations(), graph(body), reason)


def test_exponentials_used_elsewhere_stay() -> None:
    body = "e = exp(%x)\n" + SUM + "y = div(%e, %t)"
    check_untouched(FuseActivations(), graph(body, "%y, %t"), "%t is also an output of the graph")


@pytest.mark.parametrize("text", ["sigmoid", "silu", "gelu", "gelu tanh", "softplus", "softmax"])
def test_decompositions_are_recognized(text: str) -> None:
    name, _, approximate = text.partition(" ")
    attrs = {"approximate": approximate} if approximate else {}
    op = op_named(name)
    g = build("f", [("x", parse_type("f32[n, 4]"))], lambda b, x: b.emit(op, x, **attrs))
    decompose(g, keep=lambda node: False)
    assert g.count(name) == 0
    PassManager([Cleanup(), FuseActivations()], check=InterpreterCheck(DIMS)).run(Program({"f": g}))
    assert [n.op.name for n in g.nodes] == [name]


@pytest.mark.parametrize("body", [
    NEAR["soft capping"][0], "y = tanh(%x)", "t = tanh(%x)\n y = mul(%t, %z)", "y = exp(%x)", "e = exp(%x)\n y = mul(%e, %z)",
])  # fmt: skip
def test_what_is_no_written_out_activation_is_no_missed_one(body: str) -> None:
    report = PassManager([FuseActivations()]).run(Program({"f": parse(graph(body))}))
    assert not report.remarks("missed")
