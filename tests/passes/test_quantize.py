"""Weights in fewer bits: which, how, what stays, and what the options refuse."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
from wasat.ir import DType, Program, QTensorType, evaluate, parse, parse_program, parse_type
from wasat.ir.decompose import decompose
from wasat.ir.graph import ArrayParam
from wasat.ir.ops.quant import quantize_array, quantize_rows
from wasat.passes import Cleanup, KeepQuantized, PassError, PassManager, Quantize, Report

import wasat as ws
from wasat.testing import check_pass, check_untouched, feed, random_program

HEAD = """graph @f(%x: f32[n, 64], %ids: i64[n]) {
  param %q.weight: f32[32, 64]
  param %q.bias: f32[32]
  param %embed: f32[8, 64]
"""
BEFORE = HEAD + """
  %e: f32[n, 64] = embedding(%embed, %ids)
  %h: f32[n, 64] = add(%x, %e)
  %q: f32[n, 32] = linear(%h, %q.weight, %q.bias)
  %logits: f32[n, 8] = linear(%h, %embed)
  return %q, %logits
}
"""


def run(text: str, *passes: Quantize | KeepQuantized) -> tuple[Program, Report]:
    program = random_program(text)
    return program, PassManager(passes).run(program)


def outputs(program: Program, n: int) -> list[np.ndarray]:
    g = program["f"]
    params = {k: program.params[k].load() for k in g.params}
    return [np.asarray(x) for x in evaluate(g, feed(g, {"n": n}), params)]


@pytest.mark.parametrize("scheme, small", [("int8", "2.72 kB"), ("int4-plain", "1.44 kB")])
@pytest.mark.parametrize("activation", ["int8", None])
def test_integers(scheme: str, small: str, activation: str | None) -> None:
    act = ' {activation="int8"}' if activation else ""
    asked, scheme = scheme, scheme.removesuffix("-plain")
    after = HEAD + f"""
  %quantize: {scheme}b32f16[8, 64] = quantize(%embed) {{scheme="{scheme}"}}
  %e: f32[n, 64] = quantized_embedding(%quantize, %ids)
  %h: f32[n, 64] = add(%x, %e)
  %quantize_1: {scheme}b32f16[32, 64] = quantize(%q.weight) {{scheme="{scheme}"}}
  %q: f32[n, 32] = quantized_linear(%h, %quantize_1, %q.bias){act}
  %logits: f32[n, 8] = quantized_linear(%h, %quantize){act}
  return %q, %logits
}}
"""
    remarks = check_pass(Quantize(asked, activation), BEFORE, after, [{"n": 2}])
    assert [str(r) for r in remarks] == [f"applied: 2 weights to {asked}: 10.24 kB -> {small} (@f)"]


@pytest.mark.parametrize("scheme", ["f16", "bf16"])
def test_narrow_floats(scheme: str) -> None:
    after = HEAD + f"""
  %cast: {scheme}[8, 64] = cast(%embed) {{dtype={scheme}}}
  %e: f32[n, 64] = embedding(%cast, %ids)
  %h: f32[n, 64] = add(%x, %e)
  %cast_1: {scheme}[32, 64] = cast(%q.weight) {{dtype={scheme}}}
  %q: f32[n, 32] = linear(%h, %cast_1, %q.bias)
  %logits: f32[n, 8] = linear(%h, %cast)
  return %q, %logits
}}
"""
    remarks = check_pass(Quantize(scheme), BEFORE, after, [{"n": 2}])
    assert [r.message for r in remarks] == [f"2 weights to {scheme}: 10.24 kB -> 5.12 kB"]


@pytest.mark.parametrize("scheme", ["f16", "bf16"])
def test_clean_up_keeps_the_loss_of_bits(scheme: str) -> None:
    program, _ = run(BEFORE, Quantize(scheme))
    before = outputs(program, 3)
    PassManager([Cleanup()]).run(program)
    assert program["f"].count("cast") == 2
    for a, b in zip(before, outputs(program, 3)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("scheme, error", [
    ("int8", 0.02), ("int4-plain", 0.2), ("int4", 0.06), ("s4", 0.18), ("s5b64", 0.08), ("int4zb32f16", 0.16), ("q5_1", 0.07),
    ("f16", 1e-3), ("bf16", 8e-3),
])  # fmt: skip
def test_results_are_near(n: int, scheme: str, error: float) -> None:
    exact = outputs(random_program(BEFORE), n)
    program, _ = run(BEFORE, Quantize(scheme))
    for a, b in zip(exact, outputs(program, n)):
        relative = np.linalg.norm(a - b) / np.linalg.norm(a)
        assert error / 100 < relative < error


@pytest.mark.parametrize(
    "overrides, want",
    [
        ([("q.*", "f32")], ["quantized_embedding", "linear", "quantized_linear"]),
        ([("embed", "f32")], ["embedding", "quantized_linear", "linear"]),
        ([("q.*", "int8")], ["quantized_embedding", "quantized_linear", "quantized_linear"]),
        ([("q.weight", "f32"), ("q.*", "int8")], ["quantized_embedding", "linear", "quantized_linear"]),
        ([("*", "f32")], ["embedding", "linear", "linear"]),
    ],
)
def test_overrides(overrides: Sequence[tuple[str, str]], want: list[str]) -> None:
    program, report = run(BEFORE, Quantize("int4-plain", overrides=tuple(overrides)))
    g = program["f"]
    assert [n.op.name for n in g.nodes if "linear" in n.op.name or "embedding" in n.op.name] == want
    if overrides == [("q.*", "int8")]:
        assert [n.attrs.scheme for n in g.nodes if n.op.name == "quantize"] == ["int4", "int8"]  # type: ignore[attr-defined]
        assert [r.message.split(":")[0] for r in report.remarks()] == [
            "1 weight to int4-plain", "1 weight to int8", "2 weights in all",
        ]  # fmt: skip
    assert not report.remarks("missed")


def test_overrides_alone() -> None:
    program, _ = run(BEFORE, Quantize("f32", overrides=(("embed", "int8"),)))
    assert program["f"].count("quantized_linear") == 1
    check_untouched(Quantize("f32"), BEFORE)


@pytest.mark.parametrize(
    "options, message",
    [
        (Quantize("int3"), "no quantization scheme 'int3'; there are int8, int4, int4-plain, s4, s5, .*f16, bf16, f32"),
        (Quantize("iq4_nl"), "no quantization scheme 'iq4_nl'"),
        (Quantize("f32[2]"), "no quantization scheme"),
        (Quantize("s4b40"), "no quantization scheme 's4b40'"),
        (Quantize("int8", overrides=(("q.*", "int5"),)), "no quantization scheme 'int5'"),
        (Quantize("int8", "int4"), "activations can be int8 or None, not 'int4'"),
        (Quantize("int8", overrides=(("q.wieght", "f32"),)), r"'q.wieght' matches no parameter; near it are q.weight"),
        (Quantize("int8", overrides=(("lm_head*", "f32"), ("q.*", "f32"))), "'lm_head\\*' matches no parameter$"),
    ],
)
def test_refused_options(options: Quantize, message: str) -> None:
    with pytest.raises(PassError, match=message.replace("$", r"\n")):
        run(BEFORE, options)


def one(weight: str, body: str = "", params: str = "param %w: f32[8, 64]", x: str = "f32[n, 64]") -> str:
    n = weight.rpartition("[")[2].partition(",")[0]
    linear = f"%y: f32[n, {n}] = linear(%x, {weight.partition(':')[0]})"
    return f"graph @f(%x: {x}, %v: f32[8, 64]) {{\n{params}\n{body}\n{linear}\nreturn %y\n}}"


def test_what_is_computed_from_parameters_is_a_weight() -> None:
    body = "%t: f32[8, 64] = transpose(%w) {perm=(1, 0)}"
    program, report = run(one("%t: f32[8, 64]", body, "param %w: f32[64, 8]"), Quantize("int8"))
    assert [n.op.name for n in program["f"].nodes] == ["transpose", "quantize", "quantized_linear"]
    named, _ = run(one("%t: f32[8, 64]", body, "param %w: f32[64, 8]"), Quantize("int8", overrides=(("w", "f32"),)))
    assert named["f"].count("linear") == 1
    assert not report.remarks("missed")


def test_near_misses() -> None:
    check_untouched(Quantize("int8"), one("%v: f32[8, 64]"), "%v stays f32[8, 64]: it is not computed from parameters alone")
    short = one("%w: f32[8, 31]", "", "param %w: f32[8, 31]", "f32[n, 31]")
    check_untouched(Quantize("int4"), short, "%w stays f32[8, 31]: its rows are shorter than a block of 32")
    for scheme, reason in (("s5", "31 are not of whole blocks of 32"), ("q4_1", "31 are not of whole blocks of 32"),
                           ("int4zb64f16", "shorter than a block of 64")):  # fmt: skip
        check_untouched(Quantize(scheme), short, f"%w stays f32[8, 31]: its rows {'are ' * (scheme == 'int4zb64f16')}"
                        f"{'of ' * (scheme != 'int4zb64f16')}{reason}")  # fmt: skip
    program, _ = run(short, Quantize("f16"))
    assert program["f"].count("cast") == 1
    twice = short.replace("return %y", "%z: f32[n, 8] = linear(%x, %w)\n return %y, %z")
    _, report = run(twice, Quantize("int8"))
    assert len(report.remarks("missed")) == 1
    f16 = one("%w: f16[8, 64]", "", "param %w: f16[8, 64]")
    check_untouched(Quantize("bf16"), f16)
    assert run(f16, Quantize("int8"))[0]["f"].count("quantized_linear") == 1


def test_a_weight_that_something_else_reads_is_kept_too() -> None:
    text = BEFORE.replace("return %q", "%m: f32[64, 8] = transpose(%embed) {perm=(1, 0)}\n return %m, %q")
    program, report = run(text, Quantize("int8"))
    assert program["f"].count("quantize") == 2
    (missed,) = report.remarks("missed")
    assert missed.message.startswith("%embed is also kept as f32[8, 64], because %m: f32[64, 8] = transpose(%embed)")


def test_large_weights_are_counted_in_large_units() -> None:
    text = "graph @f(%ids: i64[n]) {\n param %w: f32[1000, 640]\n %y: f32[n, 640] = embedding(%w, %ids)\n return %y\n}"
    _, report = run(text, Quantize("f16"))
    assert [r.message for r in report.remarks()] == ["1 weight to f16: 2.56 MB -> 1.28 MB"]


def test_every_graph_of_a_program() -> None:
    program, report = run(BEFORE + BEFORE.replace("@f", "@g"), Quantize("int8"))
    assert all(g.count("quantized_linear") == 2 for g in program.graphs.values())
    assert [r.graph for r in report.remarks()] == ["f", "g"]


LOOP = """graph @f(%x: f32[n, 64]) {
  param %w: f32[64, 64]
  param %u: f32[64]
  %y: f32[n, 64] = scan(%x, %w, %u) {body=graph @turn(%h: f32[n, 64], %w: f32[64, 64], %u: f32[64]) {
    %l: f32[n, 64] = linear(%h, %w, %u)
    %t: f32[n, 64] = tanh(%l)
    return %t
  }, carries=1, slices=0, length=3}
  %z: f32[n, 64] = linear(%y, %w)
  return %z
}
"""
QUANTIZED = """graph @f(%x: f32[n, 64]) {
  param %w: f32[64, 64]
  param %u: f32[64]
  %quantize: int8b32f16[64, 64] = quantize(%w) {scheme="int8"}
  %y: f32[n, 64] = scan(%x, %u, %quantize) {body=graph @turn(%h: f32[n, 64], %u: f32[64], %quantize: int8b32f16[64, 64]) {
    %l: f32[n, 64] = quantized_linear(%h, %quantize, %u)
    %t: f32[n, 64] = tanh(%l)
    return %t
  }, carries=1, slices=0, length=3}
  %z: f32[n, 64] = quantized_linear(%y, %quantize)
  return %z
}
"""


def test_weights_that_a_body_reads() -> None:
    """One copy, inside and outside; the loop is given it as it is."""
    remarks = check_pass(Quantize("int8", None), LOOP, QUANTIZED, [{"n": 2}])
    assert [str(r) for r in remarks] == ["applied: 1 weight to int8: 16.38 kB -> 4.35 kB (@f)"]


def test_a_body_that_reads_its_weight_otherwise_too() -> None:
    text = LOOP.replace("%l: ", "%m: f32[64] = reduce_sum(%w) {axes=(0,)}\n    %l: ").replace("(%h, %w, %u)", "(%h, %w, %m)")
    program, report = run(text, Quantize("int8", None))
    [loop] = [n for n in program["f"].nodes if n.is_a("scan")]
    assert [str(v.type) for v in loop.inputs] == ["f32[n, 64]", "f32[64, 64]", "f32[64]", "int8b32f16[64, 64]"]
    assert any("%w is also kept as f32[64, 64], because %y" in str(r) for r in report.remarks())


def test_stacked_weights_that_turns_slice_stay_and_are_named() -> None:
    text = """graph @f(%x: f32[n, 64]) {
  param %w: f32[3, 64, 64]
  %y: f32[n, 64] = scan(%x, %w) {body=graph @turn(%h: f32[n, 64], %w: f32[64, 64]) {
    %l: f32[n, 64] = linear(%h, %w)
    return %l
  }, carries=1, slices=1}
  return %y
}
"""
    [remark] = run(text, Quantize("int8"))[1].remarks()
    assert "%w stays f32[3, 64, 64]: scan reads it, and no linear or embedding" in str(remark)


NESTED = """graph @f(%x: f32[n, 64], %c: bool[]) {
  param %w: W[64, 64]
MADE  %y: f32[n, 64] = cond(%c, %x, READ) {then=graph @yes(%x: f32[n, 64], %v: READ_TYPE) {
    %y: f32[n, 64] = scan(%x, %v) {body=graph @turn(%h: f32[n, 64], %v: READ_TYPE) {
      %l: f32[n, 64] = OP
      return %l
    }, carries=1, slices=0, length=2}
    return %y
  }, otherwise=graph @no(%x: f32[n, 64], %v: READ_TYPE) {
    %y: f32[n, 64] = neg(%x)
    return %y
  }}
  return %y
}
"""


@pytest.mark.parametrize("kind, make", [
    ("int8b32f16", "dequantize(%w)"), ("s4b64", "dequantize(%w)"), ("f16", "cast(%w) {dtype=f32}"),
])  # fmt: skip
def test_weights_that_inner_bodies_read_stay_as_they_are_stored(kind: str, make: str) -> None:
    made = f"  %wide: f32[64, 64] = {make}\n"
    edits = {"W[": f"{kind}[", "MADE": made, "READ_TYPE": "f32[64, 64]", "READ": "%wide", "OP": "linear(%h, %v)"}
    program, report = run(functools.reduce(lambda text, edit: text.replace(*edit), edits.items(), NESTED), KeepQuantized(None))
    text = str(program["f"])
    read = "linear(%h, %w" if kind == "f16" else "quantized_linear(%h, %w"
    assert (read in text, "dequantize" in text, "cast" in text) == (True, False, False), text
    assert text.count(f"%w: {kind}[64, 64]") == 4
    assert not [r for r in report.remarks() if str(r).startswith("missed")]
    program.verify()


@pytest.mark.parametrize(("size", "scheme", "stays"), [
    *((size, s, size > 1 or 0 < size < 1) for s in ("int8", "int4-plain", "q5_0") for size in (1e-7, 1e7, 0, 1)),
    (1e-5, "int8", True), (1e-5, "int4-plain", False), (1e6, "int8", False), (1e6, "int4-plain", True),  # largest / 127, / 8
    (1e-4, "int4", False), (1e-5, "int4", True), (1e7, "int4", False), (1e9, "int4", True), (0, "int4", False),  # / (8 * 128)
    (2e5, "q5_0", False), (2e5, "q5_1", True), (1e4, "q5_1", False),  # an offset is as large as the largest
])  # fmt: skip
@pytest.mark.parametrize("body", ["", "%t: f32[8, 64] = mul(%w, 1.0:f32)\n  "])
def test_weights_whose_scales_f16_does_not_hold_stay_and_are_named(size: float, scheme: str, stays: bool, body: str) -> None:
    """One row is enough; a row of zeros, or what is small within a block, is no obstacle."""
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    x[3] *= np.float32(size)
    x[:, 8:16] *= np.float32(1e-9)
    read = "%t" if body else "%w"
    program = parse_program(
        f"graph @g(%x: f32[n, 64]) {{\n  param %w: f32[8, 64]\n  {body}%y: f32[n, 8] = linear(%x, {read})\n  return %y\n}}\n"
    )
    program.params["w"] = ArrayParam(x, parse_type("f32[8, 64]"))
    report = PassManager([Quantize(scheme)]).run(program)
    assert any(n.op.name == "linear" for n in program["g"].nodes) is stays
    missed = [r.message for r in report.remarks("missed")]
    assert any(f"{read} stays" in m and "w has a block whose scale is outside f16" in m for m in missed) is stays


@pytest.mark.parametrize(("size", "scheme", "stays"), [
    (1e-7, "f16", True), (1e-6, "f16", True), (1e-5, "f16", False), (0, "f16", False), (1e4, "f16", False), (1e5, "f16", True),
    (1e-30, "bf16", False), (1e-40, "bf16", True), (1e37, "bf16", False), (np.inf, "f16", False), (np.nan, "bf16", False),
])  # fmt: skip
def test_weights_that_a_narrow_float_does_not_hold_stay_and_are_named(size: float, scheme: str, stays: bool) -> None:
    """As above. What is no number already stays none."""
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    x[3] = np.float32(size) * np.where(x[3] == 0, 1, x[3])
    x[:, 8:16] *= np.float32(1e-9)
    program = parse_program("graph @g(%x: f32[n, 64]) { param %w: f32[8, 64]\n %y: f32[n, 8] = linear(%x, %w)\n return %y }\n")
    program.params["w"] = ArrayParam(x, parse_type("f32[8, 64]"))
    report = PassManager([Quantize(scheme)]).run(program)
    missed = [r.message for r in report.remarks("missed")]
    assert (f"= cast(%w) {{dtype={scheme}}}" in str(program["g"])) is not stays
    assert any(f"w has a row outside {scheme}" in m for m in missed) is stays


def test_halves_are_rounded_to_even() -> None:
    """A scale of 1, so that values are what is rounded; beyond the range only where the scale itself was rounded down."""
    x = np.zeros((2, 32), np.float32)
    x[:, :8] = [[127, 0.5, 1.5, 2.5, -0.5, -1.5, 0.75, -0.75], [-127, 3.5, 4.5, 0.49, -2.5, 0, 126.5, 125.5]]
    want = [[127, 0, 2, 2, 0, -2, 1, -1], [-127, 4, 4, 0, -2, 0, 126, 126]]
    assert quantize_array(x, QTensorType("int8", (2, 32))).values[:, :8].tolist() == want
    q, d = quantize_rows(x)
    assert (q[:, 0, :8].tolist(), d.tolist()) == (want, [[1.0], [1.0]])
    x[:, :6] = [[-8, 7.5, 7.4, 0.5, 1.5, 6.5], [8, 7.5, -7.5, -0.5, -1.5, -6.5]]
    x[:, 6:] = 0
    want = [[-8, 7, 7, 0, 2, 6], [-8, -8, 7, 0, 2, 6]]
    assert quantize_array(x, QTensorType("int4", (2, 32))).values[:, :6].tolist() == want
    tiny = np.full((1, 32), 127 * 1.4 * 2.0**-24, np.float32)  # f16 has no scale between 2**-24 and 2**-23
    tiny[0, 1] *= -1
    assert quantize_array(tiny, QTensorType("int8", (1, 32))).values[0, :2].tolist() == [127, -127]


@pytest.mark.parametrize("backend", ["interpreter", "decomposed", "cpu"])
def test_rows_of_least_numbers_are_off_by_half_a_step(backend: str) -> None:
    """127 / max is finite in f32 from 3.7e-37 on; below, steps are those of the least normal number, whoever rounds."""
    text = """graph @forward(%x: f32[n, 40]) {
  param %w: int8b32f32[40, 40]
  %y: f32[n, 40] = quantized_linear(%x, %w) {activation="int8"}
  return %y
}"""
    program = parse_program(text)
    eye = quantize_array(127 * np.eye(40, dtype=np.float32), QTensorType("int8", (40, 40), 32, DType.F32))
    program.params["w"] = ArrayParam(eye, eye.type)
    if backend == "decomposed":
        decompose(program["forward"], keep=lambda node: False)
    tops = np.geomspace(1e-39, 1e-35, 33).astype(np.float32)
    x = np.random.default_rng(0).uniform(-1, 1, (35, 40)).astype(np.float32)
    x[:, ::32] = 1
    x[:33] *= tops[:, None]
    x[33], x[34, 3] = 0, np.nan
    y = ws.run(program, backend="cpu" if backend == "cpu" else "interpreter", x=x)["y"] / 127
    step = np.maximum(np.abs(x[:33]).max(-1, keepdims=True) / 127, 2.0**-126)
    assert (np.abs(y[:33] - x[:33]) <= 0.5001 * step).all()
    assert np.abs(y[np.argmax(tops > 1e-37)]).max() > 9e-38
    assert (y[33] == 0).all()
    assert np.isnan(y[34]).all()


def test_rows_of_activations_are_rounded_to_even_in_the_decomposition_too() -> None:
    text = """graph @f(%x: f32[n, 32]) {
  param %w: int8b32f16[32, 32]
  %y: f32[n, 32] = quantized_linear(%x, %w) {activation="int8"}
  return %y
}"""
    weight = quantize_array(np.eye(32, dtype=np.float32) * 127, QTensorType("int8", (32, 32)))  # scales of 1
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    g = parse(text)
    for _ in range(2):
        (y,) = evaluate(g, {"x": x}, {"w": weight})
        np.testing.assert_array_equal(np.asarray(y)[0, :6], np.array([127, 0, 2, 2, 0, -2]) * 127)
        decompose(g, lambda node: node.op.name in ("linear", "dequantize"))
    assert g.count("round") == 1


def test_what_no_linear_reads_and_what_is_quantized_already_are_named() -> None:
    program = random_program("""graph @g(%x: f32[2, 64]) {
  param %w: f32[64, 64]
  param %small: f32[64, 2]
  param %bias: f32[4096]
  param %q: int8b32f16[64, 64]
  %y: f32[2, 64] = matmul(%x, %w)
  %z: f32[2, 64] = quantized_linear(%y, %q)
  %u: f32[2, 2] = matmul(%z, %small)
  %v: f32[4096] = exp(%bias)
  return %u, %v
}""")
    report = PassManager([Quantize("int8")]).run(program)
    assert [r.message for r in report.remarks()] == [
        "%w stays f32[64, 64]: matmul reads it, and no linear or embedding",
        "%q stays int8b32f16[64, 64]: it is quantized already",
    ]


# -- weights that are stored quantized -----------------------------------------------------------------------------------------
STORED = """graph @f(%x: f32[n, 256], %ids: i64[n]) {
  param %w: q4_k[32, 256]
  param %b: f32[32]
  param %table: int8b32f16[8, 256]
"""


@pytest.mark.parametrize("activation", ["int8", None])
def test_stored_weights_are_read_as_they_are(activation: str | None) -> None:
    before = STORED + """
  %dense: f32[8, 256] = dequantize(%table)
  %e: f32[n, 256] = embedding(%dense, %ids)
  %h: f32[n, 256] = add(%x, %e)
  %d: f32[32, 256] = dequantize(%w)
  %y: f32[n, 32] = linear(%h, %d, %b)
  %logits: f32[n, 8] = linear(%h, %dense)
  return %y, %logits
}
"""
    act = ' {activation="int8"}' if activation else ""
    after = STORED + f"""
  %e: f32[n, 256] = quantized_embedding(%table, %ids)
  %h: f32[n, 256] = add(%x, %e)
  %y: f32[n, 32] = quantized_linear(%h, %w, %b){act}
  %logits: f32[n, 8] = quantized_linear(%h, %table){act}
  return %y, %logits
}}
"""
    remarks = check_pass(KeepQuantized(activation), before, after, [{"n": 2}])
    was, now = random_program(before), random_program(before)
    PassManager([KeepQuantized(activation)]).run(now)
    for a, b in zip(outputs(was, 3), outputs(now, 3)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=0.4 if activation else 1e-5)  # half a step of 127, in 256 terms
    assert sorted(str(r) for r in remarks) == [
        "applied: 1 operation on weights that stay q4_k (@f)", "applied: 2 operations on weights that stay int8b32f16 (@f)",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_narrow_weights_are_widened_as_they_are_read(kind: str) -> None:
    head = f"graph @f(%x: f32[n, 64], %ids: i64[n]) {{\n param %w: {kind}[32, 64]\n param %table: {kind}[8, 64]\n"
    body = """
  %e: f32[n, 64] = embedding(%table, %ids)
  %h: f32[n, 64] = add(%x, %e)
  %y: f32[n, 32] = linear(%h, %w)
  return %y
}
"""
    casts = "%wide: f32[32, 64] = cast(%w) {dtype=f32}\n %rows: f32[8, 64] = cast(%table) {dtype=f32}\n"
    before = head + casts + body.replace("%table,", "%rows,").replace("%w)", "%wide)")
    remarks = check_pass(KeepQuantized(), before, head + body, [{"n": 2}])
    assert [str(r) for r in remarks] == [f"applied: 2 operations on weights that stay {kind} (@f)"]
    was, now = random_program(before), random_program(before)
    PassManager([KeepQuantized()]).run(now)
    for a, b in zip(outputs(was, 3), outputs(now, 3)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("change", [("param %w: f16", "param %w: f8e4m3"), ("cast(%w)", "cast(%narrow)")])
def test_what_is_no_parameter_of_16_bits_is_cast_before(change: tuple[str, str]) -> None:
    text = """graph @f(%x: f32[n, 64], %narrow: f16[32, 64]) {
  param %w: f16[32, 64]
  %wide: f32[32, 64] = cast(%w) {dtype=f32}
  %y: f32[n, 32] = linear(%x, %wide)
  return %y
}
"""
    check_untouched(KeepQuantized(), text.replace(*change))


def test_a_stored_weight_that_something_else_reads_is_dequantized_for_it() -> None:
    text = STORED + """
  %d: f32[32, 256] = dequantize(%w)
  %t: f32[256, 32] = transpose(%d) {perm=(1, 0)}
  %y: f32[n, 32] = matmul(%x, %t)
  return %y
}
"""
    reason = "%w q4_k[32, 256] is dequantized as it is read: transpose reads it"
    check_untouched(KeepQuantized(), text, reason)


def test_a_quantized_value_in_place_of_x_is_dequantized() -> None:
    text = """graph @f() {
  param %x: q4_k[2, 256]
  param %w: f32[32, 256]
  %d: f32[2, 256] = dequantize(%x)
  %y: f32[2, 32] = linear(%d, %w)
  return %y
}
"""
    check_untouched(KeepQuantized(), text, "%x q4_k[2, 256] is dequantized as it is read: linear reads it")
