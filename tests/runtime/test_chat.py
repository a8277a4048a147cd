"""Conversations: what is reused of the caches changes no answer; what ends one; media; what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2")

from tiny_model import CONTEXT, EOS, RING
from tokenizers import Tokenizer as Library
from tokenizers import processors
from wasat.runtime import Chat, ContextLimitError, InputError, Model, SamplingOptions, Tokenizer

TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:
{%- if m.role == 'assistant' and not loop.last %}{{ m.content[-3:] }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}
{%- endfor %}{% if add_generation_prompt %}a:{% endif %}"""
"""Of earlier answers it writes the last letters only, as others remove what was thought before them."""
PLAIN = TEMPLATE.replace("[-3:]", "")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_it_goes_on_where_the_last_one_ended(model: Model) -> None:
    chat = Chat(model)
    messages = [user("hello")]
    first = chat.answer(messages, max_tokens=3, template=PLAIN)
    assert (first.reused, first.prompt_tokens) == (0, len("_u:hello_a:"))
    messages += [{"role": "assistant", "content": "x"}, user("more")]
    again = chat.answer(messages, max_tokens=3, template=PLAIN)
    assert again.reused == first.prompt_tokens
    assert again.prompt_tokens == first.prompt_tokens + len("x_u:more_a:")
    same = chat.answer(messages, max_tokens=3, template=PLAIN)
    assert same.reused == again.prompt_tokens - 1  # the last token is fed for its logits
    assert same.tokens == again.tokens


def test_what_a_ring_has_lost_is_fed_again(model: Model) -> None:
    chat = Chat(model)
    messages = [user("x" * 40)]
    chat.answer(messages, max_tokens=2 * RING, template=PLAIN)
    assert chat._session is not None
    assert chat._session.past[0] > 40 + RING
    other = chat.answer([user("x" * 20 + "y" * 20)], max_tokens=4, template=PLAIN)
    assert other.reused == 0
    assert other.tokens == Chat(model).answer([user("x" * 20 + "y" * 20)], max_tokens=4, template=PLAIN).tokens


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_those_of_a_fresh_start(model: Model, seed: int) -> None:
    """Conversations that grow, are cut, edited and exchanged; by a template that rewrites earlier turns, or not."""
    rng = np.random.default_rng(seed)
    chat, messages = Chat(model), [user("Hi")]
    template = (PLAIN, TEMPLATE)[seed % 2]
    reused = 0
    for _ in range(12):
        options = SamplingOptions(temperature=float(rng.choice([0, 1.5])), seed=int(rng.integers(100)))
        most = int(rng.integers(1, 24))
        given: dict[str, Any] = {"options": options, "template": template, "logprobs": 2, "max_tokens": most}
        got, want = chat.answer(messages, **given), Chat(model).answer(messages, **given)
        assert got.tokens == want.tokens
        assert (got.text, got.finish, got.prompt_tokens) == (want.text, want.finish, want.prompt_tokens)
        np.testing.assert_allclose(
            [x.logprob for x in got.logprobs or ()], [x.logprob for x in want.logprobs or ()], rtol=1e-4, atol=1e-4
        )
        reused += got.reused
        messages.append(got.message)
        match rng.integers(5):
            case 0:  # an earlier turn is edited
                messages[int(rng.integers(len(messages)))]["content"] += "!"
                messages.append(user("and?"))
            case 1:  # turns are taken back
                del messages[max(1, len(messages) - 3) :]
                messages.append(user("else?"))
            case 2 if rng.random() < 0.5:
                messages = [user("something new")]
            case _:
                messages.append(user("ab" * int(rng.integers(1, 12))))
        if len(messages) > 9:
            messages = [user("Hi")]
    assert reused > 20


def test_the_token_after_an_answer_ends_it(model: Model) -> None:
    chat = Chat(model)
    assert chat.ends(PLAIN) == (EOS,)
    assert chat.ends("{{ messages[0].content }}") == ()
    assert chat.ends("{% for m in messages %}{{ m.content }}<bos>{% endfor %}") == (257,)
    text = "{% for m in messages %}{{ m.content }}<bos>{% endfor %}"
    free = chat.answer([user("q")], max_tokens=12, template="{{ messages[0].content }}")
    held = model.generate([[*model.tokenizer.encode("q")]], max_tokens=12)[0]
    assert free.tokens == held.tokens
    assert chat.answer([user("q")], max_tokens=1, template=text).finish == "length"


def test_bos_is_never_doubled(model: Model, tokenizer_file: Path, tmp_path: Path) -> None:
    library = Library.from_file(str(tokenizer_file))
    library.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 257)])
    library.save(str(tmp_path / "tokenizer.json"))
    own = SimpleNamespace(manifest=model.manifest, folder=model.folder, tokenizer=Tokenizer(tmp_path / "tokenizer.json"))
    assert own.tokenizer.encode("x")[0] == 257
    chat = Chat(own)  # type: ignore[arg-type]
    assert chat.prompt([user("x")], template=PLAIN)[0].count(257) == 1
    assert chat.prompt([user("x")], template="{{ messages[0].content }}")[0].count(257) == 0  # as transformers has it


