"""Prompts: texts, token ids, or lists in which texts and media follow each other, as token ids and rows of media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import ContextLimitError, InputError
from .media import Media
from .tokenizer import Tokenizer
from .values import listed

if TYPE_CHECKING:
    from .model import Model

MOST_TOKENS = 2**31
"""Of a model that does not say how many it has."""
Prompt = str | Sequence[int] | Sequence[str | Path | Media]
"""A text; token ids, fed as they are; or parts: texts, and pictures, sounds and videos, of which a Path is the file."""


def read_prompts(model: Model, prompts: Sequence[Prompt]) -> tuple[list[list[int]], np.ndarray | None]:
    """Token ids of every prompt, and the rows f32[m, dim] of all media in them (None: there are none).

    An empty prompt becomes BOS where the model has it. What stands in several places is encoded once. Raises InputError for
    what is no prompt, MediaError for media that cannot be read.
    """
    for prompt in prompts:
        if isinstance(prompt, (int, np.integer)):
            raise InputError("prompts is a list of prompts: put token ids into a list of their own, [[1, 2, 3]]")
        if isinstance(prompt, (Path, Media)):
            raise InputError("prompts is a list of prompts: put media and text into a list of their own, [[image, 'text']]")
    rows = Rows(model)
    out = []
    for i, prompt in enumerate(prompts):
        ids = _ids(model, i, prompt, rows)
        if not ids and model.manifest.interface.generation.bos is None:
            raise InputError(f"prompt {i} is empty, and the model has no token to begin a text with")
        out.append(ids or [int(model.manifest.interface.generation.bos or 0)])
    return out, rows.array


def text_inputs(model: Model, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """What an entry over whole texts takes: ``tokens`` i64[b, s], ``last`` i64[b], and ``media`` and ``seen`` for models that
    have them.

    Raises as :func:`read_prompts`; InputError for a token of no vocabulary; ContextLimitError for a prompt longer than the
    context.
    """
    ids, media = read_prompts(model, prompts)
    spec, context = model.manifest.interface.media, model.manifest.interface.context
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if context is not None and len(ids[longest]) > context:
        raise ContextLimitError(
            f"prompt {longest} has {len(ids[longest])} tokens; the model's context is {context}: shorten the prompt"
        )
    vocab = spec.vocab + (0 if media is None else len(media)) if spec else model.manifest.interface.vocab
    for i, row in enumerate(ids):
        if min(row) < 0 or (vocab is not None and max(row) >= vocab):
            raise InputError(f"prompt {i} holds a token outside the vocabulary of {vocab}")
    made = {"tokens": padded(ids, 0), "last": np.array([len(row) - 1 for row in ids])}
    if spec is not None:
        made["media"] = np.zeros((1, spec.dim), np.float32) if media is None else media
        made["seen"] = seen_rows(model, ids)
    return made


def seen_rows(model: Model, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """The rows of media that each prompt holds, in its order: i64[b, t], t >= 1, filled up with -1."""
    vocab = model.manifest.interface.media.vocab if model.manifest.interface.media else 0
    return padded([list(dict.fromkeys(t - vocab for t in ids if t >= vocab)) for ids in prompts], -1)


def padded(rows: Sequence[Sequence[int]], value: int) -> np.ndarray:
    """Rows of different lengths as i64[len(rows), n], n >= 1, filled up with ``value`` on the right."""
    out = np.full((len(rows), max(1, *map(len, rows))), value, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


class Rows:
    """Rows of media, each medium encoded where it first appears; ``encoded`` has those of media that were before."""

    def __init__(self, model: Model, encoded: Mapping[Path | Media, np.ndarray] | None = None) -> None:
        self.model, self._encoded = model, encoded or {}
        self.all: list[np.ndarray] = []
        self._tokens: dict[Path | Media, range] = {}  # media are equal only to themselves
        self._next = model.manifest.interface.media.vocab if model.manifest.interface.media else 0

    def tokens(self, part: Path | Media) -> range:
        """The tokens that stand for ``part``."""
        if part not in self._tokens:
            rows = self._encoded[part] if part in self._encoded else self.model.embed(part)
            self._tokens[part] = range(self._next, self._next + len(rows))
            self._next += len(rows)
            self.all.append(rows)
        return self._tokens[part]

    @property
    def array(self) -> np.ndarray | None:
        """All of them; None: there are none."""
        return np.concatenate(self.all) if self.all else None

    @property
    def by_medium(self) -> dict[Path | Media, np.ndarray]:
        """The rows of each medium."""
        return dict(zip(self._tokens, self.all))


def _ids(model: Model, index: int, prompt: Prompt, rows: Rows) -> list[int]:
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt)
    prompt = listed(f"prompt {index}", prompt)
    if not any(isinstance(part, (str, Path, Media)) for part in prompt):
        vocab = model.manifest.interface.media.vocab if model.manifest.interface.media else model.manifest.interface.vocab
        ids = [_id(index, part) for part in prompt]
        wrong = next((t for t in ids if not 0 <= t < (MOST_TOKENS if vocab is None else vocab)), None)
        if wrong is not None:
            raise InputError(f"prompt {index}: token {wrong} is outside the vocabulary of {vocab or MOST_TOKENS}")
        return ids
    ids = []
    for part in prompt:
        if isinstance(part, str):
            ids += model.tokenizer.encode(part, special=False)
        elif isinstance(part, (Path, Media)):
            ids += rows.tokens(part)
        else:
            raise InputError(
                f"prompt {index}: a part is a text, a Path, an Image, Audio or Video, not {type(part).__name__}; "
                "arrays go into one of those, Image(array)"
            )
    before, after = _around(model.tokenizer) if any(isinstance(part, str) for part in prompt) else ([], [])
    return [*before, *ids, *after]


def _id(index: int, x: object) -> int:
    if isinstance(x, (int, np.integer)) and not isinstance(x, bool):
        return int(x)
    raise InputError(f"prompt {index}: {type(x).__name__} is neither a token id nor a part; arrays go into Image(array)")


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    bare, whole = (tokenizer.encode("a", special=special) for special in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]
