"""How each value lies along the sequence: the analysis on which the KV cache rests.

A value is *fixed* (the same whatever the tokens are), or it runs *along* one axis: element i of that axis depends on the tokens
at positions up to i and on nothing later. Whatever does not fit looks ahead, and remembers the node where that began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wasat.ir import DimLike, Graph, IRError, Node, Value, equal
from wasat.ir.dims import symbols_of

Kind = Literal["fixed", "token", "position", "uniform", "pair", "ahead"]


@dataclass(frozen=True)
class Label:
    """Where a value stands in the analysis."""

    kind: Kind
    """``token``: depends on tokens. ``position``: on positions alone, the same for every row of the batch. ``uniform``: repeats
    something fixed along the axis. ``pair``: depends on two positions alone, along ``axis`` and ``other``, as attention masks
    do. ``ahead``: an element may depend on later tokens, or on how many there are."""
    axis: int = 0
    other: int = 0
    mixes: bool = False
    """The node attends over earlier positions."""
    culprit: Node | Value | None = None
    reason: str = ""

    @property
    def along(self) -> bool:
        return self.kind not in ("fixed", "ahead")

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes along the sequence."""
        return (self.axis, self.other) if self.kind == "pair" else (self.axis,) if self.along else ()


FIXED = Label("fixed")


_HINT = "if this is attention, explain says why it was not fused"


class LooksAhead(Exception):
    """Raised by a transfer function; the analysis attaches the node."""


Transfer = Callable[[Node, Sequence[Label]], "int | Label"]
"""From a node and the labels of its operands (at least one along the sequence) to the axis of its result."""

TRANSFER: dict[str, Transfer] = {}


def transfers(*names: str) -> Callable[[Transfer], Transfer]:
    def register(f: Transfer) -> Transfer:
        TRANSFER.update(dict.fromkeys(names, f))
        return f

    return register


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
    name = node.op.name
    if name == "iota":
        if symbol not in node.attrs.symbols:
            return FIXED
        if str(node.attrs.size) != symbol:  # type: ignore[attr-defined]
            raise LooksAhead(f"it counts to {node.attrs.size}")  # type: ignore[attr-defined]
        return Label("position", 0)
    if not any(x.along for x in given):
        if symbol not in node.attrs.symbols:
            return FIXED
        if name == "broadcast_to":
            axes = _axes_of(node.output.shape, symbol)
            if len(axes) == 2:
                return Label("pair", axes[0], axes[1], culprit=node, reason="it relates positions to each other")
            return Label("uniform", axes[0]) if len(axes) == 1 else FIXED
        raise LooksAhead(f"it depends on {symbol}, the number of tokens")
    rule = _elementwise if node.op.elementwise else TRANSFER.get(name)
    if rule is None:
        raise LooksAhead(f"nothing is known of how {name} acts along the sequence")
    if name != "attention" and (ends := _meeting(node, given, rule, symbol)) is not None:
        return Label("pair", *ends, culprit=node, reason="it relates positions to each other")
    result = rule(node, given)
    if isinstance(result, Label):
        return result
    kinds = {x.kind for x in given if x.along}
    return Label("token" if "token" in kinds else "position" if "position" in kinds else "uniform", result)


def _meeting(node: Node, given: Sequence[Label], rule: Transfer, symbol: str) -> tuple[int, int] | None:
    """The axes of a result that relates positions to positions; None for one that does not."""
    pairs = any(x.kind == "pair" for x in given)
    if any(x.kind == "token" for x in given):
        if pairs:
            raise LooksAhead("tokens meet a function of two positions; " + _HINT)
        return None
    if not (pairs or node.op.elementwise or node.op.name == "broadcast_to"):
        return None
    ends = {image(node, i, axis, rule) for i, x in enumerate(given) for axis in x.axes}
    if node.op.name == "broadcast_to":
        ends.update(_axes_of(node.output.shape, symbol))
    if len(ends) == 2:
        return min(ends), max(ends)
    if pairs:
        raise LooksAhead("it relates more than two positions")
    return None


