"""Token batches from documents: streamed, shuffled, mixed, packed; deterministic, and resumed where they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from wasat.ir import WasatError

Batch = dict[str, np.ndarray]


class DataError(WasatError):
    """Data that cannot be: nothing to read, absurd sizes, a state of other data."""


class Documents(Protocol):
    """A finite collection that is read one document at a time, in any order; the same index gives the same tokens."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sequence[int] | np.ndarray: ...


@dataclass(frozen=True)
class TextFiles:
    """Files as documents: ``encode`` makes tokens of a text (UTF-8; what is none becomes U+FFFD) when it is asked for."""

    paths: tuple[Path, ...]
    encode: Callable[[str], Sequence[int]]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Sequence[int]:
        return self.encode(self.paths[index].read_text(encoding="utf-8", errors="replace"))


@dataclass(frozen=True)
class Source:
    """Documents, and their share of the tokens relative to the other sources'."""

    documents: Documents
    weight: float = 1.0


@dataclass
class _Row:
    """Where one row of the batches is: in a document, at a token."""

    source: int
    epoch: int
    index: int
    at: int
    tokens: np.ndarray


class Packed(Iterator[Batch]):
    """Batches ``tokens`` and ``labels``, i64 [batch, length], endless and without padding; labels are the tokens that follow.

    Each row of the batches reads documents one after the other, the token ``end`` after each, and goes on in the next batch
    where it stopped. A new document is the next one of the source that is furthest behind its weight's share of the tokens;
    each source is shuffled anew every epoch, by ``seed``. One document per row is held in memory.
    """

    def __init__(self, sources: Sequence[Source], *, batch: int, length: int, end: int, seed: int = 0) -> None:
        if batch < 1 or length < 1:
            raise DataError(f"batches of {batch} rows of {length} tokens: both must be at least 1")
        if not sources or any(not len(s.documents) or not s.weight > 0 for s in sources):
            raise DataError("needed are sources of at least one document each, with weights above 0")
        self.sources, self.batch, self.length, self.end, self.seed = tuple(sources), batch, length, end, seed
        self._taken = [(0, 0)] * len(sources)
        """Of each source: the epoch, and how many of its documents were taken."""
        self._tokens = [0] * len(sources)
        self._order: dict[int, tuple[int, np.ndarray]] = {}
        self._rows: list[_Row] = []

    def __next__(self) -> Batch:
        if not self._rows:
            self._rows = [self._next_document() for _ in range(self.batch)]
        made = np.stack([self._read(i) for i in range(self.batch)])
        return {"tokens": made[:, :-1].copy(), "labels": made[:, 1:].copy()}

    def state(self) -> dict[str, Any]:
        """Where the batches are, as JSON: ``restore`` of it goes on with the same batches as this object."""
        return {
            "of": self._kind(), "taken": [list(t) for t in self._taken], "tokens": list(self._tokens),
            "rows": [[r.source, r.epoch, r.index, r.at, len(r.tokens)] for r in self._rows],
        }  # fmt: skip

    def _kind(self) -> dict[str, Any]:
        """What decides which batches come."""
        return {
            "seed": self.seed, "rows": self.batch, "length": self.length, "end": self.end,
            "documents": [len(s.documents) for s in self.sources], "weights": [s.weight for s in self.sources],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where ``state`` was taken. Raises DataError if it was taken of other data, or with other sizes or seed."""
        was, now = state["of"], self._kind()
        if other := [f"{k} was {was[k]}, and is {now[k]}" for k in now if was[k] != now[k]]:
            raise DataError(f"the state is of other batches: {', '.join(other)}")
        rows = []
        for source, epoch, index, at, size in state["rows"]:
            tokens = self._document(source, epoch, index)
            if len(tokens) != size:
                raise DataError(f"source {source} has changed: document {index} of epoch {epoch} had {size - 1} tokens")
            rows.append(_Row(source, epoch, index, at, tokens))
        self._rows, self._tokens = rows, list(state["tokens"])
        self._taken = [(epoch, count) for epoch, count in state["taken"]]

    def _read(self, row: int) -> np.ndarray:
        """``length`` tokens of a row, and the one that follows, which the next call begins with."""
        parts, missing = [], self.length + 1
        while True:
            r = self._rows[row]
            part = r.tokens[r.at : r.at + missing]
            parts.append(part)
            missing -= len(part)
            if not missing:
                r.at += len(part) - 1
                return np.concatenate(parts)
            self._rows[row] = self._next_document()

    def _next_document(self) -> _Row:
        source = min(range(len(self.sources)), key=lambda i: self._tokens[i] / self.sources[i].weight)
        epoch, index = self._taken[source]
        if index == len(self.sources[source].documents):
            epoch, index = epoch + 1, 0
        self._taken[source] = (epoch, index + 1)
        tokens = self._document(source, epoch, index)
        self._tokens[source] += len(tokens)
        return _Row(source, epoch, index, 0, tokens)

    def _document(self, source: int, epoch: int, index: int) -> np.ndarray:
        """The tokens of document ``index`` in the order of the epoch, and the end."""
        documents = self.sources[source].documents
        if self._order.get(source, (-1,))[0] != epoch:
            order = np.random.default_rng([self.seed, source, epoch]).permutation(len(documents))
            self._order[source] = (epoch, order)
        tokens = np.asarray(documents[int(self._order[source][1][index])], np.int64)
        return np.append(tokens, self.end)
