"""Text from a model: prompts in, tokens one at a time out, until something says stop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from .errors import ContextLimitError, InputError
from .prompts import Prompt, padded, read_prompts, seen_rows
from .sampling import Sampler, SamplingOptions, TokenLogprob, logprob
from .tokenizer import StopStrings, TextStream
from .values import integer, listed, texts

if TYPE_CHECKING:
    from .model import Model
    from .session import Session

Finish = Literal["stop", "eos", "length", "interrupt"]


@dataclass(frozen=True)
class Generation:
    """How one prompt went on."""

    text: str
    """What follows the prompt, without the stop string; empty where the model has no tokenizer."""
    tokens: list[int]
    """The tokens chosen, those of a stop string included, the one that ended the text (EOS or a stop token) not."""
    finish: Finish
    """``stop``: a stop string or stop token; ``eos``: the model's own end; ``length``: max_tokens; ``interrupt``: a chat was
    told to end."""
    logprobs: list[TokenLogprob] | None
    """One for each of ``tokens``, where asked for."""
    prompt_tokens: int
    steps: int
    """Decode steps: tokens chosen after the first, the one that ended the text included."""
    prefill_seconds: float
    """Reading the prompts, all rows of the batch together; encoding of media not included."""
    decode_seconds: float
    """From the first token to this row's last; sampling, detokenizing and the stream's callback included."""

    def summary(self) -> str:
        """One line: how many tokens, how fast, and what ended it."""
        parts = [f"{self.prompt_tokens} prompt tokens in {self.prefill_seconds:.3f} s"]
        if self.prefill_seconds > 0:
            parts[0] += f" ({self.prompt_tokens / self.prefill_seconds:.0f}/s)"
        parts.append(f"{len(self.tokens)} tokens")
        if self.steps and self.decode_seconds > 0:
            parts[1] += f" in {self.decode_seconds:.3f} s ({self.steps / self.decode_seconds:.1f}/s)"
        return ", ".join([*parts, f"finished by {self.finish}"])


class Row:
    """One prompt being continued."""

    def __init__(self, index: int, prompt: list[int], limit: int, settings: Settings) -> None:
        self.index, self.prompt, self.limit, self.settings = index, prompt, limit, settings
        media = settings.model.manifest.interface.media
        text = prompt if media is None else [t for t in prompt if t < media.vocab]
        self.sampler = Sampler(settings.options, index, text)
        self.stream = settings.model.tokenizer.stream(text) if settings.model.has_tokenizer else None
        self.stops = StopStrings(settings.stop)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text: list[str] = []
        self.finish: Finish | None = None
        self.chosen = 0
        self.ended = 0.0

    def take(self, logits: np.ndarray) -> None:
        """Chooses the next token, and finds out whether it is the last."""
        s = self.settings
        token = self.sampler.sample(logits)
        self.chosen += 1
        if token in s.eos or token in s.stop_tokens:
            return self.end("eos" if token in s.eos else "stop")
        self.tokens.append(token)
        if s.logprobs is not None:
            self.logprobs.append(logprob(logits, token, s.logprobs))
        if self.stream is not None and self._advance(self.stream, token):
            self.end("stop")
        elif len(self.tokens) == self.limit:
            self.end("length")

    def _advance(self, stream: TextStream, token: int) -> bool:
        """Passes on the text of a token, which special ones have not; returns whether a stop string was reached."""
        written = self.settings.model.tokenizer.special.get(token) if self.stops.stops else None
        if written is None:
            return self._show(stream.push(token))
        return self._show(stream.settle()) or self._show(written, hidden=True)

    def _show(self, piece: str, last: bool = False, hidden: bool = False) -> bool:
        """Passes text on, up to the first stop string; returns whether there was one."""
        shown, hit = self.stops.push(piece, last, hidden)
        if shown:
            self.text.append(shown)
            if self.settings.stream is not None:
                self.settings.stream(self.index, shown)
        return hit

    def end(self, finish: Finish) -> None:
        """Settles the row; the text that was held back is certain now."""
        if self.stream is not None and self._show(self.stream.flush(), last=True):
            finish = "stop"
        self.finish, self.ended = finish, time.perf_counter()

    def result(self, read: float, started: float) -> Generation:
        """What came of it, where the prompt was ``read`` from ``started`` on."""
        return Generation(
            "".join(self.text), self.tokens, self.finish or "length", None if self.settings.logprobs is None else self.logprobs,
            len(self.prompt), self.chosen - 1, read - started, self.ended - read,
        )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What all rows share, checked."""

    model: Model
    options: SamplingOptions
    eos: frozenset[int]
    stop_tokens: frozenset[int]
    stop: Sequence[str]
    stream: Callable[[int, str], None] | None
    logprobs: int | None

    @staticmethod
    def of(
        model: Model, options: SamplingOptions, stop: str | Iterable[str], stop_tokens: Iterable[int],
        stream: Callable[[int, str], None] | None, logprobs: int | None, ends: Iterable[int] = (),
    ) -> Settings:  # fmt: skip
        """Raises InputError for what cannot be. ``ends``: tokens that end a text as the model's own EOS does."""
        logprobs = None if logprobs is None else integer("logprobs", logprobs)
        stop = texts("stop", [stop] if isinstance(stop, str) else listed("stop", stop))
        interface = model.manifest.interface
        most = None if interface.vocab is None else interface.vocab - 1
        stop_tokens = [integer("stop_tokens: a token", t, most=most) for t in listed("stop_tokens", stop_tokens)]
        if stream is not None and not callable(stream):
            raise InputError(
                f"stream is called with pieces of text; it must be a function, not {type(stream).__name__}"
            )
        if not isinstance(options, SamplingOptions):
            raise InputError(f"options must be SamplingOptions, not {type(options).__name__}")
        if stop and not model.has_tokenizer:
            raise InputError("stop strings need a tokenizer, which the artifact lacks: use stop_tokens")
        if "" in stop:
            raise InputError("an empty stop string would stop everything; leave it out")
        eos = frozenset([*interface.generation.eos, *ends])
        return Settings(model, options, eos, frozenset(stop_tokens), tuple(stop), stream, logprobs)