def image(node: Node, i: int, axis: int, rule: Transfer | None = None) -> int:
    """The axis of the result along which ``axis`` of operand i runs. Raises LooksAhead where there is none."""
    rule = rule or (_elementwise if node.op.elementwise else TRANSFER[node.op.name])
    end = rule(node, [Label("position", axis) if j == i else FIXED for j in range(len(node.inputs))])
    assert isinstance(end, int)  # of attention alone it is a label
    return end


def _same(axes: set[int]) -> int:
    if len(axes) != 1:
        raise LooksAhead("its operands run along different axes: positions meet each other; " + _HINT)
    return axes.pop()


def _elementwise(node: Node, given: Sequence[Label]) -> int:
    rank = len(node.output.shape)
    return _same({x.axis + rank - len(v.shape) for v, x in zip(node.inputs, given) if x.along})


def _only_first(node: Node, given: Sequence[Label]) -> int:
    """The axis of the first operand; the others must be fixed."""
    if any(x.along for x in given[1:]):
        raise LooksAhead("an operand other than the first runs along the sequence")
    return given[0].axis


@transfers("reshape")
def _reshape(node: Node, given: Sequence[Label]) -> int:
    x, y, a = node.inputs[0], node.output, given[0].axis
    before: DimLike = 1
    for d in x.shape[:a]:
        before = before * d
    done: DimLike = 1
    for j, d in enumerate(y.shape):
        if equal(done, before) is True and equal(d, x.shape[a]) is True:
            return j
        done = done * d
    raise LooksAhead("it merges the sequence with another axis")


@transfers("transpose")
def _transpose(node: Node, given: Sequence[Label]) -> int:
    return int(node.attrs.perm.index(given[0].axis))  # type: ignore[attr-defined]


@transfers("broadcast_to")
def _broadcast_to(node: Node, given: Sequence[Label]) -> int:
    if node.checks:
        raise LooksAhead("it may stretch an axis of size 1 when it runs")
    return given[0].axis + len(node.output.shape) - len(node.inputs[0].shape)


@transfers("slice")
def _slice(node: Node, given: Sequence[Label]) -> int:
    a, at = node.attrs, given[0].axis
    if a.starts[at] != 0 or a.steps[at] != 1 or equal(a.stops[at], node.inputs[0].shape[at]) is not True:  # type: ignore[attr-defined]
        raise LooksAhead("it takes a part of the sequence")
    return at


@transfers("pad")
def _pad(node: Node, given: Sequence[Label]) -> int:
    if node.attrs.low[given[0].axis] != 0 or node.attrs.high[given[0].axis] != 0:  # type: ignore[attr-defined]
        raise LooksAhead("it pads the sequence")
    return given[0].axis


@transfers("concat")
def _concat(node: Node, given: Sequence[Label]) -> int:
    if not all(x.along for x in given) or len({x.kind for x in given}) != 1:
        raise LooksAhead("it joins parts that run along the sequence with others that do not")
    at = _same({x.axis for x in given})
    if node.attrs.axis == at:  # type: ignore[attr-defined]
        raise LooksAhead("it joins sequences end to end")
    return at


@transfers(
    "reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod", "reduce_any", "reduce_all", "logsumexp",
    "arg_max", "arg_min",
)  # fmt: skip
def _reduce(node: Node, given: Sequence[Label]) -> int:
    attrs: Any = node.attrs
    axes, at = getattr(attrs, "axes", None) or (attrs.axis,), given[0].axis
    if at in axes:
        raise LooksAhead("it reduces over the sequence, later tokens included")
    return at if attrs.keepdims else at - sum(a < at for a in axes)


