"""Mixed precision: products and activations in half precision, reductions and losses in f32, parameters as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import ml_dtypes
import numpy as np
from wasat.ir import Builder, DType, Graph, Node, ParamSource, Program, TensorType, Type, TypeMismatch, Value
from wasat.ir.checks import collect_checks

from ..analyses.halves import float_holds
from ..core import Pass, PassError, Remarks


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Activations of @graph that are f32 become ``dtype``, bf16 or f16 (arXiv:1710.03740); inputs, parameters and outputs stay.

    Products take operands in half precision, and rows of parameters are looked up as such; reductions, softmax and what else
    losses are made of get f32. Any other operation follows its operands: in half precision if they are, parameters and
    constants beside them converted (constants only if they neither overflow nor vanish, parameters only if f16 holds
    their rows; else what reads them is in f32, and a remark says so); in f32 where an operand is.
    Normalizations and attention compute in f32 inside. Values that the graph itself has in other types are left alone; so are
    the bodies of loops, which a remark names.

    Raises PassError for another dtype.
    """

    graph: str = "loss"
    dtype: str = "bf16"
    name = "mixed-precision"
    exact = False

    def requires(self, program: Program) -> None:
        if self.dtype not in ("bf16", "f16"):
            raise PassError(f"dtype={self.dtype!r}: half precision is bf16 or f16")

    def run(self, program: Program, remarks: Remarks) -> bool:
        old = program[self.graph]
        wide = {v for v in old.params.values() if self.dtype == "f16" and not _f16_holds(program.params.get(v.param or v.name))}
        for v in wide:
            remarks.missed(f"%{v.name} stays f32: {v.param} has a row outside f16", v)
        made = _Mixed(old, DType.of(self.dtype), wide)
        made.emit()
        for node in old.nodes:
            if node.attrs.bodies and (count := sum(n.op.precision == "half" for b in node.attrs.bodies for n in b.graph.nodes)):
                name = f"%{node.outputs[0].name} = {node.op.name}"
                remarks.missed(f"{name} keeps f32 in its body (products there: {count})", node)
        if not made.count:
            remarks.missed("it has no product in f32", old)
            return False
        program.graphs[self.graph] = made.graph
        remarks.applied(f"{made.count} products in {self.dtype}", made.graph)
        return True


def _f16_holds(source: ParamSource | None) -> bool:
    """Whether f16 holds the numbers of a parameter, as far as they are known."""
    if source is None or not getattr(source, "is_data", False) or not isinstance(source.type, TensorType):
        return True
    return source.type.dtype is not DType.F32 or float_holds(np.atleast_1d(np.asarray(source.load())), DType.F16)


class _Mixed:
    """The graph in mixed precision in the making."""

    def __init__(self, source: Graph, half: DType, wide: set[Value]) -> None:
        self.source, self.half = source, half
        self._wide = wide
        """Parameters that half precision does not hold, and what is made of them."""
        self.graph = Graph(source.name)
        self.count = 0
        """Products in half precision."""
        self._new: dict[Value, Value] = {}
        self._weak: set[Value] = set(source.params.values())
        """Constants, parameters and what is made of parameters: they take the type of what they meet."""
        self._data: set[Value] = {v for v in [*source.inputs, *source.params.values()] if self._ours(v)}
        """What depends on f32 parameters and inputs; products of all else, such as angles of positions, need their digits."""
        self._casts: dict[tuple[Value, DType], Value] = {}

    def emit(self) -> None:
        for v in self.source.inputs:
            self._new[v] = self.graph.add_input(v.name, v.type)
        for name, v in self.source.params.items():
            self._new[v] = self.graph.add_param(name, v.type)
        for node in self.source.nodes:
            self._node(node)
        self.graph.set_outputs([self._as(v, v.type) for v in self.source.outputs], self.source.output_names)

    def _node(self, node: Node) -> None:
        if node.outputs[0].const is not None or self._of_parameters(node):
            self._weak.update(node.outputs)
            if not self._wide.isdisjoint(node.inputs):
                self._wide.update(node.outputs)
        if not self._data.isdisjoint(node.inputs):
            self._data.update(node.outputs)
        types = next(t for t in self._choices(node) if self._accepts(node, t))
        operands = [self._as(v, t) for v, t in zip(node.inputs, types)]
        made = self.graph.add_node(node.op, operands, node.attrs, loc=node.loc, names=[v.name for v in node.outputs])
        self._new.update(zip(node.outputs, made.outputs))
        table = node.inputs[0] if node.op.kind == "gather" else None
        if table is not None and table.param is not None and table not in self._wide and self._ours(node.output):
            self._new[node.output] = self._as(node.output, self._halved(node.output))
        self.count += node.op.precision == "half" and made.output.type != node.output.type

    def _of_parameters(self, node: Node) -> bool:
        """Whether parameters and constants make it; constants alone may make masks, of infinities or the largest f32."""
        return self._weak >= {*node.inputs} and any(v.const is None for v in node.inputs)

    def _choices(self, node: Node) -> list[list[Type]]:
        """Types of the operands, the first of which that the operation accepts is taken."""
        was = [v.type for v in node.inputs]
        if node.op.precision == "wide" or not self._wide.isdisjoint(node.inputs):
            return [was]
        now = [self._new[v].type for v in node.inputs]
        strong = [v for v in node.inputs if v not in self._weak]
        if node.op.precision == "half" and not self._data.isdisjoint(node.inputs):
            now = [self._halved(v) if v in strong or not strong else t for v, t in zip(node.inputs, now)]
        if now == was:
            return [was]
        return [now, [self._halved(v) if v in self._weak else t for v, t in zip(node.inputs, now)], was]

    def _accepts(self, node: Node, types: Sequence[Type]) -> bool:
        attributes = [getattr(node.attrs, f.name) for f in fields(node.attrs)]
        if list(types) != [v.type for v in node.inputs] and any(map(self._overflows, attributes)):
            return False
        try:
            with collect_checks():
                node.op.infer(node.attrs, *types)
        except TypeMismatch:
            return False
        return True

    def _overflows(self, attribute: object) -> bool:
        """Whether it is a finite number that half precision has no room for (what a pad fills with, say)."""
        if not isinstance(attribute, float) or not math.isfinite(attribute):
            return False
        return abs(attribute) > float(ml_dtypes.finfo(self.half.np).max)

    def _ours(self, v: Value) -> bool:
        return isinstance(v.type, TensorType) and v.type.dtype is DType.F32

    def _halved(self, v: Value) -> Type:
        """The type of ``v`` in half precision; as it is, if it is not f32, or a constant or parameter that would overflow or
        vanish."""
        if not self._ours(v) or v in self._wide or (v.const is not None and not _survives(v.const, self.half)):
            return v.type
        return v.tensor.with_dtype(self.half)

    def _as(self, v: Value, type: Type) -> Value:
        x = self._new[v]
        if x.type == type:
            return x
        assert isinstance(type, TensorType)
        key = x, type.dtype
        if key not in self._casts:
            self._casts[key] = Builder(self.graph, loc=v.loc).cast(x, dtype=type.dtype)
        return self._casts[key]


def _survives(x: np.ndarray, half: DType) -> bool:
    """Whether no finite number of ``x`` overflows, and none becomes 0."""
    with np.errstate(over="ignore"):
        y = x.astype(half.np).astype(x.dtype)
    return bool(np.array_equal(np.isfinite(x), np.isfinite(y)) and np.array_equal(x == 0, y == 0))
