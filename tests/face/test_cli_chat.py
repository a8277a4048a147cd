"""``wasat chat``: turns, commands, Ctrl-C, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("jinja2")

from conftest import Run
from wasat.runtime import Model, Reply, load

from wasat.cli.chat import _Conversation

TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# {{ style }}{% endif %}"
)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "t.jinja"
    path.write_text(TEMPLATE)
    return path


def test_turns(run: Run, int4: Path, template: Path, tmp_path: Path) -> None:
    saved, variables = tmp_path / "c.json", {"style": "def"}
    lines = ["hello", "//more\\", "lines", f"/save {saved}", "/exit", "never read"]
    code, out, err = run(
        "chat", int4, "--template", template, "--set", "style=def", "--max-tokens", 8, "--system", "Be.", stdin="\n".join(lines)
    )
    assert code == 0, err
    messages = json.loads(saved.read_text())
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "/more\nlines"
    model = load(int4)
    for at in (2, 4):
        want = model.chat(messages[:at], max_tokens=8, template=TEMPLATE, variables=variables).text
        assert messages[at]["content"] == want
        assert want in out
    assert "0 tokens kept" in err
    assert "never read" not in out


def test_commands(run: Run, int4: Path, template: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{i}.json" for i in range(3))
    lines = [
        "one", f"/save {first}", "two", "/undo", "/system Be.", "/retry", f"/save {second}", "/reset", f"/load {first}",
        "/help", "/system", "", f"/save {third}",
    ]  # fmt: skip
    code, _, err = run("chat", int4, "--template", template, "--max-tokens", 5, stdin="\n".join(lines))
    assert code == 0, err
    assert "/undo " in err
    a, b, c = (json.loads(p.read_text()) for p in (first, second, third))
    assert [m["role"] for m in a] == ["user", "assistant"]
    assert [m["role"] for m in b] == ["system", "user", "assistant"]
    assert c == a
    assert b[1] == a[0]


def test_quiet(run: Run, int4: Path, template: Path) -> None:
    code, out, err = run("chat", int4, "--template", template, "--max-tokens", 5, "--quiet", stdin="one\n")
    want = load(int4).chat([{"role": "user", "content": "one"}], max_tokens=5, template=TEMPLATE).text
    assert (code, out, err) == (0, f"{want}\n", "")


@pytest.mark.parametrize("arguments, stdin, said", [
    ([], "x", "has no chat template: give one"),
    (["--template", "rag"], "x", "there is no chat template 'rag'"),
    (["--template", "{{ messages[0].content }}", "--set", "x"], "x", "--set 'x': write NAME=VALUE"),
    (["--template", "{{ messages[0].content }}", "--image", "a.png"], "x", "the model takes no image; it takes text"),
    (["--template", "{{ messages[0].content }}", "--tools", "none.json"], "x", "none.json"),
    (["--template", "{{ messages[0].content }}"], "/what", "there is no /what; /help"),
    (["--template", "{{ messages[0].content }}"], "/undo", "there is nothing to take back"),
    (["--template", "{{ messages[0].content }}"], "/retry", "there is no message to answer"),
    (["--template", "{{ messages[0].content }}"], "/save", "/save FILE: say where"),
    (["--template", "{{ messages[0].content }}"], "/load none.json", "none.json cannot be read: No such file"),
    (["--template", "{{ messages[0].content }}"], "/load", "/load FILE: say which"),
    (["--template", "{{ messages[0].content }}"], "/save /no/such/x", "/no/such/x cannot be written: No such file"),
    (["--template", "{{ messages[0].content }}", "--temperature", "-1"], "x", "temperature is -1"),
    (["--template", "{{ raise_exception('no') }}"], "x", "the chat template refuses the conversation, or fails: no"),
    (["--template", "{{ messages[0].content }}"], "x " * 3000, "the conversation has 3001 tokens"),
])  # fmt: skip
def test_what_it_refuses(run: Run, int4: Path, arguments: list[str], stdin: str, said: str) -> None:
    code, _, err = run("chat", int4, *arguments, stdin=stdin)
    assert code == 1
    assert err.startswith("error: ")
    assert said in err.replace("\n", " ")


def test_what_is_said_is_no_markup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("/[/b]\n/[b, s]\n/exit\n"))
    model: Any = SimpleNamespace()
    _Conversation(model, {}, None, [], quiet=True).run()
    said = capsys.readouterr().err
    assert "there is no /[/b];" in said
    assert "there is no /[b,;" in said


def test_ctrl_c_stops_the_answer_and_not_the_program(int4: Path, template: Path) -> None:
    program = str(Path(sys.executable).parent / "wasat")
    command = [program, "chat", str(int4), "--template", str(template), "--max-tokens", "1900"]
    environment = {**os.environ, "TVM_NUM_THREADS": "2", "TVM_BIND_THREADS": "0"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("one\n")
        process.stdin.flush()
        assert process.stdout.read(1)  # it is answering
        process.send_signal(signal.SIGINT)
        line = next(x for x in process.stderr if "finished by" in x)
        process.stdin.write("/undo\n/retry\n")
        process.stdin.close()
        assert process.wait(timeout=60) == 1
        said = process.stderr.read()
    if "interrupt" not in line:  # it was faster
        pytest.skip(line)
    assert "there is no message to answer" in said  # the program went on, with the answer's part in its conversation


def test_ctrl_c_twice_ends_the_answer_at_once(run: Run, int4: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, calls = Model.chat, []

    def pressed(self: Model, messages: list[dict[str, str]], **more: object) -> Reply:
        calls.append(list(messages))
        if len(calls) == 1:
            raise KeyboardInterrupt
        return chat(self, messages, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "chat", pressed)
    code, _, err = run("chat", int4, "--template", template, "--max-tokens", 3, stdin="one\ntwo\n")
    assert code == 0, err
    assert [[m["content"] for m in c] for c in calls] == [["one"], ["two"]]


def test_ctrl_c_while_an_answer_is_summed_up_leaves_no_half_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer was there: the message and the answer go together."""
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    def summary() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Terminal("one\n"))
    reply = SimpleNamespace(message={"role": "assistant", "content": "two"}, summary=summary)
    model: Any = SimpleNamespace(
        chat=lambda *args, **kwargs: reply, manifest=SimpleNamespace(interface=SimpleNamespace(name="m"))
    )
    c = _Conversation(model, {}, "Be.", [], quiet=False)
    c.run()
    assert [m["role"] for m in c.messages] == ["system"]
