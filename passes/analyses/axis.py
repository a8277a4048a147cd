"""How each value lies along the sequence: the analysis on which the KV cache rests.

A value is *fixed* (the same whatever the tokens are), or it runs *along* one axis: element i of that axis depends on the tokens
at positions up to i and on nothing later. It may relate positions to positions, as scores do: then what is known of it where a
key is later than the query decides whether a sum over keys looks back. Whatever does not fit looks ahead, and remembers the
node where that began.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from wasat.ir import DimLike, Graph, IRError, Node, Value, equal, symbol
from wasat.ir.axes import AxisRule, Factor
from wasat.ir.dims import maximum, minimum
from wasat.ir.ops.attention import AttentionAttrs, mask_and_sink
from wasat.ir.ops.index import AxisAttrs
from wasat.ir.ops.scan import ScanAttrs
from wasat.ir.ops.shape import Slice

from .affine import Affine, implies
from .ahead import sight
from .indexing import Indexing
from .later import apart, beside, blind, neutralized, stands_for
from .parts import part
from .sequence import FIXED, LAST, Kind, Label, LooksAhead, axes_of, beyond

_HINT = "if this is attention, explain says why it was not fused"


def analyze(graph: Graph, symbol: str, batch: DimLike = 1) -> dict[Value, Label]:
    """Labels of all values of ``graph`` along the dimension ``symbol``; ``batch``: how many rows inputs have."""
    labels: dict[Value, Label] = {}
    for v in [*graph.inputs, *graph.params.values()]:
        axes = axes_of(v.shape, symbol)
        one = len(axes) == 1 and beyond(v.shape[axes[0]], symbol) == 0
        own = v.param is None and not isinstance(batch, int) and any(str(d) == str(batch) for d in v.shape)
        labels[v] = Label("fixed", rows=own) if not axes else Label("token", axes[0]) if one else _two(v, symbol)
    at = Indexing(())
    for node in graph.nodes:
        given = [labels[v] for v in node.inputs]
        own = any(x.rows for x in given)
        for v, label in zip(node.outputs, _label(node, given, symbol, at, labels)):
            labels[v] = replace(label, rows=True) if own and label.kind in ("fixed", "position", "uniform", "pair") else label
    return labels


def _two(v: Value, symbol: str) -> Label:
    return Label("ahead", culprit=v, reason=f"%{v.name} is {v.type}: {symbol} must be the size of just one axis")


def uncut(graph: Graph, name: str) -> Graph:
    """A copy in which sizes ``max(0, s - k)``, of what is sliced off at the end, are ``s - k``.

    Element for element the same: of fewer than k tokens, such a slice has no elements, and what is put in front is cut.
    """
    sizes = {str(d) for v in graph.values() for d in v.shape if not isinstance(d, int)}
    if not any("max(" in d for d in sizes):
        return graph
    s = symbol(name)
    least = max((k for k in range(1, _MOST_CUT) if any(str(maximum(0, s - k)) in d for d in sizes)), default=0)
    if not least or any(str(minimum(k, s)) in d for d in sizes for k in range(1, least)):
        return graph
    longer = "longer"
    while longer in graph.symbols:
        longer += "_"
    return graph.clone(dims={name: symbol(longer) + least}).clone(dims={longer: symbol(name) - least})


_MOST_CUT = 17


def _label(node: Node, given: list[Label], symbol: str, at: Indexing, labels: Mapping[Value, Label]) -> list[Label]:
    ahead = next((x for x in given if x.kind == "ahead"), None)
    if ahead is not None:
        return [ahead] * len(node.outputs)
    try:
        own = _own(node, given, symbol, at, labels)
        out = own if isinstance(own, list) else [own] * len(node.outputs)
        for v, label in zip(node.outputs, out):
            if label.kind != "ahead":
                _fits(v, label, symbol)
        return out
    except LooksAhead as e:
        return [Label("ahead", culprit=node, reason=str(e))] * len(node.outputs)


def _fits(v: Value, label: Label, symbol: str) -> None:
    """Raises LooksAhead unless the axes along the sequence are those that the label says, and as long."""
    if axes_of(v.shape, symbol) != list(label.axes):
        raise LooksAhead(f"its result {v.type} does not run along {symbol} on one axis")
    for axis in label.axes:
        wanted = label.extra if not label.relates else label.front + label.back if axis == label.wide else 0
        if beyond(v.shape[axis], symbol) != wanted:
            raise LooksAhead(f"its result {v.type} does not run along {symbol} on one axis")


def _own(
    node: Node, given: list[Label], symbol: str, at: Indexing, labels: Mapping[Value, Label]
) -> Label | list[Label]:
    if any(x.kind == "last" for x in given):
        return _after_last(node, given, symbol)
    if not any(x.along for x in given):
        return _given_sizes(node, symbol, at)
    if _takes_last(node, given, symbol):
        return LAST
    if isinstance(node.attrs, AttentionAttrs):
        return _attention(node, node.attrs, given, at, labels)
    if isinstance(node.attrs, ScanAttrs):
        return _scan(node, node.attrs, given, symbol)
    if node.op.recurrence:
        return _carried(node, given)
    if (shifted := part(node, given, symbol)) is not None:
        return shifted
    if (taken := _by_distance(node, given, at)) is not None:
        return taken
    return _general(node, given, symbol, at, labels)


def _given_sizes(node: Node, symbol: str, at: Indexing) -> Label:
    """The label of what reads nothing along the sequence."""
    if symbol not in node.attrs.symbols:
        return FIXED
    axes = axes_of(node.outputs[0].shape, symbol)
    if node.op.kind == "source" and axes:
        if axes != [0] or beyond(node.output.shape[0], symbol) != 0:
            raise LooksAhead(f"it counts to {node.output.shape[0]}")
        return Label("position", 0)
    if not axes or axes != _repeated(node, node.axes, symbol) or any(beyond(node.output.shape[i], symbol) != 0 for i in axes):
        raise LooksAhead(f"it depends on {symbol}, the number of tokens")
    if len(axes) == 2:
        return _pair(node, axes[0], axes[1], at)
    return Label("uniform", axes[0])


def _takes_last(node: Node, given: Sequence[Label], symbol: str) -> bool:
    """Whether the node takes the last token's part of what runs along the sequence, as an axis of size 1."""
    x, cut = given[0], node.attrs
    if not isinstance(cut, Slice.Attrs) or x.kind != "token" or x.extra:
        return False
    return equal(cut.starts[x.axis], node.inputs[0].shape[x.axis] - 1) is True and not axes_of(node.output.shape, symbol)


