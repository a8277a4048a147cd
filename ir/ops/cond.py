"""The choice: of two bodies, only the one that is taken runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import op as _op
from ..axes import AxisRule, whole
from ..dims import DimLike, maximum
from ..errors import TypeMismatch
from ..op import Body, ErrorSample, Op, Sample, register, tensor
from ..types import Array, DType, TensorType, Type
from .bodies import differentiable, fresh_prefix, match, parsed, zeros

if TYPE_CHECKING:
    from ..builder import Builder
    from ..graph import Graph, Node, Value


@dataclass(frozen=True)
class CondAttrs(_op.Attrs):
    """What is done where the condition holds, and where not: from the same operands to results of the same types."""

    then: Body
    otherwise: Body

    @property
    def shared(self) -> int:
        return 1


@register
class Cond(Op):
    """``cond(condition, *operands)`` -> the results of ``then(*operands)``, or of ``otherwise(*operands)`` (jax.lax.cond).

    The branch that is not taken does nothing: what it needs of sizes, and of indices, need not hold. Branches see no value but
    their inputs, and no parameters.
    """

    name = "cond"
    kind = "control"
    Attrs = CondAttrs

    def infer(self, attrs: CondAttrs, condition: Type, *types: Type) -> list[Type]:
        if condition != TensorType(DType.BOOL, ()):
            raise TypeMismatch(f"the condition is bool[], not {condition}")
        for what, branch in _branches(attrs):
            if branch.params:
                raise TypeMismatch(f"{what} reads the parameter {next(iter(branch.params))}: that must be an operand")
            if len(branch.inputs) != len(types):
                raise TypeMismatch(f"{what} takes {len(branch.inputs)} values, and {len(types)} operands are given")
            for given, v in zip(types, branch.inputs):
                match(given, v.type, f"input %{v.name} of {what}")
        results = [tensor(v.type, f"the result %{v.name}") for v in attrs.then.graph.outputs]
        others = attrs.otherwise.graph.outputs
        if len(results) != len(others):
            raise TypeMismatch(f"then returns {len(results)} values, and otherwise {len(others)}")
        for i, (t, v) in enumerate(zip(results, others)):
            match(v.type, t, f"result {i} of then", certain=True)
        return list(results)

    def axes(self, attrs: CondAttrs, *types: Type) -> AxisRule:
        """Of what the branches do along axes nothing is said."""
        does = "is a choice between two branches over {}"
        return AxisRule(tuple(whole(t.shape, does) for t in types), tuple(whole(v.shape) for v in attrs.then.graph.outputs))

    def run(self, attrs: CondAttrs, dims: Mapping[str, int], condition: Array, *arrays: Array) -> list[Array]:
        """With the symbols as they are: sizes that a branch needs are looked at where it is taken."""
        from ..evaluate import evaluate

        assert isinstance(condition, np.ndarray | np.generic)
        branch = (attrs.then if condition else attrs.otherwise).graph
        return evaluate(branch, dict(zip((v.name for v in branch.inputs), arrays)), symbols=dims)

    def reference(self, attrs: CondAttrs, *arrays: Array) -> list[Array]:
        return self.run(attrs, {}, *arrays)

    def multiply_adds(self, attrs: CondAttrs, *types: Type) -> DimLike:
        """Those of the branch that has more."""
        sums: list[DimLike] = [0, 0]
        for i, (_, branch) in enumerate(_branches(attrs)):
            for node in branch.nodes:
                sums[i] = sums[i] + node.multiply_adds
        return maximum(*sums)

    def vjp(self, b: Builder, node: Node, *grads: Value | None) -> list[Value | None]:
        """The choice between the branches' gradients, each of which computes again what it needs."""
        attrs = CondAttrs.of(node)
        condition, *operands = node.inputs
        given = [g for g in grads if g is not None]
        made = [_gradients(branch, grads) for _, branch in _branches(attrs)]
        wanted = [i for i in range(len(operands)) if any(i in found for _, found in made)]
        if not wanted:
            return [None] * len(node.inputs)
        for graph, found in made:
            inner = _builder(graph)
            graph.set_outputs(
                [found[i] if i in found else zeros(inner, operands[i].tensor) for i in wanted], [f"{i}" for i in wanted]
            )
        (then, _), (otherwise, _) = made
        out = b.cond(condition, *operands, *given, then=Body(then), otherwise=Body(otherwise))
        results = dict(zip(wanted, out if isinstance(out, tuple) else (out,)))
        return [None, *(results.get(i) for i in range(len(operands)))]

    def samples(self) -> Iterable[Sample]:
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((2, 3)), rng.standard_normal((3, 2))
        attrs = {
            "then": parsed("""graph @yes(%x: f64[2, 3], %y: f64[3, 2], %i: i64[2]) {
              %p: f64[2, 2] = matmul(%x, %y)
              %q: f64[2, 2] = tanh(%p)
              return %q, %x
            }"""),
            "otherwise": parsed("""graph @no(%x: f64[2, 3], %y: f64[3, 2], %i: i64[2]) {
              %p: f64[2, 2] = gather(%y, %i) {axis=0}
              %n: f64[2, 3] = mul(%x, %x)
              return %p, %n
            }"""),
        }
        for taken in (True, False):  # indices that are outside, where nothing reads them
            yield Sample([np.array(taken), x, y, np.array([9, 9] if taken else [2, 0])], attrs)

    def errors(self) -> Iterable[ErrorSample]:
        same = parsed("graph @same(%x: f32[n]) {\n  %y: f32[n] = neg(%x)\n  return %y\n}")
        attrs = {"then": same, "otherwise": same}
        yield ErrorSample(["bool[1]", "f32[n]"], attrs, "the condition is bool[], not bool[1]")
        yield ErrorSample(["i64[]", "f32[n]"], attrs, "the condition is bool[], not i64[]")
        yield ErrorSample(["bool[]"], attrs, "then takes 1 values, and 0 operands are given")
        yield ErrorSample(["bool[]", "f16[n]"], attrs, "input %x of then is f32[n], not f16[n]")
        reads = parsed("graph @reads(%x: f32[n]) {\n  param %w: f32[n]\n  %y: f32[n] = mul(%x, %w)\n  return %y\n}")
        yield ErrorSample(["bool[]", "f32[n]"], {**attrs, "otherwise": reads}, "otherwise reads the parameter w")
        two = parsed("graph @two(%x: f32[n]) {\n  %y: f32[n] = neg(%x)\n  return %x, %y\n}")
        yield ErrorSample(["bool[]", "f32[n]"], {**attrs, "otherwise": two}, "then returns 1 values, and otherwise 2")
        wide = parsed("graph @wide(%x: f32[n]) {\n  %y: f32[2*n] = concat(%x, %x) {axis=0}\n  return %y\n}")
        yield ErrorSample(["bool[]", "f32[n]"], {**attrs, "then": wide}, "result 0 of then is f32[2*n], not f32[n]")


def _branches(attrs: CondAttrs) -> list[tuple[str, Graph]]:
    return [("then", attrs.then.graph), ("otherwise", attrs.otherwise.graph)]


def _builder(graph: Graph) -> Builder:
    from ..builder import Builder

    return Builder(graph)


def _gradients(branch: Graph, grads: tuple[Value | None, ...]) -> tuple[Graph, dict[int, Value]]:
    """A graph over the branch's inputs and the gradients of its results that there are, and those of its inputs by number."""
    from ..graph import Graph
    from ..vjp import backward

    g = Graph(f"{branch.name}_vjp")
    own = [g.add_input(v.name, v.type) for v in branch.inputs]
    word = fresh_prefix(branch, "grad.")
    seeds = {i: g.add_input(f"{word}{i}", branch.outputs[i].type) for i, dy in enumerate(grads) if dy is not None}
    b = _builder(g)
    outputs = b.inline(branch, own)
    wanted = [i for i, v in enumerate(own) if differentiable(v)]
    made = backward(b, [outputs[i] for i in seeds], list(seeds.values()), [own[i] for i in wanted])
    return g, {i: dv for i, dv in zip(wanted, made) if dv is not None}
