"""The interface of a program: what it says, as text and back, held against the graphs."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from wasat.ir import (
    Embedder,
    Encoder,
    Generation,
    Head,
    Interface,
    IRError,
    Media,
    Origin,
    ParseError,
    Program,
    State,
    VerifyError,
    interface_text,
    parse_program,
)

GRAPH = """graph @step(%x: f32[b, 4], %kept: f32[b, c, 4], %h: f32[b, 4]) {
  %y: f32[b, 4] = add(%x, %h)
  return %y, %kept, h=%y
}
"""
FULL = Interface(
    "a \"name\"\nof two lines", context=64, chunk=5, granule=8, vocab=70, tokens="ids", generation=Generation(1, (2, 3), 0),
    media=Media(70, 16, (Encoder("image", "step", size=8), Encoder("audio", "step", rate=8000, samples=90)), seen=True),
    embedder=Embedder("step", pairs=True, limit=9), heads=(Head("topic", "step", "text"),),
    states=(
        State.full("kept", "k", window=3), State.ring("r", 16, 4, "v"), State.carry("h", empty=float("-inf")),
        State.carry("g", rows=None, empty="initial"), State.tail("t", 3), State.memory("m"), State.trained("p", donated=True),
    ),
)  # fmt: skip
TEXT = """interface {
  model {name="tiny", context=64}
  generation {eos=(2,)}
  state {name="kept", kind="full", positions=1, cut="anywhere", role="k"}
  state {name="h", kind="carry", empty=0.5}
}

""" + GRAPH


def test_text_and_back() -> None:
    program = parse_program(TEXT)
    assert str(program) == TEXT
    assert program.interface.states == (State.full("kept", "k"), State.carry("h", empty=0.5))
    text = interface_text(FULL)
    assert parse_program(text).interface == FULL
    assert interface_text(parse_program(text).interface) == text


def test_an_interface_that_says_nothing_is_not_printed() -> None:
    assert str(parse_program(GRAPH)) == GRAPH
    assert interface_text(Interface()) == ""
    assert parse_program("interface {\n  media {vocab=1, dim=2}\n}\n").interface == Interface(media=Media(1, 2))


@pytest.mark.parametrize("old, new, message", [
    ("context=64", 'context="64"', "context is '64', which is not int"),
    ("context=64", "context=-64", "context is -64"),
    ("context=64", "context=true", "context is True"),
    ("context=64", "contex=64", "model has no field contex; it has name, context, chunk, granule, vocab, tokens"),
    ("eos=(2,)", "eos=2", "eos is 2"),
    ("generation {", "generator {", "no section generator; there are model, generation, media"),
    ('cut="anywhere"', 'cut="here"', "cut is 'here'"),
    ('name="kept", ', "", "state lacks the field name"),
    ("generation {eos=(2,)}", "generation {}\n  generation {}", "generation is there twice"),
    ("generation {eos=(2,)}", 'encoder {kind="image", entry="step"}', "encoders and no media"),
    ("empty=0.5", "empty=(1, 2)", r"empty is \(1, 2\)"),
])  # fmt: skip
def test_text_that_is_none(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ParseError, match=message):
        parse_program(TEXT.replace(old, new))


@pytest.mark.parametrize("changes, message", [
    ({"states": (State.carry("nothing"),)}, "state nothing is no entry's input"),
    ({"states": (State.carry("h"), State.carry("h"))}, "do not have a name each"),
    ({"states": (State.carry("kept", rows=3),)}, r"state kept is f32\[b, c, 4\], which is no carry"),
    ({"states": (State.full("h"),)}, r"state h is f32\[b, 4\], which is no full"),
    ({"states": (State.ring("kept", 8, 4),)}, r"no ring with rows along axis 0 and positions along axis 1 \(8\)"),
    ({"embedder": Embedder("embed")}, "the embedder is the entry @embed, which the program does not have"),
    ({"heads": (Head("a", "classify", "text"),)}, "head a is the entry @classify, which the program does not have"),
    ({"media": Media(1, 2, (Encoder("image", "see"),))}, "the image encoder is the entry @see"),
])  # fmt: skip
def test_what_the_graphs_do_not_have(changes: dict[str, Any], message: str) -> None:
    program = parse_program(TEXT)
    program.verify()
    program.declare(**changes)
    with pytest.raises(VerifyError, match=message):
        program.verify()


def test_declaring() -> None:
    program = Program({})
    program.declare(context=7)
    program.declare(vocab=8)
    assert program.interface == Interface(context=7, vocab=8)
    with pytest.raises(IRError, match="no field vocabulary; it has name, context"):
        program.declare(vocabulary=8)
    with pytest.raises(IRError, match=r"Interface: context is 1\.5"):
        program.declare(context=1.5)


def test_a_copy_is_its_own() -> None:
    program = parse_program(TEXT)
    copy = program.copy()
    copy.declare(context=1)
    copy.graphs.clear()
    assert (str(program), program.interface.context) == (TEXT, 64)


def test_sections_do_not_change() -> None:
    """A copy of a program shares its interface."""
    media, generation = FULL.media, FULL.generation
    assert media is not None and generation is not None  # noqa: PT018
    assert FULL.embedder is not None
    for part in (FULL, media, generation, FULL.embedder, *media.encoders, *FULL.heads, *FULL.states, Origin()):
        name = fields(part)[0].name
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, getattr(part, name))


def test_kinds_of_states_are_what_their_fields_say() -> None:
    """name, kind, rows, positions, capacity, window, cut, empty, role, donated."""
    assert [tuple(getattr(s, f.name) for f in fields(s) if f.name != "stored") for s in FULL.states] == [
        ("kept", "full", 0, 1, None, 3, "anywhere", None, "k", False), ("r", "ring", 0, 1, 16, 4, "window", None, "v", False),
        ("h", "carry", 0, None, None, None, "never", float("-inf"), "", False),
        ("g", "carry", None, None, None, None, "never", "initial", "", False),
        ("t", "tail", 0, 1, 3, 4, "never", 0.0, "", False),  # three inputs before it, and its own
        ("m", "memory", 0, None, None, None, "anywhere", None, "", False),
        ("p", "trained", None, None, None, None, "never", None, "", True),
    ]  # fmt: skip
    assert not any(s.stored for s in FULL.states)


def test_what_states_are() -> None:
    grow = {s.kind: s.grows for s in FULL.states}
    assert grow == dict.fromkeys(grow, False) | {"full": True}
    assert replace(FULL).state_names == ["kept", "r", "h", "g", "t", "m", "p"]
    assert {f.name for f in fields(State)} >= {"rows", "positions", "capacity", "window", "cut", "empty"}
