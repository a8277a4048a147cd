"""Embeddings of texts, and scores of pairs: tokens cut as the model was trained, batches in which little is padding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import AGAIN, ArtifactError, InputError, ModelError
from .interface import Embedder
from .prompts import padded
from .tokenizer import Tokenizer, refusals
from .values import integer, listed, texts

if TYPE_CHECKING:
    from .model import Model

PROMPTS = "prompts.json"
WASTE = 1.1
"""What a batch may take, relative to its texts one by one."""


@dataclass(frozen=True)
class Tokens:
    """A text as tokens, or a pair of texts."""

    ids: list[int]
    types: list[int]


class Texts:
    """What embeds the texts of a model, or scores pairs."""

    def __init__(self, model: Model) -> None:
        spec = model.manifest.interface.embedder
        if spec is None:
            raise InputError(
                f"{model.folder} does not embed texts: it was made of another model; compile a folder of an encoder or of "
                "sentence-transformers"
            )
        self.model, self.spec = model, spec
        self.inputs = [i.name for i in model.entry(spec.entry).inputs]
        self.library = Tokenizer(model.tokenizer.path).library  # its own: it cuts texts
        self.prompts, self.default = _prompts(model)

    def embed(self, given: Sequence[str], prompt: str | None, batch: int) -> np.ndarray:
        """f32[n, dim], in the order of the texts."""
        _right(self.spec, pairs=False)
        before = self._prompt(prompt)
        found = self._tokens([before + t for t in texts("a text", listed("texts", given))])
        skip = self._length(before) if "skip" in self.inputs else 0
        return self._run(found, batch, skip)

    def score(self, given: Sequence[Any], batch: int) -> np.ndarray:
        """f32[n] or f32[n, labels], in the order of the pairs."""
        _right(self.spec, pairs=True)
        pairs = []
        for i, pair in enumerate(listed("pairs", given)):
            both = listed(f"pair {i}", pair)
            if len(both) != 2:
                raise InputError(f"pair {i} has {len(both)} texts: a pair is (query, document)")
            pairs.append(tuple(texts(f"pair {i}", both)))
        return self._run(self._tokens(pairs), batch, 0)

    def _prompt(self, prompt: str | None) -> str:
        """The text that comes before: of a prompt's name, or itself."""
        if prompt is None:
            return self.prompts[self.default] if self.default is not None else ""
        (prompt,) = texts("prompt", [prompt])
        return self.prompts.get(prompt, prompt)

    def _tokens(self, given: Sequence[Any]) -> list[Tokens]:
        """Tokens of texts or pairs, at most as many as the model takes: of a pair, the longer text is cut first."""
        with refusals(InputError, "the tokenizer cannot encode the texts ({})"):
            if self.spec.limit is not None:
                self.library.enable_truncation(self.spec.limit)
            found = [Tokens(e.ids, e.type_ids) for e in self.library.encode_batch(list(given))]
        for i, t in enumerate(found):
            if not t.ids:
                raise InputError(f"text {i} has no tokens: {given[i]!r}")
        return found

    def _length(self, prompt: str) -> int:
        """How many tokens a prompt is, what the tokenizer puts after a text not counted."""
        if not prompt:
            return 0
        ids = self._tokens([prompt])[0].ids
        return len(ids) - (ids[-1] in self.model.tokenizer.special)

    def _run(self, found: Sequence[Tokens], batch: int, skip: int) -> np.ndarray:
        batch = integer("batch", batch, 1)
        order = sorted(range(len(found)), key=lambda i: -len(found[i].ids))
        out: np.ndarray | None = None
        for some in batches([len(found[i].ids) for i in order], batch):
            rows = [order[i] for i in some]
            got = self._call([found[i] for i in rows], skip)
            if not np.isfinite(got).all():
                raise ModelError("the model returned numbers that are none; its weights are damaged")
            if out is None:
                out = np.zeros((len(found), *got.shape[1:]), np.float32)
            out[rows] = got
        if out is None:
            shape = self.model.entry(self.spec.entry).outputs[0].shape[1:]
            return np.zeros((0, *[d if isinstance(d, int) else 0 for d in shape]), np.float32)
        return out

    def _call(self, rows: Sequence[Tokens], skip: int) -> np.ndarray:
        given = {
            "tokens": padded([t.ids for t in rows], self.spec.pad), "lengths": np.array([len(t.ids) for t in rows]),
            "types": padded([t.types for t in rows], 0), "skip": np.full(len(rows), skip),
        }  # fmt: skip
        (got,) = self.model.run(self.spec.entry, **{k: given[k] for k in self.inputs}).values()
        return np.asarray(got)


def batches(lengths: Sequence[int], most: int) -> list[range]:
    """Runs of texts, longest first as they are given, of at most ``most``: as many as take at most WASTE of what they take one
    by one. Attention takes the square of a length, so it bounds the rest."""
    out, start = [], 0
    while start < len(lengths):
        longest, own, end = lengths[start], 0, start
        while end < min(len(lengths), start + most):
            own += lengths[end] ** 2
            if (end + 1 - start) * longest**2 > WASTE * own:
                break
            end += 1
        out.append(range(start, end))
        start = end
    return out


def _right(spec: Embedder, pairs: bool) -> None:
    if spec.pairs and not pairs:
        raise InputError("the model scores pairs of texts: score([(query, document), …])")
    if pairs and not spec.pairs:
        raise InputError("the model embeds texts: embed([text, …]); a pair is scored by the product of two embeddings")


def _prompts(model: Model) -> tuple[dict[str, str], str | None]:
    """Texts that come before others, by name, and the default's name."""
    if PROMPTS not in model.manifest.files:
        return {}, None
    path = model.folder / PROMPTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        prompts, default = {str(k): str(v) for k, v in found["prompts"].items()}, found["default"]
        if default is not None:
            prompts[default]  # there is one
        return prompts, default
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ArtifactError(f"{path} holds no prompts by name; {AGAIN}") from None
