"""What a comparison found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wasat.ir import Array, Loc, Node, Value
from wasat.quality import Quality

from .bounds import numbers, same
from .fragments import layer_of


@dataclass(frozen=True)
class Difference:
    """Where two sides differ in one value, both computed from the same operands."""

    value: str
    """Its name in the graph."""
    op: str
    """What makes it; operations in order, where several do."""
    graph: str
    layer: str
    """The part of the model, by the nearest parameter."""
    line: str
    """Where the user wrote it."""
    index: tuple[int, ...]
    """The element that is worst, by its own bound."""
    a: float
    b: float
    error: float
    """|a - b| there."""
    bound: float
    """What roundings allow there."""
    ratio: float
    """error / bound: above 1, they differ."""
    largest: float
    """The largest |a - b| of all elements."""
    mean: float
    """The mean |a - b| of all elements that are finite on both sides."""
    note: str = ""

    @property
    def differs(self) -> bool:
        return self.ratio > 1


@dataclass(frozen=True)
class Alarm:
    """The first node that makes NaN or an infinity of finite numbers, or a number that f16 does not hold."""

    what: str
    """``nan``, ``inf``, or ``f16``: beyond 65504."""
    side: str
    """``a`` or ``b``; ``interpreter``, where there is one program."""
    value: str
    op: str
    graph: str
    layer: str
    line: str
    largest: float
    """The largest finite magnitude among its results."""


@dataclass
class Stage:
    """One comparison value by value, both sides fed the same operands."""

    name: str
    values: int = 0
    """How many were compared."""
    differences: list[Difference] = field(default_factory=list)
    """Those beyond their bounds, in the order of execution."""
    closest: list[Difference] = field(default_factory=list)
    """Within their bounds: those nearest to them."""
    meant: list[Difference] = field(default_factory=list)
    """Those that differ by design, weights in fewer bits: the largest relative error first."""
    skipped: list[str] = field(default_factory=list)
    """What could not be compared, and why."""


@dataclass
class Comparison:
    """What :func:`wasat.compare` found; ``print`` shows it."""

    a: str
    b: str
    stages: list[Stage] = field(default_factory=list)
    outputs: list[Difference] = field(default_factory=list)
    """Of the whole: each side on its own."""
    unlike: list[str] = field(default_factory=list)
    """Outputs that one side lacks, or that have another shape or kind there."""
    alarms: list[Alarm] = field(default_factory=list)
    text: Quality | None = None
    max_kl: float | None = None

    @property
    def first(self) -> Difference | None:
        """The first value that differs beyond its bound though both sides were fed the same."""
        return next((d for s in self.stages for d in s.differences), None)

    @property
    def ok(self) -> bool:
        """Whether both sides have the same outputs, nothing differs beyond its bound or overflows on one side alone."""
        kinds = [x.what for x in self.alarms if x.what != "f16" and x.side != "interpreter"]
        far = self.max_kl is not None and self.text is not None and not self.text.kl <= self.max_kl
        alone = any(kinds.count(k) == 1 for k in kinds)
        return not (self.first or self.unlike or any(d.differs for d in self.outputs) or far or alone)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**_plain(asdict(self)), "ok": self.ok, "first": None if self.first is None else _plain(asdict(self.first))}

    def __str__(self) -> str:
        from .report import text

        return text(self)


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    if isinstance(x, float) and not np.isfinite(x):
        return str(x)
    return x


def difference(
    v: Value, name: str, x: Array, y: Array, bound: NDArray[np.float64], nodes: tuple[Node, ...] = (), note: str = ""
) -> Difference:
    """Two arrays of one shape, held to ``bound`` element by element. ``v``: the value, ``nodes``: what makes it."""
    p, q = numbers(x), numbers(y)
    equal = same(p, q)
    with np.errstate(all="ignore"):
        off = np.where(equal, 0.0, np.abs(p.astype(np.float64) - q.astype(np.float64)))
        off = np.nan_to_num(off, nan=np.inf, posinf=np.inf)
        ratio = np.where(equal, 0.0, np.where(np.isfinite(off), off / np.where(bound > 0, bound, 0.0), np.inf))
        ratio = np.where(np.isinf(bound) & np.isfinite(off), 0.0, np.nan_to_num(ratio, nan=np.inf, posinf=np.inf))
    at = np.unravel_index(int(ratio.argmax()), ratio.shape) if ratio.size else ()
    finite = off[np.isfinite(off)]
    node = v.node

    def worst(array: NDArray[Any]) -> float:
        return float(array[at]) if ratio.size else 0.0

    return Difference(
        name, " ".join(dict.fromkeys(n.op.name for n in nodes or (node,) if n is not None and n.op.kind != "source")),
        v.graph.name, layer_of(node) if node is not None else "", line_of(v.loc), tuple(int(i) for i in at),
        worst(p), worst(q), worst(off), worst(bound), worst(ratio), float(off.max(initial=0.0)),
        float(finite.mean()) if finite.size else 0.0, note,
    )  # fmt: skip


def line_of(loc: Loc | None) -> str:
    """The user's file and line, and what is written there."""
    return "" if loc is None else f"{loc}" + (f": {loc.source.strip()}" if loc.source else "")
