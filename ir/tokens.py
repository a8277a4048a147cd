"""The tokens of the text form. Errors show file, line and a caret under the place."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import NoReturn

from .dims import DimError
from .errors import IRError, ParseError

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|\#[^\n]*) | (?P<newline>\n)
      | (?P<value>%(?:[A-Za-z_][A-Za-z0-9_.\-]*|"(?:[^"\\]++|\\.)*+"))
      | (?P<graph>@[A-Za-z_][A-Za-z0-9_.\-]*)
      | (?P<string>"(?:[^"\\]++|\\.)*+")
      | (?P<number>-?(?:\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+|inf\b|nan\b))
      | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<sign>//|[-+*%()\[\]{}<>,:=])""",
    re.VERBOSE,
)
_DEPTH = 40
"""How deep sizes, tuples and bodies may be nested: nothing that is printed comes near."""


class Tokens:
    """The tokens of a text, and the place among them."""

    def __init__(self, text: str, file: str) -> None:
        self.text, self.file = text, file
        self.newlines = [m.start() for m in re.finditer("\n", text)]
        self.tokens: list[tuple[str, str, int]] = []
        at = 0
        while at < len(text):
            m = _TOKEN.match(text, at)
            if m is None:
                self.fail(f"unexpected character {text[at]!r}", at)
            kind = str(m.lastgroup)
            if kind not in ("space", "newline"):
                self.tokens.append((kind, m.group(), at))
            at = m.end()
        self.tokens += [("end", "end of text", len(text))] * 3  # as far as the parser looks ahead
        self.i = 0
        self.depth = 0

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        at = self.tokens[self.i][2] if at is None else at
        line = self.text.count("\n", 0, at) + 1
        start = self.text.rfind("\n", 0, at) + 1
        end = self.text.find("\n", at)
        source = self.text[start : end if end >= 0 else len(self.text)]
        column = at - start
        if column > 400:
            source, column = "…" + source[column - 80 :], 81
        if len(source) > column + 400:
            source = source[: column + 399] + "…"
        raise ParseError(f"{self.file}:{line}: {message[:2000]}\n    {source}\n    {' ' * column}^")

    @contextlib.contextmanager
    def nested(self) -> Iterator[None]:
        """One level deeper."""
        if self.depth == _DEPTH:
            self.fail(f"it is nested more than {_DEPTH} deep")
        self.depth += 1
        yield
        self.depth -= 1

    @contextlib.contextmanager
    def placed(self, at: int) -> Iterator[None]:
        """What the IR refuses inside is refused at the place ``at``."""
        try:
            yield
        except ParseError:
            raise
        except IRError as e:
            self.fail(e.message, at)
        except DimError as e:
            self.fail(str(e), at)

    @property
    def kind(self) -> str:
        return self.tokens[self.i][0]

    @property
    def word(self) -> str:
        return self.tokens[self.i][1]

    def next(self) -> str:
        word = self.word
        self.i += self.kind != "end"
        return word

    def accept(self, word: str) -> bool:
        if self.word == word and self.kind != "string":
            self.i += 1
            return True
        return False

    def expect(self, word: str) -> None:
        if not self.accept(word):
            self.fail(f"expected {word!r}, found {self.word!r}")

    def take(self, kind: str, what: str) -> str:
        if self.kind != kind:
            self.fail(f"expected {what}, found {self.word!r}")
        return self.next()

    def value_name(self) -> str:
        name = self.take("value", "a value (%name)")[1:]
        return self.unquoted(name) if name.startswith('"') else name

    def string(self, what: str = "a string") -> str:
        return self.unquoted(self.take("string", what))

    def unquoted(self, text: str) -> str:
        """What the token just taken says, between its quotes."""
        try:
            said = str(json.loads(text, strict=False))
            said.encode()  # half a surrogate pair is no text
        except ValueError as e:
            self.fail(f"this is no string: {e}", self.tokens[self.i - 1][2])
        return said