def _after_last(node: Node, given: Sequence[Label], symbol: str) -> Label:
    """The label of what reads something made of the last token."""
    if any(x.along for x in given):
        raise LooksAhead("it gives every token what stands at the last one")
    if symbol in node.attrs.symbols:
        raise LooksAhead(f"it depends on {symbol}, the number of tokens")
    return LAST


def _repeated(node: Node, rule: AxisRule, symbol: str) -> list[int]:
    """The axes along the sequence on which the result repeats what it is made of."""
    along = axes_of(node.outputs[0].shape, symbol)
    return [i for i, axis in enumerate(rule.result) if i in along and any(f.role == "repeated" for f in axis)]


def _pair(node: Node, axis: int, other: int, at: Indexing) -> Label:
    """A function of two positions, with the numbers that it is on either side of the diagonal."""
    above, below = apart(at, node.output, axis, other)
    return Label(
        "pair", axis, other, culprit=node, reason="it relates positions to each other", above=above, below=below
    )  # fmt: skip


def _by_distance(node: Node, given: Sequence[Label], at: Indexing) -> Label | None:
    """The label of what a query takes of its scores at places that are none after its own, as distances are."""
    if not node.is_a("take_along"):
        return None
    (x, index), (v, ids), axis = given, node.inputs, AxisAttrs.of(node).axis
    if x.kind != "scores" or x.widened or (x.key >= 0 and x.key != axis) or axis not in x.axes:
        return None
    if index.kind != "pair" or index.axes != x.axes or index.rows:
        return None
    query, rank = x.axis + x.other - axis, len(v.shape)
    own = Affine(tuple(int(i == query) for i in range(rank)), 0)
    for p in at.pieces(ids):
        if not isinstance(p.value, Affine) or not all(
            implies(p.where, c, at.shape(ids)) for c in (p.value.of_rank(rank), own.minus(p.value))
        ):
            raise LooksAhead("it picks from the sequence by index")
    return replace(x, culprit=node, above=None, below=None, key=axis)


