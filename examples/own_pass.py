"""A pass of your own, and its test: a pattern, what replaces it, and a near miss that must stay as it is.

python examples/own_pass.py        (or: pytest examples/own_pass.py)
"""

from wasat.ir import Builder, Value
from wasat.passes import Match, Rewrite, Tracer
from wasat.passes.pattern import Pattern, Var

from wasat.testing import check_pass, check_untouched


class FuseLogSoftmax(Rewrite):
    """log(softmax(x)) -> log_softmax(x), which stays finite where a probability rounds to 0."""

    name = "fuse-log-softmax"
    landmark = "softmax"  # each softmax that stays gets a remark with the reason

    def pattern(self, p: Tracer, x: Var) -> Pattern:
        return p.log(p.named("probabilities", p.softmax(x)))

    def build(self, b: Builder, m: Match) -> Value:
        return b.log_softmax(m["x"], axis=m["probabilities"].node.attrs.axis)


BEFORE = """graph @loss(%logits: f32[b, s, 7]) {
  %probs: f32[b, s, 7] = softmax(%logits) {axis=2}
  %out: f32[b, s, 7] = log(%probs)
  return %out
}"""
AFTER = """graph @loss(%logits: f32[b, s, 7]) {
  %out: f32[b, s, 7] = log_softmax(%logits) {axis=2}
  return %out
}"""


def test_fuses() -> None:
    """The text becomes that one, and the interpreter's numbers stay, at two bindings of the symbols."""
    check_pass(FuseLogSoftmax(), BEFORE, AFTER, dims=[{"b": 1, "s": 1}, {"b": 3, "s": 4}])


def test_a_softmax_that_is_also_returned_stays() -> None:
    near_miss = BEFORE.replace("return %out", "return %out, %probs")
    check_untouched(FuseLogSoftmax(), near_miss, "%probs is also an output of the graph")


if __name__ == "__main__":
    test_fuses()
    test_a_softmax_that_is_also_returned_stays()
    print("both tests pass")
