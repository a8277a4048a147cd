"""Reverse-mode differentiation of a whole graph: from a loss to the loss and its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from wasat.ir import Builder, Graph, Program, TensorType, Value
from wasat.ir.vjp import backward

from ..core import Pass, PassError, Remarks


@dataclass(frozen=True)
class Differentiate(Pass):
    """@graph -> @into: the same outputs, then ``grad.X`` for each parameter or input X that ``wrt`` chooses.

    ``wrt``: names, and globs such as ``layers.*.weight``. A glob chooses among the graph's float parameters; a plain name may
    also be an input. ``of``: the output to differentiate, a float scalar; by default the first. The gradient of X has X's
    type; where the output does not depend on X it is zero, and a remark says so. @graph stays as it is. Run on its own result
    it gives second derivatives, ``grad.X.of.grad.Y``. @into is a graph like any other: clean-up, fusion and backends take it.

    Raises PassError for a name that chooses nothing differentiable, for an output that is no float scalar, and where @into
    exists; NotDifferentiable, naming the operation and its line, for an operation on the way that has no gradient.
    """

    graph: str = "loss"
    wrt: tuple[str, ...] = ("*",)
    of: str | None = None
    into: str = "gradients"
    name = "differentiate"

    def requires(self, program: Program) -> None:
        if self.into in program.graphs:
            raise PassError(f"@{self.into} exists; give the graph of gradients another name (into=)")

    def run(self, program: Program, remarks: Remarks) -> bool:
        g = program[self.graph].clone(self.into)
        y, chosen = self._output(g), self.chosen(g)
        b = Builder(g, loc=y.loc)
        grads = []
        for (name, x), dx in zip(chosen.items(), backward(b, [y], [b.constant(1.0, y.tensor.dtype)], list(chosen.values()))):
            if dx is None:
                remarks.missed(f"{self._of(g)} does not depend on {name}: its gradient is zero", g)
                dx = b.broadcast_to(b.constant(0.0, x.tensor.dtype), shape=x.shape)
            grads.append(dx)
        names = [f"grad.{name}" for name in chosen]
        if self._of(g).startswith("grad."):
            names = [f"{n}.of.{self._of(g)}" for n in names]
        g.set_outputs([*g.outputs, *grads], [*g.output_names, *names])
        program.graphs[self.into] = g
        remarks.applied(f"{self._of(g)} with respect to {', '.join(chosen)}", g)
        return True

    def _of(self, g: Graph) -> str:
        return g.output_names[0] if self.of is None else self.of

    def _output(self, g: Graph) -> Value:
        if self._of(g) not in g.output_names:
            raise PassError(f"@{self.graph} has no output {self.of}; there are {', '.join(g.output_names)}")
        y = g.outputs[g.output_names.index(self._of(g))]
        if not _is_float(y) or y.shape:
            raise PassError(f"output {self._of(g)} of @{self.graph} is {y.type}: only a float scalar has gradients")
        return y

    def chosen(self, g: Graph) -> dict[str, Value]:
        """What is differentiated by, by name, in a graph such as @graph."""
        named = {v.name: v for v in g.inputs} | g.params
        chosen: dict[str, Value] = {}
        for want in self.wrt:
            if want in named:
                if not _is_float(named[want]):
                    raise PassError(f"{want} is {named[want].type}: only floats have gradients")
                chosen[want] = named[want]
                continue
            found = {k: v for k, v in g.params.items() if _is_float(v) and fnmatchcase(k, want)}
            if not found:
                raise PassError(
                    f"{want} chooses no float parameter (nor input) of @{self.graph}; there are {', '.join(named) or 'none'}"
                )
            chosen |= found
        return chosen


def _is_float(v: Value) -> bool:
    return isinstance(v.type, TensorType) and v.type.dtype.is_float
