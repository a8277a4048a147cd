"""Which scheme each weight gets, where all have to fit into so many bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from wasat.ir import QArray, QTensorType, WasatError, evaluate_dim
from wasat.ir.ops.quant import quantize_array
from wasat.passes.serving.recipes import Formats, Storage, kernels_read, storage

from .weights import Weight

SCHEMES = ("s4", "int4b32f16", "s5", "s6", "int8")
"""What is chosen from; each where rows are of its blocks and the target has kernels that read it."""
_SAMPLED = 1 << 16
"""Elements of a weight, in whole rows at even distances, from which its error in a scheme is estimated."""


@dataclass(frozen=True)
class Choice:
    """A weight in one scheme: how many bits it takes, scales included, and what that costs (a divergence)."""

    storage: Storage
    bits: int
    cost: float


def storages(weight: Weight, formats: Formats, schemes: Sequence[str] = SCHEMES) -> list[Storage]:
    """The schemes in which a weight can be stored for kernels that read ``formats``, the smallest first."""
    found = [storage(s, weight.role, weight.shape[-1], 32, formats, weight.operations) for s in schemes]
    read = [s for s in found if isinstance(s, Storage) and all(kernels_read(formats, o, s.type) for o in weight.operations)]
    return sorted(read, key=lambda s: bits_of(type_of(s, weight.shape)))


def type_of(s: Storage, shape: Sequence[int]) -> QTensorType:
    assert isinstance(s.type, QTensorType)
    return s.type.with_shape(*shape)


def bits_of(t: QTensorType) -> int:
    """Of a weight, scales included."""
    *rows, _ = (evaluate_dim(d, {}) for d in t.shape)
    return math.prod(rows) * evaluate_dim(t.row_bits, {})


def coded(x: np.ndarray, s: Storage, importance: NDArray[np.float32] | None) -> QArray:
    """x in a scheme, its scales searched with errors weighted by ``importance`` [k]."""
    return quantize_array(x, type_of(s, x.shape), search=True, importance=importance)


def error(x: np.ndarray, q: np.ndarray, importance: NDArray[np.float32] | None) -> float:
    """The squared error of q, each feature weighted: what it does to a row of the layer's results, on average."""
    d = (q - x).astype(np.float64) ** 2
    return float(d.sum() if importance is None else (d * importance).sum())


def errors(x: np.ndarray, options: Sequence[Storage], importance: NDArray[np.float32] | None) -> list[float]:
    """The squared error of x in each scheme, estimated from some of its rows."""
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, len(rows) * rows.shape[1] // _SAMPLED)
    some = np.ascontiguousarray(rows[::step])
    share = len(some) / len(rows)
    return [error(some, coded(some, s, importance).dense(), importance) / share for s in options]


def chosen(options: Mapping[str, Sequence[Choice]], budget: int, together: Iterable[Sequence[str]] = ()) -> dict[str, Choice]:
    """One choice for each weight, so that costs are least in sum and bits at most ``budget``. Weights that are named
    ``together``, each in one place at most, have the same storages to choose from, and get the same.

    Of each weight the smallest first; then, again and again, whatever saves most for a bit: as far as the budget goes, that is
    the optimum. What then does not fit alone is exchanged for steps of others, as long as that saves.
    Raises WasatError where the smallest are too large.
    """
    members = {names[0]: names for names in together}
    single = set(options).difference(*members.values())
    members |= {name: [name] for name in options if name in single}
    of_all = {first: [_sum(c) for c in zip(*(options[n] for n in names), strict=True)] for first, names in members.items()}
    taken = _cheapest(of_all, budget)
    at = {first: of_all[first].index(c) for first, c in taken.items()}
    return {name: options[name][at[first]] for first, names in members.items() for name in names}


def _sum(choices: Sequence[Choice]) -> Choice:
    """The same storage of several weights."""
    return Choice(choices[0].storage, sum(c.bits for c in choices), sum(c.cost for c in choices))


def _cheapest(options: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    hulls = {name: _hull(choices) for name, choices in options.items()}
    taken = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(c.bits for c in taken.values())
    if left < 0:
        raise WasatError(f"no choice fits into {budget} bits: the least is {budget - left}")
    steps = [(_slope(a, b), i, name, b) for i, (name, hull) in enumerate(hulls.items()) for a, b in pairwise(hull)]
    full: set[str] = set()
    for _, _, name, new in sorted(steps, key=lambda s: (-s[0], s[1], s[3].bits)):
        more = new.bits - taken[name].bits
        if name in full or more > left:
            full.add(name)  # later steps of this weight are from here
            continue
        taken[name], left = new, left - more
    while better := _exchanged(hulls, taken, left):
        taken, left = better
    return taken


def _exchanged(
    hulls: Mapping[str, Sequence[Choice]], taken: Mapping[str, Choice], left: int
) -> tuple[dict[str, Choice], int] | None:
    """One weight a step further, others as many steps back as that takes, those first that lose least for a bit; None where
    that costs more for every weight. A table that is half the model may not fit by a hair, which the others can spare."""
    so_far = {name: hull[: hull.index(taken[name]) + 1] for name, hull in hulls.items()}
    back = sorted((_slope(a, b), i, name, a) for i, (name, h) in enumerate(so_far.items()) for a, b in pairwise(h))
    for name, hull in hulls.items():
        at = hull.index(taken[name])
        if at + 1 == len(hull):
            continue
        new, room = dict(taken) | {name: hull[at + 1]}, left - (hull[at + 1].bits - hull[at].bits)
        for _, _, other, old in back:
            if room >= 0:
                break
            if other != name:
                new[other], room = old, room + new[other].bits - old.bits
        if room >= 0 and sum(c.cost for c in new.values()) < sum(c.cost for c in taken.values()):
            return new, room
    return None


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Those that are best at some price of a bit, smallest first: the lower convex hull of costs over bits."""
    hull: list[Choice] = []
    for c in sorted(choices, key=lambda c: (c.bits, c.cost)):
        if hull and c.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], c):
            hull.pop()
        hull.append(c)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    """What a bit saves, from one choice to the next."""
    return (a.cost - b.cost) / (b.bits - a.bits)
