"""Dropout leaves what is evaluated and served, with the keys that nothing else reads."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from wasat.frontend import nn
from wasat.ir import evaluate
from wasat.passes import Inference, PassManager, Remark

from wasat.testing import check_pass, check_untouched, feed, random_program

BEFORE = """graph @f(%x: f32[n, 4], %key: u32[2]) {
  param %w: f32[4, 4]
  %a: f32[n, 4] = dropout(%x, %key) {rate=0.5}
  %y: f32[n, 4] = linear(%a, %w)
  %bits: u32[2, 2] = random_bits(%key) {shape=(2, 2)}
  %row: u32[1, 2] = slice(%bits) {starts=(1, 0), stops=(2, 2), steps=(1, 1)}
  %own: u32[2] = reshape(%row) {shape=(2,)}
  %d: f32[n, 4] = dropout(%y, %own) {rate=0.25}
  return %d
}"""
AFTER = """graph @f(%x: f32[n, 4]) {
  param %w: f32[4, 4]
  %y: f32[n, 4] = linear(%x, %w)
  return d=%y
}"""


def check(before: str, after: str) -> list[Remark]:
    """Of dropouts of rate 0, the results are the same; the text is this one at any rate."""
    plain = random_program(re.sub(r"rate=[\d.]+", "rate=0.0", before))
    served = random_program(str(plain))
    PassManager([Inference()]).run(served)
    for sizes in ({"n": 1}, {"n": 3}):
        inputs = feed(plain["f"], sizes)
        given = {v.name: inputs[v.name] for v in served["f"].inputs}
        params = {k: np.asarray(v.load()) for k, v in plain.params.items()}
        for a, b in zip(evaluate(served["f"], given, params), evaluate(plain["f"], inputs, params), strict=True):
            assert_array_equal(a, b)
    return check_pass(Inference(), before, after, dims=[{"n": 2}])


def test_dropout_goes_with_its_key_and_what_was_made_of_it() -> None:
    remarks = check(BEFORE, AFTER)
    assert [r.message for r in remarks] == ["%a is %x", "%d is %y", "input %key was a key of dropout alone, and is gone"]


STAYS = {
    "read elsewhere": (
        """graph @f(%x: f32[n], %key: u32[2]) {
  %a: f32[n] = dropout(%x, %key) {rate=0.5}
  %noise: f32[n] = random_normal(%key) {shape=(n,)}
  %y: f32[n] = add(%a, %noise)
  return %y
}""",
        """graph @f(%x: f32[n], %key: u32[2]) {
  %noise: f32[n] = random_normal(%key) {shape=(n,)}
  %y: f32[n] = add(%x, %noise)
  return %y
}""",
        "input %key stays: it is not a key of dropout alone, but read by %noise",
    ),
    "returned": (
        "graph @f(%x: f32[n], %key: u32[2]) {\n  %y: f32[n] = dropout(%x, %key) {rate=0.5}\n  return %y, %key\n}",
        "graph @f(%x: f32[n], %key: u32[2]) {\n  return y=%x, %key\n}",
        "input %key stays: it is not a key of dropout alone, but read by the output",
    ),
    "read by nothing at all, and numbers that a key was made of": (
        """graph @f(%x: f32[n], %unread: u32[2], %seed: u32[1], %step: u32[1]) {
  %key: u32[2] = concat(%seed, %step) {axis=0}
  %y: f32[n] = dropout(%x, %key) {rate=0.5}
  %z: f32[n] = neg(%y)
  return %z
}""",
        """graph @f(%x: f32[n], %unread: u32[2], %seed: u32[1], %step: u32[1]) {
  %z: f32[n] = neg(%x)
  return %z
}""",
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_inputs_that_stay(case: str) -> None:
    before, after, reason = STAYS[case]
    missed = [r.message for r in check(before, after) if r.kind == "missed"]
    assert len(missed) == (reason is not None)
    assert reason is None or missed[0].startswith(reason)


def test_without_dropout_nothing_changes() -> None:
    drawn = "graph @f(%x: f32[n], %key: u32[2]) {\n  %u: f32[n] = random_uniform(%key) {shape=(n,)}\n  return %u, %x\n}"
    check_untouched(Inference(), drawn)
    check_untouched(Inference(), "graph @f(%x: f32[n], %key: u32[2]) {\n  %y: f32[n] = neg(%x)\n  return %y\n}")
    check_untouched(Inference(), re.sub(r"dropout\((%\w), %\w+\) {rate=0.5}", r"neg(\1)", LOOP))


LOOP = """graph @f(%x: f32[3], %rows: f32[n, 3], %key: u32[2], %other: u32[2]) {
  %keys: u32[n, 2] = random_bits(%other) {shape=(n, 2)}
  %last: f32[3], %each: f32[n, 3] = scan(%x, %rows, %keys, %key) {body=graph @turn(
  %h: f32[3], %row: f32[3], %own: u32[2], %k: u32[2]) {
    %a: f32[3] = dropout(%h, %k) {rate=0.5}
    %b: f32[3] = add(%a, %row)
    %c: f32[3] = dropout(%b, %own) {rate=0.5}
    %d: f32[3] = tanh(%c)
    return %d, %b
  }, carries=1, slices=2}
  return %last, %each
}"""
LOOP_AFTER = """graph @f(%x: f32[3], %rows: f32[n, 3]) {
  %last: f32[3], %each: f32[n, 3] = scan(%x, %rows) {body=graph @turn(%h: f32[3], %row: f32[3]) {
    %b: f32[3] = add(%h, %row)
    %d: f32[3] = tanh(%b)
    return %d, %b
  }, carries=1, slices=1}
  return %last, %each
}"""


def test_loops_lose_keys_given_once_and_for_each_turn() -> None:
    check(LOOP, LOOP_AFTER)


def test_a_loop_over_keys_alone_keeps_its_length() -> None:
    before = """graph @f(%x: f32[3], %key: u32[2]) {
  %keys: u32[5, 2] = random_bits(%key) {shape=(5, 2)}
  %last: f32[3] = scan(%x, %keys) {body=graph @turn(%h: f32[3], %k: u32[2]) {
    %a: f32[3] = dropout(%h, %k) {rate=0.5}
    %b: f32[3] = exp(%a)
    return %b
  }, carries=1, slices=1}
  return %last
}"""
    after = """graph @f(%x: f32[3]) {
  %last: f32[3] = scan(%x) {body=graph @turn(%h: f32[3]) {
    %b: f32[3] = exp(%h)
    return %b
  }, carries=1, slices=0, length=5}
  return %last
}"""
    check(before, after)


def test_a_loop_in_a_loop() -> None:
    def text(drop: str, key: str, made: str) -> str:
        return f"""graph @f(%x: f32[3]{key.replace("k", "key")}) {{
  %last: f32[3] = scan(%x{made.replace("k", "key")}) {{body=graph @outer(%h: f32[3]{key}) {{
    %g: f32[3] = scan(%h{made}) {{body=graph @inner(%h: f32[3]{key}) {{
      {drop}%b: f32[3] = exp({"%a" if drop else "%h"})
      return %b
    }}, carries=1, slices=0, length=2}}
    return %g
  }}, carries=1, slices=0, length=3}}
  return %last
}}"""

    check(text("%a: f32[3] = dropout(%h, %k) {rate=0.5}\n      ", ", %k: u32[2]", ", %k"), text("", "", ""))


def test_branches_lose_keys() -> None:
    """But for one that a branch reads otherwise."""

    def text(drop: str, keys: str, given: str, more: str) -> str:
        return f"""graph @f(%c: bool[], %x: f32[3]{keys}) {{
  %y: f32[3] = cond(%c, %x{given}) {{then=graph @yes(%x: f32[3]{keys}) {{
    {drop}%b: f32[3] = exp({"%a" if drop else "%x"})
    return %b
  }}, otherwise=graph @no(%x: f32[3]{keys}) {{
    {more}return %x
  }}}}
  return %y
}}"""

    drop, key, other = "%a: f32[3] = dropout(%x, %key) {rate=0.5}\n    ", ", %key: u32[2]", ", %other: u32[2]"
    noise = "%noise: f32[3] = random_normal(%other) {shape=(3,)}\n    "
    check(text(drop, key + other, ", %key, %other", noise), text("", other, ", %other", noise))


CARRIED = """graph @f(%x: f32[3], %key: u32[2]) {
  %last: f32[3], %k: u32[2] = scan(%x, %key) {body=graph @turn(%h: f32[3], %k: u32[2]) {
    %a: f32[3] = dropout(%h, %k) {rate=0.5}
    %b: f32[3] = exp(%a)
    %next: u32[2] = random_bits(%k) {shape=(2,)}
    return %b, %next
  }, carries=2, slices=0, length=4}
  return %last
}"""


@pytest.mark.parametrize("edit", [lambda t: t, lambda t: t.replace("slices=0, length=4", "slices=0, length=0")])
def test_a_key_that_is_carried_stays(edit: Callable[[str], str]) -> None:
    before = edit(CARRIED)
    after = before.replace("    %a: f32[3] = dropout(%h, %k) {rate=0.5}\n", "").replace("exp(%a)", "exp(%h)")
    missed = [r.message for r in check(before, after) if r.kind == "missed"]
    assert len(missed) == 1
    assert missed[0].startswith("input %key stays: it is not a key of dropout alone, but read by %last: f32[3], %k")


def test_results_are_those_of_the_model_that_was_not_traced_for_training() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            self.up, self.down, self.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout(0.3)

        def __call__(self, x: nn.Tensor, key: nn.Tensor) -> nn.Tensor:
            y = self.drop(self.down(self.drop(nn.silu(self.up(x)), key)), key)
            return nn.scan(lambda h: (self.drop(h * y, key), None), x, length=3)[0]

    types = {"x": "f32[n, 4]", "key": "u32[2]"}
    served = nn.trace(Model(), types, training=True)
    PassManager([Inference()]).run(served)
    g, want = served["forward"], nn.trace(Model(), types)["forward"]
    assert [v.name for v in g.inputs] == ["x"]
    params = {k: np.asarray(v.load()) for k, v in served.params.items()}
    for n in (1, 5):
        inputs = feed(want, {"n": n})
        for a, b in zip(evaluate(g, {"x": inputs["x"]}, params), evaluate(want, inputs, params), strict=True):
            assert_array_equal(a, b)


def test_every_graph_of_a_program() -> None:
    program = random_program(BEFORE + "\n" + BEFORE.replace("@f", "@g"))
    report = PassManager([Inference()]).run(program)
    assert report.steps[0].modified
    assert str(program) == f"{AFTER}\n\n{AFTER.replace('@f', '@g')}\n"