def generate(
    model: Model, prompts: str | Iterable[Prompt], max_tokens: int | None, options: SamplingOptions, *,
    stop: str | Iterable[str] = (), stop_tokens: Iterable[int] = (), stream: Callable[[int, str], None] | None = None,
    logprobs: int | None = None, inputs: Mapping[str, np.ndarray] | None = None,
) -> list[Generation]:  # fmt: skip
    """Continues each of ``prompts``: a text; token ids, which are fed as they are; or a list of texts and of pictures, sounds
    and videos (:class:`Image`, :class:`Audio`, :class:`Video`, or the Path of a file, whose kind its content tells), in any
    order. One text may stand for a list of one.

    ``max_tokens``: most tokens for each; None: as many as the context holds. ``stop``: strings before which the text ends;
    special tokens count as they are written. ``stop_tokens``: token ids that end it, beside the model's EOS.
    ``stream(row, piece)`` receives each row's text as soon as it is certain: whole characters, and nothing that a stop string
    may begin with. ``logprobs``: also return each token's log-probability and those of so many likeliest tokens. ``inputs``:
    what the model takes beside tokens, by name, a row for each prompt; a decoder over an encoder's input, for instance. Of
    what it takes for each token, that of the prompts, [rows, longest prompt]: for new tokens, positions count on, and
    everything else (a padding mask, segments) is what it was at the end of the prompt.

    Row r's result is that of the same prompt as row r of any other batch, up to the rounding of differently shaped products.
    Raises InputError for what cannot be done, MediaError for media that cannot be read, ContextLimitError where prompt and
    ``max_tokens`` exceed the context; all before the first step.
    """
    max_tokens = None if max_tokens is None else integer("max_tokens", max_tokens, 1)
    settings = Settings.of(model, options, stop, stop_tokens, stream, logprobs)
    if inputs is not None and not isinstance(inputs, Mapping):
        raise InputError(f"inputs must be arrays by name, not {type(inputs).__name__}")
    texts("the name of an input", inputs or ())
    rows_of_ids, media = read_prompts(model, [prompts] if isinstance(prompts, str) else listed("prompts", prompts))
    if not rows_of_ids:
        return []
    limits = [most_tokens(model, f"prompt {row}", len(ids), max_tokens) for row, ids in enumerate(rows_of_ids)]
    rows = [Row(i, ids, limit, settings) for i, (ids, limit) in enumerate(zip(rows_of_ids, limits))]

    lengths = np.array([len(ids) for ids in rows_of_ids])
    tokens = padded(rows_of_ids, 0)
    session = model.session(len(rows), max(len(ids) + limit for ids, limit in zip(rows_of_ids, limits)))
    given = dict(inputs or {})
    beside = {k: given.pop(k) for k in list(given) if k in session.along.specs}
    if media is not None:
        given["media"] = media
        if model.manifest.interface.media and model.manifest.interface.media.seen:
            given["seen"] = seen_rows(model, rows_of_ids)
    if given:
        session.encode(**given)
    if beside:
        fitted, ends = session.along.fit(beside, session.past, tokens.shape[1]), lengths.copy()
        beside = {k: fitted[k] for k in beside}
    started = time.perf_counter()
    logits = session.step(tokens, lengths, **beside)
    after = (lambda count: session.along.after(beside, ends, count)) if beside else None
    return continued(session, rows, logits, started, after)


def continued(
    session: Session, rows: Sequence[Row], logits: np.ndarray, started: float,
    beside: Callable[[int], Mapping[str, np.ndarray]] | None = None, interrupted: Callable[[], bool] | None = None,
) -> list[Generation]:  # fmt: skip
    """Chooses and feeds tokens until all rows of the session, which ended with these ``logits``, have come to their ends.

    ``beside``: what the model takes for the n-th new token beside it. ``interrupted``: asked before each step.
    """
    read = time.perf_counter()
    lengths = np.zeros(len(rows), np.int64)
    fed = np.zeros((len(rows), 1), np.int64)
    active = rows
    for count in itertools.count(1):
        for row in active:
            row.take(logits[row.index])
        active = [row for row in active if row.finish is None]
        if not active:
            break
        lengths[:] = 0
        for row in active:
            fed[row.index], lengths[row.index] = row.tokens[-1], 1
        if interrupted is not None and interrupted():
            for row in active:
                row.end("interrupt")
            break
        logits = session.step(fed, lengths, **(beside(count) if beside is not None else {}))
    return [r.result(read, started) for r in rows]


def most_tokens(model: Model, what: str, prompt: int, max_tokens: int | None) -> int:
    """How many tokens may follow ``what``, which has ``prompt`` of them."""
    context = model.manifest.interface.context
    if context is None and max_tokens is None:
        raise InputError("the model states no context limit: give max_tokens")
    room = max_tokens if context is None else context - prompt
    assert room is not None
    if room < (max_tokens or 1):
        raise ContextLimitError(
            f"{what} has {prompt} tokens and "
            + (f"max_tokens={max_tokens} more would make {prompt + max_tokens}" if max_tokens else "nothing can follow it")
            + f"; the model's context is {context}: shorten the prompt"
            + (f", or ask for at most {room}" if max_tokens and room > 0 else "")
        )
    return max_tokens or room
