"""How each value lies along the sequence: the analysis on which the KV cache rests.

A value is *fixed* (the same whatever the tokens are), or it runs *along* one axis: element i of that axis depends on the tokens
at positions up to i and on nothing later. Whatever does not fit looks ahead, and remembers the node where that began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wasat.ir import DimLike, Graph, IRError, Node, Value, equal
from wasat.ir.axes import Factor
from wasat.ir.dims import symbols_of
from wasat.ir.ops.attention import AttentionAttrs
from wasat.ir.ops.shape import Slice

Kind = Literal["fixed", "token", "position", "uniform", "pair", "last", "ahead"]


@dataclass(frozen=True)
class Label:
    """Where a value stands in the analysis."""

    kind: Kind
    """``token``: depends on tokens. ``position``: on positions alone, the same for every row of the batch. ``uniform``: repeats
    something fixed along the axis. ``pair``: depends on two positions alone, along ``axis`` and ``other``, as attention masks
    do. ``last``: made of what stands at the last token, along no axis any more. ``ahead``: an element may depend on later
    tokens, or on how many there are."""
    axis: int = 0
    other: int = 0
    mixes: bool = False
    """The node attends over earlier positions."""
    culprit: Node | Value | None = None
    reason: str = ""

    @property
    def served(self) -> bool:
        """Whether it changes from call to call, and can be had."""
        return self.kind not in ("fixed", "ahead")

    @property
    def along(self) -> bool:
        return self.kind not in ("fixed", "last", "ahead")

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes along the sequence."""
        return (self.axis, self.other) if self.kind == "pair" else (self.axis,) if self.along else ()


FIXED, LAST = Label("fixed"), Label("last")


_HINT = "if this is attention, explain says why it was not fused"


class LooksAhead(Exception):
    """What the axis rule of a node does not allow; the analysis attaches the node."""


def analyze(graph: Graph, symbol: str) -> dict[Value, Label]:
    """Labels of all values of ``graph`` along the dimension ``symbol``."""
    labels: dict[Value, Label] = {}
    for v in [*graph.inputs, *graph.params.values()]:
        axes = _axes_of(v.shape, symbol)
        labels[v] = FIXED if not axes else Label("token", axes[0]) if axes[0] >= 0 and len(axes) == 1 else _two(v, symbol)
    for node in graph.nodes:
        for v, label in zip(node.outputs, _label(node, [labels[v] for v in node.inputs], symbol)):
            labels[v] = label
    return labels


def _two(v: Value, symbol: str) -> Label:
    return Label("ahead", culprit=v, reason=f"%{v.name} is {v.type}: {symbol} must be the size of just one axis")


def _axes_of(shape: Sequence[DimLike], symbol: str) -> list[int]:
    """Axes whose size is the symbol; -1 for an axis whose size is another function of it."""
    return [(i if str(d) == symbol else -1) for i, d in enumerate(shape) if symbol in symbols_of([d])]


def _label(node: Node, given: list[Label], symbol: str) -> list[Label]:
    ahead = next((x for x in given if x.kind == "ahead"), None)
    if ahead is not None:
        return [ahead] * len(node.outputs)
    try:
        own = _own(node, given, symbol)
        out = []
        for v in node.outputs:
            axes = _axes_of(v.shape, symbol)
            if axes != list(own.axes):
                raise LooksAhead(f"its result {v.type} does not run along {symbol} on one axis")
            out.append(own)
        return out
    except LooksAhead as e:
        return [Label("ahead", culprit=node, reason=str(e))] * len(node.outputs)


def _own(node: Node, given: list[Label], symbol: str) -> Label:
    if any(x.kind == "last" for x in given):
        return _after_last(node, given, symbol)
    if not any(x.along for x in given):
        return _given_sizes(node, symbol)
    if _takes_last(node, given, symbol):
        return LAST
    if isinstance(node.attrs, AttentionAttrs):
        return _attention(node, node.attrs, given)
    if (ends := _meeting(node, given, symbol)) is not None:
        return Label("pair", *ends, culprit=node, reason="it relates positions to each other")
    kinds = {x.kind for x in given if x.along}
    return Label("token" if "token" in kinds else "position" if "position" in kinds else "uniform", _through(node, given))


def _given_sizes(node: Node, symbol: str) -> Label:
    """The label of what reads nothing along the sequence."""
    if symbol not in node.attrs.symbols:
        return FIXED
    axes = _axes_of(node.outputs[0].shape, symbol)
    if node.op.kind == "source" and axes:
        if axes != [0]:
            raise LooksAhead(f"it counts to {node.output.shape[0]}")
        return Label("position", 0)
    if not axes or axes != _repeated(node, symbol):
        raise LooksAhead(f"it depends on {symbol}, the number of tokens")
    if len(axes) == 2:
        return Label("pair", axes[0], axes[1], culprit=node, reason="it relates positions to each other")
    return Label("uniform", axes[0])


def _takes_last(node: Node, given: Sequence[Label], symbol: str) -> bool:
    """Whether the node takes the last token's part of what runs along the sequence, as an axis of size 1."""
    x = given[0]
    if node.op.name != "slice" or x.kind != "token":
        return False
    cut, old = Slice.Attrs.of(node), node.inputs[0].shape[x.axis]
    return equal(cut.starts[x.axis], old - 1) is True and not _axes_of(node.output.shape, symbol)


