"""Scores of documents for a query by a language model that answers yes or no, as Qwen3-Reranker does: one step a document."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .embedding import batches
from .errors import InputError, ModelError
from .prompts import padded
from .values import integer, listed, texts

if TYPE_CHECKING:
    from .model import Model


@dataclass(frozen=True)
class Form:
    """How a model is asked. Tokens of ``before`` and ``after`` are whole; what does not fit is cut off the end of ``body``,
    which names ``{instruct}``, ``{query}`` and ``{document}``."""

    before: str
    body: str
    after: str
    instruct: str
    """What the model is to look for, where nobody says."""
    yes: str = "yes"
    no: str = "no"
    """Both are tokens."""
    limit: int = 8192
    """Most tokens of all."""

    @property
    def marks(self) -> list[str]:
        """The tokens that structure it, which a model made for it has."""
        return list(dict.fromkeys(re.findall(r"<\|[^|<>]+\|>|</?\w+>", self.before + self.after)))


QWEN3 = Form(
    before='<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct '
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
    body="<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}",
    after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    instruct="Given a web search query, retrieve relevant passages that answer the query",
)  # fmt: skip
"""That of Qwen3-Reranker's model card."""


def rerank(
    model: Model, query: str, documents: Sequence[str], instruct: str | None, form: Form, batch: int
) -> np.ndarray:
    """The probability of yes beside no, f32[n]; see :meth:`wasat.runtime.Model.rerank`."""
    if not isinstance(form, Form):
        raise InputError(f"form is how the model is asked, a wasat.runtime.rerank.Form, not {type(form).__name__}")
    (query,), given = texts("the query", [query]), texts("a document", listed("documents", documents))
    (instruct,) = texts("instruct", [form.instruct if instruct is None else instruct])
    batch = integer("batch", batch, 1)
    library = model.tokenizer.library
    ids = {m: library.token_to_id(m) for m in [*form.marks, form.no, form.yes]}
    if lacking := [m for m, i in ids.items() if i is None]:
        raise InputError(
            f"{model.folder} is no reranker of this form: its tokenizer has no token {lacking[0]!r}; another form is "
            "wasat.runtime.rerank.Form(before=, body=, after=, …)"
        )
    rows = [_tokens(model, form, form.body.format(instruct=instruct, query=query, document=d)) for d in given]
    answers = np.array([ids[form.no], ids[form.yes]], np.int64)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    out = np.zeros(len(rows), np.float32)
    for some in batches([len(rows[i]) for i in order], batch):
        at = [order[i] for i in some]
        tokens = padded([rows[i] for i in at], 0)
        session = model.session(batch=len(at), context=tokens.shape[1])
        no, yes = session.step(tokens, np.array([len(rows[i]) for i in at]))[:, answers].astype(np.float64).T
        if not np.isfinite(yes - no).all():
            raise ModelError("the model returned numbers that are none; its weights are damaged")
        out[at] = 1 / (1 + np.exp(no - yes))
    return out


def _tokens(model: Model, form: Form, body: str) -> list[int]:
    """The prompt of one document, the end of its body cut where all of it is too long."""
    before, after = (model.tokenizer.encode(x, special=False) for x in (form.before, form.after))
    context = model.manifest.interface.context
    limit = form.limit if context is None else min(form.limit, context)
    room = limit - len(before) - len(after)
    if room < 1:
        raise InputError(f"the model takes {limit} tokens, and the form alone has {len(before) + len(after)}")
    return [*before, *model.tokenizer.encode(body, special=False)[:room], *after]