# -- everything whose axis rule says enough --------------------------------------------------------------------------------
def _general(
    node: Node, given: Sequence[Label], symbol: str, at: Indexing, labels: Mapping[Value, Label]
) -> Label:
    """The label that follows from the axis rule: of what goes on along one axis or two, or meets along one of two."""
    rule = node.axes
    ends: set[int] = set()
    mixed: dict[Factor, list[tuple[int, int]]] = {}
    for i, x in enumerate(given):
        for axis in x.axes:
            factors = rule.operands[i][axis]
            if len(factors) == 1 and factors[0].role in ("reduced", "normalized", "ordered") and not factors[0].does:
                mixed.setdefault(factors[0], []).append((i, axis))
            else:
                ends.add(image(node, rule, i, axis))
    if mixed:
        label = _over_keys(node, rule, given, ends, mixed)
        if label.relates and not label.widened and node.op.kind != "ordered":
            for v, x in zip(node.inputs, given):
                if x.relates:
                    _see(v, label.key, labels)
        return label
    ends |= set(_repeated(node, rule, symbol))
    if len(ends) > 2:
        raise LooksAhead("it relates more than two positions")
    if len(ends) == 2:
        return _related(node, rule, given, min(ends), max(ends), at)
    return _through(node, rule, given, ends)


def image(node: Node, rule: AxisRule, i: int, axis: int) -> int:
    """The axis of the results along which ``axis`` of operand i runs. Raises LooksAhead where there is none."""
    factors = rule.operands[i][axis]
    for f in factors:
        if f.role != "free":
            raise LooksAhead(_reason(node, f))
    at = rule.result.index(factors) if factors in rule.result else None
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


def _through(node: Node, rule: AxisRule, given: Sequence[Label], ends: set[int]) -> Label:
    """The label of a result along the one axis along which all operands that run along the sequence do."""
    [end] = ends
    kinds = {x.kind for x in given if x.along}
    others = [axes for x, axes in zip(given, rule.operands) if not x.along]
    if any(f in axis for axes in others for axis in axes for f in rule.result[end]):
        raise LooksAhead("it joins parts that run along the sequence with others that do not")
    longer = [x for x in given if x.along and x.extra]
    if longer and not all(x.kind == "token" and x.extra == longer[0].extra for x in given if x.along):
        raise LooksAhead(longer[0].reason)
    kind: Kind = "token" if "token" in kinds else "position" if "position" in kinds else "uniform"
    if not longer:
        return Label(kind, end)
    return replace(longer[0], axis=end, mixes=True, valid=min(x.valid for x in given if x.along))


def _tokens_in(given: Sequence[Label]) -> bool:
    return any(x.kind in ("token", "scores") for x in given)


def _related(node: Node, rule: AxisRule, given: Sequence[Label], axis: int, other: int, at: Indexing) -> Label:
    """The label of a result along two axes: which numbers stand on either side of its diagonal."""
    if any(x.extra for x in given):
        raise LooksAhead(next(x.reason for x in given if x.extra))
    if len({(x.front, x.back) for x in given if x.relates}) > 1:
        raise LooksAhead("its operands have other elements beside the positions")
    keys = {image(node, rule, i, x.key) for i, x in enumerate(given) if x.key >= 0}
    if len(keys) > 1:
        raise LooksAhead("it relates keys to keys")
    key = keys.pop() if keys else -1
    if not _tokens_in(given):
        pair = replace(_pair(node, axis, other, at), key=key)
        if pair.above is not None and pair.below is not None:
            return pair
        known = _sides(node, rule, given, axis, at)
        above, below = (n if side is None else side for side, n in zip((pair.above, pair.below), known))
        return replace(pair, above=above, below=below)
    above, below = _sides(node, rule, given, axis, at)
    label = Label("scores", axis, other, culprit=node, reason="it relates tokens to each other", above=above, below=below,
                  key=key)  # fmt: skip
    for i, x in enumerate(given):
        if x.widened:
            return replace(label, wide=image(node, rule, i, x.wide), front=x.front, back=x.back)
    return label


def _sides(node: Node, rule: AxisRule, given: Sequence[Label], axis: int, at: Indexing) -> list[float | None]:
    """What a result along ``axis`` and another one is where the index along the other is larger, and where it is smaller."""
    operands = list(enumerate(zip(given, node.inputs)))
    return [beside(node, [_number(x, v, node, rule, i, axis, up, at) for i, (x, v) in operands]) for up in (True, False)]


