"""Text and token ids, by the ``tokenizers`` library; text that arrives one token at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import ArtifactError

_BROKEN = "\ufffd"
"""What decoding puts where bytes are no UTF-8 (yet)."""
_OVERLAP = 8
"""Tokens of the prompt that decoding a continuation looks back on: enough for a character of four one-byte tokens."""


class Tokenizer:
    """The tokenizer of one ``tokenizer.json``. Raises ArtifactError if it cannot be read."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ArtifactError("text needs the package tokenizers: pip install tokenizers, or work with token ids") from None
        try:
            self.library = Library.from_str(path.read_text(encoding="utf-8"))
        except Exception as e:  # the library raises bare Exceptions
            raise ArtifactError(f"{path} cannot be read ({e}); compile the model again with its tokenizer") from None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``; with ``special``, between the tokens that the tokenizer puts around a text (such as BOS)."""
        return list(self.library.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``, special ones left out."""
        return str(self.library.decode(list(tokens)))

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """For the text of tokens that follow ``prompt``."""
        return TextStream(self, prompt)


class TextStream:
    """Text of tokens as they come: whole characters only, and spaces as they stand after the prompt.

    Decoders look at neighbours (one drops the space at the very beginning, one joins bytes to characters), so a token's text
    is the difference between decoding a short window with and without it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_OVERLAP:])
        self._done = len(self._window)
        self._shown = len(tokenizer.decode(self._window).rstrip(_BROKEN))

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_BROKEN):
            return ""
        piece = text[self._shown :]
        # what was new becomes the context of what follows
        del self._window[: self._done]
        self._done = len(self._window)
        self._shown = len(self._tokenizer.decode(self._window))
        return piece

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character show as U+FFFD."""
        piece = self._tokenizer.decode(self._window)[self._shown :]
        self._shown += len(piece)
        return piece


class StopStrings:
    """Cuts a text, as it comes in pieces, before the first of the ``stops``."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._reached = False

    def push(self, piece: str, last: bool = False) -> tuple[str, bool]:
        """What of the text is certain now, and whether a stop string was reached: after that, nothing is.

        What may begin a stop string is held back until more text decides, or the ``last`` piece came.
        """
        if self._reached:
            return "", True
        text = self._held + piece
        found = [at for at in (text.find(s) for s in self._stops) if at >= 0]
        if found:
            self._reached = True
            return text[: min(found)], True
        held = 0 if last else max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
