"""A loaded artifact: sessions and generation for causal language models, plain calls for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast, overload

import numpy as np

from .artifact import TOKENIZER
from .chat import Chat, Reply
from .embedding import Texts
from .engine import Engine, start
from .errors import AGAIN, ArtifactError, InputError, ModelError
from .generate import Generation, generate
from .manifest import Entry
from .media import Media, open_media
from .prompts import Prompt, text_inputs
from .rerank import QWEN3, Form, rerank
from .sampling import SamplingOptions
from .session import Session
from .tokenizer import Tokenizer
from .values import listed


def load(folder: str | Path, threads: int | None = None, verify: bool = True) -> Model:
    """The model of an artifact folder, ready to run.

    ``threads``: how many compute; default: ``TVM_NUM_THREADS`` where it is set, else the CPUs that this process may use.
    ``verify=False`` skips the hashes (sizes, versions and the machine are checked all the same).

    Raises ArtifactError for an artifact that is damaged, or made by other versions or for another machine.
    """
    if not isinstance(folder, (str, Path)):
        raise InputError(f"folder is a path, not {type(folder).__name__}")
    return Model(start(Path(folder), threads, verify))


class Model:
    """What :func:`load` returns."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.folder = engine.folder
        self.manifest = engine.manifest

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ArtifactError where the artifact has none."""
        if TOKENIZER not in self.manifest.files:
            raise ArtifactError(
                f"{self.folder} holds no {TOKENIZER}: give token ids instead of text, or {AGAIN} with its tokenizer"
            )
        return Tokenizer(self.folder / TOKENIZER)

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can go in and come out."""
        return TOKENIZER in self.manifest.files

    def generate(
        self, prompts: str | Iterable[Prompt], max_tokens: int | None = None,
        options: SamplingOptions | None = None, *, stop: str | Iterable[str] = (), stop_tokens: Iterable[int] = (),
        stream: Callable[[int, str], None] | None = None, logprobs: int | None = None,
        inputs: Mapping[str, np.ndarray] | None = None,
    ) -> list[Generation]:  # fmt: skip
        """Continues each prompt (a text, token ids, or a list of texts and media); see
        :func:`wasat.runtime.generate.generate`."""
        return generate(
            self, prompts, max_tokens, SamplingOptions() if options is None else options, stop=stop,
            stop_tokens=stop_tokens, stream=stream, logprobs=logprobs, inputs=inputs,
        )  # fmt: skip

    def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None, options: SamplingOptions | None = None, **more: Any,
    ) -> Reply:  # fmt: skip
        """Answers the last of ``messages``: mappings with ``role`` and ``content``, as Hugging Face transformers takes them.

        A content is a text, or a list of parts: ``{"type": "text", "text": …}`` and, for models that take them, ``{"type":
        "image", "image": …}`` (audio, video), with a path, the content of a file, an array, or an :class:`Image`. The model's
        chat template writes them as a text; ``template=`` names another of the model's, or is one. ``tools`` (JSON schemas)
        and ``documents=`` are passed through to it, and what ``variables=`` holds, such as ``{"enable_thinking": False}``.

        ``options=``, or its fields by name (``temperature=0.7``); ``max_tokens``, ``stop=``, ``stop_tokens=``, ``logprobs=`` as
        :meth:`generate` takes them. ``stream(piece)`` receives the text as it comes; ``interrupted()`` is asked before each
        step whether to end here. What the model itself ends by are its EOS, and the token that the template writes after an
        answer.

        The caches of the last conversation are kept: of one that begins with the same tokens, only the others are fed, and the
        answer is that of a fresh start, up to the rounding of differently shaped products. Raises InputError for a model
        without a template and for what the template refuses, ContextLimitError where the conversation is too long.
        """
        return self.conversation.answer(messages, tools, max_tokens, options, **more)

    @cached_property
    def conversation(self) -> Chat:
        """What :meth:`chat` uses: templates, and the caches that it keeps."""
        return Chat(self)

    @overload
    def embed(self, given: str | Media | Path, *, prompt: str | None = None, batch: int = 32) -> np.ndarray: ...
    @overload
    def embed(self, given: Sequence[str], *, prompt: str | None = None, batch: int = 32) -> np.ndarray: ...

    def embed(self, given: Any, *, prompt: str | None = None, batch: int = 32) -> np.ndarray:
        """Of a model that embeds texts, the embeddings f32[n, dim] of a list of them, or f32[dim] of one.

        ``prompt``: what comes before each text, by its name in the model's configuration, or itself; default: the model's
        own. ``batch``: most texts of one call; they are sorted by length, so that a call takes at most a tenth more than its
        texts one by one. A text longer than the model takes is cut. An embedding does not depend on the texts beside it, up to
        the rounding of differently shaped products. Raises InputError for what is no text, and for a model that embeds none.

        Of a model that takes media, the rows f32[t, dim] that its encoder makes of a picture, sound or video, or of a file of
        one (a Path).

        Rows of several make the input ``media`` of :meth:`Session.encode`; the token for row r of it is vocab + r. Raises
        MediaError for what cannot be read, InputError for a kind that the model was not made for.
        """
        if isinstance(given, str):
            return np.asarray(self.texts.embed([given], prompt, batch)[0])
        if not isinstance(given, (Path, Media)):
            return self.texts.embed(given, prompt, batch)
        entry, arrays = self._decoded(given)[1:]
        (rows,) = self.run(entry, **arrays).values()
        return rows

    def score(self, pairs: Sequence[tuple[str, str]], *, batch: int = 32) -> np.ndarray:
        """The scores that a reranker gives pairs of texts, (query, document): f32[n], or f32[n, labels] of several labels.

        They are what sentence-transformers' CrossEncoder predicts: of one label its probability, unless the model's
        configuration says that it is the logit. ``batch`` is as of :meth:`embed`. Raises InputError for what is no pair, and
        for a model that scores none.
        """
        return self.texts.score(pairs, batch)

    def rerank(
        self, query: str, documents: Sequence[str], *, instruct: str | None = None, form: Form = QWEN3, batch: int = 8
    ) -> np.ndarray:  # fmt: skip
        """How well each of ``documents`` answers ``query``: f32[n], in their order, the larger the better.

        Of a model that scores pairs, :meth:`score`'s scores. Of a language model, the probability that it says yes rather than
        no when it is asked in the form ``form``, by default Qwen3-Reranker's; ``instruct`` says what is looked for. A document
        that is too long is cut at its end. ``batch``: most documents of one call. Raises InputError for what is no text, and
        for a model that was not made for the form.
        """
        spec = self.manifest.interface.embedder
        if spec is None:
            return rerank(self, query, documents, instruct, form, batch)
        if instruct is not None:
            raise InputError("the model scores pairs as they are: instruct is for language models that answer yes or no")
        return self.texts.score([(query, d) for d in listed("documents", documents)], batch)

    @cached_property
    def texts(self) -> Texts:
        """What :meth:`embed` and :meth:`score` use."""
        return Texts(self)

    def classify(self, head: str, inputs: Sequence[Prompt | Media | Path]) -> np.ndarray:
        """The probabilities f32[n, classes] that the classification head ``head`` gives each of ``inputs``.

        A head of text takes prompts as :meth:`generate` does, all in one call; one of images, sounds or videos takes those, or
        files of them. Raises InputError for a head that the model lacks and for inputs that it does not take, MediaError for
        media that cannot be read, ContextLimitError for a prompt longer than the context.
        """
        interface = self.manifest.interface
        spec = interface.head(head)
        if spec is None:
            raise InputError(f"the model has no head {head!r}; it has {', '.join(h.name for h in interface.heads) or 'none'}")
        if isinstance(inputs, (Path, Media)) or not (inputs := listed("inputs", inputs)):
            raise InputError("inputs is a list of what to classify, at least one")
        if spec.of == "text":
            entry = self.entry(spec.entry)
            given = text_inputs(self, cast("Sequence[Prompt]", inputs))
            (logits,) = self.run(spec.entry, **{i.name: given[i.name] for i in entry.inputs}).values()
        else:
            rows: list[np.ndarray] = []
            for x in inputs:
                if not isinstance(x, (Path, Media)):
                    raise InputError(f"head {head} is of {spec.of}: give Paths or {spec.of.title()}s, not {type(x).__name__}")
                kind, _, arrays = self._decoded(x)
                if kind != spec.of:
                    raise InputError(f"head {head} is of {spec.of}, and {x!r} is of {kind}")
                rows += self.run(spec.entry, **arrays).values()
            logits = np.stack(rows)
        if not np.isfinite(logits).all():
            raise ModelError(f"head {head} returned numbers that are none; the model's weights or inputs are damaged")
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        probabilities: np.ndarray = e / e.sum(axis=-1, keepdims=True)
        return probabilities

    def _decoded(self, media: Media | Path) -> tuple[str, str, dict[str, np.ndarray]]:
        """The kind of a medium, the entry that encodes it, and what that takes."""
        part = open_media(media) if isinstance(media, Path) else media
        if not isinstance(part, Media):
            raise InputError(f"a medium is a Path, an Image, Audio or Video, not {type(part).__name__}")
        spec, kind = self.manifest.interface.media, part.kind
        encoder = spec.encoder(kind) if spec else None
        if encoder is None:
            takes = ", ".join(["text", *(spec.kinds if spec else ())])
            raise InputError(f"{part.name}: the model has no encoder for {kind}; it takes {takes}")
        return kind, encoder.entry, dict(zip(part.inputs, part.arrays(encoder)))

    def session(self, batch: int = 1, context: int | None = None) -> Session:
        """Caches for ``batch`` rows of up to ``context`` positions (default: as many as the model takes)."""
        return Session(self.engine, batch, context)

    def run(self, entry: str, **arrays: Any) -> dict[str, np.ndarray]:
        """Calls an entry point without caches, e.g. ``forward``; returns its outputs by name.

        Raises InputError for inputs that are missing, unknown or do not fit the entry's signature.
        """
        return self.engine.run(entry, **arrays)

    def entry(self, name: str) -> Entry:
        """The signature of an entry point. Raises InputError for a name there is none of."""
        return self.engine.entry(name)

    def __repr__(self) -> str:
        return f"Model({str(self.folder)!r}: {self.manifest.interface.name}; {', '.join(self.manifest.entries)})"
