"""Text and token ids, by the ``tokenizers`` library; text that arrives one token at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import ArtifactError, InputError
from .values import integer, listed, texts

_BROKEN = "\ufffd"
"""What decoding puts where bytes are no UTF-8 (yet)."""
_OVERLAP = 8
"""Tokens that decoding a continuation looks back on: more than a character of four one-byte tokens."""


class Tokenizer:
    """The tokenizer of one ``tokenizer.json``. Raises ArtifactError if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ArtifactError("text needs the package tokenizers: pip install tokenizers, or work with token ids") from None
        with refusals(ArtifactError, f"{path} cannot be read ({{}}); compile the model again with its tokenizer"):
            text = path.read_text(encoding="utf-8")
            check_merges(text)
            self.library = Library.from_str(text)
            self.library.no_truncation()  # what is too long is the caller's to know, and nothing is between prompt and answer
            self.library.no_padding()
            self.special = {i: t.content for i, t in self.library.get_added_tokens_decoder().items() if t.special}
            """Tokens that are no text, and how they are written."""
            self._bytes = self._byte_tokens()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``; with ``special``, between the tokens that the tokenizer puts around a text (such as BOS).

        Raises InputError for what is no text, half a surrogate pair included.
        """
        texts("a text", [text])
        with refusals(InputError, "the tokenizer cannot encode the text ({})"):
            return list(self.library.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``, special ones left out. Raises InputError for what is no token id."""
        ids = tokens if isinstance(tokens, list) else _ids(tokens)
        with refusals(InputError, "the tokenizer cannot decode the tokens ({})"):
            return str(self.library.decode(ids))

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """For the text of tokens that follow ``prompt``."""
        return TextStream(self, _ids(prompt))

    def byte_of(self, token: int) -> int | None:
        """The byte that a token <0xNN> stands for where characters without a token of their own are spelled so."""
        return self._bytes.get(token)

    def is_text(self, token: int) -> bool:
        """Whether decoding sees the token: special ones, and ids that the tokenizer does not know, it leaves out."""
        return token not in self.special and self.library.id_to_token(token) is not None

    def _byte_tokens(self) -> dict[int, int]:
        found = {}
        for value in range(256):
            for name in (f"<0x{value:02X}>", f"<0x{value:02x}>"):
                token = self.library.token_to_id(name)
                if token is not None and self.library.decode([token], skip_special_tokens=False) != name:
                    found[token] = value
        return found


