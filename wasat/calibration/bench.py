"""The model as compiled code whose weights can be exchanged: what its linear layers read over a text, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from wasat.ir import Array, Builder, Graph, Program, TensorType, Value, WasatError
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

        Only sums are kept, whatever the length of the text. Raises WasatError where one is not finite.
        """
        sums: dict[str, NDArray[np.float64]] = {}
        count = sum(map(len, windows))
        for i, ids in enumerate(windows if self._of else ()):
            tell(i, len(windows))
            for name, x in self._runner(_OBSERVED, self._inputs(ids)).items():
                sums[name] = sums.get(name, 0) + x.astype(np.float64)
        found = {}
        for name, outputs in self._of.items():
            total = np.sum([sums[o] for o in outputs], axis=0)
            if not np.isfinite(total).all():
                raise WasatError(f"the input of the layer that reads {name} is not finite over this text")
            found[name] = (total / count).astype(np.float32)
        return found

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


def _observing(forward: Graph, weights: Sequence[Weight]) -> tuple[Graph, dict[str, list[str]]]:
    """A graph that gives the sums over positions of squares of what weights are multiplied with; for each weight, which."""
    g = forward.clone(_OBSERVED)
    squares: dict[Value, str] = {}
    of: dict[str, list[str]] = {}
    outputs: list[Value] = []
    for w in weights:
        for x in inputs_of(g, w.name):
            if x not in squares:
                squares[x] = f"sum{len(squares)}"
                outputs.append(_sum_of_squares(Builder(g), x))
            of.setdefault(w.name, []).append(squares[x])
    g.set_outputs(outputs, list(squares.values()))
    for node in list(g.nodes_reversed):
        if not any(v.uses or g.is_output(v) for v in node.outputs):
            g.erase(node)
    g.prune_params()
    return g, of


def _sum_of_squares(b: Builder, x: Value) -> Value:
    assert isinstance(x.type, TensorType)
    lead = tuple(range(len(x.shape) - 1))
    square = b.mul(x, x)
    return b.reduce_sum(square, axes=lead) if lead else square
