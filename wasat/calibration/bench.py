"""The model as compiled code whose weights can be exchanged: what its linear layers read over a text, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from wasat.ir import Array, Graph, Program, Value, WasatError
from wasat.quality import log_softmax, tokens_name

from .weights import FORWARD, Weight, inputs_of

Windows = Sequence[NDArray[np.int64]]
Tell = Callable[[int, int], None]
_OBSERVED = "observed"
_ROWS = 32
"""Positions at a time: a vocabulary of 262,144 times a window in f64 would be gigabytes."""


class Bench:
    """``program`` (see :func:`.weights.prepared`), compiled once for this machine's processor."""

    def __init__(self, program: Program, weights: Sequence[Weight], threads: int | None = None) -> None:
        from wasat.backends.tvm.build import Runner
        from wasat.backends.tvm.targets import target_named

        self.program, self._tokens, self._rest = program, *_fed(program)
        forward = program[FORWARD].clone()
        observed, self._of = _observing(forward, weights)
        graphs = {FORWARD: forward, **({observed.name: observed} if self._of else {})}
        names = {n for g in graphs.values() for n in g.params}
        both = Program(graphs, {n: p for n, p in program.params.items() if n in names})
        self._runner = Runner(both, target_named("cpu", threads))

    def importance(self, windows: Windows, tell: Tell) -> dict[str, NDArray[np.float32]]:
        """For each weight that linear layers read, the mean square of each feature of what they multiply it with: f32[k].

        Of the text nothing else is kept, whatever its length. Raises WasatError where one is not finite.
        """
        sums = self._summed(set(self._of), windows, lambda x: np.einsum("tk,tk->k", x, x), tell)
        found = {}
        for name, total in sums.items():
            if not np.isfinite(total).all():
                raise WasatError(f"the input of the layer that reads {name} is not finite over this text")
            found[name] = total.astype(np.float32)
        return found

    def reads(self, name: str) -> tuple[str, ...]:
        """A key for what a weight is multiplied with; of one that is only looked up none."""
        return self._of.get(name, ())

    def moments(self, names: Collection[str], windows: Windows, tell: Tell) -> dict[str, NDArray[np.float64]]:
        """For each weight the mean products of all pairs of features, f64[k, k]: one array for all that read the same."""
        return self._summed(names, windows, lambda x: x.T @ x, tell)

    def _summed(
        self, names: Collection[str], windows: Windows, sums_of: Callable[[np.ndarray], np.ndarray], tell: Tell
    ) -> dict[str, NDArray[np.float64]]:
        """Of what each weight is multiplied with, x f32[positions, k], a sum, divided by the text's length."""
        sums: dict[tuple[str, ...], NDArray[np.float64]] = {}
        count = sum(map(len, windows))
        wanted = {self._of[name]: None for name in self._of if name in names}
        for i, ids in enumerate(windows if wanted else ()):
            tell(i, len(windows))
            found = self._runner(_OBSERVED, self._inputs(ids))
            for outputs in wanted:
                for x in (found[o] for o in outputs):
                    total = sums_of(x.reshape(-1, x.shape[-1]).astype(np.float32, copy=False)).astype(np.float64) / count
                    if outputs in sums:
                        sums[outputs] += total
                    else:
                        sums[outputs] = total
        return {name: sums[outputs] for name, outputs in self._of.items() if outputs in sums}

    def set(self, name: str, x: Array) -> None:
        """Other numbers for one weight."""
        self._runner.set_parameter(name, x)

    def logits(self, ids: NDArray[np.int64]) -> np.ndarray:
        """f32[positions, vocabulary] of one window."""
        return np.asarray(self._runner(FORWARD, self._inputs(ids))["logits"][0])

    def log_probabilities(self, windows: Windows) -> Iterator[NDArray[np.float32]]:
        """f32[positions, vocabulary] of each window."""
        for ids in windows:
            x = self.logits(ids)
            out = np.empty(x.shape, np.float32)
            for at in range(0, len(x), _ROWS):
                out[at : at + _ROWS] = log_softmax(x[at : at + _ROWS])
            yield out

    def kl(self, base: Sequence[NDArray[np.float32]], windows: Windows) -> float:
        """Mean divergence of the next token's distribution, in nats, from ``base``."""
        total = 0.0
        for b, ids in zip(base, windows, strict=True):
            x = self.logits(ids)
            for at in range(0, len(x), _ROWS):
                wide = b[at : at + _ROWS].astype(np.float64)
                total += float((np.exp(wide) * (wide - log_softmax(x[at : at + _ROWS]))).sum())
        return total / sum(map(len, windows))

    def _inputs(self, ids: NDArray[np.int64]) -> dict[str, np.ndarray]:
        return {self._tokens: ids[None], **self._rest}


def _fed(program: Program) -> tuple[str, Mapping[str, np.ndarray]]:
    """The input that takes a text's tokens, and what the others are given: of media one row, which no token names.

    Raises WasatError for a model that takes anything else, or gives no logits.
    """
    media = program.interface.media
    if media is None:
        return tokens_name(program), {}
    g = program[FORWARD]
    others = [v for v in g.inputs if v.name != program.interface.tokens]
    if "logits" not in g.output_names or any(len(v.shape) != 2 or v.shape[1] != media.dim for v in others):
        raise WasatError(f"a text is for a forward that takes tokens and media rows and gives logits, not for @{g.name}")
    return program.interface.tokens, {v.name: np.zeros((1, media.dim), v.tensor.dtype.np) for v in others}


def _observing(forward: Graph, weights: Sequence[Weight]) -> tuple[Graph, dict[str, tuple[str, ...]]]:
    """A graph that gives what weights are multiplied with; for each weight the names of its outputs."""
    g = forward.clone(_OBSERVED)
    names: dict[Value, str] = {}
    of = {}
    for w in weights:
        found = inputs_of(g, w.name)
        for x in found:
            names.setdefault(x, f"x{len(names)}")
        if found:
            of[w.name] = tuple(names[x] for x in found)
    g.set_outputs(list(names), list(names.values()))
    for node in list(g.nodes_reversed):
        if not any(v.uses or g.is_output(v) for v in node.outputs):
            g.erase(node)
    g.prune_params()
    return g, of
