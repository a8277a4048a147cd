"""What a model says beside another, over a text: KL divergence of the next token's distribution, how often the likeliest token
is the same, and both perplexities.

    windows = windows_of(ids, 256)                                          # they do not see each other
    found = quality(log_probabilities(base, windows), log_probabilities(small, windows), windows)
    print(found.kl, found.same_top, found.perplexity, found.base_perplexity)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wasat.ir import DType, ParamSource, Program, QArray, QTensorType, TensorType, WasatError, evaluate_dim
from wasat.passes.serving.token_inputs import token_inputs

Floats = NDArray[np.floating[Any]]

DENSE = "|dense"
"""What is added to the name of a quantized parameter that :func:`dense` makes f32."""
_ROWS = 32
"""Positions at a time, where a vocabulary of 262,144 times a window in f64 would be gigabytes."""


@dataclass(frozen=True)
class Quality:
    """What a model loses beside its base over ``tokens`` positions. Logarithms are natural."""

    tokens: int
    """Positions at which distributions were compared."""
    kl: float
    """Mean over positions of KL(base, other), in nats."""
    kl_99: float
    """Its 99th percentile: the positions where it hurts."""
    same_top: float
    """Fraction of positions at which both have the same likeliest token."""
    perplexity: float
    """Of the text, by the other; the last position of each window predicts nothing."""
    base_perplexity: float
    kl_error: float | None = None
    """Standard error of ``kl``, over blocks of 32 positions (neighbours are no independent trials); None for fewer than two."""
    loss_error: float | None = None
    """That of log(perplexity / base_perplexity)."""


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Log-probabilities f64[.., vocabulary] of logits of any float type; the last axis is normalized."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def windows_of(ids: Sequence[int], window: int) -> list[NDArray[np.int64]]:
    """A text's token ids in pieces of ``window``, the last one shorter; a single token at the end predicts nothing and is
    left out."""
    return [np.array(ids[i : i + window], np.int64) for i in range(0, len(ids) - 1, window)]


def log_probabilities(program: Program, windows: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.float64]]:
    """f64[positions, vocabulary] of each window, as compiled for this machine's processor.

    ``program`` has one graph ``forward`` over tokens i64[batch, positions] that gives ``logits``; raises WasatError for
    another.
    """
    from wasat.driver import Executable

    name = tokens_name(program)
    run = Executable(program)
    for ids in windows:
        logits = run(**{name: ids[None]})["logits"]
        assert isinstance(logits, np.ndarray)
        yield log_softmax(logits[0])


def tokens_name(program: Program) -> str:
    """The input of ``forward`` that takes a text's tokens. Raises WasatError where it takes more, or gives no logits."""
    g = program.graphs.get("forward")
    if g is None or "logits" not in g.output_names or len(g.inputs) != 1 or not token_inputs(g):
        takes = "no graph forward" if g is None else f"{', '.join(v.name for v in g.inputs)} -> {', '.join(g.output_names)}"
        raise WasatError(f"a text is for a forward that takes tokens [batch, positions] and gives logits; this one: {takes}")
    return g.inputs[0].name


def text_ids(program: Program, text: str) -> list[int]:
    """Token ids of a text, by the tokenizer that came with the model. Raises WasatError where there is none."""
    if (tokenizer := tokenizer_of(program)) is None:
        raise WasatError("the model came without a tokenizer (tokenizer.json): a text cannot become tokens")
    return list(tokenizer.encode(text).ids)


def tokenizer_of(program: Program) -> Any:
    """The tokenizer that came with the model; None where there is none. Raises WasatError where it cannot be read."""
    import tokenizers

    from wasat.runtime.tokenizer import check_merges, refusals

    with refusals(WasatError, f"{program.origin.tokenizer or 'tokenizer.json'} cannot be read ({{}})"):
        written = program.origin.texts.get("tokenizer.json")
        if written is None and program.origin.tokenizer:
            written = Path(program.origin.tokenizer).read_text(encoding="utf-8")
        if written is None:
            return None
        check_merges(written)
        return tokenizers.Tokenizer.from_str(written)


def quality(
    base: Iterable[Floats], other: Iterable[Floats], windows: Sequence[NDArray[np.int64]],
    progress: Callable[[int], None] = lambda done: None,
) -> Quality:
    """Compares log-probabilities [positions, vocabulary] of each window, read one window at a time; ``progress`` is told how
    many windows are done. Raises WasatError where the vocabularies differ."""
    kl, same, loss, base_loss = [], [], [], []
    for i, (ids, b, x) in enumerate(zip(windows, base, other, strict=True), 1):
        if b.shape != x.shape:
            raise WasatError(f"window {i}: the sides give log-probabilities {list(b.shape)} and {list(x.shape)}")
        for first in range(0, len(b), _ROWS):
            wide, narrow = (y[first : first + _ROWS].astype(np.float64) for y in (b, x))
            p = np.exp(wide)
            with np.errstate(invalid="ignore"):
                kl.append(np.where(p == 0, 0.0, p * (wide - narrow)).sum(-1))  # NaN stays
        same.append(b.argmax(-1) == x.argmax(-1))
        at = np.arange(len(ids) - 1), ids[1:]
        loss.append(-x[at])
        base_loss.append(-b[at])
        progress(i)
    each, worse = np.concatenate(kl), np.concatenate(loss) - np.concatenate(base_loss)
    return Quality(
        len(each), float(each.mean()), float(np.quantile(each, 0.99, method="higher")), float(np.concatenate(same).mean()),
        float(np.exp(np.concatenate(loss).mean())), float(np.exp(np.concatenate(base_loss).mean())),
        _error(each), _error(worse),
    )  # fmt: skip


def _error(x: Floats) -> float | None:
    """Standard error of the mean, over blocks of positions; of the rest, that fills none, nothing is taken."""
    blocks = x[: len(x) // _ROWS * _ROWS].reshape(-1, _ROWS).mean(1)
    return float(blocks.std(ddof=1) / math.sqrt(len(blocks))) if len(blocks) > 1 else None


@dataclass(frozen=True)
class Dense:
    """A quantized parameter in f32."""

    type: TensorType
    stored: ParamSource

    is_data: ClassVar[bool] = True

    def load(self) -> np.ndarray:
        x = self.stored.load()
        assert isinstance(x, QArray)
        return x.dense()


def dense(program: Program) -> Program:
    """A copy whose quantized parameters are f32: what others are measured against."""
    out = program.copy()
    for graph in out.graphs.values():
        for node in list(graph.nodes):
            w = node.inputs[0] if node.is_a("dequantize") else None
            if w is not None and w.param is not None:
                name, t = f"{w.param}{DENSE}", TensorType(DType.F32, w.type.shape)
                out.params[name] = Dense(t, program.params[w.param])
                graph.replace_uses(node.output, graph.add_param(name, t))
                graph.erase(node)
        for name in graph.prune_params():
            if not any(name in g.params for g in out.graphs.values()):
                del out.params[name]
    return out


def bits(program: Program) -> int:
    """Of all parameters that its graphs read, scales and zero points included; divided by the base's number of weights: bits
    per weight."""
    total = 0
    for name in dict.fromkeys(name for g in program.graphs.values() for name in g.params):
        t = program.params[name].type
        *rows, columns = (evaluate_dim(d, {}) for d in t.shape or (1,))
        width = evaluate_dim(t.row_bits, {}) if isinstance(t, QTensorType) else columns * t.dtype.bits
        total += math.prod(rows) * width
    return total
