"""RMS and layer normalization: every spelling, and what is none."""

from __future__ import annotations

import pytest
from wasat.frontend import nn
from wasat.ir import parse
from wasat.passes import Cleanup, FuseNorm, PassManager
from wasat.passes.fusion.fuse_norm import _holds_mean

import wasat as ws
from wasat.testing import InterpreterCheck, check_pass, check_untouched, random_program

DIMS = [{"b": 1, "s": 3}, {"b": 2, "s": 1}]
HEAD = """graph @f(%x: f32[b, s, 8]) {
  param %w: f32[8]
  param %u: f32[8]
"""

SQUARES = {"mul": "%q: f32[b, s, 8] = mul(%x, %x)", "pow": "%q: f32[b, s, 8] = pow(%x, 2.0:f32)"}
MEANS = {
    "mean": "%m: f32[b, s, 1] = reduce_mean(%q) {axes=(2,), keepdims=true}",
    "sum/n": "%t: f32[b, s, 1] = reduce_sum(%q) {axes=(2,), keepdims=true}\n %m: f32[b, s, 1] = div(%t, 8.0:f32)",
    "sum*1/n": "%t: f32[b, s, 1] = reduce_sum(%q) {axes=(2,), keepdims=true}\n %m: f32[b, s, 1] = mul(%t, 0.125:f32)",
}
ROOTS = {
    "rsqrt": "%r: f32[b, s, 1] = rsqrt(%v)\n %y: f32[b, s, 8] = mul(%x, %r)",
    "rsqrt first": "%r: f32[b, s, 1] = rsqrt(%v)\n %y: f32[b, s, 8] = mul(%r, %x)",
    "/ sqrt": "%r: f32[b, s, 1] = sqrt(%v)\n %y: f32[b, s, 8] = div(%x, %r)",
    "* 1/sqrt": "%r: f32[b, s, 1] = sqrt(%v)\n %o: f32[b, s, 1] = div(1.0:f32, %r)\n %y: f32[b, s, 8] = mul(%x, %o)",
    "pow": "%r: f32[b, s, 1] = pow(%v, -0.5:f32)\n %y: f32[b, s, 8] = mul(%x, %r)",
}
ADD = "%v: f32[b, s, 1] = add(%m, 0.01:f32)"


def rms(square: str = "mul", mean: str = "mean", root: str = "rsqrt", add: str = ADD, rest: str = "return %y\n}") -> str:
    return HEAD + "\n".join([SQUARES[square], MEANS[mean], add, ROOTS[root], rest])


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("root", ROOTS)
def test_spellings_of_rms_norm(square: str, mean: str, root: str) -> None:
    after = HEAD + "%y: f32[b, s, 8] = rms_norm(%x) {eps=0.01}\nreturn %y\n}"
    remarks = check_pass(FuseNorm(), rms(square, mean, root), after, DIMS)
    assert [str(r).splitlines()[0] for r in remarks] == ["applied: %y = rms_norm (@f)"]


WEIGHTED = [
    rms(rest="%z: f32[b, s, 8] = mul(%y, %w)\n return %z\n}"),
    rms(rest="%z: f32[b, s, 8] = mul(%w, %y)\n return %z\n}"),
    rms(root="/ sqrt", rest="%z: f32[b, s, 8] = mul(%w, %y)\n return %z\n}"),
    rms().replace("%y: f32[b, s, 8] = mul(%x, %r)", "%a: f32[b, s, 8] = mul(%r, %w)\n %z: f32[b, s, 8] = mul(%x, %a)"),
    rms().replace("%y: f32[b, s, 8] = mul(%x, %r)", "%a: f32[b, s, 8] = mul(%x, %w)\n %z: f32[b, s, 8] = mul(%a, %r)"),
]  # fmt: skip


@pytest.mark.parametrize("before", WEIGHTED)
def test_the_weight_joins_in_any_order(before: str) -> None:
    after = HEAD + "%z: f32[b, s, 8] = rms_norm(%x, %w) {eps=0.01}\nreturn %z\n}"
    check_pass(FuseNorm(), before.replace("return %y", "return %z"), after, DIMS)


def test_a_weight_plus_one_is_a_weight() -> None:
    rest = "%g: f32[8] = add(%w, 1.0:f32)\n %z: f32[b, s, 8] = mul(%y, %g)\n return %z\n}"
    after = HEAD + "%g: f32[8] = add(%w, 1.0:f32)\n %z: f32[b, s, 8] = rms_norm(%x, %g) {eps=0.01}\n return %z\n}"
    check_pass(FuseNorm(), rms(rest=rest), after, DIMS)


