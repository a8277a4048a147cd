"""Conversations with pictures, sounds and videos in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2")

from tiny_media import VOCAB, media_program
from tokenizers import Tokenizer
from wasat.runtime import Audio, Chat, Image, InputError, MediaError, Model, load

from wasat import driver

TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ p.text if p.type == 'text' else '<' ~ p.type ~ '>' }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
)
RNG = np.random.default_rng(2)
PICTURES = [Image(RNG.integers(0, 256, (9 + i, 12, 3), dtype=np.uint8)) for i in range(3)]


def shown(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts
    ]}  # fmt: skip


@pytest.fixture(scope="module")
def seeing(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("media")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    program = media_program()
    media = program.interface.media
    assert media is not None
    program.declare(media=replace(media, encoders=media.encoders[:1]))
    program.graphs = {name: g for name, g in program.graphs.items() if name in ("forward", "encode_image")}
    program.params = {name: p for name, p in program.params.items() if not name.startswith("hear.")}
    program.origin = replace(
        program.origin, tokenizer=str(folder / "tokenizer.json"), texts={"chat_template.jinja": TEMPLATE}
    )
    driver.compile(program, folder / "tiny.wasat", chunk=8)
    return load(folder / "tiny.wasat")


def test_pictures_stand_where_the_template_puts_them(seeing: Model) -> None:
    ids, rows = seeing.conversation.prompt([shown("ab", PICTURES[0], "c", PICTURES[1]), shown(PICTURES[0])])
    first, second = seeing.embed(PICTURES[0]), seeing.embed(PICTURES[1])
    one, two = [list(range(VOCAB + a, VOCAB + b)) for a, b in ((0, len(first)), (len(first), len(first) + len(second)))]
    text = seeing.tokenizer.encode
    assert ids == [*text("ab"), *one, *text("c"), *two, 256, *one, 256]
    np.testing.assert_array_equal(rows, np.concatenate([first, second]))


def test_answers_are_those_of_a_fresh_start(seeing: Model) -> None:
    chat = Chat(seeing)
    messages: list[Any] = [shown("see ", PICTURES[0], " this?")]
    reused = []
    for step in range(8):
        got, want = (c.answer(messages, max_tokens=6, logprobs=1) for c in (chat, Chat(seeing)))
        assert got.tokens == want.tokens
        np.testing.assert_allclose([x.logprob for x in got.logprobs or ()], [x.logprob for x in want.logprobs or ()], atol=1e-4)
        reused.append(got.reused)
        messages.append(got.message)
        if step == 2:  # another picture in the place of the first
            messages = [shown("see ", PICTURES[1], " this?"), *messages[1:]]
        elif step == 5:  # none
            messages = [{"role": "user", "content": "see nothing"}]
        else:
            messages.append(shown("and ", PICTURES[2]) if step == 1 else {"role": "user", "content": "more"})
    assert reused[1] > 0  # the same picture: what was read of it stays
    assert reused[3] == 0
    assert reused[7] > 0


def test_a_picture_is_encoded_once(seeing: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    pillow.fromarray(PICTURES[0].pixels()).save(path)
    chat, calls = Chat(seeing), []
    embed = seeing.embed
    monkeypatch.setattr(seeing, "embed", lambda m: calls.append(m) or embed(m))
    for given in (path, str(path), path):
        chat.answer([shown(given)], max_tokens=1)
    assert len(calls) == 1
    pillow.fromarray(PICTURES[1].pixels()).save(path)
    chat.answer([shown(path)], max_tokens=1)
    assert len(calls) == 2


@pytest.mark.parametrize("messages, error, said", [
    ([shown("the text says <image>", PICTURES[0])], InputError, "the template wrote the places of image, image"),
    ([shown(Path("there-is-none.png"))], MediaError, "there-is-none.png does not exist"),
    ([{"role": "user", "content": [{"type": "audio", "audio": Audio(np.zeros(900, np.float32), 8000)}]}], InputError,
     "the model has no encoder for audio"),
])  # fmt: skip
def test_what_cannot_be(seeing: Model, messages: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        seeing.chat(messages)


def test_a_tokenizer_without_a_token_for_the_place(seeing: Model) -> None:
    with pytest.raises(InputError, match="no token for the place of a medium, <video>: add it"):
        seeing.conversation._placeholder("video")


def test_a_template_that_drops_the_picture(seeing: Model) -> None:
    with pytest.raises(InputError, match="the messages hold image, and the template wrote the places of none"):
        seeing.chat([shown("x", PICTURES[0])], template="{{ messages[0].content[0].text }}")