def _after_last(node: Node, given: Sequence[Label], symbol: str) -> Label:
    """The label of what reads something made of the last token."""
    if any(x.along for x in given):
        raise LooksAhead("it gives every token what stands at the last one")
    if symbol in node.attrs.symbols:
        raise LooksAhead(f"it depends on {symbol}, the number of tokens")
    return LAST


def _repeated(node: Node, symbol: str) -> list[int]:
    """The axes along the sequence on which the result repeats what it is made of."""
    along = _axes_of(node.outputs[0].shape, symbol)
    return [i for i, axis in enumerate(node.axes.results[0]) if i in along and any(f.role == "repeated" for f in axis)]


def _meeting(node: Node, given: Sequence[Label], symbol: str) -> tuple[int, int] | None:
    """The axes of a result that relates positions to positions; None for one that does not."""
    pairs = any(x.kind == "pair" for x in given)
    if any(x.kind == "token" for x in given):
        if pairs:
            raise LooksAhead("tokens meet a function of two positions; " + _HINT)
        return None
    repeated = _repeated(node, symbol)
    if not (pairs or node.op.elementwise or repeated):
        return None
    ends = {*repeated, *(image(node, i, axis) for i, x in enumerate(given) for axis in x.axes)}
    if len(ends) == 2:
        return min(ends), max(ends)
    if pairs:
        raise LooksAhead("it relates more than two positions")
    return None


def image(node: Node, i: int, axis: int) -> int:
    """The axis of the results along which ``axis`` of operand i runs. Raises LooksAhead where there is none."""
    rule = node.axes
    factors = rule.operands[i][axis]
    for f in factors:
        if f.role != "free":
            raise LooksAhead(_reason(node, f))
    at = rule.results[0].index(factors) if factors in rule.results[0] else None
    if at is None or any(rule.results[k][at : at + 1] != (factors,) for k in range(1, len(node.outputs))):
        raise LooksAhead("it merges the sequence with another axis")
    return at


def _reason(node: Node, f: Factor) -> str:
    if f.does:
        return "it " + f.does.format("the sequence")
    if f.role == "reduced":
        hint = "; " + _HINT if node.op.weight is None else ""
        return f"it sums over the sequence, later tokens included{hint}" if node.op.kind == "product" else (
            "it reduces over the sequence, later tokens included"
        )  # fmt: skip
    if f.role == "indexed":
        return "it picks from the sequence by index"
    if f.role == "window":
        return "it works on windows of the sequence: a cache of its last inputs is not derived"
    return "it works across the sequence, later tokens included"


def _through(node: Node, given: Sequence[Label]) -> int:
    """The axis of the result along which all operands that run along the sequence do."""
    rule = node.axes
    ends = {image(node, i, axis) for i, x in enumerate(given) for axis in x.axes}
    if len(ends) != 1:
        met = "every position meets every other" if node.op.kind == "product" else (
            "its operands run along different axes: positions meet each other"
        )  # fmt: skip
        raise LooksAhead(f"{met}; {_HINT}")
    end = ends.pop()
    others = [axes for x, axes in zip(given, rule.operands) if not x.along]
    mixed = node.op.kind == "view" and len({x.kind for x in given if x.along}) > 1
    if mixed or any(f in axis for axes in others for axis in axes for f in rule.results[0][end]):
        raise LooksAhead("it joins parts that run along the sequence with others that do not")
    return end


def _attention(node: Node, attrs: AttentionAttrs, given: Sequence[Label]) -> Label:
    """Attention keeps its keys and values: of all that mixes tokens, it alone."""
    q, k, v = given[:3]
    if q.along and q.axis != 1:
        raise LooksAhead("the positions of q are not axis 1")
    mask = given[3] if len(given) > 3 else FIXED
    if mask.kind == "token":
        raise LooksAhead("its mask is data that runs along the sequence: only functions of positions can be cached")
    if not k.along and not v.along:
        if attrs.causal or attrs.window is not None:
            raise LooksAhead("it is causal over keys that do not run along the sequence")
        if mask.along:
            raise LooksAhead("its mask runs along the sequence, and its keys do not")
        return Label(q.kind, q.axis)
    if not (q.along and k.along and v.along) or k.axis != 1 or v.axis != 1:
        raise LooksAhead("q, k and v do not all run along the sequence on axis 1")
    if not attrs.causal:
        raise LooksAhead("it is bidirectional: a token attends to later ones")
    if mask.along and any(len(node.inputs[3].shape) - axis > 2 for axis in mask.axes):
        raise LooksAhead("its mask runs along the sequence on an axis that is neither that of queries nor that of keys")
    return Label("token", 1, mixes=True)


def refuse(label: Label, output: str, symbol: str) -> IRError:
    """The error for an output that looks ahead: what, which node, which line."""
    at = label.culprit
    loc = at.loc if at is not None else None
    shown = repr(at)
    return IRError(f"no KV cache can be derived for output {output}: along {symbol}, {shown}\n  {label.reason}", loc)
