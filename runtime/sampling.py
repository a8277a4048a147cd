"""From logits to a token: the filters, in the order and with the definitions of Hugging Face transformers.

Repetition penalty, temperature, top-k, top-p, min-p; then one draw. What a filter keeps depends on what those before it kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .errors import InputError, ModelError
from .values import integer, number

PENALTIES = (1e-250, 1e250)
"""Repetition penalties by which no f32 leaves f64."""


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. Raises InputError for values outside the stated ranges."""

    temperature: float = 0.0
    """0 takes the likeliest token (the filters below then change nothing); else logits are divided by it."""
    top_k: int = 0
    """Keep the k likeliest tokens, and those that tie with the k-th; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least this, in (0, 1] (arXiv:1904.09751)."""
    min_p: float = 0.0
    """Keep tokens with at least this fraction of the likeliest one's probability, in [0, 1] (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the text so far: positive ones divided by it, negative ones multiplied
    (CTRL, arXiv:1909.05858). Above 0, within PENALTIES; 1 changes nothing."""
    seed: int = 0
    """Row r of a batch draws from a generator seeded with (seed, r), whatever the other rows do."""

    def __post_init__(self) -> None:
        low, high = PENALTIES
        for name, good, want in (
            ("temperature", lambda x: x >= 0, "a finite number, 0 or above"),
            ("top_p", lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
            ("min_p", lambda x: 0 <= x <= 1, "a number from 0 to 1"),
            ("repetition_penalty", lambda x: low <= x <= high, f"a finite number above 0, from {low} to {high}"),
        ):
            value = number(name, getattr(self, name), want)
            if not good(value):
                raise InputError(f"{name} is {value!r}; it must be {want}")
            object.__setattr__(self, name, value)
        for name in ("top_k", "seed"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probabilities under the model's own distribution, before any filter."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, likeliest first; as many as were asked for."""


class Sampler:
    """Chooses the tokens of one row."""

    def __init__(self, options: SamplingOptions, row: int = 0, prompt: Iterable[int] = ()) -> None:
        self.options = options
        self._rng = np.random.default_rng([options.seed, row])
        self._seen = dict.fromkeys(prompt)

    def sample(self, logits: np.ndarray) -> int:
        """The next token for ``logits`` f32[vocab]. Raises ModelError where they hold a NaN or nothing finite."""
        o = self.options
        if o.repetition_penalty != 1 and self._seen:
            logits = penalize(logits, np.fromiter(self._seen, np.int64, len(self._seen)), o.repetition_penalty)
        token = int(logits.argmax())  # NaN counts as largest
        if not math.isfinite(logits[token]):
            raise ModelError(f"the model returned {logits[token]} among its logits; its weights or inputs are damaged")
        if o.temperature > 0:
            ids, p = candidates(logits, o)
            cumulative = np.cumsum(p)
            at = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))
            token = int(ids[min(at, len(ids) - 1)])  # rounding may put the draw at the very end
        self._seen[token] = None
        return token


def penalize(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """A copy of ``logits`` with those at the ids ``seen`` made less likely (where ``penalty`` > 1)."""
    mild = 1e-4 < penalty < 1e4  # f32 neither overflows nor becomes 0
    out = logits.copy() if mild else logits.astype(np.float64)
    x = out[seen]
    out[seen] = np.where(x > 0, x / penalty, x * penalty)
    return out


def candidates(logits: np.ndarray, options: SamplingOptions) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that temperature (above 0), top-k, top-p and min-p leave: ids i64[n], probabilities f64[n] that sum to 1."""
    ids, x = np.arange(logits.size), logits.astype(np.float64)
    if 0 < options.top_k < logits.size:
        ids = likeliest(logits, options.top_k)
        x = x[ids]
    with np.errstate(over="ignore"):  # near 0: all but the likeliest become -inf
        p = np.exp((x - x.max()) / options.temperature)
    p /= p.sum()
    if options.top_p < 1:
        kept = nucleus(p, options.top_p)
        ids, p = ids[kept], p[kept]
    if options.min_p > 0:
        kept = np.flatnonzero(p >= options.min_p * p.max())
        ids, p = ids[kept], p[kept]
    return ids, p / p.sum()


def likeliest(x: np.ndarray, k: int) -> np.ndarray:
    """Indices, ascending, of the ``k`` largest of ``x`` and of whatever ties with the k-th. k in 1..x.size; no full sort."""
    return np.flatnonzero(x >= np.partition(x, x.size - k)[x.size - k])


def nucleus(p: np.ndarray, mass: float) -> np.ndarray:
    """Indices, ascending, of the smallest set of largest ``p`` (which sum to 1) that sums to at least ``mass``.

    Of equal ones the lower index goes first. Sorts no indices, and no values below (1 - mass) / n: together those hold at most
    1 - mass, so the others suffice.
    """
    ordered = np.sort(p[p >= min((1 - mass) / p.size, p.max())])[::-1]
    count = min(int(np.searchsorted(np.cumsum(ordered), mass, side="left")) + 1, ordered.size)
    least = ordered[count - 1]
    above = np.flatnonzero(p > least)
    return np.sort(np.concatenate([above, np.flatnonzero(p == least)[: count - above.size]]))


def logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """Log-probability of ``token``, and of the ``top`` likeliest tokens, under softmax(logits)."""
    x = logits.astype(np.float64)
    peak = x.max()
    log_sum = peak + math.log(np.exp(x - peak).sum())
    best = likeliest(x, min(top, x.size)) if top else np.arange(0)
    best = best[np.argsort(-x[best], kind="stable")][:top]
    return TokenLogprob(token, float(x[token] - log_sum), tuple((int(i), float(x[i] - log_sum)) for i in best))
