"""What was read off a mask, held against the mask itself, computed at a few sizes.

The reading is arithmetic on regions of any size; a wrong rule in it would be a wrong model without a word. So each answer is
checked where it can be: the mask of positions is evaluated, and what disagrees stays data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from wasat.ir import DimLike, Graph, Node, Value, WasatError, evaluate, evaluate_dim
from wasat.ir.dims import symbols_of
from wasat.ir.graph import copy_node

from ..pattern import number_of

_ELEMENTS = 1 << 20
"""A larger mask is computed at smaller sizes only."""
_BEYOND = 3
"""So many positions more than a window has, or than any number that is written down, show where it ends."""


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
    order: list[Node] = []
    seen: set[Value] = set()
    waiting = [(v, False)]
    while waiting:
        x, ready = waiting.pop()
        if x.node is None or x.node.op.kind == "random":
            return None
        if ready:
            order.append(x.node)
        elif not seen.intersection(x.node.outputs):
            seen.update(x.node.outputs)
            waiting += [(x, True), *((u, False) for u in x.node.inputs)]
    made, env = Graph("mask"), dict[Value, Value]()
    for node in order:
        copy_node(made, node, env)
    made.set_outputs([env[v]])
    return made


def nothing_seen(v: Value, query: int, key: int, hidden: float) -> bool:
    """Whether some query finds only ``hidden`` up to its own position, in a function of positions: computed at two sizes."""
    cone = _cone(v)
    if cone is None:
        return False
    names = symbols_of(d for x in cone.values() for d in x.shape), *(node.attrs.symbols for node in cone.nodes)
    for size in (1, 9):
        env = dict.fromkeys((s for found in names for s in found), size)
        try:
            found = np.moveaxis(np.asarray(evaluate(cone, {}, symbols=env)[0]), (query, key), (-2, -1))
        except WasatError:  # sizes that do not go together
            continue
        if any((found[..., i, : i + 1] == hidden).all(-1).any() for i in range(found.shape[-2])):
            return True
    return False