def layer(rest: str = "return %y\n}", center: str = "%c: f32[b, s, 8] = sub(%x, %a)") -> str:
    return (
        HEAD + "%a: f32[b, s, 1] = reduce_mean(%x) {axes=(2,), keepdims=true}\n" + center + "\n"
        "%q: f32[b, s, 8] = mul(%c, %c)\n" + MEANS["mean"] + "\n" + ADD + "\n"
        "%r: f32[b, s, 1] = rsqrt(%v)\n %y: f32[b, s, 8] = mul(%c, %r)\n" + rest
    )  # fmt: skip


def test_layer_norm_with_weight_and_bias() -> None:
    plain = HEAD + "%y: f32[b, s, 8] = layer_norm(%x) {eps=0.01}\n"
    check_pass(FuseNorm(), layer(), plain + "return %y\n}", DIMS)
    weight = "%z: f32[b, s, 8] = mul(%w, %y)\n"
    weighted = HEAD + "%z: f32[b, s, 8] = layer_norm(%x, %w) {eps=0.01}\n"
    check_pass(FuseNorm(), layer(weight + "return %z\n}"), weighted + "return %z\n}", DIMS)
    both = HEAD + "%o: f32[b, s, 8] = layer_norm(%x, %w, %u) {eps=0.01}\n return %o\n}"
    check_pass(FuseNorm(), layer(weight + "%o: f32[b, s, 8] = add(%z, %u)\n return %o\n}"), both, DIMS)
    residual = "%o: f32[b, s, 8] = add(%z, %x)\n return %o\n}"
    check_pass(FuseNorm(), layer(weight + residual), weighted + residual, DIMS)


def test_a_norm_of_something_centered_otherwise_is_an_rms_norm() -> None:
    center = "%c: f32[b, s, 8] = sub(%x, %w)"
    after = HEAD + "%c: f32[b, s, 8] = sub(%x, %w)\n %y: f32[b, s, 8] = rms_norm(%c) {eps=0.01}\n return %y\n}"
    before = layer(center=center).replace("%a: f32[b, s, 1] = reduce_mean(%x) {axes=(2,), keepdims=true}\n", "")
    check_pass(FuseNorm(), before, after, DIMS)


NARROW = """graph @f(%x: f16[b, s, 8]) {{
  param %w: {w}[8]
  %c: f32[b, s, 8] = cast(%x) {{dtype=f32}}
  %y: f32[b, s, 8] = rms_norm(%c) {{eps=0.01}}
  {rest}
  return %z
}}"""


def test_casts_around_a_norm_in_f32_go() -> None:
    after = "graph @f(%x: f16[b, s, 8]) {\n param %w: f16[8]\n %z: f16[b, s, 8] = rms_norm(%x, %w) {eps=0.01}\n return %z\n}"
    inside = "%d: f32[8] = cast(%w) {dtype=f32}\n %p: f32[b, s, 8] = mul(%y, %d)\n %z: f16[b, s, 8] = cast(%p) {dtype=f16}"
    check_pass(FuseNorm(), NARROW.format(w="f16", rest=inside), after, DIMS)
    outside = "%n: f16[b, s, 8] = cast(%y) {dtype=f16}\n %z: f16[b, s, 8] = mul(%w, %n)"
    check_pass(FuseNorm(), NARROW.format(w="f16", rest=outside), after, DIMS, rtol=2e-3)  # rounded once instead of twice


def test_a_wide_weight_is_not_narrowed() -> None:
    rest = "%p: f32[b, s, 8] = mul(%y, %w)\n %z: f16[b, s, 8] = cast(%p) {dtype=f16}"
    after = "%p: f32[b, s, 8] = rms_norm(%c, %w) {eps=0.01}\n %z: f16[b, s, 8] = cast(%p) {dtype=f16}"
    text = NARROW.format(w="f32", rest=after).replace("  %y: f32[b, s, 8] = rms_norm(%c) {eps=0.01}\n", "")
    check_pass(FuseNorm(), NARROW.format(w="f32", rest=rest), text, DIMS)


def test_casts_that_do_something_stay() -> None:
    check_untouched(FuseNorm(), NARROW.format(w="f32", rest="%z: bf16[b, s, 8] = cast(%y) {dtype=bf16}"))
    back = NARROW.format(w="f32", rest="%z: f16[b, s, 8] = cast(%y) {dtype=f16}")
    check_untouched(FuseNorm(), back.replace("f32", "f64"))
    check_untouched(FuseNorm(), back.replace("f16", "f64"))
    other = "%d: f32[8] = cast(%w) {dtype=f32}\n %z: f16[b, s, 8] = cast(%y) {dtype=f16}"
    text = NARROW.format(w="bf16", rest=other).replace("  %y: f32[b, s, 8] = rms_norm(%c) {eps=0.01}\n", "")
    check_untouched(FuseNorm(), text.replace("%z:", "%y: f32[b, s, 8] = rms_norm(%c, %d) {eps=0.01}\n %z:"))


