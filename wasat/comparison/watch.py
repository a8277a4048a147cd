"""Where a run first leaves what its numbers can hold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from wasat.ir import Array, Node, QArray

from .found import Alarm, line_of
from .fragments import layer_of
from .nodes import Run

F16_MAX = 65504.0


def watch(run: Run, side: str) -> list[Alarm]:
    """The first node that makes NaN, and the first that makes an infinity, of operands without; the first whose finite results
    f16 does not hold, though it holds the operands. Constants and views make nothing."""
    found: dict[str, Alarm] = {}
    for node in run.graph.nodes:
        if node.op.kind not in ("source", "view"):
            for what, largest in _leaves(node, run):
                if what not in found:
                    v = node.outputs[0]
                    place = layer_of(node), line_of(node.loc)
                    found[what] = Alarm(what, side, v.name, node.op.name, run.graph.name, *place, largest)
        if len(found) == 3:
            break
    return [found[k] for k in ("nan", "inf", "f16") if k in found]


def _leaves(node: Node, run: Run) -> Iterator[tuple[str, float]]:
    made = [x for v in node.outputs if (x := _floats(run.values[v])) is not None]
    if not made:
        return
    read = [x for v in node.inputs if (x := _floats(run.values[v])) is not None]
    largest = max(float(np.abs(x[np.isfinite(x)]).max(initial=0.0)) for x in made)
    if any(np.isnan(x).any() for x in made) and not any(np.isnan(x).any() for x in read):
        yield "nan", largest
    if any(np.isinf(x).any() for x in made) and not any(np.isinf(x).any() for x in read):
        yield "inf", largest
    if largest > F16_MAX and not any((np.abs(x[np.isfinite(x)]) > F16_MAX).any() for x in read):  # masks hold f32's smallest
        yield "f16", largest


def _floats(x: Array) -> np.ndarray | None:
    if isinstance(x, QArray) or np.asarray(x).dtype.kind in "biu":
        return None
    return np.asarray(x, np.float64) if np.asarray(x).dtype.itemsize < 4 else np.asarray(x)
