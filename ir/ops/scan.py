"""The loop: a body applied turn by turn, values carried from each turn to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import op as _op
from ..axes import AxisRule, Factor, whole
from ..checks import require_equal
from ..dims import DimLike, evaluate_dim
from ..errors import TypeMismatch
from ..op import Body, ErrorSample, Op, Sample, register, tensor
from ..types import Array, Type
from .bodies import differentiable, fresh_prefix, match, parsed, zeros

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Graph, Node, Value


@dataclass(frozen=True)
class ScanAttrs(_op.Attrs):
    """What is done in each turn, and which operands are what: first those carried, then those cut, then those that stay."""

    body: Body
    """From the carried values, one element of each sliced operand, and the other operands as they are, to the carried values
    of the next turn and further results."""
    carries: int
    slices: int
    length: DimLike | None = None
    """How many turns there are; given exactly where no operand is sliced."""
    reverse: bool = False
    """Turns go from the last element to the first."""

    @property
    def shared(self) -> int:
        return self.carries + self.slices


@register
class Scan(Op):
    """``scan(*carried, *sliced, *others)`` -> the carried values after the last turn, and each further result stacked.

    Turn t takes element t along the first axis of each sliced operand and makes element t of each stacked result
    (jax.lax.scan). The body sees no value but its inputs, and no parameters; whatever else it needs is one of the ``others``.
    """

    name = "scan"
    kind = "control"
    Attrs = ScanAttrs

    def infer(self, attrs: ScanAttrs, *types: Type) -> list[Type]:
        body, c, s = attrs.body.graph, attrs.carries, attrs.slices
        if c < 0 or s < 0 or len(types) < c + s or len(body.outputs) < c:
            raise TypeMismatch(
                f"it carries {c} and slices {s} of {len(types)} operands, and its body returns {len(body.outputs)} values"
            )
        if body.params:
            raise TypeMismatch(f"its body reads the parameter {next(iter(body.params))}: that must be an operand")
        if len(body.inputs) != len(types):
            raise TypeMismatch(f"its body takes {len(body.inputs)} values, and {len(types)} operands are given")
        length = attrs.length
        if (length is None) == (s == 0):
            raise TypeMismatch("length= is given where no operand is sliced, and only there")
        for i, (given, v) in enumerate(zip(types, body.inputs)):
            if c <= i < c + s:
                x = tensor(given, "a sliced operand")
                if not x.shape:
                    raise TypeMismatch(f"operand {i} is sliced, and {x} has no axis")
                length = x.shape[0] if length is None else require_equal(length, x.shape[0], f"turns of operand {i}")
                given = x.with_shape(*x.shape[1:])
            match(given, v.type, f"input %{v.name} of the body")
        for start, v in zip(body.inputs[:c], body.outputs):
            match(v.type, tensor(start.type, f"the carried %{start.name}"), f"%{start.name}, which is carried,", certain=True)
        for node in body.nodes:
            for a, b in node.checks:
                require_equal(a, b, f"sizes in {node!r}")
        assert length is not None
        rows = [tensor(v.type, f"the result %{v.name}") for v in body.outputs[c:]]
        return [*(v.type for v in body.inputs[:c]), *(t.with_shape(length, *t.shape) for t in rows)]

    def axes(self, attrs: ScanAttrs, *types: Type) -> AxisRule:
        """Turns are ordered; of what the body does along other axes nothing is said."""
        carried, sliced, others = _parts(attrs, types)
        does = "is a scan over {}: its carry is not kept"
        turn = (
            Factor(sliced[0].shape[0], "ordered", "backward" if attrs.reverse else "forward", does=does)
            if sliced
            else Factor(attrs.length if attrs.length is not None else 0, "whole")
        )
        carry = [whole(t.shape, does) for t in carried]
        rows = [((turn,), *whole(v.type.shape)) for v in attrs.body.graph.outputs[attrs.carries :]]
        return AxisRule(
            (*carry, *(((turn,), *whole(t.shape[1:], does)) for t in sliced), *(whole(t.shape, does) for t in others)),
            (*carry, *rows),
        )

    def reference(self, attrs: ScanAttrs, *arrays: Array) -> list[Array]:
        return self.run(attrs, {}, *arrays)

    def run(self, attrs: ScanAttrs, dims: Mapping[str, int], *arrays: Array) -> list[Array]:
        """With the symbols of the body as they are."""
        from ..evaluate import evaluate

        body, (state, sliced, others) = attrs.body.graph, _parts(attrs, arrays)
        assert attrs.length is not None or sliced
        turns = evaluate_dim(attrs.length, dims) if attrs.length is not None else len(_dense(sliced[0]))
        names = [v.name for v in body.inputs]
        rows: list[list[Array]] = [[] for _ in body.outputs[attrs.carries :]]
        for t in reversed(range(turns)) if attrs.reverse else range(turns):
            results = evaluate(body, dict(zip(names, [*state, *(_dense(x)[t] for x in sliced), *others])), symbols=dims)
            state = results[: attrs.carries]
            for row, x in zip(rows, results[attrs.carries :]):
                row.append(x)
        stacked = []
        for row, v in zip(rows, body.outputs[attrs.carries :]):
            empty = np.empty((0, *v.tensor.concrete(dims)), v.tensor.dtype.np)
            stacked.append(np.stack([_dense(x) for x in (row[::-1] if attrs.reverse else row)]) if row else empty)
        return [*state, *stacked]

    def multiply_adds(self, attrs: ScanAttrs, *types: Type) -> DimLike:
        turns = attrs.length if attrs.length is not None else types[attrs.carries].shape[0]
        each: DimLike = 0
        for node in attrs.body.graph.nodes:
            each = each + node.multiply_adds
        return turns * each

    def vjp(self, b: Builder, node: Node, *grads: Value | None) -> list[Value | None]:
        """A scan the other way round, over what each turn started from, which a second run forward keeps."""
        attrs: Any = node.attrs
        c, (_, sliced, others) = attrs.carries, _parts(attrs, node.inputs)
        kept: Sequence[Value] = ()
        if c:
            body = attrs.body.graph.clone()
            name = fresh_prefix(body, "start.")
            names = [*body.output_names, *(name + v.name for v in body.inputs[:c])]
            body.set_outputs([*body.outputs, *body.inputs[:c]], names)
            again = _emit(b, node.inputs, body, c, attrs.slices, attrs.length, attrs.reverse)
            kept = again[-c:]
        back = _Backward(attrs.body.graph, c, attrs.slices, grads)
        carried = [
            g if g is not None else zeros(b, v.tensor) for v, g in zip(node.outputs[:c], grads) if differentiable(v)
        ]
        sums = [zeros(b, v.tensor) for v in back.summed]
        rows = [*kept, *sliced, *(g for g in grads[c:] if g is not None)]
        results = iter(
            _emit(
                b, [*carried, *sums, *rows, *others], back.graph, len(carried) + len(sums), len(rows),
                None if rows else attrs.length, not attrs.reverse,
            )
        )  # fmt: skip
        found = {v: next(results) for v in back.order}
        return [found.get(v) for v in attrs.body.graph.inputs]

    def samples(self) -> Iterable[Sample]:
        rng = np.random.default_rng(0)
        h, x, w = rng.standard_normal((2, 3)), rng.standard_normal((4, 2, 5)), rng.standard_normal((5, 3))
        cell = parsed("""graph @cell(%h: f64[2, 3], %x: f64[2, 5], %w: f64[5, 3]) {
          %wx: f64[2, 3] = matmul(%x, %w)
          %sum: f64[2, 3] = add(%wx, %h)
          %next: f64[2, 3] = tanh(%sum)
          %y: f64[2, 3] = mul(%next, %next)
          return %next, %y, old=%h
        }""")
        for reverse in (False, True):
            yield Sample([h, x, w], {"body": cell, "carries": 1, "slices": 1, "reverse": reverse})
        yield Sample([h, x[:0], w], {"body": cell, "carries": 1, "slices": 1}, grad=(0, 2))
        power = parsed("""graph @power(%i: i64[], %p: f64[2, 3], %h: f64[2, 3]) {
          %one: i64[] = add(%i, 1:i64)
          %t: f64[] = cast(%one) {dtype=f64}
          %scaled: f64[2, 3] = div(%p, %t)
          %next: f64[2, 3] = mul(%scaled, %h)
          return %one, %next
        }""")
        yield Sample([np.array(2), np.exp(h), h], {"body": power, "carries": 2, "slices": 0, "length": 3})
        each = parsed("""graph @each(%a: f64[2, 5], %n: i64[]) {
          %k: f64[] = cast(%n) {dtype=f64}
          %y: f64[2, 5] = mul(%a, %k)
          %z: f64[] = reduce_sum(%y) {axes=(0, 1)}
          return %y, %z
        }""")
        yield Sample([x, np.arange(4)], {"body": each, "carries": 0, "slices": 2})
        outer = parsed("""graph @outer(%s: f64[2], %m: f64[5, 2]) {
          %h: f64[2], %p: f64[5, 2] = scan(%s, %m) {body=graph @inner(%h: f64[2], %r: f64[2]) {
            %next: f64[2] = mul(%h, %r)
            return %next, %h
          }, carries=1, slices=1}
          return %h, %p
        }""")
        yield Sample([h[:, 0], 1 + 0.1 * x.transpose(0, 2, 1)], {"body": outer, "carries": 1, "slices": 1})

    def errors(self) -> Iterable[ErrorSample]:
        step = parsed("graph @step(%h: f32[2], %x: f32[3]) {\n  %n: f32[2] = neg(%h)\n  return %n, %x\n}")
        attrs = {"body": step, "carries": 1, "slices": 1}
        yield ErrorSample(["f32[2]"], attrs, "it carries 1 and slices 1 of 1 operands")
        yield ErrorSample(["f32[2]", "f32[4, 3]"], {**attrs, "carries": -1}, "it carries -1")
        yield ErrorSample(["f32[2]", "f32[4, 3]", "f32[2]", "f32[2]"], {**attrs, "carries": 3}, "returns 2 values")
        yield ErrorSample(["f32[2]", "f32[4, 3]", "f32[2]"], attrs, "its body takes 2 values, and 3 operands are given")
        yield ErrorSample(["f32[2]", "f32[4, 3]"], {**attrs, "length": 4}, "length= is given where no operand is sliced")
        yield ErrorSample(["f32[2]", "f32[3]"], {**attrs, "slices": 0}, "length= is given where no operand is sliced")
        yield ErrorSample(["f32[2]", "f32[]"], attrs, "operand 1 is sliced, and f32[] has no axis")
        yield ErrorSample(["f32[2]", "f32[4, 5]"], attrs, "input %x of the body is f32[3], not f32[5]")
        yield ErrorSample(["f16[2]", "f32[4, 3]"], attrs, "input %h of the body is f32[2], not f16[2]")
        yield ErrorSample(["int8b2f16[2]", "f32[4, 3]"], attrs, "input %h of the body is f32[2], not int8b2f16[2]")
        yield ErrorSample(["f32[2]", "int8b3f16[4, 3]"], attrs, "a sliced operand is quantized")
        grows = parsed("graph @grows(%h: f32[n]) {\n  %n: f32[2*n] = concat(%h, %h) {axis=0}\n  return %n\n}")
        once = {"carries": 1, "slices": 0, "length": 2}
        yield ErrorSample(["f32[n]"], {**once, "body": grows}, "%h, which is carried, is f32[n], not f32[2*n]")
        wider = parsed("graph @wider(%h: f32[]) {\n  %n: f64[] = cast(%h) {dtype=f64}\n  return %n\n}")
        yield ErrorSample(["f32[]"], {**once, "body": wider}, "%h, which is carried, is f32[], not f64[]")
        reads = parsed("graph @reads(%h: f32[2]) {\n  param %w: f32[2]\n  %n: f32[2] = mul(%h, %w)\n  return %n\n}")
        yield ErrorSample(["f32[2]"], {**once, "body": reads}, "its body reads the parameter w")
        pair = parsed("graph @pair(%x: f32[3], %y: f32[3]) {\n  %z: f32[3] = add(%x, %y)\n  return %z\n}")
        both = {"body": pair, "carries": 0, "slices": 2}
        yield ErrorSample(["f32[4, 3]", "f32[5, 3]"], both, "turns of operand 1: 4 is not 5")


class _Backward:
    """The body of a scan's gradient: gradients of the carried values, and sums of those of the other operands, go from turn to
    turn; those of the sliced operands come out of each."""

    def __init__(self, body: Graph, carries: int, slices: int, grads: Sequence[Value | None]) -> None:
        from ..builder import Builder
        from ..graph import Graph
        from ..vjp import backward

        g = self.graph = Graph(f"{body.name}_vjp")
        prefix = fresh_prefix(body, "grad.")
        own = {v: g.add_input(v.name, v.type) for v in body.inputs}
        carried, sliced, others = body.inputs[:carries], body.inputs[carries:][:slices], body.inputs[carries + slices :]
        b = Builder(g)
        outputs = b.inline(body, [own[v] for v in body.inputs])
        wanted = [v for v in carried if differentiable(v)]
        seeds = {i: g.add_input(f"{prefix}{v.name}", v.type) for i, v in enumerate(carried) if v in wanted}
        given = {
            i: g.add_input(f"{prefix}{i}", body.outputs[i].type) for i in range(carries, len(outputs)) if grads[i] is not None
        }
        targets = [v for v in body.inputs if differentiable(v)]
        seeded = {**seeds, **given}
        made = backward(b, [outputs[i] for i in seeded], list(seeded.values()), [own[v] for v in targets])
        found = {v: dv for v, dv in zip(targets, made) if dv is not None}
        self.summed = [v for v in others if v in found]
        sums = [g.add_input(f"{prefix}{v.name}", v.type) for v in self.summed]
        stacked = [v for v in sliced if v in found]
        self.order = [*wanted, *self.summed, *stacked]
        """Inputs of the body that get a gradient, in the order of the results."""
        g.inputs = [*seeds.values(), *sums, *(own[v] for v in (*carried, *sliced)), *given.values(), *(own[v] for v in others)]
        results = [found[v] if v in found else zeros(b, v.tensor) for v in wanted]
        results += [b.add(total, found[v]) for total, v in zip(sums, self.summed)]
        g.set_outputs([*results, *(found[v] for v in stacked)], [f"{prefix}{v.name}" for v in self.order])


def _parts(attrs: ScanAttrs, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Operands that are carried, those that are sliced, and the others."""
    c, s = attrs.carries, attrs.slices
    return list(operands[:c]), list(operands[c : c + s]), list(operands[c + s :])


def _emit(
    b: Builder, operands: Sequence[Value], body: Graph, carries: int, slices: int, length: DimLike | None, reverse: bool
) -> tuple[Value, ...]:
    made = b.scan(*operands, body=Body(body), carries=carries, slices=slices, length=length, reverse=reverse)
    return made if isinstance(made, tuple) else (made,)


def _dense(x: Array) -> np.ndarray:
    assert isinstance(x, np.ndarray | np.generic)
    return np.asarray(x)