NEAR = {
    "another axis": (rms().replace("(2,)", "(1,)").replace("f32[b, s, 1]", "f32[b, 1, 8]"), "axes is (1,)"),
    "two axes": (rms().replace("(2,)", "(1, 2)").replace("f32[b, s, 1]", "f32[b, 1, 1]"), "axes is (1, 2)"),
    "eps outside": (
        rms(add="%v: f32[b, s, 1] = rsqrt(%m)").replace("%r: f32[b, s, 1] = rsqrt(%v)", "%r: f32[b, s, 1] = add(%v, 0.01:f32)"),
        "%r is add, not rsqrt",
    ),
    "eps no number": (rms(add="%v: f32[b, s, 1] = add(%m, %m)"), "no constant number"),
    "a sum": (rms().replace("reduce_mean", "reduce_sum"), "%m is reduce_sum, not reduce_mean"),
    "another count": (rms(mean="sum/n").replace("8.0:f32", "7.0:f32"), "%m is div, not reduce_mean"),
    "another power": (rms("pow").replace("2.0:f32", "3.0:f32"), "is 3, not 2"),
    "squares of another value": (rms().replace("mul(%x, %x)", "mul(%x, %w)"), "are not the same value"),
    "used elsewhere": (rms(rest="return %y, %m\n}"), "%m is also an output of the graph"),
}  # fmt: skip


@pytest.mark.parametrize("near", NEAR)
def test_near_misses(near: str) -> None:
    text, reason = NEAR[near]
    check_untouched(FuseNorm(), text, reason)


@pytest.mark.parametrize("norm", ["rms_norm(%x) {eps=0.01}", "layer_norm(%x) {eps=0.01}"])
def test_what_is_no_weight_stays_outside(norm: str) -> None:
    for other in ("%x", "%k"):
        text = HEAD + f"param %k: f32[1]\n %y: f32[b, s, 8] = {norm}\n %z: f32[b, s, 8] = mul(%y, {other})\n return %z\n}}"
        check_untouched(FuseNorm(), text)


def test_a_matrix_is_no_weight() -> None:
    head = "graph @f(%x: f32[b, 8, 8]) {\n param %w: f32[8, 8]\n "
    check_untouched(FuseNorm(), head + "%y: f32[b, 8, 8] = rms_norm(%x)\n %z: f32[b, 8, 8] = mul(%y, %w)\n return %z\n}")


def test_sums_that_are_no_means() -> None:
    text = "graph @f(%x: f32[b, d]) {\n %t: f32[b] = reduce_sum(%x) {axes=(1,), keepdims=false}\n"
    text += "%y: f32[b] = div(%t, 8.0:f32)\n"
    check_untouched(FuseNorm(), text + "return %y\n}")
    check_untouched(FuseNorm(), text.replace("div(%t, 8.0", "mul(%t, 0.0").replace("d]", "8]") + "return %y\n}")
    whole = text.replace("d]", "8]").replace("f32", "i64").replace("8.0:", "8:") + "return %y\n}"
    check_untouched(FuseNorm(), whole)  # a quotient of integers is rounded towards 0


@pytest.mark.parametrize("between, said", [(0, True), (1, True), (4, True), (5, False), (6, False), (9, False)])
def test_how_far_from_a_root_a_mean_is_looked_for(between: int, said: bool) -> None:
    steps = "".join(f"  %a{i + 1}: f32[b] = exp(%a{i})\n" for i in range(between))
    text = "graph @f(%x: f32[b, 8]) {\n  %a0: f32[b] = reduce_mean(%x) {axes=(1,)}\n" + steps + f"  return %a{between}\n}}"
    assert _holds_mean(parse(text).outputs[0]) is said


def test_a_norm_that_is_also_read_without_its_weight() -> None:
    check_untouched(FuseNorm(), HEAD + "%y: f32[b, s, 8] = rms_norm(%x)\n %z: f32[b, s, 8] = mul(%y, %w)\n return %y, %z\n}")


class Norms(nn.Module):
    def __init__(self, dtype: str) -> None:
        self.a, self.b = nn.RMSNorm(8, offset=1.0, dtype=dtype), nn.LayerNorm(8, dtype=dtype)
        self.c = nn.LayerNorm(8, bias=False, dtype=dtype)

    def __call__(self, x: nn.Tensor) -> nn.Tensor:
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("dtype, tol", [("f32", 1e-5), ("f16", 4e-3), ("bf16", 3e-2)])
def test_the_layers_of_the_frontend(dtype: str, tol: float) -> None:
    graph = nn.trace(Norms(dtype), {"x": f"{dtype}[b, s, 8]"})["forward"]
    program = random_program(graph)
    PassManager([Cleanup(), FuseNorm()], check=InterpreterCheck(DIMS, rtol=tol, atol=tol)).run(program)
    assert [n.op.name for n in graph.nodes if n.op.name != "constant"] == ["add", "rms_norm", "layer_norm", "layer_norm"]


