"""Conversations: messages in, an answer out. What the caches hold of a conversation is not fed again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import AGAIN, InputError
from .generate import Generation, Row, Settings, continued, most_tokens
from .media import KINDS, Media
from .prompts import Rows
from .sampling import SamplingOptions
from .template import Templates, read_templates
from .values import integer, listed

if TYPE_CHECKING:
    from .model import Model
    from .session import Session

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Reply(Generation):
    """An answer."""

    reused: int
    """Tokens of the prompt that the caches held already."""

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message, to be added to the conversation."""
        return {"role": "assistant", "content": self.text}

    def summary(self) -> str:
        return f"{self.reused} tokens kept, {Generation.summary(replace(self, prompt_tokens=self.prompt_tokens - self.reused))}"


class Chat:
    """One conversation at a time, in caches of one row. A conversation that begins as the last one did goes on from there."""

    def __init__(self, model: Model) -> None:
        self.model = model
        m = model.manifest
        ids = {"bos": m.interface.generation.bos, "eos": next(iter(m.interface.generation.eos), None),
               "pad": m.interface.generation.pad}  # fmt: skip
        library = model.tokenizer.library
        known = {f"{k}_token": library.id_to_token(i) for k, i in ids.items() if i is not None}
        self.templates: Templates = read_templates(model.folder, m.files, {k: v for k, v in known.items() if v})
        self._ends: dict[str, tuple[int, ...]] = {}
        self._session: Session | None = None
        self._held: list[int] = []
        """The tokens in the caches; media as :mod:`wasat.runtime.prompts` numbers them."""
        self._media: np.ndarray | None = None
        self._encoded: dict[Path | Media, np.ndarray] = {}
        """Rows of the media of the last conversation."""
        self._files: dict[tuple[Any, ...], Media] = {}

    # -- prompts ---------------------------------------------------------------------------------------------------------
    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None, *,
        documents: Sequence[Message] | None = None, template: str | None = None, variables: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], np.ndarray | None]:  # fmt: skip
        """Token ids of a conversation up to where the answer begins, and the rows of the media in it.

        The template writes the tokens that begin a text; none is added to them.
        """
        messages = listed("messages", messages)
        text = self._chosen(template, tools)
        written = self.templates.render(messages, tools, documents=documents, template=text, variables=variables)
        ids = self.model.tokenizer.encode(written, special=False)
        media = [self._medium(kind, x) for kind, x in _media(messages)]
        if not media:
            return ids, None
        rows = Rows(self.model, self._encoded)
        ranges = [rows.tokens(m) for m in media]
        self._encoded = rows.by_medium
        return self._placed(ids, [m.kind for m in media], ranges), rows.array

    def _medium(self, kind: str, given: Any) -> Media:
        """The medium of a part of a message; what was given before, and has not changed, is the same."""
        if isinstance(given, Media):
            return given
        if not isinstance(given, (str, Path)):
            return KINDS[kind](given)
        if "://" in str(given) or str(given).startswith("data:"):
            raise InputError(f"{str(given)[:80]}: media are files, their content or arrays, not addresses")
        path = Path(given)
        try:
            key = (kind, path, path.stat().st_mtime_ns, path.stat().st_size)
        except OSError:
            return KINDS[kind](path)  # which says what is wrong
        self._files = {k: m for k, m in self._files.items() if m in self._encoded or k == key}
        return self._files.setdefault(key, KINDS[kind](path))

    def _chosen(self, template: str | None, tools: Sequence[Message] | None) -> str:
        """A template's text. Raises InputError, with what to do, for a model that has none."""
        if template is None and not self.templates.found:
            raise InputError(
                f"{self.model.folder} has no chat template: give one (template=, --template), or {AGAIN} from a folder with "
                "chat_template.jinja or tokenizer_config.json's chat_template; generate() continues plain text"
            )
        return self.templates.choose(template, tools is not None)

    def _placed(self, ids: list[int], kinds: Sequence[str], ranges: Sequence[range]) -> list[int]:
        """Token ids with those of media in place of the tokens that the template wrote for them."""
        written = {kind: self._placeholder(kind) for kind in dict.fromkeys(kinds)}
        of = {token: kind for kind, (_, token) in written.items()}
        found = [of[t] for t in ids if t in of]
        if found != list(kinds):
            names = ", ".join(f"{text} for {kind}" for kind, (text, _) in written.items())
            raise InputError(
                f"the messages hold {', '.join(kinds)}, and the template wrote the places of {', '.join(found) or 'none'} "
                f"({names}): it must write one for each, and no text may spell it"
            )
        left = iter(ranges)
        out: list[int] = []
        for t in ids:
            out += next(left) if t in of else [t]
        return out

    def _placeholder(self, kind: str) -> tuple[str, int]:
        """The text and the token by which templates mark the place of media of a kind."""
        library, tokens = self.model.tokenizer.library, self.templates.tokens
        named = [tokens[k] for k in (f"{kind}_token", *(["boi_token"] if kind == "image" else [])) if k in tokens]
        for text in (*named, f"<{kind}>", f"<|{kind}|>"):
            if (token := library.token_to_id(text)) is not None:
                return text, token
        raise InputError(
            f"the tokenizer has no token for the place of a medium, <{kind}>: add it to the tokenizer, or name another as "
            f"{kind}_token in tokenizer_config.json"
        )

    def ends(self, template: str | None = None, tools: Sequence[Message] | None = None) -> tuple[int, ...]:
        """The token that the template writes after an answer, if it is one token: the model ends an answer by it."""
        text = self._chosen(template, tools)
        if text not in self._ends:
            tokenizer = self.model.tokenizer
            first = tokenizer.encode(after, special=False)[:1] if (after := self.templates.turn_end(text)) else []
            added = tokenizer.library.get_added_tokens_decoder()
            self._ends[text] = tuple(t for t in first if t in added and after.startswith(added[t].content))
        return self._ends[text]

    # -- answers ---------------------------------------------------------------------------------------------------------
    def answer(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None, max_tokens: int | None = None,
        options: SamplingOptions | None = None, *, documents: Sequence[Message] | None = None, template: str | None = None,
        variables: Mapping[str, Any] | None = None, stop: str | Iterable[str] = (), stop_tokens: Iterable[int] = (),
        stream: Callable[[str], None] | None = None, logprobs: int | None = None,
        interrupted: Callable[[], bool] | None = None, **sampling: Any,
    ) -> Reply:  # fmt: skip
        """What :meth:`Model.chat` returns."""
        max_tokens = None if max_tokens is None else integer("max_tokens", max_tokens, 1)
        options = _options(options, sampling)
        if stream is not None and not callable(stream):
            raise InputError(f"stream is called with pieces of text; it must be a function, not {type(stream).__name__}")
        if interrupted is not None and not callable(interrupted):
            raise InputError(f"interrupted is asked before each step; it must be a function, not {type(interrupted).__name__}")
        show = None if stream is None else (lambda _row, piece: stream(piece))
        ends = self.ends(template, tools)
        settings = Settings.of(self.model, options, stop, stop_tokens, show, logprobs, ends)
        ids, media = self.prompt(messages, tools, documents=documents, template=template, variables=variables)
        limit = most_tokens(self.model, "the conversation", len(ids), max_tokens)
        row = Row(0, ids, limit, settings)
        try:
            session = self._opened(len(ids) + limit, media)
            reused = self._rewound(session, ids)
            started = time.perf_counter()
            try:
                logits = self._fed(session, ids[reused:], interrupted)
            except InputError:  # what must come in one step was cut, because it began elsewhere
                if not reused:
                    raise
                session.reset()
                reused, logits = 0, self._fed(session, ids, interrupted)
            if logits is None:
                row.end("interrupt")
                found = row.result(time.perf_counter(), started)
            else:
                (found,) = continued(session, [row], logits, started, interrupted=interrupted)
            self._held = ids + row.tokens  # of which the last may not be fed: the session knows
        except BaseException:
            self.forget()  # what the caches hold is not known
            raise
        return Reply(**{f.name: getattr(found, f.name) for f in fields(found)}, reused=reused)

    def forget(self) -> None:
        """Frees the caches."""
        self._session, self._held, self._media = None, [], None

    def _opened(self, needed: int, media: np.ndarray | None) -> Session:
        """A session with room for so many positions, for which the media are those."""
        m = self.model.manifest.interface
        if self._session is None or self._session.context < needed:
            self.forget()
            self._session = self.model.session(1, m.context or 2 * needed)
        if media is None and self._media is not None:
            self.forget()
            return self._opened(needed, None)
        if media is not None and (self._media is None or not np.array_equal(media, self._media)):
            spec = self.model.manifest.interface.media
            assert spec is not None
            self._held, self._media = [], media
            seen = {"seen": np.arange(len(media))[None]} if spec.seen else {}
            self._session.encode(media=media, **seen)  # which empties the caches
        return self._session

    def _rewound(self, session: Session, ids: Sequence[int]) -> int:
        """Cuts the caches to what they hold of ``ids``, less than all; returns how much that is."""
        same = next((i for i, (a, b) in enumerate(zip(self._held, ids)) if a != b), min(len(self._held), len(ids)))
        to = session.reachable(min(same, len(ids) - 1))
        session.truncate(to)
        return to

    def _fed(self, session: Session, ids: Sequence[int], interrupted: Callable[[], bool] | None) -> np.ndarray | None:
        """The logits after ``ids``; None: interrupted. They are fed in the pieces that the session makes of them."""
        chunk = self.model.manifest.interface.chunk or len(ids)
        logits = None
        for at in range(0, len(ids), chunk):
            if interrupted is not None and interrupted():
                return None
            logits = session.step([ids[at : at + chunk]])
        return logits


def _options(options: SamplingOptions | None, sampling: Mapping[str, Any]) -> SamplingOptions:
    """The options, with those that are given by name."""
    known = [f.name for f in fields(SamplingOptions)]
    if unknown := [k for k in sampling if k not in known]:
        raise InputError(f"chat takes no {', '.join(unknown)}; of sampling there are {', '.join(known)}")
    if options is not None and not isinstance(options, SamplingOptions):
        raise InputError(f"options must be SamplingOptions, not {type(options).__name__}")
    return replace(options or SamplingOptions(), **sampling)


def _media(messages: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Kind and source of the media among the parts of messages, in their order."""
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, (list, tuple)) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in KINDS:
                given = next((x for k in (kind, "path") if (x := part.get(k)) is not None), None)
                if given is None:
                    raise InputError(f'message {i}: a part is {{"type": "{kind}", "{kind}": …}}, with a path, a {kind.title()}')
                yield kind, given
            elif kind not in (None, "text"):
                raise InputError(f"message {i}: there is no part of type {kind!r}; there are text, {', '.join(KINDS)}")
