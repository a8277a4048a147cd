"""The pattern engine: what it matches, what it refuses, and what it says about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from wasat.ir import Builder, Value, parse
from wasat.passes import FuseActivations, PassManager
from wasat.passes.core import PassError, Remarks
from wasat.passes.pattern import Match, Mismatch, Pattern, Rewrite, Rewrites, Tracer, Var, last_axis, number_of

from wasat.testing import check_pass, check_untouched, random_program

DIMS = [{"n": 1}, {"n": 3}]


class Silu(Rewrite):
    """x * sigmoid(x) -> silu(x)"""

    name, landmark = "silu", "sigmoid"

    def pattern(self, p: Tracer, x: Var) -> Pattern:
        return p.mul(x, p.sigmoid(x))

    def build(self, b: Builder, m: Match) -> Value:
        return b.silu(m["x"])


def graph(body: str, result: str = "%y", inputs: str = "%x: f32[n, 4], %z: f32[n, 4]") -> str:
    return f"graph @g({inputs}) {{\n{body}\n  return {result}\n}}\n"


@pytest.mark.parametrize("operands", ["%x, %s", "%s, %x"])
def test_both_orders_of_a_commutative_operation(operands: str) -> None:
    before = graph(f"%s: f32[n, 4] = sigmoid(%x)\n %y: f32[n, 4] = mul({operands})", "%y")
    remarks = check_pass(Silu(), before, graph("%y: f32[n, 4] = silu(%x)"), DIMS)
    assert [r.message for r in remarks] == ["%y = silu"]


def test_the_name_and_the_line_stay() -> None:
    g = parse(graph("%s: f32[n, 4] = sigmoid(%x)\n %y: f32[n, 4] = mul(%x, %s)\n %t: f32[n, 4] = neg(%y)", "%t"), "model.txt")
    for node in g.nodes:
        node.loc = None if node.op.name == "sigmoid" else node.loc
    mul = g.last.prev  # type: ignore[union-attr]
    loc = mul.loc  # type: ignore[union-attr]
    Silu().run_graph(g, Remarks())
    assert g.first is not None
    assert (g.first.op.name, g.first.output.name, g.first.loc) == ("silu", "y", loc)


def test_variables_match_one_value() -> None:
    text = graph("%s: f32[n, 4] = sigmoid(%x)\n %y: f32[n, 4] = mul(%z, %s)")
    check_untouched(Silu(), text, "%x and %z are not the same value")


@pytest.mark.parametrize("result, reason", [("%y, %s", "%s is also an output"), ("%y, %t", "%s is also used outside")])
def test_inner_values_used_elsewhere(result: str, reason: str) -> None:
    body = "%s: f32[n, 4] = sigmoid(%x)\n %y: f32[n, 4] = mul(%x, %s)\n"
    if "%t" in result:
        body += "%t: f32[n, 4] = neg(%s)\n"
    check_untouched(Silu(), graph(body, result), reason)


def test_every_match_in_one_sweep() -> None:
    body, want = "", ""
    x = "x"
    for i in range(3):
        body += f"%s{i}: f32[n, 4] = sigmoid(%{x})\n %y{i}: f32[n, 4] = mul(%{x}, %s{i})\n"
        want += f"%y{i}: f32[n, 4] = silu(%{x})\n"
        x = f"y{i}"
    check_pass(Silu(), graph(body, "%y2"), graph(want, "%y2"), DIMS)


@dataclass(frozen=True)
class Rule(Rewrite):
    """A rule made of two functions."""

    of: Any
    to: Any
    name = "rule"
    landmark = "exp"

    def pattern(self, p: Tracer, x: Var, y: Var, a: Var) -> Pattern:  # type: ignore[override]
        return self.of(p, x, y, a)  # type: ignore[no-any-return]

    def build(self, b: Builder, m: Match) -> Value:
        return self.to(b, m)  # type: ignore[no-any-return]


def test_numbers_are_captured_and_compared() -> None:
    twice = Rule(lambda p, x, y, a: p.mul(p.exp(x), 2.0), lambda b, m: b.neg(m["x"]))
    text = graph("%e: f32[n, 4] = exp(%x)\n %y: f32[n, 4] = mul(%e, 2.5:f32)")
    check_untouched(twice, text, "is 2.5, not 2")
    check_untouched(twice, text.replace("2.5:f32", "%z"), "%z is no constant number")
    keep = Rule(lambda p, x, y, a: p.mul(p.exp(x), p.number(a)), lambda b, m: b.exp(b.add(m["x"], float(np.log(m["a"])))))
    check_pass(keep, text, graph("%add: f32[n, 4] = add(%x, 0.91629076:f32)\n %y: f32[n, 4] = exp(%add)"), DIMS)


def test_one_number_is_one_number() -> None:
    def of(p: Any, x: Any, y: Any, a: Any) -> Any:
        a = p.number(a)
        return p.mul(p.exp(p.mul(x, a)), a)

    rule = Rule(of, lambda b, m: b.neg(m["x"]))
    body = "%a: f32[n, 4] = mul(%x, 2.0:f32)\n %e: f32[n, 4] = exp(%a)\n %y: f32[n, 4] = mul(%e, 3.0:f32)"
    check_untouched(rule, graph(body), "is 3, not 2 as elsewhere")


def test_attributes_by_value_and_by_predicate() -> None:
    rule = Rule(lambda p, x, y, a: p.log(p.exp(p.reduce_sum(x, axes=last_axis, keepdims=False))), lambda b, m: b.neg(m["x"]))
    body = "%r: f32[n, 1] = reduce_sum(%x) {{axes=({}), keepdims={}}}\n %e: f32[n, 1] = exp(%r)\n %y: f32[n, 1] = log(%e)"
    check_untouched(rule, graph(body.format("1,", "true")), "keepdims is True")
    body = body.replace("f32[n, 1]", "f32[4]")
    check_untouched(rule, graph(body.format("0,", "false")), "axes is (0,)")


def test_another_operation_and_another_number_of_operands() -> None:
    rule = Rule(lambda p, x, y, a: p.neg(p.exp(p.rms_norm(x))), lambda b, m: m["x"])
    body = "%r: f32[n, 4] = rms_norm(%x, %w)\n %e: f32[n, 4] = exp(%r)\n %y: f32[n, 4] = neg(%e)"
    check_untouched(rule, graph("param %w: f32[4]\n" + body), "expected 1 operands")
    check_untouched(rule, graph(body.replace("rms_norm(%x, %w)", "abs(%x)")), "%r is abs, not rms_norm")
    direct = "%e: f32[n, 4] = exp(%x)\n %y: f32[n, 4] = neg(%e)"
    check_untouched(rule, graph(direct), "%x is an input, not rms_norm")


def test_a_landmark_just_beyond_the_match_is_reported() -> None:
    rule = Rule(lambda p, x, y, a: p.neg(p.exp(x)), lambda b, m: m["x"])
    text = graph("%e: f32[n, 4] = exp(%x)\n %t: f32[n, 4] = abs(%e)\n %y: f32[n, 4] = neg(%t)")
    check_untouched(rule, text, "%t is abs, not exp")


def test_the_replacement_must_have_the_type() -> None:
    rule = Rule(lambda p, x, y, a: p.neg(p.exp(x)), lambda b, m: b.reduce_sum(b.abs(m["x"]), axes=(0,), keepdims=False))
    check_untouched(rule, graph("%e: f32[n, 4] = exp(%x)\n %y: f32[n, 4] = neg(%e)"), "would be f32[4], not f32[n, 4]")


def test_a_refusal_leaves_nothing_behind_and_tries_the_next_way() -> None:
    def to(b: Builder, m: Match) -> Value:
        made = b.abs(b.neg(m["x"]))
        if m["x"].name == "x":
            raise Mismatch("not of x")
        return made  # type: ignore[no-any-return]

    rule = Rule(lambda p, x, y, a: p.exp(p.add(x, y)), to)
    body = "%s: f32[n, 4] = add(%x, {})\n %y: f32[n, 4] = exp(%s)"
    g = parse(graph(body.format("%z")))
    assert rule.run_graph(g, Remarks())
    assert [n.op.name for n in g.nodes] == ["neg", "abs"]
    assert g.first is not None
    assert g.first.inputs[0].name == "z"
    check_untouched(rule, graph(body.format("%x")), "not of x")


def test_alternatives_shared_and_named() -> None:
    def of(p: Any, x: Any, y: Any, a: Any) -> Any:
        table = p.shared(p.named("table", p.either(p.cos(x), p.sin(x))))
        return p.either(p.neg(p.mul(p.maybe_cast(table), y)), p.abs(p.mul(table, y)))

    rule = Rule(of, lambda b, m: b.add(m["y"], b.neg(m["table"])))
    body = "%t: f32[n, 4] = sin(%x)\n %m: f32[n, 4] = mul(%z, %t)\n %y: f32[n, 4] = neg(%m)\n"
    g = parse(graph(body, "%y, %t"))
    assert rule.run_graph(g, Remarks())
    assert [n.op.name for n in g.nodes] == ["sin", "neg", "add"]
    g = parse(graph(body.replace("neg", "abs").replace("sin", "cos"), "%y, %t"))
    assert rule.run_graph(g, Remarks())
    assert [n.op.name for n in g.nodes] == ["cos", "neg", "add"]


def test_rules_together_report_what_stands_in_the_end() -> None:
    class Negated(Rewrite):
        landmark = "sigmoid"

        def pattern(self, p: Tracer, x: Var) -> Pattern:
            return p.neg(p.silu(x))

        def build(self, b: Builder, m: Match) -> Value:
            return b.silu(b.abs(m["x"]))

    class Both(Rewrites):
        name = "both"
        rules = (Silu(), Negated())

    body = "%s: f32[n, 4] = sigmoid(%x)\n %m: f32[n, 4] = mul(%x, %s)\n %y: f32[n, 4] = neg(%m)\n"
    body += "%s2: f32[n, 4] = sigmoid(%z)\n %y2: f32[n, 4] = mul(%x, %s2)"
    program = random_program(graph(body, "%y, %y2"))
    remarks = Remarks()
    assert Both().run(program, remarks)
    assert [r.message for r in remarks.of("applied")] == ["%y = silu"]
    (missed,) = remarks.of("missed")
    assert "%s2: f32[n, 4] = sigmoid(%z): %z and %x are not the same value" in missed.message


@pytest.mark.parametrize(
    "array, want",
    [
        (np.float32(1e-6), 1e-6), (np.full((2, 2), 3, np.int64), 3.0), (np.array([1.0, 2.0], np.float32), None),
        (np.float32(-0.0), None), (np.float32(np.nan), None), (np.zeros((0,), np.float32), None),
        (np.float16(0.1), float(np.float16(0.1))),
    ],
)  # fmt: skip
def test_number_of(array: Any, want: float | None) -> None:
    g = parse("graph @g(%x: f32[1]) {\n return %x\n}")
    assert number_of(Builder(g).constant(array)) == want
    assert number_of(g.inputs[0]) is None


def test_a_misspelt_attribute() -> None:
    with pytest.raises(PassError, match="pattern: softmax has no attribute axes; it has axis"):
        Tracer().softmax(Var("x"), axes=1)


def test_a_root_with_two_outputs_is_no_match() -> None:
    class Top(Rewrite):
        """top_k(x) -> x"""

        name = "top"

        def pattern(self, p: Tracer, x: Var) -> Pattern:
            return p.top_k(x)

        def build(self, b: Builder, m: Match) -> Value:
            raise AssertionError("there is no value that stands for both")

    check_untouched(Top(), "graph @f(%x: f32[4]) {\n  %v: f32[2], %i: i64[2] = top_k(%x) {k=2}\n  return %v, %i\n}")


def test_numbers_in_half_precision_are_these_numbers() -> None:
    text = "graph @f(%x: f16[2]) {{\n %e: f16[2] = exp(%x)\n %o: f16[2] = add(%e, {}:f16)\n"
    text += " %y: f16[2] = log(%o)\n return %y\n}}"
    for number, want in (("1.0", True), ("1.001", False)):
        program = random_program(text.format(number))
        PassManager([FuseActivations()]).run(program)
        assert (program["f"].count("softplus") == 1) == want
