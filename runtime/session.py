"""A batch of rows that are fed: prompts of any length in chunks, then one token at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .along import Along
from .arrays import bound, check_indices, check_sizes, fit, known
from .dimensions import extent
from .engine import Engine
from .errors import AGAIN, ArtifactError, ContextLimitError, InputError
from .interface import TensorSpec
from .manifest import Indices
from .prompts import MOST_TOKENS
from .slots import Slots
from .values import integer

_FIRST = 256
"""Capacity of growing states when a session opens; it doubles whenever it is used up."""


@dataclass
class _Window:
    """Some of a session's rows, which entries are called for: they are in slots side by side."""

    key: bytes
    """Which rows of the session are live."""
    first: int
    """The first slot."""
    rows: np.ndarray | slice
    """In the order of their slots; a slice: all rows of the session, in their order."""
    past: Any
    token: Any
    others: dict[str, np.ndarray]
    """What entries take beside tokens and positions, of these rows."""
    given: dict[str, Any]
    """The same as tensors."""
    kept: dict[str, Any]
    """The states."""
    decode: tuple[Any, ...] | None
    """What ``decode`` is called with, if that is the same at each step."""


class Session:
    """Caches for ``batch`` rows. Rows advance independently: each has its own position.

    ``context``: most positions of a row, at most (and by default) the model's. Memory for full caches grows with use. A model
    that takes more than tokens (a translator the text to translate) needs it before the first step: :meth:`encode`. To one
    that sees or hears, :meth:`encode` gives ``media=`` the rows that :meth:`Model.embed` made, for all of the session's rows
    together; the token ``vocab + r`` is row r of them, in any row and any place.
    Raises InputError for a program without ``prefill`` and ``decode``, ContextLimitError for more context than it has.
    """

    def __init__(self, engine: Engine, batch: int = 1, context: int | None = None) -> None:
        m = engine.manifest.interface
        if "prefill" not in engine.manifest.entries and engine.manifest.no_cache:
            raise InputError(
                f"{engine.folder} has no entry 'prefill'; it has {', '.join(engine.manifest.entries)}: sessions and generate() "
                f"need caches, and it has none, because {engine.manifest.no_cache}\nrun() calls what it has"
            )
        self._names: dict[str, list[str]] = {}
        self._fed = m.tokens
        self.along = Along(engine.entry("prefill").inputs, m.tokens)
        """What a step takes for each token beside the token."""
        self._others: dict[str, TensorSpec] = {}  # what both entries take beside tokens and positions
        for name, own in (("prefill", (m.tokens, "past", "last")), ("decode", (m.tokens, "past"))):
            specs = {i.name: i for i in engine.entry(name).inputs}
            others = {k: spec for k, spec in specs.items() if k not in own and k not in self.along.specs}
            if not specs.keys() >= set(own) or (name == "decode" and others != self._others):
                raise ArtifactError(f"entry {name} does not take {', '.join((*own, *self._others))}; {AGAIN}")
            self._names[name], self._others = list(specs), others
        outputs = [spec.name for spec in engine.entry("prefill").outputs]
        self._logits = _logits(outputs, m.cut)
        self._cut = outputs.index(m.cut) if m.cut in outputs else None
        self._encoder = engine.manifest.entries.get("encode")
        made = {spec.name for spec in self._encoder.outputs} if self._encoder else set()
        self._wanted = {spec.name: spec for spec in self._encoder.inputs} if self._encoder else {}  # by encode()
        self._wanted |= {name: spec for name, spec in self._others.items() if name not in made}
        self._given: dict[str, np.ndarray] = {}  # of the others, once they are here
        self._late: dict[str, list[Indices]] = {"prefill": [], "decode": []}  # of them, what a step's sizes bound
        self._each = {name: [i for i in engine.entry(name).indices if i.input in self.along.specs] for name in self._late}
        self._rows = next(i.shape[0] for i in engine.entry("prefill").inputs if i.name == m.tokens)
        self._engine, self._memory = engine, engine.memory
        batch = integer("batch", batch, 1)
        context = None if context is None else integer("context", context)
        limit = context if m.context is None else m.context
        if limit is None:
            raise InputError("the model states no context limit: say how many positions the session is for (context=)")
        if context is not None and not 1 <= context <= limit:
            raise ContextLimitError(f"context={context}: the model takes 1 to {limit} positions")
        if isinstance(self._rows, int) and batch != self._rows:
            raise InputError(f"the program is for {self._rows} rows; the session cannot be for {batch}")
        self.batch, self.context, self._limit = batch, context or limit, limit
        self._indices = engine.entry("prefill").indices
        self._vocab, self._media = self._vocabulary(m.vocab, {}), m.media
        self._chunk = m.chunk or self.context
        self._fixed = isinstance(self._rows, int)
        self._returned: dict[str, list[tuple[int, str]]] = {}
        self._weights = {name: engine.weights_of(name) for name in self._names}
        self._states = {name: engine.entry(name).states for name in self._names}
        self._functions = {name: engine.function(name) for name in self._names}
        self._checks = {name: engine.entry(name).checks for name in self._names}
        self._integers = next(i.dtype for i in engine.entry("decode").inputs if i.name == m.tokens)
        try:
            self._slots = Slots(m.states, batch, m.granule, engine.weights, engine.memory)
            self._most = self._slots.rounded(limit)
            self._slots.reserve(min(self._slots.rounded(_FIRST), self._most))
            self._past = np.zeros(batch, np.int64)
            self._written = np.zeros(batch, np.int64)  # one past the furthest position ever written, padding included
            self._every = np.arange(batch)
            self._row = np.arange(batch)  # in each slot
            # of each row, from where to where positions came in one step, if some of them may see later ones
            self._whole: list[list[tuple[int, int]]] = [[] for _ in range(batch)]
            self._window: _Window | None = None
        except (MemoryError, OSError, OverflowError, ValueError) as e:
            raise InputError(f"batch is {batch}, for whose caches there is no memory ({e}): take fewer rows") from None
        if m.media is not None and self._wanted.keys() == {"media", *(["seen"] if m.media.seen else [])}:
            nothing = {"media": np.zeros((1, m.media.dim), np.float32), "seen": np.full((batch, 1), -1)}
            self.encode(**{name: nothing[name] for name in self._wanted})
            self._vocab = m.media.vocab  # until there are media, one row that no token names

    def encode(self, **inputs: Any) -> None:
        """Gives the model what it takes beside tokens, one row for each of the session's, and empties all rows.

        ``media=`` goes with ``seen=`` i64[batch, t] where the model attends to media by themselves: the rows of media that
        each row of the session sees, -1 for none.

        Runs the entry ``encode``, where there is one, once; its results serve all steps. Raises InputError for arrays that
        are missing, unknown or do not fit.
        """
        sizes = {self._rows: self.batch} if isinstance(self._rows, str) else {}
        values = dict(zip(self._wanted, fit("encode", list(self._wanted.values()), inputs, sizes)))
        if self._encoder:
            values |= self._engine.run("encode", **{spec.name: values[spec.name] for spec in self._encoder.inputs})
        if self._media is not None and not len(values["media"]):
            raise InputError("media has no rows: without media, feed text alone")
        given = {**self._wanted, **self._others}
        symbols = bound(list(given.values()), [values[name] for name in given], sizes)
        held = [i for i in self._indices if i.input in self._others and known(i, symbols)]
        for index in held:
            check_indices(index, values[index.input], symbols)
        bounds = {(i.input, i.low, i.high) for i in held}
        for name in self._late:
            late = (i for i in self._engine.entry(name).indices if i.input in self._others)
            self._late[name] = [i for i in late if (i.input, i.low, i.high) not in bounds]
        most = self._engine.manifest.interface.vocab if self._media is None else self._media.vocab + len(values["media"])
        self._vocab = self._vocabulary(most, symbols)
        self._given = {name: values[name] for name in self._others}
        self.reset()
        self._window = None

    def _vocabulary(self, most: int | None, symbols: Mapping[str, int]) -> int | None:
        """How many tokens there are: at most ``most``, and as many as the tables have rows that tokens index."""
        rows = [] if most is None else [most]
        for spec in self._indices:
            if spec.input == self._fed:
                with contextlib.suppress(KeyError):  # sized by what is not given yet
                    rows.append(extent(spec.high, symbols))
        return min(rows, default=None)

    @property
    def past(self) -> np.ndarray:
        """How many positions each row holds: i64[batch]."""
        return self._past.copy()

    def step(
        self, tokens: np.ndarray | Sequence[Sequence[int]], lengths: np.ndarray | Sequence[int] | None = None, **along: Any
    ) -> np.ndarray:
        """Appends tokens [b, s] to the rows; returns the logits f32[b, vocab] after each row's last one.

        ``lengths`` [b]: how many of its s tokens each row has (the rest is padding, on the right); a row with 0 stays as it
        is, and its logits mean nothing. ``along``: what else the model takes for each token, by name, and like the tokens its
        new part (a padding mask, segments); positions may be left out where they count 0, 1, ..

        Raises ContextLimitError, before anything is written, where a row would be too long; InputError for tokens that are
        none of the vocabulary, and for what of ``along`` is missing or does not fit.
        """
        tokens = self._tokens(tokens)
        if len(self._given) < len(self._others):
            wanted = ", ".join(f"{name} {spec.dtype}{list(spec.shape)}" for name, spec in self._wanted.items())
            raise InputError(f"the model takes more than tokens: {wanted}; generate(inputs=), --input or encode() give it that")
        s = tokens.shape[1]
        counts = np.full(self.batch, s) if lengths is None else self._lengths(lengths, s)
        longest = int((self._past + counts).max())
        if longest > self.context:
            row = int((self._past + counts).argmax())
            raise ContextLimitError(
                f"row {row} holds {self._past[row]} tokens and {counts[row]} more make {longest}; the session's context is "
                f"{self.context}: feed less, truncate() or reset()"
            )
        beside = self.along.fit(along, self._past, s)
        if s <= self._chunk:
            return self._feed(tokens, counts, beside)
        logits: np.ndarray | None = None
        for start in range(0, int(counts.max()), self._chunk):
            part = np.clip(counts - start, 0, self._chunk)
            width = int(part.max())
            got = self._feed(tokens[:, start : start + width], part, self.along.part(beside, start, start + width))
            logits = got if logits is None else np.where(part[:, None] > 0, got, logits)
        assert logits is not None  # there is a row with at least one token
        return logits

    def reset(self) -> None:
        """Empties all rows. Memory stays."""
        self._past[:] = self._written[:] = 0
        self._whole = [[] for _ in range(self.batch)]
        self._slots.clear(np.arange(self.batch))

    def truncate(self, length: int | Sequence[int] | np.ndarray) -> None:
        """Forgets what each row holds beyond ``length`` positions (one number, or one per row).

        Raises InputError, changing nothing, where a sliding-window cache has already overwritten positions that the next
        token would see; and, of a model some of whose tokens see each other, within what came in one step.
        """
        try:
            given = np.asarray(length)
            to = np.broadcast_to(given, self._past.shape).astype(np.int64)
        except (ValueError, TypeError, OverflowError):
            given = np.asarray(None)
        if given.dtype.kind not in "iu":
            raise InputError(f"length is a whole number, or one for each of {self.batch} rows; given: {length!r}")
        if (to < 0).any() or (to > self._past).any():
            raise InputError(f"rows hold {self._past.tolist()} positions; they cannot be cut to {to.tolist()}")
        for spec in self._slots.states:
            lost = spec.lost(to, self._past, self._written)
            if lost.any():
                row = int(lost.argmax())
                raise InputError(
                    f"row {row} cannot go back to {to[row]} of {self._past[row]} positions: {spec.holds()}; "
                    "reset() and feed the tokens again"
                )
        for row, n in enumerate(to.tolist()):
            if whole := next((w for w in self._whole[row] if w[0] < n < w[1]), None):
                raise InputError(
                    f"row {row} cannot go back to {n} of {self._past[row]} positions: {whole[0]} to {whole[1] - 1} came in one "
                    "step, and the first of them may have seen the rest; go back to where a step began or ended"
                )
        for row, n in enumerate(to.tolist()):
            self._whole[row] = [w for w in self._whole[row] if w[1] <= n]
        emptied = (to == 0) & (self._past > 0)
        if emptied.any():
            self._slots.clear(np.flatnonzero(emptied[self._row]))
        self._past[:] = to
        self._written[to == 0] = 0

    def reachable(self, length: int, row: int = 0) -> int:
        """The most positions, at most ``length``, that :meth:`truncate` can cut the row to; 0 can always be reached."""
        length, row = integer("length", length), integer("row", row, most=self.batch - 1)
        to = min(length, int(self._past[row]))
        to = next((w[0] for w in self._whole[row] if w[0] < to < w[1]), to)
        at = np.full(self.batch, to)
        return 0 if any(s.lost(at, self._past, self._written)[row] for s in self._slots.states) else to

    # -- feeding ---------------------------------------------------------------------------------------------------------
    def _feed(self, tokens: np.ndarray, counts: np.ndarray, along: Mapping[str, np.ndarray]) -> np.ndarray:
        """At most ``chunk`` tokens of each row. Rows without any are not computed, and stay as they are."""
        needed = int(self._past[self._over(counts).rows].max()) + tokens.shape[1]
        if needed <= (self._most if self._fixed and self.batch > 1 else self._limit):
            w, found = self._call(tokens, counts, along, needed)
            if isinstance(w.rows, slice):
                return found
            logits = np.zeros((self.batch, *found.shape[1:]), found.dtype)
            logits[w.rows] = found
            return logits
        live = np.flatnonzero(counts)
        if self._fixed and self.batch > 1:
            raise ContextLimitError(f"padding would lie beyond the {self._most} positions of a row: feed fewer tokens a time")
        logits = np.zeros(0)
        for r in live:  # padding of one row may lie beyond the positions that the model knows: each by itself
            n = int(counts[r])
            own = self._feed(tokens[:, :n], np.where(self._every == r, counts, 0), self.along.part(along, 0, n))
            logits = np.zeros_like(own) if r == live[0] else logits
            logits[r] = own[r]
        return logits

    def _call(
        self, tokens: np.ndarray, counts: np.ndarray, along: Mapping[str, np.ndarray], needed: int
    ) -> tuple[_Window, np.ndarray]:
        """One call for the rows that have tokens, which need room for so many positions; returns its logits."""
        s = tokens.shape[1]
        self._reserve(needed)
        w = self._over(counts)
        tokens, counts = tokens[w.rows], counts[w.rows]
        if along and not isinstance(w.rows, slice):
            along = self.along.rows(along, w.rows)
        before = self._past[w.rows].copy()
        w.past.set(before)
        if s == 1:
            name, own = "decode", {self._fed: w.token.tensor}
            w.token.set(tokens)
        else:
            last = self._memory.tensor_of(np.maximum(counts - 1, 0))
            name, own = "prefill", {self._fed: self._memory.tensor_of(tokens.astype(self._integers, copy=False)), "last": last}
        if w.decode is not None and s == 1:
            args = w.decode
        else:
            own |= {k: self._memory.tensor_of(x) for k, x in along.items()}
            args = self._args(name, {**w.given, "past": w.past.tensor, **own}, w.kept)
        if self._checks[name] or self._late[name] or self._each[name]:
            self._check(name, {**w.others, **along, self._fed: tokens, "past": counts, "last": counts})
        try:
            out = self._functions[name](*args)
        except BaseException as e:
            self._lost(w, e)
            raise
        self._written[w.rows] = np.maximum(self._written[w.rows], before + s)
        if self._cut is not None:
            self._check_cut(self._memory.array_of(out[self._cut]) & (counts > 0), w)
        found = self._memory.array_of(out[self._logits])
        if (returned := self._returned.get(name)) is None:
            returned = self._returned[name] = self._elsewhere(name, out, w)
        for at, state in returned:
            self._slots.put(state, w.first, self._memory.array_of(out[at]), None if counts.all() else counts > 0)
        if self._cut is not None and s > 1:  # what they hold depends on each other: none goes without the rest
            for row, first, n in zip(self._every[w.rows].tolist(), before.tolist(), counts.tolist()):
                self._whole[row] += [(first, first + n)] if n > 1 else []
        self._past[w.rows] += counts
        return w, found

    def _lost(self, w: _Window, e: BaseException) -> None:
        """Empties the rows of a call that failed or was interrupted on its way, where states are written in place: they are
        neither the old nor the new any more. Raises InputError, which says so, for what failed.
        """
        if not any(s.donated for s in self._slots.states):
            return
        rows = self._every[w.rows]
        self._slots.clear(np.flatnonzero(np.isin(self._row, rows)))
        self._past[rows] = self._written[rows] = 0
        for row in rows.tolist():
            self._whole[row] = []
        if isinstance(e, Exception):
            said = f"rows {rows.tolist()} are empty now, their states having been written over: feed them again"
            raise InputError(f"{e}; {said}") from e

    def _check_cut(self, cut: np.ndarray, w: _Window) -> None:
        """Raises InputError for rows in which what sees each other was cut: they hold what they held before."""
        if cut.any():
            row = int(np.arange(self.batch)[w.rows][cut.argmax()])
            raise InputError(
                f"row {row} holds {self._past[row]} tokens, of which some see the new ones: what sees each other (a prefix, a "
                f"picture) is to come in one step, of at most {self._chunk} tokens; truncate() to before it, and feed it whole"
            )

    def _elsewhere(self, entry: str, out: Any, w: _Window) -> list[tuple[int, str]]:
        """States that an entry does not write in place: where among what it returns they are."""
        first = len(self._engine.entry(entry).outputs)
        places = enumerate(self._states[entry], first)
        return [(i, k) for i, k in places if i < len(out) and out[i].data_ptr() != w.kept[k].data_ptr()]

    def _args(self, entry: str, inputs: Mapping[str, Any], states: Mapping[str, Any]) -> tuple[Any, ...]:
        """What an entry is called with."""
        own = [inputs[k] for k in self._names[entry]]
        return (*own, *(states[k] for k in self._states[entry]), *self._weights[entry])

    def _check(self, name: str, given: Mapping[str, np.ndarray]) -> None:
        """Holds the sizes of what the entry is given against what it takes for granted of them."""
        inputs = self._engine.entry(name).inputs
        symbols = bound(inputs, [given[spec.name] for spec in inputs], {"c": self._slots.capacity})
        check_sizes(f"entry {name}", self._checks[name], symbols)
        for index in (*self._late[name], *self._each[name]):
            check_indices(index, given[index.input], symbols)

    # -- rows and their slots --------------------------------------------------------------------------------------------
    def _reserve(self, needed: int) -> None:
        """Room for so many positions."""
        if needed > self._slots.capacity:
            self._slots.reserve(min(self._slots.rounded(max(needed, 2 * self._slots.capacity)), self._most))
            self._window = None

    def _over(self, counts: np.ndarray) -> _Window:
        """The window of the rows that have tokens: most often, the one of the last call."""
        live = counts > 0
        key = live.tobytes()
        if self._window is None or self._window.key != key:
            self._window = self._opened(self._every if self._fixed else np.flatnonzero(live), key)
        return self._window

    def _opened(self, rows: np.ndarray, key: bytes) -> _Window:
        n, first = len(rows), self._side_by_side(rows)
        order = self._row[first : first + n].copy()
        others = {k: self._of(order, self._others[k], x) for k, x in self._given.items()}
        given = {k: self._memory.tensor_of(x) for k, x in others.items()}
        past, token = self._memory.zeros("int64", [n]), self._memory.zeros(self._integers, [n, 1])
        kept = self._slots.tensors(first, n)
        own = {**given, self._fed: token.tensor, "past": past.tensor}
        decode = None if self.along.specs else self._args("decode", own, kept)
        whole_ = n == self.batch and bool((order == self._every).all())
        return _Window(key, first, slice(None) if whole_ else order, past, token, others, given, kept, decode)

    def _side_by_side(self, rows: np.ndarray) -> int:
        """Brings rows into slots side by side, where most of them are already; returns the first slot. Each that is not there
        changes places with one that is and need not be."""
        n, live, slots = len(rows), np.isin(self._row, rows), np.arange(self.batch)
        there = np.convolve(live, np.ones(n, np.int64), "valid")
        first = max((i for i in range(len(there)) if not i or self._slots.may_start(i)), key=lambda i: int(there[i]))
        inside = (slots >= first) & (slots < first + n)
        for a, b in zip(np.flatnonzero(inside & ~live).tolist(), np.flatnonzero(live & ~inside).tolist()):
            self._slots.swap(a, b, int(self._written[self._row[[a, b]]].max()))
            self._row[[a, b]] = self._row[[b, a]]
        return first

    def _of(self, rows: np.ndarray, spec: TensorSpec, x: np.ndarray) -> np.ndarray:
        """What an array that is given for all rows holds for some."""
        for axis, d in enumerate(spec.shape):
            if d == self._rows and isinstance(d, str):
                x = np.take(x, rows, axis)
        return x

    # -- what callers give -----------------------------------------------------------------------------------------------
    def _tokens(self, tokens: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
        try:
            ids = np.asarray(tokens)
        except ValueError:
            raise InputError("rows of tokens differ in length: pad them on the right and give lengths") from None
        if ids.ndim != 2 or len(ids) != self.batch or not ids.shape[1] or ids.dtype.kind not in "iu":
            raise InputError(f"tokens must be integers [{self.batch}, s] with s >= 1, not {ids.dtype}{list(ids.shape)}")
        low, high = int(ids.min()), int(ids.max())
        vocab = MOST_TOKENS if self._vocab is None else self._vocab
        if low < 0 or high >= vocab:
            raise InputError(f"token {low if low < 0 else high} is outside the vocabulary of {vocab}")
        return ids if ids.dtype == np.int64 else ids.astype(np.int64)

    def _lengths(self, lengths: Sequence[int] | np.ndarray, s: int) -> np.ndarray:
        try:
            counts = np.asarray(lengths)
        except ValueError:  # rows of different lengths
            counts = np.asarray(None)
        if counts.shape != (self.batch,) or counts.dtype.kind not in "iu" or counts.min() < 0 or not 0 < counts.max() <= s:
            raise InputError(f"lengths must be {self.batch} whole numbers from 0 to {s}, not all 0; given: {lengths!r}")
        return counts.astype(np.int64)

def _logits(outputs: Sequence[str], cut: str) -> int:
    """Which of the outputs is sampled from: the one named logits, or the only one beside ``cut``."""
    if "logits" in outputs:
        return outputs.index("logits")
    if len([name for name in outputs if name != cut]) != 1:
        raise InputError(f"the model returns {', '.join(outputs) or 'nothing'}; to sample from it, name one of these logits")
    return next(i for i, name in enumerate(outputs) if name != cut)
