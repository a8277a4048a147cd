"""A program's interface and origin as one dictionary: the same facts, read and set."""

from __future__ import annotations

from typing import Any

import pytest
from wasat.ir import IRError, Program, parse

from wasat.models import gemini

GRAPH = "graph @f(%x: f32[n]) {\n  return %x\n}"
GIVEN: dict[str, Any] = {
    "context": 32, "generation": {"bos": 0, "eos": [1], "pad": None}, "tokenizer": "t.json", "name": "m",
    "media": {"vocab": 4, "dim": 8, "image": {"entry": "look", "size": 16}}, "heads": {"kind": {"entry": "f", "of": "text"}},
}  # fmt: skip


def made(given: Any) -> Program:
    return Program({"f": parse(GRAPH)}, {}, given)


def test_what_is_given_is_the_interface() -> None:
    p = made(GIVEN)
    assert dict(p.metadata) == GIVEN
    assert (p.interface.context, p.origin.tokenizer) == (32, "t.json")
    assert p.interface.generation is not None
    assert p.interface.generation.eos == (1,)
    assert p.interface.media is not None
    assert [e.entry for e in p.interface.media.encoders] == ["look"]
    del p.metadata["context"]
    assert (p.interface.context, "context" in p.metadata, p.metadata.get("context")) == (None, False, None)
    p.metadata["context"] = 7
    assert p.interface.context == 7
    assert dict(made({}).metadata) == {}


def test_a_models_own() -> None:
    p = gemini.Gemini(gemini.preset("tiny")).program()
    again = Program(p.graphs, p.params, dict(p.metadata))  # type: ignore[arg-type]
    assert again.interface == p.interface


@pytest.mark.parametrize("given, message", [
    ({"contxt": 3}, "metadata has no 'contxt'"), ({"context": "3"}, "context is '3'"), ({"generation": {"begin": 3}}, "begin"),
    ({"media": {"vocab": 4, "dim": 8, "image": {"way": "x"}}}, "way"), ({"states": []}, "what passes derive"),
    ({"generation": 3}, "generation is 3"),
])  # fmt: skip
def test_what_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(IRError, match=message):
        made(given)