@transfers("softmax", "log_softmax", "cumsum", "sort", "top_k", "reverse")
def _along_another(node: Node, given: Sequence[Label]) -> int:
    attrs: Any = node.attrs
    axes = getattr(attrs, "axes", None) or (attrs.axis,)
    if given[0].axis in axes:
        raise LooksAhead("it works across the sequence, later tokens included")
    return _only_first(node, given)


@transfers("rms_norm", "layer_norm", "glu", "linear", "quantized_linear")
def _last_axis(node: Node, given: Sequence[Label]) -> int:
    at = _only_first(node, given)
    if at == len(node.inputs[0].shape) - 1:
        raise LooksAhead("it works across the sequence, later tokens included")
    return at


@transfers("embedding", "quantized_embedding")
def _embedding(node: Node, given: Sequence[Label]) -> int:
    if given[0].along:
        raise LooksAhead("its table runs along the sequence")
    return given[1].axis


@transfers("one_hot")
def _one_hot(node: Node, given: Sequence[Label]) -> int:
    return given[0].axis


@transfers("gather")
def _gather(node: Node, given: Sequence[Label]) -> int:
    picked: int = node.attrs.axis  # type: ignore[attr-defined]
    if not given[0].along:
        return picked + given[1].axis
    if given[1].along or given[0].axis == picked:
        raise LooksAhead("it picks from the sequence by index")
    return given[0].axis + (len(node.inputs[1].shape) - 1 if given[0].axis > picked else 0)


@transfers("take_along")
def _take_along(node: Node, given: Sequence[Label]) -> int:
    at = _same({x.axis for x in given if x.along})
    if node.attrs.axis == at:  # type: ignore[attr-defined]
        raise LooksAhead("it picks from the sequence by index")
    return at


@transfers("matmul")
def _matmul(node: Node, given: Sequence[Label]) -> int:
    (x, y), (lx, ly) = node.inputs, given
    rank = len(node.output.shape)
    if (lx.along and lx.axis == len(x.shape) - 1) or (ly.along and ly.axis == len(y.shape) - 2):
        raise LooksAhead("it sums over the sequence, later tokens included; " + _HINT)
    axes = {lab.axis + rank - len(v.shape) for v, lab in ((x, lx), (y, ly)) if lab.along}
    if len(axes) != 1:
        raise LooksAhead("every position meets every other; " + _HINT)
    return axes.pop()


@transfers("rope")
def _rope(node: Node, given: Sequence[Label]) -> int:
    if given[0].along and given[0].axis != 1:
        raise LooksAhead("the positions are not axis 1")
    if not given[0].along or not given[1].along:
        raise LooksAhead("x and its positions do not both run along the sequence")
    return 1


@transfers("attention")
def _attention(node: Node, given: Sequence[Label]) -> int | Label:
    attrs: Any = node.attrs
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
        return q.axis
    if not (q.along and k.along and v.along) or k.axis != 1 or v.axis != 1:
        raise LooksAhead("q, k and v do not all run along the sequence on axis 1")
    if not attrs.causal:
        raise LooksAhead("it is bidirectional: a token attends to later ones")
    if mask.along and any(len(node.inputs[3].shape) - axis > 2 for axis in mask.axes):
        raise LooksAhead("its mask runs along the sequence on an axis that is neither that of queries nor that of keys")
    return Label("token", 1, mixes=True)


@transfers("conv")
def _conv(node: Node, given: Sequence[Label]) -> int:
    at = given[0].axis
    if at >= 2:
        raise LooksAhead("it is a convolution over the sequence: a cache of its last inputs is not derived")
    if at == 1:
        raise LooksAhead("its channels run along the sequence, and it sums over them")
    return _only_first(node, given)


def refuse(label: Label, output: str, symbol: str) -> IRError:
    """The error for an output that looks ahead: what, which node, which line."""
    at = label.culprit
    loc = at.loc if at is not None else None
    shown = repr(at)
    return IRError(f"no KV cache can be derived for output {output}: along {symbol}, {shown}\n  {label.reason}", loc)
