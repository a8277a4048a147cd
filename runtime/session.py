"""Caches of a batch of rows, and feeding them: prompts of any length in chunks, then one token at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .along import Along
from .arrays import bound, check_indices, check_sizes, fit, known
from .dimensions import extent, extents
from .errors import AGAIN, ArtifactError, ContextLimitError, InputError
from .interface import State, TensorSpec
from .manifest import Indices
from .memory import copied, elements, tensor_of, zeros
from .prompts import MOST_TOKENS
from .values import whole

if TYPE_CHECKING:
    from .model import Model

_FIRST = 256
"""Capacity of full caches when a session opens; it doubles whenever it is used up."""


class Session:
    """Caches for ``batch`` rows. Rows advance independently: each has its own position.

    ``context``: most positions of a row, at most (and by default) the model's. Memory for full caches grows with use. A model
    that takes more than tokens (a translator the text to translate) needs it before the first step: :meth:`encode`. To one
    that sees or hears, :meth:`encode` gives ``media=`` the rows that :meth:`Model.embed` made, for all of the session's rows
    together; the token ``vocab + r`` is row r of them, in any row and any place.
    Raises InputError for a program without ``prefill`` and ``decode``, ContextLimitError for more context than it has.
    """

    def __init__(self, model: Model, batch: int = 1, context: int | None = None) -> None:
        m = model.manifest.interface
        self._names: dict[str, list[str]] = {}
        self._fed = m.tokens
        self._along = Along(model.entry("prefill").inputs, m.tokens)
        self._others: dict[str, TensorSpec] = {}  # what both entries take beside tokens and positions
        for name, own in (("prefill", (m.tokens, "past", "last")), ("decode", (m.tokens, "past"))):
            specs = {i.name: i for i in model.entry(name).inputs}
            others = {k: spec for k, spec in specs.items() if k not in own and k not in self._along.specs}
            if not specs.keys() >= set(own) or (name == "decode" and others != self._others):
                raise ArtifactError(f"entry {name} does not take {', '.join((*own, *self._others))}; {AGAIN}")
            self._names[name], self._others = list(specs), others
        self._logits = _logits([spec.name for spec in model.entry("prefill").outputs])
        self._encoder = model.manifest.entries.get("encode")
        made = {spec.name for spec in self._encoder.outputs} if self._encoder else set()
        self._wanted = {spec.name: spec for spec in self._encoder.inputs} if self._encoder else {}  # by encode()
        self._wanted |= {name: spec for name, spec in self._others.items() if name not in made}
        self._given: dict[str, tuple[Any, np.ndarray]] = {}  # of the others, once they are here
        self._late: dict[str, list[Indices]] = {"prefill": [], "decode": []}  # of them, what a step's sizes bound
        self._each = {name: [i for i in model.entry(name).indices if i.input in self._along.specs] for name in self._late}
        self._rows = next(i.shape[0] for i in model.entry("prefill").inputs if i.name == m.tokens)
        self._model = model
        batch = whole("batch", batch, 1)
        context = None if context is None else whole("context", context)
        limit = context if m.context is None else m.context
        if limit is None:
            raise InputError("the model states no context limit: say how many positions the session is for (context=)")
        if context is not None and not 1 <= context <= limit:
            raise ContextLimitError(f"context={context}: the model takes 1 to {limit} positions")
        self.batch, self.context = batch, context or limit
        self._indices = model.entry("prefill").indices
        self._vocab, self._media = self._vocabulary(m.vocab, {}), m.media
        self._chunk = m.chunk or self.context
        self._weights = model.weights
        self._states = {name: model.entry(name).states for name in ("prefill", "decode")}
        self._functions = {name: model.function(name) for name in ("prefill", "decode")}
        self._checks = {name: model.entry(name).checks for name in ("prefill", "decode")}
        self._granule = m.granule
        self._most = self._rounded(limit)
        self._specs = m.states
        self._latest = {s.name: s for s in self._specs if s.cut == "never"}
        self._caches: dict[str, tuple[Any, np.ndarray]] = {}
        self._capacity = 0
        try:
            self._past_tensor, self._past = zeros("int64", [batch])
            kind = next(i.dtype for i in model.entry("prefill").inputs if i.name == m.tokens)
            self._token_tensor, self._token = zeros(kind, [batch, 1])
            self._written = np.zeros(batch, np.int64)  # one past the furthest position ever written, padding included
            self._reserve(min(_FIRST, self._most))
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
            values |= self._model.run("encode", **{spec.name: values[spec.name] for spec in self._encoder.inputs})
        if self._media is not None and not len(values["media"]):
            raise InputError("media has no rows: without media, feed text alone")
        given = {**self._wanted, **self._others}
        symbols = bound(list(given.values()), [values[name] for name in given], sizes)
        held = [i for i in self._indices if i.input in self._others and known(i, symbols)]
        for index in held:
            check_indices(index, values[index.input], symbols)
        bounds = {(i.input, i.low, i.high) for i in held}
        for name in self._late:
            late = (i for i in self._model.entry(name).indices if i.input in self._others)
            self._late[name] = [i for i in late if (i.input, i.low, i.high) not in bounds]
        most = self._model.manifest.interface.vocab if self._media is None else self._media.vocab + len(values["media"])
        self._vocab = self._vocabulary(most, symbols)
        self._given = {name: (tensor_of(values[name]), values[name]) for name in self._others}
        self.reset()

    def _vocabulary(self, most: int | None, symbols: Mapping[str, int]) -> int | None:
        """How many tokens there are: at most ``most``, and as many as the tables have rows that tokens index."""
        rows = [] if most is None else [most]
        for spec in self._indices:
            if spec.input == self._fed:
                with contextlib.suppress(KeyError):  # sized by what is not given yet
                    rows.append(extent(spec.high, symbols))
        return min(rows, default=None)

    @property
    def along(self) -> Along:
        """What a step takes for each token beside the token."""
        return self._along

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
        beside = self._along.fit(along, self._past, s)
        if s <= self._chunk:
            return self._feed(tokens, counts, beside)
        logits: np.ndarray | None = None
        for start in range(0, int(counts.max()), self._chunk):
            part = np.clip(counts - start, 0, self._chunk)
            width = int(part.max())
            got = self._feed(tokens[:, start : start + width], part, self._along.part(beside, start, start + width))
            logits = got if logits is None else np.where(part[:, None] > 0, got, logits)
        assert logits is not None  # there is a row with at least one token
        return logits

    def reset(self) -> None:
        """Empties all rows. Memory stays."""
        self._past[:] = self._written[:] = 0

    def truncate(self, length: int | Sequence[int] | np.ndarray) -> None:
        """Forgets what each row holds beyond ``length`` positions (one number, or one per row).

        Raises InputError, changing nothing, where a sliding-window cache has already overwritten positions that the next
        token would see.
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
        for spec in self._specs:
            lost = spec.lost(to, self._past, self._written)
            if lost.any():
                row = int(lost.argmax())
                raise InputError(
                    f"row {row} cannot go back to {to[row]} of {self._past[row]} positions: {spec.holds()}; "
                    "reset() and feed the tokens again"
                )
        self._past[:] = to
        self._written[to == 0] = 0

    # -- feeding ---------------------------------------------------------------------------------------------------------
    def _feed(self, tokens: np.ndarray, counts: np.ndarray, along: Mapping[str, np.ndarray]) -> np.ndarray:
        """One call for all rows, with at most ``chunk`` tokens each."""
        s = tokens.shape[1]
        needed = int(self._past.max()) + s
        if needed > self._most:  # padding of one row would lie beyond the largest cache
            return self._feed_one_by_one(tokens, counts, along)
        self._reserve(needed)
        if s == 1:
            self._token[...] = tokens
            name, own = "decode", {self._fed: self._token_tensor, "past": self._past_tensor}
        else:
            last = tensor_of(np.maximum(counts - 1, 0))
            name, own = "prefill", {self._fed: self._tensor_of_tokens(tokens), "past": self._past_tensor, "last": last}
        own |= {k: tensor for k, (tensor, _) in self._given.items()} | {k: tensor_of(x) for k, x in along.items()}
        if self._checks[name] or self._late[name] or self._each[name]:
            others = {k: x for k, (_, x) in self._given.items()} | dict(along)
            self._check(name, {self._fed: tokens, "past": counts, "last": counts, **others})
        out = self._functions[name](*(own[k] for k in self._names[name]), *self._kept[name])
        if self._latest:
            self._move_on(name, out, counts)
        np.maximum(self._written, self._past + s, out=self._written)
        self._past += counts
        return np.from_dlpack(out[self._logits])

    def _move_on(self, name: str, out: Any, counts: np.ndarray) -> None:
        """Takes what a call made of states that hold the latest only; of rows that got no token, they keep what they had."""
        idle = np.flatnonzero(counts == 0)
        for state, tensor in self._latest_of(name, out):
            array = elements(tensor)
            if len(idle):
                rows = (slice(None),) * (state.rows or 0) + (idle,)
                tensor, array = copied(state.dtype, array)
                array[rows] = self._caches[state.name][1][rows]
            self._caches[state.name] = tensor, array
        self._hold()

    def _latest_of(self, name: str, out: Any) -> list[tuple[State, Any]]:
        """What a call made of states that are no caches written in place: those come behind its results."""
        first = len(self._model.entry(name).outputs)
        return [(self._latest[k], out[i]) for i, k in enumerate(self._states[name], first) if k in self._latest]

    def _check(self, name: str, given: Mapping[str, np.ndarray]) -> None:
        """Holds the sizes of what the entry is given against what it takes for granted of them."""
        inputs = self._model.entry(name).inputs
        symbols = bound(inputs, [given[spec.name] for spec in inputs], {"c": self._capacity})
        check_sizes(f"entry {name}", self._checks[name], symbols)
        for index in (*self._late[name], *self._each[name]):
            check_indices(index, given[index.input], symbols)

    def _feed_one_by_one(self, tokens: np.ndarray, counts: np.ndarray, along: Mapping[str, np.ndarray]) -> np.ndarray:
        """Each row by itself, on copies of its caches, so that none needs padding."""
        self._reserve(int((self._past + counts).max()))
        for k, state in self._latest.items():  # to be written, row by row
            self._caches[k] = copied(state.dtype, self._caches[k][1])
        logits: np.ndarray | None = None
        for r in np.flatnonzero(counts):
            n, past = int(counts[r]), int(self._past[r])
            name = "decode" if n == 1 else "prefill"
            row = {k: zeros(self._spec(k).dtype, array[r : r + 1].shape) for k, (_, array) in self._caches.items()}
            for k, (_, array) in row.items():
                array[...] = self._caches[k][1][r : r + 1]
            one = tokens[r : r + 1, :n].astype(self._token.dtype)
            own = {self._fed: one, "past": np.array([past]), "last": np.array([n - 1])}
            own |= self._along.part(self._along.row(along, int(r)), 0, n)
            for k, (_, array) in self._given.items():
                at = [slice(r, r + 1) if d == self._rows else slice(None) for d in self._others[k].shape]
                own[k] = array[tuple(at)]
            if self._checks[name] or self._late[name] or self._each[name]:
                self._check(name, own)
            states = [row[k][0] for k in self._states[name]]
            inputs = [tensor_of(own[k]) for k in self._names[name]]
            made = self._functions[name](*inputs, *states, *self._weights)
            out = np.from_dlpack(made[self._logits])
            latest = {state.name: elements(tensor) for state, tensor in self._latest_of(name, made)}
            for k, (_, array) in row.items():
                self._caches[k][1][r : r + 1] = latest.get(k, array)
            logits = np.zeros((self.batch, out.shape[1]), out.dtype) if logits is None else logits
            logits[r] = out[0]
        self._hold()
        np.maximum(self._written, self._past + counts, out=self._written)
        self._past += counts
        assert logits is not None
        return logits

    def _tensor_of_tokens(self, tokens: np.ndarray) -> Any:
        return tensor_of(tokens if tokens.dtype == self._token.dtype else tokens.astype(self._token.dtype))

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

    # -- caches ----------------------------------------------------------------------------------------------------------
    def _rounded(self, n: int) -> int:
        return -(-n // self._granule) * self._granule

    def _spec(self, name: str) -> State:
        return next(s for s in self._specs if s.name == name)

    def _reserve(self, needed: int) -> None:
        """Caches for at least ``needed`` positions; what full ones hold is copied to larger ones."""
        if needed <= self._capacity:
            return
        self._capacity = min(self._rounded(max(needed, 2 * self._capacity)), self._most)
        for spec in self._specs:
            axis = spec.positions if spec.grows else None
            old = self._caches.get(spec.name)
            if old is not None and axis is None:
                continue
            shape = extents(spec.shape, {"b": self.batch, "c": self._capacity})
            fresh = zeros(spec.dtype, shape)
            if old is not None and axis is not None:
                fresh[1][(slice(None),) * axis + (slice(old[1].shape[axis]),)] = old[1]
            self._caches[spec.name] = fresh
        self._hold()

    def _hold(self) -> None:
        """Settles what entries are called with, beside their inputs."""
        caches = {k: tensor for k, (tensor, _) in self._caches.items()}
        self._kept = {name: (*(caches[k] for k in states), *self._weights) for name, states in self._states.items()}


def _logits(outputs: Sequence[str]) -> int:
    """Which of the outputs is sampled from: the one named logits, or the only one."""
    if "logits" in outputs:
        return outputs.index("logits")
    if len(outputs) != 1:
        raise InputError(f"the model returns {', '.join(outputs) or 'nothing'}; to sample from it, name one of these logits")
    return 0
