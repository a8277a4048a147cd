"""Whatever a caller gives by mistake, to any method of a loaded model: an InputError, or what was meant."""

from __future__ import annotations

import array
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from wasat.runtime import InputError, Model, SamplingOptions, Session

TEMPLATE = "{% for m in messages %}{{m.content}}{% endfor %}"


class _Index:
    def __index__(self) -> int:
        return 1


VALUES: list[Any] = [
    None, True, np.True_, -1, 0, 1, 2**31, 2**64, -(2**63), 1.0, 1.5, float("nan"), float("inf"), np.float32(1),
    np.uint64(2**64 - 1), np.datetime64("2020"), "a", "", "\ud800", b"a", bytearray(b"a"), memoryview(b"a"), [], [[]],
    {}, {1: 2}, {"a": 1}, {1}, range(3), [None], [1.0], [[1], [2, 3]], ["a", 1], np.array(1),
    np.array([[1, 2]], ">i4"), np.array([[1.5]]), np.array([[None]]), np.array([[2**63]], np.uint64),
    np.zeros((1, 0), int), np.array([[1, 2, 3, 4]])[:, ::2], np.ma.masked_array([[1, 2]], mask=[[0, 1]]),
    np.array([(1, 2)], dtype=[("a", int), ("b", int)]), Fraction(1, 2), Decimal(1), 1j, object(), _Index(),
    array.array("i", [1, 2]), ..., NotImplemented,
]  # fmt: skip


def _chat(model: Model, **given: Any) -> Any:
    return model.chat([{"role": "user", "content": "ab"}], **{"template": TEMPLATE, "max_tokens": 2, **given})


GIVEN: dict[str, Callable[[Model, Session, Any], Any]] = {
    "prompts": lambda m, s, x: m.generate(x, max_tokens=2),
    "a prompt": lambda m, s, x: m.generate([x], max_tokens=2),
    "a token": lambda m, s, x: m.generate([[x]], max_tokens=2),
    **{name: lambda m, s, x, name=name: m.generate("ab", **{"max_tokens": 2, name: x})
       for name in ("max_tokens", "options", "stop", "stop_tokens", "logprobs", "inputs")},
    "the name of an input": lambda m, s, x: m.generate("ab", max_tokens=2, inputs={x if x.__hash__ else "x": 1}),
    **{name: lambda m, s, x, name=name: m.generate("ab", 2, SamplingOptions(**{"temperature": 1.0, name: x}))
       for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")},
    "a batch": lambda m, s, x: m.session(x), "a context": lambda m, s, x: m.session(1, x),
    "tokens": lambda m, s, x: s.step(x), "lengths": lambda m, s, x: s.step([[1, 2]], x),
    "truncate": lambda m, s, x: s.truncate(x), "reachable": lambda m, s, x: s.reachable(x),
    "a row": lambda m, s, x: s.reachable(1, x), "encode": lambda m, s, x: s.encode(x=x),
    "an array": lambda m, s, x: m.run("sum", x=x, y=np.zeros((1, 3), np.float32)),
    "embed": lambda m, s, x: m.embed(x), "a form": lambda m, s, x: m.rerank("a", ["b"], form=x),
    "documents to rank": lambda m, s, x: m.rerank("a", x),
    "messages": lambda m, s, x: m.chat(x, template=TEMPLATE), "a message": lambda m, s, x: m.chat([x], template=TEMPLATE),
    **{f"chat: {name}": lambda m, s, x, name=name: _chat(m, **{name: x})
       for name in ("tools", "template", "documents", "variables", "stream", "interrupted", "temperature", "unknown")},
    "encoded": lambda m, s, x: m.tokenizer.encode(x), "decoded": lambda m, s, x: m.tokenizer.decode(x),
    "streamed": lambda m, s, x: m.tokenizer.stream(x),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", GIVEN)
def test_what_is_given_by_mistake(model: Model, what: str) -> None:
    session, refused = model.session(), 0
    for value in VALUES:
        try:
            GIVEN[what](model, session, value)
        except InputError:
            refused += 1
    assert refused > 5


def _broken() -> Iterator[int]:
    yield 1
    raise KeyError("the caller's own")


def test_the_callers_own_errors_are_the_callers(model: Model) -> None:
    with pytest.raises(KeyError, match="the caller's own"):
        model.generate([_broken()], max_tokens=2)