def _number(x: Label, v: Value, node: Node, rule: AxisRule, i: int, axis: int, above: bool, at: Indexing) -> float | None:
    """The number of the elements of operand i behind those of the result above (below) its diagonal."""
    if x.relates:
        straight = image(node, rule, i, x.axis) == axis
        return x.above if above is straight else x.below
    if x.kind != "fixed":
        return None
    found = at.of(v)
    if found is not None and isinstance(found.number, int):
        return float(found.number)
    first, *others = at.pieces(v)
    return first.value if not others and isinstance(first.value, float) else None


def _over_keys(
    node: Node, rule: AxisRule, given: Sequence[Label], ends: set[int], mixed: dict[Factor, list[tuple[int, int]]]
) -> Label:
    """The label of what sums, normalizes or counts along an axis of positions, for each position along another one."""
    [(f, parts), *others] = mixed.items()
    if f.role == "ordered" and f.how == "forward" and not others and not ends and not given[0].relates:
        if given[0].kind != "token" or given[0].extra:
            raise LooksAhead(given[0].reason or "it is a running sum over positions")
        return Label("token", rule.result.index((f,)), mixes=True)
    scores = [(given[i], axis) for i, axis in parts if given[i].relates]
    if others or not scores or len(ends) != 1:
        met = "every position meets every other; " + _HINT
        raise LooksAhead(met if len(ends) > 1 or others else _reason(node, f))
    if any(x.extra for x in given):
        raise LooksAhead(next(x.reason for x in given if x.extra))
    if any(x.wide not in (-1, axis) or (x.widened and len(parts) > 1) for x, axis in scores):
        raise LooksAhead("it puts other elements beside the positions")
    neutral = f.neutral
    if node.op.kind == "product":
        neutral = 0.0 if f.how == "sum" else None
    elif f.role == "ordered":
        neutral = 0.0 if f.how == "backward" else math.nan  # forward, elements behind do not matter, whatever they are
    if any(x.key not in (-1, axis) for x, axis in scores):
        raise LooksAhead("it takes queries together")
    found = [x.later(axis) for x, axis in scores]
    if neutral is None:
        raise LooksAhead(_reason(node, f))
    if not math.isnan(neutral) and not any(stands_for(n, neutral) for n in found):
        said = "; ".join(dict.fromkeys("it is not known what" if n is None else f"{n:g}" for n in found))
        raise LooksAhead(f"a token meets later ones: where a key is later, {said} stands in it, not {neutral:g}; {_HINT}")
    end, tokens = next(iter(ends)), _tokens_in(given)
    if f.role == "reduced":
        return Label("token" if tokens else "position", end, mixes=True)
    axis = rule.result.index((f,))
    x, key = scores[0]
    after = None if math.isnan(neutral) else neutralized(node, key, neutral)
    first, second = sorted((axis, end))
    straight = axis == second
    return replace(
        x, axis=first, other=second, wide=axis if x.widened else -1, key=axis, culprit=node,
        above=after if straight else None, below=None if straight else after,
    )  # fmt: skip


def _see(scores: Value, key: int, labels: Mapping[Value, Label]) -> None:
    """Raises LooksAhead where some query sees nothing, and a number hides: then later keys count as much as earlier ones."""
    if (mask := blind(scores, key, labels)) is not None:
        raise LooksAhead(
            f"a token meets later ones: under %{mask.name} some token sees nothing, and a number hides all keys from it alike; "
            "use -inf, or let each token see itself"
        )


# -- operations with a rule of their own -------------------------------------------------------------------------------------
def _attention(
    node: Node, attrs: AttentionAttrs, given: Sequence[Label], at: Indexing, labels: Mapping[Value, Label]
) -> Label:
    """Attention keeps its keys and values."""
    q, k, v = given[:3]
    if any(x.extra for x in given):
        raise LooksAhead(next(x.reason for x in given if x.extra))
    if q.along and q.axis != 1:
        raise LooksAhead("the positions of q are not axis 1")
    masked = mask_and_sink(attrs, node.inputs[3:])[0] is not None
    mask = given[3] if masked else FIXED
    rank = len(node.inputs[3].shape) if masked else 0
    if not k.along and not v.along:
        if attrs.causal or attrs.window is not None:
            raise LooksAhead("it is causal over keys that do not run along the sequence")
        if mask.along and (mask.relates or mask.axis != rank - 2 or not q.along):
            raise LooksAhead("its mask runs along the sequence, and its keys do not")
        return Label("token" if _tokens_in([q, mask]) else q.kind, q.axis)
    if not (q.along and k.along and v.along) or k.axis != 1 or v.axis != 1:
        raise LooksAhead("q, k and v do not all run along the sequence on axis 1")
    if mask.along and any(rank - axis > 2 for axis in mask.axes):
        raise LooksAhead("its mask runs along the sequence on an axis that is neither that of queries nor that of keys")
    if mask.relates and mask.key not in (-1, rank - 1):
        raise LooksAhead("its mask takes queries together: keys stand where its queries are")
    back = attrs.causal or (mask.relates and hides(node.inputs[3], mask.later(rank - 1)))
    if not back and not (mask.relates and sight(node.inputs[3], labels, at) == "within"):
        unread = mask.relates and mask.later(rank - 1) is None
        raise LooksAhead("it is bidirectional: a token attends to later ones" + (_UNREAD if unread else ""))
    if mask.relates and not attrs.causal:
        _see(node.inputs[3], rank - 1, labels)
    return Label("token", 1, mixes=True)