def test_streams_and_options(model: Model) -> None:
    pieces: list[str] = []
    got = Chat(model).answer([user("abc")], max_tokens=20, template=PLAIN, stream=pieces.append, temperature=0.8, seed=3)
    assert "".join(pieces) == got.text
    same = Chat(model).answer(
        [user("abc")], max_tokens=20, template=PLAIN, options=SamplingOptions(temperature=0.8), seed=3
    )
    assert same.tokens == got.tokens
    assert got.message == {"role": "assistant", "content": got.text}
    ends = got.tokens[2:3]
    stopped = Chat(model).answer([user("abc")], max_tokens=20, template=PLAIN, stop_tokens=ends, temperature=0.8, seed=3)
    assert stopped.tokens == got.tokens[: got.tokens.index(got.tokens[2])]


def test_an_answer_that_is_interrupted(model: Model) -> None:
    chat, asked = Chat(model), iter([False, False, False, True])
    got = chat.answer([user("abcdefgh")], template=PLAIN, interrupted=lambda: next(asked))
    assert got.finish == "interrupt"
    assert 0 < len(got.tokens) <= 3
    messages = [user("abcdefgh"), got.message, user("so?")]
    again = chat.answer(messages, max_tokens=5, template=PLAIN)
    assert again.reused > 0
    assert again.tokens == Chat(model).answer(messages, max_tokens=5, template=PLAIN).tokens
    early = chat.answer([user("z" * 50)], template=PLAIN, interrupted=lambda: True)
    assert (early.finish, early.tokens) == ("interrupt", [])
    assert chat.answer([user("z" * 50)], max_tokens=4, template=PLAIN).tokens == (
        Chat(model).answer([user("z" * 50)], max_tokens=4, template=PLAIN).tokens
    )


def test_a_stream_that_fails_leaves_no_trace(model: Model) -> None:
    chat = Chat(model)

    def fails(piece: str) -> None:
        raise KeyboardInterrupt

    want = chat.answer([user("abc")], max_tokens=4, template=PLAIN)
    with pytest.raises(KeyboardInterrupt):
        chat.answer([user("abd and more")], template=PLAIN, stream=fails)
    got = chat.answer([user("abc")], max_tokens=4, template=PLAIN)
    assert (got.reused, got.tokens) == (0, want.tokens)


def test_how_far_back_a_session_can_go(model: Model) -> None:
    """As truncate() has it: it takes what reachable() says, and refuses what that says not."""
    rng = np.random.default_rng(4)
    lost = 0
    for _ in range(40):
        session = model.session(1)
        for _ in range(6):
            session.step([rng.integers(0, 256, int(rng.integers(1, 14))).tolist()])
            past, to = int(session.past[0]), int(rng.integers(0, session.past[0] + 4))
            found = session.reachable(to)
            if found < min(to, past):
                lost += 1
                assert found == 0
                with pytest.raises(InputError, match="cannot go back"):
                    session.truncate(to)
            session.truncate(found)
    assert lost > 10


def test_through_the_model(model: Model) -> None:
    assert model.chat([user("x")], max_tokens=2, template=PLAIN).reused == 0
    assert model.chat([user("x")], max_tokens=2, template=PLAIN).reused > 0
    model.conversation.forget()
    assert model.chat([user("x")], max_tokens=2, template=PLAIN).reused == 0


@pytest.mark.parametrize("given, said", [
    ({}, "has no chat template: give one .template=, --template., or compile the model again"),
    ({"template": "rag"}, "there is no chat template 'rag'"),
    ({"template": PLAIN, "warmth": 1}, "chat takes no warmth; of sampling there are temperature"),
    ({"template": PLAIN, "temperature": -1}, "temperature is -1"),
    ({"template": PLAIN, "max_tokens": 0}, "max_tokens is 0"),
    ({"template": PLAIN, "stream": 1}, "stream is called with pieces of text"),
    ({"template": PLAIN, "options": 1}, "options must be SamplingOptions"),
    ({"template": PLAIN, "messages": []}, "messages is empty"),
    ({"template": PLAIN, "messages": "hello"}, "messages must be a list"),
    ({"template": PLAIN, "messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "no part of type 'smell'"),
    ({"template": PLAIN, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part is .*\"image\": …"),
    ({"template": PLAIN, "messages": [{"role": "user", "content": [{"type": "image", "image": "http://x/y.png"}]}]},
     "media are files, their content or arrays, not addresses"),
    ({"template": PLAIN, "messages": [{"role": "user", "content": [{"type": "image", "image": np.zeros((4, 4, 3), "u1")}]}]},
     "the model has no encoder for image"),
])  # fmt: skip
def test_what_cannot_be(model: Model, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Chat(model).answer(**{"messages": [user("x")], **given})


def test_a_conversation_that_is_too_long(model: Model) -> None:
    with pytest.raises(ContextLimitError, match=f"the conversation has {CONTEXT + 6} tokens and nothing can follow it"):
        Chat(model).answer([user("x" * CONTEXT)], template=PLAIN)


def test_an_artifact_that_brings_its_template(artifact: Path, tmp_path: Path) -> None:
    from wasat.runtime import load, write_artifact

    manifest = json.loads((artifact / "manifest.json").read_text())
    files: dict[str, Any] = {name: artifact / name for name in manifest.pop("files")}
    del manifest["digest"]
    texts = {"chat_template.jinja": PLAIN, "chat_tokens.json": '{"bos_token": "[", "eos_token": "]"}'}
    files |= {name: (lambda p, t=text: p.write_text(t)) for name, text in texts.items()}
    write_artifact(tmp_path / "chat.wasat", manifest, files)
    model = load(tmp_path / "chat.wasat")
    assert model.tokenizer.decode(model.conversation.prompt([user("x")])[0]) == "[u:x]a:"
