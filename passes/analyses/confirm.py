"""What was read off a mask, held against the mask itself, computed at a few sizes.

The reading is arithmetic on regions of any size; a wrong rule in it would be a wrong model without a word. So each answer is
checked where it can be: the mask of positions is evaluated, and what disagrees stays data.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import numpy as np
from wasat.ir import Builder, DimLike, Graph, Node, Program, QArray, Value, WasatError, evaluate, evaluate_dim
from wasat.ir.dims import symbols_of
from wasat.ir.graph import copy_node

from ..pattern import number_of

_ELEMENTS = 1 << 20
"""A larger mask is computed at smaller sizes only."""
_BEYOND = 3
"""So many positions more than a window has, or than any number that is written down, show where it ends."""


_PAIRS = 1 << 24
"""Elements of a mask from tables that are computed to see whether each token sees something."""
_MOST = 1 << 12
"""No more positions are looked at."""
_tables: ContextVar[Program | None] = ContextVar("tables", default=None)


@contextlib.contextmanager
def tables(program: Program) -> Iterator[None]:
    """While it lasts, masks that read parameters are computed with those of ``program``."""
    token = _tables.set(program)
    try:
        yield
    finally:
        _tables.reset(token)


def agrees(
    v: Value, shape: Sequence[DimLike], kept: Callable[[float], bool | None], causal: bool, window: int | None, whole: bool
) -> bool:
    """Whether ``v``, a mask right-aligned to scores of ``shape``, keeps nothing that the predicates hide, and (if they are the
    ``whole`` mask) all else: at three sizes of the symbols, where it can be computed without data.

    ``kept``: what an element of the mask means; None for one that says nothing.
    """
    cone = _cone(v)
    if cone is None:
        return True
    along = symbols_of(shape[-2:])
    others = symbols_of(d for x in cone.values() for d in x.shape), *(node.attrs.symbols for node in cone.nodes)
    symbols = dict.fromkeys([*along, *(s for names in others for s in names)])
    written = [abs(int(x)) for v in cone.values() if (x := number_of(v)) is not None and abs(x) < _ELEMENTS**0.5]
    for size in (1, 4, max(window or 0, *written, 6) + _BEYOND):
        # different numbers, so that no two axes are equal by chance; the later a symbol, the larger: queries come before keys
        env = {s: size + i if s in along else 2 + i for i, s in enumerate(symbols)}
        try:
            rows, keys = (evaluate_dim(d, env) for d in shape[-2:])
            if np.prod([float(evaluate_dim(d, env)) for d in v.shape]) > _ELEMENTS or rows < 1 or keys < 1:
                continue
            found = np.atleast_2d(np.asarray(evaluate(cone, {}, symbols=env)[0]))
        except WasatError:  # sizes that do not go together
            continue
        if any(m not in (1, n) for m, n in zip(found.shape[-2:], (rows, keys))):
            return False  # scores of one size, as of a loop that was written out, under a mask of another
        behind = np.arange(rows)[:, None] + (keys - rows) - np.arange(keys)[None, :]
        said = np.ones((rows, keys), bool)
        if causal:
            said &= behind >= 0
        if window is not None:
            said &= behind < window
        for number in np.unique(found):
            keeps, there = kept(number.item()), np.broadcast_to(found == number, (*found.shape[:-2], rows, keys))
            if keeps is not False and (there & ~said).any():
                return False
            if whole and keeps is not True and (there & said).any():
                return False
    return True


def _cone(v: Value) -> Graph | None:
    """The graph that computes ``v`` alone; None, where it takes data."""
    made, env = Graph("mask"), dict[Value, Value]()
    order: list[Node] = []
    seen: set[Value] = set()
    waiting = [(v, False)]
    while waiting:
        x, ready = waiting.pop()
        if x.node is None:
            program = _tables.get()
            if program is None or x.param not in program.params or not _small(x):
                return None
            array = program.load(x.param)
            if isinstance(array, QArray):
                return None
            env[x] = Builder(made).constant(array, x.tensor.dtype)
            continue
        if x.node.op.kind == "random":
            return None
        if ready:
            order.append(x.node)
        elif not seen.intersection(x.node.outputs):
            seen.update(x.node.outputs)
            waiting += [(x, True), *((u, False) for u in x.node.inputs)]
    for node in order:
        copy_node(made, node, env)
    made.set_outputs([env[v]])
    return made


def _small(v: Value) -> bool:
    sizes = [d for d in v.shape if isinstance(d, int)]
    return len(sizes) == len(v.shape) and math.prod(sizes) <= _PAIRS


def nothing_seen(v: Value, query: int, key: int, hidden: float) -> bool:
    """Whether some query finds only ``hidden`` up to its own position, in a function of positions: computed at two sizes, and
    where it reads tables, for as many positions as these have something of. True where that is not known."""
    cone = _cone(v)
    if cone is None:
        return True
    names = symbols_of(d for x in cone.values() for d in x.shape), *(node.attrs.symbols for node in cone.nodes)
    arrays = [x.const for x in cone.values() if x.const is not None and x.const.size > 1]
    of_pairs = any(sum(n > 1 for n in x.shape) > 1 for x in arrays)
    small, large = 9, _MOST if of_pairs else _MOST // 8
    if _blind(cone, names, v, query, key, hidden, 1) or _blind(cone, names, v, query, key, hidden, small):
        return True
    while arrays and large - small > 1:  # upwards until a table ends
        size = min(2 * small, (small + large) // 2)
        if math.prod(evaluate_dim(d, dict.fromkeys((s for n in names for s in n), size)) for d in v.shape) > _PAIRS:
            return of_pairs
        if (found := _blind(cone, names, v, query, key, hidden, size)) is True:
            return True
        small, large = (size, large) if found is False else (small, size)
    return False


def _blind(
    cone: Graph, names: Sequence[Sequence[str]], v: Value, query: int, key: int, hidden: float, size: int
) -> bool | None:  # fmt: skip
    """The same for ``size`` positions; None where it has no meaning for so many."""
    env = dict.fromkeys((s for found in names for s in found), size)
    try:
        found = np.moveaxis(np.asarray(evaluate(cone, {}, symbols=env)[0]), (query, key), (-2, -1))
    except WasatError:  # sizes that do not go together, a table that has ended
        return None
    behind = np.tri(found.shape[-2], found.shape[-1]) > 0
    return bool((~((found != hidden) & behind).any(-1)).any())