def check_merges(text: str) -> None:
    """Raises ValueError for a ``tokenizer.json`` whose merges lack the prefix that words go on by: the library cuts as much off
    them unseen, and ends the process by what is left."""
    if not re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', text):
        return
    model = json.loads(text)["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        return
    prefix = model["continuing_subword_prefix"]
    for merge in model["merges"]:
        second = merge.split(" ")[-1] if isinstance(merge, str) else merge[-1]
        if not second.startswith(prefix):
            raise ValueError(f"continuing_subword_prefix is {prefix!r}, and {second!r} of a merge does not begin so")


@contextmanager
def refusals(error: type[Exception], message: str) -> Iterator[None]:
    """What the library raises, bare Exceptions and Rust's panics, as ``error``."""
    try:
        yield
    except (ArtifactError, InputError):
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise error(message.format(str(e) or type(e).__name__)) from None


def _ids(tokens: Iterable[int]) -> list[int]:
    return [integer("a token", t, most=2**32 - 1) for t in listed("tokens", tokens)]


class TextStream:
    """Text of tokens as they come: whole characters only, and spaces as they stand after the prompt.

    What it shows adds up to the text of prompt and continuation decoded together, without what is the prompt's alone: a
    character that begins in the prompt is the continuation's.

    Decoders look at neighbours: one drops the space at the very beginning, one joins bytes to characters. So a token's text is
    the difference between decoding a short window with and without it. Tokens <0xNN> are one text as long as they follow each
    other: if one of them fits nowhere, all of them show as U+FFFD; they are decoded when the run of them is over.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        window: list[int] = []
        for token in reversed(prompt):
            if tokenizer.is_text(token):
                window.append(token)
                if len(window) >= _OVERLAP and tokenizer.byte_of(token) is None:
                    break
        self._window = window[::-1]
        self._run = next((i for i, t in enumerate(window) if tokenizer.byte_of(t) is None), len(window))
        """Tokens <0xNN> at the window's end, which are not decoded yet."""
        self._given = self._run
        """How many of these are the prompt's."""
        before = tokenizer.decode(self._window[: len(window) - self._run])
        self._broken = before.endswith(_BROKEN)
        """Whether the prompt ends with what may still become a character, and is not shown if it does not."""
        self._shown = len(before) - self._broken

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""
        if not self._tokenizer.is_text(token):
            return ""
        if self._tokenizer.byte_of(token) is not None:
            self._window.append(token)
            self._run += 1
            return ""
        if self._run:
            self._end_run()
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        piece = self._piece(text, text.endswith(_BROKEN))
        if not text.endswith(_BROKEN):
            self._window = [token]  # what was new is the context of what follows
            self._shown = len(self._tokenizer.decode(self._window))
        elif len(self._window) > 2 * _OVERLAP:  # bytes that become no character, one after the other
            self._window = self._window[-_OVERLAP:]
            self._shown = len(self._tokenizer.decode(self._window)) - 1
        return piece

    def settle(self) -> str:
        """The text of a run of tokens <0xNN>, as if it were over, if it is UTF-8."""
        run = self._window[len(self._window) - self._run :]
        if not run or _BROKEN in bytes(self._tokenizer.byte_of(t) or 0 for t in run).decode(errors="replace"):
            return ""
        return self.flush()

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character show as U+FFFD."""
        if self._run:
            self._end_run()
        return self._piece(self._tokenizer.decode(self._window), False)

    def _piece(self, text: str, held: bool) -> str:
        """What is new in the window's ``text``, its last character held back where it may yet change."""
        end = len(text) - held
        if self._broken and end > self._shown:
            self._shown += text[self._shown] == _BROKEN
            self._broken = False
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _end_run(self) -> None:
        """Leaves out what of the run is the prompt's: its whole characters, if it consists of such."""
        start = len(self._window) - self._run
        if self._given:
            run = bytes(self._tokenizer.byte_of(t) or 0 for t in self._window[start:])
            try:
                run.decode()
            except UnicodeDecodeError:
                self._shown = len(self._tokenizer.decode(self._window[:start])) + self._given
            else:
                whole_ones = len(run[: self._given].decode(errors="ignore").encode())
                self._shown = len(self._tokenizer.decode(self._window[: start + whole_ones]))
        self._run = self._given = 0


class StopStrings:
    """Cuts a text, as it comes in pieces, before the first of the ``stops``.

    Special tokens are written out for the comparison, and are no part of the text: a stop string may be one, or hold some.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self._held = ""
        self._hidden: set[int] = set()
        """Places in what is held that are of special tokens."""
        self._reached = False

    def push(self, piece: str, last: bool = False, hidden: bool = False) -> tuple[str, bool]:
        """What of the text is certain now, and whether a stop string was reached: after that, nothing is.

        What may begin a stop string is held back until more text decides, or the ``last`` piece came. ``hidden``: the piece is
        how a special token is written.
        """
        if self._reached:
            return "", True
        text = self._held + piece
        if hidden:
            self._hidden.update(range(len(self._held), len(text)))
        # as it is written, and as it is read: each with its places in the whole
        views: list[tuple[str, Sequence[int]]] = [(text, range(len(text)))]
        if self._hidden:
            places = [i for i in range(len(text)) if i not in self._hidden]
            views.append(("".join(text[i] for i in places), places))
        found = [places[at] for view, places in views for s in self.stops if (at := view.find(s)) >= 0]
        if found:
            self._reached = True
            return self._seen(text, min(found)), True
        starts = [places[len(view) - n] for view, places in views for s in self.stops if (n := _overlap(view, s))]
        held = len(text) if last else min(starts, default=len(text))
        shown = self._seen(text, held)
        self._held, self._hidden = text[held:], {i - held for i in self._hidden if i >= held}
        return shown, False

    def _seen(self, text: str, end: int) -> str:
        """The text before ``end``, without special tokens."""
        return "".join(text[i] for i in range(end) if i not in self._hidden) if self._hidden else text[:end]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