@pytest.mark.parametrize("old, new", [
    ("", ""),
    ("%m: f32[b, s, 1] = maximum(%t, 1e-12:f32)\n  %r: f32[b, s, 1] = rsqrt(%m)",
     "%l: f32[b, s, 1] = sqrt(%t)\n  %r: f32[b, s, 1] = maximum(%l, 1e-12:f32)"),
    ("%t: f32[b, s, 1] = reduce_sum(%q) {axes=(2,), keepdims=true}\n  %m: f32[b, s, 1] = maximum(%t, 1e-12:f32)\n"
     "  %r: f32[b, s, 1] = rsqrt(%m)", "%t: f32[b, s, 4] = add(%q, 2.0:f32)\n  %r: f32[b, s, 4] = rsqrt(%t)"),
])  # fmt: skip
def test_the_length_of_a_vector_is_not_reported(old: str, new: str) -> None:
    """x / max(|x|, eps), as nn.normalize and torch's have it, is no norm that was missed, nor is x / sqrt(x * x + 2)."""
    text = """graph @f(%x: f32[b, s, 4]) {
  %q: f32[b, s, 4] = mul(%x, %x)
  %t: f32[b, s, 1] = reduce_sum(%q) {axes=(2,), keepdims=true}
  %m: f32[b, s, 1] = maximum(%t, 1e-12:f32)
  %r: f32[b, s, 1] = rsqrt(%m)
  %y: f32[b, s, 4] = mul(%x, %r)
  return %y
}"""
    assert old in text
    text = text.replace(old, new) if old else text
    assert not PassManager([FuseNorm()]).run(random_program(text)).remarks("missed")


REPEATED = """graph @f(%x: f32[b, 2, s, 8]) {
  param %w: f32[8]
  %one: f32[b, 2, 1, s, 8] = reshape(%x) {shape=(b, 2, 1, s, 8)}
  %each: f32[b, 2, 3, s, 8] = broadcast_to(%one) {shape=(b, 2, 3, s, 8)}
  %z: f32[b, 6, s, 8] = reshape(%each) {shape=(b, 6, s, 8)}
  %y: f32[b, 6, s, 8] = rms_norm(%z, %w) {eps=0.01}
  return %y
}"""


def test_repeated_heads_are_normalized_once() -> None:
    check_pass(FuseNorm(), REPEATED, """graph @f(%x: f32[b, 2, s, 8]) {
  param %w: f32[8]
  %one: f32[b, 2, 1, s, 8] = reshape(%x) {shape=(b, 2, 1, s, 8)}
  %rms_norm: f32[b, 2, 1, s, 8] = rms_norm(%one, %w) {eps=0.01}
  %broadcast_to: f32[b, 2, 3, s, 8] = broadcast_to(%rms_norm) {shape=(b, 2, 3, s, 8)}
  %y: f32[b, 6, s, 8] = reshape(%broadcast_to) {shape=(b, 6, s, 8)}
  return %y
}
""", DIMS)  # fmt: skip


def test_repeated_features_stay() -> None:
    before = REPEATED.replace("%x: f32[b, 2, s, 8]", "%x: f32[b, 2, s, 1]").replace("(b, 2, 1, s, 8)", "(b, 2, 1, s, 1)")
    before = before.replace("%one: f32[b, 2, 1, s, 8]", "%one: f32[b, 2, 1, s, 1]")
    check_untouched(FuseNorm(), before)


def test_one_head_of_keys_repeated_and_then_normalized_is_kept_once() -> None:
    """A square of what is repeated stays one: the norm is found, and goes before the repetition."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            self.embed, self.head = nn.Embedding(11, 8, std=1.0), nn.Linear(8, 11)

        def __call__(self, tokens: nn.Tensor) -> nn.Tensor:
            x = self.embed(tokens)
            k = nn.sin(x[..., :4]).heads(1).swap(1, 2).broadcast_to(x.shape[0], 2, x.shape[1], 4)
            k = k * nn.rsqrt((k * k).mean(-1, keepdims=True) + 1e-6)
            s = nn.where(nn.causal(nn.positions(tokens)), x.heads(2).swap(1, 2) @ k.T * 0.5, -float("inf"))
            return self.head((nn.softmax(s) @ k).swap(1, 2).merge())

    program, _ = ws.optimize(nn.trace(Decoder(), {"tokens": "i64[b, s]"}, outputs=["logits"]), chunk=8)
    kept = {str(v.type) for v in program["decode"].inputs if v.name in program["decode"].output_names}
    assert kept == {"f32[b, c, 1, 4]"}
