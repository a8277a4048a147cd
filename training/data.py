"""Token batches from documents: streamed, shuffled, mixed, packed; deterministic, and resumed where they were."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from wasat.ir import WasatError

Batch = dict[str, np.ndarray]


class DataError(WasatError):
    """Data that cannot be: nothing to read, absurd sizes, a state of other data."""


@dataclass(frozen=True)
class Piece:
    """Tokens of a part of a document, and whether the document begins and ends with it."""

    tokens: Sequence[int] | np.ndarray
    begins: bool
    ends: bool


class Documents(Protocol):
    """A finite collection of documents, or pieces of them, that is read one at a time, in any order.

    The same index gives the same tokens.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sequence[int] | np.ndarray | Piece: ...


@dataclass(frozen=True)
class TextFiles:
    """Files in pieces: ``encode`` makes tokens of the text of one (UTF-8; what is none becomes U+FFFD) when it is asked for.

    A file of up to ``size`` bytes is one piece. A larger one is cut at the last end of a line before each multiple of
    ``size``; within a line that is longer than that, at a character. Pieces are shorter than twice ``size``.
    Raises DataError for a size below 4, and OSError for files that are not there.
    """

    paths: tuple[Path, ...]
    encode: Callable[[str], Sequence[int]]
    size: int = 32 * 1024

    def __post_init__(self) -> None:
        if self.size < 4:
            raise DataError(f"pieces of {self.size} bytes: a character may take 4")

    @cached_property
    def _first(self) -> list[int]:
        """The numbers of the files' first pieces, and at the end how many pieces there are."""
        return list(accumulate((max(-(-p.stat().st_size // self.size), 1) for p in self.paths), initial=0))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int, /) -> Piece:
        file = bisect_right(self._first, index) - 1
        at, ends = index - self._first[file], index + 1 == self._first[file + 1]
        with open(self.paths[file], "rb") as f:
            start = self._cut(f, at)
            stop = start + 2 * self.size if ends else self._cut(f, at + 1)
            f.seek(start)
            text = f.read(stop - start).decode("utf-8", errors="replace")
        return Piece(self.encode(text.replace("\r\n", "\n").replace("\r", "\n")), at == 0, ends)

    def _cut(self, f: BinaryIO, number: int) -> int:
        """Where the piece of that number begins, in bytes."""
        if number == 0:
            return 0
        f.seek((number - 1) * self.size)
        near = f.read(self.size + 1)
        cut = near.rfind(b"\n", 0, self.size) + 1
        if not cut:
            starts = (i for i in range(self.size, self.size - 4, -1) if not b"\x80" <= near[i : i + 1] < b"\xc0")
            cut = next(starts, self.size)  # of a character
        return (number - 1) * self.size + cut


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
    document: int
    """Its number in the source, which is ``index`` in the order of the epoch."""
    tokens: np.ndarray
    """i64 [2, n]: tokens, the end among them, and the same as labels."""
    at: int = 0

    @property
    def size(self) -> int:
        return self.tokens.shape[1]


class Packed(Iterator[Batch]):
    """Batches ``tokens`` and ``labels``, i64 [batch, length], endless and without padding; labels are the tokens that follow.

    Each row of the batches reads documents one after the other, the token ``end`` after each, and goes on in the next batch
    where it stopped. A new document is the next one of the source that is furthest behind its weight's share of the tokens;
    each source is shuffled anew every epoch, by ``seed``. One document per row is held in memory.

    A :class:`Piece` is read like a document: ``end`` parts it from the next one, to which it does not belong. As a label, -1
    (no place for :func:`.losses.cross_entropy`) stands for an ``end`` where the document does not end, and for the first
    token where it does not begin.

    Rows differ: no two are at the same token of the same document at once. Where a new document would begin so, it begins in
    the middle of the widest gap between the rows that read it. ``next`` raises DataError where a source has too few tokens.
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
        self._begun: dict[tuple[int, int], set[int]] = {}
        """Of each document, by source and number: where in it each row of the batch that reads it is, counted from column 0."""

    def __next__(self) -> Batch:
        self._begun = {}
        for r in self._rows:
            self._begun.setdefault((r.source, r.document), set()).add(r.at)
        while len(self._rows) < self.batch:
            self._rows.append(self._next_document(0))
        made = np.stack([self._read(i) for i in range(self.batch)])
        return {"tokens": made[:, 0, :-1].copy(), "labels": made[:, 1, 1:].copy()}

    def state(self) -> dict[str, Any]:
        """Where the batches are, as JSON: ``restore`` of it goes on with the same batches as this object."""
        return {
            "of": self._kind(), "taken": [list(t) for t in self._taken], "tokens": list(self._tokens),
            "rows": [[r.source, r.epoch, r.index, r.at, r.size] for r in self._rows],
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
            row = self._document(source, epoch, index)
            if row.size != size:
                raise DataError(f"source {source} has changed: document {index} of epoch {epoch} had {size - 1} tokens")
            row.at = at
            rows.append(row)
        self._rows, self._tokens = rows, list(state["tokens"])
        self._taken = [(epoch, count) for epoch, count in state["taken"]]

    def _read(self, row: int) -> np.ndarray:
        """``length`` tokens of a row, and the one that follows, which the next call begins with; as labels, too."""
        parts, missing = [], self.length + 1
        while True:
            r = self._rows[row]
            part = r.tokens[:, r.at : r.at + missing]
            parts.append(part)
            missing -= part.shape[1]
            if not missing:
                r.at += part.shape[1] - 1
                return np.concatenate(parts, axis=1)
            self._rows[row] = self._next_document(self.length + 1 - missing)

    def _next_document(self, column: int) -> _Row:
        """The document that a row goes on with at a column of the batch."""
        source = min(range(len(self.sources)), key=lambda i: self._tokens[i] / self.sources[i].weight)
        count = len(self.sources[source].documents)
        for _ in range(2 * count):  # every document is among these
            epoch, index = self._taken[source]
            if index == count:
                epoch, index = epoch + 1, 0
            self._taken[source] = (epoch, index + 1)
            row = self._document(source, epoch, index)
            begun = self._begun.setdefault((source, row.document), set())
            start = _free([x + column for x in begun], row.size)
            if start is not None:
                begun.add(start - column)
                row.at = start
                self._tokens[source] += row.size - start
                return row
        raise DataError(f"source {source} has too few tokens for {self.batch} rows that differ; take more text, or fewer rows")

    def _document(self, source: int, epoch: int, index: int) -> _Row:
        """Document ``index`` in the order of the epoch, and the end."""
        documents = self.sources[source].documents
        if self._order.get(source, (-1,))[0] != epoch:
            order = np.random.default_rng([self.seed, source, epoch]).permutation(len(documents))
            self._order[source] = (epoch, order)
        document = int(self._order[source][1][index])
        read = documents[document]
        piece = read if isinstance(read, Piece) else Piece(read, True, True)
        tokens = np.append(np.asarray(piece.tokens, np.int64), self.end)
        labels = tokens.copy()
        if not piece.ends:
            labels[-1] = -1
        if not piece.begins:
            labels[0] = -1
        return _Row(source, epoch, index, document, np.stack([tokens, labels]))


def _free(places: Sequence[int], size: int) -> int | None:
    """A place among ``size`` that is none of ``places``: the first, or the middle of the widest gap; None if there is none."""
    taken = sorted(p for p in places if 0 <= p < size)
    if taken[:1] != [0]:
        return 0
    before, after = max(pairwise([*taken, size]), key=lambda gap: gap[1] - gap[0])
    return before + (after - before) // 2 if after - before > 1 else None


class Iterated:
    """Batches of any iterable, as :func:`wasat.training.loop.train` wants them: from its start again when it ends.

    The state is how many were taken: a run that goes on skips as many, so the iterable must make the same ones in every
    process. An iterator, which cannot begin again, must make enough.
    Raises DataError for what is no batch, for a batch of other sizes than the first, and where no more come.
    """

    def __init__(self, source: Iterable[Mapping[str, Any]]) -> None:
        try:
            self._each = iter(source)
        except TypeError:
            raise DataError(f"batches are an iterable of arrays by input name, not {type(source).__name__}") from None
        self._source, self._once = source, self._each is source
        self._at, self._back = 0, False
        self._last: Batch | None = None
        self._like: dict[str, str] = {}

    def __next__(self) -> Batch:
        if self._back and self._last is not None:
            self._back = False
        else:
            self._last = self._checked(self._take())
        self._at += 1
        return self._last

    def _take(self) -> Mapping[str, Any]:
        for _ in range(1 if self._once else 2):
            for batch in self._each:
                return batch
            if not self._once:
                self._each = iter(self._source)
        many = f"the iterator ended after {self._at} batches, and cannot begin again; give a list, or more of them"
        raise DataError(many if self._once else "the iterable of batches is empty")

    def _checked(self, batch: Mapping[str, Any]) -> Batch:
        if not isinstance(batch, Mapping):
            raise DataError(f"batch {self._at} is a {type(batch).__name__}; expected arrays by input name")
        made = {k: np.asarray(x) for k, x in batch.items()}
        sizes = {k: f"{x.dtype}{list(x.shape)}" for k, x in made.items()}
        self._like = self._like or sizes
        if sizes != self._like:
            raise DataError(f"batch {self._at} is {sizes}, the first was {self._like}; all must be alike: drop a smaller one")
        return made

    def state(self) -> int:
        """How many batches were taken."""
        return self._at

    def restore(self, state: Any, /) -> None:
        """Goes to where ``state`` batches were taken."""
        if state == self._at - 1 and self._last is not None and not self._back:
            self._at, self._back = state, True
            return
        if state < self._at:
            if self._once:
                raise DataError(f"an iterator cannot go back from batch {self._at} to {state}; give something to iterate anew")
            self._each, self._at, self._back = iter(self._source), 0, False
        while self._at < state:
            next(self)