_UNREAD = ", as far as its mask is understood; if that looks back only, join it with a causal one (nn.causal(at) & mask)"


def sees_ahead(node: Node, labels: Mapping[Value, Label]) -> bool:
    """Whether a query of attention that can be cached may see later keys: those of its prefix, or of its picture."""
    mask, _ = mask_and_sink(AttentionAttrs.of(node), node.inputs[3:])
    if AttentionAttrs.of(node).causal or mask is None:
        return False
    return labels[mask].relates and not hides(mask, labels[mask].later(len(mask.shape) - 1))


def hides(mask: Value, number: float | None) -> bool:
    """Whether a mask hides what has this number in it."""
    return number == 0 if mask.tensor.dtype.bits == 8 and not mask.tensor.dtype.is_float else stands_for(number, -math.inf)


def _scan(node: Node, attrs: ScanAttrs, given: Sequence[Label], symbol: str) -> list[Label]:
    """A scan along the sequence keeps what it carries."""
    c, s = attrs.carries, attrs.slices
    carried, sliced, others = given[:c], given[c : c + s], given[c + s :]
    does = "it is a scan over the sequence"
    if attrs.reverse:
        raise LooksAhead(f"{does} from its end")
    if any(x.along for x in [*carried, *others]):
        raise LooksAhead(f"{does}, and what it starts from, or reads in every turn, runs along the sequence")
    if (longer := next((x for x in sliced if x.extra), None)) is not None:
        raise LooksAhead(longer.reason)
    if any(x.along and x.axes != (0,) for x in sliced) or not all(x.along for x in sliced):
        raise LooksAhead("it is a scan over another axis than the sequence")
    if symbol in attrs.body.symbols:
        raise LooksAhead(f"{does}, and what it does in a turn depends on {symbol}, the number of tokens")
    kind: Kind = "token" if _tokens_in(sliced) else "position"
    if kind == "position":
        raise LooksAhead(f"{does} that reads positions alone")
    return [*[replace(LAST, mixes=True)] * c, *[Label(kind, 0, mixes=True)] * (len(node.outputs) - c)]


def _carried(node: Node, given: Sequence[Label]) -> list[Label]:
    """What runs forward along the sequence keeps what it carries."""
    rule, starts = node.axes, node.op.recurrence.values()
    if any(given[i].along for i in starts):
        raise LooksAhead("what it starts from runs along the sequence")
    if (longer := next((x for x in given if x.extra), None)) is not None:
        raise LooksAhead(longer.reason)
    moving = [(i, x) for i, x in enumerate(given) if i not in starts]
    turns = {f for i, x in moving for axis in x.axes for f in rule.operands[i][axis]}
    if not all(x.along for _, x in moving) or len(turns) != 1 or (turn := turns.pop()).how != "forward":
        raise LooksAhead("it runs over another axis than the sequence")
    kind: Kind = "token" if _tokens_in(given) else "uniform"
    if kind != "token" and any(x.kind == "position" for x in given):
        raise LooksAhead("it reads positions alone")
    made = [next((i for i, axis in enumerate(axes) if turn in axis), None) for axes in rule.results]
    return [replace(LAST, mixes=True) if i is None else Label(kind, i, mixes=True) for i in made]


def refuse(label: Label, output: str, symbol: str) -> IRError:
    """The error for an output that looks ahead: what, which node, which line."""
    at = label.culprit
    loc = at.loc if at is not None else None
    shown = repr(at)
    return IRError(f"no KV cache can be derived for output {output}: along {symbol}, {shown}\n  {label.reason}", loc)
