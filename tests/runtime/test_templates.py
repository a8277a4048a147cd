"""Chat templates: the texts of transformers, and a sentence for whatever a template does."""

from __future__ import annotations

import json
import marshal
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2")

from wasat.runtime import ArtifactError, Image, InputError, jinja, template
from wasat.runtime.template import Templates, plain, read_templates

GOLDEN = Path(__file__).parents[1] / "golden" / "chat"
golden = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
USER = {"role": "user", "content": "What is 2 + 3?"}


class Day(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.fromisoformat(golden["day"])


def templates(text: str) -> Templates:
    return Templates({"default": text}, golden["tokens"])


def stored(name: str) -> Templates:
    return templates((GOLDEN / f"{name}.jinja").read_text(encoding="utf-8"))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates rendered where the day can be set."""

    class Here:
        def render(self, text: str, variables: Any) -> str:
            found = jinja.answer(marshal.dumps((text, variables)))
            if found[:1] != b".":
                raise template._Failed(found[1:].decode())
            return found[1:].decode()

    monkeypatch.setattr(jinja, "datetime", Day)
    monkeypatch.setattr(template, "_worker", Here())


@pytest.mark.parametrize("name", golden["texts"])
def test_texts_are_those_of_transformers(name: str, in_this_process: None) -> None:
    t = stored(name)
    for case, want in golden["texts"][name].items():
        given = golden["conversations"][case.removesuffix(" whole")]
        try:
            got: str | None = t.render(
                given["messages"], given.get("tools"), variables=given.get("variables"), prompt=not case.endswith(" whole")
            )
        except InputError:
            got = None
        assert got == want, case


def test_there_are_enough_families() -> None:
    assert len(golden["texts"]) >= 12
    assert sum(x is not None for each in golden["texts"].values() for x in each.values()) > 300


def test_a_template_gets_the_form_of_content_that_it_reads() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 3?"}]}
    for name in ("Qwen-Qwen2.5-7B-Instruct", "google-gemma-2-2b-it"):  # of which transformers refuses a list, or writes it out
        assert stored(name).render([parts]) == stored(name).render([USER])
    sees = templates("{% for m in messages %}{% for p in m.content %}{{ p.text or p.type }}{% endfor %}{% endfor %}")
    assert sees.render([USER]) == USER["content"]  # transformers: nothing
    seen = {"role": "user", "content": [{"type": "image", "image": b"..."}, *parts["content"]]}
    assert sees.render([seen]) == "imageWhat is 2 + 3?"


@pytest.mark.parametrize("name, after", [
    ("Qwen-Qwen3-0.6B", "<|im_end|>"), ("google-gemma-2-2b-it", "<end_of_turn>"),
    ("meta-llama-Llama-3.1-8B-Instruct", "<|eot_id|>"),
    ("mistralai-Mistral-Nemo-Instruct-2407", "</s>"), ("openai-gpt-oss-120b", "<|return|>"),
    ("deepseek-ai-DeepSeek-V3.1", "<｜end▁of▁sentence｜>"), ("microsoft-Phi-3.5-mini-instruct", "<|end|>"), ("GLM-4.6", ""),
])  # fmt: skip
def test_what_ends_an_answer(name: str, after: str) -> None:
    t = stored(name)
    found = t.turn_end()
    assert found.startswith(after) if after else found == after


def test_what_ends_an_answer_of_a_template_that_fails() -> None:
    assert templates("{{ raise_exception('no') }}").turn_end() == ""


HOSTILE = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "does not come to an end within",
    "{% set n = namespace(x=[1]) %}{% for i in range(50) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}":
        "more memory|does not come to an end",
    "{{ 'a' * 10**10 }}": "more memory",
    "{{ 'a' | center(10**9) }}": "more memory|does not come to an end",
    "{{ '%9999999999d' % 1 }}": "more memory|OverflowError|ValueError",
    "{{ '{:9999999999}'.format(1) }}": "more memory|ValueError",
    "{{ range(10**9) }}": "Range too big",
    "{{ 9 ** (9 ** 9) }}": "ValueError|more memory|does not come to an end",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "nested too deeply",
    "{% block a %}{{ self.a() }}{% endblock %}": "nested too deeply",
    "{{ " + "(" * 400 + "1" + ")" * 400 + " }}": "nested|parentheses|MemoryError|memory",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages[0].__class__.__base__.__subclasses__() }}": "unsafe|undefined",
    "{{ raise_exception.__globals__.x }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.system('true') }}": "unsafe|undefined",
    "{{ ''['__class__'].x }}": "unsafe|undefined",
    "{{ (''|attr('__class__')).__mro__ }}": "unsafe|undefined",
    "{{ '{0.__class__.__mro__}'.format('') }}": "unsafe",
    "{{ '{0.__class__.__mro__}'.format_map({'0': ''}) }}": "unsafe|KeyError|IndexError",
    "{{ namespace(__class__=1) }}": "underscore",
    "{% set n = namespace() %}{% set n.__x__ = 1 %}": "underscore",
    "{{ messages.append(1) }}": "unsafe|not safely callable",
    "{{ messages.clear() }}": "unsafe|not safely callable",
    "{{ dict.__mro__.x }}": "no attribute",
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'os' as os %}": "no loader",
    "{% extends 'x' %}": "no loader",
    "{{ nothing.there }}": "undefined",
    "{{ messages": "line 1",
    "{% for %}": "line 1",
    "{% unknown %}": "unknown tag",
    "{{ 1 | unknown }}": "unknown",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ raise_exception('only users may speak') }}": "only users may speak",
    "{{ raise_exception(messages) }}": "What is 2",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_templates_get_a_sentence(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    well = templates("{{ messages[0].content }}")
    assert well.render([USER]) == USER["content"]  # starting its process takes as long as it takes
    with monkeypatch.context() as m:
        m.setattr(template, "SECONDS", 1.0)
        with pytest.raises(InputError, match=f"the chat template refuses the conversation, or fails: .*({HOSTILE[text]})"):
            templates(text).render([USER])
    assert well.render([USER]) == USER["content"]  # and the next one is well


def test_a_template_that_writes_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MOST_TEXT", 1000)
    with pytest.raises(InputError, match="it writes more than"):
        templates("{{ 'a' * 2000 }}").render([USER])


def test_a_process_that_was_ended_is_started_again() -> None:
    t = templates("{{ messages[0].content }}")
    t.render([USER])
    process = template._worker._process
    assert process is not None
    process.kill()
    process.wait()
    assert t.render([USER]) == USER["content"]


def test_a_forked_process_has_a_renderer_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = template._Worker()
    monkeypatch.setattr(template, "_worker", worker)
    t = templates("{{ messages[0].content }}")
    t.render([USER])
    first = worker._process
    worker._owner = -1  # as it is after a fork
    assert t.render([USER]) == USER["content"]
    assert worker._process is not first


def test_long_texts_go_both_ways() -> None:
    content = "a\u4f60\U0001f642\x00" * 200_000
    assert templates("{{ messages[0].content }}").render([{"role": "user", "content": content}]) == content


def test_threads_take_turns() -> None:
    t, found = templates("{{ messages[0].content }}"), {}

    def render(i: int) -> None:
        found[i] = [t.render([{"role": "user", "content": str(i)}]) for _ in range(20)]

    threads = [threading.Thread(target=render, args=(i,)) for i in range(4)]
    for x in threads:
        x.start()
    for x in threads:
        x.join()
    assert found == {i: [str(i)] * 20 for i in range(4)}


@pytest.mark.parametrize("messages, said", [
    ([], "messages is empty"), ("hello", "must be a list"), (["hello"], "message 0 is a mapping"),
    ([{"content": "x"}], "message 0 has no role"), ([{"role": 1, "content": "x"}], "has no role"),
    ([{"role": "user", "content": "\ud800"}], "half a character"),
    ([{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], "half a character"),
])  # fmt: skip
def test_messages_that_are_none(messages: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        templates("{{ messages }}").render(messages)


def test_messages_that_hold_themselves() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InputError, match="nested too deeply"):
        templates("{{ messages }}").render([{"role": "user", "content": loop}])


def test_tools_are_schemas() -> None:
    with pytest.raises(InputError, match="tools are mappings, not function; of a function, give its JSON schema"):
        templates("").render([USER], [test_tools_are_schemas])  # type: ignore[list-item]


def test_templates_see_plain_values() -> None:
    class Text(str):
        def method(self) -> str:
            return "no"

    found = plain({"a": Text("x"), "b": [np.float32(0.5), np.bool_(True), (1, None)], 2: Image(np.zeros((1, 1, 3), np.uint8))})
    assert found == {"a": "x", "b": [0.5, True, (1, None)], 2: "<Image>"}
    assert type(found["a"]) is str


def test_named_templates(tmp_path: Path) -> None:
    files = {"chat_template.jinja": "plain", "chat_template.tool_use.jinja": "tools {{ bos_token }}{{ eos_token }}",
             "chat_tokens.json": '{"bos_token": "<b>"}', "model.so": ""}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    t = read_templates(tmp_path, files, {"bos_token": "<a>", "eos_token": "<e>"})
    assert t.render([USER]) == "plain"
    assert t.render([USER], [{"name": "f"}]) == "tools <b><e>"
    assert t.render([USER], template="tool_use") == "tools <b><e>"
    assert t.render([USER], template="{{ messages|length }}") == "1"
    with pytest.raises(InputError, match="there is no chat template 'rag'; there are default, tool_use"):
        t.render([USER], template="rag")
    (tmp_path / "chat_tokens.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"chat_tokens\.json is no object of texts"):
        read_templates(tmp_path, files, {})


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "_worker", template._Worker())
    monkeypatch.setattr(template.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match=r"pip install 'wasat\[chat\]'"):
        templates("x").render([USER])
