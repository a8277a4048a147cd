"""Chat templates: messages become the text that a model was trained on. They run apart, see :mod:`wasat.runtime.jinja`."""

from __future__ import annotations

import importlib.util
import json
import marshal
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import AGAIN, ArtifactError, InputError
from .values import listed, texts

SECONDS, MOST_TEXT = 5.0, 1 << 26
"""What rendering may take, and give."""
NAMES = "chat_template.jinja", "chat_tokens.json"
"""Files of an artifact: the template (others are ``chat_template.NAME.jinja``), and the texts of tokens that it may name."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which messages carry what was thought before an answer."""
_MARK = "wasat-mark"


@dataclass
class Templates:
    """The templates of a model, ``default`` and others by name, and the tokens by the names that they know them by.

    Raises InputError where a template refuses what it is given, fails, or takes too long.
    """

    found: Mapping[str, str]
    tokens: Mapping[str, str]
    _forms: dict[str, str] = field(default_factory=dict)

    def choose(self, name: str | None, tools: bool) -> str:
        """The text of the template to use: that of ``name``, the one for tools where there are some, or the default."""
        if name is not None:
            (name,) = texts("template", [name])
        if name is not None and name in self.found:
            return self.found[name]
        if name is not None and "{" in name:
            return name
        if name is not None or "default" not in self.found:
            there = ", ".join(self.found) or "none"
            raise InputError(f"there is no chat template {name or 'default'!r}; there are {there}; or give a template's text")
        return self.found["tool_use" if tools and "tool_use" in self.found else "default"]

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, *,
        documents: Sequence[Mapping[str, Any]] | None = None, template: str | None = None, prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """The text of a conversation; with ``prompt``, up to where the model's answer begins.

        ``template``: the name of one, or its text. ``variables``: what else a template asks for (``enable_thinking``).
        """
        chat = [_message(i, m) for i, m in enumerate(listed("messages", messages))]
        if not chat:
            raise InputError("messages is empty: a conversation has at least one message")
        text = self.choose(template, tools is not None)
        if variables is not None and not isinstance(variables, Mapping):
            raise InputError(f"variables must be values by name, not {type(variables).__name__}")
        given = {
            **self.tokens, **plain(variables or {}), "tools": _mappings("tools", tools),
            "documents": _mappings("documents", documents), "add_generation_prompt": prompt,
        }  # fmt: skip
        try:
            return _worker.render(text, {**given, "messages": [self._as_it_takes(text, m) for m in chat]})
        except _Failed as e:
            raise InputError(f"the chat template refuses the conversation, or fails: {e}") from None

    def turn_end(self, template: str | None = None) -> str:
        """What the template writes after an answer; empty where it does not say."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        try:
            return self.render(chat, template=template, prompt=False).rpartition(_MARK)[2].strip()
        except InputError:
            return ""

    def _as_it_takes(self, text: str, message: dict[str, Any]) -> dict[str, Any]:
        """A message with its content in the form that a template reads: of text, or of parts. Most read both."""
        content = message.get("content")
        if isinstance(content, str) and content and self._form(text) == "parts":
            return {**message, "content": [{"type": "text", "text": content}]}
        parts = content if isinstance(content, list) else []
        if parts and all(isinstance(p, dict) and p.get("type") == "text" for p in parts) and self._form(text) == "text":
            return {**message, "content": "".join(str(p.get("text", "")) for p in parts)}
        return message

    def _form(self, text: str) -> str:
        """What a template would lose or write out as a list if it were the other: ``text``, ``parts`` or neither."""
        if text not in self._forms:
            whole, parts = self._shown(text, _MARK), self._shown(text, [{"type": "text", "text": _MARK}])
            if "'type'" in parts or '"type"' in parts:
                parts = ""
            self._forms[text] = "" if (_MARK in whole) == (_MARK in parts) else "text" if _MARK in whole else "parts"
        return self._forms[text]

    def _shown(self, text: str, content: Any) -> str:
        given = {**self.tokens, "messages": [{"role": "user", "content": content}], "add_generation_prompt": True}
        try:
            return _worker.render(text, {**given, "tools": None, "documents": None})
        except _Failed as e:
            if e.ended:
                raise
            return ""


def read_templates(folder: Path, files: Mapping[str, object], tokens: Mapping[str, str]) -> Templates:
    """The templates of an artifact with these ``files``. ``tokens``: those whose texts the artifact does not hold otherwise."""
    found = {}
    for name in files:
        first, _, rest = name.partition(".")
        if first == "chat_template" and rest.endswith("jinja"):
            found[rest.removesuffix("jinja").removesuffix(".") or "default"] = (folder / name).read_text(encoding="utf-8")
    own: Any = {}
    if NAMES[1] in files:
        try:
            own = json.loads((folder / NAMES[1]).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            own = None
        if not isinstance(own, dict) or not all(isinstance(x, str) for x in own.values()):
            raise ArtifactError(f"{folder / NAMES[1]} is no object of texts; {AGAIN}")
    return Templates(found, {**tokens, **own})


def _message(index: int, given: object) -> dict[str, Any]:
    """A message as templates see it: plain values, none of them None, and its reasoning under all names."""
    if not isinstance(given, Mapping):
        raise InputError(f"message {index} is a mapping with role and content, not {type(given).__name__}")
    message = {k: v for k, v in plain(given).items() if v is not None}
    if not isinstance(message.get("role"), str):
        raise InputError(f"message {index} has no role: it is a text such as user, assistant or system")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts(f"message {index}", [x for p in parts if isinstance(p, dict) and isinstance(x := p.get("text"), str)])
    reasoning = next((message[k] for k in _REASONING if message.get(k) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mappings(what: str, given: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    if given is None:
        return None
    for x in (items := listed(what, given)):
        if not isinstance(x, Mapping):
            hint = "; of a function, give its JSON schema" if callable(x) else ""
            raise InputError(f"{what} are mappings, not {type(x).__name__}{hint}")
    return [plain(x) for x in items]


def plain(x: Any) -> Any:
    """A copy of ``x`` in values of JSON's kinds; anything else becomes a placeholder that names its type.

    Raises InputError for what is nested too deeply, or holds itself.
    """
    try:
        return _plain(x)
    except RecursionError:
        raise InputError("messages are nested too deeply, or hold themselves") from None


def _plain(x: Any) -> Any:
    if x is None or type(x) in (str, int, float, bool):
        return x
    for kind in (str, int, float):
        if isinstance(x, kind):
            return kind.__str__(x) if kind is str else kind(x)
    if isinstance(x, Mapping):
        return {_plain(k): _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(_plain, x)) if type(x) in (list, tuple) else list(map(_plain, x))
    if isinstance(x, np.generic):
        return _plain(x.item())
    return f"<{type(x).__name__}>"


class _Failed(Exception):
    """What a template says, or is said of it where its process was ``ended``."""

    def __init__(self, message: str, ended: bool = False) -> None:
        super().__init__(message)
        self.ended = ended


class _Worker:
    """The process that renders, started when it is needed and again where it had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        """The process that started it: one that was forked since starts its own."""
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        try:
            request = marshal.dumps((template, dict(variables)))
        except ValueError:
            raise InputError("messages are nested too deeply") from None
        with self._lock:
            process = self._running()
            try:
                found = self._exchange(process, len(request).to_bytes(8, "little") + request)
            except BaseException:
                self._process = None
                process.kill()
                process.wait()
                raise
        text = found[1:].decode("utf-8", "surrogatepass")
        if found[:1] != b".":
            raise _Failed(text)
        return text

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            if importlib.util.find_spec("jinja2") is None:
                raise ArtifactError("chat templates need the package jinja2: pip install 'wasat[chat]'")
            script = Path(__file__).with_name("jinja.py")
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
            self._process = subprocess.Popen(
                [sys.executable, "-P", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=environment, start_new_session=True,  # Ctrl-C is not for it
            )  # fmt: skip
            self._owner = os.getpid()
            weakref.finalize(self, self._process.kill)
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], request: bytes) -> bytes:
        """Sends a request and returns the answer, both within SECONDS."""
        assert process.stdin is not None
        assert process.stdout is not None
        to, source = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(to, False)
        end, sent, got, needed = time.monotonic() + SECONDS, 0, bytearray(), 8
        with selectors.DefaultSelector() as waiting:
            waiting.register(to, selectors.EVENT_WRITE)
            waiting.register(source, selectors.EVENT_READ)
            while len(got) < needed:
                ready = waiting.select(max(0.0, end - time.monotonic()))
                if not ready:
                    raise _Failed(f"it does not come to an end within {SECONDS:.0f} s", ended=True)
                for key, _ in ready:
                    if key.fd == to:
                        try:
                            sent += os.write(to, request[sent : sent + (1 << 16)])
                        except BrokenPipeError:
                            raise _Failed("it ended the process that renders it", ended=True) from None
                        if sent == len(request):
                            waiting.unregister(to)
                        continue
                    piece = os.read(source, 1 << 16)
                    if not piece:
                        raise _Failed("it ended the process that renders it", ended=True)
                    got += piece
                    if needed == 8 and len(got) >= 8:
                        needed = 8 + int.from_bytes(got[:8], "little")
                        if needed > MOST_TEXT:
                            raise _Failed(f"it writes more than {MOST_TEXT >> 20} MB", ended=True)
        return bytes(got[8:])


_worker = _Worker()
