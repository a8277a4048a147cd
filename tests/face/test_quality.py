"""KL divergence, same top token and perplexity, against sums written out; what a text can and cannot be fed to."""

import math

import numpy as np
import pytest
from wasat.ir import WasatError, parse_program

from wasat.quality import (
    bits,
    dense,
    log_probabilities,
    log_softmax,
    quality,
    text_ids,
    tokenizer_of,
    tokens_name,
    windows_of,
)
from wasat.testing import random_program

BASE = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
OTHER = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]]))

MODEL = """
graph @forward(%tokens: i64[b, s]) {
  param %table: f32[11, 4]
  param %head: f32[4, 11]
  %x: f32[b, s, 4] = embedding(%table, %tokens)
  %logits: f32[b, s, 11] = matmul(%x, %head)
  return %logits
}
"""


def test_numbers_are_those_of_the_definitions():
    ids = np.array([0, 1, 2])
    q = quality([BASE], [OTHER], [ids])
    first = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    last = 0.2 * math.log(0.2 / 0.6) + 0.6 * math.log(0.6 / 0.2)
    assert q.tokens == 3
    assert q.kl == pytest.approx((first + 0 + last) / 3, rel=1e-12)
    assert q.kl_99 == pytest.approx(max(first, last), rel=1e-12)
    assert q.same_top == pytest.approx(1 / 3)
    assert q.perplexity == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.1)) / 2), rel=1e-12)
    assert q.base_perplexity == pytest.approx(math.exp(-(math.log(0.25) + math.log(0.1)) / 2), rel=1e-12)


def test_direction_of_the_divergence():
    a, b = np.log(np.array([[0.9, 0.1]])), np.log(np.array([[0.5, 0.5]]))
    there = quality([np.repeat(a, 2, 0)], [np.repeat(b, 2, 0)], [np.array([0, 1])])
    assert there.kl == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-12)


def test_a_token_that_one_side_holds_impossible():
    with np.errstate(divide="ignore"):
        sure, unsure = (np.log(np.array([p] * 2)) for p in ([0.5, 0.5, 0.0], [0.25, 0.25, 0.5]))
    ids = np.array([0, 1])
    assert quality([sure], [unsure], [ids]).kl == pytest.approx(math.log(2))
    assert quality([unsure], [sure], [ids]).kl == math.inf


def test_sides_of_other_sizes_are_refused():
    with pytest.raises(WasatError, match=r"window 1: the sides give log-probabilities \[3, 3\] and \[3, 2\]"):
        quality([BASE], [OTHER[:, :2]], [np.arange(3)])
    with pytest.raises(ValueError):
        quality([BASE], [OTHER], [np.arange(3)] * 2)


def test_windows_of_a_text():
    assert [w.tolist() for w in windows_of(range(7), 3)] == [[0, 1, 2], [3, 4, 5]]  # one token predicts nothing
    assert [w.tolist() for w in windows_of(range(8), 3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_long_windows_are_read_in_pieces():
    rng = np.random.default_rng(0)
    b, x = (log_softmax(rng.standard_normal((77, 5))) for _ in range(2))
    assert quality([b], [x], [rng.integers(0, 5, 77)]).kl == pytest.approx((np.exp(b) * (b - x)).sum(-1).mean(), rel=1e-12)


def test_a_program_says_what_the_interpreter_says():
    program = random_program(MODEL)
    ids = np.array([3, 1, 4, 1, 5])
    table, head = program.load("table"), program.load("head")
    [found] = log_probabilities(program, [ids])
    want = table[ids].astype(np.float64) @ head
    np.testing.assert_allclose(found, want - np.log(np.exp(want).sum(-1, keepdims=True)), atol=1e-5)
    assert bits(program) == 2 * 44 * 32


@pytest.mark.parametrize(
    "text", [
        MODEL.replace("return %logits", "return scores=%logits"),
        "graph @forward(%x: f32[b, s]) {\n  return logits=%x\n}",
        "graph @forward(%tokens: i64[b, s], %mask: f32[b, s]) {\n  return logits=%mask\n}",
        MODEL.replace("@forward", "@other"),
    ],
)  # fmt: skip
def test_what_takes_no_text_is_refused(text):
    with pytest.raises(WasatError, match="gives logits; this one"):
        tokens_name(parse_program(text))


def test_a_model_without_a_tokenizer():
    with pytest.raises(WasatError, match="without a tokenizer"):
        text_ids(random_program(MODEL), "text")


def test_dense_is_what_the_quantized_weights_say():
    stored = MODEL.replace("%head: f32[4, 11]", "%q: int4b32f16[11, 4]").replace("matmul(%x, %head)", "linear(%x, %head)")
    small = random_program(stored.replace("  %logits", "  %head: f32[11, 4] = dequantize(%q)\n  %logits"))
    ids = np.array([3, 1, 4, 1, 5])
    [a], [b] = (list(log_probabilities(p, [ids])) for p in (small, dense(small)))
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert bits(dense(small)) == 2 * 44 * 32
    assert bits(small) == 44 * 32 + 11 * (4 * 4 + 16)
    assert "int4" in str(small), "the program itself stays as it is"


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"continuing_subword_prefix": "a"}}', "\ud800"])
def test_a_damaged_tokenizer_is_refused(text: str) -> None:
    program = parse_program("graph @forward(%x: f32[n]) {\n  return %x\n}\n")
    program.origin.texts["tokenizer.json"] = text
    with pytest.raises(WasatError, match=r"tokenizer\.json cannot be read"):
        tokenizer_of(program)
